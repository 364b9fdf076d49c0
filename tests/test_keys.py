"""All four prices of a bar: what models answer of each, how it is measured and repaired, and studies of another key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from places import STUDY_SETTINGS, StudyPlace
from test_kronos import GREEDY, NARROW, Golden
from test_mae import Plain
from test_toto import LENGTHS, TOLERANCE, golden

import forecasters
from forecasters import CLOSE, KEYS, Bars, ExpectedError, ForecastError, StudentMixture, naive, seed_of_key, toto
from forecasters.kronos_encoded import COLUMNS
from forecasters.toto_encoded import RATIO_SCALE, VARIATE_KEYS
from launch import cli
from objectives.bars import DataError, read_bars, require_keys
from objectives.evaluation import Evaluator
from objectives.keys import key_forecasts
from objectives.metrics import no_change_errors, relative_errors
from objectives.windows import SeedKind, Windows, now
from studies import config as configuration
from studies import space as spaces
from studies import study as studying
from studies.config import ConfigError
from studies.in_use import configurations_in_use
from studies.series import split_windows
from studies.study import StudyMismatch

VARIATES = {"context_length": 4096, "key_input": "variates", "num_samples": 100}
PRICE = {"context_length": 4096, "num_samples": 100}
RATIO = {**PRICE, "key_input": "ratio"}
KRONOS = {**NARROW, "max_context": 60, "clip": 3.0, "aggregate": "mean"}


class Place(StudyPlace):
    SETTINGS: ClassVar[str] = STUDY_SETTINGS


def walk(count: int = 90, seed: int = 0) -> Bars:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.02, count)))
    opening = np.append(close[0], close[:-1]) * np.exp(rng.normal(0, 0.004, count))
    high, low = (np.exp(sign * np.abs(rng.normal(0, 0.01, count))) for sign in (1, -1))
    return Bars(
        timestamps=np.datetime64("2024-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        open=opening,
        high=np.maximum(opening, close) * high,
        low=np.minimum(opening, close) * low,
        close=close,
        volume=None,
    )


def windows(count: int = 6, horizon: int = 1, **more: Any) -> Windows:
    bars = walk()
    last = len(bars) - horizon
    origins = tuple(range(last - count + 1, last + 1))
    return Windows(symbol="A", bars=bars, origins=origins, horizon=horizon, **more)


@pytest.fixture(scope="module")
def several() -> toto.Toto:
    """A network with a layer over variates."""
    return golden("toto-b-variates")[0]


@pytest.fixture(scope="module")
def kronos_a() -> Golden:
    return Golden("kronos-a")


def golden_bars(settings: Mapping[str, Any], prices: np.ndarray) -> Bars:
    """The golden's columns as bars."""
    days = np.datetime64("2024-01-01", "ns") + np.arange(prices.shape[1]) * np.timedelta64(1, "D")
    return Bars(timestamps=days, volume=None, **dict(zip(settings["columns"], prices, strict=True)))


