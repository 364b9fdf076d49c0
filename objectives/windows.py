"""Bars in, leak-free windows out, fingerprinted.

Owns the reading of bar files, the choice of symbols in a folder, the split into validation and test, and the
seeds of a window. Knows nothing of models, params, errors of forecasts, studies or databases.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from forecasters import Bars

MIN_CONTEXT = 128  # bars before the first origin
TIME_NAMES = ("timestamp", "datetime", "date", "time")  # the first of them that is there is the time column
PRICE_NAMES = ("open", "high", "low", "close")
SUFFIXES = (".csv", ".parquet")

_SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9.-]*")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T].*)?|\d{8}")  # pandas also reads "2020" and "now": we do not
_UNNAMED_INDEX = "__index_level_0__"  # what pandas calls a nameless index in a Parquet file
_NS_YEARS = (1678, 2261)  # whole years that datetime64[ns] can hold


class DataError(ValueError):
    """Bars cannot be read, or are too few, or are not what the study was opened on."""


# --- reading -----------------------------------------------------------------------------------------------


def read_bars(path: Path | str) -> tuple[Bars, tuple[str, ...]]:
    """The bars of one CSV or Parquet file, sorted by time, and what a reader should know about them.

    Columns in any case: timestamp (or Datetime, Date, Time), close; open, high, low and volume if there; others
    are ignored. Times without a zone are UTC, others become UTC. Of equal timestamps the last in the file stays.
    Arrays are read-only.

    Raises DataError naming file, column, row and value. Rows are line numbers in a CSV (its header is line 1) and
    numbers from 1 in a Parquet file, which has no header row.
    """
    path = Path(path)
    cells, rows = _read_cells(path)
    if not rows:
        raise DataError(f"{path}: has a header but no rows; add bars or remove the file")
    timestamps = _timestamps(path, cells["timestamp"], rows)
    columns = {
        name: _numbers(path, name, cells[name], rows) for name in (*PRICE_NAMES, "volume") if name in cells
    }  # each [T]

    order = np.argsort(timestamps, kind="stable")  # stable: among equal times file order stays
    times = timestamps[order]
    last = np.append(times[1:] != times[:-1], True)
    order = order[last]

    notes = []
    if repeated := len(rows) - len(order):
        notes.append(f"{path}: {repeated} of {len(rows)} rows repeat a timestamp; the last in the file was kept")
    if absent := [name for name in PRICE_NAMES if name not in columns]:
        notes.append(f"{path}: has no {', '.join(absent)}; filled with close")

    close = _frozen(columns["close"][order])
    prices = {name: _frozen(columns[name][order]) if name in columns else close for name in PRICE_NAMES}
    volume = _frozen(columns["volume"][order]) if "volume" in columns else None
    return Bars(timestamps=_frozen(timestamps[order]), volume=volume, **prices), tuple(notes)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _read_cells(path: Path) -> tuple[dict[str, list[Any]], Sequence[int]]:
    """The cells of every column we use, by our name for it, and the row number of each."""
    with _reading(path):
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path)
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
    raise DataError(f"{path}: is neither a .csv nor a .parquet file")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what can go wrong in opening and decoding a file into one line."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8 CSV") from error
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV file ({_one_line(error)})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _read_csv(path: Path) -> tuple[dict[str, list[Any]], list[int]]:
    records = _csv_records(path)
    _, header = next(records, (1, []))
    columns = _columns(path, header)
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    rows = []
    for row, record in records:
        if any(record[len(header) :]):
            # An unquoted thousands separator shifts every later cell by one.
            raise DataError(f"{path}: row {row} has {len(record)} cells, the header {len(header)}; correct the row")
        rows.append(row)
        for name, column in columns.items():
            cells[name].append(record[column] if column < len(record) else "")
    return cells, rows


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the line it starts on (1-based, as an editor shows)."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)  # strict: a quote that never closes would swallow rows
        line = 1
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1


def _read_parquet(path: Path) -> tuple[dict[str, list[Any]], range]:
    with pq.ParquetFile(path) as file:
        header = file.schema_arrow.names
        columns = {name: header[column] for name, column in _columns(path, header).items()}
        table = file.read(columns=list(columns.values()))
    cells = {
        name: _time_cells(table[column]) if name == "timestamp" else table[column].to_pylist()
        for name, column in columns.items()
    }
    return cells, range(1, table.num_rows + 1)


def _time_cells(column: pa.ChunkedArray) -> list[Any]:
    """Times as the text a CSV would hold, so that one parser judges both."""
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        column = column.cast(pa.timestamp(column.type.unit, tz="UTC"))  # same instants, other label
    return column.cast(pa.string()).to_pylist()


def _columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """Where each column that we use is, by our name for it."""
    places = _recognised(header)
    times = [name for name in TIME_NAMES if name in places]
    if times == ["date", "time"]:
        # By the date alone all bars of a day would look like repeats of one.
        raise DataError(f"{path}: has a date and a time column; join them into one column `timestamp`")
    missing = [] if times else ["time column (timestamp, datetime, date or time)"]
    missing += [] if "close" in places else ["close column"]
    if missing:
        shown = ",".join(header)[:80] or "empty"
        raise DataError(f"{path}: has no {' and no '.join(missing)}; its header is {shown!r}")
    wanted = {"timestamp": times[0]} | {name: name for name in (*PRICE_NAMES, "volume") if name in places}
    for name in wanted.values():
        if len(places[name]) > 1:
            raise DataError(f"{path}: has {len(places[name])} columns named {name}; keep one")
    return {ours: places[name][0] for ours, name in wanted.items()}


def _recognised(header: Sequence[str]) -> dict[str, list[int]]:
    """The positions of every column whose name we know."""
    places: dict[str, list[int]] = {}
    for position, cell in enumerate(header):
        name = cell.strip().lower()
        if name in (*TIME_NAMES, *PRICE_NAMES, "volume", _UNNAMED_INDEX):
            places.setdefault(name, []).append(position)
    index = places.pop(_UNNAMED_INDEX, None)
    if index and not any(name in places for name in TIME_NAMES):
        places["timestamp"] = index
    return places


def _parse_times(cells: Sequence[Any]) -> np.ndarray:
    """datetime64[ns] in UTC, NaT where a cell is no time."""
    texts = ["" if cell is None else str(cell).strip().removesuffix(" UTC") for cell in cells]
    texts = [text if _DATE.fullmatch(text) else "" for text in texts]
    # pandas 3 infers the unit, pandas 2 has ns only: nothing may overflow on the way to ns.
    index = pd.DatetimeIndex(pd.to_datetime(texts, utc=True, format="ISO8601", errors="coerce")).tz_localize(None)
    times = index.to_numpy().copy()
    times[(index.year < _NS_YEARS[0]) | (index.year > _NS_YEARS[1])] = np.datetime64("NaT")
    return times.astype("datetime64[ns]")


def _timestamps(path: Path, cells: Sequence[Any], rows: Sequence[int]) -> np.ndarray:
    times = _parse_times(cells)
    if (bad := np.isnat(times)).any():
        first = int(bad.argmax())
        raise DataError(
            f"{path}: row {rows[first]}, column timestamp: {_shown(cells[first])} is not a time such as 2024-01-31 "
            "or 2024-01-31 16:00:00+00:00; correct the row or delete it"
        )
    return times


def _numbers(path: Path, column: str, cells: Sequence[Any], rows: Sequence[int]) -> np.ndarray:
    """float64 [T]: positive prices, or volumes of at least zero."""
    values = np.array([_number(cell) for cell in cells])
    volume = column == "volume"
    good = np.isfinite(values) & ((values >= 0) if volume else (values > 0))
    if not good.all():
        first = int(good.argmin())
        raise DataError(
            f"{path}: row {rows[first]}, column {column}: {_shown(cells[first])} is not a "
            + ("volume of at least 0" if volume else "positive price")
            + "; correct the row or delete it"
            + (", or delete the whole column" if volume else "")
        )
    return values


def _number(cell: Any) -> float:
    try:
        return float(cell)  # Python's own parser: correctly rounded, unlike pandas' fast one
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _shown(cell: Any) -> str:
    if cell is None or not str(cell).strip():
        return "an empty cell"
    text = repr(cell) if isinstance(cell, str) else str(cell)
    return text if len(text) <= 40 else text[:37] + "..."


# --- symbols -----------------------------------------------------------------------------------------------


def check_symbol(text: str) -> str:
    """The symbol itself. Raises DataError unless it is safe as a file name and as a part of a study's name."""
    if not _SYMBOL.fullmatch(text):
        raise DataError(f"{text!r} is not a symbol: capital letters, digits, '.' and '-', such as BTCUSD or BRK-B")
    return text


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
    if not _SYMBOL.fullmatch(path.stem):
        return f"{path.stem!r} is not a symbol"
    try:
        with _reading(path):
            header = pq.read_schema(path).names if path.suffix.lower() == ".parquet" else _csv_header(path)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    names = _recognised(header)
    # One of the two alone is a symbol with a mistake, which reading it will name.
    if not any(name in names for name in (*TIME_NAMES, "close")):
        return "has neither a time nor a close column"
    return ""


