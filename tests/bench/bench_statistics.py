"""Statistics from hidden states: one chunked pass against materialised float32 logits, in time and memory.

    python tests/bench/bench_statistics.py [--case tiny smollm2 qwen] [--repeats 5] [--memory]

The naive way keeps log_softmax of the float32 logits for autograd and makes H and E[Q] from it. Both run alternately
in one process, after a warm-up each; medians; one thread unless OMP_NUM_THREADS says otherwise. `--memory` measures
each way in a process of its own, as peak resident size beyond operands and gradients, and clipctl's also at the size
that is promised, 8192 tokens × 151 936 words, against the bytes of the float32 logits alone. clipctl makes the logits
again in its backward pass: four products against three, so its gain in time is the forward pass's.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from clipctl.statistics import token_statistics

CASES = {
    "tiny": (8000, 64, 48, torch.float32),
    "smollm2": (1024, 576, 49152, torch.bfloat16),
    "qwen": (256, 2048, 151936, torch.bfloat16),
    "promise": (8192, 2048, 151936, torch.bfloat16),
}
"""Tokens, hidden size, vocabulary, dtype."""


def operands(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets; logits have standard deviation 2."""
    tokens, size, vocabulary, dtype = CASES[case]
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=rng).to(dtype).requires_grad_()
    head = (torch.randn(vocabulary, size, generator=rng) * 2 / size**0.5).to(dtype).requires_grad_()
    return hidden, head, torch.randint(vocabulary, (tokens,), generator=rng)


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return token_statistics(hidden, head, targets).logprob_T


def naive(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logp = torch.log_softmax(hidden.float() @ head.float().T, 1)
    with torch.no_grad():
        p = logp.exp()
        entropy = -(p * logp).sum(1)
        p.square_().mul_(logp + entropy[:, None]).sum(1)
    return logp.gather(1, targets[:, None])[:, 0]


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"naive": naive, "clipctl": ours}


def work(way: str, backward: bool, hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    """One forward pass without autograd, or one with its backward pass."""
    hidden.grad = head.grad = None
    with torch.set_grad_enabled(backward):
        logprob = WAYS[way](hidden, head, targets)
    if backward:
        logprob.sum().backward()


def compare_times(case: str, repeats: int) -> None:
    data = operands(case)
    for backward in (False, True):
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(repeats + 1):
            for way in WAYS:
                started = perf_counter()
                work(way, backward, *data)
                if repeat:
                    times[way].append(perf_counter() - started)
        naive_s, ours_s = (statistics.median(times[way]) for way in ("naive", "clipctl"))
        name = "forward + backward" if backward else "forward"
        times_ms = f"naive {naive_s * 1e3:9.2f} ms  clipctl {ours_s * 1e3:9.2f} ms"
        print(f"{case:8} {name:18} {times_ms}  {naive_s / ours_s:5.2f}×", flush=True)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(case: str, way: str, backward: bool) -> None:
    """Prints the peak beyond operands and gradients, bytes; run in a process of its own."""
    data = operands(case)
    work(
        way,
        backward,
        *(tensor[:2].detach().requires_grad_(tensor.is_floating_point()) for tensor in data[:2]),
        data[2][:2] % 2,
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work(way, backward, *data)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in data[:2]) if backward else 0
    print(resident("VmHWM") - before - gradients)


def compare_memory(case: str) -> None:
    tokens, _, vocabulary, _ = CASES[case]
    logits = 4 * tokens * vocabulary
    for backward in (False, True):
        name = "forward + backward" if backward else "forward"
        peaks = {}
        for way in ["clipctl"] if case == "promise" else list(WAYS):
            command = [sys.executable, __file__, "--measure", case, way, str(int(backward))]
            peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        against = "" if case == "promise" else f"naive {peaks['naive'] / 1e6:8.1f} MB  "
        extra = max(peaks["clipctl"], 1)
        print(
            f"{case:8} {name:18} {against}clipctl {extra / 1e6:8.1f} MB  "
            f"float32 logits alone {logits / 1e6:8.1f} MB, {logits / extra:5.1f}×",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["tiny", "smollm2", "qwen"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.measure:
        case, way, backward = options.measure
        measure_memory(case, way, backward == "1")
        return
    for case in options.case:
        if options.memory:
            compare_memory(case)
        else:
            compare_times(case, options.repeats)
    if options.memory and "promise" not in options.case:
        compare_memory("promise")


if __name__ == "__main__":
    main()
