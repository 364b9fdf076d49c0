"""What a promoted file says of Chronos-2, ours and the predecessor's, and what a search of it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import FOLDERS

from forecasters.models import MODELS
from studies import candidates, history_errors
from studies import config as configuration
from studies import space as spaces
from studies.config import Config, ConfigError
from studies.space import Space

LEVELS = [0.1, 0.5, 0.9]
# Forms of the predecessor's files, by when they were written.
FIRST = {
    "name": "chronos2_ctx512_bs128_val20_test20", "model_id": "amazon/chronos-2", "device_map": "cuda",
    "context_length": 512, "prediction_length": 1, "quantile_levels": LEVELS, "batch_size": 128,
}  # fmt: skip
LATER = {
    "name": "hourly_ctx2048_skip1_single", "model_id": "amazon/chronos-2", "device_map": "cuda", "context_length": 2048,
    "batch_size": 32, "quantile_levels": LEVELS, "aggregation": "median", "sample_count": 0, "scaler": "meanstd",
    "predict_kwargs": {}, "skip_rates": [1], "aggregation_method": "single", "use_multivariate": False,
}  # fmt: skip
READ = {"aggregate": "median", "variates": "ohlc", "transform": "price", "calendar": "days"}


def settings(tmp_path: Path, text: str = "") -> Config:
    path = tmp_path / "studies.toml"
    path.write_text(FOLDERS + text)
    return configuration.load(path)


def space_of(tmp_path: Path, text: str = "") -> tuple[Config, Space]:
    config = settings(tmp_path, text)
    return config, spaces.make("chronos2", config)


@pytest.mark.parametrize(
    ("config", "metadata", "read", "lost"),
    [
        (FIRST, {}, {**READ, "context_length": 512}, ()),
        ({"context_length": 512}, {}, {**READ, "context_length": 512}, ()),
        ({**FIRST, "model_id": "chronos2"}, {}, {**READ, "context_length": 512}, ()),
        (LATER, {"preaug_strategy": "percent_change"}, {**READ, "context_length": 2048}, ()),
        # Read without a calendar, and as logarithms less the first one.
        (
            {**LATER, "use_multivariate": True},
            {"preaug_strategy": "log_returns"},
            {"aggregate": "median", "variates": "ohlc", "transform": "log", "context_length": 2048},
            (),
        ),
        ({**LATER, "aggregation": "mean"}, {}, {**READ, "aggregate": "mean", "context_length": 2048}, ()),
        (
            {**LATER, "skip_rates": [1, 2], "sample_count": 64, "predict_kwargs": {"predict_batches_jointly": True},
             "model_id": "chronos2_finetuned/btc/finetuned-ckpt"},
            {"preaug_strategy": "detrending"},
            {**READ, "context_length": 2048},
            ("sample_count", "predict_kwargs", "skip_rates", "preaug_strategy detrending",
             "the weights of another model_id"),
        ),
    ],
)  # fmt: skip
def test_the_predecessors_files_are_read(
    tmp_path: Path, config: dict[str, Any], metadata: dict[str, Any], read: dict[str, Any], lost: tuple[str, ...]
) -> None:
    for text in ("", '[chronos2]\nvariates = "close+volume"\ncontext_length = [128, 256]\nshrink = [0.0, 1.0]\n'):
        _, space = space_of(tmp_path, text)
        shrink = {"shrink": 1.0} if "shrink" in space.knobs else {}
        assert spaces.from_promoted(config, metadata, space) == {**read, **shrink}  # whatever the settings ask for
    foreign = MODELS["chronos2"].foreign(config, metadata)
    assert foreign is not None
    assert foreign.lost == lost


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({**FIRST, "context_length": "512"}, "context_length '512' is not a whole number above 0"),
        ({**LATER, "aggregation": "mode"}, "unknown aggregate 'mode'"),
        ({**FIRST, "aggregate": "mean", "variates": "bids"}, "variates 'bids' is none of close"),
        ({"aggregate": "mean", "shrink": 1.5}, "shrink 1.5 is not a number from 0 to 1"),
        ({"aggregate": "mean", "calendar": "weeks"}, "calendar 'weeks' is none of bars, days"),
    ],
)
def test_files_that_cannot_be_measured_say_why(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    _, space = space_of(tmp_path)
    with pytest.raises(ValueError, match=problem):
        spaces.from_promoted(config, {}, space)


def test_our_files_are_read_as_they_were_measured_and_hold_what_todays_readers_ask_for(tmp_path: Path) -> None:
    text = '[chronos2]\nvariates = ["close", "ohlc"]\nshrink = [0.0, 0.5, 1.0]\ncontext_length = 256\n'
    config, space = space_of(tmp_path, text)
    params = {
        "aggregate": "trimmed_mean_10", "shrink": 0.5, "context_length": 256, "variates": "ohlc", "transform": "price",
    }  # fmt: skip
    assert space.contains(params)
    promoted = json.loads(json.dumps(spaces.to_promoted(params, space, config)))
    assert spaces.from_promoted(promoted, {"fixed": dict(space.fixed)}, space) == params
    elsewhere = space_of(tmp_path)[1]  # of other settings
    assert spaces.from_promoted(promoted, {"fixed": dict(space.fixed)}, elsewhere) == params
    assert set(FIRST) - {"device_map"} <= set(promoted)
    assert (promoted["model_id"], promoted["prediction_length"]) == ("amazon/chronos-2", 1)
    his = {**READ, "context_length": 512}
    assert spaces.from_promoted(spaces.to_promoted(his, elsewhere, config), {}, elsewhere) == his


def test_a_search_asks_what_the_settings_ask(tmp_path: Path) -> None:
    config, space = space_of(tmp_path)
    assert (list(space.knobs), space.fixed) == (
        ["aggregate"],
        {"context_length": 512, "variates": "close", "transform": "price"},
    )
    expected = {"aggregate": "median", "context_length": 512, "variates": "close", "transform": "price"}
    assert spaces.default(space, config) == expected
    assert spaces.most_samples("chronos2", config) == 0
    assert "chronos2" not in config.search.models  # nobody asked for its weights

    text = '[chronos2]\nvariates = ["ohlc", "ohlcv"]\ntransform = "log"\nshrink = [0.0, 0.5]\n'
    text += "context_length = [64, 9999]\n"
    config, space = space_of(tmp_path, text)
    assert list(space.knobs) == ["aggregate", "shrink", "context_length", "variates"]
    default = spaces.default(space, config)
    assert default == {
        "aggregate": "median", "shrink": 0.5, "context_length": 64, "variates": "ohlc", "transform": "log",
    }  # fmt: skip
    assert space.contains(default)
    assert "calendar" not in space.knobs
    # Everything that is made of one encoding is confirmed: the aggregates times the shares.
    assert candidates.shared_knobs(space) == ["aggregate", "shrink"]
    found = candidates.choose(space, [(3, default)], default)
    assert len(found) == len(config.models["chronos2"].aggregates) * 2


def test_a_replay_tries_every_aggregate_with_every_share(tmp_path: Path) -> None:
    config, space = space_of(tmp_path, "[chronos2]\nshrink = [0.0, 1.0]\n")
    found = history_errors.candidates_of(config, space, [])
    assert len({json.dumps(dict(one.params)) for one in found}) == len(config.models["chronos2"].aggregates) * 2
    assert all(space.contains(one.params) for one in found)


def test_the_exact_objective_asks_the_same(tmp_path: Path) -> None:
    for horizon in (1, 30):
        exact = f'search.objective = "exact"\nwindows.horizon = {horizon}\n'
        assert space_of(tmp_path, exact)[1] == space_of(tmp_path, f"windows.horizon = {horizon}\n")[1]


@pytest.mark.parametrize("text", ["shrink = 1.5", "shrink = [0.5, 0.5]", 'variates = "bids"', "context_length = 0"])
def test_settings_that_mean_nothing_are_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[chronos2\] \w+ = .*: must be"):
        settings(tmp_path, f"[chronos2]\n{text}\n")


def test_every_param_is_one_of_the_stages_or_made_of_them() -> None:
    model = MODELS["chronos2"]
    assert set(model.kinds) - {*model.params.encode, *model.params.draw} == {"aggregate", "shrink"}
