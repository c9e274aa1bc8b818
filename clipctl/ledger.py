"""The entropy ledger: what each token of an update does to the entropy of its own state, and what clipping took away.

To first order in the step, and for samples a ~ π_old, a token with ratio r = π/π_old and log π(a), entropy H and
E_π[Q] under the current policy, Q(a) = π(a)(log π(a) + H), moves the entropy of its state by w·A·e with

    policy gradient  e = r (E_π[Q] - Q(a))          natural policy gradient  e = r (-log π(a) - H)

    reward term      =  Σ w A e                                as if nothing were clipped
    clip-low term    = -Σ w A e 1{A < 0, r < 1-ε_low}          what clip-low took away
    clip-high term   = -Σ w A e 1{A > 0, r > 1+ε_high}         what clip-high took away

Source: arXiv 2509.26114, Theorems 1 and 2, generalised to advantages that depend on the action. The sums are exact for a
tabular policy; in a network they are the part of a token's own state. Under AdamW a step has no fixed size, so terms are
compared as shares, not read as nats. Shapes: any, all the same.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """Reward, clip-low and clip-high term of one algorithm, float64 scalars."""

    reward: float
    clip_low: float
    clip_high: float

    @property
    def total(self) -> float:
        """Their sum: exactly the sum over the tokens that keep their gradient."""
        return self.reward + self.clip_low + self.clip_high

    def __add__(self, other: Self) -> "Terms":
        return Terms(self.reward + other.reward, self.clip_low + other.clip_low, self.clip_high + other.clip_high)


@dataclass(frozen=True, slots=True)
class EntropyLedger:
    """Sums over the tokens of a micro-batch; those of several add up.

    pg, npg: the terms. x_mass, x_pg, x_npg: Σ w r 1_X · (1, E[Q]-Q, -log π-H) over X = {r < 1-ε_low} whatever A, and
    y_… the same over Y = {r > 1+ε_high}: with w r they are expectations under π_k.
    """

    pg: Terms
    npg: Terms
    x_mass: float
    x_pg: float
    x_npg: float
    y_mass: float
    y_pg: float
    y_npg: float

    @property
    def gap7_low(self) -> float:
        """E[Q] - E[Q|X] of inequality (7); nan where X is empty."""
        return _ratio(self.x_pg, self.x_mass)

    @property
    def gap7_high(self) -> float:
        """E[Q] - E[Q|Y] of inequality (7); nan where Y is empty."""
        return _ratio(self.y_pg, self.y_mass)

    @property
    def gap8_low(self) -> float:
        """E[-log π|X] - H of inequality (8); nan where X is empty."""
        return _ratio(self.x_npg, self.x_mass)

    @property
    def gap8_high(self) -> float:
        """E[-log π|Y] - H of inequality (8); nan where Y is empty."""
        return _ratio(self.y_npg, self.y_mass)

    def __add__(self, other: Self) -> "EntropyLedger":
        return EntropyLedger(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def entropy_ledger(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    expected_q: Tensor,
    mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    weight: Tensor | None = None,
) -> EntropyLedger:
    """The ledger of sampled tokens; see the module's docstring for the formulas.

    logprob, old_logprob: log π_k(a), log π_old(a), nats. entropy, expected_q: H and E_π[Q] of π_k in the token's state.
    mask: bool. weight: the loss weights w_t; None: 1/number of masked tokens. Sums are float64; nothing is differentiable.
    """
    kept = torch.broadcast_tensors(logprob, old_logprob, advantages, entropy, expected_q, mask)[-1]  # type: ignore[no-untyped-call]
    logprob, old_logprob, advantages, entropy, expected_q = (
        tensor.detach().expand(kept.shape)[kept] for tensor in (logprob, old_logprob, advantages, entropy, expected_q)
    )
    # The events are those of the clip counts, so they compare the ratio in the dtype that the objective has.
    ratio = (logprob - old_logprob).exp()
    x, y = ratio < 1 - eps_low, ratio > 1 + eps_high
    logprob, advantages, entropy, expected_q, r = (
        tensor.double() for tensor in (logprob, advantages, entropy, expected_q, ratio)
    )
    size = logprob.numel()
    w = torch.full_like(logprob, 1 / max(size, 1))
    if weight is not None:
        w = weight.detach().expand(kept.shape)[kept].double()
    removed_low, removed_high = x & (advantages < 0), y & (advantages > 0)
    q = logprob.exp() * (logprob + entropy)
    effects = {"pg": expected_q - q, "npg": -logprob - entropy}
    terms = {
        name: Terms(
            reward=float((w * advantages * r * effect).sum()),
            clip_low=-float((w * advantages * r * effect)[removed_low].sum()),
            clip_high=-float((w * advantages * r * effect)[removed_high].sum()),
        )
        for name, effect in effects.items()
    }
    masses = {
        event: [float((w * r * value)[inside].sum()) for value in (torch.ones_like(r), effects["pg"], effects["npg"])]
        for event, inside in (("x", x), ("y", y))
    }
    return EntropyLedger(terms["pg"], terms["npg"], *masses["x"], *masses["y"])


def _ratio(total: float, mass: float) -> float:
    return total / mass if mass else float("nan")
