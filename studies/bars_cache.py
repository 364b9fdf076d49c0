"""Large files of bars, parsed once a machine and user: what was read is kept, and every worker maps the same pages.

A file that changed is read anew. What cannot be kept is only read again; nothing here fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import numpy as np
import platformdirs

from forecasters import Bars
from objectives.bars import PRICE_NAMES, read_bars

MIN_BYTES = 4 * 2**20  # a smaller file is parsed in less than a tenth of a second
HEAD_BYTES = 2**20  # at most
SETTLED_NS = 10**9  # a file changed since may change again without any of its times telling


def read_bars_once(path: Path) -> tuple[Bars, tuple[str, ...]]:
    """What `read_bars` returns, from memory that other processes share where the file is large. Raises DataError."""
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size >= MIN_BYTES:
            return _kept(path)
    return read_bars(path)


def _kept(path: Path) -> tuple[Bars, tuple[str, ...]]:
    """Raises OSError, DataError."""
    state = _state(path)
    folder = platformdirs.user_cache_path("forecast-studies") / "bars"
    of_path = _digest(str(path.resolve()))
    kept = folder / f"{of_path}-{_digest(state)}"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _load(kept)
    bars, notes = read_bars(path)
    if _state(path) == state and time.time_ns() - path.stat().st_ctime_ns > SETTLED_NS:
        with contextlib.suppress(OSError):
            _store(kept, bars, notes)
            for old in folder.glob(f"{of_path}-*"):
                if old != kept:
                    old.unlink(missing_ok=True)
            return _load(kept)  # the parsed bars are given back
    return bars, notes


def _state(path: Path) -> str:
    """Differs after every change of a file: also one that sets its time back moves that of its inode."""
    found = path.stat()
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _store(kept: Path, bars: Bars, notes: tuple[str, ...]) -> None:
    """A line of JSON, and the columns one after the other. Raises OSError."""
    columns = {"timestamps": bars.timestamps, "close": bars.close}
    columns |= {name: column for name in PRICE_NAMES if (column := getattr(bars, name)) is not bars.close}
    columns |= {"volume": bars.volume} if bars.volume is not None else {}
    head = json.dumps({"columns": list(columns), "rows": len(bars), "notes": notes}).encode()
    head += b" " * (-(len(head) + 1) % 8) + b"\n"
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = kept.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(head)
            for column in columns.values():
                file.write(np.ascontiguousarray(column).view(np.int64).data)
            file.flush()
            os.fsync(file.fileno())  # a loss of power must not leave a whole file of zeros
        temporary.replace(kept)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _load(kept: Path) -> tuple[Bars, tuple[str, ...]]:
    """Raises OSError where there is nothing, ValueError or KeyError where it is damaged."""
    with kept.open("rb") as file:
        line = file.readline(HEAD_BYTES)
    head = json.loads(line)
    names = head["columns"]
    values = np.asarray(np.memmap(kept, np.int64, "r", len(line), (len(names), head["rows"])))
    columns = {name: column.view(np.float64) for name, column in zip(names, values, strict=True)}
    timestamps = columns["timestamps"].view("datetime64[ns]")
    prices = {name: columns.get(name, columns["close"]) for name in PRICE_NAMES}
    return Bars(timestamps=timestamps, volume=columns.get("volume"), **prices), tuple(head["notes"])
