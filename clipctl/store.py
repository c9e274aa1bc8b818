"""Reading the store: all runs under some paths as one set of views in an in-memory DuckDB, live, finished or broken.

A reader takes what each run's `metrics.duckdb` holds and the committed segments that it does not, and never writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from clipctl.errors import SpecError
from clipctl.folder import (
    committed_segments,
    create_tables,
    is_evaluation,
    load_run,
    one_line,
    quoted,
    read_json,
    read_text,
    state_of,
    usable_status,
)
from clipctl.schema import SCHEMA_VERSION, SHARDS, arrow_schema
from clipctl.views import VIEWS

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class Runs:
    """All runs and evaluations under some paths, read only: relations over the views runs, rollouts, updates, samples,
    tokens, evaluations, evals, events, ..."""

    def __init__(self, folders: Sequence[Path]) -> None:
        import duckdb

        self.folders = list(folders)
        self.connection = duckdb.connect(":memory:")
        create_tables(self.connection)
        ids = dict(zip(self.folders, _run_ids(self.folders), strict=True))
        for folder, folder_id in ids.items():
            problems = load_run(self.connection, folder, folder_id)
            insert = _insert_evaluation if is_evaluation(folder) else _insert_run
            insert(self.connection, folder, ids, problems)
        _create_shard_views(self.connection, self.folders, list(ids.values()))
        for statement in VIEWS.values():
            self.connection.execute(statement)
        _lock(self.connection, self.folders)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sql(self, query: str) -> "duckdb.DuckDBPyRelation":
        """The relation of one SELECT. Raises SpecError for anything else, and for a query that cannot be answered."""
        import duckdb

        try:
            statements = self.connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise SpecError("--sql: exactly one SELECT is taken; runs are only ever read")
            return self.connection.sql(query)
        except duckdb.Error as error:
            raise SpecError(f"--sql: {one_line(error)}") from None

    def table(self, query: str) -> "pa.Table":
        """The whole answer of one SELECT as an Arrow table. Raises SpecError, also for errors that come with the rows."""
        import duckdb

        try:
            relation = self.sql(query)
            twice = [name for name in relation.columns if relation.columns.count(name) > 1]
            if twice:
                raise SpecError(f"--sql: two columns are named {twice[0]!r}; rename one with `as`")
            return relation.to_arrow_table()
        except duckdb.Error as error:
            raise SpecError(f"--sql: {one_line(error)}") from None

    def close(self) -> None:
        self.connection.close()


def open_runs(paths: str | Path | Iterable[str | Path]) -> Runs:
    """The runs and evaluations at or under the paths, finished, live or broken. Raises SpecError for a path that does not
    exist."""
    listed = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    folders: dict[Path, None] = {}
    for path in listed:
        if not path.exists():
            raise SpecError(f"analyze: no file or folder {str(path)!r}")
        for spec in sorted(path.rglob("spec.json")):
            if (spec.parent / "journal").is_dir() or (spec.parent / "status.json").is_file():
                folders[spec.parent.resolve()] = None
    return Runs(list(folders))


def _insert_evaluation(
    connection: "duckdb.DuckDBPyConnection", folder: Path, ids: Mapping[Path, str], problems: list[str]
) -> None:
    """One evaluation's folder: its state, and the run that it evaluated, under the id that this run has here."""
    status = usable_status(read_json(folder / "status.json", problems), problems)
    run = read_json(folder / "spec.json", problems).get("run")
    run_id = ids.get(Path(run), Path(run).name) if isinstance(run, str) else None
    row = [
        ids[folder],
        run_id,
        state_of(status),
        status.get("created_at"),
        status.get("finished_at"),
        status.get("message"),
        str(folder),
        "; ".join(dict.fromkeys(problems)) or None,
    ]
    connection.execute(f"insert into evaluation_folders values ({', '.join('?' * len(row))})", row)


def _insert_run(
    connection: "duckdb.DuckDBPyConnection", folder: Path, ids: Mapping[Path, str], problems: list[str]
) -> None:
    run_id = ids[folder]
    status = usable_status(read_json(folder / "status.json", problems), problems)
    spec_text = read_text(folder / "spec.json")
    spec = read_json(folder / "spec.json", problems)
    if not all(isinstance(spec.get(group, {}), dict) for group in ("clip", "model", "run")):
        problems.append("spec.json is damaged")
        spec = {}
    clip = spec.get("clip", {})
    if int(status.get("schema_version", 0)) > SCHEMA_VERSION:
        problems.append(f"status.json has schema {status['schema_version']}, this clipctl reads up to {SCHEMA_VERSION}")
    row = [
        run_id,
        status.get("name", folder.name),
        state_of(status),
        status.get("created_at"),
        status.get("finished_at"),
        spec_text if spec else None,
        status.get("git_commit"),
        status.get("version"),
        status.get("host"),
        status.get("preset"),
        spec.get("model", {}).get("path"),
        _number(clip.get("low")),
        _number(clip.get("high")),
        spec.get("run", {}).get("seed"),
        status.get("attempt"),
        status.get("message"),
        str(folder),
        "; ".join(problems) or None,
    ]
    connection.execute(f"insert into runs values ({', '.join('?' * len(row))})", row)
    for resume in status.get("resumes", []):
        connection.execute("insert into resumes values (?, ?, ?)", [run_id, resume["attempt"], resume["resumed_at"]])


def _create_shard_views(connection: "duckdb.DuckDBPyConnection", folders: Sequence[Path], ids: Sequence[str]) -> None:
    """The shards straight from their Parquet files, which are too large to load."""
    for table in SHARDS:
        connection.register("part", arrow_schema(table).empty_table())
        connection.execute(f"create table empty_{table} as select * from part")
        connection.unregister("part")
        parts = [f"select * from empty_{table}"]
        for run_id, folder in zip(ids, folders, strict=True):
            files = [file for file in committed_segments(folder) if file.name.startswith(f"{table}-")]
            if files:
                listed = ", ".join(f"'{quoted(file)}'" for file in files)
                parts.append(
                    f"select '{run_id.replace(chr(39), chr(39) * 2)}' as run_id, * exclude (run_id) "
                    f"from read_parquet([{listed}], union_by_name = true)"
                )
        connection.execute(f"create view raw_{table} as {' union all by name '.join(parts)}")


def _lock(connection: "duckdb.DuckDBPyConnection", folders: Sequence[Path]) -> None:
    """From here on the connection reads the runs' folders and nothing else, and no setting can change."""
    listed = ", ".join(f"'{quoted(folder)}'" for folder in folders)
    connection.execute(f"set allowed_directories = [{listed}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set autoinstall_known_extensions = false")
    connection.execute("set autoload_known_extensions = false")
    connection.execute("set memory_limit = '4GB'")
    connection.execute("set lock_configuration = true")


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
