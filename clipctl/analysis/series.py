"""The series over rollouts: entropy and clipping of every run, and their means over the runs of an arm."""

from collections.abc import Sequence
from typing import Any

from clipctl.analysis.answer import Answer, Options, as_arrow, without
from clipctl.analysis.arms import Arm, arms_of, arms_sql, t_quantile
from clipctl.store import Runs

ENTROPY = ("entropy", "entropy_token_mean", "entropy_normalized")
ENTROPY_SQL = f"select run_id, rollout, {', '.join(ENTROPY)} from rollouts"

FRACTIONS = {
    f"{kind}_percent{suffix}": (kind, denominator)
    for suffix, denominator in (("", "tokens"), ("_advantage", "tokens_advantage"))
    for kind in ("clip_low", "clip_high")
} | {f"{kind}_percent": (kind, "tokens") for kind in ("ratio_low", "ratio_high")}
"""Percentages of the clip view: a count and its denominator, both summed over the updates of a rollout."""
CLIP = (*FRACTIONS, "ratio_min", "ratio_max")


def _clip_sql(along: str) -> str:
    parts = ", ".join(
        f"100.0 * sum({count}) / nullif(sum({tokens}), 0) as {name}" for name, (count, tokens) in FRACTIONS.items()
    )
    return (
        f"select run_id, {along}, {parts}, min(ratio_min) as ratio_min, max(ratio_max) as ratio_max, "
        "any_value(eps_low) as eps_low, any_value(eps_high) as eps_high from updates group by all"
    )


CLIP_SQL = _clip_sql("rollout")
CLIP_STEPS_SQL = _clip_sql("inner_step")


def averaged(
    runs: Runs, arms: Sequence[Arm], query: str, metrics: Sequence[str], along: str = "rollout"
) -> list[dict[str, Any]]:
    """Mean over an arm's runs of each metric of `query` (run_id, along, metrics) at each place along, with its t interval.

    Rows series, runs, along, and of each metric its value, `_low` and `_high`: NULL for fewer than two runs.
    """
    sums = ", ".join(
        f"avg({name}) as {name}, stddev_samp({name}) as {name}_low, count({name}) as {name}_high" for name in metrics
    )
    rows: list[dict[str, Any]] = runs.table(
        f"select arm as series, count(*) as runs, {along}, {sums} from ({query}) join {arms_sql(arms)} using (run_id) "
        f"group by arm, place, {along} order by place, {along}"
    ).to_pylist()
    for row in rows:
        for name in metrics:
            mean, deviation, count = row[name], row[f"{name}_low"], row[f"{name}_high"]
            half = None if deviation is None else t_quantile(count) * deviation / count**0.5
            row[f"{name}_low"] = None if half is None else mean - half
            row[f"{name}_high"] = None if half is None else mean + half
    return rows


def singles(runs: Sequence[str]) -> list[Arm]:
    """Every run as an arm of its own."""
    return [Arm(run, (run,), {}, {}) for run in runs]


def runs_and_means(runs: Runs, by: Sequence[str], query: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The series of every run, and after them the means over the arms that have several."""
    arms = arms_of(runs, by)
    each = singles([run for arm in arms for run in arm.runs])
    several = [arm for arm in arms if len(arm.runs) > 1]
    return averaged(runs, [*each, *several], query, metrics)


def entropy_view(runs: Runs, options: Options) -> Answer:
    """Entropy of every rollout by both definitions, and divided by that of rollout 0: of each run, then the means over
    runs that differ in their seed alone, with 95 % t intervals. nats."""
    rows = runs_and_means(runs, options.by, ENTROPY_SQL, ENTROPY)
    scored = [row["series"] for row in rows if row["entropy"] is not None]
    notes = without(runs, scored, "entropy", "entropies (no rollout has been scored)")
    return Answer(as_arrow(rows), notes)


def clip_view(runs: Runs, options: Options) -> Answer:
    """Clipping of every rollout, its updates together: active clips over all tokens and over those with A ≠ 0, ratios out
    of bounds whatever A, the extremes of the ratio, the ε in force. Means over seeds as in `entropy_view`; the extremes
    of several runs are the extremes of all."""
    extremes = "min(ratio_min) as ratio_min, max(ratio_max) as ratio_max, "
    rows = runs_and_means(runs, options.by, CLIP_SQL, tuple(FRACTIONS))
    arms = arms_of(runs, options.by)
    every = [*singles([run for arm in arms for run in arm.runs]), *(arm for arm in arms if len(arm.runs) > 1)]
    more = {
        (row["arm"], row["rollout"]): row
        for row in runs.table(
            f"select arm, rollout, {extremes} case when min(eps_low) = max(eps_low) then min(eps_low) end as eps_low, "
            "case when min(eps_high) = max(eps_high) then min(eps_high) end as eps_high "
            f"from ({CLIP_SQL}) join {arms_sql(every)} using (run_id) group by all"
        ).to_pylist()
    }
    for row in rows:
        found = more[row["series"], row["rollout"]]
        row |= {name: found[name] for name in ("ratio_min", "ratio_max", "eps_low", "eps_high")}
    notes = without(runs, [row["series"] for row in rows], "clip", "updates (nothing has been trained yet)")
    return Answer(as_arrow(rows), notes)
