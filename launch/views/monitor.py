"""What `studies monitor`, the dashboard's notes and the report show of configurations since their promotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.output import counted
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    basis_points,
    basis_points_interval,
    numbers,
    percent_error,
    percent_gain,
    percent_interval,
    percent_share,
)
from storage.forecasts import EventRow
from studies.monitoring import Monitored, evidence_text
from studies.readings import Reading

MONITORED = "monitored"  # kind of the event that keeps what was found last
TITLE = "Since promotion"
EXPLANATIONS = (
    "n needed: what finds the trigger's effect in 80 % of cases, at 5 % false ones; with fewer a trigger would act on "
    "luck, and is only shown.",
    "E: evidence that what was replaced forecasts better; an alarm at 20 is false in at most 5 % of cases, however "
    "often one looks. Returns are of the strategy `simple`, net, with conservative fills.",
)


def summary_table(rows: Sequence[Monitored]) -> Table:
    """A row a symbol."""

    def value(row: Monitored, name: str) -> float | None:
        found = row.by_name.get(name)
        return found.value if found else None

    def of(name: str) -> list[float | None]:
        return [value(row, name) for row in rows]

    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            Column(heading="model", cells=[row.model for row in rows], priority=1),
            Column(heading="since", cells=[(row.since or NOTHING)[:10] for row in rows], priority=2),
            Column(heading="newest", cells=[(row.as_of or NOTHING)[:10] for row in rows], priority=3),
            numbers("n", [str(row.by_name["MAE"].n) if "MAE" in row.by_name else "0" for row in rows], 8),
            numbers("skill", [percent_gain(one) for one in of("skill")], 7),
            numbers("MAE", [percent_error(one) for one in of("MAE")], 5),
            numbers("coverage", [_share(one) for one in of("coverage")], 4),
            numbers("Sharpe ratio", [_ratio(one) for one in of("Sharpe ratio")], 4),
            numbers("gain by rollback", [percent_gain(row.alarm.improvement) for row in rows], 7),
            numbers("E", [evidence_text(row.alarm.evidence) for row in rows], 9),
            Column(heading="advice", cells=[row.advice for row in rows], wrap_width=24, priority=10),
        ]
    )


def readings_table(one: Monitored) -> Table:
    """Every reading of one symbol, and the comparison with what was replaced."""
    told, found = [_cells(row) for row in one.readings], one.alarm
    bars = counted(found.n, "bar")
    gain = percent_interval(*found.interval) if found.interval else NOTHING
    told.append(("gain by rollback", percent_gain(found.improvement), gain, NOTHING, bars, NOTHING, NOTHING, NOTHING))
    rings = "alarm" if found.rings else "none"
    told.append(("evidence, E", evidence_text(found.evidence), NOTHING, NOTHING, bars, "any", "20", rings))
    names, values, intervals, references, counts, needed, triggers, verdicts = zip(*told, strict=True)
    return Table(
        columns=[
            Column(heading="reading", cells=names),
            numbers("value", values, 9),
            numbers("95 % interval", intervals, 8),
            numbers("compared with", references, 5),
            numbers("n", counts, 7),
            numbers("n needed", needed, 6),
            Column(heading="trigger", cells=triggers, priority=4),
            Column(heading="verdict", cells=verdicts, priority=8),
        ]
    )


def _verdict(row: Reading) -> str:
    if not row.beyond:
        return "within" if row.trigger and row.value is not None else NOTHING
    return "beyond" if row.acts else "beyond, n too small"


def _cells(row: Reading) -> tuple[str, ...]:
    """What each column says, in the unit of the reading."""
    interval = row.interval
    if row.name == "return":
        shown, both = (lambda value: f"{basis_points(value)} bp"), f"{basis_points_interval(interval)} bp"
    elif row.name == "skill":
        shown, both = percent_gain, percent_interval(*(interval or (None, None)))
    elif row.name in ("Sharpe ratio", "bias"):
        shown, both = _ratio, interval and f"{interval[0]:+.2f} to {interval[1]:+.2f}"
    elif row.name == "MAE":
        shown, both = percent_error, interval and f"{100 * interval[0]:.3f} to {100 * interval[1]:.3f} %"
    else:
        shown, both = _share, interval and f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
    return (
        row.name,
        NOTHING if row.value is None else shown(row.value),
        both if interval and both else NOTHING,
        NOTHING if row.reference is None else shown(row.reference),
        counted(row.n, row.unit),
        f"{row.needed:,}" if row.needed else NOTHING,
        row.trigger or NOTHING,
        _verdict(row),
    )


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent_share(value)


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.2f}"


def title(one: Monitored) -> str:
    """What a table of readings is of."""
    since = f" since {one.since[:16].replace('T', ' ')}" if one.since else ""
    until = f", forecasts up to the bar of {one.as_of[:16].replace('T', ' ')}" if one.as_of else ""
    return f"{one.symbol} {one.model}{since}{until}"


def service(one: Monitored) -> str:
    """How fresh the forecasts are, and what answered requests, by kind."""
    behind = (
        "no forecast" if one.bars_behind is None else f"{counted(one.bars_behind, 'bar')} since the newest forecast"
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(one.requests.items(), key=lambda item: -item[1]))
    return f"{behind}; requests: {kinds or 'none'}"


def kept(events: Mapping[str, EventRow]) -> list[Monitored]:
    """What `studies monitor` found last, of each symbol."""
    return [Monitored.from_json(one.content) for one in events.values()]
