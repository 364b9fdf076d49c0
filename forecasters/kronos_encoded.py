"""Both ends of Kronos' encode: bars as the numbers that its networks read, and windows as what these leave of them.

Owns the six columns and the calendar of a context, and the bounded tables that later draws fill. Knows nothing of how
the networks run, of sampling or of paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from forecasters import Bars, ForecastError
from forecasters.kronos_model import EPSILON
from forecasters.kronos_network import LayerCache
from forecasters.kronos_sizes import CALENDAR, COLUMNS

MIN_BARS = 2
TABLE_BYTES = 64 << 20  # of each lazily filled table, per encoded batch

_PANDAS = {"weekday": "day_of_week"}  # Monday is 0


def columns_of(bars: Bars) -> np.ndarray:
    """The six columns, float32 [6, T].

    Without volume, volume and amount are 0; amount is volume times the mean of open, high, low and close.
    Raises ForecastError for fewer than two bars or a value that is not finite.
    """
    if len(bars) < MIN_BARS:
        raise ForecastError(f"Kronos needs at least {MIN_BARS} bars, got {len(bars)}")
    prices = np.stack([bars.open, bars.high, bars.low, bars.close]).astype(np.float64)
    volume = np.zeros(len(bars)) if bars.volume is None else np.asarray(bars.volume, dtype=np.float64)
    columns = np.vstack([prices, volume, volume * prices.mean(axis=0)]).astype(np.float32)
    bad = ~np.isfinite(columns)
    if bad.any():
        column, bar = np.argwhere(bad)[0]
        raise ForecastError(f"{COLUMNS[column]} at {bars.timestamps[bar]} is not finite")
    return columns


def normalised(bars: Bars, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns in standard deviations about their mean, cut off at `clip`, float32 [T, 6]; mean and scale, [6]."""
    columns = columns_of(bars)
    # numpy, float32, along contiguous memory: torch's mean and deviation differ in the last bit
    mean, scale = columns.mean(axis=1), columns.std(axis=1) + np.float32(EPSILON)
    return np.clip((columns - mean[:, None]) / scale[:, None], -clip, clip).T, mean, scale


