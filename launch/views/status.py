"""The page of the server of forecasts, which asks again every ten seconds and for nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path

import jinja2

from launch.views.forecasts import price, time_text
from launch.views.tables import NOTHING, Column, Table, duration, numbers, percent_share
from storage.forecasts import hit_rate
from studies.forecasting import Forecast


@dataclass(frozen=True, kw_only=True)
class Status:
    """What there is to say of a server."""

    title: str
    database: str
    models: Mapping[str, str]
    bars: str
    symbols: Sequence[str]
    last: Mapping[str, tuple[datetime, Forecast | str]]
    totals: Mapping[tuple[date, str, str], int]  # requests by day, symbol and kind


def status_page(status: Status) -> str:
    """The page as HTML."""
    now = datetime.now(UTC)
    today = {symbol: Counter[str]() for symbol in status.symbols}
    for (day, symbol, kind), count in status.totals.items():
        if day == now.date() and symbol in today:
            today[symbol][kind] += count
    last = [status.last.get(symbol) for symbol in status.symbols]
    answers = [one[1] if one and isinstance(one[1], Forecast) else None for one in last]
    errors = [one[1] if one and isinstance(one[1], str) else "" for one in last]
    rows = Table(
        columns=[
            Column(heading="symbol", cells=status.symbols),
            Column(heading="model", cells=[one.model if one else NOTHING for one in answers]),
            Column(heading="bars to", cells=[time_text(one.as_of) if one else NOTHING for one in answers]),
            numbers("last close", [price(one.last_close) if one else NOTHING for one in answers]),
            Column(heading="forecast", cells=[_points(one) for one in answers]),
            Column(heading="state", cells=list(map(_state, answers, errors))),
            Column(heading="asked", cells=[_ago(now, one) for one in last]),
            numbers("requests today", [str(sum(today[symbol].values())) for symbol in status.symbols]),
            numbers("hit rate", [_rate(today[symbol]) for symbol in status.symbols]),
            Column(heading="last error", cells=[error or NOTHING for error in errors]),
        ],
        keep_empty=True,
    )
    values = {"title": status.title, "subtitle": f"{now:%Y-%m-%d %H:%M:%S}Z", "nothing": NOTHING}
    return _template().render(status=status, rows=rows, **values)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["figure"] = str  # of the shared macros; this page has no figures
    return environment.get_template("status.html.j2")


def _points(one: Forecast | None) -> str:
    if one is None:
        return NOTHING
    return ", ".join(f"{key} {price(found.points[0])}" for key, found in one.keys.items())


def _state(one: Forecast | None, error: str) -> str:
    if one is None:
        return "refused" if error else "not asked for yet"
    return "stale" if one.stale or datetime.now(UTC) >= one.next_close else "fresh"


def _ago(now: datetime, last: tuple[datetime, Forecast | str] | None) -> str:
    return f"{duration(max((now - last[0]).total_seconds(), 0.0))} ago" if last else NOTHING


def _rate(counts: Mapping[str, int]) -> str:
    rate = hit_rate(counts)
    return NOTHING if rate is None else percent_share(rate)
