"""The second objective of a search that asks for one: what a strategy earns with a trial's own forecasts.

Owns what such a study's definition says, what is refused, and the Pareto front. The MAE stays the first objective, and
what promotions rest on. The trading itself is backtesting.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from objectives.bars import DataError
from objectives.costs import AssetClass
from objectives.fills import check_bars
from objectives.strategies import STRATEGIES, Strategy, StrategyError
from objectives.windows import Windows
from storage.retrying import RetryingStorage
from studies.config import Config, ConfigError
from studies.space import Space

PNL = "pnl"  # the part of a definition that only these studies have


def defined(config: Config, validation: Windows, space: Space) -> dict[str, Any]:
    """The part of a definition: the strategy and what trading the symbol costs. Empty where none is asked for.

    Raises ConfigError for what no symbol could be searched with, DataError for bars that cannot be traded.
    """
    if not (name := config.search.objective_pnl):
        return {}
    strategy, horizon = STRATEGIES[name], config.windows.horizon
    if horizon != 1:
        raise ConfigError(
            f"{config.source}: [windows] horizon {horizon}: {name} trades bar by bar; set it to 1 to search returns"
        )
    if config.search.objective == "exact" and "band" in strategy.forecasts and "aggregate" not in space.knobs:
        raise ConfigError(
            f"{config.source}: {name} needs quantiles, and the exact answer of {space.model} is a mean alone; "
            "use --objective sampled or another strategy"
        )
    symbol, origins = validation.symbol, validation.origins
    bars = validation.bars.slice(origins[0] - 1, origins[-1] + 1)
    try:
        strategy.check_bars(bars, symbol)
    except StrategyError as error:
        raise DataError(str(error)) from None
    check_bars(bars, symbol)
    costs = config.backtest.asset_class(symbol, validation.bars.timestamps)
    return {PNL: {"strategy": name, "costs": asdict(costs)}}


def strategy_of(definition: Mapping[str, Any]) -> str:
    """The name of the strategy that a study searches returns of, or nothing."""
    return definition.get(PNL, {}).get("strategy", "")


def name_of(definition: Mapping[str, Any]) -> str:
    """The name of a study: SYMBOL/model@AS_OF, and after it +STRATEGY where it searches returns."""
    symbol, model, as_of = (definition[part] for part in ("symbol", "model", "as_of"))
    return "+".join([f"{symbol}/{model}@{as_of}", *filter(None, [strategy_of(definition)])])


def metrics_of(definition: Mapping[str, Any]) -> list[str]:
    """What a study's values are called: the error, which is minimised, and the return, which is maximised."""
    return [definition["metric"], *(f"{name}_return_a_bar" for name in filter(None, [strategy_of(definition)]))]


def option(strategy: str) -> str:
    """What a suggested command says of a search of returns; nothing where there is no strategy."""
    return f" --objective-pnl {strategy}" if strategy else ""


def traded_by(definition: Mapping[str, Any]) -> tuple[Strategy, AssetClass] | None:
    """What a study's trials trade, and at which costs; None where they do not."""
    found = definition.get(PNL)
    return found and (STRATEGIES[found["strategy"]], AssetClass(**found["costs"]))


def read_front(storage: RetryingStorage, name: str) -> list[FrozenTrial]:
    """The `front` of a study. Raises DatabaseUnavailable."""
    return front(optuna.load_study(study_name=name, storage=storage))


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials of which no other has both a lower MAE and a higher return, lowest MAE first.

    Of equal params the first. A trial's values are its MAE and its mean net return a bar.
    """
    found: dict[frozenset[Any], FrozenTrial] = {}
    for trial in sorted(study.best_trials, key=lambda trial: (trial.values[0], trial.number)):
        found.setdefault(frozenset(trial.params.items()), trial)
    return list(found.values())
