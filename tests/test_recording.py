"""Every benchmark is asked and recorded in one way."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks import recording

FOLDER = Path(recording.__file__).parent
HELPERS = (
    "attacked",
    "exactness",
    "pgbouncer",
    "plain_kronos",
    "plain_searches",
    "private",
    "random_models",
    "recording",
)
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in (*HELPERS, "__init__"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_takes_a_results_file(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: python -m benchmarks.{name} ")
    assert "--json FILE" in said
    assert f"benchmarks/results/{name}.json" in said


def options(path: Path, *words: str) -> argparse.Namespace:
    parser = recording.parser("x", "what it measures")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--repeats", type=recording.at_least_one, default=3)
    return parser.parse_args(["--json", str(path), *words])


def test_a_results_file_says_of_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    asked = options(path, "--data-dir", str(tmp_path / "trainingdata"))
    assert not path.exists()  # an earlier one is kept until there is another
    recording.write(asked, {"ratio": 2.5}, postgres="18.4")
    content = json.loads(path.read_text())
    assert set(content) == {"date", "machine", "versions", "options", "figures"}
    assert content["figures"] == {"ratio": 2.5}
    assert content["options"] == {"data_dir": "trainingdata", "repeats": 3}
    assert content["machine"]["cores"] == os.cpu_count()
    assert content["machine"]["cpu"]
    assert content["machine"]["memory_gib"] > 0
    assert {"python", "forecast-studies", "torch", "numpy", "optuna", "postgres"} == set(content["versions"])
    assert datetime.fromisoformat(content["date"]).tzinfo is not None


def test_without_json_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recording.write(recording.parser("x", None).parse_args([]), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "a-file/x.json"])
def test_a_place_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(SystemExit) as ended:
        options(tmp_path / place)
    assert ended.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_fewer_repeats_than_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path / "x.json", "--repeats", "0")


def test_tables_cut_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a", *(f"a long heading {number}" for number in range(20))]
    recording.table("title", names, [["x" * 60, *(1 / 3 for _ in range(19)), None]])
    title, heads, row = (line.strip() for line in capsys.readouterr().out.splitlines())
    assert title == "title"
    assert heads.count("a long heading") == 20
    assert row.split() == ["x" * 60, *["0.3333"] * 19, "-"]
