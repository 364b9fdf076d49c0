"""Errors of point forecasts over windows, and the numbers that sum them up.

Owns the metrics: the objective, its companions and skill against "no change". Knows nothing of how points came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from objectives.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Errors of a forecast over W windows of H steps, a step's error being forecast - actual."""

    mae: float  # mean |error| / last close before the window: pct_return_mae, the objective
    price_mae: float  # mean |error|
    mae_percent: float  # 100 * mean |error| / mean |actual|
    no_change_mae: float  # `mae` of predicting the last close
    skill: float  # 1 - mae / no_change_mae; 0 where no price moved and there is nothing to be better than
    errors: tuple[float, ...] = ()  # [W] in origin order, each window's share of `mae`; empty where it was not kept
    sampling_error: float | None = None  # standard error of `mae` by fresh seeds alone; None: one pass cannot tell
    windows: int
    seconds: Mapping[str, float]  # by stage, over all passes; a stage answered from the cache takes next to none
    latency_s: float | None = (
        None  # of one window, from its bars to its points, where that was computed anew; else None
    )


def measure_no_change(windows: Windows) -> float:
    """The `mae` of predicting that the price stays at the last close."""
    return float(no_change_errors(windows).mean())


def no_change_errors(windows: Windows) -> np.ndarray:
    """Each window's share of `measure_no_change`, float64 [W]."""
    return relative_errors(windows, windows.last_closes[:, None])


def relative_errors(windows: Windows, points: np.ndarray) -> np.ndarray:
    """Each window's mean |forecast - actual| / last close before it: [..., W] of points [..., W, H]."""
    return np.abs(points - windows.actuals).mean(axis=-1) / windows.last_closes


def measurement_of(
    windows: Windows, points: np.ndarray, *, seconds: Mapping[str, float], latency_s: float | None
) -> Measurement:
    """The measurement of point forecasts [R, W, H], price, of R passes; `errors` are means over the passes."""
    by_pass = relative_errors(windows, points)  # [R, W]
    errors = by_pass.mean(axis=0)
    mae = float(errors.mean())
    price_mae = float(np.abs(points - windows.actuals).mean())
    no_change_mae = measure_no_change(windows)
    return Measurement(
        mae=mae,
        price_mae=price_mae,
        mae_percent=float(100 * price_mae / np.abs(windows.actuals).mean()),
        no_change_mae=no_change_mae,
        skill=1 - mae / no_change_mae if no_change_mae > 0 else 0.0,
        errors=tuple(errors.tolist()),
        sampling_error=_standard_error(by_pass),
        windows=len(windows),
        seconds={stage: round(spent, 6) for stage, spent in seconds.items()},
        latency_s=latency_s,
    )


def _standard_error(by_pass: np.ndarray) -> float | None:
    """Standard error of the mean over all errors [R, W] that sampling alone causes; None for one pass.

    The windows are given and every pass draws each of them with a seed of its own, so variances of windows add up.
    """
    repeats, windows = by_pass.shape
    if repeats < 2:
        return None
    return float(np.sqrt((by_pass.var(axis=0, ddof=1) / repeats).sum()) / windows)
