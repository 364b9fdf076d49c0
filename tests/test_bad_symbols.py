"""One symbol with bad or changed bars is left out with its reason; the others go on, and the exit status says so."""

from __future__ import annotations

import os

import pytest
from places import RunPlace as Place
from places import index_bars

from launch import cli
from storage.progress import first_parked_slots
from studies import study as studying

WORDS = ("launch-workers", "--cpus", "1", "--trials", "6")


def spoil(place: Place) -> None:
    """Beside the good symbols a half-written row, a symbol of two files, a pipe, and a symbol with too few bars."""
    lines = index_bars()["SP500"][:400]
    place.write("BAD.csv", [*lines[:-1], lines[-1][:14]])
    place.write("TWICE.csv", lines)
    (place.data / "TWICE.parquet").write_bytes(b"PAR1 half-written")
    os.mkfifo(place.data / "PIPE.csv")
    place.write("SHORT.csv", lines[:50])


REASONS = {
    "BAD": "row 400, column high: an empty cell is not a positive price",
    "TWICE": "has two files",
    "SHORT": "has 49 bars and needs",
}


def test_bad_symbols_are_skipped_at_launch(place: Place) -> None:
    spoil(place)
    ended = place.run(*WORDS, code=1)
    place.assert_exact(6, "SP500", "NASDAQ")
    lines = ended.stderr.splitlines()
    assert "3 symbols skipped; the reasons come at the end" in lines
    assert f"{place.data / 'PIPE.csv'} skipped: it is no regular file" in lines
    last = {line.split()[0]: line for line in lines[-3:]}
    for symbol, reason in REASONS.items():
        assert last[symbol].startswith(f"{symbol} skipped: ")
        assert reason in last[symbol]
        (row,) = [line for line in ended.stdout.splitlines() if line.startswith(f"{symbol} ")]
        assert row.split()[1] == "skipped"
    assert "Traceback" not in ended.stderr
    # What is left to do is nothing, and the status still says that symbols were skipped.
    assert "nothing to do: 2 studies finished" in place.run(*WORDS, code=1).stderr


def test_strict_refuses_before_anything_is_made(place: Place) -> None:
    spoil(place)
    result = place.invoke(cli.launch_workers, *WORDS[1:], "--strict")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert REASONS["BAD"] in line
    assert studying.list_studies(place.storage) == []
    assert not (place.folder / "logs").exists()


@pytest.mark.slow
def test_changed_history_stops_its_own_symbol_only(place: Place) -> None:
    place.run(*WORDS)
    place.write("SP500.csv", [index_bars()["SP500"][0], *index_bars()["SP500"][-419:]])  # one bar less
    said = place.run("launch-workers", "--cpus", "1", "--trials", "8", code=1).stderr.splitlines()
    assert said[-1].startswith("SP500 skipped: study SP500/naive@2018-12-31: the bars up to its last bar")
    place.assert_exact(8, "NASDAQ")
    place.assert_exact(6, "SP500")
    assert "error: study SP500" in place.run("launch-workers", "--strict", "--trials", "8", code=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize("change", ["half-written", "gone", "history"])
def test_bars_that_go_bad_during_a_run_park_their_symbol(place: Place, change: str) -> None:
    place.slow_down(0.05)
    run = place.launch("--cpus", "1", "--trials", "12")
    place.wait_for_trials(1)
    (first,) = {study.symbol for study in studying.list_studies(place.storage) if place.trials(study.symbol)}
    (other,) = {"SP500", "NASDAQ"} - {first}
    path = place.data / f"{other}.csv"
    good = path.read_text()
    if change == "gone":
        path.unlink()
    elif change == "history":
        path.write_text(good.replace(".", ".1", 1))
    else:
        path.write_text(good[:-20])
    said = run.communicate(timeout=60)[1].splitlines()
    assert run.returncode == 1, said
    place.assert_exact(12, first)
    assert place.trials(other) == []
    assert said[-1].startswith(f"{other} parked: ")
    assert {"half-written": "row 421", "gone": "No such file", "history": "restore the file"}[change] in said[-1]
    assert "Traceback" not in "".join(said)
    # Once it is mended the next run goes on with it at once.
    path.write_text(good)
    place.run("launch-workers", "--cpus", "1", "--trials", "12")
    place.assert_exact(12, "SP500", "NASDAQ")
    assert first_parked_slots(place.storage) == {}
