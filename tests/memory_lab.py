"""Peak bytes of what is computed, on tensors without memory: models of any size, here."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipctl import statistics
from clipctl.engine.attention import use_grouped_attention
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.loss import PolicyLoss, UpdateTokens
from clipctl.models import ModelShape
from clipctl.rollout import Batch
from clipctl.spec import RunSpec


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were at once."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in before:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, place: int) -> None:
        self.now -= self.alive.pop(place)


def config_of(shape: ModelShape) -> Any:
    """A Qwen2 where there are biases, else a Llama, as transformers builds it."""
    from transformers import LlamaConfig, Qwen2Config

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
    }
    return (Qwen2Config if shape.qkv_bias else LlamaConfig)(**sizes)


@contextmanager
def chunks_of_a_gpu() -> Iterator[None]:
    """The statistics' chunks as on a GPU, on tensors that say that they are on a CPU."""
    before = statistics.CHUNK_ELEMENTS["cpu"], statistics.CHUNK_VOCABULARY["cpu"]
    statistics.CHUNK_ELEMENTS["cpu"], statistics.CHUNK_VOCABULARY["cpu"] = (
        statistics.CHUNK_ELEMENTS["cuda"],
        statistics.CHUNK_VOCABULARY["cuda"],
    )
    try:
        yield
    finally:
        statistics.CHUNK_ELEMENTS["cpu"], statistics.CHUNK_VOCABULARY["cpu"] = before


def training_peak(spec: RunSpec, shape: ModelShape, prompt: int, response: int) -> int:
    """Peak bytes of one micro-batch that is full, with the optimizer's moments: forward pass, statistics, backward pass.

    prompt, response: tokens of each; together they must divide `engine.tokens_per_microbatch`.
    """
    from transformers import AutoModelForCausalLM

    rows = spec.engine.tokens_per_microbatch // (prompt + response)
    assert rows * (prompt + response) == spec.engine.tokens_per_microbatch
    batch = Batch([[1] * prompt] * rows, [[2] * response] * rows, np.ones(rows), 1)
    with FakeTensorMode(), chunks_of_a_gpu():
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=getattr(torch, spec.model.dtype))
        trainer = TorchTrainer(use_grouped_attention(model), spec)
        assert sum(parameter.numel() for parameter in trainer.parameters) == shape.parameters
        for master in trainer.masters:
            master.grad = torch.zeros_like(master)
        tokens = UpdateTokens(
            *(torch.empty(rows * response, dtype=dtype) for dtype in [torch.float32] * 4 + [torch.float64] * 2)
        )
        held = [tensor for master in trainer.masters for tensor in (master, master.grad) if tensor is not None]
        with PeakBytes([*trainer.parameters, *held]) as counted:
            trainer._accumulate(batch, range(rows), list(range(rows)), tokens, PolicyLoss("clip", 0.2, 0.2), True)
    # Fused AdamW has no version for tensors without memory; test_plan.py counts what it keeps of a small model.
    return counted.peak + (8 * shape.parameters if spec.optim.optimizer == "adamw" else 0)
