"""Serve optuna-dashboard over the studies, and let in whom it is for: optuna-dashboard itself has no login.

What the pages show is storage/board.py and notes.py; who may come in is launch/door.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from launch import door as doors
from launch.door import Door, Server
from storage import DatabaseUnavailable, board
from storage.retrying import RetryingStorage

PAGE_WAIT_S = 20.0  # that a page waits for a database that is away; a browser asks again every ten seconds


def open_door(host: str, token_file: Path | None) -> Door:
    """Who may come in at this address. Raises CannotServe."""
    return doors.open_door(
        host, token_file, what="dashboard", danger="delete studies, as optuna-dashboard has no login"
    )


def bind(storage: RetryingStorage, folder: Path, door: Door, port: int) -> Server:
    """A server that answers once `serve_forever` runs. Port 0: any free one. Raises CannotServe."""
    storage.wait_s = min(storage.wait_s, PAGE_WAIT_S)
    logging.getLogger("optuna_dashboard._bottle_util").addFilter(_in_one_line)
    return doors.bind(board.application(storage, folder), door, port)


def _in_one_line(record: logging.LogRecord) -> bool:
    """optuna-dashboard logs a traceback for a page that failed; that the database is away takes no traceback."""
    error = sys.exc_info()[1]
    if isinstance(error, DatabaseUnavailable):
        record.msg, record.args = str(error), ()
    return True


def serve(server: Server, door: Door, *, say: Callable[[str], None]) -> None:
    """Answer until KeyboardInterrupt, which is passed on."""
    say(f"{doors.address(server, door)} (Ctrl-C ends it)")
    try:
        server.serve_forever()
    finally:
        server.server_close()
