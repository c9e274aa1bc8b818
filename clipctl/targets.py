"""RUN[@ROLLOUT] on the command line: a run's folder or name, and one of its checkpoints."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from clipctl.errors import ModelError, SpecError, StoreError
from clipctl.folder import is_evaluation, read_json, state_of, usable_status
from clipctl.spec import RunSpec, spec_from_json


@dataclass(frozen=True, slots=True)
class Target:
    """A run's policy after so many rollouts. checkpoint: its folder, None for the base model, after 0 rollouts."""

    folder: Path
    spec: RunSpec
    rollout: int
    checkpoint: Path | None


def find_target(text: str, runs_dir: Path, option: str) -> Target:
    """The policy that RUN[@ROLLOUT] names; without a rollout that of the last checkpoint. option: named in errors.

    Raises SpecError where there is no such run, StoreError where its spec is missing, and ModelError where it has no such
    checkpoint.
    """
    name, at, wanted = text.partition("@")
    folder = find_run(name, runs_dir, option)
    if at and not wanted.isdecimal():
        raise SpecError(f"{option}: {text!r}: what follows @ is a number of rollouts, such as {name}@20")
    spec_file = folder / "spec.json"
    if not spec_file.is_file():
        raise StoreError(f"{option}: {spec_file} is missing, so the run's model and template are not known")
    run = spec_from_json(spec_file.read_text(errors="replace"))
    if wanted and int(wanted) == 0:
        return Target(folder, run, 0, None)
    checkpoints = {int(path.name): path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()}
    if not checkpoints:
        problems: list[str] = []
        state = state_of(usable_status(read_json(folder / "status.json", problems), problems)) or "broken"
        raise ModelError(
            f"{option}: {folder.name} ({state}) has no checkpoint; the model is saved when a run ends, and every N rollouts "
            f"with checkpoint.every = N; {folder.name}@0 is its base model"
        )
    rollout = int(wanted) if wanted else max(checkpoints)
    if rollout not in checkpoints:
        listed = ", ".join(map(str, sorted(checkpoints)))
        raise ModelError(
            f"{option}: {folder.name} has no checkpoint {rollout}; it has {listed} (0 is the base model); "
            "checkpoint.models_every = N keeps the models of every N-th rollout, checkpoint.keep more of the newest"
        )
    return Target(folder, run, rollout, checkpoints[rollout])


def find_run(name: str, runs_dir: Path, option: str) -> Path:
    """The run's folder, by its path or its name in `runs_dir`. Raises SpecError."""
    folder = next((path for path in (Path(name), runs_dir / name) if name and path.is_dir()), None)
    if folder is None:
        known = [path.parent.name for path in runs_dir.glob("*/spec.json") if not is_evaluation(path.parent)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SpecError(f"{option}: no run {name!r}, as a folder or in {runs_dir}{hint}")
    if is_evaluation(folder):
        raise SpecError(f"{option}: {folder} is an evaluation, not a run; look at it with: clipctl analyze {folder}")
    return folder
