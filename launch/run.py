"""One run of workers on this machine or a Ray cluster, from its log folder to the table of its results."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch import profiling, ray_cluster, streams, supervisor
from launch.devices import DeviceSlot
from launch.output import counted, say
from launch.places import artifacts_folder, private_server_kept_alive, server_folder
from launch.ray_cluster import Cluster
from launch.results import print_results
from launch.views import live, notes
from launch.worker import EXIT_INTERRUPTED, PRIVATE_SERVER, RunPlan
from storage import DatabaseUnavailable, database, urls
from storage.commands import this_command
from storage.retrying import RetryingStorage
from studies.config import Config, ConfigError
from studies.series import Series
from studies.study import Study


def run_workers(
    config: Config,
    storage: RetryingStorage,
    series: Sequence[Series],
    unfinished: Sequence[Study],
    device_slots: Sequence[DeviceSlot],
    *,
    shown: Sequence[Study],
    skipped: Mapping[str, str] | None = None,
    cluster: Cluster | None = None,
    plain: bool = False,
    profile: bool = False,
) -> int:
    """Work on the unfinished studies until they are finished, then list the studies `shown`.

    skipped: symbols that were left out, with the reason. plain: without a live table. profile: also print time and work
    by stage. Returns the exit status: 130
    interrupted, 1 a worker failed, else that of `print_results`. Raises ConfigError.
    """
    folder = _log_folder(config)
    plan = RunPlan(
        config=_with_absolute_paths(config),
        series={item.symbol: str(item.path.resolve()) for item in series},
        studies=tuple(study.name for study in unfinished),
        devices=tuple(slot.device for slot in device_slots),
        profile=profile,
    )
    url, secret = urls.hand_over(storage.engine.url)
    private = {} if config.storage.url else {PRIVATE_SERVER: str(server_folder(config).absolute())}
    names = {study.study_id: study.name for study in unfinished}
    kinds = sorted({slot.device.split(":")[0] for slot in device_slots})
    say(f"{counted(len(device_slots), '/'.join(kinds) + ' worker')}; logs in {folder}")
    if line := database.lack_of_connections(storage, len(device_slots)):
        say(line)
    if cluster is None:
        make_supervisor = supervisor.Supervisor
    else:
        make_supervisor = functools.partial(ray_cluster.RaySupervisor, cluster)
        secret = database.password_in_use(storage)  # even if this machine reads it from a file
    view = live.LiveView(storage, names, plain=plain)
    log = folder / "supervisor.log"  # tracebacks of what nobody expects
    note_writer = notes.NoteWriter(storage, artifacts_folder(config), unfinished, report=view, say=view.say, log=log)
    run = make_supervisor(
        plan,
        folder,
        device_slots,
        storage,
        list(names),
        environment={"OPTUNA_STORAGE": url, **secret, **private},
        say=view.say,
        report=note_writer,
    )
    view.watch(run.children)
    with view, private_server_kept_alive(config, say=view.say, log=log, on_stop=run.stop_at_once):
        status = run.run()
    if cluster is not None:
        cluster.end()
    if status == EXIT_INTERRUPTED:
        say(f"stopped before the end; go on with: {this_command()}")
    if run.signals >= 2:
        streams.flush_output()
        os._exit(status)  # without results and without shutting down the interpreter, which take time
    if status == EXIT_INTERRUPTED:
        storage.wait_s = 0.0  # the results are not worth waiting for a server that is unavailable
    with streams.ignore_broken_pipe():
        try:
            note_writer.say = say  # the view is closed
            note_writer.write()
            ended = print_results(storage, shown, skipped or {}, plain=plain)
            status = status or ended
            if profile:
                profiling.show_profile(profiling.read(folder), plain=plain)
        except DatabaseUnavailable as error:
            status = status or 1
            say(str(error))
    return status


def _log_folder(config: Config) -> Path:
    """Make a new folder for the logs of this run. Raises ConfigError."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        for suffix in ("", *(f"-{n}" for n in range(1, 100))):
            folder = config.workers.log_dir / f"{stamp}{suffix}"
            with contextlib.suppress(FileExistsError):  # of another run in the same second
                folder.mkdir(parents=True)
                return folder.resolve()
    except OSError as error:
        raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: {error.strerror}") from None
    raise ConfigError(f"[workers] log_dir {config.workers.log_dir}: too many runs in one second")


def _with_absolute_paths(config: Config) -> Config:
    """The settings with paths that do not depend on the folder a worker runs in."""
    return replace(config, hyperparams=replace(config.hyperparams, dir=config.hyperparams.dir.resolve()))
