"""Toto 1.0's network, which published checkpoints load into, over a whole context and a patch at a time after it.

Owns the modules, under the key names of the published checkpoints, the causal patch scaling, and the attention of new
patches to a prefix that all trajectories share. Knows nothing of bars, windows, seeds, files or how it is compiled.

"The reference" is github.com/DataDog/toto at 46bd92a. Dimensions: B windows, V variates, T points, S patches, P points
a patch, D embed_dim, Q points of a head, N trajectories, h steps of a patch, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forecasters.low_precision import part
from forecasters.toto_model import MINIMUM_VARIANCE
from forecasters.toto_sampling import Mixture, drawn
from forecasters.toto_sizes import HEADS, TotoNetworkConfig

NORM_EPS = 1e-8  # inside the root (util.py:42)
ROPE_BASE = 10_000.0
XPOS_BASE = 512.0
VECTOR = 64  # numbers that a CPU's vectors divide, two of 16 at a time


class Statistics(NamedTuple):
    """Running number, mean and sum of squared deviations of points seen, float64; and the bounds of the scale."""

    points: Tensor
    mean: Tensor
    m2: Tensor
    lowest: Tensor
    highest: Tensor

    def affine(self) -> tuple[Tensor, Tensor]:
        """loc and scale, rounded to fp32 before use as in the reference (scaler.py:254-259)."""
        variance = self.m2 / (self.points - 1).clamp_min(1)
        scale = (variance + MINIMUM_VARIANCE).sqrt().clamp(self.lowest, self.highest)
        return self.mean.float(), scale.float()

    def extended(self, patch: Tensor) -> Statistics:
        """With the points of patch [..., P] seen too (Chan, Golub & LeVeque 1983)."""
        patch = patch.double()
        size, mean = patch.shape[-1], patch.mean(-1)
        m2 = (patch - mean[..., None]).square().sum(-1)
        count, delta = self.points + size, mean - self.mean
        return self._replace(
            points=count,
            mean=self.mean + delta * (size / count),
            m2=self.m2 + m2 + delta.square() * (self.points * size / count),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Statistics:
        return Statistics(*map(change, self))


@dataclass(frozen=True, kw_only=True, eq=False)
class TotoPrefix:
    """What the context leaves for decoding: shared by every trajectory of a window, never copied for one."""

    keys: tuple[Tensor, ...]  # a layer over time: [B*V, heads, S, Q], rotated
    values: tuple[Tensor, ...]
    pads: Tensor  # whole pad patches before the first real one, [B]
    ids: Tensor  # [B, V]
    statistics: Statistics  # [B, V]

    @property
    def nbytes(self) -> int:
        tensors = (*self.keys, *self.values, self.pads, self.ids, *self.statistics)
        return sum(tensor.nbytes for tensor in tensors)

    def rows(self, start: int, stop: int) -> TotoPrefix:
        """Of the windows [start, stop), as views."""
        variates = self.ids.shape[1]
        return TotoPrefix(
            keys=tuple(tensor[start * variates : stop * variates] for tensor in self.keys),
            values=tuple(tensor[start * variates : stop * variates] for tensor in self.values),
            pads=self.pads[start:stop],
            ids=self.ids[start:stop],
            statistics=self.statistics.map(lambda tensor: tensor[start:stop]),
        )


FEW = 16  # rows of a product


class TotoNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return F.silu(gate) * value
        # In place, here and below: new pages take a tenth of the time on a CPU. Contiguous, or the product copies it.
        return F.silu(gate).mul_(value)


class TotoAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.wQKV = nn.Linear(size, 3 * size)
        self.wO = nn.Linear(size, size)
        self.heads = heads

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Of query 0, key 1 and value 2 the ones [first, last); x [B, L, D], each result [B, heads, L, Q]."""
        size = x.shape[-1]
        rows = slice(first * size, last * size)
        y = part(self.wQKV, x, rows)
        # The published rows run (qkv, Q, heads), heads fastest; the result is (heads, Q) (attention.py:94, 136).
        y = y.unflatten(-1, (last - first, size // self.heads, self.heads)).permute(2, 0, 4, 1, 3)
        return y.contiguous().unbind(0)  # one copy: rotations and products of memory in order are much faster

    def output(self, attended: Tensor) -> Tensor:
        """[B, heads, L, Q] to [B, L, D]."""
        return self.wO(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: TotoNetworkConfig, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.norm1 = TotoNorm(config.embed_dim)
        self.attention = TotoAttention(config.embed_dim, config.num_heads)
        self.norm2 = TotoNorm(config.embed_dim)
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

        normed [B, V, N, D] to the same. Keys, values and own as in `TotoNetwork.extend`; own has room for patches to
        come, which nobody sees yet.
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
        if torch.is_grad_enabled():
            x = x + attended
            return x + self.mlp(self.norm2(x))
        x = attended.add_(x)
        return self.mlp(self.norm2(x)).add_(x)


class TotoNetwork(nn.Module):
    """Toto 1.0's network; the names of its parameters are the published ones (without the prefix `model.`)."""

    def __init__(self, config: TotoNetworkConfig) -> None:
        super().__init__()
        self.config = config
        size, k = config.embed_dim, config.components
        self.patch_embed = nn.ModuleDict({"projection": nn.Linear(config.patch_size, size)})
        layers = nn.ModuleList(Layer(config, over_time=over_time) for over_time in config.over_time)
        self.transformer = nn.ModuleDict({"layers": layers})
        self.last_over_time = max((i for i, over_time in enumerate(config.over_time) if over_time), default=-1)
        self.unembed = nn.Linear(size, size * config.patch_size)
        self.output_distribution = nn.ModuleDict({name: nn.Linear(size, k) for name in HEADS})

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
    ) -> tuple[Mixture, Tensor, Tensor, TotoPrefix | None]:
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
        prefix = TotoPrefix(keys=keys, values=values, pads=patches, ids=ids, statistics=last) if keep else None
        mixture = self._mixture(x[:, :, -1], steps).rows(len(series))
        return mixture, loc[..., -1], scale[..., -1], prefix

    def answer(
        self, series: Tensor, pads: Tensor, steps: int, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`prefill` as plain tensors: all that the host needs in one, and with `keep` the prefix's.

        Returns fp32 [B, V, 4 * steps * K + 2]: probs, df, loc, scale, affine loc and affine scale; then the prefix's
        keys, its values and its statistics.
        """
        mixture, loc, scale, prefix = self.prefill(series, pads, steps=steps, keep=keep)
        parts = (mixture.probs, mixture.df, mixture.loc, mixture.scale)
        packed = torch.cat((*(part.flatten(2) for part in parts), loc[..., None], scale[..., None]), -1)
        if prefix is None:
            return packed, (), (), ()
        return packed, prefix.keys, prefix.values, tuple(prefix.statistics)

    def answers_along(self, series: Tensor, pads: Tensor, rows: Tensor, patches: Tensor, steps: int) -> Tensor:
        """`answer` for one variate as if its row ended with this patch, for n of them in one forward.

        No patch sees a later one. rows and patches: int64 [n]. Returns fp32 [n, 4 * steps * K + 2].
        """
        ids = torch.zeros_like(series[..., 0], dtype=torch.long)
        loc, scale = running_statistics(series, pads, self.config, whole=False).affine()
        whole_pads = pads // self.config.patch_size
        x, _, _ = self._trunk(self._embed(series, loc, scale), whole_pads, ids, every_patch=True)
        mixture = self._mixture(x[rows, 0, patches], steps)
        parts = (mixture.probs, mixture.df, mixture.loc, mixture.scale)
        affine = torch.stack((loc[rows, 0, patches], scale[rows, 0, patches]), -1)
        return torch.cat((*(part.flatten(1) for part in parts), affine), -1)

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
        """All layers; x [B, V, S, D], pads in patches [B]. Returns states [B, V, S or 1, D], keys and values.

        Of one patch there are states of the last window again, up to FEW rows: with fewer in a product MKL computes
        other last bits, and a window is to have the same ones whatever else is in its forward.
        """
        windows, variates, patches = x.shape[:3]
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
            if i == self.last_over_time and not every_patch and windows * variates < FEW and x.device.type == "cpu":
                again = torch.arange(-(-FEW // variates)).clamp_max(windows - 1)
                each = (again[:, None] * variates + torch.arange(variates)).flatten()  # with variates
                x, ids, mask = x[again], ids[again], mask[each]
                tables = tuple(table[each] for table in tables)
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
                keys.append(k[: windows * variates])
                values.append(v[: windows * variates])
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
        seen = Statistics(*statistics).extended(patch)
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
        return scaled * scale[..., None].double() + loc[..., None].double(), tuple(seen)

    def _mixture(self, x: Tensor, steps: int) -> Mixture:
        """States [..., D] to the mixtures of the first `steps` points of the next patch, [..., steps, K]."""
        rows = steps * self.config.embed_dim  # the unembedding's rows run (step, D): the first steps come first
        x = F.linear(x, self.unembed.weight[:rows], self.unembed.bias[:rows]).unflatten(-1, (steps, -1))
        raw = {name: head(x).float() for name, head in self.output_distribution.items()}
        eps = torch.finfo(torch.float32).eps
        return Mixture(
            probs=raw["mixture_weights"].softmax(-1),
            df=2 + _softplus(raw["df"]).clamp_min(eps),
            loc=raw["loc_proj"],
            scale=_softplus(raw["scale_proj"]).clamp_min(eps),
        )


def _softplus(x: Tensor) -> Tensor:
    """F.softplus in whole vectors: torch computes the rest otherwise, by which a row's bits depended on its place."""
    return F.softplus(F.pad(x.flatten(), (0, -x.numel() % VECTOR)))[: x.numel()].view_as(x)


def running_statistics(series: Tensor, pads: Tensor, config: TotoNetworkConfig, *, whole: bool = True) -> Statistics:
    """The statistics of everything up to each patch's last point, [B, V, S], padded points left out.

    Welford's recurrence as cumulative sums in float64; the bounds are of the whole row (scaler.py:148-271), or of the
    points up to each patch's last, which differs only where some scale is 10**10 times another.
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
        last = slice(-1, None) if whole else ends
        spread = (m2[..., last] / count[..., last].clamp_min(1) + MINIMUM_VARIANCE).sqrt()
        lowest = (spread * 10.0**-config.scale_factor_exponent).clamp_min(MINIMUM_VARIANCE)
        highest = spread * 10.0**config.scale_factor_exponent
    ended = mean[..., ends]
    return Statistics(
        points=count[..., ends].expand_as(ended),
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
    turned = x * cos
    turned += torch.stack((-second, first), -1).flatten(-2).mul(sin)
    return turned.type_as(x)  # fp32 tables for any network


def _time_mask(pads: Tensor, patches: int) -> Tensor:
    """Which key each patch may see, [B, S, S]: earlier or itself, and no whole pad patch.

    A pad patch sees itself, so that its softmax is defined; nobody else sees it.
    """
    index = torch.arange(patches, device=pads.device)
    causal = index[:, None] >= index
    return (causal & (index >= pads[:, None, None])) | (index[:, None] == index)
