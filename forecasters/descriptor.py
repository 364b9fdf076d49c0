"""What is known of a model before any of its weights are: its settings, params, search space and promoted form.

One `Model` a model, listed in models.py. Loads no torch. Knows nothing of how a forecast is made, of Optuna or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from forecasters import StageParams
from forecasters.settings import CHECKPOINT, LOADING, kind_of


@dataclass(frozen=True, kw_only=True)
class Range:
    """A knob between two numbers, both included; with `step` only low, low + step, ..."""

    low: float
    high: float
    step: float | None = None

    def nearest(self, value: float) -> float:
        """The number of the range that is nearest to this one."""
        within = min(max(value, self.low), self.high)
        if not self.step:
            return within
        steps = math.floor((self.high - self.low) / self.step + 1e-6)
        return round(self.low + min(round((within - self.low) / self.step), steps) * self.step, 10)

    def __contains__(self, value: Any) -> bool:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-6)


Knob = tuple[Any, ...] | Range  # a tuple: one of these
Volatility = Literal["stable", "medium", "volatile"]
# Whole numbers above 0, whole numbers, numbers above 0, numbers of 0 to 1, names of aggregates, or one of these names.
Kind = Literal["count", "count or 0", "number", "share", "aggregate"] | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A param counts only where another one has this value; elsewhere it is not searched and says `otherwise`."""

    param: str
    value: Any
    otherwise: Any


@dataclass(frozen=True, kw_only=True)
class SearchedParams:
    """What the settings of a model ask for: the params that a search chooses, and those that all trials share."""

    knobs: Mapping[str, Knob]  # in the order in which a trial proposes them
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What the promoted file of another program means here."""

    params: Mapping[str, Any]
    lost: tuple[str, ...]  # entries that change its forecast and have no meaning here


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as settings, searches, promotion and commands know it."""

    name: str
    module: str  # its `load` and `inspect` are those of forecasters/__init__.py
    settings: type[Any]  # the frozen dataclass of its table, whose fields are made by `settings.setting`
    params: StageParams
    kinds: Mapping[str, Kind]  # of every param, in the order of a promoted file
    search: Callable[[Any], SearchedParams]  # from the settings
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    by_default: Mapping[str, Any] = field(default_factory=dict)  # what params are that are neither said nor searched
    batch: int = 0  # windows that one forward of the network has at its best; 0: they gain nothing by being more
    starting_points: Sequence[Mapping[str, Any]]  # configurations known to be sensible, the published default first
    # What else to begin a search with, by how volatile a symbol is; what one leaves out is as the default says.
    volatility_points: Mapping[Volatility, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    limits: Callable[[Any], Mapping[str, Any]] = lambda settings: {}  # what the settings allow of the published default
    # From the params of `kinds`, in its order, and the searched names.
    to_promoted: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] = lambda params, searched: dict(params)
    # What a promoted `config` says beside its params, from the settings and the horizon.
    written: Callable[[Any, int], Mapping[str, Any]] = lambda settings, horizon: {}
    implied: Callable[[Mapping[str, Knob]], Mapping[str, Any]] = lambda knobs: {}  # by a promoted file that is silent
    # A promoted `config` and its metadata, where another program wrote them; None: they name params as ours do.
    foreign: Callable[[Mapping[str, Any], Mapping[str, Any]], Foreign | None] = lambda config, metadata: None
    refuses: Callable[[Any, int], str | None] = lambda settings, horizon: None  # what is wrong with a horizon
    exact_horizon: int | None = 0  # steps, at most, that it answers without samples; None: the checkpoint decides
    window_bytes: Callable[[Mapping[str, Any], int], int] | None = None  # of an encoded window; None: weights decide
    # The paths through the network that a reader of a promoted `config` runs for a forecast, and how many of them at
    # once: published inference runs the whole context for every sample. None: there is no network.
    reader_paths: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    # The share of origins whose last close some params clip, from the closes; None: this model clips nothing.
    clipped: Callable[[np.ndarray, Sequence[int], Mapping[str, Any]], float] | None = None
    # The standard deviation of a context's closes, price, below which a constant that its published inference adds
    # matters (scaling.py); the param `scale` says what is done then.
    least_deviation: float = 0.0
    by_name: bool = False  # searched only where it is asked for by its name: a baseline, or one more large download

    @property
    def checkpoint_settings(self) -> tuple[str, ...]:
        """Settings that may name a local folder."""
        return tuple(declared.name for declared in fields(self.settings) if kind_of(declared) == CHECKPOINT)

    def default(self, settings: Any) -> dict[str, Any]:
        """The published default as far as these settings allow it; its number of samples is left as published."""
        return {**self.starting_points[0], **self.limits(settings)}

    def loading_options(self, settings: Any) -> dict[str, Any]:
        """What `forecasters.load` and `forecasters.inspect` take for these settings."""
        options = [declared.name for declared in fields(self.settings) if kind_of(declared) in (CHECKPOINT, LOADING)]
        return {name: getattr(settings, name) or None for name in options}

    def settled(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Params with what their conditions say of those that do not count."""
        dead = {name: rule.otherwise for name, rule in self.conditions.items() if not self.counts(name, params)}
        return {**params, **dead}

    def counts(self, name: str, params: Mapping[str, Any]) -> bool:
        """Whether a param changes a forecast beside these others."""
        condition = self.conditions.get(name)
        return condition is None or params.get(condition.param) == condition.value
