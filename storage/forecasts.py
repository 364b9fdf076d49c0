"""Forecasts that were served, what came of them, how often they were asked for, and what happened meanwhile.

A forecast is one row by its digest and role, written once: what decides its numbers is in the digest, so that whoever
computes it again writes the same row. Raises DatabaseUnavailable where the server stays away for longer than the
storage's wait_s. Knows nothing of models, bars or policies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import Connection

from storage.retrying import RetryingStorage

LIVE, SHADOW = "live", "shadow"  # roles
REQUEST_KINDS = ("memory", "stored", "computed", "joined", "failed")
HITS = ("memory", "stored")


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """A forecast of the bars after `as_of`.

    content: `params`, `checkpoint` (its fingerprint), `dtype` and `keys`: by key `points`, `q10`, `q50` and `q90`,
    each one number a step, price; points as they are served, and `scored` as the model says them.
    """

    digest: str  # of everything that decides the numbers
    role: str
    symbol: str
    model: str
    configuration: str  # digest of model, params and checkpoint
    promoted: str  # digest of the promoted file
    study: str | None
    trial: int | None
    as_of: datetime  # UTC, time of the last bar that was read
    bars: str  # digest of the bars that were read
    horizon: int
    last_close: float
    content: Mapping[str, Any]
    computed_at: datetime


@dataclass(frozen=True, kw_only=True)
class OutcomeRow:
    """What came of one step of one key of a forecast. Errors are shares of the last close that it knew."""

    digest: str
    role: str
    key: str
    step: int  # from 1
    due: datetime  # time of the bar
    actual: float  # price
    error: float  # |point - actual| / last close
    signed_error: float  # (point - actual) / last close
    no_change_error: float
    sigma: float | None  # standard deviation of the 60 returns before the origin
    in_band: bool | None  # whether the 10 and 90 % quantiles hold the actual; None where there are none
    settled_at: datetime


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """Something that happened, such as an alarm. symbol: None where it is of no symbol."""

    at: datetime
    symbol: str | None
    kind: str
    content: Mapping[str, Any]


_TYPES = {  # of Postgres, by ours as the dataclasses say them
    "str": "text",
    "int": "integer",
    "float": "double precision",
    "bool": "boolean",
    "datetime": "timestamptz",
    "Mapping[str, Any]": "jsonb",
}


def _insert(connection: Connection, table: str, kind: type, rows: Sequence[Any]) -> int:
    """Insert all rows in one statement, but for those that are there; returns how many are new."""
    types = {one.name: _TYPES[str(one.type).removesuffix(" | None")] for one in fields(kind)}
    names = ", ".join(types)
    given = ", ".join(f"cast(:{name} as {'text' if of == 'jsonb' else of}[])" for name, of in types.items())
    read = ", ".join(f"cast({name} as jsonb)" if of == "jsonb" else name for name, of in types.items())
    values = {
        name: [json.dumps(getattr(row, name)) if of == "jsonb" else getattr(row, name) for row in rows]
        for name, of in types.items()
    }
    # S608: tables, columns and types are named in this module and hold nothing that anybody sends.
    statement = f"insert into {table} ({names}) select {read} from unnest({given}) as given ({names})"  # noqa: S608
    return connection.execute(text(f"{statement} on conflict do nothing"), values).rowcount


def _read(connection: Connection, kind: type, table: str, where: str, values: Mapping[str, Any]) -> list[Any]:
    names = [one.name for one in fields(kind)]
    columns = ", ".join(f"{table.split()[0]}.{name}" for name in names)
    found = connection.execute(text(f"select {columns} from {table} where {where}"), values)  # noqa: S608 - as above
    return [kind(**{name: _in_utc(value) for name, value in zip(names, row, strict=True)}) for row in found]


def _in_utc(value: Any) -> Any:
    return value.astimezone(UTC) if isinstance(value, datetime) else value


# --- forecasts ----------------------------------------------------------------------------------------------


def write_forecasts(connection: Connection, rows: Iterable[ForecastRow]) -> int:
    """Insert forecasts in one statement; those that are there stay as they are. Returns how many are new."""
    ordered = sorted(rows, key=lambda row: (row.digest, row.role))  # no deadlocks
    return _insert(connection, "forecasts", ForecastRow, ordered) if ordered else 0


def read_forecasts(
    storage: RetryingStorage, digests: Sequence[str], *, role: str = LIVE, wait_s: float | None = None
) -> dict[str, ForecastRow]:
    """The forecasts with these digests, by digest. wait_s: as `RetryingStorage.transaction` takes it."""
    found = storage.transaction(lambda c: forecasts_with(c, digests, role=role), wait_s=wait_s)
    return {row.digest: row for row in found}


def forecasts_with(connection: Connection, digests: Sequence[str], *, role: str = LIVE) -> list[ForecastRow]:
    """As `read_forecasts`, within a transaction."""
    where = "digest = any(cast(:digests as text[])) and role = :role"
    return _read(connection, ForecastRow, "forecasts", where, {"digests": list(digests), "role": role})


def forecasts_of(
    storage: RetryingStorage, symbol: str, *, since: datetime | None = None, role: str | None = None
) -> list[ForecastRow]:
    """A symbol's forecasts by as_of, oldest first; since: only those as of then or later."""
    where = (
        "symbol = :symbol and as_of >= coalesce(cast(:since as timestamptz), '-infinity') "
        "and role = coalesce(cast(:role as text), role) order by as_of, computed_at, role"
    )
    values = {"symbol": symbol, "since": since, "role": role}
    return storage.transaction(lambda c: _read(c, ForecastRow, "forecasts", where, values))


