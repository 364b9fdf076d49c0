"""One child a device: starts the workers of this machine, restarts those that crash, passes signals on.

Knows processes and the slots' counts. Knows nothing of trials, models or what a worker does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from launch.devices import DeviceSlot
from launch.worker import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED, RunPlan
from storage import DatabaseUnavailable, slots
from storage.retrying import RetryingStorage

POLL_S = 0.2
MAX_CRASHES = 3  # of one device
CRASH_WINDOW_S = 600.0
SECOND_SIGNAL_GRACE_S = 0.5  # a worker inside a long network call cannot hear a signal
REPORTER_GRACE_S = 0.3  # after a second signal, for what it has yet to write


class Process(Protocol):
    """What is asked of a running worker, as of a subprocess.Popen."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Child:
    """The worker of one device_slot, through its restarts."""

    number: int
    device_slot: DeviceSlot
    log: Path
    process: Process | None = None
    name: str = ""  # HOST:PID of its process
    status: int | None = None  # its last exit status, once it is not to be started again
    crashes: list[float] = field(default_factory=list)
    start_at: float = 0.0


class DatabaseReporter(threading.Thread):
    """Talks to the database, so that the supervisor hears signals and starts workers while no server answers."""

    def __init__(
        self,
        storage: RetryingStorage,
        study_ids: Sequence[int],
        *,
        say: Callable[[str], None],
        report: Callable[[], None],
    ) -> None:
        super().__init__(name="database-reporter", daemon=True)
        self._storage, self._study_ids, self._say, self._report = storage, study_ids, say, report
        self._dead: deque[str] = deque()
        self._ended = threading.Event()

    def free_slots_of(self, worker: str) -> None:
        """The dead worker's slots need not wait for their lease to run out."""
        self._dead.append(worker)

    def end(self) -> None:
        """Write what is left and stop; `join` waits for it."""
        self._ended.set()

    def run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(POLL_S)
            try:
                while self._dead:
                    slots.expire(self._storage, self._dead[0])
                    slots.reap(self._storage, self._study_ids)
                    self._dead.popleft()
                self._report()
            except DatabaseUnavailable as error:
                self._say(str(error))


class Supervisor:
    """Runs the workers of this machine until none has anything left to do.

    environment: what the children get beside their device, such as the storage's URL.
    say: one line for the user. report: called again and again, to tell how far the run is.
    """

    def __init__(
        self,
        job: RunPlan,
        folder: Path,
        device_slots: Sequence[DeviceSlot],
        storage: RetryingStorage,
        study_ids: Sequence[int],
        *,
        environment: Mapping[str, str],
        say: Callable[[str], None],
        report: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.say = say
        self.reporter = DatabaseReporter(storage, study_ids, say=say, report=report)
        self.environment = {**os.environ, **environment, "STUDIES_SUPERVISOR_PID": str(os.getpid())}
        self.children = [
            Child(number=n, device_slot=device_slot, log=folder / f"worker-{n}.log")
            for n, device_slot in enumerate(device_slots)
        ]
        self.signals = 0
        self.second_signal_at = 0.0
        job.write(folder)

    def run(self) -> int:
        """Returns the exit status: 0 done, 1 a worker gave up, 130 interrupted."""
        self.reporter.start()
        heard = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            heard.remove(signal.SIGHUP)  # nohup: the run outlives its terminal
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            while any(child.status is None for child in self.children):
                for child in self.children:
                    self._look_after(child)
                self._kill_unresponsive()
                time.sleep(POLL_S)
        finally:
            self._end_all()
            self._end_database_reporter()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.signals:
            return EXIT_INTERRUPTED
        return 0 if all(child.status == EXIT_DONE for child in self.children) else 1

    def _look_after(self, child: Child) -> None:
        if child.status is not None:
            return
        if child.process is None:
            if self.signals:
                child.status = EXIT_INTERRUPTED
            elif time.monotonic() >= child.start_at:
                self._start(child)
            return
        status = child.process.poll()
        if status is None:
            return
        child.process = None
        if status in (EXIT_DONE, EXIT_INTERRUPTED):
            child.status = status
            return
        self.reporter.free_slots_of(child.name)
        if status == EXIT_ERROR:
            self.say(f"worker {child.number} ({child.device_slot.device}): {last_line(child.log)}")
            child.status = status
            return
        self._crashed(child, status)

    def _crashed(self, child: Child, status: int) -> None:
        now = time.monotonic()
        child.crashes = [at for at in child.crashes if now - at < CRASH_WINDOW_S] + [now]
        what = f"worker {child.number} ({child.device_slot.device}) {self._how(status)}"
        if self.signals:
            child.status = EXIT_INTERRUPTED
        elif len(child.crashes) >= MAX_CRASHES:
            child.status = 1
            self.say(f"{what}, {MAX_CRASHES} times in {CRASH_WINDOW_S / 60:.0f} minutes: given up; see {child.log}")
        else:
            wait_s = 2.0 ** len(child.crashes) - 1
            child.start_at = now + wait_s
            self.say(f"{what}; starting it again in {wait_s:.0f} s; see {child.log}")

    def _how(self, status: int) -> str:
        return f"died of signal {signal.Signals(-status).name}" if status < 0 else f"died of status {status}"

    def _start(self, child: Child) -> None:
        with child.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.worker", str(self.folder), str(child.number)],
                env={**self.environment, **child.device_slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which passes it on once
            )
        child.process, child.name = process, f"{os.uname().nodename}:{process.pid}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals == 2:
            self.second_signal_at = time.monotonic()
        if self.signals <= 2:
            for child in self.children:
                if child.process is not None:
                    child.process.send_signal(signal.SIGTERM)
        if self.signals == 1:
            self.say("stopping after the trials at hand; once more to stop at once")

    def _kill_unresponsive(self) -> None:
        if not self._is_late(SECOND_SIGNAL_GRACE_S):
            return
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                child.process.kill()

    def _is_late(self, seconds: float) -> bool:
        """Whether a second signal came so long ago."""
        return self.signals >= 2 and time.monotonic() - self.second_signal_at >= seconds

    def _end_database_reporter(self) -> None:
        self.reporter.end()
        while self.reporter.is_alive() and not self._is_late(SECOND_SIGNAL_GRACE_S + REPORTER_GRACE_S):
            self.reporter.join(POLL_S / 2)

    def _end_all(self) -> None:
        """Whatever ended the loop, no worker outlives it."""
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
        for child in self.children:
            if child.process is not None:
                try:
                    child.process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait()


def last_line(path: Path) -> str:
    """The last line of a worker's log, without its time."""
    with path.open("rb") as file:
        lines = _tail(file).decode(errors="replace").strip().splitlines()
    return lines[-1].split(" E ", 1)[-1] if lines else "no output"


def _tail(file: IO[bytes], size: int = 4096) -> bytes:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))
    return file.read()
