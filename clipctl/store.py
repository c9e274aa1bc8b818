"""Reading the store: all runs under some paths as one set of views in an in-memory DuckDB, live, finished or broken.

Opening looks at the folders and attaches each `metrics.duckdb` read-only; a table is made only when a query names it: the
union of the attached tables and the rows of the journal that they do not hold. A writer renames and never changes a file, so
neither side waits for the other, and an open reader keeps what it has. Nothing is written into a run.

Where everything together is small, everything is checked when it is opened; else each file when its rows are first asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from clipctl.discover import find_folders
from clipctl.errors import SpecError, StoreError
from clipctl.folder import quoted
from clipctl.listing import SMALL, folder_rows, run_ids
from clipctl.query import named_views, nearest, one_line, syntax_tree, table_names
from clipctl.raw import RawTables
from clipctl.schema import DERIVED, TABLES
from clipctl.views import VIEWS

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

MEMORY = "2GB"
"""What a query may hold, unless `Runs` is told otherwise."""
SECONDS = 600.0
"""What a query may take."""
NAMES = ("runs", *VIEWS)
"""What a query may name."""

Answer = TypeVar("Answer")


class Runs:
    """All runs and evaluations under some paths, read only: relations over the views runs, rollouts, updates, samples,
    tokens, evaluations, evals, events, ..."""

    def __init__(self, folders: Sequence[Path], *, memory: str = MEMORY, seconds: float = SECONDS) -> None:
        import duckdb

        self.folders = list(folders)
        self.connection = duckdb.connect(":memory:")
        self._raw = RawTables(self.connection, self.folders, run_ids(self.folders))
        self._made: set[str] = set()
        self._told = -1
        for name, columns in SMALL.items():
            self.connection.execute(f"create table {name} ({', '.join(map(' '.join, columns.items()))})")
        _lock(self.connection, self._raw.paths(), memory, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """The relation of one SELECT, which runs when its rows are asked for. Raises SpecError for anything else, and for a
        query that cannot be answered."""
        return self._answer(query, lambda relation: relation)

    def table(self, query: str) -> "pa.Table":
        """The whole answer of one SELECT as an Arrow table. Raises SpecError, also for errors that come with the rows."""
        return self._answer(query, lambda relation: _once(relation).to_arrow_table())

    def batches(self, query: str) -> Iterator["pa.RecordBatch"]:
        """The answer in parts of some thousand rows, at least one, as they are found. Raises as `table`, also between parts."""
        import duckdb

        def start(relation: "duckdb.DuckDBPyRelation") -> tuple["pa.RecordBatch", "pa.RecordBatchReader"]:
            import pyarrow as pa

            reader = _once(relation).to_arrow_reader(1 << 16)
            return next(reader, pa.RecordBatch.from_pylist([], reader.schema)), reader

        first, reader = self._answer(query, start)
        yield first
        try:
            yield from reader
        except (duckdb.Error, OSError) as error:
            raise SpecError(f"--sql: {one_line(error)}") from None

    def close(self) -> None:
        self.connection.close()
        self._raw.close()

    def _answer(self, query: str, take: Callable[["duckdb.DuckDBPyRelation"], Answer]) -> Answer:
        """What is taken of a query's relation; damage that shows only now is looked for, left out, and named."""
        import duckdb

        names = named_views(self.connection, query, NAMES)
        for last_try in (False, True):
            try:
                self._make(names)
                return take(self.connection.sql(query))
            except duckdb.Error as error:
                if not _is_damage(error):
                    raise SpecError(f"--sql: {self._explained(error, names)}") from None
                if last_try or not self._raw.check_whole():
                    raise StoreError(f"a run is damaged: {one_line(error)}") from None
                self._raw.made.clear()
        raise AssertionError

    def _explained(self, error: "duckdb.Error", names: Iterable[str]) -> str:
        """The error in one line, with the nearest column where one is not there."""
        text = one_line(error)
        if 'eferenced column "' not in text:
            return text
        missing = text.split('eferenced column "', 1)[1].split('"', 1)[0]
        columns = dict.fromkeys(column for name in sorted(names) for column in self.connection.table(name).columns)
        return (
            f"no column {missing!r} in {', '.join(sorted(names)) or 'a query without views'}{nearest(missing, columns)}"
        )

    def _make(self, names: Iterable[str]) -> None:
        """Makes what a query names and is not there yet: views, the tables below them, and what is known of the folders."""
        ordered = _with_what_it_reads(names)
        raw = [name.removeprefix("raw_") for name in ordered if name not in VIEWS]
        while missing := [table for table in raw if table not in self._raw.made]:
            self._raw.make(missing[0])
        for name in ordered:
            if name in VIEWS and name not in self._made:
                self.connection.execute(VIEWS[name])
                self._made.add(name)
        if self._raw.problems != self._told:
            self._tell()

    def _tell(self) -> None:
        """The rows of the folders, with the problems found so far."""
        for name, rows in folder_rows(self._raw.looked, self._raw.ids).items():
            self.connection.execute(f"delete from {name}")
            if rows:
                values = ", ".join(f"({', '.join('?' * len(SMALL[name]))})" for _ in rows)
                flat = [row[column] for row in rows for column in SMALL[name]]
                self.connection.execute(f"insert into {name} values {values}", flat)
        self._told = self._raw.problems


def open_runs(paths: str | Path | Iterable[str | Path]) -> Runs:
    """The runs and evaluations at or under the paths (or globs), finished, live or broken. Raises SpecError for a path that
    does not exist."""
    return Runs(find_folders([paths] if isinstance(paths, str | Path) else paths))


@cache
def _reads(view: str) -> frozenset[str]:
    """The views and tables that a view's own SQL names."""
    return frozenset(table_names(syntax_tree(_parser(), VIEWS[view].removeprefix(f"create view {view} as"))))


@cache
def _parser() -> "duckdb.DuckDBPyConnection":
    import duckdb

    return duckdb.connect(":memory:")


def _with_what_it_reads(names: Iterable[str]) -> list[str]:
    """The names with the views and raw tables below them, those first that others read."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        if name in VIEWS and name not in ordered:
            for below in sorted(_reads(name)):
                add(below)
        if name in VIEWS or name.removeprefix("raw_") in TABLES | DERIVED:
            ordered[name] = None

    for name in sorted(names):
        add(name)
    return list(ordered)


def _once(relation: "duckdb.DuckDBPyRelation") -> "duckdb.DuckDBPyRelation":
    """The relation; SpecError where two of its columns have one name, which Arrow and JSON cannot hold."""
    twice = [name for name in relation.columns if relation.columns.count(name) > 1]
    if twice:
        raise SpecError(f"--sql: two columns are named {twice[0]!r}; rename one with `as`")
    return relation


def _is_damage(error: BaseException) -> bool:
    text = str(error)
    return any(part in text for part in ("Corrupt database", "Could not read", "checksum", "No magic bytes"))


def _lock(connection: "duckdb.DuckDBPyConnection", folders: Sequence[Path], memory: str, seconds: float) -> None:
    """From here on the connection reads the runs' folders and nothing else, and no setting can change."""
    settings = {
        "temp_directory": "''",
        "allowed_directories": f"[{', '.join(map(quoted, folders))}]",
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "memory_limit": quoted(memory),
        "max_execution_time": str(round(1000 * seconds)),
        "lock_configuration": "true",
    }
    for name, value in settings.items():
        connection.execute(f"set {name} = {value}")
