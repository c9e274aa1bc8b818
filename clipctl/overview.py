"""The overview: a row for each run, with what its entropy does and why."""

import io
import json
import math
from collections.abc import Mapping, Sequence
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

OVERVIEW = f"""
with r as materialized (
    select run_id, rollout, entropy, reward_mean, mean_at_group, pass_at_group, response_tokens_mean,
        responses // prompts as group_size
    from rollouts
),
ends as materialized (select run_id, max(rollout) - {LAST} as early, max(rollout) - {WINDOW} as before from r group by run_id),
of_rollouts as (
    select run_id, count(*) as rollouts,
        max(entropy) filter (rollout = 0) as entropy_first,
        avg(entropy) filter (rollout > early) as entropy,
        avg(entropy) filter (rollout > early) / max(entropy) filter (rollout = 0) as entropy_normalized,
        max(reward_mean) filter (rollout = 0) as reward_first,
        avg(reward_mean) filter (rollout > early) as reward,
        avg(mean_at_group) filter (rollout > early) as mean_at_group,
        avg(pass_at_group) filter (rollout > early) as pass_at_group,
        avg(response_tokens_mean) filter (rollout > early) as response_tokens,
        max(group_size) as group_size,
        list(entropy order by rollout) as series
    from r join ends using (run_id) group by run_id
),
of_updates as (
    select run_id, 100 * sum(clip_low) / nullif(sum(tokens), 0) as clip_low_percent,
        100 * sum(clip_high) / nullif(sum(tokens), 0) as clip_high_percent,
        sum(pg_reward) filter (rollout > before) as pull_reward,
        sum(pg_clip_low) filter (rollout > before) as pull_clip_low,
        sum(pg_clip_high) filter (rollout > before) as pull_clip_high,
        sum(clip_low + clip_high) filter (rollout > before) as clipped,
        min(eps_low_from) as eps_low_from, max(eps_low_to) as eps_low_to, min(eps_high_from) as eps_high_from,
        max(eps_high_to) as eps_high_to, sum(probed) filter (rollout > before) as probed,
        sum(agreed) filter (rollout > before) as agreed
    from update_sums join ends using (run_id) group by run_id
),
evaluated as (
    select run_id, benchmark, rollout as at_rollout, k, mean_at_k, pass_at_k from evaluations where complete
    qualify row_number() over (partition by run_id order by rollout desc nulls last, started_at desc, benchmark) = 1
)
select r.run_id as run, r.state, r.eps_low, r.eps_high, r.message, r.problem, r.copy_of, r.committed, a.* exclude (run_id),
    u.* exclude (run_id), e.* exclude (run_id)
from runs as r left join of_rollouts as a using (run_id) left join of_updates as u using (run_id)
    left join evaluated as e using (run_id)
order by r.created_at, r.run_id
"""
"""One row a run with all that is counted and summed."""

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
    table = _table([_row(found) for found in runs.table(OVERVIEW).to_pylist()])
    return table.drop_columns(["problem"]) if table["problem"].null_count == len(table) else table


def shown(table: "pa.Table") -> "pa.Table":
    """The columns of the printed table under their short headings."""
    kept = [name for name in SHOWN if name in table.column_names]
    return table.select(kept).rename_columns([HEADINGS.get(name, name) for name in kept])


def _table(rows: Sequence[Mapping[str, Any]]) -> "pa.Table":
    """As JSON, which pyarrow reads by itself: for Python's own values it would import pandas, which takes longer than all else
    that is done with the rows."""
    from pyarrow.json import ParseOptions, read_json

    schema = _schema()
    if not rows:
        return schema.empty_table()
    lines = "\n".join(json.dumps({name: row.get(name) for name in schema.names}) for row in rows)
    options = ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    return read_json(io.BytesIO(lines.encode()), parse_options=options)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    texts = ("run", "state", "entropy_line", "measured_on", "verdict", "problem")
    whole = ("rollouts", "k")
    names = ("run", "state", "eps_low", "eps_high", "rollouts", "entropy_first", "entropy", "entropy_normalized",
             "entropy_line", "clip_low_percent", "clip_high_percent", "reward_first", "reward", "mean_at_k", "pass_at_k", "k",
             "measured_on", "mean_at_group", "pass_at_group", "response_tokens", "verdict", "problem")  # fmt: skip
    types = {name: pa.string() if name in texts else pa.int64() if name in whole else pa.float64() for name in names}
    return pa.schema(list(types.items()))


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table from one of OVERVIEW."""
    series = found["series"] or []
    problems = [found["problem"] or _missing(found), f"a copy of {found['copy_of']}" if found["copy_of"] else None]
    facts = Facts(
        state=found["state"],
        message=found["message"] or "",
        entropy=series,
        clipped=int(found["clipped"] or 0),
        eps=_eps(found),
        pull=_pull(found),
        agreed=int(found["agreed"] or 0),
        probed=int(found["probed"] or 0),
    )
    return {
        **found,
        "rollouts": found["rollouts"] or 0,
        "entropy_line": sparkline(series, SPARKS),
        "verdict": verdict(facts),
        "problem": "; ".join(filter(None, problems)) or None,
        **_correctness(found),
    }


def _missing(found: dict[str, Any]) -> str | None:
    """What a copy lacks that was made without some of its files. A live run commits while it is looked at, and one that
    ended counted its rollouts after they were committed."""
    here, committed = found["rollouts"] or 0, found["committed"] or 0
    if found["state"] == "running" or here >= committed:
        return None
    return f"{here} of the {committed} rollouts that it committed are here: the copy is not whole, copy it again"


def _correctness(found: dict[str, Any]) -> dict[str, Any]:
    """mean@k and pass@k of the last evaluation; without one those of the training groups; and which it is."""
    if found["benchmark"] is not None:
        at = "" if found["at_rollout"] is None else f"@{found['at_rollout']}"
        return {"measured_on": f"{found['k']}, {found['benchmark']}{at}"}
    if found["mean_at_group"] is None:
        return {"measured_on": None}
    size = found["group_size"]
    means = {"mean_at_k": found["mean_at_group"], "pass_at_k": found["pass_at_group"], "k": size}
    return means | {"measured_on": f"{size}, training groups"}


def _pull(found: dict[str, Any]) -> dict[str, float]:
    if found["pull_reward"] is None:
        return {}
    return dict(zip(PULLS, (found[f"pull_{column}"] for column in ("reward", "clip_low", "clip_high")), strict=True))


def _eps(found: dict[str, Any]) -> tuple[float, float, float, float] | None:
    values = [found[name] for name in ("eps_low_from", "eps_low_to", "eps_high_from", "eps_high_to")]
    low_from, low_to, high_from, high_to = (math.nan if value is None else float(value) for value in values)
    return None if None in values else (low_from, low_to, high_from, high_to)
