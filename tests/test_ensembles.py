"""Ensembles: their weights, when one is promoted, what its file says, and what reads it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evidence_builder import evidence, of_errors
from promotion_place import COUNTS, KRONOS, NEW, OLD, PromotionPlace
from rich.console import Console

from launch.views import decisions
from launch.views.tables import terminal
from storage import configs
from studies import config as configuration
from studies import ensembles, promoting
from studies.ensembles import NoEnsemble
from studies.evidence import Came, MeasuredConfiguration, Part, StudyEvidence
from studies.promotion import ReturnsDifference
from studies.study import Study

Place = PromotionPlace
CHRONOS2 = {"context_length": 512, "transform": "price", "aggregate": "median"}
STILL = 0.01  # error of "no change"


class World:
    """What came, and models whose errors are what a test says, on all windows of a symbol."""

    def __init__(self, seed: int = 0, *, horizon: int = 1, count: int = 250) -> None:
        self.counts: dict[Part, int] = {**COUNTS, "confirmation": count}
        self.horizon, self._rng = horizon, np.random.default_rng(seed)
        self.came: dict[Part, Came] = {
            part: Came(returns=tuple(self.noise(part, 0.01)), last_closes=(100.0,) * n)
            for part, n in self.counts.items()
        }

    def noise(self, part: Part, sd: float) -> np.ndarray:
        return self._rng.normal(0, sd, self.counts[part] * self.horizon)

    def model(
        self, model: str, sd: float, *, like: MeasuredConfiguration | None = None, **fields: Any
    ) -> MeasuredConfiguration:
        """A configuration with errors of its own, on top of those of another one if that is given."""
        points, measured = {}, {}
        for part, came in self.came.items():
            below = np.array(came.returns if like is None else like.points[part])
            points[part] = tuple((below + self.noise(part, sd)).tolist())
            errors = np.abs(np.array(points[part]) - np.array(came.returns)).reshape(-1, self.horizon).mean(axis=1)
            measured[part] = of_errors(errors.tolist(), no_change_mae=STILL, skill=1 - float(errors.mean()) / STILL)
        params: Mapping[str, Any] = {"toto": NEW, "kronos": KRONOS, "chronos2": CHRONOS2}[model]
        return MeasuredConfiguration(**{"model": model, "params": params, "points": points, **measured, **fields})

    def evidence(self, *candidates: MeasuredConfiguration) -> StudyEvidence:
        return evidence(*candidates, counts=self.counts, no_change_mae=STILL, came=self.came)


def study(place: Place, world: World, one: MeasuredConfiguration, symbol: str = "BTCUSD", **more: Any) -> int:
    """A confirmed study of this configuration, which is its model's default too."""
    came = more.pop("came", world.came)
    return place.study(
        [(one.params, replace(one, source="default"))], symbol=symbol, model=one.model, came=came, **more
    )


def better(place: Place, symbols: tuple[str, ...] = ("BTCUSD",), *, ratio: float = 1.5, **more: Any) -> World:
    """Symbols of two models with independent errors, so that a mean of both is truly better."""
    world = World()
    for number, symbol in enumerate(symbols):
        world = World(number)
        study(place, world, world.model("toto", 0.004), symbol, **more)
        study(place, world, world.model("kronos", 0.004 * ratio), symbol, **more)
    return world


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_of_errors_that_have_nothing_in_common() -> None:
    """Two rows of errors at right angles, of squares 1 and 4: weights go with one over them, 4 to 1."""
    errors = np.array([[[1.0], [0.0]], [[0.0], [2.0]]])
    assert ensembles.least_squares(errors) == pytest.approx([0.8, 0.2])
    three = np.array([[[1.0], [0.0], [0.0]], [[0.0], [2.0], [0.0]], [[0.0], [0.0], [2.0]]])
    assert ensembles.least_squares(three) == pytest.approx([4 / 6, 1 / 6, 1 / 6])


def test_what_only_adds_to_anothers_errors_gets_no_weight() -> None:
    """Unbounded, the weights would be 2 and -1."""
    errors = np.array([[[1.0], [1.0]], [[2.0], [2.0]]])
    assert ensembles.least_squares(errors) == pytest.approx([1.0, 0.0])


def test_without_any_error_weights_are_equal() -> None:
    weights, how = ensembles.fit(np.zeros((2, 40, 1)))
    assert (weights.tolist(), how) == ([0.5, 0.5], "equal")


