"""History replayed: dates and windows, what is measured once, and what the rules did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import forecasters
from forecasters import Bars
from launch import cli
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins
from studies import config as configuration
from studies import history_errors, replay
from studies.history_errors import Candidate, History
from studies.promotion import Rule
from studies.replay import ReplayPlan
from studies.series import Series

RULES = {
    "pooled": Rule(min_improvement=0.01),
    "confirmation": Rule(min_improvement=0.01, on="confirmation"),
    "validation": Rule(min_improvement=0.01, on="validation"),
}
AGGREGATES = ("mean", "median", "quantile_0.30")


def walk(symbol: str, count: int = 700, *, days: float = 1.0, seed: int = 0) -> Series:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(seed).standard_t(4, count) * 0.01))
    steps = (np.arange(count) - count) * days * 86_400e9
    times = np.datetime64("2024-01-01", "ns") + steps.astype("timedelta64[ns]")
    bars = Bars(timestamps=times, open=close, high=close, low=close, close=close, volume=None)
    return Series(symbol=symbol, path=Path(f"{symbol}.csv"), bars=bars)


def config() -> Any:
    return configuration.load(None, {"search": {"models": ["toto"]}})


def planned(series: list[Series], *, every: int = 30, count: int = 6) -> ReplayPlan:
    return ReplayPlan(dates=replay.replay_dates(series, every=every, after=60, count=count), after=60, rules=RULES)


def history(series: Series, plan: ReplayPlan, levels: list[float], *, since: str = "", model: str = "toto") -> History:
    """Candidates whose errors are of these levels; those after `since` of the levels reversed."""
    origins = replay.origins_of(config(), series, plan)
    rng = np.random.default_rng(len(series.symbol) + ord(series.symbol[-1]))
    hard = np.abs(rng.standard_t(5, len(origins))) + 0.05
    times = series.bars.timestamps[origins.start : origins.stop]
    turned = (times >= np.datetime64(since)) if since else np.zeros(len(origins), dtype=bool)
    level = np.where(turned, np.array(levels[::-1])[:, None], np.array(levels)[:, None])
    errors = 0.01 * hard * level * np.exp(rng.normal(0, 0.1, (len(levels), len(origins))))
    candidates = [
        Candidate(params={"aggregate": name, "num_samples": 64}, source="grid" if place else "default")
        for place, name in enumerate(AGGREGATES[: len(levels)])
    ]
    return History(
        symbol=series.symbol,
        model=model,
        checkpoint="c",
        series=series,
        min_context=64,
        first=origins.start,
        candidates=candidates,
        search=errors,
        fresh=errors * np.exp(rng.normal(0, 0.01, errors.shape)),
        no_change=0.01 * hard,
    )


# --- dates and windows --------------------------------------------------------------------------------------


def test_dates_are_of_the_densest_symbol_and_leave_the_bars_to_judge_on() -> None:
    weekly, daily = walk("W", 300, days=7), walk("D", 700)
    dates = replay.replay_dates([weekly, daily], every=30, after=60, count=3)
    assert dates == [daily.bars.timestamps[place] for place in (-121, -91, -61)]
    since = daily.bars.timestamps[-100]
    assert replay.replay_dates([daily], every=30, after=60, count=1, since=since) == dates[1:]


def test_a_study_of_a_date_has_the_windows_that_it_would_have_had() -> None:
    series = walk("A")
    plan = planned([series])
    origins = replay.origins_of(config(), series, plan)
    first = replay.end_at(series, plan.dates[0])
    seen = series.bars.slice(0, first)
    confirmed = recent_origins(seen, 250, symbol="A", before=first - 20)
    assert origins.start == confirmed.origins[0]
    assert origins.stop == replay.end_at(series, plan.dates[-1]) + 60
    assert replay.origins_of(config(), walk("B", 450), plan) == range(0)


def test_later_bars_change_no_earlier_decision() -> None:
    series = [walk(symbol, seed=seed) for seed, symbol in enumerate("ABC")]
    plan = planned(series)
    found = [history(each, plan, [1.05, 1.0, 1.1]) for each in series]
    later = plan.dates[3]

    def spoilt(one: History) -> History:
        after = one.series.bars.timestamps[one.first : one.first + one.fresh.shape[1]] > later
        return replace(one, search=np.where(after, one.search * 9, one.search), fresh=np.where(after, 1.0, one.fresh))

    def decided(plays: list[replay.Play]) -> list[Any]:
        dates = [str(date.astype("datetime64[D]")) for date in plan.dates[:4]]
        return [(one.date, one.rule, one.symbol, one.reason, one.improvement) for one in plays if one.date in dates]

    before, after = (decided(replay.play(config(), plan, each)) for each in (found, [spoilt(one) for one in found]))
    assert before == after
    assert before


# --- playing ------------------------------------------------------------------------------------------------


def test_a_true_gain_is_found_once_and_then_kept() -> None:
    series = [walk(symbol, seed=seed) for seed, symbol in enumerate("ABCDEF")]
    plan = planned(series)
    plays = replay.play(config(), plan, [history(each, plan, [1.05, 1.0, 1.1]) for each in series])
    pooled = [one for one in plays if one.rule == "pooled"]
    promoted = [one for one in pooled if one.promoted]
    assert len(pooled) == 36
    assert {one.date for one in promoted} == {str(plan.dates[0].astype("datetime64[D]"))}
    assert {one.params["aggregate"] for one in pooled} == {"median"}
    outcome = next(one for one in replay.summarise(plays, overlap=2) if one.rule == "pooled")
    assert outcome.promoted == pytest.approx(6 / 36)
    assert outcome.over_default == pytest.approx(1 - 1 / 1.05, abs=0.01)
    low, high = outcome.over_default_interval
    assert low < outcome.over_default < high
    assert outcome.realised == pytest.approx(outcome.over_default, abs=0.02)
    assert [date for date, _ in outcome.curve] == [str(date.astype("datetime64[D]")) for date in plan.dates]


def test_a_replay_that_begins_with_what_is_in_use_is_judged_against_it() -> None:
    series = [walk(symbol, seed=seed) for seed, symbol in enumerate("ABCDEF")]
    plan = planned(series)
    found = [history(each, plan, [1.0, 1.02, 1.1]) for each in series]
    found = [
        replace(one, candidates=[*one.candidates[:2], replace(one.candidates[2], source="in use")]) for one in found
    ]
    plays = [one for one in replay.play(config(), plan, found) if one.rule == "pooled"]
    assert sum(one.promoted for one in plays) == 6
    assert {one.params["aggregate"] for one in plays} == {AGGREGATES[0]}
    (outcome,) = replay.summarise(plays, overlap=2)
    assert outcome.over_start == pytest.approx(1 - 1 / 1.1, abs=0.01)
    assert outcome.over_default == 0


def test_where_nothing_is_better_pooling_promotes_least() -> None:
    series = [walk(symbol, seed=seed) for seed, symbol in enumerate("ABCDEFGH")]
    plan = planned(series, count=8)
    outcomes = replay.summarise(
        replay.play(config(), plan, [history(each, plan, [1.0, 1.0, 1.0]) for each in series]), overlap=2
    )
    shares = {one.rule: one.promoted for one in outcomes}
    assert shares["pooled"] <= 0.02
    assert shares["validation"] > 0.1


def test_what_was_promoted_is_what_the_next_date_compares_with() -> None:
    series = [walk(symbol, seed=seed) for seed, symbol in enumerate("ABCDEF")]
    plan = planned(series, every=60, count=6)
    turn = str(plan.dates[0])
    plays = replay.play(config(), plan, [history(each, plan, [1.1, 1.0], since=turn) for each in series])
    held = {one.date: one.params["aggregate"] for one in plays if one.rule == "pooled" and one.symbol == "A"}
    first, *_, last = held.values()
    assert (first, last) == ("median", "mean")  # 300 bars later the confirmation windows are all of the other regime
    worse = next(one for one in plays if one.rule == "pooled" and one.promoted)
    assert worse.realised is not None
    assert worse.realised < 0


def test_a_configuration_that_clips_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    series = walk("A")
    plan = planned([series])
    found = history(series, plan, [1.05, 1.0])
    plan = replace(plan, rules={"guarded": Rule(min_improvement=0.01, on="confirmation", max_clipped=0.01)})
    assert any(one.promoted for one in replay.play(config(), plan, [found]))
    monkeypatch.setattr(History, "clipped", lambda history, place, end: 0.05 * place)
    assert {one.reason for one in replay.play(config(), plan, [found])} == {"clips the last close"}


def test_what_is_clipped_is_counted_before_the_date() -> None:
    """A price that leaves the range of its context clips from then on, and not before."""
    close = np.full(700, 100.0) + np.sin(np.arange(700))
    close[600:] = 200.0
    series = walk("A")
    jump = replace(series, bars=replace(series.bars, close=close))
    params = {"max_context": 128, "clip": 3.0}
    one = history(jump, planned([jump]), [1.0], model="kronos")
    one = replace(one, candidates=[Candidate(params=params, source="default")])
    assert one.clipped(0, 600) == 0
    share = one.clipped(0, 610)
    assert share is not None
    assert share > 0


# --- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(forecasters.load("naive", device="cpu"), cache_bytes=2**24)


def candidates() -> list[Candidate]:
    params = {"season": 1, "context_length": 64, "num_samples": 64}
    return [Candidate(params={**params, "aggregate": name}, source="grid") for name in ("mean", "median")]


def measured(evaluator: Evaluator, origins: range, folder: Path) -> History:
    about: dict[str, Any] = {"model": "naive", "checkpoint": evaluator.forecaster.fingerprint}
    found = history_errors.blocks(config(), walk("A"), origins, candidates(), folder=folder, **about)
    for block in found:
        if history_errors.read(block, candidates()) is None:
            history_errors.measure(evaluator, block, candidates())
    return history_errors.join(walk("A"), origins, candidates(), found, min_context=64, **about)


def test_errors_are_the_evaluators_and_the_same_for_other_dates(evaluator: Evaluator, tmp_path: Path) -> None:
    found = measured(evaluator, range(250, 420), tmp_path / "a")
    windows = recent_origins(walk("A").bars.slice(0, 420), 170, symbol="A")
    for place, candidate in enumerate(candidates()):
        expected = evaluator.measure(windows, candidate.params, passes=(1, 2)).errors
        np.testing.assert_allclose(found.fresh[place], expected, rtol=1e-12)
    other = measured(evaluator, range(300, 600), tmp_path / "b")
    np.testing.assert_array_equal(other.fresh[:, :120], found.fresh[:, 50:])
    np.testing.assert_array_equal(other.no_change[:120], found.no_change[50:])


def test_what_was_measured_is_not_measured_again(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(evaluator, range(250, 420), tmp_path)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])  # cut short, as by a full disk
    asked: list[int] = []
    measure = evaluator.measure

    def counted(windows: Windows, *args: Any, **options: Any) -> Any:
        asked.append(len(windows))
        return measure(windows, *args, **options)

    monkeypatch.setattr(evaluator, "measure", counted)
    again = measured(evaluator, range(250, 420), tmp_path)
    np.testing.assert_array_equal(again.fresh, first.fresh)
    assert len(asked) == 4  # two candidates of one block, with two kinds of seeds


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bars").mkdir()
    for seed, symbol in enumerate(("AAA", "BBB")):
        bars = walk(symbol, 330, seed=seed).bars
        times = [str(time)[:10] for time in bars.timestamps.astype("datetime64[D]")]
        rows = [
            f"{time},{close!r},{close!r},{close!r},{close!r},1"
            for time, close in zip(times, bars.close.tolist(), strict=True)
        ]
        (tmp_path / "bars" / f"{symbol}.csv").write_text("\n".join(["timestamp,open,high,low,close,volume", *rows, ""]))
    (tmp_path / "studies.toml").write_text(SETTINGS.format(folder=tmp_path))
    return tmp_path


SETTINGS = """
data.dir = "{folder}/bars"
promotion.results_dir = "{folder}/results"
hyperparams.dir = "{folder}/hyperparams"
search.models = ["naive"]
[windows]
confirmation = 60
[naive]
season = [1]
context_length = [64]
num_samples = [64]
aggregates = ["mean", "median"]
"""


def invoke(folder: Path, *words: str) -> Result:
    command = ["replay", "--config", str(folder / "studies.toml"), "--cpus", "1", *words]
    return CliRunner().invoke(cli.studies, command)


def test_a_replay_prints_what_each_rule_did_and_goes_on_where_it_was(folder: Path) -> None:
    result = invoke(folder, "--dates", "2", "--json", "--report", str(folder / "replay.html"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["rule"] for one in found["rules"]] == ["pooled", "confirmation", "validation"]
    assert [one["decisions"] for one in found["rules"]] == [4, 4, 4]
    assert set(found["rules"][0]) == {
        "rule", "decisions", "promoted", "worse", "realised", "a_decision", "a_decision_interval", "over_start",
        "over_start_interval", "over_default", "over_default_interval", "skill", "curve",
    }  # fmt: skip
    assert set(found["plays"][0]) == {
        "date", "symbol", "rule", "promoted", "reason", "model", "params", "improvement", "realised", "over_start",
        "over_default", "skill",
    }  # fmt: skip
    assert len(found["plays"]) == 12
    assert "Promotion rules replayed" in (folder / "replay.html").read_text()
    assert not (folder / "hyperparams").exists()
    again = invoke(folder, "--dates", "2", "--rule", "pooled", "--json")
    assert "blocks of windows were measured before" in again.stderr
    assert json.loads(again.stdout)["plays"] == [one for one in found["plays"] if one["rule"] == "pooled"]


def test_a_replay_may_begin_with_the_promoted_files(folder: Path) -> None:
    best = folder / "hyperparams" / "best"
    best.mkdir(parents=True)
    content = {
        "symbol": "AAA",
        "model": "naive",
        "config": {"season": 1, "context_length": 64, "num_samples": 64, "aggregate": "quantile_0.90"},
    }
    (best / "AAA.json").write_text(json.dumps(content))
    result = invoke(folder, "--dates", "2", "--rule", "pooled", "--start", "in-use", "--json")
    assert result.exit_code == 0, result.output
    first = {one["symbol"]: one for one in reversed(json.loads(result.stdout)["plays"])}
    assert first["AAA"]["promoted"]
    assert first["AAA"]["over_start"] not in (0, first["AAA"]["over_default"])
    assert first["BBB"]["over_start"] == first["BBB"]["over_default"]


def test_too_short_a_history_and_unknown_rules_are_one_line(folder: Path) -> None:
    short = invoke(folder, "--after", "200")
    assert short.exit_code == 1
    needed = "no symbol has the 408 bars that one date of a replay needs; add older bars"
    assert short.stderr.splitlines()[-1] == f"error: {needed}"
    unknown = invoke(folder, "--rule", "best")
    assert unknown.exit_code == 2
    assert "'best'; the rules are pooled, confirmation, validation" in unknown.stderr
