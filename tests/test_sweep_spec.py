"""What a sweep expands to: tables by hand, what the command line of a member means, and what is refused."""

import math
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipctl.analysis.answer import OPTION_OF as ANALYZE_OPTION_OF
from clipctl.analysis.arms import flat_spec
from clipctl.errors import SpecError
from clipctl.layers import nest
from clipctl.notebook import VIEW_NAMES
from clipctl.spec import NAME_PATTERN, load_spec, parse_assignment, preset_layer, preset_names, resolve_spec, spec_json
from clipctl.sweep_spec import (
    OPTION_OF,
    Member,
    ViewName,
    default_name,
    expand,
    file_sweep,
    identity,
    parse_list,
    parse_lists,
    preset_sweep,
    resolve_sweep,
    sweep_names,
    sweep_text,
    toml_text,
)


def table(members: list[Member], *keys: str) -> list[tuple[Any, ...]]:
    return [(member.name, *(member.values.get(key) for key in keys)) for member in members]


def swept(layer: dict[str, Any], **options: Any) -> list[Member]:
    return expand(resolve_sweep(layer, **options))


def test_a_grid_is_every_combination_and_seeds_come_last() -> None:
    grid = dict([parse_list("clip.low=0.1,0.15"), parse_list("clip.high=0.2,inf")])
    assert table(swept({"base": ["tiny"]}, grid=grid, seeds=2), "clip.low", "clip.high", "seed") == [
        ("low0.1-high0.2-0", 0.1, 0.2, 0),
        ("low0.1-highinf-0", 0.1, math.inf, 0),
        ("low0.15-high0.2-0", 0.15, 0.2, 0),
        ("low0.15-highinf-0", 0.15, math.inf, 0),
        ("low0.1-high0.2-1", 0.1, 0.2, 1),
        ("low0.1-highinf-1", 0.1, math.inf, 1),
        ("low0.15-high0.2-1", 0.15, 0.2, 1),
        ("low0.15-highinf-1", 0.15, math.inf, 1),
    ]


def test_zipped_lists_go_side_by_side_within_a_grid_and_over_bases() -> None:
    members = swept(
        {
            "base": ["tiny", "tiny-random"],
            "zip": {"clip.low": [0.1, 1.0], "clip.high": [math.inf, 0.1]},
            "names": ["no-high", "no-low"],
            "grid": {"optim.lr": [1e-4]},
            "seeds": [7],
        }
    )
    assert table(members, "base", "clip.low", "clip.high", "optim.lr") == [
        ("tiny-no-high-lr0.0001-7", "tiny", 0.1, math.inf, 1e-4),
        ("tiny-no-low-lr0.0001-7", "tiny", 1.0, 0.1, 1e-4),
        ("tiny-random-no-high-lr0.0001-7", "tiny-random", 0.1, math.inf, 1e-4),
        ("tiny-random-no-low-lr0.0001-7", "tiny-random", 1.0, 0.1, 1e-4),
    ]
    assert [member.spec.reward.kind for member in members] == ["gsm8k", "gsm8k", "bernoulli", "bernoulli"]
    assert {member.spec.run.seed for member in members} == {7}


def test_seeds_begin_at_the_bases_and_may_be_a_grid() -> None:
    layer = {"base": ["tiny"], "set": {"optim.lr": 2e-4}}
    assert [m.spec.run.seed for m in swept(layer, seeds=3)] == [0, 1, 2]
    assert table(swept(layer, grid={"run.seed": [11, 5]}), "seed") == [("tiny-11", 11), ("tiny-5", 5)]
    with pytest.raises(SpecError, match="seeds are in `seeds`"):
        swept(layer, grid={"run.seed": [11, 5]}, seeds=2)


@settings(max_examples=30, deadline=None)
@given(
    low=st.lists(st.sampled_from([0.05, 0.1, 0.2, 1.0]), min_size=1, max_size=3, unique=True),
    high=st.lists(st.sampled_from([0.1, 0.3, math.inf]), min_size=1, max_size=3, unique=True),
    seeds=st.integers(1, 3),
)
def test_every_combination_once_whatever_the_grid(low: list[float], high: list[float], seeds: int) -> None:
    members = swept({"base": ["tiny"]}, grid={"clip.low": low, "clip.high": high}, seeds=seeds)
    found = [(m.spec.clip.low, m.spec.clip.high, m.spec.run.seed) for m in members]
    assert len(found) == len(set(found))
    assert set(found) == set(product(low, high, range(seeds)))
    assert len({m.name for m in members}) == len({m.identity for m in members}) == len(members)


