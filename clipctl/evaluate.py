"""Evaluation: k samples of every problem of every benchmark in one stream of the sampler, graded while others are sampled.

A sample is keyed by (seed, benchmark, row of the problem, sample): the draws are the same at every rollout, whatever is
evaluated beside it, and a stopped evaluation that goes on gives the rows of an undisturbed one.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from clipctl.answers import extract_math, last_number
from clipctl.benchmarks import Benchmark, short_hash
from clipctl.engine import Sampler
from clipctl.errors import SpecError
from clipctl.eval_cache import cache_key, find_entry, hold, save_entry
from clipctl.eval_metrics import by_problem, pass_intervals, samples_each, summary
from clipctl.models import ChatTokenizer, model_shape
from clipctl.overlap import work_while_making
from clipctl.ranks import ALONE, Ranks
from clipctl.rewards import GradingPool
from clipctl.rollout import Completion, DrawKey, Prompt, SamplingParams
from clipctl.spec import Engine, EvalSettings, Model

Rows = dict[str, list[Any]]
"""Rows of the table `evals` and their texts, by column."""
GRADED_AT_ONCE = 256
"""Samples whose rows are kept together: what Ctrl-C may lose of the gradings under way."""
GRADER_FILES = ("answers.py", "formulas.py", "grading_worker.py", "rewards.py")
"""What decides an outcome: numbers of another version of these are not reused."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What an evaluation's numbers depend on beside its benchmarks. max_tokens: the longest response; model_hash: of the
    model's files, None where they have changed."""

    model: Model
    engine: Engine
    settings: EvalSettings
    max_tokens: int
    chat_template: str
    model_hash: str | None


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What samples and grades. sampler: opened when there is something to sample; pool: the grading processes; abandon: what
    Ctrl-C does about gradings under way, before they are waited for; ranks: share the problems."""

    sampler: Callable[[], Sampler]
    tokenizer: ChatTokenizer
    stop_ids: frozenset[int]
    pool: GradingPool
    setup: Setup
    abandon: Callable[[], None] = lambda: None
    ranks: Ranks = ALONE

    @property
    def params(self) -> SamplingParams:
        settings = self.setup.settings
        return SamplingParams(self.setup.max_tokens, settings.temperature, settings.top_p, self.stop_ids)


@dataclass(frozen=True, slots=True)
class EvalReport:
    """How far an evaluation is, over all benchmarks. tokens_per_second: of this attempt."""

    problems: int
    problems_of: int
    samples: int
    correct: int
    tokens_per_second: float


def eval_prompts(benchmark: Benchmark, tokenizer: ChatTokenizer, seed: int) -> list[Prompt]:
    """The prompts of a benchmark; their keys depend on its name and the row alone."""
    stream = -1 - crc32(benchmark.name.encode())
    return [
        Prompt(tokenizer.encode_prompt(text), DrawKey(seed, stream, position))
        for position, text in enumerate(benchmark.prompts)
    ]


def sample_benchmarks(
    evaluator: Evaluator,
    benchmarks: Sequence[Benchmark],
    keep: Callable[[Rows], None],
    done: Collection[tuple[str, int]] = (),
) -> None:
    """Samples and grades all that is not done, (benchmark, row), and gives the rows of finished problems to `keep`, which is
    called in the grading thread. Ctrl-C: what was sampled is graded and kept first, as far as the evaluator waits for it.

    Of several ranks each takes some of the problems, and all get all rows, those of the others at the end."""
    places = [(benchmark, at) for benchmark in benchmarks for at in range(len(benchmark.problems))]
    prompts = [p for b in benchmarks for p in eval_prompts(b, evaluator.tokenizer, evaluator.setup.settings.seed)]
    mine = evaluator.ranks.mine(len(places))
    places, prompts = [places[at] for at in mine], [prompts[at] for at in mine]
    made: list[Rows] = []
    skipped = {place for place, (benchmark, at) in enumerate(places) if (benchmark.name, at) in done}
    hashes = {benchmark.name: benchmark.problem_hashes for benchmark in benchmarks}

    problems_at_once = max(1, GRADED_AT_ONCE // evaluator.setup.settings.k)

    def grade_all(waiting: list[tuple[int, list[Completion]]]) -> None:
        for at in range(0, len(waiting), problems_at_once):
            grade(waiting[at : at + problems_at_once])

    def grade(waiting: list[tuple[int, list[Completion]]]) -> None:
        rows: Rows = {}
        for name in dict.fromkeys(places[place][0].name for place, _ in waiting):
            mine = [(places[place], group) for place, group in waiting if places[place][0].name == name]
            found = graded_rows(
                evaluator, mine[0][0][0], [at for (_, at), _ in mine], [group for _, group in mine], hashes[name]
            )
            rows = {column: rows.get(column, []) + values for column, values in found.items()}
        keep(rows)
        made.append(rows)

    def work() -> list[Rows]:
        if places:
            stream = evaluator.sampler().sample(prompts, evaluator.setup.settings.k, evaluator.params, done=skipped)
            work_while_making(stream, grade_all, evaluator.abandon)
        return made

    for rank, found in enumerate(evaluator.ranks.share(work)):
        for rows in found if rank != evaluator.ranks.rank else ():
            keep(rows)


def graded_rows(
    evaluator: Evaluator,
    benchmark: Benchmark,
    positions: Sequence[int],
    groups: Sequence[Sequence[Completion]],
    hashes: Sequence[str],
) -> Rows:
    """The rows of some problems' samples, one after the other."""
    flat = [
        (position, sample, completion)
        for position, group in zip(positions, groups, strict=True)
        for sample, completion in enumerate(group)
    ]
    texts = [evaluator.tokenizer.decode(completion.token_ids) for _, _, completion in flat]
    golds = [benchmark.problems[position].answer for position, _, _ in flat]
    outcomes = evaluator.pool.grade_many(benchmark.grader, texts, golds)
    return {
        "benchmark": [benchmark.name] * len(flat),
        "problem_id": [benchmark.problems[position].id for position, _, _ in flat],
        "problem_hash": [hashes[position] for position, _, _ in flat],
        "position": [position for position, _, _ in flat],
        "sample": [sample for _, sample, _ in flat],
        "outcome": list(outcomes),
        "correct": [outcome == "correct" for outcome in outcomes],
        "tokens": [len(completion.token_ids) for _, _, completion in flat],
        "truncated": [completion.finish == "length" for _, _, completion in flat],
        "answer": [extracted_answer(benchmark.grader, text) for text in texts],
        "logprob_sum": [sum(completion.logprobs) for _, _, completion in flat],
        "text": texts,
    }


