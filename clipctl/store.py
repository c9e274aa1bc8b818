"""The store: an append-only journal of Parquet segments per run, folded into `metrics.duckdb` when an attempt ends.

A run's folder has one writer. Each rollout appends one segment per table, written under another name, fsynced and
renamed, with a digest of its content in the name; the `rollouts` segment comes last and is the commit record.
`metrics.duckdb` is built as a new file and renamed, so nothing ever waits for a lock. Readers open an in-memory database,
take what each run's `metrics.duckdb` holds and the committed segments that it does not, and never write into a run.

Sums and counts are stored, the views make the means; empty is NULL, never NaN. All tables and views are made here.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from clipctl import __version__
from clipctl.errors import SpecError, StoreError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

SCHEMA_VERSION = 3
"""2: the ledger (columns of updates; histograms, probes, noise). 3: evaluations; clip counts of samples and tokens, the
text of tokens, the time of a rollout. What an earlier version has not is NULL or empty."""
HEARTBEAT_SECONDS = 120.0
"""A run that says `running` and has not been heard of for this long has crashed."""

TERMS = ("pg_reward", "pg_clip_low", "pg_clip_high", "npg_reward", "npg_clip_low", "npg_clip_high")
MASSES = ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg")
LEDGER = (*TERMS, *MASSES)
"""The entropy ledger's columns in `updates`."""
NETWORK = ("total", "reward", "clip_low", "clip_high", "momentum", "decay")
"""Parts of the change of entropy as predicted through the network."""
GAPS = {
    f"gap{number}_{side}": (f"{event}_{algorithm}", f"{event}_mass")
    for number, algorithm in ((7, "pg"), (8, "npg"))
    for side, event in (("low", "x"), ("high", "y"))
}
"""The left sides of inequalities (7) and (8): a sum and the mass it is divided by."""
_KEYS = {"run_id": "string", "attempt": "int32"}
TABLES: dict[str, dict[str, str]] = {
    "rollouts": {
        "rollout": "int64",
        "time": "timestamp",
        "prompts": "int64",
        "responses": "int64",
        "tokens": "int64",
        "reward_sum": "float64",
        "reward_sq_sum": "float64",
        "graded": "int64",
        "correct": "int64",
        "groups_correct": "int64",
        "no_answer": "int64",
        "grader_failures": "int64",
        "responses_scored": "int64",
        "tokens_scored": "int64",
        "entropy_response_sum": "float64",
        "entropy_token_sum": "float64",
        "truncated": "int64",
        "groups_zero_advantage": "int64",
        "refills": "int64",
        "mismatch_max": "float64",
        "mismatch_sum": "float64",
        "seconds_sample": "float64",
        "seconds_reward": "float64",
        "seconds_score": "float64",
        "seconds_update": "float64",
    },
    "updates": {
        "rollout": "int64",
        "inner_step": "int64",
        "loss": "float64",
        "grad_norm": "float64",
        "lr": "float64",
        "responses": "int64",
        "tokens": "int64",
        "tokens_advantage": "int64",
        "eps_low": "float64",
        "eps_high": "float64",
        "clip_low": "int64",
        "clip_high": "int64",
        "ratio_low": "int64",
        "ratio_high": "int64",
        "ratio_sum": "float64",
        "ratio_min": "float64",
        "ratio_max": "float64",
        "kl_sum": "float64",
        "noise_max": "float64",
        "entropy_token_sum": "float64",
        **dict.fromkeys(LEDGER, "float64"),
    },
    "histograms": {
        "rollout": "int64",
        "inner_step": "int64",
        "advantage_sign": "int32",
        "ratio_from": "float64",
        "ratio_to": "float64",
        "tokens": "int64",
        "pg": "float64",
        "npg": "float64",
    },
    "probes": {
        "rollout": "int64",
        "inner_step": "int64",
        "states": "int64",
        "entropy_before_sum": "float64",
        "entropy_after_sum": "float64",
        **{f"{kind}_{name}": "float64" for kind in ("exact", "sampled") for name in MASSES},
        **{f"network_{name}": "float64" for name in NETWORK},
    },
    "noise": {
        "rollout": "int64",
        "source": "string",
        "quantile": "float64",
        "log_ratio": "float64",
        "abs_log_ratio": "float64",
    },
    "samples": {
        "rollout": "int64",
        "prompt_id": "string",
        "position": "int64",
        "sample": "int32",
        "reward": "float64",
        "outcome": "string",
        "advantage": "float64",
        "tokens": "int32",
        "truncated": "bool",
        "entropy": "float64",
        "logprob_sum": "float64",
        "clip_low": "int32",
        "clip_high": "int32",
    },
    "texts": {"rollout": "int64", "position": "int64", "sample": "int32", "text": "string"},
    "tokens": {
        "rollout": "int64",
        "prompt_id": "string",
        "position": "int64",
        "sample": "int32",
        "token": "int32",
        "token_id": "int32",
        "logprob": "float32",
        "entropy": "float32",
        "sampler_logprob": "float32",
        "advantage": "float32",
        "clip_low": "int32",
        "clip_high": "int32",
        "text": "string",
    },
    "evaluations": {
        "rollout": "int64",
        "model": "string",
        "benchmark": "string",
        "source": "string",
        "grader": "string",
        "grader_version": "string",
        "problems": "int64",
        "problems_of": "int64",
        "k": "int32",
        "temperature": "float64",
        "top_p": "float64",
        "max_tokens": "int64",
        "seed": "int64",
        "template": "string",
        "template_hash": "string",
        "chat_template_hash": "string",
        "dataset_hash": "string",
        "model_hash": "string",
        "settings": "string",
        "reused_from": "string",
        "started_at": "timestamp",
        "seconds": "float64",
    },
    "evals": {
        "rollout": "int64",
        "benchmark": "string",
        "problem_id": "string",
        "problem_hash": "string",
        "position": "int64",
        "sample": "int32",
        "outcome": "string",
        "correct": "bool",
        "tokens": "int32",
        "truncated": "bool",
        "answer": "string",
        "logprob_sum": "float64",
    },
    "eval_texts": {
        "rollout": "int64",
        "benchmark": "string",
        "position": "int64",
        "sample": "int32",
        "text": "string",
    },
    "events": {"time": "timestamp", "rollout": "int64", "kind": "string", "message": "string", "data": "string"},
}
FOLDED = ("rollouts", "updates", "samples", "probes", "noise", "events", "evaluations", "evals")
"""Tables that move into metrics.duckdb."""
SHARDS = ("texts", "tokens", "histograms", "eval_texts")
"""Tables that stay Parquet shards, read when a query asks for them."""
BY_ITSELF = ("events", "evaluations", "evals", "eval_texts")
"""Tables whose segments wait for no `rollouts` row. Samples of an evaluation count once its `evaluations` row is there."""
EVALUATION = "evaluation"
"""`kind` in the spec.json and status.json of an evaluation's folder."""

