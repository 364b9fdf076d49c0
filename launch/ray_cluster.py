"""The same workers on a Ray cluster: each in an actor that holds its GPU or core, watched as the local ones are.

An actor runs `python -m launch.worker` as a child process on its node and answers for it: what it logged, how it
ended. Nodes share no run folder; bars and the package must be at the same path on every node.

The database's password goes to an actor as an argument of a method call: straight from process to process (encrypted
if the cluster uses TLS), kept by neither the control store, the dashboard nor any log. The arguments of a constructor
and a `runtime_env` are kept there. On the node it is in the environment of the worker process alone.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from forecasters.models import MODELS
from launch.devices import DeviceError, DeviceSlot, cpu_slot
from launch.supervisor import POLL_S, Child, Supervisor
from launch.worker import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED, RunPlan
from storage import urls
from studies.config import Config

CONNECT_S = 5.0
LOST = 1000  # in the place of an exit status: the actor or its node is gone
KILL_GRACE_S = 2.0
LOG_BYTES = 2**20  # of a worker's log in one answer
SAY_PENDING_S = 10.0


class ClusterError(DeviceError):
    """Ray is not installed, not there, or has not what was asked for."""


def check_options(ray: str | None, *, gpus: bool, cpus: int | None, gpus_total: int | None) -> None:
    """Usage error for options that do not go together, and for a password that the cluster would show."""
    if not ray:
        if gpus_total:
            raise click.UsageError("--gpus-total goes with --ray; name this machine's GPUs with --gpus")
        return
    if gpus or bool(cpus) == bool(gpus_total):
        raise click.UsageError("--ray takes either --gpus-total N or --cpus N")
    # Ray keeps a driver's command line in its list of jobs.
    for word in sys.argv[1:]:
        url = word.removeprefix("--storage=")
        if "://" in url and urls.hand_over(urls.parse_url(url))[1]:
            raise click.UsageError("--ray shows this command line to the cluster; put the password into PGPASSWORD")


class Host:
    """The actor: starts one worker on its node and answers for it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="studies-worker-"))
        self.log = self.folder / "worker.log"
        self.sent = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, run: str, workers: int, environment: Mapping[str, str]) -> dict[str, Any]:
        """run: the content of the run file. workers: how many may share this node, and its memory."""
        values = json.loads(run)
        node = os.uname().nodename
        missing = sorted(path for path in values["series"].values() if not Path(path).is_file())
        if missing:
            reason = f"{node}: {missing[0]}: no such file; bars must be at the same path on every node"
            return {"error": reason}
        values["devices"] = values["devices"][:1] * workers
        (self.folder / "run.json").write_text(json.dumps(values))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.worker", str(self.folder), "0"],
                env={**os.environ, **environment, "STUDIES_SUPERVISOR_PID": str(os.getpid())},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return {"name": f"{node}:{self.process.pid}"}

    def look(self) -> dict[str, Any]:
        """What the worker logged since the last look, and its exit status once all of that was told."""
        assert self.process is not None
        status = self.process.poll()
        with self.log.open("rb") as file:
            file.seek(self.sent)
            news = file.read(LOG_BYTES)
        self.sent += len(news)
        if status is not None and len(news) < LOG_BYTES:
            shutil.rmtree(self.folder, ignore_errors=True)
            return {"log": news, "status": status}
        return {"log": news}

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connection to a Ray cluster."""

    ray: Any
    resource: str  # what each worker takes one of: "GPU" or "CPU"
    single_machine: bool
    most_on_a_node: int  # how many of our workers the largest node can hold

    def end(self) -> None:
        self.ray.shutdown()


def connect(address: str, *, gpus: int | None, cpus: int | None) -> Cluster:
    """Join a cluster as a driver, from one of its machines. Raises ClusterError."""
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise ClusterError("--ray: Ray is not installed; pip install '.[ray]'") from None
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"--ray {address}: {' '.join(str(error).split())}") from None
    resource, count = ("GPU", gpus) if gpus else ("CPU", cpus or 0)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = [int(node["Resources"].get(resource, 0)) for node in nodes]
    if sum(there) < count:
        ray.shutdown()
        raise ClusterError(f"--ray {address}: the cluster has {sum(there)} {resource}s in all, not {count}")
    here = ray.util.get_node_ip_address()
    return Cluster(
        ray=ray,
        resource=resource,
        single_machine=all(node["NodeManagerAddress"] == here for node in nodes),
        most_on_a_node=min(count, max(there)),
    )


def _check_reachable(address: str) -> None:
    """Ray itself would wait two minutes and then end this process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ClusterError(f"--ray {address}: write HOST:PORT of the head node, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"--ray {address}: no Ray cluster answers: {error}") from None


def check_storage(cluster: Cluster, host: str | None) -> None:
    """host: of the storage's URL. Raises ClusterError where only this machine could reach it."""
    if cluster.single_machine or not _only_this_machine(host):
        return
    where = f"on {host}" if host else "the private server of this machine"
    raise ClusterError(f"the storage is {where}, which other machines cannot reach; name one they can with --storage")


def _only_this_machine(host: str | None) -> bool:
    if not host or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def device_slots(gpus: int | None, cpus: int | None) -> list[DeviceSlot]:
    """One a worker; which GPU it is, Ray says on the node."""
    return [DeviceSlot(device="cuda:0", environment={})] * gpus if gpus else [cpu_slot()] * (cpus or 0)


def portable(config: Config) -> Config:
    """With absolute paths to local checkpoints: a node's worker runs in another folder."""
    models = {
        name: replace(settings, **{key: _absolute(getattr(settings, key)) for key in MODELS[name].checkpoint_settings})
        for name, settings in config.models.items()
    }
    return replace(config, models=models)


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


class RemoteProcess:
    """A worker in an actor, as the supervisor sees a child process. No method waits for a node, save `wait`."""

    def __init__(self, cluster: Cluster, log: Path, run: str, environment: Mapping[str, str]) -> None:
        self.ray, self.log = cluster.ray, log
        self.name = ""  # HOST:PID, once it runs
        self.began = time.monotonic()
        self.returncode: int | None = None
        self._signals: list[int] = []
        self._kill_at: float | None = None
        on_gpu = cluster.resource == "GPU"
        actor = self.ray.remote(Host).options(
            num_cpus=0 if on_gpu else 1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._actor = actor.remote()
        self._answer = self._actor.start.remote(run, cluster.most_on_a_node, dict(environment))

    def send_signal(self, number: int) -> None:
        """Only notes it, since a signal handler calls this: `poll` sends it."""
        self._signals.append(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self._kill_at is None:
            self.send_signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + KILL_GRACE_S

    def poll(self) -> int | None:
        if self.returncode is not None:
            return self.returncode
        if self._signals and not self.name:
            return self._end(EXIT_INTERRUPTED)  # it waits for a place, or starts this moment
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            return self._end(LOST)
        while self._signals:
            self._actor.signal.remote(self._signals.pop(0))
        if self.ray.wait([self._answer], timeout=0)[0]:
            self._hear()
        return self.returncode

    def _hear(self) -> None:
        try:
            answer = self.ray.get(self._answer)
        except self.ray.exceptions.ActorUnavailableError:
            self._answer = self._actor.look.remote()  # the network, for now: Ray says when it takes it for dead
            return
        except self.ray.exceptions.RayError as error:
            self._write(f"{' '.join(str(error).split())}\n".encode())
            self._end(LOST)
            return
        if error := answer.get("error"):
            self._write(f"{error}\n".encode())
            self._end(EXIT_ERROR)
            return
        self.name = answer.get("name", self.name)
        self._write(answer.get("log", b""))
        if (status := answer.get("status")) is not None:
            self._end(status)
            return
        self._answer = self._actor.look.remote()

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("launch.worker", timeout or 0)
            time.sleep(POLL_S / 4)
        return status

    def _end(self, status: int) -> int:
        self.ray.kill(self._actor)
        self.returncode = status
        return status

    def _write(self, text: bytes) -> None:
        if text:
            with self.log.open("ab") as log:
                log.write(text)


class RaySupervisor(Supervisor):
    """The supervisor of workers in actors: the same restarts, limits, signals and end."""

    def __init__(
        self, cluster: Cluster, job: RunPlan, *args: Any, environment: Mapping[str, str], **kwargs: Any
    ) -> None:
        job = replace(job, config=portable(job.config))
        super().__init__(job, *args, environment={}, **kwargs)
        self.cluster = cluster
        self.environment = dict(environment)  # a node's own environment stands, and only this is added
        self.run_file = (self.folder / "run.json").read_text()
        self.told_pending: set[int] = set()

    def _start(self, child: Child) -> None:
        environment = {**self.environment, **child.device_slot.environment}
        child.process = RemoteProcess(self.cluster, child.log, self.run_file, environment)

    def _how(self, status: int) -> str:
        return "was lost with its actor or node" if status == LOST else super()._how(status)

    def _look_after(self, child: Child) -> None:
        if isinstance(child.process, RemoteProcess):
            child.process.poll()
            child.name = child.process.name
        super()._look_after(child)
        process = child.process
        if child.status is not None or (isinstance(process, RemoteProcess) and process.name):
            return
        if any(other.status == EXIT_DONE for other in self.children):  # so nothing is left to do for this one
            if isinstance(process, RemoteProcess):
                process.terminate()
                process.poll()
            child.process, child.status = None, EXIT_DONE
        elif (
            isinstance(process, RemoteProcess)
            and time.monotonic() - process.began > SAY_PENDING_S
            and child.number not in self.told_pending
        ):
            self.told_pending.add(child.number)
            self.say(f"worker {child.number} waits for a free {self.cluster.resource} in the cluster")
