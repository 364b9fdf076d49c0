"""Returns to what they are worth: Sharpe ratio, drawdown, win rate and the rest, each with how well it is known.

Owns these metrics. Flat bars count as returns of 0 and the risk-free rate is 0. Knows nothing of
orders or prices. A standard error or interval says how far luck alone goes, not what others' searches add: for that
there is the deflated Sharpe ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from objectives.bootstrap import ERRORS_95, ROUNDING, mean_interval
from objectives.fills import Booked

MIN_BARS = 20  # returns that a Sharpe ratio needs


@dataclass(frozen=True, kw_only=True)
class Performance:
    """What W returns are worth. None where there is too little to say it."""

    bars: int
    growth: float  # of the capital, over all bars: E_W - 1
    mean: float  # return a bar
    interval: tuple[float, float] | None  # 95 % of `mean`
    sharpe: float | None  # a year
    sharpe_error: float | None  # its standard error
    probabilistic: float | None  # chance that the Sharpe ratio is above 0
    drawdown: float  # largest, share of the highest capital before it
    trades: int
    win_rate: float | None
    win_interval: tuple[float, float] | None  # 95 %
    mean_trade: float | None  # return on its entry
    turnover: float  # traded value a bar, share of the capital
    exposure: float  # share of the capital that was in the market, on average


def performance(booked: Booked, bars_a_year: float) -> Performance:
    """Sum up what was booked."""
    returns, trades = booked.returns, booked.trades
    wins = int((trades.returns > 0).sum())
    guarded = len(returns) >= MIN_BARS
    ratio = sharpe_a_bar(returns) if guarded else None
    return Performance(
        bars=len(returns),
        growth=float(equity(returns)[-1]) - 1,
        mean=float(returns.mean()),
        interval=mean_interval(returns) if guarded else None,
        sharpe=None if ratio is None else ratio * math.sqrt(bars_a_year),
        sharpe_error=None if ratio is None else sharpe_error(returns) * math.sqrt(bars_a_year),
        probabilistic=None if ratio is None else probabilistic_sharpe(returns),
        drawdown=float(drawdowns(returns).max()),
        trades=len(trades),
        win_rate=wins / len(trades) if len(trades) else None,
        win_interval=wilson_interval(wins, len(trades)) if len(trades) else None,
        mean_trade=float(trades.returns.mean()) if len(trades) else None,
        turnover=float((trades.share * (1 + trades.exit / trades.entry)).sum()) / len(returns),
        exposure=float(booked.exposure.mean()),
    )


# --- capital ------------------------------------------------------------------------------------------------


def equity(returns: np.ndarray) -> np.ndarray:
    """The capital after each bar, [W] of returns [W], from a capital of 1; what is lost stays lost."""
    return np.cumprod(np.maximum(1 + returns, 0.0))


def drawdowns(returns: np.ndarray) -> np.ndarray:
    """1 - E_t / max of E_s for s <= t after each bar, [W] of returns [W]; the first capital is 1."""
    capital = equity(returns)
    return 1 - capital / np.maximum(np.maximum.accumulate(capital), 1.0)


def equal_weight(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Times and returns of a portfolio with an equal share in each symbol, set equal again at every bar.

    series: times [W], ascending, and returns [W] of each symbol. A symbol that has no bar at a time earns 0 then.
    """
    times = np.unique(np.concatenate([each for each, _ in series]))
    total = np.zeros(len(times))
    for each, returns in series:
        total[np.searchsorted(times, each)] += returns
    return times, total / len(series)


def monthly(timestamps: np.ndarray, returns: np.ndarray) -> Mapping[str, float]:
    """The growth of the capital in each month, by "2024-01", of returns [W] at these times."""
    months = timestamps.astype("datetime64[M]")
    return {str(month): float(equity(returns[months == month])[-1]) - 1 for month in np.unique(months)}


# --- Sharpe ratio -------------------------------------------------------------------------------------------


def sharpe_a_bar(returns: np.ndarray) -> float | None:
    """mean / sd (ddof 1) of returns [W]; None where nothing varies."""
    deviation = float(returns.std(ddof=1)) if len(returns) > 1 else 0.0
    return float(returns.mean()) / deviation if deviation > ROUNDING else None


def moments(returns: np.ndarray) -> tuple[float, float]:
    """Skewness and kurtosis (3 of a normal distribution) of returns [W] that vary."""
    centred = returns - returns.mean()
    variance = float((centred**2).mean())
    return float((centred**3).mean()) / variance**1.5, float((centred**4).mean()) / variance**2


def sharpe_error_of(ratio: float, count: int, skewness: float, kurtosis: float) -> float:
    """The standard error of a Sharpe ratio a bar from `count` returns (Mertens, 2002)."""
    return math.sqrt((1 - skewness * ratio + (kurtosis - 1) / 4 * ratio**2) / (count - 1))


def sharpe_error(returns: np.ndarray) -> float:
    """The standard error of `sharpe_a_bar`, of returns [W] that vary."""
    return sharpe_error_of(_ratio(returns), len(returns), *moments(returns))


def probabilistic_sharpe(returns: np.ndarray, benchmark: float = 0.0) -> float:
    """The chance that the Sharpe ratio a bar is above the benchmark's (Bailey and Lopez de Prado, 2012)."""
    return probability_above(_ratio(returns), benchmark, len(returns), *moments(returns))


def probability_above(ratio: float, benchmark: float, count: int, skewness: float, kurtosis: float) -> float:
    """Phi((S - S*) / se), of Sharpe ratios a bar from `count` returns."""
    return _phi((ratio - benchmark) / sharpe_error_of(ratio, count, skewness, kurtosis))


def deflated_sharpe(returns: np.ndarray, tried: Sequence[float]) -> float:
    """The chance that the Sharpe ratio is above the best of as many tries without skill (the same, 2014).

    tried: the Sharpe ratios a bar of everything that was tried on the symbol, this one too. Their spread is taken for
    no less than luck alone makes, 1/sqrt(W - 1).
    """
    ratios = np.asarray(tried, dtype=float)
    spread = float(ratios.std(ddof=1)) if len(ratios) > 1 else 0.0
    least = 1 / math.sqrt(len(returns) - 1)
    return probabilistic_sharpe(returns, best_without_skill(max(spread, least), len(ratios)))


def best_without_skill(spread: float, tries: int) -> float:
    """The highest Sharpe ratio to be expected of so many tries, at least 2, whose sd is `spread` and mean 0."""
    from scipy.special import ndtri

    tries = max(tries, 2)
    quantiles = ndtri(1 - 1 / tries), ndtri(1 - 1 / (math.e * tries))
    return spread * float((1 - np.euler_gamma) * quantiles[0] + np.euler_gamma * quantiles[1])


def _ratio(returns: np.ndarray) -> float:
    ratio = sharpe_a_bar(returns)
    if ratio is None:
        raise ValueError("these returns do not vary")
    return ratio


def _phi(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2


# --- trades -------------------------------------------------------------------------------------------------


def wilson_interval(wins: int, count: int) -> tuple[float, float]:
    """95 % of a share of wins (Wilson, 1927)."""
    share, square = wins / count, ERRORS_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    width = ERRORS_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return centre - width, centre + width
