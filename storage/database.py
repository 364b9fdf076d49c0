"""From a URL to an Optuna storage: the schema is made once, and what cannot be opened is said in one line."""

from __future__ import annotations

import random
import re
import time
import warnings
from pathlib import Path
from typing import Any, cast

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import text
from sqlalchemy.engine import URL, Connection, Engine
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

# What backtests have tried, by symbol: see storage/tries.py.
TRIES_DDL = """
create table if not exists backtest_tries (
    symbol text not null,
    configuration text not null,
    strategy text not null,
    hold integer not null,
    sharpe double precision not null,
    tried_at timestamptz not null default now(),
    primary key (symbol, configuration, strategy, hold)
);
"""

# Forecasts that were served and what came of them: see storage/forecasts.py.
FORECASTS_DDL = """
create table if not exists forecasts (
    digest text not null,
    role text not null check (role in ('live', 'shadow')),
    symbol text not null,
    model text not null,
    configuration text not null,
    promoted text not null,
    study text,
    trial integer,
    as_of timestamptz not null,
    bars text not null,
    horizon integer not null,
    last_close double precision not null,
    content jsonb not null,
    computed_at timestamptz not null,
    primary key (digest, role)
);
create index if not exists forecasts_as_of on forecasts (symbol, as_of);
create index if not exists forecasts_computed_at on forecasts (computed_at);
create table if not exists forecast_claims (
    digest text primary key,
    owner text not null,
    lease_until timestamptz not null
);
create table if not exists outcomes (
    digest text not null,
    role text not null,
    key text not null,
    step integer not null,
    due timestamptz not null,
    actual double precision not null,
    error double precision not null,
    signed_error double precision not null,
    no_change_error double precision not null,
    sigma double precision,
    in_band boolean,
    settled_at timestamptz not null,
    primary key (digest, role, key, step),
    foreign key (digest, role) references forecasts (digest, role) on delete cascade
);
create table if not exists forecast_requests (
    day date not null,
    symbol text not null,
    kind text not null check (kind in ('memory', 'stored', 'computed', 'joined', 'failed')),
    count bigint not null,
    primary key (day, symbol, kind)
);
create table if not exists events (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    symbol text,
    kind text not null,
    content jsonb not null
);
create index if not exists events_symbol on events (symbol, id);
"""

LATER_TABLES = ("backtest_tries", "forecasts", "forecast_claims", "outcomes", "forecast_requests", "events")
HAS_TABLES = "select bool_and(to_regclass(name) is not null) from unnest(cast(:names as text[])) as name"

COLUMNS = "select attname from pg_attribute where attrelid = to_regclass('slots') and attnum > 0 and not attisdropped"
LATER = ("seconds", "progress")  # columns that a table made earlier lacks
# By these our table is known.
OUR_COLUMNS = set(re.findall(r"^    (\w+) (?:integer|text|jsonb|timestamptz)", SLOTS_DDL, re.M)) - set(LATER)


def open_storage(
    url: str, *, wait_s: float = 600.0, create: bool = True, patient: bool = False, private: Path | None = None
) -> RetryingStorage:
    """Connect, making the schema where it is missing.

    wait_s: how long each later call waits for a server that went away.
    patient: the first connection waits as long; else it is tried once, since the URL may be wrong.
    private: the folder of the private server, if the URL is its: it may come back on another port.
    Raises DatabaseUnavailable in one line that never holds the password.
    """
    parsed = parse_url(url)
    if create:
        create_schema(url)
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            storage = RetryingStorage(parsed, wait_s=wait_s, private=private)
            check_version(storage)
            return storage
        except (StorageInternalError, SQLAlchemyError) as error:
            if not (patient and is_transient(error) and time.monotonic() < give_up_at):
                raise _unavailable(parsed, error) from None
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
            if columns and connection.execute(text(HAS_TABLES), {"names": list(LATER_TABLES)}).scalar():
                return
        while not _made_tables(engine, parsed):
            time.sleep(0.1)
    except (StorageInternalError, SQLAlchemyError) as error:
        raise _unavailable(parsed, error) from None
    finally:
        engine.dispose()


