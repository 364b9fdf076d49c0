"""Orders and bars to returns: what would have been filled, at which price, and what was left after costs.

Owns the fills and the complaint about bars that cannot be traded. Orders come from objectives/strategies.py, costs from
objectives/costs.py; what the returns are worth is said by objectives/performance.py.

A bar tells its open, high, low and close but not their order. Conservative fills take the worse of what may have come
first, optimistic fills the better: what would have been earned lies between. Notation: O, H, L and C of a bar; e is the
limit of an entry, g its target, p the price paid, x the price received. All is said of longs, shorts are mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forecasters import Bars
from objectives.bars import DataError, timestamp_text
from objectives.costs import AssetClass
from objectives.strategies import Brackets, Orders, Positions


@dataclass(frozen=True, kw_only=True, eq=False)
class Trades:
    """N trades in the order of their entries, all [N]. Bars are indices, of the first that was traded on."""

    entered: np.ndarray  # bar
    left: np.ndarray  # bar, that of the entry or a later one
    side: np.ndarray  # +1 long, -1 short
    entry: np.ndarray  # price
    exit: np.ndarray
    share: np.ndarray  # of the capital
    returns: np.ndarray  # net, on the entry: q (x/p - 1) - fee - fee x/p - borrow

    def __len__(self) -> int:
        return len(self.entered)


@dataclass(frozen=True, kw_only=True, eq=False)
class Booked:
    """What orders for W bars came to."""

    returns: np.ndarray  # float64 [W], net, share of the capital at the bar's begin; 0 where flat
    exposure: np.ndarray  # float64 [W], share of the capital that was in the market during a bar
    trades: Trades


def check_bars(bars: Bars, source: str) -> None:
    """Raise DataError, naming `source` and the time, for a price that is not above 0, or a high below its low."""
    for name in ("open", "high", "low", "close"):
        values = getattr(bars, name)
        if (bad := ~(np.isfinite(values) & (values > 0))).any():
            first = int(bad.argmax())
            raise DataError(
                f"{source}: bar of {timestamp_text(bars.timestamps[first])}: {name} {values[first]:g} is not a "
                "positive price; correct the row or delete it"
            )
    if (bad := bars.high < bars.low).any():
        first = int(bad.argmax())
        raise DataError(
            f"{source}: bar of {timestamp_text(bars.timestamps[first])}: high {bars.high[first]:g} is below low "
            f"{bars.low[first]:g}; correct the row or delete it"
        )


def book(orders: Orders, bars: Bars, asset: AssetClass, *, hold: int = 1, optimistic: bool = False) -> Booked:
    """What these orders for each of these bars [W] came to. Flat before the first bar and after the last.

    hold: bars that a bracket is held at most, that of its entry included: with 1 all is out at the close of the same
    bar; no other is entered until the one before has left, and each leg's share is of the capital at a bar's begin.
    optimistic: take the better of what a bar leaves open; bar by bar no worse than conservative fills with a hold of 1
    (with a longer hold it may leave sooner and enter another), if a limit order costs no more than a market order.
    Raises ValueError for a hold below 1, or orders for another number of bars.
    """
    if hold < 1 or orders.side.shape[-1] != len(bars):
        raise ValueError(f"orders for {orders.side.shape[-1]} bars, {len(bars)} bars, held for {hold}")
    if isinstance(orders, Positions):
        return _held(orders.side, bars, asset)
    legs = _entered(orders, bars, asset, hold=hold, optimistic=optimistic)
    return _booked(orders, legs, bars, asset)


def join(parts: Sequence[Booked]) -> Booked:
    """What was booked for consecutive bars in parts, each flat at both ends, as one."""
    offsets = np.cumsum([0, *(len(part.returns) for part in parts)])
    trades = [part.trades for part in parts]
    moved = {
        name: np.concatenate([getattr(each, name) + first for each, first in zip(trades, offsets[:-1], strict=True)])
        for name in ("entered", "left")
    }
    same = {
        name: np.concatenate([getattr(each, name) for each in trades])
        for name in ("side", "entry", "exit", "share", "returns")
    }
    return Booked(
        returns=np.concatenate([part.returns for part in parts]),
        exposure=np.concatenate([part.exposure for part in parts]),
        trades=Trades(**moved, **same),
    )


# --- positions ----------------------------------------------------------------------------------------------


def _held(side: np.ndarray, bars: Bars, asset: AssetClass) -> Booked:
    """E_t/E_(t-1) = (1 + q'(O_t/c - 1) - borrow)(1 - fee |q - q'|)(1 + q(C_t/O_t - 1)), q' being the side before.

    The last bar pays fee |q| to be flat. A loss of more than all is a loss of all.
    """
    before = np.concatenate([[0.0], side[:-1]])
    overnight = bars.open / np.concatenate([bars.open[:1], bars.close[:-1]]) - 1
    factors = np.maximum(1 + before * overnight - asset.night * (before < 0), 0.0)
    factors *= 1 - asset.market * np.abs(side - before)
    factors *= np.maximum(1 + side * (bars.close / bars.open - 1), 0.0)
    factors[-1] *= 1 - asset.market * abs(side[-1])

    after = np.append(side[1:], 0.0)
    entered = np.flatnonzero((side != 0) & (side != before))
    last = np.flatnonzero((side != 0) & (side != after))
    left = np.minimum(last + 1, len(side) - 1)  # at the next open, or at the last close
    signs, entry = side[entered], bars.open[entered]
    exits = np.where(last == len(side) - 1, bars.close[-1], bars.open[left])
    nights = left - entered
    trades = Trades(
        entered=entered,
        left=left,
        side=signs,
        entry=entry,
        exit=exits,
        share=np.ones(len(entered)),
        returns=_net(signs, exits / entry, asset.market, asset.market) - asset.night * nights * (signs < 0),
    )
    return Booked(returns=factors - 1, exposure=np.abs(side), trades=trades)


def _net(side: np.ndarray, ratio: np.ndarray, fee_in: float, fee_out: np.ndarray | float) -> np.ndarray:
    """q (x/p - 1) - fee - fee x/p."""
    return side * (ratio - 1) - fee_in - fee_out * ratio


# --- brackets -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Legs:
    """What each order would come to if no other were open, all [L, W]; prices are signed: -p of a short."""

    filled: np.ndarray
    entry: np.ndarray  # 1 where there is none
    exit: np.ndarray
    left: np.ndarray  # bar
    returns: np.ndarray  # 0 where nothing was filled


def net_returns(brackets: Brackets, bars: Bars, asset: AssetClass) -> np.ndarray:
    """The returns [W] that `book` finds with a hold of 1 and conservative fills, and nothing else."""
    return brackets.share * _entered(brackets, bars, asset, hold=1, optimistic=False).returns.sum(axis=0)


def mean_return(brackets: Brackets, bars: Bars, asset: AssetClass, *, hold: int) -> float:
    """What the trades that `book` finds with conservative fills earn on their entries, a bar."""
    legs = _entered(brackets, bars, asset, hold=hold, optimistic=False)
    return brackets.share * float(legs.returns[_taken(legs)].sum()) / len(bars)


def _entered(brackets: Brackets, bars: Bars, asset: AssetClass, *, hold: int, optimistic: bool) -> _Legs:
    """What each order would come to if no other were open.

    Entry: at O if O <= e, else at e if L < e. Target: in the entry's bar, H > g if filled at O; if filled inside the
    bar C >= g, as H may have come before (optimistic: H > g in both). Then, while carried, at O if O >= g, else g if
    H > g. Else out at the close of the last bar.
    """
    side = brackets.side
    # Of a short the negative prices: then its entry, too, is from above and its target above the entry.
    opens, closes, high, low = (side * prices for prices in (bars.open, bars.close, bars.high, bars.low))
    highs, lows = np.maximum(high, low), np.minimum(high, low)
    if brackets.entry is None:
        at_open, filled, entry = True, side != 0, opens
    else:
        limit = side * brackets.entry
        at_open = opens <= limit
        filled = (at_open | (lows < limit)) & (side != 0)
        entry = np.where(at_open, opens, limit)
    target, exits, reached = None, closes, np.zeros(side.shape, dtype=bool)
    if brackets.target is not None:
        target = side * brackets.target
        filled &= entry < target
        high_counts = highs > target
        reached = high_counts | (closes >= target) if optimistic else np.where(at_open, high_counts, closes >= target)
        exits = np.where(reached, target, closes)
    entry = np.where(filled, entry, 1.0)
    bar = np.arange(side.shape[-1])
    left = np.broadcast_to(bar, side.shape)
    if hold > 1:
        exits, reached, left = _carried(side, target, bars, exits, reached, hold)
    fee_in = asset.market if brackets.entry is None else asset.limit_fee
    returns = _net(side, exits / entry, fee_in, np.where(reached, asset.limit_fee, asset.market))
    if hold > 1:
        returns -= asset.night * (left - bar) * (side < 0)
    return _Legs(filled=filled, entry=entry, exit=exits, left=left, returns=returns * filled)


def _carried(
    side: np.ndarray, target: np.ndarray | None, bars: Bars, exits: np.ndarray, reached: np.ndarray, hold: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exit, whether it is at the target or better, and its bar, of orders of [L, W] that are carried on."""
    count = side.shape[-1]
    exits, reached, left = exits.copy(), reached.copy(), np.broadcast_to(np.arange(count), side.shape).copy()
    for later in range(1, min(hold, count)):
        on = ~reached[:, : count - later]  # orders of the bars that have so many after them
        opens, closes, high, low = (
            side[:, : count - later] * prices[later:] for prices in (bars.open, bars.close, bars.high, bars.low)
        )
        left[:, : count - later][on] += 1
        exits[:, : count - later][on] = closes[on]
        if target is not None:
            goal = target[:, : count - later]
            hit = on & ((opens >= goal) | (np.maximum(high, low) > goal))
            exits[:, : count - later][hit] = np.maximum(opens, goal)[hit]
            reached[:, : count - later] |= hit
    return exits, reached, left


