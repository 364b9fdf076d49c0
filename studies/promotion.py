"""The update rule, and how sure one can be of what it compares: pure, no files, no database, no models.

Measurements in, a decision out. The errors compared are always of the same windows, metric and seeds, in the same
order, so that a difference is taken window by window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Literal

import numpy as np

from objectives.bootstrap import block_lengths, resampled_indices
from studies.evidence import MeasuredConfiguration, relative_gain
from studies.pooling import Improvement

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
    "worse than no change",
    "clips the last close",
    "worse in returns",
]
On = Literal["pooled", "confirmation", "validation"]

LEVEL = 0.95  # of the interval
INTERVAL_REPETITIONS = 600  # 15 in each tail: its ends then move by 3 % of its width with the seed; 10 us each
MIN_WINDOWS = 20  # what says 95 % then covers 87 %, with 10 windows 82 %, with 30 and more 89 to 95 %
SEED = 20_181_231  # any: the same errors always give the same evidence


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is asked of a promotion.

    max_clipped: the largest share of origins whose last close a configuration may clip and still be chosen.
    """

    min_improvement: float
    force: bool = False
    require_test: bool = False
    require_skill: bool = False
    max_p: float | None = None
    max_clipped: float = 1.0
    on: On = "pooled"

    @property
    def part(self) -> Literal["confirmation", "validation"]:
        """The windows whose errors it reads."""
        return "validation" if self.on == "validation" else "confirmation"


@dataclass(frozen=True, kw_only=True)
class Beliefs:
    """What is believed of one symbol's candidates, given what they did at other symbols (studies/pooling.py)."""

    gains: Sequence[float | None]  # of every candidate, on one log scale; None: not measured
    over_incumbent: Callable[[int], Improvement | None]  # of a candidate, by its place; None: not comparable
    over_no_change: Callable[[int], Improvement | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What else is known of the chosen candidate; None where it cannot be computed.

    All of it is against the incumbent, or against "no change" where there is none.
    """

    improvement_confirmation: float | None = None  # relative, of this symbol's own windows
    improvement_validation: float | None = None
    improvement_test: float | None = None
    interval: tuple[float, float] | None = None  # 95 % of the improvement that the rule looks at
    p_value: float | None = None  # chance that this improvement is not above 0
    symbols: int = 1  # whose evidence it rests on


@dataclass(frozen=True, kw_only=True)
class ReturnsDifference:
    """What a strategy earns a bar with a candidate's forecasts over the incumbent's, net, on the same bars."""

    strategy: str
    value: float
    interval: tuple[float, float] | None  # 95 %; None: the same at every bar

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval lies below 0: of two configurations that differ little either may earn more."""
        return self.interval is not None and self.interval[1] < 0


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
    no_change: MeasuredConfiguration,
    rule: Rule,
    *,
    confirmed: bool,
    stale: bool,
    beliefs: Beliefs | None = None,
) -> Decision:
    """Whether the best candidate replaces the incumbent.

    The best has the largest believed gain; without `beliefs`, or with another `rule.on`, the lowest mean error on the
    confirmation windows, or on those of the search; the first of equal ones. A candidate with a NaN, an infinity or a
    negative number anywhere is left out, and so is, unless forced, one that clips more than `rule.max_clipped`, and one
    that is believed in although its own windows show it worse than a default by more than `rule.min_improvement`.

    Promotes where there is no incumbent, where the improvement is strictly more than `rule.min_improvement`, or by
    force, which overrides everything but "not confirmed", "no candidate" and "unchanged". The gates of the rule can
    only refuse more: no worse on test, a p-value of at most `max_p`, a skill above 0. They ask against the incumbent,
    or against "no change" where there is none. What is not known fails a gate.

    no_change: the forecast that the price stays, on the same windows.
    confirmed: candidates and incumbent were measured on the confirmation windows.
    stale: the incumbent's file changed since.

    Raises ValueError if errors are of different numbers of windows.
    """
    everyone = [*candidates, no_change, *([incumbent] if incumbent else [])]
    counts = {len(each.confirmation.errors) for each in everyone if each.confirmation and each.confirmation.errors}
    if len(counts) > 1:
        raise ValueError(f"errors on different windows cannot be compared: {sorted(counts)} of them")
    if not confirmed:
        return Decision(promote=False, reason="not confirmed")
    pooled = beliefs if rule.on == "pooled" else None
    scores = [_score(place, one, rule.on, pooled) for place, one in enumerate(candidates)]
    clips = [one.clipped is not None and one.clipped > rule.max_clipped for one in candidates]
    known = [(score, place) for place, score in enumerate(scores) if score is not None]
    if pooled and not rule.force:
        known = _uncontradicted(known, candidates, rule.min_improvement)
    if not known:
        return Decision(promote=False, reason="no candidate")
    allowed = [one for one in known if rule.force or not clips[one[1]]]
    chosen = [
        _decide_on(min(found)[1], candidates, incumbent, no_change, rule, stale, pooled)
        for found in (allowed, known)
        if found
    ]
    if (not chosen[0].promote and chosen[-1].promote) or not allowed:
        return replace(chosen[-1], promote=False, reason="clips the last close")
    return chosen[0]


