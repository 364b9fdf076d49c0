"""A confirmation's measuring: the numbers, the number of passes, the race, and the same by several workers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from places import last_bars, tiny_toto

from forecasters import Bars, Forecaster, ForecastError, naive
from objectives.evaluation import Evaluator
from objectives.metrics import Measurement
from objectives.windows import Windows, recent_origins, split
from studies.evidence import PARTS, Part
from studies.measuring import RACE_FROM, Entry, Found, Measuring
from studies.study import SEARCH_PASSES, StudyRun

NAIVE = {"season": 1, "context_length": 64, "num_samples": 64}
NAIVE_MODEL = cast(Forecaster, naive.Naive())
TOTO = {"context_length": 128, "num_samples": 64}


@cache
def bars() -> Bars:
    lines = [line.split(",") for line in last_bars("SP500", 420)[1:]]
    closes = np.array([float(line[4]) for line in lines])
    times = pd.to_datetime([line[0] for line in lines]).to_numpy().astype("datetime64[ns]")
    return Bars(timestamps=times, open=closes, high=closes, low=closes, close=closes, volume=None)


def run_of(*, windows: int, horizon: int = 1, tolerance: float = 0.01, max_passes: int = 4) -> StudyRun:
    """What Measuring asks of a study; its windows are real."""
    parts = split(bars(), symbol="SP500", horizon=horizon, min_context=64)
    confirmation = recent_origins(
        bars(), windows, symbol="SP500", before=parts.test.origins[0], horizon=horizon, min_context=64
    )
    values = {"split": parts, "confirmation": confirmation, "tolerance": tolerance, "max_passes": max_passes}
    return cast(StudyRun, SimpleNamespace(**values, study=SimpleNamespace(definition={"symbol": "SP500"})))


def entries(params: Mapping[str, Any], *aggregates: str, **treated: bool) -> list[Entry]:
    treatment = {"decides": True, "races": False, "required": True, **treated}
    return [Entry(params={**params, "aggregate": name}, **treatment) for name in aggregates]


class Counting(Evaluator):
    """Counts the batches that it is asked for, by place of their params in `asked`."""

    def __init__(self, forecaster: Any, **options: Any) -> None:
        super().__init__(forecaster, cache_bytes=1 << 24, **options)
        self.asked: list[tuple[str, int, int]] = []  # aggregate, first window, passes

    def batch_errors(
        self, windows: Windows, params: Mapping[str, Any], indices: Sequence[int], *, passes: Sequence[int], **more: Any
    ) -> np.ndarray:
        found = super().batch_errors(windows, params, indices, passes=passes, **more)
        self.asked.append((params["aggregate"], windows.origins[indices[0]], len(passes)))
        return found


def stable(measured: Measurement) -> dict[str, Any]:
    """All but what a clock says."""
    return {name: value for name, value in vars(measured).items() if name not in ("seconds", "latency_s")}


@pytest.mark.parametrize(
    ("model", "horizon", "windows", "batch"),
    [("naive", 1, 120, 10), ("naive", 7, 121, 10), ("naive", 1, 115, 7), ("toto", 1, 61, 10)],
)
def test_every_number_is_that_of_measuring_in_one_go(model: str, horizon: int, windows: int, batch: int) -> None:
    forecaster, params = (NAIVE_MODEL, NAIVE) if model == "naive" else (tiny_toto(), TOTO)
    run = run_of(windows=windows, horizon=horizon, tolerance=1e-9, max_passes=9)
    asked = entries(params, "mean", "median", "quantile_0.90")
    measuring = Measuring(run, Evaluator(forecaster, cache_bytes=0, batch=batch), asked)
    found = measuring.run()
    assert measuring.passes == 9
    alone = Evaluator(forecaster, cache_bytes=1 << 24, batch=batch)
    parts: dict[Part, tuple[Windows, Sequence[int]]] = {
        "validation": (run.split.validation, SEARCH_PASSES),
        "confirmation": (run.confirmation, range(1, 10)),
        "test": (run.split.test, range(1, 10)),
    }
    for entry, measured in zip(asked, found, strict=True):
        for part in PARTS:
            of, passes = parts[part]
            assert stable(measured[part]) == stable(alone.measure(of, entry.params, passes=passes))


def test_passes_are_decided_after_the_first_chunk_and_nothing_is_measured_twice() -> None:
    asked = entries(NAIVE, "mean", "quantile_0.90")
    for tolerance, most, expected in ((0.5, 16, 2), (1e-9, 5, 5)):
        evaluator = Counting(NAIVE_MODEL)
        measuring = Measuring(run_of(windows=120, tolerance=tolerance, max_passes=most), evaluator, asked)
        measuring.run()
        assert measuring.passes == expected
        windows = 12 + 2 + 3  # batches of confirmation, test and validation
        assert sum(passes for _, _, passes in evaluator.asked) == 2 * ((12 + 2) * expected + 3)
        assert len(evaluator.asked) == 2 * windows + (2 * 5 if expected > 2 else 0)
    # What two passes of a chunk show is near enough to what all of them come to.
    wanted = measuring.largest_sampling_error * np.sqrt(5 / 9)
    run = run_of(windows=120, tolerance=wanted, max_passes=100)
    enough = Measuring(run, Counting(NAIVE_MODEL), asked)
    enough.run()
    assert 6 <= enough.passes <= 13
    assert enough.largest_sampling_error <= 1.3 * wanted


def test_what_decides_nothing_adds_no_passes() -> None:
    run = run_of(windows=120, tolerance=0.003, max_passes=99)
    mean, noisy = entries(NAIVE, "mean")[0], {"decides": False}
    found = []
    for asked in ([mean], [mean, *entries(NAIVE, "quantile_0.75", **noisy)], entries(NAIVE, "mean", "quantile_0.75")):
        measuring = Measuring(run, Counting(NAIVE_MODEL), asked)
        measuring.run()
        found.append(measuring.passes)
    assert 2 < found[0] == found[1] < found[2]


def by_several(run: StudyRun, asked: list[Entry], *, workers: int, seed: int) -> tuple[Measuring, list[Counting]]:
    """As workers measure that begin and end their steps in any order, and know what had ended when they began one."""
    rng = random.Random(seed)
    evaluators = [Counting(NAIVE_MODEL) for _ in range(workers)]
    results: dict[int, str] = {}
    under_way: dict[int, Callable[[], str]] = {}

    def known() -> Measuring:
        measuring = Measuring(run, evaluators[0], asked)
        found = {n: json.loads(said) for n, said in results.items()}
        measuring.take({n: Found.from_json(said, len(measuring.steps[n].indices)) for n, said in found.items()})
        return measuring

    while True:
        begun = known()
        if rng.random() < 0.5 and (free := [n for n in begun.left if n not in under_way]) and len(under_way) < workers:
            number = free[0]
            mine = Measuring(run, evaluators[len(under_way)], asked)
            mine.take({n: found for n, found in begun.found.items() if n < number})
            under_way[number] = lambda mine=mine, number=number: json.dumps(mine.measure(number).to_json())
        elif under_way:
            number = rng.choice(sorted(under_way))
            results[number] = under_way.pop(number)()
        elif not begun.left:
            return begun, evaluators


@pytest.mark.parametrize("passes", [2, 3])
def test_several_workers_come_to_the_same_in_any_order(passes: int) -> None:
    far, near = "quantile_0.02", "trimmed_mean_10"
    asked = [*entries(NAIVE, "mean"), *entries(NAIVE, near, far, races=True)]
    run = run_of(windows=200, tolerance=0.5 if passes == 2 else 1e-9, max_passes=3)
    alone = Measuring(run, Counting(NAIVE_MODEL), asked)
    expected = [{part: stable(one[part]) for part in one} for one in alone.run()]
    assert alone.passes == passes
    assert list(alone.errors) == [2]  # it was dropped on the way, which not all of the others knew at once
    wasted = []
    for seed in range(8):
        measuring, evaluators = by_several(run, asked, workers=3, seed=seed)
        assert [{part: stable(one[part]) for part in one} for one in measuring.measurements] == expected
        assert (measuring.passes, measuring.errors) == (alone.passes, alone.errors)
        assert measuring.largest_sampling_error == alone.largest_sampling_error
        of_far = [first for evaluator in evaluators for name, first, _ in evaluator.asked if name == far]
        wasted.append(len(of_far) - 10 - (5 if passes > 2 else 0))
    assert max(wasted) > 0
    assert min(wasted) >= 0


def test_a_candidate_that_cannot_win_any_more_is_dropped() -> None:
    run = run_of(windows=200)
    far, near = "quantile_0.02", "trimmed_mean_10"
    asked = [*entries(NAIVE, "mean"), *entries(NAIVE, near, far, races=True), *entries(NAIVE, "quantile_0.01")]
    evaluator = Counting(NAIVE_MODEL)
    measuring = Measuring(run, evaluator, asked)
    found = measuring.run()
    assert list(measuring.errors) == [2]  # not the last, which is as bad and does not race
    assert measuring.errors[2].startswith(f"dropped after {RACE_FROM} windows: its MAE of ")
    assert found[2] == {}
    alone = Evaluator(NAIVE_MODEL, cache_bytes=1 << 24)
    for place in (0, 1, 3):
        again = alone.measure(run.confirmation, asked[place].params, passes=range(1, 1 + measuring.passes))
        assert stable(found[place]["confirmation"]) == stable(again)
    of_far = [first for name, first, _ in evaluator.asked if name == far]
    of_near = [first for name, first, _ in evaluator.asked if name == near]
    assert len(of_near) - len(of_far) == 10 + 2 + 3  # batches of the windows after RACE_FROM, of test and validation


class Failing(Counting):
    def batch_errors(self, windows: Windows, params: Mapping[str, Any], *words: Any, **options: Any) -> np.ndarray:
        if params["aggregate"] == "median" and len(self.asked) > 20:
            raise ForecastError("SP500: the forecast for 2018-01-02 is NaN or infinite")
        return super().batch_errors(windows, params, *words, **options)


def test_what_cannot_be_measured_says_why_unless_it_is_a_trial() -> None:
    asked = [*entries(NAIVE, "mean"), *entries(NAIVE, "median", required=False)]
    measuring = Measuring(run_of(windows=120), Failing(NAIVE_MODEL), asked)
    found = measuring.run()
    assert measuring.errors == {1: "SP500: the forecast for 2018-01-02 is NaN or infinite"}
    assert (set(found[0]), found[1]) == (set(PARTS), {})
    with pytest.raises(ForecastError):
        Measuring(run_of(windows=120), Failing(NAIVE_MODEL), entries(NAIVE, "mean", "median")).run()
