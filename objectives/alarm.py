"""When errors say that one forecast is worse than another, whenever one looks; and how much data is enough.

Owns the alarm of monitoring, an e-process, and the sizes of samples that its other numbers would need. Where the live
forecast is no worse than the other, what is expected of E_n never exceeds 1, so that it ever reaches 20 in at most 5 %
of all cases (Ville's inequality): one may look at every bar and stop at any. Knows nothing of tables or models.
"""

from __future__ import annotations

import math

import numpy as np

ALARM = 20.0  # E at which there is an alarm: at most 1 in 20 that would never deserve one has it, ever
STAKES = (0.05, 0.1, 0.2, 0.4, 0.8)  # small ones find small losses, in the end; large ones find large losses soon
ERRORS_ONE_SIDED_95, POWER_80 = 1.6448536, 0.8416212  # standard errors


def evidence(live: np.ndarray, other: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """E_1 .. E_n after each bar that the live forecast is worse, [..., n] of forecasts and what came, each [..., n].

    All three are in one unit that was known before each bar, such as the last closes' standard deviation. E_n is the
    mean over the stakes s of prod (1 + s d_i), where d_i = (|live - actual| - |other - actual|) / D_i and D_i is the
    largest |live - other| up to i: known before bar i's price is, and by the triangle inequality |d_i| <= 1.
    """
    largest = np.maximum.accumulate(np.abs(live - other), axis=-1)
    losses = np.abs(live - actual) - np.abs(other - actual)
    shares = np.clip(np.divide(losses, largest, out=np.zeros_like(losses), where=largest > 0), -1.0, 1.0)  # rounding
    logs = np.log1p(np.multiply.outer(np.array(STAKES), shares)).cumsum(axis=-1)
    return np.exp(np.minimum(logs, 700.0)).mean(axis=0)  # 700: what a float64 still holds


# --- how much data is enough ----------------------------------------------------------------------------------


def needed_for_mean(deviation: float, effect: float) -> int:
    """How many numbers of this sd show that their mean is `effect` higher: 5 % one-sided, found in 80 % of cases."""
    return round(((ERRORS_ONE_SIDED_95 + POWER_80) * deviation / effect) ** 2)


def needed_for_sharpe(ratio: float, other: float) -> int:
    """How many returns tell a Sharpe ratio from another, both a bar."""
    return needed_for_mean(math.sqrt(1 + ratio**2 / 2), ratio - other)


def needed_for_share(share: float, other: float) -> int:
    """How many yes or no tell a share, such as a win rate, from another."""
    deviations = ERRORS_ONE_SIDED_95 * math.sqrt(share * (1 - share)) + POWER_80 * math.sqrt(other * (1 - other))
    return round((deviations / (share - other)) ** 2)
