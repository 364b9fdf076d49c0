"""stdout and stderr of a command that goes on when their reader is gone: a closed pipe, a terminal that hung up."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


def discard_output(stream: IO[str] | None) -> None:
    """Redirect a stream to /dev/null, as its terminal or reader is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]
        os.close(null)


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Suppress the errors of writing to stdout or stderr whose reader is gone, also when they are flushed later."""
    with contextlib.suppress(OSError):
        yield
    flush_output()


def flush_output() -> None:
    """Flush stdout and stderr; discard from now on what is written to one that cannot be written to any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            discard_output(stream)


class Stderr(io.TextIOBase):
    """The process's stderr as a stream that discards what is written once its terminal or reader is gone."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self.gone = self._stream is None or self._stream.closed

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "utf-8" if self.gone else self._stream.encoding

    def isatty(self) -> bool:
        return not self.gone and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str, /) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Any) -> None:
        if self.gone:
            return
        try:
            do()
        except (OSError, ValueError):
            self.gone = True
            discard_output(self._stream)

    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal; 80 and 24 where it does not say."""
        try:
            columns, lines = os.get_terminal_size(self.fileno())
        except (OSError, ValueError):
            return 80, 24
        return columns or 80, lines or 24
