"""Our network and its sampling against the reference's stored answers (tests/goldens/toto-*)."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import stdtr
from scipy.stats import kstest

import forecasters
from forecasters import Bars, ForecastError, toto
from forecasters.checkpoints import BUNDLED
from forecasters.compilation import OFF, Graphs
from forecasters.toto_network import TotoNetwork
from forecasters.toto_sampling import Mixture, drawn

GOLDENS = Path(__file__).parent / "goldens"
LENGTHS = [("toto-a", 96), ("toto-a", 70), ("toto-a", 16), ("toto-b-variates", 64), ("toto-b-variates", 50)]
PATCH = 16
TOLERANCE = 1e-4  # of the context's standard deviation


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def univariate() -> toto.Toto:
    return toto.load(str(GOLDENS / "toto-a"))


def golden(case: str):
    """The loaded case: forecaster, settings, price columns [V, T] and the reference's answers."""
    settings = json.loads((GOLDENS / case / "case.json").read_text())
    table = pd.read_csv(GOLDENS / case / "ohlcv.csv")
    with np.load(GOLDENS / case / "expected.npz") as file:
        expected = dict(file)
    return toto.load(str(GOLDENS / case)), settings, table[settings["columns"]].to_numpy().T, expected


def bars(closes: np.ndarray) -> Bars:
    days = np.datetime64("2024-01-01", "ns") + np.arange(len(closes)) * np.timedelta64(1, "D")
    return Bars(timestamps=days, open=closes, high=closes, low=closes, close=closes, volume=None)


