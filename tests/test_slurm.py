"""Sweeps as arrays of Slurm jobs: a real Slurm on this machine preempts them and ends their time, and no number changes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_sweep import a_run

from clipctl import load_spec
from clipctl.ends import VANISHINGS, End, begun_job, closed, next_job, read_end, write_end
from clipctl.errors import EngineError, Preempted, SpecError, SweepFailed
from clipctl.slurm import (
    name_array,
    parse_options,
    print_script,
    queue_lines,
    queued_runs,
    seconds_of,
    submit,
    wait_for_runs,
    warning_seconds,
)
from clipctl.slurm_job import STALLS, Signals, SlurmRun, count_stalls, job_id, run_job
from clipctl.slurm_resources import resources
from clipctl.sweep_folder import open_claim, place_members, record_sweep
from clipctl.sweep_spec import expand, preset_sweep, resolve_sweep
from clipctl.train import train
from runs import assert_same

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]
TOOLS = Path(__file__).parents[2] / "shared" / "tools"
SPEC: dict[str, Any] = {
    "run.steps": 9, "rollout.prompts": 4, "rollout.group_size": 4, "rollout.max_response_tokens": 14,
    "data.arith.problems": 64, "optim.responses_per_update": 8, "optim.epochs": 2, "optim.lr": 1e-3,
    "ledger.probe_states": 8, "ledger.network_every": 2, "reward.kind": "function",
    "reward.function": "slurm_reward:slow",
}  # fmt: skip
SETS = [word for key, value in SPEC.items() for word in ("--set", f"{key}={value}")]
TWO_RUNS = (
    *SETS, "--seeds", "2", "--jobs", "2", "--slurm", "time=9", "--slurm", "partition=main", "--slurm", "cpus-per-task=1",
)  # fmt: skip
"""At once, each a job of nine minutes on one core."""


# --- without Slurm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-01:02:03", 176523),
        ("0:05", 5),
    ],
)
def test_time_limits(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


def test_notice_is_the_margin_where_the_job_is_long_enough() -> None:
    assert warning_seconds({"time": "4:00:00"}, 120.0) == 120
    assert warning_seconds({"time": "3"}, 120.0) == 60
    assert warning_seconds({"time": 1}, 120.0) == 1


def test_options_of_the_command_line_are_over_those_of_the_file() -> None:
    file: dict[str, str | int | bool] = {"partition": "gpu", "cpus-per-task": 4, "exclusive": True}
    assert parse_options(["partition=long", "time=1:00:00", "mem=32G", "no-kill"], file) == {
        "partition": "long", "cpus_per_task": 4, "exclusive": True, "time": "1:00:00", "mem": "32G", "no_kill": True,
    }  # fmt: skip
    assert parse_options(["time=9"], file | {"exclusive": False}).keys() == {"partition", "cpus_per_task", "time"}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "--slurm: time is missing"),
        (["time=soon"], "time = 'soon' is no time limit"),
        (["time=9", "array=0-3"], "array is set by the launcher"),
        (["time=9", "mem="], "'mem=' is not KEY=VALUE"),
        (["Time=9"], "'Time=9' is not KEY=VALUE"),
    ],
)
def test_options_that_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_options(texts, {})


def test_the_script_is_bash_and_has_a_command_for_each_run_that_is_left(tmp_path: Path) -> None:
    """Values with quotes and blanks come to the run as they are."""
    hard = {"data.template": 'it\'s "{question}" $HOME `id`'}
    members = expand(resolve_sweep(preset_sweep("tiny"), hard, grid={"clip.high": [0.1, float("inf")]}, seeds=2))
    a_run(tmp_path / "s" / members[0].name, members[0], "finished", 40)
    placed = place_members(tmp_path, "s", members)
    options = {"time": "9", "exclusive": True, "comment": "two words"}
    script = print_script(tmp_path / "s", placed, 2, options, retry_failed=False)
    for line in (
        "#SBATCH --array=0-2%2",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=9",
        "#SBATCH --exclusive",
        "#SBATCH --comment='two words'",
    ):
        assert line in script.splitlines()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # What srun would be given, one argument a line.
    shown = script.replace('eval "srun', "eval \"printf '%s\\n'")
    for at, place in enumerate(placed[1:]):
        environment = {"SLURM_ARRAY_TASK_ID": str(at), "SLURM_ARRAY_JOB_ID": "7", "PATH": os.environ["PATH"]}
        told = subprocess.run(["bash"], input=shown, text=True, check=True, capture_output=True, env=environment).stdout
        run = [str(place.folder), place.member.identity, *place.command]
        assert told.splitlines() == [sys.executable, "-m", "clipctl.slurm_job", *run]
    for member in members[1:]:
        a_run(tmp_path / "s" / member.name, member, "finished", 40)
    with pytest.raises(SpecError, match="nothing is left to do"):
        print_script(tmp_path / "s", placed, 2, {"time": "9"}, retry_failed=False)


@pytest.mark.parametrize(
    ("overrides", "options", "chosen"),
    [
        ({}, {}, {"ntasks": 1, "cpus_per_task": 1}),
        ({"engine.threads": 3}, {}, {"ntasks": 1, "cpus_per_task": 3}),
        (
            {"engine.threads": 3, "reward.kind": "math", "reward.workers": 4},
            {},
            {"ntasks": 1, "cpus_per_task": 7},
        ),
        *(
            (
                {"engine.threads": 3, "reward.kind": reward, "data.task": task},
                {},
                {"ntasks": 1, "cpus_per_task": 3 + graders},
            )
            for reward, task, graders in (
                ("bernoulli", "math500", 2),
                ("normal", "dapo-math-17k", 2),
                ("gsm8k", "math500", 0),
                ("uniform", "gsm8k", 0),
                ("rademacher", "file", 0),
                ("rademacher", "nope", 0),
                ("math", "nope", 2),
            )
        ),
        *(
            (
                {"engine.threads": 3, "eval.every": every, "eval.benchmarks": [benchmark], "eval.file.grader": grader},
                {},
                {"ntasks": 1, "cpus_per_task": 3 + graders},
            )
            for every, benchmark, grader, graders in (
                (1, "math500", "gsm8k", 2),
                (0, "math500", "gsm8k", 0),
                (1, "svamp", "math", 0),
                (1, "gsm8k=rows.jsonl", "math", 0),
                (1, "rows.jsonl", "math", 2),
                (1, "aime24.jsonl", "gsm8k", 2),
                (1, "mine=math500.jsonl", "gsm8k", 0),
            )
        ),
        ({"engine.threads": 3}, {"cpus_per_task": "8"}, {"ntasks": 1, "cpus_per_task": "8"}),
        ({"engine.device": "cuda"}, {}, {"ntasks": 1, "cpus_per_task": 1, "gres": "gpu:1"}),
        (
            {"engine.device": "cuda", "engine.sampler": "vllm", "engine.vllm.tensor_parallel": 4},
            {},
            {"ntasks": 1, "cpus_per_task": 1, "gres": "gpu:4"},
        ),
        ({"engine.device": "cuda"}, {"ntasks": "2"}, {"ntasks": "2", "cpus_per_task": 1, "gres": "gpu:2"}),
        (
            {"engine.device": "cuda"},
            {"nodes": "2", "ntasks_per_node": "8"},
            {"nodes": "2", "ntasks_per_node": "8", "cpus_per_task": 1, "gres": "gpu:8"},
        ),
        (
            {"engine.device": "cuda"},
            {"nodes": "3", "ntasks": 7},
            {"nodes": "3", "ntasks": 7, "cpus_per_task": 1, "gres": "gpu:3"},
        ),
        *(
            ({"engine.device": "cuda"}, {key: value}, {"ntasks": 1, "cpus_per_task": 1, key: value})
            for key, value in {"gres": "gpu:a100:2", "gpus": "2", "gpus_per_node": "2", "gpus_per_task": "2"}.items()
        ),
    ],
)
def test_resources_follow_from_the_spec_where_they_are_not_given(
    overrides: dict[str, Any], options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    assert resources([load_spec("tiny", overrides)], options) == chosen


def test_a_job_of_an_array_has_what_its_hungriest_run_needs() -> None:
    specs = [
        load_spec("tiny", {"engine.threads": 5}),
        load_spec("tiny", {"engine.device": "cuda"}),
        load_spec("tiny", {"engine.device": "cuda", "engine.sampler": "vllm", "engine.vllm.tensor_parallel": 2}),
    ]
    assert resources(specs, {}) == {"ntasks": 1, "cpus_per_task": 5, "gres": "gpu:2"}


@pytest.mark.parametrize(
    ("arguments", "lines", "absent"),
    [
        (["--preset", "fig9"], ["--gres=gpu:1", "--ntasks=1", "--cpus-per-task="], []),
        (["--preset", "fig9", "--slurm", "gpus-per-node=h100:2"], ["--gpus-per-node=h100:2"], ["--gres"]),
        (["--preset", "tiny", "--set", "engine.threads=2"], ["--cpus-per-task=2"], ["--gres"]),
        (["--spec", "sweep.toml"], ["--cpus-per-task=9"], []),
    ],
)
def test_the_printed_script_asks_for_what_the_runs_need(
    tmp_path: Path, arguments: list[str], lines: list[str], absent: list[str]
) -> None:
    (tmp_path / "sweep.toml").write_text("base = ['tiny']\nseeds = 1\n[slurm]\ncpus-per-task = 9\n")
    words = ["sweep", *arguments, "--launcher", "slurm", "--slurm", "time=4:00:00", "--print-script"]
    done = subprocess.run(
        [sys.executable, "-m", "clipctl", *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for line in lines:
        assert sum(f"#SBATCH {line}" in told for told in done.stdout.splitlines()) == 1
    for line in absent:
        assert line not in done.stdout


def test_without_slurm_it_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clipctl", "sweep", "--preset", "tiny", "--launcher", "slurm", "--slurm", "time=9"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PATH": "/nowhere"}
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("clipctl: --launcher slurm: squeue and sbatch are not on the PATH")
    done = subprocess.run(
        [*command[:6], "--slurm", "time=9"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "only with --launcher slurm" in done.stderr) == (2, True)


def test_a_job_that_never_gets_anywhere_is_not_requeued_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for scontrol counts, and the run is interrupted at once every time."""
    tool, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setattr("clipctl.slurm_job.run_child", lambda command, signals: (Preempted.exit_code, "saved"))
    for _ in range(STALLS - 1):
        with pytest.raises(SystemExit):
            SlurmRun()(("train",), tmp_path / "run", "id")
        end = read_end(tmp_path / "run", "id")
        assert end is not None
        assert (end.code, end.message, end.job, end.is_failure) == (Preempted.exit_code, "saved", "12_3", False)
    with pytest.raises(EngineError, match="run: failed with exit code 6"):
        SlurmRun()(("train",), tmp_path / "run", "id")
    end = read_end(tmp_path / "run", "id")
    assert end is not None
    assert end.words == f"exit code 6: {STALLS} attempts in a row made no progress; give a longer --slurm time"
    assert calls.read_text() == "requeue 12_3\n" * (STALLS - 1)
    assert count_stalls(tmp_path / "run", True) == 0
    assert job_id({"SLURM_JOB_ID": "5"}) == "5"


