"""What a confirmation measured, as typed values: with one reader and one writer of the JSON that a slot keeps.

Everything that decides on a confirmation or shows one reads these. Knows nothing of how it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from objectives.metrics import Measurement
from storage import slots
from storage.progress import pick_results
from storage.retrying import RetryingStorage

Part = Literal["validation", "confirmation", "test"]
PARTS: tuple[Part, ...] = ("validation", "confirmation", "test")
Source = Literal["trial", "grid", "default", "portfolio", "in use"]
INCUMBENT, STORED = "incumbent", "stored"  # labels of what is in use: what `best` names, the model's own file

OPTIONAL = (*PARTS, "trial", "error", "low", "high")  # fields that JSON leaves out where they are empty

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WindowSpan:
    """Which windows a part of the evidence is of: their number, and the times of the first and last target bar."""

    count: int
    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class MeasuredConfiguration:
    """A configuration and how it did; one that could not be measured says why in `error` and has no measurement."""

    model: str
    params: Mapping[str, Any]
    trial: int | None = None  # number of the trial that proposed it
    source: Source = "trial"  # why it was measured
    clipped: float | None = (
        None  # share of the last CLIP_ORIGINS origins whose last close it clips; None: it clips none
    )
    validation: Measurement | None = None  # on the windows of the search, with the seeds of the search
    confirmation: Measurement | None = None
    test: Measurement | None = None
    error: str | None = None

    def on(self, part: Part) -> Measurement | None:
        return {"validation": self.validation, "confirmation": self.confirmation, "test": self.test}[part]

    def mae(self, part: Part) -> float | None:
        measured = self.on(part)
        return None if measured is None else measured.mae


@dataclass(frozen=True, kw_only=True)
class NoChange:
    """How the forecast that the price stays at the last close did on the same windows."""

    mae: float
    errors: tuple[float, ...] = ()  # [W]; empty where an older result did not keep them


@dataclass(frozen=True, kw_only=True)
class ForecastSeries:
    """One configuration's forecasts of consecutive bars, prices; the band is of 10 to 90 % of its samples."""

    trial: int | None = None
    points: tuple[float, ...]  # [N]
    low: tuple[float, ...] = ()  # [N], or empty: a model with an exact mean alone has no band
    high: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForecastsShown:
    """What pictures of a forecast draw of one part: windows that share no bar, oldest first."""

    times: tuple[str, ...]  # [N] of the target bars
    actual: tuple[float, ...]  # [N] closes
    starts: tuple[int, ...]  # where each window begins
    series: Mapping[str, ForecastSeries]  # by "best" and "incumbent"


@dataclass(frozen=True, kw_only=True)
class StudyEvidence:
    """What the confirmation of a study measured: its best trials and the configurations in use, on equal windows.

    `candidates` are in the order of the search, best first. `in_use` is by label, INCUMBENT or STORED.
    """

    windows: Mapping[Part, WindowSpan]
    passes: int  # draws with fresh seeds that every number but the search's is a mean of
    sampling_error: float  # largest relative standard error of a confirmed MAE that sampling alone leaves
    candidates: tuple[MeasuredConfiguration, ...]
    in_use: Mapping[str, MeasuredConfiguration]
    no_change: Mapping[Part, NoChange]
    forecasts: Mapping[Part, ForecastsShown]  # empty in older results

    @property
    def best(self) -> MeasuredConfiguration | None:
        """The candidate with the lowest error on the confirmation windows."""
        return self.best_on("confirmation")

    def best_on(self, part: Part) -> MeasuredConfiguration | None:
        """The candidate with the lowest error on a part of the windows, the first of equal ones."""
        return lowest(self.candidates, lambda one: one.mae(part))

    @property
    def ranked(self) -> list[MeasuredConfiguration]:
        """The candidates by their error on the confirmation windows, lowest first."""
        return sorted(self.candidates, key=lambda one: one.confirmation.mae if one.confirmation else float("inf"))

    @property
    def incumbent(self) -> MeasuredConfiguration | None:
        """The configuration in use, where there is one that could be measured."""
        found = self.in_use.get(INCUMBENT)
        return found if found is not None and found.error is None else None

    @property
    def improvement(self) -> float | None:
        """Of the best over the incumbent on the confirmation windows, relative."""
        best, incumbent = self.best, self.incumbent
        if best is None or incumbent is None:
            return None
        return relative_gain(incumbent.mae("confirmation"), best.mae("confirmation"))

    @property
    def no_change_configuration(self) -> MeasuredConfiguration:
        """The forecast that the price stays, as if it were a configuration."""
        parts = {part: _measured(one) for part, one in self.no_change.items()}
        return MeasuredConfiguration(
            model="no change",
            params={},
            validation=parts.get("validation"),
            confirmation=parts.get("confirmation"),
            test=parts.get("test"),
        )

    def find(self, params: Mapping[str, Any]) -> MeasuredConfiguration | None:
        """The configuration with these params, where it is among those measured."""
        return next((one for one in (*self.in_use.values(), *self.candidates) if one.params == params), None)


