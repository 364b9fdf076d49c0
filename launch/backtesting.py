"""`studies backtest`: strategies traded on the forecasts of configurations, through the last bars of every symbol.

Forecasts and trades are made in processes, a symbol and model at a time; portfolios and what returns are worth, here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from forecasters import Bars, ExpectedError
from launch import processes
from launch.devices import DeviceSlot, device_slots
from launch.output import counted, say, wide_console
from launch.places import open_storage, server_folder
from launch.processes import Processes
from launch.views import backtest, backtest_page, report
from launch.views.tables import terminal
from objectives.bars import DataError, bars_until
from objectives.costs import AssetClass
from objectives.ensemble import fingerprint_of
from objectives.fills import check_bars
from objectives.strategies import Strategy, StrategyError, strategies
from objectives.windows import Contexts
from storage.commands import this_command
from storage.retrying import RetryingStorage
from storage.tries import Try, record
from studies import backtesting, chosen
from studies.backtesting import BUY_HOLD, BacktestRow, Line, Plan, Traded
from studies.comparing import ComparedConfiguration
from studies.config import Config, ConfigError
from studies.evidence import ENSEMBLE, MeasuredConfiguration
from studies.promoting import ReturnsGate
from studies.promotion import ReturnsDifference
from studies.series import Series, confirmation_windows, read_series, read_usable_series
from studies.space import digest_of
from studies.study import Study
from studies.walk_forward import check_length, check_train

TOGETHER = 512  # origins, at most, that share forwards where a model can


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of the command say."""

    symbols: Sequence[str]
    models: Sequence[str]
    params: Sequence[str]
    strategies: Sequence[Strategy]
    plan: Plan
    fills: Sequence[str]  # that are shown


@dataclass(frozen=True, kw_only=True)
class Case:
    """One symbol, what trading it costs, and what is traded with which configurations."""

    series: Series
    asset: AssetClass
    strategies: Sequence[Strategy]  # without buy_hold
    rows: Sequence[ComparedConfiguration]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does at a time: configurations of one model on one symbol."""

    settings: str
    model: str
    symbol: str
    bars: Bars
    asset: AssetClass
    names: Sequence[str]
    rows: Sequence[ComparedConfiguration]
    plan: Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What came of a configuration: its digest and what was traded, or why it could not be."""

    digest: str = ""
    traded: Sequence[Traded] = ()
    error: str | None = None


def command(
    config: Config, asked: Asked, *, gpus: Sequence[int], cpus: int | None, report_path: Path | None, as_json: bool
) -> None:
    """What the command does. Raises ExpectedError; exits with status 1 where a configuration could not be traded."""
    if any(one.offsets for one in asked.strategies):
        check_train(asked.plan.train)
    if report_path is not None and not report_path.absolute().parent.is_dir():
        raise ConfigError(f"--report {report_path}: there is no folder {report_path.absolute().parent}; make it first")
    slots = device_slots(gpus or None, cpus)
    config = chosen.with_horizon(config, 1, asked.models)
    cases = cases_of(config, asked)
    storage = _storage(config)  # before hours of measuring: what is wrong with it is said at once
    try:
        lines, errors = trade(config, asked, cases, slots)
    except KeyboardInterrupt:
        say(f"interrupted; nothing is kept; again: {this_command()}")
        sys.exit(130)
    lines += backtesting.portfolios(lines)
    rows = counted_rows(lines, asked.plan, storage)
    if as_json:
        click.echo(json.dumps({"plan": asdict(asked.plan), "rows": [asdict(one) for one in rows]}, indent=2))
    else:
        console = wide_console()
        console.print(terminal(backtest.table(rows, asked.fills), console.width))
    costs = backtest.costs_lines([(case.series.symbol, case.asset) for case in cases])
    explained = backtest.explanations(rows, asked.fills)
    for line in (*costs, *explained, *errors):
        say(line)
    if report_path is not None:
        prices = {case.series.symbol: case.series.bars for case in cases}
        page = backtest_page.html(lines, rows, asked.plan, asked.fills, prices, notes=[*costs, *explained])
        report.write(report_path, page, option="--report")
        say(f"report in {report_path}")
    if errors:
        sys.exit(1)


def _storage(config: Config) -> RetryingStorage | None:
    """The storage, if there is one: no server is made to count tries in."""
    if not config.storage.url and not server_folder(config).exists():
        say("no studies yet to count tries beside: the deflated Sharpe ratio allows for those of this command alone")
        return None
    return open_storage(config, write=True)


