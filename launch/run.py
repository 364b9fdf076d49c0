"""One run of workers, on this machine or a Ray cluster: from its log folder to the table of what it brought."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch import ray_cluster, streams, supervisor
from launch.devices import DeviceSlot
from launch.output import counted, say
from launch.places import artifacts_folder, kept_alive
from launch.ray_cluster import Cluster
from launch.views import listing, live, notes
from launch.worker import RunPlan
from storage import DatabaseUnavailable, database, urls
from storage.progress import parked_slots, study_progress
from storage.retrying import RetryingStorage
from studies.config import Config, ConfigError
from studies.series import Series
from studies.study import Study


def run_workers(
    config: Config,
    storage: RetryingStorage,
    series: Sequence[Series],
    working: Sequence[Study],
    device_slots: Sequence[DeviceSlot],
    *,
    shown: Sequence[int],
    cluster: Cluster | None = None,
    plain: bool = False,
) -> int:
    """Work on studies until they are finished, then show those of `shown`. Returns the exit status."""
    folder = _log_folder(config)
    job = RunPlan(
        config=_absolute(config),
        series={item.symbol: str(item.path.resolve()) for item in series},
        studies=tuple(study.name for study in working),
        devices=tuple(device_slot.device for device_slot in device_slots),
    )
    url, secret = urls.hand_over(storage.engine.url)
    study_ids = [study.study_id for study in working]
    kinds = sorted({device_slot.device.split(":")[0] for device_slot in device_slots})
    say(f"{counted(len(device_slots), '/'.join(kinds) + ' worker')}; logs in {folder}")
    if cluster is None:
        supervise = supervisor.Supervisor
    else:
        supervise = functools.partial(ray_cluster.RaySupervisor, cluster)
        secret = database.password_in_use(storage)  # also where this machine has it from a file
    view = live.View(storage, {study.study_id: study.name for study in working}, plain=plain)
    keeper = notes.NoteWriter(storage, artifacts_folder(config), working, report=view, say=view.say)
    supervising = supervise(
        job,
        folder,
        device_slots,
        storage,
        study_ids,
        environment={"OPTUNA_STORAGE": url, **secret},
        say=view.say,
        report=keeper,
    )
    view.watch(supervising.children)
    with view, kept_alive(config, say=view.say):
        status = supervising.run()
    if cluster is not None:
        cluster.end()
    if supervising.signals >= 2:
        with streams.ignore_broken_pipe():
            pass
        os._exit(status)  # no table, no taking down of the interpreter: at once
    if status == supervisor.EXIT_INTERRUPTED:
        storage.wait_s = 0.0  # the table is not worth waiting for a server that is away
    with streams.ignore_broken_pipe():
        try:
            keeper.say = say  # the table is closed
            keeper.write()
            listing.print_rows(storage, shown, plain=plain)
            progress = study_progress(storage)
            for study in working:
                for parked in parked_slots(storage, study.study_id)[:1]:
                    status = status or 1
                    say(f"{study.name}: {progress[study.study_id].parked} parked, the first with: {parked.error}")
        except DatabaseUnavailable as error:
            status = status or 1
            say(str(error))
    return status


def _log_folder(config: Config) -> Path:
    """A fresh folder for the logs of this run. Raises ConfigError."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        for suffix in ("", *(f"-{n}" for n in range(1, 100))):
            folder = config.workers.log_dir / f"{stamp}{suffix}"
            if not folder.exists():
                folder.mkdir(parents=True)
                return folder.resolve()
    except OSError as error:
        raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: {error.strerror}") from None
    raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: too many runs in one second")


def _absolute(config: Config) -> Config:
    """With paths that hold in a child whatever its folder."""
    return replace(config, hyperparams=replace(config.hyperparams, dir=config.hyperparams.dir.resolve()))
