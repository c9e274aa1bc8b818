"""What formulas that hang cost, and what many gradings do to memory.

    python tests/bench/bench_grading.py hanging
    python tests/bench/bench_grading.py memory [--gradings 10000]

Hanging: 512 completions of which 8 hang, at a limit of 1 s on two workers, against the other 504 alone, in turns, in pools
that have not seen them. The bound is 8 × limit ÷ workers + 2 s. Memory: resident sizes of the server and of its largest
worker after 1/10, 1/2 and all of the gradings, every one a formula of its own. sympy counts with gmpy2 where that is
installed, which the first line says.
"""

import argparse
import os
import statistics
import sys
from importlib.util import find_spec
from time import perf_counter

import psutil

from clipctl.answers import Outcome
from clipctl.rewards import GradingPool

LIMIT, WORKERS, COMPLETIONS = 1, 2, 512
HANGING = (
    r"\boxed{9^{9^{9^9}}}", r"\boxed{10^{10^{10}}}", r"\boxed{\binom{10^9}{5\cdot 10^8}}", r"\boxed{10000000!}",
    r"\boxed{\Gamma(10^9)}", r"\boxed{\sum_{k=1}^{10^{12}} 1/k}", r"\boxed{3^{10^9}+1}", r"so it is 9**9**9**9",
)  # fmt: skip
FRACTION = (r"\frac{{{0}}}{{{1}}}", r"\boxed{{\frac{{{2}}}{{{3}}}}}")
KINDS = (
    FRACTION,
    FRACTION,
    (r"x^2+{0}x+{1}", r"\boxed{{x({0}+x)+{1}}}"),
    (r"\{{{0},{1}\}}", r"Answer: $\{{{1}, {0}\}}$"),
)


def honest(number: int, kind: tuple[str, str]) -> tuple[str, str]:
    """(completion, gold) that no other number has; right, and not for the comparison of texts to see."""
    gold, completion = kind
    values = (number, number + 1, 2 * number, 2 * number + 2)
    return completion.format(*values), gold.format(*values)


def grade_all(pool: GradingPool, pairs: list[tuple[str, str]]) -> list[Outcome]:
    return pool.grade_many("math", [completion for completion, _ in pairs], [gold for _, gold in pairs])


def hanging(repeats: int) -> bool:
    """Prints the times and says whether the bound held in every turn."""
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        turn = []
        for hang in (0, len(HANGING)):
            pairs = [honest(number, FRACTION) for number in range(1, COMPLETIONS - len(HANGING) + 1)]
            for at in range(hang):
                pairs.insert(at * COMPLETIONS // len(HANGING), (HANGING[at], "4"))
            with GradingPool(WORKERS, LIMIT) as pool:
                started = perf_counter()
                outcomes = grade_all(pool, pairs)
                turn.append(perf_counter() - started)
            assert outcomes.count("correct") == COMPLETIONS - len(HANGING)
            assert len(outcomes) - outcomes.count("correct") == hang
        seconds.append((turn[0], turn[1]))
    bound = len(HANGING) * LIMIT / WORKERS + 2
    more = [after - before for before, after in seconds]
    without, with_ = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"504 completions: {without:.2f} s; with 8 that hang: {with_:.2f} s")
    print(f"more: {', '.join(f'{value:.2f}' for value in more)} s; bound {bound:.0f} s")
    return max(more) <= bound


def memory(gradings: int) -> None:
    """Prints resident sizes in MB as gradings go on."""
    marks = {gradings // 10, gradings // 2, gradings}
    pairs = [honest(number, KINDS[number % len(KINDS)]) for number in range(1, gradings + 1)]
    step = max(1, gradings // 10)
    with GradingPool(WORKERS, 5) as pool:
        me = psutil.Process()
        print("gradings  server  largest worker  this process   (MB)", flush=True)
        for start in range(0, gradings, step):
            outcomes = grade_all(pool, pairs[start : start + step])
            assert set(outcomes) == {"correct"}, set(outcomes)
            if start + step in marks:
                (server,) = me.children()
                sizes = [process.memory_info().rss / 1e6 for process in (server, *server.children(), me)]
                print(f"{start + step:8d}  {sizes[0]:6.0f}  {max(sizes[1:-1]):14.0f}  {sizes[-1]:12.0f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["hanging", "memory"])
    parser.add_argument("--gradings", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"gmpy2 {'installed' if find_spec('gmpy2') else 'not installed'}, {os.cpu_count()} cores")
    if options.part == "memory":
        memory(options.gradings)
        return 0
    return 0 if hanging(options.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
