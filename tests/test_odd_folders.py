"""Odd names, links, copies and damage: each is named in `runs`, and the other runs are read as if it were not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from test_store import SPEC, create_run, start_writer, write

from clipctl.errors import SpecError
from clipctl.limits import ended_by_signals
from clipctl.overview import overview
from clipctl.schema import SCHEMA_VERSION
from clipctl.store import Runs, open_runs

NAMES = ["a b", "a'b", 'a"b', "a?b", "a*b", "a[1]b", "aéb", "a\nb"]


def finished(root: Path, name: str) -> Path:
    writer = create_run(root, name, SPEC, "tiny")
    for rollout in range(2):
        write(writer, rollout)
    writer.close("finished", "")
    return writer.folder


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def problems(root: Path) -> dict[str, str | None]:
    with open_runs(root) as runs:
        return dict(runs.sql("select run_id, problem from runs").fetchall())


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_folded_and_read_with_its_shards(name: str, tmp_path: Path) -> None:
    folder = finished(tmp_path, name)
    finished(tmp_path, "axb")  # what the names above would match as globs
    assert (folder / "metrics.duckdb").is_file()
    with open_runs(tmp_path) as runs:
        counts = runs.sql("select run_id, count(*), count(text) from samples group by 1").fetchall()
    assert {run: (rows, texts) for run, rows, texts in counts} == {name: (6, 6), "axb": (6, 6)}


def test_loops_and_globs_find_each_run_once(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b"):
        finished(tmp_path, name)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert set(problems(tmp_path)) == {"a1", "a2", "b"}
    with open_runs(str(tmp_path / "a*")) as runs:
        assert [folder.name for folder in runs.folders] == ["a1", "a2"]


def test_copies_empty_folders_and_flipped_bits_are_named(tmp_path: Path) -> None:
    folder = finished(tmp_path, "a")
    for name in ("copy", "store", "shard"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "empty").mkdir()
    flip(tmp_path / "store" / "metrics.duckdb", 270_000)
    flip(next((tmp_path / "shard" / "journal").glob("texts-*")), 9)
    found = problems(tmp_path)
    assert found["a"] is None
    assert "folder is empty" in str(found["empty"])
    assert "metrics.duckdb is damaged" in str(found["store"])
    assert "texts-" in str(found["shard"])
    with open_runs(tmp_path) as runs:
        copies = runs.sql("select run_id, copy_of from runs where copy_of is not null order by 1").fetchall()
        assert copies == [("copy", "a"), ("shard", "a"), ("store", "a")]
        rows = runs.sql("select run_id, count(*) from rollouts group by 1 order by 1").fetchall()
        assert rows == [("a", 2), ("copy", 2), ("shard", 2)]


def test_copies_made_while_a_run_is_written_are_read_beside_it(tmp_path: Path) -> None:
    """By cp, which meets files that vanish, in every stage up to the fold; brought together with a run of another machine."""
    finished(tmp_path / "elsewhere", "other")
    process = start_writer(tmp_path / "here", "live", 12)
    copies = 0
    while process.poll() is None:
        if (tmp_path / "here" / "live" / "spec.json").exists():
            (tmp_path / f"copy-{copies}").mkdir()
            words = ["cp", "-r", str(tmp_path / "here" / "live"), str(tmp_path / f"copy-{copies}")]
            subprocess.run(words, capture_output=True, check=False)
            copies += 1
        time.sleep(0.2)
    assert process.returncode == 0
    assert copies > 2
    with open_runs(tmp_path) as runs:
        shown = {row["run"]: row for row in overview(runs).to_pylist()}
        stored = dict(runs.sql("select run_id, list(rollout order by rollout) from rollouts group by 1").fetchall())
        cut = "select run_id from updates group by run_id, rollout having count(*) <> 3"
        assert runs.sql(cut).fetchall() == []
        originals = runs.sql("select run_id from runs where copy_of is null").fetchall()
    assert len(originals) == 2
    assert ("other",) in originals
    assert len(shown) == copies + 2
    assert (shown["other"]["rollouts"], shown["other"]["problem"]) == (2, None)
    assert stored.pop("other") == [0, 1]
    assert shown["here/live"]["state"] == "finished"
    assert stored["here/live"] == list(range(12))
    for run in shown.keys() - {"other"}:
        assert shown[run]["state"] in ("running", "crashed", "finished")
        assert stored.get(run, []) == list(range(len(stored.get(run, []))))


def test_a_copy_without_its_last_rollouts_says_so_and_a_live_run_does_not(tmp_path: Path) -> None:
    """Of a crashed, a finished and a live run; the finished copy lacks all, the status of the live one runs ahead."""
    crashed, live = (create_run(tmp_path, name, SPEC, "tiny") for name in ("crashed", "live"))
    for rollout in range(3):
        write(crashed, rollout)
        write(live, rollout)
    finished(tmp_path, "finished")
    shutil.copytree(crashed.folder, tmp_path / "whole")
    status = tmp_path / "crashed" / "status.json"
    for name in ("crashed", "whole"):
        dead = json.loads(status.read_text()) | {
            "heartbeat": "2020-01-01T00:00:00+00:00",
            "created_at": f"20{len(name)}0-01-01",
        }
        (tmp_path / name / "status.json").write_text(json.dumps(dead))
    for folder in ("crashed", "live"):
        for segment in (tmp_path / folder / "journal").glob("*-000-000002-*"):
            segment.unlink()
    (tmp_path / "finished" / "metrics.duckdb").unlink()
    with open_runs(tmp_path) as runs:
        found = {row["run"]: (row["state"], row["rollouts"], row["problem"]) for row in overview(runs).to_pylist()}
    crashed._closed.set()
    live._closed.set()
    said = "rollouts that it committed are here: the copy is not whole, copy it again"
    assert found == {
        "crashed": ("crashed", 2, f"2 of the 3 {said}"),
        "finished": ("finished", 0, f"0 of the 2 {said}"),
        "live": ("running", 2, None),
        "whole": ("crashed", 3, None),
    }


def test_a_store_and_a_status_of_a_newer_version_are_named(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    store, status = finished(tmp_path, "b") / "metrics.duckdb", finished(tmp_path, "c") / "status.json"
    with duckdb.connect(str(store)) as opened:
        opened.execute("update store_version set version = 99")
    status.write_text(status.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    with open_runs(tmp_path) as runs:
        a, b, c = overview(runs).to_pylist()
    said = f"has schema 99, this clipctl reads up to {SCHEMA_VERSION}"
    assert [row["problem"] for row in (a, b, c)] == [None, f"metrics.duckdb {said}", f"status.json {said}"]
    assert [row["state"] for row in (a, b, c)] == ["finished"] * 3
    assert [row["rollouts"] for row in (a, b, c)] == [2, 0, 2]


@pytest.mark.parametrize("file", ["spec.json", "status.json", "metrics.duckdb"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_file_is_named_and_the_others_stay(file: str, share: float, tmp_path: Path) -> None:
    finished(tmp_path, "a")
    damaged = finished(tmp_path, "b") / file
    damaged.write_bytes(damaged.read_bytes()[: int(share * damaged.stat().st_size)])
    found = problems(tmp_path)
    assert found["a"] is None
    assert file in str(found["b"])
    with open_runs(tmp_path) as runs:
        assert runs.sql("select count(*) from rollouts where run_id = 'a'").fetchall() == [(2,)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_without_permissions_is_named(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    closed = finished(tmp_path, "b")
    closed.chmod(0)
    try:
        found = problems(tmp_path)
    finally:
        closed.chmod(0o755)
    assert found["a"] is None
    assert "cannot be read" in str(found["b"])


ENDLESS = "with recursive t as (select 1 as x union all select x + 1 from t) select count(*) from t"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (ENDLESS, "maximum execution time"),
        (f"select * from ({ENDLESS})", "maximum execution time"),
        ("select list(range) from range(400000000)", "Out of Memory"),
        ("select getenv('HOME')", "getenv"),
        ("select content from read_blob('/etc/passwd')", "read_blob"),
        ("from sniff_csv('/etc/passwd')", "sniff_csv"),
        ("select * from query('drop table runs')", "query"),
        ("select * from query_table('runs')", "query_table"),
        ("select * from duckdb_secrets()", "duckdb_secrets"),
        ("select * from information_schema.tables", "no view"),
        ("select * from s0.rollouts", "no view"),
        ("load httpfs", "exactly one SELECT"),
        ("explain select 1", "exactly one SELECT"),
        ("call pragma_version()", "exactly one SELECT"),
    ],
)
def test_no_query_gets_out(query: str, said: str, tmp_path: Path) -> None:
    folder = finished(tmp_path, "a")
    # A busy machine may take longer than a second to run out of memory.
    seconds = 1 if said == "maximum execution time" else 60
    with Runs([folder], memory="200MB", seconds=seconds) as runs:
        with pytest.raises(SpecError, match=said):
            runs.table(query)
        assert runs.table("select count(*) as n from rollouts").to_pylist() == [{"n": 2}]


def test_one_long_text_does_not_fill_the_memory(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    command = [sys.executable, "-m", "clipctl", "analyze", str(tmp_path), "--sql"]
    query = "select length(repeat(repeat(run_id, 4000000000), 2)) as n from runs"
    done = subprocess.run([*command, query], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--sql: " in done.stderr
    assert "Traceback" not in done.stderr


LONG_CALL = "select sum(levenshtein(repeat('ab', 400000), repeat(run_id, 800000))) as n from runs"
"""One function call of minutes, in which DuckDB looks for neither limits nor signals."""
QUICK = "import sys, clipctl.analyze as a; a.LONGEST = 2; from clipctl.cli import main; sys.argv[0] = 'clipctl'; main()"


def test_one_long_function_call_is_ended(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    command = [sys.executable, "-c", QUICK, "analyze", str(tmp_path), "--sql", LONG_CALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clipctl: --sql: no answer in 2 s; ask for less\n"


@pytest.mark.parametrize("query", [LONG_CALL, ENDLESS])
def test_ctrl_c_ends_any_query(query: str, tmp_path: Path) -> None:
    finished(tmp_path, "a")
    command = [sys.executable, "-m", "clipctl", "analyze", str(tmp_path), "--sql", query]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    used = Path(f"/proc/{process.pid}/stat")
    while int(used.read_text().split()[13]) < 3 * os.sysconf("SC_CLK_TCK"):  # three seconds at work: within the query
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err


@pytest.mark.parametrize(("words", "kind"), [("Query interrupted", KeyboardInterrupt), ("another one", RuntimeError)])
def test_what_duckdb_makes_of_ctrl_c_where_it_looks_for_signals_itself(words: str, kind: type[BaseException]) -> None:
    with pytest.raises(kind), ended_by_signals():
        raise RuntimeError(words)


def test_a_full_disk_under_stdout_is_no_bug(tmp_path: Path) -> None:
    finished(tmp_path, "a")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "clipctl", "analyze", str(tmp_path)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (
        7,
        "clipctl: output cannot be written: No space left on device; free some space\n",
    )
