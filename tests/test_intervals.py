"""Evaluations: pass@k by enumeration, majority votes by hand, BCa against a plain loop, coverage by simulation."""

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from bench.coverage import METRICS, ROWS, Row, measure, rates_of
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl import algo
from clipctl.intervals import (
    MEASURED,
    MIN_PROBLEMS,
    MIN_VARIED,
    Answer,
    Comparison,
    Floats,
    Interval,
    compare,
    cons_at_k_values,
    expected_pass_at_k,
    mean_at_k_values,
    mean_interval,
    pass_at_k_values,
    pass_curve,
    simulate_coverage,
)

NORMAL = NormalDist()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def interval(values: Sequence[float] | Floats, seed: int = 0, resamples: int = 10_000) -> Interval:
    return mean_interval(np.array(values, dtype=np.float64), rng(seed), resamples=resamples)


# mean@k and pass@k


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    correct_P = np.arange(n + 1)
    for k in range(1, n + 1):
        firsts = np.array([subset[0] for subset in itertools.combinations(range(n), k)])
        # Samples 0 … c-1 are the correct ones and subsets are sorted, so the first decides.
        share_P = [(firsts < correct).mean() for correct in correct_P]
        found_P = pass_at_k_values(np.full(n + 1, n), correct_P, k)
        assert found_P == pytest.approx(share_P, rel=1e-13, abs=0)
        assert found_P == pytest.approx([algo.pass_at_k(n, int(c), k) for c in correct_P], rel=1e-13, abs=0)
        assert ((found_P >= 0) & (found_P <= 1)).all()


@pytest.mark.parametrize(
    ("n", "c", "k"), [(10_000, 1, 5000), (10**6, 1, 1), (1024, 3, 512), (1024, 1, 1023), (64, 64, 3)]
)
def test_pass_at_k_of_many_samples_is_that_of_exact_integers(n: int, c: int, k: int) -> None:
    assert pass_at_k_values(np.array([n]), np.array([c]), k)[0] == pytest.approx(algo.pass_at_k(n, c, k), rel=1e-12)


def test_problems_may_differ_in_their_number_of_samples() -> None:
    n_P, c_P = np.array([4, 6, 10]), np.array([1, 0, 7])
    assert mean_at_k_values(n_P, c_P).tolist() == [0.25, 0.0, 0.7]
    assert pass_at_k_values(n_P, c_P, 4) == pytest.approx([1.0, 0.0, 1.0])
    assert pass_at_k_values(n_P, c_P, 2) == pytest.approx([1 / 2, 0.0, 1 - 3 / 45])
    curve = pass_curve(n_P, c_P)
    assert list(curve) == [1, 2, 3, 4]
    assert curve[1] == pytest.approx((0.25 + 0.7) / 3)
    assert curve[3] == pytest.approx((3 / 4 + (1 - 1 / 120)) / 3)


@pytest.mark.parametrize(
    ("n_P", "c_P", "k"),
    [([4, 3], [1, 1], 4), ([4], [1], 0), ([4], [5], 2), ([4], [-1], 2), ([], [], 1), ([4, 4], [1], 2)],
)
def test_impossible_numbers_do_not_pass(n_P: list[int], c_P: list[int], k: int) -> None:
    with pytest.raises(AssertionError):
        pass_at_k_values(np.array(n_P, dtype=np.int64), np.array(c_P, dtype=np.int64), k)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_curve_starts_at_the_mean_and_rises_to_the_share_that_was_solved(problems: list[tuple[int, float]]) -> None:
    n_P = np.array([n for n, _ in problems])
    c_P = np.array([round(share * n) for n, share in problems])
    curve = pass_curve(n_P, c_P)
    assert list(curve) == list(range(1, n_P.min() + 1))
    assert curve[1] == pytest.approx((c_P / n_P).mean(), abs=1e-15)
    assert (np.diff(list(curve.values())) >= -1e-15).all()
    assert curve[n_P.min()] <= (c_P > 0).mean() + 1e-15
    same = pass_curve(n_P[:1], c_P[:1])
    assert same[int(n_P[0])] == pytest.approx(float(c_P[0] > 0), abs=1e-15)


