"""Bar files on disk, good and bad, and the windows cut from them."""

import contextlib
import importlib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forecasters import Bars
from objectives import bars as bars_module
from objectives import windows as w
from objectives.bars import PRICE_NAMES, DataError, bars_fingerprint, bars_until, read_bars, timestamp_text
from objectives.windows import Contexts, SeedKind, Windows, now, split
from storage.symbols import SymbolError, check_symbol
from studies.demo import demo_bars
from studies.series import Series, list_symbols, oddities

HEADER = "timestamp,open,high,low,close,volume"


def bars_of(count: int, start: str = "2020-01-01") -> Bars:
    close = 100 + np.arange(count, dtype=float)
    times = np.datetime64(start, "ns") + np.arange(count) * np.timedelta64(1, "D")
    return Bars(timestamps=times, open=close - 1, high=close + 2, low=close - 2, close=close, volume=close * 10)


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    demo_bars(folder)
    return folder


# --- reading what is good ------------------------------------------------------------------------------------


def test_reads_the_demonstration_bars(demo: Path) -> None:
    import arch.data.sp500

    bars, notes = read_bars(demo / "SP500.csv")
    frame = arch.data.sp500.load()
    assert notes == ()
    assert len(bars) == 5031
    assert bars.timestamps.dtype == np.dtype("datetime64[ns]")
    assert (bars.timestamps == frame.index.to_numpy()).all()
    for ours, theirs in [("open", "Open"), ("high", "High"), ("low", "Low"), ("close", "Close"), ("volume", "Volume")]:
        column = getattr(bars, ours)
        assert column.dtype == np.float64
        assert (column == frame[theirs].to_numpy()).all()  # to the last bit
        assert not column.flags.writeable


@pytest.mark.parametrize(("symbol", "values", "missing"), [("WTI", "arch.data.wti", 290), ("VIX", "arch.data.vix", 46)])
def test_demonstration_bars_of_closes_only(demo: Path, symbol: str, values: str, missing: int) -> None:
    """Days without a value are left out; what is not in the file is the close, and there is no volume."""
    frame = importlib.import_module(values).load()
    bars, notes = read_bars(demo / f"{symbol}.csv")
    assert notes == (f"{demo / symbol}.csv: has no open, high, low; filled with close",)
    assert len(bars) == len(frame) - missing
    known = frame[frame.iloc[:, 0].notna()]
    assert (bars.timestamps == known.index.to_numpy()).all()
    assert (bars.close == known.iloc[:, 0].to_numpy()).all()
    assert all((getattr(bars, name) == bars.close).all() for name in PRICE_NAMES)
    assert bars.volume is None


def test_demonstration_bars_are_left_alone_when_the_same(demo: Path, tmp_path: Path) -> None:
    paths = demo_bars(tmp_path / "new" / "folder")
    names = ["SP500.csv", "NASDAQ.csv", "WTI.csv", "VIX.csv"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(names)  # no leftovers
    for path in paths:
        os.utime(path, (1, 1))
    paths[1].write_text("damaged")
    demo_bars(paths[0].parent)
    assert paths[0].stat().st_mtime == 1
    assert paths[1].read_bytes() == (demo / "NASDAQ.csv").read_bytes()


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        "Date,Open,High,Low,Close,Volume",
        "DATETIME,OPEN,HIGH,LOW,CLOSE,VOLUME",
        "time, open, high, low, close, volume",
        "\ufeffTimestamp,Open,High,Low,Close,Volume",
    ],
)
def test_header_variants(tmp_path: Path, header: str) -> None:
    bars, notes = read_bars(write(tmp_path / "A.csv", header, "2024-01-01,1,3,0.5,2,10", "2024-01-02,2,4,1,3,0"))
    assert notes == ()
    assert bars.timestamps.tolist() == pd.to_datetime(["2024-01-01", "2024-01-02"]).as_unit("ns").asi8.tolist()
    assert [bars.open[0], bars.high[0], bars.low[0], bars.close[0]] == [1, 3, 0.5, 2]
    assert bars.volume is not None
    assert bars.volume.tolist() == [10, 0]


