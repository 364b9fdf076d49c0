"""Which knobs a study searches, and its params as a promoted file has them and back.

Knows Optuna's trial. What a model can be asked is its descriptor's (forecasters/descriptor.py); knows nothing of how a
forecast is made or where trials are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import optuna

from forecasters import Bars
from forecasters.descriptor import Kind, Knob, Range
from forecasters.models import MODELS
from forecasters.scaling import AUTO, LAST, too_low
from objectives import aggregation
from studies.config import Config, ConfigError

KINDS: Mapping[str, tuple[tuple[type, ...], float, float, str]] = {  # types, least and largest value, what it is called
    "count": ((int,), 1, math.inf, "a whole number above 0"),
    "count or 0": ((int,), 0, math.inf, "a whole number"),
    "number": ((int, float), math.ulp(0.0), math.inf, "a number above 0"),
    "share": ((int, float), 0, 1, "a number from 0 to 1"),
}


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched knobs of a model and the settings that every trial shares.

    Some knobs count only beside some values of others (`Model.conditions`) and are searched only there.
    """

    model: str
    knobs: Mapping[str, Knob]
    fixed: Mapping[str, Any]

    @property
    def conditional(self) -> bool:
        """Whether some knob is searched only beside some values of others."""
        return any(name in self.knobs for name in MODELS[self.model].conditions)

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The params of a trial: what it proposes and what is fixed."""
        params, model = dict(self.fixed), MODELS[self.model]
        for name, knob in self.knobs.items():
            if not model.counts(name, params):
                params[name] = model.conditions[name].otherwise
            elif isinstance(knob, Range):
                params[name] = trial.suggest_float(name, knob.low, knob.high, step=knob.step)
            else:
                params[name] = trial.suggest_categorical(name, list(knob))
        return params

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether a search could have proposed these params."""
        return all(params.get(name) in self.knobs[name] for name in self.searched_names(params)) and all(
            params.get(name) == value for name, value in self.fixed.items()
        )

    def searched(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The searched part of params."""
        return {name: params[name] for name in self.searched_names(params)}

    def complete(self, searched: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's own params with what is fixed and what does not count, as `suggest` returned them."""
        model = MODELS[self.model]
        dead = [name for name in self.knobs if not model.counts(name, searched)]
        return {**self.fixed, **{name: model.conditions[name].otherwise for name in dead}, **searched}

    def searched_names(self, params: Mapping[str, Any]) -> list[str]:
        """The knobs that count beside these params."""
        return [name for name in self.knobs if MODELS[self.model].counts(name, params)]

    def nearest(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """These params as a search could propose them, each number at its nearest choice; None where there is none.

        A name has no nearest choice, nor has a number that means something else, as a top_k of 0 does.
        """
        model = MODELS[self.model]
        found = {**params, **self.fixed}
        special = {(rule.param, rule.value) for rule in model.conditions.values()}
        for name, knob in self.knobs.items():
            value = params[name]
            if isinstance(knob, Range):
                found[name] = knob.nearest(value)
            elif value not in knob:
                if isinstance(value, str) or (name, value) in special:
                    return None
                found[name] = min(knob, key=lambda choice: (abs(choice - value), choice))
        return {name: value for name, value in model.settled(found).items() if name in (*self.knobs, *self.fixed)}

    def to_json(self) -> dict[str, Any]:
        knobs = {name: asdict(knob) if isinstance(knob, Range) else list(knob) for name, knob in self.knobs.items()}
        return {"knobs": knobs, "fixed": dict(self.fixed)}

    @staticmethod
    def from_json(model: str, values: Mapping[str, Any]) -> Space:
        """The inverse of `to_json`."""
        knobs = {name: Range(**k) if isinstance(k, Mapping) else tuple(k) for name, k in values["knobs"].items()}
        return Space(model=model, knobs=knobs, fixed=values["fixed"])


def make(model: str, config: Config, bars: Bars | None = None) -> Space:
    """The space that the settings ask for. Raises ConfigError where they contradict each other.

    bars: of the symbol, which decide the `scale` where the settings leave that to them; None: prices as they are.
    """
    described, horizon, settings = MODELS[model], config.windows.horizon, config.models[model]
    others = ",".join(name for name, other in MODELS.items() if name != model and not other.by_name)
    leave_out = f"or leave {model} out with --models {others}"
    where = f"{config.source}: [windows] horizon {horizon}"
    if reason := described.refuses(settings, horizon):
        raise ConfigError(f"{where} {reason}; lower it, {leave_out}")
    asked = described.search(settings)
    if bars is not None and scaled(model, config, bars):
        asked = replace(asked, fixed={**asked.fixed, "scale": LAST})
    if config.search.objective == "sampled":
        return Space(model=model, knobs=asked.knobs, fixed=asked.fixed)
    if described.exact_horizon == 0:
        raise ConfigError(f"{config.source}: {model} has no exact answer; use --objective sampled, {leave_out}")
    if described.exact_horizon and horizon > described.exact_horizon:
        only = f"{model} has an exact answer at horizon {described.exact_horizon} only"
        raise ConfigError(f"{where}: {only}; use --objective sampled, {leave_out}")
    knobs = {name: knob for name, knob in asked.knobs.items() if name != described.params.num_samples}
    return Space(model=model, knobs=knobs, fixed=asked.fixed)


def scaled(model: str, config: Config, bars: Bars) -> bool:
    """Whether the settings leave the scale to these bars, and their prices are too low for the published model."""
    left_to_bars = getattr(config.models[model], "scale", None) == (AUTO,)
    return left_to_bars and too_low(bars.close, MODELS[model].least_deviation)


def most_samples(model: str, config: Config) -> int:
    """The largest number of samples that a sampled search of this model may draw; 0: it draws none."""
    if not (count := MODELS[model].params.num_samples):
        return 0
    counts = MODELS[model].search(config.models[model]).knobs[count]
    assert isinstance(counts, tuple)
    return max(counts)


def default(space: Space, config: Config) -> dict[str, Any]:
    """The model's published default as these settings can measure it.

    It draws as many samples as a search may, since a count only adds noise; none for an exact objective.
    """
    model = MODELS[space.model]
    params = model.settled({**space.fixed, **model.default(config.models[space.model])})
    count = model.params.num_samples
    params.pop(count, None)
    if count in space.knobs:
        params[count] = most_samples(space.model, config)
    return {name: params[name] for name in model.kinds if name in params}


def from_promoted(config: Mapping[str, Any], metadata: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """A promoted file's `config` as params of this space's model: whatever it says is what is measured.

    metadata: the file's own; its `fixed` says what its study had not searched. What neither says is as the space
    fixes it, or as the model's files imply it. A file that another program wrote is read as `Model.foreign` says.
    Raises ValueError where the configuration cannot be measured.
    """
    model = MODELS[space.model]
    if (foreign := model.foreign(config, metadata)) is not None:
        config = foreign.params
    fixed = metadata.get("fixed")
    fixed = fixed if isinstance(fixed, Mapping) else {}
    said = {**model.implied(space.knobs), **space.fixed, **model.by_default, **fixed, **config}
    for name, kind in model.kinds.items():
        check_value(name, kind, said.get(name))
    unsaid = [name for name, value in model.by_default.items() if name not in space.knobs and said[name] == value]
    params = model.settled({name: said[name] for name in model.kinds if name not in unsaid})
    if model.params.num_samples not in space.knobs:  # an exact objective asks for none
        params.pop(model.params.num_samples, None)
    return params


def digest_of(model: str, params: Mapping[str, Any], checkpoint: str) -> str:
    """What tells one configuration from another, in hexadecimal. checkpoint: the fingerprint of its weights."""
    said = {"model": model, "params": dict(params), "checkpoint": checkpoint}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def parse_value(name: str, kind: Kind, text: str) -> Any:
    """A param's value as people write it. Raises ValueError for one that no configuration can have."""
    value: Any = text
    if kind != "aggregate":
        try:
            value = float(text) if kind in ("number", "share") else int(text)
        except ValueError:
            value = text  # which no number is
    check_value(name, kind, value)
    return value


def check_value(name: str, kind: Kind, value: Any) -> None:
    """Raises ValueError where a promoted file cannot say this of a param."""
    if kind == "aggregate":
        if not isinstance(value, str):
            raise ValueError(f"{name} {value!r} is not a name")
        aggregation.parse(value)
        return
    if isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{name} {value!r} is none of {', '.join(kind)}")
        return
    types, least, largest, expected = KINDS[kind]
    if type(value) not in types or not math.isfinite(value) or not least <= value <= largest:
        raise ValueError(f"{name} {value!r} is not {expected}")


def to_promoted(params: Mapping[str, Any], space: Space, config: Config) -> dict[str, Any]:
    """Params as the readers of a promoted file expect them.

    A reader draws: where an exact objective left the number of samples open, it gets the most that the settings let a
    sampled search draw. Raises ValueError where anything else is missing.
    """
    model = MODELS[space.model]
    count = model.params.num_samples
    if count and count not in space.knobs:
        params = {count: most_samples(space.model, config), **params}
    if missing := [name for name in model.kinds if name not in params and name not in model.by_default]:
        raise ValueError(f"{space.model}: a configuration without {', '.join(missing)} cannot be promoted")
    said = model.to_promoted({name: params[name] for name in model.kinds if name in params}, tuple(space.knobs))
    return {**model.written(config.models[space.model], config.windows.horizon), **said}


def random_params(space: Space, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Params drawn uniformly from a space, equal for equal seeds."""
    rng = np.random.default_rng(seed)

    def one(knob: Knob) -> Any:
        if not isinstance(knob, Range):
            return knob[int(rng.integers(len(knob)))]
        if knob.step is None:
            return float(rng.uniform(knob.low, knob.high))
        return float(knob.low + knob.step * rng.integers(round((knob.high - knob.low) / knob.step) + 1))

    drawn = [{name: one(knob) for name, knob in space.knobs.items()} for _ in range(count)]
    return [space.complete(space.searched(each)) for each in drawn]
