"""The confirmation of a study: what it measures, how often, and when it is asked for anew."""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from places import FOLDERS
from places import StudyPlace as Place

from forecasters import ForecastError
from launch import cli
from objectives import windows
from objectives.bars import timestamp_text
from objectives.evaluation import Evaluator
from storage import slots
from storage.progress import worker_seconds
from studies import confirmation, evaluators, importance, working
from studies import study as studying
from studies.candidates import NEIGHBOURHOOD, distance
from studies.evidence import from_json

TRIALS = Place.TRIALS


def errors_of(measured: Mapping[str, Any]) -> np.ndarray:
    """By window, as JSON has them."""
    return np.frombuffer(base64.b64decode(measured["errors"]), "<f4")


def test_the_batch_of_a_forward_belongs_to_a_definition_where_it_is_not_the_rung(place: Place) -> None:
    study = place.open().study
    assert study.definition["windows"]["batch"] == 30
    place.run(study, batch=30)
    for batch in (5, 10):
        with pytest.raises(studying.StudyMismatch, match=r"\[search\] rung or batch differ"):
            place.run(study, batch=batch)
    other = studying.define(place.config(batch=5), place.series(), "toto", study.as_of, "checkpoint")
    assert other["windows"] == {**study.definition["windows"], "batch": 5}
    rung = studying.define(place.config(batch=10), place.series(), "toto", study.as_of, "checkpoint")
    assert "batch" not in rung["windows"]  # as in definitions that were written before there was one


def test_the_best_five_and_what_is_in_use_on_more_windows(place: Place) -> None:
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90", "samples_per_batch": 16})
    place.put("toto", {"num_samples": 100, "aggregate": "lower_trimmed_mean_20"})
    study = place.open().study
    result = place.finish(study)
    assert set(result["baselines"]) == {"incumbent", "stored"}
    assert result["baselines"]["incumbent"]["params"]["aggregate"] == "quantile_0.90"

    trials = place.trials(study)
    best: dict[str, int] = {}  # the first of each configuration
    for trial in sorted(trials.values(), key=lambda trial: (trial.state, trial.values, trial.number)):
        if trial.state == TrialState.COMPLETE:
            best.setdefault(json.dumps(trial.params, sort_keys=True), trial.number)
    searched = [one for one in result["candidates"] if one.get("trial") in list(best.values())[:5]]
    assert [one["trial"] for one in searched] == list(best.values())[:5]
    assert searched == result["candidates"][: len(searched)]
    run, evaluator = place.run(study), place.evaluator()
    assert result["windows"]["confirmation"]["count"] == 60
    assert run.confirmation.origins[-30:] == run.split.validation.origins  # the thirty are among them
    assert run.confirmation.origins[-1] < run.split.test.origins[0]
    passes = range(1, 1 + result["passes"])
    for one in (*result["candidates"], *result["baselines"].values()):
        counts = {"validation": 30, "confirmation": 60, "test": 20}
        for part, count in counts.items():
            assert len(errors_of(one[part])) == count
            assert one[part]["mae"] == pytest.approx(np.mean(errors_of(one[part])), rel=1e-6)
        anew = evaluator.measure(run.confirmation, one["params"], passes=passes)
        assert one["confirmation"]["mae"] == anew.mae  # to the last bit
        assert one["test"]["mae"] == evaluator.measure(run.split.test, one["params"], passes=passes).mae
    for one in searched:
        assert one["validation"]["mae"] == trials[one["trial"]].value  # the search's own number
        assert not np.array_equal(errors_of(one["confirmation"])[-30:], errors_of(one["validation"]))  # fresh seeds
    measured = from_json("toto", result).candidates[0].confirmation
    anew = evaluator.measure(run.confirmation, result["candidates"][0]["params"], passes=passes)
    assert measured is not None
    for name in ("mae", "no_change_mae", "skill", "windows"):
        assert getattr(measured, name) == getattr(anew, name)
    for name in ("price_mae", "mae_percent", "sampling_error", "errors"):
        assert getattr(measured, name) == pytest.approx(getattr(anew, name), rel=1e-6)


