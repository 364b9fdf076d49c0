"""What optuna-dashboard shows of a study: its note, plots, image and attributes, rewritten as a run goes.

Reads slots and trials, loads no model. Written by the supervisor and by `promote`, never by a worker. Errors are shown
in per cent of the last close; plots and image are those of figures.py.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.output import counted
from launch.views import figures
from launch.views.tables import assigned
from storage import board, slots, study_rows
from storage.board import Image
from storage.database import RetryingStorage
from storage.progress import (
    Parked,
    Progress,
    parked_slots,
    read_confirmations,
    stage_results,
    study_progress,
    worker_seconds,
)
from studies.promoting import SymbolDecision
from studies.study import Study, list_studies

EVERY_S = 30.0  # between two rewritings during a run; the first brings plotly and matplotlib, a second of CPU
SHARE = 0.01  # of the time, at most, that they may take
PARKED_SHOWN = 5
DECISION, CONFIRMATION = "decision", "confirmation"  # study user attributes that are read again
UNDECIDED = "none yet"
STAGES = {slots.BASELINE: "in use", slots.TRIAL: "trial", slots.CONFIRMATION: "confirmation"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is to say of a study. MAEs are relative to the last close."""

    study: Study
    progress: Progress
    states: Mapping[str, int]  # trials by state
    values: Mapping[int, float]  # MAE of the complete trials
    best_params: Mapping[str, Any]
    incumbent_mae: float | None  # on the search's windows
    result: Mapping[str, Any] | None  # of the confirmation
    confirmation: str | None  # tells two results apart
    seconds: Mapping[str, float]  # of workers, by what they went into
    parked: Sequence[Parked]
    decision: str | None

    @property
    def best_trial(self) -> int | None:
        return min(self.values, key=lambda number: (self.values[number], number), default=None)


