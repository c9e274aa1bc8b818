"""What `clipctl theory` shows: the theorems on random policies, counterexamples, many steps, and the token formula.

Everything is computed when it is asked for; nothing here is a stored result. Letters as in `clipctl.theory`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from clipctl.errors import SpecError
from clipctl.formats import as_csv, as_table
from clipctl.plots import check_plot_path, save_chart, series_scales
from clipctl.theory import (
    Algorithm,
    Floats,
    Simulation,
    exact_change,
    exact_token_change,
    first_order,
    residual_slope,
    sampled_steps,
    simulate,
    token_terms,
)

SCHEMA_VERSION = 1
"""Of the JSON."""
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
NAMES = {"pg": "policy gradient", "npg": "natural policy gradient"}
STEPS = np.logspace(-6.5, -2.5, 9)
"""Step sizes of the residual: four decades."""
SHOWN_STEP = 1e-3
"""Step size of the predicted and true change of entropy in the tables."""
SIMULATED_STEP: dict[Algorithm, float] = {"pg": 1.0, "npg": 0.05}
"""Step sizes of the many-step mode: some 5 % of the ratios leave the clip range by a rollout's end."""
SIMULATED_EPS = 0.05
SIMULATED_STATES = 64
SEEDS = 5
COUNTEREXAMPLES = {
    "a common action fell: X is common": ([0.9, 0.1], [0.7, 0.3], 0.1, math.inf, "low"),
    "a common action rose: Y is common": ([0.6, 0.4], [0.9, 0.1], 1.0, 0.1, "high"),
}
"""(π_old, π_k, ε_low, ε_high, side): the inequality of that side fails, for both algorithms."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for. eps_low, eps_high: None draws them at random for each trial, and takes 0.05 in
    the many-step mode. steps: optimizer steps of the many-step mode."""

    trials: int = 200
    states: int = 3
    actions: int = 8
    seed: int = 0
    eps_low: float | None = None
    eps_high: float | None = None
    steps: int = 192

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("states", 1), ("actions", 2), ("seed", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"--{name}: {getattr(self, name)} is under {least}")
        if self.eps_low is not None and not 0 <= self.eps_low <= 1:
            raise SpecError(f"--eps-low: {self.eps_low:g} is not from 0 to 1")
        if self.eps_high is not None and not self.eps_high >= 0:
            raise SpecError(f"--eps-high: {self.eps_high:g} is under 0")


def random_policies(rng: np.random.Generator, states: int, actions: int, seed: int) -> dict[str, tuple[Floats, Floats]]:
    """(π_old, π_k) twice: π_k a random perturbation of the logits, and π_k after clipped steps under random rewards."""
    peak = rng.choice([0.5, 1.5, 3.0])
    logits = peak * rng.normal(size=(states, actions))
    shifted = logits + rng.uniform(0.1, 0.8) * rng.normal(size=(states, actions))
    settings = Simulation(states=states, actions=actions, rollouts=1, inner=12, peak=float(peak))
    *_, trained = sampled_steps(settings, eps_low=0.2, eps_high=0.2, step=0.1, algorithm="npg", seed=seed)
    return {"perturbed": (_softmax(logits), _softmax(shifted)), "trained": trained}


def run_trials(options: Options) -> list[dict[str, Any]]:
    """One row for each trial, way to π_k and algorithm: changes of entropy at SHOWN_STEP, slope, inequalities."""
    rows: list[dict[str, Any]] = []
    for trial in range(options.trials):
        rng = np.random.default_rng([options.seed, trial])
        low = rng.uniform(0.02, 0.4) if options.eps_low is None else options.eps_low
        high = rng.uniform(0.02, 0.5) if options.eps_high is None else options.eps_high
        visitation = rng.uniform(0.3, 1.0, options.states)
        seed = int(rng.integers(2**31))
        advantages = rng.normal(size=(options.states, options.actions))
        for way, (old, now) in random_policies(rng, options.states, options.actions, seed).items():
            for algorithm in ALGORITHMS:
                given: dict[str, Any] = {
                    "eps_low": float(low), "eps_high": float(high), "visitation": visitation, "algorithm": algorithm,
                }  # fmt: skip
                row = {
                    "trial": trial,
                    "way": way,
                    "eps_low": float(low),
                    "eps_high": float(high),
                    "algorithm": algorithm,
                }
                rows.append(row | _random_reward(old, now, given) | _action_reward(old, now, advantages, given))
    return rows


