"""GRPO's arithmetic as pure tensor functions: advantages, the clipped surrogate and its counts, loss weights, pass@k.

Letters as in `clipctl.rollout`: P prompts, G group, R responses, T tokens. Sources: arXiv 2402.03300 (GRPO),
2503.20783 (Dr. GRPO: no standard deviation), 2503.14476 (DAPO), 2509.26114 (sided clipping and entropy).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

EQUAL_REWARDS = 1e-9
"""Rewards of a group that differ by at most this much are equal: its advantages are exactly 0."""


@dataclass(frozen=True, slots=True)
class ClipCounts:
    """Tokens inside the mask, by what clipping does to them. Counts of micro-batches add up.

    clip_low: A < 0 and r < 1-ε_low. clip_high: A > 0 and r > 1+ε_high (where the gradient really vanishes).
    ratio_low, ratio_high: the same ratios whatever A (the paper's events X and Y). tokens_advantage: A ≠ 0.
    ratio_sum, ratio_min, ratio_max: of r = π/π_old; an empty mask has 0, inf and -inf.
    """

    clip_low: Tensor
    clip_high: Tensor
    ratio_low: Tensor
    ratio_high: Tensor
    tokens: Tensor
    tokens_advantage: Tensor
    ratio_sum: Tensor
    ratio_min: Tensor
    ratio_max: Tensor

    def __add__(self, other: Self) -> "ClipCounts":
        return ClipCounts(
            self.clip_low + other.clip_low,
            self.clip_high + other.clip_high,
            self.ratio_low + other.ratio_low,
            self.ratio_high + other.ratio_high,
            self.tokens + other.tokens,
            self.tokens_advantage + other.tokens_advantage,
            self.ratio_sum + other.ratio_sum,
            torch.minimum(self.ratio_min, other.ratio_min),
            torch.maximum(self.ratio_max, other.ratio_max),
        )


class Objective(Protocol):
    """A per-token objective, to be maximised, and the counts that go with it."""

    def __call__(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        eps_low: float,
        eps_high: float,
    ) -> tuple[Tensor, ClipCounts]: ...


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """Reward minus the group's mean, [P,G] float64, without division by the standard deviation (arXiv 2503.20783).

    The mean is taken in float64, and a group whose rewards are equal has exactly 0: a mean that is off by one rounding
    would otherwise make an advantage out of nothing.
    """
    assert rewards_PG.ndim == 2
    rewards_PG = rewards_PG.double()
    advantages_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    return torch.where(zero_advantage_groups(rewards_PG)[:, None], torch.zeros_like(advantages_PG), advantages_PG)


def zero_advantage_groups(rewards_PG: Tensor) -> Tensor:
    """Groups whose rewards are all equal (max - min ≤ 1e-9), bool [P]."""
    return (rewards_PG.amax(-1) - rewards_PG.amin(-1)) <= EQUAL_REWARDS


def clipped_surrogate(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[Tensor, ClipCounts]:
    """min(r A, clip(r, 1-ε_low, 1+ε_high) A) per token with r = exp(logprob - old_logprob); 0 outside the mask.

    All four tensors have one shape or broadcast to it (advantages of a response: [R,1]); mask is bool. ε_low = 1 and
    ε_high = inf are off. Gradients reach logprob only, and are exactly 0 where clipping is active. What stands outside
    the mask, NaN included, touches neither value nor gradient. Source: arXiv 1707.06347, eq. 7, with two ε.
    """
    ratio, advantages, mask = _masked_ratio(logprob, old_logprob, advantages, mask)
    clipped = ratio.clamp(1.0 - eps_low, 1.0 + eps_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return objective, clip_counts(ratio.detach(), advantages, mask, eps_low=eps_low, eps_high=eps_high)


def reinforce_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[Tensor, ClipCounts]:
    """A log π per token, 0 outside the mask: unbiased for one update a rollout, and never clipped.

    Same arguments as `clipped_surrogate`; the ratios are counted against ε_low and ε_high, the active clips are 0.
    """
    ratio, advantages, mask = _masked_ratio(logprob, old_logprob, advantages, mask)
    objective = torch.where(mask, logprob, 0.0) * advantages
    counts = clip_counts(ratio.detach(), advantages, mask, eps_low=eps_low, eps_high=eps_high)
    none = torch.zeros_like(counts.clip_low)
    return objective, ClipCounts(
        none,
        none,
        counts.ratio_low,
        counts.ratio_high,
        counts.tokens,
        counts.tokens_advantage,
        counts.ratio_sum,
        counts.ratio_min,
        counts.ratio_max,
    )


OBJECTIVES: dict[str, Objective] = {"clip": clipped_surrogate, "reinforce": reinforce_objective}


def clip_counts(ratio: Tensor, advantages: Tensor, mask: Tensor, *, eps_low: float, eps_high: float) -> ClipCounts:
    """The sided counts over the mask, as int64 scalars; see `ClipCounts`. ratio: r, inf or NaN outside are ignored."""
    low = mask & (ratio < 1.0 - eps_low)
    high = mask & (ratio > 1.0 + eps_high)
    inside = ratio.double()
    return ClipCounts(
        clip_low=(low & (advantages < 0)).sum(),
        clip_high=(high & (advantages > 0)).sum(),
        ratio_low=low.sum(),
        ratio_high=high.sum(),
        tokens=mask.sum(),
        tokens_advantage=(mask & (advantages != 0)).sum(),
        ratio_sum=torch.where(mask, inside, 0.0).sum(),
        ratio_min=_extreme(torch.where(mask, inside, torch.inf), torch.amin, torch.inf),
        ratio_max=_extreme(torch.where(mask, inside, -torch.inf), torch.amax, -torch.inf),
    )


def token_mean(lengths_R: Tensor, constant: int) -> Tensor:
    """1/N for each of the N tokens of the optimizer batch (DAPO)."""
    return (1.0 / lengths_R.sum()).expand_as(lengths_R)


def sequence_mean(lengths_R: Tensor, constant: int) -> Tensor:
    """1/(B·T_i): the mean over B responses of the mean over their tokens (GRPO)."""
    return 1.0 / (len(lengths_R) * lengths_R)


def constant_divisor(lengths_R: Tensor, constant: int) -> Tensor:
    """1/(B·L) with one constant L for all responses (Dr. GRPO)."""
    return torch.full_like(lengths_R, 1.0 / (len(lengths_R) * constant))


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant_divisor,
}


def loss_weights(lengths_R: Tensor, aggregation: str, constant: int) -> Tensor:
    """Weight of each token of every response, [R] float64, over one whole optimizer batch.

    lengths_R: response lengths in tokens, all of them, truncated and without advantage too. Fixed before the batch is
    split into micro-batches, so any split has one gradient.
    """
    assert (lengths_R > 0).all()
    return AGGREGATIONS[aggregation](lengths_R.double(), constant)


def overlong_penalty(lengths_R: Tensor, *, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's soft overlong penalty, float64, any shape: 0 up to max_tokens - buffer, then linear to -penalty at
    max_tokens (arXiv 2503.14476, eq. 13). buffer 0 is off."""
    if buffer == 0:
        return torch.zeros(lengths_R.shape, dtype=torch.float64)
    over = (lengths_R.double() - (max_tokens - buffer)).clamp(min=0.0, max=float(buffer))
    return -penalty * over / buffer


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k of one problem: 1 - C(n-c, k)/C(n, k) (arXiv 2107.03374). Raises ValueError for k > n or c > n."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 0 ≤ c ≤ n and 1 ≤ k ≤ n, found n = {num_samples}, c = {num_correct}, k = {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _masked_ratio(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """r, A and mask in one shape; outside the mask r = 1 and A = 0, put there before exp so that nothing leaks."""
    logprob, old_logprob, advantages, mask = torch.broadcast_tensors(logprob, old_logprob.detach(), advantages.detach(), mask)
    assert mask.dtype == torch.bool
    log_ratio = torch.where(mask, logprob, 0.0) - torch.where(mask, old_logprob, 0.0)
    return log_ratio.exp(), torch.where(mask, advantages, 0.0), mask


def _extreme(values: Tensor, reduce: Callable[[Tensor], Tensor], empty: float) -> Tensor:
    return reduce(values) if values.numel() else values.new_tensor(empty)
