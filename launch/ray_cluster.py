"""Runs the workers on a Ray cluster: each in an actor that reserves one GPU or core, supervised as local ones are.

An actor runs `python -m launch.worker` as a child process on its node and reports its log and its exit status. Nodes
share no run folder; the bars and the package must be at the same path on every node.

The database's password reaches an actor as an argument of a method call, which goes directly from process to process
(encrypted if the cluster uses TLS) and is stored neither in the control store nor in the dashboard nor in a log, unlike
the arguments of a constructor and a `runtime_env`. On the node only the worker process has it, in its environment.
"""

from __future__ import annotations

import contextlib
import importlib
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
from typing import Any, cast

import click

from forecasters.models import MODELS
from launch.devices import DeviceError, DeviceSlot, cpu_slot
from launch.supervisor import POLL_S, Child, Supervisor
from launch.worker import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED, RUN_ID, RunPlan, worker_name
from storage import ports, urls
from studies.config import Config

CONNECT_S = 5.0
LOST = 1000  # stands for the exit status of a worker whose actor or node is gone
KILL_GRACE_S = 2.0  # for an actor to kill its worker before the actor itself is killed
LOG_BYTES = 2**20  # of a worker's log in one answer
PENDING_NOTICE_S = 10.0  # without a free GPU or core before the user is told


class ClusterError(DeviceError):
    """Ray is not installed, cannot be reached, or lacks the resources that were asked for."""


def check_options(ray: str | None, *, gpus: bool, cpus: int | None, gpus_total: int | None) -> None:
    """Raise a usage error for options that exclude each other and for a password that the cluster would show."""
    if not ray:
        if gpus_total:
            raise click.UsageError("--gpus-total goes with --ray; name this machine's GPUs with --gpus")
        return
    if gpus or bool(cpus) == bool(gpus_total):
        raise click.UsageError("--ray takes either --gpus-total N or --cpus N")
    # Ray shows a driver's command line in its list of jobs.
    for word in sys.argv[1:]:
        url = word.removeprefix("--storage=")
        if "://" in url and urls.hand_over(urls.parse_url(url))[1]:
            raise click.UsageError("--ray shows this command line to the cluster; put the password into PGPASSWORD")


class Host:
    """The actor: starts one worker process on its node, and passes on its log, its exit status and signals."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="studies-worker-"))
        self.log = self.folder / "worker.log"
        self.sent = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, run: str, workers: int, environment: Mapping[str, str]) -> dict[str, Any]:
        """Start the worker; the answer holds its "name", or the "error" that prevents it.

        run: the content of run.json. workers: how many workers may share this node and its memory.
        """
        values = json.loads(run)
        node = os.uname().nodename
        missing = sorted(path for path in values["series"].values() if not Path(path).is_file())
        if len(missing) == len(values["series"]):  # of some the worker says itself that they are gone
            return {"error": f"{node}: {missing[0]}: no such file; bars must be at the same path on every node"}
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
        return {"name": worker_name(self.process.pid, environment[RUN_ID])}

    def poll(self) -> dict[str, Any]:
        """What the worker has logged since the last call, and its exit status once all of the log was sent."""
        assert self.process is not None
        status = self.process.poll()
        with self.log.open("rb") as file:
            file.seek(self.sent)
            added = file.read(LOG_BYTES)
        self.sent += len(added)
        if status is not None and len(added) < LOG_BYTES:
            shutil.rmtree(self.folder, ignore_errors=True)
            return {"log": added, "status": status}
        return {"log": added}

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connection to a Ray cluster."""

    ray: Any
    resource: str  # "GPU" or "CPU": each worker reserves one
    single_machine: bool
    most_on_a_node: int  # how many workers of this run the largest node can hold

    def end(self) -> None:
        self.ray.shutdown()


def connect(address: str, *, gpus: int | None, cpus: int | None) -> Cluster:
    """Join a cluster as a driver, from one of its nodes. Raises ClusterError."""
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
    available = [int(node["Resources"].get(resource, 0)) for node in nodes]
    if sum(available) < count:
        ray.shutdown()
        raise ClusterError(f"--ray {address}: the cluster has {sum(available)} {resource}s in all, not {count}")
    here = ray.util.get_node_ip_address()
    return Cluster(
        ray=ray,
        resource=resource,
        single_machine=all(node["NodeManagerAddress"] == here for node in nodes),
        most_on_a_node=min(count, max(available)),
    )


