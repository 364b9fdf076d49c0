"""Optuna's rows of studies and their trials: a study made or renamed, and what all studies are asked in one query."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from storage.retrying import RetryingStorage

METRIC_NAMES = "study:metric_names"  # the system attribute behind Study.set_metric_names


def create_study(
    storage: RetryingStorage,
    name: str,
    user_attrs: dict[str, Any],
    metric: str,
    fill: Callable[[Connection, int], None],
) -> int:
    """Make a minimising study with its attributes and, through `fill`, its slots in one transaction: whole or not.

    Returns the id of the study that is there already where another process was first.
    """

    def create(connection: Connection) -> int:
        connection.execute(text("select pg_advisory_xact_lock(:key, hashtext(:name))"), {"key": 1, "name": name})
        found = connection.execute(text("select study_id from studies where study_name = :name"), {"name": name})
        study_id = found.scalar()
        if study_id is not None:
            return study_id
        with Session(connection) as session:
            study = models.StudyModel(
                study_name=name,
                directions=[models.StudyDirectionModel(objective=0, direction=StudyDirection.MINIMIZE)],
            )
            session.add(study)
            session.flush()
            study_id = int(cast(Any, study.study_id))
            attrs = [models.StudyUserAttributeModel(key=k, value_json=json.dumps(v)) for k, v in user_attrs.items()]
            attrs += [models.StudySystemAttributeModel(key=METRIC_NAMES, value_json=json.dumps([metric]))]
            for attr in attrs:
                attr.study_id = study_id
                session.add(attr)
            session.flush()
            fill(connection, study_id)
            session.commit()
        return study_id

    return storage.transaction(create)


def rename_study(storage: RetryingStorage, name: str, new_name: str) -> bool:
    """False where there is no study of that name, or one of the new name already."""
    statement = text(
        "update studies set study_name = :new_name where study_name = :name "
        "and not exists (select 1 from studies where study_name = :new_name)"
    )
    return storage.transaction(lambda c: c.execute(statement, {"name": name, "new_name": new_name}).rowcount == 1)


BEST_MAE = """
select t.study_id, min(v.value) as mae from trials t join trial_values v using (trial_id)
where t.state = 'COMPLETE' and (cast(:study_ids as integer[]) is null or t.study_id = any(:study_ids))
group by t.study_id
"""

BEST_TRIALS = """
select t.trial_id, t.number, v.value from trials t join trial_values v using (trial_id)
where t.study_id = :study_id and t.state = 'COMPLETE' order by v.value, t.number limit :count
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
    """The smallest value of every study, or of these, that has a complete trial, by study id, in one query."""
    values = {"study_ids": None if study_ids is None else list(study_ids)}
    return {row.study_id: row.mae for row in storage.transaction(lambda c: c.execute(text(BEST_MAE), values).all())}


def best_trials(storage: RetryingStorage, study_id: int, count: int) -> list[FrozenTrial]:
    """The complete trials with the smallest values, best first; of equal ones the earlier."""
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
