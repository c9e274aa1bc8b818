"""What the store keeps of a rollout: sums and counts, as rows. Means are made when they are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipctl.alarms import RolloutFacts
from clipctl.engine import ProbeResult, Scores
from clipctl.ledger import EntropyLedger, ratio_events
from clipctl.loss import PolicyLoss, UpdateSums
from clipctl.rollout import Batch, Completion, DrawKey, Problem, Prompt, keyed_rng
from clipctl.schema import MASSES, NETWORK
from clipctl.spec import RunSpec

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
"""Values of a table by column."""


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


def mean_entropy(trained: Sequence[Group], old: Scores) -> float:
    """Eq. 4: the mean over responses of the mean over their tokens, nats."""
    return float(response_means(old.entropy_T.double().numpy(), pack(trained).lengths_R).mean())


def rollout_row(
    sampled: Sequence[Group],
    trained: Sequence[Group],
    old: Scores | None,
    loss: PolicyLoss,
    refills: int,
    seconds: Seconds,
) -> dict[str, Any]:
    """The `rollouts` row: rewards and lengths over all that was sampled, entropy and mismatch over what was trained. loss: of
    the rollout's updates."""
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
        **(UNSCORED if old is None else _scored_sums(trained, old, loss)),
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
    "mismatch_outside": None,
}
"""The scored columns of a rollout in which dynamic sampling found nothing to train on."""


def sampler_logprobs(trained: Sequence[Group]) -> NDArray[np.float64]:
    """Log-probabilities under the sampler of the trained responses' tokens, flat, nats."""
    return np.concatenate([completion.logprobs for group in trained for completion in group.completions])


