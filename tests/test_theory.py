"""The theorems against exact enumeration, against autograd, and where they are said not to hold."""

import math
from decimal import Decimal, getcontext
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl.theory import (
    Simulation,
    entropy,
    events,
    exact_change,
    exact_token_change,
    first_order,
    law_gradient,
    residual_slope,
    sampled_steps,
    simulate,
    token_terms,
    updated,
)

Algorithm = Literal["pg", "npg"]
EPS = {"eps_low": 0.15, "eps_high": 0.3}


def policies(seed: int, states: int = 3, actions: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(states, actions)) * 1.5
    now = old + rng.normal(size=(states, actions)) * 0.6
    return (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (old, now))  # type: ignore[return-value]


def test_a_worked_example() -> None:
    """π_old = (.5, .3, .2), π = (.6, .3, .1), ε .2/.1: r = (1.2, 1, .5), X = {c}, Y = {a}.

    H = -.6 log .6 - .3 log .3 - .1 log .1 = 0.8979457; Q = π (log π + H) = (0.2322721, -0.0918082, -0.1404639);
    E[Q] = 0.0977744. gap_low = E[Q] - Q(c) = 0.2382384, gap_high = E[Q] - Q(a) = -0.1344977.
    """
    found = first_order([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], eps_low=0.2, eps_high=0.1, mu=2.0, nu=0.25, step=0.1)
    assert float(found.p) == pytest.approx(0.1)
    assert float(found.q) == pytest.approx(0.6)
    assert float(found.gap_low) == pytest.approx(0.2382384, abs=1e-6)
    assert float(found.gap_high) == pytest.approx(-0.1344977, abs=1e-6)
    assert found.clip_low == pytest.approx(0.05 * 0.1 * 0.2382384, abs=1e-8)
    assert found.clip_high == pytest.approx(-0.05 * 0.6 * -0.1344977, abs=1e-8)


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_residual_falls_with_the_square_of_the_step(algorithm: Algorithm, seed: int) -> None:
    """Log-log slope 2 of |exact - first order| over four decades of the step."""
    old, now = policies(seed)
    rest: dict[str, Any] = {
        **EPS,
        "mu": 1.0,
        "nu": 0.5,
        "visitation": np.array([0.5, 1.0, 2.0]),
        "algorithm": algorithm,
    }
    steps = np.logspace(-4, -0.5, 8) if algorithm == "pg" else np.logspace(-4.5, -1, 8)
    residuals = [
        abs(exact_change(old, now, step=step, **rest) - first_order(old, now, step=step, **rest).total)
        for step in steps
    ]
    if max(residuals) < 1e-9:
        return  # nothing outside the clip range: no step at all
    large = np.array(residuals) > 1e-12  # float64 has nothing to say below
    slopes = np.diff(np.log(np.array(residuals)[large])) / np.diff(np.log(steps[large]))
    assert np.median(slopes) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_residuals_slope_is_2_over_four_decades(algorithm: Algorithm, seed: int) -> None:
    old, now = policies(seed)
    given: dict[str, Any] = {
        **EPS,
        "mu": 1.2,
        "nu": 0.4,
        "visitation": np.array([0.5, 1.0, 2.0]),
        "algorithm": algorithm,
    }
    steps = np.logspace(-6.5, -2.5, 9)
    residuals = [exact_change(old, now, step=s, **given) - first_order(old, now, step=s, **given).total for s in steps]
    assert residual_slope(steps, residuals) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_token_formula_is_the_first_order_of_action_dependent_advantages(algorithm: Algorithm, seed: int) -> None:
    """Slope 2 again, and the parts against sums written out action by action."""
    old, now = policies(seed)
    advantages = np.random.default_rng(seed).normal(size=old.shape) + 0.3
    given: dict[str, Any] = {**EPS, "visitation": np.array([0.5, 1.0, 2.0]), "algorithm": algorithm}
    steps = np.logspace(-6.5, -2.5, 9)
    terms = [token_terms(old, now, advantages, step=s, **given) for s in steps]
    exact = [exact_token_change(old, now, advantages, step=s, **given) for s in steps]
    residuals = [change - term.total for change, term in zip(exact, terms, strict=True)]
    assert residual_slope(steps, residuals) == pytest.approx(2.0, abs=0.05)
    reward = low = high = 0.0
    for state, weight in enumerate((0.5, 1.0, 2.0)):
        pi, h = now[state], float(entropy(now[state]))
        q = pi * (np.log(pi) + h)
        for action in range(7):
            r = pi[action] / old[state, action]
            e = r * ((pi @ q - q[action]) if algorithm == "pg" else (-np.log(pi[action]) - h))
            pull = weight * old[state, action] * advantages[state, action] * e
            reward += pull
            low -= pull * (advantages[state, action] < 0 and r < 0.85)
            high -= pull * (advantages[state, action] > 0 and r > 1.3)
    one = token_terms(old, now, advantages, step=1.0, **given)
    assert (one.reward, one.clip_low, one.clip_high) == pytest.approx((reward, low, high), rel=1e-10)
    assert one.total == pytest.approx(reward + low + high, rel=1e-10)
    assert low != 0
    assert high != 0


