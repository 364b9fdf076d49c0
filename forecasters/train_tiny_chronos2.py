"""How chronos2-tiny was made: a network that starts as "the price stays", trained on bars up to 2016.

Owns its sizes, the first weights, the augmented series, the loss and the schedule. It starts with a first layer whose
attention finds the last patch and copies its last value, and learns from there how wide the quantiles are and where a
move is likely. Knows of no bar after 2016 until it prints the skill on 2017 and 2018, whatever that is. Run by
`python -m forecasters.train_tiny chronos2`.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from scipy.special import ndtri
from torch import Tensor, nn

from forecasters import Bars, chronos2
from forecasters.checkpoints import CONFIG, WEIGHTS
from forecasters.chronos2_network import Chronos2Network, Norm
from forecasters.chronos2_sizes import Chronos2NetworkConfig
from forecasters.packaged import packaged_bars

LAST_TRAINING_DAY = "2016-12-31"
SEED = 20170101
STEPS = 3000
BATCH_PATCHES = 768
LENGTHS = (
    4,
    8,
    16,
    32,
    32,
    64,
    128,
)  # patches of a context: 64 to 2,048 bars, most often what a search reads by default
AFTER = (1, 1, 1, 2, 4)  # patches that are forecast
LEARNING_RATE = 5e-4
UNDIRECTED = 0.9  # share of rows whose moves have random signs: few symbols' directions would be learnt by heart
GROUPED = 0.3  # share of batches of groups: the prices of a bar, or some of them and the volume
FIRST_STEP_WEIGHT = 0.5  # of the loss; the other steps share the rest
CLOSE, OPEN, HIGH, LOW, VOLUME = range(5)
GROUPS = ((CLOSE, VOLUME), (CLOSE, OPEN, HIGH, LOW), (CLOSE, OPEN, HIGH, LOW, VOLUME))

PATCH, LEVELS = 16, (0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99)
CHRONOS2_TINY = Chronos2NetworkConfig(
    d_model=64,
    d_kv=16,
    d_ff=160,
    num_layers=3,
    num_heads=4,
    layer_norm_epsilon=1e-6,
    rope_theta=10_000.0,
    vocab_size=2,
    context_length=2048,
    patch_size=PATCH,
    max_output_patches=4,
    time_encoding_scale=2048,
    levels=LEVELS,
)
# Channels of a token that the first weights give a meaning, and how they do it.
LAST, STEADY, SEEN, COPIED = range(4)  # last value of the patch, a constant, whether there is a value, the one copied
CONSTANT = 400.0  # so large that a norm divides all tokens nearly alike
ATTENTION = 6.3  # its square is what a step between two patches is worth to the attention
FIRST_SPREAD = 0.03  # of the quantiles of the first step, in standard deviations of a context


def moves_of(table: pd.DataFrame) -> np.ndarray:
    """By bar the logarithm of close, open, high and low over the close before, and that of the volume, [T - 1, 5].

    Up to the last training day; the prices of bars of closes alone are NaN.
    """
    table = table.loc[:LAST_TRAINING_DAY]
    before = table["close"].shift(1)
    names = ("close", "open", "high", "low")
    prices = [np.log(table[name] / before) if name in table else before * np.nan for name in names]
    volume = np.log(table["volume"].clip(lower=1)) if "volume" in table else before * np.nan
    return np.stack([*prices, volume], axis=1)[1:].astype(np.float64)


def begin_at_no_change(network: Chronos2Network) -> None:
    """Start where every quantile of every step is the last value, but for a spread that is the same for all.

    A day moves a scaled price by 0.01 to 0.05: random weights would spend the whole budget on learning to copy.
    """
    parameter, config = network.get_parameter, network.config
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Norm):  # what goes in comes out, and the constant as 1
                module.weight.fill_(CONSTANT / config.d_model**0.5)
                module.weight[STEADY] = 1 / config.d_model**0.5
        for name, tensor in network.named_parameters():
            if name.endswith(("self_attention.o.weight", "mlp.wo.weight")):
                tensor.zero_()
        # All but these channels see differences, not levels: random filters less their mean, scaled to a day's move.
        linear, bias = (parameter(f"input_patch_embedding.residual_layer.{name}") for name in ("weight", "bias"))
        values = linear[:, PATCH : 2 * PATCH]
        values.copy_(20 * (values - values.mean(1, keepdim=True)))
        linear[:, :PATCH] = 0
        linear[:, 2 * PATCH :] = 0
        linear[: COPIED + 1] = 0
        bias.zero_()
        linear[LAST, 2 * PATCH - 1] = 1
        linear[SEEN, -1] = 1
        bias[STEADY] = CONSTANT
        for name in ("weight", "bias"):
            parameter(f"input_patch_embedding.output_layer.{name}")[: COPIED + 1] = 0
        network.shared.weight.zero_()
        network.shared.weight[1, STEADY] = CONSTANT
        # In head 0 a constant asks and what is seen answers: alike but for the rotation, so the nearest patch wins.
        q, k, v, o = (parameter(f"encoder.block.0.layer.0.self_attention.{name}.weight") for name in "qkvo")
        q[: config.d_kv] = 0
        k[: config.d_kv] = 0
        v[: config.d_kv] = 0
        slower = slice(1, config.d_kv // 2)  # than one patch: a pair that turns faster sees neighbours as far
        q[slower, STEADY] = ATTENTION
        k[slower, SEEN] = ATTENTION
        v[0, LAST] = 1
        o[COPIED, 0] = 1
        for name in ("output_layer", "residual_layer"):
            parameter(f"output_patch_embedding.{name}.weight").zero_()
        parameter("output_patch_embedding.residual_layer.weight")[:, COPIED] = 1
        spread = np.outer(ndtri(config.levels), np.sqrt(np.arange(1, PATCH + 1))) * FIRST_SPREAD
        parameter("output_patch_embedding.output_layer.bias").zero_()
        parameter("output_patch_embedding.residual_layer.bias").copy_(torch.from_numpy(spread.ravel()))


def stretch(moves: list[np.ndarray], rng: np.random.Generator, size: int) -> np.ndarray:
    """Moves [size, 5] of one symbol, or of several joined where it is too short, each perhaps mirrored."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < size:
        source = moves[rng.integers(len(moves))]
        start = rng.integers(len(source) - 64)
        parts.append(source[start : start + size])
    found = np.concatenate(parts)[:size].copy()
    signs = np.full(size, rng.choice((-1, 1)))
    if rng.random() < UNDIRECTED:
        signs = rng.choice((-1, 1), size)
    found[:, :VOLUME] *= signs[:, None]
    mirrored = signs < 0  # what was the high is the low
    found[mirrored] = found[mirrored][:, [CLOSE, OPEN, LOW, HIGH, VOLUME]]
    return found