def padded(prices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Series [1, V, T] in whole patches and their padding [1]."""
    pad = -prices.shape[1] % PATCH
    return torch.from_numpy(np.pad(prices, ((0, 0), (pad, 0))).astype(np.float32))[None], torch.tensor([pad])


def continued(network: TotoNetwork, prices: np.ndarray, horizon: int, uniforms: np.ndarray | None = None):
    """[V, N, H]: means fed back, or with uniforms [V, N, H, 3] draws, for any number of variates."""

    count = 1 if uniforms is None else uniforms.shape[1]
    with torch.inference_mode():
        mixture, loc, scale, prefix = network.prefill(*padded(prices), steps=PATCH, keep=True)
        assert prefix is not None
        patches = (horizon - 1) // PATCH
        graphs = Graphs(OFF, device=torch.device("cpu"), identity="")
        trajectories = toto.Trajectories(network, prefix, count, patches=patches, graphs=graphs)
        wide = Mixture(**{name: getattr(mixture, name)[:, :, None] for name in ("probs", "df", "loc", "scale")})
        draws = None
        if uniforms is not None:
            spare = np.zeros((*uniforms.shape[:2], (patches + 1) * PATCH - horizon, 3))
            draws = torch.from_numpy(np.concatenate((uniforms, spare), 2))[None].split(PATCH, 3)
        scaled = wide.mean() if draws is None else drawn(wide, draws[0])
        parts = [scaled * scale[..., None, None] + loc[..., None, None]]
        for i in range(patches):
            parts.append(trajectories.advance(parts[-1].float(), PATCH, None if draws is None else draws[i + 1]))
    return torch.cat(parts, -1)[0, ..., :horizon].double().numpy()


def cdf(encoded: toto.EncodedPrices, window: int, prices: np.ndarray) -> np.ndarray:
    """Exact distribution function of a window's first step at prices [n]."""
    scaled = (prices - encoded.affine_loc[window]) / encoded.affine_scale[window]
    probs, df, loc, scale = (getattr(encoded, name)[window, 0] for name in ("probs", "df", "loc", "scale"))
    return (probs * stdtr(df, (scaled[:, None] - loc) / scale)).sum(-1) / probs.sum()


@pytest.mark.parametrize(("case", "length"), LENGTHS)
def test_mixtures_and_affine_match_the_reference(case: str, length: int):
    forecaster, _, prices, expected = golden(case)
    with torch.inference_mode():
        mixture, loc, scale, _ = forecaster.network.prefill(*padded(prices[:, :length]), steps=PATCH)
    for ours, theirs in (("probs", "mix_probs"), ("df", "df"), ("loc", "comp_loc"), ("scale", "comp_scale")):
        np.testing.assert_allclose(getattr(mixture, ours)[0], expected[f"n{length}_{theirs}"], rtol=1e-5, atol=1e-5)
    assert np.array_equal(loc[0], expected[f"n{length}_series_loc"][:, -1])
    assert np.array_equal(scale[0], expected[f"n{length}_series_scale"][:, -1])


@pytest.mark.parametrize(("case", "length"), LENGTHS)
def test_means_match_the_reference_with_its_cache(case: str, length: int):
    forecaster, settings, prices, expected = golden(case)
    context = prices[:, :length]
    for horizon in settings["horizons"]:
        error = np.abs(continued(forecaster.network, context, horizon)[:, 0] - expected[f"n{length}_mean_h{horizon}"])
        assert (error / context.std(1, keepdims=True)).max() < TOLERANCE / 10  # measured 2e-6


@pytest.mark.parametrize(("case", "length"), LENGTHS)
def test_without_a_cache_the_reference_differs_and_a_whole_pass_shows_how(case: str, length: int):
    """Feeding means back through whole passes gives its other answer: only the key's centre differs."""
    forecaster, settings, prices, expected = golden(case)
    horizon, series = settings["horizons"][-1], prices[:, :length]
    pads = padded(series)[1]
    with torch.inference_mode():
        while series.shape[1] < length + horizon:
            mixture, loc, scale, _ = forecaster.network.prefill(padded(series)[0], pads, steps=PATCH)
            series = np.concatenate((series, (mixture.mean() * scale[..., None] + loc[..., None])[0]), -1)
    deviation = prices[:, :length].std(1, keepdims=True)
    whole = series[:, length : length + horizon]
    assert (np.abs(whole - expected[f"n{length}_mean_nocache_h{horizon}"]) / deviation).max() < TOLERANCE / 10
    cached = continued(forecaster.network, prices[:, :length], horizon)[:, 0]
    assert (np.abs(whole - cached) / deviation).max() > 1e-5


@pytest.mark.parametrize("length", [96, 70, 16])
def test_forecaster_means_match_the_reference(univariate: toto.Toto, length: int):
    _, settings, prices, expected = golden("toto-a")
    for horizon in settings["horizons"]:
        encoded = univariate.encode([bars(prices[0, :length])], {"context_length": 4096}, horizon)
        error = np.abs(univariate.mean(encoded) - expected[f"n{length}_mean_h{horizon}"]).max()
        assert error / prices[0, :length].std() < TOLERANCE / 10


@pytest.mark.parametrize("length", [96, 70, 16])
def test_samples_agree_with_the_reference(univariate: toto.Toto, length: int):
    _, settings, prices, expected = golden("toto-a")
    encoded = univariate.encode([bars(prices[0, :length])], {"context_length": length}, 1)
    ours = univariate.draw(encoded, {"num_samples": 65_536}, [7])[0, :, 0]
    assert kstest(ours, lambda x: cdf(encoded, 0, x)).pvalue > 1e-3
    count = settings["sampled_count_h1"]
    for name, share in (("q10", 0.1), ("median", 0.5), ("q90", 0.9)):
        below = cdf(encoded, 0, expected[f"n{length}_samples_{name}"])[0]
        assert abs(below - share) < 4 * np.sqrt(share * (1 - share) / count)
    assert abs(ours.mean() - expected[f"n{length}_samples_mean"][0]) < 5 * ours.std() / np.sqrt(count)


@pytest.mark.parametrize("length", [96, 70, 16])
def test_medians_past_the_first_patch_agree(univariate: toto.Toto, length: int):
    _, settings, prices, expected = golden("toto-a")
    horizon, count = settings["horizons"][-1], settings["sampled_count_long"]
    encoded = univariate.encode([bars(prices[0, :length])], {"context_length": length}, horizon)
    ours = univariate.draw(encoded, {"num_samples": count}, [11])[0]
    below = (ours < expected[f"n{length}_samples_h{horizon}_median"][0]).mean(0)
    assert np.abs(below - 0.5).max() < 4.5 * np.sqrt(0.25 * 2 / count)


@pytest.mark.parametrize("length", [64, 50])
def test_medians_of_several_variates_agree(length: int):
    forecaster, settings, prices, expected = golden("toto-b-variates")
    horizon, count = settings["horizons"][-1], settings["sampled_count_long"]
    uniforms = np.random.default_rng(3).random((len(prices), count, horizon, 3))
    ours = continued(forecaster.network, prices[:, :length], horizon, uniforms)  # [V, N, H]
    below = (ours < expected[f"n{length}_samples_h{horizon}_median"][:, None]).mean(1)
    assert np.abs(below - 0.5).max() < 4.5 * np.sqrt(0.25 * 2 / count)


def test_variates_see_only_their_own_id():
    forecaster, _, prices, _ = golden("toto-b-variates")
    series, pads = padded(prices[:, :50])
    with torch.inference_mode():
        apart, *_ = forecaster.network.prefill(series, pads, torch.tensor([[5, 5, 9, 9]]), steps=1)
        pair, *_ = forecaster.network.prefill(series[:, :2], pads, steps=1)
        joined, *_ = forecaster.network.prefill(series, pads, steps=1)
    torch.testing.assert_close(apart.loc[:, :2], pair.loc, rtol=1e-5, atol=1e-6)
    assert (joined.loc[:, :2] - pair.loc).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["toto-a", "toto-b-variates"])