# --- one computation for all processes ------------------------------------------------------------------------


def claim(
    storage: RetryingStorage, digests: Sequence[str], owner: str, *, lease_s: float, wait_s: float | None = None
) -> tuple[set[str], dict[str, ForecastRow]]:
    """Which of these live forecasts this owner is to compute, and those that are there; others compute the rest.

    A row with a lease and no advisory lock: a computation outlasts a statement's timeout, and behind PgBouncer a
    session's lock belongs to nobody. Claiming again renews the lease. A lease that ends costs a second computation of
    the same row, never a wrong one.
    """
    values = {"owner": owner, "lease_s": lease_s, "digests": sorted(set(digests)), "live": LIVE}

    def run(connection: Connection) -> tuple[set[str], dict[str, ForecastRow]]:
        claimed = connection.execute(
            text(
                "insert into forecast_claims (digest, owner, lease_until) "
                "select digest, :owner, now() + make_interval(secs => :lease_s) "
                "from unnest(cast(:digests as text[])) as given (digest) "
                "where not exists (select from forecasts f where f.digest = given.digest and f.role = :live) "
                "on conflict (digest) do update set owner = excluded.owner, lease_until = excluded.lease_until "
                "where forecast_claims.owner = excluded.owner or forecast_claims.lease_until < now() "
                "returning digest"
            ),
            values,
        )
        mine = set(claimed.scalars())
        # After the claim: whoever had it before may have stored its forecast in between.
        stored = {row.digest: row for row in forecasts_with(connection, values["digests"])}
        if late := mine & stored.keys():
            release(connection, late, owner)
        return mine - stored.keys(), stored

    return storage.transaction(run, wait_s=wait_s)


def renew(storage: RetryingStorage, digests: Sequence[str], owner: str, *, lease_s: float) -> None:
    """Keep the claims that this owner still has for so long from now on."""
    statement = text(
        "update forecast_claims set lease_until = now() + make_interval(secs => :lease_s) "
        "where digest = any(cast(:digests as text[])) and owner = :owner"
    )
    values = {"digests": sorted(digests), "owner": owner, "lease_s": lease_s}
    storage.transaction(lambda c: c.execute(statement, values), wait_s=0.0)


def finish(
    storage: RetryingStorage, rows: Sequence[ForecastRow], owner: str, *, failed: Sequence[str] = (), wait_s: float
) -> None:
    """Write what was computed and give its claims back, and those of what failed."""

    def run(connection: Connection) -> None:
        write_forecasts(connection, rows)
        release(connection, [*(row.digest for row in rows), *failed], owner)

    storage.transaction(run, wait_s=wait_s)


def release(connection: Connection, digests: Iterable[str], owner: str) -> None:
    """Give claims back, done or not."""
    connection.execute(
        text("delete from forecast_claims where digest = any(cast(:digests as text[])) and owner = :owner"),
        {"digests": sorted(digests), "owner": owner},
    )


# --- outcomes -----------------------------------------------------------------------------------------------


