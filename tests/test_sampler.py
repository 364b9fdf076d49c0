"""Proposals: TPE without repeats."""

from __future__ import annotations

import optuna
import pytest

from studies.sampler import DistinctTPESampler, make_pruner

CHOICES = [f"c{n}" for n in range(12)]


def search(sampler: optuna.samplers.BaseSampler, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        letter, number = trial.suggest_categorical("letter", CHOICES), trial.suggest_categorical("number", [1, 2, 3, 4])
        return CHOICES.index(letter) + 0.1 * number

    study.optimize(objective, n_trials=trials)
    return study


def distinct(study: optuna.Study) -> int:
    return len({tuple(sorted(trial.params.items())) for trial in study.trials})


def test_configurations_do_not_repeat() -> None:
    ours = search(DistinctTPESampler(seed=1, multivariate=True, n_startup_trials=5), 48)
    assert distinct(ours) >= 48 - 5  # the random start may repeat
    assert ours.best_value == pytest.approx(0.1)


def test_a_space_that_is_used_up_is_gone_on_with() -> None:
    study = search(DistinctTPESampler(seed=1, multivariate=True, n_startup_trials=2), 60)
    assert len(study.trials) == 60
    assert distinct(study) == 48


def test_a_continuous_knob_is_left_to_tpe() -> None:
    study = optuna.create_study(sampler=DistinctTPESampler(seed=1, multivariate=True, n_startup_trials=5))
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=25)
    assert study.best_value < 0.1


def test_the_pruner_stops_the_worst_share_only() -> None:
    study = optuna.create_study(pruner=make_pruner(0.25))
    for n in range(20):
        trial = study.ask()
        trial.report(float(n), step=10)
        study.tell(trial, float(n))
    for value, pruned in ((14.0, False), (19.5, True)):
        trial = study.ask()
        trial.report(value, step=10)
        assert bool(trial.should_prune()) is pruned
        study.tell(trial, value)
    assert isinstance(make_pruner(0), optuna.pruners.NopPruner)
