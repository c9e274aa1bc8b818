"""What --dry-run says, against numbers made by hand."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_llama
from memory_lab import PeakBytes, training_peak
from torch._subclasses.fake_tensor import FakeTensorMode

from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.torch_sampler import draw_tokens
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import SpecError
from clipctl.models import MODELS, ModelShape
from clipctl.plan import (
    ACTIVATIONS,
    BINS,
    CHUNK_ELEMENTS,
    GRADIENTS_16,
    KV_CACHE,
    NETWORK,
    NUCLEUS_BUFFERS,
    PROBES,
    SAMPLING,
    SAMPLING_BUFFERS,
    STATISTICS,
    WHILE_TRAINING,
    clip_warnings,
    context_warnings,
    disk_per_rollout,
    make_plan,
    memory,
    memory_warnings,
    peak_memory,
    plan_lines,
    zero_advantage_share,
)
from clipctl.spec import RunSpec, load_spec
from clipctl.statistics import float32_logits


def spec(preset: str = "qwen3b-gsm8k", **overrides: Any) -> RunSpec:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_spec(
        preset, ({"engine.statistics": "torch"} if changes.get("engine.device") == "cpu" else {}) | changes
    )


def test_the_3b_run_by_hand() -> None:
    """3 085 938 688 weights: 2 bytes bfloat16, 4 float32 master, 2+4 gradients, 8 AdamW; 36 layers × 2 heads × 128 × 2."""
    plan = make_plan(spec())
    count = 3_085_938_688
    assert (plan.responses, plan.updates, plan.clippable_updates) == (4096, 16, 15)
    assert plan.max_response_tokens == 4096 * 4096
    assert plan.memory["weights"] == 2 * count
    assert plan.memory["float32 master weights"] == plan.memory["float32 gradients"] == 4 * count
    assert plan.memory["AdamW moments"] == 8 * count
    assert plan.memory[GRADIENTS_16] == 2 * count
    assert plan.memory[KV_CACHE] == 128 * (512 + 4096) * 36 * 2 * 2 * 128 * 2
    assert plan.memory[SAMPLING] == 12 * 4 * 128 * 151936, "it is evaluated with top_p = 0.95"
    assert memory(spec(eval__every=0), MODELS["qwen2.5-3b-instruct"].shape)[SAMPLING] == 5 * 4 * 128 * 151936
    assert plan.memory[STATISTICS] == 3 * 4 * 2**23 + 4 * 16384 * 2048 + 2 * 151936 * 2048
    assert plan.disk_model == 2 * count


def test_an_engine_on_several_gpus_is_of_one_process() -> None:
    spread = spec("tiny", engine__sampler="vllm", engine__device="cuda", engine__vllm__tensor_parallel=2)
    assert "on 2 GPUs" in "\n".join(plan_lines(make_plan(spread)))
    with pytest.raises(
        SpecError, match=r"engine\.vllm\.tensor_parallel = 2: each of 4 processes has an engine on its own GPU"
    ):
        make_plan(spread, 4)


def test_zero_stages_by_hand() -> None:
    """Llama-3-8B in bfloat16, 8 processes: of each weight 2 bytes, 4 for its master, 8 of moments, 4 of gradient, shared."""
    count = 8_030_261_248
    share = count // 8
    deep = {"engine__trainer": "deepspeed"}
    two = make_plan(spec("llama8b-gsm8k", **deep), 8).memory
    assert two["weights"] == 2 * count
    assert (two["float32 master weights"], two["float32 gradients"], two["AdamW moments"]) == (
        4 * share,
        4 * share,
        8 * share,
    )
    assert two["gradients that are being summed"] == 4 * 500_000_000
    assert "weights of the sampler" not in two
    one = make_plan(spec("llama8b-gsm8k", **deep, engine__deepspeed__zero_stage=1), 8).memory
    assert (one["float32 gradients"], one["bfloat16 gradients"], one["AdamW moments"]) == (
        4 * count,
        2 * count,
        8 * share,
    )
    three = spec("llama8b-gsm8k", **deep, engine__deepspeed__zero_stage=3)
    held = make_plan(three, 8).memory
    assert (held["weights"], held["weights of the sampler"]) == (2 * share, 2 * count)
    assert held["weights that are whole at a time"] == 2 * 1_000_000_000
    away = spec("llama8b-gsm8k", **deep, engine__deepspeed__zero_stage=3, engine__deepspeed__offload="all")
    plan = make_plan(away, 8)
    assert not {"weights", "AdamW moments", "float32 gradients", "float32 master weights"} & plan.memory.keys()
    lines = "\n".join(plan_lines(plan))
    assert f"{18 * share / 2**30:.1f} GiB more of the machine's memory for each process" in lines
    assert "in each of 8 processes" in lines
    assert "trainer:        DeepSpeed, ZeRO-3, all weights and moments in the machine's memory" in lines
    assert "processes:      8, each with 1/8 of model, gradients and optimizer, 64 of 512 prompts a rollout" in lines
    assert (
        make_plan(spec("llama8b-gsm8k", **deep, engine__deepspeed__zero_stage=0), 8).memory
        == make_plan(spec("llama8b-gsm8k"), 8).memory
    )


def test_sampling_and_training_take_turns_in_memory() -> None:
    held = {"a": 5, KV_CACHE: 7, SAMPLING: 1, ACTIVATIONS: 2, STATISTICS: 3}
    assert peak_memory(held) == 5 + 7 + 1
    assert peak_memory(held | {ACTIVATIONS: 20}) == 5 + 20 + 3
    assert peak_memory(held | {GRADIENTS_16: 2}) == 5 + 7 + 1
    assert peak_memory(held | {GRADIENTS_16: 9}) == 5 + 9 + 2 + 3


def saved_bytes(layers: int, dtype: str, checkpointing: bool) -> int:
    """Bytes that autograd keeps for a backward pass through so many Llama layers, weights apart, of 2 × 96 tokens."""
    model = use_grouped_attention(random_llama(num_hidden_layers=layers, dtype=dtype, **WIDE))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model.model(input_ids=torch.arange(192).view(2, 96), use_cache=False)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights)


WIDE = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_activations_is_what_autograd_keeps(dtype: str, checkpointing: bool) -> None:
    """Each further layer costs what autograd says, within 10 %; a checkpointed one exactly its input."""
    measured = saved_bytes(5, dtype, checkpointing) - saved_bytes(2, dtype, checkpointing)
    changes = {
        "model__dtype": dtype,
        "engine__gradient_checkpointing": checkpointing,
        "engine__tokens_per_microbatch": 192,
    }
    shapes = [ModelShape(300, 128, layers, 4, 1, 32, 448, True, 512) for layers in (2, 5)]
    two, five = (memory(spec(**changes), shape)[ACTIVATIONS] for shape in shapes)
    assert five - two == pytest.approx(measured, rel=0.0 if checkpointing else 0.1)


@pytest.mark.parametrize(
    ("model", "layers", "checkpointing", "tokens", "dtype"),
    [
        ("qwen2.5-3b-instruct", 36, True, 16384, "bfloat16"),
        ("qwen2.5-3b-instruct", 3, False, 8192, "bfloat16"),
        ("smollm2-135m-instruct", 30, False, 4096, "float32"),
        ("llama-3-8b-instruct", 2, True, 4096, "bfloat16"),
    ],
)
def test_the_peak_of_training_is_that_of_a_whole_step(
    model: str, layers: int, checkpointing: bool, tokens: int, dtype: str
) -> None:
    """Every byte that a full micro-batch holds, on tensors without memory, within 15 %; never too little by more than 2."""
    shape = replace(MODELS[model].shape, layers=layers)
    changes = {"model__dtype": dtype, "engine__gradient_checkpointing": checkpointing, "ledger__probe_states": 0}
    # Plain operations: the kernels have no version for tensors without memory, and hold no more.
    asked = spec(engine__tokens_per_microbatch=tokens, engine__statistics="torch", **changes)
    held = memory(asked, shape)
    planned = peak_memory(held | {KV_CACHE: 0, SAMPLING: 0})
    assert 0.98 <= planned / training_peak(asked, shape, prompt=128, response=384) <= 1.15


def test_the_buffers_of_a_sampling_step_are_counted() -> None:
    for top_p, buffers in ((1.0, SAMPLING_BUFFERS), (0.9, NUCLEUS_BUFFERS)):
        with FakeTensorMode():
            hidden_BD, head_VD, uniform_B = (
                torch.empty(64, 32),
                torch.empty(49152, 32),
                torch.empty(64, dtype=torch.float64),
            )
            with PeakBytes([hidden_BD, head_VD]) as counted:
                before = counted.now
                logits_BV = float32_logits(hidden_BD, head_VD)
                scaled_BV = logits_BV / 1.0
                draw_tokens(scaled_BV, uniform_B, top_p)
        assert counted.peak - before == pytest.approx(buffers * 4 * 64 * 49152, rel=0.02)


def test_adamw_keeps_two_moments_of_each_weight() -> None:
    trainer = TorchTrainer(use_grouped_attention(random_llama(dtype="bfloat16")), spec())
    for master in trainer.masters:
        master.grad = torch.ones_like(master)
    trainer._move()
    state = trainer.optimizer.state_dict()["state"].values()
    count = sum(parameter.numel() for parameter in trainer.parameters)
    kept = sum(value.nbytes for values in state for name, value in values.items() if name != "step")
    assert kept == 8 * count


def test_the_chunks_are_those_of_the_statistics() -> None:
    """plan has its own copy, because it must not load torch."""
    from clipctl import statistics

    assert CHUNK_ELEMENTS == statistics.CHUNK_ELEMENTS


@pytest.mark.parametrize(
    ("reward", "share"),
    [
        ({"kind": "bernoulli", "p": 0.3}, 0.3**8 + 0.7**8),
        ({"kind": "rademacher"}, 2 / 256),
        ({"kind": "normal"}, 0.0),
        ({"kind": "uniform"}, 0.0),
        ({"kind": "gsm8k"}, None),
    ],
)
def test_expected_share_of_groups_without_advantage(reward: dict[str, Any], share: float | None) -> None:
    found = zero_advantage_share(spec(reward=reward))
    assert found is None if share is None else found == pytest.approx(share, rel=1e-12)


def test_warnings_where_clipping_cannot_have_an_effect() -> None:
    assert clip_warnings(spec()) == []
    (one,) = clip_warnings(spec(optim__responses_per_update=4096))
    assert "one update a rollout" in one
    (reinforce,) = clip_warnings(spec(optim__responses_per_update=4096, loss__objective="reinforce"))
    assert "never clips" in reinforce
    (off,) = clip_warnings(spec(clip__low=1.0, clip__high=float("inf")))
    assert "both off" in off
    assert make_plan(spec(clip__low=1.0, clip__high=float("inf"))).clippable_updates == 0
    assert make_plan(spec(optim__epochs=3)).clippable_updates == 47
    assert clip_warnings(spec(clip__low=1.0)) == clip_warnings(spec(clip__high=float("inf"))) == []


def test_a_context_that_is_too_short_is_said() -> None:
    shape = MODELS["olmo-2-0425-1b-instruct"].shape
    assert context_warnings(spec("olmo1b-random"), shape) == []
    (warning,) = context_warnings(spec("olmo1b-random", rollout__max_response_tokens=4000), shape)
    assert "4096 positions: with prompts of more than 96 tokens" in warning


def test_memory_that_is_not_there_is_said() -> None:
    held = {"weights": 30 * 2**30, "AdamW moments": 20 * 2**30, KV_CACHE: 31 * 2**30, SAMPLING: 0, ACTIVATIONS: 1,
            STATISTICS: 1}  # fmt: skip
    (warning,) = memory_warnings(spec(), held)
    assert "about 81.0 GiB in one device, and a large GPU has 80.0 GiB; 50.0 GiB of it are weights" in warning
    assert memory_warnings(spec(), held | {KV_CACHE: 29 * 2**30}) == []
    (warning,) = memory_warnings(spec(engine__device="cpu"), held | {"weights": 10**16})
    assert "this machine has" in warning
    assert memory_warnings(spec(engine__device="cpu"), dict.fromkeys(held, 10)) == []


def test_disk_of_a_rollout_by_hand() -> None:
    """512 samples of 24 tokens at most, 64 updates of 168 bins at most; texts 2 bytes a token, per-token rows 16."""
    rows = 300 + 64 * 300 + 512 * 90 + 64 * 168 * 20
    assert disk_per_rollout(spec("tiny", store__texts=False)) == rows
    assert disk_per_rollout(spec("tiny")) == rows + 2 * 512 * 24
    assert disk_per_rollout(spec("tiny", store__tokens="all")) == rows + (2 + 16) * 512 * 24
    assert disk_per_rollout(spec("tiny", store__tokens=0.25)) == rows + (2 + 4) * 512 * 24
    assert disk_per_rollout(spec("tiny", store__texts=False, rollout__dynamic_sampling=True)) == rows + 4 * 512 * 90


def test_the_bins_of_a_histogram_are_counted() -> None:
    from clipctl.whatif import profile_edges

    low, high = profile_edges(0.123, 0.456)
    assert 3 * (len(low) + len(high) + 1) == BINS


def test_the_ledger_and_the_controller_are_said() -> None:
    text = "\n".join(plan_lines(make_plan(spec("tiny", control__target_entropy="initial", ledger__network_every=32))))
    assert "256 probe states, at 2 of 64 updates per rollout, 2 of them also through the network" in text
    assert "ε_low is set within 0.01 … 0.9 so that entropy goes to that of the first rollout" in text
    plain = "\n".join(plan_lines(make_plan(spec())))
    assert "256 probe states, at 1 of 16 updates per rollout" in plain
    assert "control" not in plain
    assert "SGD lr 0.0001" in "\n".join(plan_lines(make_plan(spec("tiny", optim__optimizer="sgd"))))


def test_probe_states_and_gradients_count_as_memory() -> None:
    """256 states × 151 936 words × 4 bytes; five float32 copies of the weights; SGD has no moments."""
    plan = make_plan(spec(ledger__network_every=16))
    assert plan.memory[PROBES] == 256 * 151936 * 4
    assert plan.memory[NETWORK] == 5 * 4 * 3_085_938_688
    bare = make_plan(spec(ledger__probe_states=0, optim__optimizer="sgd")).memory
    assert not {PROBES, NETWORK, "AdamW moments"} & set(bare)


def test_what_dapo_adds_is_said() -> None:
    text = "\n".join(plan_lines(make_plan(spec("qwen7b-dapo"))))
    assert "4 refills and 20480 responses at most" in text
    assert "up to 1 over the last 1024 of 4096 tokens" in text
    assert "math, 1 for a correct response and -1 for any other" in text
    assert "dynamic sampling" not in "\n".join(plan_lines(make_plan(spec())))


def test_checkpoints_are_counted() -> None:
    """10 rollouts: after 4, 8 and the last; float32 SmolLM2 is 513.1 MiB, with AdamW's moments three times that."""

    def said(**changes: Any) -> str:
        return plan_lines(make_plan(spec("smollm2-gsm8k", **changes)))[-1].strip()

    assert said() == "2 checkpoints of 1.5 GiB, and one more while it is written"
    assert said(checkpoint__every=4, checkpoint__keep="all").startswith("3 checkpoints of 1.5 GiB, and")
    assert said(checkpoint__every=0, optim__optimizer="sgd").startswith("1 checkpoint of 513.1 MiB, and")
    kept = said(checkpoint__every=2, checkpoint__models_every=4)
    assert kept.startswith("2 checkpoints of 1.5 GiB, 1 model alone of 513.1 MiB, and")
    assert said(model__dtype="bfloat16").startswith("2 checkpoints of 1.8 GiB")


