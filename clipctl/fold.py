"""The fold: a run's journal moved into `metrics.duckdb`, which is built as a new file and renamed, so nothing ever waits."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from clipctl.errors import first_line
from clipctl.folder import committed, is_odd, list_segments, plain_path, quoted, read_segments, table_of
from clipctl.schema import FOLDED, SCHEMA_VERSION, SOURCES, derived_sql, sql_columns
from clipctl.segments import sync

if TYPE_CHECKING:
    import duckdb


def fold(folder: Path) -> None:
    """Builds metrics.duckdb from everything the run has, as a new file renamed over the old one, and then removes the
    segments that it holds. A run with damage is left alone, for readers to name and for people to mend. Raises OSError, and
    KeyboardInterrupt, after which all is as before."""
    import duckdb

    beside = folder / ".metrics.duckdb"
    beside.unlink(missing_ok=True)
    try:
        with plain_path(folder) as path, _place_to_build(beside) as built, duckdb.connect(":memory:") as source:
            held = _read_store(source, path / "metrics.duckdb")
            if held is None:
                return
            listed = committed(list_segments(folder), held)
            new = [name for name in listed if table_of(name) in FOLDED and name not in held]
            if not _read_journal(source, folder, new):
                return
            source.execute(f"attach {quoted(built)} as target")
            for table in FOLDED:
                source.execute(f"create table target.{table} as select * from raw_{table}")
            for table, sources in SOURCES.items():
                made = derived_sql(table, *(f"raw_{name}" for name in sources))
                source.execute(f"create table target.{table} as {made}")
            source.execute("create table target.segments (name varchar)")
            if held or new:
                source.execute("insert into target.segments select unnest(?)", [sorted({*held, *new})])
            source.execute("create table target.store_version as select ? as version", [SCHEMA_VERSION])
            source.execute("detach target")
    except (duckdb.InterruptException, RuntimeError):
        # DuckDB's names for Ctrl-C.
        beside.unlink(missing_ok=True)
        raise KeyboardInterrupt from None
    except duckdb.Error as error:
        beside.unlink(missing_ok=True)
        raise OSError(first_line(error)) from None
    sync(beside)
    beside.rename(folder / "metrics.duckdb")
    sync(folder)
    for name in listed:
        if table_of(name) in FOLDED:
            (folder / "journal" / name).unlink()


def store_problem(folder: Path) -> str | None:
    """Why metrics.duckdb cannot be read whole; None where it can, or is not there. Reads all of it."""
    import duckdb

    with plain_path(folder) as path, duckdb.connect(":memory:") as source:
        if not (path / "metrics.duckdb").is_file():
            return None
        try:
            source.execute(f"attach {quoted(path / 'metrics.duckdb')} as stored (read_only)")
            ((version,),) = source.execute("select version from stored.store_version").fetchall()
            query = "select table_name from duckdb_tables() where database_name = 'stored'"
            for (table,) in source.execute(query).fetchall():
                source.execute(f"select sum(hash(t)) from stored.{table} as t").fetchall()
        except duckdb.Error as error:
            return first_line(error)
    return f"it has schema {version}, this clipctl writes {SCHEMA_VERSION}" if version > SCHEMA_VERSION else None


@contextmanager
def _place_to_build(beside: Path) -> Iterator[Path]:
    """The file to build; where DuckDB cannot write it by its name (it follows links, and takes what follows a question mark
    for parameters), one in a temporary folder that is copied there when it is complete."""
    if not is_odd(beside):
        yield beside
        return
    with TemporaryDirectory(prefix="clipctl-") as place:
        built = Path(place) / "metrics.duckdb"
        yield built
        if built.exists():
            shutil.copyfile(built, beside)


def _read_store(source: "duckdb.DuckDBPyConnection", file: Path) -> set[str] | None:
    """Makes the raw tables, with the rows of an earlier fold; returns the segments that it holds, None where it is damaged
    or of a newer schema."""
    import duckdb

    for table in FOLDED:
        source.execute(f"create table raw_{table} ({sql_columns(table)})")
    if not file.is_file():
        return set()
    try:
        source.execute(f"attach {quoted(file)} as earlier (read_only)")
        if source.execute("select version from earlier.store_version").fetchall()[0][0] > SCHEMA_VERSION:
            return None
        query = "select table_name from duckdb_tables() where database_name = 'earlier'"
        for table in {name for (name,) in source.execute(query).fetchall()} & {*FOLDED}:
            source.execute(f"insert into raw_{table} by name select * from earlier.{table}")
        held = {name for (name,) in source.execute("select name from earlier.segments").fetchall()}
        source.execute("detach earlier")
    except duckdb.Error:
        return None
    return held


def _read_journal(source: "duckdb.DuckDBPyConnection", folder: Path, names: list[str]) -> bool:
    """Adds the rows of the segments; False where one cannot be read."""
    import pyarrow as pa

    problems: list[str] = []
    for table, parts in read_segments(folder, names, problems).items():
        source.register("part", pa.concat_tables(parts, promote_options="default"))
        source.execute(f"insert into raw_{table} by name select * from part")
        source.unregister("part")
    return not problems
