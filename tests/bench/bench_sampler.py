"""Response tokens per second of the torch sampler and of transformers' `generate`, side by side in one run.

    python tests/bench/bench_sampler.py --model smollm2-135m-instruct --prompts 8 --group 8 --tokens 64 --dtype bfloat16

The two take turns (A B A B …); each line is one turn, the last one the medians and their ratio. No token ends a
response, so both sides produce the same number of tokens.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.passes import set_up_torch
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.models import find_model, load_causal_lm
from clipctl.rollout import DrawKey, Prompt, SamplingParams
from clipctl.spec import Engine


def random_prompts(count: int, length: int, vocabulary: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(1, length // 2), length + 1, count)
    return [
        Prompt(rng.integers(100 % vocabulary, vocabulary, size).tolist(), DrawKey(0, 0, at))
        for at, size in enumerate(lengths)
    ]


def ours(model: Any, prompts: list[Prompt], group: int, tokens: int, rows: int) -> int:
    groups = TorchSampler(model, rows).sample(prompts, group, SamplingParams(tokens, 1.0, 1.0, frozenset()))
    return sum(len(completion.token_ids) for _, completions in groups for completion in completions)


def theirs(model: Any, prompts: list[Prompt], group: int, tokens: int, rows: int) -> int:
    total = 0
    wave = max(1, rows // group)
    for start in range(0, len(prompts), wave):
        ids = [prompt.token_ids for prompt in prompts[start : start + wave] for _ in range(group)]
        columns = max(map(len, ids))
        input_ids = torch.tensor([[0] * (columns - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in ids], device=model.device)
        output = model.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        # As a list, as the other side's: a GPU may still be at work on a tensor.
        total += sum(len(row) - columns for row in output.tolist())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    set_up_torch(Engine(device=arguments.device, threads=arguments.threads))
    folder = find_model(arguments.model, pull=False)
    sides = {
        "clipctl": (ours, use_grouped_attention(load_causal_lm(folder, arguments.dtype, arguments.device))),
        "generate": (theirs, load_causal_lm(folder, arguments.dtype, arguments.device)),
    }
    prompts = random_prompts(arguments.prompts, arguments.prompt_tokens, sides["clipctl"][1].config.vocab_size)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.turns + 1):
        for name, (side, model) in sides.items():
            started = time.perf_counter()
            tokens = side(model, prompts, arguments.group, arguments.tokens, arguments.rows)
            speed = tokens / (time.perf_counter() - started)
            if turn:
                speeds[name].append(speed)
            print(f"turn {turn}{' (warm-up)' if not turn else ''}  {name:9} {tokens} tokens  {speed:.0f} tokens/s")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["clipctl"] / medians["generate"]
    print(f"clipctl {medians['clipctl']:.0f}, generate {medians['generate']:.0f} tokens/s: {ratio:.2f} x")


if __name__ == "__main__":
    main()
