"""Whole runs with DeepSpeed, of one process and of two, against the torch trainer: the same samples, numbers and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipctl import open_runs
from runs import stored

pytestmark = [pytest.mark.engines, pytest.mark.slow]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SMALL = {
    "rollout.prompts": 8,
    "optim.responses_per_update": 16,
    "optim.epochs": 2,
    "optim.lr": 1e-3,
    "optim.grad_clip": 0.3,
    "engine.tokens_per_microbatch": 120,
    "ledger.network_every": 0,
    "ledger.probe_every": 4,
}
"""Eight updates a rollout of three micro-batches and more, with gradients that are cut."""
COLUMNS = {"loss": 1e-6, "grad_norm": 1e-5, "ratio_mean": 1e-5, "kl": 1e-6, "pg_reward": 1e-5, "pg_clip_low": 1e-5,
           "pg_clip_high": 1e-5, "npg_reward": 1e-5, "npg_clip_low": 1e-5, "npg_clip_high": 1e-5, "x_pg": 1e-5, "y_npg": 1e-5,
           "entropy_token_mean": 1e-5}  # fmt: skip
"""Numbers of an update, and how far apart they may be beside a thousandth of themselves."""


def command(runs: Path, name: str, processes: int, **changes: object) -> list[str]:
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    words = [sys.executable, "-m", "clipctl", "train", "--preset", "tiny", "--steps", "3", "--name", name]
    words += ["--runs-dir", str(runs), *(["--nproc", str(processes)] if processes > 1 else [])]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def deepspeed(stage: int) -> dict[str, object]:
    return {"engine__trainer": "deepspeed", "engine__deepspeed__zero_stage": stage}


def run(runs: Path, name: str, processes: int = 1, **changes: object) -> Path:
    done = subprocess.run(
        command(runs, name, processes, **changes),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{runs / name}\n"
    assert {line.split()[0] for line in done.stderr.splitlines()} <= {"rollout", "warning:"}, done.stderr
    return runs / name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("torch"), "torch")


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2)])
def test_runs_are_those_of_the_torch_trainer(reference: Path, tmp_path: Path, stage: int, processes: int) -> None:
    """Three rollouts in float32; only the order of sums differs."""
    folder = run(tmp_path, "deep", processes, **deepspeed(stage))
    ours, theirs = stored(folder), stored(reference)
    assert [row[:5] for row in ours["texts"]] == [row[:5] for row in theirs["texts"]]
    with open_runs(folder) as mine, open_runs(reference) as plain:
        query = f"select {', '.join(COLUMNS)} from updates order by rollout, inner_step"
        found, expected = (np.array(runs.sql(query).fetchall(), dtype=float) for runs in (mine, plain))
    assert found.shape == (24, len(COLUMNS))
    for at, (name, atol) in enumerate(COLUMNS.items()):
        np.testing.assert_allclose(found[:, at], expected[:, at], rtol=1e-3, atol=atol, err_msg=name)
    config = json.loads((folder / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
