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
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from clipctl.whatif import profile_edges


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
    x, y = ratio_events(logprob, old_logprob, eps_low, eps_high)
    r, pg, npg = _effects(logprob, old_logprob, entropy, expected_q)
    w = 1 / max(r.numel(), 1) if weight is None else weight.detach().expand(kept.shape)[kept].double()
    wr, advantages = w * r, advantages.double()
    values_5T = torch.stack([wr * advantages * pg, wr * advantages * npg, wr, wr * pg, wr * npg])
    events_5T = torch.stack([torch.ones_like(x), x & (advantages < 0), y & (advantages > 0), x, y]).double()
    pg_sums, npg_sums, mass, x_or_y_pg, x_or_y_npg = (values_5T @ events_5T.T).tolist()
    return EntropyLedger(
        Terms(pg_sums[0], 0.0 - pg_sums[1], 0.0 - pg_sums[2]),
        Terms(npg_sums[0], 0.0 - npg_sums[1], 0.0 - npg_sums[2]),
        *(mass[3], x_or_y_pg[3], x_or_y_npg[3]),
        *(mass[4], x_or_y_pg[4], x_or_y_npg[4]),
    )


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Tokens of an update: all, those with A ≠ 0, the active events, and X and Y whatever A."""

    tokens: int
    tokens_advantage: int
    clip_low: int
    clip_high: int
    ratio_low: int
    ratio_high: int


@dataclass(frozen=True, slots=True)
class RatioProfile:
    """The histogram of the ratio by the sign of the advantage; those of several parts add up.

    low_edges, high_edges: ascending ratios below and above 1. sums_3BC: float64, signs (-, 0, +) × bins × COLUMNS; bins:
    up to each low edge, exactly 1, from each high edge on. Events of every ε that is an edge are whole bins, so the
    profile holds the counts and the ledger of the ε in force, and what `clipctl.whatif` needs of any other.
    """

    low_edges: tuple[float, ...]
    high_edges: tuple[float, ...]
    sums_3BC: Tensor

    def __add__(self, other: Self) -> "RatioProfile":
        assert (self.low_edges, self.high_edges) == (other.low_edges, other.high_edges)
        return RatioProfile(self.low_edges, self.high_edges, self.sums_3BC + other.sums_3BC)

    def events(self, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
        """Sums over X and over Y, each [3,C]. The ε must be edges, 1.0 or inf."""
        x = self.low_edges.index(1 - eps_low) + 1 if eps_low < 1 else 0
        bins = self.sums_3BC.shape[1]
        y = len(self.low_edges) + 1 + self.high_edges.index(1 + eps_high) if eps_high < float("inf") else bins
        return self.sums_3BC[:, :x].sum(1), self.sums_3BC[:, y:].sum(1)

    def counts(self, eps_low: float, eps_high: float) -> EventCounts:
        x_3C, y_3C = self.events(eps_low, eps_high)
        tokens_3, x_3, y_3 = self.sums_3BC[..., 0].sum(1).tolist(), x_3C[:, 0].tolist(), y_3C[:, 0].tolist()
        return EventCounts(
            *(int(n) for n in (sum(tokens_3), tokens_3[0] + tokens_3[2], x_3[0], y_3[2], sum(x_3), sum(y_3)))
        )

    def ledger(self, eps_low: float, eps_high: float) -> EntropyLedger:
        """The same as `entropy_ledger` of the profile's tokens."""
        x_3C, y_3C = (event_3C.tolist() for event_3C in self.events(eps_low, eps_high))
        all_3C = self.sums_3BC.sum(1).tolist()
        pg, npg = (Terms(all_3C[2][c] - all_3C[0][c], x_3C[0][c], 0.0 - y_3C[2][c]) for c in (1, 2))
        x, y = ([sum(event[sign][c] for sign in range(3)) for c in (3, 4, 5)] for event in (x_3C, y_3C))
        return EntropyLedger(pg, npg, *x, *y)

    def columns(self) -> dict[str, Any]:
        """One row for each bin that holds a token, as columns of numpy arrays."""
        signs, bins = torch.nonzero(self.sums_3BC[:, :, 0], as_tuple=True)
        edges = torch.tensor([0.0, *self.low_edges, *self.high_edges, float("inf")], dtype=torch.float64)
        rows_NC = self.sums_3BC[signs, bins]
        return {
            "advantage_sign": (signs - 1).numpy(),
            "ratio_from": edges[bins].numpy(),
            "ratio_to": edges[bins + 1].numpy(),
            "tokens": rows_NC[:, 0].long().numpy(),
            "pg": rows_NC[:, 1].numpy(),
            "npg": rows_NC[:, 2].numpy(),
        }


