"""The ledger against numbers by hand, against the theorems by enumeration, and its sums over splits."""

import math

import numpy as np
import pytest
import torch
from test_theory import policies

from clipctl.ledger import EntropyLedger, entropy_ledger
from clipctl.theory import entropy, first_order


def test_three_tokens_by_hand() -> None:
    """4-word vocabulary, weights 1/3, ε 0.2/0.3, worked out with pencil and table of logarithms; π = (.3, .4, .2, .1) is
    the same in all three states.

    H = -Σ π log π             = .3612 + .3665 + .3219 + .2303                      = 1.2798542
    Q = π (log π + H)          = (.0227644, .1454254, -.0659167, -.1022731)         E[Q] = Σ π Q = .0415888

    token  a  π_old  r    A     event                 E[Q]-Q(a)   -log π(a)-H
    1      0  .5     .6   -1    clip-low, in X         .0188244   -.0758814
    2      1  .2     2    +.5   clip-high, in Y       -.1038366   -.3635635
    3      3  .1     1    +1    none                   .1438619   1.0227309

    e = r·(…)     PG: .0112946, -.2076731, .1438619        NPG: -.0455289, -.7271270, 1.0227309
    reward        PG: (-.0112946 - .1038366 + .1438619)/3   NPG: (.0455289 - .3635635 + 1.0227309)/3
    clip-low      PG: .0112946/3                            NPG: -.0455289/3
    clip-high     PG: .1038366/3                            NPG: .3635635/3
    X             Σ w r = .6/3, Σ w e = .0112946/3 and -.0455289/3
    Y             Σ w r = 2/3,  Σ w e = -.2076731/3 and -.7271270/3
    """
    pi = np.array([0.3, 0.4, 0.2, 0.1])
    taken, old, advantages = pi[[0, 1, 3]], np.array([0.5, 0.2, 0.1]), np.array([-1.0, 0.5, 1.0])
    ones = torch.ones(3, dtype=torch.float64)
    found = entropy_ledger(
        torch.from_numpy(np.log(taken)), torch.from_numpy(np.log(old)), torch.from_numpy(advantages), 1.2798542 * ones,
        0.0415888 * ones, torch.ones(3, dtype=torch.bool), eps_low=0.2, eps_high=0.3,
    )  # fmt: skip
    terms = (found.pg.reward, found.pg.clip_low, found.pg.clip_high, found.pg.total)
    assert terms == pytest.approx((0.0095769, 0.0037649, 0.0346122, 0.0479540), abs=2e-7)
    terms = (found.npg.reward, found.npg.clip_low, found.npg.clip_high, found.npg.total)
    assert terms == pytest.approx((0.2348988, -0.0151763, 0.1211878, 0.3409103), abs=2e-7)
    x, y = (found.x_mass, found.x_pg, found.x_npg), (found.y_mass, found.y_pg, found.y_npg)
    assert x == pytest.approx((0.2, 0.0037649, -0.0151763), abs=2e-7)
    assert y == pytest.approx((0.6666667, -0.0692244, -0.2423757), abs=2e-7)
    gaps = (found.gap7_low, found.gap7_high, found.gap8_low, found.gap8_high)
    assert gaps == pytest.approx((0.0188244, -0.1038366, -0.0758814, -0.3635635), abs=2e-7)


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
def test_enumerated_samples_give_the_theorems(algorithm: str) -> None:
    """Every action of every state once for each sign of A, weighted by π_old ν: the ledger's clip terms are the theorem's
    right-hand side, and the reward term is 0."""
    old, now = policies(7)
    h = entropy(now)
    expected_q = (now**2 * (np.log(now) + h[:, None])).sum(-1)
    mu, nu = 1.5, 0.3
    states = np.repeat(np.arange(3), 7)
    parts = []
    for sign in (1.0, -1.0):
        tensors = [np.log(now).ravel(), np.log(old).ravel(), np.full(21, sign * mu), h[states], expected_q[states]]
        parts.append(
            entropy_ledger(
                *map(torch.from_numpy, tensors),
                torch.ones(21, dtype=torch.bool),
                eps_low=0.15,
                eps_high=0.3,
                weight=torch.from_numpy(nu * old.ravel()),
            )
        )
    found = parts[0] + parts[1]
    terms = found.pg if algorithm == "pg" else found.npg
    theorem = first_order(old, now, eps_low=0.15, eps_high=0.3, mu=mu, nu=nu, step=1.0, algorithm=algorithm)  # type: ignore[arg-type]
    assert terms.reward == pytest.approx(0.0, abs=1e-14)
    assert terms.clip_low == pytest.approx(theorem.clip_low, rel=1e-10)
    assert terms.clip_high == pytest.approx(theorem.clip_high, rel=1e-10)
    gap = (found.gap7_low, found.gap7_high) if algorithm == "pg" else (found.gap8_low, found.gap8_high)
    pooled = [(m * g)[m > 0].sum() / m.sum() for m, g in ((theorem.p, theorem.gap_low), (theorem.q, theorem.gap_high))]
    assert gap == pytest.approx(tuple(pooled), rel=1e-10)


def random_tokens(size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logprob = -torch.rand(size, generator=generator) * 3
    old = logprob + torch.randn(size, generator=generator) * 0.4
    advantages = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) > 0.3)
    return [logprob, old, advantages, torch.rand(size, generator=generator), torch.randn(size, generator=generator)]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_ledgers_of_parts_add_up(parts: int) -> None:
    tokens, mask = random_tokens(50), torch.arange(50) % 5 != 0
    weight = torch.rand(50, generator=torch.Generator().manual_seed(1))
    whole = entropy_ledger(*tokens, mask, eps_low=0.1, eps_high=0.2, weight=weight)
    split = [
        entropy_ledger(*(t[at] for t in tokens), mask[at], eps_low=0.1, eps_high=0.2, weight=weight[at])
        for at in torch.arange(50).tensor_split(parts)
    ]
    total = split[0]
    for ledger in split[1:]:
        total = total + ledger
    for name in ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert total.pg.total == pytest.approx(whole.pg.total, rel=1e-12)
    assert total.npg.clip_high == pytest.approx(whole.npg.clip_high, rel=1e-12)


def test_the_total_is_the_sum_over_tokens_that_keep_their_gradient() -> None:
    logprob, old, advantages, h, eq = random_tokens(60)
    found = entropy_ledger(logprob, old, advantages, h, eq, torch.ones(60, dtype=torch.bool), eps_low=0.1, eps_high=0.2)
    r = (logprob - old).double().exp()
    kept = ~(((r < 0.9) & (advantages < 0)) | ((r > 1.2) & (advantages > 0)))
    effect = r * (-logprob.double() - h.double())
    assert found.npg.total == pytest.approx(float((advantages * effect)[kept].sum() / 60), rel=1e-6)


def test_empty_events_and_masks() -> None:
    found = entropy_ledger(*random_tokens(9), torch.zeros(9, dtype=torch.bool), eps_low=0.1, eps_high=0.2)
    assert (found.pg.reward, found.x_mass, found.y_mass) == (0.0, 0.0, 0.0)
    assert math.isnan(found.gap7_low)
    off = entropy_ledger(*random_tokens(9), torch.ones(9, dtype=torch.bool), eps_low=1.0, eps_high=math.inf)
    assert (off.pg.clip_low, off.npg.clip_high) == (0.0, 0.0)
    assert isinstance(found, EntropyLedger)
