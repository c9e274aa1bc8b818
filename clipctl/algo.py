"""GRPO as the paper has it (arXiv 2509.26114), in pure tensor functions: advantages, objectives, clip counts, weights.

The advantage is the reward minus its group's mean, without the standard deviation (Dr. GRPO, arXiv 2503.20783). ε_low
and ε_high are independent; 1.0 and inf are off. Sums and counts, never means: those of micro-batches and ranks add up.
Dimension letters: P prompts, G responses of a group, R responses, T tokens. Per-token functions take any shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

EQUAL_REWARDS = 1e-9
"""A group whose rewards lie within this has advantage exactly 0: float noise must not make a gradient."""


@dataclass(frozen=True, slots=True)
class ClipCounts:
    """Counts of tokens inside the mask, and sums and extremes of their ratios r = π(y)/π_old(y); scalars.

    clip_low: A < 0 and r < 1 - ε_low. clip_high: A > 0 and r > 1 + ε_high. The active events, whose gradient is 0.
    ratio_low, ratio_high: r < 1 - ε_low, r > 1 + ε_high, whatever A (the paper's X and Y).
    tokens, tokens_advantage: all, those with A ≠ 0; the two denominators of every fraction. The counts are int64.
    ratio_min, ratio_max, ratio_sum: float64; inf, -inf, 0 of no token.
    """

    clip_low: Tensor
    clip_high: Tensor
    ratio_low: Tensor
    ratio_high: Tensor
    tokens: Tensor
    tokens_advantage: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    ratio_sum: Tensor

    def __add__(self, other: Self) -> "ClipCounts":
        """The counts of both sets of tokens together."""
        return ClipCounts(
            self.clip_low + other.clip_low,
            self.clip_high + other.clip_high,
            self.ratio_low + other.ratio_low,
            self.ratio_high + other.ratio_high,
            self.tokens + other.tokens,
            self.tokens_advantage + other.tokens_advantage,
            torch.minimum(self.ratio_min, other.ratio_min),
            torch.maximum(self.ratio_max, other.ratio_max),
            self.ratio_sum + other.ratio_sum,
        )


class Objective(Protocol):
    """(log π, log π_old, A) of tokens → objective of each, to be maximised."""

    def __call__(
        self, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
    ) -> Tensor: ...


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """A = reward - mean of its group's rewards, [P,G] float64; exactly 0 in a group with max - min ≤ 1e-9.

    rewards_PG: of any dtype; a reward that is not finite makes its group's advantages NaN.
    """
    assert rewards_PG.ndim == 2, f"rewards must be [prompts, group], not {tuple(rewards_PG.shape)}"
    rewards_PG = rewards_PG.detach().double()
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centred_PG.masked_fill(zero_advantage_groups(rewards_PG).unsqueeze(1), 0.0)


def zero_advantage_groups(rewards_PG: Tensor) -> Tensor:
    """Which groups have equal rewards (max - min ≤ 1e-9), and so no gradient; bool [P]."""
    rewards_PG = rewards_PG.double()
    return rewards_PG.amax(1) - rewards_PG.amin(1) <= EQUAL_REWARDS


def clipped_surrogate(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> tuple[Tensor, ClipCounts]:
    """min(r A, clip(r, 1-ε_low, 1+ε_high) A) with r = exp(log π - log π_old), per token, and counts.

    logprob, old_logprob: nats, one shape. advantages: broadcast to it. mask: bool, True on response tokens; what lies
    outside may be anything. Returns the objective, to be maximised, in logprob's dtype, 0 outside the mask; only
    logprob gets a gradient, A·r·∇log π, exactly 0 where the clip is active. Source: arXiv 1707.06347 eq. 7, with
    the two sides of arXiv 2503.14476 eq. 10.
    """
    ratio, advantages, mask = _ratio(logprob, old_logprob, advantages, mask)
    low, high = ratio < 1 - eps_low, ratio > 1 + eps_high
    counts = _counts(ratio, advantages, mask, low, high, low & (advantages < 0), high & (advantages > 0))
    # What lies outside the mask may be anything, so it must not come near the gradient.
    inside, old = torch.where(mask, logprob, 0.0), torch.where(mask, old_logprob, 0.0)
    return clipped_objective(inside, old, advantages, eps_low=eps_low, eps_high=eps_high), counts


def clipped_objective(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """The objective of `clipped_surrogate` alone, of tokens of one shape."""
    log_ratio = logprob - old_logprob.detach()
    ratio, advantages = log_ratio.detach().exp(), advantages.detach()
    clip_low, clip_high = (ratio < 1 - eps_low) & (advantages < 0), (ratio > 1 + eps_high) & (advantages > 0)
    # Clipped tokens leave before exp: through a ratio that overflowed, a gradient of 0 would become NaN.
    live = (advantages != 0) & ~clip_low & ~clip_high
    surrogate = advantages * torch.where(live, log_ratio, 0.0).exp()
    clipped = torch.where(clip_low, (1 - eps_low) * advantages, 0.0)
    clipped = torch.where(clip_high, (1 + eps_high) * advantages, clipped)
    return torch.where(live, surrogate, clipped)


def reinforce_objective(
    logprob: Tensor, old_logprob: Tensor, advantages: Tensor, *, eps_low: float, eps_high: float
) -> Tensor:
    """A·log π per token, without ratio and clipping: unbiased for the first update of a rollout, and only for it.

    Arguments as in `clipped_objective`; ε has no effect. Source: Williams 1992, REINFORCE with the group's mean as its
    baseline.
    """
    return torch.where(advantages != 0, advantages.detach() * logprob, 0.0)


OBJECTIVES: dict[str, Objective] = {"clip": clipped_objective, "reinforce": reinforce_objective}
"""The objectives of `loss.objective`."""


def _ratio(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r without a gradient, 1 outside the mask; A in logprob's shape and dtype, 0 outside the mask; the mask, bool."""
    assert logprob.shape == old_logprob.shape, f"{tuple(logprob.shape)} log-probs, {tuple(old_logprob.shape)} old ones"
    mask = mask.bool().expand(logprob.shape)
    advantages = torch.where(mask, advantages.detach().to(logprob.dtype), 0.0)
    assert advantages.shape == logprob.shape, f"{tuple(logprob.shape)} tokens, {tuple(advantages.shape)} advantages"
    log_ratio = torch.where(mask, logprob.detach() - old_logprob.detach(), 0.0)
    return log_ratio.exp(), advantages, mask


def _counts(
    ratio: Tensor, advantages: Tensor, mask: Tensor, low: Tensor, high: Tensor, clip_low: Tensor, clip_high: Tensor
) -> ClipCounts:
    """Counts of what `_ratio` returned; ratios outside the mask are 1, which no ε ≥ 0 counts."""
    inside = ratio[mask].double()
    edge = torch.full((1,), math.inf, dtype=torch.float64, device=ratio.device)
    return ClipCounts(
        clip_low=clip_low.sum(),
        clip_high=clip_high.sum(),
        ratio_low=low.sum(),
        ratio_high=high.sum(),
        tokens=mask.sum(),
        tokens_advantage=(advantages != 0).sum(),
        ratio_min=torch.cat([inside, edge]).amin(),
        ratio_max=torch.cat([inside, -edge]).amax(),
        ratio_sum=inside.sum(),
    )


def loss_weights(lengths_R: Tensor, aggregation: str, constant: int) -> Tensor:
    """The loss weight w of every token of each response of one **whole** optimizer batch, float64 [R].

    lengths_R: response lengths in tokens, truncated and zero-advantage responses too. constant: L, used by `constant`
    alone. aggregation: a key of AGGREGATIONS. Fixed before the batch is split, so any split gives the same gradient.
    """
    lengths_R = lengths_R.double()
    assert lengths_R.ndim == 1
    assert bool((lengths_R >= 1).all()), "every response has at least one token"
    return AGGREGATIONS[aggregation](lengths_R, constant)


def token_mean(lengths_R: Tensor, constant: int) -> Tensor:
    """w = 1/N with N = Σ T_i, the tokens of the optimizer batch (DAPO, arXiv 2503.14476 eq. 12)."""
    return torch.ones_like(lengths_R) / lengths_R.sum()


def sequence_mean(lengths_R: Tensor, constant: int) -> Tensor:
    """w_i = 1/(B·T_i) with B responses (GRPO, arXiv 2402.03300 eq. 3; the paper's theory)."""
    return 1 / (len(lengths_R) * lengths_R)


def constant_divisor(lengths_R: Tensor, constant: int) -> Tensor:
    """w = 1/(B·L) with a constant L (Dr. GRPO, arXiv 2503.20783)."""
    assert constant >= 1
    return torch.ones_like(lengths_R) / (len(lengths_R) * constant)


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant_divisor,
}
"""The weights of `loss.aggregation`; each takes (lengths_R float64, constant)."""


