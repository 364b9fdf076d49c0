"""`studies verify-compile`: what compiling gains on the user's own bars, and whether forecasts stay the same.

Every mode runs in a process of its own, so that its compilation, memory and graphs are measured alone. Networks are
loaded only there.
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

from forecasters import COMPILE_MODES, ForecastError, LoadedForecaster
from launch.views.tables import Column, Table
from objectives.aggregation import Draw
from objectives.metrics import relative_errors
from objectives.quantiles import unshrunk
from objectives.windows import Windows
from studies.config import Config

if TYPE_CHECKING:
    from objectives.evaluation import Evaluator
    from studies.series import Series

EAGER = "off"
MODES = tuple(mode for mode in COMPILE_MODES if mode not in ("auto", EAGER))
MAE_TOLERANCE = 1e-3  # relative
MOVED = 1e-3  # of a window's standard deviation: a sample that differs by more took another branch
DEVIATION_BARS = 128  # last bars of a context, whose standard deviation of closes is a window's


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """One model on one symbol, to be run in every mode."""

    config: Config  # which checkpoint, and how it runs but for the mode
    model: str
    device: str
    windows: Windows
    trials: Sequence[Mapping[str, Any]]  # params; the first ones are timed, all are compared
    repeats: int  # timed runs of the first trial

    def in_mode(self, mode: str) -> Config:
        """The settings with this compile mode."""
        return replace(self.config, compile=replace(self.config.compile, mode=mode))


@dataclass(frozen=True, kw_only=True, eq=False)
class ModeMeasurement:
    """The forecasts of one mode and what they took."""

    compilation: str  # the mode that ran, or "MODE failed: why"
    samples: np.ndarray  # of the first trial, [W, S, H]
    points: Sequence[np.ndarray]  # of each trial, [W, H]
    seconds: Sequence[float]  # of each run of the first trial, from bars to samples
    warmup_s: float  # in first calls of the graphs
    graphs: int
    recompilations: int  # of known shapes, and graphs compiled after the warm-up
    breaks: int  # graph breaks
    skips: int  # graphs that could not be CUDA graphs
    peak_mib: float  # memory of the device, on a CPU of the process


@dataclass(frozen=True, kw_only=True)
class ModeRow:
    """One mode compared with eager. Differences are in units of a window's standard deviation of closes."""

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
    """The modes asked for, else all that a device has. Raises a usage error for an unknown one."""
    for mode in modes:
        if mode not in MODES:
            raise click.BadParameter(f"{mode!r}; the modes are {', '.join(MODES)}", param_hint="--modes")
    return modes or (MODES if device.startswith("cuda") else MODES[:1])


def jobs(
    config: Config, series: Iterable[Series], models: Sequence[str], *, device: str, trials: int, repeats: int
) -> Iterator[VerifyJob]:
    """Every symbol with every model, on the validation windows. Raises DataError where there are too few bars."""
    from studies import space as spaces  # late, as Optuna comes with it
    from studies.series import split_windows

    for each in series:
        windows = split_windows(config, each.symbol, each.bars).validation
        for model in models:
            yield VerifyJob(
                config=config,
                model=model,
                device=device,
                windows=windows,
                trials=spaces.random_params(spaces.make(model, config), trials),
                repeats=repeats,
            )


def compare(
    job: VerifyJob, modes: Sequence[str], *, run: Callable[[VerifyJob, str], ModeMeasurement] | None = None
) -> list[ModeRow]:
    """Measure eager and then each of these modes. run: measures one, by default in a process of its own."""
    run = run or in_process
    eager = run(job, EAGER)
    return [row(job, mode, eager if mode == EAGER else run(job, mode), eager) for mode in (EAGER, *modes)]


