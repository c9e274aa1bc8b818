r"""Answers taken out of completions and compared with gold answers, and the killable processes that compare formulas.

`gsm8k` compares the last number of the text and needs nothing but Python. `math` compares what stands in the last
`\boxed{}` (else after the last "Answer:", else the last formula or number) by Math-Verify, which can hang, eat memory
and, with gmpy2 installed, ignore signals. So it only ever runs in workers that are killed from outside:

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
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

from clipctl.errors import DataError, DependencyError, EngineError

Outcome = Literal["correct", "wrong", "no_answer", "timeout", "crash", "too_long"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "crash", "too_long")

SEARCHED_CHARACTERS = 65_536
"""The end of a completion that is searched for an answer."""
ANSWER_CHARACTERS = 2_000
"""A longer answer is `too_long`; no benchmark has one over 200."""
MEMORY_BYTES = 4 << 30
"""Address space of a worker; ordinary gradings stay under a twentieth of it."""
GRADINGS_PER_WORKER = 2_000
"""A worker is replaced after so many, because sympy's caches only grow."""
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

# --- gsm8k: the last number -----------------------------------------------------------------------------------------

FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
MINUS_SIGNS = dict.fromkeys(map(ord, "−﹣‒"), ord("-"))
THIN_SPACES = dict.fromkeys(map(ord, "\u00a0\u2009\u202f"), 0x2009)
PLAIN = FULLWIDTH | MINUS_SIGNS | THIN_SPACES
TEX_IN_NUMBERS = (("{,}", ","), ("\\!", ""), ("\\,", "\u2009"), ("\\$", "$"), ("\\%", "%"))

CURRENCY = "$€£¥₹₽₩₺₪฿₫₦"
DIGITS = r"(?: \d{1,3} (?: [,\u2009]\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )?"
NUMBER = re.compile(
    rf"""
    (?<![^\W_]) (?<![^\W_]_) (?<![^\W\d_]-)                         # not in a word or its index
    (?<!\^) (?<!\^-) (?<![\^_]\{{) (?<!\^\{{-) (?<!\d\.)            # nor an exponent, nor a part of a version
    (?P<sign> (?<![\w)\]}}.]) - [{CURRENCY}]? | (?<![\w)\]}}.]) [{CURRENCY}] - )?
    (?: \\[dt]?frac \{{ (?P<top>\d{{1,18}}) \}} \{{ (?P<bottom>\d{{1,18}}) \}}
      | (?<!/) (?: (?P<whole>\d{{1,18}}) [ ] )? (?P<over>\d{{1,18}}) / (?P<under>\d{{1,18}}) (?![\d/]) (?!\.\d)
      | (?P<digits> (?> {DIGITS} | (?<![\w.]) \.\d+ ) ) (?!\.\d)
        (?: [eE] (?P<e> [+-]?\d{{1,3}} ) (?!\w)
          | [ ]? (?: × | \* | \\times | \\cdot ) [ ]? 10 [ ]? \^ \{{? (?P<ten> -?\d{{1,3}} ) (?!\d) \}}? )?
    )
    """,
    re.VERBOSE | re.ASCII,
)


def last_number(text: str) -> str | None:
    r"""The last number of the text in one canonical form ("18", "-2.5", "3/4"), None where there is none.

    The rules (source: "string match of the last numerical value", arXiv 2509.26114): thousands commas, currency signs,
    percent signs, trailing dots and trailing zeros of decimals do not count, so "$1,234.50" is "1234.5" and "50%" is
    "50". Signs count, U+2212 and full width too, but not the hyphen of "10-5". A number may carry a unit ("18kg"), but
    digits after a letter ("H2O", "week-3"), in an exponent or index ("18 cm^2", "x_3") and in versions ("1.2.3") are
    none. Powers of ten ("1.5e3", "2 × 10^3") are numbers. A fraction in lowest terms is one number (3/4 is 0.75, 1/3 is
    "1/3"); any other quotient ("36/2") is unfinished arithmetic and stays as written, equal to no number. Only the
    last SEARCHED_CHARACTERS of the text are read.
    """
    text = _plain(text[-SEARCHED_CHARACTERS:])
    end = len(text)
    # No number spans lines, and nearly all are in the last ones: so line by line, from the end.
    while end >= 0:
        start = text.rfind("\n", 0, end) + 1
        last = _last_match(NUMBER, text, start, end)
        if last is not None:
            return _canonical(last)
        end = start - 1
    return None


