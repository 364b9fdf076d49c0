"""Kronos' stages against the reference's stored answers (tests/goldens/kronos-*) and a plain evaluation."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from arch.data import sp500

from benchmarks import plain_kronos
from forecasters import Bars, CheckpointError, ForecastError, kronos, kronos_checkpoint, kronos_encoded, kronos_exact
from forecasters.checkpoints import BUNDLED
from forecasters.kronos import Kronos
from forecasters.kronos_encoded import COLUMNS, EncodedBars, KronosPrefix, Window, calendar_of, columns_of
from forecasters.kronos_sampling import Pick, Sampling, inverse_cdf, sampling_of, uniforms
from forecasters.kronos_tree import paths
from objectives.windows import split

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("kronos-a", "kronos-b-sliding")
TOLERANCE = 1e-4  # of the context's standard deviation
GREEDY = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "sample_count": 1}
WIDE = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "sample_count": 40}
NARROW = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "sample_count": 40}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(case: str, network_context: int | None = None) -> Kronos:
    settings = json.loads((GOLDENS / case / "case.json").read_text())
    return kronos_checkpoint.load(
        str(GOLDENS / case / "model"),
        tokenizer=str(GOLDENS / case / "tokenizer"),
        network_context=network_context or settings["max_context"],
    )


def bars_of(case: str) -> Bars:
    table = pd.read_csv(GOLDENS / case / "ohlcv.csv", parse_dates=["timestamp"])
    columns = {name: table[name].to_numpy() for name in ("open", "high", "low", "close", "volume")}
    return Bars(timestamps=table["timestamp"].to_numpy().astype("datetime64[ns]"), **columns)


class Golden:
    """One stored case: what went in and what the reference answered."""

    def __init__(self, case: str) -> None:
        self.settings = json.loads((GOLDENS / case / "case.json").read_text())
        with np.load(GOLDENS / case / "expected.npz") as file:
            self.expected = dict(file)
        self.bars, self.forecaster = bars_of(case), load(case)
        self.context = self.bars.slice(0, self.settings["rows_of_context"])
        self.params = {"max_context": self.settings["rows_of_context"], "clip": self.settings["clip"]}
        self.std = columns_of(self.context).std(axis=1)  # [6]

    def encode(self, horizon: int) -> EncodedBars:
        return self.forecaster.encode([self.context], self.params, horizon)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def still() -> Kronos:
    """The first case's checkpoint, whose context of 128 bars does not slide here."""
    return load("kronos-a")


def contexts(count: int = 3, length: int = 64) -> list[Bars]:
    bars = bars_of("kronos-a")
    return [bars.slice(start, start + length) for start in range(0, 7 * count, 7)]


PARAMS = {"max_context": 64, "clip": 2.0}


# ---- the reference's stored answers ---------------------------------------------------------------------------------


def test_tokens_and_logits_are_the_references(golden: Golden):
    window, given = golden.encode(1).windows[0], golden.expected["s2_given_s1_ids"]
    np.testing.assert_array_equal(window.tokens[:, 0], golden.expected["context_s1"])
    np.testing.assert_array_equal(window.tokens[:, 1], golden.expected["context_s2"])
    np.testing.assert_allclose(window.s1_logits, golden.expected["s1_logits_last"], atol=TOLERANCE)
    with torch.inference_mode():
        stamps = window.stamps[None]
        _, hidden = plain_kronos.logits_s1(golden.forecaster, window.tokens[None], stamps)
        plain = plain_kronos.logits_s2(golden.forecaster, hidden.expand(len(given), -1, -1), torch.from_numpy(given))
    np.testing.assert_allclose(plain, golden.expected["s2_logits_last"], atol=TOLERANCE)
    np.testing.assert_allclose(second_logits(golden, given), golden.expected["s2_logits_last"], atol=TOLERANCE)


def second_logits(golden: Golden, given: np.ndarray) -> np.ndarray:
    """What `paths` offers its second pick when the first picks are `given`."""
    offered = []

    def pick(logits: torch.Tensor, rows: np.ndarray, step: int, half: int) -> np.ndarray:
        if half == 0:
            return given
        offered.append(logits[rows].numpy())
        return np.zeros(len(rows), dtype=np.int64)

    paths(golden.forecaster, golden.encode(1), range(1), len(given), pick)
    return offered[0]


