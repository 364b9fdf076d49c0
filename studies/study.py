"""Open, resume and finish a study; run one claimed slot of it.

A study is SYMBOL/model@AS_OF in Optuna, with a definition (its user attribute) that says what its numbers mean.
Knows Optuna and the slots. Knows nothing of processes, devices or commands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from forecasters import Bars, ForecastError
from objectives import windows
from objectives.mae import Evaluator, Measurement, measure_no_change
from objectives.windows import Split
from storage import DatabaseUnavailable, configs, database, slots
from storage.database import ClaimLost, RetryingStorage
from storage.slots import Slot
from studies import sampler
from studies import space as spaces
from studies.config import Config
from studies.space import Space

log = logging.getLogger("studies")

METRIC = "pct_return_mae"
DEFINITION = "definition"  # study user attribute
NAME = re.compile(r"(?P<symbol>[A-Z0-9][A-Z0-9.-]*)/(?P<model>[a-z0-9]+)@(?P<as_of>[0-9TZ:.-]+)")
SEARCH_PASS, TEST_PASS = 0, 1  # passes: fresh seeds for what confirms the search


class StudyMismatch(ValueError):
    """A study was opened on other bars, windows, knobs or weights than are here now."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A symbol's bars as read."""

    symbol: str
    path: Path
    bars: Bars


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as the database has it."""

    study_id: int
    name: str
    symbol: str
    model: str
    as_of: str
    definition: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What opening found or made."""

    study: Study
    state: str  # "new", "resumed", "raised" or "finished"
    budget: int
    notes: tuple[str, ...]


# --- opening -------------------------------------------------------------------------------------------------


def read_series(config: Config, symbols: Sequence[str]) -> tuple[list[Series], list[str]]:
    """The bars of the symbols (none given: of the settings; none there: of every file), and notes for the user.

    Raises DataError.
    """
    folder = config.data.dir
    files, notes = windows.list_symbols(folder)
    notes = list(notes)
    wanted = [windows.check_symbol(symbol) for symbol in symbols or config.data.symbols] or sorted(files)
    missing = [symbol for symbol in wanted if symbol not in files]
    for symbol in missing:
        for path in sorted(folder.glob(f"{symbol}.*")):
            windows.read_bars(path)  # it is there but was passed over: say what is wrong with it
    if missing:
        raise windows.DataError(
            f"{folder}: no {missing[0]}.csv or {missing[0]}.parquet; the symbols there are {', '.join(sorted(files))}"
        )
    series = []
    for symbol in dict.fromkeys(wanted):
        bars, said = windows.read_bars(files[symbol])
        notes += said
        split_windows(config, symbol, bars)  # too few bars are refused before anything is made
        series.append(Series(symbol=symbol, path=files[symbol], bars=bars))
    return series, notes


def split_windows(config: Config, symbol: str, bars: Bars) -> Split:
    """The validation and test windows of a symbol. Raises DataError where there are too few bars."""
    counts = config.windows
    return windows.split(
        bars,
        symbol=symbol,
        horizon=counts.horizon,
        validation=counts.validation,
        test=counts.test,
        min_context=counts.min_context,
    )


def define(config: Config, series: Series, model: str, as_of: str, checkpoint: str) -> dict[str, Any]:
    """What the numbers of a study mean: equal definitions make comparable numbers. Raises DataError.

    checkpoint: the fingerprint of the forecaster's weights.
    """
    bars = windows.bars_until(series.bars, as_of)
    counts = config.windows
    validation = split_windows(config, series.symbol, bars).validation
    return {
        "symbol": series.symbol,
        "model": model,
        "as_of": as_of,
        "metric": METRIC,
        "objective": config.search.objective,
        "bars": windows.bars_fingerprint(bars),
        "windows": {
            "horizon": counts.horizon,
            "validation": counts.validation,
            "test": counts.test,
            "min_context": counts.min_context,
            "rung": config.search.rung,
        },
        "space": spaces.make(model, config).to_json(),
        "checkpoint": checkpoint,
        "no_change_mae": measure_no_change(validation),  # follows from bars and windows; kept for those who read
    }


MISMATCHES = {
    "objective": "its objective is another (sampled or exact), which never mix; set --objective back",
    "bars": "the bars up to its last bar are not those it was opened on; restore the file's history",
    "windows": "[windows] or [search] rung differ from those it was opened with; set them back",
    "space": "the model's search space differs from the one it was opened with; set it back",
    "checkpoint": "the model's checkpoint is not the one it was opened with; set it back",
    "metric": "its metric differs",
}


