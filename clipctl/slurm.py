"""`clipctl sweep --launcher slurm`: an array of jobs, a run each.

How a run stands is read from its own files, to which its job adds how its command ended; of Slurm only the queue is asked, so
that what waits in it is not submitted twice. submitit submits; `--print-script` does without it.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path

from clipctl.ends import (
    VANISHINGS,
    End,
    forget_end,
    gave_up,
    latest_place,
    next_job,
    read_end,
    vanished_once_more,
    write_end,
)
from clipctl.errors import DependencyError, EngineError, Preempted, SpecError, StoreError, SweepFailed
from clipctl.folder import read_json
from clipctl.segments import write_whole
from clipctl.slurm_job import SlurmRun, one_line
from clipctl.slurm_resources import Options, resources
from clipctl.sweep_folder import Placed, is_left, is_running, planning, retry_hint

LOOK_SECONDS = 10.0
"""Between two looks at runs and queue."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
OURS = ("array", "chdir", "signal", "requeue", "open_mode", "output", "error")
"""Options of sbatch that the launcher sets."""
WITH_CORES = 'if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'
"""In a batch script: srun of Slurm 22.05 and later takes the cores of a task from there alone."""


def parse_options(texts: Sequence[str], of_file: Options) -> dict[str, str | int | bool]:
    """Options of sbatch: those of the sweep file, and `KEY=VALUE` of --slurm over them; a KEY alone is a switch.

    Raises SpecError for what is no option, for those that the launcher sets, and without a time limit.
    """
    options: dict[str, str | int | bool] = {_key(key): value for key, value in of_file.items()}
    for text in texts:
        key, equals, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z_-]*", key) or (equals and not value):
            raise SpecError(f"--slurm: {text!r} is not KEY=VALUE, such as partition=gpu, time=4:00:00 or gres=gpu:1")
        options[_key(key)] = value if equals else True
    for key in OURS:
        if key in options:
            raise SpecError(f"--slurm: {key} is set by the launcher; runs at once are --jobs")
    if "time" not in options:
        raise SpecError(
            "--slurm: time is missing; give the limit of a job, such as --slurm time=4:00:00; runs go on in the next"
        )
    seconds_of(str(options["time"]))
    return {key: value for key, value in options.items() if value is not False}


def _key(key: str) -> str:
    return key.replace("-", "_")


def seconds_of(limit: str) -> float:
    """A time limit of Slurm in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
    days-hours:minutes:seconds. Raises SpecError for anything else."""
    found = TIME.fullmatch(limit)
    if found is None:
        raise SpecError(f"--slurm: time = {limit!r} is no time limit, such as 90 (minutes), 4:00:00 or 1-12:00:00")
    first, second, third = (int(found[part] or 0) for part in ("first", "second", "third"))
    if found["days"]:
        return 86400 * int(found["days"]) + 3600 * first + 60 * second + third
    if found["third"]:
        return 3600 * first + 60 * second + third
    return 60 * first + second


def warning_seconds(options: Options, margin: float) -> int:
    """Seconds before the end of a job at which it is told: `checkpoint.margin`, but no more than half of its time. Slurm may
    tell it a minute earlier."""
    return max(1, math.ceil(min(margin, (seconds_of(str(options["time"])) - 60) / 2)))


def print_script(folder: Path, placed: Sequence[Placed], jobs: int, options: Options, *, retry_failed: bool) -> str:
    """A script for sbatch that runs what is left to do as an array, so many at once, and requeues each until it is finished.
    It needs nothing but clipctl, and its jobs are known by their name. Raises SpecError where nothing is left."""
    placed = [place for place in placed if is_left(place.outlook, retry_failed)]
    if not placed:
        raise SpecError(f"--print-script: nothing is left to do of {folder}")
    place_of_logs(folder)
    specs = [place.member.spec for place in placed]
    margin = max(spec.checkpoint.margin for spec in specs)
    flags: dict[str, str | int | bool] = {
        "chdir": str(Path.cwd()),
        "array": f"0-{len(placed) - 1}%{min(jobs, len(placed))}",
        "output": str(folder.absolute() / "slurm" / "%A_%a.txt"),
        "open_mode": "append",
        "requeue": True,
        "signal": f"USR2@{warning_seconds(options, margin)}",
        **resources(specs, options),
        "job_name": name_array(folder, placed, options),
    }
    program = [sys.executable, "-m", "clipctl.slurm_job"]
    lines = [
        "#!/bin/bash",
        *(
            f"#SBATCH --{key.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}")
            for key, value in flags.items()
        ),
        "runs=(",
        *(
            f"  {shlex.quote(shlex.join([*program, str(place.folder.absolute()), place.member.identity, *place.command]))}"
            for place in placed
        ),
        ")",
        "# The signal before the end is the one notice of it; the shell waits for the run, which answers.",
        "trap : TERM USR2",
        WITH_CORES,
        'eval "srun ${runs[$SLURM_ARRAY_TASK_ID]}"',
        "code=$?",
        "# 75: interrupted and saved.",
        'if [ "$code" -eq 75 ]; then',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines)


