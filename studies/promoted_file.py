"""What is to become of one promoted file, what it then says, and what one says of how it came about.

The keys are those that the predecessor's readers expect; `metadata` says where the numbers come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from forecasters import CLOSE
from objectives.metrics import Measurement
from storage.configs import Record
from studies import space
from studies import study as studying
from studies.config import Config
from studies.evidence import PARTS, MeasuredConfiguration
from studies.findings import Finding
from studies.promotion import Decision, ReturnsDifference, Rule


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of one file."""

    record: Record | None
    incumbent: MeasuredConfiguration | None  # how the record's configuration did on the same windows
    decision: Decision
    finding: Finding  # the study of the chosen candidate, or one that has none
    candidate: MeasuredConfiguration | None
    returns: ReturnsDifference | None = None  # of the candidate over the record's, where they were looked at

    @property
    def worse_than_no_change(self) -> bool | None:
        """Whether the forecast that the price stays did better on the confirmation windows; None: not measured."""
        measured = self.candidate.confirmation if self.candidate else None
        return None if measured is None else measured.skill < 0


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
    counts, comparison = definition["windows"], decision.comparison
    return {
        "symbol": study.symbol,
        "model": study.model,
        "config": space.to_promoted(candidate.params, finding.space, config),
        **{part: metrics(measured) for part in PARTS if (measured := candidate.on(part))},
        "windows": {
            "val_window": counts["validation"],
            "confirmation_window": evidence.windows["confirmation"].count,
            "test_window": counts["test"],
            "forecast_horizon": counts["horizon"],
        },
        "config_path": f"{config.hyperparams.dir.name}/{study.model}/{study.symbol}.json",
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
            "no_change_mae": evidence.no_change[rule.part].mae,
            "passes": evidence.passes,
            "sampling_error": evidence.sampling_error,
            "fixed": dict(finding.space.fixed),
            "fingerprint": studying.fingerprint(definition),
            "checkpoint": definition["checkpoint"],
            "bars": definition["bars"],
            "seeds": "symbol, origin, pass",
            **({"returns": asdict(verdict.returns)} if verdict.returns else {}),
            "versions": versions(),
        },
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
