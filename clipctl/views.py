"""The views that queries read: means of the stored sums and counts, as SQL over the raw tables of all runs.

Sums and counts are stored, the views make the means; empty is NULL, never NaN.
"""

from collections.abc import Sequence

from clipctl.schema import GAPS, LEDGER, MASSES, NETWORK


def _evaluated(table: str) -> str:
    """Rows of an evaluation table with the evaluation's id and the run that was evaluated. folder_id: where they are stored."""
    return f"""(select t.* exclude (run_id), t.run_id as folder_id, f.eval_id is not null as in_folder,
        case when f.eval_id is null then t.run_id else f.run_id end as run_id,
        case when f.eval_id is null then t.run_id || '@' || t.rollout else f.eval_id end as eval_id,
        f.path, f.problem, coalesce(f.message, '') as message,
        case when f.eval_id is null then 'finished' else f.state end as state
        from raw_{table} as t left join evaluation_folders as f on f.eval_id = t.run_id)"""


EVALUATIONS = f"""(select * from {_evaluated("evaluations")}
    qualify row_number() over (partition by folder_id, rollout, benchmark order by attempt desc, seconds desc) = 1)"""
"""One row for each evaluation and benchmark: of a run's own the last attempt's; an evaluation's folder is written when it
begins and when it ends."""

EVALS = f"""(select e.* from {_evaluated("evals")} as e join {EVALUATIONS} as v on e.folder_id = v.folder_id
    and e.benchmark = v.benchmark and e.rollout is not distinct from v.rollout and (v.in_folder or e.attempt = v.attempt))"""
"""The samples of these evaluations; an evaluation's folder has those of all its attempts, each once."""


def _shares(prefix: str, parts: Sequence[str], named: str) -> str:
    """Summed parts as shares of what pulls at all; a part that an earlier version did not store pulls nothing."""
    gross = " + ".join(f"coalesce(abs(sum({prefix}{part})), 0)" for part in parts)
    return ", ".join(f"sum({prefix}{part}) / nullif({gross}, 0) as {named}{part}" for part in parts)


PREDICTORS = ("ledger_pg", "ledger_npg", "network_total")
"""What predicts the change of entropy at a probed update."""


def _fitted(aggregate: str, name: str) -> str:
    """A fit of the observed change to a prediction; of two points it would say nothing, of equal ones it has none."""
    fit = f"{aggregate}(entropy_change, {name})"
    return f"case when count({name}) > 2 and not isnan({fit}) then {fit} end"


