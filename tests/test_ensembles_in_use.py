"""Ensembles in use: confirmed by real models, forecast, compared and traded on as one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from forecast_places import ALL_KEYS, NAIVE, TOTO
from forecast_places import Place as ForecastPlace
from places import StudyPlace, last_bars, tiny_toto

import forecasters
from forecasters import Forecaster
from launch import cli
from launch.serving import models_in_use
from objectives.evaluation import Evaluator
from objectives.windows import Windows
from storage import slots
from studies import study as studying
from studies import working
from studies.evidence import Part, from_json
from studies.study import Study

MEMBERS = {
    "members": [{"model": "naive", "config": NAIVE, "weight": 0.75}, {"model": "toto", "config": TOTO, "weight": 0.25}]
}


@cache
def loaded(model: str) -> Forecaster:
    return tiny_toto() if model == "toto" else forecasters.load(model, device="cpu")


class TwoModels(StudyPlace):
    """Studies of one symbol and two models, worked in this process."""

    SETTINGS = StudyPlace.SETTINGS.replace(
        "[search]", '[naive]\naggregates = ["mean", "median"]\ncontext_length = 256\nnum_samples = [64, 128]\n[search]'
    )
    TRIALS: ClassVar[int] = 3

    def both(self) -> dict[str, Study]:
        checkpoints = {model: loaded(model).fingerprint for model in ("naive", "toto")}
        opened = studying.open_studies(self.storage, self.config(), [self.series()], list(checkpoints), checkpoints)
        return {one.study.model: one.study for one in opened}

    def started(self, study: Study) -> studying.StudyRun:
        fingerprint = loaded(study.model).fingerprint
        return studying.start(self.storage, self.config(), study, self.series(), fingerprint)

    def evaluator_of(self, model: str) -> Evaluator:
        return Evaluator(loaded(model), cache_bytes=1 << 26, max_num_samples=128)

    def work(self, study: Study) -> None:
        run, evaluator = self.started(study), self.evaluator_of(study.model)
        clock = working.StageClock(self.storage, [evaluator])
        while slot := slots.claim(self.storage, study.study_id, worker="host:1", lease_s=60):
            working.work(self.storage, run, slot, evaluator, attrs={"worker": "host:1", "device": "cpu"}, clock=clock)

    def promote(self, *words: str) -> dict[str, Any]:
        ended = self.invoke(cli.promote, "--json", "--models", "naive,toto", *words)
        assert ended.exit_code == 0, ended.output
        (row,) = json.loads(ended.stdout)
        return row


@pytest.fixture
def place(tmp_path: Any, database_url: str) -> Any:
    found = TwoModels(tmp_path, database_url)
    yield found
    found.close()


@pytest.fixture
def served(tmp_path: Any, database_url: str) -> Any:
    found = ForecastPlace(tmp_path, database_url)
    yield found
    found.close()


def test_from_confirmations_to_an_ensemble_that_is_confirmed_as_the_incumbent(place: TwoModels) -> None:
    """Its members' points are those of the pass that their errors are of, and are kept again when it is in use."""
    studies = place.both()
    for study in studies.values():
        place.work(study)
    for model, study in studies.items():
        evidence, run = from_json(model, place.result(study)), place.started(study)
        (kept,) = [one for one in evidence.candidates if one.points]
        halves = {
            one.confirmation.errors[:30] and sum(one.confirmation.errors[:30])
            for one in evidence.candidates
            if one.confirmation
        }
        assert kept.confirmation is not None
        assert sum(kept.confirmation.errors[:30]) == min(halves)
        asked: dict[Part, Windows] = {"confirmation": run.confirmation, "test": run.split.test}
        for part, windows in asked.items():
            alone = place.evaluator_of(model).measure(windows, kept.params, passes=(1,))
            errors = np.abs(np.array(kept.points[part]) - np.array(evidence.came[part].returns))
            assert errors == pytest.approx(np.array(alone.errors), rel=1e-4, abs=1e-8)

    row = place.promote("--ensemble", "--force", "--on", "confirmation")
    assert (row["decision"], row["model"]) == ("promoted", "ensemble")
    assert row["windows"] == 30
    said = json.loads(place.promoted_file("SP500").read_text())
    members = {one["model"]: one for one in said["config"]["members"]}
    assert set(members) == {"naive", "toto"}

    for study in studies.values():
        checkpoint = loaded(study.model).fingerprint
        studying.reconfirm(place.storage, place.config(), place.series(), study, checkpoint)
        place.work(study)
        (found,) = [
            one for label, one in from_json(study.model, place.result(study)).in_use.items() if label == "member"
        ]
        assert found.params["aggregate"] == members[study.model]["config"]["aggregate"]
        assert found.points
    again = place.promote("--ensemble", "--on", "confirmation", "--min-improvement", "0.9")
    assert (again["decision"], again["reason"], again["incumbent_model"]) == ("kept", "unchanged", "ensemble")
    plain = place.promote("--dry-run", "--on", "confirmation")
    assert plain["incumbent_model"] == "ensemble"
    assert plain["incumbent_mae"] is not None


