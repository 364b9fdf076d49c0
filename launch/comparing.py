"""`studies compare`: configurations and naive baselines side by side, on equal windows of every symbol.

Models are measured in processes, a symbol and model at a time; the baselines and the improvements are computed here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from forecasters import CLOSE, ForecastError
from forecasters.models import MODELS
from launch import processes
from launch.devices import DeviceSlot, device_slots
from launch.output import counted, say, wide_console
from launch.places import open_storage
from launch.processes import Processes
from launch.profiling import Profile, joined, show_profile, work_of
from launch.views import comparison, comparison_figures
from launch.views.comparison import BLOCKS, ComparisonRow, Fan
from launch.views.tables import duration, terminal
from objectives.bars import DataError, require_keys
from objectives.evaluation import Evaluator
from objectives.quantiles import unshrunk
from objectives.windows import SeedKind, Windows
from storage.commands import this_command
from studies import chosen, comparing
from studies.comparing import ComparedConfiguration, MeasuredRow
from studies.config import Config, ConfigError
from studies.evidence import ENSEMBLE
from studies.series import Series, read_usable_series, window_span

BAND = (0.1, 0.9)  # quantiles that a fan shows
HORIZON = 64  # of the predecessor's comparisons


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of the command say."""

    symbols: Sequence[str]
    models: Sequence[str]
    horizon: int
    windows: int
    stride: int
    passes: int
    params: Sequence[str]
    keys: Sequence[str]  # prices of a bar; figures are of the first
    seeds: SeedKind = SeedKind.STUDY
    profile: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One symbol, and what is measured on its windows."""

    series: Series
    windows: Windows
    rows: Sequence[ComparedConfiguration]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does at a time: configurations of one model on one symbol's windows."""

    settings: str
    model: str
    windows: Windows
    rows: Sequence[ComparedConfiguration]
    keys: Sequence[str]
    passes: int
    seeds: SeedKind
    fan: bool  # also the band of the last window
    profile: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What came of a configuration: how it did, or why it could not be measured."""

    measured: Mapping[str, MeasuredRow] = field(default_factory=dict)  # by key
    band: np.ndarray | None = None  # [2, H] of the last window, price
    error: str | None = None


def command(
    config: Config, asked: Asked, *, gpus: Sequence[int], cpus: int | None, plot: Path | None, as_json: bool
) -> None:
    """What the command does. Raises ExpectedError; exits with status 1 where a row could not be measured."""
    if plot is not None:
        comparison_figures.check(plot)
    slots = device_slots(gpus or None, cpus)
    config = chosen.with_horizon(config, asked.horizon, asked.models)
    began = time.perf_counter()
    cases = cases_of(config, asked)
    read = Profile(seconds={"read": time.perf_counter() - began})
    try:
        rows, fan, profile = measure(config, asked, cases, slots, fan=plot is not None)
    except KeyboardInterrupt:
        say(f"interrupted; nothing is kept; again: {this_command()}")
        sys.exit(130)
    over_symbols = comparison.over_symbols(rows)
    if as_json:
        click.echo(json.dumps({"rows": [asdict(one) for one in rows], "over_symbols": over_symbols}, indent=2))
    else:
        console = wide_console()
        console.print(terminal(comparison.table(rows), console.width))
        if over_symbols:
            console.print(f"\nmean of {over_symbols[0]['symbols']} symbols", style="bold")
            console.print(terminal(comparison.summary_table(over_symbols), console.width))
        if CLOSE in asked.keys:
            console.print(f"\n{comparison.blocks_line(rows)}")
    for line in comparison.explanations(rows):
        say(line)
    if plot is not None and fan is not None:
        comparison_figures.write(plot, [row for row in rows if row.key == fan.key], fan)
        say(f"figure in {plot}")
    if asked.profile:
        show_profile(joined([read, profile]))
    if any(one.error for one in rows):
        sys.exit(1)


# --- what is measured ---------------------------------------------------------------------------------------


def cases_of(config: Config, asked: Asked) -> list[Case]:
    """The symbols with their windows and configurations; says what is left out. Raises ExpectedError for none left."""
    overrides, notes = chosen.environment_overrides(asked.models, os.environ)
    words = chosen.read_words(asked.params, lambda: open_storage(config))
    series, refused, of_files = read_usable_series(_for_windows(config), asked.symbols)
    cases, dead, without = [], [], []
    for each in series:
        try:
            require_keys(each.bars, asked.keys, each.path)
        except DataError as error:
            refused[each.symbol] = str(error)
            continue
        try:
            windows = comparing.windows_before_test(
                config=_for_windows(config),
                symbol=each.symbol,
                bars=each.bars,
                count=asked.windows,
                stride=asked.stride,
            )
        except DataError as error:
            refused[each.symbol] = f"{error}; or ask for fewer or closer ones with --windows and --stride"
            continue
        found = chosen.for_symbol(config, each.symbol, each.bars, asked.models, asked.params, words, overrides)
        notes += found.notes
        dead += found.dead_top_p
        if not found.rows:
            without.append(each.symbol)
            continue
        cases.append(Case(series=each, windows=windows.of_key(asked.keys[0]), rows=found.rows))
    if not cases and not without and len(refused) == 1:
        raise DataError(*refused.values())
    for note in (*notes, *of_files, *(f"{symbol} skipped: {reason}" for symbol, reason in refused.items())):
        say(note)
    if without:
        say(
            f"no configuration of {comparison.some(without)} in {config.hyperparams.dir} for --params "
            f"{','.join(asked.params)}; left out; --params {chosen.DEFAULT} measures the models' published defaults"
        )
    if dead:
        say(f"top_p has no effect while top_k is above 0: {comparison.some(dead)}")
    if not cases:
        raise ConfigError("nothing is left to compare")
    return cases


def _for_windows(config: Config) -> Config:
    """The settings of windows for bars that are not searched: no validation windows of their own are needed."""
    return replace(config, windows=replace(config.windows, validation=1))


def measure(
    config: Config, asked: Asked, cases: Sequence[Case], slots: Sequence[DeviceSlot], *, fan: bool
) -> tuple[list[ComparisonRow], Fan | None, Profile]:
    """Measure every row of every case. fan: also what a figure of the first symbol shows."""
    settings = processes.settings_text(config)
    jobs = [
        Job(
            settings=settings,
            model=model,
            windows=case.windows,
            rows=[row for row in case.rows if row.model == model],
            keys=asked.keys,
            passes=asked.passes,
            seeds=asked.seeds,
            fan=fan and case is cases[0],
            profile=asked.profile,
        )
        for model in (ENSEMBLE, *reversed(asked.models))  # the later models of the list take longer: they begin
        for case in cases
    ]
    jobs = [job for job in jobs if job.rows]
    pilots = list({job.model: job for job in reversed(jobs)}.values())
    answers: dict[tuple[str, str], Sequence[Answer]] = {}
    with Processes(slots[: len(jobs)]) as pool:
        tried = {job.model: found for job, found in pool.run(pilot, pilots)}
        spent = [profile for _, profile in tried.values()]
        sizes = [len(job.windows) * len(job.rows) for job in jobs]
        each = [tried[job.model][0] * len(job.windows) * asked.passes for job in jobs]
        total = max(*each, sum(each) / len(slots[: len(jobs)]))  # one symbol and model is one process's
        say(
            f"{counted(len(cases), 'symbol')}, {sum(sizes)} forecasts of {counted(asked.horizon, 'step')} on "
            f"{counted(len(slots[: len(jobs)]), slots[0].device.split(':')[0] + ' process')}: about {duration(total)}"
        )
        for job, found in pool.run(measure_job, jobs, sizes=sizes):
            answers[job.windows.symbol, job.model], profile = found
            spent.append(profile)
    rows: list[ComparisonRow] = []
    for case in cases:
        by_model = {model: iter(answers.get((case.series.symbol, model), ())) for model in (*asked.models, ENSEMBLE)}
        found = [next(by_model[row.model]) for row in case.rows]
        rows += [row for key in asked.keys for row in _rows(case, key, found, asked.stride)]
    return rows, _fan(cases[0], answers) if fan else None, joined(spent)


def pilot(job: Job, device: str) -> tuple[float, Profile]:
    """Seconds that a window of these configurations takes, from the bars to the points: the mean of first and last.

    A longer context may cost many times a shorter one, where it slides past what the network sees. Beside it what it
    took to load the model.
    """
    began = time.perf_counter()
    evaluator = _evaluator(job, device)
    load_s = time.perf_counter() - began
    tried = []
    for origin in (job.windows.origins[0], job.windows.origins[-1]):
        before = sum(evaluator.seconds.values())
        for row in job.rows:
            try:
                comparing.measure_keys(evaluator, replace(job.windows, origins=(origin,)), row.params, job.keys)
            except ForecastError:  # the measurement says it
                continue
        tried.append(sum(evaluator.seconds.values()) - before)
    return sum(tried) / len(tried), Profile(seconds={"load": load_s})


def _evaluator(job: Job, device: str) -> Evaluator:
    evaluator = processes.evaluator(job.settings, job.model, device, profile=job.profile)
    evaluator.max_num_samples = 0  # nothing is drawn ahead for trials
    return evaluator


def measure_job(job: Job, device: str) -> tuple[list[Answer], Profile]:
    """Measure these configurations, that with the most samples first, as the others' are among them."""
    began = time.perf_counter()
    evaluator = _evaluator(job, device)
    load_s = time.perf_counter() - began
    seconds, work = dict(evaluator.seconds), work_of([evaluator])
    count = MODELS[job.model].params.num_samples if job.model in MODELS else ""
    order = sorted(range(len(job.rows)), key=lambda place: -job.rows[place].params.get(count, 0))
    found = {place: _answer(job, job.rows[place].params, evaluator) for place in order}
    profile = Profile(
        seconds={"load": load_s, **{stage: spent - seconds[stage] for stage, spent in evaluator.seconds.items()}},
        flop={stage: flop - work.get(stage, 0.0) for stage, flop in work_of([evaluator]).items()},
        rate=processes.matrix_product(device) if job.profile else None,
    )
    return [found[place] for place in range(len(job.rows))], profile


