"""The overview against numpy, and what a terminal, a pipe and a hostile text make of the output."""

import csv
import io
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_store import SPEC, ledger_rows, rollout_row, samples, tables, update_rows, write

from clipctl.analyze import analyze as answer
from clipctl.errors import SpecError, StoreError
from clipctl.formats import safe_text
from clipctl.journal import create_run
from clipctl.overview import LAST, OVERVIEW
from clipctl.store import open_runs
from clipctl.verdict import WINDOW

HOSTILE = "[/INST] [bold]x[/bold] \x1b[31mred\x1b]52;c;aGk=\x07 \x9b2J \u202egnirts \x00 :smile: \\[a] \r end"


def analyze(paths: list[Path], sql: str | None, output: str, terminal: bool) -> str:
    return answer(paths, sql, output, terminal).text


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for name, rollouts in (("a", 7), ("b", 1)):
        writer = create_run(folder, name, SPEC, "tiny")
        for rollout in range(rollouts):
            write(writer, rollout)
        writer.close("finished" if name == "a" else "interrupted", "")
    empty = create_run(folder, "c", SPEC, "tiny")
    empty._closed.set()
    return folder


def test_the_overview_is_what_numpy_makes_of_the_raw_rows(runs: Path) -> None:
    answer = json.loads(analyze([runs], None, "json", False))
    assert answer["schema_version"] == 1
    a, b, c = answer["rows"]
    assert [row["run"] for row in (a, b, c)] == ["a", "b", "c"]
    assert [row["state"] for row in (a, b, c)] == ["finished", "interrupted", "running"]
    assert [row["rollouts"] for row in (a, b, c)] == [7, 1, 0]
    assert (a["eps_low"], a["eps_high"]) == (0.1, "Infinity")
    rows = [rollout_row(rollout) for rollout in range(7)]
    entropy = np.array([row["entropy_response_sum"] / row["responses_scored"] for row in rows])
    assert a["entropy_first"] == pytest.approx(entropy[0])
    assert a["entropy"] == pytest.approx(entropy[-LAST:].mean())
    assert a["entropy_normalized"] == pytest.approx((entropy / entropy[0])[-LAST:].mean())
    assert a["reward"] == pytest.approx(np.mean([row["reward_sum"] / row["responses"] for row in rows[-LAST:]]))
    assert a["mean_at_group"] == pytest.approx(np.mean([row["correct"] / row["graded"] for row in rows[-LAST:]]))
    assert a["pass_at_group"] == pytest.approx(
        np.mean([row["groups_correct"] / row["prompts"] for row in rows[-LAST:]])
    )
    updates = [row for rollout in range(7) for row in update_rows(rollout)]
    tokens = sum(row["tokens"] for row in updates)
    assert a["clip_low_percent"] == pytest.approx(100 * sum(row["clip_low"] for row in updates) / tokens)
    assert a["clip_high_percent"] == pytest.approx(100 * sum(row["clip_high"] for row in updates) / tokens)
    assert c["entropy"] is None


def test_the_verdict_is_made_of_the_last_rollouts(tmp_path: Path) -> None:
    """Pulls, clips and probes of the last WINDOW rollouts alone, ε of all."""
    rollouts = WINDOW + 3
    writer = create_run(tmp_path, "a", SPEC, "tiny")
    for rollout in range(rollouts):
        write(writer, rollout)
    writer.close("finished", "")
    with open_runs(tmp_path) as runs:
        (found,) = runs.table(OVERVIEW).to_pylist()
    rows = [row for rollout in range(3, rollouts) for row in update_rows(rollout)]
    for name in ("reward", "clip_low", "clip_high"):
        assert found[f"pull_{name}"] == pytest.approx(sum(row[f"pg_{name}"] for row in rows), rel=1e-12)
    assert found["clipped"] == sum(row["clip_low"] + row["clip_high"] for row in rows)
    every = [row for rollout in range(rollouts) for row in update_rows(rollout)]
    assert found["eps_low_from"] == min(row["eps_low"] for row in every)
    assert found["eps_high_to"] == max(row["eps_high"] for row in every)
    agreed = 0
    for rollout in range(3, rollouts):
        probes = ledger_rows("probes", rollout)
        for step, before, after in zip(
            probes["inner_step"], probes["entropy_before_sum"], probes["entropy_after_sum"], strict=True
        ):
            row = update_rows(rollout)[step]
            agreed += np.sign(sum(row[f"pg_{part}"] for part in ("reward", "clip_low", "clip_high"))) == np.sign(
                after - before
            )
    assert (int(found["probed"]), int(found["agreed"])) == (2 * WINDOW, int(agreed))
    assert 0 < agreed < 2 * WINDOW


def test_a_query_in_three_formats(runs: Path) -> None:
    query = "select run_id, rollout, reward_mean from rollouts where rollout < 2 order by all"
    rows = json.loads(analyze([runs], query, "json", False))["rows"]
    assert [(row["run_id"], row["rollout"]) for row in rows] == [("a", 0), ("a", 1), ("b", 0)]
    parsed = list(csv.DictReader(io.StringIO(analyze([runs], query, "csv", False))))
    assert [float(row["reward_mean"]) for row in parsed] == [row["reward_mean"] for row in rows]
    table = analyze([runs], query, "table", False).splitlines()
    assert table[0].split() == ["run_id", "rollout", "reward_mean"]
    assert [line.split()[:2] for line in table[2:]] == [["a", "0"], ["a", "1"], ["b", "0"]]


