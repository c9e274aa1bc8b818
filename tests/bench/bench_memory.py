"""Memory of a whole run on the CPU against what `--dry-run` plans.

    python tests/bench/bench_memory.py [--preset smollm2-arith]

The peak of resident memory over one rollout with two updates of full micro-batches, less what the process holds before the
model is loaded; the kernel counts it (Linux), so allocators, loading and everything else are in it. One thread unless
OMP_NUM_THREADS says otherwise.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

import clipctl
from clipctl.engine import open_engine
from clipctl.models import find_model
from clipctl.plan import memory, model_shape, peak_memory, size_words
from clipctl.spec import RunSpec


def peak_of(spec: RunSpec, runs: Path) -> int:
    """Bytes that the run adds to this process at most."""
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    clipctl.train(spec, runs_dir=runs, warn=lambda line: None)
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return peak - before


def main(preset: str) -> None:
    few = {"run.steps": 1, "rollout.prompts": 2, "rollout.group_size": 8, "optim.responses_per_update": 8, "optim.epochs": 1,
           "engine.tokens_per_microbatch": 1024, "ledger.network_every": 0}  # fmt: skip
    spec = clipctl.load_spec(preset, few)
    shape = model_shape(spec.model.path)
    assert shape is not None
    # What libraries need by themselves is loaded before: torch, transformers, the store.
    open_engine(clipctl.load_spec("tiny"), find_model("tiny", pull=False))
    with TemporaryDirectory() as scratch:
        clipctl.train(clipctl.load_spec("tiny", {"run.steps": 1}), runs_dir=scratch, warn=lambda line: None)
        measured = peak_of(spec, Path(scratch))
    planned = peak_memory(memory(spec, shape))
    error = 100 * (planned / measured - 1)
    print(f"{preset}: {size_words(measured)} at the peak, planned {size_words(planned)} ({error:+.0f} %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-arith")
    main(parser.parse_args().preset)
