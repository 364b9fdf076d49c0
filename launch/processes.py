"""Work that needs a forecaster, in processes of their own: one for each device, each keeping what it has loaded.

With one device the work is done in this process, before which no torch may have been loaded.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from forecasters import LoadedForecaster, measure_matrix_product
from launch.devices import DeviceSlot
from objectives.evaluation import Evaluator
from studies import config as configuration
from studies import evaluators
from studies.config import Config
from studies.evidence import ENSEMBLE

CACHE_BYTES = 2**29  # of a process: the encodings and draws that the work on some windows shares

Job = TypeVar("Job")
Result = TypeVar("Result")


class Processes:
    """One process for each of these devices, for as long as the block lasts; or this one where there is one device."""

    def __init__(self, slots: Sequence[DeviceSlot]) -> None:
        self._slots = slots
        self._stack = ExitStack()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        self._stack.enter_context(_environment(self._slots[0].environment))
        if len(self._slots) > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = self._stack.enter_context(ProcessPoolExecutor(len(self._slots), mp_context=context))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._stack.close()

    def run(
        self, function: Callable[[Job, str], Result], jobs: Sequence[Job], *, sizes: Sequence[int] = ()
    ) -> Iterator[tuple[Job, Result]]:
        """Every job and what `function` answers for it and a device, as they are done; what one raises passes through.

        function: of a module, as another process is to find it. sizes: what each job adds to a bar on stderr; none: no
        bar.
        """
        columns = (
            TextColumn("measuring"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        quiet = not sizes or not sys.stderr.isatty()
        with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
            task = progress.add_task("measuring", total=sum(sizes))
            for place, result in self._results(function, jobs):
                yield jobs[place], result
                progress.advance(task, sizes[place] if sizes else 0)

    def _results(self, function: Callable[[Job, str], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        if self._pool is None:
            for place, job in enumerate(jobs):
                yield place, function(job, self._slots[0].device)
            return
        devices = [self._slots[place % len(self._slots)].device for place in range(len(jobs))]
        futures = {
            self._pool.submit(function, job, device): place
            for place, (job, device) in enumerate(zip(jobs, devices, strict=True))
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def settings_text(config: Config) -> str:
    """The settings as a job carries them, for `evaluator` to be found again by."""
    return json.dumps(configuration.to_json(config))


@functools.cache
def forecaster(settings: str, model: str, device: str) -> LoadedForecaster:
    """The forecaster of this process for such work. settings: as of `settings_text`. Raises what loading raises."""
    return evaluators.load_forecaster(configuration.from_json(json.loads(settings)), model, device=device)


@functools.cache
def evaluator(settings: str, model: str, device: str, *, profile: bool = False, together: int = 0) -> Evaluator:
    """The evaluator of that forecaster. profile: count its operations.

    together: as `evaluators.evaluator_of` takes it; a forecaster that shares forwards serves nothing else.
    """
    config = configuration.from_json(json.loads(settings))
    if model == ENSEMBLE:
        return evaluators.ensemble_evaluator(
            config, lambda one: _member(settings, one, device, profile=profile, together=together)
        )
    found = (forecaster.__wrapped__ if together else forecaster)(settings, model, device)
    return evaluators.evaluator_of(config, found, cache_bytes=CACHE_BYTES, profile=profile, together=together)


def _member(settings: str, model: str, device: str, *, profile: bool, together: int) -> Evaluator:
    found = evaluator(settings, model, device, profile=profile, together=together)
    found.max_num_samples = 0  # nothing is drawn ahead for trials
    return found


@functools.cache
def matrix_product(device: str) -> float | None:
    """Operations a second of a matrix product in this process, measured once."""
    return measure_matrix_product(device)
