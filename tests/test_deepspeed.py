"""The DeepSpeed trainer against the torch trainer: the same steps from the same responses, alone and as two processes."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_llama
from test_trainer import batch, spec, spec_loss

import clipctl.engine.deepspeed_setup as setup
from clipctl.engine import Scores, Trainer
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.deepspeed_config import deepspeed_config
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import DependencyError, DivergedError, SpecError
from clipctl.loss import UpdateTokens
from clipctl.rollout import Batch
from clipctl.spec import RunSpec, load_spec, spec_from_json, spec_json
from clipctl.training_state import MASTERS, MOMENTS, checkpoint_bytes_per_weight, training_state

pytestmark = pytest.mark.engines
STATES = [(0, 0), (5, 0), (9, 0), (14, 0)]
CASES = [
    (0, "float32", "none"),
    (1, "float32", "none"),
    (2, "float32", "none"),
    (3, "float32", "none"),
    (0, "bfloat16", "none"),
    (1, "bfloat16", "none"),
    (2, "bfloat16", "none"),
    (3, "bfloat16", "none"),
    (2, "float32", "optimizer"),
    (2, "bfloat16", "optimizer"),
    (3, "bfloat16", "all"),
]


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """The process group of one test is none of the next one's."""
    yield
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def deep_spec(stage: int, dtype: str = "float32", offload: str = "none", **changes: dict[str, Any]) -> RunSpec:
    """Micro-batches of at most 60 padded tokens, three and more a step, and a gradient that is cut."""
    engine = {
        "trainer": "deepspeed",
        "deepspeed": {"zero_stage": stage, "offload": offload},
        "tokens_per_microbatch": 60,
    }
    optim = {"lr": 2e-3, "grad_clip": 0.05} | changes.pop("optim", {})
    return spec(
        engine=engine | changes.pop("engine", {}),
        optim=optim,
        model={"dtype": dtype},
        ledger={"probe_every": 1},
        **changes,
    )


def deep(the_spec: RunSpec, **model: Any) -> Any:
    from clipctl.engine.deepspeed_trainer import DeepSpeedTrainer

    return DeepSpeedTrainer(use_grouped_attention(random_llama(dtype=the_spec.model.dtype, **model)), the_spec)


def plain(the_spec: RunSpec, **model: Any) -> TorchTrainer:
    return TorchTrainer(use_grouped_attention(random_llama(dtype=the_spec.model.dtype, **model)), the_spec)


def policy(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.weights()}


