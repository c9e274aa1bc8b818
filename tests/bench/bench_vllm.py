"""vLLM against the torch sampler on this CPU, in turns in one run; and a push of weights against a plain copy of them.

python tests/bench/bench_vllm.py --model smollm2-135m-instruct --dtype bfloat16 --prompts 8 --group 8 --tokens 64
"""

import argparse
import statistics
from time import perf_counter

import torch

from clipctl.engine import Sampler, open_engine
from clipctl.models import find_model
from clipctl.rollout import DrawKey, Prompt, SamplingParams
from clipctl.spec import load_spec


def rollout(sampler: Sampler, args: argparse.Namespace, turn: int) -> tuple[int, float]:
    """Response tokens and seconds of one rollout. Token 0 ends a response, which the models here next to never draw."""
    prompts = [
        Prompt([5 + (7 * at + 3 * token) % 90 for token in range(args.prompt_tokens)], DrawKey(0, turn, at))
        for at in range(args.prompts)
    ]
    started = perf_counter()
    groups = list(sampler.sample(prompts, args.group, SamplingParams(args.tokens, 1.0, 1.0, frozenset({0}))))
    seconds = perf_counter() - started
    return sum(len(completion.token_ids) for _, group in groups for completion in group), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    folder = find_model(args.model, pull=True)
    changes = {"model.path": args.model, "model.dtype": args.dtype, "engine.sampler_rows": args.rows}
    pairs = {
        name: open_engine(
            load_spec("tiny", changes | {"engine.sampler": name}), folder, 1 + args.prompt_tokens + args.tokens, print
        )
        for name in ("torch", "vllm")
    }
    speeds: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(args.turns + 1):
        for name, pair in pairs.items():
            tokens, seconds = rollout(pair.sampler, args, turn)
            print(f"{turn or '(warm-up)'}  {name:6} {tokens} tokens  {tokens / seconds:.0f} tokens/s")
            if turn:
                speeds[name].append(tokens / seconds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"vllm {medians['vllm']:.0f}, torch {medians['torch']:.0f} tokens/s: {medians['vllm'] / medians['torch']:.2f} x"
    )
    measure_pushes(pairs["vllm"].sampler, dict(pairs["vllm"].trainer.weights()), args.turns)
    for pair in pairs.values():
        pair.sampler.close()


def measure_pushes(sampler: Sampler, weights: dict[str, torch.Tensor], turns: int) -> None:
    """A push from the trainer's tensors to the engine ready to sample, against copying each tensor into another one."""
    copies = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    pushes, plain = [], []
    for turn in range(turns + 1):
        started = perf_counter()
        sampler.update_weights(iter(weights.items()), turn)
        pushed = perf_counter()
        for name, tensor in weights.items():
            copies[name].copy_(tensor.detach())
        if turn:
            pushes.append(pushed - started)
            plain.append(perf_counter() - pushed)
    push, copy = statistics.median(pushes), statistics.median(plain)
    size = sum(tensor.nbytes for tensor in weights.values())
    print(f"push of {size / 1e6:.1f} MB {1000 * push:.1f} ms, plain copy {1000 * copy:.1f} ms: {push / copy:.1f} x")


if __name__ == "__main__":
    main()
