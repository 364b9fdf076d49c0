"""Kronos the plain way: the whole context again for every sample and every step, no cache, nothing shared.

What the stages of forecasters/kronos.py are tested and timed against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from forecasters import Bars
from forecasters.kronos import Kronos
from forecasters.kronos_encoded import EPSILON, calendar_of, columns_of
from forecasters.kronos_sampling import Sampling

Draw = Callable[[Tensor], Tensor]  # logits [rows, V] to token ids [rows]


def multinomial(sampling: Sampling) -> Draw:
    """torch's own sampler, from the global generator."""
    return lambda logits: torch.multinomial(sampling.logits(logits).softmax(-1), 1)[:, 0]


def logits_s1(kronos: Kronos, tokens: Tensor, stamps: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, T, 2]: the logits of the next first token [B, V] and all hidden states [B, T, d]."""
    network = kronos.network
    hidden = network.norm(network.transformer.run(network.embed(tokens, stamps))[0])
    return network.head.proj_s1(hidden[:, -1]), hidden


def logits_s2(kronos: Kronos, hidden: Tensor, s1: Tensor) -> Tensor:
    """Given hidden states [B, T, d] and first tokens [B]: [B, V]."""
    layer = kronos.network.dep_layer
    attention = layer.cross_attn
    query = attention.heads(attention.q_proj(kronos.network.embedding.emb_s1(s1))[:, None])
    mixed = F.scaled_dot_product_attention(query, *layer.keys_values(hidden))
    mixed = attention.out_proj(mixed.transpose(1, 2).flatten(2))[:, 0]
    return kronos.network.head.proj_s2(layer.norm(hidden[:, -1] + mixed))


@torch.inference_mode()
def forecast(kronos: Kronos, contexts: Sequence[Bars], clip: float, horizon: int, count: int, draw: Draw) -> np.ndarray:
    """Paths of contexts of one length, float64 [W, S, H, 6]; rows run window by window, s1 before s2 at each step."""
    columns = np.stack([columns_of(bars).T for bars in contexts])  # [W, T, 6]
    mean, scale = columns.mean(axis=1, keepdims=True), columns.std(axis=1, keepdims=True) + np.float32(EPSILON)
    normal = np.clip((columns - mean) / scale, -clip, clip)
    tokens = kronos.tokenizer.tokens(torch.from_numpy(normal)).repeat_interleave(count, dim=0)  # [W * S, T, 2]
    stamps = np.stack([calendar_of(bars.timestamps, horizon) for bars in contexts])
    stamps = torch.from_numpy(stamps).repeat_interleave(count, dim=0)
    for _ in range(horizon):
        length = tokens.shape[1]
        seen = slice(max(0, length - kronos.network_context), length)
        first, hidden = logits_s1(kronos, tokens[:, seen], stamps[:, seen])
        s1 = draw(first)
        s2 = draw(logits_s2(kronos, hidden, s1))
        tokens = torch.cat((tokens, torch.stack((s1, s2), dim=-1)[:, None]), dim=1)
    decoder_input = kronos.tokenizer.embed_tokens(tokens[:, -kronos.network_context :])
    values = kronos.tokenizer.head(kronos.tokenizer.decoder.run(decoder_input)[0])[:, -horizon:]
    return values.double().numpy().reshape(len(contexts), count, horizon, -1) * scale[:, None] + mean[:, None]
