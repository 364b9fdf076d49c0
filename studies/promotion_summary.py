"""The summary of a promotion as a file, in the form that readers of the predecessor's summaries know.

`{results}/compiled_optimization_{TIMESTAMP}.json`: an entry a symbol, with one for each of its models under "models".
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage import study_rows
from storage.configs import ConfigFileError
from storage.files import replace_file
from storage.progress import most_workers_at_once, study_progress
from storage.retrying import RetryingStorage
from studies import study as studying
from studies.promoting import ModelOutcome, SymbolDecision

PATTERN = "compiled_optimization_*.json"


def write(storage: RetryingStorage, folder: Path, decisions: Sequence[SymbolDecision]) -> Path | None:
    """Write the summary of a promotion; None where the newest one in the folder says the same already.

    Raises ConfigFileError where it cannot be written.
    """
    content = summary(storage, decisions)
    before = max(folder.glob(PATTERN), default=None)
    if before is not None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(before.read_text()) == content:
                return None
    stamp = f"compiled_optimization_{time.strftime('%Y%m%d_%H%M%S')}"
    names = (f"{stamp}.json", *(f"{stamp}_{number}.json" for number in range(1, 100)))  # several in one second
    path = next(path for name in names if not (path := folder / name).exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}; set [promotion] results_dir") from error
    return path


def summary(storage: RetryingStorage, decisions: Sequence[SymbolDecision]) -> dict[str, Any]:
    """What the file says. Errors are fractions; seconds are those that workers spent in trials.

    `total_time_s` is from the first trial to the end of the last one. `workers` is the largest number of workers that
    were at these studies at the same time: those of a run, whatever was restarted.
    """
    ids = {study.name: study.study_id for study in studying.list_studies(storage)}
    outcomes = [outcome for decision in decisions for outcome in decision.pairs]
    of_studies = [ids[outcome.study] for outcome in outcomes]
    efforts = study_rows.efforts(storage, of_studies)
    found = [efforts[study_id] for study_id in of_studies if study_id in efforts]
    progress, models = study_progress(storage, of_studies), sorted({outcome.model for outcome in outcomes})

    def entry(outcome: ModelOutcome) -> dict[str, Any]:
        effort = efforts.get(ids[outcome.study])
        return {
            "symbol": outcome.symbol,
            "status": outcome.status,
            "model": outcome.model,
            "val_mae": outcome.validation_mae,
            "test_mae": outcome.test_mae,
            "improved": outcome.status == "success" and outcome.reason == "improved",
            "elapsed_s": round(effort.seconds, 3) if effort else 0.0,
            "error": outcome.reason if outcome.status == "failed" else None,
            "reason": outcome.reason,
            "study": outcome.study,
        }

    return {
        "results": [
            # The model that the decision is about speaks for its symbol.
            {
                **entry(next(one for one in decision.pairs if one.study == decision.study)),
                "models": {outcome.model: entry(outcome) for outcome in decision.pairs},
            }
            for decision in decisions
            if decision.pairs  # without a study there is nothing to say
        ],
        "total_time_s": round(max(e.last for e in found) - min(e.first for e in found), 3) if found else 0.0,
        "config": {
            "symbols": sorted({outcome.symbol for outcome in outcomes}),
            "trials": max((progress[study_id].budget for study_id in of_studies), default=0),
            "workers": most_workers_at_once(storage, of_studies),
            "model": "both" if len(models) > 1 else models[0],
            "eval_runs": max((outcome.passes or 0 for outcome in outcomes), default=0),
        },
    }
