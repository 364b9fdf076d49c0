"""Measure many configurations on a study's windows, batch after batch for all of them, so that a stop loses one batch.

Owns the order, the number of passes, the race between candidates, and the state from which another worker goes on.
Every number is, to the last bit, the one of measuring that configuration alone and in one go. Knows no storage.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forecasters import ForecastError
from objectives.evaluation import STAGES, Evaluator
from objectives.metrics import Measurement, measurement_of, over_passes, standard_error
from objectives.windows import Windows
from studies.candidates import Cost, cost
from studies.evidence import PARTS, Part
from studies.study import SEARCH_PASSES, StudyRun, fingerprint

FRESH_FROM = 1  # first of the passes that a confirmation measures with: seeds that no trial was chosen by
CHUNK = 50  # windows, at least, after which passes are decided and between two looks at the race
RACE_FROM = 100  # windows that a candidate is measured on before it can be dropped
RACE_ERRORS = 3.0  # standard errors by which a candidate that is dropped is worse than the best so far
SAVE_S = 10.0  # between two times that the state is kept
ORDER: tuple[Part, ...] = ("confirmation", "test", "validation")


class Stopped(BaseException):
    """A stop was asked for while a confirmation computed. Not an Exception, so that no handler of errors catches it."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a confirmation runs in. By default it is alone, and what it has done is nowhere kept.

    keep: takes the state, JSON values with the `share` that is done and the seconds `left_s`; what it raises ends the
    confirmation. computing: a context in which a request to stop raises Stopped.
    """

    kept: Mapping[str, Any] | None = None  # the state of an earlier attempt
    keep: Callable[[Mapping[str, Any]], None] = lambda state: None
    computing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    tell: Callable[[str], None] = lambda line: None


ALONE = Host()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration to be measured, and how it is treated."""

    params: Mapping[str, Any]
    decides: bool  # its sampling error decides the number of passes
    races: bool  # it may be dropped
    required: bool  # it was measured before: that it cannot be now is an error


@dataclass(frozen=True, kw_only=True)
class Step:
    """A batch of windows, for all configurations: with two passes to look, the rest of them, or all of them."""

    part: Part
    indices: Sequence[int]
    kind: Literal["look", "rest", "all"]


