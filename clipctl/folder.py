"""What a folder of a run holds: its state, the rows of `metrics.duckdb` and the committed segments that it does not hold.

Nothing here writes into a run. What is damaged or missing is named and the rest is read.
"""

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.schema import BY_ITSELF, EVALUATION, FOLDED, SCHEMA_VERSION, arrow_schema
from clipctl.segments import digest

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

HEARTBEAT_SECONDS = 120.0
"""A run that says `running` and has not been heard of for this long has crashed."""


def committed_segments(folder: Path) -> list[Path]:
    """Journal segments of committed rollouts, and those that commit themselves. What was written without its `rollouts` row
    is not there."""
    files = sorted((folder / "journal").glob("*-*-*-*.parquet"))
    names = {*(file.name for file in files), *held_segments(folder)}
    committed = {_place(name) for name in names if name.startswith("rollouts-")}
    return [file for file in files if file.name.split("-")[0] in BY_ITSELF or _place(file.name) in committed]


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is one of `clipctl eval`; its spec.json or its status.json says so."""
    return any(read_json(folder / name, []).get("kind") == EVALUATION for name in ("spec.json", "status.json"))


def _place(segment: str) -> str:
    """Attempt and rollout of a segment's name."""
    return "-".join(segment.split("-")[1:3])


def load_run(connection: "duckdb.DuckDBPyConnection", folder: Path, run_id: str) -> list[str]:
    """Fills the raw tables with one run's rows; returns what could not be read."""
    for last_try in (False, True):
        rows, problems, vanished = _read_run(folder)
        if not vanished or last_try:
            break
    for table, part in rows:
        part = part.set_column(0, "run_id", [[run_id] * len(part)])
        connection.register("part", part)
        connection.execute(f"insert into raw_{table} by name select * from part")
        connection.unregister("part")
    return problems + [f"{name} vanished" for name in vanished]


def _read_run(folder: Path) -> tuple[list[tuple[str, "pa.Table"]], list[str], list[str]]:
    """Rows by table, problems, and segments that were gone when they were to be read (a fold came between)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems: list[str] = []
    vanished: list[str] = []
    # Listed before the store is read: a fold that comes between is then in the store, or leaves a vanished segment.
    listed = committed_segments(folder)
    rows, held = _read_store(folder, problems)
    for file in listed:
        table = file.name.split("-")[0]
        if table not in FOLDED or file.name in held:
            continue
        try:
            content = file.read_bytes()
            if digest(content) != file.stem.rsplit("-", 1)[1]:
                problems.append(f"{file.name} is damaged (its content is not what was written)")
                continue
            segment = pq.read_table(pa.BufferReader(content))
        except FileNotFoundError:
            vanished.append(file.name)
            continue
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{file.name} is damaged ({one_line(error)})")
            continue
        version = int((segment.schema.metadata or {}).get(b"clipctl_schema_version", b"0"))
        if version > SCHEMA_VERSION:
            problems.append(f"{file.name} has schema {version}, this clipctl reads up to {SCHEMA_VERSION}")
            continue
        rows.append((table, segment))
    return rows, problems, vanished


def _read_store(folder: Path, problems: list[str]) -> tuple[list[tuple[str, "pa.Table"]], set[str]]:
    import duckdb

    file = folder / "metrics.duckdb"
    if not file.is_file():
        return [], set()
    try:
        with duckdb.connect(str(file), read_only=True) as store:
            (version,) = store.execute("select version from store_version").fetchall()[0]
            if version > SCHEMA_VERSION:
                problems.append(f"metrics.duckdb has schema {version}, this clipctl reads up to {SCHEMA_VERSION}")
                return [], set()
            tables = {name for (name,) in store.execute("select table_name from duckdb_tables()").fetchall()}
            rows = [
                (table, store.sql(f"select * from {table}").to_arrow_table()) for table in FOLDED if table in tables
            ]
            return rows, {name for (name,) in store.execute("select name from segments").fetchall()}
    except (duckdb.Error, OSError) as error:
        problems.append(f"metrics.duckdb is damaged ({one_line(error)})")
        return [], set()


def held_segments(folder: Path) -> set[str]:
    return _read_store(folder, [])[1]


def create_tables(connection: "duckdb.DuckDBPyConnection") -> None:
    for table in FOLDED:
        connection.register("part", arrow_schema(table).empty_table())
        connection.execute(f"create table raw_{table} as select * from part")
        connection.unregister("part")
    connection.execute(
        "create table runs (run_id varchar, name varchar, state varchar, created_at timestamp, finished_at timestamp, "
        "spec json, git_commit varchar, version varchar, host varchar, preset varchar, model varchar, eps_low double, "
        "eps_high double, seed bigint, attempt integer, message varchar, path varchar, problem varchar)"
    )
    connection.execute("create table resumes (run_id varchar, attempt integer, resumed_at bigint)")
    connection.execute(
        "create table evaluation_folders (eval_id varchar, run_id varchar, state varchar, created_at timestamp, "
        "finished_at timestamp, message varchar, path varchar, problem varchar)"
    )


def usable_status(status: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The status, or nothing and a problem where a field that is read is missing or of the wrong kind."""
    try:
        state_of(status)
        int(status.get("schema_version", 0))
        for name in ("created_at", "finished_at"):
            datetime.fromisoformat(status[name] or "2000-01-01")
        [(int(resume["attempt"]), int(resume["resumed_at"])) for resume in status["resumes"]]
    except (KeyError, TypeError, ValueError):
        if status:
            problems.append("status.json is damaged")
        return {}
    return status


def state_of(status: Mapping[str, Any]) -> str | None:
    """The state that a reader concludes: a run that says `running` and is not alive has `crashed`."""
    state = status.get("state")
    if state != "running":
        return state
    silent = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
    if silent.total_seconds() > HEARTBEAT_SECONDS:
        return "crashed"
    here = status.get("host") == socket.gethostname()
    return "crashed" if here and not Path(f"/proc/{status['pid']}").exists() and Path("/proc/self").exists() else state


def read_text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError:
        content = None
    if isinstance(content, dict):
        return content
    problems.append(f"{file.name} is {'damaged' if file.is_file() else 'missing'}")
    return {}


def quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
