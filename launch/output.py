"""What a command prints: results to stdout as a table or as JSON, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from launch import streams
from launch.views.tables import Table, terminal


def say(line: str) -> None:
    """Print one line to stderr."""
    with streams.ignore_broken_pipe():
        click.echo(line, err=True)


class SayOnce:
    """Says what goes wrong in work that is tried again and again: each error once, until all goes well again.

    say: takes one line for the user. log: gets the traceback of an error that nobody expects.
    """

    def __init__(self, say: Callable[[str], None], log: Path) -> None:
        self._say, self._log = say, log
        self._said: set[str] = set()

    def error(self, line: str, unexpected: Exception | None = None) -> None:
        if line in self._said:
            return
        self._said.add(line)
        self._say(f"{line}; see {self._log}" if unexpected else line)
        if unexpected:
            with suppress(OSError), self._log.open("a") as log:  # a full disk does not end the work either
                told = "".join(traceback.format_exception(unexpected))
                log.write(f"{time.strftime('%H:%M:%S')} {told}")

    def well(self) -> None:
        self._said.clear()


def show(rows: Sequence[Any], table: Callable[[Any], Table], *, as_json: bool, plain: bool = False) -> None:
    """Print rows as JSON with every key, or as the table that `table` makes of them."""
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    console = wide_console(plain=plain)
    console.print(terminal(table(rows), console.width))


def wide_console(*, plain: bool = False) -> Console:
    """The console for results, wide enough that a pipe gets whole lines. plain: without colours or other codes."""
    width = None if sys.stdout.isatty() else 240
    return Console(width=width, highlight=False, color_system=None if plain else "auto")


def counted(count: int, words: str) -> str:
    """A count and its noun, the last of the words, in the plural where it belongs: "1 pass", "2 more studies"."""
    if count != 1:
        words = f"{words[:-1]}ies" if words.endswith("y") else f"{words}es" if words.endswith("s") else f"{words}s"
    return f"{count} {words}"
