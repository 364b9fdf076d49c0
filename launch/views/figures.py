"""Figures of a study, by Plotly, and one of them as a PNG. Pure: no files, no database.

Errors are shown in per cent of the last close. Every figure says in its title which windows it shows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from launch.output import counted
from studies.evidence import ForecastSeries, StudyEvidence
from studies.promoting import SymbolDecision

if TYPE_CHECKING:
    from studies.replay import RuleOutcome

# The palette of Okabe and Ito, whose colours the colour-blind can tell apart.
COLOURS = {"best": "#0072B2", "incumbent": "#D55E00", "actual": "#222222", "no change": "#777777"}
TEST_SHADE = "#F3EDE0"
GRID = "#E4E4E4"
FONT = "Helvetica, Arial, sans-serif"
RECENT = 20  # windows of the moving mean: a month of daily bars
HIDDEN_SHARE = 0.1  # of the trials, the worst, may lie above the axis: they would flatten the others
BAND_LABEL = "10th to 90th percentile"
HEIGHT = 430  # pixels of the figures that stand side by side on a dashboard


# --- error by window ------------------------------------------------------------------------------------------


def error_by_window(found: StudyEvidence | None) -> go.Figure | None:
    """The errors of best and incumbent in every confirmation and test window, and the best's cumulative lead.

    "No change" takes the incumbent's place where there is none. None without a confirmed candidate, or without errors
    by window to compare it with.
    """
    best = found.best if found else None
    if found is None or best is None:
        return None
    incumbent = found.incumbent
    reference = "incumbent" if incumbent else "no change"
    errors = {}  # [W] in per cent, test windows behind confirmation windows
    for name, parts in ((reference, incumbent.on if incumbent else found.no_change.get), ("best", best.on)):
        measured = [parts(part) for part in ("confirmation", "test")]
        errors[name] = 100 * np.array([error for one in measured if one for error in one.errors])
    confirmed, count = len(best.confirmation.errors if best.confirmation else ()), len(errors["best"])
    if len(errors[reference]) != count:  # an older result did not keep the errors of "no change"
        return None
    recent = f"recent mean ({RECENT} windows)"
    traces = []
    for name, values in errors.items():
        shared = {"x0": 1, "name": found.title(best) if name == "best" else name, "legendgroup": name}
        traces += [
            {**shared, "y": _small(values), "mode": "markers", "showlegend": False,
             "marker": {"size": 4, "color": COLOURS[name], "opacity": 0.35},
             "hovertemplate": "window %{x}: %{y:.3f} %"},
            {**shared, "y": _small(_moving_mean(values)), "mode": "lines", "line": {"color": COLOURS[name], "width": 2},
             "hovertemplate": f"{recent}: %{{y:.3f}} %"},
        ]  # fmt: skip
    traces.append(
        {"x0": 1, "y": _small(np.cumsum(errors[reference] - errors["best"])), "yaxis": "y2", "mode": "lines",
         "line": {"color": COLOURS["best"], "width": 2}, "fill": "tozeroy", "fillcolor": "rgba(0,114,178,0.12)",
         "name": "cumulative lead", "showlegend": False, "hovertemplate": f"lead over {reference}: %{{y:.3f}} %"}
    )  # fmt: skip
    begin, end = confirmed + 0.5, count + 0.5
    return styled_figure(
        traces,
        title="Error by window",
        subtitle=f"dots: single windows; lines: {recent}; "
        f"{found.windows['confirmation'].first} to {found.windows['test'].last}",
        shapes=[_shade(begin, end, "y domain"), _shade(begin, end, "y2 domain")],
        annotations=[_test_label(begin)],
        xaxis={"title": "window, oldest first", "anchor": "y2"},
        yaxis={"title": "error, %", "rangemode": "tozero", "domain": [0.44, 1]},
        yaxis2={
            "title": f"cumulative lead<br>over {reference}, %",
            "zeroline": True,
            "zerolinecolor": "#999999",
            "domain": [0, 0.35],
        },
    )


def _moving_mean(errors: np.ndarray) -> np.ndarray:
    """Mean of the last RECENT values, NaN where there are fewer: [W] of [W]."""
    if len(errors) < RECENT:
        return np.full(len(errors), np.nan)
    means = np.convolve(errors, np.full(RECENT, 1 / RECENT), mode="valid")
    return np.concatenate([np.full(RECENT - 1, np.nan), means])


def _small(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values in half the bytes, as the figures of a study are rows in the database."""
    return np.asarray(values, dtype=np.float32)


