"""Optuna's rows of a trial: made, read and written in one statement each, to the effect of Optuna's own storage.

Optuna goes through ORM objects, attribute by attribute: measured 155 statements and 0.2 s of CPU for a trial with ten
reports. Knows Optuna's tables. Knows nothing of lost connections, of slots or of what a trial measures.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialValueModel
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import text
from sqlalchemy.engine import Connection, Row

CLAIM_ATTR = "claim"  # trial system attribute: which claim of a slot made this trial
SPECIAL = {"INF_POS": float("inf"), "INF_NEG": float("-inf"), "NAN": float("nan")}  # have no number beside them

# A trial has a handful of distributions, the same ones all study long: reading them anew was half of a read.
distribution_from_json = lru_cache(maxsize=4096)(json_to_distribution)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is to be written to a trial. Params in Optuna's internal representation, attributes as JSON."""

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user_attrs: dict[str, str] = field(default_factory=dict)
    system_attrs: dict[str, str] = field(default_factory=dict)
    reports: dict[int, float] = field(default_factory=dict)  # intermediate values by step

    @staticmethod
    def of(trial: FrozenTrial) -> Changes:
        """All that a trial holds, but for its values."""
        return Changes(
            params={
                name: (distribution.to_internal_repr(trial.params[name]), distribution)
                for name, distribution in trial.distributions.items()
            },
            user_attrs={key: json.dumps(value) for key, value in trial.user_attrs.items()},
            system_attrs={key: json.dumps(value) for key, value in trial.system_attrs.items()},
            reports=dict(trial.intermediate_values),
        )

    def apply(self, trial: FrozenTrial) -> None:
        """Make a trial as read what it will be when these are written. What was there first stays, as in Optuna."""
        for name, (value, distribution) in self.params.items():
            trial.params.setdefault(name, distribution.to_external_repr(value))
            trial.distributions.setdefault(name, distribution)
        trial.user_attrs.update({key: json.loads(value) for key, value in self.user_attrs.items()})
        trial.system_attrs.update({key: json.loads(value) for key, value in self.system_attrs.items()})
        trial.intermediate_values.update(self.reports)

    def add(self, later: Changes) -> None:
        """Take in what was set later."""
        for name, param in later.params.items():
            self.params.setdefault(name, param)
        self.user_attrs.update(later.user_attrs)
        self.system_attrs.update(later.system_attrs)
        self.reports.update(later.reports)


# The rows of a trial, after a CTE `open` that holds its id, or nothing where it must not be written.
CONTENTS = """
params as (
    insert into trial_params (trial_id, param_name, param_value, distribution_json)
    select trial_id, name, value, distribution from open, unnest(
        cast(:param_names as text[]), cast(:param_values as float8[]), cast(:param_distributions as text[])
    ) with ordinality as given (name, value, distribution, place) order by place
    on conflict do nothing
), user_attrs as (
    insert into trial_user_attributes (trial_id, key, value_json)
    select trial_id, key, value from open, unnest(
        cast(:user_keys as text[]), cast(:user_values as text[])) as given (key, value)
    on conflict (trial_id, key) do update set value_json = excluded.value_json
), system_attrs as (
    insert into trial_system_attributes (trial_id, key, value_json)
    select trial_id, key, value from open, unnest(
        cast(:system_keys as text[]), cast(:system_values as text[])) as given (key, value)
    on conflict (trial_id, key) do update set value_json = excluded.value_json
), reports as (
    insert into trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    select trial_id, step, value, kind from open, unnest(
        cast(:steps as integer[]), cast(:reports as float8[]), cast(:report_kinds as trialintermediatevaluetype[])
    ) with ordinality as given (step, value, kind, place) order by place
    on conflict (trial_id, step) do update set
        intermediate_value = excluded.intermediate_value, intermediate_value_type = excluded.intermediate_value_type
), told as (
    insert into trial_values (trial_id, objective, value, value_type)
    select trial_id, objective - 1, value, kind from open, unnest(
        cast(:values as float8[]), cast(:value_kinds as trialvaluetype[])
    ) with ordinality as given (value, kind, objective)
    on conflict (trial_id, objective) do update set value = excluded.value, value_type = excluded.value_type
)
"""

