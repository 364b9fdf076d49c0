"""What a run brought, as one HTML page that needs no network and as Markdown: each symbol's and model's newest study.

Reads the database and the promoted files; decides nothing and writes no study. The page is report.html.j2.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from launch.output import counted
from launch.views import figures, notes
from launch.views.notes import CONFIRMED_HEAD, Facts, gain_text, mae_text, share_text
from launch.views.tables import assigned
from storage import configs
from storage.database import RetryingStorage
from storage.progress import study_progress
from studies import importance, promoting
from studies import study as studying
from studies.config import Config, ConfigError
from studies.promoting import Rule, SymbolDecision

EXPLANATIONS = (
    "error: mean |forecast - close| in per cent of the last close before the window. improvement: over the incumbent, "
    "the configuration in use, on the same windows. interval: 95 %. p: chance of so large a gain if none were better.",
    "skill: 1 - error / error of predicting no change; below zero the forecast is worse than that. Decisions rest on "
    "the confirmation windows, measured with fresh seeds; the windows of the search flatter; test never selects.",
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()  # columns that are flush right


@dataclass(frozen=True, kw_only=True)
class Section:
    """One study."""

    name: str
    glance: str
    decision: str
    confirmed: Table
    figures: Sequence[go.Figure]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that both forms say."""

    title: str
    subtitle: str
    decisions: Table
    in_use: Table
    improvements: go.Figure | None
    overview: Table
    failures: Table
    studies: Sequence[Section]
    footer: str


def make(
    storage: RetryingStorage, config: Config, *, symbols: Sequence[str], models: Sequence[str], now: float | None = None
) -> Report:
    """Gather a report on the newest studies; no symbols: every one that has a study.

    Raises NothingToPromote where there is no study, ConfigFileError for an unreadable promoted file.
    """
    rule = Rule(min_improvement=config.promotion.min_improvement)
    rows = promoting.promote(storage, config, rule, symbols=symbols, models=models, dry_run=True)
    names = {pair.study for row in rows for pair in row.pairs}
    progress = study_progress(storage)
    found = [
        notes.gather(storage, study, progress[study.study_id])
        for study in studying.list_studies(storage)
        if study.name in names
    ]
    seconds = sum(sum(facts.seconds.values()) for facts in found)
    done, budget = (sum(getattr(facts.progress, key) for facts in found) for key in ("done", "budget"))
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return Report(
        title="Forecast studies",
        subtitle=f"{made}: {counted(len(rows), 'symbol')}, {counted(len(found), 'study')}, {done} of {budget} trials"
        + (f", {notes.duration_text(seconds)} of workers' time" if seconds else ""),
        decisions=_decisions(rows),
        in_use=_in_use(config, [row.symbol for row in rows]),
        improvements=figures.improvements([asdict(row) for row in rows]),
        overview=_overview(found),
        failures=_failures(found),
        studies=[_section(storage, facts) for facts in found],
        footer=f"forecast-studies {importlib.metadata.version('forecast-studies')}, "
        f"Optuna {importlib.metadata.version('optuna')}; promotion asks for an improvement of more than "
        f"{share_text(rule.min_improvement, sign=False)}.",
    )


def _decisions(rows: Sequence[SymbolDecision]) -> Table:
    head = ("symbol", "study", "incumbent", "best", "improvement", "interval", "p", "on search", "on test", "skill",
            "decision", "reason")  # fmt: skip
    cells = [
        (
            row.symbol,
            row.study,
            _known(row.incumbent_mae, mae_text),
            _known(row.best_mae, mae_text),
            _known(row.improvement, share_text),
            notes.interval_text(row),
            _known(row.p_value, lambda value: f"{value:.3f}"),
            _known(row.improvement_validation, share_text),
            _known(row.improvement_test, share_text),
            _known(row.skill, share_text),
            {"promoted": "to be promoted"}.get(row.decision, row.decision),
            row.reason + (f"; {row.next}" if row.next else ""),
        )
        for row in rows
    ]
    return Table(head=head, rows=cells, numbers=range(2, 10))


def _known(value: Any, text: Any) -> str:
    return "" if value is None else text(value)