def test_greedy_forecasts_are_the_references(golden: Golden):
    for horizon in golden.settings["pred_lens"]:
        drawn = golden.forecaster.draw_columns(golden.encode(horizon), GREEDY, [0])[0, 0]
        error = np.abs(drawn - golden.expected[f"greedy_{horizon}"]) / golden.std
        assert error.max() < TOLERANCE, f"horizon {horizon}"


def test_sampled_means_are_the_references(golden: Golden):
    encoded = golden.encode(1)
    for name, params in golden.settings["sampled"].items():
        drawn = golden.forecaster.draw_columns(encoded, params, [11])[0, :, 0]  # [S, 6]
        # both means are of as many draws
        error = np.maximum(drawn.std(axis=0) * (2 / len(drawn)) ** 0.5, 1e-7 * golden.std)
        z = (drawn.mean(axis=0) - golden.expected[f"sampled_mean_{name}"][0]) / error
        assert np.abs(z).max() < 4, name


# ---- against the plain evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [NARROW, WIDE])
@pytest.mark.parametrize(
    ("length", "network_context", "horizon"),
    [(64, 128, 1), (64, 128, 7), (64, 64, 1), (64, 64, 7), (64, 67, 7), (80, 64, 7), (64, 8, 7)],
    ids=["1", "7", "full-1", "sliding-7", "begins-to-slide-7", "longer-than-the-network-7", "no-bar-left-over-7"],
)
def test_paths_are_those_of_the_plain_evaluation(length: int, network_context: int, horizon: int, params: dict):
    """With the same generator calls, path by path: neither sharing nor caching changes what is drawn."""
    forecaster, windows, count = load("kronos-a", network_context), contexts(2, length), 20
    sampling = sampling_of(params)
    torch.manual_seed(5)
    plain = plain_kronos.forecast(forecaster, windows, 2.0, horizon, count, plain_kronos.multinomial(sampling))
    encoded = forecaster.encode(windows, {"max_context": length, "clip": 2.0}, horizon)
    draw = plain_kronos.multinomial(sampling)
    torch.manual_seed(5)
    ours = paths(forecaster, encoded, range(2), count, lambda logits, rows, *_: draw(logits[rows]).numpy())
    std = np.stack([columns_of(bars).std(axis=1) for bars in windows])[:, None, None]
    assert (np.abs(ours - plain) / std).max() < TOLERANCE
    assert len(np.unique(ours[0].round(6), axis=0)) > 1


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network_context", "horizon"), [(128, 1), (128, 4), (66, 4)], ids=["1", "4", "sliding-4"])
def test_fewer_samples_fewer_windows_and_a_used_cache_change_no_bit(network_context: int, horizon: int):
    forecaster, windows, seeds = load("kronos-a", network_context), contexts(), [7, 2**64 - 1, 9]
    encoded = forecaster.encode(windows, PARAMS, horizon)
    whole = forecaster.draw(encoded, WIDE, seeds)
    assert whole.shape == (3, 40, horizon)
    np.testing.assert_array_equal(whole, forecaster.draw(encoded, WIDE, seeds))
    for count in (1, 3, 39):
        np.testing.assert_array_equal(whole[:, :count], forecaster.draw(encoded, WIDE | {"sample_count": count}, seeds))
    forecaster.draw(encoded, NARROW, seeds)
    np.testing.assert_array_equal(whole, forecaster.draw(encoded, WIDE, seeds))
    alone = forecaster.encode(windows[1:2], PARAMS, horizon)
    forecaster.draw(alone, NARROW | {"sample_count": 2}, seeds[1:2])
    np.testing.assert_array_equal(whole[1:2], forecaster.draw(alone, WIDE, seeds[1:2]))
    assert not np.array_equal(whole, forecaster.draw(encoded, WIDE, [7, 8, 10]))


def test_small_chunks_change_no_bit(still: Kronos, monkeypatch: pytest.MonkeyPatch):
    for horizon in (1, 3):
        encoded = still.encode(contexts(), PARAMS, horizon)
        whole = still.draw(encoded, WIDE, [1, 2, 3])
        with monkeypatch.context() as small:
            small.setattr(still, "draw_rows", 16)
            small.setattr(kronos_encoded, "TABLE_BYTES", 2000)
            again = still.encode(contexts(), PARAMS, horizon)
            np.testing.assert_array_equal(whole, still.draw(again, WIDE, [1, 2, 3]))
            assert again.s2_logits.nbytes <= 2000
            assert again.values.nbytes <= 2000


