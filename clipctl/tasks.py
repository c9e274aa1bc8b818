r"""Tasks: from a name and a few options to problems, each with its prompt text and a gold answer that can be read.

Rows come from exactly one place, in this order: the file `data.path`; the folder of the environment variable
CLIPCTL_DATA (`<task>/<split>.jsonl`); the hub. None stands in for another that fails. Whatever the place, every row has
a question and an answer that the task's grader can read, or the load fails with the file and the row.
"""

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipctl.answers import is_plain_number, last_number
from clipctl.errors import DataError, SpecError, first_line
from clipctl.grading_worker import NOT_PARSED, Workers, parse_golds
from clipctl.rollout import Problem
from clipctl.spec import Data

GSM8K_TEMPLATE = '{question}\nLet\'s think step by step and output the final answer after "####".'
BOXED_TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

CONVERTED = "refs/convert/parquet"
"""The hub's own Parquet copy of a dataset, the same path for every one: <config>/<split>/0000.parquet."""
ARITH_TEST = 512
"""Problems of arith's test split."""
GOLD_SECONDS = 5
"""Limit for parsing one gold answer."""


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A split of a dataset on the hub."""

    repo: str
    files: tuple[str, ...]
    revision: str = "main"
    question: tuple[str, ...] = ()
    """Fields that together are the question, where they are not called as in the task."""
    answer: str | None = None
    """Field of the answer, where it is not called as in the task."""
    only: tuple[str, str] | None = None
    """(field, text): the rows that have this text in this field."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a task's rows look like. `grader` is "gsm8k", "math" or None; `rows` the rows of each split, where known."""

    grader: str | None
    template: str = "{question}"
    question_field: str = "question"
    answer_field: str = "answer"
    id_field: str | None = None
    """Field of the problem's id; none: the number of the row, from 0."""
    hub: tuple[tuple[str, HubFiles], ...] = ()
    """(split, files), empty for tasks that are not on the hub."""
    rows: tuple[tuple[str, int], ...] = ()
    unique: bool = False
    """The published rows repeat: keep the first of each question."""


def _converted(*splits: str) -> tuple[str, ...]:
    return tuple(f"default/{split}/0000.parquet" for split in splits)


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        grader="gsm8k",
        template=GSM8K_TEMPLATE,
        hub=(
            ("train", HubFiles("openai/gsm8k", ("main/train-00000-of-00001.parquet",))),
            ("test", HubFiles("openai/gsm8k", ("main/test-00000-of-00001.parquet",))),
        ),
        rows=(("train", 7473), ("test", 1319)),
    ),
    "dapo-math-17k": Task(
        grader="math",
        question_field="prompt",
        answer_field="reward_model.ground_truth",
        id_field="extra_info.index",
        hub=(("train", HubFiles("BytedTsinghua-SIA/DAPO-Math-17k", ("data/dapo-math-17k.parquet",))),),
        unique=True,
    ),
    "math500": Task(
        grader="math",
        template=BOXED_TEMPLATE,
        question_field="problem",
        hub=(("test", HubFiles("HuggingFaceH4/MATH-500", ("test.jsonl",))),),
        rows=(("test", 500),),
    ),
    "amc23": Task(
        grader="math",
        template=BOXED_TEMPLATE,
        question_field="problem",
        hub=(
            (
                "test",
                HubFiles("AI-MO/aimo-validation-amc", _converted("train"), CONVERTED, only=("url", "2023_AMC_12")),
            ),
        ),
        rows=(("test", 40),),
    ),
    "aime24": Task(
        grader="math",
        template=BOXED_TEMPLATE,
        question_field="problem",
        hub=(("test", HubFiles("HuggingFaceH4/aime_2024", _converted("train"), CONVERTED)),),
        rows=(("test", 30),),
    ),
    "aime25": Task(
        grader="math",
        template=BOXED_TEMPLATE,
        question_field="problem",
        hub=(("test", HubFiles("math-ai/aime25", _converted("test"), CONVERTED)),),
        rows=(("test", 30),),
    ),
    "svamp": Task(
        grader="gsm8k",
        template=GSM8K_TEMPLATE,
        hub=(
            (
                "test",
                HubFiles(
                    "ChilleD/SVAMP",
                    _converted("train", "test"),
                    CONVERTED,
                    question=("Body", "Question"),
                    answer="Answer",
                ),
            ),
        ),
        rows=(("test", 1000),),
    ),
    "arith": Task(grader="gsm8k"),
    "file": Task(grader=None),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row and where it is, as an error names it."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fields:
    """Where the parts of a problem are in a row, as dotted names."""

    question: tuple[str, ...]
    answer: str
    id: str | None
    only: tuple[str, str] | None = None

    def columns(self) -> list[str]:
        """The top-level columns that are needed."""
        names = [*self.question, self.answer, *([self.id] if self.id else []), *([self.only[0]] if self.only else [])]
        return sorted({name.partition(".")[0] for name in names})


