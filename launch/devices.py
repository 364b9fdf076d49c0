"""Which devices and how much memory this machine has. Asks the driver: no CUDA context in the supervisor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forecasters import ExpectedError


class DeviceError(ExpectedError, ValueError):
    """A device was asked for that this machine does not have."""


@dataclass(frozen=True, kw_only=True)
class DeviceSlot:
    """One worker's device, as torch calls it there, and the environment that pins it."""

    device: str
    environment: dict[str, str]


def device_slots(gpus: Sequence[int] | None, cpus: int | None) -> list[DeviceSlot]:
    """One device_slot a worker: the GPUs named, or so many CPU workers; neither given: every GPU, else every core.

    Raises DeviceError.
    """
    if gpus is None and cpus is None:
        gpus = list(range(len(visible_gpus()))) or None
    if gpus is None:
        return [cpu_slot()] * (cpus or len(os.sched_getaffinity(0)))
    visible = visible_gpus()
    for gpu in gpus:
        if gpu >= len(visible):
            there = f"it has {len(visible)}, numbered from 0" if visible else "it has none that its driver shows"
            raise DeviceError(f"--gpus {gpu}: this machine has no such GPU ({there}); use --cpus N to run without")
    return [DeviceSlot(device="cuda:0", environment={"CUDA_VISIBLE_DEVICES": visible[gpu]}) for gpu in gpus]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name each GPU by; an outer setting of it is kept to."""
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
    """One core of any machine."""
    # One thread a worker: the numbers do not depend on how many workers share the cores.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return DeviceSlot(device="cpu", environment={"CUDA_VISIBLE_DEVICES": "", **one_thread})


def memory_bytes(physical: int | None = None, *, root: Path = Path("/")) -> int:
    """The memory that this process may use: the machine's, or less where a container or a batch job is held to less.

    physical: the machine's memory. root: where proc and sys/fs/cgroup are.
    """
    if physical is None:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """The limits of our group and of every group above it, of version 2 and 1; no limit is a word or an enormity."""
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
        for folder in (
            path,
            *path.parents,
        ):  # the path may be the host's: then only its top is here
            try:
                limits.append(int((place / folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return limits
