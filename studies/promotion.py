"""The update rule, and how sure one can be of what it compares: pure, no files, no database, no models.

Measurements in, a decision out. The errors compared are always of the same windows, metric and seeds, in the same
order, so that a difference is taken window by window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import numpy as np

from studies.evidence import MeasuredConfiguration, relative_gain

Reason = Literal[
    "first",
    "improved",
    "forced",
    "not better",
    "unchanged",
    "stale",
    "not comparable",
    "not confirmed",
    "no candidate",
    "worse on test",
    "not significant",
]
On = Literal["confirmation", "validation"]

LEVEL = 0.95  # of the interval
INTERVAL_REPETITIONS = 600  # 15 in each tail: its ends then move by 3 % of its width with the seed; 10 us each
TEST_REPETITIONS = 250  # the standard error of a p-value of 0.05 is then 0.014; 35 us each
MIN_WINDOWS = 20  # what says 95 % then covers 87 %, with 10 windows 82 %, with 30 and more 89 to 95 %
SEED = 20_181_231  # any: the same errors always give the same evidence


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What else is known of the chosen candidate against the incumbent; None where it cannot be computed."""

    improvement_validation: float | None = None  # relative
    improvement_test: float | None = None
    interval: tuple[float, float] | None = None  # 95 % of the relative improvement on the confirmation windows
    p_value: float | None = None  # chance of a gain as large as the best candidate's if none were better


@dataclass(frozen=True, kw_only=True)
class Decision:
    promote: bool
    reason: Reason
    candidate: int | None = None  # which of the candidates was chosen
    improvement: float | None = None  # relative, (incumbent - candidate) / incumbent, where the rule looks
    comparison: Comparison = Comparison()


def decide(
    candidates: Sequence[MeasuredConfiguration],
    incumbent: MeasuredConfiguration | None,
    *,
    confirmed: bool,
    stale: bool,
    min_improvement: float,
    force: bool = False,
    require_test: bool = False,
    max_p: float | None = None,
    on: On = "confirmation",
) -> Decision:
    """Whether the best candidate replaces the incumbent.

    The best has the lowest mean error on the confirmation windows, the first of equal ones; with `on` "validation" on
    the windows of the search. A candidate with a NaN, an infinity or a negative number anywhere is left out.

    Promotes where there is no incumbent, where the mean error is lower by strictly more than `min_improvement`
    (relative), or with `force`, which overrides everything but "not confirmed", "no candidate" and "unchanged".
    confirmed: candidates and incumbent were measured on the confirmation windows.
    stale: the incumbent's file changed since.
    require_test: of the improved, only those no worse on test. max_p: only those with a p-value of at most this. What
    is not known fails such a gate.

    Raises ValueError if errors are of different numbers of windows.
    """
    everyone = [*candidates, *([incumbent] if incumbent else [])]
    if len(counts := {len(each.confirmation.errors) for each in everyone if each.confirmation}) > 1:
        raise ValueError(f"errors on different windows cannot be compared: {sorted(counts)} of them")
    if not confirmed:
        return Decision(promote=False, reason="not confirmed")
    maes = [_mae(candidate, on) for candidate in candidates]
    known = [(mae, index) for index, mae in enumerate(maes) if mae is not None]
    if not known:
        return Decision(promote=False, reason="no candidate")
    mae, best = min(known)
    chosen = candidates[best]
    if incumbent is None:
        return Decision(promote=True, reason="first", candidate=best)
    if incumbent.model == chosen.model and dict(incumbent.params) == dict(chosen.params):
        return Decision(promote=False, reason="unchanged", candidate=best)
    if stale:  # the numbers are of another configuration
        return Decision(promote=force, reason="forced" if force else "stale", candidate=best)

    old = _mae(incumbent, on)
    improvement = _improvement(old, mae)
    usable = [candidate for candidate in candidates if _sane(candidate)]
    comparison = _compare(chosen, incumbent, usable) if _sane(incumbent) else Comparison()
    reason: Reason
    if force:
        reason = "forced"
    elif old is None:
        reason = "not comparable"
    elif not exceeds(old, mae, min_improvement):
        reason = "not better"
    elif require_test and not _no_worse_on_test(chosen, incumbent):
        reason = "worse on test"
    elif max_p is not None and not (comparison.p_value is not None and comparison.p_value <= max_p):
        reason = "not significant"
    else:
        reason = "improved"
    return Decision(
        promote=reason in ("forced", "improved"),
        reason=reason,
        candidate=best,
        improvement=improvement,
        comparison=comparison,
    )


def exceeds(old: float, new: float, min_improvement: float) -> bool:
    """(old - new) / old > min_improvement, in decimals: in binary 0.07 to 0.0693 reads as more than 1 %."""
    return _decimal(old) - _decimal(new) > _decimal(min_improvement) * _decimal(old)


