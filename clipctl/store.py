"""Reading the store: all runs under some paths as one set of views in an in-memory DuckDB, live, finished or broken.

Opening looks at the folders and attaches each `metrics.duckdb` read-only; a table is made only when a query names it: the
union of the attached tables and the rows of the journal that they do not hold. A writer renames and never changes a file, so
neither side waits for the other, and an open reader keeps what it has. Nothing is written into a run.

What is read is checked: segments by the digests in their names, stores by DuckDB's checksums of their blocks. Where
everything together is small, everything is checked when it is opened.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from clipctl.discover import find_folders
from clipctl.errors import SpecError, StoreError
from clipctl.folder import (
    Folder,
    committed,
    is_odd,
    list_segments,
    look_at,
    quoted,
    read_segments,
    segment_problem,
    state_of,
    table_of,
)
from clipctl.query import named_views, nearest, one_line, syntax_tree, table_names
from clipctl.schema import FOLDED, SCHEMA_VERSION, TABLES, arrow_schema
from clipctl.views import VIEWS

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

MEMORY = "2GB"
"""What a query may hold, unless `Runs` is told otherwise."""
SECONDS = 600.0
"""What a query may take."""
CHECKED_BYTES, CHECKED_FILES = 1 << 26, 4096
"""Up to this much of all runs together is checked whole when they are opened."""

RUNS = {
    "run_id": "varchar", "name": "varchar", "state": "varchar", "created_at": "timestamp", "finished_at": "timestamp",
    "spec": "json", "git_commit": "varchar", "version": "varchar", "host": "varchar", "preset": "varchar",
    "model": "varchar", "eps_low": "double", "eps_high": "double", "seed": "bigint", "attempt": "integer",
    "message": "varchar", "path": "varchar", "problem": "varchar", "copy_of": "varchar",
}  # fmt: skip
EVALUATION_FOLDERS = {
    "eval_id": "varchar", "run_id": "varchar", "state": "varchar", "created_at": "timestamp", "finished_at": "timestamp",
    "message": "varchar", "path": "varchar", "problem": "varchar",
}  # fmt: skip
RESUMES = {"run_id": "varchar", "attempt": "integer", "resumed_at": "bigint"}
SMALL = {"runs": RUNS, "evaluation_folders": EVALUATION_FOLDERS, "resumes": RESUMES}
"""Tables of one row a folder (or resume), made of status.json and spec.json."""
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
        self._ids = _run_ids(self.folders)
        self._aliases = tempfile.TemporaryDirectory(prefix="clipctl-") if any(map(is_odd, folders)) else None
        self._made: set[str] = set()
        self._left_out: set[tuple[int, str]] = set()
        self._told: list[int] = []
        with ThreadPoolExecutor(8) as pool:
            self._looked = list(pool.map(look_at, self.folders))
        self._attached = self._attach(range(len(self.folders)))
        if self._is_small():
            self._check_whole()
        for name, columns in SMALL.items():
            self.connection.execute(f"create table {name} ({', '.join(map(' '.join, columns.items()))})")
        _lock(self.connection, [self._path(number) for number in range(len(folders))], memory, seconds)

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
        if self._aliases is not None:
            self._aliases.cleanup()

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
                if last_try or not self._check_whole():
                    raise StoreError(f"a run is damaged: {one_line(error)}") from None
                self._forget()
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

    # --- what is made when a query names it ---

    def _make(self, names: Iterable[str]) -> None:
        """Makes the views and the tables below them. A fold that comes between makes the run's folder be looked at anew."""
        ordered = _with_what_it_reads(names)
        while missing := [name for name in ordered if name not in self._made]:
            for name in missing:
                if name in VIEWS:
                    self.connection.execute(VIEWS[name].replace("create view", "create or replace view", 1))
                else:
                    self._make_raw(name.removeprefix("raw_"))
                self._made.add(name)
        if [len(folder.problems) for folder in self._looked] != self._told:
            self._tell()

    def _make_raw(self, table: str) -> None:
        self.connection.register("part", arrow_schema(table).empty_table())
        self.connection.execute(f"create or replace table empty_{table} as select * from part")
        self.connection.unregister("part")
        parts = [f"select * from empty_{table}"]
        if table in FOLDED:
            self._load_journal(table)
            parts.append(f"select * from journal_{table}")
            stored = [number for number, tables in self._attached.items() if table in tables]
            parts += [self._part(number, f"s{number}.{table}") for number in stored]
        else:
            parts += [self._part(number, files) for number, files in self._shards(table)]
        self.connection.execute(f"create or replace view raw_{table} as {' union all by name '.join(parts)}")

    def _part(self, number: int, source: str) -> str:
        return f"select {quoted(self._ids[number])} as run_id, * exclude (run_id) from {source}"

    def _load_journal(self, table: str) -> None:
        """The rows of segments that no store holds, as one table."""
        import pyarrow as pa

        self.connection.execute(f"create or replace table journal_{table} as select * from empty_{table}")
        for number, folder in enumerate(self._looked):
            if not any(table_of(name) == table for name in folder.journal):
                continue
            try:
                parts = self._read_journal(number, table)
            except FileNotFoundError:
                self._look_again(number)
                parts = self._read_journal(number, table)
            if not parts:
                continue
            rows = pa.concat_tables(parts, promote_options="default")
            self.connection.register("part", rows.set_column(0, "run_id", [[self._ids[number]] * len(rows)]))
            known = ", ".join(name for name in rows.column_names if name in arrow_schema(table).names)
            self.connection.execute(f"insert into journal_{table} by name select {known} from part")
            self.connection.unregister("part")

    def _read_journal(self, number: int, table: str) -> list["pa.Table"]:
        folder, held = self._looked[number], self._held(number)
        names = [name for name in committed(folder.journal, held) if table_of(name) == table and name not in held]
        names = [name for name in names if (number, name) not in self._left_out]
        return read_segments(folder.path, names, folder.problems).get(table, [])

    def _look_again(self, number: int) -> None:
        """The folder as it is now: its journal was folded. Tables made before keep what they have."""
        folder = self._looked[number]
        folder.journal = list_segments(folder.path)
        if number in self._attached:
            for name in [made for made in self._made if made.startswith("raw_")]:
                self._made.discard(name)
            self.connection.execute(f"detach s{number}")
        self._attached = self._attached | self._attach([number])

    def _shards(self, table: str) -> Iterator[tuple[int, str]]:
        """The files of a table that stays Parquet, checked, as what can stand after FROM."""
        for number, folder in enumerate(self._looked):
            names = [name for name in folder.journal if table_of(name) == table]
            if not names:
                continue
            whole = self._whole(number, committed(names + _commits(folder.journal), self._held(number)))
            files = [self._path(number) / "journal" / name for name in whole if table_of(name) == table]
            if files:
                # Segments of one attempt are written by one version and have the same columns.
                attempts = {file.name.split("-")[1] for file in files}
                listed = ", ".join(map(quoted, files))
                yield (
                    number,
                    f"read_parquet([{listed}], hive_partitioning = false, union_by_name = {len(attempts) > 1})",
                )

    def _whole(self, number: int, names: Sequence[str], *, versions: bool = False) -> list[str]:
        """Those of the segments that are what was written; the others are named once."""
        folder = self._looked[number]
        names = [name for name in names if (number, name) not in self._left_out]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: segment_problem(folder.path, name, versions=versions), names))
        wrong = {name: problem for name, problem in zip(names, found, strict=True) if problem is not None}
        folder.problems += wrong.values()
        self._left_out |= {(number, name) for name in wrong}
        return [name for name in names if name not in wrong]

    # --- stores ---

    def _path(self, number: int) -> Path:
        """The folder's path, or a link to it, as DuckDB takes it."""
        folder = self.folders[number]
        if not is_odd(folder):
            return folder
        assert self._aliases is not None
        link = Path(self._aliases.name) / str(number)
        if not link.is_symlink():
            link.symlink_to(folder, target_is_directory=True)
        return link

    def _attach(self, numbers: Iterable[int]) -> dict[int, set[str]]:
        """Attaches the stores as `s<number>`; the tables that each has. What is damaged or newer is named and left out."""
        import duckdb

        found: dict[int, set[str]] = {}
        for number in numbers:
            file = self._path(number) / "metrics.duckdb"
            try:
                if not file.is_file():
                    continue
                file.open("rb").close()
                self.connection.execute(f"attach {quoted(file)} as s{number} (read_only)")
                ((version,),) = self.connection.execute(f"select version from s{number}.store_version").fetchall()
            except (duckdb.Error, OSError) as error:
                self._looked[number].problems.append(f"metrics.duckdb is damaged ({one_line(error)})")
                continue
            if version > SCHEMA_VERSION:
                self._looked[number].problems.append(
                    f"metrics.duckdb has schema {version}, this clipctl reads up to {SCHEMA_VERSION}"
                )
                continue
            found[number] = set()
        query = "select database_name, table_name from duckdb_tables() where database_name like 's%'"
        for database, table in self.connection.execute(query).fetchall():
            if int(database[1:]) in found:
                found[int(database[1:])].add(table)
        return found

    def _held(self, number: int) -> set[str]:
        """Names of the segments that a store holds."""
        if number not in self._attached:
            return set()
        return {name for (name,) in self.connection.execute(f"select name from s{number}.segments").fetchall()}

    # --- checking ---

    def _is_small(self) -> bool:
        files = [
            file
            for folder in self._looked
            for file in (folder.path / "metrics.duckdb", *(folder.path / "journal" / name for name in folder.journal))
        ]
        return len(files) <= CHECKED_FILES and sum(map(_size, files)) <= CHECKED_BYTES

    def _check_whole(self) -> bool:
        """Reads every byte of every run; what is damaged is named and left out. Whether there was any."""
        before = sum(len(folder.problems) for folder in self._looked)
        for number in list(self._attached):
            problem = self._damage(number)
            if problem is not None:
                self._looked[number].problems.append(f"metrics.duckdb is damaged ({problem})")
                del self._attached[number]
        for number, folder in enumerate(self._looked):
            held = self._held(number)
            self._whole(number, [name for name in committed(folder.journal, held) if name not in held], versions=True)
        return sum(len(folder.problems) for folder in self._looked) > before

    def _damage(self, number: int) -> str | None:
        """What DuckDB says when it reads the whole of a store."""
        import duckdb

        try:
            for table in self._attached[number]:
                self.connection.execute(f"select sum(hash(t)) from s{number}.{table} as t").fetchall()
        except duckdb.Error as error:
            return one_line(error)
        return None

    def _forget(self) -> None:
        """Tables are made anew when they are named again."""
        self._made.clear()

    def _tell(self) -> None:
        """The rows of runs, resumes and evaluation_folders, with the problems found so far."""
        import pyarrow as pa

        ids = dict(zip(self.folders, self._ids, strict=True))
        copies = _copies(self._looked, self._ids)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SMALL}
        for folder in self._looked:
            if folder.is_evaluation:
                rows["evaluation_folders"].append(_evaluation_row(folder, ids))
                continue
            rows["runs"].append(_run_row(folder, ids[folder.path]) | {"copy_of": copies.get(ids[folder.path])})
            rows["resumes"] += [{"run_id": ids[folder.path], **resume} for resume in folder.status.get("resumes", [])]
        for name, listed in rows.items():
            self.connection.execute(f"delete from {name}")
            if listed:
                columns = {column: [row[column] for row in listed] for column in SMALL[name]}
                self.connection.register("part", pa.table(columns))
                self.connection.execute(f"insert into {name} by name select * from part")
                self.connection.unregister("part")
        self._told = [len(folder.problems) for folder in self._looked]


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
        if name in VIEWS or name.removeprefix("raw_") in TABLES:
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


