"""The promoted files: every form of the predecessor is read, what is written is kept, and every step can be undone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from storage import configs, history
from storage.configs import ConfigFileError
from storage.history import ConcurrentWrite

FOLDERS = ("toto", "kronos", "optimized_compiled", "best")
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


def replaced(root: Path, folder: str = "best") -> list[bytes]:
    """What the folder held before each step that had anything to replace or keep, oldest first."""
    return [path.read_bytes() for path in sorted((root / "history" / "NVDA").glob(f"*Z/{folder}.json"))]


def files(root: Path) -> dict[str, bytes]:
    """What every folder holds for the symbol."""
    paths = {folder: root / folder / "NVDA.json" for folder in FOLDERS}
    return {folder: path.read_bytes() for folder, path in paths.items() if path.exists()}


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert configs.read(tmp_path, "best", "NVDA") is None
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE, expected_digest=None)
    for folder in EVERYWHERE:
        record = configs.read(tmp_path, folder, "NVDA")
        assert record
        assert record.raw == payload()
        assert (record.symbol, record.model, record.path) == ("NVDA", "toto", tmp_path / folder / "NVDA.json")
        assert record.validation["pct_return_mae"] == 0.0125
    assert configs.read(tmp_path, "kronos", "NVDA") is None
    assert replaced(tmp_path) == []


def test_layout_of_the_file(tmp_path: Path) -> None:
    shuffled = {"extra": 1, **dict(reversed(payload().items()))}
    history.write(tmp_path, "NVDA", shuffled, ["best"])
    text = (tmp_path / "best" / "NVDA.json").read_text()
    assert list(json.loads(text)) == [*configs.KEYS, "extra"]
    assert text.startswith('{\n  "symbol": "NVDA",\n')
    assert text.endswith("}\n")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_mode_respects_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        history.write(tmp_path, "NVDA", payload(), EVERYWHERE)
        history.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
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
        history.write(tmp_path, symbol, payload(symbol=symbol), ["best"])
    assert list(tmp_path.iterdir()) == []


def test_symbols_with_dots_and_dashes(tmp_path: Path) -> None:
    for symbol in ("BRK.B", "ADA-USD", "7203.T", "A"):
        history.write(tmp_path, symbol, payload(symbol=symbol), ["best"])
        assert configs.read(tmp_path, "best", symbol)


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'history' is not a folder"):
        configs.read(tmp_path, "history", "NVDA")
    with pytest.raises(ValueError, match=r"'\.\.' is not a folder"):
        history.write(tmp_path, "NVDA", payload(), [".."])


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
        history.write(tmp_path, "NVDA", payload(**changes), EVERYWHERE)
    with pytest.raises(ValueError, match="config, validation missing"):
        history.write(tmp_path, "NVDA", {"symbol": "NVDA", "model": "toto"}, EVERYWHERE)
    assert list(tmp_path.iterdir()) == []


def test_replaced_file_is_kept_byte_by_byte(tmp_path: Path) -> None:
    old = b'{"symbol":"NVDA", "model":"toto",\t"config":{}, "note": "mine"}'
    put(tmp_path, old)
    put(tmp_path, b'{"hand": "made"}', "toto")
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert (replaced(tmp_path), replaced(tmp_path, "toto")) == ([old], [b'{"hand": "made"}'])
    before = everything(tmp_path)
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE)  # the same again replaces nothing
    assert everything(tmp_path) == before
    history.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
    assert [json.loads(kept).get("note") for kept in replaced(tmp_path)] == ["mine", None]


def test_step_of_the_history_says_what_it_replaces(tmp_path: Path) -> None:
    put(tmp_path, b"{}")
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    history.write(tmp_path, "NVDA", payload(0.01, model="kronos"), ("kronos", "best", "optimized_compiled"))
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
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE)
    assert replaced(tmp_path) == [b'{"torn']
    assert configs.read(tmp_path, "best", "NVDA")


def test_writer_that_read_something_else_is_refused(tmp_path: Path) -> None:
    history.write(tmp_path, "NVDA", payload(), EVERYWHERE, expected_digest=None)
    first = configs.read(tmp_path, "best", "NVDA")
    assert first
    history.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE, expected_digest=first.digest)
    second = (tmp_path / "best" / "NVDA.json").read_bytes()
    for stale in (first.digest, None):
        with pytest.raises(ConcurrentWrite, match="was replaced meanwhile"):
            history.write(tmp_path, "NVDA", payload(0.02), EVERYWHERE, expected_digest=stale)
    assert {(tmp_path / folder / "NVDA.json").read_bytes() for folder in EVERYWHERE} == {second}
    assert len(replaced(tmp_path)) == 1
    (tmp_path / "best" / "NVDA.json").unlink()
    with pytest.raises(ConcurrentWrite):
        history.write(tmp_path, "NVDA", payload(0.02), EVERYWHERE, expected_digest=first.digest)


def test_unwritable_folder_changes_nothing(tmp_path: Path) -> None:
    history.write(tmp_path, "NVDA", payload(), ["toto", "best"])
    before = (tmp_path / "best" / "NVDA.json").read_bytes()
    (tmp_path / "optimized_compiled").write_text("a file where a folder should be")
    with pytest.raises(ConfigFileError, match="optimized_compiled"):
        history.write(tmp_path, "NVDA", payload(0.01), EVERYWHERE)
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
    history.write(root, "NVDA", content, folders)


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
        restored = history.rollback(tmp_path, "NVDA")
        assert files(tmp_path) == states[-1]
        assert (restored.symbol, restored.model, restored.remaining) == ("NVDA", models[remaining], remaining)
        changed = {f for f in FOLDERS if gone.get(f) != states[-1].get(f)}
        assert {path.parent.name for path in (*restored.restored, *restored.removed)} == changed
        assert restored.mismatch is None
        assert restored.kept
        assert {path.stem: path.read_bytes() for path in restored.kept.iterdir() if path.stem != "step"} == gone
        assert (restored.step / "promoted.json").read_bytes() == gone["best"]
    before = everything(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to; .*$"):
            history.rollback(tmp_path, "NVDA", dry_run=dry_run)
    assert everything(tmp_path) == before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    root, live = tmp_path / "hyperparams", tmp_path / "live" / "nvda.json"
    live.parent.mkdir()
    link = root / "best" / "NVDA.json"
    link.parent.mkdir(parents=True)
    link.symlink_to(live)  # which is not there yet
    folders = ("toto", "best", "optimized_compiled")
    for mae in (0.0125, 0.0120):
        history.write(root, "NVDA", payload(mae), folders)
        assert link.readlink() == live
        assert live.read_bytes() == (root / "toto" / "NVDA.json").read_bytes()
    assert not (root / "toto" / "NVDA.json").is_symlink()
    history.rollback(root, "NVDA")
    assert link.readlink() == live
    assert json.loads(live.read_bytes())["validation"]["pct_return_mae"] == 0.0125
    assert [path.name for path in live.parent.iterdir()] == ["nvda.json"]  # nothing is left beside it


def test_rollback_over_a_file_that_was_not_there_removes_it(tmp_path: Path) -> None:
    promote(tmp_path, toto(1))
    promote(tmp_path, kronos(1))
    restored = history.rollback(tmp_path, "NVDA")
    assert restored.removed == (tmp_path / "kronos" / "NVDA.json",)
    assert [path.parent.name for path in restored.restored] == ["optimized_compiled", "best"]
    assert set(files(tmp_path)) == {"toto", "optimized_compiled", "best"}
    with pytest.raises(ConfigFileError, match="nothing left"):  # the first file stays
        history.rollback(tmp_path, "NVDA")
    assert configs.read(tmp_path, "best", "NVDA")


def test_promotion_after_a_rollback_is_rolled_back_to_the_same(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        promote(tmp_path, toto(version))
    history.rollback(tmp_path, "NVDA")
    promote(tmp_path, kronos(4))
    for version in (2, 1):
        history.rollback(tmp_path, "NVDA")
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
    restored = history.rollback(tmp_path, "NVDA")
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
    restored = history.rollback(tmp_path, "NVDA")
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
    assert history.rollback(tmp_path, "NVDA").mismatch == tmp_path / "toto" / "NVDA.json"
    assert files(tmp_path) == before


@pytest.mark.parametrize("damaged", [b'{"torn', b"", b"\xff\xfe"])
def test_damaged_file_comes_back_as_it_was(tmp_path: Path, damaged: bytes) -> None:
    put(tmp_path, damaged)
    promote(tmp_path, toto(1))
    assert history.rollback(tmp_path, "NVDA").model is None
    assert files(tmp_path) == {"best": damaged}


def test_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    predecessor(tmp_path)
    promote(tmp_path, kronos(1))
    (tmp_path / ".locks" / "NVDA.lock").unlink()
    before = everything(tmp_path)
    dry = history.rollback(tmp_path, "NVDA", dry_run=True)
    assert everything(tmp_path) == before
    real = history.rollback(tmp_path, "NVDA")
    assert real.kept
    assert dataclasses.replace(real, kept=None) == dry


def test_symbol_without_history_has_nothing_left_and_gets_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to"):
        history.rollback(tmp_path, "NVDA")
    with pytest.raises(ValueError, match="is not a symbol"):
        history.rollback(tmp_path, "../NVDA")
    promote(tmp_path, kronos(1), own=True)
    before = everything(tmp_path)
    with pytest.raises(ConfigFileError, match=r"^NVDA: nothing left to roll back to"):
        history.rollback(tmp_path, "NVDA")
    assert everything(tmp_path) == before


def test_what_others_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    predecessor(tmp_path)
    first = files(tmp_path)
    promote(tmp_path, toto(1))
    put(tmp_path, foreign := b'{"model": "chronos2", "config": {}}')
    restored = history.rollback(tmp_path, "NVDA")
    assert files(tmp_path) == first
    assert restored.kept
    assert (restored.kept / "best.json").read_bytes() == foreign


def test_what_stands_and_what_a_rollback_would_put_back(tmp_path: Path) -> None:
    predecessor(tmp_path)
    assert history.standing(tmp_path, "NVDA") == (None, None)
    before = datetime.now(UTC).replace(microsecond=0)
    for content in (toto(1), kronos(2)):
        promote(tmp_path, content)
    since, replaced = history.standing(tmp_path, "NVDA")
    assert since is not None
    assert before <= since <= datetime.now(UTC)
    assert replaced is not None
    assert (replaced.model, replaced.config) == ("toto", toto(1)["config"])
    history.rollback(tmp_path, "NVDA")
    now = configs.read(tmp_path, "best", "NVDA")
    assert now is not None
    assert now.digest == replaced.digest
    again, first = history.standing(tmp_path, "NVDA")
    assert again is not None
    assert again >= since
    assert first is not None
    assert first.config == {"num_samples": 64}


def test_a_rollback_expects_the_file_that_its_caller_read(tmp_path: Path) -> None:
    promote(tmp_path, toto(1))
    promote(tmp_path, toto(2))
    read = configs.read(tmp_path, "best", "NVDA")
    promote(tmp_path, toto(3))
    assert read is not None
    before = everything(tmp_path)
    with pytest.raises(ConcurrentWrite, match="was replaced meanwhile"):
        history.rollback(tmp_path, "NVDA", expected_digest=read.digest)
    assert everything(tmp_path) == before
    history.rollback(tmp_path, "NVDA")
    history.rollback(tmp_path, "NVDA", expected_digest=read.digest)
    assert json.loads(files(tmp_path)["best"])["config"] == toto(1)["config"]


def test_rollback_goes_on_behind_what_was_put_back_by_hand(tmp_path: Path) -> None:
    states = []
    for version in (1, 2, 3):
        promote(tmp_path, toto(version))
        states.append(files(tmp_path))
    promote(tmp_path, kronos(9), own=True)
    for folder in EVERYWHERE:
        put(tmp_path, states[1][folder], folder)
    restored = history.rollback(tmp_path, "NVDA")
    assert restored.remaining == 0
    assert {folder: files(tmp_path)[folder] for folder in EVERYWHERE} == states[0]
    with pytest.raises(ConfigFileError, match="nothing left"):
        history.rollback(tmp_path, "NVDA")


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
        history.rollback(tmp_path, "NVDA")
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == before


# --- folders of other models


def naive(version: int) -> dict[str, Any]:
    return payload(model="naive", config={"season": 24, "version": version})


def make_old_history(root: Path) -> list[dict[str, bytes]]:
    """Two steps and their files, as written when every step named four folders; the states before and after each."""
    contents = [(json.dumps(toto(version), indent=2) + "\n").encode() for version in (1, 2)]
    states: list[dict[str, bytes]] = [{}]
    for number, content in enumerate(contents, 1):
        step = root / "history" / "NVDA" / f"{number:04d}-2025010{number}T000000Z"
        step.mkdir(parents=True)
        before = states[-1]
        for folder, old in before.items():
            (step / f"{folder}.json").write_bytes(old)
        (step / "promoted.json").write_bytes(content)
        description = {
            "symbol": "NVDA",
            "action": "promotion",
            "time": f"2025-01-0{number}T00:00:00Z",
            "undoes": [],
            "before": {f: hashlib.sha256(before[f]).hexdigest() if f in before else None for f in FOLDERS},
            "after": {f: hashlib.sha256(content).hexdigest() for f in FOLDERS if f != "kronos"},
        }
        (step / "step.json").write_text(json.dumps(description, indent=2) + "\n")
        states.append({f: content for f in FOLDERS if f != "kronos"})
    for folder, content in states[-1].items():
        put(root, content, folder)
    return states


def with_naive(root: Path) -> dict[str, bytes]:
    own = root / "naive" / "NVDA.json"
    return {**files(root), **({"naive": own.read_bytes()} if own.exists() else {})}


def test_third_model_joins_a_history_that_does_not_know_it(tmp_path: Path) -> None:
    states = make_old_history(tmp_path)[1:]
    for content in (naive(1), kronos(1), naive(2)):
        promote(tmp_path, content)
        states.append(with_naive(tmp_path))
    newest = sorted((tmp_path / "history" / "NVDA").iterdir())[-1]
    step = json.loads((newest / "step.json").read_text())
    assert list(step["before"]) == ["toto", "kronos", "naive", "optimized_compiled", "best"]
    assert list(step["after"]) == ["naive", "optimized_compiled", "best"]
    models = ["toto", "toto", "naive", "kronos"]
    while len(states) > 1:
        states.pop()
        restored = history.rollback(tmp_path, "NVDA")
        assert with_naive(tmp_path) == states[-1]
        assert (restored.model, restored.remaining) == (models[len(states) - 1], len(states) - 1)
        assert restored.mismatch is None
    with pytest.raises(ConfigFileError, match="nothing left"):
        history.rollback(tmp_path, "NVDA")


def test_step_leaves_a_folder_that_it_does_not_mention_alone(tmp_path: Path) -> None:
    states = make_old_history(tmp_path)
    promote(tmp_path, naive(1), own=True)
    own = (tmp_path / "naive" / "NVDA.json").read_bytes()
    history.rollback(tmp_path, "NVDA")  # the second old step, which knows four folders
    assert with_naive(tmp_path) == {**states[1], "naive": own}


def test_file_in_a_third_models_folder_may_not_name_its_model(tmp_path: Path) -> None:
    content = {"config": {"season": 24}}
    put(tmp_path, content, "naive")
    record = configs.read(tmp_path, "naive", "NVDA")
    assert record
    assert record.model == "naive"
    for folder in ("best", "optimized_compiled"):
        put(tmp_path, content, folder)
        with pytest.raises(ConfigFileError, match="it names no model"):
            configs.read(tmp_path, folder, "NVDA")


@pytest.mark.parametrize("folder", ["history", "promoted", "step", ".locks", "Toto", "a-b", "../toto", ""])
def test_reserved_and_odd_names_are_no_models_folders(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        history.write(tmp_path, "NVDA", payload(), [folder, "best"])
    assert list(tmp_path.iterdir()) == []


def test_step_that_names_a_foreign_path_is_damaged(tmp_path: Path) -> None:
    make_old_history(tmp_path)
    description = sorted((tmp_path / "history" / "NVDA").iterdir())[-1] / "step.json"
    step = json.loads(description.read_text())
    step["before"]["../x"] = step["after"]["../x"] = None
    description.write_text(json.dumps(step))
    before = everything(tmp_path)
    with pytest.raises(ConfigFileError, match="not a step of the history"):
        history.rollback(tmp_path, "NVDA", dry_run=True)
    assert everything(tmp_path) == before