BERNOULLI_OF_4 = [
    (b - s / 4, math.comb(3, s - b) * 0.3**s * 0.7 ** (4 - s)) for s in range(5) for b in (0, 1) if 0 <= s - b <= 3
]
"""(advantage, chance) of one response of a group of 4 under Bernoulli(0.3): its own draw b, and s ones in the group."""


@pytest.mark.parametrize("law", [BERNOULLI_OF_4, [(2.0, 0.1), (-0.5, 0.4), (0.0, 0.5)], [(0.1, 0.9), (-0.9, 0.1)]])
def test_any_law_of_mean_0_gives_the_gradient_of_its_positive_part(law: list[tuple[float, float]]) -> None:
    """Enumerated over (action, advantage): E[A⁺] (1_X - 1_Y), for laws that are not symmetric."""
    values, chances = np.array(law).T
    assert chances.sum() == pytest.approx(1.0)
    assert values @ chances == pytest.approx(0.0, abs=1e-15)
    old, now = policies(6)
    x, y = events(old, now, **EPS)
    positive = np.maximum(values, 0) @ chances
    found = law_gradient(old, now, values, chances, **EPS)
    np.testing.assert_allclose(found, positive * (x.astype(float) - y), atol=1e-15)
    assert x.any()
    assert y.any()


def test_the_exact_change_needs_no_difference_of_entropies() -> None:
    """At large steps it is that difference; at tiny ones it agrees with 60-digit arithmetic, where the difference does not."""
    old, now = policies(8, states=1)
    given: dict[str, Any] = {**EPS, "mu": 1.0, "nu": 0.5}
    for step in (0.3, 3.0, 40.0):
        naive = float((entropy(updated(old, now, step=step, **given)) - entropy(now)).sum())
        assert exact_change(old, now, step=step, **given) == pytest.approx(naive, rel=1e-10)
    getcontext().prec = 60
    x, y = events(old, now, **EPS)
    pi = [Decimal(float(p)) for p in now[0]]
    whole = sum(pi)
    pi = [p / whole for p in pi]
    g = [Decimal("0.5") * (int(a) - int(b)) for a, b in zip(x[0], y[0], strict=True)]
    mean = sum(p * v for p, v in zip(pi, g, strict=True))
    weights = [p * (Decimal("1e-7") * p * (v - mean)).exp() for p, v in zip(pi, g, strict=True)]
    total = sum(weights)
    after = [w / total for w in weights]
    change = float(sum(p * p.ln() for p in pi) - sum(p * p.ln() for p in after))
    assert exact_change(old, now, step=1e-7, **given) == pytest.approx(change, rel=1e-8)


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
def test_over_many_steps_clip_low_raises_and_clip_high_lowers_entropy(algorithm: Algorithm) -> None:
    """The paper's title on sampled steps under random rewards: against no clipping at all, by more than their spread over
    three paired seeds."""
    step = 1.0 if algorithm == "pg" else 0.05
    settings = Simulation(states=60, rollouts=6)
    arms = {"none": (1.0, np.inf), "low": (0.05, np.inf), "high": (1.0, 0.05)}
    ends = {
        arm: np.array(
            [
                simulate(settings, eps_low=low, eps_high=high, step=step, algorithm=algorithm, seed=s)[-1]
                for s in range(3)
            ]
        )
        for arm, (low, high) in arms.items()
    }
    up, down = ends["low"] - ends["none"], ends["high"] - ends["none"]
    assert up.min() > 0.005
    assert down.max() < -0.005