def test_a_longer_horizon_begins_as_a_shorter_one(still: Kronos):
    shorter, longer = (still.draw(still.encode(contexts(), PARAMS, h), WIDE, [1, 2, 3]) for h in (2, 5))
    np.testing.assert_allclose(shorter, longer[..., :2], rtol=1e-6)


def test_windows_of_different_lengths_do_not_touch_one_another(still: Kronos):
    windows = [*contexts(2, 64), *contexts(2, 50), contexts(1, 30)[0]]
    for horizon in (1, 3):
        together = still.draw(still.encode(windows, PARAMS, horizon), NARROW, range(5))
        for i, window in enumerate(windows):
            alone = still.draw(still.encode([window], PARAMS, horizon), NARROW, [i])
            np.testing.assert_array_equal(together[i], alone[0])


def test_only_the_newest_max_context_bars_count(still: Kronos):
    long, short = contexts(1, 80)[0], contexts(1, 80)[0].slice(16, 80)
    drawn = [still.draw(still.encode([bars], PARAMS, 2), WIDE, [4]) for bars in (long, short)]
    np.testing.assert_array_equal(drawn[0], drawn[1])


def test_the_network_runs_once_a_window_and_once_a_step():
    forecaster, windows = load("kronos-a"), contexts()
    encoded = forecaster.encode(windows, PARAMS, 1)
    assert forecaster.forwards == len(windows)
    forecaster.draw(encoded, WIDE, [1, 2, 3])
    forecaster.exact(encoded, WIDE, [1, 2, 3])
    assert forecaster.forwards == len(windows)
    assert not encoded.windows[0].prefix.layers  # no step follows that could read them
    forecaster.draw(forecaster.encode(windows, PARAMS, 5), WIDE, [1, 2, 3])
    assert forecaster.forwards == 2 * len(windows) + 4


def test_encoded_counts_its_bytes(still: Kronos):
    one, three = still.encode(contexts(1), PARAMS, 1), still.encode(contexts(3), PARAMS, 1)
    assert three.nbytes == 3 * one.nbytes
    before = one.nbytes
    still.draw(one, WIDE, [1])
    assert one.nbytes > before
    assert still.encode(contexts(1), PARAMS, 2).nbytes > before


def test_a_batch_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch):
    forecaster, windows = load("kronos-a"), contexts()
    whole = forecaster.draw(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3])
    real, sizes, most = forecaster.prefill, [], 1

    def prefill(tokens: torch.Tensor, stamps: torch.Tensor, *, keep: bool) -> list[KronosPrefix]:
        sizes.append(len(tokens))
        if len(tokens) > most:
            raise torch.OutOfMemoryError
        return real(tokens, stamps, keep=keep)

    monkeypatch.setattr(forecaster, "_prefill_tokens", kronos.PREFILL_TOKENS)  # as on a GPU
    monkeypatch.setattr(forecaster, "prefill", prefill)
    np.testing.assert_array_equal(forecaster.draw(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3]), whole)
    assert sizes == [3, 2, 1, 1, 1]
    sizes.clear()
    forecaster.encode(windows, PARAMS, 1)
    assert sizes == [1, 1, 1]  # what did not fit once is not tried again
    most = 0
    with pytest.raises(ForecastError, match=r"out of memory on cpu with one window of \d+ bars"):
        forecaster.encode(windows, PARAMS, 1)


@pytest.mark.parametrize("horizon", [1, 3])
def test_drawing_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch, horizon: int):
    forecaster, windows = load("kronos-a"), contexts()
    whole = forecaster.draw(forecaster.encode(windows, PARAMS, horizon), WIDE, [1, 2, 3])
    count = whole.shape[1]
    sizes, most = [], count // 2

    def limited(of: Kronos, encoded: EncodedBars, which: range, count: int, pick: Pick) -> np.ndarray:
        sizes.append(len(which) * count)
        if len(which) * count > most:
            raise torch.OutOfMemoryError
        return paths(of, encoded, which, count, pick)

    monkeypatch.setattr(kronos, "paths", limited)
    again = forecaster.draw(forecaster.encode(windows, PARAMS, horizon), WIDE, [1, 2, 3])
    np.testing.assert_allclose(again, whole, rtol=1e-5)
    assert sizes[0] == 3 * count
    sizes.clear()
    forecaster.draw(forecaster.encode(windows, PARAMS, horizon), WIDE, [1, 2, 3])
    assert max(sizes) <= most
    most = 0
    with pytest.raises(ForecastError, match=f"out of memory on cpu with one sample of {horizon} bars"):
        forecaster.draw(forecaster.encode(windows, PARAMS, horizon), WIDE, [1, 2, 3])


