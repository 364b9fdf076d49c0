"""One table model for terminal, Markdown and HTML, and the one way in which numbers are written for people.

Errors, improvements and skills are fractions in the program and in JSON; people see them in per cent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import rich.table
from rich.cells import cell_len
from rich.text import Text

GAP = 2  # cells between two columns of a terminal
NOTHING = "-"
NO_BREAK = "\u00a0"  # a space that no line is broken at


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of cells, all of them text.

    short_cells: what the cells say instead where they have no room. right: flush right, as numbers are. priority: of
    the columns that have no room on a terminal, the lowest is left out first, equal ones above 0 together. wrap_width:
    how narrow the cells may be wrapped; 0: they may not. code: somebody else's words or parameters, to be shown as they
    are.
    """

    heading: str
    cells: Sequence[str]
    short_cells: Sequence[str] = ()
    right: bool = False
    priority: int = 0
    wrap_width: int = 0
    code: bool = False

    @property
    def width(self) -> int:
        """Cells of a terminal that the widest line takes."""
        return max(cell_len(line) for line in (*self.heading.split("\n"), *self.cells))

    @property
    def min_width(self) -> int:
        """The width without which the column is left out."""
        return min(self.width, self.wrap_width or self.width)

    @property
    def is_empty(self) -> bool:
        return all(cell in ("", NOTHING) for cell in self.cells)

    def with_stacked_heading(self) -> Column:
        """The same with a heading of several lines, where its cells are narrower than the heading."""
        longest_word = max(map(len, self.heading.split()), default=1)
        lines = textwrap.wrap(self.heading, max(longest_word, *map(cell_len, self.cells), 1))
        return replace(self, heading="\n".join(lines))

    def with_other_cells(self) -> Column:
        """The same with the short form of its cells, where it has one, and from that with the long form again."""
        return replace(self, cells=self.short_cells, short_cells=self.cells) if self.short_cells else self


def numbers(heading: str, cells: Sequence[str], priority: int = 0) -> Column:
    return Column(heading=heading, cells=cells, right=True, priority=priority)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of equally many cells. The first names the rows and is never left out.

    keep_empty: a terminal with room for all columns shows those that say nothing too.
    """

    columns: Sequence[Column]
    keep_empty: bool = False

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def terminal(table: Table, width: int) -> rich.table.Table:
    """The table in lines of at most `width` cells.

    What does not fit is narrowed in this order: empty columns go, headings take several lines, cells their short form,
    and then the columns of the lowest priority go. Of the others, those that now have room say the long form again.
    """
    columns = list(table.columns)
    if not table.keep_empty or _needed(columns) > width:
        columns = [columns[0], *(column for column in columns[1:] if not column.is_empty)]
    if _needed(columns) > width:
        columns = [column.with_stacked_heading() for column in columns]
    if _needed(columns) > width:
        columns = _shortened(columns, width)
    first, others = columns[0], columns[1:]
    room = max(1, width - sum(GAP + column.min_width for column in others))
    spare = max(0, room - first.width)
    height = max(column.heading.count("\n") for column in columns)
    shown = rich.table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP // 2))
    for column in columns:
        shown.add_column(
            Text("\n" * (height - column.heading.count("\n")) + column.heading),
            justify="right" if column.right else "left",
            width=min(column.width, room if column is first else column.min_width + spare),
            no_wrap=not column.wrap_width,
            overflow="fold" if column.wrap_width else "ellipsis",
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        shown.add_row(*map(Text, cells))
    return shown


def _shortened(columns: Sequence[Column], width: int) -> list[Column]:
    kept = [column.with_other_cells() for column in columns]
    while len(kept) > 1 and _needed(kept) > width:
        last = min(reversed(kept[1:]), key=lambda column: column.priority)
        gone = [column for column in kept[1:] if column is last or column.priority == last.priority > 0]
        kept = [column for column in kept if column not in gone]
    for column in sorted(kept, key=lambda column: -column.priority):
        longer = [one.with_other_cells() if one is column else one for one in kept]
        if _needed(longer) <= width:
            kept = longer
    return kept


def _needed(columns: Sequence[Column]) -> int:
    return columns[0].width + sum(GAP + column.min_width for column in columns[1:])


def markdown(table: Table, *, spaced: bool = False) -> str:
    """The table in GitHub's form.

    spaced: for optuna-dashboard, whose tables leave no room between columns and break numbers from their units.
    """
    rules = ["---:" if column.right else "---" for column in table.columns]
    head = [column.heading for column in table.columns]
    rows = [
        [_markdown_cell(cell, code=column.code) for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    if spaced:
        gap = 3 * NO_BREAK
        head, *rows = (
            [line[0], *(gap + cell.replace(" %", f"{NO_BREAK}%") for cell in line[1:])] for line in (head, *rows)
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rules, *rows))


def _markdown_cell(cell: str, *, code: bool) -> str:
    if code and cell not in ("", NOTHING):
        return literal(cell)
    return " ".join(cell.replace("|", "\\|").replace("<", "&lt;").split())


def literal(words: str) -> str:
    """Somebody else's words in one line of Markdown code, where they have no meaning."""
    return "`" + " ".join(words.replace("`", "'").replace("|", "/").split()) + "`"


# --- numbers --------------------------------------------------------------------------------------------------


def percent_error(value: float | None) -> str:
    """An error relative to the last close: "1.5086 %"."""
    return NOTHING if value is None else f"{100 * value:.4f} %"


def percent_gain(value: float | None) -> str:
    """A relative improvement or a skill: "+5.42 %"."""
    return NOTHING if value is None else f"{100 * value:+.2f} %"


def percent_share(value: float, digits: int = 1) -> str:
    """A part of a whole: "75.0 %"."""
    return f"{100 * value:.{digits}f} %"


def percent_interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval of relative improvements: "+1.20 to +8.43 %"."""
    return NOTHING if low is None or high is None else f"{100 * low:+.{digits}f} to {100 * high:+.{digits}f} %"


def basis_points(value: float | None) -> str:
    """A return a bar: "+12.3"."""
    return NOTHING if value is None else f"{1e4 * value:+.1f}"


def basis_points_interval(interval: tuple[float, float] | None) -> str:
    return NOTHING if interval is None else f"{1e4 * interval[0]:+.1f} to {1e4 * interval[1]:+.1f}"


def p_value(value: float | None) -> str:
    return NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def rate(per_second: float | None) -> str:
    """A rate per second, minute or hour, whichever is the first that reaches one."""
    if not per_second:
        return NOTHING
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def duration(seconds: float | None) -> str:
    """A duration in its two largest units: "4.2 s", "42 s", "3 h 20 min"."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
