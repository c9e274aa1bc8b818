"""The theorems on tabular softmax policies, by enumeration: what clipping does to entropy, predicted and exact.

Policies are arrays [states, actions] (or [actions]); expectations are sums over the last axis. Rewards are random: the
advantage has any law of mean 0 that does not depend on the action, so that only μν = E[A⁺] matters (μ with probability ν,
-μ with probability ν is one such law). The gradient of the clipped surrogate at π_k with samples from π_old is then

    ∂J/∂π(a|s) = d(s) μν (1_X(a) - 1_Y(a)),   X = {r < 1-ε_low},  Y = {r > 1+ε_high},  r = π_k/π_old,

because what stays of the two signs cancels everywhere else. An advantage A(s,a) that depends on the action keeps its
gradient, d(s) A(s,a), but where it is clipped: A < 0 on X, A > 0 on Y; its first order is the token formula of the entropy
ledger. Source: arXiv 2509.26114, Theorems 1 and 2.
Letters: S states, A actions, J values of a law, K steps. Entropies are nats, summed over states, each counted once.
"""

from collections.abc import Iterator
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
    gap = _gaps(pi, algorithm)
    x, y = events(pi_old, pi, eps_low=eps_low, eps_high=eps_high)
    p, q = (pi * x).sum(-1), (pi * y).sum(-1)
    scale = mu * nu * step * np.broadcast_to(np.asarray(visitation, dtype=np.float64), pi.shape[:-1])
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
    g = _random_gradient(pi_old, pi, eps_low, eps_high, mu * nu, visitation)
    d = _log_ratio_of_step(pi, step * _direction(pi, g, algorithm))
    return np.asarray(pi * np.exp(d))


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
    pi = np.asarray(pi_k, dtype=np.float64)
    g = _random_gradient(pi_old, pi, eps_low, eps_high, mu * nu, visitation)
    return _entropy_change(pi, step * _direction(pi, g, algorithm))


