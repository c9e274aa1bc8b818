"""The journal, the fold and the reader: what is committed stays readable, what is damaged is named."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from clipctl.errors import SpecError, StoreError
from clipctl.fold import fold
from clipctl.folder import list_segments, state_of
from clipctl.journal import RunWriter, create_run
from clipctl.lock import lock_run
from clipctl.metrics import METRICS
from clipctl.schema import SCHEMA_VERSION, SHARDS, TABLES
from clipctl.segments import digest
from clipctl.spec import load_spec, spec_json
from clipctl.store import Runs, open_runs
from clipctl.views import VIEWS

SPEC = spec_json(load_spec("tiny", {"clip.high": float("inf")}))
ENTROPIES_1 = [(0.546038, 8), (0.55644, 8)]
"""Entropy and responses of the rollouts in data/runs-schema-1.tar.gz."""
ENTROPIES_2 = [(0.546037, 8), (0.556641, 8)]
"""The same of data/runs-schema-2.tar.gz."""
SERIES = {
    "rollouts": "select * from rollouts order by rollout",
    "updates": "select * from updates order by rollout, inner_step",
    "samples": "select * from samples order by rollout, position, sample",
    "histograms": "select * from histograms order by rollout, inner_step",
    "probes": "select * from probes order by rollout, inner_step",
    "predictions": "select * from predictions order by predictor",
    "evaluations": "select * from evaluations order by eval_id, benchmark",
    "evals": "select * from evals order by eval_id, benchmark, position, sample",
    "events": "select kind, message, data, rollout from events order by time",
}


def rollout_row(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    row: dict[str, Any] = {
        name: int(rng.integers(1, 90)) for name in TABLES["rollouts"] if name not in ("rollout", "time")
    }
    return row | {name: float(rng.random()) for name in row if name.split("_")[0] in ("reward", "entropy", "seconds")}


def update_rows(seed: int, updates: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    ints = [name for name, kind in TABLES["updates"].items() if kind == "int64" and name != "rollout"]
    floats = [name for name, kind in TABLES["updates"].items() if kind == "float64"]
    return [
        {name: int(rng.integers(1, 50)) for name in ints}
        | {name: float(rng.random()) for name in floats}
        | {"inner_step": step, "noise_max": 0.0 if step == 0 else None}
        for step in range(updates)
    ]


def samples(seed: int, text: str = "so 3") -> dict[str, list[Any]]:
    return {
        "prompt_id": ["a", "a", "b"], "position": [seed, seed, seed + 1], "sample": [0, 1, 0], "reward": [1.0, 0.0, 0.5],
        "outcome": ["correct", "wrong", None], "advantage": [0.5, -0.5, 0.0], "tokens": [3, 4, 5],
        "truncated": [False, True, False], "entropy": [0.25, 0.5, None], "logprob_sum": [-1.0, -2.0, None],
        "clip_low": [0, 2, None], "clip_high": [1, 0, None], "text": [text, "", "7"],
    }  # fmt: skip


def by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def ledger_rows(table: str, seed: int) -> dict[str, list[Any]]:
    """Two rows of a table of the ledger, at inner steps 0 and 2; numbers of the network only at the second."""
    rng = np.random.default_rng(seed)
    kinds = {name: kind for name, kind in TABLES[table].items() if name != "rollout"}
    rows = [{name: rng.integers(1, 9) if "int" in kind else rng.random() for name, kind in kinds.items()} for _ in "ab"]
    bare = {name: None for name in kinds if name.startswith("network_")}
    return by_column([rows[0] | bare | {"inner_step": 0}, rows[1] | {"inner_step": 2}])


def tables(updates: list[dict[str, Any]], sampled: dict[str, list[Any]], **more: Any) -> dict[str, Any]:
    found = {
        "updates": by_column(updates),
        "samples": {name: values for name, values in sampled.items() if name != "text"},
        "texts": {name: sampled[name] for name in ("position", "sample", "text")},
        **more,
    }
    return {table: columns for table, columns in found.items() if columns}


def write(writer: RunWriter, rollout: int) -> None:
    ledger = {table: ledger_rows(table, rollout) for table in ("histograms", "probes")}
    writer.write_rollout(rollout, rollout_row(rollout), tables(update_rows(rollout), samples(2 * rollout), **ledger))


def write_many(writer: RunWriter, rollouts: int) -> None:
    for rollout in range(1, rollouts):
        write(writer, rollout)


def answers(path: Path) -> dict[str, list[Any]]:
    with open_runs(path) as runs:
        return {name: runs.sql(query).fetchall() for name, query in SERIES.items()}


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RunWriter]:
    writer = create_run(tmp_path / "runs", "a", SPEC, "tiny")
    yield writer
    writer._closed.set()


def test_the_fold_holds_what_the_journal_held(writer: RunWriter) -> None:
    for rollout in range(3):
        write(writer, rollout)
    writer.event("note", "one\nevent", rollout=1, data={"x": 1.5})
    before = answers(writer.folder)
    with open_runs(writer.folder) as runs:
        times = runs.sql("select created_at, time from rollouts join runs using (run_id) order by rollout").fetchall()
        ((told,),) = runs.sql("select time from events").fetchall()
    assert times[0][0] < times[0][1] < times[1][1] < times[2][1] < told
    writer.close("finished", "")
    assert (writer.folder / "metrics.duckdb").is_file()
    assert not [name for name in list_segments(writer.folder) if not name.startswith(SHARDS)]
    assert answers(writer.folder) == before
    assert len(before["rollouts"]) == 3
    assert len(before["updates"]) == 9
    assert before["events"] == [("note", "one\nevent", '{"x": 1.5}', 1)]


def test_views_make_the_means_of_sums_and_counts(writer: RunWriter) -> None:
    for rollout in range(2):
        write(writer, rollout)
    with open_runs(writer.folder) as runs:
        columns = "reward_mean, mean_at_group, pass_at_group, entropy, entropy_token_mean, entropy_normalized, "
        columns += "response_tokens_mean"
        found = runs.sql(f"select {columns} from rollouts order by rollout").fetchall()
        clip = runs.sql("select clip_low, clip_low_fraction, clip_low_fraction_advantage, kl, ratio_mean, entropy_token_mean "
                        "from updates where rollout = 1 order by inner_step").fetchall()  # fmt: skip
    rows = [rollout_row(rollout) for rollout in range(2)]
    entropies = [row["entropy_response_sum"] / row["responses_scored"] for row in rows]
    for row, view, entropy in zip(rows, found, entropies, strict=True):
        assert view == pytest.approx((
            row["reward_sum"] / row["responses"], row["correct"] / row["graded"], row["groups_correct"] / row["prompts"],
            entropy, row["entropy_token_sum"] / row["tokens_scored"], entropy / entropies[0],
            row["tokens"] / row["responses"],
        ))  # fmt: skip
    for row, view in zip(update_rows(1), clip, strict=True):
        assert view == pytest.approx((
            row["clip_low"], row["clip_low"] / row["tokens"], row["clip_low"] / row["tokens_advantage"],
            row["kl_sum"] / row["tokens"], row["ratio_sum"] / row["tokens"], row["entropy_token_sum"] / row["tokens"],
        ))  # fmt: skip


def test_nothing_scored_and_nothing_graded_are_null(writer: RunWriter) -> None:
    row = rollout_row(0) | {"graded": 0, "correct": None, "groups_correct": None, "responses_scored": 0,
                            "tokens_scored": 0, "entropy_response_sum": None, "entropy_token_sum": None}  # fmt: skip
    writer.write_rollout(0, row, tables([], samples(0)))
    with open_runs(writer.folder) as runs:
        found = runs.sql(
            "select mean_at_group, pass_at_group, entropy, entropy_token_mean, entropy_normalized from rollouts"
        )
        assert found.fetchall() == [(None,) * 5]


def test_a_rollout_without_its_commit_record_is_not_there(writer: RunWriter) -> None:
    write(writer, 0)
    write(writer, 1)
    segment_of(writer, "rollouts-000-000001").unlink()
    found = answers(writer.folder)
    assert {row[2] for row in found["updates"]} == {0}
    assert len(found["samples"]) == 3


def test_rows_that_a_later_attempt_did_again_are_hidden(writer: RunWriter) -> None:
    for rollout in range(4):
        write(writer, rollout)
    writer.attempt = 1
    writer._status |= {"attempt": 1, "resumes": [{"attempt": 1, "resumed_at": 2}]}
    for rollout in (2, 3, 4):
        write(writer, rollout)
    with open_runs(writer.folder) as runs:
        query = "select attempt, rollout from rollouts order by rollout"
        assert runs.sql(query).fetchall() == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
        assert runs.sql("select count(*), count(text) from samples").fetchall() == [(15, 15)]


def test_texts_can_be_left_out_and_tokens_kept(writer: RunWriter) -> None:
    tokens = {
        "prompt_id": ["a", "a"], "position": [0, 0], "sample": [0, 0], "token": [0, 1], "token_id": [5, 9],
        "logprob": [-0.5, -1.5], "entropy": [0.1, 0.2], "sampler_logprob": [-0.5, -1.25], "advantage": [0.5, 0.5],
            "clip_low": [0, 1], "clip_high": [0, 0], "text": ["so", " 3"],
    }  # fmt: skip
    both = tables(update_rows(0), samples(0), tokens=tokens)
    writer.write_rollout(0, rollout_row(0), {table: both[table] for table in both if table != "texts"})
    with open_runs(writer.folder) as runs:
        assert runs.sql("select token_id, logprob, sampler_logprob from tokens").fetchall() == [
            (5, -0.5, -0.5),
            (9, -1.5, -1.25),
        ]
        assert runs.sql("select distinct text from samples").fetchall() == [(None,)]


def test_a_damaged_segment_is_named_and_the_rest_is_read(writer: RunWriter) -> None:
    for rollout in range(3):
        write(writer, rollout)
    other = create_run(writer.folder.parent, "b", SPEC, "tiny")
    write(other, 0)
    other.close("finished", "")
    rng = random.Random(0)
    segment = segment_of(writer, "updates-000-000001")
    whole = segment.read_bytes()
    for damage in [b"", b"garbage", whole[: len(whole) // 2], *(_flipped(whole, rng) for _ in range(25))]:
        segment.write_bytes(damage)
        with open_runs(writer.folder.parent) as runs:
            problems = dict(runs.sql("select run_id, problem from runs").fetchall())
            assert problems["b"] is None
            assert "updates-000-000001" in (problems["a"] or "")
            assert "is damaged" in problems["a"]
            assert runs.sql("select count(*) from updates where run_id = 'a'").fetchall() == [(6,)]


def segment_of(writer: RunWriter, stem: str) -> Path:
    (segment,) = (writer.folder / "journal").glob(f"{stem}-*.parquet")
    return segment


def _flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit flipped anywhere."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def test_a_damaged_store_and_missing_files_are_named(writer: RunWriter) -> None:
    write(writer, 0)
    writer.close("finished", "")
    store = writer.folder / "metrics.duckdb"
    store.write_bytes(store.read_bytes()[:5000])
    (writer.folder / "status.json").write_text("{")
    with open_runs(writer.folder) as runs:
        ((problem, state),) = runs.sql("select problem, state from runs").fetchall()
    assert "metrics.duckdb is damaged" in problem
    assert "status.json is damaged" in problem
    assert state is None


def test_a_newer_schema_is_named(writer: RunWriter) -> None:
    write(writer, 0)
    segment = segment_of(writer, "updates-000-000000")
    table = pq.read_table(segment)
    segment.unlink()
    newer = writer.folder / "journal" / "newer"
    pq.write_table(table.replace_schema_metadata({"clipctl_schema_version": "99"}), newer)
    newer.rename(newer.with_name(f"updates-000-000000-{digest(newer.read_bytes())}.parquet"))
    with open_runs(writer.folder) as runs:
        ((problem,),) = runs.sql("select problem from runs").fetchall()
    assert f"has schema 99, this clipctl reads up to {SCHEMA_VERSION}" in problem


def test_names_are_taken_once(writer: RunWriter) -> None:
    with pytest.raises(SpecError, match="'a' exists"):
        create_run(writer.folder.parent, "a", SPEC, "tiny")


def test_equal_names_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        create_run(tmp_path / folder, "a", SPEC, "tiny").close("finished", "")
    with open_runs(tmp_path) as runs:
        assert runs.sql("select run_id from runs order by 1").fetchall() == [("x/a",), ("y/a",)]


def test_paths_that_do_not_exist_are_refused_and_empty_ones_are_not(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing"):
        open_runs(tmp_path / "nothing")
    with open_runs(tmp_path) as runs:
        assert runs.folders == []


def test_a_read_only_folder_is_a_store_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="is not a folder"):
        create_run(blocked, "a", SPEC, "tiny")
    with pytest.raises(StoreError, match="cannot be made"):
        create_run(blocked / "deeper", "a", SPEC, "tiny")


def test_a_run_that_fell_silent_has_crashed() -> None:
    alive = {
        "state": "running",
        "heartbeat": datetime.now(UTC).isoformat(),
        "pid": os.getpid(),
        "host": os.uname().nodename,
    }
    assert state_of(alive) == "running"
    assert state_of(alive | {"heartbeat": "2020-01-01T00:00:00+00:00"}) == "crashed"
    assert state_of(alive | {"heartbeat": "2099-01-01T00:00:00+00:00"}) == "crashed"  # the clock was set back
    assert state_of(alive | {"pid": 2**22 + 1}) == "crashed"
    assert state_of(alive | {"pid": 2**22 + 1, "host": "elsewhere"}) == "running"
    assert state_of(alive | {"state": "finished", "heartbeat": "2020-01-01T00:00:00+00:00"}) == "finished"


def test_a_full_disk_is_an_error_and_earlier_rollouts_stay(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        writer = create_run(disk, "a", SPEC, "tiny")
        write(writer, 0)
        before = answers(writer.folder)
        with pytest.raises(StoreError, match="No space left on device"):
            write_many(writer, 400)
        found = answers(writer.folder)
        assert found["rollouts"][:1] == before["rollouts"]
        committed = {row[2] for row in found["rollouts"]}
        assert {row[2] for row in found["updates"]} == committed
        assert not [file for file in (writer.folder / "journal").iterdir() if file.name.startswith(".")]
        with pytest.raises(StoreError, match="No space left on device"):
            writer.close("failed", "the disk is full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


WRITER = """
import sys; from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import SPEC, create_run, write
writer = create_run(Path(sys.argv[1]), sys.argv[2], SPEC, "tiny")
for rollout in range(int(sys.argv[3])):
    write(writer, rollout)
    print(rollout, flush=True)
