"""A whole night's run: many symbols, a hundred trials each, random weights at the published size, on the CPUs here.

`python -m benchmarks.overnight` is 24 symbols of Toto (151 M), context 512, 30 windows; `--models kronos --symbols 4`
is Kronos at the size of Kronos-small. `launch-workers` as a user starts it, with a private server: seconds from its
start to the last confirmation, and where the workers' time went. Bars: overlapping pieces of the packaged indices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compile import random_checkpoints
from forecasters.kronos_network import NetworkConfig
from objectives import windows
from storage import database, embedded, slots

BARS = 850  # of a symbol: 512 of context, 250 windows to confirm on, 20 of test, and a few
KRONOS_SMALL = NetworkConfig(s1_bits=10, s2_bits=10, n_layers=8, d_model=512, n_heads=8, ff_dim=1024, learn_te=True)
SETTINGS = """
[data]
dir = "bars"
[toto]
checkpoint = "{toto}"
context_length = 512
[kronos]
checkpoint = "{kronos}"
tokenizer = "{kronos}/tokenizer"
[storage]
data_dir = "server"
[workers]
log_dir = "logs"
[hyperparams]
dir = "hyperparams"
[promotion]
results_dir = "results"
"""


def write_bars(folder: Path, symbols: int) -> None:
    """One file a symbol: pieces of the S&P 500 and NASDAQ in turns, their starts spread evenly."""
    originals = windows.demo_bars(folder)
    lines = [path.read_text().splitlines() for path in originals]
    for path in originals:
        path.unlink()
    rounds = -(-symbols // len(lines))
    for number in range(symbols):
        header, *rows = lines[number % len(lines)]
        start = (len(rows) - BARS) * (number // len(lines)) // max(1, rounds - 1)
        (folder / f"S{number:02}.csv").write_text("\n".join([header, *rows[start : start + BARS], ""]))


def measure(folder: Path, *, model: str, symbols: int, trials: int, workers: int) -> dict[str, Any]:
    """Seconds from start to last confirmation, and of the workers by stage."""
    write_bars(folder / "bars", symbols)
    found = random_checkpoints(folder / "weights", KRONOS_SMALL)
    settings = folder / "studies.toml"
    settings.write_text(SETTINGS.format(toto=found["toto"]["checkpoint"], kronos=found["kronos"]["checkpoint"]))
    command = [str(Path(sys.executable).parent / "launch-workers"), "--config", str(settings), "--cpus", str(workers)]
    began = time.perf_counter()
    subprocess.run([*command, "--models", model, "--trials", str(trials)], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    server = embedded.start(folder / "server")
    os.environ["PGPASSFILE"] = str(server.passfile)
    try:
        storage = database.open_storage(server.url, wait_s=10)
        progress = slots.progress(storage).values()
        spent: dict[str, float] = {}
        for each in slots.seconds(storage).values():
            for stage, seconds in each.items():
                spent[stage] = spent.get(stage, 0.0) + seconds
        confirmed = sum(each.result is not None for each in slots.confirmations(storage).values())
        storage.engine.dispose()
    finally:
        embedded.stop(folder / "server")
    return {
        "model": model,
        "symbols": symbols,
        "workers": workers,
        "finished trials": sum(each.done for each in progress),
        "confirmed studies": confirmed,
        "wall, s": took,
        "workers' seconds": spent,
        "outside slots, worker s": workers * took - sum(spent.values()),  # start, model load, bars, end
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("forecast-studies", "torch", "optuna", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", choices=["toto", "kronos"], default="toto")
    parser.add_argument("--symbols", type=int, default=24)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # root's server runs as another user, who must reach it
        found = measure(
            folder, model=arguments.models, symbols=arguments.symbols, trials=arguments.trials, workers=arguments.cpus
        )
    table = Table("figure", "value", "share of the workers' time")
    for key in ("model", "symbols", "workers", "finished trials", "confirmed studies"):
        table.add_row(key, str(found[key]))
    table.add_row("from start to last confirmation", f"{found['wall, s']:.0f} s")
    whole = found["workers"] * found["wall, s"]
    stages = {**found["workers' seconds"], "start, load and end": found["outside slots, worker s"]}
    for stage, seconds in sorted(stages.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{seconds:.1f} s", f"{100 * seconds / whole:.1f} %")
    Console().print(table)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
