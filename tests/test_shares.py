"""Confirmations in shares: the rows, and the numbers of several real workers, whatever befalls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from places import RunPlace as Place
from places import StudyPlace, patch_python
from sqlalchemy import text

from benchmarks.exactness import timeless
from launch.views.run_watcher import RunWatcher
from storage import database, shares, slots, study_rows
from storage.progress import free_counts, parked_slots, read_confirmations, run_snapshot, study_progress, worker_seconds
from storage.retrying import RetryingStorage
from storage.shares import NewShare
from storage.slots import CONFIRMATION, SHARE, Slot
from studies import config as configuration
from studies import confirmation, evaluators, sharing, working
from studies import study as studying
from studies.evidence import to_json
from studies.series import read_series
from studies.study import Study, StudyRun

T = TypeVar("T")
PLAN = {"key": "k", "steps": 4, "needed": 4}

# ---- the rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(database_url: str) -> Iterator[RetryingStorage]:
    opened = database.open_storage(database_url, wait_s=10, create=False)
    yield opened
    opened.engine.dispose()


def make_study(storage: RetryingStorage) -> int:
    def fill(connection: Any, study_id: int) -> None:
        slots.add(connection, study_id, slots.TRIAL, 0)
        slots.add(connection, study_id, CONFIRMATION, 0, label="confirmation", params={})

    return study_rows.create_study(storage, "s", {"definition": {}}, "mae", fill)


def claim(storage: RetryingStorage, study_id: int, worker: str = "a", lease_s: float = 60) -> Slot:
    slot = slots.claim(storage, study_id, worker=worker, lease_s=lease_s)
    assert slot is not None
    return slot


def shared_out(storage: RetryingStorage, *numbers: int, plan: Mapping[str, Any] = PLAN) -> int:
    """A study whose confirmation is shared out."""
    study_id = make_study(storage)
    slots.finish(storage, claim(storage, study_id))
    assert shares.share_out(storage, claim(storage, study_id), plan, [NewShare(steps=[n]) for n in numbers])
    return study_id


def test_a_confirmation_waits_for_its_shares_and_takes_them_with_it(storage: RetryingStorage) -> None:
    study_id = shared_out(storage, 0, 1)
    assert free_counts(storage, [study_id]) == {study_id: 2}
    first, second = claim(storage, study_id, "a"), claim(storage, study_id, "b")
    assert [(one.stage, one.number, one.label) for one in (first, second)] == [(SHARE, 0, "k"), (SHARE, 1, "k")]
    assert slots.finish(storage, first, result={"0": 1}, seconds={"draw": 1.0})
    assert slots.claim(storage, study_id, worker="a", lease_s=60) is None
    assert run_snapshot(storage, [study_id], ["a"], stage=0, label="", path="$").finished == {"a": 1}  # the trial
    (busy,) = run_snapshot(storage, [study_id], [], stage=0, label="", path="$").busy
    assert (busy.worker, busy.share) == ("b", 1 / 4)
    watcher = RunWatcher(storage, {study_id: "s"})
    watcher.read()
    assert watcher._tasks["b"] == ("s", "confirmation 25%")
    assert slots.finish(storage, second, result={"1": 2}, seconds={"draw": 2.0})
    known = shares.read(storage, study_id)
    assert (known.plan, known.results, known.seconds) == (PLAN, {0: 1, 1: 2}, {"draw": 3.0})
    assert shares.read(storage, study_id, before=1).results == {0: 1}

    again = claim(storage, study_id, "a")
    assert again.stage == CONFIRMATION
    wanted = [NewShare(steps=[0]), NewShare(steps=[2], after=1), NewShare(steps=[3], after=0)]
    assert shares.share_out(storage, again, PLAN, wanted)  # the one that is done stays so
    assert not shares.share_out(storage, again, PLAN, wanted)  # it is given back
    third = claim(storage, study_id, "a")
    assert third.number == 3  # what it has in memory
    assert claim(storage, study_id, "a").number == 2  # the other's, rather than nothing
    slots.expire(storage, "a")
    assert slots.reap(storage, [study_id], lease_s=60) == 2
    fourth, fifth = claim(storage, study_id, "b"), claim(storage, study_id, "b")
    assert not slots.finish(storage, third, result={"3": 0})  # too late
    for slot in (fourth, fifth):
        assert slots.finish(storage, slot, result={str(slot.number): 0})
    last = claim(storage, study_id)
    assert slots.finish(storage, last, result={"mae": 1.0}, seconds={"draw": 4.0})
    assert slots.finish(storage, last, result={"mae": 1.0}, seconds={"draw": 4.0})  # its first try's answer was lost
    assert not slots.finish(storage, fourth)
    slots.add_seconds(storage, fourth, {"idle": 7.0})
    assert worker_seconds(storage, [study_id]) == {study_id: {"draw": 4.0, "idle": 7.0}}
    assert study_progress(storage)[study_id].state == "finished"


@pytest.mark.parametrize("lost", [False, True])
def test_a_share_that_always_fails_parks_its_confirmation(storage: RetryingStorage, lost: bool) -> None:
    study_id = shared_out(storage, 0, 1)
    slots.finish(storage, claim(storage, study_id), result={})
    for _ in range(slots.MAX_LOSSES if lost else slots.MAX_FAILURES):
        assert study_progress(storage)[study_id].open == 2
        slot = claim(storage, study_id, "a")
        assert slot.number == 1
        if lost:
            slots.expire(storage, "a")
            slots.reap(storage, [study_id], lease_s=60)
        else:
            slots.fail(storage, slot, "no memory")
    progress = study_progress(storage)[study_id]
    assert (progress.state, progress.parked) == ("parked", 1)
    (parked,) = parked_slots(storage, study_id)
    assert parked.stage == CONFIRMATION
    assert ("10 workers died on it" if lost else "no memory") in parked.error
    storage.transaction(lambda c: slots.unpark(c, study_id, at_once=True))
    assert claim(storage, study_id).number == 1  # and what was done stays done


def test_what_is_asked_for_anew_keeps_no_share_that_waits(storage: RetryingStorage) -> None:
    study_id = shared_out(storage, 0, 1, 2)
    done, busy = claim(storage, study_id), claim(storage, study_id, "b")
    slots.finish(storage, done, result={"0": 0})
    storage.transaction(lambda c: slots.reopen(c, study_id, CONFIRMATION, params={"incumbent": {}}))
    assert slots.claim(storage, study_id, worker="a", lease_s=60) is None
    assert slots.finish(storage, busy, result={"1": 1})
    slot = claim(storage, study_id)
    assert (slot.stage, slot.params) == (CONFIRMATION, {"incumbent": {}})
    assert shares.share_out(storage, slot, {**PLAN, "key": "other"}, [NewShare(steps=[5])])
    assert shares.read(storage, study_id).results == {}
    assert claim(storage, study_id).number == 5
    assert slots.claim(storage, study_id, worker="a", lease_s=60) is None


def test_a_plan_is_given_up_only_when_nobody_else_is_at_it(storage: RetryingStorage) -> None:
    study_id = shared_out(storage, 0, 1, 2)
    mine, others = claim(storage, study_id), claim(storage, study_id, "b")
    assert not shares.discard(storage, mine)
    slots.finish(storage, others, result={})
    assert shares.discard(storage, mine)
    assert not slots.finish(storage, mine)
    assert claim(storage, study_id).stage == CONFIRMATION


# ---- the numbers, in this process ------------------------------------------------------------------------------------


@pytest.fixture
def study_place(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StudyPlace]:
    monkeypatch.setattr(sharing, "ALONE_S", 0.0)
    monkeypatch.setattr(sharing, "SHARE_S", 0.0)
    place = StudyPlace(tmp_path, database_url)
    yield place
    place.close()


def work_in_turns(place: StudyPlace, runs: Mapping[str, StudyRun]) -> list[str]:
    """Workers with these names take slots in turns, until none is left; what became of each slot."""
    states: list[str] = []
    ones = {worker: place.evaluator() for worker in runs}
    clocks = {worker: working.StageClock(place.storage, [one]) for worker, one in ones.items()}
    while len(states) < 200:
        before = len(states)
        for worker, run in runs.items():
            if slot := slots.claim(place.storage, run.study.study_id, worker=worker, lease_s=60):
                attrs, clock = {"worker": worker, "device": "cpu"}, clocks[worker]
                states.append(working.work(place.storage, run, slot, ones[worker], attrs=attrs, clock=clock).state)
        if len(states) == before:
            return states
    raise AssertionError(f"it does not come to an end: {Counter(states)}")


@pytest.mark.parametrize("share_s", [0.0, 1e9])
def test_two_workers_come_to_the_evidence_of_one(
    study_place: StudyPlace, monkeypatch: pytest.MonkeyPatch, share_s: float
) -> None:
    place = study_place
    monkeypatch.setattr(sharing, "SHARE_S", share_s)
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    study = place.open().study
    run = place.run(study)
    states = Counter(work_in_turns(place, {"host:1": run, "host:2": place.run(study)}))
    assert states["shared"] == 2  # before the passes are known, and after
    # The incumbent; five looks, the rest of them, one more batch of confirmation, of test two and of validation three.
    assert states["measured"] == 1 + (5 + 5 + 1 + 2 + 3 if share_s == 0 else 3)
    alone = to_json(confirmation.confirm(run, place.evaluator(), {"incumbent": place_params(place, study)}))
    assert timeless(place.result(study)) == timeless(json.loads(json.dumps(alone)))
    spent = worker_seconds(place.storage, [study.study_id])[study.study_id]
    assert spent["draw"] > 0


def place_params(place: StudyPlace, study: Study) -> Mapping[str, Any]:
    return (read_confirmations(place.storage, [study.study_id])[study.study_id].params or {})["incumbent"]


def test_shares_of_other_settings_are_planned_anew(study_place: StudyPlace) -> None:
    place = study_place
    study = place.open().study
    run = place.run(study)
    one, clock = place.evaluator(), working.StageClock(place.storage, [])
    attrs = {"worker": "host:1", "device": "cpu"}
    shares_done = 0
    while shares_done < 2:
        slot = claim(place.storage, study.study_id)
        working.work(place.storage, run, slot, one, attrs=attrs, clock=clock)
        shares_done += slot.stage == SHARE
    plan = shares.read(place.storage, study.study_id).plan
    settings = place.folder / "studies.toml"
    settings.write_text(settings.read_text().replace("confirmation = 60", "confirmation = 50"))
    states = work_in_turns(place, {"host:2": place.run(study)})
    assert states[:2] == ["left", "shared"]
    assert plan is not None
    evidence = place.result(study)
    assert evidence["windows"]["confirmation"]["count"] == 50
    alone = to_json(confirmation.confirm(place.run(study), place.evaluator(), {}))
    assert timeless(evidence) == timeless(json.loads(json.dumps(alone)))


def test_what_an_earlier_version_kept_of_a_confirmation_is_gone_on_from(study_place: StudyPlace) -> None:
    place = study_place
    study = place.open().study
    run = place.run(study)
    work_in_turns(place, {"host:1": run})
    alone = to_json(confirmation.confirm(run, place.evaluator(), {}))
    statement = text("update slots set progress = cast(:kept as jsonb), state = 'free' where stage = :stage")
    for key in (confirmation.begin(run, place.evaluator(), {}).measuring.key, "of other windows"):
        kept = {"key": key, "share": 0.4, "portfolio": [], "done": 3, "passes": 2, "values": {}}
        values = {"kept": json.dumps(kept), "stage": CONFIRMATION}
        place.storage.transaction(lambda c, values=values: c.execute(statement, values))
        assert work_in_turns(place, {"host:1": run})[-1] == "confirmed"
        assert timeless(place.result(study)) == timeless(json.loads(json.dumps(alone)))


# ---- real workers ----------------------------------------------------------------------------------------------------

# Workers that share every confirmation, note what they measured and take their time for it.
SHARING = """
import sys
if "launch.worker" in sys.orig_argv:
    import json, os, time
    from pathlib import Path
    from objectives.evaluation import Evaluator
    from studies import sharing
    sharing.ALONE_S = sharing.SHARE_S = 0
    batch_errors = Evaluator.batch_errors
    def noting(self, windows, params, indices, *, passes, **more):
        found = batch_errors(self, windows, params, indices, passes=passes, **more)
        if tuple(passes) != (0,):
            time.sleep(0.03)
            with Path({log!r}).open("a") as file:
                origins = [windows.origins[i] for i in indices]
                file.write(json.dumps([os.getpid(), dict(params), origins, *passes]) + "\\n")
        return found
    Evaluator.batch_errors = noting
