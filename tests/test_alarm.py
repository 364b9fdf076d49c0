"""The alarm that one may look at every day: worked by hand, how often it is false, and how soon it comes."""

from __future__ import annotations

import numpy as np
import pytest

from objectives import alarm
from objectives.alarm import ALARM, evidence

SERIES, BARS = 500, 750  # three years of each


def test_the_worked_example() -> None:
    """d is 1, -.5 and .8333333: the third divides by a distance of 1.2, the largest so far."""
    live, other, actual = np.array([1.0, 1.0, 1.2]), np.zeros(3), np.array([0.0, 0.75, 0.1])
    assert evidence(live, other, actual) == pytest.approx([1.31, 1.06975, 1.3503646], abs=5e-8)


def test_equal_forecasts_are_no_evidence() -> None:
    assert evidence(np.full(5, 0.3), np.full(5, 0.3), np.arange(5.0)).tolist() == [1.0] * 5
    before = evidence(np.array([0.3, 0.3, 0.5]), np.array([0.3, 0.3, 0.1]), np.zeros(3))
    assert before == pytest.approx([1.0, 1.0, 1.31])  # the first distance that there is counts as a whole one


def test_later_bars_change_nothing_before_them_and_no_evidence_is_too_large() -> None:
    live, other, actual = np.random.default_rng(1).normal(size=(3, 100))
    spoiled = live.copy()
    spoiled[60:] *= 50
    assert evidence(spoiled, other, actual)[:60].tolist() == evidence(live, other, actual)[:60].tolist()
    always = evidence(np.ones(5000), np.zeros(5000), np.zeros(5000))
    assert np.isfinite(always).all()
    assert (np.diff(always) >= 0).all()


def simulated(extra: float, seed: int) -> tuple[np.ndarray, float]:
    """E of each of SERIES series of BARS bars, and the MAE of the live forecast over the other's, less 1.

    Returns have heavy tails (t with 4 degrees of freedom) and volatility comes in clusters; the other forecast is
    noise, and the live one has `extra` noise on top. 0: both have their own, of the same size.
    """
    rng = np.random.default_rng(seed)
    shocks = rng.standard_t(4, (SERIES, BARS + 60)) / np.sqrt(2)
    level, levels = np.zeros(SERIES), []
    for _ in range(BARS + 60):
        level = 0.97 * level + 0.15 * rng.normal(size=SERIES)
        levels.append(level)
    returns = np.exp(np.stack(levels, axis=1)) * shocks
    squares = np.cumsum(returns**2, axis=1)
    trailing = np.sqrt((squares[:, 59:-1] - np.pad(squares, ((0, 0), (1, 0)))[:, :BARS]) / 60)
    actual = returns[:, 60:] / trailing
    other, noise = 0.3 * rng.normal(size=(2, SERIES, BARS))
    live = noise if extra == 0 else other + extra / 0.3 * noise
    worse = float(np.abs(live - actual).mean() / np.abs(other - actual).mean()) - 1
    return evidence(live, other, actual), worse


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_false_alarms_are_rare_although_every_bar_is_looked_at(seed: int) -> None:
    found, worse = simulated(0.0, seed)
    assert abs(worse) < 0.005
    assert 0.005 <= (found >= ALARM).any(axis=1).mean() <= 0.05


@pytest.mark.parametrize(
    ("extra", "loss", "soonest", "latest"),
    [(0.2, 0.03, 450, 700), (0.32, 0.066, 200, 300), (0.42, 0.11, 120, 190), (0.56, 0.18, 75, 120)],
)
def test_the_worse_a_promotion_the_sooner_the_alarm(extra: float, loss: float, soonest: int, latest: int) -> None:
    found, worse = simulated(extra, 4)
    assert worse == pytest.approx(loss, abs=0.006)
    reached = found >= ALARM
    delays = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, BARS + 1)
    assert soonest <= np.median(delays) <= latest


def test_how_much_data_is_enough() -> None:
    """The triggers that a guide names need years: 69,554 daily bars are 276."""
    daily = 1 / np.sqrt(252)
    assert alarm.needed_for_sharpe(1.5 * daily, 1.35 * daily) == 69_554
    assert alarm.needed_for_sharpe(2 * daily, 0.0) == 393
    assert (alarm.needed_for_share(0.55, 0.5), alarm.needed_for_share(0.55, 0.5225)) == (614, 2029)
    assert (alarm.needed_for_mean(0.75, 0.1), alarm.needed_for_mean(0.75, 0.2)) == (348, 87)
    assert alarm.needed_for_share(0.3, 0.2) == 119


def test_that_much_data_finds_the_effect_in_four_of_five_cases() -> None:
    count = alarm.needed_for_mean(0.75, 0.2)
    means = np.random.default_rng(5).normal(0.2, 0.75, (4000, count)).mean(axis=1)
    assert (means > alarm.ERRORS_ONE_SIDED_95 * 0.75 / np.sqrt(count)).mean() == pytest.approx(0.8, abs=0.03)
