"""Encodings kept between runs: the same numbers to the last bit, whatever happens to the store."""

from __future__ import annotations

import inspect
import logging
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nights import KRONOS, TOTO, night
from places import RunPlace as Place
from places import last_bars

from forecasters import Bars, Forecaster
from forecasters.naive import Naive
from objectives.evaluation import Evaluator
from objectives.keeping import Keeping
from objectives.windows import Windows
from storage import encodings
from storage.encodings import Encodings
from studies import config as configuration
from studies.evaluators import evaluator_of

ROOT = Path(__file__).parent.parent


def measured(forecaster: Forecaster, windows: Windows, params: dict[str, Any], store: Any, **options: Any) -> Any:
    """The errors, how often the network ran, and the windows that came from the store."""
    evaluator, before = Evaluator(forecaster, cache_bytes=1 << 26, store=store, **options), forecaster.forwards
    found = evaluator.measure(windows, params, passes=(1, 2))
    return found.errors, forecaster.forwards - before, evaluator.restored


def keys_of(count: int) -> list[bytes]:
    return [f"{number:032}".encode() for number in range(count)]


def value_of(key: bytes, size: int = 400) -> bytes:
    return random.Random(key).randbytes(size)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "params", "options"),
    [
        ("toto", TOTO, {}),
        ("toto", TOTO, {"exact": True}),
        ("toto", TOTO, {"rung": 8}),
        ("toto", {**TOTO, "key_input": "ratio"}, {}),
        ("toto", {**TOTO, "key_input": "variates"}, {}),
        ("toto", {**TOTO, "context_length": 4096}, {}),
        ("kronos", KRONOS, {}),
        ("kronos", KRONOS, {"exact": True}),
    ],
)
@pytest.mark.parametrize("key", ["close", "high"])
def test_numbers_are_those_of_a_fresh_computation(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path, model: str, params: dict[str, Any], options: Any, key: str
) -> None:
    forecaster = loaded[model]
    for number in (0, 1, 2):
        fresh = measured(forecaster, night(bars, number, key), params, None, **options)
        kept = measured(forecaster, night(bars, number, key), params, Encodings(tmp_path), **options)
        again = measured(forecaster, night(bars, number, key), params, Encodings(tmp_path), **options)
        assert kept[0] == again[0] == fresh[0]
        assert again[1] == 0
        assert again[2] >= 20  # a group of contexts that share a forward is kept whole
        if number and "rung" not in options:
            # The first time it is found out that a small forward has the bits of a whole one.
            assert kept[1] in ((1, 3) if number == 1 else (1,)), "one window is new: one forward"