# --- writing ----------------------------------------------------------------------------------------------------------


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


class RunWriter:
    """Writes one run. Every method raises StoreError, and leaves what was committed readable, when the disk fails."""

    def __init__(self, folder: Path, spec_json: str, label: str) -> None:
        import threading

        self.folder = folder
        self.attempt = 0
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
            "created_at": now,
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
            (folder / "journal").mkdir()
            (folder / "checkpoints").mkdir()
            _write_whole(folder / "spec.json", spec_json.encode())
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
        """Commits rows of `evals`, `eval_texts` and `evaluations` (table → column → values), the last one last: samples count
        once their `evaluations` row is there. number: of the segments, not used before in this attempt."""
        with self._disk():
            for table in ("evals", "eval_texts", "evaluations"):
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
                    _sync(file)
                beside.rename(beside.with_name(str(rollouts)))
                _sync(beside.parent)
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
        _write_whole(self.folder / "status.json", json.dumps(self._status, indent=2).encode())

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


def write_segment(journal: Path, stem: str, table: str, columns: Mapping[str, Any]) -> None:
    """One Parquet segment, complete or absent, `<stem>-<digest of the content>.parquet`. Raises OSError.

    The digest is in the name because page checksums do not cover the headers of pages and of the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(table)
    rows = pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    beside = journal / f".{stem}"
    try:
        pq.write_table(
            rows,
            beside,
            compression="zstd",
            compression_level=1,
            use_dictionary=[field.name for field in schema if field.name not in floats],
            column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
            write_page_checksum=True,
        )
        _sync(beside)
        beside.rename(journal / f"{stem}-{digest(beside.read_bytes())}.parquet")
        _sync(journal)
    finally:
        beside.unlink(missing_ok=True)


def digest(content: bytes) -> str:
    """Eight hex digits of BLAKE2b."""
    return blake2b(content, digest_size=4).hexdigest()


def arrow_schema(table: str) -> "pa.Schema":
    """The Arrow schema of a table, with the schema version in its metadata."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us"),
    }
    fields = [pa.field(name, types[kind]) for name, kind in (_KEYS | TABLES[table]).items()]
    return pa.schema(fields, metadata={"clipctl_schema_version": str(SCHEMA_VERSION)})


