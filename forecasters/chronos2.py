"""Chronos-2 as a forecaster: its stages, what of them runs together, and the loading of a checkpoint.

Owns the calls of the network, horizons beyond one pass of it and the bounds on memory. Nothing is sampled: `encode`
leaves the quantiles of every step. Knows nothing of windows' origins, aggregates, studies or caches; what the network
reads of bars and leaves in price is in chronos2_encoded.py, the network in chronos2_network.py.

Series of one group attend to each other at every step, so a group may hold only series that are cut at one instant:
with two windows of one symbol in a group the earlier one sees its own future in the later one. Here each window is a
group of its own. "The reference" is chronos-forecasting 2.3.2. Dimensions: W windows, G series a group, T points, P
points a patch, H steps, Q levels, K keys.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from forecasters import BY_DEFAULT, CLOSE, Bars, ForecastError, Quantiles, Running, halved
from forecasters.checkpoints import load_into, resolve
from forecasters.chronos2_calendar import on_calendar
from forecasters.chronos2_checkpoint import fingerprint_of, read_config
from forecasters.chronos2_encoded import EncodedQuantiles, columns_of, encoded_of, finite, series_of
from forecasters.chronos2_model import BARS, CALENDARS, CHRONOS2, DAYS
from forecasters.chronos2_network import Chronos2Network
from forecasters.compilation import OFF, Graphs, Policy, decide, fixed_length
from forecasters.low_precision import placed

CPU_TOKENS = 1024  # in one pass: thirty windows of 512 points; matrix products of fewer rows run slower
BATCH_TOKENS = 16_384  # in one pass elsewhere
UNROLLED = np.arange(1, 10) / 10  # levels that are taken for observed where a horizon needs more than one pass


class Chronos2:
    """A loaded Chronos-2 checkpoint; see `forecasters.QuantileForecaster`."""

    model, params = CHRONOS2.name, CHRONOS2.params
    free_draw_horizon = sys.maxsize  # encode leaves nothing to draw

    def __init__(
        self, network: Chronos2Network, *, fingerprint: str, policy: Policy | None = None, chunk: int = 10
    ) -> None:
        """policy: how to compile; None: not at all. chunk: windows in a compiled pass, fewer are padded."""
        self.network = network.eval().requires_grad_(False).prepare()
        self.fingerprint = fingerprint
        self.levels = np.array(network.config.levels)
        self.forwards = 0
        identity = f"{network.config} {network.shared.weight.dtype}"
        self.graphs = Graphs(policy or OFF, device=self.device, identity=identity)
        self._chunk = chunk
        # Halved where a device runs out of memory and not tried larger again.
        self._batch_tokens = CPU_TOKENS if self.device.type == "cpu" else BATCH_TOKENS

    @property
    def device(self) -> torch.device:
        return self.network.shared.weight.device

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

        contexts: W windows of any lengths, each a group of its own. params: {"context_length": bars, "variates":
        "close", which is the key alone, "close+volume", "ohlc" or "ohlcv", "transform": "price", "log" or
        "differences", "calendar": "bars" or "days"}; of a context no more is read than the checkpoint's
        own length. horizon: steps; those beyond one pass of the network are unrolled as the reference does.
        Raises ForecastError on a context that is empty, not finite, without the volume that is asked for or, of
        logarithms, not positive, for a param or horizon out of range and when one window does not fit the memory.
        """
        transform = params.get("transform", "price")
        columns = columns_of(params.get("variates", CLOSE), key)
        length = min(int(params["context_length"]), self.network.config.context_length)
        if not contexts:
            raise ForecastError("no contexts: at least one window is needed")
        if (calendar := params.get("calendar", BARS)) not in CALENDARS:
            raise ForecastError(f"calendar {calendar!r}: expected one of {', '.join(CALENDARS)}")
        if calendar == DAYS:
            contexts = [on_calendar(bars) for bars in contexts]
        groups = [series_of(bars, length, columns, transform) for bars in contexts]
        unknown = [np.full((len(columns), max(0, horizon)), np.nan, np.float32)] * len(groups)
        answers = self._forecast(groups, unknown, horizon, self.network.config.max_output_patches)
        return encoded_of(contexts, columns, answers, transform, self.levels)

    def quantiles(self, encoded: EncodedQuantiles, params: Mapping[str, Any]) -> Quantiles:
        """The quantiles of the first key that was encoded; see `quantiles_keys`."""
        return self.quantiles_keys(encoded, params, encoded.keys[:1])[0]

    def quantiles_keys(
        self, encoded: EncodedQuantiles, params: Mapping[str, Any], keys: Sequence[str]
    ) -> list[Quantiles]:
        """The quantiles of encoded keys, in price, ascending over the levels; params are not looked at."""
        del params
        return encoded.quantiles(keys)

    def predict(
        self,
        series: Sequence[np.ndarray],
        horizon: int,
        *,
        groups: Sequence[int] | None = None,
        known: Sequence[np.ndarray | None] | None = None,
        levels: Sequence[float] | None = None,
        max_output_patches: int | None = None,
    ) -> np.ndarray:
        """The quantiles of the next steps of raw series, float32 [series, Q, H], as the network gives them.

        They are not sorted: near ones may cross. Past-only covariates are series whose answers are not looked at.

        series: [T] each, oldest first, of any lengths, NaN where a value is missing; what is longer than the
        checkpoint's context length is cut. horizon: steps.
        groups: an id a series; series of one id attend to each other and must end at the same instant. None: each is
        alone. known: of a series its next values [H], NaN where they are not known, or None.
        levels: other than the checkpoint's `levels` they are interpolated, and flat beyond its outermost.
        max_output_patches: of one pass, by default the checkpoint's; what is beyond is unrolled.
        Raises ForecastError where a length or a number is out of range, and when one group does not fit the memory.
        """
        most = self.network.config.max_output_patches if max_output_patches is None else max_output_patches
        ids = list(range(len(series))) if groups is None else list(groups)
        future = [None] * len(series) if known is None else list(known)
        if not len(series) == len(ids) == len(future) or not ids:
            raise ForecastError(f"{len(series)} series, {len(ids)} groups, {len(future)} known: as many of each, not 0")
        if any(values is not None and len(values) != horizon for values in future):
            raise ForecastError(f"known values must be {horizon} each, as the horizon is; NaN where one is not known")
        if any(np.isinf(values).any() for values in (*series, *future) if values is not None):
            raise ForecastError("a value of a series is infinite; NaN is for what is missing")
        members: dict[int, list[int]] = {}
        for place, each in enumerate(ids):
            members.setdefault(each, []).append(place)
        together, ahead = [], []
        for places in members.values():
            length = max(len(series[place]) for place in places)
            together.append(_right([series[place] for place in places], length))
            told = [np.full(horizon, np.nan) if (it := future[place]) is None else it for place in places]
            ahead.append(np.stack(told).astype(np.float32))
        found = np.empty((len(series), len(self.levels), horizon), np.float32)
        answers = self._forecast(together, ahead, horizon, most)
        for places, answer in zip(members.values(), answers, strict=True):
            found[places] = answer
        if levels is not None:
            if not all(0 < level < 1 for level in levels):
                raise ForecastError(f"levels {list(levels)}: each must be between 0 and 1")
            found = at_levels(found, self.levels, np.asarray(levels))
        return finite(found)

    def _forecast(
        self, groups: Sequence[np.ndarray], known: Sequence[np.ndarray], horizon: int, most: int
    ) -> list[np.ndarray]:
        """The network's quantiles of each group [G, T], float32 [G, Q, H] each, not sorted.

        known: of each what is known ahead, [G, H], else NaN. most: patches of one pass. Beyond it the levels UNROLLED
        of each answer go on as if observed, nine paths that attend to nothing of each other, and the quantiles of all
        their answers, each weighted by how much both of its levels stand for, are the next answer.
        """
        patch, room = self.network.config.patch_size, self.network.config.context_length
        if horizon < 1 or most < 1:
            raise ForecastError(f"horizon {horizon}, max_output_patches {most}: each must be at least 1")
        if horizon > most * patch and not set(UNROLLED.round(6)) <= set(self.levels.round(6)):
            raise ForecastError(
                f"horizon {horizon}: above {most * patch} steps the checkpoint needs the levels 0.1-0.9"
            )
        contexts, ahead = [group[:, -room:] for group in groups], list(known)
        patches = min(-(-horizon // patch), most)
        parts = [self._pass(contexts, ahead, patches)]
        weights = np.outer(_masses(UNROLLED), _masses(self.levels)).ravel()
        paths = len(UNROLLED)
        while (done := sum(part[0].shape[-1] for part in parts)) < horizon:
            if len(parts) == 1:
                contexts = [context for context in contexts for _ in range(paths)]
            steps = parts[-1][0].shape[-1]
            for place, latest in enumerate(parts[-1]):
                appended = at_levels(latest, self.levels, UNROLLED)  # [G, 9, steps]
                told = ahead[place][:, :steps]  # at least as many are ahead, or this would not go on
                for path in range(paths):
                    each = np.where(np.isnan(told), appended[:, path], told)
                    whole = np.concatenate((contexts[place * paths + path], each), 1)
                    contexts[place * paths + path] = whole[:, -room:]
            ahead = [told[:, steps:] for told in ahead]
            patches = min(-(-(horizon - done) // patch), most)
            answers = self._pass(contexts, [told for told in ahead for _ in range(paths)], patches)
            parts.append(
                [
                    weighted_quantiles(np.concatenate(answers[first : first + paths], 1), weights, self.levels)
                    for first in range(0, len(answers), paths)
                ]
            )
        return [np.concatenate(pieces, -1)[..., :horizon] for pieces in zip(*parts, strict=True)]

    @torch.inference_mode()
    def _pass(self, groups: Sequence[np.ndarray], known: Sequence[np.ndarray], patches: int) -> list[np.ndarray]:
        """The answer of the network to each group [G, T], float32 [G, Q, patches * P] each.

        Groups of one size run together, like lengths beside each other.
        """
        patch = self.network.config.patch_size
        lengths = [max(1, -(-group.shape[1] // patch)) for group in groups]  # in patches
        left = sorted(range(len(groups)), key=lambda place: (-len(groups[place]), -lengths[place]))
        found: dict[int, np.ndarray] = {}
        while left:
            size, longest = len(groups[left[0]]), lengths[left[0]]
            tokens = size * (longest + 1 + patches)
            most = max(1, self._batch_tokens // tokens)
            room = min(most, self._chunk) if self.graphs.on else 0  # groups of a graph's one shape
            batch = [place for place in left[: room or most] if len(groups[place]) == size]
            rows = [batch[min(row, len(batch) - 1)] for row in range(room or len(batch))]
            context = (fixed_length(longest) if room else longest) * patch
            series = np.stack([_right(groups[place], context) for place in rows])
            future = np.full((len(rows), size, patches * patch), np.nan, np.float32)
            for into, place in zip(future, rows, strict=True):
                told = known[place][:, : into.shape[1]]
                into[:, : told.shape[1]] = told
            try:
                arguments = (torch.from_numpy(series).to(self.device), torch.from_numpy(future).to(self.device))
                answers = self.graphs.run(self.network.answer, (*series.shape, patches), *arguments)
            except torch.OutOfMemoryError as error:
                self.graphs.release()
                what = f"one window of {size} series of {context} points"
                self._batch_tokens = halved(len(rows), self.device, what, error) * tokens
                continue
            self.forwards += 1
            found.update(zip(batch, answers.cpu().numpy(), strict=False))
            left = left[len(batch) :]
        return [found[place] for place in range(len(groups))]


def _right(rows: Sequence[np.ndarray] | np.ndarray, length: int) -> np.ndarray:
    """Rows of any lengths as float32 [rows, length], NaN before the first value of each."""
    whole = np.full((len(rows), length), np.nan, np.float32)
    for into, row in zip(whole, rows, strict=True):
        into[length - len(row) :] = row
    return whole


def at_levels(values: np.ndarray, levels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """values [.., Q, H] at these levels as [.., asked, H]: linear between the levels and flat beyond."""
    at = np.interp(asked, levels, np.arange(len(levels)))
    below = np.minimum(at.astype(int), max(0, len(levels) - 2))
    share = (at - below)[:, None]
    above = np.minimum(below + 1, len(levels) - 1)
    # Of the levels themselves exactly what they are: 0 times a number takes nothing away.
    return (values[..., below, :] * (1 - share) + values[..., above, :] * share).astype(values.dtype)


def weighted_quantiles(values: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Quantiles [.., Q, H] of values [.., n, H] with weights [n]: linear between cumulative weights, flat beyond."""
    values = np.moveaxis(values, -2, -1)
    order = np.argsort(values, -1, kind="stable")
    ascending = np.take_along_axis(values, order, -1).astype(np.float64)
    shares = np.cumsum((weights / weights.sum())[order], -1)
    last = len(weights) - 1
    above = np.stack([(shares < level).sum(-1) for level in levels], -1).clip(1, last)
    low, high = (np.take_along_axis(shares, at, -1) for at in (above - 1, above))
    share = ((levels - low) / (high - low)).clip(0, 1)
    below, over = (np.take_along_axis(ascending, at, -1) for at in (above - 1, above))
    return np.moveaxis(below + share * (over - below), -1, -2).astype(np.float32)


def _masses(levels: np.ndarray) -> np.ndarray:
    """How much of a distribution each level stands for: half the way to its neighbours, or to 0 and 1."""
    edges = np.concatenate(([0.0], levels, [1.0]))
    masses = (edges[2:] - edges[:-2]) / 2
    return masses / masses.sum()


def load(
    checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT
) -> Chronos2:
    """Load a checkpoint (`checkpoints.resolve`) onto a device. Raises CheckpointError and SettingError."""
    policy = decide(CHRONOS2.name, device=device, running=running)
    found = resolve(checkpoint, revision=revision, setting="[chronos2] checkpoint")
    with torch.device("meta"):
        network = Chronos2Network(read_config(found))
    load_into(found, network, str)
    placed(network.prepare(), network.encoder, device=device, dtype=running.dtype)
    return Chronos2(network, fingerprint=fingerprint_of(found, running.dtype), policy=policy, chunk=running.chunk)