def extracted_answer(grader: str, text: str) -> str | None:
    """The answer that the grader finds in a completion, as text; None where it finds none."""
    if grader == "gsm8k":
        return last_number(text)
    answer = extract_math(text)
    if answer is None:
        return None
    return last_number(answer.text) if answer.form == "tail" else answer.text[:200]


def segments_of(rows: Rows) -> dict[str, Mapping[str, Any]]:
    """The rows as the tables `evals` and `eval_texts`."""
    texts = {name: rows[name] for name in ("benchmark", "position", "sample", "text")}
    return {"evals": {name: values for name, values in rows.items() if name != "text"}, "eval_texts": texts}


def evaluation_columns(
    benchmarks: Sequence[Benchmark],
    setup: Setup,
    reused: Mapping[str, str],
    started_at: datetime | None,
    seconds: float,
) -> dict[str, list[Any]]:
    """The `evaluations` rows, by column: one a benchmark, with all settings and hashes."""
    settings = setup.settings
    size = len(benchmarks)
    return {
        "model": [setup.model.path] * size,
        "benchmark": [benchmark.name for benchmark in benchmarks],
        "source": [benchmark.source for benchmark in benchmarks],
        "grader": [benchmark.grader for benchmark in benchmarks],
        "grader_version": [grader_version()] * size,
        "problems": [len(benchmark.problems) for benchmark in benchmarks],
        "problems_of": [benchmark.problems_of for benchmark in benchmarks],
        "k": [settings.k] * size,
        "temperature": [settings.temperature] * size,
        "top_p": [settings.top_p] * size,
        "max_tokens": [setup.max_tokens] * size,
        "seed": [settings.seed] * size,
        "template": [benchmark.template for benchmark in benchmarks],
        "template_hash": [benchmark.template_hash for benchmark in benchmarks],
        "chat_template_hash": [short_hash(setup.chat_template)] * size,
        "dataset_hash": [benchmark.dataset_hash for benchmark in benchmarks],
        "model_hash": [setup.model_hash] * size,
        "settings": [engine_json(setup)] * size,
        "reused_from": [reused.get(benchmark.name) for benchmark in benchmarks],
        "started_at": [started_at] * size,
        "seconds": [seconds] * size,
    }


def engine_json(setup: Setup) -> str:
    """How the numbers were computed: dtype and engine, as JSON."""
    engine = setup.engine.model_dump_json(
        exclude={"trainer", "deepspeed", "tokens_per_microbatch", "gradient_checkpointing"}
    )
    return f'{{"dtype": "{setup.model.dtype}", "engine": {engine}}}'


