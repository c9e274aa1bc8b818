"""The spec of one evaluation by `clipctl eval`: which model, which benchmarks, how it is sampled. Closed and frozen.

Precedence: defaults, or the evaluated run's own groups < --set < named flags.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, Self

from pydantic import model_validator

from clipctl.errors import SpecError
from clipctl.layers import overlay
from clipctl.spec import Arith, Count, Engine, EvalSettings, Group, Model, RunSpec, flatten, validate

ALONE: dict[str, Any] = {"model": {"dtype": "float32"}, "eval": {"max_response_tokens": 2048}}
"""Defaults of the evaluation of a model that no run is asked about: exact logits, and a length of its own."""


class Grading(Group):
    """Processes that run Math-Verify."""

    timeout: Count = 5
    """Whole seconds for one grading before its worker is killed."""
    workers: Count = 2
    """Grading processes."""


class EvalSpec(Group):
    """A whole evaluation. `run` and `rollout` say which checkpoint `model.path` is; none: a model by itself."""

    kind: Literal["evaluation"] = "evaluation"
    run: str | None = None
    """Folder of the run that is evaluated."""
    rollout: int | None = None
    """Rollouts that its checkpoint was trained for."""
    model: Model
    engine: Engine = Engine()
    eval: EvalSettings
    arith: Arith = Arith()
    """The generated arithmetic task, for the benchmark `arith`."""
    grading: Grading = Grading()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.eval.benchmarks:
            raise ValueError("eval.benchmarks: empty; give --benchmark, such as --benchmark gsm8k")
        if self.eval.max_response_tokens is None:
            raise ValueError("eval.max_response_tokens: missing; give --set eval.max_response_tokens=N")
        return self


def of_run(run: RunSpec) -> dict[str, Any]:
    """The groups that a run's evaluation takes over, as a layer: its model, engine, task, grading and [eval]."""
    layer = run.model_dump(include={"model", "engine", "eval"}, exclude={"eval": {"every"}})
    if layer["eval"]["max_response_tokens"] is None:
        layer["eval"]["max_response_tokens"] = run.rollout.max_response_tokens
    layer["arith"] = run.data.arith.model_dump()
    if run.reward.kind == "math":
        layer["grading"] = {"timeout": run.reward.timeout, "workers": run.reward.workers}
    return layer


def resolve_eval_spec(*layers: Mapping[str, Any]) -> EvalSpec:
    """One spec from layers of nested dicts, later ones over earlier ones. Raises SpecError."""
    return validate(EvalSpec, overlay(*layers))


def eval_name(spec: EvalSpec, facts: Sequence[str]) -> str:
    """The folder's name where none is given: the model or run, and a hash of the spec and of what model and problems are, so
    that the same command finds what it has done, and only that."""
    what = f"{_word(spec.run)}-{spec.rollout}" if spec.run else _word(spec.model.path)
    whole = "\n".join([spec.model_dump_json(), *facts])
    return f"eval-{what[:60]}-{blake2b(whole.encode(), digest_size=4).hexdigest()}"


def _word(path: str) -> str:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in name).strip("-")


def refuse_another_spec(name: str, old: EvalSpec, new: EvalSpec) -> None:
    """Raises SpecError with the differences where an evaluation of this name has another spec."""
    before, now = flatten(old), flatten(new)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in sorted(differing))
        raise SpecError(f"--name: {name!r} has other settings ({listed}); give another --name, or the same settings")
