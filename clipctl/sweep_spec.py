"""What a sweep is: base run specs, what varies, seeds, the views that draw it, and the runs that follow. No torch.

A sweep file is TOML, closed and frozen like a run spec. `over` names a sweep that it is an overlay of: its keys replace those of
that one, tables are merged key by key. Runs are ordered by seed first, so that what is there after an interruption has all arms.
"""

import hashlib
import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from clipctl.errors import SpecError
from clipctl.layers import leaves, nest
from clipctl.spec import (
    NAME_PATTERN,
    Count,
    Group,
    RunSpec,
    flatten,
    nearest,
    preset_layer,
    preset_names,
    presets_folder,
    read_toml,
    resolve_spec,
    spec_keys,
    validate,
)

LABEL = 80
"""Letters of a run's name before its seed: with the longest seed behind it a name is allowed."""

Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


ViewName = Literal[
    "overview", "entropy", "clip", "ledger", "passk", "what-if", "compare", "frontier", "samples", "events"
]

OPTION_OF: dict[str, tuple[ViewName, ...]] = {
    "rollouts": ("ledger",),
    "k": ("passk", "frontier"),
    "benchmarks": ("passk", "frontier"),
}
"""The views that each key of a view belongs to, but for those of all."""


class SweepView(Group):
    """A view of `clipctl analyze` that draws the sweep."""

    view: ViewName
    by: Names = ()
    """Keys that runs are grouped by; none: all in which they differ but the seed."""
    rollouts: bool = False
    """For the ledger: every rollout, not the summary."""
    k: Count | None = None
    """For passk and frontier: of pass@k; none: the samples of a problem."""
    benchmarks: Names = ()
    """For passk and frontier: those that are drawn; none: all."""

    @model_validator(mode="after")
    def _options_are_its_own(self) -> Self:
        for name, value in (("rollouts", self.rollouts), ("k", self.k), ("benchmarks", self.benchmarks)):
            if value and self.view not in OPTION_OF[name]:
                raise ValueError(f"{name}: belongs to {', '.join(OPTION_OF[name])}, not to {self.view}")
        return self

    @model_validator(mode="after")
    def _groups_by_keys(self) -> Self:
        known = spec_keys()
        for key in self.by:
            if key not in known:
                raise ValueError(f"by: {key}: unknown key{nearest(key, known)}")
        return self


class SweepSpec(Group):
    """A sweep: every base with every row of `zip`, every combination of `grid` and every seed."""

    base: Names = ()
    """Presets, or files of run specs (`.toml`)."""
    include: Names = ()
    """Sweeps whose runs belong to this one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run spec over every base, by dotted key."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted key → values; all combinations are run."""
    zip: dict[str, Values] = Field(default_factory=dict)
    """Dotted key → values; the first ones of all lists are one arm, the second ones another."""
    names: Names = ()
    """Names of the rows of `zip`; none: made from their values."""
    seeds: Count | Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    """How many, from `run.seed` of the base on, or which ones; none: one, and those that an included sweep has."""
    views: Annotated[tuple[SweepView, ...], Field(strict=False)] = ()
    """What draws it, the first one best."""
    slurm: dict[str, str | int | bool] = Field(default_factory=dict)
    """Options of sbatch for `--launcher slurm`, such as partition, time, gres, mem."""

    @model_validator(mode="after")
    def _something_is_run(self) -> Self:
        if not self.base and not self.include:
            raise ValueError("base: missing; name one or more presets, such as base = ['tiny']")
        if not self.base and (self.grid or self.zip):
            raise ValueError("grid: nothing of this sweep's own varies, it only includes others; vary one of those")
        return self

    @model_validator(mode="after")
    def _rows_are_rows(self) -> Self:
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"zip: lists of one length, found {', '.join(f'{k} with {n}' for k, n in lengths.items())}"
            )
        if self.names and len(self.names) != max(lengths.values(), default=0):
            raise ValueError(f"names: {len(self.names)} names for {max(lengths.values(), default=0)} rows of zip")
        for name in self.names:
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"names: {name!r} is not allowed: letters, digits, '.', '_' and '-'")
            if self.names.count(name) > 1:
                raise ValueError(f"names: {name!r} is given twice; each row of zip needs its own")
        return self

    @model_validator(mode="after")
    def _each_key_varies_once(self) -> Self:
        places = [("set", self.set), ("zip", self.zip), ("grid", self.grid)]
        for (one, keys), (other, others) in itertools.combinations(places, 2):
            for key, rival in itertools.product(keys, others):
                if key == rival or key.startswith(f"{rival}.") or rival.startswith(f"{key}."):
                    raise ValueError(f"{other}.{rival}: {key} has a value in {one} already; give it in one place")
        for key in ("run.name", "run.seed"):
            if key in self.set or key in self.zip or (key in self.grid and key == "run.name"):
                raise ValueError(
                    f"{key}: a sweep names its runs itself and takes its seeds from `seeds` or --grid run.seed=…"
                )
        if "run.seed" in self.grid and self.seeds not in (None, 1):
            raise ValueError("grid.run.seed: the seeds are in `seeds` (--seeds) already; give one of the two")
        return self


