"""How a promoted configuration has done since its promotion, beside the one that it replaced, and what to do about it.

Owns which forecasts are compared, the alarm of `studies monitor` and its advice; the other numbers are those of
studies/readings.py. Pure: rows and bars in, readings out. Knows no files, databases or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import numpy as np

from forecasters import CLOSE, Bars
from objectives import alarm
from objectives.costs import AssetClass
from objectives.fills import book
from objectives.performance import Performance, performance
from objectives.strategies import STRATEGIES, Forecasts, known_before
from storage.commands import command
from storage.forecasts import LIVE, SHADOW, ForecastRow, OutcomeRow
from studies import readings as reading
from studies.readings import HIT_RATE, Reading, Scored
from studies.settling import origin_of

STRATEGY = "simple"  # whose returns are watched
ROLLBACK, ROLLBACK_BARS = 100.0, 60  # E and bars that `--auto` asks for


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """The evidence that the replaced configuration forecasts better, valid however often one looks."""

    n: int  # bars that both forecast
    evidence: float | None  # E now; None: nothing to compare
    highest: float | None  # since the promotion
    improvement: float | None  # of the replaced configuration over the promoted one, relative
    interval: tuple[float, float] | None  # 95 %

    @property
    def rings(self) -> bool:
        return self.highest is not None and self.highest >= alarm.ALARM

    def calls_for_rollback(self, min_improvement: float) -> bool:
        """Whether it may be rolled back without asking."""
        return (
            self.evidence is not None
            and self.improvement is not None
            and self.evidence >= ROLLBACK
            and self.n >= ROLLBACK_BARS
            and self.improvement > min_improvement
        )


@dataclass(frozen=True, kw_only=True)
class InUse:
    """The configuration that is watched, as its promoted file says it."""

    symbol: str
    model: str
    digest: str  # of the file
    key: str
    horizon: int
    study: str | None
    since: datetime | None  # of its promotion or restoration
    confirmed_mae: float | None
    confirmed_skill: float | None
    replaced: str | None  # digest of the file that a rollback would put back


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """Everything that is said of one symbol."""

    symbol: str
    model: str
    promoted: str
    study: str | None
    since: str | None
    as_of: str | None  # time of the last bar that a forecast knew
    bars_behind: int | None  # bars that have come since
    readings: Sequence[Reading]
    requests: Mapping[str, int]  # by kind
    alarm: Alarm
    advice: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `asdict` and JSON."""
        readings = [Reading(**{**one, "interval": _pair(one["interval"])}) for one in values["readings"]]
        found = Alarm(**{**values["alarm"], "interval": _pair(values["alarm"]["interval"])})
        return cls(**{**values, "readings": readings, "alarm": found})

    @property
    def by_name(self) -> dict[str, Reading]:
        return {one.name: one for one in self.readings}

    @property
    def acting(self) -> list[str]:
        return acting_names(self.readings)

    @property
    def alarmed(self) -> bool:
        """Whether somebody should look."""
        return self.alarm.rings or bool(self.acting)


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def monitored(
    in_use: InUse,
    forecasts: Sequence[ForecastRow],
    outcomes: Sequence[OutcomeRow],
    requests: Mapping[str, int],
    bars: Bars,
    asset: AssetClass,
    *,
    min_improvement: float,
    tradable: bool = True,
) -> Monitored:
    """What there is to say of a symbol's promoted configuration.

    forecasts, outcomes: of the symbol, live and shadow, any configuration's. requests: by kind, since the promotion.
    tradable: whether the bars can be traded on; else nothing is said of returns.
    """
    live, shadow = (
        _by_origin(forecasts, in_use, role, promoted)
        for role, promoted in ((LIVE, in_use.digest), (SHADOW, in_use.replaced))
    )
    told: dict[tuple[str, str], dict[int, OutcomeRow]] = {}
    for one in outcomes:
        if one.key == in_use.key:
            told.setdefault((one.digest, one.role), {})[one.step] = one
    done = [row for row in live.values() if _is_done(row, told, in_use)]
    pairs = [
        (row, other)
        for row in done
        if (other := shadow.get(row.as_of)) and other.bars == row.bars and _is_done(other, told, in_use)
    ]
    evidence = _alarm(*(_scored([pair[place] for pair in pairs], told, in_use) for place in (0, 1)))
    readings = reading.of_errors(
        _scored(done, told, in_use),
        confirmed=in_use.confirmed_mae,
        confirmed_skill=in_use.confirmed_skill,
        min_improvement=min_improvement,
    )
    places = {place: row for row in live.values() if (place := origin_of(row, bars)) is not None}
    come = {place: row for place, row in places.items() if place < len(bars)}
    if come and tradable and in_use.key == CLOSE:
        others = {place: other for place, row in come.items() if (other := shadow.get(row.as_of))}
        rival = _traded(others, come, bars, asset) if others else None
        readings += reading.of_returns(_traded(come, come, bars, asset), rival, asset.bars_a_year)
    bars_since = len(bars) - min(come) if come else 0
    readings += reading.of_service(requests, missed=bars_since - len(come), bars=bars_since)
    behind = len(bars) - max(places) if places else None
    return Monitored(
        symbol=in_use.symbol,
        model=in_use.model,
        promoted=in_use.digest,
        study=in_use.study,
        since=in_use.since.isoformat() if in_use.since else None,
        as_of=max(live).isoformat() if live else None,
        bars_behind=behind,
        readings=readings,
        requests=dict(requests),
        alarm=evidence,
        advice=_advice(in_use, readings, evidence, behind),
    )


