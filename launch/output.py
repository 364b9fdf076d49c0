"""What a command says: results on stdout as a table or as JSON, all else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from launch import streams


def say(line: str) -> None:
    """One line to the user, beside the results."""
    with streams.whoever_listens():
        click.echo(line, err=True)


def show(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool) -> None:
    """Rows as a table, or as JSON with every key."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key, heading in columns.items():
        numeric = any(isinstance(row[key], (int, float)) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(key, row[key]) for key in columns))
    wide_console().print(table)


def cell(key: str, value: Any) -> str:
    """A value as a table shows it; shares in per cent."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if key == "p_value":
            return f"{value:.3f}"
        return f"{100 * value:+.2f}%" if key.startswith(("improvement", "skill")) else f"{value:.6f}"
    return str(value)


def wide_console(*, plain: bool = False) -> Console:
    """For results. Not a terminal: wide enough that a pipe gets whole lines. plain: without colours and the like."""
    width = None if sys.stdout.isatty() else 240
    return Console(width=width, highlight=False, color_system=None if plain else "auto")


def plural(word: str, count: int) -> str:
    """The word as it stands after that number."""
    if count == 1:
        return word
    return word[:-1] + "ies" if word.endswith("y") else word + "s"
