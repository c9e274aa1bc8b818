"""Whether a vLLM engine on the trainer's GPU gives its memory back while the trainer works, from what is measured.

An engine in sleep of level 2 keeps neither weights nor KV cache, so it wakes only together with new weights.
"""

from collections.abc import Callable
from typing import Literal

import torch

from clipctl.engine.vllm_process import EngineProcess

Mode = Literal["auto", "never", "always"]
SPARE = 1.1
"""What updates were measured to need, times this: allocators leave gaps."""


def sleeps(mode: Mode, needed: int | None, free: int) -> bool:
    """Whether to sleep. needed: bytes that scoring and updates took at most beside what the trainer always holds, None
    before the first ones. free: bytes that it could have without the engine's."""
    return mode == "always" or (mode == "auto" and (needed is None or free < SPARE * needed))


class Sleep:
    """The sleep of one engine."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.asleep = False
        self.needed: int | None = None
        self._held = 0

    def rest(self, process: EngineProcess) -> None:
        """Nothing is sampled until there are new weights. Raises EngineLost."""
        torch.cuda.reset_peak_memory_stats()
        self._held = torch.cuda.memory_allocated()
        unused = torch.cuda.memory_reserved() - self._held
        if sleeps(self.mode, self.needed, torch.cuda.mem_get_info()[0] + unused):
            process.call("sleep")
            self.asleep = True

    def wake(self, process: EngineProcess, load: Callable[[], None]) -> None:
        """Loads the new weights, with the memory for them and then for the KV cache taken back. Raises EngineLost."""
        if not self.asleep:
            return load()
        self.needed = max(self.needed or 0, torch.cuda.max_memory_allocated() - self._held)
        torch.cuda.empty_cache()
        process.call("wake_up", tags=["weights"])
        load()
        process.call("wake_up", tags=["kv_cache"])
        self.asleep = False
