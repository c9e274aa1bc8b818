"""What a rollout is made of, and the draws and layouts that must not depend on the order of calls.

Dimension letters, here and everywhere:
    P  prompts of a rollout          G  responses of a group (one prompt)      R  responses, P·G, group by group
    T  response tokens, of all responses one after the other ("flat")          B  rows of a micro-batch
    S  padded length of a micro-batch (prompt and response)                    V  vocabulary      D  hidden size

A mask is always made from lengths (prompt, response), never from token ids: an EOS that was sampled counts, what is
padded after it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a task. `question` is the text as the prompt template has it, `answer` the gold answer as graded."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response: its token ids (with the stop token, if one was sampled), their log-probabilities under the
    sampler (nats), and why it ended."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `stop_ids` end a response and are part of it; at temperature 0 the likeliest token is taken."""

    max_tokens: int
    temperature: float
    top_p: float
    stop_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class DrawKey:
    """What a prompt's samples are keyed by, so that any order, arm or number of ranks draws the same."""

    seed: int
    rollout: int
    position: int
    """Place of the prompt in the run's prompt stream."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt drawn for a rollout: its token ids and what its samples are keyed by."""

    token_ids: list[int]
    key: DrawKey


@dataclass(frozen=True, slots=True)
class Batch:
    """R responses, group by group, as the trainer takes them.

    prompt_ids, response_ids: R lists of token ids. advantages_R: float64. group_size: G.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    advantages_R: NDArray[np.float64]
    group_size: int

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) == len(self.response_ids) == len(self.advantages_R)
        assert len(self.prompt_ids) % self.group_size == 0

    @property
    def responses(self) -> int:
        return len(self.response_ids)

    @property
    def lengths_R(self) -> NDArray[np.int64]:
        """Response lengths in tokens."""
        return np.array([len(ids) for ids in self.response_ids], dtype=np.int64)


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone (Philox, keyed by a hash of `key`)."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def stream_indices(problems: int, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Rows `start … start+count` of the prompt stream: permutations of all problems, one after the other.

    A pure function of the position, so a resumed run and another arm of a sweep see the same prompts.
    """
    first, last = start // problems, (start + count - 1) // problems
    passes = [keyed_rng(seed, "prompts", epoch).permutation(problems) for epoch in range(first, last + 1)]
    offset = start - first * problems
    return np.concatenate(passes)[offset : offset + count]


def minibatches(responses: int, responses_per_update: int) -> list[range]:
    """The responses of each update of one epoch, whole groups in the order in which they were drawn."""
    return [range(at, min(at + responses_per_update, responses)) for at in range(0, responses, responses_per_update)]


def microbatches(
    lengths: Sequence[int], rows: Sequence[int], tokens_per_microbatch: int, at_least: int = 1
) -> list[list[int]]:
    """`rows` cut into micro-batches of at most `tokens_per_microbatch` padded tokens, sorted by length.

    lengths: prompt + response tokens of every response; rows: the ones to lay out. A row that alone is longer gets a
    micro-batch of its own. The layout is a function of lengths alone, so scoring and updates share it exactly.
    at_least: where there are fewer micro-batches than so many (ranks), the budget is the smallest one that needs no more of
    them, so that the largest is as small as it can be; any number of ranks that is no larger sees one and the same layout.
    """
    layout = _packed(lengths, rows, tokens_per_microbatch)
    if len(layout) >= min(at_least, len(rows)):
        return layout
    low, high = 0, max(len(part) * lengths[part[0]] for part in layout)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_packed(lengths, rows, middle)) <= at_least else (middle, high)
    return _packed(lengths, rows, high)


def divide(parts: Sequence[Sequence[int]], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the micro-batches `parts` each rank takes: their places, by rank, in the order of `parts`.

    Longest processing time first (Graham 1969), by padded tokens, with at most ⌈parts/ranks⌉ a rank, so that numbers differ as
    little as they can: where each pass is a collective operation (ZeRO-3), `in_step` makes them equal.
    """
    most = -(-len(parts) // ranks)
    sizes = [len(part) * max(lengths[row] for row in part) for part in parts]
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(parts)), key=lambda place: -sizes[place]):
        rank = min((rank for rank in range(ranks) if len(taken[rank]) < most), key=lambda rank: (loads[rank], rank))
        taken[rank].append(place)
        loads[rank] += sizes[place]
    return [sorted(places) for places in taken]


def in_step(divided: Sequence[Sequence[int]]) -> list[list[tuple[int, bool]]]:
    """The places of `divide` with as many for each rank: (place, whether it counts). A rank with too few does its last one
    again, or the first one of all, with weight zero."""
    most = max(map(len, divided), default=0)
    return [
        [(place, True) for place in places] + [(places[-1] if places else 0, False)] * (most - len(places))
        for places in divided
    ]


def _packed(lengths: Sequence[int], rows: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    layout: list[list[int]] = []
    for row in reversed(ordered):
        if layout and (len(layout[-1]) + 1) * lengths[layout[-1][0]] <= tokens_per_microbatch:
            layout[-1].append(row)
        else:
            layout.append([row])
    return layout


def spread_states(lengths_R: NDArray[np.int64], states: int, key: DrawKey) -> list[tuple[int, int]]:
    """(response, token) of `states` tokens, or of all where there are fewer, spread over the responses, sorted.

    Round after round every response, in an order drawn by the key, gives one token of its own that it has not given
    yet; so no response gives two tokens while another one with tokens left has given none.
    """
    rng = keyed_rng(key.seed, "probe", key.rollout, key.position)
    order_R = rng.permutation(len(lengths_R))
    turns = [
        (turn, place, token)
        for place, row in enumerate(order_R)
        for turn, token in enumerate(rng.permutation(lengths_R[row]))
    ]
    return sorted((int(order_R[place]), int(token)) for _, place, token in sorted(turns)[:states])
