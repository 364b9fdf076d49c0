"""Linear layers in float32 on a CPU, with weights laid out for MKL's products once instead of at every product.

With few rows laying them out costs most beside the arithmetic itself: 240 rows take 0.86 of the time, 8 rows 0.6. And a
row has the same bits beside any number of others and with any number of threads, while a plain layer computes fewer
than 16 rows otherwise. Where that is not so (a CPU without AVX2), layers stay plain. Knows nothing of models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows that are said when weights are packed, for the blocks that they are laid out in: said 16, 240 rows take 1.8 times
# as long. Products of other numbers of rows are as exact, down to one.
ROWS = 512
OPERATOR = getattr(torch.ops.mkl, "_mkl_linear", None)  # none in a torch without MKL


class PackedLinear(nn.Module):
    """A linear layer that keeps its weights in MKL's layout alone."""

    def __init__(self, layer: nn.Linear, cuts: Sequence[int] = ()) -> None:
        """cuts: outputs between which `part` may be asked for."""
        super().__init__()
        self.bias = layer.bias
        self.nbytes = layer.weight.nbytes  # of the plain weights; packed ones take as much
        bounds = (0, *cuts, layer.out_features)
        self._pieces = [(a, b, _packed(layer.weight[a:b])) for a, b in itertools.pairwise(bounds)]

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, slice(None))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """These outputs alone of x [..., inputs]; they begin and end at cuts."""
        start, stop, _ = outputs.indices(self._pieces[-1][1])
        found = [
            _product(x, packed, b - a, None if self.bias is None else self.bias[a:b])
            for a, b, packed in self._pieces
            if start <= a and b <= stop
        ]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        assert y.shape[-1] == stop - start, f"outputs {start} to {stop} are not cut there"
        return y


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS)


def _product(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    sizes = x.new_empty(1).expand(outputs, inputs)  # of the plain weights, which are read where other rows are said
    assert OPERATOR is not None
    return OPERATOR(x, packed, sizes, bias, rows)


def pack(network: nn.Module, cuts: Mapping[str, Sequence[int]] | None = None) -> None:
    """Replace the linear layers of a network, for inference alone: those in float32 on a CPU, where it has MKL.

    cuts: `PackedLinear`'s, by the name of a layer in its module.
    """
    if not _works():
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight.is_cpu and child.weight.dtype == torch.float32:
                setattr(parent, name, PackedLinear(child, (cuts or {}).get(name, ())))


@functools.cache
def _works() -> bool:
    """Whether there are products of packed weights here, which say what plain ones say, beside any number of rows."""
    if OPERATOR is None:
        return False
    made = torch.Generator().manual_seed(0)
    weight, x = torch.randn(144, 832, generator=made), torch.randn(ROWS + 1, 832, generator=made)
    packed = _packed(weight)
    whole = _product(x, packed, len(weight), None)
    alike = (torch.equal(_product(x[:rows], packed, len(weight), None), whole[:rows]) for rows in (1, 3, 8, 17, 99))
    return torch.allclose(whole, F.linear(x, weight), rtol=1e-4, atol=1e-4) and all(alike)
