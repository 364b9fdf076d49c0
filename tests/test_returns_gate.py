"""`promote --pnl-gate`: an improvement that is a loss in returns is kept from being promoted, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from places import StudyPlace
from promotion_place import NEW, OLD, PromotionPlace, measured

from launch import cli
from objectives.bars import DataError
from objectives.bootstrap import mean_interval
from objectives.fills import book
from objectives.strategies import STRATEGIES, Forecasts, known_before
from objectives.windows import SeedKind
from studies import config as configuration
from studies import promoting
from studies.evidence import MeasuredConfiguration
from studies.promoting import SymbolDecision
from studies.promotion import ReturnsDifference
from studies.series import confirmation_windows
from studies.study import Study

Place = StudyPlace  # of the fixture `place`


@pytest.fixture
def given(tmp_path: Path, database_url: str) -> Iterator[PromotionPlace]:
    """For studies whose evidence is given."""
    found = PromotionPlace(tmp_path, database_url)
    yield found
    found.close()


def improve(given: PromotionPlace, *symbols: str) -> None:
    """Studies with a candidate that is better than what is in use."""
    for symbol in symbols:
        given.put(OLD, symbol=symbol)
        given.study([(NEW, measured(0.009))], symbol=symbol, baselines={"incumbent": (OLD, measured(0.010))})


def decide(given: PromotionPlace, gate: promoting.ReturnsGate, *, force: bool = False) -> list[SymbolDecision]:
    config = configuration.load(given.settings)
    rule = promoting.rule_of(config, force=force)
    return promoting.promote(given.storage, config, rule, symbols=(), models=("toto",), dry_run=False, gate=gate)


def earns(value: float, interval: tuple[float, float] | None) -> promoting.ReturnsGate:
    return lambda study, old, new: ReturnsDifference(strategy="simple", value=value, interval=interval)


@pytest.mark.parametrize(
    ("interval", "decision"),
    [
        ((-0.003, -0.0001), ("kept", "worse in returns")),
        ((-0.003, 0.0001), ("promoted", "improved")),  # a loss, but luck may make it
        (None, ("promoted", "improved")),
    ],
)
def test_only_a_significant_loss_is_kept(
    given: PromotionPlace, interval: tuple[float, float] | None, decision: Sequence[str]
) -> None:
    improve(given, "BTCUSD")
    (row,) = decide(given, earns(-0.001, interval))
    assert (row.decision, row.reason) == tuple(decision)
    assert (row.returns, row.returns_low, row.returns_high) == (-0.001, *(interval or (None, None)))
    said = json.loads(given.promoted_file("BTCUSD").read_text())
    if row.decision == "promoted":
        assert said["metadata"]["returns"]["value"] == -0.001
    else:
        assert said["config"] == OLD
        assert not row.written


def test_force_and_first_promotions_are_not_asked(given: PromotionPlace) -> None:
    def refuses(study: Study, old: MeasuredConfiguration, new: MeasuredConfiguration) -> ReturnsDifference:
        raise AssertionError("asked")

    improve(given, "BTCUSD")
    given.promoted_file("BTCUSD").unlink()
    (row,) = decide(given, refuses)
    assert (row.reason, row.returns) == ("first", None)
    given.put(OLD)
    (row,) = decide(given, refuses, force=True)
    assert row.reason == "forced"


def test_bars_that_cannot_be_traded_fail_their_symbol_alone(given: PromotionPlace) -> None:
    improve(given, "BTCUSD", "ETHUSD")

    def gate(study: Study, old: MeasuredConfiguration, new: MeasuredConfiguration) -> ReturnsDifference:
        if study.symbol == "BTCUSD":
            raise DataError("no bars")
        return ReturnsDifference(strategy="simple", value=0.001, interval=(0.0, 0.002))

    rows = {row.symbol: (row.decision, row.reason) for row in decide(given, gate)}
    assert rows == {"BTCUSD": ("failed", "no bars"), "ETHUSD": ("promoted", "improved")}


def test_returns_are_of_the_confirmation_windows_with_served_seeds(place: Place) -> None:
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    opened = place.open().study
    place.finish(opened)
    ended = place.invoke(cli.promote, "--pnl-gate", "simple", "--dry-run", "--json")
    assert ended.exit_code == 0, ended.output
    (row,) = json.loads(ended.stdout)
    assert row["improvement"] > 0.01

    series, config = place.series(), place.config()
    windows = confirmation_windows(config, "SP500", series.bars)
    first, count = windows.origins[0], len(windows)
    assert count == 60
    best = min(place.result(opened)["candidates"], key=lambda one: one["confirmation"]["mae"])["params"]
    returns = []
    for params in ({"context_length": 256, "num_samples": 48, "aggregate": "quantile_0.90"}, best):
        points = place.evaluator().forecast(windows, params, kind=SeedKind.SERVED)[:, 0]
        known = known_before(series.bars, first, Forecasts(close=points))
        asset = config.backtest.asset_class("SP500", series.bars.timestamps)
        orders = STRATEGIES["simple"].orders(known, shorts=True)
        returns.append(book(orders, series.bars.slice(first, first + count), asset).returns)
    difference = returns[1] - returns[0]
    interval = mean_interval(difference)
    assert interval is not None
    np.testing.assert_allclose(
        [row["returns"], row["returns_low"], row["returns_high"]], [difference.mean(), *interval], rtol=1e-9
    )
    assert row["decision"] == ("kept" if interval[1] < 0 else "promoted")
    table = place.invoke(cli.promote, "--pnl-gate", "simple", "--dry-run").stdout
    assert f"{1e4 * difference.mean():+.1f}" in table
    assert "returns, bp" in table
    assert "returns, bp" not in place.invoke(cli.promote, "--dry-run").stdout


def test_a_strategy_that_forecasts_nothing_is_no_gate(place: Place) -> None:
    ended = place.invoke(cli.promote, "--pnl-gate", "buy_hold")
    assert ended.exit_code == 2
    assert "'buy_hold' is not one of 'simple'" in ended.stderr
