"""Sweeps as a user starts them: what is missing is run and no more, whatever is killed, by however many launches."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipctl import load_spec, open_runs
from clipctl.ends import END, End, closed, write_end
from clipctl.errors import SpecError
from clipctl.shares import Share, divided, machine_gpus, share_machine
from clipctl.spec import spec_json
from clipctl.sweep import _Launch
from clipctl.sweep_folder import CLAIM, open_claim, place_members, planning, record_sweep, retry_hint
from clipctl.sweep_spec import Member, expand, preset_sweep, resolve_sweep
from clipctl.sweep_view import table_lines, views_lines
from clipctl.train import train
from runs import assert_same

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TINY = {"run.steps": 2, "rollout.prompts": 4, "rollout.group_size": 4, "rollout.max_response_tokens": 14,
        "data.arith.problems": 64, "optim.responses_per_update": 8, "optim.lr": 1e-3, "ledger.probe_states": 0,
        "ledger.network_every": 0}  # fmt: skip
"""A run of a second."""
LONGER = TINY | {"run.steps": 6, "rollout.prompts": 8, "optim.epochs": 3}
GRID = ("--grid", "clip.low=0.1,0.2", "--grid", "clip.high=0.1,inf")


def started(
    folder: Path, spec: dict[str, Any], *arguments: str, preset: str = "tiny", environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    sets = [word for key, value in spec.items() for word in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "clipctl", "sweep", "--preset", preset, "--name", "s", *sets, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=ENVIRONMENT | (environment or {}),
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode, errors


def swept(folder: Path, spec: dict[str, Any], *arguments: str, **options: Any) -> str:
    code, errors = ended(started(folder, spec, *arguments, **options))
    assert code == 0, errors
    return errors


def states(folder: Path) -> dict[str, tuple[str, int]]:
    """Run → its state and attempts."""
    found = {}
    for file in sorted(folder.glob("*/status.json")):
        status = json.loads(file.read_text())
        found[file.parent.name] = (status["state"], status["attempt"])
    return found


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with open_runs(folder) as runs:
        return list(runs.sql(query).fetchall())


def wait_until(done: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it never comes"
        time.sleep(0.05)


def members_of(folder: Path) -> list[psutil.Process]:
    """Every process that has to do with the sweeps of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


# --- shares of the machine --------------------------------------------------------------------------------------------


def test_cores_and_gpus_are_divided() -> None:
    assert divided(1, [0, 1, 2], None) == [Share()]
    assert divided(2, [0, 1, 2, 3, 6], None) == [Share((0, 1)), Share((2, 3))]
    assert divided(3, [4, 5], None) == [Share((4,)), Share((5,)), Share((4,))]
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in divided(2, [0, 1], ["0", "1", "2", "3"])] == [
        "0,1",
        "2,3",
    ]
    assert [share.gpus for share in divided(4, [0], ["GPU-a", "GPU-b"])] == [
        ("GPU-a",),
        ("GPU-b",),
        ("GPU-a",),
        ("GPU-b",),
    ]


def test_gpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ["2", "5"]
    with pytest.raises(SpecError, match="no GPU was found"):
        machine_gpus({"CUDA_VISIBLE_DEVICES": ""})


def test_more_threads_than_cores_are_told_and_not_lowered() -> None:
    members = expand(resolve_sweep(preset_sweep("tiny"), {"engine.threads": 1000}, seeds=4))
    _, warnings = share_machine([member.spec.engine for member in members], 2)
    assert warnings[0].startswith("engine.threads = 1000, and each of 2 runs at once has ")
    assert {member.spec.engine.threads for member in members} == {1000}
    assert len(share_machine([members[0].spec.engine], 5)[0]) == 1


def test_what_is_imported_for_all_runs_is_there() -> None:
    """A module that has moved would be imported by each of them again."""
    from importlib.util import find_spec

    from clipctl.fork_server import IMPORTS

    assert [name for name in IMPORTS if find_spec(name) is None] == []


# --- where runs lie ---------------------------------------------------------------------------------------------------


def a_run(folder: Path, member: Member, state: str, rollouts: int) -> None:
    """A run's folder as the store has it, without its numbers."""
    folder.mkdir(parents=True)
    (folder / "journal").mkdir()
    (folder / "spec.json").write_text(spec_json(member.spec))
    now = "2026-01-01T00:00:00+00:00"
    (folder / "status.json").write_text(json.dumps({
        "state": state, "rollouts": rollouts, "attempt": 0, "created_at": now, "finished_at": now, "heartbeat": now,
        "resumes": [], "message": "why", "schema_version": 1, "pid": 1, "host": "elsewhere",
    }))  # fmt: skip


