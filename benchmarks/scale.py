"""`python -m benchmarks.scale`: how many workers one Postgres serves, straight and through PgBouncer.

Threads in a few processes stand in for workers, each with a connection of its own. They do nothing but a trial's SQL,
through the calls of a worker: claim, begin, read the trials of others, three params, ten reports, a renewed lease, end,
finish; and choose a study where theirs is done. So each is as busy with the database as a hundred or more real workers,
whose trials take seconds.

Clients and server share this machine, so the rate is of both. What the server alone could do is its CPU time a trial,
of its living processes, between two moments: 2 cores divided by that.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import Connection

from benchmarks import private, recording
from benchmarks.pgbouncer import PROGRAM, PgBouncer
from storage import database, slots, study_rows
from storage.progress import free_counts
from storage.retrying import CLAIM_ATTR, RetryingStorage
from storage.slots import Slot

WORKERS = [8, 64, 256, 512]
PROCESSES = 4  # of one, the interpreter's lock would be the limit
POOL_SIZE = 16  # connections of PgBouncer to the server
TRIALS = 100  # of a study
CORES = 2  # of the server in the figures
LEASE_S = 60.0
PARAM = FloatDistribution(0, 1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of workers. CPU is of the server's processes; `saturation` is what 2 cores could do of it."""

    workers: int
    pgbouncer: bool
    trials_per_s: float
    server_cpu_ms_per_trial: float
    client_cpu_ms_per_trial: float
    pgbouncer_cpu_ms_per_trial: float | None
    ms_per_trial: float  # as a worker sees it, of a crowded machine
    saturation_trials_per_s: float


# --- in a process of workers -----------------------------------------------------------------------------------


def run_trial(storage: RetryingStorage, slot: Slot, known: int) -> int:
    """The SQL of a trial. known: the last id that its reader has seen. Returns the trial's id."""
    template = create_trial(state=TrialState.RUNNING, system_attrs={CLAIM_ATTR: slot.claim}, user_attrs={"worker": "w"})
    trial_id = storage.create_new_trial(slot.study_id, template)
    storage.defer_writes(trial_id)
    storage._get_trials(slot.study_id, None, set(), known)
    for name in ("a", "b", "c"):
        storage._set_trial_param(trial_id, name, 0.5, PARAM, PARAM)
    storage.write_deferred(trial_id)
    for step in range(10):
        storage.set_trial_intermediate_value(trial_id, step, 0.5)
    slots.renew(storage, slot.claim, lease_s=LEASE_S)
    for name in ("mae", "skill", "encode_s", "draw_s"):
        storage.set_trial_user_attr(trial_id, name, 0.5)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    if not slots.finish(storage, slot, seconds={"encode": 0.1}):
        raise RuntimeError("a lease was lost")
    return trial_id


def work(storage: RetryingStorage, name: str, study_ids: list[int], begin: Any, counts: list[int]) -> None:
    """A worker: one trial before the moment of `begin`, then as many as it can until all is over."""
    study_id, known = next(iter(free_counts(storage, study_ids, worker=name))), 0
    while True:
        slot = slots.claim(storage, study_id, worker=name, lease_s=LEASE_S)
        if slot is None:
            study_id, known = next(iter(free_counts(storage, study_ids, worker=name))), 0
            continue
        known = run_trial(storage, slot, known)
        counts[0] += 1  # its own list: nobody else writes to it
        if counts[0] == 1:
            begin.wait()


def process(url: str, number: int, workers: int, study_ids: list[int], ready: Any, begin: Any, asked: Any) -> None:
    """Some of the workers, and answers to how many trials they did and what CPU time they took; ended from outside."""
    database.quiet_optuna()
    counts = [[0] for _ in range(workers)]
    for worker in range(workers):
        storage = database.open_storage(url, wait_s=60, create=False)
        arguments = (storage, f"host{number}:{worker}", study_ids, begin, counts[worker])
        threading.Thread(target=work, args=arguments, daemon=True).start()
    while not all(count for (count,) in counts):
        time.sleep(0.05)
    ready.put(None)
    while True:
        asked.recv()
        asked.send((sum(count for (count,) in counts), time.process_time()))


# --- in the benchmark ------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU seconds of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def server_cpu_s(postmaster: int) -> Mapping[int, float]:
    """CPU seconds of each process of the server."""
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return {pid: cpu_s(pid) for pid in (postmaster, *map(int, children))}