def test_equal_weights_stay_where_least_squares_are_not_clearly_better() -> None:
    rng = np.random.default_rng(1)
    alike = rng.normal(0, 0.01, (2, 125, 1))
    assert ensembles.fit(alike)[1] == "equal"
    weights, how = ensembles.fit(alike * np.array([1.0, 3.0])[:, None, None])
    assert how == "least squares"
    assert weights[0] == pytest.approx(0.9, abs=0.04)  # the variances are 1 to 9


@pytest.mark.parametrize(("count", "horizon", "expected"), [(250, 1, 125), (250, 5, 121), (4, 5, 0)])
def test_no_bar_is_both_fitted_to_and_decided_on(count: int, horizon: int, expected: int) -> None:
    assert ensembles.earlier(count, horizon) == expected


# --- evidence -----------------------------------------------------------------------------------------------


def made(world: World, *models: MeasuredConfiguration) -> ensembles.Ensemble:
    return ensembles.make({f"BTCUSD/{one.model}": world.evidence(one) for one in models})


def test_an_ensemble_is_measured_as_the_mean_of_its_members_points() -> None:
    world = World(2, horizon=2)
    toto, kronos = world.model("toto", 0.004), world.model("kronos", 0.02)
    found = made(world, toto, kronos)
    assert found.how == "least squares"
    assert found.fitted_on == 124
    parts: tuple[Part, ...] = ("confirmation", "test")
    for part in parts:
        came = np.array(world.came[part].returns)
        mean = sum(w * np.array(one.points[part]) for w, one in zip(found.weights, (toto, kronos), strict=True))
        errors = np.abs(mean - came).reshape(-1, 2).mean(axis=1)
        if part == "confirmation":  # on those that decide
            errors, came = errors[125:], came[250:]
        measured = found.configuration.on(part)
        assert measured is not None
        assert measured.errors == pytest.approx(errors)
        assert measured.price_mae == pytest.approx(100 * errors.mean())
        assert measured.mae_percent == pytest.approx(100 * errors.mean() / (1 + came).mean())


def changed(one: MeasuredConfiguration, world: World, part: Part, rows: slice) -> MeasuredConfiguration:
    """The same with other points, and errors, in these windows of a part."""
    points, measured = np.array(one.points[part]), one.on(part)
    assert measured is not None
    points[rows] += 0.5
    errors = np.abs(points - np.array(world.came[part].returns))
    return replace(one, points={**one.points, part: tuple(points)}, **{part: of_errors(errors.tolist())})


def test_what_came_later_changes_neither_members_nor_weights() -> None:
    """One of each model is ruined after the weights' windows: there a leak would give the other candidate the place."""
    world = World(3)
    toto, worse, kronos = world.model("toto", 0.004), world.model("toto", 0.009), world.model("kronos", 0.012)
    worse = replace(worse, params=OLD)

    def weights(*totos: MeasuredConfiguration, kronos: MeasuredConfiguration = kronos) -> list[Any]:
        one = ensembles.make({"a": world.evidence(*totos), "b": world.evidence(kronos)})
        return [dict(member.params) for member in one.members] + list(one.weights)

    plain = weights(toto, worse)
    assert plain[0] == NEW
    later, before = slice(125, 250), slice(0, 125)
    assert weights(changed(toto, world, "confirmation", later), worse) == plain
    assert weights(toto, worse, kronos=changed(kronos, world, "confirmation", later)) == plain
    assert weights(toto, worse, kronos=changed(kronos, world, "test", slice(None))) == plain
    assert weights(changed(toto, world, "confirmation", before), worse) != plain


def test_a_member_clips_no_last_close_if_another_of_its_model_does_not() -> None:
    world = World(5)
    best, other = world.model("kronos", 0.004, clipped=0.2), world.model("kronos", 0.006, clipped=0.0)
    assert ensembles.best_before([best, other], 1, max_clipped=0.01) is other
    assert ensembles.best_before([best], 1, max_clipped=0.01) is best
    assert made(world, world.model("toto", 0.004), best).configuration.clipped == 0.2  # the rule refuses it