# cons@k

RIGHT, WRONG, NONE = ("7", True), ("8", False), (None, False)


@pytest.mark.parametrize(
    ("answers_K", "value"),
    [
        ([RIGHT], 1.0),
        ([WRONG], 0.0),
        ([RIGHT, RIGHT, WRONG], 1.0),
        ([WRONG, RIGHT, WRONG], 0.0),
        ([RIGHT, WRONG], 0.5),
        ([WRONG, RIGHT], 0.5),
        ([RIGHT, WRONG, ("9", False)], 1 / 3),
        ([RIGHT, WRONG, ("7.0", True)], 2 / 3),
        ([RIGHT, WRONG, ("9", False), WRONG], 0.0),
        ([NONE, NONE, NONE, RIGHT], 1.0),
        ([NONE, NONE, NONE], 0.0),
        # A response without an extracted answer cannot win even where it was taken to be correct.
        ([(None, True), (None, True), WRONG], 0.0),
        ([(None, True)], 0.0),
        ([("7", True), ("7", False), ("7", True), WRONG], 2 / 3),
        ([("7", True), ("7", False), WRONG, WRONG], 1 / 4),
        # "None" is an answer like any other, and so are 0 and the empty string.
        ([("None", True), ("None", True), WRONG], 1.0),
        ([(0, True), (0, True), WRONG], 1.0),
        ([("", True), ("", True), WRONG], 1.0),
    ],
)
def test_votes_by_hand(answers_K: list[Answer], value: float) -> None:
    for order in itertools.permutations(answers_K):
        assert cons_at_k_values([order]).tolist() == [pytest.approx(value, abs=1e-15)]


def test_votes_of_several_problems_stay_apart() -> None:
    problems = [[RIGHT, RIGHT, WRONG], [WRONG], [NONE, NONE], [WRONG, RIGHT, NONE, ("9", False)]]
    assert cons_at_k_values(problems) == pytest.approx([1.0, 0.0, 0.0, 1 / 3])
    with pytest.raises(AssertionError):
        cons_at_k_values([[RIGHT], []])


@given(st.lists(st.sampled_from([RIGHT, WRONG, ("9", False), NONE]), min_size=1, max_size=9))
def test_a_tie_is_worth_what_drawing_among_the_tied_is_worth(answers_K: list[Answer]) -> None:
    keys = [key for key, _ in answers_K if key is not None]
    winners = [key for key in set(keys) if keys.count(key) == max(map(keys.count, keys))]
    expected = float(np.mean([key == "7" for key in winners])) if winners else 0.0
    assert cons_at_k_values([answers_K])[0] == pytest.approx(expected)


# BCa


def slow_bca(values: list[float], resamples: int, seed: int) -> tuple[float, float]:
    """Efron's definition, one resample and one left-out value at a time, with the general jackknife."""
    generator, size, mean = rng(seed), len(values), sum(values) / len(values)
    means = []
    for _ in range(resamples):
        means.append(sum(values[at] for at in generator.integers(0, size, size)) / size)
    below = sum(m < mean - 1e-12 for m in means) + sum(abs(m - mean) <= 1e-12 for m in means) / 2
    z0 = NORMAL.inv_cdf(below / resamples)
    left_out = [(sum(values) - value) / (size - 1) for value in values]
    centre = sum(left_out) / size
    third, second = (sum((centre - value) ** power for value in left_out) for power in (3, 2))
    acceleration = third / (6 * second**1.5)
    ends = []
    for z in (NORMAL.inv_cdf(0.025), NORMAL.inv_cdf(0.975)):
        ends.append(NORMAL.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z))))
    low, high = np.quantile(means, ends)
    return float(low), float(high)


