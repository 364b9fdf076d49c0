"""What a comparison shows: its rows, their table, and the same over all symbols; figures are in comparison_figures.py.

Errors are fractions of the last close before a window.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.output import counted
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    duration,
    numbers,
    percent_error,
    percent_gain,
    percent_interval,
)
from studies.promotion import MIN_WINDOWS

BLOCKS = "block persistence"  # its error is of the whole file and compares with nothing else
LEAST_SKILL = 9.99  # below minus this, a naive forecast is all but perfect and a skill says no more
MANY_CLIPPED = 0.05  # share of windows from which on it is said
SHOWN = 6  # names in one line
STEPS = (1, 8)  # whose errors the table shows, beside the last one's


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One configuration or baseline on one symbol's windows. What was not measured is None, and `error` says why."""

    symbol: str
    key: str = "close"  # which price of a bar
    label: str
    model: str  # empty for a baseline
    source: str
    params: Mapping[str, Any]
    windows: int
    effective_windows: float  # that share no bar
    horizon: int
    stride: int  # bars between two origins
    first: str  # time of the first window's first target bar
    last: str
    reference: bool = False  # improvements of the symbol's other rows are over this one
    mae: float | None = None
    price_mae: float | None = None
    mae_percent: float | None = None
    skill: float | None = None
    by_step: Sequence[float] = ()  # MAE of every step
    sampling_error: float | None = None  # standard error of `mae` by fresh seeds alone; None: one pass cannot tell
    seconds: float | None = None  # a stage shared with a row measured before takes next to none
    repaired: int | None = None  # windows whose forecast is served otherwise, as no bar could have it beside the others
    improvement: float | None = None
    improvement_low: float | None = None  # 95 % interval
    improvement_high: float | None = None
    clipped: float | None = None  # share of the windows whose last close it clips; None: its model clips nothing
    verdict: str | None = None  # "better", "worse", "tie", or "unknown" where there is no interval
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fan:
    """The forecasts of one symbol's last window, price, and the actual prices before and after its origin."""

    symbol: str
    times: Sequence[str]  # [N] of the bars
    key: str  # which price of a bar
    prices: Sequence[float]  # [N], the last `ahead` of them what was forecast
    ahead: int
    points: Mapping[str, Sequence[float]]  # by label, [ahead]
    bands: Mapping[str, Sequence[Sequence[float]]]  # by label, low and high [2, ahead], with 80 % between


# --- tables -------------------------------------------------------------------------------------------------


def step_error(row: ComparisonRow, step: int) -> float | None:
    return row.by_step[step - 1] if step <= len(row.by_step) else None


def gain_text(row: ComparisonRow) -> str:
    """The improvement, or "tie" where its interval holds 0; with "?" where there is no interval."""
    if row.reference:
        return "reference"
    if row.verdict == "tie":
        return "tie"
    return percent_gain(row.improvement) + (" ?" if row.verdict == "unknown" else "")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _price(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.5g}"


def _skill(value: float | None) -> str:
    """A skill; that of an open which is the close before has no size."""
    return f"below {-LEAST_SKILL:.0%}" if value is not None and value < -LEAST_SKILL else percent_gain(value)


def _steps(horizon: int) -> list[int]:
    """The steps whose errors a table shows; none of a single one."""
    return [step for step in dict.fromkeys((*STEPS, horizon)) if step <= horizon and horizon > 1]


def table(rows: Sequence[ComparisonRow]) -> Table:
    """One row a symbol and configuration. Where there is no room, the error and the improvement stay longest."""
    rows = [row for row in rows if row.label != BLOCKS]
    steps = _steps(rows[0].horizon)
    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            Column(heading="configuration", cells=[row.label for row in rows], priority=11, wrap_width=16),
            *_key_columns([row.key for row in rows]),
            numbers("MAE", [percent_error(row.mae) for row in rows], 10),
            numbers("price MAE", [_price(row.price_mae) for row in rows], 1),
            numbers("MAE%", [_percent(row.mae_percent) for row in rows], 4),
            numbers("skill", [_skill(row.skill) for row in rows], 7),
            *(numbers(f"MAE at {step}", [percent_error(step_error(row, step)) for row in rows], 2) for step in steps),
            numbers("repaired", [NOTHING if row.repaired is None else str(row.repaired) for row in rows], 0),
            numbers("time", [duration(row.seconds) for row in rows], 3),
            numbers("improvement", [gain_text(row) for row in rows], 9),
            Column(
                heading="95 % interval",
                cells=[percent_interval(row.improvement_low, row.improvement_high) for row in rows],
                short_cells=[percent_interval(row.improvement_low, row.improvement_high, 1) for row in rows],
                right=True,
                priority=8,
            ),
        ]
    )


