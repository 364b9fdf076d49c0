"""The readings of `studies monitor`: each with its number of observations, its interval, and what its trigger needs.

Owns the triggers. Knows no rows: the arrays that it is given come from studies/monitoring.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from objectives import alarm
from objectives.bootstrap import ERRORS_95, mean_interval
from objectives.metrics import skill
from objectives.performance import MIN_BARS, Performance, wilson_interval

BAND = 0.8  # of the outcomes are expected between the quantiles of 10 and 90 %
BIAS = 0.2  # sigmas that the mean error may be away from 0
MAE_RISE, SHARPE_FALL, WIN_FALL = 0.10, 0.10, 0.05  # relative
LEAST_HITS, MOST_MISSED = 0.30, 0.05
HIT_RATE = "hit rate"
HITS = ("memory", "stored", "joined")  # requests that cost no forecast


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number, how well it is known, and what its trigger would need."""

    name: str
    value: float | None
    n: int
    unit: str  # what n counts
    interval: tuple[float, float] | None = None  # 95 %
    reference: float | None = None  # what it is compared with
    trigger: str = ""  # when it would be acted on, in words
    needed: int | None = None  # n that finds the trigger's effect in 80 % of cases, with 5 % false ones
    beyond: bool = False  # whether the value is where the trigger says

    @property
    def acts(self) -> bool:
        """Whether it is beyond its trigger and enough is known to say so."""
        return self.beyond and self.needed is not None and self.n >= self.needed


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """W forecasts of H steps of which everything has come, oldest first."""

    points: np.ndarray  # [W, H], price
    actuals: np.ndarray
    no_change: np.ndarray  # errors of it [W, H], shares of the last close
    in_band: np.ndarray  # bool, of those [B] that have a band
    last_closes: np.ndarray  # [W]
    sigmas: np.ndarray  # [W], NaN where there is none

    def __len__(self) -> int:
        return len(self.last_closes)

    @property
    def errors(self) -> np.ndarray:
        """Each window's share of its MAE, [W]: those of objectives/metrics.py, bit for bit."""
        return np.abs(self.points - self.actuals).mean(axis=-1) / self.last_closes

    @property
    def in_sigmas(self) -> tuple[np.ndarray, np.ndarray]:
        """The first step's forecast and outcome, in standard deviations from the last close, each [W]."""
        unit = self.last_closes * self.sigmas
        return (self.points[:, 0] - self.last_closes) / unit, (self.actuals[:, 0] - self.last_closes) / unit


def of_errors(
    scored: Scored, *, confirmed: float | None, confirmed_skill: float | None, min_improvement: float
) -> list[Reading]:
    """Skill, MAE, bias and coverage, beside what the confirmation of the configuration found."""
    if not len(scored):
        return []
    errors, no_change, n = scored.errors, scored.no_change.mean(axis=-1), len(scored)
    mae, level = float(errors.mean()), float(no_change.mean())
    gains, promised = no_change - errors, confirmed_skill or 0.0
    found = skill(mae, level)
    readings = [
        Reading(
            name="skill",
            value=found,
            n=n,
            unit="bar",
            interval=scaled(interval_of(gains), level),
            reference=confirmed_skill,
            trigger="below 0" if promised > 0 else "",
            needed=_for_mean(gains, level * max(promised, min_improvement)),
            beyond=promised > 0 > found,
        ),
        Reading(
            name="MAE",
            value=mae,
            n=n,
            unit="bar",
            interval=interval_of(errors),
            reference=confirmed,
            trigger=f"{MAE_RISE:.0%} above the confirmed" if confirmed else "",
            needed=_for_mean(errors, MAE_RISE * (confirmed or mae)),
            beyond=confirmed is not None and mae > (1 + MAE_RISE) * confirmed,
        ),
    ]
    said, came = scored.in_sigmas
    bias = (said - came)[np.isfinite(scored.sigmas)]
    if len(bias):
        readings.append(
            Reading(
                name="bias",
                value=float(bias.mean()),
                n=len(bias),
                unit="bar",
                interval=interval_of(bias),
                reference=0.0,
                trigger=f"{BIAS:g} sigma from 0",
                needed=_for_mean(bias, BIAS),
                beyond=abs(float(bias.mean())) > BIAS,
            )
        )
    if count := len(scored.in_band):
        held = int(scored.in_band.sum())
        readings.append(_share("coverage", held, count, "step", BAND - 0.1, other=BAND, reference=BAND))
    return readings


