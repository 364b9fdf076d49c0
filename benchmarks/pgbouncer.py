"""A PgBouncer in transaction mode before a private server, for as long as a benchmark or a test needs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import embedded, postgres

PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
SETTINGS = """
[databases]
studies = host=127.0.0.1 port={server_port} dbname=studies user=studies password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 500
server_login_retry = 1
"""


class PgBouncer:
    """One that runs. `url` is the database through it; it asks for no password and listens on the loopback only."""

    def __init__(self, folder: Path, server: embedded.PrivateServer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server_port, _, _, password = server.passfile.read_text().splitlines()[0].split(":")[1:]
        self.url = f"postgresql://studies@127.0.0.1:{port}/studies"
        self._port, self._log, self._settings = port, folder / "pgbouncer.log", folder / "pgbouncer.ini"
        self._settings.touch(mode=0o600)
        self._settings.write_text(SETTINGS.format(port=port, server_port=server_port, password=password))
        owner = postgres.new_owner()  # like Postgres, it refuses to be run by root
        self._user = {} if owner is None else {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        if owner is not None:
            os.chown(self._settings, owner.pw_uid, owner.pw_gid)
        self.start()

    def start(self) -> None:
        assert PROGRAM is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, "-q", str(self._settings)], stderr=log, stdout=log, **self._user)
        for _ in range(200):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(f"pgbouncer does not start: {self._log.read_text()[-500:]}")

    def stop(self) -> None:
        """At once: whatever its clients were doing breaks off."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextmanager
def pgbouncer(folder: Path, server: embedded.PrivateServer) -> Iterator[PgBouncer]:
    """In a folder that the server's user can pass through; stopped in the end."""
    found = PgBouncer(folder, server)
    try:
        yield found
    finally:
        found.stop()
