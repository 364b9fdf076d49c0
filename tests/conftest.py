"""One real Postgres server for the whole run, and a fresh database for each test that asks for one."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from storage import embedded
from storage.database import create_schema

# A developer's own settings must not leak into a test: scrubbed before any test module is imported.
SCRUBBED = ("PG", "OPTUNA_", "STUDIES_", "CUDA_VISIBLE_DEVICES", "HYPERPARAM_ROOT", "RAY_ADDRESS", "FORCE_COLOR")
for _name in [name for name in os.environ if name.startswith(SCRUBBED)]:
    del os.environ[_name]

# Everything that a run reads and writes, beside its settings. Dotted keys: a test can set more of the same tables.
FOLDERS = """
data.dir = "bars"
workers.log_dir = "logs"
hyperparams.dir = "hyperparams"
promotion.results_dir = "results"
"""


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep in the user's data folder, such as images, stays out of it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder for databases: in memory where there is room, since a first start syncs a thousand files.

    Unlike pytest's tmp_path everyone may pass through it: root's server runs as another user.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * 2**30
    folder = Path(tempfile.mkdtemp(prefix="studies-tests-", dir=memory if roomy else None))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def database_server(scratch: Path) -> Iterator[embedded.PrivateServer]:
    """A private server with an empty schema in the database `template_studies`. PGPASSFILE is set for its URLs."""
    environment = pytest.MonkeyPatch()
    try:
        server = embedded.start(scratch / "data")
        environment.setenv("PGPASSFILE", str(server.passfile))
        # Tests kill processes, not the machine: what the kernel holds is safe without fsync.
        execute(server.url, "alter system set fsync = off", "select pg_reload_conf()")
        execute(server.url, "create database template_studies")
        create_schema(server.url.rsplit("/", 1)[0] + "/template_studies")
        yield server
    finally:
        environment.undo()
        embedded.stop(scratch / "data")


@pytest.fixture
def database_url(database_server: embedded.PrivateServer) -> Iterator[str]:
    """The URL, without a password, of a database with the schema and nothing else; dropped after the test."""
    name = f"t_{uuid.uuid4().hex}"
    execute(database_server.url, f"create database {name} template template_studies")
    yield database_server.url.rsplit("/", 1)[0] + "/" + name
    execute(database_server.url, f"drop database {name} with (force)")


def execute(url: str, *statements: str) -> None:
    """Run statements one by one, each on its own: databases are not made or dropped in a transaction."""
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
