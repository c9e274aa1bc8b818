"""An Arrow table as text or bytes: aligned columns, JSON, CSV, Markdown, Parquet; all but the first and Markdown as they come.

Model output and run names are data: they are never read as markup, and terminal escapes are made visible.
"""

import csv
import io
import json
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
"""Of the JSON that `--format json` prints."""
LARGEST_TABLE = 1 << 26
"""Bytes of an answer that is laid out as a table, which has to be known whole."""
SUFFIXES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".md": "md", ".txt": "table"}
"""Format of a file by its suffix, where none is named."""


def as_table(table: "pa.Table", terminal: bool, width: int | None = None) -> str:
    """Aligned columns; as wide as they need to be, whole in a pipe too.

    width: of the terminal. What is wider is shown in several tables, each beginning with the first column, and texts wider
    than half of it as lines below.
    """
    from rich.cells import cell_len

    names = [safe_text(name) for name in table.column_names]
    rows = [[safe_text(_cell(value)) for value in row.values()] for row in table.to_pylist()]
    columns = [
        _aligned(column, right=_numeric(kind)) for *column, kind in zip(names, *rows, table.schema.types, strict=True)
    ]
    if width is None:
        return _beside(columns)
    widths = [cell_len(column[0]) for column in columns]
    long = [at for at in range(1, len(names)) if widths[at] > width // 2 and not _numeric(table.schema[at].type)]
    groups: list[list[int]] = [[0]]
    for at in (at for at in range(1, len(names)) if at not in long):
        if len(groups[-1]) > 1 and sum(widths[i] + 2 for i in groups[-1]) + widths[at] > width:
            groups.append([0])
        groups[-1].append(at)
    parts = [_beside([columns[at] for at in group]) for group in groups]
    for at in long:
        lines = [line for row in rows if row[at] for line in _folded(f"{row[0]}: {row[at]}", width)]
        parts.append("\n".join([names[at], *lines]))
    return "\n\n".join(parts)


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _aligned(cells: Sequence[str], *, right: bool) -> list[str]:
    """A heading and the cells below it, all as wide as the widest of them."""
    from rich.cells import cell_len

    widths = [cell_len(cell) for cell in cells]
    blanks = [" " * (max(widths) - width) for width in widths]
    return [blank + cell if right else cell + blank for cell, blank in zip(cells, blanks, strict=True)]


def _beside(columns: Sequence[Sequence[str]]) -> str:
    """Aligned columns as lines, with a rule below the headings."""
    from rich.cells import cell_len

    heading, *lines = map("  ".join, zip(*columns, strict=True))
    return "\n".join(line.rstrip() for line in (heading, "─" * cell_len(heading), *lines))


def as_csv(table: "pa.Table", terminal: bool) -> str:
    """Comma-separated, with a header; escapes are made visible on a terminal only."""
    return "".join(_csv(_batches(table), terminal)).rstrip("\n")


def as_json(table: "pa.Table", terminal: bool) -> str:
    """`{"schema_version", "columns", "rows"}`; NULL is null, infinity the string "Infinity"."""
    return "".join(_json(_batches(table), terminal)).rstrip("\n")


def encoded(batches: Iterable["pa.RecordBatch"], output: str, terminal: bool, width: int | None) -> Iterator[bytes]:
    """The answer in a format, as it comes. Raises SpecError for Parquet on a terminal and for too large a table."""
    if output == "parquet":
        if terminal:
            raise SpecError("--format: parquet is not for a terminal; name a file with --out, or pipe it")
        yield from _parquet(iter(batches))
    elif output == "table":
        yield (as_table(_gathered(batches), terminal, width) + "\n").encode(errors="replace")
    else:
        for text in TEXTS[output](batches, terminal):
            yield text.encode(errors="replace")


def write_out(parts: Iterable[bytes], path: Path) -> None:
    """The file, complete or as it was before. Raises StoreError where it cannot be written."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with beside.open("wb") as stream:
            stream.writelines(parts)
        beside.replace(path)
    except OSError as error:
        raise StoreError(f"--out: {path} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def format_of(output: str | None, out: Path | None) -> str:
    """The format that is named, else that of the file's suffix, else a table. Raises SpecError where they contradict."""
    by_suffix = SUFFIXES.get(out.suffix) if out is not None else None
    if output is not None and output not in FORMATS:
        raise SpecError(f"--format: {output!r} is not one of {', '.join(FORMATS)}")
    if output is not None and by_suffix not in (None, output):
        raise SpecError(f"--format {output} and --out {out} contradict each other; give one of them")
    if output is None and out is not None and by_suffix is None:
        raise SpecError(f"--out: {str(out)!r} has none of the suffixes {', '.join(SUFFIXES)}; name the --format")
    return output or by_suffix or "table"


def _csv(batches: Iterable["pa.RecordBatch"], terminal: bool) -> Iterator[str]:
    for number, batch in enumerate(batches):
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if number == 0:
            writer.writerow(map(safe_text, batch.schema.names) if terminal else batch.schema.names)
        for row in batch.to_pylist():
            writer.writerow(
                safe_text(str(value)) if terminal and isinstance(value, str) else value for value in row.values()
            )
        yield buffer.getvalue()


def _json(batches: Iterable["pa.RecordBatch"], terminal: bool) -> Iterator[str]:
    before = ""
    for number, batch in enumerate(batches):
        if number == 0:
            columns = json.dumps(batch.schema.names)
            yield f'{{"schema_version": {SCHEMA_VERSION}, "columns": {columns}, "rows": ['
        for row in batch.to_pylist():
            yield f"{before}\n{json.dumps(_json_value(row), default=str, allow_nan=False)}"
            before = ","
    yield "\n]}\n"


def _markdown(batches: Iterable["pa.RecordBatch"], terminal: bool) -> Iterator[str]:
    for number, batch in enumerate(batches):
        if number == 0:
            marks = ["---:" if _numeric(field.type) else "---" for field in batch.schema]
            yield f"| {' | '.join(map(markdown_cell, batch.schema.names))} |\n| {' | '.join(marks)} |\n"
        for row in batch.to_pylist():
            yield f"| {' | '.join(map(markdown_cell, row.values()))} |\n"


def markdown_cell(value: Any) -> str:
    """A value as text of a Markdown table or paragraph, in which nothing is markup."""
    text = safe_text(_cell(value))
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|~$" else character for character in text)


def _parquet(batches: Iterator["pa.RecordBatch"]) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    drain = _Drain()
    first = next(batches)
    schema = first.schema.with_metadata({"clipctl_answer_version": str(SCHEMA_VERSION)})
    with pq.ParquetWriter(drain, schema, compression="zstd") as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            yield drain.taken()
    yield drain.taken()


class _Drain(io.RawIOBase):
    """A stream that gives away what was written and still knows where it is."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._parts.append(content)
        self._at += len(content)
        return len(content)

    def taken(self) -> bytes:
        content = b"".join(self._parts)
        self._parts.clear()
        return content


def _gathered(batches: Iterable["pa.RecordBatch"]) -> "pa.Table":
    import pyarrow as pa

    kept: list[pa.RecordBatch] = []
    for batch in batches:
        kept.append(batch)
        if sum(part.nbytes for part in kept) > LARGEST_TABLE:
            raise SpecError("--format: the answer is too large for a table; take csv, json or parquet, or add a limit")
    return pa.Table.from_batches(kept)


def _batches(table: "pa.Table") -> list["pa.RecordBatch"]:
    """At least one, so that the columns are known."""
    import pyarrow as pa

    return table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]


TEXTS: dict[str, Callable[[Iterable["pa.RecordBatch"], bool], Iterator[str]]] = {
    "json": _json,
    "csv": _csv,
    "md": _markdown,
}
FORMATS = ("table", "json", "csv", "parquet", "md")
"""What `--format` takes."""


def safe_text(text: str) -> str:
    """Text that a terminal shows and never obeys: control characters (C0, C1, ESC) and bidi controls made visible."""
    if text.isprintable():
        return text
    return "".join(
        f"\\x{ord(character):02x}" if unicodedata.category(character) in ("Cc", "Cf", "Cs") else character
        for character in text.replace("\n", "⏎")
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, Decimal):  # DuckDB's sums of integers
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _numeric(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))
