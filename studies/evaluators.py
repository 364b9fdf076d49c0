"""From settings to a loaded forecaster and its evaluator: the one way for workers, checks, benchmarks and services.

Loads torch, and that only when a forecaster is asked for. Knows nothing of studies, slots or processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import forecasters
from forecasters import KeepableForecaster, LoadedForecaster, Running
from forecasters.models import MODELS
from objectives.ensemble import EnsembleEvaluator
from objectives.evaluation import Evaluator
from objectives.work import WorkCounter
from storage.encodings import Encodings
from studies import space as spaces
from studies.config import Config


def evaluator_of(
    config: Config,
    forecaster: LoadedForecaster,
    *,
    cache_bytes: int,
    profile: bool = False,
    together: int = 0,
    keep: bool = True,
) -> Evaluator:
    """The evaluator of a forecaster. cache_bytes: bound on what it keeps between measurements.

    keep: use the encodings kept between runs, unless settings or `profile`, which is about the network, say otherwise.
    profile: count the network's operations, unless it is compiled, where they cannot be seen.
    together: windows that are always measured together, where one forward can have so many; 0: as a study's are.
    """
    batch = config.search.batch_size(forecaster.model)
    if together and MODELS[forecaster.model].batch:
        batch = together
    found = Evaluator(
        forecaster,
        cache_bytes=cache_bytes,
        rung=config.search.rung,
        batch=batch,
        # Drawn ahead for later trials, of which nothing is left where nothing is kept.
        max_num_samples=spaces.most_samples(forecaster.model, config) if cache_bytes else None,
        exact=config.search.objective == "exact",
        work=WorkCounter() if profile and forecaster.compilation == "off" else None,
        store=kept_encodings(config, forecaster) if keep and not profile else None,
    )
    if found.kept_points is not None:
        weakref.finalize(found, found.kept_points.flush)  # once nobody uses it, at the latest as the process ends
    return found


def kept_encodings(config: Config, forecaster: LoadedForecaster) -> Encodings | None:
    """Where this host keeps encodings between runs; None where they are not to be kept, or cannot be."""
    mib = config.workers.encodings_mib
    if mib == 0 or not isinstance(forecaster, KeepableForecaster):
        return None
    return Encodings(config.storage.local / "encodings", mib * 2**20 if mib > 0 else None)


def ensemble_evaluator(config: Config, evaluator_of: Callable[[str], Evaluator]) -> EnsembleEvaluator:
    """The evaluator of ensembles. evaluator_of: of a member's model, loaded when it is first asked for."""
    search, most = config.search, max(map(config.search.batch_size, MODELS))
    return EnsembleEvaluator(evaluator_of, rung=search.rung, batch=most, exact=search.objective == "exact")


def serving(config: Config, horizon: int) -> Config:
    """The settings to forecast this many bars with, one window at a time."""
    search = replace(config.search, rung=1, batch=1)
    return replace(config, search=search, windows=replace(config.windows, horizon=horizon))


def load_forecaster(config: Config, model: str, *, device: str) -> LoadedForecaster:
    """Load a model as the settings name it onto "cpu" or "cuda:0". Raises CheckpointError and SettingError."""
    return forecasters.load(model, device=device, **loading_options(config, model))


def checkpoint_fingerprint(config: Config, model: str) -> str:
    """What `load_forecaster` would give as its fingerprint, from the files' headers. Raises CheckpointError."""
    return forecasters.inspect(model, **loading_options(config, model))


def loading_options(config: Config, model: str) -> dict[str, Any]:
    """Where the settings say a model's weights are and how it runs, as `forecasters.load` and `inspect` take it."""
    running = Running(
        compile_mode=config.compile.mode,
        compile_backend=config.compile.backend,
        compile_dir=str(config.compile.dir),
        dtype=config.compile.dtype,
        chunk=config.search.batch_size(model),
    )
    return {"running": running, **MODELS[model].loading_options(config.models[model])}
