"""Errors of point forecasts over windows, and the numbers that sum them up.

Owns the metrics: the objective, its companions and skill against "no change", each of the windows' own key and relative
to the last close, whatever the key. Knows nothing of how points came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from objectives.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Errors of a forecast over W windows of H steps, a step's error being forecast - actual."""

    mae: float  # mean |error| / last close before the window: pct_return_mae, the objective
    price_mae: float  # mean |error|
    mae_percent: float  # 100 * mean |error| / mean |actual|
    no_change_mae: float  # `mae` of `Windows.no_change`: of the close, of predicting the last one
    skill: float  # 1 - mae / no_change_mae; 0 where no price moved and there is nothing to be better than
    errors: tuple[float, ...] = ()  # [W] in origin order, each window's share of `mae`; empty where it was not kept
    sampling_error: float | None = None  # standard error of `mae` by fresh seeds alone; None: one pass cannot tell
    windows: int
    seconds: Mapping[str, float]  # by stage, over all passes; a stage answered from the cache takes next to none
    latency_s: float | None = (
        None  # of one window, from its bars to its points, where that was computed anew; else None
    )


def skill(mae: float, no_change_mae: float) -> float:
    return 1 - mae / no_change_mae if no_change_mae > 0 else 0.0


def measure_no_change(windows: Windows) -> float:
    """The `mae` of `Windows.no_change`: of the close, of predicting that it stays at the last one."""
    return float(no_change_errors(windows).mean())


def no_change_errors(windows: Windows) -> np.ndarray:
    """Each window's share of `measure_no_change`, float64 [W]."""
    return relative_errors(windows, windows.no_change[:, None])


def relative_errors(windows: Windows, points: np.ndarray) -> np.ndarray:
    """Each window's mean |forecast - actual| / last close before it: [..., W] of points [..., W, H]."""
    return np.abs(points - windows.actuals).mean(axis=-1) / windows.last_closes


def price_errors(windows: Windows, indices: Sequence[int], points: np.ndarray) -> np.ndarray:
    """Each window's mean |forecast - actual|, price: [R, w] of points [R, w, H] of the windows with these indices."""
    return np.abs(points - windows.actuals[list(indices)]).mean(axis=-1)


def over_passes(by_pass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance over R passes of errors [R, w]; the variance is NaN where one pass cannot tell.

    Pass after pass: numpy's own sums of many rows depend on the number of windows, in their last bits.
    """
    passes, mean, squares = len(by_pass), np.zeros(by_pass.shape[1]), np.zeros(by_pass.shape[1])
    for row in by_pass:
        mean += row
    mean /= passes
    for row in by_pass:
        squares += (row - mean) ** 2
    return mean, squares / (passes - 1) if passes > 1 else np.full_like(mean, np.nan)


def measurement_of(
    windows: Windows,
    errors_in_price: np.ndarray,
    variances: np.ndarray,
    *,
    passes: int,
    seconds: Mapping[str, float],
    latency_s: float | None,
) -> Measurement:
    """The measurement of what `over_passes` says of every window, float64 [W], in the order of the origins."""
    errors = errors_in_price / windows.last_closes
    mae, price_mae = float(errors.mean()), float(errors_in_price.mean())
    no_change_mae = measure_no_change(windows)
    return Measurement(
        mae=mae,
        price_mae=price_mae,
        mae_percent=float(100 * price_mae / np.abs(windows.actuals).mean()),
        no_change_mae=no_change_mae,
        skill=skill(mae, no_change_mae),
        errors=tuple(errors.tolist()),
        sampling_error=standard_error(variances / windows.last_closes**2, passes),
        windows=len(windows),
        seconds={stage: round(spent, 6) for stage, spent in seconds.items()},
        latency_s=latency_s,
    )


def measurement_of_errors(errors: Sequence[float], *, mae: float, no_change_mae: float) -> Measurement:
    """As much of a measurement as each window's share [W] of `mae` tells, without prices and times."""
    return Measurement(
        mae=mae,
        price_mae=math.nan,
        mae_percent=math.nan,
        no_change_mae=no_change_mae,
        skill=skill(mae, no_change_mae),
        errors=tuple(errors),
        windows=len(errors),
        seconds={},
    )


def standard_error(variances: np.ndarray, passes: int) -> float | None:
    """Standard error of `mae` that sampling alone causes, from each window's variance between passes [W].

    None for one pass. The windows are given and every pass draws each of them with a seed of its own, so variances of
    windows add up.
    """
    return None if passes < 2 else float(np.sqrt((variances / passes).sum()) / len(variances))
