"""The torch engine's parts on a GPU against the CPU: attention, decoding, scoring, an update. Skipped without a GPU."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, random_llama
from torch import nn

from clipctl.engine.attention import grouped_attention, use_grouped_attention
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.loss import PolicyLoss
from clipctl.rollout import Batch, DrawKey, Prompt, SamplingParams
from clipctl.spec import load_spec
from clipctl.statistics import float32_logits, token_statistics

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 37])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(dtype: torch.dtype, positions: int, masked: bool) -> None:
    """Decoding always has a mask; longer texts with one or causal."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, positions, 32), torch.randn(3, 2, 37, 32), torch.randn(3, 2, 37, 32)
    mask = None
    if masked or positions == 1:
        mask = (torch.rand(3, 1, positions, 37) < 0.7) | (torch.arange(37) == 36)
    given = [tensor.to(dtype) for tensor in (query, key, value)]
    exact, _ = grouped_attention(nn.Identity(), *(tensor.float() for tensor in given), mask)
    moved = None if mask is None else mask.to(DEVICE)
    found, _ = grouped_attention(nn.Identity(), *(tensor.to(DEVICE) for tensor in given), moved)
    torch.testing.assert_close(found.cpu().float(), exact, atol=2e-5 if dtype == torch.float32 else 3e-2, rtol=0)


def prompts() -> list[Prompt]:
    texts = [[5, 7, 9], [11], [3, 2, 1, 8, 6, 4, 20], [30, 31]]
    return [Prompt(text, DrawKey(1, 2, at)) for at, text in enumerate(texts)]


def test_samples_have_the_log_probs_of_the_whole_text() -> None:
    """Rows that stop between two looks, compaction and a growing cache included."""
    model, reference = use_grouped_attention(random_llama().to(DEVICE)), random_llama()
    params = SamplingParams(150, 1.0, 1.0, frozenset(range(0, VOCABULARY, 20)))
    found = dict(TorchSampler(model, 64).sample(prompts(), 16, params))
    assert {completion.finish for group in found.values() for completion in group} >= {"stop"}
    for at, prompt in enumerate(prompts()):
        for completion in found[at]:
            text = prompt.token_ids + completion.token_ids
            logp_SV = torch.log_softmax(reference(torch.tensor([text])).logits[0].double(), -1)
            expected = logp_SV[range(len(prompt.token_ids) - 1, len(text) - 1), completion.token_ids]
            np.testing.assert_allclose(completion.logprobs, expected.detach().numpy(), atol=1e-4)
            if completion.finish == "stop":
                assert completion.token_ids[-1] in params.stop_ids


def trained(device: str, **model: Any) -> tuple[Any, Any, TorchTrainer]:
    spec = load_spec("tiny", {"optim.responses_per_update": 8, "engine.tokens_per_microbatch": 64, "optim.lr": 1e-3})
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, size).tolist() for size in (9, 12, 5, 17, 8, 8, 30, 4)]
    batch = Batch([text[:3] for text in texts], [text[3:] for text in texts], rng.normal(size=8), 8)
    trainer = TorchTrainer(use_grouped_attention(random_llama(**model).to(device)), spec)
    old = trainer.score(batch)
    return old, trainer.step(batch, range(8), old, PolicyLoss("clip", 0.2, 0.2)), trainer


def test_scores_and_a_step_are_those_of_the_cpu() -> None:
    """In float32: log-probs and entropies, the loss, the gradient's norm and every weight after the step."""
    (scores, result, trainer), (expected, on_cpu, other) = trained(DEVICE), trained("cpu")
    torch.testing.assert_close(scores.logprob_T, expected.logprob_T, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.entropy_T, expected.entropy_T, atol=1e-4, rtol=0)
    assert (result.loss, result.grad_norm) == pytest.approx((on_cpu.loss, on_cpu.grad_norm), rel=1e-3)
    # AdamW's first step is lr times the sign of the gradient, whose sign is noise where it is nearly 0.
    far = [
        float(((mine.cpu() - theirs).abs() > 1e-4).float().mean())
        for (_, mine), (_, theirs) in zip(trainer.weights(), other.weights(), strict=True)
    ]
    assert max(far) < 0.02
    assert float((scores.logprob_T - result.tokens.logprob_T.cpu()).abs().max()) < 1e-5


def test_what_a_caller_allows_does_not_reach_the_statistics() -> None:
    torch.manual_seed(0)
    hidden_TD, head_VD = torch.randn(64, 256, device=DEVICE), torch.randn(1000, 256, device=DEVICE)
    targets_T = torch.zeros(64, dtype=torch.long, device=DEVICE)
    exact_TV = torch.log_softmax(hidden_TD.double() @ head_VD.double().T, -1)
    try:
        torch.set_float32_matmul_precision("high")
        found = token_statistics(hidden_TD, head_VD, targets_T)
        logits_TV = float32_logits(hidden_TD, head_VD)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert float((found.logprob_T - exact_TV[:, 0]).abs().max()) < 1e-4
    assert float((logits_TV - hidden_TD.double() @ head_VD.double().T).abs().max()) < 1e-4
