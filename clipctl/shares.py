"""The machine divided among runs that run at once: processor cores, and GPUs where the runs use them."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clipctl.errors import SpecError
from clipctl.spec import Engine

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the machine: processor cores, all where there are none, and GPUs as CUDA_VISIBLE_DEVICES has them."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


def share_machine(engines: Sequence[Engine], jobs: int) -> tuple[list[Share], list[str]]:
    """The machine's shares for runs with these engines, so many at once, and warnings. Raises SpecError where runs need a GPU
    and there is none."""
    gpus = machine_gpus() if any(engine.device == "cuda" for engine in engines) else None
    shares = divided(min(jobs, len(engines)), machine_cores(), gpus)
    threads, least = max(engine.threads for engine in engines), min(len(share.cores) for share in shares)
    # The number of threads belongs to the run's numbers, so it is never lowered.
    slow = f"engine.threads = {threads}, and each of {len(shares)} runs at once has {least} of the cores"
    return shares, [slow] if 0 < least < threads else []


def divided(jobs: int, cores: Sequence[int], gpus: Sequence[str] | None) -> list[Share]:
    """The shares of so many runs at once. Each gets the same number of whole cores, and of GPUs; where there are fewer than
    runs, they share them in turn."""
    return [
        Share(
            cores=tuple(_share(cores, jobs, at)) if jobs > 1 else (),
            gpus=None if gpus is None else tuple(_share(gpus, jobs, at)),
        )
        for at in range(jobs)
    ]


def _share(things: Sequence[Thing], parts: int, at: int) -> Sequence[Thing]:
    if len(things) < parts:
        return things[at % len(things) :][:1] if things else ()
    each = len(things) // parts
    return things[at * each : (at + 1) * each]


def machine_cores() -> list[int]:
    """The processor cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def machine_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use. Raises SpecError where there is none."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        found = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    else:
        found = []
    if not found:
        raise SpecError("engine.device = 'cuda': no GPU was found here; --set engine.device=cpu, or --launcher slurm")
    return found
