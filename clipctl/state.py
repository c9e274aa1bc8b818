"""What a run carries: from one rollout to the next, and in the middle of one; to files of a checkpoint and back.

Numbers and texts are JSON, which writes floats so that they come back the same; tensors are safetensors. No pickle. Weights
and optimizer are the trainer's and the model's own files. Dimension letters as in `clipctl.rollout`.
"""

import json
import platform
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipctl import __version__
from clipctl.alarms import RolloutFacts
from clipctl.control import ControlState, Profile
from clipctl.engine import ProbeResult, Scores, UpdateResult
from clipctl.ledger import EntropyLedger, RatioProfile, Terms
from clipctl.loss import PolicyLoss, UpdateSums, UpdateTokens
from clipctl.records import Columns, Group, Update, pack
from clipctl.rollout import Batch, Completion, Problem, Prompt

Rng = dict[str, Any]
"""States of the random number generators of python, numpy, torch and every GPU, by name."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Between two rollouts.

    rollout: the next one. position: the next place of the prompt stream. control: of the controller. history: what alarms
    look at. profile: histogram of the ratios of the last rollout that had updates, None while none had. evaluated: rollouts
    before the last evaluation, None without one. rng: of whoever does not draw by keys, such as a reward function of the
    user's.
    """

    rng: Rng
    rollout: int = 0
    position: int = 0
    control: ControlState | None = None
    history: tuple[RolloutFacts, ...] = ()
    profile: Profile | None = None
    evaluated: int | None = None


@dataclass(slots=True)
class OpenRollout:
    """A rollout that was sampled and scored, and whose updates run.

    groups: all that was sampled. trained: those that dynamic sampling kept. next_position: of the prompt stream after them.
    old: the trainer's scores. noise: rows of the `noise` table. control, loss: the controller's state and the ε for these
    updates. done: the updates so far, but for the last ones, whose tokens are waiting to be summed. seconds: of sampling,
    rewards, scoring, and the updates so far.
    """

    groups: list[Group]
    trained: list[Group]
    next_position: int
    refills: int
    old: Scores | None
    noise: Columns | None
    control: ControlState | None
    loss: PolicyLoss
    seconds: list[float]
    done: list[Update] = field(default_factory=list)
    waiting: list[UpdateResult] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """How many there were so far."""
        return len(self.done) + len(self.waiting)


