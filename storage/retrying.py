"""An Optuna storage that outlasts an absent server: which errors are worth a repeat, and how each method repeats.

The policy: once a storage is open, every call waits up to `wait_s` for whatever an operator or time mends, and then
raises DatabaseUnavailable. That is each state in TRANSIENT_STATES, and every connection that fails or breaks, name
resolution included, but for PERMANENT_CONNECT_ERRORS. Any other error is raised at once. Opening a storage waits for
nothing, since its URL may be wrong, unless the opener is patient (see database.open_storage).

Knows Optuna's storage interface and Postgres' errors. Knows nothing of studies' content, forecasts or commands.
"""

from __future__ import annotations

import copy
import json
import random
import re
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from storage import DatabaseUnavailable, trials
from storage.data_dir import remembered
from storage.trials import Changes
from storage.urls import without_password

T = TypeVar("T")

IDLE_TRANSACTION_S = 10  # then the server rolls it back; ours pause for milliseconds
# Of each transaction, never of a session: behind a pooler such as PgBouncer that is everybody's. Trials are numbered
# under locks, whatever isolation the database has by default, and a process frozen between two statements must not hold
# its locks on a study's rows for ever.
TRANSACTION_SETTINGS = (
    "set transaction isolation level read committed; "
    f"set local idle_in_transaction_session_timeout = '{IDLE_TRANSACTION_S}s'; "
)
NOT_DURABLE = "set local synchronous_commit = off; "
DEFER_S = 1.0  # a slow trial's reports are in the database about as soon as they are made
CLAIM_ATTR = trials.CLAIM_ATTR

# SQLSTATEs, or the classes that they begin with, that are waited for, each with its reason.
TRANSIENT_STATES = {
    "08": "the connection broke or was refused",
    "25006": "read-only: a failover is under way, and this connection is to the server that was demoted",
    "25P02": "a timeout cut the BEGIN: the server's transaction is aborted, while psycopg2 knows of none",
    "25P03": "the transaction paused for longer than IDLE_TRANSACTION_S: its process was frozen",
    "40001": "a serialization failure: one of two transactions has to repeat",
    "40P01": "a deadlock: one of two transactions has to repeat",
    "53": "out of disk space, memory or connections",
    "55P03": "a lock was held for longer than the server's lock_timeout",
    "57014": "the server's statement_timeout, or somebody cancelled the statement",
    "57P01": "the server shuts down",
    "57P02": "another process of the server crashed",
    "57P03": "the server is starting",
    "57P05": "the server's idle_session_timeout",
}
READ_ONLY, ABORTED, DENIED = "25006", "25P02", "42501"
# What libpq says of a connection that no waiting mends; it gives no SQLSTATE.
PERMANENT_CONNECT_ERRORS = re.compile(
    r"authentication failed|no password supplied|does not exist|no pg_hba.conf entry|"
    r"invalid port|certificate|permission denied",
)


@dataclass
class _Deferred:
    """What waits to be written of a running trial of ours, and what else is known of it."""

    known: FrozenTrial  # as it was when it began to be deferred
    changes: Changes = field(default_factory=Changes)
    since: float = field(default_factory=time.monotonic)  # the last writing

    @property
    def trial(self) -> FrozenTrial:
        found = copy.deepcopy(self.known)
        self.changes.apply(found)
        return found


class ClaimLost(Exception):
    """A trial was to begin for a claim that is no longer on its slot."""