def _random_reward(old: Floats, now: Floats, given: dict[str, Any]) -> dict[str, Any]:
    """A trial under random rewards, μν = 0.5: Theorem 1 or 2 against the exact step."""
    random = given | {"mu": 1.0, "nu": 0.5}
    found = first_order(old, now, step=SHOWN_STEP, **random)
    residuals = [
        exact_change(old, now, step=s, **random) - first_order(old, now, step=s, **random).total for s in STEPS
    ]
    clipped = bool((found.p > 0).any() or (found.q > 0).any())
    return {
        "predicted": found.total,
        "exact": exact_change(old, now, step=SHOWN_STEP, **random),
        "clip_low": found.clip_low,
        "clip_high": found.clip_high,
        "residuals": residuals,
        "slope": residual_slope(STEPS, residuals) if clipped else None,
        "low_holds": _share(found.gap_low), "high_holds": _share(found.gap_high),
        "low_pooled_holds": _pooled(found.p, found.gap_low), "high_pooled_holds": _pooled(found.q, found.gap_high),
    }  # fmt: skip


def _action_reward(old: Floats, now: Floats, advantages: Floats, given: dict[str, Any]) -> dict[str, Any]:
    """A trial with one advantage for each state and action: the token formula against the exact step."""
    terms = token_terms(old, now, advantages, step=SHOWN_STEP, **given)
    residuals = [
        exact_token_change(old, now, advantages, step=s, **given)
        - token_terms(old, now, advantages, step=s, **given).total
        for s in STEPS
    ]
    return {
        **{f"action_{name}": value for name, value in asdict(terms).items()},
        "action_exact": exact_token_change(old, now, advantages, step=SHOWN_STEP, **given),
        "action_slope": residual_slope(STEPS, residuals),
    }


def counterexamples() -> list[dict[str, Any]]:
    """Policies at which an inequality fails, and with it the sign of what that clip does to entropy."""
    rows = []
    for name, (old, now, low, high, side) in COUNTEREXAMPLES.items():
        for algorithm in ALGORITHMS:
            given: dict[str, Any] = {"eps_low": low, "eps_high": high, "mu": 1.0, "nu": 0.5, "algorithm": algorithm}
            found = first_order(old, now, step=SHOWN_STEP, **given)
            rows.append(
                {
                    "inequality": f"({7 if algorithm == 'pg' else 8}) {side}",
                    "why it fails": name,
                    "π_old": _numbers(old),
                    "π_k": _numbers(now),
                    "ε": f"ε_low {low:g}" if side == "low" else f"ε_high {high:g}",
                    "left side": float(getattr(found, f"gap_{side}")),
                    "predicted ΔH": found.total,
                    "true ΔH": exact_change(old, now, step=SHOWN_STEP, **given),
                    "the title says": "up" if side == "low" else "down",
                }
            )
    return rows


