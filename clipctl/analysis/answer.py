"""What a view is asked and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError
from clipctl.store import Runs

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of views. grid: `clip.low=V1,V2` and `clip.high=...`. by: spec keys to group runs by. rollout, prompt: of the
    samples to show. rollouts: rows of every rollout where the view has a summary. k: of pass@k; None: the samples of a
    problem. benchmark: names of those to show, none: all."""

    grid: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    rollout: int | None = None
    prompt: str | None = None
    rollouts: bool = False
    k: int | None = None
    benchmark: tuple[str, ...] = ()


OPTION_OF = {
    "grid": ("what-if",),
    "by": ("overview", "entropy", "clip", "ledger", "passk", "compare", "frontier"),
    "rollout": ("samples",),
    "prompt": ("samples",),
    "rollouts": ("ledger",),
    "k": ("passk", "frontier"),
    "benchmark": ("passk", "frontier"),
}
"""The views that each option belongs to."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A view's table, and what it has to say about runs that lack its numbers, one line each."""

    table: "pa.Table"
    notes: tuple[str, ...] = ()


def check_options(view: str, options: Options) -> None:
    """Raises SpecError for an option that the view does not have."""
    for field in fields(options):
        if getattr(options, field.name) not in ((), None, False) and view not in OPTION_OF[field.name]:
            raise SpecError(f"--{field.name}: belongs to --view {', '.join(OPTION_OF[field.name])}, not to {view}")


ALONE = {
    "--follow": "shows runs as they go",
    "--html": "writes one page of all views",
    "--export": "writes folders for another tracker",
    "--sql": "is an answer of its own",
}
"""Options that take the place of a view, and what they do instead."""
WITH_SQL = ("--format", "--out")


def check_together(given: Sequence[str]) -> None:
    """Raises SpecError for options of `clipctl analyze` that do not go together: those of ALONE go with nothing, but for
    WITH_SQL with --sql. given: the options on the command line."""
    for way in (option for option in ALONE if option in given):
        others = [option for option in given if option != way and not (way == "--sql" and option in WITH_SQL)]
        if others:
            taken = "goes with --format and --out alone" if way == "--sql" else "goes with no other option"
            raise SpecError(f"{way}: {ALONE[way]} and {taken}; leave {', '.join(others)} out")


def without(runs: Runs, found: Sequence[str], view: str, what: str) -> tuple[str, ...]:
    """A note for each run that the view found nothing of. Raises SpecError where it found nothing at all.

    what: the missing numbers and why a run may lack them.
    """
    there = set(found)
    missing = [
        name
        for (name,) in runs.sql("select run_id from runs order by created_at, run_id").fetchall()
        if name not in there
    ]
    if not there:
        raise SpecError(f"--view {view}: none of these runs has {what}")
    return tuple(f"{name}: no {what}" for name in missing)


def as_arrow(rows: Sequence[dict[str, Any]]) -> "pa.Table":
    """Rows of equal keys as an Arrow table."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows))
