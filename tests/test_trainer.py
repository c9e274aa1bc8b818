"""The torch trainer against plain autograd in float64, and the identities that exact training rests on."""

import operator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_llama

from clipctl.engine import UpdateResult
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import DivergedError
from clipctl.loss import PolicyLoss, UpdateSums, UpdateTokens
from clipctl.rollout import Batch, minibatches
from clipctl.spec import RunSpec, resolve_spec

SPEC = {
    "model": {"path": "random", "dtype": "float32"},
    "rollout": {"prompts": 4, "group_size": 4, "max_response_tokens": 32, "temperature": 1.3},
    "clip": {"low": 0.15, "high": 0.3},
    "optim": {"lr": 2e-4, "responses_per_update": 8, "epochs": 2, "grad_clip": 1e9},
}


def sums_of(result: UpdateResult, the_spec: RunSpec) -> UpdateSums:
    (sums,) = spec_loss(the_spec).sums([result.loss], [result.tokens])
    return sums


def spec_loss(spec: RunSpec) -> PolicyLoss:
    return PolicyLoss(spec.loss.objective, spec.clip.low, spec.clip.high)


def spec(**changes: dict[str, Any]) -> RunSpec:
    return resolve_spec(SPEC, changes)


def batch() -> Batch:
    """4 groups of 4 with prompts and responses of many lengths; group 1 and one response of group 2 have A = 0."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 300, rng.integers(1, 9)).tolist() for _ in range(4)]
    advantages = np.array([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, 0.5, -0.5, 0.25, -0.25, -1.0, 0.5, 0.0, 0.5])
    return Batch(
        prompt_ids=[prompt for prompt in prompts for _ in range(4)],
        response_ids=[rng.integers(1, 300, rng.integers(1, 20)).tolist() for _ in range(16)],
        advantages_R=advantages,
        group_size=4,
    )


def trainer(spec: RunSpec, **model: Any) -> TorchTrainer:
    return TorchTrainer(use_grouped_attention(random_llama(**model)), spec)


def gradients(trainer: TorchTrainer) -> list[torch.Tensor]:
    return [master.grad.clone() for master in trainer.masters if master.grad is not None]


def float64_objective(model: Any, batch: Batch, spec: RunSpec, old: list[torch.Tensor]) -> torch.Tensor:
    """The token-mean clipped objective written out, one response at a time, over transformers' own logits."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(8):
        prompt, response = batch.prompt_ids[row], batch.response_ids[row]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / spec.rollout.temperature
        logprob = torch.log_softmax(logits, -1)[range(len(response)), response]
        ratio = (logprob - old[row]).exp()
        advantage = batch.advantages_R[row]
        clipped = ratio.clamp(1 - spec.clip.low, 1 + spec.clip.high)
        total = total + torch.minimum(ratio * advantage, clipped * advantage).sum()
        tokens += len(response)
    return total / tokens


