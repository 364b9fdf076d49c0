"""Kronos' stages as functions of tensors in fixed shapes, which compile whole and can be CUDA graphs.

What kronos.py and kronos_tree.py do for as many windows, bars and distinct paths as there are, this does for W windows
padded to one length and N paths of each, shared or not: more arithmetic, but one graph for every window and every
sampling param, and nothing that asks the device for a value. Knows nothing of bars, prices, files or how it is
compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forecasters.kronos_network import DEPENDENCY_HEADS, LayerCache, Network, Stack, Tokenizer, rotary_table, rotate


class FixedShapes(nn.Module):
    """Both networks, whose parameters are shared with the forecaster's."""

    def __init__(self, tokenizer: Tokenizer, network: Network) -> None:
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
        lengths: Tensor,  # int64 [W]: of the prefix
        decoded: Tensor,  # int64 [W]: of the decoder's prefix
        dependency: LayerCache,  # [W, 4, L, d / 4]
        layers: Sequence[LayerCache],  # [W, h, L, e] each; empty where nothing follows
        decoder: Sequence[LayerCache],
        own_dependency: LayerCache,  # [W, 4, N, H, d / 4], room for H bars; `step` is written
        own_layers: Sequence[LayerCache],
        own_decoder: Sequence[LayerCache],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a bar of each path: its normalised columns [W, N, 6], and what the next step begins with."""
        network, tokenizer = self.network, self.tokenizer
        s1 = pick(s1_logits, sampling, uniforms[..., 0])
        layer = network.dep_layer
        query = layer.cross_attn.q_proj(network.embedding.emb_s1(s1))  # [W, N, d]
        query = query.unflatten(-1, (DEPENDENCY_HEADS, -1)).transpose(1, 2)  # [W, 4, N, d / 4]
        mixed = attend(query, dependency, lengths, own_dependency, step)
        joined = layer.norm(hidden + layer.cross_attn.out_proj(mixed))
        s2 = pick(network.head.proj_s2(joined).float(), sampling, uniforms[..., 1])
        tokens = torch.stack((s1, s2), dim=-1)  # [W, N, 2]
        x = tokenizer.embed_tokens(tokens)
        values = tokenizer.head(extend(tokenizer.decoder, x, decoded, step, decoder, own_decoder))
        if stamps is None:
            return values, hidden, s1_logits
        x = network.embed(tokens, stamps[:, None].expand(-1, tokens.shape[1], -1))
        hidden = network.norm(extend(network.transformer, x, lengths, step, layers, own_layers))
        keys, values_seen = layer.keys_values(hidden)  # [W, 4, N, d / 4]
        own_dependency[0].index_copy_(3, step[None], keys[..., None, :])
        own_dependency[1].index_copy_(3, step[None], values_seen[..., None, :])
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


def extend(
    stack: Stack, x: Tensor, lengths: Tensor, step: Tensor, prefixes: Sequence[LayerCache], own: Sequence[LayerCache]
) -> Tensor:
    """One new token a path through a stack, [W, N, d]; its keys and values are left in `own`, at `step`."""
    cos, sin = rotary_table(stack.head_dim, lengths + step)
    table = cos[:, None, None], sin[:, None, None]  # [W, 1, 1, e]
    for block, prefix, (keys, values) in zip(stack, prefixes, own, strict=True):
        attention, h = block.self_attn, block.norm1(x)
        q, k = (rotate(attention.heads(p(h)), table) for p in (attention.q_proj, attention.k_proj))  # [W, heads, N, e]
        keys.index_copy_(3, step[None], k[..., None, :])
        values.index_copy_(3, step[None], attention.heads(attention.v_proj(h))[..., None, :])
        x = x + attention.out_proj(attend(q, prefix, lengths, (keys, values), step + 1))
        x = x + block.ffn(block.norm2(x))
    return x