def _scored_sums(trained: Sequence[Group], old: Scores, loss: PolicyLoss) -> dict[str, Any]:
    lengths_R = pack(trained).lengths_R
    entropy_T = old.entropy_T.double().numpy()
    sampler_T = sampler_logprobs(trained)
    mismatch_T = np.abs(old.logprob_T.double().numpy() - sampler_T)
    x_T, y_T = ratio_events(old.logprob_T, torch.from_numpy(sampler_T), loss.eps_low, loss.eps_high)
    return {
        "responses_scored": len(lengths_R),
        "tokens_scored": int(lengths_R.sum()),
        "entropy_response_sum": float(response_means(entropy_T, lengths_R).sum()),
        "entropy_token_sum": float(entropy_T.sum()),
        "mismatch_max": float(mismatch_T.max()),
        "mismatch_sum": float(mismatch_T.sum()),
        "mismatch_outside": int((x_T | y_T).sum()),
    }


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step as it is stored: its responses, the ε in force, the sums over its tokens, its probe, and which of
    its tokens were clipped, low and high (bool [2,T])."""

    rows: range
    loss: PolicyLoss
    grad_norm: float
    sums: UpdateSums
    probe: ProbeResult | None
    clipped_2T: Tensor


def update_columns(updates: Sequence[Update], lr: float) -> Columns:
    """The `updates` rows, by column."""
    return _by_column([update_row(step, update, lr) for step, update in enumerate(updates)])


def update_row(inner_step: int, update: Update, lr: float) -> dict[str, Any]:
    """One `updates` row."""
    sums = update.sums
    counts, ledger = sums.counts, sums.ledger
    return {
        "inner_step": inner_step,
        "loss": sums.loss,
        "grad_norm": update.grad_norm,
        "lr": lr,
        "responses": len(update.rows),
        "tokens": counts.tokens,
        "tokens_advantage": counts.tokens_advantage,
        "eps_low": update.loss.eps_low,
        "eps_high": update.loss.eps_high,
        "clip_low": counts.clip_low,
        "clip_high": counts.clip_high,
        "ratio_low": counts.ratio_low,
        "ratio_high": counts.ratio_high,
        "ratio_sum": sums.ratio,
        "ratio_min": float(np.exp(sums.log_ratio_min)),
        "ratio_max": float(np.exp(sums.log_ratio_max)),
        "kl_sum": sums.kl,
        "noise_max": max(-sums.log_ratio_min, sums.log_ratio_max) if inner_step == 0 else None,
        "entropy_token_sum": sums.entropy,
        **{f"pg_{name}": getattr(ledger.pg, name) for name in ("reward", "clip_low", "clip_high")},
        **{f"npg_{name}": getattr(ledger.npg, name) for name in ("reward", "clip_low", "clip_high")},
        **_masses(ledger),
    }


def _masses(ledger: EntropyLedger, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}": getattr(ledger, name) for name in MASSES}


def histogram_columns(updates: Sequence[Update]) -> Columns:
    """The `histograms` rows of all updates, by column; bins without a token have none."""
    parts = [update.sums.profile.columns() for update in updates]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    sizes = [len(part["tokens"]) for part in parts]
    return {"inner_step": np.repeat(np.arange(len(parts)), sizes), **columns}


def probe_columns(updates: Sequence[Update]) -> Columns:
    """The `probes` rows, by column: one for each update that was probed."""
    rows = [(step, update.probe) for step, update in enumerate(updates) if update.probe is not None]
    return _by_column(
        [
            {
                "inner_step": step,
                "states": probe.states,
                "entropy_before_sum": probe.entropy_before,
                "entropy_after_sum": probe.entropy_after,
                **_masses(probe.exact, "exact_"),
                **_masses(probe.sampled, "sampled_"),
                **{f"network_{name}": (probe.network or {}).get(name) for name in NETWORK},
            }
            for step, probe in rows
        ]
    )


QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


def noise_columns(log_ratios: Mapping[str, NDArray[np.float64]]) -> Columns:
    """The `noise` rows, by column: quantiles of log r and of |log r| for each source of noise."""
    return _by_column(
        [
            {
                "source": source,
                "quantile": quantile,
                "log_ratio": float(np.quantile(values_T, quantile)),
                "abs_log_ratio": float(np.quantile(np.abs(values_T), quantile)),
            }
            for source, values_T in log_ratios.items()
            for quantile in QUANTILES
        ]
    )


def token_clips(lengths_R: NDArray[np.int64], updates: Sequence[Update]) -> NDArray[np.int32]:
    """How often each trained token was clipped over the updates of its rollout: clip-low and clip-high, [2,T]."""
    starts = np.concatenate([[0], np.cumsum(lengths_R)])
    counts_2T = np.zeros((2, int(starts[-1])), dtype=np.int32)
    for update in updates:
        counts_2T[:, starts[update.rows.start] : starts[update.rows.stop]] += update.clipped_2T.cpu().numpy()
    return counts_2T


def rollout_tables(
    spec: RunSpec,
    sampled: Sequence[Group],
    trained: Sequence[Group],
    old: Scores | None,
    updates: Sequence[Update],
    token_texts: Callable[[Sequence[Sequence[int]]], list[list[str]]],
) -> dict[str, Columns]:
    """Everything but the `rollouts` row that the store keeps of a rollout: table → column → values.

    token_texts: of the token ids of some responses.
    """
    clips_2T = None if old is None else token_clips(pack(trained).lengths_R, updates)
    samples = sample_columns(sampled, trained, old, clips_2T)
    texts = {name: samples[name] for name in ("position", "sample", "text")}
    tables: dict[str, Columns | None] = {
        "updates": update_columns(updates, spec.optim.lr),
        "histograms": histogram_columns(updates),
        "probes": probe_columns(updates),
        "samples": {name: values for name, values in samples.items() if name != "text"},
        "questions": question_columns(sampled) if spec.store.texts else None,
        "texts": texts if spec.store.texts else None,
        "tokens": token_columns(trained, old, clips_2T, spec.store.tokens, token_texts),
    }
    return {table: columns for table, columns in tables.items() if columns and len(next(iter(columns.values())))}


def rollout_facts(rollout: int, row: Mapping[str, Any], updates: Sequence[Update], spec: RunSpec) -> RolloutFacts:
    """What alarms look at."""
    counts = [update.sums.counts for update in updates]
    loss = updates[-1].loss if updates else None
    on = loss is not None and (loss.eps_low < 1 or loss.eps_high < float("inf"))
    return RolloutFacts(
        rollout=rollout,
        entropy=row["entropy_response_sum"] / row["responses_scored"] if row["responses_scored"] else None,
        groups=row["prompts"],
        groups_zero_advantage=row["groups_zero_advantage"],
        clipped=sum(count.clip_low + count.clip_high for count in counts),
        clippable=on and sum(count.tokens_advantage > 0 for count in counts) > 1 and spec.loss.objective == "clip",
        **{name: sum(getattr(update.sums.ledger, name) for update in updates) for name in MASSES},
    )


def _by_column(rows: Sequence[Mapping[str, Any]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def question_columns(sampled: Sequence[Group]) -> Columns:
    """The `questions` rows, by column: what was asked, as the task words it, and the answer that it knows."""
    return {
        "position": [group.prompt.key.position for group in sampled],
        "prompt_id": [group.problem.id for group in sampled],
        "question": [group.problem.question for group in sampled],
        "answer": [group.problem.answer for group in sampled],
    }


def sample_columns(
    sampled: Sequence[Group], trained: Sequence[Group], old: Scores | None, clips_2T: NDArray[np.int32] | None
) -> dict[str, Sequence[Any]]:
    """The `samples` rows, by column. Entropy and clips are NULL for groups that dynamic sampling dropped: they are neither
    scored nor trained on."""
    entropy: dict[tuple[int, int], float] = {}
    logprob: dict[tuple[int, int], float] = {}
    clips: dict[tuple[int, int], list[int]] = {}
    if old is not None and clips_2T is not None:
        lengths_R = pack(trained).lengths_R
        keys = [(group.prompt.key.position, sample) for group in trained for sample in range(len(group.completions))]
        entropy_R = response_means(old.entropy_T.double().numpy(), lengths_R)
        logprob_R = response_means(old.logprob_T.double().numpy(), lengths_R) * lengths_R
        entropy = dict(zip(keys, entropy_R.tolist(), strict=True))
        logprob = dict(zip(keys, logprob_R.tolist(), strict=True))
        clips_2R = np.add.reduceat(clips_2T, np.cumsum(lengths_R) - lengths_R, axis=1)
        clips = dict(zip(keys, clips_2R.T.tolist(), strict=True))
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
        "clip_low": [clips[place][0] if place in clips else None for place in places],
        "clip_high": [clips[place][1] if place in clips else None for place in places],
        "text": [group.texts[sample] for group, sample in rows],
    }


def _is_kept(key: DrawKey, share: str | float) -> bool:
    """The same groups in every arm and after a resume, and those of a smaller share among those of a larger one."""
    return share == "all" or bool(keyed_rng(key.seed, "tokens", key.rollout, key.position).random() < float(share))


def token_columns(
    trained: Sequence[Group],
    old: Scores | None,
    clips_2T: NDArray[np.int32] | None,
    share: str | float,
    token_texts: Callable[[Sequence[Sequence[int]]], list[list[str]]],
) -> Columns | None:
    """The `tokens` rows, by column, of all trained groups or of an expected share of them, drawn by their keys."""
    if old is None or clips_2T is None or share == "none":
        return None
    lengths_R = pack(trained).lengths_R
    chosen_R = np.array([_is_kept(group.prompt.key, share) for group in trained for _ in group.completions], dtype=bool)
    rows = [(group, sample) for group in trained for sample in range(len(group.completions))]
    kept = [row for row, chosen in zip(rows, chosen_R, strict=True) if chosen]
    keep_T = np.repeat(chosen_R, lengths_R)
    lengths = lengths_R[chosen_R]
    responses = [group.completions[sample].token_ids for group, sample in kept]
    return {
        "prompt_id": np.repeat(np.array([group.problem.id for group, _ in kept], dtype=object), lengths).tolist(),
        "position": np.repeat([group.prompt.key.position for group, _ in kept], lengths),
        "sample": np.repeat([sample for _, sample in kept], lengths),
        "token": np.concatenate([np.arange(length) for length in lengths]) if kept else np.array([], dtype=np.int64),
        "token_id": np.array([token_id for ids in responses for token_id in ids], dtype=np.int64),
        "logprob": old.logprob_T.numpy()[keep_T],
        "entropy": old.entropy_T.numpy()[keep_T],
        "sampler_logprob": np.concatenate([g.completions[s].logprobs for g, s in kept]) if kept else np.array([]),
        "advantage": np.repeat([float(group.advantages_G[sample]) for group, sample in kept], lengths),
        "clip_low": clips_2T[0, keep_T],
        "clip_high": clips_2T[1, keep_T],
        "text": [text for texts in token_texts(responses) for text in texts],
    }
