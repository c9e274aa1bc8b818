"""The tables of the store: names, columns and types, by schema version. What they mean is in `clipctl.metrics`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 3
"""2: the ledger (columns of updates; histograms, probes, noise). 3: evaluations; clip counts of samples and tokens, the
text of tokens, questions, the time of a rollout. What an earlier version has not is NULL or empty."""

TERMS = ("pg_reward", "pg_clip_low", "pg_clip_high", "npg_reward", "npg_clip_low", "npg_clip_high")

MASSES = ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg")

LEDGER = (*TERMS, *MASSES)
"""The entropy ledger's columns in `updates`."""

NETWORK = ("total", "reward", "clip_low", "clip_high", "momentum", "decay", "rounding")
"""Parts of the change of entropy as predicted through the network."""

GAPS = {
    f"gap{number}_{side}": (f"{event}_{algorithm}", f"{event}_mass")
    for number, algorithm in ((7, "pg"), (8, "npg"))
    for side, event in (("low", "x"), ("high", "y"))
}
"""The left sides of inequalities (7) and (8): a sum and the mass it is divided by."""

KEYS = {"run_id": "string", "attempt": "int32"}

TABLES: dict[str, dict[str, str]] = {
    "rollouts": {
        "rollout": "int64",
        "time": "timestamp",
        "prompts": "int64",
        "responses": "int64",
        "tokens": "int64",
        "reward_sum": "float64",
        "reward_sq_sum": "float64",
        "graded": "int64",
        "correct": "int64",
        "groups_correct": "int64",
        "no_answer": "int64",
        "grader_failures": "int64",
        "responses_scored": "int64",
        "tokens_scored": "int64",
        "entropy_response_sum": "float64",
        "entropy_token_sum": "float64",
        "truncated": "int64",
        "groups_zero_advantage": "int64",
        "refills": "int64",
        "mismatch_max": "float64",
        "mismatch_sum": "float64",
        "mismatch_outside": "int64",
        "seconds_sample": "float64",
        "seconds_reward": "float64",
        "seconds_score": "float64",
        "seconds_update": "float64",
    },
    "updates": {
        "rollout": "int64",
        "inner_step": "int64",
        "loss": "float64",
        "grad_norm": "float64",
        "lr": "float64",
        "responses": "int64",
        "tokens": "int64",
        "tokens_advantage": "int64",
        "eps_low": "float64",
        "eps_high": "float64",
        "clip_low": "int64",
        "clip_high": "int64",
        "ratio_low": "int64",
        "ratio_high": "int64",
        "ratio_sum": "float64",
        "ratio_min": "float64",
        "ratio_max": "float64",
        "kl_sum": "float64",
        "noise_max": "float64",
        "entropy_token_sum": "float64",
        **dict.fromkeys(LEDGER, "float64"),
    },
    "histograms": {
        "rollout": "int64",
        "inner_step": "int64",
        "advantage_sign": "int32",
        "ratio_from": "float64",
        "ratio_to": "float64",
        "tokens": "int64",
        "pg": "float64",
        "npg": "float64",
    },
    "probes": {
        "rollout": "int64",
        "inner_step": "int64",
        "states": "int64",
        "entropy_before_sum": "float64",
        "entropy_after_sum": "float64",
        **{f"{kind}_{name}": "float64" for kind in ("exact", "sampled") for name in MASSES},
        **{f"network_{name}": "float64" for name in NETWORK},
    },
    "noise": {
        "rollout": "int64",
        "source": "string",
        "quantile": "float64",
        "log_ratio": "float64",
        "abs_log_ratio": "float64",
    },
    "samples": {
        "rollout": "int64",
        "prompt_id": "string",
        "position": "int64",
        "sample": "int32",
        "reward": "float64",
        "outcome": "string",
        "advantage": "float64",
        "tokens": "int32",
        "truncated": "bool",
        "entropy": "float64",
        "logprob_sum": "float64",
        "clip_low": "int32",
        "clip_high": "int32",
    },
    "questions": {
        "rollout": "int64",
        "position": "int64",
        "prompt_id": "string",
        "question": "string",
        "answer": "string",
    },
    "texts": {"rollout": "int64", "position": "int64", "sample": "int32", "text": "string"},
    "tokens": {
        "rollout": "int64",
        "prompt_id": "string",
        "position": "int64",
        "sample": "int32",
        "token": "int32",
        "token_id": "int32",
        "logprob": "float32",
        "entropy": "float32",
        "sampler_logprob": "float32",
        "advantage": "float32",
        "clip_low": "int32",
        "clip_high": "int32",
        "text": "string",
    },
    "evaluations": {
        "rollout": "int64",
        "model": "string",
        "benchmark": "string",
        "source": "string",
        "grader": "string",
        "grader_version": "string",
        "problems": "int64",
        "problems_of": "int64",
        "k": "int32",
        "temperature": "float64",
        "top_p": "float64",
        "max_tokens": "int64",
        "seed": "int64",
        "template": "string",
        "template_hash": "string",
        "chat_template_hash": "string",
        "dataset_hash": "string",
        "model_hash": "string",
        "settings": "string",
        "reused_from": "string",
        "started_at": "timestamp",
        "seconds": "float64",
    },
    "evals": {
        "rollout": "int64",
        "benchmark": "string",
        "problem_id": "string",
        "problem_hash": "string",
        "position": "int64",
        "sample": "int32",
        "outcome": "string",
        "correct": "bool",
        "tokens": "int32",
        "truncated": "bool",
        "answer": "string",
        "logprob_sum": "float64",
    },
    "eval_texts": {
        "rollout": "int64",
        "benchmark": "string",
        "position": "int64",
        "sample": "int32",
        "text": "string",
    },
    "events": {"time": "timestamp", "rollout": "int64", "kind": "string", "message": "string", "data": "string"},
}

