"""The rows of served forecasts and what came of them, in a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest
from conftest import execute

from storage import database, forecasts
from storage.forecasts import LIVE, SHADOW, EventRow, ForecastRow, OutcomeRow
from storage.retrying import RetryingStorage

AS_OF = datetime(2026, 3, 19, tzinfo=UTC)
POINT = 0.1 + 0.2  # whose shortest form has 17 digits

ROW = ForecastRow(
    digest="d1",
    role=LIVE,
    symbol="A",
    model="naive",
    configuration="c",
    promoted="p",
    study="A/naive@2026-03-19",
    trial=None,
    as_of=AS_OF,
    bars="b",
    horizon=1,
    last_close=1e-7,
    content={"params": {"aggregate": "mean"}, "keys": {"close": {"points": [POINT, 1e-300]}}},
    computed_at=AS_OF + timedelta(hours=1),
)
OUTCOME = OutcomeRow(
    digest="d1",
    role=LIVE,
    key="close",
    step=1,
    due=AS_OF + timedelta(days=1),
    actual=2.0,
    error=0.1,
    signed_error=-0.1,
    no_change_error=0.2,
    sigma=None,
    in_band=None,
    settled_at=AS_OF + timedelta(days=2),
)


@pytest.fixture
def storage(database_url: str) -> Iterator[RetryingStorage]:
    opened = database.open_storage(database_url, wait_s=10)
    yield opened
    opened.engine.dispose()


def write(storage: RetryingStorage, *rows: ForecastRow) -> int:
    return storage.transaction(lambda c: forecasts.write_forecasts(c, rows))


def test_forecasts_are_read_as_they_were_written_to_the_last_bit(storage: RetryingStorage) -> None:
    shadow, later = replace(ROW, role=SHADOW, trial=7), replace(ROW, digest="d2", as_of=AS_OF + timedelta(days=1))
    assert write(storage, ROW, shadow, later) == 3
    assert forecasts.read_forecasts(storage, ["d1", "d2", "d3"]) == {"d1": ROW, "d2": later}
    assert forecasts.read_forecasts(storage, ["d1"], role=SHADOW) == {"d1": shadow}
    assert forecasts.forecasts_of(storage, "A") == [ROW, shadow, later]
    assert forecasts.forecasts_of(storage, "A", since=later.as_of, role=LIVE) == [later]
    assert forecasts.forecasts_of(storage, "B") == []
    # What is there stays as it is.
    assert write(storage, replace(ROW, last_close=2.0), ROW) == 0
    assert forecasts.read_forecasts(storage, ["d1"])["d1"] == ROW


def test_outcomes_are_written_once_and_go_with_their_forecast(storage: RetryingStorage) -> None:
    write(storage, ROW)
    second = replace(OUTCOME, key="high", sigma=0.02, in_band=True)
    for new in (2, 0):
        assert storage.transaction(lambda c: forecasts.write_outcomes(c, [OUTCOME, second])) == new
    assert forecasts.outcomes_of(storage, "A") == [OUTCOME, second]
    assert forecasts.outcomes_of(storage, "A", since=OUTCOME.due + timedelta(days=1)) == []
    assert forecasts.forget(storage, keep_days=100_000) == 0
    assert forecasts.forget(storage, keep_days=1) == 1
    assert forecasts.outcomes_of(storage, "A") == []


def test_requests_add_up_over_processes(storage: RetryingStorage) -> None:
    counts = {(date(2026, 3, 19), "A", "memory"): 5, (date(2026, 3, 20), "B", "failed"): 1}
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(lambda _: storage.transaction(lambda c: forecasts.add_requests(c, counts)), range(4)):
            pass
    assert forecasts.request_counts(storage) == {key: 4 * count for key, count in counts.items()}
    assert len(forecasts.request_counts(storage, since=date(2026, 3, 20))) == 1


def test_events_are_kept_in_order(storage: RetryingStorage) -> None:
    first = EventRow(at=AS_OF, symbol="A", kind="alarm", content={"e": 20.5})
    second = EventRow(at=AS_OF, symbol=None, kind="rest", content={})
    storage.transaction(lambda c: forecasts.add_events(c, [first, second]))
    assert forecasts.events_of(storage) == [first, second]
    assert forecasts.events_of(storage, "A") == [first]
    assert forecasts.events_of(storage, kind="rest") == [second]


def test_one_owner_computes_and_another_when_the_lease_ends(storage: RetryingStorage) -> None:
    def claimed(owner: str, *digests: str, lease_s: float = 60) -> tuple[set[str], list[str]]:
        mine, stored = forecasts.claim(storage, digests, owner, lease_s=lease_s)
        return mine, sorted(stored)

    assert claimed("one", "d1", "d2") == ({"d1", "d2"}, [])
    assert claimed("two", "d1", "d3") == ({"d3"}, [])
    assert claimed("one", "d1", lease_s=0) == ({"d1"}, [])  # renewed, and ended at once
    assert claimed("two", "d1", "d2") == ({"d1"}, [])
    write(storage, ROW)
    assert claimed("two", "d1", "d2") == (set(), ["d1"])
    storage.transaction(lambda c: forecasts.release(c, ["d1", "d2"], "one"))
    assert claimed("two", "d2") == ({"d2"}, [])


def test_a_database_of_before_gets_the_tables_of_forecasts(database_url: str) -> None:
    execute(database_url, "drop table outcomes", "drop table forecasts", "drop table events")
    storage = database.open_storage(database_url, wait_s=5)
    assert write(storage, ROW) == 1
    assert forecasts.events_of(storage) == []
    storage.engine.dispose()