def find_task(name: str) -> Task:
    """The task of that name. Raises SpecError with the nearest right one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SpecError(f"data.task: {name!r} is not one of {', '.join(TASKS)}{hint}")
    return TASKS[name]


def task_grader(data: Data) -> str | None:
    """How the task grades: "gsm8k", "math", or None for `file`, which has no grader of its own. Raises SpecError."""
    return find_task(data.task).grader


def load_problems(data: Data, *, grader: str | None = None) -> list[Problem]:
    """The problems of a task, in the order of the rows. `question` is the whole prompt text, the template applied.

    grader: with which the golds must be readable; None: the task's own, if it has one.
    Raises SpecError for an impossible `data` group; DataError for rows that are missing, empty, not readable, without a
    question or answer, or with an answer that the grader cannot read. Each names the file and the row.
    """
    task = find_task(data.task)
    template = task.template if data.template is None else data.template
    if "{question}" not in template:
        raise SpecError(f"data.template: {template!r} has no {{question}}, the place where the question goes")
    rows, source = read_rows(data, task)
    problems, places = make_problems(rows, fields_of(data, task), template, unique=task.unique)
    if not problems:
        raise DataError(f"{source}: no rows; a task needs at least one")
    expected = dict(task.rows).get(data.split)
    if data.path is None and expected is not None and len(problems) != expected:
        raise DataError(
            f"{source}: {len(problems)} rows, but {data.task} {data.split} has {expected}; "
            "fetch it again, or give a part of it with --set data.path=FILE"
        )
    check_answers(problems, places, grader or task.grader)
    return problems


def read_rows(data: Data, task: Task) -> tuple[Iterator[Row], str]:
    """The rows of a task and the name of their source. Raises SpecError and DataError."""
    if data.path is not None:
        path = Path(data.path).expanduser()
        return read_file(path, fields_of(data, task).columns(), "data.path"), str(path)
    if data.task == "arith":
        return _arith_rows(data), f"arith {data.arith.style}"
    if data.task == "file":
        raise SpecError("data.path: missing; the task 'file' needs --set data.path=FILE (.jsonl or .parquet)")
    splits = [split for split, _ in task.hub]
    if data.split not in splits:
        raise SpecError(f"data.split: {data.task} has no {data.split!r} rows, only {', '.join(splits)}")
    folder = os.environ.get("CLIPCTL_DATA")
    if folder:
        path = Path(folder).expanduser() / data.task / f"{data.split}.jsonl"
        return read_file(path, fields_of(data, task).columns(), "CLIPCTL_DATA"), str(path)
    return _hub_rows(data, task)


def missing_rows(data: Data) -> str | None:
    """The dataset of the hub that would be asked for the rows; None where they are here. Downloads nothing. Raises SpecError
    and DataError for rows that cannot come from there."""
    task = find_task(data.task)
    hub = dict(task.hub).get(data.split)
    if data.path is not None or os.environ.get("CLIPCTL_DATA") or hub is None:
        read_rows(data, task)
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(hub.repo, name, repo_type="dataset", revision=hub.revision) for name in hub.files]
    return None if all(isinstance(path, str) for path in cached) else hub.repo


def fields_of(data: Data, task: Task) -> Fields:
    """Where question and answer are: the spec's fields, else those of the hub's files if the rows come from there, else
    the task's."""
    hub = dict(task.hub).get(data.split)
    from_hub = data.path is None and not os.environ.get("CLIPCTL_DATA")
    question: tuple[str, ...] = (task.question_field,)
    answer, only = task.answer_field, None
    if hub is not None and from_hub:
        question, answer, only = hub.question or question, hub.answer or answer, hub.only
    question = question if data.question_field is None else (data.question_field,)
    return Fields(question, answer if data.answer_field is None else data.answer_field, task.id_field, only)


