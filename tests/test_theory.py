"""The theorems against exact enumeration, against autograd, and where they are said not to hold."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl.theory import entropy, events, exact_change, first_order, updated

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
