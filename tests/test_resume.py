"""A run that was interrupted, anywhere and in any way, and gone on with ends as an undisturbed one, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipctl import load_spec, open_runs
from clipctl.attempts import foresee, spec_changes
from clipctl.checkpoint import damage
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import AlarmStop, DataError, Preempted, SpecError, StoreError
from clipctl.train import train
from runs import SMALL, assert_same

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(runs_dir: Path, **options: Any) -> Path:
    said: list[str] = options.pop("said", [])
    return train(
        load_spec("tiny", SMALL | options.pop("overrides", {})), runs_dir=runs_dir, warn=said.append, **options
    )


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return list(runs.sql(query).fetchall())


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed"))


def after_update(monkeypatch: pytest.MonkeyPatch, update: int, act: Callable[[], None]) -> None:
    """Calls `act` in the middle of the run's so manieth update, counted from 1 over all rollouts."""
    step, seen = TorchTrainer.step, [0]

    def stepping(self: TorchTrainer, *arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == update:
            act()
        return step(self, *arguments)

    monkeypatch.setattr(TorchTrainer, "step", stepping)


def interrupted(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, update: int, **options: Any) -> Path:
    """A run that gets SIGTERM in the middle of an update."""
    with monkeypatch.context() as patch:
        after_update(patch, update, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match="the same command goes on from"):
            run(runs_dir, **options)
    return runs_dir / "x"


# --- the same to the last bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "update",
    [
        8,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(11, marks=pytest.mark.slow),
        pytest.param(17, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_an_update_lets_it_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, update: int
) -> None:
    folder = interrupted(tmp_path, monkeypatch, update)
    assert status(folder)["state"] == "interrupted"
    rollout, done = divmod(update, 6)
    assert (folder / "checkpoints" / "latest").read_text() == f"{rollout}+{done}\n"
    assert rows(folder, "select count(*) from rollouts") == [(rollout,)]
    said: list[str] = []
    assert run(tmp_path, said=said) == folder
    assert said[0] == f"x: attempt 1 goes on from rollout {rollout}, update {done}"
    assert_same(folder, undisturbed, 3)
    assert status(folder)["resumes"][0]["resumed_at"] == rollout


@pytest.mark.slow
def test_a_signal_in_the_last_update_of_a_rollout_saves_the_whole_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    """Although `checkpoint.every` would not have: nothing that was done is done again."""
    folder = interrupted(tmp_path, monkeypatch, 6, overrides={"checkpoint.every": 0})
    assert (folder / "checkpoints" / "latest").read_text() == "1\n"
    assert_same(run(tmp_path, overrides={"checkpoint.every": 0}), undisturbed, 3)


def test_a_signal_while_sampling_drops_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    from clipctl.engine.torch_sampler import TorchSampler

    sample, seen = TorchSampler.sample, [0]

    def sampling(self: TorchSampler, *arguments: Any, **options: Any) -> Iterator[Any]:
        for group in sample(self, *arguments, **options):
            seen[0] += 1
            # The last groups of the second rollout's refill.
            if seen[0] == 14:
                signal.raise_signal(signal.SIGUSR2)
            yield group

    with monkeypatch.context() as patch:
        patch.setattr(TorchSampler, "sample", sampling)
        with pytest.raises(Preempted, match="stopped by SIGUSR2"):
            run(tmp_path, overrides={"checkpoint.every": 2})
    folder = tmp_path / "x"
    latest = (folder / "checkpoints" / "latest").read_text()
    assert latest in ("1\n", "2\n")
    assert_same(run(tmp_path, overrides={"checkpoint.every": 2}), undisturbed, 3)


def test_updates_whose_tokens_are_freed_are_kept_as_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates at a time are summed, so after the third of a rollout two are sums and one still has its tokens."""
    monkeypatch.setattr("clipctl.train.TOKENS_AT_ONCE", 50)
    other = run(tmp_path / "other", overrides={"run.steps": 2})
    folder = interrupted(tmp_path, monkeypatch, 9, overrides={"run.steps": 2})
    opened = json.loads((folder / "checkpoints" / "1+3" / "state" / "state.json").read_text())["open"]
    assert opened["done"]
    assert len(opened["done"]) + len(opened["waiting"]) == 3
    assert_same(run(tmp_path, overrides={"run.steps": 2}), other, 2)


EVALUATED: dict[str, Any] = {
    "eval.every": 1, "eval.benchmarks": ["arith"], "eval.k": 2, "eval.limit": 3, "eval.reuse": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("evaluated"), overrides=EVALUATED)


def evaluations_until(monkeypatch: pytest.MonkeyPatch, rollouts: int, act: Callable[[], None]) -> None:
    """Calls `act` when the evaluation after so many rollouts has stored its rows and not told them yet."""
    from clipctl.journal import RunWriter

    write = RunWriter.write_evaluation

    def writing(self: RunWriter, number: int, rollout: int | None, tables: Any) -> None:
        write(self, number, rollout, tables)
        if rollout == rollouts:
            act()

    monkeypatch.setattr(RunWriter, "write_evaluation", writing)


@pytest.mark.parametrize(
    "rollouts", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_an_evaluation_that_was_interrupted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: Path, rollouts: int
) -> None:
    """The rollouts before it are kept, and each evaluation is there once, told once."""
    with monkeypatch.context() as patch:
        evaluations_until(patch, rollouts, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted):
            run(tmp_path, overrides=EVALUATED)
    folder = tmp_path / "x"
    if rollouts:
        assert (folder / "checkpoints" / "latest").read_text() == f"{rollouts}\n"
    assert_same(run(tmp_path, overrides=EVALUATED), evaluated, 3)
    assert rows(folder, "select rollout from evaluations order by 1") == [(0,), (1,), (2,), (3,)]
    assert rows(folder, "select rollout from events where kind = 'evaluation' order by 1") == [(0,), (1,), (2,), (3,)]


def test_a_run_between_evaluations_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: Path
) -> None:
    folder = interrupted(tmp_path, monkeypatch, 8, overrides=EVALUATED)
    assert_same(run(tmp_path, overrides=EVALUATED), evaluated, 3)
    assert rows(folder, "select count(*) from evaluations") == [(4,)]


@pytest.mark.slow
def test_three_interruptions_in_one_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    for update in (8, 1, 2):
        folder = interrupted(tmp_path, monkeypatch, update)
    assert (folder / "checkpoints" / "latest").read_text() == "1+5\n"
    assert_same(run(tmp_path), undisturbed, 3)
    assert status(folder)["attempt"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"model.dtype": "bfloat16"},
        {"optim.optimizer": "sgd", "optim.lr": 0.1, "loss.importance_cap": 0.9},
        {"reward.kind": "bernoulli", "ledger.probe_states": 0, "ledger.network_every": 0},
    ],
)
def test_other_numbers_optimizers_and_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    overrides = overrides | {"run.steps": 2}
    other = run(tmp_path / "other", overrides=overrides)
    folder = interrupted(tmp_path, monkeypatch, 8, overrides=overrides)
    assert_same(run(tmp_path, overrides=overrides), other, 2)
    assert damage(folder / "checkpoints" / "2") is None


def dice(completion: str, problem: Any) -> float:
    """A reward that does not draw by keys."""
    import numpy as np
    import torch

    return random.random() + np.random.rand() + float(torch.rand(()))


@pytest.mark.slow
def test_generators_that_a_reward_function_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"run.steps": 2, "reward": {"kind": "function", "function": f"{__name__}:dice"}}

    def seed() -> None:
        import numpy as np
        import torch

        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)

    seed()
    other = run(tmp_path / "other", overrides=overrides)
    seed()
    interrupted(tmp_path, monkeypatch, 3, overrides=overrides)
    random.seed(8)
    assert_same(run(tmp_path, overrides=overrides), other, 2)


@pytest.mark.slow
def test_a_longer_run_is_a_shorter_one_that_went_on(tmp_path: Path) -> None:
    """Without the controller, which has a last word at each end of the run."""
    run(tmp_path, overrides={"run.steps": 2, "control.target_entropy": None})
    folder = run(tmp_path, overrides={"control.target_entropy": None})
    assert_same(folder, run(tmp_path / "other", overrides={"control.target_entropy": None}), 3)
    assert json.loads((folder / "spec.json").read_text())["run"]["steps"] == 3


# --- killed between any two writes ------------------------------------------------------------------------------------


def crashes(folder: Path, places: list[int]) -> list[int]:
    """Runs of tests/crash_lab.py that died before their so manieth change of a file and were run again."""
    lab = Path(__file__).with_name("crash_lab.py")
    done = subprocess.run(
        [sys.executable, str(lab), str(folder), *map(str, places)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_killed_between_some_writes(tmp_path: Path) -> None:
    """At six of the places of the soak test below."""
    assert_killed_runs_are_whole(tmp_path, 6)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_between_every_two_writes(tmp_path: Path) -> None:
    assert_killed_runs_are_whole(tmp_path, None)


def assert_killed_runs_are_whole(tmp_path: Path, count: int | None) -> None:
    """Killed before the n-th change of a file and gone on with, for so many n spread over the run, or for all."""
    (changes,) = crashes(tmp_path, [0])
    every = list(range(1, changes + 1, max(1, changes // count) if count else 1))
    for start in range(0, len(every), 20):
        batch = tmp_path / f"from-{start}"
        batch.mkdir()
        places = every[start : start + 20]
        crashes(batch, places)
        for place in places:
            assert_same(batch / str(place) / "x", tmp_path / "0" / "x", 2)
        shutil.rmtree(batch)


# --- killed at any time -----------------------------------------------------------------------------------------------

LONGER = [
    "train",
    "--preset",
    "tiny",
    "--name",
    "x",
    "--steps",
    "6",
    "--set",
    "rollout.prompts=16",
    "--set",
    "optim.epochs=2",
]


def started(runs_dir: Path, *arguments: str, command: list[str] = LONGER, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "clipctl", *command, "--runs-dir", str(runs_dir), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and the last line on stderr."""
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode, (errors.splitlines() or [""])[-1]


def wait_for_line(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stderr is not None
    while words not in (line := process.stderr.readline()):
        assert line, f"the run ended before it said {words!r}"


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    assert ended(started(folder))[0] == 0
    return folder / "x"


def killed_until_it_is_done(runs_dir: Path, rng: random.Random, seconds: tuple[float, float]) -> int:
    """Kills a run again and again, at random times after each attempt began, until one ends; returns how often. The times grow,
    or a machine on which a rollout takes longer than they last would never get anywhere."""
    for kills in range(1000):
        process = started(runs_dir)
        until = time.monotonic() + 60
        while process.poll() is None and not is_at_work(runs_dir / "x", process.pid) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(rng.uniform(*seconds) * 1.2**kills)
        process.kill()
        if ended(process)[0] == 0:
            return kills
        assert process.returncode == -signal.SIGKILL
    raise AssertionError("it never ends")


def is_at_work(folder: Path, pid: int) -> bool:
    """Whether this process has begun its attempt: what a killed one left says `running` too."""
    if not (folder / "status.json").exists():
        return False
    found = status(folder)
    return bool(found["state"] == "running" and found["pid"] == pid)


@pytest.mark.slow
def test_killed_a_few_times(tmp_path: Path, longer: Path) -> None:
    assert killed_until_it_is_done(tmp_path, random.Random(0), (0.5, 4.0)) >= 1
    assert_same(tmp_path / "x", longer, 6)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_over_and_over(tmp_path: Path, longer: Path) -> None:
    """At least 40 kills, in several runs; prints how many."""
    rng, kills, runs = random.Random(time.time_ns()), 0, 0
    while kills < 40:
        folder = tmp_path / str(runs)
        folder.mkdir()
        kills += killed_until_it_is_done(folder, rng, (0.0, 3.0))
        assert_same(folder / "x", longer, 6)
        runs += 1
    print(f"\n{kills} kills, {runs} runs, all as an undisturbed one")


# --- signals from outside ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 75, "clipctl: stopped by SIGTERM; "),
        (signal.SIGUSR1, 75, "clipctl: stopped by SIGUSR1; "),
        (signal.SIGINT, 130, "clipctl: stopped by Ctrl-C; "),
    ],
)
def test_a_signal_ends_a_run_that_goes_on(tmp_path: Path, longer: Path, number: int, code: int, words: str) -> None:
    """As a shell script's background job, whose SIGINT is ignored; with grading processes, which do not outlive it."""
    math = ["--set", "reward.kind=math"] if number == signal.SIGUSR1 else []
    process = started(tmp_path, *math, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_for_line(process, "rollout 2/6")
    time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert bool(children) == bool(math)
    process.send_signal(number)
    returned, line = ended(process)
    assert (returned, line[: len(words)]) == (code, words)
    assert "the same command goes on from rollout" in line
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert status(tmp_path / "x")["state"] == "interrupted"
    assert rows(tmp_path, "select state from runs") == [("interrupted",)]
    assert ended(started(tmp_path, *math))[0] == 0
    if not math:
        assert_same(tmp_path / "x", longer, 6)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, longer: Path) -> None:
    """In one long update: the first waits for its end, the second does not."""
    one = [
        *LONGER,
        "--set",
        "rollout.prompts=256",
        "--set",
        "optim.responses_per_update=2048",
        "--set",
        "optim.epochs=9",
    ]
    process = started(tmp_path, command=one)
    wait_for_line(process, "rollout 1/6")
    folder = tmp_path / "x"
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    returned, line = ended(process)
    assert returned == 130, line
    assert line.startswith(("clipctl: stopped at once by Ctrl-C; ", "clipctl: stopped by Ctrl-C; "))
    assert status(folder)["state"] == "interrupted"


@pytest.mark.slow
def test_a_killed_run_leaves_no_child(tmp_path: Path) -> None:
    process = started(tmp_path, "--set", "reward.kind=math")
    wait_for_line(process, "rollout 1/6")
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.slow
def test_before_the_end_of_a_slurm_job(tmp_path: Path) -> None:
    """Slurm exports the end of the job's time; half of what is left, 6 s, is too short for the run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clipctl", "train", "--preset", "tiny", "--name", "x", "--runs-dir", str(tmp_path)],
        env=ENVIRONMENT | {"SLURM_JOB_END_TIME": str(int(time.time()) + 14)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    returned, line = ended(process)
    assert returned == 75
    assert line.startswith("clipctl: stopped by the job's time is nearly over")


# --- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted_after_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return interrupted(tmp_path_factory.mktemp("interrupted"), patch, 12)


@pytest.fixture
def two_rollouts(tmp_path: Path, interrupted_after_two: Path) -> Path:
    """A run that was interrupted after two of three rollouts, with a checkpoint of each."""
    return Path(shutil.copytree(interrupted_after_two, tmp_path / "x"))


def test_another_spec_is_refused_with_its_difference(two_rollouts: Path) -> None:
    with pytest.raises(SpecError) as error:
        run(
            two_rollouts.parent,
            overrides={"clip.high": float("inf"), "optim.lr": 2e-3, "run.steps": 4, "checkpoint.keep": 3},
        )
    assert str(error.value) == (
        "run.name: 'x' was begun with another spec: clip.high = 0.1, now inf; optim.lr = 0.001, now 0.002; only run.steps, "
        "eval.* and checkpoint.* may change: choose another --name"
    )
    with pytest.raises(SpecError, match=r"run\.steps = 1: 'x' has 2 rollouts already"):
        run(two_rollouts.parent, overrides={"run.steps": 1})


def test_keys_of_another_kind_are_a_difference() -> None:
    one, two = load_spec("tiny"), load_spec("tiny", {"reward.kind": "bernoulli", "run.steps": 9, "eval.k": 3})
    assert sorted(spec_changes(one, two)) == [
        "reward.correct = 1.0, now none",
        "reward.kind = 'gsm8k', now 'bernoulli'",
        "reward.p = none, now 0.5",
        "reward.wrong = 0.0, now none",
    ]


def test_must_and_never(tmp_path: Path, two_rollouts: Path) -> None:
    with pytest.raises(SpecError, match="--resume must: there is no run 'y'"):
        run(tmp_path, overrides={"run.name": "y"}, resume="must")
    with pytest.raises(SpecError, match="--resume must: a run without --name is always a new one"):
        run(tmp_path, overrides={"run.name": None}, resume="must")
    with pytest.raises(SpecError, match="'x' exists in"):
        run(tmp_path, resume="never")
    assert run(tmp_path, resume="must") == two_rollouts


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(SpecError, match=r"is no run \(it has thesis\.tex and no spec\.json\)"):
        run(tmp_path)
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["thesis.tex"]


def test_what_a_dry_run_says_of_a_name(two_rollouts: Path) -> None:
    """The same as the run itself, which it leaves as it is."""
    runs_dir = two_rollouts.parent

    def said(resume: Any = "auto", **changes: Any) -> str:
        return foresee(runs_dir, load_spec("tiny", SMALL | changes), resume)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in runs_dir.rglob("*") if path.is_file()}

    (two_rollouts / ".lock").unlink()
    before = content()
    assert said() == f"{two_rollouts}, which goes on from rollout 2"
    assert said(**{"run.name": "new"}) == f"{runs_dir / 'new'}, new"
    assert said(**{"run.name": None}).startswith(f"a new one in {runs_dir}; with --name ")
    refusals: list[tuple[Any, dict[str, Any]]] = [
        ("auto", {"clip.high": 0.3}),
        ("auto", {"run.steps": 1}),
        ("never", {}),
        ("must", {"run.name": "new"}),
        ("must", {"run.name": None}),
    ]
    for resume, changes in refusals:
        with pytest.raises(SpecError) as foreseen:
            said(resume, **changes)
        assert content() == before
        with pytest.raises(SpecError) as refused:
            run(runs_dir, overrides=changes, resume=resume)
        assert str(foreseen.value) == str(refused.value)
        (two_rollouts / ".lock").unlink(missing_ok=True)
    now = status(two_rollouts)
    (two_rollouts / "status.json").write_text(
        json.dumps(now | {"state": "running", "host": "elsewhere", "heartbeat": datetime.now(UTC).isoformat()})
    )
    with pytest.raises(SpecError, match=r"'x' is being run \(process \d+ on elsewhere\)"):
        said()
    (two_rollouts / "status.json").write_text(json.dumps(now | {"state": "finished", "rollouts": 3}))
    assert said().endswith("x, which is finished, with 3 rollouts: nothing would be run; raise run.steps")
    (two_rollouts / "status.json").write_text(
        json.dumps(now | {"state": "stopped", "message": "stopped by the alarm y"})
    )
    with pytest.raises(AlarmStop, match=r"x was stopped by the alarm y; raise run\.steps"):
        said()
    (two_rollouts / "status.json").write_text("{")
    assert said().endswith("x, which goes on from rollout 2; status.json is damaged, and would be made again")


def test_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"q": "{n} + 2 + 3", "a": "{n + 5}"}}\n' for n in range(1, 9)))
    overrides = {"data": {"task": "file", "path": str(data), "question_field": "q", "answer_field": "a"}}
    interrupted(tmp_path, monkeypatch, 7, overrides=overrides)
    data.write_text(data.read_text().replace("4 + 2", "4 + 1"))
    with pytest.raises(DataError, match="are not those that the run was begun with"):
        run(tmp_path, overrides=overrides)


def test_a_run_that_is_being_run_is_refused_and_a_killed_one_is_not(tmp_path: Path, two_rollouts: Path) -> None:
    """The lock is the kernel's, so that a process that was killed holds none, whatever status.json says."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, fcntl, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print('held', flush=True); time.sleep(600)", str(two_rollouts / ".lock")], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        (two_rollouts / "status.json").write_text(json.dumps(status(two_rollouts) | {"state": "running"}))
        with pytest.raises(SpecError, match=rf"'x' is being run \(process {os.getpid()} on {os.uname().nodename}\)"):
            run(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert run(tmp_path) == two_rollouts


@pytest.mark.slow
def test_of_two_launches_at_once_one_runs(tmp_path: Path, longer: Path) -> None:
    processes = [started(tmp_path) for _ in range(2)]
    results = sorted(ended(process) for process in processes)
    assert [code for code, _ in results] == [0, 2]
    assert "'x' is being run" in results[1][1] or "'x' exists in" in results[1][1]
    assert_same(tmp_path / "x", longer, 6)


def test_a_run_of_another_machine_is_watched_for_a_heartbeat(
    tmp_path: Path, two_rollouts: Path, monkeypatch: pytest.MonkeyPatch, short_wait: None
) -> None:
    """Locks may be of one machine only. Clocks are not compared: the heartbeat of the other one may be of any time."""
    from clipctl import lock

    elsewhere = status(two_rollouts) | {
        "state": "running",
        "host": "elsewhere",
        "heartbeat": "2099-01-01T00:00:00+00:00",
    }
    (two_rollouts / "status.json").write_text(json.dumps(elsewhere))

    def beat(seconds: float) -> None:
        (two_rollouts / "status.json").write_text(json.dumps(elsewhere | {"heartbeat": "2001-01-01T00:00:00+00:00"}))

    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", beat)
        with pytest.raises(SpecError, match=r"is being run \(process .* on elsewhere"):
            run(tmp_path)
    said: list[str] = []
    assert run(tmp_path, said=said) == two_rollouts
    assert said[0].startswith("elsewhere was running x: waiting for")


@pytest.mark.parametrize("year", [2099, pytest.param(2001, marks=pytest.mark.slow)])
def test_a_clock_that_jumped_changes_nothing(two_rollouts: Path, undisturbed: Path, year: int) -> None:
    """Heartbeat, start and earlier attempts lie in the future or far back."""
    text = (two_rollouts / "status.json").read_text().replace('"interrupted"', '"running"')
    (two_rollouts / "status.json").write_text(text.replace(f'"{time.gmtime().tm_year}-', f'"{year}-'))
    assert rows(two_rollouts, "select state from runs") == [("crashed",)]
    assert_same(run(two_rollouts.parent), undisturbed, 3)
    assert rows(two_rollouts, "select state from runs") == [("finished",)]


@pytest.mark.slow
def test_a_run_that_an_alarm_stopped_stays_stopped(tmp_path: Path) -> None:
    overrides = {"run.stop_on": ["no_clipping"], "clip.low": 0.9, "control.target_entropy": None, "clip.high": float("inf"),
                 "optim.lr": 1e-6}  # fmt: skip
    with pytest.raises(AlarmStop, match="stopped by the alarm no_clipping after rollout 0"):
        run(tmp_path, overrides=overrides)
    with pytest.raises(
        AlarmStop, match=r"x was stopped by the alarm no_clipping .* raise run.steps to go on all the same"
    ):
        run(tmp_path, overrides=overrides)
    said: list[str] = []
    run(tmp_path, overrides=overrides | {"run.steps": 4}, said=said)
    assert said[0] == "x: attempt 1 goes on from rollout 1"


@pytest.mark.slow
@pytest.mark.usefixtures("short_wait")
def test_a_damaged_status_starts_no_stopped_run_again(tmp_path: Path) -> None:
    overrides = {"run.stop_on": ["no_clipping"], "clip.low": 0.9, "control.target_entropy": None, "clip.high": float("inf"),
                 "optim.lr": 1e-6}  # fmt: skip
    for _ in range(2):
        with pytest.raises(AlarmStop, match="stopped by the alarm no_clipping after rollout 0"):
            run(tmp_path, overrides=overrides)
        assert status(tmp_path / "x")["state"] == "stopped"
        (tmp_path / "x" / "status.json").write_text("{")
    said: list[str] = []
    run(tmp_path, overrides=overrides | {"run.steps": 4}, said=said)
    assert said[2] == "x: attempt 2 goes on from rollout 1"


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped bit", pytest.param("truncated", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(
    two_rollouts: Path, undisturbed: Path, how: str
) -> None:
    file = two_rollouts / "checkpoints" / "2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if how == "flipped bit" else content[: len(content) // 2])
    said: list[str] = []
    assert run(two_rollouts.parent, said=said) == two_rollouts
    assert said[0].startswith("checkpoint 2 is not usable: model.safetensors ")
    assert said[1] == "x: attempt 1 goes on from rollout 1"
    assert rows(two_rollouts, "select message from events where kind = 'checkpoint_damaged'") == [(said[0],)]
    assert_same(two_rollouts, undisturbed, 3)


def test_without_a_good_checkpoint_nothing_is_begun_anew(two_rollouts: Path) -> None:
    for rollouts in (1, 2):
        (two_rollouts / "checkpoints" / str(rollouts) / "manifest.json").unlink()
    before = rows(two_rollouts, "select * from rollouts order by rollout")
    with pytest.raises(
        StoreError, match=r"checkpoint 2 is not usable: .*; checkpoint 1 is not usable: .*; none is left"
    ):
        run(two_rollouts.parent)
    assert rows(two_rollouts, "select * from rollouts order by rollout") == before


def test_a_damaged_store_is_not_gone_on_with_until_it_is_moved_away(two_rollouts: Path, tmp_path: Path) -> None:
    file = two_rollouts / "metrics.duckdb"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(
        StoreError, match=r"x/metrics\.duckdb cannot be gone on with: .*; move it away to go on without"
    ):
        run(two_rollouts.parent)
    with pytest.raises(StoreError, match=r"x/metrics\.duckdb cannot be gone on with"):
        foresee(two_rollouts.parent, load_spec("tiny", SMALL), "auto")
    assert status(two_rollouts)["state"] == "interrupted"
    file.rename(tmp_path / "damaged.duckdb")
    run(two_rollouts.parent)
    assert [row for (row,) in rows(two_rollouts, "select rollout from rollouts")] == [2]
    assert status(two_rollouts)["state"] == "finished"


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a heartbeat."""
    from clipctl import lock

    monkeypatch.setattr(lock, "BEAT_SECONDS", -3.5)


def without(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key})


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        pytest.param(lambda text: None, "missing", marks=pytest.mark.slow),
        pytest.param(lambda text: "\0" * len(text), "damaged", marks=pytest.mark.slow),
        pytest.param(without("attempt"), "damaged", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_status_is_made_again(
    two_rollouts: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Path,
    damage: Callable[[str], str | None],
    said: str,
) -> None:
    """Also where an earlier attempt did rollouts of the first one again, which readers hide by what status.json says."""
    (two_rollouts / "checkpoints" / "2" / "manifest.json").unlink()
    interrupted(two_rollouts.parent, monkeypatch, 8)
    before, file = status(two_rollouts), two_rollouts / "status.json"
    assert [(resume["attempt"], resume["resumed_at"]) for resume in before["resumes"]] == [(1, 1)]
    text = damage(file.read_text())
    file.unlink()
    if text is not None:
        file.write_text(text)
    lines: list[str] = []
    run(two_rollouts.parent, said=lines)
    assert lines[0] == f"x: status.json is {said}, and with it who runs the run: waiting for 2 s for a sign of life"
    assert lines[1].startswith(
        f"x: status.json is {said}; it is made again of what is stored: 2 attempts, 2 rollouts; lost is when the run was "
        "begun (for which its first row, of 20"
    )
    assert lines[2] == "x: attempt 2 goes on from rollout 2, update 2"
    assert_same(two_rollouts, undisturbed, 3)
    after = status(two_rollouts)
    assert after["resumes"][0] == before["resumes"][0] | {"time": after["resumes"][0]["time"]}
    assert after["resumes"][0]["time"] > after["created_at"] > before["created_at"]
    assert (after["attempt"], after["state"]) == (2, "finished")
    assert rows(two_rollouts, "select attempt, message from events where kind = 'status_damaged'") == [(2, lines[1])]


@pytest.mark.usefixtures("short_wait")
def test_a_damaged_status_of_a_living_run_is_left_to_it(two_rollouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, whose lock is not seen here: its next heartbeat makes the file whole."""
    from clipctl import lock

    elsewhere = status(two_rollouts) | {"state": "running", "host": "elsewhere"}
    (two_rollouts / "status.json").write_text("{")
    monkeypatch.setattr(
        lock.time, "sleep", lambda seconds: (two_rollouts / "status.json").write_text(json.dumps(elsewhere))
    )
    with pytest.raises(SpecError, match=r"is being run \(process .* on elsewhere"):
        run(two_rollouts.parent)


@pytest.mark.usefixtures("short_wait")
def test_a_status_that_may_not_be_read_is_not_made_again(two_rollouts: Path) -> None:
    (two_rollouts / "status.json").unlink()
    (two_rollouts / "status.json").mkdir()
    with pytest.raises(StoreError, match=r"status\.json cannot be read: Is a directory"):
        run(two_rollouts.parent)


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path: Path, undisturbed: Path) -> None:
    """A checkpoint that does not fit is not there, the one before is; with room again the run goes on."""
    disk = tmp_path / "disk"
    mounted(disk, "-t", "tmpfs", "-o", "size=4200k", "tmpfs")
    try:
        with pytest.raises(StoreError, match="No space left on device") as error:
            run(disk, overrides={"checkpoint.keep": "all"})
        assert error.value.exit_code == 7
        found = sorted(entry.name for entry in (disk / "x" / "checkpoints").iterdir())
        assert found in (["1", "latest"], ["1", "2", "latest"])
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert_same(run(disk, overrides={"checkpoint.keep": 2}), undisturbed, 3)
    finally:
        # Weights that the run mapped into memory may still wait for the garbage collector.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_folder_that_became_read_only_is_named(tmp_path: Path, two_rollouts: Path) -> None:
    place = tmp_path / "place"
    mounted(place, "--bind", str(tmp_path))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        with pytest.raises(StoreError, match=r"cannot be written|Read-only file system"):
            run(place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert run(tmp_path) == two_rollouts
