"""Optuna and optuna-dashboard: each private name that this project uses or overrides is still what it was written for.

A failure after an upgrade says by its id what has moved; then look at what the module named beside it does with it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import optuna
import optuna_dashboard
import pytest
from optuna.artifacts import ArtifactMeta, _upload
from optuna.distributions import FloatDistribution, check_distribution_compatibility
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import _custom_plot_data

from storage import board, study_rows
from storage.retrying import RetryingStorage
from studies.sampler import DistinctTPESampler, RungPruner

OVERRIDDEN = {  # method -> its parameters after `self`
    "RDBStorage._create_new_trial": "study_id template_trial",
    "RDBStorage._set_trial_param": "trial_id param_name param_value_internal distribution previous_distribution",
    "RDBStorage._get_trials": "study_id states included_trial_ids trial_id_greater_than",
    "RDBStorage._get_best_trial_id": "study_id direction",
    "RDBStorage.set_trial_intermediate_value": "trial_id step intermediate_value",
    "RDBStorage.set_trial_user_attr": "trial_id key value",
    "RDBStorage.set_trial_system_attr": "trial_id key value",
    "RDBStorage.set_trial_state_values": "trial_id state values",
    "RDBStorage.get_trial": "trial_id",
    "RDBStorage.get_trial_param": "trial_id param_name",
    "RDBStorage.get_trial_user_attrs": "trial_id",
    "RDBStorage.get_trial_system_attrs": "trial_id",
    "RDBStorage.set_study_user_attr": "study_id key value",
    "RDBStorage.set_study_system_attr": "study_id key value",
    "RDBStorage.get_study_id_from_name": "study_name",
    "RDBStorage.get_study_name_from_id": "study_id",
    "RDBStorage.get_study_directions": "study_id",
    "RDBStorage.get_study_user_attrs": "study_id",
    "RDBStorage.get_study_system_attrs": "study_id",
    "RDBStorage.get_all_studies": "",
    "RDBStorage.get_trial_id_from_study_id_trial_number": "study_id trial_number",
    "TPESampler._compute_acquisition_func": "samples mpe_below mpe_above",
    "TPESampler.sample_relative": "study trial search_space",
    "PercentilePruner.prune": "study trial",
}
CALLED = {  # function -> the parameters that this project passes
    "RDBStorage.__init__": "url engine_kwargs skip_compatibility_check skip_table_creation",
    "RDBStorage.check_trial_is_updatable": "trial_id trial_state",
    "BaseStorage.get_trial_param": "trial_id param_name",
    "BaseStorage.get_trial_user_attrs": "trial_id",
    "BaseStorage.get_trial_system_attrs": "trial_id",
    "BaseStorage.create_new_trial": "study_id template_trial",
    "Study._get_trials": "deepcopy states use_cache",
    "check_distribution_compatibility": "dist_old dist_new",
    "TrialValueModel.value_to_stored_repr": "value",
    "TrialIntermediateValueModel.intermediate_value_to_stored_repr": "value",
    "FrozenTrial.__init__": "trial_id",
    "RDBStorage.get_all_versions": "",
    "RDBStorage.get_current_version": "",
    "RDBStorage.get_head_version": "",
    "wsgi": "storage artifact_store",
    "save_note": "study_or_trial body",
    "save_plotly_graph_object": "study figure graph_object_id",
    "ArtifactMeta": "artifact_id filename mimetype encoding",
}
COLUMNS = {  # table -> the columns that our SQL and create_study name
    "studies": "study_id study_name",
    "study_directions": "direction study_id objective",
    "study_user_attributes": "study_id key value_json",
    "study_system_attributes": "study_id key value_json",
    "trials": "trial_id number study_id state datetime_start datetime_complete",
    "trial_user_attributes": "trial_id key value_json",
    "trial_system_attributes": "trial_id key value_json",
    "trial_params": "param_id trial_id param_name param_value distribution_json",
    "trial_values": "trial_id objective value value_type",
    "trial_intermediate_values": "trial_id step intermediate_value intermediate_value_type",
}
OWNERS: dict[str, Any] = {
    "RDBStorage": RDBStorage,
    "BaseStorage": BaseStorage,
    "TPESampler": TPESampler,
    "PercentilePruner": PercentilePruner,
    "Study": optuna.Study,
    "FrozenTrial": FrozenTrial,
    "TrialValueModel": models.TrialValueModel,
    "TrialIntermediateValueModel": models.TrialIntermediateValueModel,
    "check_distribution_compatibility": check_distribution_compatibility,
    "wsgi": optuna_dashboard.wsgi,
    "save_note": optuna_dashboard.save_note,
    "save_plotly_graph_object": optuna_dashboard.save_plotly_graph_object,
    "ArtifactMeta": ArtifactMeta,
}
OURS = {"RDBStorage": RetryingStorage, "TPESampler": DistinctTPESampler, "PercentilePruner": RungPruner}


def parameters(name: str) -> list[str]:
    owner, _, method = name.partition(".")
    found = getattr(OWNERS[owner], method, None) if method else OWNERS[owner]
    assert found is not None, f"{name} is gone"
    return [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_has_the_parameters_of_ours(name: str) -> None:
    owner, _, method = name.partition(".")
    assert parameters(name) == OVERRIDDEN[name].split()
    assert method in vars(OURS[owner])


def test_every_overridden_method_is_listed() -> None:
    for owner, ours in OURS.items():
        shared = {name for name in vars(ours) if callable(getattr(ours, name)) and hasattr(OWNERS[owner], name)}
        shared = {name for name in shared if not name.startswith("__")}
        assert {f"{owner}.{name}" for name in shared} == {name for name in OVERRIDDEN if name.startswith(f"{owner}.")}


@pytest.mark.parametrize("name", CALLED)
def test_called_function_takes_what_is_passed(name: str) -> None:
    assert set(CALLED[name].split()) <= set(parameters(name))


@pytest.mark.parametrize("table", COLUMNS)
def test_table_has_the_columns_that_our_statements_name(table: str) -> None:
    assert set(COLUMNS[table].split()) <= set(models.BaseModel.metadata.tables[table].columns.keys())


def _rdb() -> RDBStorage:
    return RDBStorage("sqlite:///:memory:")


def _pruner_asks_for_complete_trials() -> bool:
    class Asked:
        direction = StudyDirection.MINIMIZE
        asked: tuple[Any, ...] = ()

        def get_trials(self, **options: Any) -> list[FrozenTrial]:
            self.asked = (options,)
            return []

    study: Any = Asked()
    PercentilePruner(50).prune(study, optuna.trial.create_trial(value=0.0))
    return study.asked == ({"deepcopy": False, "states": (TrialState.COMPLETE,)},)


def _acquisition_decides() -> bool:
    """The candidate with the greatest value is proposed: DistinctTPESampler gives tried ones minus infinity."""
    seen = []

    class Sampler(TPESampler):
        def _compute_acquisition_func(self, samples: Any, mpe_below: Any, mpe_above: Any) -> Any:
            values = super()._compute_acquisition_func(samples, mpe_below, mpe_above)
            values[:] = -float("inf")
            values[-1] = 0.0
            seen.append(samples["x"][-1])
            return values

    study = optuna.create_study(sampler=Sampler(seed=1, multivariate=True, n_startup_trials=1))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    return bool(seen) and [trial.params["x"] for trial in study.trials[-len(seen) :]] == seen


def _cache_of_trials() -> bool:
    """What working.py clears before a trial is what `_get_trials(use_cache=True)` reads."""
    study = optuna.create_study(storage=InMemoryStorage())
    assert study._thread_local.cached_all_trials is None
    study.ask()
    assert study._get_trials(deepcopy=False, use_cache=True) == study._thread_local.cached_all_trials
    study._storage.create_new_trial(study._study_id)
    assert len(study._get_trials(deepcopy=False, use_cache=True)) == 1
    study._thread_local.cached_all_trials = None
    return len(study._get_trials(deepcopy=False, use_cache=True)) == 2


def _dashboard_keys() -> bool:
    study = optuna.create_study(storage=InMemoryStorage())
    optuna_dashboard.save_note(study, "text")
    keys = study._storage.get_study_system_attrs(study._study_id)
    return board.NOTE_VERSION in keys and all(key.startswith((board.NOTE, board.NOTE_VERSION)) for key in keys)


def _metric_names() -> bool:
    study = optuna.create_study(storage=InMemoryStorage())
    study.set_metric_names(["mae"])
    return study._storage.get_study_system_attrs(study._study_id) == {study_rows.METRIC_NAMES: ["mae"]}


BEHAVIOUR: dict[str, Callable[[], bool]] = {
    "RDBStorage.engine disposes of connections": lambda: callable(_rdb().engine.dispose),
    "RDBStorage.scoped_session removes a broken session": lambda: callable(_rdb().scoped_session.remove),
    "models.NOT_FOUND_MSG is a text": lambda: isinstance(models.NOT_FOUND_MSG, str),
    "models.StudyModel takes directions": lambda: hasattr(models.StudyModel, "directions"),
    "Trial._trial_id is the row's": lambda: optuna.create_study(storage=_rdb()).ask()._trial_id == 1,
    "FrozenTrial._trial_id can be set": lambda: hasattr(optuna.trial.create_trial(value=0.0), "_trial_id"),
    "Study._thread_local.cached_all_trials is the cache of _get_trials": _cache_of_trials,
    "Study.set_metric_names writes METRIC_NAMES": _metric_names,
    "PercentilePruner.prune asks a study for its complete trials alone": _pruner_asks_for_complete_trials,
    "TPESampler proposes the candidate of greatest acquisition": _acquisition_decides,
    "TPESampler takes constant_liar, group and multivariate": lambda: (
        {"constant_liar", "group", "multivariate"} <= set(inspect.signature(TPESampler).parameters)
    ),
    "distributions have internal and external representations": lambda: (
        FloatDistribution(0, 1).to_external_repr(FloatDistribution(0, 1).to_internal_repr(0.5)) == 0.5
    ),
    "artifacts are kept under board.ARTIFACT": lambda: _upload.ARTIFACTS_ATTR_PREFIX == board.ARTIFACT,
    "plots are kept under board.PLOT": lambda: _custom_plot_data.SYSTEM_ATTR_PLOT_DATA == board.PLOT,
    "notes are kept under board.NOTE": _dashboard_keys,
    "the dashboard's application has catchall": lambda: hasattr(optuna_dashboard.wsgi(InMemoryStorage()), "catchall"),
    "the dashboard's API logs to optuna_dashboard._bottle_util": lambda: (
        "optuna_dashboard._bottle_util" in logging.root.manager.loggerDict
    ),
}


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_private_name_behaves_as_this_project_assumes(name: str) -> None:
    assert BEHAVIOUR[name]()