def test_the_whole_pass_ends_where_the_short_one_does(case: str):
    forecaster, _, prices, _ = golden(case)
    with torch.inference_mode():
        whole, loc, scale = forecaster.network(*padded(prices[:, :61]))
        short, last_loc, last_scale, _ = forecaster.network.prefill(*padded(prices[:, :61]), steps=3)
    torch.testing.assert_close(whole.loc[:, :, -1, :3], short.loc, rtol=1e-5, atol=1e-6)
    assert torch.equal(loc[..., -1], last_loc)
    assert torch.equal(scale[..., -1], last_scale)


def test_mixed_lengths_in_one_batch_equal_one_at_a_time(univariate: toto.Toto):
    prices = golden("toto-a")[2][0]
    contexts = [bars(prices[-n:]) for n in (5, 16, 17, 31, 64, 70, 96)]
    for horizon in (3, 40):
        before = univariate.forwards
        together = univariate.encode(contexts, {"context_length": 80}, horizon)
        assert univariate.forwards == before + 1
        alone = [univariate.encode([context], {"context_length": 80}, horizon) for context in contexts]
        for name in ("probs", "df", "loc", "scale"):
            each = np.concatenate([getattr(encoded, name) for encoded in alone])
            np.testing.assert_allclose(getattr(together, name), each, rtol=1e-5, atol=1e-5)
        assert np.array_equal(together.affine_loc, [encoded.affine_loc[0] for encoded in alone])
        assert np.array_equal(together.affine_scale, [encoded.affine_scale[0] for encoded in alone])
        means = np.concatenate([univariate.mean(encoded) for encoded in alone])
        np.testing.assert_allclose(univariate.mean(together), means, atol=TOLERANCE * prices.std())


def test_context_length_takes_the_last_closes(univariate: toto.Toto):
    prices = golden("toto-a")[2][0]
    cut = univariate.encode([bars(prices)], {"context_length": 40}, 2)
    assert np.array_equal(cut.loc, univariate.encode([bars(prices[-40:])], {"context_length": 999}, 2).loc)


@pytest.mark.parametrize("horizon", [1, 16, 40])
def test_fewer_samples_are_a_prefix_and_seeds_decide(univariate: toto.Toto, horizon: int):
    prices = golden("toto-a")[2][0]
    encoded = univariate.encode([bars(prices[:70]), bars(prices[:96])], {"context_length": 96}, horizon)
    many = univariate.draw(encoded, {"num_samples": 200}, [1, 2**64 - 1])
    assert many.shape == (2, 200, horizon)
    assert many.dtype == np.float64
    for count in (1, 64, 65):
        assert np.array_equal(univariate.draw(encoded, {"num_samples": count}, [1, 2**64 - 1]), many[:, :count])
    other = univariate.draw(encoded, {"num_samples": 200}, [1, 5])
    assert np.array_equal(other[0], many[0])
    assert not np.array_equal(other[1], many[1])


def test_drawing_calls_the_network_only_past_the_first_patch(univariate: toto.Toto):
    context = [bars(golden("toto-a")[2][0])]
    within = univariate.encode(context, {"context_length": 96}, 16)
    before = univariate.forwards
    univariate.draw(within, {"num_samples": 500}, [0])
    univariate.mean(within)
    assert univariate.forwards == before
    assert within.prefixes == ()
    beyond = univariate.encode(context, {"context_length": 96}, 40)
    assert univariate.forwards == before + 1
    univariate.draw(beyond, {"num_samples": 128}, [0])
    assert univariate.forwards == before + 1 + 2 * 2  # two further patches of two blocks
    assert beyond.nbytes > within.nbytes > 0


