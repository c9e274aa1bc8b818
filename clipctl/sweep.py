"""`clipctl sweep` on one machine: so many runs at once, each a process, what is missing and no more; survives what its runs do.

A run is claimed before its process starts. So two launches of one sweep, or of two that share runs, work side by side: each
takes what nobody has, and stays until the last run has ended, to take over those of a launch that was killed.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import IO, TypeVar

from clipctl.errors import Preempted, SpecError, StoreError, SweepFailed
from clipctl.fork_server import ForkServer
from clipctl.interrupts import StopNow, StopRequests, catch_signals, job_end
from clipctl.sweep_folder import Placed, is_running, open_claim
from clipctl.sweep_spec import Member, SweepSpec, toml_text

LOOK_SECONDS = 0.5
"""Between two looks at runs that another launch runs, and two drawings."""
REACTION_SECONDS = 0.05
"""Until a signal is passed on. A scheduler may signal the runs as well: what comes to them at once is one request."""
DYING_SECONDS = 10.0
"""How much longer than its grace time a run may take to end."""
INTERRUPTED = (75, 130)
Tell = Callable[[str], None]
Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Slot:
    """A share of the machine: processor cores, all where there are none, and GPUs as CUDA_VISIBLE_DEVICES has them."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


@dataclass(slots=True)
class Progress:
    """What this launch did. ended: run → exit code, None of those that had ended before."""

    total: int
    ended: dict[str, int | None] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    @property
    def words(self) -> str:
        failed = len(self.failed)
        waiting = self.total - len(self.ended) - len(self.running)
        parts = [
            f"{len(self.ended) - failed} of {self.total} runs ended",
            f"{len(self.running)} running",
            f"{waiting} waiting",
        ]
        return ", ".join([*parts, *([f"{failed} failed"] if failed else [])])

    @property
    def failed(self) -> list[str]:
        return [name for name, code in self.ended.items() if code not in (None, 0, 8, *INTERRUPTED)]


FAILED_BEFORE = 1
"""Stands for the exit code of a run that failed in an earlier launch."""