def fold(folder: Path) -> None:
    """Builds metrics.duckdb from everything the run has, as a new file renamed over the old one, and then removes the
    segments that it holds. A run with damage is left alone."""
    import duckdb

    beside = folder / ".metrics.duckdb"
    beside.unlink(missing_ok=True)
    held = [file for file in committed_segments(folder) if file.name.split("-")[0] in FOLDED]
    with duckdb.connect(":memory:") as source:
        _create_tables(source)
        if _load_run(source, folder, folder.name):
            return  # A damaged journal stays as it is, for readers to name and for people to mend.
        try:
            source.execute(f"attach '{_quoted(beside)}' as target")
            for table in FOLDED:
                source.execute(f"create table target.{table} as select * from main.raw_{table}")
            source.execute("create table target.segments (name varchar)")
            names = sorted({*(file.name for file in held), *_held_segments(folder)})
            if names:
                source.execute("insert into target.segments select unnest(?)", [names])
            source.execute("create table target.store_version as select ? as version", [SCHEMA_VERSION])
            source.execute("detach target")
        except duckdb.Error as error:
            beside.unlink(missing_ok=True)
            raise OSError(str(error).splitlines()[0]) from None
    _sync(beside)
    beside.rename(folder / "metrics.duckdb")
    _sync(folder)
    for file in held:
        file.unlink()


# --- reading ----------------------------------------------------------------------------------------------------------


class Runs:
    """All runs and evaluations under some paths, read only: relations over the views runs, rollouts, updates, samples,
    tokens, evaluations, evals, events, ..."""

    def __init__(self, folders: Sequence[Path]) -> None:
        import duckdb

        self.folders = list(folders)
        self.connection = duckdb.connect(":memory:")
        _create_tables(self.connection)
        ids = dict(zip(self.folders, _run_ids(self.folders), strict=True))
        for folder, folder_id in ids.items():
            problems = _load_run(self.connection, folder, folder_id)
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
            raise SpecError(f"--sql: {_one_line(error)}") from None

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
            raise SpecError(f"--sql: {_one_line(error)}") from None

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


def committed_segments(folder: Path) -> list[Path]:
    """Journal segments of committed rollouts, and those that commit themselves. What was written without its `rollouts` row
    is not there."""
    files = sorted((folder / "journal").glob("*-*-*-*.parquet"))
    names = {*(file.name for file in files), *_held_segments(folder)}
    committed = {_place(name) for name in names if name.startswith("rollouts-")}
    return [file for file in files if file.name.split("-")[0] in BY_ITSELF or _place(file.name) in committed]


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is one of `clipctl eval`; its spec.json or its status.json says so."""
    return any(_read_json(folder / name, []).get("kind") == EVALUATION for name in ("spec.json", "status.json"))


def _place(segment: str) -> str:
    """Attempt and rollout of a segment's name."""
    return "-".join(segment.split("-")[1:3])


def _load_run(connection: "duckdb.DuckDBPyConnection", folder: Path, run_id: str) -> list[str]:
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
            problems.append(f"{file.name} is damaged ({_one_line(error)})")
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
        problems.append(f"metrics.duckdb is damaged ({_one_line(error)})")
        return [], set()


def _held_segments(folder: Path) -> set[str]:
    return _read_store(folder, [])[1]


def _create_tables(connection: "duckdb.DuckDBPyConnection") -> None:
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


def _insert_evaluation(
    connection: "duckdb.DuckDBPyConnection", folder: Path, ids: Mapping[Path, str], problems: list[str]
) -> None:
    """One evaluation's folder: its state, and the run that it evaluated, under the id that this run has here."""
    status = _usable_status(_read_json(folder / "status.json", problems), problems)
    run = _read_json(folder / "spec.json", problems).get("run")
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
    status = _usable_status(_read_json(folder / "status.json", problems), problems)
    spec_text = _read_text(folder / "spec.json")
    spec = _read_json(folder / "spec.json", problems)
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


