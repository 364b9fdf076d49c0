"""What a network's work is: floating-point operations counted by torch, and what this machine could do of them.

An operation is a multiplication or an addition of a matrix product, a convolution or attention; others do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from forecasters import packed
from forecasters.low_precision import INT8, PRODUCT

SIZE, REPEATS = 1536, 3  # of the square matrices whose product is timed; the fastest counts


def count_flop(work: Callable[[], object]) -> int:
    """Do this work and count its operations; what a compiled graph does is not seen. Counting slows small work down."""
    mapping = {torch.ops.aten._int_mm: _product_flop, packed.OPERATOR: _packed_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def _product_flop(left: Sequence[int], right: Sequence[int], **_: object) -> int:
    """Of the product of whole numbers, which torch's counter does not know, from the shapes of both."""
    return 2 * left[0] * left[1] * right[1]


def _packed_flop(rows: Sequence[int], _: object, weight: Sequence[int], *__: object, **___: object) -> int:
    """Of a product of packed weights, from the shapes of the input and of the plain weights."""
    return 2 * math.prod(rows) * weight[0]


def measure_matrix_product(device: str, dtype: str = "float32") -> float:
    """Operations a second of a large product of matrices on "cpu", with this process's threads, or "cuda:0".

    dtype: of `forecasters.DTYPES`; int8 makes int32.
    """
    product = PRODUCT if dtype == INT8 else torch.mm
    square = (100 * torch.rand(SIZE, SIZE, device=device)).to(getattr(torch, dtype))
    fastest = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        product(square, square)
        if square.is_cuda:
            torch.cuda.synchronize(square.device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIZE**3 / fastest
