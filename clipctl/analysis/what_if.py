"""The what-if view: clip mass and pull of other ε on the ratios that a run had, to first order."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipctl.analysis.answer import Answer, Options, as_arrow, without
from clipctl.errors import SpecError
from clipctl.schema import TERMS
from clipctl.store import Runs
from clipctl.whatif import Pull, WhatIf, what_if

PROFILES = """
select run_id, advantage_sign, ratio_from, ratio_to, sum(tokens) as tokens, sum(pg) as pg, sum(npg) as npg
from histogram_sums group by all order by all
"""
RUN_EPS = """
select run_id, r.eps_low, r.eps_high,
    coalesce(bool_and(eps_low_from = r.eps_low and eps_low_to = r.eps_low and eps_high_from = r.eps_high
        and eps_high_to = r.eps_high), false) as held
from runs as r left join update_sums as u using (run_id) group by all order by any_value(r.created_at), run_id
"""
RECORDED = f"""
select run_id, min(eps_low) as low_from, max(eps_low) as low_to, min(eps_high) as high_from, max(eps_high) as high_to,
    {", ".join(f"sum({name})::double as {name}" for name in ("tokens", "clip_low", "clip_high", "ratio_low", "ratio_high"))},
    {", ".join(f"sum({name}) as {name}" for name in TERMS)}
from updates group by run_id
"""
Eps = tuple[float | None, float | None]
Profile = Mapping[str, NDArray[np.float64]]


def profiles(runs: Runs) -> Iterator[tuple[dict[str, Any], Profile]]:
    """Of every run that has histograms and a spec: its row of RUN_EPS, and its profile, all updates together."""
    table = runs.table(PROFILES)
    of_run = np.array(table["run_id"].to_pylist(), dtype=object)
    columns = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names[1:]}
    for run in runs.table(RUN_EPS).to_pylist():
        mine = of_run == run["run_id"]
        if mine.any() and None not in (run["eps_low"], run["eps_high"]):
            yield run, {name: values[mine] for name, values in columns.items()}


def what_if_view(runs: Runs, options: Options) -> Answer:
    """Clip mass and ledger terms of each run, all updates together, under the ε it had and under every pair of the grid.

    A run whose ε the controller moved has its recorded sums first, with the ε that moved empty.

    A side of the grid without values keeps the run's own, and without any grid each clip is turned off once. To first
    order: the ratios are those of the run. Raises SpecError for an impossible grid, and where no run has histograms.
    """
    asked = parse_grid(options.grid)
    rows: list[dict[str, Any]] = []
    recorded = {row["run_id"]: row for row in runs.table(RECORDED).to_pylist()}
    for run, profile in profiles(runs):
        own = (run["eps_low"], run["eps_high"])
        if not run["held"] and run["run_id"] in recorded:
            rows.append(_recorded_row(run["run_id"], recorded[run["run_id"]]))
        pairs = dict.fromkeys(
            [own, *((low, high) for low in asked["low"] or own[:1] for high in asked["high"] or own[1:])]
        )
        if not options.grid:
            pairs |= dict.fromkeys([(own[0], float("inf")), (1.0, own[1])])
        for pair in pairs:
            found = what_if(profile, eps_low=pair[0], eps_high=pair[1])
            marks = [
                "as run" if pair == own and run["held"] else "first order",
                "interpolated" if found.interpolated else "",
            ]
            rows.append(_row(run["run_id"], pair, found, ", ".join(filter(None, marks))))
    return Answer(as_arrow(rows), without(runs, [row["run_id"] for row in rows], "what-if", "histograms of the ratio"))


def _recorded_row(run: str, sums: Mapping[str, Any]) -> dict[str, Any]:
    """What a run recorded whose ε moved."""
    moved = [side for side in ("low", "high") if sums[f"{side}_from"] != sums[f"{side}_to"]]
    pg, npg = (
        Pull(*(sums[f"{algorithm}_{part}"] for part in ("reward", "clip_low", "clip_high")))
        for algorithm in ("pg", "npg")
    )
    counts = {name: sums[name] for name in ("tokens", "clip_low", "clip_high", "ratio_low", "ratio_high")}
    eps = tuple(None if side in moved else sums[f"{side}_from"] for side in ("low", "high"))
    ranges = " and ".join(f"ε_{side} from {sums[f'{side}_from']:.4g} to {sums[f'{side}_to']:.4g}" for side in moved)
    return _row(run, (eps[0], eps[1]), WhatIf(**counts, pg=pg, npg=npg, interpolated=False), f"as run, {ranges}")


def _row(run: str, eps: Eps, found: WhatIf, note: str) -> dict[str, Any]:
    row: dict[str, Any] = {"run_id": run, "eps_low": eps[0], "eps_high": eps[1]}
    for side in ("clip_low", "clip_high"):
        row[f"{side}_percent"] = 100 * getattr(found, side) / max(found.tokens, 1)
    for algorithm in ("pg", "npg"):
        pull = getattr(found, algorithm)
        row |= {f"{algorithm}_{term}": getattr(pull, term) for term in ("reward", "clip_low", "clip_high", "total")}
    return row | {"note": note}


def parse_grid(grid: Sequence[str]) -> dict[str, list[float]]:
    """`clip.low=0.1,0.2` and `clip.high=0.2,inf` as lists. Raises SpecError for other keys and impossible values."""
    found: dict[str, list[float]] = {"low": [], "high": []}
    for text in grid:
        key, _, values = text.partition("=")
        side = key.strip().removeprefix("clip.")
        if not key.strip().startswith("clip.") or side not in found:
            raise SpecError(f"--grid: {text!r} must be clip.low=V1,V2,... or clip.high=V1,V2,...")
        for value in values.split(","):
            try:
                number = float(value)
            except ValueError:
                raise SpecError(f"--grid: {value!r} in {text!r} is not a number") from None
            if not 0 <= number <= (1 if side == "low" else float("inf")):
                raise SpecError(
                    f"--grid: clip.{side} = {value} is not {'from 0 to 1' if side == 'low' else '0 or more'}"
                )
            found[side].append(number)
    return found
