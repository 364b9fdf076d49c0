"""Searches on a real Ray cluster of two nodes, both on this machine; one of them is lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import RunPlace as Place
from processes import wait_until_gone
from ray_nodes import Nodes, with_ray

from launch import ray_cluster
from launch.ray_cluster import Cluster, ClusterError

started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """A test that fails leaves no driver behind."""
    yield
    while started:
        started.pop().kill()


def launch(place: Place, nodes: Nodes, cpus: int, *words: str) -> subprocess.Popen[str]:
    command = place.command("launch-workers", "--ray", nodes.address, "--cpus", str(cpus), *words)
    run = subprocess.Popen(command, env=place.environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    started.append(run)
    return run


def workers_on(url: str) -> list[int]:
    """The worker processes of this database, whoever started them."""
    handed_over = f"OPTUNA_STORAGE={url.replace('+psycopg2', '')}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"launch.worker" in command and handed_over in environment:
                found.append(int(entry.name))
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(pid)
    return found


@pytest.mark.slow
@with_ray
def test_a_node_is_lost_and_the_search_ends_with_its_budget(place: Place, nodes: Nodes, database_server: Any) -> None:
    password = database_server.passfile.read_text().strip().rsplit(":", 1)[1]
    node = nodes.add()
    run = launch(place, nodes, 2, "--trials", "60")
    place.wait_for_trials(10)
    url = place.environment["OPTUNA_STORAGE"]
    while len(before := workers_on(url)) < 2:
        for pid in before:
            os.kill(pid, signal.SIGSTOP)  # or the first would have done everything before the second has started
        assert run.poll() is None
        time.sleep(0.05)
    raylet = node.all_processes["raylet"][0].process.pid
    (stays,) = [pid for pid in before if raylet not in ancestors(pid)]
    (lost,) = [pid for pid in before if pid != stays]
    os.kill(stays, signal.SIGSTOP)  # or it would have done everything before Ray misses the node
    os.kill(lost, signal.SIGCONT)
    nodes.lose(node)
    node = nodes.add()
    assert run.stderr is not None
    said = ""
    while "was lost with its actor or node; restarting in" not in said:
        said += (line := run.stderr.readline())
        assert line, said
    os.kill(stays, signal.SIGKILL)  # and the other worker dies in its actor
    out, rest = run.communicate(timeout=100)
    said += rest
    assert run.returncode == 0, said
    assert "was killed by SIGKILL; restarting in" in said
    place.assert_exact(60, "SP500", "NASDAQ")
    assert "finished" in out  # the same summary
    wait_until_gone(workers_on(url), 5)
    (folder,) = (place.folder / "logs").iterdir()
    logs = [(folder / f"worker-{number}.log").read_text() for number in (0, 1)]
    assert any(" complete " in log for log in logs)
    assert any("actor" in log for log in logs)  # what Ray said of the lost one
    session = Path(nodes.cluster.head_node.get_session_dir_path())
    files = [path for root in (session, place.folder) for path in root.rglob("*") if path.is_file()]
    assert [path for path in files if password.encode() in path.read_bytes()] == []
    nodes.lose(node)


@pytest.mark.slow
@with_ray
def test_signals_reach_the_actors_and_nothing_outlives_the_driver(place: Place, nodes: Nodes) -> None:
    url = place.environment["OPTUNA_STORAGE"]
    run = launch(place, nodes, 1, "--trials", "500")
    place.wait_for_trials(3)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 130
    assert "stopping after the trials in progress" in said
    assert workers_on(url) == []
    states = {trial.state.name for symbol in ("SP500", "NASDAQ") for trial in place.trials(symbol)}
    assert states <= {"COMPLETE", "PRUNED"}

    run = launch(place, nodes, 1, "--trials", "500")
    while not (workers := workers_on(url)):
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGSTOP)  # it can hear neither
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode == 130
    wait_until_gone(workers, 1)

    run = launch(place, nodes, 1, "--trials", "500")
    while not (workers := workers_on(url)):
        time.sleep(0.05)
    run.kill()
    run.communicate()
    wait_until_gone(workers)


@with_ray
def test_what_cannot_work_is_one_line(place: Place, nodes: Nodes) -> None:
    assert "not 64" in place.run("launch-workers", "--ray", nodes.address, "--cpus", "64", code=1).stderr
    nothing = place.run("launch-workers", "--ray", "127.0.0.1:1", "--cpus", "1", code=1).stderr
    assert "no Ray cluster answers" in nothing
    assert nothing.count("\n") == 1
    url = "postgresql://studies:planted@127.0.0.1/x"
    refused = place.run("launch-workers", "--ray", nodes.address, "--cpus", "1", "--storage", url, code=2).stderr
    assert "PGPASSWORD" in refused
    assert "planted" not in refused


def test_without_ray_one_line_names_the_extra(place: Place) -> None:
    hide = "import sys; sys.modules['ray'] = None\nfrom launch.cli import launch_workers; launch_workers()"
    words = ["--ray", "auto", "--cpus", "1", "--config", str(place.folder / "studies.toml")]
    ended = subprocess.run(
        [sys.executable, "-c", hide, *words], env=place.environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == "error: --ray: Ray is not installed; pip install '.[ray]'\n"


@pytest.mark.parametrize("words", [["--gpus-total", "2"], ["--ray", "auto"], ["--ray", "auto", "--gpus", "0"]])
def test_options_that_do_not_go_together(place: Place, words: list[str]) -> None:
    place.run("launch-workers", *words, code=2)


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1", "::1", "/run/postgresql"])
def test_several_machines_need_a_storage_they_can_reach(host: str | None) -> None:
    several = Cluster(ray=None, resource="CPU", single_machine=False, most_on_a_node=1)
    with pytest.raises(ClusterError, match="cannot reach"):
        ray_cluster.check_storage(several, host)
    ray_cluster.check_storage(several, "db.example")
    ray_cluster.check_storage(several, "10.0.0.5")
    single = Cluster(ray=None, resource="CPU", single_machine=True, most_on_a_node=1)
    ray_cluster.check_storage(single, host)
