"""Whole runs on one CUDA GPU: the same command gives the same bits, killed or not; sweeps share a card. Skipped without a GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clipctl import load_spec, open_runs, train
from runs import SMALL, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
ON_GPU = SMALL | {
    "run.steps": 4,
    "checkpoint.every": 1,
    "engine.device": "cuda",
    "engine.statistics": "triton",
}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(runs_dir: Path, **changes: Any) -> Path:
    return train(load_spec("tiny", ON_GPU | changes), runs_dir=runs_dir, warn=lambda line: None)


def command(*words: str, settings: dict[str, Any]) -> list[str]:
    sets = [
        word for key, value in settings.items() if key != "run.name" for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    return [sys.executable, "-m", "clipctl", *words, *sets]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_killed_is_the_undisturbed_one_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    whole = run(tmp_path / "whole", **{"model.dtype": dtype})
    settings = ON_GPU | {"model.dtype": dtype}
    words = command("train", "--preset", "tiny", "--name", "x", "--runs-dir", str(tmp_path), settings=settings)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "rollout 2/4" in line:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert "goes on from rollout" in again.stderr
    assert_same(whole, tmp_path / "x", 4)


def test_runs_of_a_sweep_share_the_card_and_are_what_they_are_alone(tmp_path: Path) -> None:
    settings = ON_GPU | {"run.steps": 2}
    asked = ["sweep", "--preset", "tiny", "--seeds", "3", "--jobs", "3", "--name", "s", "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        command(*asked, settings=settings), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    for seed in range(3):
        assert_same(tmp_path / "s" / f"tiny-{seed}", run(tmp_path / str(seed), **{"run.steps": 2, "run.seed": seed}), 2)


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    count = str(torch.cuda.device_count() + 1)
    asked = ["train", "--preset", "tiny", "--nproc", count, "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        command(*asked, settings=ON_GPU), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert "have the same GPU" in done.stderr


def test_an_evaluation_is_that_of_the_cpu_within_rounding(tmp_path: Path) -> None:
    """Draws are keyed, so that only a draw within rounding of two tokens' border can differ: none of 512 responses here."""
    found = []
    for device in ("cuda", "cpu"):
        asked = [
            "eval",
            "--model",
            "tiny",
            "--benchmark",
            "arith",
            "--limit",
            "64",
            "-k",
            "8",
            "--max-tokens",
            "24",
            "--name",
            "e",
        ]
        settings = {"engine.device": device, "engine.sampler_rows": 256, "eval.reuse": False}
        words = command(*asked, "--runs-dir", str(tmp_path / device), settings=settings)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        with open_runs(tmp_path / device / "e") as runs:
            found.append(runs.sql("select position, sample, correct from evals order by all").fetchall())
    assert len(found[0]) == 512
    assert sum(one != other for one, other in zip(*found, strict=True)) <= 1
