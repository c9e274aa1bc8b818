"""The charts of `clipctl analyze`: one function a view, each a list of panels that stand by themselves or are arranged on one
sheet.

Runs that differ in their seed alone are one line, their mean, with a band: the 95 % interval by Student's t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipctl import panels, plots
from clipctl.analysis import Options
from clipctl.analysis.arms import Arm, arms_of
from clipctl.analysis.compare import metric_rows, metrics_of, run_metrics
from clipctl.analysis.events import EVENTS_SQL
from clipctl.analysis.ledger import NEEDED as LEDGER_NEEDED
from clipctl.analysis.ledger import PROBES_SQL, SERIES_SQL
from clipctl.analysis.passk import OWN_GROUPS, frontier_rows, needed, passk_rows
from clipctl.analysis.samples import chosen_groups, samples_view, tokens_of
from clipctl.analysis.series import CLIP_SQL, CLIP_STEPS_SQL, ENTROPY, ENTROPY_SQL, FRACTIONS, averaged
from clipctl.analysis.what_if import parse_grid, profiles
from clipctl.errors import SpecError
from clipctl.store import Runs
from clipctl.whatif import HIGH, LOW, what_if

Rows = list[dict[str, Any]]
Panels = list[Any]
ROLLOUT = "rollout"
MOST_GROUPS = 6
"""Runs whose samples are drawn."""
PERCENT = (0.0, 100.0)
SHARE = (0.0, 1.0)


def chart(view: str, runs: Runs, options: Options | None = None) -> Any:
    """The chart of a view on one sheet, an altair chart without clipctl's style (`plots.save_chart` adds it).

    Raises SpecError for a view without a chart, and where no run has the numbers.
    """
    made = CHARTS[view](runs, options or Options())
    return plots.arranged(
        made, TITLES[view], subtitle_of(view, runs, options or Options()), columns=COLUMNS.get(view, 2)
    )


def subtitle_of(view: str, runs: Runs, options: Options) -> list[str]:
    """What the sheet shows: the run, where it is one, and what lines and bands are."""
    arms = arms_of(runs, options.by)
    lines = [plots.shortened(arms[0].name)] if len(arms) == 1 else []
    if view == "passk" or (view in SUBTITLES and any(len(arm.runs) > 1 for arm in arms)):
        lines.append(SUBTITLES[view])
    if view == "samples" and len(runs.folders) > MOST_GROUPS:
        lines.append(f"{MOST_GROUPS} of the runs; give fewer to see others")
    return lines


def overview_chart(runs: Runs, options: Options) -> Panels:
    """Entropy, reward and clip percentages over training."""
    arms = arms_of(runs, options.by)
    entropy = _series(runs, arms, ENTROPY_SQL, ENTROPY[:1], "overview", "rollouts")
    reward = averaged(runs, arms, "select run_id, rollout, reward_mean from rollouts", ["reward_mean"])
    clips = averaged(runs, arms, CLIP_SQL, ["clip_low_percent", "clip_high_percent"])
    legend = _legend(entropy, "entropy")
    return [
        _line(entropy, legend, "entropy", "entropy, nats", "Entropy"),
        _line(reward, legend, "reward_mean", "mean reward", "Reward"),
        _line(clips, legend, "clip_low_percent", "% of response tokens", "Clip-low", bounds=PERCENT),
        _line(clips, legend, "clip_high_percent", "% of response tokens", "Clip-high", bounds=PERCENT),
    ]


def entropy_chart(runs: Runs, options: Options) -> Panels:
    """Both definitions of entropy, and entropy divided by that of rollout 0, over training."""
    rows = _series(runs, arms_of(runs, options.by), ENTROPY_SQL, ENTROPY, "entropy", "entropies")
    legend = _legend(rows, "entropy")
    return [
        _line(rows, legend, "entropy", "entropy, nats", "Entropy: mean over responses of the mean over tokens"),
        _line(rows, legend, "entropy_normalized", "entropy ÷ entropy of rollout 0", "Normalized", rule=1.0),
        _line(rows, legend, "entropy_token_mean", "entropy, nats", "Entropy: mean over all tokens"),
    ]


def clip_chart(runs: Runs, options: Options) -> Panels:
    """Clip-low at the left, clip-high at the right: by both denominators, ratios whatever A, extremes, by inner step."""
    arms = arms_of(runs, options.by)
    metrics = (*FRACTIONS, "ratio_min", "ratio_max")
    rows = _series(runs, arms, CLIP_SQL, [*FRACTIONS], "clip", "updates")
    extremes = _extremes(runs, arms)
    steps = averaged(runs, arms, CLIP_STEPS_SQL, [*FRACTIONS], along="inner_step")
    assert metrics
    legend = _legend(rows, "clip_low_percent")
    made = []
    for name, title in (("", "of all tokens"), ("_advantage", "of tokens with A ≠ 0")):
        made += [
            _line(rows, legend, f"clip_low_percent{name}", f"% {title}", f"Clip-low, {title}", bounds=PERCENT),
            _line(rows, legend, f"clip_high_percent{name}", f"% {title}", f"Clip-high, {title}", bounds=PERCENT),
        ]
    return [
        *made,
        _line(rows, legend, "ratio_low_percent", "% of all tokens", "r < 1 − ε_low, whatever A", bounds=PERCENT),
        _line(rows, legend, "ratio_high_percent", "% of all tokens", "r > 1 + ε_high, whatever A", bounds=PERCENT),
        _line(extremes, legend, "ratio_min", "smallest r", "Smallest ratio of a rollout", log_y=True),
        _line(extremes, legend, "ratio_max", "largest r", "Largest ratio of a rollout", log_y=True),
        _line(
            steps,
            legend,
            "clip_low_percent",
            "% of all tokens",
            "Clip-low by inner step",
            x="inner_step",
            bounds=PERCENT,
        ),
        _line(
            steps,
            legend,
            "clip_high_percent",
            "% of all tokens",
            "Clip-high by inner step",
            x="inner_step",
            bounds=PERCENT,
        ),
    ]


TERMS = {"reward": "Reward", "clip_low": "Clip-low", "clip_high": "Clip-high", "total": "Total"}


def ledger_chart(runs: Runs, options: Options) -> Panels:
    """The cumulated terms as shares, the gaps of inequalities (7) and (8), and predicted against observed change."""
    arms = arms_of(runs, options.by)
    cumulated = [f"pg_{term}_cumulated" for term in TERMS]
    gaps = [f"gap{number}_{side}" for number in (7, 8) for side in ("low", "high")]
    holds = [gap.replace("gap", "holds") for gap in gaps]
    rows = _series(runs, arms, SERIES_SQL, [*cumulated, *gaps, *holds], "ledger", LEDGER_NEEDED)
    legend = _legend(rows, "pg_total_cumulated")
    made = [
        _line(rows, legend, f"pg_{term}_cumulated", "share of the gross pull", f"{title}, cumulated", rule=0.0)
        for term, title in TERMS.items()
    ]
    names = {
        "gap7_low": ("E[Q] − E[Q|X], nats", "(7) low: clip-low raises entropy where ≥ 0"),
        "gap7_high": ("E[Q] − E[Q|Y], nats", "(7) high: clip-high lowers entropy where ≥ 0"),
        "gap8_low": ("E[−log π|X] − H, nats", "(8) low: the same for a natural step"),
        "gap8_high": ("E[−log π|Y] − H, nats", "(8) high: the same for a natural step"),
    }
    for gap, (y_title, title) in names.items():
        made.append(_line(rows, legend, gap, y_title, title, rule=0.0))
    for gap in gaps:
        title = f"({gap[3]}) {gap[5:]} holds"
        made.append(_line(rows, legend, gap.replace("gap", "holds"), "share of the updates", title, bounds=SHARE))
    return made + _prediction_panels(runs, arms, legend)


def _prediction_panels(runs: Runs, arms: Sequence[Arm], legend: plots.Legend) -> Panels:
    arm_of = {run: arm.name for arm in arms for run in arm.runs}
    rows = [{"series": arm_of[row["run_id"]], **row} for row in runs.table(PROBES_SQL).to_pylist()]
    wanted = {
        "network_total": ("⟨∇H, Δθ⟩, nats", "Change of entropy at a probed update: through the network"),
        "ledger_pg": ("ledger, Σ w A e", "Change of entropy at a probed update: own-state ledger"),
    }
    return [
        panels.scatter(
            [row for row in rows if row[name] is not None], legend, x=name, y="entropy_change", x_title=x_title,
            y_title="observed ΔH, nats", title=title, diagonal=name == "network_total",
        )
        for name, (x_title, title) in wanted.items()
        if any(row[name] is not None for row in rows)
    ]  # fmt: skip


def passk_chart(runs: Runs, options: Options) -> Panels:
    """Of every benchmark: mean@k and pass@k over training, and pass@k over k at the last evaluation."""
    rows = _of_arms(passk_rows(runs, options), arms_of(runs, options.by))
    if not rows:
        raise SpecError(f"--view passk: none of these runs has {needed(options)}")
    made: Panels = []
    legend = _legend([row for row in rows if row["k"] == 1], "pass_at_k")
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        trained = [row for row in mine if row["rollout"] is not None]
        most = max(row["k"] for row in mine)
        for k, title in ((1, f"mean@{most}"), (most, f"pass@{most}")):
            chosen = [row for row in trained if row["k"] == k]
            if chosen:
                made.append(_line(chosen, legend, "pass_at_k", title, f"{title}, {_called(benchmark)}", bounds=SHARE))
        last = {row["series"]: row["rollout"] for row in mine}
        curve = [row for row in mine if row["rollout"] == last[row["series"]]]
        if most > 1:
            title = f"pass@k at the end, {_called(benchmark)}"
            made.append(_line(curve, legend, "pass_at_k", "pass@k", title, x="k", log_x=True, bounds=SHARE))
    return made


def _called(benchmark: str) -> str:
    return "own groups (training prompts)" if benchmark == OWN_GROUPS else benchmark


def what_if_chart(runs: Runs, options: Options) -> Panels:
    """The pull on entropy under other ε, as shares of each run's own gross pull: the clip's term and the total, by side."""
    asked = parse_grid(options.grid)
    lows, highs = asked["low"] or [*LOW[1:], 1.0], asked["high"] or [*HIGH[1:], math.inf]
    rows: dict[str, Rows] = {"low": [], "high": []}
    last: dict[str, float | None] = {}
    for run, profile in profiles(runs):
        own = (run["eps_low"], run["eps_high"])
        found = what_if(profile, eps_low=own[0], eps_high=own[1])
        gross = abs(found.pg.reward) + abs(found.pg.clip_low) + abs(found.pg.clip_high) or 1.0
        last[run["run_id"]] = found.pg.total / gross
        for side, values in (("low", sorted({*lows, own[0]})), ("high", sorted({*highs, own[1]}))):
            for eps in values:
                pair = (eps, own[1]) if side == "low" else (own[0], eps)
                other = what_if(profile, eps_low=pair[0], eps_high=pair[1])
                rows[side].append(
                    {
                        "series": run["run_id"],
                        "eps": eps,
                        "clip": getattr(other.pg, f"clip_{side}") / gross,
                        "total": other.pg.total / gross,
                        "own": eps == own[side == "high"],
                        "interpolated": other.interpolated,
                    }
                )
    if not last:
        raise SpecError("--view what-if: none of these runs has histograms of the ratio")
    legend = plots.legend_of(last)
    return [
        panels.over_eps(
            rows[side], legend, y=name, side=side, off=1.0 if side == "low" else math.inf, title=title,
            y_title="share of the run's gross pull",
        )
        for name, titles in (
            ("clip", ("Clip-low's pull by ε_low", "Clip-high's pull by ε_high")),
            ("total", ("Total pull by ε_low", "Total pull by ε_high")),
        )
        for side, title in zip(("low", "high"), titles, strict=True)
    ]  # fmt: skip


COMPARED = {
    "entropy": "entropy, nats", "entropy_normalized": "entropy ÷ first", "clip_low_percent": "clip-low, % of tokens",
    "clip_high_percent": "clip-high, % of tokens", "reward_mean": "mean reward", "mean_at_group": "mean@G",
    "pass_at_group": "pass@G", "response_tokens_mean": "tokens a response",
}  # fmt: skip


def compare_chart(runs: Runs, options: Options) -> Panels:
    """Each metric's mean and interval by group; where there are pairs, the paired differences to the first group beside it."""
    arms = arms_of(runs, options.by)
    measured = run_metrics(runs)
    if not measured:
        raise SpecError("--view compare: none of these runs has a rollout")
    made: Panels = []
    paired = False
    for metric in metrics_of(measured):
        rows = metric_rows(metric, arms, measured)
        paired = any(row["pairs"] for row in rows)
        title = COMPARED.get(metric, metric)
        made.append(panels.dots(rows, value="mean", x_title=title, title=title))
        if paired:
            made.append(
                panels.dots(
                    rows,
                    value="difference",
                    x_title=title,
                    title=f"difference to {plots.shortened(arms[0].name)}",
                    rule=0.0,
                )
            )
    return made


