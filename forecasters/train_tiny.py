"""`python -m forecasters.train_tiny toto`: a bundled tiny checkpoint, from nothing, in about ten minutes.

Owns how toto-tiny was made: the daily closes of the packaged symbols up to 2016, their augmentation, the loss, the
schedule. Prints the loss and, at the end, the skill of the result on 2017 and 2018, whatever it is. kronos-tiny is in
train_tiny_kronos.py, chronos2-tiny in train_tiny_chronos2.py. No other code imports this module.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from forecasters import Bars, toto, train_tiny_chronos2, train_tiny_kronos
from forecasters.checkpoints import BUNDLED, CONFIG, WEIGHTS
from forecasters.packaged import packaged_bars
from forecasters.toto_network import TotoNetwork, TotoNetworkConfig
from forecasters.toto_sampling import Mixture

LAST_TRAINING_DAY = "2016-12-31"
SEED = 20170101
STEPS = 2500
BATCH_PATCHES = 2048
LENGTHS = (4, 8, 16, 32, 64, 128)  # patches a row: 128 to 4,096 bars, what a context may hold
LEARNING_RATE = 1e-3
UNDIRECTED = 0.75  # share of rows whose moves have random signs: few symbols' directions would be learnt by heart
FIRST_STEP_WEIGHT = 0.5  # of the loss; the other steps of the patch share the rest

TOTO_TINY = TotoNetworkConfig(
    patch_size=32,
    stride=32,
    embed_dim=64,
    num_layers=4,
    num_heads=4,
    mlp_hidden_dim=128,
    dropout=0.0,
    spacewise_every_n_layers=4,
    scaler_cls="<class 'model.scaler.CausalPatchStdMeanScaler'>",
    output_distribution_classes=["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
    output_distribution_kwargs={"k_components": 4},
    spacewise_first=False,
    use_memory_efficient_attention=False,
    stabilize_with_global=True,
    scale_factor_exponent=10.0,
)


def closes() -> dict[str, pd.Series]:
    """Daily closes of the packaged symbols, by date."""
    return {symbol: pd.Series(table["close"], dtype=np.float64) for symbol, table in packaged_bars().items()}


def training_moves(series: pd.Series) -> np.ndarray:
    """Log returns [T - 1] up to the last training day."""
    return np.diff(np.log(series.loc[:LAST_TRAINING_DAY].to_numpy()))


def begin_at_no_change(network: TotoNetwork) -> None:
    """Start where every step's location is the patch's last value, exactly.

    A day moves a scaled price by 0.01 to 0.05: random weights would spend the whole budget on learning to copy.
    """
    parameter, config = network.get_parameter, network.config
    with torch.no_grad():
        embed = parameter("patch_embed.projection.weight")  # [D, P]
        # All but the first row see differences, not levels: random filters less their mean, scaled up to a day's move.
        embed.copy_(20 * (embed - embed.mean(1, keepdim=True)))
        embed[0] = 0
        embed[0, -1] = 1
        silent = ("wO.weight", "wO.bias", "mlp.2.weight", "mlp.2.bias", "projection.bias", "unembed.bias")
        for name, tensor in network.named_parameters():
            if name.endswith((*silent, "loc_proj.weight", "loc_proj.bias")):
                tensor.zero_()
        copied = parameter("unembed.weight").view(config.patch_size, config.embed_dim, -1)
        copied[:, 0] = 0
        copied[:, 0, 0] = 1
        parameter("output_distribution.loc_proj.weight")[:, 0] = 1
        parameter("output_distribution.scale_proj.bias").copy_(torch.linspace(-4, -1, config.components))


def batch(returns: list[np.ndarray], rng: np.random.Generator, patch: int) -> tuple[Tensor, Tensor]:
    """Augmented price series [B, 1, T + P] and their left padding [B]; the last patch is only a target.

    returns: log returns of each training series. A row is a stretch of one of them, or of several joined where it is
    too short, perhaps reversed, mirrored or without direction, blended with a random walk, at another volatility and
    level.
    """
    patches = int(rng.choice(LENGTHS))
    rows, length = BATCH_PATCHES // patches, (patches + 1) * patch
    series, pads = np.zeros((rows, 1, length), np.float32), rng.integers(0, patch, rows)
    for row, pad in zip(series[:, 0], pads, strict=True):
        parts, size = [], int(length - pad)
        while sum(map(len, parts)) < size:
            source = returns[rng.integers(len(returns))]
            start = rng.integers(len(source) - 64)
            parts.append(source[start : start + size])
        moves = np.concatenate(parts)[:size]
        moves = moves[:: rng.choice((-1, 1))] * rng.choice((-1, 1))
        if rng.random() < UNDIRECTED:
            moves = moves * rng.choice((-1, 1), size)
        if rng.random() < 0.5:
            share = rng.random()
            walk = rng.standard_t(4, size) * moves.std() / math.sqrt(2)
            moves = math.sqrt(1 - share) * moves + math.sqrt(share) * walk
        moves = moves * np.exp(rng.normal(0, 0.7))
        path = np.cumsum(moves - moves.mean() * rng.random())
        row[pad:] = np.exp(np.clip(path, -8, 8)) * 10 ** rng.uniform(0.5, 4.5)
    return torch.from_numpy(series), torch.from_numpy(pads)


def log_likelihood(mixture: Mixture, y: Tensor) -> Tensor:
    """log p(y) of Student-T mixtures [..., h, K] at y [..., h]."""
    df, z = mixture.df, (y[..., None] - mixture.loc) / mixture.scale
    log_t = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * torch.log(math.pi * df)
    log_t = log_t - torch.log(mixture.scale) - (df + 1) / 2 * torch.log1p(z.square() / df)
    return torch.logsumexp(torch.log(mixture.probs + 1e-12) + log_t, -1)


def loss_of(network: TotoNetwork, series: Tensor, pads: Tensor) -> Tensor:
    """Mean negative log likelihood of each patch given those before it, in units of each patch's own scale."""
    patch = network.config.patch_size
    mixture, loc, scale = network(series[..., :-patch], pads)
    targets = series.unflatten(-1, (-1, patch))[:, :, 1:]  # [B, 1, S, P]
    nll = -log_likelihood(mixture, (targets - loc[..., None]) / scale[..., None])
    return FIRST_STEP_WEIGHT * nll[..., 0].mean() + (1 - FIRST_STEP_WEIGHT) * nll[..., 1:].mean()


