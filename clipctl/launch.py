"""`clipctl train --nproc N`: one machine, N processes, of which this one is none: it waits for them.

The processes are forked before torch is loaded, by a command line that was found to be right, so each begins where this one was.
Rank 0 has this process's terminal; what the others say is shown when they fail. They die with this process, however it ends:
the kernel sees to it (PR_SET_PDEATHSIG). Otherwise they end each other (`clipctl.heartbeat`), and this process waits.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, NoReturn

from clipctl.errors import EngineError, SpecError
from clipctl.grading_worker import die_with
from clipctl.interrupts import SIGNALS
from clipctl.rendezvous import LISTEN, find_seat

TICK_SECONDS = 1.0
PATIENCE = {True: 300.0, False: 20.0}
"""Seconds after which rank 0 (True) is killed when another process has failed, and the others when rank 0 has ended. They have
ended long before, unless one is stuck; rank 0 may have much to write."""
SHOWN_LINES = 30
"""Of what a process that failed has said, the last ones."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the run. said: what it wrote; None for rank 0, whose words are seen as they come."""

    rank: int
    said: IO[str] | None


def check_nproc(count: int) -> None:
    """Raises SpecError where processes were started already, or where there is none."""
    if count < 1:
        raise SpecError(f"--nproc = {count}: at least 1")
    seat = find_seat()
    if seat is not None:
        raise SpecError(
            f"--nproc = {count}: this is process {seat.rank} of {seat.size} that {seat.launcher} has started; leave --nproc out, "
            "or start one process a machine"
        )


def start_ranks(count: int, threads: int) -> None:
    """Returns in the `count` processes of the run; ends the one that called it when all of them have ended, with the exit code of
    the first that failed. threads: of each, on CPUs."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4 * count)
    caught = {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*caught, signal.SIGCHLD, signal.SIGALRM})
    launcher, children = os.getpid(), {}
    for rank in range(count):
        said = tempfile.TemporaryFile("w+", errors="replace") if rank else None  # noqa: SIM115
        pid = os.fork()
        if pid == 0:
            die_with(launcher)
            _take_seat(rank, count, threads, listener, said)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return
        children[pid] = Child(rank, said)
    listener.close()
    _end(_watch(children, caught), children)


def _take_seat(rank: int, count: int, threads: int, listener: socket.socket, said: IO[str] | None) -> None:
    port = listener.getsockname()[1]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CLIPCTL_NPROC": str(count), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    if sys.platform == "linux":
        # Gloo takes the interface of the host's name, which may have no address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if said is None:
        os.environ[LISTEN] = str(listener.detach())
        return
    listener.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)


def _watch(children: Mapping[int, Child], caught: set[signal.Signals]) -> dict[int, int]:
    """Forwards signals until all children have ended; their exit codes (negative: of a signal), in the order of their ends."""
    ended: dict[int, int] = {}
    since: dict[bool, float] = {}
    signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
    while len(ended) < len(children):
        # SIGCHLD and SIGALRM only wake this loop up.
        number = signal.sigwait({*caught, signal.SIGCHLD, signal.SIGALRM})
        while len(ended) < len(children) and (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
            is_first = children[found[0]].rank == 0
            if is_first or ended[found[0]]:
                since.setdefault(not is_first, time.monotonic())
        living = [pid for pid in children if pid not in ended]
        if number in caught:
            _signal(living, signal.Signals(number))
        for first, start in since.items():
            if time.monotonic() - start > PATIENCE[first]:
                _signal([pid for pid in living if (children[pid].rank == 0) == first], signal.SIGKILL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ended


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _end(ended: Mapping[int, int], children: Mapping[int, Child]) -> NoReturn:
    """Says what only this process knows, and exits."""
    code = 0
    for pid, status in ended.items():
        child = children[pid]
        code = code or (status if status >= 0 else EngineError.exit_code)
        if status < 0 and child.rank == 0:
            print(f"clipctl: rank 0 (process {pid}) was killed by {signal.Signals(-status).name}", file=sys.stderr)
        if status and child.said is not None:
            child.said.seek(0)
            for line in child.said.read().splitlines()[-SHOWN_LINES:]:
                print(f"[rank {child.rank}] {line}", file=sys.stderr)
    sys.exit(code)
