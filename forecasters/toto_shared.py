"""Forwards of Toto's network that many origins of one series share.

The network is causal: what it says after a patch depends on nothing behind it. Contexts that begin at one bar and are a
whole number of patches apart are padded alike, so the forward of the longest answers all of them. 300 origins with
patches of 64 points take 64 forwards at most. Knows nothing of what the answers are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from forecasters.toto_network import TotoNetwork


def share(series: Sequence[np.ndarray], patch: int) -> list[list[int]]:
    """The places of series [T] that one forward answers, each with the longest last; the longest group first.

    Series that begin at the same element of one array, as slices of a symbol's bars do, are the same up to there.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place in sorted(range(len(series)), key=lambda place: len(series[place])):
        begin = series[place].__array_interface__["data"][0]
        groups.setdefault((begin, len(series[place]) % patch), []).append(place)
    return sorted(groups.values(), key=lambda group: -len(series[group[-1]]))


@torch.inference_mode()
def answers(
    network: TotoNetwork, series: Sequence[np.ndarray], groups: Sequence[Sequence[int]], steps: int
) -> np.ndarray:
    """The numbers of `TotoNetwork.answer` for every series of these groups, group by group, in one forward.

    steps: at most a patch. Returns fp32 [n, 4 * steps * K + 2].
    """
    patch, device = network.config.patch_size, network.unembed.weight.device
    longest = [series[group[-1]] for group in groups]
    length = -(-max(map(len, longest)) // patch) * patch
    padded = np.zeros((len(groups), 1, length), np.float32)
    for row, values in zip(padded, longest, strict=True):
        row[0, length - len(values) :] = values
    pads = np.array([length - len(values) for values in longest])
    rows = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    ends = np.array([pads[row] + len(series[place]) for row, group in enumerate(groups) for place in group])
    found = network.answers_along(
        torch.from_numpy(padded).to(device),
        torch.from_numpy(pads).to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(ends // patch - 1).to(device),
        steps,
    )
    return found.cpu().numpy()
