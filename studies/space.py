"""Which knobs each model searches, and what a promoted file calls them.

Knows Optuna's trial. Knows nothing of how a forecast is made or where trials are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from objectives import aggregation
from studies.config import Config

# The reader's choices of samples_per_batch by number of samples (it asserts num_samples % samples_per_batch == 0).
BATCH_TIERS = ((128, (16, 32, 64)), (512, (32, 64, 128)), (1024, (64, 128, 256)), (None, (128, 256, 512)))


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched knobs of a model, each a choice, and the settings that every trial shares."""

    model: str
    choices: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The params of a trial: what it proposes and what is fixed."""
        return {**self.fixed, **{name: trial.suggest_categorical(name, list(c)) for name, c in self.choices.items()}}

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether a search could have proposed these params."""
        return all(params.get(name) in choices for name, choices in self.choices.items()) and all(
            params.get(name) == value for name, value in self.fixed.items()
        )

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The searched part of params."""
        return {name: params[name] for name in self.choices}

    def to_json(self) -> dict[str, Any]:
        return {"choices": {k: list(v) for k, v in self.choices.items()}, "fixed": dict(self.fixed)}

    def fingerprint(self) -> str:
        """Changes with any knob, choice, their order (Optuna refuses a changed order) or fixed setting."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()


def make(model: str, config: Config) -> Space:
    """The space that the settings ask for."""
    assert model == "toto", model
    toto = config.toto
    choices: dict[str, tuple[Any, ...]] = {"aggregate": toto.aggregates, "num_samples": toto.num_samples}
    fixed: dict[str, Any] = {}
    if len(toto.context_length) == 1:
        fixed["context_length"] = toto.context_length[0]
    else:
        choices["context_length"] = toto.context_length
    return Space(model=model, choices=choices, fixed=fixed)


def from_promoted(model: str, config: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """A promoted file's `config` as params; what it does not say is as the space fixes it.

    Raises ValueError where the configuration cannot be measured here.
    """
    num_samples = config.get("num_samples")
    if type(num_samples) is not int or num_samples < 1:
        raise ValueError(f"num_samples {num_samples!r} is no positive whole number")
    name = config.get("aggregate", "mean")
    if not isinstance(name, str):
        raise ValueError(f"aggregate {name!r} is no name")
    aggregation.parse(name)
    params = {**space.fixed, "aggregate": name, "num_samples": num_samples}
    if "context_length" in space.choices:
        params["context_length"] = config.get("context_length", max(space.choices["context_length"]))
    return params


def to_promoted(model: str, params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Params as today's readers of a promoted file expect them."""
    config = {name: params[name] for name in space.choices}
    return {**config, "samples_per_batch": samples_per_batch(params["num_samples"])}


def samples_per_batch(num_samples: int) -> int:
    """The largest batch of the reader's tier that divides the number of samples: it changes no forecast."""
    tier = next(batches for limit, batches in BATCH_TIERS if limit is None or num_samples <= limit)
    return max(
        (batch for batch in tier if num_samples % batch == 0),
        default=max(d for d in range(1, min(num_samples, tier[-1]) + 1) if num_samples % d == 0),
    )
