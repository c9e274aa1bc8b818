"""The one style of all charts, and writing them: PNG, SVG or a self-contained HTML page, without a browser or a network.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ in their dashes too, for print.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.errors import SpecError, StoreError

if TYPE_CHECKING:
    import altair as alt

SUFFIXES = (".png", ".svg", ".html")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 1], [1, 3], [10, 4])


def check_plot_path(path: Path) -> None:
    """Raises SpecError for a suffix that is none of SUFFIXES, so that nothing is computed in vain."""
    if path.suffix not in SUFFIXES:
        raise SpecError(f"--plot: {str(path)!r} must end in {', '.join(SUFFIXES)}")


def series_scales(names: list[str]) -> dict[str, Any]:
    """`color` and `strokeDash` scales that give every series a colour and a dash of its own, in the order given."""
    import altair as alt

    count = len(names)
    return {
        "color": alt.Scale(domain=names, range=[COLORS[at % len(COLORS)] for at in range(count)]),
        "strokeDash": alt.Scale(domain=names, range=[DASHES[at % len(DASHES)] for at in range(count)]),
    }


def styled(chart: "alt.TopLevelMixin") -> Any:
    """The chart in clipctl's style."""
    axis = {
        "labelFontSize": 11,
        "titleFontSize": 12,
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
