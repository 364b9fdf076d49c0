"""Questions about the budget: how far studies are, who works on what, what is parked, how long it took.

Reads the rows that slots.py claims and ends; writes nothing.
Every function raises DatabaseUnavailable where the server stays away for longer than the storage's wait_s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import RetryingStorage
from storage.slots import CONFIRMATION, READY, SHARE, TRIAL


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much of a study's work is done. `open` counts the free and busy rows of every stage."""

    study_id: int
    budget: int  # trial slots
    done: int
    parked: int  # of every stage, shares with their confirmation
    open: int

    @property
    def state(self) -> str:
        """The state of the study: "running", "parked" or "finished"."""
        return "running" if self.open else "parked" if self.parked else "finished"


@dataclass(frozen=True, kw_only=True)
class Busy:
    """A row that is claimed now, and the worker that claims it."""

    worker: str
    study_id: int
    stage: int
    number: int
    label: str | None
    share: float | None  # of a confirmation that is done, where it is shared out


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """The progress of some studies at one moment."""

    progress: Mapping[int, Progress]  # by study id
    busy: Sequence[Busy]
    finished: Mapping[str, int]  # rows done, by worker, without shares; workers with none are left out
    picked: Mapping[int, Any]  # by study id, as asked for


@dataclass(frozen=True, kw_only=True)
class Parked:
    """A unit of work that is parked: it failed or lost its worker too often."""

    stage: int
    number: int
    error: str
    due: bool  # the next run tries it again


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The confirmation of a study: what it is to measure, and its result once it is done."""

    study_id: int
    state: str  # "free", "busy", "done" or "parked"
    params: Mapping[str, Any] | None
    result: Mapping[str, Any] | None


def read_confirmations(
    storage: RetryingStorage, study_ids: Iterable[int] | None = None, *, paths: Mapping[str, str] | None = None
) -> dict[int, Confirmation]:
    """Return the confirmation of every study, or of these, by study id, in one query.

    paths: what to read of each result, which is 60 kB long, in its place: `result` then has under each name the list
    of what its path (jsonpath) finds.
    """
    values: dict[str, Any] = {"stage": CONFIRMATION, "study_ids": None if study_ids is None else list(study_ids)}
    result = "result"
    if paths is not None:
        found = "cast(:name_{0} as text), jsonb_path_query_array(result, cast(:path_{0} as jsonpath))"
        picked = ", ".join(found.format(n) for n in range(len(paths)))
        result = f"case when result is not null then jsonb_build_object({picked}) end as result"
        for n, (name, path) in enumerate(paths.items()):
            values |= {f"name_{n}": name, f"path_{n}": path}
    statement = text(
        f"select study_id, state, params, {result} from slots where stage = :stage "  # noqa: S608 - no values
        "and (cast(:study_ids as integer[]) is null or study_id = any(:study_ids))"
    )
    rows = storage.transaction(lambda c: c.execute(statement, values).all())
    return {row.study_id: Confirmation(**row._mapping) for row in rows}


def free_counts(
    storage: RetryingStorage, study_ids: Iterable[int], *, worker: str = "", current: int | None = None
) -> dict[int, int]:
    """Return the number of rows that can be claimed now, by study id; studies without any are left out.

    They come in the order in which `worker` is to choose: first the studies on which no other worker is, that is,
    holds a row by a lease that runs; of these `current`, the study it is on; then those with most such rows. Among
    equals each worker has an order of its own, so that workers that start together spread.
    """
    statement = text(
        f"""
        select study_id, count(*) as free from slots s
        where study_id = any(:study_ids) and state = 'free' and {READY}
        group by study_id
        order by exists (
            select 1 from slots b
            where b.study_id = s.study_id and b.state = 'busy' and b.worker <> :worker and b.lease_until > now()
        ), study_id is distinct from :current, free desc, md5(:worker || study_id)
        """  # noqa: S608 - no values
    )
    values = {"study_ids": list(study_ids), "worker": worker, "current": current}
    return {row.study_id: row.free for row in storage.transaction(lambda c: c.execute(statement, values).all())}


def has_open(storage: RetryingStorage, study_ids: Iterable[int]) -> bool:
    """Whether these studies have a row that is free or busy. It reads no others: idle workers ask twice a second."""
    statement = text("select exists (select 1 from slots where study_id = any(:ids) and state in ('free', 'busy'))")
    return storage.transaction(lambda c: c.execute(statement, {"ids": list(study_ids)}).scalar_one())


def confirmed(storage: RetryingStorage, study_ids: Iterable[int]) -> list[int]:
    """Return those of the studies whose confirmation is done."""
    statement = text(
        "select study_id from slots where study_id = any(:ids) and stage = :confirmation and state = 'done'"
    )
    values = {"ids": list(study_ids), "confirmation": CONFIRMATION}
    return list(storage.transaction(lambda c: c.execute(statement, values).scalars()))


def worker_seconds(storage: RetryingStorage, study_ids: Iterable[int] | None = None) -> dict[int, dict[str, float]]:
    """Return the workers' seconds by what they were spent on, summed over the finished rows, by study id."""
    statement = text(
        "select study_id, key, sum(value::float) as seconds from slots, jsonb_each_text(seconds) "
        "where cast(:study_ids as integer[]) is null or study_id = any(:study_ids) group by study_id, key"
    )
    values = {"study_ids": None if study_ids is None else list(study_ids)}
    found: dict[int, dict[str, float]] = {}
    for row in storage.transaction(lambda c: c.execute(statement, values).all()):
        found.setdefault(row.study_id, {})[row.key] = row.seconds
    return found


