"""`python -m benchmarks.trial_cost`: what a trial costs, repeated-sample against staged, in one process.

Random weights at the published sizes, Toto-Open-Base-1.0 (151 M), Kronos-base (102 M) and chronos-2 (119 M), fp32, one
thread. A trial is 30 windows of one step: of 512 points and 1,024 samples for Toto, of 192 bars and 256
samples for Kronos, of 512 points for Chronos-2, which samples nothing. The second trial changes only how is sampled and
aggregated. Toto's trials are measured as a worker measures them: by its evaluator, its number of windows in a forward,
its samples drawn ahead. Figures that should stay above something say so.

The repeated-sample way computes what the references compute. For Toto a window is repeated 128 times and run whole (all
layers, every patch unembedded and its mixture made, a sample of every point), 8 times for 1,024 samples, 240 runs a
trial, of which one is measured; nothing of the reference's overheads (key-value cache, timestamps) is copied, so this
baseline is faster than the reference, which is measured beside it where toto-ts is installed. For Kronos
(benchmarks/plain_kronos.py) the whole context is run again for every sample and step; a few samples of one window are
measured and multiplied. Everything else is measured whole. Chronos-2
is compared with its published library, with the same weights, where chronos-forecasting is installed beside this.

Every repetition times all ways, and each figure is of the fastest one, since other work on the machine only ever adds:
seconds for Toto; CPU seconds of this process for Kronos and Chronos-2, whose ways take so long that something always
comes between.
With random weights the number of distinct tokens is not that of trained ones, so figures of Kronos' later draws are
indicative only.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.distributions import Categorical, MixtureSameFamily, StudentT

from benchmarks import plain_kronos, recording
from benchmarks.random_models import KRONOS_BASE, random_bars, random_chronos2, random_kronos, random_toto
from forecasters import Bars, toto
from forecasters.chronos2 import Chronos2
from forecasters.chronos2_encoded import EncodedQuantiles
from forecasters.chronos2_network import Chronos2Network
from forecasters.kronos import Kronos
from forecasters.kronos_sampling import sampling_of
from forecasters.toto_network import TotoNetwork
from forecasters.work import count_flop
from objectives.evaluation import Evaluator
from objectives.quantiles import PiecewiseLinear
from objectives.windows import recent_origins
from studies import config as configuration
from studies import evaluators

WINDOWS = 30
Seconds = dict[str, float]  # of one repetition, by what was done


def fastest(repetition: Callable[[], Seconds], repeats: int) -> Seconds:
    """The smallest of each over the repetitions."""
    found = [repetition() for _ in range(repeats)]
    return {name: min(each[name] for each in found) for name in found[0]}


# --- Toto ------------------------------------------------------------------------------------------------------

TOTO_CONTEXT, TOTO_SAMPLES, SAMPLES_PER_BATCH = 512, 1024, 128
TOTO_RUNS = WINDOWS * TOTO_SAMPLES // SAMPLES_PER_BATCH
TOTO_MATMUL = 2048


@torch.inference_mode()
def repeated_run(network: TotoNetwork, closes: np.ndarray) -> torch.Tensor:
    """One of the 240 runs: 128 samples [128] of a window's next close, from the window repeated 128 times."""
    series = torch.from_numpy(closes.astype(np.float32)).repeat(SAMPLES_PER_BATCH, 1, 1)  # [128, 1, T]
    mixture, loc, scale = network(series, torch.zeros(SAMPLES_PER_BATCH, dtype=torch.long))
    components = StudentT(mixture.df, mixture.loc, mixture.scale, validate_args=False)
    weights = Categorical(probs=mixture.probs, validate_args=False)
    drawn = MixtureSameFamily(weights, components, validate_args=False).sample()  # [128, 1, S, P]
    return (drawn * scale[..., None] + loc[..., None])[:, 0, -1, 0]


TOTO_REFERENCE = "toto"  # the package that is published as toto-ts


