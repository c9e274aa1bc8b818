"""The main path end to end on the embedded model: what is stored, that it repeats exactly, and how runs end."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipctl import load_spec, open_runs
from clipctl.engine import Scores
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.errors import DataError, DivergedError, Interrupted, SpecError
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.models import ChatTokenizer
from clipctl.records import Group, Seconds, Update, rollout_row, token_clips
from clipctl.rollout import Completion, DrawKey, Problem, Prompt
from clipctl.tasks import load_problems
from clipctl.train import Report, train

SMALL = {
    "run.steps": 3,
    "rollout.prompts": 12,
    "rollout.group_size": 4,
    "optim.responses_per_update": 16,
    "optim.epochs": 2,
}
CONTRACT = {
    "rollouts": "rollout prompts responses tokens reward_mean mean_at_group pass_at_group entropy entropy_token_mean "
    "entropy_normalized response_tokens_mean truncated groups_zero_advantage mismatch_max seconds_sample "
    "seconds_reward seconds_score seconds_update",
    "updates": "rollout inner_step loss grad_norm lr tokens tokens_advantage eps_low eps_high clip_low clip_high "
    "ratio_low ratio_high ratio_min ratio_max noise_max entropy_token_mean pg_reward pg_clip_low pg_clip_high npg_reward "
    "npg_clip_low npg_clip_high x_mass x_pg x_npg y_mass y_pg y_npg gap7_low gap7_high gap8_low gap8_high",
    "histograms": "rollout inner_step advantage_sign ratio_from ratio_to tokens pg npg",
    "probes": "rollout inner_step states entropy_before entropy_after entropy_change exact_gap7_low sampled_gap7_low",
    "samples": "rollout prompt_id sample reward outcome advantage tokens truncated entropy text",
    "events": "time rollout kind message data",
    "runs": "name state created_at finished_at spec git_commit version host",
}


def run(tmp_path: Path, preset: str = "tiny", **options: Any) -> Path:
    overrides = SMALL | options.pop("overrides", {})
    return train(load_spec(preset, overrides), runs_dir=tmp_path, **options)


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return list(runs.sql(query).fetchall())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), overrides={"run.name": "one", "store.tokens": "all"})


@pytest.mark.parametrize("view", CONTRACT)
def test_the_store_has_the_columns_of_the_contract(folder: Path, view: str) -> None:
    assert rows(folder, f"select {CONTRACT[view].replace(' ', ', ')} from {view}") or view == "events"


def test_the_folder_has_what_the_contract_says(folder: Path) -> None:
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert json.loads((folder / "spec.json").read_text())["run"]["name"] == "one"
    assert (folder / "metrics.duckdb").is_file()
    assert (folder / "checkpoints" / "3" / "model.safetensors").is_file()


def test_counts_add_up(folder: Path) -> None:
    updates = rows(folder, "select rollout, inner_step, tokens, tokens_advantage, clip_low, ratio_low from updates")
    assert [(r, s) for r, s, *_ in updates] == [(r, s) for r in range(3) for s in range(6)]
    sampled = dict(rows(folder, "select rollout, tokens from rollouts"))
    for rollout in range(3):
        of = [row for row in updates if row[0] == rollout]
        assert sum(row[2] for row in of) == 2 * sampled[rollout]
        assert all(row[3] <= row[2] and row[4] <= row[5] for row in of)


def test_clips_of_tokens_and_samples_are_those_of_the_updates(folder: Path) -> None:
    """Exactly, rollout by rollout; with two epochs a token can be clipped twice."""
    sums = "select rollout, sum(clip_low), sum(clip_high) from {} group by rollout order by rollout"
    of_updates = rows(folder, sums.format("updates"))
    assert sum(low for _, low, _ in of_updates) > 0
    assert sum(high for _, _, high in of_updates) > 0
    assert rows(folder, sums.format("samples")) == of_updates
    assert rows(folder, sums.format("tokens")) == of_updates
    assert rows(folder, "select count(*) from tokens where clip_low + clip_high > 2") == [(0,)]
    by_sample = "select rollout, position, sample, sum(clip_low), sum(clip_high) from tokens group by all order by all"
    assert rows(folder, by_sample) == rows(
        folder, "select rollout, position, sample, clip_low, clip_high from samples order by all"
    )
    wrong_sign = "(advantage >= 0 and clip_low > 0) or (advantage <= 0 and clip_high > 0)"
    assert rows(folder, f"select count(*) from tokens where {wrong_sign}") == [(0,)]


def test_the_texts_of_tokens_are_the_response(folder: Path) -> None:
    joined = "select rollout, position, sample, string_agg(text, '' order by token) as text from tokens group by all"
    pairs = rows(
        folder, f"select t.text, s.text from ({joined}) as t join samples as s using (rollout, position, sample)"
    )
    assert len(pairs) == 3 * 12 * 4
    # The end of the response is a token of its own and has a text.
    assert all(tokens.startswith(response) for tokens, response in pairs)


def test_what_was_asked_is_stored(folder: Path) -> None:
    asked = rows(folder, "select rollout, position, prompt_id, question, answer from questions order by all")
    assert [row[:3] for row in asked] == rows(
        folder, "select distinct rollout, position, prompt_id from samples order by all"
    )
    problems = {problem.id: problem for problem in load_problems(load_spec("tiny").data)}
    assert all(
        (problems[at].question, problems[at].answer) == (question, answer) for _, _, at, question, answer in asked
    )


def test_each_token_has_the_clips_of_its_own_updates() -> None:
    """Two updates of different responses, then one of them again; by hand."""
    loss = PolicyLoss("clip", 0.25, 0.5)
    ratios = {0: [0.5, 1.0, 2.0], 1: [0.5, 1.6], 2: [0.5, 1.0, 0.7]}
    advantages = {0: [-1.0, -1.0, -1.0], 1: [1.0, 1.0], 2: [-1.0, 1.0, -1.0]}

    def update(rows: range, at: int) -> Update:
        zeros = torch.zeros(len(ratios[at]))
        tokens = UpdateTokens(
            torch.tensor(ratios[at]).log(), zeros, zeros, zeros, torch.tensor(advantages[at]).double(), zeros.double()
        )
        return Update(rows, loss, 0.0, loss.sums([0.0], [tokens])[0], None, loss.clipped(tokens))

    updates = [update(range(0, 1), 0), update(range(1, 3), 1), update(range(0, 1), 2)]
    counts_2T = token_clips(np.array([3, 1, 1]), updates)
    assert counts_2T.tolist() == [[2, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert sum(step.sums.counts.clip_low for step in updates) == 3
    assert sum(step.sums.counts.clip_high for step in updates) == 1


def test_mismatch_of_sampler_and_trainer_by_hand() -> None:
    """Ratios of trainer to sampler 0.7, 1, 1.1 and 1.6, of which ε_low = 0.25 and ε_high = 0.5 leave two outside."""
    ratios, sampler = np.array([0.7, 1.0, 1.1, 1.6]), np.array([-1.0, -2.0, -0.5, -3.0])
    texts = [Completion([5, 2], [-1.0, -2.0], "stop"), Completion([7, 8], [-0.5, -3.0], "length")]
    problem, prompt = Problem("a", "1 + 1", "2"), Prompt([3], DrawKey(0, 0, 0))
    group = Group(problem, prompt, texts, ["", ""], np.array([1.0, 0.0]), np.array([0.5, -0.5]), ["correct", "wrong"])
    old = Scores(torch.tensor(sampler + np.log(ratios)), torch.ones(4, dtype=torch.float64))
    row = rollout_row([group], [group], old, PolicyLoss("clip", 0.25, 0.5), 0, Seconds(1.0, 0.0, 0.0, 0.0))
    assert row["mismatch_outside"] == 2
    assert row["mismatch_max"] == pytest.approx(np.log(1.6))
    assert row["mismatch_sum"] == pytest.approx(-np.log(0.7) + np.log(1.1) + np.log(1.6))


def test_rollout_metrics_are_those_of_the_samples_and_tokens(folder: Path) -> None:
    for rollout in range(3):
        samples = rows(folder, f"select reward, entropy, tokens, advantage, outcome, prompt_id, position, truncated "
                       f"from samples where rollout = {rollout} order by position, sample")  # fmt: skip
        reward, entropy, tokens, advantage = (np.array([row[i] for row in samples], dtype=float) for i in range(4))
        (view,) = rows(folder, f"select reward_mean, entropy, entropy_token_mean, mean_at_group, pass_at_group, "
                       f"groups_zero_advantage, truncated, response_tokens_mean from rollouts "
                       f"where rollout = {rollout}")  # fmt: skip
        groups = reward.reshape(-1, 4)
        assert view[0] == pytest.approx(reward.mean())
        assert view[1] == pytest.approx(entropy.mean())
        assert view[2] == pytest.approx((entropy * tokens).sum() / tokens.sum(), rel=1e-6)
        assert view[3] == pytest.approx(np.mean([row[4] == "correct" for row in samples]))
        assert view[4] == pytest.approx(np.mean([g.max() == 1.0 for g in groups]))
        assert view[5] == sum(np.ptp(g) == 0 for g in groups)
        assert view[6] == sum(row[7] for row in samples)
        assert view[7] == pytest.approx(tokens.mean())
        np.testing.assert_allclose(advantage.reshape(-1, 4), groups - groups.mean(1, keepdims=True), atol=1e-12)
        by_token = rows(folder, f"select sum(entropy), count(*) from tokens where rollout = {rollout}")
        assert by_token[0] == (pytest.approx((entropy * tokens).sum(), rel=1e-5), tokens.sum())


def test_the_ratio_is_exactly_1_at_inner_step_0_and_moves_after(folder: Path) -> None:
    noise = rows(folder, "select inner_step, noise_max, ratio_min, ratio_max from updates")
    assert all(row[1:] == (0.0, 1.0, 1.0) for row in noise if row[0] == 0)
    assert all(row[1] is None and row[2] < 1 < row[3] for row in noise if row[0] > 0)


def test_sampler_and_trainer_agree(folder: Path) -> None:
    assert max(row[0] for row in rows(folder, "select mismatch_max from rollouts")) < 1e-4


def test_two_runs_of_one_spec_store_identical_series(folder: Path, tmp_path: Path) -> None:
    again = run(tmp_path, overrides={"run.name": "two"})
    for query in [
        "select * exclude (run_id, attempt) from updates order by rollout, inner_step",
        "select * exclude (run_id, attempt) from samples order by rollout, position, sample",
        "select * exclude (run_id, attempt, time, seconds_sample, seconds_reward, seconds_score, seconds_update) "
        "from rollouts order by rollout",
    ]:
        assert rows(folder, query) == rows(again, query)
    weights = [path / "checkpoints" / "3" / "model.safetensors" for path in (folder, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_draws_other_prompts_and_samples(folder: Path, tmp_path: Path) -> None:
    other = run(tmp_path, overrides={"run.seed": 1, "run.steps": 1})
    query = "select prompt_id, text from samples where rollout = 0 order by position, sample"
    assert rows(folder, query) != rows(other, query)


def test_arms_of_a_sweep_see_the_same_first_rollout(folder: Path, tmp_path: Path) -> None:
    """Another ε changes nothing before the first update: same prompts, same samples, same rewards."""
    other = run(tmp_path, overrides={"clip.high": float("inf"), "run.steps": 1})
    query = "select prompt_id, text, reward, entropy from samples where rollout = 0 order by position, sample"
    assert rows(folder, query) == rows(other, query)


def test_random_rewards_are_drawn_and_outcomes_still_graded(tmp_path: Path) -> None:
    folder = run(tmp_path, "tiny-random", overrides={"run.steps": 1})
    drawn = rows(folder, "select reward, outcome from samples")
    assert {row[0] for row in drawn} == {0.0, 1.0}
    assert {("correct", 0.0), ("correct", 1.0), ("wrong", 0.0), ("wrong", 1.0)} <= {(row[1], row[0]) for row in drawn}


def test_reports_follow_the_run(tmp_path: Path) -> None:
    reports: list[Report] = []
    run(tmp_path, report=reports.append)
    assert [report.rollout for report in reports] == [0, 1, 2]
    assert all(report.clip_low >= 0 and report.tokens_per_second > 0 for report in reports)


SERIES = {
    "samples": "select * exclude (run_id) from samples order by all",
    "updates": "select * exclude (run_id) from updates order by rollout, inner_step",
}


def test_evaluation_changes_nothing_of_the_run_and_the_base_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path / "cache"))
    evaluation = {"eval.every": 2, "eval.benchmarks": ("arith",), "eval.k": 2, "eval.limit": 5}
    told: list[str] = []
    plain, first, second = (
        train(load_spec("tiny", SMALL | more | {"run.name": name, "run.steps": 3}), runs_dir=tmp_path, warn=told.append)
        for name, more in [("plain", {}), ("first", evaluation), ("second", evaluation)]
    )
    for query in SERIES.values():
        assert rows(first, query) == rows(plain, query)
    weights = [(folder / "checkpoints" / "3" / "model.safetensors").read_bytes() for folder in (plain, first, second)]
    assert weights[0] == weights[1] == weights[2]
    found = "select eval_id, rollout, problems, complete, reused_from from evaluations order by rollout"
    assert rows(first, found) == [(f"first@{rollout}", rollout, 5, True, None) for rollout in (0, 2, 3)]
    assert [row[4] for row in rows(second, found)] == ["first@0", None, None]
    samples = "select rollout, position, sample, outcome, text from evals order by all"
    assert rows(first, samples) == rows(second, samples)
    assert len(rows(first, samples)) == 3 * 5 * 2
    assert any("after 0 rollouts: arith mean@2" in line and "reused from first@0" in line for line in told)
    assert rows(plain, "select count(*) from evaluations") == [(0,)]


def test_dynamic_sampling_replaces_groups_without_advantage(tmp_path: Path) -> None:
    folder = run(tmp_path, overrides={"rollout.dynamic_sampling": True, "rollout.max_refills": 8, "run.steps": 2})
    for prompts, zero, refills, scored in rows(
        folder, "select prompts, groups_zero_advantage, refills, responses_scored from rollouts"
    ):
        assert refills > 0
        assert prompts - zero == 12
        assert scored == 12 * 4
    assert rows(folder, "select count(*) from updates where tokens_advantage < tokens") == [(0,)]


def test_dynamic_sampling_that_cannot_fill_goes_on_smaller_and_says_so(tmp_path: Path) -> None:
    """No reward ever differs: nothing to train on, no crash, one event a rollout."""
    folder = run(
        tmp_path,
        overrides={
            "rollout.dynamic_sampling": True,
            "rollout.max_refills": 1,
            "reward": {"kind": "bernoulli", "p": 1.0},
            "run.steps": 2,
        },
    )
    told = rows(folder, "select kind, data->>'useful' from events where kind <> 'alarm'")
    assert told == [("dynamic_sampling", "0")] * 2
    assert rows(folder, "select prompts, refills, entropy from rollouts") == [(24, 1, None)] * 2
    assert rows(folder, "select count(*) from updates") == [(0,)]


def test_the_overlong_penalty_enters_the_reward(tmp_path: Path) -> None:
    folder = run(
        tmp_path,
        overrides={"rollout.max_response_tokens": 12, "rollout.overlong_buffer": 6, "run.steps": 1},
    )
    for reward, outcome, tokens in rows(folder, "select reward, outcome, tokens from samples"):
        assert reward == pytest.approx((outcome == "correct") - max(0, tokens - 6) / 6)


def test_a_share_of_the_groups_keeps_its_tokens(tmp_path: Path) -> None:
    folder = run(tmp_path, overrides={"store.tokens": 0.3, "run.steps": 4})
    groups = rows(folder, "select rollout, position, sum(tokens) from samples group by all order by all")
    kept = rows(folder, "select rollout, position, count(*) from tokens group by all order by all")
    assert set(kept) < set(groups)
    assert 5 <= len(kept) <= 25  # 48 groups at 0.3: four standard deviations around 14.4


def test_a_prompt_that_is_too_long_is_left_out_with_an_event(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"q": "1 2 3", "a": "5"}\n{"q": "1 2 3 4 5 6 7 8 9 10 11 12 13 14", "a": "5"}\n')
    overrides = {
        "data": {"task": "file", "path": str(data), "question_field": "q", "answer_field": "a"},
        "rollout.max_prompt_tokens": 10,
        "run.steps": 1,
    }
    folder = run(tmp_path, overrides=overrides)
    assert rows(folder, "select kind, data->>'left_out' from events where kind <> 'alarm'") == [
        ("prompts_left_out", "1")
    ]
    with pytest.raises(DataError, match=r"rollout\.max_prompt_tokens = 2: all 2 prompts are longer"):
        run(tmp_path, overrides=overrides | {"rollout.max_prompt_tokens": 2})


def test_a_finished_run_is_never_written_over(folder: Path) -> None:
    before = (folder / "metrics.duckdb").read_bytes()
    said: list[str] = []
    same = {"run.name": "one", "store.tokens": "all"}
    assert run(folder.parent, overrides=same, warn=said.append) == folder
    assert said == ["one is finished, with 3 rollouts; raise run.steps to go on"]
    with pytest.raises(SpecError, match="'one' exists in"):
        run(folder.parent, overrides=same, resume="never")
    assert (folder / "metrics.duckdb").read_bytes() == before


def test_responses_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"rollout\.max_response_tokens = 100000: .* exceeds the \d+ positions"):
        run(tmp_path, overrides={"rollout.max_response_tokens": 100_000})
    assert not list(tmp_path.iterdir())
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"question": "1 + " * 400 + "1 = ?", "answer": "401"}) + "\n")
    overrides = {"data": {"task": "file", "path": str(data)}, "rollout.max_prompt_tokens": 4000}
    with pytest.raises(SpecError, match=r"rollout\.max_prompt_tokens = 4000: .* lower it to 255 at most"):
        run(tmp_path, overrides=overrides)


@pytest.mark.parametrize(("call", "what"), [(3, "evaluation"), (4, "rollout")])
def test_ctrl_c_does_not_wait_for_gradings_and_saves(
    call: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While more is sampled, with formulas that hang for longer than the grace time, after which nothing would be saved."""
    grading = threading.Event()
    calls, numbers = count(1), count(3)
    sample, decode = TorchSampler.sample, ChatTokenizer.decode
    hanging = False

    def interrupted(self: TorchSampler, *arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal hanging
        hanging = next(calls) == call
        for group in sample(self, *arguments, **options):
            yield group
            if hanging:
                assert grading.wait(30)
                time.sleep(0.5)
                signal.raise_signal(signal.SIGINT)

    def answer(self: ChatTokenizer, ids: Any) -> str:
        if not hanging:
            return decode(self, ids)
        grading.set()
        return f"\\boxed{{{next(numbers)}^{{9^{{9^9}}}}}}"

    data = tmp_path / "two.jsonl"
    data.write_text('{"question": "3+4=", "answer": "7"}\n{"question": "5+4=", "answer": "9"}\n')
    overrides = {
        "run.name": "x",
        "reward": {"kind": "math", "timeout": 60},
        "checkpoint.grace": 8,
        "eval": {"every": 1, "benchmarks": (str(data),), "k": 2, "reuse": False},
    }
    with monkeypatch.context() as patch:
        patch.setattr(TorchSampler, "sample", interrupted)
        patch.setattr(ChatTokenizer, "decode", answer)
        with pytest.raises(Interrupted, match=r"^stopped by Ctrl-C; .* goes on from rollout 1"):
            run(tmp_path, overrides=overrides)
    assert next(calls) == call + 1, what
    folder = run(tmp_path, overrides=overrides)
    assert rows(folder, "select state from runs") == [("finished",)]
    assert rows(folder, "select rollout, complete from evaluations order by 1") == [(at, True) for at in range(4)]


def explode(completion: str, problem: Any) -> float:
    """A reward that is not a number."""
    return float("nan")


def test_a_reward_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run(tmp_path, overrides={"reward": {"kind": "function", "function": f"{__name__}:explode"}, "run.name": "bad"})
    assert json.loads((tmp_path / "bad" / "status.json").read_text())["state"] == "diverged"


@pytest.mark.slow
def test_tiny_learns(tmp_path: Path) -> None:
    """Mean reward of the last five rollouts is clearly above that of the first five."""
    folder = train(load_spec("tiny", {"run.steps": 25}), runs_dir=tmp_path)
    reward = [row[0] for row in rows(folder, "select reward_mean from rollouts order by rollout")]
    assert np.mean(reward[-5:]) > np.mean(reward[:5]) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smollm2-gsm8k", "smollm2-arith"])
def test_a_real_model_on_real_data(tmp_path: Path, preset: str, data_folder: Path) -> None:
    """SmolLM2 on GSM8K's own rows and on word problems: two small rollouts, sampler and trainer agree, texts are text."""
    overrides: dict[str, Any] = {
        "run.steps": 2,
        "rollout.prompts": 2,
        "rollout.max_response_tokens": 16,
        "optim.responses_per_update": 8,
    }
    if preset == "smollm2-gsm8k":
        overrides["data.path"] = str(data_folder / "gsm8k" / "train.jsonl")
    folder = train(load_spec(preset, overrides), runs_dir=tmp_path)
    for entropy, mismatch in rows(folder, "select entropy, mismatch_max from rollouts"):
        assert 0.2 < entropy < 6
        assert mismatch < 1e-3
    assert rows(folder, "select count(*), count(distinct text) > 10 from samples") == [(32, True)]
    assert rows(folder, "select max(noise_max) from updates where inner_step = 0") == [(0.0,)]
