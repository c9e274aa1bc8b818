"""What-if: the clip mass and the ledger's terms that another ε would have had on the ratios that a run saw.

A profile is a histogram of the ratio r by the sign of the advantage: tokens, and Σ w·|A|·e for policy gradient and natural
policy gradient (e as in `clipctl.ledger`). The terms under any ε are sums of its bins, because the token's effect does
not depend on ε and the active events are half-lines of r. To first order: with another ε the run would have gone elsewhere.

Edges are those of fixed ε and of the ε in force, so there the sums are exact; inside a bin tokens are taken to lie evenly
over log r. A bin below 1 holds from ≤ r < to, one above 1 from < r ≤ to, as the events r < 1-ε_low and r > 1+ε_high ask;
what is exactly 1 has a bin of its own. Letters: N rows of a profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# fmt: off
LOW = (0, .001, .002, .005, .01, .02, .03, .05, .075, .1, .125, .15, .175, .2, .225, .25, .3, .35, .4, .5, .6, .7, .8,
       .9)
"""The ε_low that are edges of every profile."""
HIGH = (0, .001, .002, .005, .01, .02, .03, .05, .075, .1, .125, .15, .175, .2, .225, .25, .28, .3, .35, .4, .5, .6, .8,
        1, 1.5, 2, 3, 5, 10)
"""The ε_high that are."""
# fmt: on


@dataclass(frozen=True, slots=True)
class Pull:
    """The three terms of the ledger for one algorithm."""

    reward: float
    clip_low: float
    clip_high: float

    @property
    def total(self) -> float:
        return self.reward + self.clip_low + self.clip_high


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One pair of ε on one profile: counts (fractional where interpolated) and terms; tokens: all of the profile."""

    tokens: float
    clip_low: float
    clip_high: float
    ratio_low: float
    ratio_high: float
    pg: Pull
    npg: Pull
    interpolated: bool


def profile_edges(eps_low: float, eps_high: float) -> tuple[list[float], list[float]]:
    """Ascending edges 1-ε below 1 and 1+ε above, of the fixed ε and of those in force; 1.0 and inf have none."""
    low = sorted({1 - eps for eps in (*LOW, eps_low) if eps < 1})
    high = sorted({1 + eps for eps in (*HIGH, eps_high) if eps < float("inf")})
    return low, high


def what_if(profile_N: Mapping[str, NDArray[np.generic]], *, eps_low: float, eps_high: float) -> WhatIf:
    """Clip mass and ledger terms of a profile under ε_low and ε_high.

    profile_N: columns advantage_sign, ratio_from, ratio_to, tokens, pg, npg, of any number of updates.
    """
    start, stop, tokens = (
        np.asarray(profile_N[name], dtype=np.float64) for name in ("ratio_from", "ratio_to", "tokens")
    )
    sign = np.asarray(profile_N["advantage_sign"])
    low_N, high_N = share_below(start, stop, 1 - eps_low), 1 - share_below(start, stop, 1 + eps_high)
    # The bin of what is exactly 1 ends where Y begins, also at ε_high = 0.
    high_N = np.where(stop <= 1 + eps_high, 0.0, high_N)
    negative, positive = low_N * (sign < 0), high_N * (sign > 0)
    pulls = {}
    for algorithm in ("pg", "npg"):
        value = np.asarray(profile_N[algorithm], dtype=np.float64)
        pulls[algorithm] = Pull(
            float((sign * value).sum()), float((value * negative).sum()), 0.0 - float((value * positive).sum())
        )
    inside = [(share > 0) & (share < 1) for share in (low_N, high_N)]
    return WhatIf(
        tokens=float(tokens.sum()),
        clip_low=float((tokens * negative).sum()),
        clip_high=float((tokens * positive).sum()),
        ratio_low=float((tokens * low_N).sum()),
        ratio_high=float((tokens * high_N).sum()),
        pg=pulls["pg"],
        npg=pulls["npg"],
        interpolated=bool((inside[0] | inside[1])[tokens > 0].any()),
    )


def share_below(from_N: Floats, to_N: Floats, edge: float) -> Floats:
    """The part of each bin that lies below an edge, tokens spread evenly over log r; linearly over r in the bin that
    begins at 0; none of the bin that ends at infinity when the edge lies in it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(edge / from_N) / np.log(to_N / from_N)
        share = np.where(from_N == 0, edge / to_N, share)
    share = np.where(np.isinf(to_N), 0.0, share)
    return np.asarray(np.where(from_N >= edge, 0.0, np.where(to_N <= edge, 1.0, share)))
