"""Forecasts and past bars to orders: what each strategy would have done before a bar began.

Owns the strategies' rules and what they may know. A rule gets `Known`, which holds nothing of the bar that it decides
for, nor of any later one, and answers with orders. Knows nothing of what became of them: objectives/fills.py does.

Notation of the rules: c is the last close, f_C, f_H and f_L are the forecasts of the bar's close, high and low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forecasters import Bars, ExpectedError

SIGMA_BARS = 60  # returns whose standard deviation is the unit of offsets
BAND = (0.40, 0.60)  # quantiles of a forecast that `ci_guard` compares
CI_GUARD = 1.0  # bands that a forecast must be away from the last close
NO_OFFSETS = (0.0, 0.0)


class StrategyError(ExpectedError, ValueError):
    """A strategy is unknown, or the bars or forecasts that it needs are missing."""


# --- what is known ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecasts:
    """One-step forecasts of W consecutive bars, each made before its bar began; float64 [W], price.

    None where a key was not forecast.
    """

    close: np.ndarray
    high: np.ndarray | None = None
    low: np.ndarray | None = None
    band: np.ndarray | None = None  # distance of the close's two quantiles `BAND`, over the last close


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is known before each of W consecutive bars: entry t holds nothing of bar t. All float64 [W]."""

    close: np.ndarray  # of the bar before, price
    high: np.ndarray
    low: np.ndarray
    sigma: np.ndarray  # sd (ddof 1) of the last `SIGMA_BARS` log returns or as many as there are; 0 where there is none
    forecasts: Forecasts

    def __len__(self) -> int:
        return len(self.close)

    def slice(self, start: int, stop: int) -> Known:
        """What is known before the bars [start, stop), as views."""
        part = slice(start, stop)
        values = {name: each for name, each in vars(self.forecasts).items() if each is not None}
        return Known(
            close=self.close[part],
            high=self.high[part],
            low=self.low[part],
            sigma=self.sigma[part],
            forecasts=Forecasts(**{name: each[part] for name, each in values.items()}),
        )


def known_before(bars: Bars, start: int, forecasts: Forecasts) -> Known:
    """What is known before each of the bars from `start` on, which the forecasts [W] are of.

    bars: all of them, older ones too; only those before bar start + W - 1 are read.
    Raises ValueError where `start` is 0, or forecasts are no prices or not of W bars.
    """
    count = len(forecasts.close)
    if start < 1 or start + count > len(bars):
        raise ValueError(f"forecasts of {count} bars from bar {start} on, of {len(bars)} bars with one before them")
    for name, values in vars(forecasts).items():
        if values is None:
            continue
        least = values >= 0 if name == "band" else values > 0
        if values.shape != (count,) or not (np.isfinite(values) & least).all():
            raise ValueError(f"forecasts of the {name} must be {count} prices")
    before = slice(start - 1, start + count - 1)
    return Known(
        close=bars.close[before],
        high=bars.high[before],
        low=bars.low[before],
        sigma=trailing_sigma(bars.close[: start + count - 1], count),
        forecasts=forecasts,
    )


def trailing_sigma(closes: np.ndarray, count: int) -> np.ndarray:
    """The sd (ddof 1) of the last `SIGMA_BARS` log returns at each of the last `count` closes, as `Known` has it."""
    returns = np.diff(np.log(closes))
    ends = range(len(returns) - count + 1, len(returns) + 1)  # returns known at each of them
    if ends[0] >= SIGMA_BARS:
        windows = np.lib.stride_tricks.sliding_window_view(returns, SIGMA_BARS)
        return windows[-count:].std(axis=1, ddof=1)
    return np.array([returns[max(0, end - SIGMA_BARS) : end].std(ddof=1) if end > 1 else 0.0 for end in ends])


# --- orders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """What is held during each bar: bought or sold at its open where it changes, and sold at the last close."""

    side: np.ndarray  # float64 [W], +1 long, 0 flat, -1 short


