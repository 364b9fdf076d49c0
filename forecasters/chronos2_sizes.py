"""What a Chronos-2 checkpoint's config.json says, and the shapes of the weights that follow from it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chronos2NetworkConfig:
    """What the published config.json says of the network's sizes."""

    d_model: int
    d_kv: int  # of a head
    d_ff: int
    num_layers: int
    num_heads: int
    layer_norm_epsilon: float
    rope_theta: float
    vocab_size: int
    context_length: int  # points; what is older is cut off
    patch_size: int  # points, before and after the origin
    max_output_patches: int  # of one pass
    time_encoding_scale: int  # points
    levels: tuple[float, ...]  # of the quantiles that the head answers, ascending


def shapes(config: Chronos2NetworkConfig) -> dict[str, list[int]]:
    """Of every tensor of the network, by the name under which it is published and ours."""
    size, wide, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
    found = {"shared.weight": [config.vocab_size, size], "encoder.final_layer_norm.weight": [size]}
    ends = {"input": (3 * config.patch_size, size), "output": (size, len(config.levels) * config.patch_size)}
    for name, (enters, leaves) in ends.items():
        linear = {"hidden": (wide, enters), "output": (leaves, wide), "residual": (leaves, enters)}
        for layer, (outputs, inputs) in linear.items():
            found[f"{name}_patch_embedding.{layer}_layer.weight"] = [outputs, inputs]
            found[f"{name}_patch_embedding.{layer}_layer.bias"] = [outputs]
    for block in range(config.num_layers):
        layers = f"encoder.block.{block}.layer"
        for attention in (0, 1):
            for part in "qkv":
                found[f"{layers}.{attention}.self_attention.{part}.weight"] = [inner, size]
            found[f"{layers}.{attention}.self_attention.o.weight"] = [size, inner]
        found |= {f"{layers}.2.mlp.wi.weight": [wide, size], f"{layers}.2.mlp.wo.weight": [size, wide]}
        found |= {f"{layers}.{layer}.layer_norm.weight": [size] for layer in (0, 1, 2)}
    return found
