"""The demonstration's configurations in use, and what its checkpoints were trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from launch import cli
from storage import configs
from studies import config as configuration
from studies import space
from studies.demo import IN_USE, demo_in_use


def test_the_demonstration_starts_from_configurations_that_say_what_they_are_for(tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        cli.studies,
        ["demo-data", "--in-use", "--data-dir", str(tmp_path / "bars"), "--hyperparams-dir", str(tmp_path / "best")],
    )
    assert ended.exit_code == 0, ended.output
    shown = [Path(line) for line in ended.stdout.splitlines()]
    searched = space.make("toto", configuration.load(configuration.DEMO_PATH))
    for symbol, (config, purpose) in IN_USE.items():
        record = configs.read(tmp_path / "best", "best", symbol)
        assert record is not None
        assert record.path in shown
        assert (record.model, dict(record.config)) == ("toto", config)
        assert record.metadata == {"source": "demonstration", "purpose": purpose}
        assert searched.contains(space.from_promoted(record.config, record.metadata, searched))


def test_configurations_that_are_in_use_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "best" / "SP500.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"symbol": "SP500", "model": "kronos", "config": {"clip": 5.0}}))
    before = path.read_bytes()
    assert path not in demo_in_use(tmp_path)
    assert path.read_bytes() == before
    assert not (tmp_path / "toto" / "SP500.json").exists()
    assert demo_in_use(tmp_path) == ()


def test_nothing_is_in_use_unless_asked_for(tmp_path: Path) -> None:
    folders = ["--data-dir", str(tmp_path / "bars"), "--hyperparams-dir", str(tmp_path / "best")]
    assert CliRunner().invoke(cli.studies, ["demo-data", *folders]).exit_code == 0
    assert not (tmp_path / "best").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_installation_says_what_it_is_doing(tmp_path: Path) -> None:
    """With a Python that makes an environment whose pip only notes what it is asked for."""
    root = Path(__file__).parents[1]
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    python = tmp_path / "python"
    noting = "printf '#!/bin/sh\\necho \"$@\" >>asked\\n' >.venv/bin/pip"
    python.write_text(f"#!/bin/sh\nmkdir -p .venv/bin\n{noting}\nchmod +x .venv/bin/pip\n")
    python.chmod(0o755)
    # Without what a `make` around these tests hands on to those inside it: they would say more.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ended = subprocess.run(
        ["make", "PYTHON=./python", ".venv/installed"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines() == [
        "making a virtual environment in .venv",
        "installing torch, which is most of the download",
        "installing the other packages and this one",
    ]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split("-c constraints.txt ")[1] for line in asked] == ["torch", "-e .[dev]"]


def test_training_sees_no_bar_after_2016() -> None:
    train = pytest.importorskip("forecasters.train_tiny")
    last = np.datetime64(train.LAST_TRAINING_DAY)
    for symbol, closes in train.closes().items():
        assert closes.index.max() > last
        known = train.training_moves(closes)
        table = train.train_tiny_kronos.packaged_bars()[symbol]
        series = train.train_tiny_kronos.series_of(table)
        count = int((table.index <= last).sum())
        assert len(known) == len(series.moves) == len(series.stamps) == count - 1
        np.testing.assert_allclose(series.moves, known)
        assert (series.volume is None) is (symbol in ("WTI", "VIX"))
        if series.volume is None:
            assert not series.shape.any()
