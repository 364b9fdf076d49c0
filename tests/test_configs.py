"""The promoted files: every form of the predecessor is read, and no crash or race loses or tears one."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
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


def history(root: Path, folder: str = "best") -> list[bytes]:
    """What the folder held before each step that had anything to replace or keep, oldest first."""
    return [path.read_bytes() for path in sorted((root / "history" / "NVDA").glob(f"*Z/{folder}.json"))]


def files(root: Path) -> dict[str, bytes]:
    """What every folder holds for the symbol."""
    paths = {folder: root / folder / "NVDA.json" for folder in configs.FOLDERS}
    return {folder: path.read_bytes() for folder, path in paths.items() if path.exists()}


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


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
    written = [*tmp_path.glob("*/NVDA.json"), *tmp_path.glob("history/NVDA/*/*")]
    assert len(written) == 3 + 2 + 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode}


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


def test_kronos_files_of_the_extended_sweep(tmp_path: Path) -> None:
    config = {"name": "kronos_ext", "temperature": 0.15, "top_p": 0.82, "top_k": 16, "sample_count": 208}
    extended = {"source": "hyperparamtraining", "extended_path": "hyperparams_extended/kronos/NVDA.json"}
    metrics = {"price_mae": 4.1251, "pct_return_mae": 0.022682, "latency_s": 35.19}
    put(tmp_path, payload(model="kronos", config=config, test=metrics, metadata=extended, horizon_note="1d"), "kronos")
    record = configs.read(tmp_path, "kronos", "NVDA")
    assert record
    assert (record.model, record.config, record.test, record.metadata) == ("kronos", config, metrics, extended)
    assert record.raw["horizon_note"] == "1d"  # keys that nobody knows are kept


def test_file_in_a_models_folder_may_not_name_its_model(tmp_path: Path) -> None:
    content = {"config": {"temperature": 0.15, "clip": 1.8}, "validation": {"pct_return_mae": 0.0185}}
    put(tmp_path, content, "kronos")
    record = configs.read(tmp_path, "kronos", "NVDA")
    assert record
    assert (record.symbol, record.model) == ("NVDA", "kronos")


def test_other_models_are_read_as_found(tmp_path: Path) -> None:
    config = {"name": "chronos2_ctx512", "model_id": "amazon/chronos-2", "quantile_levels": [0.1, 0.5, 0.9]}
    put(tmp_path, payload(model="chronos2", config=config, config_path=None))
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert (record.model, record.config, record.config_path) == ("chronos2", config, None)


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
    put(tmp_path, b'{"hand": "made"}', "toto")
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert (history(tmp_path), history(tmp_path, "toto")) == ([old], [b'{"hand": "made"}'])
    before = everything(tmp_path)
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)  # the same again replaces nothing
    assert everything(tmp_path) == before
    configs.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
    assert [json.loads(kept).get("note") for kept in history(tmp_path)] == ["mine", None]


def test_step_of_the_history_says_what_it_replaces(tmp_path: Path) -> None:
    put(tmp_path, b"{}")
    configs.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    configs.write(tmp_path, "NVDA", payload(0.01, model="kronos"), ("kronos", "best", "optimized_compiled"))
    first, second = sorted((tmp_path / "history" / "NVDA").iterdir())
    assert {path.name for path in first.iterdir()} == {"step.json", "best.json", "promoted.json"}
    assert {path.name for path in second.iterdir()} == {
        *("step.json", "promoted.json", "best.json", "optimized_compiled.json", "toto.json")
    }
    assert (second / "promoted.json").read_bytes() == (tmp_path / "best" / "NVDA.json").read_bytes()
    step = json.loads((second / "step.json").read_text())
    assert (step["symbol"], step["action"], step["undoes"]) == ("NVDA", "promotion", [])
    number, stamp = second.name.split("-")
    assert number == "0002"
    assert datetime.strptime(stamp, "%Y%m%dT%H%M%SZ") == datetime.strptime(step["time"], "%Y-%m-%dT%H:%M:%SZ")
    toto, kronos = (hashlib.sha256((step_ / "promoted.json").read_bytes()).hexdigest() for step_ in (first, second))
    assert step["before"] == {"toto": toto, "kronos": None, "optimized_compiled": toto, "best": toto}
    assert step["after"] == {"kronos": kronos, "optimized_compiled": kronos, "best": kronos}


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


# --- rolling back


def toto(version: int) -> dict[str, Any]:
    return payload(config={"num_samples": 64, "aggregate": "mean", "version": version})


def kronos(version: int) -> dict[str, Any]:
    return payload(model="kronos", config={"temperature": 0.2, "version": version})


def promote(root: Path, content: dict[str, Any], *, own: bool = False) -> None:
    folders = (content["model"],) if own else (content["model"], "best", "optimized_compiled")
    configs.write(root, "NVDA", content, folders)


def predecessor(root: Path) -> None:
    """Files that nobody's history knows."""
    for folder in ("toto", "best", "optimized_compiled"):
        put(root, b'{"model":"toto_compiled", "config": {"num_samples": 64}}', folder)


