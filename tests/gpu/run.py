"""All that is checked on one GPU, in 10 minutes, as a table and as JSON.

    python tests/gpu/run.py [--json FILE] [--minutes 10]
    python tests/gpu/run.py --device cpu --small            the same code, small, where there is no GPU

Exactness of the statistics against float64; peak memory of a step of a 3B model against what `--dry-run` plans, and its time
against its floor; runs of the embedded model and of SmolLM2-135M with the rollout of the paper's Table 1 (512 prompts × 8,
16 updates), as many rollouts as fit: samples against the trainer's log-probabilities, tokens/s, time against the floor; the
same with vLLM and DeepSpeed where they are installed; the tests of this folder. Nothing is downloaded: SmolLM2 is left out,
and said so, where it is not there. Exit status 1 where a bound is not met.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from checks import Row, Scale, device_rows, exactness_rows, model_rows, repeat_rows, run_rows, speed_rows

from clipctl import __version__

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "vllm": ("vllm", {"engine.sampler": "vllm"}),
    "deepspeed": ("deepspeed", {"engine.trainer": "deepspeed"}),
}
"""Name: the package that it needs, and what of a spec chooses it."""
SMOLLM2 = {"engine.sampler_rows": 1024, "engine.tokens_per_microbatch": 32768, "rollout.max_response_tokens": 128}
SMOLLM2_SMALL = {
    "rollout.prompts": 2,
    "rollout.group_size": 4,
    "optim.responses_per_update": 4,
    "engine.sampler_rows": 8,
    "rollout.max_response_tokens": 8,
}
TINY = {"engine.sampler_rows": 4096, "engine.tokens_per_microbatch": 65536}
FIXED_SECONDS = {False: 400, True: 40}
"""What all but the runs takes, about, in full and small."""
Part = tuple[str, Callable[[], Iterator[Row]]]


def main() -> int:
    options = parse()
    scale = Scale(options.device, options.small)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; --device cpu --small runs the same code small", file=sys.stderr)
        return 3
    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in measure(scale, options, Path(folder)):
            rows.append(row)
            print(f"  {row.name}: {row.found}", file=sys.stderr, flush=True)
    seconds = perf_counter() - started
    print(table(rows))
    print(f"{seconds:.0f} s; clipctl {__version__}, torch {torch.__version__}, {device_name(scale)}")
    if options.json:
        facts = {"schema_version": 1, "clipctl": __version__, "torch": torch.__version__, "device": device_name(scale),
                 "small": scale.small, "seconds": seconds, "rows": [asdict(row) for row in rows]}  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False))
    return int(any(row.good is False for row in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU manages in about a minute")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for everything; what is left after the rest is for runs"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="without it those that are installed")
    parser.add_argument("--only", nargs="+", choices=["device", "statistics", "memory", "runs", "repeat", "tests"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(scale: Scale, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The rows of all parts; a part that fails is a row, and the others go on."""
    for name, part in parts(scale, options, folder):
        if options.only and name not in options.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            yield from part()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            yield Row(name, f"{type(error).__name__}: {first}", "no error", False)
        gc.collect()
        torch.cuda.empty_cache()


def parts(scale: Scale, options: argparse.Namespace, folder: Path) -> Iterator[Part]:
    yield "device", partial(device_rows, scale)
    yield "statistics", partial(exactness_rows, scale)
    yield "statistics", partial(speed_rows, scale)
    yield "memory", partial(model_rows, scale)
    yield "repeat", partial(repeat_rows, scale, folder)
    wanted = options.engines or [name for name, (package, _) in ENGINES.items() if find_spec(package) is not None]
    smollm2 = SMOLLM2_SMALL if scale.small else SMOLLM2
    runs = [("tiny", "float32", TINY | ENGINES[name][1]) for name in wanted]
    if "torch" in wanted:
        runs += [("smollm2-arith", "bfloat16", smollm2), ("tiny", "bfloat16", TINY)]
    each = max(5.0, (60 * options.minutes - FIXED_SECONDS[scale.small]) / (len(runs) + 1))
    for preset, dtype, changes in runs:
        # SmolLM2 is the one whose speed is of interest.
        seconds = 2 * each if preset != "tiny" else each
        yield "runs", partial(run_rows, scale, preset, dtype, changes, seconds, folder)
    yield "tests", tests_row


def tests_row() -> Iterator[Row]:
    """The tests of this folder, which are skipped without a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr])[-1].strip("= ")
    yield Row("pytest tests/gpu", last, "none fails", done.returncode == 0)


def table(rows: list[Row]) -> str:
    """Markdown, for README."""
    lines = ["| What | Measured | Wanted | |", "|---|---|---|---|"]
    marks = {None: "", True: "yes", False: "**NO**"}
    return "\n".join([*lines, *(f"| {row.name} | {row.found} | {row.wanted} | {marks[row.good]} |" for row in rows)])


def device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name() if scale.device == "cuda" else f"CPU {platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