def in_process(job: VerifyJob, mode: str) -> ModeMeasurement:
    """Run `measure` in a fresh process. Raises ForecastError where that process dies."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_child, job, mode).result()
        except BrokenProcessPool:
            what = f"the process that ran {job.model} in mode {mode} died; was it out of memory?"
            raise ForecastError(what) from None


def _child(job: VerifyJob, mode: str) -> ModeMeasurement:
    for name in ("COMPILE", "DISABLE_COMPILE", "COMPILE_MODE"):  # the mode is the one asked for
        os.environ.pop(f"{job.model.upper()}_{name}", None)
    return measure(job, mode)


def measure(
    job: VerifyJob, mode: str, *, inspect: Callable[[LoadedForecaster, Evaluator], None] | None = None
) -> ModeMeasurement:
    """Warm up with every trial, time the first one, then forecast with all again, which must compile nothing more.

    inspect: called at the end with what was loaded. Raises CheckpointError, SettingError and ForecastError.
    """
    from forecasters import compilation
    from studies import evaluators

    compilation.start_peak(job.device)
    forecaster = evaluators.load_forecaster(job.in_mode(mode), job.model, device=job.device)
    evaluator = evaluators.evaluator_of(job.config, forecaster, cache_bytes=0)
    for params in job.trials:
        _answers(evaluator, job.windows, params)
    warm = forecaster.graphs.count
    seconds = []
    for _ in range(job.repeats):
        began = time.perf_counter()
        _answers(evaluator, job.windows, job.trials[0])
        seconds.append(time.perf_counter() - began)
    answers = [_answers(evaluator, job.windows, params) for params in job.trials]
    measured = ModeMeasurement(
        compilation=forecaster.compilation,
        samples=answers[0][0],
        points=[points for _, points in answers],
        seconds=seconds,
        warmup_s=forecaster.graphs.warmup_s,
        graphs=forecaster.graphs.count,
        recompilations=forecaster.graphs.recompilations + forecaster.graphs.count - warm,
        breaks=compilation.graph_breaks(),
        skips=compilation.cuda_graph_skips() if job.device.startswith("cuda") else 0,
        peak_mib=compilation.peak_mib(job.device),
    )
    if inspect is not None:
        inspect(forecaster, evaluator)
    return measured


def _answers(evaluator: Evaluator, windows: Windows, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Samples [W, S, H] and points [W, H]; of a model that draws none its deciles stand for samples."""
    if not evaluator.forecaster.params.num_samples:
        deciles = [evaluator.forecast(windows, unshrunk(params, f"quantile_{tenth / 10}")) for tenth in range(1, 10)]
        return np.stack(deciles, axis=1), evaluator.forecast(windows, params)
    samples = evaluator.samples(windows, params)
    return samples, Draw(samples).aggregate(params.get("aggregate", "mean"))


def row(job: VerifyJob, mode: str, measured: ModeMeasurement, eager: ModeMeasurement) -> ModeRow:
    """Compare a mode with eager."""
    contexts = job.windows.contexts(range(len(job.windows)))
    deviation = np.array([context.close[-DEVIATION_BARS:].std() for context in contexts])[:, None]  # [W, 1]
    pairs = list(zip(measured.points, eager.points, strict=True))
    changes = [abs(_mae(job, ours) / _mae(job, theirs) - 1) for ours, theirs in pairs]
    moved = (np.abs(measured.samples - eager.samples) / deviation[..., None]).max(-1) > MOVED  # [W, S]
    failed = measured.compilation != mode
    bad = failed or max(changes) > MAE_TOLERANCE or measured.recompilations + measured.breaks + measured.skips > 0
    return ModeRow(
        model=job.model,
        symbol=job.windows.symbol,
        mode=mode,
        compilation=measured.compilation,
        windows=len(job.windows),
        horizon=job.windows.horizon,
        dtype=job.config.compile.dtype,
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


COLUMNS = {  # headings, how long a column stays as the table gets narrower, and how its values are written
    "model": ("model", 0, ""),
    "symbol": ("symbol", 7, ""),
    "mode": ("mode", 12, ""),
    "warmup_s": ("warm-up s", 6, ".1f"),
    "mean_s": ("mean s", 8, ".3f"),
    "std_s": ("std s", 1, ".3f"),
    "speedup": ("speedup", 10, ".2f"),
    "difference": ("max difference / std", 4, ".1e"),
    "moved": ("changed samples", 5, ".4%"),
    "mae_change": ("MAE change", 9, ".1e"),
    "graphs": ("graphs", 3, ""),
    "recompilations": ("recompilations", 0, ""),
    "breaks": ("graph breaks", 0, ""),
    "skips": ("skipped CUDA graphs", 0, ""),
    "peak_mib": ("peak MiB", 2, ".0f"),
    "compilation": ("compilation", 11, ""),
}
FAULTS = {"recompilations", "breaks", "skips"}  # columns that say why a row fails, where one is not 0
FAULTY = 13  # how long they stay then
NARROWEST_REASON = 20  # "compilation" also says why a mode failed, in a sentence or two


def table(rows: Sequence[ModeRow]) -> Table:
    """One row a mode; columns that show why a row fails are the last that a narrow terminal leaves out."""

    def column(name: str) -> Column:
        heading, priority, form = COLUMNS[name]
        values = [getattr(row, name) for row in rows]
        return Column(
            heading=heading,
            cells=[format(value, form) for value in values],
            priority=FAULTY if name in FAULTS and any(values) else priority,
            wrap_width=NARROWEST_REASON if name == "compilation" else 0,
        )

    return Table(columns=[column(name) for name in COLUMNS])


def _mae(job: VerifyJob, points: np.ndarray) -> float:
    return float(relative_errors(job.windows, points).mean())
