"""The torch engine's trainer, the reference: exact statistics, token-budget micro-batches, fused optimizers.

In bfloat16 the forward pass reads a bfloat16 copy, while gradients add up in float32 and the optimizer steps float32 master
weights.

Of several ranks each has the whole model and optimizer (data parallelism) and does its share of the micro-batches. The loss
weights are those of the whole optimizer batch, so the gradient is the sum of the ranks' gradients: one all-reduce a step, in
float32, of buckets whose views the masters' gradients are. torch's DistributedDataParallel would instead average, after each
backward pass, gradients in the parameters' own type. Log-probs, counts, ledger and loss are those of a single process, bit for
bit at the same weights; the order in which the gradient adds up depends on the number of ranks. Where there are fewer
micro-batches than ranks they are cut further: another layout, whose rounding the table `noise` measures.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipctl.engine import Measure, Scores, UpdateResult
from clipctl.engine.buckets import buckets
from clipctl.engine.masters import copy_back, master_of, take_gradients
from clipctl.engine.optimizers import OPTIMIZERS, SPLITS, Step, dot
from clipctl.engine.passes import (
    check_finite,
    layout,
    microbatch_loss,
    my_passes,
    padded,
    places_in_update,
    queued_copy,
    score_batch,
    score_otherwise,
    sum_statistics,
    update_tokens,
)
from clipctl.engine.torch_probe import TorchProbe, add_gradients
from clipctl.errors import EngineError
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.ranks import ALONE, Ranks
from clipctl.rollout import Batch
from clipctl.spec import RunSpec
from clipctl.statistics import TokenStatistics, token_statistics

TRAINER_FILE = "trainer.safetensors"
BUCKET = 1 << 28
"""Gradient values that are summed over ranks in one operation."""


class TorchTrainer:
    """Trains `model` (a transformers causal LM with its attention set up) as the spec says, alone or as one of `ranks`."""

    def __init__(self, model: Any, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        self.configuration: dict[str, Any] = {}
        self.model = model
        self.spec = spec
        self.ranks = ranks
        if spec.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [master_of(parameter) for parameter in self.parameters]
        self.buckets = _gradient_buckets(self.masters) if ranks.size > 1 else []
        self.optimizer = OPTIMIZERS[spec.optim.optimizer](self.masters, spec.optim)
        self.probe: TorchProbe | None = None

    def score(self, batch: Batch) -> Scores:
        """Log-probs and entropies of the batch, in the micro-batches in which its updates will run.

        Raises EngineError where the ranks' weights are not the same any more.
        """
        self._check_replicas()
        return score_batch(batch, self.spec, self._forward, self.ranks)

    def score_otherwise(self, batch: Batch, rows: range) -> Tensor:
        """log π of the rows' tokens, flat, in micro-batches of another size than those of `score`."""
        return score_otherwise(batch, rows, self.spec.engine.tokens_per_microbatch, self._forward, self.ranks)

    def keep_probe(self, batch: Batch, states: Sequence[tuple[int, int]], saved: Path | None = None) -> None:
        """The states under the weights of now, or as they were saved, to which the steps to come compare theirs."""
        engine, temperature = self.spec.engine, self.spec.rollout.temperature
        self.probe = TorchProbe(
            batch,
            states,
            engine.tokens_per_microbatch,
            self._hidden,
            lambda: nullcontext(self.model.lm_head.weight),
            temperature,
            engine.statistics,
        )
        if saved is not None:
            self.probe.load(load_file(saved / TRAINER_FILE))

    def step(self, batch: Batch, rows: range, old: Scores, loss: PolicyLoss, measure: Measure = "sums") -> UpdateResult:
        """One optimizer step on the responses `rows`. Raises DivergedError, before the step, for a non-finite loss or
        gradient."""
        spec = self.spec
        tokens = update_tokens(batch, rows, old, spec, self.masters[0].device)
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        parts = self._layout(batch, rows)
        losses = torch.zeros(len(parts), device=self.masters[0].device)
        for mine in my_passes(batch, parts, self.ranks):
            losses[mine.place] = self._accumulate(batch, rows, mine.part, tokens, loss, mine.live)
        sum_statistics(tokens, losses, self.ranks)
        for bucket in self.buckets:
            self.ranks.sum(bucket)
        value = float(sum(losses))
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, spec.optim.grad_clip))
        check_finite(value, norm)
        if measure == "sums":
            self._move()
            return UpdateResult(norm, value, tokens)
        assert self.probe is not None
        seen = self.probe.compare(loss)
        if measure == "network":
            seen = replace(seen, network=self._move_and_predict(batch, rows, tokens, loss, norm))
        else:
            self._move()
        return UpdateResult(norm, value, tokens, replace(seen, entropy_after=self.probe.entropy()))

    def _check_replicas(self) -> None:
        """The weights of all ranks, as sums of their bits: each takes the same step by itself, so they stay the same, or what
        is stored would be of no policy."""
        if self.ranks.size == 1:
            return
        sums = [int(master.detach().view(torch.int32).sum(dtype=torch.int64)) for master in self.masters]
        found = self.ranks.gather(sums)
        differing = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if differing:
            raise EngineError(
                f"the weights of rank {', '.join(map(str, differing))} are not those of rank 0 any more: is that the same kind "
                "of machine? Run the same command again to go on from the last checkpoint"
            )

    def _move(self) -> None:
        """The optimizer's step, and the working copy after it."""
        self.optimizer.step()
        copy_back(self.parameters, self.masters)

    def _move_and_predict(
        self, batch: Batch, rows: range, tokens: UpdateTokens, loss: PolicyLoss, norm: float
    ) -> dict[str, float]:
        """Takes the step and returns ⟨∇_θ H, Δθ⟩ with H the probe's mean entropy, whole and in its parts, nats.

        The gradients of the three parts of the objective are taken each by itself, at the weights before the step. Δθ is
        that of the working copy; what rounding it made of the masters' step is a part of its own, 0 in float32.
        """
        assert self.probe is not None
        slope = self.probe.entropy_slope(self.parameters)
        # As torch.nn.utils.clip_grad_norm_ scales.
        scale = min(1.0, self.spec.optim.grad_clip / (norm + 1e-6))
        parts = self._part_gradients(batch, rows, tokens, loss, scale)
        before = [master.detach().clone() for master in self.masters]
        gradients = [master.grad for master in self.masters if master.grad is not None]
        self._move()
        rows_of_step = SPLITS[self.spec.optim.optimizer](slope, Step(gradients, parts, before), self.optimizer)
        stepped = [master.detach() - start for master, start in zip(self.masters, before, strict=True)]
        # What the forward pass reads is the working copy: before and after, the masters rounded to its precision.
        moved = [
            parameter.detach().float() - start.to(parameter.dtype).float()
            for parameter, start in zip(self.parameters, before, strict=True)
        ]
        total = dot(slope, moved)
        return {"total": total} | rows_of_step | {"rounding": total - dot(slope, stepped)}

    def _part_gradients(
        self, batch: Batch, rows: range, tokens: UpdateTokens, loss: PolicyLoss, scale: float
    ) -> dict[str, list[Tensor]]:
        """The gradient of the loss, times `scale`, in the parts of `PolicyLoss.pull`."""
        given = (tokens.logprob_T, tokens.old_logprob_T, tokens.advantages_T, tokens.weights_T)
        names = loss.pull(*(tensor[:0] for tensor in given))
        parts = {name: [torch.zeros_like(master) for master in self.masters] for name in names}
        for mine in my_passes(batch, self._layout(batch, rows), self.ranks):
            if not mine.live:
                continue
            at_T = queued_copy(places_in_update(batch, rows, mine.part), tokens.logprob_T.device)
            logprob_T = self._forward(batch, mine.part).logprob_T
            for name, pull_T in loss.pull(*(tensor[at_T] for tensor in given)).items():
                if bool((pull_T != 0).any()):
                    value = -scale * (pull_T.float() * logprob_T).sum()
                    add_gradients(
                        parts[name], torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
                    )
        for total in (total for totals in parts.values() for total in totals):
            self.ranks.sum(total)
        return parts

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Named parameters of the working copy."""
        yield from self.model.named_parameters()

    def save(self, folder: Path) -> None:
        """A transformers folder: safetensors and configuration. Written by rank 0: the others have the same."""
        if self.ranks.rank == 0:
            self.model.save_pretrained(folder)

    def save_state(self, folder: Path, *, probe: bool) -> None:
        """The optimizer's state, float32 masters where the model has none, the probe's log-probabilities; written by rank 0."""
        if self.ranks.rank:
            return
        tensors = {
            f"optimizer.{at}.{name}": value
            for at, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        for at, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is not parameter:
                tensors[f"master.{at}"] = master.detach()
        if probe and self.probe is not None:
            tensors |= self.probe.tensors()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TRAINER_FILE)

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`; the weights are those of the folder that the model was loaded from."""
        tensors = load_file(folder / TRAINER_FILE)
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in tensors.items():
            kind, at, *rest = name.split(".")
            if kind == "optimizer":
                state["state"].setdefault(int(at), {})[rest[0]] = tensor
            elif kind == "master":
                with torch.no_grad():
                    self.masters[int(at)].copy_(tensor)
        self.optimizer.load_state_dict(state)

    def _layout(self, batch: Batch, rows: range) -> list[tuple[list[int], bool]]:
        return layout(batch, rows, self.spec.engine.tokens_per_microbatch, self.ranks)

    def _accumulate(
        self, batch: Batch, rows: range, part: Sequence[int], tokens: UpdateTokens, loss: PolicyLoss, live: bool
    ) -> Tensor:
        """Adds the gradient of one micro-batch to the masters' gradients, keeps its tokens' statistics, and returns its loss."""
        value = microbatch_loss(batch, rows, part, tokens, loss, live, self._forward)
        if live:
            value.backward()  # type: ignore[no-untyped-call]
            take_gradients(self.parameters, self.masters)
        return value.detach()

    def _forward(self, batch: Batch, part: Sequence[int]) -> TokenStatistics:
        """Statistics of the response tokens of the rows `part`, flat in the order of `part`."""
        hidden_TD, targets_T = self._hidden(batch, part)
        temperature = self.spec.rollout.temperature
        kernels = self.spec.engine.statistics
        head_VD = self.model.lm_head.weight
        return token_statistics(hidden_TD, head_VD, targets_T, temperature=temperature, kernels=kernels)

    def _hidden(self, batch: Batch, part: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the response tokens of the rows `part`, [T,D], and those tokens, [T]."""
        device = self.masters[0].device
        # transformers recomputes activations in training mode only; there is no dropout to switch on.
        self.model.train(self.spec.engine.gradient_checkpointing)
        ids_BS, rows_T, columns_T = (queued_copy(tensor, device) for tensor in padded(batch, part))
        hidden_BSD = self.model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
        return hidden_BSD[rows_T, columns_T - 1], ids_BS[rows_T, columns_T]


def _gradient_buckets(masters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Flat float32 tensors, of which the masters' gradients are made views: summed as they are, without a copy."""
    flat = []
    for taken in buckets(masters, lambda master: master.numel(), BUCKET):
        sizes = [master.numel() for master in taken]
        bucket = torch.zeros(sum(sizes), device=taken[0].device)
        for master, gradient in zip(taken, torch.split(bucket, sizes), strict=True):
            master.grad = gradient.view_as(master)
        flat.append(bucket)
    return flat
