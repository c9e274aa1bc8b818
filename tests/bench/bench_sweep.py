"""What a sweep costs beyond its runs: 20 tiny runs with --jobs 2, against half the sum of the runs.

    python tests/bench/bench_sweep.py [--runs 20] [--jobs 2] [--alone 5]

Two sums are taken: of the same runs as commands of their own, `clipctl train`, of which `--alone` are timed before the sweep
and as many after it, so that what else the machine does falls on both; and of the processes of the sweep itself, from start
to end, the first ones of which wait for what all of them import.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

TINY = ["run.steps=3", "rollout.prompts=8", "data.arith.problems=64", "optim.epochs=1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def timed(folder: Path, *arguments: str) -> tuple[float, str]:
    """Seconds of a command, and what it said on stderr."""
    sets = [word for text in TINY for word in ("--set", text)]
    started = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "clipctl", *arguments, "--preset", "tiny", *sets],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return perf_counter() - started, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--alone", type=int, default=5)
    asked = parser.parse_args()
    with TemporaryDirectory() as place:
        alone = [
            timed(Path(place), "train", "--seed", str(seed), "--runs-dir", "alone")[0] for seed in range(asked.alone)
        ]
        wall, said = timed(Path(place), "sweep", "--seeds", str(asked.runs), "--jobs", str(asked.jobs))
        alone += [
            timed(Path(place), "train", "--seed", str(seed), "--runs-dir", "alone")[0]
            for seed in range(asked.alone, 2 * asked.alone)
        ]
    inside = [float(seconds) for seconds in re.findall(r"finished, 3 rollouts, ([0-9.]+) s", said)]
    assert len(inside) == asked.runs, said
    commands = asked.runs * sum(alone) / len(alone)
    print(f"sweep of {asked.runs} runs, {asked.jobs} at once: {wall:.1f} s")
    for what, total in (("as commands", commands), ("its processes", sum(inside))):
        print(f"{what}: {total:.1f} s in all; the sweep takes {wall / (total / asked.jobs):.2f} of that / {asked.jobs}")


if __name__ == "__main__":
    main()
