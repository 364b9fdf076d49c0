"""What a machine has: the memory that its workers may fill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch import cli, devices, searching
from launch.worker import cache_bytes
from studies import config as configuration

GIB = 2**30


def machine(root: Path, groups: str, limits: dict[str, str]) -> Path:
    """A root folder whose /proc and /sys say this."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": str(3 * GIB)}, 3),  # a container with a view of its own
        ("0::/\n", {"memory.max": "max"}, 64),
        ("0::/\n", {}, 64),  # the top group of a machine has no limit
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": str(8 * GIB)}, 8),
        ("0::/job/step\n", {"job/step/memory.max": str(4 * GIB), "job/memory.max": str(8 * GIB)}, 4),
        ("0::/docker/abc\n", {"memory.max": str(5 * GIB)}, 5),  # the host's path, not to be seen from inside
        ("0::/\n", {"memory.max": str(500 * GIB)}, 64),  # more than there is
        ("0::/../../init.scope\n", {"memory.max": str(2 * GIB)}, 2),
        (
            "5:devices:/\n4:memory:/job\n0::/\n",
            {"memory/job/memory.limit_in_bytes": str(6 * GIB), "memory/memory.limit_in_bytes": str(2**63 - 4096)},
            6,
        ),
        ("3:cpu,memory:/\n", {"memory/memory.limit_in_bytes": str(7 * GIB)}, 7),
    ],
)
def test_a_memory_limit_of_the_container_counts(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: int
) -> None:
    assert devices.memory_bytes(64 * GIB, root=machine(tmp_path, groups, limits)) == expected * GIB


def test_memory_of_this_machine(tmp_path: Path) -> None:
    assert devices.memory_bytes(64 * GIB, root=tmp_path) == 64 * GIB  # no cgroups
    assert 2**20 < devices.memory_bytes() < 2**50


def test_the_cache_is_shared_by_the_workers_and_their_models() -> None:
    config = configuration.load()
    assert config.search.models == ("toto", "kronos")
    assert cache_bytes(config, workers=4, memory=64 * GIB) == 2 * GIB
    one = replace(config, search=replace(config.search, models=("toto",)))
    assert cache_bytes(one, workers=4, memory=64 * GIB) == 4 * GIB
    fixed = replace(config, workers=replace(config.workers, cache_mib=512))
    assert cache_bytes(fixed, workers=4, memory=64 * GIB) == 256 * 2**20


def test_a_gpu_that_is_named_twice_has_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(searching, "search", lambda config, symbols, gpus, *others, **options: asked.append(gpus) or 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert CliRunner().invoke(cli.launch_workers, ["--gpus", "0,0"]).exit_code == 0
    slots = devices.device_slots(asked[0], None)
    assert [(slot.device, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in slots] == [("cuda:0", "5")] * 2
