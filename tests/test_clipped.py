"""The share of origins whose last close a configuration clips: Kronos' own normalisation, without its network."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from places import index_bars

from forecasters import Bars
from forecasters.kronos_encoded import COLUMNS, normalised
from forecasters.kronos_model import KRONOS, clipped
from forecasters.models import MODELS
from studies.study import CLIP_ORIGINS, StudyRun


def bars(count: int) -> Bars:
    table = pd.DataFrame([line.split(",") for line in index_bars()["SP500"][-count:]]).set_index(0).astype(float)
    columns = dict(zip(("open", "high", "low", "close", "volume"), table.to_numpy().T, strict=True))
    return Bars(timestamps=table.index.to_numpy().astype("datetime64[ns]"), **columns)


def share_by_normalising(history: Bars, origins: range, params: dict[str, Any]) -> float:
    """What encode does with each context, one by one."""
    found = []
    for origin in origins:
        context = history.slice(max(0, origin - params["max_context"]), origin)
        normal, _, _ = normalised(context, math.inf)
        found.append(abs(normal[-1, COLUMNS.index("close")]) > params["clip"])
    return float(np.mean(found))


@pytest.mark.parametrize("length", [2, 128, 256, 512])
def test_it_is_what_encode_cuts_off(length: int) -> None:
    history = bars(700)
    origins = range(200, 700)  # the first of them have shorter contexts
    for clip in (1.0, 1.8, 2.4, 3.0, 5.0):
        params = {"max_context": length, "clip": clip}
        expected = share_by_normalising(history, origins, params)
        assert clipped(history.close, origins, params) == expected
        assert clip > 1 or length == 2 or 0.2 < expected < 1


def test_prices_that_do_not_move_are_not_clipped() -> None:
    assert clipped(np.full(300, 7.0), range(200, 300), {"max_context": 128, "clip": 1.0}) == 0.0


def run_of(model: str, count: int, min_context: int = 64) -> StudyRun:
    study = SimpleNamespace(model=model, definition={"windows": {"min_context": min_context}})
    fields = {name: cast(Any, None) for name in StudyRun.__dataclass_fields__}
    windows = cast(Any, SimpleNamespace(bars=bars(count)))
    return StudyRun(**{**fields, "study": cast(Any, study), "confirmation": windows})


def test_the_last_origins_of_a_study_are_looked_at() -> None:
    params = {**KRONOS.starting_points[0], "max_context": 128, "clip": 1.0}
    long, short = run_of("kronos", 1500), run_of("kronos", 200)
    last = range(1500 - CLIP_ORIGINS, 1500)
    assert long.clipped(params) == share_by_normalising(bars(1500), last, params)
    assert short.clipped(params) == pytest.approx(share_by_normalising(bars(200), range(64, 200), params), abs=1e-6)


def test_only_kronos_clips() -> None:
    assert [name for name, model in MODELS.items() if model.clipped] == ["kronos"]
    assert run_of("toto", 200).clipped({"context_length": 128}) is None
