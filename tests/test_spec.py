"""Run specs: closed, frozen, put together in the stated order, refused in one line that names the field."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clipctl.errors import SpecError
from clipctl.layers import overlay
from clipctl.spec import (
    RunSpec,
    Vllm,
    flatten,
    load_spec,
    nest,
    parse_assignment,
    preset_layer,
    preset_names,
    resolve_spec,
    schema_json,
    spec_from_json,
    spec_json,
    spec_keys,
)

MODEL = {"model": {"path": "x"}}


def refusal(*layers: dict[str, object]) -> str:
    with pytest.raises(SpecError) as caught:
        resolve_spec(MODEL, *layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ({"clip": {"lwo": 0.1}}, "clip.lwo: unknown key (did you mean clip.low?)"),
        ({"stpes": 3}, "stpes: unknown key (did you mean run.steps?)"),
        ({"reward": {"kind": "gsm8k", "p": 0.5}}, "reward.p: not a key of reward.kind = 'gsm8k', only of bernoulli"),
        ({"clip": {"low": 1.5}}, "clip.low: input should be less than or equal to 1, found 1.5"),
        ({"clip": {"low": -0.1}}, "clip.low: input should be greater than or equal to 0, found -0.1"),
        ({"clip": {"high": math.nan}}, "clip.high: input should be greater than or equal to 0, found nan"),
        ({"clip": {"low": "0.1"}}, "clip.low: input should be a number, found '0.1'"),
        ({"run": {"steps": True}}, "run.steps: input should be a whole number, found True"),
        ({"run": {"seed": 2**63}}, "run.seed: input should be less than or equal to 9223372036854775807"),
        ({"optim": {"lr": math.inf}}, "optim.lr: input should be a finite number, found inf"),
        (
            {"reward": {"kind": "normal", "wrong": 0.5}},
            "reward.wrong: not a key of reward.kind = 'normal', only of gsm8k, math",
        ),
        ({"reward": {"kind": "bernouli"}}, "reward.kind: 'bernouli' is not one of gsm8k, math, bernoulli"),
        ({"reward": {"kind": "bernouli"}}, "(did you mean bernoulli?)"),
        ({"reward": {"kind": "bernoulli", "p": 1.5}}, "reward.p: input should be less than or equal to 1, found 1.5"),
        ({"reward": {"kind": "function"}}, "reward.function: missing; give it in the spec file or with --set"),
        ({"store": {"tokens": 3}}, "store.tokens: input should be 'none' or 'all', or less than 1, found 3"),
        (
            {"store": {"tokens": "some"}},
            "store.tokens: input should be 'none' or 'all', or a number, found 'some'",
        ),
        ({"clp": {"low": 0.1}}, "clp: unknown key (did you mean clip?)"),
        ({"data": {"arith": {"styl": "words"}}}, "data.arith.styl: unknown key (did you mean data.arith.style?)"),
        ({"clip": 0.2}, "clip: is a group of keys (clip.low, clip.high), found 0.2"),
        ({"model": {"path": ""}}, "model.path: input should be a string that is not empty, found"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: too few values, found [0.9]"),
        (
            {"optim": {"betas": [0.9, 0.8, 0.7]}},
            "optim.betas: input should be a list of at most 2 values, found [0.9, 0.8",
        ),
        ({"checkpoint": {"keep": 1.5}}, "checkpoint.keep: input should be 'all', or a whole number, found 1.5"),
        ({"reward": {"kind": "bernoulli", "bernoulli": 1}}, "reward.bernoulli: unknown key"),
        ({"optim": {"betas": [0.9, 1.5]}}, "optim.betas: input should be less than 1, found 1.5"),
        ({"eval": {"benchmarks": ["gsm8k", 3]}}, "eval.benchmarks: input should be a string, found 3"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: input should be greater than or equal to 2, found 1"),
        ({"reward": {"kind": "function", "function": "nothing"}}, "function = 'nothing' is not an import path"),
        ({"loss": {"constant": 10}}, "constant = 10 has no effect with aggregation = 'token_mean'"),
        ({"reward": {"correct": 0.5}}, "reward.kind: missing; one of gsm8k, math"),
        ({"reward": {"kind": "gsm8k", "correct": 0.0}}, "correct = 0.0 must be above wrong = 0.0"),
        ({"rollout": {"overlong_buffer": 4096}}, "overlong_buffer = 4096 must be below max_response_tokens = 4096"),
        (
            {"loss": {"objective": "reinforce"}},
            "loss.objective = 'reinforce' is unbiased for one update a rollout only",
        ),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p = 0.9"),
    ],
)
def test_impossible_values_are_refused_by_name(layer: dict[str, object], line: str) -> None:
    assert line in refusal(layer)


JARGON = re.compile(
    r"tuple|constrained|dict|validation|instance|function-|is-|\bvalid\b|union|NoneType|parse|\.(str|int|bool|float)\b"
)


@pytest.mark.parametrize("value", ["x", "", -1, 10**30, 1.5, -math.inf, True, [], ["x", 3], [1.5, 2, 3], {}, {"x": 1}])
def test_no_refusal_speaks_of_python(value: object) -> None:
    """Whatever key has it, the line names that key."""
    for key in spec_keys():
        layer = overlay({"model": {"path": "tiny"}, "reward": {"kind": "bernoulli"}}, nest({key: value}))
        try:
            resolve_spec(layer)
        except SpecError as error:
            line = str(error)
            assert not JARGON.search(line.split(", found ")[0].replace(key, "")), line
            assert key.split(".")[0] in line
            assert "\n" not in line


def test_a_group_is_never_split_and_updates_divide_the_rollout() -> None:
    assert "responses_per_update = 20 would split a group" in refusal({"optim": {"responses_per_update": 20}})
    assert "responses_per_update = 24 does not divide the 512 responses" in refusal(
        {"optim": {"responses_per_update": 24}}
    )


@pytest.mark.parametrize("layers", [(), ({"model": {}},), ({"model": {"dtype": "float32"}},)])
def test_a_missing_model_names_the_flag(layers: tuple[dict[str, object], ...]) -> None:
    with pytest.raises(SpecError, match=r"^model\.path: missing; give --model, or start from a --preset or a --spec"):
        resolve_spec(*layers)


@pytest.mark.parametrize("value", ["none", "all", 0.25])
def test_per_token_rows_of_none_all_or_a_share(value: str | float) -> None:
    assert resolve_spec(MODEL, {"store": {"tokens": value}}).store.tokens == value


@pytest.mark.parametrize("name", ["a/b", "../a", "/a", ".a", "-a", "", "a b", "a\nb", "é", "a" * 101])
def test_run_names_are_plain_folder_names(name: str) -> None:
    assert "run.name" in refusal({"run": {"name": name}})


def test_updates_per_rollout() -> None:
    layer = {"rollout": {"prompts": 6, "group_size": 4}, "optim": {"responses_per_update": 8, "epochs": 5}}
    assert resolve_spec(MODEL, layer).updates_per_rollout == 15


def test_specs_are_frozen() -> None:
    spec = resolve_spec(MODEL)
    with pytest.raises(ValidationError):
        spec.clip.low = 0.5  # type: ignore[misc]


def test_later_layers_win_and_others_stay() -> None:
    spec = resolve_spec(MODEL, {"clip": {"low": 0.3, "high": 0.4}}, {"clip": {"low": 0.1}})
    assert (spec.clip.low, spec.clip.high) == (0.1, 0.4)


def test_another_kind_replaces_the_whole_group() -> None:
    spec = resolve_spec(MODEL, {"reward": {"kind": "math", "workers": 7}}, {"reward": {"kind": "bernoulli"}},
                        {"reward": {"p": 0.25}})  # fmt: skip
    assert spec.reward.model_dump() == {"kind": "bernoulli", "p": 0.25}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("clip.high=inf", "clip.high", math.inf),
        ("optim.lr=1e-6", "optim.lr", 1e-6),
        ("run.steps = 3", "run.steps", 3),
        ("data.path=/a/b=c.jsonl", "data.path", "/a/b=c.jsonl"),
        ('data.task="gsm8k"', "data.task", "gsm8k"),
        ("eval.benchmarks=['a', 'b']", "eval.benchmarks", ["a", "b"]),
        ("rollout.dynamic_sampling=true", "rollout.dynamic_sampling", True),
    ],
)
def test_assignments_are_toml_or_plain_text(text: str, key: str, value: object) -> None:
    assert parse_assignment(text) == (key, value)


@pytest.mark.parametrize("text", ["clip.low", "=3", ".=3", "clip..low=3", "clip low=3", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"is not KEY=VALUE, such as clip\.low=0\.15"):
        parse_assignment(text)


def test_dotted_keys_nest() -> None:
    assert nest({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    with pytest.raises(SpecError, match="a is a value, not a group"):
        nest({"a": 1, "a.b": 2})


@given(st.floats(0, 1), st.floats(0, allow_nan=False, allow_infinity=True), st.floats(1e-12, 1))
def test_json_round_trips(low: float, high: float, lr: float) -> None:
    spec = resolve_spec(MODEL, {"clip": {"low": low, "high": high}, "optim": {"lr": lr, "betas": [0.8, 0.9]}})
    assert spec_from_json(spec_json(spec)) == spec
    assert "null" not in json.dumps(json.loads(spec_json(spec))["clip"])


def test_flatten_gives_dotted_keys() -> None:
    flat = flatten(resolve_spec(MODEL, {"clip": {"high": math.inf}}))
    assert flat["clip.high"] == math.inf
    assert flat["data.arith.style"] == "words"


def test_the_schema_accepts_every_preset_and_refuses_unknown_keys() -> None:
    schema = json.loads(schema_json())
    for name in preset_names():
        jsonschema.validate(preset_layer(name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(MODEL | {"clip": {"lwo": 0.1}}, schema)


def test_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[model]\npath = "x"\n[clip]\nhigh = inf\n')
    assert load_spec(file, {"clip.low": 0.1}).clip.model_dump() == {"low": 0.1, "high": math.inf}
    file.write_text("[model\n")
    with pytest.raises(SpecError, match=r"mine\.toml' is not readable as TOML"):
        load_spec(str(file))


def test_every_field_says_what_it_is() -> None:
    """The schema is the reference of a spec, so no field may be without a description where its name does not say it."""
    by_their_name = {"data.arith", "optim.betas", "optim.eps", "optim.weight_decay", "engine.device"}
    undocumented = {
        f"{group}.{name}"
        for group, field in RunSpec.model_fields.items()
        if group not in ("eval", "reward")
        for name, inner in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if not inner.description
    }
    assert undocumented == by_their_name
    assert all(field.description for field in Vllm.model_fields.values())


def test_keys_of_vllm_need_vllm() -> None:
    with pytest.raises(SpecError, match=r"engine\.vllm: its keys have no effect with sampler = 'torch'"):
        load_spec("tiny", {"engine.vllm.rebuilds": 3})
    with pytest.raises(SpecError, match=r"engine\.vllm\.tensor_parallel = 2 needs device = 'cuda'"):
        load_spec("tiny", {"engine.sampler": "vllm", "engine.vllm.tensor_parallel": 2})
    assert load_spec("tiny", {"engine.sampler": "vllm", "engine.vllm.rebuilds": 3}).engine.vllm.rebuilds == 3


def test_the_spec_loads_without_torch() -> None:
    code = "import sys, clipctl; clipctl.load_spec('tiny'); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