def _plain(text: str) -> str:
    text = text.translate(PLAIN)
    for tex, plain in TEX_IN_NUMBERS:
        text = text.replace(tex, plain)
    return text


def _last_match(pattern: re.Pattern[str], text: str, start: int = 0, end: int = sys.maxsize) -> re.Match[str] | None:
    last = deque(pattern.finditer(text, start, end), maxlen=1)
    return last[0] if last else None


def _canonical(number: re.Match[str]) -> str:
    sign = "-" if number["sign"] else ""
    if number["digits"]:
        digits = re.sub(r"[,\u2009]", "", number["digits"])
        return _plain_decimal(f"{sign}{digits}e{number['e'] or number['ten'] or 0}")
    top, bottom = int(number["top"] or number["over"]), int(number["bottom"] or number["under"])
    if bottom < 2 or math.gcd(top, bottom) != 1:
        return f"{sign}{top}/{bottom}"
    top += int(number["whole"] or 0) * bottom
    twos_and_fives = bottom
    for factor in (2, 5):
        while twos_and_fives % factor == 0:
            twos_and_fives //= factor
    if twos_and_fives != 1:
        return f"{sign}{top}/{bottom}"
    places = len(bin(bottom))
    return _plain_decimal(f"{sign}{top * 10**places // bottom}e-{places}")


def _plain_decimal(text: str) -> str:
    """Exact, without exponent, leading or trailing zeros: "018.50e0" is "18.5"."""
    plain = format(Decimal(text), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain


def grade_gsm8k(completion: str, answer: str) -> Outcome:
    """Whether the last number of the completion is that of the gold answer. Raises DataError for a gold without one."""
    gold = last_number(answer)
    if gold is None:
        raise DataError(f"answer {answer[:60]!r} has no number, which the gsm8k grader needs")
    found = last_number(completion)
    if found is None:
        return "no_answer"
    return "correct" if found == gold else "wrong"


# --- math: the last boxed answer --------------------------------------------------------------------------------------

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
ANSWER_COLON = re.compile(r"\banswer\s*(?:\*\*|__)?\s*:", re.IGNORECASE)
DISPLAY = re.compile(r"(\$\$|\\\[)\s*(.*?)\s*(?:\$\$|\\\])", re.DOTALL)
WRAPPERS = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
TEX_SPACING = re.compile(r"\\[!,;: ]|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\s|~")
PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?", re.ASCII)

Form = Literal["boxed", "line", "tail"]


@dataclass(frozen=True, slots=True)
class Extracted:
    """Where a completion has its answer, and the text there."""

    form: Form
    text: str


def extract_math(completion: str) -> Extracted | None:
    r"""The answer of a completion: the inside of the last closed `\boxed{}`, else what follows the last "Answer:" on
    its line (or the first line after it that has text), else the last 2000 characters, in which Math-Verify looks for
    the last formula or number. None where there is no text. Linear in the length; reads the last SEARCHED_CHARACTERS.
    """
    text = completion[-SEARCHED_CHARACTERS:]
    box = last_box(text)
    if box is not None:
        return Extracted("boxed", box) if box else None
    line = _answer_line(text)
    if line:
        return Extracted("line", line)
    tail = text.strip()
    if len(tail) > ANSWER_CHARACTERS:
        tail = tail[-ANSWER_CHARACTERS:].partition(" ")[2]
    return Extracted("tail", tail) if tail else None


def last_box(text: str) -> str | None:
    r"""The inside of the last `\boxed{…}` whose braces close (of nested boxes the innermost), stripped, or None.

    One pass with a stack: a search from every box to its end would be quadratic in boxes that never close.
    """
    stack: list[tuple[int, int]] = []
    best_start, best = -1, None
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "}":
            if stack:
                box_start, inside = stack.pop()
                if box_start > best_start:
                    best_start, best = box_start, text[inside : token.start()]
        elif token[0] == "{":
            stack.append((-1, token.end()))
        elif token[0].endswith("{") and len(token[0]) > 2:
            stack.append((token.start(), token.end()))
    bare = _last_match(BARE_BOX, text, max(best_start, 0))
    if bare is not None and bare.start() > best_start:
        best = bare[1]
    return None if best is None else best.strip()


def _answer_line(text: str) -> str:
    last = _last_match(ANSWER_COLON, text)
    if last is None:
        return ""
    after = text[last.end() :].lstrip("*_ \t\r\n")
    display = DISPLAY.match(after[: 2 * ANSWER_CHARACTERS])
    if display is not None:
        return f"${display[2]}$"
    return after.partition("\n")[0].strip("*_ \t\r")


def compare_cheaply(gold: str, answer: str) -> Outcome | None:
    """`correct` for equal texts and equal plain numbers, `wrong` for different integers, else None: ask Math-Verify.

    Both texts may be wrapped in dollar signs and carry TeX spacing. Numbers are compared as exact decimals.
    """
    gold, answer = _tidy(gold), _tidy(answer)
    if gold == answer:
        return "correct" if gold else None
    if not (PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer)):
        return None
    gold_number, number = Decimal(gold.replace(",", "")), Decimal(answer.replace(",", ""))
    if gold_number == number:
        return "correct"
    integers = gold_number == gold_number.to_integral_value() and number == number.to_integral_value()
    return "wrong" if integers else None


