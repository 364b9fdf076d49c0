"""The smallest number of samples whose cost in MAE is small, and the promotion of a configuration with that number.

Samples cost their readers time and memory, and more of them only lower noise. Touches no study and no database.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forecasters import ForecastError, LoadedForecaster
from forecasters.models import MODELS
from objectives.bars import DataError, bars_fingerprint, timestamp_text
from objectives.evaluation import Evaluator
from objectives.metrics import Measurement, measure_no_change
from objectives.windows import Windows
from storage import history
from storage.configs import ConfigFileError, Record
from studies import evaluators, promotion
from studies import space as spaces
from studies.comparing import paired_improvement
from studies.config import Config
from studies.evidence import relative_gain
from studies.measuring import FRESH_FROM
from studies.promoted_file import metrics, versions
from studies.promoting import FOLDERS
from studies.series import Series, confirmation_windows, split_windows
from studies.study import METRIC, SEARCH_PASSES

FEWEST = 8  # samples that are tried
FIRST_PASSES, MOST_PASSES = 16, 64
WORTH_DOUBLING = (
    0.9  # of its width: a bound that twice the passes leave wider than this is one of windows, not of noise
)
CACHE_BYTES = 2**29
EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """What a number of samples costs."""

    samples: int
    cost: float  # MAE / MAE of the reference - 1
    bound: float  # one-sided, 95 %: of the cost on such windows

    @property
    def width(self) -> float:
        return self.bound - self.cost


@dataclass(frozen=True, kw_only=True)
class ReaderPaths:
    """Paths through the network that a reader of a promoted file runs for a forecast: its time and its memory."""

    total: int
    at_once: int


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What fewer samples of a configuration in use cost. `reduced` is None where none are shown to cost less."""

    symbol: str
    model: str
    samples: int
    reduced: int | None
    reference: str  # "exact", or the number of samples in use
    max_cost: float
    costs: Sequence[SampleCost]  # most samples first
    windows: int
    passes: int
    before: ReaderPaths | None  # None: the model runs no network
    after: ReaderPaths | None
    written: Sequence[str] = ()

    def cost_of(self, samples: int) -> SampleCost | None:
        return next((one for one in self.costs if one.samples == samples), None)


def reduce(
    config: Config, series: Series, record: Record, forecaster: LoadedForecaster, *, max_cost: float, apply: bool
) -> Reduction:
    """Find the smallest number of samples of a promoted configuration, and promote it where `apply` says so.

    Raises DataError, ForecastError and ConfigFileError, each naming the symbol or file.
    """
    config = replace(config, search=replace(config.search, objective="sampled"))
    space, model = spaces.make(record.model, config), MODELS[record.model]
    try:
        params = spaces.from_promoted(record.config, record.metadata, space)
    except ValueError as error:
        raise ConfigFileError(f"{record.path}: cannot be measured: {error}") from None
    windows = confirmation_windows(config, series.symbol, series.bars)
    if len(windows) < promotion.MIN_WINDOWS * windows.horizon:
        needed = promotion.MIN_WINDOWS * windows.horizon
        raise DataError(
            f"{series.path}: has {len(windows)} windows before test and needs {needed} to bound a cost; "
            "raise [windows] confirmation, or add older bars"
        )
    count = model.params.num_samples
    current = params[count]
    evaluator = Evaluator(
        forecaster,
        cache_bytes=CACHE_BYTES,
        rung=config.search.rung,
        batch=config.search.batch_size(record.model),
        max_num_samples=current,
        store=evaluators.kept_encodings(config, forecaster),
    )
    exact = exact_errors(config, forecaster, windows, params)
    costs, passes = costs_of(evaluator, windows, params, counts_below(config, record.model, current),
                             exact=exact, max_cost=max_cost)  # fmt: skip
    reduced = smallest(costs, current, max_cost)

    def paths(samples: int) -> ReaderPaths | None:
        if model.reader_paths is None:
            return None
        total, at_once = model.reader_paths(spaces.to_promoted({**params, count: samples}, space, config))
        return ReaderPaths(total=total, at_once=at_once)

    found = Reduction(
        symbol=series.symbol,
        model=record.model,
        samples=current,
        reduced=reduced,
        reference=EXACT if exact is not None else f"{current} samples",
        max_cost=max_cost,
        costs=costs,
        windows=len(windows),
        passes=passes,
        before=paths(current),
        after=None if reduced is None else paths(reduced),
    )
    if not apply or reduced is None:
        return found
    payload = _payload(config, series, record, evaluator, found, params)
    folders = (record.model, *FOLDERS)
    root = config.hyperparams.dir
    history.write(root, series.symbol, payload, folders=folders, expected_digest=record.digest)
    return replace(found, written=[str(root / folder / f"{series.symbol}.json") for folder in folders])


