"""A run's processes watch each other: one that dies, fails or stops answering ends all of them, with the reason.

Each process tells the store of rank 0 every BEAT_SECONDS that it lives, and reads what the others told. A process of the same
machine that is gone is noticed at the next beat, one that says nothing after LOST_SECONDS, a store that is gone means that
rank 0 is. The main thread then gets the error as if by a signal; where it waits for a collective operation that nobody will
finish, this thread ends the process.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl import errors
from clipctl.errors import ClipctlError, EngineError, first_line
from clipctl.interrupts import StopRequests
from clipctl.rendezvous import Seat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 1.0
LOST_SECONDS = 40.0
"""Without a beat after which a process counts as lost."""
PATIENCE = 2.0
"""Seconds in which a process whose peer failed may find out by itself, as all do when an update is not finite."""
LINGER_SECONDS = 20.0
"""How long rank 0 waits at its end for the others, who read from its store why; and a process that is stuck, for rank 0."""
WRITING_SECONDS = 600.0
"""How long the others wait for rank 0 to write the end of a run that failed or was interrupted."""
STUCK_SECONDS = 2.0
"""In a collective operation after which a process that must end is ended; elsewhere it has LOST_SECONDS."""


class Heartbeat:
    """Of this process, in a thread of its own, over a connection of its own to the store. `working` and `waiting` are the main
    thread's: it does what others may end; it waits in a collective operation."""

    def __init__(self, store: "Store", seat: Seat, stop: StopRequests) -> None:
        self.store, self.seat, self.stop = store, seat, stop
        self.working = True
        self.waiting = False
        self.failure: ClipctlError | None = None
        self.found = threading.Event()
        self.lost: set[int] = set()
        self.on_end: Callable[[ClipctlError], None] = lambda failure: None
        """Called before the process is ended from here."""
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space()}
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._tell()

    def start(self) -> None:
        """Once every process has told that it lives."""
        self._seen = {rank: (beat, time.monotonic()) for rank, beat in self._others().items()}
        self._thread.start()

    def announce(self, error: BaseException) -> bool:
        """Tells the others why this process ends; whether the store of rank 0 still heard it."""
        kind = type(error).__name__ if isinstance(error, ClipctlError) else "ClipctlError"
        line = str(error) if isinstance(error, ClipctlError) else f"a bug in clipctl: {type(error).__name__}: {error}"
        told = {"rank": self.seat.rank, "host": self._me["host"], "kind": kind, "line": line, "lost": sorted(self.lost)}
        try:
            self.store.compare_set("error", "", json.dumps(told))
        except RuntimeError:
            return False
        return True

    def leave(self, *, failed: bool) -> None:
        """Ends the watch. Rank 0, whose store the others need, waits until those that live have left. After a failure the others
        wait for rank 0, which writes: whoever started them kills all when the first one fails (`srun --kill-on-bad-exit`)."""
        self.working = False
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        if failed or self.seat.rank == 0:
            self._leave(LINGER_SECONDS if self.seat.rank == 0 else WRITING_SECONDS)
        else:
            self._leave(0.0)

    def _leave(self, seconds: float) -> None:
        with suppress(RuntimeError):
            self._tell(left=True)
            end = time.monotonic() + seconds
            awaited = [0] if self.seat.rank else range(1, self.seat.size)
            while time.monotonic() < end and not self._have_left(awaited):
                time.sleep(0.05)

    def cause(self, error: RuntimeError) -> ClipctlError:
        """Why a collective operation failed: what the watch finds out, or else the first line of its error."""
        self.found.wait(LOST_SECONDS + 5)
        said = first_line(error)
        return self.failure or EngineError(f"the processes of the run lost each other: {said}")

    def _run(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            try:
                self._tell()
                failure = self._look()
            except RuntimeError as error:
                failure = None if self._closing.is_set() else self._without_store(error)
            if failure is not None:
                self._end(failure)
                return

    def _tell(self, *, left: bool = False) -> None:
        self._beats += 1
        request = [self.stop.reason, self.stop.by_hand] if self.stop.reason else None
        beat = self._me | {"beat": self._beats, "left": left, "stop": request}
        self.store.set(f"beat/{self.seat.rank}", json.dumps(beat))

    def _others(self) -> dict[int, str]:
        ranks = [rank for rank in range(self.seat.size) if rank != self.seat.rank]
        found = self.store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: beat.decode() for rank, beat in zip(ranks, found, strict=True)}

    def _have_left(self, awaited: Iterable[int]) -> bool:
        beats = {rank: json.loads(beat) for rank, beat in self._others().items()}
        return all(beats[rank]["left"] or rank in self.lost or self._is_gone(beats[rank]) for rank in awaited)

    def _is_gone(self, beat: dict[str, Any]) -> bool:
        """Whether a process of this machine has ended."""
        return bool(beat["space"] == self._me["space"] and _has_ended(beat["pid"]))

    def _look(self) -> ClipctlError | None:
        """What the others told. A request to stop becomes one of this process."""
        if self.store.check(["error"]):
            told = json.loads(self.store.get("error"))
            self.lost |= set(told["lost"])
            return _rebuilt(told)
        now = time.monotonic()
        for rank, text in self._others().items():
            beat = json.loads(text)
            before, since = self._seen.get(rank, ("", now))
            self._seen[rank] = (text, now if text != before else since)
            if beat["left"]:
                continue
            if beat["stop"]:
                self.stop.ask(*beat["stop"])
            gone = self._is_gone(beat)
            if gone or now - self._seen[rank][1] > LOST_SECONDS:
                self.lost.add(rank)
                why = "is gone: it was killed, or crashed" if gone else f"has said nothing for {LOST_SECONDS:.0f} s"
                lost = EngineError(f"rank {rank} (process {beat['pid']} on {beat['host']}) {why}; the run was ended")
                self.announce(lost)
                return lost
        return None

    def _without_store(self, error: RuntimeError) -> ClipctlError:
        text = self._seen.get(0, ("{}", 0.0))[0]
        beat: dict[str, Any] = json.loads(text or "{}")
        where = f" (process {beat['pid']} on {beat['host']})" if beat else ""
        said = first_line(error)
        self.lost.add(0)
        if self.seat.rank == 0:
            return EngineError(f"the store of the run's processes does not answer: {said}")
        failure = EngineError(f"rank 0{where} is gone: it was killed, crashed, or cannot be reached; the run was ended")
        # Nobody else can say it; one process of each machine does.
        failure.told = not (self.seat.rank == 1 or self.seat.local_rank == 0)
        return failure

    def _end(self, failure: ClipctlError) -> None:
        """Ends the main thread's work: it has time to find out by itself, then gets the error, then the process ends."""
        if 0 not in self.lost:
            failure.told = self.seat.rank != 0
        self.failure = failure
        self.found.set()
        if self._closing.wait(PATIENCE) or not self.working:
            return
        self.stop.fail(failure)
        stuck, start = 0.0, time.monotonic()
        while self.working and stuck < STUCK_SECONDS and time.monotonic() - start < LOST_SECONDS:
            time.sleep(0.1)
            stuck = stuck + 0.1 if self.waiting else 0.0
        if self.working:
            with suppress(ClipctlError):
                self.on_end(failure)
            self._leave(LINGER_SECONDS)
            if not failure.told:
                print(f"clipctl: {failure}", file=sys.stderr, flush=True)
            os._exit(failure.exit_code)


def _rebuilt(told: dict[str, Any]) -> ClipctlError:
    """The error that another rank announced: its own, or that a third one is lost."""
    kind, own = getattr(errors, told["kind"]), told["rank"] and not told["lost"]
    found: ClipctlError = kind(f"rank {told['rank']} on {told['host']}: {told['line']}" if own else told["line"])
    return found


def _process_space() -> str:
    """Names the kernel and the namespace in which process numbers mean something; empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def _has_ended(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