def test_what_is_left_to_do_is_read_from_status_files(tmp_path: Path) -> None:
    members = expand(resolve_sweep(preset_sweep("tiny"), seeds=7))
    for member, state, done in zip(members[1:], ("finished", "interrupted", "running", "diverged", "stopped", "finished"),
                                   (40, 7, 3, 2, 5, 39), strict=True):  # fmt: skip
        a_run(tmp_path / "s" / member.name, member, state, done)
    placed = place_members(tmp_path, "s", members)
    assert [place.outlook for place in placed] == [
        "missing", "finished", "unfinished", "unfinished", "failed", "stopped", "unfinished",
    ]  # fmt: skip
    lines = table_lines(placed)
    assert lines[0].split() == ["run", "seed", "rollouts", "to", "do"]
    assert [line.split()[2] for line in lines[1:]] == ["0/40", "40/40", "7/40", "3/40", "2/40", "5/40", "39/40"]
    assert [line.split(maxsplit=3)[3] for line in lines[1:]] == [
        "run it", "nothing: finished", "go on", "go on", "nothing without --retry-failed: failed",
        "nothing: stopped by an alarm", "go on",
    ]  # fmt: skip


def test_another_spec_under_a_sweeps_name_is_refused_with_its_difference(tmp_path: Path) -> None:
    a_run(tmp_path / "s" / "tiny-0", expand(resolve_sweep(preset_sweep("tiny")))[0], "finished", 40)
    longer = expand(resolve_sweep(preset_sweep("tiny"), {"run.steps": 50, "eval.k": 4}))
    assert place_members(tmp_path, "s", longer)[0].outlook == "unfinished"
    other = expand(resolve_sweep(preset_sweep("tiny"), {"optim.lr": 2e-4}))
    with pytest.raises(SpecError, match=r"s/tiny-0 was begun with another spec: optim.lr = 0.0001, now 0.0002; only"):
        place_members(tmp_path, "s", other)
    evaluated = expand(resolve_sweep(preset_sweep("tiny"), {"eval.k": 4}))
    with pytest.raises(
        SpecError, match=r"s/tiny-0 is finished, with another evaluation: eval.k = \d+, now 4; .* clipctl eval"
    ):
        place_members(tmp_path, "s", evaluated)
    assert place_members(tmp_path, "s", expand(resolve_sweep(preset_sweep("tiny"), {"checkpoint.every": 1})))


def test_what_failed_while_a_launch_waited_for_it_is_not_tried_again(tmp_path: Path) -> None:
    (member,) = expand(resolve_sweep(preset_sweep("tiny")))
    a_run(tmp_path / "s" / "tiny-0", member, "failed", 3)
    placed = place_members(tmp_path, "s", [member])
    assert table_lines(placed, retry_failed=True)[1].endswith("run it again: failed")
    said: list[str] = []
    launch = _Launch(tmp_path / "s", list(placed), [], (), True, said.append)
    assert not launch._is_done(placed[0])
    file = tmp_path / "s" / "tiny-0" / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attempt": 1}))
    assert launch._is_done(placed[0])
    assert said == ["tiny-0: failed before: why"]
    assert launch.progress.failed == ["tiny-0"]
    # The same of one that never came to an attempt.
    (placed[0].folder / "status.json").unlink()
    write_end(placed[0].folder, closed(End(member.identity), 2, "no", -1))
    launch = _Launch(tmp_path / "s", list(placed), [], (), True, said.append)
    assert not launch._is_done(placed[0])
    write_end(placed[0].folder, closed(End(member.identity), 2, "no", -1))
    assert launch._is_done(placed[0])
    assert said[1:] == ["tiny-0: failed before: exit code 2: no"]


