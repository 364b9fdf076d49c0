"""Measure many configurations on a study's windows, batch after batch for all of them, by one worker or by several.

Owns the order, the number of passes and the race between candidates: both are decided from what was measured in that
order, whoever measured it and when. Every number is, to the last bit, the one of measuring that configuration alone and
in one go. Knows no storage.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
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
ORDER: tuple[Part, ...] = ("confirmation", "test", "validation")


class Stopped(BaseException):
    """A stop was asked for while a confirmation computed. Not an Exception, so that no handler of errors catches it."""


Computing = Callable[[], AbstractContextManager[None]]  # a context in which a request to stop raises Stopped


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


@dataclass(frozen=True, kw_only=True)
class Found:
    """What measuring one step gave, by place of the configuration."""

    values: Mapping[int, np.ndarray]  # price: of two passes or the rest the errors of each, [R, w]; of all, [2, w]
    spent: Mapping[int, np.ndarray]  # [len(STAGES) + 2]
    errors: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        places = list(self.values)
        return {
            "places": places,
            "values": _packed([self.values[place] for place in places]),
            "spent": _packed([self.spent[place] for place in places]),
            "errors": {str(place): text for place, text in self.errors.items()},
        }

    @staticmethod
    def from_json(said: Mapping[str, Any], windows: int) -> Found:
        """windows: of the step."""
        places = said["places"]
        values = _unpacked(said["values"]).reshape(len(places), -1, windows)
        spent = _unpacked(said["spent"]).reshape(len(places), len(STAGES) + 2)
        return Found(
            values=dict(zip(places, values, strict=True)),
            spent=dict(zip(places, spent, strict=True)),
            errors={int(place): text for place, text in said["errors"].items()},
        )


class Measuring:
    """The measurement of these configurations on all parts of a study's windows."""

    def __init__(self, run: StudyRun, evaluator: Evaluator, entries: Sequence[Entry]) -> None:
        self._run, self._evaluator, self.entries = run, evaluator, entries
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
        self.steps = [
            *(Step(part="confirmation", indices=indices, kind="look") for indices in first),
            *(Step(part="confirmation", indices=indices, kind="rest") for indices in first),
            *(
                Step(part=part, indices=indices, kind="all")
                for part in ORDER
                for indices in batches[part][len(first) if part == "confirmation" else 0 :]
            ),
        ]
        self._looks = len(first)
        self._done = 0  # steps that all decisions so far are made from
        self.found: dict[int, Found] = {}  # by the number of the step
        # By window, in price: mean and variance over the passes; of a window looked at, the errors of both passes.
        self._values = {part: np.full((len(entries), 2, len(found)), np.nan) for part, found in self.windows.items()}
        # By stage the seconds spent, then the windows encoded and the seconds to their points.
        self._spent = {part: np.zeros((len(entries), len(STAGES) + 2)) for part in PARTS}

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the numbers."""
        run = self._run
        asked = {
            "definition": fingerprint(run.study.definition),
            "windows": {part: found.origins for part, found in self.windows.items()},
            "passes": (run.max_passes, run.tolerance),
            "batch": (self._evaluator.rung, self._evaluator.batch, CHUNK),
            "entries": [[dict(one.params), one.decides, one.races] for one in self.entries],
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def cost(self) -> Cost:
        """What all of it asks of the network, at most."""
        return cost(
            self._evaluator.forecaster.model,
            [one.params for one in self.entries],
            windows=sum(len(found) for found in self.windows.values()),
            passes=self.passes if self.fixed else self._run.max_passes,
        )

    @property
    def left(self) -> list[int]:
        """The numbers of the steps that can be measured now: the passes are not known before all first looks are."""
        known = len(self.steps) if self._done >= self._looks else self._looks
        return [number for number in range(self._done, known) if number not in self.found]

    @property
    def needed(self) -> int:
        """How many of the first steps have to be known to measure any later one: all of them, where some race."""
        return len(self.steps) if any(one.races for one in self.entries) else self._looks

    @property
    def seconds(self) -> float:
        """What all that is found took."""
        return float(sum(spent[: len(STAGES)].sum() for found in self.found.values() for spent in found.spent.values()))

    def looked_at(self, number: int) -> int | None:
        """The step whose windows are those of this one, the rest of them; None where they are no rest."""
        return number - self._looks if self.steps[number].kind == "rest" else None

    def run(self, *, computing: Computing = contextlib.nullcontext) -> list[dict[Part, Measurement]]:
        """Measure what is left, and return the `measurements`. Raises what `measure` raises."""
        while self.left:
            number = self.left[0]
            self.take({number: self.measure(number, computing=computing)})
        return self.measurements

    def measure(self, number: int, *, computing: Computing = contextlib.nullcontext) -> Found:
        """Measure one of the steps that are `left` for all configurations that are not known to be out; notes nothing.

        Of those that drop out by a step between that is not known yet, what is found is left aside by `take`.
        Raises ForecastError where a required one cannot be measured, and Stopped.
        """
        found: dict[int, np.ndarray] = {}
        spent: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        for place in sorted(self._alive, key=self._samples_of, reverse=True):  # the draws of more serve those of fewer
            before = self._clock()
            try:
                with computing():
                    found[place] = self._errors(self.steps[number], place)
            except ForecastError as error:
                if self.entries[place].required:
                    raise
                errors[place] = str(error)
            spent[place] = self._clock() - before
        return Found(values=found, spent=spent, errors=errors)

    def take(self, found: Mapping[int, Found]) -> None:
        """Note what was measured, by step, and decide what can be decided from it: in order, whatever came first."""
        self.found |= found
        while self._done in self.found or self._is_known:
            self._note(self.steps[self._done], self.found.get(self._done, NOTHING))

    @property
    def measurements(self) -> list[dict[Part, Measurement]]:
        """Of every configuration, once nothing is left; none where `errors` says why."""
        return [
            {} if place in self.errors else {part: self._measurement(part, place) for part in PARTS}
            for place in range(len(self.entries))
        ]

    @property
    def largest_sampling_error(self) -> float:
        """Of the confirmed MAE of those that decide the number of passes, relative; once all is measured."""
        measured = [self._measurement("confirmation", place) for place in self._alive if self.entries[place].decides]
        return max((one.sampling_error / one.mae for one in measured if one.sampling_error and one.mae), default=0.0)

    @property
    def _alive(self) -> list[int]:
        return [place for place in range(len(self.entries)) if place not in self.errors]

    # -- a step ------------------------------------------------------------------------------------------------

    @property
    def _is_known(self) -> bool:
        """Whether the next step has nothing to measure, as two passes were enough."""
        return self._done < len(self.steps) and self.steps[self._done].kind == "rest" and self.passes == 2

    def _note(self, step: Step, found: Found) -> None:
        for place in self._alive:
            if place in found.errors:
                self.errors[place] = found.errors[place]
                continue
            values = self._values[step.part][place]
            if step.kind == "rest":
                looked = values[:, step.indices]
                by_pass = looked if self.passes == 2 else np.concatenate([looked, found.values[place]])
                values[:, step.indices] = np.stack(over_passes(by_pass))
            else:
                values[:, step.indices] = found.values[place]
            self._spent[step.part][place] += found.spent.get(place, 0.0)
        self._done += 1
        if step.kind == "look" and self._done == self._looks:
            self.passes = max((self._passes_needed(p) for p in self._alive if self.entries[p].decides), default=2)
        elif step.part == "confirmation" and step.kind != "look":
            self._race()

    def _errors(self, step: Step, place: int) -> np.ndarray:
        """What is noted of these windows."""
        errors = self._evaluator.batch_errors(
            self.windows[step.part], self.entries[place].params, step.indices, passes=self._passes_of(step), ahead=False
        )
        return np.stack(over_passes(errors)) if step.kind == "all" else errors

    def _samples_of(self, place: int) -> int:
        name = self._evaluator.forecaster.params.num_samples
        return int(self.entries[place].params.get(name, 0)) if name else 0

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
        chunk = [index for step in self.steps if step.kind == "look" for index in step.indices]
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
        steps = [step for step in self.steps[: self._done] if step.part == "confirmation" and step.kind != "look"]
        done = [index for step in steps for index in step.indices]
        windows, alive = self.windows["confirmation"], self._alive
        if len(steps) % self._a_chunk or not RACE_FROM <= len(done) < len(windows) or not alive:
            return
        errors = self._values["confirmation"][:, 0][:, done] / windows.last_closes[done]
        best = min(alive, key=lambda place: (errors[place].mean(), place))
        for place in alive:
            worse = errors[place] - errors[best]
            margin = RACE_ERRORS * worse.std(ddof=1) / math.sqrt(len(done))
            if self.entries[place].races and worse.mean() > margin:
                self.errors[place] = (
                    f"dropped after {len(done)} windows: its MAE of {errors[place].mean():.4%} was more than "
                    f"{RACE_ERRORS:g} standard errors above the lowest, {errors[best].mean():.4%}"
                )

    # -- results ---------------------------------------------------------------------------------------

    def _measurement(self, part: Part, place: int) -> Measurement:
        *stages, fresh, fresh_s = self._spent[part][place].tolist()
        return measurement_of(
            self.windows[part],
            *self._values[part][place],
            passes=len(SEARCH_PASSES) if part == "validation" else self.passes,
            seconds=dict(zip(STAGES, stages, strict=True)),
            latency_s=fresh_s / fresh if fresh else None,
        )


NOTHING = Found(values={}, spent={}, errors={})


def _packed(values: Sequence[np.ndarray]) -> str:
    """Little-endian float64, compressed, as text."""
    return base64.b64encode(zlib.compress(np.array(values).astype("<f8").tobytes(), 1)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f8").astype(float)