def alone(served: ForecastPlace, model: str, config: Mapping[str, Any], **options: Any) -> Any:
    served.put_promoted("SP500", config, model=model)
    return served.open().ask(["SP500"], **options).forecasts["SP500"]


def test_an_ensemble_is_served_as_the_mean_of_what_its_members_would_have_been(served: ForecastPlace) -> None:
    options = {"horizon": 2, "keys": ALL_KEYS}
    naive, toto = (alone(served, model, config, **options) for model, config in (("naive", NAIVE), ("toto", TOTO)))
    path = served.put_promoted("SP500", MEMBERS, model="ensemble")
    forecasts = served.open()
    found = forecasts.ask(["SP500"], **options).forecasts["SP500"]
    assert found.model == "ensemble"
    assert found.cached == "computed"
    for name in ("points", "q10", "q50", "q90"):
        for key in ("open", "close"):
            one, other = (getattr(each.keys[key], name) for each in (naive, toto))
            mean = 0.75 * np.array(one) + 0.25 * np.array(other)
            assert getattr(found.keys[key], name) == pytest.approx(mean, rel=1e-12)
    high, low, close = (np.array(found.keys[key].points) for key in ("high", "low", "close"))
    assert np.all((low <= close) & (close <= high))
    assert forecasts.ask(["SP500"], **options).forecasts["SP500"].cached == "memory"
    assert served.open().ask(["SP500"], **options).forecasts["SP500"].cached == "stored"
    assert models_in_use(forecasts.config) == {"naive", "toto"}

    path.write_text(path.read_text().replace("0.75", "0.7").replace("0.25", "0.3"))  # other weights, another forecast
    assert served.open().ask(["SP500"], **options).forecasts["SP500"].digest != found.digest
    path.write_text(path.read_text().replace('"toto"', '"unheard_of"'))
    refused = served.open().ask(["SP500"], **options).refused["SP500"]
    assert str(path) in refused
    assert "'unheard_of'" in refused


def test_an_ensemble_is_compared_and_traded_on_as_one_configuration(served: ForecastPlace) -> None:
    path = served.put_promoted("SP500", MEMBERS, model="ensemble")
    served.write("SP500.csv", last_bars("SP500", 400))
    naive, toto = (
        served.put_promoted("SP500", config, model=model, folder=model)
        for model, config in (("naive", NAIVE), ("toto", TOTO))
    )
    words = ("--symbols", "SP500", "--models", "naive,toto", "--cpus", "1", "--json")
    ended = served.invoke(
        cli.studies, "compare", "--params", f"best,{naive},{toto}", "--horizon", "1", "--windows", "60", *words
    )
    assert ended.exit_code == 0, ended.output
    rows = {row["label"]: row for row in json.loads(ended.stdout)["rows"]}
    assert rows["ensemble best"]["model"] == "ensemble"
    assert [one["weight"] for one in rows["ensemble best"]["params"]["members"]] == [0.75, 0.25]
    maes = [rows[f"{model} SP500.json"]["mae"] for model in ("naive", "toto")]
    assert rows["ensemble best"]["mae"] < 0.75 * maes[0] + 0.25 * maes[1]  # the mean's error is below the errors' mean

    small = ("--strategies", "simple", "--bars", "40")
    ended = served.invoke(cli.studies, "backtest", "--params", "best", *small, *words)
    assert ended.exit_code == 0, ended.output
    assert {row["model"] for row in json.loads(ended.stdout)["rows"] if row["strategy"] == "simple"} == {"ensemble"}

    ended = served.invoke(
        cli.studies, "compare", "--params", "best", "--models", "toto", "--symbols", "SP500", "--horizon", "1"
    )
    assert ended.exit_code == 1, ended.output
    assert f"{path}: left out: is an ensemble with the model 'naive', and asked for are toto" in ended.stderr
