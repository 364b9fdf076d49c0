"""One launch-workers under attack, in a folder of its own: a method for every kind of fault, by its name."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import text

from benchmarks import private
from benchmarks.pgbouncer import PgBouncer
from storage import database, embedded, slots

LEASE_S = 2.0
DEATHS_BORNE = 2  # of one worker in one supervisor's life: the third makes it give the device up
REVIVAL_S = 30.0  # within which the run starts its server again
# In every process of the run: while the one file is there, the database's name does not resolve; while the other is
# there, each trial waits for up to a second, and while a third is, each measurement of a confirmation for a twentieth,
# so that the run is not over before its faults are dealt. All confirmations are shared out, batch by batch.
PATCH = """
import os, sys
import psycopg2
connect = psycopg2.connect
def connect_by_name(*words, **options):
    if options.get("application_name") == "forecast-studies" and os.path.exists({dns_away!r}):
        options["host"] = "studies.invalid"
    return connect(*words, **options)
psycopg2.connect = connect_by_name
if "launch.worker" in sys.orig_argv:
    import time
    from objectives.evaluation import Evaluator
    from studies import measuring, sharing
    sharing.ALONE_S = sharing.SHARE_S = 0
    def wait(seconds, file):
        until = time.monotonic() + seconds
        while time.monotonic() < until and os.path.exists(file):
            time.sleep(0.02)
    measure, errors = Evaluator.measure, measuring.Measuring._errors
    def held(self, *words, on_rung=None, **options):
        wait(1 if on_rung else 0, {held!r})
        return measure(self, *words, on_rung=on_rung, **options)
    def held_errors(self, *words):
        wait(0.05, {held_shares!r})
        return errors(self, *words)
    Evaluator.measure, measuring.Measuring._errors = held, held_errors
