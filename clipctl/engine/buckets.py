"""Things that are handled together, as many at a time as a limit allows: gradients, gathered weights, files of weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def buckets(things: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The things in their order, as many at a time as their sizes reach `limit` together; a larger one is alone."""
    held: list[T] = []
    total = 0
    for thing in things:
        if held and total + size(thing) > limit:
            yield held
            held, total = [], 0
        held.append(thing)
        total += size(thing)
    if held:
        yield held
