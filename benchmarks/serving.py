"""Forecasts over HTTP: 24 symbols, all keys, half of them with Toto and half with Kronos, as a trading system asks.

`python -m benchmarks.serving` has random weights at the published sizes, of Toto-Open-Base-1.0 and Kronos-base;
`--size tiny` has the bundled ones. `studies serve` is measured with a private Postgres: cold, from the first request of
all symbols to its answer, models loaded on the way; warm, all symbols at once, from memory and, by a second server that
has loaded the models and read no bars, from rows; and hits, one symbol a request at a steady rate, sent when they are
due whether or not earlier ones are answered. `wrk` or `ab` asks for hits as fast as they are answered, where one is
installed.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import private, recording
from benchmarks.overnight import write_bars

KEYS = "open,high,low,close"
PUBLISHED = """
[toto]
checkpoint = "{toto}"
context_length = 512
[kronos]
checkpoint = "{kronos}"
tokenizer = "{kronos}/tokenizer"
"""
TINY = """
[toto]
checkpoint = "toto-tiny"
context_length = 512
[kronos]
checkpoint = "kronos-tiny"
"""
IN_USE = {
    "toto": {"num_samples": 256, "samples_per_batch": 256, "aggregate": "trimmed_mean_10", "context_length": 512},
    "kronos": {"temperature": 0.3, "top_p": 0.9, "top_k": 0, "sample_count": 128, "max_context": 192, "clip": 5.0},
}
PERCENTILES = (50, 90, 99, 99.9, 100)


def make_place(folder: Path, size: str, symbols: int) -> tuple[Path, list[str]]:
    """Settings, bars, weights and promoted files."""
    write_bars(folder / "bars", symbols)
    weights = TINY
    if size == "published":
        from benchmarks.random_models import random_checkpoints

        weights = PUBLISHED.format(**random_checkpoints(folder / "weights"))
    settings = folder / "studies.toml"
    settings.write_text(private.SETTINGS + weights)
    names = [path.stem for path in sorted((folder / "bars").glob("*.csv"))]
    best = folder / "hyperparams" / "best"
    best.mkdir(parents=True)
    for number, name in enumerate(names):
        model = list(IN_USE)[number % 2]
        record = {"symbol": name, "model": model, "config": IN_USE[model], "metadata": {}}
        (best / f"{name}.json").write_text(json.dumps(record))
    return settings, names


@contextmanager
def server(settings: Path) -> Iterator[str]:
    """The address of a server of its own process."""
    command = [str(Path(sys.executable).parent / "studies"), "serve", "--config", str(settings), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.match(r"http://([\d.:]+)/", said)):
            if not (said := process.stderr.readline()) and process.poll() is not None:
                raise SystemExit("the server did not begin")
            print(said, end="", file=sys.stderr)
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


def get(address: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=600)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def all_symbols(address: str, names: list[str]) -> tuple[float, set[str]]:
    """Seconds of a request of all, and how they were answered."""
    began = time.perf_counter()
    status, text = get(address, f"/forecast?symbol={','.join(names)}&keys={KEYS}")
    seconds, said = time.perf_counter() - began, json.loads(text)
    if status != 200 or len(said["forecasts"]) != len(names):
        raise SystemExit(f"status {status}: {said['refused']}")
    return seconds, {one["cached"] for one in said["forecasts"].values()}


def hits(address: str, names: list[str], *, rate: int, seconds: float) -> dict[str, Any]:
    """Latencies from when a request was due to its whole answer, and of /healthz meanwhile."""
    count = int(rate * seconds)
    took, failed = np.full(count, np.nan), []
    began = time.perf_counter() + 0.1

    def ask(number: int) -> None:
        due = began + number / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        try:
            status, text = get(address, f"/forecast?symbol={names[number % len(names)]}&keys={KEYS}")
            if status != 200 or not text.endswith(b"\n"):
                failed.append(status)
            else:
                took[number] = time.perf_counter() - due
        except OSError as error:
            failed.append(str(error))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(count)))
    return {
        "requests": count,
        "answered": int(np.isfinite(took).sum()),
        "failed": len(failed),
        "ms": dict(zip(map(str, PERCENTILES), np.nanpercentile(took * 1000, PERCENTILES).tolist(), strict=True)),
    }


def health(address: str, names: list[str]) -> dict[str, float]:
    """Milliseconds of /healthz, by percentile, while forecasts of another horizon are computed."""
    took = []
    with ThreadPoolExecutor(1) as thread:
        computing = thread.submit(get, address, f"/forecast?symbol={','.join(names)}&keys={KEYS}&horizon=2")
        while not computing.done():
            began = time.perf_counter()
            get(address, "/healthz")
            took.append(1000 * (time.perf_counter() - began))
            time.sleep(0.02)
    return dict(zip(map(str, PERCENTILES), np.percentile(took, PERCENTILES).tolist(), strict=True))


def other_client(address: str, names: list[str], seconds: float) -> dict[str, str]:
    """What a client of another make says of hits of one symbol: as fast as they are answered, on two connections."""
    url = f"http://{address}/forecast?symbol={names[0]}&keys={KEYS}"
    if wrk := shutil.which("wrk"):
        words = [wrk, "-t1", "-c2", f"-d{seconds:.0f}s", "--latency", url]
        wanted = r"^\s+(50%|99%)\s+(\S+)|(Requests/sec):\s+(\S+)|(Non-2xx.*|Socket errors.*)"
    elif ab := shutil.which("ab"):
        words = [ab, "-q", "-c", "2", "-t", f"{seconds:.0f}", "-n", "1000000", url]
        wanted = r"^\s+(50%|99%)\s+(\S+)|(Requests per second):\s+(\S+)|(Failed requests:\s+\d+)"
    else:
        return {"client": "none installed (apt-get install wrk)"}
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = {"client": Path(words[0]).name}
    for match in re.finditer(wanted, said, re.M):
        name, *value = [part for part in match.groups() if part]
        found[name] = value[0] if value else "see the name"
    return found


def measure(folder: Path, options: Any) -> dict[str, Any]:
    settings, names = make_place(folder, options.size, options.symbols)
    began = time.perf_counter()
    with server(settings) as address:
        started = time.perf_counter() - began
        first, kinds = all_symbols(address, names)
        figures: dict[str, Any] = {"start, s": started, "cold, s": first, "cold answers": sorted(kinds)}
        again = [all_symbols(address, names) for _ in range(20)]
        figures["warm, from memory, ms"] = 1000 * float(np.median([seconds for seconds, _ in again]))
        with server(settings) as second:
            # Loads both models, with a horizon that has rows of its own.
            get(second, f"/forecast?symbol={','.join(names[:2])}&keys={KEYS}&horizon=2")
            seconds, kinds = all_symbols(second, names)
            figures["warm, from rows, ms"], figures["answers from rows"] = 1000 * seconds, sorted(kinds)
        figures["hits"] = hits(address, names, rate=options.rate, seconds=options.seconds)
        figures["other client"] = other_client(address, names, min(options.seconds, 10))
        figures["/healthz while computing, ms"] = health(address, names)
        figures["metrics"] = [line for line in get(address, "/metrics")[1].decode().splitlines() if "_total{" in line]
    return figures


def main() -> None:
    parser = recording.parser("serving", __doc__)
    parser.add_argument("--size", choices=["tiny", "published"], default="published")
    parser.add_argument("--symbols", type=recording.at_least_one, default=24)
    parser.add_argument("--rate", type=recording.at_least_one, default=200, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with private.folder() as folder, private.server(folder):  # the database is there before anything is timed
        figures = measure(folder, options)
    found, metrics = figures["hits"], figures.pop("metrics")
    counts: dict[str, int] = {}
    for line in metrics:
        if kind := re.search(r'forecast_requests_total\{kind="(\w+)".*\} ([\d.e+]+)', line):
            counts[kind[1]] = counts.get(kind[1], 0) + int(float(kind[2]))
    figures["requests by kind"] = counts
    rows: list[tuple[object, ...]] = [
        ("start of the server, s", figures["start, s"]),
        (f"cold: all {options.symbols} symbols, s", figures["cold, s"]),
        ("warm: all symbols from memory, ms", figures["warm, from memory, ms"]),
        ("warm: all symbols from rows, ms", figures["warm, from rows, ms"]),
        (f"hits at {options.rate} a second, requests", found["requests"]),
        ("    answered", found["answered"]),
        *((f"    {name} %, ms", value) for name, value in found["ms"].items()),
        *(
            (f"{figures['other client']['client']}: {name}", value)
            for name, value in figures["other client"].items()
            if name != "client"
        ),
        ("/healthz while computing", None),
        *((f"    {name} %, ms", value) for name, value in figures["/healthz while computing, ms"].items()),
        *((f"requests of all servers: {kind}", count) for kind, count in counts.items()),
    ]
    recording.table(f"{options.size} sizes, {os.cpu_count()} cores", ("figure", "value"), rows)
    recording.write(options, figures)


if __name__ == "__main__":
    main()
