"""Strategies traded on a configuration's forecasts through a symbol's last bars, and what that was worth.

Owns which forecasts a backtest makes, how its lines come about and what is said of each. The forecasts are made as they
are served: by the same evaluator, with the seeds of SeedKind.SERVED; those of a trial
have its own. Pure apart from the evaluator: knows no files, databases or commands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forecasters import CLOSE, Bars, ForecastError
from objectives.bootstrap import mean_interval
from objectives.costs import AssetClass
from objectives.evaluation import Evaluator
from objectives.fills import Booked, Trades, book
from objectives.performance import MIN_BARS, Performance, deflated_sharpe, equal_weight, performance, sharpe_a_bar
from objectives.quantiles import unshrunk
from objectives.strategies import BAND, SIGMA_BARS, STRATEGIES, Forecasts, Known, Positions, Strategy, known_before
from objectives.windows import Contexts, SeedKind
from studies.comparing import ComparedConfiguration
from studies.promotion import ReturnsDifference
from studies.walk_forward import Rivals, walk_forward

CONSERVATIVE, OPTIMISTIC = "conservative", "optimistic"
FILLS = (CONSERVATIVE, OPTIMISTIC)
BUY_HOLD = "buy_hold"
FITTED, NONE = "fitted", "none"  # offsets of a strategy that has them
EQUAL_WEIGHT = "equal weight"  # what stands for the symbol of a portfolio


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a backtest trades."""

    bars: int  # the last ones, which are traded on
    train: int  # bars that offsets are fitted to
    step: int
    evaluations: int
    hold: int  # bars that a bracket is held at most

    def before(self, chosen: Sequence[Strategy]) -> int:
        """Bars before the traded ones that these strategies need forecasts of."""
        return self.train if any(one.offsets for one in chosen) else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Traded:
    """What a strategy did on the W bars that were traded on."""

    strategy: str
    offsets: str | None  # FITTED, NONE, or None of a strategy that has none
    hold: int  # 1 of positions, which have no targets
    booked: Mapping[str, Booked]  # by kind of fills
    rivals: Mapping[str, Rivals]  # the same of fitted offsets beside none

    @property
    def name(self) -> str:
        return f"{self.strategy} {FITTED}" if self.offsets == FITTED else self.strategy


# --- forecasts and trades -----------------------------------------------------------------------------------


def last_bars(symbol: str, bars: Bars, count: int) -> Contexts:
    """The last `count` bars, each to be forecast from those before it."""
    return Contexts(symbol=symbol, bars=bars, origins=tuple(range(len(bars) - count, len(bars))), horizon=1)


def forecasts_of(
    evaluator: Evaluator,
    contexts: Contexts,
    params: Mapping[str, Any],
    chosen: Sequence[Strategy],
    *,
    kind: SeedKind = SeedKind.SERVED,
) -> Forecasts:
    """What these strategies need to know of each bar, forecast from the bars before it. contexts: of one bar each.

    Raises what `Evaluator.forecast_keys` raises, and ForecastError where a forecast is no price.
    """
    needed = {name for one in chosen for name in one.forecasts}
    keys = (CLOSE, *(key for key in ("high", "low") if key in needed))
    answers = evaluator.forecast_keys(contexts, params, keys, kind=kind)
    served = {key: points[:, 0] for key, points in answers.served.items()}
    for key, points in served.items():
        if (bad := ~(points > 0)).any():
            first = int(bad.argmax())
            raise ForecastError(
                f"{contexts.symbol}: the forecast {key} for {contexts.origin_text(first)} is {points[first]:g}"
            )
    band = None
    if "band" in needed:
        low, high = (
            evaluator.forecast_keys(contexts, unshrunk(params, quantile), (CLOSE,), kind=kind).scored[CLOSE]
            for quantile in (f"quantile_{share:.2f}" for share in BAND)
        )
        band = np.maximum(high - low, 0.0)[:, 0] / contexts.last_closes
    return Forecasts(close=served[CLOSE], high=served.get("high"), low=served.get("low"), band=band)


def without_forecasts(bars: Bars, count: int) -> Forecasts:
    """What stands for forecasts of the last `count` bars where a strategy looks at none: the last closes."""
    return Forecasts(close=bars.close[-count - 1 : -1])


