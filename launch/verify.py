"""`studies verify-compile`: what compiling gains on the user's own bars, and whether the answer stays the same.

Every mode runs in a process of its own, so that its compiling, its memory and its graphs are nobody else's. Loads a
network only there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from forecasters import COMPILE_MODES, ForecastError, LoadedForecaster, Running
from launch.views.tables import Column, Table
from objectives.aggregation import Draw, parse
from objectives.windows import Windows
from studies.config import Config

if TYPE_CHECKING:
    from studies.series import Series

EAGER = "off"
MODES = tuple(mode for mode in COMPILE_MODES if mode not in ("auto", EAGER))
MAE_TOLERANCE = 1e-3  # relative
MOVED = 1e-3  # of a window's standard deviation: a sample that differs by more took another branch
DEVIATION_BARS = 128  # of which a window's standard deviation is taken


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """One model, as one mode is to run it."""

    model: str
    checkpoint: Mapping[str, Any]  # as `forecasters.load` takes it
    device: str
    windows: Windows
    trials: Sequence[Mapping[str, Any]]  # params; the first ones are timed, all are compared
    repeats: int

    def running(self, mode: str) -> Mapping[str, Any]:
        """The checkpoint's options with this mode in them."""
        return {**self.checkpoint, "running": replace(self.checkpoint["running"], compile_mode=mode)}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModeMeasurement:
    """What one mode answered and what it took."""

    compilation: str
    samples: np.ndarray  # of the first trial, [W, S, H]
    points: Sequence[np.ndarray]  # of each trial, [W, H]
    seconds: Sequence[float]  # of each repetition of the first trial, encoding included
    warmup_s: float  # in first calls of the graphs
    graphs: int
    recompilations: int  # and graphs made after the warm-up
    breaks: int
    skips: int  # of CUDA graphs
    peak_mib: float


@dataclass(frozen=True, kw_only=True)
class ModeRow:
    """One mode beside eager. Differences are in units of a window's standard deviation of closes."""

    model: str
    symbol: str
    mode: str
    compilation: str
    windows: int
    horizon: int
    dtype: str
    trials: int
    warmup_s: float
    mean_s: float
    std_s: float
    speedup: float  # of the means
    difference: float  # largest, of any trial's points
    moved: float  # share of the first trial's samples that took another branch
    mae_change: float  # largest over the trials, relative
    graphs: int
    recompilations: int
    breaks: int
    skips: int
    peak_mib: float
    passed: bool


def checked_modes(modes: Sequence[str], device: str) -> Sequence[str]:
    """The modes asked for, else those that there are for a device. Usage error for an unknown one."""
    for mode in modes:
        if mode not in MODES:
            raise click.BadParameter(f"{mode!r}; the modes are {', '.join(MODES)}", param_hint="--modes")
    return modes or (MODES if device.startswith("cuda") else MODES[:1])


def jobs(
    config: Config, series: Iterable[Series], models: Sequence[str], *, device: str, trials: int, repeats: int
) -> Iterator[VerifyJob]:
    """Every symbol with every model, on the windows of a search. Raises DataError where there are too few bars."""
    # Late: these bring Optuna, which the process of a mode need not load.
    from studies import space as spaces
    from studies.evaluators import loading_options
    from studies.study import split_windows

    for each in series:
        windows = split_windows(config, each.symbol, each.bars).validation
        for model in models:
            yield VerifyJob(
                model=model,
                checkpoint=loading_options(config, model),
                device=device,
                windows=windows,
                trials=random_trials(spaces.make(model, config), trials),
                repeats=repeats,
            )


def compare(
    job: VerifyJob, modes: Sequence[str], *, run: Callable[[VerifyJob, str], ModeMeasurement] | None = None
) -> list[ModeRow]:
    """Eager and then each of these modes; `run` is where a mode is measured, by default a process of its own."""
    run = run or in_process
    eager = run(job, EAGER)
    return [row(job, mode, eager if mode == EAGER else run(job, mode), eager) for mode in (EAGER, *modes)]


