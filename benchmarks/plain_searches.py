"""A plain forecast at every origin of a symbol, and where the searches of `promotion_rules` look among them.

The forecast is the last 100 returns, each divided by the volatility known before it (exponentially weighted, 0.94) and
multiplied by the one known now: the same samples for all, so that nothing here is sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forecasters import Bars
from objectives import windows as windowing
from objectives.aggregation import Draw
from objectives.bars import DataError
from objectives.metrics import Measurement, measurement_of_errors
from objectives.windows import Windows
from studies.evidence import MeasuredConfiguration

AGGREGATES = (
    *("mean", "median", "trimmed_mean_5", "trimmed_mean_10", "trimmed_mean_20", "winsorized_mean_10"),
    *("lower_trimmed_mean_10", "lower_trimmed_mean_20", "upper_trimmed_mean_10", "upper_trimmed_mean_20"),
    *("quantile_0.30", "quantile_0.35", "quantile_0.40", "quantile_0.45"),
    *("quantile_0.55", "quantile_0.60", "quantile_0.65", "quantile_0.70"),
    *("mean_minus_std_0.1", "mean_plus_std_0.1"),
)
VALIDATION, TEST, REALISED = 30, 20, 60  # windows
REFERENCE = "mean"  # of pooling: the configuration that every symbol has
POOL_DAYS = np.timedelta64(10, "D")  # that the last bars of pooled symbols may be apart
RETURNS = 100  # of which the forecast is made; with the volatility's first, the 128 bars that any study has
DECAY = 0.94  # of the volatility: RiskMetrics' for daily returns (1996)


# --- forecasts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SymbolForecasts:
    """One symbol's windows, and what every aggregate would have said at each."""

    windows: Windows
    points: dict[str, np.ndarray]  # by aggregate, [W], price
    volatility: np.ndarray  # [W], price

    def errors(self, points: np.ndarray) -> np.ndarray:
        """Relative to the last close, [W], as a study's metric has them."""
        return np.abs(points - self.windows.actuals[:, 0]) / self.windows.last_closes


def forecast(symbol: str, bars: Bars) -> SymbolForecasts:
    """Every aggregate of the plain distribution at every origin; at each from the bars before it alone."""
    everything = windowing.recent_origins(bars, len(bars), symbol=symbol, at_least=1)
    returns = np.diff(bars.close) / bars.close[:-1]  # [T - 1]; number i is of bar i + 1
    warm_up = windowing.MIN_CONTEXT - 1 - RETURNS
    known = np.empty(len(bars))  # [T]: number i from the returns before number i
    known[:warm_up] = np.nan
    variance = np.mean(returns[:warm_up] ** 2)
    for i in range(warm_up, len(bars)):
        known[i] = np.sqrt(variance)
        if i < len(returns):
            variance = DECAY * variance + (1 - DECAY) * returns[i] ** 2
    scaled = returns / known[:-1]
    now = np.array(everything.origins) - 1  # the return that is to be forecast
    seen = scaled[now[:, None] + np.arange(-RETURNS, 0)]  # [W, RETURNS]
    volatility = known[now] * everything.last_closes
    draw = Draw(everything.last_closes[:, None, None] + (volatility[:, None] * seen)[:, :, None])
    return SymbolForecasts(
        windows=everything,
        points={name: draw.aggregate(name)[:, 0] for name in AGGREGATES},
        volatility=volatility,
    )


# --- searches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchWindows:
    """Where in a symbol's windows one search looks; each a slice of the window axis."""

    validation: slice
    earlier: slice  # confirmation without validation
    confirmation: slice
    test: slice
    realised: slice

    def measured(
        self, name: str, errors: np.ndarray, *, on: slice | None = None, of: slice | None = None
    ) -> MeasuredConfiguration:
        """As a confirmation has it. on: the confirmation windows, if any; of: those of the search."""

        def measured_on(where: slice) -> Measurement:
            seen = errors[where]
            return measurement_of_errors(seen.tolist(), mae=float(seen.mean()), no_change_mae=math.nan)

        return MeasuredConfiguration(
            model="toto",
            params={"aggregate": name},
            source="default" if name == REFERENCE else "trial",
            confirmation=measured_on(on) if on else None,
            validation=measured_on(of or self.validation),
            test=measured_on(self.test),
        )


def dates(all_series: Sequence[SymbolForecasts], *, every: int) -> np.ndarray:
    """When searches are played, the newest first: every so many bars of the symbol with the densest bars."""
    times = [series.windows.bars.timestamps for series in all_series]
    densest = min(times, key=lambda one: ((one[-1] - one[0]) / (len(one) - 1), -len(one)))
    return densest[::-1][REALISED::every]


def search_at(series: SymbolForecasts, date: np.datetime64, *, confirmation: int) -> SearchWindows | None:
    """The search that ends with the last bar at `date`; None where some of its windows are missing."""
    bars, symbol, first = series.windows.bars, series.windows.symbol, series.windows.origins[0]

    def places(windows: Windows) -> slice:
        return slice(windows.origins[0] - first, windows.origins[-1] + 1 - first)

    end = int(np.searchsorted(bars.timestamps, date, side="right"))
    if end < 1 or end + REALISED > len(bars) or date - bars.timestamps[end - 1] > POOL_DAYS:
        return None
    seen = bars.slice(0, end)
    try:
        split = windowing.split(seen, symbol=symbol, validation=VALIDATION, test=TEST)
        confirming = windowing.recent_origins(seen, confirmation, symbol=symbol, before=split.test.origins[0])
    except DataError:  # too early
        return None
    validation, confirmed = places(split.validation), places(confirming)
    return SearchWindows(
        validation=validation,
        earlier=slice(confirmed.start, validation.start),
        confirmation=confirmed,
        test=places(split.test),
        realised=slice(end - first, end - first + REALISED),
    )
