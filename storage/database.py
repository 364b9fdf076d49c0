"""From a URL to an Optuna storage: the schema is made once, and what cannot be opened is said in one line."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from typing import Any, cast

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from storage import DatabaseUnavailable
from storage.retrying import RetryingStorage, first_line, is_transient
from storage.urls import parse_url, without_password

SCHEMA_LOCK = 0x5EED0001  # advisory lock key: any constant that every worker shares

SLOTS_DDL = """
create table if not exists slots (
    study_id integer not null references studies (study_id) on delete cascade,
    stage integer not null,
    number integer not null,
    label text,
    params jsonb,
    state text not null default 'free' check (state in ('free', 'busy', 'done', 'parked')),
    claim text,
    worker text,
    lease_until timestamptz,
    failures integer not null default 0,
    losses integer not null default 0,
    error text,
    result jsonb,
    seconds jsonb,
    progress jsonb,
    primary key (study_id, stage, number)
);
create index if not exists slots_open on slots (study_id, stage, number) where state in ('free', 'busy');
create unique index if not exists slots_claim on slots (claim) where claim is not null;
"""

COLUMNS = "select attname from pg_attribute where attrelid = to_regclass('slots') and attnum > 0 and not attisdropped"
LATER = ("seconds", "progress")  # columns that a table made earlier lacks
# By these our table is known.
OUR_COLUMNS = set(re.findall(r"^    (\w+) (?:integer|text|jsonb|timestamptz)", SLOTS_DDL, re.M)) - set(LATER)


def open_storage(url: str, *, wait_s: float = 600.0, create: bool = True, patient: bool = False) -> RetryingStorage:
    """Connect, making the schema where it is missing.

    wait_s: how long each later call waits for a server that went away.
    patient: the first connection waits as long; else it is tried once, since the URL may be wrong.
    Raises DatabaseUnavailable in one line that never holds the password.
    """
    parsed = parse_url(url)
    if create:
        create_schema(url)
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            return RetryingStorage(parsed, wait_s=wait_s)
        except (StorageInternalError, SQLAlchemyError) as error:
            if not (patient and is_transient(error) and time.monotonic() < give_up_at):
                raise _unavailable(parsed, error) from None
        except RuntimeError as error:  # Optuna: the schema is of another Optuna version
            raise DatabaseUnavailable(f"{without_password(parsed)}: {first_line(error)}") from None
        time.sleep(0.5 + random.random())


def create_schema(url: str) -> None:
    """Make Optuna's tables and ours where they are missing, once, however many processes ask at the same time.

    Raises DatabaseUnavailable, also where the database has a table `slots` that is not ours; nothing is altered then.
    """
    parsed = parse_url(url)
    engine = sqlalchemy.create_engine(
        parsed,
        isolation_level="READ COMMITTED",
        connect_args={"connect_timeout": 10},
        poolclass=sqlalchemy.pool.NullPool,
    )
    try:
        with engine.begin() as connection:
            columns = _columns_of_slots(connection, parsed)
            for column in LATER if columns and not columns.issuperset(LATER) else ():
                connection.execute(text(f"alter table slots add column if not exists {column} jsonb"))
        if columns:
            return
        # Optuna's own creation is not safe for two at once (measured: 7 of 8 workers crash on an empty database).
        # The lock is of this transaction, which stays open while Optuna works in one of its own: a lock of the session
        # would outlive its user behind a pooler such as PgBouncer.
        with engine.begin() as connection:
            connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            if not _columns_of_slots(connection, parsed):
                RDBStorage(
                    parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
                ).engine.dispose()
                connection.execute(text(SLOTS_DDL))
    except (StorageInternalError, SQLAlchemyError) as error:
        raise _unavailable(parsed, error) from None
    finally:
        engine.dispose()


def _columns_of_slots(connection: Connection, url: URL) -> set[str]:
    """The columns of our table, none where there is no table. Raises DatabaseUnavailable where it is not ours."""
    columns = set(connection.execute(text(COLUMNS)).scalars())
    if columns and not columns >= OUR_COLUMNS:
        raise DatabaseUnavailable(
            f"{without_password(url)}: has a table 'slots' that is not of forecast-studies; "
            "create a database for the studies and name that with --storage"
        )
    return columns


def _unavailable(url: URL, error: BaseException) -> DatabaseUnavailable:
    hint = "start the server, or name another with --storage"
    if "password" in first_line(error):
        hint = "set PGPASSWORD, or add a line to ~/.pgpass"
    return DatabaseUnavailable(f"{without_password(url)}: {first_line(error)}; {hint}")


def password_in_use(storage: RetryingStorage) -> dict[str, str]:
    """The environment that carries the password of the storage's connections, wherever libpq had it from."""

    def read(connection: Connection) -> str:
        return cast(Any, connection.connection.dbapi_connection).info.password

    password = storage.transaction(read)
    return {"PGPASSWORD": password} if password else {}


def quiet_optuna() -> None:
    """Optuna logs a line a trial and warns of its own experimental names: our log line replaces them."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def worker_name() -> str:
    """HOST:PID, unique among living processes."""
    return f"{os.uname().nodename}:{os.getpid()}"
