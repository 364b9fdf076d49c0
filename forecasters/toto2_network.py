"""Toto 2.0's network, which published checkpoints load into: one pass over contexts and the patches that follow them.

Owns the modules, under the key names of the published checkpoints, the causal scaling of each series, and the folding
of the fixed multipliers that the network was trained with (u-muP) into its weights. Knows nothing of bars, windows,
files or transforms.

Patches after the origin enter as missing values, so one pass answers a horizon of any length, and what stands behind a
context of a batch is what its future is: contexts of several lengths need no mask. "The reference" is the port in
autogluon-timeseries 1.6.3. Dimensions: N groups, G series a group, R = N * G rows, C patches of P points before the
origin (of the longest context), O after it, S = C + O - 1 tokens, D d_model, Q levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = tuple(step / 10 for step in range(1, 10))  # of the quantiles that every published checkpoint answers
FLOOR = 1e-6  # of a scale, in the units of the series
MOST_SCALES = 1e4  # that a quantile may be beyond what the context has seen
ROTATION_BASE = 10_000.0
DECAY_POSITIONS = 256  # tokens in which xPos lets a pair of dimensions decay by its share
# What the network was trained with multiplies SiLU by; see appendix F of arXiv 2407.17465.
SILU_GAIN = 2**0.2 * (2 / (1 - 1 / math.pi)) ** 0.4
HALVES = 0.5**0.5  # the shares of both parts of a sum that neither has more of


Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles of tokens and pairs of dimensions


@dataclass(frozen=True, kw_only=True)
class Toto2NetworkConfig:
    """What the published config.json says of the network's sizes."""

    patch_size: int  # points, before and after the origin
    d_model: int
    d_ff: int
    num_heads: int
    num_layers: int
    layer_group_size: int  # layers, of which the last ones attend over the series of a group
    num_variate_layers_per_group: int
    qk_dim: int  # of a head
    v_dim: int
    norm_eps: float

    def over_group(self, layer: int) -> bool:
        """Whether a layer attends over the series of a group, else over time."""
        return layer % self.layer_group_size >= self.layer_group_size - self.num_variate_layers_per_group


class ResidualMLP(nn.Module):
    """An MLP beside a linear map."""

    def __init__(self, inner: int, hidden: int, outer: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inner, hidden)
        self.linear2 = nn.Linear(hidden, outer)
        self.skip_proj = nn.Linear(inner, outer)

    def fold(self, power: float) -> None:
        """power: of the number of inputs, by which what goes out is divided."""
        inner, hidden = self.linear1.in_features, self.linear2.in_features
        _multiply(self.linear1, inner**-0.5)
        _multiply(self.linear2, hidden**-power * HALVES)
        _multiply(self.skip_proj, inner**-power * HALVES)
        self.linear2.weight.mul_(SILU_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x), inplace=True)).add_(self.skip_proj(x))


class DimensionScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.per_dim_scale = nn.Parameter(torch.zeros(size))


