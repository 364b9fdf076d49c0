"""Bars to be traded on in tests: the worked example, walks without drift, and forecasts of them without skill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from forecasters import Bars
from objectives.costs import AssetClass
from objectives.strategies import Forecasts, Known, known_before

# Worked by hand: a close of 100, then five bars; fees of .001 a side and nothing else.
OHLC = [(101, 104, 99, 103), (103, 107, 100, 101), (99, 102, 96, 98), (98, 99.5, 94, 97), (97, 103, 96.5, 102)]
CLOSE_HIGH_LOW = [(102, 103, 99.5), (104, 106, 101), (102, 103, 100), (96, 99, 95), (99, 100, 96.5)]  # forecasts
WORKED = AssetClass(
    name="equity", days_a_year=252, shorts=True, limit_fee=0.001, market_fee=0.001, half_spread=0.0, borrow=0.0
)
FREE = replace(WORKED, limit_fee=0.0, market_fee=0.0)


def bars_of(prices: np.ndarray) -> Bars:
    """Daily bars of open, high, low and close, [T, 4]."""
    days = np.datetime64("2024-01-01") + np.arange(len(prices))
    opens, highs, lows, closes = np.asarray(prices, dtype=float).T
    return Bars(timestamps=days.astype("datetime64[ns]"), open=opens, high=highs, low=lows, close=closes, volume=None)


def worked_bars() -> Bars:
    """The bar before, and the five."""
    return bars_of(np.array([(100, 100, 100, 100), *OHLC]))


def worked_known(band: float = 0.0) -> Known:
    close, high, low = np.array(CLOSE_HIGH_LOW, dtype=float).T
    return known_before(worked_bars(), 1, Forecasts(close=close, high=high, low=low, band=np.full(5, band)))


def walk(seed: int, count: int, *, deviation: float = 0.02, moves: int = 12) -> Bars:
    """Bars of a continuous walk whose price is expected to stay, with a jump over night: so many moves a bar.

    Its extremes are those of Brownian bridges between the moves: with those of the moves alone every limit order would
    be filled at a price that the walk had already left behind.
    """
    rng = np.random.default_rng(seed)
    variance = deviation**2 / moves
    steps = rng.normal(-variance / 2, np.sqrt(variance), (count, moves))
    logs = steps.cumsum().reshape(count, moves)  # from the open of each bar on
    ends, changes = logs[:, 1:] + logs[:, :-1], np.diff(logs, axis=1)
    above, below = (
        np.sqrt(changes**2 - 2 * variance * np.log(rng.uniform(size=changes.shape))) for _ in ("highs", "lows")
    )
    extremes = ((ends + above) / 2).max(axis=1), ((ends - below) / 2).min(axis=1)
    return bars_of(100 * np.exp(np.stack([logs[:, 0], *extremes, logs[:, -1]], axis=1)))


def unskilled(bars: Bars, start: int, seed: int) -> Forecasts:
    """Forecasts of the bars from `start` on that know the bars before and nothing else."""
    rng = np.random.default_rng(seed)
    last = bars.close[start - 1 : -1]
    up = float(np.median(bars.high[1:start] / bars.close[: start - 1] - 1))
    down = float(np.median(bars.low[1:start] / bars.close[: start - 1] - 1))
    noise = rng.normal(0, 0.005, (3, len(last)))
    return Forecasts(
        close=last * (1 + noise[0]),
        high=last * (1 + up + noise[1]),
        low=last * (1 + down + noise[2]),
        band=np.full(len(last), 0.003),
    )
