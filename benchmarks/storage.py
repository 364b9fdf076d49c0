"""`python -m benchmarks.storage`: what the bookkeeping of a trial costs, stock `study.optimize` against a worker.

Both on one private server, in one run, turn by turn: three floats and three choices proposed by TPE, ten reports with
a pruning decision each (none prunes), a trial's own work next to nothing. The stock way is Optuna's RDBStorage with its
own TPE and PercentilePruner; ours claims a slot, runs the trial as a worker does and finishes the slot. Client CPU is
of the worker processes after two trials that warm them up, server CPU of Postgres over their whole lives.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from sqlalchemy import Engine, event
from sqlalchemy.engine import Connection

from benchmarks import private, recording
from objectives.metrics import Measurement
from storage import database, retrying, slots, study_rows, trials
from storage.retrying import RetryingStorage
from studies import sampler, working
from studies import study as studying
from studies.space import Space

REPORTS = 10
WARM_UP = 2
TIMED = {1: 40, 8: 10}  # trials of each worker that are timed, by the number of workers
KINDS = {"a": ("x", "y", "z"), "b": (1, 2, 3, 4), "c": (True, False)}
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    **{name: FloatDistribution(0, 1) for name in ("f", "g", "h")},
    **{name: CategoricalDistribution(choices) for name, choices in KINDS.items()},
}
PRUNE_WORST = 0.25


class Mixed(Space):
    """Three floats and three choices."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        floats = {name: trial.suggest_float(name, 0, 1) for name in ("f", "g", "h")}
        return floats | {name: trial.suggest_categorical(name, choices) for name, choices in KINDS.items()}


SPACE = Mixed(model="toto", knobs={}, fixed={})


def value(params: Mapping[str, Any]) -> float:
    return sum((params[name] - 0.3) ** 2 for name in ("f", "g", "h")) + params["b"] * 0.01


class Instant:
    """An evaluator whose work is nothing: ten equal reports, so that no trial is pruned, and a value."""

    def measure(
        self,
        windows: object,
        params: Mapping[str, Any],
        *,
        passes: Sequence[int],
        on_rung: Callable[[int, float], None],
    ) -> Measurement:
        for step in range(REPORTS):
            on_rung(step, 1.0)
        mae = value(params)
        return Measurement(
            mae=mae,
            price_mae=mae,
            mae_percent=mae,
            no_change_mae=1.0,
            skill=1 - mae,
            errors=(),
            sampling_error=None,
            windows=0,
            seconds={"encode": 0.0, "draw": 0.0, "aggregate": 0.0},
            latency_s=None,
        )


