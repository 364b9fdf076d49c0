"""`studies verify-compile`: what compiling and other dtypes gain on the user's own bars, and how forecasts change.

Every mode and dtype runs in a process of its own, so that its compilation, memory and graphs are measured alone.
Networks are loaded only there.
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

from forecasters import COMPILE_MODES, DTYPES, ForecastError, LoadedForecaster
from launch import devices
from launch.output import say, show
from launch.views.tables import Column, Table
from objectives.aggregation import Draw
from objectives.bootstrap import mean_interval
from objectives.metrics import relative_errors
from objectives.quantiles import unshrunk
from objectives.windows import Windows
from studies.config import Config
from studies.series import confirmation_windows, read_usable_series, split_windows

if TYPE_CHECKING:
    from objectives.evaluation import Evaluator
    from studies.series import Series

EAGER = "off"
MODES = tuple(mode for mode in COMPILE_MODES if mode not in ("auto", EAGER))
EXACT = DTYPES[0]  # what other dtypes are compared with
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

    @property
    def dtype(self) -> str:
        return self.config.compile.dtype

    def in_mode(self, mode: str) -> Config:
        """The settings with this compile mode."""
        return replace(self.config, compile=replace(self.config.compile, mode=mode))

    def of_dtype(self, dtype: str) -> VerifyJob:
        """The same in another dtype."""
        return replace(self, config=replace(self.config, compile=replace(self.config.compile, dtype=dtype)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ModeMeasurement:
    """The forecasts of one mode and what they took."""

    dtype: str
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
    weight_mib: float  # the network's weights
    products: float  # operations a second of a large matrix product in this dtype
    instructions: Sequence[str] | None  # of this CPU for it; None: it needs none


@dataclass(frozen=True, kw_only=True)
class ModeRow:
    """One mode compared with eager, or a dtype with float32; see `row`.

    Differences are in units of a window's standard deviation of closes.
    """

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
    rms: float  # the root of the mean square of the same
    moved: float  # share of the first trial's samples that took another branch
    mae_change: float  # relative, of the trial where it is the largest
    mae_low: float  # 95 % of it, paired over windows
    mae_high: float
    graphs: int
    recompilations: int
    breaks: int
    skips: int
    peak_mib: float
    weight_mib: float
    products: float
    instructions: Sequence[str] | None
    passed: bool

    @property
    def mae_interval(self) -> str:
        return f"{self.mae_low:+.1e} to {self.mae_high:+.1e}"

    @property
    def verdict(self) -> str:
        return "yes" if self.passed else "no"


def checked(modes: Sequence[str], dtypes: Sequence[str], device: str) -> Sequence[str]:
    """The modes asked for; with no dtypes either, all that a device has. Raises a usage error for an unknown name."""
    for option, names, known in (("--modes", modes, MODES), ("--dtypes", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r}; the {option[2:]} are {', '.join(known)}", param_hint=option)
    return modes or (() if dtypes else MODES if device.startswith("cuda") else MODES[:1])


def jobs(
    config: Config,
    series: Iterable[Series],
    models: Sequence[str],
    *,
    device: str,
    trials: int,
    repeats: int,
    confirming: bool = False,
) -> Iterator[VerifyJob]:
    """Every symbol with every model, on the validation windows or all those of a confirmation.

    Raises DataError where there are too few bars.
    """
    from studies import space as spaces  # late, as Optuna comes with it

    for each in series:
        whole = (config, each.symbol, each.bars)
        windows = confirmation_windows(*whole) if confirming else split_windows(*whole).validation
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
    job: VerifyJob,
    modes: Sequence[str],
    dtypes: Sequence[str] = (),
    *,
    run: Callable[[VerifyJob, str], ModeMeasurement] | None = None,
) -> list[ModeRow]:
    """Measure eager and then each of these modes, with dtypes in float32 and then in each of these.

    run: measures one, by default in a process of its own.
    """
    run = run or in_process
    asked = [job.of_dtype(dtype) for dtype in dict.fromkeys((EXACT, *dtypes))] if dtypes else [job]
    eager = run(asked[0], EAGER)
    kinds = [(one, mode) for one in asked for mode in (EAGER, *modes)]
    first = row(asked[0], EAGER, eager, eager)
    return [first, *(row(one, mode, run(one, mode), eager) for one, mode in kinds[1:])]


def in_process(job: VerifyJob, mode: str) -> ModeMeasurement:
    """Run `measure` in a fresh process. Raises ForecastError where that process dies."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_child, job, mode).result()
        except BrokenProcessPool:
            what = f"the process that ran {job.model} in mode {mode} and {job.dtype} died; was it out of memory?"
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
    from forecasters import compilation, low_precision, measure_matrix_product
    from studies import evaluators

    compilation.start_peak(job.device)
    forecaster = evaluators.load_forecaster(job.in_mode(mode), job.model, device=job.device)
    evaluator = evaluators.evaluator_of(job.config, forecaster, cache_bytes=0, keep=False)
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
        dtype=job.dtype,
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
        weight_mib=low_precision.weight_mib(forecaster),
        products=measure_matrix_product(job.device, job.dtype) or 0.0,
        instructions=None if job.device.startswith("cuda") else low_precision.instructions(job.dtype),
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
    """Compare a mode with eager, or a dtype with float32.

    A mode does the same arithmetic in another order and passes where no MAE changes by more than `MAE_TOLERANCE`, where
    nothing was compiled twice and nothing broke. Another dtype changes forecasts: it passes where, beside that, the
    whole 95 % interval of the change is within `MAE_TOLERANCE`, since few windows prove little.
    """
    contexts = job.windows.contexts(range(len(job.windows)))
    deviation = np.array([context.close[-DEVIATION_BARS:].std() for context in contexts])[:, None]  # [W, 1]
    pairs = list(zip(measured.points, eager.points, strict=True))
    differences = np.array([(ours - theirs) / deviation for ours, theirs in pairs])  # [trials, W, H]
    changed = max((_changes(job, ours, theirs) for ours, theirs in pairs), key=lambda change: abs(change.mean()))  # [W]
    change = float(changed.mean())
    low, high = mean_interval(changed) or (change, change)
    moved = (np.abs(measured.samples - eager.samples) / deviation[..., None]).max(-1) > MOVED  # [W, S]
    failed = measured.compilation != mode
    furthest = abs(change) if job.dtype == eager.dtype else max(-low, high)
    bad = failed or furthest > MAE_TOLERANCE or measured.recompilations + measured.breaks + measured.skips > 0
    return ModeRow(
        model=job.model,
        symbol=job.windows.symbol,
        mode=mode,
        compilation=measured.compilation,
        windows=len(job.windows),
        horizon=job.windows.horizon,
        dtype=job.dtype,
        trials=len(job.trials),
        warmup_s=measured.warmup_s,
        mean_s=float(np.mean(measured.seconds)),
        std_s=float(np.std(measured.seconds)),
        speedup=float(np.mean(eager.seconds) / np.mean(measured.seconds)),
        difference=float(np.abs(differences).max()),
        rms=float(np.sqrt(np.mean(differences**2))),
        moved=float(moved.mean()),
        mae_change=change,
        mae_low=low,
        mae_high=high,
        graphs=measured.graphs,
        recompilations=measured.recompilations,
        breaks=measured.breaks,
        skips=measured.skips,
        peak_mib=measured.peak_mib,
        weight_mib=measured.weight_mib,
        products=measured.products,
        instructions=measured.instructions,
        passed=not bad,
    )


