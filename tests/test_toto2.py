"""Our network and its stages against the reference's stored answers (tests/goldens/toto2-a), and its use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from places import RunPlace
from safetensors.torch import load_file, save_file

import forecasters
from forecasters import KEYS, Bars, CheckpointError, ForecastError, Running, toto2
from forecasters.chronos2_encoded import COLUMNS
from objectives.evaluation import Evaluator
from objectives.metrics import measure_no_change
from objectives.windows import split
from studies import config as configuration
from studies import evaluators
from studies import space as spaces

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = GOLDENS / "toto2-a"
CASE = json.loads((GOLDEN / "case.json").read_text())
TABLE = pd.read_csv(GOLDENS / "chronos2-a" / "ohlcv.csv")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
ORIGIN, HORIZONS, PATCH = CASE["origin"], CASE["horizons"], 16
TOLERANCE = 2e-5  # of the context's standard deviation; asked for is 1e-4
LAST_BITS = 3e-7  # of a price in float32, between batches


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> toto2.Toto2:
    return toto2.load(str(GOLDEN))


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as file:
        return dict(file)


def column(name: str, bars: int) -> np.ndarray:
    return TABLE[name].to_numpy(np.float32)[ORIGIN - bars : ORIGIN]


def bars(count: int, origin: int = ORIGIN) -> Bars:
    table = TABLE.iloc[origin - count : origin]
    names = ("open", "high", "low", "close", "volume")
    columns = {name: table[name].to_numpy(np.float64).copy() for name in names}
    return Bars(timestamps=pd.to_datetime(table["timestamp"]).to_numpy("datetime64[ns]"), **columns)


def error(ours: np.ndarray, theirs: np.ndarray, group: np.ndarray) -> float:
    """The largest difference of [G, Q, H], ours sorted as the reference does, in standard deviations of each series."""
    assert ours.shape == theirs.shape
    spread = np.maximum(group.std(1), 1e-3)[:, None, None]
    return float((np.abs(np.sort(ours, 1) - theirs) / spread).max())


# --- the reference's answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", HORIZONS)
def test_one_series_matches_the_reference_alone_and_among_others(model: toto2.Toto2, expected, horizon: int):
    lengths = CASE["lengths"]
    assert {length % PATCH == 0 for length in lengths} == {True, False}
    assert min(lengths) == 1
    groups = [column("close", length)[None] for length in lengths]
    together = model.predict(groups, horizon)
    for group, length, among in zip(groups, lengths, together, strict=True):
        (alone,) = model.predict([group], horizon)
        assert error(alone, expected[f"u{length}_h{horizon}"][None], group) < TOLERANCE
        np.testing.assert_allclose(among, alone, rtol=LAST_BITS)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_groups_match_the_reference(model: toto2.Toto2, expected, horizon: int):
    groups = [np.stack([column(name, length) for name in CASE["group_columns"]]) for length in CASE["group_lengths"]]
    alone = column("close", 96)[None]
    *answers, single = model.predict([*groups, alone], horizon)  # at once: sizes must not be taken for each other
    for group, length, answer in zip(groups, CASE["group_lengths"], answers, strict=True):
        assert error(answer, expected[f"g{length}_h{horizon}"], group) < TOLERANCE
    assert error(single, expected[f"u96_h{horizon}"][None], alone) < TOLERANCE


def test_long_and_constant_contexts_match_the_reference(model: toto2.Toto2, expected):
    long = np.tile(column("close", ORIGIN), CASE["long"])[None]  # 120 patches, where xPos is far from 1
    for horizon in (1, 50):
        assert error(model.predict([long], horizon)[0], expected[f"long_h{horizon}"][None], long) < TOLERANCE
    value, count = CASE["constant"]
    constant = np.full((1, count), value, np.float32)
    np.testing.assert_allclose(np.sort(model.predict([constant], 17)[0], 1)[0], expected["constant_h17"], rtol=1e-6)


# --- the stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variates", COLUMNS)
def test_encode_says_of_bars_what_predict_says_of_their_series(model: toto2.Toto2, variates: str):
    params = {"context_length": 70, "variates": variates, "transform": "price"}
    for key in KEYS:
        columns = [name or key for name in COLUMNS[variates]]
        encoded = model.encode([bars(96), bars(80, 235)], params, 20, key)
        assert model.answers_together(params) == (set(encoded.keys) == set(KEYS))
        (answer,) = model.quantiles_keys(encoded, {}, [key])
        assert (answer.values.dtype, answer.values.shape) == (np.float64, (2, 20, 9))
        np.testing.assert_array_equal(answer.levels, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
        for place, window in enumerate((bars(70), bars(70, 235))):
            group = np.stack([getattr(window, name) for name in columns]).astype(np.float32)
            (raw,) = model.predict([group], 20)
            np.testing.assert_allclose(answer.values[place], np.sort(raw[columns.index(key)].T, -1), rtol=LAST_BITS)


def test_quantiles_need_no_network_and_say_the_same_each_time(model: toto2.Toto2):
    params = {"context_length": 4096, "variates": "ohlc", "transform": "log"}
    encoded = model.encode([bars(100)], params, 100)
    before = model.forwards
    first, second = model.quantiles(encoded, {}), model.quantiles_keys(encoded, {}, ["open", "close"])[1]
    assert np.array_equal(first.values, second.values)
    assert (np.diff(first.values, axis=-1) >= 0).all()
    assert model.forwards == before
    assert np.array_equal(model.encode([bars(100)], params, 100).values, encoded.values)


def test_scaled_prices_are_forecast_as_the_original_however_low(model: toto2.Toto2):
    """Without a scaling of ours, the reference's least scale of 1e-6 would be the whole context's."""
    window, params = bars(96), {"context_length": 96, "variates": "close", "transform": "price"}
    original = model.encode([window], params, 7).values
    for low in (2.0**-30, 1e-6):
        scaled = replace(window, **{key: getattr(window, key) * low for key in KEYS})
        assert np.abs(model.encode([scaled], params, 7).values / low - original).max() < 1e-5 * window.close.std()


def test_bad_input_gets_one_line_that_names_it(model: toto2.Toto2):
    window, params = bars(40), {"context_length": 32}
    holed = replace(window, close=np.where(np.arange(40) == 39, np.nan, window.close))
    for contexts, said, horizon, message in (
        ([], {}, 1, "no contexts"),
        ([window.slice(0, 0)], {}, 1, "a context of 0 bars"),
        ([holed], {}, 1, "close of .* is not a finite number"),
        ([replace(window, volume=None)], {"variates": "close+volume"}, 1, "no volume"),
        ([window], {"variates": "all"}, 1, "variates 'all'"),
        ([window], {}, 0, "horizon 0"),
    ):
        with pytest.raises(ForecastError, match=message):
            model.encode(contexts, {**params, **said}, horizon)


# --- loading, memory and compilation -----------------------------------------------------------------------------


def changed(folder: Path, **entries: Any) -> str:
    """A copy of the checkpoint whose config.json says something else; None: nothing."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    config = {**json.loads((GOLDEN / "config.json").read_text()), **entries}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"d_ff": None}, "the key 'd_ff' is missing"),
        ({"use_xpos": None}, "the key 'use_xpos' is missing"),
        ({"use_xpos": False}, "use_xpos is False, expected True"),
        ({"qk_norm": True}, "qk_norm is True, expected False"),
        ({"num_output_patches": 2}, "num_output_patches is 2, expected 1"),
        ({"num_groups": 1}, "num_groups is 1, expected num_heads"),
        ({"qk_dim": 6}, "qk_dim is 6, expected a multiple of 4"),
        ({"patch_size": 4}, "patch_size is 4, expected at least 8"),
        ({"layer_group_size": 3}, "layer_group_size is 3, expected a divisor of num_layers"),
        ({"num_variate_layers_per_group": 2}, "num_variate_layers_per_group is 2, expected fewer"),
        ({"norm_eps": "1e-4"}, "norm_eps is '1e-4', expected a positive number"),
        ({"num_layers": 6}, r"transformer.layers.4.* is missing"),
        ({"num_layers": 2}, "unexpected tensor transformer.layers.2"),
        ({"d_ff": 48}, "has shape .* expected"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, entries: dict[str, Any], message: str):
    source = changed(tmp_path, **entries)
    for refuse in (toto2.load, toto2.inspect):
        with pytest.raises(CheckpointError, match=message) as caught:
            refuse(source)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_shards_and_a_config_that_says_less_or_more_are_the_same_network(tmp_path: Path, model: toto2.Toto2):
    silent = ("num_groups", "qk_dim", "v_dim", "mlp_bias", "pre_norm", "dropout_p", "qk_norm_include_weight")
    source = changed(tmp_path, **dict.fromkeys(silent), residual_mult=None, library_name="toto2")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {f"model-0000{place + 1}-of-00002.safetensors": list(weights)[place::2] for place in range(2)}
    for name, tensors in parts.items():
        save_file({tensor: weights[tensor] for tensor in tensors}, tmp_path / name)
    index = {"weight_map": {tensor: name for name, tensors in parts.items() for tensor in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    group = column("close", 70)[None]
    np.testing.assert_array_equal(toto2.load(source).predict([group], 20), model.predict([group], 20))


def test_the_fingerprint_is_of_the_weights_and_the_dtype(tmp_path: Path, model: toto2.Toto2):
    assert toto2.inspect(str(GOLDEN)) == model.fingerprint
    assert toto2.inspect(str(GOLDEN), running=Running(dtype="bfloat16")) != model.fingerprint
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    weights = load_file(GOLDEN / "model.safetensors")
    weights["transformer.layers.0.attn_tau"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert toto2.inspect(str(tmp_path)) != model.fingerprint


def test_in_bfloat16_only_the_network_is(model: toto2.Toto2):
    narrow = toto2.load(str(GOLDEN), running=Running(dtype="bfloat16"))
    assert narrow.network.dtype == torch.bfloat16
    group = column("close", 96)[None]
    difference = error(narrow.predict([group], 1)[0], np.sort(model.predict([group], 1)[0], 1), group)
    assert 1e-4 < difference < 0.2


def test_what_does_not_fit_the_memory_is_run_in_halves(model: toto2.Toto2, monkeypatch: pytest.MonkeyPatch):
    small = toto2.Toto2(model.network, fingerprint="")
    small._batch_tokens = 1 << 20
    windows, params = [bars(96, 200 + place) for place in range(8)], {"context_length": 96, "variates": "ohlc"}
    whole, sizes, answer = model.encode(windows, params, 1).values, [], small.network.answer
    limit = 2

    def short(series, ends, ahead):
        sizes.append(len(series))
        if len(series) > limit:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return answer(series, ends, ahead)

    monkeypatch.setattr(small.network, "answer", short)
    np.testing.assert_allclose(small.encode(windows, params, 1).values, whole, rtol=LAST_BITS)
    assert sizes == [8, 4, 2, 2, 2, 2]
    limit = 0
    with pytest.raises(ForecastError, match="out of memory on cpu with one window of 4 series of 96 points"):
        small.encode(windows, params, 1)


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(600),
                pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, g++ or clang++"),
            ],
        ),
    ],
)
def test_compiled_it_says_the_same_with_one_graph_a_shape(
    tmp_path: Path, model: toto2.Toto2, no_graphs: None, backend: str
):
    running = Running(compile_mode="default", compile_backend=backend, compile_dir=str(tmp_path), chunk=3)
    compiled = toto2.load(str(GOLDEN), running=running)
    for variates, graphs in (("close", 1), ("ohlcv", 2)):
        params = {"context_length": 96, "variates": variates, "transform": "price"}
        for count in (1, 5):
            windows = [bars(80 + 3 * place) for place in range(count)]  # of five patches, run as six
            ours, theirs = (each.encode(windows, params, 20).values for each in (compiled, model))
            np.testing.assert_allclose(ours, theirs, rtol=LAST_BITS)
        assert (compiled.graphs.count, compiled.graphs.recompilations) == (graphs, 0)
    assert compiled.compilation == "default"


