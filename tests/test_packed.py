"""Weights in MKL's layout: the same products, the same bits for a row beside any number of others."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import test_compilation as compiling
import torch
from torch import nn

import forecasters
from forecasters import packed
from forecasters.low_precision import part, weight_mib
from forecasters.packed import PackedLinear, pack
from forecasters.toto import Toto
from forecasters.work import count_flop

needed = pytest.mark.skipif(not packed._works(), reason="this machine has no such products")
SIZES = ((64, 24), (272, 144), (768, 1536), (3072, 768))


@pytest.fixture
def asked_again() -> Iterator[None]:
    """What this machine can is found out anew, before and after."""
    packed._works.cache_clear()
    yield
    packed._works.cache_clear()


@needed
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_has_the_same_bits_beside_any_others_and_with_any_threads(sizes: tuple[int, int], bias: bool):
    torch.manual_seed(0)
    plain = nn.Linear(*sizes, bias=bias).requires_grad_(False)
    ours, x = PackedLinear(plain), torch.randn(700, sizes[0])
    whole = ours(x)
    exact = nn.functional.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    assert (whole - exact).abs().max() <= 2 * (plain(x) - exact).abs().max()
    for rows in (1, 2, 3, 7, 8, 15, 16, 17, 33, 240, 512, 513):
        assert torch.equal(ours(x[:rows]), whole[:rows])
        assert torch.equal(ours(x[100 : 100 + rows]), whole[100 : 100 + rows])
    assert torch.equal(ours(x[:630].view(7, 90, -1)).flatten(0, 1), whole[:630])
    assert torch.equal(ours(x.t().contiguous().t()), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ours(x), whole)
    finally:
        torch.set_num_threads(threads)


@needed
def test_outputs_between_cuts_are_those_of_the_whole():
    plain = nn.Linear(64, 48).requires_grad_(False)
    ours, x = PackedLinear(plain, (16, 32)), torch.randn(5, 64)
    whole = PackedLinear(plain)(x)
    for outputs in (slice(None), slice(0, 16), slice(16, 48), slice(32, 48)):
        assert torch.equal(part(ours, x, outputs), whole[:, outputs])
    with pytest.raises(AssertionError, match="outputs 8 to 32 are not cut there"):
        ours.part(x, slice(8, 32))


@needed
def test_the_plain_weights_are_let_go_and_still_counted():
    loaded = cast(Toto, forecasters.load("toto", checkpoint="toto-tiny"))
    layers = [module for module in loaded.network.modules() if isinstance(module, PackedLinear)]
    assert layers
    assert not any("weight" in dict(layer.named_parameters()) for layer in layers)
    plain = forecasters.load("toto", checkpoint="toto-tiny", running=forecasters.Running(dtype="bfloat16"))
    assert weight_mib(loaded) == 2 * weight_mib(plain)
    assert count_flop(lambda: layers[0](torch.randn(3, 5, len(layers[0].bias)))) > 0


def test_only_float32_is_packed():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    pack(network)
    assert isinstance(network[1], nn.Linear)


def zeros(x: torch.Tensor, _: torch.Tensor, weight: torch.Tensor, *__: object) -> torch.Tensor:
    """A product that is wrong."""
    return torch.zeros(*x.shape[:-1], len(weight))


@pytest.mark.parametrize("operator", [None, zeros])
@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_where_there_is_no_such_product_or_a_wrong_one_layers_stay_plain(
    model: str, operator: object, asked_again: None, monkeypatch: pytest.MonkeyPatch
):
    def loaded() -> Any:
        return forecasters.load(model, checkpoint=f"{model}-tiny")

    usual = compiling.drawn(loaded(), model, 1, 8)
    packed._works.cache_clear()
    monkeypatch.setattr(packed, "OPERATOR", operator)
    plain = loaded()
    assert not any(isinstance(module, PackedLinear) for module in plain.network.modules())
    compiling.assert_same(usual, compiling.drawn(plain, model, 1, 8))
