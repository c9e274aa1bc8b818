"""What a run had to say: alarms, the controller's actions, choices, ends."""

from clipctl.analysis.answer import Answer, Options
from clipctl.store import Runs

EVENTS_SQL = """
select e.time, e.run_id as run, e.rollout, e.kind, e.message,
    epoch(e.time) - epoch(r.created_at) as seconds
from events as e left join runs as r using (run_id) order by e.time, run
"""


def events_view(runs: Runs, options: Options) -> Answer:
    """Every event, oldest first: time (UTC), run, rollout, kind, message, seconds since the run's start."""
    table = runs.table(EVENTS_SQL)
    return Answer(table, () if len(table) else ("none of these runs has an event",))
