"""The commands that watch what was promoted: settle and monitor.

Loads neither torch nor Optuna until a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from launch.options import HELP, checked_symbols, json_option, shared
from studies.config import Config


@click.command(context_settings=HELP)
@click.argument("symbols", nargs=-1, metavar="[SYMBOL]..")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE",
              help="Where shadows are forecast, such as cuda:0; best where the forecasts themselves were.")  # fmt: skip
@json_option
@shared
def settle(config: Config, symbols: Sequence[str], device: str, as_json: bool) -> None:
    """Settle forecasts that were served: what came of them, as their bars arrive, and of what they replaced.

    Does only what is new, so that it can be called as often as one likes. What a promotion replaced forecasts the same
    bars here, as a shadow that is compared with what was served.

    \b
    studies settle
    studies settle BTCUSD AAPL --json
    """
    from launch import settling

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


COMMANDS = (settle, monitor)
