"""The storage through restarts of its server, bad URLs and wrong passwords."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import places
import pytest
from conftest import execute
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import text
from test_slots import make_study

from launch import cli
from storage import DatabaseUnavailable, database, embedded, slots, urls
from storage.progress import run_snapshot, worker_seconds
from storage.retrying import CLAIM_ATTR

Place = places.RunPlace  # of the fixture `place`


def crash(folder: Path) -> None:
    """SIGQUIT to the postmaster: an immediate shutdown, as after a power cut."""
    pid = int((folder / "cluster" / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, signal.SIGQUIT)


@pytest.mark.parametrize("how", ["fast stop", "crash"])
def test_trials_go_on_over_a_restart(own_server: embedded.PrivateServer, how: str) -> None:
    storage = database.open_storage(own_server.url, wait_s=60)
    study = optuna.create_study(storage=storage, study_name="s")
    told: dict[int, float] = {}
    ended = threading.Event()
    errors: list[BaseException] = []

    def search() -> None:
        try:
            while not ended.is_set():
                trial = study.ask()
                value = trial.suggest_float("x", 0, 1)
                trial.report(value, step=0)
                trial.should_prune()
                study.tell(trial, value)
                told[trial.number] = value
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(0.7)
        before = len(told)
        if how == "crash":
            crash(own_server.data_dir)
        else:
            assert embedded.stop(own_server.data_dir)
        time.sleep(0.5)
        assert embedded.start(own_server.data_dir) == own_server
        deadline = time.monotonic() + 30
        while len(told) <= before + 3 and time.monotonic() < deadline and not errors:
            time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert errors == []
    complete = {t.number: t.value for t in study.get_trials(states=(TrialState.COMPLETE,))}
    assert {number: complete[number] for number in told} == told  # nothing that was acknowledged is lost


def test_a_restart_between_two_calls_is_not_noticed_by_who_does_not_wait(own_server: embedded.PrivateServer) -> None:
    storage = database.open_storage(own_server.url, wait_s=0.0)
    optuna.create_study(storage=storage, study_name="s")
    assert embedded.stop(own_server.data_dir)
    assert embedded.start(own_server.data_dir) == own_server
    assert storage.transaction(lambda c: c.execute(text("select 1")).scalar(), wait_s=0.0) == 1


def test_a_server_that_stays_away_is_one_line(own_server: embedded.PrivateServer) -> None:
    storage = database.open_storage(own_server.url, wait_s=0.5)
    study = optuna.create_study(storage=storage, study_name="s")
    embedded.stop(own_server.data_dir)
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable) as caught:
        study.ask()
    assert time.monotonic() - began < 10
    assert "no answer for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_create_new_trial_repeated_after_its_commit_is_one_trial(database_url: str) -> None:
    storage = database.open_storage(database_url, wait_s=5, create=False)
    study = optuna.create_study(storage=storage, study_name="s")
    storage.transaction(lambda c: slots.raise_budget(c, study._study_id, 1))
    slot = slots.claim(storage, study._study_id, worker="w", lease_s=60)
    assert slot is not None
    template = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs={CLAIM_ATTR: slot.claim})
    first = storage.create_new_trial(study._study_id, template)
    # What a broken attempt looks like to the next one: the row is there already.
    retry = storage._retry
    storage._retry = lambda call: retry(lambda attempt: call(attempt + 1))  # type: ignore[method-assign]
    assert storage.create_new_trial(study._study_id, template) == first
    assert len(study.trials) == 1


def test_tell_repeated_after_its_commit_is_success_and_only_then(database_url: str) -> None:
    storage = database.open_storage(database_url, wait_s=5, create=False)
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    retry = storage._retry
    storage._retry = lambda call: retry(lambda attempt: call(attempt + 1))  # type: ignore[method-assign]
    assert storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    with pytest.raises(UpdateFinishedTrialError):  # somebody else failed it: that is no success of ours
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def test_eight_at_once_on_an_empty_database(own_server: embedded.PrivateServer) -> None:
    errors: list[BaseException] = []

    def create() -> None:
        try:
            database.open_storage(own_server.url, wait_s=5).engine.dispose()
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_stock_optuna_reads_what_we_write(database_url: str) -> None:
    ours = optuna.create_study(storage=database.open_storage(database_url, create=False), study_name="s")
    trial = ours.ask()
    trial.suggest_categorical("a", ["x", "y"])
    trial.report(0.5, 1)
    ours.tell(trial, 0.25)
    stock = optuna.load_study(study_name="s", storage=optuna.storages.RDBStorage(database_url))
    assert stock.best_value == 0.25
    assert stock.trials[0].intermediate_values == {1: 0.5}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "not a URL"),
        ("sqlite:///x.db", "studies live in Postgres"),
        ("mysql://u:hunter2@h/d", "studies live in Postgres"),
        ("postgresql://u:hunter2@127.0.0.1:1/d", "refused"),
        ("postgresql://u:hunter2@no.such.host.invalid/d", "could not translate host name"),
    ],
)
def test_bad_urls_are_one_line_without_the_password(url: str, words: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        database.open_storage(url)
    message = str(caught.value)
    assert words in message
    assert "hunter2" not in message
    assert "\n" not in message


def test_a_wrong_password_is_said_and_not_shown(
    own_server: embedded.PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    with pytest.raises(DatabaseUnavailable, match=r"password authentication failed.*PGPASSWORD") as caught:
        database.open_storage(own_server.url)
    assert "hunter2" not in str(caught.value)


def test_hand_over_splits_the_password_off() -> None:
    for url in ("postgresql://u:p%40ss@h:5/d", "postgresql://u@h:5/d?password=p%40ss"):
        shown, environment = urls.hand_over(urls.parse_url(url))
        assert shown == "postgresql://u@h:5/d"
        assert environment == {"PGPASSWORD": "p@ss"}
    assert urls.hand_over(urls.parse_url("postgresql://u@h/d"))[1] == {}


def test_a_password_with_braces_and_at_signs_reaches_the_server(
    own_server: embedded.PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = database.open_storage(own_server.url)
    with storage.engine.begin() as connection:
        connection.execute(text("create role odd login superuser password '{a}@b/c:d'"))
    monkeypatch.delenv("PGPASSFILE")
    url = storage.engine.url.set(username="odd", password="{a}@b/c:d").render_as_string(hide_password=False)
    assert database.open_storage(url).get_all_studies() == []


def test_a_patient_opener_waits_for_the_server(own_server: embedded.PrivateServer) -> None:
    database.create_schema(own_server.url)
    embedded.stop(own_server.data_dir)
    with pytest.raises(DatabaseUnavailable):
        database.open_storage(own_server.url, wait_s=60, create=False)
    back = threading.Timer(1.0, embedded.start, [own_server.data_dir])
    back.start()
    storage = database.open_storage(own_server.url, wait_s=60, create=False, patient=True)
    back.join()
    assert storage.get_all_studies() == []
    storage.engine.dispose()


@pytest.mark.parametrize("columns", [["progress"], ["progress", "seconds"]])
def test_a_database_of_before_gets_the_columns_it_lacks(database_url: str, columns: list[str]) -> None:
    for column in columns:
        execute(database_url, f"alter table slots drop column {column}")
    storage = database.open_storage(database_url, wait_s=5)
    assert worker_seconds(storage) == {}
    assert run_snapshot(storage, [1], [], stage=0, label="", path="$").busy == []
    storage.engine.dispose()


@pytest.mark.parametrize(("version", "advice"), [("v3.0.0.a", "optuna storage upgrade"), ("v99.0.0.a", "a newer Opt")])
@pytest.mark.parametrize("has_slots", [True, False])
def test_tables_of_another_optuna_are_one_line(database_url: str, version: str, advice: str, has_slots: bool) -> None:
    execute(database_url, f"update alembic_version set version_num = '{version}'")  # noqa: S608 - a constant
    if not has_slots:
        execute(database_url, "drop table slots")
    with pytest.raises(DatabaseUnavailable, match=f"another version of Optuna \\({version}, not v.*{advice}") as caught:
        database.open_storage(database_url)
    assert "\n" not in str(caught.value)
    if not has_slots:
        execute(database_url, "create table slots (id integer)")  # none was made


def test_too_few_connections_are_said_with_the_limit(own_server: embedded.PrivateServer) -> None:
    embedded.stop(own_server.data_dir)
    server = embedded.start(own_server.data_dir, max_connections=10)  # three of them are kept for superusers
    storage = database.open_storage(server.url, wait_s=0.5)
    storage.transaction(lambda c: c.execute(text("select 1")))
    assert database.lack_of_connections(storage, 6) is None
    assert database.lack_of_connections(storage, 7) == (
        "the database takes 7 connections, of which 1 are in use: too few for 7 workers, which hold one each; start "
        "fewer workers, raise the server's max_connections, or put PgBouncer before it"
    )
    execute(server.url, "create role guest login password 'p' connection limit 0")
    guest = server.url.replace("studies@", "guest:p@")
    with pytest.raises(DatabaseUnavailable, match=r"too many connections for role.*; start fewer workers, raise the"):
        database.open_storage(guest)
    storage.engine.dispose()


def test_a_process_holds_one_connection(database_url: str) -> None:
    storage = database.open_storage(database_url, wait_s=10)
    study = optuna.create_study(storage=storage, study_name="s")
    threads = [threading.Thread(target=lambda: study.tell(study.ask(), 1.0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    count = text("select count(*) from pg_stat_activity where datname = current_database()")
    deadline = time.monotonic() + 5  # the server is told of a closed connection, and ends its process a little later
    while (found := storage.transaction(lambda c: c.execute(count).scalar())) != 1:
        assert time.monotonic() < deadline, found
    storage.engine.dispose()


@pytest.fixture
def role(database_server: embedded.PrivateServer) -> Iterator[str]:
    """A role that owns nothing."""
    name = f"reader_{os.getpid()}"
    execute(database_server.url, f"create role {name} login password 'p'")
    yield name
    execute(database_server.url, f"drop role {name}")


def of_role(url: str, role: str) -> str:
    return url.replace("studies@", f"{role}:p@")


def test_a_role_that_may_not_make_tables_is_told_what_to_grant(
    database_server: embedded.PrivateServer, role: str
) -> None:
    name = f"empty_{os.getpid()}"
    execute(database_server.url, f"create database {name}")
    with pytest.raises(
        DatabaseUnavailable, match=rf"schema public; let .* GRANT USAGE, CREATE ON SCHEMA public TO {role}$"
    ):
        database.open_storage(of_role(database_server.url.rsplit("/", 1)[0] + f"/{name}", role))
    execute(database_server.url, f"drop database {name} with (force)")


def test_a_role_that_only_reads_is_one_line(place: places.Place, role: str) -> None:
    def launched() -> str:
        ended = place.invoke(cli.launch_workers, "--cpus", "1", "--models", "naive", url=of_role(place.url, role))
        assert (ended.exit_code, ended.stdout) == (1, "")
        return ended.stderr.splitlines()[-1]

    execute(place.url, f"grant select on all tables in schema public to {role}")
    assert f"the role {role} may not write; let it, as the owner: GRANT ALL ON ALL TABLES" in launched()
    reading = database.open_storage(of_role(place.url, role))
    with pytest.raises(DatabaseUnavailable, match=r"permission denied for table studies$"):
        make_study(reading)
    execute(place.url, f"grant all on all tables in schema public to {role}")
    execute(place.url, f"alter role {role} set default_transaction_read_only = on")
    began = time.monotonic()
    assert f"is read-only for the role {role}" in launched()
    assert time.monotonic() - began < 10  # before the run there is no failover to wait for
    reading.engine.dispose()
    execute(place.url, f"drop owned by {role}")
