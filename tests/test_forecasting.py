"""Forecasts on demand: the numbers, where they come from, when they are made again, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import execute
from forecast_places import ALL_KEYS, KRONOS, NAIVE, TOTO, Place, daily
from places import last_bars

import forecasters
from forecasters import ExpectedError
from objectives.bars import read_bars
from objectives.evaluation import Evaluator
from objectives.windows import Contexts, SeedKind
from storage import embedded, forecasts
from storage.database import create_schema
from studies import forecasting, together
from studies.config import load
from studies.evaluators import loading_options
from studies.forecasting import Forecast, Forecasts


def one(asked: Forecasts, symbol: str = "SP500", **options: Any) -> Forecast:
    answers = asked.ask([symbol], **options)
    assert answers.refused == {}
    return answers.forecasts[symbol]


def refused(asked: Forecasts, symbol: str = "SP500", **options: Any) -> str:
    answers = asked.ask([symbol], **options)
    assert answers.forecasts == {}
    return answers.refused[symbol]


# --- the numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "params"), [("naive", NAIVE), ("toto", TOTO), ("kronos", KRONOS)])
def test_a_replay_gives_what_was_served_bit_for_bit(place: Place, model: str, params: Mapping[str, Any]) -> None:
    place.put_promoted("SP500", params, model=model)
    place.bars("SP500", last_bars("SP500", 300)[:-20])
    served = one(place.open(), keys=ALL_KEYS)
    (row,) = forecasts.forecasts_of(place.storage, "SP500")
    again = one(place.open(), keys=ALL_KEYS)
    assert again.cached == "stored"
    assert again.keys == served.keys

    place.bars("SP500", last_bars("SP500", 300))  # what came later changes nothing
    bars, _ = read_bars(place.data / "SP500.csv")
    config = load(place.settings)
    evaluator = Evaluator(forecasters.load(model, **loading_options(config, model)), cache_bytes=0)
    origin = Contexts(symbol="SP500", bars=bars, origins=(280,), horizon=1)
    for key in ALL_KEYS:
        scored = evaluator.forecast(origin.of_key(key), params, kind=SeedKind.SERVED)
        assert row.content["keys"][key]["scored"] == scored[0].tolist()
    repaired = evaluator.forecast_keys(origin, params, ALL_KEYS)
    low = evaluator.forecast_keys(origin, {**params, "aggregate": "quantile_0.10"}, ALL_KEYS)
    for key in ALL_KEYS:
        assert served.keys[key].points == tuple(repaired.served[key][0].tolist())
        assert served.keys[key].q10 == tuple(low.scored[key][0].tolist())
    assert served.last_close == bars.close[279]
    assert served.keys["close"].returns[0] == served.keys["close"].points[0] / bars.close[279] - 1
    assert served.as_of == bars.timestamps[279].astype("datetime64[us]").item().replace(tzinfo=UTC)


@pytest.mark.parametrize("key_input", ["price", "ratio", "variates"])
def test_what_a_price_of_a_bar_is_forecast_to_be_depends_on_no_other_that_is_asked_for(
    place: Place, key_input: str
) -> None:
    place.put_promoted("SP500", {**TOTO, "key_input": key_input})
    place.bars("SP500", last_bars("SP500", 300))
    every = one(place.open(), keys=ALL_KEYS).keys
    for key in ALL_KEYS:
        alone = one(place.open(), keys=[key]).keys[key]
        assert (alone.q10, alone.q50, alone.q90) == (every[key].q10, every[key].q50, every[key].q90)


def test_a_bar_is_served_as_one_can_be(place: Place) -> None:
    place.put_promoted("SP500", {**NAIVE, "aggregate": "quantile_0.75", "num_samples": 16}, model="naive")
    for end in range(300, 280, -1):
        place.bars("SP500", last_bars("SP500", 300)[:end])
        found = one(place.open(database=False), keys=ALL_KEYS)
        high, low = (found.keys[key].points[0] for key in ("high", "low"))
        assert all(low <= found.keys[key].points[0] <= high for key in ALL_KEYS)


@pytest.mark.parametrize(("model", "params", "band"), [("toto", TOTO, True), ("kronos", KRONOS, False)])
def test_exact_answers_have_the_quantiles_that_there_are(
    place: Place, model: str, params: Mapping[str, Any], band: bool
) -> None:
    place.settings.write_text(place.settings.read_text() + '[search]\nobjective = "exact"\n')
    place.put_promoted("SP500", {**params, "aggregate": "mean"}, model=model)
    found = one(place.open(), keys=["close"]).keys["close"]
    if band:
        assert found.q10
        assert found.q90
        assert found.q10[0] < found.points[0] < found.q90[0]
    else:
        assert (found.q10, found.q50, found.q90) == (None, None, None)


def test_what_decides_the_numbers_is_in_the_digest_and_nothing_else(place: Place) -> None:
    asked = place.open()
    first = one(asked)
    assert one(asked, horizon=2).digest != first.digest
    assert one(asked, keys=["high"]).digest != first.digest
    assert one(asked, keys=["low", "high"]).digest == one(asked, keys=["high", "low", "high"]).digest
    place.put_promoted("SP500", NAIVE, model="naive", metadata={"study": "other", "trial": 1})
    promoted_again = one(asked)
    assert (promoted_again.digest, promoted_again.cached) == (first.digest, "memory")
    assert (promoted_again.study, promoted_again.promoted != first.promoted) == ("other", True)
    place.put_promoted("SP500", {**NAIVE, "num_samples": 65}, model="naive")
    assert one(asked).digest != first.digest
    lines = last_bars("SP500", 300)
    cells = lines[-1].split(",")
    cells[1] = str(float(cells[1]) + 0.01)  # an open, which a forecast of the close of naive does not look at
    place.bars("SP500", [*lines[:-1], ",".join(cells)])
    place.put_promoted("SP500", NAIVE, model="naive")
    assert one(asked).digest != first.digest


# --- who makes them, and when they are made again ----------------------------------------------------------------


def test_an_answer_is_from_memory_from_a_row_or_computed_and_all_are_counted(place: Place) -> None:
    asked = place.open()
    answers = asked.ask(["SP500", "NASDAQ", "NOBODY"])
    assert {each.cached for each in answers.forecasts.values()} == {"computed"}
    assert one(asked).cached == "memory"
    other = place.open()
    assert one(other).cached == "stored"
    assert one(other).cached == "memory"
    assert asdict(one(other).keys["close"]) == asdict(answers.forecasts["SP500"].keys["close"])
    for each in (asked, other):
        each.together.totals()
    assert place.counts() == {"computed": 2, "failed": 1, "memory": 3, "stored": 1}
    assert (datetime.now(UTC).date(), "", "failed") in forecasts.request_counts(place.storage)  # no name is kept
    assert place.rows() == 2
    assert answers.forecasts["SP500"].trial_name == "SP500/naive@2026-03-19#7"


def test_requests_at_the_same_time_are_one_computation(place: Place) -> None:
    instances = [place.open() for _ in range(2)]
    start = threading.Barrier(8)

    def ask(number: int) -> str:
        start.wait()
        return one(instances[number % 2]).cached

    with ThreadPoolExecutor(8) as threads:
        kinds = list(threads.map(ask, range(8)))
    assert kinds.count("computed") == 1
    assert set(kinds) <= {"computed", "joined", "stored", "memory"}
    assert place.rows() == 1


def test_what_another_process_computes_is_waited_for_and_taken_over_when_it_dies(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = place.open()
    digest = asked.sources.question("SP500", horizon=1, keys=["close"], max_read_s=60).digest
    assert forecasts.claim(place.storage, [digest], "another", lease_s=1.5)[0] == {digest}
    began = time.monotonic()
    assert one(asked).cached == "computed"  # after its lease
    assert 1.0 < time.monotonic() - began < 10

    row = forecasts.read_forecasts(place.storage, [digest])[digest]
    other = place.open()
    digest = other.sources.question("NASDAQ", horizon=1, keys=["close"], max_read_s=60).digest
    forecasts.claim(place.storage, [digest], "another", lease_s=60)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: one(other, "NASDAQ"))
        time.sleep(0.3)
        assert not waiting.done()
        theirs = replace(row, digest=digest, symbol="NASDAQ")
        forecasts.finish(place.storage, [theirs], "another", wait_s=5)
        assert waiting.result(5).cached == "joined"


@pytest.mark.parametrize("writes", [True, False])
def test_a_long_computation_keeps_its_claim(place: Place, monkeypatch: pytest.MonkeyPatch, writes: bool) -> None:
    monkeypatch.setattr(together, "LEASE_S", 0.6)
    monkeypatch.setattr(together, "FLUSH_S", 0.1)
    answer, computed, catch_up = together.answer, [], together.forecasts.catch_up
    broken = not writes

    def caught_up(*words: Any) -> None:
        if broken:
            raise ValueError("a row that cannot be written")
        catch_up(*words)

    monkeypatch.setattr(together.forecasts, "catch_up", caught_up)

    def slowly(*words: Any) -> Any:
        time.sleep(1.5)
        computed.append(1)
        return answer(*words)

    monkeypatch.setattr(together, "answer", slowly)
    with ThreadPoolExecutor(2) as threads:
        kinds = sorted(threads.map(lambda each: one(each).cached, [place.open(), place.open()]))
    broken = False
    assert kinds == ["computed", "joined"]
    assert len(computed) == 1


def test_new_bars_and_new_promotions_are_seen_at_once(place: Place) -> None:
    asked = place.open()
    lines = last_bars("SP500", 300)
    place.bars("SP500", lines[:-1])
    first = one(asked)
    place.bars("SP500", lines)
    second = one(asked)
    assert (second.as_of > first.as_of, second.cached, second.bars != first.bars) == (True, "computed", True)
    place.put_promoted("SP500", {**NAIVE, "aggregate": "quantile_0.75"}, model="naive")
    third = one(asked)
    assert third.configuration != second.configuration
    assert third.keys["close"].points[0] > second.keys["close"].points[0]
    assert third.bars == second.bars


def test_bars_are_read_again_after_a_while_and_when_the_price_has_moved(place: Place) -> None:
    def reads(asked: Forecasts) -> float:
        return asked.sources._bars["SP500"].read_at

    path = place.data / "SP500.csv"
    os.utime(path, (time.time() - 60, time.time() - 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.sources.SETTLED_NS", 0)  # its times are trusted at once
        slow, quick = place.open(), place.open(PREDICTION_TIME_THRESHOLD="0.05")
        ttl = place.open(KRONOS_PREDICTION_CACHE_TTL="0.05")
        before = {each: (one(each).digest, reads(each)) for each in (slow, quick, ttl)}
        time.sleep(0.1)
        assert all(one(each).cached == "memory" for each in before)
        assert [reads(each) > before[each][1] for each in (slow, quick, ttl)] == [False, True, True]

        last = one(slow).last_close
        moved = {factor: one(slow, price=last * factor).price_moved for factor in (1.0, 1.009, 1.011, 0.989)}
        assert moved == {1.0: False, 1.009: False, 1.011: True, 0.989: True}  # an equity's 1 %
        assert reads(slow) == before[slow][1]  # not more than once a second
        time.sleep(1.0)
        again = one(slow, price=last * 2)
        assert (again.digest, again.cached, again.price_moved) == (before[slow][0], "memory", True)
        assert reads(slow) > before[slow][1]
        assert not one(place.open(PREDICTION_PRICE_THRESHOLD="0.5"), price=last * 1.4).price_moved
    place.bars("BTCUSD", last_bars("SP500", 300))
    place.put_promoted("BTCUSD", NAIVE, model="naive")
    last = one(slow, "BTCUSD").last_close
    assert [one(slow, "BTCUSD", price=last * factor).price_moved for factor in (1.015, 1.021)] == [False, True]


def test_without_the_cache_every_request_is_computed_and_still_one_row(place: Place) -> None:
    asked = place.open(KRONOS_PREDICTION_CACHE_ENABLED="0")
    assert [one(asked).cached for _ in range(3)] == ["computed"] * 3
    assert place.rows() == 1
    with pytest.raises(ExpectedError, match="KRONOS_PREDICTION_CACHE_TTL=soon in the environment: expected a number"):
        place.open(KRONOS_PREDICTION_CACHE_TTL="soon")


# --- without a database, and with one that goes away ---------------------------------------------------------------


def test_without_a_database_memory_is_all_and_that_is_said_once(place: Place) -> None:
    asked = place.open(database=False)
    assert [one(asked).cached for _ in range(2)] == ["computed", "memory"]
    assert place.notes == ["no database: forecasts are kept in memory only, and nobody can settle them"]
    assert place.rows() == 0


def test_a_database_that_goes_away_costs_no_answer_and_no_row(
    place: Place, own_server: embedded.PrivateServer, scratch: Path
) -> None:
    create_schema(own_server.url)
    folder = own_server.passfile.parent
    settings = load(place.settings)
    config = replace(settings, storage=replace(settings.storage, url=own_server.url))
    with Forecasts(config, note=place.notes.append) as asked:
        first = one(asked)
        embedded.stop(folder)
        assert one(asked).cached == "memory"
        computed = one(asked, "NASDAQ")
        assert computed.cached == "computed"
        assert sum("forecasts are computed without it" in line for line in place.notes) == 1
        embedded.start(folder)
        deadline = time.monotonic() + 30
        while asked.together.away is not None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        storage = asked.together.storage
        assert storage is not None
        assert set(forecasts.read_forecasts(storage, [first.digest, computed.digest])) == {
            first.digest,
            computed.digest,
        }
        assert sum(asked.together.totals().values()) == 3
        assert place.notes[-1] == "the database is back"


# --- staleness ------------------------------------------------------------------------------------------------------


def test_a_forecast_is_stale_once_a_newer_bar_has_closed(place: Place) -> None:
    place.put_promoted("BTCUSD", NAIVE | {"context_length": 64}, model="naive")
    now, asked = datetime.now(UTC), place.open()
    place.bars("BTCUSD", daily(now - timedelta(hours=30)))
    found = one(asked, "BTCUSD")
    assert not found.stale
    assert 30 * 3600 < found.bars_age_s < 31 * 3600
    assert found.next_close - found.as_of == timedelta(days=2)
    place.bars("BTCUSD", daily(now - timedelta(hours=49)))
    found = one(asked, "BTCUSD")
    assert found.stale
    assert found.stale_reason is not None
    assert "BTCUSD.csv has closed by" in found.stale_reason
    assert one(asked).stale  # the packaged bars are years old


def test_a_weekend_makes_no_forecast_stale(place: Place) -> None:
    place.bars("SP500", last_bars("SP500", 300)[:-2])  # to 2018-12-27, a Thursday
    found = one(place.open())
    assert (found.as_of.date(), found.next_close.date()) == (date(2018, 12, 27), date(2018, 12, 29))
    place.bars("SP500", last_bars("SP500", 300)[:-1])
    assert one(place.open()).next_close.date() >= date(2019, 1, 1)  # Friday's is overtaken when Monday has closed


def test_an_unfinished_bar_is_left_out_where_it_is_known_to_be(place: Place) -> None:
    for symbol in ("BTCUSD", "AAPL"):
        place.put_promoted(symbol, NAIVE | {"context_length": 64}, model="naive")
        place.bars(symbol, daily(datetime.now(UTC) - timedelta(hours=3)))
    answers = place.open().ask(["BTCUSD", "AAPL"]).forecasts
    assert answers["AAPL"].as_of - answers["BTCUSD"].as_of == timedelta(days=1)  # a session may have ended
    assert any("BTCUSD.csv: its last bar" in line and "had not ended" in line for line in place.notes)


def test_a_clock_that_was_set_back_is_said(place: Place) -> None:
    one(place.open())
    execute(place.url, "update forecasts set computed_at = now() + interval '1 hour'")
    found = one(place.open())
    assert (found.stale, found.age_s) == (True, 0.0)
    assert found.stale_reason is not None
    assert "this machine's time is before" in found.stale_reason


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_forecast_is_refused_in_one_line_and_the_others_are_answered(place: Place) -> None:
    asked = place.open()
    files = {"GONE": NAIVE, "SHORT": NAIVE, "FUTURE": NAIVE, "ODD": NAIVE | {"aggregate": "best"}, "TWICE": NAIVE}
    for symbol, params in files.items():
        place.put_promoted(symbol, params, model="naive")
    place.put_promoted("ALIEN", {}, model="alien")
    place.put_promoted("BROKEN", {}).write_text("{")
    lines = last_bars("SP500", 300)
    for symbol in ("ALIEN", "BROKEN", "ODD", "TWICE"):
        place.bars(symbol, lines)
    (place.data / "TWICE.parquet").write_bytes(b"")
    place.bars("SHORT", lines[:50])
    place.bars("FUTURE", daily(datetime.now(UTC) + timedelta(hours=3)))
    wanted = {
        "GONE": "no GONE.csv or GONE.parquet",
        "SHORT": "has 49 bars and needs 64 of context",
        "FUTURE": "begins after the time of this machine",
        "ODD": "ODD.json: cannot be forecast with:",
        "TWICE": "TWICE has two files",
        "ALIEN": "ALIEN.json: is of the model 'alien'; those here are toto, kronos, chronos2, toto2, naive",
        "BROKEN": "BROKEN.json: not JSON",
        "NOBODY": "no configuration is promoted",
        "../../etc": "is not a symbol",
    }
    answers = asked.ask(["SP500", *wanted])
    assert set(answers.forecasts) == {"SP500"}
    assert set(answers.refused) == set(wanted)
    for symbol, part in wanted.items():
        assert part in answers.refused[symbol], answers.refused[symbol]
        assert "\n" not in answers.refused[symbol]
    assert "unknown key 'volume'" in refused(asked, keys=["volume"])
    place.put_promoted("CLOSES", NAIVE, model="naive")
    place.bars("CLOSES", daily(datetime.now(UTC) - timedelta(days=2)))
    assert "has no high of its own" in refused(asked, "CLOSES", keys=["high"])
    for horizon in (0, 257):
        assert refused(asked, horizon=horizon) == f"horizon {horizon}: expected 1 to 256 bars"
    place.settings.write_text(place.settings.read_text() + "network_context = 130\n")
    place.put_promoted("SP500", KRONOS, model="kronos")
    assert "ask for a shorter one" in refused(place.open(), horizon=130)


def test_a_file_of_bars_that_vanishes_is_refused_and_not_answered_from_memory(place: Place) -> None:
    asked = place.open()
    one(asked)
    path = place.data / "SP500.csv"
    content = path.read_text()
    path.unlink()
    assert "no SP500.csv" in refused(asked)
    path.write_text(content)
    assert one(asked).cached == "memory"
    place.promoted_file("SP500").unlink()
    assert "no configuration is promoted" in refused(asked)


def test_weights_that_cannot_be_had_are_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a host without the hub
    text = place.settings.read_text().replace('"toto-tiny"', '"Datadog/Toto-Open-Base-1.0"')
    place.settings.write_text(text)
    place.put_promoted("SP500", TOTO, model="toto")
    answers = place.open().ask(["SP500", "NASDAQ"])
    assert set(answers.forecasts) == {"NASDAQ"}
    assert "Datadog/Toto-Open-Base-1.0" in answers.refused["SP500"]
    assert "\n" not in answers.refused["SP500"]


def test_a_failure_that_nobody_expects_is_one_line_and_the_next_request_is_answered(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = place.open()
    for module, name in ((together, "answer"), (forecasting, "_key_forecast")):  # where it is made, where it is told
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *words: 1 / 0)
            caplog.clear()
            assert "SP500: the forecast failed: ZeroDivisionError" in refused(asked)
            assert [record.exc_info is not None for record in caplog.records] == [True]  # with its traceback, once
        assert one(asked).symbol == "SP500"
