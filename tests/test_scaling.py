"""Prices too low for what published inference adds to a deviation, read as multiples of the last close."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import RunPlace as Place
from places import last_bars

import forecasters
from forecasters import KEYS, Bars
from forecasters.models import MODELS
from objectives.bars import read_bars
from objectives.evaluation import Evaluator
from objectives.windows import SeedKind, now, recent_origins
from storage.encodings import Encodings

PARAMS: dict[str, dict[str, Any]] = {
    "toto": {"context_length": 256, "num_samples": 64, "aggregate": "median"},
    "kronos": {
        "max_context": 96, "clip": 3.0, "temperature": 0.3, "top_k": 12, "top_p": 1.0, "sample_count": 16,
        "aggregate": "mean",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Bars:
    path = tmp_path_factory.mktemp("bars") / "SP500.csv"
    path.write_text("\n".join([*last_bars("SP500", 400), ""]))
    return read_bars(path)[0]


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return {model: forecasters.load(model, checkpoint=f"{model}-tiny") for model in PARAMS}


def divided(bars: Bars, by: float) -> Bars:
    return replace(bars, **{key: getattr(bars, key) / by for key in KEYS})


def forecast(forecaster: Any, bars: Bars, params: dict[str, Any], horizon: int = 1, **options: Any) -> np.ndarray:
    windows = recent_origins(bars, 12, symbol="A", horizon=horizon)
    return Evaluator(forecaster, cache_bytes=1 << 26, **options).forecast(windows, params)


@pytest.mark.parametrize(("model", "horizon"), [("toto", 1), ("toto", 40), ("kronos", 1), ("kronos", 3)])
def test_low_prices_are_forecast_as_the_same_bars_at_any_price(
    bars: Bars, loaded: dict[str, Any], model: str, horizon: int
) -> None:
    def of(by: float, scale: str) -> np.ndarray:
        return forecast(loaded[model], divided(bars, by), {**PARAMS[model], "scale": scale}, horizon) * by

    expected = of(1, "last")
    np.testing.assert_allclose(of(1e6, "last"), expected, rtol=1e-6)
    np.testing.assert_allclose(of(1e10, "auto"), expected, rtol=1e-6)
    assert np.abs(of(1e10, "raw") / expected - 1).max() > 0.01
    assert (of(1, "auto") == of(1, "raw")).all(), "as published where nothing is lost by it"
    assert (of(1, "raw") == forecast(loaded[model], bars, PARAMS[model], horizon)).all(), "as files say nothing of it"


@pytest.mark.parametrize("model", list(PARAMS))
def test_every_price_and_every_answer_is_scaled_back(bars: Bars, loaded: dict[str, Any], model: str) -> None:
    forecaster, params = loaded[model], {**PARAMS[model], "scale": "last"}
    found = {}
    for by in (1.0, 1e8):
        windows = recent_origins(divided(bars, by), 10, symbol="A")
        evaluator = Evaluator(forecaster, cache_bytes=1 << 26)
        exact = Evaluator(forecaster, cache_bytes=1 << 26, exact=True)
        aggregate = {**params, "aggregate": "mean"}
        served = Evaluator(forecaster, cache_bytes=0, rung=1).forecast_keys(now(divided(bars, by), symbol="A"), params)
        found[by] = [
            *(each * by for each in evaluator.forecast_keys(windows, params, kind=SeedKind.STUDY).scored.values()),
            *(each * by for each in served.scored.values()),
            exact.forecast(windows, aggregate) * by,
            evaluator.samples(windows, params) * by,
        ]
    for expected, low in zip(found[1.0], found[1e8], strict=True):
        np.testing.assert_allclose(low, expected, rtol=1e-6)


@pytest.mark.parametrize("model", list(PARAMS))
def test_what_is_kept_between_runs_has_its_unit(bars: Bars, loaded: dict[str, Any], tmp_path: Path, model: str) -> None:
    low, params = divided(bars, 1e7), {**PARAMS[model], "scale": "auto"}
    expected = forecast(loaded[model], low, params)
    for _ in range(2):
        assert (forecast(loaded[model], low, params, store=Encodings(tmp_path)) == expected).all()


def test_contexts_of_low_prices_share_no_forward(bars: Bars, loaded: dict[str, Any]) -> None:
    toto, lengths = loaded["toto"], [300, 332]

    def shared(by: float, scale: str) -> bool:
        return toto.groups_of(divided(bars, by), lengths, {"context_length": 4096, "scale": scale}, 1) is not None

    assert [shared(1, scale) for scale in ("raw", "auto", "last")] == [True, True, False]
    assert [shared(1e6, scale) for scale in ("raw", "auto", "last")] == [True, False, False]


def test_clipping_is_counted_in_the_unit_that_is_read(bars: Bars) -> None:
    clipped, closes = MODELS["kronos"].clipped, divided(bars, 1e9).close
    assert clipped is not None
    of = {scale: clipped(closes, range(100, 400), {"max_context": 96, "clip": 1.4, "scale": scale})
          for scale in ("raw", "auto", "last")}  # fmt: skip
    as_published = clipped(bars.close, range(100, 400), {"max_context": 96, "clip": 1.4})
    assert of["raw"] == 0, "to the network, all is constant"
    assert of["auto"] == of["last"]
    assert abs(of["last"] - as_published) < 0.02
    assert as_published > 0.1


def in_millionths(row: str) -> str:
    time, *prices, volume = row.split(",")
    return ",".join([time, *(str(float(price) / 1e6) for price in prices), volume])


def test_a_search_says_so_and_the_promoted_file_too(place: Place) -> None:
    """Of a symbol that is too low for the model, beside one that is not."""
    head, *rows = last_bars("SP500", 420)
    place.write("LOW.csv", [head, *(in_millionths(row) for row in rows)])
    place.search("toto")
    searched = place.run("launch-workers", "--symbols", "LOW", "--trials", "4", "--cpus", "1")
    assert "toto: closes with a standard deviation below 0.69 are lost on it as published" in searched.stderr
    assert "read as multiples of their last close: LOW" in searched.stderr
    place.run("promote", "--symbols", "LOW")
    promoted = json.loads(place.promoted_file("LOW").read_text())
    assert promoted["config"]["scale"] == "auto"
    assert promoted["metadata"]["rescaled"] == 1.0
    assert promoted["validation"]["skill"] > -0.5, "as published it is below -100"