def published_toto(network: TotoNetwork, closes: np.ndarray) -> Callable[[], object]:
    """One of the 240 runs as the published library does it, with these weights and its key-value cache."""
    forecaster, dataset = (
        importlib.import_module(f"{TOTO_REFERENCE}.{name}") for name in ("inference.forecaster", "data.util.dataset")
    )
    model = importlib.import_module(f"{TOTO_REFERENCE}.model.toto").Toto(
        **{**asdict(network.config), "use_memory_efficient_attention": False}
    )
    model.load_state_dict({f"model.{name}": tensor for name, tensor in network.state_dict().items()}, strict=False)
    series = torch.from_numpy(closes.astype(np.float32))[None]
    asked = dataset.MaskedTimeseries(
        series=series,
        padding_mask=torch.ones_like(series, dtype=torch.bool),
        id_mask=torch.zeros_like(series, dtype=torch.int),
        timestamp_seconds=torch.arange(series.shape[1])[None] * 86_400,
        time_interval_seconds=torch.tensor([86_400]),
    )
    library = forecaster.TotoForecaster(model.eval().model)
    count = {"num_samples": SAMPLES_PER_BATCH, "samples_per_batch": SAMPLES_PER_BATCH}
    return lambda: library.forecast(asked, prediction_length=1, **count)


def worker(config: configuration.Config, forecaster: Any) -> Evaluator:
    """What a worker measures its trials with, knowing nothing yet."""
    return evaluators.evaluator_of(config, forecaster, cache_bytes=2**30)


def toto_figures(repeats: int) -> dict[str, float]:
    """Of Toto, by name. A first repetition warms up and is not counted."""
    network = random_toto()
    plain = copy.deepcopy(network)  # what is loaded keeps its weights in another layout
    forecaster = toto.Toto(network, fingerprint="random")
    windows = recent_origins(random_bars(TOTO_CONTEXT + WINDOWS), WINDOWS, symbol="A")
    closes = windows.bars.close[:TOTO_CONTEXT]
    square = torch.randn(TOTO_MATMUL, TOTO_MATMUL)
    settings = {"toto": {"context_length": TOTO_CONTEXT}, "workers": {"encodings_mib": 0}}
    config = configuration.load(None, settings)
    params = {"context_length": TOTO_CONTEXT, "num_samples": TOTO_SAMPLES, "aggregate": "median"}
    (together,) = worker(config, forecaster).batches(windows)
    contexts = windows.contexts(together)

    def encode() -> toto.EncodedPrices:
        return forecaster.encode(contexts, {"context_length": TOTO_CONTEXT}, 1)

    measured = worker(config, forecaster)
    measured.measure(windows, params)
    number = itertools.count()

    def second() -> object:
        """Samples are drawn ahead by the first trial; ever another number of them has to be sorted."""
        count = TOTO_SAMPLES // 2 + next(number)
        return measured.measure(windows, {**params, "num_samples": count, "aggregate": "trimmed_mean_10"})

    ways: dict[str, Callable[[], object]] = {
        "matmul": lambda: square @ square,
        "encode": encode,
        "first trial": lambda: worker(config, forecaster).measure(windows, params),
        "second trial": second,
        "one repeated run": lambda: repeated_run(plain, closes),
    }
    if importlib.util.find_spec(TOTO_REFERENCE) is None:
        print("the published library of Toto is not installed (toto-ts): it is left out")
    else:
        ways["one run of the published library"] = published_toto(plain, closes)

    def repetition() -> Seconds:
        return {name: seconds(way) for name, way in ways.items()}

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    repetition()
    figures = {f"{name}, s": taken for name, taken in fastest(repetition, repeats).items()}
    repeated = figures[f"repeated trial ({TOTO_RUNS} runs, extrapolated), s"] = (
        TOTO_RUNS * figures["one repeated run, s"]
    )
    figures["repeated / first trial"] = repeated / figures["first trial, s"]
    if (run := figures.get("one run of the published library, s")) is not None:
        figures["published library / first trial"] = TOTO_RUNS * run / figures["first trial, s"]
    figures["first / second trial"] = figures["first trial, s"] / figures["second trial, s"]
    figures["encode, GFLOP/s"] = count_flop(encode) / figures["encode, s"] / 1e9
    figures["matmul, GFLOP/s"] = 2 * TOTO_MATMUL**3 / figures["matmul, s"] / 1e9
    figures["encode / matmul rate"] = figures["encode, GFLOP/s"] / figures["matmul, GFLOP/s"]
    figures["FLOP, repeated / first trial"] = (
        TOTO_RUNS * count_flop(lambda: repeated_run(plain, closes)) / count_flop(encode)
    )
    return figures | night_figures(repeats)


