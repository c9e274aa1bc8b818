"""What every trainer does with an optimizer batch: its micro-batches, their places among its tokens, their shares of the loss.

Responses are padded on the right under causal attention, so no padded token is ever seen by a real one. Responses without
advantage have no gradient: they are only scored, in micro-batches of their own, so that every metric still counts them.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clipctl.algo import loss_weights
from clipctl.engine import Scores
from clipctl.errors import DivergedError
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.rollout import Batch, microbatches, minibatches
from clipctl.spec import Engine, RunSpec
from clipctl.statistics import TokenStatistics

Forward = Callable[[Batch, Sequence[int]], TokenStatistics]
"""(batch, rows) -> statistics of the response tokens of the rows, flat in their order."""


def set_up_torch(engine: Engine) -> None:
    """Threads as the spec says, true float32 in float32 products."""
    torch.set_num_threads(engine.threads)
    torch.set_float32_matmul_precision("highest")


def layout(batch: Batch, rows: range, tokens_per_microbatch: int) -> list[tuple[list[int], bool]]:
    """Micro-batches of the responses with advantage (True), then of those without (False)."""
    lengths = lengths_of(batch)
    return [
        (part, live)
        for live in (True, False)
        for part in microbatches(
            lengths, [row for row in rows if (batch.advantages_R[row] != 0) == live], tokens_per_microbatch
        )
    ]


def lengths_of(batch: Batch) -> list[int]:
    """Tokens of prompt and response together."""
    return [len(prompt) + len(response) for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True)]


def score_batch(batch: Batch, spec: RunSpec, forward: Forward) -> Scores:
    """Log-probs and entropies of the batch, in the micro-batches in which its updates will run.

    Raises DivergedError where one is not finite.
    """
    ends = np.cumsum(batch.lengths_R)
    logprob_T = torch.empty(int(ends[-1]))
    entropy_T = torch.empty(int(ends[-1]))
    for rows in minibatches(batch.responses, spec.optim.responses_per_update):
        for part, _ in layout(batch, rows, spec.engine.tokens_per_microbatch):
            with torch.no_grad():
                statistics = forward(batch, part)
            at_T = flat_places(ends, batch.lengths_R, part)
            logprob_T[at_T] = statistics.logprob_T.cpu()
            entropy_T[at_T] = statistics.entropy_T.cpu()
    if not bool(torch.isfinite(logprob_T).all() and torch.isfinite(entropy_T).all()):
        raise DivergedError("a log-probability or entropy of this rollout is not finite; the policy is broken")
    return Scores(logprob_T, entropy_T)


def score_otherwise(batch: Batch, rows: range, tokens_per_microbatch: int, forward: Forward) -> Tensor:
    """log π of the rows' tokens, flat, in micro-batches half as large as the largest of `score_batch`, or twice where those
    have one response each."""
    lengths = lengths_of(batch)
    parts = [part for part, _ in layout(batch, rows, tokens_per_microbatch)]
    largest = max(len(part) * max(lengths[row] for row in part) for part in parts)
    budget = largest // 2 if max(map(len, parts)) > 1 else 2 * largest
    ends = np.cumsum(batch.lengths_R[rows.start : rows.stop])
    logprob_T = torch.empty(int(ends[-1]))
    for part in microbatches(lengths, rows, budget):
        with torch.no_grad():
            statistics = forward(batch, part)
        local = [row - rows.start for row in part]
        logprob_T[flat_places(ends, batch.lengths_R[rows.start : rows.stop], local)] = statistics.logprob_T.cpu()
    return logprob_T


def update_tokens(batch: Batch, rows: range, old: Scores, spec: RunSpec, device: torch.device) -> UpdateTokens:
    """The tokens of an optimizer batch, with room for the statistics that its forward passes will make."""
    lengths_R = torch.from_numpy(batch.lengths_R[rows.start : rows.stop])
    weight_R = loss_weights(lengths_R, spec.loss.aggregation, spec.loss.constant or spec.rollout.max_response_tokens)
    start, size = int(batch.lengths_R[: rows.start].sum()), int(lengths_R.sum())
    advantages_R = torch.from_numpy(batch.advantages_R[rows.start : rows.stop])
    return UpdateTokens(
        logprob_T=torch.empty(size, device=device),
        entropy_T=torch.empty(size, device=device),
        expected_q_T=torch.empty(size, device=device),
        old_logprob_T=old.logprob_T[start : start + size].to(device),
        advantages_T=advantages_R.repeat_interleave(lengths_R).to(device),
        weights_T=weight_R.repeat_interleave(lengths_R).to(device),
    )


def microbatch_loss(
    batch: Batch,
    rows: range,
    part: Sequence[int],
    tokens: UpdateTokens,
    loss: PolicyLoss,
    live: bool,
    forward: Forward,
) -> Tensor:
    """The share of the loss that one micro-batch has, with a graph where it is live; its statistics go into `tokens`."""
    at_T = places_in_update(batch, rows, part).to(tokens.logprob_T.device)
    with torch.set_grad_enabled(live):
        found = forward(batch, part)
        value = loss(
            found.logprob_T,
            tokens.old_logprob_T[at_T],
            tokens.advantages_T[at_T].float(),
            tokens.weights_T[at_T].float(),
        )
    for kept_T, name in (
        (tokens.logprob_T, "logprob_T"),
        (tokens.entropy_T, "entropy_T"),
        (tokens.expected_q_T, "expected_q_T"),
    ):
        kept_T[at_T] = getattr(found, name).detach()
    return value


def check_finite(loss: float, norm: float) -> None:
    """Raises DivergedError where one of them is not."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise DivergedError(f"the update is not finite: loss {loss}, gradient norm {norm}; the step was not taken")


def padded(batch: Batch, part: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B,S], padded on the right with 0, and the row and column of every response token, each [T]."""
    texts = [batch.prompt_ids[row] + batch.response_ids[row] for row in part]
    ids_BS = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for at, text in enumerate(texts):
        ids_BS[at, : len(text)] = torch.tensor(text)
    starts = [len(batch.prompt_ids[row]) for row in part]
    rows_T = torch.cat(
        [torch.full((len(text) - start,), at) for at, (text, start) in enumerate(zip(texts, starts, strict=True))]
    )
    columns_T = torch.cat([torch.arange(start, len(text)) for text, start in zip(texts, starts, strict=True)])
    return ids_BS, rows_T, columns_T


def places_in_update(batch: Batch, rows: range, part: Sequence[int]) -> Tensor:
    """Places of the tokens of `part` among those of the optimizer batch `rows`."""
    lengths_R = batch.lengths_R[rows.start : rows.stop]
    return flat_places(np.cumsum(lengths_R), lengths_R, [row - rows.start for row in part])


def flat_places(ends_R: np.ndarray, lengths_R: np.ndarray, part: Sequence[int]) -> Tensor:
    """Places of the rows' tokens in the flat order of the whole batch."""
    return torch.cat([torch.arange(ends_R[row] - lengths_R[row], ends_R[row]) for row in part])
