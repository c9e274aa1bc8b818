"""The views of `clipctl analyze`: queries and derivations that answer with a table, one function a view, by name.

A view whose numbers a run does not have says so in a note; it is an error only where no run has them.
"""

from collections.abc import Callable

from clipctl.analysis.answer import Answer, Options, check_options, check_together
from clipctl.analysis.compare import compare_view
from clipctl.analysis.events import events_view
from clipctl.analysis.ledger import ledger_view
from clipctl.analysis.passk import frontier_view, passk_view
from clipctl.analysis.samples import samples_view
from clipctl.analysis.series import clip_view, entropy_view
from clipctl.analysis.what_if import what_if_view
from clipctl.store import Runs

View = Callable[[Runs, Options], Answer]

VIEWS_OF_ANALYZE: dict[str, View] = {
    "entropy": entropy_view,
    "clip": clip_view,
    "ledger": ledger_view,
    "passk": passk_view,
    "what-if": what_if_view,
    "compare": compare_view,
    "frontier": frontier_view,
    "samples": samples_view,
    "events": events_view,
}
"""What `--view` takes besides the overview."""

HEADINGS: dict[str, dict[str, str]] = {
    "entropy": {
        "entropy": "H",
        "entropy_low": "H from",
        "entropy_high": "to",
        "entropy_token_mean": "over tokens",
        "entropy_token_mean_low": "tokens from",
        "entropy_token_mean_high": "tokens to",
        "entropy_normalized": "H/first",
        "entropy_normalized_low": "H/first from",
        "entropy_normalized_high": "H/first to",
    },
    "compare": {
        "mean_low": "from",
        "mean_high": "to",
        "difference_low": "diff. from",
        "difference_high": "diff. to",
    },
    "ledger": {
        "run_id": "run",
        "step": "ledger of",
        "pull_reward": "reward",
        "pull_clip_low": "clip-low",
        "pull_clip_high": "clip-high",
        "pull_momentum": "momentum",
        "pull_rounding": "rounding",
        "pull_decay": "decay",
        "clip_low_up": "low up",
        "clip_high_down": "high down",
        "inequality_low": "ineq. low",
        "inequality_high": "ineq. high",
        "sign_agreement": "signs agree",
    },
    "what-if": {
        "run_id": "run",
        "eps_low": "ε_low",
        "eps_high": "ε_high",
        "clip_low_percent": "clip-low %",
        "clip_high_percent": "clip-high %",
    },
}
"""Short headings on a terminal; JSON and CSV keep the full names."""

__all__ = ["HEADINGS", "VIEWS_OF_ANALYZE", "Answer", "Options", "View", "check_options", "check_together"]