def test_a_run_in_the_queue_is_not_submitted_by_a_sweep_that_shares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for squeue has two of the jobs; the run of one is another sweep's, and a damaged record says nothing."""
    tool = tmp_path / "bin" / "squeue"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '12_0\\n12_1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    sweeps = {name: resolve_sweep(preset_sweep("tiny"), seeds=seeds) for name, seeds in (("s", 3), ("t", 4))}
    for name, sweep in sweeps.items():
        record_sweep(tmp_path, name, sweep, place_members(tmp_path, name, expand(sweep)))
    jobs = tmp_path / "s" / "slurm" / "jobs.json"
    jobs.parent.mkdir()
    jobs.write_text(json.dumps({"tiny-0": "12_0", "tiny-1": "11_1", "tiny-2": "12_1"}))
    placed = place_members(tmp_path, "t", expand(sweeps["t"]))
    assert [place.folder.parent.name for place in placed] == ["s", "s", "s", "t"]
    assert queued_runs(tmp_path / "t", placed) == {"tiny-0": "12_0", "tiny-2": "12_1"}
    jobs.write_text('{"tiny-0": ')
    assert queued_runs(tmp_path / "t", placed) == {}


def test_how_runs_stand_is_read_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = expand(resolve_sweep(preset_sweep("tiny"), seeds=3))
    asked: list[int] = []

    def queued_runs(folder: Path, placed: object) -> dict[str, str]:
        asked.append(1)
        if len(asked) == 1:
            raise EngineError("squeue: Unable to contact slurm controller")
        return {}

    monkeypatch.setattr("clipctl.slurm.queued_runs", queued_runs)
    a_run(tmp_path / "s" / "tiny-0", members[0], "finished", 40)
    said: list[str] = []
    with pytest.raises(
        Preempted, match=r"not in the queue any more and not finished: tiny-1, tiny-2; .* submits them again"
    ):
        wait_for_runs(tmp_path / "s", place_members(tmp_path, "s", members), said.append, 0.1)
    assert said == [
        "squeue: Unable to contact slurm controller; asked again until it answers", "tiny-0: finished, 40/40 rollouts",
    ]  # fmt: skip
    assert len(asked) == 3
    a_run(tmp_path / "s" / "tiny-1", members[1], "failed", 3)
    with pytest.raises(SweepFailed, match="1 of 3 runs failed: tiny-1"):
        wait_for_runs(tmp_path / "s", place_members(tmp_path, "s", members), said.append)