COLUMNS = ("tokens", "Σ w|A|e for PG", "Σ w|A|e for NPG", "Σ w r", "Σ w r (E[Q]-Q)", "Σ w r (-log π-H)")
"""What a profile sums in each bin."""


def ratio_profiles(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantages_T: Tensor,
    entropy_T: Tensor,
    expected_q_T: Tensor,
    weight_T: Tensor,
    update_T: Tensor,
    updates: int,
    *,
    eps_low: float,
    eps_high: float,
) -> list[RatioProfile]:
    """The profiles of sampled tokens, arguments as in `entropy_ledger`, of each of `updates` updates in one pass.

    update_T: which update a token belongs to, int64. The ε in force are edges.
    """
    low, high, edges_K = _edges(eps_low, eps_high, logprob_T.dtype, logprob_T.device)
    # As the objective compares it: in the dtype of the log-probabilities.
    ratio_T = (logprob_T - old_logprob_T).exp()
    bins_T = torch.bucketize(ratio_T, edges_K[: len(low)], right=True)
    bins_T.add_(torch.bucketize(ratio_T, edges_K[len(low) :]))
    size = len(low) + len(high) + 1
    place_T = (3 * update_T + 1 + advantages_T.sign().long()).mul_(size).add_(bins_T)
    r, pg, npg = _effects(logprob_T, old_logprob_T, entropy_T, expected_q_T)
    wr_T = weight_T.double() * r
    pull_T = wr_T * advantages_T.double().abs()
    values_CT = torch.stack([torch.ones_like(r), pull_T * pg, pull_T * npg, wr_T, wr_T * pg, wr_T * npg])
    # On the host: a GPU adds in an order that differs from run to run, and sums with it in their last bits.
    values_CT, place_T = values_CT.cpu(), place_T.cpu()
    sums_CB = values_CT.new_zeros(len(COLUMNS), 3 * size * updates).index_add_(1, place_T, values_CT)
    # In order in memory, as a checkpoint gives them back: how a sum over bins is rounded depends on it.
    sums_U3BC = sums_CB.T.reshape(updates, 3, size, len(COLUMNS)).contiguous()
    return [RatioProfile(low, high, sums_3BC) for sums_3BC in sums_U3BC]


@lru_cache(maxsize=8)
def _edges(
    eps_low: float, eps_high: float, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[float, ...], tuple[float, ...], Tensor]:
    low, high = profile_edges(eps_low, eps_high)
    return tuple(low), tuple(high), torch.tensor([*low, *high], dtype=dtype, device=device)


def ratio_events(logprob: Tensor, old_logprob: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """X and Y; those of the clip counts, so they compare the ratio in the dtype that the objective has."""
    ratio = (logprob - old_logprob).exp()
    return ratio < 1 - eps_low, ratio > 1 + eps_high


def _effects(
    logprob: Tensor, old_logprob: Tensor, entropy: Tensor, expected_q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """r, E[Q] - Q(a) and -log π(a) - H of every token, float64."""
    logprob, entropy = logprob.double(), entropy.double()
    surprise = logprob + entropy
    return (logprob - old_logprob.double()).exp(), expected_q.double() - logprob.exp() * surprise, -surprise


def _ratio(total: float, mass: float) -> float:
    return total / mass if mass else float("nan")