def test_extra_columns_any_order_and_quotes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "A.csv",
        'symbol,"Close",Adj Close,vwap,Date,trade_count',
        'BTC/USD,"2.5",9,,"2024-01-01",',
        "",  # blank lines count as lines and are no rows
        "BTC/USD,3.5,9,,2024-01-02,",
    )
    bars, notes = read_bars(path)
    assert bars.close.tolist() == [2.5, 3.5]
    assert bars.open.tolist() == bars.high.tolist() == bars.low.tolist() == [2.5, 3.5]
    assert bars.volume is None
    assert notes == (f"{path}: has no open, high, low; filled with close",)


def test_windows_line_ends_and_a_trailing_comma(tmp_path: Path) -> None:
    (tmp_path / "A.csv").write_bytes(b"timestamp,close\r\n2024-01-01,1,\r\n2024-01-02,2,\r\n")
    assert read_bars(tmp_path / "A.csv")[0].close.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2024-01-31", "2024-01-31T00:00:00"),
        ("2024-01-31 16:00:00+00:00", "2024-01-31T16:00:00"),
        ("2024-01-31 16:00:00", "2024-01-31T16:00:00"),
        ("2024-01-31T16:00:00Z", "2024-01-31T16:00:00"),
        ("2024-01-31 16:00:00 UTC", "2024-01-31T16:00:00"),
        ("2024-01-31 16:00:00-05:00", "2024-01-31T21:00:00"),
        ("2024-01-31T23:30:00+05:30", "2024-01-31T18:00:00"),
        ("2024-01-31 16:00:00.123456789", "2024-01-31T16:00:00.123456789"),
        ("20240131", "2024-01-31T00:00:00"),
    ],
)
def test_times_become_utc(tmp_path: Path, text: str, utc: str) -> None:
    # Beside another form, since pandas guesses one unit for a whole column.
    path = write(tmp_path / "A.csv", "timestamp,close", "2020-01-01,1", f"{text},2")
    assert read_bars(path)[0].timestamps[1] == np.datetime64(utc, "ns")


def test_sorted_and_the_last_of_equal_times_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "A.csv",
        "timestamp,close",
        "2024-01-03,3",
        "2024-01-01,1",
        "2024-01-03 00:00:00+00:00,33",
        "2024-01-02,2",
        "2024-01-02T19:00:00-05:00,333",
    )
    bars, notes = read_bars(path)
    assert bars.close.tolist() == [1, 2, 333]
    assert (np.diff(bars.timestamps) > np.timedelta64(0)).all()
    assert notes[0] == f"{path}: 2 of 5 rows repeat a timestamp; the last in the file was kept"


def test_the_last_of_many_equal_times_is_kept(tmp_path: Path) -> None:
    days = np.random.default_rng(0).integers(1, 29, size=500)
    rows = [f"2024-01-{day:02},{row}" for row, day in enumerate(days, start=1)]
    bars, notes = read_bars(write(tmp_path / "A.csv", "timestamp,close", *rows))
    assert bars.close.tolist() == [int(np.flatnonzero(days == day)[-1]) + 1 for day in range(1, 29)]
    assert "472 of 500 rows" in notes[0]


@pytest.mark.parametrize("engine_index", ["named", "nameless", "column", "zoned", "text", "date"])
def test_parquet_gives_what_csv_gives(demo: Path, tmp_path: Path, engine_index: str) -> None:
    expected, _ = read_bars(demo / "SP500.csv")
    frame = pd.read_csv(demo / "SP500.csv", parse_dates=["timestamp"]).rename(columns=str.title)
    index = pd.DatetimeIndex(frame.pop("Timestamp"))
    path = tmp_path / "SP500.parquet"
    if engine_index == "named":
        frame.set_index(index.rename("Date")).to_parquet(path)
    elif engine_index == "nameless":
        frame.set_index(index.rename(None)).to_parquet(path)
    elif engine_index == "zoned":
        frame.set_index(index.tz_localize("UTC").tz_convert("America/New_York").rename("Datetime")).to_parquet(path)
    elif engine_index == "text":
        frame.assign(time=index.strftime("%Y-%m-%d")).to_parquet(path)
    elif engine_index == "date":
        frame.assign(date=index.date).to_parquet(path)
    else:
        frame.assign(timestamp=index).to_parquet(path, index=False)
    bars, notes = read_bars(path)
    assert notes == ()
    assert bars_fingerprint(bars) == bars_fingerprint(expected)


