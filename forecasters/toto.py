"""Toto 1.0 as a forecaster: the inference network that published checkpoints load into, and its two stages.

Owns the network, the causal patch scaling, the Student-T mixture and the decoding past the first patch. Within the
first patch nothing that is sampled re-enters the network, so one forward a window is the whole network work of any
number of samples (the reference repeats the window once a sample). Knows nothing of windows, studies or caches.

"The reference" is github.com/DataDog/toto at 46bd92a. Dimensions: B or W windows, V variates, T points, S patches,
P points a patch, D embed_dim, Q points of a head, N samples or trajectories, h steps of a patch, K components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forecasters import BY_DEFAULT, Bars, CheckpointError, ForecastError, Running, StudentMixture, out_of_memory
from forecasters.checkpoints import CONFIG, Checkpoint, load_into, resolve
from forecasters.checkpoints import check as check_shapes
from forecasters.compilation import OFF, Graphs, Policy, decide
from forecasters.toto_sampling import Mixture, drawn, mixture_samples, stream

MINIMUM_VARIANCE = 0.1  # added to the variance of prices, so tiny prices are not scaled to 1 (scaler.py:221)
NORM_EPS = 1e-8  # inside the root (util.py:42)
ROPE_BASE = 10_000.0
XPOS_BASE = 512.0
TRAJECTORIES = 64  # a block; its size never depends on num_samples, so fewer samples are a prefix bit for bit
BLOCK_TOKENS = 1024  # trajectories of all windows in one forward past the first patch
BATCH_TOKENS = 16_384  # patches in one forward of encode: 250 windows of 4,096 points
DRAW_BYTES = 64 << 20  # bound on the uniforms held at once

_SCALER = "<class 'model.scaler.CausalPatchStdMeanScaler'>"
_MIXTURE = "<class 'model.distribution.MixtureOfStudentTsOutput'>"
_LOADER_KEYS = ("pre_xformers_checkpoint",)  # read by the reference's loader only; the tensor names say as much


@dataclass(frozen=True, kw_only=True)
class Config:
    """The published config.json of Toto 1.0: its 15 names."""

    patch_size: int
    stride: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_hidden_dim: int
    dropout: float
    spacewise_every_n_layers: int  # -1: no layer over variates
    scaler_cls: str
    output_distribution_classes: Sequence[str]
    output_distribution_kwargs: Mapping[str, int]
    spacewise_first: bool = True
    use_memory_efficient_attention: bool = True  # a kernel choice of the reference; same numbers either way
    stabilize_with_global: bool = True
    scale_factor_exponent: float = 10.0

    @property
    def components(self) -> int:
        return self.output_distribution_kwargs["k_components"]

    @property
    def over_time(self) -> tuple[bool, ...]:
        """For each layer whether it attends over time (True) or over variates (False)."""
        every = self.spacewise_every_n_layers
        if every == -1:
            return (True,) * self.num_layers
        space = 0 if self.spacewise_first else every - 1
        return tuple(layer % every != space for layer in range(self.num_layers))


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Running count, mean and sum of squared deviations of what was seen, float64; and the bounds of the scale."""

    count: Tensor
    mean: Tensor
    m2: Tensor
    lowest: Tensor
    highest: Tensor

    def affine(self) -> tuple[Tensor, Tensor]:
        """loc and scale, rounded to fp32 before use as in the reference (scaler.py:254-259)."""
        variance = self.m2 / (self.count - 1).clamp_min(1)
        scale = (variance + MINIMUM_VARIANCE).sqrt().clamp(self.lowest, self.highest)
        return self.mean.float(), scale.float()

    def extended(self, patch: Tensor) -> Statistics:
        """With the points of patch [..., P] seen too (Chan, Golub & LeVeque 1983)."""
        patch = patch.double()
        size, mean = patch.shape[-1], patch.mean(-1)
        m2 = (patch - mean[..., None]).square().sum(-1)
        count, delta = self.count + size, mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + delta * (size / count),
            m2=self.m2 + m2 + delta.square() * (self.count * size / count),
            lowest=self.lowest,
            highest=self.highest,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.count, self.mean, self.m2, self.lowest, self.highest

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Statistics:
        """The inverse of `tensors`."""
        count, mean, m2, lowest, highest = tensors
        return cls(count=count, mean=mean, m2=m2, lowest=lowest, highest=highest)

    def map(self, change: Callable[[Tensor], Tensor]) -> Statistics:
        return Statistics.of([change(tensor) for tensor in self.tensors])


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What the context leaves for decoding: shared by every trajectory of a window, never copied for one."""

    keys: tuple[Tensor, ...]  # a layer over time: [B*V, heads, S, Q], rotated
    values: tuple[Tensor, ...]
    pads: Tensor  # whole pad patches before the first real one, [B]
    ids: Tensor  # [B, V]
    statistics: Statistics  # [B, V]

    @property
    def nbytes(self) -> int:
        tensors = (*self.keys, *self.values, self.pads, self.ids, *self.statistics.tensors)
        return sum(tensor.nbytes for tensor in tensors)

    def rows(self, start: int, stop: int) -> Prefix:
        """Of the windows [start, stop), as views."""
        variates = self.ids.shape[1]
        return Prefix(
            keys=tuple(tensor[start * variates : stop * variates] for tensor in self.keys),
            values=tuple(tensor[start * variates : stop * variates] for tensor in self.values),
            pads=self.pads[start:stop],
            ids=self.ids[start:stop],
            statistics=self.statistics.map(lambda tensor: tensor[start:stop]),
        )


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.wQKV = nn.Linear(size, 3 * size)
        self.wO = nn.Linear(size, size)
        self.heads = heads

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Of query 0, key 1 and value 2 the ones [first, last); x [B, L, D], each result [B, heads, L, Q]."""
        size = x.shape[-1]
        rows = slice(first * size, last * size)
        y = F.linear(x, self.wQKV.weight[rows], self.wQKV.bias[rows])
        # The published rows run (qkv, Q, heads), heads fastest; the result is (heads, Q) (attention.py:94, 136).
        return y.unflatten(-1, (last - first, size // self.heads, self.heads)).permute(2, 0, 4, 1, 3).unbind(0)

    def output(self, attended: Tensor) -> Tensor:
        """[B, heads, L, Q] to [B, L, D]."""
        return self.wO(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: Config, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm1 = RMSNorm(config.embed_dim)
        self.attention = Attention(config.embed_dim, config.num_heads)
        self.norm2 = RMSNorm(config.embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.embed_dim, 2 * config.mlp_hidden_dim),
            SwiGLU(),
            nn.Linear(config.mlp_hidden_dim, config.embed_dim),
        )

    def across_variates(self, x: Tensor, ids: Tensor) -> Tensor:
        """Attention of each patch over the variates of its own id, both ways; x [B, V, S, D] to the same."""
        shape = x.transpose(1, 2).shape  # [B, S, V, D]
        q, k, v = self.attention.project(x.transpose(1, 2).flatten(0, 1), 0, 3)
        alike = (ids[:, :, None] == ids[:, None, :]).repeat_interleave(shape[1], 0)[:, None]  # [B*S, 1, V, V]
        y = self.attention.output(F.scaled_dot_product_attention(q, k, v, attn_mask=alike))
        return y.view(shape).transpose(1, 2)

    def along_trajectories(
        self,
        normed: Tensor,
        tables: tuple[Tensor, ...],
        pads: Tensor,
        done: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
    ) -> Tensor:
        """Attention of one new patch a trajectory to the shared prefix and to its own patches, in one softmax.

        normed [B, V, N, D] to the same. Keys, values and own as in `Network.extend`; own has room for patches to come,
        which nobody sees yet.
        """
        q, k, v = self.attention.project(normed.flatten(0, 1), 0, 3)  # [B*V, heads, N, Q]
        q = _rotate(q, tables[0], tables[1]) * q.shape[-1] ** -0.5
        own_keys.index_copy_(3, done[None], _rotate(k, tables[2], tables[3])[..., None, :])
        own_values.index_copy_(3, done[None], v[..., None, :])
        shared = q @ keys.transpose(-1, -2)  # [B*V, heads, N, S]
        padded = torch.arange(shared.shape[-1], device=q.device) < pads[:, None]
        padded = padded.repeat_interleave(normed.shape[1], 0)[:, None, None]
        ours = (own_keys @ q[..., None])[..., 0]  # [B*V, heads, N, patches]
        ours = ours.masked_fill(torch.arange(ours.shape[-1], device=q.device) > done, -torch.inf)
        scores = torch.cat((shared.masked_fill(padded, -torch.inf), ours), -1)
        weights = scores.float().softmax(-1).type_as(q)
        split = shared.shape[-1]
        attended = weights[..., :split] @ values + (weights[..., None, split:] @ own_values)[..., 0, :]
        return self.attention.output(attended).view_as(normed)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Toto 1.0's network; the names of its parameters are the published ones (without the prefix `model.`)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        size, k = config.embed_dim, config.components
        self.patch_embed = nn.ModuleDict({"projection": nn.Linear(config.patch_size, size)})
        layers = nn.ModuleList(Layer(config, over_time=over_time) for over_time in config.over_time)
        self.transformer = nn.ModuleDict({"layers": layers})
        self.last_over_time = max((i for i, over_time in enumerate(config.over_time) if over_time), default=-1)
        self.unembed = nn.Linear(size, size * config.patch_size)
        heads = ("df", "loc_proj", "scale_proj", "mixture_weights")
        self.output_distribution = nn.ModuleDict({name: nn.Linear(size, k) for name in heads})

    @property
    def layers(self) -> Iterator[Layer]:
        return iter(self.transformer["layers"])  # type: ignore[arg-type]

    def forward(self, series: Tensor, pads: Tensor, ids: Tensor | None = None) -> tuple[Mixture, Tensor, Tensor]:
        """Every patch's forecast of the patch after it: what training needs, and what the reference computes.

        series: fp32, left-padded with zeros to a multiple of the patch, [B, V, T]. pads: padded points a row, [B].
        ids: variates with equal ids attend to each other, [B, V]; default all.
        Returns the mixtures [B, V, S, P, K] and the affine loc and scale [B, V, S].
        """
        ids = torch.zeros_like(series[..., 0], dtype=torch.long) if ids is None else ids
        statistics = running_statistics(series, pads, self.config)
        loc, scale = statistics.affine()
        x, _, _ = self._trunk(self._embed(series, loc, scale), pads // self.config.patch_size, ids, every_patch=True)
        return self._mixture(x, self.config.patch_size), loc, scale

    def prefill(
        self, series: Tensor, pads: Tensor, ids: Tensor | None = None, *, steps: int, keep: bool = False
    ) -> tuple[Mixture, Tensor, Tensor, Prefix | None]:
        """The forecast after the last patch only; series, pads and ids as in `forward`.

        Skips what cannot reach it: the last layer over time makes one query, the layers after it see one patch, and
        only `steps` (at most P) of the unembedding's rows are used.
        Returns the mixtures [B, V, steps, K], the affine loc and scale [B, V], and with `keep` what decoding needs.
        """
        ids = torch.zeros_like(series[..., 0], dtype=torch.long) if ids is None else ids
        statistics = running_statistics(series, pads, self.config)
        loc, scale = statistics.affine()
        patches = pads // self.config.patch_size
        x, keys, values = self._trunk(self._embed(series, loc, scale), patches, ids, every_patch=False)
        last = statistics.map(lambda tensor: tensor[..., -1])
        prefix = Prefix(keys=keys, values=values, pads=patches, ids=ids, statistics=last) if keep else None
        return self._mixture(x[:, :, -1], steps), loc[..., -1], scale[..., -1], prefix

    def answer(
        self, series: Tensor, pads: Tensor, steps: int, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`prefill` of one variate as plain tensors: all that the host needs in one, and with `keep` the prefix's.

        Returns fp32 [B, 4 * steps * K + 2]: probs, df, loc, scale, affine loc and affine scale; then the prefix's
        keys, its values and its statistics.
        """
        mixture, loc, scale, prefix = self.prefill(series, pads, steps=steps, keep=keep)
        parts = (mixture.probs, mixture.df, mixture.loc, mixture.scale)
        packed = torch.cat((*(part[:, 0].flatten(1) for part in parts), loc, scale), -1)
        if prefix is None:
            return packed, (), (), ()
        return packed, prefix.keys, prefix.values, prefix.statistics.tensors

    def _embed(self, series: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """[B, V, T] to [B, V, S, D]. Padded points of a row's first patch enter as (0 - loc) / scale."""
        patches = series.unflatten(-1, (-1, self.config.patch_size))
        return self._project((patches - loc[..., None]) / scale[..., None])

    def _project(self, scaled: Tensor) -> Tensor:
        projection = self.patch_embed["projection"]
        return projection(scaled.to(self.unembed.weight.dtype))

    def _trunk(
        self, x: Tensor, pads: Tensor, ids: Tensor, *, every_patch: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All layers; x [B, V, S, D], pads in patches [B]. Returns states [B, V, S or 1, D], keys and values."""
        variates, patches = x.shape[1:3]
        positions = (torch.arange(patches, device=x.device) - pads[:, None]).clamp_min(0)  # from each own first patch
        # Queries and keys share one centre here, so it cancels; it matters once decoding adds keys around another.
        tables = _rotation(positions, (patches - pads - 1) // 2, x.shape[-1] // self.config.num_heads)
        tables = tuple(table.repeat_interleave(variates, 0)[:, None] for table in tables)  # [B*V, 1, S, Q]
        # Always a mask: asking whether a row is padded would break a compiled graph and wait for the device.
        mask = _time_mask(pads, patches).repeat_interleave(variates, 0)[:, None]  # [B*V, 1, S, S]
        keys, values = [], []
        if self.last_over_time < 0 and not every_patch:
            x = x[:, :, -1:]
        for i, layer in enumerate(self.layers):
            normed = layer.norm1(x)
            if layer.over_time:
                rows = 1 if i == self.last_over_time and not every_patch else patches
                (q,) = layer.attention.project(normed[:, :, -rows:].flatten(0, 1), 0, 1)
                k, v = layer.attention.project(normed.flatten(0, 1), 1, 3)
                q = _rotate(q, tables[0][:, :, -rows:], tables[1][:, :, -rows:])
                k, v = _rotate(k, tables[2], tables[3]), v.contiguous()
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, -rows:])
                x = x[:, :, -rows:]
                y = layer.attention.output(attended).view_as(x)
                keys.append(k)
                values.append(v)
            else:
                y = layer.across_variates(normed, ids)
            x = layer.finish(x, y)
        return x, tuple(keys), tuple(values)

    def extend(
        self,
        patch: Tensor,  # [B, V, N, P], in price
        uniforms: Tensor | None,  # [B, V, N, steps, 3]
        done: Tensor,  # int64 []: patches that were appended before
        statistics: tuple[Tensor, ...],  # [B, V, N]
        pads: Tensor,  # [B], in patches
        ids: Tensor,  # [B, V]
        prefix: Sequence[Tensor],  # keys, then values of every layer over time, [B*V, heads, S, Q]
        own: Sequence[Tensor],  # the same of appended patches, [B*V, heads, N, patches, Q]; this one's are written
        steps: int,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`Trajectories.advance` as one graph of tensors: the points, float64 [B, V, N, steps], and the statistics."""
        seen = Statistics.of(statistics).extended(patch)
        loc, scale = seen.affine()
        x = self._project((patch.float() - loc[..., None]) / scale[..., None])
        layers = len(prefix) // 2
        position = pads.new_full((), prefix[0].shape[2]) - pads + done if layers else pads
        tables = _rotation(position[:, None], position // 2, self.config.embed_dim // self.config.num_heads)
        tables = tuple(table.repeat_interleave(x.shape[1], 0)[:, None] for table in tables)  # [B*V, 1, 1, Q]
        at = 0
        for layer in self.layers:
            normed = layer.norm1(x)  # [B, V, N, D]
            if layer.over_time:
                caches = (prefix[at], prefix[layers + at], own[at], own[layers + at])
                y = layer.along_trajectories(normed, tables, pads, done, *caches)
                at += 1
            else:
                y = layer.across_variates(normed, ids)
            x = layer.finish(x, y)
        mixture = self._mixture(x, steps)
        scaled = mixture.mean().double() if uniforms is None else drawn(mixture, uniforms)
        return scaled * scale[..., None].double() + loc[..., None].double(), seen.tensors

    def _mixture(self, x: Tensor, steps: int) -> Mixture:
        """States [..., D] to the mixtures of the first `steps` points of the next patch, [..., steps, K]."""
        rows = steps * self.config.embed_dim  # the unembedding's rows run (step, D): the first steps come first
        x = F.linear(x, self.unembed.weight[:rows], self.unembed.bias[:rows]).unflatten(-1, (steps, -1))
        raw = {name: head(x).float() for name, head in self.output_distribution.items()}
        eps = torch.finfo(torch.float32).eps
        return Mixture(
            probs=raw["mixture_weights"].softmax(-1),
            df=2 + F.softplus(raw["df"]).clamp_min(eps),
            loc=raw["loc_proj"],
            scale=F.softplus(raw["scale_proj"]).clamp_min(eps),
        )


class Trajectories:
    """N continuations of each window, a patch at a time, over one shared prefix.

    Follows the reference with its key-value cache, its default: a new patch at position p is rotated around p // 2
    while the context's keys keep the centre of the context (rope.py:93), which differs from a pass without a cache
    by about 1e-3.
    """

    def __init__(
        self, network: Network, prefix: Prefix, count: int, *, patches: int, graphs: Graphs, room: int = 0
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
            tensor[rows][..., None].expand(-1, -1, count).contiguous() for tensor in prefix.statistics.tensors
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


def running_statistics(series: Tensor, pads: Tensor, config: Config) -> Statistics:
    """The statistics of everything up to each patch's last point, [B, V, S], padded points left out.

    Welford's recurrence as cumulative sums in float64; the bounds are of the whole row (scaler.py:148-271).
    """
    x = series.double()
    valid = (torch.arange(x.shape[-1], device=x.device) >= pads[:, None])[:, None].double()  # [B, 1, T]
    count = valid.cumsum(-1)
    mean = (x * valid).cumsum(-1) / count.clamp_min(1)
    before = F.pad(mean[..., :-1], (1, 0))
    m2 = ((x - before) * (x - mean) * valid).cumsum(-1)
    ends = slice(config.patch_size - 1, None, config.patch_size)
    lowest, highest = torch.zeros_like(mean[..., :1]), torch.full_like(mean[..., :1], torch.inf)
    if config.stabilize_with_global:
        whole = (m2[..., -1:] / count[..., -1:].clamp_min(1) + MINIMUM_VARIANCE).sqrt()
        lowest = (whole * 10.0**-config.scale_factor_exponent).clamp_min(MINIMUM_VARIANCE)
        highest = whole * 10.0**config.scale_factor_exponent
    ended = mean[..., ends]
    return Statistics(
        count=count[..., ends].expand_as(ended),
        mean=ended,
        m2=m2[..., ends],
        lowest=lowest.expand_as(ended),
        highest=highest.expand_as(ended),
    )


def _rotation(positions: Tensor, centre: Tensor, size: int) -> tuple[Tensor, ...]:
    """cos and sin tables for queries, then for keys, each [B, S, Q]: RoPE with the xPos scale (rope.py:86-98).

    Angles belong to interleaved pairs, the scale to halves, as published. positions [B, S], centre [B].
    """
    even = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    angles = (positions[..., None].float() * ROPE_BASE ** (-even / size)).repeat_interleave(2, -1)
    power = (positions - centre[:, None]).float() / XPOS_BASE
    scale = (((even + 0.4 * size) / (1.4 * size)) ** power[..., None]).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    return cos * scale, sin * scale, cos / scale, sin / scale


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-second, first), -1).flatten(-2) * sin).type_as(x)  # fp32 tables for any network


def _time_mask(pads: Tensor, patches: int) -> Tensor:
    """Which key each patch may see, [B, S, S]: earlier or itself, and no whole pad patch.

    A pad patch sees itself, so that its softmax is defined; nobody else sees it.
    """
    index = torch.arange(patches, device=pads.device)
    causal = index[:, None] >= index
    return (causal & (index >= pads[:, None, None])) | (index[:, None] == index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The network's answer for W windows: all that sampling needs. Arrays are float64 on the CPU."""

    horizon: int
    probs: np.ndarray  # [W, h, K], h = min(horizon, P)
    df: np.ndarray
    loc: np.ndarray  # scaled units
    scale: np.ndarray
    affine_loc: np.ndarray  # price units, [W]
    affine_scale: np.ndarray
    prefixes: tuple[Prefix, ...]  # of consecutive windows, on the network's device; empty while horizon <= P

    @property
    def nbytes(self) -> int:
        arrays = (self.probs, self.df, self.loc, self.scale, self.affine_loc, self.affine_scale)
        return sum(array.nbytes for array in arrays) + sum(prefix.nbytes for prefix in self.prefixes)


class Toto:
    """A loaded Toto 1.0 checkpoint; see `forecasters.Forecaster`."""

    model = "toto"

    def __init__(self, network: Network, *, fingerprint: str, policy: Policy | None = None, chunk: int = 10) -> None:
        """policy: how to compile; None: not at all. chunk: windows in a compiled forward, fewer are padded."""
        self.network = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.free_draw_horizon = network.config.patch_size
        self.forwards = 0
        identity = f"{network.config} {network.unembed.weight.dtype}"
        self.graphs = Graphs(policy or OFF, device=self.device, identity=identity)
        self._chunk = chunk
        # What is run together, halved where a device runs out of memory and not tried larger again. On a GPU a batch
        # of another size may change the last bits of an answer. A CPU never raises what halves: its bits stay.
        self._batch_tokens = BATCH_TOKENS
        self._windows_together = BLOCK_TOKENS // TRAJECTORIES

    @property
    def device(self) -> torch.device:
        return self.network.unembed.weight.device

    @property
    def compilation(self) -> str:
        return self.graphs.state

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> Encoded:
        """The mixtures of the close's next steps, from its last `context_length` values; one batched forward.

        contexts: W windows of any lengths. params: {"context_length": points}. horizon: steps.
        Raises ForecastError on a context that is empty or not finite, and when one window does not fit the memory.
        """
        if horizon < 1:
            raise ForecastError(f"horizon {horizon}: at least 1 step is needed")
        rows = [_closes(bars, int(params["context_length"])) for bars in contexts]
        if not rows:
            raise ForecastError("no contexts: at least one window is needed")
        patches = -(-max(map(len, rows)) // self.network.config.patch_size)
        parts, start = [], 0
        while start < len(rows):
            most = max(1, self._batch_tokens // patches)
            room = min(most, self._chunk) if self.graphs.on else 0  # windows of a graph's one shape
            batch = rows[start : start + (room or most)]
            try:
                parts.append(self._prefill(batch, horizon, room))
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise out_of_memory(self.device, f"one window of {len(batch[0])} points", error) from error
                self._batch_tokens = -(-len(batch) // 2) * patches
                continue
            start += len(batch)
        # Float64 on the CPU from here on, where a seed gives the same samples on every device.
        packed = np.concatenate([part[0] for part in parts]).astype(np.float64)  # [W, 4 * h * K + 2]
        shape = (len(rows), 4, min(horizon, self.network.config.patch_size), self.network.config.components)
        probs, df, loc, scale = packed[:, :-2].reshape(shape).swapaxes(0, 1).copy()
        return Encoded(
            horizon=horizon,
            probs=probs,
            df=df,
            loc=loc,
            scale=scale,
            affine_loc=packed[:, -2].copy(),
            affine_scale=packed[:, -1].copy(),
            prefixes=tuple(part[1] for part in parts if part[1] is not None),
        )

    def draw(self, encoded: Encoded, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        """Samples of the close, float64 [W, N, H].

        params: {"num_samples": N}. seeds: one a window, below 2**64. No network call while the horizon is within
        the first patch. Raises ForecastError where a sample is no number, or beyond half the range of fp32.
        """
        count, steps = int(params["num_samples"]), encoded.horizon
        if count < 1:
            raise ForecastError(f"num_samples {count}: at least 1 is needed")
        if len(seeds) != len(encoded.probs):
            raise ForecastError(f"{len(seeds)} seeds for {len(encoded.probs)} windows")
        samples = np.empty((len(seeds), count, steps))
        if encoded.prefixes:

            def fill(start: int, stop: int, prefix: Prefix) -> None:
                self._draw_long(encoded, prefix, start, seeds[start:stop], samples[start:stop])

            self._in_groups(encoded, TRAJECTORIES, fill)
        else:
            together = max(1, DRAW_BYTES // (count * steps * (24 + encoded.probs.shape[-1])))
            for start in range(0, len(seeds), together):
                rows = slice(start, start + together)
                uniforms = np.stack([stream(seed).random((count, steps, 3)) for seed in seeds[rows]])
                samples[rows] = _first_patch(encoded, rows, uniforms)
        return _finite(samples)

    def exact(self, encoded: Encoded, params: Mapping[str, Any], seeds: Sequence[int]) -> StudentMixture:
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
        return StudentMixture(
            probs=encoded.probs,
            df=encoded.df,
            loc=encoded.loc * affine_scale + affine_loc,
            scale=encoded.scale * affine_scale,
        )

    def mean(self, encoded: Encoded) -> np.ndarray:
        """The mixtures' means, float64 [W, H]; past the first patch each patch's mean is fed back as if observed.

        What the reference answers for num_samples=None.
        """
        first = (encoded.probs * encoded.loc).sum(-1) * encoded.affine_scale[:, None] + encoded.affine_loc[:, None]
        if not encoded.prefixes:
            return _finite(first)
        points = np.empty((len(first), encoded.horizon))

        def fill(start: int, stop: int, prefix: Prefix) -> None:
            points[start:stop] = self._decode(prefix, first[start:stop, None], encoded.horizon, None)[:, 0]

        self._in_groups(encoded, 1, fill)
        return _finite(points)

    @torch.inference_mode()
    def _prefill(self, rows: Sequence[np.ndarray], horizon: int, room: int) -> tuple[np.ndarray, Prefix | None]:
        """The numbers of `Encoded` for these rows, [W, 4 * h * K + 2], and the prefix past the first patch.

        room: windows that the forward has, the last row again in those left over; 0: as many as there are.
        """
        patch = self.network.config.patch_size
        patches = -(-max(map(len, rows)) // patch)
        length = (fixed_length(patches) if room else patches) * patch
        series = np.zeros((max(room, len(rows)), 1, length), np.float32)  # the reference's dtype at this border too
        pads = np.full(len(series), length)
        for i in range(len(series)):
            row = rows[min(i, len(rows) - 1)]
            series[i, 0, length - len(row) :] = row
            pads[i] -= len(row)
        padding = torch.from_numpy(pads).to(self.device)
        self.forwards += 1
        steps, keep = min(horizon, patch), horizon > patch
        arguments = (torch.from_numpy(series).to(self.device), padding, steps, keep)
        packed, keys, values, statistics = self.graphs.run(
            self.network.answer, (*series.shape, steps, keep), *arguments
        )
        prefix = None
        if keep:
            ids = torch.zeros(len(series), 1, dtype=torch.long, device=self.device)
            whole = Prefix(
                keys=keys, values=values, pads=padding // patch, ids=ids, statistics=Statistics.of(statistics)
            )
            prefix = whole.rows(0, len(rows))
        return packed[: len(rows)].cpu().numpy(), prefix

    def _in_groups(self, encoded: Encoded, trajectories: int, decode: Callable[[int, int, Prefix], None]) -> None:
        """Call decode(first window, last + 1, their prefix) for windows to decode together, until all are.

        Bounded by tokens, and the same for every number of samples. trajectories: of a window at a time.
        """
        start = 0
        for prefix in encoded.prefixes:
            row = 0
            while row < len(prefix.pads):
                part = prefix.rows(row, min(row + self._windows_together, len(prefix.pads)))
                count = len(part.pads)
                try:
                    decode(start, start + count, part)
                except torch.OutOfMemoryError as error:
                    self.graphs.release()
                    if count == 1:
                        what = f"{trajectories} trajectories of one window, {encoded.horizon} steps"
                        raise out_of_memory(self.device, what, error) from error
                    self._windows_together = -(-count // 2)
                    continue
                row, start = row + count, start + count

    def _draw_long(
        self, encoded: Encoded, prefix: Prefix, start: int, seeds: Sequence[int], samples: np.ndarray
    ) -> None:
        """Fill samples [W, N, H] of the group's windows, which begin at `start` in encoded, block by block."""
        rows, patch = slice(start, start + len(seeds)), self.network.config.patch_size
        streams = [stream(seed) for seed in seeds]
        for first in range(0, samples.shape[1], TRAJECTORIES):
            uniforms = np.stack([stream.random((TRAJECTORIES, encoded.horizon, 3)) for stream in streams])
            begun = _first_patch(encoded, rows, uniforms[:, :, :patch])
            block = self._decode(prefix, begun, encoded.horizon, uniforms)
            samples[:, first : first + TRAJECTORIES] = block[:, : samples.shape[1] - first]

    @torch.inference_mode()
    def _decode(self, prefix: Prefix, begun: np.ndarray, horizon: int, uniforms: np.ndarray | None) -> np.ndarray:
        """Continue the first patch begun [W, N, P] to [W, N, H], one transfer to the host for all of it.

        uniforms: [W, N, H, 3], of which the first P steps are spent; None: the mixtures' means are fed back.
        """
        patch, windows = self.network.config.patch_size, len(begun)
        room = min(self._windows_together, self._chunk) if self.graphs.on else windows  # a chunk's prefix at a time
        patches = (horizon - 1) // patch
        trajectories = Trajectories(
            self.network, prefix, begun.shape[1], patches=patches, graphs=self.graphs, room=room
        )
        again = np.minimum(np.arange(room), windows - 1)
        latest, parts, draws = self._to_device(begun[again]), [], None
        if uniforms is not None:  # a graph draws whole patches; what is past the horizon is cut off
            spare = np.zeros((windows, begun.shape[1], (patches + 1) * patch - horizon, 3))
            draws = self._to_device(np.concatenate((uniforms, spare), 2)[again])
        for done in range(patch, horizon, patch):
            steps = patch if self.graphs.on else min(patch, horizon - done)
            now = None if draws is None else draws[:, None, :, done : done + steps].contiguous()
            self.forwards += 1
            # fp32, as the reference feeds its samples back
            latest = trajectories.advance(latest[:, None].float(), steps, now)[:, 0]
            parts.append(latest)
        rest = torch.cat(parts, -1)[:windows, :, : horizon - patch]
        return np.concatenate((begun, rest.cpu().numpy()), -1)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def fixed_length(patches: int) -> int:
    """The length, in patches, that so many are padded to: two a power of 2, so that few graphs serve all contexts."""
    power = 1 << (patches - 1).bit_length()  # the least power of 2 that holds them
    return patches if patches < 3 else power * 3 // 4 if patches <= power * 3 // 4 else power


def _first_patch(encoded: Encoded, rows: slice, uniforms: np.ndarray) -> np.ndarray:
    """Prices drawn within the first patch, [W, N, h], for uniforms [W, N, h, 3]."""
    probs, df = encoded.probs[rows, None], encoded.df[rows, None]
    scaled = mixture_samples(probs, df, encoded.loc[rows, None], encoded.scale[rows, None], uniforms)
    return scaled * encoded.affine_scale[rows, None, None] + encoded.affine_loc[rows, None, None]


def _closes(bars: Bars, length: int) -> np.ndarray:
    closes = bars.close[-length:] if length > 0 else bars.close[:0]
    if not len(closes):
        raise ForecastError(f"a context of {len(bars)} bars with context_length {length}: no close is left")
    if not np.isfinite(closes).all():
        raise ForecastError(f"the close of {bars.timestamps[-1]} or before it is not a finite number")
    return closes


def _finite(prices: np.ndarray) -> np.ndarray:
    """The reference writes 0 over NaN, infinities and |price| >= fp32 max / 2; a made-up price is worse than none."""
    if not (np.abs(prices) < np.finfo(np.float32).max / 2).all():
        raise ForecastError("the network's samples are not finite numbers; check the prices and the checkpoint")
    return prices


def read_config(checkpoint: Checkpoint) -> Config:
    """The checkpoint's config.json. Raises CheckpointError on a key or a value that this network does not have."""
    optional = [field.name for field in fields(Config) if field.default is not MISSING]
    required = [field.name for field in fields(Config) if field.default is MISSING]
    entries = checkpoint.config(required, (*optional, *_LOADER_KEYS))
    path = checkpoint.folder / CONFIG

    def need(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {key} is {entries[key]!r}, expected {expected}")

    for key in ("patch_size", "stride", "embed_dim", "num_layers", "num_heads", "mlp_hidden_dim"):
        need(key, type(entries[key]) is int and entries[key] > 0, "a positive whole number")
    kwargs, every = entries["output_distribution_kwargs"], entries["spacewise_every_n_layers"]
    components = kwargs.get("k_components") if isinstance(kwargs, dict) and len(kwargs) == 1 else None
    need("output_distribution_kwargs", type(components) is int and components > 0, '{"k_components": a whole number}')
    need("scaler_cls", entries["scaler_cls"] == _SCALER, _SCALER)
    need("output_distribution_classes", entries["output_distribution_classes"] == [_MIXTURE], f"[{_MIXTURE}]")
    need("stride", entries["stride"] == entries["patch_size"], "patch_size")
    need("embed_dim", entries["embed_dim"] % (2 * entries["num_heads"]) == 0, "an even multiple of num_heads")
    divides = type(every) is int and (every == -1 or (every > 0 and entries["num_layers"] % every == 0))
    need("spacewise_every_n_layers", divides, "-1 or a divisor of num_layers")
    return Config(**{key: value for key, value in entries.items() if key not in _LOADER_KEYS})


def _rename(stored: str) -> str | None:
    """A published tensor name to ours; None for the rotation's frequencies, which are computed."""
    if stored.endswith("rotary_emb.freqs"):
        return None
    name = stored.removeprefix("model.")
    return name.replace(".mlp.0.w12.", ".mlp.0.").replace(".mlp.0.w3.", ".mlp.2.")  # saved with a fused SwiGLU


def check(checkpoint: Checkpoint) -> Config:
    """Refuse a checkpoint that does not fit the network, without reading its weights. Raises CheckpointError."""
    config = read_config(checkpoint)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Network(config).state_dict().items()}
    check_shapes(checkpoint, shapes, _rename)
    return config


def load(checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT) -> Toto:
    """Load a checkpoint (`checkpoints.resolve`) onto a device. Raises CheckpointError and SettingError."""
    policy = decide(
        "toto",
        device=device,
        mode=running.compile_mode,
        backend=running.compile_backend,
        folder=running.compile_dir,
    )
    found = resolve(checkpoint, revision=revision)
    with torch.device("meta"):
        network = Network(read_config(found))
    load_into(found, network, _rename)
    network = network.to(device=device, dtype=getattr(torch, running.dtype))
    return Toto(network, fingerprint=_fingerprint(found, running.dtype), policy=policy, chunk=running.chunk)


def inspect(checkpoint: str, *, revision: str | None = None, running: Running = BY_DEFAULT) -> str:
    """The fingerprint that `load` would give its forecaster, without reading the weights into a network.

    Raises CheckpointError where the checkpoint does not fit.
    """
    found = resolve(checkpoint, revision=revision)
    check(found)
    return _fingerprint(found, running.dtype)


def _fingerprint(found: Checkpoint, dtype: str) -> str:
    return hashlib.sha256(f"toto {found.digest} {dtype}".encode()).hexdigest()
