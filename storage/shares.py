"""The shares of a study's confirmation: rows of the budget by which several workers do it together.

A share is some steps of the work, and the first of them is its number. It is claimed, leased, fenced and ended as every
row of slots.py. Its label is the key of the plan that it belongs to, which is kept on the row of the confirmation.
Shares are made by whoever holds that row, and go with its end.
Every function raises DatabaseUnavailable where the server stays away for longer than the storage's wait_s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import RetryingStorage
from storage.slots import CONFIRMATION, SHARE, Slot


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How far a confirmation is."""

    plan: Mapping[str, Any] | None  # what was planned, with the `key` of its shares; None: nothing yet
    results: Mapping[int, Any]  # by step, of the plan's shares that are done
    seconds: Mapping[str, float]  # of the workers, by what they were spent on, in all of these


@dataclass(frozen=True, kw_only=True)
class NewShare:
    """A share to be done, or that is done already."""

    steps: Sequence[int]
    result: Mapping[int, Any] | None = None  # by step; None: it is to be done
    after: int | None = None  # a step of another, whose worker keeps in memory what this one needs


def read(storage: RetryingStorage, study_id: int, *, before: int | None = None) -> Shares:
    """The plan of a study's confirmation, and its shares that are done.

    before: the number of a share: of those before it only the ones that the plan says all others have `needed`.
    """
    planned = text("select progress from slots where study_id = :study_id and stage = :confirmation")
    done = text(
        "select number, result, seconds from slots "
        "where study_id = :study_id and stage = :share and state = 'done' and label = :key "
        "and (cast(:end as integer) is null or number < :end)"
    )
    values = {"study_id": study_id, "confirmation": CONFIRMATION, "share": SHARE}

    def look(connection: Connection) -> Shares:
        plan = connection.execute(planned, values).scalar()
        if plan is None:
            return Shares(plan=None, results={}, seconds={})
        end = None if before is None else min(before, plan.get("needed", before))
        rows = connection.execute(done, {**values, "key": plan["key"], "end": end}).all()
        seconds: dict[str, float] = {}
        for row in rows:
            for name, spent in (row.seconds or {}).items():
                seconds[name] = seconds.get(name, 0.0) + spent
        results = {int(step): found for row in rows for step, found in row.result.items()}
        return Shares(plan=plan, results=results, seconds=seconds)

    return storage.transaction(look)


def share_out(storage: RetryingStorage, slot: Slot, plan: Mapping[str, Any], shares: Sequence[NewShare]) -> bool:
    """Give a claimed confirmation back with its plan, and make these shares; False where the claim was lost.

    Shares of the same plan that exist stay as they are, those of others go. plan: JSON values with the `key`.
    """
    held = text("select worker from slots where claim = :claim and state = 'busy' for update")
    outdated = text(
        "delete from slots where study_id = :study_id and stage = :share and (label <> :key or state = 'parked')"
    )
    freed = text(
        "update slots set state = 'free', claim = null, lease_until = null, progress = cast(:plan as jsonb) "
        "where claim = :claim"
    )
    values = {
        "study_id": slot.study_id,
        "claim": slot.claim,
        "share": SHARE,
        "key": plan["key"],
        "plan": json.dumps(plan),
        "numbers": [one.steps[0] for one in shares],
        "params": [json.dumps({"steps": list(one.steps)}) for one in shares],
        "results": [None if one.result is None else json.dumps(one.result) for one in shares],
        "after": [one.after for one in shares],
    }

    def make(connection: Connection) -> bool:
        if (row := connection.execute(held, values).first()) is None:
            return False
        connection.execute(outdated, values)
        connection.execute(text(MAKE), {**values, "worker": row.worker})
        connection.execute(freed, values)
        return True

    return storage.transaction(make)


MAKE = """
insert into slots (study_id, stage, number, label, params, result, state, worker)
select :study_id, :share, given.number, :key, cast(given.params as jsonb), cast(given.result as jsonb),
       case when given.result is null then 'free' else 'done' end,
       case when given.result is null then before.worker else :worker end
from unnest(cast(:numbers as integer[]), cast(:params as text[]), cast(:results as text[]), cast(:after as integer[]))
     as given (number, params, result, after)
left join slots before on before.study_id = :study_id and before.stage = :share
     and before.params->'steps' @> to_jsonb(given.after)
on conflict do nothing
"""


def discard(storage: RetryingStorage, slot: Slot) -> bool:
    """Delete the shares of a claimed share's plan; False where others are at work on them, or the claim was lost."""
    statement = text(
        "delete from slots where study_id = :study_id and stage = :share and label = :key "
        "and exists (select 1 from slots where claim = :claim and state = 'busy') and not exists ("
        "select 1 from slots o where o.study_id = :study_id and o.stage = :share and o.label = :key "
        "and o.state = 'busy' and o.claim <> :claim and o.lease_until > now())"
    )
    values = {"study_id": slot.study_id, "share": SHARE, "key": slot.label, "claim": slot.claim}
    return storage.transaction(lambda c: c.execute(statement, values).rowcount > 0)