def test_a_run_whose_jobs_vanish_is_submitted_again_until_it_is_hopeless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted, never begun or never ended; one job comes a checkpoint further, which lets it be tried anew."""
    monkeypatch.setattr("clipctl.slurm.queued_runs", lambda folder, placed: {})
    placed = place_members(tmp_path, "s", expand(resolve_sweep(preset_sweep("tiny"))))
    folder, name = placed[0].folder, placed[0].member.identity
    said: list[str] = []

    def outcome() -> str:
        with pytest.raises((Preempted, SweepFailed)) as raised:
            wait_for_runs(tmp_path / "s", placed, said.append, 0.1)
        return str(raised.value)

    write_end(folder, next_job(folder, name))
    assert "not finished: tiny-0 (its job vanished); see" in outcome()
    write_end(folder, next_job(folder, name))
    assert "not finished: tiny-0 (its job vanished, 2 in a row); see" in outcome()
    assert queue_lines(placed, {"tiny-0": "7_0"}) == ["tiny-0  0/40 rollouts  job 7_0, after 1 that vanished"]
    write_end(folder, begun_job(folder, name, "7_0"))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("1")
    assert "not finished: tiny-0 (its job vanished, 2 in a row); see" in outcome()
    for count in (3, 4):
        write_end(folder, next_job(folder, name))
        assert f"(its job vanished, {count} in a row)" in outcome()
    write_end(folder, next_job(folder, name))
    assert said == []
    assert outcome() == "1 of 1 runs failed: tiny-0; --retry-failed submits them again"
    assert said == [
        f"tiny-0: failed, 0/40 rollouts: exit code 6: its job vanished {VANISHINGS} times in a row without any progress"
    ]
    assert next_job(folder, name) == End(name, place="1")


def test_a_job_that_begins_again_and_again_and_says_nothing_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm requeues it by itself, as when its node was lost; a stand-in for the run ends as by a kill of the whole job."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr("clipctl.slurm_job.run_child", lambda command, signals: sys.exit(9))
    for _ in range(VANISHINGS):
        with pytest.raises(SystemExit):
            run_job(("train",), tmp_path, "id", Signals())
    with pytest.raises(EngineError, match="its job vanished 3 times in a row without any progress"):
        run_job(("train",), tmp_path, "id", Signals())
    end = read_end(tmp_path, "id")
    assert end is not None
    assert (end.code, end.job) == (6, "12")


@pytest.mark.parametrize(
    ("words", "asked", "code", "message"),
    [
        (["train", "--preset", "nope"], [], 2, "--preset: no preset 'nope'"),
        (["train", "--preset", "tiny", "--set", "model.path=nomodel"], [], 4, "model.path: "),
        (["--version"], [], 0, ""),
    ],
)
def test_how_a_command_ended_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], asked: list[int], code: int, message: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.chdir(tmp_path)
    assert run_job(words, tmp_path / "run", "id", Signals(asked)) == code
    end = read_end(tmp_path / "run", "id")
    assert end is not None
    assert (end.code, end.attempt, end.is_failure) == (code, -1, code != 0)
    assert end.message.startswith(message)


def long_job(folder: Path, stderr: int) -> tuple["subprocess.Popen[bytes]", psutil.Process]:
    """A job, and the run in it, which has begun and would last for hours."""
    words = ["train", "--preset", "tiny", "--name", "run", "--set", "run.steps=4000"]
    program = [sys.executable, "-m", "clipctl.slurm_job", str(folder / "runs" / "run"), "id", *words]
    environment = os.environ | {"SLURM_JOB_ID": "12"}
    job = subprocess.Popen(program, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    wait_until(lambda: (folder / "runs" / "run" / "status.json").exists(), 60)
    (run,) = psutil.Process(job.pid).children()
    return job, run


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True])
def test_a_run_that_is_killed_in_a_job_failed_unless_the_job_was_asked_to_end(tmp_path: Path, asked: bool) -> None:
    """The process that Slurm signals passes signals on: the run saves, or is killed before it can."""
    job, run = long_job(tmp_path, stderr=subprocess.PIPE)
    if asked:
        job.send_signal(signal.SIGUSR2)
    else:
        run.kill()
    _, told = job.communicate(timeout=60)
    assert job.returncode == (75 if asked else 128 + signal.SIGKILL), told
    end = read_end(tmp_path / "runs" / "run", "id")
    assert end is not None
    assert (end.code, end.attempt, end.is_failure) == ((75, 0, False) if asked else (-9, 0, True))
    assert ("stopped by SIGUSR2" in end.message) == asked
    assert end.message.encode() in told
    assert not run.is_running()


@pytest.mark.parametrize(
    ("process", "module"),
    [("clipctl.slurm_job", "subprocess"), ("clipctl.slurm_job", "clipctl.ends"), ("clipctl", "clipctl.launch")],
)
def test_a_signal_while_a_job_starts_is_not_lost(tmp_path: Path, process: str, module: str) -> None:
    """SIGTERM comes while the job, or the `clipctl` that it started, imports this module, and what it raises there is lost, as in
    a finalizer."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, sys, time

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill({"os.getpid()" if process == "clipctl.slurm_job" else "os.getppid()"}, signal.SIGTERM)
                time.sleep(0.5)
            except KeyboardInterrupt:
                pass

