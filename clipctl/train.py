"""The main path: spec → rollout → reward → advantage → loss → update → store.

GRPO as the paper has it (arXiv 2509.26114): the advantage is the reward minus its group's mean, without the standard
deviation; the log-probabilities of π_old are the trainer's own, scored once per rollout in the layout in which the
updates run, so the ratio at inner step 0 is 1 by construction; a group is never split over updates; no KL term and no
entropy bonus. Dimension letters as in `clipctl.rollout`.
"""

import json
import operator
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipctl.alarms import RolloutFacts, new_alarms
from clipctl.algo import group_advantages, overlong_penalty
from clipctl.benchmarks import Benchmark, load_benchmarks
from clipctl.control import TOLERANCE, ControlState, held, next_action, start_control
from clipctl.engine import EnginePair, Measure, Scores, UpdateResult, open_engine
from clipctl.errors import AlarmStop, DataError, DivergedError, EngineError, Interrupted, SpecError
from clipctl.eval_cache import model_hash
from clipctl.evaluate import (
    Evaluator,
    Rows,
    Setup,
    check_eval_context,
    evaluate,
    evaluation_columns,
    evaluation_words,
    reuse_keys,
    segments_of,
)
from clipctl.journal import RunWriter, check_place, create_run
from clipctl.loss import PolicyLoss
from clipctl.models import ChatTokenizer, check_device, find_model, load_tokenizer, stop_ids
from clipctl.overlap import work_while_making
from clipctl.records import (
    Columns,
    Group,
    Seconds,
    Update,
    mean_entropy,
    noise_columns,
    pack,
    rollout_facts,
    rollout_row,
    rollout_tables,
)
from clipctl.rewards import Scorer, grader_of, open_scorer
from clipctl.rollout import (
    Batch,
    Completion,
    DrawKey,
    Problem,
    Prompt,
    SamplingParams,
    minibatches,
    spread_states,
    stream_indices,
)
from clipctl.spec import Ledger, RunSpec, spec_json
from clipctl.tasks import load_problems, task_grader


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished rollout tells: means of the rollout, clip fractions of its updates over all response tokens."""

    rollout: int
    steps: int
    reward: float
    entropy: float | None
    clip_low: float
    clip_high: float
    response_tokens: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The task's problems with their prompts' token ids, those with too long a prompt left out."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    left_out: int


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run works with."""

    spec: RunSpec
    data: Tokenized
    tokenizer: ChatTokenizer
    params: SamplingParams
    scorer: Scorer
    engine: EnginePair
    evaluation: "PolicyEvaluation | None"
    writer: RunWriter
    report: Callable[[Report], None]
    warn: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PolicyEvaluation:
    """What the policy is evaluated on during training, and how. setup: of the base model; its files have a hash."""

    benchmarks: list[Benchmark]
    setup: Setup


