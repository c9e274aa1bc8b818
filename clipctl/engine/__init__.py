"""The hardware behind two small protocols, so that any sampler works with any trainer.

Dimension letters as in `clipctl.rollout`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clipctl.rollout import Batch, Completion, Prompt, SamplingParams
from clipctl.spec import RunSpec

if TYPE_CHECKING:
    from torch import Tensor

    from clipctl.loss import LossSums


class Sampler(Protocol):
    """Draws responses from the current policy."""

    def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """n completions of each prompt; the draws depend on the prompt's key and the sample's number alone."""
        ...

    def update_weights(self, weights: Iterator[tuple[str, "Tensor"]], version: int) -> None:
        """Take over the named tensors; the next sample comes from policy `version`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Statistics of every response token under the policy that scored them, flat over R responses, float32 on the CPU.

    logprob_T: log π(y). entropy_T: exact, nats.
    """

    logprob_T: "Tensor"
    entropy_T: "Tensor"


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimizer step: the gradient's norm before it was cut, and the sums over the optimizer batch's tokens."""

    grad_norm: float
    sums: "LossSums"


Loss = Callable[["Tensor", "Tensor", "Tensor", "Tensor", "Tensor"], tuple["Tensor", "LossSums"]]
"""(logprob_T, entropy_T, old_logprob_T, advantages_T, weights_T) of one micro-batch -> loss to be minimised, sums."""


class Trainer(Protocol):
    """Scores responses and takes optimizer steps."""

    def score(self, batch: Batch) -> Scores:
        """Statistics of the batch under the current weights, in the layout in which its updates will run."""
        ...

    def step(self, batch: Batch, rows: range, old: Scores, loss: Loss) -> UpdateResult:
        """One optimizer step on the responses `rows` (whole groups). Raises DivergedError before a non-finite step."""
        ...

    def weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """The current policy, by name, as the sampler takes it."""
        ...

    def save(self, folder: Path) -> None:
        """The current policy as a plain transformers folder (safetensors)."""
        ...


@dataclass(frozen=True, slots=True)
class EnginePair:
    sampler: Sampler
    trainer: Trainer


def open_engine(spec: RunSpec, model_folder: Path) -> EnginePair:
    """The sampler and the trainer that the spec names, both with the model of `model_folder`.

    On one device the torch sampler shares the trainer's weights, so an update needs no copy.
    """
    from clipctl.engine.attention import use_grouped_attention
    from clipctl.engine.torch_sampler import TorchSampler
    from clipctl.engine.torch_trainer import TorchTrainer, set_up_torch
    from clipctl.models import load_causal_lm

    set_up_torch(spec.engine)
    model = use_grouped_attention(load_causal_lm(model_folder, spec.model.dtype, spec.engine.device))
    return EnginePair(TorchSampler(model, spec.engine.sampler_rows), TorchTrainer(model, spec))
