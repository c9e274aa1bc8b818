"""Processes of `clipctl` that start in milliseconds: a server that has imported torch and transformers forks one for each.

    sweep ── pipes ── server (one thread, everything imported, no CUDA context) ── forks ── `clipctl train …`, one a run

The server is a fresh Python program with the caller's module path, in a session of its own, so that Ctrl-C in a terminal comes
to the runs once, from the sweep. It ends with its caller and its runs end with it, by the kernel's parent-death signal, also
after `kill -9` of any of them.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from clipctl.grading_worker import die_with, fresh_program

IMPORTS = (
    "clipctl.train", "clipctl.progress", "clipctl.plan", "clipctl.arith", "clipctl.statistics", "clipctl.engine.torch_sampler",
    "clipctl.engine.torch_trainer", "clipctl.engine.torch_probe", "clipctl.engine.optimizers", "clipctl.fold",
    "duckdb", "pyarrow.parquet", "safetensors.torch", "psutil",
    "torch._dynamo", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers",
)  # fmt: skip
"""What a run imports; a module that this environment does not have is left to the run."""
IMPORTS_WITHOUT_GPU = ("deepspeed", "pandas")
"""What transformers imports when it saves a model, where they are installed. DeepSpeed looks for GPUs when it is imported, and a
CUDA context must not be forked."""


def serve(parent: int, imports: Sequence[str]) -> None:
    """Main program of the server: requests in on stdin, one JSON object a line, until that closes; what became of them out on
    stdout. Returns in forked children too, when their command has ended."""
    die_with(parent)
    # What comes to a run before it has its own handlers ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Packages print when they are imported.
    answers = os.dup(1)
    os.dup2(2, 1)
    for name in imports:
        with suppress(ImportError):
            __import__(name)
    gc.collect()
    woken, wake = os.pipe()
    for handle in (woken, wake):
        os.set_blocking(handle, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    request = _forks(woken, answers)
    if request is not None:
        signal.set_wakeup_fd(-1)
        for handle in (woken, wake, answers):
            os.close(handle)
        _become(request)


def _forks(woken: int, answers: int) -> dict[str, Any] | None:
    """The loop of the server. Ends with None when the caller is gone, and in a child with what it has to do."""
    children: dict[int, int] = {}
    waiting = b""
    server = os.getpid()
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == woken:
                    with suppress(BlockingIOError):
                        os.read(woken, 4096)
                    continue
                received = os.read(0, 1 << 16)
                if not received:
                    return None
                *lines, waiting = (waiting + received).split(b"\n")
                for request in map(json.loads, lines):
                    if "signal" in request:
                        for pid, number in children.items():
                            if number in request["runs"]:
                                os.kill(pid, request["signal"])
                        continue
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        return {**request, "server": server}
                    children[pid] = request["run"]
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _say(answers, {"run": children.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _say(handle: int, answer: Mapping[str, Any]) -> None:
    # Where nobody reads any more, the end of stdin says so too.
    with suppress(BrokenPipeError):
        os.write(handle, json.dumps(answer).encode() + b"\n")


def _become(request: Mapping[str, Any]) -> None:
    """The forked child: `clipctl` with its arguments, in a session of its own, its output in a file. Ends the process."""
    die_with(request["server"])
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for handle, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(handle, place)
    os.close(output)
    os.close(nothing)
    sys.argv = ["clipctl", *request["command"]]
    runpy.run_module("clipctl", run_name="__main__", alter_sys=True)


class ForkServer:
    """The caller's side. One thread only; a server that was killed is started again, its runs having died with it."""

    def __init__(self, output: Path, *, gpus: bool) -> None:
        """output: file that the server's own output is added to. gpus: whether the runs use them."""
        self._output = output
        self._imports = IMPORTS if gpus else (*IMPORTS, *IMPORTS_WITHOUT_GPU)
        self._server: subprocess.Popen[bytes] | None = None
        self._waiting = b""
        self._runs: set[int] = set()

    def start(
        self, run: int, command: Sequence[str], output: Path, cores: Sequence[int], environment: Mapping[str, str]
    ) -> None:
        """Starts `clipctl` with these arguments. run: a number of the caller's. output: file that its output is added to.
        cores: those it may use, all where there are none."""
        if self._server is None or self._server.poll() is not None:
            with self._output.open("ab") as own_output:
                self._server = subprocess.Popen(
                    fresh_program("clipctl.fork_server", os.getpid(), self._imports),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=own_output,
                    start_new_session=True,
                )
            self._waiting = b""
        self._runs.add(run)
        self._send(
            {
                "run": run,
                "command": list(command),
                "output": str(output.absolute()),
                "cores": list(cores),
                "environment": dict(environment),
            }
        )

    def signal(self, number: int) -> None:
        """Sends a signal to all runs."""
        self._send({"signal": int(number), "runs": sorted(self._runs)})

    def ended(self, seconds: float) -> dict[int, int]:
        """Run → exit code, negative for a signal, of those that ended, after so many seconds at most."""
        if self._server is None:
            return {}
        stream = self._server.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            received = os.read(stream.fileno(), 1 << 16) if selector.select(seconds) else None
        if received == b"":
            # The server was killed, and every run with it.
            self._server.wait()
            lost, self._runs, self._server = self._runs, set(), None
            return dict.fromkeys(lost, -signal.SIGKILL)
        *lines, self._waiting = (self._waiting + (received or b"")).split(b"\n")
        codes = {answer["run"]: answer["code"] for answer in map(json.loads, lines)}
        self._runs -= codes.keys()
        return codes

    def close(self) -> None:
        """Ends the server; runs that are left are killed."""
        if self._server is not None:
            for stream in (self._server.stdin, self._server.stdout):
                _close(stream)
            self._server.kill()
            self._server.wait()
            self._server = None

    def _send(self, request: Mapping[str, Any]) -> None:
        # A server that has been killed is noticed by `ended`.
        if self._server is not None and self._server.stdin is not None:
            with suppress(BrokenPipeError):
                self._server.stdin.write(json.dumps(request).encode() + b"\n")
                self._server.stdin.flush()


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with suppress(BrokenPipeError):
            stream.close()