def test_each_rollback_restores_what_a_promotion_replaced_back_to_the_first(tmp_path: Path) -> None:
    predecessor(tmp_path)
    states = [files(tmp_path)]
    for content in (toto(1), kronos(1), kronos(2), toto(2)):
        promote(tmp_path, content)
        states.append(files(tmp_path))
    models = ["toto", "toto", "kronos", "kronos"]
    for remaining in (3, 2, 1, 0):
        gone = states.pop()
        restored = configs.rollback(tmp_path, "NVDA")
        assert files(tmp_path) == states[-1]
        assert (restored.symbol, restored.model, restored.remaining) == ("NVDA", models[remaining], remaining)
        changed = {f for f in configs.FOLDERS if gone.get(f) != states[-1].get(f)}
        assert {path.parent.name for path in (*restored.restored, *restored.removed)} == changed
        assert restored.mismatch is None
        assert restored.kept
        assert {path.stem: path.read_bytes() for path in restored.kept.iterdir() if path.stem != "step"} == gone
        assert (restored.step / "promoted.json").read_bytes() == gone["best"]
    before = everything(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to; .*$"):
            configs.rollback(tmp_path, "NVDA", dry_run=dry_run)
    assert everything(tmp_path) == before


def test_rollback_over_a_file_that_was_not_there_removes_it(tmp_path: Path) -> None:
    promote(tmp_path, toto(1))
    promote(tmp_path, kronos(1))
    restored = configs.rollback(tmp_path, "NVDA")
    assert restored.removed == (tmp_path / "kronos" / "NVDA.json",)
    assert [path.parent.name for path in restored.restored] == ["optimized_compiled", "best"]
    assert set(files(tmp_path)) == {"toto", "optimized_compiled", "best"}
    with pytest.raises(ConfigFileError, match="nothing left"):  # the first file stays
        configs.rollback(tmp_path, "NVDA")
    assert configs.read(tmp_path, "best", "NVDA")


def test_promotion_after_a_rollback_is_rolled_back_to_the_same(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        promote(tmp_path, toto(version))
    configs.rollback(tmp_path, "NVDA")
    promote(tmp_path, kronos(4))
    for version in (2, 1):
        configs.rollback(tmp_path, "NVDA")
        record = configs.read(tmp_path, "best", "NVDA")
        assert record
        assert record.config["version"] == version
    kept = b"".join(everything(tmp_path / "history").values())
    for version in (1, 2, 3, 4):
        assert b'"version": %d' % version in kept


def test_promotions_within_the_other_model_are_not_rolled_back(tmp_path: Path) -> None:
    promote(tmp_path, toto(1))
    promote(tmp_path, kronos(1), own=True)
    promote(tmp_path, toto(2))
    promote(tmp_path, kronos(2), own=True)
    both = configs.read(tmp_path, "kronos", "NVDA")
    assert both
    restored = configs.rollback(tmp_path, "NVDA")
    assert restored.remaining == 0
    for folder, version in {"best": 1, "optimized_compiled": 1, "toto": 1, "kronos": 2}.items():
        record = configs.read(tmp_path, folder, "NVDA")
        assert record
        assert record.config["version"] == version


def test_both_readers_get_the_same_after_a_rollback(tmp_path: Path) -> None:
    promote(tmp_path, kronos(1))
    promote(tmp_path, toto(1))
    promote(tmp_path, kronos(2), own=True)  # kronos/ goes on while best names toto
    late = (tmp_path / "kronos" / "NVDA.json").read_bytes()
    restored = configs.rollback(tmp_path, "NVDA")
    best, own = (configs.read(tmp_path, folder, "NVDA") for folder in ("best", "kronos"))
    assert best
    assert own
    assert best.model == own.model == restored.model == "kronos"
    assert best.config == own.config == kronos(1)["config"]
    assert restored.mismatch is None
    assert restored.kept
    assert (restored.kept / "kronos.json").read_bytes() == late


@pytest.mark.parametrize("own", [None, b'{"config": {"num_samples": 4096}}'])
def test_readers_that_disagreed_before_do_so_again_and_it_is_said(tmp_path: Path, own: bytes | None) -> None:
    put(tmp_path, b'{"model":"toto_compiled", "config": {"num_samples": 64}}')
    if own:
        put(tmp_path, own, "toto")
    before = files(tmp_path)
    promote(tmp_path, toto(1))
    assert configs.rollback(tmp_path, "NVDA").mismatch == tmp_path / "toto" / "NVDA.json"
    assert files(tmp_path) == before


@pytest.mark.parametrize("damaged", [b'{"torn', b"", b"\xff\xfe"])
def test_damaged_file_comes_back_as_it_was(tmp_path: Path, damaged: bytes) -> None:
    put(tmp_path, damaged)
    promote(tmp_path, toto(1))
    assert configs.rollback(tmp_path, "NVDA").model is None
    assert files(tmp_path) == {"best": damaged}


def test_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    predecessor(tmp_path)
    promote(tmp_path, kronos(1))
    (tmp_path / ".locks" / "NVDA.lock").unlink()
    before = everything(tmp_path)
    dry = configs.rollback(tmp_path, "NVDA", dry_run=True)
    assert everything(tmp_path) == before
    real = configs.rollback(tmp_path, "NVDA")
    assert real.kept
    assert dataclasses.replace(real, kept=None) == dry


def test_symbol_without_history_has_nothing_left_and_gets_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to"):
        configs.rollback(tmp_path, "NVDA")
    with pytest.raises(ValueError, match="is not a symbol"):
        configs.rollback(tmp_path, "../NVDA")
    promote(tmp_path, kronos(1), own=True)
    before = everything(tmp_path)
    with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to"):
        configs.rollback(tmp_path, "NVDA")
    assert everything(tmp_path) == before


def test_what_others_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    predecessor(tmp_path)
    first = files(tmp_path)
    promote(tmp_path, toto(1))
    put(tmp_path, foreign := b'{"model": "chronos2", "config": {}}')
    restored = configs.rollback(tmp_path, "NVDA")
    assert files(tmp_path) == first
    assert restored.kept
    assert (restored.kept / "best.json").read_bytes() == foreign


def test_rollback_goes_on_behind_what_was_put_back_by_hand(tmp_path: Path) -> None:
    states = []
    for version in (1, 2, 3):
        promote(tmp_path, toto(version))
        states.append(files(tmp_path))
    promote(tmp_path, kronos(9), own=True)
    for folder in EVERYWHERE:
        put(tmp_path, states[1][folder], folder)
    restored = configs.rollback(tmp_path, "NVDA")
    assert restored.remaining == 0
    assert {folder: files(tmp_path)[folder] for folder in EVERYWHERE} == states[0]
    with pytest.raises(ConfigFileError, match="nothing left"):
        configs.rollback(tmp_path, "NVDA")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("best.json", b"{}", r"best\.json: missing or changed since; put back"),
        ("best.json", None, r"best\.json: missing or changed since; put back"),
        ("step.json", b"{", r"step\.json: not a step of the history"),
        ("step.json", b"{}", r"step\.json: not a step of the history"),
        ("step.json", b"[]", r"step\.json: not a step of the history"),
        ("step.json", None, r"step\.json: No such file"),
    ],
)
def test_damaged_history_is_named_and_changes_nothing(
    tmp_path: Path, name: str, content: bytes | None, why: str
) -> None:
    promote(tmp_path, toto(1))
    promote(tmp_path, toto(2))
    path = sorted((tmp_path / "history" / "NVDA").iterdir())[-1] / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    before = everything(tmp_path)
    with pytest.raises(ConfigFileError, match=why) as caught:
        configs.rollback(tmp_path, "NVDA")
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == before