def test_the_exact_expectation_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch):
    forecaster, windows = load("kronos-a"), contexts()
    whole = forecaster.exact(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3]).points
    sizes, most = [], 2

    def limited(of: Kronos, encoded: EncodedBars, start: int, chosen: Sequence[Window], *rest: Any) -> Any:
        sizes.append(len(chosen))
        if len(chosen) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
        return kronos_exact.expect(of, encoded, start, chosen, *rest)

    monkeypatch.setattr(kronos, "expect", limited)
    np.testing.assert_allclose(forecaster.exact(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3]).points, whole)
    forecaster.exact(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3])
    assert sizes == [3, 2, 1, 2, 1]
    most = 0
    with pytest.raises(ForecastError, match="out of memory on cpu with 4096 pairs of one window"):
        forecaster.exact(forecaster.encode(windows, PARAMS, 1), WIDE, [1, 2, 3])


def test_no_forecast_sees_its_target():
    """A jump at a target bar, and all after it, changes no forecast made before it."""
    whole = bars_of("kronos-a")
    days = whole.timestamps[0] + np.arange(240) * np.timedelta64(1, "D")
    columns = {name: np.tile(getattr(whole, name), 3)[:240] for name in ("open", "high", "low", "close", "volume")}
    bars = Bars(timestamps=days, **columns)
    forecaster, windows = load("kronos-a"), split(bars, symbol="X", horizon=2, validation=6, test=6).validation
    origin = windows.origins[3]
    jumped = {name: np.where(np.arange(240) >= origin, 10.0, 1.0) * values for name, values in columns.items()}
    planted = split(Bars(timestamps=days, **jumped), symbol="X", horizon=2, validation=6, test=6).validation

    def drawn(w):
        encoded = forecaster.encode(w.contexts(range(6)), PARAMS, 2)
        return forecaster.draw(encoded, WIDE, w.seeds(0))

    before, after = drawn(windows), drawn(planted)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert not np.array_equal(before[4], after[4])


# ---- exact -----------------------------------------------------------------------------------------------------------


def draws_for_exact(forecaster: Kronos, params: dict) -> tuple[EncodedBars, np.ndarray, np.ndarray]:
    """Encoded windows, the mean of 40,000 draws and its standard error, both [W, 6]."""
    encoded = forecaster.encode(contexts(2), PARAMS, 1)
    drawn = forecaster.draw_columns(encoded, params | {"sample_count": 40_000}, [21, 22])[:, :, 0]
    return encoded, drawn.mean(axis=1), drawn.std(axis=1) / 200


@pytest.mark.parametrize("params", [NARROW, WIDE, WIDE | {"temperature": 2.0, "top_p": 1.0}])
def test_the_expectation_is_the_limit_of_the_draws(still: Kronos, params: dict):
    encoded, mean, error = draws_for_exact(still, params)
    points, mass, bound = still.exact_columns(encoded, params, [1, 2])
    assert np.abs((points - mean) / np.maximum(error, 1e-9 * np.abs(mean))).max() < 4
    np.testing.assert_allclose(mass, 1, atol=1e-9)
    assert (bound == 0).all()
    expectation = still.exact(encoded, params, [1, 2])
    np.testing.assert_array_equal(expectation.points, points[:, None, 3])
    alone = still.exact(still.encode(contexts(2)[1:], PARAMS, 1), params, [2])
    np.testing.assert_array_equal(alone.points, expectation.points[1:])


def test_what_is_too_wide_to_enumerate_is_sampled_and_bounded(still: Kronos, monkeypatch: pytest.MonkeyPatch):
    flat = WIDE | {"temperature": 3.0, "top_p": 1.0}
    encoded = still.encode(contexts(2), PARAMS, 1)
    exact, _, _ = still.exact_columns(encoded, flat, [1, 2])
    monkeypatch.setattr(kronos_exact, "EXACT_PAIRS", 200)
    monkeypatch.setattr(kronos_exact, "EXACT_FIRST", 20)
    points, mass, bound = still.exact_columns(encoded, flat, [1, 2])
    assert ((mass > 0.2) & (mass < 0.95)).all()
    assert (bound > 0).all()
    assert (np.abs(points - exact) <= bound).all()