def test_why_there_is_no_ensemble() -> None:
    world, few = World(4), World(4, count=38)
    toto, kronos = world.model("toto", 0.004), world.model("kronos", 0.004)
    with pytest.raises(NoEnsemble, match="two models"):
        made(world, toto)
    with pytest.raises(NoEnsemble, match=r"before points were kept; .*studies confirm BTCUSD/kronos"):
        made(world, toto, replace(kronos, points={}))
    with pytest.raises(NoEnsemble, match="needs 40 confirmation windows; there are 38"):
        made(few, few.model("toto", 0.004), few.model("kronos", 0.004))
    with pytest.raises(NoEnsemble, match="all the weight is toto's"):
        made(world, toto, world.model("kronos", 0.05, like=toto))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (None, "not a list of two members"),
        ([{"model": "toto", "config": {}, "weight": 0.5}], "not a list of two members"),
        ([{"model": "toto", "weight": 0.5}, {"model": "kronos", "weight": 0.5}], "no 'model' or no 'config'"),
        ([{"model": m, "config": {}, "weight": 1.5} for m in ("toto", "kronos")], "1.5 of the member toto"),
        ([{"model": m, "config": {}, "weight": 0.4} for m in ("toto", "kronos")], "do not add up to 1"),
        ([{"model": "toto", "config": {}, "weight": 0.5}] * 2, "of one model"),
    ],
)
def test_a_file_whose_members_are_wrong_is_one_clear_line(place: Place, members: Any, said: str) -> None:
    better(place)
    path = place.put({"members": members}, model="ensemble")
    result = place.promote("--dry-run")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if said in line]
    assert len(lines) == 1
    assert f"{path}: " in lines[0]
    assert "correct it, or move it away" in lines[0]


# --- promoted -----------------------------------------------------------------------------------------------


def test_an_ensemble_that_is_truly_better_is_promoted_with_the_single_ones_beside_it(place: Place) -> None:
    better(place)
    row = place.row("--ensemble", "--on", "confirmation")
    assert (row["decision"], row["reason"], row["model"]) == ("promoted", "first", "ensemble")
    found = row["ensemble"]
    assert set(found) == {
        "members", "weights", "fitted_windows", "windows", "single", "improvement", "improvement_low",
        "improvement_high", "p_value", "improvement_own", "pooled_symbols", "improvement_test", "decision", "reason",
    }  # fmt: skip
    assert [set(one) for one in found["members"]] == [{"model", "weight", "study", "trial"}] * 2
    assert [one["model"] for one in found["members"]] == ["toto", "kronos"]
    weights = [one["weight"] for one in found["members"]]
    assert weights[0] == pytest.approx(9 / 13, abs=0.08)  # the variances are 4 to 9
    assert found["weights"] == "least squares"
    assert (found["fitted_windows"], found["windows"], found["single"]) == (125, 125, "toto")
    assert found["improvement"] == pytest.approx(1 - np.sqrt(9 / 13), abs=0.08)
    assert 0 < found["improvement_low"] < found["improvement"] < found["improvement_high"]
    assert found["p_value"] < 0.01

    said = place.promoted()
    assert said["model"] == "ensemble"
    assert said["config_path"] == "hyperparams/ensemble/BTCUSD.json"
    assert [(one["model"], one["weight"]) for one in said["config"]["members"]] == [
        ("toto", weights[0]), ("kronos", weights[1]),
    ]  # fmt: skip
    assert said["config"]["members"][0]["config"]["aggregate"] == NEW["aggregate"]
    assert said["windows"]["confirmation_window"] == 125
    assert said["metadata"]["ensemble"]["improvement_single"] == found["improvement"]
    assert said["metadata"]["ensemble"]["single"] == "toto"
    assert said["metadata"]["skill"] == row["skill"]
    assert place.promoted("optimized_compiled") == said
    assert place.promoted("ensemble") == said
    # Readers that do not know it find each model's best single configuration.
    assert place.promoted("toto")["model"] == "toto"
    assert place.promoted("toto")["config"]["aggregate"] == NEW["aggregate"]
    assert {**place.promoted("kronos")["config"], **KRONOS} == place.promoted("kronos")["config"]


def test_a_dry_run_writes_nothing_and_says_what_it_would(place: Place) -> None:
    better(place)
    result = place.promote("--ensemble", "--dry-run", "--on", "confirmation")
    assert not (place.folder / "hyperparams" / "best").exists()
    assert "ensemble of toto 0." in result.stderr
    assert "over toto alone on the later 125 windows" in result.stderr
    assert "to be promoted" in result.stderr
    assert "ensemble of toto 0." in result.stdout
    shown = io.StringIO()
    narrow = Console(width=80, file=shown)
    config = configuration.load(place.settings)
    rule, names = promoting.rule_of(config), {"symbols": (), "models": ("toto", "kronos")}
    rows = promoting.promote(place.storage, config, rule, **names, dry_run=True, ensemble=True)
    narrow.print(terminal(decisions.table(rows, dry_run=True), 80))
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("promote" in line and "first" in line for line in lines)


