"""Evaluations kept for reuse: whole or not there, whatever happens to them; two processes make one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipctl.eval_cache import cache_key, eval_cache_folder, find_entry, hold, model_hash, save_entry
from clipctl.schema import TABLES

ROWS: dict[str, list[Any]] = {
    "benchmark": ["arith"] * 2, "problem_id": ["p", "p"], "problem_hash": ["h", "h"], "position": [3, 3], "sample": [0, 1],
    "outcome": ["correct", "no_answer"], "correct": [True, False], "tokens": [4, 5], "truncated": [False, True],
    "answer": ["7", None], "logprob_sum": [-0.1, -1 / 3], "text": ["so 7", "\x00ä"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path / "cache"))
    return eval_cache_folder()


def test_the_rows_are_those_of_the_table() -> None:
    assert set(ROWS) == {*TABLES["evals"], "text"} - {"rollout"}


def test_an_entry_comes_back_as_it_was_and_only_under_its_key() -> None:
    assert find_entry("k" * 32) is None
    assert save_entry("k" * 32, "run@0", ROWS) is None
    assert find_entry("k" * 32) == ("run@0", ROWS)
    assert find_entry("l" * 32) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "rename"])
def test_a_damaged_entry_is_as_if_it_were_not_there_and_is_made_anew(cache: Path, damage: str) -> None:
    save_entry("k" * 32, "run@0", ROWS)
    (file,) = cache.glob("*.parquet")
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "rename":
        file.rename(file.with_name(f"{'k' * 32}-00000000.parquet"))
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])
    assert find_entry("k" * 32) is None
    save_entry("k" * 32, "run@0", ROWS)
    assert find_entry("k" * 32) == ("run@0", ROWS)


def test_a_cache_that_cannot_be_written_is_told_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPCTL_CACHE", str(tmp_path / "file"))
    problem = save_entry("k" * 32, "e", ROWS)
    assert problem is not None
    assert "file" in problem
    assert find_entry("k" * 32) is None
    with hold("k" * 32, lambda: None):
        pass


def test_another_process_waits_until_the_first_is_done(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom clipctl.eval_cache import hold, find_entry\n"
        "with hold('k' * 32, lambda: print('waiting', flush=True)):\n    print(find_entry('k' * 32)[0], flush=True)"
    )
    with hold("k" * 32, lambda: pytest.fail("nobody else is there")):
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == "waiting\n"
        save_entry("k" * 32, "first", ROWS)
    assert second.communicate(timeout=30)[0] == "first\n"


def test_keys_depend_on_every_fact_and_on_no_order() -> None:
    facts = {"k": 8, "temperature": 1.0, "template_hash": "ab"}
    assert cache_key(facts) == cache_key(dict(reversed(facts.items())))
    changed = [facts | {"k": 9}, facts | {"temperature": 0.9}, facts | {"template_hash": "ac"}]
    assert len({cache_key(other) for other in [facts, *changed]}) == 4


def test_the_models_hash_sees_weights_tokenizer_and_names(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text(name)
    hashes = [model_hash(tmp_path)]
    (tmp_path / "README.md").write_text("another")
    assert model_hash(tmp_path) == hashes[0]
    for name, content in [("model.safetensors", "x"), ("tokenizer.json", "y"), ("chat_template.jinja", "z")]:
        (tmp_path / name).write_text(content)
        hashes.append(model_hash(tmp_path))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer_config.json")
    assert len({*hashes, model_hash(tmp_path)}) == 5
