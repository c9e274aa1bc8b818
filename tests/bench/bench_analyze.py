"""What looking at many runs costs: views and charts as whole processes, and an aggregate over token rows against pandas.

    python tests/bench/bench_analyze.py overview [--runs 200 --rollouts 500 --updates 16]
    python tests/bench/bench_analyze.py what-if [the same]
    python tests/bench/bench_analyze.py charts [the same]
    python tests/bench/bench_analyze.py tokens [--rows 100000000]

Runs are generated in a temporary folder as a finished run leaves them. `overview` is `clipctl analyze` from start to exit,
every line of output included, the median of three; `what-if` and `charts` are other views of such runs. `tokens` groups
by outcome of clipping the mean entropy of all token rows; clipctl and pandas take turns on the same Parquet files, pandas
reading only the columns that it needs.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

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


def journal_rows(journal: Path, table: str, rows: pa.Table) -> None:
    """All rows of a table as one segment of the journal, as if of rollout 0."""
    write_segment(
        journal, f"{table}-000-000000", table, {name: rows[name].combine_chunks() for name in rows.column_names}
    )


def generate_run(root: Path, name: str, seed: int, rollouts: int, updates: int, bins: int = 0) -> Path:
    """A finished run: every update, a probe a rollout, and, for what-if, `bins` bins of the ratio an update."""
    rng = np.random.default_rng(seed)
    writer = start(root, name, seed)
    place, of_update = np.arange(rollouts), np.repeat(np.arange(rollouts), updates)
    steps = np.tile(np.arange(updates), rollouts)
    entropy = 100 * np.exp(-place / 300) + rng.random(rollouts)
    given: dict[str, dict[str, np.ndarray]] = {
        "updates": {"rollout": of_update, "inner_step": steps},
        "probes": {"rollout": place, "inner_step": np.full(rollouts, updates - 1)},
        "rollouts": {"rollout": place, "entropy_response_sum": entropy, "responses_scored": np.full(rollouts, 64)},
    }
    if bins:
        edges = np.geomspace(0.1, 10, bins // 2 + 1)
        given["histograms"] = {
            "rollout": np.repeat(of_update, bins), "inner_step": np.repeat(steps, bins),
            "advantage_sign": np.tile([-1, 1], len(steps) * bins // 2),
            "ratio_from": np.tile(np.repeat(edges[:-1], 2), len(steps)),
            "ratio_to": np.tile(np.repeat(edges[1:], 2), len(steps)),
        }  # fmt: skip
    for table in sorted(given, key=lambda table: table == "rollouts"):
        size = len(given[table]["rollout"])
        of_run = {"attempt": np.zeros(size, dtype=np.int32), **given[table]}
        journal_rows(writer.folder / "journal", table, columns(rng, table, size, name, **of_run))
    writer.close("finished", "")
    return writer.folder


def generate_runs(root: Path, runs: int, rollouts: int, updates: int, bins: int = 0) -> None:
    """As many runs; with bins, which take long to make, all but the first have the rows of the first."""
    first = generate_run(root, "run-000", 0, rollouts, updates, bins)
    for number in range(1, runs):
        if not bins:
            generate_run(root, f"run-{number:03d}", number, rollouts, updates)
            continue
        writer = start(root, f"run-{number:03d}", number)
        writer.close("finished", "")
        shutil.copy(first / "metrics.duckdb", writer.folder / "metrics.duckdb")


def overview(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        generate_runs(Path(place), options.runs, options.rollouts, options.updates)
        timed(options, [place, "--format", options.format])


def whatif(options: argparse.Namespace) -> None:
    """Bins as many as runs of the preset `tiny` have."""
    with tempfile.TemporaryDirectory() as place:
        generate_runs(Path(place), options.runs, options.rollouts, options.updates, bins=56)
        timed(options, [place, "--view", "what-if", "--format", options.format])


def charts(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        generate_runs(Path(place), options.runs, options.rollouts, options.updates)
        for view in ("overview", "entropy", "clip", "ledger", "compare"):
            timed(options, [place, "--view", view, "--plot", f"{place}/{view}.svg", "--format", "csv"], view)


def timed(options: argparse.Namespace, arguments: list[str], what: str = "") -> None:
    """`clipctl analyze` as whole processes: the median of three."""
    command = [sys.executable, "-m", "clipctl", "analyze", *arguments]
    seconds, busy, peak = [], [], 0
    for _ in range(options.repeats):
        started = perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        seconds.append(perf_counter() - started)
        busy.append(usage.ru_utime + usage.ru_stime)
        peak = max(peak, usage.ru_maxrss)
    print(
        f"{what or options.what}, {options.runs} runs × {options.rollouts} rollouts × {options.updates} updates: "
        f"{statistics.median(seconds):.2f} s, {statistics.median(busy):.2f} s of processor time, peak {peak / 1024:.0f} MB",
        flush=True,
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
    parser.add_argument("what", choices=["overview", "what-if", "charts", "tokens", "one"])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--format", default="json")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=["clipctl", "pandas"])
    parser.add_argument("--root", type=Path)
    chosen = parser.parse_args()
    {"overview": overview, "what-if": whatif, "charts": charts, "tokens": tokens, "one": one}[chosen.what](chosen)
