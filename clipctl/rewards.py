"""Rewards: a score for every (completion, problem), graded, drawn at random, or made by a function of the user's own.

Whatever the reward is, the outcome of every completion is recorded beside it: under a random reward too, the task's
grader says what was correct. `clipctl.answers` finds answers, `clipctl.formulas` compares formulas, in processes that
`clipctl.grading_worker` kills at their limit. Dimension letters as in `clipctl.rollout`.
"""

import atexit
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from numbers import Real
from time import monotonic
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from clipctl.answers import (
    ANSWER_CHARACTERS,
    OUTCOMES,
    Extracted,
    Outcome,
    compare_cheaply,
    extract_math,
    grade_gsm8k,
)
from clipctl.errors import DataError, DivergedError, SpecError
from clipctl.grading_worker import NOT_PARSED, Workers, parse_golds
from clipctl.rollout import DrawKey, Problem, keyed_rng
from clipctl.spec import (
    BernoulliReward,
    FunctionReward,
    Graded,
    MathReward,
    NormalReward,
    RademacherReward,
    Reward,
    UniformReward,
)

CACHED_GRADINGS = 200_000
"""Gradings remembered by (gold, extracted answer); then the cache starts anew."""


class GradingPool:
    """Grades many completions, formulas in killable processes that it keeps; a context manager.

    workers: processes; timeout: whole seconds for one formula. The processes start at once, or with the first formula
    where `start` is False. May be used from any thread.
    """

    def __init__(self, workers: int = 2, timeout: int = 5, *, start: bool = True) -> None:
        self._workers = Workers(workers, timeout, start=start)
        self._cache: dict[tuple[str, Extracted], Outcome] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, for good, and waits for them; a grading under way in another thread ends at once."""
        self._workers.close()

    def grade_many(
        self, kind: str, completions: Sequence[str], answers: Sequence[str], budget_seconds: float | None = None
    ) -> list[Outcome]:
        """The outcome of each completion against its gold answer, in order; kind: a key of GRADERS.

        budget_seconds: for the whole call; what is not graded by then is `timeout`. Raises SpecError for an unknown
        kind, DataError for a gold answer that the grader cannot read, EngineError when `close` ends the processes meanwhile.
        """
        assert len(completions) == len(answers)
        return GRADERS[_known(kind)](self, completions, answers, budget_seconds)

    def grade_formulas(
        self, completions: Sequence[str], answers: Sequence[str], budget_seconds: float | None = None
    ) -> list[Outcome]:
        """`grade_many` of kind "math". The same answer to the same gold goes to a worker once."""
        settled: dict[tuple[str, Extracted], Outcome] = {}
        keys = [(gold, extract_math(completion)) for gold, completion in zip(answers, completions, strict=True)]
        for gold, answer in keys:
            if answer is not None:
                outcome = settle(gold, answer) or self._cache.get((gold, answer))
                if outcome is not None:
                    settled[gold, answer] = outcome
        open_ = list(dict.fromkeys((gold, answer) for gold, answer in keys if answer and (gold, answer) not in settled))
        end = None if budget_seconds is None else monotonic() + budget_seconds
        parsed = parse_golds(self._workers, [gold for gold, _ in open_], budget_seconds)
        settled |= {key: _outcome(parsed[key[0]], key[0]) for key in open_ if parsed[key[0]] in NOT_PARSED}
        open_ = [key for key in open_ if key not in settled]
        requests = [("grade", parsed[gold], answer.form, answer.text) for gold, answer in open_]
        left = None if end is None else max(0.0, end - monotonic())
        for key, outcome_text in zip(open_, self._workers.run(requests, left), strict=True):
            settled[key] = _outcome(outcome_text, key[0])
            # A timeout or crash may be the machine's fault, so it is not remembered.
            if outcome_text in ("correct", "wrong", "no_answer"):
                self._remember(key, settled[key])
        return ["no_answer" if answer is None else settled[gold, answer] for gold, answer in keys]

    def _remember(self, key: tuple[str, Extracted], outcome: Outcome) -> None:
        with self._lock:
            if len(self._cache) >= CACHED_GRADINGS:
                self._cache.clear()
            self._cache[key] = outcome


def settle(gold: str, answer: Extracted) -> Outcome | None:
    """What can be said without Math-Verify: `too_long`, equal or different numbers, equal texts; else None."""
    if len(answer.text) > ANSWER_CHARACTERS:
        return "too_long"
    return None if answer.form == "tail" else compare_cheaply(gold, answer.text)


def grade(kind: str, completion: str, answer: str) -> str:
    r"""The outcome of one completion: correct, wrong, no_answer, timeout, crash or too_long.

    kind: "gsm8k", the last number of the text; "math", Math-Verify on the last `\boxed{}`, else on what follows a
    closing "####" or the last "Answer:", else on the last formula or number, 5 s at most, in a process that is kept for
    the next call.
    answer: the gold answer. Raises SpecError for an unknown kind, DataError for a gold that the grader cannot read.
    """
    return _shared_pool().grade_many(kind, [completion], [answer])[0]


@cache
def _shared_pool() -> GradingPool:
    pool = GradingPool(workers=1, start=False)
    atexit.register(pool.close)
    return pool


def _known(kind: str) -> str:
    if kind not in GRADERS:
        raise SpecError(f"grader {kind!r} is not one of {', '.join(GRADERS)}")
    return kind


def _outcome(text: str, gold: str) -> Outcome:
    if text == "bad_gold":
        raise DataError(f"answer {gold[:60]!r} is no formula that Math-Verify can parse")
    if text == "budget":
        return "timeout"
    return OUTCOMES[OUTCOMES.index(text)]


def _grade_numbers(
    pool: GradingPool, completions: Sequence[str], answers: Sequence[str], budget_seconds: float | None
) -> list[Outcome]:
    return list(map(grade_gsm8k, completions, answers))


Grader = Callable[[GradingPool, Sequence[str], Sequence[str], float | None], list[Outcome]]
GRADERS: dict[str, Grader] = {"gsm8k": _grade_numbers, "math": GradingPool.grade_formulas}

# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampled:
    """R completions, group by group, with what a reward may look at.

    draws_R: what a random reward is keyed by, (rollout, position, sample); outcomes_R: None where there is no grader.
    """

    problems_R: list[Problem]
    draws_R: list[tuple[int, int, int]]
    completions_R: list[str]
    outcomes_R: list[Outcome | None]
    seed: int


class RolloutBudget:
    """Seconds of grading that each rollout may take, over all the calls for its groups."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._rollout, self._left = seconds, -1, seconds

    @contextmanager
    def of(self, rollout: int) -> Iterator[float]:
        """What is left to the rollout, in seconds; the block's wall time is taken from it."""
        if rollout != self._rollout:
            self._rollout, self._left = rollout, self._seconds
        started = monotonic()
        yield self._left
        self._left = max(0.0, self._left - (monotonic() - started))


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores completions by one reward. Made by `open_scorer`."""

    reward: Reward
    grader: str | None
    seed: int
    pool: GradingPool
    budget: RolloutBudget

    def score(
        self, problems: Sequence[Problem], keys: Sequence[DrawKey], completions_PG: Sequence[Sequence[str]]
    ) -> tuple[NDArray[np.float64], list[list[Outcome | None]]]:
        """Rewards [P,G] in float64 and the outcomes of the same shape, None where nothing grades them.

        problems, keys: P of one rollout; completions_PG: the texts of each group. What the budget of the rollout does not
        reach is `timeout`. Raises DataError for a reward function that fails or returns no number, DivergedError for one
        that returns a number that is not finite.
        """
        size = len(completions_PG[0])
        assert len(problems) == len(keys) == len(completions_PG)
        assert all(len(group) == size for group in completions_PG)
        texts = [text for group in completions_PG for text in group]
        problems_R = [problem for problem in problems for _ in range(size)]
        outcomes_R: list[Outcome | None] = [None] * len(texts)
        if self.grader is not None:
            answers = [problem.answer for problem in problems_R]
            with self.budget.of(keys[0].rollout) as seconds:
                outcomes_R = [*self.pool.grade_many(self.grader, texts, answers, seconds)]
        draws_R = [(key.rollout, key.position, sample) for key in keys for sample in range(size)]
        rewards_R = REWARDS[self.reward.kind](self.reward, Sampled(problems_R, draws_R, texts, outcomes_R, self.seed))
        assert np.isfinite(rewards_R).all()
        outcomes_PG = [outcomes_R[at : at + size] for at in range(0, len(texts), size)]
        return rewards_R.reshape(len(problems), size), outcomes_PG


@contextmanager
def open_scorer(reward: Reward, grader: str | None, seed: int) -> Iterator[Scorer]:
    """A scorer with its grading processes, which end with the block.

    grader: the task's, for outcomes under rewards that do not grade; a graded reward uses its own. seed: of the run;
    random rewards depend on (seed, rollout, position in the prompt stream, sample) alone. Raises SpecError for a reward
    function that cannot be imported.
    """
    grader = grader_of(reward, grader)
    if isinstance(reward, FunctionReward):
        find_function(reward.function)
    settings = math_settings(reward)
    with GradingPool(settings.workers, settings.timeout, start=grader == "math") as pool:
        yield Scorer(reward, grader, seed, pool, RolloutBudget(settings.budget))


def math_settings(reward: Reward) -> MathReward:
    """How formulas are graded beside a reward: as it says, else by default."""
    return reward if isinstance(reward, MathReward) else MathReward(kind="math")


def grader_of(reward: Reward, grader: str | None) -> str | None:
    """Which grader makes the outcomes: that of a graded reward, else the task's."""
    return str(reward.kind) if isinstance(reward, Graded) else grader