class Measuring:
    """The measurement of these configurations on all parts of a study's windows."""

    def __init__(self, run: StudyRun, evaluator: Evaluator, entries: Sequence[Entry], host: Host) -> None:
        self._run, self._evaluator, self._entries, self._host = run, evaluator, entries, host
        self.windows: Mapping[Part, Windows] = {
            "confirmation": run.confirmation,
            "test": run.split.test,
            "validation": run.split.validation,
        }
        self.errors: dict[int, str] = {}  # by place: why there is no measurement
        self.passes = 1 if evaluator.exact else 2
        # A further pass runs the network as often as a search of 40 trials does; an exact answer needs none.
        self.fixed = evaluator.exact or run.confirmation.horizon > evaluator.forecaster.free_draw_horizon
        batches = {part: evaluator.batches(found) for part, found in self.windows.items()}
        self._a_chunk = min(-(-CHUNK // evaluator.batch), len(batches["confirmation"]))  # batches
        first = [] if self.fixed else batches["confirmation"][: self._a_chunk]
        self._steps = [
            *(Step(part="confirmation", indices=indices, kind="look") for indices in first),
            *(Step(part="confirmation", indices=indices, kind="rest") for indices in first),
            *(
                Step(part=part, indices=indices, kind="all")
                for part in ORDER
                for indices in batches[part][len(first) if part == "confirmation" else 0 :]
            ),
        ]
        self._done = 0
        # By window, in price: mean and variance over the passes; of a window looked at, the errors of both passes.
        self._values = {part: np.full((len(entries), 2, len(found)), np.nan) for part, found in self.windows.items()}
        # By stage the seconds spent, then the windows encoded and the seconds to their points.
        self._spent = {part: np.zeros((len(entries), len(STAGES) + 2)) for part in PARTS}
        self._began, self._share_before, self._saved = time.monotonic(), 0.0, time.monotonic()

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the numbers."""
        run = self._run
        asked = {
            "definition": fingerprint(run.study.definition),
            "windows": {part: found.origins for part, found in self.windows.items()},
            "passes": (run.max_passes, run.tolerance),
            "batch": (self._evaluator.rung, self._evaluator.batch, CHUNK),
            "entries": [[dict(one.params), one.decides, one.races] for one in self._entries],
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def cost(self) -> Cost:
        """What all of it asks of the network, at most."""
        return cost(
            self._evaluator.forecaster.model,
            [one.params for one in self._entries],
            windows=sum(len(found) for found in self.windows.values()),
            passes=self.passes if self.fixed else self._run.max_passes,
        )

    def run(self, more: Mapping[str, Any]) -> list[dict[Part, Measurement]]:
        """Measure what is left, and return the measurements of every configuration; none where `errors` says why.

        more: what else the kept state holds. Raises ForecastError where a required one cannot be measured, Stopped,
        and what `Host.keep` raises.
        """
        if (kept := self._host.kept) is not None and kept["key"] == self.key:
            self._restore(kept)
            self._host.tell(f"goes on at {self._share:.0%}")
        self._share_before = self._share
        try:
            while self._done < len(self._steps):
                self._do(self._steps[self._done])
                if time.monotonic() - self._saved > SAVE_S:
                    self._save(more)
        except Stopped:
            self._save(more)
            raise
        return [
            {} if place in self.errors else {part: self._measurement(part, place) for part in PARTS}
            for place in range(len(self._entries))
        ]

    @property
    def largest_sampling_error(self) -> float:
        """Of the confirmed MAE of those that decide the number of passes, relative; once all is measured."""
        measured = [self._measurement("confirmation", place) for place in self._alive if self._entries[place].decides]
        return max((one.sampling_error / one.mae for one in measured if one.sampling_error and one.mae), default=0.0)

    @property
    def _alive(self) -> list[int]:
        return [place for place in range(len(self._entries)) if place not in self.errors]

    # -- a step ------------------------------------------------------------------------------------------------

    def _do(self, step: Step) -> None:
        """Measure one batch for all; nothing is noted of a batch that is broken off."""
        found: dict[int, np.ndarray] = {}
        spent: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        for place in self._alive:
            before = self._clock()
            try:
                with self._host.computing():
                    found[place] = self._errors(step, place)
            except ForecastError as error:
                if self._entries[place].required:
                    raise
                errors[place] = str(error)
            spent[place] = self._clock() - before
        for place, values in found.items():
            self._values[step.part][place][:, step.indices] = values
            self._spent[step.part][place] += spent[place]
        self.errors |= errors
        self._done += 1
        if step.kind == "look" and self._steps[self._done].kind != "look":
            self.passes = max((self._passes_needed(p) for p in self._alive if self._entries[p].decides), default=2)
        elif step.part == "confirmation" and step.kind != "look":
            self._race()

    def _errors(self, step: Step, place: int) -> np.ndarray:
        """What is kept of these windows, [2, w]."""

        def measured(passes: Sequence[int]) -> np.ndarray:
            windows, params = self.windows[step.part], self._entries[place].params
            return self._evaluator.batch_errors(windows, params, step.indices, passes=passes)

        passes = self._passes_of(step)
        if step.kind == "look":
            return measured(passes)
        if step.kind == "rest":
            looked = self._values[step.part][place][:, step.indices]
            return np.stack(over_passes(np.concatenate([looked, measured(passes)]) if passes else looked))
        return np.stack(over_passes(measured(passes)))

    def _passes_of(self, step: Step) -> Sequence[int]:
        if step.part == "validation":
            return SEARCH_PASSES
        looked = {"look": 0, "rest": 2, "all": 0}[step.kind]
        return range(FRESH_FROM + looked, FRESH_FROM + (2 if step.kind == "look" else self.passes))

    def _clock(self) -> np.ndarray:
        evaluator = self._evaluator
        return np.array([*(evaluator.seconds[stage] for stage in STAGES), evaluator.fresh, evaluator.fresh_s])

    # -- decisions ---------------------------------------------------------------------------------------------

    def _passes_needed(self, place: int) -> int:
        """As many as bring the error that sampling leaves in the MAE below the tolerance, by what two have shown.

        The error falls with the root of the passes, and with that of the windows.
        """
        windows, run = self.windows["confirmation"], self._run
        chunk = [index for step in self._steps if step.kind == "look" for index in step.indices]
        last = windows.last_closes[chunk]
        mean, variance = over_passes(self._values["confirmation"][place][:, chunk] / last)
        error = (standard_error(variance, 2) or 0.0) * math.sqrt(len(chunk) / len(windows))
        allowed = run.tolerance * float(mean.mean())
        if not error:
            return 2
        if error * math.sqrt(2 / run.max_passes) >= allowed:
            return run.max_passes
        return max(2, math.ceil(2 * (error / allowed) ** 2))

    def _race(self) -> None:
        """After every chunk, drop what cannot win any more: it is clearly worse than the best so far."""
        steps = [step for step in self._steps[: self._done] if step.part == "confirmation" and step.kind != "look"]
        done = [index for step in steps for index in step.indices]
        windows, alive = self.windows["confirmation"], self._alive
        if len(steps) % self._a_chunk or not RACE_FROM <= len(done) < len(windows) or not alive:
            return
        errors = self._values["confirmation"][:, 0][:, done] / windows.last_closes[done]
        best = min(alive, key=lambda place: (errors[place].mean(), place))
        for place in alive:
            worse = errors[place] - errors[best]
            margin = RACE_ERRORS * worse.std(ddof=1) / math.sqrt(len(done))
            if self._entries[place].races and worse.mean() > margin:
                self.errors[place] = (
                    f"dropped after {len(done)} windows: its MAE of {errors[place].mean():.4%} was more than "
                    f"{RACE_ERRORS:g} standard errors above the lowest, {errors[best].mean():.4%}"
                )

    # -- results and state ---------------------------------------------------------------------------------------

    def _measurement(self, part: Part, place: int) -> Measurement:
        *stages, fresh, fresh_s = self._spent[part][place].tolist()
        return measurement_of(
            self.windows[part],
            *self._values[part][place],
            passes=len(SEARCH_PASSES) if part == "validation" else self.passes,
            seconds=dict(zip(STAGES, stages, strict=True)),
            latency_s=fresh_s / fresh if fresh else None,
        )

    @property
    def _share(self) -> float:
        """Of the work, by windows and passes, as far as it is known now."""
        sizes = [len(step.indices) * len(self._passes_of(step)) for step in self._steps]
        return sum(sizes[: self._done]) / sum(sizes)

    def _save(self, more: Mapping[str, Any]) -> None:
        share, now = self._share, time.monotonic()
        gained = share - self._share_before
        self._host.keep(
            {
                "share": round(share, 4),
                "left_s": round((now - self._began) * (1 - share) / gained, 1) if gained > 0 else None,
                "key": self.key,
                "done": self._done,
                "passes": self.passes,
                "errors": {str(place): text for place, text in self.errors.items()},
                "values": {part: _packed(values) for part, values in self._values.items()},
                "spent": {part: _packed(values) for part, values in self._spent.items()},
                **more,
            }
        )
        self._saved = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._done, self.passes = state["done"], state["passes"]
        self.errors = {int(place): text for place, text in state["errors"].items()}
        self._values = {part: _unpacked(state["values"][part], like) for part, like in self._values.items()}
        self._spent = {part: _unpacked(state["spent"][part], like) for part, like in self._spent.items()}


def _packed(values: np.ndarray) -> str:
    """Little-endian float64, compressed, as text: what is not measured yet takes no room."""
    return base64.b64encode(zlib.compress(values.astype("<f8").tobytes(), 1)).decode()


def _unpacked(text: str, like: np.ndarray) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f8").reshape(like.shape).astype(float)