def check_definition(study: Study, now: Mapping[str, Any]) -> None:
    """Raises StudyMismatch naming the first part that changed."""
    for part, reason in MISMATCHES.items():
        if study.definition.get(part) != now[part]:
            raise StudyMismatch(
                f"study {study.name}: {reason}, or set the study aside with: studies retire {study.name}"
            )


def fingerprint(definition: Mapping[str, Any]) -> str:
    """Of a whole definition."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def list_studies(storage: RetryingStorage) -> list[Study]:
    """Every study of ours, sorted by name; retired and foreign ones are not among them."""
    studies = []
    for found in storage.get_all_studies():
        match = NAME.fullmatch(found.study_name)
        definition = found.user_attrs.get(DEFINITION)
        if match and isinstance(definition, dict):
            studies.append(
                Study(study_id=found._study_id, name=found.study_name, definition=definition, **match.groupdict())
            )
    return sorted(studies, key=lambda study: study.name)


def open_studies(
    storage: RetryingStorage,
    config: Config,
    series: Iterable[Series],
    models: Sequence[str],
    checkpoints: Mapping[str, str],
) -> list[Opened]:
    """Find or make the study of every symbol and model. All are checked before the first is made.

    An unfinished study goes on, at the bars up to its AS_OF. Where there is none, a finished one at the newest bar is
    left alone unless the budget was raised; else a new one opens there.
    checkpoints: the fingerprint of each model's weights.
    Raises DataError, StudyMismatch, ConfigFileError.
    """
    progress = slots.progress(storage)
    existing: dict[tuple[str, str], list[Study]] = {}
    for study in list_studies(storage):
        existing.setdefault((study.symbol, study.model), []).append(study)

    plans: list[Callable[[], Opened]] = []
    for item in series:
        newest = windows.timestamp_text(item.bars.timestamps[-1])
        for model in models:
            found = existing.get((item.symbol, model), [])
            unfinished = [s for s in found if (p := progress.get(s.study_id)) and (p.open or p.parked)]
            current = [s for s in found if s.as_of == newest]
            study = (unfinished or current or [None])[0]
            as_of = study.as_of if study else newest
            try:
                definition = define(config, item, model, as_of, checkpoints[model])
            except windows.DataError as error:
                raise windows.DataError(f"{item.path}: {error}; study {item.symbol}/{model}@{as_of} needs it") from None
            if study:
                check_definition(study, definition)
                plans.append(_resume_later(storage, config, study))
            else:
                baselines, notes = _baselines(config, item.symbol, model, spaces.make(model, config))
                plans.append(_create_later(storage, config, definition, baselines, notes))
    return [plan() for plan in plans]


def _resume_later(storage: RetryingStorage, config: Config, study: Study) -> Callable[[], Opened]:
    def resume() -> Opened:
        def extend(connection: Any) -> int:
            unparked = slots.unpark(connection, study.study_id)
            added = slots.raise_budget(connection, study.study_id, config.search.trials)
            if added or unparked:  # what was confirmed did not know of the trials to come
                slots.reopen(connection, study.study_id, slots.CONFIRMATION)
            return added

        added = storage.transaction(extend)
        now = slots.progress(storage)[study.study_id]
        state = "raised" if added else "resumed" if now.open else "finished"
        notes = ()
        if now.budget > config.search.trials:
            notes = (f"{study.name} keeps its budget of {now.budget} trials; a budget is never lowered",)
        return Opened(study=study, state=state, budget=now.budget, notes=notes)

    return resume


def _create_later(
    storage: RetryingStorage,
    config: Config,
    definition: dict[str, Any],
    baselines: Sequence[tuple[str, dict[str, Any]]],
    notes: tuple[str, ...],
) -> Callable[[], Opened]:
    name = f"{definition['symbol']}/{definition['model']}@{definition['as_of']}"
    space = spaces.make(definition["model"], config)

    def fill(connection: Any, study_id: int) -> None:
        for number, (label, params) in enumerate(baselines):
            slots.add(connection, study_id, slots.BASELINE, number, label=label, params=params)
        # What is known to work starts the search, where the search could have proposed it.
        starts = {json.dumps(params): (label, params) for label, params in baselines if space.contains(params)}
        for number, (label, params) in enumerate(list(starts.values())[: config.search.trials]):
            slots.add(connection, study_id, slots.TRIAL, number, label=label, params=space.searched(params))
        slots.raise_budget(connection, study_id, config.search.trials)
        slots.add(connection, study_id, slots.CONFIRMATION, 0, label="confirmation")

    def create() -> Opened:
        study_id = database.create_study(storage, name, {DEFINITION: definition}, METRIC, fill)
        study = Study(
            study_id=study_id,
            name=name,
            symbol=definition["symbol"],
            model=definition["model"],
            as_of=definition["as_of"],
            definition=definition,
        )
        return Opened(study=study, state="new", budget=config.search.trials, notes=notes)

    return create


def _baselines(
    config: Config, symbol: str, model: str, space: Space
) -> tuple[list[tuple[str, dict[str, Any]]], tuple[str, ...]]:
    """The configurations in use that this model can measure: the incumbent and the model's stored one."""
    found: list[tuple[str, dict[str, Any]]] = []
    notes = []
    for label, folder in (("incumbent", "best"), ("stored", model)):
        record = configs.read(config.hyperparams.dir, folder, symbol)
        if record is None or record.model != model:
            continue
        try:
            params = spaces.from_promoted(model, record.config, space)
        except ValueError as error:
            notes.append(f"{record.path}: cannot be measured: {error}")
            continue
        if params not in [known for _, known in found]:
            found.append((label, params))
    return found, tuple(notes)


