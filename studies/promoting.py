"""Gather what the update rule needs, decide for every symbol, write what is promoted.

Reads the confirmations and the promoted files; loads no model. The rule itself is studies/promotion.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from forecasters import ExpectedError
from objectives.metrics import Measurement
from storage import configs, history
from storage.commands import command
from storage.configs import ConfigFileError, Record
from storage.progress import read_confirmations, study_progress
from storage.retrying import RetryingStorage
from studies import promotion, space
from studies import study as studying
from studies.config import Config
from studies.evidence import PARTS, MeasuredConfiguration, StudyEvidence, from_json
from studies.promotion import Decision
from studies.space import Space
from studies.study import Study

log = logging.getLogger(__name__)

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
    status: str  # "success": a file was written, or would be; "no_improvement"; "failed": nothing to decide on
    reason: str
    mae: float | None = None  # its best configuration's, on the windows of the rule
    validation_mae: float | None = None  # the same configuration's on the windows of the search
    test_mae: float | None = None
    passes: int | None = None  # that the confirmed numbers are averaged over


@dataclass(frozen=True, kw_only=True)
class SymbolDecision:
    """One symbol's decision, as shown and as --json prints it. MAEs are of the windows that the rule reads."""

    symbol: str
    study: str | None = None  # None: there is none
    model: str | None = None
    incumbent_model: str | None = None
    incumbent_mae: float | None = None
    best_mae: float | None = None
    improvement: float | None = None  # relative
    improvement_low: float | None = None  # 95 % interval of the improvement
    improvement_high: float | None = None
    p_value: float | None = None
    improvement_validation: float | None = None  # on the windows of the search alone
    improvement_test: float | None = None
    skill: float | None = None
    test_mae: float | None = None
    incumbent_test_mae: float | None = None
    windows: int | None = None  # that the decision rests on
    decision: str  # "promoted", "kept", or "failed" with an error as the reason
    reason: str
    next: str | None = None  # the command that would change a "kept" of this reason
    path: str | None = None  # the file of the decision, where there is one
    written: Sequence[str] = ()  # every file written; none in a dry run
    pairs: Sequence[ModelOutcome] = ()


