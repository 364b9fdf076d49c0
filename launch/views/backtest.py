"""What a backtest shows: its table, and what a reader of it has to know; the page is in backtest_page.py."""

from __future__ import annotations

from collections.abc import Sequence

from launch.output import counted
from launch.views.comparison import some
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    basis_points,
    basis_points_interval,
    numbers,
    percent_gain,
    percent_share,
)
from objectives.costs import AssetClass
from studies.backtesting import BUY_HOLD, EQUAL_WEIGHT, FILLS, FITTED, BacktestRow, Filled

HALF = 0.5  # of the trades without offsets: with fewer, fitting has taught not to trade


def sharpe_text(found: Filled) -> str:
    """A Sharpe ratio a year with its standard error: "+0.52 ± 1.01"."""
    one = found.performance
    return NOTHING if one.sharpe is None else f"{one.sharpe:+.2f} ± {one.sharpe_error:.2f}"


def share_text(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else percent_share(value, digits)


def table(rows: Sequence[BacktestRow], fills: Sequence[str]) -> Table:
    """One row a symbol, configuration and strategy; of two kinds of fills all of the first, and what the second adds.

    Where there is no room, the Sharpe ratio, the trades, the mean return and the deflated Sharpe ratio stay longest.
    """
    told: list[Filled] = [getattr(row, fills[0]) for row in rows]
    performances = [one.performance for one in told]
    second: list[Column] = []
    if len(fills) > 1:
        others: list[Filled] = [getattr(row, fills[1]) for row in rows]
        bounds = [NOTHING if one.performance.sharpe is None else f"{one.performance.sharpe:+.2f}" for one in others]
        second = [
            numbers("Sharpe, at best", bounds, 6),
            numbers("mean, at best", [basis_points(one.performance.mean) for one in others], 2),
        ]
    intervals = [one.win_interval for one in performances]
    return Table(
        columns=[
            Column(heading="symbol", cells=[row.symbol for row in rows], wrap_width=6),
            *_configurations(rows),
            Column(heading="strategy", cells=[row.name for row in rows], priority=12, wrap_width=11),
            numbers("Sharpe", [sharpe_text(one) for one in told], 11),
            *second[:1],
            numbers("mean, bp", [basis_points(one.mean) for one in performances], 9),
            numbers("95 % interval", [basis_points_interval(one.interval) for one in performances], 4),
            *second[1:],
            numbers("trades", [str(one.trades) for one in performances], 10),
            numbers("gain, bp", [basis_points(one.gain) for one in told], 7),
            numbers("its 95 % interval", [basis_points_interval(one.gain_interval) for one in told], 3),
            numbers("deflated", [share_text(one.deflated, 0) for one in told], 8),
            numbers("growth", [percent_gain(one.growth) for one in performances], 2),
            numbers("drawdown", [share_text(one.drawdown) for one in performances], 2),
            numbers("win rate", [share_text(one.win_rate, 0) for one in performances], 1),
            numbers(
                "its interval",
                [NOTHING if one is None else f"{one[0]:.0%} to {one[1]:.0%}" for one in intervals],
                1,
            ),
            numbers("a trade, bp", [basis_points(one.mean_trade) for one in performances], 1),
            numbers("exposure", [share_text(one.exposure, 0) for one in performances], 1),
            numbers("turnover", [f"{one.turnover:.2f}" for one in performances], 1),
            numbers("tried", [str(row.tried) for row in rows], 1),
        ]
    )


def _configurations(rows: Sequence[BacktestRow]) -> list[Column]:
    """The column that says which configuration a row is of, where there are several."""
    if len({row.configuration for row in rows if row.configuration}) < 2:
        return []
    cells = [row.configuration or NOTHING for row in rows]
    return [Column(heading="configuration", cells=cells, priority=11, wrap_width=12)]


def costs_lines(assets: Sequence[tuple[str, AssetClass]]) -> list[str]:
    """What trading costs and how many bars there are a year, a line for each kind of symbol."""
    groups: dict[AssetClass, list[str]] = {}
    for symbol, asset in assets:
        groups.setdefault(asset, []).append(symbol)
    return [
        f"{asset.name}, {asset.days_a_year} days a year with {counted_bars(asset.bars_a_day)} each: a side costs "
        f"{100 * asset.limit_fee:g} % by limit and {100 * asset.market:g} % at the market; "
        + (f"shorts pay {100 * asset.borrow:g} % a year" if asset.shorts else "never short")
        + f": {some(symbols)}"
        for asset, symbols in groups.items()
    ]


def counted_bars(bars_a_day: float) -> str:
    return counted(round(bars_a_day), "bar") if bars_a_day >= 1 else f"{bars_a_day:.2g} bars"


def explanations(rows: Sequence[BacktestRow], fills: Sequence[str]) -> list[str]:
    """What a reader of the table has to know of these rows, each in one line."""
    lines = [
        "Sharpe: a year, with its standard error; mean and gain: net, a bar, 1 bp = 0.01 % of the capital; deflated: "
        "chance that the Sharpe ratio is above the best of as many tries without skill",
    ]
    if len(fills) > 1:
        lines.append(
            "what a bar leaves open is filled against you; at best: in your favour; the truth lies between the two"
        )
    if any(row.offsets == FITTED for row in rows):
        lines.append("gain: of offsets fitted to the bars before, over none on the same bars")
    shared = next((row for row in rows if row.symbol == EQUAL_WEIGHT), None)
    if shared:
        count = counted(shared.conservative.performance.bars, "bar")
        lines.append(f"{EQUAL_WEIGHT}: the {count} that all symbols reach, {shared.first[:10]} to {shared.last[:10]}")
    elif len({row.symbol for row in rows}) > 1:
        lines.append(f"no bar is reached by all symbols, so that there is no portfolio of {EQUAL_WEIGHT}")
    if shy := [f"{row.symbol} {row.name}" for row, rival in _rivals(rows) if _shy(row, rival)]:
        lines.append(f"fitting gave up most trades, and to trade less is no skill: {some(shy)}")
    clear = [row for row in rows if row.strategy != BUY_HOLD and (row.conservative.deflated or 0.0) > 0.95]
    if not clear:
        lines.append("no strategy is above the best of as many tries without skill with 95 % confidence")
    return lines


def _rivals(rows: Sequence[BacktestRow]) -> list[tuple[BacktestRow, BacktestRow]]:
    """Each row of fitted offsets, and that of none."""
    zero = {(row.symbol, row.configuration, row.strategy): row for row in rows if row.offsets not in (None, FITTED)}
    return [(row, zero[row.symbol, row.configuration, row.strategy]) for row in rows if row.offsets == FITTED]


def _shy(row: BacktestRow, rival: BacktestRow) -> bool:
    trades, before = row.conservative.performance.trades, rival.conservative.performance.trades
    return trades < HALF * before


def fills_of(word: str) -> Sequence[str]:
    """The kinds of fills that a word of --fills shows, the main one first."""
    return FILLS if word == "both" else (word,)
