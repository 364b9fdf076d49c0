"""What `studies monitor`, the dashboard's notes and the report show of configurations since their promotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from studies.monitoring import Monitored
from studies.readings import Reading

MONITORED = "monitored"  # kind of the event that keeps what was found last
TITLE = "Since promotion"
EXPLANATIONS = (
    "n needed: what it takes to find the trigger's effect in 80 % of cases, at 5 % false ones; with fewer a trigger acts "
    "on luck, and is only shown.",
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
            numbers("over the replaced", [percent_gain(_loss(row)) for row in rows], 7),
            numbers("E", [NOTHING if row.alarm.evidence is None else f"{row.alarm.evidence:.2g}" for row in rows], 9),
            Column(heading="advice", cells=[row.advice for row in rows], wrap_width=24, priority=10),
        ]
    )


def _loss(row: Monitored) -> float | None:
    return None if row.alarm.improvement is None else -row.alarm.improvement


def readings_table(one: Monitored) -> Table:
    """Every reading of one symbol, and the comparison with what was replaced."""
    rows = list(one.readings)
    cells = {name: [_cells(row)[name] for row in rows] for name in ("value", "interval", "compared with")}
    found = one.alarm
    return Table(
        columns=[
            Column(heading="reading", cells=[*(row.name for row in rows), "gain over the replaced", "alarm, E"]),
            numbers(
                "value",
                [
                    *cells["value"],
                    percent_gain(_loss(one)),
                    NOTHING if found.evidence is None else f"{found.evidence:.3g}",
                ],
                9,
            ),
            numbers(
                "95 % interval",
                [
                    *cells["interval"],
                    percent_interval(-found.interval[1], -found.interval[0]) if found.interval else NOTHING,
                    NOTHING,
                ],
                8,
            ),
            numbers("compared with", [*cells["compared with"], NOTHING, NOTHING], 5),
            numbers("n", [*(f"{row.n:,} {row.unit}" for row in rows), f"{found.n:,} bars", f"{found.n:,} bars"], 7),
            numbers("n needed", [*(f"{row.needed:,}" if row.needed else NOTHING for row in rows), NOTHING, "any"], 6),
            Column(heading="trigger", cells=[*(row.trigger or NOTHING for row in rows), NOTHING, "20"], priority=4),
            Column(
                heading="verdict",
                cells=[*(_verdict(row) for row in rows), NOTHING, "alarm" if found.rings else "none"],
                priority=8,
            ),
        ]
    )


def _verdict(row: Reading) -> str:
    if not row.beyond:
        return "within" if row.trigger and row.value is not None else NOTHING
    return "beyond" if row.acts else "beyond, n too small"


def _cells(row: Reading) -> dict[str, str]:
    """What each column says, in the unit of the reading."""
    interval = row.interval
    if row.name == "return":
        shown, both = (lambda value: f"{basis_points(value)} bp"), f"{basis_points_interval(interval)} bp"
    elif row.name == "skill":
        shown, both = percent_gain, percent_interval(*(interval or (None, None)))
    elif row.name == "MAE":
        shown = percent_error
        both = NOTHING if interval is None else f"{100 * interval[0]:.3f} to {100 * interval[1]:.3f} %"
    elif row.name in ("Sharpe ratio", "bias"):
        shown, both = _ratio, NOTHING if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
    else:
        shown = _share
        both = NOTHING if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
    return {
        "value": NOTHING if row.value is None else shown(row.value),
        "interval": NOTHING if interval is None else both,
        "compared with": NOTHING if row.reference is None else shown(row.reference),
    }


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent_share(value)


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.2f}"


def title(one: Monitored) -> str:
    """What a table of readings is of."""
    since = f" since {one.since[:16].replace('T', ' ')}" if one.since else ""
    until = f", forecasts up to the bar of {one.as_of[:16].replace('T', ' ')}" if one.as_of else ""
    return f"{one.symbol} {one.model}{since}{until}"


def kept(events: Mapping[str, EventRow]) -> list[Monitored]:
    """What `studies monitor` found last, of each symbol."""
    return [Monitored.from_json(one.content) for one in events.values()]
