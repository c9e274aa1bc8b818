"""The Triton kernels, run by Triton's interpreter on the CPU, against float64 and beside the plain operations."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from clipctl.engine.triton_setup import check_triton
from clipctl.errors import DependencyError, SpecError
from clipctl.spec import load_spec

LAB = Path(__file__).parent / "kernels_lab.py"


def errors(kernels: str) -> list[dict[str, float]]:
    done = subprocess.run([sys.executable, str(LAB), kernels], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_statistics_and_gradients_against_float64(kernels: str) -> None:
    """Both ways keep the same bounds: several parts of tokens and of the vocabulary, cut blocks, three temperatures."""
    pytest.importorskip("triton")
    found = errors(kernels)
    assert len(found) == 24
    for case in found:
        bound = 3e-3 if case["half"] else 1e-5
        assert max(case["hidden"], case["head"]) < bound, case
        assert max(case[name] for name in case if name.endswith("_T")) < 1e-5, case


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(capability: int) -> None:
    """To machine code, for which no GPU is needed: every variant, and the interpreter takes more than the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clipctl import kernels

    numbers = {"start": "i32", "size": "i32", "temperature": "fp32"}
    sums = {"logits": "*fp32", "sums": "*fp32", "targets": "*i64", "rows": "i32"} | numbers
    gradient = dict.fromkeys(("logits", "lse", "slope", "offset", "pull"), "*fp32") | {"targets": "*i64"} | numbers
    asked: list[tuple[Any, dict[str, str], dict[str, Any]]] = [(kernels._add_sums, sums, {})]
    for out, slope, pull in product(("*fp32", "*bf16"), (True, False), (True, False)):
        chosen = {"HAS_SLOPE": slope, "HAS_PULL": pull}
        asked.append((kernels._logit_gradient, gradient | {"out": out}, chosen))
    for kernel, signature, chosen in asked:
        constants = chosen | {"BLOCK": kernels.BLOCK}
        ordered = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"].startswith(b"\x7fELF")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be built here")
def test_what_cannot_be_built_is_one_line_with_its_remedy() -> None:
    """Without its interpreter Triton finds no GPU here, as it finds no compiler elsewhere."""
    with pytest.raises(
        DependencyError, match=r"engine\.statistics = 'triton': its kernels cannot be built here"
    ) as caught:
        check_triton("cpu")
    assert "\n" not in str(caught.value)
    assert "--set engine.statistics=torch" in str(caught.value)


def test_kernels_need_a_gpu() -> None:
    with pytest.raises(SpecError, match="statistics = 'triton' needs device = 'cuda'"):
        load_spec("tiny", {"engine.statistics": "triton"})