def _usable_status(status: dict[str, Any], problems: list[str]) -> dict[str, Any]:
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
                listed = ", ".join(f"'{_quoted(file)}'" for file in files)
                parts.append(
                    f"select '{run_id.replace(chr(39), chr(39) * 2)}' as run_id, * exclude (run_id) "
                    f"from read_parquet([{listed}], union_by_name = true)"
                )
        connection.execute(f"create view raw_{table} as {' union all by name '.join(parts)}")


def _current(table: str) -> str:
    """Rows of a raw table without those that a later attempt has done again."""
    return (
        f"(select * from raw_{table} as t where not exists (select 1 from resumes as r where r.run_id = t.run_id "
        "and r.attempt > t.attempt and t.rollout >= r.resumed_at))"
    )


def _evaluated(table: str) -> str:
    """Rows of an evaluation table with the evaluation's id and the run that was evaluated, without what a later attempt of
    a run trained anew. folder_id: where they are stored."""
    return f"""(select t.* exclude (run_id), t.run_id as folder_id, f.eval_id is not null as in_folder,
        case when f.eval_id is null then t.run_id else f.run_id end as run_id,
        case when f.eval_id is null then t.run_id || '@' || t.rollout else f.eval_id end as eval_id,
        f.path, f.problem, coalesce(f.message, '') as message,
        case when f.eval_id is null then 'finished' else f.state end as state
        from raw_{table} as t left join evaluation_folders as f on f.eval_id = t.run_id
        where not exists (select 1 from resumes as r where r.run_id = t.run_id
            and r.attempt > t.attempt and t.rollout > r.resumed_at))"""


EVALUATIONS = f"""(select * from {_evaluated("evaluations")}
    qualify row_number() over (partition by folder_id, rollout, benchmark order by attempt desc, seconds desc) = 1)"""
"""One row for each evaluation and benchmark: of a run's own the last attempt's; an evaluation's folder is written when it
begins and when it ends."""
EVALS = f"""(select e.* from {_evaluated("evals")} as e join {EVALUATIONS} as v on e.folder_id = v.folder_id
    and e.benchmark = v.benchmark and e.rollout is not distinct from v.rollout and (v.in_folder or e.attempt = v.attempt))"""
"""The samples of these evaluations; an evaluation's folder has those of all its attempts, each once."""


def _shares(prefix: str, parts: Sequence[str], named: str) -> str:
    """Summed parts as shares of what pulls at all."""
    gross = " + ".join(f"abs(sum({prefix}{part}))" for part in parts)
    return ", ".join(f"sum({prefix}{part}) / nullif({gross}, 0) as {named}{part}" for part in parts)


