"""What `studies list` and `studies show` print: rows and details read from the database, no model needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage import database, slots
from storage.database import RetryingStorage
from studies import study as studying

BEST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """A study at a glance. MAEs are of the validation windows; improvement and skill are shares."""

    study: str
    symbol: str
    model: str
    as_of: str
    state: str  # "running", "parked" or "finished"
    done: int
    budget: int
    parked: int
    incumbent_mae: float | None
    best_mae: float | None
    improvement: float | None
    skill: float | None


def rows(storage: RetryingStorage, study_ids: Sequence[int] | None = None) -> list[Row]:
    """Every study, or those named by id, sorted by name."""
    progress = slots.progress(storage)
    best = database.best_values(storage)
    baselines = slots.results_of_all(storage, slots.BASELINE)
    found = []
    for study in studying.list_studies(storage):
        if study_ids is not None and study.study_id not in study_ids:
            continue
        now = progress[study.study_id]
        measured = baselines.get(study.study_id, {})
        incumbent = measured.get("incumbent", {}).get("validation", {}).get("mae")
        mae = best.get(study.study_id)
        no_change = study.definition.get("no_change_mae")
        found.append(
            Row(
                study=study.name,
                symbol=study.symbol,
                model=study.model,
                as_of=study.as_of,
                state="running" if now.open else "parked" if now.parked else "finished",
                done=now.done,
                budget=now.budget,
                parked=now.parked,
                incumbent_mae=incumbent,
                best_mae=mae,
                improvement=(incumbent - mae) / incumbent if incumbent and mae is not None else None,
                skill=1 - mae / no_change if mae is not None and no_change else None,
            )
        )
    return found


def details(storage: RetryingStorage, name: str) -> dict[str, Any] | None:
    """All there is to say of one study, as JSON; None where there is none of that name."""
    by_name = {study.name: study for study in studying.list_studies(storage)}
    study = by_name.get(name)
    if study is None:
        return None
    (row,) = rows(storage, [study.study_id])

    return {
        "study": name,
        "state": row.state,
        "budget": row.budget,
        "done": row.done,
        "trials": database.trial_states(storage, study.study_id),
        "incumbent_mae": row.incumbent_mae,
        "best_mae": row.best_mae,
        "improvement": row.improvement,
        "skill": row.skill,
        "best": [
            {"trial": trial.number, "mae": trial.value, "params": trial.params}
            for trial in database.best_trials(storage, study.study_id, BEST_SHOWN)
        ],
        "baselines": slots.results(storage, study.study_id, slots.BASELINE),
        "confirmation": slots.confirmations(storage, [study.study_id])[study.study_id].result,
        "parked": [
            {"stage": item.stage, "slot": item.number, "error": item.error}
            for item in slots.parked(storage, study.study_id)
        ],
        "definition": dict(study.definition),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The details as a person reads them."""
    trials = ", ".join(f"{count} {state}" for state, count in found["trials"].items()) or "none"
    lines = [
        f"{found['study']}  {found['state']}  {found['done']}/{found['budget']} trials ({trials})",
        f"no change      mae {_mae(found['definition'].get('no_change_mae'))}",
    ]
    for label, measured in found["baselines"].items():
        lines.append(f"{label:<14} mae {_mae(measured['validation']['mae'])}  {_params(measured['params'])}")
    for trial in found["best"]:
        lines.append(f"trial {trial['trial']:<8} mae {_mae(trial['mae'])}  {_params(trial['params'])}")
    confirmed = found["confirmation"] or {"candidates": (), "baselines": {}}
    for one in sorted(confirmed["candidates"], key=lambda one: one["confirmation"]["mae"]):
        lines.append(f"confirmed {one['trial']:<4} {_confirmed(one)}")
    for label, one in confirmed["baselines"].items():
        lines.append(f"{label:<14} {one['error'] if 'error' in one else _confirmed(one)}")
    for parked in found["parked"]:
        lines.append(f"parked slot {parked['slot']}: {parked['error']}")
    for key in ("bars", "checkpoint"):
        lines.append(f"{key:<14} {found['definition'][key]}")
    lines.append(f"windows        {_params(found['definition']['windows'])}")
    return "\n".join(lines)


def _confirmed(one: Mapping[str, Any]) -> str:
    confirmation, test = one["confirmation"], one["test"]
    return (
        f"mae {_mae(confirmation['mae'])} on {confirmation['windows']}  skill {confirmation['skill']:+.4f}  "
        f"test {_mae(test['mae'])}  {_params(one['params'])}"
    )


def _mae(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _params(params: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())