@pytest.mark.parametrize("name", sweep_names())
def test_every_sweep_loads_and_its_commands_mean_what_it_says(name: str) -> None:
    """A member's command, read as the command line reads it, is its spec."""
    sweep = resolve_sweep(preset_sweep(name))
    members = expand(sweep)
    assert sweep_text(name).startswith("# Fig. ")
    assert sweep.views
    assert default_name(name, sweep) == name
    for member in members:
        words = shlex.split(shlex.join(member.command))
        assert words[:2] == ["train", "--preset"]
        sets = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
        assert resolve_spec(preset_layer(words[2]), nest(dict(map(parse_assignment, sets)))) == member.spec


@pytest.mark.parametrize(
    "value", [0.1, 1e-5, math.inf, 3, True, 'a "quoted" \'é\n\t\x7f', "inf", [1, 2.5], ["a", "b"], (0.9, 0.95)]
)
def test_values_as_toml(value: Any) -> None:
    read = parse_assignment(f"run.x={toml_text(value)}")[1]
    assert read == (list(value) if isinstance(value, tuple) else value)
    assert type(read) is type(value) or isinstance(value, tuple)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("clip.high=0.2,inf", [0.2, math.inf]),
        ("clip.high=inf", [math.inf]),
        ("reward.kind=bernoulli,normal", ["bernoulli", "normal"]),
        ("model.path=a/b,'c,d'", ["a/b", "'c", "d'"]),
        ("model.path='a,b','c'", ["a,b", "c"]),
        ("optim.betas=[0.9,0.95],[0.5,0.9]", [[0.9, 0.95], [0.5, 0.9]]),
        ("rollout.dynamic_sampling=true,false", [True, False]),
        ("run.seed=1,x", [1, "x"]),
    ],
)
def test_lists_of_the_command_line(text: str, values: list[Any]) -> None:
    assert parse_list(text)[1] == values


def test_identity_is_the_resolved_spec_without_name_and_checkpoints() -> None:
    one = load_spec("tiny", {"run.name": "a", "checkpoint.keep": 5})
    assert identity(one) == identity(load_spec("tiny", {"run.name": "b"}))
    # The same values from another preset and other keys are the same run.
    assert identity(load_spec("tiny", {"reward.kind": "bernoulli"})) == identity(load_spec("tiny-random"))
    for key, value in {
        "run.seed": 1,
        "run.steps": 41,
        "eval.k": 4,
        "clip.high": math.inf,
        "store.texts": False,
    }.items():
        assert identity(load_spec("tiny", {key: value})) != identity(one), key


def test_a_spec_that_comes_twice_is_one_run() -> None:
    members = swept({"base": ["tiny"], "zip": {"clip.low": [0.1, 0.2], "clip.high": [0.1, 0.1]}, "names": ["a", "b"]})
    assert [member.name for member in members] == ["a-0", "b-0"]
    twice = swept({"base": ["tiny"], "zip": {"clip.low": [0.1, 0.1], "clip.high": [0.1, 0.1]}, "names": ["a", "b"]})
    assert [member.name for member in twice] == ["a-0"]


SIX = {
    "loss.aggregation": ["token_mean", "sequence_mean"], "optim.responses_per_update": [64, 128],
    "rollout.temperature": [0.6, 1.0], "optim.weight_decay": [0.0, 0.125], "clip.low": [0.1, 0.123], "clip.high": [0.2, 0.234],
}  # fmt: skip


def test_a_large_grid_has_names_that_are_cut_and_told_apart_by_a_hash() -> None:
    members = swept({"base": ["tiny"]}, grid=SIX, seeds=2)
    assert len({member.name for member in members}) == len(members) == 128
    assert all(NAME_PATTERN.fullmatch(member.name) and len(member.name) <= 82 for member in members)
    # The seeds of an arm have one name, of which every arm has its own.
    arms = {member.name.rsplit("-", 1)[0] for member in members}
    assert len(arms) == 64
    long = members[-1]
    beginning = "aggregationsequence_mean-responsesperupdate128-temperature1-weightdecay0.125-low"
    assert re.fullmatch(rf"{re.escape(beginning[:71])}[a-z0-9.]*-[0-9a-f]{{8}}-1", long.name), long.name
    # A name that is cut is that of its spec, whatever else is swept, and however long the run is to be.
    last = {key: [values[-1]] for key, values in SIX.items()}
    assert swept({"base": ["tiny"]}, grid=last, seeds=(1,))[0].name == long.name
    assert swept({"base": ["tiny"], "set": {"run.steps": 99, "eval.k": 4}}, grid=last, seeds=(1,))[0].name == long.name
    assert swept({"base": ["tiny"], "set": {"optim.lr": 9e-5}}, grid=last, seeds=(1,))[0].name != long.name


