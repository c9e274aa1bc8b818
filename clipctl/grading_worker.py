r"""The killable processes in which formulas are read and compared.

    this process ── pipe ── server (one thread, Math-Verify imported once) ── forks ── workers, one formula each

The server is started as a fresh Python program, not forked and not through `multiprocessing`: it needs no guard in the
caller's script, copies no threads and no CUDA context, and sees no secrets of the environment. It forks workers in
milliseconds, kills them at their limit and reaps them. It ends when its pipe closes or its parent changes, workers by
the kernel's parent-death signal, so nothing stays behind even after `kill -9` of the caller.
"""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic
from types import TracebackType
from typing import Self

from clipctl.errors import DependencyError, EngineError

MEMORY_BYTES = 4 << 30
"""Address space of a worker; ordinary gradings stay under a twentieth of it."""
GRADINGS_PER_WORKER = 2_000
"""A worker is replaced after so many, because sympy's caches only grow."""
ANSWER_BYTES = 1 << 20
"""What a worker may send back."""
LOST_SECONDS = 60
"""How much longer than its limits allow the server may take before it counts as lost."""
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

# --- the server and its workers ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Worker:
    """A forked process, and what it is doing."""

    pid: int
    pipe: "Connection[bytes, bytes]"
    item: int | None = None
    deadline: float = math.inf
    done: int = 0


def serve(fd: int, parent: int, workers: int, timeout: int) -> None:
    """Main program of the server: batches in, outcomes out, until the pipe closes or `parent` is gone.

    fd: of the pipe; timeout: whole seconds for one request. A batch is JSON, `{"requests": […], "budget": seconds or
    null}`, its answer a JSON list of outcomes in order, `budget` for what the budget did not reach.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    client: Connection[bytes, bytes] = Connection(fd)
    _warm_up()
    crew: list[Worker] = []
    try:
        for _ in range(workers):
            crew.append(_fork(client))
        client.send_bytes(b"ready")
        while os.getppid() == parent:
            if not client.poll(1.0):
                continue
            batch = json.loads(client.recv_bytes())
            outcomes = _run_batch(client, parent, crew, batch["requests"], timeout, batch["budget"])
            client.send_bytes(json.dumps(outcomes).encode())
    except (EOFError, OSError):
        return  # the caller is gone
    finally:
        # The caller closes the pipe and then asks by signal: the second must not cut the first one's cleaning short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for worker in crew:
            _end(worker)


WARMING = (
    (r"\frac{1}{2}+x^{2}", r"x^2+\frac{\sqrt{4}}{4}"),
    (r"x^2+x", r"x(1+x)"),
    (r"\frac{1}{x+1}", r"\frac{x-1}{x^2-1}"),
    (r"\sin x", r"\cos x"),
    (r"(1,2]", r"[1, 2)"),
    (r"\{1,\log_2 8\}", r"\{3,1\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"2+3i", r"e^{2}"),
    (r"y=2x+1", r"y-2x=1"),
)


def _warm_up() -> None:
    """Imports Math-Verify and runs it on formulas of many kinds, so that every fork has its parser tables and sympy's
    lazy parts: the first formula to be simplified takes 15 times longer than the next."""
    import logging

    from clipctl.formulas import answer_request

    logging.disable(logging.CRITICAL)
    for gold, answer in WARMING:
        parsed = answer_request(["parse", gold])
        answer_request(["grade", parsed, "boxed", answer])
        answer_request(["grade", parsed, "tail", f"so it is ${answer}$ or 5"])
    gc.collect()
    gc.freeze()


def _run_batch(
    client: "Connection[bytes, bytes]",
    parent: int,
    crew: list[Worker],
    requests: list[list[str]],
    timeout: int,
    budget: float | None,
) -> list[str]:
    outcomes = ["budget"] * len(requests)
    waiting = deque(range(len(requests)))
    end = math.inf if budget is None else monotonic() + budget
    while monotonic() < end:
        for at, worker in enumerate(crew):
            if waiting and worker.item is None:
                crew[at] = _give(client, worker, waiting.popleft(), requests, timeout)
        busy = {worker.pipe: at for at, worker in enumerate(crew) if worker.item is not None}
        if not busy:
            return outcomes
        next_deadline = min(end, *(worker.deadline for worker in crew))
        ready = wait([*busy, client], max(0.0, min(next_deadline - monotonic(), 1.0)))
        # Nothing is sent during a batch, so the caller has hung up; a fork of a killed caller may hold the pipe open.
        if client in ready or os.getppid() != parent:
            raise EOFError
        for pipe, at in busy.items():
            worker, item = crew[at], crew[at].item
            assert item is not None
            if pipe in ready:
                outcomes[item] = _receive(worker)
            elif monotonic() >= worker.deadline:
                outcomes[item] = "timeout"
            else:
                continue
            worker.item, worker.deadline = None, math.inf
            if outcomes[item] in ("timeout", "crash") or worker.done >= GRADINGS_PER_WORKER:
                crew[at] = _replace(client, worker)
    for at, worker in enumerate(crew):
        if worker.item is not None:
            crew[at] = _replace(client, worker)
    return outcomes


def _give(
    client: "Connection[bytes, bytes]", worker: Worker, item: int, requests: list[list[str]], timeout: int
) -> Worker:
    message = json.dumps([timeout, requests[item]]).encode()
    try:
        worker.pipe.send_bytes(message)
    except OSError:  # died while idle
        worker = _replace(client, worker)
        worker.pipe.send_bytes(message)
    worker.item, worker.deadline = item, monotonic() + timeout
    worker.done += 1
    return worker


def _receive(worker: Worker) -> str:
    try:
        return worker.pipe.recv_bytes(ANSWER_BYTES).decode()
    except (EOFError, OSError):
        return "crash"


def _replace(client: "Connection[bytes, bytes]", worker: Worker) -> Worker:
    _end(worker)
    return _fork(client)


def _end(worker: Worker) -> None:
    # It is gone already where a signal cut an earlier call short.
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
    worker.pipe.close()


def _fork(client: "Connection[bytes, bytes]") -> Worker:
    ours, theirs = Pipe()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            ours.close()
            client.close()
            _work(theirs, server)
        os._exit(1)
    theirs.close()
    return Worker(pid, ours)


def _work(pipe: "Connection[bytes, bytes]", server: int) -> None:
    import resource

    from clipctl.formulas import answer_request

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(server)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    cpu_hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        timeout, request = json.loads(pipe.recv_bytes())
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = math.ceil(used.ru_utime + used.ru_stime) + timeout + 2
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, cpu_hard))
        try:
            outcome = answer_request(request)
        except (Exception, MemoryError, RecursionError):
            outcome = "crash"
        pipe.send_bytes(outcome.encode())


def die_with(server: int) -> None:
    """Asks the kernel (Linux) to kill this process when the server that forked it dies, even in the middle of a hanging call."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)


