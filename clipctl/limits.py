"""Limits of a process that answers: of what it takes from runs on the same machine, and of what DuckDB cannot end by itself,
which counts neither the memory nor the time of one function call and does not look for signals while it makes Arrow tables."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from select import select
from threading import Thread, Timer
from typing import NoReturn, TypeVar

from clipctl.errors import Interrupted, SpecError

PROCESS_BYTES = 4 << 30
"""What a process that answers `--sql` may hold: twice what a query may, with room for the answer."""
GRACE_SECONDS = 2.0
"""What a signal may take to end a process in the usual way."""

NICENESS = 10
"""Of a process that looks at runs: beside those that make them it gets a tenth of a core."""

Part = TypeVar("Part")


def give_way() -> None:
    """Lets other processes go first where there is not a core for each."""
    os.nice(NICENESS)


def limit_memory() -> None:
    """Limits what this process may hold to PROCESS_BYTES."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = PROCESS_BYTES if hard == resource.RLIM_INFINITY else min(PROCESS_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def each_in_time(parts: Iterator[Part], seconds: float) -> Iterator[Part]:
    """The parts; ends the process with a line and the exit code of wrong usage where one is not there in so many seconds."""
    while True:
        timer = Timer(seconds, _end, (SpecError.exit_code, f"--sql: no answer in {seconds:g} s; ask for less"))
        timer.daemon = True
        timer.start()
        try:
            part = next(parts)
        except StopIteration:
            return
        finally:
            timer.cancel()
        yield part


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends the process GRACE_SECONDS after a signal within the block, where that did not end the block. Raises KeyboardInterrupt
    for what DuckDB makes of Ctrl-C where it looks for signals itself."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    watch = Thread(target=_watch, args=(woken,), daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if str(error) == "Query interrupted":
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        watch.join()
        os.close(woken)


def _watch(woken: int) -> None:
    """Waits for the number of a signal; the end of the pipe is the end of the block."""
    if os.read(woken, 1) and not (select([woken], [], [], GRACE_SECONDS)[0] and not os.read(woken, 1)):
        _end(Interrupted.exit_code, "stopped by hand")


def _end(code: int, line: str) -> NoReturn:
    print(f"clipctl: {line}", file=sys.stderr, flush=True)
    os._exit(code)
