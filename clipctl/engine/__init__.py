"""The hardware behind two small protocols, so that any sampler works with any trainer.

Dimension letters as in `clipctl.rollout`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipctl.errors import EngineError
from clipctl.ranks import ALONE, Ranks
from clipctl.rollout import Batch, Completion, Prompt, SamplingParams
from clipctl.spec import Engine, Model, RunSpec

if TYPE_CHECKING:
    from torch import Tensor

    from clipctl.ledger import EntropyLedger
    from clipctl.loss import PolicyLoss, UpdateTokens

Measure = Literal["sums", "probe", "network"]
"""What a step measures: the sums over its tokens alone; the probe states before and after it too; and, before it, what
the change of their entropy should be through the network."""


class Sampler(Protocol):
    """Draws responses from the current policy."""

    def sample(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams, *, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(place among `prompts`, its n completions) of each prompt as soon as its group is finished, in any order.

        The draws depend on the prompt's key and the sample's number alone. done: places that are not wanted any more;
        those that are come out as they would have without it, to the last bit where the engine is that exact.
        """
        ...

    def update_weights(self, weights: Iterator[tuple[str, "Tensor"]], version: int) -> None:
        """Take over the named tensors; the next sample comes from policy `version`."""
        ...

    def rest(self) -> None:
        """Nothing will be sampled before the next `update_weights`: memory may be given back until then."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Statistics of every response token under the policy that scored them, flat over R responses, float32 on the CPU.

    logprob_T: log π(y). entropy_T: exact, nats. importance_T: factors of the loss weights, float64; None: all are 1.
    """

    logprob_T: "Tensor"
    entropy_T: "Tensor"
    importance_T: "Tensor | None" = None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The probe states at one update. Sums over `states`, nats.

    entropy_before, entropy_after: Σ H before and after the step. exact, sampled: ledgers before it, of all actions
    weighted by π_old, and of each state's sampled token alone; their x_ and y_ sums estimate the same.
    network: the first-order change of the states' mean entropy along the step, `total`, and what it is made of
    (`reward`, `clip_low`, `clip_high`, `momentum`, `decay`, `rounding`); None where it was not asked for.
    """

    states: int
    entropy_before: float
    entropy_after: float
    exact: "EntropyLedger"
    sampled: "EntropyLedger"
    network: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimizer step: the gradient's norm before it was cut, the loss, the optimizer batch's tokens as they were before
    the step, and the probe where one was asked for."""

    grad_norm: float
    loss: float
    tokens: "UpdateTokens"
    probe: ProbeResult | None = None


