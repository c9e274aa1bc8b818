"""One process a run: an advisory lock on a file of its folder, which the kernel gives back when its holder dies.

Some shared file systems have no such locks, or only within one machine. So a run that another machine was running is watched
for one heartbeat before it is taken over; clocks are not compared.
"""

import errno
import fcntl
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from clipctl.errors import SpecError, StoreError
from clipctl.folder import HEARTBEAT_SECONDS

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
BEAT_SECONDS = HEARTBEAT_SECONDS / 4
"""Between two heartbeats of a run."""


def print_warning(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def lock_run(folder: Path, warn: Callable[[str], None] = print_warning) -> IO[str]:
    """The locked file, whose closing ends the lock. Raises SpecError where a living process runs the run, StoreError where
    the folder cannot be written. warn: told before a wait of half a minute."""
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}") from None
    try:
        _take(folder, file, warn)
    except BaseException:
        file.close()
        raise
    return file


def _take(folder: Path, file: IO[str], warn: Callable[[str], None]) -> None:
    locks = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise being_run(folder) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise StoreError(f"{folder}: the run cannot be locked: {error.strerror}") from None
        locks = False
    status = _status(folder)
    if status.get("state") == "running" and not (locks and status.get("host") == socket.gethostname()):
        refuse_living(folder, f"{status.get('host')} was running {folder.name}", warn)


def refuse_living(folder: Path, why: str, warn: Callable[[str], None]) -> None:
    """Waits for a heartbeat, whose file a living process replaces whatever became of it, and raises SpecError where one comes.
    why: is waited."""
    warn(f"{why}: waiting for {BEAT_SECONDS + 5:.0f} s for a sign of life")
    if _beats(folder, _status(folder).get("heartbeat")):
        raise being_run(folder)


def _beats(folder: Path, before: str | None) -> bool:
    """Whether the heartbeat moves while one is waited for."""
    end = time.monotonic() + BEAT_SECONDS + 5
    while time.monotonic() < end:
        time.sleep(1)
        if _status(folder).get("heartbeat") != before:
            return True
    return False


def being_run(folder: Path) -> SpecError:
    """The error for a run that a living process runs."""
    status = _status(folder)
    who = f" (process {status['pid']} on {status['host']})" if "pid" in status and "host" in status else ""
    return SpecError(
        f"run.name: {folder.name!r} is being run{who}; look at it: clipctl analyze {folder}, or choose another --name"
    )


def _status(folder: Path) -> dict[str, Any]:
    """status.json, empty where there is none or it is no JSON: here it only names the one who runs the run."""
    try:
        content = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
