"""The overview: a row for each run, with what its entropy does and why."""

import math
from typing import TYPE_CHECKING, Any

from clipctl.sparkline import sparkline
from clipctl.store import Runs
from clipctl.verdict import PULLS, WINDOW, Facts, verdict

if TYPE_CHECKING:
    import pyarrow as pa

LAST = 5
"""Rollouts that "now" is the mean of."""
SPARKS = 12
"""Characters of a sparkline."""

ROLLOUTS = f"""
with r as (select *, max(rollout) over (partition by run_id) - rollout < {LAST} as late from rollouts)
select run_id, count(*) as rollouts,
    max(entropy) filter (rollout = 0) as entropy_first,
    avg(entropy) filter (late) as entropy,
    avg(entropy_normalized) filter (late) as entropy_normalized,
    max(reward_mean) filter (rollout = 0) as reward_first,
    avg(reward_mean) filter (late) as reward,
    avg(mean_at_group) filter (late) as mean_at_group,
    avg(pass_at_group) filter (late) as pass_at_group,
    avg(response_tokens_mean) filter (late) as response_tokens,
    max(responses // prompts) as group_size,
    list(entropy order by rollout) as series
from r group by run_id
"""
UPDATES = f"""
with last as (select run_id, max(rollout) as rollout from rollouts group by run_id)
select run_id, 100 * sum(u.clip_low) / nullif(sum(u.tokens), 0) as clip_low_percent,
    100 * sum(u.clip_high) / nullif(sum(u.tokens), 0) as clip_high_percent,
    sum(pg_reward) filter (late) as pull_reward, sum(pg_clip_low) filter (late) as pull_clip_low,
    sum(pg_clip_high) filter (late) as pull_clip_high,
    sum(u.clip_low + u.clip_high) filter (late) as clipped,
    min(u.eps_low) as eps_low_from, max(u.eps_low) as eps_low_to, min(u.eps_high) as eps_high_from,
    max(u.eps_high) as eps_high_to
from (select u.*, last.rollout - u.rollout < {WINDOW} as late from updates as u join last using (run_id)) as u
group by run_id
"""
PROBES = f"""
with last as (select run_id, max(rollout) as rollout from rollouts group by run_id)
select run_id, count(*) as probed, sum((sign(ledger_pg) = sign(entropy_change))::int) as agreed
from probes as p join last using (run_id)
where last.rollout - p.rollout < {WINDOW} and ledger_pg is not null and entropy_change is not null group by run_id
"""
EVALUATED = """
select run_id, benchmark, rollout as at_rollout, k, mean_at_k, pass_at_k from evaluations where complete
qualify row_number() over (partition by run_id order by rollout desc nulls last, started_at desc, benchmark) = 1
"""
RUNS = """select run_id, state, eps_low, eps_high, message, problem, copy_of from runs order by created_at, run_id"""

HEADINGS = {
    "eps_low": "ε_low",
    "eps_high": "ε_high",
    "entropy": "H now",
    "entropy_normalized": "now/first",
    "entropy_line": "entropy",
    "clip_low_percent": "clip-low %",
    "clip_high_percent": "clip-high %",
    "mean_at_k": "mean@k",
    "pass_at_k": "pass@k",
    "measured_on": "k and what on",
}
"""Short headings on a terminal; JSON and CSV keep the full names."""
SHOWN = ("run", "state", "eps_low", "eps_high", "rollouts", "entropy", "entropy_normalized", "entropy_line",
         "clip_low_percent", "clip_high_percent", "reward", "mean_at_k", "pass_at_k", "measured_on", "verdict",
         "problem")  # fmt: skip
"""Columns of the table; JSON, CSV and Parquet have all."""


def overview(runs: Runs) -> "pa.Table":
    """One row a run: state, ε, rollouts, and entropy, clip percentages, reward and correctness, first and now (the mean
    of the last 5 rollouts), a sparkline of entropy, and the verdict.

    mean_at_k, pass_at_k: of the run's last complete evaluation, else of its training groups; measured_on says which. clip
    percentages are over all updates. A column `problem` is there where a run has one.
    """
    import pyarrow as pa

    # What the queries below find damaged is told by the one of runs, so that comes last.
    by_run = {name: _by_run(runs, query) for name, query in _QUERIES.items()}
    rows = [_row(run, *(by_run[name].get(run["run_id"], {}) for name in _QUERIES)) for run in _rows(runs, RUNS)]
    table = pa.Table.from_pylist(rows, schema=_schema())
    return table.drop_columns(["problem"]) if table["problem"].null_count == len(table) else table