def test_values_that_look_alike_are_told_apart_and_the_other_names_stay() -> None:
    alike = swept({"base": ["tiny"]}, grid={"clip.low": [0.1234567, 0.1234568, 0.1]})
    assert [re.sub("[0-9a-f]{8}", "#", member.name) for member in alike] == ["low0.123457-#-0"] * 2 + ["low0.1-0"]
    assert alike[0].name != alike[1].name
    assert [member.name for member in swept({"base": ["tiny"]}, grid={"clip.low": [0.1234567]})] == ["low0.123457-0"]
    files = swept({"base": ["tiny"], "zip": {"data.path": ["a/x.jsonl", "b/x.jsonl"]}})
    assert [re.sub("[0-9a-f]{8}", "#", member.name) for member in files] == ["pathx.jsonl-#-0"] * 2


def test_runs_that_differ_in_what_may_change_alone_are_told_apart_too(tmp_path: Path) -> None:
    for k in (2, 4):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "x.toml").write_text(f'[model]\npath = "tiny"\n[eval]\nk = {k}\n')
    members = swept({"base": [str(tmp_path / "2" / "x.toml"), str(tmp_path / "4" / "x.toml")]})
    assert [re.sub("[0-9a-f]{16}", "#", member.name) for member in members] == ["x-#-0"] * 2
    assert members[0].name != members[1].name


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6, unique=True),
    names=st.lists(st.text("abc_/-", min_size=60, max_size=130), min_size=1, max_size=3, unique=True),
)
def test_any_grid_has_names_that_are_allowed_and_its_own(values: list[float], names: list[str]) -> None:
    members = swept({"base": ["tiny"]}, grid={"clip.low": values, "data.path": names}, seeds=(2**63 - 1,))
    assert len({member.name for member in members}) == len(members) == len(values) * len(names)
    assert all(NAME_PATTERN.fullmatch(member.name) for member in members)


def test_figures_share_runs() -> None:
    runs = {name: {member.identity for member in swept(preset_sweep(name))} for name in sweep_names()}
    assert runs["fig1"] == runs["fig2"]
    assert runs["fig1-small"] == runs["fig2-small"]
    assert len(runs["fig1-small"] & runs["fig3-small"] & runs["fig4-left-small"] & runs["fig4-right-small"]) == 5
    assert runs["fig7"] == runs["fig10"] > runs["fig9"]
    assert runs["fig6-small"] < runs["fig5-small"]
    assert runs["fig4"] == runs["fig4-left"] | runs["fig4-right"]
    assert len(runs["fig4"]) == 6


def test_small_sweeps_are_overlays_on_seeds_of_their_own() -> None:
    small = [name for name in sweep_names() if name.endswith("-small")]
    assert {f"fig{figure}-small" for figure in ("1", "2", "3", "4-left", "4-right", "5", "6")} <= set(small)
    for name in small:
        assert f'over = "{name.removesuffix("-small")}"' in sweep_text(name)
        assert resolve_sweep(preset_sweep(name)).views == resolve_sweep(preset_sweep(name.removesuffix("-small"))).views
        assert {member.spec.run.seed for member in swept(preset_sweep(name))} == {300, 301, 302, 303, 304}
        assert all(member.spec.engine.device == "cpu" for member in swept(preset_sweep(name)))


