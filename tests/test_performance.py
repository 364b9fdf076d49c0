"""What returns are worth: each metric against cases worked by hand, and against simulations of a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from traded import WORKED, worked_bars, worked_known

from objectives import performance as metrics
from objectives.bootstrap import mean_interval
from objectives.fills import Booked, Trades, book
from objectives.performance import performance
from objectives.strategies import STRATEGIES


def worked() -> Booked:
    return book(STRATEGIES["maxdiff"].orders(worked_known(), shorts=True), worked_bars().slice(1, 6), WORKED)


def of_returns(returns: np.ndarray) -> Booked:
    empty = np.zeros(0)
    trades = Trades(entered=empty, left=empty, side=empty, entry=empty, exit=empty, share=empty, returns=empty)
    return Booked(returns=returns, exposure=np.zeros(len(returns)), trades=trades)


def test_the_worked_example() -> None:
    found = performance(worked(), 252)
    assert found.growth == pytest.approx(0.0371691, abs=5e-8)
    assert found.drawdown == pytest.approx(0.0140667, abs=5e-8)
    assert found.turnover == pytest.approx(1.6009746, abs=5e-8)
    assert (found.trades, found.win_rate, found.exposure) == (4, 0.5, 0.8)
    assert found.win_interval == pytest.approx((0.150, 0.850), abs=5e-4)
    assert found.mean_trade == pytest.approx((0.0331407 - 0.002 - 0.0120909 + 0.0182222) / 4, abs=5e-8)
    ratio = metrics.sharpe_a_bar(worked().returns)
    assert ratio is not None
    assert ratio * math.sqrt(252) == pytest.approx(6.5572253, abs=5e-8)
    assert (found.sharpe, found.sharpe_error, found.probabilistic, found.interval) == (None, None, None, None)


def test_the_worked_ratios() -> None:
    assert metrics.probability_above(0.1, 0.0, 250, -0.5, 5.0) == pytest.approx(0.9373206, abs=5e-8)
    best = metrics.best_without_skill(0.05, 20)
    assert best == pytest.approx(0.0950354, abs=5e-8)
    assert metrics.probability_above(0.1, best, 250, -0.5, 5.0) == pytest.approx(0.5303265, abs=5e-8)


def test_returns_alone() -> None:
    returns = np.random.default_rng(1).normal(0.001, 0.01, 19)
    assert performance(of_returns(returns), 252).sharpe is None
    more = np.append(returns, 0.002)
    found = performance(of_returns(more), 252)
    assert found.sharpe == pytest.approx(more.mean() / more.std(ddof=1) * math.sqrt(252))
    assert (found.trades, found.win_rate, found.win_interval, found.mean_trade) == (0, None, None, None)
    assert performance(of_returns(np.full(30, 0.01)), 252).sharpe is None
    assert performance(of_returns(np.zeros(30)), 252).interval is None


def test_drawdown_begins_at_the_first_capital_and_what_is_lost_stays_lost() -> None:
    assert metrics.drawdowns(np.array([-0.1, 0.05])) == pytest.approx([0.1, 1 - 0.945])
    assert metrics.drawdowns(np.array([0.1, 0.1])).tolist() == [0, 0]
    assert metrics.equity(np.array([0.1, -1.5, 0.5])).tolist() == [1.1, 0, 0]


def test_the_standard_error_of_a_sharpe_ratio_is_its_spread() -> None:
    """Of skewed returns with heavy tails, over 4,000 samples of 250."""
    rng = np.random.default_rng(2)
    draws = 0.2 + (rng.gamma(4, 1, (4000, 250)) - 4) / 2
    ratios = [metrics.sharpe_a_bar(row) for row in draws]
    spread = np.std([ratio for ratio in ratios if ratio is not None])
    stated = np.mean([metrics.sharpe_error(row) for row in draws[:500]])
    assert stated == pytest.approx(spread, rel=0.05)
    assert stated < 0.97 / math.sqrt(249)  # skewness counts: it would be above 1 / sqrt(249) without


def test_a_search_without_skill_is_deflated() -> None:
    """The best of 50 configurations without skill: its own probability is high, deflated it is about even."""
    rng = np.random.default_rng(3)
    own, deflated = [], []
    for _ in range(200):
        returns = rng.normal(0, 0.01, (50, 250))
        ratios = returns.mean(axis=1) / returns.std(axis=1, ddof=1)
        best = returns[ratios.argmax()]
        own.append(metrics.probabilistic_sharpe(best))
        deflated.append(metrics.deflated_sharpe(best, ratios.tolist()))
    assert np.mean(own) > 0.97
    assert np.mean(deflated) == pytest.approx(0.5, abs=0.06)


def test_deflating_counts_two_tries_and_the_spread_of_luck_at_least() -> None:
    returns = np.random.default_rng(4).normal(0.002, 0.01, 250)
    ratio = metrics.sharpe_a_bar(returns)
    assert ratio is not None
    least = metrics.probabilistic_sharpe(returns, metrics.best_without_skill(1 / math.sqrt(249), 2))
    assert metrics.deflated_sharpe(returns, [ratio]) == least
    assert metrics.deflated_sharpe(returns, [ratio, ratio]) == least
    wide = metrics.best_without_skill(float(np.std([ratio, -ratio], ddof=1)), 2)
    assert metrics.deflated_sharpe(returns, [ratio, -ratio]) == metrics.probabilistic_sharpe(returns, wide)
    with pytest.raises(ValueError, match="do not vary"):
        metrics.deflated_sharpe(np.zeros(250), [0.1])


@pytest.mark.parametrize(("wins", "count", "expected"), [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))])
def test_the_interval_of_a_share(wins: int, count: int, expected: tuple[float, float]) -> None:
    assert metrics.wilson_interval(wins, count) == pytest.approx(expected, abs=5e-5)


def test_the_interval_of_a_mean_covers_it() -> None:
    """Of returns that resemble their neighbours, where independent ones would be covered too rarely."""
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        noise = rng.normal(0, 0.01, 420)
        returns = np.zeros(420)
        for t in range(1, 420):
            returns[t] = 0.5 * returns[t - 1] + noise[t]
        interval = mean_interval(returns[20:])
        assert interval is not None
        covered += interval[0] < 0 < interval[1]
    assert covered >= 170  # independent returns: about 145
    assert mean_interval(np.full(30, 0.01)) is None


def test_a_portfolio_of_symbols_that_trade_on_different_days() -> None:
    days = np.arange("2024-01-01", "2024-01-05", dtype="datetime64[D]")
    times, returns = metrics.equal_weight(
        [(days, np.array([0.01, 0.02, 0.03, 0.04])), (days[[1, 3]], np.array([0.1, -0.1]))]
    )
    assert times.tolist() == days.tolist()
    assert returns == pytest.approx([0.005, 0.06, 0.015, -0.03])


def test_growth_by_month() -> None:
    days = np.array(["2024-01-30", "2024-01-31", "2024-03-01"], dtype="datetime64[ns]")
    found = metrics.monthly(days, np.array([0.1, 0.1, -0.05]))
    assert found == {"2024-01": pytest.approx(0.21), "2024-03": pytest.approx(-0.05)}
