"""What is asked when a symbol's next bars are forecast: its configuration in use, its closed bars, and what tells it.

Owns the digest of everything that decides a forecast's numbers, what of a file of bars is closed, and the forecast of
one question. Knows nothing of caches, databases' connections or policies.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from forecasters import KEYS, Bars, LoadedForecaster
from forecasters.models import MODELS
from objectives.bars import DataError, bars_fingerprint, require_keys, timestamp_text
from objectives.costs import AssetClass
from objectives.ensemble import fingerprint_of
from objectives.evaluation import Evaluator
from objectives.quantiles import unshrunk
from objectives.windows import SeedKind, now
from storage import configs
from storage.configs import Record
from storage.forecasts import LIVE, ForecastRow
from studies import space as spaces
from studies.config import Config, ConfigError
from studies.ensembles import complete, models_of
from studies.evaluators import evaluator_of, serving
from studies.promoted_file import InUse

NUMERICS = 3  # raised where equal questions get other numbers than before
QUANTILES = {"q10": "quantile_0.10", "q50": "quantile_0.50", "q90": "quantile_0.90"}
CACHE_BYTES = 2**28  # of an evaluator: the draws that points and quantiles of one question share
MAX_HORIZON = 256  # steps: one request must not keep the thread of models busy for hours
RECENT_BARS = 60  # whose steps say how long a bar lasts
SAME_TIMES = 8  # earlier bars of the same weekday and time that say when the next one comes


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadBars:
    """The closed bars of a symbol's file."""

    path: Path
    bars: Bars
    digest: str
    asset: AssetClass
    unfinished: bool  # whether a last bar was left out, as it was written before it ended
    next_close: datetime  # when the bar after the last one has closed

    @property
    def as_of(self) -> datetime:
        return utc(self.bars.timestamps[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What decides a forecast's numbers, and where they come from."""

    symbol: str
    record: Record
    params: Mapping[str, Any]
    checkpoint: str  # fingerprint of the weights
    dtype: str
    objective: str
    read: ReadBars
    horizon: int
    keys: tuple[str, ...]

    @property
    def model(self) -> str:
        return self.record.model

    @cached_property
    def configuration(self) -> str:
        return spaces.digest_of(self.model, self.params, self.checkpoint)

    @cached_property
    def digest(self) -> str:
        said = {
            "numerics": NUMERICS,
            "model": self.model,
            "checkpoint": self.checkpoint,
            "dtype": self.dtype,
            "objective": self.objective,
            "params": dict(self.params),
            "horizon": self.horizon,
            "keys": self.keys,
            "symbol": self.symbol,
            "seeds": SeedKind.SERVED.value,
            "bars": self.read.digest,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @cached_property
    def in_use(self) -> InUse:
        """How the configuration came about."""
        return InUse.of(self.record)


def promoted(config: Config, symbol: str) -> Record:
    """The configuration that a symbol has in use. Raises ConfigFileError, and ConfigError for none or its model."""
    record = configs.read(config.hyperparams.dir, "best", symbol)
    if record is None:
        path = configs.file_path(config.hyperparams.dir, "best", symbol)
        raise ConfigError(f"{symbol}: no configuration is promoted ({path}); search the symbol, and promote")
    if unknown := [model for model in models_of(record) if model not in MODELS]:
        raise ConfigError(f"{record.path}: is of the model {unknown[0]!r}; those here are {', '.join(MODELS)}")
    return record


def question_of(
    config: Config, record: Record, read: ReadBars, *, horizon: int, keys: Sequence[str], checkpoint: str
) -> Question:
    """The question of a configuration and bars. checkpoint: the fingerprint of the model's weights.

    Raises ConfigError for a configuration, a horizon or a key that cannot be forecast, DataError for too few bars.
    """
    symbol = record.symbol
    config = serving(config, horizon)
    if unknown := [key for key in keys if key not in KEYS]:
        raise ConfigError(f"unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
    if not keys:
        raise ConfigError(f"no key is asked for; the keys are {', '.join(KEYS)}")
    if not 1 <= horizon <= MAX_HORIZON:
        raise ConfigError(f"horizon {horizon}: expected 1 to {MAX_HORIZON} bars")
    for model in models_of(record):
        if reason := MODELS[model].refuses(config.models[model], horizon):
            raise ConfigError(f"{symbol}: horizon {horizon} {reason}; ask for a shorter one")
    try:
        params = complete(config, record.model, record.config, record.metadata)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{record.path}: cannot be forecast with: {error}") from None
    require_keys(read.bars, keys, read.path)
    now(read.bars, symbol=symbol, horizon=horizon, min_context=config.windows.min_context)  # refuses too few bars
    return Question(
        symbol=symbol,
        record=record,
        params=params,
        checkpoint=checkpoint,
        dtype=config.compile.dtype,
        objective=config.search.objective,
        read=read,
        horizon=horizon,
        keys=tuple(keys),
    )


# --- bars ---------------------------------------------------------------------------------------------------


def closed_bars(config: Config, symbol: str, path: Path, bars: Bars, *, written_s: float) -> ReadBars:
    """What of a file's bars is closed. written_s: when the file was written, in seconds since 1970.

    A last bar is left out where it is known not to have ended when the file was written: of a symbol that trades around
    the clock, whose bars are stamped with their start. Raises DataError for a bar that has not begun yet.
    """
    clock, last = time.time(), bars.timestamps[-1]
    if seconds(last) > clock:
        raise DataError(
            f"{path}: its last bar, {timestamp_text(last)}, begins after the time of this machine, "
            f"{timestamp_text(np.datetime64(int(clock), 's'))}; correct the file or the clock"
        )
    asset = config.backtest.asset_class(symbol, bars.timestamps)
    steps = np.diff(bars.timestamps[-RECENT_BARS:])
    step = float(np.median(steps) / np.timedelta64(1, "s")) if len(steps) else 0.0
    unfinished = asset.name == "crypto" and len(bars) > 1 and min(clock, written_s) < seconds(last) + step
    if unfinished:
        bars = bars.slice(0, len(bars) - 1)
    close = seconds(bars.timestamps[-1]) + _gap_after(bars.timestamps) + step
    return ReadBars(
        path=path,
        bars=bars,
        digest=bars_fingerprint(bars),
        asset=asset,
        unfinished=unfinished,
        next_close=datetime.fromtimestamp(close, UTC),
    )


def _gap_after(timestamps: np.ndarray) -> float:
    """Seconds from the last bar to the next, at most: the longest after the last few of its weekday and time.

    Where there is none, as in a short history, the longest of the recent steps: no calendar is known.
    """
    week, one = np.timedelta64(7, "D"), np.timedelta64(1, "s")
    steps = np.diff(timestamps)
    if not len(steps):
        return 0.0
    same = np.flatnonzero((timestamps[-1] - timestamps[:-1]) % week == np.timedelta64(0, "ns"))[-SAME_TIMES:]
    return float((steps[same] if len(same) else steps[-RECENT_BARS:]).max() / one)


def seconds(timestamp: np.datetime64) -> float:
    """Since 1970, UTC."""
    return float(timestamp.astype("datetime64[ns]").astype(np.int64)) / 1e9


def utc(timestamp: np.datetime64) -> datetime:
    """A bar's time, to the microsecond."""
    return timestamp.astype("datetime64[us]").item().replace(tzinfo=UTC)


# --- answers ------------------------------------------------------------------------------------------------


def serving_evaluator(config: Config, forecaster: LoadedForecaster) -> Evaluator:
    """An evaluator that answers questions: nothing is drawn ahead for others."""
    evaluator = evaluator_of(serving(config, config.windows.horizon), forecaster, cache_bytes=CACHE_BYTES)
    evaluator.max_num_samples = 0
    return evaluator


def answer(evaluator: Evaluator, question: Question, *, role: str = LIVE) -> ForecastRow:
    """The forecast of a question: points and quantiles of the same draws.

    The window is alone in its forward, so that on a CPU a replay from the same bars gives the same bits, whatever else
    was asked for. Raises ForecastError, and ConfigError where other weights are loaded than were asked for.
    """
    if fingerprint_of(evaluator, question.params) != question.checkpoint:
        raise ConfigError(f"the files of {question.model}'s checkpoint have changed since it was loaded; start again")
    bars, params = question.read.bars, question.params
    context = now(bars, symbol=question.symbol, horizon=question.horizon, min_context=1)
    points = evaluator.forecast_keys(context, params, question.keys)
    keys: dict[str, dict[str, list[float] | None]] = {
        key: {"points": points.served[key][0].tolist(), "scored": points.scored[key][0].tolist()}
        for key in question.keys
    }
    for name, aggregate in QUANTILES.items():
        try:
            found = evaluator.forecast_keys(context, unshrunk(params, aggregate), question.keys).scored
        except ValueError:
            if not evaluator.exact:  # Kronos knows the exact mean, and no exact quantile
                raise
            found = None
        for key in question.keys:
            keys[key][name] = found[key][0].tolist() if found else None
    return ForecastRow(
        digest=question.digest,
        role=role,
        symbol=question.symbol,
        model=question.model,
        configuration=question.configuration,
        promoted=question.record.digest,
        study=question.in_use.study,
        trial=question.in_use.trial,
        as_of=question.read.as_of,
        bars=question.read.digest,
        horizon=question.horizon,
        last_close=float(bars.close[-1]),
        content={
            "params": dict(params),
            "checkpoint": question.checkpoint,
            "dtype": question.dtype,
            "objective": question.objective,
            "keys": keys,
        },
        computed_at=datetime.now(UTC),
    )
