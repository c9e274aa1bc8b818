"""The statistics of an evaluation: mean@k, pass@k and cons@k of each problem, their intervals over problems, and pairs of
evaluations. NumPy alone.

Problems are the unit of chance: an interval says what another set of problems of the same kind would have given, with
the samples of each problem drawn anew. Everything that an interval needs is one value a problem. The same values in
another order give the same interval to the last bit, because resampling draws how often each distinct value occurs.

Dimension letters: P problems, K samples of one problem or k of pass@k (1 to K), B bootstrap resamples, U distinct values.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Answer = tuple[Hashable | None, bool]
"""One sample: the key of the extracted answer (equal keys are one vote; None: nothing was extracted), and correct."""
Rates = tuple[float, float]
"""a and b of a Beta distribution of the problems' solve rates."""

RESAMPLES = 10_000
CHUNK_ELEMENTS = 1 << 20
"""Counts held at once while resampling (8 MiB)."""
NORMAL = NormalDist()

MIN_PROBLEMS = 100
"""Intervals of fewer problems are marked."""
MIN_VARIED = 15
"""So are those in which fewer problems differ from the most common value (0 or 1 where a benchmark is too hard or
saturated, no difference in a comparison): the resamples then know little of the rare values that carry the mean."""
MEASURED = {
    "few problems": (0.938, 0.955),
    "few problems, nearly all alike": (0.822, 0.903),
    "few problems, all alike": (0.092, 0.232),
    "nearly all alike": (0.640, 0.974),
    "all alike": (0.183, 0.405),
}
"""Share of 95 % intervals that covered the truth, lowest and highest over metrics, by why they are marked.

Measured by `python tests/bench/coverage.py`, which prints the evaluations that were simulated for each.
"""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over problems and its interval. note: why it is not reliable, and how often such intervals were right."""

    value: float
    low: float
    high: float
    level: float
    problems: int
    reliable: bool
    note: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations on the same problems; difference: first - second, of the problems that both have.

    only_first, only_second: ids that the other one lacks. smallest_detectable: the true difference that would be found
    in 80 % of such comparisons at the 5 % level; None where the differences do not vary.
    """

    difference: Interval
    smallest_detectable: float | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def zero_inside(self) -> bool:
        """Whether no difference at all is inside the interval."""
        return self.difference.low <= 0 <= self.difference.high

    @property
    def power(self) -> str:
        """One line: how many problems there are and what difference they can show."""
        problems = f"{self.difference.problems} problem{'s' * (self.difference.problems != 1)}"
        if self.smallest_detectable is None:
            return f"{problems}: the differences do not vary, so what could be detected is unknown"
        return f"{problems}: smallest detectable difference {self.smallest_detectable:.3f} (80 % power, 5 % level)"


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a simulation found. covered: share of intervals with the truth inside; reliable: share not marked."""

    truth: float
    covered: float
    reliable: float


def mean_at_k_values(num_samples_P: Ints, num_correct_P: Ints) -> Floats:
    """mean@k of each problem: correct / samples. Problems may differ in their number of samples."""
    return pass_at_k_values(num_samples_P, num_correct_P, 1)


def pass_at_k_values(num_samples_P: Ints, num_correct_P: Ints, k: int) -> Floats:
    """pass@k of each problem, unbiased: 1 - C(n-c, k) / C(n, k), with n samples of which c are correct; 1 ≤ k ≤ every n.

    Problems may differ in n: k is the same for all, so one with n < k must not come here. Source: arXiv 2107.03374 eq. 1.
    """
    return _pass_values(num_samples_P, num_correct_P, k)[-1]


def pass_curve(num_samples_P: Ints, num_correct_P: Ints) -> dict[int, float]:
    """pass@k, averaged over problems, of every k from 1 to the smallest number of samples that a problem has."""
    rows_KP = _pass_values(num_samples_P, num_correct_P, int(np.min(num_samples_P)))
    return {k: float(value_P.mean()) for k, value_P in enumerate(rows_KP, start=1)}


def _pass_values(num_samples_P: Ints, num_correct_P: Ints, up_to: int) -> list[Floats]:
    """pass@1 … pass@up_to of each problem: pass_k = pass_{k-1} + (1 - pass_{k-1})·c/(n-k+1), the first success in draw k.

    The draws are without replacement, so this is 1 - C(n-c, k)/C(n, k); terms are positive and nothing cancels.
    """
    n_P, c_P = np.asarray(num_samples_P, dtype=np.int64), np.asarray(num_correct_P, dtype=np.int64)
    assert n_P.ndim == 1
    assert n_P.shape == c_P.shape
    assert n_P.size > 0
    assert 1 <= up_to <= n_P.min(), f"k = {up_to}, and a problem has {n_P.min()} samples"
    assert ((c_P >= 0) & (c_P <= n_P)).all()
    rows_KP: list[Floats] = []
    value_P = np.zeros(n_P.size)
    for drawn in range(up_to):
        # With fewer wrong samples than draws a success is certain and c/(n-k+1) is above 1.
        value_P = value_P + (1 - value_P) * np.minimum(c_P / (n_P - drawn), 1.0)
        rows_KP.append(value_P)
    return rows_KP


def cons_at_k_values(answers_PK: Sequence[Sequence[Answer]]) -> Floats:
    """cons@k of each problem: is the most frequent answer correct? k is the number of samples that the problem has.

    Samples without an answer (None) do not vote; a problem in which no sample has one counts 0. A tie is worth what
    drawing among the tied answers is worth on average: the share of them that is correct, so the order of samples does not
    matter. Samples of one key that were judged differently make that key worth its share of correct ones.
    Source: majority vote over final answers, arXiv 2203.11171.
    """
    values = []
    for answers_K in answers_PK:
        assert len(answers_K) > 0
        votes = Counter(key for key, _ in answers_K if key is not None)
        correct = Counter(key for key, is_correct in answers_K if key is not None and is_correct)
        top = max(votes.values(), default=0)
        tied = [key for key, count in votes.items() if count == top]
        values.append(math.fsum(correct[key] / top for key in tied) / len(tied) if tied else 0.0)
    return np.array(values, dtype=np.float64)


def mean_interval(
    values_P: Floats, rng: np.random.Generator, *, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """The mean of one value a problem and its BCa bootstrap interval over problems.

    The end for z = ±Φ⁻¹((1+level)/2) is the quantile Φ(z0 + (z0+z) / (1 - a(z0+z))) of the B resampled means, where
    Φ(z0) is the share of them below the mean (ties count half) and a = Σ d³ / (6 (Σ d²)^1.5), d = value - mean, is the
    acceleration (the jackknife's, which has this form for a mean). Values that are all equal give (value, value).
    Source: Efron 1987, "Better Bootstrap Confidence Intervals", J. Am. Stat. Assoc. 82:171.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    assert values_P.ndim == 1
    assert values_P.size > 0
    assert np.isfinite(values_P).all()
    assert 0 < level < 1
    assert resamples > 0
    distinct_U, count_U = np.unique(values_P, return_counts=True)
    why = _why_unreliable(distinct_U, count_U)
    value = float(distinct_U[0]) if distinct_U.size == 1 else math.fsum(distinct_U * count_U) / values_P.size
    low, high = _bca_ends(distinct_U - value, count_U, rng, level, resamples) if distinct_U.size > 1 else (0.0, 0.0)
    # Rounding must not carry an end past what any evaluation can give.
    low, high = np.clip([value + low, value + high], distinct_U[0], distinct_U[-1]).tolist()
    # An end that is 0 on paper is 0, or the interval of a difference would leave out "no difference" by 1e-17.
    dust = 1e-12 * float(np.abs(distinct_U).max())
    low, high = (0.0 if abs(end) <= dust else end for end in (low, high))
    return Interval(value, low, high, level, values_P.size, why is None, why)


def _bca_ends(
    from_mean_U: Floats, count_U: Ints, rng: np.random.Generator, level: float, resamples: int
) -> tuple[float, float]:
    """Both ends about the mean. Each distinct value is given as its distance from the mean."""
    scale = float(np.abs(from_mean_U).max())
    scaled_U = from_mean_U / scale
    mean_B = np.sort(_resampled_means(scaled_U, count_U, rng, resamples))
    # Sums that are equal on paper differ by rounding, and a tie is to be seen as one.
    share = float(np.searchsorted(mean_B, [-1e-12, 1e-12]).sum()) / (2 * resamples)
    z0 = NORMAL.inv_cdf(min(max(share, 0.5 / resamples), 1 - 0.5 / resamples))
    acceleration = float(count_U @ scaled_U**3) / (6 * float(count_U @ scaled_U**2) ** 1.5)
    half = NORMAL.inv_cdf((1 + level) / 2)
    ends = [NORMAL.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z))) for z in (-half, half)]
    low, high = np.quantile(mean_B, ends)
    return scale * float(low), scale * float(high)


