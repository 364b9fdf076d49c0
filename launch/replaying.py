"""`studies replay`: measure what history needs, in processes, then play the rules through it.

What was measured is kept in files, so that an interrupted replay goes on and another rule costs nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from launch import processes
from launch.devices import DeviceSlot, device_slots
from launch.output import counted, say, show
from launch.processes import Processes
from launch.views import figures, report
from launch.views.tables import NOTHING, Column, Table, numbers, percent_gain, percent_interval, percent_share
from objectives.bars import DataError
from storage.commands import this_command
from studies import evaluators, history_errors, promoting, replay
from studies import space as spaces
from studies.config import Config
from studies.evidence import INCUMBENT, params_text
from studies.history_errors import Block, Candidate, History
from studies.in_use import configurations_in_use
from studies.replay import Play, ReplayPlan, RuleOutcome
from studies.series import Series, read_usable_series
from studies.space import random_params

RULES = ("pooled", "confirmation", "validation")
IN_USE = "in-use"
SAMPLE = 24  # configurations of a model that has no grid, drawn from its space with seed 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of the command say."""

    symbols: Sequence[str]
    models: Sequence[str]
    rules: Sequence[str]
    since: datetime | None
    dates: int
    every: int
    after: int
    sample: int
    start: str  # IN_USE: today's promoted files, where there are any


def checked_rules(names: Sequence[str]) -> Sequence[str]:
    """The rules of the option, by default all. Raises a usage error for an unknown one."""
    for name in names:
        if name not in RULES:
            raise click.BadParameter(f"{name!r}; the rules are {', '.join(RULES)}", param_hint="--rule")
    return names or RULES


def command(
    config: Config, asked: Asked, *, gpus: Sequence[int], cpus: int | None, report_path: Path | None, as_json: bool
) -> None:
    """What the command does. Raises ExpectedError."""
    slots = device_slots(gpus or None, cpus)
    series, skipped, notes = read_usable_series(config, asked.symbols)
    for note in (*notes, *(f"{symbol} skipped: {reason}" for symbol, reason in skipped.items())):
        say(note)
    try:
        plays = run(config, asked, series, slots)
    except KeyboardInterrupt:
        say(f"interrupted; what was measured is kept; go on with: {this_command()}")
        sys.exit(130)
    outcomes = replay.summarise(plays, overlap=asked.after / asked.every)
    if as_json:
        click.echo(
            json.dumps({"rules": [asdict(one) for one in outcomes], "plays": [asdict(one) for one in plays]}, indent=2)
        )
    else:
        show(outcomes, table, as_json=False)
    if report_path is not None:
        report.write(report_path, html(asked, plays, outcomes), option="--report")
        say(f"report in {report_path}")


