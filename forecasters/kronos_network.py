"""Kronos' two networks: the tokenizer that turns bars into pairs of tokens, and the transformer over those tokens.

Owns the modules, under the key names of the published checkpoints, and the attention of a tree of generated tokens
to a prefix that all of them share. Knows nothing of bars, prices, sampling or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forecasters.kronos_sizes import CALENDAR, DEPENDENCY_HEADS, KronosNetworkConfig, KronosTokenizerConfig

ROPE_BASE = 10_000
# Rows of generated tokens run in multiples of this, so that a row's bits do not depend on how many others there are:
# MKL multiplies fewer than 4 rows by another kernel, and 8 by another with AVX-512; torch's exp has other last bits in
# the tail of its vectors.
ROWS = 16
GATHER_BYTES = 64 << 20  # keys of generated tokens gathered at a time

LayerCache = tuple[Tensor, Tensor]  # keys and values of a prefix, each [heads, T, head_dim]


# ---- modules, named as in the published checkpoints ---------------------------------------------------------------


class KronosNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotary_frequencies(head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position, float32 [head_dim / 2]; made on the device, since a CUDA graph holds nothing of the host."""
    return 1.0 / (ROPE_BASE ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))


def rotary_table(head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for integer positions [n], float32 whatever the network's dtype is: each [n, head_dim]."""
    angles = positions.float()[:, None] * rotary_frequencies(head_dim, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., n, head_dim] turned by the table of its n positions."""
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = x.split(half, -1)
    turned = x * cos
    turned[..., :half].addcmul_(second, sin[..., :half], value=-1)  # in place, here and below: 6 % of a CPU's time
    turned[..., half:].addcmul_(first, sin[..., half:])
    return turned.type_as(x)


class KronosAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def heads(self, x: Tensor) -> Tensor:
        """[..., n, d_model] to [..., heads, n, head_dim]."""
        return x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(-2, -3)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Causal self-attention over x [B, T, d_model]; also its rotated keys and values [B, heads, T, head_dim]."""
        q, k = rotate(self.heads(self.q_proj(x)), table), rotate(self.heads(self.k_proj(x)), table)
        v = self.heads(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), k, v


class FeedForward(nn.Module):
    def __init__(self, d_model: int, ff_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, ff_dim, bias=False)
        self.w3 = nn.Linear(d_model, ff_dim, bias=False)
        self.w2 = nn.Linear(ff_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        if torch.is_grad_enabled():
            return self.w2(F.silu(gate) * self.w3(x))
        return self.w2(F.silu(gate, inplace=True).mul_(self.w3(x)))


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, ff_dim: int) -> None:
        super().__init__()
        self.norm1 = KronosNorm(d_model)
        self.self_attn = KronosAttention(d_model, n_heads)
        self.norm2 = KronosNorm(d_model)
        self.ffn = FeedForward(d_model, ff_dim)


class Stack(nn.ModuleList):
    """Transformer blocks with one causal context."""

    def __init__(self, blocks: int, d_model: int, n_heads: int, ff_dim: int) -> None:
        super().__init__(Block(d_model, n_heads, ff_dim) for _ in range(blocks))
        self.n_heads, self.head_dim = n_heads, d_model // n_heads

    def __iter__(self) -> Iterator[Block]:  # typed for the loops below
        return super().__iter__()  # pyright: ignore[reportReturnType]

    def run(self, x: Tensor, *, keep: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """All tokens of x [B, T, d] at positions 0..T-1; with keep, every layer's keys and values [B, h, T, e]."""
        caches: list[tuple[Tensor, Tensor]] = []
        table = rotary_table(self.head_dim, torch.arange(x.shape[1], device=x.device))
        for block in self:
            mixed, k, v = block.self_attn(block.norm1(x), table)
            x = x + mixed
            x = x + block.ffn(block.norm2(x))
            if keep:
                caches.append((k, v))
        return x, caches


class DependencyLayer(nn.Module):
    """Lets the second token of a pair see the first: one query against the context's hidden states.

    Without rotary embedding and without a causal mask: a single query has position 0, where the rotation is the
    identity, and the published inference code rotates the keys by the query's table.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.cross_attn = KronosAttention(d_model, DEPENDENCY_HEADS)
        self.norm = KronosNorm(d_model)

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states [..., n, d]: each [..., heads, n, head_dim]."""
        attention = self.cross_attn
        return attention.heads(attention.k_proj(hidden)), attention.heads(attention.v_proj(hidden))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # normal_ has no meta kernel: its fallback imports torch._dynamo, 1.3 s
            super().reset_parameters()


class PairEmbedding(nn.Module):
    def __init__(self, config: KronosNetworkConfig) -> None:
        super().__init__()
        self.scale = config.d_model**0.5
        self.emb_s1 = Embedding(config.s1_size, config.d_model)
        self.emb_s2 = Embedding(config.s2_size, config.d_model)
        self.fusion_proj = nn.Linear(2 * config.d_model, config.d_model)

    def forward(self, s1: Tensor, s2: Tensor) -> Tensor:
        return self.fusion_proj(torch.cat((self.emb_s1(s1) * self.scale, self.emb_s2(s2) * self.scale), dim=-1))


class FixedEmbedding(nn.Module):
    """A table of sines and cosines, stored in the checkpoint like a learned one, one level deeper."""

    def __init__(self, size: int, d_model: int) -> None:
        super().__init__()
        angles = torch.arange(size)[:, None] * 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :d_model]
        self.emb = nn.Embedding.from_pretrained(waves, freeze=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids)


class CalendarEmbedding(nn.Module):
    def __init__(self, config: KronosNetworkConfig) -> None:
        super().__init__()
        table = Embedding if config.learn_te else FixedEmbedding
        for name, size in CALENDAR:
            self.add_module(f"{name}_embed", table(size, config.d_model))

    def forward(self, stamps: Tensor) -> Tensor:
        """stamps int64 [..., 5] in the order of CALENDAR."""
        minute, hour, weekday, day, month = (
            self.get_submodule(f"{name}_embed")(stamps[..., i]) for i, (name, _) in enumerate(CALENDAR)
        )
        # The published order of the sum: float addition is not associative.
        return hour + weekday + day + month + minute


class Heads(nn.Module):
    def __init__(self, config: KronosNetworkConfig) -> None:
        super().__init__()
        self.proj_s1 = nn.Linear(config.d_model, config.s1_size)
        self.proj_s2 = nn.Linear(config.d_model, config.s2_size)


class KronosNetwork(nn.Module):
    """The transformer over token pairs."""

    def __init__(self, config: KronosNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = PairEmbedding(config)
        self.time_emb = CalendarEmbedding(config)
        self.transformer = Stack(config.n_layers, config.d_model, config.n_heads, config.ff_dim)
        self.norm = KronosNorm(config.d_model)
        self.dep_layer = DependencyLayer(config.d_model)
        self.head = Heads(config)

    def embed(self, tokens: Tensor, stamps: Tensor) -> Tensor:
        """tokens int64 [..., 2], stamps int64 [..., 5] to [..., d_model]."""
        return self.embedding(tokens[..., 0], tokens[..., 1]) + self.time_emb(stamps)

    def s2_logits(
        self,
        s1: Tensor,  # [n], the first tokens
        hidden: Tensor,  # [n, d], the last hidden state of each row's path
        groups: Sequence[Group],
        prefixes: Mapping[int, LayerCache],  # by window
        own: Own | None,
    ) -> Tensor:
        """Logits of the second token given the first, [n, 2**s2_bits]."""
        layer = self.dep_layer
        rows = whole(len(s1), s1.device)
        s1, hidden = s1[rows], hidden[rows]  # one query a row
        query = layer.cross_attn.q_proj(self.embedding.emb_s1(s1)).unflatten(-1, (DEPENDENCY_HEADS, -1))  # [n, h, e]
        mixed = torch.cat([tree_attention(query[g.start : g.stop], prefixes[g.window], own, g) for g in groups])
        mixed = mixed.flatten(1)[whole(len(mixed), s1.device)]
        out = self.head.proj_s2(layer.norm(hidden + layer.cross_attn.out_proj(mixed)))
        return out[: groups[-1].stop]


class KronosTokenizer(nn.Module):
    """Six normalised columns to two tokens a bar and back. float32 only: bf16 changes 8 % of the tokens."""

    def __init__(self, config: KronosTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        bits, d_model = config.s1_bits + config.s2_bits, config.d_model
        self.embed = nn.Linear(config.d_in, d_model)
        self.head = nn.Linear(d_model, config.d_in)
        # the published layout has one block less than the config says, on both sides
        self.encoder = Stack(config.n_enc_layers - 1, d_model, config.n_heads, config.ff_dim)
        self.decoder = Stack(config.n_dec_layers - 1, d_model, config.n_heads, config.ff_dim)
        self.quant_embed = nn.Linear(d_model, bits)
        self.post_quant_embed_pre = nn.Linear(config.s1_bits, d_model)
        self.post_quant_embed = nn.Linear(bits, d_model)

    def tokens(self, x: Tensor) -> Tensor:
        """x [B, T, 6], normalised and clipped, to int64 [B, T, 2]."""
        bits = (self.quant_embed(self.encoder.run(self.embed(x))[0]) > 0).long()  # [B, T, s1_bits + s2_bits]
        first, second = bits.split((self.config.s1_bits, self.config.s2_bits), dim=-1)
        return torch.stack((_from_bits(first), _from_bits(second)), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 [..., 2] to the decoder's input [..., d_model]."""
        sizes = (self.config.s1_bits, self.config.s2_bits)
        bits = torch.cat([_to_bits(tokens[..., i], size) for i, size in enumerate(sizes)], dim=-1)
        return self.post_quant_embed((bits.float() * 2 - 1) * sum(sizes) ** -0.5)


def _from_bits(bits: Tensor) -> Tensor:  # the first bit is the lowest
    return (bits << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def _to_bits(ids: Tensor, size: int) -> Tensor:
    return (ids[..., None] >> torch.arange(size, device=ids.device)) & 1


# ---- generated tokens: a tree of paths over a shared prefix ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive rows [start, stop) that share one window's prefix."""

    window: int
    start: int
    stop: int


@dataclass(kw_only=True, eq=False)
class Own:
    """Keys and values of generated tokens, one row a node of the tree, and who sees which."""

    k: Tensor  # [nodes, heads, head_dim]
    v: Tensor
    ancestors: Tensor  # [n, D] nodes each row sees, itself included
    padding: Tensor | None  # bool [n, D], true where a row has fewer than D; None where all have D


def whole(count: int, device: torch.device) -> Tensor:
    """Row indices 0..count-1, the last repeated up to a multiple of ROWS."""
    return torch.arange(-(-count // ROWS) * ROWS, device=device).clamp_(max=count - 1)


def padded(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """function(*rows) for tensors [n, ...], run with a multiple of ROWS of them."""
    n = len(rows[0])
    index = whole(n, rows[0].device)
    return function(*(row[index] for row in rows))[:n]


def tree_attention(q: Tensor, prefix: LayerCache, own: Own | None, group: Group) -> Tensor:
    """Queries [n, heads, head_dim] of a group's rows against their shared prefix and their own path, same shape out.

    The prefix is never copied per row: it is one matrix product for all rows of the window.
    """
    n, heads, head_dim = q.shape
    depth = 0 if own is None else own.ancestors.shape[1]
    step = max(1, GATHER_BYTES // (4 * ROWS * max(depth, 1) * heads * head_dim)) * ROWS
    pieces = []
    for start in range(0, n, step):
        rows = whole(min(step, n - start), q.device) + start
        out = _attend(q[rows], prefix, own, rows + group.start)
        pieces.append(out[: min(step, n - start)])
    return torch.cat(pieces)


def _attend(q: Tensor, prefix: LayerCache, own: Own | None, rows: Tensor) -> Tensor:
    keys, values = prefix
    length, scale = keys.shape[1], q.shape[-1] ** -0.5
    scores = (q.transpose(0, 1) * scale) @ keys.transpose(1, 2)  # [h, n, T]
    if own is None:
        return (scores.softmax(-1) @ values).transpose(0, 1)
    ancestors = own.ancestors[rows]  # [n, D]
    mine = torch.einsum("nhe,ndhe->hnd", q * scale, own.k[ancestors])
    if own.padding is not None:
        mine = mine.masked_fill(own.padding[rows], float("-inf"))
    weights = torch.cat((scores, mine), dim=-1).softmax(-1)
    out = weights[..., :length] @ values + torch.einsum("hnd,ndhe->hne", weights[..., length:], own.v[ancestors])
    return out.transpose(0, 1)


def tree_cache(stack: Stack, capacity: int, *, device: torch.device, dtype: torch.dtype) -> list[LayerCache]:
    """Room for keys and values of `capacity` generated tokens, for every layer of a stack."""
    shape = (capacity, stack.n_heads, stack.head_dim)
    keys, values = ([torch.empty(shape, device=device, dtype=dtype) for _ in stack] for _ in range(2))
    return list(zip(keys, values, strict=True))


def extend(
    stack: Stack,
    x: Tensor,  # [n, d], embedded tokens
    positions: Tensor,  # int64 [n]
    nodes: Tensor,  # int64 [n], where in the cache these tokens go
    ancestors: Tensor,  # int64 [n, D], themselves included
    padding: Tensor | None,  # bool [n, D]
    groups: Sequence[Group],
    prefixes: Sequence[Sequence[LayerCache]],  # [window][layer]
    cache: Sequence[LayerCache],
) -> Tensor:
    """Runs new tokens of a tree through a stack, [n, d]; their keys and values are left in the cache."""
    n = len(x)
    rows = whole(n, x.device)
    x, nodes = x[rows], nodes[rows]
    cos, sin = rotary_table(stack.head_dim, positions[rows])
    table = cos[:, None], sin[:, None]  # [n, 1, e]
    for layer, block in enumerate(stack):
        attention, h = block.self_attn, block.norm1(x)
        shape = (attention.n_heads, attention.head_dim)
        q, k = (rotate(p(h).unflatten(-1, shape), table) for p in (attention.q_proj, attention.k_proj))  # [n, h, e]
        keys, values = cache[layer]
        keys[nodes], values[nodes] = k, attention.v_proj(h).unflatten(-1, shape)
        own = Own(k=keys, v=values, ancestors=ancestors, padding=padding)
        mixed = torch.cat([tree_attention(q[g.start : g.stop], prefixes[g.window][layer], own, g) for g in groups])
        x = x + attention.out_proj(mixed.flatten(1)[rows])
        x = x + block.ffn(block.norm2(x))
    return x[:n]


def groups_of(window: np.ndarray) -> list[Group]:
    """Groups of rows whose window numbers, int [n], do not descend."""
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    stops = [*starts[1:].tolist(), len(window)]
    return [Group(window=int(window[a]), start=int(a), stop=b) for a, b in zip(starts, stops, strict=True)]
