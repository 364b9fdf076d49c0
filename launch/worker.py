"""The worker process: on one device, claims slots of the run's studies one by one and works on them until none is left.

The supervisor starts it as `python -m launch.worker RUN_FOLDER NUMBER`, with its device selected by the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from forecasters import ExpectedError, ForecastError, LoadedForecaster, measure_matrix_product
from launch import devices, profiling
from launch.profiling import Profile, work_of
from objectives.bars import DataError
from objectives.evaluation import Evaluator
from storage import DatabaseUnavailable, database, slots
from storage.progress import free_counts, has_open
from storage.retrying import RetryingStorage, one_line
from storage.slots import Slot
from studies import config as configuration
from studies import evaluators, working
from studies import study as studying
from studies.bars_cache import read_bars_once
from studies.config import Config
from studies.measuring import Stopped
from studies.series import Series
from studies.study import Study, StudyMismatch, StudyRun

log = logging.getLogger("worker")

EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED = 0, 3, 130  # 1 is the exit status of Python after a traceback
MAX_FAILURES_IN_A_ROW = 5  # of one study: then the study is at fault and not its slots
IDLE_POLL_S = 0.5
PRIVATE_SERVER = "STUDIES_PRIVATE_SERVER"  # environment: the folder of the private server, where that is the storage
RUNS_KEPT = 8  # studies in memory with their bars: a worker goes to and fro between few
RUN_ID = "STUDIES_RUN_ID"  # environment: what tells the workers of this supervisor from those of all others
BROKEN_DEVICE = "CUDA error"  # after one, every call of this process fails: only a restart gives the device back
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def worker_name(pid: int, run_id: str) -> str:
    """HOST:PID-RUN. Pods on one host's network share its name, and their process ids begin at 1."""
    return f"{os.uname().nodename}:{pid}-{run_id}"


