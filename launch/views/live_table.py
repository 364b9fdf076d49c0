"""The live table of a run: its lines as typed values, and how they are drawn in a terminal of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from launch.output import counted
from launch.views.tables import Column, Table, duration, numbers, percent_error, percent_gain, rate, terminal


@dataclass(frozen=True, kw_only=True)
class WorkerLine:
    """A worker of this run and what it is doing: a task of a study, or a state such as "waiting" and no study."""

    number: int
    device: str
    study: str
    task: str
    rate: float | None  # slots per second
    memory: str  # of its GPU: used and total


@dataclass(frozen=True, kw_only=True)
class StudyLine:
    """A study of this run. `best` and `incumbent` are MAEs on the validation windows, as fractions."""

    name: str
    done: int
    budget: int
    parked: int
    open: int
    best: float | None
    incumbent: float | None
    rate: float | None  # trials per second
    active: bool  # a worker has one of its slots, or had one a moment ago

    @property
    def improvement(self) -> float | None:
        return None if not self.incumbent or self.best is None else 1 - self.best / self.incumbent

    @property
    def remaining_s(self) -> float | None:
        """The time that the remaining trials take at the current rate; None where that is unknown."""
        return (self.budget - self.done) / self.rate if self.rate and self.active else None

    @property
    def state(self) -> str:
        """The text under "remaining": a duration, or the stage that the study has reached."""
        if not self.open:
            return "parked" if self.parked else "done"
        if self.done + self.parked >= self.budget:
            return "confirming" if self.active else "to confirm"
        return duration(self.remaining_s)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands at one moment."""

    workers: Sequence[WorkerLine]
    studies: Sequence[StudyLine]
    other_workers: int  # of other runs, on the same studies
    rate: float | None  # trials per second, of all studies together

    @property
    def done(self) -> int:
        return sum(study.done for study in self.studies)

    @property
    def budget(self) -> int:
        return sum(study.budget for study in self.studies)

    @property
    def remaining_s(self) -> float | None:
        """The time that all trials take at the overall rate; at least what the slowest active study takes."""
        if not self.rate:
            return None
        return max([(self.budget - self.done) / self.rate, *(study.remaining_s or 0.0 for study in self.studies)])


def render(state: RunState, width: int, height: int, *, silent_s: float = 0.0) -> RenderableType:
    """Draw the live table in at most `width` columns and `height` lines, leaving out what has no room.

    silent_s: for how long the database has not answered; 0 where it answers.
    """
    bar = _bar(state, width, silent_s)
    # Besides the rows: two headings, two empty lines and the bar; the last line of the screen stays free.
    room = height - 6
    if room < 2:
        return bar
    worker_room = min(len(state.workers), max(room // 2, room - len(state.studies) - 1))
    workers: Sequence[WorkerLine] = state.workers
    if len(workers) > worker_room:
        workers = workers[: worker_room - 1]  # one line says how many are left out
    hidden = len(state.workers) - len(workers)
    others = [counted(hidden, "more worker")] if hidden else []
    others += [f"{counted(state.other_workers, 'worker')} of other runs"] if state.other_workers else []
    parts: list[RenderableType] = [terminal(_worker_table(workers), width)]
    if others:
        parts.append(_dim_line(f"and {' and '.join(others)}", width))
        room -= 1
    room -= len(workers)
    studies: Sequence[StudyLine] = state.studies
    if len(studies) > room:
        studies = [study for study in studies if study.active][: max(0, room - 1)]
    parts += ["", terminal(_study_table(studies), width)] if studies else [""]
    if len(studies) < len(state.studies):
        shown = {study.name for study in studies}
        parts.append(_dim_line(_summary([study for study in state.studies if study.name not in shown]), width))
    return Group(*parts, "", bar)


def _summary(studies: Sequence[StudyLine]) -> str:
    """One line on the studies that have no row: "and 3 other studies: 2 done, 1 not started"."""
    counts = {
        "done": sum(not study.open and not study.parked for study in studies),
        "parked": sum(not study.open and study.parked > 0 for study in studies),
        "in progress": sum(study.open > 0 and study.done > 0 for study in studies),
        "not started": sum(study.open > 0 and study.done == 0 for study in studies),
    }
    parts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"and {counted(len(studies), 'other study')}: {parts}"


def _dim_line(text: str, width: int) -> Text:
    line = Text(text, style="dim", no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _worker_table(workers: Sequence[WorkerLine]) -> Table:
    return Table(
        columns=[
            Column(
                heading="worker",
                cells=[f"{worker.number} {worker.device}" for worker in workers],
                short_cells=[f"{worker.number}" for worker in workers],
            ),
            Column(
                heading="study",
                cells=[worker.study for worker in workers],
                short_cells=[worker.study.split("@")[0] for worker in workers],
                priority=3,
            ),
            Column(heading="task", cells=[worker.task for worker in workers], priority=4),
            numbers("rate", [rate(worker.rate) for worker in workers], 2),
            numbers("VRAM", [worker.memory for worker in workers], 1),
        ]
    )


def _study_table(studies: Sequence[StudyLine]) -> Table:
    return Table(
        columns=[
            Column(
                heading="study",
                cells=[line.name for line in studies],
                short_cells=[line.name.split("@")[0] for line in studies],
            ),
            numbers("trials", [f"{line.done}/{line.budget}" for line in studies], 5),
            numbers("best", [percent_error(line.best) for line in studies], 3),
            numbers("incumbent", [percent_error(line.incumbent) for line in studies], 1),
            numbers("improvement", [percent_gain(line.improvement) for line in studies], 2),
            numbers("remaining", [line.state for line in studies], 4),
        ]
    )


def _bar(state: RunState, width: int, silent_s: float) -> RenderableType:
    parts = [f"{state.done}/{state.budget}"]
    if silent_s:
        parts.append(f"the database has not answered for {duration(silent_s)}")
    elif state.done < state.budget:
        parts += [rate(state.rate), f"{duration(state.remaining_s)} left"] if state.rate else []
    elif any(study.open for study in state.studies):
        parts.append("confirming")
    text = Text("  ".join(parts), style="red" if silent_s else "", no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    room = width - text.cell_len - 2
    if room < 5:
        return text
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1, state.budget), completed=state.done, width=min(room, 60)), text)
    return grid
