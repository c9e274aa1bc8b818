"""From the statistics of one micro-batch to its share of the loss, and to the sums that the store keeps of an update.

Everything here adds up: the weights are fixed over the whole optimizer batch before it is split, so any split gives
the same gradient, and sums of parts (and ranks) are the sums of the batch. Dimension letters as in `clipctl.rollout`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clipctl.algo import OBJECTIVES
from clipctl.ledger import EntropyLedger, EventCounts, RatioProfile, ratio_profile


@dataclass(frozen=True, slots=True)
class UpdateTokens:
    """Response tokens of an optimizer batch, flat: statistics under the policy before the step, and what weighs them.

    logprob_T, old_logprob_T: log π(y), log π_old(y). entropy_T, expected_q_T: H and E_π[Q]. float32; advantages_T,
    weights_T: float64.
    """

    logprob_T: Tensor
    entropy_T: Tensor
    expected_q_T: Tensor
    old_logprob_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor


@dataclass(frozen=True, slots=True)
class UpdateSums:
    """Sums over the tokens of an update, or of several parts of one added up.

    loss: -Σ w·objective. entropy: Σ H, nats. kl: Σ (r - 1 - log r), an unbiased estimate of KL(π_old ‖ π) times tokens.
    ratio: Σ r. log_ratio_min, log_ratio_max: extremes of log r. profile: the histogram, which holds counts and ledger.
    """

    loss: float
    entropy: float
    kl: float
    ratio: float
    log_ratio_min: float
    log_ratio_max: float
    profile: RatioProfile
    eps_low: float
    eps_high: float

    @property
    def counts(self) -> EventCounts:
        """Of the ε in force."""
        return self.profile.counts(self.eps_low, self.eps_high)

    @property
    def ledger(self) -> EntropyLedger:
        """Of the ε in force."""
        return self.profile.ledger(self.eps_low, self.eps_high)

    def __add__(self, other: Self) -> "UpdateSums":
        assert (self.eps_low, self.eps_high) == (other.eps_low, other.eps_high)
        return UpdateSums(
            self.loss + other.loss,
            self.entropy + other.entropy,
            self.kl + other.kl,
            self.ratio + other.ratio,
            min(self.log_ratio_min, other.log_ratio_min),
            max(self.log_ratio_max, other.log_ratio_max),
            self.profile + other.profile,
            self.eps_low,
            self.eps_high,
        )


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The loss of a rollout's updates: the objective's name in `algo.OBJECTIVES`, and the ε in force."""

    objective: str
    eps_low: float
    eps_high: float

    def __call__(self, logprob_T: Tensor, old_logprob_T: Tensor, advantages_T: Tensor, weights_T: Tensor) -> Tensor:
        """-Σ_t w_t · objective_t over the tokens of one micro-batch, to be minimised.

        advantages_T: of each token's response. weights_T: w_t of the whole optimizer batch (design: loss weight).
        """
        objective_T = OBJECTIVES[self.objective](
            logprob_T, old_logprob_T, advantages_T, eps_low=self.eps_low, eps_high=self.eps_high
        )
        return -(weights_T * objective_T).sum()

    def sums(self, loss: float, tokens: UpdateTokens) -> UpdateSums:
        """What the store keeps of the tokens of an optimizer batch."""
        log_ratio_T = (tokens.logprob_T - tokens.old_logprob_T).double()
        excess_T = torch.expm1(log_ratio_T)
        low, high = torch.aminmax(log_ratio_T)
        scalars = torch.stack([tokens.entropy_T.sum(dtype=torch.float64), excess_T.sum(), log_ratio_T.sum(), low, high])
        entropy, excess, log_ratio, least, most = scalars.tolist()
        profile = ratio_profile(
            tokens.logprob_T,
            tokens.old_logprob_T,
            tokens.advantages_T,
            tokens.entropy_T,
            tokens.expected_q_T,
            tokens.weights_T,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        size = len(log_ratio_T)
        return UpdateSums(
            loss, entropy, excess - log_ratio, size + excess, least, most, profile, self.eps_low, self.eps_high
        )

    def pull(
        self, logprob_T: Tensor, old_logprob_T: Tensor, advantages_T: Tensor, weights_T: Tensor
    ) -> dict[str, Tensor]:
        """The objective's gradient by log π in three parts that add up to it: as if nothing were clipped (reward), and
        what the active clip-low and clip-high events took away."""
        ratio_T = (logprob_T - old_logprob_T).exp()
        reward_T = weights_T * advantages_T * (ratio_T if self.objective == "clip" else 1.0)
        low_T = (ratio_T < 1 - self.eps_low) & (advantages_T < 0)
        high_T = (ratio_T > 1 + self.eps_high) & (advantages_T > 0)
        return {
            "reward": reward_T,
            "clip_low": torch.where(low_T, -reward_T, 0.0),
            "clip_high": torch.where(high_T, -reward_T, 0.0),
        }
