"""Both ends of Toto's encode: prices as the series that its network reads, and windows as what it leaves of them.

Owns what each `key_input` shows the network, and the first patch's draws in price. Knows nothing of how the network
runs, or of what follows the first patch. Dimensions: W windows, V keys, h steps of the first patch, K components.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forecasters import CLOSE, Bars, ForecastError
from forecasters.scaling import RAW, units_of
from forecasters.toto_model import RATIO
from forecasters.toto_network import TotoPrefix
from forecasters.toto_sampling import mixture_samples

VARIATE_KEYS = (CLOSE, "open", "high", "low")  # of one window, where key_input is variates
RATIO_SCALE = 1000.0  # so that the variance of daily ratios outweighs the 0.1 that the network adds to every variance


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPrices:
    """The network's answer for W windows: all that sampling needs. Arrays are float64 on the CPU.

    Their rows are the V keys of the first window, then those of the second: W * V rows.
    """

    keys: tuple[str, ...]  # V of them
    horizon: int
    probs: np.ndarray  # [W * V, h, K], h = min(horizon, P)
    df: np.ndarray
    loc: np.ndarray  # scaled units
    scale: np.ndarray
    affine_loc: np.ndarray  # price units, [W * V]
    affine_scale: np.ndarray
    prefixes: tuple[TotoPrefix, ...]  # of consecutive windows, on the network's device; empty while horizon <= P
    units: np.ndarray | None = None  # price of one unit of all of the above, [W * V]; None: it is prices

    def rows(self, start: int, stop: int, place: int | None = None) -> slice:
        """The rows of the windows [start, stop): all, or of the key at this place."""
        count = len(self.keys)
        return slice(start * count + (place or 0), stop * count, 1 if place is None else count)

    def priced(self, rows: slice, answers: np.ndarray) -> np.ndarray:
        """Answers of these rows, [w, ...], in price."""
        if self.units is None:
            return answers
        return answers * self.units[rows].reshape(-1, *(1,) * (answers.ndim - 1))

    @property
    def nbytes(self) -> int:
        arrays = (self.probs, self.df, self.loc, self.scale, self.affine_loc, self.affine_scale)
        return sum(array.nbytes for array in arrays) + sum(prefix.nbytes for prefix in self.prefixes)


def series_of(bars: Bars, length: int, keys: Sequence[str], *, ratio: bool) -> np.ndarray:
    """What the network reads of these keys, [V, T], T at most `length`: prices, or ratios to the close before."""
    more = length + ratio if length > 0 else 0  # a ratio needs a close before it
    rows = np.stack([getattr(bars, key)[len(bars) - min(more, len(bars)) :] for key in keys])
    if ratio and rows.size:
        rows = RATIO_SCALE * (rows[:, 1:] / bars.close[-rows.shape[1] : -1] - 1)
    if not rows.size:
        raise ForecastError(f"a context of {len(bars)} bars with context_length {length}: no {keys[0]} is left")
    if not np.isfinite(rows).all():
        raise ForecastError(f"the {' or '.join(keys)} of {bars.timestamps[-1]} or before it is not a finite number")
    return rows


def unpacked(
    packed: np.ndarray, components: int, *, keys: tuple[str, ...], horizon: int, prefixes: tuple[TotoPrefix, ...]
) -> EncodedPrices:
    """What `TotoNetwork.answer` packed for W windows, fp32 [W * V, 4 * h * K + 2]."""
    # Float64 on the CPU from here on, where a seed gives the same samples on every device.
    packed = packed.astype(np.float64)
    shape = (len(packed), 4, (packed.shape[1] - 2) // (4 * components), components)
    probs, df, loc, scale = packed[:, :-2].reshape(shape).swapaxes(0, 1).copy()
    return EncodedPrices(
        keys=keys,
        horizon=horizon,
        probs=probs,
        df=df,
        loc=loc,
        scale=scale,
        affine_loc=packed[:, -2].copy(),
        affine_scale=packed[:, -1].copy(),
        prefixes=prefixes,
    )


def units_of_network(contexts: Sequence[Bars], params: Mapping[str, Any]) -> np.ndarray | None:
    """The price that the network reads each context in units of, [W]; None for prices as they are, and for ratios."""
    if params.get("key_input") == RATIO:
        return None
    return units_of(contexts, params.get("scale", RAW))


def in_units_of(found: EncodedPrices, units: np.ndarray | None) -> EncodedPrices:
    """The answers for contexts in these units, [W]."""
    return found if units is None else replace(found, units=np.repeat(units, len(found.keys)))


def in_price(contexts: Sequence[Bars], ratios: EncodedPrices) -> EncodedPrices:
    """The answers for ratios to the last close [W] as those for prices."""
    closes = np.array([bars.close[-1] for bars in contexts])
    loc, scale = closes * (1 + ratios.affine_loc / RATIO_SCALE), closes * ratios.affine_scale / RATIO_SCALE
    return replace(ratios, affine_loc=loc, affine_scale=scale)


def first_patch(encoded: EncodedPrices, rows: slice, uniforms: Iterable[np.ndarray], count: int) -> np.ndarray:
    """N = count prices drawn within the first patch, [W, N, h], for uniforms, W of [N, h, 3], looked at one by one."""
    mixtures = (encoded.probs[rows], encoded.df[rows], encoded.loc[rows], encoded.scale[rows])
    samples = mixture_samples(*mixtures, uniforms, count)
    samples *= encoded.affine_scale[rows, None, None]  # in place: new pages cost as much as the draws
    samples += encoded.affine_loc[rows, None, None]
    return samples
