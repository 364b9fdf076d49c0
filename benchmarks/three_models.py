"""Three models searched, confirmed, promoted and compared on every symbol of a folder: which wins where, and together?

The bundled tiny checkpoints of Toto, Kronos and Chronos-2, with the commands that a user starts: `launch-workers`,
`promote --ensemble` and `studies compare`, in processes of their own with a private server. It counts the trials of
every study, and ends with an error where one has another number than asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from optuna.study import Study as OptunaStudy
from optuna.trial import TrialState

from benchmarks import private, recording
from storage import database
from studies import study as studying

MODELS = ("toto", "kronos", "chronos2")
SETTINGS = private.SETTINGS.replace('data.dir = "bars"', "") + "".join(
    f'[{model}]\ncheckpoint = "{model}-tiny"\n' for model in MODELS
)


def main() -> None:
    parser = recording.parser("three_models", __doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the bars")
    parser.add_argument("--symbols", help="only these, as A,B")
    parser.add_argument("--trials", type=recording.at_least_one, default=40, help="of each study")
    parser.add_argument("--windows", type=recording.at_least_one, default=60, help="that are compared in the end")
    parser.add_argument("--cpus", type=recording.at_least_one, default=2, help="workers")
    options = parser.parse_args()
    with private.folder() as folder:
        found = run(options, folder)
    show(found)
    recording.write(options, found, postgres=found.pop("postgres"))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every command's answer. Raises CalledProcessError where one fails, RuntimeError for a wrong number of trials."""
    settings = folder / "studies.toml"
    settings.write_text(SETTINGS)
    asked = ["--config", str(settings), "--data-dir", str(options.data_dir.absolute()), "--models", ",".join(MODELS)]
    asked += ["--symbols", options.symbols] if options.symbols else []

    def command(*words: str) -> Any:
        program = str(Path(sys.executable).parent / words[0])
        ended = subprocess.run([program, *words[1:], *asked], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ended.stdout) if "--json" in words else None

    with private.server(folder) as server:
        began = time.perf_counter()
        command("launch-workers", "--cpus", str(options.cpus), "--trials", str(options.trials), "--plain")
        took = time.perf_counter() - began
        storage = database.open_storage(server.url, wait_s=10)
        trials = {study.name: finished(OptunaStudy(study.name, storage)) for study in studying.list_studies(storage)}
        if wrong := {name: count for name, count in trials.items() if count != options.trials}:
            raise RuntimeError(f"{options.trials} trials of each study were asked for: {wrong}")
        decisions = command("promote", "--ensemble", "--json")
        words = ("--params", "best,stored", "--horizon", "1", "--windows", str(options.windows))
        compared = command("studies", "compare", *words, "--cpus", str(options.cpus), "--json")["rows"]
        postgres = private.postgres(storage)
        storage.engine.dispose()
    return {"search, s": took, "trials": trials, "decisions": decisions, "compared": compared, "postgres": postgres}


def finished(study: OptunaStudy) -> int:
    """Trials that count towards the budget."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def show(found: dict[str, Any]) -> None:
    """Which model won where, what the ensemble gains over it, and both on the newest windows before test."""
    trials = found["trials"]
    print(f"{len(trials)} studies of {next(iter(trials.values()))} trials each, {found['search, s']:.0f} s")
    rows = []
    for row in found["decisions"]:
        errors = {pair["model"]: pair["mae"] for pair in row["pairs"] if pair["mae"] is not None}
        together = row["ensemble"] or {}
        members = ", ".join(f"{one['model']} {one['weight']:.2f}" for one in together.get("members", ()))
        ends = [recording.per_cent(together.get(f"improvement_{end}"), sign=True) for end in ("low", "high")]
        rows.append(
            (
                row["symbol"],
                *(f"{errors[model]:.4%}" if model in errors else None for model in MODELS),
                together.get("single") or min(errors, key=lambda model: errors[model], default=None),
                members or together.get("reason"),
                recording.per_cent(together.get("improvement"), sign=True),
                " to ".join(ends),
                recording.per_cent(together.get("improvement_test"), sign=True),
                f"{row['decision']} {row['model']}: {row['reason']}",
            )
        )  # fmt: skip
    columns = ("symbol", *(f"{model} MAE" for model in MODELS), "single that wins", "ensemble", "over that one",
               "95 % interval", "on test", "decision")  # fmt: skip
    recording.table("Confirmed errors, and the ensemble on the later half of the windows", columns, rows)
    shown = [
        (row["symbol"], row["label"], row["mae"] and f"{row['mae']:.4%}", recording.per_cent(row["skill"], sign=True))
        for row in found["compared"]
        if row["mae"] is not None
    ]
    recording.table("Compared", ("symbol", "configuration", "MAE", "skill"), shown)


if __name__ == "__main__":
    main()
