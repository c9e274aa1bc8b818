"""Probe states: exact over the vocabulary, and the change of their entropy predicted through the network.

A bigram policy with its own logits per state (the previous token) stands for the tabular case; the rest runs on a random
Llama and on the embedded model.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_llama
from test_trainer import batch, spec, spec_loss, sums_of, trainer
from torch import nn

from clipctl import load_spec, open_runs
from clipctl.engine import ProbeResult, UpdateResult
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.ledger import entropy_ledger
from clipctl.rollout import Batch, DrawKey, spread_states
from clipctl.spec import resolve_spec
from clipctl.train import train

PARTS = ("reward", "clip_low", "clip_high", "momentum", "decay", "rounding")
KEY = DrawKey(3, 0, 0)


class Bigram(nn.Module):
    """π(next | previous) = softmax(logits[:, previous] / τ): the hidden state is the previous token, one-hot."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(size, size, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(self.lm_head.weight, std=1.2)

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = torch.nn.functional.one_hot(input_ids, self.lm_head.in_features).float()
        return SimpleNamespace(last_hidden_state=hidden)


def every_state_once() -> Batch:
    """8 responses of 2 to 4 tokens over 40 words; no two tokens of them follow the same word. Two have no advantage."""
    words = iter(np.random.default_rng(5).permutation(40).tolist())
    prompts, responses = [], []
    for length in (3, 2, 4, 3, 2, 3, 4, 2):
        seen = [next(words) for _ in range(length)]
        prompts.append([7, seen[0]])
        responses.append([*seen[1:], 11])
    return Batch(prompts, responses, np.array([1.0, -0.5, -0.5, 0.0, 0.75, -0.75, 0.0, 0.25]), group_size=4)


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_for_a_tabular_policy_the_ledger_is_the_prediction_through_the_network(
    temperature: float, aggregation: str
) -> None:
    """Own logits per state, SGD, probe = batch, each state once: lr · term / (states · τ²), part by part; and the
    observed change is the predicted one up to lr²."""
    lr, states = 0.3, every_state_once()
    the_spec = resolve_spec(
        {
            "model": {"path": "bigram", "dtype": "float32"},
            "rollout": {"prompts": 2, "group_size": 4, "max_response_tokens": 8, "temperature": temperature},
            "clip": {"low": 0.05, "high": 0.02},
            "loss": {"aggregation": aggregation},
            "optim": {"optimizer": "sgd", "lr": lr, "weight_decay": 0.0, "responses_per_update": 8, "epochs": 3,
                      "grad_clip": 1e9},
        }
    )  # fmt: skip
    ours = TorchTrainer(Bigram(40), the_spec)
    old = ours.score(states)
    ours.keep_probe(states, spread_states(states.lengths_R, 10**6, KEY))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # π_k is not π_old: on both sides of both ε
        ours.model.lm_head.weight.add_(torch.randn(40, 40, generator=generator) * 0.1)
    found = ours.step(states, range(8), old, spec_loss(the_spec), "network")
    probe, sums = found.probe, sums_of(found, the_spec)
    ledger = sums.ledger
    assert probe is not None
    assert probe.network is not None
    assert probe.states == int(sums.counts.tokens) == int(states.lengths_R.sum())
    assert min(int(sums.counts.clip_low), int(sums.counts.clip_high)) > 0
    scale = lr / (probe.states * temperature**2)
    for part in ("reward", "clip_low", "clip_high"):
        assert probe.network[part] == pytest.approx(scale * getattr(ledger.pg, part), rel=2e-5), part
    # The whole is taken from the step itself, which float32 weights of size 1 hold to 6e-8 each.
    sizes = sum(abs(probe.network[part]) for part in PARTS)
    assert probe.network["total"] == pytest.approx(scale * ledger.pg.total, abs=2e-3 * sizes)
    observed = (probe.entropy_after - probe.entropy_before) / probe.states
    assert observed == pytest.approx(probe.network["total"], abs=0.02 * sizes)