HISTORY, STUDY = 850, 300  # bars, and the windows of a study: validation, test and confirmation


def night_figures(repeats: int) -> dict[str, float]:
    """Of Toto, what encoding all windows of a study takes with the default context, which begins at the first bar."""
    forecaster: Any = toto.Toto(random_toto(), fingerprint="random")
    config = configuration.load(None, {"workers": {"encodings_mib": 0}})
    windows = recent_origins(random_bars(HISTORY), STUDY, symbol="A")
    params = {"context_length": 4096, "num_samples": 1, "aggregate": "mean"}

    def whole() -> Evaluator:
        """As a worker does it; what is drawn and aggregated is not counted."""
        evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=2**30)
        evaluator.max_num_samples = 1
        evaluator.measure(windows, params)
        return evaluator

    batches = whole().batches(windows)

    def apart() -> None:
        for indices in batches:
            forecaster.encode(windows.contexts(indices), {"context_length": 4096}, 1)

    def repetition() -> Seconds:
        began = time.perf_counter()
        apart()
        return {"separate": time.perf_counter() - began, "shared": whole().seconds["encode"]}

    taken = fastest(repetition, repeats)
    words = f"{STUDY} windows of a history of {HISTORY} bars"
    figures = {f"{words}, {name} forwards, s": spent for name, spent in taken.items()}
    return {**figures, "separate / shared forwards": taken["separate"] / taken["shared"]}


# --- Kronos ----------------------------------------------------------------------------------------------------

KRONOS_CONTEXT, KRONOS_MATMUL = 192, 1536
KRONOS_ENCODE = {"max_context": KRONOS_CONTEXT, "clip": 2.0}
FIRST = {"temperature": 0.3, "top_k": 24, "top_p": 0.9, "sample_count": 256}
SECOND = {
    "fewer samples, cooler": {"temperature": 0.2, "top_k": 16, "top_p": 0.9, "sample_count": 128},
    "more samples, wider": {"temperature": 0.4, "top_k": 48, "top_p": 0.9, "sample_count": 320},
    "top_p": {"temperature": 0.3, "top_k": 0, "top_p": 0.8, "sample_count": 256},
}
FEW = 4  # samples of the repeated way that are measured
STEPS, LONG_SAMPLES, LONG_FEW, LONG_WINDOWS = 7, 64, 3, 3
LONG = {**FIRST, "sample_count": LONG_SAMPLES}
LEAST = {
    "toto": {"published library / first trial": 1750, "separate / shared forwards": 3},
    "kronos": {
        "repeated / first trial": 200,
        **{f"first / second trial, {name}": 30 for name in SECOND},
        "prefill / matmul rate": 0.8,
        "7 steps, repeated / first trial": 100,
        "7 steps, sliding, repeated / first trial": 15,
    },
    "chronos2": {"encode / matmul rate": 0.85, "reference / encode": 1.25, "first / second trial": 500},
}


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The least CPU time of some runs."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def plain(kronos: Kronos, windows: list[Bars], horizon: int, count: int) -> object:
    draw = plain_kronos.multinomial(sampling_of(FIRST))
    return plain_kronos.forecast(kronos, windows, KRONOS_ENCODE["clip"], horizon, count, draw)


