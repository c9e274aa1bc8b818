"""Work overlaps making, nothing is lost, and either side's error ends both."""

import signal
import threading
from collections.abc import Iterator

import pytest

from clipctl.overlap import work_while_making


def ended() -> bool:
    """Whether no thread works any more, but for the moment that the last one needs to end."""
    for thread in threading.enumerate():
        if thread.name == "grading":
            thread.join(5)
    return "grading" not in {thread.name for thread in threading.enumerate()}


def test_work_goes_on_while_more_is_made() -> None:
    """The maker waits for the first item to be worked on before it makes the second: only possible side by side."""
    worked = threading.Event()
    seen: list[int] = []

    def make() -> Iterator[int]:
        yield 1
        assert worked.wait(10)
        yield 2

    def work(items: list[int]) -> None:
        seen.extend(items)
        worked.set()

    work_while_making(make(), work)
    assert seen == [1, 2]


def test_all_that_waits_is_taken_at_once_and_in_order() -> None:
    made = threading.Event()
    batches: list[list[int]] = []

    def make() -> Iterator[int]:
        yield from range(5)
        made.set()

    def work(items: list[int]) -> None:
        made.wait(10)
        batches.append(items)

    work_while_making(make(), work)
    assert [item for batch in batches for item in batch] == [0, 1, 2, 3, 4]
    assert len(batches) <= 2


def test_an_error_of_the_work_ends_the_making() -> None:
    failed = threading.Event()
    made: list[int] = []

    def make() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item
            failed.wait(10)

    def work(items: list[int]) -> None:
        failed.set()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work_while_making(make(), work)
    assert len(made) < 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_made_is_worked_on_before_an_error_of_the_maker_goes_on(error: type[BaseException]) -> None:
    seen: list[int] = []

    def make() -> Iterator[int]:
        yield from range(3)
        raise error

    with pytest.raises(error):
        work_while_making(make(), seen.extend)
    assert seen == [0, 1, 2]
    assert ended()


def interrupt() -> None:
    """Ctrl-C as it comes: to the main thread, also while it waits."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.parametrize("sampling", [True, False])
def test_ctrl_c_abandons_work_that_nobody_wants_then(sampling: bool) -> None:
    """Work that ends only when it is abandoned, interrupted while more is made and while it alone is waited for."""
    working, abandoned = threading.Event(), threading.Event()

    def make() -> Iterator[int]:
        yield 1
        assert working.wait(10)
        if sampling:
            raise KeyboardInterrupt
        threading.Timer(0.2, interrupt).start()

    def work(items: list[int]) -> None:
        working.set()
        assert abandoned.wait(10)
        raise RuntimeError("ended")

    with pytest.raises(KeyboardInterrupt):
        work_while_making(make(), work, abandon=abandoned.set)
    assert abandoned.is_set()
    assert ended()


def test_ctrl_c_waits_for_work_that_is_wanted_and_a_second_one_does_not() -> None:
    going_on = threading.Event()
    seen: list[int] = []

    def make() -> Iterator[int]:
        yield 7
        threading.Timer(0.2, interrupt).start()
        threading.Timer(0.6, going_on.set).start()

    def work(items: list[int]) -> None:
        assert going_on.wait(10)
        seen.extend(items)

    with pytest.raises(KeyboardInterrupt):
        work_while_making(make(), work)
    assert seen == [7]

    stuck = threading.Event()

    def interrupted() -> Iterator[int]:
        yield 7
        threading.Timer(0.2, interrupt).start()
        raise KeyboardInterrupt

    def wait(items: list[int]) -> None:
        stuck.wait(10)

    with pytest.raises(KeyboardInterrupt):
        work_while_making(interrupted(), wait)
    assert "grading" in {thread.name for thread in threading.enumerate()}
    stuck.set()
    assert ended()


def test_nothing_made_is_nothing_worked_on() -> None:
    work_while_making([], lambda items: pytest.fail(str(items)))
