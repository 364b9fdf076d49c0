"""The work of the stages of an evaluation, estimated from a sample of it that is done again to be counted.

Counting slows the network down, so that what is timed is not what is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forecasters import count_flop

EVERY = 8  # of so many batches of a stage, some windows of one are counted


class WorkCounter:
    """Floating-point operations of an evaluator's stages so far."""

    def __init__(self) -> None:
        self._batches: dict[str, int] = {}
        self._windows: dict[str, int] = {}
        self._counted: dict[str, list[float]] = {}  # of one window each

    def add(
        self, stage: str, windows: int, prepare: Callable[[], Any], work: Callable[[Any], object], *, again: int = 1
    ) -> None:
        """Note a batch of this many windows. work: does `again` of them, given what `prepare` answers uncounted."""
        if self._batches.setdefault(stage, 0) % EVERY == 0:
            ready = prepare()
            self._counted.setdefault(stage, []).append(count_flop(lambda: work(ready)) / again)
        self._batches[stage] += 1
        self._windows[stage] = self._windows.get(stage, 0) + windows

    @property
    def flop(self) -> dict[str, float]:
        """By stage, of all windows."""
        return {stage: sum(found) / len(found) * self._windows[stage] for stage, found in self._counted.items()}