def grader_version() -> str:
    """Changes with every change of the graders' code."""
    return short_hash(*(Path(__file__).with_name(name).read_text() for name in GRADER_FILES))


def reuse_keys(benchmarks: Sequence[Benchmark], setup: Setup) -> dict[str, str]:
    """The cache's key of each benchmark: everything but time and place that its rows depend on. Empty where the model has
    no hash or reuse is not wanted."""
    if setup.model_hash is None or not setup.settings.reuse:
        return {}
    columns = evaluation_columns(benchmarks, setup, {}, None, 0.0)
    left_out = ("model", "source", "problems_of", "template", "reused_from", "started_at", "seconds")
    facts = {name: values for name, values in columns.items() if name not in left_out}
    return {
        benchmark.name: cache_key({name: values[at] for name, values in facts.items()})
        for at, benchmark in enumerate(benchmarks)
    }


def evaluate(
    evaluator: Evaluator,
    benchmarks: Sequence[Benchmark],
    keys: Mapping[str, str],
    keep: Callable[[Rows], None],
    take: Callable[[str, str, Rows], None],
    finished: Callable[[Benchmark], tuple[str, Rows]],
    *,
    done: Collection[tuple[str, int]] = (),
    tell: Callable[[str], None],
) -> None:
    """Gives all rows that are not done to `keep` as they are sampled, and those that the cache has to `take` (benchmark, id
    of the evaluation that made them, rows).

    keys: of the cache, by benchmark; what is begun is not looked up. finished: (eval id, all rows) of a benchmark, for
    the cache. Another process that works on the same numbers is waited for.
    """
    begun, ranks = {name for name, _ in done}, evaluator.ranks
    missing = {benchmark.name: benchmark for benchmark in benchmarks}
    with ExitStack() as held:
        for name, key in sorted(keys.items(), key=lambda pair: pair[1]):
            if name in begun:
                continue
            entry = None
            if ranks.rank == 0 and (entry := find_entry(key)) is None:
                held.enter_context(hold(key, partial(tell, f"{name}: waiting for another process that evaluates it")))
                entry = find_entry(key)
            entry = ranks.broadcast(entry)
            if entry is not None:
                take(name, *entry)
                del missing[name]
        if missing:
            sample_benchmarks(evaluator, list(missing.values()), keep, done)
        for name, benchmark in missing.items():
            if name in keys and ranks.rank == 0:
                problem = save_entry(keys[name], *finished(benchmark))
                if problem:
                    tell(f"the evaluation of {name} cannot be kept for reuse: {problem}")


def evaluation_words(rows: Rows) -> dict[str, str]:
    """mean@n with its interval, and pass@n, of each benchmark's rows, in words."""
    said = {}
    for benchmark in dict.fromkeys(rows["benchmark"]):
        mine = [at for at, name in enumerate(rows["benchmark"]) if name == benchmark]
        names = ("problem_hash", "position", "sample", "correct", "tokens", "truncated", "answer")
        problems = by_problem({name: rows[name][at] for name in names} for at in mine)
        n = samples_each(problems)
        mean = summary(problems)[f"mean@{n}"]
        passed = pass_intervals(problems)[n]
        said[benchmark] = f"mean@{n} {mean.value:.3f} ({mean.low:.3f} … {mean.high:.3f}), pass@{n} {passed.value:.3f}"
    return said


def longest_prompt(benchmarks: Iterable[Benchmark], tokenizer: ChatTokenizer) -> int:
    """Tokens of the longest prompt of all benchmarks."""
    return max(len(tokenizer.encode_prompt(text)) for benchmark in benchmarks for text in benchmark.prompts)


def check_eval_context(
    benchmarks: Iterable[Benchmark], tokenizer: ChatTokenizer, max_tokens: int, folder: Path, model: str
) -> None:
    """Raises SpecError where a prompt and the longest response exceed the model's positions: no problem is left out."""
    shape = model_shape(str(folder))
    if shape is None:
        return
    for benchmark in benchmarks:
        longest = longest_prompt([benchmark], tokenizer)
        if longest >= shape.context:
            raise SpecError(
                f"--benchmark: {benchmark.name} has a prompt of {longest} tokens, {model} has {shape.context} positions for "
                "prompt and response; give a model of more, or fewer problems with --limit"
            )
        if longest + max_tokens > shape.context:
            raise SpecError(
                f"eval.max_response_tokens = {max_tokens}: with prompts of up to {longest} tokens in {benchmark.name} that "
                f"exceeds the {shape.context} positions of {model}; at most {shape.context - longest}"
            )