def study_progress(storage: RetryingStorage, study_ids: Iterable[int] | None = None) -> dict[int, Progress]:
    """Return the progress of every study, or of these, by study id, in one query; studies without rows are left out."""
    ids = None if study_ids is None else list(study_ids)
    return storage.transaction(lambda connection: progress_in(connection, ids))


def progress_in(connection: Connection, study_ids: Sequence[int] | None) -> dict[int, Progress]:
    """Return what `study_progress` does, within a transaction."""
    rows = connection.execute(text(PROGRESS), {"study_ids": study_ids, "trial": TRIAL})
    return {row.study_id: Progress(**row._mapping) for row in rows}


PROGRESS = f"""
select study_id,
       count(*) filter (where stage = :trial) as budget,
       count(*) filter (where stage = :trial and state = 'done') as done,
       count(*) filter (where state = 'parked' and stage <> {SHARE}) as parked,
       count(*) filter (where state in ('free', 'busy')) as open
from slots where cast(:study_ids as integer[]) is null or study_id = any(:study_ids) group by study_id
"""  # noqa: S608 - no values


def run_snapshot(
    storage: RetryingStorage, study_ids: Iterable[int], workers: Iterable[str], *, stage: int, label: str, path: str
) -> RunSnapshot:
    """Return the progress of these studies and workers, and a value from a labelled row's result of each study.

    path: of the value in the result, as jsonpath; studies without it are left out of `picked`. One transaction.
    """
    values = {"study_ids": list(study_ids), "workers": list(workers)}
    picking = {"study_ids": values["study_ids"], "stage": stage, "label": label, "path": path}

    def read(connection: Connection) -> RunSnapshot:
        finished = connection.execute(text(SNAPSHOT_FINISHED), values).all()
        return RunSnapshot(
            progress=progress_in(connection, values["study_ids"]),
            busy=[Busy(**row._mapping) for row in connection.execute(text(SNAPSHOT_BUSY), values)],
            finished={row.worker: row.done for row in finished},
            picked={row.study_id: row.value for row in connection.execute(text(SNAPSHOT_PICKED), picking)},
        )

    return storage.transaction(read)


SNAPSHOT_BUSY = f"""
select s.worker, s.study_id, s.stage, s.number, s.label, (
    select coalesce(sum(jsonb_array_length(d.params->'steps')), 0) / cast(c.progress->>'steps' as float)
    from slots c left join slots d on (d.study_id, d.stage, d.state) = (c.study_id, {SHARE}, 'done')
    where c.study_id = s.study_id and c.stage = {CONFIRMATION} and s.stage >= {CONFIRMATION} group by c.progress
) as share
from slots s where s.study_id = any(:study_ids) and s.state = 'busy' order by s.study_id, s.stage, s.number
"""  # noqa: S608 - no values
SNAPSHOT_FINISHED = f"""
select worker, count(*) as done from slots
where study_id = any(:study_ids) and state = 'done' and worker = any(:workers) and stage <> {SHARE} group by worker
"""  # noqa: S608 - no values
SNAPSHOT_PICKED = """
select study_id, value from slots, jsonb_path_query_first(result, cast(:path as jsonpath)) value
where study_id = any(:study_ids) and stage = :stage and label = :label and value is not null
"""