def run_steps(options: Options, reward: str) -> dict[str, dict[str, Floats]]:
    """Entropy of many sampled steps: algorithm → arm → [seeds, K+1]; all arms see the same random numbers."""
    low = SIMULATED_EPS if options.eps_low is None else options.eps_low
    high = SIMULATED_EPS if options.eps_high is None else options.eps_high
    arms = {
        "both clips": (low, high), "no clip-high": (low, math.inf), "no clip-low": (1.0, high), "neither": (1.0, math.inf),
    }  # fmt: skip
    inner = min(16, options.steps)
    settings = Simulation(states=SIMULATED_STATES, rollouts=-(-options.steps // inner), inner=inner, reward=reward)  # type: ignore[arg-type]
    return {
        algorithm: {
            arm: np.stack(
                [
                    simulate(
                        settings, eps_low=eps[0], eps_high=eps[1], step=SIMULATED_STEP[algorithm], algorithm=algorithm,
                        seed=options.seed + at,
                    )[: options.steps + 1]
                    for at in range(SEEDS)
                ]
            )
            for arm, eps in arms.items()
        }
        for algorithm in ALGORITHMS
    }  # fmt: skip


def theory_report(options: Options, output: str, plot: Path | None, terminal: bool) -> str:
    """The whole report as text; writes `plot` where one is asked for.

    output: `table`; `json`, with every trial and every step; `csv`, the trials. Raises SpecError for an unknown format
    or suffix, StoreError where the plot cannot be written.
    """
    if output not in ("table", "json", "csv"):
        raise SpecError(f"--format: {output!r} is not one of table, json, csv")
    if plot is not None:
        check_plot_path(plot)
    trials = run_trials(options)
    curves = {reward: run_steps(options, reward) for reward in ("random", "best")}
    if plot is not None:
        save_chart(theory_chart(trials, curves["random"]), plot)
    if output == "csv":
        return as_csv(_arrow([{k: v for k, v in row.items() if k != "residuals"} for row in trials]), terminal)
    tables = {
        "theorems": theorem_rows(trials),
        "inequalities": inequality_rows(trials),
        "counterexamples": counterexamples(),
        "action_dependent": action_rows(trials),
        "many_steps": step_rows(curves),
    }
    if output == "json":
        steps = {
            reward: {a: {arm: values.tolist() for arm, values in arms.items()} for a, arms in found.items()}
            for reward, found in curves.items()
        }
        answer = {"schema_version": SCHEMA_VERSION, "options": asdict(options), **tables, "step_sizes": STEPS.tolist()}
        return json.dumps(_strict(answer | {"trials": trials, "entropies": steps}), indent=1, allow_nan=False)
    return "\n\n".join(f"{HEADINGS[name]}\n\n{as_table(_arrow(rows), terminal)}" for name, rows in tables.items())


HEADINGS = {
    "theorems": f"Random rewards, one exact step of {SHOWN_STEP:g}: Theorem 1 (policy gradient) and 2 (natural) against the "
    f"true change of entropy, nats, mean of |…|;\nthe residual's log-log slope over steps from {STEPS[0]:.1e} to "
    f"{STEPS[-1]:.1e} is 2 where the theorem is right to first order\n(a trial lies off it when its second-order term "
    "happens to be near 0, or no more than rounding).",
    "inequalities": "How often the inequalities hold: state by state, and pooled over states as Σ p·gap ÷ Σ p. They are what the "
    "title's signs rest on.",
    "counterexamples": "Where they fail, the sign of the change is the other one than the title says.",
    "action_dependent": "Advantages that depend on the action: the token formula of the entropy ledger against the true change.",
    "many_steps": f"Many sampled steps, rollouts of 16 with fresh draws: mean entropy of {SIMULATED_STATES} states over {SEEDS} "
    "paired seeds ± its 95 % interval; `against neither` is the difference to no clipping at all.",
}


def theorem_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each algorithm and way to π_k."""
    rows = []
    for algorithm, way in ((a, w) for a in ALGORITHMS for w in ("perturbed", "trained")):
        mine = [row for row in trials if row["algorithm"] == algorithm and row["way"] == way]
        slopes = np.array([row["slope"] for row in mine if row["slope"] is not None])
        rows.append(
            {
                "algorithm": NAMES[algorithm],
                "π_k": way,
                "trials": len(mine),
                "predicted ΔH": _mean_abs(mine, "predicted"),
                "true ΔH": _mean_abs(mine, "exact"),
                "residual": float(np.mean([abs(row["exact"] - row["predicted"]) for row in mine])),
                "clip-low part": float(np.mean([row["clip_low"] for row in mine])),
                "clip-high part": float(np.mean([row["clip_high"] for row in mine])),
                **_slope_columns(slopes),
            }
        )
    return rows


def inequality_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of states, and of trials pooled, in which each inequality holds."""
    rows = []
    for algorithm, way in ((a, w) for a in ALGORITHMS for w in ("perturbed", "trained")):
        mine = [row for row in trials if row["algorithm"] == algorithm and row["way"] == way]
        row: dict[str, Any] = {"inequality": "(7)" if algorithm == "pg" else "(8)", "π_k": way}
        for side in ("low", "high"):
            row[f"{side}, states"] = _mean_of(mine, f"{side}_holds")
            row[f"{side}, pooled"] = _mean_of(mine, f"{side}_pooled_holds")
        row["clip-low up"] = _share_of([r["clip_low"] > 0 for r in mine if r["clip_low"]])
        row["clip-high down"] = _share_of([r["clip_high"] < 0 for r in mine if r["clip_high"]])
        rows.append(row)
    return rows


def action_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The token formula, one row for each algorithm."""
    rows = []
    for algorithm in ALGORITHMS:
        mine = [row for row in trials if row["algorithm"] == algorithm]
        rows.append(
            {
                "algorithm": NAMES[algorithm],
                "trials": len(mine),
                "predicted ΔH": _mean_abs(mine, "action_total"),
                "true ΔH": _mean_abs(mine, "action_exact"),
                "residual": float(np.mean([abs(row["action_exact"] - row["action_total"]) for row in mine])),
                "reward part": _mean_abs(mine, "action_reward"),
                "clip-low part": _mean_abs(mine, "action_clip_low"),
                "clip-high part": _mean_abs(mine, "action_clip_high"),
                **_slope_columns(np.array([row["action_slope"] for row in mine])),
            }
        )
    return rows


def step_rows(curves: dict[str, dict[str, dict[str, Floats]]]) -> list[dict[str, Any]]:
    """Entropy first and last of every arm, and its paired difference to the arm without clipping."""
    rows = []
    for reward, algorithm in ((r, a) for r in curves for a in ALGORITHMS):
        arms = curves[reward][algorithm]
        for arm, values in arms.items():
            rows.append(
                {
                    "rewards": "random" if reward == "random" else "one right action",
                    "algorithm": NAMES[algorithm],
                    "arm": arm,
                    "first": float(values[:, 0].mean()),
                    "last": _with_interval(values[:, -1], sign=""),
                    "change": _with_interval(values[:, -1] - values[:, 0]),
                    "against neither": ""
                    if arm == "neither"
                    else _with_interval(values[:, -1] - arms["neither"][:, -1]),
                }
            )
    return rows


def theory_chart(trials: Sequence[dict[str, Any]], curves: dict[str, dict[str, Floats]]) -> Any:
    """Residual against the step with its slope, predicted against true change, entropy over steps by arm."""
    import altair as alt

    scales = series_scales([NAMES[a] for a in ALGORITHMS])
    color = alt.Color("algorithm:N", scale=scales["color"], title=None, legend=alt.Legend(orient="right"))
    residuals = _data(_median_residuals(trials))
    log = alt.Scale(type="log")
    base = alt.Chart(residuals).encode(
        x=alt.X("step:Q", scale=log, title="step η", axis=alt.Axis(format=".0e", values=[1e-6, 1e-5, 1e-4, 1e-3])),
        y=alt.Y("residual:Q", scale=log, title="|true − predicted ΔH|, nats", axis=alt.Axis(format=".0e", tickCount=6)),
        color=color,
    )
    guide = alt.Chart(_data(_guide(trials))).mark_line(color="#888888", strokeDash=[2, 4])
    guided = guide.encode(x=alt.X("step:Q", scale=log), y=alt.Y("residual:Q", scale=log))
    panel = {"width": 330, "height": 240}
    one = (guided + base.mark_line() + base.mark_point(filled=True, size=50)).properties(
        **panel, title=alt.Title("The residual falls with η²", subtitle="median of the trials; dotted: slope 2")
    )
    points = [
        {"predicted": row["predicted"], "true": row["exact"], "algorithm": NAMES[row["algorithm"]]} for row in trials
    ]
    two = (
        alt.Chart(_data(points))
        .mark_point(filled=True, opacity=0.45, size=28)
        .encode(
            x=alt.X("predicted:Q", title="predicted ΔH, nats", axis=alt.Axis(format=".0e", tickCount=5)),
            y=alt.Y("true:Q", title="true ΔH, nats", axis=alt.Axis(format=".0e", tickCount=5)),
            color=color,
        )
        .properties(
            **panel,
            title=alt.Title("Predicted and true change", subtitle=f"one step of {SHOWN_STEP:g}, random rewards"),
        )
    )
    arms = list(curves["pg"])
    lines = [_entropy_panel(NAMES[a], curves[a], arms).properties(**panel) for a in ALGORITHMS]
    return alt.vconcat(alt.hconcat(one, two, spacing=40), alt.hconcat(*lines, spacing=40), spacing=30).resolve_scale(
        color="independent", strokeDash="independent"
    )


def _data(rows: list[dict[str, Any]]) -> Any:
    import altair as alt

    return alt.Data(values=rows)  # type: ignore[no-untyped-call]


def _entropy_panel(name: str, curves: dict[str, Floats], arms: list[str]) -> Any:
    import altair as alt

    changes = {arm: curves[arm] - curves[arm][:, :1] for arm in arms}
    values = [
        {"step": at, "arm": arm, "change": float(mean), "low": float(mean - half), "high": float(mean + half)}
        for arm in arms
        for at, (mean, half) in enumerate(zip(changes[arm].mean(0), _half_width(changes[arm]), strict=True))
    ]
    scales = series_scales(arms)
    base = alt.Chart(_data(values)).encode(x=alt.X("step:Q", title="optimizer step"))
    legend = alt.Legend(symbolType="stroke", symbolOpacity=1, title="clipping")
    color = alt.Color("arm:N", scale=scales["color"], legend=legend, sort=arms)
    band = base.mark_area(opacity=0.15, strokeWidth=0).encode(y=alt.Y("low:Q"), y2="high:Q", color=color)
    line = base.mark_line().encode(
        y=alt.Y("change:Q", title="mean entropy since the start, nats"),
        color=color,
        strokeDash=alt.StrokeDash("arm:N", scale=scales["strokeDash"], legend=legend, sort=arms),
    )
    title = alt.Title(f"Random rewards, {name}", subtitle=f"mean of {SEEDS} paired seeds and its 95 % interval")
    return alt.layer(line, band).properties(title=title)


def _median_residuals(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for algorithm in ALGORITHMS:
        found = [
            np.abs(row["residuals"]) for row in trials if row["algorithm"] == algorithm and row["slope"] is not None
        ]
        if found:
            rows += [
                {"step": float(step), "residual": float(value), "algorithm": NAMES[algorithm]}
                for step, value in zip(STEPS, np.median(found, 0), strict=True)
            ]
    return rows


def _guide(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    medians = [row["residual"] for row in _median_residuals(trials) if row["step"] == STEPS[-1]]
    top = 3 * max(medians, default=1.0)
    return [{"step": float(step), "residual": float(top * (step / STEPS[-1]) ** 2)} for step in (STEPS[0], STEPS[-1])]


def _slope_columns(slopes: Floats) -> dict[str, Any]:
    if not len(slopes):
        return dict.fromkeys(("slope", "least", "most", "within 2 ± 0.05"))
    inside = float((np.abs(slopes - 2) <= 0.05).mean())
    return {
        "slope": float(np.median(slopes)),
        "least": float(slopes.min()),
        "most": float(slopes.max()),
        "within 2 ± 0.05": inside,
    }


def _with_interval(values: Floats, sign: str = "+") -> str:
    return f"{values.mean():{sign}.4f} ± {_half_width(values[:, None])[0]:.4f}"


def _half_width(values: Floats) -> Floats:
    """Half the 95 % interval of the mean over the first axis, by Student's t with SEEDS - 1 degrees of freedom."""
    assert len(values) == SEEDS == 5
    return np.asarray(2.776 * values.std(0, ddof=1) / math.sqrt(SEEDS))


def _strict(value: Any) -> Any:
    """The value as strict JSON has it: what is not a number is null, infinity a string, as in every JSON of clipctl."""
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _share(gap_S: Floats) -> float | None:
    """The share of the states with the event in which the inequality holds."""
    there = ~np.isnan(gap_S)
    return float((gap_S[there] >= 0).mean()) if there.any() else None


def _pooled(mass_S: Floats, gap_S: Floats) -> bool | None:
    there = mass_S > 0
    return bool((mass_S * gap_S)[there].sum() >= 0) if there.any() else None


def _mean_of(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return _share_of([row[name] for row in rows if row[name] is not None])


def _share_of(found: Sequence[float]) -> float | None:
    return float(np.mean(found)) if found else None


def _mean_abs(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([abs(row[name]) for row in rows]))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows)
