"""GRPO's pure functions against numbers worked out by hand, enumeration, and what must not change them."""

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipctl import algo
from clipctl.algo import (
    AGGREGATIONS,
    OBJECTIVES,
    ClipCounts,
    clipped_objective,
    clipped_surrogate,
    expected_zero_advantage_share,
    group_advantages,
    loss_weights,
    overlong_penalty,
    pass_at_k,
    reinforce_objective,
    zero_advantage_groups,
)
from clipctl.spec import Loss

RATIOS = [0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 1.6, 1.7]
"""With ε = 0.2 / 0.3: two below, three inside, three above; 0.75 and 1.25 change sides when the two ε are swapped."""
ADVANTAGES = [2.0, -1.0, 0.0]
COUNTS = ["clip_low", "clip_high", "ratio_low", "ratio_high", "tokens", "tokens_advantage"]


def surrogate(
    ratios: list[list[float]],
    advantages: list[list[float]],
    eps_low: float,
    eps_high: float,
    objective: str = "clip",
) -> tuple[Tensor, Tensor, ClipCounts]:
    """Objective, its gradient by log π, and counts; log π_old is -2."""
    logprob = (torch.tensor(ratios, dtype=torch.float64).log() - 2).requires_grad_()
    mask = torch.ones(logprob.shape, dtype=torch.bool)
    eps = {"eps_low": eps_low, "eps_high": eps_high}
    given = (logprob, torch.full_like(logprob, -2.0), torch.tensor(advantages, dtype=torch.float64))
    value, counts = clipped_surrogate(*given, mask, **eps)
    alone = OBJECTIVES[objective](*given, **eps)
    if objective == "clip":
        assert torch.equal(alone, value)
    value = alone
    value.sum().backward()
    assert logprob.grad is not None
    return value.detach(), logprob.grad, counts


def every_side_and_sign(eps_low: float, eps_high: float, objective: str = "clip") -> tuple[Tensor, Tensor, ClipCounts]:
    return surrogate([RATIOS] * 3, [[a] for a in ADVANTAGES], eps_low, eps_high, objective)


def numbers(counts: ClipCounts) -> list[int]:
    return [int(getattr(counts, name)) for name in COUNTS]


def close(actual: Tensor, expected: object, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=1e-14)


# Advantages


def test_the_advantage_is_centred_within_its_group_and_not_scaled() -> None:
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5], [-1, 3, 0, 6]], dtype=torch.float32)
    advantages = group_advantages(rewards)
    assert advantages.dtype == torch.float64
    close(advantages, [[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75], [0, 0, 0, 0], [-3, 1, -2, 4]])


def test_rewards_equal_up_to_float_noise_have_advantage_exactly_0_and_others_do_not() -> None:
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [0.1, 0.1, 0.1], [0.3, 0.3, 0.3 + 1e-7]], dtype=torch.float64)
    assert 0.1 + 0.2 != 0.3
    advantages = group_advantages(rewards)
    assert torch.equal(advantages[:2], torch.zeros(2, 3, dtype=torch.float64))
    close(advantages[2], [-1e-7 / 3, -1e-7 / 3, 2e-7 / 3], rtol=1e-6)
    assert zero_advantage_groups(rewards).tolist() == [True, True, False]


def test_float32_rewards_are_centred_in_float64() -> None:
    rewards = torch.tensor([[16777216.0, 1.0, 0.0]])
    close(group_advantages(rewards), [[16777216 - 16777217 / 3, 1 - 16777217 / 3, -16777217 / 3]])


def test_a_reward_that_is_not_finite_is_not_hidden() -> None:
    rewards = torch.tensor([[math.inf, 0.0], [math.nan, 1.0], [1.0, 0.0]])
    assert group_advantages(rewards).isfinite().all(1).tolist() == [False, False, True]


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 6), st.floats(-5, 5))
def test_advantages_sum_to_0_and_ignore_a_shift_of_one_group(seed: int, prompts: int, group: int, shift: float) -> None:
    rewards = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (prompts, group)).astype(float))
    advantages = group_advantages(rewards)
    assert advantages.sum(1).abs().max() < 1e-12
    shifted = rewards.clone()
    shifted[0] += shift
    torch.testing.assert_close(group_advantages(shifted), advantages, rtol=0, atol=1e-12)


