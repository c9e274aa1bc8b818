"""Alarms: what of a run's history a person would want to be told at once, as pure functions of that history.

An alarm is raised when its condition begins to hold and again only after it has not held for a rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from clipctl.spec import Alarm, Alarms


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """What alarms look at of one rollout; sums over its updates.

    entropy: nats, None where nothing was scored. clipped: tokens clipped on either side. clippable: whether a side was on
    and ratios could leave 1. The masses and sums of the four inequalities are named as in `EntropyLedger`.
    """

    rollout: int
    entropy: float | None
    groups: int
    groups_zero_advantage: int
    clipped: int
    clippable: bool
    x_mass: float
    x_pg: float
    x_npg: float
    y_mass: float
    y_pg: float
    y_npg: float


INEQUALITIES = {
    "(7) of clip-low": ("x_pg", "x_mass", "E[Q] - E[Q|X]"),
    "(7) of clip-high": ("y_pg", "y_mass", "E[Q] - E[Q|Y]"),
    "(8) of clip-low": ("x_npg", "x_mass", "E[-log π|X] - H"),
    "(8) of clip-high": ("y_npg", "y_mass", "E[-log π|Y] - H"),
}
"""Name → sum, mass and left side of each inequality; it fails where the sum is negative."""


def new_alarms(history: Sequence[RolloutFacts], limits: Alarms) -> dict[Alarm, str]:
    """The alarms that begin with the last rollout of the history, each with its reason in words."""
    before = standing_alarms(history[:-1], limits)
    return {alarm: reason for alarm, reason in standing_alarms(history, limits).items() if alarm not in before}


def standing_alarms(history: Sequence[RolloutFacts], limits: Alarms) -> dict[Alarm, str]:
    """All alarms whose condition holds at the end of the history."""
    if not history:
        return {}
    last, window = history[-1], history[-limits.window :]
    found: dict[Alarm, str] = {}
    if len(window) == limits.window:
        found |= _entropy_alarms(history, window, limits) | _inequality_alarm(window)
    if last.clippable and last.clipped == 0:
        found["no_clipping"] = "no token was clipped on either side: at this learning rate ε has no effect"
    if last.groups_zero_advantage > last.groups / 2:
        found["no_advantage"] = (
            f"{last.groups_zero_advantage} of {last.groups} groups have no advantage: all their rewards are equal"
        )
    return found


def _entropy_alarms(
    history: Sequence[RolloutFacts], window: Sequence[RolloutFacts], limits: Alarms
) -> dict[Alarm, str]:
    first = next((facts.entropy for facts in history if facts.entropy is not None), None)
    recent = [facts.entropy for facts in window if facts.entropy is not None]
    # The first rollout is what the others are measured by, so it cannot be part of a window.
    if not first or len(recent) < limits.window or len(history) == limits.window:
        return {}
    found: dict[Alarm, str] = {}
    compared = f"for {limits.window} rollouts (now {recent[-1]:.3f} nat, at first {first:.3f})"
    if max(recent) < limits.collapse * first:
        found["collapse"] = f"entropy is under {limits.collapse:g} of its first value {compared}"
    if min(recent) > limits.explosion * first:
        found["explosion"] = f"entropy is over {limits.explosion:g} times its first value {compared}"
    return found


def _inequality_alarm(window: Sequence[RolloutFacts]) -> dict[Alarm, str]:
    failing = [
        f"{name}, {left} = {getattr(window[-1], total) / getattr(window[-1], mass):.3g} now"
        for name, (total, mass, left) in INEQUALITIES.items()
        if all(getattr(facts, total) < 0 for facts in window)
    ]
    if not failing:
        return {}
    return {
        "inequality": f"fails for {len(window)} rollouts: {'; '.join(failing)}; that clip moves entropy the other way"
    }