class Trainer(Protocol):
    """Scores responses and takes optimizer steps. Of several ranks all call each method together, with the same batch.

    configuration: of the library that trains, as it was given; empty where there is none.
    """

    configuration: dict[str, Any]

    def score(self, batch: Batch) -> Scores:
        """Statistics of the batch under the current weights, in the layout in which its updates will run."""
        ...

    def score_otherwise(self, batch: Batch, rows: range) -> "Tensor":
        """log π of the rows' tokens, flat, under the current weights in another micro-batch layout than that of `score`."""
        ...

    def keep_probe(self, batch: Batch, states: Sequence[tuple[int, int]], saved: Path | None = None) -> None:
        """Keep the whole distributions of (response, token) states under the current weights, for the steps to come; or, in
        the middle of a rollout, those that `save_state` saved."""
        ...

    def step(
        self, batch: Batch, rows: range, old: Scores, loss: "PolicyLoss", measure: Measure = "sums"
    ) -> UpdateResult:
        """One optimizer step on the responses `rows` (whole groups). What is measured does not change the step.
        Raises DivergedError before a non-finite step."""
        ...

    def weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """The current policy, by name, as the sampler takes it."""
        ...

    def save(self, folder: Path) -> None:
        """The current policy as a plain transformers folder (safetensors)."""
        ...

    def save_state(self, folder: Path, *, probe: bool) -> None:
        """What a trainer that is made from `save`'s folder lacks of this one, in files of its own; probe: the kept states too."""
        ...

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`, but for the kept states."""
        ...


@dataclass(frozen=True, slots=True)
class EnginePair:
    """shared: the sampler reads the trainer's own memory, so no update of weights can go wrong."""

    sampler: Sampler
    trainer: Trainer
    shared: bool


def check_sampler(engine: Engine) -> None:
    """Raises DependencyError for a GPU or a package that the sampler needs and that is not there."""
    from clipctl.models import check_device

    check_device(engine.device)
    if engine.sampler == "vllm":
        from clipctl.engine.vllm_setup import check_package

        check_package(engine.device)


def check_trainer(engine: Engine) -> None:
    """Raises DependencyError for what the trainer needs and is not there."""
    if engine.trainer == "deepspeed":
        from clipctl.engine.deepspeed_setup import check_deepspeed

        check_deepspeed()
    if engine.statistics == "triton":
        from clipctl.engine.triton_setup import check_triton

        check_triton()


def open_engine(
    spec: RunSpec, model_folder: Path, longest: int, tell: Callable[[str], None], ranks: Ranks = ALONE
) -> EnginePair:
    """The sampler and the trainer that the spec names, both with the model of `model_folder`: those of this rank.

    longest: tokens of prompt and response together, at most. tell: of an engine that was lost and is started again.
    On one device the torch sampler shares the trainer's weights, so an update needs no copy; with ZeRO-3, where no process has
    them whole, it has its own.
    """
    from clipctl.engine.passes import set_up_torch
    from clipctl.engine.torch_sampler import TorchSampler

    set_up_torch(spec.engine)
    divided = spec.engine.trainer == "deepspeed" and spec.engine.deepspeed.zero_stage == 3
    model = _load(model_folder, spec.model, "cpu" if divided else spec.engine.device)
    trainer = open_trainer(model, spec, ranks)
    if spec.engine.sampler == "vllm":
        from clipctl.engine.vllm_setup import trainer_growth

        reserved = trainer_growth(spec, model_folder, ranks.size)
        weights = cannot_gather if divided and ranks.size > 1 else trainer.weights
        vllm = open_vllm(spec.engine, spec.model, model_folder, longest, reserved, weights, tell)
        return EnginePair(vllm, trainer, shared=False)
    whole = _load(model_folder, spec.model, spec.engine.device) if divided else model
    return EnginePair(TorchSampler(whole, spec.engine.sampler_rows), trainer, shared=not divided)


def cannot_gather() -> Iterator[tuple[str, "Tensor"]]:
    """For an engine that one rank starts again by itself: with ZeRO-3 the others would have to give their shares."""
    raise EngineError(
        "a vLLM engine was lost, and with engine.deepspeed.zero_stage = 3 its rank cannot gather the weights for another one "
        "alone; run the same command again to go on from the last checkpoint"
    )


def open_trainer(model: Any, spec: RunSpec, ranks: Ranks) -> Trainer:
    """The trainer that the spec names, of the loaded model."""
    if spec.engine.trainer == "torch":
        from clipctl.engine.torch_trainer import TorchTrainer

        return TorchTrainer(model, spec, ranks)
    from clipctl.engine.deepspeed_trainer import DeepSpeedTrainer

    return DeepSpeedTrainer(model, spec, ranks)


def open_sampler(
    engine: Engine, model: Model, model_folder: Path, longest: int, tell: Callable[[str], None]
) -> Sampler:
    """The sampler alone, with the model of `model_folder`: no gradients, no optimizer. longest, tell: as above."""
    if engine.sampler == "vllm":
        return open_vllm(engine, model, model_folder, longest, 0, lambda: iter(()), tell)
    from clipctl.engine.passes import set_up_torch
    from clipctl.engine.torch_sampler import TorchSampler

    set_up_torch(engine)
    return TorchSampler(_load(model_folder, model, engine.device), engine.sampler_rows)


def open_vllm(
    engine: Engine,
    model: Model,
    model_folder: Path,
    longest: int,
    reserved: int,
    weights: Callable[[], Iterator[tuple[str, "Tensor"]]],
    tell: Callable[[str], None],
) -> Sampler:
    """The vLLM sampler. reserved: bytes that the trainer will hold beside what it holds now. weights: its current ones."""
    from clipctl.engine.vllm_sampler import VllmSampler
    from clipctl.engine.vllm_setup import largest_tensor, set_up
    from clipctl.engine.vllm_weights import CudaIpc, SharedMemory
    from clipctl.models import model_shape

    shape = model_shape(str(model_folder))
    setup = set_up(engine, model, model_folder, shape, longest, reserved)
    push = CudaIpc(largest_tensor(model, shape), setup.devices) if setup.devices else SharedMemory()
    setup.arguments["weight_backend"] = push.backend
    return VllmSampler(engine.vllm, setup, push, weights, tell)


def _load(model_folder: Path, model: Model, device: str) -> Any:
    from clipctl.engine.attention import use_grouped_attention
    from clipctl.models import load_causal_lm

    return use_grouped_attention(load_causal_lm(model_folder, model.dtype, device))
