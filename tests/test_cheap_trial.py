"""Trials in few statements: the same rows and answers as Optuna's own storage gives, and how many statements."""

from __future__ import annotations

import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import PercentilePruner
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, text

from forecasters import ForecastError
from objectives.metrics import Measurement
from storage import database, retrying, slots, study_rows
from storage.progress import study_progress
from storage.retrying import RetryingStorage
from studies import sampler, working
from studies import study as studying
from studies.space import Space
from studies.study import StudyRun

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
            system_attrs={"by": str(self.random.random())},
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


def test_numbers_have_no_gap_and_no_repeat_with_stock_optuna_creating_too(
    ours: RetryingStorage, stock: RDBStorage, database_url: str
) -> None:
    study_id = stock.create_new_study([StudyDirection.MINIMIZE], "s")
    storages = [ours, stock, database.open_storage(database_url, create=False)] * 2

    def create(storage: RDBStorage) -> None:
        for _ in range(15):
            storage.create_new_trial(study_id)

    threads = [threading.Thread(target=create, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trials = stock.get_all_trials(study_id)
    assert [trial.number for trial in sorted(trials, key=lambda trial: trial._trial_id)] == list(range(90))
    storages[2].engine.dispose()


def test_of_two_that_end_a_trial_one_succeeds(ours: RetryingStorage, stock: RDBStorage) -> None:
    study_id = stock.create_new_study([StudyDirection.MINIMIZE], "s")
    for _ in range(20):
        trial_id = ours.create_new_trial(study_id)
        ended: list[object] = []

        def end(storage: RDBStorage, value: float, trial_id: int = trial_id, ended: list[object] = ended) -> None:
            ended.append(answer(lambda: storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])))

        threads = [threading.Thread(target=end, args=each) for each in ((ours, 1.0), (ours, 2.0), (stock, 3.0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Counter(ended) == {True: 1, UpdateFinishedTrialError: 2}


def test_what_is_deferred_is_shown_to_others_in_time(
    ours: RetryingStorage, stock: RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_id = ours.create_new_trial(stock.create_new_study([StudyDirection.MINIMIZE], "s"))
    ours.defer_writes(trial_id)
    ours.set_trial_param(trial_id, "x", 0.5, DISTRIBUTIONS["x"])
    ours.set_trial_intermediate_value(trial_id, 0, 0.5)
    assert ours.get_trial(trial_id).intermediate_values == {0: 0.5}
    assert stock.get_trial(trial_id).intermediate_values == {}
    ours.write_deferred(trial_id)
    assert stock.get_trial(trial_id).params == {"x": 0.5}
    monkeypatch.setattr(retrying, "DEFER_S", 0.0)
    ours.set_trial_intermediate_value(trial_id, 1, 0.25)
    assert stock.get_trial(trial_id).intermediate_values == {0: 0.5, 1: 0.25}
    # What a server forgets in a crash, as nobody waited for its disk, is written again at the end.
    lost = [text("delete from trial_params"), text("delete from trial_intermediate_values")]
    ours.transaction(lambda connection: [connection.execute(each) for each in lost])
    ours.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert stock.get_trial(trial_id).params == {"x": 0.5}
    assert stock.get_trial(trial_id).intermediate_values == {0: 0.5, 1: 0.25}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of nan and inf among what is compared
def test_our_pruner_decides_as_optunas() -> None:
    rng = random.Random(0)
    pruners = sampler.make_pruner(0.25), PercentilePruner(75, n_startup_trials=sampler.STARTUP_TRIALS)
    for direction in ("minimize", "maximize"):
        study = optuna.create_study(direction=direction)
        decided = set()
        for _ in range(60):
            trial = study.ask()
            for step in rng.sample(range(6), 4):
                trial.report(rng.choice((rng.random(), rng.random(), math.nan, math.inf)), step)
                frozen = study._storage.get_trial(trial._trial_id)
                ours, optunas = (bool(pruner.prune(study, frozen)) for pruner in pruners)
                assert ours == optunas
                decided.add(ours)
            study.tell(trial, rng.random(), state=rng.choice((TrialState.COMPLETE, None)))
        assert decided == {False, True}


# --- a worker's trial --------------------------------------------------------------------------------------------

SPACE = Space(model="toto", knobs={"a": tuple(range(20)), "b": ("x", "y", "z"), "c": (1, 2, 4, 8)}, fixed={})


class Evaluator:
    """Ten reports, then what the test asks for."""

    def __init__(self, *, value: float = 0.5, at_end: Callable[[], None] = lambda: None) -> None:
        self.value, self.at_end = value, at_end

    def measure(
        self,
        windows: object,
        params: Mapping[str, Any],
        *,
        passes: Sequence[int],
        on_rung: Callable[[int, float], None],
    ) -> Measurement:
        for step in range(10):
            on_rung(step, self.value)
        self.at_end()
        mae = self.value
        return Measurement(
            mae=mae,
            price_mae=mae,
            mae_percent=mae,
            no_change_mae=1.0,
            skill=1 - mae,
            errors=(mae,) * 30,
            sampling_error=None,
            windows=30,
            seconds={"encode": 0.1, "draw": 0.2, "aggregate": 0.3},
            latency_s=None,
        )


@pytest.fixture
def run(ours: RetryingStorage) -> StudyRun:
    def fill(connection: Any, study_id: int) -> None:
        slots.add(connection, study_id, slots.TRIAL, 0, label="incumbent", params={"a": 3, "b": "y", "c": 8})
        slots.raise_budget(connection, study_id, 30)

    study_id = study_rows.create_study(ours, "s", {"definition": {}}, "mae", fill)
    return StudyRun(
        study=studying.Study(study_id=study_id, name="s", symbol="S", model="toto", as_of="", definition={}),
        space=SPACE,
        split=cast(Any, SimpleNamespace(validation=None)),
        confirmation=cast(Any, None),
        max_passes=2,
        tolerance=0.001,
        default={},
        pool="none",
        pool_days=0.0,
        optuna_study=optuna.load_study(
            study_name="s",
            storage=ours,
            sampler=sampler.make_sampler(conditional=False),
            pruner=sampler.make_pruner(0.25),
        ),
    )


def work(ours: RetryingStorage, run: StudyRun, evaluator: Evaluator) -> working.Outcome:
    slot = slots.claim(ours, run.study.study_id, worker="w:1", lease_s=60)
    assert slot is not None
    clock = working.StageClock(ours, [])
    return working.work(ours, run, slot, cast(Any, evaluator), attrs={"worker": "w:1", "device": "cpu"}, clock=clock)


def test_a_pruned_and_a_complete_trial_take_few_statements(ours: RetryingStorage, run: StudyRun) -> None:
    for _ in range(12):
        assert work(ours, run, Evaluator()).state == "complete"
    found: Counter[str] = Counter()
    event.listen(ours.engine, "before_cursor_execute", lambda *_: found.update(["statement"]))
    event.listen(ours.engine, "begin", lambda *_: found.update(["transaction"]))
    assert work(ours, run, Evaluator()).state == "complete"
    # Claim 2, create 2, read the new trial 1, sample 2, params 1, prune 1, end 1, finish the slot 1.
    assert found["statement"] <= 11
    assert found["transaction"] <= 9
    found.clear()
    assert work(ours, run, Evaluator(value=0.9)).state == "pruned"
    assert found["statement"] <= 11
    first, *_, last = stock_trials(run)
    assert (first.params, first.user_attrs["label"]) == ({"a": 3, "b": "y", "c": 8}, "incumbent")
    assert (last.value, last.intermediate_values, last.params.keys()) == (0.9, {0: 0.9}, SPACE.knobs.keys())
    (complete,) = [trial for trial in stock_trials(run) if trial.number == 12]
    assert complete.user_attrs["worker"] == "w:1"
    assert "claim" not in complete.user_attrs
    assert complete.intermediate_values == dict.fromkeys(range(10), 0.5)
    stages = {name: value for name, value in complete.user_attrs.items() if name.endswith("_s")}
    assert stages == {"encode_s": 0.1, "draw_s": 0.2, "aggregate_s": 0.3}
    assert complete.user_attrs["mae"] == complete.value


def stock_trials(run: StudyRun) -> list[FrozenTrial]:
    """As plain Optuna reads them."""
    url = run.optuna_study._storage._backend.engine.url  # type: ignore[attr-defined]
    study = optuna.load_study(study_name="s", storage=url.render_as_string(hide_password=False))
    return study.get_trials(deepcopy=False)


def test_others_see_the_params_of_a_trial_at_work(ours: RetryingStorage, run: StudyRun) -> None:
    seen: list[FrozenTrial] = []
    work(ours, run, Evaluator(at_end=lambda: seen.extend(stock_trials(run))))
    assert (seen[0].state, seen[0].params) == (TrialState.RUNNING, {"a": 3, "b": "y", "c": 8})


def test_an_error_fails_the_trial_with_what_it_reported(ours: RetryingStorage, run: StudyRun) -> None:
    for error in (ForecastError("NaN"), KeyboardInterrupt()):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            work(ours, run, Evaluator(at_end=fail))
        trial = stock_trials(run)[-1]
        assert (trial.state, len(trial.intermediate_values)) == (TrialState.FAIL, 10)


def test_a_trial_that_another_ended_is_lost_and_left_alone(ours: RetryingStorage, run: StudyRun) -> None:
    def reap() -> None:
        slots.expire(ours, "w:1")
        assert slots.reap(ours, [run.study.study_id], lease_s=0.0) == 1

    assert work(ours, run, Evaluator(at_end=reap)).state == "lost"
    trial = stock_trials(run)[-1]
    assert (trial.state, trial.values, trial.intermediate_values) == (TrialState.FAIL, None, {})
    assert study_progress(ours)[run.study.study_id].done == 0


def test_the_dashboard_reads_our_trials(ours: RetryingStorage, run: StudyRun) -> None:
    for _ in range(3):
        work(ours, run, Evaluator())
    url = ours.engine.url.render_as_string(hide_password=False)
    dashboard = optuna_dashboard.wsgi(RDBStorage(url))

    def get(path: str) -> Any:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        status: list[str] = []
        body = b"".join(dashboard(environ, cast(Any, lambda line, *_: status.append(line))))
        assert status == ["200 OK"]
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "s"
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [(trial["state"], trial["values"]) for trial in trials] == [("Complete", [0.5])] * 3
    assert [len(trial["intermediate_values"]) for trial in trials] == [10] * 3
    assert {param["name"]: param["param_external_value"] for param in trials[0]["params"]} == {
        "a": "3",
        "b": "y",
        "c": "8",
    }
