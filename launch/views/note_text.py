"""The note of a study in optuna-dashboard, as Markdown. Pure: what it says is in the facts."""

from __future__ import annotations

from collections.abc import Mapping

from launch.output import counted
from launch.views.facts import STAGES, StudyFacts, confirmation_table, search_table
from launch.views.tables import Column, Table, literal, markdown, percent_share
from storage.board import Image
from storage.commands import command
from studies.evidence import Part

PARKED_SHOWN = 5
FORECAST = "Forecast vs. actual"
WINDOW_NAMES: dict[Part, str] = {"validation": "search", "confirmation": "confirmation", "test": "test"}


def note(facts: StudyFacts, image: Image | None = None) -> str:
    """The whole note. image: of the forecasts."""
    study = facts.study
    parts = [
        f"# {study.symbol} with {study.model}, bars up to {study.as_of}",
        _overview(facts),
        "## Search",
        markdown(search_table(facts), spaced=True),
        "## Confirmation",
        _confirmation(facts),
        "## Decision",
        facts.decision or ("None yet." if facts.evidence else "The confirmation comes first."),
        "## Next step",
        f"`{facts.next_command}`",
    ]
    if facts.parked:
        parts += ["## Parked work", _parked(facts)]
    if image is not None:
        parts += [f"## {FORECAST}", f"![{FORECAST}]({image.path(study.study_id)})"]
    parts.append("*This note is rewritten automatically: keep your own remarks in the notes of trials.*")
    return "\n\n".join(parts) + "\n"


def _overview(facts: StudyFacts) -> str:
    definition = facts.study.definition
    rows = {
        "State": f"{facts.progress.state}: {facts.progress_text}",
        "Forecast horizon": counted(definition["windows"]["horizon"], "bar"),
        "Objective": f"{definition['metric']}, {definition['objective']}: "
        "mean |forecast - close| in per cent of the last close before the window",
        "Windows": _windows(facts),
        "Checkpoint": literal(str(definition["checkpoint"])[:16]),
    }
    if facts.time_text:
        rows["Worker time"] = facts.time_text
    return _two_columns(rows)


def _two_columns(rows: Mapping[str, str]) -> str:
    columns = [Column(heading="", cells=list(rows)), Column(heading="", cells=list(rows.values()))]
    return markdown(Table(columns=columns), spaced=True)


def _windows(facts: StudyFacts) -> str:
    if facts.evidence is None:
        counts = facts.study.definition["windows"]
        return f"{counts['validation']} search, {counts['test']} test"
    return "; ".join(
        f"{span.count} {name} ({span.first} to {span.last})"
        for part, name in WINDOW_NAMES.items()
        if (span := facts.evidence.windows[part])
    )


def _confirmation(facts: StudyFacts) -> str:
    found = facts.evidence
    if found is None:
        return (
            "It follows when the budget is spent: the best trials and the configurations in use are measured on more "
            "windows, with fresh seeds."
        )
    told = f"Means of {counted(found.passes, 'pass')} with fresh seeds"
    if found.sampling_error:
        told += f"; sampling leaves a relative standard error of {percent_share(found.sampling_error, 2)}"
    return f"{told}.\n\n" + markdown(confirmation_table(found), spaced=True)


def _parked(facts: StudyFacts) -> str:
    lines = [f"- {STAGES[item.stage]}, slot {item.number}: {literal(item.error)}" for item in facts.parked]
    if (more := len(lines) - PARKED_SHOWN) > 0:
        lines[PARKED_SHOWN:] = [f"- and {more} more; see `{command(f'studies show {facts.study.name}')}`"]
    return "\n".join(lines)