class RetryingStorage(RDBStorage):
    """An Optuna RDBStorage whose every method outlasts an absent server.

    Each method of RDBStorage is one transaction, so it is safe to repeat it once the connection broke; where the
    broken attempt may have been committed after all, the method says how that is recognised.
    """

    def __init__(self, url: URL, *, wait_s: float, private: Path | None = None) -> None:
        """`private`: the folder of the private server, if the URL is its: each connection is to the port it has then.

        Raises StorageInternalError and SQLAlchemyError where the server does not answer.
        """
        self.wait_s = wait_s
        self._deferred: dict[int, _Deferred] = {}  # by trial
        self._created: FrozenTrial | None = None  # the last one that this process made for a claim
        self._clock = threading.local()  # of each thread
        if private and (found := remembered(private)):
            url = url.set(port=found.port)
        super().__init__(
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
            # One connection a process, since a server has 100 to 200. A worker's two threads seldom need both at once.
            engine_kwargs={
                "pool_size": 1,
                "max_overflow": 3,
                "connect_args": {"connect_timeout": 10, "application_name": "forecast-studies"},
            },
            skip_table_creation=True,
            # It holds one connection while it waits for a second: behind a pooler, openers could wait for each other.
            skip_compatibility_check=True,  # see database.check_version
        )
        event.listen(self.engine, "begin", _owe_settings)
        event.listen(self.engine, "before_cursor_execute", _with_settings, retval=True)
        if private:

            @event.listens_for(self.engine, "do_connect")
            def find_port(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
                if found := remembered(private):
                    options["port"] = found.port

        # RDBStorage has connected already to check the schema's version.
        self.engine.dispose()

    def transaction(self, run: Callable[[Connection], T], *, wait_s: float | None = None, durable: bool = True) -> T:
        """Run statements in one transaction, repeated while the server is away: `run` must be repeatable.

        wait_s: how long to repeat, by default as long as every call. Raises DatabaseUnavailable.
        durable: else nobody waits for the disk, and a crash of the server in the next half second may undo it.
        """
        return self._retry(lambda attempt: self._transaction(run, durable=durable), wait_s=wait_s)

    def _transaction(self, run: Callable[[Connection], T], *, durable: bool = True) -> T:
        with self.engine.begin() as connection:
            if not durable:
                connection.info["owed"] += NOT_DURABLE
            return run(connection)

    @property
    def seconds(self) -> float:
        """What this thread has spent in calls of the database, since it began."""
        return getattr(self._clock, "seconds", 0.0)

    def _retry(self, call: Callable[[int], T], *, wait_s: float | None = None) -> T:
        """Call until it gets through; `call` is told how many attempts broke before. Raises DatabaseUnavailable."""
        if getattr(self._clock, "inside", False):
            return self._call_until_through(call, self.wait_s if wait_s is None else wait_s)
        self._clock.inside, began = True, time.perf_counter()
        try:
            return self._call_until_through(call, self.wait_s if wait_s is None else wait_s)
        finally:
            self._clock.inside = False
            self._clock.seconds = self.seconds + time.perf_counter() - began

    def _call_until_through(self, call: Callable[[int], T], wait_s: float) -> T:
        give_up_at = time.monotonic() + wait_s
        attempt, pooled = 0, cast(QueuePool, self.engine.pool).checkedin() > 0
        while True:
            try:
                return call(attempt)
            except (StorageInternalError, SQLAlchemyError) as error:
                if sqlstate_of(error) == DENIED:
                    raise DatabaseUnavailable(f"{without_password(self.engine.url)}: {first_line(error)}") from None
                if not is_transient(error):
                    raise
                self.scoped_session.remove()
                if sqlstate_of(error) in (READ_ONLY, ABORTED):
                    self.engine.dispose()  # the next connection is to the server that was promoted, and has no past
                if attempt or not pooled:  # else it may be from before a restart, and a new one is tried at once
                    if time.monotonic() > give_up_at:
                        raise DatabaseUnavailable(
                            f"{without_password(self.engine.url)}: no answer for {wait_s:.0f} s: {first_line(error)}"
                        ) from None
                    # Jitter: eight workers must not come back in one millisecond. Less than the shortest lease, 2 s.
                    time.sleep(min(1.0, 0.1 * 2**attempt) * (0.5 + random.random()))
                attempt += 1

    def _trial_transaction(self, run: Callable[[Connection], T], *, durable: bool = True) -> T:
        """One attempt, its errors as Optuna's own methods raise them."""
        try:
            return self._transaction(run, durable=durable)
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
            made = self._trial_transaction(
                lambda c: trials.create(c, study_id, template_trial, claim=claim, again=bool(attempt))
            )
            if made is None and claim is not None:
                self.get_study_name_from_id(study_id)  # raises KeyError where there is no study
                raise ClaimLost(claim)
            return _found(made)

        self._created = created = self._retry(create)
        return created

    def _trial_of_claim(self, study_id: int, claim: str) -> int | None:
        with self.engine.connect() as connection:
            return connection.execute(
                trials.OF_CLAIM, {"study_id": study_id, "key": CLAIM_ATTR, "claim": json.dumps(claim)}
            ).scalar()

    def defer_writes(self, trial_id: int) -> None:
        """Gather what is set on a running trial of ours until `write_deferred`, the trial's end, or DEFER_S passed.

        This storage's own reads have it at once, and ask the server no more; what a killed process had gathered is
        gone, as if it was not set.
        """
        created = self._created
        known = trials.as_read(created) if created and created._trial_id == trial_id else self.get_trial(trial_id)
        self._deferred[trial_id] = _Deferred(known=known)

    def write_deferred(self, trial_id: int) -> None:
        """Write what was gathered and go on gathering. Raises UpdateFinishedTrialError.

        The trial's end writes it again: so nobody waits for the disk, and a server that crashes loses nothing.
        """
        own = self._deferred[trial_id]
        self._write(trial_id, own.changes, durable=False)
        own.since = time.monotonic()

    def _set(self, trial_id: int, new: Changes) -> None:
        if trial_id not in self._deferred:
            self._write(trial_id, new)
            return
        own = self._deferred[trial_id]
        own.changes.add(new)
        if time.monotonic() - own.since > DEFER_S:
            self.write_deferred(trial_id)

    def _write(self, trial_id: int, changes: Changes, *, durable: bool = True) -> None:
        was = self._retry(
            lambda attempt: self._trial_transaction(lambda c: trials.write(c, trial_id, changes), durable=durable)
        )
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
            if own := self._deferred.pop(trial_id, None):
                self._write(trial_id, own.changes)
            return self._retry(
                lambda attempt: super(RetryingStorage, self).set_trial_state_values(trial_id, state, values)
            )
        self.end_trial(trial_id, state, values or ())
        return True

    def end_trial(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float],
        beside: Callable[[Connection], object] = lambda connection: None,
    ) -> None:
        """End a trial with all that was set on it, and in the same transaction do what else ends with it.

        Raises UpdateFinishedTrialError where the trial had ended; nothing is done then.
        """
        own = self._deferred.get(trial_id)
        changes, told = own.changes if own else Changes(), [float(value) for value in values]

        def write(connection: Connection) -> TrialState | None:
            was = trials.write(connection, trial_id, changes, state, told)
            if was is not None and not was.is_finished():
                beside(connection)
            return was

        def end(attempt: int) -> None:
            was = _found(self._trial_transaction(write))
            # After a broken attempt our own commit may have gone through: the state tells.
            if not (attempt and was == state):
                self.check_trial_is_updatable(trial_id, was)

        try:
            self._retry(end)
        finally:
            self._deferred.pop(trial_id, None)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id in self._deferred:
            return self._deferred[trial_id].trial
        return _found(self._retry(lambda attempt: self._trial_transaction(lambda c: trials.read_one(c, trial_id))))

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
        for trial in read:
            if trial._trial_id in self._deferred and not trial.state.is_finished():
                self._deferred[trial._trial_id].changes.apply(trial)
        return read

    # As BaseStorage has them, from get_trial: one statement, and what is deferred is in it.
    get_trial_param = BaseStorage.get_trial_param
    get_trial_user_attrs = BaseStorage.get_trial_user_attrs
    get_trial_system_attrs = BaseStorage.get_trial_system_attrs


