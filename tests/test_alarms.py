"""Alarms as functions of a history, and a run that one of them stops."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipctl import load_spec, open_runs
from clipctl.alarms import RolloutFacts, new_alarms, standing_alarms
from clipctl.errors import AlarmStop
from clipctl.spec import Alarms
from clipctl.train import train

LIMITS = Alarms(window=2, collapse=0.5, explosion=1.5)


def facts(rollout: int, entropy: float | None = 1.0, **changes: Any) -> RolloutFacts:
    given: dict[str, Any] = {
        "groups": 8, "groups_zero_advantage": 4, "clipped": 3, "clippable": True,
        "x_mass": 0.1, "x_pg": 0.2, "x_npg": 0.3, "y_mass": 0.1, "y_pg": 0.2, "y_npg": 0.3,
    }  # fmt: skip
    return RolloutFacts(rollout, entropy, **(given | changes))


def history(*entropies: float | None, **changes: Any) -> list[RolloutFacts]:
    return [facts(at, entropy, **changes) for at, entropy in enumerate(entropies)]


def test_a_quiet_history_has_no_alarm() -> None:
    assert standing_alarms([], LIMITS) == {}
    assert standing_alarms(history(1.0, 0.9, 1.1, 0.51, 1.49), LIMITS) == {}


def test_collapse_and_explosion_need_the_whole_window() -> None:
    assert standing_alarms(history(1.0, 0.8, 0.4), LIMITS) == {}
    assert set(standing_alarms(history(1.0, 0.4, 0.4), LIMITS)) == {"collapse"}
    assert standing_alarms(history(1.0, 0.4, 0.6, 0.4), LIMITS) == {}
    assert set(standing_alarms(history(1.0, 1.6, 1.7), LIMITS)) == {"explosion"}
    assert "0.400 nat, at first 1.000" in standing_alarms(history(1.0, 0.4, 0.4), LIMITS)["collapse"]
    assert standing_alarms(history(1.0, 0.4, None), LIMITS) == {}
    assert set(standing_alarms(history(None, 1.0, 0.4, 0.4), LIMITS)) == {"collapse"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x_pg", "(7) of clip-low"),
        ("y_pg", "(7) of clip-high"),
        ("x_npg", "(8) of clip-low"),
        ("y_npg", "(8) of clip-high"),
    ],
)
def test_an_inequality_fails_when_it_does_so_in_every_rollout_of_the_window(name: str, text: str) -> None:
    failing = history(1.0, 1.0, 1.0, **{name: -0.05})
    assert text in standing_alarms(failing, LIMITS)["inequality"]
    assert "-0.5" in standing_alarms(failing, LIMITS)["inequality"]
    assert standing_alarms([*failing[:2], facts(2)], LIMITS) == {}
    assert standing_alarms(failing[:1], LIMITS) == {}


def test_no_clipping_and_no_advantage_are_told_at_once() -> None:
    assert set(standing_alarms([facts(0, clipped=0)], LIMITS)) == {"no_clipping"}
    assert standing_alarms([facts(0, clipped=0, clippable=False)], LIMITS) == {}
    assert set(standing_alarms([facts(0, groups_zero_advantage=5)], LIMITS)) == {"no_advantage"}


def test_an_alarm_is_told_when_it_begins_and_again_only_after_a_pause() -> None:
    told = [set(new_alarms(history(1.0, 0.4, 0.4, 0.4, 0.9, 0.4, 0.4)[: at + 1], LIMITS)) for at in range(7)]
    assert told == [set(), set(), {"collapse"}, set(), set(), set(), {"collapse"}]


SMALL = {
    "run.steps": 4,
    "rollout.prompts": 4,
    "rollout.group_size": 4,
    "optim.responses_per_update": 16,
    "optim.epochs": 2,
}


def test_a_run_stops_where_it_was_asked_to(tmp_path: Path) -> None:
    """A learning rate that moves nothing: no clipping from the first rollout on."""
    told: list[str] = []
    spec = load_spec("tiny", SMALL | {"run.name": "a", "optim.lr": 1e-12, "run.stop_on": ["no_clipping"]})
    with pytest.raises(AlarmStop, match="no_clipping"):
        train(spec, runs_dir=tmp_path, warn=told.append)
    assert [line for line in told if "no_clipping" in line]
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "stopped"
    assert (tmp_path / "a" / "checkpoints" / "1" / "model.safetensors").is_file()
    with open_runs(tmp_path) as runs:
        query = "select rollout, data->>'alarm' from events where kind = 'alarm' and data->>'alarm' = 'no_clipping'"
        assert runs.sql(query).fetchall() == [(0, "no_clipping")]
        assert runs.sql("select count(*) from rollouts").fetchall() == [(1,)]
        assert runs.sql("select state from runs").fetchall() == [("stopped",)]


def test_an_alarm_that_was_not_asked_to_stop_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    """Through the command line: one line on stderr, exit 0; asked to stop: exit 8."""
    sets = [f"--set={key}={value}" for key, value in (SMALL | {"optim.lr": 1e-12}).items()]
    command = [sys.executable, "-m", "clipctl", "train", "--preset", "tiny", *sets, "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("alarm: no_clipping")]) == 1
    stopped = subprocess.run(
        [*command, '--set=run.stop_on=["no_clipping"]'], capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 8
    assert stopped.stderr.splitlines()[-1].startswith("clipctl: stopped by the alarm no_clipping after rollout 0")


def test_the_noise_floor_is_stored_and_an_epsilon_under_it_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    folder = train(
        load_spec("tiny", SMALL | {"run.steps": 1, "clip.low": 1e-9, "clip.high": 0.2}),
        runs_dir=tmp_path,
        warn=told.append,
    )
    with open_runs(folder) as runs:
        levels = dict(runs.sql("select source, abs_log_ratio from noise where quantile = 0.99").fetchall())
        assert runs.sql("select count(*) from noise").fetchall() == [(22,)]
        events = runs.sql(
            "select data->>'side', data->>'source', (data->>'p99')::double from events where kind = 'noise_floor'"
        ).fetchall()
    assert set(levels) == {"layout", "sampler"}
    assert 0 < levels["sampler"] < 1e-4
    assert ("low", "sampler", levels["sampler"]) in events
    assert not [side for side, *_ in events if side == "high"]
    assert any("clip.low = 1e-09 is under 5 ×" in line for line in told)
