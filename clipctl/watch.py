"""What can be seen of runs while they run: their last rollouts, state and events, read again when their folders change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

from clipctl.discover import find_folders
from clipctl.errors import SpecError
from clipctl.folder import is_evaluation, read_json, state_of, usable_status
from clipctl.store import open_runs

PACE = 5
"""Rollouts that the pace, and so the ETA, is the mean of."""
ROLLOUTS = """
with clipped as (
    select run_id, rollout, sum(clip_low) / nullif(sum(tokens), 0) as clip_low,
        sum(clip_high) / nullif(sum(tokens), 0) as clip_high
    from updates group by all
)
select path, rollout, time, reward_mean as reward, entropy, clip_low, clip_high, response_tokens_mean as response_tokens,
    tokens, coalesce(seconds_sample, 0) + coalesce(seconds_reward, 0) + coalesce(seconds_score, 0)
        + coalesce(seconds_update, 0) as seconds
from rollouts as r join runs using (run_id) left join clipped using (run_id, rollout) order by r.rollout
"""
PROBLEMS = "select path, problem from runs where problem is not null"
EVENTS = "select path, time, kind, events.message from events join runs using (run_id) order by time"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One stored rollout. clip_low, clip_high: fractions of its updates' tokens. seconds: wall time without what lies
    between rollouts; None what the run did not store."""

    rollout: int
    time: datetime | None
    reward: float | None
    entropy: float | None
    clip_low: float | None
    clip_high: float | None
    response_tokens: float | None
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Event:
    time: datetime
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run as it was when it was read.

    name: its folder's path under what is followed. Times are UTC, None where status.json does not say. steps: rollouts
    that the spec asks for, None without a readable spec. problem: what of it cannot be read; empty where all can.
    """

    folder: Path
    name: str
    preset: str
    state: str | None
    message: str
    steps: int | None
    eps: tuple[Any, Any]
    started_at: datetime | None
    heartbeat: datetime | None
    finished_at: datetime | None
    rollouts: list[Rollout]
    events: list[Event]
    problem: str = ""

    @property
    def ended(self) -> bool:
        return self.state != "running"

    def seconds_left(self, now: datetime) -> float | None:
        """Until the last rollout is stored, at the pace of the last ones; None where that cannot be known."""
        done = self.rollouts[-1].rollout + 1 if self.rollouts else 0
        if self.ended or self.steps is None or done == 0 or done >= self.steps:
            return None
        late = self.rollouts[-PACE - 1 :]
        first, last = late[0].time, late[-1].time
        if first is not None and last is not None and len(late) > 1:
            pace = (last - first).total_seconds() / (late[-1].rollout - late[0].rollout)
        else:
            pace = sum(one.seconds for one in late[-PACE:]) / len(late[-PACE:])
        waited = (now - last).total_seconds() if last is not None else 0.0
        return max(pace * (self.steps - done) - min(waited, pace), 0.0)


class Watcher:
    """The runs at or under some paths or globs, those that appear later included. Only reads, and only what has changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises SpecError for a path that does not exist and a glob that nothing matches."""
        find_folders(paths)
        self._paths = list(paths)
        self._seen: dict[Path, tuple[Any, Snapshot | None]] = {}

    def look(self) -> list[Snapshot]:
        """All runs as they are now, in the order in which they were started."""
        found = {folder: _name(folder, path) for path in reversed(self._paths) for folder in _runs_under(path)}
        for gone in self._seen.keys() - found.keys():
            del self._seen[gone]
        stamps = {folder: _stamp(folder) for folder in found}
        changed = [folder for folder in found if folder not in self._seen or self._seen[folder][0] != stamps[folder]]
        for folder, (stamp, shot) in self._seen.items():
            if shot is not None and shot.state == "running" and folder not in changed:
                # Silence is what makes a run crashed, and silence changes nothing on disk.
                self._seen[folder] = (stamp, replace(shot, state=state_of(_status(folder))))
        read = read_snapshots({folder: found[folder] for folder in changed if not is_evaluation(folder)})
        self._seen |= {folder: (stamps[folder], read.get(folder)) for folder in changed}
        shots = [snapshot for _, snapshot in self._seen.values() if snapshot is not None]
        return sorted(shots, key=lambda shot: (shot.started_at or datetime.min, shot.name))


def _runs_under(path: Path) -> list[Path]:
    """The folders of runs, without empty ones: a run that starts has nothing in its folder for a moment."""
    try:
        return [folder for folder in find_folders([path]) if any(_stamp(folder))]
    except SpecError:
        # It was there when the watcher was made, and may be there again.
        return []


def _name(folder: Path, path: Path) -> str:
    """The folder's path under the given one, or under the part of a glob that is fixed."""
    fixed = Path(*takewhile(lambda part: not has_magic(part), path.parts)) if has_magic(str(path)) else path
    top = (path if path.exists() else fixed).resolve()
    return str(folder.relative_to(top)) if folder != top and folder.is_relative_to(top) else folder.name


def read_snapshots(folders: Mapping[Path, str]) -> dict[Path, Snapshot]:
    """Runs by folder, read from their stores. folders: absolute, with the names that they go by."""
    if not folders:
        return {}
    rollouts: dict[str, list[Rollout]] = {str(folder): [] for folder in folders}
    events: dict[str, list[Event]] = {str(folder): [] for folder in folders}
    with open_runs(folders) as runs:
        for row in runs.table(ROLLOUTS).to_pylist():
            rollouts[row.pop("path")].append(Rollout(**row))
        for row in runs.table(EVENTS).to_pylist():
            events[row.pop("path")].append(Event(**row))
        problems = {row["path"]: str(row["problem"]) for row in runs.table(PROBLEMS).to_pylist()}
    return {
        folder: _snapshot(folder, name, rollouts[str(folder)], events[str(folder)], problems.get(str(folder), ""))
        for folder, name in folders.items()
    }


def _snapshot(folder: Path, name: str, rollouts: list[Rollout], events: list[Event], problem: str) -> Snapshot:
    status = _status(folder)
    spec = read_json(folder / "spec.json", [])
    clip, run = (spec[group] if isinstance(spec.get(group), dict) else {} for group in ("clip", "run"))
    return Snapshot(
        folder=folder,
        name=name,
        preset=str(status.get("preset") or ""),
        state=state_of(status),
        message=str(status.get("message") or ""),
        steps=run.get("steps"),
        eps=(clip.get("low"), clip.get("high")),
        started_at=_time(status.get("created_at")),
        heartbeat=_time(status.get("heartbeat")),
        finished_at=_time(status.get("finished_at")),
        rollouts=rollouts,
        events=events,
        problem=problem,
    )


def _stamp(folder: Path) -> tuple[int, ...]:
    """What changes when the run writes; all 0 of a folder that has nothing of a run."""
    return tuple(_changed_at(folder / name) for name in ("journal", "status.json", "spec.json", "metrics.duckdb"))


def _changed_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _status(folder: Path) -> dict[str, Any]:
    return usable_status(read_json(folder / "status.json", []), [])


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None) if text else None
