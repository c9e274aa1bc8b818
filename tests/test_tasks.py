"""Tasks: real benchmark files, every source, every way in which rows can be unusable."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipctl.errors import DataError, SpecError
from clipctl.spec import Arith, Data
from clipctl.tasks import TASKS, Row, answer_text, find_field, load_problems, prompt_text, question_text, task_grader

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def dapo_row(index: str, problem: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [
            {"content": f"Solve it.\n\n{problem}\n\nRemember to put your answer after 'Answer:'.", "role": "user"}
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


@needs_data
@pytest.mark.parametrize(
    ("task", "split", "rows"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("amc23", "test", 40),
        ("aime24", "test", 30),
        ("aime25", "test", 30),
        ("svamp", "test", 1000),
    ],
)
def test_benchmarks_load_from_the_named_folder(
    task: str, split: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCTL_DATA", str(DATA))
    problems = load_problems(Data(task=task, split=split))
    raw = [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text().strip().split("\n")]
    assert len(problems) == rows == len({problem.id for problem in problems})
    question = raw[-1].get("question") or raw[-1]["problem"]
    assert problems[-1].question.startswith(question)
    gold = str(raw[-1]["answer"]).rpartition("####")[2].strip().replace(",", "").removesuffix(".0")
    assert problems[-1].answer == gold


@needs_data
@pytest.mark.slow
def test_math500_loads_with_every_gold_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCTL_DATA", str(DATA))
    problems = load_problems(Data(task="math500", split="test"))
    assert len(problems) == 500
    assert problems[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert problems[0].question.endswith("put your final answer within \\boxed{}.")


def test_the_gsm8k_prompt_is_the_papers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "How many {x}?", "answer": "1 + 1\n#### 1,002"}])
    (problem,) = load_problems(Data(path=path))
    assert problem.question == ('How many {x}?\nLet\'s think step by step and output the final answer after "####".')
    assert (problem.id, problem.answer) == ("0", "1002")


def test_a_path_keeps_the_tasks_fields_unless_told_otherwise(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "q": {"text": "q"}, "answer": "3", "gold": 4.0}])
    plain = load_problems(Data(task="aime24", path=path, split="train"))
    assert plain[0].question.startswith("p\n\nPlease reason")
    assert plain[0].answer == "3"
    other = Data(task="aime24", path=path, question_field="q.text", answer_field="gold", template="Q: {question}\nA:")
    assert load_problems(other)[0].question == "Q: q\nA:"
    assert load_problems(other)[0].answer == "4"


def test_a_file_task_has_fields_of_its_own_and_no_grader(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": ["one", "two"], "a": ["x", "no number"], "more": [1, 2]}), path)
    data = Data(task="file", path=str(path), question_field="q", answer_field="a")
    assert task_grader(data) is None
    assert [(p.id, p.question, p.answer) for p in load_problems(data)] == [("0", "one", "x"), ("1", "two", "no number")]
    with pytest.raises(DataError, match=r"a\.parquet, row 1: answer 'x' has no number"):
        load_problems(data, grader="gsm8k")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_dapo_rows_keep_their_message_and_lose_their_repeats(tmp_path: Path, suffix: str) -> None:
    rows = [dapo_row("u-1", "What is 1+1?", "2"), dapo_row("u-2", "What is 2+2?", "4")] * 3
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    problems = load_problems(Data(task="dapo-math-17k", path=str(path)))
    assert [(problem.id, problem.answer) for problem in problems] == [("u-1", "2"), ("u-2", "4")]
    assert problems[0].question == "Solve it.\n\nWhat is 1+1?\n\nRemember to put your answer after 'Answer:'."


def test_repeats_of_other_tasks_stay(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}] * 3)
    assert [problem.id for problem in load_problems(Data(path=path))] == ["0", "1", "2"]


def test_ids_are_unique_even_where_an_index_repeats(tmp_path: Path) -> None:
    rows = [dapo_row("u-1", "What is 1+1?", "2"), dapo_row("u-1", "What is 2+2?", "4")]
    problems = load_problems(Data(task="dapo-math-17k", path=write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [problem.id for problem in problems] == ["u-1", "u-1-1"]


def test_arith_train_and_test_do_not_overlap() -> None:
    train = load_problems(Data(task="arith", arith=Arith(style="expression", problems=300, seed=3)))
    test = load_problems(Data(task="arith", split="test", arith=Arith(style="expression", problems=300, seed=3)))
    assert (len(train), len(test)) == (300, 512)
    assert not {problem.question for problem in train} & {problem.question for problem in test}
    assert all(sum(map(int, p.question.split(" + "))) == int(p.answer) for p in train + test)
    with pytest.raises(DataError, match="arith expression: no rows"):
        load_problems(Data(task="arith", split="test", arith=Arith(style="expression", problems=100_000)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"question": "q", "answer": "1"}\n{"question": "q", ', r"a\.jsonl, line 2: not JSON"),
        ('["q", "1"]', r"line 1: \['q', '1'\] is not an object"),
        ('{"question": "q", "answer": null}', r"line 1: field 'answer' is None, so the row has no answer"),
        ('{"question": "q", "answer": " "}', r"line 1: field 'answer' is ' ', so the row has no answer"),
        ('{"question": "q", "answer": "so it is\\n#### "}', r"line 1: field 'answer' is ' ', so the row has no answer"),
        ('{"question": "q", "answer": ["1"]}', r"line 1: field 'answer' is \['1'\]"),
        ('{"question": "", "answer": "1"}', r"line 1: field 'question' is '', a question in words is needed"),
        (
            '{"question": "q", "answer": "1"}\n\n{"question": "q", "answer": "many"}',
            r"line 3: answer 'many' has no number",
        ),
        ('{"questoin": "q", "answer": "1"}', r"line 1: no field 'question' \(did you mean questoin\?\); it has answer"),
        ('{"question": "q", "gold": {"answers": "1"}}', r"no field 'answer' \(did you mean gold\.answers\?\)"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load_problems(Data(path=str(path)))
    assert "a.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_formula_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    rows = [
        {"problem": "p", "answer": "\\frac{1}{2}"},
        {"problem": "p", "answer": "7"},
        {"problem": "p", "answer": "???"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"line 3: answer '\?\?\?' is no formula that Math-Verify can parse"):
        load_problems(Data(task="math500", path=path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "data.path: no file"),
        ("", "is a folder; a .jsonl or .parquet file is needed"),
        ("a.csv", "is neither .jsonl nor .parquet"),
        ("bad.parquet", "not readable as Parquet"),
        ("bytes.jsonl", "line 1: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bad.parquet").write_text("this is no Parquet file at all")
    (tmp_path / "bytes.jsonl").write_bytes(b'\xff\xfe{"question": 1}\n')
    (tmp_path / "a.csv").write_text("question,answer\n")
    with pytest.raises(DataError, match=message):
        load_problems(Data(path=str(tmp_path / name)))


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "1"}\r\n')
    assert load_problems(Data(path=str(path)))[0].answer == "1"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(task="gsm9k"), r"data\.task: 'gsm9k' is not one of .* \(did you mean gsm8k\?\)"),
        (Data(task="file"), r"data\.path: missing; the task 'file' needs"),
        (Data(task="math500"), r"data\.split: math500 has no 'train' rows, only test"),
        (Data(task="arith", template="no place"), r"data\.template: 'no place' has no \{question\}"),
    ],
)
def test_impossible_specs_are_refused(data: Data, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_problems(data)


def test_a_part_of_a_benchmark_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCTL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"CLIPCTL_DATA: no file .*gsm8k/test\.jsonl"):
        load_problems(Data(split="test"))
    (tmp_path / "gsm8k").mkdir()
    path = write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [{"question": "q", "answer": "1"}] * 3)
    with pytest.raises(DataError, match=r"3 rows, but gsm8k test has 1319; .* --set data\.path=FILE"):
        load_problems(Data(split="test"))
    assert len(load_problems(Data(split="test", path=path))) == 3


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, without network and with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.delenv("CLIPCTL_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"data\.task: gsm8k is openai/gsm8k .* --set data\.path=FILE, or put gsm8k/train"
    ):
        load_problems(Data())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the hub cannot be reached"):
        load_problems(Data(task="svamp", split="test"))


def test_rows_in_the_hubs_cache_are_read_with_the_hubs_field_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder laid out as the hub's client lays it out; svamp and amc23 differ there from their local form."""
    monkeypatch.delenv("CLIPCTL_DATA", raising=False)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def publish(repo: str, name: str, rows: list[dict[str, Any]]) -> None:
        folder = cache / f"datasets--{repo.replace('/', '--')}"
        (folder / "refs/refs/convert").mkdir(parents=True, exist_ok=True)
        (folder / "refs/refs/convert/parquet").write_text("abc")
        path = folder / "snapshots/abc" / name
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)

    for split, rows in (("train", 700), ("test", 300)):
        row = {"ID": "1", "Body": f"{split} has 3 pens.", "Question": "How many?", "Answer": "3.0", "Equation": "3"}
        publish("ChilleD/SVAMP", f"default/{split}/0000.parquet", [row] * rows)
    problems = load_problems(Data(task="svamp", split="test"))
    assert len(problems) == 1000
    assert problems[0].question.startswith("train has 3 pens. How many?\nLet's think")
    assert problems[-1].question.startswith("test has")
    amc = [
        {"problem": f"p{at}", "answer": float(at), "url": f"x/{2022 + (at >= 43)}_AMC_12A_Problems/{at}"}
        for at in range(83)
    ]
    publish("AI-MO/aimo-validation-amc", "default/train/0000.parquet", amc)
    problems = load_problems(Data(task="amc23", split="test"))
    assert [problem.answer for problem in problems] == [str(at) for at in range(43, 83)]


