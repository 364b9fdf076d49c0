"""The experiment that compares promotion rules: what it must not see, and that its worlds are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import promotion_rules as experiment
from benchmarks.promotion_rules import SymbolForecasts
from forecasters import Bars
from objectives.bars import DataError
from objectives.windows import MIN_CONTEXT


def walk(count: int, *, seed: int = 0) -> Bars:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(seed).standard_t(4, count) * 0.01))
    times = np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    return Bars(timestamps=times, open=close, high=close, low=close, close=close, volume=None)


@pytest.fixture(scope="module")
def series() -> SymbolForecasts:
    return experiment.forecast("A", walk(700))


@pytest.mark.parametrize("end", [MIN_CONTEXT + 1, 300, 699])
def test_a_forecast_sees_no_bar_that_it_is_of(series: SymbolForecasts, end: int) -> None:
    cut = walk(700)
    close = cut.close.copy()
    close[end - 1 :] *= 3  # the bar that is forecast and all later ones
    changed = experiment.forecast("A", Bars(**{**vars(cut), "close": close}))
    known = end - MIN_CONTEXT  # windows of which the last forecasts bar end - 1
    for name, points in series.points.items():
        np.testing.assert_array_equal(changed.points[name][:known], points[:known])
    assert changed.points["median"][known] != series.points["median"][known]


def test_a_search_sees_windows_in_the_order_of_a_study_and_is_judged_after_them(series: SymbolForecasts) -> None:
    found = [experiment.search_at(series, date, confirmation=250) for date in experiment.dates([series], every=30)]
    searches = [search for search in found if search is not None]
    assert len(searches) == 1 + (700 - 60 - MIN_CONTEXT - 250 - 20) // 30
    for search in searches:
        assert search.confirmation.stop == search.validation.stop == search.test.start
        assert search.test.stop == search.realised.start
        assert (search.earlier.start, search.earlier.stop) == (search.confirmation.start, search.validation.start)
        parts = (search.confirmation, search.validation, search.test, search.realised)
        assert [part.stop - part.start for part in parts] == [250, 30, 20, 60]
        assert search.confirmation.start >= 0
        assert search.realised.stop <= len(series.windows)


def test_only_symbols_whose_bars_end_together_are_pooled() -> None:
    short = experiment.forecast("B", walk(600))
    dates = experiment.dates([experiment.forecast("A", walk(700)), short], every=30)
    assert dates[0] == walk(700).timestamps[-61]
    assert experiment.search_at(short, dates[0], confirmation=250) is None
    assert experiment.search_at(short, walk(700).timestamps[539], confirmation=250) is not None


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("gap", experiment.GAPS)
def test_a_moved_incumbent_is_worse_by_as_much_as_it_says(series: SymbolForecasts, gap: float, way: int) -> None:
    worse = experiment.moved_to(series, "median", gap, way)
    assert experiment.improvement(worse, series.errors(series.points["median"])) == pytest.approx(gap, abs=1e-9)


def test_the_figures_are_of_all_searches_and_order_the_rules() -> None:
    all_series = [experiment.forecast(symbol, walk(650, seed=seed)) for seed, symbol in enumerate("AB")]
    figures = experiment.measure(all_series, every=60, confirmation=250)
    assert figures["searches"] == {"A": 4, "B": 4}
    assert set(figures["worlds"]) == {"best elsewhere", "best of others", "best overall", experiment.WORSE}
    for by_rule in figures["worlds"].values():
        default = by_rule[experiment.DEFAULT]
        for name, each in by_rule.items():
            assert 0 <= each["promoted"] <= 1
            if name.startswith("default,"):
                assert each["promoted"] <= default["promoted"]
    found = [figures["true gains"][experiment.DEFAULT][str(gap)]["promoted"] for gap in experiment.GAPS]
    assert found[-1] == 1
    assert found == sorted(found)


def test_too_short_a_history_says_what_is_needed() -> None:
    with pytest.raises(DataError, match="458 bars"):
        experiment.measure([experiment.forecast("A", walk(300))], every=30, confirmation=250)