def test_windows_are_split_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    univariate = toto.load(str(GOLDENS / "toto-a"))  # one of its own: it remembers
    prices, whole = golden("toto-a")[2][0], univariate.network.prefill
    contexts = [bars(prices[:n]) for n in (64, 70, 80, 90, 96)]
    expected = univariate.encode(contexts, {"context_length": 96}, 40)
    limit, tried = 2, []

    def limited(series, *args, **kwargs):
        tried.append(len(series))
        if len(series) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total of 2 GiB.")
        return whole(series, *args, **kwargs)

    monkeypatch.setattr(univariate.network, "prefill", limited)
    split = univariate.encode(contexts, {"context_length": 96}, 40)
    assert len(split.prefixes) == 3
    assert tried == [10, 5, 3, 2, 2, 1]  # five are filled up to ten
    tried.clear()
    again = univariate.encode(contexts, {"context_length": 96}, 40)
    assert tried == [2, 2, 1]  # what did not fit once is not tried again
    np.testing.assert_array_equal(again.loc, split.loc)
    np.testing.assert_allclose(split.loc, expected.loc, rtol=1e-5, atol=1e-5)
    seeds = range(5)
    np.testing.assert_allclose(
        univariate.draw(split, {"num_samples": 10}, seeds), univariate.draw(expected, {"num_samples": 10}, seeds), 1e-4
    )
    limit = 0
    message = "out of memory on cpu with one window of 64 points, wanting 1.50 GiB more"
    with pytest.raises(ForecastError, match=message):
        univariate.encode(contexts, {"context_length": 96}, 1)


def test_decoding_is_split_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    univariate = toto.load(str(GOLDENS / "toto-a"))
    prices, whole = golden("toto-a")[2][0], toto.Trajectories.advance
    contexts = [bars(prices[:n]) for n in (64, 70, 80, 90, 96)]
    encoded, asked = univariate.encode(contexts, {"context_length": 96}, 40), {"num_samples": 100}
    expected, means = univariate.draw(encoded, asked, range(5)), univariate.mean(encoded)
    limit, tried = 2, []

    def limited(self, latest, *args):
        tried.append(len(latest))
        if len(latest) > limit:
            raise torch.OutOfMemoryError
        return whole(self, latest, *args)

    monkeypatch.setattr(toto.Trajectories, "advance", limited)
    np.testing.assert_allclose(univariate.draw(encoded, asked, range(5)), expected, 1e-4)
    assert [size for size in tried if size > limit] == [5, 3]
    tried.clear()
    univariate.draw(encoded, asked, range(5))
    np.testing.assert_allclose(univariate.mean(encoded), means, 1e-4)
    assert max(tried) == limit
    limit = 0
    with pytest.raises(ForecastError, match="out of memory on cpu with 64 trajectories of one window, 40 steps"):
        univariate.draw(encoded, asked, range(5))


def test_a_sample_that_is_no_number_is_an_error(univariate: toto.Toto):
    context = [bars(golden("toto-a")[2][0])]
    for horizon in (1, 40):
        encoded = univariate.encode(context, {"context_length": 96}, horizon)
        for wrong in (np.nan, np.inf, 1e39):
            with pytest.raises(ForecastError, match="finite"):
                univariate.draw(replace(encoded, affine_loc=np.array([wrong])), {"num_samples": 4}, [0])


def test_bad_inputs_are_errors(univariate: toto.Toto):
    good = bars(np.linspace(1, 2, 40))
    for contexts, length, horizon in (
        ([bars(np.array([1.0, np.nan, 2.0]))], 40, 1),
        ([bars(np.array([]))], 40, 1),
        ([good], 0, 1),
        ([good], 40, 0),
        ([], 40, 1),
    ):
        with pytest.raises(ForecastError):
            univariate.encode(contexts, {"context_length": length}, horizon)
    encoded = univariate.encode([good], {"context_length": 40}, 1)
    with pytest.raises(ForecastError, match="2 seeds for 1 windows"):
        univariate.draw(encoded, {"num_samples": 4}, [0, 1])
    with pytest.raises(ForecastError):
        univariate.draw(encoded, {"num_samples": 0}, [0])


