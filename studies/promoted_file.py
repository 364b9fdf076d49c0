"""What is to become of one promoted file, what it then says, and what one says of how it came about.

The keys are those that the predecessor's readers expect; `metadata` says where the numbers come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from forecasters import CLOSE
from objectives.metrics import Measurement
from storage.configs import Record
from studies import space
from studies import study as studying
from studies.config import Config
from studies.ensembles import Ensemble
from studies.evidence import ENSEMBLE, PARTS, MeasuredConfiguration
from studies.findings import Finding
from studies.promotion import Decision, ReturnsDifference, Rule


@dataclass(frozen=True, kw_only=True)
class Offer:
    """An ensemble that was decided on, the study of each of its members, and what it is against the best single one."""

    ensemble: Ensemble
    findings: Sequence[Finding]
    over_single: Decision
    single: str  # the model of the best single one

    @property
    def main(self) -> Finding:
        """The study of the member with the largest weight."""
        return self.findings[int(np.argmax(self.ensemble.weights))]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of one file."""

    record: Record | None
    incumbent: MeasuredConfiguration | None  # how the record's configuration did on the same windows
    decision: Decision
    finding: Finding  # the study of the chosen candidate, or one that has none
    candidate: MeasuredConfiguration | None
    returns: ReturnsDifference | None = None  # of the candidate over the record's, where they were looked at
    ensemble: Offer | None = None  # where the candidate is one

    @property
    def model(self) -> str:
        """The model of the candidate."""
        return ENSEMBLE if self.ensemble else self.finding.study.model

    @property
    def worse_than_no_change(self) -> bool | None:
        """Whether the forecast that the price stays did better on the confirmation windows; None: not measured."""
        measured = self.candidate.confirmation if self.candidate else None
        return None if measured is None else measured.skill < 0


@dataclass(frozen=True, kw_only=True)
class EnsembleDecision:
    """What became of a symbol's ensemble. Improvements are over the best single configuration, on the later windows."""

    members: Sequence[Mapping[str, Any]] = ()  # of each its model, weight, study and trial; empty where there is none
    weights: str | None = None  # how they were found: "least squares" or "equal"
    fitted_windows: int | None = None
    windows: int | None = None  # later ones, which decide
    single: str | None = None  # the model of the best single configuration
    improvement: float | None = None
    improvement_low: float | None = None  # 95 % interval
    improvement_high: float | None = None
    p_value: float | None = None
    improvement_own: float | None = None  # of the symbol's own windows
    pooled_symbols: int | None = None
    improvement_test: float | None = None  # shown; decides nothing
    decision: str  # "promoted" or "kept"
    reason: str

    @classmethod
    def of(cls, verdict: Verdict) -> EnsembleDecision:
        """Of a verdict on an ensemble."""
        offer, candidate = verdict.ensemble, verdict.candidate
        assert offer is not None
        assert candidate is not None
        assert candidate.confirmation is not None
        over, made = offer.over_single, offer.ensemble
        low, high = over.comparison.interval or (None, None)
        return cls(
            members=[
                {"model": one.model, "weight": weight, "study": finding.study.name, "trial": one.trial}
                for one, weight, finding in zip(made.members, made.weights, offer.findings, strict=True)
            ],
            weights=made.how,
            fitted_windows=made.fitted_on,
            windows=candidate.confirmation.windows,
            single=offer.single,
            improvement=over.improvement,
            improvement_low=low,
            improvement_high=high,
            p_value=over.comparison.p_value,
            improvement_own=over.comparison.improvement_confirmation,
            pooled_symbols=over.comparison.symbols,
            improvement_test=over.comparison.improvement_test,
            decision="promoted" if verdict.decision.promote else "kept",
            reason=verdict.decision.reason,
        )