SKEWED = [0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.25, 0.3, 0.45, 1.0, 0.05, 0.0, 0.15, 0.9]
"""Skewed, so that both corrections matter, with the values 0, 0.1 more than once, so that weights do."""


def test_bca_is_that_of_a_plain_loop() -> None:
    found = interval(SKEWED, resamples=200_000)
    low, high = slow_bca(SKEWED, 60_000, seed=3)
    assert found.value == pytest.approx(sum(SKEWED) / len(SKEWED), abs=1e-15)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.004), pytest.approx(high, abs=0.006))
    # What the corrections are worth here is several times these tolerances: the percentile interval is another one.
    generator = rng(4)
    plain = np.quantile(generator.choice(SKEWED, (60_000, len(SKEWED))).mean(1), [0.025, 0.975])
    assert found.low > plain[0] + 0.015
    assert found.high > plain[1] + 0.03


def test_bca_of_many_even_values_is_the_normal_interval() -> None:
    values = np.tile([0.0, 0.25, 0.5, 0.75, 1.0], 200)
    half = 1.959964 * values.std() / math.sqrt(values.size)
    found = interval(values, resamples=100_000)
    assert (found.low, found.high) == (pytest.approx(0.5 - half, abs=5e-4), pytest.approx(0.5 + half, abs=5e-4))
    wider = mean_interval(values, rng(), level=0.99, resamples=100_000)
    assert wider.level == 0.99
    assert wider.high - wider.low == pytest.approx(2 * half * 2.575829 / 1.959964, abs=1e-3)


