"""The seasonal naive forecast with bootstrapped residuals: a baseline without weights or a network.

The next price is the one a season earlier times the exponential of a residual of the past, drawn with replacement:
Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 3rd edition, sections 5.2 (seasonal naive method) and
5.5 (bootstrapped residuals), in logarithms, so that prices stay positive. Owns the descriptor and the forecaster.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forecasters import BY_DEFAULT, CLOSE, Bars, ForecastError, GraphCounts, Running, StageParams, seed_of_key
from forecasters.descriptor import Knob, Model, SearchedParams
from forecasters.settings import AGGREGATES, counts, setting

VERSION = 1  # raise it where the same params and seeds would give another forecast


@dataclass(frozen=True, kw_only=True)
class NaiveSettings:
    """The table [naive]."""

    season: tuple[int, ...] = setting(counts, one_or_list=True)
    context_length: tuple[int, ...] = setting(counts, one_or_list=True)
    num_samples: tuple[int, ...] = setting(counts)
    aggregates: tuple[str, ...] = setting(kind=AGGREGATES)


def _search(settings: NaiveSettings) -> SearchedParams:
    knobs: dict[str, Knob] = {
        "aggregate": settings.aggregates,
        "num_samples": settings.num_samples,
        "season": settings.season,
        "context_length": settings.context_length,
    }
    return SearchedParams(knobs=knobs)


def _window_bytes(params: Mapping[str, Any], horizon: int) -> int:
    """Of one window whose history is long enough."""
    del horizon
    return 8 * (params["season"] + params["context_length"])


NAIVE = Model(
    name="naive",
    module="forecasters.naive",
    settings=NaiveSettings,
    params=StageParams(encode=("season", "context_length"), draw=("num_samples",), num_samples="num_samples"),
    kinds={"aggregate": "aggregate", "num_samples": "count", "season": "count", "context_length": "count"},
    search=_search,
    # Section 5.2 calls a season of one bar, the random walk, the best there is for many financial series.
    starting_points=(
        {"season": 1, "context_length": 256, "num_samples": 1024, "aggregate": "median"},
        {"season": 5, "context_length": 256, "num_samples": 1024, "aggregate": "median"},
    ),
    window_bytes=_window_bytes,
    by_name=True,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSeasons:
    """What W windows leave: the logarithms of the last season's prices, and the residuals to draw from."""

    horizon: int
    seasons: np.ndarray  # float64 [W, season]
    residuals: Sequence[np.ndarray]  # a window: float64, at least one
    key: str = CLOSE  # which price of a bar

    @property
    def nbytes(self) -> int:
        return self.seasons.nbytes + sum(residuals.nbytes for residuals in self.residuals)


class Naive:
    """The seasonal naive forecaster of any one price of a bar; see `forecasters.KeyedForecaster`."""

    model = NAIVE.name
    params = NAIVE.params
    fingerprint = hashlib.sha256(f"{NAIVE.name} {VERSION}".encode()).hexdigest()
    free_draw_horizon = sys.maxsize  # no draw runs a network
    compilation = "off"
    graphs = GraphCounts()  # there is nothing to compile

    def __init__(self) -> None:
        self.forwards = 0

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """No: each key has a season and residuals of its own."""
        del params
        return False

    def encode(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE
    ) -> EncodedSeasons:
        """The last season of each context, and the residuals of its last `context_length` bars or as many as it has.

        params: {"season": bars, "context_length": bars}. Raises ForecastError for a horizon or a param below 1, and
        where a context has no bar a season before its last one, or a price that is not a positive number.
        """
        season, length = int(params["season"]), int(params["context_length"])
        if horizon < 1 or season < 1 or length < 1:
            raise ForecastError(f"horizon {horizon}, season {season}, context_length {length}: each must be at least 1")
        seasons, residuals = np.empty((len(contexts), season)), []
        for row, bars in enumerate(contexts):
            prices = getattr(bars, key)[-(length + season) :]
            if len(prices) <= season:
                raise ForecastError(f"a context of {len(bars)} bars: a season of {season} needs at least {season + 1}")
            if not (np.isfinite(prices) & (prices > 0)).all():
                raise ForecastError(f"the {key} of {bars.timestamps[-1]} or before it is not a positive number")
            logs = np.log(prices)
            seasons[row] = logs[-season:]
            residuals.append(logs[season:] - logs[:-season])
        return EncodedSeasons(key=key, horizon=horizon, seasons=seasons, residuals=residuals)

    def draw(self, encoded: EncodedSeasons, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples of the price that was encoded, float64 [W, S, H], S being params["num_samples"].

        Raises ForecastError for fewer than one sample and for another number of seeds than of windows.
        """
        count, horizon = int(params["num_samples"]), encoded.horizon
        if count < 1:
            raise ForecastError(f"num_samples {count}: at least 1 is needed")
        if len(seeds) != len(encoded.seasons):
            raise ForecastError(f"{len(seeds)} seeds for {len(encoded.seasons)} windows")
        season = encoded.seasons.shape[1]
        logs = np.empty((len(seeds), count, horizon))
        for row, (seed, residuals) in enumerate(zip(seeds, encoded.residuals, strict=True)):
            # Row by row from one stream that only this window has: fewer samples are the first of more.
            stream = np.random.Generator(np.random.Philox(key=seed_of_key(seed, encoded.key)))
            uniforms = stream.random((count, horizon))
            logs[row] = residuals[(uniforms * len(residuals)).astype(np.int64)]
        for step in range(horizon):
            earlier = encoded.seasons[:, step, None] if step < season else logs[:, :, step - season]
            logs[:, :, step] += earlier
        return np.exp(logs)

    def draw_keys(
        self, encoded: EncodedSeasons, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> np.ndarray:
        """Samples of the one key that was encoded, float64 [1, W, S, H]."""
        assert tuple(keys) == (encoded.key,)
        return self.draw(encoded, params, seeds)[None]


def load(*, device: str = "cpu", running: Running = BY_DEFAULT) -> Naive:
    """The forecaster, which needs no checkpoint and runs on the CPU whatever device and running say."""
    del device, running
    return Naive()


def inspect(*, running: Running = BY_DEFAULT) -> str:
    """The fingerprint of `load`'s forecaster: of the model's name and version."""
    del running
    return Naive.fingerprint