def calendar_of(timestamps: np.ndarray, ahead: int) -> np.ndarray:
    """Calendar fields of the bars and of `ahead` bars after them, int64 [T + ahead, 5].

    The bars after are a median step apart (a day where that is no positive step).
    """
    stamps = timestamps.astype("datetime64[ns]")
    if ahead:
        step = np.median(np.diff(stamps).astype(np.int64)) if len(stamps) > 1 else 0
        step = np.timedelta64(int(step) if step > 0 else 86_400 * 10**9, "ns")
        stamps = np.concatenate([stamps, stamps[-1] + step * np.arange(1, ahead + 1)])
    index = pd.DatetimeIndex(stamps)
    return np.stack([getattr(index, _PANDAS.get(name, name)).to_numpy(dtype=np.int64) for name, _ in CALENDAR], axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KronosPrefix:
    """What the network says after a run of tokens."""

    hidden: Tensor  # [d], of the last token, normed
    keys: LayerCache  # of the dependency layer, [4, T, d / 4] each
    layers: Sequence[LayerCache]  # of the transformer; empty where nothing follows the first step


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One context, encoded."""

    tokens: Tensor  # int64 [T, 2]
    stamps: Tensor  # int64 [T + H - 1, 5]
    mean: np.ndarray  # float32 [6]
    scale: np.ndarray  # float32 [6]: the standard deviation + EPSILON
    prefix: KronosPrefix
    s1_logits: Tensor  # float32 [2**s1_bits], on the CPU
    decoder: Sequence[LayerCache]  # the tokenizer's decoder over the tokens that the final decode still sees

    def in_price(self, unit: float) -> Window:
        """The same of bars whose prices were read in this unit; the amount is volume times price."""
        units = np.array([unit] * 4 + [1.0, unit], np.float32)
        return replace(self, mean=self.mean * units, scale=self.scale * units)

    @property
    def length(self) -> int:
        """Bars in the context, T."""
        return len(self.tokens)

    @property
    def decoded(self) -> int:
        """Bars in the decoder's prefix."""
        return self.decoder[0][0].shape[1] if self.decoder else 0

    @property
    def nbytes(self) -> int:
        caches = [*self.prefix.layers, self.prefix.keys, *self.decoder]
        tensors = [self.tokens, self.stamps, self.prefix.hidden, self.s1_logits, *(t for pair in caches for t in pair)]
        return sum(t.numel() * t.element_size() for t in tensors) + self.mean.nbytes + self.scale.nbytes


@dataclass(kw_only=True, eq=False)
class KeptWindow:
    """A window as an earlier run left it, for one step. What a draw finds in no table is encoded when it asks."""

    length: int
    mean: np.ndarray
    scale: np.ndarray
    s1_logits: Tensor
    encode: Callable[[], Window]

    @cached_property
    def whole(self) -> Window:
        return self.encode()

    @property
    def tokens(self) -> Tensor:
        return self.whole.tokens

    @property
    def stamps(self) -> Tensor:
        return self.whole.stamps

    @property
    def prefix(self) -> KronosPrefix:
        return self.whole.prefix

    @property
    def decoder(self) -> Sequence[LayerCache]:
        return self.whole.decoder

    @property
    def decoded(self) -> int:
        return self.whole.decoded

    @property
    def nbytes(self) -> int:
        return self.s1_logits.numel() * 4 + (self.whole.nbytes if "whole" in vars(self) else 0)


class RowTable:
    """Rows of numbers by integer key, filled when first asked for, bounded."""

    def __init__(self, limit_bytes: int, keys: np.ndarray | None = None, rows: Tensor | None = None) -> None:
        """keys, ascending, and their rows: what is known from the start."""
        self._limit = limit_bytes
        self._keys = np.empty(0, dtype=np.int64) if keys is None else keys  # ascending
        self._places = np.arange(len(self._keys))  # of the keys' rows
        self._rows = rows if len(self._keys) else None  # room for more: rows are not moved at each draw

    def of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys in [start, stop), less start, and their rows [n, k]."""
        first, last = np.searchsorted(self._keys, (start, stop))
        if self._rows is None or first == last:
            return np.empty(0, np.int64), np.empty((0, 0), np.float32)
        return self._keys[first:last] - start, self._rows[torch.from_numpy(self._places[first:last])].numpy()

    def count(self, start: int, stop: int) -> int:
        """How many keys there are in [start, stop)."""
        first, last = np.searchsorted(self._keys, (start, stop))
        return int(last - first)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        rows = 0 if self._rows is None else self._rows.numel() * self._rows.element_size()
        return self._keys.nbytes + self._places.nbytes + rows

    def get(self, keys: np.ndarray, compute: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Rows [n, k] for ascending distinct keys; `compute` is asked, once, for those that are not here."""
        at = np.searchsorted(self._keys, keys)
        known = at < len(self)
        known[known] = self._keys[at[known]] == keys[known]
        places = torch.from_numpy(self._places[at[known]])
        if known.all() and self._rows is not None:
            return self._rows[places]
        fresh = compute(keys[~known])
        out = fresh.new_empty(len(keys), fresh.shape[1])
        out[torch.from_numpy(~known)] = fresh
        if self._rows is not None:
            out[torch.from_numpy(known)] = self._rows[places]
        self._keep(keys[~known], fresh)
        return out

    def _keep(self, keys: np.ndarray, fresh: Tensor) -> None:
        most = self._limit // (16 + fresh.shape[1] * fresh.element_size())  # rows, with their keys and places
        used = len(self)
        count = min(len(keys), most - used)
        if count <= 0:
            return
        if self._rows is None or used + count > len(self._rows):
            grown = fresh.new_empty(min(most, max(used + count, 2 * used)), fresh.shape[1])
            if self._rows is not None:
                grown[:used] = self._rows[:used]
            self._rows = grown
        self._rows[used : used + count] = fresh[:count]
        merged = np.concatenate([self._keys, keys[:count]])
        order = np.argsort(merged, kind="stable")
        self._keys = merged[order]
        self._places = np.concatenate([self._places, np.arange(used, used + count)])[order]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBars:
    """Windows of one batch, and the tables that draws fill as they meet new tokens."""

    windows: Sequence[Window | KeptWindow]
    horizon: int
    s2_logits: RowTable = field(default_factory=lambda: RowTable(TABLE_BYTES))  # by window and first token
    values: RowTable = field(default_factory=lambda: RowTable(TABLE_BYTES))  # by window and pair; horizon 1 only

    @property
    def nbytes(self) -> int:
        return sum(window.nbytes for window in self.windows) + self.s2_logits.nbytes + self.values.nbytes
