"""int8: what is rounded, what stays float32, and that nothing but a window's own bars changes its forecast."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import test_compilation as compiling
import torch
from torch import nn

import forecasters
from forecasters import Running
from forecasters.low_precision import Int8Linear, instructions, weight_mib
from forecasters.packed import PackedLinear
from forecasters.work import count_flop


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24)


def test_a_product_is_that_of_whole_numbers_and_of_two_scales(layer: nn.Linear):
    x, weight = torch.randn(3, 5, 64), layer.weight.detach().numpy()
    scales = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    rows = x.numpy().reshape(15, 64)
    steps = np.abs(rows).max(1, keepdims=True) / np.float32(127)
    sums = np.rint(rows / steps).astype(int) @ np.rint(weight / scales).astype(int).T
    expected = sums * steps * scales.T + layer.bias.detach().numpy()
    with torch.inference_mode():
        ours = Int8Linear(layer)(x)
        assert ours.shape == (3, 5, 24)
        np.testing.assert_allclose(ours.numpy().reshape(15, 24), expected, rtol=1e-5, atol=1e-6)
        assert 0 < (ours - layer(x)).std() / layer(x).std() < 0.02
        some = slice(8, 16)
        assert torch.equal(Int8Linear(layer).part(x, some), ours[..., some])


def test_a_row_does_not_depend_on_those_beside_it(layer: nn.Linear):
    x = torch.randn(40, 64)
    beside = x.clone()
    beside[1], beside[2] = 1e6 * x[1], torch.nan
    with torch.inference_mode():
        alone, together = Int8Linear(layer)(x[:1]), Int8Linear(layer)(beside)
    assert torch.equal(alone[0], together[0])
    assert together[2].isnan().all()  # and is never hidden by a whole number
    assert together[[0, 1, 3]].isfinite().all()


def test_a_layer_of_zeros_and_a_row_of_zeros_give_the_bias(layer: nn.Linear):
    with torch.inference_mode():
        assert torch.equal(Int8Linear(layer)(torch.zeros(1, 64))[0], layer.bias)
        layer.weight.zero_()
        assert torch.equal(Int8Linear(layer)(torch.randn(1, 64))[0], layer.bias)


@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_int8_is_the_transformers_only_and_another_fingerprint(model: str, tmp_path: Path):
    exact, coarse = (cast(Any, compiling.load(model, tmp_path, mode="off", dtype=d)) for d in ("float32", "int8"))
    options = compiling.CHECKPOINTS[model]
    found = {d: forecasters.inspect(model, **options, running=Running(dtype=d)) for d in forecasters.DTYPES}
    assert coarse.fingerprint == found["int8"]
    assert len(set(found.values())) == 3
    whole = {name for name, module in coarse.network.named_modules() if isinstance(module, Int8Linear)}
    linear = {name for name, module in exact.network.named_modules() if isinstance(module, nn.Linear | PackedLinear)}
    assert whole == {name for name in linear if name.startswith("transformer.")}
    assert {tensor.dtype for tensor in coarse.network.parameters()} == {torch.float32}
    assert weight_mib(coarse) < 0.7 * weight_mib(exact)
    horizon = 40 if model == "toto" else 7
    contexts, params = compiling.windows(horizon).contexts(range(8)), compiling.PARAMS[model]
    theirs, ours = (cast(Any, f.encode(contexts, params, horizon)) for f in (exact, coarse))
    if model == "toto":
        np.testing.assert_array_equal(ours.affine_loc, theirs.affine_loc)
        np.testing.assert_array_equal(ours.affine_scale, theirs.affine_scale)
    else:
        assert all(
            torch.equal(mine.tokens, other.tokens) for mine, other in zip(ours.windows, theirs.windows, strict=True)
        )
    points = [f.draw(encoded, params, range(8)).mean(1) for f, encoded in ((exact, theirs), (coarse, ours))]
    error = np.abs(points[0] - points[1]) / compiling.deviations(8)
    assert np.max(error) > 0
    assert np.median(error) < 0.05
    counted = [count_flop(lambda f=f: f.encode(contexts, params, 1)) for f in (exact, coarse)]
    assert counted[0] == counted[1] > 0


def test_a_compiled_network_in_int8_answers_as_the_eager_one(tmp_path: Path, no_graphs: None):
    eager, compiled = (compiling.load("toto", tmp_path, mode=mode, dtype="int8") for mode in ("off", "default"))
    compiling.assert_same(*(compiling.drawn(each, "toto", 1, 8) for each in (eager, compiled)))
    assert compiled.compilation == "default"


def test_what_a_cpu_has_for_a_dtype_is_what_torch_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": False})
    assert instructions("bfloat16") == ("amx_bf16",)
    assert instructions("int8") == ()
    assert instructions("float32") is None
