"""What came of forecasts: each step of each price beside the bar that was forecast; and shadows of what was served.

A shadow is the forecast of the same bars by the configuration that a promotion replaced. With the seeds of served
forecasts it can be made at any time later, from the bars that there were, and is the same to the last bit; so it is
made where outcomes are, for every forecast that was served. Knows no databases or commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from forecasters import KEYS, Bars
from objectives.bars import bars_fingerprint
from objectives.strategies import trailing_sigma
from objectives.windows import Windows
from storage.configs import Record
from storage.forecasts import ForecastRow, OutcomeRow
from studies.config import Config
from studies.questions import Question, ReadBars, question_of, utc


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What there is to say of a forecast so far."""

    outcomes: Sequence[OutcomeRow]  # of the steps whose bars have come
    revised: bool = False  # whether the last close that it knew is another one by now
    lost: bool = False  # whether the last bar that it knew is no longer among the bars


def settle(row: ForecastRow, bars: Bars, *, now: datetime) -> Settled:
    """What came of a forecast, of the bars that have come since. bars: none that is unfinished.

    Errors are of what the model said, relative to the last close that it knew. Where that close was revised meanwhile,
    as by an adjustment for a dividend or a split, the prices that came are brought to its scale.
    """
    origin = origin_of(row, bars)
    if origin is None:
        return Settled(outcomes=(), lost=True)
    steps = min(row.horizon, len(bars) - origin)
    last_close = bars.close[origin - 1]
    if not steps:
        return Settled(outcomes=(), revised=bool(last_close != row.last_close))
    scale = 1.0 if last_close == row.last_close else row.last_close / last_close
    windows = Windows(symbol=row.symbol, bars=bars, origins=(origin,), horizon=steps)
    sigma = float(trailing_sigma(bars.close[:origin], 1)[0])
    dues = [utc(time) for time in bars.timestamps[origin : origin + steps]]
    found = []
    for key, said in row.content["keys"].items():
        of_key = windows.of_key(key)
        actuals, no_change = of_key.actuals[0] * scale, of_key.no_change[0] * scale
        signed = (np.array(said.get("scored", said["points"])[:steps]) - actuals) / row.last_close
        for step in range(steps):
            actual = float(actuals[step])
            found.append(
                OutcomeRow(
                    digest=row.digest,
                    role=row.role,
                    key=key,
                    step=step + 1,
                    due=dues[step],
                    actual=actual,
                    error=abs(float(signed[step])),
                    signed_error=float(signed[step]),
                    no_change_error=float(abs(no_change - actual) / row.last_close),
                    sigma=sigma or None,
                    in_band=said["q10"][step] <= actual <= said["q90"][step] if said.get("q10") else None,
                    settled_at=now,
                )
            )
    return Settled(outcomes=found, revised=scale != 1.0)


def shadow_question(
    config: Config, row: ForecastRow, record: Record, read: ReadBars, checkpoint: str
) -> Question | None:
    """What the replaced configuration is asked of the bars that a served forecast knew; None where those were revised.

    Raises ConfigError for a configuration that cannot be forecast with.
    """
    origin = origin_of(row, read.bars)
    if origin is None:
        return None
    known = read.bars.slice(0, origin)
    if (digest := bars_fingerprint(known)) != row.bars:
        return None
    keys = [key for key in KEYS if key in row.content["keys"]]
    then = replace(read, bars=known, digest=digest)
    return question_of(config, record, then, horizon=row.horizon, keys=keys, checkpoint=checkpoint)


def origin_of(row: ForecastRow, bars: Bars) -> int | None:
    """The place of the first bar that was forecast; None where the last one that was known is not there any more."""
    as_of = np.datetime64(row.as_of.replace(tzinfo=None), "ns")
    origin = int(np.searchsorted(bars.timestamps, as_of)) + 1
    return origin if origin <= len(bars) and bars.timestamps[origin - 1] == as_of else None
