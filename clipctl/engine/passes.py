"""What every trainer does with an optimizer batch: its micro-batches, their places among its tokens, their shares of the loss.

Responses are padded on the right under causal attention, so no padded token is ever seen by a real one. Responses without
advantage have no gradient: they are only scored, in micro-batches of their own, so that every metric still counts them.

Ranks divide the micro-batches of one layout. Statistics of a token come from the one rank that had it: the others have 0 there,
and what is summed over ranks has them all, with the bits of that rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipctl.algo import loss_weights
from clipctl.engine import Scores
from clipctl.errors import DivergedError
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.ranks import ALONE, Ranks
from clipctl.rollout import Batch, divide, in_step, microbatches, minibatches
from clipctl.spec import Engine, RunSpec
from clipctl.statistics import TokenStatistics

Forward = Callable[[Batch, Sequence[int]], TokenStatistics]
"""(batch, rows) -> statistics of the response tokens of the rows, flat in their order."""


def set_up_torch(engine: Engine) -> None:
    """Threads as the spec says, true float32 in float32 products, attention without cuDNN, which plans every new shape for a
    tenth of a second, and each step of decoding has a new one."""
    torch.set_num_threads(engine.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True, slots=True)
class Pass:
    """One micro-batch on this rank: its place in the layout and its rows; live: with gradient. One that does not count only
    keeps the ranks in step; what it finds is dropped."""

    place: int
    part: list[int]
    live: bool
    counts: bool


def layout(batch: Batch, rows: range, tokens_per_microbatch: int, ranks: Ranks) -> list[tuple[list[int], bool]]:
    """Micro-batches of the responses with advantage (True), then of those without (False), of all ranks."""
    lengths = lengths_of(batch)
    return [
        (part, live)
        for live in (True, False)
        for part in microbatches(
            lengths,
            [row for row in rows if (batch.advantages_R[row] != 0) == live],
            tokens_per_microbatch,
            ranks.size,
        )
    ]


def my_passes(
    batch: Batch, parts: Sequence[tuple[list[int], bool]], ranks: Ranks, *, together: bool = False
) -> list[Pass]:
    """This rank's micro-batches of a layout. Those with advantage, which cost three times as much, are divided by themselves.

    together: as many of each kind for every rank, because each forward and backward pass is an operation of all ranks.
    """
    lengths, mine = lengths_of(batch), []
    for kind in (True, False):
        places = [place for place, (_, live) in enumerate(parts) if live == kind]
        divided = divide([parts[place][0] for place in places], lengths, ranks.size)
        taken = in_step(divided) if together else [[(at, True) for at in rank] for rank in divided]
        mine += [Pass(places[at], *parts[places[at]], counts) for at, counts in taken[ranks.rank]]
    return mine


def lengths_of(batch: Batch) -> list[int]:
    """Tokens of prompt and response together."""
    return [len(prompt) + len(response) for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True)]


def score_batch(
    batch: Batch, spec: RunSpec, forward: Forward, ranks: Ranks = ALONE, *, together: bool = False
) -> Scores:
    """Log-probs and entropies of the batch, in the micro-batches in which its updates will run.

    Raises DivergedError where one is not finite.
    """
    ends = np.cumsum(batch.lengths_R)
    found_2T = torch.zeros(2, int(ends[-1]))
    scored: list[tuple[Tensor, TokenStatistics]] = []
    for rows in minibatches(batch.responses, spec.optim.responses_per_update):
        parts = layout(batch, rows, spec.engine.tokens_per_microbatch, ranks)
        for mine in my_passes(batch, parts, ranks, together=together):
            with torch.no_grad():
                statistics = forward(batch, mine.part)
            if mine.counts:
                scored.append((flat_places(ends, batch.lengths_R, mine.part), statistics))
    # Fetched when all is queued: a fetch makes the host wait for a GPU.
    for at_T, statistics in scored:
        found_2T[0, at_T], found_2T[1, at_T] = statistics.logprob_T.cpu(), statistics.entropy_T.cpu()
    ranks.sum(found_2T)
    if not bool(torch.isfinite(found_2T).all()):
        raise DivergedError("a log-probability or entropy of this rollout is not finite; the policy is broken")
    return Scores(found_2T[0], found_2T[1])


def score_otherwise(
    batch: Batch,
    rows: range,
    tokens_per_microbatch: int,
    forward: Forward,
    ranks: Ranks = ALONE,
    *,
    together: bool = False,
) -> Tensor:
    """log π of the rows' tokens, flat, in micro-batches half as large as the largest of `score_batch`, or twice where those
    have one response each."""
    lengths = lengths_of(batch)
    parts = [part for part, _ in layout(batch, rows, tokens_per_microbatch, ranks)]
    largest = max(len(part) * max(lengths[row] for row in part) for part in parts)
    budget = largest // 2 if max(map(len, parts)) > 1 else 2 * largest
    logprob_T = torch.zeros(int(batch.lengths_R[rows.start : rows.stop].sum()))
    otherwise = [(part, False) for part in microbatches(lengths, rows, budget)]
    for mine in my_passes(batch, otherwise, ranks, together=together):
        with torch.no_grad():
            statistics = forward(batch, mine.part)
        if mine.counts:
            logprob_T[places_in_update(batch, rows, mine.part)] = statistics.logprob_T.cpu()
    ranks.sum(logprob_T)
    return logprob_T


def sum_statistics(tokens: UpdateTokens, losses: Tensor, ranks: Ranks) -> None:
    """Puts all ranks' statistics of an optimizer batch's tokens, and the losses of all its micro-batches, on each of them."""
    if ranks.size == 1:
        return
    found = (tokens.logprob_T, tokens.entropy_T, tokens.expected_q_T, losses)
    flat = torch.cat(found)
    ranks.sum(flat)
    for kept, summed in zip(found, torch.split(flat, [len(tensor) for tensor in found]), strict=True):
        kept.copy_(summed)


def update_tokens(batch: Batch, rows: range, old: Scores, spec: RunSpec, device: torch.device) -> UpdateTokens:
    """The tokens of an optimizer batch, with room for the statistics that its forward passes will make."""
    lengths_R = torch.from_numpy(batch.lengths_R[rows.start : rows.stop])
    weight_R = loss_weights(lengths_R, spec.loss.aggregation, spec.loss.constant or spec.rollout.max_response_tokens)
    start, size = int(batch.lengths_R[: rows.start].sum()), int(lengths_R.sum())
    advantages_R = torch.from_numpy(batch.advantages_R[rows.start : rows.stop])
    weights_T = weight_R.repeat_interleave(lengths_R)
    if old.importance_T is not None:
        weights_T = weights_T * old.importance_T[start : start + size]
    return UpdateTokens(
        logprob_T=torch.zeros(size, device=device),
        entropy_T=torch.zeros(size, device=device),
        expected_q_T=torch.zeros(size, device=device),
        old_logprob_T=old.logprob_T[start : start + size].to(device),
        advantages_T=advantages_R.repeat_interleave(lengths_R).to(device),
        weights_T=weights_T.to(device),
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
    at_T = queued_copy(places_in_update(batch, rows, part), tokens.logprob_T.device)
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


def queued_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; for a GPU from pinned memory, so that the host goes on while the copy waits its turn."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def flat_places(ends_R: np.ndarray, lengths_R: np.ndarray, part: Sequence[int]) -> Tensor:
    """Places of the rows' tokens in the flat order of the whole batch."""
    return torch.cat([torch.arange(ends_R[row] - lengths_R[row], ends_R[row]) for row in part])