def steps(trainer: Trainer, the_spec: RunSpec, count: int = 4, old: Scores | None = None) -> list[Any]:
    old = trainer.score(batch()) if old is None else old
    trainer.keep_probe(batch(), STATES)
    return [
        trainer.step(batch(), range(8 * (at % 2), 8 * (at % 2) + 8), old, spec_loss(the_spec), "probe")
        for at in range(count)
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("stage", "dtype", "offload"), CASES)
def test_steps_are_those_of_the_torch_trainer(stage: int, dtype: str, offload: str, optimizer: str) -> None:
    """Four steps with ratios that leave 1, whose gradients are cut; tied weights, unequal micro-batches.

    Gradients differ in the order of sums alone: measured 1e-6 of the norm and 4e-6 nat, and nothing with ZeRO-0. In bfloat16
    both add rounded gradients up in float32 (measured: the same), but a step may end on the other side of a rounding of the
    working copy. ZeRO-2 with offload adds micro-batches up in bfloat16.
    """
    the_spec = deep_spec(
        stage, dtype, offload, optim={"optimizer": optimizer} | ({"lr": 0.5} if optimizer == "sgd" else {})
    )
    ours, reference = deep(the_spec), plain(the_spec)
    old = reference.score(batch())
    scored = ours.score(batch())
    torch.testing.assert_close(scored.logprob_T, old.logprob_T, rtol=0, atol=0)
    found, expected = steps(ours, the_spec, old=old), steps(reference, the_spec, old=old)
    rtol, atol = (1e-5, 2e-6) if dtype == "float32" else (2e-3, 2e-4) if offload != "optimizer" else (1e-2, 1e-3)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.grad_norm > 2 * the_spec.optim.grad_clip
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=rtol)
        assert mine.loss == pytest.approx(theirs.loss, rel=rtol, abs=atol)
        for name in UpdateTokens.__slots__:
            torch.testing.assert_close(
                getattr(mine.tokens, name), getattr(theirs.tokens, name), rtol=rtol, atol=10 * atol
            )
        for name in ("entropy_before", "entropy_after"):
            assert getattr(mine.probe, name) == pytest.approx(getattr(theirs.probe, name), rel=rtol)
        assert mine.probe.exact.pg.total == pytest.approx(theirs.probe.exact.pg.total, rel=1e-2, abs=atol)
    assert found[-1].tokens.logprob_T.sub(old.logprob_T[-len(found[-1].tokens.logprob_T) :]).abs().max() > 0.02
    begun, reached = policy(plain(the_spec)), policy(reference)
    for name, tensor in policy(ours).items():
        moved = (reached[name] - begun[name]).abs().max()
        assert moved > 0
        assert (tensor - reached[name]).abs().max() <= (2e-3 if dtype == "float32" else 0.2) * moved, name


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_a_batch_without_advantage_moves_by_momentum_and_decay_alone(stage: int, dtype: str) -> None:
    """DeepSpeed steps after a backward pass, so there is one, of weight zero; and then none is left over for the next step."""
    the_spec = deep_spec(stage, dtype, optim={"weight_decay": 0.5})
    ours, reference = deep(the_spec), plain(the_spec)
    old = reference.score(batch())
    for trainer in (ours, reference):
        trainer.step(batch(), range(0, 8), old, spec_loss(the_spec))
        result = trainer.step(batch(), range(4, 8), old, spec_loss(the_spec))
        assert (result.grad_norm, result.loss) == (0.0, 0.0)
    for name, tensor in policy(ours).items():
        torch.testing.assert_close(
            tensor, policy(reference)[name], rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=1e-5
        )
    found, expected = (t.step(batch(), range(8, 16), old, spec_loss(the_spec)).grad_norm for t in (ours, reference))
    assert found == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_untied_weights_recomputed_activations(stage: int) -> None:
    """The head is a weight of its own, and every layer's forward pass runs again within the backward pass."""
    the_spec = deep_spec(stage, engine={"gradient_checkpointing": True})
    ours, reference = deep(the_spec, tie_word_embeddings=False), plain(the_spec, tie_word_embeddings=False)
    assert "lm_head.weight" in dict(ours.weights())
    old = reference.score(batch())
    for mine, theirs in zip(steps(ours, the_spec, old=old), steps(reference, the_spec, old=old), strict=True):
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32")])
def test_an_update_that_is_not_finite_is_not_taken(stage: int, dtype: str) -> None:
    the_spec = deep_spec(stage, dtype)
    ours = deep(the_spec)
    old = ours.score(batch())
    before = policy(ours)
    broken = batch()
    # ZeRO-3 takes the norm in float64, where this one is finite.
    broken.advantages_R[0] = 1e38 if stage < 3 else np.inf
    with pytest.raises(
        DivergedError, match=r"the update is not finite: loss .*, gradient norm .*; the step was not taken"
    ):
        ours.step(broken, range(0, 8), old, spec_loss(the_spec))
    broken.advantages_R[0] = np.nan
    with pytest.raises(DivergedError, match="loss nan"):
        ours.step(broken, range(0, 8), old, spec_loss(the_spec))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy(ours).items())


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_a_saved_trainer_goes_on_bit_for_bit(stage: int, dtype: str, tmp_path: Path) -> None:
    """From its folder, which transformers loads, its state, and the probe states as they were kept."""
    from clipctl.engine.deepspeed_trainer import DeepSpeedTrainer
    from clipctl.models import load_causal_lm

    the_spec = deep_spec(stage, dtype)
    plain(the_spec).save(tmp_path / "first")
    ours = DeepSpeedTrainer(use_grouped_attention(load_causal_lm(tmp_path / "first", dtype, "cpu")), the_spec)
    old = ours.score(batch())
    steps(ours, the_spec, 2, old)
    (tmp_path / "state").mkdir()
    ours.save(tmp_path)
    ours.save_state(tmp_path / "state", probe=True)
    loaded = load_causal_lm(tmp_path, dtype, "cpu")
    assert {name: tensor.dtype for name, tensor in loaded.named_parameters()}.items() == {
        name: tensor.dtype for name, tensor in ours.weights()
    }.items()
    assert all(torch.equal(tensor, policy(ours)[name]) for name, tensor in loaded.named_parameters())
    again = DeepSpeedTrainer(use_grouped_attention(loaded), the_spec)
    again.load_state(tmp_path / "state")
    again.keep_probe(batch(), STATES, tmp_path / "state")
    for rows in (range(0, 8), range(8, 16)):
        first, second = (t.step(batch(), rows, old, spec_loss(the_spec), "probe") for t in (ours, again))
        assert (first.grad_norm, first.loss, first.probe) == (second.grad_norm, second.loss, second.probe)
        assert torch.equal(first.tokens.logprob_T, second.tokens.logprob_T)
    assert all(torch.equal(tensor, policy(ours)[name]) for name, tensor in policy(again).items())


