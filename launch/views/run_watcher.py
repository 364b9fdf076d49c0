"""What the live table shows of a run, gathered from the database, the supervisor's children and the GPU driver."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.supervisor import Child
from launch.views.live_table import RunState, StudyLine, WorkerLine
from launch.worker import EXIT_DONE, EXIT_INTERRUPTED
from storage import slots, study_rows
from storage.database import RetryingStorage
from storage.progress import RunSnapshot, run_snapshot

RECENT_S, RECENT_DONE = 30.0, 20  # a rate covers this much time or this many slots, whichever is longer
MAX_SAMPLES = 600  # of the counts, to compute rates from
ACTIVE_S = 5.0  # a study or a worker between two slots still counts as active
GPU_INTERVAL_S, GPU_STALE_S = 5.0, 20.0  # between two readings of the GPUs' memory; how long one is shown
INCUMBENT = {"stage": slots.BASELINE, "label": "incumbent", "path": "$.validation.mae"}


class Rates:
    """Current rates of several counters, from samples of their values."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, Mapping[Any, int]]] = []

    def add(self, now: float, counts: Mapping[Any, int]) -> None:
        if len(self._samples) >= MAX_SAMPLES:
            del self._samples[1::2]  # the older, the sparser: enough for slow counters
        self._samples.append((now, counts))

    def of(self, key: Any, since: float | None) -> float | None:
        """The rate per second from samples not older than `since`; None where it is not known yet."""
        now, counts = self._samples[-1]
        found = None
        for then, before in reversed(self._samples[:-1]):
            if since is None or then < since or key not in before:
                break
            done = counts.get(key, 0) - before[key]
            found = done / (now - then)
            if now - then >= RECENT_S and done >= RECENT_DONE:
                break
        return found


class GpuMemory:
    """The memory in use on each GPU, read every few seconds by a thread of its own: a driver that hangs delays nobody.

    Asks the driver through NVML, which creates no CUDA context. Without a driver nothing is known of any GPU.
    """

    def __init__(self) -> None:
        self._texts: Mapping[str, str] = {}  # by index and by UUID
        self._read_at = 0.0
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read_repeatedly, name="gpu-memory", daemon=True)

    def of(self, name: str) -> str:
        """Used and total memory of a GPU as CUDA_VISIBLE_DEVICES names it: an index or the beginning of a UUID.

        Empty where it is not known (yet), and for a MIG device, of which the GPU's memory is only partly its own.
        """
        if self._reader.ident is None:
            self._reader.start()
        texts = self._texts if time.monotonic() - self._read_at < GPU_STALE_S else {}
        if name.startswith("GPU-"):
            return next((text for uuid, text in texts.items() if uuid.startswith(name)), "")
        return texts.get(name, "")

    def end(self) -> None:
        """Stop reading; does not wait for the driver."""
        self._ended.set()

    def _read_repeatedly(self) -> None:
        import pynvml  # here: a large module, of no use without a GPU

        try:
            pynvml.nvmlInit()
            while True:
                texts: dict[str, str] = {}
                for index in range(pynvml.nvmlDeviceGetCount()):
                    with contextlib.suppress(pynvml.NVMLError):  # a GPU that reports no memory is left out
                        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                        texts |= dict.fromkeys((str(index), pynvml.nvmlDeviceGetUUID(handle)), _memory_text(handle))
                self._texts, self._read_at = texts, time.monotonic()
                if self._ended.wait(GPU_INTERVAL_S):
                    return
        except pynvml.NVMLError:  # no driver, or it was unloaded
            self._texts = {}


