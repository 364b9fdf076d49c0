"""Reading one large file of bars: seconds and memory, each way in a process of its own.

`python -m benchmarks.reading_bars [--rows 2000000] [--rounds 2]`, about two minutes.

A CSV of one-minute bars is read with csv.DictReader into floats and times, the plain way; cell by cell, the way that
says what is wrong with a file and that every file was read in before; at once, the way of a file in which all is as it
should be; and once more by a process that finds it kept by the first. All give the same fingerprint. Memory is the
largest that the process had, and how much of it reading added to what the imports take.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recording
from forecasters import Bars
from objectives import bars as reading
from objectives.bars import PRICE_NAMES, bars_fingerprint

WAYS = ("csv.DictReader", "cell by cell", "at once", "kept")


def write_bars(path: Path, rows: int) -> None:
    """One-minute bars with times in UTC, as data vendors write them."""
    random = np.random.default_rng(0)
    closes = 100 * np.exp(np.cumsum(random.normal(0, 1e-4, rows)))
    times = np.datetime64("2020-01-01") + np.arange(rows) * np.timedelta64(60, "s")
    with path.open("w") as file:
        file.write("timestamp,open,high,low,close,volume\n")
        for time_, close in zip(times.astype(str), closes.tolist(), strict=True):
            prices = f"{close:.4f},{close * 1.001:.4f},{close * 0.999:.4f},{close:.4f}"
            file.write(f"{time_.replace('T', ' ')}+00:00,{prices},{int(close * 7)}\n")


def with_dict_reader(path: Path) -> Bars:
    """What most people write first."""
    columns: dict[str, list[float]] = {name: [] for name in (*PRICE_NAMES, "volume")}
    times = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            times.append(datetime.fromisoformat(row["timestamp"]).astimezone(UTC).replace(tzinfo=None))
            for name, values in columns.items():
                values.append(float(row[name]))
    arrays = {name: np.array(values) for name, values in columns.items()}
    return Bars(timestamps=np.array(times, "datetime64[ns]"), **arrays)


def peak_mib() -> float:
    """The largest memory that this process had; ru_maxrss would begin with that of the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def read(way: str, path: Path) -> dict[str, Any]:
    """Read the file in this process."""
    from studies.bars_cache import read_bars_once

    if way == "cell by cell":
        reading._read_at_once = lambda path: None
    before = peak_mib()
    began, cpu = time.perf_counter(), time.process_time()
    if way == "csv.DictReader":
        bars = with_dict_reader(path)
    else:
        bars, _ = read_bars_once(path) if way == "kept" else reading.read_bars(path)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = peak_mib()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": peak,
        "added_mib": peak - before,
        "fingerprint": bars_fingerprint(bars),
    }


def main() -> None:
    parser = recording.parser("reading_bars", __doc__)
    parser.add_argument("--rows", type=recording.at_least_one, default=2_000_000)
    parser.add_argument("--rounds", type=recording.at_least_one, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "BARS.csv"
        write_bars(path, options.rows)
        time.sleep(1.1)  # until it has settled
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        for number in range(-1, options.rounds):
            for way in WAYS if number >= 0 else WAYS[-1:]:  # first of all it is kept
                command = [sys.executable, "-m", "benchmarks.reading_bars", "--read", way, str(path)]
                answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                if number >= 0:
                    measured[way].append(json.loads(answer))
        size = path.stat().st_size / 2**20
    assert len({one["fingerprint"] for found in measured.values() for one in found}) == 1
    figures: dict[str, Any] = {"rows": options.rows, "file_mib": round(size, 1)}
    for way, found in measured.items():
        figures[way] = {
            name: round(statistics.median(one[name] for one in found), 4)
            for name in ("seconds", "cpu_seconds", "peak_mib", "added_mib")
        }
        figures[way]["times_as_fast"] = round(figures[WAYS[0]]["seconds"] / figures[way]["seconds"], 1)
    recording.table(
        f"{options.rows:,} bars of {size:.0f} MiB",
        ("way", *(name.replace("_", " ") for name in figures[WAYS[0]])),
        [(way, *figures[way].values()) for way in WAYS],
    )
    recording.write(options, figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
