"""The figures of a comparison, error by step and the forecasts of the last window: as a PNG, or as a page by Plotly."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from launch.output import counted
from launch.views import report
from launch.views.comparison import ComparisonRow, Fan, over_symbols, summary_table, table
from launch.views.figures import COLOURS, GRID, styled_figure
from storage.files import replace_file
from studies.config import ConfigError

SUFFIXES = (".png", ".html")
# The palette of Okabe and Ito; baselines are grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
DASHES = {"no change": "dash", "drift": "dot"}
BAND_LABEL = "10th to 90th percentile"


def check(path: Path) -> None:
    """Raises ConfigError for a file that cannot be a figure, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: name a file that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it, or name another")


def write(path: Path, rows: Sequence[ComparisonRow], fan: Fan) -> None:
    """Error by step, a mean over symbols, and the forecasts of the last window. Raises ConfigError."""
    steps = _steps(rows)
    save(path, _png(steps, fan) if path.suffix.lower() == ".png" else _page(rows, steps, fan).encode())


def save(path: Path, content: bytes) -> None:
    """Write the file of --plot whole. Raises ConfigError."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}; name another file") from None


def _steps(rows: Sequence[ComparisonRow]) -> dict[str, np.ndarray]:
    """MAE by step in per cent, [H] by label; a mean over symbols."""
    found: dict[str, list[Sequence[float]]] = defaultdict(list)
    for row in rows:
        if row.by_step:
            found[row.label].append(row.by_step)
    return {label: 100 * np.mean(values, axis=0) for label, values in found.items()}


def _colours(labels: Sequence[str]) -> dict[str, str]:
    shown = [label for label in labels if label not in DASHES]
    return {label: PALETTE[place % len(PALETTE)] for place, label in enumerate(shown)}


def _title(fan: Fan) -> str:
    return f"{fan.symbol}: forecasts made after {fan.times[-fan.ahead - 1]}"


# --- a page -------------------------------------------------------------------------------------------------


def _page(rows: Sequence[ComparisonRow], steps: Mapping[str, np.ndarray], fan: Fan) -> str:
    summary = over_symbols(rows)
    return report.page(
        "comparison.html.j2",
        title="Configurations side by side",
        subtitle=f"{counted(len({row.symbol for row in rows}), 'symbol')}, {rows[0].windows} windows of "
        f"{counted(rows[0].horizon, 'step')} each; {rows[0].first} to {rows[0].last} at {rows[0].symbol}",
        rows=table(rows),
        summary=summary_table(summary) if summary else None,
        figures=[error_by_step(steps), forecast_fan(fan)],
    )


def error_by_step(steps: Mapping[str, np.ndarray]) -> go.Figure:
    """The MAE of every step ahead by label, in per cent [H]."""
    colours = _colours(list(steps))
    traces = [
        {"x0": 1, "y": np.round(values, 6), "name": label, "mode": "lines+markers" if len(values) < 9 else "lines",
         "line": {"color": colours.get(label, COLOURS["no change"]), "dash": DASHES.get(label, "solid")},
         "hovertemplate": "step %{x}: %{y:.4f} %"}
        for label, values in steps.items()
    ]  # fmt: skip
    return styled_figure(
        traces,
        title="Error by step",
        subtitle="mean absolute error, in per cent of the last close before the window; a mean over symbols",
        xaxis={"title": "step"},
        yaxis={"title": "MAE, %", "rangemode": "tozero"},
        showlegend=True,
    )


def forecast_fan(fan: Fan) -> go.Figure:
    """The forecasts of one window and their bands, beside the actual closes."""
    ahead, colours, traces = list(fan.times[-fan.ahead - 1 :]), _colours(list(fan.points)), []
    known = fan.prices[-fan.ahead - 1]  # lines begin at the last close that was known
    for label, (low, high) in fan.bands.items():
        traces.append(
            {"x": [*ahead, *ahead[::-1]], "y": [known, *high, *low[::-1], known], "mode": "lines", "line": {"width": 0},
             "fill": "toself", "fillcolor": colours[label], "opacity": 0.15, "hoverinfo": "skip",
             "name": f"{label}, {BAND_LABEL}", "legendgroup": label, "showlegend": False}
        )  # fmt: skip
    for label, points in fan.points.items():
        traces.append(
            {"x": ahead, "y": [known, *points], "name": label, "legendgroup": label, "mode": "lines+markers",
             "marker": {"size": 4}, "line": {"color": colours[label], "width": 1.8}}
        )  # fmt: skip
    traces.append(
        {"x": list(fan.times), "y": list(fan.prices), "name": "actual", "mode": "lines",
         "line": {"color": COLOURS["actual"], "width": 1.4}}
    )  # fmt: skip
    return styled_figure(
        traces,
        title="Forecast vs. actual",
        subtitle=f"{_title(fan)}; shaded: {BAND_LABEL}",
        xaxis={"type": "category", "nticks": 6, "tickangle": 0},
        yaxis={"title": fan.key},
        showlegend=True,
    )


# --- an image -----------------------------------------------------------------------------------------------


def _png(steps: Mapping[str, np.ndarray], fan: Fan) -> bytes:
    """Both as one image of 1000 by 840 pixels."""
    # Imported here, as it takes 0.3 s. Without pyplot, which keeps every figure and must run in one thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.4), dpi=100, layout="constrained")
    above, below = figure.subplots(2)
    colours, styles = _colours(list(steps)), {"dash": "--", "dot": ":"}
    for label, values in steps.items():
        above.plot(
            np.arange(1, len(values) + 1), values, label=label, color=colours.get(label, COLOURS["no change"]),
            linestyle=styles.get(DASHES.get(label, ""), "-"), marker="o" if len(values) < 9 else None,
        )  # fmt: skip
    above.set(title="Error by step, a mean over symbols", xlabel="step", ylabel="MAE, % of the last close")
    above.set_ylim(0, 1.08 * max(values.max() for values in steps.values()))
    colours, count = _colours(list(fan.points)), len(fan.times)
    ahead, known = np.arange(count - fan.ahead - 1, count), fan.prices[-fan.ahead - 1]
    for label, (low, high) in fan.bands.items():
        below.fill_between(ahead, [known, *low], [known, *high], color=colours[label], alpha=0.15, linewidth=0)
    for label, points in fan.points.items():
        below.plot(ahead, [known, *points], color=colours[label], label=label, marker="o" if fan.ahead < 9 else None)
    below.plot(np.arange(count), fan.prices, color=COLOURS["actual"], linewidth=1.4, label="actual")
    below.set(title=f"{_title(fan)}; shaded: {BAND_LABEL}", ylabel=fan.key, xlim=(0, count - 1))
    ticks = sorted({int(place) for place in np.linspace(0, count - 1, 6)})
    below.set_xticks(ticks, [fan.times[tick][:10] for tick in ticks])
    for axes in (above, below):
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.legend(loc="best", fontsize=9, framealpha=0.9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
