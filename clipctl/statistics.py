"""Exact statistics of every token in one pass over hidden states and language-model head, without materialised logits.

With z = h·W/τ (float32-accumulated), m its maximum over the vocabulary and ẑ = z - m, four sums

    S1 = Σ e^ẑ    T1 = Σ ẑ e^ẑ    S2 = Σ e^2ẑ    T2 = Σ ẑ e^2ẑ

give everything, and two parts of the vocabulary merge by shifting both to the larger maximum (with δ = m - m_new and
r = e^δ: T1 ← r (T1 + δ S1), S1 ← r S1, T2 ← r² (T2 + δ S2), S2 ← r² S2). Measured against float64 the error is some
1e-6; -Σ p log p in float32 makes 1e-4, and logits rounded to bfloat16 make 0.04 nat in H and 5 % in E[Q].

Dimension letters: T tokens, V vocabulary, D hidden size, B rows. Inside, logits are laid out [V,T]: sums then run over
the leading dimension, which is several times faster for vocabularies of a few dozen tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}
"""Logits of one chunk (tokens × vocabulary), by device: small enough for the cache, large enough for the products."""
CHUNK_VOCABULARY = {"cpu": 2048, "cuda": 8192}
"""Vocabulary of one chunk where there are tokens enough to fill it."""


Kernels = Literal["torch", "triton"]
"""Plain operations on any device, or the kernels of `clipctl.kernels`."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Statistics of each token's distribution π = softmax(z/τ), and of the token drawn from it; float32, nats.

    logprob_T: log π(y), differentiable. entropy_T: H = -Σ π log π over the whole vocabulary, differentiable.
    sum_p2_T: Σ π². sum_p2_logp_T: Σ π² log π. expected_q_T: E_π[Q] = Σ π² (log π + H), with Q(a) = π(a)(log π(a) + H).
    """

    logprob_T: Tensor
    entropy_T: Tensor
    sum_p2_T: Tensor
    sum_p2_logp_T: Tensor
    expected_q_T: Tensor


def token_statistics(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    kernels: Kernels = "torch",
) -> TokenStatistics:
    """log π(y), H, Σπ², Σπ² log π and E[Q] of π = softmax(hidden·headᵀ / temperature), exact over the vocabulary.

    hidden_TD, head_VD: both float32, or both bfloat16 or float16, whose products are accumulated in float32.
    targets_T: int64, 0 ≤ y < V; on a GPU a target outside gives NaN. temperature: above 0, applied once, to the logits.
    kernels: `triton` makes the sums and the logits' gradient in one kernel each (CUDA GPUs), with another rounding.
    Gradients reach hidden and head from logprob_T and entropy_T. The backward pass makes the logits again, chunk by
    chunk; with 16-bit operands dL/dz is rounded to them, as in any 16-bit backward pass, and sums stay float32.
    Raises ValueError for a temperature that is not positive. Sources: Σπ² log π and E[Q], arXiv 2509.26114, Theorem 1;
    chunked statistics, the online softmax of arXiv 1805.02867.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: it must be above 0 and finite")
    assert hidden_TD.ndim == head_VD.ndim == 2
    assert hidden_TD.shape[1] == head_VD.shape[1]
    assert targets_T.shape == hidden_TD.shape[:1]
    assert hidden_TD.dtype == head_VD.dtype != torch.float64, f"{hidden_TD.dtype} hidden, {head_VD.dtype} head"
    found = _Statistics.apply(hidden_TD, head_VD, targets_T.contiguous(), float(temperature), kernels)  # type: ignore[no-untyped-call]
    return TokenStatistics(*found)