# The clipped surrogate


def test_objective_gradient_and_counts_for_every_sign_and_side() -> None:
    value, gradient, counts = every_side_and_sign(0.2, 0.3)
    close(value[0], [1.0, 1.5, 1.8, 2.0, 2.5, 2.6, 2.6, 2.6])
    close(value[1], [-0.8, -0.8, -0.9, -1.0, -1.25, -1.5, -1.6, -1.7])
    close(gradient[0], [1.0, 1.5, 1.8, 2.0, 2.5, 0.0, 0.0, 0.0])
    close(gradient[1], [0.0, 0.0, -0.9, -1.0, -1.25, -1.5, -1.6, -1.7])
    assert torch.equal(value[2], torch.zeros(8, dtype=torch.float64))
    assert torch.equal(gradient[2], torch.zeros(8, dtype=torch.float64))
    assert gradient[0, 5:].tolist() == [0.0] * 3
    assert gradient[1, :2].tolist() == [0.0] * 2
    assert numbers(counts) == [2, 3, 6, 9, 24, 16]
    assert float(counts.ratio_min) == pytest.approx(0.5)
    assert float(counts.ratio_max) == pytest.approx(1.7)
    assert float(counts.ratio_sum) == pytest.approx(3 * 9.2)


def test_swapping_the_two_eps_is_another_objective() -> None:
    value, gradient, counts = every_side_and_sign(0.3, 0.2)
    close(value[0], [1.0, 1.5, 1.8, 2.0, 2.4, 2.4, 2.4, 2.4])
    close(value[1], [-0.7, -0.75, -0.9, -1.0, -1.25, -1.5, -1.6, -1.7])
    assert (gradient[0] == 0).tolist() == [False] * 4 + [True] * 4
    assert (gradient[1] == 0).tolist() == [True] + [False] * 7
    assert numbers(counts) == [1, 4, 3, 12, 24, 16]


def test_clip_high_off() -> None:
    value, gradient, counts = every_side_and_sign(0.2, math.inf)
    close(value[0], [2 * r for r in RATIOS])
    close(gradient[0], [2 * r for r in RATIOS])
    close(value[1], [-0.8, -0.8, -0.9, -1.0, -1.25, -1.5, -1.6, -1.7])
    assert numbers(counts) == [2, 0, 6, 0, 24, 16]


def test_clip_low_off() -> None:
    value, gradient, counts = every_side_and_sign(1.0, 0.3)
    close(value[1], [-r for r in RATIOS])
    close(gradient[1], [-r for r in RATIOS])
    close(value[0], [1.0, 1.5, 1.8, 2.0, 2.5, 2.6, 2.6, 2.6])
    assert numbers(counts) == [0, 3, 0, 9, 24, 16]


def test_eps_0_clips_at_once_but_never_at_ratio_1() -> None:
    value, gradient, counts = every_side_and_sign(0.0, 0.0)
    close(value[0], [1.0, 1.5, 1.8, 2, 2, 2, 2, 2])
    close(value[1], [-1, -1, -1, -1, -1.25, -1.5, -1.6, -1.7])
    assert gradient[:, 3].tolist() == ADVANTAGES
    assert numbers(counts) == [3, 4, 9, 12, 24, 16]


@pytest.mark.parametrize(("eps_low", "eps_high"), [(0.2, 0.3), (1.0, 0.1), (0.1, math.inf), (0.0, 0.0)])
def test_it_is_the_minimum_of_its_definition(eps_low: float, eps_high: float) -> None:
    rng = np.random.default_rng(1)
    ratio, advantage = np.exp(rng.normal(0, 0.4, (5, 40))), rng.choice([-1.5, -0.1, 0.0, 0.3, 2.0], (5, 40))
    expected = np.minimum(ratio * advantage, np.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage)
    value, _, counts = surrogate(ratio.tolist(), advantage.tolist(), eps_low, eps_high)
    close(value, expected)
    active = ((ratio < 1 - eps_low) & (advantage < 0)).sum(), ((ratio > 1 + eps_high) & (advantage > 0)).sum()
    assert (int(counts.clip_low), int(counts.clip_high)) == active


