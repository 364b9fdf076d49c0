"""`studies backtest`: its forecasts are those served, its numbers those of the rules, and every try is counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traded
from browser import Tab
from click.testing import CliRunner, Result
from conftest import execute
from places import RunPlace, last_bars, tiny_toto

from launch import cli, processes
from launch.views import backtest as view
from launch.views.tables import terminal
from objectives import windows
from objectives.evaluation import Evaluator
from objectives.fills import book
from objectives.performance import deflated_sharpe, performance
from objectives.strategies import STRATEGIES, Forecasts, known_before, strategies
from storage import database, tries
from storage.tries import Try
from studies import backtesting, evaluators
from studies import config as configuration
from studies.backtesting import BacktestRow, Filled, Line, Plan
from studies.series import read_series

SMALL = ("--bars", "40", "--train", "60", "--evals", "30", "--params", "default", "--cpus", "1")
PLAN = Plan(bars=40, train=60, step=20, evaluations=30, hold=1)
PRICES = ("open", "high", "low", "close")
NAIVE = {"season": 5, "context_length": 256, "num_samples": 64, "aggregate": "median"}
TOTO = {"context_length": 256, "num_samples": 64, "aggregate": "median"}


class Place(RunPlace):
    """Two symbols and a model without weights."""

    def backtest(self, *words: str, code: int = 0) -> Result:
        ended = self.invoke(cli.studies, "backtest", *SMALL, *words)
        assert ended.exit_code == code, ended.output
        return ended

    def rows(self, *words: str) -> dict[tuple[str, str, str | None], dict[str, Any]]:
        """By symbol, strategy and offsets."""
        printed = json.loads(self.backtest("--json", *words).stdout)
        return {(row["symbol"], row["strategy"], row["offsets"]): row for row in printed["rows"]}

    def tried(self) -> dict[str, list[float]]:
        rows = self.storage.transaction(
            lambda c: c.exec_driver_sql("select symbol, sharpe from backtest_tries order by sharpe").all()
        )
        return {symbol: [sharpe for of, sharpe in rows if of == symbol] for symbol, _ in rows}


# --- forecasts ------------------------------------------------------------------------------------------------


def test_forecasts_are_those_that_would_have_been_served(place: Place) -> None:
    """One by one, from the bars that there were, as if the next had not come: whatever shares forwards here."""
    config = configuration.load(place.settings)
    (series,) = read_series(config, ["SP500"])[0]
    sharing = processes.evaluator(processes.settings_text(config), "toto", "cpu", together=50)
    found = backtesting.forecasts_of(sharing, backtesting.last_bars("SP500", series.bars, 50), TOTO, strategies())
    alone = Evaluator(tiny_toto(), cache_bytes=0)
    for place_of in (0, 17, 49):
        origin = len(series.bars) - 50 + place_of
        now = windows.now(series.bars.slice(0, origin), symbol="SP500")
        served = alone.forecast_keys(now, TOTO, ("close", "high", "low")).served
        low, high = (
            alone.forecast(now, {**TOTO, "aggregate": f"quantile_{q}"}, kind=windows.SeedKind.SERVED)
            for q in ("0.40", "0.60")
        )
        expected = {key: float(points[0, 0]) for key, points in served.items()}
        expected["band"] = float((high - low)[0, 0] / series.bars.close[origin - 1])
        for key, value in expected.items():
            assert getattr(found, key)[place_of] == pytest.approx(value, rel=1e-5), (key, place_of)


def test_later_bars_change_nothing_before_them(place: Place) -> None:
    config = configuration.load(place.settings)
    (series,) = read_series(config, ["SP500"])[0]
    bars, last = series.bars, len(series.bars) - 5
    asset = config.backtest.asset_class("SP500", bars.timestamps)
    garbage = np.random.default_rng(0).uniform(0.5, 2, 5)
    spoiled = replace(
        bars,
        **{k: np.append(getattr(bars, k)[:last], getattr(bars, k)[last:] * garbage) for k in PRICES},
    )
    evaluator = evaluators.evaluator_of(
        config, evaluators.load_forecaster(config, "naive", device="cpu"), cache_bytes=0
    )
    both = []
    for each in (bars, spoiled):
        found = backtesting.forecasts_of(evaluator, backtesting.last_bars("SP500", each, 100), NAIVE, strategies())
        both.append(backtesting.trade(PLAN, strategies(), each, found, asset))
    differs = 0
    for clean, dirty in zip(*both, strict=True):
        for kind in backtesting.FILLS:
            before, after = (one.booked[kind].returns for one in (clean, dirty))
            assert before[:34].tolist() == after[:34].tolist(), clean.name  # a position of the 35th is left at an open
            differs += before[35:].tolist() != after[35:].tolist()
    assert differs > 5


# --- numbers --------------------------------------------------------------------------------------------------


def test_worked_examples_through_the_command() -> None:
    close, high, low = np.array(traded.CLOSE_HIGH_LOW, dtype=float).T
    forecasts = Forecasts(close=close, high=high, low=low)
    plan = replace(PLAN, bars=5)
    chosen = strategies(("simple", "takeprofit"))
    found = backtesting.trade(plan, chosen, traded.worked_bars(), forecasts, traded.WORKED)
    expected = [
        [0.0187822, -0.0194175, -0.0297030, 0.0081837, 0.0483939],
        [0.0177822, 0.0270971, -0.0120909, 0.0286429, 0.0288969],
    ]
    for one, returns in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.booked["conservative"].returns, returns, atol=1e-7)
    held = backtesting.benchmark(plan, traded.worked_bars(), traded.WORKED)
    np.testing.assert_allclose(np.prod(1 + held.booked["conservative"].returns), 1.0078822, atol=1e-7)


def test_rows_are_what_the_rules_come_to(place: Place) -> None:
    rows = place.rows("--symbols", "SP500")
    names = [(strategy, offsets) for _, strategy, offsets in rows]
    fitted = [("maxdiff", "fitted"), ("maxdiff", "none"), ("always_on", "fitted"), ("always_on", "none")]
    assert names == [*((name, None) for name in list(STRATEGIES)[:7]), *fitted]

    config = configuration.load(place.settings)
    (series,) = read_series(config, ["SP500"])[0]
    bars = series.bars
    asset = config.backtest.asset_class("SP500", bars.timestamps)
    params = rows["SP500", "simple", None]["params"]
    evaluator = evaluators.evaluator_of(
        config, evaluators.load_forecaster(config, "naive", device="cpu"), cache_bytes=0
    )
    made = backtesting.forecasts_of(evaluator, backtesting.last_bars("SP500", bars, 40), params, strategies())
    known, last = known_before(bars, len(bars) - 40, made), bars.slice(len(bars) - 40, len(bars))
    for name in ("simple", "highlow", "maxdiff"):
        orders = STRATEGIES[name].orders(known, shorts=True)
        row = rows["SP500", name, "none" if name == "maxdiff" else None]
        for kind in backtesting.FILLS:
            expected = performance(book(orders, last, asset, optimistic=kind == "optimistic"), 252)
            found = row[kind]["performance"]
            assert found["trades"] == expected.trades
            assert (found["mean"], found["sharpe"]) == pytest.approx((expected.mean, expected.sharpe), rel=1e-5)
    with_offsets, without = (rows["SP500", "maxdiff", offsets] for offsets in ("fitted", "none"))
    means = [row["conservative"]["performance"]["mean"] for row in (with_offsets, without)]
    assert with_offsets["conservative"]["gain"] == pytest.approx(means[0] - means[1])
    assert with_offsets["conservative"]["performance"]["trades"] > 0
    assert without["conservative"]["gain"] is None
    assert (without["asset"], without["bars_a_year"], without["hold"]) == ("equity", 252, 1)
    assert rows["SP500", "buy_hold", None]["configuration"] == ""


def test_trades_are_held_until_a_target(place: Place) -> None:
    """Positions have no target: their hold is that of a day."""
    short, long = (place.rows("--symbols", "SP500", "--hold", hold) for hold in ("day", "target:5"))
    key = ("SP500", "takeprofit", None)
    trades = [rows[key]["conservative"]["performance"]["trades"] for rows in (short, long)]
    assert trades[1] < trades[0]
    assert [rows[key]["hold"] for rows in (short, long)] == [1, 5]
    assert long["SP500", "simple", None]["hold"] == 1
    assert long["SP500", "simple", None]["conservative"] == short["SP500", "simple", None]["conservative"] | {
        "deflated": long["SP500", "simple", None]["conservative"]["deflated"]
    }
    for wrong in ("week", "target:0", "target:x"):
        assert "write day, or target:N" in place.backtest("--hold", wrong, code=2).stderr


def line(symbol: str, days: Sequence[int], returns: Sequence[float], bars_a_year: float = 252.0) -> Line:
    bars = traded.walk(1, len(days))
    booked = book(STRATEGIES["buy_hold"].orders(known_before(traded.walk(1, len(days) + 1), 1, Forecasts(close=bars.close)), shorts=True), bars, traded.FREE)  # fmt: skip  # noqa: E501
    booked = replace(booked, returns=np.array(returns))
    times = np.datetime64("2024-01-01", "ns") + np.array(days) * np.timedelta64(1, "D")
    one = backtesting.Traded(
        strategy="buy_hold", offsets=None, hold=1, booked=dict.fromkeys(backtesting.FILLS, booked), rivals={}
    )
    return Line(
        symbol=symbol, tried_as=symbol, asset=traded.FREE, bars_a_year=bars_a_year, times=times, configuration=None,
        digest="", traded=one,
    )  # fmt: skip


def test_a_portfolio_has_equal_shares_on_the_bars_that_all_symbols_reach() -> None:
    daily, weekly = line("A", [0, 1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), line("B", [2, 4, 6], [1.0, 2.0, 3.0])
    (found,) = backtesting.portfolios([daily, weekly])
    assert found.times.astype("datetime64[D]").astype(str).tolist() == [f"2024-01-0{day}" for day in (3, 4, 5, 6)]
    np.testing.assert_allclose(found.traded.booked["conservative"].returns, [0.65, 0.2, 1.25, 0.3])
    assert (found.symbol, found.tried_as, found.bars_a_year) == ("equal weight", "A + B", 252)
    (mixed,) = backtesting.portfolios([daily, replace(weekly, bars_a_year=52)])
    assert mixed.bars_a_year == pytest.approx(365.25)  # a bar every day
    assert backtesting.portfolios([daily]) == []
    assert backtesting.portfolios([daily, line("B", [7, 8], [0.0, 0.0])]) == []


def test_a_portfolio_of_the_command_has_the_trades_of_its_symbols(place: Place) -> None:
    rows = place.rows("--strategies", "highlow,maxdiff")
    assert {key[0] for key in place.rows("--strategies", "buy_hold")} == {"SP500", "NASDAQ", "equal weight"}
    for offsets, name in ((None, "highlow"), ("fitted", "maxdiff")):
        parts = [rows[symbol, name, offsets] for symbol in ("NASDAQ", "SP500")]
        whole = rows["equal weight", name, offsets]
        for measure, expected in (("trades", sum), ("mean", np.mean), ("exposure", np.mean), ("turnover", np.mean)):
            values = [part["conservative"]["performance"][measure] for part in parts]
            assert whole["conservative"]["performance"][measure] == pytest.approx(expected(values)), measure
    gains = [rows[symbol, "maxdiff", "fitted"]["conservative"]["gain"] for symbol in ("NASDAQ", "SP500")]
    assert rows["equal weight", "maxdiff", "fitted"]["conservative"]["gain"] == pytest.approx(np.mean(gains))


# --- what was ever tried --------------------------------------------------------------------------------------


def test_every_try_is_counted_once_and_deflates_the_sharpe_ratio(place: Place) -> None:
    first = place.rows("--symbols", "SP500", "--strategies", "simple,maxdiff")
    assert {row["tried"] for row in first.values()} == {4}  # buying and holding too
    again = place.rows("--symbols", "SP500", "--strategies", "simple,maxdiff")
    assert again == first
    assert len(place.tried()["SP500"]) == 4
    more = place.rows("--symbols", "SP500", "--strategies", "simple,maxdiff", "--train", "70")
    assert {row["tried"] for row in more.values()} == {5}  # offsets fitted otherwise are another try
    held = place.rows("--symbols", "SP500,NASDAQ", "--strategies", "simple,highlow", "--hold", "target:3")
    tried = place.tried()
    assert {symbol: len(found) for symbol, found in tried.items()} == {"SP500": 6, "NASDAQ": 3, "NASDAQ + SP500": 3}
    row = held["SP500", "highlow", None]
    assert row["tried"] == 6
    sharpe = row["conservative"]["performance"]["sharpe"] / np.sqrt(252)
    assert min(abs(one - sharpe) for one in tried["SP500"]) < 1e-12
    few, many = (rows["SP500", "simple", None]["conservative"]["deflated"] for rows in (first, held))
    assert 0 < many < few < 1


def test_a_try_that_is_repeated_replaces_its_row(place: Place) -> None:
    one = Try(symbol="A", configuration="c", strategy="simple", hold=1, sharpe=0.1)
    assert tries.record(place.storage, [one, replace(one, symbol="B")]) == {"A": [0.1], "B": [0.1]}
    assert tries.record(place.storage, [replace(one, sharpe=0.2)]) == {"A": [0.2]}
    assert sorted(tries.record(place.storage, [replace(one, hold=2)])["A"]) == [0.1, 0.2]


def test_deflated_is_of_all_tries_of_the_symbol() -> None:
    days = range(30)
    returns = np.random.default_rng(1).normal(0.002, 0.01, 30)
    row = backtesting.row_of(line("A", days, returns.tolist()), [0.1, 0.2, -0.1])
    assert row.tried == 3
    assert row.conservative.deflated == deflated_sharpe(returns, [0.1, 0.2, -0.1])
    flat = backtesting.row_of(line("A", days, [0.0] * 30), [0.0])
    assert (flat.conservative.deflated, flat.conservative.performance.sharpe) == (None, None)


def test_no_server_is_made_to_count_in(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "no-server"
    settings = place.settings.read_text()
    place.settings.write_text(f'{settings}[storage]\ndata_dir = "{folder}"\n')
    words = ["backtest", *SMALL, "--symbols", "SP500", "--strategies", "simple", "--json", "--config"]
    ended = CliRunner().invoke(cli.studies, [*words, str(place.settings)])
    assert ended.exit_code == 0, ended.output
    assert "no studies yet to count tries beside" in ended.stderr
    assert {row["tried"] for row in json.loads(ended.stdout)["rows"]} == {2}
    assert not folder.exists()


def test_a_database_of_before_gets_the_table_of_tries(database_url: str) -> None:
    execute(database_url, "drop table backtest_tries")
    storage = database.open_storage(database_url, wait_s=5)
    one = Try(symbol="A", configuration="", strategy="simple", hold=1, sharpe=0.1)
    assert tries.record(storage, [one]) == {"A": [0.1]}
    storage.engine.dispose()


# --- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_of_a_backtest_is_one_line(place: Place) -> None:
    def refused(*words: str, settings: str = "") -> str:
        before = place.settings.read_text()
        place.settings.write_text(before + settings)
        ended = place.backtest("--symbols", "SP500", *words, code=1)
        place.settings.write_text(before)
        assert ended.stdout == ""
        return ended.stderr.splitlines()[-1]

    assert "unknown strategy martingale; the strategies are buy_hold, simple" in refused("--strategies", "martingale")
    assert "--train 59: offsets fitted to fewer than 60 bars" in refused("--train", "59")
    assert "needs 560: 400 to trade on, 96 to fit" in refused("--bars", "400", "--train", "96")
    assert "equity_limit_fee = -0.1: must be a share" in refused(settings="[backtest]\nequity_limit_fee = -0.1\n")
    assert "there is no folder" in refused("--report", str(place.folder / "none" / "a.html"))
    ended = place.invoke(cli.studies, "backtest", "--symbols", "SP500", "--bars", "40", "--train", "60")
    assert ended.exit_code == 1
    assert f"no configuration of SP500 in {place.folder / 'hyperparams'}" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: nothing is left to trade"
    assert "59: offsets" not in place.backtest("--train", "59", "--strategies", "simple").stderr

    header, *lines = last_bars("SP500", 420)
    cells = lines[-3].split(",")
    place.write("SP500.csv", [header, *lines[:-3], ",".join([*cells[:2], "1", *cells[3:]]), *lines[-2:]])
    assert f"bar of {cells[0]}" in refused()
    assert "high 1 is below low" in refused()
    place.write("SP500.csv", [header, *lines[:-3], ",".join([*cells[:3], "0", *cells[4:]]), *lines[-2:]])
    assert "row 419, column low: '0' is not a positive price" in refused()


def test_strategies_that_the_bars_do_not_allow_are_refused_by_name(place: Place) -> None:
    _, *lines = last_bars("SP500", 420)
    kept = [",".join(line.split(",")[place_of] for place_of in (0, 1, 4)) for line in lines]
    place.write("SP500.csv", ["timestamp,open,close", *kept])
    ended = place.backtest("--symbols", "SP500", "--json")
    found = [row["strategy"] for row in json.loads(ended.stdout)["rows"]]
    assert found == ["buy_hold", "simple", "shutdown", "ci_guard"]
    assert "maxdiff needs high, low, which the bars lack" in ended.stderr
    alone = place.backtest("--symbols", "SP500", "--strategies", "maxdiff", code=1)
    assert "maxdiff needs high, low" in alone.stderr.splitlines()[-1]


# --- what is shown --------------------------------------------------------------------------------------------


def test_eighty_columns_keep_sharpe_trades_gain_and_deflated(place: Place) -> None:
    rows = [_typed(row) for row in place.rows("--symbols", "SP500", "--strategies", "maxdiff,simple").values()]

    def headings(rows: Sequence[BacktestRow]) -> list[str]:
        found = terminal(view.table(rows, backtesting.FILLS), 80).columns
        return [" ".join(str(column.header).split()) for column in found]

    kept = ["symbol", "strategy", "Sharpe", "Sharpe, at best", "mean, bp", "trades", "gain, bp", "deflated"]
    assert headings(rows) == kept
    other = [replace(row, configuration="toto SP500.json num_samples=64") for row in rows]
    assert headings([*rows, *other])[:3] == ["symbol", "configuration", "strategy"]
    assert set(headings([*rows, *other])) >= {"Sharpe", "trades", "mean, bp", "deflated"}


def _typed(row: Mapping[str, Any]) -> BacktestRow:
    from objectives.performance import Performance

    filled = {
        kind: Filled(**{**row[kind], "performance": Performance(**row[kind]["performance"])})
        for kind in backtesting.FILLS
    }
    return BacktestRow(**{**row, **filled})


def test_what_learned_not_to_trade_is_said(place: Place) -> None:
    fitted, zero = (
        _typed(place.rows("--symbols", "SP500", "--strategies", "maxdiff")["SP500", "maxdiff", offsets])
        for offsets in ("fitted", "none")
    )

    def said(trades: int) -> str:
        worth = replace(fitted.conservative.performance, trades=trades)
        row = replace(fitted, conservative=replace(fitted.conservative, performance=worth))
        return "\n".join(view.explanations([row, zero], backtesting.FILLS))

    before = zero.conservative.performance.trades
    assert before > 3
    assert "to trade less is no skill: SP500 maxdiff fitted" in said(1)
    assert "to trade less" not in said(before)
    assert "no bar is reached by all symbols" in "\n".join(
        view.explanations([zero, replace(zero, symbol="A")], backtesting.FILLS)
    )
    costs = place.backtest("--symbols", "SP500").stderr
    both = place.backtest("--strategies", "simple").stderr
    assert "equal weight: the 40 bars that all symbols reach, 2018-11-01 to 2018-12-31" in both
    assert "equity, 252 days a year with 1 bar each: a side costs 0.05 % by limit and 0.0935 % at the market" in costs


def test_a_page_of_a_backtest_from_disk_in_a_browser(place: Place, tab: Tab) -> None:
    path = place.folder / "backtest.html"
    place.backtest("--strategies", "simple,maxdiff", "--report", str(path))
    requests: list[str] = []
    tab.page.on("request", lambda request: requests.append(request.url))
    tab.open(path.as_uri(), "Growth by month")
    for section in tab.page.locator("details").all():
        section.evaluate("one => one.open = true")
    figures = tab.page.locator(".figure")
    assert figures.count() == 5  # capital of the portfolio; capital and trades of two symbols
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        figure.locator(".scatterlayer .trace").first.wait_for(state="attached")
    assert tab.page.locator(".js-plotly-plot").count() == 5
    drawn = [figure.locator(".scatterlayer .trace").count() for figure in figures.all()]
    assert drawn == [8, 8, 2, 8, 2]  # capital and drawdown of four; closes, and the trades of the first strategy
    lines = [figure.locator(".scatterlayer .js-line").count() for figure in figures.all()]
    assert min(lines[2], lines[4]) > 5  # a line for each trade
    for text in ("equal weight", "buy_hold", "maxdiff fitted", "deflated", "4 combinations"):
        assert tab.page.get_by_text(text).count(), text
    assert tab.page.get_by_text("2018-12", exact=True).count() == 3  # a row of each table of months
    assert requests == [path.as_uri()]
    tab.check()
