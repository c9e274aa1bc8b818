"""The main path: spec → rollout → reward → advantage → loss → update → store.

GRPO as the paper has it (arXiv 2509.26114): the advantage is the reward minus its group's mean, without the standard
deviation; the log-probabilities of π_old are the trainer's own, scored once per rollout in the layout in which the
updates run, so the ratio at inner step 0 is 1 by construction; a group is never split over updates; no KL term and no
entropy bonus. Dimension letters as in `clipctl.rollout`.

Of several processes ("ranks") each runs all of this with the same state: sampling and micro-batches are divided among them,
what they find is gathered, and rank 0 alone writes and reports (`clipctl.ranks`).
"""

import json
import operator
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial, reduce
from pathlib import Path
from time import perf_counter, sleep
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipctl.alarms import RolloutFacts, new_alarms
from clipctl.algo import group_advantages, overlong_penalty, truncated_importance
from clipctl.attempts import Earlier, Resume, find_earlier, refuse_nameless, spec_changes
from clipctl.benchmarks import Benchmark, load_benchmarks
from clipctl.checkpoint import STATE, Place, new_checkpoint
from clipctl.control import TOLERANCE, ControlState, held, next_action, start_control
from clipctl.engine import EnginePair, Measure, Scores, UpdateResult, check_sampler, check_trainer, open_engine
from clipctl.engine.agreement import Probe, check_agreement, make_probe, push_weights
from clipctl.engine.deepspeed_config import CONFIG_FILE
from clipctl.errors import AlarmStop, ClipctlError, DataError, DivergedError, EngineError, SpecError, StoreError
from clipctl.eval_cache import model_hash
from clipctl.evaluate import (
    Evaluator,
    Rows,
    Setup,
    check_eval_context,
    evaluate,
    evaluation_columns,
    evaluation_words,
    longest_prompt,
    reuse_keys,
    segments_of,
)
from clipctl.interrupts import StopNow, StopRequests, catch_signals, job_end
from clipctl.journal import RunWriter, SilentWriter, Writer, check_place, create_run
from clipctl.lock import print_warning
from clipctl.loss import PolicyLoss
from clipctl.models import ChatTokenizer, find_model, load_tokenizer, stop_ids
from clipctl.overlap import work_while_making
from clipctl.plan import check_engines
from clipctl.ranks import Ranks, joined
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
    sampler_logprobs,
)
from clipctl.rewards import Scorer, grader_of, open_scorer
from clipctl.rollout import (
    Batch,
    Completion,
    DrawKey,
    Problem,
    Prompt,
    SamplingParams,
    keyed_rng,
    minibatches,
    spread_states,
    stream_indices,
)
from clipctl.segments import write_whole
from clipctl.spec import Alarm, Ledger, RunSpec, spec_json
from clipctl.state import (
    OpenRollout,
    RunState,
    SavedState,
    batch_of,
    digest_of_data,
    read_completions,
    read_open_rollout,
    read_run_state,
    rng_state,
    save_state,
    seed_rng,
    set_rng_state,
    versions,
)
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
    digest: str


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run works with."""

    spec: RunSpec
    data: Tokenized
    tokenizer: ChatTokenizer
    params: SamplingParams
    scorer: Scorer
    engine: EnginePair
    probe: Probe
    evaluation: "PolicyEvaluation | None"
    writer: Writer
    ranks: Ranks
    stop: StopRequests
    report: Callable[[Report], None]
    warn: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PolicyEvaluation:
    """What the policy is evaluated on during training, and how. setup: of the base model; its files have a hash."""

    benchmarks: list[Benchmark]
    setup: Setup


def train(
    spec: RunSpec,
    *,
    runs_dir: Path | str = "runs",
    label: str = "run",
    resume: Resume = "auto",
    report: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = print_warning,
) -> Path:
    """Runs the spec and returns the run's folder, `runs_dir`/`run.name` or `runs_dir`/`label`-date-4 hex digits.

    A run of that name that was begun before goes on from its newest good checkpoint, to the same end, bit for bit on a CPU;
    `never` and `must` refuse one that exists or does not. report is called after each rollout, warn with each alarm.
    Raises a ClipctlError of one line; the run's folder then keeps what was measured, with its state: interrupted (a signal,
    Ctrl-C, the end of a job's time), diverged (non-finite), stopped (by an alarm), failed.

    Under torchrun, deepspeed and srun all their processes run it together; each returns the folder, rank 0 reports and warns.
    """
    refuse_nameless(spec.run.name, resume)
    with ExitStack() as stack:
        stop = stack.enter_context(catch_signals())
        ranks = stack.enter_context(joined(stop, on_gpu=spec.engine.device == "cuda"))
        stop.grace = spec.checkpoint.grace
        if (end := job_end()) is not None:
            stop.end_with_job(end, spec.checkpoint.margin)
        if ranks.rank:
            report, warn = ignore, ignore
        with stop.interruptible():
            refuse_other_specs(ranks, spec)
            check_engines(spec, ranks.size)
            name = ranks.broadcast(spec.run.name or new_name(label))
            earlier = earlier_attempt(ranks, Path(runs_dir), name, spec, resume, warn)
            if earlier is not None:
                if earlier.lock is not None:
                    stack.callback(earlier.lock.close)
                if earlier.finished:
                    warn(f"{name} is finished, with {earlier.status['rollouts']} rollouts; raise run.steps to go on")
                    return earlier.folder
            grader = grader_of(spec.reward, task_grader(spec.data))
            check_sampler(spec.engine)
            check_trainer(spec.engine)
            with ranks.first_alone():
                problems = load_problems(spec.data, grader=grader)
                folder = find_model(spec.model.path, pull=True)
            tokenizer = load_tokenizer(folder, spec.model.chat_template)
            data = tokenize(problems, tokenizer, spec.rollout.max_prompt_tokens)
            check_context(spec, data, folder)
            evaluation = load_evaluation(spec, tokenizer, folder) if spec.eval.every else None
        writer = open_writer(ranks, Path(runs_dir), name, spec, label, earlier)
        with ExitStack() as closing:
            closing.enter_context(closing_run(spec, writer, stop, named=spec.run.name is not None))
            closing.enter_context(ranks.at_work(lambda failure: writer.close(state_after(failure), str(failure))))
            with stop.interruptible():
                # Grading processes start before torch has threads or a CUDA context to be copied.
                scorer = stack.enter_context(open_scorer(spec.reward, grader, spec.run.seed))
                tell_loss = partial(tell_of_engine, ranks, writer, warn)
                longest = longest_text(spec, data, evaluation, tokenizer)
                engine = open_engine(spec, (earlier and earlier.checkpoint) or folder, longest, tell_loss, ranks)
                stack.callback(engine.sampler.close)
                if engine.trainer.configuration and ranks.rank == 0:
                    with writer.disk():
                        text = json.dumps(engine.trainer.configuration, indent=2)
                        write_whole(writer.folder / CONFIG_FILE, text.encode())
                params = SamplingParams(
                    spec.rollout.max_response_tokens,
                    spec.rollout.temperature,
                    spec.rollout.top_p,
                    stop_ids(folder, tokenizer),
                )
                probe = make_probe(spec, max(data.prompt_ids, key=len), params.stop_ids)
                job = Job(
                    spec, data, tokenizer, params, scorer, engine, probe, evaluation, writer, ranks, stop, report, warn
                )
            run_rollouts(job, *begin(job, earlier))
    return writer.folder


def new_name(label: str) -> str:
    return f"{label}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def ignore(line: object) -> None:
    """What ranks other than 0 say."""


def refuse_other_specs(ranks: Ranks, spec: RunSpec) -> None:
    """Raises SpecError where the ranks were not started with the same command line."""
    for rank, other in enumerate(ranks.gather(spec)):
        changes = spec_changes(spec, other, may_change=())
        if changes:
            raise SpecError(
                f"rank {rank} of {ranks.size} was given another spec than rank {ranks.rank}: {'; '.join(changes)}; "
                "processes that are started together are one run. For a run of its own set WORLD_SIZE=1 in front of the command"
            )


def earlier_attempt(
    ranks: Ranks, runs_dir: Path, name: str, spec: RunSpec, resume: Resume, warn: Callable[[str], None]
) -> Earlier | None:
    """What rank 0 finds of the run, and locks."""
    if ranks.rank == 0:
        mine = find_earlier(check_place(runs_dir, name), spec, resume, warn, ranks.size)
        ranks.broadcast(None if mine is None else replace(mine, lock=None))
        return mine
    return ranks.broadcast(None)


def open_writer(ranks: Ranks, runs_dir: Path, name: str, spec: RunSpec, label: str, earlier: Earlier | None) -> Writer:
    """The one writer of a new run, or of the next attempt at an earlier one, on rank 0. Raises StoreError where another rank
    does not see the run's folder."""
    writer: Writer = SilentWriter(runs_dir / name)
    if ranks.rank == 0 and earlier is None:
        writer = create_run(runs_dir, name, spec_json(spec), label)
    elif ranks.rank == 0 and earlier is not None:
        done = earlier.place.rollouts if earlier.place is not None else 0
        assert earlier.lock is not None
        writer = RunWriter(earlier.folder, spec_json(spec), label, earlier.lock, earlier.status, done)
    ranks.barrier()
    for host, seen in ranks.gather((socket.gethostname(), is_seen(writer.folder))):
        if not seen:
            raise StoreError(f"--runs-dir: {writer.folder} is not there on {host}; all machines of a run must share it")
    return writer