def _taken(legs: _Legs) -> np.ndarray:
    """Which orders were placed and filled while no earlier one of their leg was open, [L, W]."""
    if (legs.left == np.arange(legs.left.shape[-1])).all():
        return legs.filled
    taken = np.zeros_like(legs.filled)
    for row, filled, left in zip(taken, legs.filled, legs.left.tolist(), strict=True):
        free = 0
        for bar in np.flatnonzero(filled).tolist():
            if bar >= free:
                row[bar] = True
                free = left[bar] + 1
    return taken


def _booked(brackets: Brackets, legs: _Legs, bars: Bars, asset: AssetClass) -> Booked:
    """The trades, and the capital from bar to bar."""
    taken = _taken(legs)
    leg, entered = np.nonzero(taken)
    order = np.argsort(entered, kind="stable")
    leg, entered = leg[order], entered[order]
    place = leg, entered
    trades = Trades(
        entered=entered,
        left=legs.left[place],
        side=brackets.side[place],
        entry=np.abs(legs.entry[place]),
        exit=np.abs(legs.exit[place]),
        share=np.full(len(entered), brackets.share),
        returns=legs.returns[place],
    )
    if (trades.left == trades.entered).all():
        return Booked(
            returns=brackets.share * legs.returns.sum(axis=0),
            exposure=brackets.share * taken.sum(axis=0),
            trades=trades,
        )
    fee = asset.market if brackets.entry is None else asset.limit_fee
    returns, exposure = np.zeros(len(bars)), np.zeros(len(bars))
    for first, last, side, price, earned in zip(
        trades.entered, trades.left, trades.side, trades.entry, trades.returns, strict=True
    ):
        closes = bars.close[first:last]
        nights = np.arange(len(closes)) * (side < 0)
        worth = np.concatenate([[1.0], _net(side, closes / price, fee, 0.0) - asset.night * nights + 1, [1 + earned]])
        worth = np.maximum(worth, 0.0)  # a loss of more than all is a loss of all
        moves = np.divide(worth[1:], worth[:-1], out=np.ones(len(worth) - 1), where=worth[:-1] > 0) - 1
        returns[first : last + 1] += brackets.share * moves
        exposure[first : last + 1] += brackets.share
    return Booked(returns=returns, exposure=exposure, trades=trades)