# Optuna's own creation takes the same lock: numbers have no gap and no repeat, whoever creates.
LOCK_STUDY = text("select study_id from studies where study_id = :study_id for update")
# And, for a trial of a claim, the claim too: who lost it while frozen must not begin, for nobody would end the trial.
LOCK_CLAIM = text(
    "select study_id from studies join slots using (study_id) "
    "where study_id = :study_id and claim = :claim and slots.state = 'busy' for update"
)
OF_CLAIM = text(
    "select t.trial_id from trials t join trial_system_attributes a using (trial_id) "
    "where t.study_id = :study_id and a.key = :key and a.value_json = :claim"
)
CREATE = text(
    "\n".join(
        (
            "with open as (",
            "    insert into trials (number, study_id, state, datetime_start, datetime_complete)",
            "    select count(*), :study_id, cast(:state as trialstate),",
            "           cast(:started as timestamp), cast(:completed as timestamp)",
            "    from trials where study_id = :study_id",
            "    returning trial_id, number",
            "),",
            CONTENTS,
            "select trial_id, number from open",
        )
    )
)

# The lock orders this with whoever else ends the trial; a finished one is left as it is.
WRITE = text(
    "\n".join(
        (
            "with found as (select trial_id, state from trials where trial_id = :trial_id for update),",
            "open as (select trial_id from found where state in ('RUNNING', 'WAITING')),",
            CONTENTS,
            ", ended as (",
            "    update trials t set state = coalesce(cast(:state as trialstate), t.state),",
            "                        datetime_complete = cast(:completed as timestamp)",
            "    from open where t.trial_id = open.trial_id and cast(:state as trialstate) is not null",
            ") select state::text from found",
        )
    )
)

COLUMNS = """
select t.trial_id, t.number, t.state::text as state, t.datetime_start as started, t.datetime_complete as completed,
    (select json_agg(json_build_array(param_name, param_value, distribution_json) order by param_id)
     from trial_params where trial_id = t.trial_id) as params,
    (select json_agg(json_build_array(key, value_json))
     from trial_user_attributes where trial_id = t.trial_id) as user_attrs,
    (select json_agg(json_build_array(key, value_json))
     from trial_system_attributes where trial_id = t.trial_id) as system_attrs,
    (select json_agg(json_build_array(step, intermediate_value, intermediate_value_type) order by step)
     from trial_intermediate_values where trial_id = t.trial_id) as reports,
    (select json_agg(json_build_array(value, value_type) order by objective)
     from trial_values where trial_id = t.trial_id) as told
from trials t
"""

READ_ONE = text(COLUMNS + "where t.trial_id = :trial_id")
READ_SOME = text(
    COLUMNS + "where t.study_id = :study_id and (t.trial_id > :after or t.trial_id = any(cast(:ids as integer[]))) "
    "and (cast(:states as text[]) is null or t.state::text = any(cast(:states as text[]))) order by t.trial_id"
)

ANY_DISTRIBUTION = text(
    "select p.distribution_json from trials own join trials t using (study_id) "
    "join trial_params p on p.trial_id = t.trial_id "
    "where own.trial_id = :trial_id and p.param_name = :param_name limit 1"
)


def create(
    connection: Connection,
    study_id: int,
    template: FrozenTrial | None,
    *,
    claim: str | None = None,
    again: bool = False,
) -> FrozenTrial | None:
    """Make a trial like the template (none: a running one without contents). None: there is no such study.

    claim: make it only while this claim of a slot is held; None is then returned also where it is lost.
    again: an earlier attempt broke off; where that was committed meanwhile, its trial is returned.
    Two statements: the second must see what was committed while the first waited for the lock.
    """
    lock, values = LOCK_STUDY, {"study_id": study_id}
    if claim is not None:
        lock, values = LOCK_CLAIM, {"study_id": study_id, "claim": claim}
    if connection.execute(lock, values).first() is None:
        return None
    if again and claim is not None:
        made = connection.execute(OF_CLAIM, {**values, "key": CLAIM_ATTR, "claim": json.dumps(claim)}).scalar()
        if made is not None:
            return read_one(connection, made)
    trial = copy.deepcopy(template) if template else create_trial(state=TrialState.RUNNING)
    values = {
        "study_id": study_id,
        "state": trial.state.name,
        "started": _stored_time(trial.datetime_start),
        "completed": _stored_time(trial.datetime_complete),
        **_contents(Changes.of(trial), trial.values or ()),
    }
    trial._trial_id, trial.number = connection.execute(CREATE, values).one()
    return trial