def test_published_variants_of_the_layout_load_the_same(univariate: toto.Toto, tmp_path: Path):
    """Without `model.`, with the names of a fused SwiGLU, with stored frequencies, in half precision or not."""
    renamed = {"transformer.rotary_emb.freqs": torch.ones(6)}
    for name, tensor in load_file(GOLDENS / "toto-a" / "model.safetensors").items():
        fused = name.removeprefix("model.").replace("mlp.0.", "mlp.0.w12.").replace("mlp.2.", "mlp.0.w3.")
        renamed[fused] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDENS / "toto-a" / "config.json").read_bytes())
    other, context = toto.load(str(tmp_path)), [bars(np.linspace(90, 110, 77))]
    theirs, ours = (f.encode(context, {"context_length": 77}, 3) for f in (univariate, other))
    assert np.array_equal(theirs.loc, ours.loc)
    assert other.fingerprint != univariate.fingerprint
    assert toto.load(str(GOLDENS / "toto-a")).fingerprint == univariate.fingerprint


def test_another_process_gets_the_same_bits():
    script = (
        "import hashlib, numpy as np, torch; torch.set_num_threads(1)\n"
        "from forecasters import Bars, load\n"
        "f, t = load('toto', checkpoint='toto-tiny'), np.arange(300)\n"
        "def b(n): c = 50 + np.sin(t[:n]); return Bars(timestamps=t, open=c, high=c, low=c, close=c, volume=None)\n"
        "e = f.encode([b(300), b(200), b(33)], {'context_length': 256}, 40)\n"
        "s = f.draw(e, {'num_samples': 70}, [1, 2, 3])\n"
        "print(hashlib.sha256(e.loc.tobytes() + s.tobytes()).hexdigest())\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=BUNDLED.parents[1]
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == hashlib.sha256().digest_size * 2


def test_the_bundled_checkpoint_is_small_and_forecasts():
    assert sum(path.stat().st_size for path in (BUNDLED / "toto-tiny").iterdir()) <= 2_000_000
    forecaster = forecasters.load("toto", checkpoint="toto-tiny")
    walk = 1000 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, (20, 600)), 1))
    encoded = forecaster.encode([bars(row) for row in walk], {"context_length": 512}, 1)
    moves = forecaster.draw(encoded, {"num_samples": 4096}, range(20))[:, :, 0] / walk[:, -1:] - 1
    assert np.abs(np.median(moves, 1)).mean() < 0.003  # near no change, a third of a day's move
    spread = np.subtract(*np.quantile(moves, (0.75, 0.25), axis=1))
    assert 0.5 < np.median(spread) / (2 * 0.6745 * 0.01) < 2  # and as wide as the walk's own day


def test_log_likelihood_of_training_is_the_inference_mixture(univariate: toto.Toto):
    train = pytest.importorskip("forecasters.train_tiny")
    encoded = univariate.encode([bars(golden("toto-a")[2][0])], {"context_length": 96}, 1)
    mixture = Mixture(
        **{name: torch.from_numpy(getattr(encoded, name)[0, 0]) for name in ("probs", "df", "loc", "scale")}
    )
    x = np.linspace(-30, 30, 60_001)
    density = train.log_likelihood(mixture, torch.from_numpy(x)).exp().numpy()
    prices = x * encoded.affine_scale[0] + encoded.affine_loc[0]
    mass = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])))
    np.testing.assert_allclose(mass, cdf(encoded, 0, prices) - cdf(encoded, 0, prices[:1]), atol=1e-5)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_other_windows_of_a_shape_need_no_other_graph(univariate: toto.Toto):
    """Nothing in the pass asks the device for a value, so it compiles whole, and once."""
    compiled = torch.compile(univariate.network.prefill, backend="eager", fullgraph=True, dynamic=False)
    for pads in ([0, 0, 0], [1, 20, 40]):
        series, padding = torch.full((3, 1, 64), 7.0).cumsum(-1), torch.tensor(pads)
        with torch.inference_mode():
            ours, *_ = univariate.network.prefill(series, padding, steps=2)
            theirs, *_ = compiled(series, padding, steps=2)
        assert torch.equal(ours.loc, theirs.loc)
