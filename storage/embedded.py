"""A private Postgres server, for when no storage URL is given.

Owns one folder: where the cluster is, its password, its locks, its log. Knows nothing of Optuna, studies or tables.

Three rules keep it honest. A server is alive when it proves over TCP that it knows our password and serves our
cluster; no pid is ever trusted for that. Whoever starts or stops it holds `lock`. And the server itself holds
`server.lock`, inherited by every process of it, so that a free `server.lock` means that all of them are gone.
Locks are taken by hand here: FileLock hides its descriptor, which the server must inherit with `server.lock`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pwd
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import psycopg2

from storage import DatabaseUnavailable, ports, postgres
from storage.commands import command
from storage.data_dir import Place, make_folder, new_place, password_of, remember, remembered, write_private
from storage.files import sync_folder

_NAME = "studies"  # the user and the database
STOPPED = "stopped"  # a file of the folder while the server is stopped on purpose
MAX_CONNECTIONS = 1000  # 40 MB more than 200; a worker holds one
_START_TIMEOUT_S = 60.0
_LOCK_TIMEOUT_S = 120.0
_POLL_S = 0.05
_LOG_LIMIT_BYTES = 10 * 2**20  # a longer log is set aside at the next start

_log = logging.getLogger("storage")


@dataclass(frozen=True, kw_only=True)
class PrivateServer:
    """A server that answered. The URL carries no password: give libpq `passfile` as PGPASSFILE."""

    url: str
    passfile: Path
    data_dir: Path


def start(data_dir: Path, *, listen: str = "127.0.0.1", max_connections: int = MAX_CONNECTIONS) -> PrivateServer:
    """Make the cluster if there is none, start its server unless it runs, and return it once it answers.

    Safe to call from any number of processes at once. The server outlives the caller. `listen` is one more address
    to listen on beside the loopback ("0.0.0.0", "10.0.0.5"), reachable from the machine's own subnets and always by
    password; it and `max_connections` take effect when the server starts, not while it runs: of another `listen`
    than that of a running server a warning tells.
    Raises DatabaseUnavailable, and ValueError for a `listen` that is not an address.
    """
    if not re.fullmatch(r"[A-Za-z0-9.:*-]+", listen):
        raise ValueError(f"listen={listen!r} is not an address")
    folder = make_folder(data_dir)
    with _plain_errors(folder), _starting(folder):
        place = remembered(folder) or new_place(folder)
        (folder / STOPPED).unlink(missing_ok=True)
        if _why_not(place, _NAME) is not None:
            place = _made_to_answer(place, listen, max_connections)
        elif (addresses := _listening(place)) != ports.addresses(listen):
            _log.warning(
                "the private server listens on %s, not on %s as set: '%s' and the next start apply it",
                addresses.replace(",", ", "),
                ports.addresses(listen).replace(",", ", "),
                command("studies stop"),
            )
        return _server(place)


def running(data_dir: Path) -> PrivateServer | None:
    """The server of this folder if it answers now. Starts nothing. Raises DatabaseUnavailable."""
    folder = data_dir.expanduser().resolve()
    with _plain_errors(folder):
        place = remembered(folder)
        return _server(place) if place and _why_not(place, _NAME) is None else None


def was_stopped(data_dir: Path) -> bool:
    """Whether the server was stopped by `stop` and has not been started since."""
    return (data_dir.expanduser().resolve() / STOPPED).exists()


def revive(data_dir: Path, *, listen: str = "127.0.0.1", max_connections: int = MAX_CONNECTIONS) -> bool:
    """Start the server again, whatever ended it but `stop`; False where it runs, was stopped or never was.

    `listen` and `max_connections` as in `start`. Raises DatabaseUnavailable.
    """
    folder = data_dir.expanduser().resolve()
    with _plain_errors(folder):
        place = remembered(folder)
        if place is None or not place.cluster.exists() or _is_held(folder):
            return False
        with _starting(folder):
            place = remembered(folder) or place  # another process may have started it, on another port
            if was_stopped(folder) or _why_not(place, _NAME) is None:
                return False
            _made_to_answer(place, listen, max_connections)
            return True


def stop(data_dir: Path) -> bool:
    """Stop the server and wait until every process of it is gone; False if none ran.

    Open transactions are rolled back; runs that watch the server end. Raises DatabaseUnavailable if it does not end in
    time.
    """
    folder = data_dir.expanduser().resolve()
    with _plain_errors(folder):
        place = remembered(folder)
        if place is None:
            return False
        with _starting(folder):
            (folder / STOPPED).touch(0o600)  # before it ends: who sees it gone knows that somebody wanted that
            if _server_gone(place):
                return False
            stop = [_binaries(place).folder / "pg_ctl", "stop", "-s", "-m", "fast", "-t", f"{_START_TIMEOUT_S:.0f}"]
            owner = postgres.owner_of(place.cluster)
            postgres.run(stop, owner, place.cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not _server_gone(place):
                if time.monotonic() > deadline:
                    raise DatabaseUnavailable(f"{folder}: the server does not stop; see {folder / 'server.log'}")
                time.sleep(_POLL_S)
            return True


# --- errors, and the lock of those who start and stop


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system and the driver say into one line."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = "; free some disk space" if error.errno == errno.ENOSPC else ""
        raise DatabaseUnavailable(f"the database in {folder}: {where}{error.strerror or error}{advice}") from error
    except psycopg2.Error as error:
        raise DatabaseUnavailable(f"the database in {folder}: {_one_line(str(error))}") from error


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Hold `lock`, which dies with its holder, unlike any list of pids."""
    with _open_private(folder / "lock") as lock:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(
                    f"{folder}: another process has been starting or stopping this database for {_LOCK_TIMEOUT_S:.0f} s"
                )
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile may still hold the descriptor


