"""Ensembles: weighted means of the points of several models' configurations, found from confirmed evidence alone.

The members are each model's best on the earlier half of the confirmation windows, which the weights are fitted to; the
later half decides. Owns how a promoted file says an ensemble. Pure but for that: no database, no models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from forecasters import ExpectedError
from objectives.ensemble import joined_fingerprints
from objectives.metrics import Measurement, measurement_of_errors, skill
from storage.commands import command
from storage.configs import Record, damaged
from studies import promotion
from studies import space as spaces
from studies.beliefs import Case, SymbolBeliefs
from studies.config import Config
from studies.evidence import ENSEMBLE, Came, MeasuredConfiguration, Part, StudyEvidence, lowest
from studies.promotion import MIN_WINDOWS, Decision, Rule

LEAST_WEIGHT = 0.01  # what has less is left out: it would cost a model, and change nothing


class NoEnsemble(ExpectedError):
    """There is none to be decided on."""


# --- in files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Member:
    """A part of an ensemble as its file says it."""

    model: str
    config: Mapping[str, Any]
    weight: float
    metadata: Mapping[str, Any]  # what `space.from_promoted` asks for


def members_of(record: Record) -> tuple[Member, ...]:
    """The members that a promoted ensemble says. Raises ConfigFileError."""
    try:
        return parse_members(record.config)
    except ValueError as error:
        raise damaged(record.path, str(error)) from None


def parse_members(config: Mapping[str, Any]) -> tuple[Member, ...]:
    """The members that a file's `config` says. Raises ValueError."""
    said = config.get("members")
    if not isinstance(said, list) or len(said) < 2 or not all(isinstance(one, dict) for one in said):
        raise ValueError("'config.members' is not a list of two members or more")
    for one in said:
        weight = one.get("weight")
        if not isinstance(one.get("model"), str) or not isinstance(one.get("config"), dict):
            raise ValueError("a member of 'config.members' has no 'model' or no 'config'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1:
            raise ValueError(f"the weight {weight!r} of the member {one['model']} is not between 0 and 1")
    if len({one["model"] for one in said}) < len(said):
        raise ValueError("two members of 'config.members' are of one model")
    if abs(sum(one["weight"] for one in said) - 1) > 1e-6:
        raise ValueError("the weights of 'config.members' do not add up to 1")
    return tuple(
        Member(
            model=one["model"].removesuffix("_compiled"),
            config=one["config"],
            weight=float(one["weight"]),
            metadata={"fixed": one.get("fixed")},
        )
        for one in said
    )


def models_of(record: Record) -> tuple[str, ...]:
    """The models that a promoted file's forecasts need. Raises ConfigFileError."""
    return tuple(one.model for one in members_of(record)) if record.model == ENSEMBLE else (record.model,)


def params_of(members: Sequence[tuple[str, Mapping[str, Any], float]]) -> dict[str, Any]:
    """An ensemble as params: of each member its model, its complete params and its weight."""
    return {"members": [{"model": model, "params": dict(p), "weight": weight} for model, p, weight in members]}


def complete(config: Config, model: str, said: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A promoted file's `config` as complete params, of an ensemble too. Raises ValueError for what is none."""
    if model != ENSEMBLE:
        return spaces.from_promoted(said, metadata, spaces.make(model, config))
    return params_of(
        [
            (one.model, spaces.from_promoted(one.config, one.metadata, spaces.make(one.model, config)), one.weight)
            for one in parse_members(said)
        ]
    )


def checkpoint_of(record: Record, checkpoint: Callable[[str], str]) -> str:
    """The fingerprint of all weights that a promoted file's forecasts need. checkpoint: of a model.

    Raises ConfigFileError, and what `checkpoint` raises.
    """
    found = {model: checkpoint(model) for model in models_of(record)}
    return joined_fingerprints(found) if record.model == ENSEMBLE else found[record.model]


# --- made of evidence ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Ensemble:
    """The ensemble that the earlier windows ask for."""

    members: Sequence[MeasuredConfiguration]
    weights: Sequence[float]
    how: Literal["least squares", "equal"]
    fitted_on: int  # windows
    configuration: MeasuredConfiguration  # its confirmation is of the later windows alone


def earlier(count: int, horizon: int) -> int:
    """How many of the first confirmation windows weights are fitted to: no bar of theirs is one of the later half's."""
    return max(count // 2 - (horizon - 1), 0)


def best_before(
    candidates: Sequence[MeasuredConfiguration], horizon: int, *, max_clipped: float = 1.0
) -> MeasuredConfiguration | None:
    """The candidate with the lowest error on the windows that weights are fitted to.

    max_clipped: share of origins whose last close it may clip, if there is one that does not.
    """

    def error(one: MeasuredConfiguration) -> float | None:
        errors = one.confirmation.errors if one.confirmation else ()
        found = errors[: earlier(len(errors), horizon)]
        return sum(found) / len(found) if found else None

    allowed = [one for one in candidates if (one.clipped or 0.0) <= max_clipped]
    return lowest(allowed, error) or lowest(candidates, error)


def make(evidence: Mapping[str, StudyEvidence]) -> Ensemble:
    """The ensemble of comparable studies, by name. What came after the earlier windows changes nothing of it.

    Raises NoEnsemble, which says why there is none.
    """
    if len(evidence) < 2:
        raise NoEnsemble("needs two models or more that are confirmed on the same windows")
    members = []
    for name, one in evidence.items():
        came = one.came.get("confirmation")
        horizon = _horizon(came) if came else 1
        best = best_before([each for each in one.candidates if came is None or each.points], horizon)
        if came is None or best is None:
            again = command(f"studies confirm {name}")
            raise NoEnsemble(f"{name} was confirmed before points were kept; confirm it again with: {again}")
        members.append(best)
    came = next(iter(evidence.values())).came["confirmation"]
    count, horizon = len(came.last_closes), _horizon(came)
    first = earlier(count, horizon)
    if min(first, count - count // 2) < MIN_WINDOWS:
        raise NoEnsemble(f"needs {2 * (MIN_WINDOWS + horizon - 1)} confirmation windows; there are {count}")
    errors = np.array([one.points["confirmation"] for one in members]) - np.array(came.returns)  # [M, W * H]
    weights, how = fit(errors.reshape(len(members), count, horizon)[:, :first])
    heaviest = sorted(range(len(members)), key=lambda place: -weights[place])
    kept = [place for place in heaviest if weights[place] >= LEAST_WEIGHT]
    if len(kept) < 2:
        raise NoEnsemble(f"all the weight is {members[kept[0]].model}'s")
    total = float(sum(weights[place] for place in kept))
    chosen = [(members[place], float(weights[place]) / total) for place in kept]
    configuration = measured(chosen, next(iter(evidence.values())), later_only=True)
    assert configuration is not None
    return Ensemble(
        members=[one for one, _ in chosen],
        weights=[weight for _, weight in chosen],
        how=how,
        fitted_on=first,
        configuration=configuration,
    )


def fit(errors: np.ndarray) -> tuple[np.ndarray, Literal["least squares", "equal"]]:
    """Weights [M] from the members' signed errors [M, W, H], oldest window first, and how they were found.

    By non-negative least squares where that is clearly better than equal weights: on either half with the weights that
    the other half asks for, with a 95 % interval of the improvement above 0.
    """
    members, count, horizon = errors.shape
    equal, half = np.full(members, 1 / members), count // 2
    crossed = np.concatenate(
        [_mean_errors(least_squares(errors[:, half:]), errors[:, :half]),
         _mean_errors(least_squares(errors[:, :half]), errors[:, half:])]
    )  # fmt: skip
    plain = _mean_errors(equal, errors)
    if not (level := plain.mean()) > 0:
        return equal, "equal"
    gains = promotion.resampled_gains(plain / level, crossed / level, least_block=horizon)
    if gains is None or promotion.interval_of(gains)[0] <= 0:
        return equal, "equal"
    return least_squares(errors), "least squares"


def least_squares(errors: np.ndarray) -> np.ndarray:
    """The weights [M], none below 0 and 1 together, whose mean of signed errors [M, W, H] has the least squares."""
    from scipy.optimize import nnls  # here: most commands fit no weights

    rows = errors.reshape(len(errors), -1).T  # [N, M]
    # With a row that asks the weights to add up to any number above 0, of any size: scaled to 1, the best weights are
    # the best of those that add up to 1, as the least sum of squares only grows with theirs.
    size = math.sqrt(float((rows**2).sum()) / len(errors)) or 1.0
    found, _ = nnls(np.vstack([rows, np.full(len(errors), size)]), np.append(np.zeros(len(rows)), size))
    return found / found.sum()


def _mean_errors(weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The errors of the weighted mean, [W]."""
    return np.abs(np.tensordot(weights, errors, axes=1)).mean(axis=1)


def _horizon(came: Came) -> int:
    return len(came.returns) // len(came.last_closes)


def measured(
    members: Sequence[tuple[MeasuredConfiguration, float]], evidence: StudyEvidence, *, later_only: bool = False
) -> MeasuredConfiguration | None:
    """How the weighted mean of measured configurations did; None where points of one were not kept.

    evidence: of any study of the same windows. later_only: of the confirmation the later half.
    """
    found: dict[Part, Measurement] = {}
    for part, came in evidence.came.items():
        if any(len(one.points.get(part, ())) != len(came.returns) for one, _ in members):
            continue
        first = len(came.last_closes) // 2 if later_only and part == "confirmation" else 0
        last, returns = np.array(came.last_closes), np.array(came.returns).reshape(len(came.last_closes), -1)
        points = sum(weight * np.array(one.points[part]).reshape(returns.shape) for one, weight in members)
        errors, last, returns = np.abs(points - returns).mean(axis=1)[first:], last[first:], returns[first:]
        still = evidence.no_change[part]
        no_change_mae = float(np.mean(still.errors[first:])) if first else still.mae
        mae, price_mae = float(errors.mean()), float((errors * last).mean())
        found[part] = Measurement(
            mae=mae,
            price_mae=price_mae,
            mae_percent=float(100 * price_mae / (last[:, None] * (1 + returns)).mean()),
            no_change_mae=no_change_mae,
            skill=skill(mae, no_change_mae),
            errors=tuple(errors.tolist()),
            windows=len(last),
            seconds={},
        )
    if "confirmation" not in found:
        return None
    clipped = [one.clipped for one, _ in members if one.clipped is not None]
    return MeasuredConfiguration(
        model=ENSEMBLE,
        params=params_of([(one.model, one.params, weight) for one, weight in members]),
        clipped=max(clipped, default=None),
        **found,
    )


# --- decided on the later windows ---------------------------------------------------------------------------


def later(one: MeasuredConfiguration, no_change: MeasuredConfiguration) -> MeasuredConfiguration:
    """A configuration as it did on the later half of the confirmation windows. no_change: on all of them."""
    if one.confirmation is None or no_change.confirmation is None:
        return one
    errors, still = (each.errors[len(each.errors) // 2 :] for each in (one.confirmation, no_change.confirmation))
    if not errors or not still:
        return one
    mae, no_change_mae = sum(errors) / len(errors), sum(still) / len(still)
    return replace(one, confirmation=measurement_of_errors(errors, mae=mae, no_change_mae=no_change_mae))


def later_case(case: Case, offered: Ensemble | None) -> Case:
    """What is pooled to decide on ensembles: what was measured on the later windows, with the one that is offered."""

    def only(those: Sequence[MeasuredConfiguration]) -> list[MeasuredConfiguration]:
        return [later(one, case.no_change) for one in those]

    return replace(
        case,
        candidates=only(case.candidates),
        in_use=only(case.in_use),
        offered=[offered.configuration] if offered else [],
        no_change=later(case.no_change, case.no_change),
    )


def decide(
    offered: Ensemble,
    best: MeasuredConfiguration,
    incumbent: MeasuredConfiguration | None,
    no_change: MeasuredConfiguration,
    rule: Rule,
    believed: SymbolBeliefs | None,
) -> tuple[Decision, Decision]:
    """Whether an ensemble may replace the incumbent, and the best single configuration: it is promoted if both say so.

    Both by the rule of promotions, on the later windows. believed: of `later_case`. All else is of all windows.
    """
    new, still = offered.configuration, later(no_change, no_change)

    def against(one: MeasuredConfiguration | None) -> Decision:
        rival = None if one is None else later(one, no_change)
        beliefs = believed.on([new], rival) if believed else None
        return promotion.decide([new], rival, still, rule, confirmed=True, stale=False, beliefs=beliefs)

    return against(incumbent), against(best)