def _owe_settings(connection: Connection) -> None:
    connection.info["owed"] = TRANSACTION_SETTINGS


def _with_settings(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """Send a transaction's settings with its first statement, which costs no turn of its own."""
    return connection.info.pop("owed", "") + statement, parameters


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


# Reads, and writes that give the same row when repeated. create_new_study is not here: study_rows.create_study
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


def is_transient(error: BaseException) -> bool:
    """Whether waiting and repeating the transaction can help; the module's docstring states the policy."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PendingRollbackError):
            return True
        if isinstance(seen, DBAPIError):
            if (sqlstate := sqlstate_of(seen)) is not None:
                return sqlstate.startswith(tuple(TRANSIENT_STATES))
            if seen.connection_invalidated:
                return True
            kind = type(seen.orig).__name__
            return kind in ("OperationalError", "InterfaceError") and not PERMANENT_CONNECT_ERRORS.search(
                str(seen.orig)
            )
        seen = seen.__cause__ or seen.__context__
    return False


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE that the server gave for this error or for its cause, None where no server answered."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, DBAPIError):
        seen = seen.__cause__ or seen.__context__
    return None if seen is None else getattr(seen.orig, "pgcode", None)


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


def one_line(error: BaseException) -> str:
    """An unexpected error for a log: its kind, and what it says in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
