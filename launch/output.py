"""What a command prints: results to stdout as a table or as JSON, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console

from launch import streams
from launch.views.tables import Table, terminal


def say(line: str) -> None:
    """Print one line to stderr."""
    with streams.ignore_broken_pipe():
        click.echo(line, err=True)


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
