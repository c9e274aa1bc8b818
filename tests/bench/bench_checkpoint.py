"""What a checkpoint costs: seconds to save and to read it again, and its share of a rollout.

    python tests/bench/bench_checkpoint.py [--case tiny smollm2-arith] [--rollouts 3]

A run as its preset has it, but for `checkpoint.every = 1` and so many rollouts: a rollout's time is what the store has of it
(sampling, rewards, scoring, updates), a checkpoint's is taken around `train.save_checkpoint`, with fsync, hashes and the removal
of the one before; both are medians of the same run, so what else the machine does falls on both. Reading is the check of all
hashes, as a run that goes on does it. One thread unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import os
import statistics
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import clipctl
from clipctl.checkpoint import damage, places

CASES = ("tiny", "smollm2-arith")


def measure(case: str, rollouts: int, runs: Path) -> None:
    main_path: Any = import_module("clipctl.train")
    save, saved = main_path.save_checkpoint, []

    def timed(*arguments: Any) -> None:
        started = perf_counter()
        save(*arguments)
        saved.append(perf_counter() - started)

    main_path.save_checkpoint = timed
    try:
        spec = clipctl.load_spec(case, {"run.steps": rollouts, "checkpoint.every": 1, "checkpoint.keep": 2})
        folder = clipctl.train(spec, runs_dir=runs)
    finally:
        main_path.save_checkpoint = save
    columns = "seconds_sample + seconds_reward + seconds_score + seconds_update"
    with clipctl.open_runs(folder) as found:
        seconds = [row[0] for row in found.sql(f"select {columns} from rollouts").fetchall()]
    newest = folder / "checkpoints" / str(places(folder / "checkpoints")[0])
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    started = perf_counter()
    assert damage(newest) is None
    checked = perf_counter() - started
    one, rollout = statistics.median(saved), statistics.median(seconds)
    print(
        f"{case}: {size / 2**20:.1f} MiB in {one:.3f} s, {100 * one / rollout:.1f} % of a rollout of {rollout:.2f} s; "
        f"checked in {checked:.3f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rollouts", type=int, default=3)
    options = parser.parse_args()
    for case in options.case:
        with TemporaryDirectory() as scratch:
            measure(case, options.rollouts, Path(scratch))