def _commits(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("rollouts-")]


def _is_damage(error: BaseException) -> bool:
    text = str(error)
    return any(part in text for part in ("Corrupt database", "Could not read", "checksum", "No magic bytes"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _run_row(folder: Folder, run_id: str) -> dict[str, Any]:
    status, spec = folder.status, folder.spec
    clip = spec.get("clip", {})
    return {
        "run_id": run_id,
        "name": status.get("name", folder.path.name),
        "state": state_of(status),
        "created_at": _naive(status.get("created_at")),
        "finished_at": _naive(status.get("finished_at")),
        "spec": folder.spec_text or None,
        "git_commit": status.get("git_commit"),
        "version": status.get("version"),
        "host": status.get("host"),
        "preset": status.get("preset"),
        "model": spec.get("model", {}).get("path"),
        "eps_low": _number(clip.get("low")),
        "eps_high": _number(clip.get("high")),
        "seed": spec.get("run", {}).get("seed"),
        "attempt": status.get("attempt"),
        "message": status.get("message"),
        "path": str(folder.path),
        "problem": "; ".join(dict.fromkeys(folder.problems)) or None,
    }


def _evaluation_row(folder: Folder, ids: Mapping[Path, str]) -> dict[str, Any]:
    """One evaluation's folder: its state, and the run that it evaluated, under the id that this run has here."""
    run = folder.spec.get("run")
    return {
        "eval_id": ids[folder.path],
        "run_id": ids.get(Path(run), Path(run).name) if isinstance(run, str) else None,
        "state": state_of(folder.status),
        "created_at": _naive(folder.status.get("created_at")),
        "finished_at": _naive(folder.status.get("finished_at")),
        "message": folder.status.get("message"),
        "path": str(folder.path),
        "problem": "; ".join(dict.fromkeys(folder.problems)) or None,
    }


def _copies(folders: Sequence[Folder], ids: Sequence[str]) -> dict[str, str]:
    """Run → the run that it is a copy of: one and the same start of one process, met twice. The original is the one that
    got furthest, and of those the first."""
    groups: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
    for folder, run_id in zip(folders, ids, strict=True):
        status = folder.status
        if status:
            key = (status.get("created_at"), status.get("host"), status.get("pid"), status.get("name"))
            groups.setdefault(key, []).append((-int(status.get("rollouts") or 0), run_id))
    return {
        run_id: min(group, key=lambda entry: entry[0])[1]
        for group in groups.values()
        for _, run_id in group
        if run_id != min(group, key=lambda entry: entry[0])[1]
    }


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


def _run_ids(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as tell equal names apart."""
    ids = [folder.name for folder in folders]
    depth = 1
    while len(set(ids)) < len(ids):
        depth += 1
        twice = {name for name in ids if ids.count(name) > 1}
        ids = [
            "/".join(folder.parts[-depth:]) if name in twice else name
            for name, folder in zip(ids, folders, strict=True)
        ]
    return ids


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _naive(text: str | None) -> Any:
    """A time of status.json, in UTC."""
    from datetime import UTC, datetime

    return None if text is None else datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)
