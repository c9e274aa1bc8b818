"""clipctl: RL with verifiable rewards where clipping is the instrument. Public names load on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "token_statistics": "statistics",
    "TokenStatistics": "statistics",
    "group_advantages": "algo",
    "clipped_surrogate": "algo",
    "ClipCounts": "algo",
    "pass_at_k": "algo",
    "grade": "rewards",
    "entropy_ledger": "ledger",
    "EntropyLedger": "ledger",
    "load_spec": "spec",
    "RunSpec": "spec",
    "open_runs": "notebook",
    "Runs": "store",
}

_MODULES = ("theory", "train")
"""Public as modules; `clipctl.train` can also be called, see its last lines."""

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"clipctl.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clipctl' has no attribute {name!r}")
    return getattr(import_module(f"clipctl.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
