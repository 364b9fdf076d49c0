"""What --json prints is read by scripts: every command that has it prints JSON, with exactly these keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click
from places import INCUMBENT
from places import StudyPlace as Place

from launch import cli, verify
from launch.views import comparison

COMMANDS = {
    "promote",
    "studies backtest",
    "studies compare",
    "studies forecast",
    "studies monitor",
    "studies settle",
    "studies sweep",
    "studies reduce",
    "studies list",
    "studies replay",
    "studies show",
    "studies verify-compile",
}

PROMOTE = {
    "symbol", "study", "model", "incumbent_model", "incumbent_mae", "best_mae", "improvement", "improvement_low",
    "improvement_high", "p_value", "improvement_own", "pooled_symbols", "improvement_validation", "improvement_search",
    "improvement_test", "skill", "worse_than_no_change", "clipped", "test_mae", "incumbent_test_mae", "windows",
    "in_use", "decision", "reason", "returns", "returns_low", "returns_high", "next", "path", "written", "pairs",
    "ensemble",
}  # fmt: skip
PAIR = {"symbol", "model", "study", "status", "reason", "mae", "validation_mae", "test_mae", "passes"}
ROLLBACK = {"symbol", "model", "promoted_at", "step", "restored", "removed", "mismatch", "kept", "remaining"}
LIST = {
    "study", "symbol", "model", "as_of", "state", "done", "budget", "parked", "parked_reason", "incumbent_mae",
    "best_mae", "improvement", "skill", "confirmed_incumbent_mae", "confirmed_mae", "confirmed_improvement",
    "confirmed_skill",
}  # fmt: skip
SHOW = LIST | {
    "trials", "best", "baselines", "confirmation", "seconds", "importances", "importances_missing", "definition",
    "decision", "in_use", "front",
}  # fmt: skip
BEST = {"trial", "mae", "params"}
BASELINE = {"params", "validation"}
SECONDS = {"encode", "draw", "aggregate", "sample", "read", "storage", "idle", "other"}
DEFINITION = {
    "symbol", "model", "as_of", "metric", "objective", "bars", "windows", "space", "checkpoint", "no_change_mae",
}  # fmt: skip
DEFINED_WINDOWS = {"batch", "horizon", "validation", "test", "min_context", "rung"}
CONFIRMATION = {"windows", "passes", "sampling_error", "candidates", "baselines", "no_change", "forecasts"}
MEASURED = {"mae", "price_mae", "mae_percent", "no_change_mae", "skill", "windows", "seconds"}
CONFIRMED = MEASURED | {"errors", "sampling_error", "latency_s"}
WINDOWS = {"validation", "confirmation", "test"}
VERIFY = {
    "model", "symbol", "mode", "compilation", "windows", "horizon", "dtype", "trials", "warmup_s", "mean_s", "std_s",
    "speedup", "difference", "rms", "moved", "mae_change", "mae_low", "mae_high", "graphs", "recompilations", "breaks",
    "skips", "peak_mib", "weight_mib", "products", "instructions", "passed",
}  # fmt: skip


COMPARE = {
    "symbol", "key", "label", "model", "source", "params", "windows", "effective_windows", "horizon", "stride", "first",
    "last", "repaired", "reference", "mae", "price_mae", "mae_percent", "skill", "by_step", "sampling_error", "seconds",
    "improvement", "improvement_low", "improvement_high", "clipped", "verdict", "error",
}  # fmt: skip
COMPARE_OVER = {
    "label", "key", "symbols", "mae", "mae_percent", "skill", "by_step", "seconds", "reference", "improvement",
    "verdicts",
}  # fmt: skip
BACKTEST = {
    "symbol", "asset", "bars_a_year", "first", "last", "configuration", "model", "source", "params", "strategy",
    "offsets", "hold", "tried", "conservative", "optimistic",
}  # fmt: skip
BACKTEST_PLAN = {"bars", "train", "step", "evaluations", "hold"}
BACKTEST_FILLED = {"performance", "deflated", "gain", "gain_interval"}
PERFORMANCE = {
    "bars", "growth", "mean", "interval", "sharpe", "sharpe_error", "probabilistic", "drawdown", "trades", "win_rate",
    "win_interval", "mean_trade", "turnover", "exposure",
}  # fmt: skip
SWEEP = {"symbol", "model", "from", "params", "windows", "passes", "current", "p_value", "cells"}
SWEPT = {
    "values", "params", "current", "improvement", "improvement_low", "improvement_high", "verdict", "mae", "price_mae",
    "mae_percent", "no_change_mae", "skill",
}  # fmt: skip
REDUCE = {
    "symbol", "model", "samples", "reduced", "reference", "max_cost", "costs", "windows", "passes", "before", "after",
    "written",
}  # fmt: skip
FORECAST = {
    "symbol", "model", "configuration", "promoted", "study", "trial", "fingerprint", "digest", "bars", "as_of",
    "next_close", "last_close", "horizon", "keys", "computed_at", "age_s", "bars_age_s", "stale", "stale_reason",
    "cached", "price_moved",
}  # fmt: skip
FORECAST_KEY = {"points", "q10", "q50", "q90", "returns", "repaired"}
SETTLE = {"symbol", "outcomes", "shadows", "waiting", "revised", "lost"}
MONITOR = {
    "symbol", "model", "promoted", "study", "since", "as_of", "bars_behind", "readings", "requests", "alarm", "advice",
}  # fmt: skip
READING = {"name", "value", "n", "unit", "interval", "reference", "trigger", "needed", "beyond"}
ALARM = {"n", "evidence", "highest", "improvement", "interval"}


def commands(group: Mapping[str, click.Command], before: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.items():
        if isinstance(command, click.Group):
            found |= commands(command.commands, f"{before}{name} ")
        else:
            found[before + name] = command
    return found


def test_these_commands_have_json() -> None:
    everything = commands({"launch-workers": cli.launch_workers, "promote": cli.promote, "studies": cli.studies})
    with_json = {name for name, command in everything.items() if any("--json" in p.opts for p in command.params)}
    assert with_json == COMMANDS


def test_keys_of_verify_compile() -> None:
    """It compiles for minutes: tests/test_verify.py runs the command and reads its JSON, here are the keys."""
    assert {field.name for field in fields(verify.ModeRow)} == VERIFY


def test_keys_of_compare(place: Place) -> None:
    """Over symbols from rows of two, as the place has bars of one."""
    words = ["compare", "--cpus", "1", "--horizon", "1", "--windows", "2", "--params", "default", "--json"]
    ended = place.invoke(cli.studies, *words)
    printed = json.loads(ended.stdout)
    assert set(printed) == {"rows", "over_symbols"}
    assert [set(row) for row in printed["rows"]] == [COMPARE] * 4
    rows = [comparison.ComparisonRow(**{**row, "symbol": symbol}) for symbol in "AB" for row in printed["rows"]]
    assert [set(one) for one in comparison.over_symbols(rows)] == [COMPARE_OVER] * 3


def test_keys_of_backtest(place: Place) -> None:
    words = ["--bars", "30", "--strategies", "simple", "--params", "default", "--cpus", "1", "--json"]
    ended = place.invoke(cli.studies, "backtest", *words)
    printed = json.loads(ended.stdout)
    assert set(printed) == {"plan", "rows"}
    assert set(printed["plan"]) == BACKTEST_PLAN
    assert [set(row) for row in printed["rows"]] == [BACKTEST] * 2
    for row in printed["rows"]:
        for fills in ("conservative", "optimistic"):
            assert set(row[fills]) == BACKTEST_FILLED
            assert set(row[fills]["performance"]) == PERFORMANCE


def test_keys_of_sweep_and_reduce(place: Place) -> None:
    place.put("best", {"aggregate": "mean", "num_samples": 64, "samples_per_batch": 64})
    swept = json.loads(place.invoke(cli.studies, "sweep", "SP500", "toto", "num_samples=32,64", "--json").stdout)
    assert set(swept) == SWEEP
    assert set(swept["windows"]) == {"count", "first", "last", "horizon", "stride"}
    assert [set(one) for one in swept["cells"]] == [SWEPT] * 2
    (reduced,) = json.loads(place.invoke(cli.studies, "reduce", "--max-cost", "0.9", "--json").stdout)
    assert set(reduced) == REDUCE
    assert set(reduced["costs"][0]) == {"samples", "cost", "bound"}
    assert set(reduced["before"]) == set(reduced["after"]) == {"total", "at_once"}


def test_keys_of_forecast_settle_and_monitor(place: Place) -> None:
    place.put("best", {"aggregate": "mean", "num_samples": 64, "samples_per_batch": 64})
    asked = json.loads(place.invoke(cli.studies, "forecast", "SP500", "NOPE", "--json").stdout)
    assert set(asked) == {"forecasts", "refused"}
    assert set(asked["refused"]) == {"NOPE"}
    assert [set(one) for one in asked["forecasts"]] == [FORECAST]
    assert {name: set(one) for name, one in asked["forecasts"][0]["keys"].items()} == {"close": FORECAST_KEY}
    (settled,) = json.loads(place.invoke(cli.studies, "settle", "--json").stdout)
    assert set(settled) == SETTLE
    (watched,) = json.loads(place.invoke(cli.studies, "monitor", "--json").stdout)
    assert set(watched) == MONITOR
    assert set(watched["alarm"]) == ALARM
    assert {frozenset(one) for one in watched["readings"]} == {frozenset(READING)}


def test_keys(place: Place) -> None:
    def printed(command: click.Command, *words: str) -> Any:
        ended = place.invoke(command, *words, "--json")
        assert ended.exit_code == 0, ended.output
        return json.loads(ended.stdout)

    assert printed(cli.studies, "list") == []
    place.put("best", {**INCUMBENT, "samples_per_batch": 16})
    place.finish(place.open(trials=22, prune_worst=0.0).study, trials=22, prune_worst=0.0)

    (row,) = printed(cli.studies, "list")
    assert set(row) == LIST
    assert (row["state"], row["done"], row["budget"], row["parked"], row["parked_reason"]) == (
        "finished", 22, 22, 0, None,
    )  # fmt: skip

    show = printed(cli.studies, "show", row["study"])
    assert set(show) == SHOW
    assert {key: value for key, value in show.items() if key in LIST and key != "parked"} == {
        key: value for key, value in row.items() if key != "parked"
    }
    assert show["parked"] == []
    assert show["trials"] == {"complete": 22}
    assert all(set(one) == BEST for one in show["best"])
    assert set(show["baselines"]) == {"incumbent"}
    assert set(show["baselines"]["incumbent"]) == BASELINE
    assert set(show["baselines"]["incumbent"]["validation"]) == MEASURED
    assert set(show["seconds"]) == SECONDS
    assert set(show["importances"]) == {"num_samples", "aggregate"}
    assert show["importances_missing"] is None
    assert set(show["definition"]) == DEFINITION
    assert set(show["definition"]["windows"]) == DEFINED_WINDOWS
    confirmation = show["confirmation"]
    assert set(confirmation) == CONFIRMATION
    assert set(confirmation["windows"]) == set(confirmation["no_change"]) == WINDOWS
    for one in (*confirmation["candidates"], *confirmation["baselines"].values()):
        assert set(one) - {"trial"} == {"params", "source", *WINDOWS}
        assert all(set(one[windows]) == CONFIRMED for windows in WINDOWS)
    assert set(confirmation["forecasts"]) == {"validation", "test"}

    for dry in (["--dry-run"], []):
        (decided,) = printed(cli.promote, *dry)
        assert set(decided) == PROMOTE
        assert [set(pair) for pair in decided["pairs"]] == [PAIR]
        assert decided["decision"] == "promoted"
    for dry in (["--dry-run"], []):
        assert set(printed(cli.promote, "--rollback", "SP500", *dry)) == ROLLBACK
