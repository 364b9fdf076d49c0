"""Gather what the update rule needs, decide for every symbol, write what is promoted.

Reads the confirmations and the promoted files; loads no model. The rule itself is studies/promotion.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from forecasters import ExpectedError
from storage import configs
from storage.configs import Record
from storage.database import RetryingStorage
from storage.progress import read_confirmations, study_progress
from studies import promotion, space
from studies import study as studying
from studies.config import Config
from studies.promotion import Decision, Measured
from studies.space import Space
from studies.study import Study

FOLDERS = ("best", "optimized_compiled")  # written beside the model's own
SAME = ("metric", "objective", "bars")  # parts of a definition that make two models comparable
SAME_WINDOWS = ("horizon", "validation", "test", "min_context")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the command asks of a promotion."""

    min_improvement: float
    force: bool = False
    require_test: bool = False
    max_p: float | None = None
    on: Literal["confirmation", "validation"] = "confirmation"


@dataclass(frozen=True, kw_only=True)
class ModelOutcome:
    """What became of one model of a symbol."""

    symbol: str
    model: str
    study: str
    status: str  # "success": a file was written; "no_improvement"; "failed": nothing to decide on
    reason: str
    mae: float | None  # its best configuration's, on the windows of the rule
    test_mae: float | None
    passes: int | None  # that the confirmed numbers are averaged over


@dataclass(frozen=True, kw_only=True)
class SymbolDecision:
    """One symbol's decision, as shown and as --json prints it. MAEs are of the windows that the rule reads."""

    symbol: str
    study: str
    model: str
    incumbent_model: str | None
    incumbent_mae: float | None
    best_mae: float | None
    improvement: float | None  # relative
    improvement_low: float | None  # 95 % interval of the improvement
    improvement_high: float | None
    p_value: float | None
    improvement_validation: float | None  # on the windows of the search alone
    improvement_test: float | None
    skill: float | None
    test_mae: float | None
    incumbent_test_mae: float | None
    windows: int | None  # that the decision rests on
    decision: str  # "promoted" or "kept"
    reason: str
    next: str | None  # the command that would change a "kept" of this reason
    path: str | None  # the file of the decision, where there is one
    written: Sequence[str]  # every file written, or that a dry run would write
    pairs: Sequence[ModelOutcome]


