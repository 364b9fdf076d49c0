"""Five hundred studies of a hundred trials in one database: what a worker and a person wait for.

`python -m benchmarks.many_studies [--json]`, about 20 s; a private server in a temporary folder. Milliseconds of this
machine, the fastest of five, against what they must stay below.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from launch.live import Watch
from storage import database, embedded, slots
from storage.database import RetryingStorage

PICK_MS, LIST_MS = 20, 2000  # to pick the next slot; for `studies list`
LOOK_MS = 200  # for the live table, which then looks every 20 s
STUDIES, TRIALS = 500, 100
DEFINITION = {"no_change_mae": 1.0, "bars": "b" * 64, "checkpoint": "c" * 64, "windows": {"horizon": 1}}

# Every study has a baseline and a confirmation; every tenth one is under way, the others are finished.
FILL = """
insert into studies (study_id, study_name)
    select s, 'S' || to_char(s, 'FM000') || '/toto@2026-11-20' from generate_series(1, :studies) s;
insert into study_directions (study_id, direction, objective)
    select s, 'MINIMIZE', 0 from generate_series(1, :studies) s;
insert into study_user_attributes (study_id, key, value_json)
    select s, 'definition', :definition from generate_series(1, :studies) s;
insert into trials (trial_id, number, study_id, state, datetime_start, datetime_complete)
    select (s - 1) * :trials + n, n - 1, s, 'COMPLETE', now(), now()
    from generate_series(1, :studies) s, generate_series(1, :trials) n where s % 10 > 0 or n <= :trials / 2;
select setval('trials_trial_id_seq', :studies * :trials);
insert into trial_values (trial_id, objective, value, value_type)
    select trial_id, 0, (trial_id * 7919 % 1000) / 1000.0, 'FINITE' from trials;
insert into trial_params (trial_id, param_name, param_value, distribution_json)
    select trial_id, p, 1, '{"name": "CategoricalDistribution", "attributes": {"choices": [64, 128, 256]}}'
    from trials, unnest(array['aggregate', 'num_samples']) p;
insert into trial_system_attributes (trial_id, key, value_json) select trial_id, 'claim', '"h:1:' || trial_id || '"'
    from trials;
insert into trial_user_attributes (trial_id, key, value_json) select trial_id, k, '"host:1"'
    from trials, unnest(array['worker', 'measured']) k;
insert into trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
    select trial_id, step, 0.5, 'FINITE' from trials, generate_series(10, 20, 10) step;
insert into slots (study_id, stage, number, label, state, result)
    select s, 0, 0, 'incumbent', 'done', '{"validation": {"mae": 0.9}}' from generate_series(1, :studies) s;
insert into slots (study_id, stage, number, state, claim)
    select s, 1, n - 1, case when s % 10 > 0 or n <= :trials / 2 then 'done' else 'free' end,
           case when s % 10 > 0 or n <= :trials / 2 then 'h:1:' || s || ':' || n end
    from generate_series(1, :studies) s, generate_series(1, :trials) n;
insert into slots (study_id, stage, number, label, state, result)
    select s, 2, 0, 'confirmation', case when s % 10 > 0 then 'done' else 'free' end,
           case when s % 10 > 0 then cast(:confirmation as jsonb) end
    from generate_series(1, :studies) s;
"""


def confirmation() -> dict[str, Any]:
    """A result about as long as real ones, 60 kB: seven configurations, an error for each of 300 windows."""
    errors = random.Random(0)

    def measured(windows: int) -> dict[str, Any]:
        return {"mae": 0.8, "skill": 0.2, "windows": windows, "errors": [errors.random() for _ in range(windows)]}

    def one() -> dict[str, Any]:
        counts = {"validation": 30, "confirmation": 250, "test": 20}
        return {"params": {}, **{name: measured(count) for name, count in counts.items()}}

    drawn = [[errors.random() for _ in range(50)] for _ in range(8)]
    return {
        "candidates": [{"trial": number, **one()} for number in range(5)],
        "baselines": {"incumbent": one(), "stored": one()},
        "no_change": measured(300),
        "forecasts": drawn,
    }


def fill(storage: RetryingStorage) -> None:
    """Make the studies in an empty database."""
    values = {"studies": STUDIES, "trials": TRIALS, "definition": json.dumps(DEFINITION)}
    values["confirmation"] = json.dumps(confirmation())
    storage.transaction(lambda connection: connection.execute(text(FILL), values))


def list_studies(url: str, folder: Path) -> str:
    """What `studies list --json` prints."""
    command = [str(Path(sys.executable).parent / "studies"), "list", "--json", "--storage", url]
    return subprocess.run(command, env=os.environ, cwd=folder, capture_output=True, text=True, check=True).stdout


def fastest_ms(work: Callable[[], object], times: int = 5) -> float:
    """Of several times, since other work on the machine only adds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def measure(url: str, folder: Path) -> dict[str, tuple[float, int]]:
    """Milliseconds and their limit, by what was done."""
    storage = database.open_storage(url, wait_s=10)
    fill(storage)
    everyone = list(range(1, STUDIES + 1))
    picks: dict[str, Callable[[], object]] = {
        "progress of every study": lambda: slots.progress(storage),
        "free slots of every study": lambda: slots.free(storage, everyone),
        "claim": lambda: slots.claim(storage, 10, worker="w:1", lease_s=60),
        "claim where there is none": lambda: slots.claim(storage, 11, worker="w:1", lease_s=60),
        "reap": lambda: slots.reap(storage, everyone),
        "all trials of a study": lambda: storage.get_all_trials(10),
        "new trials of a study": lambda: storage._get_trials(10, None, {901}, 950),
        "create and end a trial": lambda: storage.set_trial_state_values(storage.create_new_trial(10), TrialState.FAIL),
    }
    found = {name: (fastest_ms(work), PICK_MS) for name, work in picks.items()}
    watch = Watch(storage, {study_id: f"S{study_id}" for study_id in everyone})
    found["a look of the live table at every study"] = (fastest_ms(watch.look), LOOK_MS)
    found["studies list, as a process"] = (fastest_ms(lambda: list_studies(url, folder), times=2), LIST_MS)
    storage.engine.dispose()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # root's server runs as another user, who must reach it
        server = embedded.start(folder / "server")
        os.environ["PGPASSFILE"] = str(server.passfile)
        try:
            found = measure(server.url, folder)
        finally:
            embedded.stop(folder / "server")
    if arguments.json:
        print(json.dumps({name: {"ms": ms, "limit_ms": limit} for name, (ms, limit) in found.items()}, indent=2))
    else:
        table = Table("500 studies of 100 trials", "ms", "below")
        for name, (ms, limit) in found.items():
            table.add_row(name, f"{ms:.1f}", str(limit))
        Console().print(table)
    return 0 if all(ms < limit for ms, limit in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