class Interrupted(BaseException):
    """A second signal came: fail the trial at once. Not an Exception, so that no handler of errors catches it."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the supervisor tells its workers in `run.json` in the run folder. Holds no password."""

    config: Config
    series: Mapping[str, str]  # the file of bars by symbol
    studies: tuple[str, ...]  # names of the run's studies
    devices: tuple[str, ...]  # by worker
    profile: bool = False  # count the work of the networks too

    def write(self, folder: Path) -> None:
        values = {
            "config": configuration.to_json(self.config),
            "series": dict(self.series),
            "studies": list(self.studies),
            "devices": list(self.devices),
            "profile": self.profile,
        }
        (folder / "run.json").write_text(json.dumps(values, indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> RunPlan:
        values = json.loads((folder / "run.json").read_text())
        return RunPlan(
            config=configuration.from_json(values["config"]),
            series=values["series"],
            studies=tuple(values["studies"]),
            devices=tuple(values["devices"]),
            profile=values["profile"],
        )


class StopRequest:
    """Handles signals: the first one requests a stop after the current slot, a second one raises Interrupted.

    Where a confirmation computes, which may take long and can be gone on with, the first one raises Stopped.
    SIGHUP means that the supervisor died. It never interrupts, as the kernel sends it for each of the supervisor's
    threads.
    """

    def __init__(self) -> None:
        self.received = self._computing = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number != signal.SIGHUP:
            raise Interrupted
        self.received = True
        if self._computing:
            self._computing = False
            raise Stopped

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """What a request to stop ends at once, by raising Stopped; one that came before ends it as it begins."""
        self._computing = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._computing = False


class LeaseKeeper(threading.Thread):
    """Renews the lease of the worker's current slot, and frees slots whose lease has run out."""

    def __init__(self, storage: RetryingStorage, study_ids: Sequence[int], lease_s: float) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self._storage, self._study_ids, self._lease_s = storage, study_ids, lease_s
        self._claim: str | None = None
        self._ended = threading.Event()

    def hold(self, slot: Slot | None) -> None:
        """Renew the lease of this slot from now on; None: of no slot."""
        self._claim = slot.claim if slot else None

    def end(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            try:
                if claim := self._claim:
                    slots.renew(self._storage, claim, lease_s=self._lease_s)
                # Not for long: what keeps it from freeing others' slots may not keep it from the next renewal.
                slots.reap(self._storage, self._study_ids, lease_s=self._lease_s, wait_s=self._lease_s / 3)
            except DatabaseUnavailable as error:
                log.warning("%s", error)  # the main thread's next statement fails too and ends the worker
            except Exception as error:  # without this thread every slot longer than a lease is lost
                log.exception("the lease keeper goes on after an error: %s", one_line(error))


class Worker:
    """Works on the studies of a run with one device. What it has loaded stays in memory from slot to slot."""

    def __init__(self, plan: RunPlan, storage: RetryingStorage, device: str, stop_request: StopRequest) -> None:
        self.plan, self.storage, self.device, self.stop_request = plan, storage, device, stop_request
        self.config = plan.config
        self.name = worker_name(os.getpid(), os.environ.get(RUN_ID, ""))
        by_name = {study.name: study for study in studying.list_studies(storage)}
        self.studies = {by_name[name].study_id: by_name[name] for name in plan.studies if name in by_name}
        self.forecasters: dict[str, LoadedForecaster] = {}
        self.evaluators: dict[str, Evaluator] = {}
        self.runs: dict[int, StudyRun] = {}  # those that it worked on last, with their bars
        self.failures: dict[int, int] = {}  # in a row, by study id
        self.last_finished: Slot | None = None
        self.clock: working.StageClock | None = None  # once it works
        self.lease_keeper = LeaseKeeper(storage, list(self.studies), self.config.workers.lease_s)

    def work(self) -> int:
        """Work until every study is finished or a signal requests a stop. Returns the exit status."""
        for model in sorted({study.model for study in self.studies.values()}):
            self.evaluators[model] = self._load(model)  # before the first claim, so that loading holds no slot
        clock = self.clock = working.StageClock(self.storage, self.evaluators.values())
        self.lease_keeper.start()
        try:
            study_id: int | None = None
            just_chosen = False
            while not self.stop_request.received:
                # The study is prepared before the claim, so that unreadable bars hold no slot.
                run = None if study_id is None else self._run_of(study_id)
                slot = None if run is None else self._claim(run.study.study_id)
                if run is not None and slot is not None:
                    self._work_on(run, slot, clock)
                    if just_chosen:  # another worker may have chosen it in the same moment
                        study_id = self._choose_study(current=run.study.study_id)
                        just_chosen = study_id != run.study.study_id
                    continue
                study_id, just_chosen = self._choose_study(), True
                if study_id is None:
                    if not has_open(self.storage, list(self.studies)):
                        if self.last_finished is not None:  # the time it was idle since then
                            slots.add_seconds(self.storage, self.last_finished, clock.lap())
                        return EXIT_DONE
                    with clock.timing("idle"):
                        time.sleep(IDLE_POLL_S)  # other workers have the last slots, and one of them may die
            return EXIT_INTERRUPTED
        finally:
            self.lease_keeper.end()
            for model, evaluator in self.evaluators.items():
                if evaluator.keeping is not None and (points := evaluator.kept_points) is not None:
                    log.info("%s: %s", model, evaluator.keeping)
                    log.info(
                        "%s: %d of %d point forecasts were kept by earlier runs", model, points.found, points.asked
                    )

    def profile(self) -> Profile:
        """What this worker has spent, and the work of its networks."""
        if self.clock is not None:
            self.clock.lap()
        seconds = self.clock.spent if self.clock else {}
        return Profile(
            seconds=seconds, flop=work_of(self.evaluators.values()), rate=measure_matrix_product(self.device)
        )

    def _claim(self, study_id: int) -> Slot | None:
        return slots.claim(self.storage, study_id, worker=self.name, lease_s=self.config.workers.lease_s)

    def _choose_study(self, current: int | None = None) -> int | None:
        """The study with most free slots among those without a worker, else among all; None if no slot is free.

        current: the study to stay on unless another worker is on it too.
        """
        free = free_counts(self.storage, list(self.studies), worker=self.name, current=current)
        return next(iter(free), None)

    def _work_on(self, run: StudyRun, slot: Slot, clock: working.StageClock) -> None:
        study = run.study
        self.lease_keeper.hold(slot)
        began = time.monotonic()
        try:
            outcome = working.work(
                self.storage,
                run,
                slot,
                self.evaluators[study.model],
                attrs=self._trial_attrs(study.model),
                clock=clock,
                computing=self.stop_request.computing,
            )
            self.last_finished = slot
        except ForecastError as error:
            self._count_failure(study, slot, str(error))
            return
        except DatabaseUnavailable:
            raise
        except Exception as error:
            described = f"{type(error).__name__}: {error}".removesuffix(": ")
            log.exception("%s slot %d: unexpected error", study.name, slot.number)
            self._count_failure(study, slot, described)
            if BROKEN_DEVICE in described:
                raise
            return
        except Interrupted:
            slots.release(self.storage, slot)
            raise
        finally:
            self.lease_keeper.hold(None)
        self.failures[study.study_id] = 0
        seconds = time.monotonic() - began
        log.info("%s #%d %s %s %.3fs", study.name, outcome.number, outcome.state, outcome.text, seconds)

    def _trial_attrs(self, model: str) -> dict[str, str]:
        """User attributes of every trial: the worker and the device that ran it, and how the network was compiled."""
        compilation = self.forecasters[model].compilation
        compiled = {} if compilation == "off" else {"compilation": compilation}
        return {"worker": self.name, "device": self.device, **compiled}

    def _count_failure(self, study: Study, slot: Slot, error: str) -> None:
        log.error("%s slot %d failed: %s", study.name, slot.number, error)
        slots.fail(self.storage, slot, error)
        self.failures[study.study_id] = self.failures.get(study.study_id, 0) + 1
        if self.failures[study.study_id] >= MAX_FAILURES_IN_A_ROW:
            reason = f"{MAX_FAILURES_IN_A_ROW} failures in a row: {error}"
            slots.park_study(self.storage, study.study_id, reason)
            log.error("%s parked: %s", study.name, reason)

    def _run_of(self, study_id: int) -> StudyRun | None:
        """What is needed to work on a study; None where its bars cannot be used any more, which parks it."""
        if study_id in self.runs:
            self.runs[study_id] = self.runs.pop(study_id)  # the last to be dropped
        else:
            study = self.studies[study_id]
            evaluator = self.evaluators[study.model]
            try:
                with self.clock.timing("read") if self.clock else contextlib.nullcontext():
                    series = self._series_of(study.symbol)
                run = studying.start(self.storage, self.config, study, series, evaluator.forecaster.fingerprint)
            except (DataError, StudyMismatch) as error:
                # Opening it again checks the bars: nothing is to be waited for.
                slots.park_study(self.storage, study_id, str(error), parked_s=0)
                log.error("%s parked: %s", study.name, error)
                return None
            self.runs[study_id] = run
            for old in list(self.runs)[:-RUNS_KEPT]:
                del self.runs[old]
        return self.runs[study_id]

    def _series_of(self, symbol: str) -> Series:
        path = Path(self.plan.series[symbol])
        bars, _ = read_bars_once(path)
        return Series(symbol=symbol, path=path, bars=bars)

    def _load(self, model: str) -> Evaluator:
        forecaster = self.forecasters[model] = evaluators.load_forecaster(self.config, model, device=self.device)
        dtype = self.config.compile.dtype
        log.info("%s on %s, %s, compilation %s", model, self.device, dtype, forecaster.compilation)
        size = cache_bytes(self.config, workers=len(self.plan.devices))
        return evaluators.evaluator_of(self.config, forecaster, cache_bytes=size, profile=self.plan.profile)


def cache_bytes(config: Config, *, workers: int, memory: int | None = None) -> int:
    """The size of an evaluator's cache of encoded windows; each worker has one evaluator per model.

    workers: how many share this machine. memory: the machine's, in bytes; by default what this process may use.
    """
    per_worker = config.workers.cache_mib * 2**20
    if not per_worker:
        per_worker = (memory or devices.memory_bytes()) // 4 // workers
    return per_worker // len(config.search.models)


def die_with_parent() -> None:
    """Have the kernel send SIGHUP when the supervisor dies, kill -9 included, so that no worker is orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    """Run the worker with the command line's RUN_FOLDER and NUMBER. Returns the exit status."""
    folder, number = Path(arguments[0]), int(arguments[1])
    die_with_parent()
    stop_request = StopRequest()
    if os.getppid() != int(os.environ["STUDIES_SUPERVISOR_PID"]):
        return EXIT_INTERRUPTED  # the supervisor died before the kernel was asked
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.raiseExceptions = False  # a full disk under the log is no reason for tracebacks, or to end
    database.quiet_optuna()
    try:
        plan = RunPlan.read(folder)
        # Patient: the supervisor has used this URL, and may restart a worker while the server is unavailable.
        private = os.environ.get(PRIVATE_SERVER)
        storage = database.open_storage(
            os.environ["OPTUNA_STORAGE"],
            wait_s=plan.config.storage.wait_s,
            create=False,
            patient=True,
            private=Path(private) if private else None,
        )
        worker = Worker(plan, storage, plan.devices[number], stop_request)
        try:
            return worker.work()
        finally:
            if plan.profile:
                profiling.write(folder, f"{number}-{os.getpid()}", worker.profile())
    except ExpectedError as error:
        log.error("%s", error)
        return EXIT_ERROR
    except Interrupted:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
