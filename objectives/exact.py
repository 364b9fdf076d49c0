"""Aggregates without samples: what each named aggregate tends to as the number of samples grows.

Owns the limits of the names in aggregation.py for a mixture of Student's t. No seed and no sample count is left in
them, so a study of them is a study of its own. Knows nothing of models beyond the two kinds of exact answer.
"""

from __future__ import annotations

import numpy as np

from forecasters import Expectation, ForecastError, StudentMixture
from objectives.aggregation import Aggregate, parse

BISECTIONS = 80  # a bracket of 1e8 scales down to the last bit of a float64


def exact_points(exact: Expectation | StudentMixture, name: str | Aggregate) -> np.ndarray:
    """Points, float64 [W, H].

    Raises ValueError for an unknown name, for one whose limit is infinite (quantile_0 is the least of ever more
    samples) and for any but the mean of an Expectation; ForecastError where a mean or a deviation does not exist.
    """
    aggregate = parse(name) if isinstance(name, str) else name
    if isinstance(exact, Expectation):
        if aggregate.kind != "mean":
            raise ValueError(f"aggregate {aggregate.name}: only the mean of this model has an exact value")
        return exact.points
    points = _FORMULAS[aggregate.kind](exact, *aggregate.numbers)
    if not np.isfinite(points).all():
        window = int(np.argwhere(~np.isfinite(points))[0, 0])
        raise ForecastError(f"window {window}: {aggregate.name} of its mixture is not finite")
    return points


# --- formulas: a mixture [W, H, K] to points [W, H] ----------------------------------------------------------


def _mean(mixture: StudentMixture) -> np.ndarray:
    if not (mixture.df > 1).all():
        raise ForecastError("a Student's t of 1 degree of freedom or less has no mean")
    return (mixture.probs * mixture.loc).sum(axis=-1)


def _std(mixture: StudentMixture) -> np.ndarray:
    if not (mixture.df > 2).all():
        raise ForecastError("a Student's t of 2 degrees of freedom or less has no standard deviation")
    mean = _mean(mixture)
    # around the mean: the difference of two large squares would lose a small deviation
    variance = mixture.scale**2 * mixture.df / (mixture.df - 2) + (mixture.loc - mean[..., None]) ** 2
    return np.sqrt((mixture.probs * variance).sum(axis=-1))


def _quantile(mixture: StudentMixture, q: float) -> np.ndarray:
    """Where the distribution function reaches q, by bisection between the components' own quantiles."""
    from scipy.special import stdtr, stdtrit  # late: 0.2 s that only exact answers need

    if not 0 < q < 1:
        raise ValueError(f"quantile_{q} has no exact value: with more and more samples it goes to infinity")
    own = mixture.loc + mixture.scale * stdtrit(mixture.df, q)
    low, high = own.min(axis=-1), own.max(axis=-1)
    for _ in range(BISECTIONS):
        middle = low + (high - low) / 2
        standard = (middle[..., None] - mixture.loc) / mixture.scale
        below = (mixture.probs * stdtr(mixture.df, standard)).sum(axis=-1) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low + (high - low) / 2


def _sum_below(mixture: StudentMixture, x: np.ndarray) -> np.ndarray:
    """E[X; X <= x]: for one t, with z = (x - loc) / scale, loc T(z) - scale (df + z**2) / (df - 1) t(z)."""
    from scipy.special import gammaln, stdtr

    df, z = mixture.df, (x[..., None] - mixture.loc) / mixture.scale
    log_density = (
        gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(df * np.pi) - (df + 1) / 2 * np.log1p(z * z / df)
    )
    tail = mixture.scale * (df + z * z) / (df - 1) * np.exp(log_density)
    return (mixture.probs * (mixture.loc * stdtr(df, z) - tail)).sum(axis=-1)


def _mean_between(mixture: StudentMixture, low: float, high: float) -> np.ndarray:
    """The mean of what lies between two quantiles."""
    above = 0.0 if low == 0 else _sum_below(mixture, _quantile(mixture, low))
    below = _mean(mixture) if high == 1 else _sum_below(mixture, _quantile(mixture, high))
    return (below - above) / (high - low)


def _lower_trimmed_mean(mixture: StudentMixture, f: float) -> np.ndarray:
    """Without the highest."""
    if f == 1:
        raise ValueError("lower_trimmed_mean_1.0 has no exact value: it is the least of ever more samples")
    return _mean_between(mixture, 0.0, 1 - f)


def _upper_trimmed_mean(mixture: StudentMixture, f: float) -> np.ndarray:
    """Without the lowest."""
    if f == 1:
        raise ValueError("upper_trimmed_mean_1.0 has no exact value: it is the largest of ever more samples")
    return _mean_between(mixture, f, 1.0)


def _winsorized_mean(mixture: StudentMixture, f: float) -> np.ndarray:
    if f == 0:
        return _mean(mixture)
    ends = _quantile(mixture, f) + _quantile(mixture, 1 - f)
    return (1 - 2 * f) * _mean_between(mixture, f, 1 - f) + f * ends


def _mean_quantile_mix(mixture: StudentMixture, q: float, w: float) -> np.ndarray:
    if w == 1:
        return _mean(mixture)
    return w * _mean(mixture) + (1 - w) * _quantile(mixture, q)


_FORMULAS = {
    "mean": _mean,
    "median": lambda mixture: _quantile(mixture, 0.5),
    "trimmed_mean": lambda mixture, f: _mean_between(mixture, f, 1 - f),
    "lower_trimmed_mean": _lower_trimmed_mean,
    "upper_trimmed_mean": _upper_trimmed_mean,
    "winsorized_mean": _winsorized_mean,
    "quantile": _quantile,
    "mean_minus_std": lambda mixture, s: _mean(mixture) - s * _std(mixture),
    "mean_plus_std": lambda mixture, s: _mean(mixture) + s * _std(mixture),
    "mean_quantile_mix": _mean_quantile_mix,
    "quantile_plus_std": lambda mixture, q, s: _quantile(mixture, q) + s * _std(mixture),
}
