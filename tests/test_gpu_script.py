"""The script for one GPU, small and on the CPU: every part of it runs and keeps its bounds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARTS = [
    "product, copy",
    "statistics, torch, bfloat16, τ = 1.5",
    "gradient, torch, float32",
    "the bare product",
    "peak memory of a step",
    "time against its floor",
    "tiny, float32, torch/torch: samples against trainer",
    "largest log r at inner step 0",
    "tiny, bfloat16, torch/torch: response tokens/s",
    "floor of a rollout",
    "of its floor reached",
    "tiny, bfloat16: the same run twice",
    "pytest tests/gpu",
]
SCRIPT = Path(__file__).parent / "gpu" / "run.py"


def run(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--small",
        "--minutes",
        "0.75",
        "--json",
        str(tmp_path / "x.json"),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads((tmp_path / "x.json").read_text())
    return answer, done.stdout


@pytest.mark.slow
def test_every_part_runs_small_on_a_cpu(tmp_path: Path) -> None:
    answer, printed = run(tmp_path, "--engines", "torch")
    names = [row["name"] for row in answer["rows"]]
    for part in PARTS:
        assert any(part in name or part in row["found"] for name, row in zip(names, answer["rows"], strict=True)), part
    assert all(row["good"] is not False for row in answer["rows"])
    assert printed.startswith("| What | Measured | Wanted | |")
    assert all(name in printed for name in names)


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.parametrize("engine", ["vllm", "deepspeed"])
def test_the_other_engines_run_too(engine: str, tmp_path: Path) -> None:
    answer, _ = run(tmp_path, "--engines", engine, "--only", "runs")
    names = [row["name"] for row in answer["rows"]]
    assert any("samples against trainer" in name and engine in name for name in names)


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "--device cpu --small runs the same code small" in done.stderr
