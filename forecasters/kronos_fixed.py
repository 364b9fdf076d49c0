"""Kronos' stages as functions of tensors in fixed shapes, which compile whole and can be CUDA graphs.

What kronos.py and kronos_tree.py do for as many windows, bars and distinct paths as there are, this does for W windows
padded to one length and N paths of each, shared or not: more arithmetic, but one graph for every window and every
sampling param, and nothing that asks the device for a value. Knows nothing of bars, prices, files or how it is
compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forecasters.kronos_network import KronosNetwork, KronosTokenizer, LayerCache, Stack, rotary_table, rotate

FIXED_BARS = 64  # compiled contexts are padded to a multiple: 4 graphs serve the 5 published lengths


class PathCache(NamedTuple):
    """Keys and values of a stack of layers: of the windows' prefixes, and of what each path has generated.

    A tuple, because compiled functions take tensors and tuples of tensors.
    """

    lengths: Tensor  # int64 [W]: bars of each prefix; what a buffer holds beyond them is masked
    prefixes: Sequence[LayerCache]  # a layer: [W, heads, L, e] each
    own: Sequence[LayerCache]  # a layer: [W, heads, N, H, e] each, room for H bars

    @classmethod
    def filled(
        cls,
        buffer: Callable[..., Tensor],
        name: str,
        windows: Sequence[Sequence[LayerCache]],
        lengths: Sequence[int],
        *,
        samples: int,
        horizon: int,
        device: torch.device,
    ) -> PathCache:
        """Copy the windows' prefixes, padded to one length, into buffers, with room for their paths' bars.

        buffer: `Graphs.buffer`, asked for names that begin with `name`. windows: the layers of each, [heads, T, e].
        """
        prefixes, own = [], []
        for layer, caches in enumerate(zip(*windows, strict=True)):
            heads, _, size = caches[0][0].shape
            shape = (len(caches), heads, whole_bars(max(lengths)), size)
            keys, values = (buffer(f"{name} {layer} {i}", shape, like=caches[0][i]) for i in range(2))
            for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
                keys[row, :, :length], values[row, :, :length] = cache
            room = (len(caches), heads, samples, horizon, size)
            own.append(tuple(buffer(f"own {name} {layer} {i}", room, like=keys) for i in range(2)))
            prefixes.append((keys, values))
        return cls(lengths=torch.tensor(lengths, device=device), prefixes=prefixes, own=own)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the prefixes, which with the room for the paths make a graph's shapes."""
        return tuple(tuple(keys.shape) for keys, _ in self.prefixes[:1])


