"""Requests to stop: signals, and the end of a job's time.

The first request lets the running update finish; a second one, or the end of the grace time, stops at once. SIGTERM, SIGUSR1,
SIGUSR2 and SIGHUP are what schedulers and closing terminals send, SIGINT is Ctrl-C. Slurm exports the end of a job's time.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from clipctl.errors import ClipctlError, Interrupted, Preempted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_REQUEST_SECONDS = 0.1
"""A signal that follows another one so closely is the same request: timeout(1) signals a process and then its group."""


class StopNow(KeyboardInterrupt):
    """Stop here. Like KeyboardInterrupt, of which it is one, it passes through `except Exception` of other people's code."""


class StopRequests:
    """What was asked for so far. Made by `catch_signals`.

    reason: of the first request, in words, empty while there is none. grace: seconds from it until the run stops at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.by_hand = False
        self.at_once = False
        self.grace = 60.0
        self._last = 0.0
        self._raising = False
        self._rung = ""
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._open = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it a request raises StopNow at once: for work that is simply done again."""
        if self.reason:
            raise StopNow
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def end_with_job(self, end: float, margin: float) -> None:
        """Asks to stop `margin` seconds before the job ends (`end`: seconds since 1970), or, where so little is left, after
        half of what is left: a job that stopped at once would never get anywhere."""
        left = end - time.time()
        self._ring_after(max(left - min(margin, left / 2), 0.0), "the job's time is nearly over")

    def error(self, what: str) -> ClipctlError:
        """The error that ends the command: 130 for Ctrl-C, 75 for what a scheduler asks for. what: became of the run."""
        line = f"stopped {'at once ' if self.at_once else ''}by {self.reason or 'Ctrl-C'}; {what}"
        return Interrupted(line) if self.by_hand or not self.reason else Preempted(line)

    def request(self, number: int, frame: object = None) -> None:
        """The signal handler."""
        rung, self._rung = self._rung, ""
        now, before = time.monotonic(), self._last
        self._last = now
        if not self.reason:
            self.by_hand = number == signal.SIGINT
            self.reason = rung or ("Ctrl-C" if self.by_hand else signal.Signals(number).name)
            self._ring_after(self.grace, "the grace time is over")
            if self._raising:
                raise StopNow
        elif rung or now - before > SAME_REQUEST_SECONDS:
            self.at_once = True
            raise StopNow

    def close(self) -> None:
        """No timer rings any more."""
        with self._lock:
            self._open = False
            for timer in self._timers:
                timer.cancel()

    def _ring_after(self, seconds: float, why: str) -> None:
        timer = threading.Timer(seconds, self._ring, [why])
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _ring(self, why: str) -> None:
        """Runs in a timer's thread; only the main thread can raise in the main thread, so it gets a signal."""
        with self._lock:
            if self._open:
                self._rung = why
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


_current: list[StopRequests] = []


@contextmanager
def catch_signals() -> Iterator[StopRequests]:
    """Takes over the signals until the block ends; within another such block, and in other threads than the main one, which
    cannot have signal handlers, it takes over nothing. A StopNow that leaves the block becomes the error of `error`.

    SIGHUP stays ignored where it was (nohup); SIGINT does not, because shells start background jobs with it ignored.
    """
    if _current:
        yield _current[0]
        return
    stop = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.getsignal(number)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    _current.append(stop)
    try:
        for number in before:
            signal.signal(number, stop.request)
        yield stop
    except KeyboardInterrupt:
        raise stop.error("what was measured is kept") from None
    finally:
        stop.close()
        _current.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler)


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the Slurm job ends that this process belongs to, seconds since 1970; None outside of one, for a job without a
    limit, and where Slurm is too old to say (then `--signal=USR1@120` does the same)."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() and 0 < int(end) < sys.maxsize else None
