"""Settings: TOML to frozen dataclasses. `defaults.toml` is the list of every key, its type and its default.

Knows nothing of databases, models or commands.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_type_hints

from forecasters import COMPILE_MODES, DTYPES, MODELS, ExpectedError
from objectives import aggregation

DEFAULTS_PATH = Path(__file__).with_name("defaults.toml")
DEMO_PATH = Path(__file__).with_name("demo.toml")


class ConfigError(ExpectedError, ValueError):
    """A setting is unknown or has a bad value."""


@dataclass(frozen=True, kw_only=True)
class Data:
    dir: Path
    symbols: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WindowCounts:
    horizon: int
    validation: int
    test: int
    min_context: int
    confirmation: int
    max_passes: int


@dataclass(frozen=True, kw_only=True)
class Search:
    models: tuple[str, ...]
    objective: str
    trials: int
    rung: int
    batch: int  # 0: as many as a rung
    prune_worst: float

    @property
    def batch_size(self) -> int:
        """Number of windows in a forward of the network."""
        return self.batch or self.rung


@dataclass(frozen=True, kw_only=True)
class Toto:
    checkpoint: str
    revision: str
    context_length: tuple[int, ...]
    num_samples: tuple[int, ...]
    aggregates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kronos:
    checkpoint: str
    revision: str
    tokenizer: str
    tokenizer_revision: str
    network_context: int
    max_context: tuple[int, ...]
    clip: tuple[float, ...]  # lowest, highest
    temperature: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]
    sample_count: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Storage:
    url: str
    data_dir: Path
    artifacts_dir: Path
    listen: str
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class Workers:
    log_dir: Path
    lease_s: float
    cache_mib: int


@dataclass(frozen=True, kw_only=True)
class Compile:
    mode: str
    backend: str
    dir: Path
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Hyperparams:
    dir: Path


@dataclass(frozen=True, kw_only=True)
class Promotion:
    min_improvement: float
    results_dir: Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a command. `source` names the file they came from, for messages."""

    source: str
    data: Data
    windows: WindowCounts
    search: Search
    toto: Toto
    kronos: Kronos
    storage: Storage
    workers: Workers
    compile: Compile
    hyperparams: Hyperparams
    promotion: Promotion


TABLES = {field.name: get_type_hints(Config)[field.name] for field in fields(Config) if field.name != "source"}
PATHS = {
    ("data", "dir"),
    ("storage", "data_dir"),
    ("storage", "artifacts_dir"),
    ("workers", "log_dir"),
    ("compile", "dir"),
    ("hyperparams", "dir"),
    ("promotion", "results_dir"),
}
SCALAR_OR_LIST = {("toto", "context_length")}


