"""Evaluations from the command to the folder: numbers, interruption, reuse, refusals; the run is never touched."""

import _thread
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipctl.eval_runner as runner
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.errors import DataError, Interrupted, ModelError, SpecError
from clipctl.eval_report import eval_report, find_evaluation
from clipctl.eval_runner import model_target, run_evaluation, run_target
from clipctl.eval_spec import EvalSpec, resolve_eval_spec
from clipctl.evaluate import EvalReport
from clipctl.spec import load_spec, nest
from clipctl.store import open_runs
from clipctl.train import train

ARITH = {"arith.style": "expression", "eval.benchmarks": ("arith",), "eval.max_response_tokens": 24}
EVALS = "select * exclude (eval_id, run_id, attempt) from evals order by benchmark, position, sample"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluations"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after 1 and 2 rollouts."""
    overrides = {"run.name": "a", "run.steps": 2, "rollout.prompts": 4, "optim.epochs": 1, "checkpoint.every": 1}
    return train(load_spec("tiny", overrides), runs_dir=tmp_path_factory.mktemp("runs"))


def spec(**changes: Any) -> EvalSpec:
    few = {"eval.limit": 6, "eval.k": 4, "engine.sampler_rows": 8, "eval.reuse": False}
    return resolve_eval_spec(
        model_target("tiny"), nest(ARITH | few | {k.replace("__", "."): v for k, v in changes.items()})
    )


def evaluated(path: Path, name: str, **changes: Any) -> Path:
    return run_evaluation(spec(**changes), runs_dir=path, name=name)


def rows(folder: Path, query: str = EVALS) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return list(runs.sql(query).fetchall())


def test_an_evaluation_is_a_folder_with_a_row_for_every_sample(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "e")
    found = rows(folder, "select position, sample, outcome, correct, tokens, truncated, answer, text from evals")
    assert sorted((position, sample) for position, sample, *_ in found) == [(p, s) for p in range(6) for s in range(4)]
    for _, _, outcome, correct, tokens, truncated, answer, text in found:
        assert correct == (outcome == "correct")
        assert truncated == (tokens == 24 and truncated)
        assert answer is None or answer in text.replace(" ", "")
    facts = rows(
        folder, "select state, model, k, problems, problems_of, complete, temperature, top_p, seed from evaluations"
    )
    assert facts == [("finished", "tiny", 4, 6, 512, True, 1.0, 0.95, 0)]
    correct = np.array(sorted((p, s, c) for p, s, _, c, *_ in found))[:, 2].reshape(6, 4)
    shown = json.loads(eval_report(folder, "json", False))
    (result,) = shown["results"]
    assert result["metrics"]["mean@4"]["value"] == pytest.approx(correct.mean())
    assert [point["k"] for point in result["pass_at_k"]] == [1, 2, 3, 4]
    assert result["pass_at_k"][3]["value"] == pytest.approx(correct.any(1).mean())
    assert shown["schema_version"] == 1
    assert "6 problems" in result["metrics"]["mean@4"]["note"]


def test_table_and_csv_say_the_same(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "e")
    table = eval_report(folder, "table", False)
    listed = list(csv.DictReader(io.StringIO(eval_report(folder, "csv", False))))
    assert [row["metric"] for row in listed][:4] == ["mean@4", "pass@2", "pass@4", "cons@4"]
    for row in listed:
        (line,) = (line for line in table.splitlines() if line.startswith("arith") and f" {row['metric']} " in line)
        assert f" {float(row['value']):.4g} " in line
        assert line.split()[-2:] == ["6", "4"]
    assert "* arith mean@4" in table
    assert "held the truth in" in table


def interrupt_after(problems: int) -> Callable[[EvalReport], None]:
    """Ctrl-C, once, as soon as so many problems are kept."""
    left = [_thread.interrupt_main]

    def report(report: EvalReport) -> None:
        if report.problems >= problems and left:
            left.pop()()

    return report


