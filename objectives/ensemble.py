"""Weighted means of the points of several models' configurations, asked for as one configuration's are.

Knows nothing of how members and weights were found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from forecasters import KEYS
from objectives.evaluation import STAGES, Evaluator
from objectives.keys import KeyForecasts, key_forecasts
from objectives.quantiles import unshrunk
from objectives.windows import Contexts, SeedKind, Windows

_Ask = Callable[[Evaluator, Mapping[str, Any]], Mapping[str, np.ndarray]]


class EnsembleEvaluator(Evaluator):
    """Answers with the weighted mean of what the members' evaluators answer; a model is loaded when it is first asked.

    Params are `members`, each with `model`, `params` and `weight`. An `aggregate` beside them is asked of every member:
    a quantile of an ensemble is the weighted mean of its members' quantiles.
    """

    def __init__(self, evaluator_of: Callable[[str], Evaluator], *, rung: int, batch: int, exact: bool) -> None:
        # Not the base's: it has no forecaster and no cache of its own.
        self._evaluator_of = evaluator_of
        self.rung, self.batch, self.exact = rung, batch, exact
        self.max_num_samples, self.work = 0, None
        self.seconds, self.fresh, self.fresh_s = dict.fromkeys(STAGES, 0.0), 0, 0.0

    def fingerprint(self, params: Mapping[str, Any]) -> str:
        """Of the members' weights, in their order, as `joined_fingerprints` has it. Raises what loading raises."""
        models = [one["model"] for one in params["members"]]
        return joined_fingerprints({model: self._evaluator_of(model).forecaster.fingerprint for model in models})

    def batch_key_points(
        self,
        windows: Windows,
        params: Mapping[str, Any],
        indices: Sequence[int],
        keys: Sequence[str],
        *,
        passes: Sequence[int],
        kind: SeedKind = SeedKind.STUDY,
    ) -> dict[str, np.ndarray]:
        return self._mean(
            params, lambda one, own: one.batch_key_points(windows, own, indices, keys, passes=passes, kind=kind)
        )

    def forecast(
        self, contexts: Contexts, params: Mapping[str, Any], *, pass_number: int = 0, kind: SeedKind = SeedKind.STUDY
    ) -> np.ndarray:
        return self._mean(
            params, lambda one, own: {"": one.forecast(contexts, own, pass_number=pass_number, kind=kind)}
        )[""]

    def forecast_keys(
        self,
        contexts: Contexts,
        params: Mapping[str, Any],
        keys: Sequence[str] = KEYS,
        *,
        pass_number: int = 0,
        kind: SeedKind = SeedKind.SERVED,
    ) -> KeyForecasts:
        def scored(one: Evaluator, own: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
            return one.forecast_keys(contexts, own, keys, pass_number=pass_number, kind=kind).scored

        return key_forecasts(self._mean(params, scored))

    def _mean(self, params: Mapping[str, Any], ask: _Ask) -> dict[str, np.ndarray]:
        """The weighted mean of what every member answers, by key."""
        found: dict[str, np.ndarray] = {}
        for member in params["members"]:
            own = unshrunk(member["params"], params["aggregate"]) if "aggregate" in params else member["params"]
            evaluator = self._evaluator_of(member["model"])
            before = dict(evaluator.seconds), evaluator.fresh, evaluator.fresh_s
            for key, values in ask(evaluator, own).items():
                found[key] = found.get(key, 0.0) + member["weight"] * values
            for stage in STAGES:
                self.seconds[stage] += evaluator.seconds[stage] - before[0][stage]
            self.fresh += evaluator.fresh - before[1]
            self.fresh_s += evaluator.fresh_s - before[2]
        return found


def joined_fingerprints(by_model: Mapping[str, str]) -> str:
    """What stands for the weights of several models."""
    return " ".join(f"{model}:{fingerprint}" for model, fingerprint in by_model.items())


def fingerprint_of(evaluator: Evaluator, params: Mapping[str, Any]) -> str:
    """The fingerprint of the weights that params are measured with."""
    return (
        evaluator.fingerprint(params) if isinstance(evaluator, EnsembleEvaluator) else evaluator.forecaster.fingerprint
    )
