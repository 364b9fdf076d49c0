"""Aggregates of quantiles at levels, and points shrunk towards "no change".

A model that answers with quantiles says nothing between its levels and beyond them. Here its quantile function is
linear between two levels, and flat beyond the outermost ones: the lowest quantile stands for all that is lower, the
highest for all that is higher. So quantiles and trimmed means that reach into a tail, and the mean, are finite, and
the standard deviation is below the true one. Knows nothing of models or seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forecasters import Quantiles
from objectives.windows import Contexts

SHRINK = "shrink"  # the param that says how much of a forecast move is kept


class PiecewiseLinear:
    """The distribution that quantiles at levels stand for; see `exact.Distribution`. Every answer is [W, H]."""

    def __init__(self, quantiles: Quantiles) -> None:
        self._levels, self._values = quantiles.levels, quantiles.values

    def quantile(self, q: float) -> np.ndarray:
        return self._values @ self._shares(np.array([q]))[0]

    def mean(self) -> np.ndarray:
        return self.mean_between(0.0, 1.0)

    def mean_between(self, low: float, high: float) -> np.ndarray:
        if low == high:  # nothing is left but one end
            return self.quantile(low)
        edges, shares = self._pieces(low, high)
        weights = (np.diff(edges)[:, None] * (shares[1:] + shares[:-1]) / 2).sum(axis=0)  # trapezoids
        return self._values @ (weights / (high - low))

    def std(self) -> np.ndarray:
        edges, shares = self._pieces(0.0, 1.0)
        apart = self._values @ shares.T - self.mean()[..., None]  # [W, H, edges]
        first, last = apart[..., :-1], apart[..., 1:]
        # The integral of the square of what goes from u to v in a straight line.
        return np.sqrt(((first**2 + first * last + last**2) / 3) @ np.diff(edges))

    def _pieces(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """Where the function may bend between two probabilities, with both [E], and the levels' shares there [E, Q]."""
        edges = np.unique(np.clip([low, *self._levels, high], low, high))
        return edges, self._shares(edges)

    def _shares(self, at: np.ndarray) -> np.ndarray:
        """How much of each level's value the function has at these probabilities, [P, Q]."""
        return np.stack([np.interp(at, self._levels, one) for one in np.eye(len(self._levels))], axis=1)


def shrunk(
    points: dict[str, np.ndarray], params: Mapping[str, Any], contexts: Contexts, indices: Sequence[int]
) -> dict[str, np.ndarray]:
    """Points [w, H] of these windows, by key, moved towards "no change": all the way where `shrink` is 0, not at 1."""
    share = params.get(SHRINK, 1)
    if share == 1:
        return points
    found = {}
    for key, of_key in points.items():
        unchanged = contexts.of_key(key).no_change[list(indices), None]
        found[key] = unchanged + share * (of_key - unchanged)
    return found


def unshrunk(params: Mapping[str, Any], aggregate: str) -> dict[str, Any]:
    """Params that ask for a quantile as an interval has it: shrinking moves a point, and leaves the doubt about it."""
    return {**{name: value for name, value in params.items() if name != SHRINK}, "aggregate": aggregate}
