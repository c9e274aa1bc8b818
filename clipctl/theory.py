"""The theorems on tabular softmax policies, by enumeration: what clipping does to entropy, predicted and exact.

Policies are arrays [states, actions] (or [actions]); expectations are sums over the last axis. Rewards are random: the
advantage is μ with probability ν, -μ with probability ν, else 0, whatever the action, so only μν = E[A⁺] matters. The
gradient of the clipped surrogate at π_k with samples from π_old is then

    ∂J/∂π(a|s) = d(s) μν (1_X(a) - 1_Y(a)),   X = {r < 1-ε_low},  Y = {r > 1+ε_high},  r = π_k/π_old,

because what stays of the two signs cancels everywhere else. Source: arXiv 2509.26114, Theorems 1 and 2.
Letters: S states, A actions. Entropies are nats, summed over states, each counted once.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Algorithm = Literal["pg", "npg"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FirstOrder:
    """The first-order change of entropy in one step, and what it is made of.

    clip_low, clip_high, total: nats, summed over states. gap_low, gap_high: the left sides of inequality (7) (pg) or (8)
    (npg) of each state, nan where the event has no action; p, q: P_πk(X), P_πk(Y) of each state.
    """

    clip_low: float
    clip_high: float
    total: float
    gap_low: Floats
    gap_high: Floats
    p: Floats
    q: Floats


def entropy(pi: ArrayLike) -> Floats:
    """H(π) = -Σ π log π over the last axis, nats; an action of probability 0 adds nothing."""
    pi_SA = np.asarray(pi, dtype=np.float64)
    logs = np.log(np.where(pi_SA > 0, pi_SA, 1.0))
    return np.asarray(-(pi_SA * logs).sum(-1))


def events(
    pi_old: ArrayLike, pi_k: ArrayLike, *, eps_low: float, eps_high: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """X and Y: the actions whose ratio π_k/π_old is below 1-ε_low, above 1+ε_high."""
    ratio = np.asarray(pi_k, dtype=np.float64) / np.asarray(pi_old, dtype=np.float64)
    return ratio < 1 - eps_low, ratio > 1 + eps_high


def first_order(
    pi_old: ArrayLike,
    pi_k: ArrayLike,
    *,
    eps_low: float,
    eps_high: float,
    mu: float,
    nu: float,
    step: float,
    visitation: ArrayLike = 1.0,
    algorithm: Algorithm = "pg",
) -> FirstOrder:
    """ΔH = μ ν η Σ_s d(s) [p·gap_low - q·gap_high] (Theorem 1 for "pg", 2 for "npg").

    pi_old, pi_k: positive probabilities, last axis actions. mu = E[A|A>0], nu = P(A>0); step: η; visitation: d(s).
    gap_low = E[Q]-E[Q|X] with Q = π_k (log π_k + H), or E[-log π_k|X]-H; gap_high the same with Y.
    """
    pi = np.asarray(pi_k, dtype=np.float64)
    h = entropy(pi)
    logs = np.log(pi)
    if algorithm == "pg":
        value = pi * (logs + h[..., None])
        gap = (pi * value).sum(-1)[..., None] - value
    else:
        gap = -logs - h[..., None]
    x, y = events(pi_old, pi, eps_low=eps_low, eps_high=eps_high)
    p, q = (pi * x).sum(-1), (pi * y).sum(-1)
    scale = mu * nu * step * np.broadcast_to(np.asarray(visitation, dtype=np.float64), h.shape)
    low, high = scale * (pi * gap * x).sum(-1), -scale * (pi * gap * y).sum(-1)
    return FirstOrder(
        clip_low=float(low.sum()),
        clip_high=float(high.sum()),
        total=float((low + high).sum()),
        gap_low=_conditional(pi * gap * x, p),
        gap_high=_conditional(pi * gap * y, q),
        p=p,
        q=q,
    )


def updated(
    pi_old: ArrayLike,
    pi_k: ArrayLike,
    *,
    eps_low: float,
    eps_high: float,
    mu: float,
    nu: float,
    step: float,
    visitation: ArrayLike = 1.0,
    algorithm: Algorithm = "pg",
) -> Floats:
    """π_{k+1} after one exact step on the clipped surrogate, same arguments as `first_order`.

    "pg": θ ← θ + η ∇_θ J, whose (s,a) entry is π(a)(g(a) - E_π[g]) with g = ∂J/∂π. "npg": π ← π ∘ exp(η g), renormalised.
    """
    pi = np.asarray(pi_k, dtype=np.float64)
    x, y = events(pi_old, pi, eps_low=eps_low, eps_high=eps_high)
    d = np.broadcast_to(np.asarray(visitation, dtype=np.float64), pi.shape[:-1])
    g = mu * nu * d[..., None] * (x.astype(np.float64) - y.astype(np.float64))
    direction = pi * (g - (pi * g).sum(-1, keepdims=True)) if algorithm == "pg" else g
    logits = np.log(pi) + step * direction
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def exact_change(
    pi_old: ArrayLike,
    pi_k: ArrayLike,
    *,
    eps_low: float,
    eps_high: float,
    mu: float,
    nu: float,
    step: float,
    visitation: ArrayLike = 1.0,
    algorithm: Algorithm = "pg",
) -> float:
    """H(π_{k+1}) - H(π_k), nats, summed over states; same arguments as `first_order`."""
    after = updated(
        pi_old,
        pi_k,
        eps_low=eps_low,
        eps_high=eps_high,
        mu=mu,
        nu=nu,
        step=step,
        visitation=visitation,
        algorithm=algorithm,
    )
    return float((entropy(after) - entropy(pi_k)).sum())


def _conditional(weighted: Floats, mass: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(mass > 0, weighted.sum(-1) / np.where(mass > 0, mass, 1.0), np.nan))
