"""What a folder that exists means for a new attempt at its run: refused, finished, or to be gone on with from a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from clipctl.checkpoint import Place, newest, newest_good, processes_of, remove_leftovers
from clipctl.errors import AlarmStop, SpecError, StoreError
from clipctl.fold import store_problem
from clipctl.folder import is_evaluation, read_json, state_of, usable_status
from clipctl.journal import taken
from clipctl.layers import leaves
from clipctl.lock import being_run, lock_run, refuse_living
from clipctl.recovery import recover_status
from clipctl.spec import RunSpec, spec_from_json

Resume = Literal["auto", "never", "must"]
MAY_CHANGE = ("run.steps", "run.name", "eval.", "checkpoint.")
"""Keys, and groups of keys, that another attempt may have otherwise: they say how long a run is and what is done beside it."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """A run that was begun before, locked for this process. lock: None in the other processes of a run of several.

    status: its status.json, empty where it was killed before it had one. place: of the checkpoint to go on from, None for
    the beginning. problems: what is wrong with newer checkpoints. recovered: what is to be said of a status.json that had to
    be made again, empty where it was whole. finished: there is nothing left to do.
    """

    folder: Path
    lock: IO[str] | None
    status: dict[str, Any]
    place: Place | None
    problems: list[str]
    recovered: str
    finished: bool

    @property
    def checkpoint(self) -> Path | None:
        return None if self.place is None else self.folder / "checkpoints" / str(self.place)


def find_earlier(
    folder: Path, spec: RunSpec, resume: Resume, warn: Callable[[str], None], processes: int = 1
) -> Earlier | None:
    """What was done of the run so far, None where nothing was.

    processes: that would go on with it. Raises SpecError for a name that `resume` refuses, for another spec, for a run that is
    being run and for DeepSpeed's checkpoint of another number of processes, AlarmStop for one that an alarm ended, StoreError
    for a damaged one. Cheap where nothing was done; else checkpoints are read whole.
    """
    if not _may_go_on(folder, resume):
        return None
    lock = lock_run(folder, warn)
    try:
        return _look_at(folder, spec, lock, processes, warn)
    except BaseException:
        lock.close()
        raise


def foresee(runs_dir: Path, spec: RunSpec, resume: Resume, processes: int = 1) -> str:
    """What `find_earlier` would find of the run that the spec names, in words; writes nothing, waits for nothing, and takes
    checkpoints to be whole. Raises the same errors, and SpecError for a run that seems to be alive."""
    name = spec.run.name
    refuse_nameless(name, resume)
    if name is None:
        return f"a new one in {runs_dir}; with --name the same command could go on with it"
    folder = runs_dir / name
    if not _may_go_on(folder, resume):
        return f"{folder}, new"
    if not (folder / "spec.json").exists():
        return f"{folder}, which was not begun yet"
    _refuse_other_specs(folder, spec)
    damage = status_problem(folder)
    status = {} if damage else read_json(folder / "status.json", [])
    if state_of(status) == "running":
        raise being_run(folder)
    if status.get("state") == "finished" and spec.run.steps <= status["rollouts"]:
        return f"{folder}, which is finished, with {status['rollouts']} rollouts: nothing would be run; raise run.steps"
    _refuse_damaged_store(folder)
    place = newest(folder / "checkpoints")
    _refuse_going_back(folder, spec, status or {"state": "interrupted"}, place)
    if place is not None and spec.engine.trainer == "deepspeed":
        _refuse_other_processes(folder / "checkpoints" / str(place), processes)
    where = "begins again: it has no checkpoint" if place is None else f"goes on from {place.words}"
    return f"{folder}, which {where}" + (f"; {damage}, and would be made again" if damage else "")


def refuse_nameless(name: str | None, resume: Resume) -> None:
    """Raises SpecError where a run without a name is to be gone on with."""
    if name is None and resume == "must":
        raise SpecError(
            "--resume must: a run without --name is always a new one; give the --name of the run to go on with"
        )


def _may_go_on(folder: Path, resume: Resume) -> bool:
    """Whether the folder is there to be gone on with; SpecError for what `resume` refuses, and for what is no run."""
    if resume == "must" and not (folder / "spec.json").exists():
        raise SpecError(
            f"--resume must: there is no run {folder.name!r} in {folder.parent}; leave --resume out to start it"
        )
    if not folder.exists():
        return False
    if resume == "never":
        raise taken(folder)
    _refuse_other_folders(folder)
    return True


def _look_at(folder: Path, spec: RunSpec, lock: IO[str], processes: int, warn: Callable[[str], None]) -> Earlier:
    if not (folder / "spec.json").exists():
        return Earlier(folder, lock, {}, None, [], "", finished=False)
    _refuse_other_specs(folder, spec)
    recovered, damage = "", status_problem(folder)
    if damage:
        # It no longer says which machine runs the run, and a lock may not be seen from another one.
        refuse_living(folder, f"{folder.name}: {damage}, and with it who runs the run", warn)
    status = {} if damage else read_json(folder / "status.json", [])
    if status and status["state"] == "finished" and spec.run.steps <= status["rollouts"]:
        return Earlier(folder, lock, status, None, [], "", finished=True)
    _refuse_damaged_store(folder)
    if damage:
        status, recovered = recover_status(folder, damage)
        if status["state"] == "stopped" and spec.run.steps <= _steps_before(folder):
            # It stops where it goes on, and its status.json is whole then.
            status["state"] = "interrupted"
    remove_leftovers(folder / "checkpoints")
    place, problems = newest_good(folder / "checkpoints")
    _refuse_going_back(folder, spec, status, place)
    earlier = Earlier(folder, lock, status, place, problems, recovered, finished=False)
    if earlier.checkpoint is not None and spec.engine.trainer == "deepspeed":
        _refuse_other_processes(earlier.checkpoint, processes)
    return earlier


def spec_changes(before: RunSpec, now: RunSpec, may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """`key = old, now new` for every key that may not change and did."""
    old, new = (dict(leaves(spec.model_dump(mode="json"))) for spec in (before, now))
    return [
        f"{key} = {_toml(old.get(key))}, now {_toml(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not key.startswith(may_change)
    ]


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir() or is_evaluation(folder):
        raise SpecError(f"run.name: {folder} is no run; choose another --name")
    ours = {
        ".lock",
        ".claim",
        ".stalled",
        "..stalled",
        ".end.json",
        "..end.json",
        ".status.json",
        ".spec.json",
        "status.json",
        "journal",
        "checkpoints",
    }
    others = sorted({entry.name for entry in folder.iterdir()} - ours)
    if others and not (folder / "spec.json").exists():
        raise SpecError(f"run.name: {folder} is no run (it has {others[0]} and no spec.json); choose another --name")


def status_problem(folder: Path) -> str:
    """What is wrong with a run's status.json, empty where another attempt can go on with it. Raises StoreError where this
    process may not read it."""
    try:
        (folder / "status.json").read_bytes()
    except FileNotFoundError:
        return "status.json is missing"
    except OSError as error:
        raise StoreError(f"{folder / 'status.json'} cannot be read: {error.strerror}") from None
    status = usable_status(read_json(folder / "status.json", []), [])
    needed = {"attempt": int, "rollouts": int, "state": str, "created_at": str}
    whole = all(isinstance(status.get(name), kind) for name, kind in needed.items())
    return "" if whole else "status.json is damaged"


def _refuse_other_specs(folder: Path, spec: RunSpec) -> None:
    try:
        before = spec_from_json((folder / "spec.json").read_text())
    except (SpecError, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder / 'spec.json'} cannot be gone on with: {error}") from None
    changes = spec_changes(before, spec)
    if changes:
        raise SpecError(
            f"run.name: {folder.name!r} was begun with another spec: {'; '.join(changes)}; only run.steps, eval.* and "
            "checkpoint.* may change: choose another --name"
        )


def _refuse_damaged_store(folder: Path) -> None:
    problem = store_problem(folder)
    if problem is not None:
        raise StoreError(
            f"{folder / 'metrics.duckdb'} cannot be gone on with: {problem}; move it away to go on without the rows that it "
            "holds, or start anew under another --name"
        )


def _refuse_going_back(folder: Path, spec: RunSpec, status: Mapping[str, Any], place: Place | None) -> None:
    done = Place(0) if place is None else place
    if status["state"] == "stopped" and spec.run.steps <= _steps_before(folder):
        raise AlarmStop(
            f"{folder.name} was {status.get('message') or 'stopped by an alarm'}; raise run.steps to go on all the same"
        )
    if done > Place(spec.run.steps):
        raise SpecError(
            f"run.steps = {spec.run.steps}: {folder.name!r} has {done.rollouts} rollouts"
            f"{' and a part of another one' if done.updates else ''} already"
        )


def _refuse_other_processes(checkpoint: Path, processes: int) -> None:
    saved = processes_of(checkpoint)
    if saved != processes:
        raise SpecError(
            f"the checkpoint is one of {saved} process{'es' * (saved > 1)} and {processes} {'are' if processes > 1 else 'is'} "
            f"started: with engine.trainer = 'deepspeed' a run goes on with as many as it had"
        )


def _steps_before(folder: Path) -> int:
    return spec_from_json((folder / "spec.json").read_text()).run.steps


def _toml(value: Any) -> str:
    if value == "Infinity":
        return "inf"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
