"""`studies reduce`: how few samples the configurations in use need, and the promotion of those."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from forecasters import ExpectedError
from forecasters.models import MODELS
from launch import processes
from launch.devices import device_slots
from launch.output import counted, say, show
from launch.processes import Processes
from launch.views.tables import NOTHING, Column, Table, numbers, percent_gain
from storage import configs
from storage.commands import command as suggested
from storage.configs import Record
from studies import config as configuration
from studies import reducing
from studies.config import Config, ConfigError
from studies.reducing import Reduction
from studies.series import Series, read_usable_series


def command(
    config: Config,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    max_cost: float,
    apply: bool,
    gpus: Sequence[int],
    cpus: int | None,
    as_json: bool,
) -> None:
    """What the command does. Raises ExpectedError; a symbol that fails is said and does not keep the others."""
    records, failures = _records(config, symbols, models)
    series, unusable, notes = read_usable_series(config, [record.symbol for record in records])
    for note in notes:
        say(note)
    failures |= unusable
    by_symbol = {each.symbol: each for each in series}
    settings = processes.settings_text(config)
    jobs = [
        _Job(settings=settings, series=by_symbol[record.symbol], record=record, max_cost=max_cost, apply=apply)
        for record in records
        if record.symbol in by_symbol
    ]
    found: list[Reduction] = []
    slots = device_slots(gpus or None, cpus)[: max(1, len(jobs))]
    with Processes(slots) as workers:
        for job, result in workers.run(_reduce, jobs, sizes=[1] * len(jobs)):
            if isinstance(result, Reduction):
                found.append(result)
            else:
                failures[job.record.symbol] = result
    found.sort(key=lambda one: one.symbol)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2))
    elif found:
        show(found, table, as_json=False)
    for symbol, reason in failures.items():
        say(f"{symbol}: {reason}" if symbol not in reason else reason)
    fewer = counted(sum(one.reduced is not None for one in found), "symbol")
    if not any(one.reduced for one in found):
        say("nothing to reduce")
    elif apply:
        say(f"{fewer} promoted with fewer samples; undo it with: {suggested('promote --rollback SYMBOL')}")
    else:
        say(f"{fewer} can do with fewer samples; --apply promotes them")
    if failures:
        sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class _Job:
    settings: str
    series: Series
    record: Record
    max_cost: float
    apply: bool


def _reduce(job: _Job, device: str) -> Reduction | str:
    """In a process that keeps its forecasters; what is wrong with one symbol ends no other."""
    config = configuration.from_json(json.loads(job.settings))
    try:
        forecaster = processes.forecaster(job.settings, job.record.model, device)
        return reducing.reduce(config, job.series, job.record, forecaster, max_cost=job.max_cost, apply=job.apply)
    except ExpectedError as error:
        return str(error)


def _records(config: Config, symbols: Sequence[str], models: Sequence[str]) -> tuple[list[Record], dict[str, str]]:
    """The promoted files of the symbols, none given: of all there are; and why others have none that can be measured.

    Raises ConfigError where there is no file at all.
    """
    root, failures = config.hyperparams.dir, dict[str, str]()
    records = []
    for symbol in symbols or configs.symbols_in(root, "best"):
        try:
            record = configs.read(root, "best", symbol)
        except ExpectedError as error:
            failures[symbol] = str(error)
            continue
        if record is None:
            path = configs.file_path(root, "best", symbol)
            failures[symbol] = f"{path}: no promoted file; {suggested(f'promote --symbols {symbol}')} makes one"
        elif record.model in MODELS and not MODELS[record.model].params.num_samples:
            if symbols:
                failures[symbol] = f"{record.path}: is of {record.model}, which draws no samples: nothing to reduce"
        elif record.model in models:
            records.append(record)
        elif symbols:
            failures[symbol] = f"{record.path}: is of {record.model}; the models asked for are {', '.join(models)}"
    if not records:
        words = next(
            iter(failures.values()), f"{root / 'best'}: no promoted file of {', '.join(models)}; promote one first"
        )
        raise ConfigError(words)
    return records, failures


def table(found: Sequence[Reduction]) -> Table:
    """One row a symbol."""
    costs = [one.cost_of(one.reduced) if one.reduced is not None else None for one in found]
    refused = [next((c for c in one.costs if c.samples < (one.reduced or one.samples)), None) for one in found]

    def ratio(one: Reduction, name: str) -> str:
        if one.before is None or one.after is None:
            return NOTHING
        return f"{getattr(one.before, name) / getattr(one.after, name):.3g}x less"

    return Table(
        columns=[
            Column(heading="symbol", cells=[one.symbol for one in found]),
            Column(heading="model", cells=[one.model for one in found], priority=3),
            numbers("samples", [str(one.samples) for one in found], 9),
            numbers("its cost", [percent_gain(one.costs[0].cost) for one in found], 4),
            numbers("enough", [NOTHING if one.reduced is None else str(one.reduced) for one in found], 10),
            numbers("cost", [percent_gain(cost.cost) if cost else NOTHING for cost in costs], 8),
            numbers("95 % bound", [percent_gain(cost.bound) if cost else NOTHING for cost in costs], 9),
            Column(
                heading="next fewer, cost",
                cells=[f"{one.samples}, {percent_gain(one.cost)}" if one else NOTHING for one in refused],
                right=True,
                priority=5,
            ),
            Column(heading="against", cells=[one.reference for one in found], priority=4),
            numbers("windows", [str(one.windows) for one in found], 2),
            numbers("passes", [str(one.passes) for one in found], 1),
            numbers("reader's time", [ratio(one, "total") for one in found], 7),
            numbers("reader's memory", [ratio(one, "at_once") for one in found], 6),
        ]
    )
