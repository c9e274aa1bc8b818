"""Work overlaps making, nothing is lost, and either side's error ends both."""

import threading
from collections.abc import Iterator

import pytest

from clipctl.overlap import work_while_making


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
    assert "grading" not in {thread.name for thread in threading.enumerate()}


def test_nothing_made_is_nothing_worked_on() -> None:
    work_while_making([], lambda items: pytest.fail(str(items)))
