"""What `promote` prints: its decisions as a table, a rollback in lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from launch.output import say
from launch.views.tables import NOTHING, Column, fitted, number, share
from storage.history import Restored
from studies.promoting import SymbolDecision


def table(rows: Sequence[SymbolDecision], width: int) -> Table:
    """The rows in lines of at most `width` cells; a narrow one leaves evidence out, never a decision."""

    def column(heading: str, cells: Sequence[str], values: Sequence[float | None], keep: int) -> Column:
        right = any(value is not None for value in values)
        return Column(heading=heading, cells=cells, right=right, keep=keep)

    def numbers(heading: str, values: Sequence[float | None], keep: int) -> Column:
        return column(heading, [number(value) for value in values], values, keep)

    def shares(heading: str, values: Sequence[float | None], keep: int) -> Column:
        return column(heading, [share(value) for value in values], values, keep)

    chances = [row.p_value for row in rows]
    return fitted(
        [
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            Column(heading="study", cells=[row.study for row in rows], shorter=[row.model for row in rows], keep=6),
            numbers("incumbent", [row.incumbent_mae for row in rows], 7),
            numbers("best", [row.best_mae for row in rows], 8),
            shares("improvement", [row.improvement for row in rows], 9),
            Column(heading="95 % interval", cells=[_interval(row) for row in rows], keep=4),
            column("p", [NOTHING if p is None else f"{p:.3f}" for p in chances], chances, 5),
            shares("on search", [row.improvement_validation for row in rows], 1),
            shares("on test", [row.improvement_test for row in rows], 3),
            shares("skill", [row.skill for row in rows], 2),
            Column(heading="decision", cells=[row.decision for row in rows], keep=11),
            Column(heading="reason", cells=[row.reason for row in rows], keep=10),
        ],
        width,
        blanks=True,
    )


def _interval(row: SymbolDecision) -> str:
    low, high = row.improvement_low, row.improvement_high
    return NOTHING if low is None or high is None else f"{100 * low:+.1f} .. {100 * high:+.1f}%"


def rollback_lines(symbol: str, restored: Restored, *, dry_run: bool) -> list[str]:
    """What a rollback put back, or would, a line a file."""
    put_back = "would be put back" if dry_run else "put back"
    removed = "would be removed" if dry_run else "removed"
    return [f"{path}: {put_back}" for path in restored.restored] + [
        f"{path}: {removed}, as it was before the promotion" for path in restored.removed
    ]


def say_rollback(symbol: str, restored: Restored, *, dry_run: bool) -> None:
    """What else there is to know of a rollback."""
    if restored.mismatch:
        say(f"{restored.mismatch}: is not what best says; readers that take the parameters from there get others")
    undone = "to be undone" if dry_run else "undone"
    say(f"{symbol}: the promotion of {restored.promoted_at} is {undone}; {restored.remaining} more can be rolled back")
