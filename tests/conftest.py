"""One real Postgres server for the whole run, and a fresh database for each test that asks for one."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
from filelock import FileLock

from storage import embedded
from storage.database import create_schema

if TYPE_CHECKING:
    from browser import Tab
    from places import Place, StudyPlace
    from playwright.sync_api import Browser
    from ray_nodes import Nodes

    from forecasters import Bars
    from studies.study import Study

# A developer's own settings must not leak into a test: scrubbed before any test module is imported.
SCRUBBED = (
    "PG", "OPTUNA_", "STUDIES_", "CUDA_VISIBLE_DEVICES", "HYPERPARAM_ROOT", "RAY_ADDRESS", "FORCE_COLOR",
    "MARKETSIM_", "TOTO_", "KRONOS_", "TORCH_COMPILE_MODE", "TRIALS", "WORKERS", "MODEL",
)  # fmt: skip
for _name in [name for name in os.environ if name.startswith(SCRUBBED)]:
    del os.environ[_name]

# One thread for each process: the suite and each run it starts have several processes, and more threads than cores only
# wait for each other. Numbers are compared within a run of the suite, so that all of them have the same threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep in the user's data folder, such as images, stays out of it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """This process begins and ends without compiled graphs and without their counts; kernels on disk stay."""
    import torch._dynamo.utils

    def forget() -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    forget()
    yield
    forget()


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
def own_server(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[embedded.PrivateServer]:
    """A server that the test may stop."""
    folder = scratch / uuid.uuid4().hex
    server = embedded.start(folder)
    monkeypatch.setenv("PGPASSFILE", str(server.passfile))
    yield server
    embedded.stop(folder)


@pytest.fixture
def database_url(database_server: embedded.PrivateServer) -> Iterator[str]:
    """The URL, without a password, of a database with the schema and nothing else; dropped after the test."""
    name = f"t_{uuid.uuid4().hex}"
    execute(database_server.url, f"create database {name} template template_studies")
    yield database_server.url.rsplit("/", 1)[0] + "/" + name
    execute(database_server.url, f"drop database {name} with (force)")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, database_url: str) -> Iterator[Place]:
    """What the test's module calls Place: a kind of places.Place."""
    found = request.module.Place(tmp_path, database_url)
    yield found
    found.close()


@pytest.fixture(scope="module")
def bars() -> Bars:
    """300 days at random, with everything that a bar has."""
    import numpy as np

    from forecasters import Bars

    rng = np.random.default_rng(3)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, 300)))
    opening = close * np.exp(rng.normal(0, 0.003, 300))
    return Bars(
        timestamps=np.datetime64("2020-01-01", "ns") + np.arange(300) * np.timedelta64(1, "D"),
        open=opening,
        high=np.maximum(opening, close) * 1.002,
        low=np.minimum(opening, close) / 1.002,
        close=close,
        volume=rng.lognormal(12, 0.5, 300),
    )


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """The bundled Toto and Kronos."""
    import forecasters

    return {model: forecasters.load(model, checkpoint=f"{model}-tiny") for model in ("toto", "kronos")}


@pytest.fixture
def folder(place: StudyPlace) -> Path:
    """Where the images that the dashboard shows are kept."""
    return place.folder / "artifacts"


@pytest.fixture
def study(place: StudyPlace) -> Study:
    """A study that is confirmed, with an incumbent."""
    from places import INCUMBENT

    place.put("best", INCUMBENT)
    opened = place.open().study
    place.finish(opened)
    return opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser, for the tests of pages only: its library takes long to import."""
    from browser import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A page of its own."""
    from browser import open_tab

    with open_tab(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A Ray cluster, of the one process of the suite that has it now: two on one machine take each other's ports."""
    from ray_nodes import Nodes

    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets need a short path
    with FileLock("/tmp/forecast-studies-tests-ray.lock"), pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", str(folder))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        (folder / "ray").mkdir()
        nodes = Nodes()
        yield nodes
        nodes.cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def execute(url: str, *statements: str) -> None:
    """Run statements one by one, each on its own: databases are not made or dropped in a transaction."""
    with closing(psycopg2.connect(url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
