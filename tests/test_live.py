"""The live table, in real pseudo-terminals of several sizes, and what a run says where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from conftest import execute
from pyte.screens import HistoryScreen
from rich.console import Console
from test_run import SETTINGS, Place, bars, incumbent, place, wait_until_gone, workers_of  # noqa: F401 - two are fixtures

from launch import live
from launch.live import GpuMemory, Rates, State, StudyLine, WorkerLine, view

HIDE_CURSOR = b"\x1b[?25l"


class Terminal:
    """A command in a terminal of its own: its controlling one, with a screen that an emulator keeps."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], *, columns: int, lines: int = 40, stdout: Any = None
    ) -> None:
        self.master, slave = pty.openpty()
        self.screen = HistoryScreen(columns, lines, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self._lock = threading.Lock()
        self._size(columns, lines)
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: (  # its terminal's, and hung up with it
                fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                signal.signal(signal.SIGHUP, signal.SIG_DFL),
            ),
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        with self._lock:
            self._size(columns, lines)
            self.screen.resize(lines, columns)

    def _read(self) -> None:
        while True:
            try:
                if not select.select([self.master], [], [], 0.1)[0]:
                    continue
                data = os.read(self.master, 65536)
            except (OSError, ValueError):  # the other side is closed, or this one was
                return
            if not data:
                return
            with self._lock:
                self.written += data
                self.stream.feed(data)

    def hang_up(self) -> None:
        master, self.master = self.master, -1
        self._reader.join(0.3)
        os.close(master)

    def lines(self) -> list[str]:
        """What is on the screen."""
        with self._lock:
            return [line.rstrip() for line in self.screen.display]

    def everything(self) -> list[str]:
        """What scrolled off the screen, and what is on it."""
        with self._lock:
            above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
            return [line.rstrip() for line in (*above, *self.screen.display)]

    def wait_for(self, found: Callable[[list[str]], Any], seconds: float = 60) -> list[str]:
        """The screen, as soon as it is so."""
        deadline = time.monotonic() + seconds
        while not found(lines := self.lines()):
            assert time.monotonic() < deadline, "\n".join(lines)
            assert self.process.poll() is None, "\n".join(lines)
            time.sleep(0.05)
        return lines

    def end(self, code: int) -> list[str]:
        assert self.process.wait(timeout=120) == code, "\n".join(self.everything())
        self._reader.join(5)
        return self.everything()
