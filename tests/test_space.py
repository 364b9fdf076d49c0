"""The search space and what a promoted file calls its params."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from forecasters.kronos_model import DEAD_TOP_P
from forecasters.toto_model import samples_per_batch
from studies import config as configuration
from studies import space as spaces


@pytest.fixture
def space() -> spaces.Space:
    return spaces.make("toto", configuration.load())


def test_a_trial_proposes_the_choices_and_carries_what_is_fixed(space: spaces.Space) -> None:
    study = optuna.create_study()
    params = space.suggest(study.ask())
    assert set(params) == {"aggregate", "num_samples", "context_length"}
    assert params["context_length"] == 4096
    assert space.contains(params)
    assert set(study.trials[0].params) == {"aggregate", "num_samples"}


def test_context_length_becomes_a_knob_where_it_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[toto]\ncontext_length = [512, 4096]\n")
    space = spaces.make("toto", configuration.load(path))
    assert space.knobs["context_length"] == (512, 4096)
    assert space.fixed == {}


def test_what_the_search_cannot_propose_is_not_contained(space: spaces.Space) -> None:
    params = {"aggregate": "mean", "num_samples": 64, "context_length": 4096}
    assert space.contains(params)
    assert not space.contains({**params, "num_samples": 48})
    assert not space.contains({**params, "context_length": 512})


@pytest.fixture
def kronos() -> spaces.Space:
    return spaces.make("kronos", configuration.load())


def test_kronos_searches_top_p_only_where_top_k_is_0(kronos: spaces.Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(60):
        trial = study.ask()
        params = kronos.suggest(trial)
        seen.add(params["top_k"] == 0)
        assert ("top_p" in trial.params) is (params["top_k"] == 0)
        assert (params["top_p"] == DEAD_TOP_P) is (params["top_k"] != 0)
        assert kronos.contains(params)
        assert kronos.searched(params) == trial.params
        assert kronos.complete(trial.params) == params
        assert round(params["clip"] * 5) == pytest.approx(params["clip"] * 5)
        study.tell(trial, 0.0)
    assert seen == {True, False}


def test_a_kronos_space_survives_json(kronos: spaces.Space) -> None:
    again = spaces.Space.from_json("kronos", json.loads(json.dumps(kronos.to_json())))
    assert again == kronos


def test_kronos_promoted_config_round_trip(kronos: spaces.Space) -> None:
    stored = {"temperature": 0.15, "top_p": 0.82, "top_k": 16, "sample_count": 208, "max_context": 224, "clip": 1.8}
    params = spaces.from_promoted(stored, {}, kronos)
    assert params == {**stored, "top_p": DEAD_TOP_P}  # dead beside top_k 16
    assert not kronos.contains(params)  # 208 samples are no choice: measured, not searched
    assert kronos.contains({**params, "sample_count": 224})
    assert not kronos.contains({**params, "sample_count": 224, "clip": 1.85})
    assert spaces.to_promoted(params, kronos, configuration.load()) == params
    for name in stored:
        with pytest.raises(ValueError, match=name):
            spaces.from_promoted({**stored, name: None}, {}, kronos)


def test_an_exact_objective_searches_no_number_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[search]\nobjective = "exact"\n')
    config = configuration.load(path)
    toto, kronos = spaces.make("toto", config), spaces.make("kronos", config)
    assert "num_samples" not in toto.knobs
    assert "sample_count" not in kronos.knobs
    assert spaces.to_promoted({"aggregate": "mean", "context_length": 4096}, toto, config)["num_samples"] == 4096
    params = {"temperature": 0.1, "top_k": 12, "top_p": 1.0, "max_context": 128, "clip": 2.0}
    assert spaces.to_promoted(params, kronos, config)["sample_count"] == 320


@pytest.mark.parametrize(
    "text",
    [
        "[windows]\nhorizon = 128\n",
        '[windows]\nhorizon = 7\n[search]\nobjective = "exact"\n',
        "[windows]\nhorizon = 64\n[kronos]\nnetwork_context = 64\n",
    ],
)
def test_horizons_that_kronos_has_no_answer_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(configuration.ConfigError, match=r"\[windows\] horizon .*--models toto"):
        spaces.make("kronos", configuration.load(path))


@pytest.mark.parametrize("num_samples", [1, 16, 48, 64, 96, 97, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 5000])
def test_samples_per_batch_divides(num_samples: int) -> None:
    batch = samples_per_batch(num_samples)
    assert num_samples % batch == 0
    assert batch <= 512


@pytest.mark.parametrize(
    ("num_samples", "batch"), [(64, 64), (128, 64), (256, 128), (768, 256), (1024, 256), (1536, 512), (4096, 512)]
)
def test_samples_per_batch_is_the_largest_of_its_tier(num_samples: int, batch: int) -> None:
    assert samples_per_batch(num_samples) == batch


def test_promoted_config_round_trip(space: spaces.Space) -> None:
    params = {"aggregate": "median", "num_samples": 768, "context_length": 4096}
    config = spaces.to_promoted(params, space, configuration.load())
    assert config == {"aggregate": "median", "num_samples": 768, "samples_per_batch": 256}
    assert spaces.from_promoted(config, {}, space) == params


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_samples": "64"},
        {"num_samples": 0},
        {"num_samples": True},
        {"num_samples": 64, "aggregate": "best_of_all"},
        {"num_samples": 64, "aggregate": 3},
    ],
)
def test_configurations_that_cannot_be_measured(space: spaces.Space, config: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        spaces.from_promoted(config, {}, space)


@pytest.mark.parametrize(
    ("said", "metadata", "length"),
    [
        ({"context_length": 512}, {"fixed": {"context_length": 1024}}, 512),
        ({}, {"fixed": {"context_length": 1024}}, 1024),
        ({}, {"fixed": None}, 4096),
        ({}, {}, 4096),
    ],
)
def test_a_promoted_file_is_measured_as_it_says(
    space: spaces.Space, said: dict[str, int], metadata: dict[str, object], length: int
) -> None:
    params = spaces.from_promoted({"num_samples": 64, **said}, metadata, space)
    assert params == {"aggregate": "mean", "num_samples": 64, "context_length": length}


def test_only_the_number_of_samples_may_be_filled_in(kronos: spaces.Space, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[search]\nobjective = "exact"\n[kronos]\nsample_count = [8, 24]\n')
    config = configuration.load(path)
    params = {"temperature": 0.1, "top_k": 12, "top_p": 1.0, "max_context": 128, "clip": 2.0}
    assert spaces.to_promoted(params, spaces.make("kronos", config), config)["sample_count"] == 24
    with pytest.raises(ValueError, match="kronos: a configuration without sample_count"):
        spaces.to_promoted(params, kronos, config)
    del params["clip"]
    with pytest.raises(ValueError, match="without clip"):
        spaces.to_promoted(params, spaces.make("kronos", config), config)
