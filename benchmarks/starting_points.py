"""Does a search do better that begins with points for a symbol as volatile as this one, `[search] starts`?

Every symbol of a folder is searched with each bundled checkpoint twice from the same seed, with those points first and
without. Compared are the lowest error of the search, and the error of that configuration on the windows before, which
no search has seen. A gain is a log ratio of errors; the mean is over symbols, its standard error too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks import recording
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins
from studies import config as configuration
from studies import evaluators, sampler
from studies import space as spaces
from studies.config import Config
from studies.series import Series, confirmation_windows, read_series, split_windows
from studies.space import Space
from studies.starts import daily_volatility, volatility_class, volatility_starts

CHECKPOINTS = {"toto": "toto-tiny", "kronos": "kronos-tiny"}
CACHE_BYTES = 2**31
ELSEWHERE = 100  # windows before those of the search


def main() -> None:
    parser = recording.parser("starting_points", __doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the bars")
    parser.add_argument("--seeds", type=recording.at_least_one, default=5)
    parser.add_argument("--trials", type=recording.at_least_one, default=20)
    parser.add_argument("--models", nargs="+", choices=tuple(CHECKPOINTS), default=list(CHECKPOINTS))
    options = parser.parse_args()
    rows = run(options)
    figures = [row for model in options.models for row in summaries([row for row in rows if row["model"] == model])]
    columns = ("model", "symbols", "count", "search", "search_error", "elsewhere", "elsewhere_error", "better", "worse")
    recording.table("Gain of the starting points", columns, [[row[name] for name in columns] for row in figures])
    recording.write(options, {"summaries": figures, "symbols": by_symbol(rows)})


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a model, symbol and seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = configuration.load(None, {"data": {"dir": options.data_dir}})
    models = {name: replace(one, checkpoint=CHECKPOINTS.get(name)) if name in CHECKPOINTS else one
              for name, one in config.models.items()}  # fmt: skip
    config = replace(config, models=models)
    series, _ = read_series(config, [])
    rows = []
    for model in options.models:
        forecaster = evaluators.load_forecaster(config, model, device="cpu")
        for one in series:
            evaluator = evaluators.evaluator_of(config, forecaster, cache_bytes=CACHE_BYTES, keep=False)
            rows += compare(config, one, evaluator, seeds=options.seeds, trials=options.trials)
            print(model, one.symbol, *(f"{row['search']:+.4f}" for row in rows[-options.seeds :]), flush=True)
    return rows


def compare(config: Config, series: Series, evaluator: Evaluator, *, seeds: int, trials: int) -> list[dict[str, Any]]:
    """The gains of one symbol, a row a seed."""
    model = evaluator.forecaster.model
    space = spaces.make(model, config)
    split = split_windows(config, series.symbol, series.bars)
    before = recent_origins(
        series.bars, ELSEWHERE, symbol=series.symbol, before=split.validation.origins[0], at_least=1
    )
    seen = series.bars.slice(0, confirmation_windows(config, series.symbol, series.bars).origins[0])
    starts = volatility_starts(config, space, seen)
    searched, elsewhere = measurer(evaluator, split.validation, 0), measurer(evaluator, before, 1)
    rows = []
    for seed in range(seeds):
        found = [search(space, searched, begin, seed=seed, trials=trials) for begin in ({}, starts)]
        errors = {name: [measure(params) for params in found] for name, measure in
                  (("search", searched), ("elsewhere", elsewhere))}  # fmt: skip
        rows.append({
            "model": model, "symbol": series.symbol, "class": volatility_class(daily_volatility(seen)), "seed": seed,
            **{name: float(np.log(without / with_)) for name, (without, with_) in errors.items()},
        })  # fmt: skip
    return rows


def measurer(evaluator: Evaluator, windows: Windows, number: int) -> Callable[[Mapping[str, Any]], float]:
    """The error of params on these windows with the seeds of one pass, computed once."""
    known: dict[frozenset[Any], float] = {}

    def measure(params: Mapping[str, Any]) -> float:
        key = frozenset(params.items())
        if key not in known:
            known[key] = evaluator.measure(windows, params, passes=(number,)).mae
        return known[key]

    return measure


def search(
    space: Space, measure: Callable[[Mapping[str, Any]], float], starts: Mapping[str, Mapping[str, Any]],
    *, seed: int, trials: int,
) -> dict[str, Any]:  # fmt: skip
    """The params with the lowest error of so many trials."""
    random.seed(seed)
    study = optuna.create_study(sampler=sampler.make_sampler(conditional=space.conditional, seed=seed))
    for params in starts.values():
        study.enqueue_trial(space.searched(params))
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, measure(space.suggest(trial)))
    return space.complete(study.best_params)


def by_symbol(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean gain of each model and symbol in per cent."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        alike = [one for one in rows if (one["model"], one["symbol"]) == (row["model"], row["symbol"])]
        means = {name: round(float(100 * np.mean([one[name] for one in alike])), 4) for name in ("search", "elsewhere")}
        found[f"{row['model']} {row['symbol']}"] = {"class": row["class"], **means}
    return found


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean gain in per cent of all symbols and of each class, with the standard error over symbols."""
    found = []
    for kind in ("all", "stable", "medium", "volatile"):
        chosen = [row for row in rows if kind in ("all", row["class"])]
        symbols = sorted({row["symbol"] for row in chosen})
        if not symbols:
            continue
        row: dict[str, Any] = {"model": rows[0]["model"], "symbols": kind, "count": len(symbols)}
        for name in ("search", "elsewhere"):
            means = [100 * np.mean([one[name] for one in chosen if one["symbol"] == symbol]) for symbol in symbols]
            row[name] = round(float(np.mean(means)), 3)
            row[f"{name}_error"] = (
                round(float(np.std(means, ddof=1) / np.sqrt(len(means))), 3) if len(means) > 1 else None
            )
        row["better"] = sum(one["search"] > 0 for one in chosen)
        row["worse"] = sum(one["search"] < 0 for one in chosen)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
