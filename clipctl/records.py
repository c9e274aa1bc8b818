"""What the store keeps of a rollout: sums and counts, as rows. Means are made when they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipctl.engine import Scores, UpdateResult
from clipctl.rollout import Batch, Completion, DrawKey, Problem, Prompt, keyed_rng
from clipctl.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt's samples, scored. rewards_G, advantages_G: float64. outcomes: of the grader, None where ungraded."""

    problem: Problem
    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards_G: NDArray[np.float64]
    advantages_G: NDArray[np.float64]
    outcomes: Sequence[str | None]

    @property
    def has_advantage(self) -> bool:
        return bool((self.advantages_G != 0).any())


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall time of the phases of one rollout."""

    sample: float
    reward: float
    score: float
    update: float

    @property
    def total(self) -> float:
        return self.sample + self.reward + self.score + self.update


def pack(groups: Sequence[Group]) -> Batch:
    """The groups as one batch, in their order."""
    return Batch(
        prompt_ids=[group.prompt.token_ids for group in groups for _ in group.completions],
        response_ids=[completion.token_ids for group in groups for completion in group.completions],
        advantages_R=np.concatenate([group.advantages_G for group in groups]),
        group_size=len(groups[0].completions),
    )


def response_means(values_T: NDArray[np.float64], lengths_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of each response's tokens, [R], from flat values [T]."""
    ends = np.cumsum(lengths_R)
    sums_R = np.add.reduceat(values_T, ends - lengths_R)
    return np.asarray(sums_R / lengths_R)


def rollout_row(
    sampled: Sequence[Group], trained: Sequence[Group], old: Scores | None, refills: int, seconds: Seconds
) -> dict[str, Any]:
    """The `rollouts` row: rewards and lengths over all that was sampled, entropy and mismatch over what was trained."""
    completions = [completion for group in sampled for completion in group.completions]
    outcomes = [outcome for group in sampled for outcome in group.outcomes]
    rewards = np.concatenate([group.rewards_G for group in sampled])
    graded = sum(outcome is not None for outcome in outcomes)
    return {
        "prompts": len(sampled),
        "responses": len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "reward_sum": float(rewards.sum()),
        "reward_sq_sum": float((rewards**2).sum()),
        "graded": graded,
        "correct": outcomes.count("correct") if graded else None,
        "groups_correct": sum("correct" in group.outcomes for group in sampled) if graded else None,
        "no_answer": outcomes.count("no_answer") if graded else None,
        "grader_failures": sum(outcomes.count(kind) for kind in ("timeout", "crash", "too_long")) if graded else None,
        "truncated": sum(completion.finish == "length" for completion in completions),
        "groups_zero_advantage": sum(not group.has_advantage for group in sampled),
        "refills": refills,
        **(UNSCORED if old is None else _scored_sums(trained, old)),
        "seconds_sample": seconds.sample,
        "seconds_reward": seconds.reward,
        "seconds_score": seconds.score,
        "seconds_update": seconds.update,
    }


UNSCORED: dict[str, Any] = {
    "responses_scored": 0,
    "tokens_scored": 0,
    "entropy_response_sum": None,
    "entropy_token_sum": None,
    "mismatch_max": None,
    "mismatch_sum": None,
}
"""The scored columns of a rollout in which dynamic sampling found nothing to train on."""


def _scored_sums(trained: Sequence[Group], old: Scores) -> dict[str, Any]:
    lengths_R = pack(trained).lengths_R
    entropy_T = old.entropy_T.double().numpy()
    sampler_T = np.concatenate([c.logprobs for group in trained for c in group.completions])
    mismatch_T = np.abs(old.logprob_T.double().numpy() - sampler_T)
    return {
        "responses_scored": len(lengths_R),
        "tokens_scored": int(lengths_R.sum()),
        "entropy_response_sum": float(response_means(entropy_T, lengths_R).sum()),
        "entropy_token_sum": float(entropy_T.sum()),
        "mismatch_max": float(mismatch_T.max()),
        "mismatch_sum": float(mismatch_T.sum()),
    }


