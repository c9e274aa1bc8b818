"""Runs of one and of several processes, with accidents: `clipctl train --nproc N` in forks of a process that has loaded torch,
because loading it takes longer than such a run; never after a backward pass.

python ranks_lab.py FOLDER < CASES: a JSON list of {"log", "arguments", "accident", "rank", "at"}; prints, for each, exit code
and seconds. What it said is in FOLDER/log.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb  # noqa: F401
import pyarrow
import pyarrow.parquet
import torch

from clipctl import heartbeat, load_spec
from clipctl.cli import main
from clipctl.engine import open_engine
from clipctl.engine.torch_sampler import TorchSampler
from clipctl.engine.torch_trainer import TorchTrainer
from clipctl.errors import DivergedError
from clipctl.models import find_model, load_tokenizer
from clipctl.rollout import Problem


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nof many lines")


def bug() -> None:
    raise KeyError("a bug")


def diverge() -> None:
    raise DivergedError("the update is not finite: loss nan, gradient norm nan; the step was not taken")


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


ACCIDENTS: dict[str, Callable[[], None]] = {
    "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    "SIGUSR2": lambda: signal.raise_signal(signal.SIGUSR2),
    "SIGINT": lambda: signal.raise_signal(signal.SIGINT),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "out of memory": out_of_memory,
    "bug": bug,
    "diverge": diverge,
    "hang": hang,
}


def arrange(accident: str, rank: int, at: str) -> None:
    """The accident happens on one rank in the so manieth update, counted from 1 over all rollouts (`update 8`), or when its
    sampler gives the so manieth group (`group 5`)."""
    kind, number = at.split()
    seen = [0]

    def count() -> None:
        seen[0] += 1
        if seen[0] == int(number) and os.environ.get("RANK", "0") == str(rank):
            ACCIDENTS[accident]()

    step, sample = TorchTrainer.step, TorchSampler.sample

    def stepping(self: TorchTrainer, *arguments: Any) -> Any:
        count()
        return step(self, *arguments)

    def sampling(self: TorchSampler, *arguments: Any, **options: Any) -> Iterator[Any]:
        for group in sample(self, *arguments, **options):
            count()
            yield group

    if kind == "update":
        TorchTrainer.step = stepping  # type: ignore[method-assign, assignment]
    else:
        TorchSampler.sample = sampling  # type: ignore[method-assign]


def dice(completion: str, problem: Problem) -> float:
    """A reward that is a bug on rank 1."""
    return 1.0 / (1 - int(os.environ.get("RANK", "0")))


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"exit": code, "seconds": time.monotonic() - started}
    log = os.open(folder / case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    if case.get("accident"):
        arrange(case["accident"], case["rank"], case["at"])
    if case.get("accident") == "hang":
        heartbeat.LOST_SECONDS = 4.0
    os.chdir(folder)
    sys.argv = ["clipctl", "train", "--preset", "tiny", *case["arguments"]]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        code = sys.exc_info()[1]
        os._exit(code.code if isinstance(code, SystemExit) and isinstance(code.code, int) else 1)


if __name__ == "__main__":
    # What a run would load is loaded before the forks.
    open_engine(load_spec("tiny"), find_model("tiny", pull=False), 96, print)
    load_tokenizer(find_model("tiny", pull=False), None)
    pyarrow.array([1.0])
    for case in json.load(sys.stdin):
        print(json.dumps(run(Path(sys.argv[1]), case)), flush=True)