@pytest.mark.parametrize("horizon", [1, 7])
def test_forecasts_are_kept_for_those_who_look(place: Place, horizon: int) -> None:
    settings = place.folder / "studies.toml"
    settings.write_text(settings.read_text().replace("[windows]", f"[windows]\nhorizon = {horizon}"))
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    study = place.open().study
    result = place.finish(study)
    run, bars = place.run(study), place.series().bars
    best = min(result["candidates"], key=lambda one: one["confirmation"]["mae"])
    for name, found in (("validation", run.split.validation), ("test", run.split.test)):
        shown = result["forecasts"][name]
        count = len(found) if horizon == 1 else (len(found) + 6) // 7 * 7
        end = found.origins[-1] + horizon
        assert shown["actual"] == bars.close[end - count : end].tolist()  # one stretch, each bar once
        assert shown["times"] == [timestamp_text(time) for time in bars.timestamps[end - count : end]]
        assert shown["starts"] == list(range(0, count, horizon))
        assert set(shown["series"]) == {"best", "incumbent"}
        for series in shown["series"].values():
            assert np.all(np.array(series["low"]) <= np.array(series["high"]))
        assert shown["series"]["best"].get("trial") == best.get("trial")
        assert len(shown["series"]["best"]["points"]) == count
    if horizon == 1:  # every window is shown: the points are those that the errors came from
        last = run.split.validation.last_closes
        shown = result["forecasts"]["validation"]
        errors = np.abs(np.array(shown["series"]["best"]["points"]) - np.array(shown["actual"])) / last
        assert errors == pytest.approx(errors_of(best["validation"]), rel=1e-6)


def test_every_second_of_a_worker_is_accounted_for(place: Place) -> None:
    study = place.open().study
    began = time.perf_counter()
    place.finish(study)
    took = time.perf_counter() - began
    spent = worker_seconds(place.storage)[study.study_id]
    assert set(spent) == {"encode", "draw", "aggregate", "sample", "read", "storage", "idle", "other"}
    assert min(spent.values()) >= 0
    assert min(spent[name] for name in ("encode", "draw", "aggregate", "sample", "storage")) > 0
    assert (spent["idle"], spent["read"]) == (0, 0)  # its bars were read before
    # What opening the study took is outside; the rest is all there.
    assert 0.5 * took < sum(spent.values()) < took


def test_repeats_bring_the_sampling_error_below_a_tenth_of_the_threshold(place: Place) -> None:
    study = place.open().study
    place.finish(study)
    run, evaluator = place.run(study), place.evaluator()
    few = confirmation.confirm(replace(run, tolerance=0.5), evaluator, {})
    most = confirmation.confirm(replace(run, tolerance=1e-9), evaluator, {})
    wanted = most.sampling_error * np.sqrt(4 / 3.5)  # reached with a little less than four passes
    enough = confirmation.confirm(replace(run, max_passes=50, tolerance=wanted), evaluator, {})
    assert (few.passes, most.passes) == (2, 4)
    assert 2 < enough.passes < 8
    assert enough.sampling_error <= 1.3 * wanted  # planned from what two passes showed
    assert few.sampling_error > most.sampling_error > 0


def test_the_exact_objective_needs_one_pass(place: Place) -> None:
    study = place.open(objective="exact").study
    result = place.finish(study, objective="exact")
    assert (result["passes"], result["sampling_error"]) == (1, 0.0)


def test_equal_configurations_are_confirmed_once(place: Place) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "median"})  # starts the search as its first trial
    study = place.open().study
    run = place.run(study)
    place.finish(study)
    repeated = {"aggregate": "median", "num_samples": 64}
    for number in (91, 92):
        place.storage.transaction(
            lambda c, n=number: slots.add(c, study.study_id, slots.TRIAL, n, label="again", params=repeated)
        )
    place.finish(study)
    chosen = [params for _, params in confirmation.complete_trials(run)]
    assert len(chosen) == len({json.dumps(params, sort_keys=True) for params in chosen})


def test_a_short_history_confirms_on_fewer_windows_and_says_so(place: Place) -> None:
    path = place.folder / "bars" / "SP500.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[-190:], ""]))
    opened = place.open()
    assert [note for note in opened.notes if "42 windows" in note and "60" in note]  # 190 - 128 - 20
    assert place.finish(opened.study)["windows"]["confirmation"]["count"] == 42


