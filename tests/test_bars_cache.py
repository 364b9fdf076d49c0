"""Large files of bars are parsed once a machine, and anew when they change; a worker keeps few of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import worker as worker_process
from launch.worker import Worker
from objectives.bars import PRICE_NAMES, DataError, bars_fingerprint, read_bars
from studies import bars_cache
from studies.bars_cache import read_bars_once


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps even the smallest file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bars_cache, "MIN_BYTES", 1)
    monkeypatch.setattr(bars_cache, "SETTLED_NS", 0)
    return tmp_path / "cache" / "forecast-studies" / "bars"


def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are parsed from now on."""
    found: list[Path] = []
    monkeypatch.setattr(bars_cache, "read_bars", lambda path: (found.append(path), read_bars(path))[1])
    return found


@pytest.mark.parametrize("header", ["timestamp,open,high,low,close,volume", "timestamp,close", "time,low,close"])
def test_what_is_kept_is_what_was_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    count = header.count(",")
    rows = [",".join([f"2024-01-{day:02}", *(f"{day}.{n}1" for n in range(count))]) for day in (1, 2, 2, 3)]
    path = tmp_path / "A.csv"
    path.write_text("\n".join([header, *rows, ""]))
    expected, notes = read_bars(path)
    files = parsed(monkeypatch)
    for _ in range(3):
        bars, said = read_bars_once(path)
        assert said == notes
        assert bars_fingerprint(bars) == bars_fingerprint(expected)
        for name in ("timestamps", *PRICE_NAMES):
            assert getattr(bars, name).dtype == getattr(expected, name).dtype
            assert not getattr(bars, name).flags.writeable
        assert (bars.open is bars.close) == (expected.open is expected.close)
    assert files == [path]
    assert [stat.st_mode & 0o777 for stat in (cache.stat(),)] == [0o700]


def test_a_changed_file_is_read_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "A.csv"
    path.write_text("time,close\n2024-01-01,1\n")
    before = path.stat()
    first, _ = read_bars_once(path)
    files = parsed(monkeypatch)
    path.write_text("time,close\n2024-01-01,2\n")  # as long, and as old by its own account
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_bars_once(path)[0].close.tolist() == [2]
    assert first.close.tolist() == [1]  # what is in use stays
    assert files == [path]
    assert len(list(cache.iterdir())) == 1  # the newest only
    path.write_text("time,close\n2024-01-01,x\n")
    with pytest.raises(DataError, match="row 2, column close"):
        read_bars_once(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_bars_once(path)


def test_a_file_that_may_still_change_is_not_kept(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars_cache, "SETTLED_NS", 10**12)
    path = tmp_path / "A.csv"
    path.write_text("time,close\n2024-01-01,1\n")
    assert read_bars_once(path)[0].close.tolist() == [1]
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["truncated", "junk", "no folder"])
def test_a_cache_that_cannot_be_used_is_no_error(cache: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "A.csv"
    path.write_text("time,close\n2024-01-01,1\n2024-01-02,2\n")
    if damage == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        read_bars_once(path)
        (kept,) = cache.iterdir()
        kept.write_bytes(kept.read_bytes()[:-8] if damage == "truncated" else b"junk" * 100)
    for _ in range(2):
        assert read_bars_once(path)[0].close.tolist() == [1, 2]


def test_a_worker_keeps_the_studies_that_it_worked_on_last(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(worker_process.studying, "start", lambda _s, _c, study, *_: started.append(study) or study)
    monkeypatch.setattr(Worker, "_series_of", lambda *_: None)
    worker = object.__new__(Worker)
    worker.clock = None
    evaluator = SimpleNamespace(forecaster=SimpleNamespace(fingerprint=""))

    class Study(int):
        symbol = model = "A"

    given: Any = {"storage": None, "config": None, "runs": {}, "evaluators": {"A": evaluator}}
    vars(worker).update(given, studies={number: Study(number) for number in range(500)})
    for number in range(500):
        worker._run_of(number)
        worker._run_of(0)  # comes again and again
    assert len(worker.runs) == worker_process.RUNS_KEPT
    assert started == list(range(500))  # none twice