def _server(place: Place) -> PrivateServer:
    return PrivateServer(
        url=f"postgresql+psycopg2://{_NAME}@127.0.0.1:{place.port}/{_NAME}",
        passfile=place.folder / "pgpass",
        data_dir=place.folder,
    )


# --- the cluster


def _binaries(place: Place) -> postgres.Binaries:
    return postgres.find(place.cluster, last=place.binaries, data_dir=place.folder)


def _initialise(place: Place) -> None:
    """Make the cluster beside its final place and rename it: a half-made one is never seen."""
    _clear_leftovers(place)
    if place.cluster.exists():
        return
    if (place.folder / "initialised").exists():
        _log.warning("the database in %s is gone; making a new, empty one", place.cluster)
    password = secrets.token_hex(32)
    write_private(place.folder / "password", password + "\n")
    owner, binaries = postgres.new_owner(), _binaries(place)
    making = Path(tempfile.mkdtemp(prefix=".initdb-", dir=place.home))
    write_private(making / "password", password + "\n")
    if owner:
        os.chown(making / "password", owner.pw_uid, owner.pw_gid)
        os.chown(making, owner.pw_uid, owner.pw_gid)
    command = [binaries.folder / "initdb", "-U", _NAME, "--pwfile", making / "password", "-E", "UTF8", "--locale=C"]
    command += ["--auth=scram-sha-256"]
    done = postgres.run(command, owner, making / "cluster", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        _clear_leftovers(place)
        raise DatabaseUnavailable(f"{place.folder}: the database cannot be made: {_cause(done.stdout or '')}")
    conf = os.open(making / "cluster" / "postgresql.conf", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
    with os.fdopen(conf, "a") as settings:
        settings.write("\ninclude 'studies.conf'  # rewritten at every start\n")
    (making / "cluster").rename(place.cluster)
    sync_folder(place.home)
    write_private(place.folder / "initialised", f"PostgreSQL {binaries.version}\n")
    _clear_leftovers(place)


def _clear_leftovers(place: Place) -> None:
    """Remove what a killed initdb left; only the holder of `lock` comes here."""
    for leftover in place.home.glob(".initdb-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _bring_up(place: Place, listen: str, max_connections: int) -> Place:
    """Start the server, waiting for the remains of an earlier one; the place returned has the port in use."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        with _open_private(place.folder / "server.lock") as server_lock:
            # Held: a server that is starting, stopping or full, or the children of a killed one, which die soon.
            if _try_lock(server_lock.fileno()):
                place = _launch(place, server_lock, listen, max_connections)
        reason = _why_not(place, "postgres")
        if reason is None:
            return place
        if time.monotonic() > deadline:
            raise DatabaseUnavailable(
                f"{place.folder}: its server does not answer ({reason}); try again after: {command('studies stop')}"
            )
        time.sleep(_POLL_S)


def _launch(place: Place, server_lock: IO[bytes], listen: str, max_connections: int) -> Place:
    """Start a postmaster that inherits `server_lock`, on the remembered port or else on another."""
    loopback_only, owner = ports.is_loopback(listen), postgres.owner_of(place.cluster)
    if not ports.is_of_this_machine(listen):  # Postgres would start and listen on the loopback alone
        raise DatabaseUnavailable(f"{place.folder}: cannot listen on {listen}, which is no address of this machine")
    if owner and not postgres.reaches(owner, place.home):
        raise DatabaseUnavailable(f"the user {owner.pw_name}, who owns {place.cluster}, cannot reach it any more")
    binaries = _binaries(place)
    _clear_pid_file(place)
    said = ""
    for attempt in range(5):
        keep = attempt == 0 and ports.is_free(place.port, loopback_only)
        port = place.port if keep else ports.free_port(loopback_only)
        place = replace(place, port=port, binaries=binaries.folder)
        _configure(place, owner, listen, max_connections)
        said = _pg_ctl_start(place, binaries, owner, server_lock)
        if said is None:
            return place
        if "Address already in use" not in said:
            break
    raise DatabaseUnavailable(f"{place.folder}: the server does not start: {_cause(said)}")


def _clear_pid_file(place: Place) -> None:
    """Remove a stale postmaster.pid: Postgres will not start while the pid in it lives, whoever has it by now.

    We hold server.lock, so the server that we started is gone; one started by hand is known by its working folder.
    """
    path = place.cluster / "postmaster.pid"
    if not path.exists():
        return
    pid = path.read_text().split("\n", 1)[0]
    with suppress(OSError, ValueError):  # no such process, not ours to see, or not a number
        if Path(f"/proc/{int(pid)}/cwd").samefile(place.cluster):
            raise DatabaseUnavailable(f"{place.cluster} is in use by process {pid}, not started by us; stop that first")
    path.unlink()


def _pg_ctl_start(
    place: Place, binaries: postgres.Binaries, owner: pwd.struct_passwd | None, server_lock: IO[bytes]
) -> str | None:
    """None once the server is up or still recovering, else what it logged."""
    path = place.folder / "server.log"
    if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with _open_private(path) as log:  # opened by us and inherited: the server's user need not reach the folder
        begin = log.seek(0, os.SEEK_END)
        command = [binaries.folder / "pg_ctl", "start", "-s", "-w", "-t", f"{_START_TIMEOUT_S:.0f}"]
        done = postgres.run(command, owner, place.cluster, stdout=log, stderr=log, pass_fds=(server_lock.fileno(),))
        log.seek(begin)
        said = log.read().decode(errors="replace")
    return None if done.returncode == 0 or "did not start in time" in said else said


def _configure(place: Place, owner: pwd.struct_passwd | None, listen: str, max_connections: int) -> None:
    loopback_only = ports.is_loopback(listen)
    write_private(
        place.cluster / "studies.conf",
        f"port = {place.port}\n"
        f"listen_addresses = '{ports.addresses(listen)}'\n"
        "unix_socket_directories = ''\n"
        f"max_connections = {max_connections}\n"
        "shared_buffers = '64MB'\n"
        "synchronous_commit = on\n"  # off loses committed trials in a crash (measured)
        "password_encryption = 'scram-sha-256'\n"
        "timezone = 'UTC'\n"
        "logging_collector = off\n"
        "log_checkpoints = off\n"
        f"cluster_name = '{_NAME}'\n",
        owner=owner,
    )
    networks = ["127.0.0.1/32", "::1/128"] + ([] if loopback_only else ["samenet"])
    write_private(
        place.cluster / "pg_hba.conf",
        "".join(f"host all all {network} scram-sha-256\n" for network in networks),
        owner=owner,
    )
    hosts = ["127.0.0.1", "localhost"] if loopback_only else ["*"]
    password = password_of(place)
    write_private(place.folder / "pgpass", "".join(f"{host}:{place.port}:*:{_NAME}:{password}\n" for host in hosts))
    remember(place)  # before the start: a server whose starter is killed must be found again


def _made_to_answer(place: Place, listen: str, max_connections: int) -> Place:
    """Make what is missing of cluster and database, and start the server; only the holder of `lock` comes here."""
    _initialise(place)
    place = _bring_up(place, listen, max_connections)
    _create_database(place)
    return place


def _create_database(place: Place) -> None:
    with closing(_connect(place, "postgres")) as connection:
        connection.autocommit = True  # CREATE DATABASE refuses to run in a transaction
        with connection.cursor() as cursor:
            cursor.execute("select 1 from pg_database where datname = %s", [_NAME])
            if cursor.fetchone() is None:
                cursor.execute(f"create database {_NAME}")


# --- is it alive, is it ours


def _why_not(place: Place, database: str) -> str | None:
    """None when the server of this very cluster answers, else the reason."""
    if not place.cluster.exists():
        return "no cluster yet"
    try:
        with closing(_connect(place, database)) as connection, connection.cursor() as cursor:
            cursor.execute("select current_setting('data_directory')")
            row = cursor.fetchone()
    except psycopg2.Error as error:
        return _one_line(str(error))
    served = Path(row[0]) if row else Path()
    # A copy of our folder has our password and port too; only the path tells the two servers apart.
    if served.exists() and served.samefile(place.cluster):
        return None
    return f"port {place.port} is served from {served}"


def _connect(place: Place, database: str) -> psycopg2.extensions.connection:
    """An authenticated connection, untouched by the caller's PG* variables."""
    return psycopg2.connect(
        host="127.0.0.1",
        hostaddr="127.0.0.1",
        port=place.port,
        user=_NAME,
        password=password_of(place),
        dbname=database,
        connect_timeout=2,
        require_auth="scram-sha-256",  # never hand the password to a stranger on our port
        channel_binding="disable",
        sslmode="disable",
        gssencmode="disable",
        options="",
        target_session_attrs="any",
    )


def _server_gone(place: Place) -> bool:
    """Whether no process of the server lives, and none that somebody started by hand answers."""
    return not _is_held(place.folder) and _why_not(place, "postgres") is not None


def _is_held(folder: Path) -> bool:
    """Whether a process of the server that we started lives."""
    with _open_private(folder / "server.lock") as lock:
        return not _try_lock(lock.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listening(place: Place) -> str:
    """What the running server was told to listen on."""
    with closing(_connect(place, _NAME)) as connection, connection.cursor() as cursor:
        cursor.execute("show listen_addresses")
        row = cursor.fetchone()
    return row[0] if row else ""


# --- files and words


def _open_private(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cause(said: str) -> str:
    """The lines of a server's log that name the cause, as one line."""
    lines = [re.sub(r"^(.*\.\.\. )?[-\d]+ [:.\d]+ \S+ \[\d+\] ", "", line).strip() for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith("pg_ctl: could not start")]
    telling = [line for line in lines if re.search(r"FATAL|PANIC|ERROR|HINT|error:|could not|invalid|No space", line)]
    cause = _one_line("; ".join((telling or lines)[-3:])) or "it said nothing"
    return f"{cause}; free some disk space" if re.search("No space left|free disk space", said) else cause
