"""What a person sees of a run: a live table on a terminal, else a line of progress now and then; and what is said.

A thread of its own writes, so that neither a signal handler nor a thread of the supervisor ever waits for a terminal;
once the terminal is gone nothing is written and the run goes on. The cursor is never hidden: whatever ends the
process, kill -9 too, leaves the terminal as it was. Knows the supervisor's children and the slots.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, cast

import rich.table
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import SegmentLines
from rich.text import Text

from launch.output import counted
from launch.streams import Stderr
from launch.supervisor import Child
from launch.views.tables import Column, Table, duration, percent_error, percent_gain, rate, terminal
from launch.worker import EXIT_DONE, EXIT_INTERRUPTED
from storage import slots, study_rows
from storage.progress import RunSnapshot, run_snapshot
from storage.retrying import RetryingStorage

DRAW_S = 1.0  # between two drawings, and between two looks at the database
REPORT_S = 10.0  # between two lines of progress
LOOK_SHARE = 0.01  # of the time, at most, that looks may take: with 500 studies one takes 40 ms
SILENCE_S = 5.0  # without an answer from the database, then it is said
RECENT_S, RECENT_DONE = 30.0, 20  # a rate is of the last so many seconds and slots, whichever is longer
SAMPLES = 600  # kept of a run to tell rates from
AT_WORK_S = 5.0  # a study or a worker between two slots is still at work
ASK_GPU_S, GPU_TIMEOUT_S = 5.0, 20.0
CLOSE_S = 1.0  # a terminal that takes nothing (Ctrl-S) is waited for so long
INCUMBENT = {"stage": slots.BASELINE, "label": "incumbent", "path": "$.validation.mae"}


# --- what is shown --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WorkerLine:
    """A worker of this run. rate: slots a second."""

    number: int
    device: str
    study: str
    at: str
    rate: float | None
    memory: str


@dataclass(frozen=True, kw_only=True)
class StudyLine:
    """A study of this run. MAEs are of the search's windows. rate: trials a second."""

    name: str
    done: int
    budget: int
    parked: int
    open: int
    best: float | None
    incumbent: float | None
    rate: float | None
    at_work: bool

    @property
    def left_s(self) -> float | None:
        return (self.budget - self.done) / self.rate if self.rate and self.at_work else None

    @property
    def state(self) -> str:
        """How long it still takes, or what else there is to say."""
        if not self.open:
            return "parked" if self.parked else "done"
        if self.done + self.parked >= self.budget:
            return "confirms" if self.at_work else "to confirm"
        return duration(self.left_s)


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything about a run at one moment."""

    workers: Sequence[WorkerLine]
    studies: Sequence[StudyLine]
    elsewhere: int  # workers of other runs on these studies
    rate: float | None  # trials a second, of all

    @property
    def done(self) -> int:
        return sum(study.done for study in self.studies)

    @property
    def budget(self) -> int:
        return sum(study.budget for study in self.studies)

    @property
    def left_s(self) -> float | None:
        """All trials at the rate of all; no less than the slowest study at work still takes."""
        if not self.rate:
            return None
        return max([(self.budget - self.done) / self.rate, *(study.left_s or 0.0 for study in self.studies)])


def view(state: State, width: int, height: int, *, silent_s: float = 0.0) -> RenderableType:
    """The live table in at most `width` x `height` cells. silent_s: how long the database has not answered."""
    bar = _bar(state, width, silent_s)
    # Two headings, two empty lines and the bar; the last line of the screen stays free.
    room = height - 6
    if room < 2:
        return bar
    for_workers = min(len(state.workers), max(room // 2, room - len(state.studies) - 1))
    workers, more = _rows(state.workers, for_workers)
    parts: list[RenderableType] = [terminal(_worker_table(workers), width)]
    others = [counted(more, "more worker")] if more else []
    others += [f"{counted(state.elsewhere, 'worker')} of other runs"] if state.elsewhere else []
    if others:
        parts.append(_line(f"and {' and '.join(others)}", width))
        room -= 1
    room -= len(workers)
    studies: Sequence[StudyLine] = state.studies
    if len(studies) > room:
        studies = [study for study in studies if study.at_work][: max(0, room - 1)]
    parts += ["", terminal(_study_table(studies), width)] if studies else [""]
    if len(studies) < len(state.studies):
        shown = {study.name for study in studies}
        parts.append(_line(_others([study for study in state.studies if study.name not in shown]), width))
    return Group(*parts, "", bar)


def _rows(workers: Sequence[WorkerLine], room: int) -> tuple[Sequence[WorkerLine], int]:
    """The workers that there is room for, and how many are left out."""
    if len(workers) <= room:
        return workers, 0
    return workers[: room - 1], len(workers) - room + 1  # a line says how many


def _others(studies: Sequence[StudyLine]) -> str:
    counts = {
        "done": sum(not study.open and not study.parked for study in studies),
        "parked": sum(not study.open and study.parked > 0 for study in studies),
        "under way": sum(study.open > 0 and study.done > 0 for study in studies),
        "to come": sum(study.open > 0 and study.done == 0 for study in studies),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"and {counted(len(studies), 'other study')}: {told}"


def _line(words: str, width: int) -> Text:
    line = Text(words, style="dim", no_wrap=True)
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
            Column(heading="at", cells=[worker.at for worker in workers], priority=4),
            Column(heading="rate", cells=[rate(worker.rate) for worker in workers], right=True, priority=2),
            Column(heading="GPU memory", cells=[worker.memory for worker in workers], right=True, priority=1),
        ],
    )


def _study_table(studies: Sequence[StudyLine]) -> Table:
    def gain(study: StudyLine) -> float | None:
        return None if not study.incumbent or study.best is None else 1 - study.best / study.incumbent

    return Table(
        columns=[
            Column(
                heading="study",
                cells=[study.name for study in studies],
                short_cells=[study.name.split("@")[0] for study in studies],
            ),
            Column(heading="trials", cells=[f"{s.done}/{s.budget}" for s in studies], right=True, priority=5),
            Column(heading="best", cells=[percent_error(study.best) for study in studies], right=True, priority=3),
            Column(
                heading="incumbent", cells=[percent_error(study.incumbent) for study in studies], right=True, priority=1
            ),
            Column(
                heading="improvement", cells=[percent_gain(gain(study)) for study in studies], right=True, priority=2
            ),
            Column(heading="left", cells=[study.state for study in studies], right=True, priority=4),
        ],
    )


def _bar(state: State, width: int, silent_s: float) -> RenderableType:
    words = [f"{state.done}/{state.budget}"]
    if silent_s:
        words.append(f"the database has not answered for {duration(silent_s)}")
    elif state.done < state.budget:
        words += [rate(state.rate), f"{duration(state.left_s)} left"] if state.rate else []
    elif any(study.open for study in state.studies):
        words.append("confirming")
    text = Text("  ".join(words), style="red" if silent_s else "", no_wrap=True)
    text.truncate(width, overflow="ellipsis")
    room = width - text.cell_len - 2
    if room < 5:
        return text
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1, state.budget), completed=state.done, width=min(room, 60)), text)
    return grid


# --- where it comes from --------------------------------------------------------------------------------------


class Rates:
    """How fast each thing that is counted goes, lately."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, Mapping[Any, int]]] = []

    def add(self, now: float, counts: Mapping[Any, int]) -> None:
        if len(self._samples) >= SAMPLES:
            del self._samples[1::2]  # the further back, the fewer: enough for what is slow
        self._samples.append((now, counts))

    def of(self, key: Any, since: float | None) -> float | None:
        """A second, of the time since then; None where it is not known yet."""
        now, counts = self._samples[-1]
        found = None
        for then, before in reversed(self._samples[:-1]):
            if since is None or then < since or key not in before:
                break
            done = counts.get(key, 0) - before[key]
            found = done / (now - then)
            if now - then >= RECENT_S and done >= RECENT_DONE:
                break
        return found