def test_a_stopped_evaluation_goes_on_to_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit, log-probabilities too; waves of 2 of 24 problems, stopped twice."""
    whole = rows(evaluated(tmp_path, "whole", eval__limit=24))
    stopped = spec(eval__limit=24)
    kept = []
    for after in (4, 12):
        with pytest.raises(Interrupted, match=r"of 24 problems are kept in .*/stopped; the same command goes on"):
            run_evaluation(stopped, runs_dir=tmp_path, name="stopped", report=interrupt_after(after))
        part = rows(tmp_path / "stopped")
        assert set(part) < set(whole)
        kept.append(len(part))
        ((state, complete),) = rows(tmp_path / "stopped", "select state, complete from evaluations")
        assert (state, complete) == ("interrupted", False)
        assert f"incomplete: {len(part) // 4} of 24 problems" in eval_report(tmp_path / "stopped", "table", False)
    assert 0 < kept[0] < kept[1]
    told: list[str] = []
    folder = run_evaluation(stopped, runs_dir=tmp_path, name="stopped", tell=told.append)
    assert told == [f"stopped goes on: {kept[1] // 4} of 24 problems are there"]
    assert rows(folder) == whole
    assert rows(folder, "select state, complete, attempt from evaluations") == [("finished", True, 2)]


def test_ctrl_c_does_not_wait_for_answers_that_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers that no comparison ends with take 5 s each, 48 of them: two minutes. What was graded before is kept."""
    monkeypatch.setattr(runner, "STOP_SECONDS", 1.0)
    file = tmp_path / "towers.jsonl"
    easy = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    hanging = [{"question": f"1+2+3+4+{n}=", "answer": f"{n + 2}^{{9^{{9^{{9^9}}}}}}"} for n in range(6)]
    file.write_text("\n".join(map(json.dumps, easy + hanging)) + "\n")
    told: list[str] = []
    timers: list[threading.Timer] = []
    stopped_at: list[float] = []
    easy_are_graded = threading.Event()
    sample = TorchSampler.sample

    def sample_easy_first(self: TorchSampler, *arguments: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        """Shorter questions come first; what hangs is not graded together with them."""
        for count, group in enumerate(sample(self, *arguments, **options)):
            if count == len(easy):
                assert easy_are_graded.wait(60)
            yield group

    monkeypatch.setattr(TorchSampler, "sample", sample_easy_first)

    def interrupt() -> None:
        stopped_at.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def report(now: EvalReport) -> None:
        if now.problems >= 4 and not timers:
            easy_are_graded.set()
            timers.append(threading.Timer(1.0, interrupt))
            timers[-1].start()

    settings = {"eval__benchmarks": (str(file),), "eval__limit": 10, "eval__k": 8, "engine__sampler_rows": 8}
    try:
        with pytest.raises(Interrupted, match=r"problems are kept in .*/e; the same command goes on") as error:
            run_evaluation(spec(**settings), runs_dir=tmp_path, name="e", report=report, tell=told.append)
    finally:
        for timer in timers:
            timer.cancel()
    assert error.value.exit_code == 130
    assert time.monotonic() - stopped_at[0] < 20
    assert told[-1] == "stopping: what is sampled is still graded and kept, for 1 s at most; Ctrl-C again does not wait"
    # All that is easy, and of the others what was at its limit by then.
    kept = len(rows(tmp_path / "e"))
    assert 4 * 8 <= kept < 10 * 8
    assert f"{kept // 8} of 10 problems" in str(error.value)


def test_an_evaluation_that_was_killed_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clipctl", "eval", "--model", "tiny", "--benchmark", "arith", "-k", "4", "--limit", "96",
               "--set", "arith.style=expression", "--set", "engine.sampler_rows=8", "--set", "eval.reuse=false",
               "--max-tokens", "24", "--name", "killed", "--runs-dir", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed" / "journal"
    while len(list(journal.glob("evals-*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows(tmp_path, "select state, complete from evaluations") == [("crashed", False)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "killed goes on:" in done.stderr
    assert rows(tmp_path / "killed") == rows(evaluated(tmp_path, "whole", eval__limit=96))


def test_draws_depend_on_the_problem_alone(tmp_path: Path) -> None:
    """Not on the limit, the other benchmarks or the number of samples beside them."""
    words = tmp_path / "sums.jsonl"
    words.write_text('{"question": "1+2+3=", "answer": "6"}\n{"question": "4+4=", "answer": "8"}\n')
    texts = "select position, sample, text from evals where benchmark = 'arith' and position < 4 and sample < 3 order by all"
    first = rows(evaluated(tmp_path, "one", eval__limit=4, eval__k=3), texts)
    both = ("sums=" + str(words), "arith")
    second = rows(evaluated(tmp_path, "two", eval__benchmarks=both, eval__limit=9, engine__sampler_rows=64), texts)
    assert first == second
    assert first != rows(evaluated(tmp_path, "three", eval__limit=4, eval__k=3, eval__seed=1), texts)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def of_run(run: Path, target: str, **changes: Any) -> EvalSpec:
    few = {"eval.limit": 5, "eval.k": 2, "eval.benchmarks": ("arith",)}
    layer = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve_eval_spec(run_target(target, run.parent), nest(few | layer))


def test_a_runs_checkpoint_is_evaluated_and_the_run_is_not_touched(run_folder: Path, tmp_path: Path) -> None:
    before = snapshot(run_folder)
    last = run_evaluation(of_run(run_folder, "a"), runs_dir=tmp_path)
    first = run_evaluation(of_run(run_folder, f"{run_folder}@1"), runs_dir=tmp_path)
    base = run_evaluation(of_run(run_folder, "a@0"), runs_dir=tmp_path)
    assert snapshot(run_folder) == before
    assert last.name.startswith("eval-a-2-")
    query = "select run_id, rollout, model, max_tokens from evaluations order by rollout"
    with open_runs([run_folder, tmp_path]) as runs:
        assert runs.sql(query).fetchall() == [
            ("a", 0, "tiny", 24),
            ("a", 1, str(run_folder / "checkpoints" / "1"), 24),
            ("a", 2, str(run_folder / "checkpoints" / "2"), 24),
        ]
    assert rows(base, "select text from evals") != rows(last, "select text from evals")
    against = find_evaluation(str(first), tmp_path, "--compare")
    table = eval_report(last, "table", False, against)
    assert f"mean - {first.name}" in table
    assert "5 problems: " in table


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("b", SpecError, r"--run: no run 'b', as a folder or in .* \(did you mean a\?\)|no run 'b'"),
        ("a@7", ModelError, r"--run: a has no checkpoint 7; it has 1, 2 \(0 is the base model\)"),
        ("a@last", SpecError, r"what follows @ is a number of rollouts, such as a@20"),
    ],
)
def test_targets_that_there_are_not(run_folder: Path, target: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_target(target, run_folder.parent)


def test_a_run_without_a_checkpoint_and_an_evaluation_are_no_targets(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    with pytest.raises(ModelError, match=r"--run: bare \(finished\) has no checkpoint; .*bare@0 is its base model"):
        run_target("bare", tmp_path)
    evaluated(tmp_path, "e")
    with pytest.raises(SpecError, match="is an evaluation, not a run"):
        run_target("e", tmp_path)


def test_a_name_belongs_to_one_evaluation(tmp_path: Path, run_folder: Path) -> None:
    evaluated(tmp_path, "e")
    changed = r"--name: 'e' has other settings \(eval\.k was 4, now 2; eval\.seed was 0, now 3\)"
    with pytest.raises(SpecError, match=changed):
        evaluated(tmp_path, "e", eval__k=2, eval__seed=3)
    with pytest.raises(SpecError, match=r"--name: 'a b' is not allowed"):
        evaluated(tmp_path, "a b")
    with pytest.raises(SpecError, match="exists and is no evaluation"):
        evaluated(run_folder.parent, "a")
    status = json.loads((tmp_path / "e" / "status.json").read_text()) | {"state": "running"}
    (tmp_path / "e" / "status.json").write_text(json.dumps(status))
    with pytest.raises(SpecError, match=rf"'e' is being evaluated by process {os.getpid()}"):
        evaluated(tmp_path, "e")


def test_what_changed_since_it_began_is_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text('{"question": "1+2+3=", "answer": "6"}\n')
    evaluated(tmp_path, "e", eval__benchmarks=(str(file),))
    file.write_text('{"question": "1+2+3=", "answer": "7"}\n')
    with pytest.raises(SpecError, match=r"--name: the problems \(dataset_hash of sums\) changed since 'e' began"):
        evaluated(tmp_path, "e", eval__benchmarks=(str(file),))


def test_an_unchanged_model_under_the_same_settings_is_evaluated_once(tmp_path: Path, cache: Path) -> None:
    first = evaluated(tmp_path, "first", eval__reuse=True)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "open_sampler", lambda *_: pytest.fail("nothing is to be sampled"))
        second = run_evaluation(spec(eval__reuse=True), runs_dir=tmp_path, name="second", tell=told.append)
        again = run_evaluation(spec(eval__reuse=True), runs_dir=tmp_path, name="second", tell=told.append)
    assert again == second
    assert told == [
        "arith: the numbers of first, of the same model under the same settings, are reused",
        "second is finished; these are its numbers",
    ]
    assert rows(second) == rows(first)
    assert rows(second, "select reused_from from evaluations") == [("first",)]
    assert rows(evaluated(tmp_path, "other", eval__reuse=True, eval__seed=1)) != rows(first)
    assert len(list(cache.glob("*.parquet"))) == 2


def test_a_damaged_entry_is_evaluated_again(tmp_path: Path, cache: Path) -> None:
    first = rows(evaluated(tmp_path, "first", eval__reuse=True))
    (entry,) = cache.glob("*.parquet")
    entry.write_bytes(entry.read_bytes()[:-40])
    second = evaluated(tmp_path, "second", eval__reuse=True)
    assert rows(second) == first
    assert rows(second, "select reused_from from evaluations") == [(None,)]


def test_prompts_that_do_not_fit_are_an_error_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"eval\.max_response_tokens = 99999: with prompts of up to \d+ tokens in arith"
    ):
        evaluated(tmp_path, "e", eval__max_response_tokens=99_999)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"question": "1 + " * 400 + "1 = ?", "answer": "#### 401"}) + "\n")
    with pytest.raises(SpecError, match=r"--benchmark: gsm8k has a prompt of \d{3,} tokens, tiny has 256 positions"):
        evaluated(tmp_path, "e", eval__benchmarks=(f"gsm8k={long}",))
    assert not list(tmp_path.glob("e*"))


def clipctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipctl", "eval", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of --run RUN[@ROLLOUT] and --model M"),
        (["--run", "a", "--model", "tiny"], 2, "give one of --run RUN[@ROLLOUT] and --model M"),
        (["--model", "tiny"], 2, "eval.benchmarks: empty; give --benchmark, such as --benchmark gsm8k"),
        (["--model", "tiny", "--benchmark", "gms8k"], 2, "(did you mean gsm8k?)"),
        (
            ["--model", "tiny", "--benchmark", "arith", "--set", "eval.kk=3"],
            2,
            "eval.kk: unknown key (did you mean eval.k?)",
        ),
        (
            ["--model", "tiny", "--benchmark", "arith", "--temperature", "0"],
            2,
            "at temperature 0 all samples are the same",
        ),
        (
            ["--model", "tiny", "--benchmark", "arith", "--format", "xml"],
            2,
            "--format: 'xml' is not one of table, json, csv",
        ),
        (["--model", "tiny", "--benchmark", "arith", "--compare", "gone"], 2, "--compare: no evaluation or run 'gone'"),
        (["--model", "no-such-model", "--benchmark", "arith"], 4, "no folder, file or known model 'no-such-model'"),
        (["--model", "tiny", "--benchmark", "gone.jsonl"], 4, "--benchmark: no file 'gone.jsonl'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = clipctl(*arguments, "--runs-dir", str(tmp_path / "runs"))
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert message in line


def test_the_command_prints_json_to_stdout_and_the_rest_to_stderr(tmp_path: Path) -> None:
    done = clipctl("--model", "tiny", "--benchmark", "arith", "-k", "2", "--limit", "3", "--set", "arith.style=expression",
                   "--max-tokens", "24", "--temperature", "0.5", "--top-p", "0.9", "--seed", "4", "--format", "json",
                   "--runs-dir", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["results"][0]["settings"]
    assert [settings[name] for name in ("k", "temperature", "top_p", "seed", "problems")] == [2, 0.5, 0.9, 4, 3]
    assert "evaluated 3/3 problems" in done.stderr
    other = ("--compare", json.loads(done.stdout)["eval_id"])
    compared = clipctl("--model", "tiny", "--benchmark", "arith", "-k", "2", "--limit", "3", "--set", "arith.style=expression",
                       "--max-tokens", "24", *other, "--runs-dir", str(tmp_path))  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert "arith: the two differ in temperature, top_p, seed too" in compared.stdout


def test_answers_of_files_without_a_gold_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "answer": null}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: field 'answer' is None, so the row has no answer"):
        evaluated(tmp_path, "e", eval__benchmarks=(str(tmp_path / "rows.jsonl"),))
