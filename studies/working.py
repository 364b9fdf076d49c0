"""Do what a claimed slot of a study asks for: a trial, a baseline, the confirmation or a share of it.

Knows Optuna and the slots. Knows nothing of processes, devices or commands.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from objectives.costs import AssetClass
from objectives.evaluation import STAGES, Evaluator
from objectives.metrics import Measurement
from objectives.strategies import Strategy
from objectives.windows import SeedKind
from storage import DatabaseUnavailable, retrying, slots
from storage.retrying import ClaimLost, RetryingStorage
from storage.slots import Slot
from studies import confirmation, returns, sharing
from studies.evidence import measurement_json, params_text, to_json
from studies.measuring import Computing, Stopped
from studies.study import SEARCH_PASSES, StudyRun

SOON_S = 0.2  # after so short a trial the next is likely as short: over before another worker's sampler looks


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a claimed slot.

    `state` is "complete", "pruned", "measured", "shared", "confirmed", "stopped", "left" or "lost".
    """

    state: str
    number: int
    text: str


class StageClock:
    """Where a worker's time goes, from the end of one slot to that of the next.

    Stages of the evaluation, "sample" (the sampler), "read" (bars), "storage" (waiting for the database), "idle"
    (nothing to claim) and "other".
    """

    def __init__(self, storage: RetryingStorage, evaluators: Iterable[Evaluator]) -> None:
        self._storage, self._evaluators = storage, list(evaluators)
        self._before = self._totals()
        self._began = time.perf_counter()
        self._timed = {"sample": 0.0, "read": 0.0, "idle": 0.0}
        self.spent: dict[str, float] = {}  # of all laps
        self.latest = math.inf  # seconds of the latest lap

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Counts as "sample", "read" or "idle" what is spent inside, but for the database's part."""
        began, storage = time.perf_counter(), self._storage.seconds
        try:
            yield
        finally:
            self._timed[name] += time.perf_counter() - began - (self._storage.seconds - storage)

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, by what they went into; the next lap begins."""
        now, totals = time.perf_counter(), self._totals()
        spent = {name: totals[name] - self._before[name] for name in totals} | self._timed
        spent["other"] = max(0.0, now - self._began - sum(spent.values()))
        self.latest = now - self._began
        self._before, self._began, self._timed = totals, now, dict.fromkeys(self._timed, 0.0)
        self.spent = {name: self.spent.get(name, 0.0) + seconds for name, seconds in spent.items()}
        return {name: round(seconds, 6) for name, seconds in spent.items()}

    def _totals(self) -> dict[str, float]:
        stages = {stage: sum(each.seconds[stage] for each in self._evaluators) for stage in STAGES}
        return {**stages, "storage": self._storage.seconds}


def work(
    storage: RetryingStorage,
    run: StudyRun,
    slot: Slot,
    evaluator: Evaluator,
    *,
    attrs: Mapping[str, str],
    clock: StageClock,
    computing: Computing = contextlib.nullcontext,
) -> Outcome:
    """Do what a claimed slot asks for and finish it.

    attrs: user attributes of a new trial, such as its worker and device.
    computing: a context in which a request to stop raises Stopped. It ends a confirmation or a share of one, which is
    free again, while what is measured is kept; trials and baselines are finished.
    Raises ForecastError after failing the slot's trial; the slot itself is the caller's to fail.
    """
    if slot.stage == slots.TRIAL:
        return _run_trial(storage, run, slot, evaluator, attrs=attrs, clock=clock)
    if slot.stage == slots.BASELINE:
        assert slot.params is not None
        measured = evaluator.measure(run.split.validation, slot.params, passes=SEARCH_PASSES)
        result = {"params": dict(slot.params), "validation": measurement_json(measured)}
        kept = slots.finish(storage, slot, result=result, seconds=clock.lap())
        text = f"{slot.label} mae={measured.mae:.6g} skill={measured.skill:+.4f}"
        return Outcome(state="measured" if kept else "lost", number=slot.number, text=text)
    try:
        if slot.stage == slots.SHARE:
            return _do_share(storage, run, slot, evaluator, clock=clock, computing=computing)
        return _confirm(storage, run, slot, evaluator, clock=clock, computing=computing)
    except Stopped:
        slots.release(storage, slot)
        return Outcome(state="stopped", number=slot.number, text="goes on where it was when it is claimed again")


def _confirm(
    storage: RetryingStorage,
    run: StudyRun,
    slot: Slot,
    evaluator: Evaluator,
    *,
    clock: StageClock,
    computing: Computing,
) -> Outcome:
    try:
        concluded = sharing.plan_or_conclude(storage, run, slot, evaluator, computing=computing)
    except ClaimLost:  # frozen for longer than a lease
        return Outcome(state="lost", number=slot.number, text="before it was confirmed")
    if concluded is None:
        return Outcome(state="shared", number=slot.number, text="the confirmation is shared out")
    evidence, others = concluded
    seconds = {name: spent + others.get(name, 0.0) for name, spent in clock.lap().items()}
    finished = slots.finish(storage, slot, result=to_json(evidence), seconds=seconds)
    return Outcome(state="confirmed" if finished else "lost", number=slot.number, text=confirmation.summary(evidence))


def _do_share(
    storage: RetryingStorage,
    run: StudyRun,
    slot: Slot,
    evaluator: Evaluator,
    *,
    clock: StageClock,
    computing: Computing,
) -> Outcome:
    done = sharing.do_share(storage, run, slot, evaluator, computing=computing)
    if done is None:
        return Outcome(state="left", number=slot.number, text="a share that is no longer asked for")
    result, text = done
    finished = slots.finish(storage, slot, result=result, seconds=clock.lap())
    return Outcome(state="measured" if finished else "lost", number=slot.number, text=text)


def _run_trial(
    storage: RetryingStorage,
    run: StudyRun,
    slot: Slot,
    evaluator: Evaluator,
    *,
    attrs: Mapping[str, str],
    clock: StageClock,
) -> Outcome:
    try:
        trial = _new_trial(storage, run, slot, attrs=attrs)
    except ClaimLost:  # frozen between the claim and here
        return Outcome(state="lost", number=slot.number, text="before its trial began")
    reported: list[float] = []
    traded = returns.traded_by(run.study.definition)

    def report(windows_done: int, mae: float) -> None:
        reported.append(mae)
        trial.report(mae, step=windows_done)
        if trial.should_prune():
            raise optuna.TrialPruned

    # Not Study.tell, which reads the trial before and after.
    def end(state: TrialState, *values: float) -> None:
        seconds = clock.lap()
        storage.end_trial(
            trial._trial_id, state, values, lambda connection: slots.finish_within(connection, slot, seconds=seconds)
        )

    try:
        try:
            with clock.timing("sample"):
                params = run.space.suggest(trial)
            if (clipped := run.clipped(params)) is not None:
                trial.set_user_attr("clipped", clipped)
            if clock.latest > SOON_S:
                storage.write_deferred(trial._trial_id)  # the samplers of others go by what is under way
            # Optuna prunes by one value only.
            on_rung = None if traded else report
            measured = evaluator.measure(run.split.validation, params, passes=SEARCH_PASSES, on_rung=on_rung)
            earned = [_earned(run, evaluator, params, *traded)] if traded else []
            for name, value in readable(measured).items():
                trial.set_user_attr(name, value)
        except optuna.TrialPruned:
            end(TrialState.PRUNED, reported[-1])
            return Outcome(
                state="pruned", number=trial.number, text=f"{params_text(trial.params)} mae={reported[-1]:.6g}"
            )
        except DatabaseUnavailable:  # it was waited for: whoever reaps the lease fails the trial
            raise
        except BaseException:  # an error or a second signal: nothing may stay RUNNING
            with contextlib.suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            raise
        end(TrialState.COMPLETE, measured.mae, *earned)
    except UpdateFinishedTrialError:  # the lease was lost, and with it the trial
        return Outcome(state="lost", number=trial.number, text=params_text(trial.params))
    text = f"{params_text(trial.params)} mae={measured.mae:.6g} skill={measured.skill:+.4f}"
    text += "".join(f" return={value:+.6f}" for value in earned)
    return Outcome(state="complete", number=trial.number, text=text)


def _earned(
    run: StudyRun, evaluator: Evaluator, params: Mapping[str, Any], strategy: Strategy, asset: AssetClass
) -> float:
    """The mean net return a bar of a strategy on the windows of the search, traded on these params' forecasts there.

    Fills are conservative and offsets zero. The forecasts are those that the error is of: the evaluator has kept them.
    Raises ForecastError.
    """
    from studies.backtesting import forecasts_of, returns_of  # here: other searches do not need what trades

    windows = run.split.validation
    forecasts = forecasts_of(evaluator, windows, params, [strategy], kind=SeedKind.STUDY)
    return float(returns_of(strategy, windows, asset, forecasts).mean())


def _new_trial(storage: RetryingStorage, run: StudyRun, slot: Slot, *, attrs: Mapping[str, str]) -> optuna.Trial:
    """A RUNNING trial that carries its claim from its first moment, so that a crash leaves no unowned one."""
    system_attrs: dict[str, Any] = {retrying.CLAIM_ATTR: slot.claim}
    if slot.params is not None:
        system_attrs["fixed_params"] = dict(slot.params)
    user_attrs = {**attrs, **({"label": slot.label} if slot.label else {})}
    template = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=system_attrs, user_attrs=user_attrs)
    run.optuna_study._thread_local.cached_all_trials = None  # as Study.ask does: the sampler is to read anew
    trial_id = run.optuna_study._storage.create_new_trial(run.study.study_id, template_trial=template)
    storage.defer_writes(trial_id)
    return optuna.Trial(run.optuna_study, trial_id)


def readable(measured: Measurement) -> dict[str, float]:
    """A measurement as numbers that people sort trials by, each by itself; seconds by stage."""
    seconds = {f"{stage}_s": round(spent, 6) for stage, spent in measured.seconds.items()}
    numbers = {"mae": measured.mae, "mae_percent": measured.mae_percent, "price_mae": measured.price_mae}
    return {**numbers, "skill": measured.skill, **seconds}
