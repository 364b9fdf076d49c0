"""Configurations side by side: measured on equal windows with equal seeds, each against another, and naive baselines.

What `studies compare`, `studies sweep` and `studies reduce` share. Pure apart from the evaluator, whose numbers are to
the last bit those of a search (pass 0), of a confirmation (passes from 1 on) or of forecasts that were served, on the
same windows. Knows no files, databases or commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forecasters import Bars
from objectives.evaluation import STAGES, Evaluator
from objectives.keys import key_forecasts
from objectives.metrics import Measurement, measurement_of, over_passes, price_errors
from objectives.windows import SeedKind, Windows, recent_origins
from studies import promotion
from studies.config import Config
from studies.measuring import FRESH_FROM
from studies.series import split_windows
from studies.study import SEARCH_PASSES

DRIFT_BARS = 250  # whose mean log return the drift goes on with

Verdict = Literal["better", "worse", "tie", "unknown"]


@dataclass(frozen=True, kw_only=True)
class ComparedConfiguration:
    """One row of a comparison."""

    label: str
    model: str
    params: Mapping[str, Any]  # complete: every param that the model's stages and the aggregate ask for
    source: str  # "best", "stored", "default", a file's path, or STUDY#TRIAL


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredRow:
    """How a configuration or a baseline did on W windows of H steps."""

    measurement: Measurement
    by_step: np.ndarray  # float64 [H], mean |error| / last close of every step
    points: np.ndarray  # float64 [W, H], price, of the first pass
    repaired: int | None = None  # windows whose forecast is served otherwise; None: no other key to compare with


@dataclass(frozen=True, kw_only=True)
class PairedImprovement:
    """What one forecast gains over another on the same windows, relative to the other's MAE."""

    value: float
    interval: tuple[float, float] | None  # 95 %; None: too few windows that do not overlap

    @property
    def verdict(self) -> Verdict:
        if self.interval is None:
            return "unknown"
        return "better" if self.interval[0] > 0 else "worse" if self.interval[1] < 0 else "tie"


# --- windows ------------------------------------------------------------------------------------------------


def windows_before_test(config: Config, symbol: str, bars: Bars, *, count: int, stride: int) -> Windows:
    """The most recent origins before test; with a stride of 1 and their number those of a study.

    The horizon is that of the settings. Raises DataError, which says how many windows fit.
    """
    counts = config.windows
    return recent_origins(
        bars,
        count,
        symbol=symbol,
        before=split_windows(config, symbol, bars).test.origins[0],
        horizon=counts.horizon,
        min_context=counts.min_context,
        stride=stride,
    )


def effective_windows(windows: Windows) -> float:
    """How many windows that share no bar have room in the same time."""
    return (windows.origins[-1] - windows.origins[0] + windows.horizon) / windows.horizon


# --- measuring ----------------------------------------------------------------------------------------------


def passes_of(evaluator: Evaluator, count: int) -> Sequence[int]:
    """Which passes a count means: one is the search's, more are fresh as a confirmation's; an exact one needs one."""
    return SEARCH_PASSES if count == 1 else range(FRESH_FROM, FRESH_FROM + (1 if evaluator.exact else count))


def measure(
    evaluator: Evaluator,
    windows: Windows,
    params: Mapping[str, Any],
    *,
    passes: Sequence[int] = SEARCH_PASSES,
    on_batch: Callable[[int], None] = lambda windows: None,
) -> MeasuredRow:
    """Measure one configuration; its measurement is that of `Evaluator.measure`, bit for bit.

    on_batch: takes the number of windows of every batch that is done. Raises what `Evaluator.measure` raises.
    """
    return measure_keys(evaluator, windows, params, (windows.key,), passes=passes, on_batch=on_batch)[windows.key]


