"""Layers of a spec: nested mappings over one another, and their dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from clipctl.errors import SpecError


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, later ones over earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _overlay(merged, layer)
    return merged


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested dicts: `{"clip.low": 0.1}` to `{"clip": {"low": 0.1}}`."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *groups, key = dotted.split(".")
        place = nested
        for group in groups:
            child = place.setdefault(group, {})
            if not isinstance(child, dict):
                raise SpecError(f"{dotted}: {group} is a value, not a group")
            place = child
        place[key] = value
    return nested


def leaves(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings, the inverse of `nest`; lists are values."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping) and not _changes_kind(under, value):
            merged[key] = _overlay(under, value)
        else:
            merged[key] = value
    return merged


def _changes_kind(under: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return bool(value.get("kind", under.get("kind")) != under.get("kind"))
