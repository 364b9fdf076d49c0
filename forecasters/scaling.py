"""The unit in which a network reads prices, where its published inference adds a constant to what it divides by.

Toto adds 0.1 to the variance of a context and Kronos 1e-5 to its standard deviations, whatever the unit of the prices:
a coin at 0.00002 is all constant to them. Read as multiples of the last close, a context has no unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from forecasters import KEYS, Bars, ForecastError

SCALES = RAW, LAST = "raw", "last"  # as published; the last close of each context as LAST_CLOSE
AUTO = "auto"  # of a setting: LAST for a symbol whose prices are too low for the published constant, else RAW
LAST_CLOSE = 100.0
# Prices are too low where the constant makes their standard deviation more than this larger. Measured on twelve symbols
# with the tiny checkpoints: at 1.1 the MAE is within 0.3 % (Toto) and within what sampling moves (Kronos); at 2 it is
# up to 1 % and 9 % worse, at 20 a quarter and five times.
WIDENED = 1.1
SEEN = 512  # last closes that decide


def too_low(closes: np.ndarray, least: float) -> bool:
    """Whether what is added to a deviation matters for these closes. least: `Model.least_deviation`, price."""
    return bool(closes[-SEEN:].std() < least)


def one_scale(values: tuple[str, ...]) -> str | None:
    """What is wrong with a setting: one of its words alone, or those that a search can choose from."""
    if values in ((AUTO,), (RAW,), (LAST,)) or (len(values) == 2 and set(values) == set(SCALES)):
        return None
    return f'must be "{AUTO}", "{RAW}", "{LAST}" or ["{RAW}", "{LAST}"]'


def units_of(contexts: Sequence[Bars], scale: str) -> np.ndarray | None:
    """The price that each context is read in units of, float64 [W]; None for prices as they are.

    Raises ForecastError for another scale, and for a last close that is no positive number.
    """
    if scale == RAW:
        return None
    closes = np.array([bars.close[-1] if len(bars) else np.nan for bars in contexts])
    if scale != LAST or not (closes > 0).all():
        raise ForecastError(f"scale {scale!r} of last closes from {closes.min()}: they have to be above 0")
    return closes / LAST_CLOSE


def in_units(contexts: Sequence[Bars], units: np.ndarray | None) -> Sequence[Bars]:
    """The contexts with their prices in these units."""
    if units is None:
        return contexts
    return [
        replace(bars, **{key: getattr(bars, key) / unit for key in KEYS})
        for bars, unit in zip(contexts, units, strict=True)
    ]
