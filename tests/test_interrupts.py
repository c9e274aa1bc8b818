"""Requests to stop: what the first, a repeated and a second signal do, timers, and what is put back at the end."""

import os
import signal
import threading
import time
from typing import Any

import pytest

from clipctl import cli
from clipctl.errors import Interrupted, Preempted
from clipctl.interrupts import SIGNALS, StopNow, StopRequests, catch_signals, job_end


def wait_for(stop: StopRequests) -> None:
    while not stop.reason:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_noted_and_raises_only_where_work_may_be_dropped(number: signal.Signals) -> None:
    # Under nohup these tests begin with SIGHUP ignored, which it then stays.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with catch_signals() as stop:
            signal.raise_signal(number)
            assert stop.reason == number.name
            with pytest.raises(StopNow), stop.interruptible():
                raise AssertionError("work that would be dropped is not begun")
            error = stop.error("all is kept")
    finally:
        signal.signal(number, before)
    assert isinstance(error, Preempted)
    assert (error.exit_code, str(error)) == (75, f"stopped by {number.name}; all is kept")


def test_work_that_may_be_dropped_is_dropped_at_once() -> None:
    with catch_signals() as stop, pytest.raises(StopNow), stop.interruptible():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")
    assert stop.error("").exit_code == 130


@pytest.mark.parametrize("becomes", [None, ImportError])
def test_an_interrupt_that_other_code_loses_or_renames_still_drops_the_work(becomes: type[Exception] | None) -> None:
    """A finalizer, and the import of a module in C."""
    after = False
    with catch_signals() as stop, pytest.raises(StopNow), stop.interruptible():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None
        after = True
    assert after == (becomes is None)
    assert stop.reason == "SIGTERM"


def test_an_error_without_a_request_is_itself() -> None:
    with catch_signals() as stop, pytest.raises(ImportError), stop.interruptible():
        raise ImportError


def test_signals_that_were_blocked_count_as_soon_as_they_are_caught() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
    try:
        signal.raise_signal(signal.SIGUSR2)
        with catch_signals() as stop:
            assert stop.reason == "SIGUSR2"
        assert {signal.SIGTERM, signal.SIGUSR2} <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_second_signal_stops_at_once_but_not_its_echo() -> None:
    """timeout(1) signals a process and then its group: within a tenth of a second it is one request."""
    with catch_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert not stop.at_once
        time.sleep(0.15)
        with pytest.raises(StopNow):
            signal.raise_signal(signal.SIGTERM)
        assert stop.at_once
        assert str(stop.error("x")) == "stopped at once by SIGTERM; x"


def test_the_end_of_the_grace_time_stops_at_once() -> None:
    with catch_signals() as stop:
        stop.grace = 0.05
        with pytest.raises(StopNow):  # noqa: PT012
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(5)
        assert stop.at_once


def test_the_end_of_a_job_asks_to_stop_before_it() -> None:
    with catch_signals() as stop:
        stop.end_with_job(time.time() + 1000.05, margin=1000)  # half of what is left would be too late
        assert not stop.reason
        stop.end_with_job(time.time() + 0.2, margin=1000)
        wait_for(stop)
        assert stop.error("x").exit_code == 75
        assert stop.reason == "the job's time is nearly over"


@pytest.mark.parametrize(
    ("value", "end"),
    [("1795600000", 1795600000.0), ("", None), ("UNLIMITED", None), ("0", None), ("18446744073709551614", None)],
)
def test_what_slurm_exports(value: str, end: float | None) -> None:
    assert job_end({"SLURM_JOB_END_TIME": value}) == end
    assert job_end({}) is None


def test_an_escaping_interrupt_becomes_an_error() -> None:
    with pytest.raises(Interrupted, match="stopped by Ctrl-C; what was measured is kept"), catch_signals():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt


def test_handlers_are_put_back_and_nothing_rings_after_the_end() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with catch_signals() as stop:
        with catch_signals() as same:
            assert same is stop
        stop.end_with_job(time.time() + 0.2, margin=0.1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    time.sleep(0.3)
    assert not stop.reason


def test_nohup_is_respected_and_an_ignored_ctrl_c_is_not() -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.reason
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(stop)
            assert stop.by_hand
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_has_no_handlers() -> None:
    seen: list[StopRequests] = []

    def work() -> None:
        with catch_signals() as stop, stop.interruptible():
            seen.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen


def test_a_signal_from_before_there_were_handlers_is_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the exception that it raised went nowhere."""
    monkeypatch.setattr("clipctl.interrupts.early", ["SIGTERM"])
    with pytest.raises(Preempted, match="stopped by SIGTERM"), catch_signals() as stop, stop.interruptible():
        raise AssertionError("it was to stop before")


@pytest.mark.parametrize(("early", "code"), [(["SIGTERM"], 75), ([], 130)])
def test_an_interrupt_outside_of_every_command(
    monkeypatch: pytest.MonkeyPatch, early: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(cli, "early", early)
    monkeypatch.setattr("sys.argv", ["clipctl", "train"])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == code
    assert capsys.readouterr().err == ("clipctl: stopped by SIGTERM; the same command goes on\n" if early else "")