@dataclass(frozen=True, kw_only=True, eq=False)
class Brackets:
    """An entry and a target for each bar, in L legs that know nothing of each other.

    The target of a market entry at an open that lies beyond it is no order.
    """

    side: np.ndarray  # float64 [L, W], +1 long, 0 no order, -1 short
    entry: np.ndarray | None  # [L, W], limit price; None: at the open, as a market order
    target: np.ndarray | None  # [L, W], limit price; None: out at the close
    share: float = 1.0  # of the capital, for each leg


Orders = Positions | Brackets


# --- rules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A rule and what it needs."""

    name: str
    rule: Callable[[Known, bool, tuple[float, float]], Orders]  # what is known, whether it may be short, offsets
    forecasts: tuple[str, ...]  # fields of `Forecasts`
    columns: tuple[str, ...]  # of the bars, beside the close
    offsets: bool = False  # whether it has offsets to be fitted

    def orders(self, known: Known, *, shorts: bool, offsets: tuple[float, float] = NO_OFFSETS) -> Orders:
        """The orders for each bar.

        shorts: whether the symbol may be sold short. offsets: (of the forecast low, of the forecast high) in sigmas.
        Raises StrategyError where a forecast is missing.
        """
        if missing := [name for name in self.forecasts if getattr(known.forecasts, name) is None]:
            raise StrategyError(f"{self.name} needs forecasts of {', '.join(missing)}; forecast those keys too")
        return self.rule(known, shorts, offsets)

    def check_bars(self, bars: Bars, source: str) -> None:
        """Raise StrategyError, naming `source`, where the bars lack a column, which reading them filled with close."""
        missing = [name for name in self.columns if np.array_equal(getattr(bars, name), bars.close)]
        if missing:
            raise StrategyError(
                f"{source}: {self.name} needs {', '.join(missing)}, which the bars lack (equal to close at every bar); "
                "add the column or leave the strategy out"
            )


def strategies(names: tuple[str, ...] = ()) -> tuple[Strategy, ...]:
    """The strategies of these names, or all of them. Raises StrategyError for an unknown one."""
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise StrategyError(f"unknown strategy {', '.join(unknown)}; the strategies are {', '.join(STRATEGIES)}")
    return tuple(STRATEGIES[name] for name in names or STRATEGIES)


def _side(known: Known, shorts: bool) -> np.ndarray:
    """The sign of the change of the close that is forecast, [W]."""
    return _allowed(np.sign(known.forecasts.close - known.close), shorts)


def _allowed(side: np.ndarray, shorts: bool) -> np.ndarray:
    return side if shorts else np.maximum(side, 0.0)


def _buy_hold(known: Known, shorts: bool, offsets: tuple[float, float]) -> Positions:
    """Long from the first open to the last close."""
    return Positions(side=np.ones(len(known)))


def _simple(known: Known, shorts: bool, offsets: tuple[float, float]) -> Positions:
    """The side of the forecast close, from the open on until it changes."""
    return Positions(side=_side(known, shorts))


def _all_signals(known: Known, shorts: bool, offsets: tuple[float, float]) -> Positions:
    """Long where f_C > c, f_H > the last high and f_L > the last low; short where all are below; else flat."""
    forecasts, last = _keys(known), (known.close, known.high, known.low)
    above = np.all([f > k for f, k in zip(forecasts, last, strict=True)], axis=0)
    below = np.all([f < k for f, k in zip(forecasts, last, strict=True)], axis=0)
    return Positions(side=_allowed(above.astype(float) - below, shorts))


def _shutdown(known: Known, shorts: bool, offsets: tuple[float, float]) -> Positions:
    """As simple, but flat for one bar after a bar on which a position was held against the move of the close."""
    side = _side(known, shorts)
    wrong = np.zeros(len(side), dtype=bool)  # entry t: whether the side of bar t - 1 was wrong, had it been held
    wrong[1:] = side[:-1] * np.diff(known.close) < 0
    places = np.arange(len(side))
    run = places - np.maximum.accumulate(np.where(wrong, -1, places))  # wrong sides on end, up to this bar
    return Positions(side=np.where(run % 2 == 1, 0.0, side))  # a bar that was sat out ends no position


