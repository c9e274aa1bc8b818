"""From the statistics of one micro-batch to its share of the loss, and to the sums that the store keeps of an update.

Everything here adds up: the weights are fixed over the whole optimizer batch before it is split, so any split gives
the same gradient, and sums of parts (and ranks) are the sums of the batch. Dimension letters as in `clipctl.rollout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clipctl.algo import OBJECTIVES
from clipctl.ledger import EntropyLedger, EventCounts, RatioProfile, ratio_events, ratio_profiles


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

    def sums(self, losses: Sequence[float], batches: Sequence[UpdateTokens]) -> list[UpdateSums]:
        """What the store keeps of each of several optimizer batches, made in one pass over all their tokens.

        losses: the loss of each, as its micro-batches added up.
        """
        logprob_T, entropy_T, expected_q_T, old_T, advantages_T, weights_T = (
            torch.cat([getattr(tokens, name) for tokens in batches]) for name in UpdateTokens.__slots__
        )
        updates = len(batches)
        sizes = torch.tensor([len(tokens.logprob_T) for tokens in batches], device=logprob_T.device)
        update_T = torch.arange(updates, device=logprob_T.device).repeat_interleave(sizes)
        log_ratio_T = (logprob_T - old_T).double()
        excess_T = torch.expm1(log_ratio_T)
        # On the host: a GPU adds in an order that differs from run to run.
        scalars_3T = torch.stack([entropy_T.double(), excess_T - log_ratio_T, excess_T + 1]).cpu()
        scalars_3U = scalars_3T.new_zeros(3, updates).index_add_(1, update_T.cpu(), scalars_3T)
        extremes = [
            log_ratio_T.new_zeros(updates).scatter_reduce_(0, update_T, log_ratio_T, kind, include_self=False)
            for kind in ("amin", "amax")
        ]
        profiles = ratio_profiles(
            logprob_T,
            old_T,
            advantages_T,
            entropy_T,
            expected_q_T,
            weights_T,
            update_T,
            updates,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
        )
        entropy, kl, ratio = scalars_3U.tolist()
        least, most = (extreme.tolist() for extreme in extremes)
        return [
            UpdateSums(
                losses[at],
                entropy[at],
                kl[at],
                ratio[at],
                least[at],
                most[at],
                profiles[at],
                self.eps_low,
                self.eps_high,
            )
            for at in range(updates)
        ]

    def clipped(self, tokens: UpdateTokens) -> Tensor:
        """Which tokens an update clips, clip-low and clip-high: bool [2,T]. The events that the counts count."""
        x_T, y_T = ratio_events(tokens.logprob_T, tokens.old_logprob_T, self.eps_low, self.eps_high)
        return torch.stack([x_T & (tokens.advantages_T < 0), y_T & (tokens.advantages_T > 0)])

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
