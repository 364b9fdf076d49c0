"""One file of bars in, checked bars out, fingerprinted.

Owns the reading of CSV and Parquet files and every complaint about them. Knows nothing of windows, models or studies.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from forecasters import CLOSE, KEYS, Bars, ExpectedError

TIME_NAMES = ("timestamp", "datetime", "date", "time")  # the first of them that is there is the time column
PRICE_NAMES = KEYS
SUFFIXES = (".csv", ".parquet")
NOT_A_FILE = "it is no regular file"  # a pipe would be waited for

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T].*)?|\d{8}")  # pandas also reads "2020" and "now": we do not
BLOCK_BYTES = 2**20  # of a CSV at a time

_UNNAMED_INDEX = "__index_level_0__"  # what pandas calls a nameless index in a Parquet file
_NS_YEARS = (1678, 2261)  # whole years that datetime64[ns] can hold


class DataError(ExpectedError, ValueError):
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
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: cannot be read ({NOT_A_FILE})")
    columns = _read_at_once(path) or _read_cell_by_cell(path)  # each [T]
    timestamps, count = columns["timestamp"], len(columns["timestamp"])
    if not (timestamps[1:] > timestamps[:-1]).all():
        order = np.argsort(timestamps, kind="stable")  # stable: among equal times file order stays
        times = timestamps[order]
        order = order[np.append(times[1:] != times[:-1], True)]
        columns = {name: column[order] for name, column in columns.items()}

    notes = []
    if repeated := count - len(columns["timestamp"]):
        notes.append(f"{path}: {repeated} of {count} rows repeat a timestamp; the last in the file was kept")
    if absent := [name for name in PRICE_NAMES if name not in columns]:
        notes.append(f"{path}: has no {', '.join(absent)}; filled with close")

    columns = {name: read_only(column) for name, column in columns.items()}
    prices = {name: columns.get(name, columns["close"]) for name in PRICE_NAMES}
    return Bars(timestamps=columns["timestamp"], volume=columns.get("volume"), **prices), tuple(notes)


def read_only(array: np.ndarray) -> np.ndarray:
    """The array itself, which nobody can write to any more."""
    array.setflags(write=False)
    return array


def _read_at_once(path: Path) -> dict[str, np.ndarray] | None:
    """The times and numbers of a file in which all is as it should be, each [T]; None for any other.

    Arrow reads in blocks, 30 times as fast and in a seventh of the memory of reading cell by cell, which then is left
    to say what is wrong, or to read what Arrow does not.
    """
    if path.suffix.lower() not in SUFFIXES:
        return None
    try:
        most, batches = _parquet_batches(path) if path.suffix.lower() == ".parquet" else _csv_batches(path)
        columns: dict[str, np.ndarray] = {}
        count = 0
        for batch in batches:
            rows = slice(count, count + len(batch["timestamp"]))
            for name, cells in batch.items():
                values = _times(cells) if name == "timestamp" else _float64(cells)
                columns.setdefault(name, np.empty(most, values.dtype))[rows] = values
            count = rows.stop
    except (pa.ArrowException, ValueError, OSError):
        return None
    if not count:
        return None
    columns = {name: column[:count] for name, column in columns.items()}
    earliest, latest = (np.datetime64(f"{year}-01-01", "ns") for year in (_NS_YEARS[0], _NS_YEARS[1] + 1))
    good = [(columns["timestamp"] >= earliest) & (columns["timestamp"] < latest)]  # NaT is neither
    good += [_is_number(column, name) for name, column in columns.items() if name != "timestamp"]
    return columns if all(one.all() for one in good) else None


def _csv_batches(path: Path) -> tuple[int, Iterator[dict[str, pa.Array]]]:
    """The largest number of rows there can be, and the columns that we use, block by block.

    Raises ValueError for a file with quotes, or letters that are not ASCII: without those, all that Arrow accepts in a
    number or a time means what it does to Python and pandas.
    """
    most = 1
    with path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        while block := file.read(BLOCK_BYTES):
            if b'"' in block or not block.isascii():
                raise ValueError("quotes or other letters")
            most += block.count(b"\n")
    line, header = next(_csv_records(path), (1, []))
    columns = _columns(path, header)
    names = [str(position) for position in range(len(header))]
    kinds = {names[at]: pa.string() if name == "timestamp" else pa.float64() for name, at in columns.items()}
    batches = pacsv.open_csv(
        path,
        pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, skip_rows=line, column_names=names),
        pacsv.ParseOptions(quote_char=False),
        pacsv.ConvertOptions(column_types=kinds, include_columns=list(kinds), null_values=[]),
    )
    return most, ({name: batch.column(names[at]) for name, at in columns.items()} for batch in batches)


def _parquet_batches(path: Path) -> tuple[int, Iterator[dict[str, pa.Array]]]:
    """The number of rows, and the columns that we use, block by block."""
    file = pq.ParquetFile(path)
    header = file.schema_arrow.names
    columns = {name: header[column] for name, column in _columns(path, header).items()}
    batches = file.iter_batches(columns=list(columns.values()), use_threads=False)
    blocks = ({name: batch.column(column) for name, column in columns.items()} for batch in batches)
    return file.metadata.num_rows, blocks


def _times(column: pa.Array) -> np.ndarray:
    """datetime64[ns] in UTC, NaT where a cell is no time. Raises ValueError or ArrowException."""
    if column.null_count:
        raise ValueError("an empty cell")
    zoned = pa.types.is_timestamp(column.type) and column.type.tz is not None
    for kind in (pa.timestamp("ns", "UTC"),) if zoned else (pa.timestamp("ns"), pa.timestamp("ns", "UTC")):
        with contextlib.suppress(pa.ArrowInvalid):
            column[:1].cast(kind)  # a cast that fails takes 60 times as long as one that does not
            return column.cast(kind).to_numpy(zero_copy_only=False).astype("datetime64[ns]")
    return _parse_times(column.cast(pa.string()).to_pylist())  # several forms in one block


def _float64(column: pa.Array) -> np.ndarray:
    if column.null_count or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ValueError("an empty cell, or numbers of another kind")
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def _read_cell_by_cell(path: Path) -> dict[str, np.ndarray]:
    """The times and numbers of a file, each [T]. Raises DataError naming file, column, row and value."""
    cells, rows = _read_cells(path)
    if not rows:
        raise DataError(f"{path}: has a header but no rows; add bars or remove the file")
    times = _timestamps(path, cells["timestamp"], rows)
    numbers = {name: _numbers(path, name, cells[name], rows) for name in (*PRICE_NAMES, "volume") if name in cells}
    return {"timestamp": times, **numbers}


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
    import pandas as pd  # 0.2 s that commands without bars need not pay

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
    good = _is_number(values, column)
    if not good.all():
        first = int(good.argmin())
        raise DataError(
            f"{path}: row {rows[first]}, column {column}: {_shown(cells[first])} is not a "
            + ("volume of at least 0" if volume else "positive price")
            + "; correct the row or delete it"
            + (", or delete the whole column" if volume else "")
        )
    return values


def _is_number(values: np.ndarray, column: str) -> np.ndarray:
    return np.isfinite(values) & ((values >= 0) if column == "volume" else (values > 0))


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


def require_keys(bars: Bars, keys: Iterable[str], source: Path | str) -> None:
    """Raise DataError, naming `source`, where a key is the close at every bar, as where its column is missing."""
    for key in keys:
        if key != CLOSE and np.array_equal(getattr(bars, key), bars.close):
            raise DataError(
                f"{source}: has no {key} of its own (it is the close at every bar, as where the column is missing); "
                "add the column or ask for the close alone"
            )


def bars_until(bars: Bars, timestamp: np.datetime64 | str) -> Bars:
    """The bars up to and including the one at this time (text as `timestamp_text` writes it). Raises DataError."""
    time = _parse_time(timestamp) if isinstance(timestamp, str) else timestamp.astype("datetime64[ns]")
    place = int(np.searchsorted(bars.timestamps, time))
    if np.isnat(time) or place == len(bars) or bars.timestamps[place] != time:
        first, last = (timestamp_text(bars.timestamps[end]) for end in (0, -1))
        raise DataError(f"there is no bar at {timestamp}: the bars run from {first} to {last}")
    return bars.slice(0, place + 1)


@lru_cache(maxsize=1024)  # pandas takes a millisecond, and thousands of studies end at the same few bars
def _parse_time(timestamp: str) -> np.datetime64:
    return _parse_times([timestamp])[0]


def timestamp_text(timestamp: np.datetime64) -> str:
    """A UTC time as text: the date if it is midnight, else to the second, or as fine as it is."""
    for unit, zone in (("D", ""), ("s", "Z"), ("ns", "Z")):
        text = str(timestamp.astype(f"datetime64[{unit}]"))
        if np.datetime64(text) == timestamp:
            return text + zone
    raise ValueError(f"{timestamp} is not a time")


def unfit(path: Path) -> str:
    """Why a file is no file of bars, by its header alone; empty where it is one, or one with a mistake to be named."""
    if not path.is_file():
        return NOT_A_FILE
    try:
        with _reading(path):
            header = pq.read_schema(path).names if path.suffix.lower() == ".parquet" else _csv_header(path)
    except DataError:
        return ""  # reading it will name the mistake
    names = _recognised(header)
    # One of the two alone is a symbol with a mistake, which reading it will name.
    if not any(name in names for name in (*TIME_NAMES, "close")):
        return "has neither a time nor a close column"
    return ""


def _csv_header(path: Path) -> list[str]:
    return next(_csv_records(path), (1, []))[1]


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
    digest = content_hash(f"bars {len(bars)}".encode())
    for name, column in columns.items():
        digest.update(f"\n{name} {column is not None}\n".encode())
        if column is not None:
            digest.update(np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def content_hash(data: bytes, *, size: int = 16) -> Any:
    """A BLAKE2b digest of `size` bytes, to be updated or read."""
    return hashlib.blake2b(data, digest_size=size)
