"""What the confirmations of studies say, by symbol, for those who decide: which numbers are comparable and pooled.

Reads the database; loads no model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from storage import configs
from storage.commands import command
from storage.configs import ConfigFileError, Record
from storage.progress import read_confirmations, study_progress
from storage.retrying import RetryingStorage
from studies import ensembles, space
from studies import study as studying
from studies.beliefs import Case, SymbolBeliefs, beliefs_of, can_be_pooled
from studies.config import Config
from studies.ensembles import Ensemble, Member
from studies.evidence import ENSEMBLE, PARTS, MeasuredConfiguration, Part, StudyEvidence, from_json
from studies.space import Space
from studies.study import Study

log = logging.getLogger(__name__)

SAME = ("metric", "objective", "bars")  # parts of a definition that make two models comparable
SAME_WINDOWS = ("horizon", "validation", "test", "min_context")


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
        return self._params(record.model, record.config, record.metadata)

    def _params(self, model: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any] | None:
        if model != self.study.model:
            return None
        try:
            return space.from_promoted(config, metadata, self.space)
        except ValueError:
            return None

    def measured(self, record: Record) -> MeasuredConfiguration | None:
        """How a promoted file's configuration did here."""
        params = self.params_of(record)
        return None if params is None or self.evidence is None else self.evidence.find(params)

    def member(self, said: Member) -> MeasuredConfiguration | None:
        """How a member of an ensemble did here, with its points."""
        params = self._params(said.model, said.config, said.metadata)
        if params is None or self.evidence is None:
            return None
        everyone = (*self.evidence.in_use.values(), *self.evidence.candidates)
        return next((one for one in everyone if one.params == params and one.points), None)


def find(
    storage: RetryingStorage, key: str, symbols: Collection[str] = (), *, others: bool = False, pnl: str = ""
) -> dict[str, list[Finding]]:
    """The newest study of a key for every symbol, or for these, and model, with its evidence.

    others: also for the other symbols, with what was measured on the confirmation windows alone, to pool with.
    pnl: those that search this strategy's return too; by default those that search none.
    Raises DatabaseUnavailable.
    """
    studies = [
        study
        for study in studying.list_studies(storage)
        if study.key == key and study.pnl == pnl and (others or not symbols or study.symbol in symbols)
    ]
    progress = study_progress(storage, [study.study_id for study in studies])
    newest: dict[tuple[str, str], Study] = {}
    for study in sorted(studies, key=lambda study: study.as_of):
        if study.study_id in progress:
            newest[study.symbol, study.model] = study
        else:
            log.warning("%s: left out, as it has no budget; a copy made with Optuna?", study.name)
    confirmations = read_confirmations(storage, [study.study_id for study in newest.values()])
    found: dict[str, list[Finding]] = {}
    for study in newest.values():
        is_open = progress[study.study_id].open > 0
        result = None if is_open else confirmations[study.study_id].result
        parts: tuple[Part, ...] = PARTS if not symbols or study.symbol in symbols else ("confirmation",)
        found.setdefault(study.symbol, []).append(
            Finding(
                study=study,
                space=Space.from_json(study.model, study.definition["space"]),
                open=is_open,
                evidence=from_json(study.model, result, parts) if result else None,
            )
        )
    return found


def reference_of(findings: Iterable[Finding]) -> Finding:
    """That whose windows the others must have to compare: of the newest bars that something is confirmed on."""
    return max(findings, key=lambda finding: (finding.evidence is not None, finding.study.as_of))


def comparable(one: Finding, other: Finding) -> bool:
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


def measured(record: Record, findings: Sequence[Finding]) -> MeasuredConfiguration | None:
    """How a promoted file's configuration did where these were confirmed, on the same windows; None: not measured.

    Of an ensemble, the weighted mean of its members' points. Raises ConfigFileError for one that says no members.
    """
    if record.model != ENSEMBLE:
        return next((found for finding in findings if (found := finding.measured(record))), None)
    members = []
    for said in ensembles.members_of(record):
        one = next((found for finding in findings if (found := finding.member(said))), None)
        if one is None:
            return None
        members.append((one, said.weight))
    evidence = next(finding.evidence for finding in findings if finding.evidence)
    return ensembles.measured(members, evidence)


def can_measure(record: Record, findings: Sequence[Finding]) -> bool:
    """Whether these studies could have measured a promoted file's configuration, all that it needs."""
    confirmed = [finding for finding in findings if finding.evidence]
    if record.model != ENSEMBLE:
        return any(finding.params_of(record) for finding in confirmed)
    return {one.model for one in ensembles.members_of(record)} <= {finding.study.model for finding in confirmed}


def lacking(record: Record, findings: Sequence[Finding]) -> Finding | None:
    """The study that could measure a member of a promoted ensemble, and has not; None: there is none."""
    said = {one.model: one for one in ensembles.members_of(record)} if record.model == ENSEMBLE else {}
    asked = [finding for finding in findings if finding.study.model in said]
    return next((finding for finding in asked if not finding.member(said[finding.study.model])), None)