VIEWS: dict[str, str] = {
    "rollouts": """create view rollouts as select
        run_id, attempt, rollout, time, prompts, responses, tokens,
        reward_sum / responses as reward_mean,
        correct / nullif(graded, 0) as mean_at_group,
        groups_correct / prompts as pass_at_group,
        entropy_response_sum / nullif(responses_scored, 0) as entropy,
        entropy_token_sum / nullif(tokens_scored, 0) as entropy_token_mean,
        entropy_response_sum / nullif(responses_scored, 0)
            / max(entropy_response_sum / nullif(responses_scored, 0)) filter (rollout = 0) over (partition by run_id)
            as entropy_normalized,
        tokens / responses as response_tokens_mean,
        truncated, groups_zero_advantage, refills, mismatch_max,
        mismatch_sum / nullif(tokens_scored, 0) as mismatch_mean,
        mismatch_outside / nullif(tokens_scored, 0) as mismatch_outside_fraction,
        seconds_sample, seconds_reward, seconds_score, seconds_update,
        reward_sum, reward_sq_sum, graded, correct, groups_correct, no_answer, grader_failures, responses_scored,
        tokens_scored, entropy_response_sum, entropy_token_sum, mismatch_sum, mismatch_outside
        from raw_rollouts""",
    "updates": f"""create view updates as select
        run_id, attempt, rollout, inner_step, loss, grad_norm, lr, responses, tokens, tokens_advantage, eps_low, eps_high,
        clip_low, clip_high, ratio_low, ratio_high, ratio_min, ratio_max, noise_max,
        entropy_token_sum / nullif(tokens, 0) as entropy_token_mean,
        clip_low / nullif(tokens, 0) as clip_low_fraction,
        clip_high / nullif(tokens, 0) as clip_high_fraction,
        clip_low / nullif(tokens_advantage, 0) as clip_low_fraction_advantage,
        clip_high / nullif(tokens_advantage, 0) as clip_high_fraction_advantage,
        ratio_low / nullif(tokens, 0) as ratio_low_fraction,
        ratio_high / nullif(tokens, 0) as ratio_high_fraction,
        ratio_sum / nullif(tokens, 0) as ratio_mean,
        kl_sum / nullif(tokens, 0) as kl,
        {", ".join(LEDGER)},
        pg_reward + pg_clip_low + pg_clip_high as pg_total,
        npg_reward + npg_clip_low + npg_clip_high as npg_total,
        {", ".join(f"{total} / nullif({mass}, 0) as {gap}" for gap, (total, mass) in GAPS.items())},
        ratio_sum, kl_sum, entropy_token_sum
        from raw_updates""",
    "update_sums": "create view update_sums as select * from raw_update_sums",
    "histogram_sums": "create view histogram_sums as select * from raw_histogram_sums",
    "histograms": "create view histograms as select * from raw_histograms",
    "probes": f"""create view probes as select
        p.run_id, p.attempt, p.rollout, p.inner_step, states,
        entropy_before_sum / states as entropy_before, entropy_after_sum / states as entropy_after,
        (entropy_after_sum - entropy_before_sum) / states as entropy_change,
        {", ".join(f"network_{name}" for name in NETWORK)},
        u.pg_total as ledger_pg, u.npg_total as ledger_npg,
        {
        ", ".join(
            f"{kind}_{total} / nullif({kind}_{mass}, 0) as {kind}_{gap}"
            for kind in ("exact", "sampled")
            for gap, (total, mass) in GAPS.items()
        )
    },
        {
        ", ".join(
            f"{kind}_{event}_mass / states as {kind}_{letter}"
            for kind in ("exact", "sampled")
            for event, letter in (("x", "p"), ("y", "q"))
        )
    },
        {", ".join(f"{kind}_{name}" for kind in ("exact", "sampled") for name in MASSES)},
        entropy_before_sum, entropy_after_sum
        from raw_probes as p left join updates as u using (run_id, attempt, rollout, inner_step)""",
    # The probes are read once for all three predictors, and rows are summed before anything is joined to them.
    "predictions": f"""create view predictions as with found as materialized (
        select run_id, {
        ", ".join(
            f'''count({name}) as {name}_probed,
            avg((sign({name}) = sign(entropy_change))::int) filter ({name} <> 0) as {name}_sign,
            {_fitted("corr", name)} as {name}_corr, {_fitted("regr_slope", name)} as {name}_slope'''
            for name in PREDICTORS
        )
    } from probes group by run_id) """
    + " union all ".join(
        f"""select run_id, '{name}' as predictor, {name}_probed as probed, {name}_sign as sign_agreement,
        {name}_corr as correlation, {name}_slope as slope from found where {name}_probed > 0"""
        for name in PREDICTORS
    ),
    "ledger": "create view ledger as with predicted as materialized (select * from predictions), summed as ("
    + " union all ".join(
        [
            f"""select run_id, '{step}' as step, 'ledger_{name}' as predictor, count({name}_reward) as updates,
        {_shares(f"{name}_", ("reward", "clip_low", "clip_high"), "pull_")},
        null::double as pull_momentum, null::double as pull_decay, null::double as pull_rounding,
        avg(({name}_clip_low > 0)::int) filter (clip_low > 0) as clip_low_up,
        avg(({name}_clip_high < 0)::int) filter (clip_high > 0) as clip_high_down,
        avg((x_{name} >= 0)::int) filter (x_mass > 0) as inequality_low,
        avg((y_{name} >= 0)::int) filter (y_mass > 0) as inequality_high
        from updates group by run_id having count({name}_reward) > 0"""
            for name, step in (("pg", "1 policy gradient"), ("npg", "2 natural gradient"))
        ]
        + [
            f"""select run_id, '3 through the network', 'network_total', count(network_total),
        {_shares("network_", NETWORK[1:], "pull_")},
        avg((network_clip_low > 0)::int) filter (network_clip_low <> 0),
        avg((network_clip_high < 0)::int) filter (network_clip_high <> 0), null, null
        from probes group by run_id having count(network_total) > 0"""
        ]
    )
    + """) select s.* exclude (predictor), coalesce(probed, 0) as probed, sign_agreement, correlation,
        case when s.predictor = 'network_total' then slope end as slope
        from summed as s left join predicted as p on p.run_id = s.run_id and p.predictor = s.predictor""",
    "noise": "create view noise as select * from raw_noise",
    "questions": "create view questions as select * from raw_questions",
    "texts": "create view texts as select * from raw_texts",
    "samples": """create view samples as select s.*, x.text from raw_samples as s
        left join raw_texts as x using (run_id, attempt, rollout, position, sample)""",
    "tokens": "create view tokens as select * from raw_tokens",
    "evaluations": f"""create view evaluations as
        with per_problem as (
            select folder_id, rollout, benchmark, position, count(*) as samples, sum(correct::int) as correct,
                sum(tokens) as tokens, sum(truncated::int) as truncated, count(*) filter (outcome = 'no_answer') as no_answer,
                count(*) filter (outcome in ('timeout', 'crash', 'too_long')) as grader_failures
            from {EVALS} group by all
        ),
        summed as (
            select folder_id, rollout, benchmark, count(*) as problems_done, sum(samples)::bigint as samples,
                sum(correct)::bigint as correct, avg(correct / samples) as mean_at_k,
                avg((correct > 0)::int) as pass_at_k, sum(tokens)::bigint as tokens, sum(truncated)::bigint as truncated,
                sum(no_answer)::bigint as no_answer, sum(grader_failures)::bigint as grader_failures
            from per_problem group by all
        )
        select v.eval_id, v.run_id, v.attempt, v.rollout, v.state, v.model, v.benchmark, v.problems, s.problems_done,
        coalesce(s.problems_done, 0) = v.problems as complete, v.k, v.temperature, v.top_p, v.max_tokens, v.seed,
        s.samples, s.correct, s.mean_at_k, s.pass_at_k, s.tokens, s.tokens / s.samples as response_tokens_mean,
        s.truncated, s.no_answer, s.grader_failures, v.grader, v.grader_version, v.source, v.problems_of, v.template,
        v.template_hash, v.chat_template_hash, v.dataset_hash, v.model_hash, v.settings::json as settings, v.reused_from,
        v.started_at, v.seconds, v.path, v.message, v.problem
        from {EVALUATIONS} as v left join summed as s on s.folder_id = v.folder_id and s.benchmark = v.benchmark
            and s.rollout is not distinct from v.rollout""",
    "evals": f"""create view evals as select e.eval_id, e.run_id, e.attempt, e.rollout, e.benchmark, e.problem_id,
        e.problem_hash, e.position, e.sample, e.outcome, e.correct, e.tokens, e.truncated, e.answer, e.logprob_sum, x.text
        from {EVALS} as e left join raw_eval_texts as x on x.run_id = e.folder_id and x.attempt = e.attempt
            and x.rollout is not distinct from e.rollout and x.benchmark = e.benchmark and x.position = e.position
            and x.sample = e.sample""",
    "events": "create view events as select time, run_id, attempt, rollout, kind, message, data::json as data from raw_events",
}