def test_a_failure_that_is_recorded_is_that_of_the_last_command_on_this_run(tmp_path: Path) -> None:
    """Not of a run with another spec, nor of one that was begun again, or finished, since."""
    one, other = expand(resolve_sweep(preset_sweep("tiny"), seeds=2))
    folder = tmp_path / "s" / "tiny-0"
    (placed,) = place_members(tmp_path, "s", [one])
    assert (placed.outlook, placed.failure) == ("missing", None)
    write_end(folder, closed(End(one.identity), 4, "clipctl: no model", -1))
    assert (placed.outlook, placed.message) == ("failed", "exit code 4: no model")
    write_end(folder, closed(End(other.identity), 4, "clipctl: no model", -1))
    assert placed.outlook == "missing"
    for code, outlook in ((0, "missing"), (8, "missing"), (75, "missing"), (130, "missing"), (-9, "failed")):
        write_end(folder, closed(End(one.identity), code, "", -1))
        assert placed.outlook == outlook
    assert placed.message == "killed by SIGKILL: it said nothing"
    a_run(tmp_path / "t" / "tiny-0", one, "running", 3)
    (begun,) = place_members(tmp_path, "t", [one])
    write_end(begun.folder, closed(End(one.identity), -9, "rollout 3", -1))
    assert begun.outlook == "unfinished"
    write_end(begun.folder, closed(End(one.identity), -9, "rollout 3", 0))
    assert (begun.outlook, begun.message) == ("failed", "killed by SIGKILL: rollout 3")
    for damaged in ("", "[]", '{"identity": 3}', '{"code": "x"}'):
        (begun.folder / END).write_text(damaged)
        assert begun.outlook == "unfinished"


