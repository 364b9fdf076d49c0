"""Toto 2.0 as a forecaster: its stages, what of them runs together, and the loading of a checkpoint.

Owns the cutting of contexts to whole patches, the calls of the network and the bounds on memory. Nothing is sampled:
`encode` leaves the quantiles of every step, of any horizon in one pass. Knows nothing of windows' origins, aggregates,
studies or caches; what the network reads of bars and leaves in price is in chronos2_encoded.py, the network in
toto2_network.py.

"The reference" is the port in autogluon-timeseries 1.6.3. Dimensions: W windows, G series a group (each window is a
group of its own), T points, C patches of P points, H steps, Q levels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from forecasters import BY_DEFAULT, CLOSE, Bars, ForecastError, Quantiles, Running, halved
from forecasters.checkpoints import check, load_into, resolve
from forecasters.chronos2_encoded import EncodedQuantiles, columns_of, encoded_of, finite, series_of
from forecasters.compilation import OFF, Graphs, Policy, decide, fixed_length
from forecasters.low_precision import placed
from forecasters.toto2_checkpoint import build, fingerprint_of
from forecasters.toto2_model import TOTO2
from forecasters.toto2_network import LEVELS, Toto2Network

CPU_TOKENS = 1024  # in one pass; matrix products of fewer rows run slower
BATCH_TOKENS = 16_384  # in one pass elsewhere


class Toto2:
    """A loaded Toto 2.0 checkpoint; see `forecasters.QuantileForecaster`."""

    model, params = TOTO2.name, TOTO2.params
    free_draw_horizon = sys.maxsize  # encode leaves nothing to draw
    levels = np.array(LEVELS)

    def __init__(
        self, network: Toto2Network, *, fingerprint: str, policy: Policy | None = None, chunk: int = 10
    ) -> None:
        """network: folded. policy: how to compile; None: not at all. chunk: windows in a compiled pass."""
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.forwards = 0
        self.graphs = Graphs(policy or OFF, device=network.device, identity=f"{network.config} {network.dtype}")
        self._chunk = chunk
        # Halved where a device runs out of memory and not tried larger again.
        self._batch_tokens = CPU_TOKENS if network.device.type == "cpu" else BATCH_TOKENS

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def compilation(self) -> str:
        return self.graphs.state

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """Only where all keys are series of one group."""
        variates = params.get("variates", CLOSE)
        return columns_of(variates, "open") == columns_of(variates, CLOSE)

    def encode(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE
    ) -> EncodedQuantiles:
        """The quantiles of the next steps of a key, or of all where they are answered together.

        contexts: W windows of any lengths, each a group of its own. params: {"context_length": bars, "variates",
        "transform"}, as Chronos-2 has them. horizon: steps.
        Raises ForecastError on a context that is empty, not finite, without the volume that is asked for or, of
        logarithms, not positive, for a param or horizon out of range and when one window does not fit the memory.
        """
        transform = params.get("transform", "price")
        columns = columns_of(params.get("variates", CLOSE), key)
        if not contexts:
            raise ForecastError("no contexts: at least one window is needed")
        groups = [series_of(bars, int(params["context_length"]), columns, transform) for bars in contexts]
        return encoded_of(contexts, columns, self.predict(groups, horizon), transform, self.levels)

    def quantiles(self, encoded: EncodedQuantiles, params: Mapping[str, Any]) -> Quantiles:
        """The quantiles of the first key that was encoded; see `quantiles_keys`."""
        return self.quantiles_keys(encoded, params, encoded.keys[:1])[0]

    def quantiles_keys(
        self, encoded: EncodedQuantiles, params: Mapping[str, Any], keys: Sequence[str]
    ) -> list[Quantiles]:
        """The quantiles of encoded keys, in price, ascending over the levels; params are not looked at."""
        del params
        return encoded.quantiles(keys)

    @torch.inference_mode()
    def predict(self, groups: Sequence[np.ndarray], horizon: int) -> list[np.ndarray]:
        """The network's quantiles of each group of series [G, T], without holes: float64 [G, Q, H], not sorted.

        Series of one group attend to each other and must end at the same instant. Like lengths run together.
        Raises ForecastError for a horizon out of range, an answer that is not finite and when one group does not fit
        the memory.
        """
        if horizon < 1:
            raise ForecastError(f"horizon {horizon}: must be at least 1")
        patch = self.network.config.patch_size
        whole = [in_patches(group, patch) for group in groups]
        lengths, ahead = [group.shape[1] // patch for group in whole], -(-horizon // patch)
        left = sorted(range(len(groups)), key=lambda place: (-len(groups[place]), -lengths[place]))
        found: dict[int, np.ndarray] = {}
        while left:
            size, longest = len(groups[left[0]]), lengths[left[0]]
            tokens = size * (longest + ahead - 1)
            most = max(1, self._batch_tokens // tokens)
            room = min(most, self._chunk) if self.graphs.on else 0  # groups of a graph's one shape
            batch = [place for place in left[: room or most] if len(groups[place]) == size]
            rows = [batch[min(row, len(batch) - 1)] for row in range(room or len(batch))]
            series = np.zeros((len(rows), size, (fixed_length(longest) if room else longest) * patch), np.float32)
            levels = np.stack([level_of(whole[place]) for place in rows])  # [N, G]
            for into, place, level in zip(series, rows, levels, strict=True):
                into[:, : whole[place].shape[1]] = whole[place] / level[:, None]
            try:
                ends = torch.tensor([lengths[place] for place in rows], device=self.device)
                arguments = (torch.from_numpy(series).to(self.device), ends, ahead)
                answers = self.graphs.run(self.network.answer, (*series.shape, ahead), *arguments)
            except torch.OutOfMemoryError as error:
                self.graphs.release()
                what = f"one window of {size} series of {longest * patch} points"
                self._batch_tokens = halved(len(rows), self.device, what, error) * tokens
                continue
            self.forwards += 1
            prices = answers[..., :horizon].cpu().numpy() * levels[..., None, None]
            found.update(zip(batch, finite(prices), strict=False))
            left = left[len(batch) :]
        return [found[place] for place in range(len(groups))]


def in_patches(group: np.ndarray, patch: int) -> np.ndarray:
    """Series [G, T] as whole patches, as the reference makes them: the oldest points are dropped that fill none.

    Of fewer points than a patch has none is dropped: the oldest is repeated before them.
    """
    length = group.shape[1]
    if length < patch:
        return np.pad(group, ((0, 0), (patch - length, 0)), mode="edge")
    return group[:, length % patch :]


def level_of(group: np.ndarray) -> np.ndarray:
    """What each series [G, T] is divided by, [G]: where it moves by less than 1, the power of 2 about its largest move.

    That rounds nothing, and the network forecasts a scaled series as the original, down to a scale of 1e-6: which would
    be that of low prices, whatever their moves are.
    """
    moves = np.abs(group - group[:, :1]).max(1).astype(np.float64)
    return np.where(moves > 0, np.exp2(np.minimum(np.frexp(moves)[1], 0)), 1.0)


def load(checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT) -> Toto2:
    """Load a checkpoint (`checkpoints.resolve`) onto a device. Raises CheckpointError and SettingError."""
    policy = decide(TOTO2.name, device=device, running=running)
    found = resolve(checkpoint, revision=revision, setting="[toto2] checkpoint")
    network = build(found)
    load_into(found, network, str)
    network = network.requires_grad_(False).fold()
    # Of int8 the feed-forward layers alone: attention reads parts of its weights.
    feed_forward = torch.nn.ModuleList(layer.get_submodule("ffn") for layer in network.transformer.layers)
    placed(network, feed_forward, device=device, dtype=running.dtype)
    return Toto2(network, fingerprint=fingerprint_of(found, running.dtype), policy=policy, chunk=running.chunk)


def inspect(checkpoint: str, *, revision: str | None = None, running: Running = BY_DEFAULT) -> str:
    """The fingerprint that `load` would give its forecaster, without reading the weights into a network.

    Raises CheckpointError where the checkpoint does not fit.
    """
    found = resolve(checkpoint, revision=revision, setting="[toto2] checkpoint")
    check(found, {name: tensor.shape for name, tensor in build(found).state_dict().items()}, str)
    return fingerprint_of(found, running.dtype)