class Failing(Evaluator):
    """Cannot measure one aggregate on more windows than the search has."""

    def batch_errors(self, windows: windows.Windows, params: Mapping[str, Any], *words: Any, **options: Any) -> Any:
        if params["aggregate"] == "quantile_0.90" and len(windows) == 60:
            raise ForecastError("SP500: the forecast for 2018-01-02 is NaN or infinite")
        return super().batch_errors(windows, params, *words, **options)


def test_what_is_in_use_and_cannot_be_measured_says_why(place: Place) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "quantile_0.90"})
    study = place.open().study
    result = place.finish(study, Failing(place.forecaster, cache_bytes=1 << 26, max_num_samples=128))
    assert "NaN" in result["baselines"]["incumbent"]["error"]
    assert len(result["candidates"]) > 1
    rows = json.loads(place.invoke(cli.promote, "--json").stdout)
    assert (rows[0]["decision"], rows[0]["reason"]) == ("kept", "not comparable")


def test_a_study_without_confirmation_is_kept_with_the_command_that_makes_it(place: Place) -> None:
    study = place.open().study
    first = place.invoke(cli.promote, "--json", "--force")
    row = json.loads(first.stdout)[0]
    assert (row["decision"], row["reason"]) == ("kept", "not confirmed")
    assert row["next"] == place.suggested("launch-workers --symbols SP500 --models toto")
    assert row["next"] in first.stderr
    place.finish(study)
    place.storage.transaction(lambda c: slots.reopen(c, study.study_id, slots.CONFIRMATION, params={}))
    slots.park_study(place.storage, study.study_id, "no memory")
    confirm = place.suggested(f"studies confirm {study.name}")
    assert json.loads(place.invoke(cli.promote, "--json").stdout)[0]["next"] == confirm
    assert not (place.folder / "hyperparams").exists()


def test_studies_confirm_measures_what_is_in_use_now(place: Place) -> None:
    study = place.open().study
    assert place.invoke(cli.studies, "confirm", study.name).exit_code == 1  # it has trials left
    assert place.invoke(cli.studies, "confirm", "NONE/toto@2020-01-01").exit_code == 1
    place.finish(study)
    assert "incumbent" not in place.result(study)["baselines"]
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    stale = json.loads(place.invoke(cli.promote, "--json").stdout)[0]
    assert (stale["reason"], stale["next"]) == ("stale", place.suggested(f"studies confirm {study.name}"))
    done = place.invoke(cli.studies, "confirm", study.name, "--cpus", "1")
    assert done.exit_code == 0, done.output
    assert place.result(study)["baselines"]["incumbent"]["params"]["num_samples"] == 48
    row = json.loads(place.invoke(cli.promote, "--json").stdout)[0]
    assert (row["decision"], row["reason"], row["windows"]) == ("promoted", "improved", 60)


def test_launch_workers_confirms_anew_only_what_is_out_of_date(place: Place) -> None:
    study = place.open().study
    place.finish(study)
    assert place.open().state == "finished"
    assert place.invoke(cli.promote).exit_code == 0
    assert place.open().state == "finished"  # the incumbent is now one of the confirmed
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    assert place.open().state == "resumed"
    place.finish(study)
    assert place.open().state == "finished"
    settings = place.folder / "studies.toml"
    settings.write_text(settings.read_text().replace("confirmation = 60", "confirmation = 50"))
    assert place.open().state == "resumed"
    assert place.finish(study)["windows"]["confirmation"]["count"] == 50
    # A machine that has no promoted files leaves what others found in use in the comparison.
    (place.folder / "hyperparams").rename(place.folder / "elsewhere")
    assert place.open().state == "finished"
    place.storage.transaction(lambda c: slots.raise_budget(c, study.study_id, TRIALS + 1))
    place.open()
    assert "incumbent" in place.finish(study)["baselines"]


# ---- what is confirmed -----------------------------------------------------------------------------------------------


