"""Whether a search ended exactly with its budget: its database against its plan, its logs and a new measurement."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from launch.worker import RunPlan
from objectives.bars import read_bars
from storage import retrying, slots
from storage.progress import read_confirmations, study_progress
from storage.retrying import RetryingStorage
from studies import evaluators
from studies import study as studying
from studies.confirmation import confirm
from studies.evidence import to_json
from studies.series import Series

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
UNEXPECTED = re.compile(r"unexpected error|^\w+Error: |^\S+\.\w+Error: ")  # the last line of a traceback too
ACKNOWLEDGED = re.compile(r" I (?P<study>\S+) #(?P<number>\d+) (?P<state>complete|pruned) .*?mae=(?P<mae>\S+)")


@dataclass(kw_only=True)
class Result:
    """What was done and what came of it. `wrong` says in words what should not be; empty: all is as it should."""

    seed: int
    seconds: float = 0.0
    dealt: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # kinds of faults that this machine cannot have
    numbers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def expect(self, name: str, found: int, wanted: int) -> None:
        self.numbers[name] = found
        if found != wanted:
            self.wrong.append(f"{name}: {found} instead of {wanted}")


def check(result: Result, storage: RetryingStorage, folder: Path, *, model: str, studies: int, trials: int) -> None:
    """Fill in the numbers of a run of `studies` with `trials` each, whose logs are in `folder`."""
    total = studies * trials
    names = [study.name for study in studying.list_studies(storage)]
    found = {name: optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False) for name in names}
    everything = [trial for some in found.values() for trial in some]
    ended = [trial for trial in everything if trial.state in FINISHED]
    result.expect("studies", len(names), studies)
    result.expect("finished trials", len(ended), total)
    result.expect("RUNNING trials", sum(trial.state == TrialState.RUNNING for trial in everything), 0)
    result.wrong += [of_running(storage, trial) for trial in everything if trial.state == TrialState.RUNNING]
    result.numbers["failed trials"] = sum(trial.state == TrialState.FAIL for trial in everything)

    unexpected = [line for line in log_lines(folder / "logs") if UNEXPECTED.search(line)]
    result.expect("unexpected errors of workers", len(unexpected), 0)
    result.wrong += unexpected
    said = acknowledged(folder / "logs")
    result.numbers["acknowledged trials"] = len(said)
    by_number = {name: {trial.number: trial for trial in some} for name, some in found.items()}
    result.expect("lost trials", sum(not is_there(line, by_number) for line in said), 0)

    statement = text("select state, claim from slots where stage = :stage")
    rows = storage.transaction(lambda c: c.execute(statement, {"stage": slots.TRIAL}).all())
    claims = Counter(trial.system_attrs[retrying.CLAIM_ATTR] for trial in ended)
    result.expect("slots done", sum(row.state == "done" for row in rows), total)
    result.expect("slots done twice", len(ended) - len(claims), 0)
    result.expect("trials without a slot", len(set(claims) - {row.claim for row in rows}), 0)
    result.expect("parked slots", sum(p.parked for p in study_progress(storage).values()), 0)
    result.expect("open slots", sum(p.open for p in study_progress(storage).values()), 0)

    anew = remeasure(storage, folder, model, found)
    result.expect("trials measured anew", anew.trials, total)
    result.expect("trials with another number then", anew.other_trials, 0)
    result.expect("studies confirmed anew", anew.confirmations, studies)
    result.expect("confirmations with other numbers then", anew.other_confirmations, 0)


def of_running(storage: RetryingStorage, trial: FrozenTrial) -> str:
    """What the row of the claim that made this trial looks like."""
    claim = trial.system_attrs.get(retrying.CLAIM_ATTR)
    statement = text("select stage, number, state, failures, losses, error from slots where claim = :claim")
    row = storage.transaction(lambda c: c.execute(statement, {"claim": claim}).first())
    found = dict(row._mapping) if row else "not on any row"
    return f"trial {trial.number}, begun {trial.datetime_start}, is RUNNING; its claim {claim}: {found}"


def log_lines(logs: Path) -> list[str]:
    return [line for path in sorted(logs.glob("*/worker-*.log")) for line in path.read_text().splitlines()]


def acknowledged(logs: Path) -> list[Mapping[str, str]]:
    """What the workers said they had finished."""
    return [match.groupdict() for line in log_lines(logs) if (match := ACKNOWLEDGED.search(line))]


def is_there(line: Mapping[str, str], trials: Mapping[str, Mapping[int, FrozenTrial]]) -> bool:
    """Whether an acknowledged trial is in the database, in its state and with its value."""
    trial = trials.get(line["study"], {}).get(int(line["number"]))
    return trial is not None and (trial.state.name.lower(), f"{trial.value:.6g}") == (line["state"], line["mae"])


@dataclass(kw_only=True)
class Anew:
    """What was measured here again, and how much of it came to something else."""

    trials: int = 0
    other_trials: int = 0  # by their number or a report
    confirmations: int = 0
    other_confirmations: int = 0


def timeless(evidence: Any) -> Any:
    """JSON of a confirmation without what a clock says."""
    if isinstance(evidence, Mapping):
        timed = ("seconds", "latency_s")
        return {name: timeless(value) for name, value in evidence.items() if name not in timed}
    return [timeless(one) for one in evidence] if isinstance(evidence, list | tuple) else evidence


def remeasure(storage: RetryingStorage, folder: Path, model: str, trials: Mapping[str, list[FrozenTrial]]) -> Anew:
    """Measure every finished trial's params and every confirmation here, undisturbed, by one evaluator."""
    import torch

    job = RunPlan.read(sorted((folder / "logs").iterdir())[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forecaster = evaluators.load_forecaster(job.config, model, device="cpu")
    evaluator = evaluators.evaluator_of(job.config, forecaster, cache_bytes=2**30, keep=False)
    anew = Anew()
    for study in studying.list_studies(storage):
        bars, _ = read_bars(Path(job.series[study.symbol]))
        series = Series(symbol=study.symbol, path=Path(job.series[study.symbol]), bars=bars)
        run = studying.start(storage, job.config, study, series, evaluator.forecaster.fingerprint)
        known: dict[str, tuple[float, dict[int, float]]] = {}
        for trial in trials[study.name]:
            if trial.state not in FINISHED:
                continue
            key = json.dumps(trial.params, sort_keys=True)
            if key not in known:
                reports: dict[int, float] = {}
                params = run.space.complete(trial.params)
                mae = evaluator.measure(
                    run.split.validation, params, passes=studying.SEARCH_PASSES, on_rung=reports.__setitem__
                ).mae
                known[key] = mae, reports
            mae, reports = known[key]
            same = all(reports[step] == value for step, value in trial.intermediate_values.items())
            last = reports[max(trial.intermediate_values)] if trial.state == TrialState.PRUNED else mae
            anew.trials += 1
            anew.other_trials += not (same and trial.value == last)
        confirmed = read_confirmations(storage, [study.study_id])[study.study_id]
        if confirmed.result is not None:
            portfolio = [one["params"] for one in confirmed.result["candidates"] if one["source"] == "portfolio"]
            evidence = to_json(confirm(run, evaluator, confirmed.params or {}, portfolio=portfolio))
            anew.confirmations += 1
            anew.other_confirmations += timeless(confirmed.result) != timeless(json.loads(json.dumps(evidence)))
    torch.set_num_threads(threads)
    return anew
