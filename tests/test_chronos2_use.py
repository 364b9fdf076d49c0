"""Chronos-2 as people use it: searched and promoted, its incumbents measured, its files served and studied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from places import RunPlace
from test_serve import get, served

from forecasters import chronos2
from launch import cli, verify
from objectives.evaluation import Evaluator
from objectives.metrics import measure_no_change
from objectives.windows import Windows, split
from storage.progress import read_confirmations
from studies import config as configuration
from studies import evaluators
from studies import space as spaces
from studies import study as studying
from studies.evidence import INCUMBENT, from_json
from studies.forecasting import Forecasts
from studies.series import read_series, split_windows

TRIALS = 7
HIS = {
    "name": "chronos2_ctx256_bs128_val20_test20", "model_id": "amazon/chronos-2", "device_map": "cuda",
    "context_length": 256, "prediction_length": 1, "quantile_levels": [0.1, 0.5, 0.9], "batch_size": 128,
}  # fmt: skip


class Place(RunPlace):
    SETTINGS = (
        RunPlace.SETTINGS
        + '[chronos2]\ncheckpoint = "chronos2-tiny"\ncontext_length = [64, 256]\nshrink = [0.0, 0.5, 1.0]\n'
    )
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 420}

    def read(self, *words: str) -> Any:
        """What a command prints as JSON, in this process."""
        ended = self.invoke(cli.studies, *words, "--json")
        assert ended.exit_code == 0, f"{words}: {ended.output}"
        return json.loads(ended.stdout)


@pytest.fixture
def searched(place: Place) -> Place:
    """A study of Chronos-2 with the predecessor's file in use, searched and confirmed."""
    place.search("chronos2")
    place.put_promoted("SP500", {**HIS, "skip_rates": [1, 2]}, model="chronos2")
    place.put_promoted("SP500", {**HIS, "skip_rates": [1, 2]}, model="chronos2", folder="chronos2")
    ended = place.run("launch-workers", "--cpus", "1", "--models", "chronos2", "--trials", str(TRIALS))
    assert ended.stderr.count("is measured without what has no meaning here: skip_rates") == 1
    return place


@pytest.mark.slow
def test_chronos2_is_searched_confirmed_promoted_and_used(searched: Place) -> None:
    place = searched
    place.assert_exact(TRIALS, "SP500")
    config = configuration.load(place.settings)
    (study,) = studying.list_studies(place.storage)
    kept = read_confirmations(place.storage, [study.study_id])[study.study_id].result
    assert kept is not None
    evidence = from_json("chronos2", kept)
    assert evidence.passes == 1
    assert evidence.sampling_error in (None, 0)  # nothing is random
    assert len(evidence.candidates) >= 24 * 3  # the whole grid of aggregates and shares
    still = [one for one in evidence.candidates if one.params["shrink"] == 0]
    assert still
    assert {one.confirmation.skill for one in still if one.confirmation} == {0.0}

    # The predecessor's file was measured on the same windows, as what it means.
    his = evidence.in_use[INCUMBENT]
    space = spaces.make("chronos2", config)
    assert his.params == spaces.from_promoted(HIS, {}, space)
    assert (his.params["variates"], his.params["calendar"]) == ("ohlc", "days")
    assert his.confirmation
    (series,), _ = read_series(config, ["SP500"])
    forecaster = chronos2.load("chronos2-tiny")
    alone = Evaluator(forecaster, cache_bytes=0)  # type: ignore[arg-type]
    test = split_windows(config, "SP500", series.bars).test
    assert his.test
    assert alone.measure(test, his.params).mae == pytest.approx(his.test.mae, rel=1e-6)

    (row,) = place.promote("--dry-run")
    assert row["incumbent_model"] == "chronos2"
    assert row["reason"] in ("improved", "not better")
    assert row["incumbent_mae"] == pytest.approx(his.confirmation.mae)
    (row,) = place.promote("--force")
    assert row["decision"] == "promoted"
    for folder in ("chronos2", "best", "optimized_compiled"):
        promoted = json.loads(place.promoted_file("SP500", folder).read_text())
        assert (promoted["model"], promoted["metadata"]["previous_model"]) == ("chronos2", "chronos2")
        assert (promoted["config"]["model_id"], promoted["config"]["prediction_length"]) == ("chronos2-tiny", 1)

    # Confirmed again: the same question, with what is in use now.
    params = spaces.from_promoted(promoted["config"], promoted["metadata"], space)
    assert space.contains(params)

    forecast = place.read("forecast", "SP500", "--keys", "high,low,close", "--horizon", "3", "--cpus", "1")
    keys = forecast["forecasts"][0]["keys"]
    for key in ("high", "low", "close"):
        assert all(low <= middle <= high for low, middle, high in zip(
            keys[key]["q10"], keys[key]["q50"], keys[key]["q90"], strict=True))  # fmt: skip
    assert np.ptp([keys["close"]["q10"][0], keys["close"]["q90"][0]]) > 1  # an interval is not shrunk

    answer, notes = served_keys(place)
    assert not any("no meaning" in line for line in notes)
    assert [answer[key]["points"] for key in keys] == [keys[key]["points"] for key in keys]

    words = ("--models", "chronos2", "--windows", "12", "--horizon", "2", "--params", "best,default")
    compared = place.read("compare", *words, "--passes", "3", "--plot", str(place.folder / "fan.html"))
    labels = {row["label"] for row in compared["rows"] if row["model"] == "chronos2" and not row["error"]}
    assert labels == {"chronos2 best", "chronos2 default"}
    assert (place.folder / "fan.html").stat().st_size > 1000
    swept = place.read("sweep", "SP500", "chronos2", "shrink=0,0.5,1", "--from", "default", "--windows", "12")
    assert [cell["values"] for cell in swept["cells"]] == [{"shrink": share} for share in (0.0, 0.5, 1.0)]
    assert swept["cells"][0]["skill"] == 0.0
    backtest = place.read("backtest", "--params", "best", "--strategies", "simple", "--bars", "30")
    assert {(row["model"], row["source"]) for row in backtest["rows"]} >= {("chronos2", "best")}


