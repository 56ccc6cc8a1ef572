"""SIGINT and SIGTERM during training: finish the step, save a checkpoint, then stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped training; its whole state is in `checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = path
        super().__init__(f"interrupted; resume with trainer.train(resume_from_checkpoint={str(path)!r})")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that records the first SIGINT or SIGTERM, which has no other effect; a second one has its usual one.

    Python handles signals in the main thread only; in others the list stays empty.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by C code
        previous.clear()

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        with contextlib.suppress(OSError):  # stderr may be closed
            # os.write, because a handler may run in the middle of another print
            os.write(2, b"\nfinishing this step, then saving a checkpoint; once more stops at once, without saving\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like
                previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