def whole_bars(count: int) -> int:
    """The smallest positive multiple of FIXED_BARS that is at least `count`."""
    return -(-max(1, count) // FIXED_BARS) * FIXED_BARS


class FixedShapes(nn.Module):
    """Both networks, whose parameters are shared with the forecaster's."""

    def __init__(self, tokenizer: KronosTokenizer, network: KronosNetwork) -> None:
        super().__init__()
        self.tokenizer, self.network = tokenizer, network

    def prefill(
        self,
        tokens: Tensor,  # int64 [W, L, 2], padded on the right, where a causal network does not look
        stamps: Tensor,  # int64 [W, L, 5]
        last: Tensor,  # int64 [W]: the last real token
        decoded: Tensor,  # int64 [W, D, 2]: what the decoder sees of them, padded on the right
        keep: bool,
    ) -> tuple[Tensor, Tensor, LayerCache, list[LayerCache], list[LayerCache]]:
        """The state of the last token [W, d] and its logits, float32 [W, V]; the keys and values of the dependency
        layer, of the transformer (only with `keep`) and of the tokenizer's decoder, each [W, heads, length, e].
        """
        network, tokenizer = self.network, self.tokenizer
        x, layers = network.transformer.run(network.embed(tokens, stamps), keep=keep)
        x = network.norm(x)
        hidden = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        _, decoder = tokenizer.decoder.run(tokenizer.embed_tokens(decoded), keep=True)
        return hidden, network.head.proj_s1(hidden).float(), network.dep_layer.keys_values(x), layers, decoder

    def step(
        self,
        hidden: Tensor,  # [W, N, d], of each path's last token
        s1_logits: Tensor,  # float32 [W, N, V]
        uniforms: Tensor,  # float64 [W, N, 2]
        sampling: tuple[Tensor, Tensor, Tensor],  # temperature float32 [], top_k int64 [], top_p float32 []
        step: Tensor,  # int64 []: bars generated before
        stamps: Tensor | None,  # int64 [W, 5], of the bar that is drawn; None: nothing follows it
        dependency: PathCache,  # of the one dependency layer
        transformer: PathCache,  # without layers where nothing follows
        decoder: PathCache,  # of the tokenizer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a bar of each path: its normalised columns [W, N, 6], and what the next step begins with.

        The bar's keys and values are written into each cache's own, at `step`.
        """
        network, tokenizer = self.network, self.tokenizer
        s1 = pick(s1_logits, sampling, uniforms[..., 0])
        layer, own = network.dep_layer, dependency.own[0]
        query = layer.cross_attn.heads(layer.cross_attn.q_proj(network.embedding.emb_s1(s1)))  # [W, 4, N, d / 4]
        mixed = attend(query, dependency.prefixes[0], dependency.lengths, own, step)
        joined = layer.norm(hidden + layer.cross_attn.out_proj(mixed))
        s2 = pick(network.head.proj_s2(joined).float(), sampling, uniforms[..., 1])
        tokens = torch.stack((s1, s2), dim=-1)  # [W, N, 2]
        x = tokenizer.embed_tokens(tokens)
        values = tokenizer.head(extend_paths(tokenizer.decoder, x, step, decoder))
        if stamps is None:
            return values, hidden, s1_logits
        x = network.embed(tokens, stamps[:, None].expand(-1, tokens.shape[1], -1))
        hidden = network.norm(extend_paths(network.transformer, x, step, transformer))
        keys, values_seen = layer.keys_values(hidden)  # [W, 4, N, d / 4]
        own[0].index_copy_(3, step[None], keys[..., None, :])
        own[1].index_copy_(3, step[None], values_seen[..., None, :])
        return values, hidden, network.head.proj_s1(hidden).float()


def pick(logits: Tensor, sampling: tuple[Tensor, Tensor, Tensor], u: Tensor) -> Tensor:
    """`kronos_sampling.Sampling` and `inverse_cdf` with params that are tensors: logits [.., V] and u [..] to ids [..].

    One graph for all params: what top_k and what top_p drop is both computed, and one of them counts.
    """
    temperature, top_k, top_p = sampling
    scaled = logits / temperature
    ranked, order = scaled.sort(descending=True)
    vocabulary = scaled.shape[-1]
    kth = ranked.index_select(-1, (top_k - 1).clamp(0, vocabulary - 1)[None])
    above = ranked.softmax(-1).cumsum(-1) > top_p
    crossed = torch.cat((torch.zeros_like(above[..., :1]), above[..., :-1]), dim=-1) & (top_p < 1)
    by_p = torch.zeros_like(crossed).scatter(-1, order, crossed)
    dropped = torch.where(top_k > 0, scaled < kth, by_p)
    cdf = scaled.masked_fill(dropped, float("-inf")).double().softmax(-1).cumsum(-1)
    return (cdf / cdf[..., -1:] <= u[..., None]).sum(-1).clamp_max(vocabulary - 1)


def attend(q: Tensor, prefix: LayerCache, lengths: Tensor, own: LayerCache, count: Tensor) -> Tensor:
    """Queries [W, heads, N, e] against their window's prefix and `count` bars of their own, to [W, N, heads * e].

    One softmax over both; the prefix is not copied for a path.
    """
    keys, values = prefix
    q = q * q.shape[-1] ** -0.5
    shared = q @ keys.transpose(-1, -2)  # [W, heads, N, L]
    length = shared.shape[-1]
    outside = torch.arange(length, device=q.device) >= lengths[:, None]
    ours = (own[0] @ q[..., None])[..., 0]  # [W, heads, N, H]
    ahead = torch.arange(ours.shape[-1], device=q.device) >= count
    shared = shared.masked_fill(outside[:, None, None], float("-inf"))
    weights = torch.cat((shared, ours.masked_fill(ahead, float("-inf"))), dim=-1).float().softmax(-1).type_as(q)
    mixed = weights[..., :length] @ values + (weights[..., None, length:] @ own[1])[..., 0, :]
    return mixed.transpose(1, 2).flatten(2)


def extend_paths(stack: Stack, x: Tensor, step: Tensor, cache: PathCache) -> Tensor:
    """Run one new token a path through a stack, [W, N, d]; its keys and values are left in the cache, at `step`."""
    cos, sin = rotary_table(stack.head_dim, cache.lengths + step)
    table = cos[:, None, None], sin[:, None, None]  # [W, 1, 1, e]
    for block, prefix, (keys, values) in zip(stack, cache.prefixes, cache.own, strict=True):
        attention, h = block.self_attn, block.norm1(x)
        q, k = (rotate(attention.heads(p(h)), table) for p in (attention.q_proj, attention.k_proj))  # [W, heads, N, e]
        keys.index_copy_(3, step[None], k[..., None, :])
        values.index_copy_(3, step[None], attention.heads(attention.v_proj(h))[..., None, :])
        x = x + attention.out_proj(attend(q, prefix, cache.lengths, (keys, values), step + 1))
        x = x + block.ffn(block.norm2(x))
    return x
