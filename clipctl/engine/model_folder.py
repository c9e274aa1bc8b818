"""A policy as transformers reads it, written file by file: weights that are gathered from several ranks are never held whole."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from clipctl.engine.buckets import buckets

FILE_BYTES = 4 << 30
"""After which a file of weights is full."""


def write_model(model: Any, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Configuration, generation configuration and weights (safetensors) of a transformers model.

    weights: of its parameters, by name, tied ones once. Raises OSError and SafetensorError.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    files: list[list[str]] = []
    size = 0
    for held in _parts(chain(weights, _buffers(model))):
        save_file(held, folder / f".part-{len(files)}", metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in held.values())
        files.append(list(held))
    names = [f"model-{at:05d}-of-{len(files):05d}.safetensors" for at in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for at, name in enumerate(names):
        (folder / f".part-{at}").rename(folder / name)
    if len(files) > 1:
        listed = {tensor: name for held, name in zip(files, names, strict=True) for tensor in held}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(listed.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors, on the CPU, as many at a time as fill a file."""
    on_cpu = ((name, tensor.detach().cpu().contiguous()) for name, tensor in tensors)
    return map(dict, buckets(on_cpu, lambda named: named[1].nbytes, FILE_BYTES))


def _buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Those that belong to the model's state."""
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
