"""`clipctl analyze PATH --follow`: runs as they go, drawn again every second on a terminal, a line per rollout elsewhere.

It reads what `clipctl.watch` reads and nothing of it reaches the run. On a terminal q or Ctrl-C ends it.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipctl.formats import safe_text
from clipctl.sparkline import sparkline
from clipctl.watch import Event, Rollout, Snapshot, Watcher

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

SECONDS = 1.0
"""Between two looks at the folders."""
EVENTS = 6
"""Last events that are shown."""
GAP = 2
"""Characters between columns."""
SPARKLINE = "entropy over rollouts"
STYLES = {"running": "bold green", "finished": "green", "interrupted": "yellow", "stopped": "yellow"}
"""Of states; all others are red."""


def follow(paths: Sequence[Path]) -> None:
    """Shows the runs under the paths until q or Ctrl-C; not on a terminal, until all that are there have ended.

    Raises SpecError for a path that does not exist and a glob that nothing matches. A folder without runs is waited for.
    """
    watcher = Watcher(paths)
    with suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _on_terminal(watcher)
        else:
            for line in lines(watcher, lambda: time.sleep(SECONDS)):
                print(line, flush=True)


# --- a line per rollout -----------------------------------------------------------------------------------------------


def lines(watcher: Watcher, wait: Callable[[], None]) -> Iterator[str]:
    """What is new, as lines: of a run that is there already its last rollout, then every rollout and event, and how it
    ended. Ends when all runs have."""
    told: dict[Path, tuple[int, int, bool]] = {}
    while True:
        shots = watcher.look()
        for shot in shots:
            first = (max(len(shot.rollouts) - 1, 0), len(shot.events), False)
            rollouts, events, ended = told.get(shot.folder, first)
            yield from (f"{safe_text(shot.name)}  {_event_words(event)}" for event in shot.events[events:])
            yield from (f"{safe_text(shot.name)}  {_rollout_words(shot, one)}" for one in shot.rollouts[rollouts:])
            if shot.ended and not ended:
                yield f"{safe_text(shot.name)}  {_end_words(shot)}"
            told[shot.folder] = (len(shot.rollouts), len(shot.events), shot.ended)
        if shots and all(shot.ended for shot in shots):
            return
        wait()


def _rollout_words(shot: Snapshot, one: Rollout) -> str:
    return (
        f"rollout {one.rollout + 1}/{shot.steps or '?'}  reward {_number(one.reward, '.3f')}  "
        f"entropy {_number(one.entropy, '.3f')}  clip-low {_number(one.clip_low, '.2%')}  "
        f"clip-high {_number(one.clip_high, '.2%')}  {_number(one.tokens_per_second, '.0f')} tokens/s"
    )


def _event_words(event: Event) -> str:
    return f"{safe_text(event.kind)}: {safe_text(event.message)}"


def _end_words(shot: Snapshot) -> str:
    if shot.state == "crashed":
        return "crashed: its process is gone or silent; what it stored is kept"
    message = f": {safe_text(shot.message)}" if shot.message else ""
    broken = f"; {safe_text(shot.problem)}" if shot.problem else ""
    return f"{safe_text(shot.state or 'state unknown')} after {len(shot.rollouts)} rollouts{message}{broken}"


# --- a terminal -------------------------------------------------------------------------------------------------------


def _on_terminal(watcher: Watcher) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with _keys() as pressed, Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(screen(watcher.look(), _now(), console.width, console.height), refresh=True)
            if "q" in pressed(SECONDS).lower():
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits for so many seconds or a key, and returns what was typed; Ctrl-C stays an interrupt."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        yield (
            lambda seconds: (
                os.read(handle, 64).decode(errors="replace") if select.select([handle], [], [], seconds)[0] else ""
            )
        )
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def screen(shots: Sequence[Snapshot], now: datetime, width: int, height: int) -> "RenderableType":
    """One run in full, or a line for each of several. now: UTC. width, height: of the terminal, characters."""
    from rich.console import Group
    from rich.text import Text

    keys = Text("q or Ctrl-C ends this view; the run goes on", style="dim")
    if not shots:
        return Group(Text("no run here yet; waiting for one"), keys)
    return Group(one_run(shots[0], now, width) if len(shots) == 1 else many_runs(shots, now, width, height), keys)


def one_run(shot: Snapshot, now: datetime, width: int) -> "RenderableType":
    """State, progress, ETA, the series with their sparklines, and the last events."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((safe_text(shot.name), "bold"), "  ", (safe_text(shot.state or "?"), _style(shot)), "  ")
    head.append(f"{safe_text(shot.preset)}  ε_low {_eps(shot.eps[0])}  ε_high {_eps(shot.eps[1])}", style="dim")
    done = shot.rollouts[-1].rollout + 1 if shot.rollouts else 0
    progress = Text.assemble(f"rollout {done}/{shot.steps or '?'}  ", _bar(done, shot.steps or 0, 30), "  ")
    progress.append(_end_words(shot) if shot.ended else f"ETA {_duration(shot.seconds_left(now))}  {_pulse(shot, now)}")
    figures = Table.grid(padding=(0, 2))
    figures.add_column()
    figures.add_column(justify="right")
    figures.add_column(style="dim", no_wrap=True)
    figures.add_column(no_wrap=True, style="cyan")
    if shot.rollouts:
        for label, form, unit, values in _series(shot.rollouts):
            first, last = values[0], values[-1]
            then = f"first {_number(first, form)}" if len(values) > 1 else ""
            figures.add_row(label, f"{_number(last, form)}{unit}", then, sparkline(values, max(width - 48, 8)))
    parts: list[RenderableType] = [head, progress, figures]
    if shot.problem and not shot.ended:
        parts.append(Text(safe_text(shot.problem), style="red"))
    for event in shot.events[-EVENTS:]:
        line = Text(f"{event.time:%H:%M:%S}  ", style="dim", no_wrap=True, overflow="ellipsis")
        line.append(safe_text(event.kind), style="yellow" if event.kind == "alarm" else "")
        parts.append(line.append(f"  {safe_text(event.message)}"))
    return Group(*parts)