def test_the_table_of_a_sweep_that_this_process_may_not_write(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (member,) = expand(resolve_sweep(preset_sweep("tiny")))
        a_run(disk / "s" / "tiny-0", member, "interrupted", 3)
        (disk / "s" / "tiny-0" / ".lock").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert table_lines(place_members(disk, "s", [member]))[1].endswith("3/40      go on")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_is_there_is_referred_to(tmp_path: Path) -> None:
    """That of another sweep, begun or only planned, and a finished one of `clipctl train`; never one that failed there."""
    members = expand(resolve_sweep(preset_sweep("tiny"), seeds=4))
    sweep = resolve_sweep(preset_sweep("tiny"), seeds=2)
    with planning(tmp_path):
        record_sweep(tmp_path, "first", sweep, place_members(tmp_path, "first", members[:2]))
    a_run(tmp_path / "first" / "tiny-1", members[1], "interrupted", 9)
    a_run(tmp_path / "by-hand", members[2], "finished", 40)
    a_run(tmp_path / "by-hand-too", members[3], "failed", 4)
    with planning(tmp_path):
        placed = place_members(tmp_path, "s", members)
        folder = record_sweep(tmp_path, "s", sweep, placed)
    lie = [
        tmp_path / "first" / "tiny-0",
        tmp_path / "first" / "tiny-1",
        tmp_path / "by-hand",
        tmp_path / "s" / "tiny-3",
    ]
    assert [place.folder for place in placed] == lie
    assert [place.outlook for place in placed] == ["missing", "unfinished", "finished", "missing"]
    assert [os.readlink(folder / f"tiny-{seed}") for seed in range(3)] == [
        "../first/tiny-0",
        "../first/tiny-1",
        "../by-hand",
    ]
    assert placed[2].command[-4:] == ("--name", "by-hand", "--runs-dir", str(tmp_path))
    # A run that has become another one since is not: the sweep gets one of its own, in place of the link.
    (tmp_path / "by-hand" / "spec.json").write_text(spec_json(load_spec("tiny", {"run.seed": 2, "run.steps": 90})))
    with planning(tmp_path):
        placed = place_members(tmp_path, "s", members)
        record_sweep(tmp_path, "s", sweep, placed)
    assert placed[2].folder == tmp_path / "s" / "tiny-2"
    assert not (folder / "tiny-2").is_symlink()
    assert rows_of_record(folder) == {
        "tiny-0": "../first/tiny-0",
        "tiny-1": "../first/tiny-1",
        "tiny-2": "tiny-2",
        "tiny-3": "tiny-3",
    }


@pytest.mark.parametrize("name", ["../s", "-s", "a b", "s/t", ""])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not allowed"):
        place_members(tmp_path, name, expand(resolve_sweep(preset_sweep("tiny"))))


def test_a_sweep_is_no_run(tmp_path: Path) -> None:
    members = expand(resolve_sweep(preset_sweep("tiny")))
    a_run(tmp_path / "s", members[0], "finished", 40)
    with pytest.raises(SpecError, match="s is a run; choose another --name for the sweep"):
        place_members(tmp_path, "s", members)


def rows_of_record(folder: Path) -> dict[str, str]:
    return {run["name"]: run["folder"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}


def test_other_names_within_a_sweep_are_the_same_runs(tmp_path: Path) -> None:
    """A key more, whose first value is the default: what was run before is not run again."""
    one = resolve_sweep(preset_sweep("tiny"), grid={"clip.low": [0.1, 0.2]})
    for member in expand(one):
        a_run(tmp_path / "s" / member.name, member, "finished", 40)
    more = expand(resolve_sweep(preset_sweep("tiny"), grid={"clip.low": [0.1, 0.2], "clip.high": [0.1, 0.3]}))
    with planning(tmp_path):
        placed = place_members(tmp_path, "s", more)
        record_sweep(tmp_path, "s", one, placed)
    assert [place.folder.name for place in placed] == ["low0.1-0", "low0.1-high0.3-0", "low0.2-0", "low0.2-high0.3-0"]
    assert not [entry for entry in (tmp_path / "s").iterdir() if entry.is_symlink()]


def test_runs_are_found_under_the_names_that_they_had(tmp_path: Path) -> None:
    """A value more that looks like the first one gives both a hash; a name that is too long was cut once."""
    one = expand(resolve_sweep(preset_sweep("tiny"), grid={"clip.low": [0.1234567]}))
    a_run(tmp_path / "s" / one[0].name, one[0], "finished", 40)
    long = {"data.path": ["x" * 100]}
    (cut,) = expand(resolve_sweep(preset_sweep("tiny"), grid=long))
    a_run(tmp_path / "t" / f"path{'x' * 76}-0", cut, "finished", 40)
    sweep = resolve_sweep(preset_sweep("tiny"), grid={"clip.low": [0.1234567, 0.1234568]})
    with planning(tmp_path):
        placed = place_members(tmp_path, "s", expand(sweep))
        record_sweep(tmp_path, "s", sweep, placed)
    assert [place.outlook for place in placed] == ["finished", "missing"]
    assert placed[0].folder.name == "low0.123457-0"
    assert placed[1].folder.name == placed[1].member.name != "low0.123457-0"
    (found,) = place_members(tmp_path, "t", [cut])
    assert (found.outlook, found.folder.name, cut.name[:8]) == ("finished", f"path{'x' * 76}-0", "pathxxxx")
    assert cut.name != found.folder.name


def test_a_run_is_claimed_by_one(tmp_path: Path) -> None:
    claim = open_claim(tmp_path / "run")
    assert claim is not None
    assert open_claim(tmp_path / "run") is None
    claim.close()
    again = open_claim(tmp_path / "run")
    assert again is not None
    again.close()
    assert (tmp_path / "run" / CLAIM).exists()
    # One that a process outside of any sweep runs is not to be had either.
    with (tmp_path / "run" / ".lock").open("a") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        assert open_claim(tmp_path / "run") is None


def test_a_run_of_another_machine_is_left_alone_while_its_heart_beats(tmp_path: Path) -> None:
    """Whose lock may not be seen here."""
    (member,) = expand(resolve_sweep(preset_sweep("tiny")))
    a_run(tmp_path / "run", member, "running", 3)
    file = tmp_path / "run" / "status.json"
    stale = file.read_text()
    file.write_text(stale.replace("2026-01-01T00:00:00+00:00", datetime.now(UTC).isoformat()))
    assert open_claim(tmp_path / "run") is None
    file.write_text(stale)
    claim = open_claim(tmp_path / "run")
    assert claim is not None
    claim.close()


def test_the_commands_that_draw_it() -> None:
    sweep = resolve_sweep(preset_sweep("fig6"))
    assert views_lines(sweep, Path("runs/fig6")) == [
        "clipctl analyze runs/fig6 --view passk --by model.path --by clip.low --by clip.high --plot fig6.png",
        "clipctl analyze runs/fig6 --view frontier --by model.path --by clip.low --by clip.high --plot fig6-frontier.png",
    ]
    # The paper's Fig. 7 has mean@32 and pass@32 on AMC23 and MATH-500, Fig. 10 of the same runs mean@8 and pass@8 on AIME.
    assert views_lines(resolve_sweep(preset_sweep("fig7")), Path("runs/fig7")) == [
        "clipctl analyze runs/fig7 --view passk --by clip.low --by clip.high "
        "--benchmark amc23 --benchmark math500 --k 32 --plot fig7.png"
    ]
    assert views_lines(resolve_sweep(preset_sweep("fig10")), Path("runs/fig10")) == [
        "clipctl analyze runs/fig10 --view passk --by clip.low --by clip.high "
        "--benchmark aime24 --benchmark aime25 --k 8 --plot fig10.png"
    ]
    assert views_lines(resolve_sweep(preset_sweep("fig1")), Path("runs/fig1")) == [
        "clipctl analyze runs/fig1 --view ledger --by model.path --rollouts --plot fig1.png"
    ]


def test_dry_runs_start_nothing(tmp_path: Path) -> None:
    process = started(tmp_path, {}, "--dry-run", preset="fig7")
    table, _ = process.communicate()
    assert process.returncode == 0
    assert table.count("run it") == 4
    assert list(tmp_path.iterdir()) == []


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_no_more(tmp_path: Path) -> None:
    errors = swept(tmp_path, TINY, *GRID, "--jobs", "2")
    folder = tmp_path / "runs" / "s"
    assert set(states(folder).values()) == {("finished", 0)}
    assert len(states(folder)) == 4
    assert errors.count(": starts") == errors.count(": finished, 2 rollouts, ") == 4
    # A member is the run that `clipctl train` makes.
    alone = train(load_spec("tiny", TINY | {"run.name": "alone", "clip.high": float("inf")}), runs_dir=tmp_path)
    assert_same(folder / "low0.1-highinf-0", alone, 2)
    # A value more, and a longer run.
    more = swept(
        tmp_path,
        TINY | {"run.steps": 3},
        "--grid",
        "clip.low=0.1,0.2,0.3",
        "--grid",
        "clip.high=0.1,inf",
        "--jobs",
        "3",
    )
    assert more.count(": starts") == 2
    assert more.count(": goes on from rollout 2") == 4
    assert "starts" not in swept(tmp_path, TINY | {"run.steps": 3}, *GRID)
    counts = rows(folder, "select run_id, count(*) from rollouts group by 1")
    assert [count for _, count in counts] == [3] * 6


@pytest.mark.slow
def test_random_streams_are_paired_across_arms(tmp_path: Path) -> None:
    """The same prompts and random rewards in every rollout, and, while the policies are one, the same samples."""
    swept(tmp_path, TINY | {"optim.epochs": 4}, *GRID, "--seeds", "2", "--jobs", "2", preset="tiny-random")
    folder = tmp_path / "runs" / "s"
    seen: dict[int, set[str]] = {}
    for run_id, seed in rows(folder, "select run_id, seed from runs"):
        drawn = rows(
            folder,
            f"select rollout, position, sample, prompt_id, reward from samples where run_id = '{run_id}' order by all",
        )
        texts = rows(
            folder, f"select position, sample, text from texts where run_id = '{run_id}' and rollout = 0 order by all"
        )
        seen.setdefault(seed, set()).add(json.dumps([drawn, texts]))
    assert [len(arms) for arms in seen.values()] == [1, 1]
    assert seen[0] != seen[1]
    (ends,) = rows(folder, "select count(distinct entropy) from rollouts where rollout = 1")
    assert ends[0] > 2, "the arms do differ"


@pytest.mark.slow
def test_a_run_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    grid = ("--grid", "optim.lr=1e-3,1e38", "--seeds", "2")
    code, errors = ended(started(tmp_path, _without_lr(), *grid))
    assert code == 9, errors
    folder = tmp_path / "runs" / "s"
    assert [state for state, _ in states(folder).values()] == ["finished", "finished", "diverged", "diverged"]
    last = errors.strip().splitlines()[-1]
    assert last.startswith(
        "clipctl: 2 of 4 runs failed: lr1e38-0, lr1e38-1; see runs/s/logs; --retry-failed runs them again"
    )
    assert "lr1e38-0: failed (exit code 5): " in errors
    # The same command again has nothing to do and says so.
    code, errors = ended(started(tmp_path, _without_lr(), *grid))
    assert (code, errors.count(": failed before: "), "starts" in errors) == (9, 2, False)
    code, errors = ended(started(tmp_path, _without_lr(), *grid, "--retry-failed"))
    assert (code, errors.count("failed (exit code 5)")) == (9, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [({"model.path": "nomodel"}, 4, "model.path: "), ({"data.task": "nope"}, 2, "data.task: ")],
)
def test_a_run_that_fails_before_it_has_a_status_is_tried_again_when_that_is_asked_for(
    tmp_path: Path, spec: dict[str, Any], code: int, words: str
) -> None:
    grid = ("--seeds", "2")
    returned, errors = ended(started(tmp_path, TINY | spec, *grid))
    assert (returned, errors.count(f": failed (exit code {code}): {words}")) == (9, 2), errors
    assert states(tmp_path / "runs" / "s") == {}
    table, _ = started(tmp_path, TINY | spec, *grid, "--dry-run").communicate()
    assert table.count("nothing without --retry-failed: failed") == 2
    returned, errors = ended(started(tmp_path, TINY | spec, *grid))
    assert (returned, "starts" in errors) == (9, False), errors
    assert errors.count(f": failed before: exit code {code}: {words}") == 2
    returned, errors = ended(started(tmp_path, TINY | spec, *grid, "--retry-failed"))
    assert (returned, errors.count(": starts")) == (9, 2), errors
    # The run of that name that the user meant is another one, and what failed says nothing of it.
    swept(tmp_path, TINY, *grid)
    assert set(states(tmp_path / "runs" / "s").values()) == {("finished", 0)}


def test_what_is_damaged_is_not_mended_by_a_retry(tmp_path: Path) -> None:
    members = expand(resolve_sweep(preset_sweep("tiny"), seeds=3))
    placed = place_members(tmp_path, "s", members)
    for place, code in zip(placed, (7, 4, -9), strict=True):
        write_end(place.folder, closed(End(place.member.identity), code, "clipctl: no", -1))
    names = [place.member.name for place in placed]
    assert retry_hint(placed, names, "runs them again") == (
        "--retry-failed runs them again, but tiny-0 only when what its line names is mended, or the run's folder removed to "
        "start it anew"
    )
    assert retry_hint(placed, names[1:], "submits them again") == "--retry-failed submits them again"


@pytest.mark.slow
def test_a_damaged_store_in_a_sweep_and_what_the_sweep_says_of_it(tmp_path: Path) -> None:
    """Its hint is what helps."""
    swept(tmp_path, TINY)
    run = tmp_path / "runs" / "s" / "tiny-0"
    (run / "metrics.duckdb").write_bytes(b"x" * 5000)
    more = TINY | {"run.steps": 3}
    for words in ((), ("--retry-failed",)):
        code, errors = ended(started(tmp_path, more, *words))
        assert (code, errors.count("metrics.duckdb cannot be gone on with")) == (9, 1), errors
        assert errors.strip().endswith(
            "--retry-failed runs them again, but tiny-0 only when what its line names is mended, or the run's folder removed "
            "to start it anew"
        )
    shutil.rmtree(run)
    swept(tmp_path, more)
    assert states(tmp_path / "runs" / "s")["tiny-0"] == ("finished", 0)


@pytest.mark.slow
def test_a_run_with_a_damaged_status_is_gone_on_with(tmp_path: Path) -> None:
    """Its process waits for half a minute for a heartbeat."""
    swept(tmp_path, TINY, "--seeds", "2")
    folder = tmp_path / "runs" / "s"
    (folder / "tiny-1" / "status.json").write_text('{"state": "fin')
    errors = swept(tmp_path, TINY, "--seeds", "2")
    assert "tiny-1  1     2/2       go on: status.json is damaged" in errors
    assert "tiny-1: goes on from rollout 2" in errors
    assert states(folder) == {"tiny-0": ("finished", 0), "tiny-1": ("finished", 1)}
    assert rows(folder, "select run_id, rollout from rollouts order by all") == [
        ("tiny-0", 0), ("tiny-0", 1), ("tiny-1", 0), ("tiny-1", 1),
    ]  # fmt: skip
    assert (
        "tiny-1: status.json is damaged; it is made again of what is stored: 1 attempt, 2 rollouts; lost is when "
        in (folder / "logs" / "tiny-1.txt").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("room", [40, 120])
def test_a_sweep_on_a_full_disk_ends_with_its_code(tmp_path: Path, room: int) -> None:
    """room: kB. With the smaller one not even a log's line fits. No further run is started, and with space all are run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={200 + room}k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (disk / "others").write_bytes(bytes(200 << 10))
        code, errors = ended(started(disk, TINY, "--seeds", "3"))
        assert code == 7, errors
        assert errors.count(": starts") == errors.count("tiny-0: failed (exit code 7): ") == 1
        assert errors.splitlines()[-1] == (
            "clipctl: runs/s: no space is left on the disk (0.0 MB are free) for tiny-0; 0 of 3 runs ended, 1 failed, "
            "2 waiting; free some, then the same command with --retry-failed goes on"
        )
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        swept(disk, TINY, "--seeds", "3", "--retry-failed")
        assert {state for state, _ in states(disk / "runs" / "s").values()} == {"finished"}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _without_lr() -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key != "optim.lr"}


@pytest.mark.slow
def test_sweeps_share_runs(tmp_path: Path) -> None:
    swept(tmp_path, TINY, "--grid", "clip.low=0.1,0.2")
    process = started(tmp_path, TINY, "--grid", "clip.low=0.2,0.3", "--name", "other")
    code, errors = ended(process)
    assert code == 0
    assert errors.count(": starts") == 1
    assert "nothing: finished, as runs/s/low0.2-0" in errors
    assert rows(tmp_path / "runs" / "other", "select run_id from runs order by all") == [("low0.2-0",), ("low0.3-0",)]
    assert len(rows(tmp_path / "runs", "select run_id from runs")) == 3
    assert ended(started(tmp_path, TINY, "--grid", "clip.low=0.3", "--name", "third"))[0] == 0
    assert rows(tmp_path / "runs" / "third", "select run_id, problem from runs") == [("low0.3-0", None)]


@pytest.mark.slow
def test_small_figures_run_and_are_drawn(tmp_path: Path) -> None:
    """Smaller still: one seed, two rollouts; then the commands that they say."""
    spec = {"run.steps": 2, "rollout.prompts": 8, "data.arith.problems": 64, "optim.epochs": 2, "eval.limit": 4}
    begun = 0
    for figure, arms in {"fig1-small": 1, "fig3-small": 8, "fig4-right-small": 4, "fig6-small": 4}.items():
        process = started(tmp_path, spec, "--seeds", "1", "--jobs", "2", "--name", figure, preset=figure)
        code, errors = ended(process)
        assert code == 0, errors
        begun += errors.count(": starts")
        assert len(list((tmp_path / "runs" / figure).glob("*/spec.json"))) == arms
        commands = [line.removeprefix("draw it: ") for line in errors.splitlines() if line.startswith("draw it: ")]
        assert commands
        for command in commands:
            words = [sys.executable, "-m", *command.split()]
            drawn = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
            assert drawn.returncode == 0, drawn.stderr
            assert (tmp_path / words[-1]).stat().st_size > 10_000
    assert begun == 15, "three figures share the run with both clips at 0.1 under coin flips"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_lets_every_run_save(tmp_path: Path, number: int, code: int) -> None:
    process = started(tmp_path, LONGER | {"run.steps": 40}, *GRID, "--jobs", "2")
    folder = tmp_path / "runs" / "s"
    wait_until(lambda: sum(1 for _ in folder.glob("*/journal/rollouts-*")) > 2)
    process.send_signal(number)
    returned, errors = ended(process)
    assert returned == code, errors
    assert members_of(tmp_path) == []
    assert [state for state, _ in states(folder).values()] == ["interrupted", "interrupted"]
    assert errors.count(": interrupted: stopped by ") == 2
    assert errors.splitlines()[-1].endswith("0 of 4 runs ended, 2 interrupted, 2 waiting; the same command goes on")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 2.5])
def test_a_signal_before_the_runs_have_begun(tmp_path: Path, seconds: float) -> None:
    """While everything is imported, or a run has just been forked."""
    process = started(tmp_path, LONGER | {"run.steps": 400}, *GRID, "--jobs", "2")
    wait_until(lambda: (tmp_path / "runs" / "s" / "logs").exists())
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    returned, errors = ended(process)
    assert returned == 130, errors
    assert members_of(tmp_path) == []


@pytest.mark.slow
def test_the_end_of_a_slurm_job_is_told_to_the_runs_once(tmp_path: Path) -> None:
    """A sweep inside of a job: its runs save in the middle of a rollout, for which a second notice would leave no time."""
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 90)}
    margin = {"checkpoint.margin": 60.0, "run.steps": 4000}
    process = started(tmp_path, LONGER | margin, "--seeds", "2", "--jobs", "2", environment=end)
    returned, errors = ended(process)
    assert returned == 75, errors
    assert "the job's time is nearly over: 2 runs save and stop" in errors
    assert errors.count(": interrupted: stopped by SIGTERM; ") == 2
    assert {state for state, _ in states(tmp_path / "runs" / "s").values()} == {"interrupted"}


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process(tmp_path: Path) -> None:
    process = started(tmp_path, LONGER | {"run.steps": 400, "reward.kind": "math"}, *GRID, "--jobs", "2")
    folder = tmp_path / "runs" / "s"
    wait_until(lambda: any(folder.glob("*/journal/rollouts-*")))
    assert len(members_of(tmp_path)) >= 4
    process.kill()
    process.communicate()
    wait_until(lambda: not members_of(tmp_path), 10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    swept(folder, LONGER, *GRID, "--seeds", "3", "--jobs", "2")
    return folder / "runs" / "s"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("undisturbed sweep")
def test_twelve_runs_under_random_kills(tmp_path: Path, undisturbed: Path) -> None:
    """Every few seconds a process of the sweep is killed: itself, its server, or one of its runs."""
    rng, kills, launches = random.Random(time.time_ns()), 0, 0
    while launches < 200:
        launches += 1
        process = started(tmp_path, LONGER, *GRID, "--seeds", "3", "--jobs", "2")
        while process.poll() is None:
            # The times grow, or a busy machine would never get anywhere.
            until = time.monotonic() + rng.uniform(1.0, 5.0) * 1.1**kills
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            alive = members_of(tmp_path)
            if process.poll() is None and alive and kills < 15:
                rng.choice(alive).kill()
                kills += 1
        if ended(process)[0] == 0:
            break
        assert process.returncode in (9, -signal.SIGKILL)
    print(f"\n{kills} kills, {launches} launches")
    assert kills >= 3
    assert members_of(tmp_path) == []
    folder = tmp_path / "runs" / "s"
    assert {state for state, _ in states(folder).values()} == {"finished"}
    assert states(folder).keys() == states(undisturbed).keys()
    assert len(states(folder)) == 12
    for name in states(folder):
        assert_same(folder / name, undisturbed / name, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("undisturbed sweep")
def test_two_launches_at_once_run_each_run_once(tmp_path: Path, undisturbed: Path) -> None:
    launches = [started(tmp_path, LONGER, *GRID, "--seeds", "3", "--jobs", "2") for _ in range(2)]
    results = [ended(launch) for launch in launches]
    assert [code for code, _ in results] == [0, 0], results
    folder = tmp_path / "runs" / "s"
    # Each was begun once, by one of the two, and never a second time.
    assert set(states(folder).values()) == {("finished", 0)}
    begun = [
        sorted(line.split(":")[0] for line in errors.splitlines() if line.endswith(": starts")) for _, errors in results
    ]
    assert sorted(begun[0] + begun[1]) == sorted(states(undisturbed))
    assert all(begun), "both did some of the work"
    for name in states(folder):
        assert_same(folder / name, undisturbed / name, 6)


def test_a_longer_run_keeps_its_folder_when_another_one_would_have_its_name(tmp_path: Path) -> None:
    """`low0.123457-0` has that name no more once 0.1234568 is swept too."""
    sweep = resolve_sweep({"base": ["tiny"], "set": TINY, "grid": {"clip.low": [0.1234567]}})
    (alone,) = place_members(tmp_path, "s", expand(sweep))
    named = alone.member.spec.run.model_copy(update={"name": "low0.123457-0"})
    train(alone.member.spec.model_copy(update={"run": named}), runs_dir=tmp_path / "s", warn=lambda line: None)
    both = {"base": ["tiny"], "set": TINY | {"run.steps": 4}, "grid": {"clip.low": [0.1234567, 0.1234568]}}
    longer, new = place_members(tmp_path, "s", expand(resolve_sweep(both)))
    assert (longer.folder, longer.outlook) == (alone.folder, "unfinished")
    assert (new.folder.name, new.outlook) == (new.member.name, "missing")


@pytest.mark.parametrize(
    "damage", ['{"runs": null}', '{"runs": [{"name": 1, "identity": "x", "folder": null}]}', "[", "3"]
)
def test_a_damaged_record_or_status_of_another_run_is_in_nobodys_way(tmp_path: Path, damage: str) -> None:
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "sweep.json").write_text(damage)
    (tmp_path / "other" / "a" / "spec.json").write_text(spec_json(load_spec("tiny", TINY)))
    (tmp_path / "other" / "a" / "status.json").write_text('{"schema_version": 3, "kind": "run", "state": "finished"}')
    (placed,) = place_members(tmp_path, "s", expand(resolve_sweep({"base": ["tiny"], "set": TINY})))
    assert (placed.folder.parent.name, placed.outlook) == ("s", "missing")
