"""Odd names, links, copies and damage: each is named in `runs`, and the other runs are read as if it were not there."""

import shutil
from pathlib import Path

import pytest
from test_store import SPEC, create_run, write

from clipctl.store import open_runs

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