def test_an_ensemble_that_gains_nothing_is_not_promoted(place: Place) -> None:
    """Kronos' errors are Toto's and as much of its own: the mean is worse than Toto alone."""
    world = World(6)
    toto = world.model("toto", 0.004)
    study(place, world, toto)
    study(place, world, world.model("kronos", 0.002, like=toto))
    row = place.row("--ensemble", "--on", "confirmation")
    assert (row["decision"], row["model"]) == ("promoted", "toto")
    assert row["ensemble"]["decision"] == "kept"
    assert row["ensemble"]["reason"] in ("not better", "all the weight is toto's")
    assert place.promoted()["model"] == "toto"
    assert not place.promoted_file("BTCUSD", "ensemble").exists()


def test_an_ensemble_has_to_beat_the_best_single_one_too(place: Place) -> None:
    """It is better than what is in use, but so is Toto, which the equal mean does not beat."""
    world = World(7)
    both = world.model("toto", 0.004)  # the errors that the two have in common
    incumbent = replace(world.model("toto", 0.02), params=OLD)
    study(place, world, world.model("toto", 0.0005, like=both), baselines={"incumbent": (OLD, incumbent)})
    study(place, world, world.model("kronos", 0.0005, like=both))
    place.put(OLD)
    row = place.row("--ensemble", "--on", "confirmation")
    assert (row["decision"], row["reason"]) == ("promoted", "improved")
    assert row["model"] != "ensemble"
    assert (row["ensemble"]["decision"], row["ensemble"]["reason"]) == ("kept", "not better")


def test_without_the_option_nothing_changes(place: Place) -> None:
    better(place)
    row = place.row("--dry-run", "--on", "confirmation")
    assert (row["model"], row["ensemble"]) == ("toto", None)


def test_test_decides_nothing(place: Place) -> None:
    """Ruined test windows are shown, and change neither weights nor the decision."""
    world = World(0)
    toto, kronos = world.model("toto", 0.004), world.model("kronos", 0.006)
    study(place, world, toto)
    study(place, world, changed(kronos, world, "test", slice(None)))
    found = place.row("--ensemble", "--dry-run", "--on", "confirmation")["ensemble"]
    assert found["decision"] == "promoted"
    assert found["improvement_test"] < -1


def test_an_ensemble_is_decided_on_pooled_evidence(place: Place) -> None:
    """Six symbols with the same true gain: each says what all of them say, so that their gains hardly differ."""
    symbols = ("AAA", "BBB", "CCC", "DDD", "EEE", "FFF")
    better(place, symbols, ratio=1.2)
    rows = place.rows("--ensemble", "--dry-run")
    assert {row["ensemble"]["pooled_symbols"] for row in rows} == {6}
    assert {row["ensemble"]["decision"] for row in rows} == {"promoted"}
    pooled, own = ([row["ensemble"][name] for row in rows] for name in ("improvement", "improvement_own"))
    assert max(pooled) - min(pooled) < 0.7 * (max(own) - min(own))


# --- in use -------------------------------------------------------------------------------------------------


def test_an_ensemble_in_use_is_measured_compared_and_kept(place: Place) -> None:
    better(place, ("AAA", "BBB", "CCC"))
    place.rows("--ensemble")
    again = {row["symbol"]: row for row in place.rows("--ensemble")}
    assert {row["reason"] for row in again.values()} == {"unchanged"}
    assert {row["model"] for row in again.values()} == {"ensemble"}
    plain = place.row("--symbols", "AAA")  # without the option it is what a single one has to beat
    assert (plain["decision"], plain["reason"], plain["incumbent_model"]) == ("kept", "not better", "ensemble")
    assert plain["improvement"] < 0
    assert plain["pooled_symbols"] == 3
    assert plain["incumbent_mae"] < plain["best_mae"]