def _measured(no_change: NoChange) -> Measurement:
    return Measurement(
        mae=no_change.mae,
        price_mae=math.nan,
        mae_percent=math.nan,
        no_change_mae=no_change.mae,
        skill=0.0,
        errors=no_change.errors,
        sampling_error=None,
        windows=len(no_change.errors),
        seconds={},
        latency_s=None,
    )


def lowest(items: Iterable[T], value: Callable[[T], float | None]) -> T | None:
    """The item with the lowest value, the first of equal ones; items without a value are passed over."""
    known = [(found, place, item) for place, item in enumerate(items) if (found := value(item)) is not None]
    return min(known, key=lambda one: one[:2])[2] if known else None


def relative_gain(old: float | None, new: float | None) -> float | None:
    """(old - new) / old; None where one is not known or there was no error to improve on."""
    return None if old is None or new is None or not old else (old - new) / old


def params_text(params: Mapping[str, Any]) -> str:
    """Params in one line, numbers as people write them: "aggregate=mean clip=2.4 num_samples=64"."""
    return " ".join(f"{name}={f'{one:.6g}' if isinstance(one, float) else one}" for name, one in params.items())


# --- JSON ---------------------------------------------------------------------------------------------------


def to_json(evidence: StudyEvidence) -> dict[str, Any]:
    """The evidence as the result of a confirmation slot."""
    values = asdict(evidence, dict_factory=_written)
    values["baselines"] = values.pop("in_use")
    return values


def _written(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a dataclass, but for the model, which the study names, and for what is not there."""
    return {name: value for name, value in fields if name != "model" and not (name in OPTIONAL and value in (None, ()))}


def from_json(model: str, values: Mapping[str, Any]) -> StudyEvidence:
    """The inverse of `to_json`; what an older result lacks is left empty."""
    return StudyEvidence(
        windows={part: WindowSpan(**span) for part, span in values["windows"].items()},
        passes=values["passes"],
        sampling_error=values["sampling_error"],
        candidates=tuple(_configuration(model, one) for one in values["candidates"]),
        in_use={label: _configuration(model, one) for label, one in values["baselines"].items()},
        no_change={part: NoChange(**_with_tuples(one)) for part, one in values["no_change"].items()},
        forecasts={part: _forecasts(one) for part, one in values.get("forecasts", {}).items()},
    )


def measurement_json(measured: Measurement, *, errors: bool = True) -> dict[str, Any]:
    """A measurement as JSON values, with its errors by window unless they are not wanted."""
    left_out = () if errors else ("errors", "sampling_error", "latency_s")
    return {name: value for name, value in asdict(measured).items() if name not in left_out}


def _configuration(model: str, values: Mapping[str, Any]) -> MeasuredConfiguration:
    parts = {part: Measurement(**_with_tuples(values[part])) for part in PARTS if part in values}
    return MeasuredConfiguration(**{"model": model, **values, **parts})


def _forecasts(values: Mapping[str, Any]) -> ForecastsShown:
    series = {name: ForecastSeries(**_with_tuples(one)) for name, one in values["series"].items()}
    return ForecastsShown(**{**_with_tuples(values), "series": series})


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's values with tuples in place of its lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# --- many studies at once -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConfirmedSummary:
    """The few numbers of a study's evidence that a list of studies shows."""

    mae: float | None  # the lowest of the candidates on the confirmation windows
    skill: float | None  # of that one
    incumbent_mae: float | None
    incumbent_validation_mae: float | None


# jsonpath of what `to_json` writes; a configuration that could not be measured has none of it.
_SUMMARY_PATHS = {
    "mae": "$.candidates[*].confirmation.mae",
    "skill": "$.candidates[*].confirmation.skill",
    "incumbent": f"$.baselines.{INCUMBENT}.confirmation.mae",
    "incumbent_validation": f"$.baselines.{INCUMBENT}.validation.mae",
}


def read_summaries(storage: RetryingStorage, study_ids: Sequence[int] | None = None) -> dict[int, ConfirmedSummary]:
    """The summary of every confirmed study, or of these, by study id, in one query; the evidence stays in the server.

    Raises DatabaseUnavailable.
    """
    found = pick_results(storage, slots.CONFIRMATION, _SUMMARY_PATHS, study_ids)
    return {study_id: _summary(values) for study_id, values in found.items()}


# What a confirmation was of: all that opening a study asks of a result.
MEASURED_PATHS = {"windows": "$.windows.confirmation", "candidates": "$.candidates[*].params"}


def _summary(values: Mapping[str, Sequence[float]]) -> ConfirmedSummary:
    best = lowest(zip(values["mae"], values["skill"], strict=True), lambda one: one[0])
    return ConfirmedSummary(
        mae=best[0] if best else None,
        skill=best[1] if best else None,
        incumbent_mae=next(iter(values["incumbent"]), None),
        incumbent_validation_mae=next(iter(values["incumbent_validation"]), None),
    )