_QUERIES = {"rollouts": ROLLOUTS, "updates": UPDATES, "probes": PROBES, "evaluated": EVALUATED}


def shown(table: "pa.Table") -> "pa.Table":
    """The columns of the printed table under their short headings."""
    kept = [name for name in SHOWN if name in table.column_names]
    return table.select(kept).rename_columns([HEADINGS.get(name, name) for name in kept])


def _schema() -> "pa.Schema":
    import pyarrow as pa

    texts = ("run", "state", "entropy_line", "measured_on", "verdict", "problem")
    whole = ("rollouts", "k")
    names = ("run", "state", "eps_low", "eps_high", "rollouts", "entropy_first", "entropy", "entropy_normalized",
             "entropy_line", "clip_low_percent", "clip_high_percent", "reward_first", "reward", "mean_at_k", "pass_at_k", "k",
             "measured_on", "mean_at_group", "pass_at_group", "response_tokens", "verdict", "problem")  # fmt: skip
    types = {name: pa.string() if name in texts else pa.int64() if name in whole else pa.float64() for name in names}
    return pa.schema(list(types.items()))


def _row(run: dict[str, Any], rollouts: dict[str, Any], updates: dict[str, Any], probes: dict[str, Any],
         evaluated: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    series = rollouts.get("series") or []
    problems = [run["problem"], f"a copy of {run['copy_of']}" if run["copy_of"] else None]
    facts = Facts(
        state=run["state"],
        message=run["message"] or "",
        entropy=series,
        clipped=int(updates.get("clipped") or 0),
        eps=_eps(updates),
        pull=_pull(updates),
        agreed=int(probes.get("agreed") or 0),
        probed=int(probes.get("probed") or 0),
    )
    return {
        **run, **rollouts, **updates,
        "run": run["run_id"],
        "rollouts": rollouts.get("rollouts") or 0,
        "entropy_line": sparkline(series, SPARKS),
        "verdict": verdict(facts),
        "problem": "; ".join(filter(None, problems)) or None,
        **_correctness(rollouts, evaluated),
    }  # fmt: skip


def _correctness(rollouts: dict[str, Any], evaluated: dict[str, Any]) -> dict[str, Any]:
    if evaluated:
        at = "" if evaluated["at_rollout"] is None else f"@{evaluated['at_rollout']}"
        kept = {name: evaluated[name] for name in ("mean_at_k", "pass_at_k", "k")}
        return kept | {"measured_on": f"{evaluated['k']}, {evaluated['benchmark']}{at}"}
    if rollouts.get("mean_at_group") is None:
        return {"mean_at_k": None, "pass_at_k": None, "k": None, "measured_on": None}
    size = rollouts["group_size"]
    means = {"mean_at_k": rollouts["mean_at_group"], "pass_at_k": rollouts["pass_at_group"], "k": size}
    return means | {"measured_on": f"{size}, training groups"}


def _pull(updates: dict[str, Any]) -> dict[str, float]:
    if updates.get("pull_reward") is None:
        return {}
    return dict(zip(PULLS, (updates[f"pull_{column}"] for column in ("reward", "clip_low", "clip_high")), strict=True))


def _eps(updates: dict[str, Any]) -> tuple[float, float, float, float] | None:
    values = [updates.get(name) for name in ("eps_low_from", "eps_low_to", "eps_high_from", "eps_high_to")]
    low_from, low_to, high_from, high_to = (math.nan if value is None else float(value) for value in values)
    return None if None in values else (low_from, low_to, high_from, high_to)


def _rows(runs: Runs, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = runs.table(query).to_pylist()
    return rows


def _by_run(runs: Runs, query: str) -> dict[str, dict[str, Any]]:
    return {row["run_id"]: row for row in _rows(runs, query)}
