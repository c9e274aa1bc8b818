"""Where the runs are: folders of runs and evaluations at or under some paths, which may be globs, links or files of a run."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipctl.errors import SpecError


def find_folders(paths: Iterable[str | Path]) -> list[Path]:
    """All folders of runs under the paths, each once, in the order of the paths and then of their names.

    Links are followed, loops end. A run is known by its `journal/`, its `metrics.duckdb`, or `spec.json` with `status.json`.
    An empty folder where a run could be, and one that cannot be listed, are among them, so that readers can name them.
    Raises SpecError for a path that does not exist and a glob that nothing matches.
    """
    found: dict[Path, None] = {}
    seen: set[tuple[int, int]] = set()
    for path in [match for given in paths for match in _expanded(Path(given))]:
        top = path if path.is_dir() else path.parent
        found |= dict.fromkeys(folder.resolve() for folder in _walk(top, top, seen))
    return list(found)


def _expanded(path: Path) -> list[Path]:
    """The path, or what it matches as a glob; a file that is named like a glob is that file."""
    if os.path.lexists(path):
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    if not matches:
        raise SpecError(f"analyze: no file or folder {str(path)!r}")
    return [Path(match) for match in matches]


def _walk(folder: Path, top: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir() for entry in entries}
    except OSError:
        yield folder
        return
    is_run = "journal" in names or "metrics.duckdb" in names or {"spec.json", "status.json"} <= names.keys()
    if is_run or (not names and folder.parent == top):
        yield folder
    of_run = {"journal", "checkpoints"} if is_run else set()
    for name in sorted(name for name, is_folder in names.items() if is_folder and name not in of_run):
        if not name.startswith("."):
            yield from _walk(folder / name, top, seen)
