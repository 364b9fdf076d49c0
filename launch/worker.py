"""The pull loop: one process on one device claims slots and does them until none is left.

Started by the supervisor as `python -m launch.worker RUN_FOLDER NUMBER`, its device already in its environment.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from forecasters import ExpectedError, ForecastError, LoadedForecaster
from launch import devices
from objectives.bars import read_bars
from objectives.evaluation import Evaluator
from storage import DatabaseUnavailable, database, slots
from storage.progress import free_counts, study_progress
from storage.retrying import RetryingStorage
from storage.slots import Slot
from studies import config as configuration
from studies import evaluators, working
from studies import study as studying
from studies.config import Config
from studies.series import Series
from studies.study import Study, StudyRun

log = logging.getLogger("worker")

EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED = 0, 3, 130  # 1 is what Python gives a traceback
FAILURES_IN_A_ROW = 5  # on one study: then it is the study, not the slots
IDLE_POLL_S = 0.5
PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A second signal: fail the trial at once. Not an Exception, so that nothing takes it for an error."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the supervisor wrote for its workers: `run.json` in the run folder. Holds no password."""

    config: Config
    series: Mapping[str, str]  # the file of each symbol
    studies: tuple[str, ...]  # names of the studies of this run
    devices: tuple[str, ...]  # the device of each worker

    def write(self, folder: Path) -> None:
        values = {
            "config": configuration.to_json(self.config),
            "series": dict(self.series),
            "studies": list(self.studies),
            "devices": list(self.devices),
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
        )


