"""Bars to leak-free windows: what a forecast may see at an origin, and what then happened.

Owns origins, their contexts, targets and seeds, and the split into validation and test. Knows nothing of files, models,
params, errors of forecasts, studies or databases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from forecasters import Bars
from objectives.bars import DataError, bars_fingerprint, content_hash, read_only

MIN_CONTEXT = 128  # bars before the first origin


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Origins in one symbol's bars: what a forecast may see at each, and what then happened.

    An origin is the index of the first target bar: its context is every bar before it and never that bar.
    """

    symbol: str
    bars: Bars
    origins: tuple[int, ...]  # [W], ascending
    horizon: int
    _digests: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.origins or self.horizon < 1 or list(self.origins) != sorted(set(self.origins)):
            raise ValueError("windows need ascending origins and a horizon of at least 1")
        if self.origins[0] < 1 or self.origins[-1] + self.horizon > len(self.bars):
            raise ValueError("an origin needs a bar before it and its targets among the bars")

    def __len__(self) -> int:
        return len(self.origins)

    def contexts(self, indices: Sequence[int]) -> list[Bars]:
        """The bars before the origins of these windows, oldest first, as views."""
        return [self.bars.slice(0, self.origins[index]) for index in indices]

    @cached_property
    def actuals(self) -> np.ndarray:
        """The closes to be forecast, float64 [W, H], price."""
        steps = np.arange(self.horizon)
        return read_only(self.bars.close[np.array(self.origins)[:, None] + steps])

    @cached_property
    def last_closes(self) -> np.ndarray:
        """The last close each context knows, float64 [W], price."""
        return read_only(self.bars.close[np.array(self.origins) - 1])

    @property
    def timestamps(self) -> np.ndarray:
        """The time of each window's first target bar, datetime64[ns] [W], UTC."""
        return self.bars.timestamps[np.array(self.origins)]

    def seeds(self, pass_number: int) -> tuple[int, ...]:
        """One seed below 2**64 a window, from symbol, origin's time and pass: not from position or trial."""
        return tuple(
            int.from_bytes(content_hash(f"{self.symbol}\n{time}\n{pass_number}".encode(), size=8).digest(), "big")
            for time in self.timestamps.astype(np.int64)
        )

    def chunks(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Window indices in a fixed order, `size` at a time (the last may be smaller).

        Every chunk is spread evenly over the whole period, so that a running mean is of no one regime.
        """
        if size < 1:
            raise ValueError(f"chunk size {size} is below 1")
        count = len(self.origins)
        sizes = [min(size, count - start) for start in range(0, count, size)]
        # Item m of n in a chunk wants the place (m + 1/2) / n of the period; equal wishes go by chunk.
        wishes = sorted(((2 * m + 1) / (2 * n), chunk) for chunk, n in enumerate(sizes) for m in range(n))
        return tuple(
            tuple(index for index, (_, owner) in enumerate(wishes) if owner == chunk) for chunk in range(len(sizes))
        )

    def digest(self, indices: Sequence[int]) -> str:
        """Of everything the contexts of these windows hold, and nothing else. Computed once."""
        key = tuple(indices)
        if key not in self._digests:
            # Contexts are prefixes: the longest and the lengths say it all.
            origins = [self.origins[index] for index in key]
            longest = bars_fingerprint(self.bars.slice(0, max(origins)))
            self._digests[key] = content_hash(f"{longest}\n{origins}".encode()).hexdigest()
        return self._digests[key]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The windows that a search may look at and those that it may not."""

    validation: Windows
    test: Windows


def split(
    bars: Bars, *, symbol: str, horizon: int = 1, validation: int = 30, test: int = 20, min_context: int = MIN_CONTEXT
) -> Split:
    """Test: the last origins whose targets exist. Validation: those before, no target of which reaches a test target.

    Raises DataError, with the bars there are and the bars needed, when the first origin has too short a context.
    """
    needed = min_context + validation + test + 2 * (horizon - 1)
    if len(bars) < needed:
        raise DataError(
            f"{symbol}: has {len(bars)} bars and needs {needed} ({min_context} of context, {validation} validation and "
            f"{test} test windows of {horizon}); add older bars or leave the symbol out"
        )
    last = recent_origins(bars, test, symbol=symbol, horizon=horizon, min_context=min_context)
    first = recent_origins(
        bars, validation, symbol=symbol, before=last.origins[0], horizon=horizon, min_context=min_context
    )
    return Split(validation=first, test=last)


def recent_origins(
    bars: Bars,
    count: int,
    *,
    symbol: str,
    before: int | None = None,
    horizon: int = 1,
    min_context: int = MIN_CONTEXT,
    at_least: int | None = None,
) -> Windows:
    """The most recent `count` origins whose targets all lie before bar `before` (by default: among the bars).

    at_least: be content with fewer, down to this many (default: `count`). Raises DataError if there are fewer.
    """
    if count < 1 or horizon < 1 or min_context < 1:
        raise ValueError("count, horizon and min_context are at least 1")
    end = len(bars) if before is None else before
    stop = end - horizon + 1  # the first origin whose targets reach `end`
    start = max(stop - count, min_context)
    if stop - start < (count if at_least is None else max(at_least, 1)):
        raise DataError(
            f"{symbol}: has {max(stop - start, 0)} windows of {horizon} in its first {end} bars, with {min_context} of "
            f"context, and needs {at_least or count}; add older bars or leave the symbol out"
        )
    return Windows(symbol=symbol, bars=bars, origins=tuple(range(start, stop)), horizon=horizon)
