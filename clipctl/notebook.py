"""Runs in Python and notebooks: queries and views as relations, charts that display inline."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from clipctl.analysis import VIEWS_OF_ANALYZE, Answer, Options, View, check_options
from clipctl.discover import find_folders
from clipctl.errors import SpecError
from clipctl.overview import overview
from clipctl.plots import styled
from clipctl.store import Runs

if TYPE_CHECKING:
    import duckdb

VIEW_NAMES: dict[str, View] = {"overview": lambda runs, options: Answer(overview(runs)), **VIEWS_OF_ANALYZE}
"""What `--view` takes."""


class OpenRuns(Runs):
    """Runs with the views of `clipctl analyze` and their charts."""

    def view(self, name: str, options: Options | None = None) -> "duckdb.DuckDBPyRelation":
        """The rows of a view, as a relation: `.df()`, `.pl()`, `.to_arrow_table()`, `.fetchall()`. Raises SpecError for an
        unknown view, an option of another one, and where no run has its numbers."""
        answer = VIEW_NAMES[_checked(name, options)](self, options or Options())
        return self.connection.from_arrow(answer.table)

    def chart(self, name: str, options: Options | None = None) -> Any:
        """The chart of a view: an altair chart, which a notebook displays. Raises as `view`."""
        from clipctl.charts import chart

        drawn = styled(chart(_checked(name, options), self, options))
        return _offline_chart().from_dict(drawn.to_dict(), validate=False)


@cache
def _offline_chart() -> Any:
    """The class of altair's sheets, displayed with the drawing library in the output: altair's own way fetches it from a
    network that a cluster's notebook may not have."""
    import altair

    class OfflineChart(altair.ConcatChart):
        def _repr_mimebundle_(self, *_: object, **__: object) -> dict[str, str]:
            return {"text/html": self.to_html(inline=True, fullhtml=False, output_div=f"clipctl-{uuid4().hex}")}

    return OfflineChart


def open_runs(paths: str | Path | Iterable[str | Path]) -> OpenRuns:
    """The runs and evaluations at or under the paths (or globs), finished, live or broken. Raises SpecError for a path that
    does not exist."""
    return OpenRuns(find_folders([paths] if isinstance(paths, str | Path) else paths))


def _checked(name: str, options: Options | None) -> str:
    if name not in VIEW_NAMES:
        raise SpecError(f"view: {name!r} is not one of {', '.join(VIEW_NAMES)}")
    check_options(name, options or Options())
    return name
