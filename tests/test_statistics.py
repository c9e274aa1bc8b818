"""The one-pass statistics against float64, hand-made distributions, autograd, and a limit on memory."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from clipctl import statistics
from clipctl.statistics import CHUNK_ELEMENTS, CHUNK_VOCABULARY, TokenStatistics, float32_logits, token_statistics

FIELDS = TokenStatistics.__slots__
LN2 = math.log(2)
MANY_CHUNKS = (300, 24, 5000)
"""Tokens, hidden size, vocabulary: two chunks of tokens times three of the vocabulary, the last ones partial."""


def random_operands(
    shape: tuple[int, int, int], spread: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets whose logits have standard deviation `spread`; half the targets are likely."""
    tokens, size, vocabulary = shape
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=rng).to(dtype)
    head = (torch.randn(vocabulary, size, generator=rng) * spread / size**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=rng)
    targets[::2] = (hidden[::2].float() @ head.float().T).argmax(1)
    return hidden, head, targets


def reference(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> dict[str, Tensor]:
    """The definitions in float64, of the same rounded operands."""
    logp = torch.log_softmax(hidden.double() @ head.double().T / temperature, 1)
    p = logp.exp()
    entropy = -(p * logp).sum(1)
    return {
        "logprob_T": logp[torch.arange(len(targets)), targets],
        "entropy_T": entropy,
        "sum_p2_T": (p * p).sum(1),
        "sum_p2_logp_T": (p * p * logp).sum(1),
        "expected_q_T": (p * p * (logp + entropy[:, None])).sum(1),
        "scale_T": (p * p * (logp.abs() + entropy[:, None])).sum(1),
    }


def test_distributions_worked_out_by_hand() -> None:
    """Hidden states pick a row of log-probs from the head: (1/2, 1/4, 1/8, 1/8), uniform, and one word for certain."""
    rows = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    head = rows.log().clamp(min=-200).T.contiguous() + 7.0
    statistics = token_statistics(torch.eye(3)[[0, 0, 1, 2]], head, torch.tensor([0, 3, 2, 0]))
    expected = {
        "logprob_T": [-LN2, -3 * LN2, -2 * LN2, 0],
        "entropy_T": [1.75 * LN2, 1.75 * LN2, 2 * LN2, 0],
        "sum_p2_T": [11 / 32, 11 / 32, 1 / 4, 1],
        "sum_p2_logp_T": [-15 / 32 * LN2, -15 / 32 * LN2, -LN2 / 2, 0],
        "expected_q_T": [17 / 128 * LN2, 17 / 128 * LN2, 0, 0],
    }
    for name in FIELDS:
        torch.testing.assert_close(getattr(statistics, name), torch.tensor(expected[name]), rtol=1e-6, atol=2e-7)


def test_the_temperature_divides_the_logits() -> None:
    """z = 2 log p at temperature 2 is p again, and at temperature 1 it is p² ∝ (16, 4, 1, 1)."""
    head = 2 * torch.tensor([[0.5], [0.25], [0.125], [0.125]]).log()
    hidden, targets = torch.ones(1, 1), torch.tensor([1])
    warm = token_statistics(hidden, head, targets, temperature=2.0)
    assert float(warm.logprob_T) == pytest.approx(-2 * LN2, abs=1e-6)
    assert float(warm.entropy_T) == pytest.approx(1.75 * LN2, abs=1e-6)
    cold = token_statistics(hidden, head, targets)
    assert float(cold.logprob_T) == pytest.approx(math.log(4 / 22), abs=1e-6)
    assert float(cold.sum_p2_T) == pytest.approx((256 + 16 + 2) / 22**2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 20.0])
def test_the_error_against_float64(dtype: torch.dtype, temperature: float, spread: float) -> None:
    """Flat to peaked: 1e-4 nat for log π and H, 1e-4 of Σπ²(|log π| + H) for E[Q], 1e-4 of Σπ² for the two sums; 1e-5
    where logits are of ordinary size. log π itself reaches -340 at the largest spread."""
    operands = random_operands(MANY_CHUNKS, spread, dtype)
    statistics = token_statistics(*operands, temperature=temperature)
    exact = reference(*operands, temperature)
    tolerance = 1e-5 if spread <= 4 else 1e-4
    assert all(getattr(statistics, name).dtype == torch.float32 for name in FIELDS)
    for name in ("logprob_T", "entropy_T"):
        assert float((getattr(statistics, name) - exact[name]).abs().max()) < tolerance, name
    assert float(((statistics.expected_q_T - exact["expected_q_T"]) / exact["scale_T"]).abs().max()) < tolerance
    for name in ("sum_p2_T", "sum_p2_logp_T"):
        assert float(((getattr(statistics, name) - exact[name]) / exact["sum_p2_T"]).abs().max()) < tolerance, name


