"""The torch engine's sampler: batched decoding that prefills a prompt once for its whole group.

Rows decode side by side at one shared column of the cache (prompts padded on the left), finished rows are taken out,
and a token is the inverse of the cumulative distribution at a uniform number that belongs to (seed, rollout, prompt,
sample, token): any batch composition draws the same token from the same distribution.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipctl.engine.attention import ColumnCache
from clipctl.rollout import Completion, Prompt, SamplingParams, keyed_rng
from clipctl.statistics import float32_logits

COMPACT_AT = 0.75
"""Finished rows are taken out when at most this share of the rows is still alive."""
LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at who has finished, by device: a look makes the host wait for a GPU that has work queued."""
BLOCK = 256
"""Tokens of one block of the two-level inverse of the cumulative distribution."""


class TorchSampler:
    """Samples from `model` (a transformers causal LM), `rows` responses at a time at most."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.rows = rows

    def sample(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams, *, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(place, n completions) of each prompt that is not done, wave by wave, the shortest prompts first."""
        wave = max(1, self.rows // n)
        by_length = sorted(range(len(prompts)), key=lambda at: len(prompts[at].token_ids))
        for start in range(0, len(prompts), wave):
            places = by_length[start : start + wave]
            if all(place in done for place in places):
                continue
            # What is done is decoded again beside the rest of its wave: another wave would round differently.
            self.model.eval()
            groups = self._decode([prompts[place] for place in places], n, params)
            # Blocks of the cache are of sizes that training has no use for; without a GPU this does nothing.
            torch.cuda.empty_cache()
            yield from ((place, group) for place, group in zip(places, groups, strict=True) if place not in done)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copies what is not the same memory; with the torch trainer on one device everything is."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)

    def rest(self) -> None:
        """Nothing to give back: a decoder's memory goes with its wave."""

    def close(self) -> None:
        """Nothing to give back."""

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        device = next(self.model.parameters()).device
        hidden_BD, cache, start_B = self._prefill(prompts, n, params.max_tokens, device)
        uniform_BT = torch.from_numpy(uniform_draws(prompts, n, params.max_tokens)).to(device)
        stop = torch.tensor(sorted(params.stop_ids), device=device)
        rows = len(prompts) * n
        alive_B = torch.arange(rows, device=device)
        tokens_RT = torch.zeros(rows, params.max_tokens, dtype=torch.long, device=device)
        logprobs_RT = torch.zeros(rows, params.max_tokens, device=device)
        lengths_R = torch.full((rows,), params.max_tokens, device=device)
        stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        in_cache_B = alive_B
        look_every = LOOK_EVERY[device.type]
        for step in range(params.max_tokens):
            logits_BV = float32_logits(hidden_BD, self.model.lm_head.weight)
            if params.temperature == 0:
                token_B = logits_BV.argmax(-1)
                logprob_B = torch.zeros_like(token_B, dtype=torch.float32)
            else:
                scaled_BV = logits_BV / params.temperature
                token_B, logprob_B = draw_tokens(scaled_BV, uniform_BT[in_cache_B, step], params.top_p)
            tokens_RT[in_cache_B, step] = token_B
            logprobs_RT[in_cache_B, step] = logprob_B
            ended_B = torch.isin(token_B, stop) & ~stopped_R[in_cache_B]
            stopped_R[in_cache_B] |= ended_B
            lengths_R[in_cache_B] = torch.where(ended_B, step + 1, lengths_R[in_cache_B])
            if step + 1 == params.max_tokens:
                break
            if (step + 1) % look_every == 0:
                going_B = ~stopped_R[in_cache_B]
                going = int(going_B.sum())
                if going == 0:
                    break
                if going <= COMPACT_AT * len(in_cache_B):
                    kept_B = going_B.nonzero().squeeze(1)
                    cache.take(kept_B)
                    in_cache_B, start_B, token_B = in_cache_B[kept_B], start_B[kept_B], token_B[kept_B]
            hidden_BD = self._forward(token_B[:, None], start_B, cache)
        return _completions(tokens_RT, logprobs_RT, lengths_R, stopped_R, n)

    def _prefill(
        self, prompts: Sequence[Prompt], n: int, max_tokens: int, device: torch.device
    ) -> tuple[Tensor, ColumnCache, Tensor]:
        """The last hidden state of each prompt, once per group, then repeated for the group's n rows."""
        columns = max(len(prompt.token_ids) for prompt in prompts)
        ids_PC = torch.zeros(len(prompts), columns, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_PC[row, columns - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        start_P = torch.tensor([columns - len(prompt.token_ids) for prompt in prompts], device=device)
        cache = ColumnCache(self.model.config.num_hidden_layers, columns + max_tokens)
        hidden_PD = self._forward(ids_PC.to(device), start_P, cache)
        repeat_B = torch.arange(len(prompts), device=device).repeat_interleave(n)
        cache.take(repeat_B)
        return hidden_PD[repeat_B], cache, start_P[repeat_B]

    def _forward(self, ids_BQ: Tensor, start_B: Tensor, cache: ColumnCache) -> Tensor:
        """Final hidden state of the last position, [B,D]; row b's text begins at column start_B[b]."""
        done, positions = cache.get_seq_length(), ids_BQ.shape[1]
        column_Q = torch.arange(done, done + positions, device=ids_BQ.device)
        column_C = torch.arange(done + positions, device=ids_BQ.device)
        causal_QC = column_C[None, :] <= column_Q[:, None]
        text_B1C = (column_C[None, :] >= start_B[:, None])[:, None]
        # A padded query sees itself: with nothing to see it would be NaN, and NaN values reach other rows' sums.
        itself_QC = column_C[None, :] == column_Q[:, None]
        mask_B1QC = ((causal_QC & text_B1C) | itself_QC)[:, None]
        output = self.model.model(
            input_ids=ids_BQ,
            attention_mask=mask_B1QC,
            position_ids=(column_Q[None, :] - start_B[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        hidden_BD: Tensor = output.last_hidden_state[:, -1]
        return hidden_BD


def uniform_draws(prompts: Sequence[Prompt], n: int, max_tokens: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [P·n, T], each keyed by (seed, rollout, position, sample, token)."""
    keys = [(prompt.key, sample) for prompt in prompts for sample in range(n)]
    return np.stack(
        [keyed_rng(key.seed, "sample", key.rollout, key.position, sample).random(max_tokens) for key, sample in keys]
    )


def draw_tokens(logits_BV: Tensor, uniform_B: Tensor, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability (nats), under softmax(logits) cut to the nucleus top_p.

    Two levels of float64 sums (blocks, then tokens of one block), since a float32 cumulative sum over 150 000 tokens
    loses what the small probabilities add.
    """
    logprob_BV = torch.log_softmax(logits_BV, dim=-1)
    if top_p < 1.0:
        logprob_BV = torch.log_softmax(nucleus(logprob_BV, top_p), dim=-1)
    probability_BV = logprob_BV.exp()
    rows, vocabulary = probability_BV.shape
    blocks = -(-vocabulary // BLOCK)
    padded = torch.nn.functional.pad(probability_BV, (0, blocks * BLOCK - vocabulary))
    block_sum_BN = padded.view(rows, blocks, BLOCK).sum(-1, dtype=torch.float64)
    block_B, rest_B = _invert(block_sum_BN, uniform_B)
    inside_BK = padded.view(rows, blocks, BLOCK)[torch.arange(rows, device=padded.device), block_B].double()
    inside_B, _ = _invert(inside_BK, rest_B)
    token_B = block_B * BLOCK + inside_B
    return token_B, logprob_BV.gather(1, token_B[:, None]).squeeze(1)


def nucleus(logprob_BV: Tensor, top_p: float) -> Tensor:
    """Log-probabilities with -inf outside the smallest set of tokens whose probability reaches top_p."""
    ordered_BV, order_BV = logprob_BV.sort(dim=-1, descending=True)
    before_BV = ordered_BV.double().exp().cumsum(-1) - ordered_BV.double().exp()
    kept_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV < top_p)
    return logprob_BV.masked_fill(~kept_BV, -torch.inf)


def _invert(weight_BN: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the weight at the fraction `uniform_B` of each row's sum, and the fraction left inside it.

    The index always has a weight above 0: rounding at the end of a row ends at its last such weight.
    """
    cumulative_BN = weight_BN.cumsum(-1)
    target_B = uniform_B * cumulative_BN[:, -1]
    last_B = (weight_BN > 0).long().cumsum(-1).argmax(-1)
    index_B = torch.minimum(torch.searchsorted(cumulative_BN, target_B[:, None], right=True).squeeze(1), last_B)
    weight_B = weight_BN.gather(1, index_B[:, None]).squeeze(1)
    before_B = cumulative_BN.gather(1, index_B[:, None]).squeeze(1) - weight_B
    return index_B, ((target_B - before_B) / weight_B).clamp(0.0, 1.0)


def _completions(
    tokens_RT: Tensor, logprobs_RT: Tensor, lengths_R: Tensor, stopped_R: Tensor, n: int
) -> list[list[Completion]]:
    tokens, logprobs = tokens_RT.tolist(), logprobs_RT.tolist()
    lengths, stopped = lengths_R.tolist(), stopped_R.tolist()
    flat = [
        Completion(tokens[row][: lengths[row]], logprobs[row][: lengths[row]], "stop" if stopped[row] else "length")
        for row in range(len(lengths))
    ]
    return [flat[at : at + n] for at in range(0, len(flat), n)]