def frontier_chart(runs: Runs, options: Options) -> Panels:
    """pass@k and mean@k against entropy, a path through training for each run, its end marked."""
    rows = _of_arms(frontier_rows(runs, options), arms_of(runs, options.by))
    if not rows:
        raise SpecError(f"--view frontier: none of these runs has {needed(options)}")
    legend = _legend(rows, "pass_at_k")
    made: Panels = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        most = max(row["k"] for row in mine)
        for name, title in (("pass_at_k", f"pass@{most}"), ("mean_at_k", f"mean@{most}")):
            made.append(
                panels.paths(
                    mine,
                    legend,
                    x="entropy",
                    y=name,
                    x_title="entropy, nats",
                    y_title=title,
                    title=f"{title}, {_called(benchmark)}",
                )
            )
    return made


def samples_chart(runs: Runs, options: Options) -> Panels:
    """The samples of one group of each run: entropy by sample and outcome, and, where tokens are stored, every token."""
    groups = chosen_groups(runs, options)
    if not groups:
        raise SpecError("--view samples: none of these runs has samples")
    rows = samples_view(runs, options).table.to_pylist()
    tokens = tokens_of(runs, groups)
    made: Panels = []
    for group in groups[:MOST_GROUPS]:
        mine = [row for row in rows if row["run"] == group["run_id"]]
        title = f"{plots.shortened(group['run_id'])}, rollout {group['rollout']}, {plots.shortened(str(group['prompt_id']))}"
        flat = [
            {"sample": sample, **token}
            for (run, sample), its in tokens.items()
            if run == group["run_id"]
            for token in its
        ]
        made.append(panels.token_map(flat, title) if flat else panels.sample_bars(mine, title))
    return made


