"""Decisions of `promote` for people: as a table, as a line for a study's note, and a rollback as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launch.output import say
from launch.views.tables import NOTHING, Column, Table, p_value, percent_error, percent_gain, percent_interval
from storage.history import Restored
from studies.promoting import SymbolDecision

TO_BE_PROMOTED = "to be promoted"
NEXT = "; next: "  # what leads to another decision, behind the decision in a note


def table(rows: Sequence[SymbolDecision], *, dry_run: bool = False) -> Table:
    """One row a symbol; a narrow terminal leaves evidence out, never a decision or its reason."""

    def numbers(heading: str, cells: Sequence[str], priority: int) -> Column:
        known = any(cell != NOTHING for cell in cells)
        return Column(heading=heading, cells=cells, right=known, priority=priority)

    decisions = [TO_BE_PROMOTED if dry_run and row.decision == "promoted" else row.decision for row in rows]
    intervals = [percent_interval(row.improvement_low, row.improvement_high) for row in rows]
    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            Column(
                heading="study",
                cells=[row.study or NOTHING for row in rows],
                short_cells=[row.model or NOTHING for row in rows],
                priority=6,
            ),
            numbers("incumbent MAE", [percent_error(row.incumbent_mae) for row in rows], 7),
            numbers("best MAE", [percent_error(row.best_mae) for row in rows], 8),
            numbers("improvement", [percent_gain(row.improvement) for row in rows], 9),
            numbers("95 % interval", intervals, 4),
            numbers("p", [p_value(row.p_value) for row in rows], 5),
            numbers("search improvement", [percent_gain(row.improvement_validation) for row in rows], 1),
            numbers("test improvement", [percent_gain(row.improvement_test) for row in rows], 3),
            numbers("skill", [percent_gain(row.skill) for row in rows], 2),
            Column(heading="decision", cells=decisions, priority=11),
            Column(heading="reason", cells=[row.reason for row in rows], priority=10),
        ],
        keep_empty=True,
    )


def by_study(rows: Sequence[SymbolDecision]) -> dict[str, str]:
    """What a promotion decided, as a line for every study that it looked at."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    found = {}
    for row in rows:
        for pair in row.pairs:
            if pair.study == row.study:
                text = f"{row.decision} on {day}: {row.reason}{evidence_text(row)}"
                found[pair.study] = text + (f"{NEXT}{row.next}" if row.next else "")
            else:
                verdict = "promoted to the model's own file" if pair.status == "success" else "not chosen"
                found[pair.study] = f"{verdict} on {day}: {pair.reason}; see {row.study} for the symbol's decision"
    return found


def evidence_text(row: SymbolDecision) -> str:
    """The numbers behind a decision, in brackets; nothing where there is no incumbent to compare with."""
    if row.improvement is None:
        return ""
    parts = [f"improvement {percent_gain(row.improvement)}"]
    if row.improvement_low is not None:
        parts.append(f"95 % interval {percent_interval(row.improvement_low, row.improvement_high)}")
    if row.p_value is not None:
        parts.append(f"p {p_value(row.p_value)}")
    return f" ({', '.join(parts)})"


def rollback_lines(restored: Restored, *, dry_run: bool) -> list[str]:
    """What a rollback put back, or would, one line a file."""
    put_back = "would be put back" if dry_run else "put back"
    removed = "would be removed" if dry_run else "removed"
    return [f"{path}: {put_back}" for path in restored.restored] + [
        f"{path}: {removed}, as it was before the promotion" for path in restored.removed
    ]


def say_rollback(symbol: str, restored: Restored, *, dry_run: bool) -> None:
    """Say which promotion is undone, and where the files that are read now disagree."""
    if restored.mismatch:
        say(f"{restored.mismatch}: differs from the file in best; programs that read it get other parameters")
    undone = "would be undone" if dry_run else "is undone"
    say(f"{symbol}: the promotion of {restored.promoted_at} {undone}; {restored.remaining} more can be rolled back")