def _decide_on(
    best: int,
    candidates: Sequence[MeasuredConfiguration],
    incumbent: MeasuredConfiguration | None,
    no_change: MeasuredConfiguration,
    rule: Rule,
    stale: bool,
    pooled: Beliefs | None,
) -> Decision:
    """What is to become of one candidate, as `decide` says."""
    chosen = candidates[best]
    if incumbent is not None and incumbent.model == chosen.model and dict(incumbent.params) == dict(chosen.params):
        return Decision(promote=False, reason="unchanged", candidate=best)
    if stale and incumbent is not None:  # the numbers are of another configuration
        return Decision(promote=rule.force, reason="forced" if rule.force else "stale", candidate=best)

    rival = incumbent or no_change
    comparison, believed = Comparison(), None
    if _sane(rival):
        if pooled is not None:
            believed = pooled.over_incumbent(best) if incumbent else pooled.over_no_change(best)
        comparison = _compare(chosen, rival, believed)
    old, new = _mae(rival, rule.on), _mae(chosen, rule.on)
    assert new is not None
    better = old is not None and (
        exceeds(old, new, rule.min_improvement) if believed is None else believed.value > rule.min_improvement
    )
    reason: Reason
    if rule.force and incumbent is not None:
        reason = "forced"
    elif incumbent is not None and old is None:
        reason = "not comparable"
    elif incumbent is not None and not better:
        reason = "not better"
    elif rule.require_test and not _no_worse_on_test(chosen, rival) and not rule.force:
        reason = "worse on test"
    elif rule.max_p is not None and not _is_at_most(comparison.p_value, rule.max_p) and not rule.force:
        reason = "not significant"
    elif rule.require_skill and not _has_skill(chosen) and not rule.force:
        reason = "worse than no change"
    else:
        reason = "improved" if incumbent is not None else "first"
    return Decision(
        promote=reason in ("first", "forced", "improved"),
        reason=reason,
        candidate=best,
        improvement=None if incumbent is None else _improvement(old, new) if believed is None else believed.value,
        comparison=comparison,
    )


def exceeds(old: float, new: float, min_improvement: float) -> bool:
    """(old - new) / old > min_improvement, in decimals: in binary 0.07 to 0.0693 reads as more than 1 %.

    To 12 digits, without what summing leaves in the last ones: the mean of 250 times 0.0693 is that too.
    """
    before, after = _decimal(old), _decimal(new)
    return before - after > Decimal(repr(float(min_improvement))) * before


def _decimal(number: float) -> Decimal:
    return Decimal(f"{float(number):.12g}")


def _sane(measured: MeasuredConfiguration) -> bool:
    numbers = [*_errors(measured), measured.mae("validation"), measured.mae("test")]
    return all(number is None or (math.isfinite(number) and number >= 0) for number in numbers)


def _uncontradicted(
    known: list[tuple[float, int]], candidates: Sequence[MeasuredConfiguration], margin: float
) -> list[tuple[float, int]]:
    """Without what these very windows show to be worse than the best of the models' defaults by more than the margin.

    What a configuration gains at other symbols is no reason to try it where it loses: VIX in the demonstration got one
    with a skill of -5.4 % so, while a default had +0.4 %.
    """
    maes = {place: candidates[place].mae("confirmation") or math.inf for _, place in known}
    least = min((mae for place, mae in maes.items() if candidates[place].source == "default"), default=math.inf)
    return [one for one in known if maes[one[1]] <= least * (1 + margin)]


