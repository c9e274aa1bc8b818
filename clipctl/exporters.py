"""Stored runs in the formats of other trackers, one folder a run and nothing sent anywhere: TensorBoard event files, and
W&B offline runs for `wandb sync`.

Names are the store's: `rollouts/entropy`, `updates/clip_low_fraction`, `evaluations/<benchmark>/mean_at_k`. A rollout's
step is its number, an update's the number of updates before it in the run, an evaluation's the rollouts that the policy
had. Wall times are those of the run: when the rollout was stored, with its updates spread evenly over `seconds_update`; in
runs that kept no times, the run's start plus the seconds of the rollouts so far.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from heapq import merge
from operator import attrgetter
from pathlib import Path
from typing import Any

from clipctl.errors import DependencyError, SpecError, StoreError
from clipctl.layers import leaves
from clipctl.store import Runs, open_runs

MARK = ".clipctl-export"
"""A file in every exported folder: what has it may be exported again, what has not is somebody else's."""
EVALUATED = ("mean_at_k", "pass_at_k", "response_tokens_mean", "truncated", "no_answer")
TIMED = """with timed as (
    select rollout, coalesce(seconds_update, 0) as update_seconds, epoch(coalesce(time, created_at + to_microseconds((1e6 * sum(
        coalesce(seconds_sample, 0) + coalesce(seconds_reward, 0) + coalesce(seconds_score, 0) + coalesce(seconds_update, 0)
    ) over (order by rollout))::bigint))) as wall_time
    from rollouts join runs using (run_id) where run_id = {run}
)"""
QUERIES = {
    "rollouts": f"""{TIMED}
        select rollout as _step, wall_time as _wall_time, r.* exclude (run_id, attempt, rollout, time)
        from rollouts as r join timed using (rollout) where run_id = {{run}} order by _step""",
    "updates": f"""{TIMED},
        counted as (
            select *, row_number() over (partition by rollout order by inner_step) as done,
                count(*) over (partition by rollout) as updates,
                row_number() over (order by rollout, inner_step) - 1 as _step
            from updates where run_id = {{run}}
        )
        select _step, wall_time - update_seconds * (1 - done / updates) as _wall_time,
            c.* exclude (run_id, attempt, rollout, inner_step, _step, done, updates)
        from counted as c join timed using (rollout) order by _step""",
    "evaluations": f"""select rollout as _step, epoch(started_at) + coalesce(seconds, 0) as _wall_time, benchmark,
        {", ".join(EVALUATED)} from evaluations
        where run_id = {{run}} and rollout is not null and complete order by rollout, started_at, benchmark""",
}
RATIOS = """
with binned as (select rollout, ratio_from, ratio_to, sum(tokens) as tokens from histograms where run_id = {run} group by all),
summed as (select rollout, min(ratio_min) as least, max(ratio_max) as most, sum(ratio_sum) as ratio_sum
    from updates where run_id = {run} group by rollout)
select rollout, any_value(least) as least, any_value(most) as most, any_value(ratio_sum) as ratio_sum,
    list(ratio_from order by ratio_from) as lower, list(ratio_to order by ratio_from) as upper,
    list(tokens order by ratio_from) as tokens
from binned join summed using (rollout) group by rollout order by rollout
"""


@dataclass(frozen=True, slots=True)
class Point:
    """Numbers of one rollout, update or evaluation. wall_time: seconds since 1970, UTC. values: by name, group first."""

    group: str
    step: int
    wall_time: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Exported:
    """One run as other trackers want it. spec: resolved, nested. points: by time, and by step within a group. events: (time,
    rollout, kind, message). ratios: one histogram a rollout, of all its updates' ratios.
    """

    run_id: str
    state: str | None
    created_at: datetime | None
    spec: Mapping[str, Any]
    points: list[Point]
    events: list[tuple[datetime, int | None, str, str]]
    ratios: list[dict[str, Any]]


def export_paths(paths: Sequence[Path], kind: str, folder: Path) -> list[Path]:
    """`export_runs` of the runs under the paths."""
    with open_runs(paths) as runs:
        return export_runs(runs, kind, folder)


def export_runs(runs: Runs, kind: str, folder: Path) -> list[Path]:
    """Writes every run that has rollouts to `folder/<run>` and returns these folders.

    kind: a name of EXPORTERS. Raises SpecError for another kind and for a folder there that no export made, DependencyError
    where the tracker's package is not installed, StoreError where the disk refuses.
    """
    if kind not in EXPORTERS:
        raise SpecError(f"--export: {kind!r} is not one of {', '.join(EXPORTERS)}")
    write = EXPORTERS[kind]()
    written: list[Path] = []
    for run in read_runs(runs):
        with fresh_folder(folder / run.run_id, kind) as place:
            write(run, place)
        written.append(folder / run.run_id)
    if not written:
        raise SpecError("--export: none of these runs has a rollout yet")
    return written


