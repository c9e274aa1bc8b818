"""The numbers of an evaluation from its rows: mean@k, pass@k for all k, cons@k, lengths, each with its interval over
problems; and two evaluations paired on the same problems. Pure; NumPy alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipctl.intervals import (
    Answer,
    Comparison,
    Interval,
    compare,
    cons_at_k_values,
    mean_at_k_values,
    mean_interval,
    pass_at_k_values,
)

GOLD = ("correct",)
"""The vote of all correct answers: they are one answer, however they are written."""


@dataclass(frozen=True, slots=True)
class ProblemSamples:
    """One problem's n samples. hash: of question and answer; answers: None where nothing was extracted."""

    hash: str
    correct: list[bool]
    tokens: list[int]
    truncated: list[bool]
    answers: list[str | None]


def by_problem(rows: Iterable[Mapping[str, Any]]) -> list[ProblemSamples]:
    """Rows of one evaluation's benchmark as problems, in the order of the dataset."""
    found: dict[int, ProblemSamples] = {}
    for row in sorted(rows, key=lambda row: (row["position"], row["sample"])):
        samples = found.setdefault(row["position"], ProblemSamples(row["problem_hash"], [], [], [], []))
        samples.correct.append(row["correct"])
        samples.tokens.append(row["tokens"])
        samples.truncated.append(row["truncated"])
        samples.answers.append(row["answer"])
    return list(found.values())


def _counts(problems: Sequence[ProblemSamples]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples and correct samples of each problem, [P]."""
    return (
        np.array([len(problem.correct) for problem in problems], dtype=np.int64),
        np.array([sum(problem.correct) for problem in problems], dtype=np.int64),
    )


def votes(problem: ProblemSamples) -> list[Answer]:
    """The samples as votes: a correct answer votes for the gold, any other for its own text."""
    return [
        (GOLD if correct else answer, correct) for correct, answer in zip(problem.correct, problem.answers, strict=True)
    ]


def samples_each(problems: Sequence[ProblemSamples]) -> int:
    """The smallest number of samples that a problem has: the largest k of pass@k."""
    return min(len(problem.correct) for problem in problems)


def pass_intervals(problems: Sequence[ProblemSamples]) -> dict[int, Interval]:
    """pass@k and its interval for every k from 1 to the smallest number of samples."""
    n_P, c_P = _counts(problems)
    return {k: mean_interval(pass_at_k_values(n_P, c_P, k), _rng()) for k in range(1, samples_each(problems) + 1)}


def summary(problems: Sequence[ProblemSamples]) -> dict[str, Interval]:
    """mean@n, cons@n, response tokens, truncated share and share without an answer, each a mean over problems."""
    n = samples_each(problems)
    values: dict[str, Sequence[float] | NDArray[np.float64]] = {
        f"mean@{n}": mean_at_k_values(*_counts(problems)),
        f"cons@{n}": cons_at_k_values([votes(problem) for problem in problems]),
        "response tokens": [float(np.mean(problem.tokens)) for problem in problems],
        "truncated": [float(np.mean(problem.truncated)) for problem in problems],
        "no answer": [problem.answers.count(None) / len(problem.answers) for problem in problems],
    }
    return {name: mean_interval(np.asarray(value_P, dtype=np.float64), _rng()) for name, value_P in values.items()}


def comparisons(first: Sequence[ProblemSamples], second: Sequence[ProblemSamples]) -> dict[str, Comparison] | None:
    """first - second in mean@k, pass@k at the largest k that both have, and cons, on the problems that both have; None
    where there are none. Problems are the same where question and answer are, whatever their place."""
    k = min(samples_each(first), samples_each(second))
    values: dict[str, Callable[[Sequence[ProblemSamples]], NDArray[np.float64]]] = {
        "mean": lambda problems: mean_at_k_values(*_counts(problems)),
        "cons": lambda problems: cons_at_k_values([votes(problem) for problem in problems]),
    }
    if k > 1:
        values[f"pass@{k}"] = lambda problems: pass_at_k_values(*_counts(problems), k)
    sides = [
        {name: dict(zip(_keys(problems), value(problems).tolist(), strict=True)) for name, value in values.items()}
        for problems in (first, second)
    ]
    if not sides[0]["mean"].keys() & sides[1]["mean"].keys():
        return None
    return {name: compare(sides[0][name], sides[1][name], _rng()) for name in values}


def _keys(problems: Sequence[ProblemSamples]) -> list[str]:
    """The problems' hashes; a problem that comes twice is numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for problem in problems:
        keys.append(f"{problem.hash}-{seen[problem.hash]}")
        seen[problem.hash] += 1
    return keys


def _rng() -> np.random.Generator:
    """The same resamples for every metric and every time: what is printed twice is the same."""
    return np.random.default_rng(0)
