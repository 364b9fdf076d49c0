"""A worker in this process: what an error in the work on a slot costs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from places import StudyPlace as Place

from launch import worker as working
from launch.worker import EXIT_DONE, RunPlan, Worker
from storage import DatabaseUnavailable, slots
from storage.progress import parked_slots, study_progress

Spoil = Callable[[int], BaseException | None]


def worker_of(place: Place, monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> Worker:
    """A worker of one study, the evaluations of which raise what `spoil` says for each, counted from 1."""
    study = place.open(prune_worst=0.0).study
    plan = RunPlan(
        config=place.config(prune_worst=0.0),
        series={"SP500": str(place.data / "SP500.csv")},
        studies=(study.name,),
        devices=("cpu",),
    )
    worker = Worker(plan, place.storage, "cpu", SimpleNamespace(received=False, computing=contextlib.nullcontext))  # type: ignore[arg-type]
    evaluator = place.evaluator()
    measure, count = evaluator.measure, 0

    def spoiled(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if (error := spoil(count)) is not None:
            raise error
        return measure(*args, **options)

    def load(model: str) -> Any:
        worker.forecasters[model] = SimpleNamespace(compilation="off")  # type: ignore[assignment]
        return evaluator

    monkeypatch.setattr(evaluator, "measure", spoiled)
    monkeypatch.setattr(worker, "_load", load)
    return worker


def failures_of(place: Place) -> int:
    return place.storage.transaction(
        lambda c: c.exec_driver_sql("select coalesce(sum(failures), 0) from slots").scalar_one()
    )


def test_an_unexpected_error_costs_a_failure_of_its_slot_and_no_worker(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = worker_of(place, monkeypatch, lambda count: MemoryError() if count in (2, 4) else None)
    assert worker.work() == EXIT_DONE
    (progress,) = study_progress(place.storage).values()
    assert (progress.done, progress.parked, progress.open) == (Place.TRIALS, 0, 0)
    assert failures_of(place) == 2
    errors = [record for record in caplog.records if record.exc_info]
    assert len(errors) == 2  # each with its traceback
    assert all(record.levelno == logging.ERROR for record in errors)


def test_slots_that_fail_again_and_again_are_parked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(place, monkeypatch, lambda _: MemoryError("no room"))
    assert worker.work() == EXIT_DONE
    (study_id,) = study_progress(place.storage)
    parked = parked_slots(place.storage, study_id)
    assert len([one for one in parked if one.stage == slots.TRIAL]) == Place.TRIALS
    assert all("MemoryError: no room" in one.error for one in parked)


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (KeyboardInterrupt(), 0),
        (working.Interrupted(), 0),
        (DatabaseUnavailable("no answer"), 0),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1),  # the slot, and the process
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_the_worker(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: BaseException, failures: int
) -> None:
    worker = worker_of(place, monkeypatch, lambda _: error)
    with pytest.raises(type(error)):
        worker.work()
    assert failures_of(place) == failures
