"""The kinds of panels that charts are made of, in the style of `clipctl.plots`: lines over rollouts, points, paths, dots with
intervals, a map of tokens, a time line.

Every panel carries its own data, thinned and rounded to what can be seen.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clipctl.plots import COLORS, GREY, Legend, series_scales, short_names

MOST_POINTS = 300
"""Of a series: more than a panel has pixels for helps nobody."""
MOST_IN_PANEL = 4000
"""Of all series of a panel together."""
MARKERS = 7
"""Of a long line."""
PANEL = {"width": 330, "height": 200}


def lines(
    rows: Sequence[Mapping[str, Any]],
    legend: Legend,
    *,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    title: str,
    subtitle: str = "",
    log_x: bool = False,
    log_y: bool = False,
    bounds: tuple[float, float] | None = None,
    rule: float | None = None,
) -> Any:
    """A panel of one line a series over `x`, with a band between `<y>_low` and `<y>_high` where rows have them.

    rows: `series`, x, y, in the order of x; a NULL interrupts the line; what has a text in `unreliable` is a hollow point, with
    a note below the title. Short series show every point, long ones some markers. bounds: what y can be, which a band is cut
    to. rule: a horizontal line to compare with.
    """
    import altair as alt

    values = _line_values(rows, legend, x, y, bounds or (-math.inf, math.inf))
    looks = legend.encodings()
    span = [row["x"] for row in values]
    x_scale = alt.Scale(type="log", base=2) if log_x else alt.Scale(nice=False, zero=False, padding=6)
    y_scale = alt.Scale(type="log") if log_y else alt.Scale(zero=bounds is not None)
    x_axis = alt.Axis(title=x_title, format="~r", values=sorted(set(span)) if log_x else _whole_ticks(span))
    y_axis = alt.Axis(title=y_title, tickCount=5)
    if log_y:
        powers = _powers_of_ten([row["y"] for row in values if row["y"]])
        y_axis = alt.Axis(title=y_title, format="~g", **({"values": powers} if len(powers) > 2 else {"tickCount": 4}))
    base = alt.Chart(data(values)).encode(x=alt.X("x:Q", scale=x_scale, axis=x_axis))
    y_code = alt.Y("y:Q", scale=y_scale, axis=y_axis)
    layers = []
    if any(row["low"] is not None for row in values):
        band = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18, strokeWidth=0)
        layers.append(
            band.encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=looks["color"], detail="series:N")
        )
    if rule is not None:
        layers.append(alt.Chart(data([{"at": rule}])).mark_rule(color="#888888", strokeDash=[2, 3]).encode(y="at:Q"))
    tooltip = ["series:N", alt.Tooltip("x:Q", title=x_title), alt.Tooltip("y:Q", title=y_title, format=".4g")]
    layers.append(
        base.mark_line(strokeWidth=1.8).encode(
            y=y_code, color=looks["color"], strokeDash=looks["strokeDash"], detail="series:N"
        )
    )
    doubtful = any(row["doubtful"] for row in values)
    look: dict[str, Any] = {"strokeWidth": 1.4} if doubtful else {"filled": True}
    fill = alt.condition("datum.doubtful", alt.value("white"), looks["color"]) if doubtful else alt.Undefined
    points = base.transform_filter("datum.marked").mark_point(size=42, opacity=1, **look)
    layers.append(points.encode(y=y_code, color=looks["color"], fill=fill, shape=looks["shape"], tooltip=tooltip))
    if doubtful:
        subtitle = "; ".join(filter(None, [subtitle, "hollow: the interval is not reliable"]))
    return alt.layer(*layers).properties(**PANEL, title=heading(title, subtitle))


def _labelled(rows: Sequence[Mapping[str, Any]], legend: Legend, *names: str) -> list[dict[str, Any]]:
    """The named columns of the rows whose series the legend knows, rounded, thinned by series, the rest first."""
    by_series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["series"] in legend.labels:
            values = {name: rounded(row[name]) if isinstance(row[name], float) else row[name] for name in names}
            label = legend.labels[row["series"]]
            by_series.setdefault(row["series"], []).append({"series": row["series"], "label": label, **values})
    ordered = sorted(by_series, key=lambda name: legend.labels[name] != legend.rest)
    return [row for name in ordered for row in thinned(by_series[name], len(by_series))]


def scatter(
    rows: Sequence[Mapping[str, Any]],
    legend: Legend,
    *,
    x: str,
    y: str,
    x_title: str,
    y_title: str,
    title: str,
    diagonal: bool = False,
) -> Any:
    """A panel of points with both zero lines; diagonal: where x and y are equal. Without it, points far out in x stand at the
    edge, hollow, so that they squeeze no others."""
    import altair as alt

    values = _labelled(rows, legend, x, y)
    least, most = (-math.inf, math.inf) if diagonal else _bulk([row[x] for row in values])
    values = [row | {"at": min(max(row[x], least), most), "out": not least <= row[x] <= most} for row in values]
    out = sum(row["out"] for row in values)
    subtitle = f"hollow, at the edge: {out} of {len(values)} points that lie further out" if out else ""
    looks = legend.encodings()
    layers = [
        alt.Chart(data([{"at": 0}])).mark_rule(color="#888888", strokeDash=[2, 3]).encode(**{axis: "at:Q"})
        for axis in "xy"
    ]
    if diagonal:
        ends = [bound for pick in (min, max) for bound in [pick(pick(row[x], row[y]) for row in values)]]
        line = alt.Chart(data([{x: end, y: end} for end in ends])).mark_line(color="#888888", strokeWidth=1)
        layers.append(line.encode(x=f"{x}:Q", y=f"{y}:Q"))
    points = alt.Chart(data(values)).mark_point(size=26, opacity=0.55, strokeWidth=1)
    layers.append(
        points.encode(
            x=alt.X("at:Q", title=x_title, axis=alt.Axis(tickCount=5)),
            y=alt.Y(f"{y}:Q", title=y_title, axis=alt.Axis(tickCount=5)),
            color=looks["color"],
            fill=alt.condition("datum.out", alt.value("white"), looks["color"]),
            shape=looks["shape"],
            tooltip=["series:N", f"{x}:Q", f"{y}:Q"],
        )
    )
    return alt.layer(*layers).properties(**PANEL, title=heading(title, subtitle))


BULK = 50
"""Of so many values one at each end may lie outside of what an axis shows, where that makes it at most half as long."""


def _bulk(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows most of the values and 0; no ends where they are not squeezed by a few."""
    if len(values) < BULK:
        return -math.inf, math.inf
    between = statistics.quantiles([*values], n=BULK)
    ends = min(between[0], 0.0), max(between[-1], 0.0)
    whole = max(*values, 0.0) - min(*values, 0.0)
    return ends if ends[1] - ends[0] <= whole / 2 else (-math.inf, math.inf)


