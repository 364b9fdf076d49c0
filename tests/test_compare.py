"""`studies compare`: its numbers are those of studies, its baselines formulas, and bad input is said in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from places import INCUMBENT, tiny_toto
from places import StudyPlace as Place

import forecasters
from forecasters import Bars
from launch import cli
from launch.views import comparison
from launch.views.comparison import ComparisonRow
from launch.views.tables import terminal
from objectives.evaluation import Evaluator
from objectives.windows import SeedKind, Windows, now
from studies import comparing, promotion
from studies.study import Study

GOLDENS = Path(__file__).parent / "goldens"
HORIZON = 64  # of the golden test


def compare(place: Place, *words: str) -> Result:
    return place.invoke(cli.studies, "compare", "--cpus", "1", *words)


def rows(place: Place, *words: str) -> dict[str, dict[str, Any]]:
    """By label, of one symbol."""
    ended = compare(place, "--json", *words)
    assert ended.exit_code == 0, ended.output
    return {row["label"]: row for row in json.loads(ended.stdout)["rows"]}


def shown(place: Place, study: Study) -> Any:
    ended = place.invoke(cli.studies, "show", study.name, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout)


# --- its numbers are those of studies -------------------------------------------------------------------------


def test_on_a_studys_windows_numbers_are_those_of_studies_show(place: Place, study: Study) -> None:
    details = shown(place, study)
    (best, *_), in_use = details["best"], details["baselines"]["incumbent"]
    trial = f"{study.name}#{best['trial']}"
    searched = rows(place, "--horizon", "1", "--params", f"{trial},best")
    assert searched[trial]["mae"] == best["mae"]
    assert {name: searched["toto best"][name] for name in ("mae", "price_mae", "mae_percent", "skill")} == {
        name: in_use["validation"][name] for name in ("mae", "price_mae", "mae_percent", "skill")
    }
    assert searched["no change"]["mae"] == details["definition"]["no_change_mae"]

    found = details["confirmation"]
    count, passes = found["windows"]["confirmation"]["count"], found["passes"]
    assert passes > 1
    more = ("--horizon", "1", "--windows", str(count), "--passes", str(passes), "--params", f"{trial},best")
    confirmed = rows(place, *more)
    candidate = next(one for one in found["candidates"] if one["trial"] == best["trial"])
    assert confirmed[trial]["mae"] == candidate["confirmation"]["mae"]
    assert confirmed["toto best"]["mae"] == found["baselines"]["incumbent"]["confirmation"]["mae"]
    assert confirmed[trial]["first"] == found["windows"]["confirmation"]["first"]


def test_measured_windows_are_the_evaluators_at_any_horizon_and_stride(place: Place) -> None:
    bars = place.series().bars
    windows = Windows(symbol="SP500", bars=bars, origins=tuple(range(300, 380, 4)), horizon=7)
    params = {"context_length": 256, "num_samples": 64, "aggregate": "median"}
    found = comparing.measure(place.evaluator(), windows, params, passes=(1, 2))
    expected = place.evaluator().measure(windows, params, passes=(1, 2))
    assert found.measurement.errors == expected.errors
    assert (found.measurement.mae, found.measurement.sampling_error) == (expected.mae, expected.sampling_error)
    np.testing.assert_allclose(found.by_step.mean(), expected.mae, rtol=1e-12)
    np.testing.assert_array_equal(found.points, place.evaluator().forecast(windows, params, pass_number=1))


def test_with_the_seeds_of_serving_its_numbers_are_those_of_forecasts_made_one_by_one(place: Place) -> None:
    """As if the next bar had not come, alone, with nothing kept: what a trading system was told."""
    place.put("best", INCUMBENT)
    found = rows(place, "--horizon", "1", "--windows", "30", "--params", "best", "--seeds", "served")["toto best"]
    windows = comparing.windows_before_test(place.config(), "SP500", place.series().bars, count=30, stride=1)
    alone = Evaluator(tiny_toto(), cache_bytes=0)
    points = np.concatenate(
        [
            alone.forecast(now(windows.bars.slice(0, origin), symbol="SP500"), found["params"], kind=SeedKind.SERVED)
            for origin in windows.origins
        ]
    )
    errors = np.abs(points - windows.actuals).mean(axis=1) / windows.last_closes
    assert found["mae"] == errors.mean()
    assert found["mae"] != rows(place, "--horizon", "1", "--params", "best")["toto best"]["mae"]
    assert place.invoke(cli.studies, "compare", "--seeds", "served", "--passes", "2").exit_code == 2


@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_sixty_four_steps_begin_with_the_references_forecast(model: str) -> None:
    """The references' longest stored forecasts, 40 steps of Toto and 16 of Kronos, from the same 96 bars."""
    folder = GOLDENS / f"{model}-a"
    table, expected = pd.read_csv(folder / "ohlcv.csv"), np.load(folder / "expected.npz")
    known = 96
    table = pd.concat([table.iloc[:known], table.iloc[[known - 1] * HORIZON]])  # what comes later is not seen
    first = np.datetime64(table["timestamp" if "timestamp" in table else table.columns[0]].iloc[0], "ns")
    step = np.diff(pd.to_datetime(table.iloc[:2, 0]).to_numpy().astype("datetime64[ns]"))[0]
    prices = {name: table[name].to_numpy(float) for name in ("open", "high", "low", "close", "volume")}
    bars = Bars(timestamps=first + step * np.arange(len(table)), **prices)
    windows = Windows(symbol="A", bars=bars, origins=(known,), horizon=HORIZON)
    if model == "toto":
        forecaster = forecasters.load("toto", checkpoint=str(folder))
        params = {"context_length": 512, "num_samples": 2048, "aggregate": "median"}
        golden = expected["n96_samples_h40_median"][0]
    else:
        options = {"checkpoint": str(folder / "model"), "tokenizer": str(folder / "tokenizer"), "network_context": 512}
        forecaster = forecasters.load("kronos", **options)
        params = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "sample_count": 1, "max_context": 128, "clip": 2.0}
        golden = expected["greedy_16"][:, 3]
    evaluator = Evaluator(forecaster, cache_bytes=1 << 28)
    found = comparing.measure(evaluator, windows, params).points[0]
    assert found.shape == (HORIZON,)
    deviation = bars.close[:known].std()
    if model == "kronos":
        assert np.abs(found[: len(golden)] - golden).max() < 1e-4 * deviation
        return
    spread = evaluator.samples(windows, params)[0].std(axis=0)[: len(golden)]
    # Two medians of 2,048 samples each, of 40 steps: five standard errors.
    assert (np.abs(found[: len(golden)] - golden) / (1.2533 * spread * math.sqrt(2 / 2048))).max() < 5


