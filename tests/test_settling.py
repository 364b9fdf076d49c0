"""`studies settle`: what came of served forecasts, whatever stops it, and the shadows of what a promotion replaced."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
from places import last_bars, patch_python
from sqlalchemy import text
from watched import BAD, BARS, GOOD
from watched import ServedPlace as Place

from launch import settling
from objectives.strategies import trailing_sigma
from storage import forecasts
from studies import config as configuration
from studies.series import read_series

# The process dies within the transaction that writes what came of the second symbol.
KILLED = """
import sys
if "settle" in sys.argv:
    import os, signal
    from storage import forecasts
    write, calls = forecasts.write_outcomes, []
    def dying(connection, rows):
        calls.append(write(connection, rows))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return calls[-1]
    forecasts.write_outcomes = dying
"""


def settled(place: Place, *words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    printed = json.loads(place.settle("--json", *words, code=code).stdout)
    return {row["symbol"]: row for row in printed}


def test_every_step_and_key_is_settled_as_its_bar_arrives(place: Place) -> None:
    place.put_in_use(GOOD)
    (one,) = place.replay([400], horizon=3, keys=["close", "high"])
    bars = read_series(configuration.load(place.settings), ["SP500"])[0][0].bars
    place.show_bars(402)
    assert settled(place)["SP500"] == {
        "symbol": "SP500", "outcomes": 4, "shadows": 0, "waiting": 1, "revised": 0, "lost": 0,
    }  # fmt: skip
    place.show_bars(BARS)
    assert settled(place)["SP500"]["outcomes"] == 2
    found = {(row.key, row.step): row for row in forecasts.outcomes_of(place.storage, "SP500")}
    last = bars.close[399]
    assert one.last_close == last
    for step in range(3):
        row, actual = found["close", step + 1], bars.close[400 + step]
        said = one.keys["close"]
        assert row.actual == actual
        assert row.error == abs(said.points[step] - actual) / last
        assert row.signed_error == (said.points[step] - actual) / last
        assert row.no_change_error == abs(last - actual) / last
        assert row.sigma == trailing_sigma(bars.close[:400], 1)[0]
        assert said.q10 is not None
        assert said.q90 is not None
        assert row.in_band == (said.q10[step] <= actual <= said.q90[step])
        assert found["high", step + 1].actual == bars.high[400 + step]


def test_what_is_older_than_the_settings_keep_is_deleted(place: Place) -> None:
    place.put_in_use(GOOD)
    place.replay([400, 401])
    place.storage.transaction(
        lambda c: c.execute(
            text(
                "update forecasts set computed_at = now() - interval '401 days' "
                "where as_of = (select min(as_of) from forecasts)"
            )
        )
    )
    ended = place.settle()
    assert "deleted 1 forecast older than [storage] keep_days = 400" in ended.stderr
    assert len(forecasts.forecasts_of(place.storage, "SP500")) == 1
    assert len(forecasts.outcomes_of(place.storage, "SP500")) == 1


def test_settling_again_changes_nothing(place: Place) -> None:
    place.put_in_use(GOOD)
    place.replay(range(380, 390))
    assert settled(place)["SP500"]["outcomes"] == 10
    before = place.rows("select * from outcomes order by digest")
    assert settled(place)["SP500"]["outcomes"] == 0
    assert place.rows("select * from outcomes order by digest") == before


def test_killed_in_the_middle_and_again(place: Place) -> None:
    for symbol in ("NASDAQ", "SP500"):
        place.put_in_use(GOOD, symbol=symbol)
        place.replay(range(380, 384), symbol)
    environment = place.environment | patch_python(place.folder / "killed", KILLED)
    ended = subprocess.run(
        place.command("studies", "settle"), env=environment, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert place.rows("select symbol, count(*) from outcomes join forecasts using (digest, role) group by 1") == [
        ("NASDAQ", 4)
    ]
    assert {symbol: row["outcomes"] for symbol, row in settled(place).items()} == {"NASDAQ": 0, "SP500": 4}
    whole = place.outcomes()
    place.storage.transaction(lambda c: c.exec_driver_sql("delete from outcomes"))
    settled(place)
    assert place.outcomes() == whole


def test_a_bad_file_leaves_the_other_symbols(place: Place) -> None:
    for symbol in ("NASDAQ", "SP500"):
        place.put_in_use(GOOD, symbol=symbol)
        place.replay([390], symbol)
    place.write("NASDAQ.csv", [*last_bars("NASDAQ", 10), "2018-12-31,what,1,1,1,1"])
    ended = place.settle(code=1)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("NASDAQ left out: ")]
    assert "NASDAQ.csv" in line
    assert [
        row[0] for row in place.rows("select distinct symbol from outcomes join forecasts using (digest, role)")
    ] == ["SP500"]


def test_what_came_is_brought_to_the_scale_that_the_forecast_knew(place: Place) -> None:
    """A split of 2 for 1, and a dividend, adjust all earlier bars: errors stay what they are without them."""
    place.put_in_use(GOOD)
    place.replay([390, 391])
    header, *lines = last_bars("SP500", BARS)
    settled(place)
    before = [row[6:10] for row in place.outcomes()]
    place.storage.transaction(lambda c: c.exec_driver_sql("delete from outcomes"))
    halved = []
    for line in lines:
        time, *prices = line.split(",")
        halved.append(",".join([time, *(str(float(price) / 2) for price in prices)]))
    place.write("SP500.csv", [header, *halved])
    ended = place.settle()
    assert "SP500: the last close of 2 forecasts was revised since" in ended.stderr
    for found, expected in zip([row[6:10] for row in place.outcomes()], before, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_forecast_whose_last_bar_is_gone_is_counted_and_left(place: Place) -> None:
    place.put_in_use(GOOD)
    place.replay([390, 395])
    lines = last_bars("SP500", BARS)
    place.write("SP500.csv", [line for place_of, line in enumerate(lines) if place_of != 390])
    ended = place.settle()
    assert "SP500: 1 forecast cannot be settled: the last bar known is gone" in ended.stderr
    assert len(place.outcomes()) == 1


# --- shadows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["naive", "toto", "ensemble"])
def test_a_shadow_is_what_the_replaced_configuration_would_have_served(
    place: Place, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though it is made when the bars have come; and only of what was served since the promotion."""
    toto = {"context_length": 256, "num_samples": 64, "aggregate": "median"}
    both = [{"model": "naive", "config": GOOD, "weight": 0.5}, {"model": "toto", "config": toto, "weight": 0.5}]
    old = {"naive": GOOD, "toto": toto, "ensemble": {"members": both}}[model]
    place.put_in_use(old, model=model)
    served = place.replay(range(390, 393), horizon=2, keys=["close", "high"])
    place.put_in_use(BAD)
    place.replay(range(390, 392), horizon=2, keys=["high", "close"])
    found = settled(place)["SP500"]
    assert (found["shadows"], found["outcomes"]) == (2, 4 * (3 + 2 + 2))
    shadows = forecasts.forecasts_of(place.storage, "SP500", role="shadow")
    for before, shadow in zip(served, shadows, strict=False):
        assert (shadow.promoted, shadow.as_of, shadow.model) == (before.promoted, before.as_of, model)
        for key, said in before.keys.items():
            assert shadow.content["keys"][key]["points"] == list(said.points)
            assert shadow.content["keys"][key]["q10"] == list(said.q10 or ())
    assert len(shadows) == 2
    monkeypatch.setattr(settling, "load_forecaster", None)  # nothing is forecast again
    assert settled(place)["SP500"]["shadows"] == 0


