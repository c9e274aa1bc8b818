"""DeepSpeed's configuration as it follows from a run spec and the model's size. Written into the run's folder as
deepspeed.json."""

from typing import Any

from clipctl.layers import overlay
from clipctl.spec import RunSpec
from clipctl.training_state import BUCKET

CONFIG_FILE = "deepspeed.json"


def deepspeed_config(spec: RunSpec, weights: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for a model of so many weights. `engine.deepspeed.config` goes over what is not ruled by
    other keys.

    One micro-batch is one pass, whose end is marked by hand; DeepSpeed's own batch sizes mean nothing. Gradients add up and are
    summed over processes in float32, whatever the weights are.
    """
    settings, on_gpu = spec.engine.deepspeed, spec.engine.device == "cuda"
    # DeepSpeed allocates the whole bucket, however small the model is.
    zero: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": min(BUCKET, weights)}
    place = {"device": "cpu", "pin_memory": on_gpu}
    if settings.offload != "none":
        zero["offload_optimizer"] = place
    if settings.offload == "all":
        zero["offload_param"] = place
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 steps float32 masters, whose gradient the trainer cuts itself to know its norm.
        "gradient_clipping": spec.optim.grad_clip if settings.zero_stage else 0.0,
        "zero_optimization": zero,
        # The optimizer is the torch trainer's, on the CPU too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if spec.model.dtype == "bfloat16" and settings.zero_stage:
        config |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return overlay(config, settings.config)
