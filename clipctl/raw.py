"""Where the rows of every table are: the stores of all runs, attached read-only, the segments of their journals that no
store holds, and the Parquet shards, as the relations `raw_<table>`.

What is read is checked: segments by the digests in their names, stores by DuckDB's checksums of their blocks. What is
damaged, newer or gone is named in the folder's problems and left out. Rows that a later attempt has done again are left out
as well.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from clipctl.folder import (
    committed,
    is_odd,
    list_segments,
    look_at,
    quoted,
    read_segments,
    segment_problem,
    table_of,
)
from clipctl.query import one_line
from clipctl.schema import DERIVED, FOLDED, KEYS, SCHEMA_VERSION, SOURCES, TABLES, derived_sql, sql_columns

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

CHECKED_BYTES, CHECKED_FILES = 1 << 26, 4096
"""Up to this much of all runs together is checked whole when they are opened."""


class RawTables:
    """The relations raw_<table> of some folders on one connection, each made when it is asked for."""

    def __init__(self, connection: "duckdb.DuckDBPyConnection", folders: Sequence[Path], ids: Sequence[str]) -> None:
        self.connection = connection
        self.ids = list(ids)
        self.made: set[str] = set()
        self._aliases = tempfile.TemporaryDirectory(prefix="clipctl-") if any(map(is_odd, folders)) else None
        self._left_out: set[tuple[int, str]] = set()
        with ThreadPoolExecutor(8) as pool:
            self.looked = list(pool.map(look_at, folders))
        self._attached = self._attach(range(len(folders)))
        if self._is_small():
            self.check_whole()

    @property
    def problems(self) -> int:
        """How many problems were found so far."""
        return sum(len(folder.problems) for folder in self.looked)

    def paths(self) -> list[Path]:
        """The folders' paths as DuckDB takes them."""
        return [self._path(number) for number in range(len(self.looked))]

    def close(self) -> None:
        if self._aliases is not None:
            self._aliases.cleanup()

    def make(self, table: str) -> None:
        """Makes `raw_<table>`, of all folders. A fold that comes between makes the folder be looked at anew, and what was
        made before be forgotten."""
        self.connection.execute(f"create or replace table empty_{table} ({sql_columns(table)})")
        parts = [f"select * from empty_{table}"]
        if table in DERIVED:
            parts += self._derived(table)
        elif table in FOLDED:
            self._load_journal(table)
            parts.append(f"select * from journal_{table}")
            stored = [number for number, tables in self._attached.items() if table in tables]
            parts += [self._part(number, table, f"s{number}.{table}") for number in stored]
        else:
            parts += [self._part(number, table, files) for number, files in self._shards(table)]
        self.connection.execute(f"create or replace view raw_{table} as {' union all by name '.join(parts)}")
        self.made.add(table)

    def _derived(self, table: str) -> Iterator[str]:
        """The rows of stores that have them, and those made here of other stores' tables and of the journals'."""
        for source in SOURCES[table]:
            self.connection.execute(f"create or replace table empty_{source} ({sql_columns(source)})")
            self._load_journal(source)
        yield derived_sql(table, *(f"journal_{source}" for source in SOURCES[table]))
        for number, held in self._attached.items():
            if table in held:
                yield self._part(number, table, f"s{number}.{table}")
            elif SOURCES[table][0] in held:
                # A store of an earlier version lacks columns, or the table.
                sources = (
                    f"(from empty_{source}" + f" union all by name from s{number}.{source}" * (source in held) + ")"
                    for source in SOURCES[table]
                )
                yield self._part(number, table, f"({derived_sql(table, *sources)})")

    def _part(self, number: int, table: str, source: str) -> str:
        name = quoted(self.ids[number])
        return f"select {name} as run_id, * exclude (run_id) from {source}{self._current(number, table)}"

    def _current(self, number: int, table: str) -> str:
        """What leaves out the rows that a later attempt did again: from the rollout on where it went on. An evaluation of the
        model of that very moment is the same."""
        folder = self.looked[number]
        after = ">" if table in ("evaluations", "evals", "eval_texts") else ">="
        again = [
            f"(attempt < {int(resume['attempt'])} and coalesce(rollout {after} {int(resume['resumed_at'])}, false))"
            for resume in ([] if folder.is_evaluation else folder.status.get("resumes", []))
        ]
        return f" where not ({' or '.join(again)})" if again else ""

    # --- journals ---

    def _load_journal(self, table: str) -> None:
        """The rows of segments that no store holds, as one table."""
        import pyarrow as pa

        self.connection.execute(f"create or replace table journal_{table} ({sql_columns(table)})")
        for number, folder in enumerate(self.looked):
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
            known = ", ".join(name for name in rows.column_names if name in (*KEYS, *TABLES[table]))
            self.connection.register("part", rows)
            part = self._part(number, table, f"(select {known} from part)")
            self.connection.execute(f"insert into journal_{table} by name {part}")
            self.connection.unregister("part")

    def _read_journal(self, number: int, table: str) -> list["pa.Table"]:
        folder, held = self.looked[number], self._held(number)
        names = [name for name in committed(folder.journal, held) if table_of(name) == table and name not in held]
        names = [name for name in names if (number, name) not in self._left_out]
        return read_segments(folder.path, names, folder.problems).get(table, [])

    def _look_again(self, number: int) -> None:
        """The folder as it is now: its journal was folded."""
        folder = self.looked[number]
        folder.journal = list_segments(folder.path)
        if number in self._attached:
            self.made.clear()
            self.connection.execute(f"detach s{number}")
        self._attached = self._attached | self._attach([number])

    # --- shards ---

    def _shards(self, table: str) -> Iterator[tuple[int, str]]:
        """The files of a table that stays Parquet, checked, as what can stand after FROM."""
        for number, folder in enumerate(self.looked):
            names = [name for name in folder.journal if table_of(name) == table]
            if not names:
                continue
            commits = [name for name in folder.journal if table_of(name) == "rollouts"]
            whole = self._whole(number, committed(names + commits, self._held(number)))
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
        folder = self.looked[number]
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
        folder = self.looked[number].path
        if not is_odd(folder):
            return folder
        assert self._aliases is not None
        link = Path(self._aliases.name) / str(number)
        if not link.is_symlink():
            link.symlink_to(folder, target_is_directory=True)
        return link

    def _attach(self, numbers: Iterable[int]) -> dict[int, set[str]]:
        """Attaches the stores as `s<number>`; the tables in which each has rows. What is damaged or newer is named and left
        out."""
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
                self.looked[number].problems.append(f"metrics.duckdb is damaged ({one_line(error)})")
                continue
            if version > SCHEMA_VERSION:
                self.looked[number].problems.append(
                    f"metrics.duckdb has schema {version}, this clipctl reads up to {SCHEMA_VERSION}"
                )
                continue
            found[number] = set()
        query = (
            "select database_name, table_name from duckdb_tables() where database_name like 's%' and estimated_size > 0"
        )
        for database, table in self.connection.execute(query).fetchall():
            if int(database[1:]) in found:
                found[int(database[1:])].add(table)
        return found

    def _held(self, number: int) -> set[str]:
        """Names of the segments that a store holds."""
        if "segments" not in self._attached.get(number, ()):
            return set()
        return {name for (name,) in self.connection.execute(f"select name from s{number}.segments").fetchall()}

    # --- checking ---

    def _is_small(self) -> bool:
        files = [
            file
            for folder in self.looked
            for file in (folder.path / "metrics.duckdb", *(folder.path / "journal" / name for name in folder.journal))
        ]
        return len(files) <= CHECKED_FILES and sum(map(_size, files)) <= CHECKED_BYTES

    def check_whole(self) -> bool:
        """Reads every byte of every run; what is damaged is named and left out. Whether there was any."""
        before = self.problems
        for number in list(self._attached):
            problem = self._damage(number)
            if problem is not None:
                self.looked[number].problems.append(f"metrics.duckdb is damaged ({problem})")
                del self._attached[number]
        for number, folder in enumerate(self.looked):
            held = self._held(number)
            self._whole(number, [name for name in committed(folder.journal, held) if name not in held], versions=True)
        return self.problems > before

    def _damage(self, number: int) -> str | None:
        """What DuckDB says when it reads the whole of a store."""
        import duckdb

        try:
            for table in self._attached[number]:
                self.connection.execute(f"select sum(hash(t)) from s{number}.{table} as t").fetchall()
        except duckdb.Error as error:
            return one_line(error)
        return None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