LATER: dict[str, Any] = {"engine.statistics": "torch"}
"""Keys that came after sweeps had recorded identities. Where they say what such runs did, they do not count."""


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a sweep.

    name: of its folder. plain: the name that it has in a sweep in which no other run would have it too. values: axis → value,
    for people. command: what `clipctl train` is told, but for name and folder. spec: resolved, without a name.
    """

    name: str
    plain: str
    values: Mapping[str, Any]
    command: tuple[str, ...]
    spec: RunSpec

    @property
    def identity(self) -> str:
        return identity(self.spec)


def identity(spec: RunSpec) -> str:
    """Sixteen hex digits of SHA-256 over the resolved spec, its seed included, without what changes no number: the run's
    name and how it is saved."""
    return _digest(spec, ("run.name", "checkpoint."))[:16]


def _digest(spec: RunSpec, without: tuple[str, ...]) -> str:
    """SHA-256 in hex over the resolved spec without some keys, and groups of keys."""
    resolved = spec.model_dump(mode="json")
    later = [key for key, value in LATER.items() if flatten(spec)[key] == value]
    for key in (*without, *later):
        group, _, name = key.partition(".")
        (resolved[group] if name else resolved).pop(name or group)
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def sweep_names() -> list[str]:
    """Names of the sweeps that come with clipctl."""
    return sorted(path.stem for path in (presets_folder() / "sweeps").glob("*.toml"))


def sweep_text(name: str) -> str:
    """The TOML text of a sweep that comes with clipctl."""
    return (presets_folder() / "sweeps" / f"{name}.toml").read_text()


def preset_sweep(name: str) -> dict[str, Any]:
    """The layer of `--preset`: a sweep of that name, else a run preset to vary. Raises SpecError for an unknown name."""
    sweeps, runs = sweep_names(), preset_names()
    if name in sweeps:
        return _over(tomllib.loads(sweep_text(name)))
    if name in runs:
        return {"base": [name]}
    known = [*sweeps, *runs]
    raise SpecError(f"--preset: no sweep or preset {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def file_sweep(path: Path) -> dict[str, Any]:
    """The layer of `--spec`: a sweep file, or a file of a run spec to vary. Raises SpecError where it is not readable."""
    layer = read_toml(path)
    return _over(layer) if layer.keys() & {"over", *SweepSpec.model_fields} else {"base": [_as_file(path)]}


def _as_file(path: Path) -> str:
    """A path that is not taken for a preset's name."""
    text = str(path)
    return text if text.endswith(".toml") or "/" in text else f"./{text}"


