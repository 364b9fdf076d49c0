"""Keep what optuna-dashboard shows of studies up to date: note, figures, image and attributes.

Written by the supervisor as a run goes and by `promote`, never by a worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.output import SayOnce, counted
from launch.views import decisions, monitor
from launch.views.facts import (
    CONFIRMATION,
    DECISION,
    STAGES,
    UNDECIDED,
    StudyFacts,
    confirmation_table,
    front_table,
    front_title,
    gather,
    search_table,
)
from launch.views.tables import Column, Table, literal, markdown, percent_error, percent_gain, percent_share
from storage import DatabaseUnavailable, board
from storage.board import Image
from storage.commands import command
from storage.outcomes import newest_events
from storage.progress import Progress, confirmed, study_progress
from storage.retrying import RetryingStorage, one_line
from studies.evidence import Part
from studies.monitoring import Monitored
from studies.promoting import SymbolDecision
from studies.study import Study, list_studies

EVERY_S = 30.0  # between two updates during a run; the first imports plotly and matplotlib, a second of CPU
SHARE = 0.01  # of the time, at most, that updates may take
FINISHED_EVERY_S = 5.0  # those of studies that are finished come at once: once the workers have ended, the user waits
PARKED_SHOWN = 5
FORECAST = "Forecast vs. actual"
WINDOW_NAMES: dict[Part, str] = {"validation": "search", "confirmation": "confirmation", "test": "test"}


class NoteWriter:
    """Calls `report`, and from time to time rewrites the notes of the studies that moved.

    say: takes one line for the user if images cannot be kept. log: gets the traceback of an error that nobody expects.
    """

    def __init__(
        self,
        storage: RetryingStorage,
        folder: Path,
        studies: Sequence[Study],
        *,
        report: Callable[[], None],
        say: Callable[[str], None],
        log: Path,
    ) -> None:
        self._storage, self._folder, self._studies = storage, folder, studies
        self._report, self.say = report, say
        self._say_once = SayOnce(lambda line: self.say(line), log)
        self._written: dict[int, Progress] = {}
        self._next, self._next_finished = time.monotonic() + EVERY_S, time.monotonic() + FINISHED_EVERY_S
        self._complained = False

    def __call__(self) -> None:
        self._report()
        began = time.monotonic()
        if began >= self._next:
            try:
                self.write()
            finally:
                took = time.monotonic() - began
                self._next = began + max(EVERY_S, took / SHARE)
        elif began >= self._next_finished:
            well = False
            try:
                well = self.write(finished=True)
            finally:
                now = time.monotonic()  # what failed is tried again with every failure: that is bounded as above
                self._next_finished = now + (FINISHED_EVERY_S if well else max(EVERY_S, (now - began) / SHARE))

    def write(self, *, finished: bool = False) -> bool:
        """Rewrite the notes of the studies that moved since the last time; False where that failed.

        finished: of those only that are confirmed and have no note of it yet.
        An error is said once, not with every attempt, and costs no more than the notes. Raises DatabaseUnavailable.
        """
        try:
            self._write(finished=finished)
            self._say_once.well()
            return True
        except DatabaseUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - notes are the least of a run
            self._say_once.error(f"the dashboard's notes are not up to date: {one_line(error)}", error)
            return False

    def _write(self, *, finished: bool) -> None:
        ids = [study.study_id for study in self._studies]
        if finished:
            noted = {study_id for study_id, written in self._written.items() if not written.open}
            ids = [study_id for study_id in confirmed(self._storage, ids) if study_id not in noted]
        progress = study_progress(self._storage, ids)
        moved = [
            study
            for study in self._studies
            if (now := progress.get(study.study_id)) and now != self._written.get(study.study_id)
            if now.done or now.parked or not now.open  # it has begun
        ]
        try:
            update(self._storage, self._folder, moved)
        except OSError as error:
            if not self._complained:
                self.say(_image_failure(self._folder, error))
            self._complained = True
        self._written |= {study.study_id: progress[study.study_id] for study in moved}


def record_decisions(
    storage: RetryingStorage, folder: Path, rows: Sequence[SymbolDecision], *, say: Callable[[str], None]
) -> None:
    """Put what a promotion decided into the notes of the studies that it looked at."""
    names = {pair.study for row in rows for pair in row.pairs}
    try:
        update(storage, folder, [study for study in list_studies(storage) if study.name in names], rows=rows)
    except OSError as error:
        say(_image_failure(folder, error))


def record_monitored(
    storage: RetryingStorage, folder: Path, rows: Sequence[Monitored], *, say: Callable[[str], None]
) -> None:
    """Put what `studies monitor` found into the notes of the studies whose configurations are in use."""
    names = {row.study for row in rows}
    try:
        update(storage, folder, [study for study in list_studies(storage) if study.name in names])
    except OSError as error:
        say(_image_failure(folder, error))


def _image_failure(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot keep images for the dashboard: {error.strerror}; set [storage] artifacts_dir"


def update(
    storage: RetryingStorage, folder: Path, studies: Sequence[Study], *, rows: Sequence[SymbolDecision] | None = None
) -> None:
    """Rewrite what the dashboard shows of studies.

    folder: where images are kept. rows: what a promotion decided; without them the last decision stays, as long as it
    was made on the same confirmation.
    Raises OSError if an image cannot be kept, after everything else was written.
    """
    failure: OSError | None = None
    decided = decisions.by_study(rows or ())
    progress = study_progress(storage, [study.study_id for study in studies])
    watched = {one.study: one for one in monitor.kept(newest_events(storage, monitor.MONITORED))} if studies else {}
    for study in studies:
        if study.study_id not in progress:
            continue
        facts = gather(storage, study, progress[study.study_id], decision=decided.get(study.name))
        image = None
        try:
            image = _image(folder, facts)
        except OSError as error:
            failure = error
        board.put(
            storage,
            study.study_id,
            note=note(facts, image, watched.get(study.name)),
            plots=plots(facts),
            attributes=_attributes(facts),
            image=image,
            folder=folder,
        )
    if failure is not None:
        raise failure


def _image(folder: Path, facts: StudyFacts) -> Image | None:
    """The forecast's PNG, drawn unless the folder has the one of this confirmation. Raises OSError."""
    from launch.views import figures  # late, as below: it imports Plotly, which takes a while

    if figures.forecast_chart(facts.evidence) is None:
        return None
    title = f"{facts.study.name}: {FORECAST.lower()}"
    key = json.dumps([title, facts.confirmation_id])
    name = f"{facts.study.name.replace('/', '-')}-forecast.png"
    return board.keep_image(folder, name, key, lambda: figures.forecast_image(facts.evidence, title=title) or b"")


