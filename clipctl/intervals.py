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

RESAMPLES = 10_000
CHUNK_ELEMENTS = 1 << 20
"""Counts held at once while resampling (8 MiB)."""
NORMAL = NormalDist()


def mean_at_k_values(num_samples_P: Ints, num_correct_P: Ints) -> Floats:
    """mean@k of each problem: correct / samples. Problems may differ in their number of samples."""
    return pass_at_k_values(num_samples_P, num_correct_P, 1)


def pass_at_k_values(num_samples_P: Ints, num_correct_P: Ints, k: int) -> Floats:
    """pass@k of each problem, unbiased: 1 - C(n-c, k) / C(n, k), with n samples of which c are correct; 1 ≤ k ≤ every n.

    Problems may differ in n: k is the same for all, so one with n < k must not come here. Source: arXiv 2107.03374 eq. 1.
    """
    return _pass_values(num_samples_P, num_correct_P, k)[k - 1]


def pass_curve(num_samples_P: Ints, num_correct_P: Ints) -> dict[int, float]:
    """pass@k, averaged over problems, of every k from 1 to the smallest number of samples that a problem has."""
    values_KP = _pass_values(num_samples_P, num_correct_P, int(np.min(num_samples_P)))
    return {k: float(value) for k, value in enumerate(values_KP.mean(1), start=1)}


def _pass_values(num_samples_P: Ints, num_correct_P: Ints, up_to: int) -> Floats:
    """pass@1 … pass@up_to [K,P]: pass_k = pass_{k-1} + (1 - pass_{k-1})·c/(n-k+1), the first success in draw k.

    The draws are without replacement, so this is 1 - C(n-c, k)/C(n, k); terms are positive and nothing cancels.
    """
    n_P, c_P = np.asarray(num_samples_P, dtype=np.int64), np.asarray(num_correct_P, dtype=np.int64)
    assert n_P.ndim == 1
    assert n_P.shape == c_P.shape
    assert n_P.size > 0
    assert 1 <= up_to <= n_P.min(), f"k = {up_to}, and a problem has {n_P.min()} samples"
    assert ((c_P >= 0) & (c_P <= n_P)).all()
    rows, value_P = [], np.zeros(n_P.size)
    for drawn in range(up_to):
        # With fewer wrong samples than draws a success is certain and c/(n-k+1) is above 1.
        value_P = value_P + (1 - value_P) * np.minimum(c_P / (n_P - drawn), 1.0)
        rows.append(value_P)
    return np.stack(rows)


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


def bca_interval(
    values_P: Floats, rng: np.random.Generator, *, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The mean of one value a problem and its BCa bootstrap interval over problems: (value, low, high).

    The end for z = ±Φ⁻¹((1+level)/2) is the quantile Φ(z0 + (z0+z) / (1 - a(z0+z))) of the B resampled means, where
    Φ(z0) is the share of them below the mean (ties count half) and a = Σ d³ / (6 (Σ d²)^1.5), d = value - mean, is the
    acceleration (the jackknife's, which has this form for a mean). Values that are all equal give (value, value, value).
    Source: Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82:171, eq. 2.3 and 6.6.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    assert values_P.ndim == 1
    assert values_P.size > 0
    assert np.isfinite(values_P).all()
    assert 0 < level < 1
    assert resamples > 0
    distinct_U, count_U = np.unique(values_P, return_counts=True)
    if distinct_U.size == 1:
        return (float(distinct_U[0]),) * 3
    problems = values_P.size
    value = math.fsum(distinct_U * count_U) / problems
    # About the mean, so that ties are seen whatever the size of the values.
    from_mean_U = distinct_U - value
    shift_B = np.sort(_resampled_means(from_mean_U, count_U, rng, resamples))
    scale = float(np.abs(from_mean_U).max())
    below, not_above = np.searchsorted(shift_B, [-1e-12 * scale, 1e-12 * scale])
    share = (below + not_above) / (2 * resamples)
    z0 = NORMAL.inv_cdf(min(max(share, 0.5 / resamples), 1 - 0.5 / resamples))
    scaled_U = from_mean_U / scale
    acceleration = float((count_U * scaled_U**3).sum() / (6 * (count_U * scaled_U**2).sum() ** 1.5))
    half = NORMAL.inv_cdf((1 + level) / 2)
    ends = [NORMAL.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z))) for z in (-half, half)]
    low, high = np.quantile(shift_B, ends)
    return value, value + float(low), value + float(high)


def _resampled_means(distinct_U: Floats, count_U: Ints, rng: np.random.Generator, resamples: int) -> Floats:
    """Means of P draws with replacement [B]: how often each distinct value is drawn is multinomial."""
    problems = int(count_U.sum())
    step = max(1, CHUNK_ELEMENTS // distinct_U.size)
    parts = [
        rng.multinomial(problems, count_U / problems, size=min(step, resamples - start)) @ distinct_U
        for start in range(0, resamples, step)
    ]
    return np.asarray(np.concatenate(parts) / problems)
