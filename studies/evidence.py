"""What a confirmation measured, as typed values: with one reader and one writer of the JSON that a slot keeps.

Everything that decides on a confirmation or shows one reads these. Knows nothing of how it was measured.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from objectives.metrics import Measurement, measurement_of_errors, skill
from storage import slots
from storage.progress import pick_results
from storage.retrying import RetryingStorage

Part = Literal["validation", "confirmation", "test"]
PARTS: tuple[Part, ...] = ("validation", "confirmation", "test")
Source = Literal["trial", "grid", "default", "portfolio", "in use"]
# Labels of what is in use: what `best` names, the model's own file, the model's part of the ensemble that `best` names.
INCUMBENT, STORED, MEMBER = "incumbent", "stored", "member"
ENSEMBLE = "ensemble"  # the model that a weighted mean of several models' configurations is of

# Fields that JSON leaves out where they are empty.
OPTIONAL = (*PARTS, "trial", "clipped", "error", "low", "high", "points", "came")
# What JSON leaves out of a measurement, as the evidence says it elsewhere; of the grid also what nobody looks at.
IMPLIED, UNSEEN = ("no_change_mae", "windows"), ("seconds", "latency_s")
ROUNDED = ("price_mae", "mae_percent", "sampling_error")  # to seven digits

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
    clipped: float | None = None  # share of the last CLIP_ORIGINS origins whose last close it clips; None: clips none
    validation: Measurement | None = None  # on the windows of the search, with the seeds of the search
    confirmation: Measurement | None = None
    test: Measurement | None = None
    error: str | None = None
    # Of the configurations that an ensemble may be made of: by part the points [W * H] of one pass, as returns.
    points: Mapping[Part, tuple[float, ...]] = field(default_factory=dict)

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
class Came:
    """What came in the windows that points are of, of H steps each."""

    returns: tuple[float, ...]  # [W * H], over the last close before the window
    last_closes: tuple[float, ...]  # [W]


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
    """What the confirmation of a study measured, all on equal windows: its candidates, and the configurations in use.

    `candidates` are trials in the order of the search, best first; then those of their grid or of other symbols; then
    the default. One that was dropped on the way says so in its `error`. `in_use` is by label, of those above.
    """

    windows: Mapping[Part, WindowSpan]
    passes: int  # draws with fresh seeds that every number but the search's is a mean of
    sampling_error: float  # largest relative standard error that sampling alone leaves, of trials and what is in use
    candidates: tuple[MeasuredConfiguration, ...]
    in_use: Mapping[str, MeasuredConfiguration]
    no_change: Mapping[Part, NoChange]
    forecasts: Mapping[Part, ForecastsShown]  # empty in older results
    came: Mapping[Part, Came] = field(default_factory=dict)  # empty in older results

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
        parts = {
            part: measurement_of_errors(one.errors, mae=one.mae, no_change_mae=one.mae)
            for part, one in self.no_change.items()
        }
        return MeasuredConfiguration(
            model="no change",
            params={},
            validation=parts.get("validation"),
            confirmation=parts.get("confirmation"),
            test=parts.get("test"),
        )

    def title(self, one: MeasuredConfiguration) -> str:
        """How tables and figures name a candidate: "trial 7", "default", "grid 3"."""
        if one.source == "default" or one.trial is None:
            alike = [each for each in self.candidates if each.source == one.source and each.trial is None]
            number = next((n for n, each in enumerate(alike, 1) if each is one), 0)
            return one.source if one.source == "default" else f"{one.source} {number}"
        return f"trial {one.trial}"

    def find(self, params: Mapping[str, Any]) -> MeasuredConfiguration | None:
        """The configuration with these params, where it is among those measured."""
        return next((one for one in (*self.in_use.values(), *self.candidates) if one.params == params), None)


def lowest(items: Iterable[T], value: Callable[[T], float | None]) -> T | None:
    """The item with the lowest value, the first of equal ones; items without a value are passed over."""
    known = [(found, place, item) for place, item in enumerate(items) if (found := value(item)) is not None]
    return min(known, key=lambda one: one[:2])[2] if known else None


def relative_gain(old: float | None, new: float | None) -> float | None:
    """(old - new) / old; None where one is not known or there was no error to improve on."""
    return None if old is None or new is None or not old else (old - new) / old


def params_text(params: Mapping[str, Any]) -> str:
    """Params in one line, numbers as people write them: "aggregate=mean clip=2.4 num_samples=64".

    Those of an ensemble are its members: "toto 0.62, kronos 0.38".
    """
    if isinstance(members := params.get("members"), Sequence):
        known = [one for one in members if isinstance(one, Mapping) and isinstance(one.get("weight"), int | float)]
        return ", ".join(f"{one.get('model')} {one['weight']:.2f}" for one in known)
    return " ".join(f"{name}={f'{one:.6g}' if isinstance(one, float) else one}" for name, one in params.items())


# --- JSON ---------------------------------------------------------------------------------------------------


def to_json(evidence: StudyEvidence, *, compact: bool = True) -> dict[str, Any]:
    """The evidence as the result of a confirmation slot; not compact: with all numbers as people read them."""
    values = asdict(evidence, dict_factory=_compact if compact else _written)
    values["baselines"] = values.pop("in_use")
    for one in () if compact else (values, *values["candidates"], *values["baselines"].values()):
        one.pop("came" if one is values else "points", None)  # what no person reads
    for one in (*values["candidates"], *values["baselines"].values()) if compact else ():
        for part in [part for part in PARTS if part in one]:
            left_out = UNSEEN if one["source"] == "grid" else ()
            left_out += () if part == "confirmation" else ("skill",)  # lists of studies ask the server for that one
            one[part] = {name: value for name, value in one[part].items() if name not in left_out}
    return values


def _written(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a dataclass, but for the model, which the study names, and for what is not there."""
    return {
        name: value for name, value in fields if name != "model" and not (name in OPTIONAL and value in (None, (), {}))
    }