@dataclass(frozen=True, kw_only=True)
class InUse:
    """The decision that put a configuration in use, as its file says it; None: the file does not say.

    Improvements, over what was in use before, and skills are fractions. The names are those of a decision made now.
    """

    study: str | None
    trial: int | None
    promoted_at: str | None
    reason: str | None
    improvement: float | None
    improvement_low: float | None  # its 95 % interval; of a first promotion that over "no change"
    improvement_high: float | None
    p_value: float | None
    improvement_own: float | None
    pooled_symbols: int | None
    improvement_validation: float | None
    improvement_test: float | None
    skill: float | None
    worse_than_no_change: bool
    previous_model: str | None
    previous_config: Mapping[str, Any] | None

    @classmethod
    def of(cls, record: Record) -> InUse:
        """Read what `payload` writes. Files of others, and what people changed in one, may say anything."""
        said = record.metadata
        interval = said.get("improvement_interval")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        if _number(low) is None or _number(high) is None:
            low = high = None
        trial, symbols, before = said.get("trial"), said.get("pooled_symbols"), said.get("previous_config")
        return cls(
            study=_text(said.get("study")),
            trial=trial if isinstance(trial, int) else None,
            promoted_at=_text(said.get("promoted_at")),
            reason=_text(said.get("reason")),
            improvement=_number(said.get("improvement")),
            improvement_low=_number(low),
            improvement_high=_number(high),
            p_value=_number(said.get("p_value")),
            improvement_own=_number(said.get("improvement_own")),
            pooled_symbols=symbols if isinstance(symbols, int) else None,
            improvement_validation=_number(said.get("improvement_validation")),
            improvement_test=_number(said.get("improvement_test")),
            skill=_number(said.get("skill")),
            worse_than_no_change=said.get("worse_than_no_change") is True,
            previous_model=_text(said.get("previous_model")),
            previous_config=before if isinstance(before, dict) else None,
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def payload(config: Config, rule: Rule, verdict: Verdict) -> dict[str, Any]:
    """What a promoted file says: the keys that the predecessor's readers expect, and where the numbers come from."""
    finding, decision, candidate = verdict.finding, verdict.decision, verdict.candidate
    study, definition, evidence = finding.study, finding.study.definition, finding.evidence
    assert evidence is not None
    assert candidate is not None
    chosen = candidate.on(rule.part)
    assert chosen is not None
    incumbent = verdict.incumbent if decision.improvement is not None else None
    counts, comparison, offer = definition["windows"], decision.comparison, verdict.ensemble
    fixed = dict(finding.space.fixed)
    return {
        "symbol": study.symbol,
        "model": verdict.model,
        "config": _members(config, offer) if offer else space.to_promoted(candidate.params, finding.space, config),
        **{part: metrics(measured) for part in PARTS if (measured := candidate.on(part))},
        "windows": {
            "val_window": counts["validation"],
            "confirmation_window": chosen.windows if offer else evidence.windows["confirmation"].count,
            "test_window": counts["test"],
            "forecast_horizon": counts["horizon"],
        },
        "config_path": f"{config.hyperparams.dir.name}/{verdict.model}/{study.symbol}.json",
        "metadata": {
            "source": "forecast-studies",
            "study": study.name,
            "trial": candidate.trial,
            "as_of": study.as_of,
            "promoted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **({} if study.key == CLOSE else {"key": study.key}),
            "objective": definition["objective"],
            "selection_metric": f"{rule.part}.{definition['metric']}",
            "selection_value": chosen.mae,
            "previous_mae": incumbent.mae(rule.part) if incumbent else None,
            "previous_model": verdict.record.model if verdict.record else None,
            "previous_config": dict(verdict.record.config) if verdict.record else None,
            "improvement": decision.improvement,
            "improvement_own": comparison.improvement_confirmation if incumbent else None,
            "improvement_interval": comparison.interval,
            "pooled_symbols": comparison.symbols,
            "improvement_validation": comparison.improvement_validation,
            "improvement_test": comparison.improvement_test,
            "p_value": comparison.p_value,
            "reason": decision.reason,
            "skill": chosen.skill,
            "worse_than_no_change": verdict.worse_than_no_change,
            "clipped": candidate.clipped,
            "no_change_mae": chosen.no_change_mae,
            "passes": evidence.passes,
            "sampling_error": evidence.sampling_error,
            **({"ensemble": _how(offer)} if offer else {"fixed": fixed}),
            "fingerprint": studying.fingerprint(definition),
            **({} if offer else {"checkpoint": definition["checkpoint"]}),
            "bars": definition["bars"],
            "seeds": "symbol, origin, pass",
            **({"returns": asdict(verdict.returns)} if verdict.returns else {}),
            "versions": versions(),
        },
    }


def _members(config: Config, offer: Offer) -> dict[str, Any]:
    """An ensemble as its file says it; what each member rests on is said with it."""
    members = zip(offer.findings, offer.ensemble.members, offer.ensemble.weights, strict=True)
    return {
        "members": [
            {
                "model": one.model,
                "config": space.to_promoted(one.params, finding.space, config),
                "weight": weight,
                "study": finding.study.name,
                "trial": one.trial,
                "fixed": dict(finding.space.fixed),
                "checkpoint": finding.study.definition["checkpoint"],
            }
            for finding, one, weight in members
        ]
    }


def _how(offer: Offer) -> dict[str, Any]:
    """Where the weights of an ensemble come from, and what it gains over the best single configuration."""
    over = offer.over_single
    return {
        "weights": offer.ensemble.how,
        "fitted_windows": offer.ensemble.fitted_on,
        "single": offer.single,
        "improvement_single": over.improvement,
        "improvement_single_interval": over.comparison.interval,
        "p_value_single": over.comparison.p_value,
    }


def metrics(measured: Measurement) -> dict[str, Any]:
    """A measurement as a promoted file says it."""
    # The latency is unknown where the cache answered, and in older results.
    latency = {} if measured.latency_s is None else {"latency_s": round(measured.latency_s, 6)}
    return {
        "price_mae": measured.price_mae,
        "pct_return_mae": measured.mae,
        "mae_percent": measured.mae_percent,
        "skill": measured.skill,
        **latency,
        "num_predictions": measured.windows,
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {name: version(name) for name in ("forecast-studies", "optuna", "torch", "numpy")}
