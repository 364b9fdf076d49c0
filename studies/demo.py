"""What the demonstration starts from: its bars, and the configurations that are in use before its first search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from objectives.bars import DataError
from storage import configs, history
from storage.files import replace_file

INDICES = ("SP500", "NASDAQ")  # those with open, high, low and volume, and of the same days
SYMBOLS = (*INDICES, "WTI", "VIX")

# What a file's `config` says, and why it is there.
WEAK = (
    {"aggregate": "lower_trimmed_mean_25", "num_samples": 64, "samples_per_batch": 64},
    "deliberately weak: the mean of the lower three quarters of few samples; a search is to replace it",
)
SENSIBLE = (
    {"aggregate": "median", "num_samples": 256, "samples_per_batch": 128},
    "the published default; a search is to leave it alone",
)
# Toto's configurations in use; VIX has none, so that it shows a first promotion.
IN_USE: Mapping[str, tuple[Mapping[str, Any], str]] = {"SP500": WEAK, "NASDAQ": SENSIBLE, "WTI": SENSIBLE}


def demo_bars(folder: Path | str, symbols: Sequence[str] = SYMBOLS) -> tuple[Path, ...]:
    """Writes a CSV of each of these symbols, real daily bars that come with the package arch.

    WTI and VIX have closes only. Each file appears whole or not at all, and one that is already the same is left alone.
    Raises DataError.
    """
    from forecasters.packaged import packaged_bars  # brings scipy and statsmodels: a second nobody else should pay

    folder = Path(folder)
    paths = []
    for symbol, table in packaged_bars().items():
        if symbol not in symbols:
            continue
        path = folder / f"{symbol}.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = _csv_text(table)
            if not (path.is_file() and path.read_bytes() == content.encode()):
                replace_file(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        paths.append(path)
    return tuple(paths)


def _csv_text(table: pd.DataFrame) -> str:
    """A header, dates, and floats in the shortest form that reads back equal."""
    dates = pd.DatetimeIndex(table.index).strftime("%Y-%m-%d")
    columns = [table[name].tolist() for name in table]
    lines = [",".join([date, *map(repr, values)]) for date, *values in zip(dates, *columns, strict=True)]
    return "\n".join([",".join(["timestamp", *table]), *lines, ""])


def demo_in_use(root: Path) -> tuple[Path, ...]:
    """Puts the configurations in use where the demonstration's symbols have none yet.

    Each file says in its metadata what it is for. Raises ConfigFileError.
    """
    paths = []
    for symbol, (config, purpose) in IN_USE.items():
        if configs.read(root, "best", symbol) is not None:
            continue
        payload = {
            "symbol": symbol,
            "model": "toto",
            "config": dict(config),
            "validation": {},
            "metadata": {"source": "demonstration", "purpose": purpose},
        }
        history.write(root, symbol, payload, folders=("toto", *configs.CHOSEN), expected_digest=None)
        paths.append(configs.file_path(root, "best", symbol))
    return tuple(paths)