def test_what_is_printed() -> None:
    text = "\n".join(plan_lines(make_plan(spec(clip__low=0.15, clip__high=float("inf"), loss__aggregation="constant"))))
    for words in ("512 prompts × 8 = 4096 responses", "16 updates per rollout, 256 responses each (32 whole groups)",
                  "15 of them can clip", "ε_low 0.15, clip-high off", "1/(B·4096)"):  # fmt: skip
        assert words in text
    assert "1/(B·T_i)" in "\n".join(plan_lines(make_plan(spec(loss__aggregation="sequence_mean"))))
    assert "0.78% of the groups" in "\n".join(plan_lines(make_plan(spec("tiny-random"))))


def test_an_unknown_model_leaves_memory_out_and_says_so() -> None:
    plan = make_plan(spec(model__path="somebody/something"))
    assert plan.memory == {}
    assert "its shape is not known here" in plan_lines(plan)[0]


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from clipctl.plan import make_plan; from clipctl.spec import load_spec; "
        "make_plan(load_spec('qwen7b-dapo')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluations_and_their_cost_are_named() -> None:
    """40 + 500 + 30 + 30 problems, 32 samples of 4096 tokens, after 0, 20, ... 200 rollouts of 4096 × 4096 tokens."""
    lines = plan_lines(make_plan(load_spec("qwen7b-dapo")))
    at = next(place for place, line in enumerate(lines) if line.startswith("evaluation:"))
    assert (
        "amc23 (40 problems), math500 (500 problems), aime24 (30 problems), aime25 (30 problems), 32 samples"
        in lines[at]
    )
    assert "after 0, 20, 40 … 200 rollouts (11 times)" in lines[at]
    tokens = 600 * 32 * 4096
    share = 11 * tokens / (200 * 4096 * 4096)
    assert f"{tokens:,} response tokens each time, {11 * tokens:,} in all: {share:.0%} of" in lines[at + 1]
    assert not [line for line in plan_lines(make_plan(load_spec("tiny"))) if line.startswith("evaluation:")]


