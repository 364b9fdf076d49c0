"""A whole night's run: many symbols, a hundred trials each, random weights at the published size, on the CPUs here.

`python -m benchmarks.overnight` is 24 symbols of Toto (151 M), context 512, 30 windows; `--models kronos --symbols 4`
is Kronos at the size of Kronos-small. `launch-workers` as a user starts it, with a private server: seconds from its
start to the last confirmation, and where the workers' time went, by stage. Of the stage "encode" it says what asked for
it: first trials, which are those that found windows not encoded yet under their parameters (later ones take encoded
windows from the cache), configurations measured for comparison before, and confirmations, which have windows of their
own. Bars: overlapping pieces of the packaged indices.

Then some of its studies are confirmed again in this process, one after the other in turns: with every candidate, the
whole grid among them, and with the best trials and the default alone, both on windows that nothing is known of.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import text

from benchmarks import private, recording
from benchmarks.random_models import KRONOS_SMALL, random_checkpoints
from storage import database, slots
from storage.progress import read_confirmations, study_progress, worker_seconds
from storage.retrying import RetryingStorage
from studies import candidates, evaluators
from studies import config as configuration
from studies import study as studying
from studies.confirmation import confirm
from studies.demo import INDICES, demo_bars
from studies.series import read_series

BARS = 850  # of a symbol: 512 of context, 250 windows to confirm on, 20 of test, and a few
SETTINGS = """
[toto]
checkpoint = "{toto}"
context_length = 512
[kronos]
checkpoint = "{kronos}"
tokenizer = "{kronos}/tokenizer"
"""
TINY = {model: f"{model}-tiny" for model in ("toto", "kronos")}
AGAIN = 4  # studies
WITH_GRID, WITHOUT_GRID = "with the whole grid", "best trials and default alone"
CHOOSE = candidates.choose
ENCODES = {slots.BASELINE: "baselines", slots.TRIAL: "first trials", slots.CONFIRMATION: "confirmations"}


def write_bars(folder: Path, symbols: int) -> None:
    """One file a symbol: pieces of the S&P 500 and NASDAQ in turns, their starts spread evenly."""
    originals = demo_bars(folder, INDICES)
    lines = [path.read_text().splitlines() for path in originals]
    for path in originals:
        path.unlink()
    rounds = -(-symbols // len(lines))
    for number in range(symbols):
        header, *rows = lines[number % len(lines)]
        start = (len(rows) - BARS) * (number // len(lines)) // max(1, rounds - 1)
        (folder / f"S{number:02}.csv").write_text("\n".join([header, *rows[start : start + BARS], ""]))


def measure(
    folder: Path, *, model: str, symbols: int, trials: int, workers: int, gpus: str | None = None, tiny: bool = False
) -> dict[str, Any]:
    """Seconds from start to last confirmation, and of the workers by stage. gpus: as --gpus takes them."""
    write_bars(folder / "bars", symbols)
    settings = folder / "studies.toml"
    checkpoints = TINY if tiny else random_checkpoints(folder / "weights", KRONOS_SMALL)
    settings.write_text(private.SETTINGS + SETTINGS.format(**checkpoints))
    devices = ["--gpus", gpus] if gpus else ["--cpus", str(workers)]
    command = [str(Path(sys.executable).parent / "launch-workers"), "--config", str(settings), *devices]
    began = time.perf_counter()
    subprocess.run([*command, "--models", model, "--trials", str(trials)], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - began
    with private.server(folder) as server:
        storage = database.open_storage(server.url, wait_s=10)
        progress = study_progress(storage).values()
        spent: dict[str, float] = {}
        for each in worker_seconds(storage).values():
            for stage, seconds in each.items():
                spent[stage] = spent.get(stage, 0.0) + seconds
        figures = {
            "finished trials": sum(each.done for each in progress),
            "confirmed studies": sum(each.result is not None for each in read_confirmations(storage).values()),
            "wall, s": took,
            "workers' seconds": spent,
            "encode": encodes(storage),
            "outside slots, worker s": workers * took - sum(spent.values()),  # start, model load, bars, end
            "postgres": private.postgres(storage),
        }
        figures["confirmation, s"] = confirm_again(storage, settings, "cuda:0" if gpus else "cpu")
        storage.engine.dispose()
    return figures


def confirm_again(storage: RetryingStorage, settings: Path, device: str) -> dict[str, float]:
    """Seconds that the confirmations of some studies take, with every candidate and without the grid."""
    config = configuration.load(settings)
    studies = studying.list_studies(storage)[:AGAIN]
    forecaster = evaluators.load_forecaster(config, studies[0].model, device=device)
    ways: dict[str, Any] = {WITH_GRID: candidates.choose, WITHOUT_GRID: without_grid}
    spent = dict.fromkeys(ways, 0.0)
    for number, study in enumerate(studies):
        (series,), _ = read_series(config, [study.symbol])
        run = studying.start(storage, config, study, series, forecaster.fingerprint)
        for way in list(ways)[:: -1 if number % 2 else 1]:
            evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=2**30)
            with mock.patch.object(candidates, "choose", ways[way]):
                began = time.perf_counter()
                confirm(run, evaluator, {})
                spent[way] += time.perf_counter() - began
    return spent


def without_grid(*words: Any, **options: Any) -> list[candidates.Candidate]:
    return [one for one in CHOOSE(*words, **options) if one.source != "grid"]


def encodes(storage: RetryingStorage) -> dict[str, dict[str, float]]:
    """How many asked for windows that were not encoded yet, and the workers' seconds that it took, by who asked."""
    # What the cache answers takes no time at all: see Evaluator.
    statement = text(
        "select stage, count(*) as count, sum((seconds->>'encode')::float) as spent from slots "
        "where (seconds->>'encode')::float > 0 group by stage"
    )
    rows = storage.transaction(lambda connection: connection.execute(statement).all())
    found = {ENCODES[row.stage]: {"count": row[1], "seconds": row.spent} for row in rows}
    return {name: found.get(name, {"count": 0, "seconds": 0.0}) for name in ENCODES.values()}


