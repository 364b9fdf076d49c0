"""The daily bars that the package `arch` brings, which the demonstration searches and the tiny checkpoints learned.

Imported only where they are asked for: arch brings scipy and statsmodels, a second that nobody else should pay.
"""

from __future__ import annotations

import pandas as pd
from arch.data import nasdaq, sp500, vix, wti

COLUMNS = ("open", "high", "low", "close", "volume")


def packaged_bars() -> dict[str, pd.DataFrame]:
    """By symbol the columns open, high, low, close and volume, or close alone, by date, without days of no value.

    The S&P 500 and NASDAQ 1999 to 2018, crude oil (WTI) 1986 to 2019 and the volatility index VIX 2014 to 2019.
    """
    indices = {"SP500": sp500.load(), "NASDAQ": nasdaq.load()}
    closes = {"WTI": wti.load(), "VIX": vix.load()}
    return {
        **{symbol: table.rename(columns=str.lower).filter(items=COLUMNS) for symbol, table in indices.items()},
        **{symbol: table.set_axis(["close"], axis=1).dropna() for symbol, table in closes.items()},
    }
