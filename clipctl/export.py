"""`clipctl export`: a run's policy as a plain transformers folder, complete or not there at all."""

import os
import shutil
from pathlib import Path

from clipctl.checkpoint import MANIFEST, STATE, damage, sync_tree
from clipctl.errors import ModelError, SpecError, StoreError
from clipctl.model_card import model_card
from clipctl.targets import find_target


def export(text: str, to: Path, runs_dir: Path) -> Path:
    """Writes the policy of RUN[@ROLLOUT] to the folder `to`, which is new or empty, and returns it.

    Weights are the checkpoint's own files, whose hashes are checked. Raises SpecError, ModelError for a checkpoint that is
    not there, and StoreError for one that is damaged and for a folder that cannot be written.
    """
    target = find_target(text, runs_dir, "export")
    if target.checkpoint is None:
        raise SpecError(f"export: {text} is the base model, {target.spec.model.path}; export a checkpoint of the run")
    folder = to.expanduser().resolve()
    refuse_taken(folder, to)
    problem = damage(target.checkpoint, state=False) if (target.checkpoint / MANIFEST).exists() else None
    if problem is not None:
        raise StoreError(f"export: checkpoint {target.rollout} of {target.folder.name} is damaged: {problem}")
    card = model_card(target)
    beside = folder.with_name(f".{folder.name}.exporting")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for file in sorted(target.checkpoint.iterdir()):
            if file.name not in (MANIFEST, STATE):
                shutil.copyfile(file, beside / file.name)
        (beside / "README.md").write_text(card)
        sync_tree(beside)
        # Takes the place of an empty folder, and of nothing else.
        beside.rename(folder)
    except OSError as error:
        refuse_taken(folder, to)
        raise _named(error, target.checkpoint, to) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def refuse_taken(folder: Path, to: Path) -> None:
    """Raises SpecError where there is something already."""
    if folder.is_dir() and not os.access(folder, os.R_OK):
        raise StoreError(f"--to: {to} cannot be read")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SpecError(
            f"--to: {to} {'is not empty' if folder.is_dir() else 'is no folder'}; give a new or empty folder"
        )


def _named(error: OSError, checkpoint: Path, to: Path) -> ModelError | StoreError:
    if not checkpoint.is_dir():
        return ModelError(
            f"export: checkpoint {checkpoint.name} was removed while it was copied, because the run has newer ones; export one "
            "of these, or keep more of them: --set checkpoint.keep=N"
        )
    return StoreError(f"--to: {to} cannot be written: {error.filename or to}: {error.strerror or error}")
