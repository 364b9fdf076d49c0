"""Chronos-2 as settings, searches and promotion know it: no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from forecasters import StageParams
from forecasters.descriptor import Model, SearchedParams
from forecasters.settings import AGGREGATES, CHECKPOINT, LOADING, choices, counts, setting


@dataclass(frozen=True, kw_only=True)
class Chronos2Settings:
    """The table [chronos2]."""

    checkpoint: str = setting(kind=CHECKPOINT)
    revision: str = setting(kind=LOADING)
    context_length: tuple[int, ...] = setting(counts, one_or_list=True)
    variates: tuple[str, ...] = setting(choices("close", "close+volume", "ohlc", "ohlcv"), one_or_list=True)
    transform: tuple[str, ...] = setting(choices("price", "log", "differences"), one_or_list=True)
    aggregates: tuple[str, ...] = setting(kind=AGGREGATES)


CHRONOS2 = Model(
    name="chronos2",
    module="forecasters.chronos2",
    settings=Chronos2Settings,
    params=StageParams(encode=("context_length", "variates", "transform"), draw=(), num_samples=None),
    kinds={"aggregate": "aggregate", "context_length": "count"},
    search=lambda settings: SearchedParams(knobs={}),
    starting_points=({"context_length": 512},),
)