def _key_columns(keys: Sequence[str]) -> list[Column]:
    """The column that says which price a row is about, where there are several."""
    return [Column(heading="key", cells=list(keys))] if len(set(keys)) > 1 else []


def blocks_line(rows: Sequence[ComparisonRow]) -> str:
    """What the predecessor's guide calls a baseline, beside the table since it is of the whole file."""
    found = ", ".join(f"{row.symbol} {_percent(row.mae_percent)}" for row in rows if row.label == BLOCKS)
    return f"{BLOCKS} over whole files (guide's h{rows[0].horizon} MAE%, not comparable): {found}"


def over_symbols(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """The means over the symbols that have every configuration, by label; JSON values, none for a single symbol.

    Improvements are means of those at each symbol, whose verdicts are counted.
    """
    by_symbol: dict[str, dict[tuple[str, str], ComparisonRow]] = defaultdict(dict)
    for row in rows:
        if row.error is None and row.label != BLOCKS:
            by_symbol[row.symbol][row.key, row.label] = row
    labels = list(dict.fromkeys((row.key, row.label) for row in rows if row.label != BLOCKS))
    shared = [found for found in by_symbol.values() if len(found) == len(labels)]
    return [_over([found[label] for found in shared]) for label in labels] if len(shared) > 1 else []


def _over(rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    verdicts = [row.verdict for row in rows]
    return {
        "label": rows[0].label,
        "key": rows[0].key,
        "symbols": len(rows),
        **{name: _mean([getattr(row, name) for row in rows]) for name in ("mae", "mae_percent", "skill")},
        "by_step": np.mean([row.by_step for row in rows], axis=0).tolist() if rows[0].by_step else [],
        "seconds": None if rows[0].seconds is None else sum(row.seconds or 0.0 for row in rows),
        "reference": all(row.reference for row in rows),
        "improvement": _mean([row.improvement for row in rows]),
        "verdicts": {name: verdicts.count(name) for name in ("better", "tie", "worse", "unknown")},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def summary_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row a configuration, over all symbols that have it."""

    def gain(one: Mapping[str, Any]) -> str:
        return "reference" if one["reference"] else percent_gain(one["improvement"])

    def counts(one: Mapping[str, Any]) -> str:
        verdicts = one["verdicts"]
        if one["reference"] or not any(verdicts.values()) or verdicts["unknown"]:
            return NOTHING
        return f"{verdicts['better']}, {verdicts['tie']}, {verdicts['worse']}"

    steps = _steps(max(len(one["by_step"]) for one in found))

    def at(one: Mapping[str, Any], step: int) -> float | None:
        return one["by_step"][step - 1] if one["by_step"] else None

    return Table(
        columns=[
            Column(heading="configuration", cells=[one["label"] for one in found], wrap_width=20),
            *_key_columns([one["key"] for one in found]),
            numbers("MAE", [percent_error(one["mae"]) for one in found], 10),
            numbers("MAE%", [_percent(one["mae_percent"]) for one in found], 4),
            numbers("skill", [_skill(one["skill"]) for one in found], 8),
            *(numbers(f"MAE at {step}", [percent_error(at(one, step)) for one in found], 2) for step in steps),
            numbers("time", [duration(one["seconds"]) for one in found], 3),
            numbers("improvement", [gain(one) for one in found], 9),
            numbers("better, tie, worse", [counts(one) for one in found], 7),
        ]
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def explanations(rows: Sequence[ComparisonRow]) -> list[str]:
    """What a reader of the table has to know of these rows, each in one line."""
    lines = [f"{row.symbol} {row.label}: could not be measured: {row.error}" for row in rows if row.error]
    if clips := [f"{row.symbol} {row.label} {row.clipped:.0%}" for row in rows if (row.clipped or 0.0) > MANY_CLIPPED]:
        lines.append(f"share of windows whose last close lies beyond the clip, where no forecast begins: {some(clips)}")
    if any(row.verdict == "unknown" for row in rows):
        horizon, stride = rows[0].horizon, rows[0].stride
        enough = 1 + math.ceil((MIN_WINDOWS - 1) * horizon / stride)
        lines.append(
            f"?: no interval, as {counted(rows[0].windows, 'window')} of {counted(horizon, 'step')}, "
            f"{counted(stride, 'bar')} apart, have room for {rows[0].effective_windows:.0f} that share no bar, and "
            f"{MIN_WINDOWS} are needed: --windows {enough}, or a shorter --horizon"
        )
    return lines
