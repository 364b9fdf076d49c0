"""A search of two objectives, the error and what a strategy earns: studies of their own, shown, confirmed, promoted."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from browser import Tab
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from places import RunPlace, StudyPlace, last_bars
from served import served

from launch import cli
from launch.views import notes
from objectives.fills import book
from objectives.strategies import STRATEGIES, Forecasts, known_before
from objectives.windows import SeedKind
from storage import board, slots, study_rows
from storage.progress import study_progress
from studies import candidates, importance, retiring, returns, working
from studies import space as spaces
from studies import study as studying
from studies.chosen import TRIAL
from studies.config import ConfigError
from studies.findings import find
from studies.study import Study, StudyMismatch

Place = StudyPlace
INCUMBENT = {"num_samples": 64, "aggregate": "median"}


@pytest.fixture
def run_place(tmp_path: Path, database_url: str) -> Iterator[RunPlace]:
    found = RunPlace(tmp_path, database_url)
    yield found
    found.close()


def searched(place: Place, strategy: str, **more: Any) -> Study:
    """A study that searched the return of a strategy, confirmed."""
    study = place.open(objective_pnl=strategy, **more).study
    place.finish(study, objective_pnl=strategy, **more)
    return study


def dominated(one: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    """Whether some trial has a lower error and a higher return, or one of them with the other equal."""
    return any(
        other.values[0] <= one.values[0] and other.values[1] >= one.values[1] and other.values != one.values
        for other in trials
    )


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_of_returns_from_the_launch_to_the_promotion(run_place: RunPlace) -> None:
    place, words = run_place, ("--symbols", "SP500", "--trials", "16", "--objective-pnl", "maxdiff")
    stopped = place.launch(*words)
    place.wait_for_trials(1)
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=60)
    (progress,) = study_progress(place.storage).values()
    assert 1 <= progress.done < 16

    ended = place.run("launch-workers", "--cpus", "2", "--plain", *words)
    assert "studies: 1 resumed" in ended.stderr
    place.assert_exact(16, "SP500")
    trials = place.trials("SP500")
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == 16  # none is pruned
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    (study,) = studying.list_studies(place.storage)
    assert study.name.endswith("+maxdiff")

    shown = json.loads(place.invoke(cli.studies, "show", study.name, "--json").stdout)
    front = {one["trial"]: (one["mae"], one["return"]) for one in shown["front"]}
    by_number = {trial.number: trial for trial in complete}
    assert all((mae, earned) == tuple(by_number[number].values) for number, (mae, earned) in front.items())
    best = {tuple(trial.values) for trial in complete if not dominated(trial, complete)}
    assert set(front.values()) == best
    assert shown["best_mae"] == min(trial.values[0] for trial in complete)
    assert min(shown["importances"].values()) >= 0  # of the MAE
    text = place.invoke(cli.studies, "show", study.name).stdout
    assert "Pareto front of MAE and net return of maxdiff" in text
    assert all(f"{1e4 * earned:+.1f}" in text for _, earned in best)
    listed = place.invoke(cli.studies, "list").stdout
    assert f"{100 * shown['best_mae']:.4f} %" in listed

    without = place.invoke(cli.promote)
    assert without.exit_code == 1
    assert "no study yet" in without.stderr
    (row,) = place.promote("--objective-pnl", "maxdiff")
    confirmed = [one["confirmation"]["mae"] for one in shown["confirmation"]["candidates"] if one["confirmation"]]
    assert (row["decision"], row["study"], row["best_mae"]) == ("promoted", study.name, min(confirmed))
    assert place.promoted_file("SP500").exists()


# --- one study beside another ---------------------------------------------------------------------------------


def test_it_stands_beside_the_plain_study_and_has_its_errors(place: Place) -> None:
    place.put("best", INCUMBENT)
    plain = place.open().study
    place.finish(plain)
    before = place.trials(plain), place.result(plain)
    study = searched(place, "maxdiff")
    assert (study.name, study.pnl, plain.pnl) == (f"{plain.name}+maxdiff", "maxdiff", "")
    assert (place.trials(plain), place.result(plain)) == before
    assert place.open().state == place.open(objective_pnl="maxdiff").state == "finished"
    assert {one.name for one in studying.list_studies(place.storage)} == {plain.name, study.name}
    for pnl, asked in (("", plain), ("maxdiff", study)):
        (found,) = find(place.storage, "close", pnl=pnl)["SP500"]
        assert found.study == asked

    loaded = optuna.load_study(study_name=study.name, storage=place.storage)
    assert loaded.directions == [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
    assert loaded.metric_names == ["pct_return_mae", "maxdiff_return_a_bar"]
    maes = {
        tuple(sorted(one.params.items())): one.values[0]
        for one in place.trials(plain).values()
        if one.state == TrialState.COMPLETE
    }
    shared = 0
    for one in place.trials(study).values():
        if (mae := maes.get(tuple(sorted(one.params.items())))) is not None:
            assert one.values[0] == mae  # to the last bit
            shared += 1
    assert shared

    named = TRIAL.fullmatch(f"{study.name}#3")
    assert named
    assert (named["study"], named["trial"]) == (study.name, "3")
    aside = retiring.retire(place.storage, study.name)
    assert place.open(objective_pnl="maxdiff").state == "new"
    assert place.open().state == "finished"
    assert {one.name for one in studying.list_studies(place.storage, retired=True)} == {aside}


@pytest.mark.parametrize("strategy", ["simple", "highlow"])
def test_a_return_is_that_of_the_trial_s_own_forecasts(place: Place, strategy: str) -> None:
    study = place.open(objective_pnl=strategy, trials=2).study
    place.finish(study, objective_pnl=strategy, trials=2)
    run = place.run(study, objective_pnl=strategy)
    windows, bars = run.split.validation, place.series().bars
    first, count = windows.origins[0], len(windows)
    assert windows.origins == tuple(range(first, first + count))
    asset = place.config().backtest.asset_class("SP500", bars.timestamps)
    for trial in place.trials(study).values():
        params = run.space.complete(trial.params)

        keys = ("close", "high", "low") if strategy == "highlow" else ("close",)
        points = np.stack(
            [place.evaluator().forecast(windows.of_key(key), params, kind=SeedKind.STUDY)[:, 0] for key in keys]
        )
        ends = {"high": points.max(axis=0), "low": points.min(axis=0)} if strategy == "highlow" else {}  # as served
        made = Forecasts(close=points[0], **ends)
        orders = STRATEGIES[strategy].orders(known_before(bars, first, made), shorts=True)
        assert trial.values[1] == book(orders, bars.slice(first, first + count), asset).returns.mean()
        assert trial.values[1] != 0


def test_its_candidates_are_the_lowest_errors_and_the_front(place: Place) -> None:
    study = searched(place, "simple", trials=12)
    complete = list(place.trials(study).values())
    trials = [one for one in place.result(study)["candidates"] if one["source"] != "grid"]
    numbers = {one["trial"] for one in trials}
    ranked = sorted(complete, key=lambda one: (one.values[0], one.number))
    params = {tuple(sorted(one.params.items())): one.number for one in reversed(ranked)}
    assert numbers >= set(list(dict.fromkeys(params[tuple(sorted(one.params.items()))] for one in ranked))[:5])
    front = [one for one in complete if not dominated(one, complete)]
    assert numbers >= {params[tuple(sorted(one.params.items()))] for one in front}
    assert study_rows.best_values(place.storage)[study.study_id] == ranked[0].values[0]
    best = study_rows.best_trials(place.storage, study.study_id, 5)
    assert [one.number for one in best] == [one.number for one in ranked[:5]]
    assert board.trial_values(place.storage, study.study_id) == {one.number: one.values[0] for one in complete}


def test_what_the_front_names_is_confirmed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    worst: list[int] = []

    def front(study: optuna.Study) -> list[FrozenTrial]:
        last = max(study.get_trials(), key=lambda one: (one.values[0], -one.number))
        worst.append(last.number)
        return [last]

    monkeypatch.setattr(candidates, "TRIALS", 1)
    monkeypatch.setattr(returns, "front", front)
    study = searched(place, "simple", trials=12)
    found = {one["trial"] for one in place.result(study)["candidates"] if one["source"] != "grid"}
    assert set(worst) <= found


def test_importance_is_that_of_the_error(place: Place) -> None:
    study = place.open(objective_pnl="simple", trials=20).study
    run, evaluator = place.run(study, objective_pnl="simple"), place.evaluator()
    clock = working.StageClock(place.storage, [evaluator])
    for _ in range(20):
        slot = slots.claim(place.storage, study.study_id, worker="host:1", lease_s=60)
        assert slot is not None
        working.work(place.storage, run, slot, evaluator, attrs={"worker": "host:1"}, clock=clock)
    shares, missing = importance.importances(place.storage, study.name)
    assert missing is None
    plain = optuna.create_study()
    plain.add_trials(
        create_trial(value=one.values[0], params=one.params, distributions=one.distributions)
        for one in place.trials(study).values()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        assert shares == get_param_importances(plain, evaluator=evaluator)


def test_a_front_adds_those_that_earn_the_most(place: Place) -> None:
    space = spaces.make("kronos", place.config())
    default = spaces.default(space, place.config())
    asked = [{**default, "temperature": 0.05 + 0.01 * n} for n in range(30)]
    chosen = candidates.choose(space, list(enumerate(asked)), default, front=asked[:20:-1])
    found = [one.trial for one in chosen if one.source == "trial"]
    assert found[-5:] == [29, 28, 27, 26, 25]
    assert 0 in found
    assert candidates.most_encodings(space, in_use=0, front=True) == candidates.most_encodings(space, in_use=0) + 5


# --- what is refused ------------------------------------------------------------------------------------------


def test_what_cannot_be_traded_is_refused_in_one_line(place: Place) -> None:
    def refused(*words: str, table: str = "[search]", setting: str = "", code: int = 1) -> str:
        before = place.settings.read_text()
        place.settings.write_text(before.replace(table, f"{table}\n{setting}"))
        ended = place.invoke(cli.launch_workers, "--cpus", "1", *words)
        place.settings.write_text(before)
        assert ended.exit_code == code, ended.output
        return ended.stderr.splitlines()[-1]

    for nothing in ("martingale", "buy_hold"):
        assert f"{nothing!r} is not one of 'simple'" in refused("--objective-pnl", nothing, code=2)
    unknown = refused(setting='objective_pnl = "martingale"')
    assert "[search] objective_pnl = 'martingale': must be empty, or one of simple, all_signals" in unknown
    ahead = refused("--objective-pnl", "simple", table="[windows]", setting="horizon = 2")
    assert ahead.endswith("[windows] horizon 2: simple trades bar by bar; set it to 1 to search returns")
    quantiles = ("--objective-pnl", "ci_guard", "--objective", "exact", "--models", "kronos")
    assert "ci_guard needs quantiles, and the exact answer of kronos is a mean alone" in refused(*quantiles)

    header, *lines = last_bars("SP500", 400)
    cells = lines[-25].split(",")
    place.write("SP500.csv", [header, *lines[:-25], ",".join([*cells[:2], "1", *cells[3:]]), *lines[-24:]])
    assert "high 1 is below low" in refused("--objective-pnl", "simple")
    kept = [",".join(line.split(",")[n] for n in (0, 4)) for line in lines]
    place.write("SP500.csv", ["timestamp,close", *kept])
    assert "SP500.csv: SP500: maxdiff needs open, high, low, which the bars lack" in refused(
        "--objective-pnl", "maxdiff"
    )
    assert studying.list_studies(place.storage) == []


def test_other_costs_are_another_question(place: Place) -> None:
    study = place.open(objective_pnl="simple").study
    config = place.config(objective_pnl="simple")
    dearer = replace(config, backtest=replace(config.backtest, equity_market_fee=0.01))
    checkpoints = {"toto": place.forecaster.fingerprint}
    with pytest.raises(StudyMismatch, match=r"what trading costs, \[backtest\], is not what it was opened with"):
        studying.open_studies(place.storage, dearer, [place.series()], ["toto"], checkpoints)
    with pytest.raises(ConfigError, match="launch-workers --symbols SP500 --objective-pnl simple"):
        studying.reconfirm(place.storage, config, place.series(), study, place.forecaster.fingerprint)


# --- what is shown --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_front_in_a_browser(place: Place, folder: Path, tab: Tab) -> None:
    study = searched(place, "simple", trials=24)
    notes.update(place.storage, folder, [study])
    with served(place, folder) as address:
        page = f"{address}/dashboard/studies/{study.study_id}"
        tab.open(page, "Pareto Front")
        for metric in ("pct_return_mae", "simple_return_a_bar"):
            tab.page.get_by_text(metric).first.wait_for()
        tab.page.get_by_text("Forecast vs. actual").first.wait_for()
        drawn = tab.page.locator("[id*='pareto'] .scatterlayer .trace")
        drawn.first.wait_for(state="attached")
        tab.check()
        tab.open(f"{page}/note", "Pareto front of MAE and net return of simple")
        tab.page.get_by_text("promote --symbols SP500 --objective-pnl simple").wait_for()
        tab.check()


def test_a_worker_that_dies_leaves_its_trial_to_another(place: Place) -> None:
    """As of any study: its slot is claimed again, and a trial has two values or none."""
    study = place.open(objective_pnl="simple", trials=2).study
    slot = slots.claim(place.storage, study.study_id, worker="host:1", lease_s=60)
    assert slot is not None
    slots.expire(place.storage, "host:1")
    assert slots.reap(place.storage, [study.study_id], lease_s=60) == 1
    place.finish(study, objective_pnl="simple", trials=2)
    assert [len(trial.values) for trial in place.trials(study).values()] == [2, 2]
