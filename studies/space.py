"""Which knobs each model searches, and what a promoted file calls them.

Knows Optuna's trial. Knows nothing of how a forecast is made or where trials are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna

from objectives import aggregation
from studies.config import Config, ConfigError

# The reader's choices of samples_per_batch by number of samples (it asserts num_samples % samples_per_batch == 0).
BATCH_TIERS = ((128, (16, 32, 64)), (512, (32, 64, 128)), (1024, (64, 128, 256)), (None, (128, 256, 512)))
CLIP_STEP = 0.2  # every clip needs its own encoding: a continuous one would never find it in the cache
DEAD_TOP_P = 1.0  # what top_p says where top_k decides
KRONOS_CONFIG = {  # what a promoted file must say
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "sample_count": (int,),
    "max_context": (int,),
    "clip": (int, float),
}


@dataclass(frozen=True, kw_only=True)
class Range:
    """A knob between two numbers, both included; with `step` only low, low + step, ..."""

    low: float
    high: float
    step: float | None = None

    def __contains__(self, value: Any) -> bool:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-6)


Knob = tuple[Any, ...] | Range  # a tuple: one of these


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched knobs of a model and the settings that every trial shares.

    A model with `top_k` among its knobs searches `top_p` only where top_k is 0.
    """

    model: str
    knobs: Mapping[str, Knob]
    fixed: Mapping[str, Any]

    @property
    def conditional(self) -> bool:
        """Whether some knob is searched only beside some values of others."""
        return "top_p" in self.knobs

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The params of a trial: what it proposes and what is fixed."""
        params = dict(self.fixed)
        for name, knob in self.knobs.items():
            if name == "top_p" and params["top_k"] != 0:
                params[name] = DEAD_TOP_P
            elif isinstance(knob, Range):
                params[name] = trial.suggest_float(name, knob.low, knob.high, step=knob.step)
            else:
                params[name] = trial.suggest_categorical(name, list(knob))
        return params

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether a search could have proposed these params."""
        return all(params.get(name) in knob for name, knob in self._live(params).items()) and all(
            params.get(name) == value for name, value in self.fixed.items()
        )

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The searched part of params."""
        return {name: params[name] for name in self._live(params)}

    def complete(self, searched: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's own params with what is fixed, as `suggest` returned them."""
        dead = {"top_p": DEAD_TOP_P} if self.conditional and searched.get("top_k") != 0 else {}
        return {**self.fixed, **dead, **searched}

    def _live(self, params: Mapping[str, Any]) -> dict[str, Knob]:
        return {name: knob for name, knob in self.knobs.items() if name != "top_p" or params.get("top_k") == 0}

    def to_json(self) -> dict[str, Any]:
        knobs = {name: asdict(knob) if isinstance(knob, Range) else list(knob) for name, knob in self.knobs.items()}
        return {"knobs": knobs, "fixed": dict(self.fixed)}

    @staticmethod
    def from_json(model: str, values: Mapping[str, Any]) -> Space:
        """The inverse of `to_json`."""
        knobs = {name: Range(**k) if isinstance(k, Mapping) else tuple(k) for name, k in values["knobs"].items()}
        return Space(model=model, knobs=knobs, fixed=values["fixed"])


def make(model: str, config: Config) -> Space:
    """The space that the settings ask for. Raises ConfigError where they contradict each other."""
    return {"toto": _toto, "kronos": _kronos}[model](config)


def _toto(config: Config) -> Space:
    toto = config.toto
    knobs: dict[str, Knob] = {"aggregate": toto.aggregates}
    fixed: dict[str, Any] = {}
    if config.search.objective == "sampled":
        knobs["num_samples"] = toto.num_samples
    if len(toto.context_length) == 1:
        fixed["context_length"] = toto.context_length[0]
    else:
        knobs["context_length"] = toto.context_length
    return Space(model="toto", knobs=knobs, fixed=fixed)