def _with_extent(shown: Sequence[float]) -> Any:
    """A scale without 0. An axis without an extent would have one tick, whose label is rounded to a whole number."""
    import altair as alt

    if len(set(shown)) != 1:
        return alt.Scale(zero=False)
    around = abs(shown[0]) / 10 or 1
    return alt.Scale(domain=[shown[0] - around, shown[0] + around])


def paths(
    rows: Sequence[Mapping[str, Any]], legend: Legend, *, x: str, y: str, x_title: str, y_title: str, title: str
) -> Any:
    """A panel of one path a series in the order of its rollouts, the last point large."""
    import altair as alt

    values = _labelled([row for row in rows if row[x] is not None], legend, "rollout", x, y)
    last = {row["series"]: at for at, row in enumerate(values)}
    values = [row | {"end": last[row["series"]] == at} for at, row in enumerate(values)]
    at_x, at_y = ([row[name] for row in values if row[name] is not None] for name in (x, y))
    looks = legend.encodings()
    base = alt.Chart(data(values)).encode(
        x=alt.X(f"{x}:Q", title=x_title, scale=_with_extent(at_x), axis=alt.Axis(tickCount=6)),
        y=alt.Y(f"{y}:Q", title=y_title, scale=_with_extent(at_y), axis=alt.Axis(tickCount=5)),
        color=looks["color"],
        detail="series:N",
    )
    path = base.mark_line(strokeWidth=1.2, opacity=0.6).encode(order="rollout:Q", strokeDash=looks["strokeDash"])
    points = base.mark_point(filled=True, opacity=1).encode(
        shape=looks["shape"],
        size=alt.condition("datum.end", alt.value(130), alt.value(14)),
        tooltip=["series:N", "rollout:Q", f"{x}:Q", f"{y}:Q"],
    )
    return alt.layer(path, points).properties(
        **PANEL, title=heading(title, "through training; the large mark is the end")
    )


