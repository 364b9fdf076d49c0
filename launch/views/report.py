"""What a run brought, as one HTML page that needs no network and as Markdown: each symbol's and model's newest study.

Reads the database and the promoted files; decides nothing and writes no study. The page is report.html.j2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from launch.output import counted
from launch.views import decisions, figures, listing, monitor, notes, tables
from launch.views.facts import STAGES, StudyFacts, confirmation_table, gather
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    duration,
    numbers,
    percent_gain,
    percent_interval,
    percent_share,
)
from storage import configs
from storage.configs import ConfigFileError, Record
from storage.files import replace_file
from storage.outcomes import newest_events
from storage.progress import study_progress
from storage.retrying import RetryingStorage
from studies import importance, promoting
from studies import study as studying
from studies.config import Config, ConfigError
from studies.evidence import params_text
from studies.promoted_file import InUse
from studies.promoting import SymbolDecision

EXPLANATIONS = (
    "MAE: mean |forecast - close| in per cent of the last close before the window. Improvement: relative to the "
    "incumbent, the configuration in use, on the same windows, given what the configurations gain at the pooled "
    "symbols; own improvement: at this symbol alone. p: chance that the improvement is not above 0. Of a first "
    'promotion, interval and p are those of the improvement over "no change"; of an unchanged configuration, all are '
    "those of the decision that put it in use.",
    "Skill: 1 - MAE / MAE of predicting no change; below zero the forecast is worse than that. Decisions rest on the "
    "confirmation windows, measured with fresh seeds. On the search windows the best trial looks better than it is, "
    "as it was selected there. Test windows never select.",
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One study."""

    name: str
    summary: str
    decision: str
    confirmed: Table | None
    figures: Sequence[go.Figure]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that both forms say; tables without a row are None."""

    title: str
    subtitle: str
    decisions: Table
    in_use: Table | None
    watched: Table | None
    improvements: go.Figure | None
    overview: Table
    parked: Table | None
    studies: Sequence[Section]
    footer: str


def make(
    storage: RetryingStorage, config: Config, *, symbols: Sequence[str], models: Sequence[str], now: float | None = None
) -> Report:
    """Gather a report on the newest studies; no symbols: every one that has a study.

    Raises NothingToPromote where there is no study.
    """
    rule = promoting.rule_of(config)
    rows = promoting.promote(storage, config, rule, symbols=symbols, models=models, dry_run=True)
    names = {pair.study for row in rows for pair in row.pairs}
    shown = [study for study in studying.list_studies(storage) if study.name in names]
    progress = study_progress(storage, [study.study_id for study in shown])
    found = [gather(storage, study, progress[study.study_id]) for study in shown]
    seconds = sum(sum(facts.seconds.values()) for facts in found)
    done, budget = (sum(getattr(facts.progress, key) for facts in found) for key in ("done", "budget"))
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return Report(
        title="Forecast studies",
        subtitle=f"{made}: {counted(len(rows), 'symbol')}, {counted(len(found), 'study')}, {done} of {budget} trials"
        + (f", {duration(seconds)} of worker time" if seconds else ""),
        decisions=_decisions(rows),
        in_use=_in_use(config, [row.symbol for row in rows]),
        watched=_watched(storage, [row.symbol for row in rows]),
        improvements=figures.improvements(rows),
        overview=listing.table(listing.rows(storage, [facts.study.study_id for facts in found])),
        parked=_parked(found),
        studies=[_section(storage, facts) for facts in found],
        footer=f"forecast-studies {importlib.metadata.version('forecast-studies')}, "
        f"Optuna {importlib.metadata.version('optuna')}; promotion requires an improvement of more than "
        f"{percent_share(rule.min_improvement)}.",
    )


def _decisions(rows: Sequence[SymbolDecision]) -> Table:
    """The table of `promote --dry-run`, with the commands that lead to another decision."""
    table = decisions.table(rows, dry_run=True)
    steps = Column(heading="next step", cells=[row.next or NOTHING for row in rows], code=True)
    return table if steps.is_empty else replace(table, columns=[*table.columns, steps])


def _in_use(config: Config, symbols: Sequence[str]) -> Table | None:
    """The promoted files of `best`, and why they were promoted."""
    records: dict[str, Record | None] = {}
    for symbol in symbols:
        with contextlib.suppress(ConfigFileError):  # it is the reason that the decisions give
            records[symbol] = configs.read(config.hyperparams.dir, "best", symbol)
    known = {symbol: record for symbol, record in records.items() if record is not None}
    if not known:
        return None
    found = [InUse.of(record) for record in known.values()]
    trials = ["" if one.trial is None else f", trial {one.trial}" for one in found]
    pooled = [str(one.pooled_symbols) if one.pooled_symbols else NOTHING for one in found]
    before = [
        f"{one.previous_model} {params_text(one.previous_config)}" if one.previous_config else "" for one in found
    ]
    return Table(
        columns=[
            Column(heading="symbol", cells=list(known)),
            Column(heading="model", cells=[record.model for record in known.values()]),
            Column(heading="configuration", cells=[params_text(one.config) for one in known.values()], code=True),
            Column(
                heading="study",
                cells=[f"{one.study or NOTHING}{trial}" for one, trial in zip(found, trials, strict=True)],
            ),
            Column(heading="promoted at", cells=[one.promoted_at or NOTHING for one in found]),
            Column(heading="reason", cells=[decisions.in_use_reason(one) for one in found]),
            numbers("improvement", [percent_gain(one.improvement) for one in found]),
            numbers("95 % interval", [percent_interval(one.improvement_low, one.improvement_high) for one in found]),
            numbers("own improvement", [percent_gain(one.improvement_own) for one in found]),
            numbers("symbols pooled", pooled),
            numbers("skill", [percent_gain(one.skill) for one in found]),
            Column(heading="before it", cells=[one or NOTHING for one in before], code=True),
        ]
    )


def _watched(storage: RetryingStorage, symbols: Sequence[str]) -> Table | None:
    """What `studies monitor` found last."""
    found = [one for one in monitor.kept(newest_events(storage, monitor.MONITORED)) if one.symbol in symbols]
    return monitor.summary_table(found) if found else None


def _parked(found: Sequence[StudyFacts]) -> Table | None:
    items = [(facts.study.name, item) for facts in found for item in facts.parked]
    if not items:
        return None
    return Table(
        columns=[
            Column(heading="study", cells=[name for name, _ in items]),
            Column(heading="work", cells=[f"{STAGES[item.stage]} {item.number}" for _, item in items]),
            Column(heading="error", cells=[" ".join(item.error.split()) for _, item in items]),
        ]
    )


def _section(storage: RetryingStorage, facts: StudyFacts) -> Section:
    importances, missing = importance.importances(storage, facts.study.name)
    drawn = [*notes.plots(facts).values(), figures.importances(importances or {})]
    decision = facts.decision or f"No decision yet; next step: {facts.next_command}"
    return Section(
        name=facts.study.name,
        summary=facts.progress_text + (f"; parameter importance: {missing}" if missing else ""),
        decision=decision + (f". Worker time: {facts.time_text}" if facts.time_text else ""),
        confirmed=confirmation_table(facts.evidence) if facts.evidence else None,
        figures=[figure for figure in drawn if figure is not None],
    )


def write(path: Path, content: str, *, option: str = "--output or --markdown") -> None:
    """Replace a file whole, where a link leads too; a device or a pipe is written to. Raises ConfigError.

    option: which names the file.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(content)
        else:
            replace_file(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another file with {option}") from None


# --- the two forms --------------------------------------------------------------------------------------------


def html(report: Report) -> str:
    """The page, with Plotly's script in it: about 5 MB."""
    return page(
        "report.html.j2",
        title=report.title,
        subtitle=report.subtitle,
        report=report,
        explanations=EXPLANATIONS,
        to_be_promoted=decisions.TO_BE_PROMOTED,
        since_promotion=(monitor.TITLE, monitor.EXPLANATIONS),
    )


def page(template: str, **values: Any) -> str:
    """A page that opens from disk without a network, of a template beside this module."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["figure"] = _embedded
    return environment.get_template(template).render(plotly=Markup(get_plotlyjs()), nothing=NOTHING, **values)


def _embedded(figure: go.Figure) -> Markup:
    """The figure as JSON for a script element: nothing in it ends the element or opens a comment."""
    content = str(figure.to_json())
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return Markup(content)


def markdown(report: Report) -> str:
    """The same as Markdown, without figures."""
    parts = [f"# {report.title}", report.subtitle, "## Decisions", tables.markdown(report.decisions), *EXPLANATIONS]
    if report.in_use:
        parts += ["## Configuration in use", tables.markdown(report.in_use)]
    if report.watched:
        parts += [f"## {monitor.TITLE}", tables.markdown(report.watched), *monitor.EXPLANATIONS]
    parts += ["## Studies", tables.markdown(report.overview)]
    if report.parked:
        parts += ["## Parked work", tables.markdown(report.parked)]
    for study in report.studies:
        parts += [f"## {study.name}", f"{study.summary}. {study.decision}"]
        if study.confirmed:
            parts.append(tables.markdown(study.confirmed))
    return "\n\n".join([*parts, report.footer]) + "\n"