def is_seen(folder: Path) -> bool:
    """Whether the folder is there, at once or when a network file system has forgotten that it was not."""
    end = perf_counter() + 10
    while not folder.is_dir() and perf_counter() < end:
        sleep(0.2)
    return folder.is_dir()


def state_after(failure: ClipctlError) -> str:
    """Of a run that another of its processes ended."""
    return "diverged" if isinstance(failure, DivergedError) else "failed"


@contextmanager
def closing_run(spec: RunSpec, writer: Writer, stop: StopRequests, *, named: bool) -> Iterator[None]:
    """Ends the attempt with the state that the block's end means."""
    try:
        yield
    except KeyboardInterrupt:
        how = "the same command" if named else f"the same command and --name {writer.folder.name}"
        error = stop.error(f"{writer.folder} keeps what was measured; {how} goes on from {writer.saved}")
        writer.close("interrupted" if stop.failure is None else state_after(stop.failure), str(error))
        raise error from None
    except DivergedError as error:
        writer.close("diverged", str(error))
        raise
    except AlarmStop as error:
        writer.close("stopped", str(error))
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        writer.close("failed", f"out of memory: {error}")
        raise EngineError(
            f"out of memory ({(str(error).splitlines() or ['MemoryError'])[0]}); lower engine.tokens_per_microbatch "
            f"(now {spec.engine.tokens_per_microbatch}) or engine.sampler_rows (now {spec.engine.sampler_rows})"
        ) from None
    except StoreError as error:
        # A disk that failed the run fails its end too; the first error is the one that says why.
        with suppress(StoreError):
            writer.close("failed", str(error))
        raise
    except BaseException as error:
        writer.close("failed", str(error))
        raise
    writer.close("finished", "")


