"""Tables of any terminal's width: what does not fit is left out, hardly a cell is wrapped; and how numbers read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 2  # between two columns
NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of cells. The first of a table stays, whole if at all possible; of the others the highest `keep`.

    shorter: what the cells say instead where not all columns have room. wraps: how narrow the cells may be wrapped; 0:
    they may not.
    """

    heading: str
    cells: Sequence[str]
    shorter: Sequence[str] = ()
    right: bool = False
    keep: int = 0
    wraps: int = 0

    @property
    def width(self) -> int:
        return max(cell_len(text) for text in (self.heading, *self.cells))

    @property
    def least(self) -> int:
        """The width without which the column is left out."""
        return min(self.width, self.wraps or self.width)


def fitted(columns: Sequence[Column], width: int, *, blanks: bool = False) -> Table:
    """A table of at most `width` cells a line, without the columns that have no room.

    blanks: columns that say nothing stay while all have room.
    """

    def needed(columns: Sequence[Column]) -> int:
        return sum(GAP + column.least for column in columns)

    first, *others = columns
    if not blanks or first.width + needed(others) > width:
        others = [column for column in others if any(cell not in ("", NOTHING) for cell in column.cells)]
    if first.width + needed(others) > width:
        first, *others = (replace(c, cells=c.shorter) if c.shorter else c for c in (first, *others))
    while others and first.width + needed(others) > width:
        others.remove(min(reversed(others), key=lambda column: column.keep))
    room = max(1, width - needed(others))
    spare = max(0, room - first.width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP // 2))
    for column in (first, *others):
        table.add_column(
            Text(column.heading),
            justify="right" if column.right else "left",
            width=min(column.width, room if column is first else column.least + spare),
            no_wrap=not column.wraps,
            overflow="fold" if column.wraps else "ellipsis",
        )
    for cells in zip(*(column.cells for column in (first, *others)), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def number(value: float | None) -> str:
    """An error, six digits behind the point."""
    return NOTHING if value is None else f"{value:.6f}"


def percent_error(value: float | None) -> str:
    """An error that is a fraction, in per cent."""
    return NOTHING if value is None else f"{100 * value:.4f} %"


def share(value: float | None, digits: int = 2) -> str:
    """A relative gain or a skill, in per cent."""
    return NOTHING if value is None else f"{100 * value:+.{digits}f}%"


def assigned(values: Mapping[str, Any]) -> str:
    """Names and values in one line: "aggregate=mean num_samples=64"."""
    return " ".join(f"{name}={f'{one:.6g}' if isinstance(one, float) else one}" for name, one in values.items())


def rate(a_second: float | None) -> str:
    """How many in a second, a minute or an hour."""
    if not a_second:
        return NOTHING
    for unit, seconds in (("s", 1), ("min", 60)):
        if a_second * seconds >= 1:
            return f"{a_second * seconds:.1f}/{unit}"
    return f"{a_second * 3600:.1f}/h"


def duration(seconds: float | None) -> str:
    """In the two largest units that matter."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