def float32_logits(hidden_BD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits [B,V], materialised, in float32 from float32 accumulation, whatever the dtype of the operands."""
    with _exact_products(hidden_BD):
        return _product(_operand(hidden_BD), _operand(head_VD).T)


@dataclass(frozen=True, slots=True)
class _Sums:
    """m, S1, T1, S2, T2 of a part of the vocabulary, and the target's z (NaN where the part has it not); each [T]."""

    max_T: Tensor
    s1_T: Tensor
    t1_T: Tensor
    s2_T: Tensor
    t2_T: Tensor
    target_T: Tensor


class _Context(Protocol):
    """What autograd hands to both passes."""

    temperature: float
    kernels: Kernels
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...


class _Statistics(torch.autograd.Function):
    """The pass with its own gradient, d log π(y)/dz = 1{v=y} - π and dH/dz = -π (log π + H)."""

    @staticmethod
    def forward(
        ctx: _Context, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sums = (_row_sums if kernels == "triton" else _token_sums)(hidden_TD, head_VD, targets_T, temperature)
        log_s1_T = sums.s1_T.log()
        mean_T = sums.t1_T / sums.s1_T
        logprob_T = sums.target_T - sums.max_T - log_s1_T
        entropy_T = log_s1_T - mean_T
        square_T = sums.s1_T * sums.s1_T
        sum_p2_T = sums.s2_T / square_T
        sum_p2_logp_T = (sums.t2_T - sums.s2_T * log_s1_T) / square_T
        expected_q_T = (sums.t2_T - sums.s2_T * mean_T) / square_T
        ctx.temperature, ctx.kernels = temperature, kernels
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, sums.max_T + log_s1_T, entropy_T)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sum_p2_T, sum_p2_logp_T, expected_q_T)
        return logprob_T, entropy_T, sum_p2_T, sum_p2_logp_T, expected_q_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        if (grad_logprob_T is None and grad_entropy_T is None) or not (needs_hidden or needs_head):
            return None, None, None, None, None
        hidden_TD, head_VD, targets_T, lse_T, entropy_T = ctx.saved_tensors
        slope_T = pull_T = None
        offset_T = torch.zeros_like(lse_T)
        if grad_entropy_T is not None:
            slope_T = grad_entropy_T / -ctx.temperature
            offset_T = slope_T * entropy_T
        if grad_logprob_T is not None:
            pull_T = grad_logprob_T / ctx.temperature
            offset_T = offset_T - pull_T
        gradient = _LogitGradient(targets_T, lse_T, slope_T, offset_T, pull_T, ctx.temperature, ctx.kernels)
        return *_backward(hidden_TD, head_VD, gradient, needs_hidden, needs_head), None, None, None


@dataclass(frozen=True, slots=True)
class _LogitGradient:
    """What turns a chunk's logits into the loss's gradient by them: dL/d(h·W) = π (slope · log π + offset), plus pull at the
    target; None is 0. lse_T: the log of Σ e^z. All of every token, [T]."""

    targets_T: Tensor
    lse_T: Tensor
    slope_T: Tensor | None
    offset_T: Tensor
    pull_T: Tensor | None
    temperature: float
    kernels: Kernels

    def __call__(self, head_chunk_VD: Tensor, hidden_chunk_TD: Tensor, at: slice, start: int) -> Tensor:
        """dL/d(h·W) [V,T] of tokens `at` and the vocabulary from `start`, in the operands' dtype."""
        slope_T, pull_T = (None if one_T is None else one_T[at] for one_T in (self.slope_T, self.pull_T))
        if self.kernels == "torch":
            logits_VT = _product(head_chunk_VD, hidden_chunk_TD.T)
            return self._plain(logits_VT, at, start, slope_T, pull_T).to(head_chunk_VD.dtype)
        from clipctl.kernels import logit_gradient

        logits_TV = _product(hidden_chunk_TD, head_chunk_VD.T)
        out_TV = torch.empty_like(logits_TV, dtype=head_chunk_VD.dtype)
        logit_gradient(
            logits_TV, out_TV, self.lse_T[at], slope_T, self.offset_T[at], pull_T, self.targets_T[at], start, self.temperature
        )  # fmt: skip
        return out_TV.T

    def _plain(self, logits_VT: Tensor, at: slice, start: int, slope_T: Tensor | None, pull_T: Tensor | None) -> Tensor:
        """The same by plain operations, in float32; overwrites logits_VT."""
        if self.temperature != 1.0:
            logits_VT /= self.temperature
        logp_VT = logits_VT.sub_(self.lse_T[at])
        probability_VT = logp_VT.exp()
        change_VT = self.offset_T[at] if slope_T is None else logp_VT.mul_(slope_T).add_(self.offset_T[at])
        out_VT = probability_VT.mul_(change_VT)
        if pull_T is not None:
            inside_T, local_1T = _local_targets(self.targets_T[at], start, logits_VT.shape[0])
            out_VT.scatter_(0, local_1T, out_VT.gather(0, local_1T) + torch.where(inside_T, pull_T, 0.0))
        return out_VT


