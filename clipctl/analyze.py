"""From the store to an answer in the terminal: an overview of runs, or one query, as a table, JSON or CSV.

Model output and run names are data: they are never read as markup, and terminal escapes are made visible.
"""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError
from clipctl.store import Runs, open_runs

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
"""Of the JSON that `--format json` prints."""
LAST = 5
"""Rollouts that "now" is the mean of."""

OVERVIEW = f"""
with r as (select *, max(rollout) over (partition by run_id) - rollout < {LAST} as late from rollouts),
per_run as (
    select run_id, count(*) as rollouts,
        max(entropy) filter (rollout = 0) as entropy_first,
        avg(entropy) filter (late) as entropy,
        avg(entropy_normalized) filter (late) as entropy_normalized,
        max(reward_mean) filter (rollout = 0) as reward_first,
        avg(reward_mean) filter (late) as reward,
        avg(mean_at_group) filter (late) as mean_at_group,
        avg(pass_at_group) filter (late) as pass_at_group,
        avg(response_tokens_mean) filter (late) as response_tokens
    from r group by run_id
),
clips as (
    select run_id, 100 * sum(clip_low) / nullif(sum(tokens), 0) as clip_low_percent,
        100 * sum(clip_high) / nullif(sum(tokens), 0) as clip_high_percent
    from updates group by run_id
)
select run_id as run, state, eps_low, eps_high, coalesce(rollouts, 0) as rollouts, entropy_first, entropy,
    entropy_normalized, clip_low_percent, clip_high_percent, reward_first, reward, mean_at_group, pass_at_group,
    response_tokens, problem
from runs left join per_run using (run_id) left join clips using (run_id)
order by created_at, run
"""


HEADINGS = {
    "eps_low": "ε_low",
    "eps_high": "ε_high",
    "entropy_first": "H first",
    "entropy": "H now",
    "entropy_normalized": "now/first",
    "clip_low_percent": "clip-low %",
    "clip_high_percent": "clip-high %",
    "reward_first": "reward first",
    "reward": "now",
    "mean_at_group": "mean@G",
    "pass_at_group": "pass@G",
    "response_tokens": "tokens",
}
"""Short headings of the overview on a terminal; JSON and CSV keep the full names."""


def analyze(paths: Sequence[Path], sql: str | None, output: str, terminal: bool) -> str:
    """The overview of all runs under the paths, or the answer to `sql`, as text.

    output: `table`, `json` or `csv`. terminal: whether the text goes to one, where escapes must not get through.
    Raises SpecError for a path that does not exist, an unknown format, or a query that is not one SELECT.
    """
    if output not in FORMATS:
        raise SpecError(f"--format: {output!r} is not one of {', '.join(FORMATS)}")
    with open_runs(paths) as runs:
        if not runs.folders:
            raise SpecError(f"analyze: no runs under {', '.join(map(str, paths))}; clipctl train makes one")
        if sql is not None:
            return FORMATS[output](runs.table(sql), terminal)
        table = overview(runs)
        if output == "table":
            table = table.rename_columns([HEADINGS.get(name, name) for name in table.column_names])
        return FORMATS[output](table, terminal)


def overview(runs: Runs) -> "pa.Table":
    """One row a run: state, ε, rollouts, and entropy, clip percentages, reward and correctness, first and now (the mean
    of the last 5 rollouts)."""
    table = runs.table(OVERVIEW)
    without_problems = table["problem"].null_count == len(table)
    return table.drop_columns(["problem"]) if without_problems else table


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
