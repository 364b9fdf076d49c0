"""A whole night's run: many symbols, a hundred trials each, random weights at the published size, on the CPUs here.

`python -m benchmarks.overnight` is 24 symbols of Toto (151 M), context 512, 30 windows; `--models kronos --symbols 4`
is Kronos at the size of Kronos-small. `launch-workers` as a user starts it, with a private server: seconds from its
start to the last confirmation, and where the workers' time went, by stage. Of the stage "encode" it says what asked for
it: first trials, which are those that found windows not encoded yet under their parameters (later ones take encoded
windows from the cache), configurations measured for comparison before, and confirmations, which have windows of their
own. Bars: overlapping pieces of the packaged indices.

With `--nights 2` a second night follows, with one bar more of every symbol: what it saves by the encodings that the
first one kept (storage/encodings.py), and whether every confirmed MAE of its first studies is what is measured without
them. Its search proposes other trials, as searches are not seeded; with `--same-search` it tries what the first night
tried, so that both do the same work.

Of one night, some of its studies are then confirmed again in this process, one after the other in turns: with every
candidate, the whole grid among them, and with the best trials and the default alone, both on windows that nothing is
known of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import torch
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
from studies.measuring import FRESH_FROM
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
AGAIN = {"toto": 4, "kronos": 1}  # studies: one of Kronos takes minutes
WITH_GRID, WITHOUT_GRID = "with the whole grid", "best trials and default alone"
CHOOSE = candidates.choose
ENCODES = {slots.BASELINE: "baselines", slots.TRIAL: "first trials", slots.CONFIRMATION: "confirmations"}


def write_bars(folder: Path, symbols: int, *, held_back: int = 0) -> None:
    """One file a symbol: pieces of the S&P 500 and NASDAQ in turns, their starts spread evenly.

    held_back: newest bars that the files do not have yet.
    """
    originals = demo_bars(folder, INDICES)
    lines = [path.read_text().splitlines() for path in originals]
    for path in originals:
        path.unlink()
    rounds = -(-symbols // len(lines))
    for number in range(symbols):
        header, *rows = lines[number % len(lines)]
        start = (len(rows) - BARS) * (number // len(lines)) // max(1, rounds - 1)
        (folder / f"S{number:02}.csv").write_text("\n".join([header, *rows[start : start + BARS - held_back], ""]))


def measure(
    folder: Path,
    *,
    model: str,
    symbols: int,
    trials: int,
    workers: int,
    nights: int = 1,
    same_search: bool = False,
    gpus: str | None = None,
    tiny: bool = False,
) -> list[dict[str, Any]]:
    """Of every night the seconds from start to last confirmation, and of the workers by stage.

    gpus: as --gpus takes them.
    """
    settings, found = folder / "studies.toml", []
    checkpoints = TINY if tiny else random_checkpoints(folder / "weights", KRONOS_SMALL)
    settings.write_text(private.SETTINGS + SETTINGS.format(**checkpoints))
    devices = ["--gpus", gpus] if gpus else ["--cpus", str(workers)]
    command = [str(Path(sys.executable).parent / "launch-workers"), "--config", str(settings), *devices]
    device = "cuda:0" if gpus else "cpu"
    for night in range(nights):
        write_bars(folder / "bars", symbols, held_back=nights - 1 - night)
        if night and same_search:
            with private.server(folder) as server:
                search_again(database.open_storage(server.url, wait_s=10), settings, model, trials)
        began = time.perf_counter()
        subprocess.run([*command, "--models", model, "--trials", str(trials)], check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - began
        with private.server(folder) as server:
            storage = database.open_storage(server.url, wait_s=10)
            ids = [study.study_id for study in newest(storage)]
            progress = study_progress(storage, ids).values()
            spent: dict[str, float] = {}
            for each in worker_seconds(storage, ids).values():
                for stage, seconds in each.items():
                    spent[stage] = spent.get(stage, 0.0) + seconds
            figures = {
                "finished trials": sum(each.done for each in progress),
                "confirmed studies": sum(each.result is not None for each in read_confirmations(storage, ids).values()),
                "wall, s": took,
                "workers' seconds": spent,
                "encode": encodes(storage, ids),
                "outside slots, worker s": workers * took - sum(spent.values()),  # start, model load, bars, end
                "windows from kept encodings": came_from_store(folder),
                "postgres": private.postgres(storage),
            }
            if nights == 1:
                figures["confirmation, s"] = confirm_again(storage, settings, device)
            if night:
                figures["confirmed MAEs"] = measure_again(storage, settings, device)
            storage.engine.dispose()
        found.append(figures)
    return found


def newest(storage: RetryingStorage) -> list[studying.Study]:
    """The studies of the latest night: symbols have their newest bars at different times."""
    latest = {study.symbol: study for study in sorted(studying.list_studies(storage), key=lambda study: study.as_of)}
    return list(latest.values())


def first_of(storage: RetryingStorage) -> list[studying.Study]:
    """The studies that are confirmed again."""
    found = newest(storage)
    return found[: AGAIN[found[0].model]]


def came_from_store(folder: Path) -> list[int]:
    """Windows that came from kept encodings and all that were asked for, by the logs of the last run's workers."""
    run = max((folder / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
    lines = [line for log in run.glob("*.log") for line in log.read_text().splitlines()]
    said = [match for line in lines if (match := re.search(r"(\d+) of (\d+) windows came from", line))]
    return [sum(int(match[part]) for match in said) for part in (1, 2)]


def search_again(storage: RetryingStorage, settings: Path, model: str, trials: int) -> None:
    """Open the studies of a new night with the trials of the night before as theirs."""
    config = configuration.load(settings, {"search": {"trials": trials, "models": (model,)}})
    before = {study.symbol: study for study in newest(storage)}
    series, _ = read_series(config, [])
    checkpoint = evaluators.checkpoint_fingerprint(config, model)
    statement = text(
        "update slots set params = cast(:params as jsonb) where study_id = :study_id and stage = :stage "
        "and number = :number"
    )
    for opened in studying.open_studies(storage, config, series, [model], {model: checkpoint}):
        earlier = optuna.load_study(study_name=before[opened.study.symbol].name, storage=storage).get_trials()
        rows = [
            {"params": json.dumps(trial.params), "study_id": opened.study.study_id, "stage": slots.TRIAL, "number": n}
            for n, trial in enumerate(earlier[:trials])
        ]
        storage.transaction(lambda connection, rows=rows: connection.execute(statement, rows))
    storage.engine.dispose()


def measure_again(storage: RetryingStorage, settings: Path, device: str) -> dict[str, int]:
    """Measure what the first studies of the latest night confirmed without kept encodings: how many MAEs, and how many
    are another number.
    """
    config, counts = configuration.load(settings), {"measured": 0, "other": 0}
    studies = first_of(storage)
    forecaster = evaluators.load_forecaster(config, studies[0].model, device=device)
    for study in studies:
        (series,), _ = read_series(config, [study.symbol])
        run = studying.start(storage, config, study, series, forecaster.fingerprint)
        result = read_confirmations(storage, [study.study_id])[study.study_id].result
        assert result is not None
        evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=2**32, keep=False)
        for one in (*result["candidates"], *result["baselines"].values()):
            if "confirmation" in one:
                passes = range(FRESH_FROM, FRESH_FROM + result["passes"])
                found = evaluator.measure(run.confirmation, one["params"], passes=passes)
                counts["measured"] += 1
                counts["other"] += found.mae != one["confirmation"]["mae"]
    return counts


def confirm_again(storage: RetryingStorage, settings: Path, device: str) -> dict[str, float]:
    """Seconds that the confirmations of some studies take, with every candidate and without the grid."""
    config = configuration.load(settings)
    studies = first_of(storage)
    forecaster = evaluators.load_forecaster(config, studies[0].model, device=device)
    ways: dict[str, Any] = {WITH_GRID: candidates.choose, WITHOUT_GRID: without_grid}
    spent = dict.fromkeys(ways, 0.0)
    for number, study in enumerate(studies):
        (series,), _ = read_series(config, [study.symbol])
        run = studying.start(storage, config, study, series, forecaster.fingerprint)
        for way in list(ways)[:: -1 if number % 2 else 1]:
            evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=2**30, keep=False)
            with mock.patch.object(candidates, "choose", ways[way]):
                began = time.perf_counter()
                confirm(run, evaluator, {})
                spent[way] += time.perf_counter() - began
    return spent


