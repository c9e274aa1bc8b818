"""Draws and layouts that must not depend on the order of calls."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipctl.rollout import Batch, divide, in_step, keyed_rng, microbatches, minibatches, stream_indices


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


def padded(part: list[int], lengths: list[int]) -> int:
    return len(part) * max(lengths[row] for row in part)


def test_fewer_microbatches_than_ranks_are_cut_so_that_the_largest_is_smallest() -> None:
    """Of 9 9 5 3 2 in two parts the largest is 2·9 = 18, in three 3·5 = 15."""
    lengths = [5, 9, 2, 9, 3]
    assert microbatches(lengths, range(5), 1000) == [[3, 1, 0, 4, 2]]
    assert microbatches(lengths, range(5), 1000, 2) == [[3, 1], [0, 4, 2]]
    assert microbatches(lengths, range(5), 1000, 3) == [[3], [1], [0, 4, 2]]
    assert microbatches(lengths, range(5), 1000, 9) == [[3], [1], [0], [4], [2]]
    assert microbatches(lengths, range(5), 18, 2) == microbatches(lengths, range(5), 18, 1)
    assert microbatches(lengths, [], 18, 2) == []


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 200), st.integers(1, 9))
def test_no_other_cut_into_as_many_has_a_smaller_largest(lengths: list[int], budget: int, ranks: int) -> None:
    """Against every way to cut the sorted rows into at most so many parts."""
    found = microbatches(lengths, range(len(lengths)), budget, ranks)
    assert sorted(row for part in found for row in part) == list(range(len(lengths)))
    if len(microbatches(lengths, range(len(lengths)), budget)) >= ranks:
        assert found == microbatches(lengths, range(len(lengths)), budget)
        return
    down = sorted(lengths, reverse=True)
    cuts = [
        [0, *where, len(down)]
        for parts in range(1, ranks + 1)
        for where in combinations(range(1, len(down)), parts - 1)
    ]
    best = min(max((end - start) * down[start] for start, end in pairwise(cut)) for cut in cuts)
    assert max(padded(part, lengths) for part in found) == best
    assert len(found) <= ranks


def test_microbatches_are_divided_by_padded_tokens_and_pinned() -> None:
    """Sizes 16, 14, 12, 5: the first to rank 0, two to rank 1, and the smallest to rank 0, which has 16 to 26."""
    lengths, parts = [8, 8, 7, 7, 6, 6, 5], [[0, 1], [2, 3], [4, 5], [6]]
    assert divide(parts, lengths, 2) == [[0, 3], [1, 2]]
    assert divide(parts, lengths, 1) == [[0, 1, 2, 3]]
    assert divide(parts, lengths, 3) == [[0], [1], [2, 3]]
    assert divide(parts, lengths, 6) == [[0], [1], [2], [3], [], []]
    assert divide([], lengths, 2) == [[], []]


def test_ranks_that_go_in_step_repeat_a_microbatch_that_does_not_count() -> None:
    assert in_step([[0], [1], [2, 3]]) == [
        [(0, True), (0, False)],
        [(1, True), (1, False)],
        [(2, True), (3, True)],
    ]
    assert in_step([[0], []]) == [[(0, True)], [(0, False)]]
    assert in_step([[], []]) == [[], []]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 9))
def test_every_microbatch_counts_once_and_ranks_have_equally_many(lengths: list[int], budget: int, ranks: int) -> None:
    parts = microbatches(lengths, range(len(lengths)), budget, ranks)
    divided = divide(parts, lengths, ranks)
    assert sorted(place for places in divided for place in places) == list(range(len(parts)))
    loads = [sum(padded(parts[place], lengths) for place in places) for places in divided]
    largest = max(padded(part, lengths) for part in parts)
    assert max(map(len, divided)) == -(-len(parts) // ranks)
    stepped = in_step(divided)
    assert len(set(map(len, stepped))) == 1
    assert [[place for place, counts in places if counts] for places in stepped] == divided
    if len(parts) <= ranks:
        assert max(loads) == largest


def test_minibatches_take_whole_groups_in_order_and_a_smaller_rest() -> None:
    assert minibatches(12, 8) == [range(0, 8), range(8, 12)]


def test_a_batch_refuses_a_split_group() -> None:
    with pytest.raises(AssertionError):
        Batch([[1]] * 3, [[2]] * 3, np.zeros(3), group_size=2)
