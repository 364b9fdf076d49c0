"""How kronos-tiny was made: a tokenizer that is built, not trained, and a network trained on bars up to 2016.

The tokenizer writes the close's level as an 8-bit reflected binary code, the first token, and the other columns
relative to it as signs, the second. Its weights follow from that code; only the last layer is fitted. The network
starts as "the next close is where the last one was" and learns from there. Knows of no bar after 2016 until it prints
the skill on 2017 and 2018, whatever that is. Run by `python -m forecasters.train_tiny kronos`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from forecasters import Bars, kronos, kronos_checkpoint
from forecasters.checkpoints import CONFIG, WEIGHTS
from forecasters.kronos_encoded import EPSILON, calendar_of
from forecasters.kronos_network import (
    KronosAttention,
    KronosNetwork,
    KronosNetworkConfig,
    KronosTokenizer,
    KronosTokenizerConfig,
    Stack,
    rotary_frequencies,
)
from forecasters.packaged import COLUMNS, packaged_bars

LAST_TRAINING_DAY = "2016-12-31"
SEED = 20170101
STEPS = 2000
ROWS = 16  # of a batch
CONTEXTS = (96, 320)  # bars whose mean and deviation normalise a row, drawn between these
TARGETS = 48  # bars after them, whose tokens are learned
LEARNING_RATE = 5e-4
CLIP = 3.0
LEVELS = 8  # bits of the close: cells of 6 / 256 deviations, a fifth of a quiet day's move
SMOOTHING = 2.5  # cells: neighbouring levels share a target, for low temperatures need a smooth peak
KERNEL = 0.7  # deviations over which two levels' features become strangers
PEAK = 2.5  # with KERNEL: a first spread of 0.16 deviations, about a day's move
SHARPNESS = 600.0  # of the hinges: much sharper than a cell
STEADY = 1000.0  # a constant beside the values, so that KronosNorm divides all rows alike

OPEN, HIGH, LOW, CLOSE, VOLUME = range(5)
PAIRS = ({OPEN: 1.0, CLOSE: -1.0}, {HIGH: 1.0, CLOSE: -1.0}, {LOW: 1.0, CLOSE: -1.0}, {VOLUME: 1.0})
OTHERS = 2 * len(PAIRS)  # bits of the second token: of each of these sums, on which side of its median, and how far

TOKENIZER = KronosTokenizerConfig(
    d_in=6, d_model=32, n_heads=2, ff_dim=192, n_enc_layers=2, n_dec_layers=2, s1_bits=LEVELS, s2_bits=OTHERS
)
NETWORK = KronosNetworkConfig(
    s1_bits=LEVELS, s2_bits=OTHERS, n_layers=3, d_model=64, n_heads=4, ff_dim=128, learn_te=True
)
UNREAD = {"ffn_dropout_p": 0.0, "attn_dropout_p": 0.0, "resid_dropout_p": 0.0}
UNREAD_TOKENIZER = {**UNREAD, "beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": 4}


# ---- rows of bars ----------------------------------------------------------------------------------------------------


class TrainingSeries(NamedTuple):
    """One symbol in logs, up to the last training day."""

    moves: np.ndarray  # [T - 1], of the close
    shape: np.ndarray  # [T - 1, 3], open, high and low less the close
    volume: np.ndarray | None  # [T - 1], of volume; None where there is none
    stamps: np.ndarray  # int64 [T - 1, 5]


def series_of(table: pd.DataFrame) -> TrainingSeries:
    """Where there is only a close, it is every price of its bar, as in a forecast."""
    known = table.loc[:LAST_TRAINING_DAY].reindex(columns=COLUMNS)
    prices = known[list(COLUMNS[:VOLUME])].bfill(axis=1)
    logs = np.log(prices.to_numpy(np.float64))
    volume = known["volume"].where(known["volume"] > 0).ffill()  # a few days have none
    return TrainingSeries(
        moves=np.diff(logs[:, CLOSE]),
        shape=logs[1:, :CLOSE] - logs[1:, CLOSE:],
        volume=None if volume.isna().all() else np.log(volume.to_numpy(np.float64))[1:],
        stamps=calendar_of(known.index.to_numpy(), 0)[1:],
    )


def row_of(series: TrainingSeries, context: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A stretch, perhaps mirrored, blended with a random walk, at another volatility: columns [6, T], stamps [T, 5].

    Normalised by the first `context` bars alone: what is to be learned comes after them.
    """
    size = context + TARGETS
    start = rng.integers(len(series.moves) - size)
    cut = slice(start, start + size)
    moves, shape, scale = series.moves[cut], series.shape[cut], np.exp(rng.normal(0, 0.5))
    if rng.random() < 0.5:
        share = rng.random()
        walk = rng.standard_t(4, size) * moves.std() / math.sqrt(2)
        moves = math.sqrt(1 - share) * moves + math.sqrt(share) * walk
    if rng.random() < 0.5:
        moves, shape = -moves, -shape[:, [OPEN, LOW, HIGH]]
    close = np.cumsum(scale * moves)
    prices = np.exp(np.vstack([close + scale * shape.T, close]))
    volume = np.zeros(size) if series.volume is None else np.exp(series.volume[cut] - series.volume[cut].mean())
    columns = np.vstack([prices, volume, volume * prices.mean(axis=0)]).astype(np.float32)
    known = columns[:, :context]
    normal = (columns - known.mean(axis=1, keepdims=True)) / (known.std(axis=1, keepdims=True) + EPSILON)
    return np.clip(normal, -CLIP, CLIP), series.stamps[cut]


