"""What goes wrong with a database during a run, and what is done about it, on a real Postgres."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
from conftest import execute
from psycopg2.extensions import STATUS_READY, TRANSACTION_STATUS_INERROR
from sqlalchemy import event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from test_slots import make_study, must_claim, start_trial

from launch import places
from launch import worker as worker_process
from launch.supervisor import DatabaseReporter
from launch.views import notes
from launch.worker import EXIT_INTERRUPTED, LeaseKeeper, RunPlan, Worker
from storage import DatabaseUnavailable, database, embedded, slots
from storage.progress import free_counts
from storage.retrying import RetryingStorage
from storage.slots import Slot
from studies import config as configuration


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
    [
        "25006",
        "25P02",
        "25P03",
        "40001",
        "40P01",
        "53100",
        "53200",
        "53300",
        "53400",
        "55P03",
        "57014",
        "57P03",
        "57P05",
    ],
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


def test_a_transaction_that_was_aborted_behind_the_drivers_back_is_begun_anew(storage: RetryingStorage) -> None:
    # What a statement_timeout that ends a BEGIN leaves behind.
    connection = storage.engine.raw_connection()
    driver: Any = connection.dbapi_connection
    driver.autocommit = True
    driver.cursor().execute("begin")
    with pytest.raises(psycopg2.errors.DivisionByZero):
        driver.cursor().execute("select 1 / 0")
    driver.autocommit = False
    assert driver.status == STATUS_READY
    assert driver.get_transaction_status() == TRANSACTION_STATUS_INERROR
    connection.close()
    assert storage.transaction(lambda c: c.execute(text("select 7")).scalar()) == 7


@pytest.mark.parametrize("state", ["42P01", "22012", "23505"])
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


# --- threads that go on


def logged(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_a_lease_is_renewed_after_a_statement_timeout(storage: RetryingStorage, database_url: str) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=1.5)
    alter(database_url, "set statement_timeout = '100ms'")
    keeper = LeaseKeeper(storage, [study_id], 1.5)
    keeper.hold(slot)
    keeper.start()
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as blocking:
        blocking.cursor().execute("lock table slots")
        time.sleep(1.2)
        blocking.rollback()
    time.sleep(2.5)  # longer than a lease
    assert keeper.is_alive()
    remaining = storage.transaction(
        lambda c: c.execute(text("select extract(epoch from lease_until - now()) from slots where state = 'busy'"))
    ).scalar_one()
    assert remaining > 0
    keeper.end()
    keeper.join()
    assert slots.finish(storage, slot)


def test_a_lease_is_renewed_after_an_unexpected_error(
    storage: RetryingStorage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=60)
    renew, calls, again = slots.renew, [], threading.Event()

    def broken_once(*given: Any, **options: Any) -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("two\nlines")
        again.set()
        return renew(*given, **options)

    monkeypatch.setattr(slots, "renew", broken_once)
    keeper = LeaseKeeper(storage, [study_id], 0.3)
    keeper.hold(slot)
    keeper.start()
    assert again.wait(5)
    keeper.end()
    keeper.join()
    assert logged(caplog, "lease keeper") == ["the lease keeper goes on after an error: ZeroDivisionError: two"]
    assert "in broken_once" in caplog.text  # its traceback


def test_others_slots_that_cannot_be_freed_do_not_keep_a_lease_from_its_renewal(
    storage: RetryingStorage, database_url: str
) -> None:
    study_id = make_study(storage, budget=2)
    others, ours = must_claim(storage, study_id, "a:1"), must_claim(storage, study_id, "a:2", lease_s=1.5)
    trial_id = start_trial(storage, others)
    slots.expire(storage, "a:1")
    alter(database_url, "set lock_timeout = '50ms'")
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as blocking:
        blocking.cursor().execute("select 1 from trials where trial_id = %s for update", [trial_id])
        keeper = LeaseKeeper(storage, [study_id], 1.5)
        keeper.hold(ours)
        keeper.start()
        time.sleep(3.5)  # longer than two leases
        assert keeper.is_alive()
        blocking.rollback()
    keeper.end()
    keeper.join()
    assert slots.reap(storage, [study_id], lease_s=0.0) <= 1
    assert slots.finish(storage, ours)


def test_the_reporter_goes_on_after_errors_and_says_each_once(
    storage: RetryingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "supervisor.log"
    study_id = make_study(storage, budget=1)
    must_claim(storage, study_id, "a:1")
    said: list[str] = []
    reports: list[int] = []

    def report() -> None:
        reports.append(1)
        if len(reports) < 4:
            storage.transaction(lambda c: c.execute(text("select 1 / 0")))

    reporter = DatabaseReporter(storage, [study_id], lease_s=60, log=log, say=said.append, report=report)
    expire, broken = slots.expire, [1, 1]

    def broken_twice(*given: Any) -> None:
        if broken:
            broken.pop()
            raise ZeroDivisionError("by chance")
        expire(*given)

    monkeypatch.setattr(slots, "expire", broken_twice)
    reporter.free_slots_of("a:1")
    reporter.start()
    deadline = time.monotonic() + 10
    while len(reports) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    reporter.end()
    reporter.join()
    assert len(reports) >= 6
    assert said == [
        f"the run goes on after an error: ZeroDivisionError: by chance; see {log}",
        f"the run goes on after an error: DataError: division by zero; see {log}",
    ]
    assert log.read_text().count("in broken_twice") == 1
    assert log.read_text().count("in report") == 1
    must_claim(storage, study_id, "a:2")  # what the dead worker held is free


def test_the_reporter_outlasts_a_statement_timeout(storage: RetryingStorage, database_url: str, tmp_path: Path) -> None:
    study_id = make_study(storage, budget=1)
    must_claim(storage, study_id, "a:1")
    alter(database_url, "set statement_timeout = '100ms'")
    said: list[str] = []
    reporter = DatabaseReporter(
        storage, [study_id], lease_s=60, log=tmp_path / "log", say=said.append, report=lambda: None
    )
    reporter.free_slots_of("a:1")
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as blocking:
        blocking.cursor().execute("lock table slots")
        reporter.start()
        time.sleep(0.8)
        blocking.rollback()
    reporter.end()
    reporter.join()
    assert said == []
    must_claim(storage, study_id, "a:2")


def test_the_watcher_of_the_private_server_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "CHECK_S", 0.02)
    said: list[str] = []
    checks: list[int] = []

    def revive(folder: Path, *, listen: str) -> bool:
        checks.append(1)
        if len(checks) < 4:
            raise ValueError("no port in the file")
        return len(checks) == 4

    monkeypatch.setattr(embedded, "revive", revive)
    (tmp_path / "studies.toml").write_text(f'[storage]\ndata_dir = "{tmp_path}"\n')
    config = configuration.load(tmp_path / "studies.toml")
    log = tmp_path / "supervisor.log"
    with places.private_server_kept_alive(config, say=said.append, log=log, on_stop=lambda: None):
        deadline = time.monotonic() + 5
        while len(checks) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said == [
        f"the private server is not watched: ValueError: no port in the file; see {log}",
        "the private server had ended; started it again",
    ]
    assert log.read_text().count("in revive") == 1


def test_notes_that_cannot_be_written_are_told_and_tried_again(
    storage: RetryingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "EVERY_S", 0.0)
    monkeypatch.setattr(notes, "SHARE", 1e9)
    said: list[str] = []
    log = tmp_path / "supervisor.log"
    writer = notes.NoteWriter(storage, tmp_path, [], report=lambda: None, say=said.append, log=log)
    with monkeypatch.context() as broken:
        broken.setattr(
            notes, "study_progress", lambda opened, ids: opened.transaction(lambda c: c.execute(text("select 1 / 0")))
        )
        writer()
        writer()  # the same error again is not said again
    writer()
    assert said == [f"the dashboard's notes are not up to date: DataError: division by zero; see {log}"]
    assert log.read_text().count("in _write") == 1


# --- pooled connections, other defaults and other tables


@pytest.fixture
def empty_url(database_server: embedded.PrivateServer) -> Iterator[str]:
    """The URL of a database without any table."""
    name = f"empty_{uuid.uuid4().hex}"
    execute(database_server.url, f"create database {name}")
    yield database_server.url.rsplit("/", 1)[0] + "/" + name
    execute(database_server.url, f"drop database {name} with (force)")


def test_locks_end_with_their_transactions(empty_url: str) -> None:
    locks: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        locks.extend(re.findall(r"pg_\w*advisory\w*", statement))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        opened = database.open_storage(empty_url, wait_s=20)
        assert locks == ["pg_try_advisory_xact_lock"]
        database.create_schema(empty_url)
        assert len(locks) == 1  # nothing is missing, so nothing is locked
        study_id = make_study(opened, budget=1)
        assert list(free_counts(opened, [study_id], worker="a:1")) == [study_id]
        assert slots.finish(opened, must_claim(opened, study_id))
        opened.engine.dispose()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert locks == ["pg_try_advisory_xact_lock"]


def test_opening_a_database_with_tables_waits_for_no_lock(database_url: str) -> None:
    with closing(psycopg2.connect(database_url.replace("+psycopg2", ""))) as other:
        # As a pooler's connection whose lock of the session was left behind.
        other.cursor().execute("select pg_advisory_lock(%s)", [database.SCHEMA_LOCK])
        opening = threading.Thread(target=database.create_schema, args=[database_url], daemon=True)
        opening.start()
        opening.join(5)
        assert not opening.is_alive()


def test_a_worker_chooses_a_study_that_nobody_is_on_else_the_one_with_most_left(storage: RetryingStorage) -> None:
    small, medium, large = (make_study(storage, budget=budget, name=f"s{budget}") for budget in (2, 4, 6))
    everyone = [small, medium, large]

    def choices(worker: str, **options: Any) -> list[int]:
        return list(free_counts(storage, everyone, worker=worker, **options))

    assert choices("a:1") == [large, medium, small]
    must_claim(storage, large, "a:1")
    assert choices("a:1") == [large, medium, small]  # its own row is no other's
    assert choices("a:2") == [medium, small, large]
    assert choices("a:2", current=small) == [small, medium, large]
    assert choices("a:2", current=large) == [medium, small, large]  # another is on it too
    must_claim(storage, medium, "a:2")
    left = must_claim(storage, small, "a:3")
    assert choices("a:4") == [large, medium, small]  # somebody is on each of them
    slots.renew(storage, left.claim, lease_s=0.0)
    assert choices("a:4") == [small, large, medium]  # a lease that ran out is nobody's


def test_a_worker_leaves_a_study_that_another_chose_in_the_same_moment(
    storage: RetryingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {make_study(storage, budget=6, name=name): name for name in ("s1", "s2")}
    listed = [SimpleNamespace(study_id=study_id, name=name, model="toto") for study_id, name in found.items()]
    monkeypatch.setattr(worker_process.studying, "list_studies", lambda storage: listed)
    (tmp_path / "studies.toml").write_text("")
    config = configuration.load(tmp_path / "studies.toml")
    plan = RunPlan(config=config, series={}, studies=tuple(found.values()), devices=("cpu",))
    stop_request: Any = SimpleNamespace(received=False)
    worker = Worker(plan, storage, "cpu", stop_request)
    monkeypatch.setattr(worker, "_load", lambda model: SimpleNamespace(seconds=Counter(), keeping=None))
    monkeypatch.setattr(worker, "_run_of", lambda study_id: SimpleNamespace(study=worker.studies[study_id]))
    worked: list[int] = []

    def work_on(run: Any, slot: Slot, clock: Any) -> None:
        if not worked:
            must_claim(storage, slot.study_id, "elsewhere:1")
        slots.finish(storage, slot)
        worked.append(slot.study_id)
        stop_request.received = len(worked) == 4

    monkeypatch.setattr(worker, "_work_on", work_on)
    assert worker.work() == EXIT_INTERRUPTED
    first, *others = worked
    assert set(others) == set(found) - {first}


def test_trial_numbers_are_distinct_whatever_isolation_the_database_has(
    storage: RetryingStorage, database_url: str
) -> None:
    alter(database_url, "set default_transaction_isolation = 'repeatable read'")
    study_id = make_study(storage, budget=1)
    opened = [database.open_storage(database_url, wait_s=20) for _ in range(2)]
    numbers: list[int] = []

    def create(own: RetryingStorage) -> None:
        for _ in range(60):
            numbers.append(own.get_trial(own.create_new_trial(study_id)).number)

    threads = [threading.Thread(target=create, args=[own]) for own in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in opened:
        own.engine.dispose()
    assert sorted(numbers) == list(range(120))


def test_a_strangers_table_is_recognised_and_nothing_is_altered(empty_url: str) -> None:
    execute(empty_url, "create table slots (id integer primary key, reel text)")
    with pytest.raises(
        DatabaseUnavailable, match=f"{name_of(empty_url)}: has a table 'slots' that is not of"
    ) as caught:
        database.open_storage(empty_url)
    assert "\n" not in str(caught.value)
    assert "--storage" in str(caught.value)
    with closing(psycopg2.connect(empty_url.replace("+psycopg2", ""))) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "select table_name, column_name from information_schema.columns "
            "where table_schema = 'public' order by ordinal_position"
        )
        assert cursor.fetchall() == [("slots", "id"), ("slots", "reel")]


# --- leases over a stop of the server


def test_leases_that_ran_out_while_the_server_was_away_are_renewed_first(own_server: embedded.PrivateServer) -> None:
    lease_s = 3.0
    living, dead, reaper = (database.open_storage(own_server.url, wait_s=30) for _ in range(3))
    study_id = make_study(living, budget=2)
    slot = must_claim(living, study_id, "a:1", lease_s=lease_s)
    must_claim(dead, study_id, "a:2", lease_s=lease_s)
    keeper = LeaseKeeper(living, [], lease_s)
    keeper.hold(slot)
    keeper.start()
    embedded.stop(own_server.data_dir)
    time.sleep(lease_s + 1)
    embedded.start(own_server.data_dir)
    freed, deadline = 0, time.monotonic() + 3 * lease_s
    while not freed and time.monotonic() < deadline:
        freed += slots.reap(reaper, [study_id], lease_s=lease_s)
        time.sleep(0.1)
    assert freed == 1  # the row of the worker that is no more
    keeper.end()
    keeper.join()
    assert slots.finish(living, slot)
    for opened in (living, dead, reaper):
        opened.engine.dispose()


def test_a_worker_known_to_be_dead_loses_its_slot_at_once(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    must_claim(storage, study_id, "a:1")
    slots.expire(storage, "a:1")
    assert slots.reap(storage, [study_id], lease_s=1e6) == 1  # however short the server has been up