writer.close("finished", "")
"""


def start_writer(folder: Path, name: str, rollouts: int) -> subprocess.Popen[str]:
    code = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), name, str(rollouts)], stdout=subprocess.PIPE, text=True
    )


def killed_and_read(folder: Path, seed: int) -> None:
    process = start_writer(folder, f"k{seed}", 10_000)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).random() * 0.3)
    process.send_signal(signal.SIGKILL)
    printed = [0, *(int(line) for line in process.stdout)]
    process.wait()
    with open_runs(folder / f"k{seed}") as runs:
        ((state, problem),) = runs.sql("select state, problem from runs").fetchall()
        stored = [row for (row,) in runs.sql("select rollout from rollouts order by 1").fetchall()]
        updates = [row for (row,) in runs.sql("select distinct rollout from updates order by 1").fetchall()]
    assert (state, problem) == ("crashed", None)
    assert stored == list(range(len(stored)))
    assert updates == stored
    assert len(stored) >= printed[-1] + 1


def test_after_kill_9_every_committed_rollout_is_readable(tmp_path: Path) -> None:
    for seed in range(3):
        killed_and_read(tmp_path, seed)


@pytest.mark.slow
def test_after_kill_9_many_times(tmp_path: Path) -> None:
    for seed in range(3, 23):
        killed_and_read(tmp_path, seed)


@pytest.mark.slow
def test_writers_and_polling_readers_do_not_meet(tmp_path: Path) -> None:
    """Three writers, readers as fast as they can: no reader error, no rollout lost, none half seen."""
    writers = [start_writer(tmp_path, f"w{number}", 25) for number in range(3)]
    problems: list[str] = []
    reads = 0
    while any(writer.poll() is None for writer in writers):
        with open_runs(tmp_path) as runs:
            problems += [row for (row,) in runs.sql("select problem from runs where problem is not null").fetchall()]
            half = runs.sql(
                "select count(*) from (select run_id, rollout, count(*) as n from updates group by all) where n <> 3"
            )
            assert half.fetchall() == [(0,)]
            reads += 1
    assert problems == []
    assert reads > 5
    with open_runs(tmp_path) as runs:
        assert runs.sql("select run_id, count(*) from rollouts group by 1 order by 1").fetchall() == [
            ("w0", 25), ("w1", 25), ("w2", 25),
        ]  # fmt: skip


def test_an_open_reader_holds_nothing_up(writer: RunWriter) -> None:
    write(writer, 0)
    writer.close("finished", "")
    with open_runs(writer.folder) as runs:
        fold(writer.folder)
        shutil.copy(writer.folder / "metrics.duckdb", writer.folder / "copy")
        assert runs.sql("select count(*) from rollouts").fetchall() == [(1,)]


def test_the_heartbeat_comes_from_a_thread_of_its_own(writer: RunWriter) -> None:
    assert "heartbeat" in {thread.name for thread in threading.enumerate()}
    assert json.loads((writer.folder / "status.json").read_text())["state"] == "running"


@pytest.mark.parametrize(
    "query",
    [
        "drop table runs",
        "select 1; select 2",
        "copy runs to '/tmp/x.csv'",
        "attach '/tmp/x.duckdb'",
        "pragma database_list",
        "install httpfs",
        "set memory_limit = '1GB'",
        "insert into runs (run_id) values ('x')",
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('/etc/passwd')",
        "select * from '/etc/passwd'",
        "selekt 1",
        "select nothing from runs",
        "select 'x'::int",
        "",
    ],
)
def test_only_one_select_over_the_runs_is_taken(writer: RunWriter, query: str) -> None:
    write(writer, 0)
    with open_runs(writer.folder) as runs:
        with pytest.raises(SpecError, match="--sql: ") as caught:
            runs.table(query)
        assert "\n" not in str(caught.value)
        assert runs.table("select count(*) as n from rollouts").to_pylist() == [{"n": 1}]


def test_every_number_of_the_views_has_a_formula(writer: RunWriter) -> None:
    write(writer, 0)
    keys = {"run_id", "attempt", "rollout", "inner_step", "prompt_id", "position", "sample", "outcome", "text", "token",
            "question", "token_id", "time", "kind", "message", "data", "predictor", "source", "step",
            "eval_id", "state", "model", "benchmark", "complete", "grader", "grader_version", "template", "template_hash",
            "chat_template_hash", "dataset_hash", "model_hash", "settings", "reused_from", "started_at", "path", "problem",
            "problem_id", "problem_hash", "answer"}  # fmt: skip
    with open_runs(writer.folder) as runs:
        columns = {name for view in VIEWS for name in runs.sql(f"select * from {view}").columns}
    assert columns - keys == set(METRICS)


@pytest.mark.parametrize("name", ["finished", "journal"])
def test_a_run_of_schema_1_is_read_and_folded(name: str, tmp_path: Path) -> None:
    """Two rollouts of `tiny`, 2 × 4 responses, one update a group, stored by the code of schema 1."""
    with tarfile.open(Path(__file__).parent / "data" / "runs-schema-1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    for _ in range(2):
        with open_runs(folder) as runs:
            assert runs.sql("select problem from runs").fetchall() == [(None,)]
            assert (
                runs.sql("select round(entropy, 6), responses from rollouts order by rollout").fetchall() == ENTROPIES_1
            )
            assert runs.sql("select count(*), count(pg_total), count(gap7_low) from updates").fetchall() == [(4, 0, 0)]
            assert runs.sql("select count(*), count(text) from samples").fetchall() == [(16, 16)]
            for table in ("histograms", "probes", "noise", "predictions"):
                assert runs.sql(f"select * from {table}").fetchall() == []
        fold(folder)


@pytest.mark.parametrize("name", ["finished", "journal"])
def test_a_run_of_schema_2_is_read_and_folded(name: str, tmp_path: Path) -> None:
    """Two rollouts of `tiny`, 2 × 4 responses, two epochs of one update a group, per-token rows, stored by the code of
    schema 2: the numbers are what that code read."""
    with tarfile.open(Path(__file__).parent / "data" / "runs-schema-2.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    for _ in range(2):
        with open_runs(folder) as runs:
            assert runs.sql("select problem from runs").fetchall() == [(None,)]
            assert (
                runs.sql("select round(entropy, 6), responses from rollouts order by rollout").fetchall() == ENTROPIES_2
            )
            updates = "select count(*), round(sum(pg_total), 9), sum(clip_low) from updates"
            assert runs.sql(updates).fetchall() == [(8, 0.001716909, 11)]
            assert runs.sql("select count(*), count(text), count(clip_low) from samples").fetchall() == [(16, 16, 0)]
            tokens = "select count(*), count(logprob), count(text), count(clip_high) from tokens"
            assert runs.sql(tokens).fetchall() == [(192, 192, 0, 0)]
            for table, rows in {"histograms": 128, "probes": 4, "noise": 22, "predictions": 3, "texts": 16}.items():
                assert runs.sql(f"select count(*) from {table}").fetchall() == [(rows,)]
            for table in ("evaluations", "evals"):
                assert runs.sql(f"select * from {table}").fetchall() == []
        fold(folder)


def evaluation(benchmark: str, problems: int, seconds: float = 1.5) -> dict[str, list[Any]]:
    row: dict[str, Any] = {name: None for name in TABLES["evaluations"] if name != "rollout"}
    more = {"benchmark": benchmark, "problems": problems, "k": 2, "seconds": seconds, "settings": "{}"}
    return {name: [value] for name, value in (row | more).items()}


def evals(benchmark: str, correct: list[list[bool]], first: int = 0) -> dict[str, dict[str, list[Any]]]:
    """Samples of problems first, first+1, ...: 3 tokens for the first sample of a problem, 4 for its second and so on."""
    places = [(first + at, sample) for at, row in enumerate(correct) for sample in range(len(row))]
    flat = [right for row in correct for right in row]
    size = len(flat)
    columns = {
        "benchmark": [benchmark] * size, "problem_id": [f"p{at}" for at, _ in places], "problem_hash": ["h"] * size,
        "position": [at for at, _ in places], "sample": [sample for _, sample in places],
        "outcome": ["correct" if right else "no_answer" for right in flat], "correct": flat,
        "tokens": [3 + sample for _, sample in places], "truncated": [sample == 1 for _, sample in places],
        "answer": ["7" if right else None for right in flat], "logprob_sum": [-1.0] * size,
    }  # fmt: skip
    texts = {name: columns[name] for name in ("benchmark", "position", "sample")} | {"text": ["so 7"] * size}
    return {"evals": columns, "eval_texts": texts}


EVALUATED = (
    "select eval_id, run_id, rollout, benchmark, state, problems_done, complete, mean_at_k, pass_at_k from evaluations"
)


def test_evaluations_of_a_run_and_in_a_folder_are_one_view(writer: RunWriter, tmp_path: Path) -> None:
    """A run's own evaluation needs no `rollouts` row: the base model's comes before the first one."""
    three = [[True, False], [False, False], [True, True]]
    writer.write_evaluation(0, 0, evals("arith", three) | {"evaluations": evaluation("arith", 3)})
    spec = json.dumps({"kind": "evaluation", "run": str(writer.folder)})
    apart = create_run(tmp_path / "runs" / "deep", "e", spec, "eval")
    apart.write_evaluation(0, 1, {"evaluations": evaluation("svamp", 4, 0.0)})
    apart.write_evaluation(1, 1, evals("svamp", [[True, True, True, False]]))
    with open_runs(tmp_path) as runs:
        assert runs.sql(f"{EVALUATED} order by eval_id").fetchall() == [
            ("a@0", "a", 0, "arith", "finished", 3, True, 0.5, 2 / 3),
            ("e", "a", 1, "svamp", "running", 1, False, 0.75, 1.0),
        ]
        assert runs.sql("select run_id from runs").fetchall() == [("a",)]
        sums = "select samples, correct, tokens, response_tokens_mean, truncated, no_answer from evaluations where rollout = 0"
        assert runs.sql(sums).fetchall() == [(6, 3, 21, 3.5, 3, 3)]
        assert runs.sql("select distinct text from evals").fetchall() == [("so 7",)]
    apart.write_evaluation(2, 1, evals("svamp", [[False] * 4] * 3, first=1))
    apart.write_evaluation(3, 1, {"evaluations": evaluation("svamp", 4, 2.5)})
    apart.close("finished", "")
    writer.close("finished", "")
    with open_runs(tmp_path) as runs:
        assert runs.sql(f"{EVALUATED} where eval_id = 'e'").fetchall() == [
            ("e", "a", 1, "svamp", "finished", 4, True, 0.1875, 0.25)
        ]
        assert runs.sql("select seconds from evaluations where eval_id = 'e'").fetchall() == [(2.5,)]
        assert runs.sql("select count(*), count(text) from evals").fetchall() == [(22, 22)]
    with open_runs(apart.folder) as runs:
        assert runs.sql("select run_id, rollout, eval_id from evaluations").fetchall() == [("a", 1, "e")]


def test_samples_without_their_evaluation_row_are_not_there(writer: RunWriter) -> None:
    writer.write_evaluation(0, 0, evals("arith", [[True]]))
    with open_runs(writer.folder) as runs:
        assert runs.sql("select * from evals").fetchall() == []
        assert runs.sql("select * from evaluations").fetchall() == []


def test_evaluations_of_what_was_trained_anew_are_hidden(writer: RunWriter) -> None:
    """Resumed at rollout 2: the model of that moment is the same, those after it are not."""
    for rollout, right in [(0, True), (2, True), (4, True)]:
        rows = evals("arith", [[right]]) | {"evaluations": evaluation("arith", 1)}
        writer.write_evaluation(rollout, rollout, rows)
    writer.attempt = 1
    writer._status |= {"resumes": [{"attempt": 1, "resumed_at": 2}]}
    writer._write_status()
    query = "select rollout, attempt, mean_at_k from evaluations order by rollout"
    with open_runs(writer.folder) as runs:
        assert runs.sql(query).fetchall() == [(0, 0, 1.0), (2, 0, 1.0)]
    for rollout in (2, 4):
        rows = evals("arith", [[False]]) | {"evaluations": evaluation("arith", 1)}
        writer.write_evaluation(rollout, rollout, rows)
    with open_runs(writer.folder) as runs:
        assert runs.sql(query).fetchall() == [(0, 0, 1.0), (2, 1, 0.0), (4, 1, 0.0)]
        assert runs.sql("select count(*) from evals").fetchall() == [(3,)]


SUMMED = """select run_id, u.rollout, sum(tokens), sum(clip_low), sum(clip_high), sum(u.pg_reward), sum(pg_clip_low),
    sum(pg_clip_high), min(eps_low), max(eps_low), min(eps_high), max(eps_high), count(ledger_pg + entropy_change),
    count(*) filter (sign(ledger_pg) = sign(entropy_change))
    from updates as u left join probes using (run_id, attempt, rollout, inner_step) group by all order by all"""


def test_sums_of_updates_are_those_of_the_updates_wherever_they_are(writer: RunWriter) -> None:
    """Folded, in a journal, of an earlier fold without sums, and done again by a later attempt."""
    for rollout in range(3):
        write(writer, rollout)
    writer.close("interrupted", "")
    with duckdb.connect(str(writer.folder / "metrics.duckdb")) as store:
        assert store.sql("select count(*) from update_sums").fetchall() == [(3,)]
        store.execute("update updates set tokens = tokens + 1")
    later = RunWriter(writer.folder, SPEC, "tiny", lock_run(writer.folder), before=writer._status, resumed_at=2)
    write(later, 2)
    write(later, 3)
    query = "select * exclude (attempt) from update_sums order by all"
    with open_runs(writer.folder) as runs:
        held, made = runs.sql(query).fetchall(), runs.sql(SUMMED).fetchall()
    assert [row[1] for row in made] == [0, 1, 2, 3]
    assert [row[2] - 3 for row in made[:2]] == [row[2] for row in held[:2]], "a store's sums are made when it is folded"
    assert_equal_rows(held[2:], made[2:])
    with duckdb.connect(str(writer.folder / "metrics.duckdb")) as store:
        store.execute("drop table update_sums")
    later.close("finished", "")
    assert sum(row[-2] for row in made) == 8
    with open_runs(writer.folder) as runs:
        assert_equal_rows(runs.sql(query).fetchall(), made)
        assert_equal_rows(runs.sql(SUMMED).fetchall(), made)
    with duckdb.connect(str(writer.folder / "metrics.duckdb")) as store:
        store.execute("drop table update_sums")
    with open_runs(writer.folder) as runs:
        assert_equal_rows(runs.sql(query).fetchall(), made)


@pytest.mark.parametrize("where", ["journal", "store", "store of an earlier version"])
def test_sums_of_histograms_are_those_of_the_updates(writer: RunWriter, where: str) -> None:
    for rollout in range(3):
        bins: dict[str, list[Any]] = {
            "inner_step": [0, 0, 4],
            "advantage_sign": [1, -1, 1],
            "ratio_from": [0.5, 0.5, 0.5],
            "ratio_to": [1.0, 1.0, 1.0],
            "tokens": [2, 3, 5 + rollout],
            "pg": [0.5, 1.0, 0.25],
            "npg": [1.0, 2.0, 4.0],
        }
        writer.write_rollout(rollout, rollout_row(rollout), tables(update_rows(rollout), samples(0), histograms=bins))
    if where != "journal":
        writer.close("finished", "")
    if where == "store of an earlier version":
        with duckdb.connect(str(writer.folder / "metrics.duckdb")) as store:
            store.execute("drop table histogram_sums")
    with open_runs(writer.folder) as runs:
        found = runs.sql("select rollout, advantage_sign, tokens, pg, npg from histogram_sums order by all").fetchall()
    assert found == [
        row for rollout in range(3) for row in ((rollout, -1, 3, 1.0, 2.0), (rollout, 1, 7 + rollout, 0.75, 5.0))
    ]


def assert_equal_rows(found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> None:
    """Equal, but for the order in which numbers were added."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one[0] == other[0]
        assert one[1:] == pytest.approx(other[1:], rel=1e-14)