def events_chart(runs: Runs, options: Options) -> Panels:
    """Events on each run's own time axis, by kind."""
    rows = runs.table(EVENTS_SQL).to_pylist()
    if not rows:
        raise SpecError("--view events: none of these runs has an event")
    return [panels.timeline([row for row in rows if row["seconds"] is not None])]


def _series(runs: Runs, arms: Sequence[Arm], query: str, metrics: Sequence[str], view: str, what: str) -> Rows:
    rows = averaged(runs, arms, query, metrics)
    if all(row[name] is None for row in rows for name in metrics):
        raise SpecError(f"--view {view}: none of these runs has {what}")
    return rows


def _extremes(runs: Runs, arms: Sequence[Arm]) -> Rows:
    """Smallest and largest ratio of each rollout over the runs of an arm."""
    arm_of = {run: arm.name for arm in arms for run in arm.runs}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    query = f"select run_id, rollout, ratio_min, ratio_max from ({CLIP_SQL}) where ratio_min > 0 order by rollout"
    for row in runs.table(query).to_pylist():
        key = (arm_of[row["run_id"]], row["rollout"])
        before = found.setdefault(key, {"series": key[0], "rollout": key[1], "ratio_min": math.inf, "ratio_max": 0.0})
        before["ratio_min"] = min(before["ratio_min"], row["ratio_min"])
        before["ratio_max"] = max(before["ratio_max"], row["ratio_max"])
    return list(found.values())


