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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipctl import __version__
from clipctl.errors import SpecError, StoreError
from clipctl.fold import fold
from clipctl.folder import HEARTBEAT_SECONDS, read_json, usable_status
from clipctl.schema import SCHEMA_VERSION
from clipctl.segments import sync, write_segment, write_whole


def create_run(runs_dir: Path, name: str, spec_json: str, label: str) -> "RunWriter":
    """A new run's folder and its only writer. Raises SpecError for a name that exists, StoreError where it cannot write.

    Making the folder is the lock: of two processes that start one name, one is refused.
    """
    check_place(runs_dir, name)
    folder = runs_dir / name
    try:
        folder.mkdir()
    except FileExistsError:
        raise _taken(folder) from None
    except OSError as error:
        raise StoreError(f"--runs-dir: {folder} cannot be made: {error.strerror}") from None
    return RunWriter(folder, spec_json, label)


def check_place(runs_dir: Path, name: str) -> None:
    """Makes the runs folder where it is missing, and raises as `create_run` does for a name that exists: cheap enough
    to ask before a model is loaded."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"--runs-dir: {runs_dir} is not a folder") from None
    except OSError as error:
        raise StoreError(f"--runs-dir: {runs_dir} cannot be made: {error.strerror}") from None
    if (runs_dir / name).exists():
        raise _taken(runs_dir / name)
    if not os.access(runs_dir, os.W_OK | os.X_OK):
        raise StoreError(f"--runs-dir: {runs_dir} cannot be written")


def _taken(folder: Path) -> SpecError:
    return SpecError(
        f"run.name: {folder.name!r} exists in {folder.parent}; choose another --name, or look at it: "
        f"clipctl analyze {folder}"
    )


def continue_evaluation(folder: Path, spec_json: str) -> "RunWriter":
    """The next attempt of an evaluation that did not finish; what it has stays as it is. Raises StoreError."""
    problems: list[str] = []
    status = usable_status(read_json(folder / "status.json", problems), problems)
    if problems:
        raise StoreError(f"{folder}: {problems[0]}; remove the folder, or give another --name")
    return RunWriter(folder, spec_json, status["preset"], before=status)


class RunWriter:
    """Writes one run. Every method raises StoreError, and leaves what was committed readable, when the disk fails.

    before: the status that an earlier attempt left.
    """

    def __init__(self, folder: Path, spec_json: str, label: str, *, before: Mapping[str, Any] | None = None) -> None:
        import threading

        self.folder = folder
        self.attempt = 0 if before is None else int(before["attempt"]) + 1
        self._events = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        now = _now()
        self._status: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": json.loads(spec_json).get("kind", "run"),
            "name": folder.name,
            "preset": label,
            "state": "running",
            "created_at": now if before is None else before["created_at"],
            "finished_at": None,
            "heartbeat": now,
            "rollouts": 0,
            "attempt": self.attempt,
            "resumes": [],
            "message": "",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "version": __version__,
            "git_commit": _git_commit(),
        }
        with self._disk():
            for name in ("journal", "checkpoints"):
                (folder / name).mkdir(exist_ok=before is not None)
            write_whole(folder / "spec.json", spec_json.encode())
            self._write_status()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def write_rollout(self, rollout: int, row: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Commits one rollout: the segments of `tables` (table → column → values), then the `rollouts` row with its time."""
        with self._disk():
            for table, columns in tables.items():
                self._segment(table, rollout, columns)
            timed = {"time": _utc(), **row}
            self._segment("rollouts", rollout, {name: [value] for name, value in timed.items()})
            with self._lock:
                self._status |= {"rollouts": rollout + 1, "heartbeat": _now()}
                self._write_status()

    def write_evaluation(self, number: int, rollout: int | None, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Commits rows of `eval_texts`, `evals` and `evaluations` (table → column → values), in this order: a sample is there
        with its text or not at all, and samples count once their `evaluations` row is there.

        number: of the segments, not used before in this attempt.
        """
        with self._disk():
            for table in ("eval_texts", "evals", "evaluations"):
                if table in tables:
                    rows = max(map(len, tables[table].values()))
                    columns = {"rollout": [rollout] * rows} | dict(tables[table])
                    self._segment(table, number, columns, fill_rollout=False)

    def event(
        self, kind: str, message: str, *, rollout: int | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Commits one event by itself, and a line in log.txt."""
        columns: dict[str, Sequence[Any]] = {
            "time": [_utc()],
            "rollout": [rollout],
            "kind": [kind],
            "message": [message],
            "data": [json.dumps(data or {})],
        }
        with self._disk():
            self._segment("events", self._events, columns, fill_rollout=False)
            self._events += 1
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"{_now()} {kind}: {message}\n")

    @contextmanager
    def new_checkpoint(self, rollouts: int) -> Iterator[Path]:
        """A folder to save into, which becomes `checkpoints/<rollouts>` when it is complete."""
        beside = self.folder / "checkpoints" / f".writing-{rollouts}"
        with self._disk():
            try:
                beside.mkdir()
                yield beside
                for file in beside.iterdir():
                    sync(file)
                beside.rename(beside.with_name(str(rollouts)))
                sync(beside.parent)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def close(self, state: str, message: str) -> None:
        """Ends the attempt: the state, an event where there is something to say, and the fold into metrics.duckdb."""
        self._closed.set()
        if message:
            self.event(state, message)
        with self._disk(), self._lock:
            self._status |= {"state": state, "message": message, "finished_at": _now(), "heartbeat": _now()}
            self._write_status()
            fold(self.folder)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS / 4):
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

    @contextmanager
    def _disk(self) -> Iterator[None]:
        import safetensors

        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.folder}: {error.strerror or error}; earlier rollouts are kept") from None
        except safetensors.SafetensorError as error:
            raise StoreError(f"{self.folder}: {error}; earlier rollouts are kept") from None


def _git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _utc() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
