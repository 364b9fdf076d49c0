"""Strategies: the worked example of each, and that no order knows anything of its bar or of a later one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from traded import CLOSE_HIGH_LOW, FREE, OHLC, WORKED, bars_of, unskilled, walk, worked_bars, worked_known

from forecasters import Bars
from objectives.fills import Booked, book
from objectives.performance import equity
from objectives.strategies import (
    STRATEGIES,
    Brackets,
    Forecasts,
    Known,
    Orders,
    StrategyError,
    known_before,
    strategies,
)

EXAMPLES = {
    "simple": [0.0187822, -0.0194175, -0.0297030, 0.0081837, 0.0483939],
    "all_signals": [0.0, -0.0203981, -0.0207822, 0.0091939, 0.0483939],
    "shutdown": [0.0187822, -0.0194175, -0.0207822, 0.0091939, 0.0483939],
    "ci_guard": [0.0187822, -0.0010000, -0.0110909, 0.0081837, 0.0483939],
    "takeprofit": [0.0177822, 0.0270971, -0.0120909, 0.0286429, 0.0288969],
    "highlow": [0.0331407, -0.0020000, -0.0120909, 0.0182222, 0.0],
    "maxdiff": [0.0331407, -0.0020000, -0.0120909, 0.0182222, 0.0],
    "always_on": [0.0155704, 0.0216085, -0.0060455, 0.0186269, -0.0110100],
}
each_strategy = pytest.mark.parametrize("name", STRATEGIES)


def booked(name: str, known: Known, bars: Bars, **options: bool) -> Booked:
    return book(STRATEGIES[name].orders(known, shorts=True), bars, WORKED, **options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples(name: str) -> None:
    """The band of the example lies between the second forecast's change, +0.97 %, and the others'."""
    returns = booked(name, worked_known(band=0.0098), worked_bars().slice(1, 6)).returns
    assert returns == pytest.approx(EXAMPLES[name], abs=6e-8)


def test_buy_and_hold_pays_twice() -> None:
    returns = booked("buy_hold", worked_known(), worked_bars().slice(1, 6)).returns
    assert equity(returns)[-1] == pytest.approx(1.0078822, abs=5e-8)
    assert equity(returns)[-1] == pytest.approx(102 / 101 * 0.999**2, abs=1e-15)


def test_the_better_of_what_a_bar_leaves_open() -> None:
    bars, known = worked_bars().slice(1, 6), worked_known()
    conservative = booked("maxdiff", known, bars).returns
    optimistic = booked("maxdiff", known, bars, optimistic=True).returns
    assert optimistic[[1, 3]] == pytest.approx([0.0474554, 0.0384444], abs=5e-8)
    assert optimistic[[0, 2, 4]].tolist() == conservative[[0, 2, 4]].tolist()


def test_what_cannot_be_sold_short_is_never() -> None:
    known = worked_known()
    for strategy in strategies():
        orders = strategy.orders(known, shorts=False)
        assert (orders.side >= 0).all(), strategy.name
    both, long = (STRATEGIES["always_on"].orders(known, shorts=shorts) for shorts in (True, False))
    assert isinstance(long, Brackets)
    assert long.share == 0.5
    assert long.side.tolist() == both.side[:1].tolist()
    assert STRATEGIES["maxdiff"].orders(known, shorts=False).side[0].tolist() == [1, 1, 1, 0, 1]


def test_shutdown_sits_out_one_bar_and_no_more() -> None:
    """Four falls under a forecast that always rises: a loss, a bar out, a loss, a bar out."""
    closes = np.array([100.0, 99, 98, 97, 96, 97, 96])
    bars = bars_of(np.stack([closes] * 4, axis=1))
    known = known_before(bars, 1, Forecasts(close=bars.close[:-1] + 1))
    assert STRATEGIES["shutdown"].orders(known, shorts=True).side.tolist() == [1, 0, 1, 0, 1, 1]


def test_offsets_are_sigmas_and_never_cross_the_last_close() -> None:
    bars = walk(5, 80)
    start = 70
    known = known_before(bars, start, unskilled(bars, start, 1))
    sigma = [np.diff(np.log(bars.close[:end]))[-60:].std(ddof=1) for end in range(start, 80)]
    assert known.sigma == pytest.approx(sigma, rel=1e-12)
    plain, moved, far = (
        STRATEGIES["always_on"].orders(known, shorts=True, offsets=offsets)
        for offsets in ((0.0, 0.0), (-0.5, 0.25), (1.0, -1.0))
    )
    assert isinstance(plain, Brackets)
    assert isinstance(moved, Brackets)
    assert isinstance(far, Brackets)
    unit = known.sigma * known.close
    low, high = known.forecasts.low, known.forecasts.high
    assert low is not None
    assert high is not None
    assert moved.entry is not None
    assert far.entry is not None
    assert moved.entry[0] == pytest.approx(np.minimum(low - 0.5 * unit, known.close))
    assert moved.entry[1] == pytest.approx(np.maximum(high + 0.25 * unit, known.close))
    assert (far.entry[0] <= known.close).all()
    assert (far.entry[1] >= known.close).all()
    crossed = far.entry[0] >= far.entry[1]
    assert crossed.any()
    assert (far.side[:, crossed] == 0).all()


# --- no look-ahead ------------------------------------------------------------------------------------------


def arrays(orders: Orders) -> list[np.ndarray]:
    return [each for each in vars(orders).values() if isinstance(each, np.ndarray)]


@each_strategy
@pytest.mark.parametrize("origin", [100, 117, 139])
def test_garbage_at_and_after_an_origin_changes_no_order_up_to_it(name: str, origin: int) -> None:
    bars, start = walk(3, 140), 70
    forecasts = unskilled(bars, start, 4)
    rng = np.random.default_rng(5)
    garbage = {
        column: np.append(getattr(bars, column)[:origin], rng.uniform(1e-3, 1e6, 140 - origin))
        for column in ("open", "high", "low", "close")
    }
    later = origin + 1 - start  # forecasts of later bars, which may know the origin's bar
    spoiled = {
        key: np.append(values[:later], rng.uniform(1e-3, 1e6, len(values) - later))
        for key, values in vars(forecasts).items()
    }
    strategy = STRATEGIES[name]
    offsets = (0.3, -0.2)
    clean = strategy.orders(known_before(bars, start, forecasts), shorts=True, offsets=offsets)
    dirty = strategy.orders(
        known_before(replace(bars, **garbage), start, Forecasts(**spoiled)), shorts=True, offsets=offsets
    )
    for one, other in zip(arrays(clean), arrays(dirty), strict=True):
        assert one[..., :later].tolist() == other[..., :later].tolist()
    if name != "buy_hold" and later < 70:
        assert any((one != other).any() for one, other in zip(arrays(clean), arrays(dirty), strict=True))


@each_strategy
@pytest.mark.parametrize("hold", [1, 3])
def test_shifting_all_later_bars_changes_no_return_before(name: str, hold: int) -> None:
    bars, start, origin = walk(6, 140), 70, 110
    orders = STRATEGIES[name].orders(known_before(bars, start, unskilled(bars, start, 7)), shorts=True)
    columns = ("open", "high", "low", "close")
    shifted = replace(bars, **{k: np.append(getattr(bars, k)[:origin], getattr(bars, k)[origin:] * 3) for k in columns})
    before, after = (book(orders, each.slice(start, 140), WORKED, hold=hold).returns for each in (bars, shifted))
    assert before[: origin - start].tolist() == after[: origin - start].tolist()
    assert before[origin - start :].tolist() != after[origin - start :].tolist()


# --- walks without drift ------------------------------------------------------------------------------------

SEEDS = 200


def means(*, optimistic: bool = False, foresight: bool = False) -> dict[str, np.ndarray]:
    """The mean return a bar of every strategy on each of many walks, without costs."""
    found: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for seed in range(SEEDS):
        bars, start = walk(1000 + seed, 124), 64
        forecasts = unskilled(bars, start, seed)
        if foresight:
            forecasts = replace(forecasts, close=(forecasts.close + 0.3 * (bars.close[start:] - forecasts.close)))
        known = known_before(bars, start, forecasts)
        for strategy in strategies():
            orders = strategy.orders(known, shorts=True)
            returns = book(orders, bars.slice(start, len(bars)), FREE, optimistic=optimistic).returns
            found[strategy.name].append(returns.mean())
    return {name: np.array(values) for name, values in found.items()}


def errors_above_zero(values: np.ndarray) -> float:
    return float(values.mean() / (values.std(ddof=1) / np.sqrt(len(values))))


def test_no_strategy_earns_on_walks_without_drift() -> None:
    for name, values in means().items():
        assert errors_above_zero(values) < 3, name


def test_the_walks_would_show_a_leak() -> None:
    """Fills that take the better of what is open earn on the same walks, and so do forecasts that know the bar."""
    assert errors_above_zero(means(optimistic=True)["maxdiff"]) > 5
    leaked = means(foresight=True)
    for name in ("simple", "all_signals", "shutdown", "ci_guard", "takeprofit", "highlow"):
        assert errors_above_zero(leaked[name]) > 5, name


# --- bad input ----------------------------------------------------------------------------------------------


def test_an_unknown_strategy_is_named_with_those_that_there_are() -> None:
    with pytest.raises(StrategyError, match=r"^unknown strategy pctdiff; the strategies are buy_hold, simple, .*on$"):
        strategies(("maxdiff", "pctdiff"))


def test_strategies_are_refused_by_name_where_columns_are_missing_and_others_are_not() -> None:
    bars = walk(1, 10)
    lacking = replace(bars, high=bars.close, low=bars.close)
    refused = {}
    for strategy in strategies():
        try:
            strategy.check_bars(lacking, "X.csv")
        except StrategyError as error:
            refused[strategy.name] = str(error)
    assert list(refused) == ["all_signals", "takeprofit", "highlow", "maxdiff", "always_on"]
    assert refused["maxdiff"] == (
        "X.csv: maxdiff needs high, low, which the bars lack (equal to close at every bar); add the column or leave "
        "the strategy out"
    )
    with pytest.raises(StrategyError, match=r"^X: buy_hold needs open, which the bars lack"):
        STRATEGIES["buy_hold"].check_bars(replace(bars, open=bars.close), "X")
    for strategy in strategies():
        strategy.check_bars(bars, "X.csv")


def test_a_forecast_that_is_missing_is_named() -> None:
    bars = walk(1, 10)
    known = known_before(bars, 5, Forecasts(close=np.full(5, 100.0)))
    with pytest.raises(StrategyError, match=r"^maxdiff needs forecasts of high, low; forecast those keys too$"):
        STRATEGIES["maxdiff"].orders(known, shorts=True)
    with pytest.raises(StrategyError, match=r"^ci_guard needs forecasts of band"):
        STRATEGIES["ci_guard"].orders(known, shorts=True)
    assert len(STRATEGIES["simple"].orders(known, shorts=True).side) == 5


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_forecasts_that_are_no_prices_are_refused(bad: float) -> None:
    bars = walk(1, 10)
    with pytest.raises(ValueError, match="forecasts of the high must be 5 prices"):
        known_before(bars, 5, Forecasts(close=np.full(5, 100.0), high=np.array([100.0, bad, 100, 100, 100])))
    with pytest.raises(ValueError, match="forecasts of 11 bars"):
        known_before(bars, 1, Forecasts(close=np.full(11, 100.0)))


def test_the_worked_example_by_the_predecessors_rule_earns_more_than_twice_as_much() -> None:
    """Its forecast levels count as paid and received whatever came first, and leaving costs nothing."""
    earned, last = 0.0, 100.0
    for (_, high, low, close), (_, f_high, f_low) in zip(OHLC, CLOSE_HIGH_LOW, strict=True):
        up, down = f_high / last - 1, f_low / last - 1
        top, bottom, end = high / last - 1, low / last - 1, close / last - 1
        if abs(up) > abs(down) and down > bottom:
            earned += (up if up <= top else end) - down - 0.001
        elif abs(up) <= abs(down) and up < top:
            earned += up - (down if down >= bottom else end) - 0.001
        last = close
    assert earned == pytest.approx(0.1006, abs=5e-5)
    assert booked("maxdiff", worked_known(), worked_bars().slice(1, 6)).returns.sum() == pytest.approx(0.0373, abs=5e-5)
