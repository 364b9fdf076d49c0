"""Confirm a study that has spent its budget: measure its candidates and what is in use, with fresh seeds.

The result is typed evidence (evidence.py), which promotions rest on and pages show. Which configurations are
candidates is candidates.py; how they are measured is measuring.py; who measures them is sharing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.trial import TrialState

from objectives.bars import timestamp_text
from objectives.evaluation import Evaluator
from objectives.metrics import measure_no_change, no_change_errors
from objectives.quantiles import unshrunk
from objectives.windows import Windows
from studies import candidates, ensembles, evidence, returns
from studies.candidates import Candidate
from studies.evidence import MeasuredConfiguration, Part, Source, StudyEvidence
from studies.measuring import FRESH_FROM, Computing, Entry, Measuring
from studies.series import window_span
from studies.study import SEARCH_PASSES, StudyRun

BAND = ("quantile_0.10", "quantile_0.90")  # of a forecast that is shown


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What a study's confirmation measures, and how far that is."""

    run: StudyRun
    evaluator: Evaluator
    candidates: Sequence[Candidate]
    in_use: Mapping[str, Mapping[str, Any]]  # params by label
    measuring: Measuring

    @property
    def portfolio(self) -> list[dict[str, Any]]:
        """What of the portfolio is among the candidates: whoever goes on chooses the same."""
        return [dict(one.params) for one in self.candidates if one.source == "portfolio"]

    def conclude(self, *, computing: Computing = contextlib.nullcontext) -> StudyEvidence:
        """The evidence, once nothing is left to be measured. Computes the forecasts that are shown. Raises Stopped."""
        measuring, in_use = self.measuring, self.in_use
        measured = measuring.measurements

        def complete(params: Mapping[str, Any], source: Source, trial: int | None = None) -> MeasuredConfiguration:
            place = next(place for place, one in enumerate(measuring.entries) if one.params == params)
            return MeasuredConfiguration(
                model=self.run.study.model,
                params=dict(params),
                trial=trial,
                source=source,
                clipped=self.run.clipped(params),
                error=measuring.errors.get(place),
                **measured[place],
            )

        completed = [complete(one.params, one.source, one.trial) for one in self.candidates]
        measured_in_use = {label: complete(params, "in use") for label, params in in_use.items()}
        shown = {
            "best": evidence.lowest(completed, lambda one: one.mae("confirmation")),
            "incumbent": measured_in_use.get(evidence.INCUMBENT),
        }
        shown_with: Mapping[Part, int] = {"validation": SEARCH_PASSES[0], "test": FRESH_FROM}
        with computing():
            forecasts: dict[Part, evidence.ForecastsShown] = {
                part: _forecasts(self.evaluator, measuring.windows[part], shown, number)
                for part, number in shown_with.items()
            }
            # What an ensemble can be made of.
            run = self.run
            best = ensembles.best_before(completed, run.confirmation.horizon, max_clipped=run.max_clipped)

            def with_points(one: MeasuredConfiguration) -> MeasuredConfiguration:
                return _with_points(self.evaluator, measuring.windows, one)

            completed = [with_points(one) if one is best else one for one in completed]
            measured_in_use = {label: with_points(one) for label, one in measured_in_use.items()}
        return StudyEvidence(
            windows={part: window_span(measuring.windows[part]) for part in evidence.PARTS},
            passes=measuring.passes,
            sampling_error=measuring.largest_sampling_error,
            candidates=tuple(completed),
            in_use=measured_in_use,
            no_change={
                part: evidence.NoChange(mae=measure_no_change(found), errors=tuple(no_change_errors(found).tolist()))
                for part, found in measuring.windows.items()
            },
            forecasts=forecasts,
            came={
                part: evidence.Came(
                    returns=_returns(found, found.actuals), last_closes=tuple(found.last_closes.tolist())
                )
                for part, found in measuring.windows.items()
            },
        )