def _score(place: int, measured: MeasuredConfiguration, on: On, pooled: Beliefs | None) -> float | None:
    """What the best has least of; None where it was not measured or is no number."""
    mae = _mae(measured, on)
    if mae is None or pooled is None:
        return mae
    gain = pooled.gains[place]
    return None if gain is None else -gain


def _mae(measured: MeasuredConfiguration, on: On) -> float | None:
    """Of the windows that the rule looks at; None where it was not measured or is no number."""
    if not _sane(measured):
        return None
    if on == "validation":
        return measured.mae("validation")
    if measured.confirmation is None or not measured.confirmation.errors:
        return None
    mae = measured.confirmation.mae
    return mae if math.isfinite(mae) else _mean(measured.confirmation.errors)


def _mean(errors: Sequence[float]) -> float:
    """In decimals, where the sum of floats would overflow."""
    return float(sum(map(_decimal, errors), Decimal(0)) / len(errors))


def _improvement(old: float | None, new: float | None) -> float | None:
    """Relative; None where it is not known or there was no error to improve on."""
    improvement = relative_gain(old, new)
    return improvement if improvement is not None and math.isfinite(improvement) else None


def _no_worse_on_test(chosen: MeasuredConfiguration, rival: MeasuredConfiguration) -> bool:
    return _is_at_most(chosen.mae("test"), rival.mae("test"))


def _is_at_most(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value <= limit


def _has_skill(chosen: MeasuredConfiguration) -> bool:
    return chosen.confirmation is not None and chosen.confirmation.skill > 0


def _errors(measured: MeasuredConfiguration) -> tuple[float, ...]:
    """[W], empty where it was not measured."""
    return measured.confirmation.errors if measured.confirmation else ()


# --- the comparison ----------------------------------------------------------------------------------------------


def _compare(chosen: MeasuredConfiguration, rival: MeasuredConfiguration, believed: Improvement | None) -> Comparison:
    """What is known beside the decision, each part None where it cannot be computed. Both are sane."""
    ours, theirs = _mae(chosen, "confirmation"), _mae(rival, "confirmation")
    interval, p_value, symbols = None, None, 1
    if believed is not None:
        interval, p_value, symbols = believed.interval, believed.p_value, believed.symbols
    elif theirs and len(_errors(chosen)) >= MIN_WINDOWS:
        # Sane but absurd errors overflow; what comes of it is not finite and so not shown.
        with np.errstate(all="ignore"):
            resampled = resampled_gains(np.array(_errors(rival)) / theirs, np.array(_errors(chosen)) / theirs)
        if resampled is not None:
            interval = interval_of(resampled)
            # This many repetitions cannot tell less from nothing.
            p_value = max(float((resampled <= 0).mean()), 1 / INTERVAL_REPETITIONS)
    return Comparison(
        improvement_confirmation=_improvement(theirs, ours),
        improvement_validation=_improvement(rival.mae("validation"), chosen.mae("validation")),
        improvement_test=_improvement(rival.mae("test"), chosen.mae("test")),
        interval=interval,
        p_value=p_value,
        symbols=symbols,
    )


def resampled_gains(old: np.ndarray, new: np.ndarray, *, least_block: int = 1) -> np.ndarray | None:
    """1 - mean(new) / mean(old) of errors [W] as the stationary bootstrap (Politis and Romano, 1994) resamples it, [R].

    old, new: of about 1, in the order of the windows. least_block: windows that a block has on average, at least:
    those of several steps share bars. None where nothing varies. Their percentiles keep within what improvements can
    be, and the ratio of two means of the same windows is nearly symmetric, so that there is little for a corrected
    interval to correct.
    """
    if (block := block_length(old - new)) is None:
        return None
    indices = _indices(len(old), max(block, least_block))
    improvements = 1 - new[indices].sum(axis=1) / old[indices].sum(axis=1)
    return improvements if np.isfinite(improvements).all() else None


@lru_cache(maxsize=32)
def _indices(count: int, block: int) -> np.ndarray:
    return resampled_indices(count, block, INTERVAL_REPETITIONS, SEED)


def interval_of(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of resampled values [R], by their percentiles."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def block_length(differences: np.ndarray) -> int | None:
    """Windows that a block has on average, by Politis and White (2004); None where nothing varies."""
    if not differences.std() > 1e-12:  # of errors of about 1: what rounding leaves of a constant
        return None
    length = float(block_lengths(differences[None])[0])
    return max(1, math.ceil(length)) if math.isfinite(length) else None
