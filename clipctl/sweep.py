"""`clipctl sweep` on one machine: so many runs at once, each a process, what is missing and no more; survives what its runs do.

A run is claimed before its process starts. So two launches of one sweep, or of two that share runs, work side by side: each
takes what nobody has, and stays until the last run has ended, to take over those of a launch that was killed.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import IO

from clipctl.ends import HARMLESS, INTERRUPTED, End, closed, forget_end, write_end
from clipctl.errors import Interrupted, Preempted, StoreError, SweepFailed
from clipctl.fork_server import ForkServer
from clipctl.interrupts import StopNow, StopRequests, catch_signals, job_end
from clipctl.shares import Share
from clipctl.sweep_folder import Placed, is_left, is_running, open_claim, retry_hint

LOOK_SECONDS = 0.5
"""Between two looks at runs that another launch runs, and two drawings."""
REACTION_SECONDS = 0.05
"""Until a signal is passed on. A scheduler may signal the runs as well: what comes to them at once is one request."""
DYING_SECONDS = 10.0
"""How much longer than its grace time a run may take to end."""
NO_SPACE = (os.strerror(ENOSPC), os.strerror(EDQUOT))
"""What a full disk and a spent quota are called."""
Tell = Callable[[str], None]


@dataclass(slots=True)
class Progress:
    """What this launch did. ended: run → exit code, None of those that had ended before."""

    total: int
    ended: dict[str, int | None] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    @property
    def failed(self) -> list[str]:
        return [name for name, code in self.ended.items() if code not in (None, *HARMLESS)]

    @property
    def interrupted(self) -> list[str]:
        return [name for name, code in self.ended.items() if code in INTERRUPTED]

    @property
    def words(self) -> str:
        """`3 of 12 runs ended, 2 running, 7 waiting`."""
        counts = {
            "running": len(self.running),
            "interrupted": len(self.interrupted),
            "failed": len(self.failed),
            "waiting": self.total - len(self.ended) - len(self.running),
        }
        ended = len(self.ended) - counts["interrupted"] - counts["failed"]
        return ", ".join([f"{ended} of {self.total} runs ended", *(f"{n} {what}" for what, n in counts.items() if n)])


FAILED_BEFORE = 1
"""Stands for the exit code of a run that failed in an earlier launch."""


def run_sweep(
    folder: Path,
    placed: Sequence[Placed],
    shares: Sequence[Share],
    *,
    retry_failed: bool,
    nproc: int | None = None,
    tell: Tell,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Runs what is left to do of the sweep in `folder`, as many at once as there are shares. nproc: processes of each run,
    none: it is one. tell: gets a line for each start and end. watch: called about twice a second.

    Raises SweepFailed when some runs failed, in this launch or before, after all others have ended; StoreError when one found
    the disk full, after those beside it have ended: no other one is started; Preempted or Interrupted when a signal, or the end
    of a Slurm job, stopped it, after the runs have saved and ended.
    """
    longest = max(place.member.spec.checkpoint.grace for place in placed)
    margin = max(place.member.spec.checkpoint.margin for place in placed)
    with catch_signals() as stop:
        stop.grace = longest + DYING_SECONDS
        if (end := job_end()) is not None:
            stop.end_with_job(end, margin)
        more = () if nproc is None else ("--nproc", str(nproc))
        launch = _Launch(folder, list(placed), list(shares), more, retry_failed, tell)
        try:
            launch.run(stop, watch)
        finally:
            launch.close()
    progress = launch.progress
    if stop.reason:
        raise stop.error(f"{progress.words}; the same command goes on")
    if launch.full:
        raise StoreError(
            f"{folder}: no space is left on the disk ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free) for "
            f"{', '.join(launch.full)}; {progress.words}; free some, then the same command with --retry-failed goes on"
        )
    if progress.failed:
        names = ", ".join(progress.failed)
        again = "the same command goes on with those that crashed"
        hint = again if launch.crashed else retry_hint(placed, progress.failed, "runs them again")
        raise SweepFailed(
            f"{len(progress.failed)} of {progress.total} runs failed: {names}; see {folder / 'logs'}; {hint}"
        )
    if progress.interrupted:
        raise Preempted(f"interrupted: {', '.join(progress.interrupted)}; the same command goes on with them")
    return progress


@dataclass(slots=True)
class _Running:
    place: Placed
    share: Share
    claim: IO[str]
    said: int
    """Bytes of its log before it was started."""
    began: float