class NothingToPromote(ExpectedError, ValueError):
    """There is no study to promote from."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A study and what its confirmation measured; None: it has none yet."""

    study: Study
    space: Space
    open: bool  # it has budget left
    evidence: StudyEvidence | None

    @property
    def candidates(self) -> Sequence[MeasuredConfiguration]:
        """The best trials, measured; best of the search first."""
        return self.evidence.candidates if self.evidence else ()

    def params_of(self, record: Record) -> dict[str, Any] | None:
        """A promoted file's configuration as this study's params; None where it is another model's or unreadable."""
        if record.model != self.study.model:
            return None
        try:
            return space.from_promoted(record.config, record.metadata, self.space)
        except ValueError:
            return None

    def measured(self, record: Record) -> MeasuredConfiguration | None:
        """How a promoted file's configuration did here."""
        params = self.params_of(record)
        return None if params is None or self.evidence is None else self.evidence.find(params)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of one file."""

    record: Record | None
    incumbent: MeasuredConfiguration | None  # how the record's configuration did on the same windows
    decision: Decision
    finding: Finding  # the study of the chosen candidate, or one that has none
    candidate: MeasuredConfiguration | None


def promote(
    storage: RetryingStorage,
    config: Config,
    rule: Rule,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    dry_run: bool,
) -> list[SymbolDecision]:
    """Decide for every symbol that has a study or is named, and write what is promoted unless `dry_run`.

    Every promoted file is read, and every decision made, before the first is written. A symbol whose files cannot be
    read or written, or that has no study, fails and does not keep the others. Raises NothingToPromote.
    """
    studies = [study for study in studying.list_studies(storage) if not symbols or study.symbol in symbols]
    progress = study_progress(storage, [study.study_id for study in studies])
    newest: dict[str, dict[str, Study]] = {}
    for study in sorted(studies, key=lambda study: study.as_of):
        if study.study_id in progress:
            newest.setdefault(study.symbol, {})[study.model] = study
        else:
            log.warning("%s: left out, as it has no budget; a copy made with Optuna?", study.name)
    asked = {symbol: [s for s in found.values() if s.model in models] for symbol, found in newest.items()}
    wanted = list(symbols) or sorted(symbol for symbol, studies in asked.items() if studies)
    if not any(asked.get(symbol) for symbol in wanted):
        which, words = (f"{wanted[0]}: no study", f" --symbols {wanted[0]}") if wanted else ("no study yet", "")
        raise NothingToPromote(f"{which}; make one with: {command(f'launch-workers{words}')}")
    ids = [study.study_id for symbol in wanted for study in newest.get(symbol, {}).values()]
    confirmations = read_confirmations(storage, ids)

    def find(study: Study) -> Finding:
        is_open = progress[study.study_id].open > 0
        result = None if is_open else confirmations[study.study_id].result
        return Finding(
            study=study,
            space=Space.from_json(study.model, study.definition["space"]),
            open=is_open,
            evidence=from_json(study.model, result) if result else None,
        )

    def judge(symbol: str) -> SymbolCase | SymbolDecision:
        if not asked.get(symbol):
            return SymbolDecision(
                symbol=symbol, decision="failed", reason="no study", next=command(f"launch-workers --symbols {symbol}")
            )
        try:
            # A model that is not asked for may still have measured the incumbent.
            return _judge(config, rule, [find(study) for study in newest[symbol].values()], models)
        except ConfigFileError as error:
            return _failed(asked[symbol], str(error))

    cases = [judge(symbol) for symbol in wanted]
    return [
        case if isinstance(case, SymbolDecision) else _carry_out(config, rule, case, dry_run=dry_run) for case in cases
    ]


def _failed(studies: Sequence[Study], reason: str) -> SymbolDecision:
    """The decision on a symbol whose files cannot be read."""
    pairs = [
        ModelOutcome(symbol=study.symbol, model=study.model, study=study.name, status="failed", reason=reason)
        for study in sorted(studies, key=lambda study: study.model)
    ]
    first = pairs[0]
    return SymbolDecision(
        symbol=first.symbol, study=first.study, model=first.model, decision="failed", reason=reason, pairs=pairs
    )


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
    reference = max(asked, key=lambda finding: (finding.evidence is not None, finding.study.as_of))
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
        if finding.study.model != holder and finding.evidence is not None
    ]
    left_out = [finding for finding in asked if finding not in competing]
    return SymbolCase(verdict=verdict, own=own, competing=competing, left_out=left_out)


def _comparable(one: Finding, other: Finding) -> bool:
    """Whether numbers of two studies are of the same windows and metric."""
    if one is other:
        return True
    if one.evidence is None or other.evidence is None:
        return False
    mine, theirs = one.study.definition, other.study.definition
    return (
        all(mine[part] == theirs[part] for part in SAME)
        and all(mine["windows"][part] == theirs["windows"][part] for part in SAME_WINDOWS)
        and one.evidence.windows == other.evidence.windows
    )


def _decide(
    rule: Rule, reference: Finding, competing: Sequence[Finding], beside: Sequence[Finding], record: Record | None
) -> Verdict:
    pool = [(finding, candidate) for finding in competing for candidate in finding.candidates]
    incumbent = stale = None
    if record is not None:
        incumbent = next((found for finding in beside if (found := finding.measured(record))), None)
        # Its model was searched on these windows, and could have measured it: then the file is a newer one.
        stale = incumbent is None and any(finding.params_of(record) for finding in beside if finding.evidence)
    decision = promotion.decide(
        [candidate for _, candidate in pool],
        _incumbent(record, beside, incumbent),
        confirmed=reference.evidence is not None,
        stale=bool(stale),
        min_improvement=rule.min_improvement,
        force=rule.force,
        require_test=rule.require_test,
        max_p=rule.max_p,
        on=rule.on,
    )
    finding, candidate = (reference, None) if decision.candidate is None else pool[decision.candidate]
    return Verdict(record=record, incumbent=incumbent, decision=decision, finding=finding, candidate=candidate)


def _incumbent(
    record: Record | None, findings: Sequence[Finding], found: MeasuredConfiguration | None
) -> MeasuredConfiguration | None:
    if record is None or found is not None:
        return found
    params = next((params for finding in findings if (params := finding.params_of(record))), None)
    return MeasuredConfiguration(model=record.model, params=params or record.config, error="not measured")


def _carry_out(config: Config, rule: Rule, case: SymbolCase, *, dry_run: bool) -> SymbolDecision:
    verdict, root = case.verdict, config.hyperparams.dir
    decision, record, candidate = verdict.decision, verdict.record, verdict.candidate
    study, comparison = verdict.finding.study, decision.comparison
    writes = [(verdict, (study.model, *FOLDERS))] if decision.promote else []
    writes += [(other, (other.finding.study.model,)) for other in case.own if other.decision.promote]
    error, done = None, []
    try:
        for each, folders in writes if not dry_run else []:
            digest = {"expected_digest": record.digest if record else None} if each is verdict else {}
            history.write(root, study.symbol, payload(config, rule, each), folders=folders, **digest)
            done.append((each, folders))
    except ConfigFileError as failure:  # what was written before stays, and is reported
        error = str(failure)
    known = verdict.incumbent if decision.reason != "unchanged" else None
    low, high = comparison.interval or (None, None)
    best = candidate.on(rule.on) if candidate else None
    return SymbolDecision(
        symbol=study.symbol,
        study=study.name,
        model=study.model,
        incumbent_model=record.model if record else None,
        incumbent_mae=known.mae(rule.on) if known else None,
        best_mae=best.mae if best else None,
        improvement=decision.improvement,
        improvement_low=low,
        improvement_high=high,
        p_value=comparison.p_value,
        improvement_validation=comparison.improvement_validation,
        improvement_test=comparison.improvement_test,
        skill=best.skill if best else None,
        test_mae=candidate.mae("test") if candidate else None,
        incumbent_test_mae=known.mae("test") if known else None,
        windows=best.windows if best else None,
        decision="failed" if error else "promoted" if decision.promote else "kept",
        reason=error or decision.reason,
        next=None if error else _next(verdict),
        path=str(root / "best" / f"{study.symbol}.json") if decision.promote or record else None,
        written=[str(root / folder / f"{study.symbol}.json") for _, folders in done for folder in folders],
        pairs=_outcomes(rule, case, [each for each, _ in (writes if dry_run else done)], error),
    )


def _next(verdict: Verdict) -> str | None:
    study, reason = verdict.finding.study, verdict.decision.reason
    if reason == "not confirmed" and verdict.finding.open:
        return command(f"launch-workers --symbols {study.symbol} --models {study.model}")
    if reason in ("not confirmed", "stale"):
        return command(f"studies confirm {study.name}")
    if reason == "not comparable":
        return command(f"promote --symbols {study.symbol} --force")
    return None


def _outcomes(rule: Rule, case: SymbolCase, written: Sequence[Verdict], error: str | None) -> list[ModelOutcome]:
    """The status of every model asked for, by name. error: what kept the others from being written."""
    outcomes = []
    for finding in (*case.competing, *case.left_out):
        study, evidence = finding.study, finding.evidence
        best = evidence.best_on(rule.on) if evidence else None
        own = next((each for each in (case.verdict, *case.own) if each.finding is finding), None)
        if any(each.finding is finding for each in written):
            status, reason = "success", next(each.decision.reason for each in written if each.finding is finding)
        elif evidence is None:
            status, reason = "failed", "not confirmed"
        elif error and own and own.decision.promote:
            status, reason = "failed", error
        elif finding in case.left_out:
            status, reason = "failed", "not comparable"
        elif best is None:
            status, reason = "failed", "no candidate"
        else:
            status, reason = "no_improvement", own.decision.reason if own else "not better"
        outcomes.append(
            ModelOutcome(
                symbol=study.symbol,
                model=study.model,
                study=study.name,
                status=status,
                reason=reason,
                mae=best.mae(rule.on) if best else None,
                validation_mae=best.mae("validation") if best else None,
                test_mae=best.mae("test") if best else None,
                passes=evidence.passes if evidence else None,
            )
        )
    return sorted(outcomes, key=lambda outcome: outcome.model)


def payload(config: Config, rule: Rule, verdict: Verdict) -> dict[str, Any]:
    """What a promoted file says: the keys that the predecessor's readers expect, and where the numbers come from."""
    finding, decision, candidate = verdict.finding, verdict.decision, verdict.candidate
    study, definition, evidence = finding.study, finding.study.definition, finding.evidence
    assert evidence is not None
    assert candidate is not None
    chosen = candidate.on(rule.on)
    assert chosen is not None
    incumbent = verdict.incumbent if decision.improvement is not None else None
    counts, comparison = definition["windows"], decision.comparison
    return {
        "symbol": study.symbol,
        "model": study.model,
        "config": space.to_promoted(candidate.params, finding.space, config),
        **{part: _metrics(measured) for part in PARTS if (measured := candidate.on(part))},
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
            "objective": definition["objective"],
            "selection_metric": f"{rule.on}.{definition['metric']}",
            "selection_value": chosen.mae,
            "previous_mae": incumbent.mae(rule.on) if incumbent else None,
            "previous_model": verdict.record.model if verdict.record else None,
            "previous_config": dict(verdict.record.config) if verdict.record else None,
            "improvement": decision.improvement,
            "improvement_interval": comparison.interval,
            "improvement_validation": comparison.improvement_validation,
            "improvement_test": comparison.improvement_test,
            "p_value": comparison.p_value,
            "reason": decision.reason,
            "skill": chosen.skill,
            "no_change_mae": evidence.no_change[rule.on].mae,
            "passes": evidence.passes,
            "sampling_error": evidence.sampling_error,
            "fixed": dict(finding.space.fixed),
            "fingerprint": studying.fingerprint(definition),
            "checkpoint": definition["checkpoint"],
            "bars": definition["bars"],
            "seeds": "symbol, origin, pass",
            "versions": {name: version(name) for name in ("forecast-studies", "optuna", "torch", "numpy")},
        },
    }


def _metrics(measured: Measurement) -> dict[str, Any]:
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
