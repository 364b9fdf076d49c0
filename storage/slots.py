"""The budget: one row per unit of work, claimed, leased, fenced.

A study's work is rows in three stages: baselines (configurations measured beside the search), trials (the budget),
and one confirmation, which may be done in shares: rows of a stage of their own, see shares.py.
A row is done at most once, whatever dies; so a budget of N ends with exactly N finished trials.
A row that is parked is left alone until its `lease_until`; the next run after that tries it again.
Every function that takes a storage raises DatabaseUnavailable where the server stays away for longer than its wait_s.
Knows the rows of Optuna's `trials` table that a claim made. Knows nothing of what the work is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import CLAIM_ATTR, RetryingStorage

# Stages, in the order in which they are worked; but for a share, which comes between two claims of its confirmation.
BASELINE, TRIAL, CONFIRMATION, SHARE = 0, 1, 2, 3

MAX_FAILURES = 3  # after three failures the cause is the slot's own work, not chance
MAX_LOSSES = 10  # worker deaths are usually unrelated to the slot; ten in a row are not
PARKED_S = 86_400.0  # a cause that was not chance is seldom gone within a day


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A claimed unit of work."""

    study_id: int
    stage: int
    number: int
    label: str | None
    params: Mapping[str, Any] | None  # fixed params; None: the sampler proposes
    claim: str  # the fence: only the claim that is on the row may finish it


@dataclass(frozen=True, kw_only=True)
class NewSlot:
    """A row to insert."""

    study_id: int
    stage: int
    number: int
    label: str | None = None
    params: Mapping[str, Any] | None = None


def add_all(connection: Connection, rows: Sequence[NewSlot]) -> None:
    """Insert rows in one statement. Those that exist already are left as they are."""
    connection.execute(
        text(
            "insert into slots (study_id, stage, number, label, params) "
            "select study_id, stage, number, label, cast(params as jsonb) from unnest("
            "cast(:study_ids as integer[]), cast(:stages as integer[]), cast(:numbers as integer[]), "
            "cast(:labels as text[]), cast(:params as text[])) as given (study_id, stage, number, label, params) "
            "on conflict do nothing"
        ),
        {
            "study_ids": [row.study_id for row in rows],
            "stages": [row.stage for row in rows],
            "numbers": [row.number for row in rows],
            "labels": [row.label for row in rows],
            "params": [None if row.params is None else json.dumps(row.params) for row in rows],
        },
    )


def add(connection: Connection, study_id: int, stage: int, number: int, **more: Any) -> None:
    """Insert one row, with what else a NewSlot has. A row that exists already is left as it is."""
    add_all(connection, [NewSlot(study_id=study_id, stage=stage, number=number, **more)])


def raise_budgets(connection: Connection, study_ids: Iterable[int], budget: int) -> int:
    """Insert trial slots of studies up to `budget` and return the number of new ones. A budget is never lowered."""
    return connection.execute(
        text(
            "insert into slots (study_id, stage, number) "
            "select study_id, :stage, n from unnest(cast(:study_ids as integer[])) study_id, "
            "generate_series(0, :budget - 1) n on conflict do nothing"
        ),
        {"study_ids": list(study_ids), "stage": TRIAL, "budget": budget},
    ).rowcount


def raise_budget(connection: Connection, study_id: int, budget: int) -> int:
    """As `raise_budgets`, of one study."""
    return raise_budgets(connection, [study_id], budget)


def reopen(connection: Connection, study_id: int, stage: int, *, params: Any) -> None:
    """Make all rows of a stage free again, with new params, whether they are done, parked or under way.

    Of a confirmation, the shares that nobody works on go: whoever claims it next makes those that it needs.
    """
    if stage == CONFIRMATION:
        connection.execute(
            text("delete from slots where study_id = :study_id and stage = :share and state in ('free', 'parked')"),
            {"study_id": study_id, "share": SHARE},
        )
    connection.execute(
        text(
            "update slots set state = 'free', claim = null, lease_until = null, result = null, "
            "params = cast(:params as jsonb) where study_id = :study_id and stage = :stage"
        ),
        {"study_id": study_id, "stage": stage, "params": json.dumps(params)},
    )