def submit(
    folder: Path, placed: Sequence[Placed], jobs: int, options: Options, *, retry_failed: bool
) -> dict[str, str]:
    """Submits what is left to do as one array; run → job of those that wait or run, these included. Call it within
    `planning`, so that two launches do not submit one run twice. Raises DependencyError without Slurm or submitit, SpecError
    where sbatch refuses."""
    queued = queued_runs(folder, placed)
    give_up(placed, queued)
    left = [
        place
        for place in placed
        if place.member.name not in queued and is_left(place.outlook, retry_failed) and not is_running(place.folder)
    ]
    if not left:
        return queued
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise DependencyError(
            "--launcher slurm needs submitit: pip install 'clipctl[slurm]'; or use --print-script"
        ) from None
    specs = [place.member.spec for place in left]
    margin = max(spec.checkpoint.margin for spec in specs)
    place_of_logs(folder)
    executor = SlurmExecutor(folder / "slurm", max_num_timeout=10**6)
    executor.update_parameters(
        array_parallelism=jobs,
        signal_delay_s=warning_seconds(options, margin),
        stderr_to_stdout=True,
        wckey=None,
        setup=[WITH_CORES],
        additional_parameters={
            "requeue": True,
            **resources(specs, options),
            "job_name": name_array(folder, left, options),
        },
    )
    before = [read_end(place.folder, place.member.identity) for place in left]
    for place in left:
        write_end(place.folder, next_job(place.folder, place.member.identity))
    try:
        folders = [place.folder.absolute() for place in left]
        identities = [place.member.identity for place in left]
        with redirect_stderr(StringIO()):
            # submitit prints what sbatch says; the error has it too.
            started = executor.map_array(SlurmRun(), [place.command for place in left], folders, identities)
    except (FailedJobError, FailedSubmissionError) as error:
        for place, end in zip(left, before, strict=True):
            forget_end(place.folder) if end is None else write_end(place.folder, end)
        raise SpecError(f"--launcher slurm: sbatch refused: {one_line(str(error))}") from None
    numbers = [str(job.job_id) for job in started]
    record = folder / "slurm" / "jobs.json"
    submitted = {_place_in(folder, place): job for place, job in zip(left, numbers, strict=True)}
    write_whole(record, json.dumps({**read_json(record, []), **submitted}, indent=2).encode())
    return queued | {place.member.name: job for place, job in zip(left, numbers, strict=True)}


def _place_in(folder: Path, place: Placed) -> str:
    """Where a run lies, from the sweep's folder: a run may lie under an earlier, shorter name than the sweep has for it now."""
    return os.path.relpath(place.folder.resolve(), folder.resolve())


def queue_lines(placed: Sequence[Placed], queued: Mapping[str, str]) -> list[str]:
    """A line for each run: its job, or how it stands."""
    width = max(len(place.member.name) for place in placed)
    return [
        f"{place.member.name:{width}}  {place.rollouts}/{place.member.spec.run.steps} rollouts  "
        + (f"job {queued[place.member.name]}" if place.member.name in queued else place.outlook)
        + _earlier(place)
        for place in placed
    ]


def _earlier(place: Placed) -> str:
    """What is to be said of the jobs of a run before its last one."""
    end = read_end(place.folder, place.member.identity)
    return f", after {end.vanished} that vanished" if end is not None and end.is_open and end.vanished else ""


def place_of_logs(folder: Path) -> None:
    """The folder of what jobs say, and of what submitit hands to them, which only its owner may change: it is unpickled."""
    try:
        (folder / "slurm").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder / 'slurm'}: {error.strerror}") from None


def name_array(folder: Path, placed: Sequence[Placed], options: Options) -> str:
    """A name for the jobs of an array by which the queue tells whose they are, whoever submits them, and its record in the
    sweep's folder."""
    runs = [_place_in(folder, place) for place in placed]
    token = hashlib.sha256(json.dumps([str(folder.absolute()), *runs]).encode()).hexdigest()[:12]
    write_whole(folder / "slurm" / f"array-{token}.json", json.dumps({"runs": runs}).encode())
    return f"{options.get('job_name', folder.name)}.{token}"


