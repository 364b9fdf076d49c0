"""What `studies list` and `studies show` print: rows and details read from the database, no model needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.output import counted, say, show
from launch.views.tables import NOTHING, Column, assigned, fitted, number, share
from storage import slots, study_rows
from storage.database import RetryingStorage
from storage.progress import (
    first_parked_slots,
    parked_slots,
    pick_results,
    read_confirmations,
    stage_results,
    study_progress,
    worker_seconds,
)
from studies import importance
from studies import study as studying

BEST_SHOWN = 5
# Of a confirmation's result, in which baselines that could not be measured have no numbers.
CONFIRMED = {
    "mae": "$.candidates[*].confirmation.mae",
    "skill": "$.candidates[*].confirmation.skill",
    "incumbent": "$.baselines.incumbent.confirmation.mae",
    "incumbent_validation": "$.baselines.incumbent.validation.mae",
}


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A study at a glance. Improvements, over the incumbent, and skills are shares.

    Plain numbers are of the search's windows, confirmed ones of the confirmation's; a best is never compared with an
    incumbent of other windows.
    """

    study: str
    symbol: str
    model: str
    as_of: str
    state: str  # "running", "parked" or "finished"
    done: int
    budget: int
    parked: int
    parked_reason: str | None  # of the first parked slot
    incumbent_mae: float | None
    best_mae: float | None
    improvement: float | None
    skill: float | None
    confirmed_incumbent_mae: float | None
    confirmed_mae: float | None  # the lowest among the confirmed candidates
    confirmed_improvement: float | None
    confirmed_skill: float | None


def rows(storage: RetryingStorage, study_ids: Sequence[int] | None = None) -> list[StudyRow]:
    """Every study, or those named by id, sorted by name."""
    progress = study_progress(storage)
    best = study_rows.best_values(storage, study_ids)
    baselines = pick_results(storage, slots.BASELINE, {"mae": "$.validation.mae"}, study_ids, label="incumbent")
    confirmations = pick_results(storage, slots.CONFIRMATION, CONFIRMED, study_ids)
    reasons = first_parked_slots(storage, study_ids)
    found = []
    for study in studying.list_studies(storage):
        if study_ids is not None and study.study_id not in study_ids:
            continue
        now = progress[study.study_id]
        confirmed = confirmations.get(study.study_id, dict.fromkeys(CONFIRMED, ()))
        measured = baselines.get(study.study_id, {"mae": ()})
        incumbent = _first(confirmed["incumbent_validation"]) or _first(measured["mae"])
        mae = best.get(study.study_id)
        no_change = study.definition.get("no_change_mae")
        confirmed_mae, confirmed_skill = min(
            zip(confirmed["mae"], confirmed["skill"], strict=True), default=(None, None)
        )
        confirmed_incumbent = _first(confirmed["incumbent"])
        parked = reasons.get(study.study_id)
        found.append(
            StudyRow(
                study=study.name,
                symbol=study.symbol,
                model=study.model,
                as_of=study.as_of,
                state=now.state,
                done=now.done,
                budget=now.budget,
                parked=now.parked,
                parked_reason=parked.error if parked else None,
                incumbent_mae=incumbent,
                best_mae=mae,
                improvement=_improvement(incumbent, mae),
                skill=1 - mae / no_change if mae is not None and no_change else None,
                confirmed_incumbent_mae=confirmed_incumbent,
                confirmed_mae=confirmed_mae,
                confirmed_improvement=_improvement(confirmed_incumbent, confirmed_mae),
                confirmed_skill=confirmed_skill,
            )
        )
    return found


def _first(values: Sequence[float]) -> float | None:
    return values[0] if values else None


def _improvement(incumbent: float | None, mae: float | None) -> float | None:
    return (incumbent - mae) / incumbent if incumbent and mae is not None else None


