"""From what stands behind --benchmark to problems: names, files, counts, templates, hashes."""

import json
from pathlib import Path

import pytest

from clipctl.benchmarks import NAMES, Benchmark, limit_notes, load_benchmarks, parse_benchmark
from clipctl.errors import DataError, SpecError
from clipctl.spec import Arith, EvalFile, EvalSettings

COUNTS = {"gsm8k": 1319, "math500": 500, "amc23": 40, "aime24": 30, "aime25": 30, "svamp": 1000, "arith": 512}


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*benchmarks: str, **settings: object) -> list[Benchmark]:
    return load_benchmarks(EvalSettings(benchmarks=benchmarks, **settings), Arith())  # type: ignore[arg-type]


def test_every_known_benchmark_with_its_count_grader_and_instruction(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCTL_DATA", str(data_folder))
    for benchmark in load(*NAMES):
        assert (len(benchmark.problems), benchmark.problems_of) == (COUNTS[benchmark.name],) * 2
        prompt, question = benchmark.prompts[0], benchmark.problems[0].question
        assert prompt.startswith(question)
        instruction = {"gsm8k": '"####"', "math": "\\boxed{}"}[benchmark.grader]
        assert (instruction in prompt) == (benchmark.name != "arith")
        assert benchmark.notes == []


def test_a_wrong_number_of_rows_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aime24").mkdir()
    write(tmp_path / "aime24" / "test.jsonl", [{"problem": "1+1?", "answer": "2"}])
    monkeypatch.setenv("CLIPCTL_DATA", str(tmp_path))
    with pytest.raises(DataError, match="1 rows, but aime24 test has 30"):
        load("aime24")


def test_a_file_in_place_of_a_benchmark_keeps_its_fields_and_says_how_many_there_should_be(tmp_path: Path) -> None:
    file = write(tmp_path / "part.jsonl", [{"question": "Two and two?", "answer": "so\n#### 4"}])
    (benchmark,) = load(f"gsm8k={file}")
    assert (benchmark.name, benchmark.grader, benchmark.problems[0].answer) == ("gsm8k", "gsm8k", "4")
    assert benchmark.notes == [f"gsm8k: {file} has 1 rows, the published benchmark 1319"]
    assert benchmark.source == file


def test_a_file_of_ones_own_is_read_as_the_settings_say(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", [{"q": "Half of 3?", "a": "\\frac{3}{2}"}, {"q": "6/2?", "a": "3"}])
    fields = EvalFile(question_field="q", answer_field="a")
    (mine,) = load(file, file=fields)
    assert (mine.name, mine.grader, len(mine.problems)) == ("mine", "math", 2)
    assert mine.prompts[1] == "6/2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    (named,) = load(f"halves={file}", file=fields.model_copy(update={"template": "Q: {question}"}))
    assert (named.name, named.prompts[0]) == ("halves", "Q: Half of 3?")
    with pytest.raises(DataError, match=r"line 1: answer '\\\\frac.*' has no number|no number"):
        load(write(tmp_path / "x.jsonl", [{"q": "?", "a": "none"}]), file=fields.model_copy(update={"grader": "gsm8k"}))


def test_hashes_tell_what_was_evaluated(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(4)]
    (whole,) = load(write(tmp_path / "a.jsonl", rows))
    (part,) = load(write(tmp_path / "a.jsonl", rows), limit=3)
    (moved,) = load(write(tmp_path / "b.jsonl", rows[::-1]))
    (other,) = load(write(tmp_path / "c.jsonl", [*rows[:3], {"question": "3+1?", "answer": "5"}]))
    assert part.problem_hashes == whole.problem_hashes[:3] == moved.problem_hashes[:0:-1]
    assert len({whole.dataset_hash, part.dataset_hash, moved.dataset_hash, other.dataset_hash}) == 4
    assert (len(part.problems), part.problems_of) == (3, 4)
    assert limit_notes([part], 9) == ["--limit: 9 is more than the 4 problems of a; all are evaluated"]
    assert limit_notes([part], 4) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8", r"'gsm8' is not one of gsm8k, .* \(did you mean gsm8k\?\)"),
        ("nothing-like-it", r"is not one of .*, nor a \.jsonl or \.parquet file"),
        ("gsm8k=", r"'gsm8k=' is not NAME=FILE"),
        ("-x=rows.jsonl", r"is not NAME=FILE"),
        ("some rows.jsonl", r"'some rows' cannot be its name; give one"),
    ],
)
def test_what_is_no_benchmark_is_told(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_benchmark(text)


def test_missing_files_fields_and_doubled_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--benchmark: no file 'gone.jsonl' for gone"):
        load("gone.jsonl")
    file = write(tmp_path / "a.jsonl", [{"question": "?", "anser": "1"}])
    with pytest.raises(
        DataError, match=r"line 1: no field 'answer' \(did you mean anser\?\).*eval\.file\.answer_field"
    ):
        load(file)
    with pytest.raises(SpecError, match=r"'gsm8k' is given twice"):
        load("gsm8k", f"gsm8k={file}")
    with pytest.raises(SpecError, match=r"eval\.file\.template: 'x' has no \{question\}"):
        load(file, file=EvalFile(template="x"))
