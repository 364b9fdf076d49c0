"""The summary of a promotion as a file, in the form that readers of the predecessor's summaries know.

`{results}/compiled_optimization_{TIMESTAMP}.json`, an entry for every symbol and model.
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
from storage.database import RetryingStorage
from storage.progress import study_progress
from studies import study as studying
from studies.promoting import ModelOutcome, SymbolDecision

PATTERN = "compiled_optimization_*.json"


def write(storage: RetryingStorage, folder: Path, rows: Sequence[SymbolDecision]) -> Path | None:
    """Write the summary of a promotion; None where the newest one in the folder says the same already.

    Raises ConfigFileError where it cannot be written.
    """
    content = summary(storage, [pair for row in rows for pair in row.pairs])
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
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigFileError(f"{path}: {error.strerror}; set [promotion] results_dir") from error
    return path


def summary(storage: RetryingStorage, pairs: Sequence[ModelOutcome]) -> dict[str, Any]:
    """What the file says. Seconds are those that workers spent in trials; their total is from first to last trial."""
    ids = {study.name: study.study_id for study in studying.list_studies(storage)}
    efforts = study_rows.efforts(storage)
    found = [efforts[ids[pair.study]] for pair in pairs if ids[pair.study] in efforts]
    progress, models = study_progress(storage), sorted({pair.model for pair in pairs})
    results = []
    for pair in pairs:
        effort = efforts.get(ids[pair.study])
        results.append(
            {
                "symbol": pair.symbol,
                "status": pair.status,
                "model": pair.model,
                "val_mae": pair.mae,
                "test_mae": pair.test_mae,
                "improved": pair.status == "success" and pair.reason == "improved",
                "elapsed_s": round(effort.seconds, 3) if effort else 0.0,
                "error": pair.reason if pair.status == "failed" else None,
                "reason": pair.reason,
                "study": pair.study,
            }
        )
    return {
        "results": results,
        "total_time_s": round(max(e.last for e in found) - min(e.first for e in found), 3) if found else 0.0,
        "config": {
            "symbols": sorted({pair.symbol for pair in pairs}),
            "trials": max((progress[ids[pair.study]].budget for pair in pairs), default=0),
            "workers": len({worker for effort in found for worker in effort.workers}),
            "model": "both" if len(models) > 1 else models[0],
            "eval_runs": max((pair.passes or 0 for pair in pairs), default=0),
        },
    }
