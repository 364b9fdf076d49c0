"""Toto 1.0 as settings, searches and promotion know it: no torch, no weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forecasters import StageParams
from forecasters.descriptor import Knob, Model, SearchedParams, Volatility
from forecasters.scaling import AUTO, RAW, SCALES, WIDENED, one_scale
from forecasters.settings import AGGREGATES, CHECKPOINT, LOADING, choices, counts, setting

# The reader's choices of samples_per_batch by number of samples (it asserts num_samples % samples_per_batch == 0).
BATCH_TIERS = ((128, (16, 32, 64)), (512, (32, 64, 128)), (1024, (64, 128, 256)), (None, (128, 256, 512)))
# What the network reads to forecast a key: the key's own prices, its ratios to the close before, or all four prices as
# variates that attend to each other.
KEY_INPUTS = PRICE, RATIO, VARIATES = "price", "ratio", "variates"


@dataclass(frozen=True, kw_only=True)
class TotoSettings:
    """The table [toto]."""

    checkpoint: str = setting(kind=CHECKPOINT)
    revision: str = setting(kind=LOADING)
    context_length: tuple[int, ...] = setting(counts, one_or_list=True)
    key_input: tuple[str, ...] = setting(choices(*KEY_INPUTS), one_or_list=True)
    scale: tuple[str, ...] = setting(one_scale, one_or_list=True)
    num_samples: tuple[int, ...] = setting(counts)
    aggregates: tuple[str, ...] = setting(kind=AGGREGATES)


def _search(settings: TotoSettings) -> SearchedParams:
    knobs: dict[str, Knob] = {"aggregate": settings.aggregates, "num_samples": settings.num_samples}
    fixed = {}
    for name in ("context_length", "key_input", "scale"):
        values = getattr(settings, name)
        if len(values) > 1:
            knobs[name] = values
        elif values not in ((BY_DEFAULT.get(name),), (AUTO,)):  # AUTO: whoever knows the prices says LAST where it must
            fixed[name] = values[0]
    return SearchedParams(knobs=knobs, fixed=fixed)


def _implied(knobs: Mapping[str, Knob]) -> dict[str, Any]:
    """The predecessor's files name no context: it showed the network all that it had."""
    lengths = knobs.get("context_length")
    return {"aggregate": "mean", **({"context_length": max(lengths)} if isinstance(lengths, tuple) else {})}


def _to_promoted(params: Mapping[str, Any], searched: Collection[str]) -> dict[str, Any]:
    config = {name: params[name] for name in (*searched, "num_samples")}
    if params.get("scale", RAW) != RAW:  # else a reader would take the prices as they are
        config["scale"] = params["scale"]
    return {**config, "samples_per_batch": samples_per_batch(config["num_samples"])}


def samples_per_batch(num_samples: int) -> int:
    """The largest batch of the reader's tier that divides the number of samples: it changes no forecast."""
    tier = next(batches for limit, batches in BATCH_TIERS if limit is None or num_samples <= limit)
    return max(
        (batch for batch in tier if num_samples % batch == 0),
        default=max(d for d in range(1, min(num_samples, tier[-1]) + 1) if num_samples % d == 0),
    )


MINIMUM_VARIANCE = 0.1  # added to the variance of prices, so tiny prices are not scaled to 1 (scaler.py:221)
LEAST_DEVIATION = math.sqrt(MINIMUM_VARIANCE / (WIDENED**2 - 1))  # of closes, 0.69: below, that matters
BY_DEFAULT = {"key_input": PRICE, "scale": RAW}  # params that are not written down where they say this

# The quick start of github.com/DataDog/toto: 4,096 points, 256 samples, their median as the point forecast.
PUBLISHED = {"context_length": 4096, "num_samples": 256, "aggregate": "median"}

# The guide of the scripts that this package replaces, by class of volatility.
VOLATILITY_POINTS: Mapping[Volatility, Sequence[Mapping[str, Any]]] = {
    "stable": ({"aggregate": "mean", "num_samples": 512},),
    "medium": ({"aggregate": "mean", "num_samples": 2048}, {"aggregate": "trimmed_mean_5", "num_samples": 2048}),
    "volatile": (
        {"aggregate": "trimmed_mean_5", "num_samples": 2048},
        {"aggregate": "trimmed_mean_10", "num_samples": 2048},
        {"aggregate": "median", "num_samples": 4096},
    ),
}


def _limits(settings: TotoSettings) -> dict[str, Any]:
    """The longest context that is not above the published one, or the shortest of those above; prices if allowed."""
    allowed = [length for length in settings.context_length if length <= PUBLISHED["context_length"]]
    limits: dict[str, Any] = {"context_length": max(allowed) if allowed else min(settings.context_length)}
    if len(settings.key_input) > 1:
        limits["key_input"] = PRICE if PRICE in settings.key_input else settings.key_input[0]
    if len(settings.scale) > 1:
        limits["scale"] = RAW
    return limits


def _refuses(settings: TotoSettings, horizon: int) -> str | None:
    return "must be 1 for [toto] key_input ratio" if RATIO in settings.key_input and horizon > 1 else None


TOTO = Model(
    name="toto",
    module="forecasters.toto_checkpoint",
    settings=TotoSettings,
    params=StageParams(
        encode=("context_length", "key_input", "scale"), draw=("num_samples",), num_samples="num_samples"
    ),
    kinds={
        "aggregate": "aggregate",
        "num_samples": "count",
        "context_length": "count",
        "key_input": KEY_INPUTS,
        "scale": SCALES,
    },
    by_default=BY_DEFAULT,
    search=_search,
    batch=30,  # 1.35 times as fast as ten of 512 points on one thread
    starting_points=(PUBLISHED,),
    volatility_points=VOLATILITY_POINTS,
    limits=_limits,
    refuses=_refuses,
    to_promoted=_to_promoted,
    implied=_implied,
    least_deviation=LEAST_DEVIATION,
    reader_paths=lambda config: (config["num_samples"], config["samples_per_batch"]),
    exact_horizon=None,  # up to the first patch, whose length the checkpoint says
)