def test_the_whole_grid_and_the_default_are_confirmed(place: Place) -> None:
    place.put("best", {"num_samples": 48, "aggregate": "quantile_0.90"})
    study = place.open().study
    evidence = from_json("toto", place.finish(study))
    aggregates = place.config().models["toto"].aggregates
    most = [one.params["aggregate"] for one in evidence.candidates if one.params["num_samples"] == 128]
    assert sorted(most) == sorted(aggregates)
    trials = place.trials(study)
    for one in evidence.candidates:
        assert one.error is None
        assert one.clipped is None
        if one.trial is not None:
            assert trials[one.trial].params == {name: one.params[name] for name in ("aggregate", "num_samples")}
    (default,) = (one for one in evidence.candidates if one.source == "default")
    assert default.params == {"aggregate": "median", "num_samples": 128, "context_length": 256}
    best = [number for number, _ in confirmation.complete_trials(place.run(study))[:5]]
    for one in evidence.candidates:
        assert one.source == ("default" if one is default else "trial" if one.trial in best else "grid")
    assert (evidence.in_use["incumbent"].source, evidence.in_use["incumbent"].params["num_samples"]) == ("in use", 48)
    found, missing = importance.importances(place.storage, study.name)
    assert (found, missing) == ({"aggregate": pytest.approx(1), "num_samples": 0.0}, None)


def test_the_default_is_confirmed_without_any_trial(place: Place) -> None:
    run = place.run(place.open().study)
    evidence = confirmation.confirm(run, place.evaluator(), {})
    assert [one.source for one in evidence.candidates] == ["default"]
    assert evidence.candidates[0].confirmation is not None
    assert confirmation.summary(evidence).startswith("default, best of 1, mae=")


KRONOS_SETTINGS = """
[windows]
validation = 10
test = 5
confirmation = 30
max_passes = 2
[search]
models = ["kronos"]
[kronos]
checkpoint = "kronos-tiny"
max_context = [64, 128]
sample_count = [8, 16]
clip = [1.0, 5.0]
"""


def test_what_needs_encodings_of_its_own_is_confirmed_sparingly(place: Place) -> None:
    place.settings.write_text(FOLDERS + KRONOS_SETTINGS)
    config = place.config(trials=8, prune_worst=0.0)
    forecaster = evaluators.load_forecaster(config, "kronos", device="cpu")
    checkpoint = forecaster.fingerprint
    in_use = {"temperature": 0.4, "top_p": 1.0, "top_k": 12, "sample_count": 8, "max_context": 64, "clip": 1.0}
    place.put("best", in_use, model="kronos")
    (opened,) = studying.open_studies(place.storage, config, [place.series()], ["kronos"], {"kronos": checkpoint})
    run = studying.start(place.storage, config, opened.study, place.series(), checkpoint)
    evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=1 << 28)
    clock = working.StageClock(place.storage, [evaluator])
    attrs = {"worker": "host:1", "device": "cpu"}
    for _ in range(9):  # the baseline and the trials
        slot = slots.claim(place.storage, run.study.study_id, worker="host:1", lease_s=60)
        assert slot is not None
        working.work(place.storage, run, slot, evaluator, attrs=attrs, clock=clock)
    for trial in place.trials(opened.study).values():
        params = run.space.complete(trial.params)
        assert trial.user_attrs["clipped"] == run.clipped(params)
        assert trial.user_attrs["clipped"] > 0.2 or params["clip"] >= 1.2

    trials = confirmation.complete_trials(run)
    others = [{**trials[0][1], "sample_count": 12}, {**run.default, "clip": 3.0}]
    evidence = confirmation.confirm(run, evaluator, {"incumbent": in_use}, portfolio=others)
    assert [one.params for one in evidence.candidates if one.source == "portfolio"] == others[1:]
    searched = [one for one in evidence.candidates if one.source == "trial"]
    assert searched[0].params == trials[0][1]
    assert len(searched) <= 5
    assert all(
        distance(run.space, one.params, other.params) >= NEIGHBOURHOOD
        for one, other in itertools.combinations(evidence.candidates, 2)
    )
    default = evidence.candidates[-1]
    assert (default.source, default.params["clip"], default.clipped) == ("default", 5.0, run.clipped(run.default))
    everyone = [*evidence.candidates, *evidence.in_use.values()]
    assert all(one.clipped == run.clipped(one.params) and one.confirmation is not None for one in everyone)
    encodings = len({(one.params["max_context"], one.params["clip"]) for one in everyone})
    configurations = len({json.dumps(one.params, sort_keys=True) for one in everyone})
    begun = confirmation.begin(run, evaluator, {"incumbent": in_use}, portfolio=others)
    assert str(begun.measuring.cost) == (
        f"{configurations} configurations on 45 windows: 45 x {encodings} = {45 * encodings} encodings, "
        "each drawn from in up to 2 passes"
    )
    assert begun.portfolio == others[1:]
