"""`studies monitor`: how promoted configurations have done since, alarms, advice, and with --auto the way back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime

import click

from forecasters import ExpectedError
from launch.output import say, wide_console
from launch.places import artifacts_folder, open_storage
from launch.settling import read_closed
from launch.views import decisions, monitor, notes
from launch.views.tables import terminal
from objectives.bars import DataError
from objectives.fills import check_bars
from objectives.strategies import STRATEGIES, StrategyError
from storage import DatabaseUnavailable, configs, history, outcomes
from storage.commands import command as suggested
from storage.configs import Record
from storage.forecasts import EventRow, add_events, events_of, forecasts_of, outcomes_of, request_counts
from storage.retrying import RetryingStorage
from studies.config import Config
from studies.monitoring import STRATEGY, InUse, Monitored, monitored
from studies.promoted_file import InUse as Promotion
from studies.questions import promoted

ALARM, ROLLBACK = "alarm", "rollback"  # kinds of events
ALARMED = 3  # exit status


def command(config: Config, symbols: Sequence[str], *, auto: bool, as_json: bool) -> None:
    """What the command does. Exits with status 3 on an alarm, else with 1 where a symbol could not be looked at."""
    storage = open_storage(config, write=True)
    in_use = configs.symbols_in(config.hyperparams.dir, "best")
    names = symbols or [symbol for symbol in outcomes.symbols(storage) if symbol in in_use]
    if not names:
        served_by = suggested("studies forecast SYMBOL")
        say(f"no forecast of a promoted configuration was served yet; ask for one with: {served_by}")
    counts, rows, failed = request_counts(storage), [], False
    for symbol in names:
        try:
            rows.append(_monitored(config, storage, symbol, counts))
        except DatabaseUnavailable:
            raise
        except ExpectedError as error:
            say(f"{symbol} left out: {' '.join(str(error).split())}")
            failed = True
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        _print(rows, whole=bool(symbols))
    _keep(config, storage, rows)
    if auto:
        for row in rows:
            _roll_back(config, storage, row)
    if any(row.alarmed for row in rows):
        sys.exit(ALARMED)
    if failed:
        sys.exit(1)


def _monitored(
    config: Config, storage: RetryingStorage, symbol: str, counts: Mapping[tuple[date, str, str], int]
) -> Monitored:
    record = promoted(config, symbol)
    since, replaced = history.standing(config.hyperparams.dir, symbol)
    read = read_closed(config, symbol)
    tradable = True
    try:
        STRATEGIES[STRATEGY].check_bars(read.bars, str(read.path))
        check_bars(read.bars, str(read.path))
    except (StrategyError, DataError) as error:
        say(f"{symbol}: nothing is said of returns: {error}")
        tradable = False
    requests: dict[str, int] = {}
    for (day, of, kind), count in counts.items():
        if of == symbol and (since is None or day >= since.date()):
            requests[kind] = requests.get(kind, 0) + count
    return monitored(
        _in_use(config, record, since, replaced),
        forecasts_of(storage, symbol),
        outcomes_of(storage, symbol),
        requests,
        read.bars,
        read.asset,
        min_improvement=config.promotion.min_improvement,
        tradable=tradable,
    )


def _in_use(config: Config, record: Record, since: datetime | None, replaced: Record | None) -> InUse:
    said, horizon = Promotion.of(record), record.windows.get("forecast_horizon")
    confirmed = record.metadata.get("selection_value")
    return InUse(
        symbol=record.symbol,
        model=record.model,
        digest=record.digest,
        key=record.key,
        horizon=horizon if isinstance(horizon, int) and horizon > 0 else config.windows.horizon,
        study=said.study,
        since=since,
        confirmed_mae=confirmed if isinstance(confirmed, float) and confirmed > 0 else None,
        confirmed_skill=said.skill,
        replaced=replaced.digest if replaced else None,
    )


def _print(rows: Sequence[Monitored], *, whole: bool) -> None:
    """whole: every reading of each symbol; else a row for each."""
    console = wide_console()
    if not whole:
        console.print(terminal(monitor.summary_table(rows), console.width))
    for row in rows if whole else ():
        console.print(monitor.title(row), style="bold")
        console.print(terminal(monitor.readings_table(row), console.width))
        console.print(f"{monitor.service(row)}\n{row.advice}\n", soft_wrap=True)
    for line in monitor.EXPLANATIONS if whole else ():
        say(line)


def _keep(config: Config, storage: RetryingStorage, rows: Sequence[Monitored]) -> None:
    """Keep what was found, where it is new, for the dashboard and the report; and each alarm, once a promotion."""
    before, now, events = outcomes.newest_events(storage, monitor.MONITORED), datetime.now(UTC), []
    moved = []
    for row in rows:
        content = json.loads(json.dumps(asdict(row)))
        if row.symbol not in before or before[row.symbol].content != content:
            events.append(EventRow(at=now, symbol=row.symbol, kind=monitor.MONITORED, content=content))
            moved.append(row)
        what = (["E"] if row.alarm.rings else []) + row.acting
        told = [
            name
            for event in (events_of(storage, row.symbol, kind=ALARM) if what else ())
            if (event.content["promoted"], event.content["since"]) == (row.promoted, row.since)
            for name in event.content["what"]
        ]
        if new := [name for name in what if name not in told]:
            content = {"promoted": row.promoted, "since": row.since, "what": new, "alarm": content["alarm"]}
            events.append(EventRow(at=now, symbol=row.symbol, kind=ALARM, content={**content, "advice": row.advice}))
    storage.transaction(lambda c: add_events(c, events))
    notes.record_monitored(storage, artifacts_folder(config), moved, say=say)


def _roll_back(config: Config, storage: RetryingStorage, row: Monitored) -> None:
    """Do what `promote --rollback` does where the evidence is strong; the file must be the one that was watched.

    Rests until as many bars were forecast after a promotion or rollback as it asks for.
    """
    if not row.alarm.calls_for_rollback(config.promotion.min_improvement):
        return
    try:
        restored = history.rollback(config.hyperparams.dir, row.symbol, expected_digest=row.promoted)
    except ExpectedError as error:
        say(f"{row.symbol} not rolled back: {error}")
        return
    said = {"promoted": row.promoted, "alarm": asdict(row.alarm), "model": restored.model, "step": str(restored.kept)}
    event = EventRow(at=datetime.now(UTC), symbol=row.symbol, kind=ROLLBACK, content=said)
    storage.transaction(lambda c: add_events(c, [event]))
    decisions.show_rollback(row.symbol, restored, say)
