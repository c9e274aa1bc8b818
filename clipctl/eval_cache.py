"""Evaluations that were made once: rows by a key of all that they depend on, so that a sweep evaluates its base once.

One Parquet file an entry, `<key>-<digest of the content>.parquet`, in the folder `evaluations` of CLIPCTL_CACHE or of the
user's cache folder; written beside and renamed. What is damaged is as if it were not there.
"""

import fcntl
import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipctl.checkpoint import MANIFEST
from clipctl.schema import arrow_schema
from clipctl.segments import digest, sync

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.*")
KEYS = ("run_id", "attempt", "rollout")
"""Columns of `evals` that belong to a place, not to the numbers."""


def eval_cache_folder() -> Path:
    """Where evaluations are kept for reuse."""
    from platformdirs import user_cache_path

    set_by_user = os.environ.get("CLIPCTL_CACHE")
    return (Path(set_by_user) if set_by_user else user_cache_path("clipctl")) / "evaluations"


def model_hash(folder: Path) -> str:
    """32 hex digits of BLAKE2b over weights, configuration and tokenizer of a model's folder: names and contents.
    A checkpoint's manifest is not of the model."""
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)} - {folder / MANIFEST}):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        whole.update(f"{file.name} {content.hexdigest()}\n".encode())
    return whole.hexdigest()


def cache_key(facts: Mapping[str, Any]) -> str:
    """32 hex digits of BLAKE2b over the facts."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def find_entry(key: str) -> tuple[str, dict[str, list[Any]]] | None:
    """(id of the evaluation that made it, rows of `evals` with their texts by column); None where there is no whole one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in sorted(eval_cache_folder().glob(f"{key}-*.parquet")):
        try:
            content = file.read_bytes()
            if digest(content) != file.stem.rsplit("-", 1)[1]:
                continue
            table = pq.read_table(pa.BufferReader(content))
        except (OSError, pa.ArrowException):
            continue
        if table.schema.equals(_schema()):
            made_by = (table.schema.metadata or {}).get(b"eval_id", b"").decode()
            return made_by, {name: table[name].to_pylist() for name in table.column_names}
    return None


def save_entry(key: str, eval_id: str, rows: Mapping[str, list[Any]]) -> str | None:
    """Keeps the rows; returns why it could not, because no evaluation may fail for its cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = eval_cache_folder()
    schema = _schema()
    columns = {field.name: pa.array(rows[field.name], field.type) for field in schema}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema.with_metadata({"eval_id": eval_id})), buffer, compression="zstd")
    content = buffer.getvalue()
    beside = folder / f".{key}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        sync(beside)
        beside.rename(folder / f"{key}-{digest(content)}.parquet")
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        return f"{folder}: {error.strerror or error}"
    return None


@contextmanager
def hold(key: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the key against other processes, where the folder can be written and locked; a process that dies lets go.

    waiting: called when another process holds it, before waiting for it.
    """
    folder = eval_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{key}.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: at worst the same numbers are made twice.
            pass
        yield


def _schema() -> Any:
    import pyarrow as pa

    fields = [field for field in arrow_schema("evals") if field.name not in KEYS]
    return pa.schema([*fields, pa.field("text", pa.string())])