def run(config: Config, asked: Asked, series: Sequence[Series], slots: Sequence[DeviceSlot]) -> list[Play]:
    """Measure what is missing and play. Raises DataError where no symbol has the bars, and what measuring raises."""
    since = None if asked.since is None else np.datetime64(asked.since, "ns")
    dates = replay.replay_dates(series, every=asked.every, after=asked.after, count=asked.dates, since=since)
    plan = ReplayPlan(
        dates=dates,
        after=asked.after,
        rules={name: promoting.rule_of(config, on=cast(Any, name)) for name in asked.rules},
        pool=config.promotion.pool,
        pool_days=config.promotion.pool_days,
    )
    works = list(_works(config, asked, series, plan))
    if not works:
        counts = config.windows
        needed = counts.min_context + counts.confirmation + counts.test + asked.after
        raise DataError(f"no symbol has the {needed} bars that one date of a replay needs; add older bars")
    _measure_all(config, works, slots)
    histories = [work.history() for work in works]
    say(f"{counted(len({history.symbol for history in histories}), 'symbol')}, {counted(len(dates), 'date')}")
    return replay.play(config, plan, histories)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be measured of one symbol and model."""

    series: Series
    model: str
    checkpoint: str
    origins: range
    min_context: int
    candidates: Sequence[Candidate]
    blocks: Sequence[Block]

    def history(self) -> History:
        return history_errors.join(
            self.series,
            self.origins,
            self.candidates,
            self.blocks,
            model=self.model,
            checkpoint=self.checkpoint,
            min_context=self.min_context,
        )


def _works(config: Config, asked: Asked, series: Sequence[Series], plan: ReplayPlan) -> Iterator[_Work]:
    checkpoints = {model: evaluators.checkpoint_fingerprint(config, model) for model in asked.models}
    folder = config.promotion.results_dir / "replay"
    for each in series:
        origins = replay.origins_of(config, each, plan)
        if not origins:
            say(f"{each.symbol}: has {len(each.bars)} bars, too few for any date; left out")
            continue
        for model in asked.models:
            space = spaces.make(model, config, each.bars)
            in_use, notes = (
                configurations_in_use(config, each.symbol, model, space) if asked.start == IN_USE else ({}, ())
            )
            for note in notes:
                say(note)
            sample = random_params(space, asked.sample)
            candidates = history_errors.candidates_of(config, space, sample, in_use.get(INCUMBENT))
            found = history_errors.blocks(
                config, each, origins, candidates, model=model, checkpoint=checkpoints[model], folder=folder
            )
            yield _Work(
                series=each,
                model=model,
                checkpoint=checkpoints[model],
                origins=origins,
                min_context=config.windows.min_context,
                candidates=candidates,
                blocks=found,
            )


def _measure_all(config: Config, works: Sequence[_Work], slots: Sequence[DeviceSlot]) -> None:
    """Measure the blocks that no file has, a process a slot; what is done stays when this is interrupted."""
    missing = [
        (work, block) for work in works for block in work.blocks if history_errors.read(block, work.candidates) is None
    ]
    total = sum(len(work.blocks) for work in works)
    if not missing:
        say(f"all {total} blocks of windows were measured before")
        return
    configurations = {work.model: len(work.candidates) for work in works}
    tried = ", ".join(f"{count} of {model}" for model, count in configurations.items())
    windows = sum(len(block.windows) for _, block in missing)
    say(f"{windows} windows to measure, in {len(missing)} of {total} blocks; configurations: {tried}")
    settings = processes.settings_text(config)
    jobs = [(settings, work.model, block, work.candidates) for work, block in missing]
    with Processes(slots) as pool:
        for _ in pool.run(_measure, jobs, sizes=[len(block.windows) for _, block in missing]):
            pass


def _measure(job: tuple[str, str, Block, Sequence[Candidate]], device: str) -> None:
    """In a process that keeps its evaluator."""
    settings, model, block, candidates = job
    evaluator = processes.evaluator(settings, model, device, together=history_errors.BLOCK)
    history_errors.measure(evaluator, block, candidates)


def table(outcomes: Sequence[RuleOutcome]) -> Table:
    """One row a rule."""

    def gain(value: float, interval: tuple[float, float]) -> str:
        return f"{percent_gain(value)} ({percent_interval(*interval)})"

    return Table(
        columns=[
            Column(heading="rule", cells=[one.rule for one in outcomes]),
            numbers("decisions", [str(one.decisions) for one in outcomes], 3),
            numbers("promoted", [percent_share(one.promoted) for one in outcomes], 9),
            numbers(
                "worse of those", [NOTHING if one.worse is None else percent_share(one.worse) for one in outcomes], 7
            ),
            numbers("realised a promotion", [percent_gain(one.realised) for one in outcomes], 4),
            numbers("realised a decision", [gain(one.a_decision, one.a_decision_interval) for one in outcomes], 10),
            numbers("over the start", [gain(one.over_start, one.over_start_interval) for one in outcomes], 8),
            numbers("over the default", [gain(one.over_default, one.over_default_interval) for one in outcomes], 6),
            numbers("skill", [percent_gain(one.skill) for one in outcomes], 5),
        ]
    )


def html(asked: Asked, plays: Sequence[Play], outcomes: Sequence[RuleOutcome]) -> str:
    """The page of --report: the table, the curves and every promotion."""
    promoted = [one for one in plays if one.promoted]
    return report.page(
        "replay.html.j2",
        title="Promotion rules replayed",
        subtitle=f"{counted(len({one.symbol for one in plays}), 'symbol')}, {', '.join(asked.models)}, "
        f"{counted(len({one.date for one in plays}), 'date')}; judged on the {asked.after} bars after each",
        outcomes=table(outcomes),
        curves=figures.replay_curves(outcomes),
        promotions=_promotions(promoted) if promoted else None,
    )


def _promotions(plays: Sequence[Play]) -> Table:
    return Table(
        columns=[
            Column(heading="date", cells=[one.date for one in plays]),
            Column(heading="symbol", cells=[one.symbol for one in plays]),
            Column(heading="rule", cells=[one.rule for one in plays]),
            Column(heading="model", cells=[one.model for one in plays]),
            Column(heading="configuration", cells=[params_text(one.params) for one in plays], code=True),
            Column(heading="improvement", cells=[percent_gain(one.improvement) for one in plays], right=True),
            Column(heading="realised", cells=[percent_gain(one.realised) for one in plays], right=True),
        ]
    )
