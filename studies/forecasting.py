"""Forecasts on demand: the library object that `studies forecast` and `studies serve` answer with.

    from studies.forecasting import Forecasts

    with Forecasts("studies.toml") as forecasts:
        answers = forecasts.ask(["BTCUSD", "AAPL"], keys=["high", "low", "close"])
        print(answers.forecasts["BTCUSD"].keys["close"].points, answers.refused)

Owns the policy of when a forecast is made again, and who makes it: an answer is looked for in memory, then among the
rows of all processes, and is computed by one of them. A forecast is known by the digest of everything that decides its
numbers, so that no answer is ever of other bars or another configuration than its files say when it is asked for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from forecasters import ExpectedError
from objectives.bars import DataError
from storage.forecasts import ForecastRow
from storage.retrying import RetryingStorage, one_line
from studies import config as configuration
from studies.config import Config, ConfigError
from studies.questions import QUANTILES, Question
from studies.sources import Sources
from studies.together import FAILED, JOINED, MEMORY, Together

KEPT = 4096  # forecasts in memory
NO_SYMBOL = ""  # what requests of names are counted under that are nobody's
CLOCKS_APART_S = 60.0  # that two machines' clocks may be
MOVED = {"crypto": 0.02, "equity": 0.01}  # share of the price, by asset class

_log = logging.getLogger("studies")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When bars are read again though their file does not look changed, and whether forecasts are kept.

    Equal bars have equal forecasts, whenever they were made: what can grow old is that the bars are the last ones.
    """

    read_again_s: float
    moved: float | None  # share of the last close; None: by asset class
    kept: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Policy:
        """As the variables of the predecessor say. Raises ConfigError."""
        again = _number(environment, "PREDICTION_TIME_THRESHOLD", 1800.0) or 0.0
        ttl = _number(environment, "KRONOS_PREDICTION_CACHE_TTL", None)
        return cls(
            read_again_s=min(again, ttl) if ttl else again,  # 0: never for its sake, as with the predecessor
            moved=_number(environment, "PREDICTION_PRICE_THRESHOLD", None),
            kept=_number(environment, "KRONOS_PREDICTION_CACHE_ENABLED", 1.0) != 0,
        )


def _number(environment: Mapping[str, str], name: str, otherwise: float | None) -> float | None:
    text = environment.get(name, "").strip()
    try:
        value = float(text) if text else otherwise
    except ValueError:
        value = float("nan")
    if value is not None and not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={text} in the environment: expected a number of at least 0; correct or unset it")
    return value