def test_scores_are_float64_log_probs_and_entropies() -> None:
    scores = trainer(spec()).score(batch())
    model = random_llama().double()
    logprobs, entropies = [], []
    for prompt, response in zip(batch().prompt_ids, batch().response_ids, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 1.3
        logp = torch.log_softmax(logits, -1)
        logprobs.append(logp[range(len(response)), response])
        entropies.append(-(logp.exp() * logp).sum(-1))
    np.testing.assert_allclose(scores.logprob_T, torch.cat(logprobs).detach(), atol=3e-5)
    np.testing.assert_allclose(scores.entropy_T, torch.cat(entropies).detach(), atol=3e-5)


def test_importance_multiplies_the_loss_weights_and_the_ledger_has_them() -> None:
    """At inner step 0 the gradient is Σ w f A ∇log π with w = 1/N, and the ledger's first term Σ w f A (E[Q] - Q(a))."""
    the_spec = spec()
    ours = trainer(the_spec)
    plain = ours.score(batch())
    factors_T = torch.linspace(0.2, 1.7, len(plain.logprob_T), dtype=torch.float64)
    result = ours.step(batch(), range(8, 16), replace(plain, importance_T=factors_T), spec_loss(the_spec))
    lengths = batch().lengths_R
    start, size = int(lengths[:8].sum()), int(lengths[8:].sum())
    weights_T = factors_T[start:] / size
    torch.testing.assert_close(result.tokens.weights_T, weights_T)
    reference = random_llama().double()
    objective, pull, at = torch.zeros((), dtype=torch.float64), 0.0, 0
    for row in range(8, 16):
        prompt, response = batch().prompt_ids[row], batch().response_ids[row]
        logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 1.3
        logp_TV = torch.log_softmax(logits, -1)
        logprob_T = logp_TV[range(len(response)), response]
        entropy_T1 = -(logp_TV.exp() * logp_TV).sum(-1, keepdim=True)
        q_TV = logp_TV.exp() * (logp_TV + entropy_T1)
        effect_T = (logp_TV.exp() * q_TV).sum(-1) - q_TV[range(len(response)), response]
        share_T = weights_T[at : at + len(response)] * batch().advantages_R[row]
        objective = objective + (share_T * logprob_T).sum()
        pull += float((share_T * effect_T).sum().detach())
        at += len(response)
    (-objective).backward()
    for master, parameter in zip(gradients(ours), reference.parameters(), strict=True):
        torch.testing.assert_close(master.double(), parameter.grad, rtol=1e-3, atol=1e-6)
    assert sums_of(result, the_spec).ledger.pg.reward == pytest.approx(pull, rel=1e-4)


def test_the_gradient_off_policy_is_that_of_the_formula_in_float64() -> None:
    """Second update: ratios have moved, both sides clip, and the gradient still is the written-out one."""
    the_spec = spec(optim={"lr": 2e-2})
    ours = trainer(the_spec)
    old = ours.score(batch())
    ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
    reference = random_llama().double()
    reference.load_state_dict(ours.model.state_dict())
    ends = np.cumsum(batch().lengths_R)
    pieces = [old.logprob_T[end - length : end].double() for end, length in zip(ends, batch().lengths_R, strict=True)]
    objective = float64_objective(reference, batch(), the_spec, pieces)
    (-objective).backward()
    expected = float(-objective.detach())
    result = ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
    counts = sums_of(result, the_spec).counts
    assert min(int(counts.clip_low), int(counts.clip_high)) > 0
    assert sums_of(result, the_spec).loss == pytest.approx(expected, rel=1e-4)
    for master, parameter in zip(gradients(ours), reference.parameters(), strict=True):
        torch.testing.assert_close(master.double(), parameter.grad, rtol=1e-3, atol=1e-6)


def run_updates(the_spec: RunSpec) -> tuple[TorchTrainer, list[UpdateSums], list[list[torch.Tensor]]]:
    ours = trainer(the_spec)
    old = ours.score(batch())
    results, grads = [], []
    for rows in 2 * minibatches(16, the_spec.optim.responses_per_update):
        results.append(sums_of(ours.step(batch(), rows, old, spec_loss(the_spec)), the_spec))
        grads.append(gradients(ours))
    return ours, results, grads


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(("budget", "parts"), [(60, 3), (1, 8)])
def test_any_split_into_micro_batches_gives_the_same_update(aggregation: str, budget: int, parts: int) -> None:
    """Gradient, metrics and next weights of one optimizer batch in one, several and one-response micro-batches."""
    loss = {"aggregation": aggregation}
    whole_spec = spec(loss=loss, engine={"tokens_per_microbatch": 10**6})
    split_spec = spec(loss=loss, engine={"tokens_per_microbatch": budget})
    whole, whole_sums, whole_gradients = run_updates(whole_spec)
    split, split_sums, split_gradients = run_updates(split_spec)
    layouts = [len(t._layout(batch(), range(8, 16))) for t in (whole, split)]
    assert layouts[0] == 2
    assert layouts[1] >= parts
    for a, b in zip(whole_sums, split_sums, strict=True):
        assert b.loss == pytest.approx(a.loss, abs=1e-6)
        assert b.entropy == pytest.approx(a.entropy, rel=1e-5)
        assert b.kl == pytest.approx(a.kl, rel=1e-4, abs=1e-9)
        for name in ("clip_low", "clip_high", "ratio_low", "ratio_high", "tokens", "tokens_advantage"):
            assert getattr(b.counts, name) == getattr(a.counts, name)
        for one, other in ((a.ledger.pg, b.ledger.pg), (a.ledger.npg, b.ledger.npg)):
            size = abs(one.reward) + abs(one.clip_low) + abs(one.clip_high)
            for name in ("reward", "clip_low", "clip_high"):
                assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-4 * size + 1e-9)
        for name in ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg"):
            assert getattr(b.ledger, name) == pytest.approx(getattr(a.ledger, name), rel=1e-3, abs=1e-7)
    for a, b in zip(whole_gradients, split_gradients, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_sums_of_ranks_add_up_to_those_of_the_batch(ranks: int) -> None:
    """The tokens of one update, dealt out to ranks whose weights are those of the whole batch."""
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(200, generator=rng) * 3
    given = [
        old + torch.randn(200, generator=rng) * 0.3,
        torch.rand(200, generator=rng),
        torch.randn(200, generator=rng),
        old,
        torch.randn(200, generator=rng).double(),
        torch.rand(200, generator=rng).double(),
    ]
    loss = PolicyLoss("clip", 0.1, 0.25)
    (whole,) = loss.sums([2.0], [UpdateTokens(*given)])
    dealt = [UpdateTokens(*(t[rank::ranks] for t in given)) for rank in range(ranks)]
    parts = loss.sums([2.0 / ranks] * ranks, dealt)
    total = reduce(operator.add, parts)
    assert total.counts == whole.counts
    assert (total.log_ratio_min, total.log_ratio_max) == (whole.log_ratio_min, whole.log_ratio_max)
    for name in ("loss", "entropy", "kl", "ratio"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    torch.testing.assert_close(total.profile.sums_3BC, whole.profile.sums_3BC, rtol=1e-12, atol=1e-12)
    assert total.ledger.npg.clip_low == pytest.approx(whole.ledger.npg.clip_low, rel=1e-12)
    assert total.ledger.y_pg == pytest.approx(whole.ledger.y_pg, rel=1e-12)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_the_ratio_at_inner_step_0_is_exactly_1_in_float32(budget: int) -> None:
    the_spec = spec(engine={"tokens_per_microbatch": budget})
    ours = trainer(the_spec)
    old = ours.score(batch())
    first = sums_of(ours.step(batch(), range(0, 8), old, spec_loss(the_spec)), the_spec)
    assert first.log_ratio_max == first.log_ratio_min == 0.0
    assert first.kl == 0.0
    assert int(first.counts.clip_low) == int(first.counts.clip_high) == 0
    second = sums_of(ours.step(batch(), range(8, 16), old, spec_loss(the_spec)), the_spec)
    assert second.log_ratio_max > 0.0


def test_the_noise_floor_comes_from_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored again in smaller micro-batches: the same numbers up to rounding, from other forward passes."""
    ours = trainer(spec())
    parts: list[list[int]] = []
    forward = ours._forward

    def noted(batch: Batch, part: Any) -> Any:
        parts.append(list(part))
        return forward(batch, part)

    monkeypatch.setattr(ours, "_forward", noted)
    first = ours.score(batch()).logprob_T[: batch().lengths_R[:8].sum()]
    scored = [part for part in parts if max(part) < 8]
    parts.clear()
    again = ours.score_otherwise(batch(), range(0, 8))
    torch.testing.assert_close(again, first, atol=1e-4, rtol=0)
    assert sorted(row for part in parts for row in part) == list(range(8))
    assert not [part for part in parts if part in scored]


def test_the_first_gradient_is_reinforce() -> None:
    """At ratio 1 the clipped surrogate and A·log π have one gradient."""
    ours = []
    for objective, epochs in [("clip", 2), ("reinforce", 1)]:
        the_spec = spec(loss={"objective": objective}, optim={"responses_per_update": 16, "epochs": epochs})
        one = trainer(the_spec)
        one.step(batch(), range(0, 16), one.score(batch()), spec_loss(the_spec))
        ours.append(gradients(one))
    for a, b in zip(*ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_responses_without_advantage_count_in_metrics_and_not_in_the_gradient() -> None:
    the_spec = spec()
    ours = trainer(the_spec)
    old = ours.score(batch())
    result = ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
    lengths = batch().lengths_R
    assert int(sums_of(result, the_spec).counts.tokens) == lengths[:8].sum()
    assert int(sums_of(result, the_spec).counts.tokens_advantage) == lengths[:4].sum()
    assert sums_of(result, the_spec).entropy == pytest.approx(
        float(old.entropy_T[: lengths[:8].sum()].double().sum()), rel=1e-6
    )


def test_a_batch_without_any_advantage_steps_with_a_zero_gradient() -> None:
    the_spec = spec(optim={"weight_decay": 0.0})
    ours = trainer(the_spec)
    silent = replace(batch(), advantages_R=np.zeros(16))
    before = [parameter.clone() for parameter in ours.parameters]
    result = ours.step(silent, range(0, 8), ours.score(silent), spec_loss(the_spec))
    assert result.grad_norm == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters, strict=True))


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = (run_updates(spec(engine={"gradient_checkpointing": flag})) for flag in (False, True))
    for a, b in zip(plain[2], checkpointed[2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bfloat16_trains_float32_masters_that_small_steps_move() -> None:
    """A step far under bfloat16's resolution moves the masters, and the working copy is their rounding."""
    the_spec = spec(model={"dtype": "bfloat16"}, optim={"lr": 1e-6})
    ours = trainer(the_spec, dtype="bfloat16")
    before = [master.clone() for master in ours.masters]
    ours.step(batch(), range(0, 8), ours.score(batch()), spec_loss(the_spec))
    for old, master, parameter in zip(before, ours.masters, ours.parameters, strict=True):
        assert master.dtype == torch.float32
        assert 0 < float((master - old).detach().abs().max()) < 3e-6
        assert torch.equal(parameter, master.bfloat16())


def test_a_step_that_is_not_finite_is_refused_before_it_is_taken() -> None:
    the_spec = spec()
    ours = trainer(the_spec)
    bad = replace(batch(), advantages_R=np.where(np.arange(16) == 2, np.inf, batch().advantages_R))
    before = [parameter.clone() for parameter in ours.parameters]
    with pytest.raises(DivergedError, match="not finite"):
        ours.step(bad, range(0, 8), ours.score(bad), spec_loss(the_spec))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters, strict=True))


def test_a_saved_model_is_one_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = trainer(spec())
    ours.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(ours.weights(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
