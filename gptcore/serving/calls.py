"""Functions that use the model between two steps of the engine, each for the items of all who wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class Call:
    """A function that waits to be called with a list in which its item is."""

    def __init__(self, function: Callable[[list[Any]], Sequence[Any]], item: Any, adapter: str | None) -> None:
        self.function, self.item, self.adapter = function, item, adapter
        self.future: Future[Any] = Future()


def take(queue: deque[Call], most: int) -> list[Call]:
    """Remove from a queue and return the call that has waited longest, with all that can be made with it."""
    if not queue:
        return []
    first = queue[0]
    calls = [call for call in queue if call.function == first.function and call.adapter == first.adapter][:most]
    for call in calls:
        queue.remove(call)
    return [call for call in calls if call.future.set_running_or_notify_cancel()]


def make(calls: list[Call], select: Callable[[str | None], None]) -> None:
    """Make calls together, after selecting their adapter; each alone if that fails."""
    if not calls:
        return
    try:
        select(calls[0].adapter)
        results = calls[0].function([call.item for call in calls])
        if len(results) != len(calls):
            raise ValueError(f"the function returned {len(results)} results for {len(calls)} items")
    except Exception as error:
        if len(calls) == 1:
            return calls[0].future.set_exception(error)
        for call in calls:
            make([call], select)
    else:
        for call, result in zip(calls, results, strict=True):
            call.future.set_result(result)
