"""Forwards of Toto that several origins share: what they cost, and that they say what separate ones say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from places import index_bars

import forecasters
from forecasters import Bars
from forecasters.toto import Toto

PARAMS = {"context_length": 4096}
PATCH = 32


def bars(count: int) -> Bars:
    table = pd.DataFrame([line.split(",") for line in index_bars()["SP500"][-count:]]).set_index(0).astype(float)
    columns = dict(zip(("open", "high", "low", "close", "volume"), table.to_numpy().T.copy(), strict=True))
    return Bars(timestamps=table.index.to_numpy().astype("datetime64[ns]"), **columns)


def toto(*, shares: bool) -> Toto:
    loaded = forecasters.load("toto", checkpoint="toto-tiny")
    assert isinstance(loaded, Toto)
    loaded.shares_forwards = shares
    return loaded


@pytest.mark.parametrize("horizon", [1, 7, PATCH])
def test_origins_a_patch_apart_share_a_forward_and_are_answered_as_apart(horizon: int) -> None:
    history = bars(500)
    contexts = [history.slice(0, origin) for origin in range(300, 500)]
    together, apart = toto(shares=True), toto(shares=False)
    found = together.encode(contexts, PARAMS, horizon)
    expected = apart.encode(contexts, PARAMS, horizon)
    deviation = history.close.std()
    assert np.abs(together.mean(found) - apart.mean(expected)).max() < 1e-6 * deviation
    samples = [one.draw(each, {"num_samples": 64}, range(200)) for one, each in ((together, found), (apart, expected))]
    assert np.abs(samples[0] - samples[1]).max() < 1e-5 * deviation  # single samples lie some deviations off


def test_the_network_reads_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    loaded = toto(shares=True)
    along = loaded.network.answers_along

    def noting(series, *words):
        rows.append(len(series))
        return along(series, *words)

    monkeypatch.setattr(loaded.network, "answers_along", noting)
    history = bars(500)
    loaded.encode([history.slice(0, origin) for origin in range(300, 500)], PARAMS, 1)
    assert sum(rows) == PATCH  # and not 200


def test_bars_behind_an_origin_change_nothing_before_it() -> None:
    history = bars(500)
    later = np.arange(500) >= 400
    spoilt = replace(history, close=np.where(later, 1e4 * history.close, history.close))
    loaded = toto(shares=True)
    origins = range(336, 500)
    found, other = (loaded.encode([each.slice(0, o) for o in origins], PARAMS, 1) for each in (history, spoilt))
    seen = [place for place, origin in enumerate(origins) if origin <= 400]
    assert (loaded.mean(found)[seen] == loaded.mean(other)[seen]).all()
    assert (loaded.mean(found)[-1] != loaded.mean(other)[-1]).all()


def test_what_begins_elsewhere_or_is_cut_shares_nothing() -> None:
    history = bars(500)
    together, apart = toto(shares=True), toto(shares=False)
    cut = [history.slice(0, origin) for origin in (300, 332, 364)]
    one = {"context_length": 128}
    assert (together.mean(together.encode(cut, one, 1)) == apart.mean(apart.encode(cut, one, 1))).all()
    shifted = [history.slice(place, 300 + place) for place in (0, 32)]
    found, expected = together.encode(shifted, PARAMS, 1), apart.encode(shifted, PARAMS, 1)
    assert np.abs(together.mean(found) - apart.mean(expected)).max() < 1e-6 * history.close.std()