def served_keys(place: Place) -> tuple[dict[str, Any], list[str]]:
    """What HTTP answers for three bars of three prices, by key, and what is said beside it."""
    notes: list[str] = []
    found = Forecasts(place.settings, storage=None, environment={}, note=notes.append)
    try:
        with served(found) as address:
            status, text = get(address, "/forecast?symbol=SP500&keys=high,low,close&horizon=3")
    finally:
        found.close()
    assert status == 200, text
    return json.loads(text)["forecasts"]["SP500"]["keys"], notes


def test_a_file_of_the_predecessor_is_served_as_what_it_means(place: Place) -> None:
    path = place.put_promoted("SP500", {**HIS, "skip_rates": [1, 2]}, model="chronos2")
    keys, notes = served_keys(place)
    said = [line for line in notes if "no meaning here" in line]
    assert said == [f"{path}: is measured without what has no meaning here: skip_rates"]
    (series,), _ = read_series(configuration.load(place.settings), ["SP500"])
    forecaster = chronos2.load("chronos2-tiny")
    params = {"context_length": 256, "variates": "ohlc", "transform": "price", "calendar": "days"}
    (close,) = forecaster.quantiles_keys(forecaster.encode([series.bars], params, 3), {}, ["close"])
    median = close.values[0, :, close.levels.tolist().index(0.5)]
    np.testing.assert_allclose(keys["close"]["points"], median, rtol=1e-12)


def test_there_are_no_samples_to_reduce(place: Place) -> None:
    place.put_promoted("SP500", HIS, model="chronos2")
    place.put_promoted(
        "NASDAQ", {"num_samples": 64, "aggregate": "mean", "season": 1, "context_length": 99}, model="naive"
    )
    words = ("--models", "naive,chronos2", "--max-cost", "0.9", "--json")
    named = place.invoke(cli.studies, "reduce", "--symbols", "SP500", *words)
    assert named.exit_code == 1
    assert "is of chronos2, which draws no samples: nothing to reduce" in named.stderr
    place.write("NASDAQ.csv", place.data.joinpath("SP500.csv").read_text().splitlines())
    everything = place.invoke(cli.studies, "reduce", *words)
    assert everything.exit_code == 0, everything.output
    assert [row["symbol"] for row in json.loads(everything.stdout)] == ["NASDAQ"]


def test_compiling_is_checked_by_quantiles_where_there_are_no_samples(place: Place) -> None:
    config = configuration.load(place.settings)
    series, _ = read_series(config, ["SP500"])
    (job,) = verify.jobs(config, series, ["chronos2"], device="cpu", trials=2, repeats=1)
    measured = verify.measure(job, verify.EAGER)
    assert measured.samples.shape == (len(job.windows), 9, 1)
    assert (np.diff(measured.samples, axis=1) >= 0).all()
    assert verify.row(job, verify.EAGER, measured, measured).passed


def windows(config: configuration.Config, horizon: int = 1) -> Windows:
    (series,), _ = read_series(config, ["SP500"])
    return split(series.bars, symbol="SP500", horizon=horizon, validation=12, test=5).validation


@pytest.mark.parametrize("variates", ["close", "close+volume", "ohlc", "ohlcv"])
def test_all_of_a_move_taken_back_is_no_change(place: Place, variates: str) -> None:
    config = configuration.load(place.settings)
    evaluator = evaluators.evaluator_of(config, chronos2.load("chronos2-tiny"), cache_bytes=2**20)  # type: ignore[arg-type]
    asked = windows(config, 3)
    params = {"context_length": 64, "variates": variates, "transform": "price", "aggregate": "mean"}
    for key in ("close", "high"):
        of_key = asked.of_key(key)
        measured = evaluator.measure(of_key, {**params, "shrink": 0.0})
        assert (measured.skill, measured.mae) == (0.0, measure_no_change(of_key))
        assert evaluator.measure(of_key, params).mae != measured.mae


def test_a_forecast_after_friday_is_saturdays_and_scored_as_mondays(place: Place) -> None:
    """A calendar of days has a row for every weekend, and the next of its steps is the next bar."""
    config = configuration.load(place.settings)
    forecaster = chronos2.load("chronos2-tiny")
    (series,), _ = read_series(config, ["SP500"])
    last = next(i for i in range(len(series.bars) - 1, 0, -1) if _weekday(series.bars.timestamps[i]) == 4)
    friday = series.bars.slice(0, last + 1)
    params = {"context_length": 64, "variates": "close", "transform": "price", "calendar": "days"}
    found = forecaster.quantiles(forecaster.encode([friday], params, 1), {}).values
    repeated = np.repeat(friday.close, np.append(np.diff(friday.timestamps) // np.timedelta64(1, "D"), 1))
    expected = forecaster.predict([repeated[-64:]], 1)
    np.testing.assert_allclose(found[0, 0], np.sort(expected[0, :, 0]), rtol=1e-6)
    bars = forecaster.quantiles(forecaster.encode([friday], {**params, "calendar": "bars"}, 1), {}).values
    assert not np.allclose(found, bars, rtol=1e-6)


def _weekday(time: np.datetime64) -> int:
    return int((time.astype("datetime64[D]").astype(int) + 3) % 7)  # 1970-01-01 was a Thursday
