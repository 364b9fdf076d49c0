"""Kronos' paths of generated bars as a tree of token pairs: whatever two samples of a window share is computed once.

Owns the tree, its growth by both networks a step at a time, and the first step's tables, which all draws of an encoded
batch share. Knows nothing of contexts, seeds, memory that runs out or how a token is picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from forecasters.kronos_encoded import COLUMNS, EncodedBars, KeptWindow, KronosPrefix, Window
from forecasters.kronos_network import LayerCache, Own, extend, groups_of, padded, tree_cache
from forecasters.kronos_sampling import Pick

if TYPE_CHECKING:
    from forecasters.kronos import Kronos


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """The distinct token pairs of one step: a level of the tree. Sorted by window."""

    window: np.ndarray  # int64 [n]
    tokens: Tensor  # int64 [n, 2]
    path: Tensor  # int64 [n, depth]: its ancestors' numbers in the tree, its own last


@dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """Where the next pair is drawn: one row a distinct path so far."""

    window: np.ndarray  # int64 [n]
    s1_logits: Tensor  # float32 [n, 2**s1_bits], on the CPU
    said: Callable[[np.ndarray], tuple[Tensor, Mapping[int, LayerCache]]]  # for rows int64 [n]: hidden states [n, d],
    # and keys and values of the dependency layer by window. Called only where no table answers: they may be costly
    own: Own | None  # the same of the generated tokens; None at the first step


@torch.inference_mode()
def paths(networks: Kronos, encoded: EncodedBars, windows: range, count: int, pick: Pick) -> np.ndarray:
    """`count` paths of each of these windows, drawn by `pick`: all columns, float64 [len(windows), count, H, 6].

    The windows have contexts of one length. The samples that `pick` is asked for run window by window; samples
    whose paths are equal so far share a row of logits.
    """
    config, chosen = networks.network.config, [encoded.windows[w] for w in windows]
    frontier, tree = roots(chosen), None
    rows = np.repeat(np.arange(len(chosen)), count)  # [W * S], each sample's row of the frontier
    out = np.empty((encoded.horizon, len(rows), len(COLUMNS)), dtype=np.float32)
    for step in range(encoded.horizon):
        s1 = pick(frontier.s1_logits, rows, step, 0)
        pairs, which = np.unique(rows * config.s1_size + s1, return_inverse=True)
        s2 = pick(second_logits(networks, encoded, windows.start, frontier, pairs), which, step, 1)
        codes, leaves = np.unique(pairs[which] * config.s2_size + s2, return_inverse=True)
        if encoded.horizon == 1:
            values = one_bar(networks, encoded, windows.start, codes)
        else:
            tree = tree or _Tree(networks, chosen, capacity=len(rows) * encoded.horizon)
            parents, tokens = _split(networks, codes)
            values = tree.grow(parents, frontier.window[parents], tokens)
        out[step], rows = values.cpu().numpy()[leaves], leaves
        if tree is not None and step + 1 < encoded.horizon:
            frontier = tree.advance()
    shaped = out.transpose(1, 0, 2).reshape(len(chosen), count, encoded.horizon, -1)
    return np.stack([w.mean + values * w.scale for w, values in zip(chosen, shaped.astype(np.float64), strict=True)])


def _split(networks: Kronos, codes: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Codes of (row, s1, s2): the rows [n] and the tokens int64 [n, 2]."""
    pairs, s2 = np.divmod(codes, networks.network.config.s2_size)
    rows, s1 = np.divmod(pairs, networks.network.config.s1_size)
    return rows, torch.from_numpy(np.stack([s1, s2], axis=1)).to(networks.device)


