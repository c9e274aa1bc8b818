"""A run as a job of Slurm: it requeues itself until the run is finished, and records how its command ended.

    srun ── one a task ── this ── `clipctl train …`

Slurm signals this process, which submitit or a script started. The run, in a process group of its own, gets every signal once,
from here, whether Slurm signals a task alone or all that it started; it dies with this process, by the kernel's parent-death
signal. It saves and exits with 75, upon which the job asks to be requeued. What kills the run alone is seen and recorded here.
"""

import signal

if __name__ == "__main__":
    # What comes while the rest is imported would end this process; it waits for `passed_on`.
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
    )

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from clipctl.ends import VANISHINGS, begun_job, closed, forget_end, gave_up, latest_place, write_end
from clipctl.errors import ClipctlError, EngineError, Preempted, SpecError
from clipctl.grading_worker import die_with
from clipctl.interrupts import SIGNALS
from clipctl.segments import write_whole
from clipctl.sweep_folder import is_running, last_attempt, open_bare_claim

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

STALLED = ".stalled"
STALLS = 5
"""Attempts in a row without progress after which a job is not requeued any more."""
CLAIM_SECONDS = 60.0
"""How long a job waits for the claim of its run, which on shared file systems outlives its holder a little."""
DYING_SECONDS = 3.0
"""After a run was killed, until that is a failure of the run: what ends the whole job ends this process in the meantime."""
TAIL = 4096
"""Bytes of what a run said last that are kept."""


class SlurmRun:
    """What submitit calls: a run as a job."""

    def __call__(self, command: Sequence[str], folder: Path, identity: str) -> None:
        """Runs `clipctl` with these arguments. folder, identity: of the run.

        Raises EngineError where it failed, SystemExit after the job was requeued.
        """
        with passed_on() as signals:
            code = run_job(command, folder, identity, signals)
            if code == Preempted.exit_code and _is_first():
                requeue(os.environ)
        if code == Preempted.exit_code:
            sys.exit(code)
        if code not in (0, 8):
            raise EngineError(f"{folder.name}: failed with exit code {code}")

    def checkpoint(self, command: Sequence[str], folder: Path, identity: str) -> "DelayedSubmission":
        """What submitit requeues where a signal comes before this process answers to it."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self, command, folder, identity)


def main() -> None:
    """`python -m clipctl.slurm_job FOLDER IDENTITY COMMAND…`, of a printed script, which requeues the job after 75."""
    folder, identity, *command = sys.argv[1:]
    with passed_on() as signals:
        try:
            code = run_job(command, Path(folder), identity, signals)
        except ClipctlError as error:
            print(f"clipctl: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
    sys.exit(code if code >= 0 else 128 - code)


@dataclass(slots=True)
class Signals:
    """What this process was sent, and the run that gets it."""

    asked: list[int] = field(default_factory=list)
    run: "subprocess.Popen[bytes] | None" = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        self.asked.append(number)
        if self.run is not None:
            self.run.send_signal(number)


@contextmanager
def passed_on() -> Iterator[Signals]:
    """Within it signals go to the run, also those that were blocked before it."""
    signals = Signals()
    before = {number: signal.signal(number, signals.receive) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_job(command: Sequence[str], folder: Path, identity: str, signals: Signals) -> int:
    """Exit code of the run's command, negative for a signal, recorded by the first task; 6 for one that never gets anywhere.
    Raises SpecError where another process has the run, StoreError where its folder cannot be written."""
    if not _is_first():
        return run_child(command, signals)[0]
    with _claim(folder):
        end = begun_job(folder, identity, job_id(os.environ))
        if end.idle >= VANISHINGS:
            end = gave_up(end, last_attempt(folder))
            write_end(folder, end)
            raise EngineError(f"{folder.name}: {end.message}")
        write_end(folder, end)
        before = latest_place(folder)
        code, last = run_child(command, signals)
        if code == SpecError.exit_code and is_running(folder):
            # By a process without a claim, which speaks for the run.
            forget_end(folder)
            return code
        if code < 0:
            time.sleep(0 if signals.asked else DYING_SECONDS)
            code = Preempted.exit_code if signals.asked else code
        if code == Preempted.exit_code and count_stalls(folder, before != latest_place(folder)) >= STALLS:
            code, last = (
                EngineError.exit_code,
                f"{STALLS} attempts in a row made no progress; give a longer --slurm time",
            )
            print(f"clipctl: {folder.name}: {last}", file=sys.stderr, flush=True)
            (folder / STALLED).unlink(missing_ok=True)
        write_end(folder, closed(end, code, last, last_attempt(folder)))
    return code


def _is_first() -> bool:
    """Whether this task speaks for the job."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


def _claim(folder: Path) -> IO[str]:
    until = time.monotonic() + CLAIM_SECONDS
    while (claim := open_bare_claim(folder)) is None:
        if time.monotonic() > until:
            raise SpecError(f"{folder.name} is being run by another job or sweep")
        time.sleep(0.5)
    return claim


def run_child(command: Sequence[str], signals: Signals) -> tuple[int, str]:
    """Exit code of `clipctl` with these arguments, negative for a signal, and the last line on its stderr."""
    # The signal that was asked for says when the time is nearly over; a second source would be a second request.
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_END_TIME"}
    # The run inherits the mask. A signal waits for the handlers of `catch_signals`; those before them raise in the midst of
    # imports, where an exception may be lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = subprocess.Popen(
        [sys.executable, "-m", "clipctl", *command], env=environment, stderr=subprocess.PIPE, process_group=0,
        preexec_fn=partial(die_with, os.getpid()),
    )  # fmt: skip
    tail = bytearray()
    assert child.stderr is not None
    reader = threading.Thread(target=_copy, args=(child.stderr.fileno(), tail), daemon=True)
    reader.start()
    for number in signals.asked:
        child.send_signal(number)
    signals.run = child
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    code = child.wait()
    signals.run = None
    # A process that the run left behind may keep its end of the pipe open.
    reader.join(5)
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return code, lines[-1] if lines else ""


def _copy(source: int, tail: bytearray) -> None:
    """What comes, to stderr, its end also to the tail; until it ends. The run is not held up where it cannot be written."""
    while piece := os.read(source, 1 << 16):
        tail.extend(piece)
        del tail[:-TAIL]
        with suppress(OSError):
            while piece:
                piece = piece[os.write(2, piece) :]


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


def count_stalls(folder: Path, progress: bool) -> int:
    """Attempts without progress up to this one, kept in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STALLED
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


if __name__ == "__main__":
    main()
