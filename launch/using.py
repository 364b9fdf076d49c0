"""The commands that use what was promoted and watch it: what `studies --help` lists under "Use and watch".

Loads neither torch nor Optuna until a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from launch.options import (
    FILE,
    HELP,
    Fraction,
    check_devices,
    checked_keys,
    checked_symbols,
    flat,
    gpus_option,
    json_option,
    keys_option,
    shared,
)
from studies.config import Config

cores_option = click.option("--cpus", type=click.IntRange(min=1), help="Number of CPU cores.  [default: all]")


@click.command(context_settings=HELP)
@click.argument("symbols", nargs=-1, metavar="[SYMBOL]..")
@click.option("--horizon", type=click.IntRange(1), help="Bars ahead.  [default: the settings']")
@keys_option
@click.option("--price", type=Fraction(0, min_open=True), metavar="P",
              help="Where the market is now, of a single SYMBOL; far from the last close, bars are read "
              "again.")  # fmt: skip
@click.option("--max-age", type=Fraction(0), metavar="SECONDS", help="Refuse bars of which the last began earlier.")
@gpus_option
@cores_option
@json_option
@shared
def forecast(
    config: Config,
    symbols: Sequence[str],
    horizon: int | None,
    keys: Sequence[Sequence[str]],
    price: float | None,
    max_age: float | None,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    as_json: bool,
) -> None:
    """Forecast the next bars of symbols, or of all that have one, with their promoted configurations.

    A forecast that is in the database is read from there; others are computed, and kept there where there is one. Exits
    with status 1 if a symbol has none, and still shows the others.

    \b
    studies forecast BTCUSD AAPL --keys high,low,close
    """
    from launch import forecasting

    check_devices(gpus, cpus)
    names = checked_symbols([symbols])
    if price is not None and len(names) != 1:
        raise click.UsageError("--price is of a single SYMBOL")
    forecasting.command(
        config,
        names,
        horizon=horizon,
        keys=checked_keys(keys, config),
        price=price,
        max_age_s=max_age,
        device=forecasting.device_of(flat(gpus), cpus),
        as_json=as_json,
    )


@click.command(context_settings=HELP)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", default=8090, show_default=True, type=click.IntRange(0, 65535),
              help="Port to listen on; 0 for any free one.")  # fmt: skip
@click.option("--token-file", type=FILE, help="File with the token to ask for; needed where others can come in.")
@gpus_option
@cores_option
@shared
def serve(
    config: Config,
    host: str,
    port: int,
    token_file: Path | None,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
) -> None:
    """Answer requests for forecasts over HTTP: /forecast, /healthz, /metrics, and a page at /.

    New bars and new promotions count from the next request on. Ctrl-C or SIGTERM ends it once the requests in progress
    are answered.

    \b
    studies serve --port 8090
    curl 'http://127.0.0.1:8090/forecast?symbol=BTCUSD&symbol=AAPL&keys=high,low,close'
    """
    from launch import forecasting, serving

    check_devices(gpus, cpus)
    serving.command(config, host, port, token_file, device=forecasting.device_of(flat(gpus), cpus))


@click.command(context_settings=HELP)
@click.argument("symbols", nargs=-1, metavar="[SYMBOL]..")
@gpus_option
@cores_option
@json_option
@shared
def settle(
    config: Config, symbols: Sequence[str], gpus: Sequence[Sequence[int]], cpus: int | None, as_json: bool
) -> None:
    """Settle forecasts that were served: what came of them, as their bars arrive, and of what they replaced.

    Does only what is new, so that it can be called as often as one likes. What a promotion replaced forecasts the same
    bars here, as a shadow that is compared with what was served.

    \b
    studies settle
    studies settle BTCUSD AAPL --json
    """
    from launch import forecasting, settling

    check_devices(gpus, cpus)
    device = forecasting.device_of(flat(gpus), cpus)
    settling.command(config, checked_symbols([symbols]), device=device, as_json=as_json)


@click.command(context_settings=HELP)
@click.argument("symbols", nargs=-1, metavar="[SYMBOL]..")
@click.option("--auto", is_flag=True, help="Roll a promotion back where the evidence against it is strong.")
@json_option
@shared
def monitor(config: Config, symbols: Sequence[str], auto: bool, as_json: bool) -> None:
    """Watch promoted configurations: how they did since, an alarm that is valid at every look, and advice.

    Each number has its interval and what it would take to act on it. Exits with status 3 on an alarm. With --auto it
    does what promote --rollback does where E is 100 on at least 60 bars; it is off by default.

    \b
    studies monitor
    studies monitor BTCUSD --json
    """
    from launch import monitoring

    monitoring.command(config, checked_symbols([symbols]), auto=auto, as_json=as_json)


COMMANDS = (forecast, serve, settle, monitor)
