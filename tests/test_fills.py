"""Fills: against a slow account of one order after the other, bounds of what a bar leaves open, and every cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from traded import FREE, WORKED, bars_of, unskilled, walk

from forecasters import Bars
from objectives.bars import DataError
from objectives.costs import AssetClass, bars_a_day
from objectives.fills import book, check_bars, join, mean_return, net_returns
from objectives.strategies import STRATEGIES, Brackets, Positions, known_before

COSTLY = AssetClass(
    name="equity",
    days_a_year=252,
    shorts=True,
    limit_fee=0.0005,
    market_fee=0.0008,
    half_spread=0.0004,
    borrow=0.252,
)


def random_brackets(seed: int, bars: Bars, *, entry: bool = True, target: bool = True) -> Brackets:
    """Two legs of random sides, entries mostly within reach, and targets beyond them."""
    rng = np.random.default_rng(seed)
    shape = (2, len(bars))
    side = rng.integers(-1, 2, shape).astype(float)
    last = np.concatenate([[100.0], bars.close[:-1]])
    entries = last * (1 - side * rng.uniform(-0.01, 0.02, shape))
    goals = np.where(side > 0, np.maximum(entries, last), np.minimum(entries, last))
    goals = goals * (1 + side * rng.uniform(0.001, 0.03, shape))
    return Brackets(side=side, entry=entries if entry else None, target=goals if target else None, share=0.5)


def slowly(
    orders: Brackets, bars: Bars, asset: AssetClass, hold: int, optimistic: bool
) -> tuple[np.ndarray, list[tuple[int, int, float, float, float]]]:
    """Returns [W] and trades (entered, left, paid, received, return), one order after the other, as the rules say."""
    returns = np.zeros(len(bars))
    trades = []
    for leg in range(len(orders.side)):
        free = 0
        for t, q in enumerate(orders.side[leg]):
            if t < free or q == 0:
                continue
            o, h, low, c = (float(x[t]) for x in (bars.open, bars.high, bars.low, bars.close))
            e = None if orders.entry is None else float(orders.entry[leg, t])
            g = None if orders.target is None else float(orders.target[leg, t])
            at_open = e is None or (o <= e if q > 0 else o >= e)
            if not at_open and e is not None and not (low < e if q > 0 else h > e):
                continue
            paid = o if at_open or e is None else e
            if g is not None and not (paid < g if q > 0 else paid > g):
                continue
            fee_in = asset.market_fee + asset.half_spread if e is None else asset.limit_fee
            received = None
            if g is not None:
                touched = h > g if q > 0 else low < g
                ends_beyond = c >= g if q > 0 else c <= g
                if (touched or ends_beyond) if optimistic else (touched if at_open else ends_beyond):
                    received = g
            j = t
            worth = [1.0]
            while received is None and j - t + 1 < hold and j + 1 < len(bars):
                worth.append(1 + q * (float(bars.close[j]) / paid - 1) - fee_in - asset.night * (j - t) * (q < 0))
                j += 1
                o, h, low = float(bars.open[j]), float(bars.high[j]), float(bars.low[j])
                if g is not None and (o >= g if q > 0 else o <= g):
                    received = o
                elif g is not None and (h > g if q > 0 else low < g):
                    received = g
            fee_out = asset.limit_fee if received is not None else asset.market_fee + asset.half_spread
            x = float(bars.close[j]) if received is None else received
            r = q * (x / paid - 1) - fee_in - fee_out * x / paid - asset.night * (j - t) * (q < 0)
            worth.append(1 + r)
            for bar, (before, after) in enumerate(pairwise(worth), start=t):
                returns[bar] += orders.share * (after / before - 1)
            trades.append((t, j, paid, x, r))
            free = j + 1
    return returns, sorted(trades)


@pytest.mark.parametrize("optimistic", [False, True])
@pytest.mark.parametrize("hold", [1, 2, 5])
@pytest.mark.parametrize(("entry", "target"), [(True, True), (True, False), (False, True)])
def test_brackets_one_after_the_other(hold: int, optimistic: bool, entry: bool, target: bool) -> None:
    for seed in range(5):
        bars = walk(seed, 60)
        orders = random_brackets(seed, bars, entry=entry, target=target)
        found = book(orders, bars, COSTLY, hold=hold, optimistic=optimistic)
        returns, trades = slowly(orders, bars, COSTLY, hold, optimistic)
        assert len(trades) > 10
        assert found.returns == pytest.approx(returns, abs=1e-13)
        columns = (getattr(found.trades, name) for name in ("entered", "left", "entry", "exit", "returns"))
        mine = sorted(zip(*(column.tolist() for column in columns), strict=True))
        assert np.array(mine) == pytest.approx(np.array(trades), abs=1e-10)
        if hold > 1:
            assert (found.trades.left > found.trades.entered).any()
        if not optimistic:
            assert mean_return(orders, bars, COSTLY, hold=hold) == pytest.approx(0.5 * sum(t[-1] for t in trades) / 60)
            if hold == 1:
                assert net_returns(orders, bars, COSTLY).tolist() == found.returns.tolist()


def test_optimistic_fills_are_never_worse_bar_by_bar() -> None:
    better = 0
    for seed in range(40):
        bars = walk(seed, 124)
        known = known_before(bars, 64, unskilled(bars, 64, seed))
        for strategy in STRATEGIES.values():
            orders = strategy.orders(known, shorts=True)
            worse, best = (book(orders, bars.slice(64, 124), COSTLY, optimistic=each).returns for each in (False, True))
            assert (best >= worse).all(), strategy.name
            better += int((best > worse).sum())
    assert better > 100


def test_a_target_that_is_carried() -> None:
    """Long at 99 with a target of 105: not reached, then the open lies beyond it."""
    bars = bars_of(np.array([(100, 101, 98, 100), (101, 104, 100, 103), (106, 107, 105, 106), (100, 100, 90, 95)]))
    orders = Brackets(side=np.ones((1, 4)), entry=np.full((1, 4), 99.0), target=np.full((1, 4), 105.0))
    found = book(orders, bars, FREE, hold=3)
    assert found.trades.entered.tolist() == [0, 3]
    assert found.trades.left.tolist() == [2, 3]
    assert found.trades.exit.tolist() == [106.0, 95.0]
    assert found.returns == pytest.approx([100 / 99 - 1, 103 / 100 - 1, 106 / 103 - 1, 95 / 99 - 1])
    assert found.exposure.tolist() == [1, 1, 1, 1]
    touched = replace(bars, open=np.array([100.0, 101, 105, 100]), high=np.array([101.0, 104, 105, 100]))
    assert book(orders, touched, FREE, hold=3).trades.exit.tolist() == [105.0, 95.0]
    dear = replace(FREE, limit_fee=0.01)  # which the target pays that the open touches, and a close would not
    assert book(orders, touched, dear, hold=3).trades.returns[0] == pytest.approx(105 / 99 - 1 - 0.01 * (1 + 105 / 99))
    shorter = book(orders, bars, FREE, hold=2)  # out at the close of the second bar, and in again at an open below 99
    assert shorter.trades.exit.tolist() == [103.0, 95.0]
    assert shorter.trades.left.tolist() == [1, 3]


def test_market_orders_pay_the_spread_and_shorts_a_night() -> None:
    bars = bars_of(np.array([(100, 100, 100, 100), (100, 100, 100, 100), (100, 100, 100, 100)]))
    short = book(Positions(side=np.array([-1.0, -1.0, 0.0])), bars, COSTLY)
    night = 0.252 / 252
    assert short.returns == pytest.approx([-0.0012, -night, (1 - night) * (1 - 0.0012) - 1], abs=1e-15)
    assert short.trades.returns == pytest.approx([-2 * 0.0012 - 2 * night], abs=1e-15)
    assert (short.trades.entered.tolist(), short.trades.left.tolist()) == ([0], [2])
    long = book(Positions(side=np.array([1.0, 1.0, 1.0])), bars, COSTLY)
    assert long.returns == pytest.approx([-0.0012, 0, -0.0012], abs=1e-15)
    assert long.exposure.tolist() == [1, 1, 1]
    limit = Brackets(side=-np.ones((1, 3)), entry=np.full((1, 3), 99.0), target=None)
    assert book(limit, bars, COSTLY).returns == pytest.approx([-0.0005 - 0.0012] * 3, abs=1e-15)
    flip = book(Positions(side=np.array([1.0, -1.0, -1.0])), bars, COSTLY)
    assert flip.returns[1] == pytest.approx(-2 * 0.0012, abs=1e-15)
    assert flip.trades.side.tolist() == [1, -1]


def test_a_loss_of_more_than_all_is_a_loss_of_all() -> None:
    bars = bars_of(np.array([(100, 100, 100, 100), (250, 250, 250, 250), (100, 100, 100, 100)]))
    assert book(Positions(side=-np.ones(3)), bars, FREE).returns[1] == -1
    carried = Brackets(side=-np.ones((1, 3)), entry=None, target=np.full((1, 3), 1.0))
    assert book(carried, bars, FREE, hold=3).returns.tolist() == [0, -1, 0]


def test_parts_that_are_flat_at_both_ends_are_joined() -> None:
    bars = walk(3, 60)
    orders = random_brackets(3, bars)
    halves = [
        book(
            Brackets(side=orders.side[:, part], entry=orders.entry[:, part], target=orders.target[:, part], share=0.5),
            bars.slice(part.start, part.stop),
            COSTLY,
        )
        for part in (slice(0, 30), slice(30, 60))
        if orders.entry is not None and orders.target is not None
    ]
    whole, joined = book(orders, bars, COSTLY), join(halves)
    assert joined.returns.tolist() == whole.returns.tolist()
    for name, values in vars(whole.trades).items():
        assert getattr(joined.trades, name).tolist() == values.tolist(), name


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("high", 1.0, "X.csv: bar of 2024-01-05: high 1 is below low "),
        ("open", 0.0, "X.csv: bar of 2024-01-05: open 0 is not a positive price; correct the row or delete it"),
        ("close", np.nan, "X.csv: bar of 2024-01-05: close nan is not a positive price"),
        ("low", -2.0, "X.csv: bar of 2024-01-05: low -2 is not a positive price"),
    ],
)
def test_bars_that_cannot_be_traded_are_named(column: str, value: float, words: str) -> None:
    bars = walk(1, 10)
    check_bars(bars, "X.csv")
    values = getattr(bars, column).copy()
    values[4] = value
    with pytest.raises(DataError) as caught:
        check_bars(replace(bars, **{column: values}), "X.csv")
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_orders_are_for_every_bar() -> None:
    bars = walk(1, 10)
    with pytest.raises(ValueError, match="orders for 9 bars, 10 bars"):
        book(Positions(side=np.ones(9)), bars, WORKED)
    with pytest.raises(ValueError, match="held for 0"):
        book(Positions(side=np.ones(10)), bars, WORKED, hold=0)


@pytest.mark.parametrize(
    ("step", "count", "days_a_year", "expected"),
    [("1D", 30, 365, 1.0), ("1h", 240, 365, 24.0), ("4h", 60, 365, 6.0), ("7D", 20, 252, 365.25 / 7 / 252)],
)
def test_bars_a_day_are_detected(step: str, count: int, days_a_year: int, expected: float) -> None:
    times = np.datetime64("2024-01-01", "ns") + np.arange(count) * np.timedelta64(int(step[:-1]), step[-1])
    assert bars_a_day(times, days_a_year) == pytest.approx(expected)


def test_bars_a_day_of_a_session() -> None:
    days = np.datetime64("2024-01-01T14:30", "ns") + np.arange(100) * np.timedelta64(1, "D")
    days = days[np.arange(100) % 7 < 5]
    hours = np.arange(7) * np.timedelta64(1, "h")
    assert bars_a_day((days[:, None] + hours).ravel(), 252) == 7
    assert bars_a_day(days, 252) == 1
    assert bars_a_day(days[:1], 252) == 1