"""
SEARCH = ("--trials", "4", "--symbols", "SP500")


@pytest.fixture
def shared(place: Place) -> Path:
    """The file of what was measured in shares."""
    log = place.folder / "measured"
    place.environment |= patch_python(place.folder / "sharing", SHARING.format(log=str(log)))
    return log


@contextmanager
def launched(place: Place) -> Iterator[subprocess.Popen[str]]:
    run = place.launch(*SEARCH)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.kill()  # its workers end with it
        run.communicate()


def wait_for(ready: Callable[[], T | None], seconds: float = 60) -> T:
    deadline = time.monotonic() + seconds
    while (found := ready()) is None:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    return found


def rows(place: Place, where: str) -> list[Any]:
    asked = f"select number, worker, state from slots where stage = {SHARE} and {where} order by number"  # noqa: S608
    statement = text(asked)
    return list(place.storage.transaction(lambda c: c.execute(statement).all()))


def one_at_work(place: Place) -> tuple[int, int]:
    """Number of a share and process id of its worker, once two workers are at shares and some are done."""

    def look() -> tuple[int, int] | None:
        busy = rows(place, "state = 'busy'")
        if len(busy) < 2 or not rows(place, "state = 'done'"):
            return None
        return busy[0].number, int(busy[0].worker.split(":")[1].split("-")[0])

    return wait_for(look)


def assert_as_alone(place: Place) -> None:
    """The evidence is what this process measures, undisturbed, with one evaluator; and no share is left."""
    (study,) = studying.list_studies(place.storage)
    config = configuration.load(place.settings)
    series = read_series(config, ["SP500"])[0][0]
    forecaster = evaluators.load_forecaster(config, "naive", device="cpu")
    run = studying.start(place.storage, config, study, series, forecaster.fingerprint)
    evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=1 << 24)
    alone = to_json(confirmation.confirm(run, evaluator, {}))
    found = read_confirmations(place.storage, [study.study_id])[study.study_id]
    assert timeless(found.result) == timeless(json.loads(json.dumps(alone)))
    assert rows(place, "true") == []


def measured(log: Path) -> tuple[set[int], Counter[str]]:
    """The processes that measured, and what."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line[0] for line in lines}, Counter(json.dumps(line[1:]) for line in lines)


