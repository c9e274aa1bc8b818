"""Loss, gradient and clip counts against what TRL and verl compute from the same tensors, where the definitions agree.

Their own code runs; each part is skipped where the package is absent. Where they differ from clipctl:

* TRL 1.16 takes ε_high from `epsilon` where `epsilon_high` is unset, and has no name for off (inf works, and is used
  here). Its upper clamp of the ratio (`delta`) and its KL term (`beta`) are off here; it divides advantages by the
  standard deviation by default (`scale_rewards`), here they are given. Its weights are those of one micro-batch, so
  they are the optimizer batch's only where that is one micro-batch, as here. Its clip metrics are means over the
  tokens of the mask: counts over one of clipctl's two denominators. The entropy is compared in passing.
* verl 0.9 clamps log r to ±20, has both sides in one fraction, and clips A < 0 once more at ratio `clip_ratio_c` = 3
  (dual clip), which cannot be switched off: here it is above every ratio, and one test shows what it changes.
"""

import math
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import random_llama
from torch import Tensor

from clipctl.algo import clipped_surrogate, loss_weights
from clipctl.statistics import token_statistics

if TYPE_CHECKING:
    from trl import GRPOTrainer

CLIPS = [(0.15, 0.3), (0.3, 0.15), (0.2, math.inf), (1.0, 0.1)]
ADVANTAGES = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, -1.0, 0.0, 0.5])
LENGTHS = torch.tensor([7, 1, 5, 3, 7, 6, 2, 4])


def masked(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]


# TRL


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> "GRPOTrainer":
    """A GRPOTrainer as users build it, on a small random model."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{token}": token for token in range(300)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=9,
        temperature=1.3,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    dataset = Dataset.from_dict({"prompt": ["w2 w3"] * 8})
    trainer = trl.GRPOTrainer(
        model=random_llama(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_inputs() -> dict[str, Tensor]:
    """8 prompts of 3 tokens with responses of LENGTHS, and old log-probs that put ratios on every side."""
    rng = torch.Generator().manual_seed(5)
    mask = masked(LENGTHS)
    return {
        "prompt_ids": torch.randint(1, 300, (8, 3), generator=rng),
        "prompt_mask": torch.ones(8, 3, dtype=torch.long),
        "completion_ids": torch.randint(1, 300, mask.shape, generator=rng),
        "completion_mask": mask.long(),
        "advantages": ADVANTAGES,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": torch.randn(mask.shape, generator=rng) * 0.4,
    }


def our_statistics(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log π(y) and H of every completion position, [R,T], at temperature 1.3."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, 2:-1]
    statistics = token_statistics(
        hidden.flatten(0, 1), model.lm_head.weight, inputs["completion_ids"].flatten(), temperature=1.3
    )
    shape = inputs["completion_ids"].shape
    return statistics.logprob_T.view(shape), statistics.entropy_T.view(shape)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("bnpo", "token_mean"), ("grpo", "sequence_mean"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize(("eps_low", "eps_high"), CLIPS)
def test_trl_has_the_same_loss_gradient_counts_and_entropy(
    trl_trainer: "GRPOTrainer", loss_type: str, aggregation: str, eps_low: float, eps_high: float
) -> None:
    trainer, model = trl_trainer, trl_trainer.model
    trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high = loss_type, eps_low, eps_high
    inputs = trl_inputs()
    inputs["old_per_token_logps"] += our_statistics(model, inputs)[0].detach()
    model.train()
    model.zero_grad()
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(model, inputs)
    theirs.backward()
    their_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}

    model.zero_grad()
    logprob, entropy = our_statistics(model, inputs)
    mask = masked(LENGTHS)
    objective, counts = clipped_surrogate(
        logprob, inputs["old_per_token_logps"], ADVANTAGES[:, None], mask, eps_low=eps_low, eps_high=eps_high
    )
    weights = loss_weights(LENGTHS, aggregation, trainer.max_completion_length)
    ours = -(weights[:, None] * objective).sum()
    ours.backward()

    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5, abs=1e-6)
    for parameter, gradient in zip(model.parameters(), their_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    tokens = int(counts.tokens)
    assert tokens == int(LENGTHS.sum())
    assert round(metrics["clip_ratio/low_mean"] * tokens, 3) == int(counts.clip_low)
    assert round(metrics["clip_ratio/high_mean"] * tokens, 3) == int(counts.clip_high)
    assert (int(counts.clip_low) > 0) == (eps_low < 1)
    assert (int(counts.clip_high) > 0) == math.isfinite(eps_high)
    assert metrics["entropy"] == pytest.approx(float(entropy[mask].mean().detach()), rel=1e-5)


# verl


def verl_loss(
    old: Tensor, logprob: Tensor, eps_low: float, eps_high: float, dual: float, mode: str = "token-mean"
) -> tuple[Tensor, dict[str, float]]:
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=8,
        clip_ratio_low=eps_low,
        clip_ratio_high=eps_high,
        clip_ratio_c=dual,
    )
    mask = masked(LENGTHS).float()
    result: tuple[Tensor, dict[str, float]] = algos.compute_policy_loss_vanilla(
        old, logprob, ADVANTAGES[:, None].expand(mask.shape), mask, mode, config
    )
    return result


def log_probs(spread: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(9)
    shape = masked(LENGTHS).shape
    old = -3 * torch.rand(shape, generator=rng)
    return old, (old + spread * torch.randn(shape, generator=rng)).requires_grad_()


@pytest.mark.parametrize(
    ("mode", "aggregation"), [("token-mean", "token_mean"), ("seq-mean-token-mean", "sequence_mean")]
)
@pytest.mark.parametrize(("eps_low", "eps_high"), CLIPS)
def test_verl_has_the_same_loss_gradient_and_clip_fraction(
    mode: str, aggregation: str, eps_low: float, eps_high: float
) -> None:
    old, logprob = log_probs(0.4)
    theirs, metrics = verl_loss(old, logprob, eps_low, eps_high, 1e6, mode)
    theirs.backward()
    assert logprob.grad is not None
    their_gradient, logprob.grad = logprob.grad, None
    mask = masked(LENGTHS)
    objective, counts = clipped_surrogate(logprob, old, ADVANTAGES[:, None], mask, eps_low=eps_low, eps_high=eps_high)
    ours = -(loss_weights(LENGTHS, aggregation, 1)[:, None] * objective).sum()
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(logprob.grad, their_gradient, rtol=1e-5, atol=1e-8)
    active = int(counts.clip_low) + int(counts.clip_high)
    assert active > 0
    assert round(metrics["actor/pg_clipfrac"] * int(LENGTHS.sum()), 3) == active
    assert metrics["actor/pg_clipfrac_lower"] == 0.0


def test_verls_dual_clip_at_its_default_is_a_third_event() -> None:
    """With some ratios over 3 and A < 0, verl's default drops gradients that clipctl, like the paper, keeps."""
    old, logprob = log_probs(2.0)
    off, _ = verl_loss(old, logprob, 0.2, 0.2, 1e6)
    on, metrics = verl_loss(old, logprob, 0.2, 0.2, 3.0)
    objective, _ = clipped_surrogate(logprob, old, ADVANTAGES[:, None], masked(LENGTHS), eps_low=0.2, eps_high=0.2)
    ours = -float(objective.detach().sum()) / int(LENGTHS.sum())
    assert ours == pytest.approx(float(off.detach()), rel=1e-5)
    assert float(on.detach()) < ours - 0.01
    assert metrics["actor/pg_clipfrac_lower"] > 0
