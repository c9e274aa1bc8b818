"""From the store to an answer in the terminal: views of runs, or one query, printed or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipctl.analysis import HEADINGS, VIEWS_OF_ANALYZE, Answer, Options, View, check_options
from clipctl.errors import SpecError
from clipctl.formats import FORMATS
from clipctl.plots import check_plot_path, save_chart
from clipctl.store import Runs, open_runs

if TYPE_CHECKING:
    import pyarrow as pa

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


OVERVIEW_HEADINGS = {
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
"""Short headings on a terminal; JSON and CSV keep the full names."""


@dataclass(frozen=True, slots=True)
class Printed:
    """An answer as text, and notes about what it lacks, for stderr."""

    text: str
    notes: tuple[str, ...] = ()


def analyze(
    paths: Sequence[Path],
    sql: str | None,
    output: str,
    terminal: bool,
    *,
    view: str = "overview",
    options: Options | None = None,
    plot: Path | None = None,
) -> Printed:
    """A view of all runs under the paths, or the answer to `sql`, as text; writes the view's chart to `plot`.

    output: `table`, `json` or `csv`. terminal: whether the text goes to one, where escapes must not get through.
    Raises SpecError for a path that does not exist, an unknown format, view or suffix, an option of another view, or a query
    that is not one SELECT; StoreError where the plot cannot be written.
    """
    options = options or Options()
    if output not in FORMATS:
        raise SpecError(f"--format: {output!r} is not one of {', '.join(FORMATS)}")
    if view not in VIEW_NAMES:
        raise SpecError(f"--view: {view!r} is not one of {', '.join(VIEW_NAMES)}")
    check_options(view, options)
    if sql is not None and (view != "overview" or plot is not None or options != Options()):
        raise SpecError("--sql: an answer of its own; leave --view, its options and --plot out")
    if plot is not None:
        check_plot_path(plot)
    with open_runs(paths) as runs:
        if not runs.folders:
            raise SpecError(f"analyze: no runs under {', '.join(map(str, paths))}; clipctl train makes one")
        if sql is not None:
            return Printed(FORMATS[output](runs.table(sql), terminal))
        answer = VIEW_NAMES[view](runs, options)
        table, short = answer.table, HEADINGS.get(view, OVERVIEW_HEADINGS if view == "overview" else {})
        if output == "table":
            table = table.rename_columns([short.get(name, name) for name in table.column_names])
        if plot is not None:
            from clipctl.charts import chart

            save_chart(chart(view, runs, options), plot)
        return Printed(FORMATS[output](table, terminal), answer.notes)


def overview(runs: Runs) -> "pa.Table":
    """One row a run: state, ε, rollouts, and entropy, clip percentages, reward and correctness, first and now (the mean
    of the last 5 rollouts)."""
    table = runs.table(OVERVIEW)
    without_problems = table["problem"].null_count == len(table)
    return table.drop_columns(["problem"]) if without_problems else table


VIEW_NAMES: dict[str, View] = {"overview": lambda runs, options: Answer(overview(runs)), **VIEWS_OF_ANALYZE}
"""What `--view` takes."""
