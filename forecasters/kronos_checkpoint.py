"""Kronos from its files: the configurations of a network and of its tokenizer, their weights, their fingerprint.

Owns which tokenizer and which context a published network has, and the rule that both use the same tokens. How a
checkpoint is found and read strictly is in checkpoints.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forecasters import BY_DEFAULT, CheckpointError, Running
from forecasters.checkpoints import CONFIG, Checkpoint, check, load_into, resolve
from forecasters.kronos_model import KRONOS
from forecasters.kronos_sizes import (
    COLUMNS,
    DEPENDENCY_HEADS,
    NETWORK_CONTEXT,
    KronosNetworkConfig,
    KronosTokenizerConfig,
    network_shapes,
    tokenizer_shapes,
)

if TYPE_CHECKING:
    from forecasters.kronos import Kronos

MAX_BITS = 16  # of a token; 10 in the published networks
NETWORK_CONTEXTS: Mapping[str, int] = {"NeoQuasar/Kronos-mini": 2048}
TOKENIZERS: Mapping[str, str] = {
    "NeoQuasar/Kronos-mini": "NeoQuasar/Kronos-Tokenizer-2k",
    "NeoQuasar/Kronos-small": "NeoQuasar/Kronos-Tokenizer-base",
    "NeoQuasar/Kronos-base": "NeoQuasar/Kronos-Tokenizer-base",
}

_UNREAD = tuple(f"{part}_dropout_p" for part in ("ffn", "attn", "resid", "token"))  # of training only
_UNREAD_TOKENIZER = (*_UNREAD, "beta", "gamma0", "gamma", "zeta", "group_size")
_DROPPED = ("rotary.inv_freq", "tokenizer.bsq.basis", "tokenizer.bsq.group_basis")  # computed, or never read


def _rename(stored: str) -> str | None:
    return None if stored.endswith(_DROPPED) else stored


def read_config(checkpoint: Checkpoint) -> KronosNetworkConfig:
    """A network's config.json. Raises CheckpointError on a key or a value that this network does not have."""
    entries, path = _read_entries(checkpoint, KronosNetworkConfig, _UNREAD)
    if type(entries["learn_te"]) is not bool:
        raise CheckpointError(f"{path}: learn_te is {entries['learn_te']!r}, expected true or false")
    if entries["d_model"] % DEPENDENCY_HEADS:
        raise CheckpointError(f"{path}: d_model is {entries['d_model']}, expected a multiple of {DEPENDENCY_HEADS}")
    return KronosNetworkConfig(**entries)