# --- Toto -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [length for case, length in LENGTHS if case == "toto-b-variates"])
def test_variates_are_the_references(several: Any, length: int) -> None:
    _, settings, prices, expected = golden("toto-b-variates")
    assert tuple(settings["columns"]) == VARIATE_KEYS
    bars = golden_bars(settings, prices[:, :length])
    deviation = prices[:, :length].std(1, keepdims=True)
    for horizon in settings["horizons"]:
        # Beside a longer context, so that it is padded.
        both = several.encode([golden_bars(settings, prices), bars], VARIATES, horizon)
        means = several.mean(both).reshape(2, 4, horizon)[1]
        assert (np.abs(means - expected[f"n{length}_mean_h{horizon}"]) / deviation).max() < TOLERANCE / 10
    encoded = several.encode([bars], VARIATES, 1)
    exact = several.exact_keys(encoded, {}, [0], VARIATE_KEYS)
    last = f"n{length}_"
    for key, mixture in enumerate(exact):
        loc, scale = (expected[f"{last}series_{name}"][key, -1].astype(float) for name in ("loc", "scale"))
        np.testing.assert_allclose(mixture.probs[0, 0], expected[f"{last}mix_probs"][key, 0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mixture.df[0, 0], expected[f"{last}df"][key, 0], rtol=1e-4)
        np.testing.assert_allclose(mixture.loc[0, 0], expected[f"{last}comp_loc"][key, 0] * scale + loc, rtol=1e-4)
        np.testing.assert_allclose(mixture.scale[0, 0], expected[f"{last}comp_scale"][key, 0] * scale, rtol=1e-4)


@pytest.mark.parametrize("length", [64, 50])
def test_drawn_variates_have_the_references_medians(several: Any, length: int) -> None:
    _, settings, prices, expected = golden("toto-b-variates")
    horizon, count = settings["horizons"][-1], settings["sampled_count_long"]
    bars = golden_bars(settings, prices[:, :length])
    encoded = several.encode([bars], VARIATES, horizon)
    drawn = several.draw_keys(encoded, {"num_samples": count}, [3], VARIATE_KEYS)[:, 0]  # [K, S, H]
    below = (drawn < expected[f"n{length}_samples_h{horizon}_median"][:, None]).mean(1)
    assert np.abs(below - 0.5).max() < 4.5 * np.sqrt(0.25 * 2 / count)


@pytest.mark.parametrize("horizon", [1, 40])
def test_keys_asked_for_and_samples_change_nothing_of_a_variate(several: Any, horizon: int) -> None:
    contexts, seeds = [walk(), walk().slice(0, 70)], [1, 2**64 - 1]
    encoded = several.encode(contexts, VARIATES, horizon)
    every = several.draw_keys(encoded, {"num_samples": 130}, seeds, KEYS)
    assert every.shape == (4, 2, 130, horizon)
    for place, key in enumerate(KEYS):
        alone = several.draw_keys(encoded, {"num_samples": 65}, seeds, (key,))[0]
        np.testing.assert_array_equal(alone, every[place, :, :65])
    np.testing.assert_array_equal(several.draw(encoded, {"num_samples": 130}, seeds), every[KEYS.index(CLOSE)])
    # Four independent draws: ranks of two keys' first steps do not go together.
    ranks = every[:, 0, :, 0].argsort(1).argsort(1)
    assert np.abs(np.corrcoef(ranks) - np.eye(4)).max() < 4 / np.sqrt(130)


def test_variates_past_the_first_patch_in_groups(several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [walk().slice(0, count) for count in (60, 70, 80, 90)]
    encoded = several.encode(contexts, VARIATES, 20)
    whole = several.draw_keys(encoded, {"num_samples": 5}, range(4), KEYS)
    sizes, advance = [], toto.Trajectories.advance

    def noted(self: Any, latest: Any, *words: Any) -> Any:
        sizes.append(len(latest))
        return advance(self, latest, *words)

    monkeypatch.setattr(toto.Trajectories, "advance", noted)
    monkeypatch.setattr(several, "_windows_together", 8)  # two windows of four variates
    grouped = several.draw_keys(encoded, {"num_samples": 5}, range(4), KEYS)
    np.testing.assert_allclose(grouped, whole, rtol=1e-4)
    assert sizes == [2, 2]


def test_the_price_of_a_key_is_forecast_as_a_close_would_be(several: Any) -> None:
    bars = walk()
    for key in KEYS:
        ours = several.encode([bars], PRICE, 20, key)
        theirs = several.encode([replace(bars, close=getattr(bars, key))], PRICE, 20)
        for name in ("probs", "df", "loc", "scale", "affine_loc", "affine_scale"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        mine, other = several.draw(ours, PRICE, [7]), several.draw(theirs, PRICE, [7])
        assert np.array_equal(mine, other) is (key == CLOSE)  # every key has a stream of its own


@pytest.mark.parametrize("key", KEYS)
def test_ratios_are_to_the_close_before(several: Any, key: str) -> None:
    bars, length = walk(), 40
    ratios = RATIO_SCALE * (getattr(bars, key)[1:] / bars.close[:-1] - 1)
    plain = replace(bars.slice(1, len(bars)), close=ratios)
    asked = {**RATIO, "context_length": length}
    (theirs,) = several.exact_keys(several.encode([plain], {"context_length": length}, 1), {}, [0], (CLOSE,))
    (ours,) = several.exact_keys(several.encode([bars], asked, 1, key), {}, [0], (key,))
    last = bars.close[-1]
    np.testing.assert_allclose(ours.loc, last * (1 + theirs.loc / RATIO_SCALE), rtol=1e-12)
    np.testing.assert_allclose(ours.scale, last * theirs.scale / RATIO_SCALE, rtol=1e-12)
    np.testing.assert_array_equal(ours.probs, theirs.probs)


def test_what_toto_cannot_read(several: Any) -> None:
    with pytest.raises(ForecastError, match="of ratios just 1"):
        several.encode([walk()], RATIO, 2)
    with pytest.raises(ForecastError, match="no high is left"):
        several.encode([walk(1)], RATIO, 1, "high")
    with pytest.raises(ForecastError, match="key_input logs"):
        several.encode([walk()], {**PRICE, "key_input": "logs"}, 1)
    broken = walk()
    broken.low[-2] = np.nan
    with pytest.raises(ForecastError, match="or low of 2024-03-30"):
        several.encode([broken], VARIATES, 1)


# --- Kronos and naive -----------------------------------------------------------------------------------------


def test_columns_of_kronos_are_the_references_and_of_one_path(kronos_a: Golden) -> None:
    forecaster = kronos_a.forecaster
    for horizon in (1, 7):
        drawn = forecaster.draw_keys(kronos_a.encode(horizon), GREEDY, [0], KEYS)[:, 0, 0]  # [K, H]
        places = [COLUMNS.index(key) for key in KEYS]
        expected = kronos_a.expected[f"greedy_{horizon}"][:, places].T
        assert (np.abs(drawn - expected) / kronos_a.std[places, None]).max() < TOLERANCE
    encoded, asked = kronos_a.encode(3), {**NARROW, "sample_count": 30}
    high, low = forecaster.draw_keys(encoded, asked, [5], ("high", "low"))
    np.testing.assert_array_equal(forecaster.draw_keys(encoded, asked, [5], ("low",))[0], low)
    np.testing.assert_array_equal(forecaster.draw_columns(encoded, asked, [5])[..., COLUMNS.index("high")], high)


def test_the_exact_keys_of_kronos(kronos_a: Golden) -> None:
    forecaster, encoded = kronos_a.forecaster, kronos_a.encode(1)
    points, mass, _ = forecaster.exact_columns(encoded, NARROW, [0])
    answers = forecaster.exact_keys(encoded, NARROW, [0], KEYS)
    for key, answer in zip(KEYS, answers, strict=True):
        np.testing.assert_array_equal(answer.points, points[:, [COLUMNS.index(key)]])
        np.testing.assert_array_equal(answer.mass, mass)
    close = forecaster.exact(encoded, NARROW, [0])
    np.testing.assert_array_equal(close.points, answers[KEYS.index(CLOSE)].points)


def test_naive_answers_a_key_from_its_own_prices() -> None:
    forecaster, bars = naive.load(), walk()
    asked = {"season": 5, "context_length": 30, "num_samples": 20}
    encoded = forecaster.encode([bars], asked, 2, "high")
    highs = forecaster.encode([replace(bars, close=bars.high)], asked, 2)
    np.testing.assert_array_equal(encoded.residuals, highs.residuals)
    drawn = forecaster.draw_keys(encoded, asked, [3], ("high",))[0]
    assert not np.array_equal(drawn, forecaster.draw(highs, asked, [3]))


def test_every_key_of_a_window_has_a_seed_of_its_own() -> None:
    seeds = [seed_of_key(seed, key) for key in KEYS for seed in (0, 2**64 - 1)]
    assert len(set(seeds)) == len(seeds)
    assert seed_of_key(5, CLOSE) == 5


# --- measuring ------------------------------------------------------------------------------------------------


def test_no_change_of_each_key_by_hand() -> None:
    bars = walk()
    for key, expected in (("close", 0), ("open", 0), ("high", None), ("low", None)):
        found = windows(key=key)
        for index, origin in enumerate(found.origins):
            ratios = [getattr(bars, key)[t] / bars.close[t - 1] - 1 for t in range(origin - 60, origin)]
            move = np.median(ratios) if expected is None else expected
            assert found.no_change[index] == pytest.approx(bars.close[origin - 1] * (1 + move), rel=1e-14)
    first = Windows(symbol="A", bars=bars, origins=(1, 2), horizon=1, key="high")
    one = bars.close[1] * bars.high[1] / bars.close[0]
    assert first.no_change.tolist() == pytest.approx([bars.close[0], one])  # no ratio is known, then one
    assert windows().no_change is not windows().of_key("high").no_change


def test_the_error_of_a_key_is_relative_to_the_last_close() -> None:
    found = windows(2, horizon=2, key="high")
    bars, points = found.bars, np.full((2, 2), 100.0)
    by_hand = [np.abs(points[0] - bars.high[i : i + 2]).mean() / bars.close[i - 1] for i in found.origins]
    np.testing.assert_allclose(relative_errors(found, points), by_hand, rtol=1e-14)
    assert found.of_key("high") is found
    assert found.of_key("low").seeds(3) == found.seeds(3)


@pytest.mark.parametrize(("params", "encodings"), [(PRICE, 4), (VARIATES, 1), (RATIO, 4)])
def test_keys_together_are_those_measured_alone(several: Any, params: dict[str, Any], encodings: int) -> None:
    together(several, params, encodings)


def test_all_keys_of_kronos_cost_one_encoding_and_one_draw(kronos_a: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    forecaster: Any = kronos_a.forecaster
    count = 0
    whole = forecaster.draw_columns

    def counted(*words: Any) -> np.ndarray:
        nonlocal count
        count += 1
        return whole(*words)

    together(forecaster, KRONOS, 6)  # a window at a time
    monkeypatch.setattr(forecaster, "draw_columns", counted)
    Evaluator(forecaster, cache_bytes=1 << 26).forecast_keys(windows(), KRONOS)
    assert count == 1


def together(forecaster: Any, params: Mapping[str, Any], encodings: int) -> None:
    """Four keys at once are, to the last bit, what each is alone, from this many runs of the network."""
    found, evaluator = windows(), Evaluator(forecaster, cache_bytes=0)
    (indices,) = evaluator.batches(found)
    before = forecaster.forwards
    points = evaluator.batch_key_points(found, params, indices, KEYS, passes=(0, 1))
    assert forecaster.forwards == before + 2 * encodings  # nothing is kept between passes
    for key in KEYS:
        alone = Evaluator(forecaster, cache_bytes=1 << 26)
        np.testing.assert_array_equal(
            alone.batch_points(found.of_key(key), params, indices, passes=(0, 1)), points[key]
        )
    kept = Evaluator(forecaster, cache_bytes=1 << 26)
    served = kept.forecast_keys(found, params)
    before = forecaster.forwards
    for key in KEYS:
        again = kept.forecast(found.of_key(key), params, kind=SeedKind.SERVED)
        np.testing.assert_array_equal(again, served.scored[key])
    assert forecaster.forwards == before  # the draws of all keys are kept
    ends = np.stack(list(served.scored.values()))
    np.testing.assert_array_equal(served.served["high"], ends.max(0))
    np.testing.assert_array_equal(served.served["low"], ends.min(0))


def test_the_measurement_of_a_key(several: Any) -> None:
    found, evaluator = windows(key="low"), Evaluator(several, cache_bytes=0)
    measured = evaluator.measure(found, PRICE)
    points = evaluator.forecast(found, PRICE)
    np.testing.assert_allclose(measured.errors, relative_errors(found, points), rtol=1e-14)
    assert measured.no_change_mae == pytest.approx(no_change_errors(found).mean())
    assert measured.skill == pytest.approx(1 - measured.mae / measured.no_change_mae)
    assert evaluator.measure(found.of_key("close"), PRICE).mae != measured.mae


def test_exact_keys_are_measured(several: Any) -> None:
    evaluator = Evaluator(several, cache_bytes=0, exact=True)
    served = evaluator.forecast_keys(windows(), {**VARIATES, "aggregate": "median"}, ("low", "close"))
    encoded = several.encode(windows().contexts(range(6)), VARIATES, 1)
    (mixture,) = several.exact_keys(encoded, {}, [0] * 6, ("low",))
    assert isinstance(mixture, StudentMixture)
    spread = np.abs(served.scored["low"] - (mixture.probs * mixture.loc).sum(-1))
    assert (spread < mixture.scale.max(-1)).all()


def test_what_no_bar_can_have_is_repaired_and_counted() -> None:
    scored = {
        "open": np.array([[10.0, 10.0], [10.0, 10.0]]),
        "high": np.array([[12.0, 9.0], [12.0, 12.0]]),
        "low": np.array([[8.0, 8.0], [8.0, 8.0]]),
        "close": np.array([[11.0, 7.0], [11.0, 11.0]]),
    }
    found = key_forecasts(scored)
    assert found.served["high"].tolist() == [[12, 10], [12, 12]]
    assert found.served["low"].tolist() == [[8, 7], [8, 8]]
    assert found.scored["high"].tolist() == [[12, 9], [12, 12]]
    assert [found.repairs_of(key) for key in KEYS] == [0, 1, 1, 0]
    assert set(key_forecasts({"close": scored["close"], "open": scored["open"]}).served) == {"close", "open"}


def test_a_forecast_of_now_is_replayed_bit_for_bit(several: Any) -> None:
    bars = walk()
    served = Evaluator(several, cache_bytes=0).forecast_keys(now(bars, symbol="A", min_context=60), VARIATES)
    longer = replace(windows(1), bars=walk(), origins=(89,))
    earlier = now(bars.slice(0, 89), symbol="A", min_context=60)
    live = Evaluator(several, cache_bytes=0).forecast_keys(earlier, VARIATES)
    again = Evaluator(several, cache_bytes=0).forecast_keys(longer, VARIATES)
    for key in KEYS:
        np.testing.assert_array_equal(live.scored[key], again.scored[key])
        assert not np.array_equal(live.scored[key], served.scored[key])


def test_a_model_of_the_close_alone_says_so() -> None:
    evaluator = Evaluator(Plain(), cache_bytes=0)
    assert evaluator.forecast_keys(windows(), {}, (CLOSE,)).scored[CLOSE].shape == (6, 1)
    with pytest.raises(ForecastError, match=r"^A: toto answers the close alone, not the high$"):
        evaluator.forecast(windows(key="high"), {})


# --- studies --------------------------------------------------------------------------------------------------


def test_columns_that_were_filled_refuse_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "A.csv"
    path.write_text("date,open,close\n2024-01-01,1,2\n2024-01-02,2,3\n")
    bars, _ = read_bars(path)
    require_keys(bars, ["open", "close"], path)
    with pytest.raises(DataError, match=r"A\.csv: has no high of its own .* ask for the close alone$"):
        require_keys(bars, KEYS, path)


def test_a_study_of_another_key_is_searched_and_promoted_apart(place: Place) -> None:
    opened = place.open(key="high").study
    assert (opened.key, opened.definition["metric"]) == ("high", "pct_return_mae_high")
    confirmed = place.finish(opened, key="high")
    run = place.run(opened, key="high")
    validation = run.split.validation
    assert (validation.key, run.split.test.key, run.confirmation.key) == ("high",) * 3
    trial = place.trials(opened)[0]
    params = run.space.complete(trial.params)
    assert trial.value == place.evaluator().measure(validation, params).mae
    assert confirmed["no_change"]["test"]["mae"] == pytest.approx(no_change_errors(run.split.test).mean())
    with pytest.raises(StudyMismatch, match=r"searches another key than \[search\] key.* set it back"):
        place.open()
    # Promoted only where this key is asked for, and never over a file of another.
    missing = place.invoke(cli.promote)
    assert missing.exit_code == 1
    assert "no study" in missing.output
    place.settings.write_text(place.SETTINGS.replace("[search]\n", '[search]\nkey = "high"\n'))
    assert place.invoke(cli.promote).exit_code == 0
    promoted = json.loads(place.promoted_file("SP500").read_text())
    assert (promoted["metadata"]["key"], promoted["metadata"]["selection_metric"]) == (
        "high",
        "confirmation.pct_return_mae_high",
    )
    place.put("best", {"num_samples": 48, "aggregate": "mean", "context_length": 256})
    (row,) = json.loads(place.invoke(cli.promote, "--json").stdout)
    assert row["decision"] == "failed"
    assert "best/SP500.json: is of the close and [search] key is high; give each key a" in row["reason"]


def test_a_study_of_the_close_is_defined_as_before_and_has_what_is_in_use_for_it(place: Place) -> None:
    place.put("best", {"num_samples": 48, "aggregate": "mean", "context_length": 256})
    config, series = place.config(), place.series()
    definition = studying.define(config, series, "toto", "2018-12-31", "c")
    assert definition["metric"] == "pct_return_mae"
    assert definition["space"]["fixed"] == {"context_length": 256}
    space = spaces.make("toto", config)
    assert list(configurations_in_use(config, "SP500", "toto", space)[0]) == ["incumbent"]
    low = place.config(key="low")
    assert configurations_in_use(low, "SP500", "toto", space)[0] == {}


def test_a_file_without_the_column_is_refused_before_anything_is_made(place: Place) -> None:
    lines = [
        ",".join(line.split(",")[:1] + line.split(",")[4:5])
        for line in place.data.joinpath("SP500.csv").read_text().split()
    ]
    place.write("SP500.csv", lines)
    place.settings.write_text(place.SETTINGS.replace("[search]\n", '[search]\nkey = "high"\n'))
    ended = place.invoke(cli.launch_workers, "--cpus", "1")
    assert ended.exit_code == 1
    assert "SP500.csv: has no high of its own" in ended.output
    assert studying.list_studies(place.storage) == []


# --- studies compare ------------------------------------------------------------------------------------------


def test_compare_measures_every_key_as_alone(place: Place) -> None:
    asked = ("compare", "--horizon", "1", "--models", "naive", "--params", "default", "--cpus", "1")
    found = json.loads(place.invoke(cli.studies, *asked, "--keys", "close,high,low", "--json").stdout)["rows"]
    bars, config, forecaster = place.series().bars, configuration.load(place.settings), forecasters.load("naive")
    params = spaces.default(spaces.make("naive", config), config)
    points, rows = {}, {(row["key"], row["label"]): row for row in found}
    for key in ("close", "high", "low"):
        alone = split_windows(replace(config, search=replace(config.search, key=key)), "SP500", bars).validation
        evaluator, row = Evaluator(forecaster, cache_bytes=0), rows[key, "naive default"]
        measured = evaluator.measure(alone, params)
        points[key] = evaluator.forecast(alone, params)
        assert (row["mae"], row["skill"], row["windows"]) == (measured.mae, measured.skill, 30)
        assert rows[key, "no change"]["mae"] == pytest.approx(measured.no_change_mae, rel=1e-12)
        assert (row["seconds"] is not None) is (key == "close")  # all of the work is there
    repaired = key_forecasts(points)
    assert {key: rows[key, "naive default"]["repaired"] for key in points} == {
        key: repaired.repairs_of(key) for key in points
    }
    assert repaired.repairs_of("high") + repaired.repairs_of("low") > 0
    printed = place.invoke(cli.studies, *asked, "--keys", "high,low").stdout
    assert [word in printed for word in ("key", "repaired", " high ", " low ")] == [True] * 4
    assert "block persistence" not in printed  # of closes
    # One key is compared as ever; which one, the settings say.
    place.settings.write_text(place.SETTINGS.replace("[search]\n", '[search]\nkey = "low"\n'))
    low = json.loads(place.invoke(cli.studies, *asked, "--json").stdout)["rows"]
    assert {row["key"] for row in low} == {"low"}
    assert (low[0]["mae"], low[0]["repaired"]) == (rows["low", "naive default"]["mae"], None)
    place.settings.write_text(place.SETTINGS)
    (place.data / "SP500.csv").write_text("date,close\n" + "".join(f"{t},{c}\n" for t, c in dated(bars)))
    ended = place.invoke(cli.studies, *asked, "--keys", "close,high")
    assert ended.exit_code == 1
    assert "SP500.csv: has no high of its own (it is the close at every bar, as where" in ended.output


def dated(bars: Bars) -> list[tuple[str, float]]:
    return [(str(time)[:10], close) for time, close in zip(bars.timestamps, bars.close, strict=True)]


def test_an_unknown_key_is_a_usage_error(place: Place) -> None:
    ended = place.invoke(cli.studies, "compare", "--keys", "open,volume")
    assert ended.exit_code == 2
    assert "unknown key 'volume'; the keys are open, high, low, close" in ended.output


# --- what Toto reads ------------------------------------------------------------------------------------------


def settings(folder: Path, text: str) -> configuration.Config:
    (folder / "c.toml").write_text(text)
    return configuration.load(folder / "c.toml")


def test_key_input_is_fixed_or_searched_and_by_default_not_said(tmp_path: Path) -> None:
    usual = spaces.make("toto", settings(tmp_path, ""))
    assert "key_input" not in {**usual.knobs, **usual.fixed}
    fixed_config = settings(tmp_path, '[toto]\nkey_input = "variates"\n')
    fixed = spaces.make("toto", fixed_config)
    assert fixed.fixed["key_input"] == spaces.default(fixed, fixed_config)["key_input"] == "variates"
    searched_config = settings(tmp_path, '[toto]\nkey_input = ["ratio", "price"]\n')
    searched = spaces.make("toto", searched_config)
    assert searched.knobs["key_input"] == ("ratio", "price")
    assert searched.contains(spaces.default(searched, searched_config))
    # A file that does not say means prices, whatever is searched now; one that says is taken at its word.
    silent = {"num_samples": 64, "aggregate": "mean"}
    for space, found in ((usual, None), (fixed, None), (searched, "price")):
        assert spaces.from_promoted(silent, {}, space).get("key_input") == found
        said = spaces.from_promoted(silent, {"fixed": {"context_length": 9, "key_input": "ratio"}}, space)
        assert said["key_input"] == "ratio"
    promoted = spaces.to_promoted({**silent, "context_length": 4096, "key_input": "ratio"}, searched, searched_config)
    assert promoted["key_input"] == "ratio"
    assert "key_input" not in spaces.to_promoted({**silent, "context_length": 4096}, usual, settings(tmp_path, ""))
    with pytest.raises(ValueError, match="key_input 'logs' is none of price, ratio, variates"):
        spaces.from_promoted({**silent, "key_input": "logs"}, {}, usual)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[toto]\nkey_input = "logs"\n', "key_input = ['logs']: must be different ones of price, ratio, variates"),
        ("[toto]\nkey_input = []\n", "key_input = []: must be different ones of price, ratio, variates"),
        ('[search]\nkey = "volume"\n', "[search] key = 'volume': must be one of open, high, low, close"),
        ('[toto]\nkey_input = "ratio"\n[windows]\nhorizon = 2\n', "horizon 2 must be 1 for [toto] key_input ratio"),
    ],
)
def test_bad_settings_of_keys(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        spaces.make("toto", settings(tmp_path, text))
    assert expected in str(raised.value)
    assert isinstance(raised.value, ExpectedError)
