"""A published Toto checkpoint: its config.json as that of our network, and its tensors' names as ours.

Refuses what this network does not have, from the files' headers and without torch. Knows nothing of how it runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from forecasters import BY_DEFAULT, CheckpointError, Running
from forecasters.checkpoints import CONFIG, Checkpoint, check, resolve
from forecasters.toto_model import TOTO
from forecasters.toto_sizes import TotoNetworkConfig, shapes

if TYPE_CHECKING:
    from forecasters.toto import Toto

_SCALER = "<class 'model.scaler.CausalPatchStdMeanScaler'>"
_MIXTURE = "<class 'model.distribution.MixtureOfStudentTsOutput'>"
_LOADER_KEYS = ("pre_xformers_checkpoint",)  # read by the reference's loader only; the tensor names say as much


def read_config(checkpoint: Checkpoint) -> TotoNetworkConfig:
    """The checkpoint's config.json. Raises CheckpointError on a key or a value that this network does not have."""
    optional = [field.name for field in fields(TotoNetworkConfig) if field.default is not MISSING]
    required = [field.name for field in fields(TotoNetworkConfig) if field.default is MISSING]
    entries = checkpoint.config(required, (*optional, *_LOADER_KEYS))
    path = checkpoint.folder / CONFIG

    def need(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {key} is {entries[key]!r}, expected {expected}")

    for key in ("patch_size", "stride", "embed_dim", "num_layers", "num_heads", "mlp_hidden_dim"):
        need(key, type(entries[key]) is int and entries[key] > 0, "a positive whole number")
    kwargs, every = entries["output_distribution_kwargs"], entries["spacewise_every_n_layers"]
    components = kwargs.get("k_components") if isinstance(kwargs, dict) and len(kwargs) == 1 else None
    need("output_distribution_kwargs", type(components) is int and components > 0, '{"k_components": a whole number}')
    need("scaler_cls", entries["scaler_cls"] == _SCALER, _SCALER)
    need("output_distribution_classes", entries["output_distribution_classes"] == [_MIXTURE], f"[{_MIXTURE}]")
    need("stride", entries["stride"] == entries["patch_size"], "patch_size")
    need("embed_dim", entries["embed_dim"] % (2 * entries["num_heads"]) == 0, "an even multiple of num_heads")
    divides = type(every) is int and (every == -1 or (every > 0 and entries["num_layers"] % every == 0))
    need("spacewise_every_n_layers", divides, "-1 or a divisor of num_layers")
    return TotoNetworkConfig(**{key: value for key, value in entries.items() if key not in _LOADER_KEYS})


def rename(stored: str) -> str | None:
    """A published tensor name to ours; None for the rotation's frequencies, which are computed."""
    if stored.endswith("rotary_emb.freqs"):
        return None
    name = stored.removeprefix("model.")
    return name.replace(".mlp.0.w12.", ".mlp.0.").replace(".mlp.0.w3.", ".mlp.2.")  # saved with a fused SwiGLU


def load(checkpoint: str, *, revision: str | None = None, device: str = "cpu", running: Running = BY_DEFAULT) -> Toto:
    """`toto.load`."""
    from forecasters import toto  # late: it brings torch, which `inspect` does not need

    return toto.load(checkpoint, revision=revision, device=device, running=running)


def inspect(checkpoint: str, *, revision: str | None = None, running: Running = BY_DEFAULT) -> str:
    """The fingerprint that `load` would give its forecaster, without reading the weights into a network.

    Raises CheckpointError where the checkpoint does not fit.
    """
    found = resolve(checkpoint, revision=revision, setting="[toto] checkpoint")
    check(found, shapes(read_config(found)), rename)
    return fingerprint_of(found, running.dtype)


def fingerprint_of(found: Checkpoint, dtype: str) -> str:
    return hashlib.sha256(f"{TOTO.name} {found.digest} {dtype}".encode()).hexdigest()