def update_row(spec: RunSpec, inner_step: int, responses: int, result: UpdateResult) -> dict[str, Any]:
    """One `updates` row."""
    counts = result.sums.counts
    return {
        "inner_step": inner_step,
        "loss": result.sums.loss,
        "grad_norm": result.grad_norm,
        "lr": spec.optim.lr,
        "responses": responses,
        "tokens": int(counts.tokens),
        "tokens_advantage": int(counts.tokens_advantage),
        "eps_low": spec.clip.low,
        "eps_high": spec.clip.high,
        "clip_low": int(counts.clip_low),
        "clip_high": int(counts.clip_high),
        "ratio_low": int(counts.ratio_low),
        "ratio_high": int(counts.ratio_high),
        "ratio_sum": float(counts.ratio_sum),
        "ratio_min": float(counts.ratio_min),
        "ratio_max": float(counts.ratio_max),
        "kl_sum": result.sums.kl,
        "noise_max": result.sums.log_ratio_max if inner_step == 0 else None,
        "entropy_token_sum": result.sums.entropy,
    }


def sample_columns(sampled: Sequence[Group], trained: Sequence[Group], old: Scores | None) -> dict[str, Sequence[Any]]:
    """The `samples` rows, by column. Entropy is NULL for groups that dynamic sampling dropped: they are not scored."""
    entropy: dict[tuple[int, int], float] = {}
    logprob: dict[tuple[int, int], float] = {}
    if old is not None:
        lengths_R = pack(trained).lengths_R
        keys = [(group.prompt.key.position, sample) for group in trained for sample in range(len(group.completions))]
        entropy_R = response_means(old.entropy_T.double().numpy(), lengths_R)
        logprob_R = response_means(old.logprob_T.double().numpy(), lengths_R) * lengths_R
        entropy = dict(zip(keys, entropy_R.tolist(), strict=True))
        logprob = dict(zip(keys, logprob_R.tolist(), strict=True))
    rows = [(group, sample) for group in sampled for sample in range(len(group.completions))]
    places = [(group.prompt.key.position, sample) for group, sample in rows]
    return {
        "prompt_id": [group.problem.id for group, _ in rows],
        "position": [position for position, _ in places],
        "sample": [sample for _, sample in rows],
        "reward": [float(group.rewards_G[sample]) for group, sample in rows],
        "outcome": [group.outcomes[sample] for group, sample in rows],
        "advantage": [float(group.advantages_G[sample]) for group, sample in rows],
        "tokens": [len(group.completions[sample].token_ids) for group, sample in rows],
        "truncated": [group.completions[sample].finish == "length" for group, sample in rows],
        "entropy": [entropy.get(place) for place in places],
        "logprob_sum": [logprob.get(place) for place in places],
        "text": [group.texts[sample] for group, sample in rows],
    }


def _is_kept(key: DrawKey, share: str | float) -> bool:
    """The same groups in every arm and after a resume, and those of a smaller share among those of a larger one."""
    return share == "all" or bool(keyed_rng(key.seed, "tokens", key.rollout, key.position).random() < float(share))


def token_columns(
    trained: Sequence[Group], old: Scores | None, share: str | float
) -> Mapping[str, Sequence[Any]] | None:
    """The `tokens` rows, by column, of all trained groups or of an expected share of them, drawn by their keys."""
    if old is None or share == "none":
        return None
    lengths_R = pack(trained).lengths_R
    chosen_R = np.array([_is_kept(group.prompt.key, share) for group in trained for _ in group.completions], dtype=bool)
    rows = [(group, sample) for group in trained for sample in range(len(group.completions))]
    kept = [row for row, chosen in zip(rows, chosen_R, strict=True) if chosen]
    keep_T = np.repeat(chosen_R, lengths_R)
    lengths = lengths_R[chosen_R]
    return {
        "prompt_id": np.repeat(np.array([group.problem.id for group, _ in kept], dtype=object), lengths).tolist(),
        "position": np.repeat([group.prompt.key.position for group, _ in kept], lengths),
        "sample": np.repeat([sample for _, sample in kept], lengths),
        "token": np.concatenate([np.arange(length) for length in lengths]) if kept else np.array([], dtype=np.int64),
        "token_id": np.concatenate([g.completions[s].token_ids for g, s in kept]) if kept else np.array([], np.int64),
        "logprob": old.logprob_T.numpy()[keep_T],
        "entropy": old.entropy_T.numpy()[keep_T],
        "sampler_logprob": np.concatenate([g.completions[s].logprobs for g, s in kept]) if kept else np.array([]),
        "advantage": np.repeat([float(group.advantages_G[sample]) for group, sample in kept], lengths),
    }