def test_resampling_in_pieces_gives_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws; matrix products of other sizes round differently in the last bit."""
    whole = interval(SKEWED, resamples=5000)
    monkeypatch.setattr("clipctl.intervals.CHUNK_ELEMENTS", 27)
    pieces = interval(SKEWED, resamples=5000)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_the_generator_decides() -> None:
    assert interval(SKEWED, seed=1) == interval(SKEWED, seed=1)
    assert interval(SKEWED, seed=1) != interval(SKEWED, seed=2)


@pytest.mark.parametrize(("value", "problems"), [(0.0, 30), (1.0, 500), (0.1, 7), (0.3, 1)])
def test_values_that_are_all_equal_have_no_width_and_are_marked(value: float, problems: int) -> None:
    found = interval([value] * problems)
    assert (found.value, found.low, found.high, found.problems) == (value, value, value, problems)
    assert not found.reliable
    assert found.note is not None
    assert f"all at {value:g}" in found.note


values_lists = st.lists(st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=40)


@given(values_lists, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_problems_changes_nothing(values: list[float], random: object) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert interval(shuffled, resamples=500) == interval(values, resamples=500)


@given(values_lists.filter(lambda values: len(values) >= 8 and len(set(values)) > 1))
@settings(max_examples=50, deadline=None)
def test_four_times_the_problems_halve_the_width(values: list[float]) -> None:
    once, more = interval(values), interval(values * 4)
    assert more.value == pytest.approx(once.value, abs=1e-15)
    ratio = (more.high - more.low) / (once.high - once.low)
    assert 0.3 < ratio < 0.7


@given(values_lists, st.sampled_from([0.25, 3.0, 1000.0]), st.sampled_from([-2.0, 0.0, 5.0]))
@settings(max_examples=50, deadline=None)
def test_the_scale_of_the_values_is_that_of_the_interval(values: list[float], scale: float, shift: float) -> None:
    one, other = interval(values, resamples=500), interval([scale * v + shift for v in values], resamples=500)
    for name in ("value", "low", "high"):
        assert getattr(other, name) == pytest.approx(scale * getattr(one, name) + shift, abs=1e-9 * scale)
    assert other.reliable == one.reliable


@given(values_lists)
@settings(max_examples=100, deadline=None)
def test_the_interval_stays_within_what_was_seen(values: list[float]) -> None:
    found = interval(values, resamples=200)
    assert min(values) <= found.low <= found.high <= max(values)
    if len(set(values)) > 1:
        assert found.low < found.high


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf, 1.0]])
def test_no_interval_of_nothing_or_of_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(AssertionError):
        interval(values)


# What is reliable


def binary(problems: int, ones: int) -> list[float]:
    return [1.0] * ones + [0.0] * (problems - ones)


def percent(kind: str) -> str:
    low, high = (f"{100 * share:.0f}" for share in MEASURED[kind])
    return f"held the truth in {low if low == high else f'{low} to {high}'} % of simulations"


@pytest.mark.parametrize(
    ("problems", "ones", "kind", "why"),
    [
        (30, 15, "few problems", "30 problems, fewer than 100"),
        (99, 50, "few problems", "99 problems, fewer than 100"),
        (30, 2, "few problems, nearly all alike", "2 of 30 problems differ from 0, fewer than 15"),
        (30, 29, "few problems, nearly all alike", "1 of 30 problems differs from 1, fewer than 15"),
        (30, 0, "few problems, all alike", "30 problems, all at 0"),
        (1, 1, "few problems, all alike", "1 problem, all at 1"),
        (200, 196, "nearly all alike", "4 of 200 problems differ from 1, fewer than 15"),
        (1319, 14, "nearly all alike", "14 of 1319 problems differ from 0, fewer than 15"),
        (200, 200, "all alike", "200 problems, all at 1"),
    ],
)
def test_an_unreliable_interval_says_why_and_what_was_measured(problems: int, ones: int, kind: str, why: str) -> None:
    found = interval(binary(problems, ones), resamples=200)
    assert not found.reliable
    assert found.note == f"unreliable ({why}): 95 % intervals like it {percent(kind)}"


@pytest.mark.parametrize(("problems", "ones"), [(MIN_PROBLEMS, 50), (200, 200 - MIN_VARIED), (1319, MIN_VARIED)])
def test_what_is_large_and_varied_is_reliable(problems: int, ones: int) -> None:
    found = interval(binary(problems, ones), resamples=200)
    assert (found.reliable, found.note, found.problems, found.level) == (True, None, problems, 0.95)


# Coverage


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_truth_of_a_simulation_is_that_of_many_problems(k: int) -> None:
    generator = rng()
    rate_P = generator.beta(0.3, 0.7, 200_000)
    assert expected_pass_at_k((0.3, 0.7), k) == pytest.approx((1 - (1 - rate_P) ** k).mean(), abs=0.004)
    assert expected_pass_at_k(rates_of(0.37, k), k) == pytest.approx(0.37)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [0.3, 0.7])
def test_intervals_of_200_problems_cover_the_truth(metric: str, value: float) -> None:
    """The standard error of 3000 repetitions is 0.4 %, so the bounds are five of them away from 95 %."""
    k = METRICS[metric]
    found = simulate_coverage(200, 8, rates_of(value, k), k, 3000, rng(7), resamples=1000)
    assert found.truth == pytest.approx(value)
    assert 0.93 <= found.covered <= 0.97
    assert found.reliable == 1


def test_differences_of_200_problems_cover_the_truth() -> None:
    found = simulate_coverage(200, 8, (0.5, 0.5), 1, 2000, rng(8), other=(0.8, 0.2), changed=0.5, resamples=1000)
    assert found.truth == pytest.approx(-0.15)
    assert 0.93 <= found.covered <= 0.97


def test_the_simulation_sees_an_interval_of_another_level() -> None:
    found = simulate_coverage(200, 8, (0.5, 0.5), 1, 2000, rng(9), level=0.9, resamples=1000)
    assert 0.88 <= found.covered <= 0.92


def test_the_intervals_of_benchmarks_that_are_too_hard_are_wrong_and_marked() -> None:
    found = simulate_coverage(30, 8, rates_of(0.1 / 30, 8), 8, 500, rng(10), resamples=500)
    assert found.covered < 0.3
    assert found.reliable == 0


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.problems}-{row.value:.3f}-{row.second}")
@pytest.mark.parametrize("metric", METRICS)
def test_the_measured_coverage_is_what_the_notes_say(row: Row, metric: str) -> None:
    """Another 2000 repetitions stay within four standard errors of the range that is written down."""
    found = measure(row, METRICS[metric], 2000)
    low, high = MEASURED[row.kind] if row.kind else (0.94, 0.96)
    assert (
        low - 4 * math.sqrt(low * (1 - low) / 2000) <= found.covered <= high + 4 * math.sqrt(high * (1 - high) / 2000)
    )
    assert found.reliable >= 0.9 if row.kind is None else found.reliable <= 0.6


def test_the_table_is_printed_for_every_kind() -> None:
    assert {row.kind for row in ROWS if row.kind} == set(MEASURED)
    script = sys.modules["bench.coverage"].__file__
    done = subprocess.run(
        [sys.executable, str(script), "--repetitions", "2"], capture_output=True, text=True, check=True
    )
    assert len(re.findall(r"^ +\d+  ", done.stdout, flags=re.MULTILINE)) == len(ROWS)
    for kind in MEASURED:
        assert f'"{kind}": (' in done.stdout


# Comparisons

FIRST = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.75, "only-1": 0.0}
SECOND = {"e-only-2": 1.0, "d": 0.5, "c": 0.25, "b": 0.75, "a": 0.25}


def test_a_comparison_by_hand() -> None:
    """Differences 0.75, -0.25, 0, 0.25: mean 3/16, squares about it sum to 0.546875."""
    found = compare(FIRST, SECOND, rng())
    assert found.difference.value == pytest.approx(3 / 16)
    assert found.difference == interval([0.75, -0.25, 0.0, 0.25])
    assert (found.only_first, found.only_second) == (("only-1",), ("e-only-2",))
    deviation = math.sqrt(0.546875 / 3)
    assert found.smallest_detectable == pytest.approx((1.959964 + 0.841621) * deviation / 2, rel=1e-6)
    assert found.zero_inside
    assert not found.difference.reliable


def test_the_smallest_detectable_difference_is_found_in_80_percent_of_comparisons() -> None:
    generator = rng(11)
    deviation, problems = 0.3, 200
    smallest = compare(
        {str(at): value for at, value in enumerate(np.tile([deviation, -deviation], 100))},
        {str(at): 0.0 for at in range(problems)}, rng(), resamples=200,
    ).smallest_detectable  # fmt: skip
    assert smallest is not None
    found = []
    for _ in range(500):
        values = generator.normal(smallest, deviation, problems)
        result = compare(
            {str(at): value for at, value in enumerate(values)}, {str(at): 0.0 for at in range(problems)},
            generator, resamples=400,
        )  # fmt: skip
        found.append(not result.zero_inside)
    assert 0.74 <= np.mean(found) <= 0.86


def test_thirty_problems_say_so() -> None:
    generator = rng(12)
    first, second = ({str(at): float(generator.integers(0, 9)) / 8 for at in range(30)} for _ in range(2))
    found = compare(first, second, rng())
    assert found.smallest_detectable is not None
    assert found.power == (
        f"30 problems: smallest detectable difference {found.smallest_detectable:.3f} (80 % power, 5 % level)"
    )
    assert found.smallest_detectable > 0.2
    assert found.difference.note is not None
    assert "30 problems, fewer than 100" in found.difference.note


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_differences_that_do_not_vary_detect_nothing(names: list[str]) -> None:
    found = compare(dict.fromkeys(names, 0.75), dict.fromkeys(names, 0.5), rng())
    assert found.smallest_detectable is None
    assert (found.difference.low, found.difference.value, found.difference.high) == (0.25, 0.25, 0.25)
    assert not found.zero_inside
    assert found.power.startswith(f"{len(names)} problem{'s' if len(names) > 1 else ''}: the differences do not vary")


def test_evaluations_without_a_common_problem_do_not_pass() -> None:
    with pytest.raises(AssertionError, match="no problem is in both evaluations"):
        compare({"a": 1.0}, {"b": 1.0}, rng())


def test_zero_inside_counts_both_ends() -> None:
    def at(low: float, high: float) -> bool:
        return Comparison(Interval(0.1, low, high, 0.95, 200, True, None), None, (), ()).zero_inside

    assert [at(-0.1, 0.3), at(0.0, 0.3), at(-0.2, 0.0), at(0.01, 0.3), at(-0.3, -0.01)] == [True] * 3 + [False] * 2


def test_an_end_that_is_0_on_paper_is_0() -> None:
    """-3 / 30 and the distance of 0 from it add up to -1.4e-17, which would leave "no difference" out."""
    difference = np.repeat([-1.0, -0.5, 0.0, 0.5], [3, 1, 25, 1])
    names = [f"p{at:02}" for at in range(30)]
    found = compare(dict(zip(names, difference, strict=True)), dict.fromkeys(names, 0.0), np.random.default_rng(0))
    assert (found.difference.low, found.difference.high) == (-0.25, 0.0)
    assert found.zero_inside


eighths = st.integers(0, 8).map(lambda eighth: eighth / 8)
evaluations = st.dictionaries(st.sampled_from("abcdefghijkl"), eighths, min_size=7)


@given(evaluations, evaluations, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_an_evaluation_changes_nothing(
    first: dict[str, float], second: dict[str, float], random: object
) -> None:
    items = list(second.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    found = compare(first, second, rng(), resamples=300)
    assert compare(first, dict(items), rng(), resamples=300) == found
    assert found.difference.problems + len(found.only_first) == len(first)
    assert found.difference.problems + len(found.only_second) == len(second)


@given(evaluations, evaluations, st.sampled_from([-1.0, 0.5, 2.0]))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_both_leaves_the_difference(first: dict[str, float], second: dict[str, float], shift: float) -> None:
    moved = [{name: value + shift for name, value in values.items()} for values in (first, second)]
    assert compare(moved[0], moved[1], rng(), resamples=300) == compare(first, second, rng(), resamples=300)


def test_the_other_way_round_is_the_negative() -> None:
    generator = rng(13)
    first = {str(at): float(value) for at, value in enumerate(generator.beta(0.3, 2, 150))}
    second = {str(at): float(value) for at, value in enumerate(generator.beta(2, 2, 150))}
    one, other = (compare(*pair, rng(), resamples=50_000) for pair in ((first, second), (second, first)))
    assert one.difference.value == pytest.approx(-other.difference.value, abs=1e-15)
    assert one.difference.high == pytest.approx(-other.difference.low, abs=0.003)
    assert one.smallest_detectable == pytest.approx(other.smallest_detectable)
    assert one.difference.high < 0
    assert not one.zero_inside


def test_pairing_sees_what_two_separate_intervals_do_not() -> None:
    """Problems differ much, the second evaluation is better by 0.05 on nearly each of them; the standard error of the
    difference is 0.006, so its lower end is six of them below at most."""
    generator = rng(14)
    rate_P = generator.beta(0.5, 0.5, 300)
    first = {str(at): float(value) for at, value in enumerate(rate_P)}
    shifted_P = rate_P + 0.05 + generator.normal(0, 0.1, 300)
    second = {str(at): float(value) for at, value in enumerate(shifted_P)}
    alone = [interval(list(values.values())) for values in (first, second)]
    assert alone[0].high > alone[1].low
    found = compare(second, first, rng())
    assert found.difference.low > 0.05 - 6 * 0.1 / math.sqrt(300)
    assert found.difference.reliable


def test_no_torch_is_loaded() -> None:
    code = "import sys, clipctl.intervals; assert not {'torch', 'pandas', 'duckdb', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