def _kronos(config: Config) -> Space:
    kronos = config.kronos
    if config.windows.horizon >= min(kronos.network_context, *kronos.max_context):
        raise ConfigError(
            f"{config.source}: [windows] horizon {config.windows.horizon} must be below [kronos] network_context and "
            f"every max_context; lower it, or leave kronos out with --models toto"
        )
    if config.search.objective == "exact" and config.windows.horizon > 1:
        raise ConfigError(
            f"{config.source}: [windows] horizon {config.windows.horizon}: kronos has an exact answer at horizon 1 "
            "only; use --objective sampled, or leave kronos out with --models toto"
        )
    knobs: dict[str, Knob] = {
        "temperature": Range(low=kronos.temperature[0], high=kronos.temperature[1]),
        "top_k": kronos.top_k,
    }
    if 0 in kronos.top_k:
        knobs["top_p"] = Range(low=kronos.top_p[0], high=kronos.top_p[1])
    if config.search.objective == "sampled":
        knobs["sample_count"] = kronos.sample_count
    knobs["max_context"] = kronos.max_context
    knobs["clip"] = Range(low=kronos.clip[0], high=kronos.clip[1], step=CLIP_STEP)
    return Space(model="kronos", knobs=knobs, fixed={} if 0 in kronos.top_k else {"top_p": DEAD_TOP_P})


def sample_counts(model: str, config: Config) -> tuple[int, ...]:
    """The numbers of samples that a search of this model may draw."""
    return config.toto.num_samples if model == "toto" else config.kronos.sample_count


def from_promoted(model: str, config: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """A promoted file's `config` as params; what it does not say is as the space fixes it.

    Raises ValueError where the configuration cannot be measured here.
    """
    return _from_kronos(config, space) if model == "kronos" else _from_toto(config, space)


def _from_toto(config: Mapping[str, Any], space: Space) -> dict[str, Any]:
    num_samples = config.get("num_samples")
    if type(num_samples) is not int or num_samples < 1:
        raise ValueError(f"num_samples {num_samples!r} is no positive whole number")
    name = config.get("aggregate", "mean")
    if not isinstance(name, str):
        raise ValueError(f"aggregate {name!r} is no name")
    aggregation.parse(name)
    params = {**space.fixed, "aggregate": name}
    if "num_samples" in space.knobs:
        params["num_samples"] = num_samples
    lengths = space.knobs.get("context_length")
    if isinstance(lengths, tuple):
        params["context_length"] = config.get("context_length", max(lengths))
    return params


def _from_kronos(config: Mapping[str, Any], space: Space) -> dict[str, Any]:
    for name, kinds in KRONOS_CONFIG.items():
        value: Any = config.get(name)
        if type(value) not in kinds or not math.isfinite(value) or value < 0 or (value == 0 and name != "top_k"):
            raise ValueError(f"{name} {value!r} is no {'number' if float in kinds else 'whole number'} above 0")
    params = {name: config[name] for name in KRONOS_CONFIG}
    if params["top_k"] != 0:
        params["top_p"] = DEAD_TOP_P
    if "sample_count" not in space.knobs:
        del params["sample_count"]
    return params


def to_promoted(model: str, params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Params as today's readers of a promoted file expect them.

    A reader draws: where an exact objective left the number of samples open, it gets the most that were ever used.
    """
    if model == "kronos":
        return {name: params.get(name, 320) for name in KRONOS_CONFIG}
    config = {name: params[name] for name in space.knobs}
    num_samples = config.setdefault("num_samples", 4096)
    return {**config, "samples_per_batch": samples_per_batch(num_samples)}


def samples_per_batch(num_samples: int) -> int:
    """The largest batch of the reader's tier that divides the number of samples: it changes no forecast."""
    tier = next(batches for limit, batches in BATCH_TIERS if limit is None or num_samples <= limit)
    return max(
        (batch for batch in tier if num_samples % batch == 0),
        default=max(d for d in range(1, min(num_samples, tier[-1]) + 1) if num_samples % d == 0),
    )
