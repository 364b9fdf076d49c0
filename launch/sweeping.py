"""`studies sweep`: one parameter or two varied, everything else fixed, shown as a table, a figure or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from forecasters.models import MODELS
from launch import processes
from launch.devices import device_slots
from launch.output import counted, say, show
from launch.places import open_storage
from launch.processes import Processes
from launch.views import comparison_figures, sweep_figures
from launch.views.tables import NOTHING, Column, Table, numbers, percent_error, percent_gain, percent_interval
from objectives.metrics import Measurement
from objectives.windows import Windows
from studies import candidates, chosen, comparing, sweeping
from studies import space as spaces
from studies.comparing import ComparedConfiguration
from studies.config import Config, ConfigError
from studies.evidence import measurement_json, params_text
from studies.series import read_series, window_span
from studies.sweeping import Sweep, SweptCell

MOST_AXES, MOST_ROWS = 2, 20


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words of the command say."""

    symbol: str
    model: str
    axes: Mapping[str, Sequence[Any]]  # values by parameter
    start: str  # the word for the configuration that everything else is from
    horizon: int
    windows: int
    stride: int
    passes: int


def checked_axes(model: str, words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of every PARAM=V1,V2,... Raises a usage error for what the model cannot take."""
    kinds, axes = MODELS[model].kinds, dict[str, list[Any]]()
    for word in words:
        name, _, text = word.partition("=")
        if name not in kinds:
            problem = f"{model} has no parameter {name!r}; it has {', '.join(kinds)}"
        elif name in axes:
            problem = f"{name} is given twice; list its values as {name}=V1,V2"
        else:
            try:
                found = [
                    spaces.parse_value(name, kinds[name], part.strip()) for part in text.split(",") if part.strip()
                ]
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint=word) from None
            axes[name] = list(dict.fromkeys(found))
            problem = "" if found else f"has no values; write {name}=V1,V2"
        if problem:
            raise click.BadParameter(problem, param_hint=word)
    if not 1 <= len(axes) <= MOST_AXES:
        raise click.UsageError(f"name one parameter to vary, or two, as PARAM=V1,V2; these are {len(axes)}")
    return axes


def command(config: Config, asked: Asked, *, plot: Path | None, as_json: bool) -> None:
    """What the command does. Raises ExpectedError."""
    model, symbol = asked.model, asked.symbol
    if plot is not None:
        comparison_figures.check(plot)
    config = chosen.with_horizon(config, asked.horizon, [model])
    (series,), notes = read_series(config, [symbol])
    windows = comparing.windows_before_test(config, symbol, series.bars, count=asked.windows, stride=asked.stride)
    overrides, said = chosen.environment_overrides([model], os.environ)
    words = chosen.read_words([asked.start], lambda: open_storage(config))
    found = chosen.for_symbol(config, symbol, series.bars, [model], [asked.start], words, overrides)
    for note in (*notes, *said, *found.notes):
        say(note)
    if not found.rows:
        what = f"{symbol}: {asked.start!r} names no configuration of {model} in {config.hyperparams.dir}"
        raise ConfigError(f"{what}; promote one, or use --from {chosen.DEFAULT}")
    unsaid = {name: value for name, value in MODELS[model].by_default.items() if name in asked.axes}
    base = replace(found.rows[0], params={**unsaid, **found.rows[0].params})
    _check_that_something_varies(base, asked.axes)
    everyone = [base.params, *({**base.params, **values} for values in sweeping.combinations_of(asked.axes))]
    say(str(candidates.cost(model, everyone, windows=len(windows), passes=asked.passes)))
    job = _Job(settings=processes.settings_text(config), base=base, axes=asked.axes, windows=windows, asked=asked)
    with Processes(device_slots(None, None)[:1]) as here:
        ((_, result),) = here.run(_measure, [job])
    if plot is not None:
        sweep_figures.write(plot, result, symbol=symbol, model=model)
        say(f"figure in {plot}")
    if as_json:
        click.echo(json.dumps(to_json(result, base, asked, windows), indent=2))
    else:
        show(rows_of(result), lambda rows: table(result.names, rows), as_json=False)
    say(conclusion(result, base))


def _check_that_something_varies(base: ComparedConfiguration, axes: Mapping[str, Sequence[Any]]) -> None:
    """Raises ConfigError where a parameter has no effect beside any of the others' values."""
    model = MODELS[base.model]
    for name in axes:
        if name not in base.params:
            raise ConfigError(f"{name} has no effect where the objective is exact; set [search] objective to sampled")
        cells = [{**base.params, **values} for values in sweeping.combinations_of(axes)]
        if not any(model.counts(name, cell) for cell in cells):
            rule = model.conditions[name]
            raise ConfigError(
                f"{name} has no effect while {rule.param} is {base.params[rule.param]}; add {rule.param}={rule.value}"
            )


@dataclass(frozen=True, kw_only=True)
class _Job:
    settings: str
    base: ComparedConfiguration
    axes: Mapping[str, Sequence[Any]]
    windows: Windows
    asked: Asked


def _measure(job: _Job, device: str) -> Sweep:
    evaluator = processes.evaluator(job.settings, job.base.model, device)
    # As many as are asked for, and no more: the settings may let a search draw far more.
    evaluator.max_num_samples = sweeping.most_samples(job.base.model, job.base.params, job.axes) or 0
    passes = comparing.passes_of(evaluator, job.asked.passes)
    return sweeping.sweep(evaluator, job.windows, job.base.params, job.axes, passes=passes)


# --- what is shown ------------------------------------------------------------------------------------------


def rows_of(found: Sweep) -> list[SweptCell]:
    """All values in their order; of two parameters the lowest errors, lowest first, and the current values."""
    if len(found.names) == 1:
        return list(found.cells)
    ranked = sorted(found.cells, key=lambda one: one.measurement.mae)
    return [one for place, one in enumerate(ranked) if place < MOST_ROWS or one.current]


def table(names: Sequence[str], rows: Sequence[SweptCell]) -> Table:
    """One row a combination."""

    def verdict(one: SweptCell) -> str:
        return "current" if one.current else one.improvement.verdict if one.improvement else NOTHING

    intervals = [one.improvement.interval if one.improvement else None for one in rows]
    return Table(
        columns=[
            *(Column(heading=name, cells=[str(one.values[name]) for one in rows], priority=9) for name in names),
            numbers("MAE", [percent_error(one.measurement.mae) for one in rows], 8),
            numbers(
                "improvement", [percent_gain(one.improvement.value if one.improvement else None) for one in rows], 7
            ),
            numbers(
                "95 % interval", [percent_interval(*interval) if interval else NOTHING for interval in intervals], 6
            ),
            Column(heading="", cells=[verdict(one) for one in rows], priority=5),
            numbers("skill", [percent_gain(one.measurement.skill) for one in rows], 4),
            numbers("price MAE", [f"{one.measurement.price_mae:.6g}" for one in rows], 2),
            numbers("MAE%", [f"{one.measurement.mae_percent:.3f}" for one in rows], 1),
        ]
    )


def conclusion(found: Sweep, base: ComparedConfiguration) -> str:
    """What came of it, in one line."""
    best, what = found.best, counted(len(found.cells), "configuration")
    if len(found.names) > 1 and len(found.cells) > MOST_ROWS:
        what += f", of which the best {MOST_ROWS} are shown"
    if best.current:
        return f"lowest of {what}: the current one of {base.label}, {params_text(best.values)}"
    gain = percent_gain(best.improvement.value if best.improvement else None)
    current = params_text({name: found.base[name] for name in found.names})
    p = "" if found.p_value is None else f"; p-value over all of them: {found.p_value:.3f}"
    return f"lowest of {what}: {params_text(best.values)}, {gain} over {current} of {base.label}{p}"


def to_json(found: Sweep, base: ComparedConfiguration, asked: Asked, windows: Windows) -> dict[str, Any]:
    """All of it; errors and improvements are fractions."""
    return {
        "symbol": asked.symbol,
        "model": asked.model,
        "from": base.source,
        "params": dict(found.base),
        "windows": {**asdict(window_span(windows)), "horizon": asked.horizon, "stride": asked.stride},
        "passes": asked.passes,
        "current": _errors(found.current),
        "p_value": found.p_value,
        "cells": [
            {
                "values": dict(one.values),
                "params": dict(one.params),
                "current": one.current,
                **_errors(one.measurement),
                **_gain(one),
            }
            for one in found.cells
        ],
    }


def _gain(one: SweptCell) -> dict[str, Any]:
    gain = one.improvement
    low, high = gain.interval if gain and gain.interval else (None, None)
    return {
        "improvement": gain.value if gain else None,
        "improvement_low": low,
        "improvement_high": high,
        "verdict": gain.verdict if gain else None,
    }


def _errors(measured: Measurement) -> dict[str, Any]:
    """Without seconds and windows: all share their draws, and have the same windows."""
    return {name: value for name, value in measurement_json(measured).items() if name not in ("seconds", "windows")}