def test_a_better_single_one_replaces_an_ensemble(place: Place) -> None:
    world = World(8)
    kronos, toto = world.model("kronos", 0.02), world.model("toto", 0.02)
    best = replace(world.model("toto", 0.001), params=OLD)
    place.study([(OLD, replace(best, source="default"))], came=world.came, baselines={"member": (NEW, toto)})
    study(place, world, kronos)
    members = [{"model": "toto", "config": NEW, "weight": 0.5}, {"model": "kronos", "config": KRONOS, "weight": 0.5}]
    place.put({"members": members}, model="ensemble")
    row = place.row("--on", "confirmation")
    assert (row["decision"], row["reason"], row["incumbent_model"]) == ("promoted", "improved", "ensemble")
    assert row["improvement"] == pytest.approx(1 - 0.001 / (0.02 / np.sqrt(2)), abs=0.02)
    assert place.promoted()["metadata"]["previous_model"] == "ensemble"


def test_an_ensemble_whose_members_were_not_measured_is_stale(place: Place) -> None:
    better(place)
    members = [{"model": "toto", "config": OLD, "weight": 0.5}, {"model": "kronos", "config": KRONOS, "weight": 0.5}]
    place.put({"members": members}, model="ensemble")
    row = place.row("--dry-run", "--on", "confirmation")
    assert (row["decision"], row["reason"]) == ("kept", "stale")
    assert row["next"].split(" --config")[0].endswith("studies confirm BTCUSD/toto@2026-03-19")
    members[1] = {"model": "chronos2", "config": CHRONOS2, "weight": 0.5}
    place.put({"members": members}, model="ensemble")
    row = place.row("--dry-run", "--on", "confirmation")
    assert (row["decision"], row["reason"]) == ("kept", "not comparable")
    assert row["next"].split(" --config")[0].endswith("launch-workers --symbols BTCUSD --models chronos2")


def test_confirmed_before_points_were_kept_is_said_with_the_command(place: Place) -> None:
    world = World(0)
    study(place, world, world.model("toto", 0.004))
    study(place, world, replace(world.model("kronos", 0.006), points={}), came={})
    result = place.promote("--ensemble", "--dry-run", "--on", "confirmation")
    assert "no ensemble: BTCUSD/kronos@2026-03-19 was confirmed before points were kept" in result.stderr
    assert "studies confirm BTCUSD/kronos@2026-03-19" in result.stderr


def test_rollback_puts_back_what_an_ensemble_replaced(place: Place) -> None:
    better(place)
    place.row("--on", "confirmation")
    single = place.promoted_file("BTCUSD").read_bytes()
    assert place.row("--ensemble", "--on", "confirmation")["reason"] == "improved"
    assert place.promoted()["metadata"]["previous_model"] == "toto"
    result = place.promote("--rollback", "BTCUSD")
    assert result.exit_code == 0, result.stderr
    assert place.promoted_file("BTCUSD").read_bytes() == single
    assert place.promoted_file("BTCUSD", "optimized_compiled").read_bytes() == single
    assert not place.promoted_file("BTCUSD", "ensemble").exists()


@pytest.mark.parametrize(("high", "decision"), [(-0.0001, "kept"), (0.0001, "promoted")])
def test_an_ensemble_that_earns_less_is_kept_from_being_promoted(place: Place, high: float, decision: str) -> None:
    better(place)
    place.row("--on", "confirmation")
    asked = []

    def gate(study: Study, old: MeasuredConfiguration, new: MeasuredConfiguration) -> ReturnsDifference:
        asked.append((study.model, old.model, new.model))
        return ReturnsDifference(strategy="simple", value=-0.001, interval=(-0.003, high))

    config = configuration.load(place.settings)
    rule = promoting.rule_of(config, on="confirmation")
    names = {"symbols": (), "models": ("toto", "kronos")}
    (row,) = promoting.promote(place.storage, config, rule, **names, dry_run=True, gate=gate, ensemble=True)
    assert row.ensemble is not None
    assert row.ensemble.decision == decision
    assert row.ensemble.reason == ("improved" if decision == "promoted" else "worse in returns")
    assert asked == [("toto", "toto", "ensemble")]


def test_validation_windows_decide_on_no_ensemble(place: Place) -> None:
    better(place)
    result = place.promote("--ensemble", "--on", "validation")
    assert result.exit_code == 1
    assert "leave out --on validation" in result.stderr


def test_a_promoted_ensemble_reads_back(place: Place) -> None:
    better(place)
    row = place.row("--ensemble", "--on", "confirmation")
    record = configs.read(place.folder / "hyperparams", "best", "BTCUSD")
    assert record is not None
    members = ensembles.members_of(record)
    assert [(one.model, one.weight) for one in members] == [
        (one["model"], one["weight"]) for one in row["ensemble"]["members"]
    ]
    assert json.loads(json.dumps(dict(record.config))) == record.config