class Stopping:
    """The signals so far: the first asks to stop after this slot, the second to stop at once.

    SIGHUP says that the supervisor died. It only asks: the kernel sends it once for every thread the supervisor had.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number != signal.SIGHUP:
            raise Interrupted
        self.asked = True


class LeaseKeeper(threading.Thread):
    """Renews the lease of the slot at hand, and frees those whose worker fell silent."""

    def __init__(self, storage: RetryingStorage, study_ids: Sequence[int], lease_s: float) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self._storage, self._study_ids, self._lease_s = storage, study_ids, lease_s
        self._claim: str | None = None
        self._ended = threading.Event()

    def hold(self, slot: Slot | None) -> None:
        """Renew this slot's lease from now on; None: no slot's."""
        self._claim = slot.claim if slot else None

    def end(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            try:
                if claim := self._claim:
                    slots.renew(self._storage, claim, lease_s=self._lease_s)
                slots.reap(self._storage, self._study_ids)
            except DatabaseUnavailable as error:
                log.warning("%s", error)  # the main thread's next statement says the same and ends the worker


class Worker:
    """One device's share of a run."""

    def __init__(self, job: RunPlan, storage: RetryingStorage, device: str, stopping: Stopping) -> None:
        self.job, self.storage, self.device, self.stopping = job, storage, device, stopping
        self.config = job.config
        self.name = database.worker_name()
        named = {study.name: study for study in studying.list_studies(storage)}
        self.studies = {named[name].study_id: named[name] for name in job.studies if name in named}
        self.forecasters: dict[str, LoadedForecaster] = {}
        self.evaluators: dict[str, Evaluator] = {}
        self.series: dict[str, Series] = {}
        self.runs: dict[int, StudyRun] = {}
        self.failures: dict[int, int] = {}
        self.presence = slots.StudyPresence(storage)
        self.last: Slot | None = None  # that it finished
        self.keeper = LeaseKeeper(storage, list(self.studies), self.config.workers.lease_s)

    def work(self) -> int:
        """Until every study is done, or a signal came. Returns the exit status."""
        for model in sorted({study.model for study in self.studies.values()}):
            self.evaluators[model] = self._load(model)  # warm before the first claim
        watch = working.StageClock(self.storage, self.evaluators.values())
        self.keeper.start()
        try:
            study_id: int | None = None
            while not self.stopping.asked:
                # The run is made ready before the claim: bad bars must not hold a slot.
                run = None if study_id is None else self._run(study_id)
                slot = None if run is None else self._claim(run.study.study_id)
                if run is not None and slot is not None:
                    self._do(run, slot, watch)
                    continue
                self.presence.leave()
                study_id = self._choose()
                if study_id is None:
                    if self._all_done():
                        if self.last is not None:  # what it waited for at the end
                            slots.add_seconds(self.storage, self.last, watch.lap())
                        return EXIT_DONE
                    with watch.timing("idle"):
                        time.sleep(IDLE_POLL_S)  # others are at the last slots: one of them may die
            return EXIT_INTERRUPTED
        finally:
            self.keeper.end()

    def _claim(self, study_id: int) -> Slot | None:
        return slots.claim(self.storage, study_id, worker=self.name, lease_s=self.config.workers.lease_s)

    def _choose(self) -> int | None:
        """A study with free slots that nobody is on, else the one with most left."""
        free = free_counts(self.storage, list(self.studies))
        by_most_left = sorted(free, key=lambda study_id: (-free[study_id], study_id))
        for study_id in by_most_left:
            if self.presence.take(study_id):
                return study_id
        return by_most_left[0] if by_most_left else None

    def _all_done(self) -> bool:
        progress = study_progress(self.storage)
        return all(progress[study_id].open == 0 for study_id in self.studies if study_id in progress)

    def _do(self, run: StudyRun, slot: Slot, watch: working.StageClock) -> None:
        study = run.study
        self.keeper.hold(slot)
        began = time.monotonic()
        try:
            outcome = working.work(
                self.storage,
                run,
                slot,
                self.evaluators[study.model],
                attrs=self._attrs(study.model),
                watch=watch,
            )
            self.last = slot
        except ForecastError as error:
            self._count_failure(study, slot, error)
            return
        except Interrupted:
            slots.release(self.storage, slot)
            raise
        finally:
            self.keeper.hold(None)
        self.failures[study.study_id] = 0
        seconds = time.monotonic() - began
        log.info("%s #%d %s %s %.3fs", study.name, outcome.number, outcome.state, outcome.text, seconds)

    def _attrs(self, model: str) -> dict[str, str]:
        """What every trial says of who ran it."""
        compilation = self.forecasters[model].compilation
        compiled = {} if compilation == "off" else {"compilation": compilation}
        return {"worker": self.name, "device": self.device, **compiled}

    def _count_failure(self, study: Study, slot: Slot, error: Exception) -> None:
        log.error("%s slot %d failed: %s", study.name, slot.number, error)
        slots.fail(self.storage, slot, str(error))
        self.failures[study.study_id] = self.failures.get(study.study_id, 0) + 1
        if self.failures[study.study_id] >= FAILURES_IN_A_ROW:
            reason = f"{FAILURES_IN_A_ROW} failures in a row: {error}"
            slots.park_study(self.storage, study.study_id, reason)
            log.error("%s parked: %s", study.name, reason)

    def _run(self, study_id: int) -> StudyRun:
        if study_id not in self.runs:
            study = self.studies[study_id]
            evaluator = self.evaluators[study.model]
            self.runs[study_id] = studying.start(
                self.storage, self.config, study, self._read(study.symbol), evaluator.forecaster.fingerprint
            )
        return self.runs[study_id]

    def _read(self, symbol: str) -> Series:
        if symbol not in self.series:
            path = Path(self.job.series[symbol])
            bars, _ = read_bars(path)
            self.series[symbol] = Series(symbol=symbol, path=path, bars=bars)
        return self.series[symbol]

    def _load(self, model: str) -> Evaluator:
        forecaster = self.forecasters[model] = evaluators.load_forecaster(self.config, model, device=self.device)
        dtype = self.config.compile.dtype
        log.info("%s on %s, %s, compilation %s", model, self.device, dtype, forecaster.compilation)
        size = cache_bytes(self.config, workers=len(self.job.devices))
        return evaluators.evaluator_of(self.config, forecaster, cache_bytes=size)


def cache_bytes(config: Config, *, workers: int, memory: int | None = None) -> int:
    """How many bytes of encoded windows each model's evaluator of each of this machine's workers may keep."""
    a_worker = config.workers.cache_mib * 2**20
    if not a_worker:
        a_worker = (memory or devices.memory_bytes()) // 4 // workers
    return a_worker // len(config.search.models)


def die_with_parent() -> None:
    """Ask the kernel for SIGHUP when the supervisor dies, kill -9 included: no orphan goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    folder, number = Path(arguments[0]), int(arguments[1])
    die_with_parent()
    stopping = Stopping()
    if os.getppid() != int(os.environ["STUDIES_SUPERVISOR_PID"]):
        return EXIT_INTERRUPTED  # it died before the kernel was asked
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    database.quiet_optuna()
    try:
        job = RunPlan.read(folder)
        # Patient: the supervisor has used this URL, and may start a worker again while the server is away.
        storage = database.open_storage(
            os.environ["OPTUNA_STORAGE"], wait_s=job.config.storage.wait_s, create=False, patient=True
        )
        return Worker(job, storage, job.devices[number], stopping).work()
    except ExpectedError as error:
        log.error("%s", error)
        return EXIT_ERROR
    except Interrupted:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
