"""The promoted files: every form of the predecessor is read, and no crash or race loses or tears one."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from storage import configs
from storage.configs import ConcurrentWrite, ConfigFileError

REPOSITORY = Path(__file__).parent.parent
EVERYWHERE = ("toto", "best", "optimized_compiled")


def payload(mae: float = 0.0125, **changes: Any) -> dict[str, Any]:
    return {
        "symbol": "NVDA",
        "model": "toto",
        "config": {"num_samples": 128, "aggregate": "trimmed_mean_10"},
        "validation": {"price_mae": 2.25, "pct_return_mae": mae, "latency_s": 0.5, "num_predictions": 250},
        "test": {"price_mae": 3.34, "pct_return_mae": 0.0183, "latency_s": 0.5},
        "windows": {"val_window": 30, "test_window": 20, "forecast_horizon": 1},
        "config_path": "hyperparams/toto/NVDA.json",
        "metadata": {"source": "forecast-studies", "previous_mae": None},
        **changes,
    }


def put(root: Path, content: object, folder: str = "best", symbol: str = "NVDA") -> Path:
    path = root / folder / f"{symbol}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def history(root: Path, symbol: str = "NVDA") -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / "history" / symbol).glob("*.json"))]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert configs.read(tmp_path, "best", "NVDA") is None
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE, expected_digest=None)
    for folder in EVERYWHERE:
        record = configs.read(tmp_path, folder, "NVDA")
        assert record
        assert record.raw == payload()
        assert (record.symbol, record.model, record.path) == ("NVDA", "toto", tmp_path / folder / "NVDA.json")
        assert record.validation["pct_return_mae"] == 0.0125
    assert configs.read(tmp_path, "kronos", "NVDA") is None
    assert history(tmp_path) == []


def test_layout_of_the_file(tmp_path: Path) -> None:
    shuffled = {"extra": 1, **dict(reversed(payload().items()))}
    configs.write(tmp_path, "NVDA", shuffled, ["best"])
    text = (tmp_path / "best" / "NVDA.json").read_text()
    assert list(json.loads(text)) == [*configs.KEYS, "extra"]
    assert text.startswith('{\n  "symbol": "NVDA",\n')
    assert text.endswith("}\n")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_mode_respects_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
        configs.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
    finally:
        os.umask(before)
    files = [*tmp_path.glob("*/NVDA.json"), *tmp_path.glob("history/NVDA/*")]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


# --- what the predecessor left


def test_best_file_of_the_predecessor(tmp_path: Path) -> None:
    put(tmp_path, payload(metadata={"candidate_pct_return_mae": {"kronos": 0.036}, "improvement_pct": 13.81}))
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.config == {"num_samples": 128, "aggregate": "trimmed_mean_10"}
    assert record.windows["forecast_horizon"] == 1
    assert record.config_path == "hyperparams/toto/NVDA.json"
    assert record.metadata["improvement_pct"] == 13.81


def test_oldest_files_call_the_metric_return_mae(tmp_path: Path) -> None:
    put(tmp_path, payload(validation={"price_mae": 2.0, "return_mae": 0.0159}, test={"return_mae": 0.0213}))
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.validation == {"price_mae": 2.0, "pct_return_mae": 0.0159}
    assert record.test == {"pct_return_mae": 0.0213}


def test_compiled_toto_is_toto_and_lacks_some_keys(tmp_path: Path) -> None:
    content = payload(model="toto_compiled", metadata={"compiled": True, "previous_mae": None})
    del content["config_path"]
    put(tmp_path, content, "optimized_compiled")
    record = configs.read(tmp_path, "optimized_compiled", "NVDA")
    assert record
    assert (record.model, record.config_path) == ("toto", None)
    assert record.raw["model"] == "toto_compiled"


def test_hourly_files_have_no_test(tmp_path: Path) -> None:
    content = payload()
    for key in ("test", "windows", "config_path", "metadata"):
        del content[key]
    put(tmp_path, content)
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert (record.test, record.windows, record.metadata) == ({}, {}, {})


def test_file_in_a_models_folder_may_not_name_its_model(tmp_path: Path) -> None:
    content = {"config": {"temperature": 0.15, "clip": 1.8}, "validation": {"pct_return_mae": 0.0185}}
    put(tmp_path, content, "kronos")
    record = configs.read(tmp_path, "kronos", "NVDA")
    assert record
    assert (record.symbol, record.model) == ("NVDA", "kronos")


def test_other_models_are_read_as_found(tmp_path: Path) -> None:
    put(tmp_path, payload(model="chronos2"), symbol="NVDA")
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.model == "chronos2"


def test_useless_numbers_are_left_out_and_zero_is_kept(tmp_path: Path) -> None:
    put(tmp_path, payload(validation={"pct_return_mae": math.inf, "price_mae": None, "latency_s": 0}))
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.validation == {"latency_s": 0}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b'{"symbol": "NVDA", "conf', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "not a JSON object"),
        (payload(symbol="AAPL"), "it is about 'AAPL'"),
        (payload(model=None), "it names no model"),
        ({"symbol": "NVDA", "model": "toto"}, "'config' is missing"),
        (payload(config=[1]), "'config' is not an object"),
        (payload(validation=0.1), "'validation' is not an object"),
        (payload(test={"pct_return_mae": "0.1"}), r"'test\.pct_return_mae' is not a number"),
    ],
)
def test_damaged_file_is_named_and_left(tmp_path: Path, content: object, why: str) -> None:
    path = put(tmp_path, content)
    before = path.read_bytes()
    with pytest.raises(ConfigFileError, match=why) as caught:
        configs.read(tmp_path, "best", "NVDA")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("symbol", ["", "nvda", "../NVDA", "A/B", "A..B", ".A", "-A", "A\n", "A B", "Ä", "A\0"])
def test_what_is_no_symbol_is_refused(tmp_path: Path, symbol: str) -> None:
    with pytest.raises(ValueError, match="is not a symbol"):
        configs.read(tmp_path, "best", symbol)
    with pytest.raises(ValueError, match="is not a symbol"):
        configs.write(tmp_path, symbol, payload(symbol=symbol), ["best"])
    assert list(tmp_path.iterdir()) == []


def test_symbols_with_dots_and_dashes(tmp_path: Path) -> None:
    for symbol in ("BRK.B", "ADA-USD", "7203.T", "A"):
        configs.write(tmp_path, symbol, payload(symbol=symbol), ["best"])
        assert configs.read(tmp_path, "best", symbol)


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'history' is not one of"):
        configs.read(tmp_path, "history", "NVDA")
    with pytest.raises(ValueError, match=r"'\.\.' is not one of"):
        configs.write(tmp_path, "NVDA", payload(), [".."])


# --- writing


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"validation": {"pct_return_mae": math.nan}}, "not JSON compliant"),
        ({"config": {"clip": -math.inf}}, "not JSON compliant"),
        ({"metadata": {"path": Path("/")}}, "not JSON serializable"),
        ({"symbol": "AAPL"}, "of another symbol"),
    ],
)
def test_payload_that_no_reader_could_use_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        configs.write(tmp_path, "NVDA", payload(**changes), EVERYWHERE)
    with pytest.raises(ValueError, match="config, validation missing"):
        configs.write(tmp_path, "NVDA", {"symbol": "NVDA", "model": "toto"}, EVERYWHERE)
    assert list(tmp_path.iterdir()) == []


def test_replaced_file_is_kept_byte_by_byte(tmp_path: Path) -> None:
    old = b'{"symbol":"NVDA", "model":"toto",\t"config":{}, "note": "mine"}'
    put(tmp_path, old)
    put(tmp_path, old, "optimized_compiled")
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert history(tmp_path) == [old]
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)  # the same again replaces nothing
    assert history(tmp_path) == [old]
    configs.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
    assert [json.loads(kept).get("note") for kept in history(tmp_path)] == ["mine", None]
    entry = min((tmp_path / "history" / "NVDA").glob("*.json"))
    stamp, digest = entry.stem.split("-")
    assert datetime.strptime(stamp, "%Y%m%dT%H%M%S%fZ")
    assert len(digest) == 8


def test_a_models_own_file_is_kept_too_where_best_held_another(tmp_path: Path) -> None:
    put(tmp_path, b'{"hand": "made"}', "toto")
    put(tmp_path, payload(model="kronos"))
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert [json.loads(kept)["model"] for kept in history(tmp_path)] == ["kronos"]
    assert [path.read_bytes() for path in (tmp_path / "history" / "NVDA" / "toto").iterdir()] == [b'{"hand": "made"}']


def test_damaged_file_can_be_replaced_and_is_kept(tmp_path: Path) -> None:
    put(tmp_path, b'{"torn')
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert history(tmp_path) == [b'{"torn']
    assert configs.read(tmp_path, "best", "NVDA")


def test_writer_that_read_something_else_is_refused(tmp_path: Path) -> None:
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE, expected_digest=None)
    first = configs.read(tmp_path, "best", "NVDA")
    assert first
    configs.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE, expected_digest=first.digest)
    second = (tmp_path / "best" / "NVDA.json").read_bytes()
    for stale in (first.digest, None):
        with pytest.raises(ConcurrentWrite, match="was replaced meanwhile"):
            configs.write(tmp_path, "NVDA", payload(0.02), EVERYWHERE, expected_digest=stale)
    assert {(tmp_path / folder / "NVDA.json").read_bytes() for folder in EVERYWHERE} == {second}
    assert len(history(tmp_path)) == 1
    (tmp_path / "best" / "NVDA.json").unlink()
    with pytest.raises(ConcurrentWrite):
        configs.write(tmp_path, "NVDA", payload(0.02), EVERYWHERE, expected_digest=first.digest)


def test_unwritable_folder_changes_nothing(tmp_path: Path) -> None:
    configs.write(tmp_path, "NVDA", payload(), ["toto", "best"])
    before = (tmp_path / "best" / "NVDA.json").read_bytes()
    (tmp_path / "optimized_compiled").write_text("a file where a folder should be")
    with pytest.raises(ConfigFileError, match="optimized_compiled"):
        configs.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
    assert {(tmp_path / folder / "NVDA.json").read_bytes() for folder in ("toto", "best")} == {before}
    assert not list(tmp_path.rglob("*.tmp"))


def test_file_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath("best", "NVDA.json").mkdir(parents=True)
    with pytest.raises(ConfigFileError, match=r"NVDA\.json: Is a directory"):
        configs.read(tmp_path, "best", "NVDA")


# --- crashes and races

WRITER = """
import itertools, pathlib, sys
from storage import configs
for version in itertools.count():
    content = dict(symbol="NVDA", model="toto", config={"version": version}, validation={}, pad="x" * 2**17)
    configs.write(pathlib.Path(sys.argv[1]), "NVDA", content, ("toto", "best", "optimized_compiled"))
    if version == 0: print(flush=True)
