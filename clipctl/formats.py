"""Printing an Arrow table: as aligned columns, JSON or CSV.

Model output and run names are data: they are never read as markup, and terminal escapes are made visible.
"""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
"""Of the JSON that `--format json` prints."""


def as_table(table: "pa.Table", terminal: bool) -> str:
    """Aligned columns; as wide as they need to be, whole in a pipe too."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field in table.schema:
        shown.add_column(Text(safe_text(field.name)), no_wrap=True, justify="right" if _numeric(field.type) else "left")
    rows = [[safe_text(_cell(value)) for value in row.values()] for row in table.to_pylist()]
    for row in rows:
        shown.add_row(*map(Text, row))
    widths = [max(map(_width, column)) for column in zip(table.column_names, *rows, strict=True)]
    buffer = io.StringIO()
    console = Console(file=buffer, width=sum(widths) + 4 * len(widths) + 4, force_terminal=False)
    console.print(shown)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def as_json(table: "pa.Table", terminal: bool) -> str:
    """`{"schema_version", "columns", "rows"}`; NULL is null, infinity the string "Infinity"."""
    rows = [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]
    answer = {"schema_version": SCHEMA_VERSION, "columns": table.column_names, "rows": rows}
    return json.dumps(answer, indent=1, default=str)


def as_csv(table: "pa.Table", terminal: bool) -> str:
    """Comma-separated, with a header; escapes are made visible on a terminal only."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow(
            safe_text(str(value)) if terminal and isinstance(value, str) else value for value in row.values()
        )
    return buffer.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[["pa.Table", bool], str]] = {"table": as_table, "json": as_json, "csv": as_csv}


def safe_text(text: str) -> str:
    """Text that a terminal shows and never obeys: control characters (C0, C1, ESC) and bidi controls made visible."""
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
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _numeric(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in safe_text(text))