def _csv_header(path: Path) -> list[str]:
    return next(_csv_records(path), (1, []))[1]


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
            _write_if_changed(path, _csv_text(frame))
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


def _write_if_changed(path: Path, text: str) -> None:
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- windows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Origins in one symbol's bars: what a forecast may see at each, and what then happened.

    An origin is the index of the first target bar: its context is every bar before it and never that bar.
    """

    symbol: str
    bars: Bars
    origins: tuple[int, ...]  # [W], ascending
    horizon: int
    _digests: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.origins or self.horizon < 1 or list(self.origins) != sorted(set(self.origins)):
            raise ValueError("windows need ascending origins and a horizon of at least 1")
        if self.origins[0] < 1 or self.origins[-1] + self.horizon > len(self.bars):
            raise ValueError("an origin needs a bar before it and its targets among the bars")

    def __len__(self) -> int:
        return len(self.origins)

    def contexts(self, indices: Sequence[int]) -> list[Bars]:
        """The bars before the origins of these windows, oldest first, as views."""
        return [self.bars.slice(0, self.origins[index]) for index in indices]

    @cached_property
    def actuals(self) -> np.ndarray:
        """The closes to be forecast, float64 [W, H], price."""
        steps = np.arange(self.horizon)
        return _frozen(self.bars.close[np.array(self.origins)[:, None] + steps])

    @cached_property
    def last_closes(self) -> np.ndarray:
        """The last close each context knows, float64 [W], price."""
        return _frozen(self.bars.close[np.array(self.origins) - 1])

    @property
    def timestamps(self) -> np.ndarray:
        """The time of each window's first target bar, datetime64[ns] [W], UTC."""
        return self.bars.timestamps[np.array(self.origins)]

    def seeds(self, pass_number: int) -> tuple[int, ...]:
        """One seed below 2**64 a window, from symbol, origin's time and pass: not from position or trial."""
        return tuple(
            int.from_bytes(_hash(f"{self.symbol}\n{time}\n{pass_number}".encode(), size=8).digest(), "big")
            for time in self.timestamps.astype(np.int64)
        )

    def chunks(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Window indices in a fixed order, `size` at a time (the last may be smaller).

        Every chunk is spread evenly over the whole period, so that a running mean is of no one regime.
        """
        if size < 1:
            raise ValueError(f"chunk size {size} is below 1")
        count = len(self.origins)
        sizes = [min(size, count - start) for start in range(0, count, size)]
        # Item m of n in a chunk wants the place (m + 1/2) / n of the period; equal wishes go by chunk.
        wishes = sorted(((2 * m + 1) / (2 * n), chunk) for chunk, n in enumerate(sizes) for m in range(n))
        return tuple(
            tuple(index for index, (_, owner) in enumerate(wishes) if owner == chunk) for chunk in range(len(sizes))
        )

    def digest(self, indices: Sequence[int]) -> str:
        """Of everything the contexts of these windows hold, and nothing else. Computed once."""
        key = tuple(indices)
        if key not in self._digests:
            # Contexts are prefixes: the longest and the lengths say it all.
            origins = [self.origins[index] for index in key]
            longest = bars_fingerprint(self.bars.slice(0, max(origins)))
            self._digests[key] = _hash(f"{longest}\n{origins}".encode()).hexdigest()
        return self._digests[key]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The windows that a search may look at and those that it may not."""

    validation: Windows
    test: Windows


def split(
    bars: Bars, *, symbol: str, horizon: int = 1, validation: int = 30, test: int = 20, min_context: int = MIN_CONTEXT
) -> Split:
    """Test: the last origins whose targets exist. Validation: those before, no target of which reaches a test target.

    Raises DataError, with the bars there are and the bars needed, when the first origin has too short a context.
    """
    needed = min_context + validation + test + 2 * (horizon - 1)
    if len(bars) < needed:
        raise DataError(
            f"{symbol}: has {len(bars)} bars and needs {needed} ({min_context} of context, {validation} validation and "
            f"{test} test windows of {horizon}); add older bars or leave the symbol out"
        )
    last = recent_origins(bars, test, symbol=symbol, horizon=horizon, min_context=min_context)
    first = recent_origins(
        bars, validation, symbol=symbol, before=last.origins[0], horizon=horizon, min_context=min_context
    )
    return Split(validation=first, test=last)


def recent_origins(
    bars: Bars,
    count: int,
    *,
    symbol: str,
    before: int | None = None,
    horizon: int = 1,
    min_context: int = MIN_CONTEXT,
    at_least: int | None = None,
) -> Windows:
    """The most recent `count` origins whose targets all lie before bar `before` (by default: among the bars).

    at_least: be content with fewer, down to this many (default: `count`). Raises DataError if there are fewer.
    """
    if count < 1 or horizon < 1 or min_context < 1:
        raise ValueError("count, horizon and min_context are at least 1")
    end = len(bars) if before is None else before
    stop = end - horizon + 1  # the first origin whose targets reach `end`
    start = max(stop - count, min_context)
    if stop - start < (count if at_least is None else max(at_least, 1)):
        raise DataError(
            f"{symbol}: has {max(stop - start, 0)} windows of {horizon} in its first {end} bars, with {min_context} of "
            f"context, and needs {at_least or count}; add older bars or leave the symbol out"
        )
    return Windows(symbol=symbol, bars=bars, origins=tuple(range(start, stop)), horizon=horizon)


def bars_until(bars: Bars, timestamp: np.datetime64 | str) -> Bars:
    """The bars up to and including the one at this time (text as `timestamp_text` writes it). Raises DataError."""
    time = _parse_times([timestamp])[0] if isinstance(timestamp, str) else timestamp.astype("datetime64[ns]")
    place = int(np.searchsorted(bars.timestamps, time))
    if np.isnat(time) or place == len(bars) or bars.timestamps[place] != time:
        first, last = (timestamp_text(bars.timestamps[end]) for end in (0, -1))
        raise DataError(f"there is no bar at {timestamp}: the bars run from {first} to {last}")
    return bars.slice(0, place + 1)


def timestamp_text(timestamp: np.datetime64) -> str:
    """A UTC time as text: the date if it is midnight, else to the second, or as fine as it is."""
    for unit, zone in (("D", ""), ("s", "Z"), ("ns", "Z")):
        text = str(timestamp.astype(f"datetime64[{unit}]"))
        if np.datetime64(text) == timestamp:
            return text + zone
    raise ValueError(f"{timestamp} is not a time")


# --- fingerprint -------------------------------------------------------------------------------------------


def bars_fingerprint(bars: Bars) -> str:
    """Of every timestamp, price and volume given: equal bars, equal text, on any machine."""
    columns: Mapping[str, np.ndarray | None] = {
        "timestamps": bars.timestamps.astype("datetime64[ns]").view(np.int64),
        "open": bars.open,
        "high": bars.high,
        "low": bars.low,
        "close": bars.close,
        "volume": bars.volume,
    }
    digest = _hash(f"bars {len(bars)}".encode())
    for name, column in columns.items():
        digest.update(f"\n{name} {column is not None}\n".encode())
        if column is not None:
            digest.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _hash(data: bytes, *, size: int = 16) -> Any:
    return hashlib.blake2b(data, digest_size=size)
