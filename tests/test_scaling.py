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
from studies import config as configuration
from studies import space as spaces
from studies.config import ConfigError

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
    np.testing.assert_allclose(of(1e10, "last"), expected, rtol=1e-6)
    assert np.abs(of(1e10, "raw") / expected - 1).max() > 0.01
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
    low, params = divided(bars, 1e7), {**PARAMS[model], "scale": "last"}
    expected = forecast(loaded[model], low, params)
    for _ in range(2):
        assert (forecast(loaded[model], low, params, store=Encodings(tmp_path)) == expected).all()


def test_contexts_in_units_of_their_own_share_no_forward(bars: Bars, loaded: dict[str, Any]) -> None:
    def groups(scale: str) -> list[int] | None:
        return loaded["toto"].groups_of(bars, [300, 332], {"context_length": 4096, "scale": scale}, 1)

    assert groups("raw") is not None
    assert groups("last") is None


def test_clipping_is_counted_in_the_unit_that_is_read(bars: Bars) -> None:
    clipped, closes = MODELS["kronos"].clipped, divided(bars, 1e9).close
    assert clipped is not None
    params = {"max_context": 96, "clip": 1.4}
    as_published = clipped(bars.close, range(100, 400), params)
    assert as_published > 0.1
    assert clipped(closes, range(100, 400), params) == 0, "to the network, all is constant"
    assert abs(clipped(closes, range(100, 400), {**params, "scale": "last"}) - as_published) < 0.02


@pytest.mark.parametrize("model", list(PARAMS))
def test_the_settings_leave_it_to_the_bars(bars: Bars, model: str) -> None:
    def fixed(by: float, **settings: Any) -> Any:
        config = configuration.load(None, {model: settings})
        space = spaces.make(model, config, divided(bars, by))
        return spaces.default(space, config).get("scale"), space.knobs.get("scale")

    assert fixed(1) == (None, None)
    assert fixed(1e8) == ("last", None)
    assert fixed(1e8, scale=("raw",)) == (None, None)
    assert fixed(1, scale=("last",)) == ("last", None)
    assert fixed(1, scale=("raw", "last")) == ("raw", ("raw", "last"))
    with pytest.raises(ConfigError, match=r"scale"):
        configuration.load(None, {model: {"scale": ("raw", "auto")}})


def in_millionths(row: str) -> str:
    time, *prices, volume = row.split(",")
    return ",".join([time, *(str(float(price) / 1e6) for price in prices), volume])


@pytest.mark.slow
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
    assert promoted["config"]["scale"] == "last"
    assert promoted["validation"]["skill"] > -0.5, "as published it is -25"
    (served,) = json.loads(place.run("studies", "forecast", "LOW", "--json").stdout)["forecasts"]
    assert served["keys"]["close"]["points"][0] == pytest.approx(served["last_close"], rel=0.2)