def queued_runs(folder: Path, placed: Sequence[Placed]) -> dict[str, str]:
    """Run → job of those that Slurm's queue has, waiting or running, whichever sweep submitted them, or printed the script that
    was. folder: of the sweep. Raises DependencyError where there is no Slurm, EngineError where it does not answer."""
    if shutil.which("squeue") is None:
        raise DependencyError(
            "--launcher slurm: squeue and sbatch are not on the PATH; run it where jobs are submitted from"
        )
    if not any(any(folder.parent.glob(f"*/slurm/{name}")) for name in ("jobs.json", "array-*.json")):
        return {}
    query = ["squeue", "--noheader", "--array", "--me", "--format=%i %j"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"squeue: {one_line(done.stderr)}")
    queue = {job: name for job, _, name in (line.partition(" ") for line in done.stdout.splitlines())}
    queued = dict(_named(folder.parent, queue))
    for record in folder.parent.glob("*/slurm/jobs.json"):
        queued |= {run: job for run, job in _submitted(record) if job in queue}
    names = {place.folder.resolve(): place.member.name for place in placed}
    return {name: queued[run] for run, name in names.items() if run in queued}


def _submitted(record: Path) -> Iterator[tuple[Path, str]]:
    """Folders of runs, and their jobs, that were submitted with a sweep; none where the record is damaged."""
    for name, job in read_json(record, []).items():
        yield (record.parents[1] / name).resolve(), str(job)


def _named(runs_dir: Path, queue: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Folders of runs, and their jobs, of the arrays in the queue that have a name of ours."""
    for job, name in queue.items():
        # submitit submits a single run without an array.
        place, token = job.partition("_")[2] or "0", name.rpartition(".")[2]
        for record in runs_dir.glob(f"*/slurm/array-{token}.json") if re.fullmatch("[0-9a-f]{12}", token) else ():
            runs = read_json(record, []).get("runs", [])
            if place.isdecimal() and int(place) < len(runs):
                yield (record.parents[1] / runs[int(place)]).resolve(), job


def give_up(placed: Sequence[Placed], queued: Mapping[str, str]) -> None:
    """Records as failed those whose jobs vanished too often. queued: of `queued_runs`, asked within the same `planning`."""
    for place in placed:
        end = vanished(place, queued)
        if end is not None and end.idle >= VANISHINGS:
            write_end(place.folder, gave_up(end, place.attempt))


def vanished(place: Placed, queued: Mapping[str, str]) -> End | None:
    """What there is to be said of a run that has something left to do and whose last job left no trace; None of others."""
    if place.member.name in queued or is_running(place.folder) or not is_left(place.outlook, retry_failed=False):
        return None
    end = read_end(place.folder, place.member.identity)
    return vanished_once_more(end, latest_place(place.folder)) if end is not None and end.is_open else None


def wait_for_runs(
    folder: Path, placed: Sequence[Placed], tell: Callable[[str], None], seconds: float = LOOK_SECONDS
) -> None:
    """Tells what becomes of the runs until none of them is in the queue. Raises SweepFailed for those that failed, Preempted
    where some are neither finished nor in the queue any more. Ctrl-C ends the waiting and leaves the jobs alone."""
    told: dict[str, str] = {}
    answered = True
    while True:
        try:
            queued = queued_runs(folder, placed)
            answered = True
        except EngineError as error:
            # A controller that restarts ends no job.
            queued = {}
            if answered:
                tell(f"{error}; asked again until it answers")
            answered = False
        _tell_changes(placed, queued, told, tell)
        if not any(
            place.member.name in queued
            or is_running(place.folder)
            or (not answered and is_left(place.outlook, retry_failed=False))
            for place in placed
        ):
            break
        time.sleep(seconds)
    # Another launch may be submitting; a controller that does not answer now leaves it to the next one.
    with planning(folder.parent), suppress(EngineError):
        give_up(placed, queued_runs(folder, placed))
    _tell_changes(placed, {}, told, tell)
    failed = [place.member.name for place in placed if place.outlook == "failed"]
    left = [_with_vanishings(place) for place in placed if is_left(place.outlook, retry_failed=False)]
    if failed:
        raise SweepFailed(
            f"{len(failed)} of {len(placed)} runs failed: {', '.join(failed)}; {retry_hint(placed, failed, 'submits them again')}"
        )
    if left:
        raise Preempted(
            f"not in the queue any more and not finished: {', '.join(left)}; see {folder / 'slurm'}; the same command "
            "submits them again"
        )


def _tell_changes(
    placed: Sequence[Placed], queued: Mapping[str, str], told: dict[str, str], tell: Callable[[str], None]
) -> None:
    """A line for each run that stands otherwise than when it was told last."""
    for place in placed:
        name, failed = place.member.name, place.outlook == "failed"
        if failed and name in queued:
            # It is tried again.
            continue
        steps = place.member.spec.run.steps
        words = f"{place.outlook}, {place.rollouts}/{steps} rollouts" + (f": {place.message}" if failed else "")
        if told.get(name, f"missing, 0/{steps} rollouts") != words:
            tell(f"{name}: {words}")
        told[name] = words


def _with_vanishings(place: Placed) -> str:
    """The run's name, and how many of its jobs left no trace."""
    end = vanished(place, {})
    if end is None:
        return place.member.name
    return f"{place.member.name} (its job vanished{f', {end.vanished} in a row' if end.vanished > 1 else ''})"
