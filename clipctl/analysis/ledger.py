"""The ledger's views: who pulled at entropy in a run, as a summary or rollout by rollout."""

from clipctl.analysis.answer import Answer, Options, without
from clipctl.store import Runs

PARTS = ("reward", "clip_low", "clip_high")
STEPS = ("pg", "npg")
EVENTS = (("low", "x"), ("high", "y"))
NEEDED = "ledger (runs of earlier versions have none, nor has a run without updates)"


def _sums() -> str:
    names = [f"{step}_{part}" for step in STEPS for part in PARTS]
    return ", ".join(f"sum({name}) as {name}" for name in names)


def _gaps() -> str:
    """Inequalities (7) and (8) of a rollout: the gap over all its updates together, and the share of updates in which it
    is at least 0."""
    return ", ".join(
        f"sum({event}_{step}) / nullif(sum({event}_mass), 0) as gap{number}_{side}, "
        f"avg(({event}_{step} >= 0)::int) filter ({event}_mass > 0) as holds{number}_{side}"
        for number, step in ((7, "pg"), (8, "npg"))
        for side, event in EVENTS
    )


def _shares(step: str) -> str:
    """Terms of a rollout as shares of the run's whole gross pull, alone and cumulated: the last cumulated ones are the
    summary's."""
    terms = {part: f"{step}_{part}" for part in PARTS}
    terms["total"] = " + ".join(terms.values())
    return ", ".join(
        f"({term}) / {step}_gross as {step}_{part}, "
        f"sum({term}) over (partition by run_id order by rollout) / {step}_gross as {step}_{part}_cumulated"
        for part, term in terms.items()
    )


GROSS = ", ".join(
    f"nullif({' + '.join(f'abs(sum({step}_{part}))' for part in PARTS)}, 0) as {step}_gross" for step in STEPS
)
PROBED = """select run_id, rollout, count(*) as probed, sum(entropy_change) as observed,
    sum(network_total) as predicted_network, sum(ledger_pg) as predicted_pg, sum(ledger_npg) as predicted_npg
    from probes group by run_id, rollout"""
SERIES_SQL = f"""
with summed as (
    select run_id, rollout, count(*) as updates, {_sums()}, {_gaps()}
    from updates where pg_reward is not null group by run_id, rollout
),
whole as (select run_id, {GROSS} from summed group by run_id),
gaps as (select run_id, rollout, updates, columns('^(gap|holds)[78]_') from summed),
shares as (select run_id, rollout, {", ".join(map(_shares, STEPS))} from summed join whole using (run_id))
select run_id, rollout, updates, shares.* exclude (run_id, rollout), gaps.* exclude (run_id, rollout, updates),
    probed, observed, predicted_network, predicted_pg, predicted_npg
from gaps join shares using (run_id, rollout) left join ({PROBED}) using (run_id, rollout)
"""
"""One row a run and rollout. Terms are shares of the run's gross pull Σ over the parts |sum of the part|; observed and
predicted changes of entropy are summed over the rollout's probes, nats (through the network) or of no unit (ledger)."""
PROBES_SQL = """
select run_id, rollout, inner_step, entropy_change, ledger_pg, network_total from probes
qualify (row_number() over (partition by run_id order by rollout, inner_step) - 1)
    % greatest(count(*) over (partition by run_id) // 300, 1) = 0
order by run_id, rollout, inner_step
"""
"""The probed updates of each run, of many every so many: what is drawn."""


def ledger_view(runs: Runs, options: Options) -> Answer:
    """Three rows a run: the ledger of a policy-gradient step, of a natural one, and the prediction through the network where
    the run has one. With `rollouts`, the terms of every rollout, alone and cumulated, both inequalities, and predicted
    against observed change. Raises SpecError where no run has a ledger."""
    if options.rollouts:
        table = runs.table(f"select * from ({SERIES_SQL}) order by run_id, rollout")
    else:
        table = runs.table("select * from ledger order by run_id, step")
    return Answer(table, without(runs, table["run_id"].to_pylist(), "ledger", NEEDED))