def run_rollouts(job: Job, state: RunState, opened: OpenRollout | None) -> None:
    """The loop: one rollout after the other, each stored whole before the next begins.

    opened: the rollout in whose updates the run was interrupted. A request to stop drops samples, which keyed draws make
    again, but lets an update finish; then everything is saved.
    """
    spec, every = job.spec, job.spec.checkpoint.every
    saved = state.rollout
    if opened is None:
        state = evaluate_when_due(job, state, saved)
    while state.rollout < spec.run.steps:
        if opened is None:
            with dropped_when_stopped(job, state, saved):
                opened = open_rollout(job, state)
        updates = run_updates(job, state, opened)
        state, stopping = end_rollout(job, state, opened, updates)
        opened = None
        if not stopping:
            state = evaluate_when_due(job, state, saved)
        if stopping or state.rollout == spec.run.steps or (every and state.rollout % every == 0):
            save_checkpoint(job, state)
            saved = state.rollout
        if stopping:
            raise AlarmStop(f"stopped by the alarm {stopping}")


@contextmanager
def dropped_when_stopped(job: Job, state: RunState, saved: int) -> Iterator[None]:
    """Work between two rollouts that a request to stop drops, with what was told of it; the state before it is saved, where
    the newest checkpoint, after `saved` rollouts, is an older one."""
    told = len(job.writer.recent)
    try:
        # What ranks do together one of them cannot leave: `Ranks.share` ends what each does alone.
        with job.stop.interruptible() if job.ranks.size == 1 else nullcontext():
            yield
        if job.ranks.asked_to_stop():
            raise StopNow
    except StopNow:
        del job.writer.recent[told:]
        if saved != state.rollout and not job.stop.at_once:
            save_checkpoint(job, state)
        raise


