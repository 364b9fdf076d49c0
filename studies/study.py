"""Open, resume and retire a study, ask for its confirmation anew; make it ready for a worker.

A study is SYMBOL/model@AS_OF in Optuna, with a definition (its user attribute) that says what its numbers mean.
Knows Optuna and the slots. Knows nothing of processes, devices or commands.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import optuna

from forecasters import ExpectedError
from forecasters.models import MODELS
from objectives.bars import DataError, bars_fingerprint, bars_until, timestamp_text
from objectives.metrics import measure_no_change
from objectives.windows import Split, Windows
from storage import configs, slots, study_rows, symbols
from storage.progress import Confirmation, Progress, progress_in, read_confirmations, study_progress
from storage.retrying import RetryingStorage
from studies import sampler
from studies import space as spaces
from studies.config import Config, ConfigError
from studies.evidence import INCUMBENT, MEASURED_PATHS, STORED
from studies.series import Series, confirmation_windows, split_windows, window_span
from studies.space import Space

METRIC = "pct_return_mae"
DEFINITION = "definition"  # study user attribute
NAME = re.compile(r"(?P<symbol>" + symbols.PATTERN + r")/(?P<model>[a-z0-9]+)@(?P<as_of>[0-9TZ:.-]+)")
ASIDE = "~"  # stands between the name that a retired study had and the time when it was set aside
MAX_NAME = 512  # characters of a study's name in Optuna's table
SEARCH_PASSES = (0,)  # the seeds of every trial
CLIP_ORIGINS = 1000  # the last ones, on which it is counted how often a configuration clips the last close
SAMPLING_SHARE = 0.1  # of min_improvement: what sampling alone may leave uncertain


class StudyMismatch(ExpectedError, ValueError):
    """A study was opened on other bars, windows, knobs or weights than are here now."""


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


def define(config: Config, series: Series, model: str, as_of: str, checkpoint: str) -> dict[str, Any]:
    """What the numbers of a study mean: equal definitions make comparable numbers. Raises DataError.

    checkpoint: the fingerprint of the forecaster's weights.
    """
    bars = bars_until(series.bars, as_of)
    counts, search = config.windows, config.search
    validation = split_windows(config, series.symbol, bars).validation
    # Where a forward has the windows of a rung there is no entry: definitions were once written without one.
    batch = {"batch": search.batch_size} if search.batch_size != search.rung else {}
    return {
        "symbol": series.symbol,
        "model": model,
        "as_of": as_of,
        "metric": METRIC,
        "objective": search.objective,
        "bars": bars_fingerprint(bars),
        "windows": {
            "horizon": counts.horizon,
            "validation": counts.validation,
            "test": counts.test,
            "min_context": counts.min_context,
            "rung": search.rung,
            **batch,
        },
        "space": spaces.make(model, config).to_json(),
        "checkpoint": checkpoint,
        "no_change_mae": measure_no_change(validation),  # follows from bars and windows; kept for those who read
    }


MISMATCHES = {
    "objective": "its objective is another (sampled or exact), which never mix; set --objective back",
    "bars": "the bars up to its last bar are not those it was opened on; restore the file's history",
    "windows": "[windows] or [search] rung or batch differ from those it was opened with; set them back",
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
    """SHA-256 of the definition, in hexadecimal."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def list_studies(storage: RetryingStorage, *, retired: bool = False) -> list[Study]:
    """Every study of ours, sorted by name; foreign ones are not among them. retired: those set aside, and no others."""
    studies = []
    for study_id, name, definition in study_rows.studies_with(storage, DEFINITION):
        before, aside, _ = name.partition(ASIDE)
        if bool(aside) is retired and (match := NAME.fullmatch(before)) and isinstance(definition, dict):
            studies.append(Study(study_id=study_id, name=name, definition=definition, **match.groupdict()))
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
    wanted = list(series)
    asked_for = {(item.symbol, model) for item in wanted for model in models}
    existing: dict[tuple[str, str], list[Study]] = {}
    for study in list_studies(storage):
        if (study.symbol, study.model) in asked_for:
            existing.setdefault((study.symbol, study.model), []).append(study)
    ids = [study.study_id for found in existing.values() for study in found]
    progress = study_progress(storage, ids)
    confirmations = read_confirmations(storage, ids, paths=MEASURED_PATHS)

    extensions: list[_Extension] = []
    plans: list[int | Callable[[], Opened]] = []  # the id of a study that is there, or what makes it
    for item in wanted:
        newest = timestamp_text(item.bars.timestamps[-1])
        for model in models:
            found = existing.get((item.symbol, model), [])
            unfinished = [s for s in found if (p := progress.get(s.study_id)) and (p.open or p.parked)]
            current = [s for s in found if s.as_of == newest]
            study = (unfinished or current or [None])[0]
            as_of = study.as_of if study else newest
            try:
                definition = define(config, item, model, as_of, checkpoints[model])
            except DataError as error:
                raise DataError(f"{item.path}: {error}; study {item.symbol}/{model}@{as_of} needs it") from None
            baselines, notes = _baselines(config, item.symbol, model, spaces.make(model, config))
            asked = confirmation_windows(config, item.symbol, bars_until(item.bars, as_of))
            if study:
                check_definition(study, definition)
                confirmation = confirmations.get(study.study_id)
                if confirmation is None:
                    raise _no_work(study)
                outdated = not _confirms(confirmation, baselines, asked)
                # What another machine found in use stays in the comparison.
                baselines = {**(confirmation.params or {}), **baselines}
                extensions.append(_Extension(study=study, baselines=baselines, outdated=outdated))
                plans.append(study.study_id)
            else:
                if len(asked) < config.windows.confirmation:
                    notes += (
                        f"{item.path}: has {len(asked)} windows to confirm on, not {config.windows.confirmation}",
                    )
                plans.append(partial(_create, storage, config, definition, baselines, notes))
    extended = _extend(storage, config.search.trials, extensions)
    return [extended[plan] if isinstance(plan, int) else plan() for plan in plans]