def test_no_shadow_is_made_of_bars_that_were_revised(place: Place) -> None:
    place.put_in_use(GOOD)
    place.put_in_use(BAD)
    place.replay([390, 395])
    lines = last_bars("SP500", BARS)
    time, *prices = lines[393].split(",")  # the forecast from 395 on has seen it, the other has not
    lines[393] = ",".join([time, *(str(float(price) * 1.001) for price in prices)])
    place.write("SP500.csv", lines)
    assert settled(place)["SP500"]["shadows"] == 1


def test_what_cannot_be_a_shadow_is_one_line_and_outcomes_go_on(place: Place) -> None:
    place.put_in_use({"a": 1}, model="chronos")
    place.put_in_use(GOOD)
    place.replay([390])
    ended = place.settle(code=1)
    (line,) = [line for line in ended.stderr.splitlines() if "no shadow forecasts" in line]
    assert "'chronos'" in line
    assert len(place.outcomes()) == 1


def test_a_symbol_that_is_no_longer_in_use_is_settled_and_not_watched(place: Place) -> None:
    place.put_in_use(GOOD)
    place.put_in_use(BAD)
    place.replay([390])
    place.promoted_file("SP500").unlink()
    assert settled(place)["SP500"]["outcomes"] == 1
    ended = place.studies("monitor")
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert "no forecast of a promoted configuration was served yet" in ended.stderr


def test_nothing_served_is_said(place: Place) -> None:
    assert "no forecast was served yet" in place.settle().stderr