@contextmanager
def fresh_folder(folder: Path, kind: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when it is complete, in place of an earlier export of the same kind.

    Raises SpecError where `folder` is not an export of that kind, StoreError where the disk refuses.
    """
    mark = folder / MARK
    try:
        if folder.exists() and not (mark.is_file() and mark.read_text().strip() == kind):
            raise SpecError(f"--export: {folder} exists and is no {kind} export of clipctl; choose another folder")
        beside = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            (beside / MARK).write_text(f"{kind}\n")
            if folder.exists():
                shutil.rmtree(folder)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"--export: {folder} cannot be written: {error.strerror or error}") from None


def read_runs(runs: Runs) -> Iterator[Exported]:
    """The runs that have rollouts, one after the other."""
    listed = runs.table("select run_id, state, created_at, spec from runs order by created_at, run_id").to_pylist()
    for run in listed:
        name = "'" + run["run_id"].replace("'", "''") + "'"
        found = {group: runs.table(query.format(run=name)).to_pylist() for group, query in QUERIES.items()}
        if not found["rollouts"]:
            continue
        events = runs.table(f"select time, rollout, kind, message from events where run_id = {name} order by time")
        yield Exported(
            run["run_id"],
            run["state"],
            run["created_at"],
            json.loads(run["spec"] or "{}"),
            list(merge(*([point(group, row) for row in found[group]] for group in found), key=attrgetter("wall_time"))),
            [tuple(row.values()) for row in events.to_pylist()],
            runs.table(RATIOS.format(run=name)).to_pylist(),
        )


def point(group: str, row: Mapping[str, Any]) -> Point:
    """The numbers of a row under their full names; NULL is left out."""
    prefix = f"{group}/{row['benchmark']}/" if group == "evaluations" else f"{group}/"
    hidden = ("_step", "_wall_time", "benchmark")
    values = {
        f"{prefix}{name}": float(value) for name, value in row.items() if name not in hidden and value is not None
    }
    return Point(group, row["_step"], row["_wall_time"], values)


def flat(spec: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """`clip.low` → 0.2: the spec's keys as users write them; lists as text, what is unset is left out."""
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value)
        for name, value in leaves(spec)
        if value is not None
    }


def tensorboard_writer() -> Callable[[Exported, Path], None]:
    """Writes event files by tensorboardX. Raises DependencyError without it."""
    try:
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams
    except ImportError:
        raise _missing("tensorboard", "tensorboardX") from None

    def write(run: Exported, folder: Path) -> None:
        started = run.points[0].wall_time
        with SummaryWriter(str(folder), max_queue=1000) as writer:
            for summary in hparams(flat(run.spec), {})[:2]:
                writer.file_writer.add_summary(summary, 0, started)
            lines = json.dumps(run.spec, indent=2).splitlines()
            writer.add_text("spec", "\n".join(f"    {line}" for line in lines), 0, started)
            for point in run.points:
                scalars = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
                writer.file_writer.add_summary(Summary(value=scalars), point.step, point.wall_time)
            times = {point.step: point.wall_time for point in run.points if point.group == "rollouts"}
            for row in run.ratios:
                limits, counts = filled_bins(row["lower"], row["upper"], row["tokens"])
                total = float(sum(counts))
                squares = float(row["ratio_sum"]) ** 2 / total
                writer.add_histogram_raw(
                    "updates/ratio",
                    row["least"], row["most"], total, float(row["ratio_sum"]), squares, limits, counts,
                    row["rollout"], times[row["rollout"]],
                )  # fmt: skip
            for time, rollout, kind, message in run.events:
                writer.add_text(f"events/{kind}", f"    {message}", rollout or 0, _epoch(time))

    return write


FINITE = 1.7976931348623157e308
"""The upper limit of TensorBoard's last bucket; it shows the largest value instead."""


def filled_bins(lower: list[float], upper: list[float], counts: list[float]) -> tuple[list[float], list[float]]:
    """Upper limits and counts of adjoining buckets, where empty bins between those given are one bucket of 0."""
    limits: list[float] = []
    filled: list[float] = []
    for low, high, count in zip(lower, upper, counts, strict=True):
        if low > (limits[-1] if limits else 0.0):
            limits.append(low)
            filled.append(0.0)
        limits.append(min(high, FINITE))
        filled.append(float(count))
    return limits, filled


def wandb_writer() -> Callable[[Exported, Path], None]:
    """Writes offline runs by wandb, with nothing of this machine in them. Raises DependencyError without it."""
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "wandb") from None

    def write(run: Exported, folder: Path) -> None:
        started = run.points[0].wall_time
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            symlink=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_start_time=started,
        )
        # The id is the run's for ever: a second export, synced, goes to the same run.
        identity = blake2b(f"{run.run_id} {run.created_at}".encode(), digest_size=8).hexdigest()
        with wandb.init(
            project="clipctl", name=run.run_id, id=identity, dir=str(folder), mode="offline", config=dict(run.spec),
            resume="allow", reinit="finish_previous", settings=settings,
        ) as record:  # fmt: skip
            for group in ("rollout", "update"):
                record.define_metric(group, hidden=True)
                record.define_metric(f"{group}s/*", step_metric=group)
            record.define_metric("evaluations/*", step_metric="rollout")
            for point in run.points:
                axis = "update" if point.group == "updates" else "rollout"
                clock = {"_timestamp": point.wall_time, "_runtime": point.wall_time - started}
                record.log({**point.values, axis: point.step, **clock})
            record.summary["state"] = run.state
            if run.events:
                rows = [[time.isoformat(), rollout, kind, message] for time, rollout, kind, message in run.events]
                record.log({"events": wandb.Table(columns=["time", "rollout", "kind", "message"], data=rows)})
        wandb.teardown()  # Its service holds the files until it ends.
        for logs in folder.glob("wandb/*/logs"):
            shutil.rmtree(logs)

    return write


EXPORTERS: dict[str, Callable[[], Callable[[Exported, Path], None]]] = {
    "tensorboard": tensorboard_writer,
    "wandb": wandb_writer,
}
"""What `--export` takes."""


def _missing(extra: str, package: str) -> DependencyError:
    return DependencyError(f"--export {extra}: {package} is not installed; pip install 'clipctl[{extra}]'")


def _epoch(time: datetime) -> float:
    return time.replace(tzinfo=UTC).timestamp()
