"""The torch sampler against transformers without a cache, and against the distribution it should draw from."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, random_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipctl.engine import attention, torch_sampler
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.torch_sampler import TorchSampler, draw_tokens, nucleus
from clipctl.rollout import Completion, DrawKey, Prompt, SamplingParams

PROMPTS = [[5, 7, 9], [11], [3, 2, 1, 8, 6, 4, 20], [30, 31], [12, 13, 14, 15]]
STOPS = frozenset(range(0, VOCABULARY, 12))


def prompts(order: list[int] | None = None) -> list[Prompt]:
    return [Prompt(PROMPTS[at], DrawKey(seed=1, rollout=2, position=at)) for at in order or range(len(PROMPTS))]


def params(temperature: float = 1.0, top_p: float = 1.0, max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens, temperature, top_p, STOPS)


def groups_of(sampler: TorchSampler, prompts: list[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
    """In the order of the prompts."""
    found = dict(sampler.sample(prompts, n, params))
    return [found[place] for place in range(len(prompts))]


@pytest.fixture(scope="module")
def model() -> Any:
    return use_grouped_attention(random_llama())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_logprobs_are_those_of_the_whole_text_without_a_cache(temperature: float) -> None:
    reference = random_llama()
    model = use_grouped_attention(random_llama())
    for prompt, group in zip(
        prompts(), groups_of(TorchSampler(model, 64), prompts(), 3, params(temperature)), strict=True
    ):
        for completion in group:
            text = prompt.token_ids + completion.token_ids
            logits = reference(torch.tensor([text])).logits[0].double() / temperature
            expected = torch.log_softmax(logits, -1)[
                range(len(prompt.token_ids) - 1, len(text) - 1), completion.token_ids
            ]
            np.testing.assert_allclose(completion.logprobs, expected.detach().numpy(), atol=2e-5)


def test_a_response_ends_with_its_stop_token_or_at_the_maximum(model: Any) -> None:
    completions = [c for group in groups_of(TorchSampler(model, 64), prompts(), 8, params()) for c in group]
    assert {completion.finish for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert not STOPS & set(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in STOPS) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.token_ids) == 24


@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_draws_do_not_depend_on_waves_or_order(model: Any, rows: int) -> None:
    tokens = [[c.token_ids for c in group] for group in groups_of(TorchSampler(model, 64), prompts(), 4, params())]
    order = [3, 0, 4]
    again = groups_of(TorchSampler(model, rows), prompts(order), 4, params())
    assert [[c.token_ids for c in group] for group in again] == [tokens[at] for at in order]


@pytest.mark.parametrize("done", [{3}, {0, 1, 4}, {1, 2, 3}, {0, 1, 2, 3, 4}])
def test_what_is_done_changes_nothing_of_the_rest(model: Any, done: set[int]) -> None:
    """Bit for bit, log-probabilities too, whichever part of a wave is done; waves of 2 prompts."""
    whole = dict(TorchSampler(model, 8).sample(prompts(), 4, params()))
    rest = dict(TorchSampler(model, 8).sample(prompts(), 4, params(), done=done))
    assert rest == {place: group for place, group in whole.items() if place not in done}


def test_groups_come_wave_by_wave_and_finished_waves_are_not_decoded_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[list[int]] = []
    real = TorchSampler._decode

    def note(self: TorchSampler, prompts: Any, n: int, params: SamplingParams) -> Any:
        decoded.append([prompt.key.position for prompt in prompts])
        return real(self, prompts, n, params)

    monkeypatch.setattr(TorchSampler, "_decode", note)
    stream = TorchSampler(model, 8).sample(prompts(), 4, params(), done={1, 3})
    assert [next(stream)[0], len(decoded)] == [0, 1]
    assert decoded == [[0, 4]]  # the wave of 1 and 3, the shortest prompts, is done
    assert [place for place, _ in stream] == [4, 2]


def test_temperature_0_takes_the_likeliest_token(model: Any) -> None:
    reference = random_llama()
    for prompt, group in zip(prompts(), groups_of(TorchSampler(model, 64), prompts(), 1, params(0.0)), strict=True):
        text = prompt.token_ids + group[0].token_ids
        likeliest = reference(torch.tensor([text])).logits[0].argmax(-1).tolist()
        assert group[0].token_ids == likeliest[len(prompt.token_ids) - 1 : -1]
        assert set(group[0].logprobs) == {0.0}


def test_samples_of_a_group_and_of_other_rollouts_differ(model: Any) -> None:
    sampler = TorchSampler(model, 64)
    group = groups_of(sampler, prompts([2]), 8, params())[0]
    other = groups_of(sampler, [Prompt(PROMPTS[2], DrawKey(1, 3, 2))], 8, params())[0]
    assert len({tuple(completion.token_ids) for completion in group}) == 8
    assert all(a.token_ids != b.token_ids for a, b in zip(group, other, strict=True))


def test_first_tokens_follow_the_policy(model: Any) -> None:
    """Chi-square over the first token of 4000 samples; 5 standard deviations of its law is the bound."""
    n = 4000
    group = groups_of(TorchSampler(model, n), prompts([1]), n, params(max_tokens=1))[0]
    counts = np.bincount([completion.token_ids[0] for completion in group], minlength=VOCABULARY)
    with torch.no_grad():
        expected = n * torch.softmax(random_llama()(torch.tensor([PROMPTS[1]])).logits[0, -1].double(), -1).numpy()
    large = expected >= 5
    seen, wanted = [*counts[large], counts[~large].sum()], [*expected[large], expected[~large].sum()]
    statistic = sum((a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True))
    freedom = len(seen) - 1
    assert freedom > 20
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(0.0, 1.0, exclude_max=True), st.floats(0.2, 9.0))
def test_drawing_inverts_the_cumulative_distribution(seed: int, vocabulary: int, uniform: float, scale: float) -> None:
    """The drawn token is where the float64 cumulative sum passes the uniform number, up to float32 rounding."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    token, logprob = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64))
    probability = torch.softmax(logits[0].double(), -1)
    cumulative = probability.cumsum(-1)
    at = int(token)
    assert cumulative[at] - probability[at] - 1e-6 <= uniform <= cumulative[at] + 1e-6
    assert math.isclose(float(logprob), float(probability[at].log()), abs_tol=1e-4)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, 300] = 0.0
    token, logprob = draw_tokens(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [300] * 3
    assert logprob.tolist() == [0.0] * 3


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logprob = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert nucleus(logprob, 0.65).isinf().tolist() == [[True, False, True, False]]
    assert nucleus(logprob, 0.75).isinf().tolist() == [[True, False, False, False]]
    token, renormalised = draw_tokens(logprob, torch.tensor([0.99], dtype=torch.float64), top_p=0.65)
    assert int(token) == 3
    assert math.isclose(float(renormalised), math.log(0.3 / 0.7), abs_tol=1e-6)


def test_weights_of_another_model_are_taken_over(model: Any) -> None:
    own, other = use_grouped_attention(random_llama()), random_llama(seed=5)
    sampler = TorchSampler(own, 64)
    before = groups_of(sampler, prompts(), 2, params())
    sampler.update_weights(other.named_parameters(), version=1)
    expected = groups_of(TorchSampler(use_grouped_attention(other), 64), prompts(), 2, params())
    assert groups_of(sampler, prompts(), 2, params()) == expected
    assert before != expected


def test_on_a_gpu_one_looks_less_often_at_who_has_finished(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that stopped between two looks go on unseen; the same is drawn, also when the last look is past the end."""
    whole = groups_of(TorchSampler(model, 64), prompts(), 8, params())
    for every in (7, 1000):
        monkeypatch.setitem(torch_sampler.LOOK_EVERY, "cpu", every)
        seldom = groups_of(TorchSampler(model, 64), prompts(), 8, params())
        for mine, theirs in zip(seldom, whole, strict=True):
            assert [(c.token_ids, c.finish) for c in mine] == [(c.token_ids, c.finish) for c in theirs]
            for ours, other in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(ours.logprobs, other.logprobs, atol=2e-5)


def test_repeated_keys_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU's kernels that take no groups are given, against grouped keys, with a mask and causal."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 9, 9) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    for given_mask in (None, mask):
        grouped, _ = attention.grouped_attention(nn.Identity(), query, key, value, given_mask)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "repeats_keys", lambda *_: True)
            repeated, _ = attention.grouped_attention(nn.Identity(), query, key, value, given_mask)
        torch.testing.assert_close(repeated, grouped)
    on_gpu = query.to("meta")
    assert attention.repeats_keys(on_gpu, None)
    assert attention.repeats_keys(on_gpu.bfloat16(), mask)
    assert not attention.repeats_keys(on_gpu.bfloat16(), None)
    assert not attention.repeats_keys(query, mask)


def test_the_cache_doubles_up_to_what_will_be_needed() -> None:
    layer = attention.ColumnLayer(at_most=300)
    capacities = []
    for columns in (10, 1, 70, 60, 1, 1, 120, 30, 7):
        states = torch.randn(2, 1, columns, 4)
        keys, _ = layer.update(states, states)
        assert torch.equal(keys[:, :, -columns:], states)
        capacities.append(layer.keys.shape[2])
    assert capacities == [74, 74, 148, 148, 148, 148, 300, 300, 300]
    assert layer.get_seq_length() == 300
