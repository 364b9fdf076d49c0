"""The promoted files: `{root}/{folder}/{SYMBOL}.json`, read in every form they were ever written, written whole.

Owns their form, their history and their locks. Knows nothing of what the numbers mean or which is better.
Readers take no lock: a file is only ever replaced by a rename. `root` is the folder `hyperparams`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9.-]*")
FOLDERS = ("toto", "kronos", "optimized_compiled", "best")  # in the order they are replaced: readers trust `best`
KEYS = ("symbol", "model", "config", "validation", "test", "windows", "config_path", "metadata")
UNCHECKED = "unchecked"  # `expected_digest` of a writer that replaces whatever is there
_LOCK_TIMEOUT_S = 30.0


class ConfigFileError(ValueError):
    """A promoted file cannot be read or written."""


class ConcurrentWrite(ConfigFileError):
    """Another process has replaced the file since it was read."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One promoted file. Metrics that are absent, null or not finite are left out of `validation` and `test`."""

    symbol: str
    model: str  # "toto" or "kronos"; files of other systems may name others
    config: Mapping[str, Any]
    validation: Mapping[str, float]  # price_mae, pct_return_mae, latency_s, ...
    test: Mapping[str, float]
    windows: Mapping[str, Any]
    config_path: str | None
    metadata: Mapping[str, Any]
    raw: Mapping[str, Any]  # the file as it is, unknown keys and all
    path: Path
    digest: str  # sha256 of the file's bytes


def read(root: Path, folder: str, symbol: str) -> Record | None:
    """The record of a symbol, or None where there is no file. A file that cannot be read is left as it is.

    Raises ConfigFileError, and ValueError for what is no symbol or folder.
    """
    path = _path(root, folder, symbol)
    with _plain_errors(path):
        content = _bytes(path)
    return None if content is None else _record(path, folder, symbol, content)


def write(
    root: Path,
    symbol: str,
    payload: Mapping[str, Any],
    folders: Sequence[str],
    *,
    expected_digest: str | None = UNCHECKED,
) -> None:
    """Replace a symbol's file in each of `folders`, `best` last; what `best` held goes to `history` first.

    `payload` has at least symbol, model, config and validation. `expected_digest` is that of `best` as the caller
    read it, None for "there was none". A crash leaves each file old or new, never torn; so does a full disk.
    Side effects: `history/{SYMBOL}/{time}-{digest}.json` for what `best` held, `history/{SYMBOL}/{folder}/` for
    what another folder held if that was something else, and a lock file in `.locks`.
    Raises ConcurrentWrite if `best` is not what the caller read, ConfigFileError if a file cannot be written, and
    ValueError for a payload that is incomplete or holds NaN or infinity. On ConcurrentWrite nothing is changed.
    """
    paths = {folder: _path(root, folder, symbol) for folder in sorted(set(folders), key=_order)}
    content = _encoded(symbol, payload)
    with _plain_errors(root / "best" / f"{symbol}.json"), _locked(root, symbol):
        best = _bytes(_path(root, "best", symbol))
        if expected_digest not in (UNCHECKED, best and _digest(best)):
            raise ConcurrentWrite(f"{_path(root, 'best', symbol)} was replaced meanwhile; run the command again")
        temporaries: dict[Path, Path] = {}
        try:
            for path in paths.values():  # all of them before any rename: a full disk then changes nothing
                temporaries[path] = _beside(path, content)
            for folder, path in paths.items():
                _keep(root, folder, symbol, path, best=best, new=content)
            for path, temporary in temporaries.items():
                temporary.replace(path)
                _sync_folder(path.parent)
        finally:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)


# --- reading


def _path(root: Path, folder: str, symbol: str) -> Path:
    if not SYMBOL.fullmatch(symbol) or ".." in symbol:
        raise ValueError(f"{symbol!r} is not a symbol: capitals, digits, '.' and '-', such as BTCUSD or BRK-B")
    if folder not in FOLDERS:
        raise ValueError(f"{folder!r} is not one of {', '.join(FOLDERS)}")
    return root / folder / f"{symbol}.json"


