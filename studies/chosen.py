"""Which configurations a person means: those in use, a model's own, its default, a file's, a trial's.

Owns the words of `--params` and the environment variables of the predecessor that override them. Reads promoted files
and studies; measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from forecasters import Bars
from forecasters.descriptor import Kind
from forecasters.models import MODELS
from storage import configs
from storage.commands import command
from storage.configs import ConfigFileError, Record
from storage.retrying import RetryingStorage
from studies import space as spaces
from studies import study as studying
from studies.comparing import ComparedConfiguration
from studies.config import Config, ConfigError
from studies.ensembles import complete, models_of, parse_members
from studies.evidence import ENSEMBLE
from studies.in_use import lost_notes
from studies.space import Space

BEST, STORED, DEFAULT = "best", "stored", "default"
TRIAL = re.compile(rf"(?P<study>{studying.NAME.pattern})#(?P<trial>\d+)")
NO_EFFECT = ("TOTO_SAMPLES_PER_BATCH",)  # variables of the predecessor that change no forecast


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a word of `--params` means, for every symbol alike; the words for files in use differ by symbol."""

    word: str
    model: str
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """Those that its forecasts need."""
        return tuple(one.model for one in parse_members(self.config)) if self.model == ENSEMBLE else (self.model,)


def read_words(words: Sequence[str], open_storage: Callable[[], RetryingStorage]) -> dict[str, Chosen]:
    """The files and trials among the words of `--params`, by word.

    open_storage: called where a trial is among them. Raises ConfigError, ConfigFileError and DatabaseUnavailable.
    """
    found: dict[str, Chosen] = {}
    storage: RetryingStorage | None = None
    for word in words:
        if word in (BEST, STORED, DEFAULT):
            continue
        if named := TRIAL.fullmatch(word):
            storage = storage or open_storage()
            found[word] = _trial(storage, word, named["study"], int(named["trial"]))
        else:
            found[word] = _file(word)
    return found


def _trial(storage: RetryingStorage, word: str, name: str, number: int) -> Chosen:
    study = next((one for one in studying.list_studies(storage) if one.name == name), None)
    if study is None:
        raise ConfigError(f"{word}: no study {name!r}; see: {command('studies list')}")
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    trial = next((one for one in trials if one.number == number and one.params), None)
    if trial is None:
        raise ConfigError(f"{word}: no such trial; see: {command(f'studies show {name}')}")
    params = Space.from_json(study.model, study.definition["space"]).complete(trial.params)
    return Chosen(word=word, model=study.model, config=params, metadata={})


def _file(word: str) -> Chosen:
    path = Path(word)
    with configs.plain_errors(path):
        content = configs.read_bytes(path)
    if content is None:
        known = f"{BEST}, {STORED}, {DEFAULT}, a promoted file or STUDY#TRIAL"
        raise ConfigError(f"{word}: no such file; there are {known}")
    try:  # whichever symbol it was made for
        symbol = json.loads(content).get("symbol", path.stem)
    except (ValueError, AttributeError):
        symbol = path.stem
    record = configs.parse(path, path.parent.name, str(symbol), content)
    if unknown := [model for model in models_of(record) if model not in MODELS]:
        raise ConfigError(f"{path}: is of the model {unknown[0]!r}; those here are {', '.join(MODELS)}")
    return Chosen(word=word, model=record.model, config=record.config, metadata=record.metadata)


# --- for one symbol -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Configurations:
    """The rows of one symbol, and what to say of them."""

    rows: Sequence[ComparedConfiguration]
    notes: Sequence[str]
    dead_top_p: Sequence[str]  # labels of those whose top_p is said and has no effect, as a top_k above 0 decides


