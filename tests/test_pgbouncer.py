"""A run behind PgBouncer in transaction mode: the real program, in front of a real server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from conftest import execute
from forecast_places import Place as ForecastPlace
from places import RunPlace as Place
from test_slots import make_study, must_claim, start_trial

from benchmarks.pgbouncer import PROGRAM, PgBouncer
from storage import database, embedded, slots
from storage.retrying import IDLE_TRANSACTION_S

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="the Debian package pgbouncer is not installed")


@pytest.fixture
def bouncer(
    request: pytest.FixtureRequest, scratch: Path, database_server: embedded.PrivateServer, tmp_path: Path
) -> Iterator[PgBouncer]:
    made = PgBouncer(scratch / f"bouncer-{tmp_path.name}", database_server, pool_size=request.param)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PGPASSWORD", made.password)
        yield made
    made.stop()


@pytest.mark.parametrize("bouncer", [1], indirect=True)
def test_nothing_of_ours_stays_on_a_pooled_connection(bouncer: PgBouncer, database_url: str) -> None:
    name = database_url.rsplit("/", 1)[1]
    storage = database.open_storage(bouncer.url(name), wait_s=10)
    study_id = make_study(storage, budget=2)
    slot = must_claim(storage, study_id)
    start_trial(storage, slot)
    slots.release(storage, slot)
    timeout = "show idle_in_transaction_session_timeout"
    assert storage.transaction(lambda c: c.exec_driver_sql(timeout).scalar()) == f"{IDLE_TRANSACTION_S}s"
    with closing(psycopg2.connect(bouncer.url(name))) as other:  # gets the only connection to the server
        cursor = other.cursor()
        cursor.execute(timeout)
        assert cursor.fetchone() == ("0",)
        cursor.execute("select name from pg_settings where source = 'session' and name <> 'transaction_isolation'")
        tracked = {"application_name", "client_encoding", "DateStyle", "TimeZone", "standard_conforming_strings"}
        assert {name for (name,) in cursor.fetchall()} <= tracked  # by PgBouncer, which sets them for each client
        cursor.execute("select count(*) from pg_locks where locktype = 'advisory'")
        assert cursor.fetchone() == (0,)
    storage.engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("bouncer", [3], indirect=True)
def test_a_run_behind_pgbouncer_outlasts_its_restart(bouncer: PgBouncer, place: Place) -> None:
    place.environment |= {"OPTUNA_STORAGE": bouncer.url(place.url.rsplit("/", 1)[1]), "PGPASSWORD": bouncer.password}
    place.slow_down(0.2)
    supervisor = place.launch("--trials", "24")
    place.wait_for_trials(4)
    command = place.command("studies", "list", "--json")
    listings = [subprocess.Popen(command, env=place.environment, stdout=subprocess.PIPE) for _ in range(6)]
    for listing in listings:
        output, _ = listing.communicate(timeout=60)
        assert len(json.loads(output)) == 2
    bouncer.stop()
    time.sleep(1.0)
    assert supervisor.poll() is None
    bouncer.start()
    _, said = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0, said
    assert "restarting" not in said
    place.assert_exact(24, "SP500", "NASDAQ")


@pytest.mark.parametrize("bouncer", [2], indirect=True)
def test_eight_open_an_empty_database_through_two_connections(
    bouncer: PgBouncer, database_server: embedded.PrivateServer
) -> None:
    name = f"empty_{os.getpid()}"
    execute(database_server.url, f"create database {name}")

    def open_once(_: int) -> None:
        database.open_storage(bouncer.url(name), wait_s=10).engine.dispose()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_once, range(8)))  # raises what one of them raised
    execute(database_server.url, f"drop database {name} with (force)")


@pytest.mark.parametrize("bouncer", [1], indirect=True)
def test_forecasts_are_computed_once_behind_a_pooler(bouncer: PgBouncer, database_url: str, tmp_path: Path) -> None:
    place = ForecastPlace(tmp_path, bouncer.url(database_url.rsplit("/", 1)[1]))
    instances = [place.open() for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda number: instances[number % 2].ask(["SP500", "NASDAQ"]), range(8)))
    found = [one for answers in asked for one in answers.forecasts.values()]
    assert len(found) == 16
    assert sum(one.cached == "computed" for one in found) == 2
    assert place.rows() == 2
    place.close()
