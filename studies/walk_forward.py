"""Offsets of a strategy, fitted to the bars before those that they are used on, step after step through a history.

Owns the fitting and what a backtest asks of the length of a history. What is earned with the fitted offsets stands
beside what no offsets earn on the same bars: their difference says whether fitting helps. Pure: knows nothing of files,
databases or commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from forecasters import Bars
from objectives.bars import DataError
from objectives.bootstrap import mean_interval
from objectives.costs import AssetClass
from objectives.fills import Booked, book, join, mean_return, net_returns
from objectives.strategies import NO_OFFSETS, SIGMA_BARS, Brackets, Known, Strategy, StrategyError

TRAIN = 250  # bars that offsets are fitted to; fitted to fewer they lose out of sample what they earn in it
MIN_TRAIN = 60
STEP = 20  # bars that they are then used on
EVALUATIONS = 500  # of the mean return, for each fit; DIRECT ends the iteration that it is in
LARGEST = 1.0  # offset to either side, sigmas


@dataclass(frozen=True, kw_only=True)
class Step:
    """One fit. Bars are indices among those that were given."""

    start: int  # the first bar that the offsets are used on; they were fitted to those right before it
    stop: int
    offsets: tuple[float, float]  # of the forecast low and the forecast high, sigmas
    in_sample: float  # mean net return a bar, on the bars that they were fitted to
    in_sample_zero: float  # the same without offsets


@dataclass(frozen=True, kw_only=True, eq=False)
class Rivals:
    """What was booked on the same bars with the fitted offsets and without any, flat between two steps."""

    fitted: Booked
    zero: Booked

    @property
    def gain(self) -> float:
        """Mean net return a bar of the fitted offsets less that of none."""
        return float((self.fitted.returns - self.zero.returns).mean())

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % of `gain`; None where both earned the same at every bar."""
        return mean_interval(self.fitted.returns - self.zero.returns)


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """A strategy's steps through a history, fitted with conservative fills and booked with both kinds."""

    steps: tuple[Step, ...]
    conservative: Rivals
    optimistic: Rivals


def check_train(train: int) -> None:
    """Raise StrategyError where offsets would be fitted to too few bars."""
    if train < MIN_TRAIN:
        raise StrategyError(
            f"--train {train}: offsets fitted to fewer than {MIN_TRAIN} bars earn in sample what they lose after it; "
            f"train on at least {MIN_TRAIN} bars, better {TRAIN}"
        )


def bars_needed(bars: int, train: int, min_context: int) -> int:
    """How long a history must be to be traded on its last `bars` bars, after `train` more (0: nothing is fitted).

    min_context: bars before the first forecast, at least.
    """
    return bars + train + max(min_context, SIGMA_BARS + 1)


def check_length(symbol: str, history: Bars, *, bars: int, train: int, min_context: int) -> None:
    """Raise DataError where a history is shorter than `bars_needed`."""
    needed = bars_needed(bars, train, min_context)
    if len(history) < needed:
        raise DataError(
            f"{symbol}: has {len(history)} bars and needs {needed}: {bars} to trade on, {train} to fit offsets to and "
            f"{needed - bars - train} before them; add older bars or ask for fewer with --bars or --train"
        )


def walk_forward(
    strategy: Strategy,
    known: Known,
    bars: Bars,
    asset: AssetClass,
    *,
    train: int = TRAIN,
    step: int = STEP,
    evaluations: int = EVALUATIONS,
    hold: int = 1,
) -> Walk:
    """Fit a strategy's offsets to `train` bars, use them on the next `step`, and roll on to the last bar.

    known, bars: of the first `train` bars and of those to be traded on after them, [W]. A step is flat at both ends.
    Raises StrategyError for a training that is too short, and ValueError for a strategy without offsets or where
    nothing is left to be traded on.
    """
    check_train(train)
    if not strategy.offsets or len(bars) <= train or len(bars) != len(known):
        raise ValueError(f"{strategy.name} on {len(bars)} bars, {len(known)} of them known, {train} to be fitted to")
    earned = _Earned(strategy, known, bars, asset, hold)
    steps = tuple(
        _fit(earned.between(start - train, start), start, min(start + step, len(bars)), evaluations)
        for start in range(train, len(bars), step)
    )

    def rivals(optimistic: bool) -> Rivals:
        booked = [
            [
                book(
                    strategy.orders(known.slice(one.start, one.stop), shorts=asset.shorts, offsets=offsets),
                    bars.slice(one.start, one.stop),
                    asset,
                    hold=hold,
                    optimistic=optimistic,
                )
                for offsets in (one.offsets, NO_OFFSETS)
            ]
            for one in steps
        ]
        fitted, zero = (join(parts) for parts in zip(*booked, strict=True))
        return Rivals(fitted=fitted, zero=zero)

    return Walk(steps=steps, conservative=rivals(optimistic=False), optimistic=rivals(optimistic=True))


def _fit(earned: Callable[[tuple[float, float]], float], start: int, stop: int, evaluations: int) -> Step:
    """The offsets that earn the most a bar by DIRECT (Jones, Perttunen and Stuckman, 1993).

    Its first point is the middle, no offsets, which stays where no other is better.
    """
    from scipy.optimize import direct

    bounds = [(-LARGEST, LARGEST)] * 2
    found = direct(lambda point: -earned((point[0], point[1])), bounds, maxfun=evaluations)
    offsets = float(found.x[0]), float(found.x[1])
    return Step(start=start, stop=stop, offsets=offsets, in_sample=earned(offsets), in_sample_zero=earned(NO_OFFSETS))


class _Earned:
    """The mean net return a bar of some offsets, between any two bars, with conservative fills.

    Trades that end with their bar are the same whatever bars they are fitted with: they are booked once for all steps,
    which ask for much the same offsets.
    """

    def __init__(self, strategy: Strategy, known: Known, bars: Bars, asset: AssetClass, hold: int) -> None:
        self._strategy, self._known, self._bars, self._asset, self._hold = strategy, known, bars, asset, hold
        self._sums: dict[tuple[float, float], np.ndarray] = {}  # of the returns before each bar, [W + 1]

    def between(self, first: int, stop: int) -> Callable[[tuple[float, float]], float]:
        if self._hold == 1:
            return lambda offsets: self._from_sums(offsets, first, stop)
        known, bars = self._known.slice(first, stop), self._bars.slice(first, stop)
        return lambda offsets: mean_return(self._orders(known, offsets), bars, self._asset, hold=self._hold)

    def _from_sums(self, offsets: tuple[float, float], first: int, stop: int) -> float:
        sums = self._sums.get(offsets)
        if sums is None:
            sums = np.zeros(len(self._bars) + 1)
            net_returns(self._orders(self._known, offsets), self._bars, self._asset).cumsum(out=sums[1:])
            self._sums[offsets] = sums
        return float(sums[stop] - sums[first]) / (stop - first)

    def _orders(self, known: Known, offsets: tuple[float, float]) -> Brackets:
        orders = self._strategy.orders(known, shorts=self._asset.shorts, offsets=offsets)
        assert isinstance(orders, Brackets)
        return orders
