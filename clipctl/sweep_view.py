"""How a sweep looks: the table of its runs, a live table while it runs, and the commands that draw it."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipctl.sweep import Progress, Tell
from clipctl.sweep_folder import Placed, is_running
from clipctl.sweep_spec import SweepSpec, toml_text


def table_lines(placed: Sequence[Placed], *, retry_failed: bool = False) -> list[str]:
    """The runs, one a line: name, what varies, and what is left to do. retry_failed: of those that failed too."""
    axes = list(dict.fromkeys(key for place in placed for key in place.member.values))
    varying = [key for key in axes if len({str(place.member.values.get(key)) for place in placed}) > 1]
    rows = [["run", *varying, "rollouts", "to do"]]
    for place in placed:
        values = place.member.values
        shown = ["" if key not in values else _shown(values[key]) for key in varying]
        done = f"{place.rollouts}/{place.member.spec.run.steps}"
        rows.append([place.member.name, *shown, done, _to_do(place, retry_failed)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(map(_shown, value.values()))
    return value if isinstance(value, str) else toml_text(value)


def _to_do(place: Placed, retry_failed: bool) -> str:
    words = {
        "missing": "run it",
        "unfinished": "go on",
        "finished": "nothing: finished",
        "stopped": "nothing: stopped by an alarm",
        "failed": "run it again: failed" if retry_failed else "nothing without --retry-failed: failed",
    }[place.outlook]
    if place.damage:
        words += f": {place.damage}"
    if is_running(place.folder):
        words = "wait: it is being run"
    return words + (f", as {place.folder}" if place.shared else "")


def views_lines(sweep: SweepSpec, folder: Path) -> list[str]:
    """The commands that draw the sweep."""
    lines = []
    for at, view in enumerate(sweep.views):
        by = "".join(f" --by {key}" for key in view.by)
        by += "".join(f" --benchmark {name}" for name in view.benchmarks)
        by += f" --k {view.k}" if view.k else ""
        rollouts = " --rollouts" if view.rollouts else ""
        name = folder.name if at == 0 else f"{folder.name}-{view.view}"
        lines.append(f"clipctl analyze {folder} --view {view.view}{by}{rollouts} --plot {name}.png")
    return lines or [f"clipctl analyze {folder}"]


@contextmanager
def show_sweep(folder: Path) -> Iterator[tuple[Tell, Callable[[Progress], None]]]:
    """How a sweep looks, on stderr: on a terminal a live table of its runs, elsewhere a line for each start and end."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        from clipctl.progress import print_line

        yield print_line, lambda progress: None
        return
    from datetime import UTC, datetime

    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from clipctl.follow import many_runs
    from clipctl.formats import safe_text
    from clipctl.watch import Watcher

    console, watcher, drawn = Console(stderr=True), Watcher([folder]), [0.0]
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def watch(progress: Progress) -> None:
            if time.monotonic() - drawn[0] < 2.0 and progress.running:
                return
            now = datetime.now(UTC).replace(tzinfo=None)
            head = Text(f"{folder}: {progress.words}", style="bold")
            live.update(Group(head, many_runs(watcher.look(), now, console.width, console.height - 2)), refresh=True)
            drawn[0] = time.monotonic()

        yield lambda line: live.console.print(safe_text(line), markup=False, highlight=False, soft_wrap=True), watch
