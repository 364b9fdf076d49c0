"""A short `benchmarks.faults`: kills, freezes and restarts of everything in a search, which ends with its budget."""

from __future__ import annotations

from pathlib import Path

from benchmarks import faults

PLAN = faults.Plan(
    model="naive",
    workers=4,
    studies=2,
    trials=120,  # a quick machine finishes forty a second, and every fault must find it at work
    validation=400,
    worker_kills=3,
    freezes=1,
    server_stops=1,
    server_crashes=1,
    supervisor_kills=1,
)


def test_a_search_ends_with_its_budget_whatever_is_killed(scratch: Path) -> None:
    folder = scratch / "faults"
    folder.mkdir(mode=0o711)
    result = faults.run(PLAN, folder, seed=0)
    assert result.wrong == []
    assert result.numbers["acknowledged trials"] > 0
