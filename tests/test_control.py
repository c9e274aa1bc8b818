"""The controller: directions, bounds and anti-windup by hand, a simulated plant, and a run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipctl import load_spec, open_runs
from clipctl.analysis import Options
from clipctl.analysis.what_if import what_if_view
from clipctl.control import ControlState, held, next_action, start_control, total_pull
from clipctl.errors import SpecError
from clipctl.records import Group
from clipctl.spec import Control
from clipctl.train import train
from clipctl.whatif import profile_edges


def profile(pull: float = 1.0) -> dict[str, Any]:
    """Tokens on both sides of 1 with either sign of A: clip-low takes away downward pull, clip-high upward pull, the more
    the nearer ε is to 0."""
    low, high = profile_edges(0.2, 0.2)
    edges = np.array([0.0, *low, *high, math.inf])
    size = len(edges) - 1
    below, above = edges[1:] <= 1.0, edges[:-1] >= 1.0
    density = np.exp(-4 * np.abs(np.log(np.clip((edges[:-1] + np.minimum(edges[1:], 20)) / 2, 1e-3, 20))))
    return {
        "advantage_sign": np.repeat([-1, 1], size),
        "ratio_from": np.tile(edges[:-1], 2),
        "ratio_to": np.tile(edges[1:], 2),
        "tokens": np.tile(np.round(100 * density), 2).astype(int),
        "pg": pull * np.concatenate([density * below, density * above]),
        "npg": np.zeros(2 * size),
    }


LOW = Control(target_entropy=0.5, actuator="eps_low", bounds=(0.02, 0.8))
HIGH = Control(target_entropy=0.5, actuator="eps_high", bounds=(0.02, 2.0))


def act(control: Control, entropy: float, eps: float = 0.2, **state: Any) -> tuple[ControlState, Any]:
    return next_action(ControlState(0.5, math.log(eps), (0.0,), **state), control, entropy, profile(), 0.2)


def test_each_epsilon_moves_to_where_its_clip_raises_or_lowers_entropy() -> None:
    assert act(LOW, 0.48)[1].eps < 0.2 < act(LOW, 0.52)[1].eps
    assert act(HIGH, 0.52)[1].eps < 0.2 < act(HIGH, 0.48)[1].eps
    assert act(LOW, 0.5)[1].eps == pytest.approx(0.2)


@pytest.mark.parametrize("control", [LOW, HIGH])
def test_the_epsilon_has_the_pull_that_was_asked_for(control: Control) -> None:
    """At an error of -4 % and gain 5, a fifth of the way from the baseline's pull to the largest within bounds."""
    eps = act(control, 0.48)[1].eps
    pulls = {at: total_pull(profile(), control.actuator, at, 0.2) for at in (0.2, eps, *control.bounds)}
    most = pulls[control.bounds[0] if control is LOW else control.bounds[1]]
    asked = pulls[0.2] + 0.2 * (most - pulls[0.2])
    assert pulls[eps] >= asked
    assert pulls[eps] == pytest.approx(asked, abs=0.04 * abs(most - pulls[0.2]))


def test_the_baseline_integrates_in_log_epsilon_and_stops_at_a_bound() -> None:
    after, action = act(LOW, 0.52)
    assert after.log_eps == pytest.approx(math.log(0.2) + 0.3 * 0.04)
    assert act(HIGH, 0.52)[0].log_eps == pytest.approx(math.log(0.2) - 0.3 * 0.04)
    assert not action.data["at_limit"]
    stuck, action = act(LOW, 0.9)
    assert action.eps == pytest.approx(0.8)
    assert action.data["at_limit"]
    assert stuck.log_eps == math.log(0.2)
    assert stuck.at_limit == 1
    free, action = act(LOW, 0.48, eps=0.8)
    assert free.log_eps < math.log(0.8)
    assert not action.data["at_limit"]


def test_the_baseline_never_leaves_the_bounds() -> None:
    state = ControlState(0.5, math.log(0.79), (0.0,))
    for _ in range(50):
        state, action = next_action(state, LOW, 0.505, profile(), 0.2)
        assert 0.02 <= action.eps <= 0.8 * (1 + 1e-9)
    assert state.log_eps <= math.log(0.8)