class NoteWriter:
    """Reports how far a run is, and now and then rewrites the notes of the studies that moved.

    report: what else is called each time. say: one line for the user, when images cannot be kept.
    """

    def __init__(
        self,
        storage: RetryingStorage,
        folder: Path,
        studies: Sequence[Study],
        *,
        report: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._storage, self._folder, self._studies = storage, folder, studies
        self._report, self.say = report, say
        self._written: dict[int, Progress] = {}
        self._next = time.monotonic() + EVERY_S
        self._complained = False

    def __call__(self) -> None:
        self._report()
        began = time.monotonic()
        if began >= self._next:
            self.write()
            took = time.monotonic() - began
            self._next = began + max(EVERY_S, took / SHARE)

    def write(self) -> None:
        """Rewrite the notes of the studies that moved since the last time."""
        progress = study_progress(self._storage)
        moved = [
            study
            for study in self._studies
            if (now := progress.get(study.study_id)) and now != self._written.get(study.study_id) and _has_begun(now)
        ]
        try:
            update(self._storage, self._folder, moved)
        except OSError as error:
            if not self._complained:
                self.say(no_images(self._folder, error))
            self._complained = True
        self._written |= {study.study_id: progress[study.study_id] for study in moved}


def decided(
    storage: RetryingStorage, folder: Path, rows: Sequence[SymbolDecision], *, say: Callable[[str], None]
) -> None:
    """Put what a promotion decided into the notes of the studies that it looked at."""
    names = {pair.study for row in rows for pair in row.pairs}
    try:
        update(storage, folder, [study for study in list_studies(storage) if study.name in names], rows=rows)
    except OSError as error:
        say(no_images(folder, error))


def no_images(folder: Path, error: OSError) -> str:
    return f"{folder}: no images for the dashboard: {error.strerror}; set [storage] artifacts_dir"


def _has_begun(progress: Progress) -> bool:
    return bool(progress.done or progress.parked or not progress.open)


def update(
    storage: RetryingStorage, folder: Path, studies: Iterable[Study], *, rows: Sequence[SymbolDecision] | None = None
) -> None:
    """Rewrite what the dashboard shows of studies.

    folder: where images are kept. rows: what a promotion decided; without them the last decision stays, as long as it
    is of the same confirmation.
    Raises OSError if an image cannot be kept, after everything else was written.
    """
    failure: OSError | None = None
    decisions = _decisions(rows or ())
    progress = study_progress(storage)
    for study in studies:
        if study.study_id not in progress:
            continue
        facts = gather(storage, study, progress[study.study_id], decision=decisions.get(study.name))
        image = None
        try:
            image = _image(folder, facts)
        except OSError as error:
            failure = error
        board.put(
            storage,
            study.study_id,
            note=note(facts, image),
            plots=plots(facts),
            attributes=_attributes(facts),
            image=image,
            folder=folder,
        )
    if failure is not None:
        raise failure


def gather(storage: RetryingStorage, study: Study, progress: Progress, *, decision: str | None = None) -> Facts:
    """All facts of a study. decision: a new one; else the last, as long as it is of the same confirmation."""
    study_id = study.study_id
    result = read_confirmations(storage, [study_id])[study_id].result
    confirmation = _digest(result) if result else None
    if result and decision is None:
        known = storage.get_study_user_attrs(study_id)
        decision = known.get(DECISION) if known.get(CONFIRMATION) == confirmation else None
        decision = None if decision == UNDECIDED else decision
    best = study_rows.best_trials(storage, study_id, 1)
    incumbent = stage_results(storage, study_id, slots.BASELINE).get("incumbent")
    return Facts(
        study=study,
        progress=progress,
        states=study_rows.trial_states(storage, study_id),
        values=board.trial_values(storage, study_id),
        best_params=best[0].params if best else {},
        incumbent_mae=incumbent["validation"]["mae"] if incumbent else None,
        result=result,
        confirmation=confirmation,
        seconds=worker_seconds(storage, [study_id]).get(study_id, {}),
        parked=parked_slots(storage, study_id),
        decision=decision if result else None,
    )


def _digest(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:12]


def _image(folder: Path, facts: Facts) -> Image | None:
    title = f"{facts.study.name}: forecasts against what came"
    if figures.forecast_shown(facts.result) is None or facts.result is None:
        return None
    key = json.dumps([title, facts.result["forecasts"]], sort_keys=True)
    name = f"{facts.study.name.replace('/', '-')}-forecast.png"
    return board.keep_image(folder, name, key, lambda: figures.forecast_image(facts.result, title=title) or b"")


def plots(facts: Facts) -> dict[str, Any]:
    """The study's figures by id, those that there is something to draw for."""
    no_change = facts.study.definition.get("no_change_mae")
    drawn = {
        "forecast": figures.forecast(facts.result),
        "error-by-window": figures.error_by_window(facts.result),
        "best-so-far": figures.best_so_far(facts.values, incumbent=facts.incumbent_mae, no_change=no_change),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _attributes(facts: Facts) -> dict[str, str | None]:
    """A glance at the study, for the page that does not show its note."""
    best, incumbent = facts.best_trial, facts.incumbent_mae
    searched = confirmed = None
    if best is not None:
        searched = f"{mae_text(facts.values[best])}, trial {best}"
        searched += f"; incumbent {mae_text(incumbent)}" if incumbent is not None else ""
    if (skill := _best_confirmed(facts, "skill")) is not None:
        improvement = confirmed_improvement(facts)
        confirmed = f"skill {share_text(skill)}" + (
            f", improvement {share_text(improvement)}" if improvement is not None else ""
        )
    # Five rows a page, and the definition is the first.
    return {
        "progress": progress_text(facts),
        "search": searched,
        "confirmed": confirmed,
        DECISION: (facts.decision or UNDECIDED) if facts.result else None,
        CONFIRMATION: facts.confirmation,
    }


# --- the note -------------------------------------------------------------------------------------------------


def note(facts: Facts, image: Image | None = None) -> str:
    """The study's note, in Markdown."""
    study = facts.study
    parts = [
        f"# {study.symbol} with {study.model}, bars up to {study.as_of}",
        table_text(("", ""), _overview(facts)),
        "## Search",
        _search(facts),
        "## Confirmation",
        _confirmation(facts),
        "## Decision",
        facts.decision or ("None yet." if facts.result else "Needs the confirmation."),
        "## Go on",
        f"`{next_command(facts)}`",
    ]
    if facts.parked:
        parts += ["## Given up", _given_up(facts)]
    if image is not None:
        parts += ["## Forecasts", f"![Forecasts against what came]({image.path(study.study_id)})"]
    parts.append("*Rewritten by the runner: keep remarks of your own in the notes of trials.*")
    return "\n\n".join(parts) + "\n"


def next_command(facts: Facts) -> str:
    """The command that takes the study a step further."""
    study = facts.study
    if facts.progress.state != "finished" or facts.result is None:
        return f"launch-workers --symbols {study.symbol} --models {study.model}"
    if facts.decision and "; next: " in facts.decision:
        return facts.decision.rsplit("; next: ", 1)[1]
    if facts.decision:
        return f"launch-workers --symbols {study.symbol}"  # a new study, where there are newer bars
    return f"promote --symbols {study.symbol}"


def _overview(facts: Facts) -> list[tuple[str, ...]]:
    definition, counts = facts.study.definition, facts.study.definition["windows"]
    rows = [
        ("State", f"{facts.progress.state}: {progress_text(facts)}"),
        ("Forecast", f"{counted(counts['horizon'], 'bar')} ahead"),
        (
            "Error",
            f"{definition['metric']}, mean \\|forecast - close\\| in % of the last close, {definition['objective']}",
        ),
        ("Windows", _windows(facts)),
        ("Checkpoint", f"`{str(definition['checkpoint'])[:16]}`"),
    ]
    if time_spent := time_text(facts.seconds):
        rows.append(("Workers' time", time_spent))
    return rows


def _windows(facts: Facts) -> str:
    counts = facts.study.definition["windows"]
    if facts.result is None:
        return f"{counts['validation']} to search on, {counts['test']} of test"
    names = {"validation": "to search on", "confirmation": "to confirm on", "test": "of test"}
    found = facts.result["windows"]
    return "; ".join(
        f"{found[part]['count']} {name} ({found[part]['first']} to {found[part]['last']})"
        for part, name in names.items()
    )


def _search(facts: Facts) -> str:
    best, no_change = facts.best_trial, facts.study.definition.get("no_change_mae")
    rows = []
    if best is not None:
        mae = facts.values[best]
        gain, skill = gain_text(mae, facts.incumbent_mae), gain_text(mae, no_change)
        rows.append((f"**trial {best}**", mae_text(mae), gain, skill, _code(assigned(facts.best_params))))
    if facts.incumbent_mae is not None:
        rows.append(("incumbent", mae_text(facts.incumbent_mae), "", gain_text(facts.incumbent_mae, no_change), ""))
    if no_change is not None:
        rows.append(("no change", mae_text(no_change), "", "", ""))
    return table_text(("", "error", "improvement", "skill", "configuration"), rows)


def _confirmation(facts: Facts) -> str:
    result = facts.result
    if result is None:
        return (
            "Comes when the budget is spent: the five best trials and the incumbent on more windows, with fresh seeds."
        )
    told = f"{counted(result['passes'], 'pass')} with fresh seeds"
    if result["sampling_error"]:
        told += f"; sampling leaves {share_text(result['sampling_error'], sign=False)} of each error uncertain"
    rows = [(*row[:-1], _code(row[-1]) if row[-1] else "") for row in confirmed_rows(result)]
    if result["candidates"]:
        rows[0] = (f"**{rows[0][0]}**", *rows[0][1:])
    return f"{told}.\n\n" + table_text(CONFIRMED_HEAD, rows)


CONFIRMED_HEAD = ("", "error", "improvement", "skill", "on test", "configuration")


def confirmed_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What was confirmed, best first, under CONFIRMED_HEAD; one that could not be measured says why."""
    ranked = sorted(result["candidates"], key=lambda one: one["confirmation"]["mae"])
    named = [(f"trial {one['trial']}", one) for one in ranked] + list(result["baselines"].items())
    incumbent = figures.incumbent_of(result)
    old = incumbent["confirmation"]["mae"] if incumbent else None
    rows = []
    for name, one in named:
        if "error" in one:
            rows.append((name, "", "", "", "", one["error"]))
            continue
        mae, test = one["confirmation"]["mae"], one["test"]["mae"]
        gain = "" if name == "incumbent" else gain_text(mae, old)
        skill = share_text(one["confirmation"]["skill"])
        rows.append((name, mae_text(mae), gain, skill, mae_text(test), assigned(one["params"])))
    no_change = result["no_change"]
    mae, test = no_change["confirmation"]["mae"], no_change["test"]["mae"]
    return [*rows, ("no change", mae_text(mae), "", "", mae_text(test), "")]


def _given_up(facts: Facts) -> str:
    lines = [f"- {STAGES[item.stage]} slot {item.number}: {_code(item.error)}" for item in facts.parked[:PARKED_SHOWN]]
    if len(facts.parked) > PARKED_SHOWN:
        lines.append(f"- and {len(facts.parked) - PARKED_SHOWN} more; see `studies show {facts.study.name}`")
    return "\n".join(lines)


def _decisions(rows: Sequence[SymbolDecision]) -> dict[str, str]:
    """What a promotion decided, by study."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    found = {}
    for row in rows:
        for pair in row.pairs:
            if pair.study == row.study:
                text = f"{row.decision} on {day}: {row.reason}{evidence(row)}"
                found[pair.study] = text + (f"; next: {row.next}" if row.next else "")
            else:
                verdict = "its model's own file written" if pair.status == "success" else "not chosen"
                found[pair.study] = f"{verdict} on {day}: {pair.reason}; the symbol's decision is on {row.study}"
    return found


def evidence(row: SymbolDecision) -> str:
    """The numbers behind a decision, in brackets; nothing where there is no incumbent to compare with."""
    if row.improvement is None:
        return ""
    parts = [f"improvement {share_text(row.improvement)}"]
    if interval := interval_text(row):
        parts.append(f"95 % interval {interval}")
    if row.p_value is not None:
        parts.append(f"p {row.p_value:.3f}")
    return f" ({', '.join(parts)})"


def interval_text(row: SymbolDecision) -> str:
    """The 95 % interval of the improvement; nothing where there is none."""
    if row.improvement_low is None or row.improvement_high is None:
        return ""
    return f"{share_text(row.improvement_low)} to {share_text(row.improvement_high)}"


def progress_text(facts: Facts) -> str:
    text = f"{facts.progress.done} of {facts.progress.budget} trials"
    if pruned := facts.states.get("pruned"):
        text += f", {pruned} pruned"
    if facts.progress.parked:
        text += f", {facts.progress.parked} given up"
    return text


def confirmed_improvement(facts: Facts) -> float | None:
    best, incumbent = _best_confirmed(facts, "mae"), figures.incumbent_of(facts.result)
    if best is None or incumbent is None or not incumbent["confirmation"]["mae"]:
        return None
    return 1 - best / incumbent["confirmation"]["mae"]


def _best_confirmed(facts: Facts, key: str) -> float | None:
    best = figures.best_candidate(facts.result)
    return None if best is None else best["confirmation"][key]


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers, in the columns between the first and the last, are flush right."""
    rules = ["---", *["---:"] * (len(head) - 2), "---"]
    # The dashboard's tables leave no room between columns and break numbers from their units: spaces that hold do not.
    first, *rest = (
        [line[0], *("\u2003" + cell.replace(" %", "\u00a0%") for cell in line[1:])] for line in (head, *rows)
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, rules, *rest))


def mae_text(value: float) -> str:
    return f"{100 * value:.4f} %"


def gain_text(mae: float, reference: float | None) -> str:
    return share_text(1 - mae / reference) if reference else ""


def share_text(value: float, *, sign: bool = True) -> str:
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def _code(error: str) -> str:
    """What somebody else wrote, without a meaning in Markdown."""
    return "`" + " ".join(error.replace("`", "'").replace("|", "/").split()) + "`"


def time_text(seconds: Mapping[str, float]) -> str:
    """What workers' time went into, most of it first."""
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {duration_text(spent)}" for name, spent in largest if spent >= 0.05)


def duration_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