@dataclass(frozen=True)
class SavedState:
    """What `save_state` wrote, before it is put together again."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "state.json").read_bytes())
        return found

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        found: dict[str, Tensor] = load_file(self.folder / "state.safetensors")
        return found


def save_state(
    folder: Path,
    state: RunState,
    rollout: OpenRollout | None,
    rng: Rng,
    events: Sequence[Any],
    data: str,
    processes: int = 1,
) -> None:
    """Writes state.json and state.safetensors. Raises OSError and SafetensorError.

    rollout: the one that is under way. events: what was told since the last one. rng: of now. data: of `digest_of_data`.
    """
    from safetensors.torch import save_file

    tensors = _rng_tensors(rng)
    if state.profile is not None:
        tensors |= {f"profile.{name}": torch.from_numpy(np.array(column)) for name, column in state.profile.items()}
    facts = {
        "rollout": state.rollout,
        "position": state.position,
        "control": _plain(state.control),
        "history": [asdict(row) for row in state.history],
        "python_rng": rng["python"],
        "numpy_rng": [rng["numpy"][0], *rng["numpy"][2:]],
        "data": data,
        "versions": versions(processes),
        "evaluated": state.evaluated,
        "events": list(events),
        "open": None,
    }
    if rollout is not None:
        facts["open"] = _rollout_facts(rollout)
        tensors |= _rollout_tensors(rollout)
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(facts))


def read_run_state(saved: SavedState) -> RunState:
    """The state between rollouts; with a rollout under way, that of its beginning but for the generators."""
    facts = saved.facts
    profile = {
        name.removeprefix("profile."): tensor.numpy()
        for name, tensor in saved.tensors.items()
        if name.startswith("profile.")
    }
    return RunState(
        rng=_read_rng(saved),
        rollout=facts["rollout"],
        position=facts["position"],
        control=_read_control(facts["control"]),
        history=tuple(RolloutFacts(**row) for row in facts["history"]),
        profile=profile or None,
        evaluated=facts["evaluated"],
    )


def read_open_rollout(
    saved: SavedState,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    device: str,
) -> OpenRollout:
    """The rollout that was under way. problems, prompts: those of its places in the prompt stream; texts: of its samples."""
    facts, tensors = saved.facts["open"], saved.tensors
    completions = read_completions(saved)
    groups = [
        Group(
            problems[at],
            prompts[at],
            completions[at],
            list(texts[at]),
            tensors["rewards"][at].numpy(),
            tensors["advantages"][at].numpy(),
            facts["outcomes"][at],
        )
        for at in range(len(prompts))
    ]
    scored = "old.logprob" in tensors
    loss = PolicyLoss(**facts["loss"])
    return OpenRollout(
        groups=groups,
        trained=[groups[at] for at in facts["trained"]],
        next_position=facts["next_position"],
        refills=facts["refills"],
        old=Scores(tensors["old.logprob"], tensors["old.entropy"], tensors.get("old.importance")) if scored else None,
        noise=facts["noise"],
        control=_read_control(facts["control"]),
        loss=loss,
        seconds=facts["seconds"],
        done=_read_done(saved, loss),
        waiting=_read_waiting(saved, device),
    )


def read_completions(saved: SavedState) -> list[list[Completion]]:
    """The samples of the rollout that was under way, by group."""
    facts, tensors = saved.facts["open"], saved.tensors
    lengths = tensors["lengths"].tolist()
    ids = [part.tolist() for part in torch.split(tensors["token_ids"], lengths)]
    logprobs = [part.tolist() for part in torch.split(tensors["sampler_logprobs"], lengths)]
    flat = [Completion(*parts) for parts in zip(ids, logprobs, facts["finish"], strict=True)]
    size = len(flat) // len(facts["outcomes"])
    return [flat[at : at + size] for at in range(0, len(flat), size)]


def batch_of(rollout: OpenRollout) -> Batch | None:
    """What the updates run on; None where dynamic sampling left nothing."""
    return pack(rollout.trained) if rollout.trained else None


def digest_of_data(problems: Sequence[Problem], prompt_ids: Sequence[Sequence[int]]) -> str:
    """Names the rows, the template and the tokenizer together: with others, the place in the prompt stream means nothing."""
    digest = blake2b(digest_size=16)
    for problem, ids in zip(problems, prompt_ids, strict=True):
        digest.update(json.dumps([problem.id, problem.question, problem.answer, list(ids)]).encode())
    return digest.hexdigest()


def versions(processes: int = 1) -> dict[str, str]:
    """What bit-exactness depends on beside the spec."""
    return {
        "clipctl": __version__, "torch": torch.__version__, "numpy": np.__version__, "machine": platform.machine(),
        "processes": str(processes),
    }  # fmt: skip


# --- random number generators -----------------------------------------------------------------------------------------


def rng_state() -> Rng:
    """The generators as they are now."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_rng(seed: int) -> None:
    """The generators of a new run: nothing of clipctl draws from them, but a reward function of the user's own may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_rng_state(rng: Rng) -> None:
    """The inverse of `rng_state`. A GPU that was not there keeps its own."""
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _rng_tensors(rng: Rng) -> dict[str, Tensor]:
    return {
        "rng.numpy": torch.from_numpy(np.array(rng["numpy"][1]).astype(np.int64)),
        "rng.torch": rng["torch"],
        **{f"rng.cuda.{device}": state for device, state in enumerate(rng["cuda"])},
    }


def _read_rng(saved: SavedState) -> Rng:
    kind, place, has_gauss, gauss = saved.facts["numpy_rng"]
    keys = saved.tensors["rng.numpy"].numpy().astype(np.uint32)
    devices = sum(name.startswith("rng.cuda.") for name in saved.tensors)
    return {
        "python": saved.facts["python_rng"],
        "numpy": (kind, keys, place, has_gauss, gauss),
        "torch": saved.tensors["rng.torch"],
        "cuda": [saved.tensors[f"rng.cuda.{device}"] for device in range(devices)],
    }


# --- a rollout under way ----------------------------------------------------------------------------------------------


def _rollout_facts(rollout: OpenRollout) -> dict[str, Any]:
    completions = [completion for group in rollout.groups for completion in group.completions]
    kept = {id(group) for group in rollout.trained}
    return {
        "next_position": rollout.next_position,
        "refills": rollout.refills,
        "trained": [at for at, group in enumerate(rollout.groups) if id(group) in kept],
        "finish": [completion.finish for completion in completions],
        "outcomes": [list(group.outcomes) for group in rollout.groups],
        "noise": None if rollout.noise is None else {name: list(values) for name, values in rollout.noise.items()},
        "control": _plain(rollout.control),
        "loss": asdict(rollout.loss),
        "seconds": rollout.seconds,
        "done": [_update_facts(done) for done in rollout.done],
        "waiting": [
            {"grad_norm": result.grad_norm, "loss": result.loss, "probe": _plain(result.probe)}
            for result in rollout.waiting
        ],
    }


def _rollout_tensors(rollout: OpenRollout) -> dict[str, Tensor]:
    completions = [completion for group in rollout.groups for completion in group.completions]
    tensors = {
        "lengths": torch.tensor([len(completion.token_ids) for completion in completions]),
        "token_ids": torch.tensor([token for completion in completions for token in completion.token_ids]),
        "sampler_logprobs": torch.tensor(
            [value for completion in completions for value in completion.logprobs], dtype=torch.float64
        ),
        "rewards": torch.from_numpy(np.stack([group.rewards_G for group in rollout.groups])),
        "advantages": torch.from_numpy(np.stack([group.advantages_G for group in rollout.groups])),
    }
    if rollout.old is not None:
        tensors |= {"old.logprob": rollout.old.logprob_T, "old.entropy": rollout.old.entropy_T}
        if rollout.old.importance_T is not None:
            tensors["old.importance"] = rollout.old.importance_T
    for at, done in enumerate(rollout.done):
        tensors |= {f"done.{at}.clipped": done.clipped_2T, f"done.{at}.profile": done.sums.profile.sums_3BC}
    if rollout.waiting:
        tensors["waiting.tokens"] = torch.tensor([len(result.tokens.logprob_T) for result in rollout.waiting])
        for name in UpdateTokens.__slots__:
            tensors[f"waiting.{name}"] = torch.cat([getattr(result.tokens, name) for result in rollout.waiting])
    return tensors


SCALARS = ("loss", "entropy", "kl", "ratio", "log_ratio_min", "log_ratio_max", "eps_low", "eps_high")
"""Of `UpdateSums`."""


def _update_facts(done: Update) -> dict[str, Any]:
    profile = done.sums.profile
    return {
        "rows": [done.rows.start, done.rows.stop],
        "grad_norm": done.grad_norm,
        "probe": _plain(done.probe),
        "sums": {name: getattr(done.sums, name) for name in SCALARS},
        "edges": [profile.low_edges, profile.high_edges],
    }


def _read_done(saved: SavedState, loss: PolicyLoss) -> list[Update]:
    tensors = saved.tensors
    return [
        Update(
            range(*row["rows"]),
            loss,
            row["grad_norm"],
            UpdateSums(
                **row["sums"],
                profile=RatioProfile(tuple(row["edges"][0]), tuple(row["edges"][1]), tensors[f"done.{at}.profile"]),
            ),
            _read_probe(row["probe"]),
            tensors[f"done.{at}.clipped"],
        )
        for at, row in enumerate(saved.facts["open"]["done"])
    ]


def _read_waiting(saved: SavedState, device: str) -> list[UpdateResult]:
    facts, tensors = saved.facts["open"]["waiting"], saved.tensors
    if not facts:
        return []
    sizes = tensors["waiting.tokens"].tolist()
    columns = [torch.split(tensors[f"waiting.{name}"].to(device), sizes) for name in UpdateTokens.__slots__]
    return [
        UpdateResult(row["grad_norm"], row["loss"], UpdateTokens(*parts), _read_probe(row["probe"]))
        for row, parts in zip(facts, zip(*columns, strict=True), strict=True)
    ]


def _read_probe(row: dict[str, Any] | None) -> ProbeResult | None:
    if row is None:
        return None
    return ProbeResult(**(row | {kind: _read_ledger(row[kind]) for kind in ("exact", "sampled")}))


def _read_ledger(row: dict[str, Any]) -> EntropyLedger:
    return EntropyLedger(**(row | {name: Terms(**row[name]) for name in ("pg", "npg")}))


def _read_control(row: dict[str, Any] | None) -> ControlState | None:
    return None if row is None else ControlState(**(row | {"errors": tuple(row["errors"])}))


def _plain(value: Any) -> Any:
    return None if value is None else asdict(value)
