"""Chronos-2's network, which published checkpoints load into: one pass over contexts and the patches that follow them.

Owns the modules, under the key names of the published checkpoints, the scaling of each series by its own context, and
what of a pass the asked quantiles need. Knows nothing of bars, windows, files, transforms or long horizons.

"The reference" is chronos-forecasting 2.3.2. Dimensions: N groups, G series a group (all groups of a pass have as
many), R = N * G rows, T points, C patches of P points before the origin, O after it, S = C + 1 + O tokens, D d_model,
Q levels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forecasters.chronos2_sizes import Chronos2NetworkConfig

CONSTANT_SCALE = 1e-5  # of a series without spread
REG = 1  # the row of `shared` that stands between context and future; row 0 is not used


class Tokens(NamedTuple):
    """Series as the network reads them."""

    patches: Tensor  # [R, C + O, 3P]: time, scaled values, whether there are values
    seen: Tensor  # bool [R, S], whether a token may be attended to
    loc: Tensor  # float32 [R, 1]
    scale: Tensor


# What a module makes anew it changes in place: on a CPU new pages would take a tenth of the time.


class Norm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # As F.rms_norm, in half the passes over x on a CPU
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
        return (x * (square / x.shape[-1] + self.epsilon).rsqrt()).to(x.dtype).mul_(self.weight)


class PatchEmbedding(nn.Module):
    """An MLP beside a linear map."""

    def __init__(self, inner: int, hidden: int, outer: int) -> None:
        super().__init__()
        self.hidden_layer = nn.Linear(inner, hidden)
        self.output_layer = nn.Linear(hidden, outer)
        self.residual_layer = nn.Linear(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.hidden_layer(x).relu_()).add_(self.residual_layer(x))


class Attention(nn.Module):
    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, asking: Tensor, seen: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """What [.., A, D], the last of seen [.., B, D], learn from these; mask: added to the scores [.., h, A, B]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer, x in ((self.q, asking), (self.k, seen), (self.v, seen))
        )
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        learnt = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # the reference divides by nothing
        return self.o(learnt.transpose(-3, -2).flatten(-2))


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [.., A, d] at the last A of the rotation's positions."""
    cos, sin = (part[-x.shape[-2] :] for part in rotation)
    turned, half = x * cos, x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned


