"""Confirm a study that has spent its budget: measure its best trials and what is in use once more, with fresh seeds.

The result is typed evidence (evidence.py), which promotions rest on and pages show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import TrialState

from forecasters import ForecastError
from objectives.bars import timestamp_text
from objectives.evaluation import Evaluator
from objectives.metrics import Measurement, measure_no_change, no_change_errors
from objectives.windows import Windows
from studies import evidence
from studies.evidence import MeasuredConfiguration, Part, StudyEvidence
from studies.series import window_span
from studies.study import SEARCH_PASSES, StudyRun

FRESH_FROM = 1  # first of the passes that a confirmation measures with: seeds that no trial was chosen by
CANDIDATES = 5  # trials that are confirmed
BAND = ("quantile_0.10", "quantile_0.90")  # of a forecast that is shown


def confirm(run: StudyRun, evaluator: Evaluator, in_use: Mapping[str, Mapping[str, Any]]) -> StudyEvidence:
    """Measure the best trials and what is in use with fresh seeds, on the confirmation windows and once on test.

    in_use: params by label. One that cannot be measured says why in its `error`.
    Every configuration is measured with the same passes: as many as bring the error that sampling leaves in each MAE
    below the run's tolerance, two at least and `max_passes` at most; two where every draw runs the network.
    Raises ForecastError where a trial's configuration cannot be measured.
    """
    trials = best_trials(run, CANDIDATES)
    configurations = [*((number, params) for number, params in trials), *((None, params) for params in in_use.values())]
    passes = range(FRESH_FROM, FRESH_FROM + (1 if evaluator.exact else 2))
    confirmed: list[Measurement | str] = []
    for number, params in configurations:
        try:
            confirmed.append(evaluator.measure(run.confirmation, params, passes=passes))
        except ForecastError as error:
            if number is not None:
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

    def complete(number: int | None, params: Mapping[str, Any], one: Measurement | str) -> MeasuredConfiguration:
        if isinstance(one, str):
            return MeasuredConfiguration(model=run.study.model, params=dict(params), error=one)
        return MeasuredConfiguration(
            model=run.study.model,
            params=dict(params),
            trial=number,
            validation=evaluator.measure(run.split.validation, params, passes=SEARCH_PASSES),
            confirmation=one,
            test=evaluator.measure(run.split.test, params, passes=passes),
        )

    completed = [complete(number, params, one) for (number, params), one in zip(configurations, confirmed, strict=True)]
    candidates = completed[: len(trials)]
    measured_in_use = dict(zip(in_use, completed[len(trials) :], strict=True))
    shown = {
        "best": evidence.lowest(candidates, lambda one: one.mae("confirmation")),
        "incumbent": measured_in_use.get(evidence.INCUMBENT),
    }
    measured = [one for one in confirmed if isinstance(one, Measurement)]
    parts: dict[Part, Windows] = {
        "validation": run.split.validation,
        "confirmation": run.confirmation,
        "test": run.split.test,
    }
    shown_with: dict[Part, int] = {"validation": SEARCH_PASSES[0], "test": FRESH_FROM}
    return StudyEvidence(
        windows={part: window_span(found) for part, found in parts.items()},
        passes=len(passes),
        sampling_error=max(
            (one.sampling_error / one.mae for one in measured if one.sampling_error and one.mae), default=0.0
        ),
        candidates=tuple(candidates),
        in_use=measured_in_use,
        no_change={
            part: evidence.NoChange(mae=measure_no_change(found), errors=tuple(no_change_errors(found).tolist()))
            for part, found in parts.items()
        },
        forecasts={part: _forecasts(evaluator, parts[part], shown, number) for part, number in shown_with.items()},
    )


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


def _forecasts(
    evaluator: Evaluator, found: Windows, shown: Mapping[str, MeasuredConfiguration | None], pass_number: int
) -> evidence.ForecastsShown:
    """What happened in the windows that share no target bar, which make one stretch of bars, and what was forecast."""
    apart = list(range(len(found) - 1, -1, -found.horizon))[::-1]  # the last window among them

    def series(one: MeasuredConfiguration) -> evidence.ForecastSeries:
        def forecast(params: Mapping[str, Any]) -> tuple[float, ...]:
            return tuple(evaluator.forecast(found, params, pass_number=pass_number)[apart].ravel().tolist())

        # The exact answer of Kronos is a mean alone.
        band = BAND if not evaluator.exact or "aggregate" in one.params else ()
        low, high = [forecast({**one.params, "aggregate": name}) for name in band] or ((), ())
        return evidence.ForecastSeries(trial=one.trial, points=forecast(one.params), low=low, high=high)

    times = [
        timestamp_text(time)
        for index in apart
        for time in found.bars.timestamps[found.origins[index] : found.origins[index] + found.horizon]
    ]
    return evidence.ForecastsShown(
        times=tuple(times),
        actual=tuple(found.actuals[apart].ravel().tolist()),
        starts=tuple(place * found.horizon for place in range(len(apart))),
        series={name: series(one) for name, one in shown.items() if one is not None and one.error is None},
    )


def summary(found: StudyEvidence) -> str:
    """A confirmation in one line of a log."""
    best = found.best
    if best is None or best.confirmation is None or best.test is None:
        return "no complete trial"
    return (
        f"trial {best.trial}, best of {len(found.candidates)}, mae={best.confirmation.mae:.6g} "
        f"on {best.confirmation.windows} windows, test mae={best.test.mae:.6g}"
    )
