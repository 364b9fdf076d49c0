"""Kronos as a forecaster: bars to tokens, tokens to sampled bars, a stage at a time.

`encode` runs the networks over a window's bars once; `draw` samples from what that left, `exact` sums over it. Owns
what runs together within the memory, and which draws are of fixed shapes (kronos_fixed.py, what is compiled) and which
go down the tree of paths (kronos_tree.py). Knows nothing of windows' origins, aggregates, studies or the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forecasters import CLOSE, Bars, Expectation, ForecastError, halved
from forecasters.compilation import OFF, Graphs, Policy
from forecasters.kronos_encoded import (
    COLUMNS,
    MIN_BARS,
    EncodedBars,
    KronosPrefix,
    Window,
    calendar_of,
    normalised,
)
from forecasters.kronos_exact import EXACT_PAIRS, EXACT_WINDOWS, expect
from forecasters.kronos_fixed import FixedShapes, PathCache, whole_bars
from forecasters.kronos_kept import KeptTables
from forecasters.kronos_model import KRONOS
from forecasters.kronos_network import KronosNetwork, KronosTokenizer, LayerCache
from forecasters.kronos_sampling import Sampling, keyed_pick, sampling_of, uniforms
from forecasters.kronos_sizes import CALENDAR, NETWORK_CONTEXT
from forecasters.kronos_tree import paths
from forecasters.packed import pack
from forecasters.scaling import RAW, in_units, units_of

DRAW_BYTES = 256 << 20  # keys and values of generated tokens held at a time
DRAW_ROWS = 4096  # paths drawn at a time: 4096 rows of 1024 float64 probabilities are 32 MiB
PREFILL_TOKENS = 8192  # a batch on an accelerator; on a CPU one window at a time is as fast and keeps windows apart
FIXED_SAMPLES = 64  # paths of a window in a compiled step
FIXED_BYTES = 4 << 30  # keys and values of their generated bars, on an accelerator; elsewhere DRAW_BYTES


class Kronos(KeptTables):
    """A tokenizer and a network that answer the forecaster contract."""

    model, params = KRONOS.name, KRONOS.params

    def __init__(
        self,
        tokenizer: KronosTokenizer,
        network: KronosNetwork,
        *,
        fingerprint: str,
        network_context: int = NETWORK_CONTEXT,
        policy: Policy | None = None,
        chunk: int = 10,
    ) -> None:
        """The two on one device, the tokenizer in float32.

        network_context: bars the network sees at most; a generated bar beyond them pushes out the oldest.
        policy: how to compile; None: not at all. chunk: windows in a compiled graph, fewer are padded.
        """
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.network = network.eval().requires_grad_(False)
        self.fingerprint, self.network_context = fingerprint, network_context
        self.free_draw_horizon = 1
        self.forwards = 0  # runs of the transformer: a window's (on a CPU) or a batch's prefix, a step of the suffixes
        # What is run together, halved where a device runs out of memory and not tried larger again. On a GPU a batch
        # of another size may change the last bits of an answer. A CPU never raises what halves: its bits stay.
        self._prefill_tokens = 0 if self.device.type == "cpu" else PREFILL_TOKENS  # 0: one window at a time
        self.draw_rows, self._exact_windows = DRAW_ROWS, EXACT_WINDOWS
        dtype = next(iter(network.transformer)).ffn.w1.weight.dtype
        identity = f"{network.config} {tokenizer.config} {dtype}"
        self.graphs = Graphs(policy or OFF, device=self.device, identity=identity)
        if not self.graphs.on:
            pack(self.tokenizer)
            pack(self.network)
        self._fixed, self._chunk = FixedShapes(tokenizer, network), chunk
        self._fixed_samples = FIXED_SAMPLES

    @property
    def compilation(self) -> str:
        return self.graphs.state

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """Yes: a token is a whole bar."""
        del params
        return True

    # -- encode --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE
    ) -> EncodedBars:
        """Everything about these contexts that does not depend on how we sample, whatever key is asked for.

        params: `max_context`, bars used of each context, the newest; `clip`, in standard deviations, where
        normalised values are cut off. Raises ForecastError for bars that are too few or not finite and for a
        horizon that leaves nothing of the context.
        """
        del key
        max_context, clip = int(params["max_context"]), float(params["clip"])
        if max_context < MIN_BARS or clip <= 0:
            raise ForecastError(f"max_context {max_context} or clip {clip} out of range")
        if not 1 <= horizon < self.network_context:
            raise ForecastError(f"horizon {horizon} must be below the network's context of {self.network_context} bars")
        contexts = [bars.slice(max(0, len(bars) - max_context), len(bars)) for bars in contexts]
        units = units_of(contexts, params.get("scale", RAW))
        contexts = in_units(contexts, units)
        windows: dict[int, Window] = {}
        while left := [i for i in range(len(contexts)) if i not in windows]:
            # Together: equal lengths only, for the published code masks padding wrongly. Fixed shapes mask it rightly.
            length, compiled = len(contexts[left[0]]), self.graphs.on
            alike = left if compiled else [i for i in left if len(contexts[i]) == length]
            batch = alike[: self._chunk if compiled else max(1, self._prefill_tokens // length)]
            try:
                encode = self._encode_fixed if compiled else self._encode
                encoded = encode([contexts[i] for i in batch], clip, horizon)
            except torch.OutOfMemoryError as error:
                self.graphs.release()
                what = f"one window of {length} bars"
                if compiled:  # the padding was run too
                    self._chunk = halved(self._chunk, self.device, what, error)
                else:
                    self._prefill_tokens = halved(len(batch), self.device, what, error) * length
                continue
            windows.update(zip(batch, encoded, strict=True))
        if units is not None:
            windows = {i: window.in_price(units[i]) for i, window in windows.items()}
        return EncodedBars(windows=[windows[i] for i in range(len(contexts))], horizon=horizon)

    def _encode(self, contexts: Sequence[Bars], clip: float, horizon: int) -> list[Window]:
        normal, mean, scale = zip(*(normalised(bars, clip) for bars in contexts), strict=True)
        stamps = self._to_device(np.stack([calendar_of(bars.timestamps, horizon - 1) for bars in contexts]))
        tokens = self.tokenizer.tokens(self._to_device(np.ascontiguousarray(normal)))  # [B, T, 2]
        length, room = tokens.shape[1], self.network_context
        seen = slice(max(0, length - room), length)
        prefixes = self.prefill(tokens[:, seen], stamps[:, seen], keep=horizon > 1 and length < room)
        shown = self.tokenizer.embed_tokens(tokens[:, max(0, length + horizon - room) :])
        _, decoder = self.tokenizer.decoder.run(shown, keep=True)
        return [
            Window(
                tokens=tokens[i],
                stamps=stamps[i],
                mean=mean[i],
                scale=scale[i],
                prefix=prefix,
                s1_logits=self.network.head.proj_s1(prefix.hidden).float().cpu(),
                decoder=[(k[i], v[i]) for k, v in decoder],
            )
            for i, prefix in enumerate(prefixes)
        ]

    def _encode_fixed(self, contexts: Sequence[Bars], clip: float, horizon: int) -> list[Window]:
        """As `_encode`, contexts of any lengths padded to the shapes of one graph.

        The tokenizer's encoder is not compiled: a last bit can turn a sign there, and with it a token, and it is 2 to
        3 % of the work.
        """
        room, lengths = self.network_context, [len(bars) for bars in contexts]
        again = np.minimum(np.arange(self._chunk), len(contexts) - 1)  # the last window again in those left over
        normal = np.zeros((len(contexts), whole_bars(max(lengths)), len(COLUMNS)), np.float32)
        stamps = np.zeros((len(contexts), normal.shape[1] + horizon - 1, len(CALENDAR)), np.int64)
        scaling = []
        for i, bars in enumerate(contexts):
            normal[i, : len(bars)], *scale = normalised(bars, clip)
            stamps[i, : len(bars) + horizon - 1] = calendar_of(bars.timestamps, horizon - 1)
            scaling.append(scale)
        seen = [max(0, length - room) for length in lengths]  # the first bar that the network sees
        shown = [max(0, length + horizon - room) for length in lengths]  # the first that the decoder sees at the end
        sizes = [np.subtract(lengths, first) for first in (seen, shown)]
        keep = horizon > 1 and max(lengths) < room
        tokens, moments = self.tokenizer.tokens(self._to_device(normal[again])), self._to_device(stamps[again])
        trunk, decoded = (
            self._to_device(np.minimum(np.add.outer(first, np.arange(whole_bars(max(size)))), normal.shape[1] - 1))
            for first, size in ((np.array(seen)[again], sizes[0]), (np.array(shown)[again], sizes[1]))
        )
        rows = torch.arange(self._chunk, device=self.device)[:, None]
        self.forwards += 1
        key = (tuple(trunk.shape), tuple(decoded.shape), keep)
        hidden, s1_logits, dependency, layers, decoder = self.graphs.run(
            self._fixed.prefill, key, tokens[rows, trunk], moments[rows, trunk],
            self._to_device(sizes[0][again] - 1), tokens[rows, decoded], keep,
        )  # fmt: skip
        s1_logits = s1_logits.cpu()

        def of(cache: LayerCache, i: int, size: int) -> LayerCache:
            return cache[0][i, :, :size].clone(), cache[1][i, :, :size].clone()  # copies, to keep no padding alive

        return [
            Window(
                tokens=tokens[i, : lengths[i]].clone(),
                stamps=moments[i, : lengths[i] + horizon - 1].clone(),
                mean=scaling[i][0],
                scale=scaling[i][1],
                prefix=KronosPrefix(
                    hidden=hidden[i].clone(),
                    keys=of(dependency, i, sizes[0][i]),
                    layers=[of(layer, i, sizes[0][i]) for layer in layers],
                ),
                s1_logits=s1_logits[i].clone(),
                decoder=[of(layer, i, sizes[1][i]) for layer in decoder],
            )
            for i in range(len(contexts))
        ]

    def prefill(self, tokens: Tensor, stamps: Tensor, *, keep: bool) -> list[KronosPrefix]:
        """tokens [B, T, 2], stamps [B, T, 5]: one KronosPrefix a row; keep: with the transformer's keys and values."""
        self.forwards += 1
        x, layers = self.network.transformer.run(self.network.embed(tokens, stamps), keep=keep)
        x = self.network.norm(x)
        keys, values = self.network.dep_layer.keys_values(x)
        return [
            KronosPrefix(hidden=x[i, -1].clone(), keys=(keys[i], values[i]), layers=[(k[i], v[i]) for k, v in layers])
            for i in range(len(x))
        ]

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    # -- draw ----------------------------------------------------------------------------------------------------------

    def draw(self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples of the close, float64 [W, S, H]; see draw_columns. The published forecast is their mean."""
        return self.draw_keys(encoded, params, seeds, (CLOSE,))[0]

    def draw_keys(
        self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> np.ndarray:
        """Samples of these keys from one draw, float64 [K, W, S, H]: a sample of all keys is one path."""
        columns = self.draw_columns(encoded, params, seeds)
        return np.moveaxis(columns[..., _places(keys)], -1, 0)

    @torch.inference_mode()
    def draw_columns(self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples of all six columns, float64 [W, S, H, 6].

        params: temperature, top_k, top_p, sample_count. seeds, and what is raised, as for `Forecaster.draw`.
        """
        sampling, count = sampling_of(params), int(params["sample_count"])
        if count < 1:
            raise ForecastError(f"sample_count {count}: at least 1 is needed")
        _check_seeds(encoded, seeds)
        out = np.empty((len(encoded.windows), count, encoded.horizon, len(COLUMNS)))
        longest = max(window.length for window in encoded.windows)
        # A window that slides changes all its positions at every step: nothing of that is of one shape.
        if self.graphs.on and (encoded.horizon == 1 or longest + encoded.horizon - 1 <= self.network_context):
            start = 0
            while start < len(encoded.windows):
                windows = range(start, min(start + self._chunk, len(encoded.windows)))
                samples = self._samples_together(encoded.horizon)
                try:
                    values = self._draw_fixed(encoded, windows, sampling, count, seeds, samples)
                except torch.OutOfMemoryError as error:
                    self.graphs.release()
                    what = f"one sample of {encoded.horizon} bars of {self._chunk} windows"
                    self._fixed_samples = halved(samples, self.device, what, error)  # a power of 2 as it was
                    continue
                out[windows.start : windows.stop] = values
                start = windows.stop
            return _finite(out)
        chunks = self._chunks(encoded, count)[::-1]  # the next one last
        while chunks:
            windows, samples = chunks.pop()
            rows = len(windows) * len(samples)
            if rows > self.draw_rows:
                chunks += reversed(_halves(windows, samples))
                continue
            pick = keyed_pick(sampling, [seeds[w] for w in windows], samples)
            try:
                values = paths(self, encoded, windows, len(samples), pick)
            except torch.OutOfMemoryError as error:
                self.draw_rows = halved(rows, self.device, f"one sample of {encoded.horizon} bars", error)
                chunks.append((windows, samples))
                continue
            out[windows.start : windows.stop, samples.start : samples.stop] = values
        return _finite(out)

    def _samples_together(self, horizon: int) -> int:
        """Paths of a window in a compiled step: a power of 2."""
        limit = DRAW_BYTES if self.device.type == "cpu" else FIXED_BYTES
        fit = max(1, limit // (self._bytes_a_bar * horizon * self._chunk))
        return min(self._fixed_samples, 1 << (fit.bit_length() - 1))

    def _draw_fixed(
        self, encoded: EncodedBars, windows: range, sampling: Sampling, count: int, seeds: Sequence[int], samples: int
    ) -> np.ndarray:
        """All columns of `count` paths of these windows, float64 [W, S, H, 6], by graphs of fixed shapes.

        Everything stays on the device until all of it is drawn. samples: paths of a window in a step.
        """
        chosen, horizon = [encoded.windows[w] for w in windows], encoded.horizon
        rows = [*chosen, *[chosen[-1]] * (self._chunk - len(chosen))]
        lengths, decoded = [w.prefix.keys[0].shape[1] for w in rows], [w.decoded for w in rows]

        def cache(name: str, windows: Sequence[Sequence[LayerCache]], sizes: Sequence[int]) -> PathCache:
            buffer = self.graphs.buffer
            return PathCache.filled(buffer, name, windows, sizes, samples=samples, horizon=horizon, device=self.device)

        dependency = cache("dependency", [[w.prefix.keys] for w in rows], lengths)
        transformer = cache("layer", [w.prefix.layers if horizon > 1 else () for w in rows], lengths)
        decoder = cache("decoder", [w.decoder for w in rows], decoded)
        params = (
            torch.tensor(sampling.temperature, dtype=torch.float32, device=self.device),
            torch.tensor(sampling.top_k, device=self.device),
            torch.tensor(sampling.top_p, dtype=torch.float32, device=self.device),
        )
        steps = torch.arange(horizon, device=self.device).unbind()
        begin = torch.stack([w.prefix.hidden for w in rows])[:, None].expand(-1, samples, -1).contiguous()
        logits = torch.stack([w.s1_logits for w in rows]).to(self.device)[:, None].expand(-1, samples, -1).contiguous()
        stamps = [torch.stack([w.stamps[len(w.tokens) + step] for w in rows]) for step in range(horizon - 1)]
        numbers = [seeds[windows[min(row, len(windows) - 1)]] for row in range(len(rows))]
        key = (samples, horizon, *dependency.shapes, *decoder.shapes)
        blocks = []
        for first in range(0, count, samples):
            u = [[uniforms(seed, step, first, first + samples) for seed in numbers] for step in range(horizon)]
            draws = self._to_device(np.array(u)).unbind()  # horizon of [W, N, 2]
            hidden, s1_logits, values = begin, logits, []
            for step, now in enumerate(draws):
                moment = stamps[step] if step < len(stamps) else None
                self.forwards += moment is not None
                bar, hidden, s1_logits = self.graphs.run(
                    self._fixed.step, (*key, moment is None), hidden, s1_logits, now, params, steps[step], moment,
                    dependency, transformer, decoder,
                )  # fmt: skip
                values.append(bar)
            blocks.append(torch.stack(values, dim=2))  # [W, N, H, 6]
        shaped = torch.cat(blocks, dim=1)[: len(chosen), :count].cpu().numpy().astype(np.float64)
        return np.stack([w.mean + values * w.scale for w, values in zip(chosen, shaped, strict=True)])

    @property
    def _bytes_a_bar(self) -> int:
        """Of keys and values, a bar of a path: of the transformer, the dependency layer and the decoder."""
        config, coder = self.network.config, self.tokenizer.config
        return 8 * (config.d_model * (config.n_layers + 1) + coder.d_model * (coder.n_dec_layers - 1))

    def _chunks(self, encoded: EncodedBars, count: int) -> list[tuple[range, range]]:
        """Ranges of windows of one length, and of samples, to draw together within DRAW_ROWS and DRAW_BYTES."""
        limit = self.draw_rows
        if encoded.horizon > 1:
            limit = max(1, min(limit, DRAW_BYTES // (self._bytes_a_bar * encoded.horizon)))
        step = max(1, limit // count)
        lengths = [window.length for window in encoded.windows]
        edges = [0, *(i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]), len(lengths)]
        return [
            (range(w, min(w + step, b)), range(s, min(s + limit, count)))
            for a, b in pairwise(edges)
            for w in range(a, b, step)
            for s in range(0, count, limit)
        ]

    # -- exact ---------------------------------------------------------------------------------------------------------

    def exact(self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int]) -> Expectation:
        """What the mean of the samples of the close tends to with their number, at one step; see exact_columns."""
        return self.exact_keys(encoded, params, seeds, (CLOSE,))[0]

    def exact_keys(
        self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> list[Expectation]:
        """As `exact`, for each of these keys from one sum."""
        points, mass, bound = self.exact_columns(encoded, params, seeds)
        return [Expectation(points=points[:, [at]], mass=mass, bound=bound[:, [at]]) for at in _places(keys)]

    @torch.inference_mode()
    def exact_columns(
        self, encoded: EncodedBars, params: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The expectation of all columns, float64 [W, 6], the enumerated mass [W] and the error's bound [W, 6].

        Sums over the pairs that temperature, top_k and top_p keep: all of them up to EXACT_PAIRS a window, else
        the likeliest to EXACT_MASS or EXACT_PAIRS. The rest is sampled (EXACT_REST_DRAWS, keyed by the seed); the
        bound is EXACT_SIGMAS standard errors of it, 0 where nothing was left. Raises ForecastError.
        """
        if encoded.horizon != 1:
            raise ForecastError(f"the exact expectation needs horizon 1, not {encoded.horizon}")
        _check_seeds(encoded, seeds)
        sampling = sampling_of(params)
        points, bound = np.empty((2, len(encoded.windows), len(COLUMNS)))
        mass = np.empty(len(encoded.windows))
        start = 0
        while start < len(encoded.windows):
            windows = encoded.windows[start : start + self._exact_windows]
            try:
                expected = list(expect(self, encoded, start, windows, sampling, seeds))
            except torch.OutOfMemoryError as error:
                self._exact_windows = halved(len(windows), self.device, f"{EXACT_PAIRS} pairs of one window", error)
                continue
            for w, (mean, summed, error) in enumerate(expected, start):
                points[w] = encoded.windows[w].mean + mean * encoded.windows[w].scale
                mass[w], bound[w] = summed, error * encoded.windows[w].scale
            start += len(windows)
        return _finite(points), mass, bound


def _places(keys: Sequence[str]) -> list[int]:
    return [COLUMNS.index(key) for key in keys]


def _halves(windows: range, samples: range) -> list[tuple[range, range]]:
    """Both halves of what was to be drawn together: of the windows, else of one window's samples."""
    if len(windows) > 1:
        middle = len(windows) // 2
        return [(windows[:middle], samples), (windows[middle:], samples)]
    middle = len(samples) // 2
    return [(windows, samples[:middle]), (windows, samples[middle:])]


def _check_seeds(encoded: EncodedBars, seeds: Sequence[int]) -> None:
    if len(seeds) != len(encoded.windows):
        raise ForecastError(f"{len(seeds)} seeds for {len(encoded.windows)} windows")


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ForecastError("the forecast is not finite numbers; check the prices and the checkpoint")
    return values