def stage_results(storage: RetryingStorage, study_id: int, stage: int) -> dict[str, Mapping[str, Any]]:
    """Return the results of the finished rows of a stage, by label."""
    statement = text(
        "select label, result from slots where study_id = :study_id and stage = :stage "
        "and state = 'done' and result is not null"
    )
    rows = storage.transaction(lambda c: c.execute(statement, {"study_id": study_id, "stage": stage}).all())
    return {row.label: row.result for row in rows}


def pick_results(
    storage: RetryingStorage,
    stage: int,
    paths: Mapping[str, str],
    study_ids: Iterable[int] | None = None,
    *,
    label: str | None = None,
) -> dict[int, dict[str, list[Any]]]:
    """Return what the paths (jsonpath, by name) find in a result of every study, or of these, in one query.

    The row is the one of that label, or the only one of its stage. By study id, then by name; studies without such a
    result are left out. The results themselves, which may be long, stay in the server.
    """
    columns = ", ".join(f"jsonb_path_query_array(result, cast(:path_{n} as jsonpath))" for n in range(len(paths)))
    statement = text(
        f"select study_id, {columns} from slots where stage = :stage and result is not null "  # noqa: S608 - no values
        "and (cast(:label as text) is null or label = :label) "
        "and (cast(:study_ids as integer[]) is null or study_id = any(:study_ids))"
    )
    values: dict[str, Any] = {f"path_{n}": path for n, path in enumerate(paths.values())}
    values |= {"stage": stage, "label": label, "study_ids": None if study_ids is None else list(study_ids)}
    rows = storage.transaction(lambda c: c.execute(statement, values).all())
    return {study_id: dict(zip(paths, found, strict=True)) for study_id, *found in rows}


PARKED = "stage, number, coalesce(error, '') as error, coalesce(lease_until, '-infinity') <= now() as due"


def first_parked_slots(storage: RetryingStorage, study_ids: Iterable[int] | None = None) -> dict[int, Parked]:
    """Return the first parked row of every study, or of these, that has one, by study id, in one query.

    Those that the next run tries again come before others.
    """
    statement = text(
        f"select distinct on (study_id) study_id, {PARKED} from slots "  # noqa: S608 - no values
        f"where state = 'parked' and stage <> {SHARE} "
        "and (cast(:study_ids as integer[]) is null or study_id = any(:study_ids)) "
        "order by study_id, due desc, stage, number"
    )
    values = {"study_ids": None if study_ids is None else list(study_ids)}
    rows = storage.transaction(lambda c: c.execute(statement, values).all())
    return {study_id: Parked(stage=stage, number=n, error=error, due=due) for study_id, stage, n, error, due in rows}


def most_workers_at_once(storage: RetryingStorage, study_ids: Iterable[int]) -> int:
    """The largest number of workers that had trials of these studies under way in one stretch of time.

    A worker counts from the begin of its first trial to the end of its last one. Raises DatabaseUnavailable.
    """
    rows = storage.transaction(lambda c: c.execute(text(WORKER_SPANS), {"study_ids": list(study_ids)}).all())
    ends = sorted([(row.first, 1) for row in rows] + [(row.last, -1) for row in rows])  # an end before a begin
    return max(accumulate(step for _, step in ends), default=0)


WORKER_SPANS = """
select a.value_json, min(t.datetime_start) as first, max(t.datetime_complete) as last
from trials t join trial_user_attributes a on a.trial_id = t.trial_id and a.key = 'worker'
where t.study_id = any(:study_ids) and t.datetime_start is not null and t.datetime_complete is not null
group by a.value_json
"""


def parked_slots(storage: RetryingStorage, study_id: int) -> list[Parked]:
    """Return the parked rows of a study with their errors."""
    statement = text(
        f"select {PARKED} from slots "  # noqa: S608 - no values
        f"where study_id = :study_id and state = 'parked' and stage <> {SHARE} order by stage, number"
    )
    rows = storage.transaction(lambda c: c.execute(statement, {"study_id": study_id}).all())
    return [Parked(**row._mapping) for row in rows]
