"""Settings: TOML to frozen dataclasses. `defaults.toml` is the list of every key, its type and its default.

Each table's dataclass says what its keys must keep; a model's table is declared by its descriptor.
Knows nothing of databases, forecasts or commands.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, fields
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from forecasters import COMPILE_MODES, DTYPES, KEYS, ExpectedError
from forecasters.models import MODELS
from forecasters.settings import AGGREGATES, CHECKPOINT, PATTERNS, at_least, kind_of, one_of, setting
from objectives import aggregation
from objectives.costs import AssetClass, bars_a_day
from objectives.strategies import FORECASTING

DEFAULTS_PATH = Path(__file__).with_name("defaults.toml")
DEMO_PATH = Path(__file__).with_name("demo.toml")
KINDS = {  # by the type of a setting or of its items: what TOML has for it, and what that is called
    str: ((str,), "text"),
    Path: ((str,), "text"),
    int: ((int,), "whole numbers"),
    float: ((float, int), "numbers"),
    bool: ((bool,), "true or false"),
}
MAX_TRIALS = 1_000_000  # of a study: each is a row, and a mistyped number must not fill the disk


class ConfigError(ExpectedError, ValueError):
    """A setting is unknown or has a bad value."""


def _known_models(names: tuple[str, ...]) -> str | None:
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


def _strategy(value: str) -> str | None:
    return value and one_of(*FORECASTING)(value) and f"must be empty, or one of {', '.join(FORECASTING)}"


def _trials(value: int) -> str | None:
    return at_least(1)(value) or (f"must be at most {MAX_TRIALS}" if value > MAX_TRIALS else None)


def _share(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be a share, from 0 up to but not including 1"


def _pool(value: str | Mapping[str, str]) -> str | None:
    if isinstance(value, str):
        return one_of("all", "none")(value) and 'must be "all", "none", or a table of patterns: crypto = "*USD"'
    return None if value and all(value.values()) else "must name at least one group, each with a pattern of symbols"


@dataclass(frozen=True, kw_only=True)
class Data:
    dir: Path
    symbols: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WindowCounts:
    horizon: int = setting(at_least(1))
    validation: int = setting(at_least(1))
    test: int = setting(at_least(1))
    min_context: int = setting(at_least(2))
    confirmation: int = setting(at_least(1))
    max_passes: int = setting(at_least(2))


@dataclass(frozen=True, kw_only=True)
class Search:
    models: tuple[str, ...] = setting(_known_models)
    objective: str = setting(one_of("sampled", "exact"))
    objective_pnl: str = setting(_strategy)
    trials: int = setting(_trials)
    key: str = setting(one_of(*KEYS))
    rung: int = setting(at_least(1))
    batch: int = setting(at_least(0))  # 0: as many as suit the model
    prune_worst: float = setting(_share)
    starts: str = setting(one_of("none", "volatility"))

    def batch_size(self, model: str) -> int:
        """Number of windows in a forward of the network."""
        return self.batch or MODELS[model].batch or self.rung


@dataclass(frozen=True, kw_only=True)
class Storage:
    url: str
    data_dir: Path
    artifacts_dir: Path
    listen: str = setting(_address)
    wait_s: float = setting(at_least(0))
    keep_days: int = setting(at_least(1))

    @property
    def local(self) -> Path:
        """The folder of what belongs to this host: that around data_dir, by default the user's data folder."""
        if self.data_dir != Path():
            return self.data_dir.parent
        import platformdirs  # late: few commands need it

        return Path(platformdirs.user_data_dir("forecast-studies"))


@dataclass(frozen=True, kw_only=True)
class Workers:
    log_dir: Path
    lease_s: float = setting(at_least(2))
    cache_mib: int = setting(at_least(0))
    encodings_mib: int = setting(at_least(-1))


@dataclass(frozen=True, kw_only=True)
class Compile:
    mode: str = setting(one_of(*COMPILE_MODES))
    backend: str
    dir: Path
    dtype: str = setting(one_of(*DTYPES))


@dataclass(frozen=True, kw_only=True)
class Hyperparams:
    dir: Path


@dataclass(frozen=True, kw_only=True)
class Promotion:
    min_improvement: float = setting(_share)
    max_clipped: float = setting(_share)
    pool: str | Mapping[str, str] = setting(_pool, kind=PATTERNS)
    pool_days: float = setting(at_least(0))
    results_dir: Path


