"""Our network and its stages against the reference's stored answers (tests/goldens/chronos2-a)."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import forecasters
from forecasters import KEYS, Bars, CheckpointError, ForecastError, Running, chronos2, chronos2_checkpoint
from forecasters.chronos2_encoded import COLUMNS, in_price
from forecasters.chronos2_model import TRANSFORMS
from forecasters.chronos2_network import Chronos2Network

GOLDEN = Path(__file__).parent / "goldens" / "chronos2-a"
CASE = json.loads((GOLDEN / "case.json").read_text())
TABLE = pd.read_csv(GOLDEN / "ohlcv.csv")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
ORIGIN, HORIZONS, PATCH = CASE["origin"], CASE["horizons"], 16
TOLERANCE = 1e-4  # of the context's standard deviation
UNROLLED_TOLERANCE = 1e-3  # the reference weighs in float32
LAST_BITS = 3e-7  # of a price in float32, between batches


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> chronos2.Chronos2:
    loaded = forecasters.load("chronos2", checkpoint=str(GOLDEN))
    assert isinstance(loaded, chronos2.Chronos2)
    return loaded


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as file:
        return dict(file)


def column(name: str, bars: int, origin: int = ORIGIN) -> np.ndarray:
    return TABLE[name].to_numpy(np.float32)[origin - bars : origin]


def bars(count: int, origin: int = ORIGIN) -> Bars:
    table = TABLE.iloc[origin - count : origin]
    names = ("open", "high", "low", "close", "volume")
    columns = {name: table[name].to_numpy(np.float64).copy() for name in names}
    return Bars(timestamps=pd.to_datetime(table["timestamp"]).to_numpy("datetime64[ns]"), **columns)


def error(ours: np.ndarray, theirs: np.ndarray, series: list[np.ndarray]) -> float:
    """The largest difference of [series, Q, H] in standard deviations of each series."""
    assert ours.shape == theirs.shape
    spread = np.array([np.nanstd(each) for each in series])[:, None, None]
    return float((np.abs(ours - theirs) / spread).max())


# --- the reference's answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", HORIZONS)
def test_one_series_matches_the_reference_alone_and_among_others(model: chronos2.Chronos2, expected, horizon: int):
    lengths = CASE["lengths"]
    series = [column("close", length) for length in lengths]
    together = model.predict(series, horizon)
    for place, length in enumerate(lengths):
        alone = model.predict([series[place]], horizon)
        assert error(alone, expected[f"u{length}_h{horizon}"][None], [series[place][-160:]]) < TOLERANCE / 4
        np.testing.assert_allclose(together[place], alone[0], rtol=LAST_BITS)


def test_short_holed_and_constant_contexts_match_the_reference(model: chronos2.Chronos2, expected):
    cut = column("close", 35)
    assert error(model.predict([cut], 1), expected["u200_cut35_h1"][None], [cut]) < TOLERANCE / 4
    holes = column("close", CASE["lengths"][1]).copy()
    holes[len(holes) - expected["holes_before_origin"]] = np.nan
    for horizon in HORIZONS:
        assert error(model.predict([holes], horizon), expected[f"holes_h{horizon}"][None], [holes]) < TOLERANCE / 4
    value, count = CASE["constant"]
    constant = np.full(count, value, np.float32)
    np.testing.assert_allclose(model.predict([constant], 1)[0], expected["constant_h1"], rtol=1e-6)
    np.testing.assert_allclose(model.predict([column("close", 1)], 1)[0], expected["one_bar_h1"], rtol=1e-6)


@pytest.mark.parametrize("length", CASE["group_lengths"])
def test_groups_match_the_reference(model: chronos2.Chronos2, expected, length: int):
    series = [column(name, length) for name in CASE["group_columns"]]
    for horizon in HORIZONS:
        ours = model.predict(series, horizon, groups=[7] * 5)
        assert error(ours, expected[f"g{length}_h{horizon}"], series) < TOLERANCE / 4
    assert error(model.predict(series[:2], 1, groups=[0, 0]), expected[f"g2_{length}_h1"], series[:2]) < TOLERANCE / 4
    # Groups of other sizes beside it, their series in between
    mixed = model.predict([series[0], series[0], *series[1:]], 1, groups=[1, 0, 1, 1, 1, 1])
    assert error(mixed[[0, 2, 3, 4, 5]], expected[f"g{length}_h1"], series) < TOLERANCE / 4
    assert error(mixed[[1]], expected[f"u{length}_h1"][None], series[:1]) < TOLERANCE / 4


def test_contexts_of_other_lengths_and_covariates_match_the_reference(model: chronos2.Chronos2, expected):
    cross = [column("close", count, origin) for count, origin in CASE["cross"]]
    length = CASE["group_lengths"][0]
    close, *past = (column(name, length) for name in ("close", *CASE["past_covariates"]))
    weekday = expected["known"]
    for horizon in HORIZONS:
        ours = model.predict(cross, horizon, groups=[0, 0, 0])
        assert error(ours, expected[f"cross_h{horizon}"], cross) < TOLERANCE / 4
        ours = model.predict([*past, close], horizon, groups=[0, 0, 0])[2:]
        assert error(ours, expected[f"past_h{horizon}"][None], [close]) < TOLERANCE / 4
        known = [None, None, None, weekday[ORIGIN : ORIGIN + horizon]]
        series = [*past, close, weekday[ORIGIN - length : ORIGIN]]
        ours = model.predict(series, horizon, groups=[0] * 4, known=known)[2:3]
        assert error(ours, expected[f"known_h{horizon}"][None], [close]) < TOLERANCE / 4


@pytest.mark.parametrize("most", [1, 2])
def test_horizons_beyond_one_pass_match_the_reference(model: chronos2.Chronos2, expected, most: int):
    names = CASE["group_columns"]
    series = [column(name, 96) for name in names]
    # At once: the paths of two groups and of two sizes must not be taken for each other.
    ours = model.predict([series[0], *series], 64, groups=[0, *[1] * 5], max_output_patches=most)
    assert error(ours[:1], expected[f"u96_unrolled{most}_h64"][None], series[:1]) < UNROLLED_TOLERANCE
    assert error(ours[1:], expected[f"g96_unrolled{most}_h64"], series) < UNROLLED_TOLERANCE


def test_known_covariates_go_on_as_they_are_beyond_one_pass(model: chronos2.Chronos2, expected):
    close, *past = (column(name, 96) for name in ("close", *CASE["past_covariates"]))
    weekday = expected["known"]
    series = [*past, close, weekday[ORIGIN - 96 : ORIGIN]]
    known = [None, None, None, weekday[ORIGIN : ORIGIN + 64]]
    ours = model.predict(series, 64, groups=[0] * 4, known=known, max_output_patches=2)[2:3]
    assert error(ours, expected["known_unrolled2_h64"][None], [close]) < UNROLLED_TOLERANCE


def test_other_levels_lie_between_those_of_the_head(model: chronos2.Chronos2, expected):
    close = column("close", 96)
    ours = model.predict([close], 7, levels=list(expected["levels"]))[0].T
    assert np.abs(ours - expected["u96_levels_h7"]).max() / close.std() < TOLERANCE / 4


def test_what_the_network_reads_and_its_hidden_state_match_the_reference(model: chronos2.Chronos2, expected):
    series = torch.full((1, 80), torch.nan)
    series[0, 10:] = torch.from_numpy(column("close", 70).copy())
    with torch.inference_mode():
        tokens = model.network.tokens(series, torch.full((1, PATCH), torch.nan))
        every = model.network.hidden(tokens, 1, 1, last=7)
        last = model.network.hidden(tokens, 1, 1, last=1)
    np.testing.assert_allclose(tokens.patches[0, :5], expected["u70_patches"], atol=1e-5)
    np.testing.assert_allclose([tokens.loc.item(), tokens.scale.item()], expected["u70_loc_scale"], rtol=1e-6)
    np.testing.assert_allclose(every[0], expected["u70_hidden"], atol=5e-5)
    np.testing.assert_allclose(last[0], every[0, -1:], atol=1e-6)


def test_a_series_alone_needs_only_the_product_of_two_matrices(model: chronos2.Chronos2):
    plain = Chronos2Network(model.network.config)
    plain.load_state_dict(model.network.state_dict())
    series, known = torch.from_numpy(column("close", 96).copy())[None, None], torch.full((1, 1, PATCH), torch.nan)
    with torch.inference_mode():
        np.testing.assert_allclose(plain.answer(series, known), model.network.answer(series, known), rtol=LAST_BITS)


# --- the stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variates", COLUMNS)
def test_encode_says_of_bars_what_predict_says_of_their_series(model: chronos2.Chronos2, variates: str):
    params = {"context_length": 70, "variates": variates, "transform": "price"}
    encoded, answer = None, None
    for key in KEYS:
        columns = [name or key for name in COLUMNS[variates]]
        encoded = model.encode([bars(96), bars(90, 235)], params, 7, key)
        assert model.answers_together(params) == (set(encoded.keys) == set(KEYS))
        (answer,) = model.quantiles_keys(encoded, {}, [key])
        for place, origin in enumerate((240, 235)):
            series = [column(name, 70, origin) for name in columns]
            raw = model.predict(series, 7, groups=[0] * len(columns))[columns.index(key)]
            np.testing.assert_allclose(answer.values[place], np.sort(raw.T, -1), rtol=LAST_BITS)
    assert encoded is not None
    assert answer is not None
    assert np.array_equal(answer.levels, model.levels)
    assert (answer.values.dtype, answer.values.shape) == (np.float64, (2, 7, 21))
    assert encoded.nbytes < 2 * 4 * 7 * 21 * 4 + 200


def test_quantiles_need_no_network_and_say_the_same_each_time(model: chronos2.Chronos2):
    params = {"context_length": 512, "variates": "ohlc", "transform": "log"}
    encoded = model.encode([bars(100)], params, 100)  # unrolled: the checkpoint's passes have 64 steps
    before = model.forwards
    first, second = model.quantiles(encoded, {}), model.quantiles_keys(encoded, {}, ["open", "close"])[1]
    assert np.array_equal(first.values, second.values)
    assert (np.diff(first.values, axis=-1) >= 0).all()
    assert model.forwards == before
    assert model.free_draw_horizon >= 100
    assert np.array_equal(model.encode([bars(100)], params, 100).values, encoded.values)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_window_says_the_same_alone_and_among_windows_of_other_lengths(model: chronos2.Chronos2, transform: str):
    windows = [bars(count) for count in (200, 40, 3, 96)]
    for variates in ("close", "ohlcv"):
        params = {"context_length": 160, "variates": variates, "transform": transform}
        together = model.encode(windows, params, 20).values
        for place, window in enumerate(windows):
            alone = model.encode([window], params, 20).values
            np.testing.assert_allclose(together[place], alone[0], rtol=LAST_BITS)


@pytest.mark.parametrize("variates", COLUMNS)
def test_bars_after_an_origin_move_no_forecast_of_it_as_a_group_of_origins_would(
    model: chronos2.Chronos2, variates: str
):
    earlier, later = bars(96, 230), bars(96, 240)
    planted = replace(later, **{name: getattr(later, name).copy() for name in (*KEYS, "volume")})
    for name in (*KEYS, "volume"):
        getattr(planted, name)[-10:] *= 1.5  # the bars after the first origin
    params = {"context_length": 96, "variates": variates, "transform": "price"}
    without, with_it = (model.encode([earlier, each], params, 1).values for each in (later, planted))
    assert np.array_equal(without[0], with_it[0])
    assert not np.array_equal(without[1], with_it[1])
    leaks = [model.predict([earlier.close, each.close], 1, groups=[0, 0])[0] for each in (later, planted)]
    assert np.abs(leaks[0] - leaks[1]).max() > 1e-3 * earlier.close.std()


def test_scaled_prices_are_forecast_as_the_original_however_low(model: chronos2.Chronos2):
    window = bars(96)
    low = replace(window, **{key: getattr(window, key) / 1e6 for key in KEYS})
    for transform in TRANSFORMS:
        params = {"context_length": 96, "variates": "ohlcv", "transform": transform}
        ours, theirs = (model.encode([each], params, 7).values for each in (low, window))
        assert np.abs(ours * 1e6 - theirs).max() < 1e-4 * window.close.std()


def test_transforms_are_undone(model: chronos2.Chronos2):
    window, length = bars(97), {"context_length": 96, "variates": "close"}
    logs = np.log(window.close[-96:])
    raw = model.predict([logs - logs[-1]], 7)[0]
    got = model.quantiles(model.encode([window], {**length, "transform": "log"}, 7), {}).values[0]
    np.testing.assert_allclose(got, np.exp(np.sort(raw.T, -1)) * window.close[-1], rtol=1e-5)
    raw = model.predict([np.diff(window.close)], 7)[0]
    got = model.quantiles(model.encode([window], {**length, "transform": "differences"}, 7), {}).values[0]
    np.testing.assert_allclose(got[0], window.close[-1] + np.sort(raw[:, 0]), rtol=1e-5)
    median = window.close[-1] + np.cumsum(np.sort(raw, 0)[10])
    np.testing.assert_allclose(got[:, 10], median, rtol=1e-5)


def test_summed_differences_are_exact_for_independent_normal_steps():
    levels, scales = np.array([0.1, 0.25, 0.5, 0.9]), np.array([1.0, 2.0, 2.0])
    normal = np.array([-1.2816, -0.6745, 0.0, 1.2816])
    got = in_price(normal[:, None] * scales + 0.5, 100.0, "differences", levels)
    for step, deviation in enumerate((1, np.sqrt(5), 3)):
        np.testing.assert_allclose(got[step], 100 + 0.5 * (step + 1) + deviation * normal)


def test_bad_input_gets_one_line_that_names_it(model: chronos2.Chronos2):
    window, params = bars(40), {"context_length": 32}
    holed = replace(window, close=np.where(np.arange(40) == 39, np.nan, window.close))
    negative = replace(window, low=np.where(np.arange(40) == 39, -1.0, window.low))
    for contexts, said, horizon, message in (
        ([], {}, 1, "no contexts"),
        ([window.slice(0, 0)], {}, 1, "a context of 0 bars"),
        ([window.slice(0, 1)], {"transform": "differences"}, 1, "a context of 1 bars"),
        ([holed], {}, 1, "close of .* is not a finite number"),
        ([negative], {"variates": "ohlc", "transform": "log"}, 1, "the low of .* has no logarithm"),
        ([replace(window, volume=None)], {"variates": "close+volume"}, 1, "no volume"),
        ([window], {"variates": "all"}, 1, "variates 'all'"),
        ([window], {"transform": "root"}, 1, "transform 'root'"),
        ([window], {}, 0, "horizon 0"),
    ):
        with pytest.raises(ForecastError, match=message):
            model.encode(contexts, {**params, **said}, horizon)
    close = window.close
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"known": [np.zeros(3)]}, "known values must be 1"),
        ({"groups": [0, 1]}, "1 series, 2 groups"),
        ({"levels": [1.0]}, "levels"),
        ({"max_output_patches": 0}, "max_output_patches 0"),
    ]
    for options, message in wrong:
        with pytest.raises(ForecastError, match=message):
            model.predict([close], 1, **options)
    with pytest.raises(ForecastError, match="infinite"):
        model.predict([np.array([1.0, np.inf])], 1)


# --- loading, memory and compilation -----------------------------------------------------------------------------


def changed(folder: Path, change) -> str:
    """A copy of the checkpoint whose config.json was changed."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    config = json.loads((GOLDEN / "config.json").read_text())
    change(config, config["chronos_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, f: c.pop("d_kv"), "the key 'd_kv' is missing"),
        (lambda c, f: c.update(rope_scaling=2), "unknown key 'rope_scaling'"),
        (lambda c, f: c.update(is_gated_act=True), "is_gated_act is True, expected False"),
        (lambda c, f: c.update(d_kv=7), "d_kv is 7, expected an even number"),
        (lambda c, f: c.update(num_layers=3), "encoder.block.2.* is missing"),
        (lambda c, f: c.update(num_layers=1), "unexpected tensor encoder.block.1"),
        (lambda c, f: c.update(d_ff=32), "has shape .* expected"),
        (lambda c, f: f.pop("quantiles"), "chronos_config has no 'quantiles'"),
        (lambda c, f: f.update(patches=1), "unknown key 'patches' in chronos_config"),
        (lambda c, f: f.update(use_reg_token=False), "use_reg_token is False, expected True"),
        (lambda c, f: f.update(output_patch_size=8), "output_patch_size is 8, expected input_patch_size"),
        (lambda c, f: f.update(quantiles=[0.5, 0.1]), "quantiles is .* expected ascending"),
        (lambda c, f: f.update(context_length="160"), "context_length is '160', expected a positive whole number"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change, message: str):
    source = changed(tmp_path, change)
    for refuse in (chronos2.load, chronos2_checkpoint.inspect):
        with pytest.raises(CheckpointError, match=message) as caught:
            refuse(source)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_config_leaves_out_is_as_the_reference_takes_it(tmp_path: Path, model: chronos2.Chronos2):
    def change(config, forecast):
        for key in ("layer_norm_epsilon", "rope_theta", "vocab_size", "reg_token_id", "dense_act_fn"):
            del config[key]
        del forecast["time_encoding_scale"]  # the context length, which it is here

    silent = chronos2.load(changed(tmp_path, change))
    assert silent.network.config == model.network.config
    scaled = chronos2.load(changed(tmp_path, lambda config, forecast: forecast.update(time_encoding_scale=40)))
    close = [column("close", 70)]
    assert error(scaled.predict(close, 1), model.predict(close, 1), close) > 1e-3


def test_the_fingerprint_is_of_the_weights_and_the_dtype(tmp_path: Path, model: chronos2.Chronos2):
    assert chronos2_checkpoint.inspect(str(GOLDEN)) == model.fingerprint
    assert chronos2_checkpoint.inspect(str(GOLDEN), running=Running(dtype="bfloat16")) != model.fingerprint
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    weights = load_file(GOLDEN / "model.safetensors")
    weights["shared.weight"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert chronos2_checkpoint.inspect(str(tmp_path)) != model.fingerprint


def test_in_bfloat16_only_the_network_is(model: chronos2.Chronos2):
    narrow = chronos2.load(str(GOLDEN), running=Running(dtype="bfloat16"))
    close = [column("close", 96)]
    difference = error(narrow.predict(close, 1), model.predict(close, 1), close)
    assert 1e-4 < difference < 0.2
    with torch.inference_mode():
        tokens = narrow.network.tokens(torch.from_numpy(close[0].copy())[None], torch.full((1, PATCH), torch.nan))
    assert tokens.loc.dtype == tokens.scale.dtype == torch.float32


def test_what_does_not_fit_the_memory_is_run_in_halves(model: chronos2.Chronos2, monkeypatch: pytest.MonkeyPatch):
    small = chronos2.Chronos2(model.network, fingerprint="")
    small._batch_tokens = 1 << 20
    windows, params = [bars(96, 200 + place) for place in range(8)], {"context_length": 96, "variates": "ohlc"}
    whole, sizes, answer = model.encode(windows, params, 1).values, [], small.network.answer
    limit = 2

    def short(series, known):
        sizes.append(len(series))
        if len(series) > limit:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return answer(series, known)

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
                pytest.mark.timeout(600),  # 40 s on an idle core
                pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, g++ or clang++"),
            ],
        ),
    ],
)
def test_compiled_it_says_the_same_with_one_graph_a_shape(
    tmp_path: Path, model: chronos2.Chronos2, no_graphs: None, backend: str
):
    running = Running(compile_mode="default", compile_backend=backend, compile_dir=str(tmp_path), chunk=3)
    compiled = chronos2.load(str(GOLDEN), running=running)
    for variates, graphs in (("close", 1), ("ohlcv", 2)):
        params = {"context_length": 96, "variates": variates, "transform": "price"}
        for count in (1, 5):
            windows = [bars(80 + 2 * place) for place in range(count)]  # padded to six patches
            ours, theirs = (each.encode(windows, params, 7).values for each in (compiled, model))
            np.testing.assert_allclose(ours, theirs, rtol=LAST_BITS)
        assert (compiled.graphs.count, compiled.graphs.recompilations) == (graphs, 0)
    assert compiled.compilation == "default"