OFF = 1.7
"""An ε that is off is drawn so many times to the right of the largest that is not."""


def over_eps(
    rows: Sequence[Mapping[str, Any]], legend: Legend, *, y: str, side: str, off: float, title: str, y_title: str
) -> Any:
    """A panel of one line a series over ε; large marks: the ε in force; hollow ones: interpolated."""
    import altair as alt

    finite = [row["eps"] for row in rows if 0 < row["eps"] < off]
    place = OFF * max(finite, default=1.0)
    least = min(finite, default=0.01)
    # A logarithmic axis has no 0.
    shown = [{**row, "at": place if row["eps"] >= off else max(row["eps"], least / OFF)} for row in rows]
    values = _labelled(shown, legend, "eps", "at", y, "own", "interpolated")
    looks = legend.encodings()
    ticks = [tick for tick in (0.001, 0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10) if least <= tick <= place / 1.3]
    axis = alt.Axis(
        title=f"ε_{side}",
        values=[*ticks, place],
        labelExpr=f"datum.value > {place * 0.99} ? 'off' : format(datum.value, '~g')",
    )
    base = alt.Chart(data(values)).encode(
        x=alt.X("at:Q", scale=alt.Scale(type="log", nice=False, padding=8), axis=axis),
        y=alt.Y(f"{y}:Q", title=y_title, axis=alt.Axis(tickCount=5)),
        detail="series:N",
    )
    zero = alt.Chart(data([{"at": 0}])).mark_rule(color="#888888", strokeDash=[2, 3]).encode(y="at:Q")
    line = base.mark_line(strokeWidth=1.6).encode(color=looks["color"], strokeDash=looks["strokeDash"])
    named = "true" if legend.rest is None else f"datum.label !== '{legend.rest}'"
    points = base.transform_filter(f"datum.own || (datum.interpolated && {named})").mark_point(
        opacity=1, strokeWidth=1.4
    )
    marks = points.encode(
        color=looks["color"],
        fill=alt.condition("datum.interpolated", alt.value("white"), looks["color"]),
        shape=looks["shape"],
        size=alt.condition("datum.own", alt.value(110), alt.value(22)),
        tooltip=["series:N", "eps:Q", f"{y}:Q", "interpolated:N"],
    )
    subtitle = "large mark: the ε of the run; hollow: interpolated"
    return alt.layer(zero, line, marks).properties(**PANEL, title=heading(title, subtitle))


def dots(rows: Sequence[Mapping[str, Any]], *, value: str, x_title: str, title: str, rule: float | None = None) -> Any:
    """A panel of one dot with its interval for each group, the groups in their order."""
    import altair as alt

    names_by = short_names([row["group"] for row in rows])
    values = [
        {
            "group": names_by[row["group"]], "value": rounded(row[value]), "low": rounded(row[f"{value}_low"]),
            "high": rounded(row[f"{value}_high"]), "runs": row["runs"],
        }
        for row in rows
    ]  # fmt: skip
    names = [row["group"] for row in values]
    base = alt.Chart(data(values)).encode(
        y=alt.Y(
            "group:N", sort=names, title=None, scale=alt.Scale(domain=names), axis=alt.Axis(labelLimit=0, grid=True)
        )
    )
    shown = [row[name] for row in values for name in ("value", "low", "high") if row[name] is not None]
    scale = _with_extent([*shown, *([] if rule is None else [rule])])
    x = alt.X("value:Q", title=x_title, scale=scale, axis=alt.Axis(tickCount=5))
    layers = []
    if any(row["low"] is not None for row in values):
        interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, color=COLORS[0])
        layers.append(interval.encode(x=alt.X("low:Q", scale=scale), x2="high:Q"))
    if rule is not None:
        layers.insert(0, alt.Chart(data([{"at": rule}])).mark_rule(color="#888888", strokeDash=[2, 3]).encode(x="at:Q"))
    layers.append(
        base.mark_point(filled=True, size=70, opacity=1, color=COLORS[0]).encode(
            x=x, tooltip=["group:N", "value:Q", "low:Q", "high:Q", "runs:Q"]
        )
    )
    return alt.layer(*layers).properties(width=PANEL["width"], height=max(40, 20 * len(names)), title=heading(title))


