"""What trading a kind of symbol costs, and how many bars it has a year.

Owns asset classes. Knows nothing of orders, and of settings only what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class AssetClass:
    """What trading a kind of symbol costs, and when. Fees and spread are shares of the traded value, a side."""

    name: str
    days_a_year: int  # on which it is traded
    shorts: bool  # whether it can be sold short
    limit_fee: float
    market_fee: float  # of a market order: at an open without a limit, or at a close
    half_spread: float  # paid by a market order beside its fee
    borrow: float  # a year, share of what is short
    bars_a_day: float = 1.0

    @property
    def bars_a_year(self) -> float:
        return self.days_a_year * self.bars_a_day

    @property
    def market(self) -> float:
        """What a market order costs, share of the traded value."""
        return self.market_fee + self.half_spread

    @property
    def night(self) -> float:
        """What a short pays from one bar to the next, share of its entry."""
        return self.borrow / self.bars_a_year


def bars_a_day(timestamps: np.ndarray, days_a_year: int) -> float:
    """Bars on a day of trading, as most days have; below 1 where they are more than two days apart.

    timestamps: datetime64 [T], UTC, ascending. 1 where there is only one.
    """
    if len(timestamps) < 2:
        return 1.0
    days = float(np.median(np.diff(timestamps)) / np.timedelta64(1, "D"))
    if days >= 2:
        return 365.25 / days / days_a_year
    _, counts = np.unique(timestamps.astype("datetime64[D]"), return_counts=True)
    return float(np.median(counts))
