"""Open and resume a study, ask for its confirmation anew; make it ready for a worker.

A study is SYMBOL/model@AS_OF in Optuna, where it searches returns +STRATEGY after it, with a definition (its user
attribute) that says what its numbers mean.
Knows Optuna and the slots. Knows nothing of processes, devices or commands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna

from forecasters import CLOSE, ExpectedError
from forecasters.models import MODELS
from objectives.bars import DataError, bars_fingerprint, bars_until, timestamp_text
from objectives.metrics import measure_no_change
from objectives.windows import Split, Windows
from storage import slots, study_rows, symbols
from storage.commands import command
from storage.configs import ConfigFileError
from storage.progress import Confirmation, Progress, progress_in, read_confirmations, study_progress
from storage.retrying import RetryingStorage
from studies import returns, sampler
from studies import space as spaces
from studies.config import Config, ConfigError
from studies.evidence import MEASURED_PATHS
from studies.in_use import configurations_in_use
from studies.series import Series, confirmation_windows, split_windows, window_span
from studies.space import Space
from studies.starts import volatility_starts

METRIC = "pct_return_mae"  # of the close; of another key, that is at its end, as numbers of two keys never mix
DEFINITION = "definition"  # study user attribute
NAME = re.compile(r"(?P<symbol>" + symbols.PATTERN + r")/(?P<model>[a-z0-9]+)@(?P<as_of>[0-9TZ:.-]+)(?:\+[a-z_]+)?")
ASIDE = "~"  # stands between the name that a retired study had and the time when it was set aside
CREATED_TOGETHER = 200  # studies made in one transaction; a crash costs no more than these
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

    @property
    def key(self) -> str:
        """Which price of a bar it searches."""
        return self.definition["metric"].removeprefix(METRIC).removeprefix("_") or CLOSE

    @property
    def pnl(self) -> str:
        """The strategy whose return it searches as a second objective; empty: it has none."""
        return returns.strategy_of(self.definition)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What opening found or made."""

    study: Study
    state: str  # "new", "resumed", "raised", "finished", or "parked": finished but for work that is left alone
    budget: int
    notes: tuple[str, ...]


# --- opening -------------------------------------------------------------------------------------------------


def define(config: Config, series: Series, model: str, as_of: str, checkpoint: str) -> dict[str, Any]:
    """What the numbers of a study mean: equal definitions make comparable numbers. Raises DataError, ConfigError.

    checkpoint: the fingerprint of the forecaster's weights.
    """
    bars = bars_until(series.bars, as_of)
    counts, search = config.windows, config.search
    validation = split_windows(config, series.symbol, bars).validation
    # Where a forward has the windows of a rung there is no entry: definitions were once written without one.
    batch = {"batch": size} if (size := search.batch_size(model)) != search.rung else {}
    space = spaces.make(model, config, bars)
    return {
        "symbol": series.symbol,
        "model": model,
        "as_of": as_of,
        "metric": METRIC if search.key == CLOSE else f"{METRIC}_{search.key}",
        "objective": search.objective,
        **returns.defined(config, validation, space),
        "bars": bars_fingerprint(bars),
        "windows": {
            "horizon": counts.horizon,
            "validation": counts.validation,
            "test": counts.test,
            "min_context": counts.min_context,
            "rung": search.rung,
            **batch,
        },
        "space": space.to_json(),
        "checkpoint": checkpoint,
        "no_change_mae": measure_no_change(validation),  # follows from bars and windows; kept for those who read
    }


MISMATCHES = {
    "objective": "its objective is another (sampled or exact), which never mix; set --objective back",
    "bars": "the bars up to its last bar are not those it was opened on; restore the file's history",
    "windows": "[windows] or [search] rung or batch differ from those it was opened with; set them back",
    "space": "the model's search space differs from the one it was opened with; set it back",
    "checkpoint": "the model's checkpoint is not the one it was opened with; set it back",
    "metric": "it searches another key than [search] key, and numbers of two keys never mix; set it back",
    returns.PNL: "what trading costs, [backtest], is not what it was opened with; set it back",
}


