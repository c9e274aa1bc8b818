"""Following runs: the figures against hand-made rollouts, lines for a pipe, and the live view in a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from test_store import SPEC, rollout_row, update_rows, write

from clipctl.errors import SpecError
from clipctl.follow import lines, many_runs, one_run, screen
from clipctl.journal import RunWriter, create_run
from clipctl.sparkline import sparkline
from clipctl.watch import Rollout, Snapshot, Watcher

START = datetime(2030, 1, 1, 12)


def rollout(number: int, seconds: float, entropy: float | None = 0.5) -> Rollout:
    return Rollout(number, START + timedelta(seconds=seconds), 0.25, entropy, 0.01, 0.0, 12.0, 600, 3.0)


def snapshot(rollouts: list[Rollout], *, state: str = "running", steps: int | None = 10) -> Snapshot:
    return Snapshot(
        Path("a"),
        "a",
        "tiny",
        state,
        "",
        steps,
        (0.1, "Infinity"),
        START,
        START + timedelta(seconds=20),
        None,
        rollouts,
        [],
    )


def shown(what: object, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text()


def test_a_sparkline_is_the_means_of_stretches() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 7, 7], 2) == "▁█"
    assert sparkline([1.0, None, 3.0], 9) == "▁ █"
    assert sparkline([2.0, 2.0], 9) == "▅▅"
    assert sparkline([None], 9) == sparkline([], 9) == ""
    assert len(sparkline(list(range(1000)), 17)) == 17


def test_what_is_left_is_the_pace_of_the_last_rollouts() -> None:
    # Rollout 0 took long; of the last five each took 4 s; three are missing, and 1 s has passed since.
    run = snapshot([rollout(0, 60), *(rollout(number, 60 + 4 * number) for number in range(1, 7))])
    assert run.seconds_left(START + timedelta(seconds=85)) == pytest.approx(3 * 4 - 1)
    assert run.seconds_left(START + timedelta(seconds=900)) == pytest.approx(2 * 4)
    # One rollout alone tells its own seconds only.
    assert snapshot([rollout(0, 60)]).seconds_left(START + timedelta(seconds=60)) == pytest.approx(9 * 3.0)
    assert snapshot([]).seconds_left(START) is None
    assert snapshot([rollout(0, 1)], state="finished").seconds_left(START) is None
    assert snapshot([rollout(0, 1)], steps=None).seconds_left(START) is None


def test_the_watcher_reads_what_was_written_and_only_what_changed(tmp_path: Path) -> None:
    watcher = Watcher([tmp_path])
    assert watcher.look() == []
    writer = create_run(tmp_path / "deep" / "runs", "a", SPEC, "tiny")
    write(writer, 0)
    (first,) = watcher.look()
    assert (first.name, first.state, first.steps, first.eps) == ("deep/runs/a", "running", 40, (0.1, "Infinity"))
    row, updates = rollout_row(0), update_rows(0)
    (one,) = first.rollouts
    assert one.reward == pytest.approx(row["reward_sum"] / row["responses"])
    assert one.entropy == pytest.approx(row["entropy_response_sum"] / row["responses_scored"])
    assert one.clip_low == pytest.approx(sum(u["clip_low"] for u in updates) / sum(u["tokens"] for u in updates))
    assert one.clip_high == pytest.approx(sum(u["clip_high"] for u in updates) / sum(u["tokens"] for u in updates))
    seconds = sum(row[f"seconds_{phase}"] for phase in ("sample", "reward", "score", "update"))
    assert one.tokens_per_second == pytest.approx(row["tokens"] / seconds)
    assert watcher.look()[0].rollouts is first.rollouts
    write(writer, 1)
    writer.event("alarm", "collapse", rollout=1)
    (second,) = watcher.look()
    assert [one.rollout for one in second.rollouts] == [0, 1]
    assert [event.message for event in second.events] == ["collapse"]
    writer.close("finished", "")
    assert watcher.look()[0].state == "finished"


def test_a_process_that_is_gone_is_seen_without_a_change_on_disk(tmp_path: Path) -> None:
    writer = create_run(tmp_path, "a", SPEC, "tiny")
    writer._closed.set()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = json.loads((writer.folder / "status.json").read_text()) | {"pid": sleeper.pid}
    (writer.folder / "status.json").write_text(json.dumps(status))
    watcher = Watcher([tmp_path])
    assert watcher.look()[0].state == "running"
    sleeper.kill()
    sleeper.wait()
    assert watcher.look()[0].state == "crashed"
    assert list(lines(watcher, lambda: None)) == ["a  crashed: its process is gone or silent; what it stored is kept"]


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for path in ("nothing", "nothing*"):
        with pytest.raises(SpecError, match="no file or folder"):
            Watcher([tmp_path / path])


def test_globs_are_followed_and_runs_named_under_what_is_fixed(tmp_path: Path) -> None:
    for name in ("one/a-1", "one/b-1", "two/a-1"):
        writer = create_run(tmp_path / Path(name).parent, Path(name).name, SPEC, "tiny")
        write(writer, 0)
        writer.close("finished", "")
    assert {shot.name for shot in Watcher([tmp_path / "*" / "a-*"]).look()} == {"one/a-1", "two/a-1"}
    assert [shot.name for shot in Watcher([tmp_path / "one" / "b*"]).look()] == ["b-1"]
    assert [shot.name for shot in Watcher([tmp_path / "one" / "a-1"]).look()] == ["a-1"]
    later = Watcher([tmp_path / "on*"])
    assert len(later.look()) == 2
    (tmp_path / "one").rename(tmp_path / "gone")
    assert later.look() == []


def test_broken_runs_are_followed_and_say_what_is_broken(tmp_path: Path) -> None:
    for name in ("no-status", "no-journal", "damaged", "whole"):
        writer = create_run(tmp_path, name, SPEC, "tiny")
        write(writer, 0)
        writer.close("finished", "")
    (tmp_path / "no-status" / "status.json").unlink()
    (tmp_path / "no-journal" / "journal").rename(tmp_path / "no-journal" / "other")
    (tmp_path / "damaged" / "status.json").write_text("{")
    (tmp_path / "not-yet").mkdir()
    shots = {shot.name: shot for shot in Watcher([tmp_path]).look()}
    assert set(shots) == {"no-status", "no-journal", "damaged", "whole"}
    assert (shots["damaged"].state, shots["damaged"].problem) == (None, "status.json is damaged")
    assert shots["whole"].problem == ""
    assert [len(shot.rollouts) for shot in shots.values()] == [1, 1, 1, 1]
    told = list(lines(Watcher([tmp_path / "d*"]), lambda: None))
    assert told[-1] == "damaged  state unknown after 1 rollouts; status.json is damaged"
    assert "status.json is missing" in shown(screen([shots["no-status"]], START, 100, 30))


def test_a_pipe_gets_a_line_for_every_new_rollout_until_the_runs_end(tmp_path: Path) -> None:
    writer = create_run(tmp_path, "a", SPEC, "tiny")
    for number in range(3):
        write(writer, number)
    doings: list[Callable[[], None]] = [
        lambda: write(writer, 3),
        lambda: writer.event("alarm", "collapse: \x1b]52;c;aGk=\x07 now", rollout=3),
        lambda: None,
        lambda: write(writer, 4),
        lambda: writer.close("stopped", "by an alarm"),
    ]
    found = list(lines(Watcher([tmp_path]), lambda: doings.pop(0)()))
    assert [re.sub(r"  reward.*", "", line) for line in found] == [
        "a  rollout 3/40",
        "a  rollout 4/40",
        "a  alarm: collapse: \\x1b]52;c;aGk=\\x07 now",
        "a  rollout 5/40",
        "a  stopped: by an alarm",
        "a  stopped after 5 rollouts: by an alarm",
    ]
    assert doings == []


def test_one_run_in_full() -> None:
    run = snapshot([rollout(0, 10, 0.5), rollout(1, 14, 0.25)])
    text = shown(screen([run], START + timedelta(seconds=25), 100, 30))
    assert "a  running  tiny  ε_low 0.1  ε_high off" in text
    assert re.search(r"rollout 2/10 .*ETA 28 s  heartbeat 5 s ago", text)
    assert re.search(r"entropy +0\.2500 nat +first 0\.5000 +█▁", text)
    assert re.search(r"clip-low +1\.00%", text)
    assert re.search(r"tokens/s +200", text)


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_many_runs_are_a_line_each_and_fit(width: int) -> None:
    runs = [snapshot([rollout(0, 10)], state=state) for state in ["finished"] * 30 + ["running", "crashed"]]
    text = shown(many_runs(runs, START, width, 20), width)
    rows = text.splitlines()
    assert len(rows) <= 18
    assert max(map(len, rows)) <= width
    assert rows[1].split()[:3] == ["a", "running", "1/10"]
    assert "more, " in text
    if width >= 80:
        assert "1.00%" in rows[1]
    assert ("heard of" in rows[0]) == (width >= 130)


def test_nothing_of_a_run_without_rollouts_fails() -> None:
    assert "rollout 0/10" in shown(one_run(snapshot([]), START, 80))
    assert "0/10" in shown(many_runs([snapshot([]), snapshot([])], START, 80, 24))
    assert "waiting" in shown(screen([], START, 80, 24))


class Terminal:
    """`clipctl analyze FOLDER --follow` in a pseudo-terminal of 100 × 30."""

    def __init__(self, folder: Path) -> None:
        import fcntl
        import struct
        import termios

        self.handle, terminal = pty.openpty()
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        # Not pty.fork: the process of the tests has mapped too much for a fork. The first terminal that the leader of a
        # session opens is the one whose Ctrl-C it gets.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" -m clipctl analyze "$1" --follow <"$2" >"$2" 2>&1', sys.executable, str(folder),
             os.ttyname(terminal)],
            stdin=terminal, env=os.environ | {"TERM": "xterm-256color"}, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)
        self.raw = b""

    def wait_for(self, words: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while words not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace")):
            assert time.monotonic() < until, self.raw
            if select.select([self.handle], [], [], 1)[0]:
                self.raw += os.read(self.handle, 65536)

    def press(self, key: bytes) -> int:
        """The exit code after a key."""
        os.write(self.handle, key)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            # What it still draws must be read, or it would wait for us.
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    self.raw += os.read(self.handle, 65536)
                except OSError:
                    break
        return self.process.wait()


def run_in(folder: Path) -> RunWriter:
    writer = create_run(folder, "later", SPEC, "tiny")
    write(writer, 0)
    return writer


@pytest.mark.slow
def test_a_terminal_shows_a_run_that_appears_later_until_q(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.wait_for("no run here yet")
    writer = run_in(tmp_path)
    terminal.wait_for("rollout 1/40")
    writer.event("alarm", "[bold]x[/INST] \x1b]52;c;aGk=\x07 \x1b[2J \u202egnirts")
    write(writer, 1)
    terminal.wait_for("rollout 2/40")
    writer.close("finished", "")
    terminal.wait_for("finished after 2 rollouts")
    assert terminal.press(b"q") == 0
    for hostile in (b"\x1b]52", b"\x1b[2J", "\u202e".encode()):
        assert hostile not in terminal.raw
    assert "[bold]x[/INST] \\x1b]52" in terminal.raw.decode()


@pytest.mark.slow
def test_control_c_ends_a_terminal_with_exit_code_0_and_the_run_goes_on(tmp_path: Path) -> None:
    writer = run_in(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    terminal = Terminal(tmp_path)
    terminal.wait_for("rollout 1/40")
    assert terminal.press(b"\x03") == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    write(writer, 1)
    writer.close("finished", "")


@pytest.mark.slow
def test_a_pipe_ends_with_exit_code_0_at_an_interrupt(tmp_path: Path) -> None:
    writer = run_in(tmp_path)
    command = [sys.executable, "-m", "clipctl", "analyze", str(tmp_path), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline().startswith("later  rollout 1/40  reward")
        reader.send_signal(signal.SIGINT)
        out, err = reader.communicate(timeout=30)
    assert (reader.returncode, out, err) == (0, "", "")
    writer.close("finished", "")
