"""From the evidence of many symbols to what is believed of each one's configurations.

Says what is pooled with what; studies/pooling.py has the statistics, studies/promotion.py the rule that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

import numpy as np

from forecasters.models import MODELS
from studies.evidence import ENSEMBLE, MeasuredConfiguration
from studies.pooling import Improvement, Measured, Pool, SymbolErrors
from studies.promotion import MIN_WINDOWS, Beliefs

# Kinds: what is pooled where symbols share no configuration.
OWN, IN_USE, NO_CHANGE = "own trial", "in use", "no change"
OFFERED, ENSEMBLE_IN_USE = "ensemble", "ensemble in use"
OF_NO_MODEL = (NO_CHANGE, OFFERED, ENSEMBLE_IN_USE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What was measured at one symbol, all on the same windows.

    question: what must be equal for symbols to be pooled, beside the time: metric, objective, horizon, windows.
    checkpoints: the fingerprint of each model's weights; gains of other weights are those of another model.
    candidates: the default configuration of every model among them; the best of a search before the others.
    """

    symbol: str
    as_of: np.datetime64
    question: str
    checkpoints: Mapping[str, str]
    candidates: Sequence[MeasuredConfiguration]
    in_use: Sequence[MeasuredConfiguration]
    no_change: MeasuredConfiguration
    offered: Sequence[MeasuredConfiguration] = ()  # ensembles to be decided on

    @cached_property
    def references(self) -> dict[str, MeasuredConfiguration]:
        """The default configuration by model, in the order in which models are listed."""
        defaults = {one.model: one for one in self.candidates if one.source == "default" and _errors(one)}
        return {model: defaults[model] for model in MODELS if model in defaults}

    @cached_property
    def entries(self) -> list[tuple[MeasuredConfiguration, str, np.ndarray]]:
        """What goes into the pool, with its kind and its errors [W]."""
        entries = [(one, OWN) for one in self.candidates]
        entries += [(one, OFFERED) for one in self.offered]
        entries += [(one, ENSEMBLE_IN_USE) for one in self.in_use if one.model == ENSEMBLE]
        entries += [(one, IN_USE) for one in self.in_use if one.model in self.references]
        entries += [(self.no_change, NO_CHANGE)]
        found = [(one, kind, np.array(_errors(one))) for one, kind in entries]
        return [each for each in found if len(each[2]) and _are_errors(each[2])]


class SymbolBeliefs:
    """What is believed of one symbol's configurations."""

    def __init__(self, pool: Pool, symbol: int, case: Case) -> None:
        self._pool, self._symbol, self._case = pool, symbol, case
        self._places = {_key(one): place for place, (one, *_) in reversed(list(enumerate(case.entries)))}

    def on(self, candidates: Sequence[MeasuredConfiguration], incumbent: MeasuredConfiguration | None) -> Beliefs:
        """What the rule reads to choose among these. None of them has to be among those measured."""

        def over(rival: MeasuredConfiguration | None, candidate: int) -> Improvement | None:
            new, old = self._place(candidates[candidate]), self._place(rival)
            return None if new is None or old is None else self._pool.improvement(self._symbol, new, old)

        places = [self._place(one) for one in candidates]
        return Beliefs(
            gains=[None if place is None else self._pool.gain(self._symbol, place) for place in places],
            over_incumbent=partial(over, incumbent),
            over_no_change=partial(over, self._case.no_change),
        )

    def _place(self, one: MeasuredConfiguration | None) -> int | None:
        return None if one is None else self._places.get(_key(one))


def beliefs_of(cases: Sequence[Case], *, pool: str | Mapping[str, str], pool_days: float) -> list[SymbolBeliefs | None]:
    """What is believed at every case's symbol; None where no other symbol can be pooled with it.

    pool: "all", "none", or patterns of symbols by the name of their group; symbols that no pattern fits are one more.
    pool_days: that the last bars of pooled symbols may be apart.
    """
    found: list[SymbolBeliefs | None] = [None] * len(cases)
    if pool == "none":
        return found
    places = [place for place, case in enumerate(cases) if can_be_pooled(case)]
    for together in _groups(cases, places, pool, np.timedelta64(round(pool_days * 86_400), "s")):
        if len({cases[place].symbol for place in together}) > 1:
            shared = Pool([_symbol_errors(cases[place]) for place in together])
            for k, place in enumerate(together):
                found[place] = SymbolBeliefs(shared, k, cases[place])
    return found


def family(model: str, params: Mapping[str, Any]) -> str:
    """What makes configurations of different symbols the same: every param but the number of samples."""
    count = MODELS[model].params.num_samples
    return json.dumps({name: value for name, value in params.items() if name != count}, sort_keys=True)


def group_of(symbol: str, pool: str | Mapping[str, str]) -> str:
    """The name of the group that a symbol is pooled in: that of the first pattern that fits."""
    patterns = {} if isinstance(pool, str) else pool
    return next((name for name, pattern in patterns.items() if fnmatchcase(symbol, pattern)), "")


def _groups(
    cases: Sequence[Case], places: Sequence[int], pool: str | Mapping[str, str], apart: np.timedelta64
) -> list[list[int]]:
    """Cases that are pooled together: of one question and group, none further from the newest of them than `apart`."""
    groups: list[list[int]] = []
    newest: dict[tuple[str, str], list[int]] = {}
    for place in sorted(places, key=lambda place: cases[place].as_of, reverse=True):
        key = (cases[place].question, group_of(cases[place].symbol, pool))
        current = newest.get(key)
        if current is None or cases[current[0]].as_of - cases[place].as_of > apart:
            current = newest[key] = []
            groups.append(current)
        current.append(place)
    return [sorted(group) for group in groups]


def can_be_pooled(case: Case) -> bool:
    """Whether there are enough errors, and the default configuration of every model among them."""
    measured = [one for one in case.candidates if _errors(one)]
    own = [errors for _, kind, errors in case.entries if kind == OWN]
    return (
        bool(measured)
        and len(own) == len(measured)  # all of them are errors
        and all(len(errors) >= MIN_WINDOWS for errors in own)
        and {one.model for one in measured} <= set(case.references)
    )


def _are_errors(errors: np.ndarray) -> bool:
    return bool(np.isfinite(errors).all()) and errors.min() >= 0 and errors.max() > 0


def _symbol_errors(case: Case) -> SymbolErrors:
    def key(model: str) -> str:
        return f"{model} {case.checkpoints.get(model, '')}"

    first = next(iter(case.references))

    def measured(one: MeasuredConfiguration, kind: str, errors: np.ndarray) -> Measured:
        if kind in OF_NO_MODEL:  # its gain is taken over the first one's default
            return Measured(model=key(first), family=_key(one), kind=kind, errors=errors)
        return Measured(
            model=key(one.model),
            family=family(one.model, one.params),
            kind=kind,
            errors=errors,
            samples=int(one.params.get(MODELS[one.model].params.num_samples, 0)),
        )

    return SymbolErrors(
        references={key(model): np.array(_errors(one)) for model, one in case.references.items()},
        measured=[measured(*entry) for entry in case.entries],
    )


def _key(one: MeasuredConfiguration) -> tuple[str, str]:
    return one.model, json.dumps(dict(one.params), sort_keys=True)


def _errors(one: MeasuredConfiguration) -> tuple[float, ...]:
    return one.confirmation.errors if one.confirmation else ()