def counts_below(config: Config, model: str, current: int) -> list[int]:
    """The numbers of samples that are tried, most first: those of the settings and powers of two."""
    knob = MODELS[model].search(config.models[model]).knobs[MODELS[model].params.num_samples]
    assert isinstance(knob, tuple)
    powers = [2**n for n in range(FEWEST.bit_length() - 1, max(current, 1).bit_length())]
    return sorted({count for count in (*knob, *powers) if FEWEST <= count < current}, reverse=True)


def exact_errors(
    config: Config, forecaster: LoadedForecaster, windows: Windows, params: dict[str, Any]
) -> np.ndarray | None:
    """The error of every window without samples, [W]; None where the model has no such answer for these params."""
    model = MODELS[forecaster.model]
    if model.exact_horizon == 0 or (model.exact_horizon and windows.horizon > model.exact_horizon):
        return None
    asked = replace(config, search=replace(config.search, objective="exact"))
    evaluator = evaluators.evaluator_of(asked, forecaster, cache_bytes=CACHE_BYTES)
    without = {name: value for name, value in params.items() if name != model.params.num_samples}
    try:
        return np.array(evaluator.measure(windows, without, passes=(FRESH_FROM,)).errors)
    except (ForecastError, ValueError):  # an aggregate without a limit, a step past the first patch
        return None


def costs_of(
    evaluator: Evaluator,
    windows: Windows,
    params: dict[str, Any],
    counts: Sequence[int],
    *,
    exact: np.ndarray | None,
    max_cost: float,
) -> tuple[list[SampleCost], int]:
    """The cost of these numbers of samples, most first, that in use before them, and the passes it took to know.

    Each pass draws once for all of them. Passes are doubled until every bound that decides is narrower than half of
    `max_cost`, or windows are what keeps it wide. exact: errors to compare with; else those of the number in use.
    Raises ForecastError.
    """
    name = MODELS[evaluator.forecaster.model].params.num_samples
    tried = [params[name], *counts]
    total = {count: np.zeros(len(windows)) for count in tried}
    done, passes, before = 0, FIRST_PASSES, np.inf
    while True:
        for number in range(FRESH_FROM + done, FRESH_FROM + passes):
            for count in tried:
                total[count] += evaluator.measure(windows, {**params, name: count}, passes=(number,)).errors
        done = passes
        reference = exact if exact is not None else total[tried[0]] / done
        costs = [_cost(count, reference, total[count] / done, windows.horizon) for count in tried]
        widest = max((one.width for one in _deciding(costs[1:], max_cost)), default=0.0)
        if widest < max_cost / 2 or widest > WORTH_DOUBLING * before or done >= MOST_PASSES:
            return costs, done
        passes, before = 2 * done, widest


def _deciding(costs: Sequence[SampleCost], max_cost: float) -> list[SampleCost]:
    """Those down to the first that is too much, but for one that clearly is."""
    stop = next((place for place, one in enumerate(costs) if one.bound >= max_cost), len(costs) - 1)
    return [one for one in costs[: stop + 1] if one.cost - one.width < max_cost]


