"""The exact expectation of Kronos' next bar: a sum over the token pairs that sampling keeps, in place of draws.

Owns which pairs are enumerated, and the sampling of the rest with its bound. Knows nothing of prices, of more than one
step or of memory that runs out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from forecasters.kronos_encoded import COLUMNS, EncodedBars, KeptWindow, Window
from forecasters.kronos_sampling import Sampling, inverse_cdf, uniforms
from forecasters.kronos_tree import one_bar, roots, second_logits

if TYPE_CHECKING:
    from forecasters.kronos import Kronos

EXACT_PAIRS = 4096  # pairs enumerated a window; beyond them (top_k = 0, high temperature) the rest is sampled
EXACT_FIRST = 256  # first tokens of them: each costs a row of second logits
EXACT_WINDOWS = 8  # together: their joint probabilities are 2 MiB each at worst
EXACT_MASS = 0.9999  # enumerated at least, where EXACT_PAIRS allows
EXACT_REST_DRAWS = 256  # from what is not enumerated
EXACT_DUST = 1e-9  # of probability, not worth drawing from
EXACT_SIGMAS = 4.0  # of the sampled rest, in the reported bound


def expect(
    networks: Kronos,
    encoded: EncodedBars,
    start: int,
    windows: Sequence[Window | KeptWindow],
    sampling: Sampling,
    seeds: Sequence[int],
) -> Iterator[tuple[np.ndarray, float, np.ndarray]]:
    """For each of these windows, from `start` on: normalised expectation [6], enumerated mass and bound [6]."""
    s1_size, s2_size = networks.network.config.s1_size, networks.network.config.s2_size
    frontier = roots(windows)
    first = sampling.probabilities(frontier.s1_logits)  # [W, V1]
    likely = [np.sort(_likeliest(row, EXACT_FIRST, (1 + EXACT_MASS) / 2)) for row in first]
    pairs = np.concatenate([w * s1_size + s1 for w, s1 in enumerate(likely)])
    second = sampling.probabilities(second_logits(networks, encoded, start, frontier, pairs))  # [pairs, V2]
    joints = np.split(first.ravel()[pairs, None] * second, np.cumsum([len(s1) for s1 in likely])[:-1])
    taken = [np.sort(_likeliest(joint.ravel(), EXACT_PAIRS, EXACT_MASS)) for joint in joints]
    chosen = [s1[at // s2_size] * s2_size + at % s2_size for s1, at in zip(likely, taken, strict=True)]
    codes = np.concatenate([w * s1_size * s2_size + code for w, code in enumerate(chosen)])
    values = one_bar(networks, encoded, start, codes).cpu().double().numpy()  # [codes, 6]
    values = np.split(values, np.cumsum([len(at) for at in taken])[:-1])
    for w, (joint, at, value) in enumerate(zip(joints, taken, values, strict=True)):
        weights = joint.ravel()[at]
        mean, mass = weights @ value, float(weights.sum())
        left, rest = joint.copy(), first[w].copy()
        left.ravel()[at] = 0
        rest[likely[w]] = left.sum(axis=1)
        if rest.sum() < EXACT_DUST:
            yield mean / mass, mass, np.zeros(len(COLUMNS))
            continue
        draws = _draw_rest(networks, encoded, start + w, sampling, seeds[start + w], rest, chosen[w])
        error = (1 - mass) * draws.std(axis=0, ddof=1) / len(draws) ** 0.5
        yield mean + (1 - mass) * draws.mean(axis=0), mass, EXACT_SIGMAS * error


def _draw_rest(
    networks: Kronos, encoded: EncodedBars, w: int, sampling: Sampling, seed: int, rest: np.ndarray, taken: np.ndarray
) -> np.ndarray:
    """Normalised values [EXACT_REST_DRAWS, 6] of pairs drawn from what is not enumerated.

    rest: what is left of each first token's probability. taken: ascending codes of the enumerated pairs.
    """
    s2_size = networks.network.config.s2_size
    u = uniforms(seed, 0, 0, EXACT_REST_DRAWS)
    s1, which = np.unique(inverse_cdf(rest[None], np.zeros(len(u), dtype=np.int64), u[:, 0]), return_inverse=True)
    frontier = roots([encoded.windows[w]])
    second = sampling.probabilities(second_logits(networks, encoded, w, frontier, s1))
    for i, code in enumerate(s1 * s2_size):
        gone = taken[np.searchsorted(taken, code) : np.searchsorted(taken, code + s2_size)]
        second[i, gone - code] = 0
    s2 = inverse_cdf(second, which, u[:, 1])
    codes, leaves = np.unique(s1[which] * s2_size + s2, return_inverse=True)
    return one_bar(networks, encoded, w, codes).double().numpy()[leaves]


def _likeliest(probabilities: np.ndarray, limit: int, mass: float) -> np.ndarray:
    """Indices of the non-zero entries: all up to `limit` of them, else the largest, to `mass` or `limit`."""
    kept = np.flatnonzero(probabilities)
    if len(kept) <= limit:
        return kept
    kept = kept[np.argpartition(-probabilities[kept], limit)[:limit]]
    kept = kept[np.argsort(-probabilities[kept], kind="stable")]
    return kept[: int(np.searchsorted(probabilities[kept].cumsum(), mass)) + 1]
