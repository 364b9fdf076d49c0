"""What the config.json of Kronos' two networks says, and the shapes of the weights that follow. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = ("open", "high", "low", "close", "volume", "amount")
NETWORK_CONTEXT = 512  # bars the published networks were trained on; the window slides beyond it
CALENDAR = (("minute", 60), ("hour", 24), ("weekday", 7), ("day", 32), ("month", 13))  # stamp columns and table sizes
DEPENDENCY_HEADS = 4  # the published layout has four whatever n_heads is

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class KronosTokenizerConfig:
    """The entries of a tokenizer's config.json that inference reads."""

    d_in: int
    d_model: int
    n_heads: int
    ff_dim: int
    n_enc_layers: int
    n_dec_layers: int
    s1_bits: int
    s2_bits: int


@dataclass(frozen=True, kw_only=True)
class KronosNetworkConfig:
    """The entries of a network's config.json that inference reads."""

    s1_bits: int
    s2_bits: int
    n_layers: int
    d_model: int
    n_heads: int
    ff_dim: int
    learn_te: bool

    @property
    def s1_size(self) -> int:
        """First tokens that there are."""
        return 2**self.s1_bits

    @property
    def s2_size(self) -> int:
        return 2**self.s2_bits


def network_shapes(config: KronosNetworkConfig) -> Shapes:
    """Of every tensor of the network, by its own names."""
    size, table = config.d_model, "weight" if config.learn_te else "emb.weight"
    found: Shapes = {
        "embedding.emb_s1.weight": (config.s1_size, size),
        "embedding.emb_s2.weight": (config.s2_size, size),
    }
    found |= {f"time_emb.{name}_embed.{table}": (count, size) for name, count in CALENDAR}
    found |= {"norm.weight": (size,), "dep_layer.norm.weight": (size,)}
    found |= _linear("embedding.fusion_proj", size, 2 * size) | _attention("dep_layer.cross_attn", size)
    found |= _linear("head.proj_s1", config.s1_size, size) | _linear("head.proj_s2", config.s2_size, size)
    return found | _stack("transformer", config.n_layers, size, config.ff_dim)


def tokenizer_shapes(config: KronosTokenizerConfig) -> Shapes:
    """Of every tensor of the tokenizer, by its own names."""
    size, bits = config.d_model, config.s1_bits + config.s2_bits
    found = _linear("embed", size, config.d_in) | _linear("head", config.d_in, size)
    found |= _linear("quant_embed", bits, size) | _linear("post_quant_embed", size, bits)
    found |= _linear("post_quant_embed_pre", size, config.s1_bits)
    for name, blocks in (("encoder", config.n_enc_layers), ("decoder", config.n_dec_layers)):
        found |= _stack(name, blocks - 1, size, config.ff_dim)  # one less than the config says, as published
    return found


def _stack(name: str, blocks: int, size: int, hidden: int) -> Shapes:
    found: Shapes = {}
    for block in (f"{name}.{number}" for number in range(blocks)):
        found |= {f"{block}.norm1.weight": (size,), f"{block}.norm2.weight": (size,)}
        found |= _attention(f"{block}.self_attn", size)
        found |= {f"{block}.ffn.w1.weight": (hidden, size), f"{block}.ffn.w3.weight": (hidden, size)}
        found |= {f"{block}.ffn.w2.weight": (size, hidden)}
    return found


def _attention(name: str, size: int) -> Shapes:
    parts = [_linear(f"{name}.{part}_proj", size, size) for part in ("q", "k", "v", "out")]
    return {key: shape for part in parts for key, shape in part.items()}


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
