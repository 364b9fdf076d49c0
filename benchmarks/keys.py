"""`python -m benchmarks.keys`: what the forecasts of all four prices of a bar cost, by those of the close alone.

Random weights at the published sizes, Toto-Open-Base-1.0 (151 M) and Kronos-base (102 M), fp32, one thread, ten windows
in a forward as a search has them, from the bars to the points; nothing is kept between measurements. Toto sees 512
points and draws 1,024 samples of one step; by price and by ratio each key is a series of its own, by variates all four
are one window. Kronos sees 192 bars and draws 256 samples of one step, or 64 of seven. CPU seconds of this process; of
each way the fastest of all repetitions, which are interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import recording
from benchmarks.random_models import random_bars, random_kronos, random_toto
from forecasters import CLOSE, KEYS, toto
from objectives.evaluation import Evaluator
from objectives.windows import Windows

WINDOWS, TOTO_CONTEXT, KRONOS_CONTEXT, STEPS = 10, 512, 192, 7
TOTO = {"context_length": TOTO_CONTEXT, "num_samples": 1024, "aggregate": "median"}
KRONOS = {"max_context": KRONOS_CONTEXT, "clip": 3.0, "temperature": 0.3, "top_k": 24, "top_p": 1.0}
MOST = {"toto, variates": 3.3, "kronos, one step": 1.05, f"kronos, {STEPS} steps": 1.05}  # four keys by one
Way = tuple[Mapping[str, Any], Sequence[str]]  # params and keys


def cost(forecaster: Any, windows: Windows, ways: Mapping[str, Way], repeats: int) -> dict[str, float]:
    """CPU seconds of each way, the fastest repetition."""

    def seconds(params: Mapping[str, Any], keys: Sequence[str]) -> float:
        evaluator = Evaluator(forecaster, cache_bytes=0)
        began = time.process_time()
        evaluator.forecast_keys(windows, params, keys)
        return time.process_time() - began

    for way in ways.values():
        seconds(*way)  # warm
    taken = [{name: seconds(*way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: min(each[name] for each in taken) for name in ways}


def windows_of(context: int, horizon: int, count: int) -> Windows:
    bars = random_bars(context + count + horizon)
    return Windows(symbol="A", bars=bars, origins=tuple(range(context, context + count)), horizon=horizon)


def toto_costs(repeats: int) -> dict[str, dict[str, float]]:
    forecaster = toto.Toto(random_toto(), fingerprint="random")
    ways: dict[str, Way] = {"close": (TOTO, (CLOSE,))}
    ways |= {name: ({**TOTO, "key_input": name}, KEYS) for name in ("price", "ratio", "variates")}
    found = cost(forecaster, windows_of(TOTO_CONTEXT + 1, 1, WINDOWS), ways, repeats)
    one = found.pop("close")
    return {f"toto, {name}": {"one": one, "four": four} for name, four in found.items()}


def kronos_costs(repeats: int) -> dict[str, dict[str, float]]:
    forecaster = random_kronos()
    asked = {"one step": (1, 256, WINDOWS), f"{STEPS} steps": (STEPS, 64, 3)}
    found = {}
    for name, (horizon, count, windows) in asked.items():
        params = {**KRONOS, "sample_count": count}
        ways: dict[str, Way] = {"one": (params, (CLOSE,)), "four": (params, KEYS)}
        found[f"kronos, {name}"] = cost(forecaster, windows_of(KRONOS_CONTEXT, horizon, windows), ways, repeats)
    return found


MEASURES: Mapping[str, Callable[[int], dict[str, dict[str, float]]]] = {"toto": toto_costs, "kronos": kronos_costs}


def main() -> None:
    parser = recording.parser("keys", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--repeats", type=recording.at_least_one, default=5, help="of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for model in options.models:
        found |= MEASURES[model](options.repeats)
    for each in found.values():
        each["four / one"] = each["four"] / each["one"]
    rows = [(name, each["one"], each["four"], each["four / one"], MOST.get(name)) for name, each in found.items()]
    columns = ("model", "close, CPU s", "four keys, CPU s", "four / one", "at most")
    recording.table("forecasts of four keys, one thread", columns, rows)
    recording.write(options, found)


if __name__ == "__main__":
    main()
