"""Who computes a forecast: of all processes that were asked for it one, in its one thread of models.

Owns the gathering of requests, the claims in Postgres, what is written there and what waits for it while it is away.
Without a database every process computes for itself; equal questions have equal answers whoever computes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import date
from typing import TypeVar

from forecasters import ExpectedError
from objectives.evaluation import Evaluator
from storage import DatabaseUnavailable, forecasts
from storage.forecasts import ForecastRow
from storage.retrying import RetryingStorage, one_line
from studies.config import Config
from studies.evaluators import ensemble_evaluator, load_forecaster, serving
from studies.evidence import ENSEMBLE
from studies.questions import Question, answer, serving_evaluator

MEMORY, STORED, COMPUTED, JOINED, FAILED = forecasts.REQUEST_KINDS
GATHER_S = 0.005  # that a request waits for others to be computed and written together
LEASE_S = 10.0  # after which others compute what a process that died had claimed
POLL_S = 0.05  # between two looks for what another process computes
FLUSH_S = 1.0  # between two writings of counts
PATIENCE_S = 1.0  # that a request waits for a database that is away, before it is computed without
AWAY_S = 2.0  # that a database is then left alone
WRITE_S = 1.0  # of computing, after which what is done is written and answered
UNWRITTEN = 10_000  # forecasts that wait for a database that is away, at most

_log = logging.getLogger("studies")

T = TypeVar("T")
Counts = Counter[tuple[date, str, str]]
Answer = Future[tuple[ForecastRow, str]]  # the forecast, and of which kind the request was


class Together:
    """The thread of models of a process, and the thread that keeps its claims and counts in Postgres.

    kept: whether rows that are there are answers. note: takes a line that a person should know.
    """

    def __init__(
        self,
        config: Config,
        storage: RetryingStorage | None,
        *,
        device: str,
        kept: bool,
        note: Callable[[str], None],
    ) -> None:
        self.config, self.storage, self.device = config, storage, device
        self.away: str | None = None  # why the database does not answer, where there is one
        self.computing_s, self.computed = 0.0, Counter[str]()  # seconds spent, and forecasts by model
        self._kept, self._note = kept, note
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._asked: queue.SimpleQueue[tuple[Question, Answer] | str | None] = queue.SimpleQueue()
        self._evaluators: dict[str, Evaluator] = {}
        self._claimed: set[str] = set()
        self._lock = threading.Lock()  # of counts and of rows that are not written
        self._counts: Counts = Counter()
        self._unwritten: dict[str, ForecastRow] = {}
        self._flushing = threading.Lock()  # whoever flushes next sees what another thread was writing
        self._left_alone_until = 0.0
        self._closing = threading.Event()
        self._models = threading.Thread(target=self._answer_all, name="models", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._models.start()
        if storage is not None:
            self._keeper.start()

    def submit(self, question: Question, future: Answer) -> None:
        """Have it answered: the future gets the forecast and STORED, COMPUTED or JOINED, or an ExpectedError."""
        if not self.alive:
            future.set_exception(ForecastsFailed("these forecasts are closed; open others"))
        self._asked.put((question, future))

    def load(self, model: str) -> None:
        """Have a model loaded before it is asked for; where it cannot be, those who ask are told."""
        self._asked.put(model)

    @property
    def loaded(self) -> Mapping[str, str]:
        """The models that are loaded, and their weights' fingerprints."""
        return {model: one.forecaster.fingerprint for model, one in list(self._evaluators.items())}

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._models.is_alive()

    def close(self) -> None:
        """Answer what was asked for, and write what is not written."""
        self._asked.put(None)
        self._models.join()
        self._closing.set()
        if self.storage is not None:
            self._keeper.join()
            self._flush()

    # --- the thread of models ----------------------------------------------------------------------------------

    def _answer_all(self) -> None:
        waiting: dict[str, tuple[Question, Answer]] = {}  # for another process
        closing = False
        while not (closing and not waiting):
            batch: dict[str, tuple[Question, Answer]] = {}
            wait_s, until = POLL_S if waiting else None, None
            with contextlib.suppress(queue.Empty):
                while True:
                    one = self._asked.get(timeout=wait_s) if not closing else self._asked.get_nowait()
                    if one is None:
                        closing = True
                        continue
                    if isinstance(one, str):
                        with contextlib.suppress(ExpectedError):
                            self._evaluator(one)
                        continue
                    batch[one[0].digest] = one
                    until = until or time.monotonic() + GATHER_S
                    wait_s = max(until - time.monotonic(), 0.0)
            try:
                waiting = self._answer(batch, waiting)
            except Exception as error:  # noqa: BLE001 - without this thread nobody would answer any more
                _log.exception("forecasts failed")
                for _, future in {**batch, **waiting}.values():
                    if not future.done():
                        future.set_exception(ForecastsFailed(one_line(error)))
                waiting = {}
            if closing and waiting:
                time.sleep(POLL_S)

    def _answer(
        self, batch: Mapping[str, tuple[Question, Answer]], waiting: Mapping[str, tuple[Question, Answer]]
    ) -> dict[str, tuple[Question, Answer]]:
        """Answer these questions, but for those that another process is computing, which are returned."""
        asked = {**waiting, **batch}
        mine, stored = set(asked), {}
        if self.storage is not None and self._kept and asked:
            storage = self.storage
            with contextlib.suppress(DatabaseUnavailable):
                mine, stored = self._in_database(
                    lambda: forecasts.claim(storage, list(asked), self._owner, lease_s=LEASE_S, wait_s=PATIENCE_S)
                )
                self._claimed |= mine
        for digest, row in stored.items():
            asked[digest][1].set_result((row, JOINED if digest in waiting else STORED))
        self._compute({digest: asked[digest] for digest in asked if digest in mine})
        return {digest: one for digest, one in asked.items() if digest not in mine and digest not in stored}

    def _compute(self, asked: Mapping[str, tuple[Question, Answer]]) -> None:
        done: list[tuple[ForecastRow, Answer]] = []
        began = time.monotonic()
        for digest, (question, future) in sorted(asked.items(), key=lambda one: one[1][0].model):
            started = time.perf_counter()
            try:
                done.append((answer(self._evaluator(question.model), question), future))
                self.computed[question.model] += 1
            except ExpectedError as error:
                future.set_exception(error)
                self._write([], failed=[digest])
            except Exception as error:  # noqa: BLE001 - the others are answered, and this one is told
                _log.exception("%s: the forecast failed", question.symbol)
                future.set_exception(ForecastsFailed(f"{question.symbol}: the forecast failed: {one_line(error)}"))
                self._write([], failed=[digest])
            self.computing_s += time.perf_counter() - started
            if done and time.monotonic() - began > WRITE_S:
                self._finish(done)
                done, began = [], time.monotonic()
        self._finish(done)

    def _finish(self, done: list[tuple[ForecastRow, Answer]]) -> None:
        """Write forecasts, and only then answer: what was answered is among the rows."""
        if done:
            self._write([row for row, _ in done])
        for row, future in done:
            future.set_result((row, COMPUTED))

    def _evaluator(self, model: str) -> Evaluator:
        if model == ENSEMBLE:
            return ensemble_evaluator(serving(self.config, self.config.windows.horizon), self._evaluator)
        if model not in self._evaluators:
            forecaster = load_forecaster(serving(self.config, self.config.windows.horizon), model, device=self.device)
            self._evaluators[model] = serving_evaluator(self.config, forecaster)
        return self._evaluators[model]

    def _write(self, rows: list[ForecastRow], failed: Sequence[str] = ()) -> None:
        """Write forecasts and give their claims back; what cannot be written now is written later."""
        if self.storage is None:
            return
        storage = self.storage
        try:
            self._in_database(lambda: forecasts.finish(storage, rows, self._owner, failed=failed, wait_s=PATIENCE_S))
        except DatabaseUnavailable:
            with self._lock:
                for row in rows[: UNWRITTEN - len(self._unwritten)]:
                    self._unwritten[row.digest] = row
        self._claimed -= {*failed, *(row.digest for row in rows)}

    # --- the database --------------------------------------------------------------------------------------------

    def _in_database(self, run: Callable[[], T], *, at_once: bool = False) -> T:
        """Raises DatabaseUnavailable, for a while without asking once it did not answer."""
        if self.away is not None and time.monotonic() < self._left_alone_until and not at_once:
            raise DatabaseUnavailable(self.away)
        try:
            found = run()
        except DatabaseUnavailable as error:
            if self.away is None:
                self._note(f"{error}; forecasts are computed without it and written once it is back")
            self.away, self._left_alone_until = str(error), time.monotonic() + AWAY_S
            raise
        if self.away is not None:
            self._note("the database is back")
        self.away = None
        return found

    def count(self, counts: Counts) -> None:
        """Add to the numbers of requests, which are written about once a second."""
        if self.storage is not None:
            with self._lock:
                self._counts.update(counts)

    def totals(self) -> dict[tuple[date, str, str], int]:
        """Requests of all processes by day, symbol and kind, these of this process too. Raises DatabaseUnavailable."""
        if self.storage is None:
            with self._lock:
                return dict(self._counts)
        self._flush()
        storage = self.storage
        return self._in_database(lambda: forecasts.request_counts(storage, wait_s=0.0))

    def tidy(self) -> None:
        """Delete what is kept for longer than the settings say."""
        if self.storage is not None:
            storage, days = self.storage, self.config.storage.keep_days
            with contextlib.suppress(DatabaseUnavailable):
                self._in_database(lambda: forecasts.forget(storage, keep_days=days, wait_s=PATIENCE_S))

    def _keep(self) -> None:
        """Renew claims, and write counts and what could not be written, until the end."""
        while not self._closing.wait(FLUSH_S):
            for work in (self._renew, self._flush):  # a row that cannot be written may not cost the claims
                try:
                    work()
                except DatabaseUnavailable:
                    break
                except Exception:  # noqa: BLE001 - without this thread claims would lapse and nothing be counted
                    _log.exception("claims, counts or forecasts could not be written")

    def _renew(self) -> None:
        claimed = list(self._claimed)
        if claimed and self.storage is not None:
            storage = self.storage
            self._in_database(lambda: forecasts.renew(storage, claimed, self._owner, lease_s=LEASE_S), at_once=True)

    def _flush(self) -> None:
        """Write counts and forecasts that are not written yet; without any, see whether the database answers."""
        assert self.storage is not None
        storage = self.storage
        with self._flushing:
            with self._lock:
                counts, self._counts = self._counts, Counter()
                rows = list(self._unwritten.values())
            try:
                self._in_database(lambda: forecasts.catch_up(storage, rows, counts), at_once=True)
            except BaseException:
                with self._lock:
                    self._counts.update(counts)
                raise
            with self._lock:
                for row in rows:
                    self._unwritten.pop(row.digest, None)


class ForecastsFailed(ExpectedError):
    """A forecast failed in a way that nobody expects; the log has more."""
