"""Finds out which devices and how much memory this machine has, without creating a CUDA context."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forecasters import ExpectedError


class DeviceError(ExpectedError, ValueError):
    """A device was requested that this machine does not have."""


@dataclass(frozen=True, kw_only=True)
class DeviceSlot:
    """The device of one worker: its name in the worker's process, and the environment variables that select it."""

    device: str  # as torch names it, such as "cpu" or "cuda:0"
    environment: dict[str, str]


def device_slots(gpus: Sequence[int] | None, cpus: int | None) -> list[DeviceSlot]:
    """One DeviceSlot per worker, for these GPUs or for this number of CPU workers; by default every GPU or every core.

    Raises DeviceError for a GPU that this machine does not have.
    """
    if gpus is None and cpus is None:
        gpus = list(range(len(visible_gpus()))) or None
    if gpus is None:
        return [cpu_slot()] * (cpus or len(os.sched_getaffinity(0)))
    visible = visible_gpus()
    for gpu in gpus:
        if gpu >= len(visible):
            found = f"it has {len(visible)}, numbered from 0" if visible else "it has none that its driver shows"
            raise DeviceError(f"--gpus {gpu}: this machine has no such GPU ({found}); use --cpus N to run without")
    return [DeviceSlot(device="cuda:0", environment={"CUDA_VISIBLE_DEVICES": visible[gpu]}) for gpu in gpus]


def visible_gpus() -> list[str]:
    """The name of each GPU for CUDA_VISIBLE_DEVICES; if that variable is set already, only the GPUs it names."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is not None:
        return [name.strip() for name in outer.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def cpu_slot() -> DeviceSlot:
    """The slot of a CPU worker, which computes on one core."""
    # With one thread per worker the numbers do not depend on how many workers share the cores.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return DeviceSlot(device="cpu", environment={"CUDA_VISIBLE_DEVICES": "", **one_thread})


def memory_bytes(physical: int | None = None, *, root: Path = Path("/")) -> int:
    """The bytes of memory that this process may use: the machine's, or the limit of a container or a batch job.

    physical: the machine's memory; by default what the kernel reports. root: the folder that holds proc and
    sys/fs/cgroup.
    """
    if physical is None:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """The memory limits in bytes of this process's cgroup and of its ancestors, of cgroup versions 2 and 1.

    An unlimited group has the word "max" (version 2), which is skipped, or a number beyond any memory (version 1).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounted, limits = root / "sys/fs/cgroup", []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            place, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            place, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        for folder in (path, *path.parents):  # in a container the path may be the host's: then only its root is here
            try:
                limits.append(int((place / folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return limits