def truncated_importance(logprob_T: Tensor, sampler_logprob_T: Tensor, cap: float) -> Tensor:
    """min(cap, π(trainer) / π(sampler)) of each token, float64: its weight where the sampler drew it under other rounding.

    Source: truncated importance sampling, Ionides 2008, 10.1198/106186008X320456, eq. 4 with a fixed cap, token by token.
    """
    return (logprob_T.double() - sampler_logprob_T.double()).exp().clamp(max=cap)


def overlong_penalty(lengths_R: Tensor, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's soft overlong punishment, a reward term ≤ 0 in the shape of lengths_R, float64.

    0 up to max_tokens - buffer tokens, then linear down to -penalty at max_tokens; buffer = 0: 0 everywhere.
    Source: arXiv 2503.14476 eq. 13, times `penalty`.
    """
    lengths_R = lengths_R.double()
    if buffer == 0:
        return torch.zeros_like(lengths_R)
    over_R = ((lengths_R - (max_tokens - buffer)) / buffer).clamp(0.0, 1.0)
    return torch.where(over_R > 0, -penalty * over_R, 0.0)


def expected_zero_advantage_share(kind: str, p: float, group_size: int) -> float:
    """Expected share of groups with equal rewards under the random reward `kind`.

    bernoulli: p^G + (1-p)^G. rademacher: 2·0.5^G. normal, uniform: 0. p: of `bernoulli` alone.
    Raises ValueError for another kind: a graded reward's share depends on the model.
    """
    if kind == "bernoulli":
        return p**group_size + (1 - p) ** group_size
    if kind == "rademacher":
        return 2 * 0.5**group_size
    if kind in ("normal", "uniform"):
        return 0.0
    raise ValueError(f"kind = {kind!r} is not a random reward: bernoulli, rademacher, normal, uniform")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    num_samples: n. num_correct: c. Exact up to one rounding, whatever n. Raises ValueError unless 1 ≤ k ≤ n and
    0 ≤ c ≤ n. Source: arXiv 2107.03374 eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: it must be from 1 to num_samples = {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct = {num_correct}: it must be from 0 to num_samples = {num_samples}")
    draws = math.comb(num_samples, k)
    return (draws - math.comb(num_samples - num_correct, k)) / draws
