"""Questions about forecasts and what came of them: which still wait for their bars, and what happened last.

The rows are those of storage/forecasts.py, as is what is raised.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.forecasts import EventRow, ForecastRow, forecasts_with
from storage.retrying import RetryingStorage

# Every key of a forecast has an outcome at every step, once all its bars have come.
WAITING = """
select digest, role from forecasts f
where symbol = :symbol
  and f.horizon * (select count(*) from jsonb_object_keys(f.content -> 'keys'))
      > (select count(*) from outcomes o where o.digest = f.digest and o.role = f.role)
"""


def waiting(storage: RetryingStorage, symbol: str) -> list[ForecastRow]:
    """A symbol's forecasts, live and shadow, of which not all outcomes are there yet, oldest first."""

    def run(connection: Connection) -> list[ForecastRow]:
        found = connection.execute(text(WAITING), {"symbol": symbol}).all()
        rows = []
        for role in sorted({one.role for one in found}):
            rows += forecasts_with(connection, [one.digest for one in found if one.role == role], role=role)
        return sorted(rows, key=lambda row: (row.as_of, row.role, row.digest))

    return storage.transaction(run)


def symbols(storage: RetryingStorage) -> list[str]:
    """The symbols that forecasts were served of, sorted."""
    statement = text("select distinct symbol from forecasts order by symbol")
    return storage.transaction(lambda c: list(c.execute(statement).scalars()))


def newest_events(storage: RetryingStorage, kind: str) -> dict[str, EventRow]:
    """The last event of a kind, by symbol."""
    statement = text(
        "select distinct on (symbol) at, symbol, kind, content from events "
        "where kind = :kind and symbol is not null order by symbol, id desc"
    )
    found = storage.transaction(lambda c: c.execute(statement, {"kind": kind}).all())
    return {row.symbol: EventRow(at=row.at, symbol=row.symbol, kind=row.kind, content=row.content) for row in found}
