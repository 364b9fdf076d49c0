"""Toto 2.0 as settings, searches and promotion know it: no torch, no weights.

It answers quantiles as Chronos-2 does, so its settings, params and what is searched of them are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from forecasters import StageParams
from forecasters.chronos2_model import TRANSFORMS, VARIATES, Chronos2Settings, limits, searched
from forecasters.descriptor import Model


@dataclass(frozen=True, kw_only=True)
class Toto2Settings(Chronos2Settings):
    """The table [toto2]."""


# What its publishers forecast with: the median of the bars that it was trained to see.
PUBLISHED = {"aggregate": "median", "context_length": 4096, "variates": "close", "transform": "price"}

TOTO2 = Model(
    name="toto2",
    module="forecasters.toto2",
    settings=Toto2Settings,
    params=StageParams(encode=("context_length", "variates", "transform")),
    kinds={
        "aggregate": "aggregate",
        "shrink": "share",
        "context_length": "count",
        "variates": VARIATES,
        "transform": TRANSFORMS,
    },
    by_default={"shrink": 1.0},
    search=searched,
    starting_points=(PUBLISHED,),
    limits=partial(limits, PUBLISHED),
    exact_horizon=None,  # its only answer is exact, as far as one asks
    reader_paths=lambda config: (1, 1),
    by_name=True,
)