class NothingToPromote(ExpectedError, ValueError):
    """There is no study to promote from."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A study and what its confirmation measured; None: it has none yet."""

    study: Study
    space: Space
    open: bool  # it has budget left
    confirmation: Mapping[str, Any] | None

    @cached_property
    def candidates(self) -> Sequence[Mapping[str, Any]]:
        """The best trials, measured; best of the search first."""
        return self.confirmation["candidates"] if self.confirmation else ()

    def params_of(self, record: Record) -> dict[str, Any] | None:
        """A promoted file's configuration as this study's params; None where it is another model's or unreadable."""
        if record.model != self.study.model:
            return None
        try:
            return space.from_promoted(record.model, record.config, self.space)
        except ValueError:
            return None

    def measured(self, record: Record) -> Mapping[str, Any] | None:
        """How a promoted file's configuration did here."""
        params = self.params_of(record)
        if params is None or self.confirmation is None:
            return None
        known = (*self.confirmation["baselines"].values(), *self.candidates)
        return next((one for one in known if one["params"] == params), None)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of one file."""

    record: Record | None
    incumbent: Mapping[str, Any] | None  # how the record's configuration did on the same windows
    decision: Decision
    finding: Finding  # the study of the chosen candidate, or one that has none
    candidate: Mapping[str, Any] | None


def promote(
    storage: RetryingStorage,
    config: Config,
    rule: Rule,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    dry_run: bool,
) -> list[SymbolDecision]:
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
    progress = study_progress(storage)
    ids = [study.study_id for symbol in wanted for study in newest[symbol].values()]
    confirmations = read_confirmations(storage, ids)

    def find(study: Study) -> Finding:
        is_open = progress[study.study_id].open > 0
        return Finding(
            study=study,
            space=Space.from_json(study.model, study.definition["space"]),
            open=is_open,
            confirmation=None if is_open else confirmations[study.study_id].result,
        )

    # A model that is not asked for may still have measured the incumbent.
    cases = [_judge(config, rule, [find(study) for study in newest[symbol].values()], models) for symbol in wanted]
    return [_carry_out(config, rule, case, dry_run=dry_run) for case in cases]


@dataclass(frozen=True, kw_only=True)
class SymbolCase:
    """Everything decided about one symbol."""

    verdict: Verdict  # on `best`
    own: Sequence[Verdict]  # on the files of the other models
    competing: Sequence[Finding]
    left_out: Sequence[Finding]  # asked for, but not on the same windows and metric


def _judge(config: Config, rule: Rule, everyone: Sequence[Finding], models: Sequence[str]) -> SymbolCase:
    asked = [finding for finding in everyone if finding.study.model in models]
    # The newest bars that something is confirmed on decide what the others must compare to.
    reference = max(asked, key=lambda finding: (finding.confirmation is not None, finding.study.as_of))
    competing = [finding for finding in asked if _comparable(finding, reference)]
    beside = [finding for finding in everyone if _comparable(finding, reference)]
    symbol, root = reference.study.symbol, config.hyperparams.dir
    record = configs.read(root, "best", symbol)
    verdict = _decide(rule, reference, competing, beside, record)
    holder = verdict.finding.study.model if verdict.decision.promote else record.model if record else None
    # Each model's own file keeps its own best; that of the model which `best` names says what `best` says.
    own = [
        _decide(rule, finding, [finding], beside, configs.read(root, finding.study.model, symbol))
        for finding in competing
        if finding.study.model != holder and finding.confirmation is not None
    ]
    left_out = [finding for finding in asked if finding not in competing]
    return SymbolCase(verdict=verdict, own=own, competing=competing, left_out=left_out)


def _comparable(one: Finding, other: Finding) -> bool:
    """Whether numbers of two studies are of the same windows and metric."""
    if one is other:
        return True
    if one.confirmation is None or other.confirmation is None:
        return False
    mine, theirs = one.study.definition, other.study.definition
    return (
        all(mine[part] == theirs[part] for part in SAME)
        and all(mine["windows"][part] == theirs["windows"][part] for part in SAME_WINDOWS)
        and one.confirmation["windows"] == other.confirmation["windows"]
    )


def _decide(
    rule: Rule, reference: Finding, competing: Sequence[Finding], beside: Sequence[Finding], record: Record | None
) -> Verdict:
    pool = [(finding, candidate) for finding in competing for candidate in finding.candidates]
    incumbent = stale = None
    if record is not None:
        incumbent = next((found for finding in beside if (found := finding.measured(record))), None)
        # Its model was searched on these windows, and could have measured it: then the file is a newer one.
        stale = incumbent is None and any(finding.params_of(record) for finding in beside if finding.confirmation)
    decision = promotion.decide(
        [_as_measured(finding.study.model, candidate) for finding, candidate in pool],
        _incumbent(record, beside, incumbent),
        confirmed=reference.confirmation is not None,
        stale=bool(stale),
        min_improvement=rule.min_improvement,
        force=rule.force,
        require_test=rule.require_test,
        max_p=rule.max_p,
        on=rule.on,
    )
    finding, candidate = (reference, None) if decision.candidate is None else pool[decision.candidate]
    return Verdict(record=record, incumbent=incumbent, decision=decision, finding=finding, candidate=candidate)


def _as_measured(model: str, one: Mapping[str, Any]) -> Measured:
    measured = "confirmation" in one  # else it says why not under "error"
    return Measured(
        model=model,
        config=one["params"],
        errors=tuple(one["confirmation"]["errors"]) if measured else None,
        validation_mae=one["validation"]["mae"] if measured else None,
        test_mae=one["test"]["mae"] if measured else None,
    )


def _incumbent(record: Record | None, findings: Sequence[Finding], found: Mapping[str, Any] | None) -> Measured | None:
    if record is None:
        return None
    if found is not None:
        return _as_measured(record.model, found)
    params = next((params for finding in findings if (params := finding.params_of(record))), None)
    return Measured(model=record.model, config=params or record.config, errors=None, validation_mae=None, test_mae=None)


def _carry_out(config: Config, rule: Rule, case: SymbolCase, *, dry_run: bool) -> SymbolDecision:
    verdict, root = case.verdict, config.hyperparams.dir
    decision, record, candidate = verdict.decision, verdict.record, verdict.candidate
    study, evidence = verdict.finding.study, decision.evidence
    writes = [(verdict, (study.model, *FOLDERS))] if decision.promote else []
    writes += [(other, (other.finding.study.model,)) for other in case.own if other.decision.promote]
    for each, folders in writes if not dry_run else []:
        digest = {"expected_digest": record.digest if record else None} if each is verdict else {}
        configs.write(root, study.symbol, payload(config, rule, each), folders=folders, **digest)
    known = (
        verdict.incumbent if decision.reason != "unchanged" and "confirmation" in (verdict.incumbent or {}) else None
    )
    low, high = evidence.interval or (None, None)
    return SymbolDecision(
        symbol=study.symbol,
        study=study.name,
        model=study.model,
        incumbent_model=record.model if record else None,
        incumbent_mae=known[rule.on]["mae"] if known else None,
        best_mae=candidate[rule.on]["mae"] if candidate else None,
        improvement=decision.improvement,
        improvement_low=low,
        improvement_high=high,
        p_value=evidence.p_value,
        improvement_validation=evidence.improvement_validation,
        improvement_test=evidence.improvement_test,
        skill=candidate[rule.on]["skill"] if candidate else None,
        test_mae=candidate["test"]["mae"] if candidate else None,
        incumbent_test_mae=known["test"]["mae"] if known else None,
        windows=candidate[rule.on]["windows"] if candidate else None,
        decision="promoted" if decision.promote else "kept",
        reason=decision.reason,
        next=_next(verdict),
        path=str(root / "best" / f"{study.symbol}.json") if decision.promote or record else None,
        written=[str(root / folder / f"{study.symbol}.json") for _, folders in writes for folder in folders],
        pairs=_pairs(rule, case, [each for each, _ in writes]),
    )


def _next(verdict: Verdict) -> str | None:
    study, reason = verdict.finding.study, verdict.decision.reason
    if reason == "not confirmed" and verdict.finding.open:
        return f"launch-workers --symbols {study.symbol} --models {study.model}"
    if reason in ("not confirmed", "stale"):
        return f"studies confirm {study.name}"
    if reason == "not comparable":
        return f"promote --symbols {study.symbol} --force"
    return None


def _pairs(rule: Rule, case: SymbolCase, written: Sequence[Verdict]) -> list[ModelOutcome]:
    """The status of every model asked for, by name."""
    pairs = []
    for finding in (*case.competing, *case.left_out):
        study = finding.study
        best = min(finding.candidates, key=lambda one: one[rule.on]["mae"], default=None)
        own = next((each for each in (case.verdict, *case.own) if each.finding is finding), None)
        if any(each.finding is finding for each in written):
            status, reason = "success", next(each.decision.reason for each in written if each.finding is finding)
        elif finding.confirmation is None:
            status, reason = "failed", "not confirmed"
        elif finding in case.left_out:
            status, reason = "failed", "not comparable"
        elif best is None:
            status, reason = "failed", "no candidate"
        else:
            status, reason = "no_improvement", own.decision.reason if own else "not better"
        pairs.append(
            ModelOutcome(
                symbol=study.symbol,
                model=study.model,
                study=study.name,
                status=status,
                reason=reason,
                mae=best[rule.on]["mae"] if best else None,
                test_mae=best["test"]["mae"] if best else None,
                passes=finding.confirmation["passes"] if finding.confirmation else None,
            )
        )
    return sorted(pairs, key=lambda pair: pair.model)


def payload(config: Config, rule: Rule, verdict: Verdict) -> dict[str, Any]:
    """What a promoted file says: the keys that the predecessor's readers expect, and where the numbers come from."""
    finding, decision, candidate = verdict.finding, verdict.decision, verdict.candidate
    study, definition, confirmation = finding.study, finding.study.definition, finding.confirmation
    assert confirmation is not None
    assert candidate is not None
    incumbent = verdict.incumbent if decision.improvement is not None else None
    counts = definition["windows"]
    return {
        "symbol": study.symbol,
        "model": study.model,
        "config": space.to_promoted(study.model, candidate["params"], finding.space),
        "validation": _metrics(candidate["validation"]),
        "confirmation": _metrics(candidate["confirmation"]),
        "test": _metrics(candidate["test"]),
        "windows": {
            "val_window": counts["validation"],
            "confirmation_window": confirmation["windows"]["confirmation"]["count"],
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
            "selection_metric": f"{rule.on}.{definition['metric']}",
            "selection_value": candidate[rule.on]["mae"],
            "previous_mae": incumbent[rule.on]["mae"] if incumbent else None,
            "previous_model": verdict.record.model if verdict.record else None,
            "previous_config": dict(verdict.record.config) if verdict.record else None,
            "improvement": decision.improvement,
            "improvement_interval": decision.evidence.interval,
            "improvement_validation": decision.evidence.improvement_validation,
            "improvement_test": decision.evidence.improvement_test,
            "p_value": decision.evidence.p_value,
            "reason": decision.reason,
            "skill": candidate[rule.on]["skill"],
            "no_change_mae": confirmation["no_change"][rule.on]["mae"],
            "passes": confirmation["passes"],
            "sampling_error": confirmation["sampling_error"],
            "fixed": dict(finding.space.fixed),
            "fingerprint": studying.fingerprint(definition),
            "checkpoint": definition["checkpoint"],
            "bars": definition["bars"],
            "seeds": "symbol, origin, pass",
            "versions": {name: version(name) for name in ("forecast-studies", "optuna", "torch", "numpy")},
        },
    }


def _metrics(measured: Mapping[str, Any]) -> dict[str, Any]:
    latency = measured.get("latency_s")  # unknown where the cache answered, and in older results
    return {
        "price_mae": measured["price_mae"],
        "pct_return_mae": measured["mae"],
        "mae_percent": measured["mae_percent"],
        "skill": measured["skill"],
        **({} if latency is None else {"latency_s": round(latency, 6)}),
        "num_predictions": measured["windows"],
    }