# --- forecasts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ForecastSegment:
    """A run of bars that one set of windows forecast, joined where the horizon is one bar."""

    places: np.ndarray  # [N] of its bars on the axis of bars
    actual: np.ndarray  # [N] closes
    series: Mapping[str, ForecastSeries]  # by "best" and "incumbent", each of [N]


@dataclass(frozen=True, kw_only=True)
class ForecastChart:
    """What the Plotly figure and the PNG of a forecast both draw."""

    times: Sequence[str]  # of every place on the axis
    segments: Sequence[ForecastSegment]
    test_from: int  # place of the first test bar
    labels: Mapping[str, str]  # of the series


def forecast_chart(found: StudyEvidence | None) -> ForecastChart | None:
    """The confirmed forecasts as runs of bars; None where a confirmation holds none."""
    if not found or "validation" not in found.forecasts or not found.forecasts["validation"].series:
        return None
    times: list[str] = []
    segments: list[ForecastSegment] = []
    labels = {"incumbent": "incumbent"}
    test_from = len(found.forecasts["validation"].times)
    for part in ("validation", "test"):
        shown = found.forecasts[part]
        count = len(shown.times)
        # Windows of one bar make one line; longer ones each begin anew, from the last close before them.
        cuts = [0] if len(shown.starts) == count else list(shown.starts)
        for begin, end in zip(cuts, [*cuts[1:], count], strict=True):
            segments.append(
                ForecastSegment(
                    places=np.arange(len(times) + begin, len(times) + end),
                    actual=np.array(shown.actual[begin:end]),
                    series={
                        name: replace(
                            one, points=one.points[begin:end], low=one.low[begin:end], high=one.high[begin:end]
                        )
                        for name, one in shown.series.items()
                    },
                )
            )
        if "best" in shown.series:
            labels["best"] = found.title(found.best) if found.best else "best"
        times += shown.times
    return ForecastChart(times=times, segments=segments, test_from=test_from, labels=labels)


def forecast(found: StudyEvidence | None) -> go.Figure | None:
    """Forecasts of best and incumbent beside the actual closes, on validation and test windows."""
    chart = forecast_chart(found)
    if chart is None:
        return None
    traces: list[dict[str, Any]] = []

    def line(name: str, label: str, x: np.ndarray, y: Sequence[float] | np.ndarray, **options: Any) -> None:
        first = label not in [trace["name"] for trace in traces]
        times = [chart.times[place] for place in x]
        closes = [float(f"{one:.7g}") for one in y]
        traces.append({"x": times, "y": closes, "name": label, "legendgroup": name, "showlegend": first, **options})

    for segment in chart.segments:
        for name, one in segment.series.items():
            if name == "best" and one.low:
                there = np.concatenate([segment.places, segment.places[::-1]])
                line(
                    name, BAND_LABEL, there, [*one.high, *one.low[::-1]], mode="lines",
                    line={"width": 0}, fill="toself", fillcolor="rgba(0,114,178,0.18)", hoverinfo="skip",
                )  # fmt: skip
    for segment in chart.segments:
        for name, one in segment.series.items():
            line(
                name, chart.labels[name], segment.places, one.points, mode="lines+markers", marker={"size": 4},
                line={"color": COLOURS[name], "width": 1.6, "dash": "solid" if name == "best" else "dot"},
            )  # fmt: skip
    actual = np.concatenate([segment.actual for segment in chart.segments])
    line("actual", "actual", np.arange(len(actual)), actual, mode="lines+markers",
         marker={"size": 5}, line={"color": COLOURS["actual"], "width": 1.4})  # fmt: skip
    begin = chart.test_from - 0.5
    return styled_figure(
        traces,
        title="Forecast vs. actual",
        subtitle=f"validation and test windows, {chart.times[0]} to {chart.times[-1]}; "
        "each forecast uses only the bars before it",
        shapes=[_shade(begin, len(chart.times) - 0.5, "y domain")],
        annotations=[_test_label(begin)],
        # Bars side by side, whatever time lies between two of them.
        xaxis={
            "type": "category",
            "nticks": 6,
            "tickangle": 0,
            "categoryorder": "array",
            "categoryarray": list(chart.times),
        },
        yaxis={"title": "close"},
    )