def table(rows: Sequence[StudyRow], width: int) -> Table:
    """The rows in lines of at most `width` cells; a narrow one leaves columns out, never a study."""

    def state(row: StudyRow) -> str:
        return f"{row.state} ({row.parked} parked)" if row.parked and row.state != "parked" else row.state

    return fitted(
        [
            Column(
                heading="study",
                cells=[row.study for row in rows],
                shorter=[f"{row.symbol}/{row.model}" for row in rows] if _newest_only(rows) else (),
            ),
            Column(heading="state", cells=[state(row) for row in rows], keep=9),
            Column(heading="trials", cells=[f"{row.done}/{row.budget}" for row in rows], right=True, keep=8),
            Column(heading="incumbent", cells=[number(row.incumbent_mae) for row in rows], right=True, keep=2),
            Column(heading="best", cells=[number(row.best_mae) for row in rows], right=True, keep=5),
            Column(heading="better by", cells=[share(row.improvement) for row in rows], right=True, keep=4),
            Column(heading="skill", cells=[share(row.skill) for row in rows], right=True, keep=3),
            Column(heading="confirmed", cells=[number(row.confirmed_mae) for row in rows], right=True, keep=1),
            Column(heading="better by", cells=[share(row.confirmed_improvement) for row in rows], right=True, keep=7),
            Column(heading="skill", cells=[share(row.confirmed_skill) for row in rows], right=True, keep=6),
        ],
        width,
    )


def _newest_only(rows: Sequence[StudyRow]) -> bool:
    """Whether symbol and model tell the studies apart."""
    return len({(row.symbol, row.model) for row in rows}) == len(rows)


def print_rows(
    storage: RetryingStorage, study_ids: Sequence[int] | None = None, *, as_json: bool = False, plain: bool = False
) -> None:
    """Print every study, or those named by id. plain: no control characters, on a terminal neither."""
    found = rows(storage, study_ids)
    if found or as_json:
        show(found, table, as_json=as_json, plain=plain)
    else:
        say("no studies yet; make some with launch-workers")


def details(storage: RetryingStorage, name: str) -> dict[str, Any] | None:
    """All there is to say of one study, as JSON; None where there is none of that name."""
    by_name = {study.name: study for study in studying.list_studies(storage)}
    study = by_name.get(name)
    if study is None:
        return None
    (row,) = rows(storage, [study.study_id])
    seconds = worker_seconds(storage, [study.study_id]).get(study.study_id, {})
    importances, too_few = importance.importances(storage, name)
    return {
        **asdict(row),
        "trials": study_rows.trial_states(storage, study.study_id),
        "best": [
            {"trial": trial.number, "mae": trial.value, "params": trial.params}
            for trial in study_rows.best_trials(storage, study.study_id, BEST_SHOWN)
        ],
        "baselines": stage_results(storage, study.study_id, slots.BASELINE),
        "confirmation": read_confirmations(storage, [study.study_id])[study.study_id].result,
        "parked": [
            {"stage": item.stage, "slot": item.number, "error": item.error}
            for item in parked_slots(storage, study.study_id)
        ],
        "seconds": seconds,
        "importances": importances,
        "importances_missing": too_few,
        "definition": dict(study.definition),
    }


# --- one study, for a person ----------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any], width: int) -> RenderableType:
    """The details as a person reads them, in lines of at most `width` cells where words allow."""
    trials = ", ".join(f"{count} {state}" for state, count in found["trials"].items()) or "none"
    parts: list[RenderableType] = [
        Text(f"{found['study']}  {found['state']}  {found['done']}/{found['budget']} trials ({trials})"),
        *_section("on the windows of the search", _searched(found, width)),
    ]
    if found["confirmation"]:
        confirmed = found["confirmation"]
        of = ", ".join(f"{part['count']} {name}" for name, part in confirmed["windows"].items() if name != "validation")
        heading = f"confirmed on {of} windows, {counted(confirmed['passes'], 'pass')}"
        parts += _section(heading, _confirmed(confirmed, width))
    parts += _section("configurations", _configurations(found))
    parts += _section("worker time by stage", _seconds(found["seconds"], width))
    parts += _section("importance of the knobs (PED-ANOVA)", _importances(found, width))
    for parked in found["parked"]:
        parts.append(Text(f"parked slot {parked['slot']}: {parked['error']}"))
    definition = found["definition"]
    parts.append(Text())
    parts += [Text(f"{key:<10} {definition[key]}") for key in ("bars", "checkpoint")]
    parts.append(Text(f"{'windows':<10} {assigned(definition['windows']) or NOTHING}"))
    return Group(*parts)


