"""`clipctl sweep --launcher slurm`: an array of jobs, a run each.

How a run stands is read from its own files; of Slurm only the queue is asked, so that what waits in it is not submitted
twice. submitit submits; `--print-script` does without it.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from clipctl.errors import DependencyError, EngineError, Preempted, SpecError, StoreError, SweepFailed
from clipctl.folder import read_json
from clipctl.segments import write_whole
from clipctl.slurm_job import SlurmRun, one_line
from clipctl.slurm_resources import Options, resources
from clipctl.sweep_folder import Placed, is_left, is_running, retry_hint

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
    It needs nothing but clipctl. Raises SpecError where nothing is left."""
    placed = [place for place in placed if is_left(place.outlook, retry_failed)]
    if not placed:
        raise SpecError(f"--print-script: nothing is left to do of {folder}")
    place_of_logs(folder)
    specs = [place.member.spec for place in placed]
    margin = max(spec.checkpoint.margin for spec in specs)
    flags: dict[str, str | int | bool] = {
        "job_name": folder.name,
        "chdir": str(Path.cwd()),
        "array": f"0-{len(placed) - 1}%{min(jobs, len(placed))}",
        "output": str(folder.absolute() / "slurm" / "%A_%a.txt"),
        "open_mode": "append",
        "requeue": True,
        "signal": f"USR2@{warning_seconds(options, margin)}",
        **resources(specs, options),
    }
    program = [sys.executable, "-m", "clipctl"]
    lines = [
        "#!/bin/bash",
        *(
            f"#SBATCH --{key.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}")
            for key, value in flags.items()
        ),
        "runs=(",
        *(f"  {shlex.quote(shlex.join([*program, *place.command]))}" for place in placed),
        ")",
        "# The signal before the end is the one notice of it; the shell waits for the run, which answers.",
        "unset SLURM_JOB_END_TIME",
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
        job_name=folder.name,
        array_parallelism=jobs,
        signal_delay_s=warning_seconds(options, margin),
        stderr_to_stdout=True,
        wckey=None,
        setup=[WITH_CORES],
        additional_parameters={"requeue": True, **resources(specs, options)},
    )
    try:
        folders = [place.folder.absolute() for place in left]
        with redirect_stderr(StringIO()):
            # submitit prints what sbatch says; the error has it too.
            started = executor.map_array(SlurmRun(), [place.command for place in left], folders)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SpecError(f"--launcher slurm: sbatch refused: {one_line(str(error))}") from None
    submitted = {place.member.name: str(job.job_id) for place, job in zip(left, started, strict=True)}
    record = folder / "slurm" / "jobs.json"
    write_whole(record, json.dumps({**read_json(record, []), **submitted}, indent=2).encode())
    return {**queued, **submitted}


def queue_lines(placed: Sequence[Placed], queued: Mapping[str, str]) -> list[str]:
    """A line for each run: its job, or how it stands."""
    width = max(len(place.member.name) for place in placed)
    return [
        f"{place.member.name:{width}}  {place.rollouts}/{place.member.spec.run.steps} rollouts  "
        + (f"job {queued[place.member.name]}" if place.member.name in queued else place.outlook)
        for place in placed
    ]


def place_of_logs(folder: Path) -> None:
    """The folder of what jobs say, and of what submitit hands to them, which only its owner may change: it is unpickled."""
    try:
        (folder / "slurm").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder / 'slurm'}: {error.strerror}") from None


def queued_runs(folder: Path, placed: Sequence[Placed]) -> dict[str, str]:
    """Run → job of those that Slurm's queue has, waiting or running, whichever sweep submitted them. folder: of the sweep.
    Raises DependencyError where there is no Slurm, EngineError where it does not answer."""
    if shutil.which("squeue") is None:
        raise DependencyError(
            "--launcher slurm: squeue and sbatch are not on the PATH; run it where jobs are submitted from"
        )
    jobs = [(run, job) for record in folder.parent.glob("*/slurm/jobs.json") for run, job in _submitted(record)]
    if not jobs:
        return {}
    query = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"squeue: {one_line(done.stderr)}")
    queue = set(done.stdout.split())
    queued = {run: job for run, job in jobs if job in queue}
    names = {place.folder.resolve(): place.member.name for place in placed}
    return {name: queued[run] for run, name in names.items() if run in queued}


def _submitted(record: Path) -> Iterator[tuple[Path, str]]:
    """Folders of runs, and their jobs, that were submitted with a sweep; none where the record is damaged."""
    for name, job in read_json(record, []).items():
        yield (record.parents[1] / name).resolve(), str(job)


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
        for place in placed:
            words = f"{place.outlook}, {place.rollouts}/{place.member.spec.run.steps} rollouts"
            if told.get(place.member.name, f"missing, 0/{place.member.spec.run.steps} rollouts") != words:
                tell(f"{place.member.name}: {words}")
            told[place.member.name] = words
        if not any(
            place.member.name in queued
            or is_running(place.folder)
            or (not answered and is_left(place.outlook, retry_failed=False))
            for place in placed
        ):
            break
        time.sleep(seconds)
    failed = [place.member.name for place in placed if place.outlook == "failed"]
    left = [place.member.name for place in placed if is_left(place.outlook, retry_failed=False)]
    if failed:
        raise SweepFailed(
            f"{len(failed)} of {len(placed)} runs failed: {', '.join(failed)}; {retry_hint(placed, failed, 'submits them again')}"
        )
    if left:
        raise Preempted(
            f"not in the queue any more and not finished: {', '.join(left)}; see {folder / 'slurm'}; the same command "
            "submits them again"
        )