def network_steps(optimizer: str, steps: int = 12, **changes: Any) -> list[ProbeResult]:
    """Steps on a random Llama, each measured through the network; probes are 40 tokens of the whole batch."""
    the_spec = spec(optim={"optimizer": optimizer, "epochs": 6, **changes})
    ours = trainer(the_spec)
    old = ours.score(batch())
    ours.keep_probe(batch(), spread_states(batch().lengths_R, 40, KEY))
    found = [
        ours.step(batch(), range(8 * (step % 2), 8 * (step % 2) + 8), old, spec_loss(the_spec), "network")
        for step in range(steps)
    ]
    return [result.probe for result in found if result.probe is not None]


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("sgd", {"lr": 1e-2, "weight_decay": 0.0}),
        ("sgd", {"lr": 3e-2, "weight_decay": 0.05, "grad_clip": 0.2}),
        ("adamw", {"lr": 2e-4}),
        ("adamw", {"lr": 2e-4, "weight_decay": 0.5, "betas": [0.8, 0.95], "grad_clip": 0.1}),
    ],
)
def test_the_parts_add_up_to_the_step_and_predict_the_change(optimizer: str, changes: dict[str, Any]) -> None:
    """Clip-low, clip-high, reward, momentum and decay sum to ⟨∇H, Δθ⟩ with the actual step, and observed changes lie on
    a line of slope 1 ± 5 % over it."""
    probes = network_steps(optimizer, **changes)
    predicted = np.array([probe.network["total"] for probe in probes if probe.network])
    observed = np.array([(probe.entropy_after - probe.entropy_before) / probe.states for probe in probes])
    for probe in probes:
        assert probe.network is not None
        parts = [probe.network[part] for part in PARTS]
        assert sum(parts) == pytest.approx(probe.network["total"], rel=1e-3, abs=2e-4 * sum(map(abs, parts)))
    last = probes[-1].network
    assert last is not None
    assert all(last[part] != 0 for part in ("reward", "clip_low", "clip_high"))
    assert (last["momentum"] != 0) == (optimizer == "adamw")
    assert (last["decay"] != 0) == (changes.get("weight_decay") != 0.0)
    slope = (observed @ predicted) / (predicted @ predicted)
    assert slope == pytest.approx(1.0, abs=0.05)
    assert np.corrcoef(observed, predicted)[0, 1] > 0.99


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 2e-5), ("sgd", 0.01)])
def test_on_the_embedded_model_the_prediction_has_slope_1(tmp_path: Path, optimizer: str, lr: float) -> None:
    overrides = {
        "optim.optimizer": optimizer, "optim.lr": lr, "run.steps": 2, "rollout.prompts": 16, "ledger.network_every": 2,
        "clip.low": 0.01, "clip.high": 0.01,
    }  # fmt: skip
    folder = train(load_spec("tiny", overrides), runs_dir=tmp_path)
    with open_runs(folder) as runs:
        query = "select probed, slope, correlation, sign_agreement from predictions where predictor = 'network_total'"
        ((probed, slope, correlation, agreement),) = runs.sql(query).fetchall()
        parts = " + ".join(f"network_{part}" for part in PARTS)
        sizes = " + ".join(f"abs(network_{part})" for part in PARTS)
        ((worst,),) = runs.sql(f"select max(abs({parts} - network_total) / ({sizes})) from probes").fetchall()
    assert probed == 16
    assert slope == pytest.approx(1.0, abs=0.05)
    assert correlation > 0.99
    assert agreement > 0.85
    assert worst < 1e-3


