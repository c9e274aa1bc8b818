"""Every view against pandas and numpy on the raw rows of the runs' files, and what views say of what a run lacks."""

import json
import math
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from test_store import evals, evaluation, ledger_rows, rollout_row, samples, tables, update_rows
from typer.testing import CliRunner

from clipctl.analysis import VIEWS_OF_ANALYZE, Options
from clipctl.analysis.arms import arms_of, flat_spec, mean_and_interval, t_quantile, value_text
from clipctl.analysis.compare import LAST
from clipctl.analysis.passk import OWN_GROUPS
from clipctl.analysis.samples import marked_text, most_clipped
from clipctl.charts import CHARTS, chart
from clipctl.cli import app
from clipctl.errors import SpecError
from clipctl.eval_report import find_evaluation, metric_rows
from clipctl.journal import create_run
from clipctl.layers import leaves
from clipctl.panels import dots, paths, scatter
from clipctl.panels import lines as panel_lines
from clipctl.plots import legend_of, save_chart
from clipctl.spec import load_spec, spec_json
from clipctl.store import Runs, open_runs

ROLLOUTS = 7
GROUP = 4
RUNS = {f"{arm}-{seed}": (arm, seed) for arm in ("both", "nohigh") for seed in (10, 11, 12)}
T3 = 4.302652729749464
"""The 97.5 % quantile of Student's t with 2 degrees of freedom, from tables."""