def forecast_image(found: StudyEvidence | None, *, title: str) -> bytes | None:
    """The same as a PNG of 1000 by 420 pixels, for pages that show images only; equal evidence gives equal bytes."""
    chart = forecast_chart(found)
    if chart is None:
        return None
    # Imported here, as it takes 0.3 s. Without pyplot, which keeps every figure and must run in one thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(chart.test_from - 0.5, len(chart.times) - 0.5, color=TEST_SHADE, zorder=0, label="test")
    for number, segment in enumerate(chart.segments):
        for name, one in segment.series.items():
            if name == "best" and one.low:
                axes.fill_between(
                    segment.places, one.low, one.high, color=COLOURS[name], alpha=0.18, linewidth=0,
                    label=BAND_LABEL if number == 0 else None,
                )  # fmt: skip
            axes.plot(
                segment.places, one.points, color=COLOURS[name], linewidth=1.6, marker="o", markersize=3,
                linestyle="-" if name == "best" else ":", label=chart.labels[name] if number == 0 else None,
            )  # fmt: skip
    actual = np.concatenate([segment.actual for segment in chart.segments])
    axes.plot(actual, color=COLOURS["actual"], linewidth=1.4, marker="o", markersize=3.5, label="actual")
    axes.set(title=title, ylabel="close", xlim=(-0.5, len(chart.times) - 0.5))
    ticks = sorted({int(place) for place in np.linspace(0, len(chart.times) - 1, 7)})
    axes.set_xticks(ticks, [chart.times[tick] for tick in ticks])
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="best", fontsize=9, framealpha=0.9)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


# --- the search -----------------------------------------------------------------------------------------------


def best_so_far(
    values: Mapping[int, float], *, incumbent: float | None = None, no_change: float | None = None
) -> go.Figure | None:
    """The error of every complete trial on the search windows, and the lowest until then.

    values: MAE by trial number. None without a finite one.
    """
    found = [(number, 100 * value) for number, value in sorted(values.items()) if math.isfinite(value)]
    if not found:
        return None
    numbers, errors = np.array([number for number, _ in found]), np.array([error for _, error in found])
    traces: list[dict[str, Any]] = [
        {"x": numbers, "y": _small(errors), "mode": "markers", "name": "complete trial",
         "marker": {"size": 5, "color": "#9BB8D3"}, "hovertemplate": "trial %{x}: %{y:.4f} %"},
        {"x": numbers, "y": _small(np.minimum.accumulate(errors)), "mode": "lines", "name": "best so far",
         "line": {"color": COLOURS["best"], "width": 2.5, "shape": "hv"}, "hovertemplate": "best: %{y:.4f} %"},
    ]  # fmt: skip
    marks = {name: 100 * mae for name, mae in (("incumbent", incumbent), ("no change", no_change)) if mae is not None}
    for name, mark in marks.items():
        traces.append(
            {"x": [numbers[0], numbers[-1]], "y": [mark, mark], "mode": "lines", "name": name,
             "line": {"color": COLOURS[name], "width": 1.5, "dash": "dash"},
             "hovertemplate": f"{name}: %{{y:.4f}} %"}
        )  # fmt: skip
    low = min(errors.min(), *marks.values(), errors[0])
    high = max(np.quantile(errors, 1 - HIDDEN_SHARE), *marks.values(), errors[0])
    margin = 0.06 * (high - low) or 0.01 * high
    hidden = int((errors > high + margin).sum())
    return styled_figure(
        traces,
        title="Optimization history",
        subtitle="mean absolute error on the search windows"
        + (f"; {counted(hidden, 'worse trial')} above the axis" if hidden else ""),
        xaxis={"title": "trial"},
        yaxis={"title": "error, %", "range": [float(low - margin), float(high + margin)]},
    )


def importances(shares: Mapping[str, float]) -> go.Figure | None:
    """Parameter importances, shares of 1 by name, the largest on top."""
    if not shares:
        return None
    names = sorted(shares, key=lambda name: shares[name])
    bars = {
        "type": "bar", "x": [round(100 * shares[name], 1) for name in names], "y": names, "orientation": "h",
        "marker": {"color": COLOURS["best"]}, "hovertemplate": "%{y}: %{x:.1f} %",
    }  # fmt: skip
    return styled_figure(
        [bars],
        title="Parameter importance",
        subtitle="of the confirmed grid where there is one, else of the trials (PED-ANOVA)",
        height=130 + 34 * len(names),
        xaxis={"title": "importance, %", "range": [0, 100]},
        yaxis={"automargin": True},
        bargap=0.35,
        showlegend=False,
    )