# --- refusing what is bad ------------------------------------------------------------------------------------

GOOD = "2024-01-01,1,3,0.5,2,10"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2024-01-09,1,3,0.5,,10", "row 4, column close: an empty cell is not a positive price"),
        ("2024-01-09,1,3,0.5,  ,10", "row 4, column close: an empty cell"),
        ("2024-01-09,1,3,0.5,nan,10", "row 4, column close: 'nan' is not a positive price"),
        ("2024-01-09,1,3,0.5,0,10", "row 4, column close: '0' is not"),
        ("2024-01-09,1,3,0.5,-2.5,10", "row 4, column close: '-2.5' is not"),
        ("2024-01-09,1,3,0.5,inf,10", "row 4, column close: 'inf' is not"),
        ("2024-01-09,1,3,0.5,1e999,10", "row 4, column close: '1e999' is not"),
        ("2024-01-09,1,3,0.5,halted,10", "row 4, column close: 'halted' is not"),
        ('2024-01-09,1,3,0.5,"1,234.5",10', "row 4, column close: '1,234.5' is not"),
        ("2024-01-09,x,3,0.5,2,10", "row 4, column open: 'x' is not"),
        ("2024-01-09,1,NaN,0.5,2,10", "row 4, column high: 'NaN' is not"),
        ("2024-01-09,1,3,-inf,2,10", "row 4, column low: '-inf' is not"),
        ("2024-01-09,1,3,0.5,2,", "row 4, column volume: an empty cell is not a volume of at least 0"),
        ("2024-01-09,1,3,0.5,2,NaN", "row 4, column volume: 'NaN' is not"),
        ("2024-01-09,1,3,0.5,2,-1", "row 4, column volume: '-1' is not"),
        ("2024-01-09,1,3,0.5,2,1.2M", "row 4, column volume: '1.2M' is not"),
        ("2024-01-09,1,3,0.5", "row 4, column close: an empty cell"),
        ("2024-01-09,1,3,0.5,1,234.5,10", "row 4 has 7 cells, the header 6"),
        ("2024-13-09,1,3,0.5,2,10", "row 4, column timestamp: '2024-13-09' is not a time"),
        ("2024-02-30,1,3,0.5,2,10", "row 4, column timestamp: '2024-02-30' is not a time"),
        ("01/02/2024,1,3,0.5,2,10", "row 4, column timestamp: '01/02/2024' is not a time"),
        ("1700000000,1,3,0.5,2,10", "row 4, column timestamp: '1700000000' is not a time"),
        ("2024,1,3,0.5,2,10", "row 4, column timestamp: '2024' is not a time"),
        ("now,1,3,0.5,2,10", "row 4, column timestamp: 'now' is not a time"),
        ("2999-01-01,1,3,0.5,2,10", "row 4, column timestamp: '2999-01-01' is not a time"),
        (",1,3,0.5,2,10", "row 4, column timestamp: an empty cell is not a time"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path / "A.csv", HEADER, GOOD, "", row, "2024-01-10,1,3,0.5,2,10")  # line 3 is blank
    with pytest.raises(DataError) as caught:
        read_bars(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "correct the row" in text
    assert "\n" not in text


TIMES = [
    "2024-01-31", "20240131", "2024-01-31 16", "2024-01-31 16:00", "2024-01-31T16:00:59.123456789Z", " 2024-01-31",
    "2024-01-31 16:00:00 UTC", "2024-01-31 16:00:00-05:00", "2024-01-31 16:00:00-0530", "2024-01-31 16:00:00+14",
    "2024-01-31 24:00:00", "2024-01-31 23:59:60", "2024-01-31 16:00:00.1234567891", "2024-1-31", "2024-01", "2024",
    "1677-12-31", "1678-01-01", "2261-12-31", "2262-01-01", "0001-01-01", "9999-12-31", "2024-01-31 1600",
    "2024-01-31t16:00:00", "2024-01-31 16:00:00z", "2024-01-31T160000", "2024-01-31 16:00:00 +00:00", "2024/01/31", "",
    "2024-02-29", "2023-02-29", "-2024-01-31", "nat", "2024-031", "2024-W05-3", "2024-01-31  16:00",
]  # fmt: skip
NUMBERS = [
    "1", " 1.5 ", "1e3", "1E+3", "1.", ".5", "+2", "1_000", "0x10", "1e-400", "1e400", "5e-324", "0.1", "-0.0", "nan",
    "inf", "Infinity", "1,5", "1 5", "$1", "0.30000000000000004", "123456789012345678901234567890", "true", "", "1d",
    "2.2250738585072011e-308", "9007199254740993", "0.1000000000000000055511151231257827021181583404541015625", "\t7",
]  # fmt: skip
FILES = [
    "timestamp,close\r2024-01-01,1\r2024-01-02,2\r", "timestamp,close\r\n\r\n2024-01-01,1\r\n",
    "\n\ntimestamp,close\n2024-01-01,1", "timestamp,close\n2024-01-01,1,\n", "timestamp,close\n2024-01-01,1,2\n",
    "timestamp,close,note\n2024-01-01,1\n", "timestamp,close\n \n2024-01-01,1\n", "timestamp,close\n2024-01-01\n",
    "\ufefftimestamp,close\n2024-01-01,1\n", "note,timestamp,close\nü,2024-01-01,1\n", "timestamp,close\n\n\n",
    'a,timestamp,close,b\n"x,2024-01-01,5,y\n', 'a,timestamp,close\n"x\ny",2024-01-01,5\n', "timestamp,close\n,\n",
    "timestamp,close\n2024-01-01,1\n2024-01-02 00:00:00Z,2\n20240103,3\n", "timestamp,close\n2024-01-01\0,1\n",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_reading_at_once_gives_what_reading_cell_by_cell_gives(tmp_path: Path, suffix: str) -> None:
    def read_slowly(path: Path) -> dict[str, np.ndarray] | None:
        try:
            return bars_module._read_cell_by_cell(path)
        except DataError:
            return None

    tables = [("2020-01-01", "1", time, "2", "3") for time in TIMES]
    tables += [("2020-01-01", "1", "2020-01-02", price, volume) for price in NUMBERS for volume in ("3", price)]
    at_once = 0
    for number, (first, one, second, price, volume) in enumerate(tables):
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "csv":
            write(path, "timestamp,close,volume", f"{first},{one},3", f"{second},{price},{volume}")
        else:
            frame = pd.DataFrame({"timestamp": [first, second], "close": [one, price], "volume": ["3", volume]})
            for column in ("close", "volume"):
                with contextlib.suppress(ValueError):
                    frame[column] = frame[column].astype(float)
            frame.to_parquet(path)
        at_once += same(bars_module._read_at_once(path), read_slowly(path))
    assert at_once > 25
    for number, text in enumerate(FILES if suffix == "csv" else []):
        (tmp_path / f"F{number}.csv").write_bytes(text.encode())
        same(bars_module._read_at_once(tmp_path / f"F{number}.csv"), read_slowly(tmp_path / f"F{number}.csv"))


def same(at_once: dict[str, np.ndarray] | None, cell_by_cell: dict[str, np.ndarray] | None) -> bool:
    """Whether a file was read at once; then it has to be read to the same bits."""
    if at_once is None:
        return False
    assert cell_by_cell is not None, at_once
    assert at_once.keys() == cell_by_cell.keys()
    for name, column in at_once.items():
        assert column.dtype == cell_by_cell[name].dtype
        assert column.tobytes() == cell_by_cell[name].tobytes(), (name, column, cell_by_cell[name])
    return True


def test_a_plain_file_is_read_at_once(demo: Path) -> None:
    columns = bars_module._read_at_once(demo / "SP500.csv")
    assert columns is not None
    assert same(columns, bars_module._read_cell_by_cell(demo / "SP500.csv"))


def test_the_row_is_the_line_that_an_editor_shows(tmp_path: Path) -> None:
    path = write(tmp_path / "A.csv", "note,timestamp,close", '"two', 'lines",2024-01-01,1', "x,2024-01-02,0")
    with pytest.raises(DataError, match="row 4, column close"):
        read_bars(path)


def test_a_bad_cell_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    frame = pd.DataFrame({"timestamp": ["2024-01-01", "2024-01-02", "2024-01-03"], "close": [1.0, 2.0, np.nan]})
    frame.to_parquet(tmp_path / "A.parquet")
    with pytest.raises(DataError, match=r"A\.parquet: row 3, column close: an empty cell is not a positive price"):
        read_bars(tmp_path / "A.parquet")
    frame.assign(close=1, timestamp=pd.to_datetime(["2024-01-01", None, "2024-01-03"])).to_parquet(
        tmp_path / "A.parquet"
    )
    with pytest.raises(DataError, match="row 2, column timestamp: an empty cell"):
        read_bars(tmp_path / "A.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("A.csv", b"", "has no time column (timestamp, datetime, date or time) and no close column"),
        ("A.csv", b"\n\n", "has no time column"),
        ("A.csv", b"timestamp,close\n", "has a header but no rows"),
        ("A.csv", b"date,price\n2024-01-01,1\n", "has no close column; its header is 'date,price'"),
        ("A.csv", b"close,open\n1,1\n", "has no time column"),
        ("A.csv", b"timestamp;close\n2024-01-01;1\n", "has no time column"),
        ("A.csv", b"date,time,close\n2024-01-01,10:00,1\n", "has a date and a time column; join them"),
        ("A.csv", b"date,close,Close\n2024-01-01,1,1\n", "has 2 columns named close; keep one"),
        ("A.csv", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "is not UTF-8 text"),
        ("A.csv", b"\x00\x01\x02\x03" * 50, "has no time column"),
        ("A.csv", "timestamp,close\n2024-01-01,1\n".encode("utf-16"), "is not UTF-8 text"),
        ("A.csv", b'timestamp,close\n2024-01-01,"1\n2024-01-02,2\n', "is not a CSV file"),
        ("A.parquet", b"", "cannot be read as Parquet"),
        ("A.parquet", b"PAR1 this is no parquet file PAR1", "read"),
        ("A.txt", b"timestamp,close\n2024-01-01,1\n", "is neither a .csv nor a .parquet file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_bars(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_no_file_a_folder_or_no_permission(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_bars(tmp_path / f"GONE{suffix}")
    (tmp_path / f"DIR{suffix}").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_bars(tmp_path / f"DIR{suffix}")
    secret = write(tmp_path / f"SECRET{suffix}", "timestamp,close", "2024-01-01,1")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(DataError, match="cannot be read"):
            read_bars(secret)


# --- symbols -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", ["BTCUSD", "BRK-B", "BF.B", "0700.HK", "A"])
def test_symbols(symbol: str) -> None:
    assert check_symbol(symbol) == symbol


@pytest.mark.parametrize("text", ["", "../x", "btcusd", "BTC/USD", ".A", "-A", "A B", "A\n", "ÄÖ", "A_B"])
def test_not_symbols(text: str) -> None:
    with pytest.raises(SymbolError, match="is not a symbol"):
        check_symbol(text)


def test_a_folder_of_symbols(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    write(tmp_path / "data_summary.csv", "symbol,rows", "SP500,5031")
    write(tmp_path / "RATES.csv", "tenor,rate", "1,2")
    write(tmp_path / "EMPTY.csv")
    write(tmp_path / "HALF.csv", "date,price", "2024-01-01,1")  # a mistake that reading it names
    (tmp_path / "JUNK.parquet").write_bytes(b"junk")  # likewise
    write(tmp_path / "A..B.csv", "date,close", "2024-01-01,1")
    os.mkfifo(tmp_path / "PIPE.csv")
    (tmp_path / "DIR.csv").mkdir()
    write(tmp_path / "README.md", "not bars")
    pd.DataFrame({"Close": [1.0]}, index=pd.DatetimeIndex(["2024-01-01"])).to_parquet(tmp_path / "BRK-B.parquet")
    symbols, _, skipped = list_symbols(tmp_path)
    assert list(symbols) == ["BRK-B", "HALF", "JUNK", "NASDAQ", "SP500", "VIX", "WTI"]
    assert symbols["BRK-B"] == tmp_path / "BRK-B.parquet"
    told = dict(line.removeprefix(f"{tmp_path}/").split(" skipped: ") for line in skipped)
    assert told.keys() == {"data_summary.csv", "RATES.csv", "EMPTY.csv", "A..B.csv", "PIPE.csv", "DIR.csv"}
    assert told["A..B.csv"] == "'A..B' is not a symbol"
    assert told["PIPE.csv"] == told["DIR.csv"] == "it is no regular file"
    assert told["data_summary.csv"] == "'data_summary' is not a symbol"
    assert told["RATES.csv"] == told["EMPTY.csv"] == "has neither a time nor a close column"


def test_a_symbol_in_two_files(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "SP500.csv", tmp_path)
    pd.read_csv(demo / "SP500.csv").to_parquet(tmp_path / "SP500.parquet")
    shutil.copy(demo / "NASDAQ.csv", tmp_path)
    symbols, refused, _ = list_symbols(tmp_path)
    assert list(symbols) == ["NASDAQ"]
    assert re.fullmatch(r"SP500 has two files, .*SP500\.csv and .*SP500\.parquet; keep one", refused["SP500"])


def test_a_missing_or_empty_folder_names_the_option(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match=re.escape(str(folder))) as caught:
            list_symbols(folder)
        assert "--data-dir" in str(caught.value)
        assert "[data]" in str(caught.value)


def test_possible_splits_and_stale_bars_are_said_once() -> None:
    day = np.datetime64("now").astype("datetime64[D]")

    def series(symbol: str, *closes: float, end: np.datetime64 = day) -> Series:
        times = (end - np.arange(len(closes))[::-1]).astype("datetime64[ns]")
        column = np.array(closes)
        bars = Bars(timestamps=times, open=column, high=column, low=column, close=column, volume=None)
        return Series(symbol=symbol, path=Path(f"{symbol}.csv"), bars=bars)

    assert oddities([series("A", 10, 12, 3, 2.9), series("B", 5)]) == []
    old = np.datetime64("2018-12-31")
    jump, at = "possible split, so check that all bars are adjusted", f"{day - 1}"
    assert oddities([series("A", 100, 100, 5, 5.1), series("B", 2, 2, end=old), series("C", 1, 30, end=old)]) == [
        f"{jump}: A at {at} from 100 to 5, C at 2018-12-31 from 1 to 30",
        "stale bars, which end more than 90 days ago: B at 2018-12-31, C at 2018-12-31",
    ]
    (line,) = oddities([series(f"S{number}", 1, end=old) for number in range(500)])
    assert line.endswith("S9 at 2018-12-31, and 490 more")


# --- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 7, 64])
def test_split_geometry(horizon: int) -> None:
    needed = 128 + 50 + 2 * (horizon - 1)
    for count in (needed, needed + 1, needed + 500):
        both = split(bars_of(count), symbol="A", horizon=horizon)
        assert len(both.validation) == 30
        assert len(both.test) == 20
        assert both.test.origins[-1] + horizon == count  # the last target is the last bar
        # The last validation target is the bar before the first test target, and no later.
        assert both.validation.origins[-1] + horizon == both.test.origins[0]
        assert both.validation.origins[0] == 128 + count - needed
    with pytest.raises(DataError, match=f"A: has {needed - 1} bars and needs {needed}"):
        split(bars_of(needed - 1), symbol="A", horizon=horizon)


def test_actuals_and_last_closes() -> None:
    windows = Windows(symbol="A", bars=bars_of(20), origins=(3, 5), horizon=4)
    assert windows.actuals.tolist() == [[103, 104, 105, 106], [105, 106, 107, 108]]  # closes are 100 + index
    assert windows.last_closes.tolist() == [102, 104]
    assert windows.timestamps.tolist() == bars_of(20).timestamps[[3, 5]].tolist()
    assert not windows.actuals.flags.writeable


@pytest.mark.parametrize("horizon", [1, 7])
def test_no_context_sees_its_target(demo: Path, horizon: int) -> None:
    bars, _ = read_bars(demo / "NASDAQ.csv")
    windows = split(bars, symbol="NASDAQ", horizon=horizon).validation
    for index, origin in enumerate(windows.origins):
        later = np.arange(len(bars)) >= origin
        jumped = replace(bars, **{name: np.where(later, 1e6, getattr(bars, name)) for name in PRICE_NAMES})
        planted = replace(windows, bars=jumped)
        (context,) = planted.contexts([index])
        assert len(context) == origin
        assert context.timestamps[-1] < bars.timestamps[origin]
        assert bars_fingerprint(context) == bars_fingerprint(windows.contexts([index])[0])
        assert planted.digest([index]) == windows.digest([index])
        assert (planted.actuals[index] == 1e6).all()  # the jump is where the targets are
        earlier = np.arange(len(bars)) >= origin - 1
        touched = replace(windows, bars=replace(bars, close=np.where(earlier, 1e6, bars.close)))
        assert touched.digest([index]) != windows.digest([index])


def test_a_digest_is_of_every_context_in_order() -> None:
    def digest(symbol: str, bars: Bars, *origins: int) -> str:
        windows = Windows(symbol=symbol, bars=bars, origins=origins, horizon=1)
        return windows.digest(range(len(origins)))

    bars = bars_of(50)
    seen = {digest("A", bars, *origins) for origins in [(20,), (30,), (20, 30), (21, 30), (10, 20, 30)]}
    assert len(seen) == 5
    assert digest("B", bars_of(60), 20, 30) == digest("A", bars, 20, 30)  # of contexts only
    windows = Windows(symbol="A", bars=bars, origins=(20, 30), horizon=1)
    assert windows.digest([1, 0]) != windows.digest([0, 1])


def test_the_most_recent_origins_before_test(demo: Path) -> None:
    bars, _ = read_bars(demo / "SP500.csv")
    both = split(bars, symbol="SP500", horizon=3)
    confirmation = w.recent_origins(bars, 250, symbol="SP500", before=both.test.origins[0], horizon=3)
    assert len(confirmation) == 250
    assert confirmation.origins[-30:] == both.validation.origins


def test_fewer_origins_when_allowed() -> None:
    bars = bars_of(200)
    with pytest.raises(DataError, match="A: has 52 windows of 1 in its first 180 bars, with 128 of context"):
        w.recent_origins(bars, 250, symbol="A", before=180)
    few = w.recent_origins(bars, 250, symbol="A", before=180, at_least=50)
    assert few.origins == tuple(range(128, 180))
    with pytest.raises(DataError, match="needs 53"):
        w.recent_origins(bars, 250, symbol="A", before=180, at_least=53)


@pytest.mark.parametrize("origins", [(), (0, 1), (5, 4), (5, 5), (19,)])
def test_impossible_origins(origins: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="origin"):
        Windows(symbol="A", bars=bars_of(20), origins=origins, horizon=2)


def test_seeds_follow_symbol_time_and_pass_only() -> None:
    long, short = bars_of(400), bars_of(400).slice(100, 350)
    windows = Windows(symbol="A", bars=long, origins=(200, 210, 220), horizon=1)
    moved = Windows(symbol="A", bars=short, origins=(110, 120), horizon=1)  # the same times at other positions
    seeds = windows.seeds(0)
    assert moved.seeds(0) == seeds[1:]
    assert all(0 <= seed < 2**64 for seed in seeds)
    others = [windows.seeds(1), replace(windows, symbol="B").seeds(0)]
    assert len(set(seeds).union(*others)) == 9
    assert seeds[0] == 14058462157771575944  # frozen: stored studies were drawn with such seeds


def test_seeds_of_served_forecasts_follow_the_last_bar_that_is_known() -> None:
    served = now(bars_of(200), symbol="A").seeds(0, SeedKind.SERVED)
    later = Windows(symbol="A", bars=bars_of(400).slice(100, 350), origins=(90, 100, 110), horizon=1)
    assert served == later.seeds(0, SeedKind.SERVED)[1:2]  # the same bar, at another position
    assert len({*later.seeds(0), *later.seeds(0, SeedKind.SERVED), *later.seeds(1, SeedKind.SERVED)}) == 9
    # Nor is it the seed of the study's window that the last bar is the target of.
    assert Windows(symbol="A", bars=bars_of(200), origins=(199,), horizon=1).seeds(0) != served
    assert served == (1319107637000394980,)  # frozen: a forecast once served can be made again


def test_the_contexts_of_now() -> None:
    bars = bars_of(200)
    contexts = now(bars, symbol="A", horizon=3)
    assert (len(contexts), contexts.origins, contexts.horizon) == (1, (200,), 3)
    (context,) = contexts.contexts([0])
    assert bars_fingerprint(context) == bars_fingerprint(bars)
    assert contexts.last_closes.tolist() == [299]
    assert contexts.chunks(10) == ((0,),)
    later = Windows(symbol="A", bars=bars_of(300), origins=(200,), horizon=3)
    assert contexts.digest([0]) == later.digest([0])
    assert (contexts.origin_text(0), later.origin_text(0)) == ("the bar after 2020-07-18", "2020-07-19")
    with pytest.raises(ValueError, match="A: a study's seeds need the time of the target bar"):
        contexts.seeds(0)
    with pytest.raises(DataError, match="A: has 127 bars and needs 128 of context"):
        now(bars_of(127), symbol="A")
    with pytest.raises(ValueError, match="targets"):
        Windows(symbol="A", bars=bars, origins=(200,), horizon=1)
    with pytest.raises(ValueError, match="origin"):
        Contexts(symbol="A", bars=bars, origins=(201,), horizon=1)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 20, 25, 30, 31, 250])
@pytest.mark.parametrize("size", [1, 7, 10, 64])
def test_chunks_cover_everything_and_span_the_period(count: int, size: int) -> None:
    windows = Windows(symbol="A", bars=bars_of(count + 10), origins=tuple(range(10, count + 10)), horizon=1)
    chunks = windows.chunks(size)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(count))
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert 1 <= len(chunks[-1]) <= size
    for chunk in chunks:
        step = count / len(chunk)
        assert list(chunk) == sorted(chunk)
        # Each of its members stays in its own part of the period, give or take the width of one part.
        assert all(abs(index - (m + 0.5) * step) <= step + 1 for m, index in enumerate(chunk))


def test_thirty_windows_in_chunks_of_ten_are_every_third() -> None:
    windows = Windows(symbol="A", bars=bars_of(40), origins=tuple(range(10, 40)), horizon=1)
    assert windows.chunks(10) == tuple(tuple(range(start, 30, 3)) for start in range(3))


def test_bars_until(demo: Path) -> None:
    bars, _ = read_bars(demo / "SP500.csv")
    until = bars_until(bars, "2010-06-15")
    assert until.timestamps[-1] == np.datetime64("2010-06-15")
    assert len(bars_until(bars, bars.timestamps[-1])) == len(bars)
    assert timestamp_text(until.timestamps[-1]) == "2010-06-15"
    for gone in ("2010-06-13", "2030-01-01", "1990-01-01", "tomorrow"):  # a Sunday, after, before, no time
        with pytest.raises(DataError, match=f"no bar at {gone}: the bars run from 1999-01-04 to 2018-12-31"):
            bars_until(bars, gone)


@pytest.mark.parametrize("text", ["2024-01-31", "2024-01-31T16:00:00Z", "2024-01-31T16:00:00.000000001Z"])
def test_times_as_text_and_back(text: str) -> None:
    bars = replace(bars_of(1), timestamps=np.array([text.removesuffix("Z")], dtype="datetime64[ns]"))
    assert timestamp_text(bars.timestamps[0]) == text
    assert len(bars_until(bars, text)) == 1


def test_fingerprints_see_every_value_and_only_the_bars_given() -> None:
    bars = bars_of(30)
    seen = {bars_fingerprint(bars), bars_fingerprint(bars.slice(0, 29)), bars_fingerprint(bars.slice(1, 30))}
    for name in (*PRICE_NAMES, "volume"):
        column = getattr(bars, name).copy()
        column[7] = np.nextafter(column[7], np.inf)
        seen.add(bars_fingerprint(replace(bars, **{name: column})))
    seen.add(bars_fingerprint(replace(bars, timestamps=bars.timestamps + np.timedelta64(1, "ns"))))
    seen.add(bars_fingerprint(replace(bars, volume=None)))
    seen.add(bars_fingerprint(replace(bars, volume=np.zeros(30))))
    assert len(seen) == 11
    assert bars_fingerprint(bars_of(40).slice(0, 30)) == bars_fingerprint(bars)  # appended rows do not matter