def second_logits(networks: Kronos, encoded: EncodedBars, start: int, frontier: Frontier, pairs: np.ndarray) -> Tensor:
    """For ascending distinct codes of (frontier row, s1): float32 [n, 2**s2_bits], on the CPU.

    Those of the first step are kept in the table: they are the same for every draw. start: the first window.
    """
    network, device = networks.network, networks.device
    shift = start * network.config.s1_size if frontier.own is None else 0

    def compute(codes: np.ndarray) -> Tensor:
        rows, s1 = np.divmod(codes - shift, network.config.s1_size)
        at, own = torch.from_numpy(rows).to(device), frontier.own
        if own is not None:
            own = Own(k=own.k, v=own.v, ancestors=own.ancestors[at], padding=None)
        groups = groups_of(frontier.window[rows])
        hidden, keys = frontier.said(rows)
        logits = network.s2_logits(torch.from_numpy(s1).to(device), hidden, groups, keys, own)
        return logits.float().cpu()

    return encoded.s2_logits.get(pairs + shift, compute) if frontier.own is None else compute(pairs)


def one_bar(networks: Kronos, encoded: EncodedBars, start: int, codes: np.ndarray) -> Tensor:
    """Pairs decoded right after their windows' prefixes: ascending codes of (window - start, s1, s2) to [n, 6]."""
    config = networks.network.config
    shift = start * config.s1_size * config.s2_size

    def compute(fresh: np.ndarray) -> Tensor:
        parts = []
        for i in range(0, len(fresh), networks.draw_rows):
            rows, tokens = _split(networks, fresh[i : i + networks.draw_rows])
            used, window = np.unique(rows, return_inverse=True)
            tree = _Tree(networks, [encoded.windows[w] for w in used], capacity=len(rows))
            parts.append(tree.grow(window, window, tokens).cpu())
        return torch.cat(parts)

    return encoded.values.get(codes + shift, compute)


def roots(windows: Sequence[Window | KeptWindow]) -> Frontier:
    """Where the first pair of these windows is drawn."""

    def said(rows: np.ndarray) -> tuple[Tensor, Mapping[int, LayerCache]]:
        used, at = np.unique(rows, return_inverse=True)
        prefixes = {int(w): windows[w].prefix for w in used}
        hidden = torch.stack([prefix.hidden for prefix in prefixes.values()])
        return hidden[torch.from_numpy(at).to(hidden.device)], {w: prefix.keys for w, prefix in prefixes.items()}

    s1_logits = torch.stack([w.s1_logits for w in windows])
    return Frontier(window=np.arange(len(windows)), s1_logits=s1_logits, said=said, own=None)