def print_warning(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def train(
    spec: RunSpec,
    *,
    runs_dir: Path | str = "runs",
    label: str = "run",
    report: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = print_warning,
) -> Path:
    """Runs the spec and returns the run's folder, `runs_dir`/`run.name` or `runs_dir`/`label`-date-4 hex digits.

    report is called after each rollout, warn with each alarm. Raises a ClipctlError of one line; the run's folder then
    keeps what was measured, with its state: interrupted (Ctrl-C), diverged (non-finite), stopped (by an alarm), failed.
    """
    name = spec.run.name or f"{label}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    check_place(Path(runs_dir), name)
    grader = grader_of(spec.reward, task_grader(spec.data))
    problems = load_problems(spec.data, grader=grader)
    check_device(spec.engine.device)
    folder = find_model(spec.model.path, pull=True)
    tokenizer = load_tokenizer(folder, spec.model.chat_template)
    data = tokenize(problems, tokenizer, spec.rollout.max_prompt_tokens)
    check_context(spec, data, folder)
    evaluation = load_evaluation(spec, tokenizer, folder) if spec.eval.every else None
    writer = create_run(Path(runs_dir), name, spec_json(spec), label)
    with ExitStack() as stack:
        try:
            # Grading processes start before torch has threads or a CUDA context to be copied.
            scorer = stack.enter_context(open_scorer(spec.reward, grader, spec.run.seed))
            engine = open_engine(spec, folder)
            stack.callback(engine.sampler.close)
            params = SamplingParams(
                spec.rollout.max_response_tokens,
                spec.rollout.temperature,
                spec.rollout.top_p,
                stop_ids(folder, tokenizer),
            )
            job = Job(spec, data, tokenizer, params, scorer, engine, evaluation, writer, report, warn)
            note_choices(job)
            run_rollouts(job)
        except KeyboardInterrupt:
            writer.close("interrupted", "stopped by hand")
            raise Interrupted(f"stopped by hand; what was measured is in {writer.folder}") from None
        except DivergedError as error:
            writer.close("diverged", str(error))
            raise
        except AlarmStop as error:
            writer.close("stopped", str(error))
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            writer.close("failed", f"out of memory: {error}")
            raise EngineError(
                f"out of memory ({str(error).splitlines()[0]}); lower engine.tokens_per_microbatch "
                f"(now {spec.engine.tokens_per_microbatch}) or engine.sampler_rows (now {spec.engine.sampler_rows})"
            ) from None
        except BaseException as error:
            writer.close("failed", str(error))
            raise
        writer.close("finished", "")
    return writer.folder


def run_rollouts(job: Job) -> None:
    """The loop: one rollout after the other, each stored whole before the next begins."""
    spec, engine = job.spec, job.engine
    position = 0
    history: list[RolloutFacts] = []
    control: ControlState | None = None
    profiled: list[Update] = []
    if job.evaluation is not None:
        evaluate_policy(job, job.evaluation, 0)
    for rollout in range(spec.run.steps):
        drawn = draw_groups(job, rollout, position)
        position = drawn.next_position
        trained = [group for group in drawn.groups if group.has_advantage or not spec.rollout.dynamic_sampling]
        started = perf_counter()
        batch = pack(trained) if trained else None
        old = engine.trainer.score(batch) if batch is not None else None
        scored = perf_counter()
        noise = {} if profiled else measure_noise(job, batch, trained, old)
        entropy = None if old is None else mean_entropy(trained, old)
        control, loss = choose_clip(job, rollout, control, entropy, profiled)
        updates = run_updates(job, rollout, batch, old, loss)
        profiled = updates or profiled
        engine.sampler.update_weights(engine.trainer.weights(), version=rollout + 1)
        seconds = Seconds(drawn.seconds_sample, drawn.seconds_reward, scored - started, perf_counter() - scored)
        row = rollout_row(drawn.groups, trained, old, drawn.refills, seconds)
        tables = rollout_tables(spec, drawn.groups, trained, old, updates, job.tokenizer.token_texts)
        job.writer.write_rollout(rollout, row, tables | noise)
        job.report(make_report(spec, rollout, row, updates, seconds))
        history.append(rollout_facts(rollout, row, updates, spec))
        raise_alarms(job, history, control)
        if rollout + 1 == spec.run.steps or (spec.checkpoint.every and (rollout + 1) % spec.checkpoint.every == 0):
            save_model(job, rollout + 1, control)
        if job.evaluation is not None and rollout + 1 in spec.evaluated_after:
            evaluate_policy(job, job.evaluation, rollout + 1)
    note_control(job, control)


TOKENS_AT_ONCE = 1 << 18
"""Tokens of updates whose sums are made together: many small updates share the cost of one pass."""


def run_updates(job: Job, rollout: int, batch: Batch | None, old: Scores | None, loss: PolicyLoss) -> list[Update]:
    """loss → update: the epochs over one rollout, with the ledger's probe states kept at its start."""
    if batch is None or old is None:
        return []
    spec, trainer = job.spec, job.engine.trainer
    steps = spec.optim.epochs * minibatches(batch.responses, spec.optim.responses_per_update)
    measures = [measure_of(spec.ledger, len(steps) - 1 - step) for step in range(len(steps))]
    if set(measures) != {"sums"}:
        key = DrawKey(spec.run.seed, rollout, 0)
        trainer.keep_probe(batch, spread_states(batch.lengths_R, spec.ledger.probe_states, key))
    done: list[Update] = []
    waiting: list[UpdateResult] = []
    for rows, measure in zip(steps, measures, strict=True):
        waiting.append(trainer.step(batch, rows, old, loss, measure))
        last = len(done) + len(waiting) == len(steps)
        if last or sum(len(result.tokens.logprob_T) for result in waiting) >= TOKENS_AT_ONCE:
            sums = loss.sums([result.loss for result in waiting], [result.tokens for result in waiting])
            done += [
                Update(its_rows, loss, result.grad_norm, its_sums, result.probe, loss.clipped(result.tokens))
                for its_rows, result, its_sums in zip(steps[len(done) :], waiting, sums, strict=False)
            ]
            waiting = []
    return done


def choose_clip(
    job: Job, rollout: int, state: ControlState | None, entropy: float | None, before: Sequence[Update]
) -> tuple[ControlState | None, PolicyLoss]:
    """The ε of this rollout's updates: the spec's, or what the controller makes of the profile of the last updates.

    entropy: of this rollout, nats; None where dynamic sampling found nothing to train on. before: the updates of the last
    rollout that had any.
    """
    spec = job.spec
    asked = PolicyLoss(spec.loss.objective, spec.clip.low, spec.clip.high)
    if spec.control.target_entropy is None or entropy is None:
        return state, asked
    low = spec.control.actuator == "eps_low"
    mine, other = (asked.eps_low, asked.eps_high) if low else (asked.eps_high, asked.eps_low)
    if state is None:
        return start_control(spec.control, mine, entropy), asked
    profile = reduce(operator.add, (update.sums.profile for update in before)).columns()
    state, action = next_action(state, spec.control, entropy, profile, other)
    chosen = (action.eps, other) if low else (other, action.eps)
    job.writer.event("control", action.reason, rollout=rollout, data=action.data)
    if action.stuck:
        tell(job, "control_limit", action.stuck, rollout, action.data)
    return state, PolicyLoss(spec.loss.objective, *chosen)


def measure_of(ledger: Ledger, before_last: int) -> Measure:
    """What the update that is followed by so many others of its rollout measures."""
    if ledger.network_every and before_last % ledger.network_every == 0:
        return "network"
    return "probe" if ledger.probe_states and before_last % ledger.probe_every == 0 else "sums"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Groups of one rollout, the place in the prompt stream after them, and how long they took."""

    groups: list[Group]
    next_position: int
    refills: int
    seconds_sample: float
    seconds_reward: float


def draw_groups(job: Job, rollout: int, position: int) -> Drawn:
    """rollout → reward → advantage for `rollout.prompts` prompts.

    With dynamic sampling, prompts whose group has no advantage are replaced by fresh ones, `rollout.max_refills` times
    at most; then the rollout goes on with fewer groups, and an event says so.
    """
    wanted, dynamic = job.spec.rollout.prompts, job.spec.rollout.dynamic_sampling
    groups: list[Group] = []
    seconds: list[tuple[float, float]] = []
    useful = 0
    while useful < wanted and len(seconds) <= (job.spec.rollout.max_refills if dynamic else 0):
        started = perf_counter()
        problems, prompts = next_prompts(job, rollout, position, wanted - useful)
        scored, sampled = sample_groups(job, problems, prompts)
        groups += with_advantages(job, problems, prompts, scored)
        position += len(prompts)
        seconds.append((sampled - started, perf_counter() - sampled))
        useful = sum(group.has_advantage for group in groups)
    if dynamic and useful < wanted:
        message = f"dynamic sampling found {useful} of {wanted} groups with an advantage in {len(seconds) - 1} refills"
        job.writer.event("dynamic_sampling", message, rollout=rollout, data={"useful": useful, "sampled": len(groups)})
    sampling, rewarding = (sum(column) for column in zip(*seconds, strict=True))
    return Drawn(groups, position, len(seconds) - 1, sampling, rewarding)


def next_prompts(job: Job, rollout: int, position: int, count: int) -> tuple[list[Problem], list[Prompt]]:
    """The next `count` problems of the prompt stream, from `position` on, and their prompts."""
    seed = job.spec.run.seed
    indices = stream_indices(len(job.data.problems), seed, position, count)
    prompts = [
        Prompt(job.data.prompt_ids[index], DrawKey(seed, rollout, position + offset))
        for offset, index in enumerate(indices)
    ]
    return [job.data.problems[index] for index in indices], prompts


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """One prompt's samples with their texts, rewards (float64) and outcomes."""

    completions: list[Completion]
    texts: list[str]
    rewards_G: NDArray[np.float64]
    outcomes: Sequence[str | None]


def sample_groups(job: Job, problems: Sequence[Problem], prompts: Sequence[Prompt]) -> tuple[list[ScoredGroup], float]:
    """The groups in the order of their prompts, decoded and scored while others are sampled, and the time at which the last
    one was sampled."""
    found: dict[int, ScoredGroup] = {}
    ended = perf_counter()

    def sampled() -> Iterator[tuple[int, list[Completion]]]:
        nonlocal ended
        yield from job.engine.sampler.sample(prompts, job.spec.rollout.group_size, job.params)
        ended = perf_counter()

    def score(waiting: list[tuple[int, list[Completion]]]) -> None:
        places = [place for place, _ in waiting]
        texts = [[job.tokenizer.decode(completion.token_ids) for completion in group] for _, group in waiting]
        keys = [prompts[place].key for place in places]
        rewards_PG, outcomes = job.scorer.score([problems[place] for place in places], keys, texts)
        for row, (place, group) in enumerate(waiting):
            found[place] = ScoredGroup(group, texts[row], rewards_PG[row], outcomes[row])

    work_while_making(sampled(), score)
    return [found[place] for place in range(len(prompts))], ended


def with_advantages(
    job: Job, problems: Sequence[Problem], prompts: Sequence[Prompt], scored: Sequence[ScoredGroup]
) -> list[Group]:
    """The groups with the soft overlong penalty in their rewards, and their advantages."""
    spec = job.spec
    lengths_PG = torch.tensor([[len(completion.token_ids) for completion in group.completions] for group in scored])
    penalty_PG = overlong_penalty(
        lengths_PG,
        max_tokens=spec.rollout.max_response_tokens,
        buffer=spec.rollout.overlong_buffer,
        penalty=spec.rollout.overlong_penalty,
    )
    rewards_PG = np.stack([group.rewards_G for group in scored]) + penalty_PG.numpy()
    advantages_PG = group_advantages(torch.from_numpy(rewards_PG)).numpy()
    return [
        Group(
            problems[at], prompts[at], group.completions, group.texts, rewards_PG[at], advantages_PG[at], group.outcomes
        )
        for at, group in enumerate(scored)
    ]


def tokenize(problems: Sequence[Problem], tokenizer: ChatTokenizer, max_prompt_tokens: int) -> Tokenized:
    """The prompts as token ids, once for the whole run. Raises DataError when none is short enough."""
    prompt_ids = [tokenizer.encode_prompt(problem.question) for problem in problems]
    kept = [at for at, ids in enumerate(prompt_ids) if len(ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(
            f"rollout.max_prompt_tokens = {max_prompt_tokens}: all {len(problems)} prompts are longer, "
            f"the shortest has {min(map(len, prompt_ids))} tokens"
        )
    return Tokenized([problems[at] for at in kept], [prompt_ids[at] for at in kept], len(problems) - len(kept))


def check_context(spec: RunSpec, data: Tokenized, folder: Path) -> None:
    """Raises SpecError where prompt and response together exceed the model's context."""
    from clipctl.models import model_shape

    shape = model_shape(str(folder))
    longest = max(map(len, data.prompt_ids))
    if shape is not None and longest + spec.rollout.max_response_tokens > shape.context:
        raise SpecError(
            f"rollout.max_response_tokens = {spec.rollout.max_response_tokens}: with prompts of up to {longest} tokens "
            f"that exceeds the {shape.context} positions of {spec.model.path}; at most "
            f"{shape.context - longest}, or lower rollout.max_prompt_tokens"
        )


def load_evaluation(spec: RunSpec, tokenizer: ChatTokenizer, folder: Path) -> PolicyEvaluation:
    """The benchmarks of `[eval]`. Raises SpecError and DataError for what cannot be evaluated."""
    max_tokens = spec.eval.max_response_tokens or spec.rollout.max_response_tokens
    benchmarks = load_benchmarks(spec.eval, spec.data.arith)
    check_eval_context(benchmarks, tokenizer, max_tokens, folder, spec.model.path)
    hash_ = model_hash(folder) if spec.eval.reuse else None
    setup = Setup(spec.model, spec.engine, spec.eval, max_tokens, tokenizer.tokenizer.chat_template, hash_)
    return PolicyEvaluation(benchmarks, setup)


def evaluate_policy(job: Job, evaluation: PolicyEvaluation, rollouts: int) -> None:
    """Evaluates the policy after so many rollouts and stores it; 0 is the base model, whose numbers may be those of another
    run. What is finished when the run is stopped is stored too."""
    benchmarks = evaluation.benchmarks
    setup = evaluation.setup if rollouts == 0 else replace(evaluation.setup, model_hash=None)
    rows: dict[str, list[Any]] = {}
    reused: dict[str, str] = {}
    started, started_at = perf_counter(), datetime.now(UTC).replace(tzinfo=None)

    def keep(more: Rows) -> None:
        for name, values in more.items():
            rows.setdefault(name, []).extend(values)

    def take(benchmark: str, made_by: str, more: Rows) -> None:
        reused[benchmark] = made_by
        keep(more)

    def finished(benchmark: Benchmark) -> tuple[str, Rows]:
        mine = [at for at, name in enumerate(rows["benchmark"]) if name == benchmark.name]
        mine.sort(key=lambda at: (rows["position"][at], rows["sample"][at]))
        return f"{job.writer.folder.name}@0", {name: [values[at] for at in mine] for name, values in rows.items()}

    stops, pool = job.params.stop_ids, job.scorer.pool
    evaluator = Evaluator(lambda: job.engine.sampler, job.tokenizer, stops, pool, setup)
    try:
        evaluate(evaluator, benchmarks, reuse_keys(benchmarks, setup), keep, take, finished, tell=job.warn)
    finally:
        if rows:
            columns = evaluation_columns(benchmarks, setup, reused, started_at, perf_counter() - started)
            job.writer.write_evaluation(rollouts, rollouts, segments_of(rows) | {"evaluations": columns})
    for name, words in evaluation_words(rows).items():
        by = f", reused from {reused[name]}" if name in reused else ""
        message = f"after {rollouts} rollouts: {name} {words}, {perf_counter() - started:.1f} s{by}"
        tell(job, "evaluation", message, rollouts, {"benchmark": name, "reused_from": reused.get(name)})


def note_choices(job: Job) -> None:
    """Events for what the run decided by itself."""
    if job.tokenizer.plain_template:
        job.writer.event("chat_template", f"{job.spec.model.path} has no chat template: a plain one is used")
    if job.data.left_out:
        message = f"{job.data.left_out} problems left out: prompts over {job.spec.rollout.max_prompt_tokens} tokens"
        job.writer.event("prompts_left_out", message, data={"left_out": job.data.left_out})


NOISE_MARGIN = 5
"""An ε under so many times the 99th percentile of |log r| between two scorings of one policy measures noise."""


def measure_noise(job: Job, batch: Batch | None, trained: Sequence[Group], old: Scores | None) -> dict[str, Columns]:
    """The null distribution of log r as a `noise` table: the first optimizer batch scored again by the same weights in
    another micro-batch layout, and the trainer against the sampler. Warns where an ε is not far above it."""
    if batch is None or old is None:
        return {}
    rows = minibatches(batch.responses, job.spec.optim.responses_per_update)[0]
    again_T = job.engine.trainer.score_otherwise(batch, rows).double().numpy()
    logprob_T = old.logprob_T.double().numpy()
    sampler_T = np.concatenate([c.logprobs for group in trained for c in group.completions])
    log_ratios = {"layout": again_T - logprob_T[: len(again_T)], "sampler": logprob_T - sampler_T}
    for source, values_T in log_ratios.items():
        level = float(np.quantile(np.abs(values_T), 0.99))
        for side, (name, eps) in smallest_eps(job.spec).items():
            if eps < NOISE_MARGIN * level:
                against = "another micro-batch layout" if source == "layout" else "the sampler"
                tell(
                    job,
                    "noise_floor",
                    f"{name} = {eps:g} is under {NOISE_MARGIN} × {level:.2g}, the 99th percentile of |log r| between "
                    f"one policy and itself in {against}: it would clip rounding noise",
                    trained[0].prompt.key.rollout,
                    {"source": source, "side": side, "eps": eps, "p99": level},
                )
    return {"noise": noise_columns(log_ratios)}


def smallest_eps(spec: RunSpec) -> dict[str, tuple[str, float]]:
    """The smallest ε that each side can have, and the key that says so: the controller may go to its lower bound."""
    found = {"low": ("clip.low", spec.clip.low), "high": ("clip.high", spec.clip.high)}
    if spec.control.target_entropy is not None:
        found[spec.control.actuator.removeprefix("eps_")] = ("control.bounds[0]", spec.control.bounds[0])
    return found


def raise_alarms(job: Job, history: Sequence[RolloutFacts], control: ControlState | None) -> None:
    """Tells the alarms that begin with this rollout. Raises AlarmStop, with the model saved, for one of `run.stop_on`."""
    alarms = new_alarms(history, job.spec.alarms)
    rollout = history[-1].rollout
    for alarm, reason in alarms.items():
        tell(job, "alarm", f"{alarm}: {reason}", rollout, {"alarm": alarm})
    stopping = [alarm for alarm in alarms if alarm in job.spec.run.stop_on]
    if stopping:
        save_model(job, rollout + 1, control)
        raise AlarmStop(f"stopped by the alarm {stopping[0]} after rollout {rollout}: {alarms[stopping[0]]}")


def tell(job: Job, kind: str, message: str, rollout: int, data: dict[str, Any]) -> None:
    """An event, and a line for whoever watches."""
    job.writer.event(kind, message, rollout=rollout, data=data)
    job.warn(f"{kind}: {message}")


def save_model(job: Job, rollouts: int, control: ControlState | None) -> None:
    """The policy after so many rollouts, as `checkpoints/<rollouts>`, a folder that transformers loads, and the
    controller's state beside it."""
    with job.writer.new_checkpoint(rollouts) as folder:
        job.engine.trainer.save(folder)
        job.tokenizer.save(folder)
        if control is not None:
            (folder / "control.json").write_text(json.dumps(asdict(control)))


def note_control(job: Job, control: ControlState | None) -> None:
    """At the end of a controlled run: whether the target was held over its second half."""
    if control is None:
        return
    worst, within = held(control)
    words = "was" if within else "was not"
    message = (
        f"entropy {words} held within ±{100 * TOLERANCE:g} % of {control.target:.4g} nat over the second half of the run: "
        f"at most {100 * worst:.1f} % away"
    )
    data = {"target": control.target, "worst": worst, "held": within}
    if within:
        job.writer.event("control_end", message, rollout=job.spec.run.steps - 1, data=data)
    else:
        tell(job, "control_end", message, job.spec.run.steps - 1, data)


def make_report(
    spec: RunSpec, rollout: int, row: dict[str, float], updates: Sequence[Update], seconds: Seconds
) -> Report:
    """The rollout in a line."""
    counts = [update.sums.counts for update in updates]
    tokens = sum(count.tokens for count in counts)
    return Report(
        rollout=rollout,
        steps=spec.run.steps,
        reward=row["reward_sum"] / row["responses"],
        entropy=row["entropy_response_sum"] / row["responses_scored"] if row["responses_scored"] else None,
        clip_low=sum(count.clip_low for count in counts) / max(tokens, 1),
        clip_high=sum(count.clip_high for count in counts) / max(tokens, 1),
        response_tokens=row["tokens"] / row["responses"],
        tokens_per_second=row["tokens"] / seconds.total,
        seconds=seconds.total,
    )


class _CallableModule(ModuleType):
    """`clipctl.train` is this module and the public function at once: importing a submodule binds its name in the
    package, so the name cannot be the function alone."""

    def __call__(self, spec: RunSpec, **options: object) -> Path:
        return train(spec, **options)  # type: ignore[arg-type]


sys.modules[__name__].__class__ = _CallableModule