def measure_keys(
    evaluator: Evaluator,
    windows: Windows,
    params: Mapping[str, Any],
    keys: Sequence[str],
    *,
    passes: Sequence[int] = SEARCH_PASSES,
    kind: SeedKind = SeedKind.STUDY,
    on_batch: Callable[[int], None] = lambda windows: None,
) -> dict[str, MeasuredRow]:
    """Measure one configuration on several prices of a bar at once: by key what `measure` says of `windows.of_key`.

    kind: with SeedKind.SERVED each window is measured alone, as it is served. The first key has the seconds of all.
    Raises what `Evaluator.measure` raises.
    """
    before, fresh, fresh_s = dict(evaluator.seconds), evaluator.fresh, evaluator.fresh_s
    asked = {key: windows.of_key(key) for key in keys}
    errors = {key: np.empty((len(passes), len(windows))) for key in keys}
    points, by_step = ({key: np.empty((len(windows), windows.horizon)) for key in keys} for _ in range(2))
    for indices in (
        [[index] for index in range(len(windows))] if kind is SeedKind.SERVED else evaluator.batches(windows)
    ):
        found_by_key = evaluator.batch_key_points(windows, params, indices, keys, passes=passes, kind=kind)
        for key, found in found_by_key.items():
            errors[key][:, indices] = price_errors(asked[key], indices, found)
            points[key][indices] = found[0]
            by_step[key][indices] = np.abs(found - asked[key].actuals[indices]).mean(axis=0)
        on_batch(len(indices))
    spent = {stage: evaluator.seconds[stage] - before[stage] for stage in STAGES}
    latency_s = (evaluator.fresh_s - fresh_s) / (evaluator.fresh - fresh) if evaluator.fresh > fresh else None
    served = key_forecasts(points)
    return {
        key: MeasuredRow(
            measurement=measurement_of(
                asked[key],
                *over_passes(errors[key]),
                passes=len(passes),
                seconds=spent if key == keys[0] else {},
                latency_s=latency_s if key == keys[0] else None,
            ),
            by_step=_by_step(windows, by_step[key]),
            points=points[key],
            repaired=served.repairs_of(key) if len(keys) > 1 else None,
        )
        for key in keys
    }


def measure_points(windows: Windows, points: np.ndarray) -> MeasuredRow:
    """How given point forecasts, price [W, H], did: a baseline's."""
    errors = over_passes(price_errors(windows, range(len(windows)), points[None]))
    measurement = measurement_of(windows, *errors, passes=1, seconds={}, latency_s=None)
    return MeasuredRow(
        measurement=measurement, by_step=_by_step(windows, np.abs(points - windows.actuals)), points=points
    )


def _by_step(windows: Windows, errors: np.ndarray) -> np.ndarray:
    return (errors / windows.last_closes[:, None]).mean(axis=0)


# --- one against another ------------------------------------------------------------------------------------


def paired_improvement(
    windows: Windows, old: Sequence[float] | np.ndarray, new: Sequence[float] | np.ndarray
) -> PairedImprovement | None:
    """What errors `new` gain over `old`, both [W] on these windows, in order; None where `old` has no error at all.

    The interval is that of promotions, by the stationary bootstrap, in blocks of at least as many windows as overlap.
    There is none where fewer than 20 windows that share no bar have room.
    """
    before, after = np.asarray(old, dtype=float), np.asarray(new, dtype=float)
    level = before.mean()
    if not level > 0:
        return None
    interval = None
    if effective_windows(windows) >= promotion.MIN_WINDOWS:
        overlapping = math.ceil(windows.horizon * (len(windows) - 1) / (windows.origins[-1] - windows.origins[0]))
        resampled = promotion.resampled_gains(before / level, after / level, least_block=overlapping)
        if resampled is None:  # nothing varies: the gain of every window is the same
            resampled = np.array([1 - after.mean() / level])
        interval = promotion.interval_of(resampled)
    return PairedImprovement(value=float(1 - after.mean() / level), interval=interval)


# --- naive baselines ----------------------------------------------------------------------------------------


def no_change(windows: Windows) -> np.ndarray:
    """`Windows.no_change` for every step, price [W, H]."""
    return np.repeat(windows.no_change[:, None], windows.horizon, axis=1)


def drift(windows: Windows) -> np.ndarray:
    """`Windows.no_change` going on with the mean log return of the last 250 closes, or of all, price [W, H]."""
    logs = np.log(windows.bars.close)
    last = np.array(windows.origins) - 1
    first = np.maximum(last - DRIFT_BARS, 0)
    slope = (logs[last] - logs[first]) / np.maximum(last - first, 1)
    return windows.no_change[:, None] * np.exp(slope[:, None] * np.arange(1, windows.horizon + 1))


def block_persistence(closes: np.ndarray, horizon: int) -> float | None:
    """The predecessor's "h64 MAE%": every whole block of `horizon` bars of a file predicts the next by its last close.

    100 x mean |error| / mean of all prices. It is of the whole file and no model's error on any windows, so that it
    compares with nothing else. None for a file of fewer than two blocks' bars.
    """
    starts = range(0, len(closes) - horizon, horizon)
    errors = [np.abs(closes[start + horizon : start + 2 * horizon] - closes[start + horizon - 1]) for start in starts]
    return float(100 * np.concatenate(errors).mean() / closes.mean()) if errors else None
