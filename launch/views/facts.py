"""What there is to say of one study, read from the database once, and the tables of it that every view shows.

Loads no model. Knows nothing of where it is shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.views.decisions import NEXT
from launch.views.tables import (
    NOTHING,
    Column,
    Table,
    basis_points,
    duration,
    numbers,
    percent_error,
    percent_gain,
    percent_share,
)
from storage import board, slots, study_rows
from storage.commands import command
from storage.progress import Parked, Progress, parked_slots, read_confirmations, stage_results, worker_seconds
from storage.retrying import RetryingStorage
from studies import evidence, returns
from studies.evidence import StudyEvidence, params_text, relative_gain
from studies.study import Study

BEST_SHOWN = 5  # trials
DECISION, CONFIRMATION = "decision", "confirmation"  # user attributes of a study that are read again
CLIPPED = "clipped"  # user attribute of a trial: the share of the last origins whose last close it clips
UNDECIDED = "none yet"
STAGES = {slots.BASELINE: "configuration in use", slots.TRIAL: "trial", slots.CONFIRMATION: "confirmation"}


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What there is to say of a study. MAEs are relative to the last close."""

    study: Study
    progress: Progress
    states: Mapping[str, int]  # number of trials by state
    values: Mapping[int, float]  # MAE on the search windows by number of the complete trial
    best: Sequence[study_rows.FrozenTrial]  # the best trials of the search, best first; first values are MAEs as above
    front: Sequence[
        study_rows.FrozenTrial
    ]  # of MAE and return a bar, lowest MAE first; none where no return is searched
    baselines: Mapping[str, Mapping[str, Any]]  # what was in use when the search began, by label, as stored
    result: Mapping[str, Any] | None  # of the confirmation, as stored; `evidence` is the same, typed
    evidence: StudyEvidence | None
    seconds: Mapping[str, float]  # of workers by stage
    parked: Sequence[Parked]
    decision: str | None  # what `promote` last decided on this evidence

    @property
    def no_change_mae(self) -> float | None:
        return self.study.definition.get("no_change_mae")

    @property
    def in_use_maes(self) -> dict[str, float]:
        """MAE on the search windows of what is in use, by label; as confirmed, where it was confirmed."""
        found = {label: one["validation"]["mae"] for label, one in self.baselines.items()}
        confirmed = self.evidence.in_use if self.evidence else {}
        return found | {label: mae for label, one in confirmed.items() if (mae := one.mae("validation")) is not None}

    @property
    def incumbent_mae(self) -> float | None:
        return self.in_use_maes.get(evidence.INCUMBENT)

    @property
    def configurations(self) -> dict[str, Mapping[str, Any]]:
        """The parameters of every configuration that a table names, by its name there."""
        found: dict[str, Mapping[str, Any]] = {
            trial_name(trial.number): trial.params for trial in (*self.front, *self.best)
        }
        found |= {label: one["params"] for label, one in self.baselines.items()}
        if self.evidence:
            found |= {self.evidence.title(one): one.params for one in self.evidence.candidates}
            found |= {label: one.params for label, one in self.evidence.in_use.items()}
        return found

    @property
    def confirmation_id(self) -> str | None:
        """Tells two results of a confirmation apart."""
        if not self.result:
            return None
        return hashlib.sha256(json.dumps(self.result, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def progress_text(self) -> str:
        """How far the search is: "98 of 100 trials, 12 pruned, 2 parked"."""
        text = f"{self.progress.done} of {self.progress.budget} trials"
        if pruned := self.states.get("pruned"):
            text += f", {pruned} pruned"
        return f"{text}, {self.progress.parked} parked" if self.progress.parked else text

    @property
    def time_text(self) -> str:
        """What workers spent their time on, longest first."""
        longest_first = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{stage} {duration(spent)}" for stage, spent in longest_first if spent >= 0.05)

    @property
    def next_command(self) -> str:
        """The command that takes the study a step further."""
        study, pnl = self.study, returns.option(self.study.pnl)
        if self.progress.state != "finished" or self.result is None:
            return command(f"launch-workers --symbols {study.symbol} --models {study.model}{pnl}")
        if self.decision and NEXT in self.decision:
            return self.decision.rsplit(NEXT, 1)[1]
        if self.decision:
            return command(
                f"launch-workers --symbols {study.symbol}{pnl}"
            )  # opens a new study where there are newer bars
        return command(f"promote --symbols {study.symbol}{pnl}")


def gather(storage: RetryingStorage, study: Study, progress: Progress, *, decision: str | None = None) -> StudyFacts:
    """Read everything about a study.

    decision: a new one; without it the last one counts, as long as it was made on the same confirmation.
    Raises DatabaseUnavailable.
    """
    study_id = study.study_id
    confirmation = read_confirmations(storage, [study_id]).get(study_id)
    result = confirmation.result if confirmation else None
    facts = StudyFacts(
        study=study,
        progress=progress,
        states=study_rows.trial_states(storage, study_id),
        values=board.trial_values(storage, study_id),
        best=study_rows.best_trials(storage, study_id, BEST_SHOWN),
        front=returns.read_front(storage, study.name) if study.pnl else (),
        baselines=stage_results(storage, study_id, slots.BASELINE),
        result=result,
        evidence=evidence.from_json(study.model, result) if result else None,
        seconds=worker_seconds(storage, [study_id]).get(study_id, {}),
        parked=parked_slots(storage, study_id),
        decision=decision if result else None,
    )
    if result and decision is None:
        known = storage.get_study_user_attrs(study_id)
        if known.get(CONFIRMATION) == facts.confirmation_id and known.get(DECISION) != UNDECIDED:
            return replace(facts, decision=known.get(DECISION))
    return facts


# --- tables ---------------------------------------------------------------------------------------------------


def search_table(facts: StudyFacts) -> Table:
    """The best trials, what is in use and "no change" on the windows of the search."""
    in_use, no_change = facts.in_use_maes, facts.no_change_mae
    maes = {trial_name(trial.number): trial.values[0] for trial in facts.best} | in_use
    incumbent = facts.incumbent_mae
    gains = [percent_gain(None if name in in_use else relative_gain(incumbent, mae)) for name, mae in maes.items()]
    skills = [percent_gain(relative_gain(no_change, mae)) for mae in maes.values()]
    configurations = facts.configurations
    clipped = {trial_name(trial.number): trial.user_attrs.get(CLIPPED) for trial in facts.best}
    return Table(
        columns=[
            Column(heading="", cells=[*maes, "no change"]),
            numbers("MAE", [percent_error(mae) for mae in (*maes.values(), no_change)], 4),
            numbers("improvement", [*gains, NOTHING], 3),
            numbers("skill", [*skills, NOTHING], 2),
            *_clipped([*(clipped.get(name) for name in maes), None]),
            Column(
                heading="configuration", cells=[*(params_text(configurations[n]) for n in maes), NOTHING], code=True
            ),
        ]
    )


def front_table(facts: StudyFacts) -> Table:
    """The Pareto front of MAE and return, on the windows of the search."""
    return Table(
        columns=[
            Column(heading="", cells=[trial_name(trial.number) for trial in facts.front]),
            numbers("MAE", [percent_error(trial.values[0]) for trial in facts.front]),
            numbers("return a bar, bp", [basis_points(trial.values[1]) for trial in facts.front]),
            Column(heading="configuration", cells=[params_text(trial.params) for trial in facts.front], code=True),
        ]
    )


def front_title(facts: StudyFacts) -> str:
    """What the table of the front is headed."""
    return f"Pareto front of MAE and net return of {facts.study.pnl}"


CONFIRMED_SHOWN = 10  # configurations: a whole grid has dozens


def confirmation_table(found: StudyEvidence) -> Table:
    """The best of what was confirmed and the default, then what is in use; what was not measured says why."""
    shown = [one for place, one in enumerate(found.ranked) if place < CONFIRMED_SHOWN or one.source == "default"]
    named = {found.title(one): one for one in shown} | dict(found.in_use)
    measured = list(named.values())
    said = [params_text(one.params) if one.error is None else one.error for one in measured]

    def maes(part: evidence.Part, heading: str, priority: int) -> Column:
        values = [*(one.mae(part) for one in measured), found.no_change[part].mae]
        return numbers(heading, [percent_error(mae) for mae in values], priority)

    def gains(part: evidence.Part, heading: str, priority: int) -> Column:
        incumbent = found.incumbent
        old = incumbent.mae(part) if incumbent else None
        values = [None if one is incumbent else relative_gain(old, one.mae(part)) for one in measured]
        return numbers(heading, [*map(percent_gain, values), NOTHING], priority)

    def skills(part: evidence.Part, heading: str, priority: int) -> Column:
        values = [one.on(part) for one in measured]
        return numbers(heading, [*(percent_gain(one.skill if one else None) for one in values), NOTHING], priority)

    return Table(
        columns=[
            Column(heading="", cells=[*named, "no change"]),
            maes("confirmation", "MAE", 7),
            gains("confirmation", "own improvement", 6),
            skills("confirmation", "skill", 5),
            *_clipped([*(one.clipped for one in measured), None], 4),
            maes("test", "test MAE", 3),
            gains("test", "test improvement", 2),
            skills("test", "test skill", 1),
            Column(heading="configuration", cells=[*said, NOTHING], code=True),
        ]
    )


def _clipped(shares: Sequence[float | None], priority: int = 1) -> list[Column]:
    """At which share of origins a configuration clips the last close; no column where none is known to."""
    cells = [NOTHING if share is None else percent_share(share) for share in shares]
    return [numbers("clipped", cells, priority)] if any(share is not None for share in shares) else []


def trial_name(number: int | None) -> str:
    """How tables and figures name a trial."""
    return f"trial {number}"
