"""Worker processes, found by what the kernel says of them."""

from __future__ import annotations

import time
from pathlib import Path


def workers_of(pid: int) -> list[int]:
    """The worker processes that this supervisor started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"launch.worker" in command and f"STUDIES_SUPERVISOR_PID={pid}\0".encode() in environment + b"\0":
                found.append(int(entry.name))
    return found


def wait_until_gone(pids: list[int], seconds: float = 20) -> None:
    """Wait until none of these processes is there, zombies aside."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.05)