def evaluate_when_due(job: Job, state: RunState, saved: int) -> RunState:
    """The state after the evaluation that belongs here, where one does and was not done: before the checkpoint, so that a
    run goes on behind it."""
    if job.evaluation is None or state.evaluated == state.rollout or state.rollout not in job.spec.evaluated_after:
        return state
    with dropped_when_stopped(job, state, saved):
        evaluate_policy(job, job.evaluation, state.rollout)
    return replace(state, evaluated=state.rollout)


def open_rollout(job: Job, state: RunState) -> OpenRollout:
    """rollout → reward → advantage → π_old: all that comes before the updates."""
    drawn = draw_groups(job, state.rollout, state.position)
    job.engine.sampler.rest()
    dynamic = job.spec.rollout.dynamic_sampling
    trained = [group for group in drawn.groups if group.has_advantage or not dynamic]
    started = perf_counter()
    batch = pack(trained) if trained else None
    old = with_importance(job.spec, trained, job.engine.trainer.score(batch)) if batch is not None else None
    seconds = [drawn.seconds_sample, drawn.seconds_reward, perf_counter() - started, 0.0]
    noise = measure_noise(job, batch, trained, old) if state.profile is None else None
    control, loss = job.ranks.broadcast(choose_clip(job, state, None if old is None else mean_entropy(trained, old)))
    return OpenRollout(drawn.groups, trained, drawn.next_position, drawn.refills, old, noise, control, loss, seconds)


def with_importance(spec: RunSpec, trained: Sequence[Group], old: Scores) -> Scores:
    """The scores with the factors of the loss weights that `loss.importance_cap` asks for."""
    cap = spec.loss.importance_cap
    if cap is None:
        return old
    sampler_T = torch.from_numpy(sampler_logprobs(trained))
    return replace(old, importance_T=truncated_importance(old.logprob_T, sampler_T, cap))


def end_rollout(
    job: Job, state: RunState, opened: OpenRollout, updates: Sequence[Update]
) -> tuple[RunState, str | None]:
    """update → store: the new policy to the sampler, the rollout's rows, its line, its alarms. Returns the next state, and
    the alarm that `run.stop_on` names, with its reason, where one began."""
    spec, engine = job.spec, job.engine
    started = perf_counter()
    push_weights(engine, state.rollout + 1, job.probe, job.ranks)
    opened.seconds[3] += perf_counter() - started
    seconds = Seconds(*opened.seconds)
    row = rollout_row(opened.groups, opened.trained, opened.old, opened.loss, opened.refills, seconds)
    tables = rollout_tables(spec, opened.groups, opened.trained, opened.old, updates, job.tokenizer.token_texts)
    noise = {} if opened.noise is None else {"noise": opened.noise}
    job.writer.write_rollout(state.rollout, row, tables | noise)
    job.report(make_report(spec, state.rollout, row, updates, seconds))
    history = (*state.history, rollout_facts(state.rollout, row, updates, spec))
    after = RunState(
        rng=rng_state(),
        rollout=state.rollout + 1,
        position=opened.next_position,
        control=opened.control,
        history=history,
        profile=reduce(operator.add, (update.sums.profile for update in updates)).columns()
        if updates
        else state.profile,
        evaluated=state.evaluated,
    )
    stopping = job.ranks.broadcast(raise_alarms(job, history))
    if after.rollout == spec.run.steps:
        note_control(job, after)
    return after, stopping


