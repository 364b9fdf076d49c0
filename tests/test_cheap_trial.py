"""Trials in few statements: the same rows and answers as Optuna's own storage gives, and how many statements."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage import database
from storage.database import RetryingStorage

DISTRIBUTIONS = {
    "x": FloatDistribution(-1e9, 1e9),
    "rate": FloatDistribution(1e-7, 1.0, log=True),
    "step": FloatDistribution(0, 1, step=0.1),
    "n": IntDistribution(1, 4096, log=True),
    "k": IntDistribution(0, 100, step=5),
    "kind": CategoricalDistribution(["mean", "median", None, True, 3, 0.1, "ü'\\\"%:x"]),
}
OTHER = CategoricalDistribution(["other", "choices"])  # refused wherever a name has had another distribution
FLOATS = (0.0, 0.1, 1 / 3, 1e308, -1e308, 5e-324, 1e-320, math.inf, -math.inf)
ATTRS = (None, 1, 0.1, math.inf, "ü'\\\"%:x\0", [1, {"a": [None]}], {"b": {"c": "d" * 3000}})


@pytest.fixture
def ours(database_url: str) -> Iterator[RetryingStorage]:
    opened = database.open_storage(database_url, wait_s=10, create=False)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def stock(database_url: str) -> Iterator[RDBStorage]:
    opened = RDBStorage(database_url)
    yield opened
    opened.engine.dispose()


def plain(trial: FrozenTrial) -> tuple[Any, ...]:
    """A trial without what differs between two equal ones; repr makes nan equal to itself and tells 1 from True."""
    return (
        trial.number,
        trial.state,
        repr(trial.values),
        repr(list(trial.params.items())),
        list(trial.distributions.items()),
        repr(sorted(trial.user_attrs.items())),
        repr(sorted(trial.system_attrs.items())),
        repr(sorted(trial.intermediate_values.items())),
        trial.datetime_start is None,
        trial.datetime_complete is None,
    )


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns or raises."""
    try:
        got = call()
    except (KeyError, ValueError, RuntimeError, StorageInternalError, UpdateFinishedTrialError) as error:
        return type(error)
    return plain(got) if isinstance(got, FrozenTrial) else got


