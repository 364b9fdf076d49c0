"""A folder and a Postgres server of a benchmark's own, and settings that keep everything in that folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from storage import embedded
from storage.retrying import RetryingStorage

SERVER = "server"
# Dotted keys, so that a benchmark can set more of the same tables.
SETTINGS = f"""
data.dir = "bars"
storage.data_dir = "{SERVER}"
workers.log_dir = "logs"
hyperparams.dir = "hyperparams"
promotion.results_dir = "results"
"""


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="studies-benchmark-") as name:
        found = Path(name)
        found.chmod(0o711)  # root's server runs as another user, who must pass through
        yield found


@contextmanager
def server(folder: Path) -> Iterator[embedded.PrivateServer]:
    """The server that SETTINGS in this folder mean, stopped in the end. PGPASSFILE is set for its URL."""
    found = embedded.start(folder / SERVER)
    try:
        os.environ["PGPASSFILE"] = str(found.passfile)
        yield found
    finally:
        embedded.stop(folder / SERVER)


def postgres(storage: RetryingStorage) -> str:
    """The server's version: "18.4"."""
    return storage.transaction(lambda connection: connection.execute(text("show server_version")).scalar_one())