# --- the caller's side ------------------------------------------------------------------------------------------------

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from importlib import import_module; import_module(sys.argv[2]).serve(*json.loads(sys.argv[3]))"
)


def fresh_program(module: str, *arguments: object) -> list[str]:
    """The command of a fresh Python program with this one's module path that calls `serve` of a module. arguments: of that, as
    JSON takes them."""
    path = [path or os.getcwd() for path in sys.path]
    return [sys.executable, "-c", BOOT, json.dumps(path), module, json.dumps(arguments)]


class Workers:
    """Killable processes that answer requests (see `formulas.answer_request`); a context manager.

    workers: processes; timeout: whole seconds for one request; start: at once, not with the first request. Safe to use
    from any thread; after a fork of the caller the child starts processes of its own. Raises DependencyError without
    math-verify, EngineError when the processes do not start.
    """

    def __init__(self, workers: int, timeout: int, *, start: bool = True) -> None:
        assert workers >= 1
        assert type(timeout) is int
        assert timeout >= 1
        self.workers, self.timeout = workers, timeout
        self._lock = threading.Lock()
        self._pipe: Connection[bytes, bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._closed = False
        if start:
            self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, requests: Sequence[Sequence[str]], budget_seconds: float | None = None) -> list[str]:
        """Answers in order; instead of one `timeout`, `crash`, or `budget` where that of the whole call did not reach.

        A killed worker costs its own request only. A lost server is replaced once. Raises EngineError when that is
        lost too, and when `close` is called meanwhile.
        """
        if not requests:
            return []
        message = json.dumps({"requests": requests, "budget": budget_seconds}).encode()
        longest = len(requests) * (self.timeout + 1.0)
        longest = min(longest, math.inf if budget_seconds is None else budget_seconds) + LOST_SECONDS
        self._after_fork()
        with self._lock:
            for _ in range(2):
                answered = False
                try:
                    if self._server is None and not self._closed:
                        self._start()
                    # `close` sets this and then ends the server, so that one of the two always notices the other.
                    if self._closed:
                        raise EngineError("the grading processes were ended while they were in use")
                    assert self._pipe is not None
                    self._pipe.send_bytes(message)
                    if self._pipe.poll(longest):
                        answers: list[str] = json.loads(self._pipe.recv_bytes())
                        answered = True
                        return answers
                except (EOFError, OSError):
                    continue
                finally:
                    if not answered:
                        # Also on Ctrl-C: the answer to this batch must not be taken for that of the next.
                        self._stop()
        raise EngineError("the grading processes died twice in one batch; is memory short, or are they being killed?")

    def close(self) -> None:
        """Ends all processes, for good, and waits for them; a `run` under way in another thread ends at once."""
        self._after_fork()
        self._closed = True
        server = self._server
        if server is not None:
            server.terminate()
        if not self._lock.acquire(timeout=5):
            if server is not None:
                server.kill()
            self._lock.acquire()
        try:
            self._stop()
        finally:
            self._lock.release()

    def _after_fork(self) -> None:
        """In a forked child: another thread of the parent may hold the lock for ever, and pipe and server are its."""
        if self._owner != os.getpid():
            self._lock = threading.Lock()
            self._owner = os.getpid()
            self._server = None
            if self._pipe is not None:
                self._pipe.close()
                self._pipe = None

    def _start(self) -> None:
        from importlib.util import find_spec

        if find_spec("math_verify") is None:
            raise DependencyError(
                "math-verify is not installed; the math grader needs it: pip install 'math-verify[antlr4_13_2]==0.9.0'"
            )
        self._pipe, theirs = Pipe()
        kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        started = False
        try:
            self._server = subprocess.Popen(
                fresh_program("clipctl.grading_worker", theirs.fileno(), os.getpid(), self.workers, self.timeout),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=kept | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                # A Ctrl-C at the terminal is for the caller, who then ends these processes.
                start_new_session=True,
            )
            theirs.close()
            self._pipe.recv_bytes()
            started = True
        except (EOFError, OSError):
            message = "the grading processes did not start; `python -c 'import math_verify'` may show why"
            raise EngineError(message) from None
        finally:
            theirs.close()
            if not started:
                self._stop()

    def _stop(self) -> None:
        server, pipe = self._server, self._pipe
        self._server, self._pipe = None, None
        if pipe is not None:
            pipe.close()
        if server is None:
            return
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


PARSED_GOLDS: dict[str, str] = {}
"""Golds as workers have parsed them, once for the life of this process, which does not look inside."""
PARSED_AT_MOST = 200_000


def parse_golds(workers: Workers, golds: Sequence[str], budget_seconds: float | None = None) -> dict[str, str]:
    """Each gold answer in its parsed form, which the request "grade" wants; or `bad_gold`, `timeout`, `crash`, `budget`
    (NOT_PARSED) where it has none."""
    known = {gold: PARSED_GOLDS.get(gold) for gold in golds}
    new = [gold for gold, parsed in known.items() if parsed is None]
    answers = dict(zip(new, workers.run([("parse", gold) for gold in new], budget_seconds), strict=True))
    if len(PARSED_GOLDS) + len(new) > PARSED_AT_MOST:
        PARSED_GOLDS.clear()
    PARSED_GOLDS.update((gold, answer) for gold, answer in answers.items() if answer not in NOT_PARSED)
    return {gold: parsed or answers[gold] for gold, parsed in known.items()}


NOT_PARSED = frozenset({"bad_gold", "timeout", "crash", "budget"})
