"""Does what `studies reduce` promises hold on windows that it has not seen?

For every symbol of a folder and three aggregates, the bundled Toto checkpoint with 4,096 samples is reduced on the 250
windows before test. What that number of samples then costs against the exact answer is measured on the 300 windows
before those, with 32 fresh draws.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recording
from forecasters import LoadedForecaster
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins
from studies import config as configuration
from studies import evaluators, reducing
from studies.config import Config
from studies.series import confirmation_windows, read_series

MODEL, CURRENT, AGGREGATES = "toto", 4096, ("mean", "median", "trimmed_mean_10")
ELSEWHERE, PASSES = 300, range(1000, 1032)
CACHE_BYTES = 2**29


def main() -> None:
    parser = recording.parser("reduced_samples", __doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the bars")
    parser.add_argument("--max-cost", type=float, nargs="+", default=[0.01, 0.005])
    options = parser.parse_args()
    config = configuration.load(None, {"data": {"dir": options.data_dir}})
    config = replace(config, models={**config.models, MODEL: replace(config.models[MODEL], checkpoint="toto-tiny")})
    forecaster = evaluators.load_forecaster(config, MODEL, device="cpu")
    rows = measure(config, forecaster, options)
    figures = [summary(rows, aggregate, max_cost) for max_cost in options.max_cost for aggregate in AGGREGATES]
    recording.table("Promised and paid", list(figures[0]), [list(row.values()) for row in figures])
    recording.write(options, {"summaries": figures, "reductions": rows})


def measure(config: Config, forecaster: LoadedForecaster, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each symbol, aggregate and highest cost."""
    rows = []
    for series in read_series(config, [])[0]:
        here = confirmation_windows(config, series.symbol, series.bars)
        before = recent_origins(series.bars, ELSEWHERE, symbol=series.symbol, before=here.origins[0], at_least=1)
        for aggregate in AGGREGATES:
            params = {"aggregate": aggregate, "num_samples": CURRENT, "context_length": 4096}
            evaluator = Evaluator(forecaster, cache_bytes=CACHE_BYTES, max_num_samples=CURRENT)
            exact = reducing.exact_errors(config, forecaster, here, params)
            for max_cost in options.max_cost:
                counts = reducing.counts_below(config, MODEL, CURRENT)
                costs, passes = reducing.costs_of(evaluator, here, params, counts, exact=exact, max_cost=max_cost)
                found = reducing.smallest(costs, CURRENT, max_cost)
                paid = None if found is None else cost(config, forecaster, before, {**params, "num_samples": found})
                rows.append({"symbol": series.symbol, "aggregate": aggregate, "max_cost": max_cost, "samples": found,
                             "passes": passes, "paid": paid,
                             "promised": next((one.cost for one in costs if one.samples == found), None)})  # fmt: skip
        print(
            series.symbol, [(row["samples"], row["paid"]) for row in rows if row["symbol"] == series.symbol], flush=True
        )
    return rows


def cost(config: Config, forecaster: LoadedForecaster, windows: Windows, params: dict[str, Any]) -> float:
    """Of these params on other windows, against the exact answer."""
    exact = reducing.exact_errors(config, forecaster, windows, params)
    assert exact is not None
    evaluator = Evaluator(forecaster, cache_bytes=CACHE_BYTES)
    return evaluator.measure(windows, params, passes=PASSES).mae / float(exact.mean()) - 1


def summary(rows: list[dict[str, Any]], aggregate: str, max_cost: float) -> dict[str, Any]:
    """Of all symbols, costs in per cent."""
    chosen = [row for row in rows if (row["aggregate"], row["max_cost"]) == (aggregate, max_cost)]
    found = [row for row in chosen if row["samples"] is not None]
    paid = np.array([100 * row["paid"] for row in found])
    return {
        "aggregate": aggregate,
        "max cost, %": 100 * max_cost,
        "reduced": f"{len(found)} of {len(chosen)}",
        "samples, median": float(np.median([row["samples"] for row in found])),
        "fewest, most": f"{min(row['samples'] for row in found)}, {max(row['samples'] for row in found)}",
        "estimated, %": float(np.mean([100 * row["promised"] for row in found])),
        "paid elsewhere, %": float(paid.mean()),
        "largest, %": float(paid.max()),
        "kept": f"{int((paid < 100 * max_cost).sum())} of {len(found)}",
    }


if __name__ == "__main__":
    main()
