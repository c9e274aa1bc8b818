"""Checkpoints: folders that are complete and unchanged, or that are not used.

    checkpoints/<rollouts>/             after so many whole rollouts: a folder that transformers loads, and in it
        state/                          what only going on needs
        manifest.json                   size and XXH3 of every other file
    checkpoints/<rollouts>+<updates>/   the same in the middle of a rollout, after so many of its updates
    checkpoints/latest                  the name of the newest one

A checkpoint is written under another name, hashed, fsynced and renamed, so a name like the above is complete; the hashes find
what a disk did to it later (safetensors notices a missing byte, but no wrong one). Old ones go when the new one is there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipctl.errors import StoreError
from clipctl.spec import Checkpoint

STATE = "state"
MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and of what lies in `state/`."""
NAME = re.compile(r"(0|[1-9]\d*)(?:\+([1-9]\d*))?")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """How far a run was: whole rollouts, and updates of the one that was under way."""

    rollouts: int
    updates: int = 0

    def __str__(self) -> str:
        return f"{self.rollouts}+{self.updates}" if self.updates else str(self.rollouts)

    @property
    def words(self) -> str:
        """`rollout 2, update 5`."""
        return f"rollout {self.rollouts}" + (f", update {self.updates}" if self.updates else "")


@contextmanager
def new_checkpoint(checkpoints: Path, place: Place, settings: Checkpoint) -> Iterator[Path]:
    """A folder to save into, which becomes the newest checkpoint when the block ends. Raises OSError.

    Older ones go as the settings say; those of the middle of a rollout with the first newer one.
    """
    beside = checkpoints / f".writing-{place}"
    remove_leftovers(checkpoints)
    try:
        beside.mkdir()
        yield beside
        _seal(beside)
        if (checkpoints / str(place)).exists():
            _replace(checkpoints, beside.rename(checkpoints / f".ready-{place}"))
        else:
            beside.rename(checkpoints / str(place))
        _sync(checkpoints)
        _write_latest(checkpoints, place)
        _remove_old(checkpoints, settings)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def places(checkpoints: Path) -> list[Place]:
    """Where there are checkpoints, newest first."""
    names = [entry.name for entry in checkpoints.iterdir() if entry.is_dir()] if checkpoints.is_dir() else []
    found = [Place(int(match[1]), int(match[2] or 0)) for match in map(NAME.fullmatch, names) if match]
    return sorted(found, reverse=True)


def newest(checkpoints: Path) -> Place | None:
    """The newest checkpoint that a run can go on from, if it is whole; None where there is none."""
    return next((place for place in places(checkpoints) if not _is_model_alone(checkpoints / str(place))), None)


def newest_good(checkpoints: Path) -> tuple[Place | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, None where there is no checkpoint at all, and what is
    wrong with the newer ones. Raises StoreError where there are some and all are damaged."""
    problems: list[str] = []
    found = places(checkpoints)
    alone = [place for place in found if _is_model_alone(checkpoints / str(place))]
    for place in found if len(alone) == len(found) else [place for place in found if place not in alone]:
        problem = damage(checkpoints / str(place))
        if problem is None:
            return place, problems
        problems.append(f"checkpoint {place} is not usable: {problem}")
    if problems:
        raise StoreError(
            f"{checkpoints}: {'; '.join(problems)}; none is left to go on from: start anew under another --name"
        )
    return None, []


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote it."""
    return int(json.loads((checkpoint / STATE / "state.json").read_bytes())["versions"]["processes"])


def damage(checkpoint: Path, *, state: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where every file is as it was written. Reads it whole; without `state`, only what
    is not needed for going on alone."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']!r}, this clipctl reads {FORMAT}"
        files = {
            name: (int(size), str(digest))
            for name, (size, digest) in manifest["files"].items()
            if state or not name.startswith(f"{STATE}/")
        }
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, digest) in files.items():
        try:
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found} bytes, {size} were written"
            if xxh3(checkpoint / name) != digest:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def xxh3(file: Path) -> str:
    """The 128-bit XXH3 of a file's content, in hex: 11 GB/s, where SHA-256 makes 1.2."""
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _replace(checkpoints: Path, ready: Path) -> None:
    """Puts a complete checkpoint in the place of the one of its name, in steps of which each can be the last: there is always
    a whole one, and `remove_leftovers` goes on from wherever it ended."""
    _sync(checkpoints)
    target = checkpoints / ready.name.removeprefix(".ready-")
    if target.exists():
        # A folder cannot be renamed over another one that is not empty.
        target.rename(checkpoints / f".replaced-{target.name}")
    ready.rename(target)
    shutil.rmtree(checkpoints / f".replaced-{target.name}", ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """What a killed process was writing or removing; what it had completed, but not put in its place yet, is put there."""
    for ready in checkpoints.glob(".ready-*"):
        _replace(checkpoints, ready)
    for entry in checkpoints.glob(".*-*"):
        shutil.rmtree(entry)


def _seal(beside: Path) -> None:
    """Manifest and fsync of everything in the folder."""
    files = sorted(file for file in beside.rglob("*") if file.is_file())
    listed = {str(file.relative_to(beside)): (file.stat().st_size, xxh3(file)) for file in files}
    (beside / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))
    sync_tree(beside)


def sync_tree(folder: Path) -> None:
    """fsync of everything in the folder, and of the folder. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _write_latest(checkpoints: Path, place: Place) -> None:
    beside = checkpoints / ".latest"
    beside.write_text(f"{place}\n")
    _sync(beside)
    beside.rename(checkpoints / "latest")
    _sync(checkpoints)


def _remove_old(checkpoints: Path, settings: Checkpoint) -> None:
    """All but the newest `keep` of whole rollouts, and all of the middle of a rollout but the newest checkpoint."""
    found = [place for place in places(checkpoints) if not _is_model_alone(checkpoints / str(place))]
    whole = [place for place in found if not place.updates]
    kept = set(whole if settings.keep == "all" else whole[: settings.keep]) | {found[0]}
    for place in found:
        if place not in kept:
            old = checkpoints / str(place)
            if settings.models_every and not place.updates and place.rollouts % settings.models_every == 0:
                (old / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(old / STATE)
            else:
                # Renamed first: a folder that is half removed must not pass for a checkpoint.
                shutil.rmtree(old.rename(checkpoints / f".removing-{place}"))


def _is_model_alone(checkpoint: Path) -> bool:
    return not (checkpoint / MANIFEST).exists() and not (checkpoint / STATE).exists()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