def improvements(rows: Sequence[SymbolDecision]) -> go.Figure | None:
    """The improvement that decides at every symbol, with its 95 % interval."""
    known = [row for row in rows if row.improvement is not None][::-1]
    if not known:
        return None
    traces = []
    for decision, colour in (("promoted", COLOURS["best"]), ("kept", COLOURS["no change"])):
        values, above, below, symbols = [], [], [], []
        for row in known:
            if row.decision == decision and (value := row.improvement) is not None:
                symbols.append(row.symbol)
                values.append(100 * value)
                above.append(100 * (row.improvement_high - value) if row.improvement_high is not None else 0)
                below.append(100 * (value - row.improvement_low) if row.improvement_low is not None else 0)
        if values:
            traces.append(
                {
                    "x": values, "y": symbols, "mode": "markers", "name": decision,
                    "marker": {"size": 9, "color": colour}, "hovertemplate": "%{y}: %{x:+.2f} %",
                    "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5,
                                "array": above, "arrayminus": below},
                }
            )  # fmt: skip
    return styled_figure(
        traces,
        title="Confirmed improvement over the incumbent",
        subtitle="as the evidence of all pooled symbols has it, with its 95 % interval",
        height=180 + 26 * len(known),
        showlegend=True,
        xaxis={"title": "improvement, %", "zeroline": True, "zerolinecolor": "#999999"},
        yaxis={"automargin": True, "categoryorder": "array", "categoryarray": [row.symbol for row in known]},
    )


def replay_curves(outcomes: Sequence[RuleOutcome]) -> go.Figure | None:
    """What each rule had in use was better than the start by, added up over the dates of a replay."""
    known = [one for one in outcomes if len(one.curve) > 1]
    if not known:
        return None
    traces = [
        {
            "x": [date for date, _ in one.curve],
            "y": (100 * np.cumsum([gain for _, gain in one.curve])).tolist(),
            "mode": "lines+markers",
            "name": one.rule,
            "hovertemplate": "%{x}: %{y:+.2f}",
        }
        for one in known
    ]
    return styled_figure(
        traces,
        title="What was in use against what was at first",
        subtitle="improvement of the MAE on the bars after each date, mean over symbols, added up over the dates",
        showlegend=True,
        yaxis={"title": "sum of improvements, %", "zeroline": True, "zerolinecolor": "#999999"},
    )


def _shade(begin: float, end: float, height: str) -> dict[str, Any]:
    """A shaded area behind the test windows."""
    return {"type": "rect", "x0": begin, "x1": end, "y0": 0, "y1": 1, "yref": height, "fillcolor": TEST_SHADE,
            "line": {"width": 0}, "layer": "below"}  # fmt: skip


def _test_label(begin: float) -> dict[str, Any]:
    return {"x": begin, "y": 1, "yref": "y domain", "text": "test", "showarrow": False, "xanchor": "left",
            "yanchor": "top"}  # fmt: skip


def styled_figure(
    traces: Sequence[Mapping[str, Any]], *, title: str, subtitle: str, height: int = HEIGHT, **layout: Any
) -> go.Figure:
    """A figure in the common style, without Plotly's own template: every stored figure would carry its 7 kB.

    Made in one call: trace by trace, Plotly took eight times as long.
    """
    axis = {"gridcolor": GRID, "linecolor": "#999999", "zeroline": False, "ticks": "outside", "tickcolor": "#999999"}
    axes = {name: {**axis, **layout.pop(name)} for name in list(layout) if "axis" in name}
    return go.Figure(
        [{"type": "scatter", **trace} for trace in traces],
        {
            "template": {},
            "title": {
                "text": title,
                "subtitle": {"text": subtitle, "font": {"size": 12, "color": "#666666"}},
                "font": {"size": 16},
                "x": 0.01,
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 14},
            },
            "font": {"family": FONT, "size": 12, "color": "#222222"},
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 110, "b": 50},
            "paper_bgcolor": "#FFFFFF",
            "plot_bgcolor": "#FFFFFF",
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 11}},
            **axes,
            **layout,
        },
    )