# --- what is traded -----------------------------------------------------------------------------------------


def cases_of(config: Config, asked: Asked) -> list[Case]:
    """The symbols with their configurations; says what is left out. Raises ExpectedError for none left."""
    overrides, notes = chosen.environment_overrides(asked.models, os.environ)
    words = chosen.read_words(asked.params, lambda: open_storage(config))
    counts = replace(config.windows, validation=1, test=1)  # what a search needs is not needed here
    series, refused, of_files = read_usable_series(replace(config, windows=counts), asked.symbols)
    cases, dead = [], []
    for each in series:
        found = chosen.for_symbol(config, each.symbol, each.bars, asked.models, asked.params, words, overrides)
        notes += found.notes
        dead += found.dead_top_p
        try:
            usable, said = _usable(config, asked, each)
        except ExpectedError as error:
            refused[each.symbol] = str(error)
            continue
        notes += said
        asset = config.backtest.asset_class(each.symbol, each.bars.timestamps)
        needed = [one for one in usable if one.name != BUY_HOLD]
        cases.append(Case(series=each, asset=asset, strategies=needed, rows=found.rows if needed else ()))
    if not cases and len(refused) == 1:
        raise DataError(*refused.values())
    for note in (*notes, *of_files, *(f"{symbol} skipped: {reason}" for symbol, reason in refused.items())):
        say(note)
    if dead:
        say(f"top_p has no effect while top_k is above 0: {backtest.some(dead)}")
    if without := [case.series.symbol for case in cases if case.strategies and not case.rows]:
        say(
            f"no configuration of {backtest.some(without)} in {config.hyperparams.dir} for --params "
            f"{','.join(asked.params)}; left out; --params {chosen.DEFAULT} trades on the models' published defaults"
        )
    cases = [case for case in cases if case.rows or not case.strategies]
    if not cases:
        raise ConfigError("nothing is left to trade")
    return cases


def _usable(config: Config, asked: Asked, series: Series) -> tuple[list[Strategy], list[str]]:
    """The strategies that a symbol's bars allow, and why not the others. Raises DataError; StrategyError for none."""
    usable, refused = [], []
    for one in asked.strategies:
        try:
            one.check_bars(series.bars, str(series.path))
            usable.append(one)
        except StrategyError as error:
            refused.append(str(error))
    if not usable:
        raise StrategyError(refused[0])
    plan = asked.plan
    least = config.windows.min_context
    check_length(series.symbol, series.bars, bars=plan.bars, train=plan.before(usable), min_context=least)
    check_bars(backtesting.bars_read(series.bars, plan, usable), str(series.path))
    return usable, refused


def trade(
    config: Config, asked: Asked, cases: Sequence[Case], slots: Sequence[DeviceSlot]
) -> tuple[list[Line], list[str]]:
    """Trade every strategy of every case, buying and holding beside them; and what went wrong with the others."""
    settings = processes.settings_text(config)
    jobs = [
        Job(
            settings=settings,
            model=model,
            symbol=case.series.symbol,
            bars=case.series.bars,
            asset=case.asset,
            names=[one.name for one in case.strategies],
            rows=[row for row in case.rows if row.model == model],
            plan=asked.plan,
        )
        for model in (ENSEMBLE, *reversed(asked.models))  # the later models of the list take longer: they begin
        for case in cases
    ]
    jobs = [job for job in jobs if job.rows]
    answers: dict[tuple[str, str], Sequence[Answer]] = {}
    if jobs:
        used = slots[: len(jobs)]
        what = f"{counted(len(cases), 'symbol')}, {counted(sum(len(job.rows) for job in jobs), 'configuration')}"
        say(f"{what}, on {counted(len(used), used[0].device.split(':')[0] + ' process')}")
        with Processes(used) as pool:
            for job, found in pool.run(trade_job, jobs, sizes=[len(job.rows) for job in jobs]):
                answers[job.symbol, job.model] = found
    lines, errors = [], []
    for case in cases:
        symbol, plan = case.series.symbol, asked.plan
        lines.append(_line(case, backtesting.benchmark(plan, case.series.bars, case.asset), None, ""))
        by_model = {model: iter(answers.get((symbol, model), ())) for model in (*asked.models, ENSEMBLE)}
        for row in case.rows:
            answer = next(by_model[row.model])
            if answer.error:
                errors.append(f"{symbol} {row.label}: could not be traded on: {answer.error}")
            lines += [_line(case, traded, row, answer.digest) for traded in answer.traded]
    return lines, errors


