"""Answers of quantiles at levels: their aggregates by hand and by integration, and what the evaluator makes of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from forecasters import CLOSE, Bars, GraphCounts, Quantiles, StageParams
from objectives import aggregation
from objectives.evaluation import Evaluator
from objectives.exact import exact_points
from objectives.metrics import measure_no_change
from objectives.windows import Windows, split

NAMES = (
    *("mean", "median", "p10", "quantile_0.37", "quantile_0.001", "quantile_100", "trimmed_mean_10", "trimmed_mean_45"),
    *("lower_trimmed_mean_20", "upper_trimmed_mean_20", "lower_trimmed_mean_1", "winsorized_mean_5"),
    *("mean_minus_std_0.5", "mean_plus_std_1", "mean_quantile_mix_0.3_0.6", "quantile_plus_std_0.4_0.25"),
)
LEVELS = np.array([0.01, 0.05, *np.arange(0.1, 0.91, 0.05), 0.95, 0.99])


def one(values: Sequence[float], levels: Sequence[float]) -> Quantiles:
    return Quantiles(levels=np.array(levels), values=np.array(values, dtype=float)[None, None])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 10 at .1, 20 at .5, 40 at .9: linear between, 10 below .1 and 40 above .9.
        ("median", 20),
        ("quantile_0.3", 15),
        ("quantile_0.6", 25),
        ("quantile_0.02", 10),
        ("quantile_0.97", 40),
        ("mean", 0.1 * 10 + 0.4 * 15 + 0.4 * 30 + 0.1 * 40),
        ("trimmed_mean_10", (0.4 * 15 + 0.4 * 30) / 0.8),
        ("trimmed_mean_30", (0.2 * 17.5 + 0.2 * 25) / 0.4),
        ("lower_trimmed_mean_50", (0.1 * 10 + 0.4 * 15) / 0.5),
        ("upper_trimmed_mean_50", (0.4 * 30 + 0.1 * 40) / 0.5),
        ("upper_trimmed_mean_100", 40),
        ("winsorized_mean_50", None),
        ("winsorized_mean_10", 0.4 * 15 + 0.4 * 30 + 0.1 * (10 + 40)),
        ("mean_quantile_mix_0.5_0.25", 0.25 * 23 + 0.75 * 20),
        # The mean is 23; below .1 -13, then -13 to -3, then -3 to 17, then 17: squares 169, 79, 249 / 3, 289.
        ("mean_plus_std_1", 23 + np.sqrt(0.1 * 169 + 0.4 * 217 / 3 + 0.4 * 247 / 3 + 0.1 * 289)),
    ],
)
def test_aggregates_by_hand(name: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="below 50 %"):
            exact_points(one([10, 20, 40], [0.1, 0.5, 0.9]), name)
        return
    np.testing.assert_allclose(exact_points(one([10, 20, 40], [0.1, 0.5, 0.9]), name), [[expected]], rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_aggregates_are_those_of_very_many_evenly_spread_values(name: str) -> None:
    """A million values at evenly spread probabilities are the function itself: samples without noise."""
    values = np.sort(np.random.default_rng(2).standard_t(4, (2, 3, len(LEVELS))), axis=-1) + 100
    at = (np.arange(1_000_000) + 0.5) / 1_000_000
    drawn = np.stack([[np.interp(at, LEVELS, each) for each in window] for window in values]).swapaxes(1, 2)
    expected = aggregation.Draw(drawn).aggregate(name)
    found = exact_points(Quantiles(levels=LEVELS, values=values), name)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


# ---- through the evaluator -------------------------------------------------------------------------------------------


class Ladder:
    """Quantiles a step apart around the last price of the context, times 1 + drift."""

    model, fingerprint, compilation, forwards = "ladder", "ladder", "off", 0
    free_draw_horizon, graphs = sys.maxsize, GraphCounts()
    params = StageParams(encode=("drift",))

    class Encoded(dict[str, np.ndarray]):
        nbytes = 100

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        del params
        return True

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE) -> Encoded:
        del key
        self.forwards += 1
        steps = np.arange(1, horizon + 1) * params["drift"]
        return self.Encoded(
            {
                key: np.array([getattr(bars, key)[-1] for bars in contexts])[:, None] * (1 + steps)
                for key in ("high", "close")
            }
        )

    def quantiles(self, encoded: Encoded, params: Mapping[str, Any]) -> Quantiles:
        return self.quantiles_keys(encoded, params, (CLOSE,))[0]

    def quantiles_keys(self, encoded: Encoded, params: Mapping[str, Any], keys: Sequence[str]) -> list[Quantiles]:
        assert not params
        return [
            Quantiles(levels=np.array([0.1, 0.5, 0.9]), values=encoded[key][..., None] * np.array([0.98, 1, 1.04]))
            for key in keys
        ]


def windows(horizon: int = 2) -> Windows:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, 300)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(300) * np.timedelta64(1, "D")
    bars = Bars(timestamps=days, open=close, high=close * 1.01, low=close, close=close, volume=None)
    return split(bars, symbol="X", horizon=horizon, validation=12, test=5).validation


PARAMS = {"drift": 0.01, "aggregate": "quantile_0.9"}


def test_every_pass_of_a_forecaster_of_quantiles_is_the_same_and_costs_one_encoding() -> None:
    forecaster, asked = Ladder(), windows()
    evaluator = Evaluator(forecaster, cache_bytes=2**20, rung=5)  # type: ignore[arg-type]
    once = evaluator.measure(asked, PARAMS)
    before = forecaster.forwards
    again = evaluator.measure(asked, {**PARAMS, "aggregate": "median"}, passes=(3,))
    assert forecaster.forwards == before == 3
    assert evaluator.measure(asked, PARAMS, passes=(1, 2)).errors == once.errors
    assert again.errors != once.errors
    expected = asked.last_closes[:, None] * np.array([1.01, 1.02])
    np.testing.assert_allclose(evaluator.forecast(asked, PARAMS), expected * 1.04)
    with pytest.raises(ValueError, match="draws no samples"):
        evaluator.samples(asked, PARAMS)


def test_shrinking_goes_from_the_forecast_to_no_change() -> None:
    evaluator, asked = Evaluator(Ladder(), cache_bytes=0, rung=5), windows()  # type: ignore[arg-type]
    whole, half, none = (
        evaluator.forecast_keys(asked, {**PARAMS, "shrink": s}, ("high", "close")) for s in (1, 0.5, 0)
    )
    for key in ("high", "close"):
        unchanged = asked.of_key(key).no_change[:, None]
        np.testing.assert_array_equal(whole.scored[key], evaluator.forecast(asked.of_key(key), PARAMS))
        np.testing.assert_allclose(half.scored[key], (whole.scored[key] + unchanged) / 2)
        np.testing.assert_array_equal(none.scored[key], np.broadcast_to(unchanged, (12, 2)))
    measured = evaluator.measure(asked, {**PARAMS, "shrink": 0})
    assert (measured.skill, measured.mae) == (0.0, measure_no_change(asked))
