"""How Kronos' tokens are drawn: which of them temperature, top_k and top_p keep, and draws by a seed's numbers.

Owns the rule that equal seeds and params give equal tokens, fewer samples the first of more. Knows nothing of the
networks whose logits it is given, of bars or of paths; the same rule in tensors that compile is in kronos_fixed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forecasters import ForecastError

# For one half of a pair: logits [rows, vocabulary], the row of each sample [n], the step, 0 or 1: token ids [n].
Pick = Callable[[Tensor, np.ndarray, int, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. top_k = 0 keeps all tokens; top_p counts only then."""

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ForecastError(f"sampling params out of range: {self}")

    def logits(self, logits: Tensor) -> Tensor:
        """float32 [n, V], over the temperature, -inf where a token is dropped.

        In float32 and in the published order, so that ties and borderline tokens fall as they do there.
        """
        scaled = logits / self.temperature
        if self.top_k > 0:
            kth = scaled.topk(min(self.top_k, scaled.shape[-1])).values[:, -1:]
            return scaled.masked_fill(scaled < kth, float("-inf"))
        if self.top_p >= 1:
            return scaled
        ranked, order = scaled.sort(descending=True)
        above = ranked.softmax(-1).cumsum(-1) > self.top_p
        drop = torch.cat((torch.zeros_like(above[:, :1]), above[:, :-1]), dim=-1)  # the token that crosses top_p stays
        return scaled.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))

    def probabilities(self, logits: Tensor) -> np.ndarray:
        """float64 [n, V], rows summing to 1."""
        return self.logits(logits).double().softmax(-1).numpy()


def sampling_of(params: Mapping[str, Any]) -> Sampling:
    return Sampling(temperature=float(params["temperature"]), top_k=int(params["top_k"]), top_p=float(params["top_p"]))


def uniforms(seed: int, step: int, start: int, stop: int) -> np.ndarray:
    """For samples start..stop-1 of one window at one step: float64 [stop - start, 2], for the two tokens.

    A sample's numbers depend on nothing else, so fewer samples are the first of more, and a longer horizon
    begins as a shorter one does.
    """
    key = np.array([seed & (2**64 - 1), step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random((stop, 2))[start:]


def inverse_cdf(probabilities: np.ndarray, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Token ids int64 [n]: for each u [n] the first token whose cumulative probability in its row exceeds it."""
    cdf = probabilities.cumsum(axis=1)
    cdf = cdf / cdf[:, -1:]
    order = np.argsort(rows, kind="stable")
    present, starts = np.unique(rows[order], return_index=True)
    ids = np.empty(len(rows), dtype=np.int64)
    for row, at in zip(present, np.split(order, starts[1:]), strict=True):
        ids[at] = np.searchsorted(cdf[row], u[at], side="right")
    return ids


def keyed_pick(sampling: Sampling, seeds: Sequence[int], samples: range) -> Pick:
    """Draws these samples of windows with these seeds by inverse CDF, from uniforms that only they have."""

    def pick(logits: Tensor, rows: np.ndarray, step: int, half: int) -> np.ndarray:
        u = [uniforms(seed, step, samples.start, samples.stop)[:, half] for seed in seeds]
        return inverse_cdf(sampling.probabilities(logits), rows, np.concatenate(u))

    return pick
