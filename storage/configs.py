"""The promoted files: `{root}/{folder}/{SYMBOL}.json`, read in every form they were ever written.

Owns their form. Knows nothing of what the numbers mean or which is better; history.py writes them.
Readers take no lock: a file is only ever replaced by a rename. `root` is the folder `hyperparams`.
A folder is a model's, whatever its name, or one of the two that hold the model chosen for a symbol.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from forecasters import ExpectedError
from storage.symbols import check_symbol, is_symbol

CHOSEN = ("optimized_compiled", "best")  # in the order they are replaced: readers trust `best`
RESERVED = (*CHOSEN, "history", "promoted", "step")  # no models: folders, and files of a step, have these names
KEYS = ("symbol", "model", "config", "validation", "test", "windows", "config_path", "metadata")


class ConfigFileError(ExpectedError, ValueError):
    """A promoted file cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One promoted file. Metrics that are absent, null or not finite are left out of `validation` and `test`."""

    symbol: str
    model: str  # as the file names it, compiled or not; where it names none, the model of its folder
    config: Mapping[str, Any]
    validation: Mapping[str, float]  # price_mae, pct_return_mae, latency_s, ...
    test: Mapping[str, float]
    windows: Mapping[str, Any]
    config_path: str | None
    metadata: Mapping[str, Any]
    raw: Mapping[str, Any]  # the file as it is, unknown keys and all
    path: Path
    digest: str  # sha256 of the file's bytes

    @property
    def key(self) -> str:
        """Which price of a bar it was chosen for: the close, unless it says otherwise."""
        return str(self.metadata.get("key", "close"))


def read(root: Path, folder: str, symbol: str) -> Record | None:
    """The record of a symbol, or None where there is no file. A file that cannot be read is left as it is.

    Raises ConfigFileError, and ValueError for what is no symbol or folder.
    """
    path = file_path(root, folder, symbol)
    with plain_errors(path):
        content = read_bytes(path)
    return None if content is None else parse(path, folder, symbol, content)


def is_model(folder: str) -> bool:
    """Whether a name can be a model's folder: lower case, digits and underscores, and not reserved."""
    return re.fullmatch("[a-z0-9_]+", folder) is not None and folder not in RESERVED


def file_path(root: Path, folder: str, symbol: str) -> Path:
    """Where a folder keeps a symbol's file. Raises ValueError for what is no symbol or folder."""
    check_symbol(symbol)
    if folder not in CHOSEN and not is_model(folder):
        raise ValueError(f"{folder!r} is not a folder of promoted files: a model's name, {' or '.join(CHOSEN)}")
    return root / folder / f"{symbol}.json"


def symbols_in(root: Path, folder: str) -> list[str]:
    """The symbols that a folder has a file of, sorted; names that can be no symbol's are passed over."""
    return sorted(path.stem for path in (root / folder).glob("*.json") if is_symbol(path.stem))


def read_bytes(path: Path) -> bytes | None:
    """The content of a file, or None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@overload
def digest_of(content: bytes) -> str: ...
@overload
def digest_of(content: bytes | None) -> str | None: ...
def digest_of(content: bytes | None) -> str | None:
    """The SHA-256 of a content; None for None."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def parse(path: Path, folder: str, symbol: str, content: bytes) -> Record:
    """The record of a content that is, or was, in `path`. Raises ConfigFileError."""
    try:
        raw = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise damaged(path, "not a JSON object")
    if raw.get("symbol", symbol) != symbol:
        raise damaged(path, f"it is about {raw['symbol']!r}")
    model = raw.get("model", folder if is_model(folder) else None)
    if not isinstance(model, str) or not model:
        raise damaged(path, "it names no model")
    if "config" not in raw:
        raise damaged(path, "'config' is missing")
    config_path = raw.get("config_path")
    return Record(
        symbol=symbol,
        model=model.removesuffix("_compiled"),  # compiled or not, the forecast is the same
        config=_object(path, raw, "config"),
        validation=_metrics(path, raw, "validation"),
        test=_metrics(path, raw, "test"),
        windows=_object(path, raw, "windows"),
        config_path=config_path if isinstance(config_path, str) else None,
        metadata=_object(path, raw, "metadata"),
        raw=raw,
        path=path,
        digest=digest_of(content),
    )


def _object(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object of the file, empty where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise damaged(path, f"'{key}' is not an object")
    return value


def _metrics(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, float]:
    found = _object(path, raw, key)
    if "return_mae" in found and "pct_return_mae" not in found:  # its name in the oldest files
        found = {"pct_return_mae" if name == "return_mae" else name: value for name, value in found.items()}
    mae = found.get("pct_return_mae")
    if mae is not None and not _is_number(mae):
        raise damaged(path, f"'{key}.pct_return_mae' is not a number")
    return {name: value for name, value in found.items() if _is_number(value) and math.isfinite(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def damaged(path: Path, why: str) -> ConfigFileError:
    """The error that says what is wrong with a file, in one line."""
    return ConfigFileError(f"{path}: {' '.join(why.split())}; correct it, or move it away")


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says into one line: a ConfigFileError."""
    try:
        yield
    except OSError as error:
        advice = "free some disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        where = error.filename or path
        raise ConfigFileError(f"{where}: {error.strerror or error}; {advice}") from error