def slots(jobs: int, cores: Sequence[int], gpus: Sequence[str] | None) -> list[Slot]:
    """The shares of so many runs at once. Each gets the same number of whole cores, and of GPUs; where there are fewer than
    runs, they share them in turn."""
    return [
        Slot(
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


def table_lines(placed: Sequence[Placed]) -> list[str]:
    """The runs, one a line: name, what varies, and what is left to do."""
    axes = list(dict.fromkeys(key for place in placed for key in place.member.values))
    varying = [key for key in axes if len({str(place.member.values.get(key)) for place in placed}) > 1]
    rows = [["run", *varying, "rollouts", "to do"]]
    for place in placed:
        values = place.member.values
        shown = ["" if key not in values else _shown(values[key]) for key in varying]
        rows.append([place.member.name, *shown, f"{place.rollouts}/{place.member.spec.run.steps}", _to_do(place)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(map(_shown, value.values()))
    return value if isinstance(value, str) else toml_text(value)


def _to_do(place: Placed) -> str:
    words = {
        "missing": "run it",
        "unfinished": "go on",
        "finished": "nothing: finished",
        "stopped": "nothing: stopped by an alarm",
        "failed": "nothing without --retry-failed: failed",
    }[place.outlook]
    if is_running(place.folder):
        words = "wait: it is being run"
    return words + (f", as {place.folder}" if place.shared else "")


def views_lines(sweep: SweepSpec, folder: Path) -> list[str]:
    """The commands that draw the sweep."""
    lines = []
    for at, view in enumerate(sweep.views):
        by = "".join(f" --by {key}" for key in view.by)
        rollouts = " --rollouts" if view.rollouts else ""
        name = folder.name if at == 0 else f"{folder.name}-{view.view}"
        lines.append(f"clipctl analyze {folder} --view {view.view}{by}{rollouts} --plot {name}.png")
    return lines or [f"clipctl analyze {folder}"]


def share_machine(members: Sequence[Member], jobs: int) -> tuple[list[Slot], list[str]]:
    """The machine's shares for so many runs at once, and warnings. Raises SpecError where runs need a GPU and there is none."""
    engines = [member.spec.engine for member in members]
    gpus = machine_gpus() if any(engine.device == "cuda" for engine in engines) else None
    shares = slots(min(jobs, len(members)), machine_cores(), gpus)
    threads, least = max(engine.threads for engine in engines), min(len(share.cores) for share in shares)
    # The number of threads belongs to the run's numbers, so it is never lowered.
    slow = f"engine.threads = {threads}, and each of {len(shares)} runs at once has {least} of the cores"
    return shares, [slow] if 0 < least < threads else []


def run_sweep(
    folder: Path,
    placed: Sequence[Placed],
    shares: Sequence[Slot],
    *,
    retry_failed: bool,
    nproc: int | None = None,
    tell: Tell,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Runs what is left to do of the sweep in `folder`, as many at once as there are shares. nproc: processes of each run,
    none: it is one. tell: gets a line for each start
    and end. watch: called about twice a second.

    Raises SweepFailed when some runs failed, in this launch or before, after all others have ended; Preempted or Interrupted
    when a signal, or the end of a Slurm job, stopped it, after the runs have saved and ended.
    """
    (folder / "logs").mkdir(exist_ok=True)
    longest = max(place.member.spec.checkpoint.grace for place in placed)
    margin = max(place.member.spec.checkpoint.margin for place in placed)
    with catch_signals() as stop:
        stop.grace = longest + DYING_SECONDS
        if (end := job_end()) is not None:
            stop.end_with_job(end, margin)
        more = () if nproc is None else ("--nproc", str(nproc))
        launch = _Launch(folder, list(placed), list(shares), more, retry_failed, tell)
        try:
            launch.run(stop, watch)
        finally:
            launch.close()
    progress = launch.progress
    if stop.reason:
        raise stop.error(f"{progress.words}; the same command goes on")
    if progress.failed:
        names = ", ".join(progress.failed)
        hint = (
            "--retry-failed runs them again"
            if not launch.crashed
            else "the same command goes on with those that crashed"
        )
        raise SweepFailed(
            f"{len(progress.failed)} of {progress.total} runs failed: {names}; see {folder / 'logs'}; {hint}"
        )
    if any(code in INTERRUPTED for code in progress.ended.values()):
        names = ", ".join(name for name, code in progress.ended.items() if code in INTERRUPTED)
        raise Preempted(f"interrupted: {names}; the same command goes on with them")
    return progress


@dataclass(slots=True)
class _Running:
    place: Placed
    share: Slot
    claim: IO[str]
    began: float


class _Launch:
    """The loop: claims, starts, reaps."""

    def __init__(
        self,
        folder: Path,
        placed: list[Placed],
        shares: list[Slot],
        more: tuple[str, ...],
        retry_failed: bool,
        tell: Tell,
    ) -> None:
        self.folder, self.waiting, self.free, self.more = folder, placed, shares, more
        self.retry_failed, self.tell = retry_failed, tell
        self.progress = Progress(len(placed))
        self.crashed = False
        self._server = ForkServer(folder / "logs" / "server.txt", gpus=any(share.gpus is not None for share in shares))
        self._running: dict[int, _Running] = {}
        self._count = 0

    def run(self, stop: StopRequests, watch: Callable[[Progress], None]) -> None:
        """Until all runs have ended, or, after a request to stop, those that this launch runs."""
        try:
            while (self._running or self.waiting) and not stop.reason:
                self._start()
                until = time.monotonic() + LOOK_SECONDS
                while (self._running or self.waiting) and time.monotonic() < until and not stop.reason:
                    if self._reap(REACTION_SECONDS):
                        break
                watch(self.progress)
            self._end_all(stop, watch)
        except StopNow:
            # A second request, or the grace time is over: the runs stop at once as well.
            self._server.signal(SIGINT if stop.by_hand else SIGTERM)
            until = time.monotonic() + DYING_SECONDS / 2
            while self._running and time.monotonic() < until:
                self._reap(0.2)

    def close(self) -> None:
        """Ends what still runs; the runs are given back."""
        self._server.close()
        for running in self._running.values():
            running.claim.close()

    def _end_all(self, stop: StopRequests, watch: Callable[[Progress], None]) -> None:
        if self._running:
            self.tell(f"{stop.reason}: {len(self._running)} runs save and stop")
            self._server.signal(SIGINT if stop.by_hand else SIGTERM)
        while self._running:
            self._reap(0.2)
            watch(self.progress)

    def _start(self) -> None:
        """Starts as many as there are free shares."""
        for place in list(self.waiting):
            if self.free:
                self._look_at(place)

    def _look_at(self, place: Placed) -> None:
        if self._is_done(place):
            return
        try:
            claim = open_claim(place.folder)
        except StoreError as error:
            self.waiting.remove(place)
            self.progress.ended[place.member.name] = error.exit_code
            self.tell(f"{place.member.name}: failed: {error}")
            return
        if claim is None:
            return
        # It may have ended while it was being claimed.
        if self._is_done(place):
            claim.close()
            return
        self.waiting.remove(place)
        share, began = self.free.pop(0), time.monotonic()
        how = f"goes on from rollout {place.rollouts}" if place.outlook != "missing" else "starts"
        where = f" on GPU {share.environment['CUDA_VISIBLE_DEVICES']}" if share.gpus else ""
        self.tell(f"{place.member.name}: {how}{where}")
        self._count += 1
        self._running[self._count] = _Running(place, share, claim, began)
        self.progress.running.add(place.member.name)
        # The sweep passes the end of a Slurm job on; two notices of it would be two requests.
        environment = {**share.environment, "SLURM_JOB_END_TIME": ""}
        self._server.start(self._count, (*place.command, *self.more), self._log(place), share.cores, environment)

    def _is_done(self, place: Placed) -> bool:
        """Whether there is nothing left to do of a run that waits; it is told and counted then."""
        outlook = place.outlook
        if outlook in ("missing", "unfinished") or (outlook == "failed" and self.retry_failed):
            return False
        self.waiting.remove(place)
        self.progress.ended[place.member.name] = FAILED_BEFORE if outlook == "failed" else None
        if outlook == "failed":
            self.tell(f"{place.member.name}: failed before: {place.message}")
        return True

    def _reap(self, seconds: float) -> bool:
        """Whether some ended within so many seconds."""
        if not self._running:
            time.sleep(seconds)
            return False
        before = len(self._running)
        for number, code in self._server.ended(seconds).items():
            running = self._running.pop(number)
            running.claim.close()
            self.free.append(running.share)
            name = running.place.member.name
            self.progress.running.remove(name)
            if code == 2 and is_running(running.place.folder):
                # A process outside of any sweep was faster.
                self.waiting.append(running.place)
                continue
            self.crashed |= code < 0
            self.progress.ended[name] = code
            self.tell(f"{name}: {self._end_words(running, code)}")
        return len(self._running) < before

    def _end_words(self, running: _Running, code: int) -> str:
        place, seconds = running.place, time.monotonic() - running.began
        if code == 0:
            return f"finished, {place.rollouts} rollouts, {seconds:.1f} s"
        how = {8: "stopped", 75: "interrupted", 130: "interrupted"}.get(code, f"failed (exit code {code})")
        if code < 0:
            how = f"crashed (signal {-code})"
        return f"{how}: {_last_line(self._log(place)) or 'it said nothing'}"

    def _log(self, place: Placed) -> Path:
        return self.folder / "logs" / f"{place.member.name}.txt"


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("clipctl: ") if lines else ""


@contextmanager
def show_sweep(folder: Path) -> Iterator[tuple[Tell, Callable[[Progress], None]]]:
    """How a sweep looks, on stderr: on a terminal a live table of its runs, elsewhere a line for each start and end."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        from clipctl.progress import print_line

        yield print_line, lambda progress: None
        return
    from datetime import UTC, datetime

    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from clipctl.follow import many_runs
    from clipctl.formats import safe_text
    from clipctl.watch import Watcher

    console, watcher, drawn = Console(stderr=True), Watcher([folder]), [0.0]
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def watch(progress: Progress) -> None:
            if time.monotonic() - drawn[0] < 2.0 and progress.running:
                return
            now = datetime.now(UTC).replace(tzinfo=None)
            head = Text(f"{folder}: {progress.words}", style="bold")
            live.update(Group(head, many_runs(watcher.look(), now, console.width, console.height - 2)), refresh=True)
            drawn[0] = time.monotonic()

        yield lambda line: live.console.print(safe_text(line), markup=False, highlight=False, soft_wrap=True), watch
