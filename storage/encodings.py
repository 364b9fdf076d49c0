"""What networks computed, kept on this host between runs: bytes by key in one SQLite file that many processes use.

SQLite and no mapped file: a truncated map ends a process (SIGBUS), and here it is an error that is caught. Whatever is
wrong with the file, a value is there as it was put or not there, and nothing here raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MOST_BYTES = 10 * 2**30
USED_S = 3600  # a use is noted when the last one was so long ago
WAIT_S = 5.0  # for another process that writes
CHECK_BYTES = 16
SPARE = 0.05  # of the limit, made free at a time
APPLICATION = 0x464F5245  # what tells our file from another's
PRAGMAS = (
    "pragma auto_vacuum = incremental",
    "pragma journal_mode = wal",
    "pragma synchronous = off",  # what is lost with the power is computed again; a damaged file is noticed
    "pragma journal_size_limit = 16777216",
)
TABLE = "create table if not exists kept (key blob primary key, value blob not null, used integer not null)"
INDEX = "create index if not exists oldest on kept (used)"

DAMAGED = (
    sqlite3.DatabaseError,
    UnicodeDecodeError,
    TypeError,
)  # the last two: a damaged name, a value of another type

_log = logging.getLogger("encodings")


def default_limit(folder: Path) -> int:
    """A tenth of the disk that is free or ours already, in bytes, and at most MOST_BYTES."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    own = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # a journal of another process, which is gone by now
            own += path.stat().st_size
    return min(MOST_BYTES, (shutil.disk_usage(there).free + own) // 10)


class Encodings:
    """Values by key, at most `limit` bytes of them, the oldest use going first. One a process; not for threads."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """folder: made if need be; each host has a file of its own in it. limit: bytes; None: `default_limit`."""
        self.path = folder / f"{os.uname().nodename}.sqlite"
        self._limit, self._warned, self._full = limit or 0, False, False
        self._connection: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._limit = limit or default_limit(folder)
            self._connection = self._open_patiently()
        except sqlite3.OperationalError as error:
            self._give_up(error)
        except DAMAGED as error:
            self._set_aside(error)
        except OSError as error:
            self._give_up(error)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None where there is none."""
        found: list[bytes | None] = []
        if self._connection is None:
            return [None] * len(keys)
        old, now = [], int(time.time())
        try:
            for key in keys:
                row = self._connection.execute("select value, used from kept where key = ?", (key,)).fetchone()
                value = None if row is None else _checked(key, row[0])
                if row is not None and value is None:
                    self._warn("a kept encoding is damaged and is computed again")
                elif row is not None and now - row[1] >= USED_S:
                    old.append((now, key))
                found.append(value)
        except DAMAGED as error:
            self._failed(error)
            return [None] * len(keys)
        if old:
            self._write(lambda open_: open_.executemany("update kept set used = ? where key = ?", old))
        return found

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Keep these values, in place of any that their keys had."""
        now = int(time.time())
        rows = [(key, _check(key, value) + value, now) for key, value in values.items()]
        size = sum(len(key) + len(value) for key, value, _ in rows)
        if size > self._limit // 4:
            return

        def write(open_: sqlite3.Connection) -> None:
            self._make_room(open_, size)
            open_.executemany("insert or replace into kept values (?, ?, ?)", rows)

        self._write(write)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- the file ------------------------------------------------------------------------------------------------------

    def _open_patiently(self) -> sqlite3.Connection:
        """While another process makes the file, SQLite's own waiting does not help. Raises sqlite3.Error."""
        give_up_at = time.monotonic() + WAIT_S
        while True:
            try:
                return self._open()
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.02)

    def _open(self) -> sqlite3.Connection:
        """Raises sqlite3.Error."""
        # Of one thread at a time, which may be the one that happens to collect what used it.
        open_ = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            open_.execute("begin")  # both are read at one time: another process may be making the file
            mark = open_.execute("pragma application_id").fetchone()[0]
            tables = open_.execute("select count(*) from sqlite_master").fetchone()[0]
            open_.execute("commit")
            if mark != APPLICATION and tables:
                raise sqlite3.DatabaseError("it is a database of another program")
            for pragma in PRAGMAS:
                open_.execute(pragma)
            open_.execute("begin immediate")
            open_.execute(TABLE)
            open_.execute(INDEX)
            open_.execute(f"pragma application_id = {APPLICATION}")
            open_.execute("commit")
        except BaseException:
            open_.close()
            raise
        return open_

    def _write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        if self._connection is None or self._full:
            return
        try:
            self._connection.execute("begin immediate")
            try:
                work(self._connection)
                self._connection.execute("commit")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
                raise
        except DAMAGED as error:
            self._failed(error)

    def _make_room(self, open_: sqlite3.Connection, size: int) -> None:
        """Delete what was used longest ago where `size` bytes more would not fit."""
        page, pages, unused = (
            open_.execute(f"pragma {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
        )
        excess = (pages - unused) * page + size - self._limit
        if excess <= 0:
            return
        excess += int(SPARE * self._limit)
        gone = []
        for row, length in open_.execute("select rowid, length(value) from kept order by used, rowid"):
            gone.append((row,))
            excess -= length
            if excess <= 0:
                break
        open_.executemany("delete from kept where rowid = ?", gone)
        if pages * page > self._limit:
            open_.execute("pragma incremental_vacuum").fetchall()

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        if _is_busy(error):
            return  # others write for so long: this is not kept
        if isinstance(error, sqlite3.OperationalError):
            self._full = True  # what is there can still be read
            self._warn(f"no more encodings are kept: {error}")
        else:
            self._set_aside(error)

    def _set_aside(self, error: Exception) -> None:
        """Not used any more; the next process begins with a file of its own in its place."""
        self._warn(f"kept encodings cannot be read and are set aside: {error}")
        self.close()
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
            for name in ("-wal", "-shm"):
                self.path.with_name(self.path.name + name).unlink(missing_ok=True)
        except OSError as failed:
            _log.warning("%s: %s; delete it", self.path, failed.strerror)

    def _give_up(self, error: Exception) -> None:
        self._warn(f"encodings are not kept: {error}")

    def _warn(self, words: str) -> None:
        if not self._warned:
            _log.warning("%s: %s", self.path, words)
        self._warned = True


def _check(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key, digest_size=CHECK_BYTES).digest()


def _checked(key: bytes, kept: object) -> bytes | None:
    """The value that was put under this key; None where it is not that any more."""
    if not isinstance(kept, bytes) or _check(key, kept[CHECK_BYTES:]) != kept[:CHECK_BYTES]:
        return None
    return kept[CHECK_BYTES:]


def _is_busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
