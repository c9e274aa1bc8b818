"""Which process of a run this one is: what `--nproc`, torchrun, deepspeed and srun put into the environment.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun sets SLURM_PROCID and
SLURM_STEP_NUM_TASKS for the tasks of a step; SLURM_NTASKS alone, which a batch script and the shell of salloc have as well,
means nothing here. Sources: torchrun's "Environment Variables", srun(1) "OUTPUT ENVIRONMENT VARIABLES".
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from clipctl.errors import SpecError

LISTEN = "CLIPCTL_LISTEN"
"""Names, for rank 0 of `--nproc`, the descriptor of a socket that listens already: no other process can take its port."""
BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20000, 32000)
"""For steps of srun: under what Linux gives to outgoing connections."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One of `size` processes. local_rank: among those of its machine. address, port: where rank 0 is met. listen: a socket
    of rank 0's that listens there. hosted: somebody else answers there, for all ranks. launcher: who started them."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    launcher: str
    listen: int | None = None
    hosted: bool = False


def quiet_torch() -> None:
    """Of a store that is gone torch.distributed writes pages to stderr; to be called before torch is loaded."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def find_seat(environment: Mapping[str, str] = os.environ) -> Seat | None:
    """None where this process is alone. Raises SpecError for an environment that is not complete."""
    if "WORLD_SIZE" in environment:
        return _of_torchrun(environment) if _number(environment, "WORLD_SIZE") > 1 else None
    if "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        return _of_srun(environment)
    return None


def first_host(nodes: str) -> str:
    """The first machine of a Slurm node list: of `gpu[007-009,12],login`, gpu007."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def step_port(job: int, step: int) -> int:
    """The port of a step's rank 0: neighbouring jobs and steps have different ones."""
    return PORTS[(job * 7919 + step * 1013) % len(PORTS)]


def _of_torchrun(environment: Mapping[str, str]) -> Seat:
    missing = [name for name in BY_TORCHRUN if name not in environment]
    if missing:
        raise SpecError(
            f"WORLD_SIZE = {environment['WORLD_SIZE']} says that there are several processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start them with torchrun, deepspeed, srun or --nproc, or unset "
            "WORLD_SIZE"
        )
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank >= size:
        raise SpecError(f"RANK = {rank}: with WORLD_SIZE = {size} the last one is {size - 1}")
    return Seat(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK"),
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        launcher="--nproc" if "CLIPCTL_NPROC" in environment else "torchrun or deepspeed",
        listen=_number(environment, LISTEN) if LISTEN in environment and rank == 0 else None,
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_srun(environment: Mapping[str, str]) -> Seat:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job, step = _number(environment, "SLURM_JOB_ID", "0"), _number(environment, "SLURM_STEP_ID", "0")
    return Seat(
        rank=_number(environment, "SLURM_PROCID"),
        size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        address=environment.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        port=_number(environment, "MASTER_PORT", str(step_port(job, step))),
        launcher="srun",
    )


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise SpecError(
            f"{name} = {text!r} in the environment: a number is needed; whoever starts the processes sets it"
        )
    return int(text)