def begin(
    run: StudyRun,
    evaluator: Evaluator,
    in_use: Mapping[str, Mapping[str, Any]],
    *,
    portfolio: Sequence[Mapping[str, Any]] = (),
) -> Confirmation:
    """Choose what is measured with fresh seeds, on the confirmation windows and once on test: candidates and `in_use`.

    Of a study that searches returns too, the trials of the Pareto front that earn the most are candidates as well.

    in_use: params by label. portfolio: what other symbols confirmed best, best first.
    A candidate that is no trial, and what is in use, says in its `error` why it could not be measured. So does a
    candidate that was dropped, as it could not win any more: never where configurations share their draws.
    Every configuration is measured with the same passes: as many as bring the error that sampling leaves in the MAE of
    each trial and of what is in use below the run's tolerance, two at least and `max_passes` at most; two where every
    draw runs the network.
    """
    trials = complete_trials(run)
    front = returns.front(run.optuna_study)[::-1] if run.study.pnl else []
    earning = [run.space.complete(trial.params) for trial in front]
    chosen = candidates.choose(run.space, trials, run.default, portfolio, front=earning)
    measuring = Measuring(run, evaluator, _entries(run, chosen, in_use))
    return Confirmation(run=run, evaluator=evaluator, candidates=chosen, in_use=in_use, measuring=measuring)


def confirm(
    run: StudyRun,
    evaluator: Evaluator,
    in_use: Mapping[str, Mapping[str, Any]],
    *,
    portfolio: Sequence[Mapping[str, Any]] = (),
) -> StudyEvidence:
    """Measure all of what `begin` chooses, here and alone.

    Raises ForecastError where a trial's configuration cannot be measured.
    """
    begun = begin(run, evaluator, in_use, portfolio=portfolio)
    begun.measuring.run()
    return begun.conclude()


def _with_points(
    evaluator: Evaluator, windows: Mapping[Part, Windows], one: MeasuredConfiguration
) -> MeasuredConfiguration:
    """A configuration with its points on all parts, of the first pass that each is measured with."""
    if one.error is not None:
        return one
    passes = {part: SEARCH_PASSES[0] if part == "validation" else FRESH_FROM for part in windows}
    points = {
        part: _returns(found, evaluator.forecast(found, one.params, pass_number=passes[part]))
        for part, found in windows.items()
    }
    return replace(one, points=points)


def _returns(windows: Windows, prices: np.ndarray) -> tuple[float, ...]:
    """Prices [W, H] as returns over the last close, [W * H]."""
    return tuple((prices / windows.last_closes[:, None] - 1).ravel().tolist())


def _entries(run: StudyRun, chosen: Sequence[Candidate], in_use: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """Everything to measure, each once: the candidates, then what is in use."""
    racing = not candidates.shared_knobs(run.space)
    used = list(in_use.values())
    entries = [
        Entry(
            params=one.params,
            decides=one.source == "trial" or one.params in used,
            races=racing and one.source != "default" and one.params not in used,
            required=one.source == "trial" and one.params not in used,
        )
        for one in chosen
    ]
    for params in used:
        if params not in [one.params for one in entries]:
            entries.append(Entry(params=params, decides=True, races=False, required=False))
    return entries


def complete_trials(run: StudyRun) -> list[tuple[int, dict[str, Any]]]:
    """Number and params of the complete trials, lowest MAE first, no params twice; of equal ones the first."""
    trials = run.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: dict[frozenset[Any], tuple[int, dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.values[0], trial.number)):
        params = run.space.complete(trial.params)
        found.setdefault(frozenset(params.items()), (trial.number, params))
    return list(found.values())


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
        low, high = [forecast(unshrunk(one.params, name)) for name in band] or ((), ())
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
        return "no candidate could be measured"
    return (
        f"{found.title(best)}, best of {len(found.candidates)}, mae={best.confirmation.mae:.6g} "
        f"on {best.confirmation.windows} windows, test mae={best.test.mae:.6g}"
    )
