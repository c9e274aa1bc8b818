"""A run's `status.json` made again, where it is damaged or missing, from what else the run's folder holds.

Which attempts there were, and where each went on, is stored with the rows of `journal/` and `metrics.duckdb`; without it readers
would show the rows that a later attempt did again a second time.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipctl.folder import SEGMENT, list_segments
from clipctl.store import Runs


def recover_status(folder: Path, problem: str) -> tuple[dict[str, Any], str]:
    """What the next attempt needs to know of those before it, and a line that says what was damaged and what is lost.

    problem: what is wrong with status.json. The state is `stopped` where an alarm ended the last attempt, else `interrupted`.
    Raises StoreError where the rows cannot be read.
    """
    with Runs([folder]) as runs:
        begun = runs.sql("select attempt, min(rollout), max(rollout), min(time) from rollouts group by all").fetchall()
        told = runs.sql("select attempt, kind, data, time from events order by attempt, time").fetchall()
    named = {int(match["attempt"]) for match in map(SEGMENT.fullmatch, list_segments(folder)) if match}
    last = max({*named, *(row[0] for row in (*begun, *told))}, default=0)
    first_rollout = {attempt: first for attempt, first, _, _ in begun}
    resumed = {attempt: json.loads(data)["rollouts"] for attempt, kind, data, _ in told if kind == "resumed"}
    times: dict[int, datetime] = {}
    for attempt, *_, time in (*begun, *told):
        # Rows of schema version 1 have none.
        if time is not None:
            times[attempt] = min(time.replace(tzinfo=UTC), times.get(attempt, datetime.max.replace(tzinfo=UTC)))
    created = min(times.values(), default=datetime.now(UTC))
    ends = [kind for attempt, kind, _, _ in told if attempt == last]
    # An attempt that found no checkpoint began again at 0, which is its first rollout.
    went_on = {attempt: at for attempt, at in sorted((first_rollout | resumed).items()) if attempt}
    rollouts = max(((attempt, rollout + 1) for attempt, _, rollout, _ in begun), default=(0, 0))[1]
    status = {
        "state": "stopped" if ends[-1:] == ["stopped"] else "interrupted",
        "created_at": created.isoformat(),
        "rollouts": rollouts,
        "attempt": last,
        "resumes": [
            {"attempt": attempt, "resumed_at": at, "time": times.get(attempt, created).isoformat()}
            for attempt, at in went_on.items()
        ],
    }
    line = (
        f"{folder.name}: {problem}; it is made again of what is stored: {last + 1} attempt{'s' * (last > 0)}, {rollouts} "
        f"rollouts; lost is when the run was begun (for which its first row, of {created:%Y-%m-%d %H:%M} UTC, stands) and its "
        "preset's name (for which that of this command stands)"
    )
    return status, line
