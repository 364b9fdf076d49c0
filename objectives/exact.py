"""Aggregates without samples: what each named aggregate tends to as the number of samples grows.

Owns the limits of the names in aggregation.py for anything that has quantiles and means between them, and those of a
mixture of Student's t; quantiles.py has those of quantiles at levels. No seed and no sample count is left in them, so
a study of them is a study of its own. Knows nothing of models beyond the kinds of exact answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from forecasters import Expectation, ForecastError, Quantiles, StudentMixture
from objectives.aggregation import Aggregate, parse
from objectives.quantiles import PiecewiseLinear

BISECTIONS = 80  # a bracket of 1e8 scales down to the last bit of a float64


class Distribution(Protocol):
    """What the limits are made of, each float64 [W, H]."""

    def mean(self) -> np.ndarray: ...
    def std(self) -> np.ndarray: ...
    def quantile(self, q: float) -> np.ndarray: ...
    def mean_between(self, low: float, high: float) -> np.ndarray:
        """The mean of what lies between two quantiles."""
        ...


def exact_points(exact: Expectation | StudentMixture | Quantiles, name: str | Aggregate) -> np.ndarray:
    """Points, float64 [W, H].

    Raises ValueError for an unknown name, for one of a mixture whose limit is infinite (quantile_0 is the least of ever
    more samples) and for any but the mean of an Expectation; ForecastError where a mean or a deviation does not exist.
    """
    aggregate = parse(name) if isinstance(name, str) else name
    if isinstance(exact, Expectation):
        if aggregate.kind != "mean":
            raise ValueError(f"aggregate {aggregate.name}: only the mean of this model has an exact value")
        return exact.points
    answer = PiecewiseLinear(exact) if isinstance(exact, Quantiles) else _Mixture(exact)
    points = _LIMITS[aggregate.kind](answer, *aggregate.numbers)
    if not np.isfinite(points).all():
        window = int(np.argwhere(~np.isfinite(points))[0, 0])
        raise ForecastError(f"window {window}: {aggregate.name} of its distribution is not finite")
    return points


def _winsorized_mean(of: Distribution, f: float) -> np.ndarray:
    if f == 0:
        return of.mean()
    return (1 - 2 * f) * of.mean_between(f, 1 - f) + f * (of.quantile(f) + of.quantile(1 - f))


def _mean_quantile_mix(of: Distribution, q: float, w: float) -> np.ndarray:
    return of.mean() if w == 1 else w * of.mean() + (1 - w) * of.quantile(q)


_LIMITS: dict[str, Callable[..., np.ndarray]] = {
    "mean": lambda of: of.mean(),
    "median": lambda of: of.quantile(0.5),
    "trimmed_mean": lambda of, f: of.mean_between(f, 1 - f),
    "lower_trimmed_mean": lambda of, f: of.mean_between(0.0, 1 - f),  # without the highest
    "upper_trimmed_mean": lambda of, f: of.mean_between(f, 1.0),  # without the lowest
    "winsorized_mean": _winsorized_mean,
    "quantile": lambda of, q: of.quantile(q),
    "mean_minus_std": lambda of, s: of.mean() - s * of.std(),
    "mean_plus_std": lambda of, s: of.mean() + s * of.std(),
    "mean_quantile_mix": _mean_quantile_mix,
    "quantile_plus_std": lambda of, q, s: of.quantile(q) + s * of.std(),
}


# --- a mixture of Student's t [W, H, K] ----------------------------------------------------------------------


class _Mixture:
    def __init__(self, mixture: StudentMixture) -> None:
        self._mixture = mixture

    def mean(self) -> np.ndarray:
        mixture = self._mixture
        if not (mixture.df > 1).all():
            raise ForecastError("a Student's t of 1 degree of freedom or less has no mean")
        return (mixture.probs * mixture.loc).sum(axis=-1)

    def std(self) -> np.ndarray:
        mixture = self._mixture
        if not (mixture.df > 2).all():
            raise ForecastError("a Student's t of 2 degrees of freedom or less has no standard deviation")
        mean = self.mean()
        # around the mean: the difference of two large squares would lose a small deviation
        variance = mixture.scale**2 * mixture.df / (mixture.df - 2) + (mixture.loc - mean[..., None]) ** 2
        return np.sqrt((mixture.probs * variance).sum(axis=-1))

    def quantile(self, q: float) -> np.ndarray:
        """Where the distribution function reaches q, by bisection between the components' own quantiles."""
        from scipy.special import stdtr, stdtrit  # late: 0.2 s that only these answers need

        if not 0 < q < 1:
            raise ValueError(f"quantile_{q} has no exact value: with more and more samples it goes to infinity")
        mixture = self._mixture
        own = mixture.loc + mixture.scale * stdtrit(mixture.df, q)
        low, high = own.min(axis=-1), own.max(axis=-1)
        for _ in range(BISECTIONS):
            middle = low + (high - low) / 2
            standard = (middle[..., None] - mixture.loc) / mixture.scale
            below = (mixture.probs * stdtr(mixture.df, standard)).sum(axis=-1) < q
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low + (high - low) / 2

    def mean_between(self, low: float, high: float) -> np.ndarray:
        above = 0.0 if low == 0 else self._sum_below(self.quantile(low))
        below = self.mean() if high == 1 else self._sum_below(self.quantile(high))
        return (below - above) / (high - low)

    def _sum_below(self, x: np.ndarray) -> np.ndarray:
        """E[X; X <= x]: for one t, with z = (x - loc) / scale, loc T(z) - scale (df + z**2) / (df - 1) t(z)."""
        from scipy.special import gammaln, stdtr

        mixture = self._mixture
        df, z = mixture.df, (x[..., None] - mixture.loc) / mixture.scale
        log_density = (
            gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(df * np.pi) - (df + 1) / 2 * np.log1p(z * z / df)
        )
        tail = mixture.scale * (df + z * z) / (df - 1) * np.exp(log_density)
        return (mixture.probs * (mixture.loc * stdtr(df, z) - tail)).sum(axis=-1)
