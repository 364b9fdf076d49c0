"""What decides the last bits of a network's answer beside its weights and its input, as one text."""

from __future__ import annotations

import functools
import hashlib
import importlib
import platform
from pathlib import Path

import numpy as np
import torch

# Modules that decide bits of several models.
COMMON = ("forecasters.low_precision", "forecasters.packed", "forecasters.scaling")


def surroundings(device: torch.device, *modules: str) -> str:
    """The code of these modules, the versions, the kind of CPU and the threads that kernels divide work among."""
    made_of = (
        _code(modules), torch.__version__, np.__version__, str(device), _cpu(), torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()), torch.get_float32_matmul_precision(),
    )  # fmt: skip
    return "\n".join(made_of)


@functools.cache
def _code(modules: tuple[str, ...]) -> str:
    """In place of a number that somebody must not forget to raise: after any edit nothing that was kept is found."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update(Path(str(importlib.import_module(name).__file__)).read_bytes())
    return digest.hexdigest()


@functools.cache
def _cpu() -> str:
    """Its model: MKL chooses kernels by it, and a disk may move to another machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {
        line for line in lines if line.startswith(("model name", "vendor_id", "cpu family", "model\t", "stepping"))
    }
    return platform.machine() + " ".join(sorted(names))
