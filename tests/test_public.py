"""The public names of the package: lazily imported, and what the contract says they are."""

import inspect
import subprocess
import sys

import pytest

import clipctl

SIGNATURES = {
    "token_statistics": "hidden_TD head_VD targets_T temperature kernels",
    "group_advantages": "rewards_PG",
    "clipped_surrogate": "logprob old_logprob advantages mask eps_low eps_high",
    "entropy_ledger": "logprob old_logprob advantages entropy expected_q mask eps_low eps_high weight",
    "pass_at_k": "num_samples num_correct k",
    "grade": "kind completion answer",
    "load_spec": "preset_or_path overrides",
    "open_runs": "paths",
}


def test_import_clipctl_is_light() -> None:
    code = "import sys, clipctl; heavy = {'torch', 'numpy', 'pydantic', 'duckdb', 'pyarrow'} & set(sys.modules); assert not heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert list(inspect.signature(getattr(clipctl, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.parametrize("name", clipctl.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(clipctl, name) is not None
    assert name in dir(clipctl)


def test_train_is_a_function_however_often_it_is_named() -> None:
    assert callable(clipctl.train)
    assert callable(clipctl.train)
    assert callable(clipctl.train.train)


def test_theory_is_a_module() -> None:
    for name in ("first_order", "exact_change"):
        assert "pi_old" in inspect.signature(getattr(clipctl.theory, name)).parameters


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        clipctl.nothing  # noqa: B018
