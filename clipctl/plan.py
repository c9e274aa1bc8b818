"""What a run would do and why, before it starts: batch arithmetic, what can clip at all, memory and disk. No torch.

Estimates are marked as such; everything else follows from the spec and the model's shape.
"""

from dataclasses import dataclass

from clipctl.models import ModelShape, model_shape
from clipctl.spec import RunSpec

GIB = 2**30
ROW_BYTES = {"samples": 90, "updates": 150, "rollouts": 300, "tokens": 16}
"""Compressed bytes of a stored row, measured on the embedded model's runs; texts come on top."""
TEXT_BYTES_PER_TOKEN = 2
STATISTICS_SCRATCH = 64 * 2**20
"""Temporaries of one chunk of the statistics pass, bytes."""
KV_CACHE, ACTIVATIONS, STATISTICS = "KV cache of the sampler, at most", "activations, estimated", "statistics"
WEIGHT_WORDS = {
    "token_mean": "1/N for each of the N response tokens of an update (token mean)",
    "sequence_mean": "1/(B·T_i): each of the B responses of an update counts the same, whatever its length T_i",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers behind `--dry-run`; sizes in bytes, None where the model's shape is not known."""

    spec: RunSpec
    shape: ModelShape | None
    responses: int
    updates: int
    clippable_updates: int
    zero_advantage_share: float | None
    max_response_tokens: int
    memory: dict[str, int]
    disk_per_rollout: int
    disk_model: int | None
    warnings: list[str]


def make_plan(spec: RunSpec) -> Plan:
    """The plan of a resolved spec; needs no network, GPU or model files."""
    shape = model_shape(spec.model.path)
    updates = spec.updates_per_rollout
    clips = spec.loss.objective == "clip"
    return Plan(
        spec=spec,
        shape=shape,
        responses=spec.responses,
        updates=updates,
        clippable_updates=updates - 1 if clips else 0,
        zero_advantage_share=zero_advantage_share(spec),
        max_response_tokens=spec.responses * spec.rollout.max_response_tokens,
        memory={} if shape is None else memory(spec, shape),
        disk_per_rollout=disk_per_rollout(spec),
        disk_model=None if shape is None else shape.parameters * _bytes_per_weight(spec),
        warnings=clip_warnings(spec),
    )


def zero_advantage_share(spec: RunSpec) -> float | None:
    """Expected share of groups whose G random rewards are all equal; None for rewards that depend on the response.

    Bernoulli: p^G + (1-p)^G. Rademacher: 2·0.5^G. Continuous draws: 0.
    """
    size = spec.rollout.group_size
    if spec.reward.kind == "bernoulli":
        return spec.reward.p**size + (1 - spec.reward.p) ** size
    return {"rademacher": 2 * 0.5**size, "normal": 0.0, "uniform": 0.0}.get(spec.reward.kind)


def clip_warnings(spec: RunSpec) -> list[str]:
    """Where the ε options cannot have an effect, or only one side has."""
    low, high = spec.clip.low, spec.clip.high
    if spec.loss.objective == "reinforce":
        return ["loss.objective = 'reinforce' never clips: clip.low and clip.high have no effect"]
    if spec.updates_per_rollout == 1:
        return [
            "one update a rollout: its ratio is 1 everywhere, nothing can clip, and clip.low and clip.high have no effect; "
            f"lower optim.responses_per_update (now {spec.optim.responses_per_update}) or raise optim.epochs"
        ]
    if low == 1.0 and high == float("inf"):
        return [
            "clip-low and clip-high are both off: this is importance-weighted policy gradient without a trust region"
        ]
    return []


def memory(spec: RunSpec, shape: ModelShape) -> dict[str, int]:
    """Bytes on the training device, by what holds them. Activations are an estimate of one micro-batch."""
    count, width = shape.parameters, _bytes_per_weight(spec)
    rollout, engine = spec.rollout, spec.engine
    rows = min(engine.sampler_rows, spec.responses)
    columns = rollout.max_prompt_tokens + rollout.max_response_tokens
    tokens = engine.tokens_per_microbatch
    kept = shape.hidden * (1 if engine.gradient_checkpointing else 16) + (
        0 if engine.gradient_checkpointing else 4 * shape.intermediate
    )
    held = {"weights": count * width}
    if width == 2:
        held["float32 master weights"] = 4 * count
        held["bfloat16 gradients"] = 2 * count
    return held | {
        "float32 gradients": 4 * count,
        "AdamW moments": 8 * count,
        KV_CACHE: rows * columns * shape.kv_values_per_token * width,
        ACTIVATIONS: tokens * shape.layers * kept * width,
        STATISTICS: STATISTICS_SCRATCH + 4 * shape.vocabulary * shape.hidden,
    }


def peak_memory(held: dict[str, int]) -> int:
    """What is held at once: the cache of the sampler is gone when activations and statistics come."""
    sampling = held[KV_CACHE]
    training = held[ACTIVATIONS] + held[STATISTICS]
    return sum(held.values()) - min(sampling, training)


def disk_per_rollout(spec: RunSpec) -> int:
    """Bytes that the store grows by in a rollout, at most."""
    tokens = spec.responses * spec.rollout.max_response_tokens
    share = {"none": 0.0, "all": 1.0}.get(str(spec.store.tokens))
    kept = float(spec.store.tokens) if share is None else share
    rows = (
        ROW_BYTES["rollouts"] + spec.updates_per_rollout * ROW_BYTES["updates"] + spec.responses * ROW_BYTES["samples"]
    )
    texts = TEXT_BYTES_PER_TOKEN * tokens if spec.store.texts else 0
    return rows + texts + int(kept * tokens * ROW_BYTES["tokens"])


def plan_lines(plan: Plan) -> list[str]:
    """The plan as prose for a terminal."""
    spec, shape = plan.spec, plan.shape
    lines = [
        _line("model", _model_words(spec, shape)),
        _line("data", f"{spec.data.path or spec.data.task}, reward {spec.reward.kind}"),
        _line(
            "rollout",
            f"{spec.rollout.prompts} prompts × {spec.rollout.group_size} = {plan.responses} responses, temperature "
            f"{spec.rollout.temperature:g}, at most {plan.max_response_tokens:,} response tokens "
            f"({spec.rollout.max_response_tokens} each); {spec.run.steps} rollouts",
        ),
        _line(
            "updates",
            f"{plan.updates} updates per rollout, {spec.optim.responses_per_update} responses each "
            f"({spec.optim.responses_per_update // spec.rollout.group_size} whole groups), "
            f"AdamW lr {spec.optim.lr:g}; {_clippable_words(plan)}",
        ),
        _line(
            "clip",
            f"{_side('clip-low', 'ε_low', spec.clip.low, 1.0)}, {_side('clip-high', 'ε_high', spec.clip.high, float('inf'))}",
        ),
        _line("loss weight", _weight_words(spec)),
    ]
    if plan.zero_advantage_share is not None:
        lines.append(
            _line("zero advantage", f"{plan.zero_advantage_share:.2%} of the groups expected ({_share_formula(spec)})")
        )
    lines += _memory_lines(plan) + _disk_lines(plan)
    return lines + [f"warning: {warning}" for warning in plan.warnings]


def _line(name: str, text: str) -> str:
    return f"{name + ':':16}{text}"


def _model_words(spec: RunSpec, shape: ModelShape | None) -> str:
    if shape is None:
        return f"{spec.model.path}, {spec.model.dtype}; its shape is not known here, so memory is left out"
    return f"{spec.model.path}, {shape.parameters:,} parameters, {spec.model.dtype}, on {spec.engine.device}"


def _clippable_words(plan: Plan) -> str:
    if plan.clippable_updates == 0:
        return "none of them can clip"
    return f"{plan.clippable_updates} of them can clip (at inner step 0 the ratio is 1)"


def _side(name: str, symbol: str, value: float, off: float) -> str:
    return f"{name} off" if value == off else f"{symbol} {value:g}"


def _weight_words(spec: RunSpec) -> str:
    constant = spec.loss.constant or spec.rollout.max_response_tokens
    return WEIGHT_WORDS.get(
        spec.loss.aggregation, f"1/(B·{constant}) for each token of the B responses of an update (constant divisor)"
    )


def _share_formula(spec: RunSpec) -> str:
    formulas = {"bernoulli": "p^G + (1-p)^G", "rademacher": "2·0.5^G"}
    return formulas.get(spec.reward.kind, "continuous rewards are never equal")


def _memory_lines(plan: Plan) -> list[str]:
    if not plan.memory:
        return []
    assert plan.shape is not None
    logits = 4 * plan.spec.engine.tokens_per_microbatch * plan.shape.vocabulary
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items())
    return [
        _line("memory", f"{_size(peak_memory(plan.memory))} at the peak (sampling and training take turns): {parts}"),
        f"{'':16}logits are never held whole: they would take {_size(logits)} a micro-batch",
    ]


def _disk_lines(plan: Plan) -> list[str]:
    steps = plan.spec.run.steps
    text = (
        f"at most {_size(plan.disk_per_rollout)} a rollout in the store, {_size(plan.disk_per_rollout * steps)} in all"
    )
    if plan.disk_model is not None:
        every = plan.spec.checkpoint.every
        saves = 1 + ((steps - 1) // every if every else 0)
        text += f"; {saves} saved model{'s' if saves > 1 else ''} of {_size(plan.disk_model)}"
    return [_line("disk", text)]


def _bytes_per_weight(spec: RunSpec) -> int:
    return 2 if spec.model.dtype == "bfloat16" else 4


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