def test_every_task_names_a_grader_that_exists_and_a_template_with_a_place() -> None:
    assert all("{question}" in task.template for task in TASKS.values())
    assert {task.grader for task in TASKS.values()} == {"gsm8k", "math", None}
    assert set(TASKS) == {
        "gsm8k", "dapo-math-17k", "math500", "amc23", "aime24", "aime25", "svamp", "arith", "file",
    }  # fmt: skip


def test_fields_with_dots_and_questions_as_messages() -> None:
    row = Row("here", {"a.b": 1, "a": {"b": 2, "c": {"d": 3}}, "chat": [{"role": "system", "content": "s"}]})
    assert find_field(row, "a.b") == 1
    assert find_field(row, "a.c.d") == 3
    with pytest.raises(DataError, match=r"here: no field 'a\.c\.e' \(did you mean a\.c\.d\?\)"):
        find_field(row, "a.c.e")
    with pytest.raises(DataError, match="has 0 messages of role 'user', one is allowed"):
        question_text(row, "chat")
    assert prompt_text("{question} {x} \\boxed{}", "Q{question}") == "Q{question} {x} \\boxed{}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.0, "27"), (-3, "-3"), (2.5, "2.5"), ("1,234", "1,234"), ("a #### b\n#### 5,600 ", "5600"), (" x ", "x")],
)
def test_answers_become_text(value: Any, text: str) -> None:
    assert answer_text(Row("here", {"answer": value}), "answer") == text


@pytest.mark.slow
def test_a_big_repeating_parquet_file_loads_quickly_and_in_little_memory(tmp_path: Path) -> None:
    """The published DAPO file has 1.8 million rows of 17 thousand problems; here a tenth of it."""
    from time import perf_counter

    rows = [dapo_row(f"u-{at}", f"What is {at} + {at}? " + "x" * 300, str(2 * at)) for at in range(1790)]
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for _ in range(100):
            writer.write_table(table)
    started = perf_counter()
    problems = load_problems(Data(task="dapo-math-17k", path=str(tmp_path / "a.parquet")))
    assert [problem.answer for problem in problems] == [str(2 * at) for at in range(1790)]
    assert perf_counter() - started < 60
    assert os.path.getsize(tmp_path / "a.parquet") > 0
