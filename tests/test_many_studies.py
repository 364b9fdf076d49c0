"""Many studies of a hundred trials in one database: counted, listed, claimed from and resumed correctly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import places
import pytest
from sqlalchemy import event, text

from benchmarks import many_studies
from benchmarks.many_studies import STUDIES, TRIALS, fill, list_studies, resume
from storage import database, slots
from storage.progress import free_counts, has_open, study_progress
from storage.retrying import RetryingStorage
from studies import study as studying

Place = places.Place  # of the fixture `place`


@pytest.mark.slow
def test_five_hundred_studies(database_url: str, tmp_path: Path) -> None:
    storage = database.open_storage(database_url, wait_s=10, create=False)
    fill(storage)
    everyone = list(range(1, STUDIES + 1))
    free = free_counts(storage, everyone)
    assert len(free) == STUDIES // 10
    assert free[20] == TRIALS // 2
    claimed = slots.claim(storage, 10, worker="w:1", lease_s=60)
    assert claimed is not None
    assert claimed.number == TRIALS // 2
    assert slots.claim(storage, 11, worker="w:1", lease_s=60) is None
    assert slots.reap(storage, everyone, lease_s=60) == 0
    progress = study_progress(storage)
    assert (progress[10].done, progress[10].open, progress[11].done, progress[11].open) == (50, 51, 100, 0)

    rows = json.loads(list_studies(database_url, tmp_path))
    assert len(rows) == STUDIES
    assert (rows[0]["done"], rows[0]["state"], rows[9]["done"], rows[9]["state"]) == (100, "finished", 50, "running")

    rows = json.loads(many_studies.promote(database_url, tmp_path, many_studies.PROMOTED))
    assert [row["symbol"] for row in rows] == many_studies.PROMOTED
    assert all(row["improvement_low"] < row["improvement"] < row["improvement_high"] for row in rows)

    with many_studies.dashboard_over(database_url, tmp_path) as address:
        (_, summaries), (_, study) = (
            [json.loads(answer) for answer in many_studies.get(address, page)]
            for page in (many_studies.list_page(), many_studies.study_page(11))
        )
    assert len(summaries["study_summaries"]) == STUDIES
    assert (study["name"], len(study["trials"])) == ("S011/toto@2026-11-20", TRIALS)
    storage.engine.dispose()


def statements_of(storage: RetryingStorage, work: Callable[[], object]) -> list[str]:
    """The statements that some work sends to the server."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(storage.engine, "before_cursor_execute", note)
    work()
    event.remove(storage.engine, "before_cursor_execute", note)
    return sent


def test_resuming_takes_no_statement_for_each_study(place: places.Place) -> None:
    fill(place.storage, 40)
    sent = {count: statements_of(place.storage, lambda count=count: resume(place.storage, count)) for count in (10, 40)}
    assert len(sent[10]) == len(sent[40]) <= 4
    assert not any("select study_id, state, params, result from" in statement for statement in sent[40])  # 60 kB each
    opened = resume(place.storage, 40)
    assert [item.study.symbol for item in opened] == [f"S{number:03}" for number in range(1, 41)]
    assert [item.state for item in opened] == (["finished"] * 9 + ["resumed"]) * 4


def test_studies_raised_together_are_each_confirmed_anew(place: places.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place.storage, 12)
    search = replace(many_studies.CONFIG.search, trials=TRIALS + 5)
    monkeypatch.setattr(many_studies, "CONFIG", replace(many_studies.CONFIG, search=search))
    opened = resume(place.storage, 11)
    assert {(item.state, item.budget) for item in opened} == {("raised", TRIALS + 5)}
    progress = study_progress(place.storage)
    assert (progress[1].open, progress[10].open) == (6, 56)  # a confirmation beside the trials
    assert progress[12].budget == TRIALS  # not asked for
    assert set(study_progress(place.storage, [3, 7, 99])) == {3, 7}


def test_a_confirmation_of_other_windows_is_asked_for_anew(
    place: places.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place.storage, 3)
    windows = replace(many_studies.CONFIG.windows, confirmation=200)
    monkeypatch.setattr(many_studies, "CONFIG", replace(many_studies.CONFIG, windows=windows))
    assert [item.state for item in resume(place.storage, 2)] == ["resumed"] * 2
    assert {study: found.open for study, found in study_progress(place.storage).items()} == {1: 1, 2: 1, 3: 0}


def test_opening_takes_no_statement_for_each_study(place: places.Place) -> None:
    few = statements_of(place.storage, lambda: resume(place.storage, 10))
    place.storage.transaction(lambda connection: connection.execute(text("truncate studies cascade")))
    many = statements_of(place.storage, lambda: resume(place.storage, 40))
    assert len(few) == len(many) <= 8
    assert_whole(place.storage, 40)


def assert_whole(storage: RetryingStorage, studies: int) -> None:
    """Each study was made once, with all that it is to have."""
    listed = studying.list_studies(storage)
    assert [study.symbol for study in listed] == [f"S{number:03}" for number in range(1, studies + 1)]
    progress = study_progress(storage)
    assert {(progress[study.study_id].budget, progress[study.study_id].open) for study in listed} == {
        (TRIALS, TRIALS + 1)  # a confirmation beside the trials
    }
    loaded = optuna.load_study(study_name=listed[0].name, storage=storage)
    assert (loaded.direction, loaded.metric_names) == (optuna.study.StudyDirection.MINIMIZE, [studying.METRIC])


def test_two_launches_open_the_same_studies_at_once(place: places.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studying, "CREATED_TOGETHER", 20)
    storages = [database.open_storage(place.url, wait_s=10, create=False) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda storage: resume(storage, 60), storages))
    assert len({tuple(item.study.study_id for item in items) for items in opened}) == 1
    assert_whole(place.storage, 60)
    for storage in storages:
        storage.engine.dispose()


KILLED_WHILE_OPENING = """
import os, signal, sys
from benchmarks.many_studies import resume
from storage import database, slots
from studies import study
study.CREATED_TOGETHER = 10
raise_budgets, calls = slots.raise_budgets, []
def until_killed(*given):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return raise_budgets(*given)
slots.raise_budgets = until_killed
resume(database.open_storage(sys.argv[1], wait_s=10), 40)
"""


def test_a_launch_killed_while_it_opens_studies_leaves_whole_ones(place: places.Place) -> None:
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_OPENING, place.url], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert_whole(place.storage, 20)
    assert [item.state for item in resume(place.storage, 40)] == ["resumed"] * 20 + ["new"] * 20
    assert_whole(place.storage, 40)


def test_an_idle_worker_reads_the_open_slots_alone(place: places.Place) -> None:
    fill(place.storage, 40)
    place.storage.transaction(lambda connection: connection.execute(text("analyze slots")))
    (asked,) = statements_of(place.storage, lambda: has_open(place.storage, range(1, 41)))
    asked = asked.partition("; ")[2].partition("; ")[2] or asked
    plan = place.storage.transaction(
        lambda connection: connection.exec_driver_sql(f"explain {asked}", {"ids": list(range(1, 41))}).scalars().all()
    )
    assert any("slots_open" in line for line in plan), plan
    assert has_open(place.storage, [10, 11])
    assert not has_open(place.storage, [11, 12])
