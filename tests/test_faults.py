"""A short `benchmarks.faults`: one fault of each kind in a search, which ends with its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults

PLAN = faults.Plan(
    model="naive",
    workers=4,
    studies=2,
    trials=120,
    validation=100,
    faults=dict.fromkeys(faults.MIX.keys() - {faults.RESTART}, 1) | {"worker kill": 3},
)


@pytest.mark.slow
def test_a_search_ends_with_its_budget_whatever_goes_wrong(scratch: Path) -> None:
    folder = scratch / "faults"
    folder.mkdir(mode=0o711)
    result, _ = faults.run(PLAN, folder, seed=0)
    assert result.wrong == []
    assert result.numbers["acknowledged trials"] > 0
