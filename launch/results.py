"""What launch-workers ends with: its studies as a table, a line for each symbol left out, and the exit status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import starmap

from launch.output import say, show
from launch.views import listing
from storage.progress import first_parked_slots
from storage.retrying import RetryingStorage
from studies.study import Study

EXIT_PARKED = 4  # all is done but for parked work, which the same command would leave alone


def print_results(
    storage: RetryingStorage, studies: Iterable[Study], skipped: Mapping[str, str], *, plain: bool = False
) -> int:
    """List the studies and the symbols that were skipped, by symbol with the reason. Returns the exit status.

    That is 0, 1 where a symbol was skipped or its bars went bad during the run, else EXIT_PARKED where work is parked.
    Raises DatabaseUnavailable.
    """
    studies = sorted(studies, key=lambda study: study.name)
    rows = listing.rows_of(storage, studies)
    show([*rows, *starmap(listing.skipped_row, skipped.items())], listing.table, as_json=False, plain=plain)
    parked = first_parked_slots(storage, [study.study_id for study in studies])
    for symbol, reason in skipped.items():
        say(f"{symbol} skipped: {reason}")
    bad = {study.symbol: one.error for study in studies if (one := parked.get(study.study_id)) and one.due}
    for symbol, reason in bad.items():
        say(f"{symbol} parked: {reason}")
    waiting = [
        (row, one)
        for row, study in zip(rows, studies, strict=True)
        if (one := parked.get(study.study_id)) and not one.due
    ]
    for row, one in waiting:
        say(f"{row.study}: {row.parked} parked, the first with: {one.error}")
    if waiting:
        say("parked work is tried again a day later, or at once with --retry-parked")
    return 1 if skipped or bad else EXIT_PARKED if waiting else 0