# --- one against another --------------------------------------------------------------------------------------


def walk(count: int, horizon: int, stride: int) -> Windows:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, 1700)))
    times = np.datetime64("2020-01-01", "ns") + np.arange(1700) * np.timedelta64(1, "D")
    bars = Bars(timestamps=times, open=close, high=close, low=close, close=close, volume=None)
    origins = tuple(range(300, 300 + count * stride, stride))
    return Windows(symbol="A", bars=bars, origins=origins, horizon=horizon)


def test_an_interval_needs_twenty_windows_that_share_no_bar() -> None:
    few, enough = walk(30, 64, 16), walk(80, 64, 16)
    assert (comparing.effective_windows(few), comparing.effective_windows(enough)) == (8.25, 20.75)
    errors = np.abs(np.random.default_rng(1).normal(1, 0.2, 80))
    unknown = comparing.paired_improvement(few, errors[:30], 0.8 * errors[:30])
    assert unknown is not None
    assert (unknown.interval, unknown.verdict) == (None, "unknown")
    assert unknown.value == pytest.approx(0.2)
    better, worse, tie = (
        comparing.paired_improvement(enough, errors, errors * np.random.default_rng(2).normal(level, 0.1, 80))
        for level in (0.8, 1.2, 1.0)
    )
    assert better is not None and worse is not None and tie is not None  # noqa: PT018 - for the type checker
    assert (better.verdict, worse.verdict, tie.verdict) == ("better", "worse", "tie")
    assert comparing.paired_improvement(enough, np.zeros(80), errors) is None


def test_blocks_have_at_least_the_windows_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, resample = [], promotion.resampled_gains

    def noting(old: np.ndarray, new: np.ndarray, *, least_block: int) -> np.ndarray | None:
        asked.append(least_block)
        return resample(old, new, least_block=least_block)

    monkeypatch.setattr(promotion, "resampled_gains", noting)
    errors = np.abs(np.random.default_rng(1).normal(1, 0.2, 400))
    for windows in (walk(80, 64, 16), walk(400, 16, 1), walk(80, 4, 8), walk(30, 1, 1)):
        comparing.paired_improvement(windows, errors[: len(windows)], errors[::-1][: len(windows)])
    assert asked == [4, 16, 1, 1]


