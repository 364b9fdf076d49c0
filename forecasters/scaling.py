"""The unit in which a network reads prices, where its published inference adds a constant to what it divides by.

Toto adds 0.1 to the variance of a context and Kronos 1e-5 to its standard deviations, whatever the unit of the prices:
a coin at 0.00002 is all constant to them. Read as multiples of the last close, a context has no unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forecasters import KEYS, Bars

SCALES = RAW, LAST, AUTO = "raw", "last", "auto"  # as published, the last close as LAST_CLOSE, or whichever is needed
LAST_CLOSE = 100.0
# `auto` leaves prices as published while what is added makes a context's standard deviation no more than this larger.
# Measured on twelve symbols with the tiny checkpoints: at 1.1 the MAE is within 0.3 % (Toto) and within what sampling
# moves (Kronos); at 2 it is up to 1 % and 9 % worse, at 20 a quarter and five times.
WIDENED = 1.1


def units_of(contexts: Sequence[Bars], scale: str, least: float) -> np.ndarray | None:
    """The price that each context is read in units of, float64 [W]; None where all are read as they are.

    contexts: no more of the bars than the network sees. least: the standard deviation of closes, price, below which
    `auto` scales.
    """
    if scale == RAW:
        return None
    scaled = np.array([scale == LAST or bars.close.std() < least for bars in contexts], dtype=bool)
    closes = np.array([bars.close[-1] if len(bars) else np.nan for bars in contexts])
    return np.where(scaled & (closes > 0), closes / LAST_CLOSE, 1.0) if scaled.any() else None


def rescaled(
    closes: np.ndarray, origins: Sequence[int], params: Mapping[str, Any], *, length: str, least: float
) -> float | None:
    """The share of origins whose context is read as multiples of its last close; None for prices as published.

    closes: float64 [T]; length: the param that says how many bars of a context are read.
    """
    scale = params.get("scale", RAW)
    if scale == RAW:
        return None
    contexts = (closes[max(0, origin - int(params[length])) : origin] for origin in origins)
    return sum(scale == LAST or bool(context.std() < least) for context in contexts) / len(origins)


def in_units(contexts: Sequence[Bars], units: np.ndarray | None) -> Sequence[Bars]:
    """The contexts with their prices in these units."""
    if units is None:
        return contexts
    return [
        replace(bars, **{key: getattr(bars, key) / unit for key in KEYS})
        for bars, unit in zip(contexts, units, strict=True)
    ]


def all_raw(closes: np.ndarray, scale: str, least: float, shortest: int) -> bool:
    """Whether every context of at least `shortest` bars that begins at the first of these is read as it is."""
    if scale != AUTO:
        return scale == RAW
    apart = closes - closes[0]  # else the difference of two large squares would lose a small deviation
    counts = np.arange(1, len(closes) + 1)
    mean = np.cumsum(apart) / counts
    spread = np.sqrt(np.maximum(np.cumsum(apart**2) / counts - mean**2, 0))[shortest - 1 :]
    return bool((spread > 1.001 * least).all())  # nearer than rounding: each for itself
