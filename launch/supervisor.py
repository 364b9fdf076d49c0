"""Starts one worker process per device, restarts workers that crash, and passes signals on to them.

It knows processes and exit statuses, and frees the slots of a dead worker; it knows nothing of trials or models.
"""

from __future__ import annotations

import os
import secrets
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
from typing import BinaryIO, Protocol

from launch.devices import DeviceSlot
from launch.output import SayOnce
from launch.worker import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED, RUN_ID, RunPlan, worker_name
from storage import DatabaseUnavailable, slots
from storage.retrying import RetryingStorage, one_line
from studies.config import ConfigError

POLL_S = 0.2
MAX_CRASHES = 3  # of one worker within the window before it is no longer restarted
CRASH_WINDOW_S = 600.0
SECOND_SIGNAL_GRACE_S = 0.5  # a worker inside a long forward pass does not notice a signal
REPORTER_GRACE_S = 0.3  # after that, for the reporter to write what it has left


class Process(Protocol):
    """The methods of subprocess.Popen that the supervisor uses, so that a worker on a cluster can stand in for one."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Child:
    """The worker of one device slot, across its restarts. Times are of time.monotonic()."""

    number: int
    device_slot: DeviceSlot
    log: Path
    process: Process | None = None  # None: not started yet, waiting for a restart, or ended
    name: str = ""  # `worker_name` of the process that was started last
    exit_status: int | None = None  # the final one; None while the worker runs or is to be restarted
    crash_times: list[float] = field(default_factory=list)  # within the last CRASH_WINDOW_S
    start_at: float = 0.0  # not started before


class DatabaseReporter(threading.Thread):
    """Talks to the database, so that the supervisor handles signals and restarts even while no server answers."""

    def __init__(
        self,
        storage: RetryingStorage,
        study_ids: Sequence[int],
        *,
        lease_s: float,
        log: Path,
        say: Callable[[str], None],
        report: Callable[[], None],
    ) -> None:
        """log: gets the traceback of an error that nobody expects."""
        super().__init__(name="database-reporter", daemon=True)
        self._storage, self._study_ids, self._lease_s = storage, study_ids, lease_s
        self._say_once, self._report = SayOnce(say, log), report
        self._dead: deque[str] = deque()
        self._ended = threading.Event()

    def free_slots_of(self, worker: str) -> None:
        """Free the slots of a dead worker now instead of when their leases run out."""
        self._dead.append(worker)

    def end(self) -> None:
        """Ask the thread to write what is left and stop; `join` waits for it."""
        self._ended.set()

    def run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(POLL_S)
            well = True
            for work in (self._free_slots_of_the_dead, self._report):
                try:
                    work()
                except DatabaseUnavailable as error:
                    well = False
                    self._say_once.error(str(error))
                    break  # it was waited for; the other would wait as long
                except Exception as error:  # noqa: BLE001 - without this thread nobody learns how the run stands
                    well = False
                    self._say_once.error(f"the run goes on after an error: {one_line(error)}", error)
            if well:
                self._say_once.well()

    def _free_slots_of_the_dead(self) -> None:
        while self._dead:
            slots.expire(self._storage, self._dead[0])
            slots.reap(self._storage, self._study_ids, lease_s=self._lease_s)
            self._dead.popleft()


class Supervisor:
    """Runs the workers of this machine until all have ended.

    environment: variables that the children get beside those of their device, such as the storage's URL.
    say: prints one line to the user. report: called several times a second to show how the run stands.
    """

    def __init__(
        self,
        plan: RunPlan,
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
        self.reporter = DatabaseReporter(
            storage,
            study_ids,
            lease_s=plan.config.workers.lease_s,
            log=folder / "supervisor.log",
            say=say,
            report=report,
        )
        self.run_id = secrets.token_hex(4)
        ours = {RUN_ID: self.run_id, "STUDIES_SUPERVISOR_PID": str(os.getpid())}
        self.environment = {**os.environ, **environment, **ours}
        self.children = [
            Child(number=number, device_slot=slot, log=folder / f"worker-{number}.log")
            for number, slot in enumerate(device_slots)
        ]
        self.signals = 0
        self.second_signal_at = 0.0
        try:
            plan.write(folder)
        except OSError as error:
            raise ConfigError(f"[workers] log_dir: {folder}: {error.strerror}; free some disk space") from None

    def run(self) -> int:
        """Run until every worker has ended. Returns the exit status: 0 done, 1 a worker failed, 130 interrupted."""
        self.reporter.start()
        handled = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            handled.remove(signal.SIGHUP)  # under nohup the run outlives its terminal
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            while any(child.exit_status is None for child in self.children):
                for child in self.children:
                    self._update(child)
                self._kill_unresponsive()
                time.sleep(POLL_S)
        finally:
            self._end_children()
            self._end_reporter()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.signals:
            return EXIT_INTERRUPTED
        return 0 if all(child.exit_status == EXIT_DONE for child in self.children) else 1

    def _update(self, child: Child) -> None:
        """Start the child if it is time to; if it has ended, note its exit status or plan its restart."""
        if child.exit_status is not None:
            return
        if child.process is None:
            if self.signals:
                child.exit_status = EXIT_INTERRUPTED
            elif time.monotonic() >= child.start_at:
                self._start(child)
            return
        status = child.process.poll()
        if status is None:
            return
        child.process = None
        if status in (EXIT_DONE, EXIT_INTERRUPTED):
            child.exit_status = status
            return
        self.reporter.free_slots_of(child.name)
        if status == EXIT_ERROR:
            self.say(f"worker {child.number} ({child.device_slot.device}): {last_line(child.log)}")
            child.exit_status = status
            return
        self._handle_crash(child, status)

    def _handle_crash(self, child: Child, status: int) -> None:
        now = time.monotonic()
        child.crash_times = [at for at in child.crash_times if now - at < CRASH_WINDOW_S] + [now]
        crash = f"worker {child.number} ({child.device_slot.device}) {self._describe_exit(status)}"
        if self.signals:
            child.exit_status = EXIT_INTERRUPTED
        elif len(child.crash_times) >= MAX_CRASHES:
            child.exit_status = EXIT_ERROR
            limit = f"crash {MAX_CRASHES} within {CRASH_WINDOW_S / 60:.0f} minutes"
            self.say(f"{crash}; not restarting it after {limit}; see {child.log}")
        else:
            wait_s = 2.0 ** len(child.crash_times) - 1
            child.start_at = now + wait_s
            self.say(f"{crash}; restarting in {wait_s:.0f} s; see {child.log}")

    def _describe_exit(self, status: int) -> str:
        """How the worker ended, in words that follow its name; a negative status is a signal's number."""
        return f"was killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"

    def _start(self, child: Child) -> None:
        with _opened(child.log) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.worker", str(self.folder), str(child.number)],
                env={**self.environment, **child.device_slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which passes it on once
            )
        child.process, child.name = process, worker_name(process.pid, self.run_id)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals == 2:
            self.second_signal_at = time.monotonic()
        if self.signals <= 2:
            for child in self.children:
                if child.process is not None:
                    child.process.send_signal(signal.SIGTERM)
        if self.signals == 1:
            self.say("stopping after the trials in progress; press Ctrl-C again to stop at once")

    def stop_at_once(self) -> None:
        """Do what a second signal does: nothing is waited for. May be called from any thread."""
        self.second_signal_at = time.monotonic()
        self.signals = max(2, self.signals)

    def _kill_unresponsive(self) -> None:
        """After the second signal, kill the workers that have not ended within the grace period."""
        if not self._is_past_second_signal(SECOND_SIGNAL_GRACE_S):
            return
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                child.process.kill()

    def _is_past_second_signal(self, seconds: float) -> bool:
        """Whether the second signal came at least this many seconds ago."""
        return self.signals >= 2 and time.monotonic() - self.second_signal_at >= seconds

    def _end_reporter(self) -> None:
        """Let the reporter write what it has left, without limit unless a second signal comes."""
        self.reporter.end()
        while self.reporter.is_alive() and not self._is_past_second_signal(SECOND_SIGNAL_GRACE_S + REPORTER_GRACE_S):
            self.reporter.join(POLL_S / 2)

    def _end_children(self) -> None:
        """Terminate the workers that still run, so that none outlives the supervisor's loop whatever ended it."""
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


def signal_name(number: int) -> str:
    """The name of a signal; a real-time one, which Python gives no name, is told by its distance from the first."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"


def _opened(log: Path) -> BinaryIO:
    """A worker's log to append to; where it cannot be made, as on a full disk, what is logged is lost."""
    try:
        return log.open("ab")
    except OSError:
        return Path(os.devnull).open("ab")


def last_line(path: Path) -> str:
    """The last line of a worker's log, without its time and level."""
    if not path.exists():
        return "no output"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].split(" E ", 1)[-1] if lines else "no output"