def graded(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """`reward.correct` for the outcome `correct`, `reward.wrong` for every other, [R]."""
    assert isinstance(reward, Graded)
    correct_R = np.array([outcome == "correct" for outcome in sampled.outcomes_R])
    return np.where(correct_R, reward.correct, reward.wrong)


def bernoulli(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """1 with probability p, else 0, [R]. The uniform draw behind it does not depend on p."""
    assert isinstance(reward, BernoulliReward)
    return (_uniform_R(sampled) < reward.p).astype(np.float64)


def rademacher(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """-1 or 1 with probability one half each, [R]."""
    assert isinstance(reward, RademacherReward)
    return np.where(_uniform_R(sampled) < 0.5, 1.0, -1.0)


def uniform(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """Uniform on [0, 1), [R]."""
    assert isinstance(reward, UniformReward)
    return _uniform_R(sampled)


def normal(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """Standard normal, [R]."""
    assert isinstance(reward, NormalReward)
    return np.array([keyed_rng("reward", sampled.seed, *draw).standard_normal() for draw in sampled.draws_R])


def _uniform_R(sampled: Sampled) -> NDArray[np.float64]:
    return np.array([keyed_rng("reward", sampled.seed, *draw).random() for draw in sampled.draws_R])


def own_function(reward: Reward, sampled: Sampled) -> NDArray[np.float64]:
    """What the user's function returns for each completion, [R]. Raises DataError and DivergedError, see `Scorer`."""
    assert isinstance(reward, FunctionReward)
    function = find_function(reward.function)
    pairs = zip(sampled.completions_R, sampled.problems_R, strict=True)
    return np.array([_call(reward.function, function, completion, problem) for completion, problem in pairs])


def _call(name: str, function: Callable[[str, Problem], object], completion: str, problem: Problem) -> float:
    try:
        value = function(completion, problem)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"reward.function: {name} failed on problem {problem.id}: {type(error).__name__}: {first}"
        ) from error
    if not isinstance(value, Real):
        raise DataError(f"reward.function: {name} returned {value!r} for problem {problem.id}; it must return a number")
    if not math.isfinite(value):
        raise DivergedError(
            f"reward.function: {name} returned {value} for problem {problem.id}; rewards must be finite"
        )
    return float(value)


def find_function(path: str) -> Callable[[str, Problem], object]:
    """The function of an import path `package.module:function`; the working directory is searched last.

    Raises SpecError when there is none.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise SpecError(
            f"reward.function: {module_name!r} cannot be imported: {type(error).__name__}: {first}; it is looked for "
            "among the installed packages and in the working directory"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no" if function is None else "something else as"
        raise SpecError(f"reward.function: {module_name!r} has {found} function {name!r}")
    return function  # type: ignore[no-any-return]


REWARDS: dict[str, Callable[[Reward, Sampled], NDArray[np.float64]]] = {
    "gsm8k": graded,
    "math": graded,
    "bernoulli": bernoulli,
    "normal": normal,
    "uniform": uniform,
    "rademacher": rademacher,
    "function": own_function,
}