def _made_tables(engine: Engine, url: URL) -> bool:
    """Make what is missing; False while another process does.

    Optuna's own creation is not safe for two at once (measured: 7 of 8 workers crash on an empty database). The lock is
    of this transaction, which stays open while Optuna works in one of its own: a lock of the session would outlive its
    user behind a pooler such as PgBouncer, and a transaction that waits for it could have the pool's last connection.
    """
    with engine.begin() as connection:
        if not connection.execute(text("select pg_try_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK}).scalar():
            return False
        if not _columns_of_slots(connection, url):
            with_password = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
            one_connection = {"poolclass": sqlalchemy.pool.SingletonThreadPool}  # it would take a second inside a first
            optunas = RDBStorage(with_password, one_connection, skip_compatibility_check=True)
            check_version(optunas)
            optunas.engine.dispose()
            connection.execute(text(SLOTS_DDL))
        connection.execute(text(TRIES_DDL))
        connection.execute(text(FORECASTS_DDL))
    return True


def check_version(storage: RDBStorage) -> None:
    """Raises DatabaseUnavailable where the tables are of an Optuna that this one cannot work with."""
    found, wanted = storage.get_current_version(), storage.get_head_version()
    if found == wanted:
        return
    url = without_password(storage.engine.url)
    mended = "install a newer Optuna here"
    if found in storage.get_all_versions():
        mended = f"upgrade them with: optuna storage upgrade --storage {url}"
    raise DatabaseUnavailable(
        f"{url}: its tables are of another version of Optuna ({found}, not {wanted} as of Optuna "
        f"{optuna.__version__}); {mended}; or name another database with --storage"
    )


WRITABLE = """
select current_setting('transaction_read_only') = 'off' as writable, current_user as role,
       (select bool_and(has_table_privilege(name, rights))
          from unnest(array['studies', 'trials', 'slots'] || cast(:later as text[])) as name,
               unnest(array['select', 'insert', 'update', 'delete']) as rights) as allowed
"""


def check_writable(storage: RetryingStorage) -> None:
    """Raises DatabaseUnavailable where the role, or the server as a whole, only reads."""
    asked = {"later": list(LATER_TABLES)}
    found = storage.transaction(lambda connection: connection.execute(text(WRITABLE), asked).one())
    if not found.writable:
        raise DatabaseUnavailable(
            f"{without_password(storage.engine.url)}: is read-only for the role {found.role}; "
            "name the primary server and a role that may write with --storage"
        )
    if not found.allowed:
        raise DatabaseUnavailable(
            f"{without_password(storage.engine.url)}: the role {found.role} may not write; let it, as the owner: "
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {found.role}; "
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {found.role}"
        )


def _columns_of_slots(connection: Connection, url: URL) -> set[str]:
    """The columns of our table, none where there is no table. Raises DatabaseUnavailable where it is not ours."""
    columns = set(connection.execute(text(COLUMNS)).scalars())
    if columns and not columns >= OUR_COLUMNS:
        raise DatabaseUnavailable(
            f"{without_password(url)}: has a table 'slots' that is not of forecast-studies; "
            "create a database for the studies and name that with --storage"
        )
    return columns


CONNECTIONS = """
select current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) as allowed,
       (select sum(numbackends) from pg_stat_database) as used
where pg_backend_pid() = :pid
"""  # no row behind a pooler, which tells its clients numbers of its own
MORE_CONNECTIONS = "start fewer workers, raise the server's max_connections, or put PgBouncer before it"


def lack_of_connections(storage: RetryingStorage, workers: int) -> str | None:
    """A line that says so where the server cannot take that many workers more. Raises DatabaseUnavailable."""

    def read(connection: Connection) -> Any:
        pid = cast(Any, connection.connection.dbapi_connection).info.backend_pid
        return connection.execute(text(CONNECTIONS), {"pid": pid}).first()

    found = storage.transaction(read)
    if found is None or found.used + workers <= found.allowed:
        return None
    return (
        f"the database takes {found.allowed} connections, of which {found.used} are in use: too few for {workers} "
        f"workers, which hold one each; {MORE_CONNECTIONS}"
    )


def _unavailable(url: URL, error: BaseException) -> DatabaseUnavailable:
    hint = "start the server, or name another with --storage"
    if "password" in first_line(error):
        hint = "set PGPASSWORD, or add a line to ~/.pgpass"
    elif re.search(r"too many (clients|connections)|remaining connection slots", first_line(error)):
        hint = MORE_CONNECTIONS
    elif "permission denied for schema" in first_line(error):  # as for any role but the owner's since Postgres 15
        hint = f"let the role make tables, as their owner: GRANT USAGE, CREATE ON SCHEMA public TO {url.username}"
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
