"""Exports read back by the trackers' own packages, against the rows that were written."""

import json
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_store import SPEC, evals, evaluation, rollout_row, samples, tables, update_rows, write

from clipctl.cli import app
from clipctl.errors import DependencyError, SpecError, StoreError
from clipctl.exporters import FINITE, MARK, export_paths, filled_bins, fresh_folder
from clipctl.journal import create_run
from clipctl.store import open_runs

RATIOS = {
    "inner_step": [0, 0, 0, 2], "advantage_sign": [-1, 1, 1, 1], "ratio_from": [0.0, 0.0, 1.1, 1.1],
    "ratio_to": [0.9, 0.9, float("inf"), float("inf")], "tokens": [3, 4, 1, 1], "pg": [0.0] * 4, "npg": [0.0] * 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of two rollouts with three updates each, an event, and a histogram in rollout 0."""
    writer = create_run(tmp_path / "runs", "a", SPEC, "tiny")
    writer.write_rollout(0, rollout_row(0), tables(update_rows(0), samples(0), histograms=RATIOS))
    write(writer, 1)
    writer.event("alarm", "collapse: <b>x</b>", rollout=1)
    writer.close("finished", "")
    return writer.folder


def times(folder: Path) -> list[float]:
    with open_runs(folder) as runs:
        stored = runs.sql("select time from rollouts order by rollout").fetchall()
    return [time.replace(tzinfo=UTC).timestamp() for (time,) in stored]


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}).Reload()


def test_tensorboard_reads_every_number_at_its_step_and_time(folder: Path, tmp_path: Path) -> None:
    assert export_paths([folder], "tensorboard", tmp_path / "out") == [tmp_path / "out" / "a"]
    events = read_events(tmp_path / "out" / "a")
    clock = times(folder)
    entropy = events.Scalars("rollouts/entropy")
    rows = [rollout_row(rollout) for rollout in range(2)]
    assert [event.step for event in entropy] == [0, 1]
    assert [event.wall_time for event in entropy] == pytest.approx(clock, abs=1e-5)
    assert [event.value for event in entropy] == pytest.approx(
        [row["entropy_response_sum"] / row["responses_scored"] for row in rows], rel=1e-6
    )
    updates = [row for rollout in range(2) for row in update_rows(rollout)]
    clipped = events.Scalars("updates/clip_low_fraction")
    assert [event.step for event in clipped] == list(range(6))
    assert [event.value for event in clipped] == pytest.approx([row["clip_low"] / row["tokens"] for row in updates])
    spread = [
        at - row["seconds_update"] * left for at, row in zip(clock, rows, strict=True) for left in (2 / 3, 1 / 3, 0)
    ]
    assert [event.wall_time for event in clipped] == pytest.approx(spread, abs=1e-5)
    assert [event.step for event in events.Scalars("updates/noise_max")] == [0, 3]  # NULL is left out
    assert not [tag for tag in events.Tags()["scalars"] if tag.split("/")[0] not in ("rollouts", "updates")]


def test_tensorboard_shows_the_spec_the_events_and_the_ratios(folder: Path, tmp_path: Path) -> None:
    export_paths([folder], "tensorboard", tmp_path / "out")
    events = read_events(tmp_path / "out" / "a")
    (spec,) = events.Tensors("spec/text_summary")
    assert json.loads(spec.tensor_proto.string_val[0])["clip"]["high"] == "Infinity"
    (told,) = events.Tensors("events/alarm/text_summary")
    assert (told.step, told.tensor_proto.string_val[0].strip()) == (1, b"collapse: <b>x</b>")
    assert set(events.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}
    histogram = events.Histograms("updates/ratio")[0]
    assert histogram.step == 0
    assert histogram.histogram_value.bucket_limit == [0.9, 1.1, FINITE]
    assert histogram.histogram_value.bucket == [7, 0, 2]
    assert histogram.histogram_value.num == 9
    assert histogram.histogram_value.sum == pytest.approx(sum(row["ratio_sum"] for row in update_rows(0)))
    assert histogram.histogram_value.max == pytest.approx(max(row["ratio_max"] for row in update_rows(0)))


def test_evaluations_stand_at_the_rollouts_that_the_policy_had(tmp_path: Path) -> None:
    writer = create_run(tmp_path / "runs", "a", SPEC, "tiny")
    write(writer, 0)
    row = evaluation("svamp", 2, seconds=1.5) | {"started_at": [datetime(2030, 1, 1)]}
    writer.write_evaluation(0, 7, evals("svamp", [[True, False], [False, False]]) | {"evaluations": row})
    writer.close("finished", "")
    export_paths([writer.folder], "tensorboard", tmp_path / "out")
    (found,) = read_events(tmp_path / "out" / "a").Scalars("evaluations/svamp/mean_at_k")
    assert (found.step, found.value) == (7, 0.25)
    assert found.wall_time == datetime(2030, 1, 1, tzinfo=UTC).timestamp() + 1.5


def test_runs_that_kept_no_times_get_their_start_and_seconds(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parent / "data" / "runs-schema-1.tar.gz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    with open_runs(tmp_path / "old") as runs:
        (name, created), *_ = runs.sql("select run_id, created_at from runs order by all").fetchall()
        seconds = runs.sql(
            "select seconds_sample + seconds_reward + seconds_score + seconds_update from rollouts "
            f"where run_id = '{name}' order by rollout"
        ).fetchall()
    export_paths([tmp_path / "old"], "tensorboard", tmp_path / "out")
    found = read_events(tmp_path / "out" / name).Scalars("rollouts/reward_mean")
    expected = created.replace(tzinfo=UTC).timestamp() + np.cumsum([second for (second,) in seconds])
    assert [event.wall_time for event in found] == pytest.approx(list(expected), abs=1e-4)


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of an offline run: W&B's protobuf messages in LevelDB's log format (blocks of 32 KiB, chunks with a header of
    CRC, length and kind: whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    at, parts = 7, []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))
            parts = []


def test_wandb_offline_runs_hold_every_number(folder: Path, tmp_path: Path) -> None:
    export_paths([folder], "wandb", tmp_path / "out")
    records = list(wandb_records(tmp_path / "out" / "a"))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("clipctl", "a")
    assert json.loads(next(item.value_json for item in run.config.update if item.key == "clip"))["high"] == "Infinity"
    history = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    clock = times(folder)
    rollouts = [row for row in history if "rollouts/entropy" in row]
    assert [row["rollout"] for row in rollouts] == [0, 1]
    assert [row["_timestamp"] for row in rollouts] == pytest.approx(clock, abs=1e-5)
    assert [row["rollouts/reward_mean"] for row in rollouts] == pytest.approx(
        [row["reward_sum"] / row["responses"] for row in map(rollout_row, range(2))]
    )
    updates = sorted((row for row in history if "updates/loss" in row), key=lambda row: row["update"])
    assert [row["update"] for row in updates] == list(range(6))
    assert [row["updates/loss"] for row in updates] == pytest.approx(
        [row["loss"] for rollout in range(2) for row in update_rows(rollout)]
    )
    metrics = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert metrics["updates/*"] == "update"
    assert metrics["rollouts/*"] == metrics["evaluations/*"] == "rollout"
    assert records[-1].WhichOneof("record_type") == "exit"


def test_wandb_sync_takes_them_and_they_tell_nothing_of_the_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_CANARY", "canary-7f3a")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--token=canary-7f3a"])
    export_paths([folder], "wandb", tmp_path / "out")
    (offline,) = (tmp_path / "out" / "a" / "wandb").glob("offline-run-*")
    done = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", "--dry-run", offline],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Would sync 1 run(s)" in done.stdout + done.stderr
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"canary-7f3a" not in file.read_bytes()


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_what_installs_it(
    folder: Path, tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        DependencyError, match=rf"{package} is not installed; pip install 'clipctl\[{kind}\]'"
    ) as caught:
        export_paths([folder], kind, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_what_no_export_made_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(SpecError, match="exists and is no tensorboard export of clipctl"):
        export_paths([folder], "tensorboard", out)
    assert (out / "a" / "thesis.tex").read_text() == "mine"
    shutil.rmtree(out / "a")
    export_paths([folder], "tensorboard", out)
    (first,) = (out / "a").glob("events.*")
    first.write_bytes(b"old")
    export_paths([folder], "tensorboard", out)
    assert [file.read_bytes() != b"old" for file in (out / "a").glob("events.*")] == [True]
    assert sorted(file.name for file in out.iterdir()) == ["a"]
    with pytest.raises(SpecError, match="is no wandb export"), fresh_folder(out / "a", "wandb"):
        pass


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "a", "wandb") as place:
        (place / "x").write_text("1")

    def fail() -> None:
        with fresh_folder(tmp_path / "a", "wandb") as place:
            (place / "x").write_text("2")
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="cannot be written: No space"):
        fail()
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [MARK, "x"]


def test_buckets_adjoin() -> None:
    assert filled_bins([0.5, 0.9, 1.1], [0.8, 1.0, float("inf")], [2, 3, 4]) == (
        [0.5, 0.8, 0.9, 1.0, 1.1, FINITE],
        [0.0, 2.0, 0.0, 3.0, 0.0, 4.0],
    )


def test_wrong_use_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'mlflow' is not one of tensorboard, wandb"):
        export_paths([folder], "mlflow", tmp_path / "out")
    empty = create_run(tmp_path / "fresh", "c", SPEC, "tiny")
    empty._closed.set()
    with pytest.raises(SpecError, match="none of these runs has a rollout yet"):
        export_paths([tmp_path / "fresh"], "tensorboard", tmp_path / "out")


def test_the_command_prints_the_folders(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["analyze", str(folder), "--export", "tensorboard", str(tmp_path / "out")])
    assert done.output == f"{tmp_path / 'out' / 'a'}\n"
