"""DeepSpeed imported and told about this process: quietly, on the right device, without compiling anything.

Where there is no GPU DeepSpeed must be told so before it is imported. Its shared-memory collectives for CPUs would be compiled
at the first use, for a minute and more, and a compilation that is killed leaves a lock on which every later one waits for ever;
gloo does without. Its logger and its prints go to stdout, which is for results.
"""

import atexit
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

from clipctl.errors import DependencyError
from clipctl.ranks import Ranks


def check_deepspeed() -> None:
    """Raises DependencyError where the package is not there."""
    if find_spec("deepspeed") is None:
        raise DependencyError(
            "engine.trainer = 'deepspeed': the package deepspeed is not installed; pip install 'clipctl[deepspeed]', or "
            "--set engine.trainer=torch"
        )


def load_deepspeed(ranks: Ranks, device: str) -> Any:
    """The module, with a process group that it can use: that of the ranks, or one of this process alone."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from clipctl.models import quiet_libraries

    check_deepspeed()
    quiet_libraries()
    # What DeepSpeed calls in torch is renamed there; nobody here can do anything about that.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    on_gpu = device == "cuda"
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if on_gpu else ranks.local_rank)
    with quiet():
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stdout."""
    with redirect_stdout(io.StringIO()):
        yield