def one_step(kronos: Kronos, windows: list[Bars], repeats: int) -> dict[str, float]:
    """A trial of one step, and the exact answer to it."""
    seeds, a, b = range(len(windows)), *torch.randn(2, KRONOS_MATMUL, KRONOS_MATMUL)
    distinct = 0

    def encode(into: list[object]) -> float:
        return cpu_seconds(lambda: into.append(kronos.encode(windows, KRONOS_ENCODE, 1)))

    def repetition() -> Seconds:
        nonlocal distinct
        found: Seconds = {"matmul": cpu_seconds(lambda: a @ b, 5)}
        found["repeated, a window and sample"] = cpu_seconds(lambda: plain(kronos, windows[:1], 1, FEW)) / FEW
        kept = []
        found["encode"] = encode(kept)
        (encoded,) = kept
        found["first draw"] = cpu_seconds(lambda: kronos.draw(encoded, FIRST, seeds))
        distinct = len(encoded.values)
        for name, sampling in SECOND.items():
            found[f"second trial, {name}"] = cpu_seconds(lambda s=sampling: kronos.draw(encoded, s, seeds))
        fresh = kronos.encode(windows, KRONOS_ENCODE, 1)  # which no draw has looked anything up in
        found["exact, top_k 24"] = cpu_seconds(lambda: kronos.exact(fresh, FIRST, seeds))
        tokens, stamps = encoded.windows[0].tokens[None], encoded.windows[0].stamps[None]
        with torch.inference_mode():
            found["prefill of a window"] = cpu_seconds(lambda: kronos.prefill(tokens, stamps, keep=False), 10)
        return found

    kronos.encode(windows[:1], KRONOS_ENCODE, 1)  # warm
    taken = fastest(repetition, repeats)
    figures = {f"{name}, CPU s": each for name, each in taken.items()}
    repeated = taken["repeated, a window and sample"] * len(windows) * FIRST["sample_count"]
    first = taken["encode"] + taken["first draw"]
    figures[f"repeated trial (extrapolated from {FEW} samples), CPU s"] = repeated
    figures["distinct pairs decoded"] = distinct
    figures["repeated / first trial"] = repeated / first
    for name in SECOND:
        figures[f"first / second trial, {name}"] = first / taken[f"second trial, {name}"]
    figures["prefill of a window, GFLOP/s"] = prefill_operations(KRONOS_CONTEXT) / taken["prefill of a window"] / 1e9
    figures["matmul, GFLOP/s"] = 2 * KRONOS_MATMUL**3 / taken["matmul"] / 1e9
    figures["prefill / matmul rate"] = figures["prefill of a window, GFLOP/s"] / figures["matmul, GFLOP/s"]
    return figures


def prefill_operations(tokens: int) -> int:
    """Of the linear layers for one window, two a multiply-add; attention's are not counted."""
    d, per_layer = KRONOS_BASE.d_model, 4 * KRONOS_BASE.d_model**2 + 3 * KRONOS_BASE.d_model * KRONOS_BASE.ff_dim
    return 2 * tokens * (KRONOS_BASE.n_layers * per_layer + 2 * d * d + 2 * d * d)


def seven_steps(kronos: Kronos, windows: list[Bars], name: str, repeats: int) -> dict[str, float]:
    """A first trial of seven steps, by the window."""

    def repetition() -> Seconds:
        repeated = cpu_seconds(lambda: plain(kronos, windows[:1], STEPS, LONG_FEW))
        kept = []
        encode = cpu_seconds(lambda: kept.append(kronos.encode(windows[:LONG_WINDOWS], KRONOS_ENCODE, STEPS)))
        draw = cpu_seconds(lambda: kronos.draw(kept[0], LONG, range(LONG_WINDOWS)))
        return {
            f"repeated trial ({LONG_SAMPLES} samples, extrapolated from {LONG_FEW})": repeated
            * LONG_SAMPLES
            / LONG_FEW,
            "encode": encode / LONG_WINDOWS,
            "draw": draw / LONG_WINDOWS,
        }

    taken = fastest(repetition, repeats)
    repeated, encode, draw = taken.values()
    figures = {f"{name}, {way}, a window, CPU s": each for way, each in taken.items()}
    return {**figures, f"{name}, repeated / first trial": repeated / (encode + draw)}


def kronos_figures(repeats: int) -> dict[str, float]:
    """Of Kronos, by name."""
    bars = random_bars(KRONOS_CONTEXT + WINDOWS)
    windows = [bars.slice(i, i + KRONOS_CONTEXT) for i in range(WINDOWS)]
    kronos = random_kronos()
    figures = one_step(kronos, windows, repeats) | seven_steps(kronos, windows, "7 steps", repeats)
    kronos.network_context = KRONOS_CONTEXT  # the context slides past what the network sees
    return figures | seven_steps(kronos, windows, "7 steps, sliding", repeats)