# --- crashes and races

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


# Kills a child that does `action` in a copy of `template`, after each of its system calls in turn, from the first one
# to the last. The copies are left as the children left them: {out}/0, {out}/1, ...
KILLER = """
import ctypes, os, pathlib, shutil, signal, sys
from storage import configs
template, out, action = sys.argv[1:]
template, out, action = pathlib.Path(template), pathlib.Path(out), compile(action, "action", "exec")
TRACEME, SYSCALL, SETOPTIONS, SYSGOOD_EXITKILL, REFUSED = 0, 24, 0x4200, 0x100001, 77
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes, ptrace.restype = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p), ctypes.c_long

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # the two take turns: one core is faster than two

def killed_after(calls, root):
    pid = os.fork()
    if pid == 0:
        if ptrace(TRACEME, 0, None, None):
            os._exit(REFUSED)
        os.kill(os.getpid(), signal.SIGSTOP)  # counting begins
        try:
            exec(action, {"configs": configs, "root": root})
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    def stopped():
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            if code:
                sys.exit(code)
            return False
        return True
    stopped()
    assert ptrace(SETOPTIONS, pid, None, SYSGOOD_EXITKILL) == 0
    ptrace(SYSCALL, pid, None, None)
    stopped()  # the rest of kill(2)
    for _ in range(calls):
        for _ in "before", "after":
            assert ptrace(SYSCALL, pid, None, None) == 0
            if not stopped():
                return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True

calls = 0
while True:
    root = out / str(calls)
    shutil.copytree(template, root) if template.exists() else root.mkdir()
    if not killed_after(calls, root):
        break
    calls += 1
print(calls)
"""
ROLLBACK = "configs.rollback(root, 'NVDA')"


