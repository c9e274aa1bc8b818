"""How a running run looks: a live bar on a terminal, one plain line per rollout elsewhere, both on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipctl.evaluate import EvalReport
    from clipctl.train import Report

LINE_SECONDS = 10.0
"""Least time between two lines of an evaluation where there is no terminal."""


@contextmanager
def show_progress(
    steps: int, *, shown: bool = True
) -> Iterator[tuple[Callable[["Report"], None], Callable[[str], None]]]:
    """Two functions: one takes each rollout's report and shows it, one takes a warning and prints it above the bar. shown:
    False in all processes of a run but one."""
    if not shown:
        yield lambda report: None, lambda line: None
        return
    if not sys.stderr.isatty():
        yield lambda report: print_line(plain_line(report)), print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("rollout"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), expand=False) as progress:
        task = progress.add_task("starting", total=steps)
        yield (
            lambda report: progress.update(task, completed=report.rollout + 1, description=figures(report)),
            lambda line: progress.console.print(line, markup=False, highlight=False, soft_wrap=True),
        )


@contextmanager
def show_eval_progress() -> Iterator[tuple[Callable[["EvalReport"], None], Callable[[str], None]]]:
    """The same for an evaluation: a bar over problems, or a line now and then and when all are done."""
    if not sys.stderr.isatty():
        last = [-LINE_SECONDS]

        def report_line(report: "EvalReport") -> None:
            if monotonic() - last[0] >= LINE_SECONDS or report.problems == report.problems_of:
                last[0] = monotonic()
                print_line(f"evaluated {report.problems}/{report.problems_of} problems  {eval_figures(report)}")

        yield report_line, print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("problems"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), expand=False) as progress:
        task = progress.add_task("starting", total=None)
        yield (
            lambda report: progress.update(
                task, completed=report.problems, total=report.problems_of, description=eval_figures(report)
            ),
            lambda line: progress.console.print(line, markup=False, highlight=False, soft_wrap=True),
        )


def eval_figures(report: "EvalReport") -> str:
    """Share of correct samples and speed."""
    return f"correct {report.correct / max(report.samples, 1):.3f}  {report.tokens_per_second:.0f} tokens/s"


def print_line(line: str) -> None:
    """One line on stderr; a reader of the log that has gone away does not end a run."""
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def figures(report: "Report") -> str:
    """Reward, entropy, sided clip fractions and speed of one rollout."""
    entropy = "-" if report.entropy is None else f"{report.entropy:.3f}"
    return (
        f"reward {report.reward:.3f}  entropy {entropy}  clip-low {report.clip_low:.2%}  "
        f"clip-high {report.clip_high:.2%}  {report.tokens_per_second:.0f} tokens/s"
    )


def plain_line(report: "Report") -> str:
    """One line for a log file."""
    return (
        f"rollout {report.rollout + 1}/{report.steps}  {figures(report)}  "
        f"response {report.response_tokens:.1f} tokens  {report.seconds:.1f} s"
    )
