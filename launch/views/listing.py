"""What `studies list` and `studies show` print, read from the database; no model is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Group, RenderableType
from rich.text import Text

from launch.output import counted, say, show
from launch.views import tables
from launch.views.decisions import in_use_text
from launch.views.facts import (
    BEST_SHOWN,
    STAGES,
    StudyFacts,
    confirmation_table,
    front_table,
    front_title,
    gather,
    search_table,
)
from launch.views.tables import Column, Table, duration, numbers, percent_error, percent_gain, percent_share
from storage import configs, slots, study_rows
from storage.commands import command
from storage.configs import ConfigFileError
from storage.progress import Progress, first_parked_slots, pick_results, study_progress
from storage.retrying import RetryingStorage
from studies import importance
from studies import study as studying
from studies.evidence import ConfirmedSummary, params_text, read_summaries, relative_gain, to_json
from studies.promoted_file import InUse
from studies.study import Study

NO_WORK = "no work"  # the state of a study without a budget, such as a copy made with Optuna
UNCONFIRMED = ConfirmedSummary(mae=None, skill=None, incumbent_mae=None, incumbent_validation_mae=None)


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One study in a list of them. Improvements, over the incumbent, and skills are fractions.

    Plain numbers are of the search windows, confirmed ones of the confirmation windows; a best is never compared with
    an incumbent of other windows.
    """

    study: str
    symbol: str
    model: str
    as_of: str
    state: str  # "running", "parked", "finished", "skipped" or NO_WORK
    done: int
    budget: int
    parked: int
    parked_reason: str | None  # of the first parked slot, or why the symbol was skipped
    incumbent_mae: float | None = None
    best_mae: float | None = None
    improvement: float | None = None
    skill: float | None = None
    confirmed_incumbent_mae: float | None = None
    confirmed_mae: float | None = None  # the lowest among the confirmed candidates
    confirmed_improvement: float | None = None
    confirmed_skill: float | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which studies to list. Empty: all."""

    study_ids: Sequence[int] | None = None
    symbols: Sequence[str] = ()
    models: Sequence[str] = ()
    newest: bool = False  # of each symbol, model and strategy of returns only the study with the newest bars

    def of(self, studies: Sequence[Study]) -> list[Study]:
        """The studies to list, in the order given."""
        found = [
            study
            for study in studies
            if (self.study_ids is None or study.study_id in self.study_ids)
            and (not self.symbols or study.symbol in self.symbols)
            and (not self.models or study.model in self.models)
        ]
        if not self.newest:
            return found
        asked = sorted(found, key=lambda study: study.as_of)
        newest = {(study.symbol, study.model, study.pnl): study for study in asked}
        return [study for study in found if newest[study.symbol, study.model, study.pnl] is study]


def rows(storage: RetryingStorage, study_ids: Sequence[int] | None = None) -> list[StudyRow]:
    """Every study, or those named by id, sorted by name. Raises DatabaseUnavailable."""
    return rows_of(storage, Selection(study_ids=study_ids).of(studying.list_studies(storage)))


def rows_of(storage: RetryingStorage, studies: Sequence[Study]) -> list[StudyRow]:
    """A row for each of these studies, in six statements. Raises DatabaseUnavailable."""
    study_ids = [study.study_id for study in studies]
    progress = study_progress(storage, study_ids)
    best = study_rows.best_values(storage, study_ids)
    baselines = pick_results(storage, slots.BASELINE, {"mae": "$.validation.mae"}, study_ids, label="incumbent")
    summaries = read_summaries(storage, study_ids)
    reasons = first_parked_slots(storage, study_ids)
    found = []
    for study in studies:
        now = progress.get(study.study_id, _without_work(study))
        confirmed = summaries.get(study.study_id, UNCONFIRMED)
        measured = next(iter(baselines.get(study.study_id, {"mae": ()})["mae"]), None)
        incumbent = confirmed.incumbent_validation_mae or measured
        mae = best.get(study.study_id)
        no_change = study.definition.get("no_change_mae")
        parked = reasons.get(study.study_id)
        found.append(
            StudyRow(
                study=study.name,
                symbol=study.symbol,
                model=study.model,
                as_of=study.as_of,
                state=now.state if study.study_id in progress else NO_WORK,
                done=now.done,
                budget=now.budget,
                parked=now.parked,
                parked_reason=parked.error if parked else None,
                incumbent_mae=incumbent,
                best_mae=mae,
                improvement=relative_gain(incumbent, mae),
                skill=1 - mae / no_change if mae is not None and no_change else None,
                confirmed_incumbent_mae=confirmed.incumbent_mae,
                confirmed_mae=confirmed.mae,
                confirmed_improvement=relative_gain(confirmed.incumbent_mae, confirmed.mae),
                confirmed_skill=confirmed.skill,
            )
        )
    return found


def skipped_row(symbol: str, reason: str) -> StudyRow:
    """The row of a symbol that was left out of a run, with the reason."""
    return StudyRow(
        study=symbol,
        symbol=symbol,
        model="",
        as_of="",
        state="skipped",
        done=0,
        budget=0,
        parked=0,
        parked_reason=reason,
    )


def _without_work(study: Study) -> Progress:
    return Progress(study_id=study.study_id, budget=0, done=0, parked=0, open=0)


def table(rows: Sequence[StudyRow]) -> Table:
    """One row a study. Every heading says on which windows; confirmed numbers matter most, as the search flatters.

    Where there is no room, the best of a search goes together with its skill: it stands beside no other.
    """

    def state(row: StudyRow) -> str:
        return f"{row.state} ({row.parked} parked)" if row.parked and row.state != "parked" else row.state

    reasons = [" ".join((row.parked_reason or "").split()) for row in rows]
    short_names = [f"{row.symbol}/{row.model}".rstrip("/") for row in rows]
    if len(set(short_names)) < len(rows):  # they do not tell the studies apart
        short_names = []
    return Table(
        columns=[
            Column(heading="study", cells=[row.study for row in rows], short_cells=short_names),
            Column(heading="state", cells=[state(row) for row in rows], priority=9),
            numbers("trials", [f"{row.done}/{row.budget}" for row in rows], 8),
            numbers("search incumbent", [percent_error(row.incumbent_mae) for row in rows], 1),
            numbers("search best", [percent_error(row.best_mae) for row in rows], 4),
            numbers("search improvement", [percent_gain(row.improvement) for row in rows], 3),
            numbers("search skill", [percent_gain(row.skill) for row in rows], 4),
            numbers("confirmed incumbent", [percent_error(row.confirmed_incumbent_mae) for row in rows], 2),
            numbers("confirmed best", [percent_error(row.confirmed_mae) for row in rows], 5),
            numbers("confirmed improvement", [percent_gain(row.confirmed_improvement) for row in rows], 7),
            numbers("confirmed skill", [percent_gain(row.confirmed_skill) for row in rows], 6),
            *([Column(heading="reason", cells=reasons, wrap_width=30, code=True)] if any(reasons) else []),
        ]
    )


def print_rows(storage: RetryingStorage, selection: Selection, *, as_json: bool = False, plain: bool = False) -> None:
    """Print the selected studies. plain: without control characters, on a terminal too."""
    studies = studying.list_studies(storage)
    found = rows_of(storage, selection.of(studies))
    if found or as_json:
        show(found, table, as_json=as_json, plain=plain)
    elif studies:
        say(f"no such study; see: {command('studies list')}")
    else:
        say(f"no studies yet; create some with: {command('launch-workers')}")


# --- one study ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyDetails:
    """Everything that `studies show` says of a study."""

    row: StudyRow
    facts: StudyFacts
    importances: Mapping[str, float] | None  # shares of 1 by parameter
    importances_missing: str | None  # why there are none
    in_use: InUse | None  # what the symbol's file in `best` says of the decision that made it

    def to_json(self) -> dict[str, Any]:
        """The details as JSON values; the confirmation is printed as it is stored."""
        facts = self.facts
        return {
            **asdict(self.row),
            "trials": dict(facts.states),
            "best": [{"trial": one.number, "mae": one.values[0], "params": one.params} for one in facts.best],
            "front": [
                {"trial": one.number, "mae": one.values[0], "return": one.values[1], "params": one.params}
                for one in facts.front
            ],
            "baselines": dict(facts.baselines),
            "confirmation": to_json(facts.evidence, compact=False) if facts.evidence else None,
            "decision": facts.decision,
            "in_use": asdict(self.in_use) if self.in_use else None,
            "parked": [{"stage": one.stage, "slot": one.number, "error": one.error} for one in facts.parked],
            "seconds": dict(facts.seconds),
            "importances": self.importances,
            "importances_missing": self.importances_missing,
            "definition": dict(facts.study.definition),
        }


def details(storage: RetryingStorage, name: str, hyperparams: Path) -> StudyDetails | None:
    """Everything about the study of this name, retired or not; None where there is none.

    hyperparams: the folder of the promoted files. Raises DatabaseUnavailable.
    """
    studies = studying.list_studies(storage, retired=studying.ASIDE in name)
    study = next((study for study in studies if study.name == name), None)
    if study is None:
        return None
    (row,) = rows_of(storage, [study])
    importances, missing = importance.importances(storage, name)
    progress = study_progress(storage, [study.study_id]).get(study.study_id, _without_work(study))
    facts = gather(storage, study, progress)
    record = None
    with contextlib.suppress(ConfigFileError):  # promote says what is wrong with the file
        record = configs.read(hyperparams, "best", study.symbol)
    return StudyDetails(
        row=row,
        facts=facts,
        importances=importances,
        importances_missing=missing,
        in_use=InUse.of(record) if record else None,
    )


def render(found: StudyDetails, width: int) -> RenderableType:
    """The details for a terminal, in lines of at most `width` cells where words allow."""
    facts, definition = found.facts, found.facts.study.definition
    trials = ", ".join(f"{count} {state}" for state, count in facts.states.items()) or "none"
    parts: list[RenderableType] = [
        Text(f"{found.row.study}  {found.row.state}  {found.row.done}/{found.row.budget} trials ({trials})"),
        *_section(f"search windows, best {BEST_SHOWN} trials", _without_configurations(search_table(facts), width)),
    ]
    if facts.front:
        parts += _section(front_title(facts), _without_configurations(front_table(facts), width))
    if confirmed := facts.evidence:
        count, test = confirmed.windows["confirmation"].count, confirmed.windows["test"].count
        heading = f"confirmation: {count} windows, {test} test windows, {counted(confirmed.passes, 'pass')}"
        parts += _section(heading, _without_configurations(confirmation_table(confirmed), width))
    if facts.decision:
        parts += _section("decision", Text(facts.decision))
    if found.in_use and (said := in_use_text(found.in_use)):
        parts += _section("in use", Text(said))
    parts += _section("configurations", _configurations(facts))
    parts += _section("worker time by stage", _seconds(facts.seconds, width))
    shares = found.importances
    importances = Text(found.importances_missing or "") if shares is None else _shares(shares, width)
    parts += _section("parameter importance", importances)
    if facts.parked:
        lines = [Text(f"{STAGES[one.stage]}, slot {one.number}: {one.error}") for one in facts.parked]
        parts += _section("parked work", Group(*lines))
    parts.append(Text())
    parts += [Text(f"{key:<10} {definition[key]}") for key in ("bars", "checkpoint")]
    parts.append(Text(f"{'windows':<10} {params_text(definition['windows'])}"))
    return Group(*parts)


def _section(heading: str, body: RenderableType) -> list[RenderableType]:
    return [Text(), Text(heading, style="bold"), body]


def _without_configurations(table: Table, width: int) -> rich.table.Table:
    return tables.terminal(replace(table, columns=table.columns[:-1]), width)


def _configurations(facts: StudyFacts) -> RenderableType:
    """Parameters that wrap beside the name of their configuration, and what could not be measured."""
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, params in facts.configurations.items():
        grid.add_row(Text(name), Text(params_text(params)))
    in_use = facts.evidence.in_use if facts.evidence else {}
    return Group(grid, *(Text(f"{label}: {one.error}") for label, one in in_use.items() if one.error))


def _seconds(seconds: Mapping[str, float], width: int) -> RenderableType:
    total = sum(seconds.values())
    if not total:
        return Text("none recorded yet")
    seconds = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return _shares({name: value / total for name, value in seconds.items()}, width, times=seconds.values())


def _shares(shares: Mapping[str, float], width: int, *, times: Iterable[float] = ()) -> rich.table.Table:
    columns = [Column(heading="", cells=list(shares))]
    if spent := [duration(seconds) for seconds in times]:
        columns.append(numbers("time", spent))
    columns.append(numbers("share", [percent_share(one) for one in shares.values()]))
    return tables.terminal(Table(columns=columns), width)