def make_problems(
    rows: Iterable[Row], fields: Fields, template: str, *, unique: bool
) -> tuple[list[Problem], list[str]]:
    """The problems and the place of each. unique: of rows with the same question keep the first. Raises DataError."""
    problems: list[Problem] = []
    places: list[str] = []
    questions: set[str] = set()
    ids: set[str] = set()
    for number, row in enumerate(rows):
        if fields.only is not None and fields.only[1] not in str(find_field(row, fields.only[0])):
            continue
        question = " ".join(question_text(row, name) for name in fields.question)
        if unique and question in questions:
            continue
        questions.add(question)
        id_ = str(number) if fields.id is None else _id_text(row, fields.id, number)
        if id_ in ids:
            id_ = f"{id_}-{number}"
        ids.add(id_)
        problems.append(Problem(id_, prompt_text(template, question), answer_text(row, fields.answer)))
        places.append(row.place)
    return problems, places


def prompt_text(template: str, question: str) -> str:
    """The prompt of a question. Only `{question}` is replaced: other braces, as in TeX, stay."""
    return template.replace("{question}", question)


def question_text(row: Row, field: str) -> str:
    """A question: a text, or chat messages of which one is the user's, then its whole content. Raises DataError."""
    value = find_field(row, field)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        said = [message.get("content") for message in value if message.get("role") == "user"]
        value = said[0] if len(said) == 1 else None
        if value is None:
            raise DataError(f"{row.place}: field {field!r} has {len(said)} messages of role 'user', one is allowed")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.place}: field {field!r} is {_shown(value)}, a question in words is needed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{row.place}: field {field!r} has half a surrogate pair, which is no text")
    return value


def answer_text(row: Row, field: str) -> str:
    """A gold answer as text: what follows the last "####" where there is one, then without thousands commas; whole
    numbers stored as floats without ".0". Raises DataError where there is none."""
    value = find_field(row, field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and "####" in value:
        value = value.rpartition("####")[2].replace(",", "")
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{row.place}: field {field!r} is {_shown(value)}, so the row has no answer; add one or drop it"
        )
    return value.strip()


def find_field(row: Row, field: str) -> object:
    """The value of a dotted field, such as "reward_model.ground_truth". Raises DataError with the nearest field."""
    if field in row.values:
        return row.values[field]
    value: object = row.values
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            known = sorted(_field_names(row.values))
            near = difflib.get_close_matches(field, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"{row.place}: no field {field!r}{hint}; it has {', '.join(known) or 'none'}: "
                "set data.question_field and data.answer_field (of a benchmark: eval.file.question_field and "
                "eval.file.answer_field)"
            )
        value = value[part]
    return value


