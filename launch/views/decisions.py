"""Decisions of `promote` for people: as a table, as a line for a study's note, and a rollback as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launch.output import counted, say
from launch.views.tables import NOTHING, Column, Table, p_value, percent_error, percent_gain, percent_interval
from storage.history import Restored
from studies.promoting import SymbolDecision

TO_BE_PROMOTED = "to be promoted"
WARNINGS = {  # of benchmarks/promotion_rules.py, on the bars of twelve symbols and on the packaged ones
    "confirmation": "the symbol's own windows decide; where the incumbent was already the best, that rule promoted in "
    "4 to 7 % of searches, and the pooled one in 0 to 4 %",
    "validation": "the windows of the search decide; where the incumbent was already the best, that rule promoted in "
    "56 % of searches, and 76 % of those promotions made the error larger",
}
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
            numbers("incumbent MAE", [percent_error(row.incumbent_mae) for row in rows], 4),
            numbers("best MAE", [percent_error(row.best_mae) for row in rows], 5),
            numbers("improvement", [percent_gain(row.improvement) for row in rows], 9),
            numbers("95 % interval", intervals, 7),
            numbers("p", [p_value(row.p_value) for row in rows], 1),
            numbers("own improvement", [percent_gain(row.improvement_own) for row in rows], 3),
            numbers("symbols pooled", [_pooled(row.pooled_symbols) for row in rows], 2),
            numbers("search improvement", [percent_gain(row.improvement_validation) for row in rows], 0),
            numbers("test improvement", [percent_gain(row.improvement_test) for row in rows], 1),
            numbers("skill", [percent_gain(row.skill) for row in rows], 8),
            Column(heading="decision", cells=decisions, priority=11),
            Column(heading="reason", cells=[reason_text(row) for row in rows], priority=10),
        ],
        keep_empty=True,
    )


def reason_text(row: SymbolDecision) -> str:
    """The reason, and that what is promoted does worse than the forecast that the price stays."""
    return (
        f"{row.reason}; worse than no change" if row.decision == "promoted" and row.worse_than_no_change else row.reason
    )


def _pooled(symbols: int | None) -> str:
    return NOTHING if symbols is None else "-" if symbols == 1 else str(symbols)


def by_study(rows: Sequence[SymbolDecision]) -> dict[str, str]:
    """What a promotion decided, as a line for every study that it looked at."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    found = {}
    for row in rows:
        for pair in row.pairs:
            if pair.study == row.study:
                text = f"{row.decision} on {day}: {reason_text(row)}{evidence_text(row)}"
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
    if row.pooled_symbols and row.pooled_symbols > 1:
        parts.append(f"pooled over {row.pooled_symbols} symbols, {percent_gain(row.improvement_own)} on its own")
    return f" ({', '.join(parts)})"


def not_believed(rows: Sequence[SymbolDecision], min_improvement: float) -> str | None:
    """Why the most promising search of those that changed nothing was not believed; None where none promised enough."""
    kept = [row for row in rows if row.decision == "kept" and row.reason in ("not better", "unchanged")]
    promised = [
        (found, row) for row in kept if (found := row.improvement_search) is not None and found > min_improvement
    ]
    if not promised:
        return None
    found, row = max(promised, key=lambda one: one[0])
    pooled = f", pooled over {row.pooled_symbols} symbols" if (row.pooled_symbols or 1) > 1 else ""
    known = f"gains {percent_gain(row.improvement)} there" if row.improvement is not None else "is the one in use"
    interval = percent_interval(row.improvement_low, row.improvement_high)
    others = f"; so it is with {counted(len(promised) - 1, 'more symbol')}" if len(promised) > 1 else ""
    return (
        f"{row.symbol} is kept although its search promised {percent_gain(found)}: the lowest of many errors on few "
        f"windows flatters; on {row.windows} windows{pooled}, the best {known}"
        + (f" (95 % interval {interval})" if interval != NOTHING and row.improvement is not None else "")
        + (f", and {percent_gain(min_improvement)} is asked for" if row.improvement is not None else "")
        + others
    )


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
