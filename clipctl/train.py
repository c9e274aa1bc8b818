"""The main path: spec → rollout → reward → advantage → loss → update → store.

GRPO as the paper has it (arXiv 2509.26114): the advantage is the reward minus its group's mean, without the standard
deviation; the log-probabilities of π_old are the trainer's own, scored once per rollout in the layout in which the
updates run, so the ratio at inner step 0 is 1 by construction; a group is never split over updates; no KL term and no
entropy bonus. Dimension letters as in `clipctl.rollout`.
"""

import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch

from clipctl.algo import group_advantages, overlong_penalty
from clipctl.engine import EnginePair, UpdateResult, open_engine
from clipctl.errors import DataError, DivergedError, EngineError, Interrupted, SpecError
from clipctl.loss import spec_loss
from clipctl.models import ChatTokenizer, check_device, find_model, load_tokenizer, stop_ids
from clipctl.records import Group, Seconds, pack, rollout_row, sample_columns, token_columns, update_row
from clipctl.rewards import Scorer, grader_of, open_scorer
from clipctl.rollout import Completion, DrawKey, Problem, Prompt, SamplingParams, minibatches, stream_indices
from clipctl.spec import RunSpec, spec_json
from clipctl.store import RunWriter, check_place, create_run
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
    writer: RunWriter
    report: Callable[[Report], None]


def train(
    spec: RunSpec,
    *,
    runs_dir: Path | str = "runs",
    label: str = "run",
    report: Callable[[Report], None] = lambda report: None,
) -> Path:
    """Runs the spec and returns the run's folder, `runs_dir`/`run.name` or `runs_dir`/`label`-date-4 hex digits.

    report is called after each rollout. Raises a ClipctlError of one line; the run's folder then keeps what was
    measured, with its state: interrupted (Ctrl-C), diverged (non-finite), failed.
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
            job = Job(spec, data, tokenizer, params, scorer, engine, writer, report)
            note_choices(job)
            run_rollouts(job)
            save_model(job, spec.run.steps)
        except KeyboardInterrupt:
            writer.close("interrupted", "stopped by hand")
            raise Interrupted(f"stopped by hand; what was measured is in {writer.folder}") from None
        except DivergedError as error:
            writer.close("diverged", str(error))
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
    loss = spec_loss(spec)
    position = 0
    for rollout in range(spec.run.steps):
        drawn = draw_groups(job, rollout, position)
        position = drawn.next_position
        trained = [group for group in drawn.groups if group.has_advantage or not spec.rollout.dynamic_sampling]
        started = perf_counter()
        batch = pack(trained) if trained else None
        old = engine.trainer.score(batch) if batch is not None else None
        scored = perf_counter()
        updates: list[tuple[int, UpdateResult]] = []
        if batch is not None and old is not None:
            for _ in range(spec.optim.epochs):
                for rows in minibatches(batch.responses, spec.optim.responses_per_update):
                    updates.append((len(rows), engine.trainer.step(batch, rows, old, loss)))
        engine.sampler.update_weights(engine.trainer.weights(), version=rollout + 1)
        seconds = Seconds(drawn.seconds_sample, drawn.seconds_reward, scored - started, perf_counter() - scored)
        row = rollout_row(drawn.groups, trained, old, drawn.refills, seconds)
        job.writer.write_rollout(
            rollout,
            row,
            [update_row(spec, step, responses, result) for step, (responses, result) in enumerate(updates)],
            sample_columns(drawn.groups, trained, old),
            token_columns(trained, old, spec.store.tokens),
            texts=spec.store.texts,
        )
        job.report(make_report(spec, rollout, row, [result for _, result in updates], seconds))
        if spec.checkpoint.every and (rollout + 1) % spec.checkpoint.every == 0 and rollout + 1 < spec.run.steps:
            save_model(job, rollout + 1)


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
        completions = job.engine.sampler.sample(prompts, job.spec.rollout.group_size, job.params)
        sampled = perf_counter()
        groups += score_groups(job, problems, prompts, completions)
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


def score_groups(
    job: Job, problems: Sequence[Problem], prompts: Sequence[Prompt], completions: list[list[Completion]]
) -> list[Group]:
    """Rewards (with the soft overlong penalty) and group advantages of the sampled completions."""
    spec = job.spec
    texts = [[job.tokenizer.decode(completion.token_ids) for completion in group] for group in completions]
    rewards_PG, outcomes = job.scorer.score(problems, [prompt.key for prompt in prompts], texts)
    lengths_PG = torch.tensor([[len(completion.token_ids) for completion in group] for group in completions])
    penalty_PG = overlong_penalty(
        lengths_PG,
        max_tokens=spec.rollout.max_response_tokens,
        buffer=spec.rollout.overlong_buffer,
        penalty=spec.rollout.overlong_penalty,
    )
    rewards_PG = rewards_PG + penalty_PG.numpy()
    advantages_PG = group_advantages(torch.from_numpy(rewards_PG)).numpy()
    return [
        Group(problems[at], prompts[at], completions[at], texts[at], rewards_PG[at], advantages_PG[at], outcomes[at])
        for at in range(len(prompts))
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


def note_choices(job: Job) -> None:
    """Events for what the run decided by itself."""
    if job.tokenizer.plain_template:
        job.writer.event("chat_template", f"{job.spec.model.path} has no chat template: a plain one is used")
    if job.data.left_out:
        message = f"{job.data.left_out} problems left out: prompts over {job.spec.rollout.max_prompt_tokens} tokens"
        job.writer.event("prompts_left_out", message, data={"left_out": job.data.left_out})


def save_model(job: Job, rollouts: int) -> None:
    """The policy after so many rollouts, as `checkpoints/<rollouts>`, a folder that transformers loads."""
    with job.writer.new_checkpoint(rollouts) as folder:
        job.engine.trainer.save(folder)
        job.tokenizer.save(folder)


def make_report(
    spec: RunSpec, rollout: int, row: dict[str, float], updates: Sequence[UpdateResult], seconds: Seconds
) -> Report:
    """The rollout in a line."""
    tokens = sum(int(update.sums.counts.tokens) for update in updates)
    return Report(
        rollout=rollout,
        steps=spec.run.steps,
        reward=row["reward_sum"] / row["responses"],
        entropy=row["entropy_response_sum"] / row["responses_scored"] if row["responses_scored"] else None,
        clip_low=sum(int(update.sums.counts.clip_low) for update in updates) / max(tokens, 1),
        clip_high=sum(int(update.sums.counts.clip_high) for update in updates) / max(tokens, 1),
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
