"""Weights out of shared memory into a live vLLM engine on a CPU, as a backend of vLLM's own weight transfer.

On GPUs vLLM has such backends; on CPUs it has none, and reading a folder again with `reload_weights` leaves something
behind: linear layers multiply by a repacked copy of their weights, and of a head that shares the embedding's weights the
copy is not made again, so it would stay that of the old policy.
"""

import mmap
from dataclasses import dataclass
from typing import Any

BACKEND = "clipctl_shared_memory"


def register() -> None:
    """Makes the backend known to vLLM in this process."""
    import torch
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Nothing:
        """What the handshake carries."""

    @dataclass
    class SharedTensors:
        """tensors: (name, dtype, shape, first byte) of each, in the `size` bytes of the file that is open as `fd`."""

        fd: int
        size: int
        tensors: list[tuple[str, str, list[int], int]]

    class SharedMemoryEngine(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls, update_info_cls = Nothing, SharedTensors

        def init_transfer_engine(self, init_info: Nothing) -> None:
            """There is nothing to agree on."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: SharedTensors) -> None:
            mapped = memoryview(mmap.mmap(update_info.fd, update_info.size))
            weights = []
            for name, dtype, shape, start in update_info.tensors:
                kind, count = getattr(torch, dtype), torch.Size(shape).numel()
                flat = torch.frombuffer(mapped, dtype=kind, count=count, offset=start)
                weights.append((name, flat.view(shape)))
            self.model.load_weights(weights)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            for layer in sharing_weights(self.model):
                layer.quant_method.process_weights_after_loading(layer)

        def shutdown(self) -> None:
            """Nothing to give back."""

    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


def sharing_weights(model: Any) -> list[Any]:
    """The layers whose weight is that of another layer too, such as a head tied to the embedding."""
    owners: dict[int, list[Any]] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.numel():
            owners.setdefault(weight.data_ptr(), []).append(layer)
    return [layer for layers in owners.values() if len(layers) > 1 for layer in layers]
