"""Typed evidence for tests: measurements of known errors, configurations, and what a confirmation stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from objectives.metrics import Measurement
from studies.evidence import MeasuredConfiguration, NoChange, StudyEvidence, WindowSpan

COUNTS = {"validation": 30, "confirmation": 250, "test": 20}


def measurement(errors: Sequence[float] | np.ndarray, *, no_change_mae: float = 0.01, **fields: Any) -> Measurement:
    """A measurement of these errors by window; its other numbers are plausible unless given."""
    with np.errstate(over="ignore"):  # absurd errors are a test's business
        mae = float(np.mean(errors)) if len(errors) else 0.0
    values: dict[str, Any] = {
        "mae": mae, "price_mae": 100 * mae, "mae_percent": 100 * mae, "no_change_mae": no_change_mae,
        "skill": 1 - mae / no_change_mae, "errors": tuple(float(error) for error in errors), "sampling_error": 0.0,
        "windows": len(errors), "seconds": {"encode": 0.1, "draw": 0.2, "aggregate": 0.0},
    }  # fmt: skip
    return Measurement(**{**values, **fields})


def evidence(
    candidates: Sequence[MeasuredConfiguration],
    in_use: Mapping[str, MeasuredConfiguration] | None = None,
    *,
    counts: Mapping[str, int] = COUNTS,
    first: str = "2025-01-01",
    last: str = "2026-03-19",
    no_change: float = 0.01,
    **fields: Any,
) -> StudyEvidence:
    """What a confirmation measured; no forecasts to show unless given."""
    values: dict[str, Any] = {
        "windows": {part: WindowSpan(count=count, first=first, last=last) for part, count in counts.items()},
        "passes": 2,
        "sampling_error": 0.0005,
        "candidates": tuple(candidates),
        "in_use": dict(in_use or {}),
        "no_change": {part: NoChange(mae=no_change, errors=(no_change,) * count) for part, count in counts.items()},
        "forecasts": {},
    }
    return StudyEvidence(**{**values, **fields})
