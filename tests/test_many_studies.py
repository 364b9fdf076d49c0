"""Five hundred studies of a hundred trials in one database: counted, listed and claimed from correctly."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import many_studies
from benchmarks.many_studies import STUDIES, TRIALS, fill, list_studies
from storage import database, slots
from storage.progress import free_counts, study_progress


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

    rows = json.loads(many_studies.promote(database_url, tmp_path))
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