class Operations:
    """One random sequence of calls, the same for equal seeds. Ids are given as places in the list of trials."""

    def __init__(self, storage: BaseStorage, seed: int, *, defer: bool) -> None:
        self.storage, self.random, self.defer = storage, random.Random(seed), defer
        self.study_id = storage.create_new_study([StudyDirection.MINIMIZE], f"{type(storage).__name__} {seed} {defer}")
        first = create_trial(
            value=0.5, params={name: self.value(name) for name in DISTRIBUTIONS}, distributions=dict(DISTRIBUTIONS)
        )
        self.ids = [0, storage.create_new_trial(self.study_id, first)]  # no trial has the id 0

    def run(self, count: int) -> list[Any]:
        steps = [self.create, self.param, self.param, self.report, self.report, self.attr, self.end, self.read]
        return [self.random.choice(steps)() for _ in range(count)]

    def trial_id(self) -> int:
        return self.random.choice(self.ids[-4:])

    def create(self) -> Any:
        template = None if self.random.random() < 0.5 else self.template()
        trial_id = self.storage.create_new_trial(self.study_id, template)
        self.ids.append(trial_id)
        if self.defer and isinstance(self.storage, RetryingStorage) and not (template and template.state.is_finished()):
            self.storage.defer_writes(trial_id)
        return answer(lambda: self.storage.get_trial(trial_id))

    def template(self) -> FrozenTrial:
        state = self.random.choice(list(TrialState))
        names = self.random.sample(sorted(DISTRIBUTIONS), 3)
        finite = [value for value in FLOATS if abs(value) < 1]
        return create_trial(
            state=state,
            value=self.random.choice(FLOATS) if state == TrialState.COMPLETE else None,
            params={name: self.value(name) for name in names},
            distributions={name: DISTRIBUTIONS[name] for name in names},
            user_attrs={"given": self.random.choice(ATTRS)},
            system_attrs={"claim": str(self.random.random())},
            intermediate_values={step: self.random.choice(finite) for step in range(3)},
        )

    def value(self, name: str) -> Any:
        return DISTRIBUTIONS[name].to_external_repr(self.internal(name))

    def internal(self, name: str) -> float:
        distribution = DISTRIBUTIONS[name]
        if isinstance(distribution, CategoricalDistribution):
            return self.random.randrange(len(distribution.choices))
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return distribution.low if self.random.random() < 0.2 else distribution.high

    def param(self) -> Any:
        trial_id, name = self.trial_id(), self.random.choice(sorted(DISTRIBUTIONS))
        value = self.internal(name)
        distribution = OTHER if self.random.random() < 0.1 else DISTRIBUTIONS[name]
        return answer(lambda: self.storage.set_trial_param(trial_id, name, value, distribution))

    def report(self) -> Any:
        trial_id, step, value = self.trial_id(), self.random.randrange(5), self.random.choice((*FLOATS, math.nan))
        return answer(lambda: self.storage.set_trial_intermediate_value(trial_id, step, value))

    def attr(self) -> Any:
        trial_id, key, value = self.trial_id(), self.random.choice("abü%:"), self.random.choice(ATTRS)
        if self.random.random() < 0.5:
            return answer(lambda: self.storage.set_trial_user_attr(trial_id, key, value))
        return answer(lambda: self.storage.set_trial_system_attr(trial_id, key, value))

    def end(self) -> Any:
        trial_id, state = self.trial_id(), self.random.choice(list(TrialState))
        values = None if state == TrialState.FAIL else [self.random.choice(FLOATS)]
        if state in (TrialState.RUNNING, TrialState.WAITING):
            values = None
        return answer(lambda: self.storage.set_trial_state_values(trial_id, state, values))

    def read(self) -> Any:
        trial_id, name = self.trial_id(), self.random.choice(sorted(DISTRIBUTIONS))
        reads: list[Callable[[], Any]] = [
            lambda: self.storage.get_trial(trial_id),
            lambda: self.storage.get_trial_param(trial_id, name),
            lambda: repr(self.storage.get_trial_params(trial_id)),
            lambda: repr(sorted(self.storage.get_trial_user_attrs(trial_id).items())),
            lambda: repr(sorted(self.storage.get_trial_system_attrs(trial_id).items())),
            lambda: self.storage.get_trial_number_from_id(trial_id),
            lambda: self.storage.get_n_trials(self.study_id),
            lambda: self.storage.get_best_trial(self.study_id),
            lambda: [plain(trial) for trial in self.storage.get_all_trials(self.study_id)],
            lambda: [
                plain(trial)
                for trial in self.storage.get_all_trials(self.study_id, states=(TrialState.FAIL, TrialState.PRUNED))
            ],
        ]
        return answer(self.random.choice(reads))


@pytest.mark.parametrize("defer", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("seed", range(5))
def test_equal_operations_give_equal_answers_and_trials(
    ours: RetryingStorage, stock: RDBStorage, seed: int, defer: bool
) -> None:
    new, old = Operations(ours, seed, defer=defer), Operations(stock, seed, defer=defer)
    for got, expected in zip(new.run(150), old.run(150), strict=True):
        assert got == expected
    wanted = [plain(trial) for trial in stock.get_all_trials(old.study_id)]
    assert len(wanted) > 5
    assert [plain(trial) for trial in ours.get_all_trials(new.study_id)] == wanted
    assert [plain(trial) for trial in ours.get_all_trials(old.study_id)] == wanted
    for trial_id in set(ours._deferred):
        ours.write_deferred(trial_id)
    assert [plain(trial) for trial in stock.get_all_trials(new.study_id)] == wanted
