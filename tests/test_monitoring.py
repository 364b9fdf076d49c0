"""`studies monitor`: its numbers are the evaluator's, its alarm finds a bad promotion and no other, and may undo it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from watched import BAD, BARS, GOOD
from watched import ServedPlace as Place

from launch import cli, monitoring
from objectives.evaluation import Evaluator
from objectives.performance import performance
from objectives.strategies import Forecasts, strategies
from objectives.windows import SeedKind, now
from storage import configs, forecasts, history
from studies import backtesting, evaluators, readings
from studies import config as configuration
from studies.backtesting import Plan
from studies.series import read_series

TOTO = {"context_length": 256, "num_samples": 64, "aggregate": "median"}
LAST = BARS - 20  # the first bar of the test windows, before which compare measures


# --- its numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "config"), [("naive", GOOD), ("toto", TOTO)])
def test_a_replay_gives_the_numbers_of_compare_and_backtest(place: Place, model: str, config: dict[str, Any]) -> None:
    """60 bars through forecast, settle and monitor, bit for bit on the CPU."""
    place.put_in_use(config, model=model)
    place.replay(range(LAST - 60, LAST))
    place.settle()
    found = place.monitor()["readings"]
    words = ("--symbols", "SP500", "--models", model, "--params", "best", "--horizon", "1", "--windows", "60")
    ended = place.studies("compare", *words, "--seeds", "served", "--cpus", "1", "--json")
    compared = {row["label"]: row for row in json.loads(ended.stdout)["rows"]}
    row = compared[f"{model} best"]
    assert found["MAE"]["n"] == row["windows"] == 60
    assert (found["MAE"]["value"], found["skill"]["value"]) == (row["mae"], row["skill"])

    settings = configuration.load(place.settings)
    bars = read_series(settings, ["SP500"])[0][0].bars.slice(0, LAST)
    asset = settings.backtest.asset_class("SP500", bars.timestamps)
    forecaster = evaluators.load_forecaster(settings, model, device="cpu")
    alone = Evaluator(forecaster, cache_bytes=0)
    closes = [
        alone.forecast(now(bars.slice(0, origin), symbol="SP500"), row["params"], kind=SeedKind.SERVED)[0, 0]
        for origin in range(LAST - 60, LAST)
    ]
    shared = evaluators.load_forecaster(settings, model, device="cpu")
    together = evaluators.evaluator_of(settings, shared, cache_bytes=0, together=60)  # as a backtest forecasts
    together.max_num_samples = 0
    contexts = backtesting.last_bars("SP500", bars, 60)
    near = together.forecast(contexts, row["params"], kind=SeedKind.SERVED)[:, 0]
    np.testing.assert_allclose(near, closes, rtol=1e-6)
    plan = Plan(bars=60, train=60, step=20, evaluations=1, hold=1)
    (traded,) = backtesting.trade(plan, strategies(("simple",)), bars, Forecasts(close=np.array(closes)), asset)
    expected = performance(traded.booked["conservative"], asset.bars_a_year)
    assert [found[name]["value"] for name in ("Sharpe ratio", "win rate", "return", "drawdown")] == [
        expected.sharpe, expected.win_rate, expected.mean, expected.drawdown,
    ]  # fmt: skip
    assert found["return"]["interval"] == list(expected.interval or ())
    assert found["win rate"]["interval"] == list(expected.win_interval or ())


def test_a_longer_horizon_is_that_of_compare(place: Place) -> None:
    place.put_in_use(GOOD, horizon=3)
    last = BARS - 22  # the first of 20 test windows of three bars
    place.replay(range(last - 32, last - 2), horizon=3)
    place.settle()
    found = place.monitor()["readings"]
    words = ("--symbols", "SP500", "--models", "naive", "--params", "best", "--horizon", "3", "--stride", "1")
    ended = place.studies("compare", *words, "--windows", "30", "--seeds", "served", "--cpus", "1", "--json")
    (row,) = [row for row in json.loads(ended.stdout)["rows"] if row["label"] == "naive best"]
    assert (found["MAE"]["n"], found["MAE"]["value"]) == (row["windows"], row["mae"])
    assert found["skill"]["value"] == pytest.approx(row["skill"], rel=1e-12)
    assert found["coverage"]["n"] == 90


def test_what_it_says_of_service_and_of_the_confirmation(place: Place) -> None:
    place.put_in_use(GOOD, selection_value=0.004, skill=-0.05)
    place.replay([*range(LAST - 30, LAST - 10), *range(LAST - 5, LAST)])  # five bars without a forecast
    place.show_bars(LAST)
    place.settle()
    found = place.monitor()
    said = found["readings"]
    assert (said["MAE"]["reference"], said["skill"]["reference"]) == (0.004, -0.05)
    assert said["MAE"]["needed"] == readings.alarm.needed_for_mean(_deviation(place), 0.0004)
    assert (said["missed bars"]["value"], said["missed bars"]["n"]) == (5 / 30, 30)
    assert found["requests"] == {"computed": 25}
    assert (said["hit rate"]["value"], said["hit rate"]["needed"]) == (0.0, 119)
    assert found["bars_behind"] == 1
    shown = place.studies("monitor", "SP500").stdout
    assert "1 bar since the newest forecast; requests: 25 computed\n" in shown
    assert "keep it: it replaced nothing" in found["advice"]
    assert said["return"]["n"] == 30
    place.show_bars(BARS)
    assert place.monitor()["advice"].startswith("ask for forecasts: the newest is 21 bars old, studies forecast SP500")


def _deviation(place: Place) -> float:
    return float(np.std([row.error for row in forecasts.outcomes_of(place.storage, "SP500")], ddof=1))


def test_a_trigger_acts_at_enough_n_only() -> None:
    def hits(memory: int, computed: int) -> readings.Reading:
        (found,) = readings.of_service({"memory": memory, "computed": computed}, missed=0, bars=0)
        return found

    assert (hits(10, 90).beyond, hits(10, 90).acts) == (True, False)
    assert (hits(20, 180).beyond, hits(20, 180).acts) == (True, True)
    assert not hits(200, 200).beyond

    def returns(mean: float, count: int) -> Any:
        days = np.random.default_rng(1).normal(0, 0.01, count)
        booked = backtesting.Booked(returns=days - days.mean() + mean, exposure=np.ones(count), trades=NO_TRADES)
        return performance(booked, 252)

    daily = 0.01 / np.sqrt(252)
    found = {one.name: one for one in readings.of_returns(returns(daily, 250), returns(1.5 * daily, 250), 252)}
    assert found["Sharpe ratio"].beyond
    assert found["Sharpe ratio"].needed is not None
    assert 50_000 < found["Sharpe ratio"].needed < 80_000
    assert not found["Sharpe ratio"].acts


NO_TRADES = backtesting.Trades(
    **dict.fromkeys(("entered", "left", "side", "entry", "exit", "share", "returns"), np.zeros(0))
)


# --- the alarm ------------------------------------------------------------------------------------------------


def planted(place: Place, bars: int) -> None:
    place.put_in_use(GOOD)
    place.put_in_use(BAD)
    place.replay(range(LAST - bars, LAST))
    place.show_bars(LAST)
    place.settle()


def test_a_bad_promotion_is_found_and_undone_as_promote_does(place: Place) -> None:
    place.put_in_use(GOOD)
    place.replay(range(LAST - 105, LAST - 100))
    planted(place, 100)
    good = history.standing(place.folder / "hyperparams", "SP500")[1]
    assert good is not None
    found = place.monitor(code=monitoring.ALARMED)
    alarm = found["alarm"]
    assert alarm["n"] == 100
    assert alarm["highest"] >= 20
    assert 0.3 < alarm["improvement"] < 0.5
    assert alarm["interval"][0] > 0
    assert found["advice"].startswith(f"roll it back with {place.suggested('promote --rollback SP500')}")
    assert place.monitor(code=monitoring.ALARMED) == found
    (event,) = forecasts.events_of(place.storage, "SP500", kind="alarm")
    assert (event.content["promoted"], event.content["what"]) == (found["promoted"], ["E"])
    assert len(forecasts.events_of(place.storage, "SP500", kind="monitored")) == 1

    ended = place.studies("monitor", "--auto", code=monitoring.ALARMED)
    assert "the promotion of" in ended.stderr
    record = configs.read(place.folder / "hyperparams", "best", "SP500")
    assert record is not None
    assert record.digest == good.digest
    (event,) = forecasts.events_of(place.storage, "SP500", kind="rollback")
    assert event.content["promoted"] == found["promoted"]
    later = place.monitor("--auto")  # nothing that was forecast before counts any more
    assert (later["alarm"]["n"], later["promoted"]) == (0, good.digest)
    assert "MAE" not in later["readings"]
    with pytest.raises(history.NothingLeft):
        history.rollback(place.folder / "hyperparams", "SP500")


def test_it_rolls_back_only_where_asked_on_enough_bars_and_the_file_that_it_watched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(place, 59)
    (strong, *_) = [place.monitor(code=monitoring.ALARMED)]
    assert strong["alarm"]["evidence"] > 100
    before = (place.folder / "hyperparams/best/SP500.json").read_bytes()
    place.monitor("--auto", code=monitoring.ALARMED)
    assert (place.folder / "hyperparams/best/SP500.json").read_bytes() == before  # 59 bars are not 60
    place.replay([LAST])
    place.settle()
    place.monitor(code=monitoring.ALARMED)
    assert (place.folder / "hyperparams/best/SP500.json").read_bytes() == before  # nobody asked

    keep = monitoring.notes.record_monitored

    def meanwhile(*words: Any, **options: Any) -> None:
        keep(*words, **options)
        place.put_in_use({**GOOD, "num_samples": 128})

    monkeypatch.setattr(monitoring.notes, "record_monitored", meanwhile)
    ended = place.studies("monitor", "--auto", code=monitoring.ALARMED)
    assert "SP500 not rolled back: " in ended.stderr
    assert "was replaced meanwhile" in ended.stderr
    record = configs.read(place.folder / "hyperparams", "best", "SP500")
    assert record is not None
    assert record.config["num_samples"] == 128
    assert forecasts.events_of(place.storage, "SP500", kind="rollback") == []


@pytest.mark.parametrize("change", [{}, {"num_samples": 128}])
def test_a_promotion_that_changed_nothing_raises_no_alarm(place: Place, change: dict[str, Any]) -> None:
    place.put_in_use(GOOD, trial=1)
    place.put_in_use({**GOOD, **change}, trial=2)
    place.replay(range(LAST - 100, LAST))
    place.show_bars(LAST)
    place.settle()
    found = place.monitor("--auto")
    assert found["alarm"]["n"] == 100
    assert (found["alarm"]["highest"] == 1.0) == (not change)
    assert found["alarm"]["highest"] < 20
    assert found["advice"].startswith("keep it: nothing says that what it replaced was better")
    assert forecasts.events_of(place.storage, "SP500", kind="alarm") == []


# --- bad input, and what people see ---------------------------------------------------------------------------


def test_what_cannot_be_watched_is_one_line_and_the_others_go_on(place: Place) -> None:
    for symbol in ("NASDAQ", "SP500"):
        place.put_in_use(GOOD, symbol=symbol)
        place.replay([390], symbol)
    place.promoted_file("NASDAQ").write_text("{")
    ended = place.invoke(cli.studies, "monitor", "--json")
    assert ended.exit_code == 1
    assert [row["symbol"] for row in json.loads(ended.stdout)] == ["SP500"]
    (line,) = ended.stderr.splitlines()
    assert line.startswith("NASDAQ left out: ")
    ended = place.invoke(cli.studies, "monitor", "SP500", "VIX")
    assert ended.exit_code == 1
    assert "VIX left out: VIX: no configuration is promoted" in ended.stderr
    assert "ask for forecasts: the newest is 30 bars old" in ended.stdout


def test_bars_that_cannot_be_traded_leave_the_errors(place: Place) -> None:
    place.put_in_use(GOOD)
    place.replay(range(380, 385))
    text = place.write("SP500.csv", []).parent / "SP500.csv"
    place.show_bars(BARS)
    lines = text.read_text().splitlines()
    text.write_text(
        "\n".join(["timestamp,close", *(",".join([row.split(",")[0], row.split(",")[4]]) for row in lines[1:])])
    )
    place.settle()
    ended = place.invoke(cli.studies, "monitor", "SP500")
    assert "nothing is said of returns" in ended.stderr
    assert "MAE" in ended.stdout
    assert "Sharpe" not in ended.stdout