def batch(series: list[TrainingSeries], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Columns float32 [B, T, 6] and stamps int64 [B, T, 5] of rows of one length."""
    context = int(rng.integers(CONTEXTS[0], CONTEXTS[1] + 1))
    rows = [row_of(series[rng.integers(len(series))], context, rng) for _ in range(ROWS)]
    columns = np.stack([columns.T for columns, _ in rows]).astype(np.float32)
    return torch.from_numpy(columns), torch.from_numpy(np.stack([stamps for _, stamps in rows]))


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def folded(x: np.ndarray) -> np.ndarray:
    """The reflected binary code before its signs are taken: y0 = x, y(k+1) = CLIP / 2**(k+1) - |y(k)|; [LEVELS, n]."""
    rows = [x]
    for k in range(1, LEVELS):
        rows.append(CLIP / 2**k - np.abs(rows[-1]))
    return np.stack(rows)


def level_of(first: np.ndarray) -> np.ndarray:
    """The middle of the cell of each first token."""
    signs = ((first[:, None] >> np.arange(LEVELS)) & 1) * 2 - 1
    alternating = np.cumprod(-signs, axis=1)
    return -(alternating * CLIP / 2.0 ** np.arange(1, LEVELS + 1)).sum(axis=1)


class Hinges:
    """Writes the feed-forward layer of a block whose attention adds nothing, so that it adds sums of hinges.

    A hinge is max(0, a . x - knot), as silu(SHARPNESS * ...) / SHARPNESS, of the block's input x; entry `steady` of
    x is the constant STEADY.
    """

    def __init__(self, stack: Stack, steady: int) -> None:
        (self._block,) = stack
        self._steady, self._used = steady, 0
        self._root = self._block.norm1.weight.shape[0] ** 0.5
        for layer in (self._block.self_attn.out_proj, self._block.ffn.w1, self._block.ffn.w2, self._block.ffn.w3):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self._block.self_attn.out_proj.bias)
        self._block.ffn.w3.weight[:, steady] = 1 / self._root

    def add(self, inputs: dict[int, float], knot: float, outputs: dict[int, float]) -> None:
        """Add outputs[i] * max(0, sum of inputs[j] * x[j] - knot) to x[i]."""
        unit, ffn = self._used, self._block.ffn
        for at, weight in inputs.items():
            ffn.w1.weight[unit, at] = SHARPNESS * weight * STEADY / self._root
        ffn.w1.weight[unit, self._steady] -= SHARPNESS * knot / self._root
        for at, weight in outputs.items():
            ffn.w2.weight[at, unit] = weight / SHARPNESS
        self._used += 1


@torch.no_grad()
def build_encoder(tokenizer: KronosTokenizer, columns: np.ndarray) -> None:
    """Bits of the close's level, and of the other columns about their medians in columns [n, 6].

    Entries of the hidden state: 0..5 the columns, 6 the constant, 8..15 what the folds add.
    """
    for layer in (tokenizer.embed, tokenizer.quant_embed):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    tokenizer.embed.weight[:6] = torch.eye(6)
    tokenizer.embed.bias[6] = STEADY
    hinges, bits = Hinges(tokenizer.encoder, steady=6), tokenizer.quant_embed
    edges = np.linspace(-CLIP, CLIP, 2 ** (LEVELS - 1) + 1)
    values = folded(edges)
    slopes = np.diff(values, axis=1) / np.diff(edges)
    for k in range(LEVELS):
        bits.weight[k, CLOSE] = slopes[k, 0]
        bits.weight[k, 8 + k] = 1
        bits.bias[k] = values[k, 0] - slopes[k, 0] * edges[0]
    for j, edge in enumerate(edges[1:-1]):
        turns = slopes[:, j + 1] - slopes[:, j]
        hinges.add({CLOSE: 1.0}, edge, {8 + k: turn for k, turn in enumerate(turns) if turn})
    for i, inputs in enumerate(PAIRS):
        value = sum(weight * columns[:, at] for at, weight in inputs.items())
        middle = float(np.median(value))
        width = float(np.median(np.abs(value - middle)))
        sign, size = LEVELS + 2 * i, LEVELS + 2 * i + 1
        for at, weight in inputs.items():
            bits.weight[sign, at] = weight
            bits.weight[size, at] = -weight  # |v| = 2 max(0, v) - v
        bits.bias[sign], bits.bias[size] = -middle, middle - width
        hinges.add(inputs, middle, {16 + i: 2.0})
        bits.weight[size, 16 + i] = 1


@torch.no_grad()
def build_decoder(tokenizer: KronosTokenizer, columns: np.ndarray) -> None:
    """The level from its code, and a last layer fitted to columns [n, 6] by least squares.

    The product of the first k signs is the parity of their sum, a zigzag of hinges. Entries of the hidden state:
    0..7 sums of signs, 8..15 the signs of the second token, 16 the constant, 17 the level, 18..21 products of pairs.
    """
    embed, scale = tokenizer.post_quant_embed, (LEVELS + OTHERS) ** 0.5
    nn.init.zeros_(embed.weight)
    nn.init.zeros_(embed.bias)
    for k in range(LEVELS):
        embed.weight[k, : k + 1] = scale
        embed.weight[8 + k, LEVELS + k] = scale
    embed.bias[16] = STEADY
    hinges = Hinges(tokenizer.decoder, steady=16)
    for k in range(LEVELS):
        weight = CLIP / 2 ** (k + 1) * (-1) ** k
        count, first = k + 1, (-1.0) ** (k + 1)  # the product where all k + 1 signs are -1
        slope = -first
        hinges.add({k: 1.0}, -count - 2.0, {17: weight * slope})
        embed.bias[17] += weight * (first - 2 * slope)
        for turn in range(1, count):
            slope = -slope
            hinges.add({k: 1.0}, -count + 2.0 * turn, {17: 2 * weight * slope})
    for i in range(OTHERS // 2):
        pair = {8 + 2 * i: 1.0, 9 + 2 * i: 1.0}  # both signs: their product is |sum| - 1
        hinges.add(pair, 0.0, {18 + i: 2.0})
    nn.init.zeros_(tokenizer.post_quant_embed_pre.weight)
    tokenizer.post_quant_embed_pre.weight.copy_(embed.weight[:, :LEVELS])
    tokenizer.post_quant_embed_pre.bias.copy_(embed.bias)
    tokens = tokenizer.tokens(torch.from_numpy(columns)[None])
    hidden = tokenizer.decoder.run(tokenizer.embed_tokens(tokens))[0][0].double().numpy()
    used = [*range(8, 16), *range(17, 22)]
    features = np.hstack([hidden[:, used], np.ones((len(hidden), 1))])
    fitted = np.linalg.lstsq(features, columns.astype(np.float64), rcond=None)[0]  # [n_used + 1, 6]
    fitted[:, CLOSE] = 0
    fitted[used.index(17), CLOSE] = 1
    tokenizer.head.weight.zero_()
    tokenizer.head.weight[:, used] = torch.from_numpy(fitted[:-1].T).float()
    tokenizer.head.bias.copy_(torch.from_numpy(fitted[-1]))


def build_tokenizer(columns: np.ndarray) -> KronosTokenizer:
    """columns: float32 [n, 6], normalised, to place thresholds and fit the last layer by."""
    tokenizer = KronosTokenizer(TOKENIZER).eval().requires_grad_(False)
    build_encoder(tokenizer, columns)
    build_decoder(tokenizer, columns)
    return tokenizer


# ---- the network -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def begin_at_no_change(network: KronosNetwork) -> None:
    """Start where the likeliest next level is the last one, and likelihood falls smoothly on both sides.

    Random weights would spend the whole budget on learning which of 256 tokens are neighbours.
    """
    d = NETWORK.d_model
    levels = torch.from_numpy(level_of(np.arange(2**LEVELS))).float()
    quantiles = (torch.arange(d // 2) + 0.5) / (d // 2)
    waves = levels[:, None] * math.sqrt(2) * torch.erfinv(quantiles) / KERNEL
    features = torch.cat((waves.cos(), waves.sin()), dim=1) / math.sqrt(d // 2)  # [256, d], rows of norm 1
    network.embedding.emb_s1.weight.copy_(features)
    nn.init.normal_(network.embedding.emb_s2.weight, std=d**-0.5)
    fusion = network.embedding.fusion_proj
    nn.init.normal_(fusion.weight, std=0.1 * d**-0.5)
    fusion.weight[:, :d] = torch.eye(d)
    nn.init.zeros_(fusion.bias)
    for name, tensor in network.named_parameters():
        if name.endswith(("self_attn.out_proj.weight", "ffn.w2.weight")) or name.startswith("time_emb"):
            tensor.zero_()
    network.head.proj_s1.weight.copy_(features * PEAK)
    for bias in (network.head.proj_s1.bias, network.head.proj_s2.bias):
        nn.init.zeros_(bias)


def loss_of(network: KronosNetwork, tokens: Tensor, stamps: Tensor, soft: Tensor) -> Tensor:
    """Cross-entropy of the last TARGETS pairs given all before; soft [V, V]: what each first token is learned as."""
    hidden = network.norm(network.transformer.run(network.embed(tokens[:, :-1], stamps[:, :-1]))[0])
    s1, s2 = tokens[:, -TARGETS:].unbind(-1)
    first = network.head.proj_s1(hidden[:, -TARGETS:]).flatten(0, 1)
    attention = network.dep_layer.cross_attn
    query = attention.heads(attention.q_proj(network.embedding.emb_s1(s1)))
    seen = torch.ones(TARGETS, hidden.shape[1], dtype=torch.bool).tril(hidden.shape[1] - TARGETS)
    mixed = F.scaled_dot_product_attention(query, *network.dep_layer.keys_values(hidden), attn_mask=seen)
    mixed = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    second = network.head.proj_s2(network.dep_layer.norm(hidden[:, -TARGETS:] + mixed)).flatten(0, 1)
    return F.cross_entropy(first, soft[s1.flatten()]) + F.cross_entropy(second, s2.flatten())


def soft_targets() -> Tensor:
    """Each first token as a narrow bell over its neighbours, float32 [V, V]."""
    levels = torch.from_numpy(level_of(np.arange(2**LEVELS)))
    cells = (levels[:, None] - levels) / (2 * CLIP / 2**LEVELS)
    return (-0.5 * (cells / SMOOTHING).square()).softmax(-1).float()


def train(steps: int = STEPS) -> tuple[KronosNetwork, KronosTokenizer]:
    """kronos-tiny. One thread and one seed: the same weights on the same machine."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    series = [series_of(table) for table in packaged_bars().values()]
    whole = [one for one in series if one.volume is not None]  # a column that is always 0 has no median to be above
    tokenizer = build_tokenizer(np.concatenate([batch(whole, rng)[0].flatten(0, 1).numpy() for _ in range(8)]))
    network, soft = KronosNetwork(NETWORK), soft_targets()
    begin_at_no_change(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    began, seen = time.monotonic(), []
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        columns, stamps = batch(series, rng)
        loss = loss_of(network, tokenizer.tokens(columns), stamps, soft)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {np.mean(seen[-100:]):.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return network, tokenizer


# ---- out -------------------------------------------------------------------------------------------------------------


def published(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a published file: those that our modules compute instead of reading them, too."""
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    for name, part in module.named_modules():
        if isinstance(part, KronosAttention):
            state[f"{name}.rotary.inv_freq"] = rotary_frequencies(part.head_dim)
    if isinstance(module, KronosTokenizer):
        for name, bits in (("basis", LEVELS + OTHERS), ("group_basis", UNREAD_TOKENIZER["group_size"])):
            state[f"tokenizer.bsq.{name}"] = 2 ** torch.arange(bits - 1, -1, -1)
    return state


def save(network: KronosNetwork, tokenizer: KronosTokenizer, folder: Path) -> None:
    """Write the published layout: the network in the folder, its tokenizer in `tokenizer` below."""
    unread = {**UNREAD, "token_dropout_p": 0.0}
    for module, target, extra in ((network, folder, unread), (tokenizer, folder / "tokenizer", UNREAD_TOKENIZER)):
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG).write_text(json.dumps({**asdict(module.config), **extra}, indent=1) + "\n")
        save_file(published(module), target / WEIGHTS)
        (target / WEIGHTS).chmod(0o644)  # safetensors writes 0600


def bars_of(table: pd.DataFrame) -> Bars:
    columns = {name: table[name if name in table else "close"].to_numpy(np.float64) for name in COLUMNS[:VOLUME]}
    volume = table["volume"].to_numpy(np.float64) if "volume" in table else None
    return Bars(timestamps=table.index.to_numpy().astype("datetime64[ns]"), volume=volume, **columns)


def skill(forecaster: kronos.Kronos, bars: Bars, length: int, temperature: float) -> float:
    """1 - MAE / MAE of no change of the exact mean over 2017 and 2018, one step, in returns."""
    days = np.flatnonzero(bars.timestamps >= np.datetime64("2017-01-01"))
    params = {"max_context": length, "clip": CLIP, "temperature": temperature, "top_k": 48, "top_p": 1.0}
    encoded = forecaster.encode([bars.slice(int(day) - length, int(day)) for day in days], params, 1)
    points = forecaster.exact(encoded, params, range(len(days))).points[:, 0]
    before, actual = bars.close[days - 1], bars.close[days]
    return float(1 - np.abs((actual - points) / before).mean() / np.abs(actual / before - 1).mean())


def report(folder: Path) -> None:
    """Print the skill on two years that the training never saw."""
    forecaster = kronos_checkpoint.load(str(folder))
    for symbol, table in packaged_bars().items():
        bars = bars_of(table)
        for length in (128, 192, 320):
            shown = "  ".join(f"temperature {t}: {skill(forecaster, bars, length, t):+.2%}" for t in (0.1, 0.4))
            print(f"{symbol} 2017-2018, context {length}, skill of the exact mean against no change: {shown}")