"""


def test_killed_writer_leaves_whole_files_and_loses_none(tmp_path: Path) -> None:
    for attempt in range(10):
        root = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, root], cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert writer.stdout
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        versions = {}
        for folder in EVERYWHERE:
            record = configs.read(root, folder, "NVDA")
            assert record
            assert len(record.raw["pad"]) == 2**17
            versions[folder] = record.config["version"]
        assert versions["best"] <= versions["optimized_compiled"] <= versions["toto"] <= versions["best"] + 1
        # What best held before is in the history; what it holds now may be, if the next write had begun.
        kept = [json.loads(content)["config"]["version"] for content in history(root)]
        assert kept in (list(range(versions["best"])), list(range(versions["best"] + 1)))
        configs.write(root, "NVDA", payload(), EVERYWHERE)
        assert not list(root.rglob("*.tmp"))


COUNTER = """
import pathlib, sys
from storage import configs
root, done = pathlib.Path(sys.argv[1]), 0
while done < 10:
    record = configs.read(root, "best", "NVDA")
    count = record.metadata["count"] if record else 0
    content = dict(symbol="NVDA", model="toto", config={}, validation={}, metadata={"count": count + 1})
    try:
        configs.write(root, "NVDA", content, ("toto", "best"), expected_digest=record.digest if record else None)
    except configs.ConcurrentWrite:
        continue
    done += 1
"""


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNTER, tmp_path], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_concurrent_promotions_lose_no_update(tmp_path: Path, counters: list[subprocess.Popen[bytes]]) -> None:
    errors = [process.communicate(timeout=60)[1] for process in counters]
    assert errors == [b""] * 6
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.metadata["count"] == 60
    assert [json.loads(content)["metadata"]["count"] for content in history(tmp_path)] == list(range(1, 60))
