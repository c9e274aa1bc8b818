"""The Triton kernels on CPU tensors, by Triton's interpreter, which has to be chosen before they are imported: a process of its
own. Prints, as JSON, how far statistics and gradients are from float64, for several shapes, dtypes and temperatures."""

import json
import os
import sys
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import torch

from clipctl import statistics
from clipctl.statistics import token_statistics

CASES = [(5, 16, 3000, 4096, 1.0), (7, 8, 5000, 4096, 0.6), (9, 16, 48, 64, 1.5), (1, 8, 2049, 1 << 19, 0.8)]
"""Tokens, hidden size, vocabulary, logits of a part, temperature: parts that a block does not divide, several token parts."""


def errors(kernels: statistics.Kernels) -> Iterator[dict[str, float]]:
    for tokens, hidden, vocabulary, elements, temperature in CASES:
        statistics.CHUNK_ELEMENTS["cpu"], statistics.CHUNK_VOCABULARY["cpu"] = elements, min(elements, 1024)
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(tokens)
            hidden_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
            head_VD = (torch.randn(vocabulary, hidden, generator=generator) * 2).to(dtype)
            # Every other one of a row: not side by side in memory.
            targets_T = torch.randint(vocabulary, (tokens, 2), generator=generator)[:, 0]
            weights_2T = torch.randn(2, tokens, generator=generator)
            for parts in ((1, 0), (0, 1), (1, 1)):
                yield compared(hidden_TD, head_VD, targets_T, temperature, weights_2T, parts, kernels)


def compared(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float,
    weights_2T: torch.Tensor,
    parts: tuple[int, int],
    kernels: statistics.Kernels,
) -> dict[str, float]:
    """parts: which of Σ w log π and Σ w H are in the loss."""
    exact = [tensor.double().requires_grad_() for tensor in (hidden_TD, head_VD)]
    logp_TV = torch.log_softmax(exact[0] @ exact[1].T / temperature, -1)
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV).sum(-1)
    wanted = {
        "logprob_T": logp_TV.gather(1, targets_T[:, None])[:, 0],
        "entropy_T": entropy_T,
        "sum_p2_T": (p_TV**2).sum(-1),
        "sum_p2_logp_T": (p_TV**2 * logp_TV).sum(-1),
        "expected_q_T": (p_TV**2 * (logp_TV + entropy_T[:, None])).sum(-1),
    }
    ours = [tensor.clone().requires_grad_() for tensor in (hidden_TD, head_VD)]
    found = token_statistics(*ours, targets_T, temperature=temperature, kernels=kernels)
    report = {name: float((getattr(found, name) - value).detach().abs().max()) for name, value in wanted.items()}
    for logprob_T, entropies_T in ((wanted["logprob_T"], entropy_T), (found.logprob_T, found.entropy_T)):
        sums = [(weights_2T[0] * logprob_T).sum(), (weights_2T[1] * entropies_T).sum()]
        sum(one for one, taken in zip(sums, parts, strict=True) if taken).backward()
    for name, mine, true in zip(("hidden", "head"), ours, exact, strict=True):
        report[name] = float((mine.grad.double() - true.grad).norm() / true.grad.norm())
    return report | {"half": float(hidden_TD.dtype == torch.bfloat16)}


if __name__ == "__main__":
    print(json.dumps(list(errors(sys.argv[1]))))