def write(
    connection: Connection,
    trial_id: int,
    changes: Changes,
    end: TrialState | None = None,
    values: Sequence[float] = (),
) -> TrialState | None:
    """Write to a trial, and end it where `end` is given; returns the state that it was in. None: no such trial.

    Nothing is written to a trial that had ended.
    """
    bound = {
        "trial_id": trial_id,
        "state": end and end.name,
        "completed": _stored_time(datetime.now()),
        **_contents(changes, values),
    }
    state = connection.execute(WRITE, bound).scalar()
    return None if state is None else TrialState[state]


def read_one(connection: Connection, trial_id: int) -> FrozenTrial | None:
    """A trial by its id."""
    row = connection.execute(READ_ONE, {"trial_id": trial_id}).first()
    return None if row is None else _trial(row)


def as_read(trial: FrozenTrial) -> FrozenTrial:
    """A running trial that `create` has made, as a reader finds it: its attributes have been JSON."""
    found = copy.copy(trial)
    found.user_attrs, found.system_attrs = (
        json.loads(json.dumps(each)) for each in (trial.user_attrs, trial.system_attrs)
    )
    return found


def read_some(
    connection: Connection, study_id: int, *, after: int, ids: Collection[int], states: Iterable[TrialState] | None
) -> list[FrozenTrial]:
    """The trials of a study with an id above `after` or among `ids`, by id; in the states, where they are given."""
    values = {
        "study_id": study_id,
        "after": after,
        "ids": list(ids),
        "states": None if states is None else [state.name for state in states],
    }
    return [_trial(row) for row in connection.execute(READ_SOME, values)]


def any_distribution(connection: Connection, trial_id: int, param_name: str) -> BaseDistribution | None:
    """What a param was drawn from in some trial of the same study."""
    found = connection.execute(ANY_DISTRIBUTION, {"trial_id": trial_id, "param_name": param_name}).scalar()
    return None if found is None else distribution_from_json(found)


def _contents(changes: Changes, values: Sequence[float]) -> dict[str, Any]:
    """What CONTENTS binds."""
    reports = [TrialIntermediateValueModel.intermediate_value_to_stored_repr(v) for v in changes.reports.values()]
    told = [TrialValueModel.value_to_stored_repr(value) for value in values]
    return {
        "param_names": list(changes.params),
        "param_values": [value for value, _ in changes.params.values()],
        "param_distributions": [distribution_to_json(each) for _, each in changes.params.values()],
        "user_keys": list(changes.user_attrs),
        "user_values": list(changes.user_attrs.values()),
        "system_keys": list(changes.system_attrs),
        "system_values": list(changes.system_attrs.values()),
        "steps": list(changes.reports),
        "reports": [value for value, _ in reports],
        "report_kinds": [kind.name for _, kind in reports],
        "values": [value for value, _ in told],
        "value_kinds": [kind.name for _, kind in told],
    }


def _trial(row: Row[Any]) -> FrozenTrial:
    params = [(name, float(value), distribution_from_json(text)) for name, value, text in row.params or ()]
    values = [SPECIAL[kind] if kind in SPECIAL else float(value) for value, kind in row.told or ()]
    return FrozenTrial(
        number=row.number,
        state=TrialState[row.state],
        value=None,
        values=values or None,
        datetime_start=_local_time(row.started),
        datetime_complete=_local_time(row.completed),
        params={name: distribution.to_external_repr(value) for name, value, distribution in params},
        distributions={name: distribution for name, _, distribution in params},
        user_attrs={key: json.loads(value) for key, value in row.user_attrs or ()},
        system_attrs={key: json.loads(value) for key, value in row.system_attrs or ()},
        intermediate_values={
            step: SPECIAL[kind] if kind in SPECIAL else float(value) for step, value, kind in row.reports or ()
        },
        trial_id=row.trial_id,
    )


# Optuna keeps naive UTC in the database and naive local time in a FrozenTrial.


def _stored_time(local: datetime | None) -> datetime | None:
    return local and local.astimezone(UTC).replace(tzinfo=None)


def _local_time(stored: datetime | None) -> datetime | None:
    return stored and stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
