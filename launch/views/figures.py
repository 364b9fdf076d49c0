"""Pictures of a study: Plotly figures and one PNG from what its slots and trials say. Pure: no files, no database.

Errors are shown in per cent of the last close. Every figure says in its title which windows it shows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {"best": "#0072B2", "incumbent": "#D55E00", "actual": "#222222", "no change": "#777777"}
TEST_SHADE = "#F3EDE0"
GRID = "#E4E4E4"
FONT = "Helvetica, Arial, sans-serif"
SMOOTHED = 20  # windows of the moving mean: a month of daily bars
HIDDEN_SHARE = 0.1  # of the trials, the worst: they would flatten what is worth seeing
BAND_LABEL = "10-90 % of samples"
HEIGHT = 430  # pixels, of the figures that stand side by side on a dashboard


def best_candidate(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The confirmed candidate with the lowest error on the confirmation windows; None where there is none.

    result: a study's confirmation, None before it is confirmed.
    """
    candidates = result["candidates"] if result else ()
    return min(candidates, key=lambda one: one["confirmation"]["mae"], default=None)


def incumbent_of(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The incumbent as confirmed; None where there is none or it could not be measured."""
    found = result["baselines"].get("incumbent") if result else None
    return found if found is not None and "error" not in found else None


# --- error by window ------------------------------------------------------------------------------------------


def error_by_window(result: Mapping[str, Any] | None) -> go.Figure | None:
    """The error of best and incumbent in every confirmation and test window, and which of them is ahead.

    Where there is no incumbent, "no change" takes its place. None without a confirmed candidate,
    or with nothing to compare it with.
    """
    best = best_candidate(result)
    if result is None or best is None:
        return None
    incumbent, rival_name = incumbent_of(result), "incumbent"
    if incumbent is None:
        rival_name = "no change"
    lines = {}  # [W] in per cent, those of test behind those of confirmation
    for name, one in ((rival_name, incumbent or result["no_change"]), ("best", best)):
        lines[name] = 100 * np.array([*one["confirmation"]["errors"], *one["test"]["errors"]])
    confirmed = len(best["confirmation"]["errors"])
    count = len(lines["best"])
    if len(lines[rival_name]) != count:  # its errors by window were not kept
        return None
    traces = []
    for name, errors in lines.items():
        label = f"trial {best['trial']}" if name == "best" else name
        shared = {"x0": 1, "name": label, "legendgroup": name}
        traces += [
            {**shared, "y": _small(errors), "mode": "markers", "showlegend": False,
             "marker": {"size": 4, "color": COLOURS[name], "opacity": 0.35},
             "hovertemplate": "window %{x}: %{y:.3f} %"},
            {**shared, "y": _small(_moving_mean(errors)), "mode": "lines", "line": {"color": COLOURS[name], "width": 2},
             "hovertemplate": f"mean of the last {SMOOTHED}: %{{y:.3f}} %"},
        ]  # fmt: skip
    traces.append(
        {"x0": 1, "y": _small(np.cumsum(lines[rival_name] - lines["best"])), "yaxis": "y2", "mode": "lines",
         "line": {"color": COLOURS["best"], "width": 2}, "fill": "tozeroy", "fillcolor": "rgba(0,114,178,0.12)",
         "name": "lead", "showlegend": False, "hovertemplate": f"ahead of {rival_name} by %{{y:.3f}} % in all"}
    )  # fmt: skip
    begin, end = confirmed + 0.5, count + 0.5
    parts = result["windows"]
    return _figure(
        traces,
        title="Error by window",
        subtitle=f"dots: windows; lines: mean of the last {SMOOTHED}; "
        f"{parts['confirmation']['first']} to {parts['test']['last']}",
        shapes=[_shade(begin, end, "y domain"), _shade(begin, end, "y2 domain")],
        annotations=[_test_label(begin)],
        xaxis={"title": "window, oldest first", "anchor": "y2"},
        yaxis={"title": "error, %", "rangemode": "tozero", "domain": [0.44, 1]},
        yaxis2={
            "title": f"lead over<br>{rival_name}, sum of %",
            "zeroline": True,
            "zerolinecolor": "#999999",
            "domain": [0, 0.35],
        },
    )


def _moving_mean(errors: np.ndarray) -> np.ndarray:
    """Of the last SMOOTHED values; NaN where there are fewer. [W] to [W]"""
    if len(errors) < SMOOTHED:
        return np.full(len(errors), np.nan)
    means = np.convolve(errors, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
    return np.concatenate([np.full(SMOOTHED - 1, np.nan), means])


def _small(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """In half the bytes: a study's plots are rows in the database."""
    return np.asarray(values, dtype=np.float32)


# --- forecasts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ForecastSegment:
    """A stretch of bars that one set of windows forecast, joined where the horizon is one bar."""

    part: str  # "validation" or "test"
    places: np.ndarray  # [N] where its bars are on the axis of bars
    actual: np.ndarray  # [N]
    series: Mapping[str, Mapping[str, np.ndarray]]  # by "best" and "incumbent": points, and mostly low, high; each [N]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What both pictures of a forecast draw."""

    times: Sequence[str]  # of every place on the axis
    paths: Sequence[ForecastSegment]
    test_from: int  # place of the first bar of test
    labels: Mapping[str, str]  # of the series


def forecast_shown(result: Mapping[str, Any] | None) -> Shown | None:
    """The confirmed forecasts as stretches of bars; None where a confirmation holds none."""
    if not result or not result.get("forecasts", {}).get("validation", {}).get("series"):
        return None
    times: list[str] = []
    paths: list[ForecastSegment] = []
    labels = {"incumbent": "incumbent"}
    test_from = 0
    for part in ("validation", "test"):
        found = result["forecasts"][part]
        if part == "test":
            test_from = len(times)
        count, starts = len(found["times"]), found["starts"]
        # Windows of one bar make one line; longer ones each begin anew at what had happened by then.
        cuts = [0] if len(starts) == count else starts
        for begin, end in zip(cuts, [*cuts[1:], count], strict=True):
            paths.append(
                ForecastSegment(
                    part=part,
                    places=np.arange(len(times) + begin, len(times) + end),
                    actual=np.array(found["actual"][begin:end]),
                    series={
                        name: {key: np.array(one[key][begin:end]) for key in ("points", "low", "high") if key in one}
                        for name, one in found["series"].items()
                    },
                )
            )
            if "best" in found["series"]:
                labels["best"] = f"trial {found['series']['best']['trial']}"
        times += found["times"]
    return Shown(times=times, paths=paths, test_from=test_from, labels=labels)


def forecast(result: Mapping[str, Any] | None) -> go.Figure | None:
    """Forecasts of best and incumbent against the closes that came, on validation and test."""
    shown = forecast_shown(result)
    if shown is None:
        return None
    traces: list[dict[str, Any]] = []

    def line(name: str, label: str, x: np.ndarray, y: np.ndarray, **options: Any) -> None:
        first = label not in [trace["name"] for trace in traces]
        times = [shown.times[place] for place in x]
        traces.append({"x": times, "y": y.round(4).tolist(), "name": label, "legendgroup": name, "showlegend": first,
                       **options})  # fmt: skip

    for path in shown.paths:
        for name, one in path.series.items():
            if name == "best" and "low" in one:
                there = np.concatenate([path.places, path.places[::-1]])
                line(
                    name, BAND_LABEL, there, np.concatenate([one["high"], one["low"][::-1]]), mode="lines",
                    line={"width": 0}, fill="toself", fillcolor="rgba(0,114,178,0.18)", hoverinfo="skip",
                )  # fmt: skip
    for path in shown.paths:
        for name, one in path.series.items():
            line(
                name, shown.labels[name], path.places, one["points"], mode="lines+markers", marker={"size": 4},
                line={"color": COLOURS[name], "width": 1.6, "dash": "solid" if name == "best" else "dot"},
            )  # fmt: skip
    actual = np.concatenate([path.actual for path in shown.paths])
    line("actual", "actual", np.arange(len(actual)), actual, mode="lines+markers",
         marker={"size": 5}, line={"color": COLOURS["actual"], "width": 1.4})  # fmt: skip
    begin = shown.test_from - 0.5
    return _figure(
        traces,
        title="Forecasts against what came",
        subtitle=f"validation and test, {shown.times[0]} to {shown.times[-1]}; each forecast sees the bars before it",
        shapes=[_shade(begin, len(shown.times) - 0.5, "y domain")],
        annotations=[_test_label(begin)],
        # Bars side by side, whatever time lies between two of them.
        xaxis={
            "type": "category",
            "nticks": 6,
            "tickangle": 0,
            "categoryorder": "array",
            "categoryarray": list(shown.times),
        },
        yaxis={"title": "close"},
    )


def forecast_image(result: Mapping[str, Any] | None, *, title: str) -> bytes | None:
    """The same as a PNG of 1000 by 420 pixels, for pages that show images only; equal results give equal bytes."""
    shown = forecast_shown(result)
    if shown is None:
        return None
    # 0.3 s that nobody pays who shows no image. Without pyplot, which keeps what it draws and wants one thread.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(shown.test_from - 0.5, len(shown.times) - 0.5, color=TEST_SHADE, zorder=0, label="test")
    for number, path in enumerate(shown.paths):
        for name, one in path.series.items():
            if name == "best" and "low" in one:
                axes.fill_between(
                    path.places, one["low"], one["high"], color=COLOURS[name], alpha=0.18, linewidth=0,
                    label=BAND_LABEL if number == 0 else None,
                )  # fmt: skip
            axes.plot(
                path.places, one["points"], color=COLOURS[name], linewidth=1.6, marker="o", markersize=3,
                linestyle="-" if name == "best" else ":", label=shown.labels[name] if number == 0 else None,
            )  # fmt: skip
    actual = np.concatenate([path.actual for path in shown.paths])
    axes.plot(actual, color=COLOURS["actual"], linewidth=1.4, marker="o", markersize=3.5, label="actual")
    axes.set(title=title, ylabel="close", xlim=(-0.5, len(shown.times) - 0.5))
    ticks = sorted({int(place) for place in np.linspace(0, len(shown.times) - 1, 7)})
    axes.set_xticks(ticks, [shown.times[tick] for tick in ticks])
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
    """The error of every complete trial on the search's windows, and the best until then.

    values: MAE by trial number. None without any.
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
    return _figure(
        traces,
        title="Best so far",
        subtitle="mean absolute error on the windows of the search" + (f"; {hidden} worse above" if hidden else ""),
        xaxis={"title": "trial"},
        yaxis={"title": "error, %", "range": [float(low - margin), float(high + margin)]},
    )


def importances(shares: Mapping[str, float]) -> go.Figure | None:
    """How much each knob separates good trials from the others; shares of 1."""
    if not shares:
        return None
    names = sorted(shares, key=lambda name: shares[name])
    bars = {
        "type": "bar", "x": [round(100 * shares[name], 1) for name in names], "y": names, "orientation": "h",
        "marker": {"color": COLOURS["best"]}, "hovertemplate": "%{y}: %{x:.1f} %",
    }  # fmt: skip
    return _figure(
        [bars],
        title="What mattered",
        subtitle="parameter importances by PED-ANOVA",
        height=130 + 34 * len(names),
        xaxis={"title": "share, %", "range": [0, 100]},
        yaxis={"automargin": True},
        bargap=0.35,
        showlegend=False,
    )


def improvements(rows: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """The confirmed improvement of every symbol with its 95 % interval; rows as `promote --json` has them."""
    known = [row for row in rows if row["improvement"] is not None][::-1]
    if not known:
        return None
    traces = []
    for decision, colour in (("promoted", COLOURS["best"]), ("kept", COLOURS["no change"])):
        of_it = [row for row in known if row["decision"] == decision]
        if not of_it:
            continue
        values = [100 * row["improvement"] for row in of_it]
        lows = [100 * (row["improvement"] if (low := row["improvement_low"]) is None else low) for row in of_it]
        highs = [100 * (row["improvement"] if (high := row["improvement_high"]) is None else high) for row in of_it]
        traces.append(
            {
                "x": values, "y": [row["symbol"] for row in of_it], "mode": "markers", "name": decision,
                "marker": {"size": 9, "color": colour}, "hovertemplate": "%{y}: %{x:+.2f} %",
                "error_x": {
                    "type": "data", "symmetric": False, "color": colour, "thickness": 1.5,
                    "array": [high - value for high, value in zip(highs, values, strict=True)],
                    "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
                },
            }
        )  # fmt: skip
    return _figure(
        traces,
        title="Confirmed improvement over the incumbent",
        subtitle="with its 95 % interval, on the confirmation windows",
        height=180 + 26 * len(known),
        showlegend=True,
        xaxis={"title": "improvement, %", "zeroline": True, "zerolinecolor": "#999999"},
        yaxis={"automargin": True, "categoryorder": "array", "categoryarray": [row["symbol"] for row in known]},
    )


def _shade(begin: float, end: float, height: str) -> dict[str, Any]:
    """The windows of test."""
    return {"type": "rect", "x0": begin, "x1": end, "y0": 0, "y1": 1, "yref": height, "fillcolor": TEST_SHADE,
            "line": {"width": 0}, "layer": "below"}  # fmt: skip


def _test_label(begin: float) -> dict[str, Any]:
    return {"x": begin, "y": 1, "yref": "y domain", "text": "test", "showarrow": False, "xanchor": "left",
            "yanchor": "top"}  # fmt: skip


def _figure(
    traces: Sequence[Mapping[str, Any]], *, title: str, subtitle: str, height: int = HEIGHT, **layout: Any
) -> go.Figure:
    """One look, without Plotly's own template: it is 7 kB that every stored figure would carry.

    Made at once: trace by trace took Plotly eight times as long.
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
