"""What a supervisor says of its workers, and where it keeps their logs."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from launch import run
from launch.supervisor import Supervisor
from studies import config as configuration


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGKILL, "SIGKILL"), (40, f"SIGRTMIN+{40 - signal.SIGRTMIN}"), (signal.SIGRTMAX, "SIGRTMAX")],
)
def test_any_signal_that_kills_a_worker_is_named(number: int, name: str) -> None:
    process = subprocess.Popen(["sleep", "60"])
    os.kill(process.pid, number)
    assert Supervisor._describe_exit(cast(Any, None), process.wait()) == f"was killed by {name}"


def test_runs_of_one_second_have_log_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration.load(None)
    config = replace(config, workers=replace(config.workers, log_dir=tmp_path / "logs"))
    monkeypatch.setattr(run.time, "strftime", lambda _: "20260319-120000")
    monkeypatch.setattr(Path, "exists", lambda *_: False)  # each looks before the other has made its folder
    assert [run._log_folder(config).name for _ in range(3)] == [f"20260319-120000{end}" for end in ("", "-1", "-2")]
