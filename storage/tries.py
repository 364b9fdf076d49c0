"""What backtests have tried: one row per symbol, configuration, strategy and hold, with its Sharpe ratio a bar.

The deflated Sharpe ratio needs how many there were and how far apart they are. A try that is repeated replaces its row.
Raises DatabaseUnavailable where the server stays away for longer than the storage's wait_s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import RetryingStorage

FIELDS = ("symbol", "configuration", "strategy", "hold", "sharpe")


@dataclass(frozen=True, kw_only=True)
class Try:
    """One row."""

    symbol: str
    configuration: str  # a digest; empty where nothing is forecast
    strategy: str
    hold: int
    sharpe: float  # a bar; 0 where the returns did not vary


def record(storage: RetryingStorage, tries: Sequence[Try]) -> dict[str, list[float]]:
    """Keep these, and return the Sharpe ratios of all that were ever tried on their symbols, by symbol."""
    ordered = sorted(tries, key=lambda one: (one.symbol, one.configuration, one.strategy, one.hold))  # no deadlocks

    def run(connection: Connection) -> dict[str, list[float]]:
        connection.execute(
            text(
                "insert into backtest_tries (symbol, configuration, strategy, hold, sharpe) "
                "select * from unnest(cast(:symbol as text[]), cast(:configuration as text[]), "
                "cast(:strategy as text[]), cast(:hold as integer[]), cast(:sharpe as double precision[])) "
                "on conflict (symbol, configuration, strategy, hold) "
                "do update set sharpe = excluded.sharpe, tried_at = excluded.tried_at"
            ),
            {name: [asdict(one)[name] for one in ordered] for name in FIELDS},
        )
        rows = connection.execute(
            text("select symbol, sharpe from backtest_tries where symbol = any(cast(:symbols as text[]))"),
            {"symbols": sorted({one.symbol for one in tries})},
        )
        found: dict[str, list[float]] = {}
        for symbol, sharpe in rows:
            found.setdefault(symbol, []).append(sharpe)
        return found

    return storage.transaction(run)