def _order(folder: str) -> int:
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _record(path: Path, folder: str, symbol: str, content: bytes) -> Record:
    try:
        raw = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise _damaged(path, "not a JSON object")
    if raw.get("symbol", symbol) != symbol:
        raise _damaged(path, f"it is about {raw['symbol']!r}")
    model = raw.get("model", folder if folder in ("toto", "kronos") else None)
    if not isinstance(model, str) or not model:
        raise _damaged(path, "it names no model")
    if "config" not in raw:
        raise _damaged(path, "'config' is missing")
    config_path = raw.get("config_path")
    return Record(
        symbol=symbol,
        model="toto" if model == "toto_compiled" else model,  # compiled or not, the forecast is the same
        config=_object(path, raw, "config"),
        validation=_metrics(path, raw, "validation"),
        test=_metrics(path, raw, "test"),
        windows=_object(path, raw, "windows"),
        config_path=config_path if isinstance(config_path, str) else None,
        metadata=_object(path, raw, "metadata"),
        raw=raw,
        path=path,
        digest=_digest(content),
    )


def _object(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object of the file, empty where it is absent or null."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _damaged(path, f"'{key}' is not an object")
    return value


def _metrics(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, float]:
    found = _object(path, raw, key)
    if "return_mae" in found and "pct_return_mae" not in found:  # its name in the oldest files
        found = {"pct_return_mae" if name == "return_mae" else name: value for name, value in found.items()}
    mae = found.get("pct_return_mae")
    if mae is not None and not _is_number(mae):
        raise _damaged(path, f"'{key}.pct_return_mae' is not a number")
    return {name: value for name, value in found.items() if _is_number(value) and math.isfinite(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _damaged(path: Path, why: str) -> ConfigFileError:
    return ConfigFileError(f"{path}: {' '.join(why.split())}; correct it, or move it away")


# --- writing


def _encoded(symbol: str, payload: Mapping[str, Any]) -> bytes:
    """The file's bytes: the keys that readers know first and in their order, then the others."""
    missing = [key for key in ("symbol", "model", "config", "validation") if key not in payload]
    if missing or payload["symbol"] != symbol:
        raise ValueError(f"payload of {symbol}: {', '.join(missing) + ' missing' if missing else 'of another symbol'}")
    ordered = {key: payload[key] for key in (*KEYS, *payload) if key in payload}
    try:
        return (json.dumps(ordered, indent=2, allow_nan=False) + "\n").encode()
    except (ValueError, TypeError) as error:
        raise ValueError(f"payload of {symbol}: {error}") from error


def _beside(path: Path, content: bytes) -> Path:
    """Write and sync a temporary file in the same folder. The lock makes one name enough: leftovers are replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # less the umask: others read it
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return temporary


def _keep(root: Path, folder: str, symbol: str, path: Path, *, best: bytes | None, new: bytes) -> None:
    """Put what is about to be replaced into the history, and see it on the disk."""
    old = best if folder == "best" else _bytes(path)
    if old is None or old == new or (folder != "best" and old == best):
        return
    history = root / "history" / symbol
    if folder != "best":
        history = history / folder
    kept = sorted(history.glob("*.json"))
    if kept and kept[-1].read_bytes() == old:  # a writer was killed between here and its rename
        return
    for leftover in history.glob(".*.tmp"):  # of a writer that was killed
        leftover.unlink()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    entry = history / f"{stamp}-{_digest(old)[:8]}.json"
    _beside(entry, old).replace(entry)
    for parent in (history, *list(history.parents)[: len(history.relative_to(root).parts)]):
        _sync_folder(parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in this folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(root: Path, symbol: str) -> Iterator[None]:
    """Serialise the writers of a symbol; the lock dies with its holder."""
    locks = root / ".locks"
    if not locks.exists():
        locks.mkdir(parents=True, exist_ok=True)
        (locks / ".gitignore").write_text("*\n")  # promoted files are committed, locks are not
    with (locks / f"{symbol}.lock").open("a") as lock:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigFileError(f"{symbol}: another process is writing its files; try again") from error
            time.sleep(0.01)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says into one line."""
    try:
        yield
    except OSError as error:
        advice = "free some disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        where = error.filename or path
        raise ConfigFileError(f"{where}: {error.strerror or error}; {advice}") from error
