"""How the last command on a run of a sweep ended, where the run's own files do not say it: it failed before it had any, a signal
killed it, or its job vanished.

`.end.json` in the run's folder has one writer at a time: who submits the run, until its job begins; then the job, or the local
sweep, that has the run's claim.
"""

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipctl.errors import EngineError, StoreError
from clipctl.folder import read_json
from clipctl.segments import write_whole

END = ".end.json"
INTERRUPTED = (75, 130)
HARMLESS = (0, 8, *INTERRUPTED)
"""Exit codes after which a run is finished, stopped by an alarm, or to be gone on with."""
VANISHINGS = 3
"""Jobs of a run in a row that vanished and had made no progress, after which it counts as failed."""


@dataclass(frozen=True, slots=True)
class End:
    """identity: of the run's spec. code: exit code, negative for a signal, None while the command runs, waits, or has vanished.

    message: the last line that it said. attempt: number of the run's last one then, -1 before the first. at: when it ended, UTC.
    job: that began, empty where none did. place: newest checkpoint when the job was submitted or began. vanished: jobs in a row
    before this one that left no trace. idle: those of them in a row that had not come to a further checkpoint.
    """

    identity: str
    code: int | None = None
    message: str = ""
    attempt: int = -1
    at: str = ""
    job: str = ""
    place: str = ""
    vanished: int = 0
    idle: int = 0

    @property
    def is_open(self) -> bool:
        return self.code is None

    @property
    def is_failure(self) -> bool:
        return self.code is not None and self.code not in HARMLESS

    @property
    def words(self) -> str:
        """`exit code 2: no model 'x'`."""
        code = self.code or 0
        return f"{f'exit code {code}' if code >= 0 else f'killed by {_signal_name(-code)}'}: {self.message or 'it said nothing'}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def read_end(folder: Path, identity: str) -> End | None:
    """What is recorded of the run with this identity; None where nothing is, or the record is damaged or another run's."""
    content: Mapping[str, Any] = read_json(folder / END, [])
    known = {field.name: content[field.name] for field in fields(End) if field.name in content}
    numbers = ("attempt", "vanished", "idle", *(["code"] if known.get("code") is not None else []))
    texts = ("identity", "message", "at", "job", "place")
    whole = all(isinstance(known.get(name), kind) for kind, names in ((int, numbers), (str, texts)) for name in names)
    if not whole or known["identity"] != identity:
        return None
    return End(**known)


def write_end(folder: Path, end: End) -> None:
    """Raises StoreError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / END, json.dumps(asdict(end)).encode())
    except OSError as error:
        raise StoreError(f"{folder / END}: {error.strerror}") from None


def forget_end(folder: Path) -> None:
    """Of a run that begins. Raises StoreError where the folder cannot be written."""
    try:
        (folder / END).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{folder / END}: {error.strerror}") from None


def closed(end: End, code: int, message: str, attempt: int) -> End:
    """The same when the command has ended."""
    said = message.removeprefix("clipctl: ")
    return replace(end, code=code, message=said, attempt=attempt, at=datetime.now(UTC).isoformat())


def latest_place(folder: Path) -> str:
    """Name of the newest checkpoint; empty where there is none."""
    try:
        return (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return ""


def vanished_once_more(end: End, place: str) -> End:
    """The same after its job left no trace. place: newest checkpoint now."""
    return replace(end, job="", place=place, vanished=end.vanished + 1, idle=end.idle + 1 if place == end.place else 0)


def gave_up(end: End, attempt: int) -> End:
    """The failure of a run whose jobs vanish."""
    message = f"its job vanished {end.idle} times in a row without any progress"
    return closed(end, EngineError.exit_code, message, attempt)


def next_job(folder: Path, identity: str) -> End:
    """The record of a run that is submitted now."""
    before, place = read_end(folder, identity), latest_place(folder)
    if before is None or not before.is_open:
        return End(identity, place=place)
    return vanished_once_more(before, place)


def begun_job(folder: Path, identity: str, job: str) -> End:
    """The record of a run whose job begins now. One that had begun and says nothing of its end has vanished."""
    before, place = read_end(folder, identity), latest_place(folder)
    if before is None or not before.is_open:
        return End(identity, job=job, place=place)
    return replace(vanished_once_more(before, place) if before.job else before, job=job)
