"""The page of a backtest: of each symbol capital and drawdown against buying and holding, the trades and the months."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from forecasters import Bars
from launch.output import counted
from launch.views import report
from launch.views.backtest import table
from launch.views.comparison_figures import PALETTE
from launch.views.figures import COLOURS, styled_figure
from launch.views.tables import NOTHING, Column, Table, numbers, percent_gain
from objectives.fills import Trades
from objectives.performance import drawdowns, equity, monthly
from studies.backtesting import BUY_HOLD, BacktestRow, Line, Plan

WIN, LOSS = PALETTE[2], PALETTE[1]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One symbol, or the portfolio."""

    name: str
    summary: str
    figures: Sequence[go.Figure]
    months: Table


def html(
    lines: Sequence[Line],
    rows: Sequence[BacktestRow],
    plan: Plan,
    fills: Sequence[str],
    prices: Mapping[str, Bars],
    *,
    notes: Sequence[str],
) -> str:
    """The page, which opens from disk without a network. Curves, months and trades are of the first kind of fills.

    prices: the bars of every symbol. notes: what a reader has to know, a paragraph each.
    """
    names = list(dict.fromkeys(row.symbol for row in rows))
    names.sort(key=lambda name: name in prices)  # the portfolio, which has no prices, comes first
    sections = []
    for name in names:
        own = [line for line in lines if line.symbol == name]
        row = next(row for row in rows if row.symbol == name)
        drawn = [capital(own, fills[0])]
        if name in prices:
            drawn.append(trades_on_prices(own, fills[0], prices[name]))
        sections.append(
            Section(
                name=name,
                summary=f"{row.first} to {row.last}, {counted(row.tried, 'combination')} of configuration, strategy "
                "and hold tried so far",
                figures=drawn,
                months=months(own, fills[0]),
            )
        )
    held = f", brackets held {counted(plan.hold, 'bar')} at most" if plan.hold > 1 else ""
    return report.page(
        "backtest.html.j2",
        title="Backtest",
        subtitle=f"{counted(len(prices), 'symbol')}, the last {counted(plan.bars, 'bar')} of each{held}; {fills[0]} "
        "fills in the curves",
        rows=table(rows, fills),
        sections=sections,
        notes=notes,
    )


def _titles(lines: Sequence[Line]) -> list[str]:
    """What the lines are called in a legend, with their configuration where there are several."""
    several = len({line.label for line in lines if line.label}) > 1
    return [f"{line.traded.name}, {line.label}" if several and line.label else line.traded.name for line in lines]


def _times(line: Line) -> list[str]:
    return [str(time) for time in line.times.astype("datetime64[m]")]


def capital(lines: Sequence[Line], kind: str) -> go.Figure:
    """The capital and its drawdown in per cent; those of the later configurations are shown when they are asked for."""
    first = next((line.label for line in lines if line.label), "")
    traces: list[dict[str, Any]] = []
    for place, (title, line) in enumerate(zip(_titles(lines), lines, strict=True)):
        returns = line.traded.booked[kind].returns
        held = line.traded.strategy == BUY_HOLD
        dash = "dash" if held else "dot" if place // len(PALETTE) % 2 else "solid"
        style = {"color": COLOURS["no change"] if held else PALETTE[place % len(PALETTE)], "dash": dash}
        shared = {"x": _times(line), "name": title, "legendgroup": str(place), "mode": "lines",
                  "line": {**style, "width": 1.6},
                  "visible": True if line.label in ("", first) else "legendonly"}  # fmt: skip
        traces += [
            {**shared, "y": _small(equity(returns)), "hovertemplate": "%{x}: %{y:.3f}"},
            {**shared, "y": _small(-100 * drawdowns(returns)), "yaxis": "y2", "showlegend": False,
             "hovertemplate": "%{x}: %{y:.1f} %"},
        ]  # fmt: skip
    return styled_figure(
        traces,
        title="Capital and drawdown",
        subtitle=f"{lines[0].symbol}, {kind} fills, after costs; dashed: buy and hold",
        height=560,
        showlegend=True,
        margin={"l": 60, "r": 20, "t": 150, "b": 50},
        xaxis={"anchor": "y2"},
        yaxis={"title": "capital", "domain": [0.36, 1]},
        yaxis2={"title": "drawdown, %", "domain": [0, 0.28]},
    )


def trades_on_prices(lines: Sequence[Line], kind: str, bars: Bars) -> go.Figure:
    """Each trade as a line from entry to exit; those of all strategies but the first are shown when asked for."""
    times = _times(lines[0])
    traces: list[dict[str, Any]] = [
        {"x": times, "y": _small(bars.close[-len(times) :]), "mode": "lines", "name": "close",
         "line": {"color": COLOURS["actual"], "width": 1}}
    ]  # fmt: skip
    shown = True
    for title, line in zip(_titles(lines), lines, strict=True):
        if line.traded.strategy == BUY_HOLD:
            continue
        traces.append(_trades(line.traded.booked[kind].trades, times, title, visible=shown))
        shown = False
    return styled_figure(
        traces,
        title="Trades",
        subtitle="from entry (triangle: up if long, down if short) to exit; green won, orange lost, after costs",
        height=500,
        showlegend=True,
        margin={"l": 60, "r": 20, "t": 150, "b": 50},
        yaxis={"title": "price"},
    )


def _trades(trades: Trades, times: Sequence[str], name: str, *, visible: bool) -> dict[str, Any]:
    x: list[str | None] = []
    y: list[float | None] = []
    symbols, colours = [], []
    columns = (trades.entered, trades.left, trades.side, trades.entry, trades.exit, trades.returns)
    for entered, left, side, entry, out, earned in zip(*(column.tolist() for column in columns), strict=True):
        x += [times[entered], times[left], None]
        y += [float(f"{entry:.6g}"), float(f"{out:.6g}"), None]
        symbols += ["triangle-up" if side > 0 else "triangle-down", "circle", "circle"]
        colours += [WIN if earned > 0 else LOSS] * 3
    return {
        "x": x, "y": y, "name": name, "mode": "lines+markers", "visible": True if visible else "legendonly",
        "line": {"color": "#999999", "width": 1}, "marker": {"size": 6, "symbol": symbols, "color": colours},
    }  # fmt: skip


def months(lines: Sequence[Line], kind: str) -> Table:
    """The growth of the capital by month, a column a strategy and configuration."""
    found = {
        title: monthly(line.times, line.traded.booked[kind].returns)
        for title, line in zip(_titles(lines), lines, strict=True)
    }
    every = sorted({month for growths in found.values() for month in growths})
    return Table(
        columns=[
            Column(heading="month", cells=every),
            *(
                numbers(name, [percent_gain(growths[month]) if month in growths else NOTHING for month in every])
                for name, growths in found.items()
            ),
        ]
    )


def _small(values: np.ndarray) -> list[float]:
    """Six digits: a page has many."""
    return [float(f"{value:.6g}") for value in values.tolist()]