def make_run(folder: Path, name: str, seed: int, changes: dict[str, Any], rollouts: int = ROLLOUTS) -> None:
    """A run of random numbers: 3 groups of 4 a rollout, 3 updates, tokens of the first group; rollout 2 was not scored."""
    number = 1000 * seed + 100 * len(name)
    rng = np.random.default_rng(number)
    writer = create_run(folder, name, spec_json(load_spec("tiny", {"run.seed": seed} | changes)), "tiny")
    for rollout in range(rollouts):
        row = rollout_row(number + rollout)
        if rollout == 2:
            row |= {"responses_scored": 0, "entropy_response_sum": None, "entropy_token_sum": None, "tokens_scored": 0}
        updates = [
            update
            | {"eps_low": 0.2, "eps_high": 0.25}
            | {key: float(rng.normal()) for key in update if key[1:3] == "g_"}
            for update in update_rows(number + rollout)
        ]
        size = 3 * GROUP
        correct = rng.random(size) < 0.4
        sampled = {
            "prompt_id": [f"p{at // GROUP}" for at in range(size)], "position": [3 * rollout + at // GROUP for at in range(size)],
            "sample": [at % GROUP for at in range(size)], "reward": correct.astype(float).tolist(),
            "outcome": ["correct" if right else "wrong" for right in correct], "advantage": (correct - 0.4).tolist(),
            "tokens": [2] * size, "truncated": [False] * size, "entropy": rng.random(size).tolist(),
            "logprob_sum": [-1.0] * size, "clip_low": [int(at == 5) for at in range(size)],
            "clip_high": [2 * int(at == 6) for at in range(size)], "text": [f"[/INST] {at}" for at in range(size)],
        }  # fmt: skip
        kept = {
            "prompt_id": ["p1"] * 4, "position": [3 * rollout + 1] * 4, "sample": [1, 1, 2, 2], "token": [0, 1, 0, 1],
            "token_id": [7, 8, 7, 9], "logprob": [-1.0] * 4, "entropy": [0.5, 0.25, 0.125, 1.0],
            "sampler_logprob": [-1.0] * 4, "advantage": [-1.0, -1.0, 1.0, 1.0], "clip_low": [0, 1, 0, 0],
            "clip_high": [0, 0, 1, 1], "text": ["a", " b", "a", None],
        }  # fmt: skip
        asked = {
            "position": [3 * rollout + at for at in range(3)], "prompt_id": ["p0", "p1", "p2"],
            "question": [f"{at} + 1?" for at in range(3)], "answer": ["1", "2", "3"],
        }  # fmt: skip
        ledger = {table: ledger_rows(table, number + rollout) for table in ("histograms", "probes")}
        writer.write_rollout(rollout, row, tables(updates, sampled, tokens=kept, questions=asked, **ledger))
    writer.event("alarm", "collapse: \x1b[31mhere", rollout=1)
    if not name.startswith("bare"):
        for at, rollout in enumerate((0, rollouts)):
            right = (rng.random((5, 8)) < 0.3 + 0.1 * at).tolist()
            writer.write_evaluation(at, rollout, evals("svamp", right) | {"evaluations": evaluation("svamp", 5)})
    writer.close("finished", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of three seeds with evaluations, and one run without."""
    runs = tmp_path_factory.mktemp("views") / "runs"
    for name, (arm, seed) in RUNS.items():
        make_run(runs, name, seed, {} if arm == "both" else {"clip.high": math.inf})
    make_run(runs, "bare", 10, {"optim.lr": 0.5, "optim.weight_decay": 0.25}, rollouts=1)
    return runs


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[Runs]:
    with open_runs(folder) as opened:
        yield opened


def raw(folder: Path, table: str) -> pd.DataFrame:
    """All rows of a raw table, straight from the files of every run."""
    parts = []
    for run in sorted(folder.iterdir()):
        with duckdb.connect(str(run / "metrics.duckdb"), read_only=True) as store:
            parts.append(store.sql(f"select * from {table}").df().assign(run_id=run.name))
    return pd.concat(parts, ignore_index=True)


def view(runs: Runs, name: str, **options: Any) -> pd.DataFrame:
    return pd.DataFrame(VIEWS_OF_ANALYZE[name](runs, Options(**options)).table.to_pylist())


def one(frame: pd.DataFrame, **where: Any) -> pd.Series:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def close(value: Any) -> Any:
    return pytest.approx(float(value), rel=1e-9)


def check_mean(row: pd.Series, name: str, values: np.ndarray) -> None:
    """Mean of three seeds and its t interval, from the definition."""
    half = T3 * values.std(ddof=1) / math.sqrt(3)
    assert row[name] == close(values.mean())
    assert row[f"{name}_low"] == close(values.mean() - half)
    assert row[f"{name}_high"] == close(values.mean() + half)


def test_t_quantiles_are_those_of_tables() -> None:
    """Abramowitz and Stegun, table 26.10."""
    for n, value in ((2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042), (121, 1.980)):
        assert t_quantile(n) == pytest.approx(value, abs=6e-4)
    assert mean_and_interval([]) == (None, None, None)
    assert mean_and_interval([3.0]) == (3.0, None, None)
    assert mean_and_interval([1.0, 2.0, 6.0]) == pytest.approx(
        (3.0, 3 - T3 * math.sqrt(7 / 3), 3 + T3 * math.sqrt(7 / 3))
    )


def test_runs_that_differ_in_their_seed_alone_are_an_arm(runs: Runs) -> None:
    arms = arms_of(runs)
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("both (3 seeds)", 3), ("nohigh (3 seeds)", 3), ("bare", 1)]
    by_high = arms_of(runs, ["clip.high"])
    assert [arm.name for arm in by_high] == ["ε_high 0.1 (4 runs)", "ε_high ∞ (3 runs)"]
    with pytest.raises(SpecError, match=r"no run's spec has the key 'clip.hihg'; did you mean 'clip.high'"):
        arms_of(runs, ["clip.hihg"])


def test_runs_of_one_seed_are_not_averaged(tmp_path: Path) -> None:
    for name in ("a-1", "a-2"):
        make_run(tmp_path, name, 10, {}, rollouts=1)
    with open_runs(tmp_path) as runs:
        assert [arm.name for arm in arms_of(runs)] == ["a-1", "a-2"]


def test_values_where_room_is_short() -> None:
    assert [value_text(value) for value in (math.inf, "Infinity", 0.2, None, True, "a/b/c", [1, 2])] == [
        "∞", "∞", "0.2", "none", "true", "c", "[1, 2]",
    ]  # fmt: skip
    assert flat_spec('{"clip": {"low": 0.2}, "eval": {"k": [1]}}') == {"clip.low": 0.2, "eval.k": [1]}
    assert flat_spec(None) == {}
    whole = load_spec("tiny", {"clip.high": math.inf})
    earlier = json.loads(spec_json(whole))
    del earlier["engine"]["vllm"], earlier["ledger"]
    assert flat_spec(json.dumps(earlier)) == dict(leaves(json.loads(spec_json(whole)))) | {"ledger.network_every": 0}
    assert flat_spec(spec_json(whole))["clip.high"] == "Infinity"


def test_entropy(runs: Runs, folder: Path) -> None:
    found, rows = view(runs, "entropy"), raw(folder, "rollouts")
    rows["entropy"] = rows.entropy_response_sum / rows.responses_scored
    rows["token_mean"] = rows.entropy_token_sum / rows.tokens_scored
    for name in RUNS:
        mine = rows[rows.run_id == name].set_index("rollout")
        got = found[found.series == name].set_index("rollout")
        assert len(got) == ROLLOUTS
        for rollout in (0, 1, 6):
            assert got.entropy[rollout] == close(mine.entropy[rollout])
            assert got.entropy_token_mean[rollout] == close(mine.token_mean[rollout])
            assert got.entropy_normalized[rollout] == close(mine.entropy[rollout] / mine.entropy[0])
        assert math.isnan(got.entropy[2])
    values = np.array(
        [rows[(rows.run_id == name) & (rows.rollout == 6)].entropy.item() for name in RUNS if "nohigh" in name]
    )
    check_mean(one(found, series="nohigh (3 seeds)", rollout=6), "entropy", values)


def test_clip(runs: Runs, folder: Path) -> None:
    found, rows = view(runs, "clip"), raw(folder, "updates")
    sums = rows.groupby(["run_id", "rollout"]).sum(numeric_only=True)
    for name in RUNS:
        row, mine = one(found, series=name, rollout=4), sums.loc[(name, 4)]
        for kind in ("clip_low", "clip_high"):
            assert row[f"{kind}_percent"] == close(100 * mine[kind] / mine.tokens)
            assert row[f"{kind}_percent_advantage"] == close(100 * mine[kind] / mine.tokens_advantage)
        for kind in ("ratio_low", "ratio_high"):
            assert row[f"{kind}_percent"] == close(100 * mine[kind] / mine.tokens)
        of_run = rows[(rows.run_id == name) & (rows.rollout == 4)]
        assert (row.ratio_min, row.ratio_max) == (of_run.ratio_min.min(), of_run.ratio_max.max())
        assert (row.eps_low, row.eps_high) == (0.2, 0.25)
    mean = one(found, series="both (3 seeds)", rollout=4)
    values = np.array(
        [100 * sums.loc[(name, 4)].clip_high / sums.loc[(name, 4)].tokens for name in RUNS if "both" in name]
    )
    check_mean(mean, "clip_high_percent", values)
    arm = rows[rows.run_id.str.startswith("both") & (rows.rollout == 4)]
    assert (mean.ratio_min, mean.ratio_max) == (arm.ratio_min.min(), arm.ratio_max.max())


def test_ledger(runs: Runs, folder: Path) -> None:
    found, rows = view(runs, "ledger", rollouts=True), raw(folder, "updates")
    parts = ("reward", "clip_low", "clip_high")
    for name in RUNS:
        mine = rows[rows.run_id == name]
        got = found[found.run_id == name].set_index("rollout")
        for step, number in (("pg", 7), ("npg", 8)):
            gross = sum(abs(mine[f"{step}_{part}"].sum()) for part in parts)
            for part in parts:
                terms = mine.groupby("rollout")[f"{step}_{part}"].sum()
                assert got[f"{step}_{part}"][3] == close(terms[3] / gross)
                assert got[f"{step}_{part}_cumulated"][3] == close(terms[:4].sum() / gross)
            total = sum(mine[mine.rollout <= 5][f"{step}_{part}"].sum() for part in parts)
            assert got[f"{step}_total_cumulated"][5] == close(total / gross)
            for side, event in (("low", "x"), ("high", "y")):
                now = mine[mine.rollout == 3]
                assert got[f"gap{number}_{side}"][3] == close(now[f"{event}_{step}"].sum() / now[f"{event}_mass"].sum())
                assert got[f"holds{number}_{side}"][3] == close((now[f"{event}_{step}"] >= 0).mean())
    probes = raw(folder, "probes")
    mine = probes[(probes.run_id == "both-10") & (probes.rollout == 3)]
    row = one(found, run_id="both-10", rollout=3)
    assert row.probed == len(mine) == 2
    assert row.observed == close(((mine.entropy_after_sum - mine.entropy_before_sum) / mine.states).sum())
    assert row.predicted_network == close(mine.network_total.sum())
    now = rows[(rows.run_id == "both-10") & (rows.rollout == 3) & rows.inner_step.isin([0, 2])]
    assert row.predicted_pg == close(now[["pg_reward", "pg_clip_low", "pg_clip_high"]].to_numpy().sum())
    summary = view(runs, "ledger")
    last = found[found.run_id == "both-10"].iloc[-1]
    first = summary[(summary.run_id == "both-10") & (summary.step == "1 policy gradient")].iloc[0]
    assert last.pg_clip_low_cumulated == close(first.pull_clip_low)


def pass_at_k(n: int, c: int, k: int) -> float:
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def test_passk(runs: Runs, folder: Path) -> None:
    found, rows = view(runs, "passk"), raw(folder, "evals")
    per_problem = rows.groupby(["run_id", "rollout", "problem_id"]).correct.agg(["count", "sum"])
    for name in RUNS:
        for rollout in (0, ROLLOUTS):
            mine = per_problem.loc[(name, rollout)]
            for k in (1, 2, 4, 8):
                row = one(found, series=name, rollout=rollout, k=k)
                values = [pass_at_k(int(n), int(c), k) for n, c in mine.itertuples(index=False)]
                assert row.pass_at_k == close(np.mean(values))
                assert row.pass_at_k_low <= row.pass_at_k <= row.pass_at_k_high
                assert (row.benchmark, row.problems, row.samples) == ("svamp", 5, 8)
                assert row.unreliable.startswith("unreliable (")
    values = np.array([one(found, series=name, rollout=7, k=4).pass_at_k for name in RUNS if "both" in name])
    check_mean(one(found, series="both (3 seeds)", rollout=7, k=4), "pass_at_k", values)
    assert set(found.benchmark) == {"svamp", OWN_GROUPS}


@pytest.fixture(scope="module")
def two_benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds with 8 samples of `svamp`, and 4 of `amc23` in the middle; one has 2 of `gsm8k` too."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for seed in (1, 2):
        spec = spec_json(load_spec("tiny", {"run.seed": seed}))
        writer = create_run(folder, f"a-{seed}", spec, "tiny")
        rng = np.random.default_rng(seed)
        for rollout in range(3):
            writer.write_rollout(
                rollout, rollout_row(10 * seed + rollout), tables(update_rows(rollout), samples(2 * rollout))
            )
        for at, (name, k) in enumerate((("svamp", 8), ("amc23", 4), *([("gsm8k", 2)] if seed == 1 else []))):
            right = (rng.random((5, k)) < 0.4).tolist()
            writer.write_evaluation(at, at + 1, evals(name, right) | {"evaluations": evaluation(name, 5)})
        writer.close("finished", "")
    return folder


def test_passk_of_a_k_and_of_benchmarks(two_benchmarks: Path) -> None:
    """Of fewer samples than there are, by enumeration of their subsets."""
    with open_runs(two_benchmarks) as runs:
        found = view(runs, "passk", k=3, benchmark=("svamp",))
        assert found.k.tolist() == [1, 2, 3] * 3
        assert set(found.benchmark) == {"svamp"}
        assert set(found.samples) == {8}
        every = runs.sql("select run_id, problem_id, correct from evals where benchmark = 'svamp'").df()
        for run, mine in every.groupby("run_id"):
            subsets = [
                np.mean([any(some) for some in combinations(correct, 3)])
                for correct in (problem.correct.tolist() for _, problem in mine.groupby("problem_id"))
            ]
            assert one(found, series=run, k=3).pass_at_k == close(np.mean(subsets))
            assert one(found, series=run, k=1).pass_at_k == close(mine.correct.mean())
        assert len(found[(found.k == 3) & (found.runs == 2)]) == 1
        titles = [panel.to_dict()["title"] for panel in CHARTS["passk"](runs, Options(k=3, benchmark=("svamp",)))]
        assert [title["text"] if isinstance(title, dict) else title for title in titles] == [
            "mean@3, svamp", "pass@3, svamp", "pass@k at the end, svamp",
        ]  # fmt: skip
        frontier = view(runs, "frontier", k=3, benchmark=("svamp",))
        alone = found[(found.k == 3) & (found.runs == 1)].pass_at_k
        assert frontier[frontier.runs == 1].pass_at_k.tolist() == [close(value) for value in alone]
        assert set(frontier.k) == {3}


def test_what_has_too_few_samples_is_left_out_and_told(two_benchmarks: Path) -> None:
    with open_runs(two_benchmarks) as runs:
        few = VIEWS_OF_ANALYZE["passk"](runs, Options(k=4))
        assert set(few.table["benchmark"].to_pylist()) == {"svamp", "amc23"}
        assert few.notes == ("gsm8k: fewer than 4 samples of a-1: left out",)
        only = VIEWS_OF_ANALYZE["passk"](runs, Options(k=2, benchmark=("gsm8k",)))
        assert only.notes == ("a-2: no evaluation of gsm8k with 2 samples of each problem",)
        for name in ("passk", "frontier"):
            with pytest.raises(
                SpecError, match=r"^--k: 9, and there are at most 8 samples of each problem; clipctl eval -k 9"
            ):
                VIEWS_OF_ANALYZE[name](runs, Options(k=9))
            with pytest.raises(SpecError, match=r"^--k: at least 1, found 0$"):
                VIEWS_OF_ANALYZE[name](runs, Options(k=0))
            with pytest.raises(
                SpecError, match=r"'amc24' is not what these runs have: .*svamp.* \(did you mean amc23\?\)$"
            ):
                VIEWS_OF_ANALYZE[name](runs, Options(benchmark=("svamp", "amc24")))


def test_passk_of_own_groups_says_so(runs: Runs, folder: Path) -> None:
    answer = VIEWS_OF_ANALYZE["passk"](runs, Options())
    assert answer.notes == ("bare: no evaluation; pass@k is of the rollouts' own groups, on training prompts",)
    found, rows = pd.DataFrame(answer.table.to_pylist()), raw(folder, "samples")
    mine = rows[rows.run_id == "bare"].groupby("position").outcome.agg(lambda column: (column == "correct").sum())
    for k in (1, 2, 4):
        row = one(found, series="bare", k=k)
        assert row.benchmark == OWN_GROUPS
        assert row.pass_at_k == close(np.mean([pass_at_k(GROUP, int(c), k) for c in mine]))


def test_own_groups_have_intervals_at_both_ends_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path, "bare", 1, {}, rollouts=3)
    with open_runs(tmp_path) as runs:
        found = view(runs, "passk")
    assert found[found.rollout == 1].k.tolist() == [1, 4]
    assert found[found.rollout == 1].pass_at_k_low.isna().all()
    assert found[found.rollout == 2].k.tolist() == [1, 2, 4]
    assert (found[found.rollout != 1].interval == "BCa over problems").all()


def test_of_equal_evaluations_the_newest_is_shown_and_the_others_named(tmp_path: Path) -> None:
    """The intervals are those that `clipctl eval` prints, to the last bit."""
    make_run(tmp_path, "bare", 1, {}, rollouts=1)
    rng = np.random.default_rng(3)
    for name in ("e0", "e1", "e2"):
        spec = json.dumps({"kind": "evaluation", "run": str(tmp_path / "bare")})
        writer = create_run(tmp_path, name, spec, "eval")
        started = datetime(2026, 1, 1, int(name[1]))
        row = evaluation("svamp", 30) | {"temperature": [0.6], "top_p": [0.95], "started_at": [started]}
        right = (rng.random((30, 4)) < rng.random((30, 1))).tolist()
        writer.write_evaluation(0, 1, evals("svamp", right) | {"evaluations": row})
        writer.close("finished", "")
    with open_runs(tmp_path) as runs:
        answer = VIEWS_OF_ANALYZE["passk"](runs, Options())
        assert VIEWS_OF_ANALYZE["frontier"](runs, Options()).notes == answer.notes
    assert answer.notes == ("bare@1, svamp: e2 is shown; older ones with its temperature and top-p are not: e1, e0",)
    printed = metric_rows(find_evaluation("e2", tmp_path, "eval"))
    shown = {row["k"]: row for row in answer.table.to_pylist()}
    for metric, k in (("mean@4", 1), ("pass@2", 2), ("pass@4", 4)):
        (row,) = [row for row in printed if row["metric"] == metric]
        of_view = tuple(shown[k][f"pass_at_k{end}"] for end in ("", "_low", "_high"))
        assert (row["value"], row["low"], row["high"]) == of_view
        assert row["low"] < row["value"] < row["high"]


def test_two_settings_of_one_benchmark_are_two(tmp_path: Path) -> None:
    make_run(tmp_path, "bare", 1, {}, rollouts=1)
    for at, temperature in enumerate((0.6, 1.0)):
        writer = create_run(
            tmp_path, f"e{at}", json.dumps({"kind": "evaluation", "run": str(tmp_path / "bare")}), "eval"
        )
        row = evaluation("svamp", 1) | {"temperature": [temperature], "top_p": [0.95]}
        writer.write_evaluation(0, 1, evals("svamp", [[at == 0, False]]) | {"evaluations": row})
        writer.close("finished", "")
    with open_runs(tmp_path) as runs:
        found = view(runs, "passk")
    means = {row.benchmark: row.pass_at_k for row in found.itertuples() if row.k == 1}
    assert means == {"svamp T=0.6 p=0.95": 0.5, "svamp T=1 p=0.95": 0.0}


def test_frontier(runs: Runs, folder: Path) -> None:
    found, entropies, rows = view(runs, "frontier"), raw(folder, "rollouts"), raw(folder, "evals")
    for name in RUNS:
        for rollout, measured in ((0, 0), (ROLLOUTS, ROLLOUTS - 1)):
            row = one(found, series=name, rollout=rollout)
            at = one(entropies, run_id=name, rollout=measured)
            assert (row.entropy_rollout, row.k) == (measured, 8)
            assert row.entropy == close(at.entropy_response_sum / at.responses_scored)
            mine = rows[(rows.run_id == name) & (rows.rollout == rollout)].groupby("problem_id").correct
            assert row.mean_at_k == close(mine.mean().mean())
            assert row.pass_at_k == close(mine.any().mean())
    mean = one(found, series="nohigh (3 seeds)", rollout=0)
    assert mean.entropy == close(
        np.mean([one(found, series=f"nohigh-{seed}", rollout=0).entropy for seed in (10, 11, 12)])
    )


def test_compare(runs: Runs, folder: Path) -> None:
    """The differences are between equal seeds, so their interval is not that of two independent means."""
    found, rows = view(runs, "compare"), raw(folder, "rollouts")
    rows["reward_mean"] = rows.reward_sum / rows.responses
    late = rows[rows.rollout >= ROLLOUTS - LAST].groupby("run_id").reward_mean.mean()
    values = {arm: np.array([late[f"{arm}-{seed}"] for seed in (10, 11, 12)]) for arm in ("both", "nohigh")}
    row = one(found, metric="reward_mean", group="nohigh (3 seeds)")
    check_mean(row, "mean", values["nohigh"])
    check_mean(row, "difference", values["nohigh"] - values["both"])
    assert (row.runs, row.pairs, row["ε_high"]) == (3, 3, "∞")
    first = one(found, metric="reward_mean", group="both (3 seeds)")
    assert first.pairs == 0
    assert math.isnan(first.difference)
    updates = raw(folder, "updates").groupby("run_id").sum(numeric_only=True)
    clip = one(found, metric="clip_low_percent", group="bare")
    assert clip["mean"] == close(100 * updates.clip_low["bare"] / updates.tokens["bare"])
    # Another learning rate and the first arm's seed: a pair too.
    assert clip.pairs == 1
    evaluated = raw(folder, "evals")
    at_end = (
        evaluated[evaluated.rollout == ROLLOUTS]
        .groupby(["run_id", "problem_id"])
        .correct.any()
        .groupby("run_id")
        .mean()
    )
    row = one(found, metric="pass@8 svamp", group="both (3 seeds)")
    check_mean(row, "mean", np.array([at_end[f"both-{seed}"] for seed in (10, 11, 12)]))


def test_compare_by_a_key_names_what_else_differs(runs: Runs) -> None:
    answer = VIEWS_OF_ANALYZE["compare"](runs, Options(by=("clip.high",)))
    assert {row["group"] for row in answer.table.to_pylist()} == {"ε_high 0.1 (4 runs)", "ε_high ∞ (3 runs)"}
    (note,) = answer.notes
    assert "also differ in optim.lr (0.0001, 0.5), optim.weight_decay (0.01, 0.25)" in note


def test_samples(runs: Runs, folder: Path) -> None:
    """The last rollout's group with the most clipped tokens, with its clips marked."""
    found, rows = view(runs, "samples"), raw(folder, "samples")
    mine = found[found.run == "both-11"]
    expected = rows[(rows.run_id == "both-11") & (rows.rollout == ROLLOUTS - 1) & (rows.prompt_id == "p1")]
    assert (mine.rollout.unique().tolist(), mine.prompt_id.unique().tolist()) == ([ROLLOUTS - 1], ["p1"])
    for column in ("sample", "reward", "outcome", "advantage", "entropy", "tokens", "clip_low", "clip_high"):
        assert mine[column].tolist() == expected[column].tolist()
    assert mine.text.tolist() == [f"[/INST] {at}" for at in (4, 5, 6, 7)]
    assert {*zip(mine.question, mine.answer, strict=True)} == {("1 + 1?", "2")}
    assert mine.most_clipped.tolist()[1:3] == ["1 ' b' low × 1", "1 '<9>' high × 1, 0 'a' high × 1"]
    assert mine.marked_text.tolist()[1:3] == ["a⟪ b⟫↓", "⟪a⟫↑⟪<9>⟫↑"]
    asked = view(runs, "samples", rollout=3, prompt="p0")
    assert asked[["rollout", "prompt_id"]].drop_duplicates().to_numpy().tolist()[0] == [3, "p0"]
    with pytest.raises(SpecError, match=r"no run has a sample with rollout = 99; there are rollouts 0 to 6"):
        view(runs, "samples", rollout=99)
    with pytest.raises(SpecError, match="no run has a sample with prompt_id"):
        view(runs, "samples", prompt="it's; drop table runs")


def test_the_most_clipped_tokens_come_first() -> None:
    tokens = [{"clip_low": low, "clip_high": None, "entropy": h, "text": str(at), "token": at, "token_id": at}
              for at, (low, h) in enumerate([(1, 0.5), (0, 9.0), (3, 0.1), (1, 0.7), (2, 0.0), (1, 0.1), (1, 0.2)])]  # fmt: skip
    assert [token["token"] for token in most_clipped(tokens)] == [2, 4, 3, 0, 6]
    assert marked_text(tokens[:3]) == "⟪0⟫↓1⟪2⟫↓"


def test_events(runs: Runs) -> None:
    found = view(runs, "events")
    assert found.time.is_monotonic_increasing
    mine = found[found.run == "both-10"].iloc[0]
    assert (mine["rollout"], mine["kind"], mine["message"]) == (1, "alarm", "collapse: \x1b[31mhere")
    assert 0 <= mine.seconds < 60


def test_what_a_run_lacks_is_a_note_and_an_error_only_where_all_lack_it(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 1, {}, rollouts=1)
    empty = create_run(tmp_path, "b", spec_json(load_spec("tiny", {})), "tiny")
    empty.close("failed", "")
    with open_runs(tmp_path) as runs:
        for name in ("entropy", "clip", "ledger", "passk", "what-if", "compare", "frontier", "samples"):
            assert any(note.startswith("b: no ") for note in VIEWS_OF_ANALYZE[name](runs, Options()).notes), name
    with open_runs(tmp_path / "b") as runs:
        for name in ("entropy", "clip", "ledger", "passk", "what-if", "compare", "frontier", "samples"):
            with pytest.raises(SpecError, match=f"--view {name}: none of these runs has"):
                VIEWS_OF_ANALYZE[name](runs, Options())
            with pytest.raises(SpecError, match=f"--view {name}: none of these runs has"):
                chart(name, runs)


def drawn(panel: Any) -> list[dict[str, Any]]:
    """All rows that a panel carries."""
    found: list[dict[str, Any]] = []

    def walk(node: Any) -> None:
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)
        if isinstance(node, dict) and isinstance(node.get("values"), list):
            found.extend(row for row in node["values"] if isinstance(row, dict))

    walk(panel.to_dict())
    return found


@pytest.mark.parametrize("name", CHARTS)
def test_every_view_has_a_chart_that_is_written_whole(runs: Runs, name: str, tmp_path: Path) -> None:
    """As SVG, with the runs' names and units as text; model text is no markup in it."""
    file = tmp_path / "chart.svg"
    save_chart(chart(name, runs), file)
    text = file.read_text()
    words = {
        "what-if": "both-10",
        "samples": "both-10",
        "events": "both-10",
        "ledger": "nats",
        "entropy": "entropy, nats",
    }
    assert words.get(name, "both (3 seeds)") in text
    assert "NaN" not in text
    assert "<script" not in text


def test_a_chart_draws_the_numbers_of_its_view(runs: Runs) -> None:
    table = view(runs, "entropy")
    rows = {(row["series"], row["x"]): row for row in drawn(CHARTS["entropy"](runs, Options())[0]) if "series" in row}
    assert {series for series, _ in rows} == {"both (3 seeds)", "nohigh (3 seeds)", "bare"}
    for row in table[table.series == "both (3 seeds)"].itertuples():
        got = rows[row.series, row.rollout]
        if row.rollout == 2:
            assert got["y"] is None
        else:
            assert (got["y"], got["low"], got["high"]) == pytest.approx(
                (row.entropy, row.entropy_low, row.entropy_high), rel=1e-5
            )


def test_png_and_html_need_nothing_else(runs: Runs, tmp_path: Path) -> None:
    save_chart(chart("entropy", runs), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    save_chart(chart("entropy", runs), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r"<script[^>]*src=|<link ", page)
    assert "both (3 seeds)" in page


def readme_commands() -> list[str]:
    """The example of each view, and what draws the paper's figures."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("## Views\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| `[a-z-]+` \|.*\| `clipctl (analyze [^`]*)` \|$", section, flags=re.MULTILINE)
    figures = re.findall(r"^\| `fig.*\| `(--view [^`]*)`[^|]*\|$", readme, flags=re.MULTILINE)
    assert len(table) == len(CHARTS)
    assert len(figures) == 6
    return [*table, *(f"analyze runs/ {options} --plot figure.png" for options in dict.fromkeys(figures))]


@pytest.mark.parametrize("command", readme_commands())
def test_the_examples_of_views_in_readme_run(
    folder: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(folder)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert done.stdout
    if "--plot" in command:
        assert (tmp_path / command.split("--plot ")[1].split()[0]).stat().st_size > 10_000


def test_points_far_out_stand_hollow_at_the_edge() -> None:
    rows = [{"series": "a", "x": float(at % 11 - 5), "y": 1.0} for at in range(200)]
    rows[7]["x"], rows[9]["x"] = 400.0, -900.0
    drawn = scatter(rows, legend_of({"a": 1.0}), x="x", y="y", x_title="x", y_title="y", title="t").to_dict()
    points = {row["x"]: row for layer in drawn["layer"] for row in layer["data"]["values"] if "out" in row}
    assert (points[400.0]["at"], points[400.0]["out"]) == (5.0, True)
    assert (points[-900.0]["at"], points[-900.0]["out"]) == (-5.0, True)
    assert (points[3.0]["at"], points[3.0]["out"]) == (3.0, False)
    assert "2 of 200 points" in json.dumps(drawn["title"])


def test_unreliable_intervals_are_hollow_points_with_a_note() -> None:
    rows = [{"series": "a", "k": k, "p": 0.1 * k, "unreliable": "30 problems" if k > 2 else None} for k in (1, 2, 4)]
    drawn = panel_lines(rows, legend_of({"a": 1.0}), x="k", y="p", x_title="k", y_title="p", title="t").to_dict()
    values = drawn["data"]["values"]
    assert {row["x"] for row in values if row["doubtful"]} == {4}
    assert "hollow: the interval is not reliable" in json.dumps(drawn["title"])
    sure = panel_lines(rows[:2], legend_of({"a": 1.0}), x="k", y="p", x_title="k", y_title="p", title="t").to_dict()
    assert "hollow" not in json.dumps(sure)


def test_an_axis_of_one_value_has_an_extent() -> None:
    row = {"group": "a", "runs": 1, "mean": 0.5, "mean_low": None, "mean_high": None}
    drawn = dots([row, row | {"group": "b"}], value="mean", x_title="x", title="t").to_dict()
    scales = [layer["encoding"]["x"].get("scale") for layer in drawn.get("layer", [drawn])]
    assert scales[0]["domain"] == pytest.approx([0.45, 0.55])
    other = dots([row, row | {"group": "b", "mean": 1.0}], value="mean", x_title="x", title="t").to_dict()
    assert "domain" not in json.dumps([layer["encoding"]["x"] for layer in other["layer"]])


def test_a_path_along_one_value_has_its_number_on_the_axis() -> None:
    """pass@2 of 0.75 at every rollout stood beside a tick "1"."""
    rows = [{"series": "a", "rollout": at, "h": 0.5 - at / 100, "p": 0.75} for at in range(3)]
    drawn = paths(rows, legend_of({"a": 1.0}), x="h", y="p", x_title="h", y_title="p", title="t").to_dict()
    for layer in drawn["layer"]:
        assert layer["encoding"]["y"]["scale"]["domain"] == pytest.approx([0.675, 0.825])
        assert "domain" not in layer["encoding"]["x"]["scale"]
