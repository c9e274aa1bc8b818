"""Draws and layouts that must not depend on the order of calls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipctl.rollout import Batch, keyed_rng, microbatches, minibatches, stream_indices


def test_keyed_rng_depends_on_the_whole_key_and_nothing_else() -> None:
    first = keyed_rng(3, "sample", 1, 2).random(4)
    np.testing.assert_array_equal(keyed_rng(3, "sample", 1, 2).random(4), first)
    for other in [
        (4, "sample", 1, 2),
        (3, "reward", 1, 2),
        (3, "sample", 12),
        (3, "sample", 2, 1),
        (3, "sample", 1, "2"),
    ]:
        assert (keyed_rng(*other).random(4) != first).all()


def test_keyed_rng_is_pinned_so_that_old_runs_can_be_repeated() -> None:
    np.testing.assert_allclose(keyed_rng(0, "sample", 0, 0, 0).random(2), PINNED_DRAWS, rtol=0, atol=1e-15)


PINNED_DRAWS = [0.4344272872857463, 0.9187307335932948]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 200), st.integers(1, 60))
def test_the_prompt_stream_is_a_pure_function_of_the_position(problems: int, seed: int, start: int, count: int) -> None:
    whole = stream_indices(problems, seed, 0, start + count)
    np.testing.assert_array_equal(stream_indices(problems, seed, start, count), whole[start:])


@given(st.integers(1, 40), st.integers(0, 5))
def test_every_pass_over_the_prompts_is_a_permutation(problems: int, seed: int) -> None:
    stream = stream_indices(problems, seed, 0, 3 * problems)
    for epoch in range(3):
        assert sorted(stream[epoch * problems : (epoch + 1) * problems]) == list(range(problems))


def test_passes_and_seeds_have_different_orders() -> None:
    stream = stream_indices(50, 0, 0, 100)
    assert list(stream[:50]) != list(stream[50:])
    assert list(stream[:50]) != list(stream_indices(50, 1, 0, 50))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_microbatches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    layout = microbatches(lengths, range(len(lengths)), budget)
    assert sorted(row for part in layout for row in part) == list(range(len(lengths)))
    for part in layout:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget


def test_microbatches_are_sorted_by_length_and_pinned() -> None:
    assert microbatches([5, 9, 2, 9, 3], [0, 1, 2, 3, 4], 18) == [[3, 1], [0, 4, 2]]


def test_minibatches_take_whole_groups_in_order_and_a_smaller_rest() -> None:
    assert minibatches(12, 8) == [range(0, 8), range(8, 12)]


def test_a_batch_refuses_a_split_group() -> None:
    with pytest.raises(AssertionError):
        Batch([[1]] * 3, [[2]] * 3, np.zeros(3), group_size=2)
