"""Arms: the runs that differ in their seed alone, or in nothing but what a person does not group by, and means over them.

The interval of a mean over n runs is Student's t with n - 1 degrees of freedom: seeds are few. Runs of one arm that have
the same seed are no independent draws, so by default each of them stays by itself.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from clipctl.errors import SpecError
from clipctl.layers import leaves
from clipctl.store import Runs

LEVEL = 0.95
IDLE = ("run.name", "run.seed", "run.steps", "run.stop_on", "checkpoint.", "eval.", "store.", "engine.threads")
"""Keys, and groups of keys, in which two runs may differ and still be draws of one experiment."""
SHORT = {"clip.low": "ε_low", "clip.high": "ε_high", "model.path": "model", "reward.kind": "reward", "run.seed": "seed"}
"""Names of keys where room is short."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that are averaged. values: of the keys in which arms differ. pairs: run by what else its spec says, which is
    what a run of another arm is paired with."""

    name: str
    runs: tuple[str, ...]
    values: Mapping[str, Any]
    pairs: Mapping[str, str]


def flat_spec(text: str | None) -> dict[str, Any]:
    """A spec's JSON as key → value, `{"clip.low": 0.2, ...}`; lists are values. Empty for a run without a spec.

    A key that came after the run has its default, which is what the run did. A spec that this version does not read stays
    as it is.
    """
    from clipctl.spec import spec_from_json, spec_json

    if text is None:
        return {}
    with suppress(SpecError):
        text = spec_json(spec_from_json(text))
    return dict(leaves(json.loads(text)))


def specs_of(runs: Runs) -> dict[str, dict[str, Any]]:
    """The flat spec of every run, oldest run first."""
    rows = runs.table("select run_id, spec from runs order by created_at, run_id").to_pylist()
    return {row["run_id"]: flat_spec(row["spec"]) for row in rows}


def differing(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have one value in all of the specs, sorted; a key that a spec lacks differs from any value."""
    keys = sorted({key for spec in specs for key in spec})
    return [key for key in keys if len({_value_key(spec, key) for spec in specs}) > 1]


def arms_of(runs: Runs, by: Sequence[str] = ()) -> list[Arm]:
    """The runs in arms: those that agree in the keys `by`; without any, in every key but those of IDLE.

    Raises SpecError for a key that no run's spec has, with the nearest one.
    """
    specs = specs_of(runs)
    known = sorted({key for spec in specs.values() for key in spec})
    for key in by:
        if key not in known:
            raise SpecError(f"--by: no run's spec has the key {key!r}{_nearest(key, known)}")
    keys = list(by) or [key for key in differing(list(specs.values())) if not key.startswith(IDLE)]
    members: dict[tuple[str, ...], list[str]] = {}
    for run, spec in specs.items():
        members.setdefault(tuple(_value_key(spec, key) for key in keys), []).append(run)
    groups = (
        list(members.values()) if by else [part for group in members.values() for part in _told_apart(group, specs)]
    )
    names = _names(groups, specs, keys, named_by_run=not by)
    others = [key for key in known if key not in keys and not key.startswith("run.name")]
    return [
        Arm(
            name,
            tuple(group),
            {key: specs[group[0]].get(key) for key in keys},
            {run: json.dumps([_value_key(specs[run], key) for key in others]) for run in group},
        )
        for name, group in zip(names, groups, strict=True)
    ]


def _told_apart(group: Sequence[str], specs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The group, or its runs one by one where two of them have the same seed."""
    seeds = [specs[run].get("run.seed") for run in group]
    return [list(group)] if len(set(seeds)) == len(seeds) else [[run] for run in group]


def _names(
    groups: Sequence[Sequence[str]], specs: Mapping[str, Mapping[str, Any]], keys: Sequence[str], *, named_by_run: bool
) -> list[str]:
    """A run's own name for an arm of one; what the runs' names begin with, where that tells all arms apart; else the values
    of the keys in which arms differ. Arms of several say how many runs they are."""
    settings = [
        ", ".join(f"{SHORT.get(key, key)} {value_text(specs[group[0]].get(key))}" for key in keys) for group in groups
    ]
    stems = [_beginning(group).rstrip("0123456789").rstrip("-_.=") for group in groups]
    by_stem = named_by_run and all(stems) and len(set(stems)) == len(stems)
    names: list[str] = []
    for group, stem, setting in zip(groups, stems, settings, strict=True):
        label = (stem if by_stem else setting) or stem or "all runs"
        what = "seed" if named_by_run else "run"
        name = (
            group[0] if named_by_run and len(group) == 1 else f"{label} ({len(group)} {what}{'s' * (len(group) > 1)})"
        )
        names.append(name if name not in names else f"{name} #{names.count(name) + 1}")
    return names


def _beginning(names: Sequence[str]) -> str:
    """What all the names begin with."""
    return "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )


def value_text(value: Any) -> str:
    """A spec's value where room is short: ∞, the last part of a path, numbers without needless digits."""
    if value in ("Infinity", math.inf):
        return "∞"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).rstrip("/").rsplit("/", 1)[-1] if isinstance(value, str) else json.dumps(value)


def _value_key(spec: Mapping[str, Any], key: str) -> str:
    return json.dumps(spec[key]) if key in spec else ""


def _nearest(key: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def arms_sql(arms: Sequence[Arm]) -> str:
    """The arms as a relation (run_id, arm, place) for a `from` clause."""
    rows = ", ".join(
        f"({_literal(run)}, {_literal(arm.name)}, {at})" for at, arm in enumerate(arms) for run in arm.runs
    )
    return f"(values {rows}) as arms(run_id, arm, place)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@lru_cache(maxsize=256)
def t_quantile(n: int) -> float:
    """The two-sided 95 % quantile of Student's t with n - 1 degrees of freedom, n ≥ 2."""
    import mpmath

    freedom = n - 1

    def missing(t: Any) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t**2), regularized=True) - (1 - LEVEL)

    return float(mpmath.findroot(missing, (1.5, 13), solver="anderson"))


def mean_and_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean of some runs' values and its 95 % t interval; no interval for fewer than two, None for none."""
    count = len(values)
    if not count:
        return None, None, None
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None, None
    half = t_quantile(count) * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - half, mean + half
