"""Bars on a regular calendar, as the scripts that this package replaces showed them to Chronos-2.

Kept for reading their promoted files (`calendar` "days"), never searched: it makes a context of 512 rows of stocks
about 350 trading days, in which every weekend and holiday repeats the bar before. The next row of a filled calendar
is the next step of the clock, not the next bar: a forecast made after a Friday is Saturday's, and like theirs it is
scored as Monday's. Further steps count on, so that the h-th step is the h-th day and is scored as the h-th bar.
"""

from __future__ import annotations

import numpy as np

from forecasters import Bars


def on_calendar(bars: Bars) -> Bars:
    """The bars with one at every step of their clock up to the last; where there was none, the one before it.

    A step is the one that most bars are apart, a day for daily bars. Bars whose times follow a rule stay as they are:
    equal steps, or every weekday without a holiday. Steps count back from the last bar, and a bar that no step meets
    counts from the next one on. (The scripts counted from the first bar and lost bars that no step met, as of a
    clock that changes to summer time; where every bar is met it is the same.)
    """
    if len(bars) < 3:  # no rule can be told
        return bars
    steps = np.diff(bars.timestamps)
    if (steps == steps[0]).all() or _every_weekday(bars.timestamps):
        return bars
    kinds, counts = np.unique(steps, return_counts=True)
    step = kinds[counts.argmax()]
    rows = (bars.timestamps[-1] - bars.timestamps[0]) // step + 1
    times = bars.timestamps[-1] - np.arange(rows)[::-1] * step
    found = np.searchsorted(bars.timestamps, times, side="right") - 1
    return Bars(
        timestamps=times,
        open=bars.open[found],
        high=bars.high[found],
        low=bars.low[found],
        close=bars.close[found],
        volume=None if bars.volume is None else bars.volume[found],
    )


def _every_weekday(timestamps: np.ndarray) -> bool:
    """Whether the bars are one a weekday, at one time of the day, and none is missing."""
    days = timestamps.astype("datetime64[D]")
    same_time = len(np.unique(timestamps - days)) == 1
    return bool(same_time and np.is_busday(days).all() and np.busday_count(days[0], days[-1]) == len(days) - 1)
