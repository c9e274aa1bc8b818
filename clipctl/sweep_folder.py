"""Where the runs of a sweep lie, and what has become of them.

A sweep is a folder of runs with `sweep.json`, which says what it is. A run that another sweep, or a plain `clipctl train`, has
in the same runs folder is not run again: a link in the sweep's folder leads there. Who begins a sweep decides under one lock
where each run lies, so that two sweeps begun at once share runs too.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from clipctl.attempts import MAY_CHANGE, spec_changes, status_problem
from clipctl.checkpoint import newest
from clipctl.discover import find_folders
from clipctl.ends import End, read_end
from clipctl.errors import SpecError, StoreError
from clipctl.folder import read_json, state_of, usable_status
from clipctl.journal import check_place
from clipctl.lock import NO_LOCKS
from clipctl.segments import write_whole
from clipctl.spec import NAME_PATTERN, RunSpec, spec_from_json
from clipctl.sweep_spec import Member, SweepSpec, identity

RECORD = "sweep.json"
CLAIM = ".claim"
"""In a run's folder; locked by the sweep or job that runs it, from before its process starts until after it ended."""

MAY_CHANGE_LATER = tuple(key for key in MAY_CHANGE if key != "eval.")
"""Keys, and groups of keys, that may be otherwise for a run that is finished."""

Outlook = Literal["missing", "unfinished", "finished", "stopped", "failed"]
"""What is left to do of a run: all of it, its rest, or nothing."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A run of the sweep and its folder, which may be in another sweep's."""

    member: Member
    folder: Path
    shared: bool

    @property
    def command(self) -> tuple[str, ...]:
        """What `clipctl` is told."""
        return (*self.member.command, "--name", self.folder.name, "--runs-dir", str(self.folder.parent))

    @property
    def attempt(self) -> int:
        """Number of the last attempt, -1 before the first."""
        return last_attempt(self.folder)

    @property
    def rollouts(self) -> int:
        """How many are stored; how many the newest checkpoint has, where status.json does not say."""
        if self.damage:
            place = newest(self.folder / "checkpoints")
            return 0 if place is None else place.rollouts
        return int(_status(self.folder).get("rollouts", 0))

    @property
    def damage(self) -> str:
        """What is wrong with the status.json of a run that was begun, empty where it is whole."""
        try:
            return status_problem(self.folder) if (self.folder / "spec.json").exists() else ""
        except StoreError as error:
            return str(error)

    @property
    def failure(self) -> End | None:
        """How the last command on it failed, as the job or sweep recorded that ran it; None of one that was begun again since."""
        end = read_end(self.folder, self.member.identity)
        return end if end is not None and end.is_failure and end.attempt == self.attempt else None

    @property
    def message(self) -> str:
        """What was said of the end of the run's last attempt, or of the command that did not come to one."""
        failure = self.failure
        return failure.words if failure is not None else str(_status(self.folder).get("message") or "")

    @property
    def outlook(self) -> Outlook:
        own = self._own_outlook
        return "failed" if own in ("missing", "unfinished") and self.failure is not None else own

    @property
    def _own_outlook(self) -> Outlook:
        """What the run's own files say."""
        if self.damage:
            return "unfinished"
        status = _status(self.folder)
        state = state_of(status) if status else None
        if state is None:
            return "missing"
        if state == "finished" and _rollouts(status) >= self.member.spec.run.steps:
            return "finished"
        if state == "stopped" and _steps(self.folder) >= self.member.spec.run.steps:
            return "stopped"
        return "failed" if state in ("failed", "diverged") else "unfinished"


def is_left(outlook: Outlook, retry_failed: bool) -> bool:
    """Whether there is something to do of a run."""
    return outlook in ("missing", "unfinished") or (retry_failed and outlook == "failed")


