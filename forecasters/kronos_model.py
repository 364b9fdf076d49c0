"""Kronos as settings, searches and promotion know it: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forecasters import StageParams
from forecasters.descriptor import Condition, Knob, Model, Range, SearchedParams, Volatility
from forecasters.scaling import LAST, LAST_CLOSE, RAW, SCALES, WIDENED, one_scale
from forecasters.settings import CHECKPOINT, LOADING, at_least, counts, interval, setting

CLIP_STEP = 0.2  # every clip needs its own encoding: a continuous one would never find it in the cache
EPSILON = 1e-5  # added to a column's standard deviation, as the published inference does
LEAST_DEVIATION = EPSILON / (WIDENED - 1)  # of closes: below, EPSILON matters
DEAD_TOP_P = 1.0  # what top_p says where top_k decides


def _tops(values: tuple[int, ...]) -> str | None:
    if not values or min(values) < 0 or len(set(values)) != len(values):
        return "must be different whole numbers; 0 keeps every token"
    return None


@dataclass(frozen=True, kw_only=True)
class KronosSettings:
    """The table [kronos]."""

    checkpoint: str = setting(kind=CHECKPOINT)
    revision: str = setting(kind=LOADING)
    tokenizer: str = setting(kind=CHECKPOINT)
    tokenizer_revision: str = setting(kind=LOADING)
    network_context: int = setting(at_least(2), kind=LOADING)
    max_context: tuple[int, ...] = setting(counts)
    scale: tuple[str, ...] = setting(one_scale, one_or_list=True)
    clip: tuple[float, ...] = setting(interval(0.2, 100.0))
    temperature: tuple[float, ...] = setting(interval(0.01, 10.0))
    top_k: tuple[int, ...] = setting(_tops)
    top_p: tuple[float, ...] = setting(interval(0.01, 1.0))
    sample_count: tuple[int, ...] = setting(counts)


def _search(settings: KronosSettings) -> SearchedParams:
    by_share = 0 in settings.top_k
    knobs: dict[str, Knob] = {
        "temperature": Range(low=settings.temperature[0], high=settings.temperature[1]),
        "top_k": settings.top_k,
        **({"top_p": Range(low=settings.top_p[0], high=settings.top_p[1])} if by_share else {}),
        "sample_count": settings.sample_count,
        "max_context": settings.max_context,
        "clip": Range(low=settings.clip[0], high=settings.clip[1], step=CLIP_STEP),
        **({"scale": settings.scale} if len(settings.scale) > 1 else {}),
    }
    fixed: dict[str, Any] = {} if by_share else {"top_p": DEAD_TOP_P}
    if settings.scale == (LAST,):
        fixed["scale"] = LAST
    return SearchedParams(knobs=knobs, fixed=fixed)


def _refuses(settings: KronosSettings, horizon: int) -> str | None:
    if horizon < min(settings.network_context, *settings.max_context):
        return None
    return "must be below [kronos] network_context and every max_context"


def clipped(closes: np.ndarray, origins: Sequence[int], params: Mapping[str, Any]) -> float:
    """The share of origins whose last close lies further than `clip` standard deviations from its context's mean.

    Such a close is cut off before the network sees it (kronos_encoded.normalised): the network cannot even represent
    today's price. closes: float64 [T]; the context of an origin is the last `max_context` closes before it.
    """
    length, closes = int(params["max_context"]), closes.astype(np.float32)
    # Origins with a whole context are rows of one view of the closes; the others are contexts of their own.
    whole = np.array([origin for origin in origins if origin >= length], dtype=int)
    views = [closes[None, :origin] for origin in origins if origin < length]
    if len(whole):
        views.append(np.lib.stride_tricks.sliding_window_view(closes, length)[whole - length])
    found = 0
    for rows in views:
        if params.get("scale", RAW) == LAST:
            rows = rows / (rows[:, -1:] / np.float32(LAST_CLOSE))
        apart = np.abs(rows[:, -1] - rows.mean(axis=1)) / (rows.std(axis=1) + np.float32(EPSILON))
        found += int((apart > params["clip"]).sum())
    return found / len(origins)


# The defaults of KronosPredictor and its `predict`, model/kronos.py of github.com/shiyu-coder/Kronos.
PUBLISHED = {
    "temperature": 1.0, "top_p": 0.9, "top_k": 0, "sample_count": 1, "max_context": 512, "clip": 5.0,
}  # fmt: skip


def _point(temperature: float, top_p: float, sample_count: int, max_context: int, top_k: int = 0) -> dict[str, Any]:
    """A point of the guide, but for its clip of 1.5 to 3: below 3 the network often cannot represent today's price."""
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k, "sample_count": sample_count,
            "max_context": max_context, "clip": 3.0}  # fmt: skip


VOLATILITY_POINTS: Mapping[Volatility, Sequence[Mapping[str, Any]]] = {
    "stable": (_point(0.35, 0.95, 128, 320),),
    "medium": (_point(0.25, 0.90, 256, 256), _point(0.30, DEAD_TOP_P, 256, 256, top_k=48)),
    "volatile": (_point(0.20, 0.85, 512, 512), _point(0.25, 0.90, 256, 384)),
}


def _limits(settings: KronosSettings) -> dict[str, Any]:
    limits: dict[str, Any] = {"max_context": min(PUBLISHED["max_context"], settings.network_context)}
    if len(settings.scale) > 1:
        limits["scale"] = RAW
    return limits


KRONOS = Model(
    name="kronos",
    module="forecasters.kronos_checkpoint",
    settings=KronosSettings,
    params=StageParams(
        encode=("max_context", "clip", "scale"),
        draw=("temperature", "top_k", "top_p", "sample_count"),
        num_samples="sample_count",
    ),
    kinds={
        "temperature": "number",
        "top_p": "number",
        "top_k": "count or 0",
        "sample_count": "count",
        "max_context": "count",
        "clip": "number",
        "scale": SCALES,
    },
    by_default={"scale": RAW},
    search=_search,
    conditions={"top_p": Condition(param="top_k", value=0, otherwise=DEAD_TOP_P)},
    # The second is that repository's backtest on daily bars, finetune/config.py.
    starting_points=(PUBLISHED, {**PUBLISHED, "temperature": 0.6, "sample_count": 5, "max_context": 90}),
    volatility_points=VOLATILITY_POINTS,
    limits=_limits,
    refuses=_refuses,
    exact_horizon=1,
    reader_paths=lambda config: (config["sample_count"], config["sample_count"]),
    clipped=clipped,
    least_deviation=LEAST_DEVIATION,
)