def without_grid(*words: Any, **options: Any) -> list[candidates.Candidate]:
    return [one for one in CHOOSE(*words, **options) if one.source != "grid"]


def encodes(storage: RetryingStorage, ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """How many asked for windows that were not encoded yet, and the workers' seconds that it took, by who asked."""
    # What the cache answers takes no time at all: see Evaluator.
    statement = text(
        "select stage, count(*) as count, sum((seconds->>'encode')::float) as spent from slots "
        "where (seconds->>'encode')::float > 0 and study_id = any(:ids) group by stage"
    )
    rows = storage.transaction(lambda connection: connection.execute(statement, {"ids": list(ids)}).all())
    found = {ENCODES[row.stage]: {"count": row[1], "seconds": row.spent} for row in rows}
    return {name: found.get(name, {"count": 0, "seconds": 0.0}) for name in ENCODES.values()}


def main() -> None:
    parser = recording.parser("overnight", __doc__)
    parser.add_argument("--models", choices=["toto", "kronos"], default="toto")
    number = recording.at_least_one
    parser.add_argument("--symbols", type=number, default=24)
    parser.add_argument("--trials", type=number, default=100)
    parser.add_argument("--cpus", type=number, default=2, help="workers")
    parser.add_argument("--nights", type=number, default=1, help="each with one bar more of every symbol")
    parser.add_argument("--same-search", action="store_true", help="a later night tries what the one before tried")
    parser.add_argument("--gpus", metavar="0,0", help="instead: a worker for each of these, of which two may be one")
    parser.add_argument("--tiny", action="store_true", help="the bundled tiny checkpoints")
    options = parser.parse_args()
    workers = len(options.gpus.split(",")) if options.gpus else options.cpus
    torch.set_num_threads(1)  # as a worker has: their number decides the last bits
    with private.folder() as folder:
        nights = measure(
            folder,
            model=options.models,
            symbols=options.symbols,
            trials=options.trials,
            workers=workers,
            gpus=options.gpus,
            tiny=options.tiny,
            nights=options.nights,
            same_search=options.same_search,
        )
    versions = [found.pop("postgres") for found in nights]
    for number_, found in enumerate(nights, 1):
        show(f"night {number_}: " if len(nights) > 1 else "", found, options, workers)
    if len(nights) > 1:
        ratios = [nights[0]["wall, s"] / found["wall, s"] for found in nights[1:]]
        print("first night / later one: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    device = f"cuda:{options.gpus.split(',')[0]}" if options.gpus else "cpu"
    recording.write(options, nights if len(nights) > 1 else nights[0], device=device, postgres=versions[-1])


def show(night: str, found: dict[str, Any], options: argparse.Namespace, workers: int) -> None:
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
    rows.append(
        (
            "windows from kept encodings, of those asked for",
            "{} of {}".format(*found["windows from kept encodings"]),
            None,
        )
    )
    if again := found.get("confirmation, s"):
        rows += [
            (f"confirmation of {AGAIN[options.models]} studies again, {way}, s", seconds, None)
            for way, seconds in again.items()
        ]
        rows.append(("    ratio", again[WITH_GRID] / again[WITHOUT_GRID], None))
    if maes := found.get("confirmed MAEs"):
        rows.append(("confirmed MAEs measured again without kept encodings", maes["measured"], None))
        rows.append(("    of them other numbers", maes["other"], None))
    title = f"{options.models}, symbols: {options.symbols}, trials of each: {options.trials}, workers: {workers}"
    recording.table(night + title, ("figure", "value", "of the workers' time"), rows)


if __name__ == "__main__":
    main()
