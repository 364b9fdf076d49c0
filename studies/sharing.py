"""Do a study's confirmation, or the share of one that a claimed slot asks for.

Whoever claims the confirmation plans it. One that takes long goes back with its plan, and the batches of windows that
can be measured are shares, for whoever has nothing better to do. Once all are done, somebody claims the confirmation
again: to plan what the decisions allow now, and at last to conclude. A share knows from the database what was measured
before it; so its numbers do not depend on who measures it, nor on when.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from objectives.evaluation import Evaluator
from storage import shares, slots
from storage.retrying import ClaimLost, RetryingStorage
from storage.shares import NewShare
from storage.slots import Slot
from studies import confirmation
from studies.confirmation import Confirmation
from studies.evidence import StudyEvidence
from studies.measuring import Computing, Entry, Found, Measuring, Stopped
from studies.portfolio import read as read_portfolio
from studies.study import StudyRun

log = logging.getLogger(__name__)

ALONE_S = 3.0  # a confirmation that takes no longer is done by one worker in one go
SHARE_S = 2.0  # a share of shorter steps has several: each costs a few milliseconds of the database
LEFT_S = 0.5  # before a worker looks again at shares that are not for it


def plan_or_conclude(
    storage: RetryingStorage, run: StudyRun, slot: Slot, evaluator: Evaluator, *, computing: Computing
) -> tuple[StudyEvidence, Mapping[str, float]] | None:
    """Go on with a claimed confirmation: its evidence, with the seconds that its shares took, where nothing is left.

    None where it was given back, shared out. Raises ForecastError, ClaimLost, and Stopped, after which what is measured
    is kept.
    """
    known = shares.read(storage, slot.study_id)
    begun = _begun(storage, run, evaluator, slot.params or {}, known.plan)
    measuring, key = begun.measuring, begun.measuring.key
    planned = known.plan is not None and known.plan["key"] == key
    results = known.results if planned else {}
    measuring.take(_found(measuring, results))
    if not planned:
        log.info("%s confirmation: %s", run.study.name, measuring.cost)

    def share_out() -> None:
        done = {n: found.to_json() for n, found in measuring.found.items() if n not in results}
        new = [NewShare(steps=sorted(done), result=done)] if done else []
        for steps in _in_shares(begun):
            new.append(NewShare(steps=steps, after=measuring.looked_at(steps[0])))
        plan = {
            "key": key,
            "portfolio": begun.portfolio,
            "entries": json.dumps([asdict(one) for one in measuring.entries]),  # as text: Postgres rewrites numbers
            "steps": len(measuring.steps),
            "needed": measuring.needed,
        }
        if not shares.share_out(storage, slot, plan, new):
            raise ClaimLost

    alone_until = time.monotonic() + (0 if planned or _step_s(begun) * len(measuring.steps) > ALONE_S else ALONE_S)
    try:
        while measuring.left and time.monotonic() < alone_until:
            number = measuring.left[0]
            measuring.take({number: measuring.measure(number, computing=computing)})
        if measuring.left:
            share_out()
            return None
        return begun.conclude(computing=computing), known.seconds if planned else {}
    except Stopped:
        share_out()
        raise


def do_share(
    storage: RetryingStorage, run: StudyRun, slot: Slot, evaluator: Evaluator, *, computing: Computing
) -> tuple[Mapping[str, Any], str] | None:
    """Measure a claimed share: its result, and what it is in words; None where it is no longer asked for.

    Raises ForecastError and Stopped.
    """
    known = shares.read(storage, slot.study_id, before=slot.number)
    if known.plan is None or known.plan["key"] != slot.label:  # planned anew: this row is gone, or goes with the next
        slots.release(storage, slot)
        return None
    measuring = Measuring(run, evaluator, [Entry(**one) for one in json.loads(known.plan["entries"])])
    if measuring.key != slot.label:  # planned with other settings, which this worker cannot do
        if not shares.discard(storage, slot):
            slots.release(storage, slot)
            time.sleep(LEFT_S)  # those who can are at it
        return None
    assert slot.params is not None
    steps: list[int] = slot.params["steps"]
    measuring.take(_found(measuring, known.results))
    for step in steps:
        measuring.take({step: measuring.measure(step, computing=computing)})
    result = {str(step): measuring.found[step].to_json() for step in steps}
    return result, f"steps {steps[0] + 1} to {steps[-1] + 1} of {len(measuring.steps)} of the confirmation"


def _begun(
    storage: RetryingStorage,
    run: StudyRun,
    evaluator: Evaluator,
    in_use: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any] | None,
) -> Confirmation:
    """As planned, where that still holds: others may have confirmed more since, of which the plan knows nothing."""
    if plan is not None:
        begun = confirmation.begin(run, evaluator, in_use, portfolio=plan["portfolio"])
        if begun.measuring.key == plan["key"]:
            return begun
    return confirmation.begin(run, evaluator, in_use, portfolio=read_portfolio(storage, run))


def _found(measuring: Measuring, results: Mapping[int, Mapping[str, Any]]) -> dict[int, Found]:
    return {n: Found.from_json(said, len(measuring.steps[n].indices)) for n, said in results.items()}


def _in_shares(begun: Confirmation) -> list[list[int]]:
    """The steps that can be measured now, in shares of about SHARE_S seconds; the rest of what was looked at apart."""
    measuring = begun.measuring
    many = max(1, round(SHARE_S / max(_step_s(begun), 1e-3)))
    kinds = itertools.groupby(measuring.left, lambda number: measuring.steps[number].kind)
    alike = [list(numbers) for _, numbers in kinds]
    return [numbers[start : start + many] for numbers in alike for start in range(0, len(numbers), many)]


def _step_s(begun: Confirmation) -> float:
    """The mean seconds of a step, by what steps have taken, else by what encoding has cost this worker in trials.

    Infinite where nothing is known.
    """
    measuring, evaluator, cost = begun.measuring, begun.evaluator, begun.measuring.cost
    if measuring.found:
        return measuring.seconds / len(measuring.found)
    if not evaluator.fresh:
        return math.inf
    return cost.windows * cost.encodings * evaluator.fresh_s / evaluator.fresh / len(measuring.steps)
