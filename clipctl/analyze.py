"""From the store to an answer in the terminal: views of runs, or one query, as a table, JSON or CSV.

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
from clipctl.whatif import WhatIf, what_if

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


HEADINGS: dict[str, dict[str, str]] = {
    "overview": {
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
    },
    "ledger": {
        "step": "ledger of",
        "pull_reward": "reward",
        "pull_clip_low": "clip-low",
        "pull_clip_high": "clip-high",
        "pull_momentum": "momentum",
        "pull_decay": "decay",
        "clip_low_up": "low up",
        "clip_high_down": "high down",
        "inequality_low": "ineq. low",
        "inequality_high": "ineq. high",
        "sign_agreement": "signs agree",
    },
    "what-if": {
        "eps_low": "ε_low",
        "eps_high": "ε_high",
        "clip_low_percent": "clip-low %",
        "clip_high_percent": "clip-high %",
    },
}
"""Short headings on a terminal; JSON and CSV keep the full names."""


def ledger_view(runs: Runs, grid: Sequence[str]) -> "pa.Table":
    """Three rows a run: the ledger of a policy-gradient step, of a natural one, and the prediction through the network
    where the run has one. Raises SpecError where no run has a ledger."""
    _no_grid("ledger", grid)
    table = runs.table("select * from ledger order by run_id, step")
    if not len(table):
        raise SpecError("--view ledger: none of these runs has a stored ledger (runs of earlier versions have none)")
    return table


PROFILES = """
select run_id, advantage_sign, ratio_from, ratio_to, sum(tokens) as tokens, sum(pg) as pg, sum(npg) as npg
from histograms group by all order by all
"""
RUN_EPS = """
select run_id, r.eps_low, r.eps_high,
    coalesce(bool_and(u.eps_low = r.eps_low and u.eps_high = r.eps_high), false) as held
from runs as r left join updates as u using (run_id) group by all order by any_value(r.created_at), run_id
"""


def what_if_view(runs: Runs, grid: Sequence[str]) -> "pa.Table":
    """Clip mass and ledger terms of each run, all updates together, under the ε it had and under every pair of the grid.

    grid: `clip.low=V1,V2` and `clip.high=V1,V2`; a side without values keeps the run's own, and without any grid each
    clip is turned off once. To first order: the ratios are those of the run. Raises SpecError for an impossible grid.
    """
    import numpy as np
    import pyarrow as pa

    asked = parse_grid(grid)
    profiles = runs.table(PROFILES)
    of_run = np.array(profiles["run_id"].to_pylist(), dtype=object)
    columns = {name: profiles[name].to_numpy().astype(np.float64) for name in profiles.column_names[1:]}
    rows: list[dict[str, Any]] = []
    for run in runs.table(RUN_EPS).to_pylist():
        mine = of_run == run["run_id"]
        own = (run["eps_low"], run["eps_high"])
        if not mine.any() or None in own:
            rows.append(_what_if_row(run["run_id"], own, None, "the run has no histograms"))
            continue
        profile = {name: values[mine] for name, values in columns.items()}
        pairs = dict.fromkeys(
            [own, *((low, high) for low in asked["low"] or own[:1] for high in asked["high"] or own[1:])]
        )
        if not grid:
            pairs |= dict.fromkeys([(own[0], float("inf")), (1.0, own[1])])
        for pair in pairs:
            found = what_if(profile, eps_low=pair[0], eps_high=pair[1])
            marks = [
                "as run" if pair == own and run["held"] else "first order",
                "interpolated" if found.interpolated else "",
            ]
            rows.append(_what_if_row(run["run_id"], pair, found, ", ".join(filter(None, marks))))
    return pa.Table.from_pylist(rows)


def _what_if_row(run: str, eps: tuple[float | None, float | None], found: WhatIf | None, note: str) -> dict[str, Any]:
    terms = ("reward", "clip_low", "clip_high", "total")
    row: dict[str, Any] = {"run": run, "eps_low": eps[0], "eps_high": eps[1]}
    for side in ("clip_low", "clip_high"):
        row[f"{side}_percent"] = None if found is None else 100 * getattr(found, side) / max(found.tokens, 1)
    for algorithm in ("pg", "npg"):
        pull = None if found is None else getattr(found, algorithm)
        row |= {f"{algorithm}_{term}": None if pull is None else getattr(pull, term) for term in terms}
    return row | {"note": note}


def parse_grid(grid: Sequence[str]) -> dict[str, list[float]]:
    """`clip.low=0.1,0.2` and `clip.high=0.2,inf` as lists. Raises SpecError for other keys and impossible values."""
    found: dict[str, list[float]] = {"low": [], "high": []}
    for text in grid:
        key, _, values = text.partition("=")
        side = key.strip().removeprefix("clip.")
        if not key.strip().startswith("clip.") or side not in found:
            raise SpecError(f"--grid: {text!r} must be clip.low=V1,V2,... or clip.high=V1,V2,...")
        for value in values.split(","):
            try:
                number = float(value)
            except ValueError:
                raise SpecError(f"--grid: {value!r} in {text!r} is not a number") from None
            if not 0 <= number <= (1 if side == "low" else float("inf")):
                raise SpecError(
                    f"--grid: clip.{side} = {value} is not {'from 0 to 1' if side == 'low' else '0 or more'}"
                )
            found[side].append(number)
    return found


def _no_grid(view: str, grid: Sequence[str]) -> None:
    if grid:
        raise SpecError(f"--grid: belongs to --view what-if, not to {view}")


VIEW_NAMES: dict[str, Callable[[Runs, Sequence[str]], "pa.Table"]] = {
    "overview": lambda runs, grid: overview(runs, grid),
    "ledger": ledger_view,
    "what-if": what_if_view,
}
"""What `--view` takes."""


def analyze(
    paths: Sequence[Path],
    sql: str | None,
    output: str,
    terminal: bool,
    *,
    view: str = "overview",
    grid: Sequence[str] = (),
) -> str:
    """A view of all runs under the paths, or the answer to `sql`, as text.

    output: `table`, `json` or `csv`. terminal: whether the text goes to one, where escapes must not get through.
    Raises SpecError for a path that does not exist, an unknown format or view, or a query that is not one SELECT.
    """
    if output not in FORMATS:
        raise SpecError(f"--format: {output!r} is not one of {', '.join(FORMATS)}")
    if view not in VIEW_NAMES:
        raise SpecError(f"--view: {view!r} is not one of {', '.join(VIEW_NAMES)}")
    if sql is not None and (view != "overview" or grid):
        raise SpecError("--sql: an answer of its own; leave --view and --grid out")
    with open_runs(paths) as runs:
        if not runs.folders:
            raise SpecError(f"analyze: no runs under {', '.join(map(str, paths))}; clipctl train makes one")
        if sql is not None:
            return FORMATS[output](runs.table(sql), terminal)
        table = VIEW_NAMES[view](runs, grid)
        if output == "table":
            table = table.rename_columns([HEADINGS[view].get(name, name) for name in table.column_names])
        return FORMATS[output](table, terminal)


def overview(runs: Runs, grid: Sequence[str] = ()) -> "pa.Table":
    """One row a run: state, ε, rollouts, and entropy, clip percentages, reward and correctness, first and now (the mean
    of the last 5 rollouts)."""
    _no_grid("overview", grid)
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