def for_symbol(
    config: Config,
    symbol: str,
    bars: Bars,
    models: Sequence[str],
    words: Sequence[str],
    chosen: Mapping[str, Chosen],
    overrides: Mapping[str, Mapping[str, Any]],
) -> Configurations:
    """What the words mean at a symbol, in their order, with what the environment overrides, which labels show.

    chosen: as of `read_words`. overrides: as of `environment_overrides`. Other models than these are left out.
    Raises ConfigError for a file or trial named that cannot be measured.
    """
    rows: list[ComparedConfiguration] = []
    notes: list[str] = []
    dead: list[str] = []

    def add(model: str, source: str, label: str, params: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        if model == ENSEMBLE:  # is what its file says, whatever the environment says of its members' models
            rows.append(ComparedConfiguration(label=label, model=model, params=params, source=source))
            return
        changed = overrides.get(model, {})
        text = " ".join([label, *(f"{name}={value}" for name, value in changed.items())])
        settled = MODELS[model].settled({**params, **changed})
        rows.append(ComparedConfiguration(label=text, model=model, params=settled, source=source))
        said = {**said, **changed}
        if any(
            said.get(name) not in (None, rule.otherwise) and not MODELS[model].counts(name, settled)
            for name, rule in MODELS[model].conditions.items()
        ):
            dead.append(f"{symbol} {text}")

    for word in words:
        if word == DEFAULT:
            for model in models:
                add(model, DEFAULT, f"{model} {DEFAULT}", spaces.default(spaces.make(model, config, bars), config), {})
        elif word in chosen:
            one = chosen[word]
            if set(one.models) <= set(models):
                label = word if TRIAL.fullmatch(word) else f"{one.model} {Path(word).name}"
                add(one.model, word, label, _params(config, one), one.config)
        else:
            folders = ["best"] if word == BEST else models
            found = [_read(config, folder, symbol, models, notes) for folder in folders]
            for record in filter(None, found):
                try:
                    one = Chosen(word=word, model=record.model, config=record.config, metadata=record.metadata)
                    add(record.model, word, f"{record.model} {word}", _params(config, one), record.config)
                    if record.model != ENSEMBLE:
                        notes += lost_notes(record.path, record.model, record.config, record.metadata)
                except ConfigError as error:
                    notes.append(f"{record.path}: left out: {error}")
    return Configurations(rows=rows, notes=notes, dead_top_p=dead)


def _read(config: Config, folder: str, symbol: str, models: Sequence[str], notes: list[str]) -> Record | None:
    """A file in use, or None and, where there is one, why not."""
    try:
        record = configs.read(config.hyperparams.dir, folder, symbol)
        needed = models_of(record) if record else ()
    except ConfigFileError as error:
        notes.append(str(error))
        return None
    if record is not None and (others := [model for model in needed if model not in models]):
        what = "is an ensemble with" if record.model == ENSEMBLE else "is of"
        notes.append(f"{record.path}: left out: {what} the model {others[0]!r}, and asked for are {', '.join(models)}")
        return None
    return record


def _params(config: Config, one: Chosen) -> dict[str, Any]:
    """A configuration as complete params of its model. Raises ConfigError."""
    more = {}
    if (
        TRIAL.fullmatch(one.word)
        and (count := MODELS[one.model].params.num_samples) in spaces.make(one.model, config).knobs
    ):
        # The trial of an exact study draws none; where samples are asked for, it gets as many as a search may draw.
        more = {count: spaces.most_samples(one.model, config)}
    try:
        return complete(config, one.model, {**more, **one.config}, one.metadata)
    except ValueError as error:
        raise ConfigError(f"{one.word}: cannot be measured: {error}") from None


# --- the environment ----------------------------------------------------------------------------------------


def environment_overrides(
    models: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What MODEL_PARAM variables say, TOTO_NUM_SAMPLES or KRONOS_CLIP, by model and param; and notes for the user.

    Values outside of the search space are allowed. Raises ConfigError for one that no configuration can have.
    """
    found: dict[str, dict[str, Any]] = {}
    said = []
    for model in models:
        for name, kind in MODELS[model].kinds.items():
            variable = f"{model}_{name}".upper()
            if text := environment.get(variable, "").strip():
                found.setdefault(model, {})[name] = _value(variable, kind, name, text)
                said.append(f"{variable}={text}")
    notes = [f"from the environment, for every configuration: {' '.join(said)}"] if said else []
    notes += [f"{name} changes no forecast and is not looked at" for name in NO_EFFECT if environment.get(name)]
    return found, notes


def _value(variable: str, kind: Kind, name: str, text: str) -> Any:
    try:
        return spaces.parse_value(name, kind, text)
    except ValueError as error:
        raise ConfigError(f"{variable} in the environment: {error}; correct or unset it") from None


def with_horizon(config: Config, horizon: int, models: Sequence[str]) -> Config:
    """The settings with this horizon. Raises ConfigError where a model's network does not reach so far."""
    for model in models:
        if reason := MODELS[model].refuses(config.models[model], horizon):
            raise ConfigError(f"--horizon {horizon}: {reason}; lower it, or leave {model} out of --models")
    return replace(config, windows=replace(config.windows, horizon=horizon))