def _cost(samples: int, reference: np.ndarray, errors: np.ndarray, horizon: int) -> SampleCost:
    """By the stationary bootstrap over windows, which sees what the passes leave uncertain too."""
    level = reference.mean()
    if not level > 0:
        return SampleCost(samples=samples, cost=0.0, bound=0.0)
    cost = float(errors.mean() / level - 1)
    gains = promotion.resampled_gains(reference / level, errors / level, least_block=horizon)
    bound = cost if gains is None else max(cost, -float(np.quantile(gains, 1 - promotion.LEVEL)))
    return SampleCost(samples=samples, cost=cost, bound=bound)


def smallest(costs: Sequence[SampleCost], current: int, max_cost: float) -> int | None:
    """The last number below the current one, most first, whose bound and those of all before it are below `max_cost`.

    Tested in this order, and no further than the first that fails, all of it holds with 95 %.
    """
    found = None
    for one in costs:
        if one.samples < current:
            if one.bound >= max_cost:
                break
            found = one.samples
    return found


def _payload(
    config: Config, series: Series, record: Record, evaluator: Evaluator, found: Reduction, params: dict[str, Any]
) -> dict[str, Any]:
    """The promoted file with fewer samples: measured anew, and with what it replaced."""
    assert found.reduced is not None
    space, name = spaces.make(record.model, config), MODELS[record.model].params.num_samples
    split, confirmation = split_windows(config, series.symbol, series.bars), found.windows
    fresh = range(FRESH_FROM, FRESH_FROM + min(found.passes, config.windows.max_passes))
    parts = {
        "validation": (split.validation, SEARCH_PASSES),
        "confirmation": (confirmation_windows(config, series.symbol, series.bars), fresh),
        "test": (split.test, fresh),
    }
    new, old = (
        {part: evaluator.measure(windows, {**params, name: count}, passes=passes)
         for part, (windows, passes) in parts.items()}
        for count in (found.reduced, found.samples)
    )  # fmt: skip
    gains: dict[str, float | None] = {part: relative_gain(old[part].mae, new[part].mae) for part in parts}
    paired = paired_improvement(parts["confirmation"][0], old["confirmation"].errors, new["confirmation"].errors)
    decided: Measurement = new["confirmation"]
    cost = found.cost_of(found.reduced)
    assert cost is not None
    written = spaces.to_promoted({**params, name: found.reduced}, space, config)
    return {
        **record.raw,
        "symbol": series.symbol,
        "model": record.model,
        "config": {**record.config, **{key: written[key] for key in written if key in record.config or key == name}},
        **{part: metrics(measured) for part, measured in new.items()},
        "windows": {
            "val_window": len(split.validation),
            "confirmation_window": confirmation,
            "test_window": len(split.test),
            "forecast_horizon": split.test.horizon,
        },
        "config_path": f"{config.hyperparams.dir.name}/{record.model}/{series.symbol}.json",
        "metadata": {
            **record.metadata,
            "source": "forecast-studies",
            "as_of": timestamp_text(series.bars.timestamps[-1]),
            "promoted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "selection_metric": f"confirmation.{METRIC}",
            "selection_value": decided.mae,
            "previous_mae": old["confirmation"].mae,
            "previous_model": record.model,
            "previous_config": dict(record.config),
            "reason": "fewer samples",
            "improvement": gains["confirmation"],
            "improvement_own": gains["confirmation"],
            "improvement_interval": paired.interval if paired else None,
            "improvement_validation": gains["validation"],
            "improvement_test": gains["test"],
            "p_value": None,
            "pooled_symbols": 1,
            "skill": decided.skill,
            "worse_than_no_change": decided.skill < 0,
            "no_change_mae": measure_no_change(parts["confirmation"][0]),
            "passes": len(fresh),
            "sampling_error": decided.sampling_error / decided.mae if decided.sampling_error and decided.mae else 0.0,
            "reduction": {
                "samples_before": found.samples,
                "cost": cost.cost,
                "cost_bound": cost.bound,
                "max_cost": found.max_cost,
                "reference": found.reference,
                "passes": found.passes,
            },
            "fixed": {key: value for key, value in params.items() if key not in written},
            "checkpoint": evaluator.forecaster.fingerprint,
            "bars": bars_fingerprint(series.bars),
            "versions": versions(),
        },
    }
