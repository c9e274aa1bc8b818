"""Looks at one thing that may crash, hang or take long, in a process of its own: then it costs `clipctl doctor` a line.

    python machine_probe.py NAME

writes one JSON object to stdout, `{"facts": {…}}` or `{"error": [the exception, then its causes, each in a line]}`. It needs
the standard library and what it looks at, and nothing of clipctl.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

Facts = dict[str, Any]
IMPORTS = {
    "transformers": ("transformers", "LlamaForCausalLM"),
    "vllm": ("vllm", "LLM"),
    "deepspeed": ("deepspeed", "initialize"),
    "math_verify": ("math_verify", "verify"),
    "submitit": ("submitit", "AutoExecutor"),
    "torchvision": ("torchvision", "ops"),
    "gmpy2": ("gmpy2", "mpz"),
}
"""Module, and a name of it that loads what a run would use."""


def look_at_torch() -> Facts:
    import torch

    return {"version": torch.__version__, "threads": torch.get_num_threads()}


def look_at_cuda() -> Facts:
    """What torch sees, after a product on each device: a build without kernels for a card fails only there."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    devices = []
    for at in range(torch.cuda.device_count() if available else 0):
        ones = torch.ones(16, 16, device=f"cuda:{at}", dtype=torch.bfloat16)
        assert float((ones @ ones).sum()) == 4096.0
        about = torch.cuda.get_device_properties(at)
        free, total = torch.cuda.mem_get_info(at)
        devices.append(
            {"name": about.name, "capability": [about.major, about.minor], "total": total, "free": free}
        )  # fmt: skip
    return {
        "built_for": torch.version.cuda,
        "available": available,
        "warning": str(told[0].message).splitlines()[0] if told else "",
        "devices": devices,
    }


def look_at_hub() -> Facts:
    """One short try: the hub's own client would retry for 20 s before it says that there is no network."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, get_token

    facts: Facts = {
        "endpoint": constants.ENDPOINT,
        "offline": constants.HF_HUB_OFFLINE,
        "token": get_token() is not None,
    }
    if facts["offline"]:
        return facts | {"reachable": False, "reason": "HF_HUB_OFFLINE is set"}
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=4).close()
    except HTTPError:
        return facts | {"reachable": True, "reason": ""}  # It answered.
    except (OSError, ValueError) as error:
        return facts | {"reachable": False, "reason": first_line(getattr(error, "reason", error))}
    return facts | {"reachable": True, "reason": ""}


def look_at_import(name: str) -> Facts:
    module, part = IMPORTS[name]
    if find_spec(module) is None:
        return {"installed": False}
    found = import_module(module)
    getattr(found, part)
    return {"installed": True, "version": version_of(name) or str(getattr(found, "__version__", ""))}


def version_of(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def chain(error: BaseException) -> list[str]:
    """The exception and what caused it, outermost first, each in a line."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None and len(lines) < 16:
        lines.append(f"{type(at).__name__}: {first_line(at)}")
        at = at.__cause__ or at.__context__
    return lines


def first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


PROBES: dict[str, Callable[[], Facts]] = {"torch": look_at_torch, "cuda": look_at_cuda, "hub": look_at_hub}


def main(name: str) -> None:
    # What a library prints while it loads must not be taken for the answer.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    answer: dict[str, Any]
    try:
        answer = {"facts": PROBES[name]() if name in PROBES else look_at_import(name)}
    except BaseException as error:
        answer = {"error": chain(error)}
    os.write(answer_to, json.dumps(answer).encode())
    # Threads and exit handlers of what was loaded are not waited for.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