def _ci_guard(known: Known, shorts: bool, offsets: tuple[float, float]) -> Positions:
    """As simple, where |f_C/c - 1| is above the distance of the forecast return's quantiles; else flat."""
    band = known.forecasts.band
    assert band is not None
    sure = np.abs(known.forecasts.close / known.close - 1) > CI_GUARD * band
    return Positions(side=np.where(sure, _side(known, shorts), 0.0))


def _takeprofit(known: Known, shorts: bool, offsets: tuple[float, float]) -> Brackets:
    """The side of the forecast close at the open, target f_H; short f_L."""
    side = _side(known, shorts)
    _, high, low = _keys(known)
    return Brackets(side=side[None], entry=None, target=np.where(side > 0, high, low)[None])


def _highlow(known: Known, shorts: bool, offsets: tuple[float, float]) -> Brackets:
    """The side of the forecast close at the limit f_L, out at the close; short f_H."""
    side = _side(known, shorts)
    _, high, low = _keys(known)
    return Brackets(side=side[None], entry=np.where(side > 0, low, high)[None], target=None)


def _maxdiff(known: Known, shorts: bool, offsets: tuple[float, float]) -> Brackets:
    """Long where |f_H/c - 1| > |f_L/c - 1|, else short: in and out at the levels of `_levels`; none if they cross."""
    _, high, low = _keys(known)
    up = np.abs(high - known.close) > np.abs(low - known.close)
    below, above = _levels(known, offsets)
    side = np.where(up, 1.0, -1.0 if shorts else 0.0) * (below < above)
    return Brackets(side=side[None], entry=np.where(up, below, above)[None], target=np.where(up, above, below)[None])


def _always_on(known: Known, shorts: bool, offsets: tuple[float, float]) -> Brackets:
    """Both sides of maxdiff at once with half the capital each; only the long half where there are no shorts."""
    below, above = _levels(known, offsets)
    signs = np.array([1.0, -1.0] if shorts else [1.0])
    side = signs[:, None] * (below < above)
    if not shorts:
        return Brackets(side=side, entry=below[None], target=above[None], share=0.5)
    return Brackets(side=side, entry=np.stack([below, above]), target=np.stack([above, below]), share=0.5)


def _levels(known: Known, offsets: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Where maxdiff buys, min(f_L + d_L sigma c, c), and where it sells, max(f_H + d_H sigma c, c). Each [W]."""
    _, high, low = _keys(known)
    unit = known.sigma * known.close
    return np.minimum(low + offsets[0] * unit, known.close), np.maximum(high + offsets[1] * unit, known.close)


def _keys(known: Known) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The forecasts of close, high and low, each [W]."""
    high, low = known.forecasts.high, known.forecasts.low
    assert high is not None
    assert low is not None
    return known.forecasts.close, high, low


OPEN, ALL = ("open",), ("open", "high", "low")
STRATEGIES = {
    one.name: one
    for one in (
        Strategy(name="buy_hold", rule=_buy_hold, forecasts=(), columns=OPEN),
        Strategy(name="simple", rule=_simple, forecasts=("close",), columns=OPEN),
        Strategy(name="all_signals", rule=_all_signals, forecasts=("close", "high", "low"), columns=ALL),
        Strategy(name="shutdown", rule=_shutdown, forecasts=("close",), columns=OPEN),
        Strategy(name="ci_guard", rule=_ci_guard, forecasts=("close", "band"), columns=OPEN),
        Strategy(name="takeprofit", rule=_takeprofit, forecasts=("close", "high", "low"), columns=ALL),
        Strategy(name="highlow", rule=_highlow, forecasts=("close", "high", "low"), columns=ALL),
        Strategy(name="maxdiff", rule=_maxdiff, forecasts=("high", "low"), columns=ALL, offsets=True),
        Strategy(name="always_on", rule=_always_on, forecasts=("high", "low"), columns=ALL, offsets=True),
    )
}
FORECASTING = tuple(name for name, one in STRATEGIES.items() if one.forecasts)  # what tells two configurations apart