# --- Chronos-2 -------------------------------------------------------------------------------------------------

CHRONOS2_CONTEXT, CHRONOS2_MATMUL = 512, 2048
REFERENCE = "chronos"  # what chronos-forecasting installs


def published_library(network: Chronos2Network, closes: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """One step [1, Q, 1] of each of these series by the published library with the weights of this network."""
    library, config = importlib.import_module(f"{REFERENCE}.chronos2"), asdict(network.config)
    patch, levels = config.pop("patch_size"), list(config.pop("levels"))
    forecast = {name: config.pop(name) for name in ("context_length", "max_output_patches", "time_encoding_scale")}
    patches = dict.fromkeys(("input_patch_size", "input_patch_stride", "output_patch_size"), patch)
    forecast |= {**patches, "quantiles": levels, "use_arcsinh": True, "use_reg_token": True}
    model = library.Chronos2Model(library.Chronos2CoreConfig(**config, chronos_config=forecast)).eval()
    model.load_state_dict(network.state_dict())
    pipeline = library.Chronos2Pipeline(model)
    return lambda: pipeline.predict(closes, prediction_length=1)


def chronos2_figures(repeats: int) -> dict[str, float]:
    """Of Chronos-2, by name. A first repetition warms up and is not counted."""
    network = random_chronos2()
    forecaster, params = Chronos2(network, fingerprint="random"), {"context_length": CHRONOS2_CONTEXT}
    walk = random_bars(CHRONOS2_CONTEXT + WINDOWS)
    contexts = [walk.slice(i, CHRONOS2_CONTEXT + i) for i in range(WINDOWS)]
    square = torch.randn(CHRONOS2_MATMUL, CHRONOS2_MATMUL)

    def encode() -> EncodedQuantiles:
        return forecaster.encode(contexts, params, 1)

    def trial(encoded: EncodedQuantiles) -> np.ndarray:
        return PiecewiseLinear(forecaster.quantiles(encoded, {})).mean_between(0.1, 0.9)

    encoded = encode()
    ways: dict[str, Callable[[], object]] = {"encode": encode, "first trial": lambda: trial(encode())}
    if importlib.util.find_spec(REFERENCE) is None:
        print("chronos-forecasting is not installed here: Chronos-2 is not compared with it")
    else:
        series = [torch.from_numpy(bars.close.astype(np.float32)) for bars in contexts]
        ways["reference"] = published_library(network, series)

    def repetition() -> Seconds:
        found: Seconds = {"matmul": cpu_seconds(lambda: square @ square)}
        found |= {name: cpu_seconds(way) for name, way in ways.items()}
        return {**found, "second trial": cpu_seconds(lambda: trial(encoded), 20)}

    repetition()
    taken = fastest(repetition, repeats)
    figures = {f"{name}, CPU s": each for name, each in taken.items()}
    figures["first / second trial"] = taken["first trial"] / taken["second trial"]
    if "reference" in taken:
        figures["reference / encode"] = taken["reference"] / taken["encode"]
    figures["encode, GFLOP/s"] = count_flop(encode) / taken["encode"] / 1e9
    figures["matmul, GFLOP/s"] = 2 * CHRONOS2_MATMUL**3 / taken["matmul"] / 1e9
    figures["encode / matmul rate"] = figures["encode, GFLOP/s"] / figures["matmul, GFLOP/s"]
    return figures


MEASURES = {"toto": toto_figures, "kronos": kronos_figures, "chronos2": chronos2_figures}


def main() -> None:
    parser = recording.parser("trial_cost", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--repeats", type=recording.at_least_one, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for model in options.models:
        torch.manual_seed(0)
        found[model] = MEASURES[model](options.repeats)
        least = LEAST.get(model, {})
        rows = [(name, value, least.get(name)) for name, value in found[model].items()]
        recording.table(f"{model}, {WINDOWS} windows, one thread", ("figure", "value", "at least"), rows)
    recording.write(options, found)


if __name__ == "__main__":
    main()