def test_baselines_are_their_formulas() -> None:
    windows = walk(3, 4, 2)
    close, origin = windows.bars.close, windows.origins[1]
    assert (comparing.no_change(windows)[1] == close[origin - 1]).all()
    slope = np.log(close[origin - 1] / close[origin - 251]) / 250
    np.testing.assert_allclose(comparing.drift(windows)[1], close[origin - 1] * np.exp(slope * np.arange(1, 5)))
    measured = comparing.measure_points(windows, comparing.no_change(windows))
    assert (measured.measurement.skill, measured.measurement.mae) == (0.0, measured.measurement.no_change_mae)

    prices = np.array([1.0, 2, 4, 8, 16, 32, 64])  # blocks of 2: 2 for 4 and 8, 8 for 16 and 32, 32 for 64
    assert comparing.block_persistence(prices, 2) == pytest.approx(100 * np.mean([2, 6, 8, 24, 32]) / prices.mean())
    assert comparing.block_persistence(prices, 7) is None


# --- rows -------------------------------------------------------------------------------------------------------


def test_configurations_come_from_where_the_words_say(place: Place, tmp_path: Path) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    place.put("toto", {"num_samples": 128, "aggregate": "median"})
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"model": "toto_compiled", "config": {"num_samples": 96, "aggregate": "p90"}}))
    found = rows(place, "--horizon", "2", "--windows", "5", "--params", f"best,stored,{own},default")
    assert [
        (label, row["source"], row["params"].get("num_samples")) for label, row in found.items() if row["model"]
    ] == [
        ("toto best", "best", 64),
        ("toto stored", "stored", 128),
        ("toto own.json", str(own), 96),
        ("toto default", "default", 128),
    ]
    assert [row["stride"] for row in found.values()] == [1] * 7
    assert found["toto best"]["reference"]
    assert found["toto stored"]["improvement"] == 1 - found["toto stored"]["mae"] / found["toto best"]["mae"]
    assert found["toto stored"]["verdict"] == "unknown"


def test_the_environment_overrides_every_row_and_its_label_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    words = ("--horizon", "1", "--windows", "5", "--params", "best,default")
    plain = rows(place, *words)
    monkeypatch.setenv("TOTO_NUM_SAMPLES", "48")
    monkeypatch.setenv("TOTO_AGGREGATE", "quantile_0.9")
    monkeypatch.setenv("TOTO_SAMPLES_PER_BATCH", "16")
    ended = compare(place, *words, "--json")
    changed = {row["label"]: row for row in json.loads(ended.stdout)["rows"]}
    label = "toto best aggregate=quantile_0.9 num_samples=48"
    assert changed[label]["params"] == {"aggregate": "quantile_0.9", "num_samples": 48, "context_length": 256}
    assert changed[label]["mae"] != plain["toto best"]["mae"]
    assert "TOTO_SAMPLES_PER_BATCH changes no forecast" in ended.stderr
    monkeypatch.setenv("TOTO_NUM_SAMPLES", "many")
    ended = compare(place, *words)
    assert ended.exit_code == 1
    assert ended.stderr.splitlines() == [
        "error: TOTO_NUM_SAMPLES in the environment: num_samples 'many' is not a whole number above 0; "
        "correct or unset it"
    ]


def test_top_p_beside_top_k_is_warned_of(place: Place) -> None:
    kronos = {"temperature": 0.2, "top_p": 0.8, "top_k": 4, "sample_count": 4, "max_context": 128, "clip": 3.0}
    place.put("kronos", kronos, model="kronos")
    words = ("--horizon", "1", "--windows", "2", "--models", "kronos", "--params", "stored")
    assert "top_p has no effect while top_k is above 0: SP500 kronos stored" in compare(place, *words).stderr


