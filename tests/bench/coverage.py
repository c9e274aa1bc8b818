"""How often the 95 % intervals of evaluations hold the truth, in simulation: the table behind `intervals.MEASURED`.

    python tests/bench/coverage.py [--repetitions 10000]

Solve rates are Beta(a, 1-a), most problems nearly always or nearly never solved, with the a that gives the metric the
row's value; 8 samples a problem; 2000 resamples an interval. A paired row compares two evaluations of the same problems
of which the share `changed` was drawn anew from the second value's rates. Every row of 10 000 repetitions has a standard
error of 0.2 % at 95 %. Behind each coverage: the share of the intervals that was not marked as unreliable.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from clipctl.intervals import MEASURED, Coverage, Rates, expected_pass_at_k, simulate_coverage

SAMPLES = 8
METRICS = {"mean@8": 1, "pass@8": 8}


@dataclass(frozen=True)
class Row:
    """kind: the key of MEASURED, or None for evaluations whose intervals are relied on."""

    kind: str | None
    problems: int
    value: float
    second: float | None = None
    changed: float = 1.0


ROWS = [
    Row(None, 200, 0.5),
    Row(None, 500, 0.5),
    Row(None, 1319, 0.5),
    Row(None, 100, 0.5),
    Row(None, 200, 0.2),
    Row(None, 200, 0.9),
    Row(None, 200, 0.5, 0.6),
    Row("few problems", 30, 0.5),
    Row("few problems", 30, 0.3),
    Row("few problems", 30, 0.5, 0.6),
    Row("few problems, nearly all alike", 30, 2 / 30),
    Row("few problems, nearly all alike", 30, 0.5, 0.9, 0.1),
    Row("few problems, all alike", 30, 0.1 / 30),
    Row("nearly all alike", 200, 0.98),
    Row("nearly all alike", 200, 0.02),
    Row("nearly all alike", 200, 0.995),
    Row("nearly all alike", 100, 0.98),
    Row("all alike", 200, 0.999),
]


def rates_of(value: float, k: int) -> Rates:
    """Beta(a, 1-a) whose expected pass@k is the value: by halving, as it rises with a."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_pass_at_k((middle, 1 - middle), k) < value else (low, middle)
    return low, 1 - low


def measure(row: Row, k: int, repetitions: int) -> Coverage:
    other = None if row.second is None else rates_of(row.second, k)
    rng = np.random.default_rng([row.problems, k, round(1e6 * row.value)])
    return simulate_coverage(
        row.problems, SAMPLES, rates_of(row.value, k), k, repetitions, rng, other=other, changed=row.changed
    )


def main(repetitions: int) -> None:
    print(f"{'problems':>8}  {'value':<26}{'mean@8':<20}{'pass@8':<20}kind")
    found: dict[str, list[float]] = {}
    for row in ROWS:
        cells = []
        for k in METRICS.values():
            coverage = measure(row, k, repetitions)
            cells.append(f"{100 * coverage.covered:5.1f} % ({100 * coverage.reliable:3.0f} %)")
            found.setdefault(row.kind or "", []).append(coverage.covered)
        value = f"{row.value:.4f}" if row.second is None else f"{row.value} and {row.second}, {row.changed:.0%} changed"
        print(f"{row.problems:8d}  {value:<26}{cells[0]:<20}{cells[1]:<20}{row.kind or 'relied on'}", flush=True)
    for kind in MEASURED:
        print(f'    "{kind}": ({min(found[kind]):.3f}, {max(found[kind]):.3f}),')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10_000)
    main(parser.parse_args().repetitions)
