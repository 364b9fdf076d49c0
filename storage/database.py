"""From a URL to an Optuna storage that survives a restart of the server; the schema is made once.

Knows Optuna's storage interface and Postgres' errors. Knows nothing of studies' content, forecasts or commands.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session

from storage import DatabaseUnavailable, trials
from storage.trials import Changes

T = TypeVar("T")

SCHEMA_LOCK = 0x5EED0001  # advisory lock key: any constant that every worker shares
METRIC_NAMES = "study:metric_names"  # the system attribute behind Study.set_metric_names
IDLE_TRANSACTION_S = 10  # then the server rolls it back; ours pause for milliseconds
DEFER_S = 1.0  # a slow trial's reports are in the database about as soon as they are made
CLAIM_ATTR = "claim"  # trial system attribute: which claim of a slot made this trial

# Only what a restarting or crashed server, a deadlock, or too long a pause in a transaction answers.
# A wrong password or a missing table is not retried.
TRANSIENT_SQLSTATES = ("08", "57P01", "57P02", "57P03", "53300", "40P01", "40001", "25P03")
PERMANENT_CONNECT_ERRORS = re.compile(
    r"authentication failed|no password supplied|does not exist|no pg_hba.conf entry|"
    r"could not translate host name|invalid port|certificate|permission denied",
)

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
    primary key (study_id, stage, number)
);
create index if not exists slots_open on slots (study_id, stage, number) where state in ('free', 'busy');
create unique index if not exists slots_claim on slots (claim) where claim is not null;
"""

HAS_SECONDS = "select 1 from pg_attribute where attrelid = 'slots'::regclass and attname = 'seconds'"


class ClaimLost(Exception):
    """A trial was to begin for a claim that is no longer on its slot."""