def plots(facts: StudyFacts) -> dict[str, Any]:
    """The study's figures by id, without those that have nothing to show."""
    from launch.views import figures

    drawn = {
        "forecast": figures.forecast(facts.evidence),
        "error-by-window": figures.error_by_window(facts.evidence),
        "best-so-far": figures.best_so_far(facts.values, incumbent=facts.incumbent_mae, no_change=facts.no_change_mae),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _attributes(facts: StudyFacts) -> dict[str, str | None]:
    """A summary of the study, for the dashboard's page that does not show its note."""
    searched = confirmed = None
    if facts.best:
        searched = f"MAE {percent_error(facts.best[0].values[0])}, trial {facts.best[0].number}"
        if (incumbent := facts.incumbent_mae) is not None:
            searched += f"; incumbent {percent_error(incumbent)}"
    best = facts.evidence.best if facts.evidence else None
    if facts.evidence and best and best.confirmation:
        confirmed = f"skill {percent_gain(best.confirmation.skill)}"
        if (improvement := facts.evidence.improvement) is not None:
            confirmed += f", own improvement {percent_gain(improvement)}"
    # The page has five rows, of which the definition takes the first.
    return {
        "progress": facts.progress_text,
        "search": searched,
        "confirmed": confirmed,
        DECISION: (facts.decision or UNDECIDED) if facts.evidence else None,
        CONFIRMATION: facts.confirmation_id,
    }


# --- the text -------------------------------------------------------------------------------------------------


def note(facts: StudyFacts, image: Image | None = None, watched: Monitored | None = None) -> str:
    """The whole note. image: of the forecasts. watched: how the study's configuration did since its promotion."""
    study = facts.study
    parts = [
        f"# {study.symbol} with {study.model}, bars up to {study.as_of}",
        _overview(facts),
        "## Search",
        markdown(search_table(facts), spaced=True),
        *([f"## {front_title(facts)}", markdown(front_table(facts), spaced=True)] if facts.front else []),
        "## Confirmation",
        _confirmation(facts),
        "## Decision",
        _decision(facts),
        "## Next step",
        f"`{facts.next_command}`",
    ]
    if facts.parked:
        parts += ["## Parked work", _parked(facts)]
    if watched is not None:
        parts += [f"## {monitor.TITLE}", _watched(watched)]
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
        f"mean |forecast - {facts.study.key}| in per cent of the last close before the window",
        "Windows": _windows(facts),
        "Checkpoint": literal(str(definition["checkpoint"])[:16]),
    }
    if facts.time_text:
        rows["Worker time"] = facts.time_text
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


def _decision(facts: StudyFacts) -> str:
    if facts.decision:
        return facts.decision.replace("<", "&lt;")  # what a promoted file says is in it
    return "None yet." if facts.evidence else "The confirmation comes first."


def _watched(found: Monitored) -> str:
    told = f"{monitor.title(found)}: {found.advice}. {monitor.service(found)}."
    return "\n\n".join([told, markdown(monitor.readings_table(found), spaced=True), *monitor.EXPLANATIONS])


def _parked(facts: StudyFacts) -> str:
    lines = [f"- {STAGES[item.stage]}, slot {item.number}: {literal(item.error)}" for item in facts.parked]
    if (more := len(lines) - PARKED_SHOWN) > 0:
        lines[PARKED_SHOWN:] = [f"- and {more} more; see `{command(f'studies show {facts.study.name}')}`"]
    return "\n".join(lines)
