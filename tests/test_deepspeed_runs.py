"""Whole runs with DeepSpeed, of one process and of two, against the torch trainer: the same samples, numbers and weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipctl import load_spec, open_runs
from clipctl.errors import Preempted
from clipctl.export import export
from clipctl.train import train
from runs import assert_same, stored

pytestmark = [pytest.mark.engines, pytest.mark.slow]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SMALL = {
    "rollout.prompts": 4,
    "optim.responses_per_update": 16,
    "optim.epochs": 2,
    "optim.lr": 1e-3,
    "optim.grad_clip": 0.3,
    "engine.tokens_per_microbatch": 120,
    "ledger.network_every": 0,
    "ledger.probe_every": 4,
}
"""Four updates a rollout of three micro-batches and more, with gradients that are cut."""
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


Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Undisturbed runs, each made once: of the torch trainer for no stage."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def made(stage: int | None = None, processes: int = 1, **changes: object) -> Path:
        name = f"{'torch' if stage is None else stage}-{processes}-{'-'.join(map(str, changes.values()))}"
        return run(folder, name.rstrip("-"), processes, **({} if stage is None else deepspeed(stage)), **changes)

    return made


def updates(folder: Path, rollouts: int) -> np.ndarray:
    with open_runs(folder) as opened:
        query = f"select {', '.join(COLUMNS)} from updates where rollout < {rollouts} order by rollout, inner_step"
        return np.array(opened.sql(query).fetchall(), dtype=float)


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2)])
def test_runs_are_those_of_the_torch_trainer(runs: Runs, stage: int, processes: int) -> None:
    """Three rollouts in float32; only the order of sums differs."""
    folder, reference = runs(stage, processes), runs()
    ours, theirs = stored(folder), stored(reference)
    assert [row[:5] for row in ours["texts"]] == [row[:5] for row in theirs["texts"]]
    found, expected = updates(folder, 3), updates(reference, 3)
    assert found.shape == (12, len(COLUMNS))
    for at, (name, atol) in enumerate(COLUMNS.items()):
        np.testing.assert_allclose(found[:, at], expected[:, at], rtol=1e-4, atol=atol, err_msg=name)
    zero = json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]
    assert zero == {"stage": stage, "reduce_bucket_size": 138_368}


@pytest.mark.parametrize(("stage", "processes"), [(2, 2)])
def test_bfloat16_runs_begin_as_those_of_the_torch_trainer(runs: Runs, stage: int, processes: int) -> None:
    """The first rollout, whose samples are the same; a step may end on the other side of a rounding of the working copy."""
    found, expected = (
        updates(folder, 1)
        for folder in (runs(stage, processes, model__dtype="bfloat16"), runs(model__dtype="bfloat16"))
    )
    for at, name in enumerate(COLUMNS):
        scale = np.abs(expected[:, at]).max()
        assert np.abs(found[:, at] - expected[:, at]).max() < 0.05 * scale, name


def test_two_processes_that_are_told_to_stop_go_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """ZeRO-3; the signal comes after the first rollout, in whatever is done then."""
    words = command(tmp_path, "3-2", 2, **deepspeed(3))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    end = time.monotonic() + 200
    while not list((tmp_path / "3-2" / "journal").glob("rollouts-000-000000-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 75, said
    assert "clipctl: stopped by SIGTERM; " in said
    refused = subprocess.run(
        command(tmp_path, "3-2", 1, **deepspeed(3)),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=200,
        check=False,
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr == (
        "clipctl: the checkpoint is one of 2 processes and 1 is started: with engine.trainer = 'deepspeed' a run goes on with "
        "as many as it had\n"
    )
    status = json.loads((tmp_path / "3-2" / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("interrupted", 0)
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "3-2", runs(3, 2), 3)


@pytest.mark.parametrize("stage", [2])
def test_a_signal_in_an_update_goes_on_bit_for_bit(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """In the middle of the second rollout, with probe states that are kept."""
    from clipctl.engine.deepspeed_trainer import DeepSpeedTrainer

    step, taken = DeepSpeedTrainer.step, []

    def stepping(self: DeepSpeedTrainer, *arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    changes = {key.replace("__", "."): value for key, value in deepspeed(stage).items()}
    spec = load_spec("tiny", SMALL | changes | {"run.steps": 3, "run.name": "2-1"})
    with monkeypatch.context() as patch:
        patch.setattr(DeepSpeedTrainer, "step", stepping)
        with pytest.raises(Preempted, match="goes on from rollout 1, update 3"):
            train(spec, runs_dir=tmp_path)
    assert_same(train(spec, runs_dir=tmp_path), runs(stage, 1), 3)


def test_a_policy_of_zero_3_is_exported_whole(runs: Runs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, other = (
        AutoModelForCausalLM.from_pretrained(export("@".join([str(folder), "3"]), tmp_path / folder.name, tmp_path))
        for folder in (runs(3, 2), runs())
    )
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-3)
    assert '"zero_stage": 3' in (tmp_path / "3-2" / "README.md").read_text()