def train_toto(steps: int = STEPS) -> TotoNetwork:
    """Train toto-tiny. One thread and one seed: the same weights on the same machine."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    returns = [training_moves(series) for series in closes().values()]
    network = TotoNetwork(TOTO_TINY)
    begin_at_no_change(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    began, seen = time.monotonic(), []
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(network, *batch(returns, rng, TOTO_TINY.patch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {np.mean(seen[-100:]):.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return network


def save(network: TotoNetwork, folder: Path) -> None:
    """Write the published layout: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(asdict(network.config), indent=1) + "\n")
    state = {f"model.{name}": tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600


def skill(forecaster: toto.Toto, series: pd.Series, first: str, last: str, length: int) -> dict[str, float]:
    """1 - MAE / MAE of no change of the median and the mean over the days [first, last], one step, in returns."""
    days = np.flatnonzero((series.index >= first) & (series.index <= last))
    values, timestamps = series.to_numpy(np.float64), series.index.to_numpy()
    whole = Bars(timestamps=timestamps, open=values, high=values, low=values, close=values, volume=None)
    encoded = forecaster.encode([whole.slice(0, int(day)) for day in days], {"context_length": length}, 1)
    samples = forecaster.draw(encoded, {"num_samples": 1024}, range(len(days)))[:, :, 0]
    before, actual = values[days - 1], values[days]
    points = {"median": np.median(samples, axis=1), "mean": forecaster.mean(encoded)[:, 0]}
    unchanged = np.abs(actual / before - 1).mean()
    return {name: float(1 - np.abs((actual - point) / before).mean() / unchanged) for name, point in points.items()}


def report(folder: Path) -> None:
    """Print the skill on two years that the training never saw."""
    forecaster = toto.load(str(folder))
    for symbol, series in closes().items():
        for length in (128, 512, 2048, 4096):
            figures = skill(forecaster, series, "2017-01-01", "2018-12-31", length)
            shown = "  ".join(f"{name} {value:+.2%}" for name, value in figures.items())
            print(f"{symbol} 2017-2018, context {length:4d}, skill against no change: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a bundled tiny checkpoint.")
    parser.add_argument("model", choices=["toto", "kronos", "chronos2"])
    parser.add_argument("--out", type=Path, help="folder to write to, by default where the bundled one is")
    parser.add_argument("--steps", type=int, help="by default as the bundled one")
    args = parser.parse_args()
    out = args.out or BUNDLED / f"{args.model}-tiny"
    if args.model == "kronos":
        train_tiny_kronos.save(*train_tiny_kronos.train(args.steps or train_tiny_kronos.STEPS), out)
        train_tiny_kronos.report(out)
    elif args.model == "chronos2":
        train_tiny_chronos2.save(train_tiny_chronos2.train(args.steps or train_tiny_chronos2.STEPS), out)
        train_tiny_chronos2.report(out)
    else:
        save(train_toto(args.steps or STEPS), out)
        report(out)


if __name__ == "__main__":
    main()