def _line(case: Case, traded: Traded, configuration: ComparedConfiguration | None, digest: str) -> Line:
    count = len(traded.booked[backtesting.CONSERVATIVE].returns)
    return Line(
        symbol=case.series.symbol,
        tried_as=case.series.symbol,
        asset=case.asset,
        bars_a_year=case.asset.bars_a_year,
        times=case.series.bars.timestamps[-count:],
        configuration=configuration,
        digest=digest,
        traded=traded,
    )


def trade_job(job: Job, device: str) -> list[Answer]:
    """In a process that keeps its evaluator: trade on these configurations' forecasts."""
    picked = strategies(tuple(job.names))
    count = job.plan.bars + job.plan.before(picked)
    evaluator = processes.evaluator(job.settings, job.model, device, together=min(count, TOGETHER))
    evaluator.max_num_samples = 0  # nothing is drawn ahead for trials
    contexts = backtesting.last_bars(job.symbol, job.bars, count)
    found = []
    for row in job.rows:
        try:
            forecasts = backtesting.forecasts_of(evaluator, contexts, row.params, picked)
            traded = backtesting.trade(job.plan, picked, job.bars, forecasts, job.asset)
            digest = digest_of(row.model, row.params, fingerprint_of(evaluator, row.params))
            found.append(Answer(digest=digest, traded=traded))
        except ExpectedError as error:
            found.append(Answer(error=str(error)))
    return found


# --- what was ever tried ------------------------------------------------------------------------------------


def counted_rows(lines: Sequence[Line], plan: Plan, storage: RetryingStorage | None) -> list[BacktestRow]:
    """What there is to say of each line, beside all that was ever tried on its symbol; these tries are kept."""
    tries = [
        Try(
            symbol=line.tried_as,
            configuration=line.digest,
            strategy=backtesting.try_name(line, plan),
            hold=line.traded.hold,
            sharpe=backtesting.sharpe_of_try(line),
        )
        for line in lines
    ]
    tries = list({(one.symbol, one.configuration, one.strategy, one.hold): one for one in tries}.values())
    if storage is not None:
        ever = record(storage, tries)
    else:
        ever = {symbol: [one.sharpe for one in tries if one.symbol == symbol] for symbol in {t.symbol for t in tries}}
    return [backtesting.row_of(line, ever[line.tried_as]) for line in lines]


# --- in promotions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _PairJob:
    settings: str
    strategy: str
    windows: Contexts
    asset: AssetClass
    configurations: Sequence[MeasuredConfiguration]  # the one in use and the candidate


def returns_gate(config: Config, strategy: str) -> ReturnsGate:
    """What `promote --pnl-gate` asks: the returns of both configurations on the confirmation windows of a study.

    It loads models when it is asked, and raises ExpectedError where the bars cannot be traded on or forecast.
    """
    settings, slots = processes.settings_text(config), device_slots(None, None)[:1]
    (one,) = strategies((strategy,))

    def difference(study: Study, old: MeasuredConfiguration, new: MeasuredConfiguration) -> ReturnsDifference:
        (series,), _ = read_series(config, [study.symbol])
        one.check_bars(series.bars, str(series.path))
        bars = bars_until(series.bars, study.as_of)
        windows = confirmation_windows(config, study.symbol, bars)
        origins = tuple(range(windows.origins[0], windows.origins[-1] + 1))
        check_bars(bars.slice(origins[0] - 1, origins[-1] + 1), str(series.path))
        job = _PairJob(
            settings=settings,
            strategy=strategy,
            windows=Contexts(symbol=study.symbol, bars=bars, origins=origins, horizon=1),
            asset=config.backtest.asset_class(study.symbol, bars.timestamps),
            configurations=(old, new),
        )
        with Processes(slots) as here:
            ((_, found),) = here.run(_difference, [job])
        return found

    return difference


def _difference(job: _PairJob, device: str) -> ReturnsDifference:
    (one,) = strategies((job.strategy,))
    forecasts = []
    for configuration in job.configurations:
        evaluator = processes.evaluator(job.settings, configuration.model, device)
        evaluator.max_num_samples = 0  # nothing is drawn ahead for trials
        forecasts.append(backtesting.forecasts_of(evaluator, job.windows, configuration.params, [one]))
    return backtesting.returns_difference(one, job.windows, job.asset, *forecasts)