def test_the_exact_side_is_the_definition_by_enumeration() -> None:
    """p, q and both sides of both inequalities over the whole vocabulary, in float64 from transformers' own logits."""
    the_spec = spec(optim={"lr": 2e-2})
    ours = trainer(the_spec)
    old = ours.score(batch())
    chosen = spread_states(batch().lengths_R, 12, KEY)
    ours.keep_probe(batch(), chosen)
    before = log_probs(random_llama().double(), chosen)
    ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
    after_one = random_llama().double()
    after_one.load_state_dict(ours.model.state_dict())
    now = log_probs(after_one, chosen)
    result = ours.step(batch(), range(8, 16), old, spec_loss(the_spec), "probe").probe
    assert result is not None
    pi, entropy = np.exp(now), -(np.exp(now) * now).sum(-1)
    q = pi * (now + entropy[:, None])
    expected_q = (pi * q).sum(-1)
    for event, inside in (("x", np.exp(now - before) < 0.85), ("y", np.exp(now - before) > 1.3)):
        p = (pi * inside).sum(-1)
        assert p.min() > 0
        gap7 = expected_q - (pi * q * inside).sum(-1) / p
        gap8 = -(pi * now * inside).sum(-1) / p - entropy
        assert getattr(result.exact, f"{event}_mass") == pytest.approx(p.sum(), rel=1e-3)
        assert getattr(result.exact, f"{event}_pg") == pytest.approx((p * gap7).sum(), rel=1e-3)
        assert getattr(result.exact, f"{event}_npg") == pytest.approx((p * gap8).sum(), rel=1e-3)
    assert result.entropy_before == pytest.approx(entropy.sum(), rel=1e-5)
    ours.model.double()
    assert result.entropy_after == pytest.approx(
        -sum((np.exp(z) * z).sum() for z in log_probs(ours.model, chosen)), rel=1e-5
    )


def log_probs(model: Any, chosen: list[tuple[int, int]]) -> np.ndarray:
    """log π [N,V] at (response, token) states, temperature 1.3, one full forward pass a state."""
    rows = []
    for row, token in chosen:
        text = batch().prompt_ids[row] + batch().response_ids[row][:token]
        rows.append(torch.log_softmax(model(torch.tensor([text])).logits[0, -1] / 1.3, -1).detach().numpy())
    return np.stack(rows)


def test_sampled_estimates_converge_to_the_exact_sides(tmp_path: Path) -> None:
    """The embedded model after 20 updates, 24 states, 40 000 actions of π_old in each: the ledger of the samples is
    within 5 standard errors of the ledger of all actions, which is over 10 of them away from 0."""
    from clipctl.engine.attention import use_grouped_attention
    from clipctl.models import find_model, load_causal_lm

    rng = np.random.default_rng(0)
    prompts = [[int(n) for n in rng.integers(10, 30, 8)] for _ in range(8)]
    states = Batch(prompts, [rng.integers(10, 40, 12).tolist() for _ in range(8)], rng.normal(size=8), group_size=4)
    the_spec = load_spec("tiny", {"optim.responses_per_update": 8, "rollout.prompts": 1, "optim.lr": 3e-4})
    ours = TorchTrainer(
        use_grouped_attention(load_causal_lm(find_model("tiny", pull=False), "float32", "cpu")), the_spec
    )
    old = ours.score(states)
    ours.keep_probe(states, spread_states(states.lengths_R, 24, KEY))
    for _ in range(20):
        ours.step(states, range(8), old, spec_loss(the_spec))
    assert ours.probe is not None
    exact = ours.probe.compare(spec_loss(the_spec)).exact
    ((part, logp, found),) = [
        (part, ours.probe._logp(hidden), found)
        for part in ours.probe.parts
        for hidden, _, found in [ours.probe._statistics(part)]
    ]
    torch.manual_seed(4)
    actions = torch.multinomial(part.old_logp_NV.exp(), 40_000, replacement=True)
    pairs = [source.gather(1, actions) for source in (logp, part.old_logp_NV)]
    zero, mask = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    batches = [
        entropy_ledger(
            *(pair[:, at : at + 400] for pair in pairs), zero, found.entropy_T[:, None], found.expected_q_T[:, None], mask,
            eps_low=0.1, eps_high=0.1, weight=torch.tensor(1 / 400),
        )
        for at in range(0, 40_000, 400)
    ]  # fmt: skip
    for name in ("x_mass", "x_pg", "x_npg", "y_mass", "y_pg", "y_npg"):
        values = np.array([getattr(sampled, name) for sampled in batches])
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - getattr(exact, name)) < 5 * error, name
        assert abs(getattr(exact, name)) > 10 * error, name


