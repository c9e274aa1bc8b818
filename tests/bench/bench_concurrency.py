"""Six runs that write and readers that poll them: no reader error, no write lost, and how long a flush takes with and without.

    python tests/bench/bench_concurrency.py [--seconds 60 --writers 6 --readers 2 --pause 1]

Writers commit rollouts of six tables (each file fsynced and renamed), with a pause for sampling and training between two;
a flush is `write_rollout` of rows that are ready, as a run waits for it. Readers make whole overviews, one after the other
without a pause. Spans without readers and with them take turns, so that both see the same files and the same machine, until
there were `--seconds` of each. Then one reader opens all runs and holds them, with an answer half taken, for as long again, in
which the runs end and are folded. At the end every rollout must be there once, with all its rows, and every reader must have
made many reads.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from test_store import SPEC, create_run, ledger_rows, rollout_row, samples, tables, update_rows  # noqa: E402

from clipctl import open_runs  # noqa: E402
from clipctl.limits import give_way  # noqa: E402
from clipctl.overview import overview  # noqa: E402

SPAN_SECONDS = 15.0
READS = 10
"""What every reader must make at least in all its spans."""
CHECKS = """
select (select count(*) from (select count(*) as n from updates group by run_id, rollout) where n <> 3),
    (select count(*) from runs where problem is not null)
