"""A folder of bars: its symbols, their series, and the windows that the settings cut from them.

Owns the choice of symbols and files. One file's content is objectives/bars.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forecasters import Bars
from objectives.bars import SUFFIXES, DataError, read_bars, require_keys, timestamp_text, unfit
from objectives.windows import Split, Windows, recent_origins
from objectives.windows import split as split_bars
from storage.symbols import check_symbol, is_symbol
from studies.bars_cache import read_bars_once
from studies.config import Config
from studies.evidence import WindowSpan

SPLIT = 5.0  # factor between two closes above which a split that was not adjusted is likelier than a move
STALE_DAYS = 90
LISTED = 10  # symbols in one line


@dataclass(frozen=True, kw_only=True)
class Series:
    """A symbol's bars as read."""

    symbol: str
    path: Path
    bars: Bars


def read_series(config: Config, symbols: Sequence[str]) -> tuple[list[Series], list[str]]:
    """The bars of the symbols, and notes for the user, as `read_usable_series`. Raises DataError for any bad symbol."""
    series, refused, notes = read_usable_series(config, symbols)
    if refused:
        raise DataError(next(iter(refused.values())))
    return series, notes


def read_usable_series(
    config: Config, symbols: Sequence[str], *, first: bool = False
) -> tuple[list[Series], dict[str, str], list[str]]:
    """The bars of the symbols (none given: of the settings; none there: of every file) that can be searched.

    Beside them what is wrong with each other symbol, in one line, and notes for the user. first: of a folder's files
    only the first that can be searched.
    Raises DataError where not one symbol is left.
    """
    folder = config.data.dir
    files, refused, notes = list_symbols(folder)
    wanted = dict.fromkeys(check_symbol(symbol) for symbol in symbols or config.data.symbols)
    series, bad, said = [], {}, []
    for symbol in wanted or sorted({*files, *refused}):
        try:
            if symbol in refused:
                raise DataError(refused[symbol])
            path = files.get(symbol) or _missing(folder, symbol, files)
            bars, of_file = read_bars_once(path)
            require_keys(bars, [config.search.key], path)
            split_windows(config, symbol, bars)  # too few bars are refused before anything is made
        except DataError as error:
            bad[symbol] = str(error)
            continue
        said += of_file
        series.append(Series(symbol=symbol, path=path, bars=bars))
        if first and not wanted:
            break
    if not series:
        first = next(iter(bad.values()))
        raise DataError(first if len(bad) == 1 else f"not one of {len(bad)} symbols can be used; the first: {first}")
    return series, bad, [*notes, *said]


def file_of(folder: Path, symbol: str) -> Path:
    """The file of a symbol's bars, by its name alone where it has the usual one. Raises DataError for none or two."""
    check_symbol(symbol)
    usual = [path for suffix in SUFFIXES if (path := folder / f"{symbol}{suffix}").is_file()]
    if len(usual) == 1:
        return usual[0]
    files, refused, _ = list_symbols(folder)
    if symbol in refused:
        raise DataError(refused[symbol])
    return files.get(symbol) or _missing(folder, symbol, files)


def _missing(folder: Path, symbol: str, files: Mapping[str, Path]) -> Path:
    """Say why a symbol is not among the files. Raises DataError."""
    for path in sorted(folder.glob(f"{symbol}.*")):
        read_bars(path)  # it is there but was passed over: say what is wrong with it
    others = ", ".join(sorted(files)[:LISTED]) + (", .." if len(files) > LISTED else "")
    raise DataError(f"{folder}: no {symbol}.csv or {symbol}.parquet; the symbols there are {others}")


def oddities(series: Sequence[Series]) -> list[str]:
    """What is allowed and yet worth a look, one line for each kind: a jump between two closes, and old bars."""
    splits, stale = [], []
    for item in series:
        closes, times = item.bars.close, item.bars.timestamps
        jumps = np.abs(np.diff(np.log(closes)))
        if len(jumps) and jumps.max() > np.log(SPLIT):
            at = int(jumps.argmax()) + 1
            splits.append(f"{item.symbol} at {timestamp_text(times[at])} from {closes[at - 1]:g} to {closes[at]:g}")
        if times[-1] < np.datetime64("now") - np.timedelta64(STALE_DAYS, "D"):
            stale.append(f"{item.symbol} at {timestamp_text(times[-1])}")
    kinds = {
        "possible split, so check that all bars are adjusted": splits,
        f"stale bars, which end more than {STALE_DAYS} days ago": stale,
    }
    return [
        f"{kind}: {', '.join(found[:LISTED])}" + (f", and {len(found) - LISTED} more" if len(found) > LISTED else "")
        for kind, found in kinds.items()
        if found
    ]


def list_symbols(folder: Path | str) -> tuple[dict[str, Path], dict[str, str], tuple[str, ...]]:
    """The symbols of a folder with their files; those with two files, and why; a line for each bar file passed over.

    Only headers are read. Raises DataError for no folder or no symbol in it.
    """
    folder = Path(folder)
    hint = "; set --data-dir or `dir` under [data]"
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise DataError(f"data folder {folder}: cannot be read ({error.strerror}){hint}") from error
    symbols: dict[str, Path] = {}
    refused: dict[str, str] = {}
    skipped = []
    for path in paths:
        if reason := _unfit(path):
            skipped.append(f"{path} skipped: {reason}")
        elif path.stem in symbols:
            refused[path.stem] = f"{path.stem} has two files, {symbols[path.stem]} and {path}; keep one"
        else:
            symbols[path.stem] = path
    if not symbols:
        raise DataError("; ".join([f"data folder {folder}: has no SYMBOL.csv or SYMBOL.parquet{hint}", *skipped]))
    return {symbol: path for symbol, path in symbols.items() if symbol not in refused}, refused, tuple(skipped)


def _unfit(path: Path) -> str:
    """Why a file is no symbol's, or nothing."""
    return unfit(path) if is_symbol(path.stem) else f"{path.stem!r} is not a symbol"


def split_windows(config: Config, symbol: str, bars: Bars) -> Split:
    """The validation and test windows of a symbol. Raises DataError where there are too few bars."""
    counts, key = config.windows, config.search.key
    found = split_bars(
        bars,
        symbol=symbol,
        horizon=counts.horizon,
        validation=counts.validation,
        test=counts.test,
        min_context=counts.min_context,
    )
    return Split(validation=found.validation.of_key(key), test=found.test.of_key(key))


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
    ).of_key(config.search.key)


def window_span(found: Windows) -> WindowSpan:
    """What tells two sets of windows of one study apart."""
    first, last = (timestamp_text(found.timestamps[end]) for end in (0, -1))
    return WindowSpan(count=len(found), first=first, last=last)
