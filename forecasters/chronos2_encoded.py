"""Both ends of encode, Chronos-2's and Toto 2.0's: bars as the series of a group, its answer as quantiles in price.

Owns what each choice of variates and transform shows the network, and how its answers become prices again. Knows
nothing of how the network runs. Dimensions: W windows, G series a group, K keys, T points, H steps, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forecasters import CLOSE, Bars, ForecastError, Quantiles
from forecasters.chronos2_model import TRANSFORMS, VARIATES

VOLUME = "volume"
PRICES = (CLOSE, "open", "high", "low")
# The series of a window's group, by choice of variates; None is the key that is asked for.
COLUMNS: dict[str, tuple[str | None, ...]] = dict(
    zip(VARIATES, ((None,), (None, VOLUME), PRICES, (*PRICES, VOLUME)), strict=True)
)
PRICE, LOG, DIFFERENCES = TRANSFORMS


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedQuantiles:
    """The network's answer for W windows: there is nothing left to compute."""

    keys: tuple[str, ...]  # K of them
    levels: np.ndarray  # float64 [Q], ascending
    values: np.ndarray  # float32 [W, K, H, Q], in price, ascending over Q

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.values.nbytes

    def quantiles(self, keys: Sequence[str]) -> list[Quantiles]:
        """Those of these keys."""
        places = [self.keys.index(key) for key in keys]
        return [Quantiles(levels=self.levels, values=self.values[:, place].astype(np.float64)) for place in places]


def columns_of(variates: str, key: str) -> tuple[str, ...]:
    """What the network reads to forecast a key, of which the prices are answered. Raises ForecastError."""
    if variates not in COLUMNS:
        raise ForecastError(f"variates {variates!r}: expected one of {', '.join(COLUMNS)}")
    return tuple(column or key for column in COLUMNS[variates])


def series_of(bars: Bars, length: int, columns: tuple[str, ...], transform: str) -> np.ndarray:
    """The last `length` values of these columns as the network reads them, float32 [G, T].

    Logarithms are relative to the last one, which float32 keeps apart at any price; of volume, which may be 0, they are
    of one more. Differences are between bars, so they need a bar more. Raises ForecastError where the bars have no
    volume, where none is left and where a number is not finite, or a price not positive of which the logarithm is read.
    """
    if transform not in TRANSFORMS:
        raise ForecastError(f"transform {transform!r}: expected one of {', '.join(TRANSFORMS)}")
    if VOLUME in columns and bars.volume is None:
        raise ForecastError("these bars have no volume, which the variates ask for; choose variates without volume")
    more = transform == DIFFERENCES
    start = max(0, len(bars) - max(length, 0) - more)
    rows = np.stack([getattr(bars, column)[start:] for column in columns]).astype(np.float64)
    if length < 1 or rows.shape[1] <= more:
        raise ForecastError(f"a context of {len(bars)} bars with context_length {length}: no {columns[0]} is left")
    said = " or ".join(columns)
    if not np.isfinite(rows).all():
        raise ForecastError(f"the {said} of {bars.timestamps[-1]} or before it is not a finite number")
    if transform == DIFFERENCES:
        rows = np.diff(rows)
    elif transform == LOG:
        for column, row in zip(columns, rows, strict=True):
            row += column == VOLUME
            if not (row > 0).all():
                raise ForecastError(f"the {column} of {bars.timestamps[-1]} or before it has no logarithm")
        rows = np.log(rows / rows[:, -1:])
    return rows.astype(np.float32)


def encoded_of(
    contexts: Sequence[Bars],
    columns: Sequence[str],
    answers: Sequence[np.ndarray],
    transform: str,
    levels: np.ndarray,
) -> EncodedQuantiles:
    """The network's answers to these windows, [G, Q, H] each for the columns that it read, in price.

    Raises ForecastError where one is not finite.
    """
    keys = tuple(column for column in columns if column != VOLUME)
    values = np.array(
        [
            [
                in_price(answer, getattr(bars, asked)[-1], transform, levels)
                for asked, answer in zip(keys, group, strict=False)  # that of volume is not asked for
            ]
            for bars, group in zip(contexts, answers, strict=True)
        ],
        np.float32,
    )
    return EncodedQuantiles(keys=keys, levels=levels, values=finite(values))


def finite(prices: np.ndarray) -> np.ndarray:
    if not (np.abs(prices) < np.finfo(np.float32).max / 2).all():
        raise ForecastError("the network's quantiles are not finite numbers; check the prices and the checkpoint")
    return prices


def in_price(answers: np.ndarray, last: float, transform: str, levels: np.ndarray) -> np.ndarray:
    """Quantiles of what `series_of` made of one key, [Q, H], as quantiles of the price, [H, Q], ascending over Q.

    last: the key's price at the last bar. Prices and logarithms change one by one and stay exact. Of differences the
    first step is exact too; beyond it a price is the sum of steps, whose quantiles the steps' do not tell: they are
    taken as independent and their deviations from the median added as normal ones are, by the root of the sum of
    squares. (Added as they are they would say that each step repeats the first: bands that grow with the horizon, not
    with its root.)
    """
    values = np.sort(answers.T.astype(np.float64), -1)
    if transform == LOG:
        return last * np.exp(values)
    if transform == PRICE:
        return values
    middle = np.stack([np.interp(0.5, levels, step) for step in values])[:, None]
    away = values - middle
    return last + np.cumsum(middle, 0) + np.sign(levels - 0.5) * np.sqrt(np.cumsum(away**2, 0))