class _Tree:
    """The token pairs drawn so far for some windows, a level a step, and what the networks keep of them."""

    def __init__(self, networks: Kronos, windows: Sequence[Window | KeptWindow], capacity: int) -> None:
        self._networks, self._windows, self._capacity = networks, windows, capacity
        self._levels: list[Level] = []
        self._decoder = tree_cache(networks.tokenizer.decoder, capacity, device=networks.device, dtype=torch.float32)
        self._trunk: Sequence[LayerCache] | None = None
        self._own: LayerCache | None = None  # of the dependency layer, [capacity, 4, d / 4] each

    def grow(self, parents: np.ndarray, window: np.ndarray, tokens: Tensor) -> Tensor:
        """Add the next step's pairs, sorted by window, and decode them: normalised columns [n, 6]."""
        device, tokenizer = self._networks.device, self._networks.tokenizer
        first = sum(len(level.window) for level in self._levels)
        ids = torch.arange(first, first + len(window), device=device)
        before = [self._levels[-1].path[torch.from_numpy(parents).to(device)]] if self._levels else []
        level = Level(window=window, tokens=tokens, path=torch.cat([*before, ids[:, None]], dim=1))
        self._levels.append(level)
        starts = np.array([w.decoded for w in self._windows])
        out = extend(
            tokenizer.decoder,
            padded(tokenizer.embed_tokens, tokens),
            positions=torch.from_numpy(starts[window] + len(self._levels) - 1).to(device),
            nodes=ids,
            ancestors=level.path,
            padding=None,
            groups=groups_of(window),
            prefixes=[w.decoder for w in self._windows],
            cache=self._decoder,
        )
        return padded(tokenizer.head, out)

    def advance(self) -> Frontier:
        """Run the last level through the transformer, or all of them where the oldest bar has dropped out."""
        length, depth = len(self._windows[0].tokens), len(self._levels)
        if length + depth <= self._networks.network_context:
            prefixes, levels = [w.prefix for w in self._windows], self._levels[-1:]
        else:
            # Every position and every state above the first layer changes with the bar that drops out: no cache of
            # an earlier step is of use, but one prefix still serves all samples of a window.
            prefixes, levels = self._slid(length + depth - self._networks.network_context), self._levels
            self._trunk = None
        hidden, own = self._run(levels, prefixes)
        keys = {w: prefix.keys for w, prefix in enumerate(prefixes)}
        return Frontier(
            window=levels[-1].window,
            s1_logits=padded(self._networks.network.head.proj_s1, hidden).float().cpu(),
            said=lambda rows: (hidden[torch.from_numpy(rows).to(hidden.device)], keys),
            own=own,
        )

    def _slid(self, start: int) -> list[KronosPrefix]:
        """The windows' bars from `start` on, as prefixes of their own."""
        batch = len(self._windows) if self._networks.device.type != "cpu" else 1
        prefixes = []
        for i in range(0, len(self._windows), batch):
            tokens = torch.stack([w.tokens[start:] for w in self._windows[i : i + batch]])
            stamps = torch.stack([w.stamps[start : len(w.tokens)] for w in self._windows[i : i + batch]])
            prefixes += self._networks.prefill(tokens, stamps, keep=True)
        return prefixes

    def _run(self, levels: Sequence[Level], prefixes: Sequence[KronosPrefix]) -> tuple[Tensor, Own]:
        """Levels, the last of the tree, through the transformer after these prefixes: the last one's hidden [n, d]."""
        network, device = self._networks.network, self._networks.device
        total, deepest = sum(len(level.window) for level in self._levels), levels[-1].path.shape[1]
        window = np.concatenate([level.window for level in levels])
        order = torch.from_numpy(np.argsort(window, kind="stable")).to(device)
        window = np.sort(window, kind="stable")
        nodes = torch.arange(total - len(window), total, device=device)[order]
        depth = torch.cat([torch.full((len(v.window),), v.path.shape[1], device=device) for v in levels])[order]
        path = torch.cat([F.pad(level.path, (0, deepest - level.path.shape[1])) for level in levels])[order]
        beyond = torch.arange(deepest, device=device) >= depth[:, None]
        tokens = torch.cat([level.tokens for level in levels])[order]
        bar = len(self._windows[0].tokens) + depth - 1
        stamps = torch.stack([w.stamps for w in self._windows])[torch.from_numpy(window).to(device), bar]  # [n, 5]
        if self._trunk is None:
            self._trunk = tree_cache(
                network.transformer, self._capacity, device=device, dtype=network.norm.weight.dtype
            )
        self._networks.forwards += 1
        x = extend(
            network.transformer,
            padded(network.embed, tokens, stamps),
            positions=prefixes[0].keys[0].shape[1] + depth - 1,
            nodes=nodes,
            ancestors=path,
            padding=beyond if len(levels) > 1 else None,
            groups=groups_of(window),
            prefixes=[prefix.layers for prefix in prefixes],
            cache=self._trunk,
        )
        hidden = network.norm(x)
        keys, values = self._remember(nodes, hidden)
        last = torch.argsort(order, stable=True)[-len(levels[-1].window) :]
        own = Own(k=keys, v=values, ancestors=levels[-1].path, padding=None)
        return hidden[last], own

    def _remember(self, nodes: Tensor, hidden: Tensor) -> LayerCache:
        """Keep the dependency layer's keys and values of these nodes; those of all nodes."""
        attention = self._networks.network.dep_layer.cross_attn
        shape = (attention.n_heads, attention.head_dim)
        if self._own is None:
            keys, values = hidden.new_empty(2, self._capacity, *shape)
            self._own = keys, values
        self._own[0][nodes] = padded(attention.k_proj, hidden).unflatten(-1, shape)
        self._own[1][nodes] = padded(attention.v_proj, hidden).unflatten(-1, shape)
        return self._own
