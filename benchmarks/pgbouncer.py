"""A PgBouncer in transaction mode before a private server: the Debian package's program."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from storage import embedded, ports, postgres

PROGRAM = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")

SETTINGS = """
[databases]
* = host=127.0.0.1 port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 2000
server_login_retry = 1
"""


class PgBouncer:
    """One that runs, and may be stopped and started again. `password` is the server's."""

    def __init__(self, folder: Path, server: embedded.PrivateServer, *, pool_size: int) -> None:
        """Make the folder, which everyone must be able to reach, and start the program."""
        folder.mkdir()
        folder.chmod(0o711)
        self.port = ports.free_port(loopback_only=True)
        self.password = (server.data_dir / "password").read_text().strip()
        values = {"server_port": int(server.url.rsplit(":", 1)[1].split("/")[0]), "port": self.port, "folder": folder}
        self._settings = folder / "pgbouncer.ini"
        self._settings.write_text(SETTINGS.format(pool_size=pool_size, **values))
        users = folder / "users"
        users.touch(0o600)
        users.write_text(f'"studies" "{self.password}"\n')
        self._account = postgres.new_owner()  # it refuses to be root, as Postgres does
        if self._account:
            shutil.chown(users, self._account.pw_uid)
        self.start()

    def url(self, database: str) -> str:
        """The URL of one of the server's databases, without its password."""
        return f"postgresql://studies@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert PROGRAM
        user = self._account.pw_uid if self._account else None
        self.process = subprocess.Popen([PROGRAM, "-q", self._settings], user=user, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while ports.is_free(self.port, loopback_only=True):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer does not start: {self._settings}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it at once, with every connection through it."""
        self.process.kill()
        self.process.wait()
