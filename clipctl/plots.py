"""The one style of all charts, and writing them: PNG, SVG or a self-contained HTML page, without a browser or a network.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ in their dashes and markers too, for print.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError, StoreError

if TYPE_CHECKING:
    import altair as alt

SUFFIXES = (".png", ".svg", ".html")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 1], [1, 3], [10, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
GREY = "#b8b8b8"
MOST_NAMED = 12
"""Series that a legend names; of more, those that end highest and lowest."""
MOST_LETTERS = 44
"""Of a name in a legend."""


def check_plot_path(path: Path) -> None:
    """Raises SpecError for a suffix that is none of SUFFIXES, so that nothing is computed in vain."""
    if path.suffix not in SUFFIXES:
        raise SpecError(f"--plot: {str(path)!r} must end in {', '.join(SUFFIXES)}")


def series_scales(names: list[str]) -> dict[str, Any]:
    """`color`, `strokeDash` and `shape` scales that give every series a look of its own, in the order given: after a round
    of colours the dashes and shapes are shifted by one."""
    import altair as alt

    places = [(at % len(COLORS), (at + at // len(COLORS)) % len(COLORS)) for at in range(len(names))]
    return {
        "color": alt.Scale(domain=names, range=[COLORS[color] for color, _ in places]),
        "strokeDash": alt.Scale(domain=names, range=[DASHES[look] for _, look in places]),
        "shape": alt.Scale(domain=names, range=[SHAPES[look] for _, look in places]),
    }


@dataclass(frozen=True, slots=True)
class Legend:
    """How the series of a chart are named. labels: series → what the legend calls it; several series may be one label."""

    labels: Mapping[str, str]
    rest: str | None

    @property
    def domain(self) -> list[str]:
        return [*dict.fromkeys(self.labels.values())]

    def encodings(self) -> dict[str, Any]:
        """Colour, dash and shape of the field `label`; no legend for one series, which the title names."""
        import altair as alt

        names = self.domain
        scales = series_scales(names)
        if self.rest is not None:
            for scale, value in (("color", GREY), ("strokeDash", [1, 0])):
                scales[scale].range = [*scales[scale].range[:-1], value]
        legend = None
        if len(names) > 1:
            columns = 2 if max(map(len, names)) > 24 else 4
            legend = alt.Legend(
                title=None, orient="bottom", columns=columns, labelLimit=0, symbolOpacity=1, symbolStrokeWidth=0
            )
        common: dict[str, Any] = {"legend": legend, "sort": None}
        return {
            "color": alt.Color("label:N", scale=scales["color"], **common),
            # A dashed outline would fray the legend's marks.
            "strokeDash": alt.StrokeDash("label:N", scale=scales["strokeDash"], sort=None, legend=None),
            "shape": alt.Shape("label:N", scale=scales["shape"], **common),
        }


def legend_of(last: Mapping[str, float | None]) -> Legend:
    """The legend of series, given the last value of each: all by name up to MOST_NAMED; of more, those that end highest
    and lowest, the others together."""
    names = list(last)
    if len(names) <= MOST_NAMED:
        return Legend(short_names(names), None)
    ordered = sorted(names, key=lambda name: (value if (value := last[name]) is not None else 0.0, name))
    half = (MOST_NAMED - 1) // 2
    ends = {*ordered[:half], *ordered[-half:]}
    rest = f"{len(names) - len(ends)} others, between them"
    kept = short_names([name for name in names if name in ends])
    return Legend(kept | {name: rest for name in names if name not in ends}, rest)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names that fit, by name: where one is too long, without what all begin with, and then without its middle; whole where
    two would be one."""
    if all(len(name) <= MOST_LETTERS for name in names):
        return {name: name for name in names}
    shared = _shared(names) if len(names) > 1 else 0
    short = {name: shortened(f"…{name[shared:]}" if shared > 1 else name) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def _shared(names: Sequence[str]) -> int:
    """Letters that all names begin with, up to a separator."""
    least, most = min(names), max(names)
    same = next((at for at, letter in enumerate(least) if letter != most[at : at + 1]), len(least))
    return max(same - len(least[:same].split("-")[-1]), 0)


def shortened(name: str) -> str:
    """A long name without its middle."""
    half = (MOST_LETTERS - 1) // 2
    return name if len(name) <= MOST_LETTERS else f"{name[:half]}…{name[-half:]}"


def arranged(panels: Sequence[Any], title: str, subtitle: Sequence[str] = (), columns: int = 2) -> Any:
    """Panels in rows, under one title, with one legend."""
    import altair as alt

    whole = alt.Title(title, subtitle=list(subtitle), fontSize=15, offset=14)
    chart = panels[0] if len(panels) == 1 else alt.concat(*panels, columns=columns, spacing={"row": 26, "column": 34})
    if len(panels) == 1:
        return alt.concat(chart).properties(title=whole)
    return chart.properties(title=whole)


def styled(chart: "alt.TopLevelMixin") -> Any:
    """The chart in clipctl's style."""
    axis = {
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#e6e6e6",
        "domainColor": "#888888",
        "tickColor": "#888888",
    }
    return (
        chart.configure(background="white", font="sans-serif", padding=12)
        .configure_axis(**axis)
        .configure_title(fontSize=13, anchor="start", subtitleFontSize=11, subtitleColor="#555555")
        .configure_legend(labelFontSize=11, titleFontSize=12, symbolStrokeWidth=2.5, symbolSize=120)
        .configure_view(stroke=None)
    )


def save_chart(chart: "alt.TopLevelMixin", path: Path) -> None:
    """Writes the styled chart by the path's suffix. Raises SpecError for another suffix, StoreError where it cannot."""
    check_plot_path(path)
    finished = styled(chart)
    try:
        if path.suffix == ".html":
            finished.save(str(path), inline=True)
        else:
            finished.save(str(path), scale_factor=2 if path.suffix == ".png" else 1)
    except OSError as error:
        raise StoreError(f"--plot: {path} cannot be written: {error.strerror or error}") from None
