"""Promotion over what confirmations say: across models, against every kind of incumbent, with every gate."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import optuna
import pytest
from conftest import execute
from promotion_place import AS_OF, KRONOS, NEW, OLD, PromotionPlace, measured

from launch import cli

Place = PromotionPlace


@pytest.mark.parametrize(("new", "promoted"), [(0.009901, False), (0.0099, False), (0.009899, True)])
def test_one_per_cent_on_the_confirmation_windows(place: Place, new: float, promoted: bool) -> None:
    place.study([(NEW, measured(new, search=0.005))], baselines={"incumbent": (OLD, measured(0.01))})
    path = place.put(OLD)
    before = path.read_bytes()
    row = place.row()
    assert (row["decision"], row["reason"]) == (("promoted", "improved") if promoted else ("kept", "not better"))
    assert row["improvement"] == pytest.approx(1 - new / 0.01)
    assert row["improvement_validation"] == pytest.approx(0.5)  # of the search alone it would look like half
    assert row["improvement_low"] <= row["improvement"] + 1e-12
    assert (path.read_bytes() == before) is not promoted


def test_the_best_of_the_five_is_by_the_confirmation_not_by_the_search(place: Place) -> None:
    other = {**NEW, "num_samples": 256}
    place.study([(NEW, measured(0.0095, search=0.001)), (other, measured(0.009, search=0.009))])
    row = place.row()
    assert (row["decision"], row["reason"]) == ("promoted", "first")
    config = place.promoted()["config"]
    assert (config["num_samples"], config["samples_per_batch"]) == (256, 128)
    assert place.row()["reason"] == "unchanged"


def test_on_validation_is_the_predecessors_rule_and_warns(place: Place) -> None:
    other = {**NEW, "num_samples": 256}
    place.study(
        [(NEW, measured(0.02, search=0.001)), (other, measured(0.009, search=0.009))],
        baselines={"incumbent": (OLD, measured(0.01, search=0.01))},
    )
    place.put(OLD)
    result = place.promote("--on", "validation", "--json")
    assert "warning" in result.stderr
    assert "76 %" in result.stderr
    row = json.loads(result.stdout)[0]
    assert (row["decision"], row["reason"], row["windows"]) == ("promoted", "improved", 30)
    assert place.promoted()["config"]["num_samples"] == 128
    assert place.promoted()["metadata"]["selection_metric"] == "validation.pct_return_mae"


def test_gates_that_are_asked_for(place: Place) -> None:
    noisy = measured(0.0098, test=0.02, wobble=0.4)
    place.study([(NEW, noisy)], baselines={"incumbent": (OLD, measured(0.01, test=0.01))})
    place.put(OLD)
    row = place.row("--dry-run")
    assert (row["reason"], row["improvement_test"]) == ("improved", pytest.approx(-1.0))
    assert row["p_value"] > 0.05
    assert place.row("--dry-run", "--require-test")["reason"] == "worse on test"
    assert place.row("--dry-run", "--max-p", "0.05")["reason"] == "not significant"
    would = place.row("--dry-run", "--max-p", "1")
    assert (would["decision"], would["written"]) == ("promoted", [])
    assert place.promoted()["config"] == OLD
    assert not (place.folder / "results").exists()  # a dry run writes nothing


def test_the_better_model_is_promoted_and_the_other_keeps_its_own_file(place: Place) -> None:
    place.study([(NEW, measured(0.0095))], baselines={"incumbent": (OLD, measured(0.01))})
    place.study([(KRONOS, measured(0.009))], model="kronos")
    place.put(OLD)
    row = place.row()
    assert (row["model"], row["decision"], row["reason"]) == ("kronos", "promoted", "improved")
    assert place.promoted()["model"] == place.promoted("kronos")["model"] == "kronos"
    assert place.promoted("toto")["config"]["num_samples"] == 128
    assert {pair["model"]: (pair["status"], pair["reason"]) for pair in row["pairs"]} == {
        "kronos": ("success", "improved"),
        "toto": ("success", "first"),
    }
    again = place.row()
    assert (again["reason"], again["written"]) == ("unchanged", [])
    assert [pair["status"] for pair in again["pairs"]] == ["no_improvement"] * 2


@pytest.mark.parametrize("differs", [{"bars": "others"}, {"confirmation": 200}, {"as_of": "2026-03-18"}])
def test_studies_on_other_windows_do_not_compete(place: Place, differs: dict[str, Any]) -> None:
    place.study([(NEW, measured(0.0095))], baselines={"incumbent": (OLD, measured(0.01))})
    windows = differs.get("confirmation", 250)
    place.study([(KRONOS, measured(0.001, confirmation=windows))], model="kronos", **differs)
    place.put(OLD)
    row = place.row()
    (kronos,) = [pair for pair in row["pairs"] if pair["model"] == "kronos"]
    if "as_of" in differs:  # the newest bars decide
        assert row["model"] == "toto"
    left_out = next(pair for pair in row["pairs"] if pair["model"] != row["model"])
    assert (left_out["status"], left_out["reason"]) == ("failed", "not comparable")
    assert kronos["mae"] == pytest.approx(0.001)


def test_an_incumbent_of_an_unknown_model_is_replaced_only_by_force(place: Place) -> None:
    place.study([(NEW, measured(0.0095))])
    path = place.put({"context_length": 512}, model="alien")
    before = path.read_bytes()
    row = place.row()
    assert (row["incumbent_model"], row["decision"], row["reason"]) == ("alien", "kept", "not comparable")
    assert row["next"] == place.suggested("promote --symbols BTCUSD --force")
    assert path.read_bytes() == before
    assert place.row("--force")["decision"] == "promoted"
    assert place.promoted()["metadata"]["previous_model"] == "alien"


def test_an_incumbent_of_a_model_that_was_not_searched_names_the_search_that_measures_it(place: Place) -> None:
    place.study([(NEW, measured(0.0095))])
    place.put({"name": "ctx512_bs128_median", "context_length": 512, "aggregation": "median"}, model="chronos2")
    row = place.row()
    assert (row["incumbent_model"], row["reason"]) == ("chronos2", "not comparable")
    assert row["next"] == place.suggested("launch-workers --symbols BTCUSD --models chronos2")


@pytest.mark.parametrize("name", ["toto", "toto_compiled"])
def test_the_predecessors_files_are_incumbents(place: Place, name: str) -> None:
    place.study([(NEW, measured(0.0095))], baselines={"incumbent": (OLD, measured(0.01))})
    config = {"name": "toto_mean_64", "num_samples": 64, "aggregate": "mean", "samples_per_batch": 16}
    place.put(config, model=name, validation={"return_mae": 0.004, "price_mae": 3.0})
    row = place.row()
    assert (row["incumbent_model"], row["reason"]) == ("toto", "improved")
    assert row["incumbent_mae"] == pytest.approx(0.01)  # as measured here, not as the file says


def test_an_incumbent_that_changed_since_the_confirmation_is_stale(place: Place) -> None:
    place.study([(NEW, measured(0.0095))], baselines={"incumbent": (OLD, measured(0.01))})
    place.put({**OLD, "num_samples": 512})
    row = place.row()
    assert (row["decision"], row["reason"], row["improvement"]) == ("kept", "stale", None)
    assert row["next"] == place.suggested(f"studies confirm BTCUSD/toto@{AS_OF}")


def test_nothing_wins_against_an_incumbent_without_error(place: Place) -> None:
    place.study([(NEW, measured(0.0))], baselines={"incumbent": (OLD, measured(0.0))})
    place.put(OLD)
    assert place.row()["reason"] == "not better"


def test_rollback_gives_back_what_was_replaced(place: Place) -> None:
    place.study([(KRONOS, measured(0.009))], model="kronos", baselines={})
    place.study([(NEW, measured(0.0095))], baselines={"incumbent": (OLD, measured(0.01))})
    before = place.put(OLD).read_bytes()
    assert place.row("--models", "toto")["decision"] == "promoted"
    first = place.promoted()
    assert place.row()["model"] == "kronos"
    shown = place.promote("--rollback", "BTCUSD", "--dry-run")
    assert shown.exit_code == 0
    assert place.promoted()["model"] == "kronos"
    assert place.promote("--rollback", "BTCUSD").exit_code == 0
    assert place.promoted() == place.promoted("toto") == first
    printed = place.promote("--rollback", "BTCUSD", "--json")
    assert (json.loads(printed.stdout)["symbol"], printed.stderr) == ("BTCUSD", "")
    assert (place.folder / "hyperparams/best/BTCUSD.json").read_bytes() == before
    last = place.promote("--rollback", "BTCUSD")
    assert last.exit_code == 1
    assert "BTCUSD" in last.stderr


def test_a_summary_of_every_symbol_in_the_predecessors_shape(place: Place) -> None:
    place.study([(NEW, measured(0.0095, search=0.008))], baselines={"incumbent": (OLD, measured(0.01))})
    place.study([(KRONOS, measured(0.02))], model="kronos")
    place.study([], symbol="AAPL")
    place.put(OLD)
    assert place.promote().exit_code == 0
    (summary,) = place.summaries()
    assert {"results", "total_time_s", "config"} == set(summary)
    assert set(summary["config"]) == {"symbols", "trials", "workers", "model", "eval_runs"}
    assert [(entry["symbol"], entry["model"]) for entry in summary["results"]] == [("AAPL", "toto"), ("BTCUSD", "toto")]
    found = {(entry["symbol"], model): one for entry in summary["results"] for model, one in entry["models"].items()}
    keys = {"symbol", "status", "model", "val_mae", "test_mae", "improved", "elapsed_s", "error"}
    assert all(keys <= set(entry) for entry in (*found.values(), *summary["results"]))
    statuses = {pair: (entry["status"], entry["improved"], entry["error"]) for pair, entry in found.items()}
    assert statuses == {
        ("AAPL", "toto"): ("failed", False, "no candidate"),
        ("BTCUSD", "toto"): ("success", True, None),
        ("BTCUSD", "kronos"): ("success", False, None),  # its own file, the first
    }
    assert summary["results"][1]["val_mae"] == pytest.approx(0.008)  # the search's, not the confirmation's
    place.promote()
    place.promote()
    assert len(place.summaries()) == 2  # what says the same is not written again
    assert {entry["status"] for entry in place.summaries()[1]["results"]} == {"no_improvement", "failed"}


def test_a_copy_made_with_optuna_is_left_out_with_a_line(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.study([(NEW, measured(0.0095))], as_of="2026-03-18")
    place.study([(NEW, measured(0.0095))], symbol="AAPL", as_of="2026-03-18")
    for name in (f"BTCUSD/toto@{AS_OF}", f"GOOG/toto@{AS_OF}"):
        names = {"from_study_name": "BTCUSD/toto@2026-03-18", "to_study_name": name}
        optuna.copy_study(from_storage=place.storage, to_storage=place.storage, **names)
    rows = json.loads(place.promote("--dry-run", "--json").stdout)
    assert {row["symbol"]: row["study"] for row in rows} == {
        symbol: f"{symbol}/toto@2026-03-18" for symbol in ("AAPL", "BTCUSD")
    }
    assert f"GOOG/toto@{AS_OF}: left out" in caplog.text
    alone = place.promote("--symbols", "GOOG")
    assert (alone.exit_code, "GOOG: no study" in alone.stderr) == (1, True)


def test_a_symbol_that_fails_keeps_no_other(place: Place) -> None:
    symbols = ("AAPL", "BTCUSD", "GOOG", "MSFT")
    for symbol in symbols:
        place.study([(NEW, measured(0.0095))], symbol=symbol)
    damaged = place.put(OLD, symbol="BTCUSD")
    damaged.write_text("{")
    (place.folder / "hyperparams" / "history").mkdir()
    (place.folder / "hyperparams" / "history" / "GOOG").touch()  # where its history would be
    ended = place.promote("--json", "--symbols", ",".join((*symbols, "NONE")))
    assert ended.exit_code == 1
    rows = {row["symbol"]: row for row in json.loads(ended.stdout)}
    assert {symbol: row["decision"] for symbol, row in rows.items()} == {
        "AAPL": "promoted", "BTCUSD": "failed", "GOOG": "failed", "MSFT": "promoted", "NONE": "failed",
    }  # fmt: skip
    for symbol, reason in {"BTCUSD": str(damaged), "GOOG": "history/GOOG", "NONE": "no study"}.items():
        assert reason in rows[symbol]["reason"]
        assert rows[symbol]["written"] == []
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith(f"{symbol}: ")]
        assert rows[symbol]["reason"] in line
    # What was written is what is reported.
    folder = place.folder / "hyperparams"
    there = {str(path) for path in folder.rglob("*.json") if "history" not in path.parts and path != damaged}
    assert there == {path for row in rows.values() for path in row["written"]}
    assert "2 of 5 symbols promoted" in ended.stderr
    (summary,) = place.summaries()
    errors = {entry["symbol"]: entry["error"] for entry in summary["results"]}
    assert errors == {symbol: rows[symbol]["reason"] if symbol in ("BTCUSD", "GOOG") else None for symbol in symbols}

    page = place.invoke(cli.studies, "report", "--output", str(place.folder / "report.html"))
    assert page.exit_code == 0, page.output
    assert str(damaged) in (place.folder / "report.html").read_text()


@pytest.mark.parametrize("how", ["privileges", "read-only transactions"])
def test_a_role_that_only_reads_is_refused_before_a_file_is_written(place: Place, how: str) -> None:
    place.study([(NEW, measured(0.0095))])
    role = f"reader_{place.url.rsplit('_', 1)[1]}"
    address = place.url.rsplit("@", 1)[1]
    url = f"postgresql://{role}:secret@{address}"
    execute(
        place.url,
        f"create role {role} login password 'secret'",
        f"grant select on all tables in schema public to {role}",
        *([f"grant insert, update, delete on all tables in schema public to {role}",
           f"alter role {role} set default_transaction_read_only = on"] if how != "privileges" else []),
    )  # fmt: skip
    try:
        ended = place.invoke(cli.promote, url=url)
        assert (ended.exit_code, ended.stdout) == (1, "")
        (line,) = ended.stderr.splitlines()
        assert "may only be read" in line
        assert not (place.folder / "hyperparams").exists()
        assert place.invoke(cli.promote, "--dry-run", url=url).exit_code == 0
    finally:
        execute(place.url, f"drop owned by {role}", f"drop role {role}")


def test_promotes_two_dozen_studies_without_torch(place: Place) -> None:
    for number in range(24):
        place.study(
            [
                ({**NEW, "num_samples": count}, measured(0.0099, wobble=0.1 * number))
                for count in (64, 128, 256, 512, 768)
            ],
            symbol=f"S{number}",
            baselines={"incumbent": (OLD, measured(0.01))},
        )
        place.put(OLD, symbol=f"S{number}")
    check = (
        "import sys\nfrom launch.cli import promote\n"
        "promote(sys.argv[1:], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    words = ["--config", str(place.folder / "studies.toml"), "--storage", place.url, "--json"]
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)) == 24