def test_a_sweep_file_and_a_run_spec_are_told_apart(tmp_path: Path) -> None:
    sweep = tmp_path / "mine.toml"
    sweep.write_text('base = ["tiny"]\nseeds = 2\n[set]\noptim.lr = 2e-4\n[grid]\nclip.low = [0.1, 0.2]\n')
    members = swept(file_sweep(sweep))
    assert [member.name for member in members] == ["low0.1-0", "low0.2-0", "low0.1-1", "low0.2-1"]
    assert {member.spec.optim.lr for member in members} == {2e-4}
    run = tmp_path / "run.toml"
    run.write_text('[model]\npath = "tiny"\n[optim]\nresponses_per_update = 64\n[run]\nseed = 3\n')
    (member,) = swept(file_sweep(run))
    assert (member.name, member.command[:3]) == ("run-3", ("train", "--spec", str(run)))
    assert default_name(str(run), resolve_sweep(file_sweep(run))) == "run-seeds"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"base": []}, "base: missing"),
        ({"base": ["tinny"]}, "did you mean tiny"),
        ({"base": ["tiny"], "seed": 3}, r"seed: unknown key \(did you mean seeds\?\)"),
        ({"base": ["tiny"], "grid": {"clip.lo": [1.0]}}, r"lo1-0: clip\.lo: unknown key \(did you mean clip\.low\?\)"),
        ({"base": ["tiny"], "grid": {"clip.low": [3.0]}}, r"low3-0: clip\.low: input should be less than"),
        ({"base": ["tiny"], "grid": {"clip.low": []}}, r"^grid\.clip\.low: input should be a list of at least 1 value, found"),
        ({"base": ["tiny"], "grid": 3}, r"^grid: takes keys with values, as a table of TOML, found 3$"),
        ({"base": ["tiny"], "set": "a"}, r"^set: takes keys with values, as a table of TOML, found 'a'$"),
        ({"base": ["tiny"], "zip": ["a"]}, r"^zip: takes keys with values, as a table of TOML, found \['a'\]$"),
        ({"base": ["tiny"], "seeds": "x"}, "^seeds: input should be a whole number, or a list, found 'x'$"),
        ({"base": ["tiny"], "seeds": 0}, "^seeds: input should be greater than or equal to 1, or a list, found 0$"),
        ({"base": ["tiny"], "seeds": [1, "a"]},
         r"^seeds: input should be a whole number, or a list of which each value is a whole number, found \[1, 'a'\]$"),
        ({"base": ["tiny"], "seeds": []}, "^seeds: input should be a whole number, or a list of at least 1 value, found"),
        ({"base": ["tiny"], "slurm": {"time": 1.5}},
         r"^slurm\.time: input should be a string, or a whole number, or true or false, found 1\.5$"),
        ({"base": ["tiny"], "slurm": {"str": 1.5}}, r"^slurm\.str: input should be a string"),
        ({"base": ["tiny"], "views": [{"by": ["clip.low"]}]}, r"^views\.view: missing; each of views needs it$"),
        ({"base": ["tiny"], "zip": {"clip.low": [0.1, 0.2], "clip.high": [0.1]}}, "zip: lists of one length, found clip"),
        ({"base": ["tiny"], "zip": {"clip.low": [0.1]}, "names": ["a", "b"]}, "2 names for 1 rows"),
        ({"base": ["tiny"], "zip": {"clip.low": [0.1]}, "names": ["../a"]}, "is not allowed"),
        ({"base": ["tiny"], "set": {"clip.low": 0.1}, "grid": {"clip.low": [0.2]}}, "clip.low has a value in set already"),
        ({"base": ["tiny"], "zip": {"reward": [{"kind": "normal"}]}, "grid": {"reward.p": [0.1]}}, "has a value in zip already"),
        ({"base": ["tiny"], "set": {"run.name": "x"}}, "names its runs itself"),
        ({"base": ["tiny"], "zip": {"clip.low": [0.1, 0.2]}, "names": ["a", "a"]}, "names: 'a' is given twice"),
        ({"include": ["fig44"]}, "did you mean fig4"),
        ({"base": ["tiny"], "views": [{"view": "entroppy"}]}, "views.view: input should be .*'entropy'.*found 'entroppy'"),
        ({"base": ["tiny"], "views": [{"view": "entropy", "by": ["clip.low", "clip.hihg"]}]},
         r"^views\.by: clip\.hihg: unknown key \(did you mean clip\.high\?\)$"),
        ({"base": ["tiny"], "views": [{"view": "entropy", "by": ["seed"]}]}, r"seed: unknown key \(did you mean run\.seed\?\)"),
        ({"base": ["tiny"], "views": [{"view": "entropy", "k": 8}]}, r"^views\.k: belongs to passk, frontier, not to entropy$"),
        ({"base": ["tiny"], "views": [{"view": "passk", "rollouts": True}]}, "rollouts: belongs to ledger, not to passk"),
        ({"include": ["fig4"], "grid": {"clip.low": [0.1]}}, "only includes others"),
    ],
)  # fmt: skip
def test_what_is_refused(layer: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as error:
        swept(layer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seeds = 2\n[grid]\nclip.low = [0.1]\n", r"^base: missing; name one or more presets"),
        ('over = "fig3"\nset = 1\n', "^set: takes keys with values"),
        ("[grid]\nclip.low = 0.1\n", r"^grid\.clip\.low: takes a list"),
    ],
)
def test_sweep_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(SpecError, match=words):
        swept(file_sweep(tmp_path / "x.toml"))


