"""Files that are complete or absent: Parquet segments, and small files with new content.

A segment is written under another name, fsynced and renamed, with a digest of its content in its name.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipctl.schema import arrow_schema


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
        sync(beside)
        beside.rename(journal / f"{stem}-{digest(beside.read_bytes())}.parquet")
        sync(journal)
    finally:
        beside.unlink(missing_ok=True)


def digest(content: bytes) -> str:
    """Sixteen hex digits of XXH3-64: ten times as fast as reading, so that whole runs can be checked at every look."""
    from xxhash import xxh3_64_hexdigest

    return str(xxh3_64_hexdigest(content))


def is_whole(content: bytes, name: str) -> bool:
    """Whether a segment is what was written, by the digest in its name; earlier versions took eight digits of BLAKE2b."""
    written = name.removesuffix(".parquet").rsplit("-", 1)[1]
    found = hashlib.blake2b(content, digest_size=4).hexdigest() if len(written) == 8 else digest(content)
    return found == written


def is_whole_file(file: Path) -> bool:
    """The same of a segment that is not read now, a quarter of a megabyte at a time. Raises OSError."""
    if len(file.stem.rsplit("-", 1)[1]) == 8:
        return is_whole(file.read_bytes(), file.name)
    from xxhash import xxh3_64

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxh3_64).hexdigest() in file.name


def write_whole(file: Path, content: bytes) -> None:
    """The file with new content, or, after a crash, with its old one."""
    beside = file.with_name(f".{file.name}")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.rename(file)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
