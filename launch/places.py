"""Where studies are stored: in the user's database or in our private server, and their images in a folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from launch.output import SayOnce
from storage import DatabaseUnavailable
from storage.commands import command
from studies.config import Config, ConfigError

CHECK_S = 1.0  # between two checks that the private server runs, each of which takes a lock and reads a file


def server_folder(config: Config) -> Path:
    """The folder of the private server's files."""
    return config.storage.data_dir if config.storage.data_dir != Path() else config.storage.local / "postgres"


def artifacts_folder(config: Config) -> Path:
    """The folder of the images that the dashboard shows."""
    if config.storage.artifacts_dir != Path():
        return config.storage.artifacts_dir
    return config.storage.local / "artifacts"


def check_log_dir(config: Config) -> None:
    """Raise ConfigError where the folder of the logs cannot be made or written to. Makes nothing."""
    folder = config.workers.log_dir.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: {there} is not a folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: {there} cannot be written to; name another")


def storage_url(config: Config, *, start: bool) -> str:
    """The storage's URL. That of the private server has no password: PGPASSFILE then names the file that holds it.

    start: create the private server if there is none. Raises DatabaseUnavailable.
    """
    if config.storage.url:
        return config.storage.url
    from storage import embedded

    folder = server_folder(config)
    if not start and not folder.exists():
        made_by = command("launch-workers")
        raise DatabaseUnavailable(f"{folder}: no studies yet; name a --storage, or make some with: {made_by}")
    server = embedded.start(folder, listen=config.storage.listen)
    os.environ["PGPASSFILE"] = str(server.passfile)
    os.environ.pop("PGPASSWORD", None)  # another server's password must not take precedence over the file
    return server.url


def open_storage(config: Config, *, start: bool = False, write: bool = False) -> Any:
    """Open the storage. start: as for `storage_url`. write: its role must be able to. Raises DatabaseUnavailable."""
    from storage import database  # here: it imports Optuna

    database.quiet_optuna()
    url = storage_url(config, start=start)
    private = None if config.storage.url else server_folder(config)
    storage = database.open_storage(url, wait_s=config.storage.wait_s, private=private)
    if write:
        database.check_writable(storage)
    return storage


@contextmanager
def private_server_kept_alive(
    config: Config, *, say: Callable[[str], None], log: Path, on_stop: Callable[[], None]
) -> Iterator[None]:
    """Start the private server again if anything but `studies stop` ends it within the block.

    log: gets the traceback of an error that nobody expects. on_stop: called once, from another thread, after
    `studies stop`.
    """
    if config.storage.url:
        yield
        return
    from storage import embedded
    from storage.retrying import one_line

    folder, ended = server_folder(config), threading.Event()

    def check() -> None:
        say_once = SayOnce(say, log)
        while not ended.wait(CHECK_S):
            try:
                if embedded.was_stopped(folder):
                    say("'studies stop' stopped the private server, so this run ends")
                    on_stop()
                    return
                if embedded.revive(folder, listen=config.storage.listen):
                    say("the private server had ended; started it again")
                say_once.well()
            except DatabaseUnavailable as error:
                say_once.error(str(error))
            except Exception as error:  # noqa: BLE001 - without this thread nobody would start the server again
                say_once.error(f"the private server is not watched: {one_line(error)}", error)

    threading.Thread(target=check, name="server", daemon=True).start()
    try:
        yield
    finally:
        ended.set()  # not waited for: it may be starting a server that nobody needs any more


def shared_url(config: Config, host: str | None) -> str:
    """The storage's URL without its password, for other programs; starts the private server if there is none.

    host: the name or address of this machine for other hosts. Raises DatabaseUnavailable, and ConfigError if no other
    host could reach the server.
    """
    from storage import urls

    listen = ip_address(config.storage.listen)
    if host and config.storage.url:
        raise ConfigError("--host is for the URL of the private server; this storage is a server of your own")
    if host and listen.is_loopback:
        stop = command("studies stop")
        raise ConfigError(f"[storage] listen is {listen}, which lets no other host in; set it, then: {stop}")
    parsed = urls.parse_url(storage_url(config, start=True))
    if not config.storage.url and not listen.is_loopback:
        # No client can connect to 0.0.0.0, so without --host the URL is for this machine.
        parsed = parsed.set(host=host or (parsed.host if listen.is_unspecified else str(listen)))
    return urls.without_password(parsed)
