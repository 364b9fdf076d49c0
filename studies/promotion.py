"""The update rule: pure, no files, no database, no models.

Measurements in, a decision out. The numbers compared are always of the same windows, metric and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

Reason = Literal[
    "first", "improved", "forced", "not better", "unchanged", "stale", "not comparable", "not finished", "no candidate"
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration and its MAE on the study's validation windows; None where it could not be measured there.

    Confirmed numbers, on more windows than the search selects on, will take this place.
    """

    model: str
    config: Mapping[str, Any]
    mae: float | None


@dataclass(frozen=True, kw_only=True)
class Decision:
    promote: bool
    reason: Reason
    improvement: float | None  # relative, (incumbent - candidate) / incumbent


def decide(
    candidate: Measured | None,
    incumbent: Measured | None,
    *,
    finished: bool,
    measured_incumbent: Mapping[str, Any] | None,
    min_improvement: float,
    force: bool = False,
) -> Decision:
    """Whether the candidate replaces the incumbent.

    incumbent: what the file holds now. measured_incumbent: the configuration that `incumbent.mae` was measured for;
    where the file changed since, the comparison is stale.
    Promotes if there is no incumbent, or the MAE improves by strictly more than `min_improvement` (relative), or
    `force`. A MAE that is not finite and positive never promotes.
    """
    if candidate is None or candidate.mae is None or not math.isfinite(candidate.mae) or candidate.mae < 0:
        return Decision(promote=False, reason="no candidate", improvement=None)
    if not finished and not force:
        return Decision(promote=False, reason="not finished", improvement=None)
    if incumbent is None:
        return Decision(promote=True, reason="first", improvement=None)
    if incumbent.model == candidate.model and dict(incumbent.config) == dict(candidate.config):
        return Decision(promote=False, reason="unchanged", improvement=None)

    known = incumbent.mae is not None and math.isfinite(incumbent.mae) and incumbent.mae > 0
    stale = known and dict(measured_incumbent or {}) != dict(incumbent.config)
    improvement = None
    if known and not stale:
        assert incumbent.mae is not None
        improvement = (incumbent.mae - candidate.mae) / incumbent.mae
    if force:
        return Decision(promote=True, reason="forced", improvement=improvement)
    if stale:
        return Decision(promote=False, reason="stale", improvement=None)
    if improvement is None:
        return Decision(promote=False, reason="not comparable", improvement=None)
    assert incumbent.mae is not None
    if exceeds(incumbent.mae, candidate.mae, min_improvement):
        return Decision(promote=True, reason="improved", improvement=improvement)
    return Decision(promote=False, reason="not better", improvement=improvement)


def exceeds(old: float, new: float, min_improvement: float) -> bool:
    """(old - new) / old > min_improvement, in decimals: in binary 0.07 to 0.0693 reads as more than 1 %."""
    old_decimal, new_decimal = Decimal(repr(old)), Decimal(repr(new))
    return old_decimal - new_decimal > Decimal(repr(min_improvement)) * old_decimal