def test_ctrl_c_ends_a_fold_and_nothing_is_lost(writer: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    write(writer, 0)
    before = answers(writer.folder)
    endless = "select count(*) as n from range(1000000000000)"
    with monkeypatch.context() as patched:
        patched.setattr("clipctl.fold.derived_sql", lambda *_: endless)
        ctrl_c = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        ctrl_c.start()
        with pytest.raises(KeyboardInterrupt):
            writer.close("finished", "")
        ctrl_c.join()
    assert sorted(file.name for file in writer.folder.iterdir() if "duckdb" in file.name) == []
    assert answers(writer.folder) == before


def test_runs_is_a_public_name() -> None:
    import clipctl

    assert issubclass(clipctl.Runs, Runs)
    assert callable(clipctl.open_runs)


def test_a_damaged_journal_is_not_folded_away(writer: RunWriter) -> None:
    for rollout in range(2):
        write(writer, rollout)
    segment_of(writer, "updates-000-000001").write_bytes(b"garbage")
    writer.close("finished", "")
    assert not (writer.folder / "metrics.duckdb").exists()
    assert len(answers(writer.folder)["rollouts"]) == 2


@pytest.mark.parametrize("closes_at", [1, 2])
def test_a_fold_while_reading_loses_nothing(writer: RunWriter, monkeypatch: pytest.MonkeyPatch, closes_at: int) -> None:
    """The run ends between any two steps of the reader: all its rows are seen."""
    from clipctl import raw

    for rollout in range(3):
        write(writer, rollout)
    real, calls = raw.read_segments, [0]

    def close_then_read(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == closes_at:
            writer.close("finished", "")
        return real(*arguments)

    monkeypatch.setattr(raw, "read_segments", close_then_read)
    with open_runs(writer.folder) as runs:
        for _ in range(2):
            assert runs.sql("select count(*) from rollouts").fetchall() == [(3,)]
            assert runs.sql("select count(*) from updates").fetchall() == [(9,)]
            assert runs.sql("select problem from runs").fetchall() == [(None,)]
    assert calls[0] >= closes_at


def test_names_are_told_apart_at_any_depth(tmp_path: Path) -> None:
    for folder in ("x/s", "y/s"):
        create_run(tmp_path / folder, "r", SPEC, "tiny").close("finished", "")
    with open_runs(tmp_path) as runs:
        assert runs.sql("select run_id from runs order by 1").fetchall() == [("x/s/r",), ("y/s/r",)]


@pytest.mark.parametrize(
    "status", ['{"state": "running"}', '{"schema_version": "x"}', '{"created_at": "garbage"}', "[]"]
)
def test_one_odd_status_is_named_and_stops_nothing(writer: RunWriter, status: str) -> None:
    create_run(writer.folder.parent, "b", SPEC, "tiny").close("finished", "")
    writer._closed.set()
    (writer.folder / "status.json").write_text(status)
    (writer.folder / "spec.json").write_text('{"clip": [1]}')
    with open_runs(writer.folder.parent) as runs:
        problems = dict(runs.sql("select run_id, problem from runs").fetchall())
    assert problems["b"] is None
    assert "status.json is damaged" in problems["a"]
    assert "spec.json is damaged" in problems["a"]


def test_columns_of_one_name_are_refused(writer: RunWriter) -> None:
    with open_runs(writer.folder) as runs, pytest.raises(SpecError, match="two columns are named 'run_id'"):
        runs.table("select run_id, run_id from runs")
