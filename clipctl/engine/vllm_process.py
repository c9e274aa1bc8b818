"""The process in which vLLM runs, from the side of the one that starts it.

It is a fresh Python program (`vllm_server`), neither forked nor started through `multiprocessing`: it needs no guard in the
caller's script, copies no threads and no CUDA context, what vLLM changes in torch and in the environment stays in it, and
`kill -9` of it is survived. It leads a process group of its own, which ends with it, and it ends with the process that
started it, however that ends.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clipctl.grading_worker import fresh_program

START_SECONDS = 1800.0
"""How long an engine may take to start: reading weights from a slow disk, compiling, capturing CUDA graphs."""
LOST_SECONDS = 300.0
"""How long it may say nothing while it has something to do, before it counts as lost; it says so after every few steps."""
CLOSE_SECONDS = 5.0
NOT_FOR_THE_ENGINE = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
"""What launchers tell the trainer's processes, so that vLLM would take itself for one of them, and how the trainer's memory is
allocated, since vLLM cannot sleep with some of that."""


class EngineLost(Exception):
    """The process ended or does not answer. Never leaves the sampler, which starts another one or gives up."""


class EngineProcess:
    """A running engine. One exchange at a time, and none after an exchange that was interrupted.

    arguments: of vLLM's `EngineArgs`. environment: over that of this process. descriptors: of files that it inherits.
    """

    def __init__(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str], descriptors: Sequence[int] = ()
    ) -> None:
        self._pipe: Connection[Any, Any]
        self._pipe, theirs = Pipe()
        self._folder = Path(tempfile.mkdtemp(prefix="clipctl-vllm-"))
        self._ready = False
        kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_ENGINE}
        with theirs, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                fresh_program("clipctl.engine.vllm_server", theirs.fileno(), os.getpid()),
                pass_fds=(theirs.fileno(), *descriptors),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=kept | dict(environment) | {"TMPDIR": str(self._folder)},
                # A Ctrl-C at the terminal is for this process, which then ends that one.
                start_new_session=True,
            )
        self._pipe.send(dict(arguments))

    @property
    def log(self) -> Path:
        """All that vLLM prints."""
        return self._folder / "vllm.log"

    @property
    def pid(self) -> int:
        """Of the engine's process, which leads the group of all that it starts."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Returns when it takes requests. Raises EngineLost when it does not start."""
        if not self._ready:
            kind, *_ = self.receive(START_SECONDS)
            assert kind == "ready", kind
            self._ready = True

    def call(self, name: str, **arguments: Any) -> Any:
        """What one of `vllm_server.CALLS` returns. Raises EngineLost."""
        self.send(("call", name, arguments))
        kind, value = self.receive(START_SECONDS)
        assert kind == "done", kind
        return value

    def send(self, message: tuple[Any, ...]) -> None:
        """Raises EngineLost."""
        try:
            self._pipe.send(message)
        except OSError:
            raise EngineLost(self._how_it_ended()) from None

    def receive(self, seconds: float = LOST_SECONDS) -> tuple[Any, ...]:
        """The next message but signs of life, each within so many seconds. Raises EngineLost."""
        message: tuple[Any, ...] = ("alive",)
        try:
            while message == ("alive",):
                if not self._pipe.poll(seconds):
                    raise EngineLost(f"it said nothing for {seconds:g} s")
                message = self._pipe.recv()
        except (EOFError, OSError):
            raise EngineLost(self._how_it_ended()) from None
        if message[0] == "failed":
            raise EngineLost(message[1])
        return message

    def close(self, *, keep_log: bool = False) -> None:
        """Ends it and all that it started."""
        self._pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        # Its number stays taken as long as anything of its group is left.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if not keep_log:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "its pipe closed"
        return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
