"""Toto 1.0 as a forecaster: its stages, what of them runs together, and the loading of a checkpoint.

Owns the calls of the network, the decoding past the first patch and the bounds on memory. Within the first patch
nothing that is sampled re-enters the network, so one forward a window is the whole network work of any number of
samples (the reference repeats the window once a sample). Knows nothing of windows' origins, aggregates, studies or
caches; what the network reads and leaves is in toto_encoded.py, the network in toto_network.py, its mixtures and their
draws in toto_sampling.py.

"The reference" is github.com/DataDog/toto at 46bd92a. Dimensions: B or W windows, V variates, P points a patch,
Q points of a head, N samples or trajectories, H steps, h of them in the first patch, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forecasters import (
    BY_DEFAULT,
    CLOSE,
    KEYS,
    Bars,
    ForecastError,
    Running,
    StudentMixture,
    halved,
    seed_of_key,
)
from forecasters.checkpoints import load_into, resolve
from forecasters.compilation import OFF, Graphs, Policy, decide, fixed_length
from forecasters.low_precision import placed
from forecasters.packed import pack
from forecasters.scaling import in_units
from forecasters.toto_checkpoint import fingerprint_of, read_config, rename
from forecasters.toto_encoded import (
    VARIATE_KEYS,
    EncodedPrices,
    first_patch,
    in_price,
    in_units_of,
    series_of,
    units_of_network,
    unpacked,
)
from forecasters.toto_kept import KeptMixtures
from forecasters.toto_model import KEY_INPUTS, PRICE, RATIO, TOTO, VARIATES
from forecasters.toto_network import Statistics, TotoNetwork, TotoPrefix
from forecasters.toto_sampling import stream
from forecasters.toto_shared import SharedForwards

TRAJECTORIES = 64  # a block; its size never depends on num_samples, so fewer samples are a prefix bit for bit
BLOCK_TOKENS = 1024  # trajectories of all windows in one forward past the first patch
BATCH_TOKENS = 16_384  # patches in one forward of encode: 250 windows of 4,096 points


class Trajectories:
    """N continuations of each window, a patch at a time, over one shared prefix.

    Follows the reference with its key-value cache, its default: a new patch at position p is rotated around p // 2
    while the context's keys keep the centre of the context (rope.py:93), which differs from a pass without a cache
    by about 1e-3.
    """

    def __init__(
        self, network: TotoNetwork, prefix: TotoPrefix, count: int, *, patches: int, graphs: Graphs, room: int = 0
    ) -> None:
        """count: trajectories a window, N. patches: how often `advance` will be called at most.

        room: windows that are run, the last one again in those left over; 0: as many as there are.
        """
        self.network, self._graphs = network, graphs
        windows, variates = prefix.ids.shape
        rows = torch.arange(max(room, windows), device=prefix.ids.device).clamp_max(windows - 1)
        each = (rows[:, None] * variates + torch.arange(variates, device=rows.device)).flatten()  # with variates, B*V
        self._pads, self._ids = prefix.pads[rows], prefix.ids[rows]
        self._statistics = tuple(
            tensor[rows][..., None].expand(-1, -1, count).contiguous() for tensor in prefix.statistics
        )
        self._kept = [self._filled(f"prefix {i}", tensor[each]) for i, tensor in enumerate(prefix.keys + prefix.values)]
        heads, size = network.config.num_heads, network.config.embed_dim // network.config.num_heads
        shape = (len(each), heads, count, patches, size)
        self._own = [graphs.buffer(f"own {i}", shape, like=tensor) for i, tensor in enumerate(self._kept)]
        self._steps = torch.arange(patches, device=rows.device).unbind()
        self._done = 0

    def _filled(self, name: str, values: Tensor) -> Tensor:
        return self._graphs.buffer(name, values.shape, like=values).copy_(values)

    def advance(self, patch: Tensor, steps: int, uniforms: Tensor | None = None) -> Tensor:
        """Append patch [B, V, N, P], in price, and continue with `steps` points, float64 [B, V, N, steps], in price.

        uniforms: of as many draws, float64 [B, V, N, steps, 3]; None: the mixtures' means.
        """
        key = (*patch.shape, steps, uniforms is None, *(self._kept[0].shape if self._kept else ()), len(self._steps))
        done = self._steps[self._done]
        points, self._statistics = self._graphs.run(
            self.network.extend, key, patch, uniforms, done, self._statistics, self._pads, self._ids, self._kept,
            self._own, steps,
        )  # fmt: skip
        self._done += 1
        return points


def check_asked(read: str, horizon: int) -> None:
    """Raise ForecastError for a horizon that cannot be forecast from such an input."""
    if horizon < 1 or read not in KEY_INPUTS or (read == RATIO and horizon > 1):
        raise ForecastError(f"horizon {horizon} with key_input {read}: at least 1 step is needed, of ratios just 1")


@contextmanager
def one_thread() -> Iterator[None]:
    """Do what this process computes within in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Toto(SharedForwards, KeptMixtures):
    """A loaded Toto 1.0 checkpoint; see `forecasters.KeyedForecaster`."""

    model, params = TOTO.name, TOTO.params

    def __init__(
        self, network: TotoNetwork, *, fingerprint: str, policy: Policy | None = None, chunk: int = 10
    ) -> None:
        """policy: how to compile; None: not at all. chunk: windows in a compiled forward, fewer are padded."""
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.free_draw_horizon = network.config.patch_size
        self.forwards = 0
        identity = f"{network.config} {next(network.layers).attention.wO.weight.dtype}"
        self.graphs = Graphs(policy or OFF, device=self.device, identity=identity)
        if not self.graphs.on:
            pack(self.network.transformer, {"wQKV": (network.config.embed_dim,)})
        self._chunk = chunk
        # What is run together, halved where a device runs out of memory and not tried larger again. On a GPU a batch
        # of another size may change the last bits of an answer. A CPU never raises what halves: its bits stay.
        self._batch_tokens = BATCH_TOKENS
        self._windows_together = BLOCK_TOKENS // TRAJECTORIES

    @property
    def compilation(self) -> str:
        return self.graphs.state

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        """Only where all keys are the variates of one window."""
        return params.get("key_input") == VARIATES

    def encode(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE
    ) -> EncodedPrices:
        """The mixtures of a key's next steps, from its last `context_length` values; one batched forward.

        contexts: W windows of any lengths. params: {"context_length": points, "key_input": what the network reads}, by
        default the key's own prices; see toto_model.KEY_INPUTS. horizon: steps.
        Raises ForecastError on a context that is empty or not finite, for a horizon above 1 of ratios, whose last
        closes are not known then, and when one window does not fit the memory.
        """
        read = params.get("key_input", PRICE)
        check_asked(read, horizon)
        keys = VARIATE_KEYS if read == VARIATES else (key,)
        units = units_of_network(contexts, params)
        contexts = in_units(contexts, units)
        rows = [series_of(bars, int(params["context_length"]), keys, ratio=read == RATIO) for bars in contexts]
        if not rows:
            raise ForecastError("no contexts: at least one window is needed")
        # Of the forward's rows
        tokens = -(-max(row.shape[1] for row in rows) // self.network.config.patch_size) * len(keys)
        parts, start = [], 0
        while start < len(rows):
            most = max(1, self._batch_tokens // tokens)
            if self.graphs.on:
                room = min(most, self._chunk)  # windows of a graph's one shape
                batch = rows[start : start + room]
            else:
                batch = rows[start : start + most]
                room = self.padded_to(len(batch), most)
            try:
                parts.append(self._prefill(batch, horizon, room))
            except torch.OutOfMemoryError as error:
                fit = halved(room or len(batch), self.device, f"one window of {batch[0].shape[1]} points", error)
                self._batch_tokens = fit * tokens
                continue
            start += len(batch)
        packed = np.concatenate([part[0] for part in parts])
        prefixes = tuple(part[1] for part in parts if part[1] is not None)
        found = unpacked(packed, self.network.config.components, keys=keys, horizon=horizon, prefixes=prefixes)
        return in_price(contexts, found) if read == RATIO else in_units_of(found, units)

    def padded_to(self, windows: int, most: int) -> int:
        """The windows that a forward of these has: from a third of a chunk on as many as a whole one, 0: no others.

        The number decides last bits: so what is kept of a window is found again beside any number of others.
        """
        return self._chunk if self._chunk // 3 <= windows < self._chunk <= most else 0

    def encode_stacked(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int
    ) -> dict[str, EncodedPrices]:
        """`encode` of every key, up to a patch ahead in one forward where the keys are series of their own."""
        read, count = params.get("key_input", PRICE), len(contexts)
        if read == VARIATES or self.graphs.on or horizon > self.network.config.patch_size:
            return {key: self.encode(contexts, params, horizon, key) for key in KEYS}
        check_asked(read, horizon)
        points, units = int(params["context_length"]), units_of_network(contexts, params)
        contexts = in_units(contexts, units)
        rows = [series_of(bars, points, (key,), ratio=read == RATIO) for key in KEYS for bars in contexts]
        with one_thread():  # several share the rows out among them, which changes last bits with their number
            packed, _ = self._prefill(rows, horizon, 0)
        found = {}
        for place, key in enumerate(KEYS):
            part = packed[place * count : (place + 1) * count]
            one = unpacked(part, self.network.config.components, keys=(key,), horizon=horizon, prefixes=())
            found[key] = in_price(contexts, one) if read == RATIO else in_units_of(one, units)
        return found

    def draw(self, encoded: EncodedPrices, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples of the first key that was encoded, float64 [W, N, H]; see `draw_keys`."""
        return self.draw_keys(encoded, params, seeds, encoded.keys[:1])[0]

    def draw_keys(
        self, encoded: EncodedPrices, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> np.ndarray:
        """Samples of encoded keys, float64 [K, W, N, H]; those of two keys are independent within the first patch.

        params: {"num_samples": N}. seeds: one a window, below 2**64. No network call while the horizon is within
        the first patch. Raises ForecastError where a sample is no number, or beyond half the range of fp32.
        """
        count, steps = int(params["num_samples"]), encoded.horizon
        if count < 1:
            raise ForecastError(f"num_samples {count}: at least 1 is needed")
        windows = len(encoded.probs) // len(encoded.keys)
        if len(seeds) != windows:
            raise ForecastError(f"{len(seeds)} seeds for {windows} windows")
        places = [encoded.keys.index(key) for key in keys]
        if encoded.prefixes:
            every = np.empty((len(encoded.probs), count, steps))

            def fill(start: int, stop: int, prefix: TotoPrefix) -> None:
                rows = encoded.rows(start, stop)
                self._draw_long(encoded, prefix, rows, seeds[start:stop], every[rows])

            self._in_groups(encoded, TRAJECTORIES, fill)
            every = encoded.priced(slice(None), every)
            return _finite(np.stack([every[encoded.rows(0, windows, place)] for place in places]))
        uniforms, found = np.empty((count, steps, 3)), []
        for key, place in zip(keys, places, strict=True):
            drawn = (stream(seed_of_key(seed, key)).random(out=uniforms) for seed in seeds)
            rows = encoded.rows(0, windows, place)
            found.append(encoded.priced(rows, first_patch(encoded, rows, drawn, count)))
        return _finite(np.stack(found) if len(found) > 1 else found[0][None])

    def exact(self, encoded: EncodedPrices, params: Mapping[str, Any], seeds: Sequence[int]) -> StudentMixture:
        """Of the first key that was encoded; see `exact_keys`."""
        return self.exact_keys(encoded, params, seeds, encoded.keys[:1])[0]

    def exact_keys(
        self, encoded: EncodedPrices, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> list[StudentMixture]:
        """The mixtures that samples are drawn from, in price. Neither params nor seeds are looked at.

        Raises ForecastError beyond the first patch, where a mixture depends on what was drawn before.
        """
        del params, seeds
        if encoded.prefixes:
            patch = self.network.config.patch_size
            raise ForecastError(
                f"horizon {encoded.horizon}: the exact mixture is known for the first {patch} steps only"
            )
        affine_loc, affine_scale = encoded.affine_loc[:, None, None], encoded.affine_scale[:, None, None]
        loc, scale = encoded.loc * affine_scale + affine_loc, encoded.scale * affine_scale
        every = [slice(encoded.keys.index(key), None, len(encoded.keys)) for key in keys]
        return [
            StudentMixture(
                probs=encoded.probs[rows],
                df=encoded.df[rows],
                loc=encoded.priced(rows, loc[rows]),
                scale=encoded.priced(rows, scale[rows]),
            )
            for rows in every
        ]

    def mean(self, encoded: EncodedPrices) -> np.ndarray:
        """The mixtures' means, float64 [W * V, H]; past the first patch each patch's mean is fed back as if observed.

        What the reference answers for num_samples=None.
        """
        first = (encoded.probs * encoded.loc).sum(-1) * encoded.affine_scale[:, None] + encoded.affine_loc[:, None]
        if not encoded.prefixes:
            return _finite(encoded.priced(slice(None), first))
        points = np.empty((len(first), encoded.horizon))

        def fill(start: int, stop: int, prefix: TotoPrefix) -> None:
            rows = encoded.rows(start, stop)
            points[rows] = self._decode(prefix, first[rows, None], encoded.horizon, None)[:, 0]

        self._in_groups(encoded, 1, fill)
        return _finite(encoded.priced(slice(None), points))

    @torch.inference_mode()
    def _prefill(self, rows: Sequence[np.ndarray], horizon: int, room: int) -> tuple[np.ndarray, TotoPrefix | None]:
        """The numbers of `EncodedPrices`, [W * V, 4 * h * K + 2], and the prefix past the first patch.

        rows: of a window, [V, T]. room: windows that the forward has, the last row again in those left over; 0: as
        many as there are.
        """
        patch, variates = self.network.config.patch_size, len(rows[0])
        patches = -(-max(row.shape[1] for row in rows) // patch)
        length = (fixed_length(patches) if self.graphs.on else patches) * patch
        shape = (max(room, len(rows)), variates, length)
        series = np.zeros(shape, np.float32)  # the reference's dtype at this border too
        pads = np.full(len(series), length)
        for i in range(len(series)):
            row = rows[min(i, len(rows) - 1)]
            pads[i] -= row.shape[1]
            series[i, :, pads[i] :] = row
        padding = torch.from_numpy(pads).to(self.device)
        self.forwards += 1
        steps, keep = min(horizon, patch), horizon > patch
        arguments = (torch.from_numpy(series).to(self.device), padding, steps, keep)
        packed, keys, values, statistics = self.graphs.run(
            self.network.answer, (*series.shape, steps, keep), *arguments
        )
        prefix = None
        if keep:
            ids = torch.zeros(len(series), variates, dtype=torch.long, device=self.device)
            whole = TotoPrefix(
                keys=keys, values=values, pads=padding // patch, ids=ids, statistics=Statistics(*statistics)
            )
            prefix = whole.rows(0, len(rows))
        return packed[: len(rows)].flatten(0, 1).cpu().numpy(), prefix

    def _in_groups(
        self, encoded: EncodedPrices, trajectories: int, decode: Callable[[int, int, TotoPrefix], None]
    ) -> None:
        """Call decode(first window, last + 1, their prefix) for windows to decode together, until all are.

        Bounded by tokens, and the same for every number of samples. trajectories: of a window at a time.
        """
        start, variates = 0, len(encoded.keys)
        for prefix in encoded.prefixes:
            row = 0
            while row < len(prefix.pads):
                together = max(1, self._windows_together // variates)
                part = prefix.rows(row, min(row + together, len(prefix.pads)))
                count = len(part.pads)
                try:
                    decode(start, start + count, part)
                except torch.OutOfMemoryError as error:
                    self.graphs.release()
                    what = f"{trajectories} trajectories of one window, {encoded.horizon} steps"
                    fit = halved(self._room(count, variates), self.device, what, error)
                    self._windows_together = fit * variates
                    continue
                row, start = row + count, start + count

    def _room(self, windows: int, variates: int) -> int:
        """How many windows a forward of the decoding has where these are left: a graph's are always as many, padded."""
        return min(max(1, self._windows_together // variates), self._chunk) if self.graphs.on else windows

    def _draw_long(
        self, encoded: EncodedPrices, prefix: TotoPrefix, rows: slice, seeds: Sequence[int], samples: np.ndarray
    ) -> None:
        """Fill samples [W * V, N, H] of the group's windows, which have these rows in encoded, block by block."""
        patch = self.network.config.patch_size
        streams = [stream(seed_of_key(seed, key)) for seed in seeds for key in encoded.keys]
        for first in range(0, samples.shape[1], TRAJECTORIES):
            uniforms = np.stack([stream.random((TRAJECTORIES, encoded.horizon, 3)) for stream in streams])
            begun = first_patch(encoded, rows, uniforms[:, :, :patch], TRAJECTORIES)
            block = self._decode(prefix, begun, encoded.horizon, uniforms)
            samples[:, first : first + TRAJECTORIES] = block[:, : samples.shape[1] - first]

    @torch.inference_mode()
    def _decode(self, prefix: TotoPrefix, begun: np.ndarray, horizon: int, uniforms: np.ndarray | None) -> np.ndarray:
        """Continue the first patch begun [W * V, N, P] to [W * V, N, H], one transfer to the host for all of it.

        uniforms: [W * V, N, H, 3], of which the first P steps are spent; None: the mixtures' means are fed back.
        """
        patch, (windows, variates) = self.network.config.patch_size, prefix.ids.shape
        room = self._room(windows, variates)
        patches = (horizon - 1) // patch
        trajectories = Trajectories(
            self.network, prefix, begun.shape[1], patches=patches, graphs=self.graphs, room=room
        )
        again = np.minimum(np.arange(room), windows - 1)

        def placed(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(rows.reshape(windows, variates, *rows.shape[1:])[again]).to(self.device)

        latest, parts, draws = placed(begun), [], None
        if uniforms is not None:  # a graph draws whole patches; what is past the horizon is cut off
            spare = np.zeros((*begun.shape[:2], (patches + 1) * patch - horizon, 3))
            draws = placed(np.concatenate((uniforms, spare), 2))
        for done in range(patch, horizon, patch):
            steps = patch if self.graphs.on else min(patch, horizon - done)
            now = None if draws is None else draws[:, :, :, done : done + steps].contiguous()
            self.forwards += 1
            latest = trajectories.advance(latest.float(), steps, now)  # fp32, as the reference feeds its samples back
            parts.append(latest)
        rest = torch.cat(parts, -1)[:windows, ..., : horizon - patch].flatten(0, 1)
        return np.concatenate((begun, rest.cpu().numpy()), -1)


def _finite(prices: np.ndarray) -> np.ndarray:
    """The reference writes 0 over NaN, infinities and |price| >= fp32 max / 2; a made-up price is worse than none."""
    most = np.finfo(np.float32).max / 2
    if not (-most < prices.min() and prices.max() < most):  # nor is NaN
        raise ForecastError("the network's samples are not finite numbers; check the prices and the checkpoint")
    return prices


def load(checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT) -> Toto:
    """Load a checkpoint (`checkpoints.resolve`) onto a device. Raises CheckpointError and SettingError."""
    policy = decide(TOTO.name, device=device, running=running)
    found = resolve(checkpoint, revision=revision, setting="[toto] checkpoint")
    with torch.device("meta"):
        network = TotoNetwork(read_config(found))
    load_into(found, network, rename)
    placed(network, network.transformer, device=device, dtype=running.dtype)
    return Toto(network, fingerprint=fingerprint_of(found, running.dtype), policy=policy, chunk=running.chunk)