def _no_work(study: Study) -> StudyMismatch:
    return StudyMismatch(
        f"study {study.name}: has trials but no budget, as a copy made with Optuna; "
        f"set it aside with: studies retire {study.name}"
    )


def _confirms(found: Confirmation, in_use: Mapping[str, dict[str, Any]], asked: Windows) -> bool:
    """Whether a confirmation, done or to be done, is of these windows and knows these configurations in use.

    found: with the result that MEASURED_PATHS pick.
    """
    known = list((found.params or {}).values())
    if found.result is not None:
        known += found.result["candidates"]
        if found.result["windows"] != [asdict(window_span(asked))]:
            return False
    return all(params in known for params in in_use.values())


@dataclass(frozen=True, kw_only=True)
class _Extension:
    """A study to go on with, and what its confirmation is to measure beside its best trials."""

    study: Study
    baselines: Mapping[str, dict[str, Any]]
    outdated: bool  # what was confirmed is of other windows, or lacks a configuration in use


def _extend(storage: RetryingStorage, budget: int, extensions: Sequence[_Extension]) -> dict[int, Opened]:
    """Raise the budgets, free what is parked and ask for outdated confirmations anew, in one transaction.

    By study id. Only studies with something to change cost statements of their own.
    """
    by_id = {one.study.study_id: one for one in extensions}
    ids = sorted(by_id)  # two processes at the same studies wait for each other, in place of a deadlock

    def extend(connection: Any) -> tuple[set[int], dict[int, Progress]]:
        raised: set[int] = set()
        changed: list[int] = []
        before = progress_in(connection, ids)
        for study_id in ids:
            now, one = before[study_id], by_id[study_id]
            unparked = slots.unpark(connection, study_id) if now.parked else 0
            added = slots.raise_budget(connection, study_id, budget) if now.budget < budget else 0
            if added:
                raised.add(study_id)
            if added or unparked or one.outdated:  # what was confirmed did not know of what is to come
                slots.reopen(connection, study_id, slots.CONFIRMATION, params=one.baselines)
                changed.append(study_id)
        return raised, {**before, **(progress_in(connection, changed) if changed else {})}

    raised, progress = storage.transaction(extend) if ids else (set(), {})
    found = {}
    for study_id, one in by_id.items():
        now = progress[study_id]
        state = "raised" if study_id in raised else "resumed" if now.open else "finished"
        notes = ()
        if now.budget > budget:
            notes = (f"{one.study.name} keeps its budget of {now.budget} trials; a budget is never lowered",)
        found[study_id] = Opened(study=one.study, state=state, budget=now.budget, notes=notes)
    return found


def reconfirm(
    storage: RetryingStorage, config: Config, series: Series, study: Study, checkpoint: str
) -> tuple[str, ...]:
    """Ask for a finished study's confirmation anew, with the configurations in use now; returns notes for the user.

    Raises DataError, StudyMismatch, ConfigFileError, and ConfigError while trials are left.
    """
    check_definition(study, define(config, series, study.model, study.as_of, checkpoint))
    space = spaces.make(study.model, config)
    baselines, notes = _baselines(config, study.symbol, study.model, space)
    confirmation = read_confirmations(storage, [study.study_id], paths={}).get(study.study_id)
    if confirmation is None:
        raise _no_work(study)

    def ask(connection: Any) -> bool:
        if slots.open_trials(connection, study.study_id):
            return False
        params = {**(confirmation.params or {}), **baselines}
        slots.reopen(connection, study.study_id, slots.CONFIRMATION, params=params)
        return True

    if not storage.transaction(ask):
        raise ConfigError(
            f"study {study.name} has trials left; finish them with: launch-workers --symbols {study.symbol}"
        )
    return notes


