"""The update rule, on its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest

from studies.promotion import Decision, Measured, decide, exceeds

OLD = {"aggregate": "mean", "num_samples": 64}
NEW = {"aggregate": "median", "num_samples": 128}


def rule(new_mae: float | None, old_mae: float | None, **options: Any) -> Decision:
    settings: dict[str, Any] = {
        "finished": True,
        "measured_incumbent": OLD,
        "min_improvement": 0.01,
        **options,
    }
    return decide(
        Measured(model="toto", config=NEW, mae=new_mae), Measured(model="toto", config=OLD, mae=old_mae), **settings
    )


@pytest.mark.parametrize(
    ("old", "new", "promoted"),
    [
        (0.01, 0.009901, False),  # 0.99 %
        (0.01, 0.0099, False),  # exactly 1 %, see below
        (0.01, 0.009899, True),  # 1.01 %
        (0.02, 0.0198, False),
        (0.03, 0.0297, False),
        (0.07, 0.0693, False),
        (1.0, 0.99, False),
        (0.01, 0.011, False),
        (0.01, 0.01, False),
        (0.01, 0.0, True),
    ],
)
def test_strictly_more_than_one_per_cent(old: float, new: float, promoted: bool) -> None:
    assert exceeds(old, new, 0.01) is promoted
    decision = rule(new, old)
    assert decision.promote is promoted
    assert decision.reason == ("improved" if promoted else "not better")
    assert decision.improvement == pytest.approx((old - new) / old)


def test_binary_arithmetic_would_have_promoted_exactly_one_per_cent() -> None:
    assert (0.07 - 0.0693) / 0.07 > 0.01


@pytest.mark.parametrize("min_improvement", [0.0, 0.05, 0.5])
def test_the_threshold_is_the_callers(min_improvement: float) -> None:
    assert rule(0.0096, 0.01, min_improvement=min_improvement).promote is (min_improvement < 0.04)


def test_equal_numbers_are_kept_even_without_a_threshold() -> None:
    assert rule(0.01, 0.01, min_improvement=0.0).reason == "not better"


def test_no_incumbent_is_first() -> None:
    decision = decide(
        Measured(model="toto", config=NEW, mae=0.02),
        None,
        finished=True,
        measured_incumbent=None,
        min_improvement=0.01,
    )
    assert decision == Decision(promote=True, reason="first", improvement=None)


@pytest.mark.parametrize("mae", [math.nan, math.inf, -math.inf, -0.01, None])
@pytest.mark.parametrize("force", [False, True])
def test_a_candidate_that_is_no_number_is_never_promoted(mae: float | None, force: bool) -> None:
    assert rule(mae, 0.01, force=force) == Decision(promote=False, reason="no candidate", improvement=None)


@pytest.mark.parametrize("mae", [math.nan, math.inf, 0.0, -0.01, None])
def test_an_incumbent_that_is_no_number_is_not_comparable(mae: float | None) -> None:
    assert rule(0.005, mae).reason == "not comparable"
    assert rule(0.005, mae, force=True) == Decision(promote=True, reason="forced", improvement=None)


def test_an_incumbent_that_changed_since_it_was_measured_is_stale() -> None:
    assert rule(0.005, 0.01, measured_incumbent=NEW).reason == "stale"
    assert rule(0.005, 0.01, measured_incumbent=NEW, force=True).reason == "forced"


def test_the_incumbent_itself_is_unchanged_even_by_force() -> None:
    same = Measured(model="toto", config=OLD, mae=0.01)
    for force in (False, True):
        decision = decide(same, same, finished=True, measured_incumbent=OLD, min_improvement=0.01, force=force)
        assert decision == Decision(promote=False, reason="unchanged", improvement=None)


def test_an_unfinished_study_waits() -> None:
    assert rule(0.005, 0.01, finished=False).reason == "not finished"


def test_force_promotes_what_is_worse_and_says_by_how_much() -> None:
    decision = rule(0.011, 0.01, force=True)
    assert (decision.promote, decision.reason) == (True, "forced")
    assert decision.improvement == pytest.approx(-0.1)
