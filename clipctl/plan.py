"""What a run would do and why, before it starts: batch arithmetic, what can clip at all, memory and disk. No torch.

Estimates are marked as such; everything else follows from the spec and the model's shape.
"""

from dataclasses import dataclass

from clipctl import machine
from clipctl.benchmarks import parse_benchmark
from clipctl.errors import SpecError
from clipctl.models import ModelShape, model_shape
from clipctl.spec import RunSpec
from clipctl.tasks import ARITH_TEST, TASKS
from clipctl.training_state import (
    GATHERED,
    GRADIENTS_16,
    ON_THEIR_WAY,
    checkpoint_bytes_per_weight,
    in_host_memory,
    training_state,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30
ROW_BYTES = {"samples": 90, "updates": 300, "rollouts": 300, "tokens": 16, "histograms": 20}
"""Compressed bytes of a stored row, measured on the embedded model's runs; texts come on top."""
TEXT_BYTES_PER_TOKEN = 2
BINS = 3 * 56
"""Rows of one update's histogram at most, signs × bins; embedded-model runs fill about 50."""
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**23}
"""Logits of one chunk of the statistics pass, as in `clipctl.statistics`, which needs torch."""
CHUNK_BUFFERS, SAMPLING_BUFFERS, NUCLEUS_BUFFERS = 3, 5, 12
"""Float32 tensors of a chunk's size, and of all logits of a sampling step, without and with top_p below 1, alive at once."""
HIDDEN_KEPT = {"bfloat16": 11, "float32": 9}
"""Tensors of the hidden size that autograd keeps a token and layer, next to 4 of the gated MLP's; measured by its
saved tensors on Llama layers (8.5-8.7 and 10.5-10.7: norms keep float32 copies of 16-bit values)."""
LARGE_GPU = 80 * GIB
PROBES = "log-probs of π_old in the probe states"
NETWORK = "gradients of entropy and of the objective's parts, weights before the step"
KV_CACHE, SAMPLING = "KV cache of the sampler, at most", "logits of a sampling step"
ACTIVATIONS, STATISTICS = "activations of a micro-batch, estimated", "statistics"
ENGINE_AWAKE, CACHE_AWAKE = "weights of the vLLM engine", "KV cache of the vLLM engine, at most"
ENGINE_ASLEEP = "weights of the vLLM engine, while it is awake"
SHARED_WEIGHTS = "weights in memory that is shared with the vLLM engine"
ENGINE_HOLDS = (ENGINE_AWAKE, CACHE_AWAKE, SHARED_WEIGHTS)
"""What is there all the time, and not the trainer's."""
WHILE_SAMPLING = (KV_CACHE, SAMPLING, ENGINE_ASLEEP)
WHILE_TRAINING = (GRADIENTS_16, GATHERED, ON_THEIR_WAY, ACTIVATIONS, STATISTICS)
IN_TURNS = WHILE_SAMPLING + WHILE_TRAINING
"""What is held only then; all else of `memory` is always there. An engine that holds more adds to `memory` and to these."""
OPTIMIZER_WORDS = {"adamw": "AdamW", "sgd": "SGD"}
HELD_WORDS = {
    0: "the whole model and optimizer",
    1: "the whole model and {share} of the optimizer",
    2: "the whole model and {share} of gradients and optimizer",
    3: "{share} of model, gradients and optimizer",
}
"""By ZeRO stage; 0 without DeepSpeed."""
WEIGHT_WORDS = {
    "token_mean": "1/N for each of the N response tokens of an update (token mean)",
    "sequence_mean": "1/(B·T_i): each of the B responses of an update counts the same, whatever its length T_i",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers behind `--dry-run`; sizes in bytes, None where the model's shape is not known."""

    spec: RunSpec
    processes: int
    shape: ModelShape | None
    responses: int
    updates: int
    clippable_updates: int
    zero_advantage_share: float | None
    max_response_tokens: int
    memory: dict[str, int]
    disk_per_rollout: int
    disk_model: int | None
    disk_checkpoint: int | None
    warnings: list[str]

    @property
    def samples_at_most(self) -> int:
        """Responses sampled in a rollout, refills of dynamic sampling included."""
        return self.responses * (1 + self.spec.rollout.max_refills * self.spec.rollout.dynamic_sampling)


def make_plan(spec: RunSpec, processes: int = 1) -> Plan:
    """The plan of a resolved spec that so many processes run; needs no network, GPU or model files.

    Raises ModelError for a broken GGUF file, SpecError for what so many processes cannot run.
    """
    check_engines(spec, processes)
    shape = model_shape(spec.model.path)
    held = {} if shape is None else memory(spec, shape, processes)
    return Plan(
        spec=spec,
        processes=processes,
        shape=shape,
        responses=spec.responses,
        updates=spec.updates_per_rollout,
        clippable_updates=clippable_updates(spec),
        zero_advantage_share=zero_advantage_share(spec),
        max_response_tokens=spec.responses * spec.rollout.max_response_tokens,
        memory=held,
        disk_per_rollout=disk_per_rollout(spec),
        disk_model=None if shape is None else shape.parameters * _bytes_per_weight(spec),
        disk_checkpoint=None if shape is None else shape.parameters * checkpoint_bytes_per_weight(spec),
        warnings=clip_warnings(spec)
        + context_warnings(spec, shape)
        + memory_warnings(spec, held)
        + process_warnings(spec, processes),
    )


def clippable_updates(spec: RunSpec) -> int:
    """Updates of a rollout whose ratios can leave 1: all but the first, at inner step 0; none without clipping."""
    both_off = spec.clip.low == 1.0 and spec.clip.high == float("inf")
    return 0 if spec.loss.objective == "reinforce" or both_off else spec.updates_per_rollout - 1


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


def context_warnings(spec: RunSpec, shape: ModelShape | None) -> list[str]:
    """Where the longest prompt and response allowed exceed the model's positions."""
    rollout = spec.rollout
    if shape is None or rollout.max_prompt_tokens + rollout.max_response_tokens <= shape.context:
        return []
    return [
        f"{spec.model.path} has {shape.context} positions: with prompts of more than "
        f"{max(0, shape.context - rollout.max_response_tokens)} tokens, responses of rollout.max_response_tokens = "
        f"{rollout.max_response_tokens} do not fit, and the run is refused"
    ]


def check_engines(spec: RunSpec, processes: int) -> None:
    """Raises SpecError where the engine of one process would lie on the GPUs of others."""
    spread = spec.engine.vllm.tensor_parallel
    if processes > 1 and spread > 1:
        raise SpecError(
            f"engine.vllm.tensor_parallel = {spread}: each of {processes} processes has an engine on its own GPU; set it to 1, "
            "or start one process"
        )


def process_warnings(spec: RunSpec, processes: int) -> list[str]:
    """Where processes have nothing to do."""
    found = []
    if processes > spec.rollout.prompts:
        found.append(
            f"rollout.prompts = {spec.rollout.prompts}: of {processes} processes {processes - spec.rollout.prompts} have nothing "
            "to sample, because a group is sampled by one"
        )
    if processes > spec.optim.responses_per_update:
        found.append(
            f"optim.responses_per_update = {spec.optim.responses_per_update}: of {processes} processes "
            f"{processes - spec.optim.responses_per_update} have no response to train on"
        )
    return found


def memory_warnings(spec: RunSpec, held: dict[str, int]) -> list[str]:
    """Where a run needs more than this machine has, or than `LARGE_GPU`."""
    if not held:
        return []
    on_cpu = spec.engine.device == "cpu"
    room = machine.memory().usable if on_cpu else LARGE_GPU
    if peak_memory(held) <= room:
        return []
    fixed = sum(size for name, size in held.items() if name not in IN_TURNS)
    return [
        f"about {size_words(peak_memory(held))} in one device, and {'this machine' if on_cpu else 'a large GPU'} has "
        f"{size_words(room)}; {size_words(fixed)} of it are weights, gradients and moments, the rest falls with "
        f"engine.sampler_rows (now {spec.engine.sampler_rows}) and engine.tokens_per_microbatch "
        f"(now {spec.engine.tokens_per_microbatch})"
    ]


def memory(spec: RunSpec, shape: ModelShape, processes: int = 1) -> dict[str, int]:
    """Bytes on the training device of each process, by what holds them.

    bfloat16: a working copy and its gradients (2 + 2 bytes a parameter), float32 masters and gradients (4 + 4), AdamW
    (8). float32: 4 + 4 + 8. With DeepSpeed shares of these. Activations are an estimate of one micro-batch.
    """
    count, width = shape.parameters, _bytes_per_weight(spec)
    rollout, engine = spec.rollout, spec.engine
    rows = min(engine.sampler_rows, spec.responses)
    columns = rollout.max_prompt_tokens + rollout.max_response_tokens
    tokens = engine.tokens_per_microbatch
    layer = HIDDEN_KEPT[spec.model.dtype] * shape.hidden + 4 * shape.intermediate
    kept = shape.layers * shape.hidden + layer if engine.gradient_checkpointing else shape.layers * layer
    return training_state(spec, count, processes) | {
        **({PROBES: 4 * spec.ledger.probe_states * shape.vocabulary} if spec.ledger.probe_states else {}),
        **({NETWORK: 20 * count} if spec.ledger.network_every else {}),
        **sampler_memory(spec, shape, rows * columns * shape.kv_values_per_token * width),
        SAMPLING: sampling_buffers(spec) * 4 * rows * shape.vocabulary,
        ACTIVATIONS: tokens * kept * width,
        STATISTICS: statistics_memory(spec, shape),
    }


def sampler_memory(spec: RunSpec, shape: ModelShape, cache: int) -> dict[str, int]:
    """Bytes of the sampler on one device but for its logits. The torch sampler has the trainer's weights and no cache while the
    trainer works; a vLLM engine has its own of both, and keeps them on a CPU and where it never sleeps."""
    engine = spec.engine
    if engine.sampler == "torch":
        return {KV_CACHE: cache}
    weights = shape.parameters * _bytes_per_weight(spec)
    devices = engine.vllm.tensor_parallel
    if engine.device == "cpu":
        return {ENGINE_AWAKE: weights, CACHE_AWAKE: cache, SHARED_WEIGHTS: weights}
    if engine.vllm.sleep == "never":
        return {ENGINE_AWAKE: weights // devices, CACHE_AWAKE: cache // devices}
    return {ENGINE_ASLEEP: weights // devices, KV_CACHE: cache // devices}


def statistics_memory(spec: RunSpec, shape: ModelShape) -> int:
    """Bytes of one exact statistics pass and its gradient: chunks of logits, float32 gradient of the hidden states,
    gradient of the head in the model's dtype."""
    chunks = CHUNK_BUFFERS * 4 * CHUNK_ELEMENTS[spec.engine.device]
    hidden = 4 * spec.engine.tokens_per_microbatch * shape.hidden
    return chunks + hidden + shape.vocabulary * shape.hidden * _bytes_per_weight(spec)


def sampling_buffers(spec: RunSpec) -> int:
    """How many tensors as large as all logits of a step the sampler needs, evaluations in training included."""
    evaluated = (spec.eval.top_p,) if spec.eval.every else ()
    return NUCLEUS_BUFFERS if min((spec.rollout.top_p, *evaluated)) < 1 else SAMPLING_BUFFERS


def peak_memory(held: dict[str, int]) -> int:
    """What is held at once: the sampler gives its memory back before gradients, activations and statistics come.

    Gradients and activations are counted together, although the last gradient comes when most activations have gone: at
    most 10 % too much, by the bytes of whole steps on tensors without memory.
    """
    sampling, training = (sum(held.get(name, 0) for name in names) for names in (WHILE_SAMPLING, WHILE_TRAINING))
    return sum(held.values()) - min(sampling, training)


def disk_per_rollout(spec: RunSpec) -> int:
    """Bytes that the store grows by in a rollout, at most."""
    samples = spec.responses * (1 + spec.rollout.max_refills * spec.rollout.dynamic_sampling)
    tokens = samples * spec.rollout.max_response_tokens
    share = {"none": 0.0, "all": 1.0}.get(str(spec.store.tokens))
    kept = float(spec.store.tokens) if share is None else share
    rows = ROW_BYTES["rollouts"] + spec.updates_per_rollout * ROW_BYTES["updates"] + samples * ROW_BYTES["samples"]
    rows += spec.updates_per_rollout * BINS * ROW_BYTES["histograms"]
    texts = TEXT_BYTES_PER_TOKEN * tokens if spec.store.texts else 0
    return rows + texts + int(kept * spec.responses * spec.rollout.max_response_tokens * ROW_BYTES["tokens"])


def disk_of_run(plan: Plan) -> int:
    """Bytes that the whole run takes, at most: the store, the checkpoints that stay and the one that is being written."""
    kept, alone = kept_checkpoints(plan.spec)
    checkpoints = (kept + 1) * (plan.disk_checkpoint or 0) + alone * (plan.disk_model or 0)
    return plan.disk_per_rollout * plan.spec.run.steps + checkpoints


def plan_lines(plan: Plan) -> list[str]:
    """The plan as prose for a terminal."""
    spec = plan.spec
    lines = [
        _line("model", _model_words(spec, plan.shape)),
        _line("data", _data_words(spec)),
        _line("reward", _reward_words(spec)),
        _line(
            "rollout",
            f"{spec.rollout.prompts} prompts × {spec.rollout.group_size} = {plan.responses} responses, "
            f"temperature {spec.rollout.temperature:g}; {_count(spec.run.steps, 'rollout')}",
        ),
        _more(
            f"at most {plan.max_response_tokens:,} response tokens a rollout, {spec.rollout.max_response_tokens} a response"
        ),
        *_dapo_lines(plan),
        *_sampler_lines(spec),
        *_trainer_lines(spec),
        _line(
            "updates",
            f"{_count(plan.updates, 'update')} per rollout, {spec.optim.responses_per_update} responses each "
            f"({_count(spec.optim.responses_per_update // spec.rollout.group_size, 'whole group')}), "
            f"{OPTIMIZER_WORDS[spec.optim.optimizer]} lr {spec.optim.lr:g}",
        ),
        _more(_clippable_words(plan)),
        _line("clip", _clip_words(spec)),
        *_control_lines(spec),
        _line("ledger", _ledger_words(plan)),
        _line("loss weight", _weight_words(spec)),
    ]
    if plan.processes > 1:
        lines += _process_lines(plan)
    if plan.zero_advantage_share is not None:
        lines.append(
            _line("zero advantage", f"{plan.zero_advantage_share:.2%} of the groups expected ({_share_formula(spec)})")
        )
    lines += _eval_lines(plan) + _memory_lines(plan) + _disk_lines(plan)
    return lines + [f"warning: {warning}" for warning in plan.warnings]


def _line(name: str, text: str) -> str:
    return f"{name + ':':16}{text}"


def _more(text: str) -> str:
    return f"{'':16}{text}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number != 1 else "")


def _model_words(spec: RunSpec, shape: ModelShape | None) -> str:
    if shape is None:
        return f"{spec.model.path}, {spec.model.dtype}; its shape is not known here, so memory is left out"
    return f"{spec.model.path}, {shape.parameters:,} parameters, {spec.model.dtype}, on {spec.engine.device}"


def _sampler_lines(spec: RunSpec) -> list[str]:
    engine = spec.engine
    if engine.sampler == "torch":
        return []
    where = "on the CPU" if engine.device == "cpu" else f"on {_count(engine.vllm.tensor_parallel, 'GPU')}"
    words = f"vLLM in a process of its own {where}, up to {engine.sampler_rows} responses side by side"
    asleep = {"auto": "asleep while the trainer works, unless measured memory is enough for both", "never": "always awake",
              "always": "asleep while the trainer works"}  # fmt: skip
    return [_line("sampler", words if engine.device == "cpu" else f"{words}, {asleep[engine.vllm.sleep]}")]


def _trainer_lines(spec: RunSpec) -> list[str]:
    if spec.engine.trainer == "torch":
        return []
    settings = spec.engine.deepspeed
    away = {"none": "", "optimizer": ", float32 weights and moments in the machine's memory",
            "all": ", all weights and moments in the machine's memory"}  # fmt: skip
    return [_line("trainer", f"DeepSpeed, ZeRO-{settings.zero_stage}{away[settings.offload]}")]


def _data_words(spec: RunSpec) -> str:
    place = f"the rows of {spec.data.path}" if spec.data.path else f"split {spec.data.split}"
    return f"task {spec.data.task}, {place}"


def _reward_words(spec: RunSpec) -> str:
    reward = spec.reward
    if reward.kind == "bernoulli":
        return f"bernoulli, 1 with probability {reward.p:g} whatever the response"
    if reward.kind == "function":
        return f"your function {reward.function}"
    if reward.kind == "gsm8k" or reward.kind == "math":
        return f"{reward.kind}, {reward.correct:g} for a correct response and {reward.wrong:g} for any other"
    return f"{reward.kind}, drawn whatever the response"


def _dapo_lines(plan: Plan) -> list[str]:
    rollout = plan.spec.rollout
    lines = []
    if rollout.dynamic_sampling:
        lines.append(
            f"dynamic sampling: groups without advantage are replaced, {rollout.max_refills} refills and "
            f"{plan.samples_at_most} responses at most"
        )
    if rollout.overlong_buffer and rollout.overlong_penalty:
        lines.append(
            f"overlong penalty: up to {rollout.overlong_penalty:g} over the last {rollout.overlong_buffer} of "
            f"{rollout.max_response_tokens} tokens"
        )
    return [_more(line) for line in lines]


def _clippable_words(plan: Plan) -> str:
    if plan.clippable_updates == 0:
        return "none of them can clip"
    return f"{plan.clippable_updates} of them can clip (at inner step 0 the ratio is 1)"


def _clip_words(spec: RunSpec) -> str:
    if spec.loss.objective == "reinforce":
        return "none, objective reinforce"
    return f"{_side('clip-low', 'ε_low', spec.clip.low, 1.0)}, {_side('clip-high', 'ε_high', spec.clip.high, float('inf'))}"


def _control_lines(spec: RunSpec) -> list[str]:
    control = spec.control
    if control.target_entropy is None:
        return []
    target = "that of the first rollout" if control.target_entropy == "initial" else f"{control.target_entropy:g} nat"
    name = control.actuator.replace("eps", "ε")
    return [
        _line(
            "control",
            f"from the second rollout on {name} is set within {control.bounds[0]:g} … {control.bounds[1]:g} so that entropy "
            f"goes to {target}",
        )
    ]


def _ledger_words(plan: Plan) -> str:
    ledger, updates = plan.spec.ledger, plan.updates
    if not ledger.probe_states:
        return "sums of every update, no probe states"
    network = -(-updates // ledger.network_every) if ledger.network_every else 0
    marks = {step for every in (ledger.probe_every, ledger.network_every) if every for step in range(0, updates, every)}
    words = f"{ledger.probe_states} probe states, at {len(marks)} of {_count(updates, 'update')} per rollout"
    return f"{words}, {network} of them also through the network" if network else words


def _side(name: str, symbol: str, value: float, off: float) -> str:
    return f"{name} off" if value == off else f"{symbol} {value:g}"


def _weight_words(spec: RunSpec) -> str:
    constant = spec.loss.constant or spec.rollout.max_response_tokens
    words = WEIGHT_WORDS.get(
        spec.loss.aggregation, f"1/(B·{constant}) for each token of the B responses of an update (constant divisor)"
    )
    cap = spec.loss.importance_cap
    return words if cap is None else f"{words}, times min({cap:g}, π_old(trainer) / π(sampler))"


def _share_formula(spec: RunSpec) -> str:
    formulas = {"bernoulli": "p^G + (1-p)^G", "rademacher": "2·0.5^G"}
    return formulas.get(spec.reward.kind, "continuous rewards are never equal")


def _process_lines(plan: Plan) -> list[str]:
    """Who does what of a rollout; memory is that of one of them."""
    count, spec = plan.processes, plan.spec
    stage = spec.engine.deepspeed.zero_stage if spec.engine.trainer == "deepspeed" else 0
    held = HELD_WORDS[stage].format(share=f"1/{count}")
    return [
        _line(
            "processes",
            f"{count}, each with {held}, {-(-spec.rollout.prompts // count)} of {spec.rollout.prompts} "
            f"prompts a rollout and about 1/{count} of the micro-batches; numbers below are of one of them",
        ),
        _more("gradients are summed over all of them, so loss and metrics are those of one process"),
    ]


def _eval_lines(plan: Plan) -> list[str]:
    """When what is evaluated, and what it costs in tokens beside training."""
    spec, after = plan.spec, plan.spec.evaluated_after
    if not after:
        return []
    settings = spec.eval
    problems = eval_problems(spec)
    known = sum(count for count in problems.values() if count is not None)
    tokens = known * settings.k * (settings.max_response_tokens or spec.rollout.max_response_tokens)
    first = ", ".join(map(str, after[:3]))
    when = first if len(after) <= 3 else f"{first} … {after[-1]}"
    names = ", ".join(f"{name} ({'?' if count is None else count} problems)" for name, count in problems.items())
    share = len(after) * tokens / (spec.run.steps * plan.max_response_tokens)
    lines = [
        _line("evaluation", f"{names}, {settings.k} samples each, after {when} rollouts ({len(after)} times)"),
        _more(
            f"at most {tokens:,} response tokens each time, {len(after) * tokens:,} in all: {share:.0%} of what the rollouts may "
            "sample"
        ),
    ]
    if None in problems.values():
        lines.append(_more("problems of files are counted when they are read, and come on top"))
    if settings.reuse:
        lines.append(_more("the base model's numbers are reused where the cache has them"))
    return lines


def eval_problems(spec: RunSpec) -> dict[str, int | None]:
    """Problems of each benchmark of `[eval]`, None for files, which are not read here. Raises SpecError for unknown names."""
    found: dict[str, int | None] = {}
    for name, path in map(parse_benchmark, spec.eval.benchmarks):
        count = ARITH_TEST if name == "arith" else dict(TASKS[name].rows).get("test") if name in TASKS else None
        limit = spec.eval.limit
        found[name] = None if path is not None or count is None else count if limit is None else min(count, limit)
    return found


def _memory_lines(plan: Plan) -> list[str]:
    if not plan.memory:
        return []
    assert plan.shape is not None
    logits = 4 * plan.spec.engine.tokens_per_microbatch * plan.shape.vocabulary
    parts = [_more(f"{size_words(size):>10}  {name}") for name, size in plan.memory.items()]
    each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    host = in_host_memory(plan.spec, plan.shape.parameters, plan.processes)
    words = f"{size_words(host)} more of the machine's memory for each process, by engine.deepspeed.offload"
    return [
        _line("memory", f"{size_words(peak_memory(plan.memory))} at the peak{each} (sampling and training take turns)"),
        *parts,
        *([_more(words)] if host else []),
        _more(f"logits are never held whole: they would take {size_words(logits)} a micro-batch"),
    ]


def _disk_lines(plan: Plan) -> list[str]:
    each, steps = plan.disk_per_rollout, plan.spec.run.steps
    lines = [
        _line("disk", f"at most {size_words(each)} a rollout in the store, {size_words(each * steps)} in all"),
    ]
    if plan.disk_model is not None and plan.disk_checkpoint is not None:
        kept, alone = kept_checkpoints(plan.spec)
        others = f", {_count(alone, 'model')} alone of {size_words(plan.disk_model)}" if alone else ""
        lines.append(
            _more(
                f"{_count(kept, 'checkpoint')} of {size_words(plan.disk_checkpoint)}{others}, and one more while it is written"
            )
        )
    return lines


def kept_checkpoints(spec: RunSpec) -> tuple[int, int]:
    """Checkpoints, and models without what going on needs, that are there at the end of the run."""
    steps, settings = spec.run.steps, spec.checkpoint
    made = [*(range(settings.every, steps, settings.every) if settings.every else ()), steps]
    kept = len(made) if settings.keep == "all" else min(settings.keep, len(made))
    old = made[: len(made) - kept]
    return kept, sum(rollouts % settings.models_every == 0 for rollouts in old) if settings.models_every else 0


def _bytes_per_weight(spec: RunSpec) -> int:
    return 2 if spec.model.dtype == "bfloat16" else 4


def size_words(size: float) -> str:
    """A number of bytes for people."""
    unit, name = (GIB, "GiB") if size >= GIB else (MIB, "MiB") if size >= MIB else (KIB, "KiB")
    return f"{size / unit:.1f} {name}"