def _check_reachable(address: str) -> None:
    """Raise ClusterError if nothing answers at the address: Ray would wait two minutes and then end this process."""
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
    """Raise ClusterError if other machines of the cluster cannot reach the storage. host: that of the storage's URL."""
    if cluster.single_machine or (host and not host.startswith("/") and not ports.is_loopback(host)):
        return
    where = f"on {host}" if host else "the private server of this machine"
    raise ClusterError(f"the storage is {where}, which other machines cannot reach; name one they can with --storage")


def device_slots(gpus: int | None, cpus: int | None) -> list[DeviceSlot]:
    """One DeviceSlot per worker. Ray chooses the GPU on the node and sets CUDA_VISIBLE_DEVICES there."""
    return [DeviceSlot(device="cuda:0", environment={})] * gpus if gpus else [cpu_slot()] * (cpus or 0)


def portable(config: Config) -> Config:
    """The settings with absolute paths to local checkpoints, as a worker on a node runs in another folder."""
    models = {
        name: replace(settings, **{key: _absolute(getattr(settings, key)) for key in MODELS[name].checkpoint_settings})
        for name, settings in config.models.items()
    }
    return replace(config, models=models)


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


class RemoteProcess:
    """A worker in an actor, with the interface of a child process. Only `wait` waits for an answer from the node."""

    def __init__(self, cluster: Cluster, log: Path, run: str, environment: Mapping[str, str]) -> None:
        self.ray, self.log = cluster.ray, log
        self.name = ""  # `worker_name`, once it runs
        self.began = time.monotonic()
        self.returncode: int | None = None
        self._signals: list[int] = []
        self._kill_at: float | None = None
        on_gpu = cluster.resource == "GPU"
        actor = self.ray.remote(Host).options(
            num_cpus=0 if on_gpu else 1, num_gpus=1 if on_gpu else 0, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._actor = actor.remote()
        self._answer = self._actor.start.remote(run, cluster.most_on_a_node, dict(environment))

    def send_signal(self, number: int) -> None:
        """Queue a signal that `poll` sends: this may be called from a signal handler, where Ray must not be."""
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
            return self._end(EXIT_INTERRUPTED)  # it waits for a free resource, or is just starting
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            return self._end(LOST)
        while self._signals:
            self._actor.signal.remote(self._signals.pop(0))
        if self.ray.wait([self._answer], timeout=0)[0]:
            self._read_answer()
        return self.returncode

    def _read_answer(self) -> None:
        """Read the actor's answer to the last call, and ask it again unless the worker has ended."""
        try:
            answer = self.ray.get(self._answer)
        except self.ray.exceptions.ActorUnavailableError:
            self._answer = self._actor.poll.remote()  # a network failure; Ray reports later if the actor is dead
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
        self._answer = self._actor.poll.remote()

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
            with contextlib.suppress(OSError), self.log.open("ab") as log:  # a full disk ends no run
                log.write(text)


class RaySupervisor(Supervisor):
    """Supervises workers in actors, with the same restarts, limits and signals as local ones."""

    def __init__(
        self, cluster: Cluster, plan: RunPlan, *args: Any, environment: Mapping[str, str], **kwargs: Any
    ) -> None:
        plan = replace(plan, config=portable(plan.config))
        super().__init__(plan, *args, environment={}, **kwargs)
        self.cluster = cluster
        self.environment = {
            **environment,
            RUN_ID: self.run_id,
        }  # added to the environment of each node; this machine's is not passed on
        self.run_file = (self.folder / "run.json").read_text()
        self.announced_pending: set[int] = set()  # numbers of the workers that the user knows to be waiting

    def _start(self, child: Child) -> None:
        environment = {**self.environment, **child.device_slot.environment}
        child.process = RemoteProcess(self.cluster, child.log, self.run_file, environment)

    def _describe_exit(self, status: int) -> str:
        return "was lost with its actor or node" if status == LOST else super()._describe_exit(status)

    def _update(self, child: Child) -> None:
        if process := cast(RemoteProcess | None, child.process):
            process.poll()
            child.name = process.name
        super()._update(child)
        process = cast(RemoteProcess | None, child.process)
        if child.exit_status is not None or (process and process.name):
            return
        pending = process and time.monotonic() - process.began > PENDING_NOTICE_S
        if any(other.exit_status == EXIT_DONE for other in self.children):  # so nothing is left for this one to do
            if process:
                process.terminate()
                process.poll()
            child.process, child.exit_status = None, EXIT_DONE
        elif pending and child.number not in self.announced_pending:
            self.announced_pending.add(child.number)
            self.say(f"worker {child.number} is waiting for a free {self.cluster.resource} in the cluster")
