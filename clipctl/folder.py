"""What one folder of a run holds: its state, its spec, and the segments of its journal.

Nothing here writes into a run. What is damaged, missing or may not be read is named, and the rest is read.
"""

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.schema import BY_ITSELF, EVALUATION, FOLDED, SCHEMA_VERSION
from clipctl.segments import is_whole, is_whole_file

if TYPE_CHECKING:
    import pyarrow as pa

HEARTBEAT_SECONDS = 120.0
"""A run that says `running` and has not been heard of for this long has crashed."""
SEGMENT = re.compile(r"(?P<table>\w+)-(?P<attempt>\d+)-(?P<number>\d+)-(?P<digest>[0-9a-f]+)\.parquet")


@dataclass(slots=True)
class Folder:
    """A folder as it was when it was looked at.

    status, spec: as parsed, {} where they cannot be used. journal: the names of its segments, sorted. problems: what
    cannot be read, in words.
    """

    path: Path
    status: dict[str, Any]
    spec: dict[str, Any]
    spec_text: str
    journal: list[str]
    problems: list[str]

    @property
    def is_evaluation(self) -> bool:
        """Whether it is one of `clipctl eval`; its spec.json or its status.json says so."""
        return EVALUATION in (self.spec.get("kind"), self.status.get("kind"))


def is_evaluation(path: Path) -> bool:
    """The same of a folder that was not looked at yet."""
    return look_at(path).is_evaluation


def look_at(path: Path) -> Folder:
    """The folder, without its rows."""
    problems: list[str] = []
    try:
        empty = not os.listdir(path)
        journal = list_segments(path)
    except OSError as error:
        return Folder(path, {}, {}, "", [], [f"the folder cannot be read ({error.strerror})"])
    if empty:
        return Folder(path, {}, {}, "", [], ["the folder is empty: nothing of a run was written"])
    status = usable_status(read_json(path / "status.json", problems), problems)
    if status.get("state") != "running":
        # What was committed between the listing and the end.
        journal = list_segments(path)
    spec = read_json(path / "spec.json", problems)
    if not all(isinstance(spec.get(group, {}), dict) for group in ("clip", "model", "run")) and "kind" not in spec:
        problems.append("spec.json is damaged")
        spec = {}
    if int(status.get("schema_version", 0)) > SCHEMA_VERSION:
        problems.append(f"status.json has schema {status['schema_version']}, this clipctl reads up to {SCHEMA_VERSION}")
    return Folder(path, status, spec, json.dumps(spec) if spec else "", journal, problems)


def list_segments(folder: Path) -> list[str]:
    """Names of the journal's segments, sorted; none where there is no journal. Raises OSError where it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder / "journal") if SEGMENT.fullmatch(name))
    except FileNotFoundError:
        return []


def committed(names: Iterable[str], held: Iterable[str]) -> list[str]:
    """Those segments whose rollout was committed, and those that commit themselves. What was written without its
    `rollouts` row is not there. held: names of the segments that the folder's `metrics.duckdb` holds."""
    names = list(names)
    places = {place(name) for name in (*names, *held) if name.startswith("rollouts-")}
    return [name for name in names if table_of(name) in BY_ITSELF or place(name) in places]


def table_of(segment: str) -> str:
    return segment.split("-", 1)[0]


def place(segment: str) -> str:
    """Attempt and rollout of a segment's name."""
    return "-".join(segment.split("-")[1:3])


def read_segments(folder: Path, names: Iterable[str], problems: list[str]) -> dict[str, list["pa.Table"]]:
    """Rows by table. What is damaged or of a newer schema is left out and named in problems.

    Raises FileNotFoundError for a segment that is gone: a fold came between listing and reading.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, list[pa.Table]] = {}
    for name in names:
        try:
            content = (folder / "journal" / name).read_bytes()
            if not is_whole(content, name):
                problems.append(f"{name} is damaged (its content is not what was written)")
                continue
            # Without read_table's search for a dataset and its threads, which take as long again.
            segment = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{name} is damaged ({' '.join(str(error).split())[:200]})")
            continue
        newer = _newer(segment.schema, name)
        if newer is None:
            rows.setdefault(table_of(name), []).append(segment)
        else:
            problems.append(newer)
    return rows


def segment_problem(folder: Path, name: str, *, versions: bool) -> str | None:
    """What is wrong with a segment that is not read now: by its digest and, where asked, its schema version."""
    import pyarrow.parquet as pq

    file = folder / "journal" / name
    try:
        if not is_whole_file(file):
            return f"{name} is damaged (its content is not what was written)"
        return _newer(pq.read_schema(file), name) if versions else None
    except FileNotFoundError:
        # A fold came between listing and reading, which whoever needs the rows will see.
        return None if table_of(name) in FOLDED else f"{name} vanished"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _newer(schema: "pa.Schema", name: str) -> str | None:
    version = int((schema.metadata or {}).get(b"clipctl_schema_version", b"0"))
    return (
        f"{name} has schema {version}, this clipctl reads up to {SCHEMA_VERSION}" if version > SCHEMA_VERSION else None
    )


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path to the folder that DuckDB takes as it stands, where the folder's own has characters that mean something to
    it: a link in a temporary folder."""
    if not is_odd(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="clipctl-") as place:
        link = Path(place) / "run"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def is_odd(path: Path) -> bool:
    """Whether DuckDB reads more into the path than a name: globs, and parameters after a question mark."""
    return any(character in str(path) for character in "?*[]")


def state_of(status: Mapping[str, Any]) -> str | None:
    """The state that a reader concludes: a run that says `running` and is not alive has `crashed`."""
    state = status.get("state")
    if state != "running":
        return state
    # A heartbeat from the future was written before the clock was set back, and a live run would have replaced it.
    silent = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
    if abs(silent.total_seconds()) > HEARTBEAT_SECONDS:
        return "crashed"
    here = status.get("host") == socket.gethostname()
    return "crashed" if here and not Path(f"/proc/{status['pid']}").exists() and Path("/proc/self").exists() else state


def quoted(text: str | Path) -> str:
    """As a literal of SQL, with its quotes."""
    return "'" + str(text).replace("'", "''") + "'"


def usable_status(status: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The status, or nothing and a problem where a field that is read is missing or of the wrong kind."""
    try:
        state_of(status)
        int(status.get("schema_version", 0))
        int(status.get("rollouts", 0))
        for name in ("created_at", "finished_at"):
            datetime.fromisoformat(status[name] or "2000-01-01")
        [(int(resume["attempt"]), int(resume["resumed_at"])) for resume in status["resumes"]]
    except (KeyError, TypeError, ValueError):
        if status:
            problems.append("status.json is damaged")
        return {}
    return status


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(errors="replace"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
        return {}
    except OSError as error:
        problems.append(f"{file.name} cannot be read ({error.strerror})")
        return {}
    except (json.JSONDecodeError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    problems.append(f"{file.name} is damaged")
    return {}
