"""Runs a small run in forked processes that end, as by kill -9, before the n-th change of a file of the run.

python crash_lab.py FOLDER N...: for each N a run in FOLDER/N that dies there and is run again; N = 0 dies nowhere. Prints the
number of changes of a whole run. Forked, because loading torch takes longer than such a run; never after a backward pass.
"""

import os
import sys
from pathlib import Path
from typing import Any

import duckdb  # noqa: F401
import pyarrow.parquet

from clipctl import load_spec
from clipctl.engine import open_engine
from clipctl.models import find_model, load_tokenizer
from clipctl.train import train

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
SPEC: dict[str, Any] = {
    "run.name": "x",
    "run.steps": 2,
    "data.arith.problems": 64,
    "rollout.prompts": 4,
    "rollout.group_size": 4,
    "rollout.max_response_tokens": 8,
    "optim.responses_per_update": 8,
    "optim.lr": 1e-3,
    "ledger.probe_states": 8,
    "ledger.network_every": 2,
    "control.target_entropy": 0.5,
    "checkpoint.keep": 1,
    "eval.every": 1,
    "eval.benchmarks": ["arith"],
    "eval.k": 1,
    "eval.limit": 2,
    "eval.reuse": False,
    "store.tokens": "all",
}


def count_changes(folder: Path, last: int) -> list[int]:
    """Counts what changes files under the folder, and ends the process before the `last` change."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # An os.open is a file that is about to be fsynced: what was written into it before is there.
        opens = event == "open" and (arguments[1] is None or set(str(arguments[1])) & set("wa"))
        if (opens or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
            seen[0] += 1
            if seen[0] == last:
                os._exit(9)

    sys.addaudithook(hook)
    return seen


def in_a_fork(folder: Path, last: int) -> int:
    """Exit status of a run in the folder; prints how many changes it made when it ends."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = count_changes(folder, last)
    try:
        train(load_spec("tiny", SPEC), runs_dir=folder, warn=lambda line: None)
        print(seen[0], flush=True)
        os._exit(0)
    finally:
        os._exit(1)


def main(folder: Path, crashes: list[int]) -> None:
    # What a run would load is loaded before the forks.
    open_engine(load_spec("tiny", SPEC), find_model("tiny", pull=False), 96, print)
    load_tokenizer(find_model("tiny", pull=False), None)
    pyarrow.array([1.0])
    for last in crashes:
        place = folder / str(last)
        place.mkdir()
        assert in_a_fork(place, last) == (9 if last else 0), last
        if last:
            assert in_a_fork(place, 0) == 0, last


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(last) for last in sys.argv[2:]])
