"""One parameter, or two, varied with everything else fixed: measured on equal windows with equal seeds.

Every number is that of measuring the configuration alone. Knows no files, databases or commands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forecasters.models import MODELS
from objectives.bootstrap import resampled_indices
from objectives.evaluation import Evaluator
from objectives.metrics import Measurement, measurement_of, over_passes
from objectives.windows import Windows
from studies import promotion
from studies.comparing import PairedImprovement, effective_windows, paired_improvement


@dataclass(frozen=True, kw_only=True)
class SweptCell:
    """One value of each swept parameter, and how the configuration with it did."""

    values: Mapping[str, Any]
    params: Mapping[str, Any]
    measurement: Measurement
    improvement: PairedImprovement | None  # over the current values; None where those have no error at all
    current: bool


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All combinations of the swept values, in their order."""

    names: Sequence[str]
    cells: Sequence[SweptCell]
    base: Mapping[str, Any]  # params with the current values
    current: Measurement
    p_value: float | None  # chance of so large a gain where no value is better than the current one

    @property
    def best(self) -> SweptCell:
        return min(self.cells, key=lambda one: one.measurement.mae)


def sweep(
    evaluator: Evaluator,
    windows: Windows,
    base: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    *,
    passes: Sequence[int],
    on_batch: Callable[[int], None] = lambda windows: None,
) -> Sweep:
    """Measure every combination of the values, and `base`, in which the swept names have their current values.

    All are measured batch by batch, so that what one of them encodes and draws is there for the others: an evaluator
    that draws as many samples as the largest number asked for draws once for all numbers of samples and aggregates.
    on_batch: takes the number of windows of every batch that is done. Raises ForecastError.
    """
    settled = MODELS[evaluator.forecaster.model].settled
    combinations = combinations_of(axes)
    everyone = [settled(base), *(settled({**base, **values}) for values in combinations)]
    order = sorted(range(len(everyone)), key=lambda place: _stages(evaluator, everyone[place]))
    errors = np.empty((len(everyone), len(passes), len(windows)))  # price
    for number, indices in itertools.product(range(len(passes)), evaluator.batches(windows)):
        known: dict[str, np.ndarray] = {}  # two values may make one configuration, as where the other decides
        for place in order:
            key = repr(sorted(everyone[place].items()))
            if key not in known:
                (known[key],) = evaluator.batch_errors(
                    windows, everyone[place], indices, passes=passes[number : number + 1]
                )
            errors[place, number, indices] = known[key]
        on_batch(len(indices))
    current, *measured = (
        measurement_of(windows, *over_passes(each), passes=len(passes), seconds={}, latency_s=None) for each in errors
    )
    cells = [
        SweptCell(
            values=values,
            params=params,
            measurement=one,
            improvement=paired_improvement(windows, current.errors, one.errors),
            current=params == everyone[0],
        )
        for values, params, one in zip(combinations, everyone[1:], measured, strict=True)
    ]
    return Sweep(
        names=tuple(axes),
        cells=cells,
        base=everyone[0],
        current=current,
        p_value=superior_p(windows, np.array(current.errors), np.array([one.errors for one in measured])),
    )


def most_samples(model: str, base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> int | None:
    """The largest number of samples that a sweep asks for; None: it is exact."""
    name = MODELS[model].params.num_samples
    return max([base[name], *axes.get(name, ())]) if name in base else None


def combinations_of(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, in their order."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _stages(evaluator: Evaluator, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Sorts together what shares an encoding, then what shares a draw, then what shares its order."""
    stages = evaluator.forecaster.params
    draws = [name for name in stages.draw if name != stages.num_samples]
    others = [name for name in params if name not in (*stages.encode, *stages.draw)]
    return tuple(repr(params.get(name)) for name in (*stages.encode, *draws, stages.num_samples, *others))


def superior_p(windows: Windows, old: np.ndarray, new: np.ndarray) -> float | None:
    """The chance that the best of many gains as much as this where none is better: the test for superior predictive
    ability of Hansen (2005), studentised, with the windows resampled as for an interval.

    old: errors [W] of what is in use. new: those of the others, [K, W]. None where nothing varies, or fewer than 20
    windows that share no bar have room.
    """
    gains = old - new  # [K, W]
    gains = gains[gains.std(axis=1) > 1e-12 * max(old.mean(), 1e-300)]
    if not len(gains) or effective_windows(windows) < promotion.MIN_WINDOWS:
        return None
    level = old.mean()
    blocks = [promotion.block_length(one / level) or 1 for one in gains]
    overlapping = math.ceil(windows.horizon * (len(windows) - 1) / (windows.origins[-1] - windows.origins[0]))
    # The middle one of the estimates: the longest of many is so by chance, and too long a block sees too little noise.
    block = max(math.ceil(np.median(blocks)), overlapping)
    indices = resampled_indices(len(old), block, promotion.INTERVAL_REPETITIONS, promotion.SEED)
    shares = np.stack([np.bincount(one, minlength=len(old)) for one in indices]) / len(old)  # [R, W]
    means, spreads = gains.mean(axis=1), gains.std(axis=1)  # [K]
    resampled = shares @ gains.T  # [R, K], and their spreads, each of its own windows: few windows have wide tails
    own = np.sqrt(np.maximum(shares @ (gains**2).T - resampled**2, (0.01 * spreads) ** 2))
    scores = means / spreads
    # One that is clearly worse says nothing of how far the best of the others goes by chance.
    hopeful = scores >= -math.sqrt(2 * math.log(math.log(len(old))) / len(old))
    by_chance = np.maximum(((resampled - np.where(hopeful, means, 0.0)) / own).max(axis=1), 0.0)  # [R]
    # This many repetitions cannot tell less from nothing.
    return max(float((by_chance >= max(scores.max(), 0.0)).mean()), 1 / len(indices))