def retry_hint(placed: Sequence[Placed], failed: Sequence[str], does: str) -> str:
    """What can be done about runs that failed, by name. does: what --retry-failed does with them."""
    codes = {place.member.name: failure.code for place in placed if (failure := place.failure) is not None}
    damaged = [name for name in failed if codes.get(name) == StoreError.exit_code]
    if not damaged:
        return f"--retry-failed {does}"
    one = len(damaged) == 1
    return (
        f"--retry-failed {does}, but {', '.join(damaged)} only when what {'its line names' if one else 'their lines name'} is "
        f"mended, or the run's folder removed to start it anew"
    )


def place_members(runs_dir: Path, name: str, members: Sequence[Member]) -> list[Placed]:
    """Where each run lies or will lie; writes nothing.

    Raises SpecError for an impossible name, one of a run, and where the sweep's folder has a run with another spec.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise SpecError(
            f"--name: {name!r} is not allowed: letters, digits, '.', '_' and '-', first a letter or digit, at most 100"
        )
    if (runs_dir / name / "spec.json").exists():
        raise SpecError(f"--name: {runs_dir / name} is a run; choose another --name for the sweep")
    known = _known_runs(runs_dir)
    placed = []
    for member in members:
        own = runs_dir / name / member.name
        has_own = own.is_dir() and not own.is_symlink()
        if has_own:
            _refuse_other_spec(Placed(member, own, shared=False))
        before = runs_dir / name / member.plain
        folder = own if has_own else known.get(member.identity, before if _is_begun(before, member.spec) else own)
        placed.append(Placed(member, folder, shared=folder != own))
    return placed


@contextmanager
def planning(runs_dir: Path) -> Iterator[None]:
    """Within it no other process decides where runs lie. Raises StoreError where the folder cannot be written."""
    check_place(runs_dir, ".sweeps.lock")
    with (runs_dir / ".sweeps.lock").open("a") as file:
        try_lock(file, wait=True)
        yield


def record_sweep(runs_dir: Path, name: str, sweep: SweepSpec, placed: Sequence[Placed]) -> Path:
    """The sweep's folder with its record and links to runs that lie elsewhere. Call it within `planning`.

    Runs that an earlier launch had and this one has not stay recorded: they are there.
    """
    folder = runs_dir / name
    try:
        folder.mkdir(exist_ok=True)
        runs = {one["name"]: one for one in read_record(folder)}
        for place in placed:
            runs[place.member.name] = {
                "name": place.member.name,
                "identity": place.member.identity,
                "folder": os.path.relpath(place.folder, folder),
                "values": {key: str(value) for key, value in place.member.values.items()},
            }
            _link(folder / place.member.name, place)
        of_sweep = json.loads(sweep.model_dump_json())
        content = {"kind": "sweep", "name": name, "sweep": of_sweep, "runs": list(runs.values())}
        write_whole(folder / RECORD, json.dumps(content, indent=2, allow_nan=False).encode())
    except OSError as error:
        raise StoreError(f"--runs-dir: {folder} cannot be written: {error.strerror}") from None
    return folder


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep's record; none where there is none or it is damaged, as it can be made again."""
    runs = read_json(folder / RECORD, []).get("runs")
    needed = ("name", "identity", "folder")
    return [
        one
        for one in (runs if isinstance(runs, list) else [])
        if isinstance(one, dict) and all(isinstance(one.get(key), str) for key in needed)
    ]


def open_claim(folder: Path) -> IO[str] | None:
    """The locked claim of a run, None where another process has it or runs the run. Closing it gives the run back. The
    kernel does so when its holder dies. Raises StoreError where the folder cannot be written."""
    claim = open_bare_claim(folder)
    if claim is not None and is_running(folder):
        claim.close()
        return None
    return claim