def _memory_text(handle: Any) -> str:
    """Used and total memory of a GPU, as nvidia-smi counts them; empty if it is split by MIG. Raises NVMLError."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):  # a GPU that cannot be split
        if pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            return ""
    memory: Any = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return f"{memory.used / 2**30:.1f}/{memory.total / 2**30:.0f} GiB"


class RunWatcher:
    """Tells how a run stands from what the database and the supervisor's children say."""

    def __init__(self, storage: RetryingStorage, studies: Mapping[int, str]) -> None:
        self._storage, self._studies = storage, studies
        self.children: Sequence[Child] = ()
        self.gpus = GpuMemory()
        self._rates = Rates()
        self._ours: set[str] = set()  # names of this run's workers, including those that died
        self._tasks: dict[str, tuple[str, str]] = {}  # by worker: the study and the task that it has or had last
        # When a worker, a study or (as "all") any was first and last seen with a busy slot. Inactive ones are dropped.
        self._since: dict[Any, float] = {}
        self._last: dict[Any, float] = {}

    def read(self) -> RunState:
        """Read the database once and return how the run stands now. Raises DatabaseUnavailable."""
        ours = [child.name for child in self.children if child.name]
        self._ours.update(ours)
        snapshot = run_snapshot(self._storage, self._studies, ours, **INCUMBENT)
        best = study_rows.best_values(self._storage, self._studies)
        now = time.monotonic()
        counts: dict[Any, int] = {study_id: one.done for study_id, one in snapshot.progress.items()}
        self._rates.add(now, {**counts, "all": sum(counts.values()), **dict.fromkeys(ours, 0), **snapshot.finished})
        self._note_busy(now, snapshot)
        return RunState(
            workers=[self._worker(now, child) for child in list(self.children)],
            studies=[
                StudyLine(
                    name=self._studies[study_id],
                    done=one.done,
                    budget=one.budget,
                    parked=one.parked,
                    open=one.open,
                    best=best.get(study_id),
                    incumbent=snapshot.picked.get(study_id),
                    rate=self._rates.of(study_id, self._since.get(study_id)),
                    active=study_id in self._since,
                )
                for study_id, one in sorted(snapshot.progress.items(), key=lambda item: self._studies[item[0]])
            ],
            other_workers=len({busy.worker for busy in snapshot.busy} - self._ours),
            rate=self._rates.of("all", self._since.get("all")),
        )

    def _note_busy(self, now: float, snapshot: RunSnapshot) -> None:
        for busy in snapshot.busy:
            if busy.stage == slots.TRIAL:
                task = f"trial {busy.number + 1}/{snapshot.progress[busy.study_id].budget}"
            else:
                task = "confirmation" if busy.stage >= slots.CONFIRMATION else busy.label or "baseline"
                task += f" {busy.share:.0%}" if busy.share is not None else ""
            self._tasks[busy.worker] = self._studies[busy.study_id], task
            for key in (busy.worker, busy.study_id, "all"):
                self._since.setdefault(key, now)
                self._last[key] = now
        for key in [key for key, last in self._last.items() if now - last > ACTIVE_S]:
            del self._since[key], self._last[key]

    def _worker(self, now: float, child: Child) -> WorkerLine:
        gpu = child.device_slot.environment.get("CUDA_VISIBLE_DEVICES", "")
        host = child.name.rpartition(":")[0]
        device = f"gpu {gpu[:8]}" if gpu else child.device_slot.device.partition(":")[0].replace("cuda", "gpu")
        study, task = self._tasks.get(child.name, ("", "starting"))
        if child.exit_status is not None:
            study, task = "", {EXIT_DONE: "done", EXIT_INTERRUPTED: "stopped"}.get(child.exit_status, "failed")
        elif child.process is None and child.crash_times:
            study, task = "", f"restarting in {max(0.0, child.start_at - now):.0f} s"
        elif child.process is None:
            study, task = "", "starting"
        elif child.name in self._tasks and child.name not in self._since:
            study, task = "", "waiting"
        return WorkerLine(
            number=child.number,
            device=device if host in ("", os.uname().nodename) else f"{device} on {host}",
            study=study,
            task=task,
            rate=self._rates.of(child.name, self._since.get(child.name)),
            memory=self.gpus.of(gpu) if gpu else "",
        )