def test_reinforce_is_the_advantage_times_the_log_prob_and_clips_nothing() -> None:
    value, gradient, _ = every_side_and_sign(0.2, 0.3, "reinforce")
    close(value[0], [2 * (math.log(r) - 2) for r in RATIOS])
    close(value[1], [2 - math.log(r) for r in RATIOS])
    close(gradient, [[a] * 8 for a in ADVANTAGES])


def test_at_ratio_1_the_surrogates_gradient_is_reinforces() -> None:
    advantages = [[0.75, -0.25, 0.0, 3.0, -2.0]]
    _, clip, _ = surrogate([[1.0] * 5], advantages, 0.2, 0.3)
    _, reinforce, _ = surrogate([[1.0] * 5], advantages, 0.2, 0.3, "reinforce")
    assert torch.equal(clip, reinforce)
    close(clip, advantages)


def test_only_the_log_prob_gets_a_gradient() -> None:
    logprob, old, advantages = (torch.tensor([-1.0, -2.0, -0.5], requires_grad=True) for _ in range(3))
    mask = torch.ones(3, dtype=torch.bool)
    value, counts = clipped_surrogate(logprob, old, advantages, mask, eps_low=0.2, eps_high=0.2)
    assert not any(getattr(counts, name).requires_grad for name in ClipCounts.__slots__)
    value.sum().backward()
    for objective in OBJECTIVES.values():
        objective(logprob, old, advantages, eps_low=0.2, eps_high=0.2).sum().backward()
    assert logprob.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_advantages_and_masks_of_responses_broadcast_over_their_tokens() -> None:
    rng = torch.Generator().manual_seed(0)
    logprob, old = torch.randn(3, 5, generator=rng), torch.randn(3, 5, generator=rng)
    advantages, mask = torch.tensor([[1.0], [0.0], [-2.0]]), torch.tensor([[True], [True], [False]])
    function = clipped_surrogate
    narrow = function(logprob, old, advantages, mask, eps_low=0.1, eps_high=0.2)
    flat = function(
        logprob.flatten(),
        old.flatten(),
        advantages.expand(3, 5).flatten(),
        mask.expand(3, 5).flatten(),
        eps_low=0.1,
        eps_high=0.2,
    )
    assert torch.equal(narrow[0].flatten(), flat[0])
    assert narrow[1] == flat[1]
    assert int(narrow[1].tokens) == 10
    assert int(narrow[1].tokens_advantage) == 5


def test_an_empty_mask_counts_nothing() -> None:
    for size in (0, 4):
        zeros = torch.zeros(size)
        value, counts = clipped_surrogate(zeros, zeros, zeros, zeros.bool(), eps_low=0.0, eps_high=0.0)
        assert torch.equal(value, zeros)
        assert numbers(counts) == [0] * 6
        assert (float(counts.ratio_min), float(counts.ratio_max), float(counts.ratio_sum)) == (math.inf, -math.inf, 0.0)


def test_an_overflowing_ratio_makes_no_nan_where_it_is_clipped_or_has_no_advantage() -> None:
    logprob = torch.tensor([-0.1, -0.1, -300.0], requires_grad=True)
    old = torch.tensor([-300.0, -300.0, -0.1])
    advantages, mask = torch.tensor([1.0, 0.0, -1.0]), torch.ones(3, dtype=torch.bool)
    value, counts = clipped_surrogate(logprob, old, advantages, mask, eps_low=0.25, eps_high=0.5)
    value.sum().backward()
    assert value.tolist() == [1.5, 0.0, -0.75]
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [0.0, 0.0, 0.0]
    assert numbers(counts) == [1, 1, 1, 2, 3, 2]
    assert float(counts.ratio_max) == math.inf


def test_a_log_prob_that_is_not_finite_is_not_hidden() -> None:
    logprob = torch.tensor([math.nan, -1.0])
    value, counts = clipped_surrogate(
        logprob, torch.tensor([-1.0, -1.0]), torch.ones(2), torch.ones(2, dtype=torch.bool), eps_low=0.2, eps_high=0.2
    )
    assert value.isnan().tolist() == [True, False]
    assert math.isnan(float(counts.ratio_sum))


GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0])


@given(st.integers(0, 10**6), st.lists(GARBAGE, min_size=3, max_size=3))
def test_what_lies_outside_the_mask_never_matters(seed: int, garbage: list[float]) -> None:
    rng = torch.Generator().manual_seed(seed)
    logprob, old, advantages = (torch.randn(4, 6, generator=rng) for _ in range(3))
    mask = torch.rand(4, 6, generator=rng) < 0.6
    results = []
    for junk in (garbage, [0.0, 0.0, 0.0]):
        inputs = [torch.where(mask, t, g) for t, g in zip((logprob, old, advantages), junk, strict=True)]
        inputs[0].requires_grad_()
        value, counts = clipped_surrogate(*inputs, mask, eps_low=0.3, eps_high=0.4)
        value.sum().backward()
        results.append((value.detach(), inputs[0].grad, counts))
    (value, gradient, counts), (clean_value, clean_gradient, clean_counts) = results
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert counts == clean_counts
    assert bool((value[~mask] == 0).all())
    assert int(counts.tokens) == int(mask.sum())


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7]))
def test_any_split_of_a_batch_has_the_same_sums(seed: int, parts: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logprob, old, advantages = (torch.randn(23, generator=rng, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(23, generator=rng) < 0.8
    function: Callable[..., tuple[Tensor, ClipCounts]] = clipped_surrogate
    whole, counts = function(logprob, old, advantages, mask, eps_low=0.2, eps_high=0.5)
    split = [
        function(*piece, eps_low=0.2, eps_high=0.5)
        for piece in zip(*(tensor.tensor_split(parts) for tensor in (logprob, old, advantages, mask)), strict=True)
    ]
    total = split[0][1]
    for _, part in split[1:]:
        total = total + part
    assert float(sum(value.sum() for value, _ in split)) == pytest.approx(float(whole.sum()), rel=1e-12, abs=1e-12)
    assert numbers(total) == numbers(counts)
    assert float(total.ratio_min) == float(counts.ratio_min)
    assert float(total.ratio_max) == float(counts.ratio_max)
    assert float(total.ratio_sum) == pytest.approx(float(counts.ratio_sum), rel=1e-12)


def test_counts_add_up_field_by_field() -> None:
    first = ClipCounts(*(torch.tensor(float(n)) for n in range(1, 10)))
    second = ClipCounts(*(torch.tensor(float(10 * n)) for n in range(1, 10)))
    total = first + second
    expected = [11, 22, 33, 44, 55, 66, 7, 80, 99]
    assert [float(getattr(total, name)) for name in ClipCounts.__slots__] == expected


# Loss weights


def test_the_weight_of_each_responses_tokens() -> None:
    lengths = torch.tensor([2, 3, 5])
    close(loss_weights(lengths, "token_mean", 4), [0.1, 0.1, 0.1])
    close(loss_weights(lengths, "sequence_mean", 4), [1 / 6, 1 / 9, 1 / 15])
    close(loss_weights(lengths, "constant", 4), [1 / 12, 1 / 12, 1 / 12])
    assert all(loss_weights(lengths, name, 4).dtype == torch.float64 for name in AGGREGATIONS)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_the_means_weights_sum_to_1_over_all_tokens(lengths: list[int]) -> None:
    lengths_R = torch.tensor(lengths)
    for name in ("token_mean", "sequence_mean"):
        assert float((loss_weights(lengths_R, name, 7) * lengths_R).sum()) == pytest.approx(1, rel=1e-12)


def test_the_spec_and_the_registries_have_the_same_names() -> None:
    assert set(get_args(Loss.model_fields["objective"].annotation)) == set(OBJECTIVES)
    assert set(get_args(Loss.model_fields["aggregation"].annotation)) == set(AGGREGATIONS)
    assert OBJECTIVES["clip"] is clipped_objective
    assert OBJECTIVES["reinforce"] is reinforce_objective


# The overlong penalty


def test_the_overlong_penalty_is_linear_over_the_buffer() -> None:
    lengths = torch.tensor([[1, 6, 7], [8, 10, 11]])
    close(overlong_penalty(lengths, max_tokens=10, buffer=4, penalty=0.5), [[0, 0, -0.125], [-0.25, -0.5, -0.5]])
    close(overlong_penalty(lengths, max_tokens=10, buffer=0, penalty=0.5), [[0, 0, 0], [0, 0, 0]])
    close(overlong_penalty(lengths, max_tokens=10, buffer=10, penalty=1.0), [[-0.1, -0.6, -0.7], [-0.8, -1.0, -1.0]])


def test_the_dapo_presets_penalty() -> None:
    lengths = torch.tensor([3072, 3073, 3584, 4096])
    close(overlong_penalty(lengths, max_tokens=4096, buffer=1024, penalty=1.0), [0, -1 / 1024, -0.5, -1])


# Zero-advantage groups


def test_zero_advantage_groups_are_those_of_equal_rewards() -> None:
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 1], [0, 0, 0], [-1, 1, -1], [0.25, 0.25, 0.25]])
    assert zero_advantage_groups(rewards).tolist() == [True, False, True, False, True]