VIEWS: dict[str, str] = {
    "rollouts": f"""create view rollouts as select
        run_id, attempt, rollout, time, prompts, responses, tokens,
        reward_sum / responses as reward_mean,
        correct / nullif(graded, 0) as mean_at_group,
        groups_correct / prompts as pass_at_group,
        entropy_response_sum / nullif(responses_scored, 0) as entropy,
        entropy_token_sum / nullif(tokens_scored, 0) as entropy_token_mean,
        entropy_response_sum / nullif(responses_scored, 0)
            / max(entropy_response_sum / nullif(responses_scored, 0)) filter (rollout = 0) over (partition by run_id)
            as entropy_normalized,
        tokens / responses as response_tokens_mean,
        truncated, groups_zero_advantage, refills, mismatch_max,
        mismatch_sum / nullif(tokens_scored, 0) as mismatch_mean,
        seconds_sample, seconds_reward, seconds_score, seconds_update,
        reward_sum, reward_sq_sum, graded, correct, groups_correct, no_answer, grader_failures, responses_scored,
        tokens_scored, entropy_response_sum, entropy_token_sum, mismatch_sum
        from {_current("rollouts")}""",
    "updates": f"""create view updates as select
        run_id, attempt, rollout, inner_step, loss, grad_norm, lr, responses, tokens, tokens_advantage, eps_low, eps_high,
        clip_low, clip_high, ratio_low, ratio_high, ratio_min, ratio_max, noise_max,
        entropy_token_sum / nullif(tokens, 0) as entropy_token_mean,
        clip_low / nullif(tokens, 0) as clip_low_fraction,
        clip_high / nullif(tokens, 0) as clip_high_fraction,
        clip_low / nullif(tokens_advantage, 0) as clip_low_fraction_advantage,
        clip_high / nullif(tokens_advantage, 0) as clip_high_fraction_advantage,
        ratio_low / nullif(tokens, 0) as ratio_low_fraction,
        ratio_high / nullif(tokens, 0) as ratio_high_fraction,
        ratio_sum / nullif(tokens, 0) as ratio_mean,
        kl_sum / nullif(tokens, 0) as kl,
        {", ".join(LEDGER)},
        pg_reward + pg_clip_low + pg_clip_high as pg_total,
        npg_reward + npg_clip_low + npg_clip_high as npg_total,
        {", ".join(f"{total} / nullif({mass}, 0) as {gap}" for gap, (total, mass) in GAPS.items())},
        ratio_sum, kl_sum, entropy_token_sum
        from {_current("updates")}""",
    "histograms": f"create view histograms as select * from {_current('histograms')}",
    "probes": f"""create view probes as select
        p.run_id, p.attempt, p.rollout, p.inner_step, states,
        entropy_before_sum / states as entropy_before, entropy_after_sum / states as entropy_after,
        (entropy_after_sum - entropy_before_sum) / states as entropy_change,
        {", ".join(f"network_{name}" for name in NETWORK)},
        u.pg_total as ledger_pg, u.npg_total as ledger_npg,
        {
        ", ".join(
            f"{kind}_{total} / nullif({kind}_{mass}, 0) as {kind}_{gap}"
            for kind in ("exact", "sampled")
            for gap, (total, mass) in GAPS.items()
        )
    },
        {
        ", ".join(
            f"{kind}_{event}_mass / states as {kind}_{letter}"
            for kind in ("exact", "sampled")
            for event, letter in (("x", "p"), ("y", "q"))
        )
    },
        {", ".join(f"{kind}_{name}" for kind in ("exact", "sampled") for name in MASSES)},
        entropy_before_sum, entropy_after_sum
        from {_current("probes")} as p left join updates as u using (run_id, attempt, rollout, inner_step)""",
    "predictions": "create view predictions as "
    + " union all ".join(
        f"""select run_id, '{name}' as predictor, count({name}) as probed,
        avg((sign({name}) = sign(entropy_change))::int) filter ({name} is not null) as sign_agreement,
        case when isnan(corr(entropy_change, {name})) then null else corr(entropy_change, {name}) end as correlation,
        case when isnan(regr_slope(entropy_change, {name})) then null else regr_slope(entropy_change, {name}) end as slope
        from probes group by run_id having count({name}) > 0"""
        for name in ("ledger_pg", "ledger_npg", "network_total")
    ),
    "ledger": "create view ledger as "
    + " union all ".join(
        [
            f"""select run_id, '{step}' as step, count({name}_reward) as updates,
        {_shares(f"{name}_", ("reward", "clip_low", "clip_high"), "pull_")},
        null::double as pull_momentum, null::double as pull_decay,
        avg(({name}_clip_low > 0)::int) filter (clip_low > 0) as clip_low_up,
        avg(({name}_clip_high < 0)::int) filter (clip_high > 0) as clip_high_down,
        avg((x_{name} >= 0)::int) filter (x_mass > 0) as inequality_low,
        avg((y_{name} >= 0)::int) filter (y_mass > 0) as inequality_high,
        any_value(sign_agreement) as sign_agreement, any_value(correlation) as correlation, null::double as slope
        from updates left join (select * from predictions where predictor = 'ledger_{name}') using (run_id)
        group by run_id having count({name}_reward) > 0"""
            for name, step in (("pg", "1 policy gradient"), ("npg", "2 natural gradient"))
        ]
        + [
            f"""select run_id, '3 through the network', count(network_total),
        {_shares("network_", NETWORK[1:], "pull_")},
        avg((network_clip_low > 0)::int) filter (network_clip_low <> 0),
        avg((network_clip_high < 0)::int) filter (network_clip_high <> 0), null, null,
        any_value(sign_agreement), any_value(correlation), any_value(slope)
        from probes left join (select * from predictions where predictor = 'network_total') using (run_id)
        group by run_id having count(network_total) > 0"""
        ]
    ),
    "noise": f"create view noise as select * from {_current('noise')}",
    "texts": f"create view texts as select * from {_current('texts')}",
    "samples": f"""create view samples as select s.*, x.text from {_current("samples")} as s
        left join raw_texts as x using (run_id, attempt, rollout, position, sample)""",
    "tokens": f"create view tokens as select * from {_current('tokens')}",
    "evaluations": f"""create view evaluations as
        with per_problem as (
            select folder_id, rollout, benchmark, position, count(*) as samples, sum(correct::int) as correct,
                sum(tokens) as tokens, sum(truncated::int) as truncated, count(*) filter (outcome = 'no_answer') as no_answer,
                count(*) filter (outcome in ('timeout', 'crash', 'too_long')) as grader_failures
            from {EVALS} group by all
        ),
        summed as (
            select folder_id, rollout, benchmark, count(*) as problems_done, sum(samples)::bigint as samples,
                sum(correct)::bigint as correct, avg(correct / samples) as mean_at_k,
                avg((correct > 0)::int) as pass_at_k, sum(tokens)::bigint as tokens, sum(truncated)::bigint as truncated,
                sum(no_answer)::bigint as no_answer, sum(grader_failures)::bigint as grader_failures
            from per_problem group by all
        )
        select v.eval_id, v.run_id, v.attempt, v.rollout, v.state, v.model, v.benchmark, v.problems, s.problems_done,
        coalesce(s.problems_done, 0) = v.problems as complete, v.k, v.temperature, v.top_p, v.max_tokens, v.seed,
        s.samples, s.correct, s.mean_at_k, s.pass_at_k, s.tokens, s.tokens / s.samples as response_tokens_mean,
        s.truncated, s.no_answer, s.grader_failures, v.grader, v.grader_version, v.source, v.problems_of, v.template,
        v.template_hash, v.chat_template_hash, v.dataset_hash, v.model_hash, v.settings::json as settings, v.reused_from,
        v.started_at, v.seconds, v.path, v.message, v.problem
        from {EVALUATIONS} as v left join summed as s on s.folder_id = v.folder_id and s.benchmark = v.benchmark
            and s.rollout is not distinct from v.rollout""",
    "evals": f"""create view evals as select e.eval_id, e.run_id, e.attempt, e.rollout, e.benchmark, e.problem_id,
        e.problem_hash, e.position, e.sample, e.outcome, e.correct, e.tokens, e.truncated, e.answer, e.logprob_sum, x.text
        from {EVALS} as e left join raw_eval_texts as x on x.run_id = e.folder_id and x.attempt = e.attempt
            and x.rollout is not distinct from e.rollout and x.benchmark = e.benchmark and x.position = e.position
            and x.sample = e.sample""",
    "events": "create view events as select time, run_id, attempt, rollout, kind, message, data::json as data from raw_events",
}

