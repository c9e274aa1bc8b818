"""The DeepSpeed trainer: ZeRO divides the training state among processes; passes, loss and statistics are those of all trainers.

The loss of a micro-batch is its share of a sum over the whole optimizer batch. DeepSpeed averages gradients over processes, so
the loss is multiplied by their number, and it is told by hand which backward pass is the last one of a step. Collective
operations happen inside passes, so every process makes as many of them.

ZeRO-1 to 3 keep float32 masters of bfloat16 weights themselves. ZeRO-0 would add gradients up in bfloat16, so there DeepSpeed
has the masters of `masters.py` for its weights, sums their gradients and steps them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipctl.engine import Measure, Scores, UpdateResult
from clipctl.engine.buckets import buckets as fill_buckets
from clipctl.engine.deepspeed_config import deepspeed_config
from clipctl.engine.deepspeed_module import PolicyModule
from clipctl.engine.deepspeed_setup import load_deepspeed, quiet
from clipctl.engine.masters import copy_back, master_of, take_gradients
from clipctl.engine.model_folder import write_model
from clipctl.engine.optimizers import OPTIMIZERS
from clipctl.engine.passes import (
    Pass,
    check_finite,
    layout,
    microbatch_loss,
    my_passes,
    padded,
    score_batch,
    score_otherwise,
    sum_statistics,
    update_tokens,
)
from clipctl.engine.torch_probe import TorchProbe
from clipctl.errors import SpecError, first_line
from clipctl.loss import PolicyLoss
from clipctl.ranks import ALONE, Ranks
from clipctl.rollout import Batch
from clipctl.spec import RunSpec
from clipctl.statistics import TokenStatistics

PROBE_FILE = "probe.safetensors"
TAG = "deepspeed"
"""Folder of DeepSpeed's own files in a checkpoint's state."""
BUCKET = 1 << 27
"""Weights that are gathered together."""


class DeepSpeedTrainer:
    """Trains `model` (a transformers causal LM with its attention set up) as the spec says, alone or as one of `ranks`."""

    def __init__(self, model: Any, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        self.model, self.spec, self.ranks = model, spec, ranks
        self.stage = spec.engine.deepspeed.zero_stage
        self.probe: TorchProbe | None = None
        if spec.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.module = PolicyModule(model, spec.rollout.temperature, spec.engine.statistics)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if spec.engine.device == "cuda" else torch.device("cpu")
        )
        self.deepspeed = load_deepspeed(ranks, spec.engine.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.configuration = deepspeed_config(spec, sum(parameter.numel() for parameter in self.parameters))
        self.masters: list[nn.Parameter] = []
        module: nn.Module = self.module
        with quiet(), ranks.together(), named_keys():
            if self.stage == 0:
                self.masters = [master_of(parameter) for parameter in self.parameters]
                module = nn.ParameterList(self.masters)
            elif self.stage == 3:
                # Each weight goes to the GPU, and most of it from there, by itself: the whole model may not fit.
                self.deepspeed.zero.Init(module=self.module, config_dict_or_path=self.configuration)
                for buffer in self.module.buffers():
                    buffer.data = buffer.data.to(self.device)
            optimizer = OPTIMIZERS[spec.optim.optimizer](list(module.parameters()), spec.optim)
            self.engine, *_ = self.deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.configuration, dist_init_required=False
            )

    def score(self, batch: Batch) -> Scores:
        """Log-probs and entropies of the batch, in the micro-batches in which its updates will run."""
        return score_batch(batch, self.spec, self._forward, self.ranks, together=True)

    def score_otherwise(self, batch: Batch, rows: range) -> Tensor:
        """log π of the rows' tokens, flat, in micro-batches of another size than those of `score`."""
        budget = self.spec.engine.tokens_per_microbatch
        return score_otherwise(batch, rows, budget, self._forward, self.ranks, together=True)

    def keep_probe(self, batch: Batch, states: Sequence[tuple[int, int]], saved: Path | None = None) -> None:
        """The states under the weights of now, or as they were saved, to which the steps to come compare theirs."""
        budget, temperature = self.spec.engine.tokens_per_microbatch, self.spec.rollout.temperature
        kernels = self.spec.engine.statistics
        self.probe = TorchProbe(batch, states, budget, self._hidden, self._head, temperature, kernels)
        if saved is not None:
            self.probe.load(load_file(saved / PROBE_FILE))

    def step(self, batch: Batch, rows: range, old: Scores, loss: PolicyLoss, measure: Measure = "sums") -> UpdateResult:
        """One optimizer step on the responses `rows`. Raises DivergedError, before the step, for a non-finite loss or
        gradient."""
        spec = self.spec
        # Before the first backward pass: DeepSpeed takes a forward pass after the last one for that of the next step.
        assert measure == "sums" or self.probe is not None
        seen = self.probe.compare(loss) if self.probe is not None and measure != "sums" else None
        tokens = update_tokens(batch, rows, old, spec, self.device)
        parts = layout(batch, rows, spec.engine.tokens_per_microbatch, self.ranks)
        passes = with_gradient(my_passes(batch, parts, self.ranks, together=True))
        all_count = all(mine.counts for mine in passes)
        dropped = tokens if all_count else update_tokens(batch, rows, old, spec, self.device)
        last = max(at for at, mine in enumerate(passes) if mine.live)
        losses = torch.zeros(len(parts), device=self.device)
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        for at, mine in enumerate(passes):
            self.engine.set_gradient_accumulation_boundary(at >= last)
            kept = tokens if mine.counts else dropped
            share = microbatch_loss(batch, rows, mine.part, kept, loss, mine.live, self._forward)
            if mine.live:
                self._backward(share * self.ranks.size if mine.counts else share * 0.0)
            if mine.counts:
                losses[mine.place] = share.detach()
        sum_statistics(tokens, losses, self.ranks)
        value = float(sum(losses))
        norm = self._move(value)
        if seen is not None and self.probe is not None:
            seen = replace(seen, entropy_after=self.probe.entropy())
        return UpdateResult(norm, value, tokens, seen)

    def _backward(self, value: Tensor) -> None:
        """Adds a micro-batch's gradient to the step's, which the last one sums over processes (ZeRO-2 and 3: each)."""
        if self.masters:
            value.backward()  # type: ignore[no-untyped-call]
            take_gradients(self.parameters, self.masters)
            return
        with self.ranks.together():
            self.engine.backward(value, scale_wrt_gas=False)

    def _move(self, loss: float) -> float:
        """The optimizer's step; the norm of the gradient before it was cut. Raises DivergedError, and takes no step, where loss
        or norm are not finite."""
        check_finite(loss, 0.0)
        with self.ranks.together():
            if self.masters:
                self.engine.set_gradient_accumulation_boundary(True)
                self.engine.allreduce_gradients()
                norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.spec.optim.grad_clip))
                check_finite(loss, norm)
            self.engine.step()
        if self.masters:
            copy_back(self.parameters, self.masters)
            return norm
        norm = float(self.engine.get_global_grad_norm())
        check_finite(loss, norm if self.engine.was_step_applied() else float("inf"))
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Named parameters of the working copy; with ZeRO-3 as many at a time as fill a bucket are gathered, by all ranks."""
        named = list(self.model.named_parameters())
        if self.stage < 3:
            yield from named
            return
        for bucket in buckets(named):
            with self._gathered([parameter for _, parameter in bucket]):
                yield from ((name, parameter.data) for name, parameter in bucket)

    def save(self, folder: Path) -> None:
        """A transformers folder: safetensors and configuration. Written by rank 0."""
        if self.ranks.rank == 0:
            write_model(self.model, self.weights(), folder)
        elif self.stage == 3:
            for _ in self.weights():
                pass

    def save_state(self, folder: Path, *, probe: bool) -> None:
        """DeepSpeed's own files, of each rank what it holds, and the probe's log-probabilities. Raises OSError."""
        with quiet(), self.ranks.together(), disk_errors():
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.ranks.rank == 0 and probe and self.probe is not None:
            save_file(self.probe.tensors(), folder / PROBE_FILE)

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`, by as many ranks."""
        with quiet(), self.ranks.together():
            self.engine.load_checkpoint(str(folder), tag=TAG)
        copy_back(self.parameters if self.masters else [], self.masters)

    def _forward(self, batch: Batch, part: Sequence[int]) -> TokenStatistics:
        """Statistics of the response tokens of the rows `part`, flat in the order of `part`."""
        return TokenStatistics(*self._run(batch, part, whole=True))

    def _hidden(self, batch: Batch, part: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the response tokens of the rows `part`, [T,D], and those tokens, [T]."""
        hidden_TD, targets_T = self._run(batch, part, whole=False)
        return hidden_TD, targets_T

    def _run(self, batch: Batch, part: Sequence[int], *, whole: bool) -> tuple[Tensor, ...]:
        # transformers recomputes activations in training mode only; there is no dropout to switch on.
        self.module.train(self.spec.engine.gradient_checkpointing)
        ids_BS, rows_T, columns_T = (tensor.to(self.device) for tensor in padded(batch, part))
        if self.masters:
            found: tuple[Tensor, ...] = self.module(ids_BS, rows_T, columns_T, whole=whole)
            return found
        with self.ranks.together() if self.stage == 3 else nullcontext():
            found = self.engine(ids_BS, rows_T, columns_T, whole=whole)
        return found

    @contextmanager
    def _head(self) -> Iterator[Tensor]:
        """The language-model head, whole."""
        with self._gathered([self.model.lm_head.weight]):
            yield self.model.lm_head.weight

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[None] = self.deepspeed.zero.GatheredParameters(list(parameters))
        return gathered


@contextmanager
def named_keys() -> Iterator[None]:
    """A key that DeepSpeed's own schema refuses becomes a SpecError."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise SpecError(
            f"engine.deepspeed.config: DeepSpeed does not take {key} = {problem['input']!r} in {error.title}: {problem['msg']}"
        ) from None


@contextmanager
def disk_errors() -> Iterator[None]:
    """torch.save tells of a full disk by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "iostream")):
            raise
        raise OSError(f"torch.save could not write: {first_line(error)}") from None


def with_gradient(passes: list[Pass]) -> list[Pass]:
    """The passes, and before them one with gradient, of weight zero, where no response of the batch has an advantage: the step
    that momentum and weight decay make needs one."""
    if any(mine.live for mine in passes):
        return passes
    return [replace(passes[0], live=True, counts=False), *passes]


def buckets(named: Sequence[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """ZeRO-3 parameters by name, as many at a time as have `BUCKET` values, which is told by `ds_numel`: a share of a parameter
    does not know the size of the whole."""
    return fill_buckets(named, lambda each: int(each[1].ds_numel), BUCKET)
