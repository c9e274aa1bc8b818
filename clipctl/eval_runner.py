"""One evaluation by `clipctl eval`, from its target to a finished folder: it goes on where it stopped, and never writes into
the run that it evaluates."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Timer
from time import perf_counter
from typing import IO, Any

import torch

from clipctl.benchmarks import Benchmark, limit_notes, load_benchmarks
from clipctl.engine import Sampler, check_sampler, open_sampler
from clipctl.errors import EngineError, Interrupted, SpecError, StoreError, first_line
from clipctl.eval_cache import model_hash
from clipctl.eval_spec import ALONE, EvalSpec, eval_name, of_run, refuse_another_spec
from clipctl.evaluate import (
    EvalReport,
    Evaluator,
    Rows,
    Setup,
    check_eval_context,
    evaluate,
    evaluation_columns,
    grader_version,
    longest_prompt,
    reuse_keys,
    segments_of,
)
from clipctl.folder import is_evaluation, read_json, state_of, usable_status
from clipctl.journal import RunWriter, continue_evaluation, create_run
from clipctl.models import ChatTokenizer, find_model, load_tokenizer, stop_ids
from clipctl.rewards import GradingPool
from clipctl.schema import TABLES
from clipctl.spec import NAME_PATTERN, validate
from clipctl.store import open_runs
from clipctl.targets import find_target

CACHED = tuple(name for name in TABLES["evals"] if name != "rollout")
STOP_SECONDS = 10.0
"""How long Ctrl-C waits for what is being graded."""
CHECKED = (
    ("dataset_hash", "the problems"),
    ("template_hash", "the prompt template"),
    ("chat_template_hash", "the chat template"),
    ("model_hash", "the model's files"),
    ("grader_version", "the grader"),
)
"""What must be as it was when an evaluation began."""


def run_target(text: str, runs_dir: Path) -> dict[str, Any]:
    """The layer of `--run RUN[@ROLLOUT]`; 0 rollouts is the base model. Raises what `find_target` raises."""
    target = find_target(text, runs_dir, "--run")
    layer = of_run(target.spec) | {"run": str(target.folder.resolve()), "rollout": target.rollout}
    if target.checkpoint is not None:
        layer["model"]["path"] = str(target.checkpoint.resolve())
    return layer


def model_target(path: str) -> dict[str, Any]:
    """The layer of `--model M`."""
    return ALONE | {"model": ALONE["model"] | {"path": path}}


@dataclass(frozen=True, slots=True)
class Done:
    """What earlier attempts did. correct: samples of each finished problem, by (benchmark, row); reused: the evaluation that
    made them, by benchmark."""

    correct: dict[tuple[str, int], int]
    reused: dict[str, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Problems, tokenizer and setup of an evaluation, before anything is sampled."""

    benchmarks: list[Benchmark]
    model_folder: Path
    tokenizer: ChatTokenizer
    setup: Setup


def load(spec: EvalSpec) -> Loaded:
    """Everything but the weights. Raises SpecError, DataError and ModelError for what cannot be evaluated."""
    max_tokens = spec.eval.max_response_tokens
    assert max_tokens is not None
    benchmarks = load_benchmarks(spec.eval, spec.arith)
    check_sampler(spec.engine)
    model_folder = find_model(spec.model.path, pull=True)
    tokenizer = load_tokenizer(model_folder, spec.model.chat_template)
    check_eval_context(benchmarks, tokenizer, max_tokens, model_folder, spec.model.path)
    chat_template: str = tokenizer.tokenizer.chat_template
    setup = Setup(spec.model, spec.engine, spec.eval, max_tokens, chat_template, model_hash(model_folder))
    return Loaded(benchmarks, model_folder, tokenizer, setup)


