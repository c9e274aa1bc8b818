"""Benchmarks: from what stands behind --benchmark to problems with their prompts, their grader, and hashes of both.

A benchmark is a name (`gsm8k`), a name with a file (`gsm8k=rows.jsonl` keeps template, fields and grader of gsm8k;
`mine=rows.parquet` is read as `eval.file` says), or a file. Rows of a name alone come from the folder of CLIPCTL_DATA,
else from the hub, and their number is checked.
"""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from clipctl.errors import DataError, SpecError
from clipctl.rollout import Problem
from clipctl.spec import NAME_PATTERN, Arith, Data, EvalFile, EvalSettings
from clipctl.tasks import BOXED_TEMPLATE, GSM8K_TEMPLATE, READERS, TASKS, load_problems, prompt_text

NAMES = ("gsm8k", "math500", "amc23", "aime24", "aime25", "svamp", "arith")
"""Benchmarks that are known by name."""
TEMPLATES = {"gsm8k": GSM8K_TEMPLATE, "math": BOXED_TEMPLATE}
"""The question, then the instruction that the grader needs."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """P problems to evaluate, in the order of the rows.

    problems: `question` is the bare question, without the template. problems_of: rows that the benchmark has. source: where
    they come from. dataset_hash: of all questions and answers that are evaluated.
    """

    name: str
    source: str
    grader: str
    template: str
    problems: list[Problem]
    problems_of: int
    published: int | None
    """Rows that a benchmark of this name has, where a file replaces them."""

    @property
    def prompts(self) -> list[str]:
        """The prompt texts, the template applied."""
        return [prompt_text(self.template, problem.question) for problem in self.problems]

    @property
    def template_hash(self) -> str:
        return short_hash(self.template)

    @property
    def problem_hashes(self) -> list[str]:
        """What makes a problem the same one in two evaluations: question and answer."""
        return [short_hash(problem.question, problem.answer) for problem in self.problems]

    @property
    def dataset_hash(self) -> str:
        return short_hash(*self.problem_hashes)

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        if self.published is None or self.published == self.problems_of:
            return []
        return [f"{self.name}: {self.source} has {self.problems_of} rows, the published benchmark {self.published}"]


def short_hash(*texts: str) -> str:
    """16 hex digits of BLAKE2b over the texts and where each ends."""
    return blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()


def parse_benchmark(text: str) -> tuple[str, str | None]:
    """(name, file). Raises SpecError for a name that is unknown, with the nearest right one, or impossible."""
    name, equals, path = text.partition("=")
    if equals:
        if not NAME_PATTERN.fullmatch(name) or not path:
            raise SpecError(f"--benchmark: {text!r} is not NAME=FILE, such as gsm8k=rows.jsonl")
        return name, path
    if text in NAMES:
        return text, None
    file = Path(text)
    if file.suffix in READERS:
        if not NAME_PATTERN.fullmatch(file.stem):
            raise SpecError(f"--benchmark: {file.stem!r} cannot be its name; give one: --benchmark NAME={text}")
        return file.stem, text
    near = difflib.get_close_matches(text, NAMES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise SpecError(f"--benchmark: {text!r} is not one of {', '.join(NAMES)}{hint}, nor a .jsonl or .parquet file")


def grader_of_benchmark(text: str, file: EvalFile) -> str | None:
    """The grader of what stands behind --benchmark, without a look at its rows. file: how files of other names are read."""
    name, equals, _ = text.partition("=")
    name = name if equals else Path(text).stem
    return TASKS[name].grader if name in NAMES else file.grader


def load_benchmarks(settings: EvalSettings, arith: Arith) -> list[Benchmark]:
    """The benchmarks of an evaluation. Raises SpecError for names that are unknown or given twice, DataError for rows that
    are missing, too many or too few, or not usable."""
    named = [parse_benchmark(text) for text in settings.benchmarks]
    names = [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SpecError(f"--benchmark: {twice[0]!r} is given twice; name files apart with NAME=FILE")
    return [load_benchmark(name, path, settings, arith) for name, path in named]


def load_benchmark(name: str, path: str | None, settings: EvalSettings, arith: Arith) -> Benchmark:
    """One benchmark, cut at `settings.limit` problems."""
    if path is not None and not Path(path).expanduser().is_file():
        raise DataError(f"--benchmark: no file {path!r} for {name}")
    if name in NAMES:
        task = TASKS[name]
        grader, template = task.grader, task.template
        data = Data(task=name, split="test", path=path, template="{question}", arith=arith)
    else:
        file = settings.file
        grader, template = file.grader, TEMPLATES[file.grader] if file.template is None else file.template
        data = _data_of_file(path, file)
    assert grader is not None
    if "{question}" not in template:
        raise SpecError(f"eval.file.template: {template!r} has no {{question}}, the place where the question goes")
    problems = load_problems(data, grader=grader)
    return Benchmark(
        name,
        _source(name, path),
        grader,
        template,
        problems[: settings.limit],
        len(problems),
        dict(TASKS[name].rows).get("test") if name in NAMES else None,
    )


def _data_of_file(path: str | None, file: EvalFile) -> Data:
    return Data(
        task="file",
        split="test",
        path=path,
        question_field=file.question_field,
        answer_field=file.answer_field,
        template="{question}",
    )


def _source(name: str, path: str | None) -> str:
    if path is not None:
        return str(Path(path).expanduser().resolve())
    folder = os.environ.get("CLIPCTL_DATA")
    if name == "arith":
        return "generated"
    if folder:
        return str((Path(folder).expanduser() / name / "test.jsonl").resolve())
    return f"hub: {dict(TASKS[name].hub)['test'].repo}"


def limit_notes(benchmarks: Sequence[Benchmark], limit: int | None) -> list[str]:
    """Where the limit is above what a benchmark has."""
    return [
        f"--limit: {limit} is more than the {benchmark.problems_of} problems of {benchmark.name}; all are evaluated"
        for benchmark in benchmarks
        if limit is not None and limit > benchmark.problems_of
    ]
