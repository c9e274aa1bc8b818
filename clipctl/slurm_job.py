"""A run as a job of Slurm: it requeues itself until the run is finished.

submitit starts it and lets SIGTERM pass, so the run itself answers to it, and to the signal before the time limit, by saving
and exiting with 75, upon which the job asks to be requeued.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipctl.errors import EngineError, Preempted
from clipctl.segments import write_whole

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

STALLS = 5
"""Attempts in a row without progress after which a job is not requeued any more."""


class SlurmRun:
    """What submitit calls: a run as a job."""

    def __call__(self, command: Sequence[str], folder: Path) -> None:
        """Runs `clipctl` with these arguments in this process, which is the one that Slurm signals. folder: of the run.

        Raises EngineError where it failed, SystemExit after the job was requeued.
        """
        # The signal that was asked for says when the time is nearly over; a second source would be a second request.
        os.environ.pop("SLURM_JOB_END_TIME", None)
        before = latest_place(folder)
        code = run_here(command)
        if code == Preempted.exit_code and os.environ.get("SLURM_PROCID", "0") == "0":
            stalled = count_stalls(folder, before != latest_place(folder))
            if stalled >= STALLS:
                raise EngineError(
                    f"{folder.name}: {stalled} attempts in a row made no progress; give a longer --slurm time"
                )
            requeue(os.environ)
        if code == Preempted.exit_code:
            sys.exit(code)
        if code not in (0, 8):
            raise EngineError(f"{folder.name}: failed with exit code {code}")

    def checkpoint(self, command: Sequence[str], folder: Path) -> "DelayedSubmission":
        """What submitit requeues where a signal comes before the run answers to it."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self, command, folder)


def run_here(command: Sequence[str]) -> int:
    """Exit code of `clipctl` with these arguments, in this process."""
    sys.argv = ["clipctl", *command]
    try:
        runpy.run_module("clipctl", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def job_id(environment: Mapping[str, str]) -> str:
    """Of this job, as scontrol takes it."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def requeue(environment: Mapping[str, str]) -> None:
    """Puts this job back into the queue. Raises EngineError where Slurm refuses."""
    done = subprocess.run(["scontrol", "requeue", job_id(environment)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(
            f"job {job_id(environment)} cannot be requeued: {one_line(done.stderr)}; submit the sweep again"
        )


def latest_place(folder: Path) -> str:
    """Name of the newest checkpoint; empty where there is none."""
    try:
        return (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return ""


def count_stalls(folder: Path, progress: bool) -> int:
    """Attempts without progress up to this one, kept in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".stalled"
    before = file.read_text() if file.exists() else ""
    stalled = 0 if progress else int(before or 0) + 1
    write_whole(file, str(stalled).encode())
    return stalled


def one_line(text: str) -> str:
    """What a command of Slurm complains of."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line or "unrecognized" in line),
        lines[-1] if lines else "no reason was given",
    )