def _fee(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be a share of the traded value, from 0 up to but not including 1"


@dataclass(frozen=True, kw_only=True)
class Backtest:
    crypto: tuple[str, ...] = setting(one_or_list=True)
    equity_limit_fee: float = setting(_fee)
    equity_market_fee: float = setting(_fee)
    equity_half_spread: float = setting(_fee)
    equity_borrow: float = setting(at_least(0))
    crypto_limit_fee: float = setting(_fee)
    crypto_market_fee: float = setting(_fee)
    crypto_half_spread: float = setting(_fee)

    def asset_class(self, symbol: str, timestamps: np.ndarray) -> AssetClass:
        """What trading a symbol costs, and how many bars it has a year, from the times of its bars [T]."""
        crypto = any(fnmatchcase(symbol, pattern) for pattern in self.crypto)
        kind = "crypto" if crypto else "equity"
        days_a_year = 365 if crypto else 252
        return AssetClass(
            name=kind,
            days_a_year=days_a_year,
            shorts=not crypto,
            limit_fee=getattr(self, f"{kind}_limit_fee"),
            market_fee=getattr(self, f"{kind}_market_fee"),
            half_spread=getattr(self, f"{kind}_half_spread"),
            borrow=0.0 if crypto else self.equity_borrow,
            bars_a_day=bars_a_day(timestamps, days_a_year),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a command. `source` names the file they came from, for messages."""

    source: str
    data: Data
    windows: WindowCounts
    search: Search
    models: Mapping[str, Any]  # every model's settings, by its name
    storage: Storage
    workers: Workers
    compile: Compile
    hyperparams: Hyperparams
    promotion: Promotion
    backtest: Backtest


PARTS = {name: kind for name, kind in get_type_hints(Config).items() if name not in ("source", "models")}


def _tables() -> dict[str, type[Any]]:
    """Every table and its dataclass."""
    return {**PARTS, **{name: model.settings for name, model in MODELS.items()}}


def load(path: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """The defaults, overridden by a TOML file, overridden by what the command line gave, which is not None.

    Raises ConfigError naming the file, table and key.
    """
    defaults = tomllib.loads(DEFAULTS_PATH.read_text())
    settings = {table: dict(values) for table, values in defaults.items()}
    if path is not None:
        _overlay(settings, _read(path), source=str(path), root=path.parent)
    for table, values in (overrides or {}).items():
        settings[table].update({key: value for key, value in values.items() if value is not None})
    return _build(settings, source=str(path) if path else "the built-in defaults")


def to_json(config: Config) -> dict[str, Any]:
    """The settings as JSON values, for a child process; without the storage's URL, which may hold a password."""
    values = asdict(config)
    values["storage"]["url"] = ""
    return json.loads(json.dumps(values, default=str))


def from_json(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_json`."""
    return _build({**values, **values["models"]}, source=values["source"])


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
    tables = _tables()
    for table, values in given.items():
        if table not in settings:
            raise ConfigError(f"{source}: unknown table [{table}]; the tables are {', '.join(settings)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {table} is a table; write [{table}]")
        declared, hints = {one.name: one for one in fields(tables[table])}, get_type_hints(tables[table])
        for key, value in values.items():
            where = f"{source}: [{table}] {key}"
            if key not in settings[table]:
                raise ConfigError(f"{where}: unknown key; the keys are {', '.join(settings[table])}")
            if kind_of(declared[key]) == PATTERNS:
                _check_patterns(value, where)
                settings[table][key] = value
                continue
            _check_type(hints[key], value, where, list_too=_one_or_list(declared[key]))
            relative_path = hints[key] is Path and value
            local_checkpoint = kind_of(declared[key]) == CHECKPOINT and value.startswith((".", "~"))
            if relative_path or local_checkpoint:
                value = os.path.normpath(root / Path(value).expanduser())
            settings[table][key] = value


def _one_or_list(declared: Field[Any]) -> bool:
    return declared.metadata.get("one_or_list", False)


def _check_type(hint: Any, value: Any, where: str, *, list_too: bool) -> None:
    many = isinstance(value, list) if list_too else get_origin(hint) is tuple
    types, expected = KINDS[get_args(hint)[0] if get_args(hint) else hint]
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) != many or any(type(item) not in types for item in items):
        raise ConfigError(f"{where} = {value!r}: expected {'a list of ' if many else ''}{expected}")


def _check_patterns(value: Any, where: str) -> None:
    items = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where} = {value!r}: expected text, or a table of text by the name of a group")


def _build(settings: Mapping[str, Mapping[str, Any]], *, source: str) -> Config:
    tables = {name: _table(name, kind, settings[name], source) for name, kind in _tables().items()}
    parts = {name: tables.pop(name) for name in PARTS}
    return Config(source=source, models=tables, **parts)


def _table(table: str, kind: type[Any], settings: Mapping[str, Any], source: str) -> Any:
    """A table as its dataclass. Raises ConfigError for a value that its rule refuses."""
    hints, values = get_type_hints(kind), {}
    for declared in fields(kind):
        key, value = declared.name, settings[declared.name]
        if _one_or_list(declared) and not isinstance(value, (list, tuple)):
            value = [value]
        if isinstance(value, (list, tuple)):
            value = tuple(value)
        elif hints[key] in (Path, float, int, str):
            value = hints[key](value)
        values[key] = value
        if problem := _problem(declared, value):
            raise ConfigError(f"{source}: [{table}] {key} = {_shown(value)}: {problem}")
    return kind(**values)


def _problem(declared: Field[Any], value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if kind_of(declared) == AGGREGATES and isinstance(value, tuple):
        return _aggregates(value)
    rule: Callable[[Any], str | None] | None = declared.metadata.get("rule")
    return rule(value) if rule else None


def _aggregates(names: tuple[str, ...]) -> str | None:
    if not names or len(set(names)) != len(names):
        return "must be different names, at least one"
    for name in names:
        try:
            aggregation.parse(name)
        except ValueError as error:
            return str(error)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(repr, value)) + "]"
    return repr(str(value)) if isinstance(value, Path) else repr(value)
