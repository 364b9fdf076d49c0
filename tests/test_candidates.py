"""Which configurations a confirmation measures, beside those in use, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies import candidates
from studies import config as configuration
from studies import space as spaces
from studies.candidates import NEIGHBOURHOOD, distance
from studies.config import Config
from studies.space import Space

KRONOS = {"temperature": 0.1, "top_k": 16, "top_p": 1.0, "sample_count": 320, "max_context": 128, "clip": 5.0}


def settings(tmp_path: Path, text: str) -> Config:
    (tmp_path / "c.toml").write_text(text)
    return configuration.load(tmp_path / "c.toml")


def space_of(model: str, config: Config | None = None) -> Space:
    return spaces.make(model, config or configuration.load())


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("toto", "", {"aggregate": "median", "num_samples": 4096, "context_length": 4096}),
        ("toto", "[toto]\ncontext_length = 512", {"aggregate": "median", "num_samples": 4096, "context_length": 512}),
        ("toto", "[toto]\ncontext_length = [256, 1024, 8192]\nnum_samples = [64, 32]",
         {"aggregate": "median", "num_samples": 64, "context_length": 1024}),
        ("toto", "[search]\nobjective = 'exact'", {"aggregate": "median", "context_length": 4096}),
        ("kronos", "", {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "sample_count": 320, "max_context": 512,
                        "clip": 5.0}),
        # What is published counts, also where no such thing is searched.
        ("kronos", "[kronos]\nnetwork_context = 400\ntop_k = [12, 16]",
         {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "sample_count": 320, "max_context": 400, "clip": 5.0}),
    ],
)  # fmt: skip
def test_the_default_is_the_published_one_as_the_settings_allow_it(
    tmp_path: Path, model: str, text: str, expected: dict[str, Any]
) -> None:
    config = settings(tmp_path, text)
    assert spaces.default(space_of(model, config), config) == expected


def test_the_whole_grid_of_what_shares_its_draws_is_measured(tmp_path: Path) -> None:
    config = settings(tmp_path, "[toto]\ncontext_length = [256, 512]\nnum_samples = [64, 128]")
    space = space_of("toto", config)
    trials = [
        (7, {"aggregate": "mean", "num_samples": 64, "context_length": 256}),
        (3, {"aggregate": "mean", "num_samples": 128, "context_length": 256}),
        (9, {"aggregate": "quantile_0.10", "num_samples": 64, "context_length": 512}),
        (1, {"aggregate": "quantile_0.90", "num_samples": 64, "context_length": 256}),
        (2, {"aggregate": "quantile_0.90", "num_samples": 64, "context_length": 512}),
        (4, {"aggregate": "trimmed_mean_5", "num_samples": 128, "context_length": 256}),  # the sixth
    ]
    default = spaces.default(space, config)
    found = candidates.choose(space, trials, default)
    assert [one.trial for one in found[:5]] == [7, 3, 9, 1, 2]
    assert {one.source for one in found[:5]} == {"trial"}
    grid = {
        (one.params["aggregate"], one.params["context_length"]) for one in found if one.params["num_samples"] == 128
    }
    assert grid == {(name, length) for name in config.models["toto"].aggregates for length in (256, 512)}
    assert len(found) == 48 + 4  # the trials of 64 samples
    by_params = {tuple(one.params[name] for name in trials[0][1]): one for one in found}
    assert len(by_params) == len(found)
    assert by_params["trimmed_mean_5", 128, 256].trial == 4
    assert by_params["trimmed_mean_5", 128, 256].source == "grid"
    assert [one.params for one in found if one.source == "default"] == [default]


def test_the_exact_grid_has_no_number_of_samples(tmp_path: Path) -> None:
    config = settings(tmp_path, "[search]\nobjective = 'exact'")
    space = space_of("toto", config)
    trials = [(0, {"aggregate": "mean", "context_length": 4096})]
    found = candidates.choose(space, trials, spaces.default(space, config))
    assert len(found) == 24
    assert not any("num_samples" in one.params for one in found)


def test_without_a_trial_the_default_is_left() -> None:
    config = configuration.load()
    for model in ("toto", "kronos"):
        space = space_of(model)
        (only,) = candidates.choose(space, [], spaces.default(space, config))
        assert (only.source, only.trial) == ("default", None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0.0),
        ({"sample_count": 96}, 0.0),
        ({"temperature": 0.135}, 0.1),  # of 0.05 to 0.40
        ({"clip": 4.2}, 0.2),  # of 1 to 5
        ({"max_context": 192}, 0.25),  # the next of five
        ({"max_context": 224, "clip": 4.8}, 0.5),  # the larger of two
        ({"top_k": 20}, 0.125),  # the next of nine
        ({"top_k": 0, "top_p": 0.9}, 1.0),  # top_p counts beside only one of them
        ({"max_context": 512}, 1.0),  # beyond the longest, which is as far as the longest
    ],
)
def test_the_distance_is_the_largest_of_any_knob(change: dict[str, Any], expected: float) -> None:
    space, other = space_of("kronos"), {**KRONOS, **change}
    assert distance(space, KRONOS, other) == pytest.approx(expected)
    assert distance(space, other, KRONOS) == pytest.approx(expected)


def test_top_p_counts_where_both_draw_by_it() -> None:
    one, other = ({**KRONOS, "top_k": 0, "top_p": top_p} for top_p in (0.65, 0.80))
    assert distance(space_of("kronos"), one, other) == pytest.approx(0.5)


def test_names_differ_or_do_not() -> None:
    one, other = ({"aggregate": name, "num_samples": 64} for name in ("mean", "median"))
    assert distance(space_of("toto"), one, other) == 1.0
    assert distance(space_of("toto"), one, {**one, "num_samples": 128}) == 0.0


def test_trials_of_one_neighbourhood_are_confirmed_once() -> None:
    space, config = space_of("kronos"), configuration.load()
    changes: list[dict[str, Any]] = [
        {}, {"temperature": 0.11}, {"sample_count": 96}, {"clip": 4.6}, {"temperature": 0.2}, {"max_context": 320},
        {"clip": 3.0}, {"top_k": 48}, {"top_k": 0, "top_p": 0.9}, {"clip": 1.0},
    ]  # fmt: skip
    trials = [(number, {**KRONOS, **change}) for number, change in enumerate(changes)]
    default = spaces.default(space, config)
    portfolio = [
        {**KRONOS, "clip": 4.8},  # of the neighbourhood of the first trial
        {**default, "temperature": 0.99},  # of the default's
        {**KRONOS, "max_context": 192},
        {**KRONOS, "max_context": 192, "temperature": 0.11},  # of its predecessor's
        *({**KRONOS, "max_context": 224, "temperature": temperature} for temperature in (0.05, 0.13, 0.21, 0.29, 0.37)),
    ]
    found = candidates.choose(space, trials, default, portfolio)
    assert [one.trial for one in found if one.source == "trial"] == [0, 4, 5, 6, 7]
    others = [one.params for one in found if one.source == "portfolio"]
    assert others == [portfolio[place] for place in (2, 4, 5, 6, 7)]
    everyone = [one.params for one in found]
    assert [one.source for one in found][-1] == "default"
    assert all(
        distance(space, one, other) >= NEIGHBOURHOOD for k, one in enumerate(everyone) for other in everyone[k + 1 :]
    )


def test_the_cost_is_said_beforehand() -> None:
    other = {**KRONOS, "temperature": 0.3}
    found = candidates.cost("kronos", [KRONOS, other, {**KRONOS, "clip": 3.0}], windows=300, passes=16)
    assert str(found) == (
        "3 configurations on 300 windows: 300 x 2 = 600 encodings, each drawn from in up to 16 passes"
    )
    assert candidates.most_encodings(space_of("kronos"), in_use=2) == 5 + 5 + 2 + 1
    assert candidates.most_encodings(space_of("toto"), in_use=1) == 1 + 1 + 1
