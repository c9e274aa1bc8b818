"""What `run.py` measures on one device, each part by itself: rows of a table. The same code on a GPU and, small, on a CPU."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from floor import Device, Shape, floor
from memory_lab import PeakBytes, config_of
from torch import Tensor

from clipctl import open_runs, token_statistics
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.passes import set_up_torch
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import ClipctlError, Preempted
from clipctl.loss import PolicyLoss
from clipctl.models import MODELS, ModelShape, find_model, load_tokenizer, model_shape
from clipctl.plan import KV_CACHE, SAMPLING, memory, peak_memory, size_words
from clipctl.rollout import Batch, DrawKey, Prompt, SamplingParams
from clipctl.spec import RunSpec, load_spec
from clipctl.statistics import Kernels
from clipctl.train import Report, train
from runs import stored, tensors

EXACT = 1e-4
"""Nats, and the share of E[Q], by which statistics may differ from float64 on the same operands at a temperature of 1 or more.
Below, more by as much as the temperature makes of a logit's rounding, which it divides too."""
MEMORY = 0.15
SMALL_MODEL = ModelShape(8192, 256, 2, 4, 2, 64, 1024, True, 1024, qkv_bias=True)


REPEATED: dict[str, Any] = {
    "run.name": "x",
    "run.steps": 2,
    "rollout.prompts": 8,
    "rollout.group_size": 8,
    "rollout.max_response_tokens": 24,
    "optim.responses_per_update": 16,
    "ledger.network_every": 1,
    "store.tokens": "all",
}


@dataclass(frozen=True, slots=True)
class Row:
    """wanted: in words, empty where there is no bound; good: None without a bound."""

    name: str
    found: str
    wanted: str = ""
    good: bool | None = None
    numbers: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """device: cpu or cuda. small: for a CPU in a minute, the same code."""

    device: str
    small: bool

    @property
    def kernels(self) -> list[Kernels]:
        """Ways to make the statistics, the fastest last."""
        return ["torch", "triton"] if self.device == "cuda" else ["torch"]

    @property
    def synchronize(self) -> Callable[[], None]:
        return torch.cuda.synchronize if self.device == "cuda" else lambda: None