def make_studies(storage: RetryingStorage, count: int) -> list[int]:
    """Empty the database and fill it with studies that wait for their trials."""
    storage.transaction(lambda connection: connection.exec_driver_sql("truncate studies cascade"))

    def fill(connection: Connection, made: Mapping[str, int]) -> None:
        slots.raise_budgets(connection, made.values(), TRIALS)

    ids = study_rows.create_studies(storage, {f"s{n}": {} for n in range(count)}, "mae", fill)
    storage.transaction(lambda connection: connection.exec_driver_sql("analyze"))
    return list(ids.values())


def measure(
    url: str, storage: RetryingStorage, postmaster: int, workers: int, seconds: float, pgbouncer: PgBouncer | None
) -> Point:
    """One point: start the workers, wait until each has done a trial, and count for some seconds."""
    study_ids = make_studies(storage, max(200, 2 * workers))
    context = mp.get_context("spawn")
    ready, begin = context.Queue(), context.Event()
    pipes = [context.Pipe() for _ in range(PROCESSES)]
    processes = [
        context.Process(
            target=process, args=(url, number, workers // PROCESSES, study_ids, ready, begin, theirs), daemon=True
        )
        for number, (_, theirs) in enumerate(pipes)
    ]
    for each in processes:
        each.start()
    try:
        for _ in processes:
            ready.get(timeout=180)
        begin.set()
        time.sleep(1)
        first = reading(pipes, postmaster, pgbouncer)
        time.sleep(seconds)
        last = reading(pipes, postmaster, pgbouncer)
    finally:
        for each in processes:
            each.kill()
            each.join()
    trials = last.trials - first.trials
    server = sum(cpu - first.server.get(pid, 0.0) for pid, cpu in last.server.items())
    elapsed = last.at - first.at
    return Point(
        workers=workers,
        pgbouncer=pgbouncer is not None,
        trials_per_s=trials / elapsed,
        server_cpu_ms_per_trial=1e3 * server / trials,
        client_cpu_ms_per_trial=1e3 * (last.clients - first.clients) / trials,
        pgbouncer_cpu_ms_per_trial=None if pgbouncer is None else 1e3 * (last.pgbouncer - first.pgbouncer) / trials,
        ms_per_trial=1e3 * workers * elapsed / trials,
        saturation_trials_per_s=CORES * trials / server,
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counts of one moment."""

    at: float
    trials: int
    clients: float  # CPU seconds
    server: Mapping[int, float]
    pgbouncer: float


def reading(pipes: list[Any], postmaster: int, pgbouncer: PgBouncer | None) -> Reading:
    for ours, _ in pipes:
        ours.send(None)
    answers = [ours.recv() for ours, _ in pipes]
    return Reading(
        at=time.monotonic(),
        trials=sum(trials for trials, _ in answers),
        clients=sum(cpu for _, cpu in answers),
        server=server_cpu_s(postmaster),
        pgbouncer=cpu_s(pgbouncer.process.pid) if pgbouncer else 0.0,
    )


def main() -> int:
    parser = recording.parser("scale", __doc__)
    parser.add_argument("--workers", type=recording.at_least_one, nargs="+", default=WORKERS, metavar="N")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each point; 30 by default")
    options = parser.parse_args()
    points: list[Point] = []
    with private.folder() as folder, private.server(folder) as server:
        postmaster = int((server.data_dir / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        storage = database.open_storage(server.url, wait_s=10)
        for workers in options.workers:
            points.append(measure(server.url, storage, postmaster, workers, options.seconds, None))
        if PROGRAM:
            pgbouncer = PgBouncer(folder / "pgbouncer", server, pool_size=POOL_SIZE)
            os.environ["PGPASSWORD"] = pgbouncer.password
            for workers in options.workers:
                url = pgbouncer.url("studies")
                points.append(measure(url, storage, postmaster, workers, options.seconds, pgbouncer))
            pgbouncer.stop()
        version = private.postgres(storage)
        storage.engine.dispose()
    columns = list(asdict(points[0]))
    recording.table("light workers on one Postgres", columns, [list(asdict(point).values()) for point in points])
    recording.write(options, [asdict(point) for point in points], postgres=version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
