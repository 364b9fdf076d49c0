"""A published Chronos-2 checkpoint: its config.json as that of our network; its tensors' names are ours.

Refuses what this network does not have. Knows nothing of how the network runs.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from forecasters import BY_DEFAULT, CheckpointError, Running
from forecasters.checkpoints import CONFIG, Checkpoint, check, resolve
from forecasters.chronos2_model import CHRONOS2
from forecasters.chronos2_sizes import Chronos2NetworkConfig, shapes

if TYPE_CHECKING:
    from forecasters.chronos2 import Chronos2

_SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_PATCHES = ("context_length", "input_patch_size", "input_patch_stride", "output_patch_size")
# Where config.json says anything of these, it must be this.
_FIXED: dict[str, Any] = {
    "architectures": ["Chronos2Model"],
    "feed_forward_proj": "relu",
    "dense_act_fn": "relu",
    "is_gated_act": False,
    "reg_token_id": 1,
    "vocab_size": 2,
}
_NUMBERS = {"layer_norm_epsilon": 1e-6, "rope_theta": 10_000.0}  # and what they are where they are left out
# Of training, and what the reference's library writes for itself.
_UNUSED = (
    *("chronos_pipeline_class", "dropout_rate", "dtype", "initializer_factor", "is_encoder_decoder", "model_type"),
    *("pad_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"),
)
_FORECAST = (*_PATCHES, "quantiles", "use_arcsinh", "use_reg_token")
_FORECAST_OPTIONAL = ("max_output_patches", "time_encoding_scale")


def read_config(checkpoint: Checkpoint) -> Chronos2NetworkConfig:
    """The checkpoint's config.json. Raises CheckpointError on a key or a value that this network does not have."""
    entries = checkpoint.config((*_SIZES, "chronos_config"), (*_FIXED, *_NUMBERS, *_UNUSED))
    path = checkpoint.folder / CONFIG

    def need(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}, expected {expected}")

    values: dict[str, Any] = {**_FIXED, **_NUMBERS, **entries}
    need("chronos_config", isinstance(entries["chronos_config"], dict), "a table of names and values")
    forecast = entries["chronos_config"]
    for key in _FORECAST:
        if key not in forecast:
            raise CheckpointError(f"{path}: chronos_config has no {key!r}; use the {CONFIG} published with the weights")
    for key in forecast:
        if key not in (*_FORECAST, *_FORECAST_OPTIONAL):
            raise CheckpointError(f"{path}: unknown key {key!r} in chronos_config; this is not of this network")
    values |= {"max_output_patches": 1, "time_encoding_scale": forecast["context_length"], **forecast}
    for key in (*_SIZES, *_PATCHES, *_FORECAST_OPTIONAL):
        need(key, type(values[key]) is int and values[key] > 0, "a positive whole number")
    for key, expected in (*_FIXED.items(), ("use_arcsinh", True), ("use_reg_token", True)):
        need(key, values[key] == expected, repr(expected))
    for key in _NUMBERS:
        need(key, type(values[key]) in (int, float) and values[key] > 0, "a positive number")
    for key in ("input_patch_stride", "output_patch_size"):
        need(key, values[key] == values["input_patch_size"], "input_patch_size")
    need("d_kv", values["d_kv"] % 2 == 0, "an even number")
    need("quantiles", _ascending(values["quantiles"]), "ascending numbers between 0 and 1")
    return Chronos2NetworkConfig(
        **{key: values[key] for key in (*_SIZES, *_NUMBERS, *_FORECAST_OPTIONAL, "vocab_size", "context_length")},
        patch_size=values["input_patch_size"],
        levels=tuple(values["quantiles"]),
    )


def _ascending(levels: Any) -> bool:
    numbers = isinstance(levels, list) and len(levels) > 0 and all(type(level) is float for level in levels)
    return numbers and bool((np.diff([0.0, *levels, 1.0]) > 0).all())


def load(
    checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT
) -> Chronos2:
    """`chronos2.load`."""
    from forecasters import chronos2  # late: it brings torch, which `inspect` does not need

    return chronos2.load(checkpoint, revision=revision, device=device, running=running)


def inspect(checkpoint: str, *, revision: str | None = None, running: Running = BY_DEFAULT) -> str:
    """The fingerprint that `load` would give its forecaster, without reading the weights into a network.

    Raises CheckpointError where the checkpoint does not fit.
    """
    found = resolve(checkpoint, revision=revision, setting="[chronos2] checkpoint")
    check(found, shapes(read_config(found)), str)
    return fingerprint_of(found, running.dtype)


def fingerprint_of(found: Checkpoint, dtype: str) -> str:
    return hashlib.sha256(f"{CHRONOS2.name} {found.digest} {dtype}".encode()).hexdigest()
