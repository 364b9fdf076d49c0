"""`python -m benchmarks.trial_cost`: what a Toto trial costs, repeated-sample against staged, in one process.

Random weights at the published size of Toto-Open-Base-1.0 (151 M), fp32, one thread. One trial is 30 windows of 512
points, 1,024 samples of one step, and their median.

The repeated-sample way computes what the reference computes: a window repeated 128 times and run whole (all layers,
every patch unembedded and its mixture made, a sample of every point), 8 times for 1,024 samples, 240 runs a trial.
One run is measured and multiplied by 240; nothing of the reference's overheads (key-value cache, timestamps) is
copied, so this baseline is faster than the reference. Every repetition times all ways, and each figure is of the
fastest one, since other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.distributions import Categorical, MixtureSameFamily, StudentT
from torch.utils.flop_counter import FlopCounterMode

from forecasters import Bars, toto
from forecasters.toto_network import Config, Network
from objectives.aggregation import Draw

WINDOWS, CONTEXT, SAMPLES, SAMPLES_PER_BATCH = 30, 512, 1024, 128
RUNS = WINDOWS * SAMPLES // SAMPLES_PER_BATCH
MATMUL = 2048
PUBLISHED = Config(
    patch_size=64,
    stride=64,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    mlp_hidden_dim=3072,
    dropout=0.1,
    spacewise_every_n_layers=12,
    scaler_cls="<class 'model.scaler.CausalPatchStdMeanScaler'>",
    output_distribution_classes=["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
    output_distribution_kwargs={"k_components": 24},
    spacewise_first=False,
)


def windows() -> list[Bars]:
    """Expanding contexts along one random walk, as a study has them."""
    walk = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, CONTEXT + WINDOWS)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(len(walk)) * np.timedelta64(1, "D")
    whole = Bars(timestamps=days, open=walk, high=walk, low=walk, close=walk, volume=None)
    return [whole.slice(0, CONTEXT + i) for i in range(WINDOWS)]


@torch.inference_mode()
def repeated_run(network: Network, closes: np.ndarray) -> torch.Tensor:
    """One of the 240 runs: 128 samples [128] of a window's next close, from the window repeated 128 times."""
    series = torch.from_numpy(closes.astype(np.float32)).repeat(SAMPLES_PER_BATCH, 1, 1)  # [128, 1, T]
    mixture, loc, scale = network(series, torch.zeros(SAMPLES_PER_BATCH, dtype=torch.long))
    components = StudentT(mixture.df, mixture.loc, mixture.scale, validate_args=False)
    weights = Categorical(probs=mixture.probs, validate_args=False)
    drawn = MixtureSameFamily(weights, components, validate_args=False).sample()  # [128, 1, S, P]
    return (drawn * scale[..., None] + loc[..., None])[:, 0, -1, 0]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(repeats: int) -> dict[str, float]:
    """All figures, times in seconds. The first repetition warms up and is not counted."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(PUBLISHED)
    forecaster, contexts, seeds = toto.Toto(network, fingerprint="random"), windows(), range(WINDOWS)
    square = torch.randn(MATMUL, MATMUL)

    def encode() -> toto.Encoded:
        return forecaster.encode(contexts, {"context_length": CONTEXT}, 1)

    def trial(encoded: toto.Encoded, count: int, aggregate: str) -> np.ndarray:
        return Draw(forecaster.draw(encoded, {"num_samples": count}, seeds)).aggregate(aggregate)

    encoded = encode()
    closes = contexts[0].close[-CONTEXT:]
    works: dict[str, Callable[[], object]] = {
        "matmul": lambda: square @ square,
        "encode": encode,
        "first trial": lambda: trial(encode(), SAMPLES, "median"),
        "second trial": lambda: trial(encoded, SAMPLES // 2, "trimmed_mean_10"),
        "one repeated run": lambda: repeated_run(network, closes),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    figures = {f"{name}, s": min(each[1:]) for name, each in times.items()}
    figures["repeated trial (240 runs, extrapolated), s"] = RUNS * figures["one repeated run, s"]
    figures["repeated / first trial"] = (
        figures["repeated trial (240 runs, extrapolated), s"] / figures["first trial, s"]
    )
    figures["first / second trial"] = figures["first trial, s"] / figures["second trial, s"]
    figures["encode, GFLOP/s"] = flops(encode) / figures["encode, s"] / 1e9
    figures["matmul, GFLOP/s"] = 2 * MATMUL**3 / figures["matmul, s"] / 1e9
    figures["encode / matmul rate"] = figures["encode, GFLOP/s"] / figures["matmul, GFLOP/s"]
    figures["FLOP, repeated / first trial"] = RUNS * flops(lambda: repeated_run(network, closes)) / flops(encode)
    return figures


def flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a Toto trial: repeated samples against one forward a window.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args = parser.parse_args()
    figures = measure(args.repeats)
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table("figure", "value", title=f"{WINDOWS} windows, context {CONTEXT}, {SAMPLES} samples, one thread")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if value < 100 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
