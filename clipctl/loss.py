"""From the statistics of one micro-batch to its share of the loss, and to the sums that the store keeps.

Everything here adds up: the weights are fixed over the whole optimizer batch before it is split, so any split gives
the same gradient, and sums of micro-batches (and ranks) are the sums of the batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from clipctl.algo import OBJECTIVES, ClipCounts
from clipctl.spec import RunSpec


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the tokens of a micro-batch, or of several added up.

    loss: -Σ w·objective. entropy: Σ H, nats. kl: Σ (r - 1 - log r), an unbiased estimate of KL(π_old ‖ π) times tokens.
    log_ratio_max: largest |log r|.
    """

    loss: float
    entropy: float
    kl: float
    log_ratio_max: float
    counts: ClipCounts

    def __add__(self, other: Self) -> "LossSums":
        return LossSums(
            self.loss + other.loss,
            self.entropy + other.entropy,
            self.kl + other.kl,
            max(self.log_ratio_max, other.log_ratio_max),
            self.counts + other.counts,
        )


def policy_loss(
    logprob_T: Tensor,
    entropy_T: Tensor,
    old_logprob_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    *,
    objective: str,
    eps_low: float,
    eps_high: float,
) -> tuple[Tensor, LossSums]:
    """-Σ_t w_t · objective_t over the tokens of one micro-batch, to be minimised, and its sums.

    advantages_T: of each token's response. weights_T: w_t of the whole optimizer batch (design: loss weight).
    """
    mask_T = torch.ones_like(logprob_T, dtype=torch.bool)
    objective_T, counts = OBJECTIVES[objective](
        logprob_T, old_logprob_T, advantages_T, mask_T, eps_low=eps_low, eps_high=eps_high
    )
    loss = -(weights_T * objective_T).sum()
    log_ratio_T = (logprob_T.detach() - old_logprob_T).double()
    sums = LossSums(
        loss=float(loss.detach()),
        entropy=float(entropy_T.detach().sum(dtype=torch.float64)),
        kl=float((torch.expm1(log_ratio_T) - log_ratio_T).sum()),
        log_ratio_max=float(log_ratio_T.abs().max()),
        counts=counts,
    )
    return loss, sums


def spec_loss(spec: RunSpec) -> "partial[tuple[Tensor, LossSums]]":
    """The loss that the spec names."""
    return partial(policy_loss, objective=spec.loss.objective, eps_low=spec.clip.low, eps_high=spec.clip.high)