def is_plain_number(gold: str) -> bool:
    """Whether a gold answer can be used as it is, without Math-Verify."""
    return PLAIN_NUMBER.fullmatch(_tidy(gold)) is not None


def _tidy(text: str) -> str:
    text = text.strip().translate(FULLWIDTH | MINUS_SIGNS).rstrip(".")
    wrapped = WRAPPERS.fullmatch(text)
    if wrapped is not None:
        text = next(inside for inside in wrapped.groups() if inside is not None)
    text = TEX_SPACING.sub("", text).replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text.removeprefix("\\$").removeprefix("$").rstrip(".,") if text[-1:] in ".,$" or text[:1] in "\\$" else text


# --- what a worker does with Math-Verify ------------------------------------------------------------------------------


def compare_math(gold: str, form: str, text: str) -> str:
    """The outcome of a `math` grading, or `bad_gold`. It has no time limit: only for processes that can be killed."""
    from math_verify import verify

    parsed_gold = parse_gold(gold)
    if not parsed_gold:
        return "bad_gold"
    parsed = next(filter(None, map(_parse, _candidates(form, text))), None)
    if parsed is None:
        return "no_answer"
    try:
        right = verify(parsed_gold, parsed, timeout_seconds=None, raise_on_error=True)
    except Exception:
        # One pair of expressions that sympy cannot compare must not hide another that is equal.
        if not verify(parsed_gold, parsed, timeout_seconds=None):
            raise
        right = True
    return "correct" if right else "wrong"


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> list[Any]:
    """A gold answer as Math-Verify reads it (sympy expressions, then the text); empty where it finds no expression."""
    gold = _without_dollar_amounts(gold)
    parsed = _parse(gold if "$" in gold or "\\boxed" in gold else f"\\boxed{{{gold}}}") or _parse(gold)
    return parsed if any(not isinstance(item, str) for item in parsed) else []


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None, raise_on_error=True)
    return [item for item in parsed if not isinstance(item, str) or item.strip()]


def _without_dollar_amounts(text: str) -> str:
    r"""Math-Verify reads nothing in `\$32,\!348`, and takes it for 32348 without the dollar sign."""
    return text.replace("\\$", "").replace("\\!", "")


def _candidates(form: str, text: str) -> list[str]:
    """How to show the answer to Math-Verify, in the order in which to try."""
    text = _without_dollar_amounts(text)
    if form == "boxed":
        return [f"\\boxed{{{text}}}"]
    if form == "tail" or re.search(r"\$|\\\(|\\\[", text):
        return [text]
    # Words read as TeX become products of letters; a formula read as plain text loses all but a number.
    words = re.search(r"[^\W\d_]{3}", text) and not re.search(r"[\\^_{}=]", text)
    return [text, f"${text}$"] if words else [f"${text}$", text]


def answer_request(request: Sequence[str]) -> str:
    """`["grade", gold, form, text]` → an outcome or `bad_gold`; `["parse", gold]` → `parsed` or `bad_gold`."""
    if request[0] == "parse":
        return "parsed" if parse_gold(request[1]) else "bad_gold"
    return compare_math(*request[1:])


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
        crew += [_fork(client) for _ in range(workers)]
        client.send_bytes(b"ready")
        while os.getppid() == parent:
            if not client.poll(1.0):
                continue
            batch = json.loads(client.recv_bytes())
            outcomes = _run_batch(client, crew, batch["requests"], timeout, batch["budget"])
            client.send_bytes(json.dumps(outcomes).encode())
    except (EOFError, OSError):
        return  # the caller is gone
    finally:
        # The caller closes the pipe and then asks by signal: the second must not cut the first one's cleaning short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for worker in crew:
            _end(worker)