def test_a_simulation_is_keyed_by_its_seed_and_learns_where_there_is_a_right_action() -> None:
    settings = Simulation(states=20, rollouts=3, reward="best")
    given: dict[str, Any] = {"eps_low": 1.0, "eps_high": np.inf, "step": 1.0, "algorithm": "pg"}
    first = simulate(settings, seed=3, **given)
    assert first.shape == (3 * 16 + 1,)
    assert np.array_equal(first, simulate(settings, seed=3, **given))
    assert not np.array_equal(first, simulate(settings, seed=4, **given))
    assert first[-1] < first[0] - 0.1
    pairs = list(sampled_steps(settings, seed=3, **given))
    assert all(np.allclose(pi.sum(-1), 1) for _, pi in pairs)
    assert all(old is pi for old, pi in pairs[:-1:16])


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
def test_the_step_is_the_gradient_of_the_clipped_surrogate(algorithm: Algorithm) -> None:
    """∇J by autograd over the written-out expectation of min(rA, clip(r)A), A = ±μ with probability ν each."""
    old, now = (torch.from_numpy(policy) for policy in policies(4))
    mu, nu, step = 1.5, 0.3, 0.01
    logits = now.log().requires_grad_()
    pi = torch.softmax(logits, -1)
    pi.retain_grad()
    ratio = pi / old
    clipped = ratio.clamp(1 - EPS["eps_low"], 1 + EPS["eps_high"])
    objective = sum(nu * (old * torch.minimum(ratio * a, clipped * a)).sum() for a in (mu, -mu))
    objective.backward()  # type: ignore[union-attr]
    direction = logits.grad if algorithm == "pg" else pi.grad
    expected = torch.softmax(now.log() + step * direction, -1)
    found = updated(old.numpy(), now.numpy(), **EPS, mu=mu, nu=nu, step=step, algorithm=algorithm)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_nothing_clipped_nothing_changes() -> None:
    old, now = policies(1)
    found = first_order(old, now, eps_low=1.0, eps_high=float("inf"), mu=1.0, nu=0.5, step=0.1)
    assert (found.clip_low, found.clip_high, found.total) == (0.0, 0.0, 0.0)
    assert np.isnan(found.gap_low).all()
    assert np.isnan(found.gap_high).all()
    assert exact_change(old, now, eps_low=1.0, eps_high=float("inf"), mu=1.0, nu=0.5, step=0.1) == pytest.approx(
        0.0, abs=1e-14
    )


def test_one_side_alone_is_its_term() -> None:
    old, now = policies(2)
    rest: dict[str, Any] = {"mu": 1.0, "nu": 0.5, "step": 0.1}
    both = first_order(old, now, **EPS, **rest)
    assert first_order(old, now, eps_low=0.15, eps_high=float("inf"), **rest).total == pytest.approx(both.clip_low)
    assert first_order(old, now, eps_low=1.0, eps_high=0.3, **rest).total == pytest.approx(both.clip_high)


def test_clip_low_raises_and_clip_high_lowers_entropy_where_the_inequalities_hold() -> None:
    """Rare actions fell (X) and common ones rose (Y), the usual case: both gaps positive, both algorithms."""
    old = np.array([0.4, 0.3, 0.2, 0.1])
    now = np.array([0.55, 0.3, 0.1, 0.05])
    for algorithm in ("pg", "npg"):
        low = first_order(old, now, eps_low=0.2, eps_high=9.0, mu=1, nu=0.5, step=0.1, algorithm=algorithm)  # type: ignore[arg-type]
        assert low.clip_low > 0
        assert float(low.gap_low) > 0


def test_counterexamples_make_each_inequality_fail() -> None:
    """A common action that fell is in X, a common one that rose in Y: each gap is negative, and so is its claim."""
    for algorithm in ("pg", "npg"):
        fell = first_order(
            [0.9, 0.1], [0.7, 0.3], eps_low=0.1, eps_high=99, mu=1, nu=0.5, step=0.1, algorithm=algorithm
        )  # type: ignore[arg-type]
        assert float(fell.gap_low) < 0
        assert fell.clip_low < 0
        rose = first_order(
            [0.6, 0.4], [0.9, 0.1], eps_low=1.0, eps_high=0.1, mu=1, nu=0.5, step=0.1, algorithm=algorithm
        )  # type: ignore[arg-type]
        assert float(rose.gap_high) < 0
        assert rose.clip_high > 0


def test_entropy_and_events() -> None:
    assert float(entropy([0.5, 0.25, 0.25])) == pytest.approx(1.5 * np.log(2))
    assert float(entropy([1.0, 0.0])) == 0.0
    x, y = events([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], eps_low=0.2, eps_high=0.1)
    assert (x.tolist(), y.tolist()) == ([False, False, True], [True, False, False])
