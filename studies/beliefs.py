"""From the evidence of many symbols to what is believed of each one's configurations.

Says what is pooled with what; studies/pooling.py has the statistics, studies/promotion.py the rule that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from forecasters.models import MODELS
from studies.evidence import MeasuredConfiguration
from studies.pooling import Measured, Pool, SymbolErrors
from studies.promotion import MIN_WINDOWS, Beliefs

OWN, IN_USE, NO_CHANGE = (
    "own trial",
    "in use",
    "no change",
)  # kinds: what is pooled where symbols share no configuration


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was measured at one symbol, all on the same windows.

    question: what must be equal for symbols to be pooled, beside the time: horizon, objective, windows.
    checkpoints: the fingerprint of each model's weights; gains of other weights are those of another model.
    """

    symbol: str
    as_of: np.datetime64
    question: str
    checkpoints: Mapping[str, str]
    candidates: Sequence[MeasuredConfiguration]
    incumbent: MeasuredConfiguration | None
    no_change: MeasuredConfiguration


def beliefs_of(cases: Sequence[Case], *, pool: str | Mapping[str, str], pool_days: float) -> list[Beliefs | None]:
    """What is believed of every case's candidates; None where no other symbol can be pooled with it.

    pool: "all", "none", or patterns of symbols by the name of their group; symbols that no pattern fits are one more.
    pool_days: that the last bars of pooled symbols may be apart.
    """
    found: list[Beliefs | None] = [None] * len(cases)
    if pool == "none":
        return found
    places = [place for place, case in enumerate(cases) if _is_usable(case)]
    for together in _groups(cases, places, pool, np.timedelta64(round(pool_days * 86_400), "s")):
        if len({cases[place].symbol for place in together}) > 1:
            shared = Pool([_symbol_errors(cases[place]) for place in together])
            for k, place in enumerate(together):
                found[place] = _beliefs(shared, k, cases[place])
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


def _is_usable(case: Case) -> bool:
    """Whether there is something to pool: enough errors, and a default configuration of every model measured."""
    measured = [one for one in case.candidates if _errors(one)]
    return (
        bool(measured)
        and all(len(_errors(one)) >= MIN_WINDOWS and _is_positive(_errors(one)) for one in measured)
        and {one.model for one in measured} <= set(_references(case))
    )


def _is_positive(errors: Sequence[float]) -> bool:
    return bool(np.isfinite(errors).all() and np.mean(errors) > 0 and min(errors) >= 0)


def _references(case: Case) -> dict[str, MeasuredConfiguration]:
    """The default configuration by model, in the order in which models are listed."""
    defaults = {one.model: one for one in case.candidates if one.source == "default" and _errors(one)}
    return {model: defaults[model] for model in MODELS if model in defaults}


def _pooled(case: Case) -> tuple[list[tuple[MeasuredConfiguration, str]], list[int | None], int | None, int | None]:
    """What goes into the pool with its kind; the places there of the candidates, the incumbent and "no change"."""
    entries: list[tuple[MeasuredConfiguration, str]] = []

    def add(one: MeasuredConfiguration | None, kind: str) -> int | None:
        if one is None or not _errors(one) or not _is_positive(_errors(one)):
            return None
        entries.append((one, kind))
        return len(entries) - 1

    candidates = [add(one, OWN) for one in case.candidates]
    known = case.incumbent is not None and case.incumbent.model in _references(case)
    return entries, candidates, add(case.incumbent, IN_USE) if known else None, add(case.no_change, NO_CHANGE)


def _symbol_errors(case: Case) -> SymbolErrors:
    def key(model: str) -> str:
        return f"{model} {case.checkpoints.get(model, '')}"

    references = _references(case)
    first = next(iter(references))
    return SymbolErrors(
        references={key(model): np.array(_errors(one)) for model, one in references.items()},
        measured=[
            # "No change" is of no model; its gain is taken over the first one's default.
            Measured(model=key(first), family=NO_CHANGE, kind=NO_CHANGE, errors=np.array(_errors(one)))
            if kind == NO_CHANGE
            else Measured(
                model=key(one.model),
                family=family(one.model, one.params),
                kind=kind,
                errors=np.array(_errors(one)),
                samples=int(one.params.get(MODELS[one.model].params.num_samples, 0)),
            )
            for one, kind in _pooled(case)[0]
        ],
    )


def _beliefs(pool: Pool, k: int, case: Case) -> Beliefs:
    _, candidates, incumbent, no_change = _pooled(case)

    def over(rival: int | None, candidate: int) -> Any:
        place = candidates[candidate]
        return None if place is None or rival is None else pool.improvement(k, place, rival)

    return Beliefs(
        gains=[None if place is None else pool.gain(k, place) for place in candidates],
        over_incumbent=partial(over, incumbent),
        over_no_change=partial(over, no_change),
    )


def _errors(one: MeasuredConfiguration) -> tuple[float, ...]:
    return one.confirmation.errors if one.confirmation else ()
