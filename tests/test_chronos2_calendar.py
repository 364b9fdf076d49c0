"""Bars filled to a calendar, as the predecessor's files mean them: against pandas and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from forecasters import Bars
from forecasters.chronos2_calendar import on_calendar


def bars_at(times: Any) -> Bars:
    close = np.arange(1.0, len(times) + 1)
    stamps = times.as_unit("ns").to_numpy()
    return Bars(timestamps=stamps, open=close + 0.1, high=close + 0.3, low=close - 0.2, close=close, volume=close * 10)


def test_weekends_and_a_holiday_repeat_the_bar_before() -> None:
    days = pd.bdate_range("2024-03-25", "2024-04-05").drop("2024-03-29")  # Good Friday
    filled = on_calendar(bars_at(days))
    assert [str(day)[:10] for day in filled.timestamps] == [
        f"{day:%Y-%m-%d}" for day in pd.date_range(days[0], days[-1])
    ]
    np.testing.assert_array_equal(filled.close, [1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 9])
    for name in ("open", "high", "low", "volume"):
        assert len(getattr(filled, name)) == len(filled)
    np.testing.assert_allclose(filled.high - filled.close, 0.3)
    np.testing.assert_allclose(filled.volume, filled.close * 10)  # type: ignore[arg-type]


def test_it_is_what_reindexing_and_forward_filling_gives() -> None:
    days = pd.bdate_range("2021-01-04", periods=600)
    days = days[np.random.default_rng(4).random(600) > 0.04]
    bars = bars_at(days)
    expected = pd.Series(bars.close, days).reindex(pd.date_range(days[0], days[-1])).ffill()
    filled = on_calendar(bars)
    np.testing.assert_array_equal(filled.timestamps, bars_at(expected.index).timestamps)
    np.testing.assert_array_equal(filled.close, expected.to_numpy())


def test_bars_by_the_hour_have_a_step_of_an_hour() -> None:
    hours = pd.date_range("2024-01-02 14:00", periods=7, freq="h").append(
        pd.date_range("2024-01-03 14:00", periods=7, freq="h")
    )
    filled = on_calendar(bars_at(hours))
    assert len(filled) == 31
    np.testing.assert_array_equal(filled.close[6:24], 7)


def test_a_clock_that_changes_to_summer_time_loses_no_bar() -> None:
    times = pd.DatetimeIndex(
        [f"2024-03-{day:02} {hour:02}:00" for day, hour in [(6, 5), (7, 5), (8, 5), (11, 4), (12, 4)]]
    )
    filled = on_calendar(bars_at(times))
    assert filled.timestamps[-1] == times[-1].to_numpy()
    np.testing.assert_array_equal(filled.close, [1, 2, 3, 3, 4, 5])


@pytest.mark.parametrize(
    "times",
    [
        pd.date_range("2024-01-01", periods=9),  # crypto
        pd.bdate_range("2024-01-01", periods=9),  # every weekday
        pd.date_range("2024-01-01", periods=9, freq="h"),
        pd.DatetimeIndex(["2024-01-01", "2024-01-05"]),
    ],
)
def test_bars_that_follow_a_rule_stay_as_they_are(times: pd.DatetimeIndex) -> None:
    bars = bars_at(times)
    assert on_calendar(bars) is bars
