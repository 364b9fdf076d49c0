"""What is kept of Toto's windows between runs: the mixtures of the first patch, before which no draw runs the network.

Of a window 16 bytes and 16 for each component of a step: 400 of one step of the published network. Lossless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from forecasters import Bars
from forecasters.compilation import Graphs
from forecasters.numerics import COMMON, surroundings
from forecasters.toto_encoded import VARIATE_KEYS, EncodedPrices, units_of_network
from forecasters.toto_model import RATIO, VARIATES
from forecasters.toto_network import TotoNetwork


class KeptMixtures:
    """The part of Toto that makes it a `forecasters.KeepableForecaster`."""

    network: TotoNetwork
    graphs: Graphs
    one_by_one = False
    _batch_tokens: int

    def padded_to(self, windows: int, most: int) -> int: ...

    @property
    def device(self) -> torch.device:
        return self.network.unembed.weight.device

    @property
    def surroundings(self) -> str:
        own = ("", "_encoded", "_kept", "_network", "_shared")
        return surroundings(self.device, *(f"forecasters.toto{name}" for name in own), *COMMON)

    @property
    def drawn_by(self) -> str:
        return surroundings(self.device, "forecasters", *(f"forecasters.toto{name}" for name in ("", "_sampling")))

    @property
    def keeps(self) -> bool:
        """Not on a GPU, where bits depend on memory that ran out, and not where they depend on a compiler."""
        return self.device.type == "cpu" and not self.graphs.on

    def company(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> str | None:
        """The shape of the one forward of them all."""
        if not self.keeps:
            return None
        variates, patch = len(_keys(params, "")), self.network.config.patch_size
        longest = max(len(self.read(bars, params)) for bars in contexts) - (params.get("key_input") == RATIO)
        patches = -(-longest // patch)
        count, most = len(contexts), self._batch_tokens // (patches * variates)
        if count > most or horizon > patch:
            return None
        return f"{self.padded_to(count, most) or count} {variates} {patches}"

    def read(self, bars: Bars, params: Mapping[str, Any]) -> Bars:
        most = int(params["context_length"]) + (params.get("key_input") == RATIO)  # a ratio needs a close before it
        return bars.slice(max(0, len(bars) - most), len(bars))

    def known(self, encoded: EncodedPrices) -> Sequence[int]:
        return [1] * (len(encoded.probs) // len(encoded.keys))

    def records(self, encoded: EncodedPrices, places: Sequence[int]) -> list[bytes]:
        """The mixtures as the network's fp32, after their scaling as float64."""
        found = []
        for place in places:
            rows = encoded.rows(place, place + 1)
            mixtures = np.stack([each[rows] for each in (encoded.probs, encoded.df, encoded.loc, encoded.scale)])
            scaling = np.stack([encoded.affine_loc[rows], encoded.affine_scale[rows]])
            found.append(scaling.astype("<f8").tobytes() + mixtures.astype("<f4").tobytes())
        return found

    def restored(
        self,
        records: Sequence[bytes | None],
        contexts: Sequence[Bars],
        params: Mapping[str, Any],
        horizon: int,
        key: str,
    ) -> EncodedPrices | None:
        """None where any is missing: the others are in its forward, whose shape decides their bits."""
        units = units_of_network([self.read(bars, params) for bars in contexts], params) if contexts else None
        found = [each for each in records if each is not None]
        if len(found) < len(records):
            return None
        keys = _keys(params, key)
        count = len(keys)
        scaling = np.stack([np.frombuffer(each, "<f8", 2 * count).reshape(2, count) for each in found], 1)
        mixtures = np.stack(
            [np.frombuffer(each, "<f4", -1, 16 * count).reshape(4, count, horizon, -1) for each in found], 1
        )
        probs, df, loc, scale = mixtures.reshape(4, -1, *mixtures.shape[3:]).astype(np.float64)
        affine_loc, affine_scale = scaling.reshape(2, -1).astype(np.float64)
        return EncodedPrices(
            keys=keys,
            horizon=horizon,
            probs=probs,
            df=df,
            loc=loc,
            scale=scale,
            affine_loc=affine_loc,
            affine_scale=affine_scale,
            prefixes=(),
            units=None if units is None else np.repeat(units, count),
        )


def _keys(params: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Those that one encoding answers."""
    return VARIATE_KEYS if params.get("key_input") == VARIATES else (key,)