def _token_sums(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float) -> _Sums:
    """The sums of every token over the whole vocabulary; the vocabulary is the outer loop, so that a 16-bit head is
    turned into float32 operands once."""
    vocabulary, tokens = head_VD.shape[0], hidden_TD.shape[0]
    parts, ranges = _chunks(tokens, vocabulary, hidden_TD.device)
    merged: list[_Sums] = []
    with _exact_products(hidden_TD):
        for start, stop in ranges:
            head_chunk_VD = _operand(head_VD[start:stop])
            for index, at in enumerate(parts):
                logits_VT = _product(head_chunk_VD, _operand(hidden_TD[at]).T)
                if temperature != 1.0:
                    logits_VT /= temperature
                sums = _chunk_sums(logits_VT, targets_T[at], start)
                if start == 0:
                    merged.append(sums)
                else:
                    merged[index] = _merge(merged[index], sums)
    if len(merged) == 1:
        return merged[0]
    return _Sums(*(torch.cat([getattr(sums, name) for sums in merged]) for name in _Sums.__slots__))


def _row_sums(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float) -> _Sums:
    """As `_token_sums`, each part's logits read once by one kernel."""
    from clipctl.kernels import LOWEST, SUMS, add_sums

    parts, ranges = _chunks(hidden_TD.shape[0], head_VD.shape[0], hidden_TD.device)
    empty_6 = torch.tensor([LOWEST, *[0.0] * (SUMS - 2), torch.nan], device=hidden_TD.device)
    found = [empty_6[:, None].repeat(1, at.stop - at.start) for at in parts]
    with _exact_products(hidden_TD):
        for start, stop in ranges:
            head_chunk_VD = _operand(head_VD[start:stop])
            for at, sums_6T in zip(parts, found, strict=True):
                logits_TV = _product(_operand(hidden_TD[at]), head_chunk_VD.T)
                add_sums(logits_TV, sums_6T, targets_T[at], start, temperature)
    return _Sums(*torch.cat(found, 1))


def _chunk_sums(logits_VT: Tensor, targets_T: Tensor, start: int) -> _Sums:
    """The sums over one part of the vocabulary, which begins at `start`; overwrites logits_VT."""
    inside_T, local_1T = _local_targets(targets_T, start, logits_VT.shape[0])
    target_T = torch.where(inside_T, logits_VT.gather(0, local_1T)[0], torch.nan)
    max_T = logits_VT.amax(0)
    shifted_VT = logits_VT.sub_(max_T)
    exp_VT = shifted_VT.exp()
    s1_T = exp_VT.sum(0)
    weighted_VT = shifted_VT.mul_(exp_VT)
    t1_T = weighted_VT.sum(0)
    t2_T = weighted_VT.mul_(exp_VT).sum(0)
    s2_T = exp_VT.mul_(exp_VT).sum(0)
    return _Sums(max_T, s1_T, t1_T, s2_T, t2_T, target_T)


