"""What a slot keeps of a confirmation: compact, exact where it matters, and older results still read."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from evidence_builder import evidence, forecasts, measured_configuration, unmeasured

from objectives.metrics import Measurement
from studies import config as configuration
from studies.evidence import PARTS, Part, StudyEvidence, errors_text, from_json, to_json

COUNTS: dict[Part, int] = {"validation": 30, "confirmation": 250, "test": 20}
LONG = 1 / 3e2  # a number of many digits


def found(candidates: int = 3) -> StudyEvidence:
    measured = [
        measured_configuration(LONG, trial=n, params={"aggregate": "mean", "n": n}, counts=COUNTS, seed=n)
        for n in range(candidates)
    ]
    default = measured_configuration(0.02, source="default", clipped=0.015, counts=COUNTS, seed=77)
    dropped = replace(unmeasured("dropped after 100 windows", params={"n": -1}), source="portfolio")
    incumbent = measured_configuration(0.03, counts=COUNTS, seed=78, params={"aggregate": "median"})
    return evidence(*measured, default, dropped, incumbent=incumbent, counts=COUNTS, shown=forecasts())


def read_back(one: StudyEvidence) -> StudyEvidence:
    return from_json("toto", json.loads(json.dumps(to_json(one))))


def assert_like(read: Measurement | None, was: Measurement | None) -> None:
    if read is None or was is None:
        assert read is was
        return
    assert (read.mae, read.skill, read.windows) == (was.mae, was.skill, was.windows)  # to the last bit
    assert read.no_change_mae == was.no_change_mae
    assert np.array(read.errors) == pytest.approx(np.array(was.errors), rel=1e-7)
    for name in ("price_mae", "mae_percent", "sampling_error"):
        assert getattr(read, name) == pytest.approx(getattr(was, name), rel=1e-6)


def test_it_is_read_as_it_was_written() -> None:
    was = found()
    read = read_back(was)
    pairs = [*zip(read.candidates, was.candidates, strict=True), (read.in_use["incumbent"], was.in_use["incumbent"])]
    for ours, theirs in pairs:
        names = ("model", "params", "trial", "source", "clipped", "error")
        assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
        for part in PARTS:
            assert_like(ours.on(part), theirs.on(part))
    assert (read.windows, read.passes, read.forecasts) == (was.windows, was.passes, was.forecasts)
    assert read.no_change["test"].errors == pytest.approx(was.no_change["test"].errors)
    assert read_back(read) == read  # once rounded it stays
    assert read.candidates[0].confirmation is not None
    assert read.candidates[0].confirmation.seconds


def test_all_of_it_can_be_shown() -> None:
    values = to_json(found(), compact=False)
    json.dumps(values)
    assert set(values["candidates"][0]["test"]) == set(asdict(Measurement(**MEASURED)))
    assert len(values["candidates"][0]["confirmation"]["errors"]) == 250


MEASURED: dict[str, Any] = {
    "mae": 1.0, "price_mae": 1.0, "mae_percent": 1.0, "no_change_mae": 1.0, "skill": 0.0, "windows": 1, "seconds": {},
}  # fmt: skip


def test_the_largest_grid_takes_at_most_300_kb() -> None:
    aggregates = configuration.load().models["toto"].aggregates
    grid = [
        measured_configuration(
            LONG * (1 + n / 1000 + length / 1e6),
            source="grid",
            params={"context_length": length, "aggregate": name, "num_samples": 4096},
            counts=COUNTS,
            seed=n,
            no_change_mae=0.0123456789012345,
            sampling_error=0.000123456789 * (1 + n / 7),
        )
        for n, name in enumerate(aggregates)
        for length in (256, 512, 1024, 2048, 4096)
    ]
    assert len(grid) == 24 * 5
    trials = [
        measured_configuration(LONG, trial=n, params=one.params, counts=COUNTS, seed=n)
        for n, one in enumerate(grid[:5])
    ]
    default = measured_configuration(0.02, source="default", params=grid[0].params, counts=COUNTS, seed=77)
    whole = evidence(
        *trials, *grid, default, incumbent=default, stored=trials[0], counts=COUNTS, shown=long_forecasts()
    )
    assert len(json.dumps(to_json(whole))) <= 300_000


def long_forecasts() -> Any:
    """Fifty bars, each number with all its digits."""
    values = tuple((100 * np.random.default_rng(1).random(50)).tolist())
    long = {}
    for part, one in forecasts().items():
        series = {name: replace(each, points=values, low=values, high=values) for name, each in one.series.items()}
        long[part] = replace(one, times=("2018-01-01",) * 50, actual=values, series=series)
    return long


def test_an_older_result_is_still_read() -> None:
    """As results were written before: errors as a list, and everything said with every measurement."""
    was = found()
    old = to_json(was, compact=False)
    for one in (*old["candidates"], *old["baselines"].values()):
        del one["source"]
    read = from_json("toto", json.loads(json.dumps(old)))
    assert read.candidates[0].confirmation == was.candidates[0].confirmation
    assert read.no_change == was.no_change
    assert [one.source for one in read.candidates] == ["trial"] * 5
    assert read.in_use["incumbent"].source == "in use"


def test_an_error_that_float32_cannot_hold_is_believed_by_nobody() -> None:
    read = np.frombuffer(base64.b64decode(errors_text([1e300, 0.5])), "<f4")
    assert math.isinf(read[0])
    assert read[1] == 0.5


def test_candidates_have_names_of_their_own() -> None:
    measured = [
        measured_configuration(0.01, trial=4),
        measured_configuration(0.01, source="grid"),
        measured_configuration(0.01, source="grid", trial=9),
        measured_configuration(0.01, source="grid", params={"n": 2}),
        measured_configuration(0.01, source="default", trial=3),
    ]
    shown: StudyEvidence = evidence(*measured)
    titles: list[str] = [shown.title(one) for one in shown.candidates]
    assert titles == ["trial 4", "grid 1", "trial 9", "grid 2", "default"]
