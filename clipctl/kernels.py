"""The statistics' sums and the gradient of the logits as one Triton kernel each: a part's logits are read once, a row by itself.

For CUDA GPUs; where TRITON_INTERPRET=1 is set before the first import, the same kernels run on CPU tensors, slowly. A row's
numbers depend on its own logits and the width of the part alone. Formulas: `clipctl.statistics`.

Dimension letters: T tokens, V the vocabulary of one part. Logits are laid out [T,V] here, a token's in one row.
"""

import triton
import triton.language as tl
from torch import Tensor

SUMS = 6
"""What a row keeps: m, S1, T1, S2, T2, and the target's z."""
BLOCK = 2048
"""Logits that one step of a kernel holds in registers."""
LOWEST = -1e38
"""The maximum of no logits: finite, because -inf times a sum that is 0 would be NaN."""


def add_sums(logits_TV: Tensor, sums_6T: Tensor, targets_T: Tensor, start: int, temperature: float) -> None:
    """Merges the part of the vocabulary that begins at `start` into the sums of the parts before it, in place.

    logits_TV: float32, contiguous, before the temperature. sums_6T: float32, contiguous; of no part: LOWEST, zeros, NaN.
    """
    rows, size = logits_TV.shape
    _add_sums[(rows,)](logits_TV, sums_6T, targets_T, start, size, rows, temperature, BLOCK=BLOCK)


def logit_gradient(
    logits_TV: Tensor,
    out_TV: Tensor,
    lse_T: Tensor,
    slope_T: Tensor | None,
    offset_T: Tensor,
    pull_T: Tensor | None,
    targets_T: Tensor,
    start: int,
    temperature: float,
) -> None:
    """π (slope · log π + offset), plus pull at the target, into out_TV of any float dtype, [T,V]; None counts as 0."""
    rows, size = logits_TV.shape
    given = [offset_T if one is None else one for one in (slope_T, pull_T)]
    _logit_gradient[(rows, triton.cdiv(size, BLOCK))](
        logits_TV, out_TV, lse_T, given[0], offset_T, given[1], targets_T, start, size, temperature,
        HAS_SLOPE=slope_T is not None, HAS_PULL=pull_T is not None, BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _add_sums(
    logits: tl.tensor,
    sums: tl.tensor,
    targets: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    top, s1, t1 = tl.load(sums + row), tl.load(sums + rows + row), tl.load(sums + 2 * rows + row)
    s2, t2 = tl.load(sums + 3 * rows + row), tl.load(sums + 4 * rows + row)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        z = tl.div_rn(tl.load(logits + row * size + at, mask=inside, other=float("-inf")), temperature)
        before, top = top, tl.maximum(top, tl.max(z, 0))
        delta = before - top
        scale = tl.exp(delta)
        shifted = tl.where(inside, z - top, 0.0)
        e = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = shifted * e
        t1 = scale * (t1 + delta * s1) + tl.sum(weighted, 0)
        s1 = scale * s1 + tl.sum(e, 0)
        t2 = scale * scale * (t2 + delta * s2) + tl.sum(weighted * e, 0)
        s2 = scale * scale * s2 + tl.sum(e * e, 0)
    tl.store(sums + row, top)
    tl.store(sums + rows + row, s1)
    tl.store(sums + 2 * rows + row, t1)
    tl.store(sums + 3 * rows + row, s2)
    tl.store(sums + 4 * rows + row, t2)
    local = tl.load(targets + row) - start
    here = (local >= 0) & (local < size)
    found = tl.div_rn(tl.load(logits + row * size + local, mask=here, other=0.0), temperature)
    tl.store(sums + 5 * rows + row, found, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _logit_gradient(
    logits: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    pull: tl.tensor,
    targets: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    HAS_SLOPE: tl.constexpr,
    HAS_PULL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.div_rn(tl.load(logits + row * size + at, mask=inside, other=0.0), temperature)
    logp = z - tl.load(lse + row)
    change = tl.load(offset + row)
    if HAS_SLOPE:
        change = tl.load(slope + row) * logp + change
    change = tl.exp(logp) * change
    if HAS_PULL:
        change += tl.where(at == tl.load(targets + row) - start, tl.load(pull + row), 0.0)
    tl.store(out + row * size + at, change.to(out.dtype.element_ty), mask=inside)
