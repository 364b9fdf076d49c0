"""The commands that learn from history and configurations: what `studies --help` lists under "Learn".

Loads neither torch nor Optuna until a command runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from launch.options import (
    FILE,
    HELP,
    Names,
    check_devices,
    checked_keys,
    checked_models,
    checked_symbols,
    flat,
    gpus_option,
    json_option,
    keys_option,
    models_option,
    profile_option,
    shared,
    symbols_option,
)
from studies.config import Config


@click.command(context_settings=HELP)
@symbols_option
@models_option
@click.option("--from", "since", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE",
              help="First date; else as many as --dates.")  # fmt: skip
@click.option("--dates", default=12, show_default=True, type=click.IntRange(1), help="Number of dates.")
@click.option("--every", default=30, show_default=True, type=click.IntRange(1), help="Bars between two dates.")
@click.option("--after", default=60, show_default=True, type=click.IntRange(1), help="Bars that judge a decision.")
@click.option("--rule", "rules", type=Names(), multiple=True, help="pooled, confirmation, validation.  [default: all]")
@click.option("--sample", default=24, show_default=True, type=click.IntRange(1),
              help="Configurations of a model that has no grid.")  # fmt: skip
@click.option("--start", default="default", show_default=True, type=click.Choice(["default", "in-use"]),
              help="What is in use at the first date: the model's default, or today's promoted file.")  # fmt: skip
@gpus_option
@click.option("--cpus", type=click.IntRange(1), help="Number of CPU processes.  [default: one a core]")
@click.option("--report", "report_path", type=FILE, help="HTML file to write curves and promotions to.")
@json_option
@shared
def replay(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    since: datetime | None,
    dates: int,
    every: int,
    after: int,
    rules: Sequence[Sequence[str]],
    sample: int,
    start: str,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Play search and promotion through your own history: what each rule would have promoted, and what came of it.

    Touches neither studies nor hyperparams. What is measured is kept in results/replay, so that it goes on after an
    interruption.

    \b
    studies replay --symbols BTCUSD,AAPL --models toto --report replay.html
    """
    from launch import replaying

    check_devices(gpus, cpus)
    replaying.command(
        config,
        replaying.Asked(
            symbols=checked_symbols(symbols),
            models=checked_models(models, config),
            rules=replaying.checked_rules(flat(rules)),
            since=since,
            dates=dates,
            every=every,
            after=after,
            sample=sample,
            start=start,
        ),
        gpus=flat(gpus),
        cpus=cpus,
        report_path=report_path,
        as_json=as_json,
    )


@click.command(context_settings=HELP)
@symbols_option
@models_option
@click.option("--horizon", type=click.IntRange(1), help="Bars ahead.  [default: 64]")
@click.option("--windows", default=30, show_default=True, type=click.IntRange(1), help="Forecasts of each symbol.")
@click.option("--stride", type=click.IntRange(1), help="Bars between two of them.  [default: a quarter of --horizon]")
@click.option("--passes", default=1, show_default=True, type=click.IntRange(1),
              help="Draws to average: 1 with the seeds of a search, more with those of a confirmation.")  # fmt: skip
@click.option("--params", type=Names(), multiple=True, metavar="A,B,..",
              help="best, stored, default, a promoted file, STUDY#TRIAL.  [default: best,stored]")  # fmt: skip
@keys_option
@gpus_option
@click.option("--cpus", type=click.IntRange(1), help="Number of CPU processes.  [default: one a core]")
@click.option("--plot", type=FILE, help="PNG or HTML file to draw error by step and the last forecasts to.")
@profile_option
@json_option
@shared
def compare(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    horizon: int | None,
    windows: int,
    stride: int | None,
    passes: int,
    params: Sequence[Sequence[str]],
    keys: Sequence[Sequence[str]],
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    plot: Path | None,
    profile: bool,
    as_json: bool,
) -> None:
    """Compare models and configurations at any horizon, beside naive forecasts, on the windows before test.

    Improvements are over the first configuration of a symbol; a tie is one whose 95 % interval holds 0. Variables such
    as TOTO_NUM_SAMPLES or KRONOS_CLIP override every configuration. With --horizon 1 the windows are those of a study.

    \b
    studies compare --symbols NVDA,BTCUSD --params best,stored
    studies compare --horizon 1 --keys open,high,low,close
    studies compare --horizon 1 --windows 250 --params default,NVDA/toto@2026-02-05#34 --plot compare.html
    """
    from launch import comparing, switches

    check_devices(gpus, cpus)
    steps, count = switches.of_comparison(os.environ, horizon=horizon, windows=windows, default=comparing.HORIZON)
    asked = comparing.Asked(
        symbols=checked_symbols(symbols),
        models=checked_models(models, config),
        horizon=steps,
        windows=count,
        stride=stride or max(1, steps // 4),
        passes=passes,
        params=flat(params) or ("best", "stored"),
        keys=checked_keys(keys, config),
        profile=profile,
    )
    comparing.command(config, asked, gpus=flat(gpus), cpus=cpus, plot=plot, as_json=as_json)
