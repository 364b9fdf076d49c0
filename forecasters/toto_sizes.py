"""What a Toto checkpoint's config.json says, and the shapes of the weights that follow from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEADS = ("df", "loc_proj", "scale_proj", "mixture_weights")  # of the mixture


@dataclass(frozen=True, kw_only=True)
class TotoNetworkConfig:
    """The published config.json of Toto 1.0: its 15 names."""

    patch_size: int
    stride: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_hidden_dim: int
    dropout: float
    spacewise_every_n_layers: int  # -1: no layer over variates
    scaler_cls: str
    output_distribution_classes: Sequence[str]
    output_distribution_kwargs: Mapping[str, int]
    spacewise_first: bool = True
    use_memory_efficient_attention: bool = True  # a kernel choice of the reference; same numbers either way
    stabilize_with_global: bool = True
    scale_factor_exponent: float = 10.0

    @property
    def components(self) -> int:
        return self.output_distribution_kwargs["k_components"]

    @property
    def over_time(self) -> tuple[bool, ...]:
        """For each layer whether it attends over time (True) or over variates (False)."""
        every = self.spacewise_every_n_layers
        if every == -1:
            return (True,) * self.num_layers
        space = 0 if self.spacewise_first else every - 1
        return tuple(layer % every != space for layer in range(self.num_layers))


def shapes(config: TotoNetworkConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the network, by the network's own names."""
    size, hidden = config.embed_dim, config.mlp_hidden_dim
    linear = {"patch_embed.projection": (size, config.patch_size), "unembed": (size * config.patch_size, size)}
    linear |= {f"output_distribution.{name}": (config.components, size) for name in HEADS}
    found: dict[str, tuple[int, ...]] = {}
    for number in range(config.num_layers):
        layer = f"transformer.layers.{number}"
        found |= {f"{layer}.norm1.scale": (size,), f"{layer}.norm2.scale": (size,)}
        linear |= {f"{layer}.attention.wQKV": (3 * size, size), f"{layer}.attention.wO": (size, size)}
        linear |= {f"{layer}.mlp.0": (2 * hidden, size), f"{layer}.mlp.2": (size, hidden)}
    found |= {f"{name}.weight": shape for name, shape in linear.items()}
    return found | {f"{name}.bias": shape[:1] for name, shape in linear.items()}
