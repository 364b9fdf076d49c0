"""How well a mean of a series is known, where neighbours in time resemble each other: the stationary block bootstrap.

Owns how long blocks are, how series are resampled in them, and the standard error of a mean and its interval, of errors
and of returns alike. arch has the first two, a series at a time and after a second of imports: a test compares.
"""

from __future__ import annotations

import numpy as np

ERRORS_95 = 1.959964  # standard errors on each side of a 95 % interval
ROUNDING = 1e-12  # sd that rounding may leave of errors of about 1, or of returns, that do not vary


def block_lengths(series: np.ndarray) -> np.ndarray:
    """Bars that a block of the stationary bootstrap has on average to suit each row, float64 [C] of [C, W].

    By Politis and White (2004) as corrected by Patton, Politis and White (2009). Not finite for a row that does not
    vary; 1 where there are fewer than four bars, which tell nothing.
    """
    count = series.shape[1]
    if count < 4:
        return np.ones(len(series))
    insignificant = max(5, int(np.log10(count)))  # so many correlations in a row, before no more are looked at
    most = min(int(np.ceil(np.sqrt(count))) + insignificant, count - 2)  # lags
    insignificant = min(insignificant, most)
    centred = series - series.mean(axis=1, keepdims=True)
    products = np.fft.irfft(np.abs(np.fft.rfft(centred, 2 * count)) ** 2, 2 * count)[:, : most + 1]
    squares = centred**2
    without = np.cumsum(squares[:, :0:-1], axis=1)[:, ::-1], np.cumsum(squares[:, :-1], axis=1)[:, ::-1]
    with np.errstate(all="ignore"):
        correlations = np.abs(products) / np.sqrt(without[0] * without[1])[:, : most + 1]
        small = correlations < 2 * np.sqrt(np.log10(count) / count)
        runs = np.lib.stride_tricks.sliding_window_view(small[:, :-1], insignificant, axis=1).all(axis=2)
        first = np.where(runs.any(axis=-1), 2 * np.maximum(runs.argmax(axis=-1), 1), most)
        lags = np.arange(1, most + 1)
        weights = np.clip(2 * (1 - lags / np.minimum(first, most)[:, None]), 0, 1)  # the flat-top window
        covariances = products / count
        spread = covariances[:, 0] + 2 * (weights * covariances[:, 1:]).sum(axis=1)
        slope = 2 * (weights * lags * covariances[:, 1:]).sum(axis=1)
        lengths = np.cbrt((slope / spread) ** 2 * count)
    return np.minimum(lengths, np.ceil(min(3 * np.sqrt(count), count / 3)))


def resampled_indices(count: int, block: float, repetitions: int, seed: int) -> np.ndarray:
    """Indices of bars, int64 [R, count], as the stationary bootstrap (Politis and Romano, 1994) draws them.

    block: bars that a block has on average, at least 1. A block that reaches the last bar goes on at the first.
    """
    generator = np.random.default_rng(seed)
    bars = np.arange(count)
    starts = generator.integers(count, size=(repetitions, count))
    begins = generator.random((repetitions, count)) < 1 / block
    begins[:, 0] = True
    since = np.maximum.accumulate(np.where(begins, bars, 0), axis=1)
    return (np.take_along_axis(starts, since, axis=1) + bars - since) % count


def mean_errors(series: np.ndarray, block: float | None = None) -> np.ndarray:
    """The standard error of each row's mean, [C] of [C, W], that the stationary bootstrap tends to.

    In closed form (Politis and Romano, 1994, lemma 1). block: its mean length, by default that of `block_lengths`.
    """
    count = series.shape[1]
    centred = series - series.mean(axis=1, keepdims=True)
    found = np.zeros(len(series))
    varies = np.flatnonzero(centred.std(axis=1) > ROUNDING)
    if not len(varies):
        return found
    blocks = block_lengths(centred[varies]) if block is None else np.full(len(varies), block)
    ends = 1 / np.clip(np.ceil(np.nan_to_num(blocks, nan=1.0)), 1, count)[:, None]  # chance that a block ends, [V, 1]
    spectrum = np.abs(np.fft.rfft(centred[varies], 2 * count)) ** 2
    covariances = np.fft.irfft(spectrum, 2 * count)[:, :count] / count  # [V, W], by lag
    lags = np.arange(count)
    kept = (1 - lags / count) * (1 - ends) ** lags + lags / count * (1 - ends) ** (count - lags)
    variances = covariances[:, 0] + 2 * (kept * covariances)[:, 1:].sum(axis=1)
    found[varies] = np.sqrt(np.maximum(variances, 0) / count)
    return found


def mean_interval(series: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean of returns [W], or of the differences of two series of returns; None where nothing varies."""
    series = np.asarray(series, dtype=float)
    if len(series) < 2 or not series.std() > ROUNDING:
        return None
    scale = float(series.std())  # `mean_errors` expects series of about 1
    width = ERRORS_95 * scale * float(mean_errors(series[None] / scale)[0])
    return float(series.mean()) - width, float(series.mean()) + width
