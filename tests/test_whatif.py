"""What-if from histograms of the ratio: exact at edges, at any ε that a run used, interpolated between."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl import load_spec, open_runs
from clipctl.algo import clipped_surrogate
from clipctl.analysis.answer import Options
from clipctl.analysis.what_if import what_if_view
from clipctl.ledger import EntropyLedger, RatioProfile, entropy_ledger, ratio_profiles
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.train import train
from clipctl.whatif import HIGH, LOW, WhatIf, share_below, what_if

ROWS: dict[str, Any] = {
    "advantage_sign": [-1, -1, -1, 0, 1, 1, 1],
    "ratio_from": [0.8, 0.9, 1.0, 0.8, 1.0, 1.0, 1.2],
    "ratio_to": [0.9, 1.0, 1.1, 0.9, 1.0, 1.2, 1.3],
    "tokens": [3, 4, 5, 7, 2, 6, 8],
    "pg": [0.3, -0.4, 0.5, 0.0, 0.2, -0.6, 0.8],
    "npg": [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0],
}


def rows() -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in ROWS.items()}


def test_a_profile_by_hand() -> None:
    """ε_low 0.1 takes the first negative bin, ε_high 0.2 the last positive one; A = 0 counts in X and pulls nothing."""
    found = what_if(rows(), eps_low=1 - 0.9, eps_high=1.2 - 1)
    assert (found.tokens, found.clip_low, found.clip_high) == (35, 3, 8)
    assert (found.ratio_low, found.ratio_high) == (10, 8)
    assert found.pg.reward == pytest.approx(-(0.3 - 0.4 + 0.5) + (0.2 - 0.6 + 0.8))
    assert (found.pg.clip_low, found.pg.clip_high) == (pytest.approx(0.3), pytest.approx(-0.8))
    assert (found.npg.reward, found.npg.clip_low, found.npg.clip_high) == (9.0, 1.0, -6.0)
    assert found.npg.total == 4.0
    assert not found.interpolated


def test_an_epsilon_inside_a_bin_is_interpolated_in_log_r_and_says_so() -> None:
    found = what_if(rows(), eps_low=0.05, eps_high=0.2)
    share = math.log(0.95 / 0.9) / math.log(1 / 0.9)
    assert found.interpolated
    assert found.clip_low == pytest.approx(3 + 4 * share)
    assert found.pg.clip_low == pytest.approx(0.3 - 0.4 * share)
    above = what_if(rows(), eps_low=1.0, eps_high=0.1)
    assert above.clip_high == pytest.approx(8 + 6 * (1 - math.log(1.1) / math.log(1.2)))
    assert (above.clip_low, above.ratio_low) == (0, 0)


def test_off_on_both_sides_leaves_the_reward_term() -> None:
    found = what_if(rows(), eps_low=1.0, eps_high=math.inf)
    assert (found.clip_low, found.clip_high, found.ratio_low, found.ratio_high) == (0, 0, 0, 0)
    assert found.pg.total == found.pg.reward
    assert not found.interpolated


def test_shares_at_the_ends() -> None:
    assert share_below(np.array([0.0, 10.0]), np.array([0.5, math.inf]), 0.25).tolist() == [0.5, 0.0]
    assert share_below(np.array([0.0, 10.0]), np.array([0.5, math.inf]), 20.0).tolist() == [1.0, 0.0]
    assert share_below(np.array([1.0]), np.array([1.0]), 1.0).tolist() == [0.0]


def tokens(seed: int, size: int = 400) -> list[torch.Tensor]:
    """float32 statistics; some ratios lie exactly on 1, on edges, and far out; some advantages are 0."""
    rng = torch.Generator().manual_seed(seed)
    ratio = (torch.randn(size, generator=rng) * 0.3).exp()
    ratio[:40] = 1.0
    ratio[40:80] = torch.tensor([0.8, 0.9, 1.2, 1.28] * 10)
    ratio[80:84] = torch.tensor([1e-3, 40.0, 0.05, 7.0])
    old = -torch.rand(size, generator=rng) * 3
    advantages = torch.randn(size, generator=rng) * (torch.rand(size, generator=rng) > 0.3)
    # A log-ratio that exp brings back to these values, as far as float32 does.
    return [old + ratio.log(), old, advantages, torch.rand(size, generator=rng), torch.randn(size, generator=rng)]


def ratio_profile(logprob: torch.Tensor, *given: torch.Tensor, **eps: float) -> RatioProfile:
    """Of one update."""
    (profile,) = ratio_profiles(logprob, *given, torch.zeros(len(logprob), dtype=torch.long), 1, **eps)
    return profile


def profile_and_ledger(
    seed: int, run_eps: tuple[float, float], asked: tuple[float, float]
) -> tuple[WhatIf, EntropyLedger, RatioProfile]:
    given, weight = tokens(seed), torch.rand(400, generator=torch.Generator().manual_seed(seed))
    profile = ratio_profile(*given, weight, eps_low=run_eps[0], eps_high=run_eps[1])
    mask = torch.ones(400, dtype=torch.bool)
    ledger = entropy_ledger(*given, mask, eps_low=asked[0], eps_high=asked[1], weight=weight)
    return what_if(profile.columns(), eps_low=asked[0], eps_high=asked[1]), ledger, profile


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([*LOW, 1.0]), st.sampled_from([*HIGH, math.inf]))
def test_at_every_fixed_edge_what_if_is_the_ledger(seed: int, low: float, high: float) -> None:
    found, ledger, _ = profile_and_ledger(seed, (0.13, 0.77), (low, high))
    assert not found.interpolated
    check(found, ledger)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 3))
def test_at_the_epsilons_in_force_what_if_is_the_ledger(seed: int, low: float, high: float) -> None:
    found, ledger, _ = profile_and_ledger(seed, (low, high), (low, high))
    assert not found.interpolated
    check(found, ledger)


def check(found: WhatIf, ledger: EntropyLedger) -> None:
    for ours, theirs in ((found.pg, ledger.pg), (found.npg, ledger.npg)):
        scale = abs(theirs.reward) + abs(theirs.clip_low) + abs(theirs.clip_high)
        for name in ("reward", "clip_low", "clip_high", "total"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9, abs=1e-12 * scale + 1e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.137, 1.0]), st.sampled_from([0.0, 0.2, 0.3333, math.inf]))
def test_the_sums_of_an_update_are_the_ledger_and_the_counts_of_its_tokens(seed: int, low: float, high: float) -> None:
    """Against `entropy_ledger` and `clipped_surrogate`, token by token."""
    given, weight = tokens(seed), torch.rand(400, generator=torch.Generator().manual_seed(seed)).double()
    logprob, old, advantages, entropy, expected_q = given
    mask, eps = torch.ones(400, dtype=torch.bool), {"eps_low": low, "eps_high": high}
    (sums,) = PolicyLoss("clip", low, high).sums(
        [0.0], [UpdateTokens(logprob, entropy, expected_q, old, advantages.double(), weight)]
    )
    counts = clipped_surrogate(logprob, old, advantages, mask, **eps)[1]
    for name in ("tokens", "tokens_advantage", "clip_low", "clip_high", "ratio_low", "ratio_high"):
        assert getattr(sums.counts, name) == int(getattr(counts, name)), name
    ledger = entropy_ledger(*given, mask, **eps, weight=weight)
    for name in ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg"):
        assert getattr(sums.ledger, name) == pytest.approx(getattr(ledger, name), rel=1e-9, abs=1e-12)
    check(WhatIf(0, 0, 0, 0, 0, sums.ledger.pg, sums.ledger.npg, False), ledger)
    assert sums.ratio == pytest.approx(float(counts.ratio_sum), rel=1e-6)
    assert math.exp(sums.log_ratio_min) == pytest.approx(float(counts.ratio_min), rel=1e-5)
    assert math.exp(sums.log_ratio_max) == pytest.approx(float(counts.ratio_max), rel=1e-5)
    log_ratio = (logprob - old).double().numpy()
    assert sums.kl == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).sum(), rel=1e-9)
    assert sums.entropy == pytest.approx(float(entropy.double().sum()), rel=1e-9)


def test_profiles_of_parts_add_up() -> None:
    given, weight = tokens(1), torch.rand(400, generator=torch.Generator().manual_seed(1))
    eps = {"eps_low": 0.13, "eps_high": 0.3}
    whole = ratio_profile(*given, weight, **eps)
    parts = [ratio_profile(*(t[at] for t in given), weight[at], **eps) for at in torch.arange(400).tensor_split(3)]
    total = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(total.sums_3BC, whole.sums_3BC, rtol=1e-12, atol=1e-12)
    assert int(whole.sums_3BC[:, :, 0].sum()) == 400
    assert int(whole.columns()["tokens"].sum()) == 400


@pytest.mark.parametrize("eps", [(0.1, 0.1), (0.137, 0.0731), (0.05, math.inf), (1.0, 0.06)])
def test_after_a_run_what_if_reproduces_the_recorded_terms(tmp_path: Path, eps: tuple[float, float]) -> None:
    overrides = {"run.steps": 2, "rollout.prompts": 16, "clip.low": eps[0], "clip.high": eps[1], "optim.lr": 3e-4}
    folder = train(load_spec("tiny", overrides), runs_dir=tmp_path)
    with open_runs(folder) as runs:
        stored = runs.sql("select * from updates order by rollout, inner_step").to_arrow_table().to_pylist()
        bins = runs.sql("select * from histograms").fetchnumpy()
    assert sum(row["clip_low"] + row["clip_high"] for row in stored) > 0
    for row in stored:
        mine = (bins["rollout"] == row["rollout"]) & (bins["inner_step"] == row["inner_step"])
        found = what_if({name: values[mine] for name, values in bins.items()}, eps_low=eps[0], eps_high=eps[1])
        assert not found.interpolated
        assert (found.tokens, found.clip_low, found.clip_high) == (row["tokens"], row["clip_low"], row["clip_high"])
        assert (found.ratio_low, found.ratio_high) == (row["ratio_low"], row["ratio_high"])
        for algorithm, pull in (("pg", found.pg), ("npg", found.npg)):
            size = sum(abs(row[f"{algorithm}_{term}"]) for term in ("reward", "clip_low", "clip_high"))
            for term in ("reward", "clip_low", "clip_high", "total"):
                assert getattr(pull, term) == pytest.approx(row[f"{algorithm}_{term}"], rel=1e-6, abs=1e-9 * size)


def test_the_view_is_what_numpy_makes_of_every_token_of_the_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the store and its sums, at ε that no run used: each token's own r, A, w, H and E[Q], and the definitions."""
    seen: list[dict[str, np.ndarray]] = []
    sums = PolicyLoss.sums

    def recorded(self: PolicyLoss, losses: Any, batches: Any) -> Any:
        seen.extend({name: getattr(part, name).numpy() for name in UpdateTokens.__slots__} for part in batches)
        return sums(self, losses, batches)

    monkeypatch.setattr(PolicyLoss, "sums", recorded)
    overrides = {"run.steps": 2, "rollout.prompts": 16, "clip.low": 0.137, "clip.high": 0.0731, "optim.lr": 1e-3}
    folder = train(load_spec("tiny", overrides), runs_dir=tmp_path)
    raw = {name: np.concatenate([part[name] for part in seen]) for name in UpdateTokens.__slots__}
    logprob, entropy = raw["logprob_T"].astype(float), raw["entropy_T"].astype(float)
    ratio_32 = np.exp(raw["logprob_T"] - raw["old_logprob_T"])
    sign = np.sign(raw["advantages_T"])
    pulls = {
        "pg": raw["expected_q_T"] - np.exp(logprob) * (logprob + entropy),
        "npg": -logprob - entropy,
    }
    weight = raw["weights_T"] * raw["advantages_T"] * np.exp(logprob - raw["old_logprob_T"].astype(float))
    grid = ["clip.low=0.137,0.02,0.1,1", "clip.high=0.0731,0.01,0.28,inf"]
    with open_runs(folder) as runs:
        found = what_if_view(runs, Options(grid=grid)).table.to_pylist()
    assert len(found) == 16
    assert [row["note"] for row in found] == ["as run"] + ["first order"] * 15
    for row in found:
        low = (sign < 0) & (ratio_32 < np.float32(1 - row["eps_low"]))
        high = (sign > 0) & (ratio_32 > np.float32(1 + row["eps_high"]))
        assert (low.any(), high.any()) == (row["eps_low"] < 1, row["eps_high"] < math.inf)
        assert row["clip_low_percent"] == pytest.approx(100 * low.mean(), rel=1e-12)
        assert row["clip_high_percent"] == pytest.approx(100 * high.mean(), rel=1e-12)
        for algorithm, pull in pulls.items():
            terms = weight * pull
            wanted = {"reward": terms.sum(), "clip_low": -terms[low].sum(), "clip_high": -terms[high].sum()}
            wanted["total"] = terms[~(low | high)].sum()
            for term, value in wanted.items():
                assert row[f"{algorithm}_{term}"] == pytest.approx(value, rel=1e-9, abs=1e-12 * np.abs(terms).sum())