class RetryingStorage(RDBStorage):
    """An Optuna RDBStorage whose every method outlasts an absent server.

    Each method of RDBStorage is one transaction, so it is safe to repeat it once the connection broke; where the
    broken attempt may have been committed after all, the method says how that is recognised.
    """

    def __init__(self, url: URL, *, wait_s: float) -> None:
        self.wait_s = wait_s
        self._deferred: dict[int, tuple[Changes, float]] = {}  # by trial: what waits, and since when
        self._clock = threading.local()  # of each thread
        super().__init__(
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
            # Small pools: every worker holds one, and a server has 100 to 200 connections.
            engine_kwargs={
                "pool_pre_ping": True,
                "pool_size": 2,
                "max_overflow": 2,
                "connect_args": {"connect_timeout": 10, "application_name": "forecast-studies"},
            },
            skip_table_creation=True,
        )
        event.listen(self.engine, "connect", _limit_idle_transactions)
        # RDBStorage has connected already to check the schema's version.
        self.engine.dispose()

    def transaction(self, run: Callable[[Connection], T]) -> T:
        """Run statements in one transaction, repeated while the server is away: `run` must be repeatable."""
        return self._retry(lambda attempt: self._transaction(run))

    def _transaction(self, run: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            return run(connection)

    @property
    def seconds(self) -> float:
        """What this thread has spent in calls of the database, since it began."""
        return getattr(self._clock, "seconds", 0.0)

    def _retry(self, call: Callable[[int], T]) -> T:
        """Call until it gets through; `call` is told how many attempts broke before. Raises DatabaseUnavailable."""
        if getattr(self._clock, "inside", False):
            return self._call_until_through(call)
        self._clock.inside, began = True, time.perf_counter()
        try:
            return self._call_until_through(call)
        finally:
            self._clock.inside = False
            self._clock.seconds = self.seconds + time.perf_counter() - began

    def _call_until_through(self, call: Callable[[int], T]) -> T:
        give_up_at = time.monotonic() + self.wait_s
        attempt = 0
        while True:
            try:
                return call(attempt)
            except (StorageInternalError, SQLAlchemyError) as error:
                if not is_transient(error):
                    raise
                self.scoped_session.remove()
                if time.monotonic() > give_up_at:
                    raise DatabaseUnavailable(
                        f"{without_password(self.engine.url)}: no answer for {self.wait_s:.0f} s: {first_line(error)}"
                    ) from None
                # Jitter: eight workers must not come back in the same millisecond.
                time.sleep(min(2.0, 0.1 * 2**attempt) * (0.5 + random.random()))
                attempt += 1

    def _trial_transaction(self, run: Callable[[Connection], T]) -> T:
        """One attempt, its errors as Optuna's own methods raise them."""
        try:
            return self._transaction(run)
        except SQLAlchemyError as error:
            raise StorageInternalError(first_line(error)) from error

    # Below, what a trial costs: Optuna's methods with one statement in the place of many.

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        claim = template_trial.system_attrs.get(CLAIM_ATTR) if template_trial else None

        def create(attempt: int) -> FrozenTrial:
            if attempt and claim is not None:
                trial_id = self._trial_of_claim(study_id, claim)
                if trial_id is not None:  # the broken attempt had been committed
                    return _found(self._trial_transaction(lambda c: trials.read_one(c, trial_id)))
            made = self._trial_transaction(lambda c: trials.create(c, study_id, template_trial, claim=claim))
            if made is None and claim is not None:
                self.get_study_name_from_id(study_id)  # raises KeyError where there is no study
                raise ClaimLost(claim)
            return _found(made)

        return self._retry(create)

    def _trial_of_claim(self, study_id: int, claim: str) -> int | None:
        with self.engine.connect() as connection:
            return connection.execute(
                text(
                    "select t.trial_id from trials t join trial_system_attributes a using (trial_id) "
                    "where t.study_id = :study_id and a.key = :key and a.value_json = :claim"
                ),
                {"study_id": study_id, "key": CLAIM_ATTR, "claim": json.dumps(claim)},
            ).scalar()

    def defer_writes(self, trial_id: int) -> None:
        """Gather what is set on a running trial of ours until `write_deferred`, the trial's end, or DEFER_S passed.

        This storage's own reads have it at once; what a killed process had gathered is gone, as if it was not set.
        """
        self._deferred[trial_id] = (Changes(), time.monotonic())

    def write_deferred(self, trial_id: int) -> None:
        """Write what was gathered and go on gathering. Raises UpdateFinishedTrialError."""
        changes, _ = self._deferred[trial_id]
        self._write(trial_id, changes)
        self.defer_writes(trial_id)

    def _set(self, trial_id: int, new: Changes) -> None:
        if trial_id not in self._deferred:
            self._write(trial_id, new)
            return
        changes, since = self._deferred[trial_id]
        changes.add(new)
        if time.monotonic() - since > DEFER_S:
            self.write_deferred(trial_id)

    def _write(self, trial_id: int, changes: Changes) -> None:
        was = self._retry(lambda attempt: self._trial_transaction(lambda c: trials.write(c, trial_id, changes)))
        self.check_trial_is_updatable(trial_id, _found(was))

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if previous_distribution is None:
            previous_distribution = self._retry(
                lambda attempt: self._trial_transaction(lambda c: trials.any_distribution(c, trial_id, param_name))
            )
        if previous_distribution is not None:
            try:
                check_distribution_compatibility(previous_distribution, distribution)
            except ValueError:
                self.check_trial_is_updatable(trial_id, self.get_trial(trial_id).state)  # that comes first
                raise
        self._set(trial_id, Changes(params={param_name: (float(param_value_internal), distribution)}))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._set(trial_id, Changes(reports={int(step): float(intermediate_value)}))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set(trial_id, Changes(user_attrs={key: json.dumps(value)}))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set(trial_id, Changes(system_attrs={key: json.dumps(value)}))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if not state.is_finished():  # a waiting trial is taken up
            return self._retry(
                lambda attempt: super(RetryingStorage, self).set_trial_state_values(trial_id, state, values)
            )
        changes, _ = self._deferred.get(trial_id, (Changes(), 0.0))
        told = [float(value) for value in values or ()]

        def end(attempt: int) -> bool:
            was = _found(self._trial_transaction(lambda c: trials.write(c, trial_id, changes, state, told)))
            # After a broken attempt our own commit may have gone through: the state tells.
            if not (attempt and was == state):
                self.check_trial_is_updatable(trial_id, was)
            return True

        try:
            return self._retry(end)
        finally:
            self._deferred.pop(trial_id, None)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        read = self._retry(lambda attempt: self._trial_transaction(lambda c: trials.read_one(c, trial_id)))
        return self._with_deferred(_found(read))

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        ids = [trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than]
        wanted = None if states is None else [state for state in TrialState if state in states]
        read = self._retry(
            lambda attempt: self._trial_transaction(
                lambda c: trials.read_some(c, study_id, after=trial_id_greater_than, ids=ids, states=wanted)
            )
        )
        if not read:
            self.get_study_name_from_id(study_id)  # raises KeyError where there is no study
        return [self._with_deferred(trial) for trial in read]

    def _with_deferred(self, trial: FrozenTrial) -> FrozenTrial:
        if trial._trial_id in self._deferred and not trial.state.is_finished():
            self._deferred[trial._trial_id][0].apply(trial)
        return trial

    # As BaseStorage has them, from get_trial: one statement, and what is deferred is in it.
    get_trial_param = BaseStorage.get_trial_param
    get_trial_user_attrs = BaseStorage.get_trial_user_attrs
    get_trial_system_attrs = BaseStorage.get_trial_system_attrs


def _limit_idle_transactions(connection: Any, _: Any) -> None:
    """A process frozen between two statements must not hold its locks on a study's rows, or all others wait."""
    with connection.cursor() as cursor:
        cursor.execute(f"set idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_S}s'")
    connection.commit()


def _found(found: T | None) -> T:
    if found is None:
        raise KeyError(models.NOT_FOUND_MSG)
    return found


def _retried(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    def call(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        return self._retry(lambda attempt: method(self, *args, **kwargs))

    call.__name__ = name
    call.__doc__ = method.__doc__
    return call


# Reads, and writes that give the same row when repeated. create_new_study is not here: `create_study` in studies
# runs it under a lock and looks the name up first.
for _name in (
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id",
):
    setattr(RetryingStorage, _name, _retried(_name))


def parse_url(url: str) -> URL:
    """A checked Postgres URL for SQLAlchemy. Raises DatabaseUnavailable, without the password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DatabaseUnavailable(
            "the storage is not a URL; write postgresql://USER@HOST:PORT/DATABASE (--storage, OPTUNA_STORAGE)"
        ) from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseUnavailable(
            f"{parsed.get_backend_name()}: studies live in Postgres; write postgresql://USER@HOST:PORT/DATABASE"
        )
    return parsed.set(drivername="postgresql+psycopg2")


def without_password(url: URL) -> str:
    """The URL as it may be shown, in the form that psql reads too: no driver, no password."""
    query = {key: value for key, value in url.query.items() if key != "password"}
    return URL.create("postgresql", url.username, None, url.host, url.port, url.database, query).render_as_string()


def hand_over(url: URL) -> tuple[str, dict[str, str]]:
    """The URL without its password and the environment that carries it, for a child process."""
    query_password = url.query.get("password")
    password = url.password or (query_password if isinstance(query_password, str) else None)
    return without_password(url), {} if password is None else {"PGPASSWORD": str(password)}


def password_in_use(storage: RetryingStorage) -> dict[str, str]:
    """The environment that carries the password of the storage's connections, wherever libpq had it from."""

    def read(connection: Connection) -> str:
        return cast(Any, connection.connection.dbapi_connection).info.password

    password = storage.transaction(read)
    return {"PGPASSWORD": password} if password else {}


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
    """Make Optuna's tables and ours, once, however many processes ask at the same time.

    Raises DatabaseUnavailable.
    """
    parsed = parse_url(url)
    engine = sqlalchemy.create_engine(parsed, connect_args={"connect_timeout": 10}, poolclass=sqlalchemy.pool.NullPool)
    try:
        # Optuna's own creation is not safe for two at once (measured: 7 of 8 workers crash on an empty database).
        with engine.connect() as lock:
            lock.execute(text("select pg_advisory_lock(:key)"), {"key": SCHEMA_LOCK})
            if lock.execute(text("select to_regclass('slots')")).scalar() is None:
                RDBStorage(
                    parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
                ).engine.dispose()
                with engine.begin() as connection:
                    connection.execute(text(SLOTS_DDL))
            elif lock.execute(text(HAS_SECONDS)).first() is None:  # made before the column was
                with engine.begin() as connection:
                    connection.execute(text("alter table slots add column if not exists seconds jsonb"))
    except (StorageInternalError, SQLAlchemyError) as error:
        raise _unavailable(parsed, error) from None
    finally:
        engine.dispose()


def is_transient(error: BaseException) -> bool:
    """Whether repeating the transaction can help: the server went away, is starting, or broke a deadlock."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PendingRollbackError):
            return True
        if isinstance(seen, DBAPIError):
            sqlstate = getattr(seen.orig, "pgcode", None)
            if sqlstate is not None:
                return sqlstate.startswith(TRANSIENT_SQLSTATES)
            if seen.connection_invalidated:
                return True
            kind = type(seen.orig).__name__
            return kind in ("OperationalError", "InterfaceError") and not PERMANENT_CONNECT_ERRORS.search(
                str(seen.orig)
            )
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException) -> str:
    """What the server or driver said, in one line, without SQL and parameters."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DBAPIError) and seen.orig is not None:
            seen = seen.orig
            break
        if seen.__cause__ is None:
            break
        seen = seen.__cause__
    lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _unavailable(url: URL, error: BaseException) -> DatabaseUnavailable:
    hint = "start the server, or name another with --storage"
    if "password" in first_line(error):
        hint = "set PGPASSWORD, or add a line to ~/.pgpass"
    return DatabaseUnavailable(f"{without_password(url)}: {first_line(error)}; {hint}")


BEST_MAE = """
select t.study_id, min(v.value) as mae from trials t join trial_values v using (trial_id)
where t.state = 'COMPLETE' and (cast(:study_ids as integer[]) is null or t.study_id = any(:study_ids))
group by t.study_id
"""

BEST_TRIALS = """
select t.trial_id, t.number, v.value from trials t join trial_values v using (trial_id)
where t.study_id = :study_id and t.state = 'COMPLETE' order by v.value, t.number limit :count
"""

EFFORTS = """
select t.study_id,
       sum(extract(epoch from t.datetime_complete - t.datetime_start))::float as seconds,
       min(extract(epoch from t.datetime_start))::float as first,
       max(extract(epoch from t.datetime_complete))::float as last,
       array_agg(distinct a.value_json) as workers
from trials t left join trial_user_attributes a on a.trial_id = t.trial_id and a.key = 'worker'
where t.datetime_complete is not null and t.datetime_start is not null group by t.study_id
"""

STATES = "select state::text, count(*) from trials where study_id = :study_id group by state order by state"


def best_values(storage: RetryingStorage, study_ids: Iterable[int] | None = None) -> dict[int, float]:
    """The smallest value of every study, or of these, that has a complete trial, by study id, in one query."""
    values = {"study_ids": None if study_ids is None else list(study_ids)}
    return {row.study_id: row.mae for row in storage.transaction(lambda c: c.execute(text(BEST_MAE), values).all())}


def best_trials(storage: RetryingStorage, study_id: int, count: int) -> list[FrozenTrial]:
    """The complete trials with the smallest values, best first; of equal ones the earlier."""
    values = {"study_id": study_id, "count": count}
    rows = storage.transaction(lambda c: c.execute(text(BEST_TRIALS), values).all())
    return [storage.get_trial(row.trial_id) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a study's ended trials took: worker seconds, begin and end as UNIX times, and who worked."""

    seconds: float
    first: float
    last: float
    workers: tuple[str, ...]


def efforts(storage: RetryingStorage) -> dict[int, Effort]:
    """The effort of every study that has an ended trial, by study id, in one query."""
    rows = storage.transaction(lambda c: c.execute(text(EFFORTS)).all())
    return {
        row.study_id: Effort(
            seconds=row.seconds, first=row.first, last=row.last, workers=tuple(json.loads(w) for w in row.workers if w)
        )
        for row in rows
    }


def studies_with(storage: RetryingStorage, key: str) -> list[tuple[int, str, Any]]:
    """Id, name and value of every study that has a user attribute, in one query.

    Not get_all_studies, which reads every attribute: with notes and plots those are 26 kB a study.
    """
    statement = text(
        "select s.study_id, s.study_name, a.value_json from studies s join study_user_attributes a using (study_id) "
        "where a.key = :key"
    )
    rows = storage.transaction(lambda c: c.execute(statement, {"key": key}).all())
    return [(row.study_id, row.study_name, json.loads(row.value_json)) for row in rows]


def trial_states(storage: RetryingStorage, study_id: int) -> dict[str, int]:
    """How many trials are in each state, by its name in lower case."""
    rows = storage.transaction(lambda c: c.execute(text(STATES), {"study_id": study_id}).all())
    return {state.lower(): count for state, count in rows}


def quiet_optuna() -> None:
    """Optuna logs a line a trial and warns of its own experimental names: our log line replaces them."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)


def worker_name() -> str:
    """HOST:PID, unique among living processes."""
    return f"{os.uname().nodename}:{os.getpid()}"


def create_study(
    storage: RetryingStorage,
    name: str,
    user_attrs: dict[str, Any],
    metric: str,
    fill: Callable[[Connection, int], None],
) -> int:
    """Make a minimising study with its attributes and, through `fill`, its slots in one transaction: whole or not.

    Returns the id of the study that is there already where another process was first.
    """

    def create(connection: Connection) -> int:
        connection.execute(text("select pg_advisory_xact_lock(:key, hashtext(:name))"), {"key": 1, "name": name})
        found = connection.execute(text("select study_id from studies where study_name = :name"), {"name": name})
        study_id = found.scalar()
        if study_id is not None:
            return study_id
        with Session(connection) as session:
            study = models.StudyModel(
                study_name=name,
                directions=[models.StudyDirectionModel(objective=0, direction=StudyDirection.MINIMIZE)],
            )
            session.add(study)
            session.flush()
            study_id = int(cast(Any, study.study_id))
            attrs = [models.StudyUserAttributeModel(key=k, value_json=json.dumps(v)) for k, v in user_attrs.items()]
            attrs += [models.StudySystemAttributeModel(key=METRIC_NAMES, value_json=json.dumps([metric]))]
            for attr in attrs:
                attr.study_id = study_id
                session.add(attr)
            session.flush()
            fill(connection, study_id)
            session.commit()
        return study_id

    return storage.transaction(create)


def rename_study(storage: RetryingStorage, name: str, new_name: str) -> bool:
    """False where there is no study of that name."""
    statement = text("update studies set study_name = :new_name where study_name = :name")
    return storage.transaction(lambda c: c.execute(statement, {"name": name, "new_name": new_name}).rowcount == 1)