def test_a_clip_that_hides_the_last_close_is_warned_of(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kronos = {"temperature": 0.2, "top_p": 1.0, "top_k": 4, "sample_count": 4, "max_context": 128, "clip": 0.2}
    place.put("kronos", kronos, model="kronos")
    words = ("--horizon", "1", "--windows", "10", "--models", "kronos", "--params", "stored")
    found = rows(place, *words)
    assert found["no change"]["clipped"] is None
    assert 0.05 < found["kronos stored"]["clipped"] <= 1
    share = f"{found['kronos stored']['clipped']:.0%}"
    said = (
        f"share of windows whose last close lies beyond the clip, where no forecast begins: SP500 kronos stored {share}"
    )
    assert said in compare(place, *words).stderr
    monkeypatch.setenv("KRONOS_CLIP", "50")
    assert "beyond the clip" not in compare(place, *words).stderr


def test_bad_input_is_one_line(place: Place, tmp_path: Path) -> None:
    def refused(*words: str, code: int = 1) -> str:
        ended = compare(place, *words)
        assert ended.exit_code == code, ended.output
        assert ended.stdout == ""
        return ended.stderr.splitlines()[-1]

    hyperparams = place.folder / "hyperparams"
    assert "has 2 windows of 64, 64 bars apart, in its first" in refused("--params", "default", "--stride", "64")
    assert "--windows" in refused("--params", "default", "--stride", "64")
    ended = compare(place, "--windows", "5")
    assert ended.exit_code == 1
    assert f"no configuration of SP500 in {hyperparams}" in ended.stderr
    assert "--params default" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: nothing is left to compare"
    assert "nothing: no such file" in refused("--params", "nothing")
    assert "no study 'SP500/toto@2018-01-01'" in refused("--params", "SP500/toto@2018-01-01#3")
    too_far = refused("--models", "kronos", "--horizon", "600", "--params", "default")
    assert "--horizon 600: must be below [kronos] network_context" in too_far
    assert "name a file that ends in .png or .html" in refused("--plot", str(tmp_path / "a.svg"))
    assert "there is no folder" in refused("--plot", str(tmp_path / "a" / "b.png"))


def test_what_cannot_be_measured_leaves_the_others(place: Place) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    place.put(
        "kronos",
        {"temperature": 0.2, "top_p": 1.0, "top_k": 4, "sample_count": 4, "max_context": 1, "clip": 3.0},
        "kronos",
    )
    words = ("--models", "toto,kronos", "--horizon", "1", "--windows", "3", "--params", "best,stored")
    ended = compare(place, *words)
    assert ended.exit_code == 1
    assert "SP500 kronos stored: could not be measured: SP500: max_context 1 or clip 3.0 out of range" in ended.stderr
    assert "toto best" in ended.stdout


def test_figures_are_written(place: Place, tmp_path: Path) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    words = ("--horizon", "3", "--windows", "3", "--params", "best")
    for name, begins in (("a.png", b"\x89PNG"), ("a.html", b"<!")):
        assert compare(place, *words, "--plot", str(tmp_path / name)).exit_code == 0
        assert (tmp_path / name).read_bytes().lower().startswith(begins.lower())
    page = (tmp_path / "a.html").read_text()
    assert page.count('"Error by step"') == page.count('"Forecast vs. actual"') == 1


# --- tables -----------------------------------------------------------------------------------------------------


def row(label: str, **more: Any) -> ComparisonRow:
    common = {"symbol": "BTCUSD", "model": "toto", "source": "best", "params": {}, "windows": 30, "horizon": 64}
    times = {"effective_windows": 8.25, "stride": 16, "first": "2025-01-01", "last": "2026-01-01"}
    return ComparisonRow(**{**common, **times, "label": label, **more})


def test_eighty_columns_keep_error_skill_improvement_and_interval() -> None:
    measured = {"mae": 0.0912345, "price_mae": 1234.5, "mae_percent": 9.1, "skill": -0.0312, "seconds": 123.0}
    gain = {"improvement": 0.031, "improvement_low": 0.012, "improvement_high": 0.051, "verdict": "better"}
    found = comparison.table([
        row("toto best", **measured, by_step=[0.01] * 64, reference=True),
        row("kronos stored temperature=0.15", **measured, by_step=[0.01] * 64, **gain),
        row("block persistence", mae_percent=13.04),
    ])  # fmt: skip
    headings = [str(column.header).replace("\n", " ") for column in terminal(found, 80).columns]
    assert headings == ["symbol", "configuration", "MAE", "MAE%", "skill", "improvement", "95 % interval"]
    blocks = [row("block persistence", mae_percent=13.04), row("block persistence", symbol="A", mae_percent=None)]
    said = "block persistence over whole files (guide's h64 MAE%, not comparable): BTCUSD 13.040, A -"
    assert comparison.blocks_line(blocks) == said
    assert [comparison.gain_text(row("a", improvement=0.01, verdict=verdict)) for verdict in ("tie", "unknown")] == [
        "tie",
        "+1.00 % ?",
    ]


def test_means_are_of_the_symbols_that_have_every_configuration() -> None:
    def one(symbol: str, label: str, mae: float) -> ComparisonRow:
        return row(label, symbol=symbol, mae=mae, mae_percent=1.0, skill=0.0, by_step=[mae], improvement=0.1)

    found = [one("A", "x", 0.01), one("A", "y", 0.02), one("B", "x", 0.03), one("B", "y", 0.04), one("C", "x", 9.0)]
    assert [(each["label"], each["symbols"], each["mae"]) for each in comparison.over_symbols(found)] == [
        ("x", 2, 0.02),
        ("y", 2, 0.03),
    ]
    assert comparison.over_symbols(found[:2]) == []
