"""Everything that outlives a process: the database of the studies and the promoted files.

Knows nothing of forecasters, objectives or commands.
"""

from __future__ import annotations

import os
from pathlib import Path


class DatabaseUnavailable(RuntimeError):
    """The database cannot be started or reached."""

    def __init__(self, message: str | None = None) -> None:
        """`message` is one line that says what to do; without one the class's own sentence stands."""
        super().__init__(message or type(self).__doc__)


def sync_folder(folder: Path) -> None:
    """Make renames in this folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