def competing_of(findings: Sequence[Finding], models: Collection[str]) -> tuple[Finding, list[Finding]] | None:
    """Of these models, that whose windows the others must have, and all that have them; None: there is none."""
    asked = [one for one in findings if one.study.model in models]
    if not asked:
        return None
    reference = reference_of(asked)
    return reference, [one for one in asked if comparable(one, reference)]


def cases_of(config: Config, found: Mapping[str, Sequence[Finding]], models: Collection[str]) -> list[Case]:
    """What was measured at every symbol that is confirmed for one of these models, with an ensemble that is in use."""
    cases = []
    for findings in found.values():
        competing = competing_of(findings, models)
        if competing and (reference := competing[0]).evidence is not None:
            beside = [one for one in findings if comparable(one, reference)]
            cases.append(_case(beside, _ensemble_in_use(config, beside)))
    return cases


def _ensemble_in_use(config: Config, findings: Sequence[Finding]) -> list[MeasuredConfiguration]:
    try:
        record = configs.read(config.hyperparams.dir, "best", findings[0].study.symbol)
        found = measured(record, findings) if record and record.model == ENSEMBLE else None
    except ConfigFileError:  # said where its own symbol is decided
        found = None
    return [found] if found else []


def offers(
    found: Mapping[str, Sequence[Finding]], models: Collection[str]
) -> tuple[dict[str, Ensemble], dict[str, str]]:
    """By symbol the ensemble of these models that its evidence asks for, or why there is none."""
    made: dict[str, Ensemble] = {}
    refused: dict[str, str] = {}
    for symbol, findings in found.items():
        competing = competing_of(findings, models)
        evidence = {one.study.name: one.evidence for one in competing[1] if one.evidence} if competing else {}
        try:
            made[symbol] = ensembles.make(evidence)
        except ensembles.NoEnsemble as error:
            refused[symbol] = str(error)
    return made, refused


def believe_later(config: Config, cases: Sequence[Case], made: Mapping[str, Ensemble]) -> dict[str, SymbolBeliefs]:
    """What is believed on the later half of the confirmation windows, of the ensembles too, where it can be pooled."""
    halves = [ensembles.later_case(case, made.get(case.symbol)) for case in cases]
    believed = beliefs_of(halves, pool=config.promotion.pool, pool_days=config.promotion.pool_days)
    return {case.symbol: beliefs for case, beliefs in zip(halves, believed, strict=True) if beliefs is not None}


def believe(
    config: Config, cases: Sequence[Case], found: Mapping[str, Sequence[Finding]], wanted: Sequence[str]
) -> dict[str, SymbolBeliefs]:
    """What is believed of these symbols' configurations, given those of all symbols.

    cases: as of `cases_of` those found. A symbol that cannot be pooled has no entry, and a line says so.
    """
    pool, days = config.promotion.pool, config.promotion.pool_days
    for name, pattern in {} if isinstance(pool, str) else pool.items():
        if not any(fnmatchcase(symbol, pattern) for symbol in found):
            log.warning("[promotion.pool] %s = %r fits no symbol", name, pattern)
    believed = beliefs_of(cases, pool=pool, pool_days=days)
    alone = [case for case, beliefs in zip(cases, believed, strict=True) if beliefs is None and case.symbol in wanted]
    if outdated := sorted(case.symbol for case in alone if not can_be_pooled(case)):
        again = command(f"studies confirm {found[outdated[0]][0].study.name}")
        log.warning("%s: confirmed without the default configuration, so not pooled; next: %s", _some(outdated), again)
    if pool != "none" and (single := sorted(case.symbol for case in alone if can_be_pooled(case))):
        log.warning(
            "%s: no other symbol of the same question within %g days to pool with; decided on the own evidence",
            _some(single),
            days,
        )
    return {case.symbol: beliefs for case, beliefs in zip(cases, believed, strict=True) if beliefs is not None}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _case(findings: Sequence[Finding], ensemble_in_use: Sequence[MeasuredConfiguration]) -> Case:
    """Of one symbol's comparable findings."""
    first = findings[0]
    evidence = {one.study.model: one.evidence for one in findings if one.evidence is not None}
    definition, reference = first.study.definition, next(iter(evidence.values()))
    same = {part: definition[part] for part in SAME if part != "bars"}
    windows = {part: definition["windows"][part] for part in SAME_WINDOWS}
    return Case(
        symbol=first.study.symbol,
        as_of=np.datetime64(first.study.as_of.removesuffix("Z")),
        question=json.dumps([same, windows, reference.windows["confirmation"].count]),
        checkpoints={one.study.model: one.study.definition["checkpoint"] for one in findings},
        candidates=[candidate for found in evidence.values() for candidate in found.candidates],
        in_use=[*(one for found in evidence.values() for one in found.in_use.values()), *ensemble_in_use],
        no_change=reference.no_change_configuration,
    )
