"""The budget under claims, deaths and raised budgets, on a real Postgres."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text

from storage import database, slots, study_rows
from storage.progress import (
    first_parked_slots,
    free_counts,
    parked_slots,
    stage_results,
    study_progress,
)
from storage.retrying import CLAIM_ATTR, ClaimLost, RetryingStorage
from storage.slots import BASELINE, CONFIRMATION, TRIAL, Slot


@pytest.fixture
def storage(database_url: str) -> Iterator[RetryingStorage]:
    opened = database.open_storage(database_url, wait_s=10, create=False)
    yield opened
    opened.engine.dispose()


def make_study(storage: RetryingStorage, *, budget: int = 3, baselines: int = 0, name: str = "s") -> int:
    def fill(connection, study_id: int) -> None:
        for number in range(baselines):
            slots.add(connection, study_id, BASELINE, number, label=f"b{number}", params={"x": number})
        slots.raise_budget(connection, study_id, budget)
        slots.add(connection, study_id, CONFIRMATION, 0, label="confirmation")

    return study_rows.create_study(storage, name, {"definition": {}}, "mae", fill)


def claim(storage: RetryingStorage, study_id: int, worker: str = "w", lease_s: float = 60) -> Slot | None:
    return slots.claim(storage, study_id, worker=worker, lease_s=lease_s)


def must_claim(storage: RetryingStorage, study_id: int, worker: str = "w", lease_s: float = 60) -> Slot:
    slot = claim(storage, study_id, worker, lease_s)
    assert slot is not None
    return slot


def reap(storage: RetryingStorage, study_id: int) -> int:
    return slots.reap(storage, [study_id], lease_s=0.0)


def start_trial(storage: RetryingStorage, slot: Slot) -> int:
    template = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs={CLAIM_ATTR: slot.claim})
    return storage.create_new_trial(slot.study_id, template_trial=template)


def test_stages_come_in_order(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=2, baselines=1)
    first = must_claim(storage, study_id)
    assert (first.stage, first.number, first.label, first.params) == (BASELINE, 0, "b0", {"x": 0})
    second, third = must_claim(storage, study_id), must_claim(storage, study_id)
    assert [(s.stage, s.number) for s in (second, third)] == [(TRIAL, 0), (TRIAL, 1)]
    assert claim(storage, study_id) is None  # the confirmation waits for all of them
    assert free_counts(storage, [study_id]) == {}
    for slot in (first, second, third):
        assert slots.finish(storage, slot)
    assert free_counts(storage, [study_id]) == {study_id: 1}
    last = must_claim(storage, study_id)
    assert last.stage == CONFIRMATION
    assert slots.finish(storage, last, result={"mae": 0.5})
    assert stage_results(storage, study_id, CONFIRMATION) == {"confirmation": {"mae": 0.5}}
    progress = study_progress(storage)[study_id]
    assert (progress.budget, progress.done, progress.open, progress.parked) == (2, 2, 0, 0)


def test_no_slot_is_claimed_twice_by_eight_threads(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=60)
    claimed: list[int] = []

    def pull(worker: str) -> None:
        while (slot := claim(storage, study_id, worker)) is not None and slot.stage == TRIAL:
            claimed.append(slot.number)
            slots.finish(storage, slot)

    threads = [threading.Thread(target=pull, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(60))


def test_a_lost_lease_frees_the_slot_and_fails_its_trial(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=60)
    trial_id = start_trial(storage, slot)
    assert reap(storage, study_id) == 0  # its lease still runs
    assert storage.get_trial(trial_id).state == TrialState.RUNNING
    assert slots.renew(storage, slot.claim, lease_s=0.05)
    time.sleep(0.1)
    assert reap(storage, study_id) == 1
    assert storage.get_trial(trial_id).state == TrialState.FAIL
    assert storage.get_trial(trial_id).datetime_complete is not None
    again = must_claim(storage, study_id)
    assert again.number == slot.number
    # The worker that was only frozen has lost it: it may not finish, renew or fail what another has.
    assert not slots.finish(storage, slot)
    assert not slots.renew(storage, slot.claim, lease_s=60)
    slots.fail(storage, slot, "late")
    slots.release(storage, slot)
    assert slots.finish(storage, again)


def test_a_claim_lost_before_its_trial_began_begins_none(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=0.01)
    time.sleep(0.05)
    reap(storage, study_id)
    again = must_claim(storage, study_id)
    with pytest.raises(ClaimLost):  # it would finish beside the other's: two trials in one slot
        start_trial(storage, slot)
    start_trial(storage, again)
    assert sum(study_rows.trial_states(storage, study_id).values()) == 1


def test_a_trial_told_before_the_death_counts(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=0.01)
    trial_id = start_trial(storage, slot)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    time.sleep(0.05)
    reap(storage, study_id)
    assert storage.get_trial(trial_id).state == TrialState.COMPLETE
    assert must_claim(storage, study_id).stage == CONFIRMATION  # the slot is done, no second trial runs in it


@pytest.mark.parametrize("give_back", [slots.release, lambda storage, slot: slots.fail(storage, slot, "no memory")])
@pytest.mark.parametrize("told", [False, True])
def test_what_is_given_back_leaves_no_trial_running_and_none_twice(
    storage: RetryingStorage, told: bool, give_back: Callable[[RetryingStorage, Slot], None]
) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id)
    trial_id = start_trial(storage, slot)
    if told:
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    give_back(storage, slot)
    assert storage.get_trial(trial_id).state == (TrialState.COMPLETE if told else TrialState.FAIL)
    assert must_claim(storage, study_id).stage == (CONFIRMATION if told else TRIAL)


def test_renewal_keeps_a_slow_slot(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    slot = must_claim(storage, study_id, lease_s=0.3)
    for _ in range(5):
        time.sleep(0.1)
        assert slots.renew(storage, slot.claim, lease_s=0.3)
        assert reap(storage, study_id) == 0
    assert slots.finish(storage, slot)


def test_three_failures_park_a_slot_and_a_new_run_tries_again(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    for _ in range(slots.MAX_FAILURES):
        slots.fail(storage, must_claim(storage, study_id), "the samples are NaN")
    assert must_claim(storage, study_id).stage == CONFIRMATION
    (parked,) = parked_slots(storage, study_id)
    assert (parked.stage, parked.number, parked.error) == (TRIAL, 0, "the samples are NaN")
    assert study_progress(storage)[study_id].parked == 1
    storage.transaction(lambda connection: slots.unpark(connection, study_id, at_once=True))
    assert must_claim(storage, study_id).stage == TRIAL


def a_day_passes(storage: RetryingStorage) -> None:
    aged = "update slots set lease_until = lease_until - interval '86401 seconds'"
    storage.transaction(lambda connection: connection.exec_driver_sql(aged))


def test_parked_work_is_left_alone_for_a_day(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    for kill in (False, True):  # by failures and by losses
        for _ in range(slots.MAX_LOSSES if kill else slots.MAX_FAILURES):
            slot = must_claim(storage, study_id, worker="w:1")
            if kill:
                slots.expire(storage, "w:1")
                slots.reap(storage, [study_id], lease_s=60)
            else:
                slots.fail(storage, slot, "no memory")
        assert not first_parked_slots(storage)[study_id].due
        assert storage.transaction(lambda connection: slots.unpark(connection, study_id)) == 0
        a_day_passes(storage)
        assert first_parked_slots(storage)[study_id].due
        assert storage.transaction(lambda connection: slots.unpark(connection, study_id)) == 1


def test_a_slot_that_kills_its_workers_is_parked(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=1)
    for _ in range(slots.MAX_LOSSES):
        slot = must_claim(storage, study_id, worker="host:7")
        assert slot.stage == TRIAL
        slots.expire(storage, "host:7")
        assert reap(storage, study_id) == 1
    (parked,) = parked_slots(storage, study_id)
    assert "workers died on it" in parked.error


def test_expire_touches_only_the_dead_workers_slots(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=2)
    dead, alive = must_claim(storage, study_id, "a:1"), must_claim(storage, study_id, "a:2")
    slots.expire(storage, "a:1")
    assert reap(storage, study_id) == 1
    assert slots.finish(storage, alive)
    assert must_claim(storage, study_id).number == dead.number


def test_a_raised_budget_adds_slots_and_asks_for_a_new_confirmation(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=2)
    while (slot := claim(storage, study_id)) is not None:
        slots.finish(storage, slot, result={"n": 2})

    def extend(connection) -> int:
        slots.reopen(connection, study_id, CONFIRMATION, params={})
        return slots.raise_budget(connection, study_id, 5)

    assert storage.transaction(extend) == 3
    assert storage.transaction(lambda c: slots.raise_budget(c, study_id, 4)) == 0  # never lowered
    stages = []
    while (slot := claim(storage, study_id)) is not None:
        stages.append(slot.stage)
        slots.finish(storage, slot)
    assert Counter(stages) == {TRIAL: 3, CONFIRMATION: 1}


def test_a_parked_study_is_given_up_with_its_reason(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=3)
    slots.finish(storage, must_claim(storage, study_id))
    slots.park_study(storage, study_id, "5 failures in a row: no memory")
    assert claim(storage, study_id) is None
    assert {p.error for p in parked_slots(storage, study_id)} == {"5 failures in a row: no memory"}


def test_claim_repeated_after_an_ambiguous_commit_is_the_same_slot(storage: RetryingStorage) -> None:
    study_id = make_study(storage, budget=5)
    runs = []
    transaction = storage.transaction

    def twice(run, **more):
        def both(connection):
            runs.append(run(connection))
            return run(connection)

        return transaction(both, **more)

    storage.transaction = twice  # type: ignore[method-assign]
    slot = must_claim(storage, study_id)
    storage.transaction = transaction  # type: ignore[method-assign]
    assert runs == [slot]
    busy = storage.transaction(lambda c: c.execute(text("select count(*) from slots where state = 'busy'")).scalar())
    assert busy == 1


def test_create_study_is_whole_or_not_at_all(storage: RetryingStorage) -> None:
    def broken(connection, study_id: int) -> None:
        slots.raise_budget(connection, study_id, 3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        study_rows.create_study(storage, "half", {"definition": {}}, "mae", broken)
    assert storage.get_all_studies() == []
    assert study_progress(storage) == {}


def test_eight_creators_make_one_study(storage: RetryingStorage) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(make_study(storage, budget=4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.direction.name == "MINIMIZE"
    assert study.metric_names == ["mae"]
    assert study_progress(storage)[found[0]].budget == 4
