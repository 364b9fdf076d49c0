"""Offsets fitted to the past: that they know nothing later, what they earn, and what fitting to scored bars does."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from traded import FREE, WORKED, unskilled, walk

from forecasters import Bars
from objectives.bars import DataError
from objectives.fills import book
from objectives.strategies import NO_OFFSETS, STRATEGIES, Forecasts, Known, StrategyError, known_before
from studies.walk_forward import Walk, bars_needed, check_length, walk_forward

START = 62


def history(seed: int, count: int) -> tuple[Known, Bars]:
    bars = walk(seed, START + count)
    return known_before(bars, START, unskilled(bars, START, seed)), bars.slice(START, START + count)


def walked(seed: int, *, count: int = 120, train: int = 80, hold: int = 1, evaluations: int = 60) -> Walk:
    known, bars = history(seed, count)
    return walk_forward(
        STRATEGIES["maxdiff"], known, bars, WORKED, train=train, step=20, evaluations=evaluations, hold=hold
    )


@pytest.mark.parametrize("hold", [1, 3])
def test_a_step_is_what_its_offsets_earn(hold: int) -> None:
    known, bars = history(1, 130)
    found = walked(1, count=130, hold=hold)
    assert [(step.start, step.stop) for step in found.steps] == [(80, 100), (100, 120), (120, 130)]
    strategy = STRATEGIES["maxdiff"]
    for step in found.steps:
        for offsets, mean in ((step.offsets, step.in_sample), (NO_OFFSETS, step.in_sample_zero)):
            orders = strategy.orders(known.slice(step.start - 80, step.start), shorts=True, offsets=offsets)
            trained = book(orders, bars.slice(step.start - 80, step.start), WORKED, hold=hold)
            assert trained.trades.returns.sum() / 80 == pytest.approx(mean, abs=1e-12)
        assert step.in_sample >= step.in_sample_zero
        part = slice(step.start - 80, step.stop - 80)
        for optimistic, rivals in ((False, found.conservative), (True, found.optimistic)):
            for offsets, booked in ((step.offsets, rivals.fitted), (NO_OFFSETS, rivals.zero)):
                orders = strategy.orders(known.slice(step.start, step.stop), shorts=True, offsets=offsets)
                alone = book(orders, bars.slice(step.start, step.stop), WORKED, hold=hold, optimistic=optimistic)
                assert booked.returns[part].tolist() == alone.returns.tolist()
    assert any(step.offsets != NO_OFFSETS for step in found.steps)
    differences = found.conservative.fitted.returns - found.conservative.zero.returns
    assert found.conservative.gain == differences.mean()
    interval = found.conservative.interval
    assert interval is not None
    assert interval[0] < found.conservative.gain < interval[1]


def test_garbage_changes_no_step_before_it() -> None:
    bars, origin = walk(2, START + 120), START + 100
    forecasts = unskilled(bars, START, 2)
    rng = np.random.default_rng(3)
    columns = ("open", "high", "low", "close")
    garbage = {k: np.append(getattr(bars, k)[:origin], rng.uniform(1, 1e4, len(bars) - origin)) for k in columns}
    later = origin - START + 1
    spoiled = Forecasts(
        **{k: np.append(v[:later], rng.uniform(1, 1e4, len(v) - later)) for k, v in vars(forecasts).items()}
    )
    clean, dirty = (
        walk_forward(
            STRATEGIES["always_on"],
            known_before(bars_read, START, read),
            bars_read.slice(START, START + 120),
            WORKED,
            train=60,
            step=20,
            evaluations=60,
        )
        for bars_read, read in ((bars, forecasts), (replace(bars, **garbage), spoiled))
    )
    assert clean.steps == dirty.steps  # the last one is used from the first spoiled bar on
    assert clean.conservative.fitted.returns[:40].tolist() == dirty.conservative.fitted.returns[:40].tolist()
    assert clean.conservative.fitted.returns[40:].tolist() != dirty.conservative.fitted.returns[40:].tolist()


def test_no_offsets_are_kept_where_none_earn_more() -> None:
    """The forecast low is the low that comes, to the cent above it: no other entry or exit is as good."""
    bars = walk(4, START + 100)
    last = bars.close[START - 1 : -1]
    low, high = np.minimum(bars.low[START:] * (1 + 1e-9), last), np.maximum(bars.high[START:] * (1 - 1e-9), last)
    known = known_before(bars, START, Forecasts(close=last, high=high, low=low))
    always_down = replace(FREE, shorts=False)
    found = walk_forward(STRATEGIES["always_on"], known, bars.slice(START, START + 100), always_down, train=80)
    assert found.steps[0].in_sample >= found.steps[0].in_sample_zero > 0
    flat = known_before(bars, START, Forecasts(close=last, high=last * 5, low=last / 5))
    nothing = walk_forward(STRATEGIES["maxdiff"], flat, bars.slice(START, START + 100), WORKED, train=80)
    assert nothing.steps[0].offsets == NO_OFFSETS
    assert nothing.conservative.interval is None
    assert nothing.conservative.gain == 0


def test_fitting_earns_in_sample_and_nothing_after_it() -> None:
    """On walks without drift and without costs, over 200 of them: the whole point of walking forward."""
    in_sample, after = [], []
    for seed in range(200):
        known, bars = history(3000 + seed, 80)
        found = walk_forward(STRATEGIES["maxdiff"], known, bars, FREE, train=60, step=20, evaluations=40)
        in_sample.append(found.steps[0].in_sample)
        after.append(found.conservative.fitted.returns.mean())
    error = np.std(after, ddof=1) / np.sqrt(200)
    assert np.mean(after) < 3 * error
    assert np.mean(in_sample) > 5 * error


def test_five_hundred_evaluations_take_fifty_milliseconds() -> None:
    """Of CPU; the best of several, as other processes share its caches."""
    known, bars = history(5, 251)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        walk_forward(STRATEGIES["maxdiff"], known, bars, WORKED, train=250, step=20, evaluations=500)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05


# --- the predecessor's scoring ------------------------------------------------------------------------------

DAYS, FEE = 6, 0.0005  # its validation bars, which its offsets are fitted to as well
GRID = np.linspace(-0.03, 0.03, 13)


def their_daily_return(up: np.ndarray, down: np.ndarray, bars: np.ndarray, at_close: bool) -> np.ndarray:
    """Its return a day [...] of levels [..., D] over the close before, and of bars' high, low and close [3, D].

    The entry fills, then the target in the same bar, whichever came first; leaving is free. The better of them was
    found by looking at these very days.
    """
    top, bottom, end = bars
    long = np.abs(up) > np.abs(down)
    bought = np.where(down > bottom, np.where((up <= top) & ~np.bool_(at_close), up, end) - down - FEE, 0.0)
    sold = np.where(up < top, up - np.where((down >= bottom) & ~np.bool_(at_close), down, end) - FEE, 0.0)
    return np.where(down < up, np.where(long, bought, sold), 0.0).mean(axis=-1)


def their_score(up: np.ndarray, down: np.ndarray, bars: np.ndarray) -> float:
    """The daily return that it reports of D days: what the levels earn, and 0.3 of what the fitted ones do."""
    offsets = GRID[:, None, None], GRID[None, :, None]
    return max(
        float(their_daily_return(up, down, bars, at_close))
        + 0.3 * float(their_daily_return(up + offsets[0], down + offsets[1], bars, at_close).max())
        for at_close in (False, True)
    )


def scores(seed: int, windows: int) -> tuple[float, float, float]:
    """What the predecessor reports a day on a walk of 2 % a day without drift; what our fills earn, and without fees.

    The forecast of each price is that its change of today is none: no skill.
    """
    count = DAYS * windows
    bars = walk(seed, START + count)
    last = bars.close[START - 1 : -1]
    up, down = ((each / bars.close)[START - 1 : -1] - 1 for each in (bars.high, bars.low))  # as it adds them up
    actual = np.stack([each[START:] / last - 1 for each in (bars.high, bars.low, bars.close)])
    theirs = [
        their_score(up[part], down[part], actual[:, part])
        for part in (slice(first, first + DAYS) for first in range(0, count, DAYS))
    ]
    known = known_before(bars, START, Forecasts(close=last, high=last * (1 + up), low=last * (1 + down)))
    orders = STRATEGIES["maxdiff"].orders(known, shorts=True)
    paying = replace(WORKED, limit_fee=FEE, market_fee=FEE)
    ours, free = (book(orders, bars.slice(START, START + count), asset).returns.mean() for asset in (paying, FREE))
    return float(np.mean(theirs)), float(ours), float(free)


def test_the_predecessors_scoring_finds_profit_where_there_is_none() -> None:
    """It reports +55 % a year; our fills lose the fees, and a little by taking the worse of what a bar leaves open."""
    found = np.array([scores(seed, 42) for seed in range(40)]) * 252  # a year each
    theirs, ours, free = found.mean(axis=0)
    error = found[:, 2].std(ddof=1) / np.sqrt(len(found))
    assert theirs == pytest.approx(0.55, abs=0.1)
    assert ours < 0
    assert -0.2 < free < 3 * error


# --- bad input ----------------------------------------------------------------------------------------------


def test_a_training_that_is_too_short_is_refused() -> None:
    known, bars = history(1, 70)
    with pytest.raises(StrategyError, match=r"^--train 59: offsets fitted to fewer than 60 bars .* better 250$"):
        walk_forward(STRATEGIES["maxdiff"], known, bars, WORKED, train=59)
    with pytest.raises(ValueError, match="70 to be fitted to"):
        walk_forward(STRATEGIES["maxdiff"], known, bars, WORKED, train=70)
    with pytest.raises(ValueError, match="simple on 70 bars"):
        walk_forward(STRATEGIES["simple"], known, bars, WORKED, train=60)


def test_a_history_that_is_too_short_says_how_much_is_needed() -> None:
    bars = walk(1, 300)
    assert bars_needed(250, 250, 128) == 628
    assert bars_needed(10, 0, 2) == 71
    check_length("X", bars, bars=100, train=100, min_context=100)
    with pytest.raises(DataError) as caught:
        check_length("X", bars, bars=250, train=250, min_context=128)
    assert str(caught.value) == (
        "X: has 300 bars and needs 628: 250 to trade on, 250 to fit offsets to and 128 before them; add older bars or "
        "ask for fewer with --bars or --train"
    )