def timed(scale: Scale, work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the quickest of several turns, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        scale.synchronize()
        started = perf_counter()
        work()
        scale.synchronize()
        seconds.append(perf_counter() - started)
    return min(seconds[1:])


def measure_device(scale: Scale, dtype: torch.dtype) -> Device:
    """What this device reaches in a large product and in a large copy: the floor is made of them."""
    size, copied = (512, 1 << 22) if scale.small else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=scale.device).to(dtype) for _ in range(2))
    values = torch.ones(copied // 4, device=scale.device)
    to = torch.empty_like(values)
    multiply = timed(scale, lambda: left @ right)
    copy = timed(scale, lambda: to.copy_(values))
    return Device(2 * size**3 / multiply, 2 * copied / copy)


def device_rows(scale: Scale) -> Iterator[Row]:
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU"
    for dtype in (torch.bfloat16, torch.float32):
        found = measure_device(scale, dtype)
        words = f"{found.flops / 1e12:.3g} TFLOP/s, {found.bandwidth / 1e9:.4g} GB/s"
        yield Row(
            f"{name}, {str(dtype)[6:]} product, copy",
            words,
            numbers={"flops": found.flops, "bandwidth": found.bandwidth},
        )


def operands(scale: Scale, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head that makes peaked distributions, targets."""
    tokens, hidden, words = (96, 64, 3000) if scale.small else (512, 2048, 151936)
    generator = torch.Generator(scale.device).manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, generator=generator, device=scale.device).to(dtype)
    head_VD = (torch.randn(words, hidden, generator=generator, device=scale.device) * 4 / hidden**0.5).to(dtype)
    return hidden_TD, head_VD, torch.randint(words, (tokens,), generator=generator, device=scale.device)


def exactness_rows(scale: Scale) -> Iterator[Row]:
    """log π, H and E[Q] against float64 on the same operands, and the gradient by hidden states and head."""
    for kernels, dtype in product(scale.kernels, (torch.float32, torch.bfloat16)):
        for temperature in (0.6, 1.0, 1.5):
            hidden_TD, head_VD, targets_T = operands(scale, dtype)
            found = token_statistics(hidden_TD, head_VD, targets_T, temperature=temperature, kernels=kernels)
            logp_TV = torch.log_softmax(hidden_TD.double() @ head_VD.double().T / temperature, -1)
            p_TV = logp_TV.exp()
            entropy_T = -(p_TV * logp_TV).sum(-1)
            q_T = (p_TV**2 * (logp_TV + entropy_T[:, None])).sum(-1)
            scale_T = (p_TV**2 * (logp_TV.abs() + entropy_T[:, None])).sum(-1)
            errors = {
                "log π": float((found.logprob_T - logp_TV.gather(1, targets_T[:, None])[:, 0]).abs().max()),
                "H": float((found.entropy_T - entropy_T).abs().max()),
                "E[Q]": float(((found.expected_q_T - q_T).abs() / scale_T).max()),
            }
            words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            bound = EXACT / min(1.0, temperature)
            good = max(errors.values()) < bound
            name = f"statistics, {kernels}, {str(dtype)[6:]}, τ = {temperature:g}, error"
            yield Row(name, words, f"< {bound:.2g}", good, errors)
        yield gradient_row(scale, dtype, kernels)


def gradient_row(scale: Scale, dtype: torch.dtype, kernels: Kernels) -> Row:
    hidden_TD, head_VD, targets_T = operands(scale, dtype)
    weights_T = torch.linspace(-1, 1, len(targets_T), device=scale.device)
    exact = [tensor.double().requires_grad_() for tensor in (hidden_TD, head_VD)]
    logp_TV = torch.log_softmax(exact[0] @ exact[1].T, -1)
    (weights_T.double() * logp_TV.gather(1, targets_T[:, None])[:, 0]).sum().backward()
    ours = [tensor.requires_grad_() for tensor in (hidden_TD, head_VD)]
    (weights_T * token_statistics(*ours, targets_T, kernels=kernels).logprob_T).sum().backward()
    errors = {
        name: float((mine.grad.double() - true.grad).norm() / true.grad.norm())
        for name, mine, true in zip(("hidden states", "head"), ours, exact, strict=True)
        if mine.grad is not None and true.grad is not None
    }
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Row(
        f"gradient, {kernels}, {str(dtype)[6:]}, relative error",
        words,
        f"< {bound:g}",
        max(errors.values()) < bound,
        errors,
    )


def speed_rows(scale: Scale) -> Iterator[Row]:
    """The statistics against the bare product of the same operands, and against float32 logits that are kept: time and memory
    beyond the operands, forward, and with the backward pass."""
    hidden_TD, head_VD, _ = operands(scale, torch.bfloat16)
    hidden_TD = hidden_TD.repeat(16, 1).requires_grad_()
    head_VD.requires_grad_()
    targets_T = torch.zeros(len(hidden_TD), dtype=torch.long, device=scale.device)
    name = f"statistics of {len(hidden_TD)} tokens × {len(head_VD)} words"
    with torch.no_grad():
        bare = timed(scale, lambda: [hidden_TD @ part_VD.T for part_VD in head_VD.split(8192)])

    def ours(kernels: Kernels) -> Tensor:
        return token_statistics(hidden_TD, head_VD, targets_T, kernels=kernels).logprob_T

    def kept() -> Tensor:
        logp_TV = torch.log_softmax(hidden_TD.float() @ head_VD.float().T, -1)
        with torch.no_grad():
            p_TV = logp_TV.exp()
            entropy_T = -(p_TV * logp_TV).sum(-1)
            p_TV.square_().mul_(logp_TV + entropy_T[:, None]).sum(-1)
        return logp_TV.gather(1, targets_T[:, None])[:, 0]

    ways: dict[str, Callable[[], Tensor]] = {kernels: partial(ours, kernels) for kernels in scale.kernels}
    ways["float32 logits that are kept"] = kept
    for backward in (False, True):

        def work(way: Callable[[], Tensor], backward: bool = backward) -> None:
            hidden_TD.grad = head_VD.grad = None
            with torch.set_grad_enabled(backward):
                logprob_T = way()
            if backward:
                logprob_T.sum().backward()

        for way, make in ways.items():
            seconds, extra = timed(scale, partial(work, make)), peak_of(scale, partial(work, make))
            words = f"{1000 * seconds:.1f} ms, {seconds / bare:.1f} × the bare product"
            words += f"; memory {size_words(extra)}" if scale.device == "cuda" else ""
            pass_ = "forward and backward" if backward else "forward"
            numbers = {"seconds": seconds, "bare": bare, "bytes": extra}
            yield Row(f"{name}, {way}, {pass_}", words, numbers=numbers)


def peak_of(scale: Scale, work: Callable[[], Any]) -> int:
    """Bytes of a GPU beyond what was allocated before; 0 without one."""
    if scale.device != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def memory_spec(scale: Scale) -> tuple[RunSpec, ModelShape]:
    """The 3B preset, or the same of a model of two layers."""
    shape = SMALL_MODEL if scale.small else MODELS["qwen2.5-3b-instruct"].shape
    tokens = 4096 if scale.small else 16384
    changes = {
        "engine.device": scale.device,
        "engine.statistics": scale.kernels[-1],
        "engine.tokens_per_microbatch": tokens,
        "ledger.probe_states": 0,
    }
    return load_spec("qwen3b-gsm8k", changes), shape


def random_trainer(scale: Scale) -> tuple[RunSpec, ModelShape, TorchTrainer]:
    """A trainer of the 3B preset on random weights, made where it trains."""
    from transformers import AutoModelForCausalLM

    spec, shape = memory_spec(scale)
    set_up_torch(spec.engine)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    return spec, shape, TorchTrainer(use_grouped_attention(model), spec)


def model_rows(scale: Scale) -> Iterator[Row]:
    """Steps and whole rollouts of the 3B preset on random weights."""
    spec, shape, trainer = random_trainer(scale)
    device = measure_device(scale, torch.bfloat16)
    yield from memory_rows(scale, spec, shape, trainer, device)
    yield from rollout_rows(scale, spec, shape, trainer, device)


def memory_rows(scale: Scale, spec: RunSpec, shape: ModelShape, trainer: TorchTrainer, device: Device) -> Iterator[Row]:
    """One optimizer step with a full micro-batch: peak memory against what `--dry-run` plans, and its speed against the floor."""
    rows, prompt, response = spec.engine.tokens_per_microbatch // 512, 128, 384
    rng = np.random.default_rng(0)
    texts = [rng.integers(8, shape.vocabulary, prompt + response).tolist() for _ in range(rows)]
    batch = Batch([text[:prompt] for text in texts], [text[prompt:] for text in texts], rng.normal(size=rows), 1)
    loss = PolicyLoss("clip", 0.2, 0.2)
    old = trainer.score(batch)
    trainer.step(batch, range(rows), old, loss)
    planned = peak_memory(memory(spec, shape) | {KV_CACHE: 0, SAMPLING: 0})
    measured, seconds = step_peak(scale, trainer, batch, lambda: trainer.step(batch, range(rows), old, loss))
    error = planned / measured - 1
    numbers = {"planned": planned, "measured": measured, "parameters": shape.parameters}
    yield Row(
        f"peak memory of a step, {shape.parameters:,} parameters",
        f"{size_words(measured)}, planned {size_words(planned)} ({100 * error:+.1f} %)",
        f"within {100 * MEMORY:g} %",
        abs(error) <= MEMORY,
        numbers,
    )
    least = floor(shape, Shape(rows, prompt, response, 1, rows, 1, recompute=True), device).update
    words = f"{seconds:.3f} s, floor {least:.3f} s: {100 * least / seconds:.0f} %"
    yield Row("the same step, time against its floor", words, numbers={"seconds": seconds, "floor": least})


def rollout_rows(
    scale: Scale, spec: RunSpec, shape: ModelShape, trainer: TorchTrainer, device: Device
) -> Iterator[Row]:
    """An eighth of Table 1's rollout, with prompts of 100 and responses of 300 tokens: sampled, scored, two updates. Against the
    floor without recomputed activations, which are a choice of ours and no need."""
    prompts, size, prompt, response, updates = (4, 4, 10, 8, 2) if scale.small else (64, 8, 100, 300, 2)
    rng = np.random.default_rng(1)
    asked = [Prompt(rng.integers(8, shape.vocabulary, prompt).tolist(), DrawKey(0, 0, at)) for at in range(prompts)]
    params = SamplingParams(response, 1.0, 1.0, frozenset())
    sampler, each = TorchSampler(trainer.model, prompts * size), prompts * size // updates

    def rollout() -> dict[str, float]:
        seconds, last = {}, perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            scale.synchronize()
            seconds[phase], last = perf_counter() - last, perf_counter()

        found = dict(sampler.sample(asked, size, params))
        lap("sampling")
        texts = [(asked[at].token_ids, completion.token_ids) for at in range(prompts) for completion in found[at]]
        batch = Batch([text for text, _ in texts], [text for _, text in texts], rng.normal(size=len(texts)), size)
        old = trainer.score(batch)
        lap("scoring")
        for update in range(updates):
            trainer.step(batch, range(update * each, (update + 1) * each), old, PolicyLoss("clip", 0.2, 0.2))
        lap("updates")
        return seconds

    rollout()
    seconds = rollout()
    total = sum(seconds.values())
    least = floor(shape, Shape(prompts * size, prompt, response, size, prompts * size, updates), device)
    words = f"{total:.2f} s: " + ", ".join(
        f"{phase} {seconds[phase]:.2f} (floor {needed:.2f})"
        for phase, needed in (("sampling", least.sample), ("scoring", least.score), ("updates", least.update))
    )
    name = (
        f"rollout of {prompts * size} responses × {response} tokens, {updates} updates, {shape.parameters:,} parameters"
    )
    yield Row(name, words, numbers=seconds | {"floor": least.total})
    tokens = prompts * size * response
    words = f"{tokens / seconds['sampling']:,.0f} sampled, {tokens / total:,.0f} of the whole: {100 * least.total / total:.1f} %"
    yield Row("the same, response tokens/s; of its floor reached", words, numbers={"reached": least.total / total})


def step_peak(scale: Scale, trainer: TorchTrainer, batch: Batch, step: Callable[[], Any]) -> tuple[int, float]:
    """Peak bytes and seconds of a step: by CUDA's allocator, else by counting every storage."""
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(scale, step, repeats=2)
        return torch.cuda.max_memory_allocated(), seconds
    seconds = timed(scale, step, repeats=2)
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    gradients = [master.grad for master in trainer.masters if master.grad is not None]
    with PeakBytes([*trainer.parameters, *trainer.masters, *gradients, *state]) as counted:
        step()
    return counted.peak, seconds


def run_spec(scale: Scale, preset: str, dtype: str, changes: dict[str, Any]) -> RunSpec:
    """Table 1's rollout (512 prompts × 8, 16 updates of 256 responses), or 16 × 4 in 4 updates."""
    prompts, size, update = (16, 4, 16) if scale.small else (512, 8, 256)
    shape = {
        "rollout.prompts": prompts,
        "rollout.group_size": size,
        "optim.responses_per_update": update,
        "optim.epochs": 1,
    }
    fixed = {"run.steps": 1000, "model.dtype": dtype, "engine.device": scale.device,
             "engine.statistics": scale.kernels[-1], "ledger.network_every": 0,
             "ledger.probe_every": 64, "checkpoint.every": 0}  # fmt: skip
    return load_spec(preset, shape | fixed | changes)


def run_rows(
    scale: Scale, preset: str, dtype: str, changes: dict[str, Any], seconds: float, runs_dir: Path
) -> Iterator[Row]:
    """A run for about so many seconds: as many rollouts as fit, two at least; the first one is not counted."""
    spec = run_spec(scale, preset, dtype, changes)
    name = f"{preset}, {dtype}, {spec.engine.sampler}/{spec.engine.trainer}"
    if not model_is_here(spec):
        yield Row(name, f"not run: {spec.model.path} is not here (clipctl models pull {spec.model.path})")
        return
    end = perf_counter() + seconds

    def stop_in_time(report: Report) -> None:
        if report.rollout >= 1 and perf_counter() + report.seconds > end:
            os.kill(os.getpid(), signal.SIGUSR1)

    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    label = f"{preset}-{dtype}-{spec.engine.sampler}-{spec.engine.trainer}"
    folder = runs_dir / label
    named = spec.model_copy(update={"run": spec.run.model_copy(update={"name": label})})
    try:
        train(named, runs_dir=runs_dir, report=stop_in_time, warn=lambda line: None)
    except Preempted:
        pass  # as asked
    except ClipctlError as error:
        yield Row(name, f"failed: {error}", "a run", False)
        return
    yield from stored_rows(scale, name, spec, folder)


def repeat_rows(scale: Scale, folder: Path) -> Iterator[Row]:
    """The same two rollouts twice, stored and compared bit for bit. Whether responses longer than a block of the attention
    kernel come out the same is a matter of that kernel's backward pass, so it is measured, not promised."""
    runs = [("tiny", "float32"), ("tiny", "bfloat16")] + ([] if scale.small else [("smollm2-arith", "bfloat16")])
    for preset, dtype in runs:
        spec = load_spec(preset, REPEATED | {"model.dtype": dtype, "engine.device": scale.device})
        if not model_is_here(spec):
            continue
        turns = [train(spec, runs_dir=folder / f"{preset}-{dtype}-{turn}", warn=lambda line: None) for turn in range(2)]
        one, two = (stored(run) for run in turns)
        apart = [view for view in one if one[view] != two[view]]
        weights, others = (tensors(run / "checkpoints" / str(spec.run.steps)) for run in turns)
        differing = sum(weights[name] != others[name] for name in weights)
        words = f"{differing} of {len(weights)} tensors differ; stored numbers that do: {', '.join(apart) or 'none'}"
        wanted, good = ("the same bits", not (differing or apart)) if preset == "tiny" else ("", None)
        yield Row(f"{preset}, {dtype}: the same run twice", words, wanted, good, {"tensors": differing, "views": apart})


def model_is_here(spec: RunSpec) -> bool:
    try:
        find_model(spec.model.path, pull=False)
    except ClipctlError:
        return False
    return True


def stored_rows(scale: Scale, name: str, spec: RunSpec, folder: Path) -> Iterator[Row]:
    """What the run stored of itself."""
    columns = "responses, tokens, response_tokens_mean, mismatch_max, mismatch_mean, seconds_sample, seconds_reward, " \
              "seconds_score, seconds_update"  # fmt: skip
    with open_runs(folder) as runs:
        all_ = [dict(zip(columns.split(", "), row, strict=True)) for row in
                runs.sql(f"select {columns} from rollouts order by rollout").fetchall()]  # fmt: skip
        noise = max(abs(row[0]) for row in runs.sql("select noise_max from updates where inner_step = 0").fetchall())
        reward = [row[0] for row in runs.sql("select reward_mean from rollouts order by rollout").fetchall()]
    counted = all_[1:] or all_
    mean = {key: sum(row[key] for row in counted) / len(counted) for key in counted[0]}
    total = sum(mean[key] for key in mean if key.startswith("seconds"))
    exact = spec.model.dtype == "float32"
    worst, typical = max(row["mismatch_max"] for row in all_), mean["mismatch_mean"]
    # In 16 bits single tokens differ by what rounding makes of large logits; what is typical does not.
    found, wanted = (worst, "largest < 1e-3") if exact else (typical, "mean < 0.05")
    yield Row(f"{name}: samples against trainer, log π", f"{worst:.1e} at most, mean {typical:.1e}", wanted,
              found < (1e-3 if exact else 0.05), {"max": worst, "mean": typical})  # fmt: skip
    yield Row(f"{name}: largest log r at inner step 0", f"{noise:.1e}", "< 1e-4", noise < 1e-4, {"max": noise})
    words = f"{len(all_)} rollouts, reward {reward[0]:.3f} → {reward[-1]:.3f}; a rollout {total:.2f} s: sampling " \
            f"{mean['seconds_sample']:.2f}, rewards {mean['seconds_reward']:.2f}, scoring {mean['seconds_score']:.2f}, " \
            f"updates {mean['seconds_update']:.2f}"  # fmt: skip
    yield Row(f"{name}: {spec.responses} responses, {spec.updates_per_rollout} updates", words, numbers=mean)
    speed = {"sampled": mean["tokens"] / mean["seconds_sample"], "whole": mean["tokens"] / total}
    yield Row(
        f"{name}: response tokens/s",
        f"{speed['sampled']:,.0f} sampled, {speed['whole']:,.0f} of the whole",
        numbers=speed,
    )
    if scale.device == "cuda":
        shape = model_shape(spec.model.path)
        assert shape is not None
        # Before anything else is measured; the plan's cache is of the longest prompts and responses allowed.
        peak, planned = torch.cuda.max_memory_allocated(), peak_memory(memory(spec, shape))
        words = f"{size_words(peak)}, planned at most {size_words(planned)}"
        good = peak <= (1 + MEMORY) * planned
        yield Row(f"{name}: peak memory", words, "not over the plan", good, {"measured": peak, "planned": planned})
    yield floor_row(scale, name, spec, mean, total, folder)


def floor_row(scale: Scale, name: str, spec: RunSpec, mean: dict[str, float], total: float, folder: Path) -> Row:
    shape = model_shape(spec.model.path)
    assert shape is not None
    with open_runs(folder) as runs:
        questions = [text for (text,) in runs.sql("select question from questions limit 64").fetchall()]
    tokenizer = load_tokenizer(find_model(spec.model.path, pull=False), spec.model.chat_template)
    prompt = float(np.mean([len(tokenizer.encode_prompt(text)) for text in questions]))
    exact = spec.model.dtype == "float32"
    rollout = Shape(
        responses=spec.responses,
        prompt=prompt,
        response=mean["response_tokens_mean"],
        group=spec.rollout.group_size,
        side_by_side=min(spec.engine.sampler_rows, spec.responses),
        updates=spec.updates_per_rollout,
        width=4 if exact else 2,
        recompute=spec.engine.gradient_checkpointing,
    )
    least = floor(shape, rollout, measure_device(scale, torch.float32 if exact else torch.bfloat16))
    words = f"{least.total:.3g} s (sampling {least.sample:.3g}, scoring {least.score:.3g}, updates {least.update:.3g}): " \
            f"{100 * least.total / total:.2g} % of it reached"  # fmt: skip
    return Row(f"{name}: floor of a rollout", words, numbers={"floor": least.total, "seconds": total})