def of_returns(live: Performance, other: Performance | None, bars_a_year: float) -> list[Reading]:
    """What a strategy earned on the served forecasts, and on those of the replaced configuration."""
    year, n = math.sqrt(bars_a_year), live.bars
    sharpe, rival = live.sharpe, other.sharpe if other else None
    level = rival if rival is not None else sharpe
    width = None if live.sharpe_error is None else ERRORS_95 * live.sharpe_error
    wins, won = live.win_rate, other.win_rate if other else None
    share = won if won is not None else wins
    return [
        Reading(
            name="Sharpe ratio",
            value=sharpe,
            n=n,
            unit="bar",
            interval=None if sharpe is None or width is None else (sharpe - width, sharpe + width),
            reference=rival,
            trigger=f"{SHARPE_FALL:.0%} below the replaced",
            needed=None
            if level is None or level <= 0
            else alarm.needed_for_sharpe(level / year, (1 - SHARPE_FALL) * level / year),
            beyond=sharpe is not None and rival is not None and sharpe < (1 - SHARPE_FALL) * rival,
        ),
        Reading(
            name="win rate",
            value=wins,
            n=live.trades,
            unit="trade",
            interval=live.win_interval,
            reference=won,
            trigger=f"{WIN_FALL:.0%} below the replaced",
            needed=alarm.needed_for_share(share, (1 - WIN_FALL) * share) if share else None,
            beyond=wins is not None and won is not None and wins < (1 - WIN_FALL) * won,
        ),
        Reading(
            name="return",
            value=live.mean,
            n=n,
            unit="bar",
            interval=live.interval,
            reference=other.mean if other else None,
            needed=alarm.needed_for_mean(1.0, sharpe / year) if sharpe else None,
        ),
        Reading(
            name="drawdown",
            value=live.drawdown,
            n=n,
            unit="bar",
            reference=other.drawdown if other else None,
        ),
    ]


def of_service(requests: Mapping[str, int], *, missed: int, bars: int) -> list[Reading]:
    """How many requests, by kind, cost no forecast, and how many of the bars that came had none."""
    readings = []
    if total := sum(requests.values()):
        hits = sum(requests.get(kind, 0) for kind in HITS)
        readings.append(_share(HIT_RATE, hits, total, "request", LEAST_HITS, other=0.2))
    if bars:
        readings.append(_share("missed bars", missed, bars, "bar", MOST_MISSED, other=0.01, below=False))
    return readings


def _share(
    name: str,
    yes: int,
    count: int,
    unit: str,
    limit: float,
    *,
    other: float,
    reference: float | None = None,
    below: bool = True,
) -> Reading:
    """A share of yes and no. other: the share that the limit is to be told from. below: where the trigger is."""
    value = yes / count
    return Reading(
        name=name,
        value=value,
        n=count,
        unit=unit,
        interval=wilson_interval(yes, count),
        reference=reference,
        trigger=f"{'below' if below else 'above'} {limit:.0%}",
        needed=alarm.needed_for_share(limit, other),
        beyond=value < limit if below else value > limit,
    )


def interval_of(values: np.ndarray) -> tuple[float, float] | None:
    return mean_interval(values) if len(values) >= MIN_BARS else None


def scaled(interval: tuple[float, float] | None, level: float) -> tuple[float, float] | None:
    return (interval[0] / level, interval[1] / level) if interval and level > 0 else None


def _for_mean(values: np.ndarray, effect: float) -> int | None:
    """How many such values it takes; None where there are too few of them to say, or nothing varies."""
    deviation = float(values.std(ddof=1)) if len(values) >= MIN_BARS else 0.0
    return alarm.needed_for_mean(deviation, effect) if deviation > 0 and effect > 0 else None
