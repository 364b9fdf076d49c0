"""Evidence of a study for tests: typed values, with defaults for whatever a test does not care about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from objectives.metrics import Measurement
from studies.evidence import (
    INCUMBENT,
    PARTS,
    STORED,
    ForecastSeries,
    ForecastsShown,
    MeasuredConfiguration,
    NoChange,
    Part,
    Source,
    StudyEvidence,
    WindowSpan,
)

COUNTS: Mapping[Part, int] = {"validation": 30, "confirmation": 60, "test": 20}  # windows of each part
NO_CHANGE_MAE = 0.0125


def measurement(
    mae: float,
    windows: int,
    *,
    seed: int | None = None,
    wobble: float = 0.0,
    no_change_mae: float = NO_CHANGE_MAE,
    sampling_error: float = 0.0,
) -> Measurement:
    """A measurement with this error: the same on every window or, with a seed, noise with this mean.

    Equal seeds give the same noise, scaled; `wobble` is by how much of it a configuration differs from the others.
    """
    errors = np.full(windows, mae)
    if seed is not None:
        noise = np.random.default_rng(seed).uniform(0.5, 1.5, windows)
        noise += wobble * np.random.default_rng(seed + 1).uniform(-1, 1, windows)
        errors = mae * noise / noise.mean()
        mae = float(errors.mean())
    return Measurement(
        mae=mae,
        price_mae=100 * mae,
        mae_percent=100 * mae,
        no_change_mae=no_change_mae,
        skill=1 - mae / no_change_mae,
        errors=tuple(errors.tolist()),
        sampling_error=sampling_error,
        windows=windows,
        seconds={"encode": 0.1, "draw": 0.2, "aggregate": 0.0},
        latency_s=0.01,
    )


def of_errors(errors: Sequence[float], **fields: Any) -> Measurement:
    """A measurement of exactly these errors by window; its other numbers are those of their mean unless given."""
    with np.errstate(over="ignore"):  # absurd errors are a test's business
        mae = float(np.mean(errors)) if len(errors) else 0.0
    found = replace(measurement(mae, 1), errors=tuple(float(error) for error in errors), windows=len(errors))
    return replace(found, **fields)


def measured_configuration(
    mae: float,
    *,
    validation: float | None = None,
    test: float | None = None,
    params: Mapping[str, Any] | None = None,
    model: str = "toto",
    trial: int | None = None,
    source: Source = "trial",
    clipped: float | None = None,
    counts: Mapping[Part, int] = COUNTS,
    **options: Any,
) -> MeasuredConfiguration:
    """A configuration with this error on the confirmation windows, and on the others too unless given.

    options: of `measurement`.
    """
    maes: dict[Part, float] = {
        "validation": mae if validation is None else validation,
        "confirmation": mae,
        "test": mae if test is None else test,
    }
    measured: dict[str, Any] = {part: measurement(maes[part], counts[part], **options) for part in PARTS}
    return MeasuredConfiguration(
        model=model,
        params=dict(params or {"num_samples": 64}),
        trial=trial,
        source=source,
        clipped=clipped,
        **measured,
    )


def unmeasured(error: str, *, params: Mapping[str, Any] | None = None, model: str = "toto") -> MeasuredConfiguration:
    """A configuration in use that could not be measured."""
    return MeasuredConfiguration(model=model, params=dict(params or {"num_samples": 64}), error=error)


def forecasts(horizon: int = 1, *, band: bool = True, best: int = 0) -> dict[Part, ForecastsShown]:
    """Two windows of `horizon` bars each in the parts that are shown; the incumbent forecasts what came.

    best: the number of the best candidate's trial.
    """

    def part(first: int) -> ForecastsShown:
        actual = tuple(100.0 + first + place for place in range(2 * horizon))

        def series(trial: int | None, points: tuple[float, ...]) -> ForecastSeries:
            low, high = (tuple(value + width for value in points) if band else () for width in (-1.0, 1.0))
            return ForecastSeries(trial=trial, points=points, low=low, high=high)

        return ForecastsShown(
            times=tuple(f"2018-01-{first + place + 1:02d}" for place in range(2 * horizon)),
            actual=actual,
            starts=(0, horizon),
            series={"best": series(best, tuple(value + 0.5 for value in actual)), "incumbent": series(None, actual)},
        )

    return {"validation": part(0), "test": part(2 * horizon)}


def evidence(
    *candidates: MeasuredConfiguration,
    incumbent: MeasuredConfiguration | None = None,
    stored: MeasuredConfiguration | None = None,
    counts: Mapping[Part, int] = COUNTS,
    no_change_mae: float = NO_CHANGE_MAE,
    shown: Mapping[Part, ForecastsShown] | None = None,
    last: str = "2018-12-31",
    **fields: Any,
) -> StudyEvidence:
    """The evidence of a study with these candidates and what is in use.

    shown: its forecasts; last: the time of the last bar; fields: others of StudyEvidence.
    """
    labels = {INCUMBENT: incumbent, STORED: stored}
    values: dict[str, Any] = {
        "windows": {part: WindowSpan(count=counts[part], first="2017-01-01", last=last) for part in PARTS},
        "passes": 2,
        "sampling_error": 0.0005,
        "candidates": candidates,
        "in_use": {label: replace(one, source="in use") for label, one in labels.items() if one is not None},
        "no_change": {part: NoChange(mae=no_change_mae, errors=(no_change_mae,) * counts[part]) for part in PARTS},
        "forecasts": shown or {},
    }
    return StudyEvidence(**{**values, **fields})