"""


def run_writer(root: Path, name: str, pause: float) -> None:
    """Rollouts until the file `stop` is there; a line for each flush: when it began, how long it took."""
    writer = create_run(root / "runs", name, SPEC, "tiny")
    rollout = 0
    with (root / f"{name}.log").open("w", buffering=1) as log:
        while not (root / "stop").exists():
            ledger = {table: ledger_rows(table, rollout) for table in ("histograms", "probes")}
            rows = tables(update_rows(rollout), samples(2 * rollout), **ledger)
            row = rollout_row(rollout)
            began, started = time.time(), time.perf_counter()
            writer.write_rollout(rollout, row, rows)
            log.write(f"{began} {time.perf_counter() - started}\n")
            rollout += 1
            time.sleep(pause)
        started = time.perf_counter()
        writer.close("finished", "")
        log.write(f"fold {time.perf_counter() - started}\n")


def run_reader(root: Path, name: str) -> None:
    """Overviews as fast as it can until the file `<name>.stop` is there; a line for each: how long it took, and what was wrong
    with it, if anything. It gives way to the writers as `clipctl analyze` does."""
    give_way()
    with (root / f"{name}.reads").open("w", buffering=1) as log:
        while not (root / f"{name}.stop").exists():
            wrong, started = "", time.perf_counter()
            try:
                with open_runs(root / "runs") as runs:
                    overview(runs)
                    found = runs.sql(CHECKS).fetchall()
                    wrong = "" if found == [(0, 0)] else str(found)
            except Exception as error:  # whatever it is, it is counted
                wrong = f"{type(error).__name__}: {error}"
            log.write(f"{time.perf_counter() - started} {' '.join(wrong.split())}\n")


def run_holder(root: Path, seconds: float) -> None:
    """Holds all runs open, with an answer of which some rows were taken."""
    with open_runs(root / "runs") as runs:
        before = runs.sql("select count(*) from rollouts").fetchall()
        reader = runs.sql("select * from updates").to_arrow_reader(64)
        taken = next(reader).num_rows
        (root / "held").touch()
        time.sleep(seconds)
        taken += sum(batch.num_rows for batch in reader)
        assert taken >= 3 * before[0][0]


def start(root: Path, what: str, name: str, more: float) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "--part", what, "--root", str(root), "--name", name, "--more", str(more)]
    return subprocess.Popen(words)


def measure(root: Path, options: argparse.Namespace) -> None:
    writers = [start(root, "writer", f"run-{number}", options.pause) for number in range(options.writers)]
    while len(list(root.glob("*.log"))) < options.writers:
        time.sleep(0.1)
    time.sleep(2)
    spans: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    reads: dict[int, list[str]] = {number: [] for number in range(options.readers)}
    busy: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(max(1, round(options.seconds / SPAN_SECONDS))):
        for kind in spans:
            names = [f"reader-{turn}-{number}" for number in range(options.readers if kind == "with" else 0)]
            readers = [start(root, "reader", name, 0.0) for name in names]
            while not all((root / f"{name}.reads").exists() for name in names):
                time.sleep(0.1)
            began = time.time()
            time.sleep(SPAN_SECONDS)
            spans[kind].append((began, time.time()))
            busy[kind].append(os.getloadavg()[0])
            for name in names:
                (root / f"{name}.stop").touch()
            assert [reader.wait() for reader in readers] == [0] * len(readers)
            for number, name in enumerate(names):
                reads[number] += (root / f"{name}.reads").read_text().split("\n")[:-1]
    holder = start(root, "holder", "holder", options.seconds)
    while not (root / "held").exists():
        time.sleep(0.1)
    held_from = time.time()
    time.sleep(options.seconds / 2)
    (root / "stop").touch()
    assert [writer.wait() for writer in writers] == [0] * options.writers
    spans["held"] = [(held_from, time.time())]
    assert holder.wait() == 0
    loads = ", ".join(f"{kind} {statistics.mean(found):.1f}" for kind, found in busy.items())
    print(f"load of {os.cpu_count()} cores at the ends of the spans: {loads}")
    report(root, spans, reads)


def report(root: Path, spans: dict[str, list[tuple[float, float]]], reads: dict[int, list[str]]) -> None:
    lines = {file.stem: file.read_text().split("\n")[:-1] for file in root.glob("run-*.log")}
    flushes = [tuple(map(float, line.split())) for log in lines.values() for line in log if not line.startswith("fold")]
    medians = {}
    for kind, parts in spans.items():
        took = sorted(seconds for began, seconds in flushes if any(a <= began < b for a, b in parts))
        medians[kind] = statistics.median(took)
        late = took[int(0.95 * len(took))]
        print(f"{kind}: {len(took)} flushes, median {1e3 * medians[kind]:.0f} ms, 95 % {1e3 * late:.0f} ms")
    print(f"flush with readers / without: {medians['with'] / medians['without']:.2f}; while held: "
          f"{medians['held'] / medians['without']:.2f}")  # fmt: skip
    pairs = [line.split(" ", 1) for found in reads.values() for line in found]
    wrong = [what for _, what in pairs if what]
    counts = ", ".join(str(len(found)) for found in reads.values())
    took = [float(seconds) for seconds, _ in pairs]
    print(f"reads of each reader: {counts}; {statistics.median(took):.2f} s, at most {max(took):.2f} s; {len(wrong)} wrong: "
          f"{wrong[:3]}")  # fmt: skip
    folds = [float(line.split()[1]) for log in lines.values() for line in log if line.startswith("fold")]
    print(f"folds while held: {max(folds):.2f} s at most")
    written = {name: len(log) - 1 for name, log in lines.items()}
    with open_runs(root / "runs") as runs:
        stored = dict(runs.sql("select run_id, count(distinct rollout) from rollouts group by 1").fetchall())
        rows = runs.sql("select count(*), count(distinct (run_id, rollout)) from rollouts").fetchall()
        assert runs.sql(CHECKS).fetchall() == [(0, 0)]
    assert stored == written, (stored, written)
    assert rows == [(sum(written.values()),) * 2]
    print(f"{sum(written.values())} rollouts written, {rows[0][0]} stored")
    assert not wrong
    assert all(len(found) >= READS for found in reads.values()), counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--writers", type=int, default=6)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--part", choices=["writer", "reader", "holder"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--more", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part == "writer":
        run_writer(chosen.root, chosen.name, chosen.more)
    elif chosen.part == "reader":
        run_reader(chosen.root, chosen.name)
    elif chosen.part == "holder":
        run_holder(chosen.root, chosen.more)
    else:
        with tempfile.TemporaryDirectory() as place:
            measure(Path(place), chosen)
