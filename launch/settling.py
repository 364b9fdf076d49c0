"""`studies settle`: outcomes of the forecasts that were served, and of their shadows, as their bars arrive.

Every symbol is written at once, so that a command that is stopped leaves whole symbols, and the next one goes on.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import click

from forecasters import ExpectedError
from forecasters.models import MODELS
from launch.output import counted, say, wide_console
from launch.places import open_storage
from launch.views.tables import Column, Table, numbers, terminal
from objectives.evaluation import Evaluator
from storage import DatabaseUnavailable, configs, history, outcomes
from storage.commands import command as suggested
from storage.forecasts import LIVE, SHADOW, ForecastRow, forecasts_of, forget, write_forecasts, write_outcomes
from storage.retrying import RetryingStorage
from studies import questions
from studies.bars_cache import read_bars_once
from studies.config import Config, ConfigError
from studies.ensembles import checkpoint_of, models_of
from studies.evaluators import checkpoint_fingerprint, ensemble_evaluator, load_forecaster, serving
from studies.evidence import ENSEMBLE
from studies.questions import ReadBars, closed_bars, serving_evaluator
from studies.series import file_of
from studies.settling import settle, shadow_question

AT_ONCE = 32  # shadows that are written together


@dataclass(frozen=True, kw_only=True)
class SettledSymbol:
    """One row of what the command prints."""

    symbol: str
    outcomes: int  # that are new
    shadows: int  # forecasts of the replaced configuration that are new
    waiting: int  # forecasts of which a bar has not come yet
    revised: int  # settled forecasts whose last known close is another one by now
    lost: int  # forecasts whose last known bar is no longer in the file


def command(config: Config, symbols: Sequence[str], *, device: str, as_json: bool) -> None:
    """What the command does. Raises ExpectedError; exits with status 1 where a symbol could not be settled."""
    storage = open_storage(config, write=True)
    names = symbols or outcomes.symbols(storage)
    if not names:
        say(f"no forecast was served yet; ask for one with: {suggested('studies forecast SYMBOL')}")
    shadows, rows, failed = Shadows(config, device), [], False
    for symbol in names:
        try:
            rows.append(_settled(config, storage, symbol, shadows))
        except DatabaseUnavailable:
            raise
        except ExpectedError as error:
            say(f"{symbol} left out: {' '.join(str(error).split())}")
            failed = True
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        console = wide_console()
        console.print(terminal(table(rows), console.width))
    for row in rows:
        if row.revised:
            what = counted(row.revised, "forecast")
            say(f"{row.symbol}: the last close of {what} was revised since; what came is brought to its scale")
        if row.lost:
            say(f"{row.symbol}: {counted(row.lost, 'forecast')} cannot be settled: the last bar known is gone")
    if deleted := forget(storage, keep_days=config.storage.keep_days):
        say(f"deleted {counted(deleted, 'forecast')} older than [storage] keep_days = {config.storage.keep_days}")
    if failed or shadows.failed:
        sys.exit(1)


def read_closed(config: Config, symbol: str) -> ReadBars:
    """The closed bars of a symbol's file. Raises DataError."""
    path = file_of(config.data.dir, symbol)
    bars, _ = read_bars_once(path)
    return closed_bars(config, symbol, path, bars, written_s=path.stat().st_mtime)


def _settled(config: Config, storage: RetryingStorage, symbol: str, shadows: Shadows) -> SettledSymbol:
    read = read_closed(config, symbol)
    made = shadows.make(storage, symbol, read)
    waiting = outcomes.waiting(storage, symbol)
    now = datetime.now(UTC)
    found = [settle(row, read.bars, now=now) for row in waiting]
    rows = [one for each in found for one in each.outcomes]
    asked = [len(row.content["keys"]) * row.horizon for row in waiting]
    return SettledSymbol(
        symbol=symbol,
        outcomes=storage.transaction(lambda c: write_outcomes(c, rows)) if rows else 0,
        shadows=made,
        waiting=sum(len(each.outcomes) < count for each, count in zip(found, asked, strict=True)),
        revised=sum(each.revised and bool(each.outcomes) for each in found),
        lost=sum(each.lost for each in found),
    )


class Shadows:
    """Makes the forecasts of replaced configurations; a model is loaded when it is first needed."""

    def __init__(self, config: Config, device: str) -> None:
        self._config, self._device = config, device
        self.failed = False

    def make(self, storage: RetryingStorage, symbol: str, read: ReadBars) -> int:
        """Forecast what was served of a symbol since its last promotion with what that replaced; returns how many.

        What cannot be forecast is said, and does not keep outcomes from being settled. Raises DatabaseUnavailable.
        """
        try:
            root = self._config.hyperparams.dir
            record, (since, replaced) = configs.read(root, "best", symbol), history.standing(root, symbol)
            if record is None or replaced is None:
                return 0
            if unknown := [model for model in models_of(replaced) if model not in MODELS]:
                raise ConfigError(f"is of the model {unknown[0]!r}; those here are {', '.join(MODELS)}")
            rows = forecasts_of(storage, symbol)
            there = {_asked(row) for row in rows if _is(row, SHADOW, replaced.digest)}
            asked = [
                row
                for row in rows
                if _is(row, LIVE, record.digest) and (since is None or row.computed_at >= since)
                if _asked(row) not in there
            ]
            if not asked:
                return 0
            checkpoint = checkpoint_of(replaced, self._checkpoint)
            found = [shadow_question(self._config, row, replaced, read, checkpoint) for row in asked]
            left = [one for one in found if one is not None]
            made = 0
            for start in range(0, len(left), AT_ONCE):
                part = left[start : start + AT_ONCE]
                answers = [questions.answer(self._evaluator(replaced.model), one, role=SHADOW) for one in part]
                made += storage.transaction(lambda c, answers=answers: write_forecasts(c, answers))
            return made
        except DatabaseUnavailable:
            raise
        except ExpectedError as error:
            self.failed = True
            say(f"{symbol}: no shadow forecasts: {' '.join(str(error).split())}")
            return 0

    @functools.cache  # noqa: B019 - as long as the command lasts
    def _checkpoint(self, model: str) -> str:
        return checkpoint_fingerprint(self._config, model)

    @functools.cache  # noqa: B019 - as long as the command lasts
    def _evaluator(self, model: str) -> Evaluator:
        config = serving(self._config, self._config.windows.horizon)
        if model == ENSEMBLE:
            return ensemble_evaluator(config, self._evaluator)
        return serving_evaluator(config, load_forecaster(config, model, device=self._device))


def _is(row: ForecastRow, role: str, promoted_digest: str) -> bool:
    return row.role == role and row.promoted == promoted_digest


def _asked(row: ForecastRow) -> tuple[object, ...]:
    """What a shadow has in common with what it is a shadow of."""
    return row.as_of, row.bars, row.horizon, *sorted(row.content["keys"])


def table(rows: Sequence[SettledSymbol]) -> Table:
    """A row a symbol."""
    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows]),
            *(
                numbers(name, [str(getattr(row, name)) for row in rows])
                for name in ("outcomes", "shadows", "waiting", "revised", "lost")
            ),
        ],
        keep_empty=True,
    )