def test_a_target_that_stays_away_is_told_every_five_rollouts() -> None:
    state, told = ControlState(0.5, math.log(0.2), (0.8,)), []
    for entropy in np.linspace(0.9, 0.85, 11):
        state, action = next_action(state, LOW, float(entropy), profile(), 0.2)
        told.append(action.stuck)
    assert [at for at, line in enumerate(told) if line] == [4, 9]
    assert "for 5 rollouts eps_low has had the smallest pull within its bounds (now 0.8)" in told[4]
    assert "+76 % off, at the pace of the last 5 rollouts it needs" in told[4]
    assert held(state) == (pytest.approx(0.4 / 0.5 - 0.05 / 0.5 * 0.5, abs=0.03), False)


@pytest.mark.parametrize("control", [LOW, HIGH])
@pytest.mark.parametrize(("start", "drift"), [(0.4, -0.002), (0.62, 0.003), (0.5, -0.004)])
def test_an_integrating_plant_with_a_drift_of_its_own_is_held(control: Control, start: float, drift: float) -> None:
    """Entropy adds up what ε does and a drift that no profile knows; noise of 1 % on what is measured."""
    rng = np.random.default_rng(0)
    state, entropy, seen = start_control(control, 0.2, start), start, []
    neutral = total_pull(profile(), control.actuator, 0.2, 0.2)
    for _ in range(120):
        state, action = next_action(state, control, entropy * (1 + 0.01 * rng.normal()), profile(), 0.2)
        entropy += drift + 0.01 * (total_pull(profile(), control.actuator, action.eps, 0.2) - neutral)
        seen.append(entropy)
    assert max(abs(value - 0.5) for value in seen[60:]) < 0.05
    assert abs(np.mean(seen[60:]) - 0.5) < 0.015


def test_initial_is_the_first_rollouts_entropy() -> None:
    assert start_control(Control(target_entropy="initial"), 0.2, 0.37) == ControlState(0.37, math.log(0.2), (0.0,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"control.target_entropy": 0.4, "clip.low": 1.0}, r"clip.low = 1.0 is where control begins"),
        (
            {"control.target_entropy": 0.4, "control.actuator": "eps_high", "clip.high": math.inf},
            "clip.high = inf is where",
        ),
        ({"control.target_entropy": 0.4, "control.bounds": [0.5, 0.1]}, "two ascending numbers"),
        ({"control.target_entropy": 0.4, "control.bounds": [0.1, 1.5]}, "for eps_low up to 1"),
        ({"control.target_entropy": -1.0}, "control.target_entropy"),
        ({"control.target_entropy": "start"}, "control.target_entropy"),
        (
            {"control.target_entropy": 0.4, "optim.responses_per_update": 512, "optim.epochs": 1},
            "no ε controls anything",
        ),
    ],
)
def test_impossible_control_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec("tiny", overrides)


SMALL = {
    "run.steps": 4,
    "rollout.prompts": 8,
    "rollout.group_size": 4,
    "optim.responses_per_update": 8,
    "optim.lr": 3e-4,
}


def test_every_action_is_an_event_and_is_what_the_updates_used(tmp_path: Path) -> None:
    folder = train(
        load_spec("tiny", SMALL | {"control.target_entropy": "initial", "checkpoint.every": 2}), runs_dir=tmp_path
    )
    with open_runs(folder) as runs:
        used = runs.sql(
            "select rollout, min(eps_low), max(eps_low), max(eps_high) from updates group by all order by all"
        ).fetchall()
        events = runs.sql("select rollout, (data->>'eps')::double, message, (data->>'target')::double from events "
                          "where kind = 'control' order by rollout").fetchall()  # fmt: skip
        entropies = [row[0] for row in runs.sql("select entropy from rollouts order by rollout").fetchall()]
        (end,) = runs.sql("select (data->>'worst')::double from events where kind = 'control_end'").fetchall()
        as_run = what_if_view(runs, Options()).table.to_pylist()[0]
        terms = runs.sql(
            "select sum(pg_clip_low), sum(npg_total), 100 * sum(clip_low) / sum(tokens) from updates"
        ).fetchall()
    assert (as_run["pg_clip_low"], as_run["npg_total"], as_run["clip_low_percent"]) == pytest.approx(terms[0])
    assert (as_run["eps_low"], as_run["eps_high"]) == (None, 0.1)
    assert as_run["note"].startswith("as run, ε_low from ")
    assert used[0] == (0, 0.1, 0.1, 0.1)
    assert [event[0] for event in events] == [1, 2, 3]
    for (rollout, eps, message, target), (_, least, most, high) in zip(events, used[1:], strict=True):
        assert least == most == eps
        assert high == 0.1
        assert target == pytest.approx(entropies[0], rel=1e-12)
        assert f"entropy {entropies[rollout]:.4f}" in message
    state = json.loads((folder / "checkpoints" / "2" / "state" / "state.json").read_text())["control"]
    assert len(state["errors"]) == 2
    assert state["target"] == pytest.approx(entropies[0])
    worst = max(abs(entropy / entropies[0] - 1) for entropy in entropies[2:])
    assert end == (pytest.approx(worst),)


