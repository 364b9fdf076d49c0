"""Decisions of `promote` for people: as a table, as a line for a study's note, and a rollback as lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launch.output import counted, say
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    basis_points,
    basis_points_interval,
    p_value,
    percent_error,
    percent_gain,
    percent_interval,
    percent_share,
)
from storage.history import Restored
from studies.evidence import ENSEMBLE, params_text
from studies.promoted_file import EnsembleDecision, InUse
from studies.promoting import SymbolDecision
from studies.promotion import Rule

TO_BE_PROMOTED = "to be promoted"
WARNINGS = {  # of benchmarks/promotion_rules.py, on the bars of twelve symbols and on the packaged ones
    "confirmation": "the symbol's own windows decide; where the incumbent was already the best, that rule promoted in "
    "0 to 12 % of searches, and the pooled one in 0 to 6 %",
    "validation": "the windows of the search decide; where the incumbent was already the best, that rule promoted in "
    "56 % of searches, and 76 % of those promotions made the error larger",
}
NEXT = "; next: "  # what leads to another decision, behind the decision in a note


def table(rows: Sequence[SymbolDecision], *, dry_run: bool = False) -> Table:
    """One row a symbol; a narrow terminal leaves evidence out, skill and interval last, never a decision or its reason.

    Where a configuration is unchanged, its improvement is that of the decision that put it in use.
    """

    def numbers(heading: str, cells: Sequence[str], priority: int, short_cells: Sequence[str] = ()) -> Column:
        known = any(cell != NOTHING for cell in cells)
        return Column(heading=heading, cells=cells, short_cells=short_cells, right=known, priority=priority)

    decided = ["promote" if dry_run and row.decision == "promoted" else row.decision for row in rows]
    found = [_evidence(row) for row in rows]
    ends = [(one.improvement_low, one.improvement_high) for one in found]
    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            Column(
                heading="study",
                cells=[_what(row) for row in rows],
                short_cells=[row.model or NOTHING for row in rows],
                priority=6,
            ),
            numbers("incumbent MAE", [percent_error(row.incumbent_mae) for row in rows], 4),
            numbers("best MAE", [percent_error(row.best_mae) for row in rows], 5),
            numbers("improvement", [percent_gain(one.improvement) for one in found], 9),
            numbers(
                "95 % interval",
                [percent_interval(*each) for each in ends],
                10,
                [percent_interval(*each, digits=1) for each in ends],
            ),
            numbers("p", [p_value(one.p_value) for one in found], 1),
            numbers("own improvement", [percent_gain(one.improvement_own) for one in found], 8),
            numbers("symbols pooled", [_pooled(one.pooled_symbols) for one in found], 7),
            numbers("search improvement", [percent_gain(one.improvement_validation) for one in found], 2),
            numbers("test improvement", [percent_gain(one.improvement_test) for one in found], 3),
            *_returns_columns(rows),
            numbers("skill", [percent_gain(row.skill) for row in rows], 11),
            Column(
                heading="decision",
                cells=[TO_BE_PROMOTED if one == "promote" else one for one in decided],
                short_cells=decided,
                priority=13,
            ),
            Column(
                heading="reason",
                cells=[reason_text(row) for row in rows],
                short_cells=[reason_text(row, dated=False) for row in rows],
                priority=12,
            ),
        ],
        keep_empty=True,
    )


def _what(row: SymbolDecision) -> str:
    """The study of a decision, or the ensemble that it is about."""
    together = row.ensemble if row.model == ENSEMBLE else None
    return ensemble_text(together) if together else row.study or NOTHING


def _returns_columns(rows: Sequence[SymbolDecision]) -> list[Column]:
    """What candidates earn over incumbents, where --pnl-gate looked at it."""
    if all(row.returns is None for row in rows):
        return []
    cells = [basis_points(row.returns) for row in rows]
    ends = [(row.returns_low, row.returns_high) for row in rows]
    intervals = [basis_points_interval(None if low is None or high is None else (low, high)) for low, high in ends]
    return [
        Column(heading="returns, bp", cells=cells, right=True, priority=9),
        Column(heading="their 95 % interval", cells=intervals, right=True, priority=8),
    ]


def _evidence(row: SymbolDecision) -> SymbolDecision | InUse:
    return row.in_use if row.reason == "unchanged" and row.in_use else row


def reason_text(row: SymbolDecision, *, dated: bool = True) -> str:
    """The reason, and that what is now in use does worse than the forecast that the price stays.

    dated: with the day since which a configuration is unchanged.
    """
    reason, unchanged = row.reason, row.reason == "unchanged"
    if dated and unchanged and row.in_use and row.in_use.promoted_at:
        reason += f" since {row.in_use.promoted_at[:10]}"
    used = unchanged or row.decision == "promoted"
    return _with_skill(reason, worse=bool(used and row.worse_than_no_change))


def in_use_reason(found: InUse) -> str:
    """Why a configuration was put in use, "-" where its file does not say."""
    return _with_skill(found.reason or NOTHING, worse=found.worse_than_no_change)


def _with_skill(reason: str, *, worse: bool) -> str:
    return f"{reason}; worse than no change" if worse else reason


def _pooled(symbols: int | None) -> str:
    return NOTHING if symbols is None else "-" if symbols == 1 else str(symbols)


def by_study(rows: Sequence[SymbolDecision]) -> dict[str, str]:
    """What a promotion decided, as a line for every study that it looked at."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    found = {}
    for row in rows:
        for pair in row.pairs:
            if pair.study == row.study:
                about = f" as part of an {_what(row)}" if row.model == ENSEMBLE else ""
                text = f"{row.decision}{about} on {day}: {reason_text(row)}{evidence_text(row)}"
                if row.decision == "kept" and row.in_use and (said := in_use_text(row.in_use)):
                    text += f"; in use: {said}"
                found[pair.study] = text + (f"{NEXT}{row.next}" if row.next else "")
            else:
                verdict = "promoted to the model's own file" if pair.status == "success" else "not chosen"
                found[pair.study] = f"{verdict} on {day}: {pair.reason}; see {row.study} for the symbol's decision"
    return found