def law_gradient(
    pi_old: ArrayLike, pi_k: ArrayLike, values_J: ArrayLike, chances_J: ArrayLike, *, eps_low: float, eps_high: float
) -> Floats:
    """∂J/∂π(a|s) [S,A] for an advantage of any law, by enumeration of (action, advantage); d(s) = 1.

    values_J, chances_J: the law, of any mean. With mean 0 it is E[A⁺] (1_X - 1_Y), which a test checks.
    """
    values, chances = np.asarray(values_J, dtype=np.float64), np.asarray(chances_J, dtype=np.float64)
    return np.asarray(
        sum(
            chance * _kept(pi_old, pi_k, np.broadcast_to(value, np.shape(pi_k)), eps_low, eps_high)
            for value, chance in zip(values, chances, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """The entropy ledger of an advantage that depends on the action, times the step; nats, summed over states."""

    reward: float
    clip_low: float
    clip_high: float
    total: float


def token_terms(
    pi_old: ArrayLike,
    pi_k: ArrayLike,
    advantages: ArrayLike,
    *,
    eps_low: float,
    eps_high: float,
    step: float,
    visitation: ArrayLike = 1.0,
    algorithm: Algorithm = "pg",
) -> TokenTerms:
    """Reward, clip-low and clip-high term, expectations over a ~ π_old of η d(s) A e.

    advantages: A(s,a), of the policies' shape. e = r (E[Q] - Q(a)) for "pg", r (-log π - H) for "npg"; under π_old the
    factor r makes expectations under π_k.
    """
    pi, values = np.asarray(pi_k, dtype=np.float64), np.asarray(advantages, dtype=np.float64)
    x, y = events(pi_old, pi, eps_low=eps_low, eps_high=eps_high)
    d = np.broadcast_to(np.asarray(visitation, dtype=np.float64), pi.shape[:-1])[..., None]
    pull = step * d * values * pi * _gaps(pi, algorithm)
    reward = float(pull.sum())
    low, high = float(-(pull * (x & (values < 0))).sum()), float(-(pull * (y & (values > 0))).sum())
    return TokenTerms(reward, low, high, reward + low + high)


def exact_token_change(
    pi_old: ArrayLike,
    pi_k: ArrayLike,
    advantages: ArrayLike,
    *,
    eps_low: float,
    eps_high: float,
    step: float,
    visitation: ArrayLike = 1.0,
    algorithm: Algorithm = "pg",
) -> float:
    """H(π_{k+1}) - H(π_k) of one exact step on the clipped surrogate with advantages A(s,a); as `token_terms`."""
    pi = np.asarray(pi_k, dtype=np.float64)
    d = np.broadcast_to(np.asarray(visitation, dtype=np.float64), pi.shape[:-1])[..., None]
    g = d * _kept(pi_old, pi, np.asarray(advantages, dtype=np.float64), eps_low, eps_high)
    return _entropy_change(pi, step * _direction(pi, g, algorithm))


def residual_slope(steps_K: ArrayLike, residuals_K: ArrayLike) -> float:
    """Least-squares slope of log |residual| on log step."""
    slope, _ = np.polyfit(np.log(np.asarray(steps_K)), np.log(np.abs(np.asarray(residuals_K))), 1)
    return float(slope)


@dataclass(frozen=True, slots=True)
class Simulation:
    """Settings of `simulate`: each of `rollouts` fixes π_old; each of its `inner` steps draws `samples` fresh actions a
    state from it, with random rewards in groups of `group`, and takes one step on the clipped surrogate."""

    states: int = 200
    actions: int = 8
    rollouts: int = 12
    inner: int = 16
    samples: int = 64
    group: int = 8
    peak: float = 1.5
    """Standard deviation of the first policy's logits."""
    reward: Literal["random", "best"] = "random"
    """`random`: 1 with probability one half, whatever the action; `best`: 1 for one action of each state."""


def sampled_steps(
    settings: Simulation, *, eps_low: float, eps_high: float, step: float, algorithm: Algorithm, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    """(π_old, π_k) before each step and after the last, each [S,A].

    The draws are keyed by the seed alone, so arms that differ in ε see the same random numbers.
    """
    rng = np.random.default_rng(seed)
    pi = _softmax(settings.peak * rng.normal(size=(settings.states, settings.actions)))
    best = rng.integers(settings.actions, size=settings.states)
    for _ in range(settings.rollouts):
        old = pi
        for _ in range(settings.inner):
            yield old, pi
            up, down = _sampled_advantages(settings, old, best, rng)
            x, y = events(old, pi, eps_low=eps_low, eps_high=eps_high)
            g = (up * ~y + down * ~x) / old
            pi = pi * np.exp(_log_ratio_of_step(pi, step * _direction(pi, g, algorithm)))
    yield old, pi


def simulate(
    settings: Simulation, *, eps_low: float, eps_high: float, step: float, algorithm: Algorithm, seed: int
) -> Floats:
    """Mean entropy of the states, nats, before each step and after the last, [K+1]; arguments as `sampled_steps`."""
    steps = sampled_steps(settings, eps_low=eps_low, eps_high=eps_high, step=step, algorithm=algorithm, seed=seed)
    return np.array([float(entropy(pi).mean()) for _, pi in steps])


def _sampled_advantages(
    settings: Simulation, old: Floats, best: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Mean over samples of A⁺ and of A⁻ at each action [S,A], group means taken away."""
    draws, coins = rng.random((settings.states, settings.samples)), rng.random((settings.states, settings.samples))
    taken = (draws[..., None] > old.cumsum(-1)[:, None, :-1]).sum(-1)
    rewards = (coins < 0.5) if settings.reward == "random" else taken == best[:, None]
    groups = rewards.reshape(settings.states, -1, settings.group).astype(np.float64)
    advantages = (groups - groups.mean(-1, keepdims=True)).reshape(settings.states, -1)
    place = (np.arange(settings.states)[:, None] * settings.actions + taken).ravel()
    size = settings.states * settings.actions
    return tuple(  # type: ignore[return-value]
        np.bincount(place, part.ravel(), size).reshape(old.shape) / settings.samples
        for part in (np.maximum(advantages, 0), np.minimum(advantages, 0))
    )


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _random_gradient(
    pi_old: ArrayLike, pi: Floats, eps_low: float, eps_high: float, mean_positive: float, visitation: ArrayLike
) -> Floats:
    """∂J/∂π = d(s) E[A⁺] (1_X - 1_Y)."""
    x, y = events(pi_old, pi, eps_low=eps_low, eps_high=eps_high)
    d = np.broadcast_to(np.asarray(visitation, dtype=np.float64), pi.shape[:-1])
    return np.asarray(mean_positive * d[..., None] * (x.astype(np.float64) - y.astype(np.float64)))


def _kept(pi_old: ArrayLike, pi_k: ArrayLike, values: Floats, eps_low: float, eps_high: float) -> Floats:
    """The advantages whose gradient the clip leaves, 0 elsewhere."""
    x, y = events(pi_old, pi_k, eps_low=eps_low, eps_high=eps_high)
    return np.where((x & (values < 0)) | (y & (values > 0)), 0.0, values)


def _gaps(pi: Floats, algorithm: Algorithm) -> Floats:
    """E[Q] - Q(a), or -log π(a) - H, of every action."""
    surprise = np.log(pi) + entropy(pi)[..., None]
    if algorithm == "npg":
        return np.asarray(-surprise)
    q = pi * surprise
    return np.asarray((pi * q).sum(-1)[..., None] - q)


def _direction(pi: Floats, g: Floats, algorithm: Algorithm) -> Floats:
    """The change of the logits for a step of 1: ∇_θ J = π (g - E_π[g]) for "pg", g for "npg"."""
    return np.asarray(pi * (g - (pi * g).sum(-1, keepdims=True))) if algorithm == "pg" else g


def _log_ratio_of_step(pi: Floats, delta: Floats) -> Floats:
    """log π_{k+1} - log π_k for a change of the logits; exact also where that is tiny."""
    top = np.maximum(delta.max(-1, keepdims=True), 0.0)
    small = np.log1p((pi * np.expm1(np.minimum(delta, 1.0))).sum(-1, keepdims=True))
    large = top + np.log((pi * np.exp(delta - top)).sum(-1, keepdims=True))
    return np.asarray(delta - np.where(top < 1.0, small, large))


def _entropy_change(pi: Floats, delta: Floats) -> float:
    """ΔH = -Σ Δπ (log π + H) - Σ π' d with d = log π' - log π and Δπ = π (e^d - 1): no difference of two entropies, so
    what remains after the first order is right down to steps of 1e-8."""
    d = _log_ratio_of_step(pi, delta)
    moved = pi * np.expm1(d)
    return float(-(moved * (np.log(pi) + entropy(pi)[..., None])).sum() - ((pi + moved) * d).sum())


def _conditional(weighted: Floats, mass: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(mass > 0, weighted.sum(-1) / np.where(mass > 0, mass, 1.0), np.nan))
