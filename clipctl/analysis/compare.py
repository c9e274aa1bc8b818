"""Groups of runs side by side: means with intervals, paired differences to the first group, what their specs differ in."""

from collections.abc import Mapping, Sequence
from typing import Any

from clipctl.analysis.answer import Answer, Options, as_arrow, without
from clipctl.analysis.arms import IDLE, SHORT, Arm, arms_of, differing, mean_and_interval, specs_of, value_text
from clipctl.analysis.passk import OWN_GROUPS, frontier_rows
from clipctl.store import Runs

LAST = 5
"""Rollouts that a number of now is the mean of, as in the overview."""
NOW = ("entropy", "entropy_normalized", "reward_mean", "mean_at_group", "pass_at_group", "response_tokens_mean")
NOW_SQL = f"""
with r as (select *, max(rollout) over (partition by run_id) - rollout < {LAST} as late from rollouts),
now as (select run_id, {", ".join(f"avg({name}) filter (late) as {name}" for name in NOW)} from r group by run_id),
clips as (
    select run_id, 100.0 * sum(clip_low) / nullif(sum(tokens), 0) as clip_low_percent,
        100.0 * sum(clip_high) / nullif(sum(tokens), 0) as clip_high_percent
    from updates group by run_id
)
select * from now left join clips using (run_id)
"""
METRICS = (*NOW[:2], "clip_low_percent", "clip_high_percent", *NOW[2:])
"""Of every run: means over its last 5 rollouts; clip percentages are over all its updates. The last evaluation's mean@k
and pass@k of each benchmark follow."""


def compare_view(runs: Runs, options: Options) -> Answer:
    """One row a metric and group of runs: the mean over the group's runs with its 95 % t interval, and the mean of the paired
    differences to the first group. Two runs are a pair that differ in nothing but the keys grouped by, so the same seed
    meets itself. Without `by`, runs are grouped by all in which their specs differ but the seed."""
    arms = arms_of(runs, options.by)
    measured = run_metrics(runs)
    rows = [row for metric in metrics_of(measured) for row in metric_rows(metric, arms, measured)]
    notes = without(runs, list(measured), "compare", "rollouts")
    return Answer(as_arrow(rows), (*notes, *_also_differ(runs, arms)))


def run_metrics(runs: Runs) -> dict[str, dict[str, float]]:
    """The metrics of every run that has any rollout, those it lacks left out."""
    found = {
        row["run_id"]: {name: row[name] for name in METRICS if row[name] is not None}
        for row in runs.table(NOW_SQL).to_pylist()
    }
    for row in frontier_rows(runs, Options()):
        if row["runs"] == 1 and row["benchmark"] != OWN_GROUPS and row["series"] in found:
            # Rows come in the order of rollouts, so the last evaluation stays.
            found[row["series"]][f"mean@{row['k']} {row['benchmark']}"] = row["mean_at_k"]
            found[row["series"]][f"pass@{row['k']} {row['benchmark']}"] = row["pass_at_k"]
    return found


def metrics_of(measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Every metric that a run has, METRICS first."""
    there = dict.fromkeys([*METRICS, *sorted({name for values in measured.values() for name in values})])
    return [name for name in there if any(name in values for values in measured.values())]


def metric_rows(metric: str, arms: Sequence[Arm], measured: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The rows of one metric, one for each arm."""
    base = _by_pair(arms[0], metric, measured)
    rows = []
    for arm in arms:
        values = [measured[run][metric] for run in arm.runs if metric in measured.get(run, {})]
        mean, low, high = mean_and_interval(values)
        mine = _by_pair(arm, metric, measured)
        pairs = [mine[pair] - base[pair] for pair in mine if pair in base] if arm is not arms[0] else []
        difference = mean_and_interval(pairs)
        rows.append(
            {
                "metric": metric,
                "group": arm.name,
                **{SHORT.get(key, key): value_text(value) for key, value in arm.values.items()},
                "runs": len(values),
                "mean": mean,
                "mean_low": low,
                "mean_high": high,
                "pairs": len(pairs),
                "difference": difference[0],
                "difference_low": difference[1],
                "difference_high": difference[2],
            }
        )
    return rows


def _by_pair(arm: Arm, metric: str, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The values of an arm's runs by what pairs them; runs that nothing tells apart are one, their mean."""
    found: dict[str, list[float]] = {}
    for run in arm.runs:
        if metric in measured.get(run, {}):
            found.setdefault(arm.pairs[run], []).append(measured[run][metric])
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _also_differ(runs: Runs, arms: Sequence[Arm]) -> tuple[str, ...]:
    """Keys in which runs of one group differ: their numbers are a mean over those too."""
    specs = specs_of(runs)
    notes = []
    for arm in arms:
        keys = [key for key in differing([specs[run] for run in arm.runs]) if not key.startswith(IDLE)]
        texts = [f"{key} ({', '.join(sorted({value_text(specs[run].get(key)) for run in arm.runs}))})" for key in keys]
        if texts:
            notes.append(f"{arm.name}: a mean over runs that also differ in {', '.join(texts)}")
    return tuple(notes)