def objective(trial: optuna.Trial) -> float:
    """The same, as stock Optuna has it."""
    params = SPACE.suggest(trial)
    for step in range(REPORTS):
        trial.report(1.0, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    trial.set_user_attr("measured", {"mae": value(params)})
    return value(params)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one trial, on the average of a cell's timed trials; statements and transactions are of one trial."""

    statements: int
    transactions: int
    client_cpu_ms: float
    server_cpu_ms: float
    trials_per_s: float


# --- in a worker -----------------------------------------------------------------------------------------------


def stock_trial(url: str, name: str) -> tuple[Engine, Callable[[], object]]:
    storage = optuna.storages.RDBStorage(url)
    study = optuna.load_study(
        study_name=name,
        storage=storage,
        sampler=TPESampler(multivariate=True, constant_liar=True, n_startup_trials=sampler.STARTUP_TRIALS),
        pruner=PercentilePruner(100 * (1 - PRUNE_WORST), n_startup_trials=sampler.STARTUP_TRIALS),
    )
    return storage.engine, lambda: study.optimize(objective, n_trials=1)


def our_trial(url: str, name: str) -> tuple[Engine, Callable[[], object]]:
    storage = database.open_storage(url, create=False)
    study_id = storage.get_study_id_from_name(name)
    run = studying.StudyRun(
        study=studying.Study(study_id=study_id, name=name, symbol="S", model="toto", as_of="", definition={}),
        space=SPACE,
        split=cast(Any, type("NoWindows", (), {"validation": None})),
        confirmation=cast(Any, None),
        max_passes=2,
        tolerance=0.001,
        default={},
        pool="none",
        pool_days=0.0,
        optuna_study=optuna.load_study(
            study_name=name,
            storage=storage,
            sampler=sampler.make_sampler(conditional=False),
            pruner=sampler.make_pruner(PRUNE_WORST),
        ),
    )
    evaluator = cast(Any, Instant())
    clock = working.StageClock(storage, [])

    def once() -> None:
        slot = slots.claim(storage, study_id, worker="benchmark", lease_s=60)
        assert slot is not None
        outcome = working.work(
            storage, run, slot, evaluator, attrs={"worker": "benchmark", "device": "cpu"}, clock=clock
        )
        assert outcome.state == "complete", outcome

    return storage.engine, once


WAYS = {"stock": stock_trial, "ours": our_trial}


@contextmanager
def counting(engine: Engine) -> Iterator[Counter[str]]:
    """Statements and transactions on an engine meanwhile; not begin, commit or the pool's ping."""
    found: Counter[str] = Counter()

    def on_statement(*_: Any) -> None:
        found["statements"] += 1

    def on_begin(_: Any) -> None:
        found["transactions"] += 1

    event.listen(engine, "before_cursor_execute", on_statement)
    event.listen(engine, "begin", on_begin)
    yield found
    event.remove(engine, "before_cursor_execute", on_statement)
    event.remove(engine, "begin", on_begin)


def worker(way: str, url: str, name: str, count: int, ready: Any, results: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine, once = WAYS[way](url, name)
    for _ in range(WARM_UP):
        once()
    ready.wait()
    cpu, began = time.process_time(), time.monotonic()
    for _ in range(count):
        once()
    cpu, ended = time.process_time() - cpu, time.monotonic()
    with counting(engine) as found:
        once()
    results.put((cpu, began, ended, found["statements"], found["transactions"]))
    engine.dispose()


# --- in the benchmark ------------------------------------------------------------------------------------------


def fill(storage: RetryingStorage, name: str, count: int, budget: int) -> None:
    """A study with finished trials and open slots."""

    def fill_slots(connection: Connection, study_id: int) -> None:
        slots.raise_budget(connection, study_id, budget)

    study_id = study_rows.create_study(storage, name, {}, "mae", fill_slots)
    rng = random.Random(0)

    def finished(number: int) -> optuna.trial.FrozenTrial:
        params = {name: rng.random() for name in ("f", "g", "h")} | {n: rng.choice(c) for n, c in KINDS.items()}
        return optuna.trial.create_trial(
            value=value(params),
            params=params,
            distributions=DISTRIBUTIONS,
            user_attrs={"worker": "host:1", "device": "cpu", "measured": {"mae": value(params)}},
            system_attrs={retrying.CLAIM_ATTR: f"host:1:{number}"},
            intermediate_values=dict.fromkeys(range(REPORTS), 1.0),
        )

    storage.transaction(lambda c: [trials.create(c, study_id, finished(number)) for number in range(count)])


def cpu_of(postmaster: int) -> float:
    """CPU seconds of the server and of its ended sessions. 0 where there is no /proc."""
    stat = Path(f"/proc/{postmaster}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure(way: str, url: str, name: str, workers: int, postmaster: int) -> Cost:
    """One cell: a number of processes, each with its own connection, on one study."""
    context = mp.get_context("spawn")
    ready, results = context.Barrier(workers), context.Queue()
    count = TIMED[workers]
    server = cpu_of(postmaster)
    processes = [context.Process(target=worker, args=(way, url, name, count, ready, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    time.sleep(0.2)  # the server waits for its ended sessions
    cpu, began, ended, statements, transactions = zip(*found, strict=True)
    return Cost(
        statements=min(statements),
        transactions=min(transactions),
        client_cpu_ms=1e3 * sum(cpu) / (workers * count),
        server_cpu_ms=1e3 * (cpu_of(postmaster) - server) / (workers * (count + WARM_UP + 1)),
        trials_per_s=workers * count / (max(ended) - min(began)),
    )


def main() -> None:
    parser = recording.parser("storage", __doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000], help="trials in the study beforehand")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8], choices=sorted(TIMED))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cells = []
    with private.folder() as folder, private.server(folder) as server:
        postmaster = int((server.data_dir / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        storage = database.open_storage(server.url)
        for count in args.trials:
            for workers in args.workers:
                costs = {}
                for way in WAYS:
                    name = f"{way} {count} {workers}"
                    fill(storage, name, count, budget=workers * (TIMED[workers] + WARM_UP + 1))
                    costs[way] = asdict(measure(way, server.url, name, workers, postmaster))
                cells.append({"trials": count, "workers": workers, **costs})
        postgres = private.postgres(storage)
        storage.engine.dispose()
    rows = []
    for cell in cells:
        for field in Cost.__dataclass_fields__:
            stock, ours = cell["stock"][field], cell["ours"][field]
            better = ours / stock if field == "trials_per_s" else stock / ours if ours else math.nan
            rows.append((field, cell["trials"], cell["workers"], stock, ours, better))
    recording.table(
        "bookkeeping of a trial", ("per trial", "trials in the study", "workers", "stock", "ours", "times better"), rows
    )
    recording.write(args, cells, postgres=postgres)


if __name__ == "__main__":
    main()