def test_the_expected_share_pinned() -> None:
    assert expected_zero_advantage_share("bernoulli", 0.5, 8) == pytest.approx(2 / 256, rel=1e-12)
    assert expected_zero_advantage_share("bernoulli", 0.3, 4) == pytest.approx(0.0081 + 0.2401, rel=1e-12)
    assert expected_zero_advantage_share("bernoulli", 0.7, 3) == pytest.approx(0.343 + 0.027, rel=1e-12)
    assert expected_zero_advantage_share("rademacher", 0.3, 4) == 0.125
    assert expected_zero_advantage_share("normal", 0.5, 2) == 0.0
    assert expected_zero_advantage_share("uniform", 0.5, 2) == 0.0
    with pytest.raises(ValueError, match="'gsm8k' is not a random reward"):
        expected_zero_advantage_share("gsm8k", 0.5, 8)


@pytest.mark.parametrize(
    ("kind", "low", "p"), [("bernoulli", 0.0, 0.3), ("bernoulli", 0.0, 1.0), ("rademacher", -1.0, 0.5)]
)
def test_the_expected_share_is_that_of_all_groups_enumerated(kind: str, low: float, p: float) -> None:
    groups = torch.tensor(list(itertools.product([low, 1.0], repeat=5)))
    ups = (groups == 1.0).sum(1)
    chance = p ** ups.double() * (1 - p) ** (5 - ups).double()
    share = float(chance[zero_advantage_groups(groups)].sum())
    assert expected_zero_advantage_share(kind, p, 5) == pytest.approx(share, rel=1e-12)


# pass@k


def test_pass_at_k_pinned() -> None:
    assert pass_at_k(8, 2, 4) == pytest.approx(1 - 15 / 70, rel=1e-15)
    assert pass_at_k(8, 1, 8) == 1.0
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 5, 1) == 0.625
    assert pass_at_k(8, 5, 4) == 1.0
    assert pass_at_k(10000, 1, 5000) == 0.5
    assert pass_at_k(10**6, 1, 1) == 1e-6


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(sample < correct for sample in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, correct, k) == pytest.approx(share, rel=1e-14)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (8, 2, 9, "k = 9: it must be from 1 to num_samples = 8"),
        (8, 2, 0, "k = 0: it must be from 1 to num_samples = 8"),
        (8, 9, 4, "num_correct = 9: it must be from 0 to num_samples = 8"),
        (8, -1, 4, "num_correct = -1: it must be from 0 to num_samples = 8"),
        (0, 0, 1, "k = 1: it must be from 1 to num_samples = 0"),
    ],
)
def test_pass_at_k_of_impossible_numbers(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_truncated_importance_is_the_ratio_up_to_its_cap() -> None:
    ratios = algo.truncated_importance(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0]), cap=1.4)
    np.testing.assert_allclose(ratios, [1.4, 1.0, math.exp(-1.0)], rtol=1e-12)
    assert ratios.dtype == torch.float64


def test_the_public_functions_are_importable_from_the_package() -> None:
    import clipctl

    for name in ("group_advantages", "clipped_surrogate", "ClipCounts", "pass_at_k"):
        assert getattr(clipctl, name) is getattr(algo, name)
