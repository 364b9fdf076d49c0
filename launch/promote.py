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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One symbol's decision, as shown and as --json prints it."""

    symbol: str
    study: str
    model: str
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


class NothingToPromote(ValueError):
    """There is no study to promote from."""


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
        if study.model in models:
            newest.setdefault(study.symbol, {})[study.model] = study
    missing = [symbol for symbol in symbols if symbol not in newest]
    if missing:
        raise NothingToPromote(f"{missing[0]}: no study; make one with: launch-workers --symbols {missing[0]}")
    if not newest:
        raise NothingToPromote("no study yet; make some with: launch-workers")
    progress = slots.progress(storage)
    cases = [
        _case(storage, config, list(newest[symbol].values()), progress, min_improvement, force)
        for symbol in symbols or sorted(newest)
    ]
    return [_carry_out(config, case, dry_run=dry_run) for case in cases]


@dataclass(frozen=True, kw_only=True)
class _Case:
    study: Study
    space: Space
    confirmation: Mapping[str, Any] | None  # None: not finished
    record: Record | None
    incumbent: Mapping[str, Any] | None  # how the incumbent did on this study's windows
    decision: Decision


def _case(
    storage: RetryingStorage,
    config: Config,
    studies: Sequence[Study],
    progress: Mapping[int, slots.Progress],
    min_improvement: float,
    force: bool,
) -> _Case:
    """The decision for one symbol: the best model's study against the incumbent."""
    confirmed = {
        study.model: slots.results(storage, study.study_id, slots.CONFIRMATION).get("confirmation")
        for study in studies
        if progress[study.study_id].open == 0
    }
    study = min(studies, key=lambda study: (_mae(confirmed.get(study.model)), study.model))
    confirmation = confirmed.get(study.model)
    own_space = Space(model=study.model, **_space_values(study))
    record = configs.read(config.hyperparams.dir, "best", study.symbol)
    found = _measured_incumbent(study, own_space, record, confirmation)
    decision = promotion.decide(
        _candidate(study, own_space, confirmation),
        None
        if record is None
        else Measured(
            model=record.model,
            config=_params(record, own_space) or record.config,
            mae=found["validation"]["mae"] if found else None,
        ),
        finished=confirmation is not None,
        measured_incumbent=found["params"] if found else None,
        min_improvement=min_improvement,
        force=force,
    )
    return _Case(
        study=study, space=own_space, confirmation=confirmation, record=record, incumbent=found, decision=decision
    )


def _space_values(study: Study) -> dict[str, Any]:
    values = study.definition["space"]
    return {"choices": {name: tuple(c) for name, c in values["choices"].items()}, "fixed": values["fixed"]}


def _mae(confirmation: Mapping[str, Any] | None) -> float:
    candidate = confirmation and confirmation["candidate"]
    return candidate["validation"]["mae"] if candidate else float("inf")


def _params(record: Record, own_space: Space) -> dict[str, Any] | None:
    if record.model != own_space.model:
        return None
    try:
        return space.from_promoted(record.model, record.config, own_space)
    except ValueError:
        return None


def _candidate(study: Study, own_space: Space, confirmation: Mapping[str, Any] | None) -> Measured | None:
    candidate = confirmation and confirmation["candidate"]
    if not candidate:
        return None
    return Measured(model=study.model, config=candidate["params"], mae=candidate["validation"]["mae"])


def _measured_incumbent(
    study: Study, own_space: Space, record: Record | None, confirmation: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The baseline that has the incumbent's params; else the one that was the incumbent when the study opened."""
    if record is None or confirmation is None or record.model != study.model:
        return None
    params = _params(record, own_space)
    baselines = [confirmation[label] for label in ("incumbent", "stored") if label in confirmation]
    exact = [baseline for baseline in baselines if baseline["params"] == params]
    return (exact or baselines or [None])[0]


def _carry_out(config: Config, case: _Case, *, dry_run: bool) -> Row:
    study, decision = case.study, case.decision
    candidate = case.confirmation["candidate"] if case.confirmation else None
    path = config.hyperparams.dir / "best" / f"{study.symbol}.json"
    if decision.promote and not dry_run:
        configs.write(
            config.hyperparams.dir,
            study.symbol,
            payload(config, case),
            folders=(study.model, *FOLDERS),
            expected_digest=case.record.digest if case.record else None,
        )
    incumbent = case.incumbent if decision.reason not in ("stale", "unchanged") else None
    return Row(
        symbol=study.symbol,
        study=study.name,
        model=study.model,
        incumbent_model=case.record.model if case.record else None,
        incumbent_mae=incumbent["validation"]["mae"] if incumbent else None,
        best_mae=candidate["validation"]["mae"] if candidate else None,
        improvement=decision.improvement,
        skill=candidate["validation"]["skill"] if candidate else None,
        test_mae=candidate["test"]["mae"] if candidate else None,
        incumbent_test_mae=incumbent["test"]["mae"] if incumbent else None,
        decision="promoted" if decision.promote else "kept",
        reason=decision.reason,
        path=str(path) if decision.promote or case.record else None,
    )


def payload(config: Config, case: _Case) -> dict[str, Any]:
    """What a promoted file says: the keys that the predecessor's readers expect, and where the numbers come from."""
    study, definition = case.study, case.study.definition
    assert case.confirmation is not None
    candidate, counts = case.confirmation["candidate"], definition["windows"]
    incumbent = case.incumbent if case.decision.improvement is not None else None
    return {
        "symbol": study.symbol,
        "model": study.model,
        "config": space.to_promoted(study.model, candidate["params"], case.space),
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
            "selection_metric": f"validation.{definition['metric']}",
            "selection_value": candidate["validation"]["mae"],
            "previous_mae": incumbent["validation"]["mae"] if incumbent else None,
            "previous_model": case.record.model if case.record else None,
            "previous_config": dict(case.record.config) if case.record else None,
            "improvement": case.decision.improvement,
            "reason": case.decision.reason,
            "skill": candidate["validation"]["skill"],
            "no_change_mae": case.confirmation["no_change"]["validation"]["mae"],
            "fixed": dict(case.space.fixed),
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
