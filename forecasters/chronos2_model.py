"""Chronos-2 as settings, searches and promotion know it, and how its files are read: no torch, no weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from forecasters import StageParams
from forecasters.descriptor import Foreign, Knob, Model, SearchedParams
from forecasters.settings import AGGREGATES, CHECKPOINT, LOADING, choices, counts, setting

VARIATES = ("close", "close+volume", "ohlc", "ohlcv")  # series of a window that attend to each other; "close": the key
TRANSFORMS = ("price", "log", "differences")  # what the network sees of a series
CALENDARS = BARS, DAYS = ("bars", "days")  # a row a bar, or a row a step of the calendar: see chronos2_calendar.py


def _shares(values: tuple[float, ...]) -> str | None:
    good = values and len(set(values)) == len(values) and all(0 <= value <= 1 for value in values)
    return None if good else "must be different numbers from 0, no change, to 1, the forecast"


@dataclass(frozen=True, kw_only=True)
class Chronos2Settings:
    """The table [chronos2]."""

    checkpoint: str = setting(kind=CHECKPOINT)
    revision: str = setting(kind=LOADING)
    context_length: tuple[int, ...] = setting(counts, one_or_list=True)
    variates: tuple[str, ...] = setting(choices(*VARIATES), one_or_list=True)
    transform: tuple[str, ...] = setting(choices(*TRANSFORMS), one_or_list=True)
    shrink: tuple[float, ...] = setting(_shares, one_or_list=True)
    aggregates: tuple[str, ...] = setting(kind=AGGREGATES)


BY_DEFAULT = {"shrink": 1.0, "calendar": BARS}  # params that are not written down where they say this

# What Chronos2Pipeline answers where nothing is asked for: the median of all the bars that the checkpoint can read.
PUBLISHED = {"aggregate": "median", "context_length": 8192, "variates": "close", "transform": "price"}


def searched(settings: Chronos2Settings) -> SearchedParams:
    """What the settings ask for, of Chronos-2 and of others with the same params."""
    knobs: dict[str, Knob] = {"aggregate": settings.aggregates}
    fixed = {}
    for name in ("shrink", "context_length", "variates", "transform"):
        values = getattr(settings, name)
        if len(values) > 1:
            knobs[name] = values
        elif values != (BY_DEFAULT.get(name),):
            fixed[name] = values[0]
    return SearchedParams(knobs=knobs, fixed=fixed)


def limits(published: Mapping[str, Any], settings: Chronos2Settings) -> dict[str, Any]:
    """The published values where the settings allow them; else the nearest length and share, and the first name."""
    allowed = [length for length in settings.context_length if length <= published["context_length"]]
    allows: dict[str, Any] = {"context_length": max(allowed) if allowed else min(settings.context_length)}
    for name in ("variates", "transform"):
        values = getattr(settings, name)
        allows[name] = published[name] if published[name] in values else values[0]
    if settings.shrink != (BY_DEFAULT["shrink"],):
        allows["shrink"] = max(settings.shrink)
    return allows


def _to_promoted(params: Mapping[str, Any], searched: Collection[str]) -> dict[str, Any]:
    """All params, whatever was searched: a file that names no aggregate is read as the predecessor's."""
    del searched
    name = "_".join(["chronos2", f"ctx{params['context_length']}", params["variates"], params["aggregate"]])
    return {"name": name, **params, "aggregation": params["aggregate"]}


def _written(settings: Chronos2Settings, horizon: int) -> dict[str, Any]:
    """What today's readers of a file ask for beside the params. They read a context length, and forecast the median."""
    return {
        "model_id": settings.checkpoint,
        "prediction_length": horizon,
        "quantile_levels": [0.1, 0.5, 0.9],
        "batch_size": 128,
    }


# --- files of the scripts that this package replaces --------------------------------------------------------

# What a file says of itself, and values of its other entries that change no forecast: Chronos-2 standardises each
# series by its own context, so that a scale or a level has no effect.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "sample_count": (None, 0),
    "scaler": (None, "", "none", "meanstd"),
    "predict_kwargs": (None, {}),
    "skip_rates": (None, [], [1]),
    "aggregation_method": (None, "single"),
}
_HARMLESS_STRATEGIES = (None, "", "none", "baseline", "percent_change", "robust_scaling", "minmax_standard")
_ALIASES = (None, "", "chronos2", "amazon/chronos-2")


def _foreign(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Foreign | None:
    """A file of the predecessor as params; None: it is one of ours, which names its aggregate.

    Its point is the median close of a group of open, high, low and close, of bars that were filled to a calendar
    unless it says `use_multivariate`.
    """
    if "aggregate" in config or "variates" in config:
        return None
    params: dict[str, Any] = {
        "aggregate": config.get("aggregation") or "median",
        "variates": "ohlc",
        "transform": "price",
        "shrink": 1.0,
        "calendar": BARS if config.get("use_multivariate") is True else DAYS,
    }
    if "context_length" in config:
        params["context_length"] = config["context_length"]
    lost = [name for name, harmless in _HARMLESS.items() if config.get(name) not in harmless]
    strategy = metadata.get("preaug_strategy")
    if strategy == "log_returns":  # logarithms less the first one
        params["transform"] = "log"
    elif strategy not in _HARMLESS_STRATEGIES:
        lost.append(f"preaug_strategy {strategy}")
    if config.get("model_id") not in _ALIASES:
        lost.append("the weights of another model_id")
    return Foreign(params=params, lost=tuple(lost))


CHRONOS2 = Model(
    name="chronos2",
    module="forecasters.chronos2_checkpoint",
    settings=Chronos2Settings,
    params=StageParams(encode=("context_length", "variates", "transform", "calendar")),
    kinds={
        "aggregate": "aggregate",
        "shrink": "share",
        "context_length": "count",
        "variates": VARIATES,
        "transform": TRANSFORMS,
        "calendar": CALENDARS,
    },
    by_default=BY_DEFAULT,
    search=searched,
    starting_points=(PUBLISHED,),
    limits=partial(limits, PUBLISHED),
    to_promoted=_to_promoted,
    written=_written,
    foreign=_foreign,
    exact_horizon=None,  # its only answer is exact, as far as the checkpoint reaches
    reader_paths=lambda config: (1, 1),
    by_name=True,
)