def test_another_question_finds_nothing(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    import torch

    def restored(params: dict[str, Any], **options: Any) -> int:
        return measured(loaded["toto"], night(bars, 0, options.pop("key", "close")), params, Encodings(tmp_path))[2]

    assert restored(TOTO) == 0
    assert restored(TOTO) == 20
    assert restored({**TOTO, "context_length": 129}) == 0
    assert restored(TOTO, key="open") == 0
    assert restored({**TOTO, "key_input": "ratio"}) == 0
    changed = Bars(**{**vars(bars), "close": np.nextafter(bars.close, 0)})
    assert measured(loaded["toto"], night(changed, 0), TOTO, Encodings(tmp_path))[2] == 0
    assert measured(loaded["toto"], night(bars, 0), TOTO, Encodings(tmp_path), rung=8)[2] == 20  # filled up to ten
    assert measured(loaded["toto"], night(bars, 0), TOTO, Encodings(tmp_path), rung=2)[2] == 0  # 2 in a forward
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert restored(TOTO) == 0
    finally:
        torch.set_num_threads(threads)
    assert restored(TOTO) == 20


def test_a_draw_that_meets_other_tokens_encodes_its_windows_again(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path
) -> None:
    kronos, hotter = loaded["kronos"], {**KRONOS, "temperature": 0.9, "top_k": 0, "sample_count": 40}
    measured(kronos, night(bars, 0), KRONOS, Encodings(tmp_path))
    fresh = measured(kronos, night(bars, 0), hotter, None)
    kept = measured(kronos, night(bars, 0), hotter, Encodings(tmp_path))
    again = measured(kronos, night(bars, 0), hotter, Encodings(tmp_path))
    assert kept[0] == again[0] == fresh[0]
    assert kept[1] > 0
    assert again[1] == 0, "what the draw asked for is kept by now"
    assert measured(kronos, night(bars, 0), KRONOS, Encodings(tmp_path))[1] == 0


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_a_window_has_the_same_bits_at_any_place_of_its_batch(bars: Bars, loaded: dict[str, Any], size: int) -> None:
    toto, seen = loaded["toto"], {}
    for seed in range(6):
        ends = random.Random(seed).sample(range(260, 260 + size + 3), size)
        encoded = toto.encode([bars.slice(0, end) for end in ends], TOTO, 1)
        for end, record in zip(ends, toto.records(encoded, range(size)), strict=True):
            assert seen.setdefault(end, record) == record


class Placed:
    """Toto where the place in a batch decides the last bits, as with some numbers of threads."""

    def __init__(self, toto: Any) -> None:
        self._toto = toto

    def __getattr__(self, name: str) -> Any:
        return getattr(self._toto, name)

    def encode(self, *words: Any) -> Any:
        encoded = self._toto.encode(*words)
        encoded.loc[:] += np.arange(len(encoded.loc))[:, None, None].astype(np.float32)
        return encoded


def test_where_the_place_in_a_batch_decides_bits_only_whole_batches_are_found(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path
) -> None:
    contexts = [bars.slice(0, end) for end in range(200, 205)]
    keeping: Any = Keeping(Placed(loaded["toto"]), Encodings(tmp_path))  # pyright: ignore[reportArgumentType]
    keeping.encode(contexts, TOTO, 1)
    keeping.encode(contexts[::-1], TOTO, 1)
    assert keeping.restored == 0
    keeping.encode(contexts, TOTO, 1)
    assert keeping.restored == 5


class Sized(Placed):
    """Toto where the number of windows in a forward decides the last bits, as on some processors."""

    def encode(self, *words: Any) -> Any:
        encoded = self._toto.encode(*words)
        encoded.loc[:] += np.float32(len(encoded.loc))
        return encoded


@pytest.mark.parametrize("decides", [False, True])
def test_a_few_new_windows_are_encoded_alone_where_that_has_the_same_bits(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decides: bool
) -> None:
    toto = Sized(loaded["toto"]) if decides else loaded["toto"]
    keeping: Any = Keeping(toto, Encodings(tmp_path))  # pyright: ignore[reportArgumentType]
    sizes: list[int] = []
    prefill = loaded["toto"]._prefill

    def counted(rows: Any, *words: Any) -> Any:
        sizes.append(len(rows))
        return prefill(rows, *words)

    monkeypatch.setattr(loaded["toto"], "_prefill", counted)
    nights = []
    for first in range(200, 204):
        contexts = [bars.slice(0, end) for end in range(first, first + 10)]
        found = keeping.encode(contexts, TOTO, 1)
        nights.append(list(sizes))
        assert np.array_equal(found.loc, toto.encode(contexts, TOTO, 1).loc)
        sizes.clear()
    # One window is new, and one that is known is computed again beside it; the first time this is tried out.
    assert nights[1:] == ([[10, 2, 10], [10], [10]] if decides else [[10, 2, 2], [2], [2]])


def test_what_is_not_what_is_computed_here_is_not_used(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if a kernel had other bits today: the store is right in itself."""
    store = Encodings(tmp_path)
    measured(loaded["toto"], night(bars, 0), TOTO, store)
    path = next(tmp_path.glob("*.sqlite"))
    with sqlite3.connect(path) as raw:
        for key, value in raw.execute("select key, value from kept where length(value) > 50").fetchall():
            other = bytearray(value[16:])
            other[-1] ^= 1
            made = encodings._check(key, bytes(other)) + bytes(other)
            raw.execute("update kept set value = ? where key = ?", (made, key))
    found = measured(loaded["toto"], night(bars, 1), TOTO, Encodings(tmp_path), rung=20)
    assert found[0] == measured(loaded["toto"], night(bars, 1), TOTO, None, rung=20)[0]
    evaluator = Evaluator(loaded["toto"], cache_bytes=0, store=Encodings(tmp_path))
    for _ in range(2):
        evaluator.measure(night(bars, 1), TOTO)
    assert [record.message for record in caplog.records if "last bits" in record.message] == [
        "what is computed here differs in its last bits from kept encodings: they are not used"
    ]


def test_an_answer_of_the_store_is_no_latency(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    first = Evaluator(loaded["toto"], cache_bytes=0, store=Encodings(tmp_path)).measure(night(bars, 0), TOTO)
    second = Evaluator(loaded["toto"], cache_bytes=0, store=Encodings(tmp_path)).measure(night(bars, 0), TOTO)
    assert first.latency_s
    assert second.latency_s is None


def test_settings(bars: Bars, loaded: dict[str, Any], tmp_path: Path) -> None:
    def restored(mib: int, forecaster: Any = None) -> int | None:
        storage = {"data_dir": tmp_path / "server"}
        config = configuration.load(None, {"storage": storage, "workers": {"encodings_mib": mib}})
        evaluator = evaluator_of(config, forecaster or loaded["toto"], cache_bytes=1 << 24)
        evaluator.measure(night(bars, 0), {**TOTO, "season": 1})
        points = evaluator.kept_points
        return evaluator.keeping and points and evaluator.keeping.restored + points.found

    assert restored(0) is None
    assert not (tmp_path / "encodings").exists()
    assert restored(-1, Naive()) is None  # no network: nothing to keep
    assert restored(-1) == 0
    assert restored(1) == 20
    assert (tmp_path / "encodings" / f"{os.uname().nodename}.sqlite").exists()
    with pytest.raises(configuration.ConfigError, match="encodings_mib"):
        restored(-2)


@pytest.mark.slow
def test_workers_of_a_second_night_take_what_those_of_the_first_left(place: Place) -> None:
    place.search("toto")
    place.environment["XDG_DATA_HOME"] = str(place.folder / "data")
    said, errors = [], []
    for held_back in (1, 0):
        place.write("SP500.csv", last_bars("SP500", 420)[: 421 - held_back])
        place.run("launch-workers", "--cpus", "2", "--trials", "4", "--symbols", "SP500")
        run = max((place.folder / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
        lines = " ".join(log.read_text() for log in run.glob("*.log"))
        found = re.findall(r"toto: (\d+) of (\d+) windows came from the encodings kept on this host", lines)
        said.append([sum(int(pair[part]) for pair in found) for part in (0, 1)])
        errors.append("kept encodings" in lines)
    first, second = said
    assert first[1] >= 90  # validation, confirmation and test, but for what both had in memory
    assert second[0] >= second[1] - 20 >= 70  # a window more: at most a batch of each worker
    assert not any(errors)


# --- the store --------------------------------------------------------------------------------------------------------


def test_the_oldest_use_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, limit, now = keys_of(1500), 600_000, [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    store = Encodings(tmp_path, limit)
    for place, key in enumerate(keys):
        now[0] = 10_000.0 + 4000 * place
        store.put({key: value_of(key)})
        assert store.get(keys[:1]) == [value_of(keys[0])], "it is used all the time"
    there = [value is not None for value in store.get(keys)]
    assert there[0]
    assert there[1:] == sorted(there[1:])
    assert 0.5 < sum(there) * 450 / limit < 1
    assert sum(path.stat().st_size for path in tmp_path.glob("*.sqlite")) <= 1.1 * limit
    store.put({keys[1]: bytes(limit)})
    assert store.get(keys[1:2]) == [None], "too large to be worth all others"


def damaged(path: Path, how: str, seed: int) -> None:
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    if how == "foreign":
        content = bytearray(b"symbol,price\n" * 1000)
    elif how == "truncated":
        del content[chance.randrange(len(content)) :]
    for _ in range({"a byte": 1, "many bytes": 200}.get(how, 0)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["a byte", "many bytes", "truncated", "foreign", "another program's"])
def test_a_damaged_store_is_a_miss_and_one_warning(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    keys, found = keys_of(300), []
    for seed in range(8):
        caplog.clear()
        folder = tmp_path / str(seed)
        store = Encodings(folder)
        store.put({key: value_of(key) for key in keys[:200]})
        store.close()
        if how == "another program's":
            store.path.unlink()
            with sqlite3.connect(store.path) as other:
                other.execute("create table kept (name text)")
        else:
            damaged(store.path, how, seed)
        for attempt in range(2):
            store = Encodings(folder)
            store.put({key: value_of(key) for key in keys[200:]})
            found = store.get(keys)
            assert all(value in (None, value_of(key)) for key, value in zip(keys, found, strict=True))
            store.close()
            if attempt == 0:
                assert len(caplog.records) <= 1
                assert how != "truncated" or caplog.records
                assert how in ("a byte", "many bytes") or not any(found[:200])
        assert how in ("a byte", "many bytes") or all(found[200:]), "the next one keeps again"


def test_a_store_that_is_damaged_truncated_or_deleted_while_it_is_used(
    bars: Bars, loaded: dict[str, Any], tmp_path: Path
) -> None:
    for what in ("a byte", "many bytes", "truncated", "foreign", "deleted"):
        store = Encodings(tmp_path / what)
        fresh = measured(loaded["kronos"], night(bars, 0), KRONOS, None)[0]
        assert measured(loaded["kronos"], night(bars, 0), KRONOS, store)[0] == fresh
        if what == "deleted":
            for path in store.path.parent.iterdir():
                path.unlink()
        else:
            damaged(store.path, what, 1)
        for _ in range(2):
            assert measured(loaded["kronos"], night(bars, 0), KRONOS, store)[0] == fresh
        assert measured(loaded["kronos"], night(bars, 0), KRONOS, Encodings(tmp_path / what))[0] == fresh


WRITER = """
store, keys = Encodings(Path(sys.argv[1]), int(sys.argv[2])), keys_of(int(sys.argv[3]))
random.seed(sys.argv[4])
print("ready", flush=True)
for _ in range(int(sys.argv[5])):
    some = random.sample(keys, 20)
    store.put({key: value_of(key, 5000) for key in some})
    for key, value in zip(some, store.get(some)):
        assert value in (None, value_of(key, 5000)), key
print("done", store._full, flush=True)
"""


def writer(folder: Path, limit: int, keys: int, seed: int, rounds: int) -> subprocess.Popen[str]:
    imports = "import random, sys\nfrom pathlib import Path\nfrom storage.encodings import Encodings\n"
    code = imports + inspect.getsource(keys_of) + inspect.getsource(value_of) + WRITER
    words = [sys.executable, "-c", code, str(folder), *map(str, (limit, keys, seed, rounds))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def values_there(folder: Path, count: int, caplog: pytest.LogCaptureFixture) -> int:
    """How many are there, each as it was put and without a warning."""
    keys = keys_of(count)
    found = Encodings(folder).get(keys)
    assert all(value in (None, value_of(key, 5000)) for key, value in zip(keys, found, strict=True))
    assert not caplog.records
    return sum(value is not None for value in found)


def test_processes_that_make_the_file_at_one_time_share_it(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom storage.encodings import Encodings\n"
    code += "print(flush=True)\nfor folder in sys.stdin.readline().split():\n    Encodings(Path(folder))\n"
    words, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    openers = [subprocess.Popen(words, env=environment, **pipes) for _ in range(4)]
    for each in openers:
        assert each.stdout
        each.stdout.readline()
    folders = " ".join(str(tmp_path / str(number)) for number in range(20))
    for each in openers:
        assert each.stdin
        each.stdin.write(folders + "\n")
        each.stdin.flush()
    assert [each.communicate()[1] for each in openers] == [""] * 4
    assert not list(tmp_path.rglob("*.damaged"))


def test_several_processes_and_kill_9_in_the_middle_of_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    writers = [writer(tmp_path, 1 << 30, 400, seed, 100_000) for seed in range(2)]
    steady = writer(tmp_path, 1 << 30, 400, 9, 40)
    for each in writers:
        assert each.stdout
        each.stdout.readline()
    time.sleep(0.5)
    for each in writers:
        each.send_signal(signal.SIGKILL)
        each.communicate()
    out, errors = steady.communicate(timeout=60)
    assert (out.splitlines()[-1:], errors, steady.returncode) == (["done False"], "", 0)
    assert values_there(tmp_path, 400, caplog) > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
def test_a_full_disk_is_one_warning_and_what_is_there_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        out, errors = writer(tmp_path / "kept", 1 << 30, 400, 1, 50).communicate(timeout=60)
        assert out.splitlines()[-1] == "done True"
        assert errors.count("no more encodings are kept: database or disk is full") == errors.count("\n") == 1
        assert values_there(tmp_path / "kept", 400, caplog) > 20
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Encodings(tmp_path / "file" / "encodings")
    store.put({b"k": b"v"})
    assert store.get([b"k"]) == [None]
    assert len(caplog.records) == 1


def places(values: Sequence[object]) -> list[int]:
    return [place for place, value in enumerate(values) if value is not None]


def test_two_hosts_have_stores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Encodings(tmp_path).put({b"k": b"v"})
    nodename = type("Names", (), {"nodename": "elsewhere"})
    monkeypatch.setattr(os, "uname", lambda: nodename)
    other = Encodings(tmp_path)
    assert places(other.get([b"k"])) == []
    assert len(list(tmp_path.glob("*.sqlite"))) == 2
