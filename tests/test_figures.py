"""The pictures: what their lines say, what is left out where something is missing, and that they stay small."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from evidence_builder import COUNTS, evidence, forecasts, measured_configuration, unmeasured
from PIL import Image

from launch.views import figures
from studies.evidence import Part, StudyEvidence
from studies.promoting import SymbolDecision

CONFIRMED, TEST = COUNTS["confirmation"], COUNTS["test"]


def result(*, incumbent: bool = True, horizon: int = 1, band: bool = True) -> StudyEvidence:
    """A study's confirmation: of its two candidates the second is the better one."""
    candidates = measured_configuration(0.02, trial=3, seed=1), measured_configuration(0.01, trial=7, seed=2)
    in_use = measured_configuration(0.015, seed=3) if incumbent else None
    return evidence(*candidates, incumbent=in_use, shown=forecasts(horizon, band=band, best=7))


def values(figure: Any, name: str, mode: str) -> np.ndarray:
    """What a named line or cloud of a figure shows."""
    return np.array(next(one.y for one in figure.data if one.name == name and one.mode == mode), dtype=float)


def test_errors_of_best_and_incumbent_in_per_cent_and_who_is_ahead() -> None:
    found = result()
    figure: Any = figures.error_by_window(found)
    assert figure is not None
    named = {"trial 7": found.candidates[1], "incumbent": found.in_use["incumbent"]}
    errors = {
        name: 100 * np.array([error for part in (one.confirmation, one.test) if part for error in part.errors])
        for name, one in named.items()
    }
    for name, wanted in errors.items():
        assert values(figure, name, "markers") == pytest.approx(wanted, rel=1e-6)
        smooth = values(figure, name, "lines")
        assert smooth[-1] == pytest.approx(wanted[-figures.RECENT :].mean(), rel=1e-6)
        assert np.isnan(smooth[: figures.RECENT - 1]).all()
    lead = values(figure, "cumulative lead", "lines")
    assert lead == pytest.approx(np.cumsum(errors["incumbent"] - errors["trial 7"]), rel=1e-5)
    assert lead[-1] > 0
    shades = figure.layout.shapes
    assert len(shades) == 2
    assert all((shade.x0, shade.x1) == (CONFIRMED + 0.5, CONFIRMED + TEST + 0.5) for shade in shades)


def test_without_an_incumbent_no_change_is_what_best_is_compared_with() -> None:
    found = result(incumbent=False)
    figure: Any = figures.error_by_window(found)
    assert figure is not None
    assert {one.name for one in figure.data} == {"no change", "trial 7", "cumulative lead"}
    failed = replace(result(), in_use={"incumbent": unmeasured("NaN")})
    figure = figures.error_by_window(failed)
    assert figure is not None
    assert {one.name for one in figure.data} == {"no change", "trial 7", "cumulative lead"}


def test_errors_that_were_not_kept_are_not_compared() -> None:
    found = result(incumbent=False)
    found = replace(found, no_change={part: replace(one, errors=()) for part, one in found.no_change.items()})
    assert figures.error_by_window(found) is None


def test_nothing_is_drawn_of_what_is_not_there() -> None:
    empty = replace(
        result(), candidates=(), forecasts={part: replace(one, series={}) for part, one in forecasts(1).items()}
    )
    old = replace(result(), forecasts={})  # confirmed before forecasts were kept
    for found in (None, empty):
        assert figures.error_by_window(found) is None
    for found in (None, empty, old):
        assert figures.forecast(found) is None
        assert figures.forecast_image(found, title="t") is None
    assert figures.best_so_far({}) is None
    assert figures.importances({}) is None
    assert figures.improvements([]) is None