def _resampled_means(distinct_U: Floats, count_U: Ints, rng: np.random.Generator, resamples: int) -> Floats:
    """Means of P draws with replacement [B]: how often each distinct value is drawn is multinomial."""
    problems = int(count_U.sum())
    step = max(1, CHUNK_ELEMENTS // distinct_U.size)
    parts = [
        rng.multinomial(problems, count_U / problems, size=min(step, resamples - start)) @ distinct_U
        for start in range(0, resamples, step)
    ]
    return np.asarray(np.concatenate(parts) / problems)


def _why_unreliable(distinct_U: Floats, count_U: Ints) -> str | None:
    """Why an interval is not to be relied on, with the measured coverage of its kind; None for one that is."""
    problems = int(count_U.sum())
    varied = problems - int(count_U.max())
    few = problems < MIN_PROBLEMS
    if not few and varied >= MIN_VARIED:
        return None
    alike = "" if varied >= MIN_VARIED else "nearly all alike" if varied else "all alike"
    low, high = MEASURED[", ".join(filter(None, ["few problems" if few else "", alike]))]
    usual = f"{float(distinct_U[count_U.argmax()]):.3g}"
    count = f"{problems} problem{'s' * (problems != 1)}"
    if not alike:
        what = f"{count}, fewer than {MIN_PROBLEMS}"
    elif varied:
        what = f"{varied} of {count} {'differ' if varied > 1 else 'differs'} from {usual}, fewer than {MIN_VARIED}"
    else:
        what = f"{count}, all at {usual}"
    covered = f"{100 * low:.0f}" if round(100 * low) == round(100 * high) else f"{100 * low:.0f} to {100 * high:.0f}"
    return f"unreliable ({what}): 95 % intervals like it held the truth in {covered} % of simulations"


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    rng: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Two evaluations, each a value by problem id, paired by id: at least one id is in both.

    Problems are resampled as pairs, so what makes a problem hard for both cancels. The smallest detectable difference is
    (Φ⁻¹(0.975) + Φ⁻¹(0.8))·sd/√P with the standard deviation of the differences (P-1 in its denominator): the normal
    approximation of a paired two-sided test, a little too small for few problems. Source: Cohen 1988, ch. 2; for
    evaluations, arXiv 2411.00640 sec. 5.
    """
    both = sorted(first.keys() & second.keys())
    assert both, "no problem is in both evaluations"
    difference_P = np.array([first[name] - second[name] for name in both], dtype=np.float64)
    varies = difference_P.min() < difference_P.max()
    per_deviation = (NORMAL.inv_cdf(0.975) + NORMAL.inv_cdf(0.8)) / math.sqrt(len(both))
    return Comparison(
        mean_interval(difference_P, rng, level=level, resamples=resamples),
        per_deviation * float(difference_P.std(ddof=1)) if varies else None,
        tuple(sorted(first.keys() - second.keys())),
        tuple(sorted(second.keys() - first.keys())),
    )


def expected_pass_at_k(rates: Rates, k: int) -> float:
    """E[1 - (1-p)^k] for p ~ Beta(a, b): 1 - Π_{j<k} (b+j) / (a+b+j)."""
    a, b = rates
    return 1 - math.prod((b + j) / (a + b + j) for j in range(k))


def simulate_coverage(
    problems: int,
    samples: int,
    rates: Rates,
    k: int,
    repetitions: int,
    rng: np.random.Generator,
    *,
    other: Rates | None = None,
    changed: float = 1.0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Coverage:
    """How often the interval holds the expected mean over the population that the problems are drawn from.

    Each repetition draws the problems' solve rates from Beta(a, b), the samples of each, and makes the interval of pass@k
    (k = 1: of mean@samples). other: of the difference between two such evaluations of the same problems, the second
    with the share `changed` of the rates drawn anew from this distribution.
    """
    truth = expected_pass_at_k(rates, k)
    if other is not None:
        truth = changed * (truth - expected_pass_at_k(other, k))
    n_P = np.full(problems, samples)
    covered = reliable = 0
    for _ in range(repetitions):
        rate_P = rng.beta(*rates, problems)
        value_P = pass_at_k_values(n_P, rng.binomial(samples, rate_P), k)
        if other is not None:
            moved_P = np.where(rng.random(problems) < changed, rng.beta(*other, problems), rate_P)
            value_P = value_P - pass_at_k_values(n_P, rng.binomial(samples, moved_P), k)
        found = mean_interval(value_P, rng, level=level, resamples=resamples)
        covered += found.low <= truth <= found.high
        reliable += found.reliable
    return Coverage(truth, covered / repetitions, reliable / repetitions)
