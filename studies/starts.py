"""What a new search begins with, beside what is in use: configurations for a symbol as volatile as this one.

They are trials like any other, within the budget, and no part of a study's definition.
"""

from __future__ import annotations

import numpy as np

from forecasters import Bars
from forecasters.descriptor import Volatility
from forecasters.models import MODELS
from studies.config import Config
from studies.space import Space

BARS = 1000  # at most, whose returns are looked at
MEDIUM, VOLATILE = 0.025, 0.036  # standard deviations of a day's log return from which a symbol is called so


def volatility_starts(config: Config, space: Space, bars: Bars) -> dict[str, dict[str, object]]:
    """Params of the trials to begin with, by label, for what a search may see of a symbol: its bars before all windows.

    Empty where fewer than three bars tell nothing.
    """
    if len(bars) < 3:
        return {}
    found: dict[str, dict[str, object]] = {}
    kind, model = volatility_class(daily_volatility(bars)), MODELS[space.model]
    default = model.default(config.models[space.model])
    for point in model.volatility_points.get(kind, ()):
        params = space.nearest({**default, **point})
        if params is not None and params not in found.values():
            found[f"{kind} {len(found) + 1}"] = params
    return found


def daily_volatility(bars: Bars) -> float:
    """Standard deviation of the log returns of the last `BARS` bars, scaled to a day by the bars that a day has."""
    last = bars.slice(max(0, len(bars) - BARS), len(bars))
    days = len(np.unique(last.timestamps.astype("datetime64[D]")))
    return float(np.diff(np.log(last.close)).std(ddof=1) * np.sqrt(len(last) / days))


def volatility_class(daily: float) -> Volatility:
    """How volatile a symbol of this standard deviation of daily log returns is called."""
    return "stable" if daily < MEDIUM else "medium" if daily < VOLATILE else "volatile"