def _of_arms(rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> Rows:
    """Rows of arms of several runs, and of runs that are in none of those."""
    hidden = {run for arm in arms if len(arm.runs) > 1 for run in arm.runs}
    return [dict(row) for row in rows if row["series"] not in hidden or row["runs"] > 1]


def _legend(rows: Sequence[Mapping[str, Any]], metric: str) -> plots.Legend:
    last: dict[str, float | None] = {}
    for row in rows:
        last[row["series"]] = row[metric] if row[metric] is not None else last.get(row["series"])
    return plots.legend_of(last)


def _line(
    rows: Sequence[Mapping[str, Any]],
    legend: plots.Legend,
    y: str,
    y_title: str,
    title: str,
    *,
    x: str = ROLLOUT,
    **more: Any,
) -> Any:
    x_title = {"inner_step": "inner step"}.get(x, x)
    return panels.lines(rows, legend, x=x, y=y, x_title=x_title, y_title=y_title, title=title, **more)


CHARTS: dict[str, Callable[[Runs, Options], Panels]] = {
    "overview": overview_chart,
    "entropy": entropy_chart,
    "clip": clip_chart,
    "ledger": ledger_chart,
    "passk": passk_chart,
    "what-if": what_if_chart,
    "compare": compare_chart,
    "frontier": frontier_chart,
    "samples": samples_chart,
    "events": events_chart,
}
"""View → its panels, altair charts that can stand alone."""
TITLES = {
    "overview": "Runs",
    "entropy": "Entropy of the policy",
    "clip": "Clipping and the ratio r = π/π_old",
    "ledger": "The entropy ledger: who pulls at entropy",
    "passk": "Correctness: mean@k and pass@k",
    "what-if": "What another ε would have pulled, to first order",
    "compare": "Groups of runs",
    "frontier": "Correctness against entropy",
    "samples": "Samples of one prompt",
    "events": "Events",
}
_BANDS = "lines: mean over runs; bands: 95 % interval of the mean (Student's t)"
SUBTITLES = {
    **dict.fromkeys(("overview", "entropy", "clip", "ledger"), _BANDS),
    "passk": "bands: 95 % intervals, of a mean over runs by Student's t, of one run BCa over problems",
    "compare": "dots: mean over runs; bars: its 95 % interval (Student's t); differences are between pairs of runs",
    "frontier": "paths: mean over runs",
}
"""What is said where lines are means over runs."""
COLUMNS = {"passk": 3, "samples": 1, "events": 1}
"""Panels in a row, where they are not two."""