def test_a_pipe_gets_whole_columns(runs: Path) -> None:
    query = (
        f"select {', '.join(f'repeat({chr(39)}x{chr(39)}, 40) as column_number_{at}' for at in range(20))} from runs"
    )
    table = analyze([runs], query, "table", False)
    assert "column_number_19" in table
    assert "…" not in table
    assert table.splitlines()[2].count("x" * 40) == 20


def test_hostile_text_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    writer = create_run(tmp_path, "a", SPEC, "tiny")
    writer.write_rollout(0, rollout_row(0), tables(update_rows(0), samples(0, HOSTILE)))
    writer.close("finished", "")
    for output in ("table", "csv", "json"):
        text = analyze([tmp_path], "select text from samples", output, True)
        assert not any(character in text for character in "\x1b\x9b\x07\x00\u202e")
        assert "[/INST]" in text
        assert ":smile:" in text
    assert json.loads(analyze([tmp_path], "select text from samples", "json", True))["rows"][0]["text"] == HOSTILE


def test_safe_text() -> None:
    assert safe_text("a\x1b[0m\u2066b\nc é 漢") == "a\\x1b[0m\\x2066b⏎c é 漢"


def test_a_damaged_run_is_named_and_the_others_stay(runs: Path) -> None:
    (runs / "a" / "metrics.duckdb").write_bytes(b"nonsense")
    rows = json.loads(analyze([runs], None, "json", False))["rows"]
    assert "metrics.duckdb is damaged" in rows[0]["problem"]
    assert rows[1]["rollouts"] == 1
    assert rows[1]["problem"] is None


def test_wrong_use_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--format: 'xml' is not one of table, json, csv, parquet, md"):
        analyze([runs], None, "xml", False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="no runs under"):
        analyze([tmp_path / "empty"], None, "table", False)


QUERY = "select run_id, rollout, entropy, time from rollouts order by all"
SUFFIXES = {"csv": ".csv", "json": ".json", "md": ".md", "parquet": ".parquet", "table": ".txt"}


@pytest.mark.parametrize("output", sorted(SUFFIXES))
def test_a_file_has_what_stdout_has(runs: Path, tmp_path: Path, output: str) -> None:
    """The suffix names the format, or --format does; they must not contradict each other."""
    printed = b"".join(answer([runs], QUERY, output, False).parts)
    for name, given in ((f"a{SUFFIXES[output]}", None), ("b.other", output)):
        assert b"".join(answer([runs], QUERY, given, False, out=tmp_path / name).parts) == b""
        assert (tmp_path / name).read_bytes() == printed
    assert not list(tmp_path.glob(".*"))
    assert printed
    with pytest.raises(SpecError, match="contradict each other"):
        answer([runs], QUERY, output, False, out=tmp_path / ("a.csv" if output != "csv" else "a.md"))


def test_parquet_and_markdown_hold_every_row(runs: Path, tmp_path: Path) -> None:
    wanted = json.loads(analyze([runs], QUERY, "json", False))["rows"]
    answer([runs], QUERY, None, False, out=tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(row["run_id"], row["rollout"], row["entropy"]) for row in found] == [
        (row["run_id"], row["rollout"], row["entropy"]) for row in wanted
    ]
    assert all(isinstance(row["time"], datetime) for row in found)
    lines = analyze([runs], QUERY, "md", False).replace("\\_", "_").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["run_id", "rollout", "entropy", "time"]
    assert set("".join(cells[1])) <= set(":- ")
    assert [(row[0], int(row[1])) for row in cells[2:]] == [(row["run_id"], row["rollout"]) for row in wanted]
    assert [float(row[2]) for row in cells[2:]] == pytest.approx([row["entropy"] for row in wanted], rel=1e-3)


def test_an_answer_without_rows_has_its_columns_in_every_format(runs: Path, tmp_path: Path) -> None:
    query = "select run_id, entropy from rollouts where rollout > 99"
    assert analyze([runs], query, "csv", False).split() == ["run_id,entropy"]
    assert json.loads(analyze([runs], query, "json", False))["rows"] == []
    assert analyze([runs], query, "md", False).startswith("| run\\_id | entropy |")
    answer([runs], query, None, False, out=tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").column_names == ["run_id", "entropy"]


def test_a_query_that_fails_half_way_leaves_the_file_as_it_was(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "a.csv"
    kept.write_text("kept")
    query = "select case when rollout = 6 then run_id::int else 1 end as x from rollouts"
    with pytest.raises(SpecError, match="--sql: "):
        answer([runs], query, None, False, out=kept)
    assert kept.read_text() == "kept"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(StoreError, match="cannot be written"):
        answer([runs], QUERY, None, False, out=tmp_path / "none" / "a.csv")
    with pytest.raises(SpecError, match="--out"):
        answer([runs], QUERY, None, False, out=tmp_path / "a.xlsx")