COLUMNS = {  # headings, how long a column stays as the table gets narrower, and how its values are written
    "model": ("model", 0, ""),
    "symbol": ("symbol", 7, ""),
    "mode": ("mode", 12, ""),
    "dtype": ("dtype", 11, ""),
    "warmup_s": ("warm-up s", 6, ".1f"),
    "mean_s": ("mean s", 8, ".3f"),
    "std_s": ("std s", 1, ".3f"),
    "speedup": ("speedup", 10, ".2f"),
    "difference": ("max difference / std", 4, ".1e"),
    "rms": ("rms difference / std", 4, ".1e"),
    "moved": ("changed samples", 5, ".4%"),
    "mae_change": ("MAE change", 9, "+.1e"),
    "mae_interval": ("95 % interval", 7, ""),
    "verdict": ("passes", 8, ""),
    "graphs": ("graphs", 3, ""),
    "recompilations": ("recompilations", 0, ""),
    "breaks": ("graph breaks", 0, ""),
    "skips": ("skipped CUDA graphs", 0, ""),
    "weight_mib": ("weights MiB", 5, ".3g"),
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


def rates(rows: Sequence[ModeRow]) -> Iterator[str]:
    """What this device makes of each dtype but float32, where there are several: a line a dtype."""
    found = {row.dtype: row for row in rows}
    for dtype, row in found.items():
        if dtype != EXACT and EXACT in found:
            has = ", with " + " and ".join(row.instructions or ()) if row.instructions else ""
            lacks = ": this CPU has no instructions for it (AMX, AVX-512)" if row.instructions == () else ""
            times = row.products / found[EXACT].products
            yield f"a matrix product in {dtype} has {times:.1f} times the rate of one in float32{has}{lacks}"


def verify(
    config: Config,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: str | None,
    repeats: int,
    trials: int,
    as_json: bool,
) -> int:
    """Do what `studies verify-compile` does; returns its exit status. Raises ExpectedError and usage errors."""
    device = device or ("cuda:0" if devices.visible_gpus() else "cpu")
    modes = checked(modes, dtypes, device)
    series, skipped, notes = read_usable_series(config, symbols, first=not symbols)
    for note in (*notes, *(f"{symbol} skipped: {reason}" for symbol, reason in skipped.items())):
        say(note)
    found = jobs(config, series, models, device=device, trials=trials, repeats=repeats, confirming=bool(dtypes))
    rows = [row for job in found for row in compare(job, modes, dtypes)]
    show(rows, table, as_json=as_json)
    for line in rates(rows):
        say(line)
    if failed := [row for row in rows if not row.passed]:
        names = ", ".join(f"{row.model} {row.mode} in {row.dtype} on {row.symbol}" for row in failed)
        say(f"not passed, as forecasts differ or a model was not compiled exactly once: {names}; see the rows")
    return 1 if failed or (skipped and symbols) else 0


def _changes(job: VerifyJob, points: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What each window adds to the MAE, [W], in units of the MAE before: their mean is its relative change."""
    ours, theirs = (relative_errors(job.windows, each) for each in (points, before))
    return (ours - theirs) / theirs.mean()