# --- which forecasts ------------------------------------------------------------------------------------------


def _by_origin(
    forecasts: Sequence[ForecastRow], in_use: InUse, role: str, promoted: str | None
) -> dict[datetime, ForecastRow]:
    """One forecast for each last bar that was known, oldest first: of the promoted horizon, else of a longer one."""
    found: dict[datetime, ForecastRow] = {}
    for row in sorted(forecasts, key=lambda row: (row.as_of, row.horizon, row.computed_at)):
        if row.role != role or row.promoted != promoted or row.horizon < in_use.horizon:
            continue
        early = role == LIVE and in_use.since is not None and row.computed_at < in_use.since  # before a rollback
        if in_use.key in row.content["keys"] and not early:
            found.setdefault(row.as_of, row)
    return found


def _is_done(row: ForecastRow, told: Mapping[tuple[str, str], Mapping[int, OutcomeRow]], in_use: InUse) -> bool:
    return all(step in told.get((row.digest, row.role), {}) for step in range(1, in_use.horizon + 1))


def _scored(
    rows: Sequence[ForecastRow], told: Mapping[tuple[str, str], Mapping[int, OutcomeRow]], in_use: InUse
) -> Scored:
    """These forecasts, all of which are done."""
    steps = range(1, in_use.horizon + 1)
    came = [[told[row.digest, row.role][step] for step in steps] for row in rows]
    said = [row.content["keys"][in_use.key] for row in rows]

    def table(value: Callable[[OutcomeRow], float]) -> np.ndarray:
        return np.array([[value(one) for one in of_row] for of_row in came]).reshape(len(rows), in_use.horizon)

    return Scored(
        points=np.array([one.get("scored", one["points"])[: in_use.horizon] for one in said]).reshape(
            len(rows), in_use.horizon
        ),
        actuals=table(lambda one: one.actual),
        no_change=table(lambda one: one.no_change_error),
        in_band=np.array([one.in_band for of_row in came for one in of_row if one.in_band is not None], dtype=bool),
        last_closes=np.array([row.last_close for row in rows]),
        sigmas=table(lambda one: math.nan if one.sigma is None else one.sigma)[:, 0],
    )


# --- readings --------------------------------------------------------------------------------------------------


def _alarm(live: Scored, other: Scored) -> Alarm:
    """live, other: of the same bars."""
    if not len(live):
        return Alarm(n=0, evidence=None, highest=None, improvement=None, interval=None)
    known = np.isfinite(live.sigmas)
    (said, came), (rival, _) = live.in_sigmas, other.in_sigmas
    found = alarm.evidence(said[known], rival[known], came[known])
    mae, gains = float(live.errors.mean()), live.errors - other.errors
    return Alarm(
        n=len(live),
        evidence=float(found[-1]) if len(found) else None,
        highest=float(found.max()) if len(found) else None,
        improvement=float(gains.mean()) / mae if mae > 0 else None,
        interval=reading.scaled(reading.interval_of(gains), mae),
    )


def _traded(
    said: Mapping[int, ForecastRow], come: Mapping[int, ForecastRow], bars: Bars, asset: AssetClass
) -> Performance:
    """What `STRATEGY` earns on these forecasts through the bars of all that came; flat where there is none.

    Net, with conservative fills: what `studies backtest` says of the same bars, bit for bit.
    """
    first, last = min(come), max(come)
    closes = bars.close[first - 1 : last].copy()
    for place, row in said.items():
        (point, *_), known = row.content["keys"][CLOSE]["points"], float(closes[place - first])
        if point > 0:
            closes[place - first] = point if known == row.last_close else point * known / row.last_close
    orders = STRATEGIES[STRATEGY].orders(known_before(bars, first, Forecasts(close=closes)), shorts=asset.shorts)
    return performance(book(orders, bars.slice(first, last + 1), asset), asset.bars_a_year)


def acting_names(readings: Sequence[Reading]) -> list[str]:
    """What is beyond its trigger with enough known to say so. Few hits harm nobody."""
    return [one.name for one in readings if one.acts and one.name != HIT_RATE]


def evidence_text(value: float | None) -> str:
    """E as people read it."""
    if value is None:
        return "-"
    return "over 10,000" if value > 10_000 else f"{value:.0f}" if value >= 10 else f"{value:.2f}"


# --- advice ---------------------------------------------------------------------------------------------------


def _advice(in_use: InUse, readings: Sequence[Reading], found: Alarm, behind: int | None) -> str:
    """One sentence."""
    symbol, now, highest = in_use.symbol, evidence_text(found.evidence), evidence_text(found.highest)
    if behind is None:
        return f"no forecast of the file in use was served yet: {command(f'studies forecast {symbol}')}"
    if found.rings and found.improvement is not None:
        if found.improvement <= 0:
            return f"look again later: E reached {highest}, but what it replaced has no less error by now"
        less = f"{100 * found.improvement:.1f} % less error on {found.n} bars (E reached {highest})"
        return f"roll it back with {command(f'promote --rollback {symbol}')}: what it replaced has {less}"
    if acting := acting_names(readings):
        return f"look at {', '.join(acting)}: beyond the trigger, and enough is known to say so"
    if behind > 1:
        return f"ask for forecasts: the newest is {behind} bars old, {command(f'studies forecast {symbol}')}"
    if found.evidence is None:
        settle = f"nothing can be compared yet: {command('studies settle')} after the next bar"
        return settle if in_use.replaced else "keep it: it replaced nothing that could be compared with it"
    return f"keep it: nothing says that what it replaced was better (E = {now} on {found.n} bars)"
