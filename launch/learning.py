"""The commands that learn from history and configurations: what `studies --help` lists under "Learn".

Loads neither torch nor Optuna until a command runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forecasters.models import MODELS
from launch.options import (
    FILE,
    HELP,
    Fraction,
    Hold,
    Names,
    check_devices,
    checked_keys,
    checked_models,
    checked_symbols,
    devices_options,
    flat,
    json_option,
    keys_option,
    models_option,
    profile_option,
    shared,
    symbols_option,
)
from studies.config import Config

if TYPE_CHECKING:
    from studies.promoting import ReturnsGate


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
@devices_options
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
@click.option("--seeds", default="study", show_default=True, type=click.Choice(["study", "served"]),
              help="Seeds of a study, or those of served forecasts, one by one as monitor has them.")  # fmt: skip
@click.option("--params", type=Names(), multiple=True, metavar="A,B,..",
              help="best, stored, default, a promoted file, STUDY#TRIAL.  [default: best,stored]")  # fmt: skip
@keys_option
@devices_options
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
    seeds: str,
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
    from objectives.windows import SeedKind

    check_devices(gpus, cpus)
    if seeds == "served" and passes > 1:
        raise click.UsageError("--seeds served: a forecast is served from one draw; leave --passes out")
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
        seeds=SeedKind(seeds),
        profile=profile,
    )
    comparing.command(config, asked, gpus=flat(gpus), cpus=cpus, plot=plot, as_json=as_json)


@click.command(context_settings=HELP)
@symbols_option
@models_option
@click.option("--max-cost", default=0.005, show_default=True, type=Fraction(0, 1, min_open=True, max_open=True),
              help="Relative rise of the MAE that fewer samples may cost.")  # fmt: skip
@click.option("--apply", is_flag=True, help="Promote the configurations with fewer samples.")
@devices_options
@json_option
@shared
def reduce(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    max_cost: float,
    apply: bool,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    as_json: bool,
) -> None:
    """Find how few samples the promoted configurations need, and what readers of the files save by that.

    The cost of fewer samples is measured against the exact answer where the model has one, else against the number in
    use. With --apply each symbol's file is promoted with the fewest that cost less than --max-cost with 95 %
    confidence; promote --rollback undoes it.

    \b
    studies reduce --symbols BTCUSD,AAPL --max-cost 0.005
    """
    from launch import reducing

    check_devices(gpus, cpus)
    reducing.command(
        config,
        symbols=checked_symbols(symbols),
        models=checked_models(models, config),
        max_cost=max_cost,
        apply=apply,
        gpus=flat(gpus),
        cpus=cpus,
        as_json=as_json,
    )


@click.command(context_settings=HELP)
@click.argument("symbol")
@click.argument("model", type=click.Choice(list(MODELS)))
@click.argument("values", nargs=-1, required=True, metavar="PARAM=V1,V2,.. [PARAM=V1,V2,..]")
@click.option("--from", "start", default="best", show_default=True, metavar="WHICH",
              help="What the rest is from: best, stored, default, a promoted file, or STUDY#TRIAL.")  # fmt: skip
@click.option("--windows", default=30, show_default=True, type=click.IntRange(1), help="Number of windows before test.")
@click.option("--horizon", type=click.IntRange(1), help="Steps to forecast.  [default: the settings']")
@click.option("--stride", type=click.IntRange(1), help="Bars between two windows.  [default: a quarter of the horizon]")
@click.option("--passes", default=1, show_default=True, type=click.IntRange(1),
              help="Draws to average over; one has the seeds of a search, more are fresh.")  # fmt: skip
@click.option("--plot", type=FILE, help="PNG or HTML file for a figure; of two parameters it is a heat map.")
@json_option
@shared
def sweep(
    config: Config,
    symbol: str,
    model: str,
    values: Sequence[str],
    start: str,
    windows: int,
    horizon: int | None,
    stride: int | None,
    passes: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Vary one parameter of a configuration, or two, and keep the rest.

    All values are measured on the same windows with the same seeds. Each is compared with the current value window by
    window; the p-value allows for the number of values tried. It changes nothing: promotions rest on searches.

    \b
    studies sweep BTCUSD toto num_samples=64,128,256,512 --plot samples.png
    studies sweep BTCUSD kronos temperature=0.1,0.2,0.3 top_k=0,16,32 --from default
    """
    from launch import sweeping

    horizon = horizon or config.windows.horizon
    sweeping.command(
        config,
        sweeping.Asked(
            symbol=checked_symbols([[symbol]])[0],
            model=model,
            axes=sweeping.checked_axes(model, values),
            start=start,
            horizon=horizon,
            windows=windows,
            stride=stride or max(1, horizon // 4),
            passes=passes,
        ),
        plot=plot,
        as_json=as_json,
    )


@click.command(context_settings=HELP)
@symbols_option
@models_option
@click.option("--params", type=Names(), multiple=True, metavar="A,B,..",
              help="best, stored, default, a promoted file, STUDY#TRIAL.  [default: best]")  # fmt: skip
@click.option("--strategies", "names", type=Names(), multiple=True, help="Only these strategies.  [default: all nine]")
@click.option("--bars", default=250, show_default=True, type=click.IntRange(1), help="Last bars, to trade on.")
@click.option("--train", default=250, show_default=True, type=click.IntRange(1),
              help="Bars before them that offsets are fitted to, 60 at least.")  # fmt: skip
@click.option("--step", default=20, show_default=True, type=click.IntRange(1), help="Bars until they are fitted again.")
@click.option("--evals", default=500, show_default=True, type=click.IntRange(1), help="Offsets tried in each fit.")
@click.option("--hold", default="day", show_default=True, type=Hold(),
              help="Out at the close of the day, or after N bars unless a target is reached before.")  # fmt: skip
@click.option("--fills", default="both", show_default=True, type=click.Choice(["both", "conservative", "optimistic"]),
              help="Take the worse of what a bar leaves open, the better, or show both.")  # fmt: skip
@devices_options
@click.option("--report", "report_path", type=FILE, help="HTML file to write curves, months and trades to.")
@json_option
@shared
def backtest(
    config: Config,
    symbols: Sequence[Sequence[str]],
    models: Sequence[Sequence[str]],
    params: Sequence[Sequence[str]],
    names: Sequence[Sequence[str]],
    bars: int,
    train: int,
    step: int,
    evals: int,
    hold: int,
    fills: str,
    gpus: Sequence[Sequence[int]],
    cpus: int | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Trade strategies on the forecasts of configurations, as if each of the last bars had not come yet.

    Offsets of limits are fitted to the bars before those that they are used on, with those of no offsets beside them.
    Costs are in the settings. The deflated Sharpe ratio allows for everything that was ever tried on a symbol.

    \b
    studies backtest --symbols AAPL,BTCUSD --report backtest.html
    studies backtest --params best,default --strategies simple,maxdiff --hold target:5
    """
    from launch import backtesting
    from launch.views.backtest import fills_of
    from objectives.strategies import strategies
    from studies.backtesting import Plan

    check_devices(gpus, cpus)
    asked = backtesting.Asked(
        symbols=checked_symbols(symbols),
        models=checked_models(models, config),
        params=flat(params) or ("best",),
        strategies=strategies(flat(names)),
        plan=Plan(bars=bars, train=train, step=step, evaluations=evals, hold=hold),
        fills=fills_of(fills),
    )
    backtesting.command(config, asked, gpus=flat(gpus), cpus=cpus, report_path=report_path, as_json=as_json)


def returns_gate(config: Config, strategy: str) -> ReturnsGate:
    """What `promote --pnl-gate` asks. Raises ExpectedError."""
    from launch.backtesting import returns_gate  # here: a second of imports

    return returns_gate(config, strategy)


COMMANDS = (compare, backtest, sweep, reduce, replay)
