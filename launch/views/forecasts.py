"""Forecasts as people read them: a table, and lines of where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from launch.views.tables import NOTHING, Column, Table, duration, numbers, percent_gain
from studies.forecasting import Forecast

SHOWN = 12  # characters of a digest: enough to tell two apart


def price(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.7g}"


def table(found: Sequence[Forecast]) -> Table:
    """One row a symbol, price of a bar and step."""
    rows = [(one, key, step) for one in found for key in one.keys for step in range(one.horizon)]

    def band(name: str) -> list[str]:
        bands = [getattr(one.keys[key], name) for one, key, _ in rows]
        return [price(band and band[step]) for band, (_, _, step) in zip(bands, rows, strict=True)]

    several = any(one.horizon > 1 for one in found)
    return Table(
        columns=[
            Column(heading="symbol", cells=[one.symbol for one, _, _ in rows]),
            Column(heading="as of", cells=[time_text(one.as_of) for one, _, _ in rows], priority=1),
            Column(heading="key", cells=[key for _, key, _ in rows], priority=9),
            *([numbers("step", [str(step + 1) for _, _, step in rows], 9)] if several else []),
            numbers("last close", [price(one.last_close) for one, _, _ in rows], 2),
            numbers("forecast", [price(one.keys[key].points[step]) for one, key, step in rows], 9),
            numbers("return", [percent_gain(one.keys[key].returns[step]) for one, key, step in rows], 8),
            numbers("10 %", band("q10"), 7),
            numbers("median", band("q50"), 3),
            numbers("90 %", band("q90"), 7),
        ]
    )


def provenance(found: Sequence[Forecast]) -> list[str]:
    """Where each comes from and how old it is, and what is to be known of some."""
    lines = []
    for one in found:
        of = one.trial_name or "a file that names no study"
        age = "now" if one.age_s < 1 else f"{duration(one.age_s)} ago"
        lines.append(
            f"{one.symbol}: {one.model} of {of}, configuration {one.configuration[:SHOWN]}, "
            f"bars {one.bars[:SHOWN]} to {time_text(one.as_of)}; {one.cached}, made {age}"
        )
        if repaired := [key for key, of_key in one.keys.items() if of_key.repaired]:
            lines.append(f"{one.symbol}: {', '.join(repaired)} as a bar can have them, not as the model says")
        if one.price_moved:
            lines.append(f"{one.symbol}: the price has moved, and the file of its bars was read again")
        if one.stale_reason:
            lines.append(f"{one.symbol}: stale: {one.stale_reason}")
    return lines


def time_text(at: datetime) -> str:
    return f"{at:%Y-%m-%d}" if (at.hour, at.minute) == (0, 0) else f"{at:%Y-%m-%d %H:%M}Z"