class AttentionLayer(nn.Module):
    alone: Tensor | None  # o after v, [D, D], of a series that attends to itself only; see Chronos2Network.prepare

    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.self_attention = Attention(config)
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)
        self.register_buffer("alone", None, persistent=False)

    def over_time(self, x: Tensor, last: int, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The last tokens of x [R, S, D] after the attention of each row to itself, [R, last, D]."""
        normed = self.layer_norm(x)
        return self.self_attention(normed[:, -last:], normed, mask, rotation).add_(x[:, -last:])

    def over_group(self, x: Tensor, size: int, mask: Tensor) -> Tensor:
        """x [R, A, D] after the attention of the series of a group at each token. mask: [N, A, 1, 1, G]."""
        normed = self.layer_norm(x)
        if size == 1:
            v, o = self.self_attention.v, self.self_attention.o
            return (o(v(normed)) if self.alone is None else F.linear(normed, self.alone)).add_(x)
        together = normed.unflatten(0, (-1, size)).transpose(1, 2)  # [N, A, G, D]
        tokens = together.flatten(0, 1)
        learnt = self.self_attention(tokens, tokens, mask.flatten(0, 1), None).view_as(together)
        return learnt.transpose(1, 2).flatten(0, 1).add_(x)


class FeedForward(nn.Module):
    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {
                "wi": nn.Linear(config.d_model, config.d_ff, bias=False),
                "wo": nn.Linear(config.d_ff, config.d_model, bias=False),
            }
        )
        self.layer_norm = Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["wo"](self.mlp["wi"](self.layer_norm(x)).relu_()).add_(x)


class Block(nn.Module):
    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), AttentionLayer(config), FeedForward(config)])

    def forward(
        self, x: Tensor, last: int, size: int, masks: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The last tokens of x [R, S, D] after this block. masks: over time, and over the groups of this size."""
        over_time, over_group = masks
        time, group, feed_forward = self.layer
        x = cast(AttentionLayer, time).over_time(x, last, over_time, rotation)
        return feed_forward(cast(AttentionLayer, group).over_group(x, size, over_group[:, -last:]))


class Encoder(nn.Module):
    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layer_norm = Norm(config.d_model, config.layer_norm_epsilon)


class Chronos2Network(nn.Module):
    def __init__(self, config: Chronos2NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.input_patch_embedding = PatchEmbedding(3 * config.patch_size, config.d_ff, config.d_model)
        self.encoder = Encoder(config)
        self.output_patch_embedding = PatchEmbedding(
            config.d_model, config.d_ff, len(config.levels) * config.patch_size
        )

    def prepare(self) -> Chronos2Network:
        """Multiply two matrices of each block into one for groups of one series, once the weights are as they stay.

        Such a series attends to itself with weight 1, whatever the scores are, so that nothing stands between them.
        """
        for block in self.encoder.block:
            layer = cast(AttentionLayer, cast(Block, block).layer[1])
            if not isinstance(layer.self_attention.v, nn.Linear):
                continue  # int8 by now: what they were has been multiplied before
            v, o = layer.self_attention.v.weight, layer.self_attention.o.weight
            layer.alone = (o.detach().float() @ v.detach().float()).to(o.dtype)
        return self

    def answer(self, series: Tensor, known: Tensor) -> Tensor:
        """The quantiles after these series, as the head answers them: they may cross.

        series: float32 [N, G, C * P], NaN where nothing is known; a group attends to itself only.
        known: float32 [N, G, O * P], what is known of the steps ahead, else NaN.
        Returns float32 [N, G, Q, O * P] in the units of the series.
        """
        (groups, size), patch = series.shape[:2], self.config.patch_size
        after = known.shape[-1] // patch
        tokens = self.tokens(series.flatten(0, 1), known.flatten(0, 1))
        answers = self.output_patch_embedding(self.hidden(tokens, size, after, last=after))
        scaled = answers.float().unflatten(-1, (-1, patch)).transpose(1, 2).flatten(2)  # [R, Q, O * P]
        unscaled = torch.sinh(scaled) * tokens.scale[..., None] + tokens.loc[..., None]
        return unscaled.unflatten(0, (groups, size))

    def tokens(self, series: Tensor, known: Tensor) -> Tokens:
        """Each series [R, C * P] and what is known after it, [R, O * P], by its own mean and spread."""
        patch, dtype = self.config.patch_size, self.shared.weight.dtype
        there = ~series.isnan()
        wide, count = series.double().masked_fill(~there, 0), there.sum(-1, keepdim=True)
        loc = (wide.sum(-1, keepdim=True) / count.clamp_min(1)).float()
        squares = (wide - loc).masked_fill(~there, 0).square().sum(-1, keepdim=True)
        scale = (squares / count.clamp_min(1)).sqrt().float()
        scale = torch.where(scale == 0, CONSTANT_SCALE, scale)
        scale = torch.where(count == 0, 1.0, scale)
        values = torch.cat((series, known), -1)
        there = ~values.isnan()
        scaled = torch.asinh((values - loc) / scale).masked_fill(~there, 0)
        length = series.shape[-1]
        time = torch.arange(-length, known.shape[-1], device=series.device, dtype=torch.float32)
        time = (time / self.config.time_encoding_scale).expand_as(scaled)
        patches = torch.cat([x.to(dtype).unflatten(-1, (-1, patch)) for x in (time, scaled, there)], -1)
        seen = there.unflatten(-1, (-1, patch)).any(-1)[:, : length // patch]
        after = seen.new_ones(len(seen), 1 + known.shape[-1] // patch)  # REG and the future are always seen
        return Tokens(patches=patches, seen=torch.cat((seen, after), -1), loc=loc, scale=scale)

    def hidden(self, tokens: Tokens, size: int, after: int, last: int) -> Tensor:
        """What the encoder says of the last tokens, [R, last, D]; in its last layer nothing else is computed.

        size: series a group. after: patches after the origin.
        """
        embedded = self.input_patch_embedding(tokens.patches)
        reg = self.shared.weight[REG].expand(len(embedded), 1, -1)
        x = torch.cat((embedded[:, :-after], reg, embedded[:, -after:]), 1)
        rotation = self._rotation(x)
        # Finite, so that a token that nothing may be seen from, as in a patch that a whole group lacks, stays a number.
        mask = torch.where(tokens.seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype)  # [R, S]
        over_group = mask.unflatten(0, (-1, size)).transpose(1, 2)[:, :, None, None]  # [N, S, 1, 1, G]
        masks, left = (mask[:, None, None], over_group), len(self.encoder.block)
        for block in self.encoder.block:
            left -= 1
            x = block(x, x.shape[1] if left else last, size, masks, rotation)
        return self.encoder.final_layer_norm(x)

    def _rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine [S, d_kv] and sine [S, d_kv / 2] of the angle of each token and pair of dimensions, in x's dtype."""
        pairs = torch.arange(0, self.config.d_kv, 2, device=x.device, dtype=torch.float32) / self.config.d_kv
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.config.rope_theta**-pairs)
        return angles.cos().to(x.dtype).repeat(1, 2), angles.sin().to(x.dtype)