def _compact(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """The same without what is said elsewhere, errors as `errors_text`, and numbers no longer than they matter."""
    found = _written(fields)
    if "skill" in found:
        found = {name: _rounded(value) if name in ROUNDED else value for name, value in found.items()}
        found = {name: value for name, value in found.items() if name not in IMPLIED}
    return {name: _packed(name, value) for name, value in found.items()}


def _packed(name: str, value: Any) -> Any:
    """Long rows of numbers as text."""
    if name == "points" and isinstance(value, Mapping):
        return {part: errors_text(row) for part, row in value.items()}
    return errors_text(value) if name in ("errors", "returns", "last_closes") else value


def errors_text(errors: Sequence[float]) -> str:
    """Errors as base64 of little-endian float32: a sixth of what they take as JSON's numbers."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, which nothing believes
        return base64.b64encode(np.asarray(errors, dtype="<f4").tobytes()).decode()


def _errors(found: str | Sequence[float]) -> tuple[float, ...]:
    """The inverse of `errors_text`; older results have a list."""
    return tuple(np.frombuffer(base64.b64decode(found), "<f4").tolist() if isinstance(found, str) else found)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def from_json(model: str, values: Mapping[str, Any], parts: Sequence[Part] = PARTS) -> StudyEvidence:
    """The inverse of `to_json`; what an older result lacks is left empty. parts: those whose measurements are read."""
    implied = {
        part: {"no_change_mae": values["no_change"][part]["mae"], "windows": span["count"], "seconds": {}}
        for part, span in values["windows"].items()
    }
    return StudyEvidence(
        windows={part: WindowSpan(**span) for part, span in values["windows"].items()},
        passes=values["passes"],
        sampling_error=values["sampling_error"],
        candidates=tuple(_configuration(model, one, implied, parts) for one in values["candidates"]),
        in_use={
            label: _configuration(model, {**one, "source": "in use"}, implied, parts)
            for label, one in values["baselines"].items()
        },
        no_change={
            part: NoChange(mae=one["mae"], errors=_errors(one.get("errors", ())))
            for part, one in values["no_change"].items()
        },
        forecasts={part: _forecasts(one) for part, one in values.get("forecasts", {}).items()},
        came={
            part: Came(returns=_errors(one["returns"]), last_closes=_errors(one["last_closes"]))
            for part, one in values.get("came", {}).items()
        },
    )


def measurement_json(measured: Measurement) -> dict[str, Any]:
    """A measurement as JSON values, without its errors by window."""
    left_out = ("errors", "sampling_error", "latency_s")
    return {name: value for name, value in asdict(measured).items() if name not in left_out}


def _configuration(
    model: str, values: Mapping[str, Any], implied: Mapping[str, Mapping[str, Any]], parts: Sequence[Part]
) -> MeasuredConfiguration:
    def measurement(part: Part) -> Measurement:
        said = {**implied[part], **values[part]}
        said["errors"] = _errors(said.get("errors", ()))
        return Measurement(**{"skill": skill(said["mae"], said["no_change_mae"]), **said})

    measured = {part: measurement(part) if part in parts else None for part in PARTS if part in values}
    points = {part: _errors(row) for part, row in values.get("points", {}).items() if part in parts}
    return MeasuredConfiguration(**{"model": model, **values, **measured, "points": points})


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
MEASURED_PATHS = {
    "windows": "$.windows.confirmation",
    "candidates": "$.candidates[*] ? (exists(@.confirmation)).params",
}


def _summary(values: Mapping[str, Sequence[float]]) -> ConfirmedSummary:
    best = lowest(zip(values["mae"], values["skill"], strict=True), lambda one: one[0])
    return ConfirmedSummary(
        mae=best[0] if best else None,
        skill=best[1] if best else None,
        incumbent_mae=next(iter(values["incumbent"]), None),
        incumbent_validation_mae=next(iter(values["incumbent_validation"]), None),
    )
