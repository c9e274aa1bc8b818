"""What looking at many runs costs: the overview as a whole process, and an aggregate over token rows against pandas.

    python tests/bench/bench_analyze.py overview [--runs 200 --rollouts 500 --updates 16]
    python tests/bench/bench_analyze.py tokens [--rows 100000000]

Runs are generated in a temporary folder as a finished run leaves them. `overview` is `clipctl analyze` from start to exit,
every line of output included, the median of three. `tokens` groups by outcome of clipping the mean entropy of all token
rows; clipctl and pandas take turns on the same Parquet files, pandas reading only the columns that it needs.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from clipctl import open_runs
from clipctl.journal import RunWriter, create_run
from clipctl.schema import arrow_schema
from clipctl.segments import write_segment
from clipctl.spec import load_spec, spec_json

QUERY = "select clip_high > 0 as clipped, count(*) as n, avg(entropy) as entropy from tokens group by 1 order by 1"
SEGMENT = 1_000_000
"""Token rows of one rollout."""


def columns(rng: np.random.Generator, table: str, rows: int, run: str, **given: np.ndarray) -> pa.Table:
    """Random numbers of the table's types, but for the columns given."""
    made = {}
    for field in arrow_schema(table):
        if field.name in given:
            made[field.name] = pa.array(given[field.name]).cast(field.type)
        elif pa.types.is_floating(field.type):
            made[field.name] = pa.array(rng.random(rows)).cast(field.type)
        elif pa.types.is_integer(field.type):
            made[field.name] = pa.array(rng.integers(1, 50, rows)).cast(field.type)
        elif pa.types.is_timestamp(field.type):
            made[field.name] = pa.array(np.arange(rows) * 1_000_000).cast(field.type)
        elif pa.types.is_boolean(field.type):
            made[field.name] = pa.array(rng.random(rows) < 0.5)
        else:
            made[field.name] = pa.array([run if field.name == "run_id" else "x"] * rows)
    return pa.table(made)


def start(root: Path, name: str, seed: int) -> RunWriter:
    return create_run(root, name, spec_json(load_spec("tiny", {"run.seed": seed})), "tiny")


def generate_runs(root: Path, runs: int, rollouts: int, updates: int) -> None:
    rng = np.random.default_rng(0)
    attempt = np.zeros(rollouts, dtype=np.int32)
    place = np.arange(rollouts)
    for number in range(runs):
        name = f"run-{number:03d}"
        writer = start(root, name, number)
        writer.close("finished", "")
        entropy = 100 * np.exp(-place / 300) + rng.random(rollouts)
        rows = {
            "rollouts": columns(
                rng, "rollouts", rollouts, name, attempt=attempt, rollout=place,
                entropy_response_sum=entropy, responses_scored=np.full(rollouts, 64),
            ),
            "updates": columns(
                rng, "updates", rollouts * updates, name, attempt=np.repeat(attempt, updates),
                rollout=np.repeat(place, updates), inner_step=np.tile(np.arange(updates), rollouts),
            ),
        }  # fmt: skip
        with duckdb.connect(str(writer.folder / "metrics.duckdb")) as store:
            for table, part in rows.items():
                store.register("part", part)
                store.execute(f"insert into {table} by name select * from part")
                store.unregister("part")


def overview(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "runs"
        generate_runs(root, options.runs, options.rollouts, options.updates)
        command = [sys.executable, "-m", "clipctl", "analyze", str(root), "--format", options.format]
        seconds, busy, peak = [], [], 0
        for _ in range(3):
            started = perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, status
            seconds.append(perf_counter() - started)
            busy.append(usage.ru_utime + usage.ru_stime)
            peak = max(peak, usage.ru_maxrss)
        print(
            f"{options.runs} runs × {options.rollouts} rollouts × {options.updates} updates: "
            f"{statistics.median(seconds):.2f} s, {statistics.median(busy):.2f} s of processor time, peak {peak / 1024:.0f} MB"
        )


def generate_tokens(root: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    writer = start(root, "tokens", 0)
    journal = writer.folder / "journal"
    for rollout in range(-(-rows // SEGMENT)):
        size = min(SEGMENT, rows - rollout * SEGMENT)
        at = {"attempt": np.zeros(size, dtype=np.int32), "rollout": np.full(size, rollout)}
        clips = rng.integers(0, 2, size)
        part = columns(rng, "tokens", size, "tokens", clip_high=clips, **at)
        write_segment(
            journal,
            f"tokens-000-{rollout:06d}",
            "tokens",
            {name: part[name].combine_chunks() for name in part.column_names},
        )
        row = columns(rng, "rollouts", 1, "tokens", attempt=np.zeros(1, dtype=np.int32), rollout=np.array([rollout]))
        write_segment(
            journal,
            f"rollouts-000-{rollout:06d}",
            "rollouts",
            {name: row[name].combine_chunks() for name in row.column_names},
        )
    writer.close("finished", "")


def with_clipctl(root: Path) -> list[float]:
    with open_runs(root) as runs:
        return [row["entropy"] for row in runs.sql(QUERY).to_arrow_table().to_pylist()]


def with_pandas(root: Path) -> list[float]:
    files = sorted((root / "tokens" / "journal").glob("tokens-*.parquet"))
    frame = pd.concat([pd.read_parquet(file, columns=["clip_high", "entropy"]) for file in files])
    return list(frame.assign(clipped=frame["clip_high"] > 0).groupby("clipped")["entropy"].mean())


def tokens(options: argparse.Namespace) -> None:
    """In turns, each in a fork of its own so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "runs"
        generate_tokens(root, options.rows)
        ways: dict[str, Callable[[Path], list[float]]] = {"clipctl": with_clipctl, "pandas": with_pandas}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks = dict.fromkeys(ways, 0.0)
        for _ in range(options.repeats):
            for name in ways:
                command = [sys.executable, __file__, "one", "--way", name, "--root", str(root)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took, peak, *means = map(float, done.stdout.split())
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
                assert all(abs(mean - 0.5) < 0.01 for mean in means), means
        ratio = statistics.median(b / a for a, b in zip(seconds["clipctl"], seconds["pandas"], strict=True))
        print(
            f"{options.rows:.0e} token rows: pandas takes {ratio:.1f} × as long; "
            + ", ".join(f"{name} {statistics.median(seconds[name]):.2f} s, peak {peaks[name]:.0f} MB" for name in ways)
        )


def one(options: argparse.Namespace) -> None:
    way = {"clipctl": with_clipctl, "pandas": with_pandas}[options.way]
    started = perf_counter()
    means = way(options.root)
    took = perf_counter() - started
    print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, *means)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overview", "tokens", "one"])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--format", default="json")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=["clipctl", "pandas"])
    parser.add_argument("--root", type=Path)
    chosen = parser.parse_args()
    {"overview": overview, "tokens": tokens, "one": one}[chosen.what](chosen)