class _Launch:
    """The loop: claims, starts, reaps."""

    def __init__(
        self,
        folder: Path,
        placed: list[Placed],
        shares: list[Share],
        more: tuple[str, ...],
        retry_failed: bool,
        tell: Tell,
    ) -> None:
        self.folder, self.waiting, self.free, self.more = folder, placed, shares, more
        self.tell = tell
        # What fails while this launch waits for it was tried again already.
        self.again = {
            place.member.name: (place.attempt, place.failure)
            for place in placed
            if retry_failed and place.outlook == "failed"
        }
        self.progress = Progress(len(placed))
        self.crashed, self.stopping = False, False
        self.full: list[str] = []
        """Runs that found no space on the disk; no other one is started then."""
        self._server = ForkServer(folder / "logs" / "server.txt", gpus=any(share.gpus is not None for share in shares))
        self._running: dict[int, _Running] = {}
        self._count = 0

    def run(self, stop: StopRequests, watch: Callable[[Progress], None]) -> None:
        """Until all runs have ended, or, after a request to stop, those that this launch runs."""
        try:
            while self._is_on and not stop.reason:
                self._start()
                until = time.monotonic() + LOOK_SECONDS
                while self._is_on and time.monotonic() < until and not stop.reason:
                    if self._reap(REACTION_SECONDS):
                        break
                watch(self.progress)
            self._end_all(stop, watch)
        except StopNow:
            # A second request, or the grace time is over: the runs stop at once as well.
            self._server.signal(SIGINT if stop.by_hand else SIGTERM)
            until = time.monotonic() + DYING_SECONDS / 2
            while self._running and time.monotonic() < until:
                self._reap(0.2)

    @property
    def _is_on(self) -> bool:
        """Whether a run is running, or one that waits may be started."""
        return bool(self._running or (self.waiting and not self.full))

    def close(self) -> None:
        """Ends what still runs; the runs are given back."""
        self._server.close()
        for running in self._running.values():
            running.claim.close()

    def _end_all(self, stop: StopRequests, watch: Callable[[Progress], None]) -> None:
        self.stopping = True
        if self._running:
            self.tell(f"{stop.reason}: {len(self._running)} runs save and stop")
            self._server.signal(SIGINT if stop.by_hand else SIGTERM)
        while self._running:
            self._reap(0.2)
            watch(self.progress)

    def _start(self) -> None:
        """Starts as many as there are free shares."""
        for place in list(self.waiting):
            if self.free and not self.full:
                self._look_at(place)

    def _look_at(self, place: Placed) -> None:
        if self._is_done(place):
            return
        claim = None
        try:
            # The log's folder first, but not before there is something to run: readers name an empty folder.
            said = _make_log(self._log(place))
            claim = open_claim(place.folder)
            if claim is None:
                return
            # It may have ended while it was being claimed.
            if self._is_done(place):
                claim.close()
                return
            forget_end(place.folder)
        except StoreError as error:
            if claim is not None:
                claim.close()
            self.waiting.remove(place)
            self._end(place, error.exit_code, str(error))
            self.tell(f"{place.member.name}: failed: {error}")
            return
        self.waiting.remove(place)
        share, began = self.free.pop(0), time.monotonic()
        how = f"goes on from rollout {place.rollouts}" if place.outlook != "missing" else "starts"
        where = f" on GPU {share.environment['CUDA_VISIBLE_DEVICES']}" if share.gpus else ""
        self.tell(f"{place.member.name}: {how}{where}")
        self._count += 1
        self._running[self._count] = _Running(place, share, claim, said, began)
        self.progress.running.add(place.member.name)
        # The sweep passes the end of a Slurm job on; two notices of it would be two requests.
        environment = {**share.environment, "SLURM_JOB_END_TIME": ""}
        self._server.start(self._count, (*place.command, *self.more), self._log(place), share.cores, environment)

    def _is_done(self, place: Placed) -> bool:
        """Whether there is nothing left to do of a run that waits; it is told and counted then."""
        outlook = place.outlook
        if is_left(outlook, self.again.get(place.member.name) == (place.attempt, place.failure)):
            return False
        self.waiting.remove(place)
        self.progress.ended[place.member.name] = FAILED_BEFORE if outlook == "failed" else None
        if outlook == "failed":
            self.tell(f"{place.member.name}: failed before: {place.message}")
        return True

    def _reap(self, seconds: float) -> bool:
        """Whether some ended within so many seconds."""
        if not self._running:
            time.sleep(seconds)
            return False
        before = len(self._running)
        for number, code in self._server.ended(seconds).items():
            running = self._running.pop(number)
            self.free.append(running.share)
            name = running.place.member.name
            self.progress.running.remove(name)
            if code == 2 and is_running(running.place.folder):
                # A process outside of any sweep was faster.
                running.claim.close()
                self.waiting.append(running.place)
                continue
            if self.stopping and code in (-SIGINT, -SIGTERM):
                # Told to stop before it had its handlers, and so before it had anything to save.
                code = Interrupted.exit_code if code == -SIGINT else Preempted.exit_code
            last = _last_line(self._log(running.place), running.said)
            if code == StoreError.exit_code and not last.startswith("clipctl: "):
                # Its last word did not get into the log.
                last = ""
            self._end(running.place, code, last)
            running.claim.close()
            self.tell(f"{name}: {_end_words(running, code, last)}")
        return len(self._running) < before

    def _end(self, place: Placed, code: int, last: str) -> None:
        """Counts a run that ended. last: what it said in the end, empty where its log could not take it."""
        self.crashed |= code < 0
        self.progress.ended[place.member.name] = code
        if code > 0 and code not in HARMLESS:
            # Where the disk is full, so that it cannot be recorded, the next launch finds out again.
            with suppress(StoreError):
                write_end(place.folder, closed(End(place.member.identity), code, last, place.attempt))
        if code == StoreError.exit_code and (not last or any(words in last for words in NO_SPACE)):
            self.full.append(place.member.name)

    def _log(self, place: Placed) -> Path:
        return self.folder / "logs" / f"{place.member.name}.txt"


def _end_words(running: _Running, code: int, last: str) -> str:
    if code == 0:
        return f"finished, {running.place.rollouts} rollouts, {time.monotonic() - running.began:.1f} s"
    how = {8: "stopped", 75: "interrupted", 130: "interrupted"}.get(code, f"failed (exit code {code})")
    if code < 0:
        how = f"crashed (signal {-code})"
    nothing = "it said nothing; logs/server.txt may"
    if code == StoreError.exit_code:
        nothing = "its log could not be written"
    return f"{how}: {last.removeprefix('clipctl: ') or nothing}"


def _make_log(log: Path) -> int:
    """Bytes that are in it."""
    try:
        log.parent.mkdir(exist_ok=True)
        log.touch()
        return log.stat().st_size
    except OSError as error:
        raise StoreError(f"{log}: {error.strerror}") from None


def _last_line(log: Path, start: int) -> str:
    """What follows so many bytes, if the line is whole."""
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""
    return text.splitlines()[-1] if text.endswith("\n") else ""