@pytest.fixture
def attack(scratch: Path) -> Iterator[Callable[[Path, str], list[Path]]]:
    """`attack(template, action)`: what an action killed after each of its system calls leaves of the template.

    The last of the folders is of an action that was not killed. In memory: a thousand children sync forty files each.
    """
    if sys.platform != "linux":
        pytest.skip("ptrace is called as on Linux")
    folder = scratch / uuid.uuid4().hex

    def run(template: Path, action: str) -> list[Path]:
        out = folder / str(len(list(folder.iterdir())))
        out.mkdir()
        killer = [sys.executable, "-c", KILLER, str(template), str(out), action]
        done = subprocess.run(killer, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this machine does not permit ptrace, which is needed to kill at a system call")
        assert (done.returncode, done.stderr) == (0, "")
        return [out / str(calls) for calls in range(int(done.stdout) + 1)]

    folder.mkdir()
    yield run
    shutil.rmtree(folder)


def writing(content: dict[str, Any]) -> str:
    return f"configs.write(root, 'NVDA', {content!r}, ({content['model']!r}, 'best', 'optimized_compiled'))"


def check_whole(root: Path, old: dict[str, bytes], new: dict[str, bytes]) -> bool:
    """Every file is the old or the new one, `best` new only where all are, all old ones exist. Whether it happened."""
    now = files(root)
    for folder in configs.FOLDERS:
        assert now.get(folder) in (old.get(folder), new.get(folder))
    assert set(old.values()) <= {*now.values(), *everything(root / "history").values()}
    happened = now.get("best") == new["best"]
    if happened:
        assert now == new
    return happened


def check_tidy(root: Path) -> None:
    assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
    assert (root / ".locks" / ".gitignore").read_bytes() == b"*\n"


def check_walks_back(root: Path, states: list[dict[str, bytes]]) -> None:
    """Rolling back goes through these states, newest first, and no further."""
    for state in reversed(states):
        configs.rollback(root, "NVDA")
        assert files(root) == state
        check_tidy(root)
    with pytest.raises(ConfigFileError, match="nothing left"):
        configs.rollback(root, "NVDA")


def goes_on(root: Path, states: list[dict[str, bytes]], present: dict[str, bytes]) -> None:
    """The next writer, in one copy a write and in the other a rollback, works as if nothing had ever been killed."""
    other = root.with_name(f"{root.name}-other")
    shutil.copytree(root, other)
    dry = configs.rollback(other, "NVDA", dry_run=True) if states else None
    check_walks_back(other, states)
    assert dry is None or dry.remaining == len(states) - 1

    promote(root, toto(99))
    check_tidy(root)
    record = configs.read(root, "kronos", "NVDA")
    assert (record.raw if record else None) == (json.loads(present["kronos"]) if "kronos" in present else None)
    check_walks_back(root, [*states, present] if present else states)


def distinct(roots: list[Path]) -> list[Path]:
    """One of each state: most system calls change nothing, and the next writer sees no more than the files."""
    found = {}
    for root in roots:
        paths = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}
        times = re.compile(r"\d{4}-?\d\d-?\d\dT\d\d:?\d\d:?\d\dZ")
        found[times.sub("", repr(sorted(paths.items())))] = root
    return list(found.values())


