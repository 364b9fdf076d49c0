"""One parameter or two varied: the numbers, what is drawn for them, the p-value over all, and the command."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from places import StudyPlace, tiny_toto

from forecasters import Bars
from launch import cli
from launch.views import sweep_figures
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins
from studies import config as configuration
from studies import sweeping

BASE = {"aggregate": "median", "num_samples": 64, "context_length": 256}


class Place(StudyPlace):
    """One symbol, Toto and Kronos."""

    def sweep(self, *words: str, code: int = 0) -> Result:
        ended = self.invoke(cli.studies, "sweep", *words)
        assert ended.exit_code == code, ended.output
        return ended


class Counting(Evaluator):
    """Notes what is drawn, by the number of samples."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tiny_toto(), cache_bytes=1 << 28, **options)
        self.drawn: list[int] = []
        model, drawn = self._keyed, self.drawn

        class Noting:
            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

            def draw_keys(
                self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
            ) -> np.ndarray:
                drawn.append(params["num_samples"])
                return model.draw_keys(encoded, params, seeds, keys)

        self._keyed = Noting()


def windows(count: int = 30, seed: int = 3) -> Windows:
    closes = 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.01, count + 300)))
    times = np.datetime64("2020-01-01", "ns") + np.arange(len(closes)) * np.timedelta64(1, "D")
    bars = Bars(timestamps=times, open=closes, high=closes, low=closes, close=closes, volume=None)
    return recent_origins(bars, count, symbol="X")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [(0,), (1, 2, 3)])
def test_every_number_is_that_of_measuring_the_configuration_alone(passes: Sequence[int]) -> None:
    axes = {
        "aggregate": ["mean", "quantile_0.30"],
        "num_samples": [32, 64, 100],
    }
    found = sweeping.sweep(Counting(max_num_samples=100), windows(), BASE, axes, passes=passes)
    assert [tuple(one.values.values()) for one in found.cells] == [
        (a, n) for a in axes["aggregate"] for n in (32, 64, 100)
    ]
    for params, measured in [(BASE, found.current), *((one.params, one.measurement) for one in found.cells)]:
        alone = Evaluator(tiny_toto(), cache_bytes=0).measure(windows(), params, passes=passes)
        assert (measured.mae, measured.errors, measured.sampling_error) == (
            alone.mae,
            alone.errors,
            alone.sampling_error,
        )


def test_sample_counts_and_aggregates_are_of_one_draw_and_take_no_time() -> None:
    """The goal: 24 aggregates x 10 numbers of samples on 30 windows in 2 s once the model is loaded."""
    settings = configuration.load().models["toto"]
    axes = {"aggregate": settings.aggregates, "num_samples": settings.num_samples}
    assert (len(axes["aggregate"]), len(axes["num_samples"])) == (24, 10)
    evaluator = Counting(max_num_samples=sweeping.most_samples("toto", BASE, axes))
    sweeping.sweep(Counting(max_num_samples=64), windows(), BASE, {"num_samples": [32]}, passes=(0,))  # imports
    began = time.process_time()
    found = sweeping.sweep(evaluator, windows(), BASE, axes, passes=(0,))
    assert time.process_time() - began < 2
    assert len(found.cells) == 240
    assert evaluator.drawn == [4096] * 3  # a batch of windows each


def test_the_current_values_are_known_among_those_swept_and_gain_nothing() -> None:
    found = sweeping.sweep(Counting(), windows(), BASE, {"num_samples": [32, 64]}, passes=(0,))
    assert [one.current for one in found.cells] == [False, True]
    improvement = found.cells[1].improvement
    assert improvement is not None
    assert (improvement.value, improvement.verdict) == (0.0, "tie")


# ---- the p-value -----------------------------------------------------------------------------------------------------


def errors(random: np.random.Generator, others: int) -> tuple[np.ndarray, np.ndarray]:
    """Of 60 windows, absolute, with much in common and what each adds by chance; none is better."""
    common = np.abs(random.standard_t(4, 60))
    return common, common + 0.2 * random.standard_normal((others, 60))


def test_the_p_value_allows_for_the_number_of_values() -> None:
    random, found, smallest = np.random.default_rng(0), [], []
    for number in range(80):
        old, new = errors(random, 20)
        found.append(sweeping.superior_p(windows(60), old, new) or 1.0)
        if number < 20:
            smallest.append(min(sweeping.superior_p(windows(60), old, one[None]) or 1.0 for one in new))
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.12  # 5 %, and its chance on 80
    assert 0.4 < np.mean(found) < 0.6
    assert np.mean(np.array(smallest) < 0.05) > 0.4  # the smallest p-value of twenty