TOKENS_AT_ONCE = 1 << 18
"""Tokens of updates whose sums are made together: many small updates share the cost of one pass."""


def run_updates(job: Job, state: RunState, opened: OpenRollout) -> list[Update]:
    """loss → update: the epochs over one rollout, with the ledger's probe states kept at its start.

    Raises StopNow, with everything saved, between two updates when that is asked for.
    """
    batch = batch_of(opened)
    if batch is None or opened.old is None:
        return []
    trainer, loss = job.engine.trainer, opened.loss
    steps = steps_of(job.spec, batch)
    measures = [measure_of(job.spec.ledger, len(steps) - 1 - step) for step in range(len(steps))]
    if not opened.updates and set(measures) != {"sums"}:
        trainer.keep_probe(batch, probe_states(job.spec, state.rollout, batch))
    while opened.updates < len(steps):
        if job.ranks.asked_to_stop() and opened.updates:
            save_checkpoint(job, state, opened)
            raise StopNow
        at, started = opened.updates, perf_counter()
        opened.waiting.append(trainer.step(batch, steps[at], opened.old, loss, measures[at]))
        tokens = sum(len(result.tokens.logprob_T) for result in opened.waiting)
        if opened.updates == len(steps) or tokens >= TOKENS_AT_ONCE:
            opened.done += summed(steps[len(opened.done) :], opened.waiting, loss)
            opened.waiting = []
        opened.seconds[3] += perf_counter() - started
    return opened.done


def summed(steps: Sequence[range], results: Sequence[UpdateResult], loss: PolicyLoss) -> list[Update]:
    """Updates as they are stored, without their tokens. steps: the responses of each of the results, and of more."""
    sums = loss.sums([result.loss for result in results], [result.tokens for result in results])
    return [
        Update(rows, loss, result.grad_norm, its_sums, result.probe, loss.clipped(result.tokens))
        for rows, result, its_sums in zip(steps, results, sums, strict=False)
    ]


def steps_of(spec: RunSpec, batch: Batch) -> list[range]:
    """The responses of each update of a rollout."""
    return spec.optim.epochs * minibatches(batch.responses, spec.optim.responses_per_update)


def probe_states(spec: RunSpec, rollout: int, batch: Batch) -> list[tuple[int, int]]:
    """(response, token) of the rollout's probe states."""
    return spread_states(batch.lengths_R, spec.ledger.probe_states, DrawKey(spec.run.seed, rollout, 0))


