"""What a network's work is: floating-point operations counted by torch, and what this machine could do of them.

An operation is a multiplication or an addition of a matrix product, a convolution or attention; others do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

SIZE, REPEATS = 1536, 3  # of the square matrices whose product is timed; the fastest counts


def count_flop(work: Callable[[], object]) -> int:
    """Do this work and count its operations; what a compiled graph does is not seen. Counting slows small work down."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure_matrix_product(device: str) -> float:
    """Operations a second of a large product of float32 matrices on "cpu", with this process's threads, or "cuda:0"."""
    square = torch.randn(SIZE, SIZE, device=device)
    fastest = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        torch.mm(square, square)
        if square.is_cuda:
            torch.cuda.synchronize(square.device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIZE**3 / fastest
