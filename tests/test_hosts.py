"""Two hosts and one private server: two network namespaces of this machine, a cable between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from places import BIN, RUN_SETTINGS, RunPlace, start_together, write_bars

from storage import embedded

BUDGET = 30
SETTINGS = RUN_SETTINGS.replace("lease_s = 2.0", "lease_s = 5.0") + "[storage]\n"


@dataclass(frozen=True)
class Host:
    """A network namespace, with a host name of its own."""

    name: str
    address: str

    def command(self, *words: str | Path) -> list[str]:
        # Each of these replaces itself by the next: a child's pid is the command's own.
        rename = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", rename, self.name, *map(str, words)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nothing else. Skips where this machine does not let us make them."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("no `ip` or `unshare`: install iproute2 and util-linux")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    tag = uuid.uuid4().hex[:6]
    # 198.18.0.0/15 is set aside for trials between networks.
    pair = Host(f"studies-{tag}-a", "198.18.77.1"), Host(f"studies-{tag}-b", "198.18.77.2")
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ends = f"v{tag}a", f"v{tag}b"
            ip("link", "add", ends[0], "netns", pair[0].name, "type", "veth", "peer", ends[1], "netns", pair[1].name)
            for host, end in zip(pair, ends, strict=True):
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", end)
                ip("-n", host.name, "link", "set", end, "up")
                ip("-n", host.name, "link", "set", "lo", "up")
                subprocess.run(host.command("true"), check=True, capture_output=True, text=True, timeout=20)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not to be had: {error.stderr.strip()}")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True, timeout=20)


@dataclass
class Run:
    """What both hosts see of a folder, and the private server that the first of them serves."""

    folder: Path
    hosts: tuple[Host, Host]

    def words(self, *words: str) -> list[str]:
        return [str(BIN / words[0]), *words[1:], "--config", str(self.folder / "studies.toml")]

    def ask(self, host: Host, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            host.command(*self.words(*words)),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def run(tmp_path: Path, scratch: Path, hosts: tuple[Host, Host]) -> Iterator[Run]:
    write_bars(tmp_path / "bars", RunPlace.BARS)
    data = scratch / f"hosts-{uuid.uuid4().hex[:6]}"
    served = f'data_dir = "{data}"\nlisten = "{hosts[0].address}"\n'
    (tmp_path / "studies.toml").write_text(SETTINGS + served)
    try:
        yield Run(tmp_path, hosts)
    finally:
        if data.exists():
            embedded.stop(data)


def inside(host: Host, code: str, given: str = "", **environment: str) -> list[str]:
    """Run Python on a host, `given` on its stdin; the lines that it prints."""
    ended = subprocess.run(
        host.command(sys.executable, "-c", code),
        env={**os.environ, **environment},
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


CONNECT = """
import json, sys, psycopg2
for url, password in json.load(sys.stdin):
    try:
        connection = psycopg2.connect(url, connect_timeout=5, **password)
        cursor = connection.cursor()
        cursor.execute("select inet_client_addr()")
        print("in, from", cursor.fetchone()[0])
    except psycopg2.Error as error:
        print(" ".join(str(error).split()))
"""
READ = """
import os
from optuna import load_study
from storage import database
from studies import study as studying
storage = database.open_storage(os.environ["OPTUNA_STORAGE"], wait_s=5, create=False)
for study in studying.list_studies(storage):
    for trial in load_study(study_name=study.name, storage=storage).get_trials(deepcopy=False):
        print(study.symbol, trial.state.name, trial.user_attrs["worker"].split(":")[0], trial.system_attrs["claim"])
"""


@pytest.mark.slow
def test_workers_of_two_hosts_share_one_budget(run: Run) -> None:
    here, there = run.hosts
    told = run.ask(here, "studies", "url", "--export")
    assert told.returncode == 0, told.stderr
    told_values = dict(line.removeprefix("export ").split("=", 1) for line in told.stdout.splitlines())
    url, own_passfile = told_values["OPTUNA_STORAGE"], told_values["PGPASSFILE"]
    assert url.startswith(f"postgresql://studies@{here.address}:")
    passfile = run.folder / "copied.pgpass"
    passfile.write_bytes(Path(own_passfile).read_bytes())
    passfile.chmod(0o600)
    password = passfile.read_text().strip().rsplit(":", 1)[1]

    # Who has the password, and nobody else.
    def connect(host: Host, *tries: tuple[str, dict[str, str]]) -> list[str]:
        return inside(host, CONNECT, json.dumps(tries), PGPASSFILE="/dev/null")

    other_database, other_user = url[: url.rindex("/")] + "/template1", url.replace("//studies@", "//postgres@")
    with_file, with_password, *refusals = connect(
        there,
        (url, {"passfile": str(passfile)}),
        (url, {"password": password}),
        (url, {"password": "wrong"}),
        (other_user, {"password": password}),
        (url, {}),
        (other_database, {}),
        (other_user, {}),
    )
    assert with_file == with_password == f"in, from {there.address}"
    assert ["password authentication failed" in said for said in refusals] == [True] * 2 + [False] * 3
    assert ["no password supplied" in said for said in refusals] == [False] * 2 + [True] * 3
    for said in connect(here, (url, {}), (url.replace(here.address, "127.0.0.1"), {})):
        assert "no password supplied" in said
    with pytest.raises(psycopg2.OperationalError):  # nor is it to be reached from where the tests run
        psycopg2.connect(url, connect_timeout=1)
    refused = run.ask(there, "launch-workers", "--cpus", "1", OPTUNA_STORAGE=url, PGPASSWORD="wrong")
    assert refused.returncode == 1
    assert "password authentication failed" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "wrong" not in refused.stderr

    # Both at once, on an empty database.
    environment = {**os.environ, "OPTUNA_STORAGE": url, "PGPASSFILE": str(passfile), **start_together(run.folder, 2)}
    launch = run.words("launch-workers", "--cpus", "1", "--trials", str(BUDGET))
    launched = [
        subprocess.Popen(
            host.command(*launch),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for host in run.hosts
    ]
    try:
        said = [process.communicate(timeout=100) for process in launched]
    finally:
        for process in launched:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert [process.returncode for process in launched] == [0, 0], said
    assert not [text for pair in said for text in pair if password in text]

    trials = [line.split() for line in inside(here, READ, OPTUNA_STORAGE=url, PGPASSFILE=str(passfile))]
    assert {host for *_, host, _ in trials} == {here.name, there.name}
    for symbol in ("SP500", "NASDAQ"):
        states = [state for found, state, *_ in trials if found == symbol]
        assert states.count("COMPLETE") + states.count("PRUNED") == len(states) == BUDGET
        assert len({claim for found, *_, claim in trials if found == symbol}) == BUDGET