def load(path: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """The defaults, overridden by a TOML file, overridden by what the command line gave.

    Raises ConfigError naming the file, table and key.
    """
    defaults = tomllib.loads(DEFAULTS_PATH.read_text())
    settings = {table: dict(values) for table, values in defaults.items()}
    if path is not None:
        _overlay(settings, _read(path), source=str(path), root=path.parent)
    for table, values in (overrides or {}).items():
        settings[table].update(values)
    return _build(settings, source=str(path) if path else "the built-in defaults")


def to_json(config: Config) -> dict[str, Any]:
    """The settings as JSON values, for a child process; without the storage's URL, which may hold a password."""
    values = asdict(config)
    values["storage"]["url"] = ""
    return _plain(values)


def from_json(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_json`."""
    return _build({table: dict(values[table]) for table in TABLES}, source=values["source"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a TOML file with --config") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; write TOML in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _overlay(settings: dict[str, dict[str, Any]], given: Mapping[str, Any], *, source: str, root: Path) -> None:
    for table, values in given.items():
        if table not in settings:
            raise ConfigError(f"{source}: unknown table [{table}]; the tables are {', '.join(settings)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {table} is a table; write [{table}]")
        for key, value in values.items():
            where = f"{source}: [{table}] {key}"
            if key not in settings[table]:
                raise ConfigError(f"{where}: unknown key; the keys are {', '.join(settings[table])}")
            _check_type(settings[table][key], value, where, list_too=(table, key) in SCALAR_OR_LIST)
            relative_path = (table, key) in PATHS and value
            local_checkpoint = key in ("checkpoint", "tokenizer") and value.startswith((".", "~"))
            if relative_path or local_checkpoint:
                value = os.path.normpath(root / Path(value).expanduser())
            settings[table][key] = value


def _check_type(default: Any, value: Any, where: str, *, list_too: bool) -> None:
    if list_too and isinstance(value, list):
        default = [default]
    if isinstance(default, list):
        kind = type(default[0]) if default else str
        good = isinstance(value, list) and all(_is(item, kind) for item in value)
        expected = f"a list of {_kind_name(kind)}"
    else:
        kind = type(default)
        good = _is(value, kind)
        expected = _kind_name(kind)
    if not good:
        raise ConfigError(f"{where} = {value!r}: expected {expected}")


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def _kind_name(kind: type) -> str:
    return {str: "text", int: "whole numbers", float: "numbers", bool: "true or false"}[kind]


def _build(settings: Mapping[str, Mapping[str, Any]], *, source: str) -> Config:
    tables: dict[str, Any] = {}
    for table, kind in TABLES.items():
        hints = get_type_hints(kind)
        values = {}
        for field in fields(kind):
            value = settings[table][field.name]
            if (table, field.name) in SCALAR_OR_LIST and not isinstance(value, (list, tuple)):
                value = [value]
            hint = hints[field.name]
            if isinstance(value, (list, tuple)):
                value = tuple(value)
            elif hint in (Path, float, int, str):
                value = hint(value)
            values[field.name] = value
            problem = _problem(table, field.name, value)
            if problem:
                raise ConfigError(f"{source}: [{table}] {field.name} = {_shown(value)}: {problem}")
        tables[table] = kind(**values)
    return Config(source=source, **tables)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(repr, value)) + "]"
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def _at_least(minimum: float) -> Callable[[Any], str | None]:
    return lambda value: None if value >= minimum else f"must be at least {minimum}"


def _models(names: tuple[str, ...]) -> str | None:
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        return f"unknown model {', '.join(unknown)}; the models are {', '.join(MODELS)}"
    return None


def _address(value: str) -> str | None:
    try:
        ip_address(value)
    except ValueError:
        return "must be an IP address of this machine, or 0.0.0.0 for all of them"
    return None


def _counts(values: tuple[int, ...]) -> str | None:
    if not values or min(values) < 1 or len(set(values)) != len(values):
        return "must be different whole numbers of at least 1"
    return None


def _aggregates(names: tuple[str, ...]) -> str | None:
    if not names or len(set(names)) != len(names):
        return "must be different names, at least one"
    for name in names:
        try:
            aggregation.parse(name)
        except ValueError as error:
            return str(error)
    return None


def _tops(values: tuple[int, ...]) -> str | None:
    if not values or min(values) < 0 or len(set(values)) != len(values):
        return "must be different whole numbers; 0 keeps every token"
    return None


def _range(lowest: float, highest: float) -> Callable[[Any], str | None]:
    def check(values: tuple[float, ...]) -> str | None:
        good = len(values) == 2 and lowest <= values[0] < values[1] <= highest
        return None if good else f"must be [lowest, highest] between {lowest} and {highest}"

    return check


def _one_of(*names: str) -> Callable[[Any], str | None]:
    return lambda value: None if value in names else f"must be one of {', '.join(names)}"


def _share(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be a share, from 0 up to but not including 1"


RULES: Mapping[tuple[str, str], Callable[[Any], str | None]] = {
    ("windows", "horizon"): _at_least(1),
    ("windows", "validation"): _at_least(1),
    ("windows", "test"): _at_least(1),
    ("windows", "min_context"): _at_least(2),
    ("windows", "confirmation"): _at_least(1),
    ("windows", "max_passes"): _at_least(2),
    ("search", "models"): _models,
    ("search", "trials"): _at_least(1),
    ("search", "rung"): _at_least(1),
    ("search", "batch"): _at_least(0),
    ("search", "prune_worst"): _share,
    ("toto", "context_length"): _counts,
    ("toto", "num_samples"): _counts,
    ("toto", "aggregates"): _aggregates,
    ("search", "objective"): _one_of("sampled", "exact"),
    ("kronos", "network_context"): _at_least(2),
    ("kronos", "max_context"): _counts,
    ("kronos", "clip"): _range(0.2, 100.0),
    ("kronos", "temperature"): _range(0.01, 10.0),
    ("kronos", "top_k"): _tops,
    ("kronos", "top_p"): _range(0.01, 1.0),
    ("kronos", "sample_count"): _counts,
    ("storage", "listen"): _address,
    ("storage", "wait_s"): _at_least(0),
    ("workers", "lease_s"): _at_least(2),
    ("workers", "cache_mib"): _at_least(0),
    ("compile", "mode"): _one_of(*COMPILE_MODES),
    ("compile", "dtype"): _one_of(*DTYPES),
    ("promotion", "min_improvement"): _share,
}


def _problem(table: str, key: str, value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    rule = RULES.get((table, key))
    return rule(value) if rule else None
