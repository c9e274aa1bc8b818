"""The controller: at the start of each rollout's updates it sets one ε so that entropy goes to a target.

Entropy integrates what the updates do to it, so the controller asks for a pull, not for an entropy. The profile of the
last rollout's ratios says, by what-if, which total T(ε) every ε within bounds would have had; between T of the baseline ε
and the largest (or smallest) T on the side of the baseline where clipping should raise (or lower) entropy it asks for the
share gain·(H* - H)/H* of the way, and takes the nearest ε that has it. What the profile does not know (shared weights,
AdamW) moves the ε that holds entropy: the baseline follows, in log ε, by integral·(H - H*)/H* a rollout against the sign
in which ε acts. It stands still while the ε that is taken lies at a bound and the error would push it further
(anti-windup), and never leaves the bounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipctl.errors import SpecError
from clipctl.spec import Control
from clipctl.whatif import what_if

GRID = 121
"""ε between the baseline and a bound that are tried, evenly in log ε."""
TOLERANCE = 0.1
"""Relative distance from the target that counts as holding it."""
PATIENCE = 5
"""Rollouts at the limit of what ε can do, away from the target, after which the controller says so."""


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the controller carries from rollout to rollout; part of a checkpoint.

    target: nats. log_eps: log of the baseline ε. errors: (H - H*)/H* of the rollouts so far. at_limit: rollouts in a row
    in which ε lay at a bound or had all the pull that it can have, and entropy was away from the target.
    """

    target: float
    log_eps: float
    errors: tuple[float, ...] = ()
    at_limit: int = 0


@dataclass(frozen=True, slots=True)
class Action:
    """The ε to use, why, and the numbers behind it. stuck: a line for whoever watches, where ε cannot do it."""

    eps: float
    reason: str
    data: dict[str, Any]
    stuck: str | None


Profile = Mapping[str, NDArray[np.generic]]


def start_control(control: Control, eps: float, entropy: float) -> ControlState:
    """The state at the first rollout, whose entropy is the target where that is `initial`; eps: that of the spec.

    Raises SpecError where that entropy is 0: nothing can be held there.
    """
    target = entropy if control.target_entropy == "initial" else control.target_entropy
    assert isinstance(target, float)
    if target <= 0:
        raise SpecError(
            "control.target_entropy = 'initial': the first rollout has entropy 0, so there is nothing to hold; give a target "
            "in nats"
        )
    return ControlState(target, math.log(eps), ((entropy - target) / target,))


def next_action(
    state: ControlState, control: Control, entropy: float, profile: Profile, other_eps: float
) -> tuple[ControlState, Action]:
    """The ε for this rollout's updates.

    entropy: of this rollout, nats. profile: columns of the last rollout's histograms, all updates together. other_eps: the
    ε that is not controlled.
    """
    error = (entropy - state.target) / state.target
    # A smaller ε_low raises entropy, a smaller ε_high lowers it.
    upwards = -1 if control.actuator == "eps_low" else 1
    baseline, bounds = math.exp(state.log_eps), control.bounds
    share = float(np.clip(-control.gain * error, -1, 1))
    grid = np.geomspace(baseline, bounds[share * upwards > 0], GRID)
    gains = np.sign(share) * np.array([total_pull(profile, control.actuator, eps, other_eps) for eps in grid])
    eps = float(grid[np.argmax(gains >= gains[0] + abs(share) * (gains.max() - gains[0]))])
    bound = _bound_that_stops(eps, -error * upwards, control.bounds)
    step = 0.0 if bound else -upwards * control.integral * error
    low, high = (math.log(edge) for edge in control.bounds)
    limited = abs(error) > TOLERANCE and (bound is not None or abs(share) == 1)
    after = ControlState(
        state.target,
        min(max(state.log_eps + step, low), high),
        (*state.errors, error),
        state.at_limit + 1 if limited else 0,
    )
    reason = (
        f"entropy {entropy:.4f} is {100 * error:+.1f} % from {state.target:.4f}: {control.actuator} {eps:.4g}, "
        f"{100 * share:+.0f} % of the way from the pull at the baseline {baseline:.4g} to the "
        f"{'largest' if share > 0 else 'smallest'} that it can have{f', at the bound {bound:g}' if bound else ''}"
    )
    data = {
        "entropy": entropy, "target": state.target, "error": error, "actuator": control.actuator, "eps": eps,
        "baseline": baseline, "share": share, "pull_to_gain": float(gains.max() - gains[0]), "at_limit": limited,
    }  # fmt: skip
    return after, Action(eps, reason, data, _stuck(after, control, eps))


def total_pull(profile: Profile, actuator: str, eps: float, other_eps: float) -> float:
    """The ledger's total under ε for the policy-gradient step, in whose units the rest of a profile is the same."""
    low, high = (eps, other_eps) if actuator == "eps_low" else (other_eps, eps)
    return what_if(profile, eps_low=low, eps_high=high).pg.total


def held(state: ControlState) -> tuple[float, bool]:
    """Largest |error| over the second half of the rollouts so far, and whether it is within ±10 %."""
    second = state.errors[len(state.errors) // 2 :]
    worst = max(map(abs, second))
    return worst, worst <= TOLERANCE


def _bound_that_stops(eps: float, direction: float, bounds: Sequence[float]) -> float | None:
    """The bound at which ε lies while the error wants it further that way."""
    low, high = bounds
    if eps <= low * (1 + 1e-9) and direction < 0:
        return low
    return high if eps >= high * (1 - 1e-9) and direction > 0 else None


def _stuck(state: ControlState, control: Control, eps: float) -> str | None:
    """A line every PATIENCE rollouts at the limit."""
    if state.at_limit % PATIENCE != 0 or state.at_limit == 0:
        return None
    gained = abs(state.errors[-1 - min(PATIENCE, len(state.errors) - 1)]) - abs(state.errors[-1])
    pace = (
        f"at the pace of the last {PATIENCE} rollouts it needs {math.ceil(abs(state.errors[-1]) / gained * PATIENCE)} more"
        if gained > 0
        else "and entropy does not come nearer"
    )
    return (
        f"target {state.target:.4g} nat is out of reach for now: for {state.at_limit} rollouts {control.actuator} has had the "
        f"{'smallest' if state.errors[-1] > 0 else 'largest'} pull within its bounds (now {eps:.3g}), entropy is "
        f"{100 * state.errors[-1]:+.0f} % off, {pace}"
    )
