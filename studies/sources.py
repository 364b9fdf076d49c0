"""The files that forecasts are made from, read again when they change: promoted configurations and bars.

Every look costs one stat of each file; what has not changed is not read again. For threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from forecasters import KEYS
from objectives.bars import DataError, timestamp_text
from storage import configs
from storage.configs import Record
from studies.bars_cache import read_bars_once
from studies.config import Config
from studies.ensembles import checkpoint_of, members_of
from studies.evaluators import checkpoint_fingerprint
from studies.evidence import ENSEMBLE
from studies.in_use import lost_notes
from studies.questions import Question, ReadBars, closed_bars, promoted, question_of
from studies.series import file_of

SETTLED_NS = 10**9  # a file changed since may change again without any of its times telling
QUESTIONS = 4096  # kept; each may hold the bars of when it was asked
TRIES = 5  # to read a file that is being written

T = TypeVar("T")


@dataclass(eq=False)
class _Kept(Generic[T]):
    """What a file said, and the state that it had. state: None where the file may change without telling."""

    state: tuple[int, ...] | None
    value: T
    read_at: float = field(default_factory=time.monotonic)


def _state(path: Path) -> tuple[int, ...] | None:
    """Differs after every change of a file. None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


class Sources:
    """Questions as the files say them now.

    note: takes a line that a person should know.
    """

    def __init__(self, config: Config, note: Callable[[str], None]) -> None:
        self.config = config
        self._note = note
        self._lock = threading.Lock()  # of reading; looking at what was read takes none
        self._records: dict[str, _Kept[Record]] = {}
        self._bars: dict[str, _Kept[ReadBars]] = {}
        self._questions: dict[tuple[str, int, tuple[str, ...]], Question] = {}
        self._checkpoints: dict[str, str] = {}
        self._said: set[str] = set()

    def question(
        self, symbol: str, *, horizon: int, keys: Sequence[str], max_read_s: float, at_once: bool = False
    ) -> Question:
        """What is to be forecast of a symbol. Raises ExpectedError, in one line.

        max_read_s: how long ago, at most, the bars may have been read, whatever their file's times say; at_once: they
        are read again unless that was within the last second.
        """
        keys = [key for key in KEYS if key in keys] + [key for key in keys if key not in KEYS]  # of which none is known
        record = self._record(symbol)
        read = self._read(symbol, min(max_read_s, 1.0) if at_once else max_read_s)
        asked = (symbol, horizon, tuple(keys))
        found = self._questions.get(asked)
        if found is None or found.record is not record or found.read is not read:
            checkpoint = checkpoint_of(record, self.checkpoint)
            found = question_of(self.config, record, read, horizon=horizon, keys=keys, checkpoint=checkpoint)
            if len(self._questions) >= QUESTIONS:
                self._questions.clear()  # those that are asked again are made again, in less than a millisecond
            self._questions[asked] = found
        return found

    def knows(self, symbol: str) -> bool:
        """Whether the symbol has, or had, a configuration in use."""
        return symbol in self._records

    def checkpoint(self, model: str) -> str:
        """The fingerprint of a model's weights, of when they were first asked for. Raises CheckpointError."""
        if model not in self._checkpoints:
            with self._lock:
                if model not in self._checkpoints:
                    self._checkpoints[model] = checkpoint_fingerprint(self.config, model)
        return self._checkpoints[model]

    def _record(self, symbol: str) -> Record:
        path = configs.file_path(self.config.hyperparams.dir, "best", symbol)
        kept = self._records.get(symbol)
        if kept is not None and kept.state is not None and kept.state == _state(path):
            return kept.value
        with self._lock:
            state, record = _settled(path, lambda: promoted(self.config, symbol))
            kept = self._records.get(symbol)
            if kept is not None and kept.value.digest == record.digest:
                record = kept.value  # the same, so that questions of it stay
            else:
                of_parts = members_of(record) if record.model == ENSEMBLE else (record,)
                for one in of_parts:
                    for line in lost_notes(record.path, one.model, one.config, one.metadata):
                        self._note(line)
            self._records[symbol] = _Kept(_trusted(state), record)
        return record

    def _read(self, symbol: str, max_read_s: float) -> ReadBars:
        kept = self._bars.get(symbol)
        if kept is not None and self._holds(kept, max_read_s):
            return kept.value
        with self._lock:
            kept = self._bars.get(symbol)
            if kept is not None and self._holds(kept, max_read_s):  # another thread has read it
                return kept.value
            path = file_of(self.config.data.dir, symbol)
            state, (bars, notes) = _settled(path, lambda: read_bars_once(path))
            read = closed_bars(self.config, symbol, path, bars, written_s=state[0] / 1e9)
            if read.unfinished:
                last = timestamp_text(bars.timestamps[-1])
                notes = (*notes, f"{path}: its last bar, {last}, had not ended when it was written; left out")
            if kept is not None and kept.value.digest == read.digest and kept.value.path == path:
                read = kept.value
            self._bars[symbol] = _Kept(_trusted(state), read)
        for line in notes:
            if line not in self._said:
                self._said.add(line)
                self._note(line)
        return read

    def _holds(self, kept: _Kept[ReadBars], max_read_s: float) -> bool:
        recent = time.monotonic() - kept.read_at <= max_read_s
        return recent and kept.state is not None and kept.state == _state(kept.value.path)


def _settled(path: Path, read: Callable[[], T]) -> tuple[tuple[int, ...], T]:
    """What a file says and the state in which it said it. Raises what `read` raises, and DataError."""
    for _ in range(TRIES):
        before, value = _state(path), read()
        if before is not None and before == _state(path):
            return before, value
        time.sleep(0.02)
    raise DataError(f"{path}: changes while it is read; replace files as a whole, by a rename")


def _trusted(state: tuple[int, ...]) -> tuple[int, ...] | None:
    return None if abs(time.time_ns() - max(state[:2])) < SETTLED_NS else state
