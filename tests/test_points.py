"""Point forecasts kept between runs: found they are what is computed, and whatever decides them is asked for."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nights import KRONOS, TOTO, night

from forecasters import Bars, Forecaster
from objectives import points as kept_points
from objectives.evaluation import Evaluator
from objectives.windows import SeedKind, Windows
from storage.encodings import Encodings
from studies import config as configuration
from studies.evaluators import evaluator_of

MORE = {**TOTO, "num_samples": 96, "aggregate": "mean"}


class Run:
    """What one run finds and leaves."""

    def __init__(self, forecaster: Forecaster, folder: Path, **options: Any) -> None:
        self.evaluator = Evaluator(forecaster, cache_bytes=1 << 26, store=Encodings(folder), **options)
        assert self.evaluator.kept_points is not None
        self.points, self.forecaster, self.before = self.evaluator.kept_points, forecaster, forecaster.forwards

    def errors(self, windows: Windows, params: dict[str, Any]) -> tuple[float, ...]:
        return self.evaluator.measure(windows, params, passes=(1, 2)).errors

    def ended(self) -> tuple[int, int, int]:
        """The points that were found, those that were asked for, and how often the network ran."""
        self.points.flush()
        return self.points.found, self.points.asked, self.forecaster.forwards - self.before


def fresh(forecaster: Forecaster, windows: Windows, params: dict[str, Any], **options: Any) -> tuple[float, ...]:
    return Evaluator(forecaster, cache_bytes=0, **options).measure(windows, params, passes=(1, 2)).errors


@pytest.mark.parametrize(
    ("model", "params", "options"),
    [
        ("toto", TOTO, {}),
        ("toto", TOTO, {"exact": True}),
        ("toto", {**TOTO, "key_input": "variates"}, {}),
        ("toto", {**TOTO, "context_length": 4096}, {}),
        ("kronos", {**KRONOS, "temperature": 0.9, "top_k": 0, "sample_count": 40}, {}),
        ("kronos", KRONOS, {"exact": True}),
    ],
)
@pytest.mark.parametrize("key", ["close", "high"])
def test_a_second_run_draws_nothing_and_has_the_same_bits(
    bars: Bars,
    loaded: dict[str, Any],
    tmp_path: Path,
    model: str,
    params: dict[str, Any],
    options: Any,
    key: str,
) -> None:
    forecaster = loaded[model]
    for number in (0, 1):
        windows = night(bars, number, key)
        expected = fresh(forecaster, windows, params, **options)
        first = Run(forecaster, tmp_path, **options)
        assert first.errors(windows, params) == expected
        found, _, forwards = first.ended()
        if number and model == "kronos":
            assert (found, forwards) == (38, 1), "of twenty windows one is new"
        again = Run(forecaster, tmp_path, **options)
        assert again.errors(windows, params) == expected
        assert again.ended() == (40, 40, 0)
        assert again.evaluator.seconds["draw"] == 0


def test_what_decides_points_is_asked_for(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    toto = loaded["toto"]

    def found(params: dict[str, Any], windows: Windows | None = None, **options: Any) -> int:
        run = Run(toto, tmp_path, **options)
        run.errors(windows or night(bars, 0), params)
        return run.ended()[0]

    assert found(TOTO) == 0
    assert found(TOTO) == 40
    assert found({**TOTO, "aggregate": "mean"}) == 0
    assert found({**TOTO, "num_samples": TOTO["num_samples"] // 2}) == 0
    assert found({**TOTO, "context_length": 129}) == 0
    assert found(TOTO, night(bars, 0, "open")) == 0
    assert found(TOTO, exact=True) == 0
    assert found(TOTO, max_num_samples=500) == 40, "drawing ahead changes no sample"
    changed = Bars(**{**vars(bars), "close": np.nextafter(bars.close, 0)})
    assert found(TOTO, night(changed, 0)) == 0
    assert found(TOTO) == 40


def test_seeds_of_what_is_served_are_others(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    windows, toto = night(bars, 0), loaded["toto"]
    study = Run(toto, tmp_path).evaluator.forecast(windows, TOTO)
    run = Run(toto, tmp_path)
    served = run.evaluator.forecast(windows, TOTO, kind=SeedKind.SERVED)
    assert (run.points.found, run.points.asked) == (0, 20)
    assert not np.array_equal(study, served)


def test_what_is_in_memory_is_bounded_and_goes_to_the_store(
    bars: Bars,
    loaded: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_points, "MOST_BATCHES", 1)
    toto, windows = loaded["toto"], night(bars, 0)
    expected = [fresh(toto, windows, params) for params in (TOTO, MORE)]
    run = Run(toto, tmp_path)
    assert [run.errors(windows, params) for params in (TOTO, MORE)] == expected
    assert len(run.points._batches) == 1
    run.ended()
    again = Run(toto, tmp_path)
    assert [again.errors(windows, params) for params in (TOTO, MORE)] == expected
    assert again.ended() == (80, 80, 0)


def test_two_at_once_keep_what_each_has_found(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    runs = [Run(loaded["toto"], tmp_path) for _ in range(2)]
    for run, params in zip(runs, (TOTO, MORE), strict=True):
        run.errors(night(bars, 0), params)
    assert [run.ended()[0] for run in runs] == [0, 0]
    again = Run(loaded["toto"], tmp_path)
    for params in (TOTO, MORE):
        again.errors(night(bars, 0), params)
    assert again.ended() == (80, 80, 0)


def test_what_was_used_last_stays(
    bars: Bars,
    loaded: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_points, "MOST_POINTS", 4)  # two configurations with two passes

    def found(*asked: dict[str, Any]) -> list[int]:
        counts = []
        for params in asked:
            run = Run(loaded["toto"], tmp_path)
            run.errors(night(bars, 0), params)
            counts.append(run.ended()[0])
        return counts

    least = {**TOTO, "aggregate": "quantile_0.25"}
    assert found(TOTO, MORE, TOTO, least) == [0, 0, 40, 0]
    assert found(TOTO, least, MORE) == [40, 40, 0]


def test_damaged_points_are_computed_again(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    toto, windows = loaded["toto"], night(bars, 0)
    run = Run(toto, tmp_path)
    expected = run.errors(windows, TOTO)
    run.ended()
    with sqlite3.connect(next(tmp_path.glob("*.sqlite"))) as raw:
        raw.execute("update kept set value = substr(value, 1, length(value) - 1) || x'00'")
    again = Run(toto, tmp_path)
    assert again.errors(windows, TOTO) == expected
    assert again.ended()[0] == 0


def test_points_reach_the_store_as_their_evaluator_goes(
    bars: Bars,
    loaded: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = configuration.load(None, {"storage": {"data_dir": str(tmp_path / "server")}})
    for expected in (0, 20):
        evaluator = evaluator_of(config, loaded["toto"], cache_bytes=0)
        evaluator.measure(night(bars, 0), TOTO)
        assert evaluator.kept_points is not None
        assert evaluator.kept_points.found == expected
        rest = [evaluator]
        del evaluator
        last = threading.Thread(target=rest.clear)  # garbage is collected in any thread
        last.start()
        last.join()
    assert not list(tmp_path.rglob("*.damaged"))
