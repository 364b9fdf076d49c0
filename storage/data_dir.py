"""What a data_dir remembers of the private server in it: where its cluster is, its port, its password."""

from __future__ import annotations

import errno
import json
import logging
import os
import pwd
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage import DatabaseUnavailable, ports, postgres
from storage.files import replace_file

_log = logging.getLogger("storage")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What server.json remembers of a cluster."""

    folder: Path  # the data_dir
    home: Path  # holds `cluster`: the data_dir itself, or a folder under postgres.ROOT_HOME
    port: int
    binaries: Path | None  # those used last

    @property
    def cluster(self) -> Path:
        return self.home / "cluster"


def make_folder(data_dir: Path) -> Path:
    """The resolved data_dir, made if need be. Raises DatabaseUnavailable."""
    folder = data_dir.expanduser().resolve()
    try:
        with suppress(FileExistsError):  # another process may be making it at this moment
            folder.mkdir(parents=True)
            folder.chmod(0o711 if os.geteuid() == 0 else 0o700)  # the server's user must pass through it
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written", str(folder))
    except OSError as error:
        raise DatabaseUnavailable(f"{folder}: {error.strerror}; choose another data_dir") from error
    return folder


def remembered(folder: Path) -> Place | None:
    """What server.json says, or None before the first start. Raises DatabaseUnavailable."""
    path = folder / "server.json"
    try:
        raw = json.loads(path.read_text())
        return Place(
            folder=folder,
            home=Path(raw["home"]) if raw["home"] else folder,
            port=int(raw["port"]),
            binaries=Path(raw["binaries"]) if raw["binaries"] else None,
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DatabaseUnavailable(f"{path} is damaged; restore it, or move {folder} away to start afresh") from error


def remember(place: Place) -> None:
    """Write server.json."""
    content = {
        "home": None if place.home == place.folder else str(place.home),  # so that a data_dir can be moved
        "port": place.port,
        "binaries": str(place.binaries) if place.binaries else None,
    }
    write_private(place.folder / "server.json", json.dumps(content, indent=2) + "\n")


def new_place(folder: Path) -> Place:
    """Choose where the cluster goes and its port, and remember both before anything else is made.

    Raises DatabaseUnavailable.
    """
    for name in ("PG_VERSION", "cluster", "password", "pgpass"):
        if (folder / name).exists():
            raise DatabaseUnavailable(f"{folder} holds '{name}' of something else; choose an empty folder as data_dir")
    home, owner = folder, postgres.new_owner()
    if owner and not postgres.reaches(owner, folder):
        home = _root_home(owner)
        write_private(home / "data_dir", f"{folder}\n")  # whose it is, should that folder be deleted
        _log.warning("%s cannot reach %s, so the database is kept in %s", owner.pw_name, folder, home)
    place = Place(folder=folder, home=home, port=ports.free_port(loopback_only=True), binaries=None)
    remember(place)
    return place


def _root_home(owner: pwd.struct_passwd) -> Path:
    """A new folder that the server's user can reach: parents of a data_dir are never opened up for it."""
    postgres.make_root_home()
    home = Path(tempfile.mkdtemp(dir=postgres.ROOT_HOME))
    home.chmod(0o711)
    if not postgres.reaches(owner, home):
        home.rmdir()
        raise DatabaseUnavailable(
            f"the user {owner.pw_name} cannot reach {postgres.ROOT_HOME}; choose a data_dir that it can"
        )
    return home


def password_of(place: Place) -> str:
    """The password of the cluster. Raises DatabaseUnavailable."""
    path = place.folder / "password"
    try:
        return path.read_text().strip()
    except FileNotFoundError as error:
        raise DatabaseUnavailable(f"{path} is gone; restore it, or move {place.folder} away to start afresh") from error
    except PermissionError as error:
        raise DatabaseUnavailable(f"{path} cannot be read; run as the user that made this database") from error


def write_private(path: Path, content: str, owner: pwd.struct_passwd | None = None) -> None:
    """Replace a small file whole and durably, mode 0600; `owner` gets it. Raises OSError."""
    replace_file(path, content, mode=0o600, owner=owner and (owner.pw_uid, owner.pw_gid), durable=True)
