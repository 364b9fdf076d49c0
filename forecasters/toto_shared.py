"""Forwards of Toto's network that many origins of one series share.

The network is causal: what it says after a patch depends on nothing behind it. Contexts that begin at the first bar and
are a whole number of patches apart are padded alike, so that the forward of the longest answers all of them: 300
origins take 64 forwards of patches of 64 points.

Which contexts share a forward is fixed by their lengths: those whose lengths leave remainders by the patch in the same
run of ROWS are one group, whoever asks for which of them. A group answers every context it has, so its numbers are the
same bits for all workers and runs; beside separate forwards they differ by less than 1e-6 of a standard deviation.
Knows nothing of what the answers are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from forecasters import Bars
from forecasters.compilation import Graphs
from forecasters.scaling import RAW
from forecasters.toto_encoded import EncodedPrices, series_of, unpacked
from forecasters.toto_model import PRICE
from forecasters.toto_network import TotoNetwork

ROWS = 16  # series in a forward: fewer run slower, and with one bar more one group of a patch's four runs again
ARRAYS = ("probs", "df", "loc", "scale", "affine_loc", "affine_scale")


class SharedForwards:
    """The part of Toto that makes it a `forecasters.SharingForecaster`."""

    network: TotoNetwork
    graphs: Graphs
    forwards: int

    def groups_of(
        self, bars: Bars, lengths: Sequence[int], params: Mapping[str, Any], horizon: int
    ) -> list[int] | None:
        """None where a context of the series would be cut or read in a unit of its own, and where graphs are compiled.

        So it is beyond the first patch.
        """
        patch = self.network.config.patch_size
        as_they_are = params.get("key_input", PRICE) == PRICE and params.get("scale", RAW) == RAW
        if not as_they_are or len(bars) > int(params["context_length"]) or self.graphs.on or horizon > patch:
            return None
        return [length % patch // ROWS for length in lengths]

    def reach(self, group: int, series_length: int) -> tuple[int, ...]:
        """Of each remainder the longest context."""
        patch = self.network.config.patch_size
        remainders = range(group * ROWS, min((group + 1) * ROWS, patch))
        found = (series_length - (series_length - remainder) % patch for remainder in remainders)
        return tuple(length for length in found if length > 0)

    @torch.inference_mode()
    def encode_group(self, bars: Bars, group: int, params: Mapping[str, Any], horizon: int, key: str) -> EncodedPrices:
        """The mixtures after every patch of a group's series, ordered by length. Raises ForecastError as `encode`."""
        del params
        patch = self.network.config.patch_size
        reach = self.reach(group, len(bars))
        (series,) = series_of(bars.slice(0, max(reach)), max(reach), (key,), ratio=False)
        room = -(-max(reach) // patch) * patch
        padded = np.zeros((len(reach), 1, room), np.float32)
        for row, length in zip(padded, reach, strict=True):
            row[0, room - length :] = series[:length]
        pads = room - np.array(reach)
        lengths = self.lengths(group, len(bars))
        remainders = [length % patch for length in reach]
        rows = np.array([remainders.index(length % patch) for length in lengths])
        device = self.network.unembed.weight.device
        ends = (pads[rows] + lengths) // patch - 1
        series, padding, places, patches = (torch.from_numpy(each).to(device) for each in (padded, pads, rows, ends))
        self.forwards += 1
        packed = self.network.answers_along(series, padding, places, patches, horizon)
        components = self.network.config.components
        return unpacked(packed.cpu().numpy(), components, keys=(key,), horizon=horizon, prefixes=())

    def gathered(
        self, groups: Mapping[int, EncodedPrices], lengths: Sequence[int], series_length: int
    ) -> EncodedPrices:
        """The rows of these lengths, in their order."""
        patch = self.network.config.patch_size
        every = {group: self.lengths(group, series_length) for group in groups}
        picks = [(group, int(np.searchsorted(every[group], one))) for one in lengths for group in [one % patch // ROWS]]
        arrays = {name: np.stack([getattr(groups[group], name)[row] for group, row in picks]) for name in ARRAYS}
        return replace(next(iter(groups.values())), **arrays)

    def lengths(self, group: int, series_length: int) -> np.ndarray:
        """All contexts of a group, int64 [n], ascending, bars."""
        every = np.arange(1, series_length + 1)
        return every[every % self.network.config.patch_size // ROWS == group]
