"""A dashboard's server over the studies of a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from places import StudyPlace as Place

from launch.door import Door
from launch.views import dashboard
from storage import database


@contextmanager
def served(place: Place, folder: Path, *, host: str = "127.0.0.1", token: str | None = None) -> Iterator[str]:
    """The address of a dashboard over the studies."""
    storage = database.open_storage(place.url, wait_s=10, create=False)
    server = dashboard.bind(storage, folder, Door(host=host, token=token), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        storage.engine.dispose()