def test_measuring_does_not_change_the_run(tmp_path: Path) -> None:
    """Weights, losses and samples are the same, bit for bit, with no probe and with every update through the network."""
    small = {
        "run.steps": 2,
        "rollout.prompts": 8,
        "rollout.group_size": 4,
        "optim.responses_per_update": 16,
        "optim.epochs": 2,
    }
    series, models = [], []
    for name, states, every in (("plain", 0, 0), ("probed", 64, 1)):
        changes = {"run.name": name, "ledger.probe_states": states, "ledger.network_every": every}
        folder = train(load_spec("tiny", small | changes), runs_dir=tmp_path)
        with open_runs(folder) as runs:
            series.append(runs.sql("select loss, grad_norm, pg_total, kl from updates order by all").fetchall())
            assert runs.sql("select count(*) from probes").fetchall() == [(8 if every else 0,)]
        models.append((folder / "checkpoints" / "2" / "model.safetensors").read_bytes())
    assert series[0] == series[1]
    assert models[0] == models[1]


@pytest.mark.parametrize("engine", [{"gradient_checkpointing": True}, {"tokens_per_microbatch": 40}])
def test_layouts_give_one_prediction(engine: dict[str, Any]) -> None:
    results: list[UpdateResult] = []
    for options in ({}, engine):
        the_spec = spec(engine=options)
        ours = trainer(the_spec)
        old = ours.score(batch())
        ours.keep_probe(batch(), spread_states(batch().lengths_R, 20, KEY))
        ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
        results.append(ours.step(batch(), range(8, 16), old, spec_loss(the_spec), "network"))
    one, other = (result.probe for result in results)
    assert one is not None
    assert other is not None
    assert one.network == pytest.approx(other.network, rel=2e-3, abs=1e-8)
    assert one.exact.y_pg == pytest.approx(other.exact.y_pg, rel=1e-3)


@pytest.mark.parametrize("lr", [1e-4, 3e-5])
def test_a_bfloat16_model_is_predicted_as_it_moves_rounding_included(lr: float) -> None:
    """Against the entropy of the same states in float32 arithmetic with the bfloat16 weights before and after the step:
    bfloat16 arithmetic itself would bury a change of this size. At 1e-4 most of the step is rounded away or up."""
    the_spec = spec(model={"dtype": "bfloat16"}, optim={"lr": lr})
    ours = trainer(the_spec, dtype="bfloat16")
    old = ours.score(batch())
    chosen = spread_states(batch().lengths_R, 40, KEY)
    ours.keep_probe(batch(), chosen)
    ours.step(batch(), range(0, 8), old, spec_loss(the_spec))
    before = entropy_in_float32(ours.model, chosen)
    probe = ours.step(batch(), range(8, 16), old, spec_loss(the_spec), "network").probe
    after = entropy_in_float32(ours.model, chosen)
    assert probe is not None
    assert probe.network is not None
    parts = [probe.network[part] for part in PARTS]
    assert sum(parts) == pytest.approx(probe.network["total"], abs=0.02 * sum(map(abs, parts)))
    assert probe.network["rounding"] != 0
    # The slope comes from a bfloat16 backward pass, good to about a hundredth of its size.
    assert probe.network["total"] == pytest.approx(after - before, abs=0.05 * sum(map(abs, parts)))


def entropy_in_float32(model: Any, chosen: list[tuple[int, int]]) -> float:
    """Mean entropy of the states at temperature 1.3 under the model's weights, nats."""
    exact = random_llama()
    exact.load_state_dict(model.state_dict())
    logp = log_probs(exact, chosen)
    return float(-(np.exp(logp) * logp).sum(-1).mean())


def test_states_are_spread_over_the_responses() -> None:
    lengths = np.array([5, 1, 9, 3, 7])
    few = spread_states(lengths, 3, KEY)
    assert len({row for row, _ in few}) == len(few) == 3
    more = spread_states(lengths, 12, KEY)
    counts = [sum(row == at for row, _ in more) for at in range(5)]
    assert sum(counts) == len(set(more)) == 12
    assert counts[1] == 1
    assert max(counts) - min(count for at, count in enumerate(counts) if at != 1) <= 1
    assert all(0 <= token < lengths[row] for row, token in more)
    assert spread_states(lengths, 100, KEY) == [(row, token) for row in range(5) for token in range(lengths[row])]
    assert more == spread_states(lengths, 12, KEY)
    assert more != spread_states(lengths, 12, DrawKey(3, 1, 0))