def _series(rollouts: Sequence[Rollout]) -> list[tuple[str, str, str, list[float | None]]]:
    """Label, format, unit and values of what is shown of a run."""
    return [
        ("entropy", ".4f", " nat", [one.entropy for one in rollouts]),
        ("reward", ".3f", "", [one.reward for one in rollouts]),
        ("clip-low", ".2%", "", [one.clip_low for one in rollouts]),
        ("clip-high", ".2%", "", [one.clip_high for one in rollouts]),
        ("response tokens", ".1f", "", [one.response_tokens for one in rollouts]),
        ("tokens/s", ".0f", "", [one.tokens_per_second for one in rollouts]),
    ]


def many_runs(shots: Sequence[Snapshot], now: datetime, width: int, height: int) -> "RenderableType":
    """A line a run, those that are running first; what the terminal has no room for is counted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    room = max(height - 5 - EVENTS // 2, 3)
    ordered = sorted(shots, key=lambda shot: shot.ended)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    columns = _columns(width)
    spare = width - sum(NEEDED[name] + GAP for name in columns)
    for name in columns:
        wide = NEEDED[name] + (max(spare, 0) if name == "run" else 0)
        justify: Any = "left" if name in ("run", "state", SPARKLINE) else "right"
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify=justify, max_width=wide)
    for shot in ordered[:room]:
        cells = _cells(shot, now)
        table.add_row(*(cells.get(name, Text("")) for name in columns))
    parts: list[RenderableType] = [table]
    if len(ordered) > room:
        parts.append(
            Text(f"and {len(ordered) - room} more, {sum(s.ended for s in ordered[room:])} of them ended", style="dim")
        )
    told = sorted(((event, shot.name) for shot in shots for event in shot.events), key=lambda pair: pair[0].time)
    for event, name in told[-(EVENTS // 2) :]:
        words = f"{event.time:%H:%M:%S}  {safe_text(name)}  {_event_words(event)}"
        parts.append(Text(words, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


NEEDED = {
    "run": 16, "state": 11, "rollout": 7, "entropy": 7, "clip-low": 8, "clip-high": 9, "reward": 6, SPARKLINE: 21, "ETA": 7,
    "tokens/s": 8, "heard of": 8,
}  # fmt: skip
"""Columns and the characters that they take, the ones that matter most first."""
ORDER = (
    "run",
    "state",
    "rollout",
    "ETA",
    "entropy",
    SPARKLINE,
    "reward",
    "clip-low",
    "clip-high",
    "tokens/s",
    "heard of",
)


def _columns(width: int) -> list[str]:
    """Those that fit the width, in their order."""
    sums = accumulate(needed + GAP for needed in NEEDED.values())
    fitting = {name for name, total in zip(NEEDED, sums, strict=True) if total <= width}
    return [name for name in ORDER if name in fitting | {"run"}]


def _cells(shot: Snapshot, now: datetime) -> "dict[str, Text]":
    from rich.text import Text

    words = {
        "rollout": f"0/{shot.steps or '?'}",
        "ETA": "" if shot.ended else _duration(shot.seconds_left(now)),
        "heard of": "" if shot.ended else _duration(_silence(shot, now)),
    }
    if shot.rollouts:
        last = shot.rollouts[-1]
        words |= {
            "rollout": f"{last.rollout + 1}/{shot.steps or '?'}",
            "entropy": _number(last.entropy, ".3f"),
            SPARKLINE: sparkline([one.entropy for one in shot.rollouts], 21),
            "reward": _number(last.reward, ".3f"),
            "clip-low": _number(last.clip_low, ".2%"),
            "clip-high": _number(last.clip_high, ".2%"),
            "tokens/s": _number(last.tokens_per_second, ".0f"),
        }
    named = {"run": Text(safe_text(shot.name)), "state": Text(safe_text(shot.state or "?"), style=_style(shot))}
    return named | {name: Text(text) for name, text in words.items()}


def _style(shot: Snapshot) -> str:
    return STYLES.get(shot.state or "", "bold red")


def _bar(done: int, steps: int, width: int) -> "Text":
    from rich.text import Text

    full = round(width * min(done / steps, 1)) if steps else 0
    return Text("━" * full, style="green").append("━" * (width - full), style="dim")


def _pulse(shot: Snapshot, now: datetime) -> str:
    silent = _silence(shot, now)
    return "no heartbeat yet" if silent is None else f"heartbeat {_duration(silent)} ago"


def _silence(shot: Snapshot, now: datetime) -> float | None:
    return None if shot.heartbeat is None else max((now - shot.heartbeat).total_seconds(), 0.0)


def _duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, `9 s`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _eps(value: Any) -> str:
    return "off" if value in (1.0, "Infinity") else "?" if value is None else f"{value:g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