def history_of(root: Path, *contents: dict[str, Any]) -> list[dict[str, bytes]]:
    """The states of the files before each promotion and after the last."""
    states = [files(root)]
    for content in contents:
        promote(root, content)
        states.append(files(root))
    return states


def test_writer_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    template = tmp_path / "template"
    predecessor(template)
    *states, old = history_of(template, toto(1))
    roots = attack(template, writing(kronos(2)))
    new = files(roots[-1])
    outcomes = []
    for root in roots:
        now = files(root)
        happened = check_whole(root, old, new)
        outcomes.append("new" if happened else "old" if now == old else "between")
    assert outcomes == sorted(outcomes, key=["old", "between", "new"].index)  # one way, never back
    assert min(outcomes.count(outcome) for outcome in ("old", "between", "new")) > 5
    for root in distinct(roots):
        happened = files(root) == new
        goes_on(root, [*states, old] if happened else states, new if happened else old)


def test_first_writer_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    roots = attack(tmp_path / "nothing", writing(toto(1)))
    new = files(roots[-1])
    happened = [check_whole(root, {}, new) for root in roots]
    assert 5 < sum(happened) < len(happened) - 5
    for root in distinct(roots):
        goes_on(root, [], new if files(root) == new else {})


def test_rollback_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    template = tmp_path / "template"
    *states, restored, old = history_of(template, toto(0), toto(1), kronos(2))
    states = states[1:]  # before the first there was no file
    roots = attack(template, ROLLBACK)
    assert files(roots[-1]) == restored
    happened = [check_whole(root, old, restored) for root in roots]
    assert 5 < sum(happened) < len(happened) - 5
    for root in distinct(roots):
        done = files(root) == restored
        goes_on(root, states if done else [*states, restored], restored if done else old)


