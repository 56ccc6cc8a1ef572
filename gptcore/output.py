"""Text output that survives a closed pipe, a full disk and a narrow encoding."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class SteadyOutput(io.TextIOBase):
    """A text stream, by default stdout, whose writes never raise.

    Characters that its encoding lacks are escaped. After the first failed write it reports the reason on stderr once,
    and drops the rest, so that the reader of a progress line cannot end a training run.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._given = stream
        self.error: Exception | None = None  # of the first write that failed

    @property
    def _stream(self) -> TextIO | None:
        return self._given or sys.stdout  # looked up late: it may be redirected

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        stream = self._stream
        if stream is not None and self.error is None:
            try:
                stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._fail(stream, error)
        return len(text)

    def flush(self) -> None:
        stream = self._stream
        if stream is not None and self.error is None:
            try:
                stream.flush()
            except (OSError, ValueError) as error:
                self._fail(stream, error)

    def close(self) -> None:
        """Leave the stream open, which belongs to its owner. Called when this object is deleted."""

    def isatty(self) -> bool:
        return self._stream is not None and self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def _fail(self, stream: TextIO, error: Exception) -> None:
        self.error = error
        _discard(stream)
        with contextlib.suppress(OSError, ValueError):
            print(f"stdout cannot be written ({error}); continuing without output", file=sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream, with what it holds back, to /dev/null. Python would fail on it again at exit."""
    with contextlib.suppress(OSError, ValueError):  # it has no file, or is closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