def _decimal(number: float) -> Decimal:
    """The shortest decimal that reads back as this number, numpy's floats too."""
    return Decimal(repr(float(number)))


def _sane(measured: MeasuredConfiguration) -> bool:
    numbers = [*_errors(measured), measured.mae("validation"), measured.mae("test")]
    return all(number is None or (math.isfinite(number) and number >= 0) for number in numbers)


def _mae(measured: MeasuredConfiguration, on: On) -> float | None:
    """What the rule compares; None where it was not measured or is no number."""
    if not _sane(measured):
        return None
    return measured.mae("validation") if on == "validation" else _mean(_errors(measured))


def _mean(errors: Sequence[float]) -> float | None:
    """In decimals, as `exceeds`: the mean of equal errors is that error, and exactly the threshold stays exactly it."""
    return float(sum(map(_decimal, errors), Decimal(0)) / len(errors)) if errors else None


def _improvement(old: float | None, new: float | None) -> float | None:
    """Relative; None where it is not known or there was no error to improve on."""
    improvement = relative_gain(old, new)
    return improvement if improvement is not None and math.isfinite(improvement) else None


def _no_worse_on_test(chosen: MeasuredConfiguration, incumbent: MeasuredConfiguration) -> bool:
    new, old = chosen.mae("test"), incumbent.mae("test")
    return new is not None and old is not None and new <= old


def _errors(measured: MeasuredConfiguration) -> tuple[float, ...]:
    """[W], empty where it was not measured."""
    return measured.confirmation.errors if measured.confirmation else ()


# --- the comparison ----------------------------------------------------------------------------------------------


def _compare(
    chosen: MeasuredConfiguration, incumbent: MeasuredConfiguration, candidates: Sequence[MeasuredConfiguration]
) -> Comparison:
    """All of it, each part None where it cannot be computed. The measurements given are sane."""
    interval = p_value = None
    ours, theirs = _errors(chosen), _errors(incumbent)
    old = _mean(theirs)
    if old and len(ours) >= MIN_WINDOWS:
        # Sane but absurd errors overflow; what comes of it is not finite and so not shown.
        with np.errstate(all="ignore"):
            scale = np.array(theirs) / old  # [W], of mean 1: what follows is free of units
            new = np.array(ours) / old
            tried = [np.array(errors) / old for candidate in candidates if (errors := _errors(candidate))]  # each [W]
            if (block := _block_length(scale - new)) is not None:
                interval = _interval(scale, new, block)
                p_value = _superior_predictive_ability(scale, tried, block)
    return Comparison(
        improvement_validation=_improvement(incumbent.mae("validation"), chosen.mae("validation")),
        improvement_test=_improvement(incumbent.mae("test"), chosen.mae("test")),
        interval=interval,
        p_value=p_value,
    )


def _block_length(differences: np.ndarray) -> int | None:
    """Windows that a block has on average, by Politis and White (2004); None where nothing varies."""
    from arch.bootstrap import optimal_block_length  # 0.8 s that only a comparison should pay

    if not differences.std() > 1e-12:  # of errors of about 1: what rounding leaves of a constant
        return None
    length = float(optimal_block_length(differences)["stationary"].to_numpy()[0])
    return max(1, math.ceil(length)) if math.isfinite(length) else None


def _interval(old: np.ndarray, new: np.ndarray, block: int) -> tuple[float, float] | None:
    """Of 1 - mean(new) / mean(old), by the stationary bootstrap (Politis and Romano, 1994). Both [W].

    Percentiles of the resampled improvements: they keep within what improvements can be, and the ratio of two means
    of the same windows is nearly symmetric, so that there is little for a corrected interval to correct.
    """
    from arch.bootstrap import StationaryBootstrap

    bootstrap = StationaryBootstrap(block, old, seed=SEED)
    indices = np.stack([bootstrap.update_indices() for _ in range(INTERVAL_REPETITIONS)])  # [R, W]
    improvements = 1 - new[indices].sum(axis=1) / old[indices].sum(axis=1)  # [R]
    if not np.isfinite(improvements).all():
        return None
    low, high = np.quantile(improvements, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _superior_predictive_ability(old: np.ndarray, tried: Sequence[np.ndarray], block: int) -> float | None:
    """P-value of the best of the candidates against the incumbent (Hansen, 2005; "consistent"). All [W].

    It allows for the best having been chosen among those given. Differences are not studentised (arch has it so).
    """
    from arch.bootstrap import SPA

    # One that never differs has no chance to be better and would read as certain to be.
    models = [errors for errors in tried if (old - errors).std() > 1e-12]
    test = SPA(old, np.stack(models, axis=1), block_size=block, reps=TEST_REPETITIONS, seed=SEED)
    test.compute()
    p_value = float(test.pvalues.to_dict()["consistent"])
    # This many repetitions cannot tell less from nothing.
    return max(p_value, 1 / TEST_REPETITIONS) if math.isfinite(p_value) else None