REWARDED = ["less than the group's mean", "the same", "more"]


def _clipped(row: Mapping[str, Any]) -> str:
    return "" if row["clip_low"] is None else f", clipped: {row['clip_low']} low, {row['clip_high']} high"


def sample_bars(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A panel of one bar a sample: its mean entropy, coloured by what it earned, with its clips as text."""
    import altair as alt

    values = [
        {
            "sample": row["sample"],
            "entropy": rounded(row["entropy"]),
            "reward": REWARDED[1 + (advantage > 0) - (advantage < 0)],
            "text": f"{row['tokens']} tokens" + _clipped(row),
        }
        for row in rows
        for advantage in [row["advantage"] or 0.0]
    ]
    scale = alt.Scale(domain=REWARDED, range=[COLORS[1], GREY, COLORS[2]])
    base = alt.Chart(data(values)).encode(
        y=alt.Y("sample:O", title="sample"),
        x=alt.X("entropy:Q", title="mean entropy of the response, nats", axis=alt.Axis(tickCount=6)),
    )
    bars = base.mark_bar(height=12).encode(
        color=alt.Color("reward:N", scale=scale, legend=alt.Legend(title="reward", orient="bottom"))
    )
    words = base.mark_text(align="left", dx=5, fontSize=10).encode(text="text:N")
    return alt.layer(bars, words).properties(width=2 * PANEL["width"], height=20 * len(values), title=heading(title))


def token_map(tokens: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A panel of one row a sample and one cell a token: darker is higher entropy, triangles are clipped tokens."""
    import altair as alt

    values = [
        {
            "sample": token["sample"], "token": token["token"], "entropy": rounded(token["entropy"]),
            "clip": "clip-low" if token["clip_low"] else "clip-high" if token["clip_high"] else None,
        }
        for token in tokens
    ]  # fmt: skip
    base = alt.Chart(data(values)).encode(
        x=alt.X("token:O", title="token of the response", axis=alt.Axis(labelOverlap=True, labelAngle=0, ticks=False)),
        y=alt.Y("sample:O", title="sample"),
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "entropy:Q", scale=alt.Scale(scheme="greys"), legend=alt.Legend(title="entropy, nats", orient="right")
        )
    )
    clips = ["clip-low", "clip-high"]
    marks = (
        base.transform_filter("datum.clip !== null")
        .mark_point(filled=True, size=70, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(
            fill=alt.Fill(
                "clip:N",
                scale=alt.Scale(domain=clips, range=[COLORS[0], COLORS[1]]),
                legend=alt.Legend(title="clipped", orient="right"),
            ),
            shape=alt.Shape("clip:N", scale=alt.Scale(domain=clips, range=["triangle-down", "triangle-up"])),
        )
    )
    longest = 1 + max(token["token"] for token in tokens)
    samples = len({token["sample"] for token in tokens})
    return (
        alt.layer(cells, marks)
        .properties(width=max(240, min(900, 22 * longest)), height=22 * samples, title=heading(title))
        .resolve_scale(color="independent")
    )


def timeline(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A panel of one row a run and a mark for each event, by minutes since the run's start."""
    import altair as alt

    names_by = short_names([*dict.fromkeys(row["run"] for row in rows)])
    values = [
        {"run": names_by[row["run"]], "minutes": rounded(row["seconds"] / 60), "kind": row["kind"], "rollout": row["rollout"],
         "message": row["message"]}
        for row in rows
    ]  # fmt: skip
    kinds = [*dict.fromkeys(row["kind"] for row in values)]
    names = [*dict.fromkeys(row["run"] for row in values)]
    scales = series_scales(kinds)
    legend = alt.Legend(title="event", orient="bottom", columns=5)
    return (
        alt.Chart(data(values))
        .mark_point(filled=True, size=60, opacity=0.8)
        .encode(
            x=alt.X("minutes:Q", title="minutes since the run's start", axis=alt.Axis(tickCount=8)),
            y=alt.Y("run:N", title=None, sort=names, axis=alt.Axis(labelLimit=0, grid=True)),
            color=alt.Color("kind:N", scale=scales["color"], sort=None, legend=legend),
            shape=alt.Shape("kind:N", scale=scales["shape"], sort=None, legend=legend),
            tooltip=["run:N", "rollout:Q", "kind:N", "message:N"],
        )
        .properties(width=2 * PANEL["width"], height=max(40, 24 * len(names)))
    )


def _whole_ticks(values: Sequence[float]) -> list[int]:
    """At most seven whole numbers from the least to the largest value, at a step of 1, 2 or 5 times a power of ten."""
    first, last = (math.floor(min(values)), math.ceil(max(values))) if values else (0, 1)
    step = next(base * 10**power for power in range(12) for base in (1, 2, 5) if (last - first) < 7 * base * 10**power)
    return list(range(-(-first // step) * step, last + 1, step)) or [first]


def _powers_of_ten(values: Sequence[float]) -> list[float]:
    """At most six powers of ten that span the values."""
    exponents = [math.floor(math.log10(value)) for value in values] or [0]
    first, last = min(exponents), max(exponents) + 1
    return [10.0**exponent for exponent in range(first, last + 1, -(-(last - first) // 5) or 1)]


def _line_values(
    rows: Sequence[Mapping[str, Any]], legend: Legend, x: str, y: str, bounds: tuple[float, float]
) -> list[dict[str, Any]]:
    by_series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["series"] in legend.labels:
            by_series.setdefault(row["series"], []).append(row)
    # The rest is drawn first, so that it covers no named line.
    ordered = sorted(by_series, key=lambda name: legend.labels[name] != legend.rest)
    values = []
    for place, name in enumerate(ordered):
        kept = thinned(by_series[name], len(by_series))
        step = max(1, len(kept) // MARKERS)
        for at, row in enumerate(kept):
            named = legend.labels[name] != legend.rest
            beside = [kept[near][y] for near in (at - 1, at + 1) if 0 <= near < len(kept)]
            alone = all(value is None for value in beside)
            doubtful = row.get("unreliable") is not None
            marked = (
                alone or doubtful or len(kept) <= 2 * MARKERS or (at + place * step // max(1, len(ordered))) % step == 0
            )
            values.append(
                {
                    "series": name,
                    "label": legend.labels[name],
                    "x": row[x],
                    "y": rounded(row[y]),
                    "low": rounded(_within(row.get(f"{y}_low"), bounds)),
                    "high": rounded(_within(row.get(f"{y}_high"), bounds)),
                    "marked": named and marked and row[y] is not None,
                    "doubtful": doubtful,
                }
            )
    return values


def thinned(rows: Sequence[Any], series: int) -> list[Any]:
    """Every so many of the rows of one of a panel's series, the last one always."""
    stride = -(-len(rows) // max(min(MOST_POINTS, MOST_IN_PANEL // series), 2))
    return [row for at, row in enumerate(rows) if (len(rows) - 1 - at) % stride == 0] if stride > 1 else list(rows)


def _within(value: float | None, bounds: tuple[float, float]) -> float | None:
    return None if value is None else min(max(value, bounds[0]), bounds[1])


def rounded(value: Any) -> float | None:
    """Six digits are more than a chart shows; what is not finite is not drawn."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def data(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a chart's own data."""
    import altair as alt
    from altair.utils.schemapi import debug_mode

    # Checking every value of every row against a schema takes longer than drawing them.
    with debug_mode(False):
        return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def heading(title: str, subtitle: str = "") -> Any:
    """A panel's title and, below it, what is shown."""
    import altair as alt

    return alt.Title(title, subtitle=subtitle) if subtitle else alt.Title(title)
