"""Every gold answer of the benchmarks against itself in typical wrappings, and against another one's.

    CLIPCTL_DATA=FOLDER python tests/bench/golds.py [--shuffles 5]

FOLDER holds `<task>/test.jsonl`. Prints the table of counts, then every gold that is not graded `correct` in a wrapping,
and every other gold that is graded `correct` though it is another text and another number. Ends with 1 if there are any.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from clipctl.grading_worker import Workers, parse_golds
from clipctl.rewards import GradingPool
from clipctl.spec import Data
from clipctl.tasks import TASKS, load_problems

BENCHMARKS = ("gsm8k", "math500", "amc23", "aime24", "aime25")
WRAPPINGS = (r"The answer is \boxed{GOLD}.", "#### GOLD", "Answer: GOLD")


def load_golds(task: str) -> list[str]:
    """The gold answers of a benchmark's test split, read and checked as an evaluation does."""
    return [problem.answer for problem in load_problems(Data(task=task, split="test"))]


def same(one: str, other: str) -> bool:
    """Whether two golds are one number or one text; independent of the graders."""
    try:
        return Decimal(one.replace(",", "")) == Decimal(other.replace(",", ""))
    except InvalidOperation:
        return "".join(one.split()) == "".join(other.split())


def against_themselves(pool: GradingPool, grader: str, golds: Sequence[str], wrapping: str) -> list[str]:
    """The golds that are not graded `correct` in the wrapping, each with its outcome."""
    outcomes = pool.grade_many(grader, [wrapping.replace("GOLD", gold) for gold in golds], golds)
    return [
        f"{wrapping.replace('GOLD', gold)!r} is {outcome}"
        for gold, outcome in zip(golds, outcomes, strict=True)
        if outcome != "correct"
    ]


def against_others(
    pool: GradingPool, grader: str, golds: Sequence[str], wrapping: str, seed: int
) -> tuple[int, int, list[str]]:
    """(graded otherwise than `correct`, graded `correct` and the same, exceptions) of the golds in another order."""
    others = random.Random(seed).sample(golds, len(golds))
    outcomes = pool.grade_many(grader, [wrapping.replace("GOLD", other) for other in others], golds)
    graded = list(zip(others, golds, outcomes, strict=True))
    exceptions = [
        f"{other!r} against {gold!r} is {outcome}"
        for other, gold, outcome in graded
        if same(other, gold) != (outcome == "correct") or outcome in ("timeout", "crash", "too_long")
    ]
    wrong = sum(outcome != "correct" for outcome in outcomes)
    equal = sum(same(other, gold) and outcome == "correct" for other, gold, outcome in graded)
    return wrong, equal, exceptions


def by_formula_alone(golds: Sequence[str]) -> list[str]:
    """The golds that Math-Verify does not find equal to themselves, without the comparison of texts that comes first."""
    with Workers(2, 5) as workers:
        parsed = parse_golds(workers, golds)
        outcomes = workers.run([("grade", parsed[gold], "boxed", gold) for gold in golds])
    return [f"{gold!r} is {outcome}" for gold, outcome in zip(golds, outcomes, strict=True) if outcome != "correct"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shuffles", type=int, default=5, help="orders in which golds meet other golds")
    shuffles = parser.parse_args().shuffles
    exceptions: list[str] = []
    print("| Benchmark | Grader | Golds | boxed | #### | Answer: | Math-Verify alone | others: wrong | the same |")
    print("|---|---|---|---|---|---|---|---|---|")
    with GradingPool(workers=2, timeout=5) as pool:
        for task in BENCHMARKS:
            golds, grader = load_golds(task), TASKS[task].grader
            assert grader is not None
            cells = [task, grader, str(len(golds))]
            for wrapping in WRAPPINGS:
                found = against_themselves(pool, grader, golds, wrapping)
                exceptions += [f"{task}: {line}" for line in found]
                cells.append(f"{len(golds) - len(found)}")
            found = by_formula_alone(golds) if grader == "math" else []
            exceptions += [f"{task}, by Math-Verify alone: {line}" for line in found]
            cells.append(str(len(golds) - len(found)) if grader == "math" else "")
            orders = [
                against_others(pool, grader, golds, WRAPPINGS[seed % len(WRAPPINGS)], seed) for seed in range(shuffles)
            ]
            exceptions += [f"{task}, another's gold: {line}" for order in orders for line in order[2]]
            cells += [str(sum(wrong for wrong, _, _ in orders)), str(sum(equal for _, equal, _ in orders))]
            print("| " + " | ".join(cells) + " |", flush=True)
    print("\n".join(["", *exceptions]) if exceptions else "\nno exceptions")
    return 1 if exceptions else 0


if __name__ == "__main__":
    sys.exit(main())
