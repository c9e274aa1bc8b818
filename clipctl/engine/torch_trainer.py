"""The torch engine's trainer, the reference: exact statistics, token-budget micro-batches, fused AdamW.

In bfloat16 the forward pass reads a bfloat16 copy, while gradients add up in float32 and AdamW steps float32 master
weights. Responses are padded on the right under causal attention, so no padded token is ever seen by a real one.
Responses without advantage have no gradient: they are only scored, in micro-batches of their own, so that every
metric still counts them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipctl.algo import loss_weights
from clipctl.engine import Loss, Scores, UpdateResult
from clipctl.errors import DivergedError
from clipctl.loss import LossSums
from clipctl.rollout import Batch, microbatches, minibatches
from clipctl.spec import Engine, RunSpec
from clipctl.statistics import TokenStatistics, token_statistics


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
        optim = spec.optim
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

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

    def step(self, batch: Batch, rows: range, old: Scores, loss: Loss) -> UpdateResult:
        """One AdamW step on the responses `rows`. Raises DivergedError, before the step, for a non-finite loss or
        gradient."""
        spec = self.spec
        lengths_R = torch.from_numpy(batch.lengths_R[rows.start : rows.stop])
        constant = spec.loss.constant or spec.rollout.max_response_tokens
        weight_R = loss_weights(lengths_R, spec.loss.aggregation, constant)
        for master in self.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        sums: LossSums | None = None
        for part, live in self._layout(batch, rows):
            part_sums = self._accumulate(batch, part, weight_R[torch.tensor(part) - rows.start], old, loss, live)
            sums = part_sums if sums is None else sums + part_sums
        assert sums is not None
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, spec.optim.grad_clip))
        if not math.isfinite(sums.loss) or not math.isfinite(norm):
            raise DivergedError(
                f"the update is not finite: loss {sums.loss}, gradient norm {norm}; the step was not taken"
            )
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
        return UpdateResult(norm, sums)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Named parameters of the working copy."""
        yield from self.model.named_parameters()

    def save(self, folder: Path) -> None:
        """A transformers folder: safetensors and configuration."""
        self.model.save_pretrained(folder)

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

    def _accumulate(
        self, batch: Batch, part: Sequence[int], weight_B: Tensor, old: Scores, loss: Loss, live: bool
    ) -> LossSums:
        """Adds the gradient of one micro-batch to the masters' gradients, and returns its sums."""
        device = self.masters[0].device
        lengths_B = torch.from_numpy(batch.lengths_R[part])
        at_T = _flat_places(np.cumsum(batch.lengths_R), batch.lengths_R, part)
        advantages_T = torch.from_numpy(batch.advantages_R[part]).float().repeat_interleave(lengths_B)
        weights_T = weight_B.float().repeat_interleave(lengths_B)
        with torch.set_grad_enabled(live):
            statistics = self._forward(batch, part)
            value, sums = loss(
                statistics.logprob_T,
                statistics.entropy_T,
                old.logprob_T[at_T].to(device),
                advantages_T.to(device),
                weights_T.to(device),
            )
        if live:
            value.backward()  # type: ignore[no-untyped-call]
            self._gather_gradients()
        return sums

    def _gather_gradients(self) -> None:
        """Adds the working copy's gradients to the masters' in float32."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                assert master.grad is not None
                master.grad.add_(parameter.grad)
                parameter.grad = None

    def _forward(self, batch: Batch, part: Sequence[int]) -> TokenStatistics:
        """Statistics of the response tokens of the rows `part`, flat in the order of `part`."""
        device = self.masters[0].device
        # transformers recomputes activations in training mode only; there is no dropout to switch on.
        self.model.train(self.spec.engine.gradient_checkpointing)
        ids_BS, rows_T, columns_T = padded(batch, part)
        hidden_BSD = self.model.model(input_ids=ids_BS.to(device), use_cache=False).last_hidden_state
        rows_T, columns_T, ids_BS = rows_T.to(device), columns_T.to(device), ids_BS.to(device)
        return token_statistics(
            hidden_BSD[rows_T, columns_T - 1],
            self.model.lm_head.weight,
            ids_BS[rows_T, columns_T],
            temperature=self.spec.rollout.temperature,
        )


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
