"""A series in a few characters of text."""

from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The series in at most `width` characters, lowest to highest value; a character is the mean of its stretch.

    None is a gap. A constant series is a line at mid height, an empty one an empty string.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    count = min(width, len(values))
    bounds = [round(at * len(values) / count) for at in range(count + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(bounds)]
    heights = [value for value in means if value is not None]
    low, span = min(heights), max(heights) - min(heights)
    return "".join(
        " "
        if value is None
        else BARS[len(BARS) // 2]
        if span == 0
        else BARS[round((value - low) / span * (len(BARS) - 1))]
        for value in means
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