def open_trials(connection: Connection, study_id: int) -> int:
    """Return the number of baselines and trials that are free or under way."""
    statement = text(
        "select count(*) from slots where study_id = :study_id and stage < :confirmation and state in ('free', 'busy')"
    )
    return connection.execute(statement, {"study_id": study_id, "confirmation": CONFIRMATION}).scalar_one()


def unpark(connection: Connection, study_id: int, *, at_once: bool = False) -> int:
    """Free the parked rows of a study for a new run, with their counts at zero, and return their number.

    at_once: also those that are to be left alone for a while yet.
    """
    return connection.execute(
        text(
            "update slots set state = 'free', failures = 0, losses = 0, lease_until = null "
            "where study_id = :study_id and state = 'parked' "
            "and (:at_once or coalesce(lease_until, '-infinity') <= now())"
        ),
        {"study_id": study_id, "at_once": at_once},
    ).rowcount


def claim(storage: RetryingStorage, study_id: int, *, worker: str, lease_s: float) -> Slot | None:
    """Claim the next free row of a study for `lease_s` seconds, or return None where there is none.

    The confirmation and its shares can be claimed only once every baseline and trial is done or parked, and the
    confirmation only while none of its shares is left to do. Raises DatabaseUnavailable.
    """
    token = f"{worker}:{secrets.token_hex(8)}"
    values = {
        "study_id": study_id,
        "claim": token,
        "worker": worker,
        "lease_s": lease_s,
    }

    def take(connection: Connection) -> Slot | None:
        row = connection.execute(text(CLAIM), values).first()
        return None if row is None else Slot(study_id=study_id, claim=token, **row._mapping)

    # A claim that a crash undoes is lost before anything is done for it: a trial that it makes is durable with it.
    return storage.transaction(take, durable=False)


# Whether a free row s can be claimed.
READY = f"""
(s.stage < {CONFIRMATION} or not exists (
    select 1 from slots o where o.study_id = s.study_id and o.state in ('free', 'busy')
    and (o.stage < {CONFIRMATION} or (o.stage = {SHARE} and s.stage = {CONFIRMATION}))))
"""  # noqa: S608 - no values
# An attempt that broke may have got a row already: then it is that one.
CLAIM = f"""
with held as (select study_id, stage, number from slots where claim = :claim),
found as (
    select study_id, stage, number from slots s
    where not exists (select 1 from held) and study_id = :study_id and state = 'free' and {READY}
    order by stage, stage = {SHARE} and worker is distinct from :worker, number limit 1 for update skip locked)
update slots set state = 'busy', claim = :claim, worker = :worker,
                 lease_until = now() + make_interval(secs => :lease_s)
where (study_id, stage, number) in (select * from held union all select * from found)
returning stage, number, label, params
"""  # noqa: S608 - no values


def renew(storage: RetryingStorage, claim: str, *, lease_s: float) -> bool:
    """Extend the lease of a claim; False where the claim was lost. Raises DatabaseUnavailable."""
    statement = text(
        "update slots set lease_until = now() + make_interval(secs => :lease_s) where claim = :claim and state = 'busy'"
    )
    return storage.transaction(lambda c: c.execute(statement, {"claim": claim, "lease_s": lease_s}).rowcount == 1)


