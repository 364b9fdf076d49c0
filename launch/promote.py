"""Gather what the update rule needs, show what it decides, write what it promotes.

Reads the studies and the promoted files; loads no model. The rule itself is studies/promotion.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from storage import configs, slots
from storage.configs import Record
from storage.database import RetryingStorage
from studies import promotion, space
from studies import study as studying
from studies.config import Config
from studies.promotion import Decision, Measured
from studies.space import Space
from studies.study import Study

FOLDERS = ("best", "optimized_compiled")  # written beside the model's own
SAME = ("metric", "objective", "bars", "windows")  # parts of a definition that make two models comparable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One symbol's decision, as shown and as --json prints it."""

    symbol: str
    study: str
    model: str
    candidates: Mapping[str, float | None]  # the best MAE of every model that has a study
    incumbent_model: str | None
    incumbent_mae: float | None
    best_mae: float | None
    improvement: float | None  # relative
    skill: float | None
    test_mae: float | None
    incumbent_test_mae: float | None
    decision: str  # "promoted" or "kept"
    reason: str
    path: str | None  # the file of the decision, where there is one
    written: Sequence[str]  # every file written, or that a dry run would write


class NothingToPromote(ValueError):
    """There is no study to promote from."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A study and what its confirmation measured; None: it is not finished."""

    study: Study
    space: Space
    confirmation: Mapping[str, Any] | None

    @property
    def candidate(self) -> Mapping[str, Any] | None:
        """The best trial, measured."""
        return self.confirmation["candidate"] if self.confirmation else None

    @property
    def mae(self) -> float:
        return self.candidate["validation"]["mae"] if self.candidate else float("inf")

    def params_of(self, record: Record) -> dict[str, Any] | None:
        """A promoted file's configuration as this study's params; None where it is another model's or unreadable."""
        if record.model != self.study.model:
            return None
        try:
            return space.from_promoted(record.model, record.config, self.space)
        except ValueError:
            return None

    def measured(self, record: Record) -> Mapping[str, Any] | None:
        """The baseline with this file's params; else the one that was in use when the study opened."""
        if self.confirmation is None or record.model != self.study.model:
            return None
        params = self.params_of(record)
        labels = [label for label in ("incumbent", "stored") if label in self.confirmation]
        baselines = [self.confirmation[label] for label in labels]
        exact = [baseline for baseline in baselines if baseline["params"] == params]
        return (exact or baselines or [None])[0]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of one file: the candidate of `finding` against `record`."""

    finding: Finding
    record: Record | None
    incumbent: Mapping[str, Any] | None  # how the record's configuration did on the same windows
    decision: Decision


def promote(
    storage: RetryingStorage,
    config: Config,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    min_improvement: float,
    force: bool,
    dry_run: bool,
) -> list[Row]:
    """Decide for every symbol that has a study, and write what is promoted unless `dry_run`.

    Every promoted file is read, and every decision made, before the first is written.
    Raises NothingToPromote, ConfigFileError.
    """
    newest: dict[str, dict[str, Study]] = {}
    for study in sorted(studying.list_studies(storage), key=lambda study: study.as_of):
        newest.setdefault(study.symbol, {})[study.model] = study
    asked = {symbol: [s for s in found.values() if s.model in models] for symbol, found in newest.items()}
    missing = [symbol for symbol in symbols if not asked.get(symbol)]
    if missing:
        raise NothingToPromote(f"{missing[0]}: no study; make one with: launch-workers --symbols {missing[0]}")
    wanted = list(symbols) or sorted(symbol for symbol, studies in asked.items() if studies)
    if not wanted:
        raise NothingToPromote("no study yet; make some with: launch-workers")
    progress = slots.progress(storage)

    def decide(finding: Finding, beside: Sequence[Finding], record: Record | None) -> Verdict:
        incumbent = _measured(finding, beside, record)
        return Verdict(
            finding=finding,
            record=record,
            incumbent=incumbent,
            decision=promotion.decide(
                _candidate(finding),
                _incumbent(record, [finding, *beside], incumbent),
                finished=finding.confirmation is not None,
                measured_incumbent=incumbent["params"] if incumbent else None,
                min_improvement=min_improvement,
                force=force,
            ),
        )

    cases = []
    for symbol in wanted:
        # A model that is not asked for may still have measured the incumbent.
        everyone = [_finding(storage, study, progress) for study in newest[symbol].values()]
        competing = [finding for finding in everyone if finding.study.model in models]
        best = min(competing, key=lambda finding: (finding.mae, finding.study.model))
        competing = [finding for finding in competing if _comparable(finding, best)]
        record = configs.read(config.hyperparams.dir, "best", symbol)
        verdict = decide(best, everyone, record)
        holder = best.study.model if verdict.decision.promote else record.model if record else None
        # Each model's own file keeps its own best; that of the model which `best` names says what `best` says.
        own = [
            decide(finding, everyone, configs.read(config.hyperparams.dir, finding.study.model, symbol))
            for finding in competing
            if finding.study.model != holder
        ]
        cases.append((verdict, own, competing))
    return [_carry_out(config, *case, dry_run=dry_run) for case in cases]


def _finding(storage: RetryingStorage, study: Study, progress: Mapping[int, slots.Progress]) -> Finding:
    finished = progress[study.study_id].open == 0
    found = slots.results(storage, study.study_id, slots.CONFIRMATION).get("confirmation") if finished else None
    return Finding(study=study, space=Space.from_json(study.model, study.definition["space"]), confirmation=found)


def _comparable(one: Finding, other: Finding) -> bool:
    return all(one.study.definition[part] == other.study.definition[part] for part in SAME)


def _candidate(finding: Finding) -> Measured | None:
    if finding.candidate is None:
        return None
    return Measured(model=finding.study.model, config=finding.candidate["params"], mae=finding.mae)


def _measured(finding: Finding, beside: Sequence[Finding], record: Record | None) -> Mapping[str, Any] | None:
    """How a file's configuration did on the windows of `finding`, in whichever model's study it was measured."""
    if record is None:
        return None
    for other in (finding, *beside):
        if _comparable(finding, other) and (found := other.measured(record)):
            return found
    return None


def _incumbent(
    record: Record | None, findings: Sequence[Finding], measured: Mapping[str, Any] | None
) -> Measured | None:
    if record is None:
        return None
    params = next((found for finding in findings if (found := finding.params_of(record))), None)
    mae = measured["validation"]["mae"] if measured else None
    return Measured(model=record.model, config=params or record.config, mae=mae)


def _carry_out(
    config: Config, verdict: Verdict, own: Sequence[Verdict], competing: Sequence[Finding], *, dry_run: bool
) -> Row:
    finding, decision, record = verdict.finding, verdict.decision, verdict.record
    study, candidate, root = finding.study, finding.candidate, config.hyperparams.dir
    writes = [(verdict, (study.model, *FOLDERS))] if decision.promote else []
    writes += [(other, (other.finding.study.model,)) for other in own if other.decision.promote]
    for each, folders in writes if not dry_run else []:
        digest = {"expected_digest": record.digest if record else None} if each is verdict else {}
        configs.write(root, study.symbol, payload(config, each), folders=folders, **digest)
    incumbent = verdict.incumbent if decision.reason not in ("stale", "unchanged") else None
    return Row(
        symbol=study.symbol,
        study=study.name,
        model=study.model,
        candidates={other.study.model: other.mae if other.candidate else None for other in competing},
        incumbent_model=record.model if record else None,
        incumbent_mae=incumbent["validation"]["mae"] if incumbent else None,
        best_mae=finding.mae if candidate else None,
        improvement=decision.improvement,
        skill=candidate["validation"]["skill"] if candidate else None,
        test_mae=candidate["test"]["mae"] if candidate else None,
        incumbent_test_mae=incumbent["test"]["mae"] if incumbent else None,
        decision="promoted" if decision.promote else "kept",
        reason=decision.reason,
        path=str(root / "best" / f"{study.symbol}.json") if decision.promote or record else None,
        written=[str(root / folder / f"{study.symbol}.json") for _, folders in writes for folder in folders],
    )


def payload(config: Config, verdict: Verdict) -> dict[str, Any]:
    """What a promoted file says: the keys that the predecessor's readers expect, and where the numbers come from."""
    finding, decision = verdict.finding, verdict.decision
    study, definition, candidate = finding.study, finding.study.definition, finding.candidate
    assert finding.confirmation is not None
    assert candidate is not None
    incumbent = verdict.incumbent if decision.improvement is not None else None
    counts = definition["windows"]
    return {
        "symbol": study.symbol,
        "model": study.model,
        "config": space.to_promoted(study.model, candidate["params"], finding.space),
        "validation": _metrics(candidate["validation"]),
        "test": _metrics(candidate["test"]),
        "windows": {
            "val_window": counts["validation"],
            "test_window": counts["test"],
            "forecast_horizon": counts["horizon"],
        },
        "config_path": f"{config.hyperparams.dir.name}/{study.model}/{study.symbol}.json",
        "metadata": {
            "source": "forecast-studies",
            "study": study.name,
            "trial": candidate["trial"],
            "as_of": study.as_of,
            "promoted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "objective": definition["objective"],
            "selection_metric": f"validation.{definition['metric']}",
            "selection_value": candidate["validation"]["mae"],
            "previous_mae": incumbent["validation"]["mae"] if incumbent else None,
            "previous_model": verdict.record.model if verdict.record else None,
            "previous_config": dict(verdict.record.config) if verdict.record else None,
            "improvement": decision.improvement,
            "reason": decision.reason,
            "skill": candidate["validation"]["skill"],
            "no_change_mae": finding.confirmation["no_change"]["validation"]["mae"],
            "fixed": dict(finding.space.fixed),
            "fingerprint": studying.fingerprint(definition),
            "checkpoint": definition["checkpoint"],
            "bars": definition["bars"],
            "seeds": "symbol, origin, pass",
            "versions": {name: version(name) for name in ("forecast-studies", "optuna", "torch", "numpy")},
        },
    }


def _metrics(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "price_mae": measured["price_mae"],
        "pct_return_mae": measured["mae"],
        "mae_percent": measured["mae_percent"],
        "skill": measured["skill"],
        "latency_s": sum(measured["seconds"].values()),
        "num_predictions": measured["windows"],
    }
