"""Networks with random weights at the sizes that are published, and a random walk for them to forecast.

What a forecast costs does not depend on what the weights have learnt, but for how many distinct tokens are drawn.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from forecasters import Bars, toto_network
from forecasters.chronos2_network import Chronos2Network
from forecasters.chronos2_sizes import Chronos2NetworkConfig
from forecasters.kronos import Kronos
from forecasters.kronos_network import KronosNetwork, KronosNetworkConfig, KronosTokenizer, KronosTokenizerConfig

TOTO_BASE = toto_network.TotoNetworkConfig(
    patch_size=64,
    stride=64,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    mlp_hidden_dim=3072,
    dropout=0.1,
    spacewise_every_n_layers=12,
    scaler_cls="<class 'model.scaler.CausalPatchStdMeanScaler'>",
    output_distribution_classes=["<class 'model.distribution.MixtureOfStudentTsOutput'>"],
    output_distribution_kwargs={"k_components": 24},
    spacewise_first=False,
)
KRONOS_BASE = KronosNetworkConfig(
    s1_bits=10, s2_bits=10, n_layers=12, d_model=832, n_heads=16, ff_dim=2048, learn_te=True
)
KRONOS_SMALL = KronosNetworkConfig(
    s1_bits=10, s2_bits=10, n_layers=8, d_model=512, n_heads=8, ff_dim=1024, learn_te=True
)
KRONOS_TOKENIZER = KronosTokenizerConfig(
    d_in=6, d_model=256, n_heads=4, ff_dim=512, n_enc_layers=4, n_dec_layers=4, s1_bits=10, s2_bits=10
)
CHRONOS2_BASE = Chronos2NetworkConfig(
    d_model=768,
    d_kv=64,
    d_ff=3072,
    num_layers=12,
    num_heads=12,
    layer_norm_epsilon=1e-6,
    rope_theta=10_000.0,
    vocab_size=2,
    context_length=8192,
    patch_size=16,
    max_output_patches=64,
    time_encoding_scale=8192,
    levels=(0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99),
)
KRONOS_SEES = 512  # bars, of Kronos-small and -base


def random_toto() -> toto_network.TotoNetwork:
    """At the size of Toto-Open-Base-1.0, 151 M parameters."""
    torch.manual_seed(0)
    return toto_network.TotoNetwork(TOTO_BASE)


def random_chronos2() -> Chronos2Network:
    """At the size of amazon/chronos-2, 119 M parameters."""
    torch.manual_seed(0)
    return Chronos2Network(CHRONOS2_BASE)


def random_kronos(size: KronosNetworkConfig = KRONOS_BASE) -> Kronos:
    """Both of `random_kronos_networks`, loaded."""
    network, tokenizer = random_kronos_networks(size)
    return Kronos(tokenizer, network, fingerprint="random", network_context=KRONOS_SEES)


def random_kronos_networks(size: KronosNetworkConfig) -> tuple[KronosNetwork, KronosTokenizer]:
    """With random weights, spread so that the second token depends on the first and logits have a shape."""
    torch.manual_seed(0)
    network, tokenizer = KronosNetwork(size), KronosTokenizer(KRONOS_TOKENIZER)
    for module in (*network.modules(), *tokenizer.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=size.d_model**-0.5)
    attention = network.dep_layer.cross_attn
    with torch.no_grad():
        for layer, factor in ((attention.q_proj, 60), (attention.out_proj, 4), (network.head.proj_s1, 1.5)):
            layer.weight.mul_(factor)
    return network, tokenizer


def random_checkpoints(folder: Path, kronos_size: KronosNetworkConfig = KRONOS_BASE) -> dict[str, str]:
    """Both models as checkpoints on disk that load as published ones do: folders by model.

    Kronos' tokenizer is in `tokenizer` within its folder.
    """
    kronos, tokenizer = random_kronos_networks(kronos_size)
    parts: tuple[tuple[str, nn.Module, Any], ...] = (
        ("toto", random_toto(), TOTO_BASE),
        ("kronos", kronos, kronos_size),
        ("kronos/tokenizer", tokenizer, KRONOS_TOKENIZER),
    )
    for name, module, config in parts:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(asdict(config)))
        weights = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(weights, place / "model.safetensors")
    return {model: str(folder / model) for model in ("toto", "kronos")}


def random_bars(count: int) -> Bars:
    """A random walk of daily bars."""
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, count)))
    opening = close * np.exp(rng.normal(0, 0.003, count))
    spread = np.exp(np.abs(rng.normal(0, 0.004, (2, count))))
    return Bars(
        timestamps=np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "D"),
        open=opening,
        high=np.maximum(opening, close) * spread[0],
        low=np.minimum(opening, close) / spread[1],
        close=close,
        volume=rng.lognormal(12, 0.5, count),
    )