def test_the_p_value_is_small_where_one_is_better_though_many_are_far_worse() -> None:
    old, new = errors(np.random.default_rng(1), 300)
    worse = new + 2.0
    better = new[0] - 0.05  # three standard errors; p would be 0.2 if those that are far worse counted
    assert (sweeping.superior_p(windows(60), old, np.vstack([worse, better])) or 1.0) < 0.05
    assert sweeping.superior_p(windows(60), old, worse) == 1.0
    assert sweeping.superior_p(windows(60), old, old[None]) is None
    assert sweeping.superior_p(windows(15), old[:15], new[:3, :15]) is None


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_sweep_from_a_trial_has_the_numbers_of_its_study(place: Place) -> None:
    study = place.open().study
    place.finish(study)
    trial = place.trials(study)[0]
    name, value = "num_samples", trial.params["num_samples"]
    ended = place.sweep("SP500", "toto", f"{name}=64,128", "--from", f"{study.name}#0", "--json")
    shown = json.loads(ended.stdout)
    assert shown["from"] == f"{study.name}#0"
    assert shown["current"]["mae"] == trial.value
    (cell,) = [one for one in shown["cells"] if one["current"]]
    assert (cell["values"], cell["mae"], cell["price_mae"]) == (
        {name: value}, trial.value, trial.user_attrs["price_mae"]
    )  # fmt: skip
    assert shown["windows"]["count"] == 30


def test_what_is_shown_fits_eighty_columns_and_says_which_is_lowest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "quantile_0.90"})
    ended = place.sweep("SP500", "toto", "aggregate=mean,median,quantile_0.90", "num_samples=64,128")
    lines = ended.stdout.splitlines()
    assert lines[0].split()[:3] == ["aggregate", "num_samples", "MAE"]
    assert len(lines) == 1 + 6
    assert "current" in next(line for line in lines if line.startswith("quantile_0.90  64"))
    assert "better" in lines[1]
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("lowest of 6 configurations: aggregate=")
    assert "over aggregate=quantile_0.90 num_samples=64 of toto best; p-value over all of them: 0.0" in last


@pytest.mark.parametrize("axes", [["num_samples=32,64,128"], ["num_samples=32,64", "aggregate=mean,median,p10"]])
def test_figures_are_written_as_png_and_as_a_page(place: Place, axes: Sequence[str]) -> None:
    for name, begins in (("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
        path = place.folder / name
        place.sweep("SP500", "toto", *axes, "--from", "default", "--plot", str(path))
        assert path.read_bytes().startswith(begins)
    assert b'"type":"heatmap"' in path.read_bytes() or len(axes) == 1


def test_a_chart_has_the_gains_at_the_places_of_the_values() -> None:
    axes = {"aggregate": ["mean", "median"], "num_samples": [32, 64, 128]}
    found = sweeping.sweep(Counting(), windows(), BASE, axes, passes=(0,))
    chart = sweep_figures.chart_of(found, symbol="X", model="toto")
    assert chart.improvement.shape == (2, 3)
    assert chart.current == [(1, 1)]
    cell = found.cells[5]
    assert (cell.values, chart.labels) == (
        {"aggregate": "median", "num_samples": 128}, [["mean", "median"], ["32", "64", "128"]]
    )  # fmt: skip
    assert cell.improvement is not None
    assert chart.improvement[1, 2] == 100 * cell.improvement.value


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["toto", "temperature=1"], 2, "toto has no parameter 'temperature'; it has aggregate, num_samples"),
        (["toto", "num_samples=64,few"], 2, "num_samples 'few' is not a whole number above 0"),
        (["kronos", "clip=0"], 2, "clip 0.0 is not a number above 0"),
        (["toto", "aggregate=best"], 2, "unknown aggregate 'best'"),
        (["toto", "num_samples="], 2, "has no values; write num_samples=V1,V2"),
        (["toto", "num_samples=1", "num_samples=2"], 2, "num_samples is given twice"),
        (["kronos", "clip=3", "top_k=0", "temperature=1"], 2, "one parameter to vary, or two"),
        (["toto", "num_samples=64", "--plot", "a.pdf"], 1, "a.pdf: name a file that ends in .png or .html"),
        (["toto", "num_samples=64"], 1, "'best' names no configuration of toto in"),
        (["toto", "num_samples=64", "--from", "default", "--windows", "400"], 1, "has 252 windows of 1"),
        (["toto", "num_samples=64", "--from", "nowhere.json"], 1, "nowhere.json: no such file"),
        (["toto", "num_samples=64", "--from", "default", "--plot", "no/folder.png"], 1, "no/folder.png: there is no"),
        (["kronos", "top_p=0.7,0.8", "--from", "K16"], 1, "top_p has no effect while top_k is 16; add top_k=0"),
        (["kronos", "top_p=0.7,1.8", "--from", "K0"], 1, "top_p"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], code: int, expected: str
) -> None:
    monkeypatch.chdir(place.folder)
    config = {"temperature": 0.2, "top_p": 0.8, "top_k": 16, "sample_count": 16, "max_context": 64, "clip": 3.0}
    for name in ("K16", "K0"):
        path = place.put_promoted(name, {**config, "top_k": int(name[1:])}, model="kronos")
        words = [str(path) if word == name else word for word in words]
    ended = place.sweep("SP500", *words, code=code)
    assert expected in ended.stderr.splitlines()[-1]
    assert not Path("no").exists()
