"""Forecasts of several prices of a bar: how they are asked for, as they are scored, and repaired as they are served.

Owns the order that the prices of one bar must keep. Knows nothing of windows or errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from forecasters import (
    CLOSE,
    ExactForecaster,
    Forecaster,
    ForecastError,
    KeyedForecaster,
    QuantileForecaster,
    Quantiles,
)


def keyed(forecaster: Forecaster | QuantileForecaster) -> KeyedForecaster:
    """The forecaster as one of every price of a bar; one of the close alone refuses the others with ForecastError.

    One that answers with quantiles has its answers as exact ones.
    """
    if isinstance(forecaster, QuantileForecaster):
        return cast(KeyedForecaster, _Quantiles(forecaster))
    return forecaster if isinstance(forecaster, KeyedForecaster) else cast(KeyedForecaster, _CloseAlone(forecaster))


class _Quantiles:
    """A forecaster of quantiles, asked as one that answers without samples."""

    def __init__(self, forecaster: QuantileForecaster) -> None:
        self._forecaster = forecaster
        self.encode, self.answers_together = forecaster.encode, forecaster.answers_together

    def exact_keys(
        self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> Sequence[Quantiles]:
        del seeds
        return self._forecaster.quantiles_keys(encoded, params, keys)


class _CloseAlone:
    """A forecaster of the close, asked as one of every price."""

    def __init__(self, forecaster: Any) -> None:
        self._forecaster: ExactForecaster = forecaster

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        del params
        return False

    def encode(self, contexts: Any, params: Mapping[str, Any], horizon: int, key: str = CLOSE) -> Any:
        if key != CLOSE:
            raise ForecastError(f"{self._forecaster.model} answers the close alone, not the {key}")
        return self._forecaster.encode(contexts, params, horizon)

    def draw_keys(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Any) -> np.ndarray:
        del keys
        return self._forecaster.draw(encoded, params, seeds)[None]

    def exact_keys(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Any) -> list[Any]:
        del keys
        return [self._forecaster.exact(encoded, params, seeds)]


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyForecasts:
    """Point forecasts of the prices of W windows, each float64 [W, H], price, by key."""

    scored: Mapping[str, np.ndarray]  # as the model says, which errors are measured of
    served: Mapping[str, np.ndarray]  # with the high as the highest of them and the low as the lowest

    def repairs_of(self, key: str) -> int:
        """Windows of which a step of this key is served otherwise than it is scored."""
        return int((self.served[key] != self.scored[key]).any(axis=1).sum())


def key_forecasts(scored: Mapping[str, np.ndarray]) -> KeyForecasts:
    """Repair forecasts of a bar's prices that no bar can have: the high becomes their highest, the low their lowest.

    scored: by key, each [W, H], at least one; a high or a low that was not asked for is not made up.
    """
    every = np.stack(list(scored.values()))  # [K, W, H]
    ends = {"high": every.max(axis=0), "low": every.min(axis=0)}
    served = {key: ends.get(key, points) for key, points in scored.items()}
    return KeyForecasts(scored=dict(scored), served=served)