def test_the_share_of_a_worker_that_is_killed_is_measured_by_another(place: Place, shared: Path) -> None:
    with launched(place) as run:
        _, pid = one_at_work(place)
        os.kill(pid, signal.SIGKILL)
        assert run.wait(timeout=60) == 0
    workers, counts = measured(shared)
    assert len(workers) >= 2
    assert set(counts.values()) <= {1, 2}
    assert len({json.dumps(json.loads(what)[1:]) for what, count in counts.items() if count > 1}) <= 1
    assert_as_alone(place)


@pytest.mark.slow
def test_a_frozen_workers_share_is_taken_over_and_what_it_brings_late_is_refused(place: Place, shared: Path) -> None:
    with launched(place) as run:
        number, pid = one_at_work(place)
        os.kill(pid, signal.SIGSTOP)
        try:
            (study,) = studying.list_studies(place.storage)

            def confirmed() -> bool | None:
                return read_confirmations(place.storage)[study.study_id].state == "done" or None

            wait_for(confirmed)
            result = read_confirmations(place.storage)[study.study_id].result
        finally:
            os.kill(pid, signal.SIGCONT)
        assert run.wait(timeout=60) == 0
    logs = "".join(path.read_text() for path in (place.folder / "logs").glob("*/worker-*.log"))
    assert f" #{number} lost steps " in logs
    assert read_confirmations(place.storage)[study.study_id].result == result
    assert_as_alone(place)


@pytest.mark.slow
def test_shares_that_are_done_stay_done_after_a_stop(place: Place, shared: Path) -> None:
    with launched(place) as run:
        one_at_work(place)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=10) == 130
    done = rows(place, "state = 'done'")
    assert done
    assert rows(place, "state = 'busy'") == []
    _, before = measured(shared)
    shared.unlink()
    with launched(place) as run:
        assert run.wait(timeout=60) == 0
    _, after = measured(shared)
    repeated = {json.dumps(json.loads(what)[1:]) for what in before if what in after}
    assert len(repeated) <= 2  # what both were at when the signal came
    assert_as_alone(place)
