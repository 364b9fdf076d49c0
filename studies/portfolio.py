"""What other symbols confirmed best so far: the portfolio that a confirmation measures beside its own trials.

So configurations overlap between symbols, which pooling their evidence needs where no grid is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.progress import read_confirmations
from storage.retrying import RetryingStorage
from studies.beliefs import Case, beliefs_of, family, group_of
from studies.candidates import shared_knobs
from studies.evidence import MeasuredConfiguration, StudyEvidence, from_json
from studies.returns import strategy_of
from studies.study import Study, StudyRun, list_studies

SYMBOLS = 30  # whose studies are read, at most: those with the newest bars
SAME = ("model", "metric", "objective", "windows", "checkpoint")  # parts of a definition


def read(storage: RetryingStorage, run: StudyRun) -> list[dict[str, Any]]:
    """The configurations that comparable studies of other symbols confirmed to be better than the default, best first.

    None where configurations share their draws, as then all of them are measured, and where nothing is to be pooled.
    Raises DatabaseUnavailable.
    """
    if run.pool == "none" or shared_knobs(run.space):
        return []
    newest: dict[str, Study] = {}
    for study in sorted(list_studies(storage), key=lambda study: _time(study.as_of)):
        if _is_comparable(run, study):
            newest[study.symbol] = study
    chosen = sorted(newest.values(), key=lambda study: (_time(study.as_of), study.symbol))[-SYMBOLS:]
    confirmations = read_confirmations(storage, [study.study_id for study in chosen])
    found = [
        (study, from_json(study.model, result))
        for study in chosen
        if (result := confirmations[study.study_id].result) is not None
    ]
    return best(run, found)


def best(run: StudyRun, found: Sequence[tuple[Study, StudyEvidence]]) -> list[dict[str, Any]]:
    """The configurations of these studies whose believed gain over the default is above 0, the largest first.

    What several symbols measured counts by the mean of what is believed of it at each.
    """
    cases = [
        Case(
            symbol=study.symbol,
            as_of=_time(study.as_of),
            question="",  # all of them are comparable
            checkpoints={study.model: study.definition["checkpoint"]},
            candidates=evidence.candidates,
            in_use=(),
            no_change=MeasuredConfiguration(model="no change", params={}),
        )
        for study, evidence in found
    ]
    gains: dict[str, list[float]] = {}
    params: dict[str, dict[str, Any]] = {}
    beliefs = beliefs_of(cases, pool=run.pool, pool_days=run.pool_days)
    for case, believed in zip(cases, beliefs, strict=True):
        reference = next((one.mae("confirmation") for one in case.candidates if one.source == "default"), None)
        pooled = believed.on(case.candidates, None).gains if believed else ()
        for place, one in enumerate(case.candidates):
            gain = pooled[place] if pooled else _gain(reference, one.mae("confirmation"))
            if gain is not None and one.source != "default":
                key = family(one.model, one.params)
                gains.setdefault(key, []).append(gain)
                params.setdefault(key, dict(one.params))
    means = {key: math.fsum(values) / len(values) for key, values in gains.items()}
    return [params[key] for key in sorted(means, key=lambda key: (-means[key], key)) if means[key] > 0]


def _gain(reference: float | None, mae: float | None) -> float | None:
    """On the scale of beliefs, of what one symbol alone measured."""
    return math.log(reference / mae) if reference and mae else None


def _is_comparable(run: StudyRun, study: Study) -> bool:
    mine, theirs = run.study.definition, study.definition
    return (
        study.symbol != run.study.symbol
        and strategy_of(mine) == strategy_of(theirs)
        and all(mine.get(part) == theirs.get(part) for part in SAME)
        and group_of(study.symbol, run.pool) == group_of(run.study.symbol, run.pool)
        and bool(abs(_time(study.as_of) - _time(run.study.as_of)) <= np.timedelta64(round(run.pool_days * 86_400), "s"))
    )


def _time(as_of: str) -> np.datetime64:
    return np.datetime64(as_of.removesuffix("Z"), "s")
