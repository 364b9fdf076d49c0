"""The search space and what a promoted file calls its params."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

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
    assert space.choices["context_length"] == (512, 4096)
    assert space.fixed == {}


def test_what_the_search_cannot_propose_is_not_contained(space: spaces.Space) -> None:
    params = {"aggregate": "mean", "num_samples": 64, "context_length": 4096}
    assert space.contains(params)
    assert not space.contains({**params, "num_samples": 48})
    assert not space.contains({**params, "context_length": 512})


def test_the_fingerprint_follows_choices_and_their_order(space: spaces.Space) -> None:
    other = spaces.Space(model="toto", choices=space.choices, fixed={"context_length": 512})
    turned = spaces.Space(
        model="toto", choices={**space.choices, "num_samples": space.choices["num_samples"][::-1]}, fixed=space.fixed
    )
    assert len({space.fingerprint(), other.fingerprint(), turned.fingerprint()}) == 3


@pytest.mark.parametrize("num_samples", [1, 16, 48, 64, 96, 97, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 5000])
def test_samples_per_batch_divides(num_samples: int) -> None:
    batch = spaces.samples_per_batch(num_samples)
    assert num_samples % batch == 0
    assert batch <= 512


@pytest.mark.parametrize(
    ("num_samples", "batch"), [(64, 64), (128, 64), (256, 128), (768, 256), (1024, 256), (1536, 512), (4096, 512)]
)
def test_samples_per_batch_is_the_largest_of_its_tier(num_samples: int, batch: int) -> None:
    assert spaces.samples_per_batch(num_samples) == batch


def test_promoted_config_round_trip(space: spaces.Space) -> None:
    params = {"aggregate": "median", "num_samples": 768, "context_length": 4096}
    config = spaces.to_promoted("toto", params, space)
    assert config == {"aggregate": "median", "num_samples": 768, "samples_per_batch": 256}
    assert spaces.from_promoted("toto", config, space) == params


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
        spaces.from_promoted("toto", config, space)