def test_what_the_command_line_refuses() -> None:
    for text in ("clip.low", "clip.low=", "clip low=1"):
        with pytest.raises(SpecError, match="is not KEY=V1,V2"):
            parse_list(text)
    with pytest.raises(SpecError, match="has a value twice"):
        parse_list("clip.low=0.1,0.1")
    with pytest.raises(SpecError, match=r"--grid: clip.low is given twice; .*: --grid clip.low=V1,V2"):
        parse_lists(["clip.low=0.1", "optim.lr=1e-4", "clip.low=0.2"], "--grid")
    with pytest.raises(SpecError, match=r"no sweep or preset 'fig33' \(did you mean fig3\?\)"):
        preset_sweep("fig33")


@pytest.mark.parametrize(
    ("name", "seeds", "expected"),
    [
        ("fig3-small", None, {300, 301, 302, 303, 304}),
        ("fig3-small", 2, {300, 301}),
        ("fig3-small", (7, 9), {7, 9}),
        ("fig4-small", 1, {300}),
        ("fig4-small", None, {300, 301, 302, 303, 304}),
        ("fig3", None, {0}),
        ("fig3", 3, {0, 1, 2}),
        ("tiny", 2, {0, 1}),
    ],
)
def test_seeds_are_the_first_of_those_that_a_sweep_names(name: str, seeds: Any, expected: set[int]) -> None:
    assert {member.values["seed"] for member in swept(preset_sweep(name), seeds=seeds)} == expected


@pytest.mark.parametrize("name", ["fig3-small", "fig4-small"])
def test_more_seeds_than_a_sweep_names_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="--seeds: 6, and the sweep names 5: 300, 301, 302, 303, 304"):
        swept(preset_sweep(name), seeds=6)


@pytest.mark.parametrize("name", preset_names())
def test_runs_can_be_grouped_by_every_key_that_they_have(name: str) -> None:
    """Those of a run's stored spec are what the views know."""
    (member,) = swept({"base": [name]})
    stored = flat_spec(spec_json(member.spec))
    assert resolve_sweep({"base": [name], "views": [{"view": "entropy", "by": list(stored)}]}).views[0].by == tuple(
        stored
    )


def test_a_sweep_can_be_drawn_by_every_view() -> None:
    assert get_args(ViewName) == tuple(VIEW_NAMES)
    assert {key.removesuffix("s"): views for key, views in OPTION_OF.items()} == {
        key.removesuffix("s"): ANALYZE_OPTION_OF[key] for key in ("rollouts", "k", "benchmark")
    }


@pytest.mark.parametrize("name", sweep_names())
def test_what_is_drawn_is_measured(name: str) -> None:
    """By every run of a sweep: the benchmarks, and at least k samples of each problem."""
    sweep = resolve_sweep(preset_sweep(name))
    for member, shown in product(expand(sweep), sweep.views):
        assert set(shown.benchmarks) <= set(member.spec.eval.benchmarks)
        assert (shown.k or 1) <= member.spec.eval.k


def test_no_sweep_is_named_like_a_preset() -> None:
    assert not set(sweep_names()) & set(preset_names())


def test_the_sweep_file_in_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"\n\n((?:    base = .*\n)(?:    .*\n|\n)+)", readme)
    file = tmp_path / "mine.toml"
    file.write_text(re.sub(r"^    ", "", block, flags=re.MULTILINE))
    members = swept(file_sweep(file))
    assert [member.name for member in members[:3]] == ["symmetric-300", "no-clip-high-300", "symmetric-301"]
    assert {member.spec.run.steps for member in members} == {20}


def test_a_run_keeps_its_identity_when_keys_come_that_do_what_it_did() -> None:
    """As it was recorded before `engine.statistics` was there."""
    assert identity(load_spec("tiny", {})) == "4dea30908918f71a"
    on_gpu = [load_spec("tiny", {"engine.device": "cuda", "engine.statistics": way}) for way in ("torch", "triton")]
    assert len({identity(spec) for spec in on_gpu}) == 2
