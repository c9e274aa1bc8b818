"""Requests to stop: signals, and the end of a job's time.

The first request lets the running update finish; a second one, or the end of the grace time, stops at once. SIGTERM, SIGUSR1,
SIGUSR2 and SIGHUP are what schedulers and closing terminals send, SIGINT is Ctrl-C. Slurm exports the end of a job's time.
Of several processes of a run each may be asked, or one alone (`clipctl.ranks`).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
    echo: seconds in which another signal is the same request. failure: of another process of the run, which ends this one.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.by_hand = False
        self.at_once = False
        self.grace = 60.0
        self.echo = SAME_REQUEST_SECONDS
        self.failure: ClipctlError | None = None
        self._last = 0.0
        self._raising = False
        self._raised = False
        self._shielded = False
        self._rung = ""
        self._asked: tuple[str, bool] | None = None
        self._failed = False
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._open = True
        self._caught = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it a request raises StopNow at once: for work that is simply done again.

        Other people's code may lose that exception, in a finalizer, or make another one of it, as an import in C does; it leaves
        the block nevertheless.
        """
        if self.reason:
            raise StopNow
        before, self._raising = self._raising, True
        try:
            yield
        except Exception:
            if self._raised:
                raise StopNow from None
            raise
        finally:
            self._raising = before
        if self._raised:
            raise StopNow

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Within it no request raises; it does when the block ends: for what all processes must do together or not at all."""
        before, self._shielded = self._shielded, True
        try:
            yield
        finally:
            self._shielded = before
        if not before and (self.at_once or (self.reason and self._raising)):
            raise StopNow

    def end_with_job(self, end: float, margin: float) -> None:
        """Asks to stop `margin` seconds before the job ends (`end`: seconds since 1970), or, where so little is left, after
        half of what is left: a job that stopped at once would never get anywhere."""
        left = end - time.time()
        self._after(max(left - min(margin, left / 2), 0.0), lambda: self.ask("the job's time is nearly over", False))

    def error(self, what: str) -> ClipctlError:
        """The error that ends the command: 130 for Ctrl-C, 75 for what a scheduler asks for. what: became of the run."""
        if self.failure is not None:
            return self.failure
        line = f"stopped {'at once ' if self.at_once else ''}by {self.reason or 'Ctrl-C'}; {what}"
        return Interrupted(line) if self.by_hand or not self.reason else Preempted(line)

    def request(self, number: int, frame: object = None) -> None:
        """The signal handler."""
        (rung, self._rung), (asked, self._asked) = (self._rung, ""), (self._asked, None)
        failed, self._failed = self._failed, False
        now, before = time.monotonic(), self._last
        if failed:
            self.at_once = True
            raise StopNow
        if asked and self.reason:
            return
        self._last = now
        if not self.reason:
            by_hand = number == signal.SIGINT
            self.take(*(asked or (rung or ("Ctrl-C" if by_hand else signal.Signals(number).name), by_hand)))
            if self._raising and not self._shielded:
                self._raised = True
                raise StopNow
        elif rung or now - before > self.echo:
            self.at_once = True
            if not self._shielded:
                raise StopNow

    def take(self, reason: str, by_hand: bool) -> None:
        """A request without a signal, where there is none yet: that of another process of the run."""
        if not self.reason:
            self.reason, self.by_hand = reason, by_hand
            self._last = time.monotonic()
            self._after(self.grace, lambda: self._ring("the grace time is over"))

    def ask(self, reason: str, by_hand: bool) -> None:
        """The same from another thread, as a signal would: it ends what is interruptible."""
        with self._lock:
            if self._open and self._caught and not self.reason:
                self._asked = (reason, by_hand)
                _signal_main_thread()

    def fail(self, failure: ClipctlError) -> None:
        """From another thread: the main thread gets StopNow wherever it is, and `error` is this failure."""
        with self._lock:
            self.failure = failure
            if self._open and self._caught:
                self._failed = True
                _signal_main_thread()

    def decided(self) -> None:
        """How the process ends is decided, and no further signal changes it."""
        if self._caught:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """No timer rings any more."""
        with self._lock:
            self._open = False
            for timer in self._timers:
                timer.cancel()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _ring(self, why: str) -> None:
        """Runs in a timer's thread; only the main thread can raise in the main thread, so it gets a signal."""
        with self._lock:
            if self._open and self._caught:
                self._rung = why
                _signal_main_thread()


def _signal_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)


early: list[str] = []
"""Names of signals that came before this module's handlers were there (`clipctl.cli`): a request all the same."""
_current: list[StopRequests] = []


@contextmanager
def catch_signals() -> Iterator[StopRequests]:
    """Takes over the signals until the block ends; within another such block, and in other threads than the main one, which
    cannot have signal handlers, it takes over nothing. A StopNow that leaves the block becomes the error of `error`.

    SIGHUP stays ignored where it was (nohup); SIGINT does not, because shells start background jobs with it ignored. Signals
    that were blocked count from here on.
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
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for number in before:
            signal.signal(number, stop.request)
        stop._caught = True
        if early:
            # Its KeyboardInterrupt may have come where Python drops it, such as in a finalizer.
            stop.take(early[0], by_hand=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield stop
    except KeyboardInterrupt:
        raise stop.error("what was measured is kept") from None
    finally:
        stop.close()
        _current.remove(stop)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the Slurm job ends that this process belongs to, seconds since 1970; None outside of one, for a job without a
    limit, and where Slurm is too old to say (then `--signal=USR1@120` does the same)."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() and 0 < int(end) < sys.maxsize else None