def open_bare_claim(folder: Path) -> IO[str] | None:
    """The same, also where a process that made no claim seems to run the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = (folder / CLAIM).open("a")
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}") from None
    if try_lock(claim):
        return claim
    claim.close()
    return None


def is_running(folder: Path) -> bool:
    """Whether a process runs the run: on this machine by its lock, on another one, whose locks may not be seen here, by its
    heartbeat."""
    status = _status(folder)
    if status.get("host") not in (None, socket.gethostname()) and state_of(status) == "running":
        return True
    if not (folder / ".lock").exists():
        return False
    with _opened(folder / ".lock") as file:
        return not try_lock(file)


def last_attempt(folder: Path) -> int:
    """Number of a run's last attempt, -1 before the first."""
    return int(_status(folder).get("attempt", -1))


def _opened(lock: Path) -> IO[str]:
    """To be locked, which some file systems allow a writer only; to be looked at where this process may not write."""
    try:
        return lock.open("a")
    except OSError:
        return lock.open()


def try_lock(file: IO[str], *, wait: bool = False) -> bool:
    """Whether the file could be locked; so it counts where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _known_runs(runs_dir: Path) -> dict[str, Path]:
    """Identity → folder of every run under the runs folder that is finished, and of those that sweeps have or will have there.
    Finished ones win."""
    if not runs_dir.is_dir():
        return {}
    specs = {folder: spec for folder in find_folders([runs_dir]) if (spec := _spec(folder)) is not None}
    identities = {folder: identity(spec) for folder, spec in specs.items()}
    found: dict[str, Path] = {}
    for record in sorted(runs_dir.glob(f"*/{RECORD}")):
        for run in read_record(record.parent):
            folder = (record.parent / run["folder"]).resolve()
            # A sweep that only refers to a run does not decide where it lies, and a run may have become another one.
            if folder.parent == record.parent.resolve() and identities.get(folder, run["identity"]) == run["identity"]:
                found.setdefault(run["identity"], folder)
    for folder, spec in specs.items():
        status = _status(folder)
        if status.get("state") == "finished" and _rollouts(status) >= spec.run.steps:
            found[identities[folder]] = folder
    return {key: runs_dir / os.path.relpath(folder, runs_dir.resolve()) for key, folder in found.items()}


def _is_begun(folder: Path, spec: RunSpec) -> bool:
    """Whether the run that was begun there may go on with this spec: it had its plain name before others would have had it."""
    before = None if folder.is_symlink() else _spec(folder)
    return before is not None and not spec_changes(before, spec)


def _refuse_other_spec(place: Placed) -> None:
    before, now = _spec(place.folder), place.member.spec
    if before is None:
        return
    if changes := spec_changes(before, now):
        raise SpecError(
            f"--name: {place.folder} was begun with another spec: {'; '.join(changes)}; only run.steps, eval.* and "
            "checkpoint.* may change: choose another --name"
        )
    if place.outlook == "finished" and (changes := spec_changes(before, now, MAY_CHANGE_LATER)):
        raise SpecError(
            f"--name: {place.folder} is finished, with another evaluation: {'; '.join(changes)}; choose another --name, or "
            f"evaluate what it saved: clipctl eval --run {place.folder}"
        )


def _link(link: Path, place: Placed) -> None:
    """A link to a run that lies in another folder, in place of an older one."""
    target, elsewhere = os.path.relpath(place.folder, link.parent), place.folder.parent != link.parent
    if link.is_symlink() and (not elsewhere or os.readlink(link) != target):
        link.unlink()
    if elsewhere and not link.is_symlink():
        link.symlink_to(target, target_is_directory=True)


def _spec(folder: Path) -> RunSpec | None:
    """The spec of a run's folder; None of one that has none, or one that this version cannot read."""
    try:
        return spec_from_json((folder / "spec.json").read_text())
    except (OSError, UnicodeDecodeError, SpecError):
        return None


def _steps(folder: Path) -> int:
    spec = _spec(folder)
    return 0 if spec is None else spec.run.steps


def _rollouts(status: Mapping[str, Any]) -> int:
    rollouts = status.get("rollouts")
    return rollouts if isinstance(rollouts, int) else 0


def _status(folder: Path) -> Mapping[str, Any]:
    return usable_status(read_json(folder / "status.json", []), [])
