"""Numbers of an evaluation against enumeration and plain numpy, at rows made by hand."""

import itertools
from typing import Any

import numpy as np
import pytest

from clipctl.eval_metrics import by_problem, comparisons, pass_intervals, samples_each, summary


def row(position: int, sample: int, correct: bool, answer: str | None, **more: Any) -> dict[str, Any]:
    usual = {"problem_hash": f"h{position}", "tokens": 10 * position + sample, "truncated": sample == 2}
    return usual | {"position": position, "sample": sample, "correct": correct, "answer": answer} | more


ROWS = [
    row(0, 0, True, "5"), row(0, 1, True, "5.0"), row(0, 2, False, "7"), row(0, 3, False, "7"),
    row(1, 0, False, "1"), row(1, 1, False, None), row(1, 2, False, None), row(1, 3, True, "2"),
    row(2, 0, False, None), row(2, 1, False, None), row(2, 2, False, None), row(2, 3, False, None),
    row(3, 0, True, "9"), row(3, 1, True, "9"), row(3, 2, True, "9"), row(3, 3, False, "8"),
]  # fmt: skip


def test_the_metrics_of_four_problems_by_hand() -> None:
    """Correct 2, 1, 0, 3 of 4. Votes: a tie of two for the gold, however written, and two for "7"; a tie of "1" and the
    gold; none; the gold."""
    problems = by_problem(reversed(ROWS))
    assert [sum(problem.correct) for problem in problems] == [2, 1, 0, 3]
    found = summary(problems)
    assert found["mean@4"].value == 6 / 16
    assert found["cons@4"].value == (0.5 + 0.5 + 0 + 1) / 4
    assert found["response tokens"].value == 10 * 1.5 + 1.5
    assert found["truncated"].value == 0.25
    assert found["no answer"].value == (0 + 0.5 + 1 + 0) / 4


def test_pass_at_every_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    problems = by_problem(ROWS)
    curve = pass_intervals(problems)
    assert list(curve) == [1, 2, 3, 4]
    for k, interval in curve.items():
        shares = [np.mean([any(s) for s in itertools.combinations(problem.correct, k)]) for problem in problems]
        assert interval.value == pytest.approx(np.mean(shares), abs=1e-12)
        assert interval.low <= interval.value <= interval.high
        assert not interval.reliable


def test_k_is_that_of_the_problem_with_the_fewest_samples() -> None:
    problems = by_problem([r for r in ROWS if not (r["position"] == 1 and r["sample"] == 3)])
    assert samples_each(problems) == 3
    assert list(pass_intervals(problems)) == [1, 2, 3]
    assert "mean@3" in summary(problems)


def test_the_same_rows_give_the_same_intervals() -> None:
    assert summary(by_problem(ROWS)) == summary(by_problem(ROWS))


def test_evaluations_are_paired_on_what_the_problems_are_not_on_where_they_stand() -> None:
    first = by_problem(ROWS)
    other = [
        row(0, 0, True, "9", problem_hash="h3"), row(0, 1, False, "8", problem_hash="h3"),
        row(1, 0, True, "5", problem_hash="h0"), row(1, 1, True, "5", problem_hash="h0"),
        row(2, 0, True, "5", problem_hash="new"), row(2, 1, True, "5", problem_hash="new"),
    ]  # fmt: skip
    found = comparisons(first, by_problem(other))
    assert found is not None
    assert list(found) == ["mean", "cons", "pass@2"]
    # h0: 2/4 - 2/2; h3: 3/4 - 1/2.
    assert found["mean"].difference.value == pytest.approx((-0.5 + 0.25) / 2)
    assert found["mean"].difference.problems == 2
    # pass@2 of h0: 1 - C(2,2)/C(4,2) = 5/6 against 1; of h3: 1 against 1.
    assert found["pass@2"].difference.value == pytest.approx((5 / 6 - 1) / 2)
    assert found["mean"].only_first == ("h1-0", "h2-0")
    assert found["mean"].only_second == ("new-0",)
    assert found["mean"].smallest_detectable is not None
    assert comparisons(first, by_problem([row(0, 0, True, "1", problem_hash="x")])) is None


def test_a_problem_that_comes_twice_is_two_problems() -> None:
    twice = [row(at, 0, at == 1, "5", problem_hash="same") for at in range(2)]
    found = comparisons(by_problem(twice), by_problem(twice[:1]))
    assert found is not None
    assert found["mean"].difference.problems == 1
    assert found["mean"].only_first == ("same-1",)