@dataclass(frozen=True, kw_only=True)
class KeyForecast:
    """One price of the next bars, each with one number a step. Prices, but for `returns`, which are shares."""

    points: tuple[float, ...]  # as a bar can have them: see objectives/keys.py
    q10: tuple[float, ...] | None  # None where the model knows no quantiles
    q50: tuple[float, ...] | None
    q90: tuple[float, ...] | None
    returns: tuple[float, ...]  # of the points over the last close
    repaired: bool  # whether a point is another than the model's


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A symbol's next bars, where they come from, and how old that is."""

    symbol: str
    model: str
    configuration: str  # digest of model, params and checkpoint
    promoted: str  # digest of the promoted file
    study: str | None
    trial: int | None
    fingerprint: str  # of the checkpoint
    digest: str  # of all that decides the numbers
    bars: str  # digest of the bars that were read
    as_of: datetime  # UTC, time of the last of them
    next_close: datetime  # when the bar after it will have closed, as far as its file's bars tell
    last_close: float
    horizon: int
    keys: Mapping[str, KeyForecast]
    computed_at: datetime  # UTC
    age_s: float  # since then
    bars_age_s: float  # since as_of
    stale: bool
    stale_reason: str | None  # a newer bar has closed that the file does not have, or the clock was set back
    cached: str  # memory, stored, computed or joined
    price_moved: bool  # whether the price asked with is so far from the last close that bars were read again

    @property
    def trial_name(self) -> str:
        """The study and trial that found the configuration, as other commands take it; empty where none did."""
        return "" if self.study is None else f"{self.study}#{self.trial}" if self.trial is not None else self.study

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        times = {name: getattr(self, name).isoformat() for name in ("as_of", "next_close", "computed_at")}
        return {**vars(self), **times, "keys": {key: vars(one) for key, one in self.keys.items()}}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of every symbol that was asked for, its forecast or one line why there is none."""

    forecasts: Mapping[str, Forecast]
    refused: Mapping[str, str]


class Forecasts:
    """Forecasts with the configurations in use, for any number of threads. Models are loaded when first needed.

    settings: a TOML file or a Config; None: the defaults. storage: where forecasts are kept for all processes and for
    what comes of them; by default the one that [storage] url names. With neither they are kept in memory only.
    device: "cpu" or "cuda:0". note: takes a line that a person should know, each once.
    Raises ConfigError and DatabaseUnavailable.
    """

    def __init__(
        self,
        settings: Config | Path | str | None = None,
        *,
        storage: RetryingStorage | None = None,
        device: str = "cpu",
        environment: Mapping[str, str] = os.environ,
        note: Callable[[str], None] = _log.warning,
    ) -> None:
        path = Path(settings) if isinstance(settings, str) else settings
        self.config = path if isinstance(path, Config) else configuration.load(path)
        self.policy = Policy.of(environment)
        if storage is None and self.config.storage.url:
            from storage import database  # here: it imports Optuna

            database.quiet_optuna()
            storage = database.open_storage(self.config.storage.url, wait_s=self.config.storage.wait_s)
        if storage is None:
            note("no database: forecasts are kept in memory only, and nobody can settle them")
        self.sources = Sources(self.config, note)
        self.together = Together(self.config, storage, device=device, kept=self.policy.kept, note=note)
        self.last: dict[str, tuple[datetime, Forecast | str]] = {}  # by symbol: when it was answered last, and what
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, ForecastRow] = OrderedDict()
        self._under_way: dict[str, Future[tuple[ForecastRow, str]]] = {}

    def __enter__(self) -> Forecasts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer what was asked for, and write what is not written."""
        self.together.close()

    def ask(
        self,
        symbols: Sequence[str],
        *,
        horizon: int | None = None,
        keys: Sequence[str] = (),
        price: float | None = None,
        max_age_s: float | None = None,
    ) -> Answers:
        """The forecasts of these symbols, or why there is none; raises nothing that a person can mend.

        horizon: bars ahead, by default the settings'. keys: of `forecasters.KEYS`, by default the settings'.
        price: where the market is now, of a single symbol; far from the last close it has the bars read again.
        max_age_s: how long ago, at most, the last bar may have begun.
        """
        found: dict[str, _Found] = {}
        forecasts: dict[str, Forecast] = {}
        refused: dict[str, str] = {}
        for symbol in dict.fromkeys(symbols):
            try:
                found[symbol] = self._find(*self._question(symbol, horizon, keys or (self.config.search.key,), price))
            except ExpectedError as error:
                refused[symbol] = " ".join(str(error).split())
        for symbol, one in found.items():
            try:
                forecast = self._forecast(one)
                _check_age(forecast, max_age_s)
                forecasts[symbol] = forecast
            except ExpectedError as error:
                refused[symbol] = " ".join(str(error).split())
            except Exception as error:  # noqa: BLE001 - the others are answered, and this one is told
                _log.exception("%s: the forecast failed", symbol)
                refused[symbol] = f"{symbol}: the forecast failed: {one_line(error)}"
        self._note_answers(forecasts, refused)
        return Answers(forecasts=forecasts, refused=refused)

    def _question(
        self, symbol: str, horizon: int | None, keys: Sequence[str], price: float | None
    ) -> tuple[Question, bool]:
        """What is asked, and whether the price has moved. Raises ExpectedError."""

        def question(at_once: bool = False) -> Question:
            return self.sources.question(
                symbol,
                horizon=self.config.windows.horizon if horizon is None else horizon,
                keys=keys,
                max_read_s=self.policy.read_again_s,
                at_once=at_once,
            )

        asked = question()
        if price is None or not self._moved(asked, price):
            return asked, False
        asked = question(at_once=True)
        return asked, self._moved(asked, price)

    def _moved(self, question: Question, price: float) -> bool:
        threshold = self.policy.moved
        if threshold is None:
            threshold = MOVED[question.read.asset.name]
        return abs(price / float(question.read.bars.close[-1]) - 1) >= threshold

    def _find(self, question: Question, moved: bool) -> _Found:
        """The forecast from memory, or who makes it."""
        with self._lock:
            if self.policy.kept and (row := self._memory.get(question.digest)):
                self._memory.move_to_end(question.digest)
                return _Found(question=question, moved=moved, row=row)
            future = self._under_way.get(question.digest)
            if mine := future is None:
                future = self._under_way[question.digest] = Future()
        if mine:
            future.add_done_callback(lambda done: self._keep(question.digest, done))
            self.together.submit(question, future)
        return _Found(question=question, moved=moved, future=future, mine=mine)

    def _keep(self, digest: str, done: Future[tuple[ForecastRow, str]]) -> None:
        with self._lock:
            del self._under_way[digest]
            if done.exception() is None and self.policy.kept:
                self._memory[digest] = done.result()[0]
                while len(self._memory) > KEPT:
                    self._memory.popitem(last=False)

    def _forecast(self, found: _Found) -> Forecast:
        """Raises what making it raised."""
        question, read = found.question, found.question.read
        row, kind = (found.row, MEMORY) if found.future is None else found.future.result()
        assert row is not None
        clock = time.time()
        age_s = clock - row.computed_at.timestamp()
        reason = _stale_reason(question, row, clock)
        return Forecast(
            symbol=question.symbol,
            model=question.model,
            configuration=question.configuration,
            promoted=question.record.digest,
            study=question.in_use.study,
            trial=question.in_use.trial,
            fingerprint=question.checkpoint,
            digest=question.digest,
            bars=read.digest,
            as_of=read.as_of,
            next_close=read.next_close,
            last_close=row.last_close,
            horizon=question.horizon,
            keys={key: _key_forecast(one, row.last_close) for key, one in row.content["keys"].items()},
            computed_at=row.computed_at,
            age_s=max(age_s, 0.0),
            bars_age_s=max(clock - read.as_of.timestamp(), 0.0),
            stale=reason is not None,
            stale_reason=reason,
            cached=kind if found.future is None or found.mine else JOINED,
            price_moved=found.moved,
        )

    def _note_answers(self, forecasts: Mapping[str, Forecast], refused: Mapping[str, str]) -> None:
        now = datetime.now(UTC)
        counts: Counter[tuple[date, str, str]] = Counter()
        for symbol, one in forecasts.items():
            counts[now.date(), symbol, one.cached] += 1
            self.last[symbol] = (now, one)
        for symbol, reason in refused.items():
            known = self.sources.knows(symbol)
            counts[now.date(), symbol if known else NO_SYMBOL, FAILED] += 1
            if known:
                self.last[symbol] = (now, reason)
        self.together.count(counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """Where the forecast of a question is, or will be."""

    question: Question
    moved: bool
    row: ForecastRow | None = None
    future: Future[tuple[ForecastRow, str]] | None = None
    mine: bool = False  # whether this request is the first that asked


def _check_age(forecast: Forecast, max_age_s: float | None) -> None:
    """Raises DataError."""
    if max_age_s is not None and forecast.bars_age_s > max_age_s:
        raise DataError(
            f"{forecast.symbol}: too old: its last bar, of {forecast.as_of:%Y-%m-%d %H:%M}Z, began "
            f"{forecast.bars_age_s:.0f} s ago, and {max_age_s:g} s are allowed; add newer bars"
        )


def _stale_reason(question: Question, row: ForecastRow, clock: float) -> str | None:
    if clock < row.computed_at.timestamp() - CLOCKS_APART_S:
        return f"this machine's time is before {row.computed_at:%Y-%m-%d %H:%M}Z, when it was computed; set the clock"
    if clock >= question.read.next_close.timestamp():
        closed = f"{question.read.next_close:%Y-%m-%d %H:%M}Z"
        return f"a bar after the last of {question.read.path} has closed by {closed}; add it"
    return None


def _key_forecast(content: Mapping[str, Any], last_close: float) -> KeyForecast:
    points = tuple(content["points"])
    bands = {name: None if content[name] is None else tuple(content[name]) for name in QUANTILES}
    return KeyForecast(
        points=points,
        returns=tuple(point / last_close - 1 for point in points),
        repaired=content["points"] != content["scored"],
        **bands,
    )