METRICS: dict[str, str] = {
    "prompts": "groups sampled, those that dynamic sampling dropped included",
    "responses": "prompts × group size",
    "tokens": "response tokens (rollouts: of all that was sampled; updates: of the optimizer batch)",
    "reward_sum": "Σ reward, with the overlong penalty",
    "reward_sq_sum": "Σ reward²",
    "reward_mean": "reward_sum / responses",
    "graded": "responses that a grader looked at",
    "correct": "responses graded correct",
    "groups_correct": "groups with at least one correct response",
    "mean_at_group": "correct / graded",
    "pass_at_group": "groups_correct / prompts",
    "no_answer": "responses in which the grader found no answer",
    "grader_failures": "gradings that ended as timeout, crash or too_long",
    "responses_scored": "responses that were trained on, and so scored",
    "tokens_scored": "their tokens",
    "entropy_response_sum": "Σ over scored responses of the mean over its tokens of H(π), nats",
    "entropy": "entropy_response_sum / responses_scored",
    "entropy_token_sum": "Σ H(π) over tokens, nats (rollouts: under π_old; updates: under the policy before the step)",
    "entropy_token_mean": "entropy_token_sum / tokens",
    "entropy_normalized": "entropy / entropy of rollout 0",
    "response_tokens_mean": "tokens / responses",
    "truncated": "responses cut at the maximum length",
    "groups_zero_advantage": "sampled groups whose rewards are all equal",
    "refills": "times that dynamic sampling drew again",
    "mismatch_max": "largest |log π(trainer) - log π(sampler)| of a token, nats",
    "mismatch_sum": "its sum over scored tokens",
    "mismatch_mean": "mismatch_sum / tokens_scored",
    "seconds_sample": "wall time of sampling",
    "seconds_reward": "wall time of decoding, grading and advantages",
    "seconds_score": "wall time of scoring π_old",
    "seconds_update": "wall time of all updates",
    "loss": "-Σ w·objective over the optimizer batch",
    "grad_norm": "2-norm of the gradient before it was cut to optim.grad_clip",
    "lr": "learning rate",
    "tokens_advantage": "tokens with A ≠ 0",
    "eps_low": "ε_low in force",
    "eps_high": "ε_high in force",
    "clip_low": "tokens with A < 0 and r < 1 - ε_low (samples, tokens: summed over the updates of the rollout)",
    "clip_high": "tokens with A > 0 and r > 1 + ε_high (samples, tokens: the same)",
    "ratio_low": "tokens with r < 1 - ε_low, whatever A",
    "ratio_high": "tokens with r > 1 + ε_high, whatever A",
    "clip_low_fraction": "clip_low / tokens",
    "clip_high_fraction": "clip_high / tokens",
    "clip_low_fraction_advantage": "clip_low / tokens_advantage",
    "clip_high_fraction_advantage": "clip_high / tokens_advantage",
    "ratio_low_fraction": "ratio_low / tokens",
    "ratio_high_fraction": "ratio_high / tokens",
    "ratio_sum": "Σ r, r = π/π_old",
    "ratio_mean": "ratio_sum / tokens",
    "ratio_min": "smallest r",
    "ratio_max": "largest r",
    "kl_sum": "Σ (r - 1 - log r), tokens from π_old: estimates KL(π_old ‖ π)",
    "kl": "kl_sum / tokens",
    "noise_max": "largest |log r| at inner step 0, NULL at others",
    "pg_reward": "Σ w A e, e = r (E[Q] - Q(a)): the pull on entropy of a policy-gradient step as if nothing were clipped",
    "pg_clip_low": "-Σ w A e over clip_low tokens: what clip-low took away of it",
    "pg_clip_high": "-Σ w A e over clip_high tokens: what clip-high took away",
    "pg_total": "pg_reward + pg_clip_low + pg_clip_high",
    "npg_reward": "Σ w A e, e = r (-log π(a) - H): the same for a natural policy-gradient step",
    "npg_clip_low": "-Σ w A e over clip_low tokens",
    "npg_clip_high": "-Σ w A e over clip_high tokens",
    "npg_total": "npg_reward + npg_clip_low + npg_clip_high",
    "x_mass": "Σ w r over X = {r < 1 - ε_low}, whatever A: an expectation under π",
    "x_pg": "Σ w r (E[Q] - Q(a)) over X",
    "x_npg": "Σ w r (-log π(a) - H) over X",
    "y_mass": "Σ w r over Y = {r > 1 + ε_high}",
    "y_pg": "Σ w r (E[Q] - Q(a)) over Y",
    "y_npg": "Σ w r (-log π(a) - H) over Y",
    "gap7_low": "x_pg / x_mass: E[Q] - E[Q|X], inequality (7) where ≥ 0",
    "gap7_high": "y_pg / y_mass: E[Q] - E[Q|Y]",
    "gap8_low": "x_npg / x_mass: E[-log π|X] - H, inequality (8) where ≥ 0",
    "gap8_high": "y_npg / y_mass: E[-log π|Y] - H",
    "advantage_sign": "sign of A of a histogram's bin: -1, 0, 1",
    "ratio_from": "lower edge of r of the bin (belongs to it below 1)",
    "ratio_to": "upper edge of r of the bin (belongs to it above 1)",
    "pg": "Σ w |A| e of the bin's tokens, e = r (E[Q] - Q(a))",
    "npg": "Σ w |A| e of the bin's tokens, e = r (-log π(a) - H)",
    "states": "probe states, the same before and after the update",
    "entropy_before_sum": "Σ H over the probe states before the update, nats",
    "entropy_after_sum": "the same after it",
    "entropy_before": "entropy_before_sum / states",
    "entropy_after": "entropy_after_sum / states",
    "entropy_change": "entropy_after - entropy_before, nats: the observed change",
    "ledger_pg": "pg_total of the update: proportional to the change that a tabular policy would make",
    "ledger_npg": "npg_total of the update",
    "network_total": "⟨∇H, Δθ⟩ with H the probe's mean entropy and the optimizer's actual step: the change predicted, nats",
    "network_reward": "its part from the objective's gradient as if nothing were clipped",
    "network_clip_low": "its part from what clip-low removed of the gradient",
    "network_clip_high": "its part from what clip-high removed of the gradient",
    "network_momentum": "its part from earlier gradients (AdamW's first moment)",
    "network_decay": "its part from weight decay",
    **{
        f"{kind}_{name}": f"{text} over the probe states, {how}"
        for kind, how in (("exact", "over the whole vocabulary"), ("sampled", "from their sampled tokens"))
        for name, text in {
            "x_mass": "Σ p, p = P_π(X),",
            "x_pg": "Σ p (E[Q] - E[Q|X])",
            "x_npg": "Σ p (E[-log π|X] - H)",
            "y_mass": "Σ q, q = P_π(Y),",
            "y_pg": "Σ q (E[Q] - E[Q|Y])",
            "y_npg": "Σ q (E[-log π|Y] - H)",
            "p": "mean p",
            "q": "mean q",
            "gap7_low": "x_pg / x_mass",
            "gap7_high": "y_pg / y_mass",
            "gap8_low": "x_npg / x_mass",
            "gap8_high": "y_npg / y_mass",
        }.items()
    },
    **{
        f"pull_{part}": f"sum of the {what} over all updates (or probes) / Σ over the parts of |their sums|"
        for part, what in {
            "reward": "reward terms",
            "clip_low": "clip-low terms",
            "clip_high": "clip-high terms",
            "momentum": "network_momentum",
            "decay": "network_decay",
        }.items()
    },
    "clip_low_up": "share of updates with clip_low > 0 whose clip-low term is positive",
    "clip_high_down": "share of updates with clip_high > 0 whose clip-high term is negative",
    "inequality_low": "share of updates with X not empty in which the low side of (7) (policy gradient) or (8) (natural) holds",
    "inequality_high": "the same of the high side, with Y",
    "updates": "updates (or probes) that the row is made of",
    "probed": "probed updates that have the prediction",
    "sign_agreement": "share of them in which prediction and observed change have one sign",
    "correlation": "Pearson correlation of observed change and prediction",
    "slope": "least-squares slope of the observed change on the prediction",
    "quantile": "of the null distribution of log r",
    "log_ratio": "that quantile of log r between two scorings by the same weights, nats",
    "abs_log_ratio": "that quantile of |log r|",
    "reward": "of one response, with the overlong penalty",
    "advantage": "reward - group mean; 0 for groups of equal rewards",
    "logprob_sum": "Σ log π over the response's tokens, nats (samples: π_old of the trainer; evals: the sampler's, cut by top_p)",
    "logprob": "log π_old of a token, nats",
    "sampler_logprob": "the sampler's log-probability of a token, nats",
    "samples": "samples evaluated so far",
    "problems": "problems to evaluate",
    "problems_of": "problems that the benchmark has",
    "problems_done": "problems evaluated so far",
    "k": "samples of each problem",
    "temperature": "of the sampler",
    "top_p": "nucleus of the sampler",
    "max_tokens": "longest response, tokens",
    "seed": "key of the draws",
    "mean_at_k": "mean over problems of correct / samples",
    "pass_at_k": "share of the problems with at least one correct sample: pass@k at k = n",
    "seconds": "wall time of the evaluation",
}
"""Formula of every stored or derived number; README's table is this dict."""


def _lock(connection: "duckdb.DuckDBPyConnection", folders: Sequence[Path]) -> None:
    """From here on the connection reads the runs' folders and nothing else, and no setting can change."""
    listed = ", ".join(f"'{_quoted(folder)}'" for folder in folders)
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


def _write_whole(file: Path, content: bytes) -> None:
    """The file with new content, or, after a crash, with its old one."""
    beside = file.with_name(f".{file.name}")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.rename(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def _read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError:
        content = None
    if isinstance(content, dict):
        return content
    problems.append(f"{file.name} is {'damaged' if file.is_file() else 'missing'}")
    return {}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _utc() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _now() -> str:
    return datetime.now(UTC).isoformat()