def in_process(job: VerifyJob, mode: str) -> ModeMeasurement:
    """`measure` in a fresh process. Raises ForecastError where it dies."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_child, job, mode).result()
        except BrokenProcessPool:
            what = f"the process that ran {job.model} in mode {mode} died; was it out of memory?"
            raise ForecastError(what) from None


def _child(job: VerifyJob, mode: str) -> ModeMeasurement:
    import forecasters

    for name in ("COMPILE", "DISABLE_COMPILE", "COMPILE_MODE"):  # the mode is the one asked for
        os.environ.pop(f"{job.model.upper()}_{name}", None)
    return measure(job, lambda: forecasters.load(job.model, device=job.device, **job.running(mode)))


def measure(job: VerifyJob, make: Callable[[], LoadedForecaster]) -> ModeMeasurement:
    """Warm up with every trial, time the first one, then answer all again, which must need no graph more."""
    from forecasters import compilation

    compilation.start_peak(job.device)
    forecaster, chunk = make(), job.checkpoint["running"].chunk
    for params in job.trials:
        answer(forecaster, job.windows, params, chunk)
    warm = forecaster.graphs.count
    seconds = []
    for _ in range(job.repeats):
        began = time.perf_counter()
        answer(forecaster, job.windows, job.trials[0], chunk)
        seconds.append(time.perf_counter() - began)
    drawn = [answer(forecaster, job.windows, params, chunk) for params in job.trials]
    return ModeMeasurement(
        compilation=forecaster.compilation,
        samples=drawn[0],
        points=[
            Draw(samples).aggregate(parse(params.get("aggregate", "mean")))
            for samples, params in zip(drawn, job.trials, strict=True)
        ],
        seconds=seconds,
        warmup_s=forecaster.graphs.warmup_s,
        graphs=forecaster.graphs.count,
        recompilations=forecaster.graphs.recompilations + forecaster.graphs.count - warm,
        breaks=compilation.graph_breaks(),
        skips=compilation.cuda_graph_skips() if job.device.startswith("cuda") else 0,
        peak_mib=compilation.peak_mib(job.device),
    )


def answer(forecaster: LoadedForecaster, windows: Windows, params: Mapping[str, Any], chunk: int) -> np.ndarray:
    """Samples of all windows, [W, S, H], chunk by chunk as a study takes them, nothing kept between."""
    seeds, parts = windows.seeds(0), {}
    for indices in windows.chunks(chunk):
        encoded = forecaster.encode(windows.contexts(indices), params, windows.horizon)
        drawn = forecaster.draw(encoded, params, [seeds[i] for i in indices])
        parts.update(zip(indices, drawn, strict=True))
    return np.stack([parts[i] for i in range(len(windows))])


def row(job: VerifyJob, mode: str, measured: ModeMeasurement, eager: ModeMeasurement) -> ModeRow:
    contexts = job.windows.contexts(range(len(job.windows)))
    deviation = np.array([context.close[-DEVIATION_BARS:].std() for context in contexts])[:, None]  # [W, 1]
    pairs = list(zip(measured.points, eager.points, strict=True))
    changes = [abs(_mae(job.windows, ours) / _mae(job.windows, theirs) - 1) for ours, theirs in pairs]
    moved = (np.abs(measured.samples - eager.samples) / deviation[..., None]).max(-1) > MOVED  # [W, S]
    failed = measured.compilation != mode
    bad = failed or max(changes) > MAE_TOLERANCE or measured.recompilations + measured.breaks + measured.skips > 0
    running: Running = job.checkpoint["running"]
    return ModeRow(
        model=job.model,
        symbol=job.windows.symbol,
        mode=mode,
        compilation=measured.compilation,
        windows=len(job.windows),
        horizon=job.windows.horizon,
        dtype=running.dtype,
        trials=len(job.trials),
        warmup_s=measured.warmup_s,
        mean_s=float(np.mean(measured.seconds)),
        std_s=float(np.std(measured.seconds)),
        speedup=float(np.mean(eager.seconds) / np.mean(measured.seconds)),
        difference=max(float((np.abs(ours - theirs) / deviation).max()) for ours, theirs in pairs),
        moved=float(moved.mean()),
        mae_change=max(changes),
        graphs=measured.graphs,
        recompilations=measured.recompilations,
        breaks=measured.breaks,
        skips=measured.skips,
        peak_mib=measured.peak_mib,
        passed=not bad,
    )


COLUMNS = {  # headings of a table; of a narrow one's columns the highest stay
    "model": ("model", 0),
    "symbol": ("symbol", 7),
    "mode": ("mode", 12),
    "warmup_s": ("warm-up s", 6),
    "mean_s": ("s", 8),
    "std_s": ("+-", 1),
    "speedup": ("times eager", 10),
    "difference": ("difference / std", 4),
    "moved": ("moved samples", 5),
    "mae_change": ("MAE change", 9),
    "graphs": ("graphs", 3),
    "recompilations": ("again", 0),
    "breaks": ("breaks", 0),
    "skips": ("skipped", 0),
    "peak_mib": ("peak MiB", 2),
    "compilation": ("ran as", 11),
}
FAULTS = {"recompilations", "breaks", "skips"}  # say why a row fails, where they are not nought
FAULTY = 13  # how high they stay then
FORMATS = {
    "speedup": ".2f",
    "difference": ".1e",
    "moved": ".4%",
    "mae_change": ".1e",
    "warmup_s": ".1f",
    "mean_s": ".3f",
    "std_s": ".3f",
    "peak_mib": ".0f",
}
NARROWEST_REASON = 20  # "ran as" also says why a mode failed, in a sentence or two


def table(rows: Sequence[ModeRow]) -> Table:
    """One row a mode; a narrow terminal keeps longest what a row fails by."""

    def column(name: str) -> Column:
        heading, priority = COLUMNS[name]
        values = [getattr(row, name) for row in rows]
        return Column(
            heading=heading,
            cells=[format(value, FORMATS.get(name, "")) for value in values],
            priority=FAULTY if name in FAULTS and any(values) else priority,
            wrap_width=NARROWEST_REASON if name == "compilation" else 0,
        )

    return Table(columns=[column(name) for name in COLUMNS])


def _mae(windows: Windows, points: np.ndarray) -> float:
    return float((np.abs(points - windows.actuals).mean(axis=1) / windows.last_closes).mean())


def random_trials(knobs: Any, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Params of a search space (`studies.space.Space`) at random, the same ones for every mode."""
    from forecasters.descriptor import Range

    rng = np.random.default_rng(seed)

    def one(knob: Any) -> Any:
        if not isinstance(knob, Range):
            return knob[int(rng.integers(len(knob)))]
        if knob.step is None:
            return float(rng.uniform(knob.low, knob.high))
        return float(knob.low + knob.step * rng.integers(round((knob.high - knob.low) / knob.step) + 1))

    drawn = [{name: one(knob) for name, knob in knobs.knobs.items()} for _ in range(count)]
    return [knobs.complete(knobs.searched(each)) for each in drawn]