def test_files_are_counted_when_they_are_read_and_limits_cap() -> None:
    changes = {"eval.every": 30, "eval.benchmarks": ("mine=x.jsonl", "arith"), "eval.limit": 100, "run.steps": 50}
    lines = plan_lines(make_plan(load_spec("tiny", changes)))
    (line,) = (line for line in lines if line.startswith("evaluation:"))
    assert "mine (? problems), arith (100 problems), 8 samples each, after 0, 30, 50 rollouts (3 times)" in line
    assert any("problems of files are counted when they are read" in line for line in lines)
    with pytest.raises(SpecError, match="did you mean gsm8k"):
        plan_lines(make_plan(load_spec("tiny", {"eval.every": 1, "eval.benchmarks": ("gsm8",)})))


def test_a_vllm_engine_has_weights_of_its_own() -> None:
    """Llama-3.2-1B: 1.24e9 weights of 2 bytes; the KV cache is the torch sampler's. Asleep, it has none of it in training."""
    shape = MODELS["llama-3.2-1b-instruct"].shape
    weights = 2 * shape.parameters
    torch_held = memory(spec("llama1b-random", engine__device="cuda"), shape)
    changes = {"engine__sampler": "vllm", "engine__device": "cuda"}
    awake = memory(spec("llama1b-random", engine__vllm__sleep="never", **changes), shape)
    assert peak_memory(awake) == sum(awake.values()) - awake[SAMPLING]
    assert sum(awake.values()) == sum(torch_held.values()) + weights
    asleep = memory(spec("llama1b-random", **changes), shape)
    assert sum(asleep.values()) == sum(torch_held.values()) + weights
    training = sum(asleep.get(name, 0) for name in WHILE_TRAINING)
    sampling = asleep[KV_CACHE] + asleep[SAMPLING] + weights
    assert peak_memory(asleep) == sum(asleep.values()) - min(training, sampling)
    on_cpu = memory(spec("llama1b-random", engine__sampler="vllm", engine__device="cpu"), shape)
    assert sum(on_cpu.values()) - on_cpu[STATISTICS] == sum(torch_held.values()) - torch_held[STATISTICS] + 2 * weights
    lines = "\n".join(plan_lines(make_plan(spec("llama1b-random", **changes))))
    assert "vLLM in a process of its own on 1 GPU, up to" in lines
    assert "asleep while the trainer works, unless" in lines
