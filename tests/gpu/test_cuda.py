"""The torch engine on one CUDA GPU with the code that runs on the CPU. Skipped without a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clipctl import load_spec, open_runs, token_statistics, train
from clipctl.statistics import Kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_statistics_are_exact_on_cuda(dtype: torch.dtype, temperature: float, kernels: Kernels) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator, device="cuda").to(dtype)
    head = (torch.randn(20_000, 256, generator=generator, device="cuda") * 0.3).to(dtype)
    targets = torch.randint(20_000, (300,), generator=generator, device="cuda")
    found = token_statistics(hidden, head, targets, temperature=temperature, kernels=kernels)
    logp = torch.log_softmax(hidden.double() @ head.double().T / temperature, -1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(-1)
    expected_q = (p * p * (logp + entropy[:, None])).sum(-1)
    scale = (p * p * (logp.abs() + entropy[:, None])).sum(-1)
    assert (found.logprob_T - logp.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert (found.entropy_T - entropy).abs().max() < 1e-4
    assert ((found.expected_q_T - expected_q).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_trains_on_cuda(tmp_path: Path, dtype: str) -> None:
    spec = load_spec("tiny", {"engine.device": "cuda", "model.dtype": dtype, "run.steps": 25})
    folder = train(spec, runs_dir=tmp_path)
    with open_runs(folder) as runs:
        reward = [row for (row,) in runs.sql("select reward_mean from rollouts order by rollout").fetchall()]
        noise = [row for (row,) in runs.sql("select noise_max from updates where inner_step = 0").fetchall()]
        mismatch = [row for (row,) in runs.sql("select mismatch_max from rollouts").fetchall()]
    assert np.mean(reward[-5:]) > np.mean(reward[:5]) + 0.1
    assert max(noise) < 1e-4
    assert max(mismatch) < (1e-3 if dtype == "float32" else 0.2)


@pytest.mark.engines
@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "all")])
def test_deepspeed_takes_the_steps_of_the_torch_trainer_on_cuda(tmp_path: Path, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    common = {"engine.device": "cuda", "model.dtype": "bfloat16", "run.steps": 1, "ledger.network_every": 0,
              "engine.statistics": "triton"}  # fmt: skip
    deep = {
        "engine.trainer": "deepspeed",
        "engine.deepspeed.zero_stage": stage,
        "engine.deepspeed.offload": offload,
    }
    query = "select loss, grad_norm, pg_reward from updates where inner_step < 4 order by inner_step"
    found = []
    for changes in ({}, deep):
        with open_runs(train(load_spec("tiny", common | changes), runs_dir=tmp_path)) as runs:
            found.append(np.array(runs.sql(query).fetchall()))
    # A loss of 1e-4 is what is left of terms that are a thousand times its size, in weights of 16 bits.
    np.testing.assert_allclose(found[1][:, 0], found[0][:, 0], atol=1e-3)
    np.testing.assert_allclose(found[1][:, 1], found[0][:, 1], rtol=1e-2)
    np.testing.assert_allclose(found[1][:, 2], found[0][:, 2], rtol=5e-2, atol=3e-4)
