"""The view of a run in progress: a live table on a terminal, elsewhere a line of progress every ten seconds.

A thread of its own writes, so that neither a signal handler nor a thread of the supervisor ever waits for a terminal.
Once the terminal is gone nothing is written and the run goes on. The cursor is never hidden, so the terminal is left
as it was however the process ends, kill -9 included.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, cast

from rich.console import Console
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from launch.streams import Stderr
from launch.supervisor import Child
from launch.views.live_table import RunState, render
from launch.views.run_watcher import RunWatcher
from launch.views.tables import duration
from storage.retrying import RetryingStorage

DRAW_S = 1.0  # between two drawings of the table, and between two reads of the database
REPORT_S = 10.0  # between two lines of progress
READ_SHARE = 0.01  # of the time, at most, that reads may take: with 500 studies one takes 40 ms
SILENCE_S = 5.0  # without an answer from the database before the user is told
CLOSE_S = 1.0  # how long to wait at the end for a terminal that accepts no output (Ctrl-S)


class LineForwarder(io.TextIOBase):
    """Replaces sys.stderr while a view is shown, and passes whole lines to the view."""

    def __init__(self, view: LiveView) -> None:
        self._view, self._partial = view, ""

    def write(self, text: str, /) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._view.say(line)
        return len(text)


class VisibleCursorConsole(Console):
    """Never hides the cursor: a killed process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class LiveView:
    """Shows a run for as long as its `with` block lasts.

    `say` may be called from any thread and any signal handler. Calling the view reads the database when it is time to:
    the supervisor's reporter thread does so again and again.
    """

    def __init__(self, storage: RetryingStorage, studies: Mapping[int, str], *, plain: bool = False) -> None:
        """studies: names by id. plain: print lines of progress on a terminal too."""
        self._writer = threading.Thread(target=self._write, name="view", daemon=True)
        self._watcher = RunWatcher(storage, studies)
        self._stderr = Stderr()
        dumb = os.environ.get("TERM", "") in ("", "dumb", "unknown")
        self._is_live = self._stderr.isatty() and not plain and not dumb
        self._console = VisibleCursorConsole(
            file=cast(IO[str], self._stderr),
            highlight=False,
            force_terminal=self._is_live,
            force_interactive=self._is_live,
        )
        self._inbox: queue.SimpleQueue[str | RunState | None] = queue.SimpleQueue()  # put never blocks, takes no lock
        self._live: Live | None = None
        self._drawn = (0, 0)  # columns and lines of the table that is on the terminal now
        self._state: RunState | None = None
        self._resumed = False  # after Ctrl-Z, when the shell has written below the table
        self._first_report: tuple[float, int] | None = None  # its time, and how many trials were done
        self._next_read_at = 0.0
        self._last_read_s = 0.0  # how long the last read took
        self._waiting_since: float | None = None  # for the database to answer
        self._reported_silence = False

    def watch(self, children: Sequence[Child]) -> None:
        """Show these children of the supervisor from now on."""
        self._watcher.children = children

    def say(self, line: str) -> None:
        """Print one line above the table."""
        self._inbox.put(line)

    def __call__(self) -> None:
        """Read how the run stands, if it is time to. Raises DatabaseUnavailable."""
        if time.monotonic() < self._next_read_at:
            return
        began = self._waiting_since = time.monotonic()
        try:
            self._inbox.put(self._watcher.read())
        finally:
            self._waiting_since = None
            ended = time.monotonic()
            interval = DRAW_S if self._is_live else REPORT_S
            # One slow read, such as the first, delays nothing; two in a row do.
            before, self._last_read_s = self._last_read_s, ended - began
            self._next_read_at = ended + max(interval, min(before, self._last_read_s) / READ_SHARE)

    def __enter__(self) -> LiveView:
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
        ]
        self._original_stderr, sys.stderr = sys.stderr, LineForwarder(self)
        for handler in self._handlers:
            handler.setStream(sys.stderr)
        self._previous_on_resume = signal.signal(signal.SIGCONT, self._on_resume)
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGCONT, self._previous_on_resume)
        sys.stderr = self._original_stderr
        for handler in self._handlers:
            handler.setStream(sys.stderr)
        self._inbox.put(None)
        self._writer.join(CLOSE_S)
        self._watcher.gpus.end()

    def _on_resume(self, number: int, frame: FrameType | None) -> None:
        self._resumed = True

    def _write(self) -> None:
        """The writer thread: prints and draws what it finds in the inbox until that says None."""
        draw_at = 0.0
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, draw_at - time.monotonic()))
            except queue.Empty:
                self._draw() if self._is_live else self._report_silence()
                draw_at = time.monotonic() + DRAW_S
                continue
            if item is None:
                break
            if isinstance(item, RunState):
                self._state = item
                if not self._is_live:
                    self._report(item)
            else:
                self._print(item)
        if self._live is not None:
            self._live.stop()  # removes the table; the command prints how the run ended

    def _silent_s(self) -> float:
        """For how long the database has not answered; 0 where that is too short to mention."""
        since = self._waiting_since
        seconds = time.monotonic() - since if since is not None else 0.0
        return seconds if seconds > SILENCE_S else 0.0

    def _report_silence(self) -> None:
        silent_s = self._silent_s()
        if silent_s and not self._reported_silence:
            self._print(f"the database has not answered for {duration(silent_s)}; waiting for it")
        self._reported_silence = silent_s > 0

    def _print(self, line: str) -> None:
        # A line quoted from a worker's log could contain control sequences.
        clean = "".join(letter if letter.isprintable() else " " for letter in line)
        if self._live is None:
            self._stderr.write(f"{clean}\n")
            self._stderr.flush()
        elif not self._stderr.gone:
            self._fit_terminal()
            self._console.print(Text(clean), soft_wrap=True)

    def _report(self, state: RunState) -> None:
        now = time.monotonic()
        if self._first_report is None:
            self._first_report = now, state.done
            return
        began, before = self._first_report
        per_second = (state.done - before) / (now - began)
        if state.done >= state.budget:
            rest = ", confirming"
        else:
            left = duration((state.budget - state.done) / per_second) if per_second else ""
            rest = f", about {left} left" if left else ""
        self._print(f"{state.done}/{state.budget} trials, {per_second:.1f} per second{rest}")

    def _draw(self) -> None:
        if not self._is_live or self._state is None or self._stderr.gone:
            return
        self._fit_terminal()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                              redirect_stderr=False, vertical_overflow="crop")  # fmt: skip
            self._live.start()
        columns, lines = self._console.size
        table = render(self._state, columns, lines, silent_s=self._silent_s())
        drawn = self._console.render_lines(table, self._console.options.update(height=None), pad=False)
        self._drawn = max(sum(part.cell_length for part in line) for line in drawn), len(drawn)
        self._live.update(SegmentLines(drawn, new_lines=True), refresh=True)

    def _fit_terminal(self) -> None:
        """Take over the terminal's size, and start on a fresh screen if the table's place on it is no longer known.

        That is so in a terminal that became too small, as many then wrap what they show, and after a stop, when the
        shell has written. What was on the screen moves up into the scrollback.
        """
        columns, lines = self._stderr.size()
        self._console.size = columns, lines
        resumed, self._resumed = self._resumed, False
        if self._live is not None and (resumed or columns < self._drawn[0] or lines <= self._drawn[1]):
            self._live.update("")
            self._live.stop()
            self._live, self._drawn = None, (0, 0)
            self._stderr.write("\n" * lines + "\x1b[H")