# --- use ---------------------------------------------------------------------------------------------------------


class Place(RunPlace):
    SETTINGS = RunPlace.SETTINGS + f'[toto2]\ncheckpoint = "{GOLDEN}"\ncontext_length = [64, 256]\n'
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 420}


def test_a_checkpoint_in_a_folder_is_loaded_by_name_and_measured():
    forecaster = forecasters.load("toto2", checkpoint=str(GOLDEN))
    evaluator = Evaluator(forecaster, cache_bytes=2**20)  # type: ignore[arg-type]
    windows = split(bars(ORIGIN), symbol="X", horizon=3, validation=12, test=5).validation
    params = {"context_length": 64, "variates": "close", "transform": "price", "aggregate": "median"}
    measured = evaluator.measure(windows, params)
    found = forecaster.quantiles(  # type: ignore[attr-defined]
        forecaster.encode(windows.contexts(range(12)), params, 3), {}
    )
    np.testing.assert_array_equal(evaluator.forecast(windows, params), found.values[..., 4])
    forwards = forecaster.forwards
    assert evaluator.measure(windows, {**params, "aggregate": "trimmed_mean_10"}).mae != measured.mae
    still = evaluator.measure(windows, {**params, "shrink": 0.0})
    assert (still.skill, still.mae) == (0.0, measure_no_change(windows))
    assert forecaster.forwards == forwards  # of quantiles that are kept, the network says nothing more


@pytest.mark.slow
def test_toto2_is_searched_and_promoted(place: Place):
    place.search("toto2")
    ended = place.run("launch-workers", "--cpus", "1", "--models", "toto2", "--trials", "3")
    assert ended.returncode == 0
    place.assert_exact(3, "SP500")
    (row,) = place.promote("--force")
    assert row["decision"] == "promoted"
    promoted = json.loads(place.promoted_file("SP500", "best").read_text())
    assert promoted["model"] == "toto2"
    config = configuration.load(place.settings)
    space = spaces.make("toto2", config)
    assert space.contains(spaces.from_promoted(promoted["config"], promoted["metadata"], space))
    assert promoted["metadata"]["checkpoint"] == evaluators.checkpoint_fingerprint(config, "toto2")
