"""A folder of bars: its symbols, their series, and the windows that the settings cut from them.

Owns the choice of symbols and files, and the demonstration's bars. One file's content is objectives/bars.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from forecasters import Bars
from objectives.bars import SUFFIXES, DataError, read_bars, timestamp_text, unfit
from objectives.windows import Split, Windows, recent_origins
from objectives.windows import split as split_bars
from storage.files import replace_file
from storage.symbols import check_symbol, is_symbol
from studies.config import Config
from studies.evidence import WindowSpan


@dataclass(frozen=True, kw_only=True)
class Series:
    """A symbol's bars as read."""

    symbol: str
    path: Path
    bars: Bars


def read_series(config: Config, symbols: Sequence[str]) -> tuple[list[Series], list[str]]:
    """The bars of the symbols (none given: of the settings; none there: of every file), and notes for the user.

    Raises DataError.
    """
    folder = config.data.dir
    files, notes = list_symbols(folder)
    notes = list(notes)
    wanted = [check_symbol(symbol) for symbol in symbols or config.data.symbols] or sorted(files)
    missing = [symbol for symbol in wanted if symbol not in files]
    for symbol in missing:
        for path in sorted(folder.glob(f"{symbol}.*")):
            read_bars(path)  # it is there but was passed over: say what is wrong with it
    if missing:
        raise DataError(
            f"{folder}: no {missing[0]}.csv or {missing[0]}.parquet; the symbols there are {', '.join(sorted(files))}"
        )
    series = []
    for symbol in dict.fromkeys(wanted):
        bars, said = read_bars(files[symbol])
        notes += said
        split_windows(config, symbol, bars)  # too few bars are refused before anything is made
        series.append(Series(symbol=symbol, path=files[symbol], bars=bars))
    return series, notes


def list_symbols(folder: Path | str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The symbols of a folder, by name, with their files; and a line for each bar file passed over.

    Only headers are read. Raises DataError for no folder, no symbol in it, or a symbol with two files.
    """
    folder = Path(folder)
    hint = "; set --data-dir or `dir` under [data]"
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise DataError(f"data folder {folder}: cannot be read ({error.strerror}){hint}") from error
    symbols: dict[str, Path] = {}
    skipped = []
    for path in paths:
        if reason := _unfit(path):
            skipped.append(f"{path} skipped: {reason}")
        elif path.stem in symbols:
            raise DataError(f"{path.stem} has two files, {symbols[path.stem]} and {path}; keep one")
        else:
            symbols[path.stem] = path
    if not symbols:
        raise DataError("; ".join([f"data folder {folder}: has no SYMBOL.csv or SYMBOL.parquet{hint}", *skipped]))
    return symbols, tuple(skipped)


def _unfit(path: Path) -> str:
    """Why a file is no symbol's, or nothing."""
    return unfit(path) if is_symbol(path.stem) else f"{path.stem!r} is not a symbol"


def split_windows(config: Config, symbol: str, bars: Bars) -> Split:
    """The validation and test windows of a symbol. Raises DataError where there are too few bars."""
    counts = config.windows
    return split_bars(
        bars,
        symbol=symbol,
        horizon=counts.horizon,
        validation=counts.validation,
        test=counts.test,
        min_context=counts.min_context,
    )


def confirmation_windows(config: Config, symbol: str, bars: Bars) -> Windows:
    """The most recent origins before test, those of validation among them; fewer than asked where history is short.

    Raises DataError where there are too few bars to validate.
    """
    counts, split = config.windows, split_windows(config, symbol, bars)
    return recent_origins(
        bars,
        max(counts.confirmation, counts.validation),
        symbol=symbol,
        before=split.test.origins[0],
        horizon=counts.horizon,
        min_context=counts.min_context,
        at_least=counts.validation,
    )


def window_span(found: Windows) -> WindowSpan:
    """What tells two sets of windows of one study apart."""
    first, last = (timestamp_text(found.timestamps[end]) for end in (0, -1))
    return WindowSpan(count=len(found), first=first, last=last)


# --- the demonstration's bars --------------------------------------------------------------------------------


def demo_bars(folder: Path | str) -> tuple[Path, ...]:
    """Writes SP500.csv and NASDAQ.csv, real daily index bars 1999..2018 that come with the package arch.

    Each file appears whole or not at all, and one that is already the same is left alone. Raises DataError.
    """
    import arch.data.nasdaq  # arch brings scipy and statsmodels: a second nobody else should pay
    import arch.data.sp500

    folder = Path(folder)
    frames = {"SP500": arch.data.sp500.load(), "NASDAQ": arch.data.nasdaq.load()}
    paths = []
    for symbol, frame in frames.items():
        path = folder / f"{symbol}.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = _csv_text(frame)
            if not (path.is_file() and path.read_bytes() == content.encode()):
                replace_file(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        paths.append(path)
    return tuple(paths)


def _csv_text(frame: pd.DataFrame) -> str:
    """Our header, dates, and floats in the shortest form that reads back equal."""
    columns = [frame[name].tolist() for name in ("Open", "High", "Low", "Close", "Volume")]
    dates = pd.DatetimeIndex(frame.index).strftime("%Y-%m-%d")
    lines = [",".join([date, *map(repr, values)]) for date, *values in zip(dates, *columns, strict=True)]
    return "\n".join(["timestamp,open,high,low,close,volume", *lines, ""])