def check_definition(study: Study, now: Mapping[str, Any]) -> None:
    """Raises StudyMismatch naming the first part that changed."""
    for part, reason in MISMATCHES.items():
        if study.definition.get(part) != now.get(part):
            retire = command(f"studies retire {study.name}")
            raise StudyMismatch(f"study {study.name}: {reason}, or set the study aside with: {retire}")


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
    *,
    refused: dict[str, str] | None = None,
    retry_parked: bool = False,
) -> list[Opened]:
    """Find or make the study of every symbol and model. All are checked before the first is made.

    An unfinished study goes on, at the bars up to its AS_OF. Where there is none, a finished one at the newest bar is
    left alone unless the budget was raised; else a new one opens there.
    checkpoints: the fingerprint of each model's weights. refused: takes the symbols that cannot be gone on with, each
    with its reason, and the others are opened; without it the first of them is raised. retry_parked: free parked work
    that is to be left alone for a while yet.
    Raises DataError, StudyMismatch, ConfigFileError.
    """
    wanted = list(series)
    asked_for = {(item.symbol, model) for item in wanted for model in models}
    existing: dict[tuple[str, str], list[Study]] = {}
    for study in list_studies(storage):
        if (study.symbol, study.model) in asked_for and study.pnl == config.search.objective_pnl:
            existing.setdefault((study.symbol, study.model), []).append(study)
    ids = [study.study_id for found in existing.values() for study in found]
    progress = study_progress(storage, ids)
    confirmations = read_confirmations(storage, ids, paths=MEASURED_PATHS)

    extensions: list[_Extension] = []
    creations: list[_Creation] = []
    names: list[str] = []
    for item, model in ((item, model) for item in wanted for model in models):
        found = existing.get((item.symbol, model), [])
        unfinished = [s for s in found if (p := progress.get(s.study_id)) and (p.open or p.parked)]
        current = [s for s in found if s.as_of == timestamp_text(item.bars.timestamps[-1])]
        study = (unfinished or current or [None])[0]
        try:
            if study:
                confirmation = confirmations.get(study.study_id)
                extensions.append(_extension(config, item, study, checkpoints[model], confirmation))
                names.append(study.name)
            else:
                creations.append(_creation(config, item, model, checkpoints[model]))
                names.append(creations[-1].name)
        except (DataError, StudyMismatch, ConfigFileError) as error:
            if refused is None:
                raise
            refused.setdefault(item.symbol, str(error))
    opened = _extend(storage, config.search.trials, extensions, retry_parked=retry_parked)
    for first in range(0, len(creations), CREATED_TOGETHER):
        opened |= _create(storage, config, creations[first : first + CREATED_TOGETHER])
    return [opened[name] for name in names]


def _extension(
    config: Config, item: Series, study: Study, checkpoint: str, confirmation: Confirmation | None
) -> _Extension:
    """What going on with a study asks for. Raises DataError, StudyMismatch, ConfigFileError."""
    check_definition(study, _define_at(config, item, study.model, study.as_of, checkpoint))
    if confirmation is None:
        raise _no_work(study)
    bars = bars_until(item.bars, study.as_of)
    baselines, _ = configurations_in_use(config, item.symbol, study.model, spaces.make(study.model, config, bars))
    asked = confirmation_windows(config, item.symbol, bars)
    outdated = not _confirms(confirmation, baselines, asked)
    # What another machine found in use stays in the comparison.
    return _Extension(study=study, baselines={**(confirmation.params or {}), **baselines}, outdated=outdated)


def _creation(config: Config, item: Series, model: str, checkpoint: str) -> _Creation:
    """What making a study at the newest bar asks for. Raises DataError, ConfigFileError."""
    definition = _define_at(config, item, model, timestamp_text(item.bars.timestamps[-1]), checkpoint)
    space = spaces.make(model, config, item.bars)
    baselines, notes = configurations_in_use(config, item.symbol, model, space)
    confirmed_on, wanted = confirmation_windows(config, item.symbol, item.bars), config.windows.confirmation
    if len(confirmed_on) < wanted:
        notes += (f"{item.path}: has {len(confirmed_on)} windows to confirm on, not {wanted}",)
    # What is known to work starts the search, where the search could have proposed it.
    starts = {label: params for label, params in baselines.items() if space.contains(params)}
    if config.search.starts == "volatility":
        for label, params in volatility_starts(config, space, item.bars.slice(0, confirmed_on.origins[0])).items():
            if params not in starts.values():
                starts[label] = params
    return _Creation(definition=definition, baselines=baselines, starts=starts, notes=notes)


def _define_at(config: Config, item: Series, model: str, as_of: str, checkpoint: str) -> dict[str, Any]:
    """The definition; an error names the file and the study that needs it."""
    try:
        return define(config, item, model, as_of, checkpoint)
    except DataError as error:
        raise DataError(f"{item.path}: {error}; study {item.symbol}/{model}@{as_of} needs it") from None


