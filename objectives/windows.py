"""Bars to leak-free contexts and windows: what a forecast may see at an origin, and what then happened.

Owns origins, their contexts, targets and seeds, and the split into validation and test. Knows nothing of files, models,
params, errors of forecasts, studies or databases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Self

import numpy as np

from forecasters import CLOSE, Bars
from objectives.bars import DataError, bars_fingerprint, content_hash, read_only, timestamp_text

MIN_CONTEXT = 128  # bars before the first origin
NO_CHANGE_BARS = 60  # whose median high or low, relative to the close before, goes on where nothing changes


class SeedKind(Enum):
    """Which question a forecast answers, and with it what its seeds are made from, beside symbol and pass.

    Seeds of one kind are equal whenever the same question is asked again; seeds of different kinds never are.
    """

    STUDY = "study"  # trials and confirmations: the time of the first target bar
    SERVED = "served"  # served forecasts and backtests: the time of the last context bar, the target being unknown


@dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Origins in one symbol's bars and what a forecast may see at each.

    An origin is the index of the first bar that is not seen: its context is every bar before it and never that bar.
    An origin of len(bars) is "now": its target is not known yet. Raises ValueError for impossible origins.
    """

    symbol: str
    bars: Bars
    origins: tuple[int, ...]  # [W], ascending
    horizon: int  # bars to be forecast, from the origin on
    key: str = CLOSE  # which price of them
    _digests: dict[tuple[int, ...], str] = field(default_factory=dict, init=False, repr=False)
    _seeds: dict[tuple[int, SeedKind], tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.origins or self.horizon < 1 or list(self.origins) != sorted(set(self.origins)):
            raise ValueError("contexts need ascending origins and a horizon of at least 1")
        if self.origins[0] < 1 or self.origins[-1] > len(self.bars):
            raise ValueError("an origin needs a bar before it, and all bars before it among the bars")

    def __len__(self) -> int:
        return len(self.origins)

    def contexts(self, indices: Sequence[int]) -> list[Bars]:
        """The bars before the origins with these indices, oldest first, as views."""
        return [self.bars.slice(0, self.origins[index]) for index in indices]

    @cached_property
    def last_closes(self) -> np.ndarray:
        """The last close that each context knows, float64 [W], price."""
        return read_only(self.bars.close[np.array(self.origins) - 1])

    @cached_property
    def series_digest(self) -> str:
        """BLAKE2b of all the bars, those behind the origins among them, as hexadecimal text."""
        return bars_fingerprint(self.bars)

    @cached_property
    def no_change(self) -> np.ndarray:
        """What is forecast of the key, for every step, where nothing is known, float64 [W], price.

        Of the close and the open it is the last close c; of the high and the low c (1 + m), m being the median of
        k_t / c_(t-1) - 1 over the last NO_CHANGE_BARS bars, or as many as there are (0 where there is none).
        """
        last = self.last_closes
        if self.key in (CLOSE, "open"):
            return last
        closes, prices = self.bars.close, getattr(self.bars, self.key)
        moves = [
            prices[first:origin] / closes[first - 1 : origin - 1] - 1
            for origin in self.origins
            for first in [max(1, origin - NO_CHANGE_BARS)]
        ]
        return read_only(last * (1 + np.array([np.median(each) if len(each) else 0.0 for each in moves])))

    def of_key(self, key: str) -> Self:
        """The same origins with their seeds, asking for another price."""
        return self if key == self.key else replace(self, key=key)

    def origin_text(self, index: int) -> str:
        """The time of an origin's first target bar as text, or "the bar after TIME" where it has not come yet."""
        origin = self.origins[index]
        if origin < len(self.bars):
            return timestamp_text(self.bars.timestamps[origin])
        return f"the bar after {timestamp_text(self.bars.timestamps[origin - 1])}"

    def seeds(self, pass_number: int, kind: SeedKind = SeedKind.STUDY) -> tuple[int, ...]:
        """One seed below 2**64 an origin, from symbol, pass and a time (see `SeedKind`): not from position or trial.

        Computed once. Raises ValueError for a study's seeds where a target bar has not come yet.
        """
        if (pass_number, kind) not in self._seeds:
            self._seeds[pass_number, kind] = self._made_seeds(pass_number, kind)
        return self._seeds[pass_number, kind]

    def _made_seeds(self, pass_number: int, kind: SeedKind) -> tuple[int, ...]:
        if kind is SeedKind.SERVED:
            prefix, times = "served\n", self.bars.timestamps[np.array(self.origins) - 1]
        elif self.origins[-1] < len(self.bars):
            prefix, times = "", self.bars.timestamps[np.array(self.origins)]
        else:
            raise ValueError(f"{self.symbol}: a study's seeds need the time of the target bar, which has not come yet")
        return tuple(
            int.from_bytes(
                content_hash(f"{prefix}{self.symbol}\n{time}\n{pass_number}".encode(), size=8).digest(), "big"
            )
            for time in times.astype(np.int64)
        )

    def chunks(self, size: int) -> tuple[tuple[int, ...], ...]:
        """Indices of the origins in a fixed order, `size` at a time (the last chunk may be smaller).

        Every chunk is spread evenly over the whole period, so that a running mean is of no one regime.
        Raises ValueError for a size below 1.
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
        """BLAKE2b of everything that these contexts hold and of nothing else, as hexadecimal text. Computed once."""
        key = tuple(indices)
        if key not in self._digests:
            # Contexts are prefixes: the longest and the lengths say it all.
            origins = [self.origins[index] for index in key]
            longest = bars_fingerprint(self.bars.slice(0, max(origins)))
            self._digests[key] = content_hash(f"{longest}\n{origins}".encode()).hexdigest()
        return self._digests[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows(Contexts):
    """Contexts whose targets are among the bars: what a forecast may see at each origin, and what then happened.

    The targets of an origin are the `horizon` bars from it on.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.origins[-1] + self.horizon > len(self.bars):
            raise ValueError("an origin of a window needs its targets among the bars")

    @cached_property
    def actuals(self) -> np.ndarray:
        """The prices to be forecast, float64 [W, H]."""
        steps = np.arange(self.horizon)
        return read_only(getattr(self.bars, self.key)[np.array(self.origins)[:, None] + steps])

    @property
    def timestamps(self) -> np.ndarray:
        """The time of each window's first target bar, datetime64[ns] [W], UTC."""
        return self.bars.timestamps[np.array(self.origins)]


def now(bars: Bars, *, symbol: str, horizon: int = 1, min_context: int = MIN_CONTEXT) -> Contexts:
    """The one context of all the bars there are, to forecast the `horizon` bars that have not come yet.

    Raises DataError where there are fewer than `min_context` bars.
    """
    if len(bars) < min_context:
        raise DataError(f"{symbol}: has {len(bars)} bars and needs {min_context} of context; add older bars")
    return Contexts(symbol=symbol, bars=bars, origins=(len(bars),), horizon=horizon)


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
    stride: int = 1,
) -> Windows:
    """The most recent `count` origins whose targets all lie before bar `before` (by default: among the bars).

    at_least: be content with fewer, down to this many (default: `count`). stride: bars between two origins.
    Raises DataError if there are fewer.
    """
    if count < 1 or horizon < 1 or min_context < 1 or stride < 1:
        raise ValueError("count, horizon, min_context and stride are at least 1")
    end = len(bars) if before is None else before
    last = end - horizon  # the last origin whose targets do not reach `end`
    found = range(last, min_context - 1, -stride)[:count][::-1]
    if len(found) < (count if at_least is None else max(at_least, 1)):
        apart = "" if stride == 1 else f", {stride} bars apart,"
        raise DataError(
            f"{symbol}: has {len(found)} windows of {horizon}{apart} in its first {max(end, 0)} bars, with "
            f"{min_context} of context, and needs {at_least or count}; add older bars or leave the symbol out"
        )
    return Windows(symbol=symbol, bars=bars, origins=tuple(found), horizon=horizon)