def _over(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer over the sweep that it is an overlay of, with dotted keys."""
    flat = dict(layer)
    for group in ("set", "grid", "zip"):
        if isinstance(flat.get(group), dict):
            flat[group] = dict(leaves(flat[group]))
    if "over" not in flat:
        return flat
    name = flat.pop("over")
    if name not in sweep_names():
        raise SpecError(
            f"over: no sweep {name!r}{nearest(str(name), sweep_names())}; known: {', '.join(sweep_names())}"
        )
    below = _over(tomllib.loads(sweep_text(name)))
    # The rows of a list belong together, and so do its names.
    if "zip" in flat:
        below = {key: value for key, value in below.items() if key not in ("zip", "names")}
    own = flat.get("set", {})
    return below | flat | {"set": {**below.get("set", {}), **own} if isinstance(own, dict) else own}


def resolve_sweep(
    layer: Mapping[str, Any],
    assignments: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    zipped: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | tuple[int, ...] | None = None,
) -> SweepSpec:
    """The sweep of a layer and of what the command line says: --set over `set`, --grid and --zip over the lists of the same
    keys, --seeds over `seeds`. Raises SpecError, in one line that names the key."""
    merged = dict(layer)
    for group, more in (("set", assignments or {}), ("grid", grid or {})):
        # What is no table stays as it is, to be refused with its name.
        if isinstance(own := merged.get(group, {}), Mapping):
            merged[group] = {**own, **more}
    if zipped:
        merged["zip"] = dict(zipped)
        merged.pop("names", None)
    if seeds is not None:
        merged["seeds"] = _first_seeds(merged.get("seeds"), seeds)
    return validate(SweepSpec, {key: value for key, value in merged.items() if value != {}})


def _first_seeds(own: Any, seeds: int | tuple[int, ...]) -> Any:
    """So many seeds, or these: of those that the sweep names, the first ones. Raises SpecError where it names fewer."""
    if not isinstance(own, list | tuple) or not isinstance(seeds, int):
        return seeds
    if seeds > len(own):
        raise SpecError(f"--seeds: {seeds}, and the sweep names {len(own)}: {', '.join(map(str, own))}")
    return own[:seeds]


def parse_lists(texts: Sequence[str], flag: str) -> dict[str, list[Any]]:
    """Those of `parse_list` by key. Raises SpecError also for a key that is given twice."""
    found: dict[str, list[Any]] = {}
    for key, values in (parse_list(text, flag) for text in texts):
        if key in found:
            raise SpecError(f"{flag}: {key} is given twice; give all its values at once: {flag} {key}=V1,V2")
        found[key] = values
    return found


def parse_list(text: str, flag: str = "--grid") -> tuple[str, list[Any]]:
    """`KEY=V1,V2`: the values are read as the list `[V1,V2]` of TOML, and where that is none, those that are no TOML as
    plain strings."""
    key, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"\s*\w+(\.\w+)*\s*", key) or not values.strip():
        raise SpecError(f"{flag}: {text!r} is not KEY=V1,V2, such as clip.low=0.1,0.2 or clip.high=0.2,inf")
    whole = _toml_value(f"[{values}]")
    found = whole if isinstance(whole, list) else [_word(part.strip()) for part in values.split(",")]
    if len({json.dumps(value, default=str) for value in found}) < len(found) and flag == "--grid":
        raise SpecError(f"{flag}: {text!r} has a value twice")
    return key.strip(), found


def _word(text: str) -> Any:
    value = _toml_value(text)
    return text if value is None else value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}").get("value")
    except tomllib.TOMLDecodeError:
        return None


def default_name(source: str, sweep: SweepSpec) -> str:
    """Folder of a sweep without --name, the same for the same command: the sweep's own name, or the run preset's with the
    keys that vary."""
    if source in sweep_names():
        return source
    keys = [_short(key) for key in (*sweep.zip, *sweep.grid)]
    return _clean("-".join([_base_name(source), *(keys or ["seeds"])]))[:LABEL]


def expand(sweep: SweepSpec) -> list[Member]:
    """All runs, each resolved spec once. Raises SpecError for a run that is impossible, with its name."""
    members: dict[str, Member] = {}
    for member in _members(sweep):
        members.setdefault(member.identity, member)
    return [replace(member, name=name) for member, name in zip(members.values(), _names(members.values()), strict=True)]


def _names(members: Collection[Member]) -> list[str]:
    """The members' own names where they are short enough and no other one's; else cut, with eight digits of a hash.

    The hash is of what a run that goes on must not change, so that a run of more rollouts keeps its name; where that does
    not tell runs apart, sixteen digits or more of the whole spec's. The seed is in the name anyway.
    """
    ways = [0 if len(_label(member)) <= LABEL else 1 for member in members]
    while True:
        names = [_name(member, way) for member, way in zip(members, ways, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        ways = [way + (counts[name] > 1) for name, way in zip(names, ways, strict=True)]


def _name(member: Member, way: int) -> str:
    if way == 0:
        return member.name
    extent = ("run.name", "run.seed", "checkpoint.", *(("run.steps", "eval.") if way == 1 else ()))
    mark = _digest(member.spec, extent)[: 8 * way]
    return f"{_label(member)[: LABEL - 1 - len(mark)].rstrip('._-')}-{mark}-{member.spec.run.seed}"


def _label(member: Member) -> str:
    """A member's own name without its seed."""
    return member.name.removesuffix(f"-{member.spec.run.seed}")


def _members(sweep: SweepSpec) -> Iterator[Member]:
    for name in sweep.include:
        if name not in sweep_names():
            raise SpecError(f"include: no sweep {name!r}{nearest(name, sweep_names())}")
        yield from _members(resolve_sweep(preset_sweep(name), sweep.set, seeds=sweep.seeds))
    layers = {base: _base_layer(base) for base in sweep.base}
    rows: list[tuple[str | None, dict[str, Any]]] = [
        (sweep.names[at] if sweep.names else None, {key: values[at] for key, values in sweep.zip.items()})
        for at in range(len(next(iter(sweep.zip.values()), ())))
    ] or [(None, {})]
    combinations = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    arms = [
        _arm(base, len(layers) > 1, name, row, combination)
        for base, (name, row), combination in itertools.product(sweep.base, rows, combinations)
    ]
    for at in sweep.seeds if isinstance(sweep.seeds, tuple) else range(sweep.seeds or 1):
        for base, label, axes in arms:
            yield _member(sweep, base, layers[base], label, axes, at)


def _arm(
    base: str, several: bool, name: str | None, row: Mapping[str, Any], combination: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Base, label and assigned values of an arm. several: whether there are other bases."""
    parts = [_base_name(base)] if several else []
    parts += [name] if name else [_short(key) + _text(value) for key, value in row.items()]
    parts += [_short(key) + _text(value) for key, value in combination.items() if key != "run.seed"]
    return base, _clean("-".join(parts or [_base_name(base)])), {**row, **combination}


def _member(
    sweep: SweepSpec, base: str, layer: Mapping[str, Any], label: str, axes: Mapping[str, Any], at: int
) -> Member:
    first = layer.get("run", {}).get("seed", 0)
    seed = axes.get("run.seed", at if isinstance(sweep.seeds, tuple) else first + at)
    assigned = dict(leaves({**sweep.set, **axes, "run.seed": seed}))
    name = f"{label}-{seed}"
    try:
        spec = resolve_spec(layer, nest(assigned))
    except SpecError as error:
        raise SpecError(f"{label[:LABEL]}-{seed}: {error}") from None
    source = ("--spec", base) if _is_file(base) else ("--preset", base)
    sets = [part for key, value in assigned.items() for part in ("--set", f"{key}={toml_text(value)}")]
    shown = {"base": _base_name(base), **{key: value for key, value in axes.items() if key != "run.seed"}, "seed": seed}
    return Member(name, name, shown, ("train", *source, *sets), spec)


def _base_layer(base: str) -> dict[str, Any]:
    return read_toml(Path(base)) if _is_file(base) else preset_layer(base)


def _base_name(base: str) -> str:
    return base.rstrip("/").rsplit("/", 1)[-1].removesuffix(".toml")


def _is_file(base: str) -> bool:
    return base.endswith(".toml") or "/" in base


def toml_text(value: Any) -> str:
    """A value as TOML, as `--set` reads it back."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_text, value))}]"
    return repr(value)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("_", "")


def _text(value: Any) -> str:
    """A value in a folder's name."""
    if isinstance(value, Mapping):
        return "-".join(_text(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return "-".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e+", "e")
    return str(value).lower() if isinstance(value, bool) else str(value).rstrip("/").rsplit("/", 1)[-1]


def _clean(name: str) -> str:
    """The name with what a folder's name must not have left out."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-") or "sweep"