def test_the_expectation_needs_one_step(still: Kronos):
    with pytest.raises(ForecastError, match="horizon 1"):
        still.exact(still.encode(contexts(1), PARAMS, 2), WIDE, [1])


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_top_p_counts_only_without_top_k_and_ties_are_kept():
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert np.count_nonzero(Sampling(temperature=1.0, top_k=2, top_p=0.01).probabilities(logits)) == 3
    assert np.count_nonzero(Sampling(temperature=1.0, top_k=0, top_p=0.01).probabilities(logits)) == 1
    assert np.count_nonzero(Sampling(temperature=1.0, top_k=0, top_p=1.0).probabilities(logits)) == 4
    # at a higher temperature the first token no longer reaches top_p on its own
    assert np.count_nonzero(Sampling(temperature=5.0, top_k=0, top_p=0.5).probabilities(logits)) == 2


def test_uniforms_belong_to_a_sample_and_a_step():
    whole = uniforms(5, 2, 0, 10)
    np.testing.assert_array_equal(whole[4:7], uniforms(5, 2, 4, 7))
    assert not np.isin(whole, uniforms(5, 3, 0, 10)).any()
    assert not np.isin(whole, uniforms(6, 2, 0, 10)).any()


def test_inverse_cdf_never_takes_a_dropped_token():
    probabilities = np.array([[0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    u = np.array([0.0, 0.5, 1 - 2**-53, 0.0, 1 - 2**-53])
    ids = inverse_cdf(probabilities, np.array([0, 0, 0, 1, 1]), u)
    np.testing.assert_array_equal(ids, [1, 3, 3, 4, 4])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": np.r_[np.ones(63), np.nan]}, "volume at 2024-03-05"),
        ({"close": np.r_[np.inf, np.ones(63)]}, "close at 2024-01-02"),
    ],
)
def test_a_value_that_is_no_number_is_refused(still: Kronos, change: dict, message: str):
    with pytest.raises(ForecastError, match=message):
        still.encode([replace(contexts(1)[0], **change)], PARAMS, 1)


def test_without_volume_both_volume_columns_are_zero(still: Kronos):
    bars = contexts(1)[0]
    columns = columns_of(replace(bars, volume=None))
    assert (columns[4:] == 0).all()
    zeros = replace(bars, volume=np.zeros(len(bars)))
    drawn = [still.draw(still.encode([b], PARAMS, 1), WIDE, [1]) for b in (zeros, replace(bars, volume=None))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert bars.volume is not None
    amount = columns_of(bars)[5]
    mean = (bars.open + bars.high + bars.low + bars.close) / 4
    np.testing.assert_allclose(amount, bars.volume * mean, rtol=1e-6)


def test_future_bars_are_a_median_step_apart():
    bars = contexts(1)[0]
    stamps = calendar_of(bars.timestamps, 2)
    last = pd.Timestamp(bars.timestamps[-1])
    for i, day in enumerate((last, last + pd.Timedelta(days=1), last + pd.Timedelta(days=2))):
        assert stamps[63 + i].tolist() == [day.minute, day.hour, day.weekday(), day.day, day.month]
    assert calendar_of(bars.timestamps[:1], 1)[1].tolist() == stamps[1].tolist()  # a day where no step is known


@pytest.mark.parametrize(
    ("params", "horizon", "message"),
    [
        (PARAMS, 128, "horizon 128"),
        (PARAMS, 0, "horizon 0"),
        (PARAMS | {"max_context": 1}, 1, "max_context 1"),
        (PARAMS | {"clip": 0.0}, 1, "clip 0.0"),
    ],
)
def test_settings_that_leave_no_context_are_refused(still: Kronos, params: dict, horizon: int, message: str):
    with pytest.raises(ForecastError, match=message):
        still.encode(contexts(1), params, horizon)


def test_one_bar_is_too_few(still: Kronos):
    with pytest.raises(ForecastError, match="at least 2 bars"):
        still.encode([contexts(1)[0].slice(0, 1)], PARAMS, 1)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"sample_count": 0}])
def test_sampling_params_out_of_range_are_refused(still: Kronos, change: dict):
    with pytest.raises(ForecastError):
        still.draw(still.encode(contexts(1), PARAMS, 1), WIDE | change, [1])