def finish(
    storage: RetryingStorage,
    slot: Slot,
    *,
    result: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> bool:
    """Mark a claimed row done; False where the claim was lost (then somebody else does, or did, the work).

    With a confirmation its shares go. seconds: the worker's time by what it was spent on. Raises DatabaseUnavailable.
    """
    return storage.transaction(lambda connection: finish_within(connection, slot, result=result, seconds=seconds))


def finish_within(
    connection: Connection,
    slot: Slot,
    *,
    result: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> bool:
    """`finish` as part of a transaction."""
    statement = text(
        "update slots set state = 'done', lease_until = null, error = null, result = cast(:result as jsonb), "
        "seconds = cast(:seconds as jsonb), progress = null where claim = :claim and state in ('busy', 'done')"
    )
    values = {
        "claim": slot.claim,
        "result": None if result is None else json.dumps(result),
        "seconds": None if seconds is None else json.dumps(seconds),
    }
    done = connection.execute(statement, values).rowcount == 1
    if done and slot.stage == CONFIRMATION:
        shared = text("delete from slots where study_id = :study_id and stage = :share")
        connection.execute(shared, {"study_id": slot.study_id, "share": SHARE})
    return done


def release(storage: RetryingStorage, slot: Slot) -> None:
    """Free a claimed row whose work was not finished; its running trial fails, while a finished one counts as done.

    Raises DatabaseUnavailable.
    """
    freed = text("update slots set state = 'free', claim = null, lease_until = null where claim = :claim")
    storage.transaction(lambda c: _give_back(c, slot) and c.execute(freed, {"claim": slot.claim}))


def fail(storage: RetryingStorage, slot: Slot, error: str) -> None:
    """Count a failure of a claimed row, whose trial ends as in `release`; the third parks the row with its error.

    With a share its confirmation is parked. Raises DatabaseUnavailable.
    """
    failed = text(
        "update slots set failures = failures + 1, error = :error, claim = null, "
        "lease_until = case when failures + 1 >= :limit then now() + make_interval(secs => :parked_s) end, "
        "state = case when failures + 1 >= :limit then 'parked' else 'free' end where claim = :claim"
    )
    values = {"claim": slot.claim, "error": error, "limit": MAX_FAILURES, "parked_s": PARKED_S}

    def count(connection: Connection) -> None:
        if _give_back(connection, slot):
            connection.execute(failed, values)
            if slot.stage == SHARE:
                _park_confirmation(connection, slot.study_id)

    storage.transaction(count)


def _park_confirmation(connection: Connection, study_id: int) -> None:
    """Park a confirmation of which a share is parked, with its reason and for as long."""
    statement = text(
        "update slots c set state = 'parked', error = s.error, lease_until = s.lease_until from slots s "
        "where (c.study_id, c.stage, c.state) = (:study_id, :confirmation, 'free') "
        "and (s.study_id, s.stage, s.state) = (:study_id, :share, 'parked')"
    )
    connection.execute(statement, {"study_id": study_id, "confirmation": CONFIRMATION, "share": SHARE})


def _give_back(connection: Connection, slot: Slot) -> bool:
    """End the trial of a row that its worker gives back; False where the row is done with it, or no longer held."""
    held = text("select 1 from slots where claim = :claim and state = 'busy' for update")
    done = text("update slots set state = 'done', lease_until = null where claim = :claim")
    if connection.execute(held, {"claim": slot.claim}).first() is None:
        return False
    finished = slot.stage == TRIAL and _fail_orphans(connection, slot.study_id, slot.claim)
    if finished:
        connection.execute(done, {"claim": slot.claim})
    return not finished


def park_study(storage: RetryingStorage, study_id: int, error: str, *, parked_s: float = PARKED_S) -> None:
    """Park every free row of a study with the reason. Raises DatabaseUnavailable.

    parked_s: how long later runs leave it alone; 0 where they see for themselves whether the cause is gone.
    """
    statement = text(
        "update slots set state = 'parked', error = :error, lease_until = now() + make_interval(secs => :parked_s) "
        "where study_id = :study_id and state = 'free'"
    )
    values = {"study_id": study_id, "error": error, "parked_s": parked_s}
    storage.transaction(lambda c: c.execute(statement, values))


def expire(storage: RetryingStorage, worker: str) -> None:
    """End the leases of a worker that is known to be dead. Raises DatabaseUnavailable."""
    statement = text("update slots set lease_until = '-infinity' where worker = :worker and state = 'busy'")
    storage.transaction(lambda c: c.execute(statement, {"worker": worker}))


def reap(storage: RetryingStorage, study_ids: Iterable[int], *, lease_s: float, wait_s: float | None = None) -> int:
    """Free the rows whose lease ran out, fail the trials that their workers left, and return the number of rows.

    lease_s: the length of a lease. Nobody could renew one while the server was away, so leases that ran out count only
    once the server has been up for this long; those that `expire` ended count at once.
    wait_s: how long to wait for the server, by default as long as every call does.
    A row that has lost its tenth worker is parked, and with a share its confirmation. Raises DatabaseUnavailable.
    """
    values = {"study_ids": list(study_ids), "lease_s": lease_s}

    def free_expired(connection: Connection) -> int:
        expired = connection.execute(text(EXPIRED), values).all()
        for row in expired:
            finished = row.stage == TRIAL and _fail_orphans(connection, row.study_id, row.claim)
            state = "done" if finished else "parked" if row.losses + 1 >= MAX_LOSSES else "free"
            connection.execute(
                text(
                    "update slots set state = :state, losses = losses + 1, "
                    "lease_until = case when :state = 'parked' then now() + make_interval(secs => :parked_s) end, "
                    "claim = case when :state = 'done' then claim end, "
                    "error = case when :state = 'parked' then :error else error end "
                    "where study_id = :study_id and stage = :stage and number = :number"
                ),
                {
                    "study_id": row.study_id,
                    "stage": row.stage,
                    "number": row.number,
                    "state": state,
                    "parked_s": PARKED_S,
                    "error": f"{MAX_LOSSES} workers died on it, the last was {row.worker}",
                },
            )
            if row.stage == SHARE:
                _park_confirmation(connection, row.study_id)
        return len(expired)

    return storage.transaction(free_expired, wait_s=wait_s)


EXPIRED = """
select study_id, stage, number, claim, worker, losses from slots
where study_id = any(:study_ids) and state = 'busy' and lease_until < now()
  and (lease_until = '-infinity' or now() - pg_postmaster_start_time() > make_interval(secs => :lease_s))
order by study_id, stage, number for update skip locked
"""


def _fail_orphans(connection: Connection, study_id: int, claim: str) -> bool:
    """Fail the RUNNING trials of a lost claim; True where the claim had finished its trial before it was lost."""
    trials = connection.execute(
        text(
            "select t.trial_id, t.state::text as state from trials t "
            "join trial_system_attributes a on a.trial_id = t.trial_id and a.key = :key and a.value_json = :claim "
            "where t.study_id = :study_id for update of t"
        ),
        {"study_id": study_id, "key": CLAIM_ATTR, "claim": json.dumps(claim)},
    ).all()
    for trial in trials:
        if trial.state == "RUNNING":
            connection.execute(
                text(
                    "update trials set state = 'FAIL', datetime_complete = now() at time zone 'utc' "
                    "where trial_id = :trial_id"
                ),
                {"trial_id": trial.trial_id},
            )
    return any(trial.state in ("COMPLETE", "PRUNED") for trial in trials)


def add_seconds(storage: RetryingStorage, slot: Slot, seconds: Mapping[str, float]) -> None:
    """Add to the worker's time that a finished row records, of a share its confirmation. Raises DatabaseUnavailable."""
    row = "claim = :claim" if slot.stage < CONFIRMATION else "study_id = :study_id and stage = :confirmation"
    held = text(f"select seconds from slots where {row} and state = 'done' for update")  # noqa: S608 - no values
    statement = text(f"update slots set seconds = cast(:seconds as jsonb) where {row}")  # noqa: S608 - no values
    values = {"claim": slot.claim, "study_id": slot.study_id, "confirmation": CONFIRMATION}

    def add_up(connection: Connection) -> None:
        if (found := connection.execute(held, values).first()) is not None:
            known = found.seconds or {}
            total = {name: known.get(name, 0.0) + seconds.get(name, 0.0) for name in {**known, **seconds}}
            connection.execute(statement, {**values, "seconds": json.dumps(total)})

    storage.transaction(add_up)