def trade(plan: Plan, chosen: Sequence[Strategy], bars: Bars, forecasts: Forecasts, asset: AssetClass) -> list[Traded]:
    """What these strategies did on the last `plan.bars` bars; with offsets fitted to the bars before, and without.

    forecasts: of those bars, and of `plan.before` more. Raises StrategyError where a forecast is missing.
    """
    count = len(forecasts.close)
    known, traded = known_before(bars, len(bars) - count, forecasts), bars.slice(len(bars) - count, len(bars))
    found: list[Traded] = []
    for one in chosen:
        if one.offsets:
            found += _with_offsets(plan, one, known, traded, asset)
            continue
        orders = one.orders(known.slice(count - plan.bars, count), shorts=asset.shorts)
        last = traded.slice(count - plan.bars, count)
        hold = 1 if isinstance(orders, Positions) else plan.hold
        booked = {kind: book(orders, last, asset, hold=hold, optimistic=kind == OPTIMISTIC) for kind in FILLS}
        found.append(Traded(strategy=one.name, offsets=None, hold=hold, booked=booked, rivals={}))
    return found


def _with_offsets(plan: Plan, one: Strategy, known: Known, bars: Bars, asset: AssetClass) -> list[Traded]:
    walk = walk_forward(
        one, known, bars, asset, train=plan.train, step=plan.step, evaluations=plan.evaluations, hold=plan.hold
    )
    rivals = {CONSERVATIVE: walk.conservative, OPTIMISTIC: walk.optimistic}
    fitted, zero = ({kind: getattr(both, name) for kind, both in rivals.items()} for name in ("fitted", "zero"))
    return [
        Traded(strategy=one.name, offsets=FITTED, hold=plan.hold, booked=fitted, rivals=rivals),
        Traded(strategy=one.name, offsets=NONE, hold=plan.hold, booked=zero, rivals={}),
    ]


def returns_of(one: Strategy, windows: Contexts, asset: AssetClass, forecasts: Forecasts) -> np.ndarray:
    """What a strategy without fitted offsets earns on these bars, one after the other, [W], with conservative fills."""
    first, count = windows.origins[0], len(windows)
    orders = one.orders(known_before(windows.bars, first, forecasts), shorts=asset.shorts)
    return book(orders, windows.bars.slice(first, first + count), asset).returns


def returns_difference(
    one: Strategy, windows: Contexts, asset: AssetClass, old: Forecasts, new: Forecasts
) -> ReturnsDifference:
    """What a strategy without fitted offsets earns with new forecasts over old ones, with conservative fills.

    windows: the bars that both are of, one after the other.
    """
    difference = returns_of(one, windows, asset, new) - returns_of(one, windows, asset, old)
    return ReturnsDifference(strategy=one.name, value=float(difference.mean()), interval=mean_interval(difference))


# --- lines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """What a strategy did with a configuration on the bars of a symbol, or on those of several as a portfolio."""

    symbol: str
    tried_as: str  # what its tries are counted under: the symbol, or those of the portfolio
    asset: AssetClass | None  # None of a portfolio
    bars_a_year: float
    times: np.ndarray  # datetime64 [W], UTC, of the bars that were traded on
    configuration: ComparedConfiguration | None  # None where nothing is forecast
    digest: str  # of the model, its weights and its params; empty where nothing is forecast
    traded: Traded

    @property
    def label(self) -> str:
        return self.configuration.label if self.configuration else ""


def try_name(line: Line, plan: Plan) -> str:
    """The strategy as its tries are told apart: offsets fitted otherwise are another try."""
    if line.traded.offsets != FITTED:
        return line.traded.name
    return f"{line.traded.name} train={plan.train} step={plan.step} evals={plan.evaluations}"


def sharpe_of_try(line: Line) -> float:
    """The Sharpe ratio a bar with conservative fills; 0 of returns that do not vary."""
    return sharpe_a_bar(line.traded.booked[CONSERVATIVE].returns) or 0.0


def portfolios(lines: Sequence[Line]) -> list[Line]:
    """Equal shares of every symbol, for each configuration and strategy that all of them have.

    On the bars between the latest first one and the earliest last one of the symbols; none for a single symbol, or
    where no such bar is left.
    """
    symbols = list(dict.fromkeys(line.symbol for line in lines))
    first = max(line.times[0] for line in lines)
    last = min(line.times[-1] for line in lines)
    if len(symbols) < 2 or first > last:
        return []
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.label, line.traded.name), []).append(line)
    return [_portfolio(group, first, last) for group in groups.values() if len(group) == len(symbols)]


def _portfolio(lines: Sequence[Line], first: np.datetime64, last: np.datetime64) -> Line:
    one, places = lines[0], [np.flatnonzero((line.times >= first) & (line.times <= last)) for line in lines]

    def together(booked: Sequence[Booked]) -> Booked:
        return _together([line.times for line in lines], booked, places)

    booked = {kind: together([line.traded.booked[kind] for line in lines]) for kind in FILLS}
    rivals = {
        kind: Rivals(fitted=booked[kind], zero=together([line.traded.rivals[kind].zero for line in lines]))
        for kind in one.traded.rivals
    }
    times = np.unique(np.concatenate([line.times[place] for line, place in zip(lines, places, strict=True)]))
    years, days = {line.bars_a_year for line in lines}, float((times[-1] - times[0]) / np.timedelta64(1, "D"))
    digests = sorted(f"{line.symbol} {line.digest}" for line in lines)
    return replace(
        one,
        symbol=EQUAL_WEIGHT,
        tried_as=" + ".join(sorted(line.symbol for line in lines)),
        asset=None,
        bars_a_year=years.pop() if len(years) == 1 or not days else (len(times) - 1) / days * 365.25,
        times=times,
        digest=hashlib.sha256("\n".join(digests).encode()).hexdigest() if one.digest else "",
        traded=replace(one.traded, booked=booked, rivals=rivals),
    )


