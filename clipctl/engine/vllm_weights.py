"""The policy's weights on their way from the trainer into a live vLLM engine, in place.

On a GPU through vLLM's weight transfer over CUDA IPC, in packed chunks that the engine copies out of the trainer's memory;
on a CPU through anonymous memory that both processes map, and from which a new engine gets them too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import tee
from typing import Any, Protocol

import torch
from torch import Tensor

from clipctl.engine.vllm_process import EngineProcess
from clipctl.engine.vllm_receiver import BACKEND

Weights = Iterator[tuple[str, Tensor]]
ALIGNED = 64
"""Bytes to whose multiples tensors begin."""
CHUNK_BYTES = 256 * 2**20
"""Of a chunk on a GPU at least; one tensor must fit."""


class WeightPush(Protocol):
    """A way from the trainer into the engine."""

    backend: str
    """Of vLLM's weight transfer."""
    keeps: bool
    """Whether what was taken can be sent again."""

    def take(self, weights: Weights) -> None:
        """The policy's tensors, before an engine is asked to load them."""
        ...

    def send(self, process: EngineProcess) -> None:
        """Has the engine load what was taken. Raises EngineLost."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    """Weights in a memory file without a name, so that nothing of it outlives the processes that have it open."""

    backend, keeps = BACKEND, True

    def __init__(self) -> None:
        self.fd = os.memfd_create("clipctl-weights")
        self._tensors: list[tuple[str, str, list[int], int]] = []
        self._size = 0

    def take(self, weights: Weights) -> None:
        """Copies them, over those of before."""
        self._tensors, self._size = [], 0
        for name, tensor in weights:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu()
            _write(self.fd, flat.numpy().data, self._size)
            self._tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._size))
            self._size += -(-flat.numel() // ALIGNED) * ALIGNED
        os.ftruncate(self.fd, self._size)

    def send(self, process: EngineProcess) -> None:
        """Has the engine load them out of the memory file, which it inherited."""
        process.call("workers", method="start_weight_update")
        info = {"fd": self.fd, "size": self._size, "tensors": self._tensors}
        process.call("workers", method="update_weights", update_info=info)
        process.call("workers", method="finish_weight_update")

    def close(self) -> None:
        """Gives the memory back once the engine has ended."""
        os.close(self.fd)


def _write(fd: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(fd, data, start)
        data, start = data[written:], start + written


class CudaIpc:
    """vLLM's weight transfer between processes on the same GPUs.

    largest: bytes of the largest tensor. devices: of the engine, the trainer's first; each gets a staging buffer.
    """

    backend, keeps = "ipc", False

    def __init__(self, largest: int, devices: Sequence[int]) -> None:
        self._chunk_bytes = max(largest, CHUNK_BYTES)
        self._devices = devices
        self._weights: Weights = iter(())

    def take(self, weights: Weights) -> None:
        """Nothing is copied before it is sent."""
        self._weights = weights

    def send(self, process: EngineProcess) -> None:
        """Streams what was taken, once; the engine answers when it has a chunk, so that the next one may replace it."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

        process.call("workers", method="init_weight_transfer_engine", init_info={"packed": True})
        process.call("workers", method="start_weight_update")
        for chunks in self._chunks():
            first = chunks[0]
            info = IPCWeightTransferUpdateInfo(
                names=first.names,
                dtype_names=first.dtype_names,
                shapes=first.shapes,
                tensor_sizes=first.tensor_sizes,
                ipc_handles={gpu: handle for chunk in chunks for gpu, handle in chunk.ipc_handle.items()},
            )
            process.call("workers", method="update_weights", update_info=asdict(info))
        process.call("workers", method="finish_weight_update")
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def _chunks(self) -> Iterator[list[Any]]:
        """The same tensors, packed on each of the GPUs."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        producers = [
            packed_ipc_producer(
                weights, str(torch.cuda.get_device_properties(device).uuid), _tensor_of, self._chunk_bytes
            )
            for device, weights in zip(self._devices, tee(self._weights, len(self._devices)), strict=True)
        ]
        while True:
            chunks = []
            for device, producer in zip(self._devices, producers, strict=True):
                with torch.cuda.device(device):
                    chunks.append(next(producer, None))
            if chunks[0] is None:
                return
            yield chunks

    def close(self) -> None:
        """The engine's end has given its mappings back."""
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


def _tensor_of(named: tuple[str, Tensor]) -> Tensor:
    return named[1].detach()
