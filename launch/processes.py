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
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from forecasters import LoadedForecaster
from launch.devices import DeviceSlot
from objectives.evaluation import Evaluator
from studies import config as configuration
from studies import evaluators
from studies.config import Config

CACHE_BYTES = 2**29  # of a process: the encodings and draws that the work on some windows shares

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Job, str], Result], jobs: Sequence[Job], sizes: Sequence[int], slots: Sequence[DeviceSlot]
) -> Iterator[tuple[Job, Result]]:
    """Every job and what `function` answers for it and a device, as they are done; a bar on stderr shows how far it is.

    function: of a module, as another process is to find it. sizes: how much of the bar each job is. What a job raises
    ends the others.
    """
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with (
        _environment(slots[0].environment),
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("measuring", total=sum(sizes))
        if len(slots) == 1:
            for job, size in zip(jobs, sizes, strict=True):
                yield job, function(job, slots[0].device)
                progress.advance(task, size)
            return
        with ProcessPoolExecutor(len(slots), mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {
                pool.submit(function, job, slots[n % len(slots)].device): (job, size)
                for n, (job, size) in enumerate(zip(jobs, sizes, strict=True))
            }
            try:
                for future in as_completed(futures):
                    job, size = futures[future]
                    yield job, future.result()
                    progress.advance(task, size)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


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
def evaluator(settings: str, model: str, device: str) -> Evaluator:
    """The evaluator of that forecaster."""
    config = configuration.from_json(json.loads(settings))
    return evaluators.evaluator_of(config, forecaster(settings, model, device), cache_bytes=CACHE_BYTES)
