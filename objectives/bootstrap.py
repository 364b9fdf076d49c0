"""How well a mean of a series is known, where neighbours in time resemble each other: the stationary block bootstrap.

Owns the standard error of a mean and its interval, of errors and of returns alike.
"""

from __future__ import annotations

import numpy as np

ERRORS_95 = 1.959964  # standard errors on each side of a 95 % interval
ROUNDING = 1e-12  # sd that rounding may leave of errors of about 1, or of returns, that do not vary


def mean_errors(series: np.ndarray, block: float | None = None) -> np.ndarray:
    """The standard error of each row's mean, [C] of [C, W], that the stationary bootstrap tends to.

    In closed form (Politis and Romano, 1994, lemma 1). block: its mean length, by default that of Politis and
    White (2004).
    """
    from arch.bootstrap import optimal_block_length  # 0.8 s that only a decision should pay

    count = series.shape[1]
    centred = series - series.mean(axis=1, keepdims=True)
    found = np.zeros(len(series))
    varies = np.flatnonzero(centred.std(axis=1) > ROUNDING)
    if not len(varies):
        return found
    if block is None:
        blocks = optimal_block_length(centred[varies].T)["stationary"].to_numpy()
    else:
        blocks = np.full(len(varies), block)
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
