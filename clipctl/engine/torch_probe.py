"""Probe states in the torch engine: the same states before and after an update, over the whole vocabulary.

What π_old was is kept as log-probabilities, not as hidden states, because the head moves too. The exact sides of the
paper's inequalities are a ledger of all actions of every state, each weighted by its π_old; the sampled ones are the
ledger of the state's own token. Letters: N states, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipctl.engine import ProbeResult
from clipctl.ledger import EntropyLedger, entropy_ledger
from clipctl.loss import PolicyLoss
from clipctl.rollout import Batch, microbatches
from clipctl.statistics import Kernels, TokenStatistics, float32_logits, token_statistics

CHUNK_ELEMENTS = 1 << 20
"""States × vocabulary that are looked at together in float64."""

Hidden = Callable[[Batch, Sequence[int]], tuple[Tensor, Tensor]]
"""(batch, rows) -> hidden states [T,D] and targets [T] of the rows' response tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """States of one micro-batch: its rows, the places of the states among its response tokens, π_old's log-probs."""

    rows: list[int]
    places_N: Tensor
    old_logp_NV: Tensor


class TorchProbe:
    """States of a batch under the policy at its making; `head` is opened anew each time, for what is computed with it."""

    def __init__(
        self,
        batch: Batch,
        states: Sequence[tuple[int, int]],
        tokens_per_microbatch: int,
        hidden: Hidden,
        head: Callable[[], AbstractContextManager[Tensor]],
        temperature: float,
        kernels: Kernels,
    ) -> None:
        self.hidden, self.head, self.temperature, self.kernels = hidden, head, temperature, kernels
        self.states = len(states)
        chosen = sorted({row for row, _ in states})
        self.batch, tokens = _up_to_states(batch, states, chosen)
        lengths = [len(p) + len(r) for p, r in zip(self.batch.prompt_ids, self.batch.response_ids, strict=True)]
        self.parts: list[Part] = []
        with torch.no_grad():
            for rows in microbatches(lengths, range(len(chosen)), tokens_per_microbatch):
                places_N = _places(self.batch, rows, tokens)
                hidden_TD, _ = self.hidden(self.batch, rows)
                places_N = places_N.to(hidden_TD.device)
                self.parts.append(Part(rows, places_N, self._logp(hidden_TD[places_N])))

    def tensors(self) -> dict[str, Tensor]:
        """π_old's log-probabilities, by name."""
        return {f"probe.{at}": part.old_logp_NV for at, part in enumerate(self.parts)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts those of `tensors` in place of what the current weights gave."""
        for at, part in enumerate(self.parts):
            part.old_logp_NV.copy_(tensors[f"probe.{at}"])

    def entropy(self) -> float:
        """Σ H over the states under the current weights, nats."""
        with torch.no_grad():
            return sum(float(self._statistics(part)[2].entropy_T.sum(dtype=torch.float64)) for part in self.parts)

    def compare(self, loss: PolicyLoss) -> ProbeResult:
        """The states under the current weights against π_old; `entropy_after` is that of now."""
        eps = {"eps_low": loss.eps_low, "eps_high": loss.eps_high}
        exact: EntropyLedger | None = None
        sampled: EntropyLedger | None = None
        entropy = 0.0
        with torch.no_grad():
            for part in self.parts:
                hidden_ND, targets_N, found = self._statistics(part)
                entropy += float(found.entropy_T.sum(dtype=torch.float64))
                old_N = part.old_logp_NV.gather(1, targets_N[:, None])[:, 0]
                one_N, zero_N = torch.ones_like(old_N), torch.zeros_like(old_N)
                own = entropy_ledger(
                    found.logprob_T,
                    old_N,
                    zero_N,
                    found.entropy_T,
                    found.expected_q_T,
                    one_N.bool(),
                    **eps,
                    weight=one_N,
                )
                sampled = own if sampled is None else sampled + own
                for at in _chunks(*part.old_logp_NV.shape):
                    logp_NV, old_NV = self._logp(hidden_ND[at]).double(), part.old_logp_NV[at].double()
                    h_N1, expected_N1 = found.entropy_T[at, None], found.expected_q_T[at, None]
                    zero, mask = torch.zeros_like(logp_NV), torch.ones_like(logp_NV, dtype=torch.bool)
                    every = entropy_ledger(logp_NV, old_NV, zero, h_N1, expected_N1, mask, **eps, weight=old_NV.exp())
                    exact = every if exact is None else exact + every
        assert exact is not None
        assert sampled is not None
        return ProbeResult(self.states, entropy, entropy, exact, sampled, None)

    def entropy_slope(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """∇_θ of the states' mean entropy, float32, one tensor for each parameter."""
        slopes = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for part in self.parts:
            mean = self._statistics(part)[2].entropy_T.sum() / self.states
            add_gradients(slopes, torch.autograd.grad(mean, parameters, allow_unused=True))
        return slopes

    def _statistics(self, part: Part) -> tuple[Tensor, Tensor, TokenStatistics]:
        hidden_TD, targets_T = self.hidden(self.batch, part.rows)
        hidden_ND, targets_N = hidden_TD[part.places_N], targets_T[part.places_N]
        with self.head() as head_VD:
            found = token_statistics(hidden_ND, head_VD, targets_N, temperature=self.temperature, kernels=self.kernels)
        return hidden_ND, targets_N, found

    def _logp(self, hidden_ND: Tensor) -> Tensor:
        with self.head() as head_VD:
            return torch.log_softmax(float32_logits(hidden_ND, head_VD) / self.temperature, -1)


def add_gradients(totals: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds the gradients that exist to float32 totals."""
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total.add_(gradient)


def _chunks(states: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(at, at + size) for at in range(0, states, size)]


def _up_to_states(
    batch: Batch, states: Sequence[tuple[int, int]], chosen: Sequence[int]
) -> tuple[Batch, list[list[int]]]:
    """The chosen responses, each cut after its last state (a state does not see what follows it), and their states."""
    tokens = [[token for row, token in states if row == wanted] for wanted in chosen]
    cut = [batch.response_ids[row][: max(places) + 1] for row, places in zip(chosen, tokens, strict=True)]
    prompts = [batch.prompt_ids[row] for row in chosen]
    return Batch(prompts, cut, np.zeros(len(chosen)), group_size=1), tokens


def _places(batch: Batch, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Where the rows' states lie among the flat response tokens of the rows."""
    ends = np.cumsum(batch.lengths_R[list(rows)])
    starts = ends - batch.lengths_R[list(rows)]
    return torch.tensor([int(start) + token for row, start in zip(rows, starts, strict=True) for token in tokens[row]])
