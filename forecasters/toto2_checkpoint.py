"""A published Toto 2.0 checkpoint: its config.json as that of our network; its tensors' names are ours.

Refuses what this network does not have: of what the public implementations can be configured to be, it is what all five
published checkpoints are. Knows nothing of how the network runs.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from forecasters import CheckpointError
from forecasters.checkpoints import CONFIG, Checkpoint
from forecasters.toto2_model import TOTO2
from forecasters.toto2_network import Toto2Network, Toto2NetworkConfig

_SIZES = ("patch_size", "d_model", "d_ff", "num_heads", "num_layers", "layer_group_size")
# Left out or null they are as these say.
_DERIVED = ("num_groups", "heads_per_group", "qk_dim", "v_dim")
# What must be said, and be this: left out, they are something else to the public implementations.
_SAID: dict[str, Any] = {
    "variate_layer_first": False,
    "attn_bias": True,
    "qk_norm": False,
    "per_dim_scale": True,
    "use_xpos": True,
}
# Where config.json says anything of these, it must be this.
_FIXED: dict[str, Any] = {
    "mlp_bias": False,
    "norm_include_weight": False,
    "qk_norm_include_weight": False,
    "num_output_patches": 1,
    "pre_norm": True,
    "dropout_p": 0.0,
}
LEAST_PATCH = 8  # points; with fewer the public implementations take a patch's statistics from elsewhere


def read_config(checkpoint: Checkpoint) -> Toto2NetworkConfig:
    """The checkpoint's config.json. Raises CheckpointError on a key that is missing or that this network has not.

    Other keys are not looked at, as by the public implementations; what the weights were multiplied by in training is
    read from the weights.
    """
    required = (*_SIZES, "num_variate_layers_per_group", "norm_eps", *_SAID)
    entries = checkpoint.config(required, optional=None)
    path = checkpoint.folder / CONFIG
    values: dict[str, Any] = {**dict.fromkeys(_DERIVED), **_FIXED, **entries}

    def need(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, expected {expected}")

    for key in _SIZES:
        need(key, type(values[key]) is int and values[key] > 0, "a positive whole number")
    if values["qk_norm_include_weight"] is None:
        values["qk_norm_include_weight"] = values["norm_include_weight"]
    for key, expected in {**_SAID, **_FIXED}.items():
        need(key, values[key] == expected, repr(expected))
    heads, width = values["num_heads"], values["d_model"]
    need("num_groups", values["num_groups"] in (None, heads), "num_heads")
    need("heads_per_group", values["heads_per_group"] in (None, 1), "1")
    need("d_model", width % heads == 0, "a multiple of num_heads")
    values["qk_dim"] = width // heads if values["qk_dim"] is None else values["qk_dim"]
    values["v_dim"] = values["qk_dim"] if values["v_dim"] is None else values["v_dim"]
    need(
        "qk_dim",
        type(values["qk_dim"]) is int and values["qk_dim"] > 0 and values["qk_dim"] % 4 == 0,
        "a multiple of 4",
    )
    need("v_dim", type(values["v_dim"]) is int and values["v_dim"] > 0, "a positive whole number")
    need("patch_size", values["patch_size"] >= LEAST_PATCH, f"at least {LEAST_PATCH}")
    group, variates = values["layer_group_size"], values["num_variate_layers_per_group"]
    need("layer_group_size", values["num_layers"] % group == 0, "a divisor of num_layers")
    need("num_variate_layers_per_group", type(variates) is int and 0 <= variates < group, "fewer than layer_group_size")
    need("norm_eps", type(values["norm_eps"]) in (int, float) and values["norm_eps"] > 0, "a positive number")
    return Toto2NetworkConfig(**{key: values[key] for key in Toto2NetworkConfig.__dataclass_fields__})


def build(checkpoint: Checkpoint) -> Toto2Network:
    with torch.device("meta"):
        return Toto2Network(read_config(checkpoint))


def fingerprint_of(found: Checkpoint, dtype: str) -> str:
    return hashlib.sha256(f"{TOTO2.name} {found.digest} {dtype}".encode()).hexdigest()
