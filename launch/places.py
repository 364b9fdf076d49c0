"""Where a command's studies are: the user's storage or our private server, and the images beside it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from storage import DatabaseUnavailable
from studies.config import Config, ConfigError

LOOK_S = 1.0  # between two looks at the private server: a lock and a file


def server_folder(config: Config) -> Path:
    """Where the private server keeps its files."""
    if config.storage.data_dir != Path():
        return config.storage.data_dir
    import platformdirs

    return Path(platformdirs.user_data_dir("forecast-studies")) / "postgres"


def artifacts_folder(config: Config) -> Path:
    """Where the images are that the dashboard shows."""
    if config.storage.artifacts_dir != Path():
        return config.storage.artifacts_dir
    return server_folder(config).parent / "artifacts"


def storage_url(config: Config, *, start: bool) -> str:
    """The URL to use, without a password where the server is our own; PGPASSFILE then names the file that holds it.

    start: start the private server where none runs. Raises DatabaseUnavailable.
    """
    if config.storage.url:
        return config.storage.url
    from storage import embedded

    folder = server_folder(config)
    if not start and not folder.exists():
        raise DatabaseUnavailable(f"{folder}: no studies yet; make some with launch-workers, or name a --storage")
    server = embedded.start(folder, listen=config.storage.listen)
    os.environ["PGPASSFILE"] = str(server.passfile)
    os.environ.pop("PGPASSWORD", None)  # another server's password must not go before the file
    return server.url


def open_storage(config: Config, *, start: bool = False) -> Any:
    """The storage, ready to use. start: as for `storage_url`. Raises DatabaseUnavailable."""
    from storage import database  # late: it brings Optuna

    database.quiet_optuna()
    return database.open_storage(storage_url(config, start=start), wait_s=config.storage.wait_s)


@contextmanager
def kept_alive(config: Config, *, say: Callable[[str], None]) -> Iterator[None]:
    """Start the private server again if it is killed meanwhile, as one short of memory is; not if it is stopped."""
    if config.storage.url:
        yield
        return
    from storage import embedded

    folder, ended = server_folder(config), threading.Event()

    def look() -> None:
        told = ""
        while not ended.wait(LOOK_S):
            try:
                if embedded.revive(folder, listen=config.storage.listen):
                    say("the private server was killed; started it again")
                    told = ""
            except DatabaseUnavailable as error:
                if str(error) != told:  # it is tried again, but said once
                    told = str(error)
                    say(told)

    looker = threading.Thread(target=look, name="server", daemon=True)
    looker.start()
    try:
        yield
    finally:
        ended.set()
        looker.join()


def shared_url(config: Config, host: str | None) -> str:
    """The URL to give to others, without its password; the private server is started where none runs.

    host: how other hosts call this machine.
    Raises DatabaseUnavailable, and ConfigError where no other host could reach it.
    """
    from storage import urls

    listen = ip_address(config.storage.listen)
    if host and config.storage.url:
        raise ConfigError("--host is for the private server's URL; the storage is a server of yours")
    if host and listen.is_loopback:
        raise ConfigError(f"[storage] listen is {listen}, which lets no other host in; set it, then: studies stop")
    parsed = urls.parse_url(storage_url(config, start=True))
    if not config.storage.url and not listen.is_loopback:
        # 0.0.0.0 is no address to call: without --host the URL is for this machine.
        parsed = parsed.set(host=host or (parsed.host if listen.is_unspecified else str(listen)))
    return urls.without_password(parsed)