class GpuMemory:
    """What the driver says of the GPUs' memory: asked for every few seconds, never waited for."""

    def __init__(self) -> None:
        self._command = shutil.which("nvidia-smi")
        self._asked_at = -ASK_GPU_S
        self._asking: subprocess.Popen[str] | None = None
        self._known: dict[str, str] = {}

    def read(self) -> Mapping[str, str]:
        """Used and total GiB, by index and by UUID; empty where no driver answers."""
        now = time.monotonic()
        if self._asking is not None:
            if self._asking.poll() is not None:
                self._hear(self._asking)
                self._asking = None
            elif now - self._asked_at > GPU_TIMEOUT_S:  # a driver that hangs: not asked again
                self._command, self._known = None, {}
                self.end()
        elif self._command and now - self._asked_at >= ASK_GPU_S:
            self._asked_at = now
            query = ["--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError):
                self._asking = subprocess.Popen(
                    [self._command, *query],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for us
                )
        return self._known

    def _hear(self, asked: subprocess.Popen[str]) -> None:
        output, _ = asked.communicate()
        self._known = {}
        for line in output.splitlines() if asked.returncode == 0 else ():
            fields = [field.strip() for field in line.split(",")]
            if len(fields) == 4 and fields[2].isdecimal() and fields[3].isdecimal():
                index, uuid, used, total = fields
                text = f"{int(used) / 1024:.1f}/{int(total) / 1024:.0f} GiB"
                self._known |= {index: text, uuid: text}

    def of(self, name: str) -> str:
        """Of the GPU that CUDA_VISIBLE_DEVICES calls so: an index, or a UUID which may be cut short."""
        known = self.read()
        if name.startswith("GPU-"):
            return next((text for uuid, text in known.items() if uuid.startswith(name)), "")
        return known.get(name, "")

    def end(self) -> None:
        if self._asking is not None:
            self._asking.kill()
            self._asking.communicate()
            self._asking = None


class RunWatcher:
    """Looks at the database and at the children, and says how the run stands."""

    def __init__(self, storage: RetryingStorage, studies: Mapping[int, str]) -> None:
        self._storage, self._studies = storage, studies
        self.children: Sequence[Child] = ()
        self.gpus = GpuMemory()
        self._rates = Rates()
        self._ours: set[str] = set()  # workers of this run, those that died too
        self._at: dict[str, tuple[str, str]] = {}  # by worker: the study and the slot that it has or had last
        self._since: dict[Any, float] = {}  # when a worker or study was first seen with a slot in hand
        self._last: dict[Any, float] = {}  # and when last; after a while without one all begins anew

    def look(self) -> State:
        """Raises DatabaseUnavailable."""
        ours = [child.name for child in self.children if child.name]
        self._ours.update(ours)
        glance = run_snapshot(self._storage, self._studies, ours, **INCUMBENT)
        best = study_rows.best_values(self._storage, self._studies)
        now = time.monotonic()
        counts: dict[Any, int] = {study_id: one.done for study_id, one in glance.progress.items()}
        self._rates.add(now, {**counts, "all": sum(counts.values()), **dict.fromkeys(ours, 0), **glance.finished})
        self._note_busy(now, glance)
        return State(
            workers=[self._worker(now, child) for child in list(self.children)],
            studies=[
                StudyLine(
                    name=self._studies[study_id],
                    done=one.done,
                    budget=one.budget,
                    parked=one.parked,
                    open=one.open,
                    best=best.get(study_id),
                    incumbent=glance.picked.get(study_id),
                    rate=self._rates.of(study_id, self._since.get(study_id)),
                    at_work=study_id in self._since,
                )
                for study_id, one in sorted(glance.progress.items(), key=lambda item: self._studies[item[0]])
            ],
            elsewhere=len({busy.worker for busy in glance.busy} - self._ours),
            rate=self._rates.of("all", self._since.get("all")),
        )

    def _note_busy(self, now: float, glance: RunSnapshot) -> None:
        for busy in glance.busy:
            if busy.stage == slots.TRIAL:
                at = f"trial {busy.number + 1}/{glance.progress[busy.study_id].budget}"
            else:
                at = "confirmation" if busy.stage == slots.CONFIRMATION else busy.label or "baseline"
            self._at[busy.worker] = self._studies[busy.study_id], at
            for key in (busy.worker, busy.study_id, "all"):
                self._since.setdefault(key, now)
                self._last[key] = now
        for key in [key for key, last in self._last.items() if now - last > AT_WORK_S]:
            del self._since[key], self._last[key]

    def _worker(self, now: float, child: Child) -> WorkerLine:
        gpu = child.device_slot.environment.get("CUDA_VISIBLE_DEVICES", "")
        host = child.name.rpartition(":")[0]
        device = f"gpu {gpu[:8]}" if gpu else child.device_slot.device.partition(":")[0].replace("cuda", "gpu")
        study, at = self._at.get(child.name, ("", "starts"))
        if child.status is not None:
            ends = {EXIT_DONE: "done", EXIT_INTERRUPTED: "stopped"}
            study, at = "", ends.get(child.status, "given up")
        elif child.process is None:
            study, at = "", f"again in {max(0.0, child.start_at - now):.0f} s" if child.crashes else "starts"
        elif child.name in self._at and child.name not in self._since:
            study, at = "", "waits"
        return WorkerLine(
            number=child.number,
            device=device if host in ("", os.uname().nodename) else f"{device} on {host}",
            study=study,
            at=at,
            rate=self._rates.of(child.name, self._since.get(child.name)),
            memory=self.gpus.of(gpu) if gpu else "",
        )


# --- where it goes --------------------------------------------------------------------------------------------


class Said(io.TextIOBase):
    """In the place of sys.stderr while a run is shown: whole lines to the view."""

    def __init__(self, shown: View) -> None:
        self._shown, self._begun = shown, ""

    def write(self, text: str, /) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._shown.say(line)
        return len(text)


class CursorShown(Console):
    """Hides no cursor: what kills the process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class View:
    """Shows a run from `with` to the end of it.

    `say` may be called from any thread and signal handler. The view itself is the supervisor's `report`.
    """

    def __init__(self, storage: RetryingStorage, studies: Mapping[int, str], *, plain: bool = False) -> None:
        """studies: names by id. plain: lines of progress also on a terminal."""
        self._writer = threading.Thread(target=self._write, name="view", daemon=True)
        self._watch = RunWatcher(storage, studies)
        self._stderr = Stderr()
        dumb = os.environ.get("TERM", "") in ("", "dumb", "unknown")
        self._is_live = self._stderr.isatty() and not plain and not dumb
        self._console = CursorShown(
            file=cast(IO[str], self._stderr),
            highlight=False,
            force_terminal=self._is_live,
            force_interactive=self._is_live,
        )
        self._inbox: queue.SimpleQueue[str | State | None] = queue.SimpleQueue()  # put never waits nor takes a lock
        self._live: Live | None = None
        self._drawn = (0, 0)  # columns and lines of what is on the terminal now
        self._state: State | None = None
        self._resumed = False  # after Ctrl-Z: the shell wrote below the table
        self._begun: tuple[float, int] | None = None  # when, and how many trials were done
        self._look_at = 0.0
        self._look_s = 0.0  # of the last look
        self._asked_at: float | None = None  # the database, which has not answered yet
        self._told_silence = False

    def watch(self, children: Sequence[Child]) -> None:
        """The supervisor's, whose workers are shown."""
        self._watch.children = children

    def say(self, line: str) -> None:
        """One line to the user, above the table."""
        self._inbox.put(line)

    def __call__(self) -> None:
        """Look how the run stands, if it is time. Raises DatabaseUnavailable."""
        if time.monotonic() < self._look_at:
            return
        began = self._asked_at = time.monotonic()
        try:
            self._inbox.put(self._watch.look())
        finally:
            self._asked_at = None
            ended = time.monotonic()
            every = DRAW_S if self._is_live else REPORT_S
            # One slow look, such as the first, holds nothing back; two in a row do.
            before, self._look_s = self._look_s, ended - began
            self._look_at = ended + max(every, min(before, self._look_s) / LOOK_SHARE)

    def __enter__(self) -> View:
        self._took = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
        ]
        self._original, sys.stderr = sys.stderr, Said(self)
        for handler in self._took:
            handler.setStream(sys.stderr)
        self._on_resume = signal.signal(signal.SIGCONT, self._resume)
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGCONT, self._on_resume)
        sys.stderr = self._original
        for handler in self._took:
            handler.setStream(sys.stderr)
        self._inbox.put(None)
        self._writer.join(CLOSE_S)
        self._watch.gpus.end()

    def _resume(self, number: int, frame: FrameType | None) -> None:
        self._resumed = True

    def _write(self) -> None:
        """What the thread does."""
        draw_at = 0.0
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, draw_at - time.monotonic()))
            except queue.Empty:
                self._draw() if self._is_live else self._tell_silence()
                draw_at = time.monotonic() + DRAW_S
                continue
            if item is None:
                break
            if isinstance(item, State):
                self._state = item
                if not self._is_live:
                    self._report(item)
            else:
                self._print(item)
        if self._live is not None:
            self._live.stop()  # takes the table away; the command shows how all ended

    def _silent_s(self) -> float:
        """How long the database has kept us waiting; 0: not worth a word."""
        asked_at = self._asked_at
        seconds = time.monotonic() - asked_at if asked_at is not None else 0.0
        return seconds if seconds > SILENCE_S else 0.0

    def _tell_silence(self) -> None:
        silent_s = self._silent_s()
        if silent_s and not self._told_silence:
            self._print(f"the database has not answered for {duration(silent_s)}; waiting for it")
        self._told_silence = silent_s > 0

    def _print(self, line: str) -> None:
        # What a worker's log held could steer the terminal.
        clean = "".join(letter if letter.isprintable() else " " for letter in line)
        if self._live is None:
            self._stderr.write(f"{clean}\n")
            self._stderr.flush()
        elif not self._stderr.gone:
            self._fit()
            self._console.print(Text(clean), soft_wrap=True)

    def _report(self, state: State) -> None:
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, state.done
            return
        began, before = self._begun
        a_second = (state.done - before) / (now - began)
        if state.done >= state.budget:
            left = ", confirming"
        else:
            left = f", about {(state.budget - state.done) / a_second / 60:.1f} min left" if a_second else ""
        self._print(f"{state.done}/{state.budget} trials, {a_second:.1f} a second{left}")

    def _draw(self) -> None:
        if not self._is_live or self._state is None or self._stderr.gone:
            return
        self._fit()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False,
                              redirect_stderr=False, vertical_overflow="crop")  # fmt: skip
            self._live.start()
        columns, lines = self._console.size
        table = view(self._state, columns, lines, silent_s=self._silent_s())
        drawn = self._console.render_lines(table, self._console.options.update(height=None), pad=False)
        self._drawn = max(sum(part.cell_length for part in line) for line in drawn), len(drawn)
        self._live.update(SegmentLines(drawn, new_lines=True), refresh=True)

    def _fit(self) -> None:
        """Start on a fresh screen where it is not known any more which lines the table takes.

        So it is in a terminal that became too small, since many then wrap what they show, and after a stop, when the
        shell has written. What was there goes up into the scrollback.
        """
        columns, lines = self._stderr.size()
        self._console.size = columns, lines
        resumed, self._resumed = self._resumed, False
        if self._live is not None and (resumed or columns < self._drawn[0] or lines <= self._drawn[1]):
            self._live.update("")
            self._live.stop()
            self._live, self._drawn = None, (0, 0)
            self._stderr.write("\n" * lines + "\x1b[H")
