"""The figure of a sweep: improvements over the current value with their intervals, or a heat map of two parameters.

As a page by Plotly or as a PNG by matplotlib. Pure: no files, no database.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from launch.output import counted
from launch.views.comparison_figures import save
from launch.views.figures import COLOURS, GRID, styled_figure
from studies.sweeping import Sweep, SweptCell

AXIS = "improvement over the current value, %"
DIVERGING = ("PuOr", "PuOr")  # of Plotly and matplotlib: two hues that the colour-blind can tell apart


@dataclass(frozen=True, kw_only=True)
class SweepChart:
    """What both forms draw: improvements in per cent by the places of the values on the axes."""

    title: str
    subtitle: str
    names: Sequence[str]
    labels: Sequence[Sequence[str]]  # of the values, an axis each
    improvement: np.ndarray  # [A] or [A, B], NaN where it is not known
    low: np.ndarray  # of the 95 % interval, NaN where there is none
    high: np.ndarray
    current: Sequence[tuple[int, ...]]  # places with the current values


def write(path: Path, found: Sweep, *, symbol: str, model: str) -> None:
    """Raises ConfigError where the file cannot be written."""
    chart = chart_of(found, symbol=symbol, model=model)
    save(path, png(chart) if path.suffix.lower() == ".png" else html(chart).encode())


def chart_of(found: Sweep, *, symbol: str, model: str) -> SweepChart:
    labels = [list(dict.fromkeys(str(one.values[name]) for one in found.cells)) for name in found.names]
    shape = [len(one) for one in labels]

    def grid(value: Any) -> np.ndarray:
        return 100 * np.array([value(one) for one in found.cells], dtype=float).reshape(shape)

    def end(one: SweptCell, which: int) -> float:
        interval = one.improvement.interval if one.improvement else None
        return interval[which] if interval else np.nan

    p = "" if found.p_value is None else f"; p-value over all values: {found.p_value:.3f}"
    return SweepChart(
        title=f"{symbol}, {model}: {' and '.join(found.names)}",
        subtitle=f"{counted(found.current.windows, 'window')}, 95 % intervals{p}",
        names=found.names,
        labels=labels,
        improvement=grid(lambda one: one.improvement.value if one.improvement else np.nan),
        low=grid(lambda one: end(one, 0)),
        high=grid(lambda one: end(one, 1)),
        current=[
            tuple(labels[axis].index(str(one.values[name])) for axis, name in enumerate(found.names))
            for one in found.cells
            if one.current
        ],
    )


def html(chart: SweepChart) -> str:
    """A page that opens from disk without a network."""
    figure = _line(chart) if len(chart.names) == 1 else _heat_map(chart)
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _line(chart: SweepChart) -> go.Figure:
    names, values = chart.labels[0], chart.improvement
    current = [place for (place,) in chart.current]
    return styled_figure(
        [
            {"x": names, "y": values, "mode": "markers", "name": f"{chart.names[0]}, with its 95 % interval",
             "marker": {"size": 8, "color": COLOURS["best"]},
             "error_y": {"type": "data", "symmetric": False, "array": chart.high - values,
                         "arrayminus": values - chart.low, "thickness": 10, "width": 0, "color": "rgba(0,114,178,0.2)"},
             "hovertemplate": "%{x}: %{y:+.2f} %"},
            {"x": [names[place] for place in current], "y": values[current], "mode": "markers",
             "name": "current value", "marker": {"size": 12, "color": COLOURS["incumbent"]}},
        ],
        title=chart.title,
        subtitle=chart.subtitle,
        xaxis={"title": chart.names[0], "type": "category"},
        yaxis={"title": AXIS, "zeroline": True, "zerolinecolor": "#999999"},
    )  # fmt: skip


def _heat_map(chart: SweepChart) -> go.Figure:
    limit = _limit(chart)
    return styled_figure(
        [
            {"type": "heatmap", "z": chart.improvement, "x": chart.labels[1], "y": chart.labels[0], "zmid": 0,
             "zmin": -limit, "zmax": limit, "colorscale": DIVERGING[0], "colorbar": {"title": {"text": "%"}},
             "text": _texts(chart), "texttemplate": "%{text}",
             "hovertemplate": "%{y}, %{x}: %{z:+.2f} %<extra></extra>"},
            {"x": [chart.labels[1][b] for _, b in chart.current], "y": [chart.labels[0][a] for a, _ in chart.current],
             "mode": "markers", "name": "current values",
             "marker": {"size": 16, "symbol": "square-open", "color": COLOURS["actual"]}},
        ],
        title=chart.title,
        subtitle=_subtitle(chart),
        height=200 + 26 * len(chart.labels[0]),
        xaxis={"title": chart.names[1], "type": "category"},
        yaxis={"title": chart.names[0], "type": "category", "automargin": True},
    )  # fmt: skip


def png(chart: SweepChart) -> bytes:
    """The same as a PNG, 1000 pixels wide; equal sweeps give equal bytes."""
    from matplotlib.figure import Figure  # imported here, as it takes 0.3 s

    lines = len(chart.labels[0])
    figure = Figure(figsize=(10, 4.6 if len(chart.names) == 1 else 1.8 + 0.3 * lines), dpi=100, layout="constrained")
    axes = figure.subplots()
    if len(chart.names) == 1:
        places, current = np.arange(lines), [place for (place,) in chart.current]
        axes.vlines(places, chart.low, chart.high, color=COLOURS["best"], alpha=0.2, lw=10, label="95 % interval")
        axes.plot(places, chart.improvement, "o", color=COLOURS["best"], markersize=6)
        axes.plot(current, chart.improvement[current], "o", color=COLOURS["incumbent"], ms=9, label="current value")
        axes.axhline(0, color="#999999", linewidth=1)
        axes.set_xticks(places, chart.labels[0], rotation=30 if lines > 8 else 0, ha="right" if lines > 8 else "center")
        axes.set(xlabel=chart.names[0], ylabel=AXIS)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.legend(fontsize=9)
    else:
        limit = _limit(chart)
        shown = axes.imshow(chart.improvement, cmap=DIVERGING[1], vmin=-limit, vmax=limit, aspect="auto")
        for (a, b), text in np.ndenumerate(_texts(chart)):
            weight = "bold" if (a, b) in chart.current else "normal"
            dark = abs(chart.improvement[a, b]) > 0.6 * limit
            axes.text(b, a, text, ha="center", va="center", fontsize=8, weight=weight, color="w" if dark else "k")
        for a, b in chart.current:
            axes.plot(b, a, "s", markersize=22, markerfacecolor="none", color=COLOURS["actual"])
        axes.set_xticks(np.arange(len(chart.labels[1])), chart.labels[1])
        axes.set_yticks(np.arange(lines), chart.labels[0])
        axes.set(xlabel=chart.names[1], ylabel=chart.names[0])
        figure.colorbar(shown, label="%")
    axes.set_title(f"{chart.title}\n{_subtitle(chart)}", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _subtitle(chart: SweepChart) -> str:
    if len(chart.names) == 1:
        return chart.subtitle
    return f"{AXIS}; *: the interval leaves out 0; {chart.subtitle}"


def _limit(chart: SweepChart) -> float:
    """Of the colours, on both sides of 0: the largest gain, so that what is far worse does not wash out the others."""
    known = chart.improvement[np.isfinite(chart.improvement)]
    return max(float(known.max(initial=0.0)), float(np.quantile(np.abs(known), 0.5)) if len(known) else 0.0, 0.1)


def _texts(chart: SweepChart) -> np.ndarray:
    clear = (chart.low > 0) | (chart.high < 0)
    texts = [
        f"{value:+.1f}{'*' if sure else ''}" for value, sure in zip(chart.improvement.flat, clear.flat, strict=True)
    ]
    return np.array(texts, dtype=object).reshape(chart.improvement.shape)