def _together(times: Sequence[np.ndarray], booked: Sequence[Booked], places: Sequence[np.ndarray]) -> Booked:
    """What was booked with an equal share in each symbol, on these of its bars."""
    within = [each[place] for each, place in zip(times, places, strict=True)]
    shared, returns = equal_weight(
        [(at, one.returns[place]) for at, one, place in zip(within, booked, places, strict=True)]
    )
    _, exposure = equal_weight(
        [(at, one.exposure[place]) for at, one, place in zip(within, booked, places, strict=True)]
    )
    trades = []
    for at, one, place in zip(times, booked, places, strict=True):
        kept = (one.trades.entered >= place[0]) & (one.trades.left <= place[-1])
        values = {name: each[kept] for name, each in vars(one.trades).items()}
        values |= {name: np.searchsorted(shared, at[values[name]]) for name in ("entered", "left")}
        trades.append({**values, "share": values["share"] / len(times)})
    joined = {name: np.concatenate([each[name] for each in trades]) for name in trades[0]}
    return Booked(returns=returns, exposure=exposure, trades=Trades(**joined))


# --- what is said of a line ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What a line was worth with one kind of fills. Returns are shares of the capital."""

    performance: Performance
    deflated: float | None  # chance that the Sharpe ratio is above the best of as many tries without skill
    gain: float | None  # of fitted offsets over none, mean return a bar
    gain_interval: tuple[float, float] | None  # 95 %


@dataclass(frozen=True, kw_only=True)
class BacktestRow:
    """One line of a backtest. `tried` counts what was ever tried on the symbol, this too."""

    symbol: str
    asset: str | None
    bars_a_year: float
    first: str  # time of the first bar that was traded on
    last: str
    configuration: str
    model: str
    source: str
    params: Mapping[str, Any]
    strategy: str
    offsets: str | None
    hold: int
    tried: int
    conservative: Filled
    optimistic: Filled

    @property
    def name(self) -> str:
        return f"{self.strategy} {FITTED}" if self.offsets == FITTED else self.strategy


def row_of(line: Line, tried: Sequence[float]) -> BacktestRow:
    """What there is to say of a line. tried: the Sharpe ratios a bar of all tries on its symbol, this one's too."""
    one, traded = line.configuration, line.traded
    filled = {kind: _filled(line, kind, tried) for kind in FILLS}
    return BacktestRow(
        symbol=line.symbol,
        asset=line.asset.name if line.asset else None,
        bars_a_year=line.bars_a_year,
        first=str(line.times[0].astype("datetime64[m]")),
        last=str(line.times[-1].astype("datetime64[m]")),
        configuration=line.label,
        model=one.model if one else "",
        source=one.source if one else "",
        params=dict(one.params) if one else {},
        strategy=traded.strategy,
        offsets=traded.offsets,
        hold=traded.hold,
        tried=len(tried),
        conservative=filled[CONSERVATIVE],
        optimistic=filled[OPTIMISTIC],
    )


def _filled(line: Line, kind: str, tried: Sequence[float]) -> Filled:
    booked, rivals = line.traded.booked[kind], line.traded.rivals.get(kind)
    varies = len(booked.returns) >= MIN_BARS and sharpe_a_bar(booked.returns) is not None
    return Filled(
        performance=performance(booked, line.bars_a_year),
        deflated=deflated_sharpe(booked.returns, tried) if varies else None,
        gain=rivals.gain if rivals else None,
        gain_interval=rivals.interval if rivals else None,
    )


def bars_read(bars: Bars, plan: Plan, chosen: Sequence[Strategy]) -> Bars:
    """The bars that trading looks at: those traded on and trained on, and what their sigma is of."""
    return bars.slice(max(0, len(bars) - plan.bars - plan.before(chosen) - SIGMA_BARS - 1), len(bars))


def benchmark(plan: Plan, bars: Bars, asset: AssetClass) -> Traded:
    """Buying at the first open and selling at the last close of the bars that are traded on."""
    (found,) = trade(plan, [STRATEGIES[BUY_HOLD]], bars, without_forecasts(bars, plan.bars), asset)
    return found
