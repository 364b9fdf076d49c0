"""Confirm a study that has spent its budget: measure its best trials and what is in use once more, with fresh seeds.

The result is JSON that the study's confirmation slot keeps: what promotions rest on and pages show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from optuna.trial import TrialState

from forecasters import ForecastError
from objectives.bars import timestamp_text
from objectives.evaluation import Evaluator
from objectives.metrics import Measurement, measure_no_change, no_change_errors
from objectives.windows import Windows
from studies.study import SEARCH_PASSES, StudyRun, describe_windows

FRESH_FROM = 1  # first of the passes that a confirmation measures with: seeds that no trial was chosen by
CANDIDATES = 5  # trials that are confirmed
BAND = {"low": "quantile_0.10", "high": "quantile_0.90"}  # of a shown forecast


def confirm(run: StudyRun, evaluator: Evaluator, baselines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Measure the best trials and the baselines with fresh seeds, on the confirmation windows and once on test.

    baselines: params by label. One that cannot be measured says why under "error".
    Every configuration is measured with the same passes: as many as bring the error that sampling leaves in each MAE
    below the run's tolerance, two at least and `max_passes` at most; two where every draw runs the network.
    Raises ForecastError where a trial's configuration cannot be measured.
    """
    trials = best_trials(run, CANDIDATES)
    configurations = [*((None, params) for _, params in trials), *baselines.items()]
    passes = range(FRESH_FROM, FRESH_FROM + (1 if evaluator.exact else 2))
    confirmed: list[Measurement | str] = []
    for label, params in configurations:
        try:
            confirmed.append(evaluator.measure(run.confirmation, params, passes=passes))
        except ForecastError as error:
            if label is None:
                raise
            confirmed.append(str(error))
    needed = max((_passes_needed(run, one) for one in confirmed if isinstance(one, Measurement)), default=0)
    if run.confirmation.horizon > evaluator.forecaster.free_draw_horizon:
        needed = 2  # each further pass runs the network as often as a search of 40 trials does
    if needed > len(passes):
        passes = range(FRESH_FROM, FRESH_FROM + needed)
        confirmed = [
            one if isinstance(one, str) else evaluator.measure(run.confirmation, params, passes=passes)
            for (_, params), one in zip(configurations, confirmed, strict=True)
        ]

    def complete(params: Mapping[str, Any], one: Measurement | str) -> dict[str, Any]:
        if isinstance(one, str):
            return {"params": dict(params), "error": one}
        return {
            "params": dict(params),
            "validation": describe(evaluator.measure(run.split.validation, params, passes=SEARCH_PASSES), errors=True),
            "confirmation": describe(one, errors=True),
            "test": describe(evaluator.measure(run.split.test, params, passes=passes), errors=True),
        }

    def forecasts(found: Windows, pass_number: int) -> dict[str, Any]:
        series = {}
        for name, one in (("best", best), ("incumbent", in_use.get("incumbent"))):
            if one is not None and "error" not in one:
                number = {"trial": one["trial"]} if "trial" in one else {}
                series[name] = {**number, **_drawn(evaluator, found, one["params"], pass_number)}
        return {**_actuals(found), "series": series}

    completed = [complete(params, one) for (_, params), one in zip(configurations, confirmed, strict=True)]
    candidates = [{"trial": number, **one} for (number, _), one in zip(trials, completed, strict=False)]
    in_use = dict(zip(baselines, completed[len(trials) :], strict=True))
    best = min(candidates, key=lambda one: one["confirmation"]["mae"], default=None)
    uncertain = [one for one in confirmed if isinstance(one, Measurement) and one.sampling_error and one.mae]
    sets = {"validation": run.split.validation, "confirmation": run.confirmation, "test": run.split.test}
    return {
        "windows": {name: describe_windows(found) for name, found in sets.items()},
        "passes": len(passes),
        "sampling_error": max(((one.sampling_error or 0.0) / one.mae for one in uncertain), default=0.0),
        "candidates": candidates,
        "baselines": in_use,
        "no_change": {
            name: {"mae": measure_no_change(found), "errors": no_change_errors(found).tolist()}
            for name, found in sets.items()
        },
        "forecasts": {
            "validation": forecasts(run.split.validation, SEARCH_PASSES[0]),
            "test": forecasts(run.split.test, FRESH_FROM),
        },
    }


def best_trials(run: StudyRun, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Number and params of the complete trials with the smallest MAE, no params twice; of equal ones the first."""
    trials = run.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: list[tuple[int, dict[str, Any]]] = []
    for trial in sorted(trials, key=lambda trial: (trial.value, trial.number)):
        params = run.space.complete(trial.params)
        if params not in [known for _, known in found]:
            found.append((trial.number, params))
        if len(found) == count:
            break
    return found


def _passes_needed(run: StudyRun, measured: Measurement) -> int:
    """The standard error falls with the root of the number of passes; this was measured with two, or is exact."""
    if not measured.sampling_error:
        return 1
    allowed = run.tolerance * measured.mae
    if measured.sampling_error * math.sqrt(2 / run.max_passes) >= allowed:
        return run.max_passes
    return max(2, math.ceil(2 * (measured.sampling_error / allowed) ** 2))


def _apart(found: Windows) -> list[int]:
    """The windows that share no target bar, the last among them: together they are one stretch of bars."""
    return list(range(len(found) - 1, -1, -found.horizon))[::-1]


def _actuals(found: Windows) -> dict[str, Any]:
    """What happened in the windows that share no bar: times and closes of their targets, and where each begins."""
    apart = _apart(found)
    times = [
        timestamp_text(time)
        for index in apart
        for time in found.bars.timestamps[found.origins[index] : found.origins[index] + found.horizon]
    ]
    starts = [place * found.horizon for place in range(len(apart))]
    return {"times": times, "actual": found.actuals[apart].ravel().tolist(), "starts": starts}


def _drawn(evaluator: Evaluator, found: Windows, params: Mapping[str, Any], pass_number: int) -> dict[str, Any]:
    """The forecast of the same windows, with the 10 % and 90 % quantile of its samples where it has samples."""
    asked = {"points": params}
    if not evaluator.exact or "aggregate" in params:  # the exact answer of Kronos is a mean alone
        asked |= {name: {**params, "aggregate": quantile} for name, quantile in BAND.items()}
    return {
        name: evaluator.forecast(found, one, pass_number=pass_number)[_apart(found)].ravel().tolist()
        for name, one in asked.items()
    }


def describe(measured: Measurement, *, errors: bool = False) -> dict[str, Any]:
    """A measurement as JSON, with its per-window errors if asked; seconds are summed over the stages."""
    values = asdict(measured)
    values["seconds"] = {stage: round(seconds, 6) for stage, seconds in measured.seconds.items()}
    if not errors:
        del values["errors"], values["sampling_error"], values["latency_s"]
    return values


def summary(result: Mapping[str, Any]) -> str:
    """A confirmation in one line."""
    best = min(result["candidates"], key=lambda one: one["confirmation"]["mae"], default=None)
    if best is None:
        return "no complete trial"
    return (
        f"trial {best['trial']} of {len(result['candidates'])}, mae={best['confirmation']['mae']:.6g} "
        f"on {best['confirmation']['windows']} windows, test mae={best['test']['mae']:.6g}"
    )
