"""Decide for every symbol whether its best configuration is promoted, and write what is.

Loads no model. Findings come from studies/findings.py, the rule is studies/promotion.py, a file's content
studies/promoted_file.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forecasters import ExpectedError
from forecasters.models import MODELS
from storage import configs, history
from storage.commands import command
from storage.configs import ConfigFileError, Record
from storage.retrying import RetryingStorage
from studies import ensembles, findings, promoted_file, promotion, returns
from studies.beliefs import SymbolBeliefs
from studies.config import Config
from studies.ensembles import Ensemble
from studies.evidence import MeasuredConfiguration, relative_gain
from studies.findings import Finding
from studies.promoted_file import EnsembleDecision, InUse, Offer, Verdict
from studies.promotion import ReturnsDifference, Rule
from studies.study import Study

FOLDERS = ("best", "optimized_compiled")  # written beside the model's own
# Of a study, its symbol's configuration in use and the candidate.
ReturnsGate = Callable[[Study, MeasuredConfiguration, MeasuredConfiguration], ReturnsDifference]
UNKNOWN = MeasuredConfiguration(model="no change", params={})


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
    improvement: float | None = None  # relative, over the incumbent, as the rule reads it
    improvement_low: float | None = None  # its 95 % interval; of a first promotion that over "no change"
    improvement_high: float | None = None
    p_value: float | None = None  # chance that it is not above 0
    improvement_own: float | None = None  # of the symbol's own confirmation windows
    pooled_symbols: int | None = None  # whose evidence the improvement rests on
    improvement_validation: float | None = None  # on the windows of the search alone
    improvement_search: float | None = None  # there, of the best of all trials: what the search promised
    improvement_test: float | None = None
    returns: float | None = None  # over the incumbent's, net, a bar, of the strategy that was asked to be looked at
    returns_low: float | None = None  # 95 % interval; None: the same at every bar
    returns_high: float | None = None
    skill: float | None = None
    worse_than_no_change: bool | None = None  # on the confirmation windows
    clipped: float | None = None  # share of the last origins whose last close the configuration clips
    test_mae: float | None = None
    incumbent_test_mae: float | None = None
    windows: int | None = None  # that the decision rests on
    in_use: InUse | None = None  # what the file that was found says of the decision that made it
    decision: str  # "promoted", "kept", or "failed" with an error as the reason
    reason: str
    next: str | None = None  # the command that would change a "kept" of this reason
    path: str | None = None  # the file of the decision, where there is one
    written: Sequence[str] = ()  # every file written; none in a dry run
    pairs: Sequence[ModelOutcome] = ()
    ensemble: EnsembleDecision | None = None  # where one was asked for


def rule_of(config: Config, min_improvement: float | None = None, **asked: Any) -> Rule:
    """The rule of the settings with what a command was asked for."""
    least = config.promotion.min_improvement if min_improvement is None else min_improvement
    return Rule(min_improvement=least, max_clipped=config.promotion.max_clipped, **asked)


class NothingToPromote(ExpectedError, ValueError):
    """There is no study to promote from."""


def promote(
    storage: RetryingStorage,
    config: Config,
    rule: Rule,
    *,
    symbols: Sequence[str],
    models: Sequence[str],
    dry_run: bool,
    gate: ReturnsGate | None = None,
    ensemble: bool = False,
) -> list[SymbolDecision]:
    """Decide for every symbol that has a study or is named, and write what is promoted unless `dry_run`.

    ensemble: also look for an ensemble of each symbol's models, which then may be promoted in place of a single one.
    gate: asked for every improvement, which is kept from being promoted where it is a loss in returns. What it raises
    as an ExpectedError is the reason for which its symbol fails.

    Every promoted file is read, and every decision made, before the first is written. A symbol whose files cannot be
    read or written, or that has no study, fails and does not keep the others. Raises NothingToPromote.
    """
    pools = rule.on == "pooled" and config.promotion.pool != "none"
    pnl, said = config.search.objective_pnl, returns.option(config.search.objective_pnl)
    found = findings.find(storage, config.search.key, symbols, others=pools, pnl=pnl)
    asked = {symbol: [one.study for one in found[symbol] if one.study.model in models] for symbol in found}
    wanted = list(symbols) or sorted(symbol for symbol, studies in asked.items() if studies)
    if not any(asked.get(symbol) for symbol in wanted):
        which, words = (f"{wanted[0]}: no study", f" --symbols {wanted[0]}") if wanted else ("no study yet", "")
        raise NothingToPromote(f"{which}; make one with: {command(f'launch-workers{words}{said}')}")
    cases = findings.cases_of(config, found, models) if rule.on == "pooled" else []
    believed = findings.believe(config, cases, found, wanted) if rule.on == "pooled" else {}
    offered, refused = findings.offers(found, models) if ensemble else ({}, {})
    believed_later = findings.believe_later(config, cases, offered) if offered else {}

    def judge(symbol: str) -> SymbolCase | SymbolDecision:
        if not asked.get(symbol):
            return SymbolDecision(
                symbol=symbol,
                decision="failed",
                reason="no study",
                next=command(f"launch-workers --symbols {symbol}{said}"),
            )
        try:
            # A model that is not asked for may still have measured the incumbent.
            offer = (offered[symbol], believed_later.get(symbol)) if symbol in offered else None
            case = _judge(config, rule, found[symbol], models, believed.get(symbol), gate, offer)
            return replace(case, no_ensemble=refused.get(symbol))
        except ExpectedError as error:
            return _failed(asked[symbol], str(error))

    judged = [judge(symbol) for symbol in wanted]
    return [
        case if isinstance(case, SymbolDecision) else _carry_out(config, rule, case, dry_run=dry_run) for case in judged
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
    beside: Sequence[Finding]  # the same of all models, asked for or not
    left_out: Sequence[Finding]  # asked for, but not on the same windows and metric
    ensemble: Verdict | None = None  # on `best`, of an ensemble, whether or not it is the symbol's verdict
    no_ensemble: str | None = None  # why there is none, where one was asked for


def _judge(
    config: Config,
    rule: Rule,
    everyone: Sequence[Finding],
    models: Sequence[str],
    believed: SymbolBeliefs | None,
    gate: ReturnsGate | None,
    offer: tuple[Ensemble, SymbolBeliefs | None] | None,
) -> SymbolCase:
    asked = [finding for finding in everyone if finding.study.model in models]
    found = findings.competing_of(everyone, models)
    assert found is not None
    reference, competing = found
    beside = [finding for finding in everyone if findings.comparable(finding, reference)]
    symbol = reference.study.symbol
    record = _in_use(config, "best", symbol)
    verdict = single = _decide(rule, reference, competing, beside, record, believed, gate)
    together = _with_ensemble(rule, single, competing, *offer, gate) if offer else None
    if together and (
        together.decision.promote or (together.decision.reason == "unchanged" and not single.decision.promote)
    ):
        verdict = together
    holder = verdict.model if verdict.decision.promote else record.model if record else None
    # Each model's own file keeps its own best; that of the model which `best` names says what `best` says. None is an
    # ensemble's: readers that do not know it find its members' best single configurations there.
    own = [
        _decide(rule, finding, [finding], beside, _in_use(config, finding.study.model, symbol), believed, gate)
        for finding in competing
        if finding.study.model != holder and finding.evidence is not None
    ]
    left_out = [finding for finding in asked if finding not in competing]
    return SymbolCase(
        verdict=verdict,
        own=own,
        competing=competing,
        beside=beside,
        left_out=left_out,
        ensemble=together,
    )


def _with_ensemble(
    rule: Rule,
    verdict: Verdict,
    competing: Sequence[Finding],
    offered: Ensemble,
    believed: SymbolBeliefs | None,
    gate: ReturnsGate | None,
) -> Verdict | None:
    """The verdict on an ensemble, given that on the best single configuration; None where nothing single is known."""
    evidence, best, record = verdict.finding.evidence, verdict.candidate, verdict.record
    if evidence is None or best is None:
        return None
    no_change, incumbent = evidence.no_change_configuration, verdict.incumbent
    unknown = MeasuredConfiguration(model=record.model, params={}, error="not measured") if record else None
    rival = incumbent or unknown
    decision, over_single = ensembles.decide(offered, best, rival, no_change, rule, believed)
    if decision.promote and not over_single.promote:
        decision = replace(decision, promote=False, reason=over_single.reason)
    by_model = {finding.study.model: finding for finding in competing}
    offer = Offer(
        ensemble=offered,
        findings=[by_model[one.model] for one in offered.members],
        over_single=over_single,
        single=verdict.finding.study.model,
    )
    returns = None
    if gate and decision.reason == "improved" and incumbent:
        returns = gate(offer.main.study, incumbent, offered.configuration)
        if returns.is_loss:
            decision = replace(decision, promote=False, reason="worse in returns")
    return Verdict(
        record=record,
        incumbent=incumbent and ensembles.later(incumbent, no_change),
        decision=decision,
        finding=offer.main,
        candidate=offered.configuration,
        returns=returns,
        ensemble=offer,
    )


def _in_use(config: Config, folder: str, symbol: str) -> Record | None:
    """What is promoted there. Raises ConfigFileError, also where it is of another key, which is not to be replaced."""
    record = configs.read(config.hyperparams.dir, folder, symbol)
    if record is not None and record.key != config.search.key:
        raise ConfigFileError(
            f"{record.path}: is of the {record.key} and [search] key is {config.search.key}; "
            "give each key a [hyperparams] dir of its own"
        )
    return record


def _decide(
    rule: Rule,
    reference: Finding,
    competing: Sequence[Finding],
    beside: Sequence[Finding],
    record: Record | None,
    believed: SymbolBeliefs | None,
    gate: ReturnsGate | None,
) -> Verdict:
    pairs = [(finding, candidate) for finding in competing for candidate in finding.candidates]
    candidates = [candidate for _, candidate in pairs]
    measured = stale = None
    if record is not None:
        measured = findings.measured(record, beside)
        # Its models were searched on these windows, and could have measured it: then the file is a newer one.
        stale = measured is None and findings.can_measure(record, beside)
    incumbent = _incumbent(record, beside, measured)
    decision = promotion.decide(
        candidates,
        incumbent,
        reference.evidence.no_change_configuration if reference.evidence else UNKNOWN,
        rule,
        confirmed=reference.evidence is not None,
        stale=bool(stale),
        beliefs=believed.on(candidates, incumbent) if believed else None,
    )
    finding, candidate = (reference, None) if decision.candidate is None else pairs[decision.candidate]
    returns = None
    if gate and decision.reason == "improved" and measured and candidate:
        returns = gate(finding.study, measured, candidate)
        if returns.is_loss:
            decision = replace(decision, promote=False, reason="worse in returns")
    return Verdict(
        record=record, incumbent=measured, decision=decision, finding=finding, candidate=candidate, returns=returns
    )


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
    writes = [(verdict, (verdict.model, *FOLDERS))] if decision.promote else []
    writes += [(other, (other.finding.study.model,)) for other in case.own if other.decision.promote]
    error, done = None, []
    try:
        for each, folders in writes if not dry_run else []:
            digest = {"expected_digest": record.digest if record else None} if each is verdict else {}
            history.write(root, study.symbol, promoted_file.payload(config, rule, each), folders=folders, **digest)
            done.append((each, folders))
    except ConfigFileError as failure:  # what was written before stays, and is reported
        error = str(failure)
    known = verdict.incumbent if decision.reason != "unchanged" else None
    low, high = comparison.interval or (None, None)
    returns = verdict.returns
    returns_low, returns_high = (returns.interval if returns else None) or (None, None)
    best = candidate.on(rule.part) if candidate else None
    return SymbolDecision(
        symbol=study.symbol,
        study=study.name,
        model=verdict.model,
        incumbent_model=record.model if record else None,
        incumbent_mae=known.mae(rule.part) if known else None,
        best_mae=best.mae if best else None,
        improvement=decision.improvement,
        improvement_low=low,
        improvement_high=high,
        p_value=comparison.p_value,
        improvement_own=comparison.improvement_confirmation if record else None,
        pooled_symbols=comparison.symbols if candidate else None,
        improvement_validation=comparison.improvement_validation,
        improvement_search=_promised(case) if record else None,
        improvement_test=comparison.improvement_test,
        returns=returns.value if returns else None,
        returns_low=returns_low,
        returns_high=returns_high,
        skill=best.skill if best else None,
        worse_than_no_change=verdict.worse_than_no_change,
        clipped=candidate.clipped if candidate else None,
        test_mae=candidate.mae("test") if candidate else None,
        incumbent_test_mae=known.mae("test") if known else None,
        windows=best.windows if best else None,
        in_use=InUse.of(record) if record else None,
        decision="failed" if error else "promoted" if decision.promote else "kept",
        reason=error or decision.reason,
        next=None if error else _next(verdict, case.beside),
        path=str(root / "best" / f"{study.symbol}.json") if decision.promote or record else None,
        written=[str(root / folder / f"{study.symbol}.json") for _, folders in done for folder in folders],
        pairs=_outcomes(rule, case, [each for each, _ in (writes if dry_run else done)], error),
        ensemble=EnsembleDecision.of(case.ensemble)
        if case.ensemble
        else EnsembleDecision(decision="kept", reason=case.no_ensemble)
        if case.no_ensemble
        else None,
    )


def _promised(case: SymbolCase) -> float | None:
    """What the best trial on the windows of the search gains there over the incumbent, relative."""
    incumbent, trials = (
        case.verdict.incumbent,
        [one.mae("validation") for finding in case.competing for one in finding.candidates if one.trial is not None],
    )
    known = [mae for mae in trials if mae is not None and math.isfinite(mae)]
    return relative_gain(incumbent.mae("validation") if incumbent else None, min(known, default=None))


def _next(verdict: Verdict, beside: Sequence[Finding]) -> str | None:
    study, reason = verdict.finding.study, verdict.decision.reason
    said = returns.option(study.pnl)
    if reason == "not confirmed" and verdict.finding.open:
        return command(f"launch-workers --symbols {study.symbol} --models {study.model}{said}")
    record = verdict.record
    if reason == "stale" and record is not None and (lacking := findings.lacking(record, beside)):
        return command(f"studies confirm {lacking.study.name}")
    if reason in ("not confirmed", "stale"):
        return command(f"studies confirm {study.name}")
    if reason == "not comparable":
        needed = ensembles.models_of(record) if record is not None else ()
        here = {study.model, *(finding.study.model for finding in beside if len(needed) > 1)}
        if missing := [model for model in needed if model in MODELS and model not in here]:  # its own study measures it
            return command(f"launch-workers --symbols {study.symbol} --models {missing[0]}{said}")
        return command(f"promote --symbols {study.symbol}{said} --force")
    return None


def _outcomes(rule: Rule, case: SymbolCase, written: Sequence[Verdict], error: str | None) -> list[ModelOutcome]:
    """The status of every model asked for, by name. error: what kept the others from being written."""
    outcomes = []
    for finding in (*case.competing, *case.left_out):
        study, evidence = finding.study, finding.evidence
        best = evidence.best_on(rule.part) if evidence else None
        own = next((each for each in (case.verdict, *case.own) if each.finding is finding and not each.ensemble), None)
        if any(each is own for each in written):
            assert own is not None
            status, reason = "success", own.decision.reason
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
                mae=best.mae(rule.part) if best else None,
                validation_mae=best.mae("validation") if best else None,
                test_mae=best.mae("test") if best else None,
                passes=evidence.passes if evidence else None,
            )
        )
    return sorted(outcomes, key=lambda outcome: outcome.model)