def choose_clip(job: Job, before: RunState, entropy: float | None) -> tuple[ControlState | None, PolicyLoss]:
    """The ε of this rollout's updates: the spec's, or what the controller makes of the profile of the last updates.

    entropy: of this rollout, nats; None where dynamic sampling found nothing to train on.
    """
    spec, state = job.spec, before.control
    asked = PolicyLoss(spec.loss.objective, spec.clip.low, spec.clip.high)
    if spec.control.target_entropy is None or entropy is None:
        return state, asked
    low = spec.control.actuator == "eps_low"
    mine, other = (asked.eps_low, asked.eps_high) if low else (asked.eps_high, asked.eps_low)
    if state is None:
        return start_control(spec.control, mine, entropy), asked
    assert before.profile is not None
    state, action = next_action(state, spec.control, entropy, before.profile, other)
    chosen = (action.eps, other) if low else (other, action.eps)
    job.writer.event("control", action.reason, rollout=before.rollout, data=action.data)
    if action.stuck:
        tell(job, "control_limit", action.stuck, before.rollout, action.data)
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
        scored, sampling = sample_groups(job, problems, prompts)
        groups += with_advantages(job, problems, prompts, scored)
        position += len(prompts)
        seconds.append((sampling, perf_counter() - started - sampling))
        useful = sum(group.has_advantage for group in groups)
    if dynamic and useful < wanted:
        message = f"dynamic sampling found {useful} of {wanted} groups with an advantage in {len(seconds) - 1} refills"
        job.writer.event("dynamic_sampling", message, rollout=rollout, data={"useful": useful, "sampled": len(groups)})
    return Drawn(groups, position, len(seconds) - 1, *(sum(column) for column in zip(*seconds, strict=True)))


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
    """The groups in the order of their prompts, each sampled by one of the ranks, and the seconds of the one that sampled
    longest."""
    ranks = job.ranks
    mine = ranks.mine(len(prompts))
    shares = ranks.share(lambda: sample_alone(job, [problems[at] for at in mine], [prompts[at] for at in mine]))
    groups = [shares[place % ranks.size][0][place // ranks.size] for place in range(len(prompts))]
    return groups, max(seconds for _, seconds in shares)


def sample_alone(job: Job, problems: Sequence[Problem], prompts: Sequence[Prompt]) -> tuple[list[ScoredGroup], float]:
    """The groups in the order of their prompts, decoded and scored while others are sampled, and the seconds until the last
    one was sampled."""
    if not prompts:
        return [], 0.0
    found: dict[int, ScoredGroup] = {}
    started = ended = perf_counter()

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

    # A request to stop drops the samples, so nobody waits for their grades, which may take all of `reward.budget`.
    work_while_making(sampled(), score, abandon=job.scorer.pool.close)
    return [found[place] for place in range(len(prompts))], ended - started


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
    chosen, ids = [problems[at] for at in kept], [prompt_ids[at] for at in kept]
    return Tokenized(chosen, ids, len(problems) - len(kept), digest_of_data(chosen, ids))


def check_context(spec: RunSpec, data: Tokenized, folder: Path) -> None:
    """Raises SpecError where prompt and response together exceed the model's context."""
    from clipctl.models import model_shape

    shape = model_shape(str(folder))
    longest = max(map(len, data.prompt_ids))
    if shape is not None and longest >= shape.context:
        raise SpecError(
            f"rollout.max_prompt_tokens = {spec.rollout.max_prompt_tokens}: prompts of up to {longest} tokens leave nothing of "
            f"the {shape.context} positions of {spec.model.path} to a response; lower it to {shape.context - 1} at most"
        )
    if shape is not None and longest + spec.rollout.max_response_tokens > shape.context:
        raise SpecError(
            f"rollout.max_response_tokens = {spec.rollout.max_response_tokens}: with prompts of up to {longest} tokens "
            f"that exceeds the {shape.context} positions of {spec.model.path}; at most "
            f"{shape.context - longest}, or lower rollout.max_prompt_tokens"
        )


def longest_text(
    spec: RunSpec, data: Tokenized, evaluation: "PolicyEvaluation | None", tokenizer: ChatTokenizer
) -> int:
    """Tokens of the longest prompt with the longest response, in training and evaluation."""
    longest = max(map(len, data.prompt_ids)) + spec.rollout.max_response_tokens
    if evaluation is None:
        return longest
    return max(longest, longest_prompt(evaluation.benchmarks, tokenizer) + evaluation.setup.max_tokens)


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
    # A run that goes on evaluates again, so Ctrl-C does not wait for gradings: `checkpoint.grace` is for saving.
    evaluator = Evaluator(
        lambda: job.engine.sampler, job.tokenizer, stops, pool, setup, abandon=pool.close, ranks=job.ranks
    )
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
        job.writer.event("chat_template", f"{job.spec.model.path} has no chat template: a plain one is used", rollout=0)
    if job.data.left_out:
        message = f"{job.data.left_out} problems left out: prompts over {job.spec.rollout.max_prompt_tokens} tokens"
        job.writer.event("prompts_left_out", message, rollout=0, data={"left_out": job.data.left_out})


NOISE_MARGIN = 5
"""An ε under so many times the 99th percentile of |log r| between two scorings of one policy measures noise."""


def measure_noise(job: Job, batch: Batch | None, trained: Sequence[Group], old: Scores | None) -> Columns | None:
    """The null distribution of log r as a `noise` table: the first optimizer batch scored again by the same weights in
    another micro-batch layout, and the trainer against the sampler. Warns where an ε is not far above it."""
    if batch is None or old is None:
        return None
    rows = minibatches(batch.responses, job.spec.optim.responses_per_update)[0]
    again_T = job.engine.trainer.score_otherwise(batch, rows).double().numpy()
    logprob_T = old.logprob_T.double().numpy()
    sampler_T = sampler_logprobs(trained)
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
    return noise_columns(log_ratios)


def smallest_eps(spec: RunSpec) -> dict[str, tuple[str, float]]:
    """The smallest ε that each side can have, and the key that says so: the controller may go to its lower bound."""
    found = {"low": ("clip.low", spec.clip.low), "high": ("clip.high", spec.clip.high)}
    if spec.control.target_entropy is not None:
        found[spec.control.actuator.removeprefix("eps_")] = ("control.bounds[0]", spec.control.bounds[0])
    return found


def raise_alarms(job: Job, history: Sequence[RolloutFacts]) -> str | None:
    """Tells the alarms that begin with this rollout; returns the first of `run.stop_on` among them, in words."""
    rollout = history[-1].rollout
    alarms = new_alarms(history, job.spec.alarms)
    for alarm, reason in alarms.items():
        tell(job, "alarm", f"{alarm}: {reason}", rollout, {"alarm": alarm})
    return stopping_alarm(job.spec, history, alarms)


def stopping_alarm(spec: RunSpec, history: Sequence[RolloutFacts], alarms: Mapping[Alarm, str]) -> str | None:
    """The first of `run.stop_on` among the alarms that began, in words."""
    return next(
        (
            f"{alarm} after rollout {history[-1].rollout}: {alarms[alarm]}"
            for alarm in alarms
            if alarm in spec.run.stop_on
        ),
        None,
    )


def tell_of_engine(ranks: Ranks, writer: Writer, warn: Callable[[str], None], message: str) -> None:
    """A line of an engine that is started again, and an event where it is that of rank 0, which alone writes."""
    writer.event("engine_lost", message)
    if ranks.rank == 0:
        warn(message)
    else:
        print_warning(f"rank {ranks.rank}: {message}")


def tell(job: Job, kind: str, message: str, rollout: int, data: dict[str, Any]) -> None:
    """An event, and a line for whoever watches."""
    job.writer.event(kind, message, rollout=rollout, data=data)
    job.warn(f"{kind}: {message}")


def save_checkpoint(job: Job, state: RunState, opened: OpenRollout | None = None) -> None:
    """Everything that the run needs to go on, beside the policy as a folder that transformers loads."""
    place = Place(state.rollout, opened.updates if opened is not None else 0)
    events = [asdict(event) | {"time": event.time.isoformat()} for event in job.writer.recent]
    with job.writer.disk(), new_checkpoint_of_all(job, place) as folder:
        job.engine.trainer.save(folder)
        job.engine.trainer.save_state(folder / STATE, probe=opened is not None)
        if job.ranks.rank == 0:
            job.tokenizer.save(folder)
            rng = state.rng if opened is None else rng_state()
            save_state(folder / STATE, state, opened, rng, events, job.data.digest, job.ranks.size)
    job.writer.saved = place.words


@contextmanager
def new_checkpoint_of_all(job: Job, place: Place) -> Iterator[Path]:
    """A folder to save into for all ranks, which rank 0 makes, and makes the newest checkpoint when all have written. When the
    block has ended on any rank it is one."""
    with ExitStack() as stack:
        folder: Path | None = None
        if job.ranks.rank == 0:
            checkpoints = job.writer.folder / "checkpoints"
            folder = stack.enter_context(new_checkpoint(checkpoints, place, job.spec.checkpoint))
            (folder / STATE).mkdir()
        folder = job.ranks.broadcast(folder)
        assert folder is not None
        yield folder
        job.ranks.barrier()
    job.ranks.barrier()


def begin(job: Job, earlier: Earlier | None) -> tuple[RunState, OpenRollout | None]:
    """The state to begin with: a new run's, or that of the checkpoint to go on from, whose model the engine has loaded."""
    note_processes(job)
    if earlier is not None and earlier.recovered:
        job.writer.event("status_damaged", earlier.recovered)
        job.warn(earlier.recovered)
    if earlier is None or earlier.checkpoint is None:
        if earlier is not None and earlier.status:
            job.warn(f"{job.writer.folder.name} has no checkpoint yet: it begins again")
        note_choices(job)
        seed_rng(job.spec.run.seed + job.ranks.rank)
        # An engine may take minutes to start; what ranks do together one of them cannot leave.
        with job.stop.interruptible() if job.ranks.size == 1 else nullcontext():
            check_agreement(job.engine, 0, job.probe, job.ranks)
        return RunState(rng_state()), None
    assert earlier.place is not None
    saved = SavedState(earlier.checkpoint / STATE)
    if saved.facts["data"] != job.data.digest:
        raise DataError(
            f"{job.writer.folder}: the rows, the prompt template or the tokenizer are not those that the run was begun with, "
            "so its place in the prompt stream means nothing; bring them back, or start anew under another --name"
        )
    note_resume(job, earlier, saved)
    job.engine.trainer.load_state(saved.folder)
    push_weights(job.engine, earlier.place.rollouts, job.probe, job.ranks)
    state = read_run_state(saved)
    if job.ranks.rank == 0:
        set_rng_state(state.rng)
    else:
        seed_rng(int(keyed_rng(job.spec.run.seed, "rank", job.ranks.rank, str(earlier.place)).integers(2**32)))
    # Readers hide what earlier attempts told of the rollout that comes, and of the evaluation before it.
    for event in saved.facts["events"]:
        if event["rollout"] == state.rollout:
            job.writer.event(**(event | {"time": datetime.fromisoformat(event["time"])}))
    if earlier.place.updates:
        return state, reopen_rollout(job, state, saved)
    stopping = stopping_alarm(job.spec, state.history, new_alarms(state.history, job.spec.alarms))
    if stopping and earlier.status["state"] != "stopped":
        raise AlarmStop(f"stopped by the alarm {stopping}")
    return state, None


def note_processes(job: Job) -> None:
    """An event that says where the processes of this attempt are, where there are several."""
    if job.ranks.size == 1:
        return
    hosts = job.ranks.gather(socket.gethostname())
    words = ", ".join(f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts))
    job.writer.event("processes", f"{len(hosts)} processes: {words}", data={"hosts": hosts})


def reopen_rollout(job: Job, state: RunState, saved: SavedState) -> OpenRollout:
    """The rollout in whose updates the run was interrupted."""
    completions = read_completions(saved)
    problems, prompts = next_prompts(job, state.rollout, state.position, len(completions))
    job.engine.sampler.rest()
    texts = [[job.tokenizer.decode(completion.token_ids) for completion in group] for group in completions]
    opened = read_open_rollout(saved, problems, prompts, texts, job.spec.engine.device)
    batch = batch_of(opened)
    if batch is not None and job.spec.ledger.probe_states:
        job.engine.trainer.keep_probe(batch, probe_states(job.spec, state.rollout, batch), saved.folder)
    return opened


def note_resume(job: Job, earlier: Earlier, saved: SavedState) -> None:
    """Says where the run goes on, and what is not as it was."""
    assert earlier.place is not None
    job.writer.saved = earlier.place.words
    for problem in earlier.problems:
        job.writer.event("checkpoint_damaged", problem)
        job.warn(problem)
    before, now = saved.facts["versions"], versions(job.ranks.size)
    changed = [f"{name} {before[name]} is now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    message = f"attempt {job.writer.attempt} goes on from {earlier.place.words}"
    if changed:
        message += f"; numbers may differ from those of an undisturbed run: {', '.join(changed)}"
    job.writer.event("resumed", message, data={"rollouts": earlier.place.rollouts, "updates": earlier.place.updates})
    job.warn(f"{job.writer.folder.name}: {message}")


def note_control(job: Job, state: RunState) -> None:
    """At the end of a controlled run: whether the target was held over its second half."""
    control, rollout = state.control, state.rollout - 1
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
        job.writer.event("control_end", message, rollout=rollout, data=data)
    else:
        tell(job, "control_end", message, rollout, data)


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
