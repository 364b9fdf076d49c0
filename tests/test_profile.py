"""`--profile`, and the variables of the scripts that this package replaces, where commands honour them."""

from __future__ import annotations

from typing import Any

import pytest
from places import RunPlace as Place
from places import tiny_toto

import forecasters
from launch import profiling, switches
from launch.profiling import Profile
from objectives import work
from objectives.evaluation import Evaluator
from objectives.windows import Windows
from objectives.work import WorkCounter
from studies.config import ConfigError
from studies.series import read_series

PARAMS = {"context_length": 256, "num_samples": 64, "aggregate": "median"}
ENVIRONMENT = {"TRIALS": "3", "WORKERS": "1", "MODEL": "naive"}


def measured(place: Place, counter: WorkCounter | None, *, horizon: int) -> tuple[Any, Evaluator]:
    from studies import config as configuration

    (series,), _ = read_series(configuration.load(place.settings), ["SP500"])
    windows = Windows(symbol="SP500", bars=series.bars, origins=tuple(range(300, 320)), horizon=horizon)
    evaluator = Evaluator(tiny_toto(), cache_bytes=0, rung=10, work=counter)
    return evaluator.measure(windows, PARAMS), evaluator


@pytest.mark.parametrize("horizon", [1, 40])
def test_work_is_what_torch_counts_of_all_and_changes_no_number(place: Place, horizon: int) -> None:
    """Every window here is of equal work: one of them stands for all."""
    plain, _ = measured(place, None, horizon=horizon)
    whole = forecasters.count_flop(lambda: measured(place, None, horizon=horizon))
    counter = WorkCounter()
    counted, evaluator = measured(place, counter, horizon=horizon)
    assert (counted.mae, counted.errors) == (plain.mae, plain.errors)
    assert sum(counter.flop.values()) == pytest.approx(whole, rel=0.05)
    assert (counter.flop["draw"] > 0) is (horizon > tiny_toto().free_draw_horizon)
    assert sum(evaluator.seconds.values()) > 0


def test_one_window_of_every_few_batches_is_counted_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "count_flop", lambda done: done())
    counter, done = WorkCounter(), []

    def again(ready: Any) -> int:
        done.append(ready)
        return 5

    for place in range(work.EVERY + 1):
        counter.add("encode", 10, lambda place=place: place, again)
    assert done == [0, work.EVERY]
    assert counter.flop == {"encode": 5 * 10 * (work.EVERY + 1)}


def test_a_profile_shows_rate_and_share() -> None:
    one = Profile(seconds={"encode": 1.0, "draw": 3.0}, flop={"encode": 2e9}, rate=4e9)
    both = profiling.joined([one, Profile(seconds={"encode": 1.0, "read": 0.5}, flop={"encode": 2e9}, rate=6e9)])
    assert both == Profile(seconds={"encode": 2.0, "draw": 3.0, "read": 0.5}, flop={"encode": 4e9}, rate=5e9)
    assert profiling.table(both).rows == [
        ("draw", "3.0 s", "54.5 %", "-", "-", "-"),
        ("encode", "2.0 s", "36.4 %", "4.0 GFLOP", "2.0 GFLOP/s", "40.0 %"),
        ("read", "0.5 s", "9.1 %", "-", "-", "-"),
    ]
    rate = forecasters.measure_matrix_product("cpu")
    assert rate is not None and rate > 1e8  # noqa: PT018 - for the type checker


def test_a_search_takes_the_scripts_variables_and_prints_its_profile(place: Place) -> None:
    place.settings.write_text(place.settings.read_text().replace('models = ["naive"]', 'models = ["toto"]'))
    place.environment |= ENVIRONMENT
    ended = place.run("launch-workers", "--symbols", "SP500", "--profile", "--plain")
    line = "from the environment, TRIALS: --trials 3; WORKERS: --cpus 1; MODEL: --models naive"
    assert ended.stderr.count(line) == 1
    assert "1 cpu worker;" in ended.stderr
    place.assert_exact(3, "SP500", model="naive")
    stages = [row.split()[0] for row in ended.stderr.split("stage ")[1].splitlines()[1:] if row.strip()]
    assert {"encode", "draw", "aggregate", "storage", "read", "idle", "other"} <= set(stages)


def test_options_go_before_variables(capsys: pytest.CaptureFixture[str]) -> None:
    def of_search(environment: dict[str, str], **given: Any) -> Any:
        default = {"trials": None, "cpus": None, "models": (), "devices_given": False}
        return switches.of_search(environment, **{**default, **given})

    assert of_search(ENVIRONMENT, trials=7, cpus=2, models=[("kronos",)]) == (7, 2, [("kronos",)])
    assert of_search(ENVIRONMENT, trials=7, models=[("kronos",)], devices_given=True) == (7, None, [("kronos",)])
    assert of_search({}) == (None, None, ())
    assert capsys.readouterr().err == ""
    for bad in ("many", "0", "-3", "1.5"):
        with pytest.raises(ConfigError, match=r"TRIALS=.* in the environment: expected a whole number from 1"):
            of_search({"TRIALS": bad})


def test_a_comparison_takes_the_scripts_variables(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"horizon": None, "windows": 250, "default": 64}
    environment = {"MARKETSIM_MAX_HORIZON": "7", "MARKETSIM_FAST_SIMULATE": "1"}
    assert switches.of_comparison(environment, **asked) == (7, 35)
    assert capsys.readouterr().err.splitlines() == [
        "from the environment, MARKETSIM_MAX_HORIZON: --horizon 7",
        "from the environment, MARKETSIM_FAST_SIMULATE: 35 windows and not 250",
    ]
    assert switches.of_comparison(environment, **{**asked, "horizon": 3, "windows": 30}) == (3, 30)
    assert switches.of_comparison({"MARKETSIM_FAST_SIMULATE": "0"}, **asked) == (64, 250)
    assert capsys.readouterr().err == ""