DERIVED: dict[str, dict[str, str]] = {
    "update_sums": {
        "rollout": "int64",
        **dict.fromkeys(("tokens", "clip_low", "clip_high"), "int64"),
        **dict.fromkeys(TERMS[:3], "float64"),
        **dict.fromkeys(("eps_low_from", "eps_low_to", "eps_high_from", "eps_high_to"), "float64"),
        **dict.fromkeys(("probed", "agreed"), "int64"),
    },
    "histogram_sums": {name: kind for name, kind in TABLES["histograms"].items() if name != "inner_step"},
}
"""Tables that are made of others when a run is folded, so that looking at many long runs need not read every update: the
updates of each rollout together, with the probes in which the ledger was right; the histograms of each rollout together."""

SOURCES = {"update_sums": ("updates", "probes"), "histogram_sums": ("histograms",)}
"""What they are made of."""

FOLDED = ("rollouts", "updates", "histograms", "samples", "probes", "noise", "events", "evaluations", "evals")
"""Tables that move into metrics.duckdb."""

SHARDS = ("questions", "texts", "tokens", "eval_texts")
"""Tables that stay Parquet shards, read when a query asks for them."""

BY_ITSELF = ("events", "evaluations", "evals", "eval_texts")
"""Tables whose segments wait for no `rollouts` row. Samples of an evaluation count once its `evaluations` row is there."""

EVALUATION = "evaluation"
"""`kind` in the spec.json and status.json of an evaluation's folder."""


_SQL = {"string": "varchar", "int32": "integer", "int64": "bigint", "float32": "float", "float64": "double", "bool": "boolean",
        "timestamp": "timestamp"}  # fmt: skip


def sql_columns(table: str) -> str:
    """Names and types of a table's columns, as `create table` takes them."""
    columns = KEYS | (TABLES | DERIVED)[table]
    return ", ".join(f"{name} {_SQL[kind]}" for name, kind in columns.items())


def derived_sql(table: str, *sources: str) -> str:
    """The query that makes the rows of one of DERIVED of relations like its SOURCES."""
    assert table in SOURCES
    return _update_sums(*sources) if table == "update_sums" else _histogram_sums(*sources)


def _histogram_sums(histograms: str) -> str:
    sums = "sum(tokens)::bigint as tokens, sum(pg) as pg, sum(npg) as npg"
    return (
        f"select run_id, attempt, rollout, advantage_sign, ratio_from, ratio_to, {sums} from {histograms} group by all"
    )


def _update_sums(updates: str, probes: str) -> str:
    total, change = "(u.pg_reward + u.pg_clip_low + u.pg_clip_high)", "(p.entropy_after_sum - p.entropy_before_sum)"
    return f"""select u.run_id, u.attempt, u.rollout,
        {", ".join(f"sum(u.{name})::bigint as {name}" for name in ("tokens", "clip_low", "clip_high"))},
        {", ".join(f"sum(u.{name}) as {name}" for name in TERMS[:3])},
        min(u.eps_low) as eps_low_from, max(u.eps_low) as eps_low_to,
        min(u.eps_high) as eps_high_from, max(u.eps_high) as eps_high_to,
        count({total} + {change}) as probed, count(*) filter (sign({total}) = sign({change})) as agreed
        from {updates} as u left join {probes} as p
            on u.run_id = p.run_id and u.attempt = p.attempt and u.rollout = p.rollout and u.inner_step = p.inner_step
        group by all"""


def arrow_schema(table: str) -> "pa.Schema":
    """The Arrow schema of a table, with the schema version in its metadata."""
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float32": pa.float32(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us"),
    }
    fields = [pa.field(name, types[kind]) for name, kind in (KEYS | TABLES[table]).items()]
    return pa.schema(fields, metadata={"clipctl_schema_version": str(SCHEMA_VERSION)})