def test_a_target_out_of_reach_of_eps_high_is_told(tmp_path: Path) -> None:
    """Entropy cannot triple in 8 rollouts: ε_high takes the largest pull that it has, and the run says that it is not enough."""
    told: list[str] = []
    overrides = SMALL | {"run.steps": 8, "control.target_entropy": 1.6, "control.actuator": "eps_high"}
    folder = train(load_spec("tiny", overrides), runs_dir=tmp_path, warn=told.append)
    with open_runs(folder) as runs:
        used = runs.sql(
            "select rollout, min(eps_high), max(eps_high), max(eps_low) from updates group by all"
        ).fetchall()
        kinds = [
            row[0] for row in runs.sql("select kind from events where kind like 'control_%' order by time").fetchall()
        ]
    assert all(0.1 < least == most <= 0.9 and low == 0.1 for rollout, least, most, low in used if rollout > 0)
    assert kinds == ["control_limit", "control_end"]
    assert [line.split(":")[0] for line in told if line.startswith("control")] == kinds
    assert "was not held" in told[-1]


def test_a_rollout_without_groups_to_train_on_leaves_the_controller_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollout 2 has no advantage, so dynamic sampling drops it whole; rollout 3 is controlled by rollout 1's profile."""
    from clipctl import train as module

    real = module.with_advantages

    def nothing_in_rollout_2(job: Any, problems: Any, prompts: Any, scored: Any) -> list[Group]:
        groups = real(job, problems, prompts, scored)
        if prompts[0].key.rollout != 2:
            return groups
        return [replace(group, advantages_G=np.zeros_like(group.advantages_G)) for group in groups]

    monkeypatch.setattr(module, "with_advantages", nothing_in_rollout_2)
    overrides = SMALL | {
        "run.steps": 5, "control.target_entropy": 0.45, "rollout.dynamic_sampling": True, "rollout.max_refills": 1,
        "optim.responses_per_update": 4,
    }  # fmt: skip
    folder = train(load_spec("tiny", overrides), runs_dir=tmp_path, warn=lambda line: None)
    with open_runs(folder) as runs:
        actions = runs.sql(
            "select rollout, (data->>'eps')::double from events where kind = 'control' order by 1"
        ).fetchall()
        used = runs.sql("select rollout, any_value(eps_low) from updates group by all order by 1").fetchall()
    assert [row[0] for row in used] == [0, 1, 3, 4]
    assert actions == used[1:]
    state = json.loads((folder / "checkpoints" / "5" / "state" / "state.json").read_text())["control"]
    assert len(state["errors"]) == 4


def test_nothing_is_held_at_an_entropy_of_0() -> None:
    with pytest.raises(SpecError, match="entropy 0"):
        start_control(Control(target_entropy="initial"), 0.1, 0.0)


@pytest.mark.slow
def test_a_run_is_held_at_its_target(tmp_path: Path) -> None:
    """`tiny` falls from 0.55 to 0.45 nat and stays within ±10 % over its second half."""
    folder = train(load_spec("tiny", {"control.target_entropy": 0.45}), runs_dir=tmp_path)
    with open_runs(folder) as runs:
        entropies = [row[0] for row in runs.sql("select entropy from rollouts order by rollout").fetchall()]
        assert runs.sql("select data->>'held' from events where kind = 'control_end'").fetchall() == [("true",)]
    assert entropies[0] > 0.52
    assert all(abs(entropy - 0.45) < 0.045 for entropy in entropies[20:])