def read_tokenizer_config(checkpoint: Checkpoint) -> KronosTokenizerConfig:
    """A tokenizer's config.json. Raises CheckpointError on a key or a value that this tokenizer does not have."""
    entries, path = _read_entries(checkpoint, KronosTokenizerConfig, _UNREAD_TOKENIZER)
    if entries["d_in"] != len(COLUMNS):
        raise CheckpointError(f"{path}: d_in is {entries['d_in']}, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
    return KronosTokenizerConfig(**entries)


def _read_entries(checkpoint: Checkpoint, cls: type[Any], unread: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """The entries of a config.json that a dataclass has, all sizes among them checked, and the file's path."""
    keys, path = [field.name for field in fields(cls)], checkpoint.folder / CONFIG
    found = checkpoint.config(keys, unread)
    entries = {key: found[key] for key in keys}
    for key, value in entries.items():
        if key != "learn_te" and (type(value) is not int or value < 1):
            raise CheckpointError(f"{path}: {key} is {value!r}, expected a positive whole number")
    if entries["d_model"] % (2 * entries["n_heads"]):
        raise CheckpointError(f"{path}: d_model is {entries['d_model']}, expected an even multiple of n_heads")
    if entries["s1_bits"] > MAX_BITS or entries["s2_bits"] > MAX_BITS:
        raise CheckpointError(f"{path}: tokens of more than {MAX_BITS} bits; expected at most {MAX_BITS}")
    return entries, path


def tokenizer_of(checkpoint: str) -> str:
    """The tokenizer that belongs to a network: as published, else the folder `tokenizer` in the network's own."""
    return TOKENIZERS.get(checkpoint, f"{checkpoint.rstrip('/')}/tokenizer")


def inspect(
    checkpoint: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    tokenizer_revision: str | None = None,
    network_context: int | None = None,
    running: Running = BY_DEFAULT,
) -> str:
    """The fingerprint that `load` would give, from the files' headers and bytes. Raises CheckpointError."""
    pair = _resolve(checkpoint, revision, tokenizer, tokenizer_revision)
    config, coder = _configs(*pair)
    check(pair[0], network_shapes(config), _rename)
    check(pair[1], tokenizer_shapes(coder), _rename)
    return _fingerprint(*pair, _context_of(checkpoint, network_context), running.dtype)


def load(
    checkpoint: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    tokenizer: str | None = None,
    tokenizer_revision: str | None = None,
    network_context: int | None = None,
    running: Running = BY_DEFAULT,
) -> Kronos:
    """Load a network and its tokenizer (`checkpoints.resolve`, each) onto a device.

    tokenizer: the one that belongs to the network (`tokenizer_of`) unless named.
    network_context: bars the network sees at most; as published unless given.
    running: its dtype is the network's, the tokenizer stays in float32.
    Raises CheckpointError and SettingError.
    """
    import torch  # late, as all that brings it: `inspect` does not need it

    from forecasters.compilation import decide
    from forecasters.kronos import Kronos
    from forecasters.kronos_network import KronosNetwork, KronosTokenizer
    from forecasters.low_precision import placed

    policy = decide(KRONOS.name, device=device, running=running)
    pair = _resolve(checkpoint, revision, tokenizer, tokenizer_revision)
    sizes = _configs(*pair)
    with torch.device("meta"):
        network, coder = KronosNetwork(sizes[0]), KronosTokenizer(sizes[1])
    load_into(pair[0], network, _rename)
    load_into(pair[1], coder, _rename)
    placed(network, network.transformer, device=device, dtype=running.dtype)
    context = _context_of(checkpoint, network_context)
    return Kronos(
        coder.to(device),
        network,
        fingerprint=_fingerprint(*pair, context, running.dtype),
        network_context=context,
        policy=policy,
        chunk=running.chunk,
    )


def _resolve(
    checkpoint: str, revision: str | None, tokenizer: str | None, tokenizer_revision: str | None
) -> tuple[Checkpoint, Checkpoint]:
    found = resolve(checkpoint, revision=revision, setting="[kronos] checkpoint")
    source = tokenizer or tokenizer_of(checkpoint)
    return found, resolve(source, revision=tokenizer_revision, setting="[kronos] tokenizer")


def _configs(checkpoint: Checkpoint, tokenizer: Checkpoint) -> tuple[KronosNetworkConfig, KronosTokenizerConfig]:
    """Of both. Raises CheckpointError where they do not use the same tokens."""
    config, coder = read_config(checkpoint), read_tokenizer_config(tokenizer)
    if (config.s1_bits, config.s2_bits) != (coder.s1_bits, coder.s2_bits):
        raise CheckpointError(
            f"the tokenizer {tokenizer.source!r} makes tokens of {coder.s1_bits}+{coder.s2_bits} bits, the network "
            f"{checkpoint.source!r} reads {config.s1_bits}+{config.s2_bits}; name the tokenizer published with it"
        )
    return config, coder


def _context_of(checkpoint: str, network_context: int | None) -> int:
    return network_context or NETWORK_CONTEXTS.get(checkpoint, NETWORK_CONTEXT)


def _fingerprint(checkpoint: Checkpoint, tokenizer: Checkpoint, network_context: int, dtype: str) -> str:
    identity = f"{KRONOS.name} {checkpoint.digest} {tokenizer.digest} {network_context} {dtype}"
    return hashlib.sha256(identity.encode()).hexdigest()
