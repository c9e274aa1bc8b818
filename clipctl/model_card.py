"""The card of an exported policy, README.md of its folder: what it was trained from and how, what was measured, the spec.

Names, paths and templates are the user's or a hub's: they stand there as text, whatever characters they have.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clipctl import __version__
from clipctl.folder import look_at
from clipctl.formats import markdown_cell
from clipctl.models import MODELS, hub_name
from clipctl.spec import RunSpec, spec_json
from clipctl.store import open_runs
from clipctl.targets import Target

MEASURED = {
    "entropy": "entropy, nats",
    "entropy_normalized": "entropy ÷ that of the first rollout",
    "reward_mean": "reward, mean",
    "mean_at_group": "correct, mean over responses",
    "pass_at_group": "solved by one of its group, share of prompts",
    "response_tokens_mean": "response tokens, mean",
    "clip_low": "clip-low, share of response tokens",
    "clip_high": "clip-high, share of response tokens",
}
"""Columns of `ROLLOUTS`, and what they are called."""
ROLLOUTS = """
select r.*, u.clip_low, u.clip_high from rollouts as r left join (
    select rollout, sum(clip_low) / nullif(sum(tokens), 0) as clip_low,
        sum(clip_high) / nullif(sum(tokens), 0) as clip_high
    from updates group by rollout) as u using (rollout)
where r.rollout < {rollout} order by r.rollout"""
EVALUATIONS = """
select benchmark, rollout, problems, k, temperature, top_p, mean_at_k, pass_at_k from evaluations
where complete and rollout in (0, {rollout}) order by benchmark, rollout, started_at"""


def model_card(target: Target) -> str:
    """README.md of the target's policy, with the metadata block that the hub reads."""
    with open_runs([target.folder]) as runs:
        rollouts = runs.table(ROLLOUTS.format(rollout=target.rollout)).to_pylist()
    with open_runs([target.folder, *evaluations_of(target.folder)]) as runs:
        evaluations = runs.table(EVALUATIONS.format(rollout=target.rollout)).to_pylist()
    spec = target.spec
    parts = [
        _metadata(spec),
        f"# {markdown_cell(target.folder.name)}, after {target.rollout} rollouts",
        f"{markdown_cell(_base(spec))}, trained by reinforcement learning with verifiable rewards (GRPO) with clipctl "
        f"{__version__}.",
        _table(("", ""), _settings(target)),
        "## Measured in training",
        _measured(rollouts),
        "## Evaluations",
        _evaluations(evaluations),
        "## Use",
        _fenced(_USE, "python"),
        "Prompts are one user message in the tokenizer's chat template; the generation configuration names the tokens that end "
        "a response.",
        "## Spec",
        _fenced(spec_json(spec), "json"),
    ]
    return "\n\n".join(parts) + "\n"


def evaluations_of(run: Path) -> list[Path]:
    """Folders beside the run in which `clipctl eval` evaluated it."""
    beside = [file.parent for file in sorted(run.resolve().parent.glob("*/spec.json")) if file.parent != run.resolve()]
    looked = [look_at(folder) for folder in beside]
    return [look.path for look in looked if look.is_evaluation and look.spec.get("run") == str(run.resolve())]


def _metadata(spec: RunSpec) -> str:
    """YAML, whose strings may be written as JSON writes them."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "grpo", "rlvr", "clipctl"],
    }
    hub = hub_name(spec.model.path)
    if hub is not None:
        fields["base_model"] = hub
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _base(spec: RunSpec) -> str:
    return hub_name(spec.model.path) or spec.model.path


def _settings(target: Target) -> Iterator[tuple[str, str]]:
    spec = target.spec
    known = next((model for model in MODELS.values() if model.hub == hub_name(spec.model.path)), None)
    yield "Base model", _base(spec)
    if known is not None:
        yield "Licence of the base model", known.licence
    yield "Data", spec.data.path or f"{spec.data.task}, {spec.data.split}"
    yield "Reward", ", ".join(f"{name} = {value}" for name, value in spec.reward.model_dump().items())
    yield "Clipping", f"{_clip('ε_low', spec.clip.low, 1.0)}, {_clip('ε_high', spec.clip.high, float('inf'))}"
    if spec.control.target_entropy is not None:
        yield "Control", f"{spec.control.actuator} moved for an entropy of {spec.control.target_entropy}"
    yield "Loss", f"{spec.loss.objective}, {spec.loss.aggregation}"
    yield (
        "Rollouts",
        f"{target.rollout} of {spec.run.steps}, each {spec.rollout.prompts} prompts × {spec.rollout.group_size} responses of "
        f"up to {spec.rollout.max_response_tokens} tokens at temperature {spec.rollout.temperature:g}",
    )
    yield (
        "Updates",
        f"{spec.updates_per_rollout} a rollout, {spec.optim.responses_per_update} responses each, {spec.optim.optimizer}, "
        f"learning rate {spec.optim.lr:g}",
    )
    yield "Precision", spec.model.dtype
    yield "Seed", str(spec.run.seed)


def _clip(name: str, eps: float, off: float) -> str:
    return f"{name} off" if eps == off else f"{name} = {eps:g}"


def _measured(rollouts: Sequence[dict[str, Any]]) -> str:
    """The first rollout and the last one that was trained on; each was sampled before its updates."""
    if not rollouts:
        return "No rollout of the run is stored."
    shown = [rollouts[0], *rollouts[1:][-1:]]
    heads = ("", *(f"rollout {row['rollout']}" for row in shown))
    return _table(heads, ([label, *(row[name] for row in shown)] for name, label in MEASURED.items()))


def _evaluations(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "None."
    heads = ("benchmark", "after rollouts", "problems", "k", "temperature", "top-p", "mean@k", "pass@k")
    return _table(heads, (list(row.values()) for row in rows))


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *([markdown_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fenced(text: str, language: str) -> str:
    """A block of code whose fence is longer than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)"""