def run_evaluation(
    spec: EvalSpec,
    *,
    runs_dir: Path,
    name: str | None = None,
    report: Callable[[EvalReport], None] = lambda report: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Evaluates, or goes on, and returns the folder `runs_dir`/`name`; at once where it is finished.

    Raises a ClipctlError of one line. After Ctrl-C (Interrupted) the same call goes on with what is missing.
    """
    if name is not None:
        _check_name(name)
        earlier_status(runs_dir / name, spec)
    loaded = load(spec)
    for note in [*limit_notes(loaded.benchmarks, spec.eval.limit), *(n for b in loaded.benchmarks for n in b.notes)]:
        tell(note)
    facts = [str(loaded.setup.model_hash), grader_version(), *(b.dataset_hash for b in loaded.benchmarks)]
    folder = runs_dir / (name or eval_name(spec, facts))
    status = earlier_status(folder, spec)
    if status is None:
        writer = create_run(runs_dir, folder.name, spec.model_dump_json(indent=2), "eval")
        return _run(spec, loaded, writer, Done({}, {}, 0.0), report, tell)
    check_unchanged(folder, loaded)
    if status["state"] == "finished":
        tell(f"{folder.name} is finished; these are its numbers")
        return folder
    with _only_one(folder) as lock:
        writer = continue_evaluation(folder, spec.model_dump_json(indent=2), lock)
        done = what_is_done(folder)
        of = sum(len(benchmark.problems) for benchmark in loaded.benchmarks)
        tell(f"{folder.name} goes on: {len(done.correct)} of {of} problems are there")
        return _run(spec, loaded, writer, done, report, tell)


def _run(
    spec: EvalSpec,
    loaded: Loaded,
    writer: RunWriter,
    done: Done,
    report: Callable[[EvalReport], None],
    tell: Callable[[str], None],
) -> Path:
    """Samples and grades what is not done, into the writer's folder."""
    benchmarks, setup = loaded.benchmarks, loaded.setup
    problems_of = sum(len(benchmark.problems) for benchmark in benchmarks)
    started, started_at = perf_counter(), datetime.now(UTC).replace(tzinfo=None)
    problems, correct, tokens = len(done.correct), sum(done.correct.values()), 0
    reused = dict(done.reused)
    numbers = count()

    def describe() -> None:
        seconds = done.seconds + perf_counter() - started
        columns = evaluation_columns(benchmarks, setup, reused, started_at, seconds)
        writer.write_evaluation(next(numbers), spec.rollout, {"evaluations": columns})

    def keep(rows: Rows) -> None:
        nonlocal problems, correct, tokens
        writer.write_evaluation(next(numbers), spec.rollout, segments_of(rows))
        problems += len(rows["sample"]) // spec.eval.k
        correct += sum(rows["correct"])
        tokens += sum(rows["tokens"])
        report(EvalReport(problems, problems_of, problems * spec.eval.k, correct, tokens / (perf_counter() - started)))

    def take(name: str, made_by: str, rows: Rows) -> None:
        reused[name] = made_by
        tell(f"{name}: the numbers of {made_by}, of the same model under the same settings, are reused")
        keep(rows)

    with ExitStack() as stack:
        try:
            describe()
            # Grading processes start before torch has threads or a CUDA context to be copied.
            formulas = any(benchmark.grader == "math" for benchmark in benchmarks)
            pool = stack.enter_context(GradingPool(spec.grading.workers, spec.grading.timeout, start=formulas))
            abandon = stack.enter_context(abandoned_later(pool, tell))

            def sampler() -> Sampler:
                longest = longest_prompt(benchmarks, loaded.tokenizer) + setup.max_tokens
                opened = open_sampler(spec.engine, spec.model, loaded.model_folder, longest, tell)
                stack.callback(opened.close)
                return opened

            stops = stop_ids(loaded.model_folder, loaded.tokenizer)
            evaluate(
                Evaluator(sampler, loaded.tokenizer, stops, pool, setup, abandon),
                benchmarks,
                reuse_keys(benchmarks, setup),
                keep,
                take,
                lambda benchmark: (writer.folder.name, stored_rows(writer.folder, benchmark.name)),
                done=done.correct,
                tell=tell,
            )
            describe()
        except KeyboardInterrupt:
            describe()
            writer.close("interrupted", "stopped by hand")
            raise Interrupted(
                f"stopped by hand: {problems} of {problems_of} problems are kept in {writer.folder}; the same command goes "
                "on with the rest"
            ) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            writer.close("failed", f"out of memory: {error}")
            raise EngineError(
                f"out of memory ({first_line(error)}); lower engine.sampler_rows (now {spec.engine.sampler_rows})"
            ) from None
        except BaseException as error:
            writer.close("failed", str(error))
            raise
        try:
            writer.close("finished", "")
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by hand; the evaluation is finished: clipctl analyze {writer.folder}") from None
    return writer.folder


@contextmanager
def abandoned_later(pool: GradingPool, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """What Ctrl-C does about gradings under way: says that they are waited for, and ends them after STOP_SECONDS. Answers that
    hang are killed one by one, each at its own limit, which may take an hour."""
    timers: list[Timer] = []

    def abandon() -> None:
        tell(
            f"stopping: what is sampled is still graded and kept, for {STOP_SECONDS:g} s at most; Ctrl-C again does not wait"
        )
        timers.append(Timer(STOP_SECONDS, pool.close))
        timers[-1].daemon = True
        timers[-1].start()

    try:
        yield abandon
    finally:
        for timer in timers:
            timer.cancel()


def earlier_status(folder: Path, spec: EvalSpec) -> dict[str, Any] | None:
    """The status of an evaluation of this name and spec; None where there is no such folder. Raises SpecError for another
    spec, a run, and one that another process works on; StoreError for a damaged one."""
    if not folder.exists():
        return None
    if not is_evaluation(folder):
        raise SpecError(f"--name: {folder} exists and is no evaluation; give another --name")
    problems: list[str] = []
    status = usable_status(read_json(folder / "status.json", problems), problems)
    stored = read_json(folder / "spec.json", problems)
    if problems:
        raise StoreError(f"{folder}: {problems[0]}; remove the folder, or give another --name")
    refuse_another_spec(folder.name, validate(EvalSpec, stored), spec)
    if state_of(status) == "running":
        raise SpecError(f"--name: {folder.name!r} is being evaluated by process {status['pid']} on {status['host']}")
    return status


def check_unchanged(folder: Path, loaded: Loaded) -> None:
    """Raises SpecError where problems, template, model or grader are not those that the evaluation began with."""
    columns = evaluation_columns(loaded.benchmarks, loaded.setup, {}, None, 0.0)
    with open_runs(folder) as runs:
        stored = {row["benchmark"]: row for row in runs.table("select * from evaluations").to_pylist()}
    for at, name in enumerate(columns["benchmark"]):
        for column, what in CHECKED:
            if name in stored and stored[name][column] != columns[column][at]:
                raise SpecError(
                    f"--name: {what} ({column} of {name}) changed since {folder.name!r} began; give another --name"
                )


def what_is_done(folder: Path) -> Done:
    """What an evaluation's folder holds."""
    with open_runs(folder) as runs:
        rows = runs.sql("select benchmark, position, sum(correct::int)::bigint from evals group by all").fetchall()
        begun = runs.sql("select benchmark, reused_from, seconds from evaluations").fetchall()
    return Done(
        {(benchmark, position): correct for benchmark, position, correct in rows},
        {benchmark: reused_from for benchmark, reused_from, _ in begun if reused_from is not None},
        max((seconds for _, _, seconds in begun), default=0.0),
    )


def stored_rows(folder: Path, benchmark: str) -> Rows:
    """All rows of one benchmark of an evaluation's folder, in the order of problems and samples."""
    with open_runs(folder) as runs:
        table = runs.table("select * from evals order by benchmark, position, sample")
    mine = table.filter([name == benchmark for name in table["benchmark"].to_pylist()])
    return {name: mine[name].to_pylist() for name in (*CACHED, "text")}


@contextmanager
def _only_one(folder: Path) -> Iterator[IO[str]]:
    """Two processes must not go on with one evaluation."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(f"--name: another process goes on with {folder.name!r}") from None
        yield lock


def _check_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        raise SpecError(f"--name: {name!r} is not allowed: letters, digits, '.', '_' and '-', at most 100")
