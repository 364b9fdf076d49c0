"""What `studies forecast` does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import click

from launch.devices import device_slots, visible_gpus
from launch.output import say, wide_console
from launch.places import open_storage, server_folder
from launch.views import forecasts as view
from launch.views.tables import terminal
from storage import DatabaseUnavailable, configs
from storage.retrying import RetryingStorage
from studies.config import Config, ConfigError
from studies.forecasting import Forecasts


def device_of(gpus: Sequence[int], cpus: int | None) -> str:
    """The one device to compute on, chosen for this process before torch is loaded. Raises DeviceError."""
    if cpus is None and (gpus or visible_gpus()):
        slot = device_slots(gpus or None, None)[0]
        os.environ.update(slot.environment)
        return slot.device
    if cpus is not None:  # else every core, or what the environment says
        os.environ["OMP_NUM_THREADS"] = str(cpus)
    return "cpu"


def command(
    config: Config,
    symbols: Sequence[str],
    *,
    horizon: int | None,
    keys: Sequence[str],
    price: float | None,
    max_age_s: float | None,
    device: str,
    as_json: bool,
) -> None:
    """What the command does. Raises ExpectedError; exits with status 1 where a symbol has no forecast.

    symbols: none are all that have a promoted file.
    """
    symbols = symbols or configs.symbols_in(config.hyperparams.dir, "best")
    if not symbols:
        raise ConfigError(f"{config.hyperparams.dir / 'best'}: nothing is promoted yet; make a file with: promote")
    storage = _storage(config)
    config = replace(config, storage=replace(config.storage, url=""))  # it is open, or does not answer
    with Forecasts(config, storage=storage, device=device, note=say) as asked:
        answers = asked.ask(symbols, horizon=horizon, keys=keys, price=price, max_age_s=max_age_s)
    found = list(answers.forecasts.values())
    if as_json:
        rows = [one.to_json() for one in found]
        click.echo(json.dumps({"forecasts": rows, "refused": dict(answers.refused)}, indent=2))
    elif found:
        console = wide_console()
        console.print(terminal(view.table(found), console.width))
        for line in view.provenance(found):
            say(line)
    for reason in answers.refused.values():
        say(f"error: {reason}")
    if answers.refused:
        sys.exit(1)


def _storage(config: Config) -> RetryingStorage | None:
    """The database, if there is one: no server is made for a forecast, and none keeps it from being made."""
    if not config.storage.url and not server_folder(config).exists():
        return None
    try:
        return open_storage(config)
    except DatabaseUnavailable as error:
        say(str(error))
        return None