@pytest.mark.slow
def test_recovery_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    """The writer after a killed one is killed too, wherever it is in taking back what the first one left."""
    template = tmp_path / "template"
    _, *states, old = history_of(template, toto(1), kronos(2), kronos(3))
    crashed = tmp_path / "crashed"
    shutil.copytree(template, crashed)
    promote(crashed, kronos(4))
    put(crashed, old["best"])  # as if killed before the last rename
    roots = attack(crashed, writing(toto(5)))
    new = files(roots[-1])
    assert new["kronos"] == old["kronos"]
    between = {**old, **{folder: content for folder, content in files(crashed).items() if folder != "best"}}
    for root in roots:
        now = files(root)
        for folder in configs.FOLDERS:
            assert now[folder] in (old[folder], between[folder], new[folder])
        assert set(old.values()) <= {*now.values(), *everything(root / "history").values()}
        happened = now["best"] == new["best"]
        assert now == new if happened else now["best"] == old["best"]
    for root in distinct(roots):
        happened = files(root) == new
        goes_on(root, [*states, old] if happened else states, new if happened else old)


@pytest.mark.parametrize("act", ["write", "rollback"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_failure_at_any_call_leaves_all_old_or_all_new(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, fault: int
) -> None:
    """A disk that is full from some call on, so that nothing new can be made; any one call that fails."""
    template = tmp_path / "template"
    _, *states, old = history_of(template, toto(0), toto(1), kronos(2))
    real = {name: getattr(os, name) for name in ("open", "mkdir", "fsync", "replace", "rename", "unlink")}
    left = 0

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            makes = name == "mkdir" or (name == "open" and args[1] & os.O_CREAT)
            if fault == errno.EIO or makes or (name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode)):
                left -= 1
                if left == -1 or (left < 0 and fault == errno.ENOSPC):
                    raise OSError(fault, os.strerror(fault))
            return real[name](*args, **options)

        return call

    folder = scratch / uuid.uuid4().hex
    failed = []
    while not failed or left < 0:
        root = folder / str(len(failed))
        shutil.copytree(template, root)
        failed.append(root)
        left = len(failed) - 1
        message = None
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                promote(root, toto(3)) if act == "write" else configs.rollback(root, "NVDA")
            except ConfigFileError as error:
                message = str(error)
        if message is not None:
            assert os.strerror(fault) in message
            assert "\n" not in message
            assert files(root) == old or fault == errno.EIO
    new = files(failed[-1])
    assert new["best"] != old["best"]
    assert len(failed) > (10 if fault == errno.ENOSPC else 35)
    for root in distinct(failed):
        happened = check_whole(root, old, new)
        assert files(root) == (new if happened else old)
        past = [*states, old] if act == "write" else states[:-1]
        goes_on(root, past if happened else states, new if happened else old)
    shutil.rmtree(folder)


ROLLER = """
import pathlib, sys
from storage import configs
root, done = pathlib.Path(sys.argv[1]), 0
while done < 8:
    try:
        configs.rollback(root, "NVDA")
    except configs.ConfigFileError as error:
        assert "nothing left" in str(error), error
        continue
    done += 1
"""
PROMOTER = """
import json, pathlib, sys
from storage import configs
root, name, model = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for version in range(12):
    content = dict(symbol="NVDA", model=model, config={"version": f"{name}-{version}"}, validation={})
    configs.write(root, "NVDA", content, (model, "best", "optimized_compiled"))
"""


def test_promotions_and_rollbacks_at_once_are_never_mixed(tmp_path: Path) -> None:
    commands = [(PROMOTER, "a", "toto"), (PROMOTER, "b", "kronos"), (ROLLER,), (ROLLER,)]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, *rest], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for code, *rest in commands
    ]
    try:
        assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait()
    remaining = 24 - 16 - 1  # the very first has nothing before it
    kept = [path.read_bytes() for path in (tmp_path / "history" / "NVDA").glob("*/promoted.json")]
    assert len(set(kept)) == len(kept) == 24
    while True:
        now = files(tmp_path)
        model = json.loads(now["best"])["model"]
        assert now["best"] == now["optimized_compiled"] == now[model]
        if not remaining:
            break
        remaining -= 1
        assert configs.rollback(tmp_path, "NVDA").remaining == remaining
    with pytest.raises(ConfigFileError, match="nothing left"):
        configs.rollback(tmp_path, "NVDA")
