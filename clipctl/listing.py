"""The tables of one row a folder, `runs` and `evaluation_folders`, made of status.json and spec.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipctl.folder import Folder, state_of

RUNS = {
    "run_id": "varchar", "name": "varchar", "state": "varchar", "created_at": "timestamp", "finished_at": "timestamp",
    "spec": "json", "git_commit": "varchar", "version": "varchar", "host": "varchar", "preset": "varchar",
    "model": "varchar", "eps_low": "double", "eps_high": "double", "seed": "bigint", "attempt": "integer",
    "message": "varchar", "path": "varchar", "problem": "varchar", "copy_of": "varchar", "committed": "bigint",
}  # fmt: skip
EVALUATION_FOLDERS = {
    "eval_id": "varchar", "run_id": "varchar", "state": "varchar", "created_at": "timestamp", "finished_at": "timestamp",
    "message": "varchar", "path": "varchar", "problem": "varchar",
}  # fmt: skip
SMALL = {"runs": RUNS, "evaluation_folders": EVALUATION_FOLDERS}
"""Their columns."""


def run_ids(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as tell equal names apart."""
    ids = [folder.name for folder in folders]
    depth = 1
    while len(set(ids)) < len(ids):
        depth += 1
        twice = {name for name in ids if ids.count(name) > 1}
        ids = [
            "/".join(folder.parts[-depth:]) if name in twice else name
            for name, folder in zip(ids, folders, strict=True)
        ]
    return ids


def folder_rows(folders: Sequence[Folder], ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each of SMALL. ids: under which the folders are known here."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SMALL}
    known = {folder.path: run_id for folder, run_id in zip(folders, ids, strict=True)}
    originals = copies(folders, ids)
    for folder, run_id in zip(folders, ids, strict=True):
        if folder.is_evaluation:
            rows["evaluation_folders"].append(evaluation_row(folder, known))
        else:
            rows["runs"].append(run_row(folder, run_id) | {"copy_of": originals.get(run_id)})
    return rows


def run_row(folder: Folder, run_id: str) -> dict[str, Any]:
    status, spec = folder.status, folder.spec
    clip = spec.get("clip", {})
    return {
        "run_id": run_id,
        "name": status.get("name", folder.path.name),
        "state": state_of(status),
        "created_at": _naive(status.get("created_at")),
        "finished_at": _naive(status.get("finished_at")),
        "spec": folder.spec_text or None,
        "git_commit": status.get("git_commit"),
        "version": status.get("version"),
        "host": status.get("host"),
        "preset": status.get("preset"),
        "model": spec.get("model", {}).get("path"),
        "eps_low": _number(clip.get("low")),
        "eps_high": _number(clip.get("high")),
        "seed": spec.get("run", {}).get("seed"),
        "attempt": status.get("attempt"),
        "message": status.get("message"),
        "path": str(folder.path),
        "problem": "; ".join(dict.fromkeys(folder.problems)) or None,
        "committed": status.get("rollouts"),
    }


def evaluation_row(folder: Folder, ids: Mapping[Path, str]) -> dict[str, Any]:
    """One evaluation's folder: its state, and the run that it evaluated, under the id that this run has here."""
    run = folder.spec.get("run")
    return {
        "eval_id": ids[folder.path],
        "run_id": ids.get(Path(run), Path(run).name) if isinstance(run, str) else None,
        "state": state_of(folder.status),
        "created_at": _naive(folder.status.get("created_at")),
        "finished_at": _naive(folder.status.get("finished_at")),
        "message": folder.status.get("message"),
        "path": str(folder.path),
        "problem": "; ".join(dict.fromkeys(folder.problems)) or None,
    }


def copies(folders: Sequence[Folder], ids: Sequence[str]) -> dict[str, str]:
    """Run → the run that it is a copy of: one and the same start of one process, met twice. The original is the one that
    got furthest, and of those the first."""
    groups: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
    for folder, run_id in zip(folders, ids, strict=True):
        status = folder.status
        if status:
            key = (status.get("created_at"), status.get("host"), status.get("pid"), status.get("name"))
            groups.setdefault(key, []).append((-int(status.get("rollouts", 0)), run_id))
    return {
        run_id: min(group, key=lambda entry: entry[0])[1]
        for group in groups.values()
        for _, run_id in group
        if run_id != min(group, key=lambda entry: entry[0])[1]
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _naive(text: str | None) -> Any:
    """A time of status.json, in UTC."""
    from datetime import UTC, datetime

    return None if text is None else datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)