def test_the_spreads_above_reach_from_flat_to_peaked() -> None:
    def entropy(spread: float) -> Tensor:
        return token_statistics(*random_operands(MANY_CHUNKS, spread)).entropy_T

    assert float(entropy(0.01).min()) > math.log(5000) - 1e-3
    assert float(entropy(20.0).median()) < 0.3


def loss_gradients(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden: Tensor,
    head: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
) -> list[Tensor]:
    """Gradients by hidden states and head of Σ a·log π + Σ b·H."""
    leaves = [hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()]
    outputs = function(*leaves)
    loss = sum((w.to(o.dtype) * o).sum() for w, o in zip(weights, outputs, strict=True) if w is not None)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("outputs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("temperature", "shape"), [(0.6, MANY_CHUNKS), (1.0, MANY_CHUNKS), (1.5, (9, 4, 7))])
def test_gradients_of_log_prob_and_entropy_are_those_of_float64(
    outputs: tuple[bool, bool], temperature: float, shape: tuple[int, int, int]
) -> None:
    hidden, head, targets = random_operands(shape, 2.0)
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.randn(len(targets), generator=rng) if used else None for used in outputs)

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        statistics = token_statistics(h, w, targets, temperature=temperature)
        return statistics.logprob_T, statistics.entropy_T

    def exact(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        statistics = reference(h, w, targets, temperature)
        return statistics["logprob_T"], statistics["entropy_T"]

    expected = loss_gradients(exact, hidden.double(), head.double(), (a, b))
    for gradient, wanted in zip(loss_gradients(ours, hidden, head, (a, b)), expected, strict=True):
        assert float((gradient - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())


def test_bfloat16_gradients_are_float32_sums_rounded_once() -> None:
    """Within bfloat16's rounding of the result (2^-8) even for a head row that 300 tokens pull at."""
    hidden, head, targets = random_operands(MANY_CHUNKS, 2.0, torch.bfloat16)
    targets[:] = 17
    weight = torch.ones(len(targets))

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        statistics = token_statistics(h, w, targets)
        return statistics.logprob_T, statistics.entropy_T

    def exact(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        statistics = reference(h, w, targets, 1.0)
        return statistics["logprob_T"], statistics["entropy_T"]

    expected = loss_gradients(exact, hidden.double(), head.double(), (weight, None))
    actual = loss_gradients(ours, hidden, head, (weight, None))
    assert [gradient.dtype for gradient in actual] == [torch.bfloat16] * 2
    for gradient, wanted in zip(actual, expected, strict=True):
        assert float((gradient - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())
    torch.testing.assert_close(actual[1][17].double(), expected[1][17], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_an_operand_without_gradient_gets_none_and_the_other_the_same(which: int) -> None:
    hidden, head, targets = random_operands((40, 8, 30), 2.0)
    both = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    token_statistics(*both, targets).logprob_T.sum().backward()
    one = [hidden.clone(), head.clone()]
    one[which].requires_grad_()
    token_statistics(*one, targets).logprob_T.sum().backward()
    assert one[1 - which].grad is None
    assert torch.equal(one[which].grad, both[which].grad)


def test_only_log_prob_and_entropy_are_differentiable() -> None:
    hidden, head, targets = random_operands((5, 4, 7), 1.0)
    statistics = token_statistics(hidden.requires_grad_(), head, targets)
    differentiable = {name for name in FIELDS if getattr(statistics, name).requires_grad}
    assert differentiable == {"logprob_T", "entropy_T"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same_to_the_bit_and_keeps_nothing(mode: Callable[[], torch.no_grad]) -> None:
    hidden, head, targets = random_operands(MANY_CHUNKS, 2.0)
    hidden.requires_grad_()
    recorded = token_statistics(hidden, head, targets, temperature=1.3)
    with mode():
        plain = token_statistics(hidden, head, targets, temperature=1.3)
    for name in FIELDS:
        assert torch.equal(getattr(plain, name), getattr(recorded, name))
        assert getattr(plain, name).grad_fn is None
    assert recorded.logprob_T.grad_fn is not None


def test_it_is_deterministic_with_its_gradients() -> None:
    hidden, head, targets = random_operands(MANY_CHUNKS, 2.0, torch.bfloat16)

    def once() -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        statistics = token_statistics(*leaves, targets)
        gradients = torch.autograd.grad((statistics.logprob_T + statistics.entropy_T).sum(), leaves)
        return [*(getattr(statistics, name).detach() for name in FIELDS), *gradients]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_how_the_tokens_are_split_up_changes_rounding_only() -> None:
    hidden, head, targets = random_operands(MANY_CHUNKS, 3.0)
    whole = token_statistics(hidden, head, targets)
    pieces = [token_statistics(h, head, t) for h, t in zip(hidden.split(41), targets.split(41), strict=True)]
    for name in FIELDS:
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=3e-6, atol=3e-6)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 40), st.floats(-30, 30))
def test_renaming_the_vocabulary_or_shifting_all_logits_changes_nothing(
    seed: int, tokens: int, vocabulary: int, shift: float
) -> None:
    hidden, head, targets = random_operands((tokens, 5, vocabulary), 2.0, seed=seed)
    before = token_statistics(hidden, head, targets)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    after = token_statistics(
        torch.cat([hidden, torch.ones(tokens, 1)], 1),
        torch.cat([head, torch.full((vocabulary, 1), shift)], 1)[order],
        order.argsort()[targets],
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("vocabulary", [1, 7, 5000])
def test_no_tokens(vocabulary: int) -> None:
    hidden, head = torch.zeros(0, 4, requires_grad=True), torch.ones(vocabulary, 4, requires_grad=True)
    statistics = token_statistics(hidden, head, torch.zeros(0, dtype=torch.long))
    assert all(getattr(statistics, name).shape == (0,) for name in FIELDS)
    statistics.logprob_T.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(head.grad, torch.zeros(vocabulary, 4))


def test_a_vocabulary_of_one_word_is_certain() -> None:
    statistics = token_statistics(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.long))
    assert [float(getattr(statistics, name).abs().sum()) for name in FIELDS] == [0, 0, 3, 0, 0]


@pytest.mark.parametrize("target", [-1, 5000, -100])
def test_a_target_outside_the_vocabulary_is_nan_and_not_a_number_of_another_token(target: int) -> None:
    hidden, head, targets = random_operands(MANY_CHUNKS, 1.0)
    targets[3] = target
    assert token_statistics(hidden, head, targets).logprob_T.isnan().nonzero().flatten().tolist() == [3]


def test_hidden_states_that_are_not_finite_are_not_hidden() -> None:
    hidden, head, targets = random_operands((6, 8, 5000), 1.0)
    hidden[2, 1] = math.nan
    statistics = token_statistics(hidden, head, targets)
    for name in FIELDS:
        assert getattr(statistics, name).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature = {temperature}: it must be above 0 and finite"):
        token_statistics(*random_operands((2, 3, 4), 1.0), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_matmul_precision_is_neither_used_nor_changed(dtype: torch.dtype) -> None:
    operands = random_operands((64, 32, 100), 3.0, dtype)
    plain = token_statistics(*operands)
    try:
        torch.set_float32_matmul_precision("medium")
        before = torch.backends.mkldnn.matmul.fp32_precision
        lowered = token_statistics(*operands)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(getattr(plain, name), getattr(lowered, name)) for name in FIELDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_logits_are_not_rounded_to_the_operands(dtype: torch.dtype) -> None:
    hidden, head, _ = random_operands((20, 64, 300), 4.0, dtype)
    logits = float32_logits(hidden, head)
    assert logits.dtype == torch.float32
    assert float((logits - hidden.double() @ head.double().T).abs().max()) < 2e-5


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that `function` held at one time beyond what there was before, by torch's own allocator."""
    with profile(profile_memory=True) as recorded:
        function()
    held = peak = 0
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_small_share_of_the_materialised_logits(dtype: torch.dtype) -> None:
    """Forward and backward; the two gradients themselves are not counted."""
    hidden, head, targets = random_operands((4096, 16, 20000), 1.0, dtype)
    hidden.requires_grad_()
    head.requires_grad_()

    def ours() -> None:
        token_statistics(hidden, head, targets).logprob_T.sum().backward()

    ours()
    hidden.grad = head.grad = None
    gradients = (hidden.numel() + head.numel()) * hidden.element_size()
    logits = 4 * len(targets) * len(head)
    extra = peak_bytes(ours) - gradients
    assert 4 * CHUNK_ELEMENTS["cpu"] < extra < logits / 20
    assert peak_bytes(lambda: hidden.detach().float() @ head.detach().float().T) >= logits


def test_the_shapes_of_these_tests_need_several_chunks() -> None:
    tokens, _, vocabulary = MANY_CHUNKS
    assert vocabulary > 2 * CHUNK_VOCABULARY["cpu"]
    assert tokens * CHUNK_VOCABULARY["cpu"] > CHUNK_ELEMENTS["cpu"]


def test_tf32_that_a_caller_allowed_is_off_within_and_on_after() -> None:
    """On a GPU; torch refuses a product where its two settings for it differ, so both must be moved."""
    matmul = torch.backends.cuda.matmul
    elsewhere = torch.empty(1, device="meta")
    try:
        torch.set_float32_matmul_precision("high")
        with statistics._exact_products(elsewhere):
            assert (matmul.fp32_precision, matmul.allow_tf32) == ("ieee", False)
        assert (matmul.fp32_precision, matmul.allow_tf32) == ("tf32", True)
    finally:
        torch.set_float32_matmul_precision("highest")
    with statistics._exact_products(elsewhere):
        assert not matmul.allow_tf32