def test_with_zero_3_the_sampler_has_a_copy_that_follows() -> None:
    """Until it gets the weights of a step it has those before it."""
    from clipctl.engine import open_engine
    from clipctl.engine.agreement import disagreements, make_probe, push_weights
    from clipctl.models import find_model

    changes = {
        "engine.trainer": "deepspeed",
        "engine.deepspeed.zero_stage": 3,
        "ledger.network_every": 0,
        "optim.lr": 1e-2,
    }
    the_spec, rng = load_spec("tiny", changes), np.random.default_rng(0)
    pair = open_engine(the_spec, find_model("tiny", pull=False), 64, print)
    assert not pair.shared
    probe = make_probe(the_spec, list(range(5, 40)), frozenset({2}))
    assert max(disagreements(pair, probe)) < 1e-4
    tokens = rng.integers(5, 100, (8, 12)).tolist()
    asked = Batch([[5, 6, 7]] * 8, tokens, np.tile([1.0, -1.0], 4), 8)
    pair.trainer.step(asked, range(8), pair.trainer.score(asked), spec_loss(the_spec))
    assert max(disagreements(pair, probe)) > 1e-2
    push_weights(pair, 1, probe)
    assert max(disagreements(pair, probe)) < 1e-4


@pytest.mark.parametrize("stage", [0, 2])
def test_a_full_disk_is_an_error_of_the_disk(stage: int, tmp_path: Path) -> None:
    ours = deep(deep_spec(stage))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write|too large"):
            ours.save_state(tmp_path, probe=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_are_gathered_and_written_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO-3, in buckets of a few tensors and in several files; what was given out stays whole."""
    import clipctl.engine.deepspeed_trainer as module
    import clipctl.engine.model_folder as writing
    from clipctl.models import load_causal_lm

    monkeypatch.setattr(module, "BUCKET", 15000)
    monkeypatch.setattr(writing, "FILE_BYTES", 60000)
    ours, reference = deep(deep_spec(3)), plain(deep_spec(3))
    sizes = [
        [parameter.ds_numel for _, parameter in bucket]
        for bucket in module.buckets(list(ours.model.named_parameters()))
    ]
    assert len(sizes) > 3
    assert all(sum(size) <= 15000 or len(size) == 1 for size in sizes)
    held: list[int] = []
    for _ in ours.weights():
        held.append(sum(parameter.numel() for parameter in ours.model.parameters()))
    small = sum(parameter.ds_numel for parameter in ours.model.parameters() if parameter.ds_persist)
    assert max(held) <= small + max(map(sum, sizes))
    given = dict(ours.weights())
    assert given.keys() == dict(reference.weights()).keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in reference.weights())
    ours.save(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not list(tmp_path.glob(".*"))
    loaded = load_causal_lm(tmp_path, "float32", "cpu")
    assert all(torch.equal(tensor, given[name]) for name, tensor in loaded.named_parameters())
    reference.save(tmp_path / "plain")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((tmp_path / "plain" / name).read_text())


def test_the_configuration_follows_from_the_spec() -> None:
    config = deepspeed_config(deep_spec(2, "bfloat16"), 7000)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7000}
    assert deepspeed_config(deep_spec(2), 3 * 10**9)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert config["gradient_clipping"] == 0.05
    assert config["bf16"]["enabled"]
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    mine = {"zero_optimization": {"reduce_bucket_size": 5000, "overlap_comm": False}, "communication_data_type": "bf16"}
    engine = {"deepspeed": {"zero_stage": 3, "offload": "all", "config": mine}}
    the_spec = deep_spec(3, engine=engine)
    merged = deepspeed_config(the_spec, 7000)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5000
    assert merged["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert merged["communication_data_type"] == "bf16"
    assert spec_from_json(spec_json(the_spec)) == the_spec
    ours = deep(deep_spec(2, engine={"deepspeed": {"config": {"zero_optimization": {"reduce_bucket_size": 5000}}}}))
    assert ours.engine.zero_reduce_bucket_size() == 5000


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "bfloat16")]
)
def test_the_plan_counts_what_deepspeed_holds(stage: int, dtype: str, tmp_path: Path) -> None:
    """Bytes of the tensors, and of the files, that are there after a step."""
    the_spec = deep_spec(stage, dtype)
    ours = deep(the_spec)
    steps(ours, the_spec, 1)
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in ours.parameters)
    held = training_state(the_spec, count, 1)
    masters = (
        ours.engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else [master for group in ours.engine.basic_optimizer.param_groups for master in group["params"]]
    )
    moments = [
        tensor
        for state in ours.engine.basic_optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    ]
    if stage == 3:
        assert {bucket.buffer.numel() for bucket in ours.engine.optimizer.ipg_buckets.values()} == {count}
    # Flat tensors are padded to a few values.
    assert sum(master.nbytes for master in masters) == pytest.approx(held[MASTERS], rel=1e-3)
    assert sum(moment.nbytes for moment in moments) == pytest.approx(held[MOMENTS], rel=1e-3)
    ours.save(tmp_path)
    ours.save_state(tmp_path, probe=False)
    files = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix in (".pt", ".safetensors"))
    assert files == pytest.approx(checkpoint_bytes_per_weight(the_spec) * count, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine.deepspeed.config.zero_optimization.stage": 1}, "is ruled by engine.deepspeed.zero_stage"),
        ({"engine.deepspeed.config.optimizer.type": "Lion"}, "config.optimizer.type: is ruled by optim.optimizer"),
        ({"engine.deepspeed.config.train_batch_size": 8}, "is ruled by optim.responses_per_update"),
        ({"engine.deepspeed.config.zero_optimisation.x": 1}, r"not passed on \(did you mean zero_optimization\?\)"),
        ({"engine.deepspeed.offload": "all"}, "offload = 'all' needs zero_stage = 3, found 2"),
        ({"engine.deepspeed.offload": "optimizer", "engine.deepspeed.zero_stage": 0}, "needs zero_stage 1, 2 or 3"),
        ({"engine.deepspeed.zero_stage": 4}, "engine.deepspeed.zero_stage: input should be 0, 1, 2 or 3, found 4"),
        ({"ledger.network_every": 64}, "set ledger.network_every = 0, or engine.trainer = 'torch'"),
        ({"engine.trainer": "torch", "engine.deepspeed.zero_stage": 3}, "no effect with trainer = 'torch'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_spec("tiny", {"engine.trainer": "deepspeed", "ledger.network_every": 0} | changes)


def test_a_key_that_deepspeed_does_not_know_is_a_wrong_spec() -> None:
    wrong = {"deepspeed": {"config": {"zero_optimization": {"reduce_bucket": 5000}}}}
    with pytest.raises(SpecError, match=r"engine\.deepspeed\.config: .*reduce_bucket"):
        deep(deep_spec(2, engine=wrong))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"deepspeed is not installed; pip install 'clipctl\[deepspeed\]'"):
        setup.check_deepspeed()