def batch(moves: list[np.ndarray], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Augmented series [N, G, T], NaN before their beginning, and what follows them [N, G, H].

    moves: of each training series. A group is of one stretch of bars, blended with a random walk where it is a close
    alone, at another volatility and level.
    """
    patches, after = int(rng.choice(LENGTHS)), int(rng.choice(AFTER))
    columns = GROUPS[rng.integers(len(GROUPS))] if rng.random() < GROUPED else (CLOSE,)
    sources = [source for source in moves if np.isfinite(source[:, list(columns)]).all()]
    length, size = patches * PATCH, (patches + after) * PATCH
    series = np.full((max(1, BATCH_PATCHES // (patches * len(columns))), len(columns), size), np.nan, np.float32)
    for row in series:
        pad = int(rng.integers(PATCH))
        found = stretch(sources, rng, size - pad)
        if columns == (CLOSE,):
            close = found[:, CLOSE]
            if rng.random() < 0.5:
                share = rng.random()
                walk = rng.standard_t(4, len(close)) * close.std() / math.sqrt(2)
                close = math.sqrt(1 - share) * close + math.sqrt(share) * walk
            found[:, CLOSE] = close
        found[:, :VOLUME] *= np.exp(rng.normal(0, 0.7))
        drift = found[:, CLOSE].mean() * rng.random()
        path = np.clip(np.cumsum(found[:, CLOSE] - drift), -8, 8)
        before = np.concatenate(([0.0], path[:-1]))
        for into, column in zip(row, columns, strict=True):
            logs = found[:, VOLUME] if column == VOLUME else path if column == CLOSE else before + found[:, column]
            into[pad:] = np.exp(logs) * 10 ** rng.uniform(0.5, 4.5) if column == VOLUME else np.exp(logs)
        prices = [place for place, column in enumerate(columns) if column != VOLUME]
        row[prices] *= 10 ** rng.uniform(-1.0, 4.5)
    whole = torch.from_numpy(series)
    return whole[..., :length], whole[..., length:]


def loss_of(network: Chronos2Network, series: Tensor, following: Tensor) -> Tensor:
    """Mean pinball loss of every level, in units of the mean step of each series before it."""
    size, after = series.shape[1], following.shape[-1] // PATCH
    series, following = series.flatten(0, 1), following.flatten(0, 1)
    tokens = network.tokens(series, torch.full_like(following, torch.nan))
    scaled = network.output_patch_embedding(network.hidden(tokens, size, after, last=after))
    answers = scaled.unflatten(-1, (-1, PATCH)).transpose(1, 2).flatten(2)  # [R, Q, H]
    targets = torch.asinh((following - tokens.loc) / tokens.scale)
    steps = torch.asinh((series - tokens.loc) / tokens.scale).diff(dim=-1).abs().nanmean(-1)  # [R]
    levels = torch.tensor(network.config.levels)[:, None]
    apart = (targets[:, None] - answers) / (steps[:, None, None] + 1e-6)
    losses = torch.maximum(levels * apart, (levels - 1) * apart).clamp_max(50).mean(1)  # [R, H]
    return FIRST_STEP_WEIGHT * losses[:, 0].mean() + (1 - FIRST_STEP_WEIGHT) * losses[:, 1:].mean()


def train(steps: int = STEPS) -> Chronos2Network:
    """Train chronos2-tiny. One thread and one seed: the same weights on the same machine."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    moves = [moves_of(table) for table in packaged_bars().values()]
    network = Chronos2Network(CHRONOS2_TINY)
    begin_at_no_change(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    began, seen = time.monotonic(), []
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(network, *batch(moves, rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {np.mean(seen[-100:]):.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return network


def save(network: Chronos2Network, folder: Path) -> None:
    """Write the published layout: config.json and model.safetensors."""
    config = network.config
    entries = {
        "architectures": ["Chronos2Model"],
        "model_type": "t5",
        **{name: getattr(config, name) for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")},
        **{name: getattr(config, name) for name in ("layer_norm_epsilon", "rope_theta", "vocab_size")},
        "feed_forward_proj": "relu",
        "dense_act_fn": "relu",
        "is_gated_act": False,
        "reg_token_id": 1,
        "chronos_config": {
            "context_length": config.context_length,
            **dict.fromkeys(("input_patch_size", "input_patch_stride", "output_patch_size"), config.patch_size),
            "max_output_patches": config.max_output_patches,
            "time_encoding_scale": config.time_encoding_scale,
            "use_arcsinh": True,
            "use_reg_token": True,
            "quantiles": list(config.levels),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(entries, indent=1) + "\n")
    save_file({name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600


def report(folder: Path) -> None:
    """Print the skill and the coverage of 80 % on two years that the training never saw."""
    forecaster = chronos2.load(str(folder))
    for symbol, table in packaged_bars().items():
        days = np.flatnonzero((table.index >= "2017-01-01") & (table.index <= "2018-12-31"))
        names = {name: name if name in table else "close" for name in ("open", "high", "low", "close")}
        columns = {name: table[column].to_numpy(np.float64) for name, column in names.items()}
        whole = Bars(timestamps=table.index.to_numpy(), volume=None, **columns)
        before, actual = whole.close[days - 1], whole.close[days]
        unchanged = np.abs(actual / before - 1).mean()
        for length, variates in ((64, "close"), (128, "close"), (512, "close"), (2048, "close"), (512, "ohlc")):
            if variates == "ohlc" and "open" not in table:
                continue
            params = {"context_length": length, "variates": variates}
            encoded = forecaster.encode([whole.slice(0, int(day)) for day in days], params, 1)
            values = forecaster.quantiles(encoded, params).values[:, 0]
            low, median, high = (values[:, LEVELS.index(level)] for level in (0.1, 0.5, 0.9))
            skill = 1 - np.abs((actual - median) / before).mean() / unchanged
            covered = ((actual >= low) & (actual <= high)).mean()
            print(f"{symbol} 2017-2018, {variates} of {length:4d} bars: skill {skill:+.2%}, 80 % cover {covered:.1%}")