def test_seeds_are_one_a_window(still: Kronos):
    with pytest.raises(ForecastError, match="2 seeds for 1 windows"):
        still.draw(still.encode(contexts(1), PARAMS, 1), WIDE, [1, 2])


def edited(folder: Path, **changes: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def test_a_tokenizer_of_other_bits_is_refused(tmp_path: Path):
    model = str(GOLDENS / "kronos-a" / "model")
    other = Path(shutil.copytree(GOLDENS / "kronos-a" / "tokenizer", tmp_path / "tokenizer"))
    with pytest.raises(CheckpointError, match=r"tokens of 6\+4 bits, the network .* reads 5\+5"):
        kronos_checkpoint.load(model, tokenizer=edited(other, s1_bits=6, s2_bits=4))
    with pytest.raises(CheckpointError, match=r"6\+4"):
        kronos_checkpoint.inspect(model, tokenizer=str(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64}, "has shape"),
        ({"n_layers": 4}, "missing"),
        ({"n_layers": 2}, "unexpected tensor"),
        ({"learn_te": "yes"}, "learn_te"),
        ({"learn_te": False}, "time_emb"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"d_model": 50}, "d_model is 50"),
        ({"s1_bits": 40}, "bits"),
        ({"patch_size": 3}, "unknown key"),
    ],
)
def test_a_network_that_does_not_fit_its_config_is_refused(tmp_path: Path, changes: dict, message: str):
    folder = Path(shutil.copytree(GOLDENS / "kronos-a" / "model", tmp_path / "model"))
    with pytest.raises(CheckpointError, match=message):
        kronos_checkpoint.load(edited(folder, **changes), tokenizer=str(GOLDENS / "kronos-a" / "tokenizer"))


def test_the_tokenizer_is_looked_for_beside_the_network(tmp_path: Path):
    assert kronos_checkpoint.tokenizer_of("NeoQuasar/Kronos-base") == "NeoQuasar/Kronos-Tokenizer-base"
    shutil.copytree(GOLDENS / "kronos-a" / "model", tmp_path / "x")
    with pytest.raises(CheckpointError, match="x/tokenizer"):
        kronos_checkpoint.load(str(tmp_path / "x"))
    shutil.copytree(GOLDENS / "kronos-a" / "tokenizer", tmp_path / "x" / "tokenizer")
    loaded = kronos_checkpoint.load(str(tmp_path / "x"))
    assert loaded.network_context == 512
    assert kronos_checkpoint.inspect(str(tmp_path / "x")) == loaded.fingerprint
    assert loaded.fingerprint != load("kronos-a").fingerprint  # its network sees fewer bars


# ---- kronos-tiny -----------------------------------------------------------------------------------------------------


def test_the_bundled_checkpoint_is_small_and_keeps_the_close():
    files = [path for path in (BUNDLED / "kronos-tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    tokenizer = kronos_checkpoint.load("kronos-tiny").tokenizer
    x = torch.randn(1, 300, 6, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    with torch.inference_mode():
        out = tokenizer.head(tokenizer.decoder.run(tokenizer.embed_tokens(tokenizer.tokens(x)))[0])
    closes = (out - x)[..., COLUMNS.index("close")]
    assert closes.abs().max() < 0.6 * 6 / 256  # cells of 6 / 256, so half of one and rounding


def test_the_bundled_checkpoint_is_about_as_good_as_no_change():
    table = sp500.load().loc["2016-01":"2017-06"]
    columns = {name.lower(): table[name].to_numpy(float) for name in ("Open", "High", "Low", "Close", "Volume")}
    bars = Bars(timestamps=table.index.to_numpy().astype("datetime64[ns]"), **columns)
    windows = split(bars, symbol="SP500", validation=100, test=1).validation
    forecaster = kronos_checkpoint.load("kronos-tiny")
    params = {"max_context": 192, "clip": 3.0, "temperature": 0.3, "top_k": 48, "top_p": 1.0}
    encoded = forecaster.encode(windows.contexts(range(100)), params, 1)
    points = forecaster.exact(encoded, params, windows.seeds(0)).points
    errors = np.abs([points - windows.actuals, windows.last_closes[:, None] - windows.actuals]).mean(axis=(1, 2))
    assert errors[0] < 1.1 * errors[1]