"""


class AttackedRun:
    """Started at once. A fault's method returns when its cause is gone, all but that of a freeze."""

    def __init__(
        self,
        folder: Path,
        server: embedded.PrivateServer,
        settings: str,
        *,
        workers: int,
        rng: random.Random,
        pgbouncer: PgBouncer | None,
    ) -> None:
        self.folder, self.workers, self.random, self.pgbouncer = folder, workers, rng, pgbouncer
        self.settings = folder / "studies.toml"
        self.settings.write_text(private.SETTINGS + settings, encoding="utf-8")
        self.server, self.url = server.data_dir, server.url
        self.storage = database.open_storage(self.url, wait_s=60)
        self.deaths: Counter[int] = Counter()  # by worker number, in this supervisor's life
        self.frozen: set[int] = set()
        self.timers: list[threading.Timer] = []  # that thaw them
        self.dns_is_away = folder / "dns-is-away"
        self.held, self.held_shares = folder / "held", folder / "held-shares"
        patched = folder / "patched"
        patched.mkdir()
        files = {"dns_away": self.dns_is_away, "held": self.held, "held_shares": self.held_shares}
        patch = PATCH.format(**{name: str(file) for name, file in files.items()})
        (patched / "sitecustomize.py").write_text(patch)
        paths = [str(patched), *filter(None, [os.environ.get("PYTHONPATH")])]
        password = {"PGPASSWORD": pgbouncer.password} if pgbouncer else {}
        self.environment = {**os.environ, **password, "PYTHONPATH": os.pathsep.join(paths)}
        self.replaced = 0  # supervisors, as they had no worker left to attack
        self.wrong: list[str] = []
        self.launch()

    def launch(self) -> None:
        """The same command, whenever it is given."""
        command = Path(sys.executable).parent / "launch-workers"
        words = [str(command), "--cpus", str(self.workers), "--config", str(self.settings)]
        if self.pgbouncer:
            words += ["--storage", self.pgbouncer.url("studies")]
        with (self.folder / "said.txt").open("ab") as said:
            self.supervisor = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=self.environment
            )
        self.deaths.clear()

    def hold_trials(self, hold: bool) -> None:
        """Let trials take longer from now on, or no longer."""
        self.held.touch() if hold else self.held.unlink(missing_ok=True)

    def hold_shares(self, hold: bool) -> None:
        """Let confirmations take longer from now on, or no longer."""
        self.held_shares.touch() if hold else self.held_shares.unlink(missing_ok=True)

    def shares_under_way(self) -> int:
        statement = text("select count(*) from slots where stage = :stage and state = 'busy'")
        return self.storage.transaction(lambda c: c.execute(statement, {"stage": slots.SHARE}).scalar_one())

    def finished(self) -> int:
        statement = text("select count(*) from slots where stage = :stage and state = 'done'")
        return self.storage.transaction(lambda c: c.execute(statement, {"stage": slots.TRIAL}).scalar_one())

    def wait_for(self, what: str, ready: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in {seconds:.0f} s; {self.said()}")
            if self.supervisor.poll() is not None:
                raise AssertionError(f"{what}: the run ended with {self.supervisor.returncode}; {self.said()}")
            time.sleep(0.05)
        return found

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()[-2000:]

    def end(self) -> None:
        for timer in self.timers:
            timer.join()
        if self.supervisor.poll() is None:
            self.supervisor.terminate()
            self.supervisor.wait(timeout=60)
        self.storage.engine.dispose()

    def outage(self) -> None:
        """Long enough for every worker to meet it."""
        time.sleep(self.random.uniform(0.4, 1.0))

    # --- workers and their supervisor

    def victim(self) -> tuple[int, int]:
        """Pid and number of a random worker that has its device yet; without one the supervisor is replaced."""
        for _ in range(200):
            living = [(pid, n) for pid, n in workers_of(self.supervisor.pid).items() if pid not in self.frozen]
            if mortal := [(pid, n) for pid, n in living if self.deaths[n] < DEATHS_BORNE]:
                return self.random.choice(mortal)
            if living:
                self.supervisor_kill()
                self.replaced += 1
            time.sleep(0.05)
        raise AssertionError(f"no worker to attack; {self.said()}")

    def worker_kill(self) -> None:
        pid, number = self.victim()
        os.kill(pid, signal.SIGKILL)
        self.deaths[number] += 1

    def freeze(self) -> None:
        """Past the lease, while the other faults go on."""
        pid, _ = self.victim()
        self.frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)

        def thaw() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.frozen.discard(pid)

        timer = threading.Timer(LEASE_S + self.random.uniform(0.7, 2.0), thaw)
        self.timers.append(timer)
        timer.start()

    def supervisor_kill(self) -> None:
        """And the same command again, which waits for no database that is away when it begins: so until it works."""
        self.supervisor.kill()
        self.supervisor.wait()
        self.launch()
        self.wait_for("workers", lambda: workers_of(self.supervisor.pid))

    # --- the server

    def server_stop(self) -> None:
        """As `pg_ctl stop` does it, and by hand again."""
        self._end_server(signal.SIGINT)
        self.outage()
        embedded.start(self.server)

    def server_crash(self) -> None:
        self._end_server(signal.SIGKILL)
        self.outage()
        embedded.start(self.server)

    def server_quit(self) -> None:
        """An immediate shutdown, after which the run itself starts its server again."""
        self._end_server(signal.SIGQUIT)
        deadline = time.monotonic() + REVIVAL_S
        while embedded.running(self.server) is None:
            if time.monotonic() > deadline:
                self.wrong.append(f"the run did not start its server again in {REVIVAL_S:.0f} s")
                embedded.start(self.server)
            time.sleep(0.1)

    def _end_server(self, number: signal.Signals) -> None:
        pid = int((self.server / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, number)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def pgbouncer_restart(self) -> None:
        assert self.pgbouncer is not None
        self.pgbouncer.stop()
        self.outage()
        self.pgbouncer.start()

    def dns_away(self) -> None:
        """Names resolve no more, and every connection has to be made anew."""
        self.dns_is_away.touch()
        try:
            self._cut_connections()
            self.outage()
        finally:
            self.dns_is_away.unlink()

    def read_only(self) -> None:
        self._set("default_transaction_read_only", "on")

    def statement_timeout(self) -> None:
        """So short that most statements end with it."""
        self._set("statement_timeout", "'1ms'")

    def full_disk(self) -> None:
        """Until nothing fits any more, for the server as for everybody."""
        ballast = self.server / "ballast"
        try:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(2**16)):
                    pass
            self.outage()
        finally:
            ballast.unlink(missing_ok=True)
        embedded.start(self.server)  # a server that has no room for its log ends

    def _set(self, name: str, value: str) -> None:
        """Another default for the server for a while: its sessions have it at once."""
        self._administer(f"alter system set {name} = {value}", "select pg_reload_conf()")
        try:
            self.outage()
        finally:
            self._administer(f"alter system reset {name}", "select pg_reload_conf()")

    def _cut_connections(self) -> None:
        others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
        self._administer(f"{others} and backend_type = 'client backend'")

    def _administer(self, *statements: str) -> None:
        """Statements of somebody whom no default of the server stops."""
        unlimited = "-c statement_timeout=0 -c default_transaction_read_only=off"
        with closing(psycopg2.connect(self.url.replace("+psycopg2", ""), options=unlimited)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)


def workers_of(pid: int) -> dict[int, int]:
    """Pid and number of the workers that this supervisor started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
                if b"launch.worker" in words and f"STUDIES_SUPERVISOR_PID={pid}".encode() in variables:
                    found[int(entry.name)] = int(words[-2])
    return found


def methods(kinds: Sequence[str]) -> dict[str, Callable[[AttackedRun], None]]:
    """The method of each kind of fault: "worker kill" is worker_kill."""
    return {kind: getattr(AttackedRun, re.sub("[ -]", "_", kind).lower()) for kind in kinds}