if sys.orig_argv[2] == {process!r}:
    sys.modules.pop({module!r}, None)
    sys.meta_path.insert(0, Asked())
"""
    )
    words = ["train", "--preset", "tiny", "--name", "run", "--set", "run.steps=1"]
    program = [sys.executable, "-m", "clipctl.slurm_job", str(tmp_path / "runs" / "run"), "id", *words]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    job = subprocess.run(
        program, cwd=tmp_path, env=os.environ | {"SLURM_JOB_ID": "12", "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert job.returncode == 75, job.stderr
    assert "stopped by SIGTERM" in job.stderr
    end = read_end(tmp_path / "runs" / "run", "id")
    assert end is not None
    assert (end.code, end.is_failure) == (75, False)


@pytest.mark.slow
@pytest.mark.parametrize("run_first", [False, True])
def test_what_ends_a_whole_job_leaves_no_run_and_no_failure(tmp_path: Path, run_first: bool) -> None:
    """A run is not said to have failed where the kernel only came to it before it came to its job."""
    job, run = long_job(tmp_path, stderr=subprocess.DEVNULL)
    if run_first:
        run.kill()
        time.sleep(0.5)
    job.kill()
    job.wait()
    psutil.wait_procs([run], timeout=10)
    assert not run.is_running()
    end = read_end(tmp_path / "runs" / "run", "id")
    assert end is not None
    assert end.is_open


def test_a_job_whose_run_another_one_has_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr("clipctl.slurm_job.CLAIM_SECONDS", 0.6)
    claim = open_claim(tmp_path / "run")
    assert claim is not None
    write_end(tmp_path / "run", closed(End("id"), 75, "saved", 0))
    with pytest.raises(SpecError, match="run is being run by another job or sweep"):
        run_job(["--version"], tmp_path / "run", "id", Signals())
    end = read_end(tmp_path / "run", "id")
    assert end is not None
    assert end.message == "saved"
    claim.close()
    assert run_job(["--version"], tmp_path / "run", "id", Signals()) == 0


def test_jobs_that_were_printed_are_known_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for squeue has them waiting, and others' jobs whose names are like ours."""
    sweep = resolve_sweep(preset_sweep("tiny"), seeds=3)
    placed = place_members(tmp_path, "s", expand(sweep))
    folder = record_sweep(tmp_path, "s", sweep, placed)
    script = print_script(folder, placed, 3, {"time": "9", "job_name": "my own"}, retry_failed=False)
    (name,) = (
        line.split("=", 1)[1].strip("'") for line in script.splitlines() if line.startswith("#SBATCH --job-name")
    )
    assert name.startswith("my own.")
    tool = tmp_path / "bin" / "squeue"
    tool.parent.mkdir()
    tool.write_text(
        f"#!/bin/sh\nprintf '12_0 {name}\\n12_2 {name}\\n12_9 {name}\\n13_1 s.0123456789ab\\n14 x\\n15\\n'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert queued_runs(folder, placed) == {"tiny-0": "12_0", "tiny-2": "12_2"}
    one = place_members(tmp_path, "s", expand(sweep)[1:2])
    alone = name_array(folder, one, {})
    assert alone.startswith("s.")
    tool.write_text(f"#!/bin/sh\nprintf '2 {alone}\\n'\n")
    assert queued_runs(folder, placed) == {"tiny-1": "2"}
    tool.write_text(f"#!/bin/sh\nprintf '12_0 {name}\\n12_2 {name}\\n'\n")
    other = resolve_sweep(preset_sweep("tiny"), seeds=4)
    shared = place_members(tmp_path, "t", expand(other))
    assert queued_runs(record_sweep(tmp_path, "t", other, shared), shared) == {"tiny-0": "12_0", "tiny-2": "12_2"}


@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_under_an_earlier_shorter_name_is_known_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    """A value beside it that rounds to the same name makes the run's own one longer, which moves no folder. Stand-ins for
    Slurm's commands take the array and have it waiting."""
    pytest.importorskip("submitit")
    values = [0.1234567, 0.1234568]
    sweeps = [resolve_sweep(preset_sweep("tiny"), grid={"clip.low": values[:count]}, seeds=1) for count in (1, 2)]
    first, both = (expand(sweep) for sweep in sweeps)
    folder = record_sweep(tmp_path, "s", sweeps[0], place_members(tmp_path, "s", first))
    placed = place_members(tmp_path, "s", both)
    assert [place.folder.name for place in placed] == [first[0].name, both[1].name]
    assert both[0].name != first[0].name
    record_sweep(tmp_path, "s", sweeps[1], placed)
    tools, waiting, calls = tmp_path / "bin", tmp_path / "waiting", tmp_path / "calls"
    tools.mkdir()
    waiting.write_text("")
    for tool, does in {
        "squeue": f"cat {waiting}", "sbatch": f"echo >> {calls}; echo Submitted batch job 101", "srun": ":",
    }.items():  # fmt: skip
        (tools / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    jobs = {both[0].name: "101_0", both[1].name: "101_1"}
    assert submit(folder, placed, 2, {"time": "9"}, retry_failed=False) == jobs
    waiting.write_text(f"101_0 {name_array(folder, placed, {})}\n101_1 {name_array(folder, placed, {})}\n")
    if by_name:
        (folder / "slurm" / "jobs.json").unlink()
    else:
        waiting.write_text("101_0\n101_1\n")
    for _ in range(VANISHINGS):
        assert submit(folder, placed, 2, {"time": "9"}, retry_failed=False) == jobs
    assert calls.read_text() == "\n"
    # A sweep beside it that submits this run names the folder where it lies.
    other = resolve_sweep(preset_sweep("tiny"), grid={"clip.low": values}, seeds=1)
    shared = place_members(tmp_path, "t", expand(other))
    beside = record_sweep(tmp_path, "t", other, shared)
    waiting.write_text("")
    (folder / "slurm" / "jobs.json").unlink(missing_ok=True)
    assert submit(beside, shared, 2, {"time": "9"}, retry_failed=False) == jobs
    waiting.write_text("101_0\n101_1\n")
    assert queued_runs(folder, placed) == queued_runs(beside, shared) == jobs


def test_all_of_these_tests_are_in_one_process(request: pytest.FixtureRequest) -> None:
    """Two at once would start and stop one another's Slurm."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@slurm")


# --- with a real one --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which a Slurm of one node can be talked to; two cores, partition `hi` preempts `main`."""
    lacking = [
        tool
        for tool in ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch")
        if shutil.which(tool) is None
    ]
    if lacking:
        pytest.skip(f"Slurm is not installed: no {', '.join(lacking)}")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one machine is started by root")
    if not TOOLS.is_dir():
        pytest.skip(f"no script that starts it at {TOOLS}")
    pytest.importorskip("submitit")
    # It has fixed ports: of two test processes the second waits.
    with (Path(tempfile.gettempdir()) / "clipctl-tests-slurm.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Not among pytest's folders, which another pytest that starts closes to the database's user.
        with tempfile.TemporaryDirectory(prefix="clipctl-slurm-") as folder:
            yield from a_slurm(Path(folder))


def a_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Up, and down in the end."""
    # nproc, which the script asks for the number of cores, believes OMP_NUM_THREADS.
    plain = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    words = ["bash", str(TOOLS / "slurm_up.sh"), str(folder)]
    started = subprocess.run(words, env=plain, capture_output=True, text=True, timeout=120, check=False)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        here = str(Path(__file__).parent)
        yield os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "REWARD_SECONDS": "0.1",
            "PYTHONPATH": f"{Path(here).parent}:{here}",
        }  # fmt: skip
    finally:
        files = [*folder.glob("*.pid"), folder / "db" / "pid", Path("/run/munge/munged.pid")]
        numbers = [int(file.read_text()) for file in files if file.exists()]
        parts = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
        subprocess.run(
            ["bash", str(TOOLS / "slurm_down.sh"), str(folder)], capture_output=True, check=False, timeout=60
        )
        # One that is started while these still end takes them for its own.
        psutil.wait_procs(parts, timeout=30)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that are never interrupted, without any waiting."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        for seed in (0, 1):
            train(load_spec("tiny", SPEC | {"run.seed": seed, "run.name": f"tiny-{seed}"}), runs_dir=folder)
    return folder


def clipctl(slurm: dict[str, str], folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "clipctl", "sweep", "--preset", "tiny", "--name", "s", "--launcher", "slurm", *arguments],
        cwd=folder, env=slurm, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip


def queue(slurm: dict[str, str]) -> list[str]:
    asked = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], env=slurm, capture_output=True, text=True, check=True)
    return asked.stdout.splitlines()


def wait_until(done: Any, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it never comes"
        time.sleep(0.2)


def rollouts(run: Path) -> int:
    return int(status(run)["rollouts"]) if (run / "status.json").exists() else 0


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def preempt(slurm: dict[str, str]) -> None:
    """A job that takes every core for a second."""
    words = ["sbatch", "-p", "hi", "--exclusive", "--time=1", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(words, env=slurm, check=True, capture_output=True)


@pytest.mark.slurm
@pytest.mark.slow
def test_preempted_jobs_end_as_undisturbed_runs(tmp_path: Path, slurm: dict[str, str], undisturbed: Path) -> None:
    """Submitted as an array, twice in a row, which submits nothing twice; preempted for real."""
    first = clipctl(slurm, tmp_path, *TWO_RUNS)
    assert first.returncode == 0, first.stderr
    jobs = [line.split()[-1] for line in first.stderr.splitlines() if " job " in line]
    assert [job.split("_")[1] for job in jobs] == ["0", "1"]
    folder = tmp_path / "runs" / "s"
    wait_until(lambda: any(2 <= rollouts(folder / f"tiny-{seed}") < 7 for seed in (0, 1)))
    preempt(slurm)
    again = clipctl(slurm, tmp_path, *TWO_RUNS, "--wait")
    assert again.returncode == 0, again.stderr
    assert all(job in again.stderr for job in jobs)
    runs = [status(folder / f"tiny-{seed}") for seed in (0, 1)]
    assert [run["state"] for run in runs] == ["finished", "finished"]
    assert max(run["attempt"] for run in runs) >= 1, "nothing was interrupted"
    for seed in (0, 1):
        assert_same(folder / f"tiny-{seed}", undisturbed / f"tiny-{seed}", 9)
    assert list(folder.glob("slurm/*_submission.sh")) == [folder / "slurm" / f"{jobs[0].split('_')[0]}_submission.sh"]
    assert "".join(file.read_text() for file in folder.glob("slurm/*.out")).count("stopped by SIGUSR2") >= 1


@pytest.mark.slurm
@pytest.mark.slow
def test_two_sweeps_that_share_runs_submit_each_once(tmp_path: Path, slurm: dict[str, str]) -> None:
    """At the same moment: two of the four runs are in both, and each sweep waits until all of its own have ended."""
    options = ("--launcher", "slurm", "--slurm", "time=9", "--slurm", "partition=main", "--slurm", "cpus-per-task=1")
    sets = (*SETS, "--set", "run.steps=2")
    sweeps = {"s": "clip.low=0.1,0.2,0.3", "t": "clip.low=0.2,0.3,0.4"}
    launches = [
        subprocess.Popen(
            [sys.executable, "-m", "clipctl", "sweep", "--preset", "tiny", "--name", name, "--grid", grid, *sets, *options,
             "--wait"], cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, grid in sweeps.items()
    ]  # fmt: skip
    ends = [launch.communicate(timeout=300) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], ends
    runs_dir = tmp_path / "runs"
    for name, lows in {"s": (0.1, 0.2, 0.3), "t": (0.2, 0.3, 0.4)}.items():
        runs = [status(runs_dir / name / f"low{low}-0") for low in lows]
        assert [(run["state"], run["rollouts"], run["attempt"]) for run in runs] == [("finished", 2, 0)] * 3
    made = [folder for folder in sorted(runs_dir.glob("?/low*")) if not folder.is_symlink()]
    assert [folder.name for folder in made] == ["low0.1-0", "low0.2-0", "low0.3-0", "low0.4-0"]
    # Both shared ones lie in the sweep that came first, which alone submitted them.
    assert len({folder.parent for folder in made[1:3]}) == 1
    submitted = [json.loads(file.read_text()) for file in sorted(runs_dir.glob("?/slurm/jobs.json"))]
    assert sorted(name for jobs in submitted for name in jobs) == [folder.name for folder in made]
    assert len(list(runs_dir.glob("?/slurm/*_log.out"))) == 4


@pytest.mark.slurm
@pytest.mark.slow
def test_the_end_of_a_jobs_time_is_not_the_end_of_a_run(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Two minutes of a job are too short for the run, which goes on in the next job to the same end."""
    steps = ["--set", "run.steps=75"]
    first = clipctl(slurm, tmp_path, *SETS, *steps, "--slurm", "time=2", "--slurm", "cpus-per-task=1", "--wait")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "s" / "tiny-0"
    assert status(run)["state"] == "finished"
    assert status(run)["attempt"] >= 1, "the time was enough"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        alone = train(load_spec("tiny", SPEC | {"run.steps": 75, "run.name": "alone"}), runs_dir=tmp_path)
    assert_same(run, alone, 75)


@pytest.mark.slurm
@pytest.mark.slow
def test_the_printed_script_runs_and_requeues(tmp_path: Path, slurm: dict[str, str], undisturbed: Path) -> None:
    printed = clipctl(slurm, tmp_path, *TWO_RUNS, "--print-script")
    assert printed.returncode == 0, printed.stderr
    assert queue(slurm) == []
    subprocess.run(["sbatch"], input=printed.stdout, text=True, env=slurm, check=True, capture_output=True)
    folder = tmp_path / "runs" / "s"
    wait_until(lambda: any(2 <= rollouts(folder / f"tiny-{seed}") < 7 for seed in (0, 1)))
    preempt(slurm)
    wait_until(lambda: queue(slurm) == [])
    assert max(status(folder / f"tiny-{seed}")["attempt"] for seed in (0, 1)) >= 1, "nothing was interrupted"
    for seed in (0, 1):
        assert_same(folder / f"tiny-{seed}", undisturbed / f"tiny-{seed}", 9)


@pytest.mark.slurm
@pytest.mark.slow
def test_the_tasks_of_a_job_are_the_processes_of_its_run(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Two of them, both of which get SIGTERM, as where Slurm has no `preempt_send_user_signal`; one speaks for the job."""
    if os.cpu_count() == 1:
        pytest.skip("a job of two tasks needs two cores")
    arguments = (*SETS, "--slurm", "time=9", "--slurm", "ntasks=2", "--slurm", "partition=main")
    first = clipctl(slurm, tmp_path, *arguments)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "s" / "tiny-0"
    wait_until(lambda: rollouts(run) >= 2)
    subprocess.run(["scancel", "--signal=TERM", first.stderr.split()[-1]], env=slurm, check=True)
    done = clipctl(slurm, tmp_path, *arguments, "--wait")
    assert done.returncode == 0, done.stderr
    assert (status(run)["state"], status(run)["rollouts"]) == ("finished", 9)
    assert status(run)["attempt"] >= 1
    said = "".join(file.read_text() for file in (tmp_path / "runs" / "s" / "slurm").glob("*.out"))
    assert "stopped by SIGTERM; " in said


@pytest.mark.slurm
@pytest.mark.slow
def test_a_run_that_fails_in_a_job_costs_itself_alone(tmp_path: Path, slurm: dict[str, str]) -> None:
    sets = [word for key, value in SPEC.items() if key != "optim.lr" for word in ("--set", f"{key}={value}")]
    arguments = (
        *sets,
        "--set",
        "run.steps=2",
        "--grid",
        "optim.lr=1e-3,1e38",
        "--jobs",
        "2",
        "--slurm",
        "time=9",
        "--wait",
    )
    done = clipctl(slurm, tmp_path, *arguments)
    assert done.returncode == 9, done.stderr
    assert done.stderr.splitlines()[-1] == "clipctl: 1 of 2 runs failed: lr1e38-0; --retry-failed submits them again"


@pytest.mark.slurm
@pytest.mark.slow
def test_a_run_that_fails_in_a_job_before_it_has_a_status_is_a_failed_one(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    """An unknown task leaves no status.json. It is submitted again with --retry-failed alone."""
    failing = (
        "--grid", "data.task=arith,nope", "--set", "run.steps=1", "--slurm", "time=3", "--slurm", "partition=main", "--wait",
    )  # fmt: skip
    done = clipctl(slurm, tmp_path, *failing)
    assert done.returncode == 9, done.stderr
    assert "\ntasknope-0: failed, 0/1 rollouts: exit code 2: data.task: " in done.stderr
    assert done.stderr.splitlines()[-1] == "clipctl: 1 of 2 runs failed: tasknope-0; --retry-failed submits them again"
    jobs = tmp_path / "runs" / "s" / "slurm" / "jobs.json"
    before = jobs.read_text()
    again = clipctl(slurm, tmp_path, *failing)
    assert (again.returncode, jobs.read_text()) == (9, before), again.stderr
    tried = clipctl(slurm, tmp_path, *failing, "--retry-failed")
    assert tried.returncode == 9, tried.stderr
    assert json.loads(jobs.read_text())["tasknope-0"] != json.loads(before)["tasknope-0"]


@pytest.mark.slurm
@pytest.mark.slow
def test_a_run_that_is_killed_in_a_job_is_a_failed_one(tmp_path: Path, slurm: dict[str, str]) -> None:
    """And one whose job is cancelled before it began is not."""
    sets = (*SETS, "--seeds", "2", "--jobs", "1", "--slurm", "time=9", "--slurm", "partition=main")
    first = clipctl(slurm, tmp_path, *sets)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "s"
    jobs = json.loads((folder / "slurm" / "jobs.json").read_text())
    wait_until(lambda: rollouts(folder / "tiny-0") >= 1)
    subprocess.run(["scancel", jobs["tiny-1"]], env=slurm, check=True)
    psutil.Process(status(folder / "tiny-0")["pid"]).kill()
    # A wait that submits nothing.
    wait_until(lambda: queue(slurm) == [])
    end = read_end(folder / "tiny-0", place_of(tmp_path, "tiny-0"))
    assert end is not None
    assert end.code == -signal.SIGKILL
    again = clipctl(slurm, tmp_path, *sets, "--wait")
    assert again.returncode == 9, again.stderr
    assert "tiny-0: failed, " in again.stderr
    assert "killed by SIGKILL: " in again.stderr
    assert again.stderr.splitlines()[-1] == "clipctl: 1 of 2 runs failed: tiny-0; --retry-failed submits them again"
    assert ", after 1 that vanished" in again.stderr
    assert status(folder / "tiny-1")["state"] == "finished"
    tried = clipctl(slurm, tmp_path, *sets, "--wait", "--retry-failed")
    assert tried.returncode == 0, tried.stderr
    assert (status(folder / "tiny-0")["state"], status(folder / "tiny-0")["attempt"]) == ("finished", 1)


def place_of(folder: Path, name: str) -> str:
    """The identity that the sweep's record has for a run."""
    record = json.loads((folder / "runs" / "s" / "sweep.json").read_text())
    return next(str(run["identity"]) for run in record["runs"] if run["name"] == name)


@pytest.mark.slurm
@pytest.mark.slow
def test_jobs_that_were_submitted_by_hand_are_not_submitted_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    """While they wait, and so have written nothing."""
    arguments = (*TWO_RUNS, "--set", "run.steps=2")
    printed = clipctl(slurm, tmp_path, *arguments, "--print-script")
    assert printed.returncode == 0, printed.stderr
    words = ["sbatch", "--parsable", "--hold"]
    job = subprocess.run(
        words, input=printed.stdout, text=True, env=slurm, check=True, capture_output=True
    ).stdout.strip()
    waiting = clipctl(slurm, tmp_path, *arguments)
    assert waiting.returncode == 0, waiting.stderr
    assert [line.split()[-1] for line in waiting.stderr.splitlines()] == [f"{job}_0", f"{job}_1"]
    assert {line.split("_")[0] for line in queue(slurm)} == {job}
    subprocess.run(["scontrol", "release", job], env=slurm, check=True)
    done = clipctl(slurm, tmp_path, *arguments, "--wait")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "s"
    assert [(status(run)["state"], status(run)["attempt"]) for run in sorted(folder.glob("tiny-?"))] == [
        ("finished", 0)
    ] * 2
    assert not (folder / "slurm" / "jobs.json").exists()
