"""Which configurations a confirmation measures: of a study's trials, of their grid, and of other symbols' studies.

Configurations that share their draws cost next to nothing beside each other: there the whole grid of what is made of
the draws is measured. Elsewhere each configuration needs draws, and often encodings, of its own: there few are
measured that differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forecasters.descriptor import Range
from forecasters.models import MODELS
from studies.evidence import Source
from studies.space import Space

TRIALS = 5  # of the lowest error that are confirmed, at most
FRONT = 5  # of a Pareto front that are confirmed beside them, at most
PORTFOLIO = 5  # configurations that other symbols confirmed, at most
NEIGHBOURHOOD = 0.2  # configurations nearer than this tell the same


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration that a confirmation measures and a promotion may choose."""

    params: Mapping[str, Any]
    source: Source
    trial: int | None = None


def choose(
    space: Space,
    trials: Sequence[tuple[int, dict[str, Any]]],
    default: Mapping[str, Any],
    portfolio: Iterable[Mapping[str, Any]] = (),
    *,
    front: Sequence[Mapping[str, Any]] = (),
) -> list[Candidate]:
    """The candidates of a study: trials in the order of the search, then the grid or the portfolio, then the default.

    trials: number and params of all complete trials, best first, no params twice.
    front: params of the trials of a Pareto front, highest return first; the first FRONT of them are candidates too.
    portfolio: what other symbols confirmed best, best first; not looked at where the grid is measured.
    """
    numbers, front = {_key(params): number for number, params in reversed(trials)}, front[:FRONT]
    if shared_knobs(space):
        best = [params for _, params in trials[:TRIALS]]
        more: tuple[Source, Sequence[Mapping[str, Any]]] = ("grid", _grid(space, best))
    else:
        best = distinct(space, (params for _, params in trials), TRIALS)
        more = ("portfolio", distinct(space, portfolio, PORTFOLIO, beside=[*best, *front, default]))
    sources: list[tuple[Source, Sequence[Mapping[str, Any]]]] = [
        ("trial", [*best, *front]),
        more,
        ("default", [default]),
    ]
    found: dict[frozenset[Any], Candidate] = {}
    for source, configurations in sources:
        for params in configurations:
            key = _key(params)
            if key not in found or source == "default":  # the default says that it is, in its place
                found[key] = Candidate(params=dict(params), source=source, trial=numbers.get(key))
    return list(found.values())


def _key(params: Mapping[str, Any]) -> frozenset[Any]:
    return frozenset(params.items())


# --- what shares its draws ----------------------------------------------------------------------------------


def shared_knobs(space: Space) -> list[str]:
    """The knobs that change neither an encoding nor a draw: all of their choices are made of the same draws."""
    stages = MODELS[space.model].params
    return [name for name in space.knobs if name not in (*stages.encode, *stages.draw)]


def _grid(space: Space, trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every combination of the shared knobs, at the most samples, for each setting of the others among these trials."""
    free, count = shared_knobs(space), MODELS[space.model].params.num_samples
    most = {count: max(_choices(space, count))} if count in space.knobs else {}
    settings = {
        _key({name: value for name, value in params.items() if name not in (*free, count)}): params for params in trials
    }
    return [{**params, **most, **values} for params in settings.values() for values in grid(space, free)]


def grid(space: Space, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the choices of these knobs."""
    choices = itertools.product(*(_choices(space, name) for name in names))
    return [dict(zip(names, values, strict=True)) for values in choices]


def _choices(space: Space, name: str) -> tuple[Any, ...]:
    knob = space.knobs[name]
    assert not isinstance(knob, Range), f"{name} is a range: there is no grid of it"
    return knob


# --- what does not ------------------------------------------------------------------------------------------


def distinct(
    space: Space,
    configurations: Iterable[Mapping[str, Any]],
    count: int,
    beside: Iterable[Mapping[str, Any]] = (),
) -> list[Mapping[str, Any]]:
    """The first `count` of them that are in no neighbourhood of an earlier one, or of one `beside` them."""
    found: list[Mapping[str, Any]] = []
    others = list(beside)
    for params in configurations:
        if len(found) == count:
            break
        if all(distance(space, params, other) >= NEIGHBOURHOOD for other in (*others, *found)):
            found.append(params)
    return found


def distance(space: Space, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two configurations are apart: the largest difference in any knob, each scaled to 0..1.

    A range is scaled from its ends, choices by their places in ascending order. The number of samples, which only adds
    noise, is left out. A knob that counts beside only one of the two sets them 1 apart, and so do names that differ.
    """
    model, largest = MODELS[space.model], 0.0
    for name, knob in space.knobs.items():
        if name == model.params.num_samples:
            continue
        counts = [model.counts(name, params) for params in (one, other)]
        if any(counts):
            apart = _apart(knob, one[name], other[name]) if all(counts) else 1.0
            largest = max(largest, apart)
    return largest


def _apart(knob: Sequence[Any] | Range, one: Any, other: Any) -> float:
    if isinstance(knob, Range):
        return abs(one - other) / (knob.high - knob.low)
    if not all(isinstance(value, (int, float)) for value in (*knob, one, other)):
        return 0.0 if one == other else 1.0
    places = np.interp([one, other], sorted(knob), np.linspace(0, 1, len(knob)))
    return float(abs(places[0] - places[1]))


# --- what it costs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a confirmation asks of the network, at most: dropped candidates cost less."""

    configurations: int
    windows: int  # of all parts
    encodings: int  # distinct, of a window
    passes: int  # draws from every encoding, at most

    def __str__(self) -> str:
        return (
            f"{self.configurations} configurations on {self.windows} windows: {self.windows} x {self.encodings} = "
            f"{self.windows * self.encodings} encodings, each drawn from in up to {self.passes} passes"
        )


def cost(model: str, configurations: Sequence[Mapping[str, Any]], *, windows: int, passes: int) -> Cost:
    """The cost of measuring these configurations on so many windows with so many passes."""
    names = MODELS[model].params.encode
    encodings = {tuple(params.get(name) for name in names) for params in configurations}
    return Cost(configurations=len(configurations), windows=windows, encodings=len(encodings), passes=passes)


def most_encodings(space: Space, *, in_use: int, front: bool = False) -> int:
    """How many distinct encodings of a window a confirmation needs at most, before there are trials.

    in_use: the number of configurations in use. front: whether the study has a Pareto front.
    """
    trials = TRIALS + FRONT * front
    combinations = math.prod(
        round((knob.high - knob.low) / knob.step) + 1 if isinstance(knob, Range) and knob.step
        else trials if isinstance(knob, Range)
        else len(knob)
        for name, knob in space.knobs.items()
        if name in MODELS[space.model].params.encode
    )  # fmt: skip
    others = 0 if shared_knobs(space) else PORTFOLIO
    return min(combinations, trials) + others + in_use + 1
