"""Work in a second thread while the first one makes more of it: grading overlaps sampling."""

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def work_while_making(
    items: Iterable[Item], work: Callable[[list[Item]], None], abandon: Callable[[], None] = lambda: None
) -> None:
    """Calls `work` in one other thread with all items that wait, in their order, while the next ones are made.

    Returns when everything is worked on; so it is before an error of the maker, or Ctrl-C, goes on; a second Ctrl-C does not
    wait. An error of `work` ends the making with the next item, and is raised.

    abandon: called on Ctrl-C before the wait; for work that nobody wants then, what ends it with an error.
    """
    waiting: SimpleQueue[Item | None] = SimpleQueue()
    failed: list[BaseException] = []
    # Not `Thread.join`: one that Ctrl-C interrupts takes the thread for ended, and the next one does not wait.
    ended = threading.Event()

    def run() -> None:
        try:
            take()
        finally:
            ended.set()

    def take() -> None:
        going = True
        while going:
            batch = [waiting.get()]
            while not waiting.empty():
                batch.append(waiting.get())
            going = batch[-1] is not None
            ready = [item for item in batch if item is not None]
            try:
                if ready:
                    work(ready)
            except BaseException as error:
                failed.append(error)
                return

    worker = threading.Thread(target=run, name="grading", daemon=True)
    worker.start()
    try:
        for item in items:
            if failed:
                break
            waiting.put(item)
        waiting.put(None)
        ended.wait()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            abandon()
        waiting.put(None)
        ended.wait()
        raise
    if failed:
        raise failed[0]