def _merge(a: _Sums, b: _Sums) -> _Sums:
    """The sums of two parts of the vocabulary together."""
    max_T = torch.maximum(a.max_T, b.max_T)
    (s1_a, t1_a, s2_a, t2_a), (s1_b, t1_b, s2_b, t2_b) = _shifted(a, max_T), _shifted(b, max_T)
    target_T = torch.where(a.target_T.isnan(), b.target_T, a.target_T)
    return _Sums(max_T, s1_a + s1_b, t1_a + t1_b, s2_a + s2_b, t2_a + t2_b, target_T)


def _shifted(sums: _Sums, max_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S1, T1, S2, T2 relative to another maximum."""
    delta_T = sums.max_T - max_T
    scale_T = delta_T.exp()
    square_T = scale_T * scale_T
    return (
        scale_T * sums.s1_T,
        scale_T * (sums.t1_T + delta_T * sums.s1_T),
        square_T * sums.s2_T,
        square_T * (sums.t2_T + delta_T * sums.s2_T),
    )


def _backward(
    hidden_TD: Tensor, head_VD: Tensor, gradient: _LogitGradient, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and head, summed in float32 and returned in the operands' dtype."""
    parts, ranges = _chunks(hidden_TD.shape[0], head_VD.shape[0], hidden_TD.device)
    grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=torch.float32) if needs_hidden else None
    grad_head_VD = torch.empty_like(head_VD) if needs_head else None
    with _exact_products(hidden_TD):
        for start, stop in ranges:
            head_chunk_VD = _operand(head_VD[start:stop])
            grad_chunk_VD = torch.zeros_like(head_chunk_VD, dtype=torch.float32)
            for at in parts:
                hidden_chunk_TD = _operand(hidden_TD[at])
                out_VT = gradient(head_chunk_VD, hidden_chunk_TD, at, start)
                if grad_hidden_TD is not None:
                    _add_product(grad_hidden_TD[at], out_VT.T, head_chunk_VD)
                if grad_head_VD is not None:
                    _add_product(grad_chunk_VD, out_VT, hidden_chunk_TD)
            if grad_head_VD is not None:
                grad_head_VD[start:stop] = grad_chunk_VD
    return None if grad_hidden_TD is None else grad_hidden_TD.to(hidden_TD.dtype), grad_head_VD


def _chunks(tokens: int, vocabulary: int, device: torch.device) -> tuple[list[slice], list[tuple[int, int]]]:
    """Slices of tokens and ranges of the vocabulary. A function of the shapes alone, so that scoring and updates of the
    same tokens round the same way."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    elements = CHUNK_ELEMENTS[kind]
    columns = min(vocabulary, max(CHUNK_VOCABULARY[kind], elements // max(tokens, 1)))
    rows = max(1, elements // columns)
    parts = [slice(at, min(at + rows, tokens)) for at in range(0, tokens, rows)] or [slice(0, 0)]
    return parts, [(at, min(at + columns, vocabulary)) for at in range(0, vocabulary, columns)]


def _local_targets(targets_T: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the part of the vocabulary from `start`, [T], and their places in it (else any), [1,T]."""
    local_T = targets_T - start
    inside_T = (local_T >= 0) & (local_T < size)
    return inside_T, local_T.clamp(0, size - 1).unsqueeze(0)


def _operand(matrix: Tensor) -> Tensor:
    """What the products take: on the CPU, which has no product of 16-bit matrices into float32, float32 copies."""
    return matrix.float() if matrix.device.type == "cpu" else matrix


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))


@contextmanager
def _exact_products(operand: Tensor) -> Iterator[None]:
    """No TF32 in float32 products; for values that are bfloat16 the CPU's bfloat16 units, whose products are exact and
    whose sums are float32."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision
    if operand.device.type == "cpu":
        cpu.fp32_precision = "bf16" if operand.dtype == torch.bfloat16 else "ieee"
        try:
            yield
        finally:
            cpu.fp32_precision = before
    elif cuda.fp32_precision == "tf32":
        # By torch's older call, which sets what its newer one does too: a product in which the two differ is refused.
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("high")
            cpu.fp32_precision = before
    else:
        yield