def _answer(job: Job, params: Mapping[str, Any], evaluator: Evaluator) -> Answer:
    try:
        passes = comparing.passes_of(evaluator, job.passes)
        measured = comparing.measure_keys(evaluator, job.windows, params, job.keys, passes=passes, kind=job.seeds)
        band = None
        if job.fan and (not evaluator.exact or "aggregate" in params):  # the exact answer of Kronos is a mean alone
            last = replace(job.windows, origins=job.windows.origins[-1:])
            ends = [unshrunk(params, f"quantile_{level}") for level in BAND]
            band = np.stack([evaluator.forecast(last, end, pass_number=passes[0], kind=job.seeds)[0] for end in ends])
        return Answer(measured=measured, band=band)
    except ForecastError as error:
        return Answer(error=str(error))


# --- rows ---------------------------------------------------------------------------------------------------


def _rows(case: Case, key: str, answers: Sequence[Answer], stride: int) -> list[ComparisonRow]:
    """Of one symbol and key, the configurations first; improvements are over the first that was measured."""
    windows = case.windows.of_key(key)
    span = window_span(windows)
    reference = next((one.measured[key] for one in answers if one.measured), None)
    common = {
        "symbol": case.series.symbol,
        "key": key,
        "windows": len(windows),
        "effective_windows": comparing.effective_windows(windows),
        "horizon": windows.horizon,
        "stride": stride,
        "first": span.first,
        "last": span.last,
    }

    def row(label: str, model: str, source: str, params: Mapping[str, Any], answer: Answer) -> ComparisonRow:
        told = {**common, "label": label, "model": model, "source": source, "params": dict(params)}
        if (measured := answer.measured.get(key)) is None:
            return ComparisonRow(**told, error=answer.error)
        gain = None
        if reference is not None and measured is not reference:
            gain = comparing.paired_improvement(windows, reference.measurement.errors, measured.measurement.errors)
        found = measured.measurement
        share = MODELS[model].clipped if model in MODELS else None
        return ComparisonRow(
            **told,
            clipped=share(windows.bars.close, windows.origins, params) if share else None,
            reference=measured is reference,
            mae=found.mae,
            price_mae=found.price_mae,
            mae_percent=found.mae_percent,
            skill=found.skill,
            by_step=tuple(measured.by_step.tolist()),
            sampling_error=found.sampling_error,
            seconds=sum(found.seconds.values()) if found.seconds else None,
            repaired=measured.repaired,
            improvement=gain.value if gain else None,
            improvement_low=gain.interval[0] if gain and gain.interval else None,
            improvement_high=gain.interval[1] if gain and gain.interval else None,
            verdict=gain.verdict if gain else None,
        )

    naive = {"no change": comparing.no_change(windows), "drift": comparing.drift(windows)}
    block = comparing.block_persistence(case.series.bars.close, windows.horizon)
    blocks = ComparisonRow(**common, label=BLOCKS, model="", source="baseline", params={}, mae_percent=block)
    return [
        *(row(one.label, one.model, one.source, one.params, a) for one, a in zip(case.rows, answers, strict=True)),
        *(
            row(name, "", "baseline", {}, Answer(measured={key: comparing.measure_points(windows, points)}))
            for name, points in naive.items()
        ),
        *([blocks] if key == CLOSE else []),
    ]


def _fan(case: Case, answers: Mapping[tuple[str, str], Sequence[Answer]]) -> Fan:
    """What a figure shows of the last window of a case."""
    windows, bars = case.windows, case.series.bars
    origin, horizon = windows.origins[-1], windows.horizon
    shown = slice(max(0, origin - max(horizon, 20)), origin + horizon)
    by_model = {model: iter(found) for (symbol, model), found in answers.items() if symbol == case.series.symbol}
    found = {row.label: next(by_model[row.model]) for row in case.rows}
    return Fan(
        symbol=case.series.symbol,
        times=tuple(str(time.astype("datetime64[m]")) for time in bars.timestamps[shown]),
        key=windows.key,
        prices=tuple(getattr(bars, windows.key)[shown].tolist()),
        ahead=horizon,
        points={label: one.measured[windows.key].points[-1].tolist() for label, one in found.items() if one.measured},
        bands={label: one.band.tolist() for label, one in found.items() if one.band is not None},
    )