def _section(heading: str, body: RenderableType) -> list[RenderableType]:
    return [Text(), Text(heading, style="bold"), body]


def _searched(found: Mapping[str, Any], width: int) -> Table:
    no_change = found["definition"].get("no_change_mae")
    lines = [("no change", no_change, None)]
    lines += [(label, one["validation"]["mae"], None) for label, one in found["baselines"].items()]
    lines += [(f"trial {trial['trial']}", trial["mae"], found["incumbent_mae"]) for trial in found["best"]]
    return fitted(
        [
            Column(heading="", cells=[label for label, _, _ in lines]),
            Column(heading="mae", cells=[number(mae) for _, mae, _ in lines], right=True, keep=3),
            Column(
                heading="better by",
                cells=[share(_improvement(incumbent, mae)) for _, mae, incumbent in lines],
                right=True,
                keep=2,
            ),
            Column(
                heading="skill",
                cells=[share(_improvement(no_change, mae)) for _, mae, _ in lines],
                right=True,
                keep=1,
            ),
        ],
        width,
    )


def _confirmed(confirmed: Mapping[str, Any], width: int) -> Table:
    measured = sorted(confirmed["candidates"], key=lambda one: one["confirmation"]["mae"])
    lines = [(f"trial {one['trial']}", one) for one in measured]
    lines += [(label, one) for label, one in confirmed["baselines"].items() if "error" not in one]
    incumbent = confirmed["baselines"].get("incumbent", {})

    def numbers(windows: str, key: str) -> list[float]:
        return [one[windows][key] for _, one in lines]

    def gains(windows: str) -> list[str]:
        base = incumbent.get(windows, {}).get("mae")
        return [share(None if one is incumbent else _improvement(base, one[windows]["mae"])) for _, one in lines]

    return fitted(
        [
            Column(heading="", cells=[label for label, _ in lines]),
            Column(heading="mae", cells=[number(mae) for mae in numbers("confirmation", "mae")], right=True, keep=6),
            Column(heading="better by", cells=gains("confirmation"), right=True, keep=5),
            Column(heading="skill", cells=[share(one) for one in numbers("confirmation", "skill")], right=True, keep=4),
            Column(heading="test mae", cells=[number(mae) for mae in numbers("test", "mae")], right=True, keep=3),
            Column(heading="better by", cells=gains("test"), right=True, keep=2),
            Column(heading="skill", cells=[share(one) for one in numbers("test", "skill")], right=True, keep=1),
        ],
        width,
    )


def _configurations(found: Mapping[str, Any]) -> RenderableType:
    named = {f"trial {one['trial']}": one["params"] for one in found["best"]}
    named |= {label: one["params"] for label, one in found["baselines"].items()}
    confirmed = found["confirmation"] or {"candidates": (), "baselines": {}}
    named |= {f"trial {one['trial']}": one["params"] for one in confirmed["candidates"]}
    named |= {label: one["params"] for label, one in confirmed["baselines"].items()}
    errors = [f"{label}: {one['error']}" for label, one in confirmed["baselines"].items() if "error" in one]
    width = max((len(name) for name in named), default=0)
    return Group(
        *(_hanging(name, assigned(params) or NOTHING, width) for name, params in named.items()), *map(Text, errors)
    )


def _hanging(name: str, words: str, width: int) -> Table:
    """Words that wrap beside a name."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=width)
    grid.add_column()
    grid.add_row(Text(name), Text(words))
    return grid


def _seconds(seconds: Mapping[str, float], width: int) -> RenderableType:
    total = sum(seconds.values())
    if not total:
        return Text("none told yet")
    seconds = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return fitted(
        [
            Column(heading="", cells=list(seconds)),
            Column(heading="time", cells=[f"{value:.3f} s" for value in seconds.values()], right=True),
            Column(heading="share", cells=[f"{100 * value / total:.1f}%" for value in seconds.values()], right=True),
        ],
        width,
    )


def _importances(found: Mapping[str, Any], width: int) -> RenderableType:
    if found["importances"] is None:
        return Text(found["importances_missing"])
    return fitted(
        [
            Column(heading="", cells=list(found["importances"])),
            Column(heading="share", cells=[f"{100 * one:.1f}%" for one in found["importances"].values()], right=True),
        ],
        width,
    )
