"""The verdict against numbers computed by hand, and what it says of runs that end badly or say nothing."""

import math

import numpy as np
import pytest

from clipctl.sparkline import sparkline
from clipctl.verdict import Facts, cancels, entropy_trend, pull_words, verdict, what_if_words

FALLING = [1.0 - 0.02 * at + 0.004 * (-1) ** at for at in range(20)]


def pull(reward: float, low: float, high: float) -> dict[str, float]:
    return {"the reward": reward, "clip-low": low, "clip-high": high}


def test_the_trend_is_the_least_squares_slope_of_log_entropy() -> None:
    # log y = 1.386294, 0.693147, 1.098612, 0 at x = ∓1.5, ∓0.5: Σxy = -1.876710, Σx² = 5, slope -0.375342: -31.295 %.
    trend = entropy_trend([0, 1, 2, 3], [4.0, 2.0, 3.0, 1.0])
    assert trend is not None
    assert trend.slope == pytest.approx(-31.295, abs=1e-3)
    # Curve 1, -1, -1, 1 with factor -0.405465/4; rest ±0.130134, ∓0.390403, Σ² = 0.338700, ρ = -0.75: n_eff is capped at 4.
    # Error √(0.3387/1/5) = 0.260269, quantile of 1 degree of freedom 12.71: -0.375342 ∓ 3.308019.
    assert (trend.low, trend.high) == (pytest.approx(-97.486, abs=0.01), pytest.approx(1777.7, abs=1))
    assert trend.direction == 0


def test_autocorrelated_residuals_widen_the_interval() -> None:
    slow = [1.0 + 0.1 * math.sin(2 * math.pi * at / 20) for at in range(20)]
    rng = np.random.default_rng(0)
    shuffled = list(rng.permutation(slow))
    wide, narrow = (entropy_trend(range(20), series) for series in (slow, shuffled))
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert wide.direction == 0


def test_white_noise_falls_or_rises_in_about_one_of_twenty() -> None:
    rng = np.random.default_rng(1)
    found = [entropy_trend(range(20), list(1 + 0.1 * rng.standard_normal(20))) for _ in range(400)]
    wrong = sum(trend is not None and trend.direction != 0 for trend in found) / len(found)
    assert 0.01 < wrong < 0.10


@pytest.mark.parametrize(
    ("series", "says"),
    [
        (FALLING, "entropy falls 2.5 % a rollout"),
        ([0.5 + 0.05 * at for at in range(20)], "entropy rises 5.6 % a rollout"),
        ([0.5 * 1.3**at for at in range(20)], "entropy rises 30 % a rollout"),
        ([0.1 + 0.9 * math.exp(-at / 5) for at in range(20)], "entropy falls"),
        ([1.0, 0.5, 0.1, 0.01, 0.0, 0.0, 0.0], "entropy falls"),
        ([0.5] * 20, "entropy holds (+0 % a rollout"),
        ([0.5 + 0.05 * (-1) ** at for at in range(20)], "entropy holds"),
        ([0.5 - 0.0001 * at for at in range(20)], "entropy holds"),
        ([0.5], "one rollout, entropy 0.5 nat: no trend yet"),
        ([0.5, 0.4], "2 rollouts: too few for a trend, now 0.80 of its first value"),
        ([], "no rollout was scored"),
        ([None, None], "no rollout was scored"),
        ([0.0] * 9, "entropy is 0"),
        ([1.0] * 3 + [None] + [0.9] * 16, "entropy"),
    ],
)
def test_what_entropy_does(series: list[float | None], says: str) -> None:
    assert says in verdict(Facts("finished", "", series))


def test_shares_of_the_downward_pull() -> None:
    # Down: 6.8 + 3.2 = 10; up 1.3: net -8.7. Without clip-high -1.9, 0.218 of it.
    words = pull(-3.2, 1.3, -6.8)
    assert pull_words(words) == ("of the downward pull clip-high is 68 %, the reward 32 %, clip-low gives back 13 %")
    assert what_if_words(words) == "what-if: without clip-high the pull would be 0.2 of it"


def test_shares_of_the_upward_pull_and_a_pull_that_would_turn() -> None:
    # Up: 5; down 1.5 + 0.5: net 3. Without clip-low -2: turned, 0.667 of it.
    words = pull(-0.5, 5.0, -1.5)
    assert (
        pull_words(words)
        == "of the upward pull clip-low is 100 %, clip-high takes back 30 %, the reward takes back 10 %"
    )
    assert what_if_words(words) == "what-if: without clip-low the pull would turn down (0.7 of it)"


def test_symmetric_pulls_cancel() -> None:
    words = pull(0.0, 5.0, -5.0)
    assert cancels(words)
    assert pull_words(words) == "the pulls cancel (net 0 % of all pull): up clip-low 50 %; down clip-high 50 %"
    assert what_if_words(words) == ""
    assert not cancels(pull(0.0, 5.0, -4.0))


def test_a_reward_that_pulls_alone_needs_no_what_if() -> None:
    assert what_if_words(pull(-2.0, 0.5, 0.0)) == ""


def test_the_whole_of_a_falling_run() -> None:
    facts = Facts(
        "finished", "", FALLING, pull(-3.2, 1.3, -6.8), clipped=9, eps=(0.2, 0.2, 0.2, 0.2), agreed=7, probed=9
    )
    said = verdict(facts)
    assert said.startswith("entropy falls 2.5 % a rollout (95 %: ")
    assert "last 20 rollouts), now 0.61 of its first value; of the downward pull clip-high is 68 %" in said
    assert "without clip-high the pull would be 0.2 of it (ledger of a policy-gradient step, own-state part" in said
    assert said.endswith("its sign was that of the observed change in 7 of 9 probed updates)")


def test_a_ledger_that_pulls_the_other_way_is_told_as_such() -> None:
    said = verdict(Facts("finished", "", FALLING, pull(0.1, 5.0, -0.5), clipped=3))
    assert "of the upward pull clip-low is 98 %" in said
    assert "yet entropy falls: what moves it is not in this ledger" in said
    assert "what-if" not in said


def test_no_clipping_no_ledger_and_moved_eps_are_told() -> None:
    said = verdict(Facts("finished", "", FALLING, pull(-2.0, 0.0, 0.0)))
    assert "nothing was clipped; of the downward pull the reward is 100 %" in said
    assert verdict(Facts("finished", "", FALLING)).endswith("no ledger: who pulls is not known")
    said = verdict(Facts("finished", "", FALLING, pull(-2.0, 0.0, 0.0), eps=(0.1, 0.34, 0.2, 0.2)))
    assert said.endswith("ε_low moved between 0.1 and 0.34 (controller)")
    assert "all terms are 0" in verdict(Facts("finished", "", FALLING, pull(0.0, 0.0, 0.0), clipped=1))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("crashed", "crashed (its heartbeat stopped); entropy falls"),
        ("diverged", "diverged: loss is nan; entropy falls"),
        ("stopped", "stopped by an alarm: loss is nan; entropy falls"),
        ("interrupted", "interrupted: loss is nan; entropy falls"),
        ("running", "entropy falls"),
        (None, "entropy falls"),
    ],
)
def test_how_a_run_ended_comes_first(state: str | None, says: str) -> None:
    message = "" if state == "crashed" else "loss is nan"
    assert verdict(Facts(state, message, FALLING)).startswith(says)


def test_a_sparkline_has_the_means_of_stretches() -> None:
    assert sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
