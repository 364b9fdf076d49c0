"""What goes wrong with a database during a run, and what is done about it, on a real Postgres."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
from conftest import execute
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from test_slots import make_study, must_claim

from storage import DatabaseUnavailable, database
from storage.retrying import RetryingStorage


@pytest.fixture
def storage(database_url: str) -> Iterator[RetryingStorage]:
    opened = database.open_storage(database_url, wait_s=20, create=False)
    yield opened
    opened.engine.dispose()


def name_of(url: str) -> str:
    return url.rsplit("/", 1)[1]


def alter(url: str, what: str) -> None:
    """Change the database's defaults, and end its sessions so that the next ones have them."""
    execute(
        url,
        f"alter database {name_of(url)} {what}",
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()",
    )


# --- what is waited for


@pytest.mark.parametrize(
    "state",
    ["25006", "25P03", "40001", "40P01", "53100", "53200", "53300", "53400", "55P03", "57014", "57P03", "57P05"],
)
def test_a_passing_state_of_the_server_is_waited_for(storage: RetryingStorage, state: str) -> None:
    attempts = []

    def run(connection: Any) -> Any:
        attempts.append(1)
        if len(attempts) < 3:
            connection.execute(text(f"do $$ begin raise exception using errcode = '{state}'; end $$"))
        return connection.execute(text("select 7")).scalar()

    assert storage.transaction(run) == 7
    assert len(attempts) == 3


@pytest.mark.parametrize("state", ["42501", "42P01", "22012", "23505"])
def test_an_error_that_no_waiting_mends_is_raised_at_once(storage: RetryingStorage, state: str) -> None:
    attempts = []

    def run(connection: Any) -> None:
        attempts.append(1)
        connection.execute(text(f"do $$ begin raise exception using errcode = '{state}'; end $$"))

    with pytest.raises(DBAPIError):
        storage.transaction(run)
    assert len(attempts) == 1


def test_name_resolution_that_fails_during_a_run_is_waited_for(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    failures: list[str] = []
    back_at = time.monotonic() + 1.0

    @event.listens_for(storage.engine, "do_connect")
    def without_names(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        if time.monotonic() < back_at:
            failures.append(parameters["host"])
            parameters["host"] = "no.such.host.invalid"

    storage.engine.dispose()
    must_claim(storage, study_id)
    assert failures
    storage.wait_s, back_at = 0.2, time.monotonic() + 60
    storage.engine.dispose()
    with pytest.raises(DatabaseUnavailable, match=r"no answer for 0 s: could not translate host name"):
        must_claim(storage, study_id)


def test_a_url_with_an_unknown_host_is_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match="could not translate host name"):
        database.open_storage("postgresql://u@no.such.host.invalid/d", wait_s=60)
    assert time.monotonic() - began < 20


def test_a_read_only_failover_is_waited_for(storage: RetryingStorage, database_url: str) -> None:
    study_id = make_study(storage, budget=1)
    alter(database_url, "set default_transaction_read_only = on")

    def promote() -> None:
        with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as connection:
            connection.autocommit = True
            connection.cursor().execute("set default_transaction_read_only = off")
            connection.cursor().execute(f"alter database {name_of(database_url)} reset default_transaction_read_only")

    promoted = threading.Timer(1.0, promote)
    promoted.start()
    # Sessions that were read-only stay so: only a new connection finds the server that takes writes.
    must_claim(storage, study_id)
    promoted.join()


def test_a_statement_that_timed_out_is_tried_again(storage: RetryingStorage, database_url: str) -> None:
    study_id = make_study(storage, budget=1)
    alter(database_url, "set statement_timeout = '200ms'")
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as blocking:
        blocking.cursor().execute("lock table slots")
        unlocked = threading.Timer(0.8, blocking.rollback)
        unlocked.start()
        must_claim(storage, study_id)
        unlocked.join()