def _warm_up() -> None:
    """Imports Math-Verify and runs it once, so that every fork starts with its parser tables built."""
    import logging

    logging.disable(logging.CRITICAL)
    compare_math("\\frac{1}{2}+x^{2}", "boxed", "x^2+\\frac{\\sqrt{4}}{4}")
    compare_math("(1,2]", "tail", "so it is $[1, 2)$ or 5")
    gc.collect()
    gc.freeze()


def _run_batch(
    client: "Connection[bytes, bytes]",
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
        if client in ready:
            raise EOFError  # nothing is sent during a batch, so the caller has hung up
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
        return worker.pipe.recv_bytes(64).decode()
    except (EOFError, OSError):
        return "crash"


def _replace(client: "Connection[bytes, bytes]", worker: Worker) -> Worker:
    _end(worker)
    return _fork(client)


def _end(worker: Worker) -> None:
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

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(server)
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


def _die_with(server: int) -> None:
    """Asks the kernel (Linux) to kill this worker when the server dies, even in the middle of a hanging grading."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)


# --- the caller's side ------------------------------------------------------------------------------------------------

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from clipctl.grading_worker import serve; serve(*map(int, sys.argv[2:]))"
)


class Workers:
    """Killable processes that answer requests (see `answer_request`); a context manager.

    workers: processes; timeout: whole seconds for one request; start: at once, not with the first request. Safe to use
    from any thread; after a fork of the caller the child starts processes of its own. Raises DependencyError without
    math-verify, EngineError when the processes do not start.
    """

    def __init__(self, workers: int, timeout: int, *, start: bool = True) -> None:
        assert workers >= 1
        assert isinstance(timeout, int)
        assert timeout >= 1
        self.workers, self.timeout = workers, timeout
        self._lock = threading.Lock()
        self._pipe: Connection[bytes, bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = 0
        if start:
            self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, requests: Sequence[Sequence[str]], budget_seconds: float | None = None) -> list[str]:
        """Outcomes in order; `budget` for those that the budget of the whole call did not reach.

        A killed worker costs its own request only. A lost server is replaced once. Raises EngineError when that is
        lost too.
        """
        if not requests:
            return []
        message = json.dumps({"requests": requests, "budget": budget_seconds}).encode()
        with self._lock:
            for _ in range(2):
                if self._server is None or self._owner != os.getpid():
                    self._start()
                assert self._pipe is not None
                answered = False
                try:
                    self._pipe.send_bytes(message)
                    outcomes: list[str] = json.loads(self._pipe.recv_bytes())
                    answered = True
                    return outcomes
                except (EOFError, OSError):
                    continue
                finally:
                    if not answered:
                        # Also on Ctrl-C: the answer to this batch must not be taken for that of the next.
                        self._stop()
        raise EngineError("the grading processes died twice in one batch; is memory short, or are they being killed?")

    def close(self) -> None:
        """Ends all processes and waits for them. More requests would start them again."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        from importlib.util import find_spec

        if find_spec("math_verify") is None:
            raise DependencyError(
                "math-verify is not installed; the math grader needs it: pip install 'math-verify[antlr4_13_2]==0.9.0'"
            )
        ours, theirs = Pipe()
        kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        arguments = [theirs.fileno(), os.getpid(), self.workers, self.timeout]
        self._server = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps([path or os.getcwd() for path in sys.path]), *map(str, arguments)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=kept | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            # A Ctrl-C at the terminal is for the caller, who then ends these processes.
            start_new_session=True,
        )
        theirs.close()
        self._pipe, self._owner = ours, os.getpid()
        try:
            ours.recv_bytes()
        except (EOFError, OSError):
            self._stop()
            raise EngineError(
                "the grading processes did not start; `python -c 'import math_verify'` may show why"
            ) from None

    def _stop(self) -> None:
        server, pipe = self._server, self._pipe
        self._server, self._pipe = None, None
        if pipe is not None:
            pipe.close()
        if server is None or self._owner != os.getpid():
            return
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
