"""The verdict: what a run's entropy does, and who pulls at it, in words. Pure functions of numbers.

The trend is the least-squares slope of entropy on the rollout over the last rollouts, in percent of their mean, with a 95 %
interval that counts autocorrelated residuals as fewer (Santer et al. 2000, J. Geophys. Res. 105: n_eff = n (1-ρ)/(1+ρ), ρ the
lag-1 autocorrelation). It falls or rises only where the interval excludes 0.

The reason is the ledger of the policy-gradient step over the same rollouts. Its terms are the own-state part of what moves
entropy and under AdamW have no size, so they are told as shares of the downward or the upward pull, never as nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 20
"""Rollouts that the verdict looks at."""
FEWEST = 4
"""Rollouts without which there is no trend."""
FLAT = 0.05
"""Percent a rollout under which a trend is none, however sure: less than 1 % over the window."""
CANCELLED = 0.05
"""Net pull as a share of all that pulls under which the pulls cancel."""
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
         2.110, 2.101)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""
ENDED = {
    "crashed": "crashed (its heartbeat stopped)",
    "diverged": "diverged",
    "failed": "failed",
    "stopped": "stopped by an alarm",
    "interrupted": "interrupted",
}


@dataclass(frozen=True, slots=True)
class Trend:
    """Slope, and the ends of its interval, in percent of the mean entropy a rollout; rollouts: how many it is made of."""

    slope: float
    low: float
    high: float
    rollouts: int

    @property
    def direction(self) -> int:
        """-1 falls, 1 rises, 0 holds or is too noisy to say."""
        if abs(self.slope) < FLAT or self.low <= 0 <= self.high:
            return 0
        return 1 if self.slope > 0 else -1


@dataclass(frozen=True, slots=True)
class Facts:
    """What a verdict is made of.

    entropy: of every rollout so far, nats, None where nothing was scored. reward, clip_low, clip_high: the ledger's terms
    (policy gradient), summed over the updates of the last rollouts, None where the run has no ledger. clipped: tokens
    clipped in them. eps: least and largest ε_low, and ε_high, that were in force, None where there were no updates. agreed,
    probed: probed updates in which the ledger's sign was that of the observed change, and all probed updates.
    """

    state: str | None
    message: str
    entropy: Sequence[float | None]
    reward: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    clipped: int = 0
    eps: tuple[float, float, float, float] | None = None
    agreed: int = 0
    probed: int = 0


def verdict(facts: Facts) -> str:
    """One or a few sentences: how the run ended, what entropy does, and why."""
    known = [(at, value) for at, value in enumerate(facts.entropy) if value is not None]
    trend = entropy_trend([at for at, _ in known][-WINDOW:], [value for _, value in known][-WINDOW:])
    parts = [_ending(facts), _trend_words(known, trend), *_reason(facts, trend), _moved(facts)]
    return "; ".join(part for part in parts if part)


def entropy_trend(rollouts: Sequence[int], entropies: Sequence[float]) -> Trend | None:
    """The trend of entropies at rollouts; None where there are too few, or entropy is 0 throughout."""
    n = len(entropies)
    mean = sum(entropies) / n if n else 0.0
    if n < FEWEST or mean <= 0:
        return None
    x = [at - sum(rollouts) / n for at in rollouts]
    square = sum(value * value for value in x)
    slope = sum(a * (y - mean) for a, y in zip(x, entropies, strict=True)) / square
    rest = [y - mean - slope * a for a, y in zip(x, entropies, strict=True)]
    residual = sum(value * value for value in rest)
    lag = sum(a * b for a, b in zip(rest, rest[1:], strict=False)) / residual if residual > 1e-24 * mean * mean else 0.0
    effective = min(float(n), max(3.0, n * (1 - lag) / (1 + lag)))
    error = math.sqrt(residual / (effective - 2) / square)
    quantile = T_975[min(round(effective) - 2, len(T_975)) - 1]
    percent = 100 / mean
    return Trend(percent * slope, percent * (slope - quantile * error), percent * (slope + quantile * error), n)


def pull_words(reward: float, clip_low: float, clip_high: float, direction: int) -> str:
    """Who pulls which way, as shares of the downward (direction -1, or 0 with a net pull down) or the upward pull."""
    terms = {"clip-high": clip_high, "the reward": reward, "clip-low": clip_low}
    gross, total = sum(map(abs, terms.values())), sum(terms.values())
    if gross == 0:
        return "the ledger's terms are all 0: nothing pulls"
    if abs(total) < CANCELLED * gross:
        ups = ", ".join(f"{name} {_percent(value / gross)}" for name, value in _largest(terms) if value > 0)
        downs = ", ".join(f"{name} {_percent(-value / gross)}" for name, value in _largest(terms) if value < 0)
        return f"the pulls cancel (net {_percent(abs(total) / gross)} of all pull): up {ups}; down {downs}"
    side = (1 if total > 0 else -1) if direction == 0 else direction
    whole = sum(value * side for value in terms.values() if value * side > 0)
    if whole == 0:
        return f"nothing in the ledger pulls {_way(side)}"
    with_it = [f"{name} {_percent(value * side / whole)}" for name, value in _largest(terms) if value * side > 0]
    back = "gives back" if side < 0 else "takes back"
    against = [
        f"{name} {back} {_percent(-value * side / whole)}" for name, value in _largest(terms) if value * side < 0
    ]
    return f"of the {_way(side)}ward pull {', '.join([*with_it, *against])}"


def what_if_words(reward: float, clip_low: float, clip_high: float) -> str:
    """What the net pull would be, to first order and on the same ratios, without the clip that adds most to it."""
    total = reward + clip_low + clip_high
    name, term = max(
        (("clip-low", clip_low), ("clip-high", clip_high)), key=lambda pair: pair[1] * math.copysign(1, total)
    )
    if total == 0 or term * total <= 0 or abs(total) < CANCELLED * (abs(reward) + abs(clip_low) + abs(clip_high)):
        return ""
    left = (total - term) / total
    if left < 0:
        return f"what-if: without {name} the pull would turn {_way(-1 if total > 0 else 1)} ({-left:.1f} of it)"
    return f"what-if: without {name} the pull would be {left:.1f} of it"


def _ending(facts: Facts) -> str:
    words = ENDED.get(facts.state or "", "")
    return f"{words}: {facts.message}" if words and facts.message else words


def _trend_words(known: Sequence[tuple[int, float]], trend: Trend | None) -> str:
    if not known:
        return "no rollout was scored: nothing to judge" if not known else ""
    first, now = known[0][1], known[-1][1]
    level = f"now {now / first:.2f} of its first value" if first > 0 else f"now {now:.3g} nat"
    if len(known) == 1:
        return f"one rollout, entropy {now:.3g} nat: no trend yet"
    if trend is None:
        return f"{len(known)} rollouts: too few for a trend, {level}" if now > 0 else "entropy is 0"
    spread = f"95 %: {trend.low:+.2g} to {trend.high:+.2g}, last {trend.rollouts} rollouts"
    if trend.direction == 0:
        return f"entropy holds ({trend.slope:+.2g} % a rollout, {spread}), {level}"
    return (
        f"entropy {'falls' if trend.direction < 0 else 'rises'} {abs(trend.slope):.2g} % a rollout ({spread}), {level}"
    )


def _reason(facts: Facts, trend: Trend | None) -> list[str]:
    if facts.reward is None or facts.clip_low is None or facts.clip_high is None:
        return ["no ledger: who pulls is not known"] if facts.entropy else []
    terms = (facts.reward, facts.clip_low, facts.clip_high)
    direction = trend.direction if trend is not None else 0
    total = sum(terms)
    which = "ledger: policy gradient, own-state part, shares"
    if facts.probed:
        which += f"; its sign was that of the observed change in {facts.agreed} of {facts.probed} probed updates"
    if not facts.clipped:
        way = "" if total == 0 else f" {_way(1 if total > 0 else -1)}"
        return [f"nothing was clipped: the pull{way} is the reward's alone ({which})"]
    words = [pull_words(*terms, direction)]
    if direction and total * direction < 0 and abs(total) >= CANCELLED * sum(map(abs, terms)):
        words.append(f"yet its net pull is {_way(-direction)}: what moves entropy is not in the own-state part")
    else:
        words.append(what_if_words(*terms))
    return [*filter(None, words), f"({which})"]


def _moved(facts: Facts) -> str:
    if facts.eps is None:
        return ""
    sides = (("ε_low", *facts.eps[:2]), ("ε_high", *facts.eps[2:]))
    moved = [f"{name} moved between {low:.3g} and {high:.3g}" for name, low, high in sides if low != high]
    return f"{' and '.join(moved)} (controller)" if moved else ""


def _largest(terms: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(terms.items(), key=lambda pair: -abs(pair[1]))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _way(side: int) -> str:
    return "up" if side > 0 else "down"