def retire(storage: RetryingStorage, name: str) -> str:
    """Set a study aside: it keeps its trials under another name and is not gone on with. Returns that name.

    Raises KeyError where there is no such study.
    """
    aside = f"{name}~{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    if not database.rename_study(storage, name, aside):
        raise KeyError(name)
    return aside


# --- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """A study as one worker works on it."""

    study: Study
    space: Space
    split: Split
    optuna_study: optuna.Study


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a claimed slot. `state` is "complete", "pruned", "measured", "confirmed" or "lost"."""

    state: str
    number: int
    text: str


def start(storage: RetryingStorage, config: Config, study: Study, series: Series, checkpoint: str) -> Run:
    """Make ready to work on a study. Raises DataError, StudyMismatch."""
    definition = define(config, series, study.model, study.as_of, checkpoint)
    check_definition(study, definition)
    space = spaces.make(study.model, config)
    return Run(
        study=study,
        space=space,
        split=split_windows(config, study.symbol, windows.bars_until(series.bars, study.as_of)),
        optuna_study=optuna.load_study(
            study_name=study.name,
            storage=storage,
            sampler=sampler.make_sampler(conditional=space.conditional),
            pruner=sampler.make_pruner(config.search.prune_worst),
        ),
    )


def work(storage: RetryingStorage, run: Run, slot: Slot, evaluator: Evaluator, *, worker: str, device: str) -> Outcome:
    """Do what a claimed slot asks for and finish it.

    Raises ForecastError after failing the slot's trial; the slot itself is the caller's to fail.
    """
    if slot.stage == slots.TRIAL:
        return _run_trial(storage, run, slot, evaluator, worker=worker, device=device)
    if slot.stage == slots.BASELINE:
        assert slot.params is not None
        measured = evaluator.measure(run.split.validation, slot.params, pass_number=SEARCH_PASS)
        result = {"params": dict(slot.params), "validation": describe(measured)}
        kept = slots.finish(storage, slot, result=result)
        text = f"{slot.label} mae={measured.mae:.6g} skill={measured.skill:+.4f}"
        return Outcome(state="measured" if kept else "lost", number=slot.number, text=text)
    result = confirm(storage, run, evaluator)
    kept = slots.finish(storage, slot, result=result)
    return Outcome(state="confirmed" if kept else "lost", number=slot.number, text=_confirmation_text(result))


def _run_trial(
    storage: RetryingStorage, run: Run, slot: Slot, evaluator: Evaluator, *, worker: str, device: str
) -> Outcome:
    try:
        trial = _new_trial(storage, run, slot, worker=worker, device=device)
    except ClaimLost:  # frozen between the claim and here
        return Outcome(state="lost", number=slot.number, text="before its trial began")
    reported: list[float] = []

    def report(windows_done: int, mae: float) -> None:
        reported.append(mae)
        trial.report(mae, step=windows_done)
        if trial.should_prune():
            raise optuna.TrialPruned

    # Not Study.tell, which reads the trial before and after.
    def end(state: TrialState, *values: float) -> None:
        storage.set_trial_state_values(trial._trial_id, state, values or None)

    try:
        try:
            params = run.space.suggest(trial)
            storage.write_deferred(trial._trial_id)  # the samplers of others go by what is under way
            measured = evaluator.measure(run.split.validation, params, pass_number=SEARCH_PASS, on_rung=report)
            trial.set_user_attr("measured", describe(measured))
        except optuna.TrialPruned:
            end(TrialState.PRUNED, reported[-1])
            slots.finish(storage, slot)
            return Outcome(state="pruned", number=trial.number, text=f"{_label(trial)} mae={reported[-1]:.6g}")
        except DatabaseUnavailable:  # it was waited for: whoever reaps the lease fails the trial
            raise
        except BaseException:  # an error or a second signal: nothing may stay RUNNING
            with contextlib.suppress(UpdateFinishedTrialError):
                end(TrialState.FAIL)
            raise
        end(TrialState.COMPLETE, measured.mae)
        slots.finish(storage, slot)
    except UpdateFinishedTrialError:  # the lease was lost, and with it the trial
        return Outcome(state="lost", number=trial.number, text=_label(trial))
    text = f"{_label(trial)} mae={measured.mae:.6g} skill={measured.skill:+.4f}"
    return Outcome(state="complete", number=trial.number, text=text)


def _label(trial: optuna.Trial) -> str:
    return " ".join(f"{name}={value}" for name, value in trial.params.items())


def _new_trial(storage: RetryingStorage, run: Run, slot: Slot, *, worker: str, device: str) -> optuna.Trial:
    """A RUNNING trial that carries its claim from its first moment, so that a crash leaves no unowned one."""
    attrs: dict[str, Any] = {database.CLAIM_ATTR: slot.claim}
    if slot.params is not None:
        attrs["fixed_params"] = dict(slot.params)
    user_attrs = {"worker": worker, "device": device} | ({"label": slot.label} if slot.label else {})
    template = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=attrs, user_attrs=user_attrs)
    run.optuna_study._thread_local.cached_all_trials = None  # as Study.ask does: the sampler is to read anew
    trial_id = run.optuna_study._storage.create_new_trial(run.study.study_id, template_trial=template)
    storage.defer_writes(trial_id)
    return optuna.Trial(run.optuna_study, trial_id)


def confirm(storage: RetryingStorage, run: Run, evaluator: Evaluator) -> dict[str, Any]:
    """Measure the best trial and the baselines on validation and, with fresh seeds, once on test.

    This is where more windows and repeats will make the numbers that promotion reads.
    """
    best = best_trial(run)
    candidate = None
    if best is not None:
        params = run.space.complete(best.params)
        candidate = {"trial": best.number, "params": params, **_measure_both(run, evaluator, params)}
    baselines = {
        label: {"params": result["params"], **_measure_both(run, evaluator, result["params"])}
        for label, result in slots.results(storage, run.study.study_id, slots.BASELINE).items()
    }
    no_change = {
        "validation": {"mae": measure_no_change(run.split.validation)},
        "test": {"mae": measure_no_change(run.split.test)},
    }
    return {"candidate": candidate, **baselines, "no_change": no_change}


def _measure_both(run: Run, evaluator: Evaluator, params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "validation": describe(evaluator.measure(run.split.validation, params, pass_number=SEARCH_PASS)),
        "test": describe(evaluator.measure(run.split.test, params, pass_number=TEST_PASS)),
    }


def best_trial(run: Run) -> FrozenTrial | None:
    """The complete trial with the smallest MAE; of equal ones the first."""
    trials = run.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(trials, key=lambda trial: (trial.value, trial.number), default=None)


def _confirmation_text(result: Mapping[str, Any]) -> str:
    if result["candidate"] is None:
        return "no complete trial"
    candidate = result["candidate"]
    return (
        f"trial {candidate['trial']} validation mae={candidate['validation']['mae']:.6g} "
        f"test mae={candidate['test']['mae']:.6g}"
    )


def describe(measured: Measurement) -> dict[str, Any]:
    """A measurement as JSON, without its per-window errors; seconds are summed over the stages."""
    values = asdict(measured)
    del values["errors"]
    values["seconds"] = {stage: round(seconds, 6) for stage, seconds in measured.seconds.items()}
    return values


EXPECTED_ERRORS = (ForecastError,)