@pytest.mark.parametrize("horizon", [1, 3])
def test_forecasts_join_windows_of_one_bar_and_keep_longer_ones_apart(horizon: int) -> None:
    found = result(horizon=horizon)
    chart = figures.forecast_chart(found)
    assert chart is not None
    assert [len(one.places) for one in chart.segments] == ([2, 2] if horizon == 1 else [3, 3, 3, 3])
    assert np.concatenate([one.places for one in chart.segments]).tolist() == list(range(4 * horizon))
    assert chart.test_from == 2 * horizon
    figure: Any = figures.forecast(found)
    assert figure is not None
    assert values(figure, "actual", "lines+markers").tolist() == [100.0 + place for place in range(4 * horizon)]
    bands = [one for one in figure.data if one.fill == "toself"]
    assert len(bands) == len(chart.segments)
    assert sum(bool(one.showlegend) for one in figure.data) == 4  # band, best, incumbent, actual: each once
    first = bands[0]
    half = len(first.y) // 2
    assert list(first.y[:half]) == pytest.approx([value + 1.5 for value in found.forecasts["validation"].actual[:half]])
    assert list(first.x[:half]) == list(first.x[half:])[::-1]  # there and back


def test_a_forecast_without_samples_has_no_band() -> None:
    found = result(band=False)
    figure: Any = figures.forecast(found)
    assert figure is not None
    assert [one for one in figure.data if one.fill] == []
    assert figures.forecast_image(found, title="t") is not None


def test_the_image_is_a_png_that_depends_on_the_numbers_only() -> None:
    first, again = (figures.forecast_image(result(), title="SP500") for _ in range(2))
    assert first is not None
    assert first == again
    assert Image.open(io.BytesIO(first)).size == (1000, 420)
    assert figures.forecast_image(result(horizon=3), title="SP500") != first


def test_best_so_far_never_rises_and_leaves_the_worst_out_of_sight() -> None:
    found = {0: 0.012, 1: 0.011, 4: 0.5, 5: 0.0115, **dict.fromkeys(range(6, 30), 0.0112), 30: 0.010}
    figure: Any = figures.best_so_far(found, incumbent=0.0118, no_change=0.0119)
    assert figure is not None
    lines = {one.name: list(one.y) for one in figure.data}
    assert lines["best so far"] == pytest.approx(100 * np.minimum.accumulate(list(found.values())), rel=1e-6)
    assert lines["incumbent"] == pytest.approx([1.18, 1.18])
    low, high = figure.layout.yaxis.range
    assert low < 1.0
    assert 1.2 < high < 2
    assert "1 worse trial above" in figure.layout.title.subtitle.text
    assert figures.best_so_far({3: 0.01}) is not None  # one trial
    assert figures.best_so_far({3: float("inf")}) is None


def test_importances_largest_on_top() -> None:
    figure: Any = figures.importances({"temperature": 0.2, "top_k": 0.7, "clip": 0.1})
    assert figure is not None
    assert list(figure.data[0].y) == ["clip", "temperature", "top_k"]
    assert list(figure.data[0].x) == [10.0, 20.0, 70.0]


def decision(symbol: str, **known: Any) -> SymbolDecision:
    values: dict[str, Any] = {"symbol": symbol, "decision": "kept", "reason": "not better", **known}
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in fields(SymbolDecision))
    return SymbolDecision(**{**unknown, **values})


def test_improvements_with_and_without_an_interval() -> None:
    row = decision("A", improvement=0.02, improvement_low=-0.01, improvement_high=0.05)
    alone = decision("B", decision="promoted", improvement=0.02)
    unknown = decision("C")
    figure: Any = figures.improvements([row, alone, unknown])
    assert figure is not None
    lines = {one.name: one for one in figure.data}
    assert list(lines["kept"].error_x.array) == pytest.approx([3])
    assert list(lines["kept"].error_x.arrayminus) == pytest.approx([3])
    assert list(lines["promoted"].error_x.array) == [0]
    assert list(figure.layout.yaxis.categoryarray) == ["B", "A"]


def test_what_the_database_keeps_of_a_study_is_small() -> None:
    counts: dict[Part, int] = {part: 4 * count for part, count in COUNTS.items()}
    long = measured_configuration(0.01, trial=7, counts=counts, seed=2)
    found = evidence(long, incumbent=long, counts=counts, shown=forecasts(best=7))
    drawn: tuple[Any, ...] = (
        figures.error_by_window(found),
        figures.forecast(found),
        figures.best_so_far(dict.fromkeys(range(100), 0.01)),
    )
    # Plotly's own template alone would be 7 kB.
    for figure, most in zip(drawn, (15_000, 5_000, 5_000), strict=True):
        assert figure is not None
        assert len(str(figure.to_json())) < most