def evidence_text(row: SymbolDecision | InUse) -> str:
    """The numbers behind a decision, in brackets; those that are known."""
    parts = [f"improvement {percent_gain(row.improvement)}"] if row.improvement is not None else []
    if row.improvement_low is not None:
        over = "" if parts else 'improvement over "no change": '
        parts.append(f"{over}95 % interval {percent_interval(row.improvement_low, row.improvement_high)}")
    if parts and row.pooled_symbols and row.pooled_symbols > 1:
        parts.append(f"pooled over {row.pooled_symbols} symbols")
    if row.improvement_own is not None and row.improvement is not None:
        parts.append(f"{percent_gain(row.improvement_own)} on its own")
    if row.skill is not None:
        parts.append(f"skill {percent_gain(row.skill)}")
    if isinstance(row, SymbolDecision) and row.clipped:
        parts.append(f"clips the last close at {percent_share(row.clipped)} of origins")
    return f" ({', '.join(parts)})" if parts else ""


def in_use_text(found: InUse) -> str:
    """The decision that put a configuration in use; "" where its file does not say."""
    if not found.promoted_at:
        return ""
    trial = "" if found.trial is None else f", trial {found.trial}"
    text = f"promoted on {found.promoted_at[:10]} from {found.study or NOTHING}{trial}"
    text += f": {in_use_reason(found)}{evidence_text(found)}"
    if found.previous_config:
        text += f"; before it {found.previous_model} with {params_text(found.previous_config)}"
    return text


def tell(rows: Sequence[SymbolDecision], rule: Rule, *, dry_run: bool) -> None:
    """Say below the table what it does not: what to do next, what became of ensembles, and how many were promoted."""
    for row in rows:
        if row.next or row.decision == "failed":
            say("; ".join([f"{row.symbol}: {row.reason}", *([row.next] if row.next else [])]))
        if row.ensemble:
            say(f"{row.symbol}: {ensemble_line(row.ensemble, dry_run=dry_run)}")
    if line := not_believed(rows, rule.min_improvement) if rule.on != "validation" else None:
        say(line)
    promoted = sum(row.decision == "promoted" for row in rows)
    written = "would be promoted" if dry_run else "promoted"
    say(f"{promoted} of {counted(len(rows), 'symbol')} {written}" if promoted else "nothing to promote")
    if useless := [row.symbol for row in rows if row.decision == "promoted" and row.worse_than_no_change]:
        say(f"worse than no change, and {written}: {', '.join(useless)}; --require-skill keeps them from it")


def ensemble_text(found: EnsembleDecision) -> str:
    """The members of an ensemble with their weights: "ensemble of toto 0.62, kronos 0.38"."""
    return f"ensemble of {params_text({'members': found.members})}"


def ensemble_line(found: EnsembleDecision, *, dry_run: bool) -> str:
    """What an ensemble gains over the best single configuration, and what became of it."""
    if not found.members:
        return f"no ensemble: {found.reason}"
    decided = "to be promoted" if dry_run and found.decision == "promoted" else f"{found.decision}"
    if found.decision != "promoted":
        decided = f"not promoted: {found.reason}"
    pooled = f", pooled over {found.pooled_symbols} symbols" if (found.pooled_symbols or 1) > 1 else ""
    interval = percent_interval(found.improvement_low, found.improvement_high)
    return (
        f"{ensemble_text(found)} ({found.weights}): {percent_gain(found.improvement)} ({interval}) over {found.single} "
        f"alone on the later {found.windows} windows{pooled}, {percent_gain(found.improvement_test)} on test; {decided}"
    )


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


def show_rollback(symbol: str, restored: Restored, echo: Callable[[str], None], *, dry_run: bool = False) -> None:
    """What a rollback put back, or would, one line a file; which promotion is undone, and where files now disagree."""
    would = "would be " if dry_run else ""
    for path in restored.restored:
        echo(f"{path}: {would}put back")
    for path in restored.removed:
        echo(f"{path}: {would}removed, as it was before the promotion")
    if restored.mismatch:
        say(f"{restored.mismatch}: differs from the file in best; programs that read it get other parameters")
    undone = "would be undone" if dry_run else "is undone"
    say(f"{symbol}: the promotion of {restored.promoted_at} {undone}; {restored.remaining} more can be rolled back")
