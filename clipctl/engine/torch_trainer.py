"""The torch engine's trainer, the reference: exact statistics, token-budget micro-batches, fused optimizers.

In bfloat16 the forward pass reads a bfloat16 copy, while gradients add up in float32 and the optimizer steps float32 master
weights. Responses are padded on the right under causal attention, so no padded token is ever seen by a real one.
Responses without advantage have no gradient: they are only scored, in micro-batches of their own, so that every
metric still counts them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipctl.algo import loss_weights
from clipctl.engine import Measure, Scores, UpdateResult
from clipctl.engine.optimizers import OPTIMIZERS, SPLITS, Step, dot
from clipctl.engine.torch_probe import TorchProbe, add_gradients
from clipctl.errors import DivergedError
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.rollout import Batch, microbatches, minibatches
from clipctl.spec import Engine, RunSpec
from clipctl.statistics import TokenStatistics, token_statistics

TRAINER_FILE = "trainer.safetensors"


def set_up_torch(engine: Engine) -> None:
    """Threads as the spec says, true float32 in float32 products."""
    torch.set_num_threads(engine.threads)
    torch.set_float32_matmul_precision("highest")


class TorchTrainer:
    """Trains `model` (a transformers causal LM with its attention set up) as the spec says."""

    def __init__(self, model: Any, spec: RunSpec) -> None:
        self.model = model
        self.spec = spec
        if spec.engine.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [_master(parameter) for parameter in self.parameters]
        self.optimizer = OPTIMIZERS[spec.optim.optimizer](self.masters, spec.optim)
        self.probe: TorchProbe | None = None

    def score(self, batch: Batch) -> Scores:
        """Log-probs and entropies of the batch, in the micro-batches in which its updates will run."""
        ends = np.cumsum(batch.lengths_R)
        logprob_T = torch.empty(int(ends[-1]))
        entropy_T = torch.empty(int(ends[-1]))
        for rows in minibatches(batch.responses, self.spec.optim.responses_per_update):
            for part, _ in self._layout(batch, rows):
                with torch.no_grad():
                    statistics = self._forward(batch, part)
                at_T = _flat_places(ends, batch.lengths_R, part)
                logprob_T[at_T] = statistics.logprob_T.cpu()
                entropy_T[at_T] = statistics.entropy_T.cpu()
        if not bool(torch.isfinite(logprob_T).all() and torch.isfinite(entropy_T).all()):
            raise DivergedError("a log-probability or entropy of this rollout is not finite; the policy is broken")
        return Scores(logprob_T, entropy_T)

    def score_otherwise(self, batch: Batch, rows: range) -> Tensor:
        """log π of the rows' tokens, flat, in micro-batches half as large as the largest of `score`'s, or twice where
        those have one response each."""
        lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        layout = [part for part, _ in self._layout(batch, rows)]
        largest = max(len(part) * max(lengths[row] for row in part) for part in layout)
        budget = largest // 2 if max(map(len, layout)) > 1 else 2 * largest
        ends = np.cumsum(batch.lengths_R[rows.start : rows.stop])
        logprob_T = torch.empty(int(ends[-1]))
        for part in microbatches(lengths, rows, budget):
            with torch.no_grad():
                statistics = self._forward(batch, part)
            local = [row - rows.start for row in part]
            logprob_T[_flat_places(ends, batch.lengths_R[rows.start : rows.stop], local)] = statistics.logprob_T.cpu()
        return logprob_T

    def keep_probe(self, batch: Batch, states: Sequence[tuple[int, int]], saved: Path | None = None) -> None:
        """The states under the weights of now, or as they were saved, to which the steps to come compare theirs."""
        engine, temperature = self.spec.engine, self.spec.rollout.temperature
        self.probe = TorchProbe(
            batch, states, engine.tokens_per_microbatch, self._hidden, lambda: self.model.lm_head.weight, temperature
        )
        if saved is not None:
            self.probe.load(load_file(saved / TRAINER_FILE))

    def step(self, batch: Batch, rows: range, old: Scores, loss: PolicyLoss, measure: Measure = "sums") -> UpdateResult:
        """One optimizer step on the responses `rows`. Raises DivergedError, before the step, for a non-finite loss or
        gradient."""
        spec = self.spec
        tokens = self._tokens(batch, rows, old)
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        done = [self._accumulate(batch, rows, part, tokens, loss, live) for part, live in self._layout(batch, rows)]
        value = float(sum(done))
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, spec.optim.grad_clip))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise DivergedError(f"the update is not finite: loss {value}, gradient norm {norm}; the step was not taken")
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

    def _move(self) -> None:
        """The optimizer's step, and the working copy after it."""
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)

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
        ends = np.cumsum(batch.lengths_R[rows.start : rows.stop])
        parts: dict[str, list[Tensor]] = {}
        for part, live in self._layout(batch, rows):
            local = [row - rows.start for row in part]
            at_T = _flat_places(ends, batch.lengths_R[rows.start : rows.stop], local).to(tokens.logprob_T.device)
            given = (tokens.logprob_T, tokens.old_logprob_T, tokens.advantages_T, tokens.weights_T)
            logprob_T = self._forward(batch, part).logprob_T if live else None
            for name, pull_T in loss.pull(*(tensor[at_T] for tensor in given)).items():
                totals = parts.setdefault(name, [torch.zeros_like(master) for master in self.masters])
                if logprob_T is not None and bool((pull_T != 0).any()):
                    value = -scale * (pull_T.float() * logprob_T).sum()
                    add_gradients(
                        totals, torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
                    )
        return parts

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Named parameters of the working copy."""
        yield from self.model.named_parameters()

    def save(self, folder: Path) -> None:
        """A transformers folder: safetensors and configuration."""
        self.model.save_pretrained(folder)

    def save_state(self, folder: Path, *, probe: bool) -> None:
        """The optimizer's state, float32 masters where the model has none, the probe's log-probabilities."""
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
        """Micro-batches of the responses with advantage (True), then of those without (False)."""
        lengths = [
            len(prompt) + len(response) for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True)
        ]
        return [
            (part, live)
            for live in (True, False)
            for part in microbatches(
                lengths,
                [row for row in rows if (batch.advantages_R[row] != 0) == live],
                self.spec.engine.tokens_per_microbatch,
            )
        ]

    def _tokens(self, batch: Batch, rows: range, old: Scores) -> UpdateTokens:
        """The tokens of an optimizer batch, with room for the statistics that its forward passes will make."""
        spec, device = self.spec, self.masters[0].device
        lengths_R = torch.from_numpy(batch.lengths_R[rows.start : rows.stop])
        weight_R = loss_weights(
            lengths_R, spec.loss.aggregation, spec.loss.constant or spec.rollout.max_response_tokens
        )
        start, size = int(batch.lengths_R[: rows.start].sum()), int(lengths_R.sum())
        advantages_R = torch.from_numpy(batch.advantages_R[rows.start : rows.stop])
        return UpdateTokens(
            logprob_T=torch.empty(size, device=device),
            entropy_T=torch.empty(size, device=device),
            expected_q_T=torch.empty(size, device=device),
            old_logprob_T=old.logprob_T[start : start + size].to(device),
            advantages_T=advantages_R.repeat_interleave(lengths_R).to(device),
            weights_T=weight_R.repeat_interleave(lengths_R).to(device),
        )

    def _accumulate(
        self, batch: Batch, rows: range, part: Sequence[int], tokens: UpdateTokens, loss: PolicyLoss, live: bool
    ) -> Tensor:
        """Adds the gradient of one micro-batch to the masters' gradients, keeps its tokens' statistics, and returns its loss."""
        lengths_R = batch.lengths_R[rows.start : rows.stop]
        at_T = _flat_places(np.cumsum(lengths_R), lengths_R, [row - rows.start for row in part])
        at_T = at_T.to(tokens.logprob_T.device)
        with torch.set_grad_enabled(live):
            found = self._forward(batch, part)
            value = loss(
                found.logprob_T,
                tokens.old_logprob_T[at_T],
                tokens.advantages_T[at_T].float(),
                tokens.weights_T[at_T].float(),
            )
        for kept_T, name in (
            (tokens.logprob_T, "logprob_T"),
            (tokens.entropy_T, "entropy_T"),
            (tokens.expected_q_T, "expected_q_T"),
        ):
            kept_T[at_T] = getattr(found, name).detach()
        if live:
            value.backward()  # type: ignore[no-untyped-call]
            self._gather_gradients()
        return value.detach()

    def _gather_gradients(self) -> None:
        """Adds the working copy's gradients to the masters' in float32."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                assert master.grad is not None
                master.grad.add_(parameter.grad)
                parameter.grad = None

    def _forward(self, batch: Batch, part: Sequence[int]) -> TokenStatistics:
        """Statistics of the response tokens of the rows `part`, flat in the order of `part`."""
        hidden_TD, targets_T = self._hidden(batch, part)
        temperature = self.spec.rollout.temperature
        return token_statistics(hidden_TD, self.model.lm_head.weight, targets_T, temperature=temperature)

    def _hidden(self, batch: Batch, part: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the response tokens of the rows `part`, [T,D], and those tokens, [T]."""
        device = self.masters[0].device
        # transformers recomputes activations in training mode only; there is no dropout to switch on.
        self.model.train(self.spec.engine.gradient_checkpointing)
        ids_BS, rows_T, columns_T = padded(batch, part)
        hidden_BSD = self.model.model(input_ids=ids_BS.to(device), use_cache=False).last_hidden_state
        rows_T, columns_T, ids_BS = rows_T.to(device), columns_T.to(device), ids_BS.to(device)
        return hidden_BSD[rows_T, columns_T - 1], ids_BS[rows_T, columns_T]


def padded(batch: Batch, part: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B,S], padded on the right with 0, and the row and column of every response token, each [T]."""
    texts = [batch.prompt_ids[row] + batch.response_ids[row] for row in part]
    ids_BS = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for at, text in enumerate(texts):
        ids_BS[at, : len(text)] = torch.tensor(text)
    starts = [len(batch.prompt_ids[row]) for row in part]
    rows_T = torch.cat(
        [torch.full((len(text) - start,), at) for at, (text, start) in enumerate(zip(texts, starts, strict=True))]
    )
    columns_T = torch.cat([torch.arange(start, len(text)) for text, start in zip(texts, starts, strict=True)])
    return ids_BS, rows_T, columns_T


def _flat_places(ends_R: np.ndarray, lengths_R: np.ndarray, part: Sequence[int]) -> Tensor:
    """Places of the rows' tokens in the flat order of the whole batch."""
    return torch.cat([torch.arange(ends_R[row] - lengths_R[row], ends_R[row]) for row in part])


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself in float32, else a float32 copy that the optimizer owns."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
