"""Networks in less than float32: how they get there, what they weigh, and what a device makes of it.

int8 is of a network's transformer alone, in products of whole numbers that torch itself brings; what is before and
after it stays float32. bfloat16 is of the whole network. Knows nothing of models, windows or studies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forecasters.packed import PackedLinear

INT8 = "int8"
MOST = 127  # of int8, on both sides of 0
SMALLEST = 1e-30  # of what a row is divided by: a row of zeros stays one
PRODUCT = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
CUDA_ROWS = 17  # at least, of a product of whole numbers on CUDA

# What a CPU needs for products at more than the rate of float32, as torch.cpu.get_capabilities() names it.
INSTRUCTIONS = {"bfloat16": ("amx_bf16", "avx512_bf16"), INT8: ("amx_int8", "avx512_vnni", "avx_vnni")}


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with one scale an output, and whose input is rounded row by row.

    Each row has a scale of its own: torch.ao's dynamic quantization has one for all, with which a window's forecast
    would depend on the windows beside it, later ones among them. The sums are whole numbers, exact in any order.
    """

    weight: Tensor  # int8 [outputs, inputs]
    scale: Tensor  # float32 [outputs]
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        rounded, scale = _rounded(layer.weight.detach())
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, slice(None))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """These outputs alone of x [..., inputs]."""
        rows = x.reshape(-1, x.shape[-1])
        rounded, scale = _rounded(rows)
        if x.is_cuda and len(rows) < CUDA_ROWS:
            rounded = F.pad(rounded, (0, 0, 0, CUDA_ROWS - len(rows)))
        sums = PRODUCT(rounded, self.weight[outputs].t())[: len(rows)]
        y = sums.float().mul_(scale).mul_(self.scale[outputs])  # in place: as costly as the product otherwise
        y = y if self.bias is None else y.add_(self.bias[outputs])
        return y.view(*x.shape[:-1], -1)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, k] as int8 and each row's scale, float32 [n, 1]; what is not finite leaves a scale that is not."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / MOST
    return (rows / scale).round_().to(torch.int8), scale


def part(layer: nn.Module, x: Tensor, outputs: slice) -> Tensor:
    """These outputs alone of a linear layer."""
    if isinstance(layer, Int8Linear | PackedLinear):
        return layer.part(x, outputs)
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight[outputs], layer.bias[outputs])


def placed(network: nn.Module, transformer: nn.Module, *, device: str, dtype: str) -> None:
    """Bring a float32 network onto a device in this dtype, of `forecasters.DTYPES`; transformer: what int8 is of."""
    if dtype != INT8:
        network.to(device=device, dtype=getattr(torch, dtype))
        return
    for parent in list(transformer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    network.to(device)


def weight_mib(forecaster: object) -> float:
    """What the weights of a forecaster's network take, in MiB; 0 where there is no network."""
    network = getattr(forecaster, "network", None) or nn.Module()
    packed = [module for module in network.modules() if isinstance(module, PackedLinear)]
    return sum(each.nbytes for each in (*network.parameters(), *network.buffers(), *packed)) / 2**20


def instructions(dtype: str) -> tuple[str, ...] | None:
    """Those of `INSTRUCTIONS` for this dtype that this CPU has; None for a dtype that needs none."""
    if dtype not in INSTRUCTIONS:
        return None
    has = torch.cpu.get_capabilities()
    return tuple(name for name in INSTRUCTIONS[dtype] if has.get(name))