def check_answers(problems: list[Problem], places: list[str], grader: str | None) -> None:
    """Raises DataError for the first answer that the grader cannot read. Plain numbers cost nothing; formulas are read
    by Math-Verify, once, in processes that are killed after GOLD_SECONDS each."""
    if grader == "gsm8k":
        for problem, place in zip(problems, places, strict=True):
            if last_number(problem.answer) is None:
                raise DataError(f"{place}: answer {_shown(problem.answer)} has no number, which the gsm8k grader needs")
    elif grader == "math":
        formulas = [at for at, problem in enumerate(problems) if not is_plain_number(problem.answer)]
        if not formulas:
            return
        with Workers(min(2, os.cpu_count() or 1), GOLD_SECONDS) as workers:
            parsed = parse_golds(workers, [problems[at].answer for at in formulas])
        for at in formulas:
            outcome = parsed[problems[at].answer]
            if outcome in NOT_PARSED:
                why = {"timeout": f"takes over {GOLD_SECONDS} s to parse", "crash": "ends its parser"}
                reason = why.get(outcome, "is no formula that Math-Verify can parse")
                raise DataError(f"{places[at]}: answer {_shown(problems[at].answer)} {reason}; mend or drop the row")


def read_file(path: Path, columns: list[str], option: str) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file, by suffix. Raises DataError, naming `option`, for anything else.

    columns: what is read of a Parquet file, where all else would cost memory for nothing.
    """
    if path.is_dir():
        raise DataError(f"{option}: {str(path)!r} is a folder; a .jsonl or .parquet file is needed")
    if path.suffix not in READERS:
        raise DataError(f"{option}: {str(path)!r} is neither .jsonl nor .parquet")
    if not path.is_file():
        raise DataError(f"{option}: no file {str(path)!r}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{option}: {str(path)!r} cannot be read (permissions)")
    return READERS[path.suffix](path, columns)


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise DataError(f"{place}: {_shown(values)} is not an object of named fields")
            yield Row(place, values)


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        # With a column missing all are read, so that the error can name those there are.
        wanted = columns if set(columns) <= set(names) else None
        number = 0
        for batch in file.iter_batches(batch_size=8192, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({first_line(error)})") from None


READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


def _arith_rows(data: Data) -> Iterator[Row]:
    """Train: `arith.problems` of them; test: the ARITH_TEST that follow, so that no problem is in both."""
    from clipctl.arith import arith_problems

    first, last = (
        (0, data.arith.problems) if data.split == "train" else (data.arith.problems, data.arith.problems + ARITH_TEST)
    )
    for number, (question, answer) in enumerate(arith_problems(data.arith.style, last, data.arith.seed)[first:]):
        yield Row(f"arith {data.arith.style}, problem {number}", {"question": question, "answer": answer})


def _hub_rows(data: Data, task: Task) -> tuple[Iterator[Row], str]:
    hub = dict(task.hub)[data.split]
    paths = [_hub_file(data, hub, name) for name in hub.files]
    columns = fields_of(data, task).columns()
    return (row for path in paths for row in read_file(path, columns, "hub")), hub.repo


def _hub_file(data: Data, hub: HubFiles, name: str) -> Path:
    """The file, from the hub's cache, else downloaded. Raises DataError when it is in neither."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(hub.repo, name, repo_type="dataset", revision=hub.revision)
    if isinstance(cached, str):
        return Path(cached)
    reason = "the hub cannot be reached"
    if _hub_answers():
        try:
            return Path(hf_hub_download(hub.repo, name, repo_type="dataset", revision=hub.revision))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = f"{type(error).__name__}, {first_line(error)}"
    raise DataError(
        f"data.task: {data.task} is {hub.repo} on the hub, which cannot be had ({reason}); give the rows with "
        f"--set data.path=FILE, or put {data.task}/{data.split}.jsonl into the folder that CLIPCTL_DATA names"
    )


def _hub_answers() -> bool:
    """One short try: the hub's own client would retry for 20 s before it says that there is no network."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True  # It answered.
    except OSError:
        return False
    return True


def _id_text(row: Row, field: str, number: int) -> str:
    """The row's own id; its number in a file of one's own that has none."""
    head = field.partition(".")[0]
    value = find_field(row, field) if isinstance(row.values.get(head), dict) or field in row.values else None
    return str(number) if value is None else str(value)


def _field_names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _shown(value: object) -> str:
    """A value for an error of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
