"""Forwards of Toto that several origins share: what they cost, and that they say what separate ones say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from places import index_bars

import forecasters
from forecasters import Bars
from forecasters.toto import Toto
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins

PARAMS = {"context_length": 4096}
ASKED = {**PARAMS, "num_samples": 64, "aggregate": "mean"}
PATCH = 32


def bars(count: int) -> Bars:
    table = pd.DataFrame([line.split(",") for line in index_bars()["SP500"][-count:]]).set_index(0).astype(float)
    columns = dict(zip(("open", "high", "low", "close", "volume"), table.to_numpy().T.copy(), strict=True))
    return Bars(timestamps=table.index.to_numpy().astype("datetime64[ns]"), **columns)


@pytest.fixture
def toto() -> Any:
    loaded = forecasters.load("toto", checkpoint="toto-tiny")
    assert isinstance(loaded, Toto)
    return loaded


def shared(toto: Any, history: Bars, origins: Sequence[int], horizon: int = 1) -> Any:
    groups = toto.groups_of(history, origins, PARAMS, horizon)
    assert groups is not None
    found = {group: toto.encode_group(history, group, PARAMS, horizon, "close") for group in set(groups)}
    return toto.gathered(found, origins, len(history))


def windows(history: Bars, count: int) -> Windows:
    return recent_origins(history, count, symbol="A")


@pytest.mark.parametrize("horizon", [1, 7, PATCH])
def test_origins_a_patch_apart_are_answered_as_apart(toto: Any, horizon: int) -> None:
    history = bars(500)
    origins = range(300, 500)
    found = shared(toto, history, origins, horizon)
    expected = toto.encode([history.slice(0, origin) for origin in origins], PARAMS, horizon)
    deviation = history.close.std()
    assert np.abs(toto.mean(found) - toto.mean(expected)).max() < 1e-6 * deviation
    samples = [toto.draw(each, {"num_samples": 64}, range(200)) for each in (found, expected)]
    assert np.abs(samples[0] - samples[1]).max() < 1e-5 * deviation  # single samples lie some deviations off


def test_the_network_reads_a_patch_of_series(toto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    along = toto.network.answers_along

    def noting(series, *words):
        rows.append(len(series))
        return along(series, *words)

    monkeypatch.setattr(toto.network, "answers_along", noting)
    evaluator = Evaluator(toto, cache_bytes=1 << 26)
    evaluator.measure(windows(bars(500), 200), ASKED)
    assert sum(rows) == PATCH  # and not 200
    evaluator.measure(windows(bars(500), 250), ASKED)
    assert sum(rows) == PATCH, "other windows of the series come from the same forwards"


def test_bits_depend_neither_on_what_is_asked_for_nor_on_what_was_asked_before(toto: Any) -> None:
    history = bars(500)
    whole = windows(history, 200)
    expected = Evaluator(toto, cache_bytes=1 << 26).forecast(whole, ASKED)
    for rung, batch, limit in ((7, 7, 1 << 26), (10, 30, 0), (1, 1, 1 << 26)):
        evaluator = Evaluator(toto, cache_bytes=limit, rung=rung, batch=batch)
        few = replace(whole, origins=whole.origins[3::17])
        assert (evaluator.forecast(few, ASKED) == expected[3::17]).all()


def test_the_cache_tells_series_of_other_lengths_apart(toto: Any) -> None:
    """Their forwards have other shapes, and other last bits with them."""
    longer, shorter = bars(500), bars(500).slice(0, 437)
    evaluator = Evaluator(toto, cache_bytes=1 << 26)
    for history in (longer, shorter):
        asked = Windows(symbol="A", bars=history, origins=tuple(range(300, 430)), horizon=1)
        fresh = Evaluator(toto, cache_bytes=1 << 26).forecast(asked, ASKED)
        assert (evaluator.forecast(asked, ASKED) == fresh).all()


def test_bars_behind_an_origin_change_nothing_before_it(toto: Any) -> None:
    history = bars(500)
    later = np.arange(500) >= 400
    spoilt = replace(history, close=np.where(later, 1e4 * history.close, history.close))
    origins = range(336, 500)
    found, other = (toto.mean(shared(toto, each, origins)) for each in (history, spoilt))
    seen = [place for place, origin in enumerate(origins) if origin <= 400]
    assert (found[seen] == other[seen]).all()
    assert (found[-1] != other[-1]).all()


@pytest.mark.parametrize("params", [{"context_length": 499}, {**PARAMS, "key_input": "ratio"}])
def test_contexts_that_are_cut_and_other_inputs_share_nothing(toto: Any, params: dict[str, Any]) -> None:
    assert toto.groups_of(bars(500), [300, 332], params, 1) is None
    assert toto.groups_of(bars(500), [300, 332], PARAMS, PATCH + 1) is None
    asked = windows(bars(500), 20)
    points = Evaluator(toto, cache_bytes=0, rung=20).forecast(asked, {**ASKED, **params, "num_samples": 4})
    order = Evaluator(toto, cache_bytes=0, rung=20).batches(asked)[0]
    encoded = toto.encode(asked.contexts(order), params, 1)
    samples = toto.draw(encoded, {"num_samples": 4}, [asked.seeds(0)[place] for place in order])
    assert (points[order] == samples.mean(axis=1)).all()


def test_a_window_that_is_asked_for_alone_is_encoded_alone(toto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is served: its bits then depend on no series beyond it."""
    from objectives.windows import SeedKind, now

    monkeypatch.setattr(toto, "encode_group", None)
    Evaluator(toto, cache_bytes=0, rung=1).forecast(now(bars(500), symbol="A"), ASKED, kind=SeedKind.SERVED)