class Attention(nn.Module):
    def __init__(self, config: Toto2NetworkConfig) -> None:
        super().__init__()
        self.heads, self.qk_dim = config.num_heads, config.qk_dim
        self.sizes = [self.heads * config.qk_dim, self.heads * config.qk_dim, self.heads * config.v_dim]
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes))
        self.out_proj = nn.Linear(self.sizes[-1], config.d_model)
        self._pds = DimensionScale(config.qk_dim)

    def fold(self, share: float, *, rotates: bool) -> None:
        """share: that the attention has of the sum with what it attends for. rotates: it attends over time."""
        _multiply(self.in_proj, self.in_proj.in_features**-0.5)
        _multiply(self.out_proj, self.out_proj.in_features**-0.5 * share)
        queries = F.softplus(self._pds.per_dim_scale) / math.log(2) / self.qk_dim  # the scores' own divisor too
        self.in_proj.weight[: self.sizes[0]] *= queries.repeat(self.heads)[:, None]
        self.in_proj.bias[: self.sizes[0]] *= queries.repeat(self.heads)
        if rotates:  # neighbours that are turned together come to stand at one place of two halves, each in one piece
            places = torch.arange(2 * self.heads * self.qk_dim).view(2 * self.heads, self.qk_dim)
            turned, rest = places.split(self.qk_dim // 2, -1)
            order = torch.cat((turned[:, ::2], turned[:, 1::2], rest), -1).flatten()
            self.in_proj.weight[: len(order)] = self.in_proj.weight[order]
            self.in_proj.bias[: len(order)] = self.in_proj.bias[order]

    def forward(
        self, asking: Tensor, seen: Tensor, rotations: tuple[Rotation, Rotation] | None = None, **attending: Any
    ) -> Tensor:
        """What [B, A, D] learn from seen [B, S, D], which may be the same.

        rotations: of the asking and of the seen. attending: as torch's attention has it, what may be seen.
        """
        weight, bias, first = self.in_proj.weight, self.in_proj.bias, self.sizes[0]
        if asking is seen:
            q, k, v = F.linear(seen, weight, bias).split(self.sizes, -1)
        else:
            q = F.linear(asking, weight[:first], bias[:first])
            k, v = F.linear(seen, weight[first:], bias[first:]).split(self.sizes[1:], -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if rotations is not None:
            q, k = rotated(q, rotations[0]), rotated(k, rotations[1])
        learnt = F.scaled_dot_product_attention(q, k, v, scale=1.0, **attending)
        return self.out_proj(learnt.transpose(1, 2).flatten(2))


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, h, A, d], of which the first half of the dimensions is turned."""
    cos, sin = rotation
    pairs = cos.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


class FeedForward(nn.Module):
    def __init__(self, config: Toto2NetworkConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.fc2 = nn.Linear(config.d_ff, config.d_model, bias=False)

    def fold(self, share: float) -> None:
        _multiply(self.fc1, self.fc1.in_features**-0.5)
        _multiply(self.fc2, self.fc2.in_features**-0.5 * share)

    def forward(self, x: Tensor) -> Tensor:
        gate, gated = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gated).mul_(gate))


class Layer(nn.Module):
    attn_tau: Tensor  # of a residual sum: what is added, as a multiple of what it is added to
    mlp_tau: Tensor
    alone_weight: Tensor  # what a series that attends to itself only learns of itself
    alone_bias: Tensor
    kept: tuple[float, float]  # of the stream, beside the attention and beside the MLP

    def __init__(self, config: Toto2NetworkConfig, index: int) -> None:
        super().__init__()
        self.over_group, self.epsilon = config.over_group(index), config.norm_eps
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        for name in ("attn_tau", "mlp_tau"):
            self.register_buffer(name, torch.ones(()))
        for name in ("alone_weight", "alone_bias"):
            self.register_buffer(name, None, persistent=False)

    def fold(self) -> None:
        taus = (self.attn_tau.item(), self.mlp_tau.item())
        self.kept = (1 / math.hypot(1, taus[0]), 1 / math.hypot(1, taus[1]))
        self.attn.fold(taus[0] * self.kept[0], rotates=not self.over_group)
        self.ffn.fold(taus[1] * self.kept[1])
        if self.over_group:
            given, values = self.attn.in_proj, slice(sum(self.attn.sizes[:2]), None)
            self.alone_weight = self.attn.out_proj.weight @ given.weight[values]
            self.alone_bias = self.attn.out_proj(given.bias[values])

    def forward(
        self, x: Tensor, size: int, rotations: tuple[Rotation, Rotation], asked: Tensor | None = None
    ) -> Tensor:
        """x [R, A, D] after this layer; of a layer over time only the tokens that are asked for, [R, O], if any are.

        size: series a group. rotations: of the tokens, as asking and as seen.
        """
        seen = _normed(x, self.epsilon)
        if self.over_group:
            learnt = self._over_group(seen, size)
        elif asked is None:
            learnt = self.attn(seen, seen, rotations, is_causal=True)
        else:
            x = _taken(x, asked)
            there = torch.arange(seen.shape[1], device=x.device) <= asked[:, None, :, None]  # [R, 1, O, S]
            turned = (rotations[0][0][asked][:, None], rotations[0][1][asked][:, None])  # [R, 1, O, d / 4]
            learnt = self.attn(_taken(seen, asked), seen, (turned, rotations[1]), attn_mask=there)
        x = learnt.add_(x, alpha=self.kept[0])
        return self.ffn(_normed(x, self.epsilon)).add_(x, alpha=self.kept[1])

    def _over_group(self, x: Tensor, size: int) -> Tensor:
        if size == 1:
            return F.linear(x, self.alone_weight, self.alone_bias)
        together = x.unflatten(0, (-1, size)).transpose(1, 2)  # [N, A, G, D]
        tokens = together.flatten(0, 1)
        return self.attn(tokens, tokens).view_as(together).transpose(1, 2).flatten(0, 1)


class Transformer(nn.Module):
    def __init__(self, config: Toto2NetworkConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_layers)])


class ParamProjection(nn.Module):
    def __init__(self, config: Toto2NetworkConfig) -> None:
        super().__init__()
        self.proj = ResidualMLP(config.d_model, 4 * config.d_model, config.patch_size * len(LEVELS))


class Toto2Network(nn.Module):
    """Reads weights as they are published; `fold` comes before the first answer, and before another dtype."""

    def __init__(self, config: Toto2NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_proj = ResidualMLP(2 * config.patch_size, 4 * config.d_model, config.d_model)
        self.transformer = Transformer(config)
        self.output_head = nn.ModuleDict({"param_projection": ParamProjection(config)})
        over_time = [layer for layer in range(config.num_layers) if not config.over_group(layer)]
        self.last_over_time = over_time[-1]  # beyond it a token depends on no other

    @torch.no_grad()
    def fold(self) -> Toto2Network:
        """Multiply the weights by all that the reference multiplies their answers by: in place, and only once."""
        self.patch_proj.fold(0.5)
        for layer in self.transformer.layers:
            cast(Layer, layer).fold()
        self.head.fold(1.0)
        return self

    @property
    def head(self) -> ResidualMLP:
        return cast(ParamProjection, self.output_head["param_projection"]).proj

    @property
    def device(self) -> torch.device:
        return self.patch_proj.skip_proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_proj.skip_proj.weight.dtype

    def answer(self, series: Tensor, ends: Tensor, ahead: int) -> Tensor:
        """The quantiles after these series, as the head answers them: they may cross.

        series: float32 [N, G, C * P], without holes; a group attends to itself only. ends: int64 [N], how many of its
        patches a group has; what stands behind them is not looked at. ahead: patches to answer.
        Returns float32 [N, G, Q, ahead * P] in the units of the series.
        """
        (_, size), patch = series.shape[:2], self.config.patch_size
        rows, ends = series.flatten(0, 1), ends.repeat_interleave(size)  # [R, T], [R]
        loc, scale = causal_statistics(rows, patch)  # [R, C]
        patches = rows.unflatten(-1, (-1, patch))
        scaled = ((patches - loc[..., None]) / scale[..., None]).asinh().to(self.dtype)
        tokens = self.patch_proj(torch.cat((scaled, torch.zeros_like(scaled)), -1))
        nothing = self.patch_proj(torch.cat((tokens.new_zeros(patch), tokens.new_ones(patch))))
        there = torch.arange(patches.shape[1], device=rows.device) < ends[:, None]  # [R, C]
        x = torch.where(there[..., None], tokens, nothing)
        x = torch.cat((x, nothing.expand(len(x), ahead - 1, -1)), 1)
        asked = ends[:, None] - 1 + torch.arange(ahead, device=rows.device)  # each says what comes after it
        answers = self.head(self._hidden(x, size, asked)).float()
        scaled = answers.unflatten(-1, (patch, -1)).permute(0, 3, 1, 2).flatten(2)  # [R, Q, ahead * P]
        latest = ends[:, None] - 1
        loc, scale = (each.gather(1, latest)[..., None] for each in (loc, scale))
        # The reference bounds them too: a hyperbolic sine of what is out of the ordinary has no bounds.
        away, behind = MOST_SCALES * scale, ~there[..., None]
        low = patches.masked_fill(behind, torch.inf).amin((1, 2))[:, None, None] - away
        high = patches.masked_fill(behind, -torch.inf).amax((1, 2))[:, None, None] + away
        return (torch.sinh(scaled) * scale + loc).clamp(low, high).unflatten(0, (-1, size))

    def _hidden(self, x: Tensor, size: int, asked: Tensor) -> Tensor:
        """What the layers say of the tokens that are asked for, [R, ahead, D]; in the last ones only these are."""
        rotations = self._rotations(x)
        for place, layer in enumerate(self.transformer.layers):
            x = layer(x, size, rotations, asked if place == self.last_over_time else None)
        return _normed(x, self.config.norm_eps)

    def _rotations(self, x: Tensor) -> tuple[Rotation, Rotation]:
        """Of each token as one that asks and one that is seen, [S, d / 4] each: turned, and grown or shrunk by xPos.

        The products of both depend on how far the tokens are from each other alone.
        """
        turned = self.config.qk_dim // 2
        pairs = torch.arange(0, turned, 2, device=x.device, dtype=torch.float32)
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, ROTATION_BASE ** -(pairs / turned))
        decay = (pairs + 0.4 * turned) / (1.4 * turned)
        grown = decay ** ((positions - x.shape[1] // 2) / DECAY_POSITIONS)[:, None]
        asking, seen = (((angles.cos() * by).to(x.dtype), (angles.sin() * by).to(x.dtype)) for by in (grown, 1 / grown))
        return asking, seen


def causal_statistics(rows: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The mean and the sample deviation of rows [R, T] up to the end of each patch, float32 [R, C]."""
    wide = rows.double()
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    mean = wide.cumsum(-1) / count
    before = F.pad(mean[:, :-1], (1, 0))
    squares = ((wide - before) * (wide - mean)).cumsum(-1)
    ends = slice(patch - 1, None, patch)
    variance = squares[:, ends] / (count[ends] - 1)
    return mean[:, ends].float(), variance.clamp_min(0).sqrt().clamp_min(FLOOR).float()


def _multiply(layer: nn.Linear, factor: float) -> None:
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)


def _taken(x: Tensor, asked: Tensor) -> Tensor:
    """Of tokens [R, S, D] these [R, O]."""
    return x.gather(1, asked[..., None].expand(-1, -1, x.shape[-1]))


def _normed(x: Tensor, epsilon: float) -> Tensor:
    # As F.rms_norm, in half the passes over x on a CPU
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
    return (x * (square / x.shape[-1] + epsilon).rsqrt()).to(x.dtype)