def write_outcomes(connection: Connection, rows: Iterable[OutcomeRow]) -> int:
    """Insert outcomes in one statement; those that are there stay as they are. Returns how many are new."""
    ordered = sorted(rows, key=lambda row: (row.digest, row.role, row.key, row.step))
    return _insert(connection, "outcomes", OutcomeRow, ordered) if ordered else 0


def outcomes_of(storage: RetryingStorage, symbol: str, *, since: datetime | None = None) -> list[OutcomeRow]:
    """What came of a symbol's forecasts, by due; since: only of bars then or later."""
    table = "outcomes join forecasts using (digest, role)"
    where = (
        "symbol = :symbol and due >= coalesce(cast(:since as timestamptz), '-infinity') order by due, role, key, step"
    )
    return storage.transaction(lambda c: _read(c, OutcomeRow, table, where, {"symbol": symbol, "since": since}))


# --- requests and events ------------------------------------------------------------------------------------


def add_requests(connection: Connection, counts: Mapping[tuple[date, str, str], int]) -> None:
    """Add to the numbers of requests by day, symbol and kind, in one statement."""
    if not counts:
        return
    ordered = sorted(counts)  # no deadlocks
    connection.execute(
        text(
            "insert into forecast_requests (day, symbol, kind, count) "
            "select * from unnest(cast(:days as date[]), cast(:symbols as text[]), cast(:kinds as text[]), "
            "cast(:counts as bigint[])) on conflict (day, symbol, kind) "
            "do update set count = forecast_requests.count + excluded.count"
        ),
        {
            "days": [one[0] for one in ordered],
            "symbols": [one[1] for one in ordered],
            "kinds": [one[2] for one in ordered],
            "counts": [counts[one] for one in ordered],
        },
    )


def catch_up(
    storage: RetryingStorage, rows: Sequence[ForecastRow], counts: Mapping[tuple[date, str, str], int]
) -> None:
    """Write forecasts and counts that had to wait, in one try; with neither only see whether the database answers."""

    def run(connection: Connection) -> None:
        write_forecasts(connection, rows)
        add_requests(connection, counts)

    storage.transaction(run, wait_s=0.0)


def request_counts(
    storage: RetryingStorage, *, since: date | None = None, wait_s: float | None = None
) -> dict[tuple[date, str, str], int]:
    """How often forecasts were asked for, over all processes, by day, symbol and kind."""
    statement = text(
        "select day, symbol, kind, count from forecast_requests "
        "where day >= coalesce(cast(:since as date), '-infinity')"
    )
    found = storage.transaction(lambda c: c.execute(statement, {"since": since}).all(), wait_s=wait_s)
    return {(row.day, row.symbol, row.kind): row[3] for row in found}


def hit_rate(counts: Mapping[str, int]) -> float | None:
    """The share of requests, by kind, that nobody computed or waited for; None without requests."""
    total = sum(counts.values())
    return sum(counts.get(kind, 0) for kind in HITS) / total if total else None


def add_events(connection: Connection, rows: Sequence[EventRow]) -> None:
    """Keep what happened, in one statement."""
    if rows:
        _insert(connection, "events", EventRow, rows)


def events_of(storage: RetryingStorage, symbol: str | None = None, *, kind: str | None = None) -> list[EventRow]:
    """What happened, oldest first; of one symbol or of one kind where they are given."""
    where = (
        "symbol is not distinct from coalesce(cast(:symbol as text), symbol) "
        "and kind = coalesce(cast(:kind as text), kind) order by id"
    )
    return storage.transaction(lambda c: _read(c, EventRow, "events", where, {"symbol": symbol, "kind": kind}))


# --- retention ----------------------------------------------------------------------------------------------


def forget(storage: RetryingStorage, *, keep_days: int, wait_s: float | None = None) -> int:
    """Delete forecasts computed longer ago than this, with their outcomes; returns how many.

    Numbers of requests stay, a few rows a symbol and day: whoever watches their sums takes a fall for a new beginning.
    """

    def run(connection: Connection) -> int:
        connection.execute(text("delete from forecast_claims where lease_until < now() - interval '1 day'"))
        statement = "delete from forecasts where computed_at < now() - make_interval(days => :days)"
        return connection.execute(text(statement), {"days": keep_days}).rowcount

    return storage.transaction(run, wait_s=wait_s)