def _no_work(study: Study) -> StudyMismatch:
    return StudyMismatch(
        f"study {study.name}: has trials but no budget, as a copy made with Optuna; "
        f"set it aside with: {command(f'studies retire {study.name}')}"
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


def _extend(
    storage: RetryingStorage, budget: int, extensions: Sequence[_Extension], *, retry_parked: bool
) -> dict[str, Opened]:
    """Raise the budgets, free what is parked and ask for outdated confirmations anew, in one transaction.

    By name. Only studies with something to change cost statements of their own.
    """
    by_id = {one.study.study_id: one for one in extensions}
    ids = sorted(by_id)  # two processes at the same studies wait for each other, in place of a deadlock

    def extend(connection: Any) -> tuple[set[int], dict[int, Progress]]:
        raised: set[int] = set()
        changed: list[int] = []
        before = progress_in(connection, ids)
        for study_id in ids:
            now, one = before[study_id], by_id[study_id]
            unparked = slots.unpark(connection, study_id, at_once=retry_parked) if now.parked else 0
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
        state = "raised" if study_id in raised else "resumed" if now.open else "parked" if now.parked else "finished"
        notes = ()
        if now.budget > budget:
            notes = (f"{one.study.name} keeps its budget of {now.budget} trials; a budget is never lowered",)
        found[one.study.name] = Opened(study=one.study, state=state, budget=now.budget, notes=notes)
    return found


def reconfirm(
    storage: RetryingStorage, config: Config, series: Series, study: Study, checkpoint: str
) -> tuple[str, ...]:
    """Ask for a finished study's confirmation anew, with the configurations in use now; returns notes for the user.

    Raises DataError, StudyMismatch, ConfigFileError, and ConfigError while trials are left.
    """
    check_definition(study, define(config, series, study.model, study.as_of, checkpoint))
    space = spaces.make(study.model, config, bars_until(series.bars, study.as_of))
    baselines, notes = configurations_in_use(config, study.symbol, study.model, space)
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
        words = f"launch-workers --symbols {study.symbol}{returns.option(study.pnl)}"
        raise ConfigError(f"study {study.name} has trials left; finish them with: {command(words)}")
    return notes


@dataclass(frozen=True, kw_only=True)
class _Creation:
    """A study to make, and the configurations in use to measure beside its search."""

    definition: Mapping[str, Any]
    baselines: Mapping[str, dict[str, Any]]
    starts: Mapping[str, dict[str, Any]]  # params of the first trials, by label
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return returns.name_of(self.definition)


def _create(storage: RetryingStorage, config: Config, new: Sequence[_Creation]) -> dict[str, Opened]:
    """Make studies with their budgets, in one transaction. By name, also of those that another process made first."""
    by_name = {one.name: one for one in new}
    budget = config.search.trials

    def fill(connection: Any, made: Mapping[str, int]) -> None:
        rows = [row for name, study_id in made.items() for row in _first_slots(config, by_name[name], study_id)]
        slots.add_all(connection, rows)
        slots.raise_budgets(connection, made.values(), budget)

    attrs = {name: {DEFINITION: one.definition} for name, one in by_name.items()}
    ids = study_rows.create_studies(storage, attrs, returns.metrics_of(new[0].definition), fill)
    opened = {}
    for name, one in by_name.items():
        parts = {part: one.definition[part] for part in ("symbol", "model", "as_of")}
        study = Study(study_id=ids[name], name=name, definition=one.definition, **parts)
        opened[name] = Opened(study=study, state="new", budget=budget, notes=one.notes)
    return opened


def _first_slots(config: Config, new: _Creation, study_id: int) -> Iterator[slots.NewSlot]:
    """The slots of a new study, but for the trials that the sampler proposes."""
    space = spaces.make(new.definition["model"], config)
    for number, (label, params) in enumerate(new.baselines.items()):
        yield slots.NewSlot(study_id=study_id, stage=slots.BASELINE, number=number, label=label, params=params)
    for number, (label, params) in enumerate(list(new.starts.items())[: config.search.trials]):
        searched = space.searched(params)
        yield slots.NewSlot(study_id=study_id, stage=slots.TRIAL, number=number, label=label, params=searched)
    yield slots.NewSlot(
        study_id=study_id, stage=slots.CONFIRMATION, number=0, label="confirmation", params=new.baselines
    )


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
    max_clipped: float = 1.0  # share of origins that a member of an ensemble may clip

    def clipped(self, params: Mapping[str, Any]) -> float | None:
        """The share of the last CLIP_ORIGINS origins, or as many as there are, whose last close these params clip.

        No network is run. None for a model that clips nothing.
        """
        if MODELS[self.study.model].clipped is None:
            return None
        min_context = self.study.definition["windows"]["min_context"]
        return clipped_share(self.study.model, self.confirmation.bars.close, params, min_context=min_context)


def clipped_share(model: str, closes: np.ndarray, params: Mapping[str, Any], *, min_context: int) -> float | None:
    """As `StudyRun.clipped`, of closes [T]; an origin has at least `min_context` bars before it."""
    if (share := MODELS[model].clipped) is None:
        return None
    return round(share(closes, range(max(min_context, len(closes) - CLIP_ORIGINS), len(closes)), params), 6)


def start(storage: RetryingStorage, config: Config, study: Study, series: Series, checkpoint: str) -> StudyRun:
    """Make ready to work on a study. Raises DataError, StudyMismatch."""
    definition = define(config, series, study.model, study.as_of, checkpoint)
    check_definition(study, definition)
    bars = bars_until(series.bars, study.as_of)
    space = spaces.make(study.model, config, bars)
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
        max_clipped=config.promotion.max_clipped,
        optuna_study=optuna.load_study(
            study_name=study.name,
            storage=storage,
            sampler=sampler.make_sampler(conditional=space.conditional),
            pruner=sampler.make_pruner(config.search.prune_worst),
        ),
    )
