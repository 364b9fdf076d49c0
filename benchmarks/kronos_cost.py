"""`python -m benchmarks.kronos_cost`: what a Kronos trial costs against running the context again for every sample.

Random weights at the published size of Kronos-base, float32, one thread, CPU seconds of this process, the ways taken
in turn in one run. The repeated way (tests/plain_kronos.py) is measured at a few samples of one window and
extrapolated in proportion to samples and windows; everything else is measured whole. With random weights the number
of distinct tokens is not that of trained ones, so figures of later draws are indicative only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from forecasters import Bars
from forecasters.kronos import Kronos
from forecasters.kronos_network import Network, NetworkConfig, Tokenizer, TokenizerConfig
from forecasters.kronos_sampling import sampling_of
from tests import plain_kronos

BASE = NetworkConfig(s1_bits=10, s2_bits=10, n_layers=12, d_model=832, n_heads=16, ff_dim=2048, learn_te=True)
TOKENIZER = TokenizerConfig(
    d_in=6, d_model=256, n_heads=4, ff_dim=512, n_enc_layers=4, n_dec_layers=4, s1_bits=10, s2_bits=10
)
CONTEXT = 192
WINDOWS = 30
FIRST = {"temperature": 0.3, "top_k": 24, "top_p": 0.9, "sample_count": 256}
SECOND = {
    "fewer samples, cooler": {"temperature": 0.2, "top_k": 16, "top_p": 0.9, "sample_count": 128},
    "more samples, wider": {"temperature": 0.4, "top_k": 48, "top_p": 0.9, "sample_count": 320},
    "top_p": {"temperature": 0.3, "top_k": 0, "top_p": 0.8, "sample_count": 256},
}
LONG = {"temperature": 0.3, "top_k": 24, "top_p": 0.9, "sample_count": 64}


def random_kronos(network_context: int, size: NetworkConfig = BASE) -> Kronos:
    """With random weights, spread so that the second token depends on the first and logits have a shape."""
    torch.manual_seed(0)
    network, tokenizer = Network(size), Tokenizer(TOKENIZER)
    for module in (*network.modules(), *tokenizer.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=size.d_model**-0.5)
    attention = network.dep_layer.cross_attn
    with torch.no_grad():
        for layer, factor in ((attention.q_proj, 60), (attention.out_proj, 4), (network.head.proj_s1, 1.5)):
            layer.weight.mul_(factor)
    return Kronos(tokenizer, network, fingerprint="random", network_context=network_context)


def random_bars(count: int) -> Bars:
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, count)))
    opening = close * np.exp(rng.normal(0, 0.003, count))
    spread = np.exp(np.abs(rng.normal(0, 0.004, (2, count))))
    return Bars(
        timestamps=np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        open=opening,
        high=np.maximum(opening, close) * spread[0],
        low=np.minimum(opening, close) / spread[1],
        close=close,
        volume=rng.lognormal(12, 0.5, count),
    )


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The least CPU time of some runs."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def matmul_rate(size: int = 1536) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / seconds(lambda: a @ b, repeats=5)


def prefill_operations(tokens: int) -> int:
    """Of the linear layers for one window, two a multiply-add; attention's are not counted."""
    d, per_layer = BASE.d_model, 4 * BASE.d_model**2 + 3 * BASE.d_model * BASE.ff_dim
    return 2 * tokens * (BASE.n_layers * per_layer + 2 * d * d + 2 * d * d)


class Measured:
    """Prints lines and keeps their figures."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, name: str, value: float, unit: str) -> float:
        self.figures[name] = value
        print(f"{name:62s} {value:10.4g} {unit}", flush=True)
        return value


def one_step(kronos: Kronos, windows: list[Bars], out: Measured) -> None:
    params, seeds = {"max_context": CONTEXT, "clip": 2.0}, range(WINDOWS)
    kronos.encode(windows[:1], params, 1)  # warm
    few = 4
    each = seconds(lambda: plain(kronos, windows[:1], 1, few), 2) / few
    out.add(f"P=1 repeated way, a window and sample (measured at {few})", each, "s")
    whole = out.add(f"P=1 repeated way, {WINDOWS} windows x 256 (extrapolated)", each * WINDOWS * 256, "s")
    rate = matmul_rate()
    encoded = []
    encode = out.add("P=1 encode", seconds(lambda: encoded.append(kronos.encode(windows, params, 1))), "s")
    draw = out.add("P=1 first draw", seconds(lambda: kronos.draw(encoded[0], FIRST, seeds)), "s")
    out.add("P=1 distinct pairs decoded", len(encoded[0].values), "")
    out.add("P=1 repeated way / ours", whole / (encode + draw), "x (at least 200)")
    for name, sampling in SECOND.items():
        later = out.add(f"P=1 second trial, {name}", seconds(lambda s=sampling: kronos.draw(encoded[0], s, seeds)), "s")
        out.add("    first / second", (encode + draw) / later, "x (at least 30)")
    exact = kronos.encode(windows, params, 1)
    out.add("P=1 exact, top_k 24", seconds(lambda: kronos.exact(exact, FIRST, seeds)), "s")
    tokens, stamps = encoded[0].windows[0].tokens[None], encoded[0].windows[0].stamps[None]
    with torch.inference_mode():
        prefill = seconds(lambda: kronos.prefill(tokens, stamps, keep=False), 10)
    out.add("matrix product 1536 x 1536 x 1536", rate / 1e9, "GFLOP/s")
    out.add("prefill, one window", prefill_operations(CONTEXT) / prefill / 1e9, "GFLOP/s")
    out.add("prefill / matrix product", prefill_operations(CONTEXT) / prefill / rate, "(at least 0.8)")


def plain(kronos: Kronos, windows: list[Bars], horizon: int, count: int) -> object:
    draw = plain_kronos.multinomial(sampling_of(FIRST))
    return plain_kronos.forecast(kronos, windows, 2.0, horizon, count, draw)


def seven_steps(kronos: Kronos, windows: list[Bars], name: str, floor: int, out: Measured) -> None:
    params, count, few = {"max_context": CONTEXT, "clip": 2.0}, 64, 3
    each = seconds(lambda: plain(kronos, windows[:1], 7, few)) / few
    whole = out.add(f"P=7 {name}, repeated way, a window x 64 (extrapolated from {few})", each * count, "s")
    encoded = []
    encode = seconds(lambda: encoded.append(kronos.encode(windows[:3], params, 7)))
    draw = seconds(lambda: kronos.draw(encoded[0], LONG, range(3)))
    out.add(f"P=7 {name}, encode, a window", encode / 3, "s")
    ours = out.add(f"P=7 {name}, encode and draw, a window", (encode + draw) / 3, "s")
    out.add(f"P=7 {name}, repeated way / ours", whole / ours, f"x (at least {floor})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, bars = Measured(), random_bars(CONTEXT + WINDOWS)
    windows = [bars.slice(i, i + CONTEXT) for i in range(WINDOWS)]
    kronos = random_kronos(512)
    one_step(kronos, windows, out)
    seven_steps(kronos, windows, "nothing slides", 100, out)
    kronos.network_context = CONTEXT
    seven_steps(kronos, windows, "sliding", 15, out)
    if args.json:
        args.json.write_text(json.dumps(out.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