def _create(
    storage: RetryingStorage,
    config: Config,
    definition: dict[str, Any],
    baselines: Mapping[str, dict[str, Any]],
    notes: tuple[str, ...],
) -> Opened:
    key = {part: definition[part] for part in ("symbol", "model", "as_of")}
    name = "{symbol}/{model}@{as_of}".format(**key)
    space = spaces.make(definition["model"], config)

    def fill(connection: Any, study_id: int) -> None:
        for number, (label, params) in enumerate(baselines.items()):
            slots.add(connection, study_id, slots.BASELINE, number, label=label, params=params)
        # What is known to work starts the search, where the search could have proposed it.
        starts = {json.dumps(params): (label, params) for label, params in baselines.items() if space.contains(params)}
        for number, (label, params) in enumerate(list(starts.values())[: config.search.trials]):
            slots.add(connection, study_id, slots.TRIAL, number, label=label, params=space.searched(params))
        slots.raise_budget(connection, study_id, config.search.trials)
        slots.add(connection, study_id, slots.CONFIRMATION, 0, label="confirmation", params=baselines)

    study_id = study_rows.create_study(storage, name, {DEFINITION: definition}, METRIC, fill)
    study = Study(study_id=study_id, name=name, definition=definition, **key)
    return Opened(study=study, state="new", budget=config.search.trials, notes=notes)


def _baselines(
    config: Config, symbol: str, model: str, space: Space
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The configurations in use that this model can measure: the incumbent and the model's stored one."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for label, folder in ((INCUMBENT, "best"), (STORED, model)):
        record = configs.read(config.hyperparams.dir, folder, symbol)
        if record is None or record.model != model:
            continue
        try:
            params = spaces.from_promoted(record.config, record.metadata, space)
        except ValueError as error:
            notes.append(f"{record.path}: cannot be measured: {error}")
            continue
        if params not in found.values():
            found[label] = params
    return found, tuple(notes)


def retire(storage: RetryingStorage, name: str) -> str:
    """Set a study aside: it keeps its trials under another name and is not gone on with. Returns that name.

    Raises KeyError where there is no such study, ConfigError where it cannot have another name.
    """
    if ASIDE in name:
        raise ConfigError(f"study {name} is retired already; bring it back with: studies retire --undo {name}")
    aside = f"{name}{ASIDE}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    if len(aside) > MAX_NAME:
        raise ConfigError(
            f"{len(name)} characters are too long a name to retire: {aside[:40]}.. would exceed {MAX_NAME}"
        )
    if not study_rows.rename_study(storage, name, aside):
        raise KeyError(name)
    return aside


def retired_names(storage: RetryingStorage, name: str) -> list[str]:
    """The retired studies of this name, which may be a retired one's, oldest first."""
    names = [study.name for study in list_studies(storage, retired=True)]
    return [each for each in names if name in (each, each.partition(ASIDE)[0])]


def unretire(storage: RetryingStorage, name: str) -> str:
    """Bring a retired study back under its own name; of several that had this name the newest. Returns the name.

    Raises KeyError where there is no such study, ConfigError where another study has the name now.
    """
    if not (found := retired_names(storage, name)):
        raise KeyError(name)
    before = found[-1].partition(ASIDE)[0]
    if not study_rows.rename_study(storage, found[-1], before):
        raise ConfigError(f"there is a study {before} already; set it aside first with: studies retire {before}")
    return before


# --- running -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A study as one worker works on it."""

    study: Study
    space: Space
    split: Split
    confirmation: Windows
    optuna_study: optuna.Study
    max_passes: int  # of a confirmation
    tolerance: float  # relative standard error of a confirmed MAE that sampling alone may leave
    default: Mapping[str, Any]  # params of the model's default configuration
    pool: str | Mapping[str, str]  # which symbols' evidence is pooled
    pool_days: float

    def clipped(self, params: Mapping[str, Any]) -> float | None:
        """The share of the last CLIP_ORIGINS origins, or as many as there are, whose last close these params clip.

        No network is run. None for a model that clips nothing.
        """
        if (share := MODELS[self.study.model].clipped) is None:
            return None
        closes = self.confirmation.bars.close
        first = self.study.definition["windows"]["min_context"]
        return round(share(closes, range(max(first, len(closes) - CLIP_ORIGINS), len(closes)), params), 6)


def start(storage: RetryingStorage, config: Config, study: Study, series: Series, checkpoint: str) -> StudyRun:
    """Make ready to work on a study. Raises DataError, StudyMismatch."""
    definition = define(config, series, study.model, study.as_of, checkpoint)
    check_definition(study, definition)
    space = spaces.make(study.model, config)
    bars = bars_until(series.bars, study.as_of)
    return StudyRun(
        study=study,
        space=space,
        split=split_windows(config, study.symbol, bars),
        confirmation=confirmation_windows(config, study.symbol, bars),
        max_passes=config.windows.max_passes,
        tolerance=SAMPLING_SHARE * config.promotion.min_improvement,
        default=spaces.default(space, config),
        pool=config.promotion.pool,
        pool_days=config.promotion.pool_days,
        optuna_study=optuna.load_study(
            study_name=study.name,
            storage=storage,
            sampler=sampler.make_sampler(conditional=space.conditional),
            pruner=sampler.make_pruner(config.search.prune_worst),
        ),
    )