def main() -> None:
    parser = recording.parser("overnight", __doc__)
    parser.add_argument("--models", choices=["toto", "kronos"], default="toto")
    number = recording.at_least_one
    parser.add_argument("--symbols", type=number, default=24)
    parser.add_argument("--trials", type=number, default=100)
    parser.add_argument("--cpus", type=number, default=2, help="workers")
    parser.add_argument("--gpus", metavar="0,0", help="instead: a worker for each of these, of which two may be one")
    parser.add_argument("--tiny", action="store_true", help="the bundled tiny checkpoints")
    options = parser.parse_args()
    workers = len(options.gpus.split(",")) if options.gpus else options.cpus
    with private.folder() as folder:
        kind = {"model": options.models, "gpus": options.gpus, "tiny": options.tiny}
        found = measure(folder, **kind, symbols=options.symbols, trials=options.trials, workers=workers)
    postgres = found.pop("postgres")
    whole = workers * found["wall, s"]

    def share(seconds: float) -> str:
        return recording.per_cent(seconds / whole)

    rows: list[tuple[object, ...]] = [(key, found[key], None) for key in ("finished trials", "confirmed studies")]
    rows.append(("from start to last confirmation, s", found["wall, s"], None))
    stages = {**found["workers' seconds"], "start, load and end": found["outside slots, worker s"]}
    for stage, seconds in sorted(stages.items(), key=lambda item: -item[1]):
        rows.append((f"{stage}, s", seconds, share(seconds)))
        if stage == "encode":
            for name, each in found["encode"].items():
                rows.append((f"    for {name} ({each['count']}), s", each["seconds"], share(each["seconds"])))
    again = found["confirmation, s"]
    rows += [(f"confirmation of {AGAIN} studies again, {way}, s", seconds, None) for way, seconds in again.items()]
    rows.append(("    ratio", again[WITH_GRID] / again[WITHOUT_GRID], None))
    title = f"{options.models}, symbols: {options.symbols}, trials of each: {options.trials}, workers: {workers}"
    recording.table(title, ("figure", "value", "of the workers' time"), rows)
    device = f"cuda:{options.gpus.split(',')[0]}" if options.gpus else "cpu"
    recording.write(options, found, device=device, postgres=postgres)


if __name__ == "__main__":
    main()
