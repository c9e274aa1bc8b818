"""From the store to an answer: views of runs, or one query, printed, written or drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clipctl.analysis import HEADINGS, Options, check_options
from clipctl.errors import SpecError
from clipctl.formats import encoded, format_of, write_out
from clipctl.limits import each_in_time
from clipctl.notebook import VIEW_NAMES
from clipctl.overview import shown
from clipctl.plots import check_plot_path, save_chart
from clipctl.store import SECONDS, Runs, open_runs

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST = SECONDS + 5
"""Seconds in which a part of the answer to `--sql` must be there: DuckDB ends nearly all queries before."""


@dataclass(frozen=True, slots=True)
class Printed:
    """An answer in parts, as they are found, and notes about what it lacks, for stderr."""

    parts: Iterator[bytes] = field(default_factory=lambda: iter(()))
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All parts that are left."""
        return b"".join(self.parts).decode().rstrip("\n")


def analyze(
    paths: Sequence[Path],
    sql: str | None,
    output: str | None,
    terminal: bool,
    *,
    view: str = "overview",
    options: Options | None = None,
    plot: Path | None = None,
    out: Path | None = None,
    width: int | None = None,
) -> Printed:
    """A view of all runs under the paths, or the answer to `sql`; writes it to `out`, where that is given, and the view's
    chart to `plot`.

    output: one of FORMATS, None for that of `out`'s suffix, else a table. terminal: whether the answer goes to one, where
    escapes must not get through. width: of that terminal, in characters. Raises SpecError for a path that does not exist,
    an unknown format, view or suffix, an option of another view, or a query that is not one SELECT, errors of a query also
    while the parts are taken; StoreError where a file cannot be written. A query that cannot be ended ends the process.
    """
    options = options or Options()
    output = format_of(output, out)
    if view not in VIEW_NAMES:
        raise SpecError(f"--view: {view!r} is not one of {', '.join(VIEW_NAMES)}")
    check_options(view, options)
    if sql is not None and (view != "overview" or plot is not None or options != Options()):
        raise SpecError("--sql: an answer of its own; leave --view, its options and --plot out")
    if plot is not None:
        check_plot_path(plot)
    runs = open_runs(paths)
    if not runs.folders:
        raise SpecError(f"analyze: no runs under {', '.join(map(str, paths))}; clipctl train makes one")
    notes: tuple[str, ...] = ()
    if sql is not None:
        batches = each_in_time(runs.batches(sql), LONGEST)
    else:
        answer = VIEW_NAMES[view](runs, options)
        batches, notes = iter(_headed(answer.table, view, output).to_batches(1 << 16)), answer.notes
        if plot is not None:
            from clipctl.charts import chart

            save_chart(chart(view, runs, options), plot)
    parts = encoded(_closing(runs, batches), output, terminal and out is None, width)
    if out is None:
        return Printed(parts, notes)
    write_out(parts, out)
    return Printed(notes=notes)


def _headed(table: "pa.Table", view: str, output: str) -> "pa.Table":
    """With short headings and, of the overview, the columns for people, where it is printed for them."""
    if output not in ("table", "md"):
        return table
    if view == "overview":
        return shown(table)
    short = HEADINGS.get(view, {})
    return table.rename_columns([short.get(name, name) for name in table.column_names])


def _closing(runs: Runs, batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
    try:
        yield from batches
    finally:
        runs.close()
