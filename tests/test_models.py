"""Models as data: the naive baseline and a toy go from settings to promotion without a line elsewhere."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from places import FOLDERS

import forecasters
from forecasters import Bars, ForecastError, StageParams, models, naive
from forecasters.descriptor import Condition, Knob, Model, Range, SearchedParams
from forecasters.settings import at_least, counts, setting
from launch import options
from objectives.windows import Windows, split
from studies import config as configuration
from studies import evaluators
from studies import space as spaces
from studies.demo import demo_bars

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PARAMS = {"season": 5, "context_length": 64, "num_samples": 200}


def bars(count: int = 300) -> Bars:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.01, count)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D")
    return Bars(timestamps=days, open=close, high=close, low=close, close=close, volume=None)


def windows(horizon: int = 1) -> Windows:
    return split(bars(), symbol="X", horizon=horizon, validation=12, test=5).validation


# ---- the naive baseline ----------------------------------------------------------------------------------------------


def test_naive_continues_a_season_back_with_residuals_of_the_past() -> None:
    forecaster, context = naive.load(), bars()
    encoded = forecaster.encode([context], PARAMS, 12)
    samples = forecaster.draw(encoded, PARAMS, [7])
    logs, season = np.log(context.close), PARAMS["season"]
    residuals = (logs[season:] - logs[:-season])[-PARAMS["context_length"] :]
    assert samples.shape == (1, 200, 12)
    history = np.concatenate([np.broadcast_to(logs[-season:], (200, season)), np.log(samples[0])], axis=1)
    steps = history[:, season:] - history[:, :-season]  # [S, H]
    assert np.abs(steps[..., None] - residuals).min(axis=-1).max() < 1e-12
    assert len(np.unique(steps.round(10))) > 50
    assert encoded.nbytes == models.MODELS["naive"].window_bytes(PARAMS, 12)  # pyright: ignore[reportOptionalCall]


def test_fewer_naive_samples_are_the_first_of_more_and_windows_keep_to_themselves() -> None:
    forecaster, contexts = naive.load(), [bars(), bars().slice(0, 200)]
    both = forecaster.draw(forecaster.encode(contexts, PARAMS, 7), PARAMS, [1, 2])
    alone = forecaster.encode(contexts[1:], PARAMS, 7)
    np.testing.assert_array_equal(forecaster.draw(alone, {**PARAMS, "num_samples": 30}, [2])[0], both[1, :30])
    assert not np.array_equal(forecaster.draw(alone, PARAMS, [3])[0], both[1])


@pytest.mark.parametrize("changed", [{"season": 300}, {"season": 0}, {"context_length": 0}])
def test_what_naive_cannot_encode(changed: Mapping[str, int]) -> None:
    with pytest.raises(ForecastError):
        naive.load().encode([bars()], {**PARAMS, **changed}, 1)


def test_a_price_that_is_not_positive_is_named() -> None:
    below = bars()
    below.close[-3] = -1.0
    with pytest.raises(ForecastError, match="not a positive number"):
        naive.load().encode([below], PARAMS, 1)


def test_naive_has_no_exact_answer(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[search]\nobjective = "exact"\n')
    with pytest.raises(configuration.ConfigError, match=r"naive has no exact answer.*--models toto,kronos"):
        spaces.make("naive", configuration.load(tmp_path / "c.toml"))


@pytest.mark.slow
def test_naive_is_searched_and_promoted(tmp_path: Path, database_url: str) -> None:
    demo_bars(tmp_path / "bars", ["SP500"])
    path = tmp_path / "bars" / "SP500.csv"
    path.write_text("\n".join([*path.read_text().splitlines()[:421], ""]))
    (tmp_path / "studies.toml").write_text(FOLDERS + "[windows]\nmin_context = 64\nconfirmation = 40\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STUDIES_STORAGE": database_url}

    def run(*words: str) -> str:
        command = [str(BIN / words[0]), *words[1:], "--config", str(tmp_path / "studies.toml")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, f"{words}: {ended.stdout}\n{ended.stderr}"
        return ended.stdout

    run("launch-workers", "--cpus", "1", "--models", "naive", "--trials", "4")
    run("promote", "--models", "naive")
    for folder in ("naive", "best"):
        promoted = json.loads((tmp_path / "hyperparams" / folder / "SP500.json").read_text())
        assert promoted["model"] == "naive"
        assert set(promoted["config"]) == set(models.MODELS["naive"].kinds)
        assert promoted["metadata"]["checkpoint"] == naive.Naive.fingerprint
    space = spaces.make("naive", configuration.load(tmp_path / "studies.toml"))
    assert space.contains(spaces.from_promoted(promoted["config"], promoted["metadata"], space))


# ---- a model of this test's own --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    """The table [toy]."""

    drift: tuple[float, ...]
    decay: tuple[float, ...]
    lookback: int = setting(at_least(1))
    paths: tuple[int, ...] = setting(counts)


def toy_search(settings: ToySettings) -> SearchedParams:
    knobs: dict[str, Knob] = {
        "drift": settings.drift,
        "decay": Range(low=settings.decay[0], high=settings.decay[1]),
        "paths": settings.paths,
    }
    return SearchedParams(knobs=knobs, fixed={"lookback": settings.lookback})


def toy_to_promoted(params: Mapping[str, Any], searched: Collection[str]) -> dict[str, Any]:
    return {name: params[name] for name in searched}


TOY = Model(
    name="toy",
    module=__name__,
    settings=ToySettings,
    params=StageParams(encode=("lookback",), draw=("drift", "decay", "paths"), num_samples="paths"),
    kinds={"drift": "number", "decay": "number", "paths": "count", "lookback": "count"},
    search=toy_search,
    conditions={"decay": Condition(param="drift", value=0.01, otherwise=1.0)},
    starting_points=({"drift": 0.01, "decay": 0.5, "paths": 8, "lookback": 3},),
    to_promoted=toy_to_promoted,
)


class Toy(naive.Naive):
    """Every path is the mean of the last closes, moved by the drift."""

    model, params = TOY.name, TOY.params

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = "close") -> Any:
        means = [context.close[-params["lookback"] :].mean() for context in contexts]
        return naive.EncodedSeasons(horizon=horizon, seasons=np.array(means)[:, None], residuals=())

    def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        level = encoded.seasons * (1 + params["drift"] * params["decay"])  # [W, 1]
        return np.broadcast_to(level[:, None], (len(seeds), params["paths"], encoded.horizon)).copy()


def load(*, device: str, running: forecasters.Running) -> Toy:
    del device, running
    return Toy()


def inspect(*, running: forecasters.Running) -> str:
    del running
    return "toy"


def test_a_toy_model_goes_from_settings_to_its_promoted_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "toy", TOY)  # type: ignore[arg-type]
    defaults = tmp_path / "defaults.toml"
    table = "\n[toy]\ndrift = [0.01, 0.02]\ndecay = [0.1, 0.9]\nlookback = 4\npaths = [4, 8]\n"
    defaults.write_text(configuration.DEFAULTS_PATH.read_text() + table)
    monkeypatch.setattr(configuration, "DEFAULTS_PATH", defaults)
    (tmp_path / "mine.toml").write_text("[toy]\nlookback = 3\n")
    config = configuration.load(tmp_path / "mine.toml")
    assert configuration.from_json(json.loads(json.dumps(configuration.to_json(config)))) == config

    space = spaces.make("toy", config)
    trial = optuna.create_study().ask()
    params = space.suggest(trial)
    assert space.contains(params)
    assert ("decay" in trial.params) is (params["drift"] == 0.01)

    assert evaluators.checkpoint_fingerprint(config, "toy") == "toy"
    forecaster = evaluators.load_forecaster(config, "toy", device="cpu")
    evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=2**20)
    test = windows()
    points = evaluator.forecast(test, params)
    expected = [c.close[-3:].mean() * (1 + params["drift"] * params["decay"]) for c in test.contexts(range(len(test)))]
    np.testing.assert_allclose(points[:, 0], expected)

    promoted = spaces.to_promoted(params, space, config)
    assert "lookback" not in promoted
    assert spaces.from_promoted(promoted, {"fixed": space.fixed}, space) == params
    assert spaces.from_promoted(promoted, {"fixed": {"lookback": 9}}, space)["lookback"] == 9


# ---- every model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(models.MODELS))
def test_starting_points_are_configurations_that_a_promoted_file_could_name(name: str) -> None:
    model, space = models.MODELS[name], spaces.make(name, configuration.load())
    for params in model.starting_points:
        assert spaces.from_promoted(params, {}, space) == params


def test_what_nobody_named_is_not_searched() -> None:
    assert configuration.load().search.models == options.BOTH == ("toto", "kronos")
    assert set(models.MODELS) - set(options.BOTH) == {"chronos2", "toto2", "naive"}


def test_no_module_but_a_model_s_own_names_a_model() -> None:
    own = {f"{name}_model.py" for name in models.MODELS} | {"naive.py", "train_tiny.py", "demo.py"}
    found = set()
    for package in ("forecasters", "objectives", "studies", "launch", "storage"):
        for path in (ROOT / package).rglob("*.py"):
            literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            if literals & set(models.MODELS) and path.name not in own:
                found.add(str(path.relative_to(ROOT)))
    # Every step of the history names the first two models: earlier versions read no step without them.
    assert found == {"storage/history.py"}