def _in_use(config: Config, symbols: Sequence[str]) -> Table:
    """The promoted files, and why they were."""
    rows = []
    for symbol in symbols:
        record = configs.read(config.hyperparams.dir, "best", symbol)
        if record is None:
            continue
        known = record.metadata
        gain, interval = known.get("improvement"), known.get("improvement_interval")
        why = str(known.get("reason", ""))
        if isinstance(gain, float):
            why += f", improvement {share_text(gain)}"
        if isinstance(interval, Sequence) and len(interval) == 2:
            why += f" ({share_text(interval[0])} to {share_text(interval[1])})"
        trial = f" trial {known['trial']}" if "trial" in known else ""
        rows.append(
            (
                symbol,
                record.model,
                assigned(record.config),
                f"{known.get('study', '')}{trial}",
                str(known.get("promoted_at", "")),
                why,
            )
        )
    return Table(head=("symbol", "model", "configuration", "from", "promoted", "why"), rows=rows)


def _overview(found: Sequence[Facts]) -> Table:
    head = ("study", "state", "trials", "best", "incumbent", "improvement", "skill", "confirmed skill", "time")
    rows = []
    for facts in found:
        best = facts.best_trial
        mae = None if best is None else facts.values[best]
        no_change = facts.study.definition.get("no_change_mae")
        confirmed = figures.best_candidate(facts.result)
        rows.append(
            (
                facts.study.name,
                facts.progress.state,
                notes.progress_text(facts),
                _known(mae, mae_text),
                _known(facts.incumbent_mae, mae_text),
                "" if mae is None else gain_text(mae, facts.incumbent_mae),
                "" if mae is None else gain_text(mae, no_change),
                "" if confirmed is None else share_text(confirmed["confirmation"]["skill"]),
                notes.duration_text(sum(facts.seconds.values())) if facts.seconds else "",
            )
        )
    return Table(head=head, rows=rows, numbers=range(3, 9))


def _failures(found: Sequence[Facts]) -> Table:
    rows = [
        (facts.study.name, f"{notes.STAGES[item.stage]} {item.number}", " ".join(item.error.split()))
        for facts in found
        for item in facts.parked
    ]
    return Table(head=("study", "what", "why"), rows=rows)


def _section(storage: RetryingStorage, facts: Facts) -> Section:
    shares, too_few = importance.importances(storage, facts.study.name)
    drawn = [*notes.plots(facts).values(), figures.importances(shares or {})]
    decision = facts.decision or f"No decision yet; go on with: {notes.next_command(facts)}"
    if time_spent := notes.time_text(facts.seconds):
        decision += f". Time of workers: {time_spent}"
    return Section(
        name=facts.study.name,
        glance=notes.progress_text(facts) + (f"; importances: {too_few}" if too_few else ""),
        decision=decision,
        confirmed=Table(
            head=CONFIRMED_HEAD, rows=notes.confirmed_rows(facts.result) if facts.result else (), numbers=range(1, 5)
        ),
        figures=[figure for figure in drawn if figure is not None],
    )


def write(path: Path, content: str) -> None:
    """Replace a file whole. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another file with --output or --markdown") from None


# --- the two forms --------------------------------------------------------------------------------------------


def html(report: Report) -> str:
    """The page, with Plotly's script in it: about 5 MB."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["figure"] = _embedded
    template = environment.get_template("report.html.j2")
    return template.render(report=report, explanations=EXPLANATIONS, plotly=Markup(get_plotlyjs()))


def _embedded(figure: go.Figure) -> Markup:
    """JSON that may stand in a script element: nothing in it ends the element or opens a comment."""
    content = str(figure.to_json())
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return Markup(content)


def markdown(report: Report) -> str:
    """The same without figures."""
    parts = [f"# {report.title}", report.subtitle, "## Decisions", _markdown_table(report.decisions), *EXPLANATIONS]
    if report.in_use.rows:
        parts += ["## In use", _markdown_table(report.in_use)]
    parts += ["## Studies", _markdown_table(report.overview)]
    if report.failures.rows:
        parts += ["## Given up", _markdown_table(report.failures)]
    for study in report.studies:
        parts += [f"## {study.name}", f"{study.glance}. {study.decision}"]
        if study.confirmed.rows:
            parts.append(_markdown_table(study.confirmed))
    return "\n\n".join([*parts, report.footer]) + "\n"


def _markdown_table(table: Table) -> str:
    rules = ["---:" if column in table.numbers else "---" for column in range(len(table.head))]
    rows = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (table.head, rules, *rows))
