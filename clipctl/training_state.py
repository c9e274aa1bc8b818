"""Bytes of weights, gradients and moments on the device of one process, by trainer and ZeRO stage. No torch.

With n weights, N processes, DeepSpeed's ZeRO holds a share of 1/N of: from stage 1 on float32 weights and moments (float32
weights too are there twice), from stage 2 on the summed gradients, with stage 3 the weights, of which those of the layers at
work are whole. Stage 1 of bfloat16 adds gradients up in whole float32 buffers. Source: ZeRO, arXiv 1910.02054; DeepSpeed 0.19.
"""

from typing import Any

from clipctl.spec import RunSpec

MASTERS, MOMENTS = "float32 master weights", "AdamW moments"
GRADIENTS_32, GRADIENTS_16 = "float32 gradients", "bfloat16 gradients"
GATHERED, ON_THEIR_WAY = "weights that are whole at a time", "gradients that are being summed"
SAMPLERS = "weights of the sampler"
BUCKET, LIVE = int(5e8), int(1e9)
"""DeepSpeed's defaults: gradients that are summed together, weights that may be whole with ZeRO-3."""


def training_state(spec: RunSpec, count: int, processes: int) -> dict[str, int]:
    """By what holds them, of a model of so many weights."""
    if spec.engine.trainer == "deepspeed" and spec.engine.deepspeed.zero_stage:
        return _divided(spec, count, processes)
    return _whole(spec, count)


def in_host_memory(spec: RunSpec, count: int, processes: int) -> int:
    """Bytes that `engine.deepspeed.offload` keeps in the machine's memory for one process."""
    offload, share = spec.engine.deepspeed.offload, -(-count // processes)
    if offload == "none":
        return 0
    moments = 8 * share if spec.optim.optimizer == "adamw" else 0
    return 8 * share + moments + (_width(spec) * share if offload == "all" else 0)


def checkpoint_bytes_per_weight(spec: RunSpec) -> int:
    """Bytes of a checkpoint for each weight: itself, a float32 master where it is bfloat16, AdamW's two moments; DeepSpeed saves
    masters always and, with stages 1 and 2, the weights again."""
    width, moments = _width(spec), 8 * (spec.optim.optimizer == "adamw")
    if spec.engine.trainer == "deepspeed":
        return width + (width if spec.engine.deepspeed.zero_stage in (1, 2) else 0) + 4 + moments
    return width + 4 * (width == 2) + moments


def _whole(spec: RunSpec, count: int) -> dict[str, int]:
    """Every process has all: the torch trainer, and ZeRO-0."""
    held = {"weights": count * _width(spec)}
    if _width(spec) == 2:
        held |= {MASTERS: 4 * count, GRADIENTS_16: 2 * count}
    held[GRADIENTS_32] = 4 * count
    return held | ({MOMENTS: 8 * count} if spec.optim.optimizer == "adamw" else {})


def _divided(spec: RunSpec, count: int, processes: int) -> dict[str, int]:
    """ZeRO-1 to 3."""
    settings, width = spec.engine.deepspeed, _width(spec)
    stage, share = settings.zero_stage, -(-count // processes)
    zero: dict[str, Any] = settings.config.get("zero_optimization", {})
    bucket = min(count, int(zero.get("reduce_bucket_size", BUCKET)))
    live = min(count, int(zero.get("stage3_max_live_parameters", LIVE)))
    held = {"weights": width * (share if stage == 3 else count)}
    if stage == 3 and spec.engine.sampler == "torch":
        held[SAMPLERS] = width * count
    if stage == 3 and settings.offload == "all":
        held["weights"] = 0
    held |= {GATHERED: live * width if stage == 3 else 0, ON_THEIR_WAY: 4 * bucket}
    if stage == 1:
        held |= {GRADIENTS_32: 4 * count, GRADIENTS_16: 2 * count if width == 2 else 0}
    if settings.offload == "none":
        held[MASTERS] = 4 * share
        if stage > 1:
            held[GRADIENTS_32] = 4 * share
        if spec.optim.optimizer == "adamw":
            held[MOMENTS] = 8 * share
    return {name: size for name, size in held.items() if size}


def _width(spec: RunSpec) -> int:
    return 2 if spec.model.dtype == "bfloat16" else 4
