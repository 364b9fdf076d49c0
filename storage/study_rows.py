"""Optuna's rows of studies and their trials: a study made or renamed, and what all studies are asked in one query."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import RetryingStorage

METRIC_NAMES = "study:metric_names"  # the system attribute behind Study.set_metric_names


# Where two processes make the same study, the second waits for the first and makes nothing.
CREATE = """
with made as (
    insert into studies (study_name) select name from unnest(cast(:names as text[])) as given (name)
    on conflict (study_name) do nothing returning study_id, study_name
), directions as (
    insert into study_directions (study_id, direction, objective)
    select study_id, case objective when 1 then 'MINIMIZE' else 'MAXIMIZE' end :: studydirection, objective - 1
    from made, generate_series(1, :objectives) as objective
), attrs as (
    insert into study_user_attributes (study_id, key, value_json)
    select study_id, key, value from made join unnest(
        cast(:attr_names as text[]), cast(:keys as text[]), cast(:values as text[])
    ) as given (name, key, value) on name = study_name
), metrics as (
    insert into study_system_attributes (study_id, key, value_json) select study_id, :metric_key, :metric from made
)
select study_name, study_id from made
"""


def create_studies(
    storage: RetryingStorage,
    wanted: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    fill: Callable[[Connection, Mapping[str, int]], None],
) -> dict[str, int]:
    """Make studies and, through `fill`, their slots in one transaction: all or none.

    wanted: the user attributes of each, by its name. metrics: what the values of a trial are called; the first is
    minimised, others are maximised. fill: gets the ids of those that are made, by name.
    Returns the id of each by name, also of those that are there already. Raises DatabaseUnavailable.
    """
    names = sorted(wanted)  # two processes at the same studies wait for each other, in place of a deadlock
    attrs = [(name, key, json.dumps(value)) for name in names for key, value in wanted[name].items()]
    values: dict[str, Any] = {"names": names, "metric_key": METRIC_NAMES, "metric": json.dumps(list(metrics))}
    values["objectives"] = len(metrics)
    values |= {key: [row[n] for row in attrs] for n, key in enumerate(("attr_names", "keys", "values"))}
    found = text("select study_name, study_id from studies where study_name = any(:names)")

    def create(connection: Connection) -> dict[str, int]:
        made = {row.study_name: row.study_id for row in connection.execute(text(CREATE), values)}
        fill(connection, made)
        return {row.study_name: row.study_id for row in connection.execute(found, {"names": names})}

    return storage.transaction(create)


def create_study(
    storage: RetryingStorage,
    name: str,
    user_attrs: Mapping[str, Any],
    metric: str,
    fill: Callable[[Connection, int], None],
) -> int:
    """Make one study of one metric as `create_studies` does. Returns its id."""

    def fill_it(connection: Connection, made: Mapping[str, int]) -> None:
        for study_id in made.values():
            fill(connection, study_id)

    return create_studies(storage, {name: user_attrs}, [metric], fill_it)[name]


def rename_study(storage: RetryingStorage, name: str, new_name: str) -> bool:
    """False where there is no study of that name, or one of the new name already."""
    statement = text(
        "update studies set study_name = :new_name where study_name = :name "
        "and not exists (select 1 from studies where study_name = :new_name)"
    )
    return storage.transaction(lambda c: c.execute(statement, {"name": name, "new_name": new_name}).rowcount == 1)


BEST_MAE = """
select t.study_id, min(v.value) as mae from trials t join trial_values v using (trial_id)
where t.state = 'COMPLETE' and v.objective = 0
  and (cast(:study_ids as integer[]) is null or t.study_id = any(:study_ids))
group by t.study_id
"""

BEST_TRIALS = """
select t.trial_id, t.number, v.value from trials t join trial_values v using (trial_id)
where t.study_id = :study_id and t.state = 'COMPLETE' and v.objective = 0 order by v.value, t.number limit :count
"""

EFFORTS = """
select t.study_id,
       sum(extract(epoch from t.datetime_complete - t.datetime_start))::float as seconds,
       min(extract(epoch from t.datetime_start))::float as first,
       max(extract(epoch from t.datetime_complete))::float as last,
       array_agg(distinct a.value_json) as workers
from trials t left join trial_user_attributes a on a.trial_id = t.trial_id and a.key = 'worker'
where t.datetime_complete is not null and t.datetime_start is not null and t.study_id = any(:study_ids)
group by t.study_id
"""

STATES = "select state::text, count(*) from trials where study_id = :study_id group by state order by state"


def best_values(storage: RetryingStorage, study_ids: Iterable[int] | None = None) -> dict[int, float]:
    """The smallest first value of every study, or of these, that has a complete trial, by study id, in one query."""
    values = {"study_ids": None if study_ids is None else list(study_ids)}
    return {row.study_id: row.mae for row in storage.transaction(lambda c: c.execute(text(BEST_MAE), values).all())}


def best_trials(storage: RetryingStorage, study_id: int, count: int) -> list[FrozenTrial]:
    """The complete trials with the smallest first values, best first; of equal ones the earlier."""
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


def efforts(storage: RetryingStorage, study_ids: Iterable[int]) -> dict[int, Effort]:
    """The effort of those of these studies that have an ended trial, by study id, in one query."""
    values = {"study_ids": list(study_ids)}
    rows = storage.transaction(lambda c: c.execute(text(EFFORTS), values).all())
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
