"""The verdict: what a run's entropy does, and who pulls at it, in words. Pure functions of numbers.

The trend is the least-squares slope of log entropy on the rollout over the last rollouts, as percent a rollout, with a 95 %
interval. Its error is taken from what is left after a curve (a quadratic term, which is orthogonal to the slope), and
autocorrelated rest counts as fewer rollouts (Santer et al. 2000, J. Geophys. Res. 105: n_eff = n (1-ρ)/(1+ρ), ρ the lag-1
autocorrelation). Entropy falls or rises only where the interval excludes 0.

The reason is the policy-gradient ledger over the same rollouts. Its terms are the own-state part of what moves entropy and have
no size under AdamW, so they are told as shares of the downward or the upward pull, never as nats. (The prediction through
the network names no one: under AdamW nearly all of it is momentum, in which the three parts are mixed.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

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
PULLS = ("the reward", "clip-low", "clip-high")
"""The ledger's terms in words."""
LEDGER = "ledger of a policy-gradient step, own-state part"
ENDED = {
    "crashed": "crashed (its heartbeat stopped)",
    "diverged": "diverged",
    "failed": "failed",
    "stopped": "stopped by an alarm",
    "interrupted": "interrupted",
}


@dataclass(frozen=True, slots=True)
class Trend:
    """Slope, and the ends of its interval, percent a rollout; rollouts: how many it is made of."""

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

    entropy: of every rollout so far, nats, None where nothing was scored. pull: the ledger's summed terms by name (of PULLS),
    empty where the run has none. clipped: tokens clipped in these rollouts. eps: least and largest
    ε_low, and ε_high, that were in force, None where there were no updates. agreed, probed: probed updates in which the
    ledger's sign was that of the observed change, and all probed updates.
    """

    state: str | None
    message: str
    entropy: Sequence[float | None]
    pull: Mapping[str, float] = field(default_factory=dict)
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
    """The trend of entropies (nats) at rollouts; None where there are too few, or entropy is 0 throughout."""
    n = len(entropies)
    if n < FEWEST or max(entropies) <= 0:
        return None
    floor = 1e-6 * max(entropies)
    y = [math.log(max(value, floor)) for value in entropies]
    x = [at - sum(rollouts) / n for at in rollouts]
    # Orthogonal polynomials, also where rollouts are missing.
    spread = sum(a * a for a in x)
    skew = sum(a**3 for a in x) / spread
    curve = [a * a - spread / n - skew * a for a in x]
    mean, slope = sum(y) / n, _dot(x, y) / spread
    bend = _dot(curve, y) / _dot(curve, curve)
    rest = [value - mean - slope * a - bend * c for a, c, value in zip(x, curve, y, strict=True)]
    left = _dot(rest, rest)
    lag = sum(a * b for a, b in pairwise(rest)) / left if left > 1e-20 else 0.0
    effective = min(float(n), max(4.0, n * (1 - lag) / (1 + lag)))
    error = T_975[min(round(effective) - 3, len(T_975)) - 1] * math.sqrt(left / (effective - 3) / spread)
    middle, low, high = (100 * math.expm1(value) for value in (slope, slope - error, slope + error))
    return Trend(middle, low, high, n)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def pull_words(pull: Mapping[str, float]) -> str:
    """Who pulls at entropy, as shares of all that pulls the way of the net pull."""
    terms = sorted(pull.items(), key=lambda pair: -abs(pair[1]))
    if cancels(pull):
        gross = sum(map(abs, pull.values())) or 1.0
        ups, downs = (
            ", ".join(f"{name} {_percent(abs(value) / gross)}" for name, value in terms if value * side > 0)
            or "nothing"
            for side in (1, -1)
        )
        return f"the pulls cancel (net {_percent(abs(sum(pull.values())) / gross)} of all pull): up {ups}; down {downs}"
    side = math.copysign(1, sum(pull.values()))
    whole = sum(value * side for value in pull.values() if value * side > 0)
    (first, most), *others = [(name, value * side / whole) for name, value in terms if value * side > 0]
    shares = [f"{first} is {_percent(most)}", *(f"{name} {_percent(share)}" for name, share in others)]
    back = "gives back" if side < 0 else "takes back"
    shares += [f"{name} {back} {_percent(-value * side / whole)}" for name, value in terms if value * side < 0]
    return f"of the {_way(side)}ward pull {', '.join(shares)}"


def what_if_words(pull: Mapping[str, float]) -> str:
    """What the net pull would be, to first order and on the same ratios, without the clip that adds most to it."""
    total = sum(pull.values())
    name, term = max(((name, pull[name]) for name in PULLS[1:]), key=lambda pair: pair[1] * total)
    if term * total <= 0 or cancels(pull):
        return ""
    left = (total - term) / total
    if left < 0:
        return f"what-if: without {name} the pull would turn {_way(-total)} ({-left:.1f} of it)"
    return f"what-if: without {name} the pull would be {left:.1f} of it"


def cancels(pull: Mapping[str, float]) -> bool:
    """Whether what is left of all that pulls is too little to have a direction."""
    return abs(sum(pull.values())) <= CANCELLED * sum(map(abs, pull.values()))


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
    spread = f"95 %: {_signed(trend.low)} to {_signed(trend.high)}, last {trend.rollouts} rollouts"
    if trend.direction == 0:
        return f"entropy holds ({_signed(trend.slope)} % a rollout, {spread}), {level}"
    return (
        f"entropy {'falls' if trend.direction < 0 else 'rises'} {abs(trend.slope):.2g} % a rollout ({spread}), {level}"
    )


def _reason(facts: Facts, trend: Trend | None) -> list[str]:
    if not facts.pull:
        return ["no ledger: who pulls is not known"] if any(value is not None for value in facts.entropy) else []
    which = LEDGER
    if facts.probed:
        which += f"; its sign was that of the observed change in {facts.agreed} of {facts.probed} probed updates"
    total = sum(facts.pull.values())
    words = [pull_words(facts.pull)] if any(facts.pull.values()) else ["nothing pulls: all terms are 0"]
    if not facts.clipped:
        words.insert(0, "nothing was clipped")
    direction = trend.direction if trend is not None else 0
    if direction * total < 0 and not cancels(facts.pull):
        moved = "rises" if direction > 0 else "falls"
        words.append(f"yet entropy {moved}: what moves it is not in this ledger")
    elif facts.clipped:
        words.append(what_if_words(facts.pull))
    return [f"{'; '.join(filter(None, words))} ({which})"]


def _moved(facts: Facts) -> str:
    if facts.eps is None:
        return ""
    sides = (("ε_low", *facts.eps[:2]), ("ε_high", *facts.eps[2:]))
    moved = [f"{name} moved between {low:.3g} and {high:.3g}" for name, low, high in sides if low != high]
    return f"{' and '.join(moved)} (controller)" if moved else ""


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _way(side: float) -> str:
    return "up" if side > 0 else "down"
