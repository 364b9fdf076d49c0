"""`python -m benchmarks.backtest`: what a backtest costs beside its forecasts, and what its forecasts cost with Toto.

Strategies: all nine on forecasts that are there already, of random walks: 250 bars to trade on after 250 to fit offsets
to, for one pair of symbol and model, and for many in one process a core. DIRECT: one fit of 500 evaluations, apart.
Forecasts: Toto with random weights at the published size (151 M), context 512, four keys at 56 origins, all origins
together, with all cores; beside the rate of a matrix product. Seconds of this machine; the fastest of three, as other
work on it only adds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from benchmarks import recording
from benchmarks.random_models import random_bars, random_toto
from forecasters import KEYS, toto
from forecasters.work import measure_matrix_product
from objectives.evaluation import Evaluator
from objectives.strategies import STRATEGIES, Forecasts, known_before
from objectives.windows import Contexts
from objectives.work import WorkCounter
from studies import backtesting
from studies import config as configuration
from studies.backtesting import Plan
from studies.walk_forward import EVALUATIONS, STEP, TRAIN, walk_forward

PLAN = Plan(bars=250, train=TRAIN, step=STEP, evaluations=EVALUATIONS, hold=1)
ASSET = configuration.load(None).backtest.asset_class("A", random_bars(2).timestamps)
CONTEXT, ORIGINS = 512, 56
TOTO = {"context_length": CONTEXT, "num_samples": 1024, "aggregate": "median"}
LIMITS = {"strategies of one pair": 1.5, "one fit by DIRECT": 0.05, "forecasts": 6.0}


def forecasts_of(closes: np.ndarray, seed: int) -> Forecasts:
    """Forecasts without skill, as far from the last close as forecasts are."""
    rng, count = np.random.default_rng(seed), len(closes)
    moves = [rng.normal(0, 0.005, count), abs(rng.normal(0.01, 0.005, count)), abs(rng.normal(0.01, 0.005, count))]
    return Forecasts(
        close=closes * (1 + moves[0]), high=closes * (1 + moves[1]), low=closes * (1 - moves[2]),
        band=np.full(count, 0.004),
    )  # fmt: skip


def trade(seed: int) -> None:
    """All strategies of one pair of symbol and model."""
    bars, count = random_bars(800), PLAN.bars + PLAN.train
    forecasts = forecasts_of(bars.close[-count - 1 : -1], seed)
    backtesting.trade(PLAN, list(STRATEGIES.values()), bars, forecasts, ASSET)


def fit() -> None:
    """One fit of offsets, and one bar that they are used on."""
    bars, count = random_bars(800), PLAN.train + 1
    known = known_before(bars, len(bars) - count, forecasts_of(bars.close[-count - 1 : -1], 0))
    walk_forward(STRATEGIES["maxdiff"], known, bars.slice(len(bars) - count, len(bars)), ASSET)


def forecast(evaluator: Evaluator) -> None:
    """As a backtest makes them, of bars that nothing is known of."""
    bars = random_bars(CONTEXT + ORIGINS)
    contexts = Contexts(symbol="A", bars=bars, origins=tuple(range(CONTEXT, CONTEXT + ORIGINS)), horizon=1)
    evaluator.forecast_keys(contexts, TOTO, KEYS)


def fastest(work: Callable[[], object], times: int = 3) -> float:
    """Seconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    parser = recording.parser("backtest", __doc__)
    parser.add_argument("--pairs", type=recording.at_least_one, default=24, help="of symbol and model")
    options = parser.parse_args()
    cores, found = os.cpu_count() or 1, {}
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(trade, range(cores * 2)))  # every process has imported what it needs
        found["strategies of all pairs"] = fastest(lambda: list(pool.map(trade, range(options.pairs))))
    found["strategies of one pair"] = fastest(partial(trade, 0))
    found["one fit by DIRECT"] = fastest(fit, times=20)
    forecaster: Any = toto.Toto(random_toto(), fingerprint="random")
    found["forecasts"] = fastest(lambda: forecast(Evaluator(forecaster, cache_bytes=0, batch=ORIGINS)))
    counting = Evaluator(forecaster, cache_bytes=0, batch=ORIGINS, work=WorkCounter())
    forecast(counting)
    assert counting.work is not None
    rate = sum(counting.work.flop.values()) / found["forecasts"]
    product = measure_matrix_product("cpu")
    rows = [(name, seconds, LIMITS.get(name)) for name, seconds in found.items()]
    rows[0] = (f"strategies of all {options.pairs} pairs", *rows[0][1:])
    rows.append((f"    of {ORIGINS} origins and {len(KEYS)} keys: GFLOP/s", rate / 1e9, None))
    rows.append(("    of a matrix product: GFLOP/s", product / 1e9, None))
    recording.table(f"a backtest, on {cores} cores", ("what", "s", "at most"), rows)
    recording.write(options, {**found, "forecasts, FLOP/s": rate, "matrix product, FLOP/s": product})


if __name__ == "__main__":
    main()
