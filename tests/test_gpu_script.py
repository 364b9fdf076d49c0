"""`benchmarks/gpu.sh`, which a machine with a GPU runs: rehearsed without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = {"bars of the demonstration", "verify-compile", "night, one worker", "night, two workers"}
COMPILED = {"compiled networks, float32", "compiled networks, bfloat16"}


def run(results: Path, python: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--tiny", "--results", results, *options]
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(ROOT), "MINUTES": "30"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_failing_step_is_named_and_the_others_run(tmp_path: Path):
    """Here the interpreter fails at benchmarks, and the commands beside it do not."""
    python, log = tmp_path / "python", tmp_path / "log"
    for path, status in ((python, 3), (tmp_path / "studies", 0)):
        path.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {status}\n')
        path.chmod(0o755)
    ended = run(tmp_path / "results", python)
    assert ended.returncode == 1
    failed = {line.removeprefix("failed: ") for line in ended.stderr.splitlines() if line.startswith("failed: ")}
    nights = {"night, one worker", "night, two workers"}
    assert failed == {f"{name} (exit status 3)" for name in COMPILED | nights}
    asked = log.read_text()
    assert len(asked.splitlines()) == len(STEPS | COMPILED)
    assert "verify-compile" in asked
    assert "--dtypes bfloat16" in asked


def test_an_unknown_option_is_one_line(tmp_path: Path):
    ended = run(tmp_path, Path(sys.executable), "--fast")
    assert (ended.returncode, ended.stderr) == (
        2,
        "gpu.sh: unknown option --fast; see the comment at its beginning\n",
    )


@pytest.mark.slow
def test_the_whole_script_runs_without_a_gpu(tmp_path: Path):
    ended = run(tmp_path, Path(sys.executable))
    assert ended.returncode == 0, ended.stderr[-2000:]
    names = ("verify", "overnight", "overnight_two", "compile_float32", "compile_bfloat16")
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{name}.json" for name in names}
    rows = json.loads((tmp_path / "compile_bfloat16.json").read_text())["figures"]["rows"]
    assert [(row["dtype"], row["mode"]) for row in rows] == [("bfloat16", "off"), ("bfloat16", "default")]
    assert json.loads((tmp_path / "overnight_two.json").read_text())["figures"]["confirmed studies"] == 2
